package traffic_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/internal/traffic"
)

// wire is two hosts and a cable:
//
//	tx eth0 10.1.0.1, 10.1.0.3, fd00::1 ---- eth0 10.1.0.2, fd00::2 rx
type wire struct {
	tx, rx *lab.Host
}

func newWire(t testing.TB) wire {
	t.Helper()
	w := wire{tx: labtest.Host(t, "tx"), rx: labtest.Host(t, "rx")}
	labtest.Connect(t,
		lab.End{Host: w.tx, Name: "eth0", Addrs: []string{"10.1.0.1/24", "10.1.0.3/24", "fd00::1/64"}},
		lab.End{Host: w.rx, Name: "eth0", Addrs: []string{"10.1.0.2/24", "fd00::2/64"}})
	return w
}

// newWire6 is newWire, ready for IPv6. That takes up to a second.
func newWire6(t testing.TB) wire {
	t.Helper()
	w := newWire(t)
	w.waitIPv6(t, "eth0")
	return w
}

// waitIPv6 waits until both ends have the route that IPv6 multicast needs. The
// kernel adds it a moment after the carrier comes.
func (w wire) waitIPv6(t testing.TB, ifname string) {
	t.Helper()
	for _, h := range []*lab.Host{w.tx, w.rx} {
		labtest.Eventually(t, "an IPv6 multicast route", func() bool { return hasMulticastRoute(t, h, ifname) })
	}
}

func hasMulticastRoute(t testing.TB, h *lab.Host, ifname string) bool {
	t.Helper()
	var table []byte
	labtest.Do(t, h, func() (err error) {
		table, err = os.ReadFile("/proc/thread-self/net/ipv6_route")
		return err
	})
	for line := range strings.Lines(string(table)) {
		f := strings.Fields(line)
		if len(f) == 10 && f[0] == "ff"+strings.Repeat("0", 30) && f[1] == "08" && f[9] == ifname {
			return true
		}
	}
	return false
}

func target(t testing.TB, s string) traffic.Target {
	t.Helper()
	tg, err := traffic.ParseTarget(s)
	if err != nil {
		t.Fatal(err)
	}
	return tg
}

func subscription(t testing.TB, s string) traffic.Subscription {
	t.Helper()
	sub, err := traffic.ParseSubscription(s)
	if err != nil {
		t.Fatal(err)
	}
	return sub
}

// running is a receiver whose Run is under way.
type running struct {
	*traffic.Receiver
	t      testing.TB
	cancel context.CancelFunc
	result chan error
}

