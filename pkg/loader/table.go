package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
	"xdpcast/pkg/flow"
)

// tableKind is one of the flow tables, each for one shape of input: the exact ones first, then the
// prefixes of the same families in the same order.
type tableKind int

const (
	exact4 tableKind = iota
	exact6
	prefixes4
	prefixes6
	tableKinds
)

// tableNames has the names of each table: of the one-entry map that holds it, in the object and as
// a pin; of the current table as a pin; and of the table itself.
var tableNames = [tableKinds]struct{ outer, pin, name string }{
	exact4:    {bpf.RelayMapFlowTables4, "flows4", "flow_table4"},
	exact6:    {bpf.RelayMapFlowTables6, "flows6", "flow_table6"},
	prefixes4: {bpf.RelayMapPrefixTables4, "prefixes4", "prefix_table4"},
	prefixes6: {bpf.RelayMapPrefixTables6, "prefixes6", "prefix_table6"},
}

// tables are the current flow tables.
type tables [tableKinds]*ebpf.Map

// Close closes the file descriptors.
func (t *tables) Close() error {
	var errs []error
	for _, table := range t {
		errs = append(errs, table.Close())
	}
	*t = tables{}
	return errors.Join(errs...)
}

// openTables opens the current tables, to which the outer maps point.
func openTables(m *mapSet, dir string, readOnly bool) (t tables, err error) {
	for kind := range tableKinds {
		if t[kind], err = openTable(m.outer(kind), tablePin(dir, kind), readOnly); err != nil {
			return tables{}, errors.Join(fmt.Errorf("open flow table %s: %w", tableNames[kind].pin, err), t.Close())
		}
	}
	return t, nil
}

func tablePin(dir string, kind tableKind) string { return filepath.Join(dir, tableNames[kind].pin) }

// tableTries is how often openTable retries while a table is being swapped.
const tableTries = 100

// errNoTable: there is no current table, or it is not pinned.
var errNoTable = errors.New("the table is missing")

// openTable opens the current table: it is pinned at path or, during a swap or after a process died
// in one, at the next pin. Opening it by the id from the outer map would take CAP_SYS_ADMIN.
func openTable(outer *ebpf.Map, path string, readOnly bool) (*ebpf.Map, error) {
	var missing error
	lost := false // neither pin is the table's
	for range tableTries {
		var want uint32
		if err := outer.Lookup(uint32(0), &want); errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil, errNoTable
		} else if err != nil {
			return nil, err
		}
		lost = true
		for _, pin := range []string{path, nextPin(path)} {
			table, err := openByID(pin, ebpf.MapID(want), readOnly)
			if err == nil {
				return table, nil
			}
			missing = err
			lost = lost && (errors.Is(err, os.ErrNotExist) || errors.Is(err, errOtherMap))
		}
	}
	var table *ebpf.Map
	if err := outer.Lookup(uint32(0), &table); err != nil {
		err = fmt.Errorf("%w, and without CAP_SYS_ADMIN it cannot be opened by its id: %w", missing, err)
		if lost {
			err = fmt.Errorf("%w: %w", errNoTable, err)
		}
		return nil, err
	}
	return table, nil
}

var errOtherMap = errors.New("another map")

// openByID opens a pinned map that must have the given id. The returned map does not record its
// pin.
func openByID(path string, want ebpf.MapID, readOnly bool) (_ *ebpf.Map, err error) {
	m, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: readOnly})
	if err != nil {
		return nil, fmt.Errorf("open pin %s: %w", path, err)
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	if id, err := mapID(m); err != nil || id != want {
		return nil, errors.Join(fmt.Errorf("pin %s is of %w: id %d, not %d", path, errOtherMap, id, want), err)
	}
	return m.Clone()
}

func mapID(m *ebpf.Map) (ebpf.MapID, error) {
	info, err := m.Info()
	if err != nil {
		return 0, fmt.Errorf("map info: %w", err)
	}
	id, ok := info.ID()
	if !ok {
		return 0, fmt.Errorf("map ids are %w", ErrNotSupported)
	}
	return id, nil
}

