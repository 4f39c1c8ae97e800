package loader

import (
	"errors"
	"math/rand/v2"
	"slices"
	"testing"
)

// The allocators against a plain set of owners: nothing is allocated twice, nothing is refused
// while there is space, and "used before" is never forgotten.
func TestBlockAllocatorAgainstModel(t *testing.T) {
	for seed := range uint64(50) {
		random := rand.New(rand.NewPCG(seed, 5))
		size := uint32(1 + random.IntN(100))
		a := newBlockAllocator(size)
		held, before := make([]bool, size), make([]bool, size)
		var blocks []extent
		for range 2000 {
			switch op := random.IntN(20); {
			case op == 0: // a restart forgets what was in use
				if err := a.adopt(slices.Clone(blocks)); err != nil {
					t.Fatalf("seed %d: adopt %v: %v", seed, blocks, err)
				}
				for i := range before {
					before[i] = true
				}
			case op < 11:
				n := uint32(1 + random.IntN(8))
				first, used, err := a.take(n)
				if err != nil {
					if !errors.Is(err, ErrFull) || hasRoom(held, int(n)) {
						t.Fatalf("seed %d: %d refused (%v) with %v held", seed, n, err, held)
					}
					continue
				}
				wasUsed := false
				for i := first; i < first+n; i++ {
					if i >= size || held[i] {
						t.Fatalf("seed %d: %d+%d is held or beyond %d", seed, first, n, size)
					}
					wasUsed = wasUsed || before[i]
					held[i], before[i] = true, true
				}
				if wasUsed && !used {
					t.Fatalf("seed %d: %d+%d was used before", seed, first, n)
				}
				blocks = append(blocks, extent{first, n})
			case len(blocks) > 0:
				at := random.IntN(len(blocks))
				e := blocks[at]
				blocks = slices.Delete(blocks, at, at+1)
				a.give(e.first, e.n)
				for i := e.first; i < e.first+e.n; i++ {
					held[i] = false
				}
			}
			var free []bool
			for i := range size {
				free = append(free, slices.ContainsFunc(a.free, func(e extent) bool { return i >= e.first && i < e.first+e.n }))
			}
			for i := range free {
				if free[i] == held[i] {
					t.Fatalf("seed %d: number %d is held: %v, free: %v", seed, i, held[i], free[i])
				}
			}
			for i, e := range a.free {
				if i > 0 && a.free[i-1].first+a.free[i-1].n >= e.first {
					t.Fatalf("seed %d: free blocks are not sorted and apart: %v", seed, a.free)
				}
			}
		}
	}
}

func hasRoom(held []bool, n int) bool {
	run := 0
	for _, h := range held {
		if run++; h {
			run = 0
		}
		if run == n {
			return true
		}
	}
	return false
}

// What was freed is reused as late as possible.
func TestAllocatorsGoRound(t *testing.T) {
	ids, blocks := newIDAllocator(8), newBlockAllocator(8)
	for i := range uint32(20) {
		id, used, err := ids.take()
		if err != nil || id != i%8 || used != (i >= 8) {
			t.Errorf("id %d: %d, used %v, %v", i, id, used, err)
		}
		ids.give(id)
		first, used, err := blocks.take(2)
		if err != nil || first != 2*i%8 || used != (i >= 4) {
			t.Errorf("block %d: %d, used %v, %v", i, first, used, err)
		}
		blocks.give(first, 2)
	}
}

func TestIDAllocatorAgainstModel(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 6))
	const size = 20
	a := newIDAllocator(size)
	held, before := map[uint32]bool{}, map[uint32]bool{}
	for range 5000 {
		switch op := random.IntN(30); {
		case op == 0:
			a.adopt(has(held))
			for id := range uint32(size) {
				before[id] = true
			}
		case op < 16:
			id, used, err := a.take()
			if err != nil {
				if !errors.Is(err, ErrFull) || len(held) < size {
					t.Fatalf("refused with %d of %d held: %v", len(held), size, err)
				}
				continue
			}
			if held[id] || id >= size || used != before[id] {
				t.Fatalf("number %d: held %v, used before %v, said %v", id, held[id], before[id], used)
			}
			held[id], before[id] = true, true
		default:
			for id := range held {
				delete(held, id)
				a.give(id)
				break
			}
		}
		if got := freeIDs(a); got != size-len(held) {
			t.Fatalf("%d are free, want %d", got, size-len(held))
		}
	}
}

func TestBlockAllocatorRefusesDamage(t *testing.T) {
	for _, blocks := range [][]extent{
		{{0, 2}, {1, 2}}, {{5, 1}, {5, 1}}, {{0, 11}}, {{10, 1}}, {{9, 2}}, {{1<<32 - 1, 2}}, {{4, 4}, {0, 5}},
	} {
		if err := newBlockAllocator(10).adopt(blocks); err == nil {
			t.Errorf("adopts %v", blocks)
		}
	}
	if err := newBlockAllocator(10).adopt([]extent{{8, 2}, {0, 3}, {3, 1}}); err != nil {
		t.Errorf("refuses good blocks: %v", err)
	}
}
