package forward

import (
	"bytes"
	"encoding/binary"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/flowtest"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/fanout"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
)

// bench is a relay with an input interface and output interfaces, each connected to
// a host.
type bench struct {
	source, relay *lab.Host
	sinks         []*lab.Host
	in            *net.Interface
	out           []*net.Interface
}

func newBench(t testing.TB, outputs int) *bench {
	t.Helper()
	b := &bench{source: labtest.Host(t, "src"), relay: labtest.Host(t, "rly")}
	labtest.Connect(t,
		lab.End{Host: b.source, Name: "eth0", Addrs: []string{"10.0.0.1/24", "fd00::1/64"}},
		lab.End{Host: b.relay, Name: "in", Addrs: []string{"10.0.0.2/24", "fd00::2/64"}})
	b.in = iface(t, b.relay, "in")
	for i := range outputs {
		sink := labtest.Host(t, "snk")
		b.sinks = append(b.sinks, sink)
		name := "out" + string(rune('0'+i))
		labtest.Connect(t, lab.End{Host: b.relay, Name: name}, lab.End{Host: sink, Name: "eth0"})
		b.out = append(b.out, iface(t, b.relay, name))
	}
	return b
}

func iface(t testing.TB, h *lab.Host, name string) (i *net.Interface) {
	t.Helper()
	labtest.Do(t, h, func() (err error) {
		i, err = net.InterfaceByName(name)
		return err
	})
	return i
}

func mac(i *net.Interface) (m [6]byte) {
	copy(m[:], i.HardwareAddr)
	return m
}

// path opens the path in the relay, and closes it when the test ends.
func (b *bench) path(t testing.TB, opts FanoutOptions) *Fanout {
	t.Helper()
	return b.pathWith(t, opts, nil)
}

