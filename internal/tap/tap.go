// Package tap writes a rule's packets, as received and as sent, as pcapng
// (draft-ietf-opsawg-pcapng), which Wireshark can read while it is being written. The packets come
// from package loader for the kernel path and from package forward for the others.
package tap

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Options select packets.
type Options struct {
	// In selects packets as received. Slots has a bit for each output whose packets are wanted as
	// sent, and Dropped selects those that were not sent.
	In      bool
	Slots   uint64
	Dropped bool
	// Sample is 1 for every packet, and n for one in n received by an input, with all of its
	// copies.
	Sample uint32
	// Snap is the maximum number of bytes kept of a packet, from 1 to MaxSnap.
	Snap uint32
}

// MaxSnap is the largest Snap, in bytes, and AllSlots selects every output.
const (
	MaxSnap  = 0xf000
	AllSlots = ^uint64(0)
)

// Everything selects all packets of a rule in full.
var Everything = Options{In: true, Slots: AllSlots, Dropped: true, Sample: 1, Snap: MaxSnap}

// Check returns an error if the options are invalid.
func (o Options) Check() error {
	switch {
	case !o.In && o.Slots == 0 && !o.Dropped:
		return errors.New("nothing to tap: want what came in, an output, or what was dropped")
	case o.Sample < 1:
		return fmt.Errorf("sample 1 of %d: want at least 1", o.Sample)
	case o.Snap < 1 || o.Snap > MaxSnap:
		return fmt.Errorf("snap %d: want 1 to %d bytes", o.Snap, MaxSnap)
	}
	return nil
}

// Wants reports whether a slot's packets are wanted as sent.
func (o Options) Wants(slot int) bool { return slot < 64 && o.Slots>>slot&1 == 1 }

// NoSlot, instead of a copy's slot, stands for the packet as a whole.
const NoSlot = -1

// Drop says why a packet, or its copy for a slot, was not sent.
type Drop struct {
	Slot   int // NoSlot: no output got it
	Reason string
}

// Record is a packet. The caller may reuse its memory once Add has returned.
type Record struct {
	Time   int64 // nanoseconds of CLOCK_MONOTONIC
	Index  int   // of the input interface, or of the intended output interface
	Out    bool  // sent, or meant to be; otherwise received
	Raw    bool  // Data begins with the IP header
	Length int   // original length in bytes; Data may be shorter
	Data   []byte
	Rule   string
	// Slot is the output of a copy; NoSlot: the packet as received.
	Slot  int
	Drops []Drop
}

// comment appends a description of the packet.
func (r *Record) comment(to []byte) []byte {
	to = append(append(to, "rule "...), r.Rule...)
	switch {
	case r.Slot == NoSlot:
		to = append(to, ", in"...)
	case len(r.Drops) > 0:
		to = fmt.Appendf(to, ", slot %d, not sent", r.Slot)
	default:
		to = fmt.Appendf(to, ", slot %d, out", r.Slot)
	}
	return to
}

func (d Drop) comment(to []byte) []byte {
	if d.Slot != NoSlot {
		to = fmt.Appendf(to, "slot %d ", d.Slot)
	}
	return append(append(to, "dropped: "...), d.Reason...)
}

// Bounds of a Writer.
const (
	// holdBytes is the amount held back to be sorted by time.
	holdBytes = 1 << 20
	// HoldTime is the interval at which to call Flush.
	HoldTime = 50 * time.Millisecond
)

// Writer sorts records of any number of sources by time, if they arrive within HoldTime of each
// other, and writes them. Its methods may be called from any goroutine.
type Writer struct {
	name  func(index int) string
	limit uint64 // packets, 0: none

	mu         sync.Mutex
	out        *pcapng
	interfaces map[interfaceKey]uint32
	held       []held
	bytes      []byte // of the packets held
	written    uint64
	lost       uint64 // in the last statistics
	done       bool
	err        error
}

type interfaceKey struct {
	index int
	raw   bool
}

