package relay

import (
	"fmt"
	"net/netip"
	"strings"

	"xdpcast/pkg/rules"
)

// instanceName is what the kernel knows an instance by: the rule's name, with the
// interface behind it when the input is a pattern. The sign between cannot be in a
// rule's name.
func instanceName(rule *rules.Rule, ifname string) string {
	if !isPattern(rule.In.Interface) {
		return rule.Name
	}
	return rule.Name + instanceSeparator + ifname
}

const instanceSeparator = "%"

// ruleOf is the rule that an instance is of.
func (r *Relay) ruleOf(instance string) *wantedRule {
	name, _, _ := strings.Cut(instance, instanceSeparator)
	return r.rules[name]
}

// inputsOf returns the interfaces that an input takes packets on, by name, and if
// there is none, why.
func (r *Relay) inputsOf(in rules.Input) (all []*iface, reason string) {
	if !isPattern(in.Interface) {
		if i := r.interfaces[in.Interface]; i != nil {
			return []*iface{i}, ""
		}
		return nil, fmt.Sprintf("interface %s not found", in.Interface)
	}
	reason = fmt.Sprintf("no interface matches %s", in.Interface)
	for _, i := range r.matching(in.Interface) {
		if winner := r.winner(in, i.name); winner != nil {
			reason = fmt.Sprintf("the interfaces that match %s are taken: rule %s takes the same on %s", in.Interface, winner.rule.Name, winner.rule.In.Interface)
			continue
		}
		all = append(all, i)
	}
	return all, reason
}

// winner is the rule that takes what a pattern's input would take on an interface:
// one that names the interface, or else the one with the longest pattern. It is nil
// when that is the input itself.
func (r *Relay) winner(in rules.Input, ifname string) *wantedRule {
	for _, name := range append([]string{ifname}, longerPatterns(in.Interface, ifname)...) {
		in.Interface = name
		if w := r.inputIndex()[in]; w != nil {
			return w
		}
	}
	return nil
}

// longerPatterns are the patterns that match an interface and are longer than one
// that does, the longest first.
func longerPatterns(pattern, ifname string) []string {
	var all []string
	for n := len(ifname); n >= len(pattern); n-- {
		all = append(all, ifname[:n]+"+")
	}
	return all
}

// inputIndex finds rules by their inputs. It is made when it is first needed after a
// change of the rules: for patterns alone.
func (r *Relay) inputIndex() map[rules.Input]*wantedRule {
	if r.inputs == nil {
		r.inputs = make(map[rules.Input]*wantedRule, len(r.rules))
		for _, w := range r.rules {
			r.inputs[w.rule.In] = w
		}
	}
	return r.inputs
}

// slotsOf expands the outputs of a rule that takes packets in on an interface: a
// pattern into one slot for each interface, by name. The reason says what was left
// out that somebody may miss.
func (r *Relay) slotsOf(rule *rules.Rule, in *iface) (slots []slot, reason string) {
	slots = make([]slot, 0, len(rule.Out))
	for number := range rule.Out {
		o := &rule.Out[number]
		if !isPattern(o.Interface) {
			slots = append(slots, slot{out: number, ifname: o.Interface})
			continue
		}
		found := false
		for _, i := range r.matching(o.Interface) {
			if namedElsewhere(rule, number, i.name) || i.index == in.index && r.feeds(rule, o, in) {
				continue
			}
			found = true
			slots = append(slots, slot{out: number, ifname: i.name})
		}
		if !found && reason == "" {
			reason = fmt.Sprintf("no interface matches %s", o.Interface)
		}
	}
	if len(slots) > rules.MaxOutputs {
		reason = fmt.Sprintf("%d outputs after the patterns: the first %d are served, up to %s", len(slots), rules.MaxOutputs, slots[rules.MaxOutputs-1].ifname)
		slots = slots[:rules.MaxOutputs]
	}
	return slots, reason
}

// namedElsewhere says whether another output of the rule that sends the same stands
// for an interface: by its name, or by a longer pattern.
func namedElsewhere(rule *rules.Rule, number int, ifname string) bool {
	o := &rule.Out[number]
	for other := range rule.Out {
		p := &rule.Out[other]
		if other == number || p.Address != o.Address || p.Len != o.Len || p.PortMode != o.PortMode || p.Port != o.Port || p.PortShift != o.PortShift {
			continue
		}
		if matches(p.Interface, ifname) && (!isPattern(p.Interface) || len(p.Interface) > len(o.Interface)) {
			return true
		}
	}
	return false
}

// feeds says whether an output on the input's own interface could send what the
// input takes, were it to come back.
func (r *Relay) feeds(rule *rules.Rule, o *rules.Output, in *iface) bool {
	return !rule.Accept.AllowLoop && sameAddresses(rule.In, o) && samePorts(rule.In, o) && sameTags(rule.In, o) && sameSource(rule.In, o, in)
}

func sameAddresses(in rules.Input, o *rules.Output) bool {
	return prefixOf(in.Address, in.Len).Overlaps(prefixOf(o.Address, o.Len))
}

func prefixOf(addr netip.Addr, length uint8) netip.Prefix {
	if length == 0 {
		return netip.PrefixFrom(addr, addr.BitLen())
	}
	return netip.PrefixFrom(addr, int(length))
}

func samePorts(in rules.Input, o *rules.Output) bool {
	switch {
	case in.Port == 0 || o.PortMode == rules.PortKeep:
		return true
	case o.PortMode == rules.PortAdd || in.PortTo != 0:
		return o.PortsMeet(in) // one port, and another, or ranges that may meet
	default:
		return o.Port == in.Port
	}
}

func sameTags(in rules.Input, o *rules.Output) bool {
	switch o.Policy.VLAN {
	case rules.VLANPop:
		return in.VLAN == rules.VLAN{}
	case rules.VLANSet:
		return in.VLAN == o.Policy.VLANTags
	default:
		return true
	}
}

func sameSource(in rules.Input, o *rules.Output, i *iface) bool {
	switch {
	case !in.Source.IsValid():
		return true
	case o.Policy.Source == rules.SourceAddress:
		return in.Senders().Contains(o.Policy.SourceAddr)
	case o.Policy.Source == rules.SourceInterface:
		addr, ok := i.sourceTo(o.Address)
		return ok && in.Senders().Contains(addr)
	default:
		return true
	}
}
