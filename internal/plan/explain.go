package plan

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"xdpcast/internal/network"
	"xdpcast/pkg/rules"
)

// Packet is the packet to explain. An invalid source means any source, port 0 any port.
type Packet struct {
	Interface   string
	Source      netip.Addr
	Destination netip.Addr
	Port        uint16
	VLAN        rules.VLAN
	FromHost    bool // sent by this host on the interface
}

// ErrNoRule is wrapped by the error of ParsePacket when no rule has the given name.
var ErrNoRule = errors.New("no such rule")

// ParsePacket parses an endpoint, or the name of a rule for a packet that it takes.
func (p *Plan) ParsePacket(text string) (Packet, error) {
	var in rules.Input
	switch r := p.Rule(text); {
	case r != nil && r.Rule.Stream != nil:
		in = r.Rule.In
		in.Interface = r.Flows[0].In.Name
	case r != nil:
		in = r.Rule.In
		for _, f := range r.Flows {
			in.Interface = f.In.Name // for a pattern, the last flow's
		}
	case !strings.Contains(text, "%"):
		return Packet{}, noRuleError(fmt.Sprintf("no rule is named %.100q: want a rule's name, or a packet as [SOURCE@]ADDRESS[:PORT]%%INTERFACE[,vlan=ID]", text))
	default:
		var accept rules.Acceptance
		var err error
		if in, accept, err = rules.ParseInput(text); err != nil {
			return Packet{}, err
		}
		if in.Len != 0 || in.SourceLen != 0 || in.PortTo != 0 || isPattern(in.Interface) || rules.FormatInput(in, accept) != in.String() {
			return Packet{}, fmt.Errorf("packet %.100q: want one address on one interface, with no option but vlan and from", text)
		}
	}
	return Packet{in.Interface, in.Source, in.Address, in.Port, in.VLAN, in.FromHost}, nil
}

// noRuleError is ErrNoRule with its own text.
type noRuleError string

func (e noRuleError) Error() string        { return string(e) }
func (e noRuleError) Is(target error) bool { return target == ErrNoRule }

// String formats the packet like the input of a rule.
func (k Packet) String() string { return k.input().String() }

// input is the packet as the input of a rule that takes exactly this packet.
func (k Packet) input() rules.Input {
	return rules.Input{Interface: k.Interface, Source: k.Source, Address: k.Destination, Port: k.Port, VLAN: k.VLAN, FromHost: k.FromHost}
}

// Known is information beyond the plan that Explain may use.
type Known struct {
	// QuerierVersion is the IGMP or MLD version of the querier last heard on the packet's interface
	// in its family; 0 if unknown.
	QuerierVersion int
}

// Explanation says how a packet is handled, and why.
type Explanation struct {
	Packet Packet
	// Why is one line: which rule takes the packet, or why none does.
	Why string
	// Candidates are the matching rules, the winner first.
	Candidates []Candidate
	// Flow is the winner's flow on the packet's interface; nil while there is none. The fields
	// below are then empty.
	Flow *FlowPlan
	// Path is how its packets travel, empty while it is not published; PathReason is the reason for
	// the path.
	Path, PathReason string
	Outputs          []ExplainedOutput
	// Memberships are those that attract the packet.
	Memberships []Membership
	// Notes are further hints for the user, one line each.
	Notes []string
}

// Candidate is a rule that matches a packet.
type Candidate struct {
	Rule *RulePlan
	Leg  int       // the matching input
	Flow *FlowPlan // on the packet's interface; nil while that is absent
	Kind string    // what it matches by: "source, group, port", for a prefix with its length
}

// Input returns the matching input.
func (c *Candidate) Input() rules.Input { return c.leg().In }

func (c *Candidate) leg() rules.Leg { return c.Rule.Rule.Leg(c.Leg) }

// State returns the state and reason of the flow, or of the rule if there is no flow.
func (c *Candidate) state() (State, string) {
	if c.Flow != nil {
		return c.Flow.State, c.Flow.Reason
	}
	return c.Rule.State, c.Rule.Reason
}

// ExplainedOutput is one output of the flow that takes a packet.
type ExplainedOutput struct {
	OutputPlan
	Output  string // as written in a rule that names the interface
	Rewrite string // the rewriting in words
	NextHop string // neighbour of a unicast copy, once it is known
	Dropped bool   // copies for this output are dropped
}

// Explain finds the rules that match a packet, and describes how the winner handles it.
func (p *Plan) Explain(k Packet, known Known) Explanation {
	e := Explanation{Packet: k}
	if l := p.seen.network.Link(k.Interface); l != nil {
		k.Interface = l.Name
	}
	e.Candidates = p.candidates(k)
	if len(e.Candidates) == 0 {
		e.Why = p.whyNone(k)
		return e
	}
	best := &e.Candidates[0]
	e.Why = best.whyBest(e.Candidates[1:])
	if e.Flow = best.Flow; e.Flow == nil {
		return e
	}
	dropped := ""
	if best.Flow.Publish {
		dropped = p.ownSource(best, k)
	}
	if dropped != "" {
		e.Why = fmt.Sprintf("rule %s takes it and drops it, reason loop: %s", best.Rule.Rule.Name, dropped)
	}
	e.flow(p, best, k, dropped != "")
	e.querier(best.Input(), known)
	return e
}

