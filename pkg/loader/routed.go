package loader

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"xdpcast/bpf"
	"xdpcast/internal/account"
)

// routed are the published routed flows (flow.Flow.Routed). A flow is held from before it is
// published until ReleaseRouted, and again from HoldRouted on: while held, the kernel forwards its
// packets. The flag is a word in its first output, written through the memory mapping of map
// outputs so that a change in the kernel's routes takes effect without waiting for the control
// loop.
type routed struct {
	mu     sync.Mutex
	memory *pieces           // of map outputs; those with a first output are mapped
	first  map[string]uint32 // first outputs of published flows, by name
	held   map[string]bool   // which of them are held, by name
	alive  *os.File          // this process's socket in the map mirror; of the Loader's goroutine
}

// openRouted records the published flows.
func (l *Loader) openRouted() error {
	memory, err := piecesOf(l.maps.Outputs)
	if err != nil {
		return fmt.Errorf("map outputs: %w", err)
	}
	r := &l.routed
	r.mu.Lock()
	defer r.mu.Unlock()
	r.memory, r.first, r.held = memory, map[string]uint32{}, map[string]bool{}
	for name, e := range l.rules {
		if e.rule.Routed == 0 {
			continue
		}
		held, err := r.word(e.first)
		if err != nil {
			return err
		}
		r.first[name] = e.first
		if atomic.LoadUint32(held) != 0 {
			r.held[name] = true
		}
	}
	return nil
}

func (r *routed) close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	memory := r.memory
	r.memory, r.first, r.held = nil, nil, nil
	if memory == nil {
		return nil
	}
	return memory.Close()
}

// word is the held flag of an output. It cannot fail for one of a flow in first. The caller holds the lock.
func (r *routed) word(output uint32) (*uint32, error) {
	var o bpf.RelayOutput
	at := int(uintptr(output)*unsafe.Sizeof(o) + unsafe.Offsetof(o.Held))
	piece, err := r.memory.Piece(at / account.PieceSize)
	if err != nil {
		return nil, fmt.Errorf("map outputs: %w", err)
	}
	return (*uint32)(unsafe.Pointer(&piece[at%account.PieceSize])), nil
}

// hold sets or clears the held flag of a flow in first. The caller holds the lock.
func (r *routed) hold(name string, held uint32) {
	if word, err := r.word(r.first[name]); err == nil {
		atomic.StoreUint32(word, held)
	}
}

// stage makes the held flag of a rule's first output accessible.
func (r *routed) stage(first uint32) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, err := r.word(first)
	return err
}

// replace records that a routed flow was published, in the held state, or removed; either may be
// nil.
func (r *routed) replace(old, now *entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if old != nil && old.rule.Routed != 0 {
		delete(r.first, old.rule.Name)
		delete(r.held, old.rule.Name)
	}
	if now != nil && now.rule.Routed != 0 {
		r.first[now.rule.Name], r.held[now.rule.Name] = now.first, true
	}
}

// HoldRouted gives the packets of a routed flow back to the kernel until ReleaseRouted, since its
// multicast route has changed. A flow that is not published is left alone: it starts held. It may
// be called from any goroutine, also during Sync, and takes less than a microsecond.
func (l *Loader) HoldRouted(name string) {
	r := &l.routed
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.first[name]; ok {
		r.hold(name, 1)
		r.held[name] = true
	}
}

// ReleaseRouted makes the relay forward the packets of a routed flow. A flow that is not published,
// or not held, stays as it is. It may be called from any goroutine.
func (l *Loader) ReleaseRouted(name string) {
	r := &l.routed
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.held[name] {
		r.hold(name, 0)
		delete(r.held, name)
	}
}

// HeldRouted returns the names of the published routed flows that are held, sorted.
func (l *Loader) HeldRouted() []string {
	r := &l.routed
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.held) == 0 {
		return nil
	}
	names := make([]string, 0, len(r.held))
	for name := range r.held {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// MirrorUntil declares that routed flows (flow.Flow.Routed) match the kernel's multicast forwarding
// cache for duration d from now, while this process lives and the Loader is open. After that the
// kernel forwards all of their packets, so that a daemon that hangs or dies leaves no stale route in
// force once its routing daemon changes it. 0 ends it at once.
//
// The flows that are published when it is first called must match: the process that published them
// may have died long ago.
func (l *Loader) MirrorUntil(d time.Duration) error {
	until := uint64(0)
	if d > 0 {
		until = uint64(monotonic() + d)
	}
	if err := l.maps.RoutedUntil.Put(uint32(0), until); err != nil {
		return fmt.Errorf("write map routed_until: %w", err)
	}
	if d > 0 {
		return l.beginMirror()
	}
	return l.endMirror()
}

// beginMirror puts a socket of this process into the map mirror, in place of another process's. The
// kernel takes it out when its last descriptor is closed.
func (l *Loader) beginMirror() error {
	r := &l.routed
	if r.alive != nil {
		return nil
	}
	fd, err := unix.Socket(unix.AF_XDP, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("AF_XDP socket by which the kernel tells that this process lives: %w", err)
	}
	alive := os.NewFile(uintptr(fd), "mirror")
	if err := l.maps.Mirror.Put(uint32(0), uint32(fd)); err != nil {
		return errors.Join(fmt.Errorf("write map mirror: %w", err), alive.Close())
	}
	r.alive = alive
	return nil
}

// endMirror is the inverse of beginMirror. A socket that another process has put in stays.
func (l *Loader) endMirror() error {
	alive := l.routed.alive
	l.routed.alive = nil
	if alive == nil {
		return nil
	}
	return alive.Close()
}
