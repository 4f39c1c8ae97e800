package loader

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/vishvananda/netlink"

	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// transmitDrops is the number of frames that an output's device did not take.
func transmitDrops(t testing.TB, l *Loader, i *net.Interface) (n uint64) {
	t.Helper()
	for _, p := range globalStats(t, l).Devices {
		if p.Index == i.Index {
			n += p.TransmitDrops
		}
	}
	return n
}

// What the egress program drops from a bulk is counted only for its reason, not as frames that the
// device did not take.
func TestEgressDropsAreNotTheDevice(t *testing.T) {
	t.Parallel()
	const frames = 100
	n := newLab(t, 1)
	l := open(t, testOptions(t))
	attachAll(t, l, n.in, n.out[0])
	policed, low, fine := output(n.out[0], "239.2.2.1", "10.1.0.1", 6000), output(n.out[0], "239.2.2.2", "10.1.0.1", 6000), output(n.out[0], "239.2.2.3", "10.1.0.1", 6000)
	policed.Rate = flow.Rate{Packets: 1, Burst: 1}
	low.MinTTL = 200
	sync1(t, l, flow.Flow{Name: "r", In: input(n.in, "239.1.1.1", "", 5000), Out: []flow.Output{policed, low, fine}})
	source, sink := labtest.NewTap(t, n.source, "eth0"), labtest.NewTap(t, n.sinks[0], "eth0")
	for range frames {
		source.Send(sourceFrame(n, "239.1.1.1", 5000, []byte("payload")).Build())
	}
	s := statsOf(t, l, "r")
	labtest.Eventually(t, "all have been counted", func() bool {
		s = statsOf(t, l, "r")
		return s.Outputs[2].Sent.Packets == frames
	})
	sumRule(t, s)
	if s.Outputs[0].Drops[Policed].Packets == 0 || s.Outputs[1].Drops[TTL].Packets != frames {
		t.Errorf("%+v: want policed ones, and all below the TTL", s.Outputs)
	}
	if got := transmitDrops(t, l, n.out[0]); got != 0 {
		t.Errorf("%d frames are said to be the device's fault, want none", got)
	}
	sink.Collect(int(s.Outputs[0].Sent.Packets)+frames, isUDP)
	// Drops by the device are still reported.
	labtest.Do(t, n.sinks[0], func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkSetMTU(link, 1000)
	})
	source.Send(sourceFrame(n, "239.1.1.1", 5000, make([]byte, 1200)).Build())
	labtest.Eventually(t, "the device's drop is counted", func() bool { return transmitDrops(t, l, n.out[0]) > 0 })
}

// A restart that finds only some of the counting links must not attach all of them again.
func TestLinksThatCountAreAttachedOnce(t *testing.T) {
	t.Parallel()
	const frames = 5
	n := newLab(t, 1)
	opts := testOptions(t)
	l := open(t, opts)
	closeLoader(t, l)
	if err := os.Remove(filepath.Join(opts.PinDir, linksDir, pinCPUThread)); err != nil {
		t.Fatal(err)
	}
	l = open(t, opts)
	if len(l.transmit) != 4 {
		t.Errorf("%d links, want 4", len(l.transmit))
	}
	attachAll(t, l, n.in, n.out[0])
	sync1(t, l, flow.Flow{Name: "one", In: input(n.in, "239.1.1.1", "", 5000), Out: []flow.Output{output(n.out[0], "239.2.2.2", "10.1.0.1", 6000)}})
	labtest.Do(t, n.sinks[0], func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkSetMTU(link, 1000)
	})
	source := labtest.NewTap(t, n.source, "eth0")
	for range frames {
		source.Send(sourceFrame(n, "239.1.1.1", 5000, make([]byte, 1200)).Build())
	}
	labtest.Eventually(t, "the drops are counted", func() bool { return transmitDrops(t, l, n.out[0]) >= frames })
	if got := transmitDrops(t, l, n.out[0]); got != frames {
		t.Errorf("%d drops counted, want %d", got, frames)
	}
}

