package loader

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
)

// mapSet is all maps shared by the programs.
type mapSet struct {
	bpf.RelayMaps
	bpf.TransmitMaps
}

// Close closes the file descriptors.
func (m *mapSet) Close() error {
	return errors.Join(m.RelayMaps.Close(), m.TransmitMaps.Close())
}

// slots returns the field of each map, by its name in the object, which is also its pin name.
func (m *mapSet) slots() map[string]**ebpf.Map {
	return map[string]**ebpf.Map{
		bpf.RelayMapConfig:         &m.Config,
		bpf.RelayMapFlowTables4:    &m.FlowTables4,
		bpf.RelayMapFlowTables6:    &m.FlowTables6,
		bpf.RelayMapPrefixTables4:  &m.PrefixTables4,
		bpf.RelayMapPrefixTables6:  &m.PrefixTables6,
		bpf.RelayMapShortcuts:      &m.Shortcuts,
		bpf.RelayMapMirror:         &m.Mirror,
		bpf.RelayMapRoutedUntil:    &m.RoutedUntil,
		bpf.RelayMapFragments:      &m.Fragments,
		bpf.RelayMapFragmentStats:  &m.FragmentStats,
		bpf.RelayMapOwnAddresses:   &m.OwnAddresses,
		bpf.RelayMapOwnMacs:        &m.OwnMacs,
		bpf.RelayMapGuardSlots:     &m.GuardSlots,
		bpf.RelayMapLoops:          &m.Loops,
		bpf.RelayMapPolicers:       &m.Policers,
		bpf.RelayMapStreams:        &m.Streams,
		bpf.RelayMapStreamStates:   &m.StreamStates,
		bpf.RelayMapStreamHealth:   &m.StreamHealth,
		bpf.RelayMapStreamWindows:  &m.StreamWindows,
		bpf.RelayMapXsks:           &m.Xsks,
		bpf.RelayMapCpus:           &m.Cpus,
		bpf.RelayMapRules:          &m.Rules,
		bpf.RelayMapOutputs:        &m.Outputs,
		bpf.RelayMapDevices:        &m.Devices,
		bpf.RelayMapBroadcast:      &m.Broadcast,
		bpf.RelayMapCopies:         &m.Copies,
		bpf.RelayMapGuesses:        &m.Guesses,
		bpf.RelayMapTurns:          &m.Turns,
		bpf.RelayMapRuleStats:      &m.RuleStats,
		bpf.RelayMapOutputStats:    &m.OutputStats,
		bpf.RelayMapDrops:          &m.Drops,
		bpf.RelayMapPassed:         &m.Passed,
		bpf.RelayMapKept:           &m.Kept,
		bpf.RelayMapRuleDrops:      &m.RuleDrops,
		bpf.RelayMapQueriers:       &m.Queriers,
		bpf.RelayMapUserStats:      &m.UserStats,
		bpf.TransmitMapDeviceStats: &m.DeviceStats,
		bpf.TransmitMapDeviceRows:  &m.DeviceRows,
		bpf.TransmitMapCpuDrops:    &m.CpuDrops,
		bpf.TransmitMapEgressDrops: &m.EgressDrops,
	}
}

func (m *mapSet) byName() map[string]*ebpf.Map {
	all := map[string]*ebpf.Map{}
	for name, slot := range m.slots() {
		all[name] = *slot
	}
	return all
}

// mapSpecs returns the specs of all maps, with their configured sizes.
func mapSpecs(maxRules, maxOutputs uint32) (map[string]*ebpf.MapSpec, error) {
	specs := map[string]*ebpf.MapSpec{}
	for _, load := range []func() (*ebpf.CollectionSpec, error){bpf.LoadTransmit, bpf.LoadRelay} {
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

// newMaps creates the maps, unpinned.
func newMaps(opts Options) (_ *mapSet, err error) {
	specs, err := mapSpecs(opts.MaxRules, opts.MaxOutputs)
	if err != nil {
		return nil, err
	}
	m := &mapSet{}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()
	for name, slot := range m.slots() {
		if *slot, err = ebpf.NewMap(specs[name]); err != nil {
			return nil, fmt.Errorf("make map %s: %w", name, err)
		}
	}
	return m, nil
}
