package relay

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"xdpcast/pkg/control"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
	"xdpcast/pkg/rules"
)

// stateNoNeighbour is the state of an output whose next hop has no link-layer
// address: it completes by itself.
const stateNoNeighbour = "no_neighbour"

// wantedRule is a rule that somebody wants, and what has become of it.
type wantedRule struct {
	rule   rules.Rule
	origin string

	state  string
	reason string
	err    error  // why it is failed; nil otherwise
	logged string // the states that the log was last told
	dirty  bool   // to be resolved again
	// instances are the rule on each of its input interfaces, by name: one at most,
	// unless the input is a pattern.
	instances []*instance
}

// instance is a rule on one input interface: what the kernel knows as a rule.
type instance struct {
	in       string // interface
	state    string
	reason   string
	err      error
	note     string // what a person should know although nothing is wrong
	noXDP    error  // why the input interface runs no program
	stays    bool   // on the kernel path: streams run there
	slots    []slot
	joins    []*wantedMembership
	resolved loader.Rule
	publish  bool // resolved is to be in the kernel
}

// slot is one output of an instance: an output of the rule on one interface.
type slot struct {
	out           int // number of the output in the rule
	ifname        string
	state, reason string
	hop           *nextHop // of a unicast output
}

func (n *instance) pend(reason string) { n.state, n.reason = control.StatePending, reason }

func (n *instance) fail(err error) {
	n.state, n.reason, n.err, n.publish = control.StateFailed, err.Error(), err, false
}

// equal says whether two instances are the same to the kernel.
func (n *instance) equal(o *instance) bool {
	if n.publish != o.publish {
		return false
	}
	return !n.publish || n.resolved.Equal(o.resolved)
}

func sameInstances(a, b []*instance) bool {
	return slices.EqualFunc(a, b, (*instance).equal)
}

// complete says whether nothing is left to wait for.
func (w *wantedRule) complete() bool { return w.state == control.StateActive && w.reason == "" }

// sum makes the state of a rule from those of its instances: it is active when one
// of them is.
func (w *wantedRule) sum() {
	if len(w.instances) == 0 {
		return // resolve has said why
	}
	w.state, w.reason, w.err = "", "", nil
	for _, n := range w.instances {
		if n.err != nil && w.err == nil {
			w.err = n.err
		}
		if n.reason != "" && w.reason == "" {
			w.reason = n.reason
			if len(w.instances) > 1 {
				w.reason = "on " + n.in + ": " + n.reason
			}
		}
		if rank(n.state) > rank(w.state) {
			w.state = n.state
		}
	}
}

// rank orders states: the rule has the highest of its instances.
func rank(state string) int {
	switch state {
	case control.StateActive:
		return 3
	case control.StatePending, stateNoNeighbour:
		return 2
	case control.StateFailed:
		return 1
	}
	return 0
}

// resolve turns names into indexes and policies into addresses, as far as the
// interfaces allow now.
func (r *Relay) resolve(w *wantedRule) {
	inKernel := w.inKernel()
	w.state, w.reason, w.err, w.instances = control.StateActive, "", nil, nil
	inputs, reason := r.inputsOf(w.rule.In)
	if len(inputs) == 0 {
		w.state, w.reason = control.StatePending, reason
		return
	}
	w.instances = make([]*instance, len(inputs))
	for i, in := range inputs {
		w.instances[i] = r.resolveInstance(&w.rule, in)
		w.instances[i].stays = inKernel[in.name]
	}
}

// inKernel says on which input interfaces the kernel path sends for a rule.
func (w *wantedRule) inKernel() map[string]bool {
	on := map[string]bool{}
	for _, n := range w.instances {
		if n.publish && n.resolved.Path == loader.PathKernel && slices.ContainsFunc(n.resolved.Out, func(o loader.Output) bool { return o.Ready }) {
			on[n.in] = true
		}
	}
	return on
}