// receive starts a receiver in the host; the test's end closes it.
func receive(t testing.TB, h *lab.Host, cfg traffic.RecvConfig, endpoints ...string) *running {
	t.Helper()
	for _, e := range endpoints {
		cfg.Subscriptions = append(cfg.Subscriptions, subscription(t, e))
	}
	var r *traffic.Receiver
	labtest.Do(t, h, func() (err error) {
		r, err = traffic.NewReceiver(cfg)
		return err
	})
	ctx, cancel := context.WithCancel(context.Background())
	run := &running{Receiver: r, t: t, cancel: cancel, result: make(chan error, 1)}
	go func() { run.result <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return run
}

// stop ends the run and returns the final report. What the sender's system
// calls have sent is in the receiver's sockets, or close before them: the
// condition is what to wait for first.
func (r *running) stop(condition func(traffic.RecvReport) bool) traffic.RecvReport {
	r.t.Helper()
	deadline := time.Now().Add(labtest.Timeout)
	for !condition(r.Report()) && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	r.cancel()
	return r.wait()
}

// wait waits for the run's own end.
func (r *running) wait() traffic.RecvReport {
	r.t.Helper()
	select {
	case err := <-r.result:
		if err != nil {
			r.t.Fatal(err)
		}
	case <-time.After(labtest.Timeout):
		r.t.Fatal("the receiver does not end")
	}
	return r.Report()
}

func datagrams(n uint64) func(traffic.RecvReport) bool {
	return func(r traffic.RecvReport) bool { return r.Total.Datagrams >= n }
}

// send sends from the host and fails the test on an error.
func send(t testing.TB, h *lab.Host, cfg traffic.SendConfig) traffic.SendReport {
	t.Helper()
	var r traffic.SendReport
	labtest.Do(t, h, func() (err error) {
		r, err = traffic.Send(t.Context(), cfg)
		return err
	})
	return r
}

func wantTotal(t testing.TB, r traffic.RecvReport, want traffic.Counters) {
	t.Helper()
	if r.Total != want {
		t.Errorf("got  %+v\nwant %+v", r.Total, want)
	}
	c := r.Total
	if c.Datagrams != c.Received+c.Duplicated+c.Stale+c.Corrupt+c.Foreign {
		t.Errorf("the datagrams do not add up: %+v", c)
	}
}

func TestSendToReceive(t *testing.T) {
	w := newWire6(t)
	for _, c := range []struct {
		name, endpoint string
		groups         int
		size           int
		count          uint64
	}{
		{"one group", "239.1.1.1:5000%eth0", 1, 100, 5000},
		{"smallest", "239.1.1.1:5000%eth0", 1, traffic.HeaderLen, 1000},
		{"full frame", "239.1.1.1:5000%eth0", 1, 1472, 1000},
		{"fragments", "239.1.1.1:5000%eth0", 1, 5001, 100},
		{"several groups", "239.1.1.1:5000%eth0", 4, 101, 4000},
		{"more groups than a socket may join", "239.1.2.250:5000%eth0", 50, 200, 5000},
		{"unicast", "10.1.0.2:5000%eth0", 1, 100, 1000},
		{"ipv6 group", "[ff3e::8000:1]:5000%eth0", 1, 100, 1000},
		{"ipv6 groups", "[ff3e::8000:fffe]:5000%eth0", 30, 100, 3000},
		{"ipv6 link-local group", "[ff02::1234]:5000%eth0", 2, 100, 1000},
		{"ipv6 unicast", "[fd00::2]:5000%eth0", 1, 1452, 1000},
	} {
		t.Run(c.name, func(t *testing.T) {
			each := c.count / uint64(c.groups)
			r := receive(t, w.rx, traffic.RecvConfig{Groups: c.groups, FromStart: true, Expect: each}, c.endpoint)
			sent := send(t, w.tx, traffic.SendConfig{Target: target(t, c.endpoint), Groups: c.groups, Size: c.size, Count: c.count, Rate: traffic.Rate{Value: 50e3}})
			got := r.stop(datagrams(c.count))
			if sent.Packets != c.count || sent.Bytes != c.count*uint64(c.size) {
				t.Errorf("sent %+v", sent)
			}
			wantTotal(t, got, traffic.Counters{Datagrams: c.count, Received: c.count, Bytes: c.count * uint64(c.size)})
			if faults := got.Faults(); len(faults) != 0 {
				t.Errorf("faults %q", faults)
			}
			if len(got.Groups) != c.groups {
				t.Fatalf("%d groups reported, want %d", len(got.Groups), c.groups)
			}
			for i, g := range got.Groups {
				want := traffic.Flow{Stream: sent.Stream, Flow: uint32(i), HighestSeq: each - 1, Received: each}
				if len(g.Flows) != 1 || g.Flows[0] != want {
					t.Errorf("group %s: flows %+v, want %+v", g.Endpoint, g.Flows, want)
				}
			}
			l := got.Latency
			if l.Samples != c.count || l.Negative != 0 || l.MinNS <= 0 || l.MinNS > l.P50NS || l.P50NS > l.P90NS ||
				l.P90NS > l.P99NS || l.P99NS > l.P999NS || l.P999NS > l.MaxNS {
				t.Errorf("latency %+v", l)
			}
		})
	}
}

func TestSourceSpecific(t *testing.T) {
	w := newWire6(t)
	for _, c := range []struct{ group, wanted, other string }{
		{"232.1.1.1:5000%eth0", "10.1.0.1", "10.1.0.3"},
		{"[ff3e::8000:1]:5000%eth0", "fd00::1", "fd00::3"},
	} {
		t.Run(c.wanted, func(t *testing.T) {
			if strings.Contains(c.other, ":") {
				if err := w.tx.AddAddr("eth0", c.other+"/64"); err != nil {
					t.Fatal(err)
				}
			}
			// A second receiver shows that the other source does arrive.
			one := receive(t, w.rx, traffic.RecvConfig{}, c.wanted+"@"+c.group)
			all := receive(t, w.rx, traffic.RecvConfig{}, c.group)
			for _, source := range []string{c.other, c.wanted} {
				send(t, w.tx, traffic.SendConfig{Target: target(t, c.group), Source: netip.MustParseAddr(source), Count: 100})
			}
			if got := all.stop(datagrams(200)).Total.Received; got != 200 {
				t.Errorf("any source: received %d, want 200", got)
			}
			got := one.stop(datagrams(100))
			wantTotal(t, got, traffic.Counters{Datagrams: 100, Received: 100, Bytes: 100 * traffic.HeaderLen})
			if last := got.Groups[0].Last; last == nil || last.Source.Addr().String() != c.wanted {
				t.Errorf("last packet %+v, want from %s", last, c.wanted)
			}
		})
	}
}

func TestHeaderFields(t *testing.T) {
	w := newWire6(t)
	dscp := func(v uint8) *uint8 { return &v }
	for _, c := range []struct{ endpoint, source, other string }{
		{"239.1.1.1:5000%eth0", "10.1.0.3", "10.1.0.1"},
		{"10.1.0.2:5000%eth0", "10.1.0.3", "10.1.0.1"},
		{"[ff3e::8000:1]:5000%eth0", "fd00::1", "fd00::9"},
		{"[fd00::2]:5000%eth0", "fd00::1", "fd00::9"},
	} {
		t.Run(c.endpoint, func(t *testing.T) {
			right := traffic.Expected{TTL: 9, Source: netip.MustParseAddr(c.source), SourcePort: 4321, DSCP: dscp(34)}
			run := func(expected traffic.Expected) traffic.RecvReport {
				r := receive(t, w.rx, traffic.RecvConfig{Expected: expected, Count: 10}, c.endpoint)
				send(t, w.tx, traffic.SendConfig{Target: target(t, c.endpoint), Count: 10, TTL: 9, DSCP: 34, Source: right.Source, SourcePort: 4321})
				rep := r.wait()
				if err := r.Close(); err != nil { // the port is for the next
					t.Fatal(err)
				}
				return rep
			}
			seen := traffic.Fields{Source: netip.AddrPortFrom(right.Source, 4321), TTL: 9, DSCP: 34}
			got := run(right)
			if got.Total.Wrong != (traffic.Wrong{}) || got.Groups[0].LastWrong != nil {
				t.Errorf("as expected: wrong %+v", got.Total.Wrong)
			}
			if last := got.Groups[0].Last; last == nil || *last != seen {
				t.Errorf("last %+v, want %+v", last, seen)
			}
			got = run(traffic.Expected{TTL: 8, Source: netip.MustParseAddr(c.other), SourcePort: 4322, DSCP: dscp(0)})
			if want := (traffic.Wrong{TTL: 10, Source: 10, SourcePort: 10, DSCP: 10}); got.Total.Wrong != want {
				t.Errorf("wrong %+v, want %+v", got.Total.Wrong, want)
			}
			if wrong := got.Groups[0].LastWrong; wrong == nil || *wrong != seen {
				t.Errorf("last wrong %+v, want %+v", wrong, seen)
			}
			want := []string{"10 with a wrong ttl", "10 with a wrong source address", "10 with a wrong source port", "10 with a wrong dscp"}
			if faults := got.Faults(); fmt.Sprint(faults) != fmt.Sprint(want) {
				t.Errorf("faults %q, want %q", faults, want)
			}
		})
	}
}

func TestDefaultTTLs(t *testing.T) {
	w := newWire6(t)
	for endpoint, want := range map[string]uint8{"239.1.1.1:5000%eth0": 1, "[ff3e::8000:1]:5000%eth0": 1, "10.1.0.2:5000%eth0": 64, "[fd00::2]:5000%eth0": 64} {
		r := receive(t, w.rx, traffic.RecvConfig{Count: 1}, endpoint)
		send(t, w.tx, traffic.SendConfig{Target: target(t, endpoint), Count: 1})
		if last := r.wait().Groups[0].Last; last.TTL != want {
			t.Errorf("%s: ttl %d, want %d", endpoint, last.TTL, want)
		}
	}
}

// raw sends datagrams that the test makes up.
type raw struct {
	t    testing.TB
	conn *net.UDPConn
}

func newRaw(t testing.TB, h *lab.Host, to string) raw {
	t.Helper()
	r := raw{t: t}
	labtest.Do(t, h, func() (err error) {
		r.conn, err = net.DialUDP("udp4", &net.UDPAddr{IP: net.IPv4(10, 1, 0, 1)}, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(to)))
		if err != nil {
			return err
		}
		return setMulticastInterface(r.conn, "eth0")
	})
	t.Cleanup(func() { r.conn.Close() })
	return r
}

