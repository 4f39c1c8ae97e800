package plan

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"xdpcast/internal/network"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
	"xdpcast/pkg/rules"
)

// maker plans rules, one by one, for one World. Its results depend only on what changes.touch
// checks: a rule that touch calls untouched keeps its plan.
type maker struct {
	opts    *Options
	net     *network.Snapshot
	answers *Answers
	failed  map[Membership]Join // of Answers.Joined, those with an error
	inputs  *inputIndex
	taken   map[legRef]*Rule // see takenInputs
	scratch []slot           // scratch space of slotsOf
}

// rule plans a rule.
func (m *maker) rule(r *Rule) *RulePlan {
	if r.Left != "" {
		return &RulePlan{Rule: r, State: Pending, Reason: leftToKernel + r.Left}
	}
	if r.Stream != nil {
		return m.legs(r)
	}
	inputs, reason := m.inputsOf(r.In)
	if len(inputs) == 0 {
		return &RulePlan{Rule: r, State: Pending, Reason: reason, taken: m.takenFirst(r)}
	}
	if len(inputs) > 1 {
		p := &RulePlan{Rule: r, taken: m.takenFirst(r), Flows: make([]*FlowPlan, len(inputs))}
		for i, in := range inputs {
			p.Flows[i] = &FlowPlan{}
			m.flow(p.Flows[i], r, p.taken, nil, in)
		}
		p.sum()
		return p
	}
	one := &struct { // one allocation for the parts that nearly all rules have
		RulePlan
		flow  FlowPlan
		flows [1]*FlowPlan
	}{RulePlan: RulePlan{Rule: r, taken: m.takenFirst(r)}}
	p := &one.RulePlan
	one.flows[0] = &one.flow
	p.Flows = one.flows[:]
	m.flow(&one.flow, r, p.taken, nil, inputs[0])
	p.sum()
	return p
}

// sum derives the state of a rule from those of its flows: it is active if one of them is.
func (r *RulePlan) sum() {
	// What all flows have, such as an output that is down, is about no input.
	shared := len(r.Flows) > 1 && !slices.ContainsFunc(r.Flows, func(f *FlowPlan) bool { return f.Reason != r.Flows[0].Reason })
	for _, f := range r.Flows {
		if f.Reason != "" && r.Reason == "" {
			r.Reason = f.Reason
			switch {
			case shared:
			case f.Flow.Leg.Several():
				r.Reason = fmt.Sprintf("in[%d]: %s", f.Flow.Leg.Number, f.Reason)
			case len(r.Flows) > 1:
				r.Reason = "on " + f.In.Name + ": " + f.Reason
			}
		}
		if Rank(f.State) > Rank(r.State) {
			r.State = f.State
		}
	}
}

// Rank orders states: a rule has the highest of its flows.
func Rank(s State) int {
	switch s {
	case Active:
		return 3
	case Pending, NoNeighbour:
		return 2
	case Failed:
		return 1
	}
	return 0
}

// pend notes what a flow waits for; the first note is shown.
func (f *FlowPlan) pend(reason string) { f.State, f.Reason = Pending, cmp.Or(f.Reason, reason) }

func (f *FlowPlan) fail(err error) {
	f.State, f.Reason, f.Publish = Failed, err.Error(), false
	f.noted().err = err
}

func (f *FlowPlan) note(text string) {
	n := f.noted()
	if n.note != "" {
		n.note += "; "
	}
	n.note += text
}

// flow plans a rule on one interface. A multicast route is left to the kernel unless the kernel
// path can forward every packet of it equally well.
func (m *maker) flow(f *FlowPlan, rule, taken *Rule, leg *flow.Leg, in *network.Link) {
	m.relayed(f, rule, taken, leg, in)
	if rule.Origin != OriginMroute {
		return
	}
	if why := m.forwardsWorse(f, rule, in); why != "" {
		if f.more != nil {
			f.more.err = nil
		}
		f.Publish, f.State, f.Reason = false, Pending, leftToKernel+why
		f.settle()
	}
}

const leftToKernel = "left to the kernel: "

