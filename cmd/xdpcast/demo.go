package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/demo"
	"xdpcast/internal/traffic"
)

// liveInterval is the interval of live lines.
const liveInterval = time.Second

func demoCommand() *cli.Command {
	return &cli.Command{
		Name:  "demo",
		Usage: "relay test streams through a lab of network namespaces, and check every packet",
		Description: "Makes a source, a relay and three sinks, each in its own network namespace, and removes\n" +
			"them at the end. The relay is a real one, with its own pins and socket: it does not touch one\n" +
			"that is already running. Five streams go through rules that rewrite them, one of them\n" +
			"merged from two inputs that each lose packets, and the result is compared with the rules. The exit code is 0 only if every packet is correct.\n\n" +
			"With --keep the lab stays, with its relay running, and commands to try in it are printed.",
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "duration", Usage: "send for this `TIME`", Value: 5 * time.Second},
			&cli.StringFlag{Name: "rate", Usage: "packets a second, of all streams together: `RATE` such as 20k", Value: "20k"},
			&cli.BoolFlag{Name: "keep", Usage: "leave the lab and its relay, and show commands to try"},
			&cli.BoolFlag{Name: "remove", Usage: "remove a lab that was kept, or left by a killed demo"},
			&cli.StringFlag{Name: "prefix", Usage: "prefix the names of the lab with `NAME`, so that several can coexist", Value: demo.DefaultPrefix},
			outputFlag(),
		},
		Action: func(c *cli.Context) error {
			cfg, err := demoConfig(c)
			switch {
			case err != nil:
				return err
			case os.Geteuid() != 0:
				return errors.New("demo: run it as root: it makes network namespaces and loads programs into the kernel")
			case c.Bool("remove"):
				return demoError(demo.Remove(cfg.Prefix))
			default:
				return runDemo(c, cfg)
			}
		},
	}
}

// demoConfig parses the command line. Its errors are usage errors.
func demoConfig(c *cli.Context) (demo.Config, error) {
	cfg := demo.Config{
		Prefix: c.String("prefix"), Duration: c.Duration("duration"), Keep: c.Bool("keep"), Interval: liveInterval,
	}
	if err := nargs(c, 0, 0); err != nil {
		return cfg, err
	}
	asJSON, err := wantJSON(c)
	if err != nil {
		return cfg, err
	}
	if err := demo.CheckPrefix(cfg.Prefix); err != nil {
		return cfg, usagef("--prefix: %w", err)
	}
	if c.Bool("keep") && c.Bool("remove") {
		return cfg, usagef("%s: want either --keep or --remove", commandPath(c))
	}
	rate, err := traffic.ParseRate(c.String("rate"))
	switch {
	case err != nil:
		return cfg, usagef("--rate: %w", err)
	case rate.Bits || rate.Value < 1:
		return cfg, usagef("--rate %s: want packets a second, such as 20k", c.String("rate"))
	case cfg.Duration <= 0:
		return cfg, usagef("--duration %v: want more than 0s", cfg.Duration)
	case rate.Value*cfg.Duration.Seconds() > demo.MaxPackets:
		return cfg, usagef("--rate %s for %v: want at most %g packets in all", c.String("rate"), cfg.Duration, float64(demo.MaxPackets))
	}
	cfg.Rate = rate.Value
	live := &liveView{w: c.App.Writer, rate: cfg.Rate, duration: cfg.Duration}
	if asJSON {
		live.w = io.Discard
	}
	cfg.Observer = live
	return cfg, nil
}

// runDemo runs the demo, and fails if any packet was wrong or missing.
func runDemo(c *cli.Context, cfg demo.Config) (err error) {
	if cfg.Program, err = os.Executable(); err != nil {
		return demoError(err)
	}
	v, err := demo.Run(c.Context, cfg)
	if v == nil {
		return demoError(err)
	}
	showErr := show(c, v, func(w io.Writer) error { return writeVerdict(w, v) })
	if err := errors.Join(showErr, demoError(err)); err != nil {
		return err
	}
	if !v.OK {
		return cli.Exit("", exitFailed) // the verdict says why
	}
	return nil
}

func demoError(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("demo: %w", withRootHint(err))
}

// liveView describes the lab, then prints a line of figures per interval.
type liveView struct {
	w        io.Writer
	rate     float64 // packets a second
	duration time.Duration
	shown    demo.Figures // in the previous line
	shownAt  time.Duration
}

// liveFormat aligns the live lines.
const liveFormat = "%6s %12s %12s %12s %9s %11s %11s\n"

