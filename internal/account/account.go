// Package account keeps the counters of the user-space paths: cells in memory that outlives the
// process, a shared mapping of the pinned map user_stats. A worker adds to its own cells with plain
// stores, so counting needs no system call and no lock, and the counts survive if the process is
// killed.
//
// Memory is taken piece by piece, as counters need it: with 100,000 rules, most of which are forwarded in the kernel, all of
// it would be most of what the daemon has resident.
//
// # Ownership
//
// The [Account] belongs to the loader, which assigns ids to rules and outputs. A path opens
// [Counters] of a rule or output, and each of its workers takes the cells that it needs from there.
// Cells of closed counters stay, and the next worker reuses them. All methods may be called from
// any goroutine; a [Cell] has one writer at a time.
package account

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"
)

// Scope is what a cell counts for.
type Scope uint8

// The scopes (enum user_scope of bpf/include/abi.h).
const (
	Rule   Scope = 1 + iota // ID: id of a rule
	Output                  // ID: index of an output's counters
	Total                   // drops of removed rules, and drops without a rule
	Input                   // ID: interface index; lost on the way to workers
	Device                  // ID: interface index; lost after senders
	loose                   // of counters without id
	header                  // the first cell: how many chunks were ever used
)

// Kind is what a cell counts.
type Kind uint8

// The kinds (enum user_kind of bpf/include/abi.h). Notes and drop reasons follow
// FirstNote and FirstDrop.
const (
	Matched       Kind = iota // reached a worker, which found the rule
	Delivered                 // reached a worker; already matched by the relay program
	Sent                      // handed to the device
	FragmentFirst             // as enum fragment_kind
	FragmentLater
	FragmentOrphan
	Unsent   // counted as sent, but refused by the device
	NoFrame  // no receive memory was free
	RingFull // the worker did not keep up
	RuleGone // the rule was removed meanwhile

	FirstNote Kind = 16
	FirstDrop Kind = 32
)

// Target is what Counters count for.
type Target struct {
	Scope Scope
	ID    uint32
}

// Writer distinguishes the cells of a path's worker from those of others.
type Writer uint16

const workerBits = 14

// WriterOf is a worker of a path; both are small numbers.
func WriterOf(path uint8, worker int) Writer {
	return Writer(path)<<workerBits | Writer(worker)&(1<<workerBits-1)
}

// Path is the path of a writer.
func (w Writer) Path() uint8 { return uint8(w >> workerBits) }

// Cell is a counter: struct user_counter of bpf/include/abi.h. Each of its numbers is exact; a
// reader may see an addition to only one of them.
type Cell struct {
	key, packets, bytes, lastSeen atomic.Uint64
}

// CellSize is the size of a cell in bytes.
const CellSize = int(unsafe.Sizeof(Cell{}))

// Add adds to the cell. It needs no locked instruction, since a cell has one writer.
func (c *Cell) Add(packets, bytes uint64) {
	c.packets.Store(c.packets.Load() + packets)
	c.bytes.Store(c.bytes.Load() + bytes)
}

// Seen sets the time of the last packet, in nanoseconds of CLOCK_MONOTONIC.
func (c *Cell) Seen(at int64) { c.lastSeen.Store(uint64(at)) }

// Sum is the sum of cells. LastSeen is 0 for never.
type Sum struct{ Packets, Bytes, LastSeen uint64 }

func (s *Sum) add(c *Cell) {
	s.Packets += c.packets.Load()
	s.Bytes += c.bytes.Load()
	s.LastSeen = max(s.LastSeen, c.lastSeen.Load())
}

// key is the first eight bytes of struct user_counter, little-endian like the programs.
type key uint64

func keyOf(t Target, kind Kind, w Writer) key {
	return key(t.ID) | key(t.Scope)<<32 | key(kind)<<40 | key(w)<<48
}

func (k key) target() Target { return Target{Scope(k >> 32), uint32(k)} }
func (k key) kind() Kind     { return Kind(k >> 40) }
func (k key) writer() Writer { return Writer(k >> 48) }

// chunk is the number of cells that a worker gets at once: a page, so that workers share no cache
// line.
const chunk = 4096 / CellSize

// ref is a cell in use.
type ref struct {
	*Cell
	used bool // a worker has it
}

func (r *ref) is() key { return key(r.key.Load()) }

