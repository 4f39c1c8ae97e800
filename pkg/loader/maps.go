package loader

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
)

// Names of the pins of the flow tables in force, which have no name of their own
// in the object.
const (
	pinFlows4 = "flows4"
	pinFlows6 = "flows6"
)

// mapSet is all maps that the programs share.
type mapSet struct {
	bpf.RelayMaps
	bpf.TransmitMaps
}

// Close closes the file descriptors.
func (m *mapSet) Close() error {
	return errors.Join(m.RelayMaps.Close(), m.TransmitMaps.Close())
}

// slots returns where each map is held, by its name in the object, which is also
// the name of its pin.
func (m *mapSet) slots() map[string]**ebpf.Map {
	return map[string]**ebpf.Map{
		bpf.RelayMapConfig:       &m.Config,
		bpf.RelayMapFlowTables4:  &m.FlowTables4,
		bpf.RelayMapFlowTables6:  &m.FlowTables6,
		bpf.RelayMapRules:        &m.Rules,
		bpf.RelayMapOutputs:      &m.Outputs,
		bpf.RelayMapPorts:        &m.Ports,
		bpf.RelayMapFanout:       &m.Fanout,
		bpf.RelayMapCopies:       &m.Copies,
		bpf.RelayMapTurns:        &m.Turns,
		bpf.RelayMapRuleStats:    &m.RuleStats,
		bpf.RelayMapOutputStats:  &m.OutputStats,
		bpf.RelayMapDrops:        &m.Drops,
		bpf.RelayMapPassed:       &m.Passed,
		bpf.RelayMapRuleDrops:    &m.RuleDrops,
		bpf.RelayMapQueriers:     &m.Queriers,
		bpf.TransmitMapPortStats: &m.PortStats,
		bpf.TransmitMapPortRows:  &m.PortRows,
	}
}

func (m *mapSet) byName() map[string]*ebpf.Map {
	all := map[string]*ebpf.Map{}
	for name, slot := range m.slots() {
		all[name] = *slot
	}
	return all
}

// mapSpecs returns the specs of all maps, with the flexible sizes set.
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
	specs[bpf.RelayMapRules].MaxEntries = maxRules
	specs[bpf.RelayMapRuleStats].MaxEntries = maxRules
	specs[bpf.RelayMapOutputs].MaxEntries = maxOutputs
	specs[bpf.RelayMapOutputStats].MaxEntries = maxOutputs
	specs[bpf.RelayMapFanout].MaxEntries = maxOutputs
	specs[bpf.RelayMapCopies].MaxEntries = maxOutputs
	specs[bpf.RelayMapTurns].MaxEntries = maxOutputs
	return specs, nil
}

// newMaps makes the maps, unpinned.
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

// firstTables makes empty flow tables and puts them into force.
func (l *Loader) firstTables() (err error) {
	if l.table4, err = l.newTable(bpf.RelayMapFlowTables4, nil); err != nil {
		return err
	}
	if l.table6, err = l.newTable(bpf.RelayMapFlowTables6, nil); err != nil {
		return err
	}
	if err := l.maps.FlowTables4.Put(uint32(0), l.table4); err != nil {
		return fmt.Errorf("set flow table: %w", err)
	}
	if err := l.maps.FlowTables6.Put(uint32(0), l.table6); err != nil {
		return fmt.Errorf("set flow table: %w", err)
	}
	return nil
}

// minTable is the fewest entries that a flow table has room for.
const minTable = 1024

// newTable makes a flow table for flows, not in force, with room to grow.
func (l *Loader) newTable(outer string, flows []flowEntry) (_ *ebpf.Map, err error) {
	spec := l.specs[outer].InnerMap.Copy()
	spec.Name = outer[:len("flow_table")] + outer[len(outer)-1:]
	for spec.MaxEntries = minTable; int(spec.MaxEntries) < 2*len(flows); {
		spec.MaxEntries *= 2
	}
	table, err := ebpf.NewMap(spec)
	if err != nil {
		return nil, fmt.Errorf("make flow table: %w", err)
	}
	for _, f := range flows {
		if err := table.Update(f.key, &f.value, ebpf.UpdateNoExist); err != nil {
			return nil, errors.Join(fmt.Errorf("fill flow table: %w", err), table.Close())
		}
	}
	return table, nil
}
