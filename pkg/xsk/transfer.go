package xsk

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Fill gives the kernel up to n free frames for receiving, and returns how many: fewer if
// the fill ring is full or too few are free. Packets that find no frame are lost, so call
// it often; keep some frames for sending.
func (s *Socket) Fill(n int) int {
	if n < 1 {
		return 0
	}
	room := s.fill.reserve(clamp(n))
	var filled uint32
	for filled < room {
		i, ok := s.frames.pop()
		if !ok {
			break
		}
		s.inFill[i] = true
		s.fill.set(filled, s.frames.addr(i))
		filled++
	}
	s.fill.submit(filled)
	return int(filled)
}

// Receive fills descs with received descriptors and returns how many. The caller then
// holds a reference to each frame. With MultiBuffer, a packet of several frames has
// [Continued] set in all its descriptors but the last; the result ends at the end of a
// packet, unless one packet alone has more than len(descs).
func (s *Socket) Receive(descs []Desc) int {
	n := s.rx.peek(clamp(len(descs)))
	for i := range n {
		descs[i] = s.rx.at(i)
	}
	if s.multiBuffer {
		n = wholePackets(descs[:n])
	}
	for i := range descs[:n] {
		s.received(&descs[i])
	}
	s.rx.release(n)
	return int(n)
}

// wholePackets returns how many descriptors belong to packets that end among them;
// all, if none ends.
func wholePackets(descs []Desc) uint32 {
	for n := len(descs); n > 0; n-- {
		if descs[n-1].Options&Continued == 0 {
			return uint32(n)
		}
	}
	return uint32(len(descs))
}

// NextPacket splits the descriptors from Receive into those of the first packet and the
// rest. If no packet ends, all belong to one that continues in the next call.
func NextPacket(descs []Desc) (packet, rest []Desc) {
	for i := range descs {
		if descs[i].Options&Continued == 0 {
			return descs[:i+1], descs[i+1:]
		}
	}
	return descs, nil
}

func (s *Socket) received(d *Desc) {
	i, ok := s.frames.index(d.Addr)
	if !ok || !s.inFill[i] {
		s.frames.violation("receive", d.Addr)
		return
	}
	s.inFill[i] = false
	if s.frames.held != nil {
		s.frames.held[i] = 1
	}
}

// Send puts packets into the TX ring and returns how many descriptors it took: fewer
// than all if the ring is full, and never a part of a packet. Each descriptor taken
// consumes one of the caller's references, until Complete; do not write to the frame
// meanwhile. Nothing is sent before Kick or Flush.
//
// An error is a [*DescError] for the first descriptor that the kernel would refuse; the
// packets before it are taken.
func (s *Socket) Send(descs []Desc) (int, error) {
	n, err := s.Stage(descs)
	s.tx.publish()
	return n, err
}

// Stage is Send, but leaves it to the next Send, Kick or Flush to show the packets to the kernel: with packets
// that come one by one, each access to the memory that it shares costs more than the rest of Send.
func (s *Socket) Stage(descs []Desc) (int, error) {
	room := int(s.tx.reserve(clamp(len(descs))))
	var err error
	start, i := 0, 0 // of the packet; of the descriptor
	for ; i < room; i++ {
		d := descs[i]
		frame, reason := s.sendable(d, i-start)
		if reason != "" {
			err = s.descError(i, d, reason)
			break
		}
		s.inTX[frame]++
		if s.frames.held != nil {
			s.frames.held[frame]--
		}
		s.tx.set(uint32(i), d)
		if d.Options&Continued == 0 {
			start = i + 1
		}
	}
	for _, d := range descs[start:i] { // of an incomplete packet
		s.unsend(d)
	}
	s.tx.stage(uint32(start))
	s.sent += start
	if err == nil && i == len(descs) && start < i {
		err = s.descError(i-1, descs[i-1], "the last packet has no end")
	}
	return start, err
}

// sendable returns the number of a descriptor's frame, or why it cannot be sent.
// segment is its index in its packet. The kernel checks the same (xp_validate_desc),
// but never completes a descriptor that fails.
func (s *Socket) sendable(d Desc, segment int) (frame uint32, reason string) {
	f := s.frames
	frame, ok := f.index(d.Addr)
	size := uint64(f.umem.opts.FrameSize)
	switch {
	case !ok:
		return 0, "not a frame of the socket's Frames"
	case d.Len == 0:
		return 0, "nothing to send"
	case d.Addr&(size-1)+uint64(d.Len) > size:
		return 0, "goes beyond the end of its frame"
	case d.Options&^Continued != 0:
		return 0, "unknown options"
	case d.Options != 0 && !s.multiBuffer:
		return 0, "several frames a packet need UMEMOptions.MultiBuffer"
	case segment >= MaxSegments || segment >= int(s.tx.size):
		return 0, "too many frames in one packet"
	case f.refs[frame] == 0 || f.held != nil && f.held[frame] == 0:
		return 0, notHeld
	}
	return frame, ""
}