func (r *Relay) resolveInstance(rule *rules.Rule, in *iface) *instance {
	n := &instance{in: in.name, state: control.StateActive}
	if in.loopback {
		n.fail(fmt.Errorf("interface %s is the loopback: want one that leads to a network", in.name))
		return n
	}
	if !in.ethernet && !mayTap(rule) {
		n.fail(fmt.Errorf("interface %s has no Ethernet header, which the %s path needs", in.name, rule.Path))
		return n
	}
	if err := r.checkInput(rule.In); err != nil {
		n.fail(err)
		return n
	}
	if !in.up {
		n.pend(fmt.Sprintf("interface %s is down", in.name))
	}
	var left string
	if n.slots, left = r.slotsOf(rule, in); len(n.slots) == 0 {
		n.pend(left)
		return n
	}
	n.reason = cmp.Or(n.reason, left)
	n.publish = true
	n.resolved = loader.Rule{
		Name: instanceName(rule, in.name),
		In: loader.Input{
			Index: in.index, MAC: in.mac,
			Group: rule.In.Address, Len: int(rule.In.Len), Source: rule.In.Source, Port: rule.In.Port,
			VLAN: rule.In.VLAN.ID, OuterVLAN: rule.In.VLAN.Outer,
		},
		Out:             make([]loader.Output, len(n.slots)),
		Local:           rule.Accept.Local,
		AllowLoop:       rule.Accept.AllowLoop,
		AllowNoChecksum: rule.Accept.ZeroChecksum,
		Rate:            resolveRate(rule.Accept.Rate, in.mtu),
	}
	for i, s := range n.slots {
		n.resolved.Out[i] = resolvePolicy(rule.Out[s.out])
		n.resolved.Out[i].Blocked = flow.NotReady
	}
	return n
}

// checkInput says what is wrong with an input, other than its interface. A single
// unicast address must be one of this host's: frames for another address come here
// only when this host routes them, and then it is a prefix that says so. A prefix
// therefore needs no address of this host.
func (r *Relay) checkInput(in rules.Input) error {
	if in.Multicast() || in.Len != 0 || r.isLocal(in.Address) {
		return nil
	}
	return fmt.Errorf("address %s is neither a multicast group nor an address of this host (on a router, take a prefix: it needs no address of this host)", in.Address)
}

func (r *Relay) isLocal(addr netip.Addr) bool {
	_, ok := slices.BinarySearchFunc(r.own, addr, netip.Addr.Compare)
	return ok
}

// resolveOutputs completes the outputs, once it is known how the input is attached.
func (r *Relay) resolveOutputs(rule *rules.Rule, n *instance, generic bool) {
	in := r.interfaces[n.in]
	path, note, err := r.choosePath(rule, in, n, generic)
	if err != nil {
		n.fail(err)
		return
	}
	n.resolved.Path, n.note = path, note
	n.resolved.Finish = r.finishes(in, path, generic)
	n.resolved.Steered = path == loader.PathFanout && r.steers(in, n.noXDP == nil && in.ethernet, generic)
	n.resolved.Fallback = path == loader.PathAFXDP && r.notInKernel(rule, in, n, generic) == "" && r.jumboFault(in, n) == "" && r.localSenders(in) == ""
	ready := 0
	for i := range n.slots {
		s, out := &n.slots[i], &n.resolved.Out[i]
		o := &rule.Out[s.out]
		if !o.Address.IsMulticast() && r.isLocal(o.Address) {
			n.fail(fmt.Errorf("output %s: %s is an address of this host: want another host's, or a multicast group", o, o.Address))
			return
		}
		s.state, s.reason = control.StatePending, r.resolveOutput(o, s, out, path, generic)
		if s.reason == "" {
			s.state, s.reason = r.resolveHop(o, s, out)
		}
		if s.hop != nil && errors.Is(s.hop.err, errBroadcast) {
			n.fail(fmt.Errorf("output %s: %s is a broadcast address of the network of interface %s: want a host's address, or a multicast group", o, o.Address, s.ifname))
			return
		}
		if s.reason == "" {
			out.Ready = true
			ready++
			continue
		}
		n.reason = cmp.Or(n.reason, s.reason)
	}
	if ready == 0 {
		n.pend(n.reason)
	}
}