// outer is the map that holds the table of a kind.
func (m *mapSet) outer(kind tableKind) *ebpf.Map {
	return [tableKinds]*ebpf.Map{m.FlowTables4, m.FlowTables6, m.PrefixTables4, m.PrefixTables6}[kind]
}

// kindOf is the table to which an input belongs.
func kindOf(in flow.Input) tableKind {
	kind := exact4
	if in.Group.Is6() {
		kind = exact6
	}
	if in.Len != 0 || in.BySource {
		kind += prefixes4 - exact4
	}
	return kind
}

// lookupOf is the lookup kind that finds an input, as bits of the IPv4 or the IPv6 lookups.
func lookupOf(in flow.Input) (kinds lookups) {
	var bit bpf.RelayLookupKind
	switch {
	case in.FromHost:
		return 0
	case takesBoth(in) && in.Port != 0:
		bit = bpf.RelayLookupKindLOOKUP_BOTH_PORT
	case takesBoth(in):
		bit = bpf.RelayLookupKindLOOKUP_BOTH
	case in.BySource && in.Port != 0:
		bit = bpf.RelayLookupKindLOOKUP_SOURCES_PORT
	case in.BySource:
		bit = bpf.RelayLookupKindLOOKUP_SOURCES
	case in.Source.IsValid() && in.Port != 0:
		bit = bpf.RelayLookupKindLOOKUP_SOURCE_PORT
	case in.Port != 0:
		bit = bpf.RelayLookupKindLOOKUP_PORT
	case in.Source.IsValid():
		bit = bpf.RelayLookupKindLOOKUP_SOURCE
	default:
		bit = bpf.RelayLookupKindLOOKUP_ANY
	}
	if in.Len != 0 && !in.BySource {
		bit <<= bpf.RelayLookupKindLOOKUP_PREFIXES
	}
	if in.Group.Is4() {
		return lookups(bit)
	}
	return lookups(bit) << 16
}

// lookups has the IPv4 lookup kinds in its lower half and the IPv6 ones in the upper.
type lookups uint32

// flowEntry is one entry of a flow table.
type flowEntry struct {
	in     flow.Input
	value  bpf.RelayFlow
	except []netip.Prefix // of a rule, see gather
	step   step           // of flows with takesBoth
	class  uint32         // with step
}

func (f *flowEntry) equal(other *flowEntry) bool {
	return f.in == other.in && f.value == other.value && slices.Equal(f.except, other.except) && f.step == other.step && f.class == other.class
}

// encodeKey returns a pointer to the key in its table of an input that has only one entry.
func encodeKey(in flow.Input) any { return (&flowEntry{in: in}).key() }

// key returns a pointer to the key of an entry in its table.
func (f *flowEntry) key() any {
	switch kindOf(f.in) {
	case exact4:
		key := f.exact4()
		return &key
	case exact6:
		key := f.exact6()
		return &key
	case prefixes4:
		key := f.prefix4()
		return &key
	default:
		key := f.prefix6()
		return &key
	}
}

func (f *flowEntry) exact4() bpf.RelayFlow4 { return exactKey4(f.in) }

func (f *flowEntry) exact6() bpf.RelayFlow6 { return exactKey6(f.in) }

const fromHost = uint16(bpf.RelayFlowFromFROM_HOST)

// from is the field of that name in an input's keys.
func from(in flow.Input) uint16 {
	if in.FromHost {
		return fromHost
	}
	return 0
}

func exactKey4(in flow.Input) bpf.RelayFlow4 {
	key := bpf.RelayFlow4{Ifindex: uint32(in.Index), Vlan: in.VLAN, OuterVlan: in.OuterVLAN, Port: in.Port, From: from(in), Group: in.Group.As4()}
	if in.Source.IsValid() {
		key.Source = in.Source.As4()
	}
	return key
}