const notHeld = "the frame is not held"

func (s *Socket) descError(i int, d Desc, reason string) error {
	e := &DescError{Index: i, Desc: d, Reason: reason}
	if reason == notHeld {
		s.frames.violation("send", d.Addr)
		e.Err = ErrOwnership
		e.Reason = "the frame is " + s.frames.whereabouts(d.Addr)
	}
	return e
}

func (s *Socket) unsend(d Desc) {
	i, _ := s.frames.index(d.Addr)
	s.inTX[i]--
	if s.frames.held != nil {
		s.frames.held[i]++
	}
}

// Complete drops the references of up to n descriptors that the kernel has finished with,
// and returns how many. A frame without references is free.
func (s *Socket) Complete(n int) int {
	if n < 1 {
		return 0
	}
	done := s.comp.peek(clamp(n))
	for k := range done {
		addr := s.comp.at(k)
		i, ok := s.frames.index(addr)
		if !ok || s.inTX[i] == 0 {
			s.frames.violation("completion", addr)
			continue
		}
		s.inTX[i]--
		s.sent--
		s.frames.drop(i)
	}
	s.comp.release(done)
	return int(done)
}

// Unsent returns how many descriptors in the TX ring the kernel has not reported as taken.
func (s *Socket) Unsent() int { return int(s.tx.pending()) }

// Outstanding returns how many descriptors Send took that have not completed.
func (s *Socket) Outstanding() int { return s.sent }

// Kick asks the kernel to send the TX ring, if it needs to be asked. In zero-copy mode
// that is only when it sleeps; otherwise the driver sends by itself. In copy mode one call
// sends at most TXBudget frames. Errors are unwrapped, of type unix.Errno except the last:
//
//   - EAGAIN: there is more to send than one call does; or the completion ring, the send buffer or
//     the device is full: Complete, and try again;
//   - EBUSY: the device dropped one packet, which completes; try again for the rest;
//   - ENOBUFS, ENOMEM: no memory for a copy; try again;
//   - ENETDOWN: the interface is down;
//   - ENXIO: the interface is gone, Close the socket;
//   - [os.ErrClosed].
func (s *Socket) Kick() error {
	fd := s.FD()
	if fd < 0 {
		return os.ErrClosed
	}
	s.tx.publish()
	if !s.tx.needsWakeup() || s.tx.pending() == 0 {
		return nil
	}
	err := wakeTX(fd)
	if err == unix.EBUSY {
		s.txBusy++
	}
	return err
}

// Flush repeats Kick, and Complete where that makes room, until the kernel has taken the
// whole TX ring, and returns nil; or until it takes no more, and returns the reason. The
// ring sizes bound the number of calls. A packet dropped by the device is counted
// (Statistics.TXDeviceDropped) and is no error. In zero-copy mode it is Kick.
func (s *Socket) Flush() error {
	if s.zeroCopy {
		return s.Kick()
	}
	for before := s.tx.pending(); ; {
		err := s.Kick()
		left := s.tx.pending()
		if err != nil && err != unix.EAGAIN && err != unix.EBUSY {
			return err
		}
		if left == 0 {
			return nil
		}
		if left == before && s.Complete(int(s.comp.size)) == 0 {
			if err == nil {
				err = ErrStalled
				if s.sent >= int(s.comp.size) {
					err = unix.EAGAIN // frames in flight may occupy the whole completion ring: Linux 6.1 reports no error
				}
			}
			return err
		}
		before = left
	}
}

// WakeRX makes the kernel continue receiving if it needs to be asked (zero-copy mode,
// after it ran out of frames), or polls the driver (BusyPoll). Otherwise it makes no
// system call. Errors are those of Kick.
func (s *Socket) WakeRX() error {
	fd := s.FD()
	if fd < 0 {
		return os.ErrClosed
	}
	if !s.busyPoll && !s.fill.needsWakeup() {
		return nil
	}
	return wakeRX(fd)
}

// Check asks the kernel whether the socket is usable: ENETDOWN if the interface is down,
// ENXIO if it is gone. For a socket that only receives, nothing else reports that.
func (s *Socket) Check() error {
	fd := s.FD()
	if fd < 0 {
		return os.ErrClosed
	}
	err := wakeRX(fd)
	if errors.Is(err, unix.ENOBUFS) { // no RX ring; the interface was checked before
		return nil
	}
	if err != nil {
		return fmt.Errorf("queue %d of interface %d: %w", s.queue, s.ifindex, err)
	}
	return nil
}

func clamp(n int) uint32 { return uint32(min(n, maxRing)) }
