package fanout

import (
	"errors"
	"runtime"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Bounds of a frame ring.
const (
	minFrames       = 64
	maxFrames       = 1 << 16
	minFrameSize    = 2 << 10
	frameBlock      = 64 << 10 // the kernel's unit of allocation (tp_block_size)
	maxFrameWorkers = 1 << 10
)

// FrameOverhead is the part of a frame ring's slot, in bytes, not available to the packet:
// struct tpacket2_hdr, struct sockaddr_ll, a link-layer header and struct virtio_net_hdr.
const FrameOverhead = 128

const (
	// mostSingle bounds the frames of the frame ring returned at a time.
	mostSingle = 256
	// fewFrames: a block retired by its timeout with no more frames than this shows
	// that frames arrive slowly enough for the frame ring.
	fewFrames = 200
)

// frameRing is the second ring of a worker (TPACKET_V2): a socket of its own, in the same
// group. See choice.go for which frames use it.
//
// # Order
//
// The kernel writes the frames of a flow to their rings one after the other. So if a frame
// of the frame ring is visible, every older frame of its flow in a block is, too: the block
// has been handed over, or its number of frames is not zero, and the worker waits for it.
// And once a block has been handed over, every older frame in the frame ring is visible.
// Two visible frames are ordered by their receive timestamps.
type frameRing struct {
	fd     int
	memory []byte
	size   int // of a slot
	count  int // of slots
	head   int // the slot to read next
	admits *admission
	cursor *cursor // of the worker
	// slack reserves slots for frames that CPUs are still writing.
	slack int
	// blocks says that frames arrive too fast for this ring.
	blocks bool
	// waits says that frames here may be newer than some of the open block.
	waits bool
	// earliest holds, for each frame from head on, the earliest receive time of it and
	// those after it: a CPU may fill a slot late. Only set together with a block.
	earliest []int64
}

// steps make the socket a member of the group, which still drops everything.
func (r *frameRing) steps(w *Worker) []step {
	sys, o := w.group.sys, &w.group.opts
	return []step{
		{StepSocket, func() (err error) { r.fd, err = sys.openPacket(); return err }},
		{StepDropAll, func() error { return sys.setFilter(r.fd, keep(0)) }},
		{StepVersion, func() error { return sys.setInt(r.fd, unix.SOL_PACKET, unix.PACKET_VERSION, unix.TPACKET_V2) }},
		{StepVnetHeader, func() error { return sys.setInt(r.fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1) }},
		{StepRing, func() error {
			return sys.setFrames(r.fd, &unix.TpacketReq{
				Block_size: frameBlock, Block_nr: uint32(o.Frames * o.FrameSize / frameBlock),
				Frame_size: uint32(o.FrameSize), Frame_nr: uint32(o.Frames),
			})
		}},
		{StepMap, func() (err error) { r.memory, err = sys.mmap(r.fd, o.Frames*o.FrameSize); return err }},
		{StepBind, func() error { return sys.bindTo(r.fd, o.Index) }},
		{StepJoin, func() error { return w.group.join(r.fd) }},
	}
}

// slot returns the memory of the nth slot from the head.
func (r *frameRing) slot(n int) []byte {
	at := (r.head + n) % r.count * r.size
	return r.memory[at : at+r.size : at+r.size]
}

// status is that of the nth slot from the head.
func (r *frameRing) status(n int) *uint32 { return r.statusOf((r.head + n) % r.count) }

// statusOf is tp_status of struct tpacket2_hdr in a slot.
func (r *frameRing) statusOf(slot int) *uint32 {
	return (*uint32)(unsafe.Pointer(&r.memory[slot*r.size]))
}

// filled says whether the nth slot from the head holds a frame.
func (r *frameRing) filled(n int) bool {
	// This load precedes the reads of the frame, and of the open block.
	return atomic.LoadUint32(r.status(n))&unix.TP_STATUS_USER != 0
}

// ready counts the frames from the nth slot on, within the first most slots.
func (r *frameRing) ready(n, most int) int {
	from := n
	for n < min(most, r.count) && r.filled(n) {
		n++
	}
	return n - from
}

// settle counts all frames that have arrived, and waits for slots that CPUs are still
// filling before others.
func (r *frameRing) settle() (n int) {
	for {
		n += r.ready(n, r.count)
		if !r.beyond(n) {
			break
		}
		runtime.Gosched()
	}
	for i := n - 1; i >= 0; i-- {
		r.earliest[i] = inFrameRing.time(r.slot(i))
		if i < n-1 {
			r.earliest[i] = min(r.earliest[i], r.earliest[i+1])
		}
	}
	return n
}

// beyond says whether a slot after the nth holds a frame.
func (r *frameRing) beyond(n int) bool {
	for i := n + 1; i < min(n+1+r.slack, r.count); i++ {
		if r.filled(i) {
			return true
		}
	}
	return false
}

// release returns n slots to the kernel.
func (r *frameRing) release(n int) {
	atomic.StoreUint64(&r.cursor.read, r.cursor.released+uint64(n))
	for i := range n {
		atomic.StoreUint32(r.status(i), unix.TP_STATUS_KERNEL)
	}
	r.head = (r.head + n) % r.count
	// Before the limit: until then the kernel fills none of these slots, and a process that finds
	// this number unchanged can give them back again.
	atomic.StoreUint64(&r.cursor.released, r.cursor.read)
	if limit := atomic.LoadUint64(&r.admits.limit); limit != 0 {
		atomic.StoreUint64(&r.admits.limit, limit+uint64(n))
	}
}

// admit lets the program fill the ring, which must be empty.
func (r *frameRing) admit() {
	if r.blocks {
		return
	}
	if limit := atomic.LoadUint64(&r.admits.taken) + uint64(r.count-r.slack); limit != r.admits.limit {
		atomic.StoreUint64(&r.admits.limit, limit)
	}
}

// rate decides by a block handed over whether frames arrive too fast for this ring.
func (r *frameRing) rate(block []byte) {
	byTime := atomic.LoadUint32(blockStatus(block))&unix.TP_STATUS_BLK_TMO != 0
	r.blocks = !byTime || atomic.LoadUint32(blockFrames(block)) > fewFrames
	if r.blocks {
		atomic.StoreUint64(&r.admits.limit, 0)
	}
}

func (r *frameRing) free(sys *system) error {
	var errs []error
	if r.memory != nil {
		errs = append(errs, sys.munmap(r.memory))
		r.memory = nil
	}
	if r.fd >= 0 {
		errs = append(errs, sys.close(r.fd))
		r.fd = -1
	}
	return errors.Join(errs...)
}