func exactKey6(in flow.Input) bpf.RelayFlow6 {
	key := bpf.RelayFlow6{Ifindex: uint32(in.Index), Vlan: in.VLAN, OuterVlan: in.OuterVLAN, Port: in.Port, From: from(in), Group: in.Group.As16()}
	if in.Source.IsValid() {
		key.Source = in.Source.As16()
	}
	return key
}

// prefixBy says what the group of a prefix table's key holds, and how many bits of it are the prefix.
func (f *flowEntry) prefixBy() (by bpf.RelayPrefixBy, bits int) {
	switch {
	case f.step == classStep:
		return bpf.RelayPrefixByPREFIX_CLASS, f.in.SourceLen
	case f.step == inClassStep:
		return bpf.RelayPrefixByPREFIX_IN_CLASS, f.in.Len
	case f.in.BySource:
		return bpf.RelayPrefixByPREFIX_BY_SOURCE, f.in.SourceLen
	}
	return bpf.RelayPrefixByPREFIX_BY_GROUP, f.in.Len
}

func (f *flowEntry) prefix4() bpf.RelayPrefix4 {
	k := exactKey4(f.in)
	key := bpf.RelayPrefix4{Prefixlen: prefixExact4, Ifindex: k.Ifindex, Vlan: k.Vlan, OuterVlan: k.OuterVlan, Port: k.Port, By: k.From, Source: k.Source, Group: k.Group}
	by, bits := f.prefixBy()
	key.Prefixlen += uint32(bits)
	key.By |= uint16(by)
	switch by {
	case bpf.RelayPrefixByPREFIX_CLASS, bpf.RelayPrefixByPREFIX_BY_SOURCE:
		key.Source, key.Group = k.Group, k.Source
	case bpf.RelayPrefixByPREFIX_IN_CLASS:
		binary.NativeEndian.PutUint32(key.Source[:], f.class)
	}
	return key
}

func (f *flowEntry) prefix6() bpf.RelayPrefix6 {
	k := exactKey6(f.in)
	key := bpf.RelayPrefix6{Prefixlen: prefixExact6, Ifindex: k.Ifindex, Vlan: k.Vlan, OuterVlan: k.OuterVlan, Port: k.Port, By: k.From, Source: k.Source, Group: k.Group}
	by, bits := f.prefixBy()
	key.Prefixlen += uint32(bits)
	key.By |= uint16(by)
	switch by {
	case bpf.RelayPrefixByPREFIX_CLASS, bpf.RelayPrefixByPREFIX_BY_SOURCE:
		key.Source, key.Group = k.Group, k.Source
	case bpf.RelayPrefixByPREFIX_IN_CLASS:
		binary.NativeEndian.PutUint32(key.Source[:], f.class)
	}
	return key
}

// Bits of a prefix table's key before the group (PREFIX4_EXACT and PREFIX6_EXACT in
// bpf/include/abi.h).
const (
	prefixExact4 = 128
	prefixExact6 = 224
)

func decodeKey4(k *bpf.RelayFlow4) flow.Input {
	in := flow.Input{Index: int(k.Ifindex), VLAN: k.Vlan, OuterVLAN: k.OuterVlan, Port: k.Port, FromHost: k.From == fromHost, Group: netip.AddrFrom4(k.Group)}
	if k.Source != [4]byte{} {
		in.Source = netip.AddrFrom4(k.Source)
	}
	return in
}

func decodeKey6(k *bpf.RelayFlow6) flow.Input {
	in := flow.Input{Index: int(k.Ifindex), VLAN: k.Vlan, OuterVLAN: k.OuterVlan, Port: k.Port, FromHost: k.From == fromHost, Group: netip.AddrFrom16(k.Group)}
	if k.Source != [16]byte{} {
		in.Source = netip.AddrFrom16(k.Source)
	}
	return in
}

