package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"xdpcast/bpf"
)

// openMaps opens the pinned maps of a pin directory and rejects those that do not match this
// binary. known has been parsed already; it may be nil.
func openMaps(dir string, readOnly bool, known *definitions) (_ *mapSet, err error) {
	m := &mapSet{}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()
	opts := &ebpf.LoadPinOptions{ReadOnly: readOnly}
	if m.Config, err = ebpf.LoadPinnedMap(filepath.Join(dir, bpf.RelayMapConfig), opts); err != nil {
		return nil, pinError(filepath.Join(dir, bpf.RelayMapConfig), err)
	}
	config, err := m.config(dir)
	if err != nil {
		return nil, err
	}
	specs, err := known.mapSpecs(config.MaxRules, config.MaxOutputs)
	if err != nil {
		return nil, err
	}
	for name, slot := range m.slots() {
		if *slot == nil {
			if *slot, err = ebpf.LoadPinnedMap(filepath.Join(dir, name), opts); err != nil {
				return nil, pinError(filepath.Join(dir, name), err)
			}
		}
		if err := fits(*slot, specs[name]); err != nil {
			return nil, damaged(dir, fmt.Errorf("map %s: %w", name, err))
		}
	}
	return m, nil
}

// pinError names the pin that cannot be opened. If one is missing, the others are useless.
func pinError(path string, err error) error {
	if errors.Is(err, os.ErrNotExist) {
		dir := filepath.Dir(path)
		if base := filepath.Base(dir); base == programsDir || base == linksDir {
			dir = filepath.Dir(dir)
		}
		return damaged(dir, fmt.Errorf("pin %s is missing", path))
	}
	return fmt.Errorf("open pin %s: %w", path, err)
}

// config reads the map config of a pin directory.
func (m *mapSet) config(dir string) (config bpf.RelayConfig, err error) {
	raw, err := m.Config.LookupBytes(uint32(0))
	if err != nil {
		return config, damaged(dir, fmt.Errorf("map config: %w", err))
	}
	head, err := readHeader(raw)
	if err != nil {
		return config, damaged(dir, err)
	}
	if head.schema != bpf.Schema {
		return config, schemaError(dir, head.schema)
	}
	if err := m.Config.Lookup(uint32(0), &config); err != nil {
		return config, damaged(dir, fmt.Errorf("map config: %w", err))
	}
	return config, nil
}

func fits(m *ebpf.Map, spec *ebpf.MapSpec) error {
	switch {
	case m.Type() != spec.Type:
		return fmt.Errorf("type is %s, not %s", m.Type(), spec.Type)
	case m.KeySize() != spec.KeySize:
		return fmt.Errorf("keys have %d bytes, not %d", m.KeySize(), spec.KeySize)
	case m.ValueSize() != spec.ValueSize:
		return fmt.Errorf("values have %d bytes, not %d", m.ValueSize(), spec.ValueSize)
	case m.MaxEntries() != spec.MaxEntries:
		return fmt.Errorf("%d entries, not %d", m.MaxEntries(), spec.MaxEntries)
	}
	return nil
}

// adopt takes over the state of an earlier process, and upgrades programs of another release.
func (l *Loader) adopt() (err error) {
	dir := l.opts.PinDir
	if l.maps, err = openMaps(dir, false, l.opts.definitions); err != nil {
		return err
	}
	// Left by a process that died right after publishing what it built.
	if err := os.Remove(filepath.Join(dir, pinBuilding)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("mark the pin directory as built: %w", err)
	}
	if err := l.adoptConfig(); err != nil {
		return err
	}
	if err := l.openAccount(); err != nil {
		return damaged(dir, err)
	}
	if err := l.adoptTables(); err != nil {
		return err
	}
	if err := l.adoptRules(); err != nil {
		return damaged(dir, err)
	}
	if err := l.openRouted(); err != nil {
		return err
	}
	if err := l.adoptShortcuts(); err != nil {
		return err
	}
	if err := l.adoptPrograms(); err != nil {
		return err
	}
	if err := l.Upgrade(); err != nil {
		return err
	}
	// What the kernel removed along with an interface while no process was running.
	for _, repaired := range l.Observe().Repaired {
		l.log.Info("pinned state", "repaired", repaired)
	}
	l.adopted = true
	l.log.Info("pinned state adopted", "dir", dir, "rules", len(l.rules), "interfaces", len(l.links))
	return nil
}

