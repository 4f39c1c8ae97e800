package fanout

import (
	"encoding/binary"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Offsets into struct tpacket_block_desc, whose second half is a struct
// tpacket_hdr_v1 (include/uapi/linux/if_packet.h). All fields are in the
// machine's byte order.
const (
	offsetOfBlockStatus = 8
	offsetOfFrames      = 12 // how many
	offsetOfFirstFrame  = 16 // where
)

// Offsets into struct tpacket3_hdr.
const (
	offsetOfNext     = 0
	offsetOfSeconds  = 4
	offsetOfNanos    = 8
	offsetOfSnaplen  = 12
	offsetOfLen      = 16
	offsetOfStatus   = 20
	offsetOfMAC      = 24
	offsetOfNet      = 26
	offsetOfVLAN     = 32
	offsetOfTPID     = 36
	sizeofFrameHdr   = unix.SizeofTpacket3Hdr
	sizeofVnetHeader = 10 // struct virtio_net_hdr of include/uapi/linux/virtio_net.h
)

// Block is a number of frames in the memory that the worker shares with the
// kernel.
type Block struct {
	worker *Worker
	memory []byte // nil while no block is held
	next   int    // offset of the next frame
	left   int    // frames from next on
	merged merged
}

func (b *Block) open(memory []byte) {
	b.memory = memory
	b.next = int(binary.NativeEndian.Uint32(memory[offsetOfFirstFrame:]))
	b.left = int(binary.NativeEndian.Uint32(memory[offsetOfFrames:]))
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
	for b.left > 0 {
		if !b.parse(f) {
			// Where the next frame is cannot be told either.
			b.worker.malformed.Add(uint64(b.left))
			b.left = 0
			return false
		}
		b.left--
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

// parse reads the frame at b.next and moves on.
func (b *Block) parse(f *Frame) bool {
	if b.next < 0 || b.next > len(b.memory)-sizeofFrameHdr {
		return false
	}
	frame := b.memory[b.next:]
	if !f.parse(frame) {
		return false
	}
	step := int(binary.NativeEndian.Uint32(frame[offsetOfNext:]))
	if b.left > 1 && step < sizeofFrameHdr {
		return false
	}
	b.next += step // of the last frame it means nothing
	return true
}

// Release gives the block back to the kernel. Releasing twice does nothing.
func (b *Block) Release() {
	if b.memory == nil {
		return
	}
	w := b.worker
	// The store orders the uses of the block before it.
	atomic.StoreUint32(blockStatus(b.memory), unix.TP_STATUS_KERNEL)
	b.memory, b.left = nil, 0
	b.merged.reset()
	w.index = (w.index + 1) % (len(w.ring) / w.blockSize)
	w.mu.Unlock()
}
