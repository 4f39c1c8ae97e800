package relay

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"xdpcast/pkg/control"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
	"xdpcast/pkg/rules"
)

// probe is a packet to explain: what rules match of it. The source may be invalid,
// and the port 0: of any.
type probe struct {
	Interface   string
	Source      netip.Addr
	Destination netip.Addr
	Port        uint16
	VLAN        rules.VLAN
}

// Explain implements control.Backend.
func (r *Relay) Explain(ctx context.Context, packet string) (e control.Explanation, err error) {
	err = r.do(ctx, func() error {
		f, err := r.flowOf(packet)
		if err != nil {
			return err
		}
		e = r.explain(f)
		e.Packet = f.String()
		r.explainNotes(&e)
		return nil
	})
	return e, err
}

// explainNotes says which packets like this one the winner has not taken so far, or not as
// they should be.
func (r *Relay) explainNotes(e *control.Explanation) {
	if len(e.Candidates) == 0 {
		return
	}
	status, err := r.ruleStatus(e.Candidates[0].Rule)
	if err != nil {
		return // the counters cannot be read, which stats says
	}
	for _, n := range status.Notes {
		switch n.Reason {
		case loader.Malformed.String():
			e.Why += fmt.Sprintf("; %d packets for it were malformed and passed to the host", n.Packets)
		case loader.OrphanFragment.String():
			e.Why += fmt.Sprintf("; %d fragments came before the first of their datagram and passed to the host", n.Packets)
		case loader.UnfinishedChecksum.String():
			e.Why += fmt.Sprintf("; %d packets came with an unfinished checksum", n.Packets)
		}
	}
}

// flowOf reads an endpoint, or the name of a rule for a packet that it takes.
func (r *Relay) flowOf(packet string) (probe, error) {
	var in rules.Input
	if w := r.rules[packet]; w != nil {
		in = w.rule.In
		for _, n := range w.instances {
			in.Interface = n.in // of a pattern the last one
		}
	} else if !strings.Contains(packet, "%") {
		return probe{}, control.Errorf(control.KindNotFound, "no rule is called %.100q: want a rule's name, or a packet as [SOURCE@]ADDRESS[:PORT]%%INTERFACE[,vlan=ID]", packet)
	} else {
		var accept rules.Acceptance
		var err error
		if in, accept, err = rules.ParseInput(packet); err != nil {
			return probe{}, control.Wrap(control.KindInvalid, err)
		}
		if in.Len != 0 || isPattern(in.Interface) || rules.FormatInput(in, accept) != in.String() {
			return probe{}, control.Errorf(control.KindInvalid, "packet %.100q: want one address on one interface, with no option but vlan", packet)
		}
	}
	return probe{in.Interface, in.Source, in.Address, in.Port, in.VLAN}, nil
}

// String is the packet as an input of a rule is written.
func (f probe) String() string {
	return f.input().String()
}

// input is the packet as the input of a rule that takes just this.
func (f probe) input() rules.Input {
	return rules.Input{Interface: f.Interface, Source: f.Source, Address: f.Destination, Port: f.Port, VLAN: f.VLAN}
}

// match is a candidate; the instance is nil while the interface is absent.
type match struct {
	rule     *wantedRule
	instance *instance
}

// explain finds the rules that match a packet, and says what the winner does.
func (r *Relay) explain(f probe) control.Explanation {
	matches := r.matchesOf(f)
	e := control.Explanation{Why: r.whyNone(f)}
	for _, m := range matches {
		e.Candidates = append(e.Candidates, m.describe())
	}
	if len(matches) == 0 {
		return e
	}
	best := matches[0]
	e.Why = best.whyBest(matches[1:])
	if best.instance != nil {
		r.explainInstance(&e, f, best)
	}
	return e
}

// matchesOf lists the rules that match a packet, the winner first.
func (r *Relay) matchesOf(f probe) []match {
	var all []match
	wanted := f.input()
	for _, w := range r.ordered {
		in := w.rule.In
		if !in.Overlaps(wanted) {
			continue
		}
		if isPattern(in.Interface) && r.winner(in, f.Interface) != nil {
			continue // another rule takes exactly the same there
		}
		m := match{rule: w}
		for _, n := range w.instances {
			if n.in == f.Interface {
				m.instance = n
			}
		}
		all = append(all, m)
	}
	slices.SortFunc(all, func(a, b match) int {
		if rules.Before(a.rule.rule.In, b.rule.rule.In) {
			return -1
		}
		return 1
	})
	return all
}

