package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
	"xdpcast/pkg/flow"
)

// broadcast is a devmap of rules with several outputs: a row for each ready output, all with the
// egress program. A copy's output does not depend on the row, so all rules with outputs on the same
// interfaces share one broadcast. In the kernel, the rows of the map broadcast hold it.
type broadcast struct {
	indexes []int // of the interfaces, in the order of the rows
	id      ebpf.MapID
	users   int // rules
}

// broadcastKey is the sorted interfaces of the ready outputs.
func broadcastKey(out []flow.Output) (key string, indexes []int) {
	for _, o := range out {
		if o.Ready {
			indexes = append(indexes, o.Index)
		}
	}
	slices.Sort(indexes)
	var b []byte
	for _, index := range indexes {
		b = binary.NativeEndian.AppendUint32(b, uint32(index))
	}
	return string(b), indexes
}

// openBroadcasts are the broadcasts that a Sync has to write into the map broadcast.
type openBroadcasts map[string]*ebpf.Map

func (o openBroadcasts) close() error {
	var errs []error
	for key, m := range o {
		errs = append(errs, m.Close())
		delete(o, key)
	}
	return errors.Join(errs...)
}

// useBroadcast counts a user of the broadcast for some outputs and returns its devmap, which stays
// in open.
func (l *Loader) useBroadcast(out []flow.Output, open openBroadcasts) (*ebpf.Map, error) {
	key, indexes := broadcastKey(out)
	f := l.broadcasts[key]
	devmap := open[key]
	var err error
	switch {
	case f == nil:
		if devmap, f, err = l.newBroadcast(indexes); err != nil {
			return nil, err
		}
		if err := l.pinBroadcast(devmap, f.id); err != nil {
			return nil, errors.Join(err, devmap.Close())
		}
		l.broadcasts[key], open[key] = f, devmap
	case devmap == nil:
		if devmap, err = l.openBroadcast(key, f); err != nil {
			return nil, err
		}
		open[key] = devmap
	}
	f.users++
	return devmap, nil
}

// releaseBroadcast is the inverse of useBroadcast.
func (l *Loader) releaseBroadcast(out []flow.Output) error {
	key, _ := broadcastKey(out)
	f := l.broadcasts[key]
	if f == nil {
		return nil
	}
	if f.users--; f.users > 0 {
		return nil
	}
	delete(l.broadcasts, key)
	return removePins(broadcastPin(l.opts.PinDir, f.id))
}

// pinBroadcast pins a devmap, so that it can be reopened: opening it by id requires CAP_SYS_ADMIN.
func (l *Loader) pinBroadcast(devmap *ebpf.Map, id ebpf.MapID) error {
	clone, err := devmap.Clone()
	if err != nil {
		return fmt.Errorf("pin devmap: %w", err)
	}
	defer clone.Close()
	if err := os.MkdirAll(filepath.Join(l.opts.PinDir, broadcastsDir), 0o700); err != nil {
		return fmt.Errorf("make pin directory: %w", err)
	}
	return repin(clone, broadcastPin(l.opts.PinDir, id))
}

// openDevmap opens the devmap of a broadcast in use. One without a pin, from an earlier release or
// because the pin was removed, is opened by its id or, without the capability, replaced in the rows
// of its rules.
func (l *Loader) openDevmap(key string, f *broadcast) (*ebpf.Map, error) {
	path := broadcastPin(l.opts.PinDir, f.id)
	devmap, err := openByID(path, f.id, false)
	if err == nil {
		return devmap, nil
	}
	if devmap, err = ebpf.NewMapFromID(f.id); err == nil {
		if err := l.pinBroadcast(devmap, f.id); err != nil {
			return nil, errors.Join(err, devmap.Close())
		}
		return devmap, nil
	}
	if !errors.Is(err, os.ErrPermission) {
		return nil, fmt.Errorf("open devmap: %w", err)
	}
	return l.replaceBroadcast(key, f)
}

// replaceBroadcast makes a new devmap for the rules of a broadcast. Each packet finds the old one
// or the new one.
func (l *Loader) replaceBroadcast(key string, f *broadcast) (*ebpf.Map, error) {
	devmap, fresh, err := l.newBroadcast(f.indexes)
	if err != nil {
		return nil, err
	}
	var rows batch[uint32]
	for _, e := range l.rules {
		if len(e.rule.Out) < 2 {
			continue
		}
		if of, _ := broadcastKey(e.rule.Out); of == key {
			rows.add(e.first, uint32(devmap.FD()))
		}
	}
	if err := errors.Join(l.pinBroadcast(devmap, fresh.id), rows.putRows(l.maps.Broadcast)); err != nil {
		return nil, errors.Join(err, devmap.Close())
	}
	f.id = fresh.id
	return devmap, nil
}

// sweepBroadcasts removes the pins of unused devmaps, left by a dead process.
func (l *Loader) sweepBroadcasts() error {
	used := map[string]bool{}
	for _, f := range l.broadcasts {
		used[broadcastPin(l.opts.PinDir, f.id)] = true
	}
	dir := filepath.Join(l.opts.PinDir, broadcastsDir)
	pins, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil // an earlier release has none
	}
	if err != nil {
		return fmt.Errorf("look at pins: %w", err)
	}
	var errs []error
	for _, pin := range pins {
		if path := filepath.Join(dir, pin.Name()); !used[path] {
			errs = append(errs, removePins(path))
		}
	}
	return errors.Join(errs...)
}

