package xsk

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// mappings are the rings of a socket that another process uses at the moment.
type mappings struct {
	fill, comp ring[uint64]
	rx, tx     ring[Desc]
}

// Suspend ends this process's use of a socket, so that another process can continue with it: one that has
// a duplicate of its descriptor ([Socket.FD]) and of the UMEM's ([UMEM.FD]), by [Inherit] and
// [Socket.Resume]. Packets that arrive meanwhile wait in the RX ring. It returns a bitmap of the frames
// that the kernel has for receiving, by their number in Frames: bit n&7 of byte n/8.
//
// While the kernel has sent frames that have not completed it returns [ErrInUse] and does nothing. After
// a success the socket can only be closed, which leaves it to the other process.
func (s *Socket) Suspend() (filled []byte, err error) {
	if s.FD() < 0 {
		return nil, fmt.Errorf("suspend AF_XDP socket: %w", os.ErrClosed)
	}
	if s.suspended {
		return nil, fmt.Errorf("suspend AF_XDP socket: %w: it is suspended already", ErrInUse)
	}
	s.Complete(int(s.comp.size))
	if s.sent > 0 {
		return nil, fmt.Errorf("suspend AF_XDP socket on queue %d of interface %d: %w: %d frames are being sent", s.queue, s.ifindex, ErrInUse, s.sent)
	}
	filled = make([]byte, (len(s.inFill)+7)/8)
	for i, in := range s.inFill {
		if in {
			filled[i/8] |= 1 << (i % 8)
		}
	}
	s.suspended = true
	s.dropRings()
	return filled, nil
}

// Inherit maps a socket of another process, which was opened with these options on this queue. It may be
// called while that process uses the socket; [Socket.Resume] takes it over. It takes ownership of fd, also
// on an error. Before Linux 6.4 the kernel refuses with unix.EBUSY.
//
// frames are all of a UMEM from [InheritUMEM], in the order in which the other process has them.
func Inherit(frames *Frames, fd, ifindex, queue int, opts Options) (_ *Socket, err error) {
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
	opts = opts.withDefaults()
	if err := opts.validate(ifindex, queue); err != nil {
		return nil, fmt.Errorf("inherit AF_XDP socket: %w", err)
	}
	if err := s.mapRings(fd, opts); err != nil {
		return nil, fmt.Errorf("inherit AF_XDP socket on queue %d of interface %d: %w", queue, ifindex, err)
	}
	got, err := getsockopt[uint32](fd, unix.XDP_OPTIONS)
	if err != nil {
		return nil, fmt.Errorf("options of AF_XDP socket: %w", err)
	}
	s.zeroCopy = got&unix.XDP_OPTIONS_ZEROCOPY != 0
	s.inherited = &mappings{s.fill.ring, s.comp.ring, s.rx.ring, s.tx.ring}
	s.suspended = true
	s.dropRings()
	u := frames.umem
	u.mu.Lock()
	defer u.mu.Unlock()
	u.sockets = append(u.sockets, s)
	frames.sockets = append(frames.sockets, s)
	return s, nil
}

// Resume continues with an inherited socket that the other process has suspended. filled is what its
// Suspend returned; the frames must be free.
func (s *Socket) Resume(filled []byte) error {
	m, f := s.inherited, s.frames
	if m == nil || s.FD() < 0 {
		return fmt.Errorf("resume AF_XDP socket on queue %d of interface %d: it was not inherited, or is closed", s.queue, s.ifindex)
	}
	if len(filled) != (len(s.inFill)+7)/8 {
		return fmt.Errorf("resume AF_XDP socket: %d bytes say which of %d frames are filled", len(filled), len(s.inFill))
	}
	has := func(i int) bool { return filled[i/8]&(1<<(i%8)) != 0 }
	for i := range s.inFill {
		if has(i) && f.refs[i] != 0 {
			return fmt.Errorf("resume AF_XDP socket: frame %d is not free", i)
		}
	}
	for i := range s.inFill {
		if has(i) {
			s.inFill[i] = true
			f.refs[i] = 1
		}
	}
	f.free = slices.DeleteFunc(f.free, func(i uint32) bool { return f.refs[i] != 0 })
	s.fill, s.comp = newProducerRing(m.fill), newConsumerRing(m.comp)
	s.rx, s.tx = newConsumerRing(m.rx), newProducerRing(m.tx)
	s.inherited, s.suspended = nil, false
	return nil
}

// FD returns the descriptor of the memory of a UMEM with UMEMOptions.Shared; the UMEM keeps ownership.
// It is -1 without, and once the UMEM is closed.
func (u *UMEM) FD() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.fd
}

// InheritUMEM maps the memory of another process's UMEM with these options, which the kernel knows from
// its sockets. It takes ownership of fd, also on an error.
func InheritUMEM(fd int, opts UMEMOptions) (_ *UMEM, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, unix.Close(fd))
		}
	}()
	if opts.FrameSize == 0 {
		opts.FrameSize = minFrameSize
	}
	opts.Shared = true
	if err := opts.validate(); err != nil {
		return nil, fmt.Errorf("inherit UMEM: %w", err)
	}
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return nil, fmt.Errorf("inherit UMEM: %w", err)
	}
	if size, _ := opts.sizes(); stat.Size != int64(size) {
		return nil, fmt.Errorf("inherit UMEM: it has %d bytes, want %d", stat.Size, size)
	}
	return opts.mapArea(fd)
}
