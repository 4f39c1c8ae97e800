package loader

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
)

// batch is values that are yet to be written to an array.
type batch[V any] struct {
	keys   []uint32
	values []V
}

func (b *batch[V]) add(key uint32, value V) {
	b.keys = append(b.keys, key)
	b.values = append(b.values, value)
}

// put writes the values and forgets them.
func (b *batch[V]) put(m *ebpf.Map) error {
	if err := putAll(m, b.keys, b.values); err != nil {
		return fmt.Errorf("write map of %d entries: %w", m.MaxEntries(), err)
	}
	b.keys, b.values = b.keys[:0], b.values[:0]
	return nil
}

// staged is what a Sync has prepared and not written yet, by map.
type staged struct {
	rules    batch[bpf.RelayRule]
	outputs  batch[bpf.RelayOutput]
	copies   batch[bpf.RelayCopy]
	policers batch[bpf.RelayPolicer]
	fanout   batch[uint32] // file descriptors of devmaps, all in open
	open     openFans
}

// What may be staged at once: file descriptors, and outputs.
const (
	maxOpenFans      = 256
	maxStagedOutputs = 16384
)

func (s *sync) flushIfFull() error {
	if len(s.staged.open) < maxOpenFans && len(s.staged.outputs.keys) < maxStagedOutputs {
		return nil
	}
	return s.flush()
}

// flush writes what is staged. The kernel returns from the write to the map fanout
// only when no program that started before it runs any more - once for all rows,
// since Linux 6.8 - so that a row of ports that useSlot has changed is in force, too.
func (s *sync) flush() error {
	t := &s.staged
	if err := errors.Join(t.rules.put(s.maps.Rules), t.outputs.put(s.maps.Outputs),
		t.copies.put(s.maps.Copies), t.policers.put(s.maps.Policers)); err != nil {
		return err
	}
	if rows := append([]uint32(nil), t.fanout.keys...); len(rows) > 0 {
		s.onFailure(func() error { return s.clearFanout(rows) })
	}
	return errors.Join(t.fanout.put(s.maps.Fanout), t.open.close())
}

// fewRows are deleted one by one: for each the kernel waits for running programs.
const fewRows = 8

// clearFanout empties rows of the map fanout. Many are filled with a devmap without
// interfaces instead of being deleted, for which the kernel waits once.
func (l *Loader) clearFanout(rows []uint32) error {
	if len(rows) <= fewRows {
		var errs []error
		for _, row := range rows {
			if err := l.maps.Fanout.Delete(row); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				errs = append(errs, fmt.Errorf("clear map fanout: %w", err))
			}
		}
		return errors.Join(errs...)
	}
	empty, _, err := l.newFan(nil)
	if err != nil {
		return err
	}
	var b batch[uint32]
	for _, row := range rows {
		b.add(row, uint32(empty.FD()))
	}
	return errors.Join(b.put(l.maps.Fanout), empty.Close())
}
