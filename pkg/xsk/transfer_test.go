package xsk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
)

var sizes = []int{headerLen + 4, 60, 61, 64, 128, 1024, 1500, 1514}

func TestReceive(t *testing.T) {
	for _, opts := range []UMEMOptions{
		{Frames: 64},
		{Frames: 64, FrameSize: 4096, Mode: ModeCopy},
		{Frames: 64, Headroom: 128},
	} {
		t.Run(fmt.Sprintf("size=%d/headroom=%d/%s", opts.FrameSize, opts.Headroom, opts.Mode), func(t *testing.T) {
			src, dst := pair(t, 0, 1)
			_, frames := makeUMEM(t, opts)
			s := openOn(t, dst, "eth0", frames, 0, Options{NoTX: true, FillSize: 64, RXSize: 64})
			if s.ZeroCopy() {
				t.Error("a veth has no zero-copy")
			}
			s.Fill(allOfThem)
			redirect(t, dst, "eth0", s)
			tap := labtest.NewTap(t, src, "eth0")
			for round := range 20 { // rings and frames wrap several times
				var want [][]byte
				for i, size := range sizes {
					want = append(want, frame(uint32(round*100+i), size))
					tap.Send(want[i])
				}
				for i, got := range receive(t, s, len(want)) {
					equal(t, fmt.Sprintf("round %d, packet %d", round, i), got, want[i])
				}
			}
			stats, err := s.Statistics()
			if err != nil || stats.RXDropped+stats.RXInvalid+stats.RXRingFull != 0 {
				t.Errorf("statistics %+v, %v", stats, err)
			}
		})
	}
}

// A packet starts after the requested headroom and the kernel's own.
func TestReceiveHeadroom(t *testing.T) {
	src, dst := pair(t, 0, 1)
	u, frames := makeUMEM(t, UMEMOptions{Frames: 8, Headroom: 192})
	s := openOn(t, dst, "eth0", frames, 0, Options{FillSize: 8, RXSize: 8})
	s.Fill(4)
	redirect(t, dst, "eth0", s)
	labtest.NewTap(t, src, "eth0").Send(frame(1, 100))
	var d [1]Desc
	labtest.Eventually(t, "a packet arrives", func() bool { return s.Receive(d[:]) == 1 })
	if offset := d[0].Addr % uint64(u.FrameSize()); offset != 192+packetHeadroom {
		t.Errorf("the packet starts at byte %d of its frame", offset)
	}
	if want := 2048 - 192 - 256; u.RXSize() != want {
		t.Errorf("RXSize %d: want %d", u.RXSize(), want)
	}
	frames.Release(d[0].Addr)
}

func TestTransmit(t *testing.T) {
	for _, budget := range []int{0, 64} {
		t.Run(fmt.Sprint("budget=", budget), func(t *testing.T) {
			needsBudget(t, budget)
			src, dst := pair(t, 0, 1)
			_, frames := makeUMEM(t, UMEMOptions{Frames: 256})
			s := openOn(t, src, "eth0", frames, 0, Options{NoRX: true, TXSize: 128, CompletionSize: 64, TXBudget: budget})
			tap := labtest.NewTap(t, dst, "eth0")
			for round := range 10 {
				var want [][]byte
				var descs []Desc
				for i := range 100 { // more than one call sends, and than the completion ring holds
					want = append(want, frame(uint32(round*100+i), sizes[i%len(sizes)]))
					descs = append(descs, write(t, frames, want[i], 2048)...)
				}
				send(t, s, descs)
				for i, got := range tap.Collect(len(want), ours) {
					equal(t, fmt.Sprintf("round %d, packet %d", round, i), got, want[i])
				}
			}
			completeAll(t, s)
			if frames.Free() != frames.Len() {
				t.Errorf("%d of %d frames are free", frames.Free(), frames.Len())
			}
		})
	}
}

// One call sends no more than the budget: EAGAIN means that there is more.
func TestKickBudget(t *testing.T) {
	for _, c := range []struct{ budget, calls int }{{0, 4}, {64, 2}, {128, 1}} {
		t.Run(fmt.Sprint("budget=", c.budget), func(t *testing.T) {
			needsBudget(t, c.budget)
			src, _ := pair(t, 0, 1)
			_, frames := makeUMEM(t, UMEMOptions{Frames: 128})
			s := openOn(t, src, "eth0", frames, 0, Options{TXSize: 128, CompletionSize: 128, TXBudget: c.budget})
			for i := range uint32(128) {
				if n, err := s.Send(write(t, frames, frame(i, 60), 2048)); n != 1 || err != nil {
					t.Fatal(n, err)
				}
			}
			calls := 0
			for s.Unsent() > 0 {
				err := s.Kick()
				calls++
				if last := calls == c.calls; last != (err == nil) || err != nil && !errors.Is(err, unix.EAGAIN) {
					t.Fatalf("call %d: %v", calls, err)
				}
			}
			if calls != c.calls {
				t.Errorf("%d calls: want %d", calls, c.calls)
			}
			completeAll(t, s)
		})
	}
}