// kindName says what a match is found by.
func (m match) kindName() string {
	in, source, group, port := m.rule.rule.In, "source", "group", "port"
	if !in.Source.IsValid() {
		source = "any source"
	}
	if in.Len != 0 {
		group = fmt.Sprintf("prefix of %d bits", in.Len)
	}
	if in.Port == 0 {
		port = "any port"
	}
	return source + ", " + group + ", " + port
}

func (m match) describe() control.Candidate {
	c := control.Candidate{Rule: m.rule.rule.Name, Input: m.rule.rule.In.String(), Kind: m.kindName(), State: m.rule.state, Reason: m.rule.reason}
	if m.instance != nil {
		c.State, c.Reason = m.instance.state, m.instance.reason
	}
	return c
}

// whyBest says why a match wins over the others.
func (m match) whyBest(others []match) string {
	name := m.rule.rule.Name
	if m.instance == nil || !m.instance.publish {
		return fmt.Sprintf("rule %s would take it, but is not in the kernel: %s", name, cmp.Or(m.describe().Reason, m.rule.state))
	}
	if len(others) == 0 {
		return fmt.Sprintf("rule %s takes it: no other matches", name)
	}
	return fmt.Sprintf("rule %s takes it: (%s) comes before (%s)", name, m.kindName(), others[0].kindName())
}

// whyNone says why no rule matches: the next best thing that is not right.
func (r *Relay) whyNone(f probe) string {
	if r.interfaces[f.Interface] == nil {
		return fmt.Sprintf("no rule takes it: interface %s not found", f.Interface)
	}
	for _, wrong := range []struct {
		what   string
		adjust func(*probe, rules.Input)
	}{
		{"port", func(f *probe, in rules.Input) { f.Port = in.Port }},
		{"source", func(f *probe, in rules.Input) { f.Source = in.Source }},
		{"VLAN", func(f *probe, in rules.Input) { f.VLAN = in.VLAN }},
		{"interface", func(f *probe, in rules.Input) { f.Interface = strings.TrimSuffix(in.Interface, "+") }},
	} {
		for _, w := range r.ordered {
			other := f
			wrong.adjust(&other, w.rule.In)
			if w.rule.In.Overlaps(other.input()) {
				return fmt.Sprintf("no rule takes it: rule %s (%s) takes another %s", w.rule.Name, w.rule.In, wrong.what)
			}
		}
	}
	return "no rule takes it: it goes to the host as if there were no relay"
}

// explainInstance says what an instance does with a packet.
func (r *Relay) explainInstance(e *control.Explanation, f probe, m match) {
	n := m.instance
	if n.publish {
		e.Path, e.PathReason = PathName(n.resolved.Path), cmp.Or(n.note, r.pathWhy(n))
	}
	for i, s := range n.slots {
		o := m.rule.rule.Out[s.out]
		o.Interface = s.ifname
		out := control.ExplainedOutput{Slot: i, Output: o.String(), State: s.state, Reason: cmp.Or(s.reason, r.macvlanAbove(s.ifname))}
		if i < len(n.resolved.Out) {
			out.Rewrite = rewriteText(&n.resolved.Out[i], f)
			out.Dropped = !n.resolved.Out[i].Ready
		}
		if s.hop != nil {
			out.NextHop = s.hop.describe()
		}
		e.Outputs = append(e.Outputs, out)
	}
	for _, w := range n.joins {
		if w.Group == f.Destination {
			e.Memberships = append(e.Memberships, w.status([]*instanceOf{{m.rule, n}}, nil))
		}
	}
}

// macvlanAbove says that what is sent on an interface does not reach the macvlan devices
// on it; "" when there are none. Those in other namespaces cannot be seen.
func (r *Relay) macvlanAbove(ifname string) string {
	out := r.interfaces[ifname]
	if out == nil {
		return ""
	}
	var above []string
	for name, i := range r.interfaces {
		if i.parent == out.index && (i.kind == "macvlan" || i.kind == "macvtap" || i.kind == "ipvlan") {
			above = append(above, name)
		}
	}
	if len(above) == 0 {
		return ""
	}
	slices.Sort(above)
	return fmt.Sprintf("copies sent on %s do not reach the devices on it: to reach %s, send on a macvlan device of your own", ifname, strings.Join(above, ", "))
}