// A copy that is too long with its tags, or with bytes after the packet, is dropped at once for the
// reason mtu, and drops no frame of another rule with it.
func TestTooLongWithTags(t *testing.T) {
	t.Parallel()
	const frames = 50
	pushed := func(o flow.Output, outer, id uint16) flow.Output {
		o.VLAN, o.OuterVLAN, o.VLANID = packet.VLANSet, outer, id
		return o
	}
	full := func(f *packet.Frame) { f.Payload = make([]byte, 1472) }
	for _, c := range []struct {
		name  string
		out   func(flow.Output) flow.Output
		in    func(*flow.Input)
		frame func(*packet.Frame)
		sent  bool
	}{
		{name: "two tags pushed", out: func(o flow.Output) flow.Output { return pushed(o, 20, 200) }, frame: full},
		{name: "two tags pushed, just fits", out: func(o flow.Output) flow.Output { return pushed(o, 20, 200) }, frame: func(f *packet.Frame) { f.Payload = make([]byte, 1468) }, sent: true},
		{name: "one tag pushed", out: func(o flow.Output) flow.Output { return pushed(o, 0, 200) }, frame: full, sent: true},
		{name: "two tags kept", in: func(in *flow.Input) { in.OuterVLAN, in.VLAN = 10, 100 }, frame: func(f *packet.Frame) { full(f); f.VLANs = []uint16{10, 100} }},
		{name: "one tag kept", in: func(in *flow.Input) { in.VLAN = 100 }, frame: func(f *packet.Frame) { full(f); f.VLANs = []uint16{100} }, sent: true},
		{name: "bytes behind the packet", frame: func(f *packet.Frame) { full(f); f.Padding = 5 }},
		{name: "few bytes behind the packet", frame: func(f *packet.Frame) { full(f); f.Padding = 4 }, sent: true},
	} {
		for _, outputs := range []int{1, 2} {
			t.Run(c.name, func(t *testing.T) {
				n := newLab(t, 1)
				setLink(t, n.in, func(lk netlink.Link) error { return netlink.LinkSetMTU(lk, 1600) })
				lk, err := n.source.Link("eth0")
				if err == nil {
					err = n.source.Netlink().LinkSetMTU(lk, 1600)
				}
				if err != nil {
					t.Fatal(err)
				}
				l := open(t, testOptions(t))
				attachAll(t, l, n.in, n.out[0])
				r := flow.Flow{Name: "long", In: input(n.in, "239.1.1.1", "", 5000)}
				if c.in != nil {
					c.in(&r.In)
				}
				for i := range outputs {
					o := output(n.out[0], netip.AddrFrom4([4]byte{239, 2, 2, byte(i)}).String(), "10.1.0.1", 6000)
					if c.out != nil {
						o = c.out(o)
					}
					r.Out = append(r.Out, o)
				}
				sync1(t, l, r, flow.Flow{Name: "other", In: input(n.in, "239.1.1.2", "", 5000), Out: []flow.Output{output(n.out[0], "239.2.3.1", "10.1.0.1", 6000)}})
				source, sink := labtest.NewTap(t, n.source, "eth0"), labtest.NewTap(t, n.sinks[0], "eth0")
				long, other := sourceFrame(n, "239.1.1.1", 5000, nil), sourceFrame(n, "239.1.1.2", 5000, []byte("other")).Build()
				c.frame(&long)
				var all [][]byte
				for range frames {
					all = append(all, long.Build(), other)
				}
				for _, f := range all {
					source.Send(f)
				}
				want := frames
				if c.sent {
					want += frames * outputs
				}
				sink.Collect(want, func(f []byte) bool { h, ok := packet.Parse(f); return ok && h.UDP != 0 })
				s := statsOf(t, l, "long")
				sumRule(t, s)
				for slot, o := range s.Outputs {
					if c.sent != (o.Sent.Packets == frames) || c.sent != (o.Drops[MTU].Packets == 0) || len(o.Drops) > 1 {
						t.Errorf("output %d: sent %v, dropped %v; want all sent: %v", slot, o.Sent, o.Drops, c.sent)
					}
				}
				if s := statsOf(t, l, "other"); s.Outputs[0].Sent.Packets != frames {
					t.Errorf("other: %+v", s)
				}
				if got := transmitDrops(t, l, n.out[0]); got != 0 {
					t.Errorf("the device did not take %d frames", got)
				}
			})
		}
	}
}

// Fragments of two merged senders may have the same identification by chance or by design: on
// output each datagram has its own, the same in all of its fragments.
func TestMergedFragments(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 2)
	for outputs := 1; outputs <= 2; outputs++ {
		rule := flow.Flow{Name: "merged", In: input(n.in, "239.1.1.1", "", 5000)}
		for i := range outputs {
			rule.Out = append(rule.Out, output(n.out[i], "239.2.2.2", "10.1.0.1", 6000))
		}
		sync1(t, r.l, rule)
		numbers := map[uint16]string{}
		for _, sender := range []string{"192.168.7.7", "192.168.7.8", "10.9.9.9"} {
			f := sourceFrame(n, "239.1.1.1", 5000, make([]byte, 600))
			f.Src = netip.MustParseAddr(sender)
			for i, part := range packet.Fragment(f.Build(), 77, 256) {
				for _, sent := range r.run(t, n.in.Index, part, len(part)).copies {
					h, ok := packet.Parse(sent)
					if ip, _ := packet.Checksums(sent, &h); !ok || !ip {
						t.Errorf("%s, fragment %d: %x", sender, i, sent)
					}
					number := binary.BigEndian.Uint16(sent[atIP+4:])
					if other, taken := numbers[number]; taken && other != sender {
						t.Errorf("%d outputs: fragments of %s and %s have the number %d", outputs, sender, other, number)
					}
					numbers[number] = sender
				}
			}
		}
		if len(numbers) != 3 {
			t.Errorf("%d outputs: numbers %v, want one for each sender", outputs, numbers)
		}
	}
}