// ownSource says why a matching packet is dropped as one of this host's; "" if it is not.
func (p *Plan) ownSource(c *Candidate, k Packet) string {
	if c.leg().Accept.AllowLoop || !k.Source.IsValid() || !p.seen.network.IsOwn(k.Source) {
		return ""
	}
	return fmt.Sprintf("%s is an address of this host (loop=allow on the input takes packets that come back from the network; packets that this host itself sends there do not arrive on the interface, and are never relayed)", k.Source)
}

// querier notes that the querier's version cannot report a source to the network.
func (e *Explanation) querier(in rules.Input, known Known) {
	protocol, sources := "IGMP", 3 // RFC 3376
	if in.Address.Is6() {
		protocol, sources = "MLD", 2 // RFC 3810
	}
	if !in.Source.IsValid() || len(e.Memberships) == 0 || known.QuerierVersion == 0 || known.QuerierVersion >= sources {
		return
	}
	e.Notes = append(e.Notes, fmt.Sprintf("the querier on %s speaks %sv%d, which has no sources: the network only learns of group %s alone, not of source %s, and delivers every sender's packets (want %sv%d)",
		e.Flow.In.Name, protocol, known.QuerierVersion, e.Packet.Destination, in.Source, protocol, sources))
}

// canonical is an input with the interface's own name.
func (p *Plan) canonical(in rules.Input) rules.Input {
	if l := p.seen.network.Link(in.Interface); l != nil {
		in.Interface = l.Name
	}
	return in
}

// candidates lists the rules that match a packet, the winner first.
func (p *Plan) candidates(k Packet) (all []Candidate) {
	link := p.seen.network.Link(k.Interface)
	if link == nil {
		link = &network.Link{Name: k.Interface}
	}
	p.eachInput(func(r *RulePlan, leg int, in rules.Input, accept *rules.Acceptance) bool {
		if !in.Overlaps(k.input()) || accept.Excludes(k.Source) || isPattern(in.Interface) && p.seen.inputs.winner(in, link) != nil {
			return true // no match, or another rule takes exactly the same there
		}
		c := Candidate{Rule: r, Leg: leg, Kind: kindName(in)}
		for _, f := range r.Flows {
			if f.In.Name == k.Interface && f.In.Index != 0 && (r.Rule.Stream == nil || f.Flow.Leg.Number == leg) {
				c.Flow = f
			}
		}
		all = append(all, c)
		return true
	})
	slices.SortStableFunc(all, func(a, b Candidate) int {
		x, y := p.canonical(a.Input()), p.canonical(b.Input())
		switch {
		case rules.Before(x, y):
			return -1
		case rules.Before(y, x):
			return 1
		}
		return first(a.Rule.taken == nil, b.Rule.taken == nil)
	})
	return all
}

// eachInput yields all inputs of the rules, with the interfaces' own names, until fn returns false.
func (p *Plan) eachInput(fn func(r *RulePlan, leg int, in rules.Input, accept *rules.Acceptance) bool) {
	for _, r := range p.Rules {
		for i := range r.Rule.InputCount() {
			leg := r.Rule.Leg(i)
			if !fn(r, i, p.canonical(leg.In), &leg.Accept) {
				return
			}
		}
	}
}

// kindName names the lookup kind of an input.
func kindName(in rules.Input) string {
	source, group, port := "source", "group", "port"
	switch {
	case in.SourceLen != 0:
		source = fmt.Sprintf("source prefix of %d bits", in.SourceLen)
	case !in.Source.IsValid():
		source = "any source"
	}
	if in.Len != 0 {
		group = fmt.Sprintf("prefix of %d bits", in.Len)
	}
	switch {
	case in.PortTo != 0:
		port = "range of ports"
	case in.Port == 0:
		port = "any port"
	}
	return source + ", " + group + ", " + port
}

// whyBest says why a rule wins over the others.
func (c *Candidate) whyBest(others []Candidate) string {
	name := c.Rule.Rule.Name
	if c.Flow == nil || !c.Flow.Publish {
		state, reason := c.state()
		return fmt.Sprintf("rule %s would take it, but is not in the kernel: %s", name, cmp.Or(reason, state.String()))
	}
	if len(others) == 0 {
		return fmt.Sprintf("rule %s takes it: no other matches", name)
	}
	return fmt.Sprintf("rule %s takes it: (%s) comes before (%s)", name, c.Kind, others[0].Kind)
}