func decodePrefix4(k *bpf.RelayPrefix4) (f flowEntry) {
	exact := bpf.RelayFlow4{Ifindex: k.Ifindex, Vlan: k.Vlan, OuterVlan: k.OuterVlan, Port: k.Port, From: k.By & fromHost, Group: k.Group}
	bits := int(k.Prefixlen) - prefixExact4
	switch bpf.RelayPrefixBy(k.By &^ fromHost) {
	case bpf.RelayPrefixByPREFIX_CLASS, bpf.RelayPrefixByPREFIX_BY_SOURCE:
		exact.Group = k.Source
		f.in = decodeKey4(&exact)
		f.in.BySource, f.in.Source, f.in.SourceLen = true, netip.AddrFrom4(k.Group), bits
		if k.By&^fromHost == uint16(bpf.RelayPrefixByPREFIX_CLASS) {
			f.step = classStep
		}
		return f
	case bpf.RelayPrefixByPREFIX_IN_CLASS:
		f.step, f.class = inClassStep, binary.NativeEndian.Uint32(k.Source[:])
	default:
		exact.Source = k.Source
	}
	f.in = decodeKey4(&exact)
	f.in.Len = bits
	return f
}

func decodePrefix6(k *bpf.RelayPrefix6) (f flowEntry) {
	exact := bpf.RelayFlow6{Ifindex: k.Ifindex, Vlan: k.Vlan, OuterVlan: k.OuterVlan, Port: k.Port, From: k.By & fromHost, Group: k.Group}
	bits := int(k.Prefixlen) - prefixExact6
	switch bpf.RelayPrefixBy(k.By &^ fromHost) {
	case bpf.RelayPrefixByPREFIX_CLASS, bpf.RelayPrefixByPREFIX_BY_SOURCE:
		exact.Group = k.Source
		f.in = decodeKey6(&exact)
		f.in.BySource, f.in.Source, f.in.SourceLen = true, netip.AddrFrom16(k.Group), bits
		if k.By&^fromHost == uint16(bpf.RelayPrefixByPREFIX_CLASS) {
			f.step = classStep
		}
		return f
	case bpf.RelayPrefixByPREFIX_IN_CLASS:
		f.step, f.class = inClassStep, binary.NativeEndian.Uint32(k.Source[:])
	default:
		exact.Source = k.Source
	}
	f.in = decodeKey6(&exact)
	f.in.Len = bits
	return f
}

// read returns one entry for each rule of all tables, in the order of the tables, except that rules
// with several entries come last.
func (t *tables) read() ([]flowEntry, error) {
	var all []flowEntry
	for kind, table := range t {
		flows, err := readKind(tableKind(kind), table)
		if err != nil {
			return nil, err
		}
		all = append(all, flows...)
	}
	return gather(all), nil
}

// readKind returns all entries of a table.
func readKind(kind tableKind, table *ebpf.Map) (all []flowEntry, err error) {
	switch kind {
	case exact4:
		err = readTable(&all, table, func(k *bpf.RelayFlow4) flowEntry { return flowEntry{in: decodeKey4(k)} })
	case exact6:
		err = readTable(&all, table, func(k *bpf.RelayFlow6) flowEntry { return flowEntry{in: decodeKey6(k)} })
	case prefixes4:
		err = readTable(&all, table, decodePrefix4)
	default:
		err = readTable(&all, table, decodePrefix6)
	}
	return all, err
}

func readTable[K any](all *[]flowEntry, table *ebpf.Map, decode func(*K) flowEntry) error {
	keys, flows, err := readAll[K, bpf.RelayFlow](table)
	if err != nil {
		return fmt.Errorf("read flow table: %w", err)
	}
	for i := range keys {
		f := decode(&keys[i])
		f.value = flows[i]
		if f.step == classStep {
			f.class = f.value.Rule
		} else {
			f.in.MAC = f.value.InputMac
		}
		*all = append(*all, f)
	}
	return nil
}

// minTable is the smallest capacity of a flow table.
const minTable = 1024

