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
	offsetOfFrames      = 12 // how many
	offsetOfFirstFrame  = 16 // where
	sizeofBlockHdr      = 48
)

// offsetOfNext is where a struct tpacket3_hdr says how far the next one is away.
const offsetOfNext = 0

// Block is a number of frames in the memory that the worker shares with the
// kernel: of a block, of the frame ring, or of both.
type Block struct {
	worker *Worker
	held   bool
	memory []byte // of the block; nil: none
	next   int    // offset of the next frame
	left   int    // frames from next on
	voids  int    // frames passed over that the kernel dropped after it had made room
	merged merged

	single int // frames of the frame ring, from its head on
	used   int // of those
}

// open begins with a block, nil for none, and so many frames of the frame ring.
func (b *Block) open(memory []byte, single int) {
	b.held = true
	b.memory, b.left = memory, 0
	if memory != nil {
		b.next = int(binary.NativeEndian.Uint32(memory[offsetOfFirstFrame:]))
		b.left = int(binary.NativeEndian.Uint32(memory[offsetOfFrames:]))
	}
	b.single, b.used, b.voids = single, 0, 0
	b.merged.reset()
}

// Next sets f to the next frame, and is false after the last one. A frame that
// several datagrams were merged to comes as that many frames. It does not
// allocate, but for the memory that merged datagrams are taken apart in, which
// is kept.
//
// What f says, its data included, belongs to the block and is valid until
// Release. The data may be changed.
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

// more says whether there is a frame. Frames of the frame ring that came after all of
// the block are left: the next block may hold older ones.
func (b *Block) more() bool { return b.left > 0 || b.memory == nil && b.used < b.single }

// take reads the next frame; false if it is none.
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
		// The kernel could not describe it in a virtio header, and has counted it as
		// dropped (tpacket_rcv of net/packet/af_packet.c). The rest is of an older frame.
		b.left--
		b.voids++
		return false
	case f.parse(frame, &inBlock):
		b.left--
		return true
	}
	// Where the next frame is cannot be told either.
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
		return false // step says so
	}
	return b.worker.frames.earliest[b.used] <= inBlock.time(b.memory[b.next:])
}

// step returns the memory from the next frame on, and moves on.
func (b *Block) step() (frame []byte, ok bool) {
	if b.next < 0 || b.next > len(b.memory)-inBlock.size {
		return nil, false
	}
	frame = b.memory[b.next:]
	step := int(binary.NativeEndian.Uint32(frame[offsetOfNext:]))
	if b.left > 1 && step < inBlock.size {
		return nil, false
	}
	b.next += step // of the last frame it means nothing
	return frame, true
}

// Release gives the frames back to the kernel. Releasing twice does nothing.
func (b *Block) Release() {
	if !b.held {
		return
	}
	w := b.worker
	if b.memory != nil {
		// Until the kernel opens the block again it counts as empty (Worker.blockPending).
		atomic.StoreUint32(blockFrames(b.memory), 0)
		// The store orders the uses of the block before it.
		atomic.StoreUint32(blockStatus(b.memory), unix.TP_STATUS_KERNEL)
		w.index = (w.index + 1) % (len(w.ring) / w.blockSize)
	}
	if b.used > 0 {
		w.frames.release(b.used)
	}
	b.held, b.memory, b.left, b.single, b.used = false, nil, 0, 0, 0
	b.merged.reset()
	w.mu.Unlock()
}

// blockStatus is block_status of struct tpacket_hdr_v1, in struct
// tpacket_block_desc at the start of a block.
func blockStatus(block []byte) *uint32 {
	return (*uint32)(unsafe.Pointer(&block[offsetOfBlockStatus]))
}

// blockFrames is num_pkts, beside it.
func blockFrames(block []byte) *uint32 {
	return (*uint32)(unsafe.Pointer(&block[offsetOfFrames]))
}
