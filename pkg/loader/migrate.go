package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
)

// Pinned state of another schema is migrated in three steps, of which packets see only the last:
//
//  1. Maps with another layout are built in the directory pinMigrating from the old ones.
//  2. The directory is renamed to pinMigrated, which commits the migration. Its maps are moved over
//     the old ones; any process that finds the directory resumes there.
//  3. The state now has this schema, while the interfaces run the other release's programs on its
//     maps. Adopting it is an ordinary upgrade: see Upgrade.
const (
	pinMigrating = "migrating"
	pinMigrated  = "migrated"
)

// migration is the state of the first step.
type migration struct {
	*Loader
	dir   string // pinMigrating
	old   *schema
	head  header
	have  map[string]*ebpf.Map // existing maps, by their current names
	fresh map[string]*ebpf.Map // new maps, by name
	// rules are the published rules by id, with their first output counters.
	rules map[uint32]ruleCounters
}

type ruleCounters struct{ outputs, first uint32 }

// migrate converts the pinned state to this release's schema. It changes nothing if it fails. The
// caller must finish the returned carry once no old program runs any longer; nil means there was
// nothing to do.
func (l *Loader) migrate() (_ *carry, err error) {
	dir := l.opts.PinDir
	if err := l.settleMigrated(); err != nil {
		return nil, err
	}
	head, err := l.header()
	if err != nil {
		return nil, err
	}
	if head.schema == bpf.Schema {
		return nil, nil
	}
	old := schemas[head.schema]
	if old == nil {
		return nil, schemaError(dir, head.schema)
	}
	if head.cookie != l.cookie {
		return nil, foreignError(dir)
	}
	started := time.Now()
	m := &migration{Loader: l, dir: filepath.Join(dir, pinMigrating), old: old, head: head,
		have: map[string]*ebpf.Map{}, fresh: map[string]*ebpf.Map{}, rules: map[uint32]ruleCounters{}}
	// Each map keeps an open file descriptor until the counters are carried over.
	counters, err := m.build()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("migrate pinned state %s from schema %d to %d: %w", dir, head.schema, bpf.Schema, err), m.close(), removePins(m.dir))
	}
	counters.done = m.close
	if err := l.opts.step("built"); err != nil {
		return nil, errors.Join(err, m.close())
	}
	if err := os.Rename(m.dir, filepath.Join(dir, pinMigrated)); err != nil {
		return nil, errors.Join(fmt.Errorf("publish migrated state: %w", err), m.close(), removePins(m.dir))
	}
	if err := l.settleMigrated(); err != nil {
		return nil, errors.Join(err, m.close())
	}
	l.log.Info("pinned state migrated", "from", head.schema, "to", bpf.Schema, "took", time.Since(started).Round(time.Millisecond))
	return counters, nil
}

func (m *migration) close() error {
	var errs []error
	for _, maps := range []map[string]*ebpf.Map{m.have, m.fresh} {
		for _, of := range maps {
			errs = append(errs, of.Close())
		}
	}
	return errors.Join(errs...)
}

// header reads the start of map config, which is the same in every release.
func (l *Loader) header() (h header, err error) {
	path := filepath.Join(l.opts.PinDir, bpf.RelayMapConfig)
	config, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return h, pinError(path, err)
	}
	defer func() { err = errors.Join(err, config.Close()) }()
	raw, err := config.LookupBytes(uint32(0))
	if err != nil {
		return h, damaged(l.opts.PinDir, fmt.Errorf("map config: %w", err))
	}
	if h, err = readHeader(raw); err != nil {
		return h, damaged(l.opts.PinDir, err)
	}
	return h, nil
}

// anew says whether a map of the old schema must be rebuilt.
func (m *migration) anew(name string) bool { return slices.Contains(m.old.anew, name) }

