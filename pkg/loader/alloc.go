package loader

import (
	"fmt"
	"slices"
)

// idAllocator allocates ids below max. A freed id is reused as late as possible, so that a packet
// still in flight cannot meet its next owner.
type idAllocator struct {
	max   uint32
	next  uint32   // from here on never used
	freed []uint32 // oldest first
}

func newIDAllocator(max uint32) *idAllocator { return &idAllocator{max: max} }

// take returns an id, and whether it was in use before.
func (a *idAllocator) take() (id uint32, used bool, err error) {
	if a.next < a.max {
		a.next++
		return a.next - 1, false, nil
	}
	if len(a.freed) == 0 {
		return 0, false, fmt.Errorf("%w: all %d are in use", ErrFull, a.max)
	}
	id, a.freed = a.freed[0], a.freed[1:]
	return id, true, nil
}

func (a *idAllocator) give(id uint32) { a.freed = append(a.freed, id) }

// adopt marks the ids in use after a restart; all others count as used before.
func (a *idAllocator) adopt(inUse func(uint32) bool) {
	a.next, a.freed = a.max, a.freed[:0]
	for id := range a.max {
		if !inUse(id) {
			a.freed = append(a.freed, id)
		}
	}
}

// extent is a run of free ids.
type extent struct{ first, n uint32 }

// blockAllocator allocates runs of consecutive ids, in rotation for the same reason as idAllocator.
type blockAllocator struct {
	max  uint32
	free []extent // sorted, never adjacent
	hand uint32   // where the search starts
	high uint32   // from here on never used
}

func newBlockAllocator(max uint32) *blockAllocator {
	return &blockAllocator{max: max, free: []extent{{0, max}}}
}

// take returns the first of n consecutive ids, and whether any of them was in use before.
func (a *blockAllocator) take(n uint32) (first uint32, used bool, err error) {
	start, _ := slices.BinarySearchFunc(a.free, a.hand, func(e extent, hand uint32) int {
		if e.first+e.n <= hand {
			return -1
		}
		return 1
	})
	for i := range a.free {
		at := (start + i) % len(a.free)
		e := a.free[at]
		first := e.first
		if at == start && i == 0 && a.hand > first {
			first = a.hand // the middle of the extent
		}
		if first+n <= e.first+e.n {
			a.cut(at, first, n)
			return a.taken(first, n)
		}
	}
	// The part of its extent before the hand.
	if start < len(a.free) && a.free[start].n >= n {
		first := a.free[start].first
		a.cut(start, first, n)
		return a.taken(first, n)
	}
	return 0, false, fmt.Errorf("%w: no %d in a row of %d", ErrFull, n, a.max)
}

func (a *blockAllocator) taken(first, n uint32) (uint32, bool, error) {
	used := first < a.high
	a.hand = first + n
	a.high = max(a.high, a.hand)
	return first, used, nil
}

// cut removes n ids, starting at first, from the extent at index at.
func (a *blockAllocator) cut(at int, first, n uint32) {
	e := a.free[at]
	var rest []extent
	if first > e.first {
		rest = append(rest, extent{e.first, first - e.first})
	}
	if end := e.first + e.n; first+n < end {
		rest = append(rest, extent{first + n, end - first - n})
	}
	a.free = slices.Replace(a.free, at, at+1, rest...)
}

func (a *blockAllocator) give(first, n uint32) {
	at, _ := slices.BinarySearchFunc(a.free, first, func(e extent, first uint32) int {
		if e.first < first {
			return -1
		}
		return 1
	})
	e := extent{first, n}
	to := at
	if at < len(a.free) && a.free[at].first == e.first+e.n {
		e.n += a.free[at].n
		to++
	}
	if at > 0 && a.free[at-1].first+a.free[at-1].n == e.first {
		e = extent{a.free[at-1].first, a.free[at-1].n + e.n}
		at--
	}
	a.free = slices.Replace(a.free, at, to, e)
}

// adopt marks the blocks in use after a restart, and the rest as used before.
func (a *blockAllocator) adopt(inUse []extent) error {
	slices.SortFunc(inUse, func(x, y extent) int { return int(int64(x.first) - int64(y.first)) })
	a.free, a.high = a.free[:0], a.max
	var next uint32
	for _, e := range inUse {
		if e.first < next || uint64(e.first)+uint64(e.n) > uint64(a.max) {
			return fmt.Errorf("block %d+%d overlaps another or lies beyond %d", e.first, e.n, a.max)
		}
		if e.first > next {
			a.free = append(a.free, extent{next, e.first - next})
		}
		next = e.first + e.n
	}
	if next < a.max {
		a.free = append(a.free, extent{next, a.max - next})
	}
	return nil
}