func setMulticastInterface(c *net.UDPConn, name string) error {
	rc, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var optErr error
	if err := rc.Control(func(fd uintptr) { optErr = unix.BindToDevice(int(fd), name) }); err != nil {
		return err
	}
	return optErr
}

// number sends packets with these sequence numbers.
func (r raw) number(stream uint64, seqs ...uint64) {
	r.t.Helper()
	for _, seq := range seqs {
		r.packet(traffic.Header{Stream: stream, Seq: seq, SentAt: time.Now().UnixNano()}, nil)
	}
}

func (r raw) packet(h traffic.Header, change func([]byte)) {
	r.t.Helper()
	b := make([]byte, 100)
	traffic.Encode(b, h)
	if change != nil {
		change(b)
	}
	r.bytes(b)
}

func (r raw) bytes(b []byte) {
	r.t.Helper()
	if _, err := r.conn.Write(b); err != nil {
		r.t.Fatal(err)
	}
}

func TestWhatGoesWrongIsCounted(t *testing.T) {
	w := newWire(t)
	const endpoint, to = "10.1.0.2:5000%eth0", "10.1.0.2:5000"
	for _, c := range []struct {
		name string
		cfg  traffic.RecvConfig
		send func(r raw)
		want traffic.Counters // Bytes are filled in
	}{
		{"loss", traffic.RecvConfig{}, func(r raw) { r.number(1, 0, 1, 4, 5) },
			traffic.Counters{Datagrams: 4, Received: 4, Lost: 2}},
		{"loss at the start does not count", traffic.RecvConfig{}, func(r raw) { r.number(1, 3, 4) },
			traffic.Counters{Datagrams: 2, Received: 2}},
		{"loss at the start counts", traffic.RecvConfig{FromStart: true}, func(r raw) { r.number(1, 3, 4) },
			traffic.Counters{Datagrams: 2, Received: 2, Lost: 3}},
		{"loss at the end", traffic.RecvConfig{Expect: 5}, func(r raw) { r.number(1, 0, 2) },
			traffic.Counters{Datagrams: 2, Received: 2, Lost: 3}},
		{"surplus", traffic.RecvConfig{Expect: 1}, func(r raw) { r.number(1, 0, 1, 2) },
			traffic.Counters{Datagrams: 3, Received: 3, Surplus: 2}},
		{"duplicates", traffic.RecvConfig{}, func(r raw) { r.number(1, 0, 0, 1, 2, 1) },
			traffic.Counters{Datagrams: 5, Received: 3, Duplicated: 2}},
		{"reordering", traffic.RecvConfig{}, func(r raw) { r.number(1, 0, 2, 1, 4, 3) },
			traffic.Counters{Datagrams: 5, Received: 5, Reordered: 2, Repaired: 2}},
		{"too late", traffic.RecvConfig{Window: 64}, func(r raw) { r.number(1, 0, 100, 1) },
			traffic.Counters{Datagrams: 3, Received: 2, Lost: 99, Stale: 1}},
		{"corruption", traffic.RecvConfig{}, func(r raw) {
			r.number(1, 0)
			r.packet(traffic.Header{Stream: 1, Seq: 1}, func(b []byte) { b[99] ^= 1 })
			r.packet(traffic.Header{Stream: 1, Seq: 2}, func(b []byte) { b[20] ^= 1 })
			r.number(1, 3)
		}, traffic.Counters{Datagrams: 4, Received: 2, Corrupt: 2, Lost: 2}},
		{"foreign", traffic.RecvConfig{}, func(r raw) {
			r.bytes(nil)
			r.bytes([]byte("hello"))
			r.bytes(make([]byte, 1472))
			r.number(1, 0)
		}, traffic.Counters{Datagrams: 4, Received: 1, Foreign: 3}},
		{"a restarted sender is not loss", traffic.RecvConfig{FromStart: true}, func(r raw) {
			r.number(1, 0, 1, 2)
			r.number(2, 0, 1)
			r.number(1, 3)
		}, traffic.Counters{Datagrams: 6, Received: 6}},
		{"two flows in one group", traffic.RecvConfig{}, func(r raw) {
			for _, h := range []traffic.Header{{Flow: 0, Seq: 5}, {Flow: 1, Seq: 90}, {Flow: 0, Seq: 6}, {Flow: 1, Seq: 92}, {Flow: 0, Seq: 6}} {
				r.packet(h, nil)
			}
		}, traffic.Counters{Datagrams: 5, Received: 4, Lost: 1, Duplicated: 1}},
		{"more streams than are kept apart", traffic.RecvConfig{}, func(r raw) {
			for stream := range uint64(200) {
				r.number(stream, 0, 2)
			}
		}, traffic.Counters{Datagrams: 400, Received: 400, Lost: 200}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := receive(t, w.rx, c.cfg, endpoint)
			c.send(newRaw(t, w.tx, to))
			got := r.stop(datagrams(c.want.Datagrams))
			c.want.Bytes = 100 * c.want.Received
			wantTotal(t, got, c.want)
			faulty := c.want.Lost+c.want.Duplicated+c.want.Stale+c.want.Corrupt+c.want.Surplus > 0
			if faults := got.Faults(); (len(faults) > 0) != faulty {
				t.Errorf("faults %q", faults)
			}
		})
	}
}

