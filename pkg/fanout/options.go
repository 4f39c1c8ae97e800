package fanout

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"os"
	"strconv"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Mode is how the kernel selects a frame's worker.
type Mode uint8

// The modes. None of them overflows to another worker when a ring is full, since
// that would reorder packets of a flow.
const (
	// ModeCPU selects the worker by the number of the CPU on which the kernel
	// handles the frame, modulo the number of workers. Flows stay in order if the
	// network card, or a cpumap, keeps each on one CPU.
	ModeCPU Mode = iota
	// ModeHash uses the kernel's flow hash: addresses and, except for fragments,
	// ports; it is the same in both directions.
	ModeHash
	// ModeEBPF runs Options.Steering.
	ModeEBPF
)

func (m Mode) String() string {
	switch m {
	case ModeCPU:
		return "cpu"
	case ModeHash:
		return "hash"
	case ModeEBPF:
		return "ebpf"
	}
	return "mode " + strconv.Itoa(int(m))
}

// kernelMode returns the mode's constant in include/uapi/linux/if_packet.h.
func (m Mode) kernelMode() uint32 {
	switch m {
	case ModeHash:
		return unix.PACKET_FANOUT_HASH
	case ModeEBPF:
		return unix.PACKET_FANOUT_EBPF
	}
	return unix.PACKET_FANOUT_CPU
}

// Filter selects the frames that reach the rings. The zero Filter selects all.
//
// A filter sees the frame from its link-layer header on, on devices that have
// one, and without the outer VLAN tag, which is in the socket buffer's vlan_tci.
// It returns how many bytes of the frame to keep: 0 drops it.
type Filter struct {
	// Program is a program of type SocketFilter. Before Linux 6.2 it must itself drop
	// the frames that the host sends (packet type PACKET_OUTGOING). The caller keeps
	// ownership, and may close it after the call: the kernel holds its own reference.
	Program *ebpf.Program
	// Classic is a classic BPF program, used if Program is nil. It never sees frames
	// that the host sends.
	Classic []unix.SockFilter
}

// Defaults of [Options]; sizes in bytes.
const (
	DefaultBlockSize    = 128 << 10
	DefaultBlocks       = 128
	DefaultBlockTimeout = time.Millisecond
	DefaultFrameSize    = 2 << 10
)

// minBlockSize fits the longest merged frame: 64 KiB plus headers. A frame that
// does not fit into a block is truncated.
const minBlockSize = 128 << 10

// maxWorkers is PACKET_FANOUT_MAX of net/packet/internal.h.
const maxWorkers = 1 << 16

// Options configure [Open]. Interface and Index are required.
type Options struct {
	// Interface is the interface's name, used in messages only.
	Interface string
	// Index is the interface's index in the network namespace of the thread that
	// calls Open.
	Index int
	// Workers is the number of sockets; 0 means 1.
	Workers int
	Mode    Mode
	// Steering is the program of ModeEBPF, of type SocketFilter, such as that of
	// [NewSteering]: it returns the worker's number, which the kernel takes modulo
	// the number of workers, and sees the frame from its network header on. The
	// caller keeps ownership, and may close it after Open.
	Steering *ebpf.Program
	Filter   Filter
	// Outgoing also receives frames that leave through the interface, if
	// Filter.Program is set and accepts them: other filters drop them.
	Outgoing bool
	// BlockSize is in bytes: a power of two, and at least 128 KiB; 0 means
	// DefaultBlockSize.
	BlockSize int
	// Blocks is the number of blocks of each worker's ring; 0 means
	// DefaultBlocks. A delayed worker loses nothing for Blocks times BlockTimeout
	// at low rates, or until the ring's bytes are full at high ones.
	Blocks int
	// BlockTimeout is the time after which the kernel hands over a partly filled
	// block: whole milliseconds; 0 means DefaultBlockTimeout. It bounds the wait of
	// a frame in a block, and its timer is the only cost of an idle worker. Before
	// Linux 6.18 it is rounded up to the kernel's tick.
	BlockTimeout time.Duration
	// Frames is the number of frames of a frame ring that each worker gets in
	// addition to the ring of blocks: a power of two from 64 up; 0 means no frame
	// ring. It needs CAP_BPF, and works with ModeCPU and ModeHash; the latter then
	// hashes like [ByAddressesAndPorts], differently in the two directions.
	Frames int
	// FrameSize is the size of a slot of the frame ring, in bytes: a power of two
	// from 2 to 64 KiB; 0 means DefaultFrameSize. [FrameOverhead] bytes of it are
	// not available to the packet; longer packets use blocks.
	FrameSize int
}

