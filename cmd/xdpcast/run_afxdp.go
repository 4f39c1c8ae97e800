package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/forward"
	"xdpcast/pkg/xsk"
)

// afxdpFlags configure the AF_XDP path. Those of frames and budget are signed, so that the error
// for a negative one shows its value.
func afxdpFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "afxdp-cpus", Usage: "pin the afxdp workers of queues 0, 1, ... to these CPUs in turn: `LIST`, such as 2,4-7", DefaultText: "not pinned"},
		&cli.IntFlag{Name: "afxdp-frames", Usage: "frames of 2 or 4 kB for each afxdp worker: `N`, 6144 to 524288", DefaultText: "8192"},
		&cli.BoolFlag{Name: "afxdp-hugepages", Usage: "take these frames from huge pages of 2 MB (sysctl vm.nr_hugepages)"},
		&cli.DurationFlag{Name: "afxdp-busy-poll", Usage: "let afxdp workers poll the driver for `TIME` at each call, up to 1s; 0 disables", DefaultText: "0s"},
		&cli.BoolFlag{Name: "afxdp-prefer-busy-poll", Usage: "with --afxdp-busy-poll: keep the driver's interrupts off between polls"},
		&cli.IntFlag{Name: "afxdp-busy-poll-budget", Usage: "with --afxdp-busy-poll: `N` packets per poll, up to 65535", DefaultText: "the kernel's 8"},
	}
}

// afxdpOptions parses these flags.
func afxdpOptions(c *cli.Context) (o forward.AFXDPOptions, err error) {
	o = forward.AFXDPOptions{
		Frames: c.Int("afxdp-frames"), HugePages: c.Bool("afxdp-hugepages"),
		BusyPoll: c.Duration("afxdp-busy-poll"), PreferBusyPoll: c.Bool("afxdp-prefer-busy-poll"), BusyPollBudget: c.Int("afxdp-busy-poll-budget"),
	}
	if c.IsSet("afxdp-frames") && o.Frames == 0 {
		o.Frames = -1 // 0 would mean the default
	}
	if o.CPUs, err = parseCPUs(c.String("afxdp-cpus")); err != nil {
		return o, usagef("--afxdp-cpus %q: %w", c.String("afxdp-cpus"), err)
	}
	err = o.Validate()
	var wrong *xsk.OptionError
	if !errors.As(err, &wrong) {
		return o, err
	}
	name := map[string]string{
		"CPUs": "afxdp-cpus", "Frames": "afxdp-frames", "BusyPoll": "afxdp-busy-poll", "BusyPollBudget": "afxdp-busy-poll-budget",
	}[wrong.Option]
	if name == "" {
		return o, err
	}
	value := fmt.Sprint(wrong.Value)
	if name == "afxdp-frames" {
		value = c.String(name)
	}
	return o, usagef("--%s %s: want %s", name, value, wrong.Want)
}

// maxCPU is far above CPU_SETSIZE of sched_setaffinity(2).
const maxCPU = 1 << 16

// parseCPUs parses a list in the kernel's format (cpuset(7)): "2,4-7"; empty for none.
func parseCPUs(text string) (cpus []int, err error) {
	if text == "" {
		return nil, nil
	}
	for part := range strings.SplitSeq(text, ",") {
		first, last, ranged := strings.Cut(part, "-")
		if !ranged {
			last = first
		}
		from, err := strconv.ParseUint(first, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("%q: want numbers of CPUs and ranges, such as 2,4-7", part)
		}
		to, err := strconv.ParseUint(last, 10, 16)
		if err != nil || to < from {
			return nil, fmt.Errorf("%q: want numbers of CPUs and ranges, such as 2,4-7", part)
		}
		for cpu := from; cpu <= to; cpu++ {
			if len(cpus) == maxCPU {
				return nil, fmt.Errorf("too many: want at most %d", maxCPU)
			}
			cpus = append(cpus, int(cpu))
		}
	}
	return cpus, nil
}
