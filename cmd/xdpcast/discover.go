package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/control"
	"xdpcast/internal/discover"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/rules"
)

func discoverCommand(now func() time.Time) *cli.Command {
	return &cli.Command{
		Name:  "discover",
		Usage: "find multicast streams that match no rule",
		Description: "Captures on the interfaces, in all VLANs, and lists the senders of each group, their rates, and what the streams\n" +
			"look like: RTP and RTCP, MPEG-TS with its programs, SAP with the session's name, MoldUDP64, PTP, IGMP and MLD. Streams of\n" +
			"rules are omitted. The device accepts all groups meanwhile; --join makes the network deliver some.\n" +
			"-o rules prints a rule file for the streams found, and for announced ones (SAP), to --to.",
		Flags: []cli.Flag{
			&cli.StringSliceFlag{Name: "interface", Aliases: []string{"i"}, Usage: "capture on `IFACE` (repeatable)"},
			&cli.DurationFlag{Name: "for", Usage: "capture for this `TIME`", Value: 10 * time.Second},
			&cli.StringSliceFlag{Name: "join", Usage: "join `GROUP[/LEN]` meanwhile, at most 4096 groups (repeatable)"},
			&cli.StringFlag{Name: "to", Usage: "with -o rules: send to `IFACE`"},
			pinDirFlag(),
			&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "`FORMAT`: table for people, json for programs, rules for a rule file", Value: "table"},
		},
		Action: func(c *cli.Context) error { return discoverStreams(c, now) },
	}
}

func discoverStreams(c *cli.Context, now func() time.Time) error {
	if err := nargs(c, 0, 0); err != nil {
		return err
	}
	o, err := discoverOptions(c)
	if err != nil {
		return err
	}
	stats, err := client(c).Stats(c.Context)
	if stats, err = orKernel(c, stats, err, now()); err != nil && !errors.Is(err, control.ErrNotRunning) && !errors.Is(err, loader.ErrNotLoaded) {
		return err
	}
	for _, r := range stats.Rules {
		if ins, err := rules.ParseInputs(r.In); err == nil {
			o.Taken = append(o.Taken, ins...)
		}
	}
	found, err := discover.Watch(c.Context, o)
	if err != nil {
		return withRootHint(err)
	}
	for _, note := range discoverNotes(found) {
		fmt.Fprintf(c.App.ErrWriter, "xdpcast: warning: %s\n", note)
	}
	switch c.String("output") {
	case "json":
		return writeJSON(c.App.Writer, found, "  ")
	case "rules":
		return discoverRules(c.App.Writer, &found, c.String("to"))
	}
	return discoverTable(c.App.Writer, found)
}

func discoverOptions(c *cli.Context) (o discover.Options, err error) {
	switch format := c.String("output"); {
	case format != "table" && format != "json" && format != "rules":
		return o, usagef("--output %q: want table, json or rules", format)
	case format == "rules" && c.String("to") == "":
		return o, usagef("--to missing: -o rules needs an interface to send to")
	case format != "rules" && c.String("to") != "":
		return o, usagef("--to %s: it belongs to -o rules", c.String("to"))
	}
	if o.For = c.Duration("for"); o.For < minInterval || o.For > 24*time.Hour {
		return o, usagef("--for %v: want %v to 24h", o.For, minInterval)
	}
	for _, text := range c.StringSlice("join") {
		prefix, err := parseJoin(text)
		if err != nil {
			return o, usagef("--join: %w", err)
		}
		o.Join = append(o.Join, prefix)
	}
	found, err := namedInterfaces(c)
	if err != nil {
		return o, err
	}
	if len(found) == 0 {
		return o, usagef("%s: --interface missing: name at least one", commandPath(c))
	}
	seen := map[int]bool{}
	for _, i := range found {
		if !seen[i.Index] {
			o.Interfaces = append(o.Interfaces, discover.Interface{Name: i.Name, Index: i.Index})
		}
		seen[i.Index] = true
	}
	return o, nil
}