// held is a packet waiting to be written.
type held struct {
	time     int64
	index    int
	from, to int // the packet's range in Writer.bytes
	comments int // end of the comments, each preceded by its length
	length   int
	out, raw bool
}

// NewWriter starts a file. name returns the name of an interface; limit is the maximum number of
// packets, 0 for no limit; application names the program that writes it.
func NewWriter(w io.Writer, application string, name func(index int) string, limit uint64) (*Writer, error) {
	out := &pcapng{w: w}
	out.section(application)
	if err := out.flush(); err != nil {
		return nil, err
	}
	return &Writer{name: name, limit: limit, out: out, interfaces: map[interfaceKey]uint32{}}, nil
}

// Add takes a record; it does not retain its memory.
func (w *Writer) Add(r *Record) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.done {
		return
	}
	h := held{time: r.Time, index: r.Index, from: len(w.bytes), length: r.Length, out: r.Out, raw: r.Raw}
	w.bytes = append(w.bytes, r.Data...)
	h.to = len(w.bytes)
	w.bytes = appendComment(w.bytes, r.comment)
	for _, d := range r.Drops {
		w.bytes = appendComment(w.bytes, d.comment)
	}
	h.comments = len(w.bytes)
	w.held = append(w.held, h)
	if len(w.bytes) >= holdBytes {
		w.write()
	}
}

// Flush writes what was added and, if it changed, the number of packets lost so far. more is false
// once the limit is reached and after an error, which every later call returns.
func (w *Writer) Flush(lost uint64) (more bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.write()
	if lost != w.lost && w.err == nil {
		w.lost = lost
		w.statistics()
	}
	return !w.done, w.err
}

// Close completes the file with the number of packets lost.
func (w *Writer) Close(lost uint64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.write()
	w.lost = lost
	w.statistics()
	w.done = true
	return w.err
}

// Written returns the number of packets written.
func (w *Writer) Written() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.written
}

func (w *Writer) write() {
	slices.SortStableFunc(w.held, func(a, b held) int { return cmp.Compare(a.time, b.time) })
	offset := wallOffset()
	for i := range w.held {
		if w.done {
			break
		}
		h := &w.held[i]
		w.out.packet(w.interfaceOf(h.index, h.raw), h.time+offset, h.out, h.length, w.bytes[h.from:h.to], w.bytes[h.to:h.comments])
		w.written++
		w.done = w.written == w.limit
		if len(w.out.buf) >= writeBytes {
			w.flush()
		}
	}
	w.held, w.bytes = w.held[:0], w.bytes[:0]
	w.flush()
}

func (w *Writer) flush() {
	if err := w.out.flush(); err != nil && w.err == nil {
		w.err, w.done = err, true
	}
}

// statistics reports the lost packets on the first interface: it is unknown which ones they belong
// to.
func (w *Writer) statistics() {
	if len(w.interfaces) == 0 {
		if w.lost == 0 {
			return
		}
		w.interfaceOf(0, false)
	}
	now := time.Now().UnixNano()
	w.out.statistics(0, now, w.written, w.lost)
	w.flush()
}

// interfaceOf returns the id of an interface in the file; it adds a new one.
func (w *Writer) interfaceOf(index int, raw bool) uint32 {
	key := interfaceKey{index, raw}
	id, ok := w.interfaces[key]
	if !ok {
		id = uint32(len(w.interfaces))
		w.interfaces[key] = id
		w.out.device(w.name(index), raw)
	}
	return id
}

// wallOffset is how far the wall clock is ahead of CLOCK_MONOTONIC, in nanoseconds.
func wallOffset() int64 {
	var mono unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &mono) // cannot fail for this clock
	return time.Now().UnixNano() - mono.Nano()
}

// appendComment appends a text preceded by its length, in two bytes, little endian.
func appendComment(to []byte, text func([]byte) []byte) []byte {
	at := len(to)
	to = text(append(to, 0, 0))
	n := min(len(to)-at-2, maxComment)
	to = to[:at+2+n]
	to[at], to[at+1] = byte(n), byte(n>>8)
	return to
}