func (l *Loader) newBroadcast(indexes []int) (_ *ebpf.Map, _ *broadcast, err error) {
	spec := l.specs[bpf.RelayMapBroadcast].InnerMap.Copy()
	spec.Name = "slots"
	// The kernel takes no BTF for a devmap; detecting that takes 20 ms a map.
	spec.Key, spec.Value = nil, nil
	spec.MaxEntries = uint32(max(1, len(indexes)))
	devmap, err := ebpf.NewMap(spec)
	if err != nil {
		return nil, nil, fmt.Errorf("make devmap of %d slots: %w", len(indexes), err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, devmap.Close())
		}
	}()
	for row, index := range indexes {
		if err := l.setSlot(devmap, uint32(row), index); err != nil {
			return nil, nil, err
		}
	}
	id, err := mapID(devmap)
	if err != nil {
		return nil, nil, err
	}
	return devmap, &broadcast{indexes: indexes, id: id}, nil
}

// openBroadcast opens the devmap of a broadcast in use. The kernel empties a row when its interface
// goes; a new interface with the same index gets the row.
func (l *Loader) openBroadcast(key string, f *broadcast) (*ebpf.Map, error) {
	devmap, err := l.openDevmap(key, f)
	if err != nil {
		return nil, err
	}
	for row, index := range f.indexes {
		var value bpf.RelayBpfDevmapVal
		if devmap.Lookup(uint32(row), &value) == nil && int(value.Ifindex) == index {
			continue
		}
		if err := l.setSlot(devmap, uint32(row), index); err != nil {
			return nil, errors.Join(err, devmap.Close())
		}
	}
	return devmap, nil
}

// setSlot fills a row of a devmap with an interface and the egress program.
func (l *Loader) setSlot(devmap *ebpf.Map, row uint32, index int) error {
	value := bpf.RelayBpfDevmapVal{Ifindex: uint32(index)}
	value.BpfProg.Fd = int32(l.egress.FD())
	if err := devmap.Put(row, &value); err != nil {
		return fmt.Errorf("output to interface with index %d: %w", index, err)
	}
	return nil
}

// renewBroadcast writes this binary's egress program into all rows.
func (l *Loader) renewBroadcast(key string, f *broadcast) {
	devmap, err := l.openDevmap(key, f)
	if err != nil {
		l.log.Warn("upgrade egress program", "error", err)
		return
	}
	defer devmap.Close()
	for row, index := range f.indexes {
		l.renewRow(devmap, uint32(row), index)
	}
}

// adoptBroadcasts restores the devmaps of the rules. It reads only rows of the map broadcast that
// rules use: see rowWaits.
func (l *Loader) adoptBroadcasts() error {
	rules := make([]*entry, 0, len(l.rules))
	for _, e := range l.rules {
		if len(e.rule.Out) > 1 {
			rules = append(rules, e)
		}
	}
	ids := make([]ebpf.MapID, len(rules))
	err := atOnce(len(rules), func(from, to int) error {
		for i := from; i < to; i++ {
			if err := l.maps.Broadcast.Lookup(rules[i].first, &ids[i]); errors.Is(err, ebpf.ErrKeyNotExist) {
				return fmt.Errorf("rule %s has several outputs and no devmap", rules[i].rule.Name)
			} else if err != nil {
				return fmt.Errorf("read map broadcast: %w", err)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for i, e := range rules {
		key, indexes := broadcastKey(e.rule.Out)
		f := l.broadcasts[key]
		if f == nil {
			f = &broadcast{indexes: indexes, id: ids[i]}
			l.broadcasts[key] = f
		}
		f.users++
	}
	return l.sweepBroadcasts()
}

// clearOrphanBroadcasts clears them, once, before rules change: rows may be given to new ones then.
func (l *Loader) clearOrphanBroadcasts() error {
	if !l.orphansDue {
		return nil
	}
	rows, err := l.orphanBroadcasts()
	if err == nil {
		err = l.clearBroadcasts(rows, rows)
	}
	l.orphansDue = err != nil
	return err
}

// orphanBroadcasts returns the rows of the map broadcast that may hold a devmap of no rule. Reading
// the map itself would be slow, row by row: see rowWaits. But a row's entries in the map copies are
// written before it and cleared after it. It also repairs those of rules, which it has read.
func (l *Loader) orphanBroadcasts() ([]uint32, error) {
	copies, err := readArray[bpf.RelayCopy](l.maps.Copies, int(l.maps.Copies.MaxEntries()))
	if err != nil {
		return nil, fmt.Errorf("read map copies: %w", err)
	}
	var wrong batch[bpf.RelayCopy]
	for _, e := range l.rules {
		n := uint32(len(e.rule.Out))
		if n < 2 {
			continue
		}
		have := copies[e.first : e.first+n]
		if want := encodeCopies(e.rule.Out); !slices.Equal(have, want) {
			for i, c := range want {
				wrong.add(e.first+uint32(i), c)
			}
		}
		clear(have)
	}
	if n := len(wrong.keys); n > 0 {
		if err := wrong.put(l.maps.Copies); err != nil {
			return nil, err
		}
		l.log.Info("pinned state", "repaired", fmt.Sprintf("%d rows of map copies were changed: they are written again", n))
	}
	var rows []uint32
	for row := range copies {
		if copies[row] != (bpf.RelayCopy{}) {
			rows = append(rows, uint32(row))
		}
	}
	return rows, nil
}
