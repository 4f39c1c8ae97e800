// Chaos disturbs a relay in every way that it must survive while numbered packets pass through it,
// and reports their outcome: make chaos.
//
//	source src0 ---- in0 relay out0 ---- sink0 sink
//
// Each disturbance runs for a number of rounds; each round does something to the daemon or its host
// and undoes it. The figures cover the packets sent during the disturbance, the leaves seen on the
// source's link, and what the daemon held before and after.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"text/tabwriter"
	"time"
)

// options are the flags.
type options struct {
	program, path string
	rate          float64
	rounds        int
	smoke         bool
	only          string
}

func main() {
	var o options
	flag.StringVar(&o.program, "xdpcast", "bin/xdpcast", "`FILE` of the program")
	flag.StringVar(&o.path, "path", "kernel", "`PATH` of the rule: kernel, afxdp or fanout")
	flag.Float64Var(&o.rate, "rate", 100_000, "packets a second")
	flag.IntVar(&o.rounds, "rounds", 20, "of each disturbance")
	flag.BoolVar(&o.smoke, "smoke", false, "one short round each, at a low rate; fail on a packet that is lost, doubled or reordered on the kernel path")
	flag.StringVar(&o.only, "only", "", "the disturbance with this `NAME` alone")
	flag.Parse()
	if o.smoke {
		o.rate, o.rounds = 2_000, 1
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt)
	defer cancel()
	if err := run(ctx, o); err != nil {
		fmt.Fprintf(os.Stderr, "chaos: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (err error) {
	s, err := newStage(o)
	if err != nil {
		return err
	}
	defer func() {
		if closed := s.close(); err == nil {
			err = closed
		}
	}()
	fmt.Printf("path %s, %.0f packets a second, rounds of each: %d\n\n", o.path, o.rate, o.rounds)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "DISTURBANCE\tSENT\tLOST\tDOUBLED\tREORDERED\tLEAVES\tDESCRIPTORS\tBPF OBJECTS\tMEMORY")
	var faults []string
	for _, d := range disturbances {
		if o.only != "" && o.only != d.name {
			continue
		}
		if d.skipped != "" {
			fmt.Fprintf(w, "%s\tskipped: %s\n", d.name, d.skipped)
			continue
		}
		r, err := s.measure(ctx, d)
		if err != nil {
			return fmt.Errorf("%s: %w", d.name, err)
		}
		fmt.Fprintln(w, r)
		faults = append(faults, r.faults(o, d)...)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if len(faults) > 0 {
		return fmt.Errorf("%s", strings.Join(faults, "\n"))
	}
	return nil
}

// result is the outcome of a disturbance for the packets.
type result struct {
	name                           string
	sent, lost, doubled, reordered uint64
	leaves                         int
	before, after                  holding
}

func (r result) String() string {
	change := func(a, b int) string { return fmt.Sprintf("%d -> %d", a, b) }
	return fmt.Sprintf("%s\t%d\t%d\t%d\t%d\t%d\t%s\t%s\t%.1f -> %.1f MB", r.name, r.sent, r.lost, r.doubled, r.reordered, r.leaves,
		change(r.before.descriptors, r.after.descriptors), change(r.before.objects, r.after.objects), float64(r.before.resident)/1e6, float64(r.after.resident)/1e6)
}

// faults returns the counts that must not occur; times are not judged.
func (r result) faults(o options, d disturbance) (all []string) {
	fault := func(format string, args ...any) { all = append(all, r.name+": "+fmt.Sprintf(format, args...)) }
	if r.sent == 0 {
		fault("no packet was sent")
	}
	if o.path == "kernel" && (r.lost > 0 || r.doubled > 0 || r.reordered > 0) {
		fault("%d packets lost, %d doubled, %d reordered: want none on the kernel path", r.lost, r.doubled, r.reordered)
	}
	if !d.ends && r.leaves > 0 {
		fault("%d leaves were sent while the daemon ran on", r.leaves)
	}
	if r.after.objects > r.before.objects {
		fault("%d maps, programs and links are held, %d before", r.after.objects, r.before.objects)
	}
	return all
}

// disturbance is an event inflicted on the relay while packets flow.
type disturbance struct {
	name string
	// ends: the daemon ends, and so do its memberships unless a service manager keeps them.
	ends bool
	do   func(ctx context.Context, s *stage) error
	// skipped is the reason for skipping it.
	skipped string
}

var disturbances = []disturbance{
	{name: "nothing", do: func(ctx context.Context, _ *stage) error { return sleep(ctx, time.Second) }},
	{name: "kill -9", ends: true, do: func(_ context.Context, s *stage) error { return s.restart(os.Kill) }},
	{name: "restart", ends: true, do: func(_ context.Context, s *stage) error { return s.restart(os.Interrupt) }},
	{name: "upgrade", ends: true, do: upgrade},
	{name: "upgrade --exec", do: replaceDaemon},
	{name: "reload", do: reload},
	{name: "rollback", do: rollback},
	{name: "link flap", do: flap},
	{name: "netlink storm", do: storm},
	{name: "memory pressure", do: pressure},
	{name: "full run directory", do: fullDirectory},
	{name: "SIGSTOP", do: freeze},
	{name: "clock step", skipped: "a time namespace has no clock of its own for CLOCK_REALTIME, and the host's is not ours to set"},
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// long is d, or a tenth of it in a smoke test.
func (s *stage) long(d time.Duration) time.Duration {
	if s.opts.smoke {
		return d / 10
	}
	return d
}

// many is n, or a twentieth of it in a smoke test.
func (s *stage) many(n int) int {
	if s.opts.smoke {
		return n / 20
	}
	return n
}