// Account is all cells of a pin directory.
type Account struct {
	mu      sync.Mutex
	memory  Memory
	pieces  [][]Cell           // those that are open; nil after the end
	chunks  int                // ever used
	empty   []int              // of these, chunks without a cell in use
	free    map[Writer][]*Cell // by the writer that owns their chunk
	targets map[Target][]*ref
	open    map[Target][]*Counters
	loose   []*ref // of open counters without id
	waits   map[int]func()
	nextID  int

	frozen bool // take no more chunks
	joined int  // chunks whose unused cells were not taken over; Refresh takes them over

	handles  int // open counters
	closed   bool
	overflow bool
}

// PieceSize is the size of a piece of Memory in bytes, a multiple of every page size.
const PieceSize = 256 << 10

// Memory is the place of an account, which is initially zero.
type Memory interface {
	// Size is the size in bytes, a multiple of that of a page on x86, 4096.
	Size() int
	// Piece makes the piece of this number accessible, until Close: bytes from number * PieceSize on. The last piece may
	// be shorter than PieceSize. It is called once for each piece.
	Piece(number int) ([]byte, error)
	// Close is called once, after Account.Close and when no counters are open.
	Close() error
}

// Bytes is Memory that is accessible as a whole.
type Bytes []byte

// Size implements Memory.
func (b Bytes) Size() int { return len(b) }

// Piece implements Memory.
func (b Bytes) Piece(number int) ([]byte, error) {
	return b[number*PieceSize : min((number+1)*PieceSize, len(b))], nil
}

// Close implements Memory.
func (b Bytes) Close() error { return nil }

// New takes over an account in memory, and owns the memory if there is no error. It fails if the memory
// does not hold an account.
func New(memory Memory) (*Account, error) { return takeOver(memory, false) }

// Join is New while another process, which must have called Freeze and will end, counts in the same
// memory: until Refresh it takes no existing cells except those that the other process uses and
// will leave to this one.
func Join(memory Memory) (*Account, error) { return takeOver(memory, true) }

func takeOver(memory Memory, join bool) (*Account, error) {
	if size := memory.Size(); size == 0 || size%(chunk*CellSize) != 0 {
		return nil, fmt.Errorf("account of %d bytes: want a multiple of %d", size, chunk*CellSize)
	}
	a := &Account{
		memory: memory, free: map[Writer][]*Cell{}, targets: map[Target][]*ref{}, open: map[Target][]*Counters{},
		waits: map[int]func(){},
	}
	if err := a.access(0); err != nil {
		return nil, err
	}
	first := a.cell(0)
	switch k := key(first.key.Load()); {
	case k == 0:
		first.key.Store(uint64(keyOf(Target{Scope: header}, 0, 0)))
	case k.target().Scope != header:
		return nil, fmt.Errorf("account begins with a cell of scope %d: want %d", k.target().Scope, header)
	}
	chunks := first.packets.Load()
	if most := memory.Size() / (chunk * CellSize); chunks > uint64(most) {
		return nil, fmt.Errorf("account has %d chunks in use of %d", chunks, most)
	}
	if join {
		a.joined = int(chunks)
	}
	for a.chunks < int(chunks) {
		if err := errors.Join(a.access(a.chunks), a.adopt(a.chunks, nil)); err != nil {
			return nil, err
		}
		a.chunks++
	}
	return a, nil
}

// pieceCells is the number of cells of a piece.
const pieceCells = PieceSize / CellSize

// access makes a chunk accessible; those before it are.
func (a *Account) access(chunkNumber int) error {
	number := chunkNumber * chunk / pieceCells
	if number < len(a.pieces) {
		return nil
	}
	piece, err := a.memory.Piece(number)
	if err != nil {
		return fmt.Errorf("account: %w", err)
	}
	a.pieces = append(a.pieces, unsafe.Slice((*Cell)(unsafe.Pointer(unsafe.SliceData(piece))), len(piece)/CellSize))
	return nil
}

// cell is a cell of an accessible chunk.
func (a *Account) cell(i int) *Cell { return &a.pieces[i/pieceCells][i%pieceCells] }

// NewInMemory makes an account that ends with the process.
func NewInMemory() *Account {
	const cells = 64 * chunk
	memory := make([]Cell, cells)
	bytes := unsafe.Slice((*byte)(unsafe.Pointer(&memory[0])), cells*CellSize)
	a, err := New(Bytes(bytes))
	if err != nil {
		panic(err) // the size is valid, and the memory empty
	}
	return a
}