// Packets that a rule would take but cannot, or takes without a complete checksum, are noted by
// rule.
func TestNotes(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 2)
	rule := flow.Flow{Name: "r", In: input(n.in, "239.1.1.1", "", 5000), Out: []flow.Output{output(n.out[0], "239.2.2.2", "10.1.0.1", 6000)}, Finish: true}
	six := flow.Flow{Name: "six", In: input(n.in, "ff3e::1", "", 5000), Out: []flow.Output{output(n.out[0], "ff3e::2", "fd00::1", 6000), output(n.out[1], "ff3e::3", "fd00::1", 6000)}, Finish: true}
	sync1(t, r.l, rule, six)
	whole := sourceFrame(n, "239.1.1.1", 5000, []byte("an odd payload.")).Build()
	frame6 := sourceFrame(n, "239.1.1.1", 5000, bytes.Repeat([]byte("payload"), 100))
	frame6.Dst, frame6.Src = netip.MustParseAddr("ff3e::1"), netip.MustParseAddr("2001:db8::7")
	frame6.DstMAC = packet.MulticastMAC(frame6.Dst)
	note := func(rule string, note Note) uint64 {
		t.Helper()
		s := statsOf(t, r.l, rule)
		sumRule(t, s)
		return s.Notes[note].Packets
	}
	t.Run("malformed", func(t *testing.T) {
		r.enter(t)
		for i, bad := range [][]byte{
			put16(bytes.Clone(whole), atUDP+4, 2000), // the datagram ends after the packet
			put16(bytes.Clone(whole), atUDP+4, 7),    // shorter than its header
			whole[:len(whole)-3],                     // cut short
		} {
			if got := r.run(t, n.in.Index, bad, len(bad)); got.verdict != xdpPass {
				t.Errorf("frame %d: verdict %d, want it to pass", i, got.verdict)
			}
			if got := note("r", Malformed); got != uint64(i+1) {
				t.Errorf("frame %d: %d noted", i, got)
			}
			if _, ok := packet.Malformed(bad); !ok {
				t.Errorf("frame %d: the twin does not call it malformed", i)
			}
			if _, ok := packet.Parse(bad); ok {
				t.Errorf("frame %d: the twin takes it", i)
			}
		}
		other := put16(sourceFrame(n, "239.1.1.9", 5000, nil).Build(), atUDP+4, 2000)
		r.run(t, n.in.Index, other, len(other))
		if got := note("r", Malformed); got != 3 {
			t.Errorf("%d noted after one of no rule", got)
		}
	})
	t.Run("last fragment first", func(t *testing.T) {
		r.enter(t)
		f := sourceFrame(n, "239.1.1.1", 5000, make([]byte, 1000))
		parts := packet.Fragment(f.Build(), 900, 256)
		for i := len(parts) - 1; i >= 0; i-- {
			r.run(t, n.in.Index, parts[i], len(parts[i]))
		}
		if got := note("r", OrphanFragment); got != uint64(len(parts)-1) {
			t.Errorf("%d fragments noted, want %d", got, len(parts)-1)
		}
	})
	t.Run("unfinished checksum", func(t *testing.T) {
		r.enter(t)
		noted := map[string]uint64{}
		random := rand.New(rand.NewPCG(1, 2))
		for _, length := range []int{0, 1, 2, 3, 7, 8, 9, 15, 16, 239, 240, 247, 248, 249, 255, 256, 257, 503, 504, 505, 700, 1023, 1024, 1025, 1399, 1400, 1471, 1472} {
			payload := make([]byte, length)
			for i := range payload {
				payload[i] = byte(random.Uint32())
			}
			f4, f6 := sourceFrame(n, "239.1.1.1", 5000, payload), frame6
			f6.Payload = payload[:min(length, 1452)]
			for _, c := range []struct {
				rule  string
				frame []byte
			}{{"r", f4.Build()}, {"six", f6.Build()}} {
				name := fmt.Sprintf("%s, %d bytes", c.rule, length)
				unfinished := unfinish(c.frame)
				got, want := r.run(t, n.in.Index, unfinished, len(unfinished)), r.run(t, n.in.Index, c.frame, len(c.frame))
				if !bytes.Equal(got.frame[12:], want.frame[12:]) { // after the handover
					t.Errorf("%s: sent\n%x, want\n%x", name, got.frame, want.frame)
				}
				for slot := range want.copies {
					if !bytes.Equal(got.copies[slot], want.copies[slot]) {
						t.Errorf("%s, output %d: sent\n%x, want\n%x", name, slot, got.copies[slot], want.copies[slot])
					}
				}
				noted[c.rule]++
				if got := note(c.rule, UnfinishedChecksum); got != noted[c.rule] {
					t.Errorf("%s: %d noted, want the %d unfinished ones", name, got, noted[c.rule])
				}
				twin := bytes.Clone(unfinished)
				if h, _ := packet.Parse(twin); !packet.FinishChecksum(twin, &h) || !bytes.Equal(twin, c.frame) {
					t.Errorf("%s: the twin makes\n%x, want\n%x", name, twin, c.frame)
				}
			}
		}
	})
	t.Run("finished checksum that looks unfinished", func(t *testing.T) {
		r.enter(t)
		before := note("r", UnfinishedChecksum)
		var frame []byte
		for i := range 0x10000 {
			frame = sourceFrame(n, "239.1.1.1", 5000, []byte{byte(i >> 8), byte(i)}).Build()
			if bytes.Equal(unfinish(frame), frame) {
				break
			}
		}
		if !bytes.Equal(unfinish(frame), frame) {
			t.Fatal("there is no such payload")
		}
		r.run(t, n.in.Index, frame, len(frame))
		if got := note("r", UnfinishedChecksum); got != before {
			t.Errorf("%d noted", got-before)
		}
		if h, _ := packet.Parse(frame); packet.FinishChecksum(frame, &h) {
			t.Error("the twin says that it has finished it")
		}
	})
}

