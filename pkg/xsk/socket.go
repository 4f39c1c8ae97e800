package xsk

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	defaultRing = 2048
	maxRing     = 1 << 16
	// minTXBudget is TX_BATCH_SIZE of net/xdp/xsk.c: the kernel's default and the least
	// that XDP_MAX_TX_SKB_BUDGET takes.
	minTXBudget = 32
	// MaxSegments is how many descriptors one packet may have in copy mode: the least
	// CONFIG_MAX_SKB_FRAGS. A zero-copy driver may take fewer (xdp-zc-max-segs of the
	// netdev netlink family).
	MaxSegments = 17
)

// Options says how to open a socket. Sizes are in descriptors and powers of two; the
// zero value receives and sends.
type Options struct {
	// FillSize and CompletionSize are the sizes of the rings that give the kernel
	// frames and take them back; 0 means 2048.
	FillSize, CompletionSize int
	// RXSize and TXSize are the sizes of the rings of packets; 0 means 2048. TXSize is
	// also how many frames the kernel can hold before Send takes no more.
	RXSize, TXSize int
	// NoRX and NoTX leave out one direction.
	NoRX, NoTX bool
	// TXBudget is how many frames one system call sends in copy mode
	// (XDP_MAX_TX_SKB_BUDGET, Linux 6.17): 32 to TXSize; 0 leaves the kernel's 32.
	// Older kernels answer unix.ENOPROTOOPT.
	TXBudget int
	// SendBuffer is how many bytes of frames may be with the driver in copy mode, each
	// counted with what the kernel needs to manage it (SO_SNDBUFFORCE, which needs
	// CAP_NET_ADMIN); 0 leaves net.core.wmem_default. Kick answers EAGAIN when it is
	// used up.
	SendBuffer int
	// BusyPoll is how long a system call polls the driver (SO_BUSY_POLL), rounded up to
	// microseconds; 0 does not poll.
	BusyPoll time.Duration
	// PreferBusyPoll keeps the driver's interrupts off between polls
	// (SO_PREFER_BUSY_POLL), as long as the interface's napi_defer_hard_irqs and
	// gro_flush_timeout say.
	PreferBusyPoll bool
	// BusyPollBudget is how many packets one poll takes (SO_BUSY_POLL_BUDGET); 0 leaves
	// the kernel's 8.
	BusyPollBudget int
}

// Socket is an AF_XDP socket on one queue of one interface.
type Socket struct {
	frames         *Frames
	ifindex, queue int
	fd             atomic.Int64 // -1 once closed
	zeroCopy       bool
	multiBuffer    bool
	busyPoll       bool

	fill producerRing[uint64]
	comp consumerRing[uint64]
	rx   consumerRing[Desc]
	tx   producerRing[Desc]
	maps [][]byte

	inFill []bool   // frames in the fill ring, or in the kernel on their way to the RX ring
	inTX   []uint32 // references in the TX ring, or in the kernel on their way to the completion ring
	sent   int      // the sum of inTX
	txBusy uint64
}

// Open opens a socket on a queue of an interface of the calling thread's network
// namespace, and gives it the use of frames. The caller owns it and must Close it.
//
// One UMEM may have sockets on any number of interfaces and queues, but only one on
// each, and no other socket may be bound there: the [*BindError] then matches unix.EBUSY,
// as it does for a moment after another socket was closed.
func Open(frames *Frames, ifindex, queue int, opts Options) (_ *Socket, err error) {
	opts = opts.withDefaults()
	if err := opts.validate(ifindex, queue); err != nil {
		return nil, fmt.Errorf("open AF_XDP socket: %w", err)
	}
	fd, err := unix.Socket(unix.AF_XDP, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open AF_XDP socket (needs CAP_NET_RAW): %w", err)
	}
	s := &Socket{
		frames: frames, ifindex: ifindex, queue: queue, multiBuffer: frames.umem.opts.MultiBuffer, busyPoll: opts.BusyPoll > 0,
		inFill: make([]bool, frames.Len()), inTX: make([]uint32, frames.Len()),
	}
	s.fd.Store(int64(fd))
	s.dropRings()
	defer func() {
		if err != nil {
			err = errors.Join(err, s.unmap(), unix.Close(fd))
		}
	}()
	if err := s.makeRings(fd, opts); err != nil {
		return nil, err
	}
	if err := s.configure(fd, opts); err != nil {
		return nil, err
	}
	if err := s.join(fd); err != nil {
		return nil, err
	}
	frames.sockets = append(frames.sockets, s)
	return s, nil
}

