package relay

import (
	"fmt"

	"xdpcast/pkg/control"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/membership"
	"xdpcast/pkg/packet"
	"xdpcast/pkg/rules"
)

// wantedRule is a rule that somebody wants, and what has become of it.
type wantedRule struct {
	rule   rules.Rule
	origin string

	state   string
	reason  string
	err     error  // why it is failed; nil otherwise
	logged  string // the states that the log was last told
	outputs []outputState
	// resolved is set while the rule is to be in the kernel.
	resolved *loader.Rule
}

// outputState is one output of a rule.
type outputState struct {
	state, reason string
}

func (w *wantedRule) pend(reason string) {
	w.state, w.reason = control.StatePending, reason
}

func (w *wantedRule) fail(err error) {
	w.state, w.reason, w.err = control.StateFailed, err.Error(), err
	w.resolved = nil
}

// resolve turns names into indexes and policies into addresses, as far as the
// interfaces allow now.
func (r *Relay) resolve(w *wantedRule) {
	w.state, w.reason, w.err, w.resolved = control.StateActive, "", nil, nil
	w.outputs = make([]outputState, len(w.rule.Out))
	for i := range w.outputs {
		w.outputs[i].state = control.StatePending
	}
	if err := unsupported(w.rule); err != nil {
		w.fail(err)
		return
	}
	in := r.interfaces[w.rule.In.Interface]
	if in == nil {
		w.pend(fmt.Sprintf("interface %s not found", w.rule.In.Interface))
		return
	}
	if !in.ethernet {
		w.fail(fmt.Errorf("interface %s has no Ethernet header, which the kernel path needs", in.name))
		return
	}
	if !w.rule.In.Multicast() && !isLocal(r.interfaces, w.rule.In.Address) {
		w.fail(fmt.Errorf("address %s is neither a multicast group nor an address of this host", w.rule.In.Address))
		return
	}
	if !in.up {
		w.pend(fmt.Sprintf("interface %s is down", in.name))
	}
	w.resolved = &loader.Rule{
		Name: w.rule.Name,
		In: loader.Input{
			Index: in.index, MAC: in.mac,
			Group: w.rule.In.Address, Source: w.rule.In.Source, Port: w.rule.In.Port,
		},
		Out: make([]loader.Output, len(w.rule.Out)),
	}
	for slot, o := range w.rule.Out {
		w.resolved.Out[slot] = resolvePolicy(o)
	}
}

// resolveOutputs completes the outputs, once it is known how the input is attached.
func (r *Relay) resolveOutputs(w *wantedRule, generic bool, features func(index int) loader.Features) {
	if generic && len(w.rule.Out) > 1 {
		w.fail(fmt.Errorf("interface %s runs XDP in generic mode, which supports one output a rule: the kernel's copies would share one buffer", w.rule.In.Interface))
		return
	}
	ready := 0
	for slot, o := range w.rule.Out {
		out := &w.resolved.Out[slot]
		reason := r.resolveOutput(o, out, generic, features)
		if reason == "" {
			out.Ready = true
			ready++
			w.outputs[slot] = outputState{state: control.StateActive}
			continue
		}
		w.outputs[slot] = outputState{state: control.StatePending, reason: reason}
		if w.reason == "" {
			w.reason = reason
		}
	}
	if ready == 0 {
		w.pend(w.reason)
	}
}

// resolveOutput fills in what depends on the interface, and returns why the output
// cannot send yet; "" when it can.
func (r *Relay) resolveOutput(o rules.Output, out *loader.Output, generic bool, features func(index int) loader.Features) string {
	i := r.interfaces[o.Interface]
	switch {
	case i == nil:
		return fmt.Sprintf("interface %s not found", o.Interface)
	case !i.ethernet:
		return fmt.Sprintf("interface %s has no Ethernet header, which the kernel path needs", o.Interface)
	}
	out.Index, out.MTU, out.SrcMAC = i.index, i.mtu, i.mac
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
	if f := features(i.index); !generic && f.Known && !f.Transmit {
		return fmt.Sprintf("interface %s does not send redirected frames (its driver says so; a veth needs generic receive offload at its peer: ethtool -K PEER gro on)", i.name)
	}
	return ""
}

// resolvePolicy turns what does not depend on the interface into a rewrite.
func resolvePolicy(o rules.Output) loader.Output {
	out := loader.Output{Rewrite: packet.Rewrite{
		DstMAC: packet.MulticastMAC(o.Address), Dst: o.Address, DstPort: o.Port,
		SrcPort:      o.Policy.SourcePort,
		SetDSCP:      o.Policy.DSCP == rules.DSCPSet,
		DSCP:         o.Policy.DSCPValue,
		ZeroChecksum: o.Policy.Checksum == rules.ChecksumZero,
	}}
	switch o.Policy.TTL {
	case rules.TTLDecrement:
		out.TTLMode = packet.TTLDecrement
	case rules.TTLSet:
		out.TTLMode, out.TTL = packet.TTLSet, o.Policy.TTLValue
	}
	if o.Policy.Source == rules.SourceAddress {
		out.Src = o.Policy.SourceAddr
	}
	return out
}

// unsupported says what of the rule model no path of this release carries.
func unsupported(rule rules.Rule) error {
	if rule.Path != rules.PathAuto && rule.Path != rules.PathKernel {
		return fmt.Errorf("path %s is not in this release: want auto or kernel", rule.Path)
	}
	for _, o := range rule.Out {
		if !o.Address.IsMulticast() {
			return fmt.Errorf("output %s: unicast destinations are not in this release: want a multicast group", o)
		}
	}
	return nil
}

// membershipOf returns what must be joined for a rule; false for a unicast input.
func (r *Relay) membershipOf(w *wantedRule) (membership.Membership, bool) {
	in := r.interfaces[w.rule.In.Interface]
	if in == nil || !w.rule.In.Multicast() {
		return membership.Membership{}, false
	}
	return membership.Membership{Interface: in.name, Index: in.index, Group: w.rule.In.Address, Source: w.rule.In.Source}, true
}

func family(is4 bool) string {
	if is4 {
		return "IPv4"
	}
	return "IPv6"
}
