package fanout

import (
	"encoding/binary"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Offsets into struct tpacket_block_desc, whose second half is a struct
// tpacket_hdr_v1 (include/uapi/linux/if_packet.h). All fields are in the
// machine's byte order.
const (
	offsetOfBlockStatus = 8
	offsetOfFrames      = 12 // num_pkts
	offsetOfFirstFrame  = 16 // offset_to_first_pkt
	offsetOfNumber      = 24 // seq_num
	sizeofBlockHdr      = 48
)

// offsetOfNext is the offset of tp_next_offset in struct tpacket3_hdr.
const offsetOfNext = 0

// Block is a batch of frames in the memory that the worker shares with the
// kernel: from a block, from the frame ring, or from both.
type Block struct {
	worker *Worker
	held   bool
	memory []byte // of the block; nil: none
	next   int    // offset of the next frame
	total  int    // frames of the block
	left   int    // frames from next on
	voids  int    // skipped frames that the kernel dropped after reserving room
	merged merged

	single int // frames of the frame ring, from its head on
	used   int // of those, already returned
}

// open starts a batch with a block, nil for none, and single frames of the frame ring.
func (b *Block) open(memory []byte, single int) {
	b.held = true
	b.memory, b.total, b.left = memory, 0, 0
	if memory != nil {
		b.next = int(binary.NativeEndian.Uint32(memory[offsetOfFirstFrame:]))
		b.total = int(binary.NativeEndian.Uint32(memory[offsetOfFrames:]))
		b.left = b.total
		b.skip()
	}
	b.single, b.used, b.voids = single, 0, 0
	b.merged.reset()
}

// skip skips the frames that another process had committed.
func (b *Block) skip() {
	for w := b.worker; w.skip > 0; w.skip-- {
		if _, ok := b.step(); b.left == 0 || !ok {
			w.skip = 0
			return
		}
		b.left--
	}
}

// Commit says that the caller is about to act on the frames returned so far: a process that inherits
// the group from a killed one begins with the next frame, so that none is acted on twice. It
// costs two stores. Release commits all frames of the block.
func (b *Block) Commit() {
	c := b.worker.cursor
	if b.memory != nil {
		atomic.StoreUint64(&c.taken, c.block<<32|uint64(b.total-b.left))
	}
	if b.used > 0 {
		atomic.StoreUint64(&c.read, c.released+uint64(b.used))
	}
}

// Next sets f to the next frame, and returns false after the last one. It splits
// a frame of several merged datagrams into that many frames. It does not
// allocate, except for the memory into which merged datagrams are split, which
// is reused.
//
// The contents of f, including its data, belong to the block and are valid until
// Release. The caller may modify the data.
func (b *Block) Next(f *Frame) bool {
	if b.merged.next(f) {
		return true
	}
	for b.more() {
		if !b.take(f) {
			continue
		}
		if len(f.Data) < f.WireLen {
			b.worker.truncated.Add(1)
		}
		if !f.merged() || !b.merged.split(f) {
			return true
		}
		if b.merged.next(f) {
			return true
		}
	}
	return false
}

// more says whether a frame is left. Frames of the frame ring newer than the whole
// block stay for the next call: the next block may hold older ones.
func (b *Block) more() bool { return b.left > 0 || b.memory == nil && b.used < b.single }

// take reads the next frame, and returns false if it skipped one.
func (b *Block) take(f *Frame) bool {
	if b.singleFirst() {
		slot := b.worker.frames.slot(b.used)
		b.used++
		if !f.parse(slot, &inFrameRing) {
			b.worker.malformed.Add(1)
			return false
		}
		return true
	}
	frame, ok := b.step()
	switch {
	case !ok:
	case binary.NativeEndian.Uint32(frame[inBlock.status:])&unix.TP_STATUS_USER == 0:
		// The kernel could not describe it in a virtio header, and counted it as
		// dropped (tpacket_rcv of net/packet/af_packet.c). The rest is stale.
		b.left--
		b.voids++
		return false
	case f.parse(frame, &inBlock):
		b.left--
		return true
	}
	// The position of the next frame is unknown, too.
	b.worker.malformed.Add(uint64(b.left))
	b.left = 0
	return false
}

// singleFirst says whether the next frame of the frame ring came before that of the block.
func (b *Block) singleFirst() bool {
	if b.used == b.single {
		return false
	}
	if b.left == 0 {
		return true
	}
	if b.next < 0 || b.next > len(b.memory)-inBlock.size {
		return false // step reports it
	}
	return b.worker.frames.earliest[b.used] <= inBlock.time(b.memory[b.next:])
}

// step returns the memory from the next frame on, and advances.
func (b *Block) step() (frame []byte, ok bool) {
	if b.next < 0 || b.next > len(b.memory)-inBlock.size {
		return nil, false
	}
	frame = b.memory[b.next:]
	step := int(binary.NativeEndian.Uint32(frame[offsetOfNext:]))
	if b.left > 1 && step < inBlock.size {
		return nil, false
	}
	b.next += step // meaningless after the last frame
	return frame, true
}

// Release returns the frames to the kernel. Releasing twice does nothing.
func (b *Block) Release() {
	if !b.held {
		return
	}
	w := b.worker
	if b.memory != nil {
		atomic.StoreUint64(&w.cursor.block, w.cursor.block+1)
		giveBack(b.memory)
		w.index = (w.index + 1) % (len(w.ring) / w.blockSize)
	}
	if b.used > 0 {
		w.frames.release(b.used)
	}
	b.held, b.memory, b.left, b.single, b.used = false, nil, 0, 0, 0
	b.merged.reset()
	w.mu.Unlock()
}

// giveBack returns a block to the kernel.
func giveBack(block []byte) {
	// It must look empty to Worker.blockPending until the kernel opens it again.
	atomic.StoreUint32(blockFrames(block), 0)
	// The store orders the uses of the block before it.
	atomic.StoreUint32(blockStatus(block), unix.TP_STATUS_KERNEL)
}

// blockStatus is block_status of struct tpacket_hdr_v1, in struct
// tpacket_block_desc at the start of a block.
func blockStatus(block []byte) *uint32 {
	return (*uint32)(unsafe.Pointer(&block[offsetOfBlockStatus]))
}

// blockFrames is num_pkts of the same struct.
func blockFrames(block []byte) *uint32 {
	return (*uint32)(unsafe.Pointer(&block[offsetOfFrames]))
}

// blockNumber is seq_num of the same struct; 0 before the kernel first opened the block.
func blockNumber(block []byte) *uint64 {
	return (*uint64)(unsafe.Pointer(&block[offsetOfNumber]))
}
