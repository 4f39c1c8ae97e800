// Chaos disturbs a relay in every way that it must survive while numbered packets pass through it,
// and reports their outcome: make chaos.
//
//	source src0 ---- in0 relay out0 ---- sink0 sink
//
// Each disturbance runs for a number of rounds; each round does something to the daemon or its host
// and undoes it. The figures cover the packets sent during the disturbance, the leaves seen on the
// source's link, and what the daemon held before and after. The daemon runs under "xdpcast hold",
// which keeps its memberships.
//
// The source sends in the kernel, and an XDP program on sink0 keeps account of the numbers
// (internal/live), so that neither loses packets. What the rings of the two links had no room for is
// reported apart from what the relay lost.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"xdpcast/internal/live"
)

// options are the flags.
type options struct {
	program, other, path string
	name, priority       string
	rate                 float64
	rounds, flows, cpu   int
	behind, pause        time.Duration
	smoke, clock, log    bool
	markdown             bool
	only                 string
}

func main() {
	var o options
	flag.StringVar(&o.program, "xdpcast", "bin/xdpcast", "`FILE` of the program")
	flag.StringVar(&o.other, "other", "", "`FILE` of another build of the same schema: upgrades alternate between the two (default: the same again)")
	flag.StringVar(&o.name, "name", "chaos", "`PREFIX` of the names of network namespaces, and of the directory in /tmp")
	flag.StringVar(&o.priority, "worker-priority", "none", "`PRIORITY` of the workers, as of xdpcast run")
	flag.StringVar(&o.path, "path", "kernel", "`PATH` of the rule: kernel, afxdp or fanout")
	flag.Float64Var(&o.rate, "rate", 500_000, "packets a second; 0: half the highest rate at which the path loses nothing for half a second, measured first")
	flag.IntVar(&o.flows, "flows", 1, "`NUMBER` of flows, each with its own source port, that share the rate")
	flag.IntVar(&o.cpu, "cpu", 0, "`NUMBER` of the CPU that the source keeps busy")
	flag.DurationVar(&o.behind, "behind", 0, "by how much the source, for want of a CPU, may be late before it gives up packets rather than sending them in a burst (default 1s on the kernel path, which no burst overruns, and 500 packets on the others)")
	flag.IntVar(&o.rounds, "rounds", 20, "of each disturbance")
	flag.DurationVar(&o.pause, "pause", 250*time.Millisecond, "between two rounds; a daemon that was replaced runs for 2s at least, so that its holder starts the next one at once")
	flag.BoolVar(&o.markdown, "markdown", false, "print rows as docs/benchmarks.md has them")
	flag.BoolVar(&o.smoke, "smoke", false, "one short round each, at a low rate; fail on a packet that is lost, doubled or reordered on the kernel path")
	flag.BoolVar(&o.clock, "clock", false, "set the clock of this host an hour ahead and back, too, which everything on it sees")
	flag.BoolVar(&o.log, "log", false, "print what the daemons log, and the rule's counters")
	flag.StringVar(&o.only, "only", "", "the disturbances with these `NAMES` alone, separated by commas")
	flag.Parse()
	if o.smoke {
		o.rate, o.rounds = 2_000, 1
	}
	if o.rate < 0 || o.rounds < 1 || o.flows < 1 || o.behind < 0 || o.pause < 0 {
		fmt.Fprintf(os.Stderr, "chaos: -rate %v, -rounds %d, -flows %d, -behind %v, -pause %v: want positive numbers\n", o.rate, o.rounds, o.flows, o.behind, o.pause)
		os.Exit(2)
	}
	// Whatever of these ends it, it removes what it made: a second one changes nothing.
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	defer cancel()
	if err := run(ctx, o); err != nil {
		fmt.Fprintf(os.Stderr, "chaos: %v\n", err)
		os.Exit(1)
	}
}

// choose returns the disturbances with these names, separated by commas; all if there are none.
func choose(names string) (chosen []disturbance, err error) {
	if names == "" {
		return disturbances, nil
	}
	for _, name := range strings.Split(names, ",") {
		i := slices.IndexFunc(disturbances, func(d disturbance) bool { return d.name == name })
		if i < 0 {
			var known []string
			for _, d := range disturbances {
				known = append(known, d.name)
			}
			return nil, fmt.Errorf("-only %q: want some of %s", name, strings.Join(known, ", "))
		}
		chosen = append(chosen, disturbances[i])
	}
	return chosen, nil
}