// build creates the maps with another layout in a directory of their own.
func (m *migration) build() (_ *carry, err error) {
	specs, err := (*definitions)(nil).mapSpecs(m.head.maxRules, m.head.maxOutputs)
	if err != nil {
		return nil, err
	}
	if err := os.Mkdir(m.dir, 0o700); err != nil {
		return nil, fmt.Errorf("make pin directory: %w", err)
	}
	for name := range (&mapSet{}).slots() {
		if err := m.open(name, specs[name]); err != nil {
			return nil, fmt.Errorf("map %s: %w", name, err)
		}
	}
	if err := m.copyConfig(); err != nil {
		return nil, fmt.Errorf("map %s: %w", bpf.RelayMapConfig, err)
	}
	if err := m.copyOutputs(); err != nil {
		return nil, fmt.Errorf("map %s: %w", bpf.RelayMapOutputs, err)
	}
	for kind := range tableKinds {
		if err := m.convertTable(kind); err != nil {
			return nil, fmt.Errorf("flow table %s: %w", tableNames[kind].pin, err)
		}
	}
	if err := m.findCounters(); err != nil {
		return nil, err
	}
	counters, err := m.carryCounters()
	if err != nil {
		return nil, err
	}
	if err := counters.copy(); err != nil {
		return nil, err
	}
	for name, fresh := range m.fresh {
		if err := pinClone(fresh, filepath.Join(m.dir, name)); err != nil {
			return nil, err
		}
	}
	return counters, nil
}

// pinClone pins a clone of a map, so that the map itself does not record the path.
func pinClone(m *ebpf.Map, path string) error {
	clone, err := m.Clone()
	if err != nil {
		return fmt.Errorf("pin %s: %w", path, err)
	}
	if err := clone.Pin(path); err != nil {
		return errors.Join(fmt.Errorf("pin %s: %w", path, err), clone.Close())
	}
	return clone.Close()
}

// open opens and checks the old map of a name, and creates the new one if needed.
func (m *migration) open(name string, spec *ebpf.MapSpec) (err error) {
	then := name
	if before, ok := m.old.then[name]; ok {
		then = before
	}
	pin := filepath.Join(m.opts.PinDir, then)
	m.have[name], err = ebpf.LoadPinnedMap(pin, nil)
	switch {
	case errors.Is(err, os.ErrNotExist):
		delete(m.have, name) // the old release had none
		if m.anew(name) || m.old.then[name] != "" {
			return damaged(m.opts.PinDir, fmt.Errorf("pin %s is missing", pin))
		}
	case err != nil:
		return fmt.Errorf("open pin %s: %w", pin, err)
	case !m.anew(name):
		if err := fits(m.have[name], spec); err != nil {
			return damaged(m.opts.PinDir, err)
		}
		return nil
	}
	if m.fresh[name], err = ebpf.NewMap(spec); err != nil {
		return fmt.Errorf("make: %w", err)
	}
	return nil
}

// copyConfig copies the config. The control loop sets new fields again; the shortcuts are empty.
func (m *migration) copyConfig() error {
	raw, err := m.have[bpf.RelayMapConfig].LookupBytes(uint32(0))
	if err != nil {
		return err
	}
	config := make([]bpf.RelayConfig, 1)
	copy(bytesOf(config), raw)
	config[0].Schema, config[0].ShortcutShift = bpf.Schema, 0
	return m.fresh[bpf.RelayMapConfig].Put(uint32(0), &config[0])
}

// copyOutputs copies the outputs, whose entries have the same layout.
func (m *migration) copyOutputs() error {
	from, to := m.have[bpf.RelayMapOutputs], m.fresh[bpf.RelayMapOutputs]
	if from.ValueSize() != to.ValueSize() || from.MaxEntries() != to.MaxEntries() {
		return damaged(m.opts.PinDir, fmt.Errorf("%d entries of %d bytes, want %d of %d", from.MaxEntries(), from.ValueSize(), to.MaxEntries(), to.ValueSize()))
	}
	values, err := readArray[bpf.RelayOutput](from, int(from.MaxEntries()))
	if err != nil {
		return err
	}
	keys := make([]uint32, len(values))
	for i := range keys {
		keys[i] = uint32(i)
	}
	return putAll(to, keys, values)
}

// convertTable builds the flow table of a kind from the current old one.
func (m *migration) convertTable(kind tableKind) (err error) {
	outer := m.have[tableNames[kind].outer]
	old, err := openTable(outer, tablePin(m.opts.PinDir, kind), true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, old.Close()) }()
	if int(old.ValueSize()) != m.old.flow {
		return damaged(m.opts.PinDir, fmt.Errorf("entries have %d bytes, not %d", old.ValueSize(), m.old.flow))
	}
	keys, values, err := m.readFlows(old)
	if err != nil {
		return err
	}
	table, err := m.emptyTable(kind, len(keys))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, table.Close()) }()
	for i := range keys {
		if err := table.Put(keys[i], &values[i]); err != nil {
			return fmt.Errorf("fill flow table: %w", err)
		}
	}
	if err := m.fresh[tableNames[kind].outer].Put(uint32(0), table); err != nil {
		return fmt.Errorf("set flow table: %w", err)
	}
	return pinClone(table, filepath.Join(m.dir, tableNames[kind].pin))
}

