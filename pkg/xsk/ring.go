package xsk

import (
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Desc is struct xdp_desc: a frame, or part of one, in an RX or TX ring. Native byte
// order.
type Desc struct {
	Addr    uint64 // of the first byte, in bytes from the start of the UMEM
	Len     uint32 // bytes
	Options uint32 // Continued, or 0
}

// Continued is XDP_PKT_CONTD: the packet continues in the next descriptor.
const Continued uint32 = unix.XDP_PKT_CONTD

// ring is the part common to both ends of a ring: the mapped memory of one
// struct xdp_ring and its entries. Indexes wrap at 2^32 and are masked on use.
//
// The ordering rules, (A) to (D), are those of net/xdp/xsk_queue.h. Go's atomic
// operations are sequentially consistent, which is stronger than any of them requires.
type ring[T any] struct {
	producer *atomic.Uint32 // the next entry to be written
	consumer *atomic.Uint32 // the next entry to be read
	flags    *atomic.Uint32
	entries  []T
	mask     uint32
	size     uint32 // 0 once closed
}

// newRing views mapped memory as a ring. The kernel has checked the size; off is from
// XDP_MMAP_OFFSETS.
func newRing[T any](mem []byte, off unix.XDPRingOffset, size int) ring[T] {
	word := func(at uint64) *atomic.Uint32 { return (*atomic.Uint32)(unsafe.Pointer(&mem[at])) }
	return ring[T]{
		producer: word(off.Producer),
		consumer: word(off.Consumer),
		flags:    word(off.Flags),
		entries:  unsafe.Slice((*T)(unsafe.Pointer(&mem[off.Desc])), size),
		mask:     uint32(size - 1),
		size:     uint32(size),
	}
}

// noRing is the ring of a direction not opened, or of a closed socket: always empty and
// full, so that use after Close is harmless.
func noRing[T any]() ring[T] {
	return ring[T]{producer: new(atomic.Uint32), consumer: new(atomic.Uint32), flags: new(atomic.Uint32), entries: make([]T, 1)}
}

// needsWakeup says whether the kernel set XDP_RING_NEED_WAKEUP. The caller must have
// submitted before; that store cannot pass this load (sequential consistency), so either
// the kernel sees the entries, or we see the flag.
func (r *ring[T]) needsWakeup() bool { return r.flags.Load()&unix.XDP_RING_NEED_WAKEUP != 0 }

// producerRing is a ring that we write: fill and TX.
type producerRing[T any] struct {
	ring[T]
	next   uint32 // our producer index
	seen   uint32 // the consumer index when last read
	shared uint32 // our producer index as the kernel sees it
}

func newProducerRing[T any](r ring[T]) producerRing[T] {
	next := r.producer.Load()
	return producerRing[T]{ring: r, next: next, seen: r.consumer.Load(), shared: next}
}

// reserve returns how many of n entries can be written. It reads the shared index only
// if too few entries are known to be free.
//
// (A) pairs with (D): entries are written only after the load of a consumer index that
// covers them.
func (r *producerRing[T]) reserve(n uint32) uint32 {
	free := r.size - (r.next - r.seen)
	if free < n {
		r.seen = r.consumer.Load() // (A)
		if used := r.next - r.seen; used <= r.size {
			free = r.size - used
		} else { // no kernel writes such an index
			free = 0
		}
	}
	return min(n, free)
}

// set writes the i-th of the reserved entries.
func (r *producerRing[T]) set(i uint32, v T) { r.entries[(r.next+i)&r.mask] = v }

// stage submits the first n of the reserved entries, but does not publish them.
func (r *producerRing[T]) stage(n uint32) { r.next += n }

// publish publishes all submitted entries.
//
// (B) pairs with (C): the entries are written before the producer index that covers
// them, by a store with release semantics.
func (r *producerRing[T]) publish() {
	if r.shared != r.next {
		r.shared = r.next
		r.producer.Store(r.next) // (B)
	}
}

// submit submits the first n of the reserved entries, and publishes them.
func (r *producerRing[T]) submit(n uint32) {
	r.stage(n)
	r.publish()
}

// pending returns how many submitted entries the kernel has not reported as taken. It
// may have taken more, since it publishes its index after several.
func (r *producerRing[T]) pending() uint32 {
	r.seen = r.consumer.Load()
	return min(r.next-r.seen, r.size)
}

// unread returns the i-th of the pending entries.
func (r *producerRing[T]) unread(i uint32) T { return r.entries[(r.seen+i)&r.mask] }

// consumerRing is a ring that we read: RX and completion.
type consumerRing[T any] struct {
	ring[T]
	next uint32 // our consumer index
	seen uint32 // the producer index when last read
}

func newConsumerRing[T any](r ring[T]) consumerRing[T] {
	return consumerRing[T]{ring: r, next: r.consumer.Load(), seen: r.producer.Load()}
}

// peek returns how many of n entries can be read. It reads the shared index only if too
// few entries are known to be available.
//
// (C) pairs with (B): the producer index is loaded before the entries that it covers,
// with acquire semantics.
func (r *consumerRing[T]) peek(n uint32) uint32 {
	there := r.seen - r.next
	if there < n {
		r.seen = r.producer.Load() // (C)
		// No kernel writes an index beyond the ring's size.
		there = min(r.seen-r.next, r.size)
	}
	return min(n, there)
}

// at returns the i-th of the peeked entries.
func (r *consumerRing[T]) at(i uint32) T { return r.entries[(r.next+i)&r.mask] }

// release returns the first n of the peeked entries to the kernel.
//
// (D) pairs with (A): the entries are read before the store of the consumer index, or
// the kernel could overwrite them too early. Loads cannot pass a later sequentially
// consistent store.
func (r *consumerRing[T]) release(n uint32) {
	if n == 0 {
		return
	}
	r.next += n
	r.consumer.Store(r.next) // (D)
}