// Sockets of two queues share a UMEM and its frames, on both ends of a veth.
func TestTwoQueues(t *testing.T) {
	src, dst := pair(t, 0, 2)
	_, out := makeUMEM(t, UMEMOptions{Frames: 64})
	_, in := makeUMEM(t, UMEMOptions{Frames: 256})
	var senders, receivers []*Socket
	for queue := range 2 {
		senders = append(senders, openOn(t, src, "eth0", out, queue, Options{NoRX: true}))
		r := openOn(t, dst, "eth0", in, queue, Options{NoTX: true})
		r.Fill(64)
		receivers = append(receivers, r)
	}
	redirect(t, dst, "eth0", receivers...)
	for i := range uint32(40) {
		for queue, s := range senders {
			send(t, s, write(t, out, frame(i*2+uint32(queue), 200), 2048))
			s.Complete(allOfThem)
		}
	}
	for queue, s := range receivers {
		for i, got := range receive(t, s, 40) {
			equal(t, fmt.Sprintf("queue %d, packet %d", queue, i), got, frame(uint32(i*2+queue), 200))
		}
	}
	for _, s := range senders {
		completeAll(t, s)
	}
}

// Frames received on one interface are sent on another, from the same memory.
func TestForward(t *testing.T) {
	src, relay, dst := newHost(t, "src"), newHost(t, "rly"), newHost(t, "dst")
	connect(t, src, "eth0", relay, "in", 0, 1)
	connect(t, relay, "out", dst, "eth0", 0, 1)
	u, frames := makeUMEM(t, UMEMOptions{Frames: 64})
	in := openOn(t, relay, "in", frames, 0, Options{NoTX: true})
	out := openOn(t, relay, "out", frames, 0, Options{NoRX: true})
	in.Fill(32)
	redirect(t, relay, "in", in)
	from, to := labtest.NewTap(t, src, "eth0"), labtest.NewTap(t, dst, "eth0")
	var descs [16]Desc
	for i := range uint32(200) {
		want := frame(i, 60+int(i)*7)
		from.Send(want)
		for sent := false; !sent; {
			var n int
			labtest.Eventually(t, "a packet arrives", func() bool { n = in.Receive(descs[:]); return n > 0 })
			for _, d := range descs[:n] {
				if !ours(u.Data(d)) {
					frames.Release(d.Addr)
					continue
				}
				u.Data(d)[5] = 77
				send(t, out, []Desc{d})
				sent = true
			}
		}
		out.Complete(allOfThem)
		in.Fill(32)
		want[5] = 77
		equal(t, fmt.Sprint("packet ", i), to.Collect(1, ours)[0], want)
	}
	completeAll(t, out)
}

func TestMultiBuffer(t *testing.T) {
	needsMultiBuffer(t)
	src, relay, dst := newHost(t, "src"), newHost(t, "rly"), newHost(t, "dst")
	connect(t, src, "eth0", relay, "in", 9000, 1)
	connect(t, relay, "out", dst, "eth0", 9000, 1)
	u, frames := makeUMEM(t, UMEMOptions{Frames: 256, MultiBuffer: true})
	in := openOn(t, relay, "in", frames, 0, Options{FillSize: 128})
	out := openOn(t, relay, "out", frames, 0, Options{TXSize: 8})
	in.Fill(128)
	redirect(t, relay, "in", in)
	from, to := labtest.NewTap(t, src, "eth0"), labtest.NewTap(t, dst, "eth0")
	rx := u.RXSize()
	for i, size := range []int{60, rx - 1, rx, rx + 1, 3 * rx, 3*rx + 1, 9000, 9014} {
		want := frame(uint32(i), size)
		from.Send(want)
		got := receive(t, in, 1)[0]
		equal(t, fmt.Sprintf("%d bytes received", size), got, want)
		for _, piece := range []int{2048, 1000} {
			if (size+piece-1)/piece > 8 {
				continue // the ring is too small
			}
			send(t, out, write(t, frames, want, piece))
			equal(t, fmt.Sprintf("%d bytes sent in pieces of %d", size, piece), to.Collect(1, ours)[0], want)
			completeAll(t, out)
		}
	}
	stats, err := out.Statistics()
	if err != nil || stats.TXInvalid != 0 {
		t.Errorf("statistics %+v, %v", stats, err)
	}
}

// A received packet of several frames is forwarded unchanged.
func TestForwardMultiBuffer(t *testing.T) {
	needsMultiBuffer(t)
	src, relay, dst := newHost(t, "src"), newHost(t, "rly"), newHost(t, "dst")
	connect(t, src, "eth0", relay, "in", 9000, 1)
	connect(t, relay, "out", dst, "eth0", 9000, 1)
	u, frames := makeUMEM(t, UMEMOptions{Frames: 512, MultiBuffer: true})
	in := openOn(t, relay, "in", frames, 0, Options{NoTX: true})
	out := openOn(t, relay, "out", frames, 0, Options{NoRX: true})
	in.Fill(256)
	redirect(t, relay, "in", in)
	from, to := labtest.NewTap(t, src, "eth0"), labtest.NewTap(t, dst, "eth0")
	var descs [7]Desc // a packet of 9,014 bytes has 6: no batch has two
	for i := range uint32(30) {
		from.Send(frame(i, 9014))
	}
	packets := 0
	labtest.Eventually(t, "all is forwarded", func() bool {
		got := descs[:in.Receive(descs[:])]
		if len(got) > 0 && got[len(got)-1].Options != 0 {
			t.Fatalf("a batch of %d ends within a packet", len(got))
		}
		for len(got) > 0 {
			var packet []Desc
			packet, got = NextPacket(got)
			if !ours(u.Data(packet[0])) {
				frames.ReleaseAll(packet)
				continue
			}
			send(t, out, packet)
			packets++
		}
		out.Complete(allOfThem)
		in.Fill(256)
		return packets == 30
	})
	for i, got := range to.Collect(30, ours) {
		equal(t, fmt.Sprint("packet ", i), got, frame(uint32(i), 9014))
	}
	completeAll(t, out)
}

