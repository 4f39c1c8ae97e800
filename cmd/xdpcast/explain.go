package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/control"
)

func explainCommand(now func() time.Time) *cli.Command {
	return &cli.Command{
		Name:      "explain",
		Usage:     "explain how a packet is handled, and why",
		ArgsUsage: "ENDPOINT|NAME",
		Description: "Names the rule that takes a packet, the rules it takes precedence over, the path, what each output sends, and the memberships that attract the packet. " +
			"A packet is written like the input of a rule, with or without a source and a port; the name of a rule stands for its packets.\n\n" +
			"   xdpcast explain 10.0.0.5@239.1.1.1:5000%eth0\n   xdpcast explain 239.1.1.1:5000%eth0,vlan=100\n   xdpcast explain cam1",
		Flags: []cli.Flag{outputFlag()},
		Action: func(c *cli.Context) error {
			if err := showArgs(c, 1, 1); err != nil {
				return err
			}
			e, err := client(c).Explain(c.Context, c.Args().First())
			if err != nil {
				return err
			}
			return show(c, e, func(w io.Writer) error { return explainText(w, e, now()) })
		},
	}
}

func explainText(w io.Writer, e control.Explanation, now time.Time) error {
	head := newTable("packet", e.Packet)
	head.add("verdict", e.Why)
	if e.Path != "" {
		head.add("path", stateText(e.Path, strings.TrimPrefix(e.PathReason, "path "+e.Path+": ")))
	}
	for _, note := range e.Notes {
		head.add("note", note)
	}
	if err := head.write(w); err != nil {
		return err
	}
	if len(e.Candidates) > 0 {
		t := newTable("RULE", "MATCHES BY", "INPUT", "STATE")
		for _, c := range e.Candidates {
			t.add(c.Rule, c.Kind, c.Input, stateText(c.State, c.Reason))
		}
		fmt.Fprintln(w)
		if err := t.write(w); err != nil {
			return err
		}
	}
	if len(e.Outputs) > 0 {
		t := newTable(">SLOT", "OUTPUT", "SENDS", "NEXT HOP", "STATE")
		for _, o := range e.Outputs {
			t.add(strconv.Itoa(o.Slot), o.Output, o.Rewrite, orDash(o.NextHop), stateText(o.State, o.Reason))
		}
		fmt.Fprintln(w)
		if err := t.write(w); err != nil {
			return err
		}
	}
	if len(e.Memberships) > 0 {
		fmt.Fprintln(w)
		return groupTable(w, e.Memberships, now)
	}
	return nil
}
