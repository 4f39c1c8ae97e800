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
	frameBlock      = 64 << 10 // what the kernel takes at a time
	maxFrameWorkers = 1 << 10
)

// FrameOverhead is what of a frame of the frame ring, in bytes, is not for the packet: struct
// tpacket2_hdr, struct sockaddr_ll, a link-layer header and struct virtio_net_hdr.
const FrameOverhead = 128

const (
	// mostSingle is how many frames of the frame ring are handed out at a time.
	mostSingle = 256
	// fewFrames: a block that was handed over by time, with no more frames than this,
	// says that frames come slowly enough to be handed over one by one.
	fewFrames = 200
)

// frameRing is the second ring of a worker (TPACKET_V2): a socket of its own, in the same
// group. See choice.go for which frames come by it.
//
// # Order
//
// Frames of a flow are put in their rings one after the other. So one that is older than a
// frame of the frame ring, and in a block, can be seen there when the younger one can: the
// block has been handed over, or its number of frames is not zero, and the worker waits
// for it. And one that is older than a frame of a block and in the frame ring can be
// seen when the block has been handed over. Which of two that both can be seen is older
// is told by the time at which they were received.
type frameRing struct {
	fd     int
	memory []byte
	size   int // of a slot
	count  int // of slots
	head   int // the slot that is filled next, or has been
	admits *admission
	// slack is for frames that CPUs are just putting into slots.
	slack int
	// blocks says that frames come too fast for this ring.
	blocks bool
	// waits says that frames here are younger than some of the open block.
	waits bool
	// earliest says, for each frame from head on, when the earliest of it and those
	// behind it came: a CPU may be late with a slot. Only beside a block.
	earliest []int64
}

// open makes the socket a member of the group, which still drops everything.
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

// slot is the memory of the nth slot from the head on.
func (r *frameRing) slot(n int) []byte {
	at := (r.head + n) % r.count * r.size
	return r.memory[at : at+r.size : at+r.size]
}

// status is tp_status of struct tpacket2_hdr.
func (r *frameRing) status(n int) *uint32 {
	return (*uint32)(unsafe.Pointer(&r.memory[(r.head+n)%r.count*r.size]))
}

// filled says whether the nth slot holds a frame.
func (r *frameRing) filled(n int) bool {
	// The load orders the reads of the frame, and of the open block, after it.
	return atomic.LoadUint32(r.status(n))&unix.TP_STATUS_USER != 0
}

// ready counts the frames from the nth slot on, up to most slots from the head on.
func (r *frameRing) ready(n, most int) int {
	from := n
	for n < min(most, r.count) && r.filled(n) {
		n++
	}
	return n - from
}

// settle counts all frames that have come so far, and waits for slots that CPUs are just
// filling in front of others.
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

// beyond says whether a slot behind the nth holds a frame.
func (r *frameRing) beyond(n int) bool {
	for i := n + 1; i < min(n+1+r.slack, r.count); i++ {
		if r.filled(i) {
			return true
		}
	}
	return false
}

// release gives n slots back.
func (r *frameRing) release(n int) {
	for i := range n {
		atomic.StoreUint32(r.status(i), unix.TP_STATUS_KERNEL)
	}
	r.head = (r.head + n) % r.count
	if limit := atomic.LoadUint64(&r.admits.limit); limit != 0 {
		atomic.StoreUint64(&r.admits.limit, limit+uint64(n))
	}
}

// admit lets as many frames in as have room; the ring is empty.
func (r *frameRing) admit() {
	if r.blocks {
		return
	}
	if limit := atomic.LoadUint64(&r.admits.taken) + uint64(r.count-r.slack); limit != r.admits.limit {
		atomic.StoreUint64(&r.admits.limit, limit)
	}
}

// rate learns from a block that was handed over how fast frames come.
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
