package main

import (
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/control"
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
				if err := showArgs(c, 0, 0); err != nil {
					return err
				}
				groups, err := client(c).Groups(c.Context)
				if err != nil {
					return err
				}
				return show(c, groups, func(w io.Writer) error { return groupTable(w, groups, now()) })
			},
		}, groupShowCommand(now)},
	}
}

func groupShowCommand(now func() time.Time) *cli.Command {
	return &cli.Command{
		Name:      "show",
		Usage:     "show everything about the memberships of a group",
		ArgsUsage: "GROUP[%INTERFACE]",
		Description: "Shows each membership of the group, source-specific or not: its state, the rules that need it, " +
			"when a packet last matched one of them, the kernel's IGMP or MLD version there, and the querier. " +
			"Between two hosts there is no querier; behind a snooping switch, packets stop a few minutes after the last query.",
		Flags: []cli.Flag{outputFlag()},
		Action: func(c *cli.Context) error {
			if err := showArgs(c, 1, 1); err != nil {
				return err
			}
			group, ifname, err := groupOn(c.Args().First())
			if err != nil {
				return err
			}
			groups, err := client(c).Groups(c.Context)
			if err != nil {
				return err
			}
			groups = slices.DeleteFunc(groups, func(g control.Group) bool {
				return g.Group != group || ifname != "" && g.Interface != ifname
			})
			if len(groups) == 0 {
				return fmt.Errorf("no membership of %s: see \"xdpcast group list\"", c.Args().First())
			}
			return show(c, groups, func(w io.Writer) error { return groupText(w, groups, now()) })
		},
	}
}

func groupTable(w io.Writer, groups []control.Group, now time.Time) error {
	t := newTable("INTERFACE", "GROUP", "SOURCE", "STATE", "SINCE", ">TRIES", "PACKET", "RULES", "DETAIL")
	for _, g := range groups {
		t.add(g.Interface, g.Group, orAny(g.Source), g.State, ago(now, g.Since), strconv.Itoa(g.Tries), ago(now, g.LastPacket),
			orDash(strings.Join(g.Rules, " ")), g.Detail)
	}
	return t.write(w)
}

// orAny shows a membership for any source as such.
func orAny(source string) string {
	if source == "" {
		return "any"
	}
	return source
}

// groupOn parses GROUP or GROUP%INTERFACE.
func groupOn(arg string) (group, ifname string, err error) {
	text, ifname, onOne := strings.Cut(arg, "%")
	addr, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(text, "["), "]"))
	if err != nil || onOne && ifname == "" {
		return "", "", usagef("%q: want GROUP or GROUP%%INTERFACE, such as 239.1.1.1%%eth0", arg)
	}
	return addr.String(), ifname, nil
}

func groupText(w io.Writer, groups []control.Group, now time.Time) error {
	for i, g := range groups {
		if i > 0 {
			fmt.Fprintln(w)
		}
		t := newTable("group", g.Group)
		t.add("source", orAny(g.Source))
		t.add("interface", fmt.Sprintf("%s, index %d", g.Interface, g.Index))
		if g.Master != "" {
			t.add("port of", g.Master)
		}
		if len(g.For) > 0 {
			t.add("joined for", strings.Join(g.For, " "))
		}
		t.add("state", fmt.Sprintf("%s, since %s", g.State, ago(now, g.Since)))
		t.add("detail", orDash(g.Detail))
		t.add("tries", strconv.Itoa(g.Tries))
		if g.Cause != "" {
			t.add("cause", g.Cause)
		}
		if g.Next != nil {
			t.add("next try", "in "+age(g.Next.Sub(now)))
		}
		t.add("rules", orDash(strings.Join(g.Rules, " ")))
		t.add("last packet", ago(now, g.LastPacket))
		t.add("version", orDash(g.Version))
		t.add("querier", querierText(g.Multicast, now))
		if err := t.write(w); err != nil {
			return err
		}
	}
	return nil
}

func querierText(m control.Multicast, now time.Time) string {
	if m.QuerierSeen == nil {
		return "none heard"
	}
	return fmt.Sprintf("%s, heard %s, %s counted", m.Querier, ago(now, m.QuerierSeen), queries(m.Queries))
}

// queries formats "1 query", "2 queries".
func queries(n uint64) string {
	if n == 1 {
		return "1 query"
	}
	return humanCount(n) + " queries"
}
