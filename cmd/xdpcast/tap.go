package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/tap"
	"xdpcast/pkg/loader"
)

func tapCommand() *cli.Command {
	return &cli.Command{
		Name:      "tap",
		Usage:     "record a rule's packets as they came in and as they went out",
		ArgsUsage: "RULE",
		Description: "Writes pcapng, which Wireshark and tshark read while it is being written:\n" +
			"xdpcast tap cam1 -w - | wireshark -k -i -\n" +
			"A packet's comment names the rule, and the output slot or the drop reason. Without --in, --out and --dropped\n" +
			"all are recorded. It ends when interrupted, or with --count; packets for which there was no room are counted, and the stream\n" +
			"itself loses nothing. On the kernel path it also works while no daemon runs.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "in", Usage: "record packets as they came in"},
			&cli.StringSliceFlag{Name: "out", Usage: "record packets of this `SLOT` as they went out, or all (repeatable)"},
			&cli.BoolFlag{Name: "dropped", Usage: "record packets, and copies, that were not sent"},
			&cli.StringFlag{Name: "sample", Usage: "record one packet in `N`, written 1/N, with its copies", Value: "1/1"},
			&cli.Uint64Flag{Name: "count", Usage: "end after `N` packets; 0: no limit"},
			&cli.UintFlag{Name: "snap", Usage: "record at most `BYTES` of each packet", Value: tap.MaxSnap},
			&cli.StringFlag{Name: "write", Aliases: []string{"w"}, Usage: "write to `FILE`, which is replaced; - is standard output"},
			pinDirFlag(),
		},
		Action: tapRule,
	}
}

func tapRule(c *cli.Context) error {
	if err := nargs(c, 1, 1); err != nil {
		return err
	}
	q, err := tapOptions(c)
	if err != nil {
		return err
	}
	to := c.String("write")
	if to == "" {
		return usagef("-w missing: want the file to write, or - for standard output")
	}
	ctx, cancel := context.WithCancel(c.Context)
	defer cancel()
	out := &tapOutput{out: c.App.Writer, name: to}
	if to == "-" {
		if isTerminal(c.App.Writer) {
			return usagef("-w -: standard output is a terminal, but pcapng is binary: want a file, or a pipe to wireshark -k -i -")
		}
		if file, ok := c.App.Writer.(*os.File); ok {
			go func() {
				if readerGone(ctx, file) {
					cancel()
				}
			}()
		}
	}
	packets, lost, err := tapFrom(ctx, c, q, out)
	if out.readerGone {
		err = nil // it has seen enough
	}
	err = errors.Join(err, out.close())
	if err == nil || packets > 0 {
		fmt.Fprintf(c.App.ErrWriter, "xdpcast: %s of rule %s recorded, %s lost by the tap\n", plural(int(packets), "packet"), q.Rule, plural(int(lost), "packet"))
	}
	return err
}

func tapOptions(c *cli.Context) (q control.TapQuery, err error) {
	q.Rule, q.Count, q.Options = c.Args().First(), c.Uint64("count"), tap.Everything
	if c.IsSet("in") || c.IsSet("out") || c.IsSet("dropped") {
		q.In, q.Dropped, q.Slots = c.Bool("in"), c.Bool("dropped"), 0
		for _, text := range c.StringSlice("out") {
			slots, err := control.ParseSlots(text)
			if err != nil || text == "" {
				return q, usagef("--out %q: want the number of a slot, or all", text)
			}
			q.Slots |= slots
		}
		if !q.In && !q.Dropped && q.Slots == 0 {
			return q, usagef("nothing to record: want --in, --out or --dropped, or none of them for all")
		}
	}
	of, ok := strings.CutPrefix(c.String("sample"), "1/")
	n, err := strconv.ParseUint(of, 10, 32)
	if !ok || err != nil || n < 1 {
		return q, usagef("--sample %q: want 1/N, such as 1/100", c.String("sample"))
	}
	q.Sample, q.Snap = uint32(n), uint32(c.Uint("snap"))
	if c.Uint("snap") < 1 || c.Uint("snap") > tap.MaxSnap {
		return q, usagef("--snap %d: want 1 to %d bytes", c.Uint("snap"), tap.MaxSnap)
	}
	return q, nil
}

// tapFrom taps through the daemon, or only in the kernel while none runs.
func tapFrom(ctx context.Context, c *cli.Context, q control.TapQuery, out io.Writer) (packets, lost uint64, err error) {
	packets, lost, err = client(c).Tap(ctx, q, out)
	if !errors.Is(err, control.ErrNotRunning) {
		return packets, lost, err
	}
	packets, lost, kernelErr := tapKernel(ctx, c.String("pin-dir"), q, out)
	if errors.Is(kernelErr, loader.ErrNotLoaded) {
		return 0, 0, err
	}
	return packets, lost, withRootHint(kernelErr)
}

func tapKernel(ctx context.Context, pinDir string, q control.TapQuery, out io.Writer) (packets, lost uint64, err error) {
	t, err := loader.OpenTap(loader.TapOptions{PinDir: pinDir, Rule: q.Rule, Options: q.Options})
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, t.Close()) }()
	outputs, userSpace := t.InForce()
	last := bits.Len64(q.Slots) - 1
	switch {
	case outputs == 0:
		return 0, 0, fmt.Errorf("no rule %s is in the kernel, and no daemon is running", q.Rule)
	case userSpace:
		return 0, 0, fmt.Errorf("rule %s: its packets are forwarded by the daemon, which is not running", q.Rule)
	case q.Slots != tap.AllSlots && last >= outputs:
		return 0, 0, usagef("rule %s has no slot %d: want 0 to %d", q.Rule, last, outputs-1)
	}
	w, err := tap.NewWriter(out, "xdpcast "+buildVersion(), interfaceName, q.Count)
	if err != nil {
		return 0, 0, err
	}
	err = errors.Join(t.Run(ctx, w, nil), w.Close(t.Lost()))
	return w.Written(), t.Lost(), err
}

// tapOutput creates its file with the first byte, so that a tap that cannot begin replaces none.
type tapOutput struct {
	out        io.Writer // for -
	name       string
	file       *os.File
	readerGone bool // a write failed with EPIPE
}

func (o *tapOutput) Write(p []byte) (n int, err error) {
	defer func() { o.readerGone = o.readerGone || errors.Is(err, unix.EPIPE) }()
	if o.name == "-" {
		return o.out.Write(p)
	}
	if o.file == nil {
		// Packets are only for users who may tap.
		if o.file, err = os.OpenFile(o.name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600); err != nil {
			return 0, err
		}
	}
	return o.file.Write(p)
}

func (o *tapOutput) close() error {
	if o.file == nil {
		return nil
	}
	return o.file.Close()
}

// readerGone waits until nobody reads a pipe any more; false when ctx ends before. Who writes
// finds out with the next packet only, and there may be none for long.
func readerGone(ctx context.Context, pipe *os.File) bool {
	for {
		fds := []unix.PollFd{{Fd: int32(pipe.Fd())}}
		if n, err := unix.Poll(fds, 0); err == nil && n > 0 && fds[0].Revents&unix.POLLERR != 0 {
			return true
		}
		if wait(ctx, 200*time.Millisecond) != nil {
			return false
		}
	}
}