// One payload is sent to 16 destinations, each with its own header: four interfaces, four
// times on each. It is free again when the last copy has completed.
func TestSharedPayload(t *testing.T) {
	needsMultiBuffer(t)
	const interfaces, copies = 4, 4
	relay, sink := newHost(t, "rly"), newHost(t, "dst")
	u, frames := makeUMEM(t, UMEMOptions{Frames: 64, FrameSize: 4096, MultiBuffer: true})
	var outs []*Socket
	var taps []*labtest.Tap
	for i := range interfaces {
		name := fmt.Sprint("eth", i)
		connect(t, relay, name, sink, name, 9000, 1)
		outs = append(outs, openOn(t, relay, name, frames, 0, Options{NoRX: true}))
		taps = append(taps, labtest.NewTap(t, sink, name))
	}
	for round := range uint32(20) {
		whole := frame(round, 4000)
		payload, _ := frames.Get()
		body := copy(u.Frame(payload), whole[headerLen:])
		for i, out := range outs {
			for c := range copies {
				header, _ := frames.Get()
				copy(u.Frame(header), whole[:headerLen])
				u.Frame(header)[5] = byte(i*copies + c)
				frames.Retain(payload, 1)
				n, err := out.Send([]Desc{{header, headerLen, Continued}, {payload, uint32(body), 0}})
				if n != 2 || err != nil {
					t.Fatal(n, err)
				}
			}
		}
		frames.Release(payload) // the rings hold the others
		if err := frames.Verify(); err != nil {
			t.Fatal(err)
		}
		for i, out := range outs {
			if frames.Free() == frames.Len() {
				t.Fatal("the payload is free before its last copy is sent")
			}
			flush(t, out)
			completeAll(t, out)
			for c, got := range taps[i].Collect(copies, ours) {
				whole[5] = byte(i*copies + c)
				equal(t, fmt.Sprintf("round %d, interface %d, copy %d", round, i, c), got, whole)
			}
		}
		if frames.Free() != frames.Len() {
			t.Fatalf("%d of %d frames are free", frames.Free(), frames.Len())
		}
	}
}

// Two owners, a goroutine each, use shares of one UMEM concurrently.
func TestOwnersOfOneUMEM(t *testing.T) {
	src, dst := pair(t, 0, 2)
	u, err := NewUMEM(UMEMOptions{Frames: 256, CheckOwnership: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := u.Close(); err != nil {
			t.Error(err)
		}
	})
	const packets = 2000
	tap := labtest.NewTap(t, dst, "eth0")
	errs := make(chan error, 2)
	for queue := range 2 {
		f, err := u.NewFrames(128)
		if err != nil {
			t.Fatal(err)
		}
		s := openOn(t, src, "eth0", f, queue, Options{NoRX: true})
		go func() { errs <- sendNumbered(s, uint32(queue*packets), packets) }()
	}
	seen := make([]bool, 2*packets)
	for _, got := range tap.Collect(2*packets, ours) {
		number := binary.BigEndian.Uint32(got[headerLen:])
		equal(t, "packet", got, frame(number, 100))
		if seen[number] {
			t.Fatalf("packet %d came twice", number)
		}
		seen[number] = true
	}
	for range 2 {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	if _, err := u.NewFrames(1); err == nil {
		t.Error("more frames were given than there are")
	}
}

func sendNumbered(s *Socket, first uint32, n int) error {
	f := s.Frames()
	for sent := 0; sent < n; {
		if addr, ok := f.Get(); ok {
			d := Desc{Addr: addr, Len: uint32(copy(f.UMEM().Frame(addr), frame(first+uint32(sent), 100)))}
			took, err := s.Send([]Desc{d})
			if err != nil {
				return err
			}
			sent += took
			if took == 0 {
				f.Release(addr)
			}
		}
		if f.Free() == 0 || s.Unsent() >= 32 || sent == n {
			if err := s.Flush(); err != nil && !errors.Is(err, unix.EAGAIN) {
				return err
			}
			s.Complete(allOfThem)
		}
	}
	for s.Outstanding() > 0 {
		if err := s.Flush(); err != nil && !errors.Is(err, unix.EAGAIN) {
			return err
		}
		s.Complete(allOfThem)
	}
	return f.Verify()
}