func (o Options) withDefaults() Options {
	for _, size := range []*int{&o.FillSize, &o.CompletionSize, &o.RXSize, &o.TXSize} {
		if *size == 0 {
			*size = defaultRing
		}
	}
	return o
}

func (o Options) validate(ifindex, queue int) error {
	if ifindex < 1 {
		return &OptionError{"ifindex", ifindex, "the index of an interface, from 1"}
	}
	if queue < 0 || queue > 65535 {
		return &OptionError{"queue", queue, "0 to 65535"}
	}
	return o.Validate()
}

// Validate says by an [*OptionError] which option Open would refuse.
func (o Options) Validate() error {
	o = o.withDefaults()
	for _, ring := range []struct {
		name string
		size int
	}{{"FillSize", o.FillSize}, {"CompletionSize", o.CompletionSize}, {"RXSize", o.RXSize}, {"TXSize", o.TXSize}} {
		if ring.size < 1 || ring.size > maxRing || ring.size&(ring.size-1) != 0 {
			return &OptionError{ring.name, ring.size, fmt.Sprintf("a power of two up to %d", maxRing)}
		}
	}
	switch {
	case o.NoRX && o.NoTX:
		return &OptionError{"NoRX and NoTX", true, "at least one direction"}
	case o.TXBudget != 0 && (o.NoTX || o.TXBudget < minTXBudget || o.TXBudget > o.TXSize):
		return &OptionError{"TXBudget", o.TXBudget, fmt.Sprintf("%d to TXSize, %d", minTXBudget, o.TXSize)}
	case o.SendBuffer < 0:
		return &OptionError{"SendBuffer", o.SendBuffer, "0 or more bytes"}
	case o.BusyPoll < 0 || o.BusyPoll > time.Second:
		return &OptionError{"BusyPoll", o.BusyPoll, "0 to 1s"}
	case o.BusyPollBudget < 0 || o.BusyPollBudget > 65535:
		return &OptionError{"BusyPollBudget", o.BusyPollBudget, "0 to 65535 packets"}
	case o.BusyPoll == 0 && (o.PreferBusyPoll || o.BusyPollBudget > 0):
		return &OptionError{"BusyPoll", o.BusyPoll, "a duration, where PreferBusyPoll or BusyPollBudget is set"}
	}
	return nil
}

// makeRings has the kernel make the rings and maps them.
func (s *Socket) makeRings(fd int, opts Options) error {
	setSize := func(name string, opt, size int) error {
		if err := unix.SetsockoptInt(fd, unix.SOL_XDP, opt, size); err != nil {
			return fmt.Errorf("make %s ring of %d: %w", name, size, err)
		}
		return nil
	}
	if err := errors.Join(
		setSize("fill", unix.XDP_UMEM_FILL_RING, opts.FillSize),
		setSize("completion", unix.XDP_UMEM_COMPLETION_RING, opts.CompletionSize),
	); err != nil {
		return err
	}
	if !opts.NoRX {
		if err := setSize("RX", unix.XDP_RX_RING, opts.RXSize); err != nil {
			return err
		}
	}
	if !opts.NoTX {
		if err := setSize("TX", unix.XDP_TX_RING, opts.TXSize); err != nil {
			return err
		}
	}
	off, err := getsockopt[unix.XDPMmapOffsets](fd, unix.XDP_MMAP_OFFSETS)
	if err != nil {
		return fmt.Errorf("offsets of the rings: %w", err)
	}
	fill, err := mapRing[uint64](s, fd, unix.XDP_UMEM_PGOFF_FILL_RING, off.Fr, opts.FillSize)
	if err != nil {
		return fmt.Errorf("map fill ring: %w", err)
	}
	comp, err := mapRing[uint64](s, fd, unix.XDP_UMEM_PGOFF_COMPLETION_RING, off.Cr, opts.CompletionSize)
	if err != nil {
		return fmt.Errorf("map completion ring: %w", err)
	}
	s.fill, s.comp = newProducerRing(fill), newConsumerRing(comp)
	if !opts.NoRX {
		rx, err := mapRing[Desc](s, fd, unix.XDP_PGOFF_RX_RING, off.Rx, opts.RXSize)
		if err != nil {
			return fmt.Errorf("map RX ring: %w", err)
		}
		s.rx = newConsumerRing(rx)
	}
	if !opts.NoTX {
		tx, err := mapRing[Desc](s, fd, unix.XDP_PGOFF_TX_RING, off.Tx, opts.TXSize)
		if err != nil {
			return fmt.Errorf("map TX ring: %w", err)
		}
		s.tx = newProducerRing(tx)
	}
	return nil
}

