package forward

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/fanout"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
)

// newTun makes a tun device in a host, sets it up, and returns its other end: packets
// written there arrive on the device, and packets sent through it are read there.
func newTun(t testing.TB, h *lab.Host, name string) *os.File {
	t.Helper()
	f := labtest.Tun(t, h, name, 0)
	if err := h.SetUp(name, true); err != nil {
		t.Fatal(err)
	}
	return f
}

// read returns the next UDP packet from a tun device, without an Ethernet header.
func read(t testing.TB, tun *os.File) []byte {
	t.Helper()
	if err := tun.SetReadDeadline(time.Now().Add(labtest.Timeout)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 65536)
	for {
		n, err := tun.Read(b)
		if err != nil {
			t.Fatalf("read from tun device: %v", err)
		}
		if isUDP(ethernet(b[:n])) {
			return b[:n]
		}
	}
}

// ethernet puts an Ethernet header without addresses in front of a packet.
func ethernet(p []byte) []byte {
	protocol := []byte{0x08, 0x00}
	if len(p) > 0 && p[0]>>4 == 6 {
		protocol = []byte{0x86, 0xdd}
	}
	return append(append(make([]byte, 12), protocol...), p...)
}

// Devices without an Ethernet header send and receive, together with others.
func TestTun(t *testing.T) {
	b := newBench(t, 1)
	tunOut, tunIn := newTun(t, b.relay, "tun-out"), newTun(t, b.relay, "tun-in")
	out, in := iface(t, b.relay, "tun-out"), iface(t, b.relay, "tun-in")
	f := b.path(t, FanoutOptions{Workers: 2})
	sink := catch(t, b.sinks[0], "eth0")
	source := openSender(t, b.source, iface(t, b.source, "eth0").Index)
	for _, c := range []struct{ group, to string }{{"239.1.1.1", "239.9.9.1"}, {"ff3e::1", "ff3e::9"}} {
		frame := numbered(0, 0)
		if frame.Dst = netip.MustParseAddr(c.group); frame.Dst.Is6() {
			frame.Src = netip.MustParseAddr("fd00::1")
		}
		frame.DstMAC = packet.MulticastMAC(frame.Dst)
		frame.Padding = 5
		toTun := rule("to tun "+c.group, b.in, c.group, 5000, sendTo(out, c.to, 6000), sendTo(b.out[0], c.to, 6001))
		fromTun := rule("from tun "+c.group, in, c.group, 5000, sendTo(b.out[0], c.to, 6002), sendTo(out, c.to, 6003))
		b.sync(t, f, toTun, fromTun)

		data := frame.Build()
		sendFrames(t, source, [][]byte{data})
		want := expect(t, toTun.Out[0], data)
		if got := read(t, tunOut); !bytes.Equal(got, want[14:len(want)-frame.Padding]) {
			t.Errorf("on tun:\n got  %x\n want %x", got, want[14:])
		}
		receive(t, sink, [][]byte{expect(t, toTun.Out[1], data)})

		frame.Padding, frame.VLANs = 0, nil
		data = frame.Build()
		if _, err := tunIn.Write(data[14:]); err != nil {
			t.Fatal(err)
		}
		receive(t, sink, [][]byte{expect(t, fromTun.Out[0], data)})
		want = expect(t, fromTun.Out[1], data)
		if got := read(t, tunOut); !bytes.Equal(got, want[14:]) {
			t.Errorf("from tun to tun:\n got  %x\n want %x", got, want[14:])
		}
		adds(t, f, toTun.Name, 1)
		adds(t, f, fromTun.Name, 1)
	}
}

