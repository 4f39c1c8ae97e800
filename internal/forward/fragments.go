package forward

import (
	"hash/maphash"
	"sync"
	"time"

	"xdpcast/pkg/packet"
)

// fragmentTimeout is how long the port of a first fragment applies to later ones
// (fragment_timeout_ns of bpf/include/fragment.h).
const fragmentTimeout = int64(2 * time.Second)

// The table holds as many datagrams as the map of the BPF programs.
const (
	fragmentBuckets = 2048
	fragmentWays    = 8
)

// fragments records the ports of first fragments for later ones, which carry none. It
// is bounded: a full bucket evicts its oldest entry. Workers share it, since fragments
// of a datagram may arrive at several of them; its locks, one per bucket, are taken for
// fragments only.
type fragments struct {
	seed    maphash.Seed
	buckets [fragmentBuckets]fragmentBucket
}

type fragmentBucket struct {
	sync.Mutex
	entries [fragmentWays]fragment
}

type fragment struct {
	fragmentKey
	seen   int64
	port   uint16  // 0: the first fragment has not arrived
	before orphans // that arrived before it
}

// orphans counts fragments that arrived before the first of their datagram.
type orphans struct{ packets, bytes uint64 }

// free says whether an entry is unused.
func (f *fragment) free() bool { return f.port == 0 && f.before.packets == 0 }

// fragmentKey holds the fields that all fragments of a datagram share.
type fragmentKey struct {
	index, id   uint32
	vlan, outer uint16
	is4         bool
	src, dst    [16]byte
}

func newFragments() *fragments { return &fragments{seed: maphash.MakeSeed()} }

func keyOf(index int, h *packet.Headers) fragmentKey {
	return fragmentKey{
		index: uint32(index), id: h.FragmentID,
		vlan: h.VLAN, outer: h.OuterVLAN,
		is4: h.Dst.Is4(), src: h.Src.As16(), dst: h.Dst.As16(),
	}
}

func (f *fragments) bucket(key fragmentKey) *fragmentBucket {
	return &f.buckets[maphash.Comparable(f.seed, key)%fragmentBuckets]
}

// entry returns the entry of a datagram, or one to reuse for it. The bucket must be locked.
// Entries without a first fragment are reused first: many are of datagrams that match no
// rule.
func (b *fragmentBucket) entry(key fragmentKey) (e *fragment, own bool) {
	to := &b.entries[0]
	for i := range b.entries {
		e := &b.entries[i]
		switch {
		case e.free():
			if !to.free() {
				to = e
			}
			continue
		case e.fragmentKey == key:
			return e, true
		case to.free():
		case (e.port == 0) != (to.port == 0):
			if e.port == 0 {
				to = e
			}
		case e.seen < to.seen:
			to = e
		}
	}
	return to, false
}

// remember stores the port of a first fragment, and returns the fragments before it.
func (f *fragments) remember(index int, h *packet.Headers, at int64) (before orphans) {
	if h.DstPort == 0 {
		return before
	}
	key := keyOf(index, h)
	b := f.bucket(key)
	b.Lock()
	defer b.Unlock()
	e, own := b.entry(key)
	if own && e.port == 0 && at-e.seen <= fragmentTimeout {
		before = e.before
	}
	*e = fragment{fragmentKey: key, seen: at, port: h.DstPort}
	return before
}

// orphan records a fragment whose first fragment has not been seen.
func (f *fragments) orphan(index int, h *packet.Headers, at int64, length int) {
	key := keyOf(index, h)
	b := f.bucket(key)
	b.Lock()
	defer b.Unlock()
	e, own := b.entry(key)
	switch {
	case !own && !e.free() && e.port != 0 && at-e.seen <= fragmentTimeout:
		return // datagrams that match a rule occupy all entries
	case !own || e.port != 0 || at-e.seen > fragmentTimeout:
		*e = fragment{fragmentKey: key, seen: at}
	}
	e.before.packets++
	e.before.bytes += uint64(length)
}

// port returns the destination port of a later fragment's datagram, 0 if unknown.
func (f *fragments) port(index int, h *packet.Headers, at int64) uint16 {
	key := keyOf(index, h)
	b := f.bucket(key)
	b.Lock()
	defer b.Unlock()
	for i := range b.entries {
		if e := &b.entries[i]; e.port != 0 && e.fragmentKey == key {
			if at-e.seen > fragmentTimeout {
				return 0
			}
			return e.port
		}
	}
	return 0
}
