package mroute

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"xdpcast/pkg/flow"
	"xdpcast/pkg/rules"
)

// RulePrefix starts the names of rules made from entries. Rules of a file or the API cannot use it.
const RulePrefix = "mroute/"

// RuleName is the name of an entry's rule: at most flow.MaxName bytes.
func RuleName(k Key) string {
	table := ""
	if k.Table != Main {
		table = fmt.Sprintf("%d/", k.Table)
	}
	name := RulePrefix + table + k.Source.String() + "/" + k.Group.String()
	if len(name) <= flow.MaxName {
		return name
	}
	// Two IPv6 addresses without zeros to compress.
	hex := func(a netip.Addr) string { return strings.ReplaceAll(a.StringExpanded(), ":", "") }
	return "mr/" + strconv.FormatUint(uint64(k.Table), 36) + "/" + hex(k.Source) + hex(k.Group)
}

// Left is why a fully known entry is left to the kernel. The zero Left: it is not.
type Left struct {
	Why string
	// Expected: the settings say so, or only the kernel could forward it.
	Expected bool
}

// Convert makes a rule from an entry: source kept, TTL decremented, any port. For an entry left to
// the kernel the rule only describes it, as far as possible. ifname returns the name of an
// interface, "" if it does not exist.
func Convert(e *Entry, s *rules.Mroute, ifname func(index int) string) (rule rules.Rule, _ Left) {
	left := ""
	name := func(index int) string {
		text := ifname(index)
		if text == "" {
			text = fmt.Sprintf("if%d", index)
			left = fmt.Sprintf("interface with index %d not found", index)
		}
		return text
	}
	rule = rules.Rule{
		Name: RuleName(e.Key), Path: rules.PathKernel,
		In:     rules.Input{Interface: name(e.Input), Address: e.Group},
		Accept: rules.Acceptance{Join: rules.JoinNone, ZeroChecksum: e.Group.Is6(), Unguarded: true},
	}
	if !e.Source.IsUnspecified() {
		rule.In.Source = e.Source
	}
	names := []string{rule.In.Interface}
	back := false
	for _, o := range e.Outputs {
		names = append(names, name(o.Index))
		back = back || o.Index == e.Input
		rule.Out = append(rule.Out, rules.Output{
			Interface: names[len(names)-1], Address: e.Group, PortMode: rules.PortKeep,
			Policy: rules.Policy{Source: rules.SourceKeep, TTL: rules.TTLDecrement},
		})
	}
	if left != "" {
		return rule, Left{Why: left}
	}
	register := slices.IndexFunc(names, func(n string) bool { return strings.HasPrefix(n, "pimreg") || strings.HasPrefix(n, "pim6reg") })
	switch {
	case e.Source.IsUnspecified():
		left = "it is for any source: what the kernel does with a packet depends on where it came in"
	case len(e.Outputs) == 0:
		left = "it has no outputs: the kernel drops its packets"
	case len(e.Outputs) > rules.MaxOutputs:
		left = fmt.Sprintf("it has %d outputs: want at most %d", len(e.Outputs), rules.MaxOutputs)
	case back:
		left = fmt.Sprintf("it sends back to %s, where its packets come in", rule.In.Interface)
	case register >= 0:
		left = fmt.Sprintf("it sends PIM registers, or comes of them (%s): the kernel and its daemon make those", names[register])
	default:
		left = s.Left(e.Group, names)
	}
	return rule, Left{Why: left, Expected: left != ""}
}
