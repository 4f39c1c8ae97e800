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

	known map[string]ebpf.MapID // by ids
}

// ids returns the id of each map by its name.
func (m *mapSet) ids() (map[string]ebpf.MapID, error) {
	if m.known != nil {
		return m.known, nil
	}
	ids := map[string]ebpf.MapID{}
	for name, of := range m.byName() {
		id, err := mapID(of)
		if err != nil {
			return nil, fmt.Errorf("map %s: %w", name, err)
		}
		ids[name] = id
	}
	m.known = ids
	return ids, nil
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

// newMaps creates the maps, unpinned.
func newMaps(opts Options) (_ *mapSet, err error) {
	specs, err := opts.definitions.mapSpecs(opts.MaxRules, opts.MaxOutputs)
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
