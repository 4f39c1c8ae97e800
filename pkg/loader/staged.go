package loader

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
)

// batch is values to be written to an array.
type batch[V any] struct {
	keys   []uint32
	values []V
}

func (b *batch[V]) add(key uint32, value V) {
	b.keys = append(b.keys, key)
	b.values = append(b.values, value)
}

// put writes the values and clears the batch.
func (b *batch[V]) put(m *ebpf.Map) error {
	if err := putAll(m, b.keys, b.values); err != nil {
		return fmt.Errorf("write map of %d entries: %w", m.MaxEntries(), err)
	}
	b.keys, b.values = b.keys[:0], b.values[:0]
	return nil
}

// staged is what a Sync has prepared but not written yet, by map.
type staged struct {
	rules     batch[bpf.RelayRule]
	outputs   batch[bpf.RelayOutput]
	copies    batch[bpf.RelayCopy]
	policers  batch[bpf.RelayPolicer]
	broadcast batch[uint32] // file descriptors of devmaps, all in open
	open      openBroadcasts
	windows   batch[uint32] // file descriptors of windows, all in openWindows
	// openWindows are kept open until they are written.
	openWindows []*ebpf.Map
}

// Limits of what is staged at once: file descriptors, and outputs.
const (
	maxOpenDevmaps   = 256
	maxStagedOutputs = 16384
)

func (s *transaction) flushIfFull() error {
	if len(s.staged.open)+len(s.staged.openWindows) < maxOpenDevmaps && len(s.staged.outputs.keys) < maxStagedOutputs {
		return nil
	}
	return s.flush()
}

// flush writes what is staged. The kernel returns from writing the map broadcast only after a grace
// period, so a row of devices changed by useSlot has taken effect, too.
func (s *transaction) flush() error {
	t := &s.staged
	copies := slices.Clone(t.copies.keys)
	if err := errors.Join(t.rules.put(s.maps.Rules), t.outputs.put(s.maps.Outputs),
		t.copies.put(s.maps.Copies), t.policers.put(s.maps.Policers)); err != nil {
		return err
	}
	rows := slices.Clone(t.broadcast.keys)
	if len(rows) > 0 {
		s.onFailure(func() error { return s.clearBroadcasts(rows, copies) })
	}
	return errors.Join(t.broadcast.putRows(s.maps.Broadcast), t.open.close(), t.windows.putRows(s.maps.StreamWindows), t.closeWindows())
}

func (t *staged) closeWindows() error {
	var errs []error
	for _, m := range t.openWindows {
		errs = append(errs, m.Close())
	}
	t.openWindows = nil
	return errors.Join(errs...)
}

// rowWaits is the number of rows of a map of maps that are written or read concurrently. Before
// Linux 6.8 each row waits a grace period, tens of milliseconds; concurrent ones wait together.
const rowWaits = 64

// atOnce calls fn for parts of 0 to n, up to rowWaits of them concurrently, and waits for all.
func atOnce(n int, fn func(from, to int) error) error {
	parts := min(n, rowWaits)
	if parts == 1 {
		return fn(0, n)
	}
	errs := make([]error, parts)
	var running sync.WaitGroup
	for i := range parts {
		running.Go(func() { errs[i] = fn(i*n/parts, (i+1)*n/parts) })
	}
	running.Wait()
	return errors.Join(errs...)
}

// putRows is put for a map of maps.
func (b *batch[V]) putRows(m *ebpf.Map) error {
	err := atOnce(len(b.keys), func(from, to int) error {
		part := batch[V]{b.keys[from:to], b.values[from:to]}
		return part.put(m)
	})
	if err == nil {
		b.keys, b.values = b.keys[:0], b.values[:0]
	}
	return err
}

// fewRows rows are deleted; more are overwritten with a devmap without interfaces, which takes
// fewer system calls.
const fewRows = 8

// clearBroadcasts empties rows of the map broadcast, and then their rows of the map copies: see
// orphanBroadcasts.
func (l *Loader) clearBroadcasts(rows, copies []uint32) error {
	if err := l.emptyBroadcasts(rows); err != nil {
		return err
	}
	var b batch[bpf.RelayCopy]
	for _, row := range copies {
		b.add(row, bpf.RelayCopy{})
	}
	return b.put(l.maps.Copies)
}

func (l *Loader) emptyBroadcasts(rows []uint32) error {
	if len(rows) <= fewRows {
		return atOnce(len(rows), func(from, to int) error {
			var errs []error
			for _, row := range rows[from:to] {
				if err := l.maps.Broadcast.Delete(row); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
					errs = append(errs, fmt.Errorf("clear map broadcast: %w", err))
				}
			}
			return errors.Join(errs...)
		})
	}
	empty, _, err := l.newBroadcast(nil)
	if err != nil {
		return err
	}
	var b batch[uint32]
	for _, row := range rows {
		b.add(row, uint32(empty.FD()))
	}
	return errors.Join(b.putRows(l.maps.Broadcast), empty.Close())
}
