package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/control"
	"xdpcast/pkg/rules"
)

func ruleCommand(now func() time.Time) *cli.Command {
	return &cli.Command{
		Name:  "rule",
		Usage: "add, remove and show rules",
		Subcommands: []*cli.Command{
			ruleAddCommand(), ruleDelCommand(), ruleShowCommand(now), ruleListCommand(), ruleExportCommand(), ruleApplyCommand(),
		},
	}
}

func ruleAddCommand() *cli.Command {
	return &cli.Command{
		Name:      "add",
		Usage:     "add one rule",
		ArgsUsage: "NAME",
		Description: "An endpoint is ADDRESS:PORT%INTERFACE, preceded by SOURCE@ to take only one sender.\n" +
			"ADDRESS/LEN is a prefix, without :PORT any port is taken and kept, and INTERFACE may end in '+' for all with that prefix.\n" +
			"After commas, an input can have options (vlan=100, join=none, rate=50Mbit), an output policies (ttl=8, src=keep, dscp=af41, vlan=200).\n\n" +
			"   xdpcast rule add cam1 --in 10.0.0.5@239.1.1.1:5000%eth0 --out 239.2.2.2:6000%eth1,ttl=8 --out 10.0.9.9:6000%eth2\n\n" +
			"Up to four inputs that carry one stream are merged, by sequence number or by order of preference:\n\n" +
			"   xdpcast rule add cam2 --in 239.1.1.1:5000%eth0 --in 239.101.1.1:5000%eth1 --merge rtp --out 239.2.2.2:6000%eth2\n\n" +
			"A rule whose interface is absent is pending, and becomes active when the interface appears.",
		Flags: []cli.Flag{
			&cli.StringSliceFlag{Name: "in", Usage: "`ENDPOINT` to take packets from; repeat for several inputs that carry one stream"},
			&cli.StringFlag{Name: "merge", Usage: "relay the first copy of each number from several inputs: `FORMAT` rtp, rfc4175, moldudp64, pitch, mdp3 or field:OFFSET:BYTES, and options (rtp,skew=100ms)"},
			&cli.StringFlag{Name: "failover", Usage: "relay the first of several inputs that is not silent for `TIME` (30ms,back=2s)"},
			&cli.StringSliceFlag{Name: "out", Usage: "`ENDPOINT` to send a copy to; repeat for each output"},
			&cli.BoolFlag{Name: "allow-loop", Usage: "take packets that this host has sent, and allow a loop (loop=allow)"},
			&cli.StringFlag{Name: "path", Usage: "`PATH` of the packets: auto, kernel, afxdp or fanout", Value: "auto"},
			outputFlag(),
		},
		Action: ruleAdd,
	}
}

func ruleAdd(c *cli.Context) error {
	if extra := c.Args().Get(1); strings.Contains(extra, "%") {
		return usagef("%s: unexpected argument %q: give an endpoint with --in or --out", commandPath(c), extra)
	}
	if err := showArgs(c, 1, 1); err != nil {
		return err
	}
	for _, flag := range []string{"in", "out"} {
		if !c.IsSet(flag) {
			return usagef("%s: --%s missing; see \"%s --help\"", commandPath(c), flag, commandPath(c))
		}
	}
	ins := c.StringSlice("in")
	for i := range ins {
		if c.Bool("allow-loop") {
			ins[i] = withLoop(ins[i])
		}
	}
	rule, err := control.ToRule(control.Rule{
		Name: c.Args().First(), In: strings.Join(ins, " "), Out: c.StringSlice("out"), Path: c.String("path"),
		Merge: c.String("merge"), Failover: c.String("failover"),
	})
	if err != nil {
		return &usageError{err}
	}
	status, err := client(c).AddRule(c.Context, control.FromRule(rule))
	if err != nil {
		return err
	}
	return show(c, status, func(w io.Writer) error {
		_, err := fmt.Fprintln(w, printable(outcome(status)))
		return err
	})
}

// withLoop is an input with loop=allow; an invalid one is left unchanged, so that the error is
// about the user's text.
func withLoop(input string) string {
	in, accept, err := rules.ParseInput(input)
	if err != nil {
		return input
	}
	accept.AllowLoop, accept.TwoWay = true, false
	return rules.FormatInput(in, accept)
}

