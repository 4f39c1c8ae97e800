package traffic

import (
	"encoding/binary"
	"math"
	"testing"
)

func TestTracker(t *testing.T) {
	type step struct {
		seq  uint64
		want Verdict
		lost uint64
	}
	for _, c := range []struct {
		name      string
		fromStart bool
		steps     []step
	}{
		{"in order", false, []step{{0, InOrder, 0}, {1, InOrder, 0}, {2, InOrder, 0}}},
		{"begins in the middle", false, []step{{1000, InOrder, 0}, {1001, InOrder, 0}}},
		{"from the start, three missing", true, []step{{3, InOrder, 3}, {4, InOrder, 3}}},
		{"from the start, late first", true, []step{{1, InOrder, 1}, {0, Reordered, 0}, {0, Duplicate, 0}}},
		{"gap", false, []step{{0, InOrder, 0}, {5, InOrder, 4}}},
		{"gap filled", false, []step{{0, InOrder, 0}, {3, InOrder, 2}, {2, Reordered, 1}, {1, Reordered, 0}, {4, InOrder, 0}}},
		{"duplicate of the highest", false, []step{{7, InOrder, 0}, {7, Duplicate, 0}, {8, InOrder, 0}}},
		{"duplicate of a late one", false, []step{{0, InOrder, 0}, {2, InOrder, 1}, {1, Reordered, 0}, {1, Duplicate, 0}}},
		{"before the first is not loss", false, []step{{10, InOrder, 0}, {8, Reordered, 0}, {8, Duplicate, 0}, {11, InOrder, 0}}},
		{"last of the window", false, []step{{0, InOrder, 0}, {64, InOrder, 63}, {1, Reordered, 62}, {0, Stale, 62}}},
		{"beyond the window", false, []step{{0, InOrder, 0}, {65, InOrder, 64}, {1, Stale, 64}, {2, Reordered, 63}}},
		{"jump over the whole window", false, []step{{0, InOrder, 0}, {1000, InOrder, 999}, {960, Reordered, 998}, {936, Stale, 998}, {937, Reordered, 997}, {1000, Duplicate, 997}}},
		{"window wraps", false, []step{{62, InOrder, 0}, {63, InOrder, 0}, {64, InOrder, 0}, {126, InOrder, 61}, {64, Duplicate, 61}, {65, Reordered, 60}}},
		{"end of the numbers", false, []step{{math.MaxUint64 - 1, InOrder, 0}, {math.MaxUint64, InOrder, 0}, {math.MaxUint64, Duplicate, 0}, {0, Stale, 0}}},
		{"from one end to the other", true, []step{{0, InOrder, 0}, {math.MaxUint64, InOrder, math.MaxUint64 - 1}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			tr, err := NewTracker(64, c.fromStart)
			if err != nil {
				t.Fatal(err)
			}
			for i, s := range c.steps {
				if got := tr.Observe(s.seq); got != s.want || tr.Lost() != s.lost {
					t.Fatalf("step %d, %d: got verdict %d, lost %d, want %d, %d", i, s.seq, got, tr.Lost(), s.want, s.lost)
				}
			}
		})
	}
}

func TestTrackerRefusesWindows(t *testing.T) {
	for _, w := range []int{-64, 0, 1, 32, 63, 65, 96, maxWindow + 1, maxWindow * 2} {
		if tr, err := NewTracker(w, false); err == nil || tr != nil {
			t.Errorf("window %d was accepted", w)
		}
	}
}

func TestTrackerResetForgets(t *testing.T) {
	tr := newTracker(64, true)
	tr.Observe(9)
	tr.reset()
	if got := tr.Observe(9); got != InOrder || tr.Lost() != 9 {
		t.Errorf("got verdict %d, lost %d, want %d, 9", got, tr.Lost(), InOrder)
	}
}

// naive is the tracker as one would write it with all the memory in the world.
type naive struct {
	window    uint64
	fromStart bool
	seen      map[uint64]bool
	first     uint64
	highest   uint64
}

func (n *naive) observe(seq uint64) Verdict {
	switch {
	case len(n.seen) == 0:
		n.first, n.highest = seq, seq
		if n.fromStart {
			n.first = 0
		}
	case seq > n.highest:
		n.highest = seq
	case n.highest-seq >= n.window:
		return Stale
	case n.seen[seq]:
		return Duplicate
	default:
		n.seen[seq] = true
		return Reordered
	}
	n.seen[seq] = true
	return InOrder
}

// lost counts one by one.
func (n *naive) lost() (lost uint64) {
	for s := n.first; s <= n.highest; s++ {
		if !n.seen[s] {
			lost++
		}
	}
	return lost
}

// FuzzTracker compares the tracker with the naive one. Each two bytes of input
// are a step relative to the highest number so far.
func FuzzTracker(f *testing.F) {
	f.Add(uint16(100), true, []byte{0, 1, 0, 1, 0xff, 0xff, 0, 5, 0xff, 0xfe})
	f.Add(uint16(0), false, []byte{0, 64, 0xff, 0xc0, 0xff, 0xc1, 0x03, 0, 0xff, 0xc1})
	f.Fuzz(func(t *testing.T, start uint16, fromStart bool, steps []byte) {
		if len(steps) > 200 {
			steps = steps[:200]
		}
		tr := newTracker(128, fromStart)
		model := &naive{window: 128, fromStart: fromStart, seen: make(map[uint64]bool)}
		seq := int64(start % 1000)
		for {
			if got, want := tr.Observe(uint64(seq)), model.observe(uint64(seq)); got != want {
				t.Fatalf("%d: verdict %d, want %d", seq, got, want)
			}
			if got, want := tr.Lost(), model.lost(); got != want {
				t.Fatalf("after %d: lost %d, want %d", seq, got, want)
			}
			if len(steps) < 2 {
				return
			}
			// Mostly near the window's edges, sometimes far.
			step := int64(int16(binary.BigEndian.Uint16(steps))) % 400
			steps = steps[2:]
			seq = max(int64(tr.Highest())+step, 0)
		}
	})
}
