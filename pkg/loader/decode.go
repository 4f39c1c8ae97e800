package loader

import (
	"fmt"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
	"xdpcast/pkg/flow"
)

// referents are the rules and outputs that flow entries refer to by index.
type referents struct {
	rules    []bpf.RelayRule
	outputs  []bpf.RelayOutput
	streams  []bpf.RelayStream
	policers *ebpf.Map
}

// readReferents reads the rules and outputs that the flows refer to, as far as they exist.
func readReferents(m *mapSet, flows []flowEntry) (p referents, err error) {
	rules, outputs, streams := 0, 0, 0
	for i := range flows {
		f := &flows[i].value
		rules, outputs = max(rules, int(f.Rule)+1), max(outputs, int(f.FirstOutput)+int(f.Outputs))
		if f.Stream != 0 {
			streams = max(streams, int(f.Stream)+1)
		}
	}
	if p.rules, err = readArray[bpf.RelayRule](m.Rules, rules); err != nil {
		return p, fmt.Errorf("read map rules: %w", err)
	}
	if p.outputs, err = readArray[bpf.RelayOutput](m.Outputs, outputs); err != nil {
		return p, fmt.Errorf("read map outputs: %w", err)
	}
	if p.streams, err = readArray[bpf.RelayStream](m.Streams, streams); err != nil {
		return p, fmt.Errorf("read map streams: %w", err)
	}
	p.policers = m.Policers
	return p, nil
}

// entry makes a rule from a flow entry and its referents.
func (p *referents) entry(f flowEntry) (*entry, error) {
	value := &f.value
	if int(value.Rule) >= len(p.rules) {
		return nil, fmt.Errorf("rule number %d: %w", value.Rule, ebpf.ErrKeyNotExist)
	}
	row := &p.rules[value.Rule]
	name, err := decodeName(row.Name)
	if err != nil {
		return nil, fmt.Errorf("rule number %d: %w", value.Rule, err)
	}
	e := &entry{rule: &flow.Flow{Name: name, In: f.in, Except: f.except}, id: value.Rule, first: value.FirstOutput, firstStats: row.FirstStats, row: value.Device, sockets: value.Sockets}
	if err := decodeFlow(e.rule, value); err != nil {
		return nil, fmt.Errorf("rule %s: %w", name, err)
	}
	if err := p.streamOf(e, value); err != nil {
		return nil, fmt.Errorf("rule %s: %w", name, err)
	}
	if e.rule.Rate, err = p.rate(value.Rule, value.Flags&uint16(bpf.RelayFlowFlagFLOW_POLICED) != 0); err != nil {
		return nil, fmt.Errorf("rule %s: %w", name, err)
	}
	e.rule.Out = make([]flow.Output, 0, value.Outputs)
	for slot := range uint32(value.Outputs) {
		o, stats, err := p.output(value.FirstOutput, slot)
		if err != nil {
			return nil, fmt.Errorf("rule %s: output %d: %w", name, slot, err)
		}
		if slot == 0 {
			// The description may be older than the flow entry.
			e.firstStats = stats
		}
		e.rule.Out = append(e.rule.Out, o)
	}
	if err := e.rule.Check(); err != nil {
		return nil, fmt.Errorf("rule %s: %w", name, err)
	}
	return e, nil
}

// describes says whether the row of an entry describes the entry's own counters.
func (p *referents) describes(e *entry) bool { return p.rules[e.id].FirstStats == e.firstStats }

// output is the output of a slot, with the index of its counters.
func (p *referents) output(first, slot uint32) (o flow.Output, stats uint32, err error) {
	if int(first)+int(slot) >= len(p.outputs) {
		return o, 0, ebpf.ErrKeyNotExist
	}
	row := &p.outputs[first+slot]
	if o, err = decodeOutput(row); err != nil {
		return o, 0, err
	}
	o.Rate, err = p.rate(row.Policer, row.Flags&uint16(bpf.RelayOutputFlagOUTPUT_POLICED) != 0)
	return o, row.Stats, err
}

func (p *referents) rate(policer uint32, policed bool) (flow.Rate, error) {
	if !policed {
		return flow.Rate{}, nil
	}
	var row bpf.RelayPolicer
	if err := p.policers.Lookup(policer, &row); err != nil {
		return flow.Rate{}, fmt.Errorf("policer %d: %w", policer, err)
	}
	return decodeRate(&row), nil
}
