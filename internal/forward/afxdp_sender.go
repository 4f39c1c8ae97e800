package forward

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"xdpcast/internal/account"
	"xdpcast/pkg/fanout"
	"xdpcast/pkg/xsk"
)

// shareZeroCopy is the payload size in bytes from which copies share a payload instead of
// copying it, if the driver reads it in place. In copy mode the kernel copies each part of
// a frame anyway and allocates a page for each after the first, so that only frames that
// have several parts in any case are shared.
const shareZeroCopy = 256

// kickTries bounds the retries while the device or the kernel's memory has no room.
const kickTries = 4

// afxdpSender sends for one worker out of one interface: through a socket that shares the
// worker's frames, or through a packet socket if there is no queue for one. The caller of
// Send holds the worker's lock; the other methods take it.
type afxdpSender struct {
	worker *afxdpWorker
	index  int
	socket *xsk.Socket // nil: packet
	shared bool        // socket is the worker's own, for input and output
	packet Sender
	why    string // reason for using packet
	// noQueue: it uses packet because others have all queues, which may change.
	noQueue bool
	// stale: it must be reopened; see reviewSenders.
	stale  atomic.Bool
	limit  int  // descriptors in flight
	share  int  // payloads from this length on are shared
	failed bool // the interface is down or gone

	descs   []xsk.Desc // of one packet
	ends    []int      // descriptors in the TX ring after each packet of a chunk
	dropped []int
	// lost counts descriptors of frames counted as sent that were still in the TX ring
	// when the interface went down, or that the device dropped later.
	lost    uint64
	account *account.Counters
	unsent  *account.Cell // the same, for all senders on the interface; nil: none yet
}

// lose counts frames as lost.
func (s *afxdpSender) lose(n int) {
	if n == 0 {
		return
	}
	if s.unsent == nil {
		s.unsent = s.account.Cell(s.worker.engine.writer, account.Unsent)
	}
	s.lost += uint64(n)
	s.unsent.Add(uint64(n), 0)
}

// Ethernet reports that frames have an Ethernet header, except for a packet socket on an
// interface without one.
func (s *afxdpSender) Ethernet() bool { return s.packet == nil || s.packet.Ethernet() }

// Stale says whether the sender must be replaced. It asks the kernel whether the interface
// is gone, even if another has its index now.
func (s *afxdpSender) Stale() bool {
	switch {
	case s.stale.Load():
		return true
	case s.socket != nil:
		return errors.Is(s.socket.Check(), unix.ENXIO)
	}
	packet, ok := s.packet.(interface{ Stale() bool })
	return ok && packet.Stale()
}

// Dropped returns the indexes of the packets of the last Send that were taken, but
// dropped by the device.
func (s *afxdpSender) Dropped() []int { return s.dropped }

// Send implements Sender. Packets in the TX ring count as taken, as in a device's queue;
// frames that the ring still holds are sent before new ones.
func (s *afxdpSender) Send(packets []fanout.Packet) (n int, err error) {
	s.dropped = s.dropped[:0]
	switch {
	case s.packet != nil:
		return s.packet.Send(packets)
	case s.failed:
		return 0, unix.ENXIO
	}
	s.socket.Complete(ringSize)
	s.ends = s.ends[:0]
	if err := s.kick(0); err != nil {
		return 0, err
	}
	for n < len(packets) {
		s.ends = s.ends[:0]
		used := 0
		for len(s.ends) < batch && n+len(s.ends) < len(packets) {
			descs, errno := s.put(&packets[n+len(s.ends)])
			if errno != nil {
				err = errno
				break
			}
			used += descs
			s.ends = append(s.ends, used)
		}
		queued := len(s.ends)
		if queued == 0 {
			return n, err
		}
		kicked := s.kick(n)
		if s.failed {
			return n + len(s.ends), unix.ENXIO // fail leaves those taken
		}
		n += queued
		if kicked != nil && n < len(packets) {
			return n, kicked
		}
		err = nil
	}
	return n, nil
}