// unfinish returns a frame whose sender leaves the UDP checksum to a device: the field holds the
// sum of the pseudo header.
func unfinish(frame []byte) []byte {
	h, _ := packet.Parse(frame)
	sum := uint32(17) + uint32(binary.BigEndian.Uint16(frame[h.UDP+4:]))
	for _, addr := range []netip.Addr{h.Src, h.Dst} {
		for b := addr.AsSlice(); len(b) > 0; b = b[2:] {
			sum += uint32(binary.BigEndian.Uint16(b))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return put16(bytes.Clone(frame), h.UDP+6, uint16(sum))
}

// Broadcast datagrams that no rule takes pass, and are counted; those that a rule takes, and
// packets that are not UDP or not broadcast, are not.
func TestPassedBroadcast(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 1)
	in := input(n.in, "255.255.255.255", "", 9)
	sync1(t, r.l, flow.Flow{Name: "r", In: in, Broadcast: true, Out: []flow.Output{output(n.out[0], "239.2.2.2", "10.9.9.9", 6000)}})
	broadcast := func(dst string, port uint16) packet.Frame {
		f := sourceFrame(n, "239.1.1.1", port, []byte("x"))
		f.Dst, f.DstMAC = netip.MustParseAddr(dst), packet.BroadcastMAC
		return f
	}
	group := sourceFrame(n, "239.9.9.9", 9, []byte("x"))
	other := broadcast("255.255.255.255", 9)
	notUDP := other.Build()
	notUDP[23] = 17 + 1
	for _, c := range []struct {
		frame []byte
		want  Counter
	}{
		{func() []byte { f := broadcast("255.255.255.255", 9); return f.Build() }(), Counter{}},
		{func() []byte { f := broadcast("255.255.255.255", 67); return f.Build() }(), Counter{Packets: 1, Bytes: 43}},
		{func() []byte { f := broadcast("10.1.0.255", 9); return f.Build() }(), Counter{Packets: 1, Bytes: 43}},
		{group.Build(), Counter{}},
		{notUDP, Counter{}},
	} {
		before := globalStats(t, r.l).PassedBroadcast
		r.run(t, n.in.Index, c.frame, len(c.frame))
		got := globalStats(t, r.l).PassedBroadcast
		if got.Packets-before.Packets != c.want.Packets || got.Bytes-before.Bytes != c.want.Bytes {
			t.Errorf("frame %x: counted %+v, before %+v, want %+v more", c.frame, got, before, c.want)
		}
	}
}
