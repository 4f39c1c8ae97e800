package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"xdpcast/pkg/control"
)

func groupCommand(now func() time.Time) *cli.Command {
	return &cli.Command{
		Name:  "group",
		Usage: "show multicast memberships",
		Subcommands: []*cli.Command{{
			Name:  "list",
			Usage: "list the memberships and their state",
			Flags: []cli.Flag{outputFlag()},
			Action: func(c *cli.Context) error {
				if err := nargs(c, 0, 0); err != nil {
					return err
				}
				if _, err := wantJSON(c); err != nil {
					return err
				}
				groups, err := client(c).Groups(c.Context)
				if err != nil {
					return err
				}
				return show(c, groups, func(w io.Writer) error { return groupTable(w, groups, now()) })
			},
		}},
	}
}

func groupTable(w io.Writer, groups []control.Group, now time.Time) error {
	t := newTable("INTERFACE", "GROUP", "SOURCE", "STATE", "SINCE", ">TRIES", "PACKET", "RULES", "CAUSE")
	for _, g := range groups {
		source := g.Source
		if source == "" {
			source = "any"
		}
		cause := g.Cause
		if g.Next != nil {
			cause += fmt.Sprintf(" (next try in %s)", age(g.Next.Sub(now)))
		}
		t.add(g.Interface, g.Group, source, g.State, ago(now, g.Since), strconv.Itoa(g.Tries), ago(now, g.LastPacket),
			orDash(strings.Join(g.Rules, " ")), strings.TrimSpace(cause))
	}
	return t.write(w)
}
