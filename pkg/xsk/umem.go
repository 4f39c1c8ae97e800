package xsk

import (
	"errors"
	"fmt"
	"math/bits"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// Sizes in bytes.
const (
	// packetHeadroom is the room that the kernel keeps before a received packet for XDP
	// programs (XDP_PACKET_HEADROOM).
	packetHeadroom = unix.XDP_PACKET_HEADROOM
	minFrameSize   = 2048    // XDP_UMEM_MIN_CHUNK_SIZE
	hugePageSize   = 2 << 20 // MAP_HUGE_2MB
	maxFrames      = 1 << 24
)

// mapHuge2MB requests 2 MB pages regardless of the default size (MAP_HUGE_2MB: log2 of
// the size in the bits from MAP_HUGE_SHIFT).
const mapHuge2MB = 21 << unix.MAP_HUGE_SHIFT

// Mode says how frames are transferred between the driver and the UMEM.
type Mode uint8

const (
	// ModeAuto uses zero-copy if the driver of the first interface supports it, and copy
	// mode otherwise; after a first interface with zero-copy, those without it use copy
	// mode. [Socket.ZeroCopy] reports the mode in use.
	ModeAuto Mode = iota
	// ModeCopy makes the kernel copy.
	ModeCopy
	// ModeZeroCopy makes the driver use the UMEM; Open fails on an interface without
	// support.
	ModeZeroCopy
)

func (m Mode) String() string {
	switch m {
	case ModeAuto:
		return "auto"
	case ModeCopy:
		return "copy"
	case ModeZeroCopy:
		return "zero-copy"
	default:
		return fmt.Sprintf("mode %d", uint8(m))
	}
}

// UMEMOptions configures a UMEM. Mode and MultiBuffer are here and not in [Options]
// because the first socket of a UMEM fixes them for all.
type UMEMOptions struct {
	// Frames is the number of frames; required.
	Frames int
	// FrameSize is 2048 or 4096 bytes; 0 means 2048. It includes the headroom and 256
	// bytes that the kernel keeps for XDP programs.
	FrameSize int
	// Headroom is the number of additional bytes to keep free before each received packet.
	Headroom int
	// HugePages allocates the memory from 2 MB pages, which zero-copy drivers map in
	// fewer pieces. There is no silent fallback: NewUMEM returns [ErrNoHugePages], and
	// the caller may try again without.
	HugePages bool
	// Mode selects zero-copy or copy mode.
	Mode Mode
	// MultiBuffer lets a packet have several frames (XDP_USE_SG, Linux 6.6). The XDP
	// program needs BPF_F_XDP_HAS_FRAGS.
	MultiBuffer bool
	// Shared makes the memory one that another process can map, by the descriptor [UMEM.FD]: see
	// [InheritUMEM].
	Shared bool
	// CheckOwnership tracks which references to each frame the caller holds, so that
	// [Frames.Verify] and [Socket.Send] detect the use of others. For tests.
	CheckOwnership bool
}

// UMEM is memory shared with the kernel, divided into frames. Its methods may be
// called from any goroutine; call Close after the last use of memory returned by Data
// and Frame.
type UMEM struct {
	opts  UMEMOptions
	shift uint // log2 of the frame size
	mem   []byte
	area  []byte // the mapping: mem, rounded up to whole pages

	mu      sync.Mutex
	fd      int // of shared memory; -1: none
	given   int // frames assigned by NewFrames
	sockets []*Socket
}

// NewUMEM allocates the memory. The caller owns it and must Close it. The first [Open]
// registers it with the kernel, which locks it in RAM.
func NewUMEM(opts UMEMOptions) (*UMEM, error) {
	if opts.FrameSize == 0 {
		opts.FrameSize = minFrameSize
	}
	if err := opts.validate(); err != nil {
		return nil, fmt.Errorf("make UMEM: %w", err)
	}
	if !opts.Shared {
		return opts.mapArea(-1)
	}
	flags := unix.MFD_CLOEXEC
	if opts.HugePages {
		flags |= unix.MFD_HUGETLB | unix.MFD_HUGE_2MB
	}
	fd, err := unix.MemfdCreate("xdpcast-umem", flags)
	if err != nil {
		return nil, fmt.Errorf("make memory of UMEM: %w", err)
	}
	size, _ := opts.sizes()
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		return nil, errors.Join(fmt.Errorf("make %d bytes of UMEM: %w", size, err), unix.Close(fd))
	}
	u, err := opts.mapArea(fd)
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return u, nil
}

