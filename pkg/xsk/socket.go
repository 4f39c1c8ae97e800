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
	// minTXBudget is TX_BATCH_SIZE of net/xdp/xsk.c: the kernel's default and the minimum
	// of XDP_MAX_TX_SKB_BUDGET.
	minTXBudget = 32
	// MaxSegments is the maximum number of descriptors of a packet in copy mode: the
	// smallest CONFIG_MAX_SKB_FRAGS. A zero-copy driver may accept fewer (xdp-zc-max-segs
	// of the netdev netlink family).
	MaxSegments = 17
)

// Options configures a socket. Sizes are in descriptors and powers of two; the zero
// value receives and sends.
type Options struct {
	// FillSize and CompletionSize are the sizes of the rings that pass frames to the
	// kernel and back; 0 means 2048.
	FillSize, CompletionSize int
	// RXSize and TXSize are the sizes of the packet rings; 0 means 2048. TXSize also
	// bounds the frames that the kernel holds before Send takes no more.
	RXSize, TXSize int
	// NoRX and NoTX omit one direction.
	NoRX, NoTX bool
	// TXBudget is how many frames one system call sends in copy mode
	// (XDP_MAX_TX_SKB_BUDGET, Linux 6.17): 32 to TXSize; 0 keeps the kernel's default
	// of 32. Open returns unix.ENOPROTOOPT on older kernels.
	TXBudget int
	// SendBuffer bounds the bytes of frames held by the driver in copy mode, including
	// the kernel's overhead per frame (SO_SNDBUFFORCE, which needs CAP_NET_ADMIN); 0
	// keeps net.core.wmem_default. Kick returns EAGAIN when it is used up.
	SendBuffer int
	// BusyPoll is how long a system call polls the driver (SO_BUSY_POLL), rounded up to
	// microseconds; 0 does not poll.
	BusyPoll time.Duration
	// PreferBusyPoll keeps the driver's interrupts off between polls
	// (SO_PREFER_BUSY_POLL), within the interface's napi_defer_hard_irqs and
	// gro_flush_timeout.
	PreferBusyPoll bool
	// BusyPollBudget is how many packets one poll takes (SO_BUSY_POLL_BUDGET); 0 keeps
	// the kernel's default of 8.
	BusyPollBudget int
}

// Socket is an AF_XDP socket on one queue of one interface. It belongs to the goroutine of
// its Frames, except for FD, Ifindex, Queue and ZeroCopy, which any goroutine may call.
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

	suspended bool      // another process uses the rings
	inherited *mappings // until Resume

	inFill []bool   // frames between the fill ring and the RX ring
	inTX   []uint32 // references between the TX ring and the completion ring
	sent   int      // the sum of inTX
	txBusy uint64
}

// Open opens a socket that uses frames, on a queue of an interface in the calling
// thread's network namespace. The caller owns it and must Close it.
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

// Validate returns an [*OptionError] for the first option that Open would refuse.
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

// makeRings creates and maps the rings.
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
	return s.mapRings(fd, opts)
}