// adopt takes over the cells of a chunk, except known ones. Cells without id when their process
// ended belong to no rule; only their drops count in the total.
func (a *Account) adopt(n int, known map[*Cell]bool) error {
	var owner Writer
	var spare []*Cell
	owned := false
	for i := range chunk {
		c := a.cell(n*chunk + i)
		k := key(c.key.Load())
		t := k.target()
		switch {
		case n == 0 && i == 0:
			continue
		case known[c]:
			if k != 0 {
				owner, owned = k.writer(), true
			}
			continue
		case k == 0:
			spare = append(spare, c)
			continue
		case t.Scope >= header:
			return fmt.Errorf("account: cell %d has scope %d: want 1 to %d", n*chunk+i, t.Scope, loose)
		case !owned:
			owner, owned = k.writer(), true
		}
		if t.Scope == loose {
			if n < a.joined {
				continue // the other process has it
			}
			a.retire(&ref{Cell: c})
			continue
		}
		a.targets[t] = append(a.targets[t], &ref{Cell: c})
	}
	if n < a.joined {
		return nil
	}
	if !owned && n > 0 && len(spare) == chunk {
		a.empty = append(a.empty, n)
		return nil
	}
	for _, c := range spare {
		clearCell(c) // a process died between its two steps
	}
	a.free[owner] = append(a.free[owner], spare...)
	return nil
}

// clearCell frees a cell: the key first, so that its numbers are never attributed to its next
// target.
func clearCell(c *Cell) {
	c.key.Store(0)
	c.packets.Store(0)
	c.bytes.Store(0)
	c.lastSeen.Store(0)
}

// take returns a zero cell, from the writer's own cache lines as long as there are any, and from
// the heap if all are in use.
func (a *Account) take(w Writer) *Cell {
	if len(a.free[w]) == 0 {
		a.grow(w)
	}
	for len(a.free[w]) == 0 {
		other, ok := a.anyFree()
		if !ok {
			a.overflow = true
			return &Cell{}
		}
		w = other
	}
	all := a.free[w]
	c := all[len(all)-1]
	a.free[w] = all[:len(all)-1]
	return c
}

func (a *Account) anyFree() (Writer, bool) {
	for w, cells := range a.free {
		if len(cells) > 0 {
			return w, true
		}
	}
	return 0, false
}

// grow gives a writer another chunk, if there is one.
func (a *Account) grow(w Writer) {
	n := a.chunks
	switch {
	case a.frozen:
		return
	case len(a.empty) > 0:
		n, a.empty = a.empty[len(a.empty)-1], a.empty[:len(a.empty)-1]
	case (n+1)*chunk*CellSize <= a.memory.Size() && a.access(n) == nil:
		a.chunks++
		a.cell(0).packets.Store(uint64(a.chunks))
	default:
		return
	}
	for i := chunk - 1; i >= 0; i-- {
		if n+i > 0 {
			c := a.cell(n*chunk + i)
			clearCell(c)
			a.free[w] = append(a.free[w], c)
		}
	}
}

// Freeze makes this account take no more chunks, since another process does from now on, with Join.
func (a *Account) Freeze() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.frozen = true
}

// Refresh takes over the cells that the other process left after Join: it has ended, or is paused.
func (a *Account) Refresh() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.joined == 0 || a.pieces == nil {
		return nil
	}
	known := map[*Cell]bool{}
	for _, refs := range a.targets {
		for _, r := range refs {
			known[r.Cell] = true
		}
	}
	for _, free := range a.free {
		for _, c := range free {
			known[c] = true
		}
	}
	for _, r := range a.loose {
		known[r.Cell] = true
	}
	joined := a.joined
	a.joined = 0
	for n := range joined {
		if err := a.adopt(n, known); err != nil {
			return err
		}
	}
	return nil
}

// Full says whether there were too few cells: counts in the others are lost with the process.
func (a *Account) Full() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.overflow
}

// Close frees the memory once no counters are open.
func (a *Account) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return nil
	}
	a.closed = true
	return a.release()
}

func (a *Account) release() error {
	if !a.closed || a.handles > 0 || a.pieces == nil {
		return nil
	}
	a.pieces, a.targets, a.free = nil, nil, nil
	return a.memory.Close()
}

// Retire says that a rule or output was removed. Its drops move to the total; open counters lose
// their id.
func (a *Account) Retire(t Target) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.open[t] {
		a.loosen(c)
	}
	delete(a.open, t)
	for _, r := range a.targets[t] {
		a.retire(r)
	}
	delete(a.targets, t)
}