func (l *Loader) adoptConfig() error {
	config, err := l.maps.config(l.opts.PinDir)
	if err != nil {
		return err
	}
	if config.NetnsCookie != l.cookie {
		return foreignError(l.opts.PinDir)
	}
	l.own, l.ownMACs = config.Own, config.OwnMacs
	return l.adoptSteering(&config)
}

// adoptRules reads the rules back from the flow tables and the maps that they refer to, and
// validates everything: a pin is untrusted input.
func (l *Loader) adoptRules() error {
	l.resetAllocators()
	flows, err := l.tables.read()
	if err != nil {
		return err
	}
	pointed, err := readReferents(l.maps, flows)
	if err != nil {
		return err
	}
	for _, flow := range flows {
		e, err := pointed.entry(flow)
		if err != nil {
			return err
		}
		stale, err := l.dropHalfMoved(e, &pointed)
		if err != nil {
			return err
		}
		if stale {
			continue
		}
		if l.rules[e.rule.Name] != nil {
			return fmt.Errorf("rule %s (number %d) is there twice", e.rule.Name, e.id)
		}
		l.places.add(e)
		l.enter(e)
	}
	byID := make([]*entry, l.maps.Rules.MaxEntries())
	var outputs, stats []extent
	for _, e := range l.rules {
		if byID[e.id] != nil {
			return fmt.Errorf("rule %s (number %d) is there twice", e.rule.Name, e.id)
		}
		byID[e.id] = e
		outputs = append(outputs, extent{e.first, uint32(len(e.rule.Out))})
		stats = append(stats, extent{e.firstStats, uint32(len(e.rule.Out))})
	}
	l.ids.adopt(func(id uint32) bool { return byID[id] != nil })
	if err := l.outputs.adopt(outputs); err != nil {
		return fmt.Errorf("outputs: %w", err)
	}
	if err := l.stats.adopt(stats); err != nil {
		return fmt.Errorf("output counters: %w", err)
	}
	if err := l.adoptDevices(); err != nil {
		return err
	}
	if err := l.adoptBroadcasts(); err != nil {
		return err
	}
	if err := l.adoptSockets(); err != nil {
		return err
	}
	if err := l.adoptStreams(); err != nil {
		return err
	}
	return l.clearOrphans(byID)
}

// dropHalfMoved resolves two entries of one rule name: a process died after publishing the moved
// entry and before removing the old one. Both are complete, each with its own row that describes it
// or, after a move between an exact table and a prefix table, with the same counters. If stale is
// true, e has been unpublished, whichever of the two it is: the other one received the rule's
// packets at that moment, and Sync turns it into the wanted one.
func (l *Loader) dropHalfMoved(e *entry, pointed *referents) (stale bool, err error) {
	other := l.rules[e.rule.Name] // from the same or an earlier table
	if other == nil || !pointed.describes(other) || !pointed.describes(e) {
		return false, nil
	}
	if other.id == e.id && (kindOf(other.rule.In) == kindOf(e.rule.In) || !e.rule.Continues(*other.rule)) {
		return false, nil
	}
	if err := l.unpublish(e); err != nil {
		return false, fmt.Errorf("unpublish rule %s: %w", e.rule.Name, err)
	}
	return true, nil
}

// adoptDevices restores the rows of map devices.
func (l *Loader) adoptDevices() (err error) {
	rows := map[uint32]bool{}
	for _, e := range l.rules {
		for _, o := range e.rule.Out {
			if !o.Ready {
				continue
			}
			if err := l.countDevice(o.Index); err != nil {
				return err
			}
			p := l.devices[o.Index]
			if len(e.rule.Out) > 1 {
				p.slotUsers++
				continue
			}
			if p.rowUsers > 0 && p.row != e.row {
				return fmt.Errorf("rule %s sends by row %d, others to the same interface by row %d", e.rule.Name, e.row, p.row)
			}
			if e.row >= l.maps.Devices.MaxEntries() {
				return fmt.Errorf("rule %s sends by row %d of %d", e.rule.Name, e.row, l.maps.Devices.MaxEntries())
			}
			p.row = e.row
			p.rowUsers++
			if rows[e.row] {
				continue
			}
			rows[e.row] = true
			if p.rowHasProg, err = l.rowHasProgram(p.row); err != nil {
				return err
			}
		}
	}
	l.deviceRows.adopt(has(rows))
	return l.clearDevices(rows)
}

