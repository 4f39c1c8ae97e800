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

// Selection says which entries are mirrored. The zero Selection takes all.
type Selection struct {
	// Interfaces are those that an entry may name; empty: any.
	Interfaces []string
	// Groups are the prefixes that its group must be in; empty: any.
	Groups []netip.Prefix
	// Leave are prefixes of groups that are left to the kernel.
	Leave []netip.Prefix
}

// left says why an entry is not selected; "" when it is.
func (s *Selection) left(e *Entry, names []string) string {
	in := func(all []netip.Prefix) bool {
		return slices.ContainsFunc(all, func(p netip.Prefix) bool { return p.Contains(e.Group) })
	}
	switch {
	case len(s.Groups) > 0 && !in(s.Groups):
		return "its group is in none of the prefixes that are mirrored"
	case in(s.Leave):
		return "its group is in a prefix that is left to the kernel"
	}
	for _, name := range names {
		if len(s.Interfaces) > 0 && !slices.Contains(s.Interfaces, name) {
			return fmt.Sprintf("interface %s is none of those that are mirrored", name)
		}
	}
	return ""
}

// RulePrefix begins the names of rules of entries. No rule of a file or the API can be called so.
const RulePrefix = "mroute/"

// RuleName is what the rule of an entry is called: at most flow.MaxName bytes.
func RuleName(k Key) string {
	table := ""
	if k.Table != Main {
		table = fmt.Sprintf("%d/", k.Table)
	}
	name := RulePrefix + table + k.Source.String() + "/" + k.Group.String()
	if len(name) <= flow.MaxName {
		return name
	}
	// Two IPv6 addresses without zeros to leave out.
	hex := func(a netip.Addr) string { return strings.ReplaceAll(a.StringExpanded(), ":", "") }
	return "mr/" + strconv.FormatUint(uint64(k.Table), 36) + "/" + hex(k.Source) + hex(k.Group)
}

// Convert makes a rule of an entry: the source kept, the TTL one less, any port. left is why the
// entry is to stay with the kernel although all is known of it, "" when it need not; the rule is
// then what can be said of the entry. ifname tells the name of an interface, "" for one that
// is not there.
func Convert(e *Entry, s *Selection, ifname func(index int) string) (rule rules.Rule, left string) {
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
	switch {
	case left != "":
	case e.Source.IsUnspecified():
		left = "it is for any source: what the kernel does with a packet depends on where it came in"
	case len(e.Outputs) == 0:
		left = "it has no outputs: the kernel drops its packets"
	case len(e.Outputs) > rules.MaxOutputs:
		left = fmt.Sprintf("it has %d outputs: want at most %d", len(e.Outputs), rules.MaxOutputs)
	case back:
		left = fmt.Sprintf("it sends back to %s, where its packets come in", rule.In.Interface)
	default:
		left = s.left(e, names)
	}
	return rule, left
}
