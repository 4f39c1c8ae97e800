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
		Usage:     "show what each input of rules with several has brought, and what it lacks",
		ArgsUsage: "[NAME]",
		Description: "LOST counts the numbers that an input did not bring, TWICE and LATE those that it brought again or behind a later\n" +
			"one, JUMPS and SENDERS how often its numbers or its sender changed, BEHIND how many numbers it is behind, and\n" +
			"DIFFER how many of its copies that were looked at, one in 64, are another packet than the one relayed.\n" +
			"SHARE is its part of the packets that were relayed. With --watch, -o json writes one document a line.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "watch", Aliases: []string{"w"}, Usage: "show it again and again, until interrupted"},
			&cli.DurationFlag{Name: "interval", Usage: "`TIME` between two looks with --watch", Value: time.Second},
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

// readHealth reads the rules with several inputs, or the named one.
func readHealth(c *cli.Context) ([]control.RuleStatus, error) {
	list := []control.RuleStatus{}
	if c.NArg() == 1 {
		rule, err := client(c).Rule(c.Context, c.Args().First())
		if err != nil {
			return nil, err
		}
		if !several(rule) {
			return nil, fmt.Errorf("rule %s has one input: health is of rules with several", rule.Name)
		}
		return append(list, rule), nil
	}
	all, err := client(c).Rules(c.Context)
	if err != nil {
		return nil, err
	}
	for _, rule := range all {
		if several(rule) {
			list = append(list, rule)
		}
	}
	return list, nil
}

// healthTable has a line for each input, followed by what was lost on all inputs and alarms.
func healthTable(w io.Writer, list []control.RuleStatus, now time.Time) error {
	t := newTable("RULE", "INPUT", "STATE", ">PACKETS", ">SHARE", ">LOST", ">TWICE", ">LATE", ">JUMPS", ">SENDERS", ">DIFFER", ">BEHIND", "LAST")
	for _, r := range list {
		name := r.Name
		for _, in := range r.Inputs {
			row := []string{name, in.Input, in.State}
			if l := in.Leg; l != nil {
				state := in.State
				if in.State == control.StateActive && !l.Relayed {
					state = "standby"
				}
				row = append(row[:2], state, humanCount(in.Matched.Packets), fmt.Sprintf("%.1f%%", 100*l.Share), humanCount(l.Lost), humanCount(l.Doubled), humanCount(l.Reordered),
					humanCount(l.Resets), humanCount(l.Senders), humanCount(l.Different), humanCount(l.Behind), ago(now, l.LastSeen))
			} else {
				row = append(row, "-", "-", "-", "-", "-", "-", "-", "-", "-", "-")
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
		if r.Failover != "" {
			by, numbers, lost = "failover="+r.Failover, "-", "-"
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
