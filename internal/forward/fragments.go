package forward

import (
	"hash/maphash"
	"sync"
	"time"

	"xdpcast/pkg/packet"
)

// fragmentTimeout is how long a first fragment speaks for the others
// (fragment_timeout_ns of bpf/include/fragment.h).
const fragmentTimeout = int64(2 * time.Second)

// The table has room for as many datagrams as the map of the BPF programs.
const (
	fragmentBuckets = 2048
	fragmentWays    = 8
)

// fragments remembers the ports of first fragments for those behind them. It is
// bounded: where a bucket is full, the oldest goes. Workers share it, for the
// fragments of a datagram may come to several of them; its locks, one a bucket, are
// taken for fragments only.
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
	port   uint16  // 0: the first fragment has not come
	before orphans // that came before it
}

// orphans are fragments that came before the first of their datagram.
type orphans struct{ packets, bytes uint64 }

// free says whether an entry can be used for another datagram.
func (f *fragment) free() bool { return f.port == 0 && f.before.packets == 0 }

// fragmentKey is what the fragments of a datagram share.
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

// entry returns the entry of a datagram, its own or one to be used for it. The bucket is
// locked. Entries without a first fragment go before others: many are of datagrams that
// no rule takes.
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

// remember keeps the port of a first fragment, and returns those that came before it.
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

// orphan notes a fragment whose first one was not seen.
func (f *fragments) orphan(index int, h *packet.Headers, at int64, length int) {
	key := keyOf(index, h)
	b := f.bucket(key)
	b.Lock()
	defer b.Unlock()
	e, own := b.entry(key)
	switch {
	case !own && !e.free() && e.port != 0 && at-e.seen <= fragmentTimeout:
		return // datagrams that a rule takes have all entries
	case !own || e.port != 0 || at-e.seen > fragmentTimeout:
		*e = fragment{fragmentKey: key, seen: at}
	}
	e.before.packets++
	e.before.bytes += uint64(length)
}

// port is the port of a later fragment's datagram, 0 when it is not known.
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