func (b *bench) pathWith(t testing.TB, opts FanoutOptions, change func(*fanoutSystem)) *Fanout {
	t.Helper()
	if opts.Blocks == 0 {
		opts.Blocks = 32
	}
	// On a busy machine a worker may be delayed: up to 640 ms lose nothing.
	if opts.BlockTimeout == 0 {
		opts.BlockTimeout = 20 * time.Millisecond
	}
	opts.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	var f *Fanout
	labtest.Do(t, b.relay, func() (err error) {
		f, err = OpenFanout(opts)
		return err
	})
	if change != nil {
		change(&f.system)
	}
	t.Cleanup(func() {
		if t.Failed() {
			groups, err := f.Groups()
			t.Logf("%+v, %v", groups, err)
			t.Logf("%+v", f.Stats(nil))
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// sync is Sync in the relay.
func (b *bench) sync(t testing.TB, f *Fanout, rules ...flow.Flow) {
	t.Helper()
	labtest.Do(t, b.relay, func() error { return f.Sync(rules, ownAddresses) })
}

var ownAddresses = flowtest.OwnAddresses()

// rule makes a rule from a group and port of an input to outputs.
func rule(name string, in *net.Interface, group string, port uint16, out ...flow.Output) flow.Flow {
	return flow.Flow{
		Name: name, Path: flow.PathFanout, Out: out,
		In: flow.Input{Index: in.Index, MAC: mac(in), Group: netip.MustParseAddr(group), Port: port},
	}
}

// sendTo makes an output to a group and port on an interface, from an address of ours.
func sendTo(out *net.Interface, group string, port uint16) flow.Output {
	dst := netip.MustParseAddr(group)
	src := netip.MustParseAddr("192.0.2.1")
	if dst.Is6() {
		src = netip.MustParseAddr("2001:db8::1")
	}
	return flow.Output{
		Ready: true, Index: out.Index, MTU: int32(out.MTU),
		Rewrite: packet.Rewrite{
			DstMAC: packet.MulticastMAC(dst), SrcMAC: mac(out), Dst: dst, Src: src, DstPort: port,
			TTLMode: packet.TTLDecrement,
		},
	}
}

// numbered is a UDP frame of stream to 239.1.1.1, numbered in its payload.
func numbered(stream, number int) packet.Frame {
	payload := binary.BigEndian.AppendUint32(nil, uint32(stream))
	payload = binary.BigEndian.AppendUint32(payload, uint32(number))
	dst := netip.MustParseAddr("239.1.1.1")
	return packet.Frame{
		DstMAC: packet.MulticastMAC(dst), SrcMAC: [6]byte{2, 0, 0, 0, 0, 9},
		Src: netip.MustParseAddr("10.0.0.1"), Dst: dst,
		SrcPort: uint16(4000 + stream), DstPort: 5000, TTL: 8, Payload: append(payload, "testing testing"...),
	}
}

// number reads back what numbered wrote.
func number(data []byte) (stream, number int, ok bool) {
	h, ok := packet.Parse(data)
	if !ok || h.UDP == 0 || len(data) < h.UDP+16 {
		return 0, 0, false
	}
	payload := data[h.UDP+8:]
	return int(binary.BigEndian.Uint32(payload)), int(binary.BigEndian.Uint32(payload[4:])), true
}

// expect returns the copy that an output makes of a frame.
func expect(t testing.TB, o flow.Output, frame []byte) []byte {
	t.Helper()
	h, ok := packet.Parse(frame)
	if !ok {
		t.Fatalf("frame %x does not parse", frame)
	}
	want, outcome := o.Append(nil, frame, &h)
	if outcome != packet.Rewritten {
		t.Fatalf("frame %x: outcome %v", frame, outcome)
	}
	return append(want, frame[h.Payload:]...)
}

func isUDP(frame []byte) bool {
	_, ok := packet.Parse(frame)
	return ok
}

// adds checks that every packet of a rule is accounted for once per output, after the
// engines are idle.
func adds(t testing.TB, f *Fanout, name string, matched uint64) loader.RuleStats {
	t.Helper()
	var s loader.RuleStats
	labtest.Eventually(t, "the packets have been counted", func() bool {
		all := f.Stats([]string{name})
		if len(all) != 1 {
			t.Fatalf("%d rules have counters", len(all))
		}
		s = all[0]
		for i := range s.Outputs {
			if accounted(&s, i) != s.Matched {
				return false
			}
		}
		return s.Matched.Packets >= matched
	})
	if s.Matched.Packets != matched {
		t.Fatalf("%d packets matched, want %d", s.Matched.Packets, matched)
	}
	return s
}

// accounted returns how many packets of a rule are accounted for at one output.
func accounted(s *loader.RuleStats, slot int) (sum loader.Counter) {
	add := func(c loader.Counter) {
		sum.Packets += c.Packets
		sum.Bytes += c.Bytes
	}
	add(s.Outputs[slot].Sent)
	for _, c := range s.Drops {
		add(c)
	}
	for _, c := range s.Outputs[slot].Drops {
		add(c)
	}
	return sum
}

func openSender(t testing.TB, h *lab.Host, index int) *fanout.Sender {
	t.Helper()
	var s *fanout.Sender
	labtest.Do(t, h, func() (err error) {
		s, err = fanout.OpenSender(index, fanout.SenderOptions{})
		return err
	})
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// sendFrames sends them all.
func sendFrames(t testing.TB, s *fanout.Sender, frames [][]byte) {
	t.Helper()
	packets := make([]fanout.Packet, len(frames))
	for i, f := range frames {
		packets[i].Header = f
	}
	for len(packets) > 0 {
		n, err := s.Send(packets)
		packets = packets[n:]
		if err != nil && err != unix.EAGAIN && err != unix.ENOBUFS {
			t.Fatalf("send: %v", err)
		}
	}
}

// receive reads as many frames from the kernel's tap as are wanted, restores the tags
// that the kernel removed, and compares them.
func receive(t testing.TB, c *catcher, want [][]byte) {
	t.Helper()
	got := c.frames(t, len(want))
	for i := range want {
		if !bytes.Equal(got[i], want[i]) {
			t.Fatalf("frame %d:\n got  %x\n want %x", i, got[i], want[i])
		}
	}
}

// catcher captures the UDP frames that arrive on an interface.
type catcher struct {
	group *fanout.Group
}

func catch(t testing.TB, h *lab.Host, ifname string) *catcher {
	t.Helper()
	c := &catcher{}
	labtest.Do(t, h, func() (err error) {
		i, err := net.InterfaceByName(ifname)
		if err != nil {
			return err
		}
		c.group, err = fanout.Open(fanout.Options{Interface: ifname, Index: i.Index, BlockTimeout: 20 * time.Millisecond})
		return err
	})
	t.Cleanup(func() {
		if t.Failed() {
			stats, err := c.group.Stats()
			t.Logf("%s/%s: %+v, %v", h.Name, ifname, stats, err)
		}
		if err := c.group.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// frames returns the next n.
func (c *catcher) frames(t testing.TB, n int) (all [][]byte) {
	t.Helper()
	w := c.group.Workers()[0]
	defer time.AfterFunc(labtest.Timeout, w.Wake).Stop()
	for len(all) < n {
		block, err := w.Wait()
		if err != nil {
			t.Fatalf("%d of %d frames arrived: %v", len(all), n, err)
		}
		var f fanout.Frame
		for block.Next(&f) {
			f.RestoreVLAN()
			if isUDP(f.Data) {
				all = append(all, bytes.Clone(f.Data))
			}
		}
		block.Release()
	}
	if len(all) > n {
		t.Fatalf("%d frames arrived, want %d", len(all), n)
	}
	return all
}

// pointers returns rules in the form that the loader takes.
func pointers(rules []flow.Flow) []*flow.Flow {
	all := make([]*flow.Flow, len(rules))
	for i, r := range rules {
		all[i] = &r // a copy: tests change theirs later
	}
	return all
}