func (r *Relay) pathWhy(n *instance) string {
	for _, a := range r.loader.Attachments() {
		if a.Index == n.resolved.In.Index {
			return fmt.Sprintf("%s XDP on %s", a.Mode, n.in)
		}
	}
	return "no program on " + n.in
}

// rewriteText says in words what an output makes of a packet.
func rewriteText(o *loader.Output, f probe) string {
	parts := []string{"to " + destinationText(o, f)}
	switch {
	case o.Src.IsValid() && o.SrcPort != 0:
		parts = append(parts, "from "+netip.AddrPortFrom(o.Src, o.SrcPort).String())
	case o.Src.IsValid():
		parts = append(parts, "from "+o.Src.String()+", source port kept")
	case o.SrcPort != 0:
		parts = append(parts, fmt.Sprintf("source kept, from port %d", o.SrcPort))
	default:
		parts = append(parts, "source kept")
	}
	switch o.TTLMode {
	case packet.TTLDecrement:
		parts = append(parts, "ttl one less")
	case packet.TTLSet:
		parts = append(parts, fmt.Sprintf("ttl %d", o.TTL))
	}
	if o.MinTTL != 0 {
		parts = append(parts, fmt.Sprintf("dropped with a ttl below %d", o.MinTTL))
	}
	if o.SetDSCP {
		parts = append(parts, fmt.Sprintf("dscp %d", o.DSCP))
	}
	if o.ZeroChecksum {
		parts = append(parts, "no UDP checksum")
	}
	parts = append(parts, tagText(o)...)
	switch {
	case o.Rate.Packets != 0:
		parts = append(parts, fmt.Sprintf("at most %d packets a second, %d at once", o.Rate.Packets, o.Rate.Burst))
	case o.Rate.Bits != 0:
		parts = append(parts, fmt.Sprintf("at most %d bits a second, %d bytes at once", o.Rate.Bits, o.Rate.Burst))
	}
	return strings.Join(parts, ", ")
}

func tagText(o *loader.Output) (parts []string) {
	switch {
	case o.VLAN == packet.VLANPop:
		parts = append(parts, "VLAN tags removed")
	case o.VLAN == packet.VLANSet && o.OuterVLAN != 0:
		parts = append(parts, fmt.Sprintf("VLAN %d.%d", o.OuterVLAN, o.VLANID))
	case o.VLAN == packet.VLANSet:
		parts = append(parts, fmt.Sprintf("VLAN %d", o.VLANID))
	}
	if o.SetPCP {
		parts = append(parts, fmt.Sprintf("priority %d", o.PCP))
	}
	return parts
}

// destinationText is the address and port that a copy of a packet goes to.
func destinationText(o *loader.Output, f probe) string {
	dst := o.Dst
	if o.DstLen != 0 {
		dst = merge(o.Dst, f.Destination, int(o.DstLen))
	}
	switch port := int32(f.Port) + o.PortShift; {
	case !o.PortAdd:
		return netip.AddrPortFrom(dst, o.DstPort).String()
	case f.Port != 0 && (port < 1 || port > 65535):
		return fmt.Sprintf("%s, dropped: port %d", dst, port)
	case f.Port != 0:
		return netip.AddrPortFrom(dst, uint16(port)).String()
	case o.PortShift == 0:
		return dst.String() + ", port kept"
	default:
		return fmt.Sprintf("%s, port %+d", dst, o.PortShift)
	}
}

// merge is the first bits of prefix, and behind them those of addr.
func merge(prefix, addr netip.Addr, bits int) netip.Addr {
	p, a := prefix.AsSlice(), addr.AsSlice()
	if len(p) != len(a) {
		return prefix
	}
	for i := range p {
		mask := byte(0xff)
		switch {
		case bits <= i*8:
			mask = 0
		case bits < i*8+8:
			mask = 0xff << (i*8 + 8 - bits)
		}
		p[i] = p[i]&mask | a[i]&^mask
	}
	merged, _ := netip.AddrFromSlice(p)
	return merged
}