// resolveOutput fills in what depends on the interface, and returns why the output
// cannot send yet; "" when it can.
func (r *Relay) resolveOutput(o *rules.Output, s *slot, out *loader.Output, path loader.Path, generic bool) string {
	i := r.interfaces[s.ifname]
	if i == nil {
		return fmt.Sprintf("interface %s not found", s.ifname)
	}
	if i.loopback {
		return fmt.Sprintf("interface %s is the loopback: want one that leads to a network", i.name)
	}
	out.Index, out.MTU, out.SrcMAC = i.index, i.mtu, i.mac
	out.Rate = resolveRate(o.Policy.Rate, i.mtu)
	if o.Policy.Source == rules.SourceInterface {
		addr, ok := i.firstAddr(o.Address.Is4())
		if !ok {
			return fmt.Sprintf("interface %s has no %s address to send from (or write src=keep, or src=ADDRESS)", i.name, family(o.Address.Is4()))
		}
		out.Src = addr
	}
	if !i.up {
		return fmt.Sprintf("interface %s is down", i.name)
	}
	if !i.running {
		out.Blocked = flow.NoCarrier
		return fmt.Sprintf("interface %s has no carrier", i.name)
	}
	if path == loader.PathKernel {
		return r.cannotTransmit(i, generic)
	}
	return ""
}

// resolveHop fills in the link-layer address of a unicast output's next hop.
func (r *Relay) resolveHop(o *rules.Output, s *slot, out *loader.Output) (state, reason string) {
	if o.Address.IsMulticast() || !r.interfaces[s.ifname].ethernet {
		return control.StateActive, ""
	}
	s.hop = r.hops.to(out.Index, o.Address)
	if !s.hop.ready() {
		out.Blocked = flow.NoNeighbour
		return stateNoNeighbour, s.hop.why(s.ifname)
	}
	out.DstMAC = s.hop.neighbour.mac
	return control.StateActive, ""
}

// resolvePolicy turns what does not depend on the interface into a rewrite.
func resolvePolicy(o rules.Output) loader.Output {
	p := o.Policy
	out := loader.Output{Rewrite: packet.Rewrite{
		Dst: o.Address, DstLen: o.Len, DstPort: o.Port,
		SrcPort:      p.SourcePort,
		SetDSCP:      p.DSCP == rules.DSCPSet,
		DSCP:         p.DSCPValue,
		ZeroChecksum: p.Checksum == rules.ChecksumZero,
		MinTTL:       p.MinTTL,
		SetPCP:       p.PCPSet,
		PCP:          p.PCP,
	}}
	if o.Address.IsMulticast() {
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

const (
	// burstsASecond makes a burst of what comes in 10 ms.
	burstsASecond = 100
	// maxHeaders is what a frame has besides the IP packet: Ethernet and one VLAN
	// tag.
	maxHeaders = 18
)

// resolveRate gives a rate its burst: what comes in 10 ms, and at least one packet
// of the largest size, or no packet would ever pass.
func resolveRate(rate rules.Rate, mtu int) loader.Rate {
	out := loader.Rate{Packets: rate.Packets, Bits: rate.Bits, Burst: rate.Burst}
	switch {
	case rate.Burst != 0:
	case rate.Packets != 0:
		out.Burst = max(1, rate.Packets/burstsASecond)
	case rate.Bits != 0:
		out.Burst = max(uint64(mtu+maxHeaders), rate.Bits/8/burstsASecond)
	}
	return out
}

func family(is4 bool) string {
	if is4 {
		return "IPv4"
	}
	return "IPv6"
}
