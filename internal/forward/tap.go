package forward

import (
	"context"
	"encoding/binary"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"xdpcast/internal/tap"
	"xdpcast/pkg/fanout"
	"xdpcast/pkg/loader"
)

// MaxTaps is the maximum number of concurrent taps.
const MaxTaps = 4

// Bounds of a Tap's memory for packets that have not been read yet.
const (
	tapChunks       = 8
	tapChunkBytes   = 1 << 20
	tapChunkRecords = 4096
)

// ErrTaps is returned when there are MaxTaps taps already.
var ErrTaps = errors.New("too many taps at once")

// Taps is the set of taps of the user-space paths. While it is empty, it costs a worker one check
// per batch. The zero value is ready for use; its methods may be called from any goroutine.
type Taps struct {
	mu   sync.Mutex
	list atomic.Pointer[[]*Tap] // immutable; replaced on changes
}

// Tap collects packets of one rule. Workers pass it filled chunks of fixed size; packets that do not
// fit are counted, and no worker waits.
type Tap struct {
	rule string
	opts tap.Options
	// alone says that nothing else shows the packets that the relay program hands to the workers.
	alone bool
	full  chan *tapChunk
	free  chan *tapChunk
	lost  atomic.Uint64

	mu    sync.Mutex
	cells []*tapCell
}

// tapCell holds a worker's chunk between its batches, which fill it until it is full or
// taken.
type tapCell = atomic.Pointer[tapChunk]

// tapChunk is filled by one worker.
type tapChunk struct {
	records []tapRecord
	bytes   []byte
}

type tapRecord struct {
	time     int64
	index    int
	from, to int // of bytes
	length   int
	slot     int
	reason   loader.Reason
	dropped  bool
	raw      bool
	unwanted bool
}

// Add starts a tap on a rule; the caller must Remove it. alone says that loader.Tap does not see
// the relay program: then the workers show the packets that it hands over, without MAC addresses.
// The error matches ErrTaps.
func (t *Taps) Add(rule string, opts tap.Options, alone bool) (*Tap, error) {
	n := &Tap{rule: rule, opts: opts, alone: alone, full: make(chan *tapChunk, tapChunks), free: make(chan *tapChunk, tapChunks)}
	t.mu.Lock()
	defer t.mu.Unlock()
	var list []*Tap
	if old := t.list.Load(); old != nil {
		list = append(list, *old...)
	}
	if len(list) == MaxTaps {
		return nil, ErrTaps
	}
	for range tapChunks {
		n.free <- &tapChunk{make([]tapRecord, 0, tapChunkRecords), make([]byte, 0, tapChunkBytes)}
	}
	list = append(list, n)
	t.list.Store(&list)
	return n, nil
}

// Remove ends a tap. Workers may still pass it packets of their current batches.
func (t *Taps) Remove(gone *Tap) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var list []*Tap
	if old := t.list.Load(); old != nil {
		for _, one := range *old {
			if one != gone {
				list = append(list, one)
			}
		}
	}
	if len(list) == 0 {
		t.list.Store(nil)
		return
	}
	t.list.Store(&list)
}

// Lost returns how many packets did not fit.
func (t *Tap) Lost() uint64 { return t.lost.Load() }

// Run adds the collected packets to w until ctx ends.
func (t *Tap) Run(ctx context.Context, w *tap.Writer) {
	tick := time.NewTicker(tap.HoldTime / 2)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			t.collect(w)
			return
		case c := <-t.full:
			t.add(c, w)
		case <-tick.C:
			t.collect(w)
		}
	}
}

// collect adds the packets collected so far.
func (t *Tap) collect(w *tap.Writer) {
	for range 2 * tapChunks {
		c := t.take()
		if c == nil {
			return
		}
		t.add(c, w)
	}
}

