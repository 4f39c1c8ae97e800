package account

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"unsafe"
)

// memory is what a process leaves to the next.
func memory(chunks int) []byte {
	cells := make([]Cell, chunks*chunk)
	return unsafe.Slice((*byte)(unsafe.Pointer(&cells[0])), len(cells)*CellSize)
}

func open(t *testing.T, m []byte) *Account {
	t.Helper()
	a, err := New(Bytes(m))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// counted is memory that counts what is done with it.
type counted struct {
	Bytes
	pieces []int // by number
	closed int
	err    error // of the next piece
}

func (c *counted) Piece(number int) ([]byte, error) {
	if c.err != nil {
		return nil, c.err
	}
	c.pieces = append(c.pieces, number)
	return c.Bytes.Piece(number)
}

func (c *counted) Close() error { c.closed++; return nil }

func total(a *Account, kind Kind) (n uint64) {
	a.Each(func(_ Target, k Kind, _ Writer, sum Sum) {
		if k == kind {
			n += sum.Packets
		}
	})
	return n
}

// What was counted is there for the next process, killed or not, by target and kind; a
// worker that comes again goes on with its cell.
func TestNextProcess(t *testing.T) {
	m := memory(8)
	rule := Target{Rule, 7}
	for process := uint64(1); process <= 3; process++ {
		a := open(t, m)
		c := a.Open(rule)
		cell := c.Cell(WriterOf(2, 1), Matched)
		cell.Add(10, 1000)
		cell.Seen(int64(process))
		other := c.Cell(WriterOf(3, 1), Matched)
		other.Add(1, 100)
		if got := a.Sums(rule)[Matched]; got != (Sum{11 * process, 1100 * process, process}) {
			t.Fatalf("process %d: %+v", process, got)
		}
		if n := len(a.targets[rule]); n != 2 {
			t.Errorf("process %d: %d cells, want one a writer", process, n)
		}
	}
}

// Counters that have no number get one with what they have counted, and lose it again
// with their rule.
func TestBind(t *testing.T) {
	m := memory(4)
	a := open(t, m)
	r := a.OpenRule(2)
	r.Outputs[1].Cell(1, Sent).Add(3, 30)
	r.Bind(5, 40)
	r.Outputs[1].Cell(2, Sent).Add(4, 40)
	if got := a.Sums(Target{Output, 41})[Sent]; got.Packets != 7 || got.Bytes != 70 {
		t.Errorf("bound: %+v", got)
	}
	if got := open(t, m).Sums(Target{Output, 41})[Sent]; got.Packets != 7 {
		t.Errorf("the next process reads %+v", got)
	}
	drop := r.Outputs[1].Cell(1, FirstDrop+3)
	drop.Add(2, 20)
	a.Retire(Target{Output, 41})
	drop.Add(1, 10) // a worker that has not heard of it yet
	if got := a.Sums(Target{Output, 41}); len(got) != 0 {
		t.Errorf("retired: %+v", got)
	}
	// The number is another rule's now, and its counters begin with nothing.
	next := a.Open(Target{Output, 41})
	next.Cell(1, Sent).Add(1, 1)
	if got := a.Sums(Target{Output, 41})[Sent].Packets; got != 1 {
		t.Errorf("the next rule begins with %d", got-1)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if err := r.Close(); err == nil {
		t.Error("closed twice")
	}
	if got := total(a, FirstDrop+3); got != 3 {
		t.Errorf("%d drops in total, want 3", got)
	}
	if got := a.Sums(Target{Scope: Total})[FirstDrop+3].Packets; got != 3 {
		t.Errorf("%d drops of rules that are gone, want 3", got)
	}
}

// Workers share no cache line, as long as there is room; without room nothing panics,
// what is counted is read, and Full says so.
func TestCellsOfWorkers(t *testing.T) {
	a := open(t, memory(4))
	const line = 64
	owner := map[uintptr]Writer{}
	for i := range chunk {
		for w := range Writer(3) {
			cell := a.Open(Target{Rule, uint32(i)}).Cell(w, Matched)
			at := uintptr(unsafe.Pointer(cell)) / line
			if other, ok := owner[at]; ok && other != w {
				t.Fatalf("writers %d and %d share a cache line", w, other)
			}
			owner[at] = w
		}
	}
	full := open(t, memory(1))
	for i := range 2 * chunk {
		full.Open(Target{Rule, uint32(i)}).Cell(0, Matched).Add(1, 1)
	}
	if got := total(full, Matched); !full.Full() || got != uint64(2*chunk) {
		t.Errorf("full: %v, counted %d, want %d", full.Full(), got, 2*chunk)
	}
}

// The memory is given back when the account and all counters are closed, not before.
func TestUnmap(t *testing.T) {
	m := &counted{Bytes: memory(2)}
	a, err := New(m)
	if err != nil {
		t.Fatal(err)
	}
	c := a.Open(Target{Rule, 1})
	cell := c.Cell(0, Matched)
	for range 2 {
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
	}
	cell.Add(1, 1)
	if m.closed != 0 {
		t.Fatal("unmapped while a worker counts")
	}
	if err := c.Close(); err != nil || m.closed != 1 {
		t.Errorf("%v, unmapped %d times", err, m.closed)
	}
	if len(a.Sums(Target{Rule, 1})) != 0 {
		t.Error("a closed account has sums")
	}
}

// Pieces of the memory are opened as counters need them, and by the next process as far as this one got.
func TestPieces(t *testing.T) {
	const most = PieceSize / CellSize // cells of a piece
	m := &counted{Bytes: memory(3*most/chunk - 1)}
	a, err := New(m)
	if err != nil {
		t.Fatal(err)
	}
	want := func(pieces ...int) {
		t.Helper()
		if !slices.Equal(m.pieces, pieces) {
			t.Fatalf("pieces %v are open, want %v", m.pieces, pieces)
		}
	}
	want(0)
	count := func(n int) {
		for i := range n {
			a.Open(Target{Output, uint32(i)}).Cell(0, Matched).Add(1, 1)
		}
	}
	count(most - chunk)
	want(0)
	count(chunk)
	want(0, 1)
	m.err = errors.New("no memory")
	count(2 * most)
	if want(0, 1); !a.Full() {
		t.Error("it is not full")
	}
	sum := total(a, Matched)
	m.pieces, m.err = nil, nil
	if a, err = New(m); err != nil {
		t.Fatal(err)
	}
	want(0, 1)
	if kept := total(a, Matched); kept > sum || int(kept) < 2*most-chunk {
		t.Errorf("the next process counted %d of %d", kept, sum)
	}
	count(3 * most)
	want(0, 1, 2)
}

// A pin is foreign input.
func TestDamagedMemory(t *testing.T) {
	for name, damage := range map[string]func([]Cell){
		"header of another kind": func(c []Cell) { c[0].key.Store(uint64(keyOf(Target{Rule, 1}, 0, 0))) },
		"more pages than there are": func(c []Cell) {
			c[0].key.Store(uint64(keyOf(Target{Scope: header}, 0, 0)))
			c[0].packets.Store(99)
		},
		"unknown scope": func(c []Cell) {
			c[0].key.Store(uint64(keyOf(Target{Scope: header}, 0, 0)))
			c[0].packets.Store(1)
			c[3].key.Store(uint64(keyOf(Target{Scope: 99}, 0, 0)))
		},
	} {
		m := memory(2)
		damage(unsafe.Slice((*Cell)(unsafe.Pointer(&m[0])), 2*chunk))
		if _, err := New(Bytes(m)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	for _, n := range []int{0, 1, 4095} {
		if _, err := New(make(Bytes, n)); err == nil {
			t.Errorf("%d bytes: no error", n)
		}
	}
}

// Random openings, bindings, retirements, closings and processes: drops are never lost nor
// doubled, and each target has what was counted for it since it was last retired.
func TestRandom(t *testing.T) {
	for seed := range uint64(20) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) { randomRun(t, rand.New(rand.NewPCG(seed, 1))) })
	}
}

func randomRun(t *testing.T, r *rand.Rand) {
	type handle struct {
		c     *Counters
		id    uint32
		bound bool
		loose uint64 // counted without a number
		cells map[Kind]*Cell
	}
	m := memory(6)
	a := open(t, m)
	var handles []*handle
	want := map[uint32]uint64{} // sent by output
	var drops uint64
	for range 2000 {
		switch r.IntN(12) {
		case 0, 1:
			handles = append(handles, &handle{c: a.OpenLoose(Output), cells: map[Kind]*Cell{}})
		case 2:
			id := r.Uint32N(8)
			handles = append(handles, &handle{c: a.Open(Target{Output, id}), id: id, bound: true, cells: map[Kind]*Cell{}})
		case 3:
			id := r.Uint32N(8)
			a.Retire(Target{Output, id})
			for _, h := range handles {
				if h.bound && h.id == id {
					h.bound = false
					for kind, cell := range h.cells {
						if kind == Sent {
							h.loose = cell.packets.Load()
						}
					}
				}
			}
			delete(want, id)
		case 4:
			handles = nil
			a = open(t, m) // killed
		default:
			if len(handles) == 0 {
				continue
			}
			at := r.IntN(len(handles))
			h := handles[at]
			switch r.IntN(6) {
			case 0:
				if err := h.c.Close(); err != nil {
					t.Fatal(err)
				}
				handles = append(handles[:at], handles[at+1:]...)
			case 1:
				if !h.bound {
					h.id, h.bound = r.Uint32N(8), true
					h.c.Bind(h.id)
					want[h.id] += h.loose
				}
			default:
				kind := []Kind{Sent, FirstDrop + 1}[r.IntN(2)]
				if h.cells[kind] == nil {
					h.cells[kind] = h.c.Cell(Writer(r.IntN(3)), kind)
				}
				h.cells[kind].Add(1, 1)
				switch {
				case kind != Sent:
					drops++
				case h.bound:
					want[h.id]++
				default:
					h.loose++
				}
			}
		}
		if got := total(a, FirstDrop+1); got != drops {
			t.Fatalf("%d drops, want %d", got, drops)
		}
		for id := range uint32(8) {
			if got := a.Sums(Target{Output, id})[Sent].Packets; got != want[id] {
				t.Fatalf("output %d sent %d, want %d", id, got, want[id])
			}
		}
	}
}