// taken returns how many packets of the chunk the kernel has taken if left descriptors
// remain.
func (s *afxdpSender) taken(left int) (n int) {
	for n < len(s.ends) && s.ends[n] <= s.ends[len(s.ends)-1]-left {
		n++
	}
	return n
}

// kick makes the kernel send the TX ring. first is the index of the chunk's first packet.
// It returns an error if descriptors remain: EAGAIN, or that the interface is unusable,
// which fails the sender.
func (s *afxdpSender) kick(first int) error {
	if s.socket.ZeroCopy() {
		if err := s.socket.Kick(); fatal(err) {
			return s.fail()
		}
		return nil
	}
	before := s.socket.Unsent()
	silent := 0 // packets dropped since the kernel last published its progress
	for tries := 0; before > 0; {
		err := s.socket.Kick()
		left := s.socket.Unsent()
		if left < before {
			silent, tries = 0, 0
		}
		if err == unix.EBUSY {
			if left == before {
				silent++
			}
			s.drop(first, left, silent)
			before = left
			continue
		}
		if fatal(err) {
			return s.fail()
		}
		done := s.socket.Complete(ringSize)
		if s.socket.Outstanding() == 0 { // the kernel does not report a final dropped one as taken
			return nil
		}
		if left == before && done == 0 {
			if tries++; tries == kickTries {
				return unix.EAGAIN
			}
		}
		before = left
	}
	return nil
}

// drop records the packet that the device has just dropped: the last that the kernel has
// taken. One that was in the ring before the chunk is lost.
func (s *afxdpSender) drop(first, left, silent int) {
	if len(s.ends) == 0 {
		s.lose(1)
		return
	}
	if n := s.taken(left) + silent - 1; n >= 0 && n < len(s.ends) {
		s.dropped = append(s.dropped, first+n)
	}
}

// fatal says whether a socket is no longer usable: its interface is down or gone.
func fatal(err error) bool {
	return errors.Is(err, unix.ENETDOWN) || errors.Is(err, unix.ENXIO) || errors.Is(err, os.ErrClosed)
}

// fail gives up the queue, so that no old packets leave when the interface is up again.
// It leaves only the packets that were taken in ends.
func (s *afxdpSender) fail() error {
	left := s.socket.Unsent()
	if len(s.ends) == 0 {
		s.lose(left)
	}
	s.ends = s.ends[:s.taken(left)]
	s.failed = true
	if !s.shared {
		// close(2) frees the descriptor even if it fails.
		_ = s.socket.Close()
	}
	return unix.ENXIO
}

// put puts a packet into the TX ring, and returns the number of its descriptors.
func (s *afxdpSender) put(p *fanout.Packet) (int, error) {
	w := s.worker
	s.descs = s.descs[:0]
	parts := w.locate(p.Payload)
	claimed := -1
	switch {
	case len(parts) > 0 && w.claim(parts[0].Addr, len(p.Header)):
		claimed = w.frameOf(parts[0].Addr)
		at := parts[0].Addr - uint64(len(p.Header))
		copy(w.umem.Data(xsk.Desc{Addr: at, Len: uint32(len(p.Header))}), p.Header)
		s.descs = append(s.descs, xsk.Desc{Addr: at, Len: parts[0].Len + uint32(len(p.Header))})
		s.descs = append(s.descs, parts[1:]...)
		s.retain(parts)
	case len(parts) > 0 && w.multiBuffer && len(p.Payload) >= s.share && len(p.Header) > 0:
		addr, ok := w.frames.Get()
		if !ok {
			return 0, unix.EAGAIN
		}
		header := xsk.Desc{Addr: addr, Len: uint32(len(p.Header))}
		copy(w.umem.Data(header), p.Header)
		s.descs = append(append(s.descs, header), parts...)
		s.retain(parts)
	default:
		if err := s.duplicate(p); err != nil {
			return 0, err
		}
	}
	for i := range s.descs {
		s.descs[i].Options = xsk.Continued
	}
	s.descs[len(s.descs)-1].Options = 0
	if s.socket.Outstanding()+len(s.descs) > s.limit {
		s.socket.Complete(ringSize)
	}
	sent := 0
	var err error
	if s.socket.Outstanding()+len(s.descs) <= s.limit {
		sent, err = s.socket.Stage(s.descs) // kick follows
	}
	if sent < len(s.descs) {
		w.frames.ReleaseAll(s.descs)
		if err != nil {
			return 0, unix.EINVAL
		}
		return 0, unix.EAGAIN
	}
	if claimed >= 0 {
		w.claims[claimed] = w.batch
	}
	return len(s.descs), nil
}