// forwardsWorse says what the kernel does for a multicast route that the kernel path does not; ""
// if there is nothing.
func (m *maker) forwardsWorse(f *FlowPlan, rule *Rule, in *network.Link) string {
	switch {
	case f.State != Active:
		return f.Reason
	case !in.Carrier:
		return fmt.Sprintf("interface %s has no carrier", in.Name)
	}
	slots, _ := m.slotsOf(&rule.Rule, in)
	c := &chooser{maker: m, rule: rule, in: in, slots: slots, attached: m.answers.Attached[in.LinkID]}
	if why := c.fault(flow.PathKernel); why != "" {
		return why
	}
	for i := range f.Outputs {
		if f.Outputs[i].State != Active {
			return f.Outputs[i].Reason
		}
	}
	return ""
}

// relayed plans a rule on one interface, in the order of its life: the input, its attachment, the
// path, the outputs, the memberships.
func (m *maker) relayed(f *FlowPlan, rule, taken *Rule, leg *flow.Leg, in *network.Link) {
	*f = FlowPlan{In: in, State: Active, Publish: true, rule: rule}
	f.Flow = resolveInput(&rule.Rule, leg, in)
	f.Flow.Routed = rule.Threshold
	f.carried = m.answers.Carried[f.Flow.Name]
	if err := m.checkInput(rule, taken, leg, in); err != nil {
		f.fail(err)
		return
	}
	if !in.Up {
		f.pend(fmt.Sprintf("interface %s is down", in.Name))
	} else if !in.Carrier {
		f.note(fmt.Sprintf("interface %s has no carrier", in.Name))
	}
	slots, left := m.slotsOf(&rule.Rule, in)
	if len(slots) == 0 {
		f.pend(left)
		f.Publish = false
		return
	}
	f.Reason = cmp.Or(f.Reason, left)
	m.resolveFlow(f, rule, in, slots)
	if err := m.answers.Refused[f.Flow.Name]; err != nil && f.Err() == nil {
		f.fail(err) // the memberships stay: the next try may be soon
	}
	f.settle()
}

// resolveFlow plans a flow whose input is valid and that has outputs.
func (m *maker) resolveFlow(f *FlowPlan, rule *Rule, in *network.Link, slots []slot) {
	f.Outputs = make([]OutputPlan, len(slots))
	f.Flow.Out = make([]flow.Output, len(slots))
	for i, s := range slots {
		f.Outputs[i] = OutputPlan{Out: uint8(s.out), Interface: s.ifname, State: Pending}
		f.Flow.Out[i] = resolvePolicy(&rule.Out[s.out])
	}
	c := &chooser{maker: m, rule: rule, in: in, slots: slots}
	if err := m.prepareInput(f, c); err != nil {
		f.fail(err)
		return
	}
	choice := c.choose(f.carried)
	if choice.err != nil {
		f.fail(choice.err)
		return
	}
	f.Flow.Path = choice.path
	if choice.why != "" {
		f.noted().pathReason = choice.why
		f.note(choice.why)
	}
	if choice.note != "" {
		f.note(choice.note)
	}
	if c.untried && choice.path != f.carried {
		f.Publish = false // do not leave the current path on a guess
	}
	f.Flow.Fronted = choice.path == flow.PathFanout && !c.untried && !rule.In.FromHost && !f.Flow.Local && in.Ethernet && c.attached.Err == nil
	f.Flow.Steered = choice.path == flow.PathFanout && !c.untried && !rule.In.FromHost && m.opts.steers(in, c.attached)
	f.Flow.Fallback = choice.path == flow.PathAFXDP && c.fault(flow.PathKernel) == ""
	f.Flow.Finish = c.finishes()
	if m.resolveOutputs(f, rule, c); f.Err() != nil {
		return
	}
	if choice.path == flow.PathKernel && len(slots) == 1 {
		f.Flow.Out[0].OneBuffer = c.delivers(flow.PathKernel) != ""
	}
	m.resolveMemberships(f, &rule.Rule, in)
}

