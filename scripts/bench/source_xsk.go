package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/live"
	"xdpcast/pkg/xsk"
)

// xskSource sends long frames by AF_XDP in several buffers each: the header in a buffer of its own,
// the rest shared by all. It is slower than live frames but has the same guarantees. One thread
// sends all flows through queue 0.
type xskSource struct {
	host   *lab.Host
	setup  setup
	frame  []byte
	header live.Header
	umem   *xsk.UMEM
	frames *xsk.Frames
	socket *xsk.Socket
	tail   []xsk.Desc // all buffers of a frame but the first
	// epoch and its CLOCK_MONOTONIC: package time reads the clock without a system call.
	epoch   time.Time
	epochNS uint64
}

const (
	xskBuffer  = 4096
	xskBuffers = 4096
)

func newXSKSource(host *lab.Host, s setup) (_ *xskSource, err error) {
	l, err := host.Link("eth0")
	if err != nil {
		return nil, err
	}
	src := &xskSource{host: host, setup: s, frame: s.template()}
	src.header = live.NewHeader(src.frame)
	defer func() {
		if err != nil {
			err = errors.Join(err, src.close())
		}
	}()
	if src.umem, err = xsk.NewUMEM(xsk.UMEMOptions{Frames: xskBuffers, FrameSize: xskBuffer, MultiBuffer: true}); err != nil {
		return nil, err
	}
	if src.frames, err = src.umem.NewFrames(xskBuffers); err != nil {
		return nil, err
	}
	if err := host.Do(func() error {
		src.socket, err = xsk.Open(src.frames, l.Attrs().Index, 0, xsk.Options{NoRX: true})
		return err
	}); err != nil {
		return nil, err
	}
	for at := xskBuffer; at < s.Frame; at += xskBuffer {
		addr, ok := src.frames.Get()
		if !ok {
			return nil, errors.New("no buffers for the source")
		}
		d := xsk.Desc{Addr: addr, Len: uint32(copy(src.umem.Frame(addr), src.frame[at:])), Options: xsk.Continued}
		src.tail = append(src.tail, d)
	}
	if n := len(src.tail); n > 0 {
		src.tail[n-1].Options = 0
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return nil, fmt.Errorf("read the clock: %w", err)
	}
	src.epoch, src.epochNS = time.Now(), uint64(now.Nano())
	return src, nil
}

func (s *xskSource) close() error {
	var errs []error
	if s.socket != nil {
		errs = append(errs, s.socket.Close())
	}
	if s.umem != nil {
		errs = append(errs, s.umem.Close())
	}
	return errors.Join(errs...)
}

// now is CLOCK_MONOTONIC in nanoseconds.
func (s *xskSource) now() uint64 { return s.epochNS + uint64(time.Since(s.epoch)) }

func (s *xskSource) send(ctx context.Context, p plan) (done sent, err error) {
	err = s.host.Do(func() error {
		if err := live.Pin(0); err != nil {
			return err
		}
		done, err = s.run(ctx, p)
		return err
	})
	return done, err
}

// run sends batches as they become due.
func (s *xskSource) run(ctx context.Context, p plan) (done sent, err error) {
	done.started = s.now()
	done.ended = done.started
	for n := 0; n < p.frames && ctx.Err() == nil; {
		now := s.now()
		if p.rate > 0 {
			due := done.started + uint64(float64(n)/p.rate*1e9)
			for before := now; now < due; {
				if now = s.now(); now >= due {
					done.waited += time.Duration(now - before)
				}
			}
		}
		done.ended = now
		for range min(p.batch, p.frames-n) {
			if err := s.put(p, n); err != nil {
				return done, err
			}
			n++
			done.frames++
		}
		if err := s.flush(); err != nil {
			return done, err
		}
	}
	return done, ctx.Err()
}

// put puts the n-th frame into the ring.
func (s *xskSource) put(p plan, n int) error {
	addr, ok := s.frames.Get()
	for !ok {
		if err := s.flush(); err != nil {
			return err
		}
		addr, ok = s.frames.Get()
	}
	head := s.umem.Frame(addr)[:min(len(s.frame), xskBuffer)]
	copy(head, s.frame)
	stamp := uint32(0)
	if p.stamped {
		stamp = uint32(s.now())
	}
	fill(&s.header, head, p.trial, uint32(n%s.setup.Flows), uint32(n/s.setup.Flows), stamp, s.setup.groupStep())
	descs := []xsk.Desc{{Addr: addr, Len: uint32(len(head))}}
	if len(s.tail) > 0 {
		descs[0].Options = xsk.Continued
	}
	for _, d := range s.tail {
		s.frames.Retain(d.Addr, 1)
		descs = append(descs, d)
	}
	for {
		took, err := s.socket.Send(descs)
		if took > 0 || err != nil {
			return err
		}
		if err := s.flush(); err != nil {
			return err
		}
	}
}

// flush passes everything in the ring to the kernel.
func (s *xskSource) flush() error {
	for {
		err := s.socket.Flush()
		s.socket.Complete(xskBuffers)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("send frames: %w", err)
		}
	}
}

// fill is the Go twin of write in internal/live/bpf/source.bpf.c.
func fill(h *live.Header, frame []byte, trial, flow, seq, stamp uint32, groupStep int) {
	group := plus(firstGroup, int(flow)*groupStep).As4()
	copy(frame[3:6], []byte{group[1] & 0x7f, group[2], group[3]})
	copy(frame[30:34], group[:])
	binary.BigEndian.PutUint16(frame[34:], uint16(flowPort+flow))
	for i, v := range []uint32{trial, flow, seq, stamp} {
		binary.NativeEndian.PutUint32(frame[42+4*i:], v)
	}
	binary.NativeEndian.PutUint16(frame[24:], live.Checksum(h.IPSum+live.Sum(frame[30:34])))
	check := live.Checksum(h.UDPSum + live.Sum(frame[30:36]) + live.Sum(frame[42:58]))
	if check == 0 { // 0 would mean no checksum
		check = 0xffff
	}
	binary.NativeEndian.PutUint16(frame[40:], check)
}
