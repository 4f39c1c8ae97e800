package traffic

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// pair is a sender and a receiver on one cable, driven step by step.
func pair(tb testing.TB, groups int) (*Sender, *Receiver) {
	tb.Helper()
	tx, rx := labtest.Host(tb, "tx"), labtest.Host(tb, "rx")
	labtest.Connect(tb,
		lab.End{Host: tx, Name: "eth0", Addrs: []string{"10.1.0.1/24"}},
		lab.End{Host: rx, Name: "eth0", Addrs: []string{"10.1.0.2/24"}})
	to := Target{Addr: netip.MustParseAddrPort("239.1.1.1:5000"), Interface: "eth0"}
	var s *Sender
	var r *Receiver
	labtest.Do(tb, tx, func() (err error) {
		s, err = NewSender(SendConfig{Target: to, Groups: groups, Size: 200})
		return err
	})
	tb.Cleanup(func() { s.Close() })
	labtest.Do(tb, rx, func() (err error) {
		r, err = NewReceiver(RecvConfig{Subscriptions: []Subscription{{Target: to}}, Groups: groups})
		return err
	})
	tb.Cleanup(func() { r.Close() })
	return s, r
}

func (s *Sender) step(tb testing.TB, n int) {
	l := s.legs[0]
	for end := l.sent + uint64(n); l.sent < end; {
		s.take(l, end)
		s.prepare(l, len(l.queue))
		sent, errno := l.msgs.send(l.fd, len(l.queue))
		s.record(l, sent, errno)
		if kindOf(errno) == fatal {
			tb.Fatal(errno)
		}
	}
}

// receive receives until the total is reached.
func (r *Receiver) receive(tb testing.TB, total uint64) {
	deadline := time.Now().Add(labtest.Timeout)
	for r.received < total {
		if _, err := r.wait(1000); err != nil {
			tb.Fatal(err)
		}
		if time.Now().After(deadline) {
			tb.Fatalf("received %d, want %d", r.received, total)
		}
	}
}

func TestNoAllocationPerPacket(t *testing.T) {
	s, r := pair(t, 3)
	if n := testing.AllocsPerRun(100, func() {
		s.step(t, 60)
		r.receive(t, s.legs[0].sent)
	}); n != 0 {
		t.Errorf("%g allocations for 60 packets", n)
	}
	if n := testing.AllocsPerRun(10, func() {
		now := time.Now()
		timer := time.NewTimer(0)
		defer timer.Stop()
		for range 10 {
			waitUntil(context.Background(), timer, now.Add(time.Microsecond))
		}
	}); n > 3 { // the timer, once
		t.Errorf("%g allocations for 10 waits", n)
	}
}

func TestNoAllocationForStrangers(t *testing.T) {
	g := &group{window: DefaultWindow, flows: make(map[flowKey]*flow)}
	b := make([]byte, 100)
	var stream uint64
	next := func() {
		stream++
		Encode(b, Header{Stream: stream})
		g.handle(b, Fields{}, 1)
	}
	for range maxFlows {
		next()
	}
	if n := testing.AllocsPerRun(1000, next); n > 0.5 { // the map moves now and then
		t.Errorf("%g allocations for a new stream", n)
	}
	if len(g.flows) != maxFlows {
		t.Errorf("%d flows, want %d", len(g.flows), maxFlows)
	}
}

// BenchmarkSend sends into a cable that no one listens on.
func BenchmarkSend(b *testing.B) {
	for _, c := range []struct {
		name   string
		groups int
	}{{"1group", 1}, {"16groups", 16}} {
		b.Run(c.name, func(b *testing.B) {
			s, r := pair(b, c.groups)
			r.Close()
			b.ReportAllocs()
			b.ResetTimer()
			for n := b.N; n > 0; n -= defaultSendBatch {
				s.step(b, min(n, defaultSendBatch))
			}
			b.StopTimer()
			if s.legs[0].sent != uint64(b.N) {
				b.Fatalf("sent %d, want %d", s.legs[0].sent, b.N)
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "packets/s")
		})
	}
}

// BenchmarkReceive times only the reading and accounting: the packets wait in
// the socket when the clock runs.
func BenchmarkReceive(b *testing.B) {
	s, r := pair(b, 1)
	b.ReportAllocs()
	b.ResetTimer()
	for n := b.N; n > 0; n -= 2048 {
		b.StopTimer()
		for chunk := min(n, 2048); chunk > 0; chunk -= defaultSendBatch {
			s.step(b, min(chunk, defaultSendBatch))
		}
		b.StartTimer()
		r.receive(b, s.legs[0].sent)
	}
	b.StopTimer()
	if c := r.Report().Total; c.Received != uint64(b.N) || c.Lost != 0 {
		b.Fatalf("received %+v of %d", c, b.N)
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "packets/s")
}

func BenchmarkEncode(b *testing.B) {
	p := make([]byte, 1472)
	b.ReportAllocs()
	b.SetBytes(int64(len(p)))
	for i := range b.N {
		Encode(p, Header{Seq: uint64(i)})
	}
}

func BenchmarkAccount(b *testing.B) {
	g := &group{window: DefaultWindow, flows: make(map[flowKey]*flow)}
	p := make([]byte, 1472)
	b.ReportAllocs()
	for i := range b.N {
		Encode(p, Header{Seq: uint64(i)})
		g.handle(p, Fields{}, int64(i))
	}
	if g.c.Received != uint64(b.N) {
		b.Fatalf("received %d of %d", g.c.Received, b.N)
	}
}

func TestKindOf(t *testing.T) {
	for errno, want := range map[unix.Errno]errorKind{
		0: noError, unix.EINTR: noError,
		unix.EAGAIN: bufferFull, unix.ENOBUFS: bufferFull, unix.ENOMEM: bufferFull,
		unix.ECONNREFUSED: networkRefused, unix.ENETUNREACH: networkRefused, unix.EPERM: networkRefused,
		unix.ENODEV: fatal, unix.EBADF: fatal, unix.EINVAL: fatal,
	} {
		if got := kindOf(errno); got != want {
			t.Errorf("%v: got %d, want %d", errno, got, want)
		}
	}
}

// The kernel cannot be made to refuse every packet and then say why it does;
// the answers are made up here.
func TestTroublesEnd(t *testing.T) {
	var tr troubles
	for range 3 {
		if err := tr.handle(unix.ECONNREFUSED); err != nil {
			t.Fatal(err)
		}
	}
	tr.since = tr.since.Add(-patience)
	if err := tr.handle(unix.ENETUNREACH); err == nil || err.Error() != "network is unreachable, for 3s without a break" {
		t.Errorf("got %v", err)
	}
	tr.handle(0)
	if err := tr.handle(unix.ECONNREFUSED); err != nil {
		t.Errorf("after a success: %v", err)
	}
	if err := tr.handle(unix.ENODEV); err != unix.ENODEV {
		t.Errorf("got %v, want ENODEV", err)
	}
}