// newTable creates an unpublished flow table with the given flows and room to grow.
func (l *Loader) newTable(kind tableKind, flows []flowEntry) (*ebpf.Map, error) {
	table, err := l.emptyTable(kind, len(flows))
	if err != nil {
		return nil, err
	}
	if err := fillTable(table, kind, flows); err != nil {
		return nil, errors.Join(fmt.Errorf("fill flow table: %w", err), table.Close())
	}
	return table, nil
}

// emptyTable creates a flow table with room for twice n entries.
func (l *Loader) emptyTable(kind tableKind, n int) (*ebpf.Map, error) {
	spec := l.specs[tableNames[kind].outer].InnerMap.Copy()
	spec.Name = tableNames[kind].name
	for spec.MaxEntries = minTable; int(spec.MaxEntries) < 2*n; {
		spec.MaxEntries *= 2
	}
	table, err := ebpf.NewMap(spec)
	if err != nil {
		return nil, fmt.Errorf("make flow table: %w", err)
	}
	return table, nil
}

func fillTable(table *ebpf.Map, kind tableKind, flows []flowEntry) error {
	switch kind {
	case exact4:
		return fill(table, flows, (*flowEntry).exact4)
	case exact6:
		return fill(table, flows, (*flowEntry).exact6)
	case prefixes4:
		return fill(table, flows, (*flowEntry).prefix4)
	default:
		return fill(table, flows, (*flowEntry).prefix6)
	}
}

func fill[K any](table *ebpf.Map, flows []flowEntry, encode func(*flowEntry) K) error {
	keys := make([]K, len(flows))
	values := make([]bpf.RelayFlow, len(flows))
	for i := range flows {
		keys[i], values[i] = encode(&flows[i]), flows[i].value
		if flows[i].step == classStep {
			values[i].Rule = flows[i].class
		}
	}
	return putAll(table, keys, values)
}

// putAll writes entries, in few system calls if the kernel supports batches.
func putAll[K, V any](m *ebpf.Map, keys []K, values []V) error {
	if len(keys) == 0 {
		return nil
	}
	_, err := m.BatchUpdate(keys, values, nil)
	if !errors.Is(err, ebpf.ErrNotSupported) {
		return err
	}
	for i := range keys {
		if err := m.Put(&keys[i], &values[i]); err != nil {
			return err
		}
	}
	return nil
}

// firstTables creates and publishes empty flow tables.
func (l *Loader) firstTables() (err error) {
	for kind := range tableKinds {
		if l.tables[kind], err = l.newTable(kind, nil); err != nil {
			return err
		}
		if err := l.maps.outer(kind).Put(uint32(0), l.tables[kind]); err != nil {
			return fmt.Errorf("set flow table: %w", err)
		}
	}
	return nil
}

// adoptTables opens the current flow tables, to which the outer maps point: the pins may be one
// swap behind.
func (l *Loader) adoptTables() (err error) {
	if l.tables, err = openTables(l.maps, l.opts.PinDir, false); err != nil {
		if errors.Is(err, errNoTable) {
			return damaged(l.opts.PinDir, err) // no other process swaps them: the lock is held
		}
		return err
	}
	for kind := range tableKinds {
		clone, err := l.tables[kind].Clone() // which may forget its pin
		if err == nil {
			err = errors.Join(repin(clone, tablePin(l.opts.PinDir, kind)), clone.Close())
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// putTable publishes a table. It pins it first, next to the current one, so the current table is
// always pinned.
func (l *Loader) putTable(kind tableKind, table *ebpf.Map) error {
	path := tablePin(l.opts.PinDir, kind)
	clone, err := table.Clone()
	if err != nil {
		return fmt.Errorf("swap flow table: %w", err)
	}
	defer clone.Close()
	if err := pinNext(clone, path); err != nil {
		return err
	}
	if err := l.maps.outer(kind).Put(uint32(0), table); err != nil {
		return errors.Join(fmt.Errorf("swap flow table: %w", err), os.Remove(nextPin(path)))
	}
	if err := os.Rename(nextPin(path), path); err != nil {
		return fmt.Errorf("pin %s: %w", path, err)
	}
	return nil
}