func TestSilenceIsAFault(t *testing.T) {
	w := newWire(t)
	r := receive(t, w.rx, traffic.RecvConfig{Expect: 7}, "239.1.1.1:5000%eth0")
	r.cancel()
	got := r.wait()
	if faults := fmt.Sprint(got.Faults()); faults != "[7 lost nothing received]" || !got.Finished {
		t.Errorf("faults %s, %+v", faults, got)
	}
	r = receive(t, w.rx, traffic.RecvConfig{Groups: 3, Count: 1}, "239.1.1.1:5000%eth0")
	send(t, w.tx, traffic.SendConfig{Target: target(t, "239.1.1.1:5000%eth0"), Count: 1})
	if faults := fmt.Sprint(r.wait().Faults()); faults != "[nothing received on 2 of 3 groups, such as 239.1.1.2:5000%eth0]" {
		t.Errorf("faults %s", faults)
	}
}

// A receiver that reads too late loses packets in its own socket, and says so.
func TestOwnSocketDrops(t *testing.T) {
	w := newWire(t)
	const endpoint = "239.1.1.1:5000%eth0"
	var r *traffic.Receiver
	labtest.Do(t, w.rx, func() (err error) {
		r, err = traffic.NewReceiver(traffic.RecvConfig{
			Subscriptions: []traffic.Subscription{subscription(t, endpoint)}, SocketBuffer: 4096, Expect: 500,
		})
		return err
	})
	defer r.Close()
	sent := send(t, w.tx, traffic.SendConfig{Target: target(t, endpoint), Count: 500, Size: 1000})
	labtest.Eventually(t, "a drop", func() bool { return r.Report().Total.SocketDrops > 0 })
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() { result <- r.Run(ctx) }()
	labtest.Eventually(t, "every packet to be accounted for", func() bool {
		c := r.Report().Total
		return c.Received+c.SocketDrops >= sent.Packets
	})
	cancel()
	if err := <-result; err != nil {
		t.Fatal(err)
	}
	c := r.Report().Total
	if c.SocketDrops == 0 || c.Received == 0 || c.Lost != c.SocketDrops || c.Received+c.SocketDrops != sent.Packets {
		t.Errorf("sent %d, got %+v", sent.Packets, c)
	}
}