// mapRings maps the rings.
func (s *Socket) mapRings(fd int, opts Options) error {
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

// join binds the socket to its queue, sharing the memory of the UMEM's other sockets.
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

// bind shares the memory registered by another socket (XDP_SHARED_UMEM), which also fixes
// the mode. It registers the memory again if no other socket is open or their interfaces
// are gone, or, in ModeAuto, if the interface does not support the others' mode.
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

// bindError finds which of the possible reasons of an errno applies.
func (s *Socket) bindError(err error) error {
	reason := "refused"
	switch {
	case errors.Is(err, unix.ENODEV):
		reason = "no such interface"
	case errors.Is(err, unix.EINVAL):
		// The kernel also returns it if this UMEM already has a socket there.
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

// FD returns the file descriptor, for an XSKMAP; the socket keeps ownership. It is -1
// once the socket is closed.
func (s *Socket) FD() int { return int(s.fd.Load()) }

// Renumber gives the descriptor the lowest free number from least on. When a process is killed, the kernel
// closes the highest numbers first (a list of last references, see task_work_add in kernel/task_work.c), many others
// with a grace period each, and only then do packets that were directed to a socket go elsewhere. After an
// error, such as that the number is above the limit (RLIMIT_NOFILE), the number is what it was.
func (s *Socket) Renumber(least int) error {
	u := s.frames.umem
	u.mu.Lock() // a concurrent Open may share the descriptor
	defer u.mu.Unlock()
	old := s.FD()
	if old < 0 {
		return fmt.Errorf("renumber AF_XDP socket: %w", os.ErrClosed)
	}
	fd, err := unix.FcntlInt(uintptr(old), unix.F_DUPFD_CLOEXEC, least)
	if err != nil {
		return fmt.Errorf("renumber descriptor of AF_XDP socket to %d: %w", least, err)
	}
	s.fd.Store(int64(fd))
	if err := unix.Close(old); err != nil {
		return fmt.Errorf("close former descriptor of AF_XDP socket: %w", err)
	}
	return nil
}

// Ifindex returns the index of the interface on which the socket was opened.
func (s *Socket) Ifindex() int { return s.ifindex }

// Queue returns the queue on which the socket was opened.
func (s *Socket) Queue() int { return s.queue }

// ZeroCopy reports whether the driver uses the UMEM itself; otherwise the kernel copies.
func (s *Socket) ZeroCopy() bool { return s.zeroCopy }

// NeedWakeup reports whether the kernel currently needs a system call to continue
// receiving and to send (XDP_RING_NEED_WAKEUP); false for a direction not opened. WakeRX
// and Kick check the same.
func (s *Socket) NeedWakeup() (rx, tx bool) {
	return s.fill.needsWakeup(), s.tx.needsWakeup()
}

// Frames returns the Frames with which the socket was opened.
func (s *Socket) Frames() *Frames { return s.frames }

// Close closes the socket and returns the frames in its rings to Frames, except those
// that a driver may still use (see [Frames.Retired]): to keep them few, first stop
// sending and Complete until Outstanding is 0. The kernel removes the socket from every
// XSKMAP, and releases the queue a moment after Close has returned. It may be called
// again.
func (s *Socket) Close() error {
	fd := s.FD()
	if fd < 0 {
		return nil
	}
	s.Complete(int(s.comp.size))
	s.reclaimUnsent()
	s.frames.umem.remove(s) // before the descriptor is closed: a concurrent Open may share it
	s.fd.Store(-1)
	// The mapped rings keep the socket alive, like its descriptor: the kernel stops using
	// the frames only when both are gone.
	err := errors.Join(s.unmap(), unix.Close(fd))
	s.reclaim()
	if err != nil {
		return fmt.Errorf("close AF_XDP socket on queue %d of interface %d: %w", s.queue, s.ifindex, err)
	}
	return nil
}

// reclaimUnsent takes back the frames still in the TX ring. Only in copy mode do they stay
// there, because the kernel then sends only in this process's system calls.
func (s *Socket) reclaimUnsent() {
	if s.zeroCopy {
		return
	}
	for n := range s.tx.pending() {
		// The kernel may have sent it without publishing that; then it has completed.
		if i, ok := s.frames.index(s.tx.unread(n).Addr); ok && s.inTX[i] > 0 {
			s.inTX[i]--
			s.frames.drop(i)
		}
	}
}

// reclaim takes back the frames given to the kernel for receiving; in copy mode it no
// longer writes to them. It retires the rest.
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
	RXRingFull      uint64 // packets dropped because the RX ring was full
	FillRingEmpty   uint64 // times that the fill ring was empty (in copy mode also counted in RXDropped)
	TXRingEmpty     uint64 // times that the TX ring was empty
	TXDeviceDropped uint64 // packets completed unsent because the device dropped them (EBUSY from Kick)
}

// Statistics reads the counters from the kernel. A closed socket returns [os.ErrClosed].
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