// RetireOthers is Retire for all interfaces and all rules and outputs that do not stay.
func (a *Account) RetireOthers(stays func(Target) bool) {
	a.mu.Lock()
	var gone []Target
	for t := range a.targets {
		if t.Scope != Total && !stays(t) {
			gone = append(gone, t)
		}
	}
	a.mu.Unlock()
	for _, t := range gone {
		a.Retire(t)
	}
}

// retire frees a cell that is no longer in any list. The first cell of a drop reason becomes that
// of the total, in one store.
func (a *Account) retire(r *ref) {
	k := r.is()
	if k.kind() < FirstDrop {
		a.give(r.Cell, k.writer())
		return
	}
	total := Target{Scope: Total}
	for _, to := range a.targets[total] {
		if to.is().kind() == k.kind() && !to.used {
			to.Add(r.packets.Load(), r.bytes.Load())
			a.give(r.Cell, k.writer())
			return
		}
	}
	r.used = false
	r.key.Store(uint64(keyOf(total, k.kind(), k.writer())))
	a.targets[total] = append(a.targets[total], r)
}

func (a *Account) give(c *Cell, w Writer) {
	clearCell(c)
	a.free[w] = append(a.free[w], c)
}

// Sums are the sums of all cells of a target, by kind.
func (a *Account) Sums(t Target) map[Kind]Sum {
	a.mu.Lock()
	defer a.mu.Unlock()
	return sums(a.targets[t])
}

func sums(refs []*ref) map[Kind]Sum {
	if len(refs) == 0 {
		return nil
	}
	all := make(map[Kind]Sum, len(refs))
	for _, r := range refs {
		kind := r.is().kind()
		sum := all[kind]
		sum.add(r.Cell)
		all[kind] = sum
	}
	return all
}

// Each calls yield for the counts of each writer, of all targets and of counters without id, whose
// Target is zero. yield must not call the account.
func (a *Account) Each(yield func(Target, Kind, Writer, Sum)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	one := func(t Target, r *ref) {
		var sum Sum
		sum.add(r.Cell)
		yield(t, r.is().kind(), r.is().writer(), sum)
	}
	for t, refs := range a.targets {
		for _, r := range refs {
			one(t, r)
		}
	}
	for _, r := range a.loose {
		one(Target{}, r)
	}
}

// OnSettle makes Settle call fn, until cancel is called.
func (a *Account) OnSettle(fn func()) (cancel func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	id := a.nextID
	a.nextID++
	a.waits[id] = fn
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.waits, id)
	}
}

// Settle returns when every packet in the workers, or waiting for them, has been counted.
func (a *Account) Settle() {
	a.mu.Lock()
	var all []func()
	for _, fn := range a.waits {
		all = append(all, fn)
	}
	a.mu.Unlock()
	for _, fn := range all {
		fn()
	}
}

// Counters are the open counters of a target.
type Counters struct {
	account *Account
	scope   Scope
	id      uint32
	bound   bool
	closed  bool
	refs    []*ref
}

// Open opens the counters of a target. The caller must Close them.
func (a *Account) Open(t Target) *Counters {
	c := a.OpenLoose(t.Scope)
	c.Bind(t.ID)
	return c
}

// OpenLoose opens counters of a rule or output that has no id yet.
func (a *Account) OpenLoose(s Scope) *Counters {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.handles++
	return &Counters{account: a, scope: s}
}

func (c *Counters) target() Target { return Target{c.scope, c.id} }

// Bind assigns the id of their rule or output to counters, including their counts so far. It does
// nothing if they have one.
func (c *Counters) Bind(id uint32) {
	a := c.account
	a.mu.Lock()
	defer a.mu.Unlock()
	if c.bound || c.closed {
		return
	}
	c.bound, c.id = true, id
	t := c.target()
	a.open[t] = append(a.open[t], c)
	for _, r := range c.refs {
		k := r.is()
		r.key.Store(uint64(keyOf(t, k.kind(), k.writer())))
		a.targets[t] = append(a.targets[t], r)
	}
	a.dropLoose(c.refs)
}

// Bound says whether the counters have an id.
func (c *Counters) Bound() bool {
	c.account.mu.Lock()
	defer c.account.mu.Unlock()
	return c.bound
}

// Loosen removes the id again.
func (c *Counters) Loosen() {
	a := c.account
	a.mu.Lock()
	defer a.mu.Unlock()
	if !c.bound {
		return
	}
	t := c.target()
	a.open[t] = without(a.open[t], c)
	a.loosen(c)
}