// prepareInput waits until the input interface is ready for a flow: the program is attached, and
// VLAN tags stay in the frames. A published flow stays published meanwhile. The error is why it
// cannot be done.
func (m *maker) prepareInput(f *FlowPlan, c *chooser) error {
	if in := c.in; in.Ethernet {
		a, tried := m.answers.Attached[in.LinkID]
		c.attached, c.untried = a, !tried
		if !tried {
			m.wait(f, fmt.Sprintf("the relay program is being attached to interface %s", in.Name))
		}
		switch {
		case a.Err != nil && f.Flow.Leg.Several():
			return fmt.Errorf("the relay program must merge several inputs: %w", a.Err)
		case a.Err != nil && !mayTap(c.rule):
			return a.Err
		case a.Err != nil:
			f.unwatched(fmt.Sprintf("the relay program, which watches numbers, is not on interface %s", in.Name))
		}
	} else {
		f.unwatched(fmt.Sprintf("interface %s has no Ethernet header, which the relay program needs that watches numbers", c.in.Name))
	}
	if c.rule.In.VLAN.ID == 0 {
		return nil
	}
	err, tried := m.answers.Tags[c.in.LinkID]
	if !tried {
		m.wait(f, fmt.Sprintf("interface %s is being made to leave VLAN tags in the frames", c.in.Name))
	}
	return err
}

// unwatched relays a flow without health=, which must not cost packets.
func (f *FlowPlan) unwatched(why string) {
	if f.Flow.Leg != nil {
		f.Flow.Leg = nil
		f.note("health= is without effect: " + why)
	}
}

func (m *maker) wait(f *FlowPlan, reason string) {
	f.pend(reason)
	f.Publish = f.Publish && f.carried != 0
}

// settle sets the states of outputs of a flow that is not published.
func (f *FlowPlan) settle() {
	if !f.Publish {
		for i := range f.Outputs {
			f.Flow.Out[i].Ready = false
			o := &f.Outputs[i]
			if o.State == Active || o.Reason == "" {
				o.State, o.Reason = Pending, f.Reason
			}
		}
	}
}

// checkInput says what is wrong with an input. A single unicast address must be one of this host's:
// frames for other addresses arrive only if this host routes them, and a rule for those uses a
// prefix. A prefix therefore needs no address of this host.
func (m *maker) checkInput(rule, taken *Rule, leg *flow.Leg, in *network.Link) error {
	switch a := rule.In.Address; {
	case in.Loopback:
		return fmt.Errorf("interface %s is the loopback: want one that leads to a network", in.Name)
	case !in.Ethernet && !mayTap(rule):
		return fmt.Errorf("interface %s has no Ethernet header, which the %s path needs", in.Name, rule.Path)
	case taken != nil:
		return fmt.Errorf("interface %s is known by several names: rule %s takes the same input by another of them: want an input of its own", in.Name, taken.Name)
	case leg.Several() && m.checkLeg(in) != nil:
		return m.checkLeg(in)
	case rule.In.Multicast() || rule.In.Len != 0 || rule.Accept.Broadcast || m.net.IsOwn(a):
		return nil
	default:
		return fmt.Errorf("address %s is neither a multicast group nor an address of this host (on a router, take a prefix: it needs no address of this host)", a)
	}
}

// resolveInput converts the rule to a flow without outputs. It is the only place that converts
// input options that do not depend on the host.
func resolveInput(rule *rules.Rule, leg *flow.Leg, in *network.Link) *flow.Flow {
	name := FlowName(rule, in.Name)
	switch {
	case leg != nil:
		name = legName(leg)
	case rule.Accept.Health() != (rules.Health{}):
		leg = &flow.Leg{Of: name, Settings: streamOf(rule)}
	}
	return &flow.Flow{
		Name: name,
		Leg:  leg,
		In: flow.Input{
			Index: in.Index, MAC: in.MAC,
			Group: rule.In.Address, Len: int(rule.In.Len), Source: rule.In.Source, Port: rule.In.Port, PortTo: rule.In.PortTo,
			SourceLen: int(rule.In.SourceLen), BySource: rule.In.SourceLen != 0 || len(rule.Accept.Except()) > 0,
			VLAN: rule.In.VLAN.ID, OuterVLAN: rule.In.VLAN.Outer, FromHost: rule.In.FromHost,
		},
		Path:      flow.PathKernel,
		Local:     rule.Accept.Local,
		AllowLoop: rule.Accept.AllowLoop,
		Broadcast: rule.Accept.Broadcast,
		Except:    rule.Accept.Except(),
		Unguarded: rule.Accept.Unguarded,
		// Thresholds are only a likelihood, so they are only for rules with an intended loop.
		TwoWay:          rule.Accept.TwoWay || rule.Accept.AllowLoop,
		AllowNoChecksum: rule.Accept.ZeroChecksum,
		Rate:            resolveRate(rule.Accept.Rate(), in.MTU),
	}
}