func mapRing[T any](s *Socket, fd int, pgoff int64, off unix.XDPRingOffset, size int) (ring[T], error) {
	var entry T
	length := int(off.Desc) + size*int(unsafe.Sizeof(entry))
	mem, err := unix.Mmap(fd, pgoff, length, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return ring[T]{}, err
	}
	s.maps = append(s.maps, mem)
	return newRing[T](mem, off, size), nil
}

func (s *Socket) configure(fd int, opts Options) error {
	set := func(name string, level, opt, value int) error {
		if err := unix.SetsockoptInt(fd, level, opt, value); err != nil {
			return fmt.Errorf("set %s to %d: %w", name, value, err)
		}
		return nil
	}
	var errs []error
	if opts.TXBudget > 0 {
		errs = append(errs, set("TXBudget", unix.SOL_XDP, unix.XDP_MAX_TX_SKB_BUDGET, opts.TXBudget))
	}
	if opts.SendBuffer > 0 {
		errs = append(errs, set("SendBuffer", unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, opts.SendBuffer))
	}
	if opts.BusyPoll > 0 {
		us := (opts.BusyPoll + time.Microsecond - 1) / time.Microsecond
		errs = append(errs, set("BusyPoll", unix.SOL_SOCKET, unix.SO_BUSY_POLL, int(us)))
	}
	if opts.PreferBusyPoll {
		errs = append(errs, set("PreferBusyPoll", unix.SOL_SOCKET, unix.SO_PREFER_BUSY_POLL, 1))
	}
	if opts.BusyPollBudget > 0 {
		errs = append(errs, set("BusyPollBudget", unix.SOL_SOCKET, unix.SO_BUSY_POLL_BUDGET, opts.BusyPollBudget))
	}
	return errors.Join(errs...)
}

// join binds the socket to its queue, with the memory that the UMEM's other sockets use.
func (s *Socket) join(fd int) error {
	u := s.frames.umem
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.area == nil {
		return fmt.Errorf("bind to queue %d of interface %d: UMEM %w", s.queue, s.ifindex, os.ErrClosed)
	}
	if err := u.bind(fd, s); err != nil {
		return s.bindError(err)
	}
	got, err := getsockopt[uint32](fd, unix.XDP_OPTIONS) // struct xdp_options
	if err != nil {
		return fmt.Errorf("options of AF_XDP socket: %w", err)
	}
	s.zeroCopy = got&unix.XDP_OPTIONS_ZEROCOPY != 0
	u.sockets = append(u.sockets, s)
	return nil
}