// clearDevices clears the rows of devices that no rule uses, and deletes the counters of interfaces
// on which no rule sends.
func (l *Loader) clearDevices(inUse map[uint32]bool) error {
	for row := range l.maps.Devices.MaxEntries() {
		if inUse[row] {
			continue
		}
		if err := l.maps.Devices.Delete(row); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("clear row %d of devices: %w", row, err)
		}
		if err := l.maps.DeviceRows.Put(row, uint32(0)); err != nil {
			return fmt.Errorf("clear row %d of devices: %w", row, err)
		}
	}
	devices, err := readDevices(l.maps.DeviceStats)
	if err != nil {
		return err
	}
	for _, p := range devices {
		if l.devices[p.Index] != nil {
			continue
		}
		if err := l.maps.DeviceStats.Delete(uint32(p.Index)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("forget interface with index %d: %w", p.Index, err)
		}
	}
	return nil
}

func (l *Loader) rowHasProgram(row uint32) (bool, error) {
	var value bpf.RelayBpfDevmapVal
	err := l.maps.Devices.Lookup(row, &value)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return false, nil // the kernel cleared it when the interface went away
	}
	if err != nil {
		return false, fmt.Errorf("read row %d of devices: %w", row, err)
	}
	return value.BpfProg.Fd != 0, nil // a lookup returns the program's id here
}

// clearOrphans removes what a process left if it died between two steps, and updates descriptions
// that it did not get to write.
func (l *Loader) clearOrphans(byID []*entry) error {
	rows, err := readArray[bpf.RelayRule](l.maps.Rules, len(byID))
	if err != nil {
		return fmt.Errorf("read map rules: %w", err)
	}
	usedStats := make([]bool, l.maps.OutputStats.MaxEntries())
	for id, e := range byID {
		var want bpf.RelayRule
		if e != nil {
			want = encodeRule(e)
			for i := range e.rule.Out {
				usedStats[int(e.firstStats)+i] = true
			}
		}
		if rows[id] == want {
			continue
		}
		if err := l.maps.Rules.Put(uint32(id), &want); err != nil {
			return fmt.Errorf("describe rule number %d: %w", id, err)
		}
	}
	l.orphansDue = true
	if !l.opts.Later {
		if err := l.clearOrphanBroadcasts(); err != nil {
			return err
		}
	}
	l.adoptAccount(byID, usedStats)
	return l.dropStaleCounters(func(id uint32) bool { return int(id) >= len(byID) || byID[id] == nil },
		func(i uint32) bool { return int(i) >= len(usedStats) || !usedStats[i] })
}

// adoptPrograms opens the pinned programs and links.
func (l *Loader) adoptPrograms() (err error) {
	dir := l.opts.PinDir
	if l.relay, err = ebpf.LoadPinnedProgram(relayPin(dir), nil); err != nil {
		return pinError(relayPin(dir), err)
	}
	if l.egress, err = ebpf.LoadPinnedProgram(egressPin(dir), nil); err != nil {
		return pinError(egressPin(dir), err)
	}
	return l.adoptPinnedLinks()
}

func (l *Loader) adoptPinnedLinks() error {
	dir := filepath.Join(l.opts.PinDir, linksDir)
	links, err := os.ReadDir(dir)
	if err != nil {
		return pinError(dir, err)
	}
	var interfaces, inputs []string
	for _, f := range links {
		path := filepath.Join(dir, f.Name())
		switch name := f.Name(); {
		case strings.HasSuffix(name, "_next"):
			err = removePins(path) // a process died while pinning
		case name == pinDevmapXmit, name == pinRedirectErr, name == pinCPUEnqueue, name == pinCPUThread:
			var t link.Link
			if t, err = link.LoadPinnedLink(path, nil); err == nil {
				l.transmit[name] = t
			}
		case strings.HasPrefix(name, pinInterface):
			interfaces = append(interfaces, path)
		case strings.HasPrefix(name, pinTapped):
			inputs = append(inputs, path)
		}
		if err != nil {
			return fmt.Errorf("open pinned link: %w", err)
		}
	}
	l.attachTransmit(l.opts.PinDir)
	if err := l.adoptLinks(interfaces); err != nil {
		return err
	}
	if err := l.adoptTapped(inputs); err != nil {
		return err
	}
	return l.adoptQueriers()
}