// resolvePolicy converts the policies that do not depend on the interface into a rewrite. It is the
// only place that does.
func resolvePolicy(o *rules.Output) flow.Output {
	p := &o.Policy
	out := flow.Output{Blocked: flow.NotReady, Rewrite: packet.Rewrite{
		Dst: o.Address, DstLen: o.Len, DstPort: o.Port,
		SrcPort:      p.SourcePort,
		SetDSCP:      p.DSCP == rules.DSCPSet,
		DSCP:         p.DSCPValue,
		ZeroChecksum: p.Checksum == rules.ChecksumZero,
		MinTTL:       p.MinTTL,
		SetPCP:       p.PCPSet,
		PCP:          p.PCP,
	}}
	switch {
	case p.Broadcast:
		out.DstMAC = packet.BroadcastMAC
	case o.Address.IsMulticast():
		out.DstMAC = packet.MulticastMAC(o.Address)
	}
	switch o.PortMode {
	case rules.PortKeep:
		out.PortAdd, out.DstPort = true, 0
	case rules.PortAdd:
		out.PortAdd, out.PortShift, out.DstPort = true, o.PortShift, 0
	}
	switch p.TTL {
	case rules.TTLDecrement:
		out.TTLMode = packet.TTLDecrement
	case rules.TTLSet:
		out.TTLMode, out.TTL = packet.TTLSet, p.TTLValue
	}
	switch p.VLAN {
	case rules.VLANPop:
		out.VLAN = packet.VLANPop
	case rules.VLANSet:
		out.VLAN, out.VLANID, out.OuterVLAN = packet.VLANSet, p.VLANTags.ID, p.VLANTags.Outer
	}
	if p.Source == rules.SourceAddress {
		out.Src = p.SourceAddr
	}
	return out
}

// burstsASecond gives a default burst of 10 ms.
const burstsASecond = 100

// resolveRate gives a rate its default burst: 10 ms, and at least one packet of the largest size,
// or no packet would ever pass.
func resolveRate(rate rules.Rate, mtu int) flow.Rate {
	out := flow.Rate{Packets: rate.Packets, Bits: rate.Bits, Burst: rate.Burst}
	switch {
	case rate.Burst != 0:
	case rate.Packets != 0:
		out.Burst = max(1, rate.Packets/burstsASecond)
	case rate.Bits != 0:
		out.Burst = max(uint64(mtu+maxHeaders), rate.Bits/8/burstsASecond)
	}
	return out
}

// resolveOutputs completes the outputs once the path is known. It resolves all of them even if one
// fails the flow, since what they request must not depend on that.
func (m *maker) resolveOutputs(f *FlowPlan, rule *Rule, c *chooser) {
	ready := 0
	var fault error
	for i := range f.Outputs {
		s, out, o, link := &f.Outputs[i], &f.Flow.Out[i], &rule.Out[f.Outputs[i].Out], c.slots[i].link
		if o.Unicast() && m.net.IsOwn(o.Address) {
			fault = cmp.Or(fault, ownAddress(o))
			continue
		}
		s.Reason = m.resolveOutput(o, s, out, link, c)
		if text := peerNote(link); text != "" && !strings.Contains(f.Note(), text) {
			f.note(text)
		}
		if s.Reason == "" && o.Unicast() && link.Ethernet {
			fault = cmp.Or(fault, m.resolveHop(o, s, out, link))
		}
		if s.Reason == "" {
			s.State, out.Ready = Active, true
			ready++
			continue
		}
		f.Reason = cmp.Or(f.Reason, s.Reason)
	}
	switch {
	case fault != nil:
		f.fail(fault)
	case ready == 0:
		f.pend(f.Reason)
	}
}

// peerNote says how a veth's peer limits what is sent to it, "" if it does not. l is nil while the
// interface is not known.
func peerNote(l *network.Link) string {
	switch {
	case l == nil || !l.Running():
		return ""
	case l.PeerUnread != "":
		return fmt.Sprintf("the MTU of the peer of interface %s cannot be read (%s): if it is below %d, a copy that is too long for it costs up to 15 others of its bulk, also of other rules", l.Name, l.PeerUnread, l.MTU)
	case l.SendMTU() < l.MTU:
		return fmt.Sprintf("interface %s has an MTU of %d, and its peer one of %d: longer packets are dropped, reason mtu", l.Name, l.MTU, l.PeerMTU)
	}
	return ""
}