// bind shares what another socket has registered (XDP_SHARED_UMEM), which fixes the
// mode, too. It registers the memory once more where there is no such socket: none is
// open, or their interfaces are gone; or, in ModeAuto, where the mode of the others is
// not possible.
func (u *UMEM) bind(fd int, s *Socket) error {
	flags := uint16(unix.XDP_USE_NEED_WAKEUP)
	if u.opts.MultiBuffer {
		flags |= unix.XDP_USE_SG
	}
	switch u.opts.Mode {
	case ModeCopy:
		flags |= unix.XDP_COPY
	case ModeZeroCopy:
		flags |= unix.XDP_ZEROCOPY
	}
	for _, other := range u.sockets {
		err := bindTo(fd, s, unix.XDP_SHARED_UMEM, other.FD())
		switch {
		case errors.Is(err, unix.EBADF): // its interface is gone
			continue
		case errors.Is(err, unix.EOPNOTSUPP) && u.opts.Mode == ModeAuto:
			flags |= unix.XDP_COPY
			continue
		}
		return err
	}
	if err := u.register(fd); err != nil {
		return err
	}
	return bindTo(fd, s, flags, 0)
}

func (u *UMEM) register(fd int) error {
	reg := unix.XDPUmemReg{
		Addr: uint64(uintptr(unsafe.Pointer(&u.mem[0]))), Len: uint64(len(u.mem)),
		Size: uint32(u.opts.FrameSize), Headroom: uint32(u.opts.Headroom),
	}
	err := setsockopt(fd, unix.XDP_UMEM_REG, &reg)
	if errors.Is(err, unix.ENOBUFS) {
		return fmt.Errorf("register UMEM of %d bytes: more than RLIMIT_MEMLOCK allows: raise it (ulimit -l) or give CAP_IPC_LOCK: %w", len(u.mem), err)
	}
	if err != nil {
		return fmt.Errorf("register UMEM of %d bytes: %w", len(u.mem), err)
	}
	return nil
}

// bindError says which of the several reasons that an error number has it was.
func (s *Socket) bindError(err error) error {
	reason := "refused"
	switch {
	case errors.Is(err, unix.ENODEV):
		reason = "no such interface"
	case errors.Is(err, unix.EINVAL):
		// The kernel also means by it that this UMEM has a socket there already.
		other := func(o *Socket) bool { return o.ifindex == s.ifindex && o.queue == s.queue }
		if slices.ContainsFunc(s.frames.umem.sockets, other) {
			reason, err = "this UMEM has a socket there", unix.EBUSY
			break
		}
		reason = "no such queue"
		if s.multiBuffer {
			reason += ", or no multi-buffer (Linux 6.6)"
		}
	case errors.Is(err, unix.EBUSY):
		reason = "another socket has it"
	case errors.Is(err, unix.EOPNOTSUPP):
		reason = fmt.Sprintf("mode %s is not possible", s.frames.umem.opts.Mode)
	}
	return &BindError{Ifindex: s.ifindex, Queue: s.queue, Reason: reason, Err: err}
}

// FD returns the file descriptor, for an XSKMAP; the socket keeps owning it. It is -1
// once the socket is closed.
func (s *Socket) FD() int { return int(s.fd.Load()) }

// Ifindex returns the interface that the socket was opened on.
func (s *Socket) Ifindex() int { return s.ifindex }

// Queue returns the queue that the socket was opened on.
func (s *Socket) Queue() int { return s.queue }

// ZeroCopy reports whether the driver uses the UMEM itself; otherwise the kernel copies.
func (s *Socket) ZeroCopy() bool { return s.zeroCopy }

// NeedWakeup reports whether the kernel asks now to be woken by a system call, to go on
// receiving and to send (XDP_RING_NEED_WAKEUP); false for a direction that the socket
// has not. WakeRX and Kick ask the same.
func (s *Socket) NeedWakeup() (rx, tx bool) {
	return s.fill.needsWakeup(), s.tx.needsWakeup()
}

// Frames returns what the socket was opened with.
func (s *Socket) Frames() *Frames { return s.frames }

