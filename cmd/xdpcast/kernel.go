package main

// The contents of the pinned maps while no daemon runs, converted to the daemon's types: for stats
// and status.

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/control"
	"xdpcast/internal/relay"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
	"xdpcast/pkg/rules"
)

// orKernel returns the daemon's statistics or, if none runs, those in the pinned maps.
func orKernel(c *cli.Context, stats control.Stats, err error, now time.Time) (control.Stats, error) {
	if !errors.Is(err, control.ErrNotRunning) {
		return stats, err
	}
	fromKernel, kernelErr := kernelStats(c.String("pin-dir"), now)
	if errors.Is(kernelErr, loader.ErrNotLoaded) {
		return stats, err
	}
	return fromKernel, withRootHint(kernelErr)
}

// kernelStats reads the rules and counters from the pinned maps.
func kernelStats(pinDir string, now time.Time) (_ control.Stats, err error) {
	r, err := loader.OpenReader(pinDir)
	if err != nil {
		return control.Stats{}, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	all, err := r.Rules()
	if err != nil {
		return control.Stats{}, err
	}
	byName := map[string]flow.Flow{}
	for _, rule := range all {
		byName[rule.Name] = rule
	}
	counted, err := r.Stats()
	if err != nil {
		return control.Stats{}, err
	}
	name := interfaceName
	if here, err := r.Here(); err != nil {
		return control.Stats{}, err
	} else if !here {
		name = numberOf // these indexes are other interfaces here
	}
	s := control.Stats{
		Time: now, Rules: []control.RuleStatus{}, Passed: control.Counter(counted.Passed),
		Drops: relay.Drops(counted.Drops), TransmitDrops: []control.TransmitDrop{}, ReceiveDrops: []control.ReceiveDrop{},
		PassedBroadcast: control.Counter(counted.PassedBroadcast), Fragments: relay.Fragments(counted.Fragments),
	}
	for _, rule := range counted.Rules {
		s.Rules = append(s.Rules, kernelRule(rule, byName[rule.Name], now, name))
	}
	slices.SortFunc(s.Rules, func(a, b control.RuleStatus) int { return cmp.Compare(a.Name, b.Name) })
	for _, p := range counted.Devices {
		if n := p.TransmitDrops + p.RedirectRefused; n > 0 {
			s.TransmitDrops = append(s.TransmitDrops, control.TransmitDrop{Interface: name(p.Index), Reason: "device", Packets: n})
		}
	}
	return s, nil
}

// kernelRule describes a rule from its state in the kernel. Without the daemon, a rule of the
// fanout path does nothing, and its outputs are not in the kernel.
func kernelRule(rule loader.RuleStats, as flow.Flow, now time.Time, name func(index int) string) control.RuleStatus {
	status := control.RuleStatus{
		Rule: control.Rule{Name: rule.Name, In: kernelInput(as, name)}, ID: rule.ID, State: control.StateActive, UsedPath: relay.PathName(as.Path),
		Matched: control.Counter(rule.Matched), Drops: relay.Drops(rule.Drops), Notes: relay.Notes(rule.Notes),
	}
	if rule.LastSeen >= 0 {
		at := now.Add(-rule.LastSeen)
		status.LastSeen = &at
	}
	for slot, o := range rule.Outputs {
		out := control.OutputStatus{
			Slot: slot, Output: kernelOutput(o.Rule, name).String(), State: control.StateActive,
			Sent: control.Counter(o.Sent), Drops: relay.Drops(o.Drops),
		}
		if !o.Rule.Ready {
			out.State = control.StatePending
		}
		status.Out = append(status.Out, out.Output)
		status.Outputs = append(status.Outputs, out)
	}
	return status
}

// kernelInput formats the input of a rule in the grammar of rules. The kernel's tables do not
// contain what is joined.
func kernelInput(r flow.Flow, name func(index int) string) string {
	in := rules.Input{
		Interface: name(r.In.Index), Address: r.In.Group, Len: uint8(r.In.Len), Port: r.In.Port, PortTo: r.In.PortTo, Source: r.In.Source,
		SourceLen: uint8(r.In.SourceLen), FromHost: r.In.FromHost,
		VLAN: rules.VLAN{ID: r.In.VLAN, Outer: r.In.OuterVLAN},
	}
	return rules.FormatInput(in, rules.Acceptance{
		ZeroChecksum: r.AllowNoChecksum, AllowLoop: r.AllowLoop, TwoWay: r.TwoWay && !r.AllowLoop, Unguarded: r.Unguarded, Local: r.Local, Broadcast: r.Broadcast, LocalControl: localControl(r),
		Extra: &rules.Extra{Except: r.Except, Rate: rules.Rate(r.Rate), Health: relay.HealthOf(r.Leg)},
	})
}

// localControl says whether a rule has a link-local group, which requires the option.
func localControl(r flow.Flow) bool {
	return r.In.Len == 0 && rules.LinkScope(r.In.Group) ||
		slices.ContainsFunc(r.Out, func(o flow.Output) bool { return o.DstLen == 0 && rules.LinkScope(o.Dst) })
}

// kernelOutput converts a resolved output to the grammar of rules.
func kernelOutput(o flow.Output, name func(index int) string) rules.Output {
	out := rules.Output{Interface: name(o.Index), Address: o.Dst, Len: o.DstLen, Port: o.DstPort}
	switch {
	case o.PortAdd && o.PortShift == 0:
		out.PortMode = rules.PortKeep
	case o.PortAdd:
		out.PortMode, out.PortShift = rules.PortAdd, o.PortShift
	}
	p := &out.Policy
	p.Source, p.SourcePort, p.MinTTL, p.Rate = rules.SourceKeep, o.SrcPort, o.MinTTL, rules.Rate(o.Rate)
	p.PCPSet, p.PCP = o.SetPCP, o.PCP
	p.Broadcast = o.DstMAC == packet.BroadcastMAC
	if o.Src.IsValid() {
		p.Source, p.SourceAddr = rules.SourceAddress, o.Src
	}
	switch o.TTLMode {
	case packet.TTLDecrement:
		p.TTL = rules.TTLDecrement
	case packet.TTLSet:
		p.TTL, p.TTLValue = rules.TTLSet, o.TTL
	}
	switch o.VLAN {
	case packet.VLANPop:
		p.VLAN = rules.VLANPop
	case packet.VLANSet:
		p.VLAN, p.VLANTags = rules.VLANSet, rules.VLAN{ID: o.VLANID, Outer: o.OuterVLAN}
	}
	if o.SetDSCP {
		p.DSCP, p.DSCPValue = rules.DSCPSet, o.DSCP
	}
	if o.ZeroChecksum {
		p.Checksum = rules.ChecksumZero
	}
	return out
}

func interfaceName(index int) string {
	i, err := net.InterfaceByIndex(index)
	if err != nil {
		return numberOf(index)
	}
	return i.Name
}

// numberOf is a placeholder for an interface whose name is unknown.
func numberOf(index int) string { return fmt.Sprintf("if%d", index) }
