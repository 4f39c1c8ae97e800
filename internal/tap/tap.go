// Package tap writes packets of a rule, as they came in and as they went out, in the format
// that Wireshark reads while it is being written: pcapng (draft-ietf-opsawg-pcapng). What
// sees them is package loader for the kernel path and package forward for the others.
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

// Options say which packets are wanted.
type Options struct {
	// In: as they came in. Slots has a bit for each output whose packets are wanted as they
	// were sent, and Dropped is for those that were not sent.
	In      bool
	Slots   uint64
	Dropped bool
	// Sample is 1 for every packet, and n for one of n that an input takes, with all of its
	// copies.
	Sample uint32
	// Snap is how many bytes of a packet are kept at most, from 1 to MaxSnap.
	Snap uint32
}

// MaxSnap is the longest part of a packet that is kept, and AllSlots stands for every output.
const (
	MaxSnap  = 0xf000
	AllSlots = ^uint64(0)
)

// Everything is all packets of a rule in full.
var Everything = Options{In: true, Slots: AllSlots, Dropped: true, Sample: 1, Snap: MaxSnap}

// Check says what is wrong with the options.
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

// Wants says whether a slot's packets are wanted as they were sent.
func (o Options) Wants(slot int) bool { return slot < 64 && o.Slots>>slot&1 == 1 }

// NoSlot stands for a packet as a whole, where the slot of a copy is asked for.
const NoSlot = -1

// Drop says why a packet, or its copy for a slot, was not sent.
type Drop struct {
	Slot   int // NoSlot: no output got it
	Reason string
}

// Record is a packet. Whoever makes one may use its memory again once it was added.
type Record struct {
	Time   int64 // nanoseconds of CLOCK_MONOTONIC
	Index  int   // of the interface that it came in on, or was to leave by
	Out    bool  // it left, or was to leave; else it came in
	Raw    bool  // Data begins with the IP header
	Length int   // bytes that it had; Data may be less
	Data   []byte
	Rule   string
	// Slot is the output of a copy; NoSlot: it is the packet that came in.
	Slot  int
	Drops []Drop
}

// comment says whose packet it is.
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
	// holdBytes is how much is held back to be put in the order of time.
	holdBytes = 1 << 20
	// HoldTime is how often to call Flush.
	HoldTime = 50 * time.Millisecond
)

// Writer puts records of any number of sources in the order of their time, as far as they come
// within HoldTime of each other, and writes them. Its methods may be called from any
// goroutine.
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

// held is a packet that waits to be written.
type held struct {
	time     int64
	index    int
	from, to int // of bytes: the packet
	comments int // up to here: the comments, each with its length in front
	length   int
	out, raw bool
}

// NewWriter starts a file. name names interfaces; limit is how many packets it is to hold, 0 for
// any number. application is who writes it.
func NewWriter(w io.Writer, application string, name func(index int) string, limit uint64) (*Writer, error) {
	out := &pcapng{w: w}
	out.section(application)
	if err := out.flush(); err != nil {
		return nil, err
	}
	return &Writer{name: name, limit: limit, out: out, interfaces: map[interfaceKey]uint32{}}, nil
}

// Add takes a record; its memory is not used any more when Add has returned.
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

// Flush writes what was added, and, if it has changed, how many packets were lost so far. It says
// whether there is room for more: not after the limit, nor after an error, which it returns
// again and again.
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

// Close ends the file with how many packets were lost.
func (w *Writer) Close(lost uint64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.write()
	w.lost = lost
	w.statistics()
	w.done = true
	return w.err
}

// Written is how many packets were written.
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

// statistics says for the first interface how many packets were lost: it is not known of which
// they were.
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

// interfaceOf is the number of an interface in the file.
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

// wallOffset is what the wall clock is ahead of CLOCK_MONOTONIC.
func wallOffset() int64 {
	var mono unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &mono) // cannot fail for this clock
	return time.Now().UnixNano() - mono.Nano()
}

// appendComment appends a text with its length in front, in two bytes.
func appendComment(to []byte, text func([]byte) []byte) []byte {
	at := len(to)
	to = text(append(to, 0, 0))
	n := min(len(to)-at-2, maxComment)
	to = to[:at+2+n]
	to[at], to[at+1] = byte(n), byte(n>>8)
	return to
}