func (a *Account) loosen(c *Counters) {
	t := c.target()
	c.bound = false
	for _, r := range c.refs {
		k := r.is()
		r.key.Store(uint64(keyOf(Target{Scope: loose}, k.kind(), k.writer())))
		a.targets[t] = without(a.targets[t], r)
	}
	a.loose = append(a.loose, c.refs...)
}

func (a *Account) dropLoose(refs []*ref) {
	for _, r := range refs {
		a.loose = without(a.loose, r)
	}
}

func without[T comparable](all []T, one T) []T {
	for i := range all {
		if all[i] == one {
			all[i] = all[len(all)-1]
			return all[:len(all)-1]
		}
	}
	return all
}

// Cell returns a cell for one worker, until the counters are closed: with its earlier counts, or
// those of another worker by this name.
func (c *Counters) Cell(w Writer, kind Kind) *Cell {
	a := c.account
	a.mu.Lock()
	defer a.mu.Unlock()
	if c.closed || c.account.pieces == nil {
		return &Cell{} // counts for nothing
	}
	k := keyOf(Target{Scope: loose}, kind, w)
	if c.bound {
		k = keyOf(c.target(), kind, w)
		for _, r := range a.targets[c.target()] {
			if !r.used && r.is() == k {
				r.used = true
				c.refs = append(c.refs, r)
				return r.Cell
			}
		}
	}
	r := &ref{Cell: a.take(w), used: true}
	r.key.Store(uint64(k))
	c.refs = append(c.refs, r)
	if c.bound {
		a.targets[c.target()] = append(a.targets[c.target()], r)
	} else {
		a.loose = append(a.loose, r)
	}
	return r.Cell
}

// Sums are the target's sums, by kind; without an id, those of these counters.
func (c *Counters) Sums() map[Kind]Sum {
	c.account.mu.Lock()
	defer c.account.mu.Unlock()
	if c.bound {
		return sums(c.account.targets[c.target()])
	}
	return sums(c.refs)
}

// Close ends the use of the counters: their cells must not be written any more. The counts remain,
// unless the counters have no id: then only drops do, in the total.
func (c *Counters) Close() error {
	a := c.account
	a.mu.Lock()
	defer a.mu.Unlock()
	if c.closed {
		return fmt.Errorf("close counters: %w", os.ErrClosed)
	}
	c.closed = true
	for _, r := range c.refs {
		r.used = false
	}
	if c.bound {
		a.open[c.target()] = without(a.open[c.target()], c)
		if len(a.open[c.target()]) == 0 {
			delete(a.open, c.target())
		}
	} else {
		a.dropLoose(c.refs)
		for _, r := range c.refs {
			a.retire(r)
		}
	}
	c.refs = nil
	a.handles--
	return a.release()
}

// RuleCounters are the counters of a rule and of its outputs, by slot.
type RuleCounters struct {
	Rule    *Counters
	Outputs []*Counters
}

// OpenRule opens counters of a rule that has no id yet.
func (a *Account) OpenRule(outputs int) *RuleCounters {
	r := &RuleCounters{Rule: a.OpenLoose(Rule), Outputs: make([]*Counters, outputs)}
	for i := range r.Outputs {
		r.Outputs[i] = a.OpenLoose(Output)
	}
	return r
}

// Bind assigns the ids of the rule and its outputs; those of the outputs are consecutive.
func (r *RuleCounters) Bind(rule, firstOutput uint32) {
	r.Rule.Bind(rule)
	for i, o := range r.Outputs {
		o.Bind(firstOutput + uint32(i))
	}
}

// IDs returns the ids given to Bind; ok is false without.
func (r *RuleCounters) IDs() (rule, firstOutput uint32, ok bool) {
	a := r.Rule.account
	a.mu.Lock()
	defer a.mu.Unlock()
	if !r.Rule.bound || len(r.Outputs) == 0 || !r.Outputs[0].bound {
		return 0, 0, false
	}
	return r.Rule.id, r.Outputs[0].id, true
}

// Loosen removes the ids again.
func (r *RuleCounters) Loosen() {
	r.Rule.Loosen()
	for _, o := range r.Outputs {
		o.Loosen()
	}
}

// Closed says whether Close was called.
func (r *RuleCounters) Closed() bool {
	r.Rule.account.mu.Lock()
	defer r.Rule.account.mu.Unlock()
	return r.Rule.closed
}

// Close is like Counters.Close.
func (r *RuleCounters) Close() error {
	errs := []error{r.Rule.Close()}
	for _, o := range r.Outputs {
		errs = append(errs, o.Close())
	}
	return errors.Join(errs...)
}
