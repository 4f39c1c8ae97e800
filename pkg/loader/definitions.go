package loader

import (
	"fmt"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
)

// definitions parses each object of this binary once: that takes longer than most of what Open does besides, and no
// packet of the fanout path is relayed meanwhile. The zero value has parsed none; nil parses each time.
type definitions struct{ relayed, transmitted *ebpf.CollectionSpec }

// relay returns a copy of the relay object's spec.
func (d *definitions) relay() (*ebpf.CollectionSpec, error) {
	if d == nil {
		return bpf.LoadRelay()
	}
	return once(&d.relayed, bpf.LoadRelay)
}

// transmit returns a copy of the transmit object's spec.
func (d *definitions) transmit() (*ebpf.CollectionSpec, error) {
	if d == nil {
		return bpf.LoadTransmit()
	}
	return once(&d.transmitted, bpf.LoadTransmit)
}

func once(parsed **ebpf.CollectionSpec, load func() (*ebpf.CollectionSpec, error)) (_ *ebpf.CollectionSpec, err error) {
	if *parsed == nil {
		if *parsed, err = load(); err != nil {
			return nil, err
		}
	}
	return (*parsed).Copy(), nil
}

// forget frees the memory, megabytes, which only Open needs.
func (d *definitions) forget() { *d = definitions{} }

// mapSpecs returns the specs of all maps, with their configured sizes.
func (d *definitions) mapSpecs(maxRules, maxOutputs uint32) (map[string]*ebpf.MapSpec, error) {
	specs := map[string]*ebpf.MapSpec{}
	for _, load := range []func() (*ebpf.CollectionSpec, error){d.transmit, d.relay} {
		spec, err := load()
		if err != nil {
			return nil, fmt.Errorf("read map definitions: %w", err)
		}
		for name, m := range spec.Maps {
			specs[name] = m
		}
	}
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return nil, fmt.Errorf("number of CPUs: %w", err)
	}
	specs[bpf.RelayMapCpus].MaxEntries = uint32(cpus)
	specs[bpf.RelayMapRules].MaxEntries = maxRules
	specs[bpf.RelayMapRuleStats].MaxEntries = maxRules
	specs[bpf.RelayMapShortcuts].MaxEntries = shortcutSlots(maxRules)
	specs[bpf.RelayMapOutputs].MaxEntries = maxOutputs
	specs[bpf.RelayMapOutputStats].MaxEntries = maxOutputs
	specs[bpf.RelayMapBroadcast].MaxEntries = maxOutputs
	specs[bpf.RelayMapCopies].MaxEntries = maxOutputs
	specs[bpf.RelayMapTurns].MaxEntries = maxOutputs
	specs[bpf.RelayMapPolicers].MaxEntries = maxRules + maxOutputs
	specs[bpf.RelayMapUserStats].MaxEntries = accountCells(maxRules, maxOutputs)
	// A drop for which there is no room here would be missing from its rule's sum.
	specs[bpf.RelayMapRuleDrops].MaxEntries = max(specs[bpf.RelayMapRuleDrops].MaxEntries, 2*(maxRules+maxOutputs))
	return specs, nil
}
