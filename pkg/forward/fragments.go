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
	seen int64
	port uint16 // 0: free
}

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

// remember keeps the port of a first fragment.
func (f *fragments) remember(index int, h *packet.Headers, at int64) {
	if h.DstPort == 0 {
		return
	}
	key := keyOf(index, h)
	b := f.bucket(key)
	b.Lock()
	defer b.Unlock()
	to := &b.entries[0]
	for i := range b.entries {
		e := &b.entries[i]
		if e.port != 0 && e.fragmentKey == key {
			to = e
			break
		}
		if e.port == 0 || e.seen < to.seen && to.port != 0 {
			to = e
		}
	}
	*to = fragment{key, at, h.DstPort}
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
