package main

import (
	"fmt"
	"io"
	"time"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/control"
)

func healthCommand(now func() time.Time) *cli.Command {
	return &cli.Command{
		Name:      "health",
		Usage:     "show what the inputs of rules with several, or with health=, received and lost",
		ArgsUsage: "[NAME]",
		Description: "LOST counts the numbers that an input did not receive, TWICE and LATE those received again or after a later\n" +
			"one, JUMPS and SENDERS how often its numbers or its sender changed. JITTER is the interarrival jitter of its packets\n" +
			"(RFC 3550 section A.8), against RTP timestamps, or with a ~ against the mean time between packets. Of several\n" +
			"inputs SHARE is the part of the packets that were relayed, BEHIND and LAG how many numbers and how long an input is\n" +
			"behind, and DIFFER how many of the compared copies, one in 64, differ from the packet relayed.\n" +
			"With --watch, -o json writes one document a line.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "watch", Aliases: []string{"w"}, Usage: "refresh until interrupted"},
			&cli.DurationFlag{Name: "interval", Usage: "`TIME` between refreshes with --watch", Value: time.Second},
			outputFlag(),
		},
		Action: func(c *cli.Context) error { return health(c, now) },
	}
}

func health(c *cli.Context, now func() time.Time) error {
	if err := nargs(c, 0, 1); err != nil {
		return err
	}
	asJSON, err := wantJSON(c)
	if err != nil {
		return err
	}
	interval := c.Duration("interval")
	if interval < minInterval {
		return usagef("--interval %v: want at least %v", interval, minInterval)
	}
	if c.Bool("watch") {
		return watch(c, interval, asJSON, func(w io.Writer) error {
			list, err := readHealth(c)
			switch {
			case err != nil:
				return err
			case asJSON:
				return writeJSON(w, list, "")
			}
			return healthTable(w, list, now())
		})
	}
	list, err := readHealth(c)
	if err != nil {
		return err
	}
	return show(c, list, func(w io.Writer) error { return healthTable(w, list, now()) })
}

// readHealth reads the rules with several inputs or with health=, or the named one.
func readHealth(c *cli.Context) ([]control.RuleStatus, error) {
	list := []control.RuleStatus{}
	if c.NArg() == 1 {
		rule, err := client(c).Rule(c.Context, c.Args().First())
		if err != nil {
			return nil, err
		}
		if !watched(rule) {
			return nil, fmt.Errorf("rule %s has one input without health=: add health=rtp, say, to the input", rule.Name)
		}
		return append(list, rule), nil
	}
	all, err := client(c).Rules(c.Context)
	if err != nil {
		return nil, err
	}
	for _, rule := range all {
		if watched(rule) {
			list = append(list, rule)
		}
	}
	return list, nil
}

// watched says whether the numbers of a rule's packets are looked at.
func watched(r control.RuleStatus) bool { return several(r) || r.Stream != nil }

// healthInput is how an input is shown.
func healthInput(r *control.RuleStatus, in *control.InputStatus) string {
	switch {
	case in.Input != "":
		return in.Input
	case len(r.Inputs) > 1:
		return r.In + " on " + in.Interface
	}
	return r.In
}

// shortTime shows a time of some nanoseconds to seconds in three digits.
func shortTime(seconds float64) string {
	d := time.Duration(seconds * float64(time.Second))
	for unit := time.Duration(10); unit <= time.Second; unit *= 10 {
		if d < 100*unit {
			return d.Round(unit / 10).String()
		}
	}
	return d.Round(time.Second / 10).String()
}

// jitterText is the jitter of an input: with a ~ where it is no more than that of the gaps.
func jitterText(l *control.LegStatus) string {
	switch l.JitterBy {
	case "":
		return "-"
	case control.JitterByGaps:
		return "~" + shortTime(l.Jitter)
	}
	return shortTime(l.Jitter)
}

// healthTable has a line for each input, followed by what was lost on all inputs and alarms.
func healthTable(w io.Writer, list []control.RuleStatus, now time.Time) error {
	t := newTable("RULE", "INPUT", "STATE", ">PACKETS", ">SHARE", ">LOST", ">TWICE", ">LATE", ">JUMPS", ">SENDERS", ">JITTER", ">BEHIND", ">LAG", ">DIFFER", "LAST")
	for _, r := range list {
		name := r.Name
		for i := range r.Inputs {
			in := &r.Inputs[i]
			row := []string{name, healthInput(&r, in), in.State}
			if l := in.Leg; l != nil {
				if in.State == control.StateActive && !l.Relayed {
					row[2] = "standby"
				}
				share, behind, lag, differ := "-", "-", "-", "-"
				if several(r) {
					share = fmt.Sprintf("%.1f%%", 100*l.Share)
				}
				if r.Merge != "" {
					behind, lag, differ = humanCount(l.Behind), shortTime(l.Lag), humanCount(l.Different)
				}
				row = append(row, humanCount(in.Matched.Packets), share, humanCount(l.Lost), humanCount(l.Doubled), humanCount(l.Reordered),
					humanCount(l.Resets), humanCount(l.Senders), jitterText(l), behind, lag, differ, ago(now, l.LastSeen))
			} else {
				row = append(row, "-", "-", "-", "-", "-", "-", "-", "-", "-", "-", "-", "-")
			}
			t.add(row...)
			name = ""
		}
	}
	if err := t.write(w); err != nil {
		return err
	}
	streams := newTable("STREAM", "BY", ">NUMBERS", ">LOST ON ALL", ">RESTARTS", "ALARMS")
	for _, r := range list {
		if r.Stream == nil {
			continue
		}
		by, numbers, lost := "merge="+r.Merge, humanCount(r.Stream.Expected), humanCount(r.Stream.Lost)
		switch {
		case r.Failover != "":
			by, numbers, lost = "failover="+r.Failover, "-", "-"
		case r.Merge == "":
			by, numbers, lost = "health", "-", "-"
		}
		alarms := append([]string{}, r.Stream.Alarms...)
		if len(alarms) == 0 {
			alarms = append(alarms, "-")
		}
		streams.add(r.Name, by, numbers, lost, humanCount(r.Stream.Restarts), alarms[0])
		for _, alarm := range alarms[1:] {
			streams.add("", "", "", "", "", alarm)
		}
	}
	if len(streams.rows) == 1 {
		return nil
	}
	fmt.Fprintln(w)
	return streams.write(w)
}

// watch shows something repeatedly until the context ends, which is no error.
func watch(c *cli.Context, interval time.Duration, asJSON bool, look func(w io.Writer) error) error {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	clearScreen := isTerminal(c.App.Writer) && !asJSON
	for first := true; ; first = false {
		if clearScreen {
			fmt.Fprint(c.App.Writer, "\x1b[H\x1b[2J") // ECMA-48: cursor home, erase the display
		} else if !first && !asJSON {
			fmt.Fprintln(c.App.Writer)
		}
		if err := look(c.App.Writer); c.Context.Err() != nil {
			return nil
		} else if err != nil {
			return err
		}
		select {
		case <-c.Context.Done():
			return nil
		case <-ticker.C:
		}
	}
}