// outcome is the state of a rule as one line.
func outcome(r control.RuleStatus) string {
	if r.State == control.StateActive {
		return fmt.Sprintf("rule %s: active, path %s, %s", r.Name, orDash(r.UsedPath), plural(len(r.Out), "output"))
	}
	if r.Reason == "" {
		return fmt.Sprintf("rule %s: %s", r.Name, r.State)
	}
	return fmt.Sprintf("rule %s: %s: %s", r.Name, r.State, r.Reason)
}

func ruleDelCommand() *cli.Command {
	return &cli.Command{
		Name:      "del",
		Usage:     "remove rules",
		ArgsUsage: "NAME...",
		Action: func(c *cli.Context) error {
			if err := nargs(c, 1, -1); err != nil {
				return err
			}
			return ruleDel(c)
		},
	}
}

// ruleDel removes the rules that it can and reports each name that it could not.
func ruleDel(c *cli.Context) error {
	var errs []error
	for _, name := range c.Args().Slice() {
		err := client(c).DeleteRule(c.Context, name)
		switch {
		case errors.Is(err, control.ErrNotRunning), c.Context.Err() != nil: // the others would fail alike
			return errors.Join(append(errs, err)...)
		case err != nil:
			errs = append(errs, err)
		default:
			fmt.Fprintf(c.App.Writer, "rule %s: removed\n", printable(name))
		}
	}
	return errors.Join(errs...)
}

func ruleShowCommand(now func() time.Time) *cli.Command {
	return &cli.Command{
		Name:      "show",
		Usage:     "show one rule, its outputs and their counters",
		ArgsUsage: "NAME",
		Flags:     []cli.Flag{outputFlag()},
		Action: func(c *cli.Context) error {
			if err := showArgs(c, 1, 1); err != nil {
				return err
			}
			rule, err := client(c).Rule(c.Context, c.Args().First())
			if err != nil {
				return err
			}
			return show(c, rule, func(w io.Writer) error { return ruleDetail(w, rule, now()) })
		},
	}
}

func ruleDetail(w io.Writer, r control.RuleStatus, now time.Time) error {
	head := newTable("name", r.Name)
	head.add("id", strconv.FormatUint(uint64(r.ID), 10))
	head.add("origin", r.Origin)
	head.add("state", stateText(r.State, r.Reason))
	head.add("path", pathText(r))
	if !several(r) {
		head.add("in", r.In)
	}
	for i, in := range r.Inputs {
		if in.Input == "" {
			head.add("in on "+in.Interface, stateText(in.State, in.Reason))
			continue
		}
		head.add(fmt.Sprintf("in[%d]", i), in.Input+"  "+stateText(in.State, in.Reason))
	}
	if r.Merge != "" {
		head.add("merge", r.Merge)
	}
	if r.Failover != "" {
		head.add("failover", r.Failover)
	}
	if len(r.YieldsTo)+len(r.WinsOver) > 0 {
		head.add("overlaps", overlapText(r))
	}
	head.add("matched", fmt.Sprintf("%s packets, %s, last %s", humanCount(r.Matched.Packets), humanBytes(r.Matched.Bytes), ago(now, r.LastSeen)))
	if err := head.write(w); err != nil {
		return err
	}
	if len(r.Outputs) > 0 {
		titles := []string{">SLOT", "OUTPUT", "STATE", ">PACKETS", ">BYTES", ">DROPPED"}
		hops := slices.ContainsFunc(r.Outputs, func(o control.OutputStatus) bool { return o.NextHop != "" })
		if hops {
			titles = append(titles, "NEXT HOP")
		}
		t := newTable(titles...)
		for _, o := range r.Outputs {
			row := []string{strconv.Itoa(o.Slot), o.Output, stateText(o.State, o.Reason), humanCount(o.Sent.Packets), humanBytes(o.Sent.Bytes),
				humanCount(control.Dropped(o.Drops))}
			if hops {
				row = append(row, nextHop(o))
			}
			t.add(row...)
		}
		fmt.Fprintln(w)
		if err := t.write(w); err != nil {
			return err
		}
	}
	if r.Stream != nil {
		fmt.Fprintln(w)
		if err := healthTable(w, []control.RuleStatus{r}, now); err != nil {
			return err
		}
	}
	if err := noteTable(w, control.Stats{Rules: []control.RuleStatus{r}}); err != nil {
		return err
	}
	if err := dropTable(w, allDrops(r)); err != nil {
		return err
	}
	return receiveTable(w, r.ReceiveDrops)
}