// A group joined on one interface is not heard from another.
func TestInterfaceIsMinded(t *testing.T) {
	w := newWire6(t)
	labtest.Connect(t,
		lab.End{Host: w.tx, Name: "eth1", Addrs: []string{"10.2.0.1/24", "fd01::1/64"}},
		lab.End{Host: w.rx, Name: "eth1", Addrs: []string{"10.2.0.2/24", "fd01::2/64"}})
	w.waitIPv6(t, "eth1")
	for _, group := range []string{"239.1.1.1:5000", "[ff3e::8000:1]:5000"} {
		r0 := receive(t, w.rx, traffic.RecvConfig{}, group+"%eth0")
		r1 := receive(t, w.rx, traffic.RecvConfig{}, group+"%eth1")
		send(t, w.tx, traffic.SendConfig{Target: target(t, group+"%eth0"), Count: 20})
		send(t, w.tx, traffic.SendConfig{Target: target(t, group+"%eth1"), Count: 30})
		if n0, n1 := r0.stop(datagrams(20)).Total.Datagrams, r1.stop(datagrams(30)).Total.Datagrams; n0 != 20 || n1 != 30 {
			t.Errorf("%s: eth0 %d, eth1 %d, want 20, 30", group, n0, n1)
		}
	}
}

func TestRateIsHeld(t *testing.T) {
	w := newWire(t)
	for _, c := range []struct {
		rate string
		size int
		want float64 // packets a second
		runs time.Duration
	}{
		{"200", 100, 200, 300 * time.Millisecond},
		{"20k", 100, 20e3, 300 * time.Millisecond},
		{"8Mbit", 1000, 1000, 300 * time.Millisecond},
	} {
		rate, err := traffic.ParseRate(c.rate)
		if err != nil {
			t.Fatal(err)
		}
		got := send(t, w.tx, traffic.SendConfig{Target: target(t, "239.1.1.1:5000%eth0"), Rate: rate, Size: c.size, Duration: c.runs})
		if want := uint64(c.want * c.runs.Seconds()); got.Packets != want && got.ElapsedNS < int64(c.runs) {
			t.Errorf("%s: %d packets, want %d", c.rate, got.Packets, want)
		}
		// Never faster; slower only as far as the machine is held up.
		if got.PacketsPerSecond > c.want*1.01 || got.PacketsPerSecond < c.want*0.2 {
			t.Errorf("%s: achieved %+v, want %g packets/s", c.rate, got, c.want)
		}
		if bits := got.PacketsPerSecond * float64(c.size*8); got.BitsPerSecond != bits {
			t.Errorf("%s: %g bit/s, want %g", c.rate, got.BitsPerSecond, bits)
		}
	}
}

func TestSenderStopsWithItsContext(t *testing.T) {
	w := newWire(t)
	for _, rate := range []float64{0.01, 1000, 0} {
		var s *traffic.Sender
		labtest.Do(t, w.tx, func() (err error) {
			s, err = traffic.NewSender(traffic.SendConfig{Target: target(t, "239.1.1.1:5000%eth0"), Rate: traffic.Rate{Value: rate}})
			return err
		})
		ctx, cancel := context.WithCancel(context.Background())
		result := make(chan error, 1)
		go func() { result <- s.Run(ctx) }()
		labtest.Eventually(t, "a packet", func() bool { return s.Report().Packets > 0 })
		cancel()
		select {
		case err := <-result:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(labtest.Timeout):
			t.Fatalf("rate %g: does not end", rate)
		}
		if err := s.Run(ctx); !errors.Is(err, traffic.ErrRunTwice) {
			t.Errorf("second run: %v", err)
		}
		if r := s.Report(); r.ElapsedNS <= 0 || r.Packets == 0 {
			t.Errorf("report %+v", r)
		}
		if err := errors.Join(s.Close(), s.Close()); err != nil {
			t.Error(err)
		}
	}
}