// parseJoin parses a group, or a prefix of groups.
func parseJoin(text string) (netip.Prefix, error) {
	prefix, err := netip.ParsePrefix(text)
	if !strings.Contains(text, "/") {
		var addr netip.Addr
		if addr, err = netip.ParseAddr(text); err == nil && addr.Zone() == "" {
			prefix = netip.PrefixFrom(addr, addr.BitLen())
		}
	}
	switch {
	case err != nil || !prefix.Addr().IsMulticast():
		return prefix, fmt.Errorf("%q: want a group, such as 239.1.1.1, or a prefix of groups, such as 239.1.1.0/24", text)
	case prefix.Addr().BitLen()-prefix.Bits() > 12: // discover.MaxJoin
		return prefix, fmt.Errorf("%s: has more than %d groups", text, discover.MaxJoin)
	}
	return prefix.Masked(), nil
}

// discoverNotes explains limits of the result.
func discoverNotes(r discover.Result) (notes []string) {
	if r.Missed > 0 {
		notes = append(notes, fmt.Sprintf("%d packets came too fast to be captured: rates are too low by these", r.Missed))
	}
	if r.Forgotten > 0 {
		notes = append(notes, fmt.Sprintf("more than %d streams: %d of the longest silent are omitted", discover.MaxStreams, r.Forgotten))
	}
	if r.Fragments > 0 {
		notes = append(notes, fmt.Sprintf("%d later fragments, which carry no ports, are not in any stream's rate", r.Fragments))
	}
	if r.Unkept > 0 {
		notes = append(notes, fmt.Sprintf("more than %d announced sessions: %d announcements are left out", discover.MaxSessions, r.Unkept))
	}
	return notes
}

func discoverTable(w io.Writer, r discover.Result) error {
	t := newTable("INTERFACE", "VLAN", "SOURCE", "GROUP", ">PORT", ">PACKETS/S", ">BITS/S", ">TTL", "LOOKS LIKE")
	for _, s := range r.Streams {
		vlan := orNone(int(s.VLAN))
		if s.OuterVLAN != 0 {
			vlan = fmt.Sprintf("%d.%d", s.OuterVLAN, s.VLAN)
		}
		t.add(s.Interface, vlan, s.Source.String(), s.Group.String(), orNone(int(s.Port)), fewPerSecond(s.PacketRate), withUnit(s.BitRate, "b"), fmt.Sprint(s.TTL), s.Looks.String())
	}
	if err := t.write(w); err != nil {
		return err
	}
	a := newTable("ANNOUNCED", "INTERFACE", "STREAM", ">PORT", "SOURCE", "MEDIA", "FORMAT")
	for _, s := range r.Sessions {
		for _, m := range s.Media {
			source := "any"
			if m.Source.IsValid() {
				source = m.Source.String()
			}
			a.add(orDash(s.Name), s.Interface, m.Group.String(), fmt.Sprint(m.Port), source, m.Type, orDash(m.Format))
		}
	}
	if len(a.rows) == 1 {
		return nil
	}
	fmt.Fprintln(w)
	return a.write(w)
}

// fewPerSecond shows rates below 10 with a decimal digit: announcements are rare.
func fewPerSecond(v float64) string {
	if v < 9.95 {
		return fmt.Sprintf("%.1f", v)
	}
	return humanCount(uint64(v + 0.5))
}

// discoverRules writes a rule file, each rule below a comment.
func discoverRules(w io.Writer, r *discover.Result, to string) error {
	proposals, left := r.Rules(to)
	var b strings.Builder
	fmt.Fprintf(&b, "# found by xdpcast discover in %.0f seconds\n", r.Seconds)
	if left > 0 {
		fmt.Fprintf(&b, "# omitted: %s of groups that stay on their link, or that come in on %s itself\n", plural(left, "stream"), printable(to))
	}
	if len(proposals) == 0 {
		b.WriteString("rules: []\n")
	} else {
		b.WriteString("rules:\n")
	}
	for _, p := range proposals {
		text := strings.TrimPrefix(string(rules.AppendRule(nil, p.Rule)), "rules:\n")
		fmt.Fprintf(&b, "  # %s\n%s", printable(p.Why), text)
	}
	_, err := io.WriteString(w, b.String())
	return err
}