// nextHop is the next hop of an output to a single host.
func nextHop(o control.OutputStatus) string {
	switch {
	case o.NextHop == "":
		return "-"
	case o.MAC == "":
		return o.NextHop
	}
	return o.NextHop + " at " + o.MAC
}

// allDrops are drops before any output, then by slot.
func allDrops(r control.RuleStatus) []control.Drop {
	drops := append([]control.Drop{}, r.Drops...)
	for _, o := range r.Outputs {
		for _, d := range o.Drops {
			d.Reason = fmt.Sprintf("slot %d: %s", o.Slot, d.Reason)
			drops = append(drops, d)
		}
	}
	return drops
}

// pathText is the current path, and the requested one if it differs.
func pathText(r control.RuleStatus) string {
	wanted := r.Path
	if wanted == "" {
		wanted = "auto"
	}
	switch r.UsedPath {
	case wanted:
		return wanted
	case "":
		return "- (" + wanted + ")"
	default:
		return r.UsedPath + " (" + wanted + ")"
	}
}

func ruleListCommand() *cli.Command {
	return &cli.Command{
		Name:  "list",
		Usage: "list the rules",
		Flags: []cli.Flag{outputFlag()},
		Action: func(c *cli.Context) error {
			if err := showArgs(c, 0, 0); err != nil {
				return err
			}
			list, err := client(c).Rules(c.Context)
			if err != nil {
				return err
			}
			return show(c, list, func(w io.Writer) error { return ruleTable(w, list) })
		},
	}
}

// ruleTable has a line for each output; the rule's own columns are on the first.
func ruleTable(w io.Writer, list []control.RuleStatus) error {
	titles := []string{"NAME", "ORIGIN", "STATE", "PATH", "IN", "OUT", "REASON"}
	overlaps := slices.ContainsFunc(list, func(r control.RuleStatus) bool { return overlapText(r) != "-" })
	if overlaps { // which few sets have
		titles = slices.Insert(titles, len(titles)-1, "OVERLAPS")
	}
	t := newTable(titles...)
	for _, r := range list {
		first := "-"
		if len(r.Out) > 0 {
			first = r.Out[0]
		}
		ins := strings.Fields(r.In)
		if len(ins) == 0 {
			ins = []string{""}
		}
		row := []string{r.Name, r.Origin, r.State, pathText(r), ins[0], first, r.Reason}
		if overlaps {
			row = slices.Insert(row, len(row)-1, overlapText(r))
		}
		t.add(row...)
		for i := 1; i < max(len(ins), len(r.Out)); i++ {
			row := make([]string, len(titles))
			if i < len(ins) {
				row[4] = ins[i]
			}
			if i < len(r.Out) {
				row[5] = r.Out[i]
			}
			t.add(row...)
		}
	}
	return t.write(w)
}

// overlapText says which other rules match packets of a rule.
func overlapText(r control.RuleStatus) string {
	var parts []string
	if len(r.YieldsTo) > 0 {
		parts = append(parts, "after "+strings.Join(r.YieldsTo, ", "))
	}
	if len(r.WinsOver) > 0 {
		parts = append(parts, "before "+strings.Join(r.WinsOver, ", "))
	}
	return orDash(strings.Join(parts, "; "))
}

func ruleExportCommand() *cli.Command {
	return &cli.Command{
		Name:        "export",
		Usage:       "write the rules as a file for run -c, check and rule apply",
		Description: "Mirrored multicast routes (origin mroute) are omitted. rule apply sets the rules of origin api: to change those and apply them again, export with --origin api.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "origin", Usage: "only the rules of `ORIGIN`: file or api"},
		},
		Action: ruleExport,
	}
}