func ownAddress(o *rules.Output) error {
	return fmt.Errorf("output %s: %s is an address of this host: want another host's, or a multicast group", o, o.Address)
}

// resolveOutput fills in the fields that depend on the interface, and returns why the output cannot
// send yet; "" if it can.
func (m *maker) resolveOutput(o *rules.Output, s *OutputPlan, out *flow.Output, l *network.Link, c *chooser) string {
	switch {
	case l == nil:
		return fmt.Sprintf("interface %s not found", s.Interface)
	case l.Loopback:
		return fmt.Sprintf("interface %s is the loopback: want one that leads to a network", l.Name)
	}
	out.Index, out.MTU, out.SrcMAC = l.Index, int32(l.SendMTU()), l.MAC
	out.Rate = resolveRate(o.Policy.Rate, l.SendMTU())
	if o.Policy.Source == rules.SourceInterface {
		addr, ok := sourceTo(l, o.Address)
		if !ok {
			return fmt.Sprintf("interface %s has no %s address to send from (or write src=keep, or src=ADDRESS)", l.Name, family(o.Address.Is4()))
		}
		out.Src = addr
	}
	switch {
	case !l.Up:
		return fmt.Sprintf("interface %s is down", l.Name)
	case !l.Carrier:
		out.Blocked = flow.NoCarrier
		return fmt.Sprintf("interface %s has no carrier", l.Name)
	default:
		return c.serves(c.path, l)
	}
}

// resolveHop fills in the link-layer address of a unicast output's next hop, or sets in s why it is
// missing. The error is why there can be none.
func (m *maker) resolveHop(o *rules.Output, s *OutputPlan, out *flow.Output, l *network.Link) error {
	s.Hop = &network.HopKey{Link: l.LinkID, Dst: o.Address}
	hop := m.net.Hop(*s.Hop)
	s.State, out.Blocked = NoNeighbour, flow.NoNeighbour
	switch hop.Kind {
	case network.HopNone:
		s.Reason = fmt.Sprintf("no route to %s by interface %s", o.Address, l.Name)
	case network.HopUnicast:
		if s.Reason = m.whyNoNeighbour(hop, o, l); s.Reason == "" {
			out.DstMAC, out.Blocked = hop.MAC, flow.NotReady
		}
	case network.HopBroadcast:
		s.Reason = fmt.Sprintf("%s is a broadcast address of the network", o.Address)
		return fmt.Errorf("output %s: %s is a broadcast address of the network of interface %s: want a host's address, a multicast group, or broadcast=allow", o, o.Address, l.Name)
	case network.HopLocal:
		s.Reason = fmt.Sprintf("%s is an address of this host", o.Address)
		return ownAddress(o)
	default:
		if hop.Err != nil {
			s.Reason = fmt.Sprintf("next hop to %s by interface %s: %v", o.Address, l.Name, hop.Err)
			break
		}
		s.State, s.Reason, out.Blocked = Pending, "next hop is being looked up", flow.NotReady
	}
	return nil
}

// whyNoNeighbour says why the neighbour of a next hop has no link-layer address; "" if it has one.
func (m *maker) whyNoNeighbour(hop network.Hop, o *rules.Output, l *network.Link) string {
	who := neighbourText(hop, o)
	switch err := m.answers.Neighbours[network.NeighbourKey{Index: l.Index, Addr: hop.Via}]; {
	case hop.Resolved:
		return ""
	case errors.Is(err, ErrNeighbourTableFull):
		return fmt.Sprintf("the kernel's neighbour table has no room for %s (sysctl net.ipv4.neigh.default.gc_thresh3, or ipv6): %v", who, err)
	case cmp.Or(hop.Err, err) != nil:
		return fmt.Sprintf("neighbour %s on interface %s: %v", who, l.Name, cmp.Or(hop.Err, err))
	case hop.Failed:
		return fmt.Sprintf("%s does not answer on interface %s", who, l.Name)
	default:
		return fmt.Sprintf("%s has not answered yet on interface %s", who, l.Name)
	}
}

// neighbourText names the neighbour on the way to an output.
func neighbourText(hop network.Hop, o *rules.Output) string {
	if hop.Gateway {
		return fmt.Sprintf("gateway %s of %s", hop.Via, o.Address)
	}
	return hop.Via.String()
}

func family(is4 bool) string {
	if is4 {
		return "IPv4"
	}
	return "IPv6"
}