// complete fills in the defaults and validates, since the kernel's errno would not
// name the option.
func (o Options) complete() (Options, error) {
	setDefault(&o.Workers, 1)
	setDefault(&o.BlockSize, DefaultBlockSize)
	setDefault(&o.Blocks, DefaultBlocks)
	if o.BlockTimeout == 0 {
		o.BlockTimeout = DefaultBlockTimeout
	}
	setDefault(&o.FrameSize, DefaultFrameSize)
	switch {
	case o.Index <= 0 || o.Index > math.MaxInt32:
		return o, fmt.Errorf("interface index %d: must be positive", o.Index)
	case o.Workers < 0 || o.Workers > maxWorkers:
		return o, fmt.Errorf("%d workers: must be 1 to %d", o.Workers, maxWorkers)
	case o.Mode > ModeEBPF:
		return o, fmt.Errorf("%s: must be cpu, hash or ebpf", o.Mode)
	case (o.Mode == ModeEBPF) != (o.Steering != nil):
		return o, fmt.Errorf("mode %s: a steering program belongs to mode ebpf, and to no other", o.Mode)
	case o.BlockSize < minBlockSize || bits.OnesCount(uint(o.BlockSize)) != 1 || o.BlockSize%os.Getpagesize() != 0:
		return o, fmt.Errorf("block size %d: must be a power of two, at least %d", o.BlockSize, minBlockSize)
	case o.Blocks < 2 || o.Blocks > math.MaxInt32/o.BlockSize:
		return o, fmt.Errorf("%d blocks of %d bytes: must be at least 2, and under 2 GiB together", o.Blocks, o.BlockSize)
	case o.BlockTimeout < time.Millisecond || o.BlockTimeout > time.Second || o.BlockTimeout%time.Millisecond != 0:
		return o, fmt.Errorf("block timeout %v: must be whole milliseconds, 1ms to 1s", o.BlockTimeout)
	case o.Frames != 0 && (o.Frames < minFrames || o.Frames > maxFrames || bits.OnesCount(uint(o.Frames)) != 1):
		return o, fmt.Errorf("%d frames: must be 0, or a power of two from %d to %d", o.Frames, minFrames, maxFrames)
	case o.FrameSize < minFrameSize || o.FrameSize > frameBlock || bits.OnesCount(uint(o.FrameSize)) != 1:
		return o, fmt.Errorf("frame size %d: must be a power of two from %d to %d", o.FrameSize, minFrameSize, frameBlock)
	case o.Frames != 0 && o.Mode == ModeEBPF:
		return o, errors.New("frames: mode ebpf has a program of its own, and no frame ring")
	case o.Frames != 0 && o.Workers > maxFrameWorkers:
		return o, fmt.Errorf("%d workers with a frame ring: must be 1 to %d", o.Workers, maxFrameWorkers)
	}
	return o, o.Filter.check()
}

func setDefault(v *int, value int) {
	if *v == 0 {
		*v = value
	}
}

func (f Filter) check() error {
	if f.Program != nil && f.Classic != nil {
		return errors.New("filter: a program and a classic one: must be one of the two")
	}
	if most := math.MaxUint16 - skipLen; len(f.Classic) > most {
		return fmt.Errorf("filter of %d instructions: must be at most %d", len(f.Classic), most)
	}
	return nil
}