// whyNone says why no rule matches: the nearest mismatch.
func (p *Plan) whyNone(k Packet) string {
	if p.seen.network.Link(k.Interface) == nil {
		return fmt.Sprintf("no rule takes it: interface %s not found", k.Interface)
	}
	why := ""
	p.eachInput(func(r *RulePlan, leg int, in rules.Input, accept *rules.Acceptance) bool {
		if accept.Excludes(k.Source) && in.Overlaps(k.input()) {
			why = fmt.Sprintf("no rule takes it: rule %s (%s) excludes its sender", r.Rule.Name, r.Rule.Leg(leg).In)
		}
		return why == ""
	})
	if why != "" {
		return why
	}
	for _, wrong := range []struct {
		what   string
		adjust func(*Packet, rules.Input)
	}{
		{"port", func(k *Packet, in rules.Input) { k.Port = in.Port }},
		{"source", func(k *Packet, in rules.Input) { k.Source = in.Source }},
		{"VLAN", func(k *Packet, in rules.Input) { k.VLAN = in.VLAN }},
		{"interface", func(k *Packet, in rules.Input) { k.Interface = strings.TrimSuffix(in.Interface, "+") }},
	} {
		p.eachInput(func(r *RulePlan, leg int, in rules.Input, _ *rules.Acceptance) bool {
			other := k
			wrong.adjust(&other, in)
			if in.Overlaps(other.input()) {
				why = fmt.Sprintf("no rule takes it: rule %s (%s) takes another %s", r.Rule.Name, r.Rule.Leg(leg).In, wrong.what)
			}
			return why == ""
		})
		if why != "" {
			return why
		}
	}
	return "no rule takes it: it passes to the host unchanged"
}

// flow describes how a flow handles a packet.
func (e *Explanation) flow(p *Plan, c *Candidate, k Packet, dropped bool) {
	f := c.Flow
	if f.Publish {
		e.Path, e.PathReason = PathName(f.Flow.Path), cmp.Or(f.PathReason(), p.modeText(f))
	}
	for i, s := range f.Outputs {
		o := c.Rule.Rule.Out[s.Out]
		o.Interface = s.Interface
		out := &f.Flow.Out[i]
		s.Reason = cmp.Or(s.Reason, p.macvlanAbove(s.Interface))
		e.Outputs = append(e.Outputs, ExplainedOutput{
			OutputPlan: s, Output: o.String(), Rewrite: RewriteText(out, k), NextHop: p.nextHopText(s.Hop, &o), Dropped: dropped || !out.Ready,
		})
	}
	for m := range f.Memberships() {
		if m.Group == k.Destination {
			e.Memberships = append(e.Memberships, m)
		}
	}
	if s := c.Rule.Rule.Stream; s != nil {
		e.Notes = append(e.Notes, streamNote(s, c.Leg))
	}
	if note := f.Note(); note != "" && note != f.PathReason() {
		e.Notes = append(e.Notes, note)
	}
}

// modeText says how the relay program runs on the input of a flow.
func (p *Plan) modeText(f *FlowPlan) string {
	switch a, ok := p.seen.attached[f.In.LinkID]; {
	case !ok || a.Err != nil:
		return "no program on " + f.In.Name
	case a.Generic:
		return "generic XDP on " + f.In.Name
	default:
		return "native XDP on " + f.In.Name
	}
}

// nextHopText says where a unicast copy goes; "" while that is not known.
func (p *Plan) nextHopText(key *network.HopKey, o *rules.Output) string {
	if key == nil {
		return ""
	}
	hop := p.seen.network.Hop(*key)
	if hop.Kind != network.HopUnicast || !hop.Resolved {
		return ""
	}
	return fmt.Sprintf("%s at %s", neighbourText(hop, o), macText(hop.MAC))
}

// NextHop returns the neighbour of an output and its link-layer address, as text; each is empty
// while it is not known, and for a group.
func (p *Plan) NextHop(o *OutputPlan) (via, mac string) {
	if o.Hop == nil {
		return "", ""
	}
	hop := p.seen.network.Hop(*o.Hop)
	if hop.Kind != network.HopUnicast {
		return "", ""
	}
	if hop.Resolved {
		mac = macText(hop.MAC)
	}
	return hop.Via.String(), mac
}

// macText formats a link-layer address like package net.
func macText(mac [6]byte) string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", mac[0], mac[1], mac[2], mac[3], mac[4], mac[5])
}

// macvlanAbove says that packets sent on an interface do not reach the macvlan devices on it; "" if
// there are none. Those in other namespaces cannot be seen.
func (p *Plan) macvlanAbove(ifname string) string {
	out := p.seen.network.Link(ifname)
	if out == nil {
		return ""
	}
	var above []string
	for _, l := range p.seen.network.Links() {
		if l.Lower == out.Index && (l.Kind == "macvlan" || l.Kind == "macvtap" || l.Kind == "ipvlan") {
			above = append(above, l.Name)
		}
	}
	if len(above) == 0 {
		return ""
	}
	return fmt.Sprintf("copies sent on %s do not reach the devices on it: to reach %s, send on a macvlan device of your own", ifname, strings.Join(above, ", "))
}