// take returns a chunk with packets, full ones first, or nil.
func (t *Tap) take() *tapChunk {
	select {
	case c := <-t.full:
		return c
	default:
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, cell := range t.cells {
		if c := cell.Swap(nil); c != nil {
			return c
		}
	}
	return nil
}

// newCell makes the cell of an engine.
func (t *Tap) newCell() *tapCell {
	t.mu.Lock()
	defer t.mu.Unlock()
	cell := &tapCell{}
	t.cells = append(t.cells, cell)
	return cell
}

func (t *Tap) add(c *tapChunk, w *tap.Writer) {
	var drop [1]tap.Drop
	for i := range c.records {
		r := &c.records[i]
		if r.unwanted {
			continue
		}
		record := tap.Record{
			Time: r.time, Index: r.index, Out: r.slot != tap.NoSlot, Raw: r.raw, Length: r.length, Data: c.bytes[r.from:r.to], Rule: t.rule, Slot: r.slot,
		}
		if r.dropped {
			drop[0] = tap.Drop{Slot: r.slot, Reason: r.reason.String()}
			record.Drops = drop[:]
		}
		w.Add(&record)
	}
	c.records, c.bytes = c.records[:0], c.bytes[:0]
	t.free <- c // has room for all chunks
}

// tapping is one engine's state of a tap.
type tapping struct {
	*Tap
	cell    *tapCell
	chunk   *tapChunk // during a batch
	packets uint32    // of the rule, for the sample
}

// tapped says which taps want a packet of a queue.
type tapped struct {
	slot    int
	taps    uint8          // a bit for each of Engine.taps
	records [MaxTaps]int32 // in their chunks; -1: none
}

// followTaps adopts the current list of taps. It is called between batches.
func (e *Engine) followTaps(list *[]*Tap) {
	e.tapList, e.taps = list, nil
	if list == nil {
		return
	}
	for _, t := range *list {
		e.taps = append(e.taps, tapping{Tap: t, cell: t.newCell()})
	}
}

// endTaps leaves the chunks of a batch in their cells for Tap.take.
func (e *Engine) endTaps() {
	for i := range e.taps {
		if t := &e.taps[i]; t.chunk != nil {
			t.cell.Store(t.chunk) // the cell is empty: room took its chunk
			t.chunk = nil
		}
	}
}

// handOver passes on the current chunk to make room for another.
func (t *tapping) handOver() {
	t.full <- t.chunk // has room for all chunks
	t.chunk = nil
}

// room returns a chunk with room for a packet of n bytes, or nil.
func (t *tapping) room(n int) *tapChunk {
	if t.chunk == nil {
		t.chunk = t.cell.Swap(nil)
	}
	if c := t.chunk; c != nil && (len(c.records) == cap(c.records) || len(c.bytes)+n > cap(c.bytes)) {
		t.handOver()
	}
	if t.chunk == nil {
		select {
		case t.chunk = <-t.free:
		default:
			return nil
		}
	}
	return t.chunk
}

// write appends a packet, at most snap bytes of it; false if there is no room.
func (c *tapChunk) write(r tapRecord, snap int, parts ...[]byte) bool {
	if len(c.records) == cap(c.records) {
		return false
	}
	r.from = len(c.bytes)
	for _, part := range parts {
		part = part[:min(len(part), snap)]
		if len(c.bytes)+len(part) > cap(c.bytes) {
			c.bytes = c.bytes[:r.from]
			return false
		}
		snap -= len(part)
		c.bytes = append(c.bytes, part...)
	}
	r.to = len(c.bytes)
	c.records = append(c.records, r)
	return true
}

// wantedBy returns the set of taps that want a packet of a rule. sequence is its number in the
// relay program, on which sampling there is based; 0: none.
func (e *Engine) wantedBy(r *Rule, sequence uint32) (taps uint8) {
	for i := range e.taps {
		t := &e.taps[i]
		if t.rule != r.name {
			continue
		}
		n := sequence
		if n == 0 {
			t.packets++
			n = t.packets
		}
		if n%t.opts.Sample == 0 {
			taps |= 1 << i
		}
	}
	return taps
}

// tapIn shows a received packet, and whether it was dropped for all outputs.
func (e *Engine) tapIn(index int, frame []byte, at int64, length int, reason loader.Reason, refused bool) {
	for i := range e.taps {
		t := &e.taps[i]
		if e.wanted>>i&1 == 1 && (t.opts.In || t.opts.Dropped && refused) && (!e.noMACs || t.alone) {
			t.show(tapRecord{time: at, index: index, length: length, slot: tap.NoSlot, reason: reason, dropped: refused}, frame, e.noMACs)
		}
	}
}

// tapUnsent shows a packet, as received, of which an output gets no copy.
func (e *Engine) tapUnsent(o *output, slot int, frame []byte, at int64, length int, reason loader.Reason) {
	for i := range e.taps {
		t := &e.taps[i]
		if e.wanted>>i&1 == 1 && t.opts.Dropped {
			t.show(tapRecord{time: at, index: o.Index, length: length, slot: slot, reason: reason, dropped: true}, frame, e.noMACs)
		}
	}
}

// show writes a packet as received, or counts it as lost. noMACs says that the handover replaces
// the MAC addresses. A frame longer than the packet has an Ethernet header that the packet lacked.
func (t *tapping) show(r tapRecord, frame []byte, noMACs bool) {
	var macs [2 * 6]byte
	head := frame[:0]
	switch {
	case r.length < len(frame):
		r.raw, frame = true, frame[etherLen:]
	case noMACs && len(frame) > len(macs):
		head, frame = macs[:], frame[len(macs):]
	}
	c := t.room(min(len(head)+len(frame), int(t.opts.Snap)))
	if c == nil || !c.write(r, int(t.opts.Snap), head, frame) {
		t.lost.Add(1)
	}
}

// tapQueued records which taps want the packet just queued.
func (e *Engine) tapQueued(q *queue, slot int) {
	q.tapped = append(q.tapped, tapped{slot: slot, taps: e.wanted, records: noRecords})
}

var noRecords = [MaxTaps]int32{-1, -1, -1, -1}

// tapSending shows the packets of a queue before they are sent, since their memory may be reused
// afterwards. tapOutcome adds the outcome.
func (e *Engine) tapSending(q *queue) {
	at := e.set.Clock(time.Now())
	for i := range e.taps {
		t := &e.taps[i]
		need := 0
		for n := range q.tapped {
			if q.tapped[n].taps>>i&1 == 1 {
				need += min(packetLen(&q.packets[n]), int(t.opts.Snap))
			}
		}
		if need == 0 {
			continue
		}
		// All in one chunk, which is not handed over before the outcome is known.
		c := t.room(need)
		if c != nil && len(c.records)+len(q.tapped) > cap(c.records) {
			t.handOver()
			c = t.room(need)
		}
		for n := range q.tapped {
			w := &q.tapped[n]
			if w.taps>>i&1 == 0 || !t.opts.Wants(w.slot) && !t.opts.Dropped {
				continue
			}
			p := &q.packets[n]
			r := tapRecord{time: at, index: q.index, length: packetLen(p), slot: w.slot, raw: !q.ethernet}
			if c == nil || !c.write(r, int(t.opts.Snap), p.Header, p.Payload) {
				t.lost.Add(1)
				continue
			}
			w.records[i] = int32(len(c.records) - 1)
		}
	}
	q.tap = e
}

func packetLen(p *fanout.Packet) int { return len(p.Header) + len(p.Payload) }

// tapOutcome records whether packets of a queue were sent or dropped.
func (e *Engine) tapOutcome(packets []tapped, reason loader.Reason, dropped bool) {
	for n := range packets {
		w := &packets[n]
		for i := range e.taps {
			t := &e.taps[i]
			if w.records[i] < 0 || t.chunk == nil {
				continue
			}
			r := &t.chunk.records[w.records[i]]
			r.dropped, r.reason = dropped, reason
			r.unwanted = dropped && !t.opts.Dropped || !dropped && !t.opts.Wants(w.slot)
		}
	}
}

// sequenceOf returns the relay program's number of a frame (struct handover of
// bpf/include/handover.h).
func sequenceOf(frame []byte) uint32 {
	const at = 8
	if frame[handoverMarkAt] != handoverMark {
		return 0
	}
	return binary.NativeEndian.Uint32(frame[at:])
}