func run(ctx context.Context, o options) (err error) {
	chosen, err := choose(o.only)
	if err != nil {
		return err
	}
	s, err := newStage(o)
	if err != nil {
		return err
	}
	defer func() {
		if cause := recover(); cause != nil {
			err = fmt.Errorf("panic: %v\n%s", cause, debug.Stack())
		}
		if closed := s.close(); err == nil || errors.Is(err, context.Canceled) {
			err = errors.Join(err, closed)
		}
	}()
	if o.rate == 0 {
		if o.rate, err = s.half(ctx); err != nil {
			return err
		}
		s.opts.rate = o.rate
	}
	if o.markdown {
		fmt.Print(markdownHead(o))
	} else {
		fmt.Printf("path %s, %.0f packets a second, rounds of each: %d\n\n", o.path, o.rate, o.rounds)
		fmt.Printf(row, "DISTURBANCE", "SENT", "PACKETS/S", "NOT TAKEN", "SINK FULL", "LOST", "DOUBLED", "REORDERED", "LONGEST GAP", "LEAVES", "DESCRIPTORS", "MAPS", "PROGRAMS", "LINKS", "MEMORY")
	}
	var faults []string
	var results []result
	for _, d := range chosen {
		if d.clock && !o.clock {
			fmt.Printf("%-19s left out: it needs -clock\n", d.name)
			continue
		}
		r, err := s.measure(ctx, d)
		if err != nil {
			return fmt.Errorf("%s: %w", d.name, err)
		}
		if o.markdown {
			fmt.Print(r.markdown(o.rounds))
		} else {
			fmt.Print(r)
		}
		faults, results = append(faults, r.faults(o, d)...), append(results, r)
	}
	if o.markdown {
		fmt.Print(markdownFoot(results))
	}
	if o.log {
		rule, err := s.client.Rule(ctx, "stream")
		if err != nil {
			return err
		}
		fmt.Printf("\n%s\nmatched %+v, drops %+v, outputs %+v\n", s.log.String(), rule.Matched, rule.Drops, rule.Outputs)
	}
	if len(faults) > 0 {
		return fmt.Errorf("%s", strings.Join(faults, "\n"))
	}
	return nil
}

// row has the columns of the table, printed as it grows: a run takes minutes.
const row = "%-19s %10s %9s %9s %9s %9s %7s %9s %12s %6s %12s %9s %9s %7s  %s\n"

// result is the outcome of a disturbance for the packets.
type result struct {
	name string
	sent uint64
	rate float64 // packets a second, as sent
	// notTaken is how many of them the ring to the relay had no room for, and sinkFull how many the relay
	// sent for which that to the sink had none.
	notTaken, sinkFull uint64
	seen               live.Seen
	leaves             int
	before, after      holding
}

// lost is the number of packets that the relay lost.
func (r *result) lost() uint64 {
	return r.sent - min(r.sent, r.notTaken+r.sinkFull+r.seen.Packets)
}

// settled says whether every packet is accounted for.
func (r *result) settled() bool { return r.lost() == 0 }

func (r result) String() string {
	count := func(n uint64) string { return fmt.Sprint(n) }
	change := func(a, b int) string { return fmt.Sprintf("%d -> %d", a, b) }
	b, a := r.before, r.after
	return fmt.Sprintf(row, r.name, count(r.sent), fmt.Sprintf("%.0f", r.rate), count(r.notTaken), count(r.sinkFull), count(r.lost()), count(r.seen.Doubled), count(r.seen.Reordered),
		r.seen.Longest.Round(time.Microsecond).String(), fmt.Sprint(r.leaves),
		change(b.descriptors, a.descriptors), change(b.maps, a.maps), change(b.programs, a.programs), change(b.links, a.links), fmt.Sprintf("%.1f -> %.1f MB", float64(b.resident)/1e6, float64(a.resident)/1e6))
}

// markdownHead begins the table of a path in docs/benchmarks.md.
func markdownHead(o options) string {
	return fmt.Sprintf(`%s path, %s packets a second:

| disturbance | rounds | sent | a second | lost | doubled | reordered | longest gap | leaves | descriptors | resident, MB |
|---|---|---|---|---|---|---|---|---|---|---|
`, o.path, thousands(uint64(o.rate)))
}

// markdown is a row of that table.
func (r *result) markdown(rounds int) string {
	b, a := r.before, r.after
	return fmt.Sprintf("| %s | %d | %s | %s | %s | %s | %s | %s | %d | %d -> %d | %.1f -> %.1f |\n", r.what(), rounds, thousands(r.sent), thousands(uint64(r.rate)),
		thousands(r.lost()), thousands(r.seen.Doubled), thousands(r.seen.Reordered), short(r.seen.Longest), r.leaves,
		b.descriptors, a.descriptors, float64(b.resident)/1e6, float64(a.resident)/1e6)
}