func (s *afxdpSender) retain(parts []xsk.Desc) {
	for i := range parts {
		s.worker.frames.Retain(parts[i].Addr, 1)
	}
}

// duplicate copies a packet to its own frames.
func (s *afxdpSender) duplicate(p *fanout.Packet) error {
	f, size := s.worker.frames, s.worker.umem.FrameSize()
	need := (len(p.Header) + len(p.Payload) + size - 1) / size
	if need > xsk.MaxSegments || need > 1 && !s.worker.multiBuffer {
		return unix.EMSGSIZE
	}
	rest := [2][]byte{p.Header, p.Payload}
	for range need {
		addr, ok := f.Get()
		if !ok {
			f.ReleaseAll(s.descs)
			return unix.EAGAIN
		}
		room := s.worker.umem.Frame(addr)
		n := 0
		for i := range rest {
			m := copy(room[n:], rest[i])
			rest[i] = rest[i][m:]
			n += m
		}
		s.descs = append(s.descs, xsk.Desc{Addr: addr, Len: uint32(n)})
	}
	return nil
}

// housekeep sends what remains in the TX ring, and frees completed frames; it returns
// whether any are still in flight.
func (s *afxdpSender) housekeep() (busy bool) {
	if s.packet != nil || s.failed {
		return false
	}
	s.ends, s.dropped = s.ends[:0], s.dropped[:0]
	_ = s.kick(0) // the next Send reports it
	if s.failed {
		return false
	}
	s.socket.Complete(ringSize)
	return s.socket.Outstanding() > 0
}

// The wait for frames that a driver still holds when a socket is closed.
const (
	drainTries = 100
	drainPause = time.Millisecond
)

// drain waits briefly until the driver has finished with the frames; later ones are lost
// to the worker.
func (s *afxdpSender) drain() {
	for range drainTries {
		s.worker.mu.Lock()
		busy := s.housekeep()
		s.worker.mu.Unlock()
		if !busy {
			return
		}
		time.Sleep(drainPause)
	}
}

// Close closes the socket, which frees the queue for others.
func (s *afxdpSender) Close() error {
	if s.packet == nil && !s.shared {
		s.drain()
	}
	s.worker.mu.Lock()
	defer s.worker.mu.Unlock()
	if s.packet == nil && !s.shared && !s.failed {
		s.lose(s.socket.Unsent())
	}
	s.worker.forget(s)
	if s.packet != nil {
		return s.packet.Close()
	}
	if s.shared {
		return nil
	}
	delete(s.worker.path.claimed, queueKey{s.index, s.socket.Queue()})
	return s.socket.Close()
}

// usePacket switches the sender to a packet socket, and gives up its queue.
func (s *afxdpSender) usePacket(why string) error {
	if s.packet != nil || s.shared {
		return nil
	}
	packet, err := s.worker.path.openPacket(s.index)
	if err != nil {
		return fmt.Errorf("free queue %d of interface %d: %w", s.socket.Queue(), s.index, err)
	}
	s.drain()
	s.worker.mu.Lock()
	defer s.worker.mu.Unlock()
	delete(s.worker.path.claimed, queueKey{s.index, s.socket.Queue()})
	err = s.socket.Close()
	s.packet, s.why, s.noQueue = packet, why, true
	return err
}

// offset returns the offset of part in area; false if it is not within it. It only compares
// addresses, and reads no memory.
func offset(part, area []byte) (int, bool) {
	at := uintptr(unsafe.Pointer(unsafe.SliceData(part))) - uintptr(unsafe.Pointer(unsafe.SliceData(area)))
	return int(at), len(part) > 0 && at < uintptr(len(area))
}
