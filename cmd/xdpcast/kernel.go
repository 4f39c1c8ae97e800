package main

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"github.com/urfave/cli/v2"

	"xdpcast/pkg/control"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
	"xdpcast/pkg/rules"
)

// orKernel returns what the daemon says or, while none runs, what the pinned maps
// say by themselves.
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
	in, err := r.Rules()
	if err != nil {
		return control.Stats{}, err
	}
	inputs := map[string]loader.Input{}
	for _, rule := range in {
		inputs[rule.Name] = rule.In
	}
	counted, err := r.Stats()
	if err != nil {
		return control.Stats{}, err
	}
	s := control.Stats{
		Time: now, Rules: []control.RuleStatus{}, Passed: control.Counter(counted.Passed),
		Drops: kernelDrops(counted.Drops), TransmitDrops: []control.TransmitDrop{},
	}
	for _, rule := range counted.Rules {
		s.Rules = append(s.Rules, kernelRule(rule, inputs[rule.Name], now))
	}
	slices.SortFunc(s.Rules, func(a, b control.RuleStatus) int { return cmp.Compare(a.Name, b.Name) })
	for _, p := range counted.Ports {
		if n := p.TransmitDrops + p.RedirectRefused; n > 0 {
			s.TransmitDrops = append(s.TransmitDrops, control.TransmitDrop{Interface: interfaceName(p.Index), Reason: "device", Packets: n})
		}
	}
	return s, nil
}

func kernelRule(rule loader.RuleStats, in loader.Input, now time.Time) control.RuleStatus {
	input := rules.Input{Interface: interfaceName(in.Index), Address: in.Group, Port: in.Port, Source: in.Source}
	status := control.RuleStatus{
		Rule: control.Rule{Name: rule.Name, In: input.String()}, ID: rule.ID, State: control.StateActive, UsedPath: "kernel",
		Matched: control.Counter(rule.Matched), Drops: kernelDrops(rule.Drops),
	}
	if rule.LastSeen >= 0 {
		at := now.Add(-rule.LastSeen)
		status.LastSeen = &at
	}
	for slot, o := range rule.Outputs {
		out := control.OutputStatus{
			Slot: slot, Output: kernelOutput(o.Rule).String(), State: control.StateActive,
			Sent: control.Counter(o.Sent), Drops: kernelDrops(o.Drops),
		}
		if !o.Rule.Ready {
			out.State = control.StatePending
		}
		status.Out = append(status.Out, out.Output)
		status.Outputs = append(status.Outputs, out)
	}
	return status
}

// kernelOutput writes a resolved output in the grammar of rules.
func kernelOutput(o loader.Output) rules.Output {
	out := rules.Output{Interface: interfaceName(o.Index), Address: o.Dst, Port: o.DstPort}
	out.Policy.Source, out.Policy.SourcePort = rules.SourceKeep, o.SrcPort
	if o.Src.IsValid() {
		out.Policy.Source, out.Policy.SourceAddr = rules.SourceAddress, o.Src
	}
	switch o.TTLMode {
	case packet.TTLDecrement:
		out.Policy.TTL = rules.TTLDecrement
	case packet.TTLSet:
		out.Policy.TTL, out.Policy.TTLValue = rules.TTLSet, o.TTL
	}
	if o.SetDSCP {
		out.Policy.DSCP, out.Policy.DSCPValue = rules.DSCPSet, o.DSCP
	}
	if o.ZeroChecksum {
		out.Policy.Checksum = rules.ChecksumZero
	}
	return out
}

func kernelDrops(counted map[loader.Reason]loader.Counter) []control.Drop {
	all := make([]control.Drop, 0, len(counted))
	for reason, c := range counted {
		all = append(all, control.Drop{Reason: reason.String(), Counter: control.Counter(c)})
	}
	slices.SortFunc(all, func(a, b control.Drop) int { return cmp.Compare(a.Reason, b.Reason) })
	return all
}

func interfaceName(index int) string {
	i, err := net.InterfaceByIndex(index)
	if err != nil {
		return fmt.Sprintf("if%d", index)
	}
	return i.Name
}
