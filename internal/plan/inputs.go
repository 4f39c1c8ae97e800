package plan

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"xdpcast/internal/network"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/rules"
)

func isPattern(ifname string) bool {
	_, ok := rules.IsPattern(ifname)
	return ok
}

// matches says whether a rule's interface, a name or a pattern, matches an interface name.
func matches(pattern, name string) bool {
	if begin, ok := rules.IsPattern(pattern); ok {
		return strings.HasPrefix(name, begin)
	}
	return pattern == name
}

// matching returns the links that a pattern matches, by name: those with an Ethernet header whose
// own name has its prefix. The others, such as the loopback, cannot be served through a pattern.
func (m *maker) matching(pattern string) (all []*network.Link) {
	begin, _ := rules.IsPattern(pattern)
	links := m.net.Links()
	from, _ := slices.BinarySearchFunc(links, begin, func(l *network.Link, name string) int { return strings.Compare(l.Name, name) })
	for _, l := range links[from:] {
		if !strings.HasPrefix(l.Name, begin) {
			break
		}
		if l.Ethernet {
			all = append(all, l)
		}
	}
	return all
}

// inputsOf returns the links on which an input takes packets, by name, or the reason if there is
// none.
func (m *maker) inputsOf(in rules.Input) (all []*network.Link, reason string) {
	if !isPattern(in.Interface) {
		if l := m.net.Link(in.Interface); l != nil {
			return []*network.Link{l}, ""
		}
		return nil, fmt.Sprintf("interface %s not found", in.Interface)
	}
	reason = fmt.Sprintf("no interface matches %s", in.Interface)
	for _, l := range m.matching(in.Interface) {
		if winner := m.inputs.winner(in, l); winner != nil {
			reason = fmt.Sprintf("the interfaces that match %s are taken: rule %s takes the same on %s", in.Interface, winner.Name, winner.In.Interface)
			continue
		}
		all = append(all, l)
	}
	return all, reason
}

// inputIndex finds the rules that take precedence over patterns, by their inputs. It holds only
// rules that take the same as some pattern.
type inputIndex struct {
	rules map[rules.Input]*Rule
}

func newInputIndex(all []*Rule) *inputIndex {
	x := &inputIndex{rules: map[rules.Input]*Rule{}}
	patterns := map[rules.Input]bool{}
	for _, r := range all {
		if isPattern(r.In.Interface) {
			patterns[anywhere(r.In)] = true
		}
	}
	if len(patterns) == 0 {
		return x
	}
	for _, r := range all {
		for leg := range r.InputCount() {
			if in := r.Leg(leg).In; patterns[anywhere(in)] && x.rules[in] == nil {
				x.rules[in] = r
			}
		}
	}
	return x
}

// anywhere is an input without its interface.
func anywhere(in rules.Input) rules.Input {
	in.Interface = ""
	return in
}

// winner is the rule that takes a pattern's packets on a link: one that names the link, otherwise
// the one with the longest pattern. It is nil if that is the input itself.
func (x *inputIndex) winner(in rules.Input, l *network.Link) *Rule {
	find := func(name string) *Rule {
		in.Interface = name
		return x.rules[in]
	}
	pattern := in.Interface
	if r := find(l.Name); r != nil {
		return r
	}
	for _, name := range l.AltNames {
		if r := find(name); r != nil {
			return r
		}
	}
	for _, name := range longerPatterns(pattern, l.Name) {
		if r := find(name); r != nil {
			return r
		}
	}
	return nil
}

// longerPatterns are the patterns that match an interface and are longer than the given one, the
// longest first.
func longerPatterns(pattern, ifname string) (all []string) {
	for n := len(ifname); n >= len(pattern); n-- {
		all = append(all, ifname[:n]+"+")
	}
	return all
}

// takenInputs finds rules with the same input that name one link differently, and maps each losing
// input to the winning rule. In order of precedence, the winner is the current one, a rule of the
// file, one that uses the link's own name, the first by name.
func takenInputs(all []*Rule, net *network.Snapshot, carried map[string]flow.Path) map[legRef]*Rule {
	if !slices.ContainsFunc(net.Links(), func(l *network.Link) bool { return len(l.AltNames) > 0 }) {
		return nil
	}
	claims := map[rules.Input][]legRef{}
	each := func(fn func(legRef, rules.Input, *network.Link)) {
		for _, r := range all {
			for leg := range r.InputCount() {
				in := r.Leg(leg).In
				if l := net.Link(in.Interface); l != nil {
					fn(legRef{r, leg}, in, l)
				}
			}
		}
	}
	each(func(ref legRef, in rules.Input, l *network.Link) {
		if l.Name != in.Interface {
			in.Interface = l.Name
			claims[in] = append(claims[in], ref)
		}
	})
	if len(claims) == 0 {
		return nil
	}
	each(func(ref legRef, in rules.Input, l *network.Link) {
		if claim := claims[in]; claim != nil && !slices.Contains(claim, ref) {
			claims[in] = append(claim, ref)
		}
	})
	taken := map[legRef]*Rule{}
	for in, claim := range claims {
		winner := slices.MinFunc(claim, func(a, b legRef) int {
			return cmp.Or(
				first(carried[a.flow()] != 0, carried[b.flow()] != 0),
				first(a.rule.Origin == OriginFile, b.rule.Origin == OriginFile),
				first(a.rule.Leg(a.leg).In.Interface == in.Interface, b.rule.Leg(b.leg).In.Interface == in.Interface),
				cmp.Compare(a.rule.Name, b.rule.Name),
				cmp.Compare(a.leg, b.leg),
			)
		})
		for _, ref := range claim {
			if ref != winner {
				taken[ref] = winner.rule
			}
		}
	}
	return taken
}

// first orders values that have something before those that do not.
func first(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	}
	return 1
}