// The host's own receiver gets each packet once, and so does the output.
func TestLocalReceiver(t *testing.T) {
	b := newBench(t, 1)
	conn := labtest.Listen(t, b.relay, "in", netip.MustParseAddrPort("239.1.1.1:5000"))
	f := b.path(t, FanoutOptions{Workers: 2, Mode: fanout.ModeHash})
	sink := countOn(t, b.sinks[0])
	b.sync(t, f, rule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.9.9.1", 6000)))
	const frames = 200
	source := openSender(t, b.source, iface(t, b.source, "eth0").Index)
	if err := conn.SetReadDeadline(time.Now().Add(labtest.Timeout)); err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 2000)
	for i := range frames {
		sendFrames(t, source, [][]byte{numbered(0, i).Build()})
		n, err := conn.Read(data)
		if err != nil {
			t.Fatalf("the local receiver got %d of %d: %v", i, frames, err)
		}
		if n != 23 || data[7] != byte(i) {
			t.Fatalf("the local receiver got %x as number %d", data[:n], i)
		}
	}
	adds(t, f, "r", frames)
	labtest.Eventually(t, "the output's copies have arrived", func() bool { return sink.total.Load() == frames })
}

// Packets that match no rule do not reach user space.
func TestFilter(t *testing.T) {
	b := newBench(t, 1)
	f := b.path(t, FanoutOptions{Workers: 1})
	source := openSender(t, b.source, iface(t, b.source, "eth0").Index)
	rules := []flow.Flow{
		rule("group", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.9.9.1", 6000)),
		rule("prefix", b.in, "239.16.0.0", 0, sendTo(b.out[0], "239.9.9.1", 6000)),
		rule("group 6", b.in, "ff3e::1", 0, sendTo(b.out[0], "ff3e::9", 6000)),
		rule("prefix 6", b.in, "ff3e:0:1::", 0, sendTo(b.out[0], "ff3e::9", 6000)),
		rule("elsewhere", b.out[0], "239.2.2.2", 0, sendTo(b.in, "239.9.9.1", 6000)),
	}
	rules[1].In.Len, rules[3].In.Len = 12, 48
	b.sync(t, f, rules...)
	received := func() uint64 {
		groups, err := f.Groups()
		if err != nil {
			t.Fatal(err)
		}
		return groups[0].Workers[0].Received
	}
	frame := func(to string, change func(*packet.Frame)) []byte {
		f := numbered(0, 0)
		if f.Dst = netip.MustParseAddr(to); f.Dst.Is6() {
			f.Src = netip.MustParseAddr("fd00::1")
		}
		if change != nil {
			change(&f)
		}
		return f.Build()
	}
	tags := func(tags ...uint16) func(*packet.Frame) {
		return func(f *packet.Frame) { f.VLANs = tags }
	}
	tcp := frame("239.1.1.1", nil)
	tcp[14+9] = unix.IPPROTO_TCP
	arp := frame("239.1.1.1", nil)
	arp[12], arp[13] = 0x08, 0x06
	fragments := packet.Fragment(frame("ff3e::1", nil), 1, 8)
	want := received()
	for _, c := range []struct {
		name  string
		frame []byte
		in    bool
	}{
		{"group", frame("239.1.1.1", nil), true},
		{"group, tagged", frame("239.1.1.1", tags(7)), true},
		{"group, tagged twice", frame("239.1.1.1", tags(9, 7)), true},
		{"group, thrice", frame("239.1.1.1", tags(9, 8, 7)), false},
		{"other group", frame("239.1.1.2", nil), false},
		{"group of another interface", frame("239.2.2.2", nil), false},
		{"prefix, first", frame("239.16.0.0", nil), true},
		{"prefix, last", frame("239.31.255.255", nil), true},
		{"below the prefix", frame("239.15.255.255", nil), false},
		{"above the prefix", frame("239.32.0.0", nil), false},
		{"IPv6 group", frame("ff3e::1", nil), true},
		{"IPv6 group, tagged", frame("ff3e::1", tags(7)), true},
		{"IPv6 fragment", fragments[1], true},
		{"IPv6 prefix", frame("ff3e:0:1:ffff::1", nil), true},
		{"other IPv6 group", frame("ff3e::2", nil), false},
		{"TCP", tcp, false},
		{"ARP", arp, false},
		{"short", make([]byte, 14), false},
	} {
		before := want
		if c.in {
			want++
		}
		// The group's frame after it shows that it has been processed.
		want++
		sendFrames(t, source, [][]byte{c.frame, frame("239.1.1.1", nil)})
		labtest.Eventually(t, "both frames are through: "+c.name, func() bool { return received() >= want })
		if got := received(); got != want {
			t.Fatalf("%s: %d frames came in, want %d", c.name, got-before, want-before)
		}
	}
	// The filter follows the rules.
	b.sync(t, f, rules[1])
	want++
	sendFrames(t, source, [][]byte{frame("239.1.1.1", nil), frame("239.16.0.0", nil)})
	labtest.Eventually(t, "the prefix is through", func() bool { return received() >= want })
	if got := received(); got != want {
		t.Errorf("%d frames came in, want %d: the filter lets in what was removed", got, want)
	}
}

// A unicast input accepts frames to its MAC address, and frames from the relay itself
// are loops.
func TestUnicastAndLoop(t *testing.T) {
	b := newBench(t, 1)
	f := b.path(t, FanoutOptions{Workers: 1})
	source := openSender(t, b.source, iface(t, b.source, "eth0").Index)
	b.sync(t, f, rule("r", b.in, "10.0.0.2", 5000, sendTo(b.out[0], "239.9.9.1", 6000)))
	ours, others, own, loop := numbered(0, 0), numbered(0, 1), numbered(0, 2), numbered(0, 3)
	for _, frame := range []*packet.Frame{&ours, &others, &own, &loop} {
		frame.Dst, frame.DstMAC = netip.MustParseAddr("10.0.0.2"), mac(b.in)
	}
	others.DstMAC = [6]byte{2, 9, 9, 9, 9, 9}
	own.Src = ownAddresses[0]
	loop.SrcMAC = mac(b.in)
	sendFrames(t, source, [][]byte{others.Build(), own.Build(), loop.Build(), ours.Build()})
	s := adds(t, f, "r", 3)
	if s.Drops[loader.Loop].Packets != 2 || s.Outputs[0].Sent.Packets != 1 {
		t.Errorf("%+v", s)
	}
}

// A group or sender that cannot be opened leaves the others working, and nothing
// behind; the error is the kernel's.
func TestSyncFails(t *testing.T) {
	b := newBench(t, 2)
	faulty := false
	f := b.pathWith(t, FanoutOptions{Workers: 2}, func(s *fanoutSystem) {
		open := s.openSender
		s.openSender = func(index int, opts fanout.SenderOptions) (Sender, error) {
			if faulty {
				return nil, fmt.Errorf("open sender: %w", unix.EMFILE)
			}
			return open(index, opts)
		}
	})
	sink := countOn(t, b.sinks[0])
	good := rule("good", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.9.9.1", 6000))
	b.sync(t, f, good)
	before := labtest.Held()
	try := func(rules ...flow.Flow) error {
		return b.relay.Do(func() error { return f.Sync(rules, ownAddresses) })
	}

	nowhere := rule("nowhere", b.in, "239.1.1.2", 5000, sendTo(b.out[0], "239.9.9.2", 6000))
	nowhere.In.Index = 9999
	elsewhere := rule("elsewhere", b.out[1], "239.1.1.1", 5000, sendTo(b.out[0], "239.9.9.3", 6000))
	var group *fanout.Error
	var refused *loader.RuleError
	err := try(good, elsewhere, nowhere)
	if !errors.As(err, &group) || !errors.Is(err, unix.ENODEV) || !errors.As(err, &refused) || refused.Rule != "nowhere" {
		t.Errorf("an input interface that is not there: %v", err)
	}
	faulty = true
	if err := try(good, elsewhere); !errors.Is(err, unix.EMFILE) || !errors.As(err, &refused) || refused.Rule != "elsewhere" {
		t.Errorf("no descriptors: %v", err)
	}
	bad := good
	bad.In.Group = netip.Addr{}
	if err := try(bad); !errors.As(err, &refused) {
		t.Errorf("a rule without a group: %v", err)
	}
	if after := labtest.Held(); after != before {
		t.Errorf("before %+v, after %+v", before, after)
	}
	if groups, err := f.Groups(); err != nil || len(groups) != 1 {
		t.Errorf("groups %+v, %v", groups, err)
	}
	if len(f.filter.have) != 1 {
		t.Errorf("the filter lets in %v", f.filter.have)
	}
	b.load(t, 1, 500, sink.total.Load)
	adds(t, f, "good", 500)

	faulty = false
	if err := try(good, elsewhere); err != nil {
		t.Errorf("in the end: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if err := try(good); !errors.Is(err, os.ErrClosed) {
		t.Errorf("sync after close: %v", err)
	}
}

// The path ignores rules of other paths, and opens nothing for them.
func TestOtherPaths(t *testing.T) {
	b := newBench(t, 1)
	f := b.path(t, FanoutOptions{Workers: 2})
	before := labtest.Held()
	r := rule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.9.9.1", 6000))
	for _, path := range []flow.Path{0, flow.PathKernel, flow.PathAFXDP} {
		r.Path = path
		b.sync(t, f, r)
		if after := labtest.Held(); after != before || len(f.Stats(nil)) != 0 {
			t.Errorf("path %d: before %+v, after %+v", path, before, after)
		}
	}
}

// Opening and closing leaves nothing behind, with and without traffic.
func TestOpenClose(t *testing.T) {
	b := newBench(t, 1)
	stop, done := make(chan struct{}), make(chan struct{})
	source := openSender(t, b.source, iface(t, b.source, "eth0").Index)
	go func() {
		defer close(done)
		burst := [][]byte{numbered(0, 0).Build(), numbered(0, 1).Build()}
		for {
			select {
			case <-stop:
				return
			default:
				sendFrames(t, source, burst)
				time.Sleep(100 * time.Microsecond) // the rate of the stream, which must leave the other threads a CPU
			}
		}
	}()
	r := rule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.9.9.1", 6000))
	before := labtest.Held()
	for i := range labtest.Soak(20, 100) {
		f, err := OpenFanout(FanoutOptions{Workers: 2, Blocks: 2})
		if err != nil {
			t.Fatal(err)
		}
		b.sync(t, f, r)
		if i%2 == 0 {
			b.sync(t, f)
		}
		if err := errors.Join(f.Close(), f.Close()); err != nil {
			t.Fatal(err)
		}
		if after := labtest.Held(); after != before {
			t.Fatalf("before %+v, after %+v", before, after)
		}
	}
	close(stop)
	<-done
}

// An input interface that vanishes loses only its own packets, and its rule continues
// when it is back.
func TestInputVanishes(t *testing.T) {
	b := newBench(t, 2)
	f := b.path(t, FanoutOptions{Workers: 2})
	sink := countOn(t, b.sinks[0])
	stays := rule("stays", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.9.9.1", 6000))
	goes := rule("goes", b.out[1], "239.1.1.1", 5000, sendTo(b.out[0], "239.9.9.2", 6000))
	b.sync(t, f, stays, goes)
	link, err := b.relay.Link("out1")
	if err != nil {
		t.Fatal(err)
	}
	if err := b.relay.Netlink().LinkDel(link); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "its workers have noticed", func() bool {
		groups, err := f.Groups()
		if err != nil {
			t.Fatal(err)
		}
		failures := uint64(0)
		for _, g := range groups {
			if g.Index == b.out[1].Index {
				failures = min(g.Workers[0].Failures, g.Workers[1].Failures)
			}
		}
		return failures > 0
	})
	b.load(t, 1, 500, sink.total.Load)
	adds(t, f, "stays", 500)

	labtest.Connect(t, lab.End{Host: b.relay, Name: "out1"}, lab.End{Host: b.sinks[1], Name: "eth9"})
	back := iface(t, b.relay, "out1")
	goes.In.Index, goes.In.MAC = back.Index, mac(back)
	b.sync(t, f, stays, goes)
	source := openSender(t, b.sinks[1], iface(t, b.sinks[1], "eth9").Index)
	sendFrames(t, source, [][]byte{numbered(0, 0).Build()})
	adds(t, f, "goes", 1)
}
