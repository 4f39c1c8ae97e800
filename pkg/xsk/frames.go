package xsk

import "fmt"

// Frames allocates frames of a UMEM and counts the references to each. It belongs to
// one goroutine at a time, together with every socket opened with it.
//
// A reference is held by the caller or by a ring. Get and Receive give the caller one;
// Retain adds some; Send and Fill pass one to a ring; Complete and Release drop one. A
// frame with no references is free.
type Frames struct {
	umem    *UMEM
	first   uint64   // the number of frame 0 in the UMEM
	refs    []uint32 // of each frame; 0: free
	free    []uint32 // a stack, so that the last frame used, still in the cache, is reused first
	held    []uint32 // with CheckOwnership: references that the caller holds
	sockets []*Socket
	stuck   map[uint32]uint32 // references lost with closed sockets, by frame
	err     error             // the first violation
}

func newFrames(u *UMEM, first, n int) *Frames {
	f := &Frames{umem: u, first: uint64(first), refs: make([]uint32, n), free: make([]uint32, n)}
	for i := range f.free { // the lowest address on top
		f.free[i] = uint32(n - 1 - i)
	}
	if u.opts.CheckOwnership {
		f.held = make([]uint32, n)
	}
	return f
}

// UMEM returns the memory to which the frames belong.
func (f *Frames) UMEM() *UMEM { return f.umem }

// Len returns the number of frames.
func (f *Frames) Len() int { return len(f.refs) }

// Free returns the number of free frames.
func (f *Frames) Free() int { return len(f.free) }

// Retired returns how many frames can never be used again because sockets were closed
// while a driver could still read or write them: all frames in the rings of a zero-copy
// socket, and those of a copy-mode socket that the driver had not completed.
func (f *Frames) Retired() int { return len(f.stuck) }

// Get returns the address of a free frame, in bytes from the start of the UMEM, with one
// reference held by the caller; false if no frame is free.
func (f *Frames) Get() (addr uint64, ok bool) {
	i, ok := f.pop()
	if !ok {
		return 0, false
	}
	if f.held != nil {
		f.held[i] = 1
	}
	return f.addr(i), true
}

// Retain adds n references to the frame at an address, all held by the caller, who
// must hold one already.
func (f *Frames) Retain(addr uint64, n int) {
	i, ok := f.index(addr)
	if !ok || f.refs[i] == 0 || n < 0 {
		f.violation("retain", addr)
		return
	}
	if f.held != nil {
		if f.held[i] == 0 {
			f.violation("retain", addr)
			return
		}
		f.held[i] += uint32(n)
	}
	f.refs[i] += uint32(n)
}

// Release drops one reference that the caller holds to the frame at an address; any
// address inside the frame will do.
func (f *Frames) Release(addr uint64) {
	i, ok := f.index(addr)
	if !ok || f.refs[i] == 0 || f.held != nil && f.held[i] == 0 {
		f.violation("release", addr)
		return
	}
	if f.held != nil {
		f.held[i]--
	}
	f.drop(i)
}

// ReleaseAll calls Release for the frame of each descriptor.
func (f *Frames) ReleaseAll(descs []Desc) {
	for i := range descs {
		f.Release(descs[i].Addr)
	}
}

// Verify returns the first use of a frame without a reference, as an
// [*OwnershipError]: a double release always, and with CheckOwnership every use of a
// frame that is free or in a ring. With CheckOwnership it also counts all references.
func (f *Frames) Verify() error {
	if f.err != nil || f.held == nil {
		return f.err
	}
	free := make([]bool, len(f.refs))
	for _, i := range f.free {
		if free[i] || f.refs[i] != 0 {
			return &OwnershipError{"count", f.addr(i), "free twice, or free and in use"}
		}
		free[i] = true
	}
	for i, refs := range f.refs {
		rings := f.stuck[uint32(i)]
		for _, s := range f.sockets {
			rings += s.inTX[i]
			if s.inFill[i] {
				rings++
			}
		}
		if f.held[i]+rings != refs {
			return &OwnershipError{"count", f.addr(uint32(i)), fmt.Sprintf("referred to %d times, held %d and in rings %d times", refs, f.held[i], rings)}
		}
	}
	return nil
}

func (f *Frames) addr(i uint32) uint64 { return (f.first + uint64(i)) << f.umem.shift }

// index returns the number of the frame that contains an address, if it is one of f's.
func (f *Frames) index(addr uint64) (uint32, bool) {
	i := addr>>f.umem.shift - f.first // wraps below first
	return uint32(i), i < uint64(len(f.refs))
}

// pop takes a free frame, with one reference held by the caller.
func (f *Frames) pop() (uint32, bool) {
	last := len(f.free) - 1
	if last < 0 {
		return 0, false
	}
	i := f.free[last]
	f.free = f.free[:last]
	f.refs[i] = 1
	return i, true
}

// drop drops a reference.
func (f *Frames) drop(i uint32) {
	f.refs[i]--
	if f.refs[i] == 0 {
		f.free = append(f.free, i) // never grows: it has room for all
	}
}

// retire records lost references: the frame is never free again.
func (f *Frames) retire(i, refs uint32) {
	if f.stuck == nil {
		f.stuck = make(map[uint32]uint32)
	}
	f.stuck[i] += refs
}

func (f *Frames) violation(op string, addr uint64) {
	if f.err == nil {
		f.err = &OwnershipError{op, addr, f.whereabouts(addr)}
	}
}

func (f *Frames) whereabouts(addr uint64) string {
	i, ok := f.index(addr)
	switch {
	case !ok:
		return "of another owner"
	case f.refs[i] == 0:
		return "free"
	}
	for _, s := range f.sockets {
		if s.inFill[i] {
			return fmt.Sprintf("in the fill ring of interface %d, queue %d", s.ifindex, s.queue)
		}
		if s.inTX[i] > 0 {
			return fmt.Sprintf("in the TX ring of interface %d, queue %d", s.ifindex, s.queue)
		}
	}
	return "in use"
}