// what names the disturbance on the page.
func (r *result) what() string {
	for _, d := range disturbances {
		if d.name == r.name && d.what != "" {
			return d.what
		}
	}
	return r.name
}

// markdownFoot are the sentences below that table: what has no column in it.
func markdownFoot(results []result) (text string) {
	text = "\n"
	held := func(h holding) string {
		return fmt.Sprintf("%d maps, %d programs and %d links", h.maps, h.programs, h.links)
	}
	for i := range results {
		r := &results[i]
		if r.notTaken+r.sinkFull > 0 {
			text += fmt.Sprintf("%s: the ring to the relay had no room for %s of them, that to the sink for %s.\n", r.what(), thousands(r.notTaken), thousands(r.sinkFull))
		}
		if before, after := held(r.before), held(r.after); before != after || i > 0 && before != held(results[0].before) {
			text += fmt.Sprintf("%s: %s before, %s after.\n", r.what(), before, after)
		}
	}
	if len(results) > 0 {
		text += fmt.Sprintf("The daemon held %s, before and after, where nothing else is said.\n", held(results[0].before))
	}
	return text
}

// thousands separates groups of three digits.
func thousands(n uint64) string {
	if n < 1000 {
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("%s,%03d", thousands(n/1000), n%1000)
}

// short is a duration to two digits.
func short(d time.Duration) string {
	switch {
	case d >= 10*time.Second:
		return fmt.Sprintf("%.0f s", d.Seconds())
	case d >= time.Second:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d >= 10*time.Millisecond:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000)
}

// faults returns the counts that must not occur; times are not judged.
func (r result) faults(o options, d disturbance) (all []string) {
	fault := func(format string, args ...any) { all = append(all, r.name+": "+fmt.Sprintf(format, args...)) }
	if r.seen.Packets == 0 {
		fault("no packet of %d arrived", r.sent)
	}
	if r.seen.Packets+r.notTaken > r.sent {
		fault("%d packets arrived of %d sent", r.seen.Packets, r.sent)
	}
	if o.path == "kernel" && r.lost() > 0 {
		fault("%d packets lost: want none on the kernel path", r.lost())
	}
	if r.seen.Doubled > 0 || r.seen.Reordered > 0 && (o.path == "kernel" || d.ordered) {
		fault("%d packets doubled, %d reordered: want none", r.seen.Doubled, r.seen.Reordered)
	}
	if !d.ends && r.leaves > 0 {
		fault("%d leaves were sent", r.leaves)
	}
	for _, held := range []struct {
		what          string
		before, after int
	}{
		{"maps", r.before.maps, r.after.maps},
		{"programs", r.before.programs, r.after.programs},
		{"links", r.before.links, r.after.links},
	} {
		if held.after > held.before {
			fault("%d %s are held, %d before", held.after, held.what, held.before)
		}
	}
	return all
}

// disturbance is an event inflicted on the relay while packets flow.
type disturbance struct {
	name string
	what string // in docs/benchmarks.md; empty: the name
	// ends: the holder ends, too, and with it the memberships.
	ends bool
	// clock: it steps the host's clock.
	clock bool
	// apart is how long the daemon must have run before: a holder delays the start of one that ends
	// soon.
	apart time.Duration
	// ordered: no packet overtakes another, on any path.
	ordered bool
	do      func(ctx context.Context, s *stage) error
}

// calm is how long a daemon must have run for its holder to start the next one at once.
const calm = 2*time.Second + 250*time.Millisecond

var disturbances = []disturbance{
	{name: "nothing", do: func(context.Context, *stage) error { return nil }},
	{name: "kill -9", apart: calm, do: func(_ context.Context, s *stage) error { return s.replace(syscall.SIGKILL) }},
	{name: "restart", apart: calm, ordered: true, do: func(_ context.Context, s *stage) error { return s.replace(syscall.SIGTERM) }},
	{name: "upgrade", what: "upgrade without a daemon", ends: true, do: upgrade},
	{name: "upgrade --exec", what: "upgrade --exec, to another build", ordered: true, do: replaceDaemon},
	{name: "reload", what: "reload: 50 other rules come and go", do: reload},
	{name: "rollback", what: "rollback of a change that waits for confirmation", do: rollback},
	{name: "link flap", what: "another interface loses its carrier", do: flap},
	{name: "netlink storm", what: "netlink storm: 1,000 veths made one by one, deleted at once", do: storm},
	{name: "memory pressure", what: "memory pressure: a quarter of what is free", do: pressure},
	{name: "full run directory", do: fullDirectory},
	{name: "SIGSTOP", what: "SIGSTOP, 10 s", do: freeze},
	{name: "clock step", clock: true, do: stepClock},
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
