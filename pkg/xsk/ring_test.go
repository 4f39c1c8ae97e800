package xsk

import (
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// ringMemory is memory laid out as the kernel's ring, with both indexes at start.
func ringMemory(size int, start uint32) ring[uint64] {
	mem := make([]uint64, 16+size)
	off := unix.XDPRingOffset{Producer: 0, Consumer: 4, Flags: 8, Desc: 16 * 8}
	r := newRing[uint64](bytesOf(mem), off, size)
	r.producer.Store(start)
	r.consumer.Store(start)
	return r
}

// checkRing runs operations on both ends of a ring against a queue: each byte of ops
// is one, with the count in its low bits. It fails if an entry is lost, duplicated,
// reordered, overwritten or invented.
func checkRing(t *testing.T, logSize uint8, start uint32, ops []byte) {
	t.Helper()
	size := 1 << (logSize % 8)
	r := ringMemory(size, start)
	p, c := newProducerRing(r), newConsumerRing(r)
	var model []uint64 // submitted but not released
	written := uint64(0)
	for step, op := range ops {
		n := uint32(op >> 1)
		if op&1 == 0 {
			got := p.reserve(n)
			if got > n || got > uint32(size-len(model)) || got == 0 && n > 0 && len(model) < size {
				t.Fatalf("step %d: %d of %d entries reserved, %d of %d in use", step, got, n, len(model), size)
			}
			for i := range got {
				written++
				p.set(i, written)
				model = append(model, written)
			}
			p.submit(got)
			if left := p.pending(); left != uint32(len(model)) || left > 0 && p.unread(0) != model[0] {
				t.Fatalf("step %d: %d pending of %d", step, left, len(model))
			}
			continue
		}
		got := c.peek(n)
		if got > n || got > uint32(len(model)) || got == 0 && n > 0 && len(model) > 0 {
			t.Fatalf("step %d: %d of %d entries peeked, %d there", step, got, n, len(model))
		}
		for i := range got {
			if c.at(i) != model[i] {
				t.Fatalf("step %d: entry %d is %d: want %d", step, i, c.at(i), model[i])
			}
		}
		done := got - got/3 // not all of what was peeked
		c.release(done)
		model = model[done:]
	}
}

func TestRingAgainstModel(t *testing.T) {
	for logSize := range uint8(8) {
		for _, start := range []uint32{0, 1, 1<<31 - 5, 1<<32 - 1, 1<<32 - 100} {
			random := rand.New(rand.NewPCG(uint64(logSize), uint64(start)))
			ops := make([]byte, 5000)
			for i := range ops {
				ops[i] = byte(random.Uint32())
			}
			checkRing(t, logSize, start, ops)
		}
	}
}

func FuzzRing(f *testing.F) {
	f.Add(uint8(3), uint32(0), []byte{4, 3, 16, 255, 254})
	f.Add(uint8(0), ^uint32(0), []byte{2, 3, 2, 3})
	f.Add(uint8(6), ^uint32(0)-20, []byte{128, 65, 80, 41, 12, 255})
	f.Fuzz(checkRing)
}

// Both ends of a ring run concurrently, each on its own goroutine: the other end can
// compute each entry, so that one read too early or late shows.
func TestRingConcurrently(t *testing.T) {
	const entries = 200_000
	r := ringMemory(64, ^uint32(0)-1000)
	p, c := newProducerRing(r), newConsumerRing(r)
	go func() {
		for next := uint64(0); next < entries; {
			n := p.reserve(17)
			for i := range n {
				p.set(i, mix(next))
				next++
			}
			p.submit(n)
		}
	}()
	for next := uint64(0); next < entries; {
		n := c.peek(13)
		for i := range n {
			if next < entries && c.at(i) != mix(next) {
				t.Fatalf("entry %d is %#x", next, c.at(i))
			}
			next++
		}
		c.release(n)
	}
}

func mix(n uint64) uint64 { return n*0x9e3779b97f4a7c15 ^ n>>7 }

// Whatever the other side writes to its index, counts stay within the ring.
func TestRingForeignIndexes(t *testing.T) {
	for _, index := range []uint32{0, 1, 7, 8, 9, 1 << 16, 1 << 31, ^uint32(0)} {
		r := ringMemory(8, 0)
		p := newProducerRing(r)
		p.submit(p.reserve(8))
		r.consumer.Store(index)
		if n := p.reserve(100); n > 8 {
			t.Errorf("consumer index %d: %d of 8 entries reserved", index, n)
		}
		if n := p.pending(); n > 8 {
			t.Errorf("consumer index %d: %d of 8 entries pending", index, n)
		}
		r = ringMemory(8, 0)
		c := newConsumerRing(r)
		r.producer.Store(index)
		if n := c.peek(100); n > 8 {
			t.Errorf("producer index %d: %d of 8 entries peeked", index, n)
		}
	}
}

// The shared indexes are read only if too few entries are known.
func TestRingCachesIndexes(t *testing.T) {
	r := ringMemory(8, 0)
	p := newProducerRing(r)
	p.submit(p.reserve(4))
	r.consumer.Store(4)
	if n := p.reserve(4); n != 4 || p.seen != 0 {
		t.Errorf("%d reserved, consumer index %d seen: want 4 without a look", n, p.seen)
	}
	if n := p.reserve(5); n != 5 || p.seen != 4 {
		t.Errorf("%d reserved, consumer index %d seen: want 5 after a look", n, p.seen)
	}
	c := newConsumerRing(ring[uint64]{producer: r.producer, consumer: new(atomic.Uint32), flags: r.flags, entries: r.entries, mask: 7, size: 8})
	r.producer.Store(6)
	if n := c.peek(4); n != 4 || c.seen != 4 {
		t.Errorf("%d peeked, producer index %d seen: want 4 without a look", n, c.seen)
	}
	if n := c.peek(8); n != 6 || c.seen != 6 {
		t.Errorf("%d peeked, producer index %d seen: want 6 after a look", n, c.seen)
	}
}

func TestNoRing(t *testing.T) {
	p, c := producerRing[Desc]{ring: noRing[Desc]()}, consumerRing[Desc]{ring: noRing[Desc]()}
	if p.reserve(1) != 0 || p.pending() != 0 || c.peek(1) != 0 || p.needsWakeup() {
		t.Error("a ring that is not there has entries")
	}
	p.set(3, Desc{})
	p.submit(0)
	c.release(0)
}

func TestWholePackets(t *testing.T) {
	for _, c := range []struct {
		options []uint32
		want    uint32
	}{
		{nil, 0},
		{[]uint32{0}, 1},
		{[]uint32{1, 0, 1}, 2},
		{[]uint32{0, 0, 1, 1}, 2},
		{[]uint32{1, 1, 1}, 3}, // longer than the batch: in parts
		{[]uint32{1, 1, 0}, 3},
	} {
		descs := make([]Desc, len(c.options))
		for i, o := range c.options {
			descs[i].Options = o
		}
		if got := wholePackets(descs); got != c.want {
			t.Errorf("%v: %d whole: want %d", c.options, got, c.want)
		}
		// Packet by packet, they come out in order.
		n := 0
		for rest := descs; len(rest) > 0; {
			var packet []Desc
			packet, rest = NextPacket(rest)
			n += len(packet)
			if len(packet) == 0 || packet[len(packet)-1].Options != 0 && len(rest) > 0 || wholePackets(packet) != uint32(len(packet)) {
				t.Fatalf("%v: packet of %d before the last %d", c.options, len(packet), len(rest))
			}
		}
		if n != len(descs) {
			t.Errorf("%v: %d descriptors in packets", c.options, n)
		}
	}
}