func TestReceiverEnds(t *testing.T) {
	w := newWire(t)
	const endpoint = "239.1.1.1:5000%eth0"
	cfg := traffic.SendConfig{Target: target(t, endpoint), Count: 1000}

	r := receive(t, w.rx, traffic.RecvConfig{Count: 333}, endpoint)
	send(t, w.tx, cfg)
	if got := r.wait(); got.Total.Received != 333 {
		t.Errorf("count: received %d, want 333", got.Total.Received)
	}
	if err := r.Run(t.Context()); !errors.Is(err, traffic.ErrRunTwice) {
		t.Errorf("second run: %v", err)
	}

	// All are in its socket before it runs, so that no pause of the sender ends it.
	var idle *traffic.Receiver
	labtest.Do(t, w.rx, func() (err error) {
		idle, err = traffic.NewReceiver(traffic.RecvConfig{Subscriptions: []traffic.Subscription{subscription(t, endpoint)}, Idle: 100 * time.Millisecond})
		return err
	})
	defer idle.Close()
	send(t, w.tx, cfg)
	if err := idle.Run(t.Context()); err != nil {
		t.Error(err)
	}
	if got := idle.Report(); got.Total.Received != 1000 || got.ElapsedNS < int64(100*time.Millisecond) {
		t.Errorf("idle: %+v", got)
	}

	r = receive(t, w.rx, traffic.RecvConfig{Duration: 50 * time.Millisecond, Idle: time.Nanosecond}, endpoint)
	if got := r.wait(); got.Total.Datagrams != 0 || got.ElapsedNS < int64(50*time.Millisecond) || !got.Finished {
		t.Errorf("duration: %+v", got)
	}
}

func TestIntervals(t *testing.T) {
	w := newWire(t)
	const endpoint = "239.1.1.1:5000%eth0"
	r := receive(t, w.rx, traffic.RecvConfig{}, endpoint)
	var sum uint64
	for i := range 3 {
		send(t, w.tx, traffic.SendConfig{Target: target(t, endpoint), Count: 100})
		labtest.Eventually(t, "the packets", func() bool { return r.Report().Total.Received == uint64(i+1)*100 })
		got := r.Interval()
		if got.Received != 100 || got.Latency.Samples != 100 || got.PacketsPerSecond <= 0 || got.IntervalNS <= 0 {
			t.Errorf("interval %d: %+v", i, got)
		}
		sum += got.Received
	}
	if got := r.Interval(); got.Received != 0 || got.Latency.Samples != 0 || got.Total.Received != sum {
		t.Errorf("silent interval: %+v", got)
	}
	r.cancel()
	r.wait()
}

func TestReportsWhileRunning(t *testing.T) {
	w := newWire(t)
	const endpoint = "239.1.1.1:5000%eth0"
	r := receive(t, w.rx, traffic.RecvConfig{Groups: 3, Count: 6000}, endpoint)
	var wg sync.WaitGroup
	done := make(chan struct{})
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				rep := r.Report()
				r.Interval()
				if c := rep.Total; c.Datagrams != c.Received+c.Foreign || c.Bytes != c.Received*traffic.HeaderLen {
					t.Errorf("the report does not add up: %+v", c)
				}
			}
		})
	}
	send(t, w.tx, traffic.SendConfig{Target: target(t, endpoint), Groups: 3, Count: 6000, Rate: traffic.Rate{Value: 20e3}})
	r.wait()
	close(done)
	wg.Wait()
}

// A sender whose packets are refused for a while goes on with the next number.
func TestNobodyListens(t *testing.T) {
	w := newWire(t)
	var s *traffic.Sender
	labtest.Do(t, w.tx, func() (err error) {
		s, err = traffic.NewSender(traffic.SendConfig{Target: target(t, "10.1.0.2:5000%eth0"), Rate: traffic.Rate{Value: 1000}})
		return err
	})
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() { result <- s.Run(ctx) }()
	labtest.Eventually(t, "a refusal", func() bool { return s.Report().NetworkErrors > 0 })
	r := receive(t, w.rx, traffic.RecvConfig{Count: 200}, "10.1.0.2:5000%eth0")
	got := r.wait()
	cancel()
	if err := errors.Join(<-result, s.Close()); err != nil {
		t.Fatal(err)
	}
	if got.Total.Lost != 0 || got.Groups[0].Flows[0].FirstSeq == 0 {
		t.Errorf("got %+v", got.Groups[0])
	}
}

func TestSenderGivesUpOnADeadInterface(t *testing.T) {
	w := newWire(t)
	var s *traffic.Sender
	labtest.Do(t, w.tx, func() (err error) {
		s, err = traffic.NewSender(traffic.SendConfig{Target: target(t, "239.1.1.1:5000%eth0"), Groups: 2, Rate: traffic.Rate{Value: 1000}})
		return err
	})
	defer s.Close()
	result := make(chan error, 1)
	go func() { result <- s.Run(t.Context()) }()
	labtest.Eventually(t, "a packet", func() bool { return s.Report().Packets > 0 })
	labtest.RemoveLink(t, w.tx, "eth0")
	select {
	case err := <-result:
		if err == nil || !strings.HasPrefix(err.Error(), "send to 239.1.1.1:5000%eth0: ") {
			t.Errorf("got %v", err)
		}
	case <-time.After(labtest.Timeout):
		t.Fatal("goes on for ever")
	}
}

