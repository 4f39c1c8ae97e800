package loader

import (
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"xdpcast/bpf"
)

// routed are the routed flows (flow.Flow.Routed) in force. A flow is held from before it comes
// into force until ReleaseRouted, and from HoldRouted on: its packets are the kernel's then. That
// is a word in the first of its outputs, which is written in the memory of the map outputs, so
// that whoever hears of a change of the kernel's need not wait for the control loop.
type routed struct {
	mu     sync.Mutex
	memory []byte            // of the map outputs
	first  map[string]uint32 // outputs of the flows in force, by name
	held   map[string]bool   // which of them are held
}

// openRouted maps the map outputs into memory, and takes up the flows that are in force.
func (l *Loader) openRouted() error {
	m := l.maps.Outputs
	page := os.Getpagesize()
	size := (int(m.MaxEntries())*int(m.ValueSize()) + page - 1) / page * page
	memory, err := unix.Mmap(m.FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map outputs into memory: %w", err)
	}
	r := &l.routed
	r.mu.Lock()
	defer r.mu.Unlock()
	r.memory, r.first, r.held = memory, map[string]uint32{}, map[string]bool{}
	for name, e := range l.rules {
		if e.rule.Routed != 0 {
			r.first[name] = e.first
			if atomic.LoadUint32(r.word(e.first)) != 0 {
				r.held[name] = true
			}
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
	return unix.Munmap(memory)
}

// word is where an output says that its flow is held. The lock is held.
func (r *routed) word(output uint32) *uint32 {
	var o bpf.RelayOutput
	return (*uint32)(unsafe.Pointer(&r.memory[uintptr(output)*unsafe.Sizeof(o)+unsafe.Offsetof(o.Held)]))
}

// replace notes that a routed flow came into force, held as it was written, or that one went; each
// may be nil.
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
// multicast route is another now. A flow that is not in force is left alone: it begins held. It may
// be called from any goroutine, also during Sync, and takes less than a microsecond.
func (l *Loader) HoldRouted(name string) {
	r := &l.routed
	r.mu.Lock()
	defer r.mu.Unlock()
	if first, ok := r.first[name]; ok {
		atomic.StoreUint32(r.word(first), 1)
		r.held[name] = true
	}
}

// ReleaseRouted has the relay forward the packets of a routed flow. One that is not in force, or
// not held, stays as it is. It may be called from any goroutine.
func (l *Loader) ReleaseRouted(name string) {
	r := &l.routed
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.held[name] {
		atomic.StoreUint32(r.word(r.first[name]), 0)
		delete(r.held, name)
	}
}

// HeldRouted names the routed flows in force that are held.
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

// MirrorUntil says that routed flows (flow.Flow.Routed) are as the kernel's multicast forwarding
// cache is, from now on for so long. When that time is over, all of their packets are the
// kernel's: so a daemon that dies leaves no route behind that its routing daemon has changed. 0
// ends it at once.
func (l *Loader) MirrorUntil(d time.Duration) error {
	until := uint64(0)
	if d > 0 {
		until = uint64(monotonic() + d)
	}
	if err := l.maps.RoutedUntil.Put(uint32(0), until); err != nil {
		return fmt.Errorf("write map routed_until: %w", err)
	}
	return nil
}
