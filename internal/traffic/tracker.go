package traffic

import (
	"fmt"
	"math/bits"
)

// Verdict is a Tracker's verdict on one packet.
type Verdict uint8

const (
	// InOrder: the highest sequence number so far.
	InOrder Verdict = iota
	// Reordered: for the first time, but after a higher one (RFC 4737, section 3.3).
	Reordered
	// Duplicate: seen before.
	Duplicate
	// Stale: so far behind the highest that the window cannot tell a late packet from a duplicate.
	// A gap that it may have filled stays lost.
	Stale
)

// Tracker accounts for the sequence numbers of one flow: which were received, and how many are
// missing. Within its window, counted back from the highest number seen, it is exact; its memory is
// the window, one bit a number.
//
// Numbers before the first one received are not missing, unless the tracker starts at 0. It is not
// safe for concurrent use.
type Tracker struct {
	fromStart bool
	started   bool
	first     uint64 // the lowest number whose absence counts
	highest   uint64
	lost      uint64
	seen      []uint64 // bit n%window: n was received, for n in (highest-window, highest]
}

// NewTracker returns a tracker with a window of this many sequence numbers, a power of two from 64
// on. With fromStart, the stream begins at 0 and numbers missing before the first packet are lost.
func NewTracker(window int, fromStart bool) (*Tracker, error) {
	if err := checkWindow(window); err != nil {
		return nil, err
	}
	return newTracker(window, fromStart), nil
}

func newTracker(window int, fromStart bool) *Tracker {
	return &Tracker{fromStart: fromStart, seen: make([]uint64, window/64)}
}

// reset restores the initial state.
func (t *Tracker) reset() {
	clear(t.seen)
	*t = Tracker{fromStart: t.fromStart, seen: t.seen}
}

// maxWindow keeps a window's memory, one bit a number, under 2 MiB a flow.
const maxWindow = 1 << 24

func checkWindow(window int) error {
	if window < 64 || window > maxWindow || bits.OnesCount(uint(window)) != 1 {
		return fmt.Errorf("window %d: must be a power of two from 64 to %d", window, maxWindow)
	}
	return nil
}

// Observe accounts for a received packet.
func (t *Tracker) Observe(seq uint64) Verdict {
	switch {
	case !t.started:
		t.start(seq)
	case seq > t.highest:
		t.advance(seq)
	case t.highest-seq >= t.window():
		return Stale
	case t.has(seq):
		return Duplicate
	default:
		t.mark(seq)
		if seq >= t.first {
			t.lost--
		}
		return Reordered
	}
	return InOrder
}

// Started says whether a number was received.
func (t *Tracker) Started() bool { return t.started }

// Lost is how many numbers between the first and the highest are missing.
func (t *Tracker) Lost() uint64 { return t.lost }

// First is the start of the account: 0, or the first number received.
func (t *Tracker) First() uint64 { return t.first }

// Highest is the highest number received.
func (t *Tracker) Highest() uint64 { return t.highest }

func (t *Tracker) start(seq uint64) {
	t.started = true
	t.first, t.highest = seq, seq
	if t.fromStart {
		t.first, t.lost = 0, seq
	}
	t.mark(seq)
}

// advance moves the window up to seq. The skipped numbers are lost until they arrive.
func (t *Tracker) advance(seq uint64) {
	skipped := seq - t.highest - 1
	t.lost += skipped
	if skipped >= t.window() {
		clear(t.seen)
	} else {
		for n := t.highest + 1; n < seq; n++ {
			t.unmark(n)
		}
	}
	t.highest = seq
	t.mark(seq)
}

func (t *Tracker) window() uint64 { return uint64(len(t.seen)) * 64 }

// bit returns the word and the mask of n. The window is a power of two.
func (t *Tracker) bit(n uint64) (*uint64, uint64) {
	n &= t.window() - 1
	return &t.seen[n/64], 1 << (n % 64)
}

func (t *Tracker) has(n uint64) bool {
	w, mask := t.bit(n)
	return *w&mask != 0
}

func (t *Tracker) mark(n uint64) {
	w, mask := t.bit(n)
	*w |= mask
}

func (t *Tracker) unmark(n uint64) {
	w, mask := t.bit(n)
	*w &^= mask
}