func TestNewSenderRefuses(t *testing.T) {
	w := newWire(t)
	valid := target(t, "239.1.1.1:5000%eth0")
	for _, c := range []struct {
		change func(*traffic.SendConfig)
		want   string
	}{
		{func(c *traffic.SendConfig) { c.Target = traffic.Target{} }, `target invalid AddrPort%: must have an address and a port`},
		{func(c *traffic.SendConfig) { c.Target.Interface = "nosuch0" }, `send to 239.1.1.1:5000%nosuch0: interface "nosuch0": no such interface in this network namespace`},
		{func(c *traffic.SendConfig) { c.Target.Interface = "longer-than-any-name" }, `send to 239.1.1.1:5000%longer-than-any-name: interface "longer-than-any-name": invalid argument`},
		{func(c *traffic.SendConfig) { c.Size = 39 }, `size 39: must be 40 to 65507 bytes of UDP payload`},
		{func(c *traffic.SendConfig) { c.Size = 65508 }, `size 65508: must be 40 to 65507 bytes of UDP payload`},
		{func(c *traffic.SendConfig) { c.Groups = -1 }, `groups -1: must be 1 to 65536`},
		{func(c *traffic.SendConfig) { c.Groups, c.Target = 2, target(t, "10.1.0.2:5000%eth0") }, `groups 2 from 10.1.0.2: the address must be multicast`},
		{func(c *traffic.SendConfig) { c.Batch = 1025 }, `batch 1025: must be 1 to 1024 packets`},
		{func(c *traffic.SendConfig) { c.DSCP = 64 }, `dscp 64: must be 0 to 63`},
		{func(c *traffic.SendConfig) { c.Duration = -1 }, `duration -1ns: must not be negative`},
		{func(c *traffic.SendConfig) { c.Rate.Value = -1 }, `rate -1: must be 0 to 1e+12`},
		{func(c *traffic.SendConfig) { c.Source = netip.MustParseAddr("fd00::1") }, `source fd00::1 and target 239.1.1.1: must be of one family`},
		{func(c *traffic.SendConfig) { c.Source = netip.MustParseAddr("10.9.9.9") }, `send to 239.1.1.1:5000%eth0: bind to source 10.9.9.9:0: cannot assign requested address: must be an address of this host`},
	} {
		cfg := traffic.SendConfig{Target: valid}
		c.change(&cfg)
		var s *traffic.Sender
		err := w.tx.Do(func() (err error) {
			s, err = traffic.NewSender(cfg)
			return err
		})
		if err == nil || err.Error() != c.want || s != nil {
			t.Errorf("got %v\nwant %s", err, c.want)
		}
	}
}

func TestNewReceiverRefuses(t *testing.T) {
	w := newWire(t)
	taken := receive(t, w.rx, traffic.RecvConfig{}, "10.1.0.2:7000%eth0")
	defer func() { taken.cancel(); taken.wait() }()
	for _, c := range []struct {
		endpoints []string
		cfg       traffic.RecvConfig
		want      string
	}{
		{nil, traffic.RecvConfig{}, `no endpoint: must be at least one`},
		{[]string{"239.1.1.1:5000%nosuch0"}, traffic.RecvConfig{}, `receive 239.1.1.1:5000%nosuch0: interface "nosuch0": no such interface in this network namespace`},
		{[]string{"10.9.9.9:5000%eth0"}, traffic.RecvConfig{}, `receive 10.9.9.9:5000%eth0: bind: cannot assign requested address: must be multicast or an address of this host`},
		{[]string{"10.1.0.2:7000%eth0"}, traffic.RecvConfig{}, `receive 10.1.0.2:7000%eth0: bind: address already in use`},
		{[]string{"10.1.0.2:5000%eth0"}, traffic.RecvConfig{Groups: 2}, `groups 2 from 10.1.0.2: the address must be multicast`},
		{[]string{"239.1.1.1:5000%eth0", "239.1.1.0:5000%eth0"}, traffic.RecvConfig{Groups: 2}, `endpoint 239.1.1.1:5000%eth0: given twice`},
		{[]string{"239.1.1.1:5000%eth0"}, traffic.RecvConfig{Groups: -3}, `groups -3: must be 1 to 65536`},
		{[]string{"239.1.1.1:5000%eth0"}, traffic.RecvConfig{Window: 100}, `window 100: must be a power of two from 64 to 16777216`},
		{[]string{"239.1.1.1:5000%eth0"}, traffic.RecvConfig{Idle: -1}, `idle -1ns: must not be negative`},
		{[]string{"239.1.1.1:5000%eth0"}, traffic.RecvConfig{Duration: -1}, `duration -1ns: must not be negative`},
		{[]string{"239.1.1.1:5000%eth0"}, traffic.RecvConfig{Batch: -1}, `batch -1: must be 1 to 1024 packets`},
		{[]string{"239.1.1.1:5000%eth0"}, traffic.RecvConfig{SocketBuffer: -1}, `socket buffer -1: must be 1 to 1073741823 bytes`},
	} {
		for _, e := range c.endpoints {
			c.cfg.Subscriptions = append(c.cfg.Subscriptions, subscription(t, e))
		}
		var r *traffic.Receiver
		err := w.rx.Do(func() (err error) {
			r, err = traffic.NewReceiver(c.cfg)
			return err
		})
		if err == nil || err.Error() != c.want || r != nil {
			t.Errorf("got %v\nwant %s", err, c.want)
		}
		if strings.Contains(c.want, "nosuch0") && !errors.Is(err, traffic.ErrNoInterface) {
			t.Errorf("%v does not match ErrNoInterface", err)
		}
	}
	if n := memberships(t, w.rx); n != 0 {
		t.Errorf("%d memberships are left", n)
	}
}