// readFlows reads the entries of an old flow table. Keys are the same in all schemas.
func (m *migration) readFlows(table *ebpf.Map) (keys [][]byte, values []bpf.RelayFlow, err error) {
	key, value := make([]byte, table.KeySize()), make([]byte, table.ValueSize())
	iter := table.Iterate()
	for iter.Next(&key, &value) {
		entry := m.old.flowOf(value)
		keys, values = append(keys, slices.Clone(key)), append(values, entry)
		if entry.Outputs > 0 {
			m.rules[entry.Rule] = ruleCounters{outputs: uint32(entry.Outputs), first: entry.FirstOutput}
		}
	}
	return keys, values, iter.Err()
}

// findCounters finds the counters of the rules' outputs, which the first output names.
func (m *migration) findCounters() error {
	outputs := m.fresh[bpf.RelayMapOutputs]
	for id, r := range m.rules {
		var first bpf.RelayOutput
		if id >= m.head.maxRules {
			return damaged(m.opts.PinDir, fmt.Errorf("rule number %d of %d", id, m.head.maxRules))
		}
		if err := outputs.Lookup(r.first, &first); err != nil {
			return damaged(m.opts.PinDir, fmt.Errorf("rule number %d: output %d: %w", id, r.first, err))
		}
		if first.Stats >= m.head.maxOutputs {
			return damaged(m.opts.PinDir, fmt.Errorf("rule number %d: output counters %d of %d", id, first.Stats, m.head.maxOutputs))
		}
		r.first = first.Stats
		m.rules[id] = r
	}
	return nil
}

// settleMigrated is the second step, and resumes it after a process died there; it also removes
// what a process left that died in the first step. The map config moves last: until then the state
// has the old schema.
func (l *Loader) settleMigrated() error {
	dir := l.opts.PinDir
	migrated := filepath.Join(dir, pinMigrated)
	if err := removePins(filepath.Join(dir, pinMigrating)); err != nil {
		return err
	}
	if _, err := os.Lstat(filepath.Join(migrated, bpf.RelayMapConfig)); errors.Is(err, os.ErrNotExist) {
		return removePins(migrated) // all maps have moved
	}
	head, err := l.header()
	if err != nil && !errors.Is(err, ErrDamaged) {
		return err
	}
	if old := schemas[head.schema]; old != nil {
		for now, then := range old.then {
			if err := os.Rename(filepath.Join(dir, then), filepath.Join(dir, now)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("move migrated state: %w", err)
			}
		}
	}
	pins, err := pinFiles(migrated)
	if err != nil {
		return err
	}
	for _, name := range pins {
		if err := l.opts.step("move " + name); err != nil {
			return err
		}
		to := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
			return fmt.Errorf("move migrated state: %w", err)
		}
		if err := os.Rename(filepath.Join(migrated, name), to); err != nil {
			return fmt.Errorf("move migrated state: %w", err)
		}
	}
	return errors.Join(l.opts.step("moved"), removeOthers(dir), removePins(migrated))
}

// removeOthers removes pins that this release does not use, and those of tables about to be swapped
// in.
func removeOthers(dir string) error {
	known := map[string]bool{programsDir: true, linksDir: true, broadcastsDir: true, pinMigrated: true, pinBuilding: true}
	for name := range (&mapSet{}).slots() {
		known[name] = true
	}
	for kind := range tableKinds {
		known[tableNames[kind].pin] = true
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("look at pins: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if !known[e.Name()] {
			errs = append(errs, removePins(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// pinFiles lists the pins below a directory by relative path, the map config last.
func pinFiles(dir string) (names []string, err error) {
	err = filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err == nil && !e.IsDir() && path != filepath.Join(dir, bpf.RelayMapConfig) {
			names = append(names, strings.TrimPrefix(path, dir+string(filepath.Separator)))
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("look at migrated state: %w", err)
	}
	return append(names, bpf.RelayMapConfig), nil
}