// sizes are those of the memory and of its pages, in bytes.
func (o UMEMOptions) sizes() (size, page int) {
	page = unix.Getpagesize()
	if o.HugePages {
		page = hugePageSize
	}
	size = o.Frames * o.FrameSize
	return (size + page - 1) / page * page, page
}

// mapArea maps the memory behind a descriptor, -1 for private memory.
func (o UMEMOptions) mapArea(fd int) (*UMEM, error) {
	size, page := o.sizes()
	flags := unix.MAP_SHARED
	if fd < 0 {
		flags = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
		if o.HugePages {
			flags |= unix.MAP_HUGETLB | mapHuge2MB
		}
	}
	area, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		if o.HugePages && errors.Is(err, unix.ENOMEM) {
			return nil, fmt.Errorf("make UMEM: %w: need %d of 2 MB (sysctl vm.nr_hugepages)", ErrNoHugePages, size/page)
		}
		return nil, fmt.Errorf("map %d bytes of UMEM: %w", size, err)
	}
	used := o.Frames * o.FrameSize
	return &UMEM{opts: o, fd: fd, shift: uint(bits.TrailingZeros(uint(o.FrameSize))), mem: area[:used:used], area: area}, nil
}

func (o UMEMOptions) validate() error {
	switch {
	case o.FrameSize < minFrameSize || o.FrameSize > unix.Getpagesize() || o.FrameSize&(o.FrameSize-1) != 0:
		return &OptionError{"FrameSize", o.FrameSize, fmt.Sprintf("a power of two from %d to %d", minFrameSize, unix.Getpagesize())}
	case o.Frames < 1 || o.Frames > maxFrames:
		return &OptionError{"Frames", o.Frames, fmt.Sprintf("1 to %d", maxFrames)}
	case o.Headroom < 0 || o.Headroom >= o.FrameSize-packetHeadroom:
		return &OptionError{"Headroom", o.Headroom, fmt.Sprintf("0 to %d", o.FrameSize-packetHeadroom-1)}
	case o.Mode > ModeZeroCopy:
		return &OptionError{"Mode", o.Mode, "auto, copy or zero-copy"}
	}
	return nil
}

// Close unmaps the memory. While sockets are open it returns [ErrInUse] and does
// nothing; it may be called again.
func (u *UMEM) Close() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.area == nil {
		return nil
	}
	if n := len(u.sockets); n > 0 {
		return fmt.Errorf("close UMEM: %w: close its %d sockets first", ErrInUse, n)
	}
	if err := unix.Munmap(u.area); err != nil {
		return fmt.Errorf("unmap UMEM: %w", err)
	}
	u.mem, u.area = nil, nil
	if fd := u.fd; fd >= 0 {
		u.fd = -1
		if err := unix.Close(fd); err != nil {
			return fmt.Errorf("close memory of UMEM: %w", err)
		}
	}
	return nil
}

// FrameSize returns the size of a frame in bytes.
func (u *UMEM) FrameSize() int { return u.opts.FrameSize }

// RXSize returns how many bytes of a packet fit into one received frame. Without
// MultiBuffer, the kernel drops longer packets (Statistics.RXDropped).
func (u *UMEM) RXSize() int { return u.opts.FrameSize - u.opts.Headroom - packetHeadroom }

// Data returns the bytes of a descriptor; nil if they are outside the UMEM. They are
// shared with the kernel: valid until the frame is released or sent, or the UMEM
// closed.
func (u *UMEM) Data(d Desc) []byte {
	size := uint64(len(u.mem))
	if d.Addr > size || uint64(d.Len) > size-d.Addr {
		return nil
	}
	end := d.Addr + uint64(d.Len)
	return u.mem[d.Addr:end:end]
}

// Frame returns the whole frame that contains an address; nil if it is outside the
// UMEM.
func (u *UMEM) Frame(addr uint64) []byte {
	start := addr &^ uint64(u.opts.FrameSize-1)
	return u.Data(Desc{Addr: start, Len: uint32(u.opts.FrameSize)})
}

// NewFrames assigns n free frames to a new owner. They cannot be returned, only freed
// with the whole UMEM.
func (u *UMEM) NewFrames(n int) (*Frames, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.area == nil {
		return nil, fmt.Errorf("take frames: %w", os.ErrClosed)
	}
	if left := u.opts.Frames - u.given; n < 1 || n > left {
		return nil, fmt.Errorf("take %d frames: want 1 to the %d that are left of %d", n, left, u.opts.Frames)
	}
	f := newFrames(u, u.given, n)
	u.given += n
	return f, nil
}

func (u *UMEM) remove(s *Socket) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.sockets = slices.DeleteFunc(u.sockets, func(other *Socket) bool { return other == s })
}