// memberships counts the IPv4 groups of 239/8 that a host is a member of.
func memberships(t testing.TB, h *lab.Host) int {
	t.Helper()
	var table []byte
	labtest.Do(t, h, func() (err error) {
		table, err = os.ReadFile("/proc/thread-self/net/igmp")
		return err
	})
	n := 0
	for line := range strings.Lines(string(table)) {
		// Addresses are printed as the host's own integer.
		if f := strings.Fields(line); len(f) > 0 && len(f[0]) == 8 && (strings.HasSuffix(f[0], "EF") || strings.HasPrefix(f[0], "EF")) {
			n++
		}
	}
	return n
}

func TestCloseLeavesTheGroups(t *testing.T) {
	w := newWire(t)
	r := receive(t, w.rx, traffic.RecvConfig{Groups: 50}, "239.1.1.1:5000%eth0")
	if n := memberships(t, w.rx); n != 50 {
		t.Errorf("%d memberships, want 50", n)
	}
	r.cancel()
	r.wait()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if n := memberships(t, w.rx); n != 0 {
		t.Errorf("%d memberships are left", n)
	}
	if got := r.Report(); !got.Finished || len(got.Groups) != 50 {
		t.Errorf("after Close: %+v", got)
	}
}

// Two legs lose, delay and reorder, each by itself; a receiver of both has each packet once and the
// copies as duplicates, one of another format's number none that is its own.
func TestSendLegs(t *testing.T) {
	w := newWire(t)
	n, err := traffic.ParseNumbering("rtp")
	if err != nil {
		t.Fatal(err)
	}
	legs, err := traffic.ParseLegs("239.1.1.1:5000%eth0,239.1.1.2:5000%eth0", "10%", "20ms", "0%,5%")
	if err != nil {
		t.Fatal(err)
	}
	const count = 4000
	a := receive(t, w.rx, traffic.RecvConfig{Numbering: n, FromStart: true}, "239.1.1.1:5000%eth0")
	b := receive(t, w.rx, traffic.RecvConfig{Numbering: n, FromStart: true}, "239.1.1.2:5000%eth0")
	sent := send(t, w.tx, traffic.SendConfig{Legs: legs, Numbering: n, Size: 200, Count: count, Rate: traffic.Rate{Value: 10_000}, Seed: 5})
	if sent.Packets != count || len(sent.Legs) != 2 || sent.OnNoLeg == 0 {
		t.Fatalf("%+v", sent)
	}
	for i, r := range []*running{a, b} {
		leg := sent.Legs[i]
		got := r.stop(datagrams(leg.Packets))
		if leg.Packets+leg.LeftOut != count || leg.LeftOut < count/20 || (leg.Reordered > 0) != (i == 1) {
			t.Errorf("leg %d: %+v", i, leg)
		}
		c := got.Total
		// The last packets of a leg may be among those that it leaves out.
		if c.Received != leg.Packets || c.Lost > leg.LeftOut || c.Lost+10 < leg.LeftOut || c.Duplicated+c.Corrupt+c.Foreign+c.Stale != 0 {
			t.Errorf("leg %d: %+v of %+v", i, c, leg)
		}
		if (c.Reordered > 0) != (i == 1) || c.Reordered != c.Repaired {
			t.Errorf("leg %d: %+v", i, c)
		}
		if delay := time.Duration(got.Latency.MinNS); (delay >= legs[1].Delay) != (i == 1) {
			t.Errorf("leg %d: packets took %v at least", i, delay)
		}
	}

	// A run ends with packets that no leg sends.
	legs[0].Loss, legs[1].Loss = 1, 1
	sent = send(t, w.tx, traffic.SendConfig{Legs: legs, Count: 10, Rate: traffic.Rate{Value: 1000}})
	if sent.Packets != 10 || sent.OnNoLeg != 10 || sent.Bytes != 0 {
		t.Errorf("%+v", sent)
	}
}