// Ready describes the lab, before the figures begin.
func (l *liveView) Ready(made demo.Lab) error {
	modes := make([]string, len(made.Modes))
	for i, mode := range made.Modes {
		modes[i] = orDash(mode)
	}
	head := newTable("lab", fmt.Sprintf("network namespaces %s -> %s -> %s", made.Source, made.Relay, strings.Join(made.Sinks, ", ")))
	head.add("relay", fmt.Sprintf("pid %d, %s active, XDP %s", made.PID, plural(made.Active, "rule"), strings.Join(modes, " and ")))
	head.add("source", fmt.Sprintf("%s packets/s for %v, %d bytes each", perSecond(l.rate), l.duration, demo.PacketSize))
	if err := head.write(l.w); err != nil {
		return err
	}
	t := newTable("RULE", "IN", "OUT")
	for _, r := range made.Rules {
		name, ins := r.Name, strings.Fields(r.In)
		for i := range max(len(ins), len(r.Out)) {
			in, out := "", ""
			if i < len(ins) {
				in = ins[i]
			}
			if i < len(r.Out) {
				out = r.Out[i]
			}
			t.add(name, in, out)
			name = ""
		}
	}
	fmt.Fprintln(l.w)
	if err := t.write(l.w); err != nil {
		return err
	}
	_, err := fmt.Fprintln(l.w)
	return err
}

// Flowing prints the titles of the live lines.
func (l *liveView) Flowing() {
	fmt.Fprintf(l.w, liveFormat, "TIME", "SENT", "EXPECTED", "RECEIVED", "LOST", "SENT/S", "RECEIVED/S")
}

// Progress prints the figures, and the rates since the previous line; the last line, the totals,
// has no rates.
func (l *liveView) Progress(elapsed time.Duration, now demo.Figures, done bool) {
	since := elapsed - l.shownAt
	rate := func(n uint64) string {
		if done || since <= 0 {
			return "-"
		}
		return perSecond(float64(n) / since.Seconds())
	}
	fmt.Fprintf(l.w, liveFormat, seconds(int64(elapsed)), count(now.Sent), count(now.Expected), count(now.Received), count(now.Lost),
		rate(now.Sent-l.shown.Sent), rate(now.Received-l.shown.Received))
	l.shown, l.shownAt = now, elapsed
	if done {
		fmt.Fprintln(l.w)
	}
}

// writeVerdict prints the verdict: a line for each stream and sink, the totals, the faults, and the
// commands for a lab that stays.
func writeVerdict(w io.Writer, v *demo.Verdict) error {
	t := newTable("RULE", "PATH", ">SENT", ">MATCHED", "SINK", ">EXPECTED", ">RELAYED", ">RECEIVED",
		">LOST", ">DUPLICATE", ">REORDERED", ">WRONG", ">CORRUPT", ">P50", ">P99")
	for _, s := range v.Streams {
		first := []string{s.Rule.Name, orDash(s.Path), count(s.Sent), count(s.Matched)}
		for _, o := range s.Outputs {
			row := append(first, o.Sink, count(o.Expected), count(o.Relayed))
			row = append(row, receivedCells(o.Counters)...)
			t.add(append(row, latency(o.Latency, o.Latency.P50NS), latency(o.Latency, o.Latency.P99NS))...)
			first = []string{"", "", "", ""}
		}
	}
	row := []string{"total", "", count(v.Total.Sent), count(v.Total.Matched), "", count(v.Total.Expected), count(v.Total.Relayed)}
	t.add(append(append(row, receivedCells(v.Total.Counters)...), "", "")...)
	if err := t.write(w); err != nil {
		return err
	}
	fmt.Fprintln(w)
	for _, s := range v.Streams {
		if len(s.Legs) > 0 {
			writeLegs(w, s)
		}
		if s.Other != nil {
			fmt.Fprintf(w, "%s: %s from another source, %s: %d came through\n", s.Rule.Name, plural(int(s.Other.Sent), "packet"), s.Other.Source, s.Other.Received)
		}
	}
	if v.OK {
		fmt.Fprintln(w, "ok: every packet arrived as its rule says")
	}
	for _, fault := range v.Faults {
		fmt.Fprintf(w, "FAILED: %s\n", printable(fault))
	}
	return writeDemoCommands(w, v.Commands)
}

// writeLegs prints the losses of a stream's legs, and of the merged stream.
func writeLegs(w io.Writer, s demo.StreamVerdict) {
	var legs []string
	for _, l := range s.Legs {
		legs = append(legs, fmt.Sprintf("%d of %d packets on %s", l.LeftOut, s.Sent, l.Target))
	}
	var lost, repaired uint64
	for _, o := range s.Outputs {
		lost, repaired = lost+o.Lost, repaired+o.Repaired
	}
	fmt.Fprintf(w, "%s: lost %s: %d after merging, %d repaired\n", s.Rule.Name, strings.Join(legs, ", "), lost, repaired)
}

// receivedCells are the counters of a sink.
func receivedCells(c traffic.Counters) []string {
	return []string{count(c.Received), count(c.Lost), count(c.Duplicated), count(c.Reordered), count(wrongFields(c)), count(c.Corrupt)}
}

// writeDemoCommands prints the commands, if any.
func writeDemoCommands(w io.Writer, commands []demo.Command) error {
	if len(commands) == 0 {
		return nil
	}
	if _, err := fmt.Fprintln(w, "\nThe lab stays, with its relay running. To try, as root:"); err != nil {
		return err
	}
	for _, c := range commands {
		if c.About != "" {
			fmt.Fprintf(w, "\n# %s\n", c.About)
		}
		if _, err := fmt.Fprintln(w, c.Command); err != nil {
			return err
		}
	}
	return nil
}