func ruleExport(c *cli.Context) error {
	if err := nargs(c, 0, 0); err != nil {
		return err
	}
	origin := c.String("origin")
	switch origin {
	case "", control.OriginFile, control.OriginAPI:
	default:
		return usagef("--origin %q: want file or api", origin)
	}
	list, err := client(c).Rules(c.Context)
	if err != nil {
		return err
	}
	var out []rules.Rule
	for _, r := range list {
		if r.Origin == control.OriginMroute || origin != "" && r.Origin != origin {
			continue
		}
		rule, err := control.ToRule(r.Rule)
		if err != nil {
			return err
		}
		out = append(out, rule)
	}
	data, err := rules.FormatFile(out)
	if err != nil {
		return err
	}
	_, err = c.App.Writer.Write(data)
	return err
}

func ruleApplyCommand() *cli.Command {
	return &cli.Command{
		Name:      "apply",
		Usage:     "make the rules added here exactly those of a file",
		ArgsUsage: "FILE",
		Description: "FILE is - for standard input. Rules that are in the file and not in the daemon are added, rules that are in the\n" +
			"daemon and not in the file are removed, and unchanged rules are not touched. The rules of the daemon's\n" +
			"own file stay. If anything in the file is wrong, nothing changes.",
		Flags: []cli.Flag{
			dryRunFlag(),
			confirmFlag(),
			revisionFlag(),
			outputFlag(),
		},
		Action: ruleApply,
	}
}

func ruleApply(c *cli.Context) error {
	if err := showArgs(c, 1, 1); err != nil {
		return err
	}
	o, err := applyOptions(c)
	if err != nil {
		return err
	}
	name := c.Args().First()
	data, err := readRuleFile(c.App.Reader, name)
	if err != nil {
		return err
	}
	if bytes.Contains(data, []byte("include")) { // the daemon reads no files for clients
		all, err := parseRules(name, data)
		if err != nil {
			return err
		}
		if data, err = rules.FormatFile(all); err != nil {
			return err
		}
	}
	result, err := client(c).ApplyFile(c.Context, data, o)
	if err != nil {
		// The daemon parses the file, once. On an error, all faults are reported here.
		if _, wrong := parseRules(name, data); wrong != nil {
			return wrong
		}
		return err
	}
	return show(c, result, func(w io.Writer) error { return changeList(w, result) })
}

// changeList shows the changes, and a summary.
func changeList(w io.Writer, result control.ApplyResult) error {
	var text strings.Builder
	for _, change := range result.Changes {
		switch change.Op {
		case control.OpAdd:
			text.WriteString("+ " + printable(ruleText(change.Rule)) + "\n")
		case control.OpRemove:
			text.WriteString("- " + printable(ruleText(change.Rule)) + "\n")
		case control.OpChange:
			if change.Old != nil {
				text.WriteString("< " + printable(ruleText(*change.Old)) + "\n")
			}
			text.WriteString("> " + printable(ruleText(change.Rule)) + "\n")
		}
	}
	if more := result.Added + result.Removed + result.Changed - len(result.Changes); more > 0 {
		fmt.Fprintf(&text, "... and %d more\n", more)
	}
	text.WriteString(map[string]string{
		control.OpAdd:    "+ multicast routes of the kernel are mirrored\n",
		control.OpRemove: "- multicast routes of the kernel are mirrored\n",
		control.OpChange: "> other multicast routes of the kernel are mirrored\n",
	}[result.Mroute])
	note := ""
	if result.DryRun {
		note = "dry run: "
	}
	fmt.Fprintf(&text, "%s%d added, %d removed, %d changed, %d kept\n", note, result.Added, result.Removed, result.Changed, result.Kept)
	if by := result.ConfirmBy; by != nil {
		fmt.Fprintf(&text, "undone at %s without \"xdpcast confirm\"\n", by.Local().Format(time.TimeOnly))
	}
	_, err := io.WriteString(w, text.String())
	return err
}

func ruleText(r control.Rule) string {
	text := r.Name + ": " + r.In + " -> " + strings.Join(r.Out, " ")
	if r.Merge != "" {
		text += " merge=" + r.Merge
	}
	if r.Failover != "" {
		text += " failover=" + r.Failover
	}
	if r.Path != "" && r.Path != "auto" {
		text += " (path " + r.Path + ")"
	}
	return text
}