// Close closes the socket and gives the frames that were in its rings back to Frames,
// but for those that a driver may still use (see [Frames.Retired]): to keep them few,
// stop sending and Complete until Outstanding is 0, first. The kernel takes the
// socket out of every XSKMAP, and gives up the queue a moment after Close has
// returned. It may be called again.
func (s *Socket) Close() error {
	fd := s.FD()
	if fd < 0 {
		return nil
	}
	s.Complete(int(s.comp.size))
	s.reclaimUnsent()
	s.frames.umem.remove(s) // before the number is void: another's Open may be sharing it
	s.fd.Store(-1)
	// The mapped rings keep the socket alive, as its descriptor does: both must go
	// before the kernel stops using the frames.
	err := errors.Join(s.unmap(), unix.Close(fd))
	s.reclaim()
	if err != nil {
		return fmt.Errorf("close AF_XDP socket on queue %d of interface %d: %w", s.queue, s.ifindex, err)
	}
	return nil
}

// reclaimUnsent takes back what is still in the TX ring. Only in copy mode it stays
// there, because it is this process that has it sent.
func (s *Socket) reclaimUnsent() {
	if s.zeroCopy {
		return
	}
	for n := range s.tx.pending() {
		// The kernel may have sent it and not said so; then it has completed.
		if i, ok := s.frames.index(s.tx.unread(n).Addr); ok && s.inTX[i] > 0 {
			s.inTX[i]--
			s.frames.drop(i)
		}
	}
}

// reclaim takes back the frames that were given to the kernel to receive into; in copy
// mode it writes them no more. The rest is retired.
func (s *Socket) reclaim() {
	f := s.frames
	for i := range s.inFill {
		if refs := s.inTX[i]; refs > 0 {
			f.retire(uint32(i), refs)
		}
		switch {
		case s.inFill[i] && s.zeroCopy:
			f.retire(uint32(i), 1)
		case s.inFill[i]:
			f.drop(uint32(i))
		}
	}
	s.inFill, s.inTX, s.sent = nil, nil, 0
	f.sockets = slices.DeleteFunc(f.sockets, func(other *Socket) bool { return other == s })
}

func (s *Socket) unmap() error {
	s.dropRings()
	var errs []error
	for _, mem := range s.maps {
		errs = append(errs, unix.Munmap(mem))
	}
	s.maps = nil
	return errors.Join(errs...)
}

func (s *Socket) dropRings() {
	s.fill, s.comp = producerRing[uint64]{ring: noRing[uint64]()}, consumerRing[uint64]{ring: noRing[uint64]()}
	s.rx, s.tx = consumerRing[Desc]{ring: noRing[Desc]()}, producerRing[Desc]{ring: noRing[Desc]()}
}

// Statistics are the counters of a socket since it was opened (struct xdp_statistics);
// the first six are the kernel's.
type Statistics struct {
	RXDropped       uint64 // packets without a frame, or longer than one frame
	RXInvalid       uint64 // descriptors that the kernel refused
	TXInvalid       uint64 // descriptors that the kernel refused: never completed
	RXRingFull      uint64 // packets dropped since the RX ring was full
	FillRingEmpty   uint64 // times that no frame was in the fill ring (also counted in RXDropped in copy mode)
	TXRingEmpty     uint64 // times that nothing was in the TX ring
	TXDeviceDropped uint64 // packets that completed unsent since the device dropped them (EBUSY from Kick)
}

// Statistics asks the kernel for the counters.
func (s *Socket) Statistics() (Statistics, error) {
	fd := s.FD()
	if fd < 0 {
		return Statistics{}, os.ErrClosed
	}
	k, err := getsockopt[unix.XDPStatistics](fd, unix.XDP_STATISTICS)
	if err != nil {
		return Statistics{}, fmt.Errorf("statistics of AF_XDP socket on queue %d of interface %d: %w", s.queue, s.ifindex, err)
	}
	return Statistics{
		RXDropped: k.Rx_dropped, RXInvalid: k.Rx_invalid_descs, TXInvalid: k.Tx_invalid_descs, RXRingFull: k.Rx_ring_full,
		FillRingEmpty: k.Rx_fill_ring_empty_descs, TXRingEmpty: k.Tx_ring_empty_descs, TXDeviceDropped: s.txBusy,
	}, nil
}
