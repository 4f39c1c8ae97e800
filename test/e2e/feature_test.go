package e2e_test

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	host "xdpcast/internal/network"
	"xdpcast/internal/traffic"
	"xdpcast/pkg/packet"
)

// featureCase is one rule, the frame that arrives, and those that must leave, byte for byte.
type featureCase struct {
	name string
	in   string
	out  []string
	// frame changes the arriving frame: from 10.1.0.2:4000 to 239.1.1.1:5000.
	frame func(f *packet.Frame)
	// want changes, for each output, the arriving frame into the one that leaves. The MAC addresses
	// are filled in.
	want []func(f *packet.Frame)
	// drop is the reason why the first output sends nothing.
	drop string
	path string // overrides the path of the test
}

func (c featureCase) run(t *testing.T, n *network, in *instance, path, name string) {
	if c.in == "" {
		c.in = "239.1.1.1:5000%in0"
	}
	if c.path != "" {
		path = c.path
	}
	if path == "kernel" { // the command passes the texts on, whatever the path: the others use the API
		args := []string{"rule", "add", name, "--path", path, "--in", c.in}
		for _, o := range c.out {
			args = append(args, "--out", o)
		}
		in.mustCLI(args...)
		defer in.mustCLI("rule", "del", name)
	} else {
		addPath(in, path, name, c.in, c.out...)
		defer in.delete(name)
	}
	in.waitState(name, "active")

	frame := n.frame(t, "239.1.1.1")
	// The loop guard marks copies of packets it has seen before: no case repeats another's payload.
	frame.Payload = fmt.Appendf(frame.Payload, " %-7s", name)
	if c.frame != nil {
		c.frame(&frame)
	}
	if frame.DstMAC == ([6]byte{}) {
		frame.DstMAC = packet.MulticastMAC(frame.Dst)
	}
	source := labtest.NewTap(t, n.source, "src0")
	taps := n.taps(t, c.out)
	source.Send(frame.Build())
	if c.drop != "" {
		eventually(t, "the drop is counted", func() string {
			s := in.rule(name)
			for _, d := range append(s.Drops, s.Outputs[0].Drops...) {
				if d.Reason == c.drop && d.Packets == 1 {
					return ""
				}
			}
			return fmt.Sprintf("%+v", s)
		})
		return
	}
	n.compare(t, frame, taps, c.out, c.want)
	eventually(t, "every copy is counted", func() string {
		s := in.rule(name)
		for _, o := range s.Outputs {
			if s.Matched.Packets != 1 || o.Sent.Packets != 1 || len(o.Drops) != 0 {
				return fmt.Sprintf("%+v", s)
			}
		}
		return ""
	})
}

// frame is what arrives, without its destination MAC address.
func (n *network) frame(t *testing.T, group string) packet.Frame {
	t.Helper()
	return packet.Frame{
		SrcMAC: macOf(t, n.source, "src0"),
		Src:    netip.MustParseAddr("10.1.0.2"), Dst: netip.MustParseAddr(group), SrcPort: 4000, DstPort: 5000,
		TTL: 16, TOS: 0x2e<<2 | 1, Payload: []byte("a payload of odd length"),
	}
}

// compare waits for one frame at each output, in their order, and compares it byte for byte. want
// changes the arriving frame; the MAC addresses are filled in.
func (n *network) compare(t *testing.T, frame packet.Frame, taps map[string]*labtest.Tap, out []string, want []func(f *packet.Frame)) {
	t.Helper()
	for slot, edit := range want {
		want := frame
		ifname := outputInterface(out[slot])
		want.SrcMAC = macOf(t, n.relay, ifname)
		want.Src, want.DstMAC = n.firstAddr(t, ifname, frame.Dst.Is4()), [6]byte{}
		edit(&want)
		if want.DstMAC == ([6]byte{}) {
			want.DstMAC = packet.MulticastMAC(want.Dst)
		}
		if want.Src == ofTheLink {
			want.Src = linkLocal(t, n.relay, ifname)
		}
		if got, want := taps[ifname].Collect(1, isUDP)[0], want.Build(); !bytes.Equal(got, want) {
			t.Errorf("output %d:\n got  %x\n want %x", slot, got, want)
		}
	}
}

func outputInterface(out string) string {
	_, rest, _ := strings.Cut(out, "%")
	name, _, _ := strings.Cut(rest, ",")
	return name
}

// taps listens at the far ends of the outputs.
func (n *network) taps(t *testing.T, outs []string) map[string]*labtest.Tap {
	t.Helper()
	taps := map[string]*labtest.Tap{}
	for _, o := range outs {
		name := outputInterface(o)
		if taps[name] != nil {
			continue
		}
		switch name {
		case "in0":
			taps[name] = labtest.NewTap(t, n.source, "src0")
		default:
			taps[name] = labtest.NewTap(t, n.sinks[name[3]-'0'], "sink0")
		}
	}
	return taps
}

func isUDP(frame []byte) bool {
	_, ok := packet.Parse(frame)
	return ok
}

// firstAddr is the source address for src=iface.
func (n *network) firstAddr(t *testing.T, ifname string, is4 bool) netip.Addr {
	t.Helper()
	var first netip.Addr
	labtest.Do(t, n.relay, func() error {
		i, err := net.InterfaceByName(ifname)
		if err != nil {
			return err
		}
		addrs, err := i.Addrs()
		for _, a := range addrs {
			p, _ := netip.ParsePrefix(a.String())
			if p.Addr().Is4() == is4 && !p.Addr().IsLinkLocalUnicast() && !first.IsValid() {
				first = p.Addr()
			}
		}
		return err
	})
	return first
}

// addIPv6 gives the links of the network IPv6 addresses.
func (n *network) addIPv6(t *testing.T) {
	t.Helper()
	for _, a := range []struct {
		host       *lab.Host
		name, cidr string
	}{
		{n.relay, "in0", "fd00:1::1/64"}, {n.source, "src0", "fd00:1::2/64"},
		{n.relay, "out0", "fd00:20::1/64"}, {n.sinks[0], "sink0", "fd00:20::2/64"},
		{n.relay, "out1", "fd00:21::1/64"}, {n.sinks[1], "sink0", "fd00:21::2/64"},
		{n.relay, "out2", "fd00:22::1/64"}, {n.sinks[2], "sink0", "fd00:22::2/64"},
	} {
		if err := a.host.AddAddr(a.name, a.cidr); err != nil {
			t.Fatal(err)
		}
	}
}

func dst(addr string, port uint16, more ...func(f *packet.Frame)) func(f *packet.Frame) {
	return func(f *packet.Frame) {
		f.Dst, f.DstPort = netip.MustParseAddr(addr), port
		for _, m := range more {
			m(f)
		}
	}
}

func tags(tci ...uint16) func(f *packet.Frame) { return func(f *packet.Frame) { f.VLANs = tci } }

func from(addr string) func(f *packet.Frame) {
	return func(f *packet.Frame) { f.Src = netip.MustParseAddr(addr) }
}

// v6 is the default frame over IPv6.
func v6(more ...func(f *packet.Frame)) func(f *packet.Frame) {
	return func(f *packet.Frame) {
		f.Src, f.Dst = netip.MustParseAddr("fd00:1::2"), netip.MustParseAddr("ff3e:0:0:1::7")
		for _, m := range more {
			m(f)
		}
	}
}

// features must work alike on every path.
var features = []featureCase{
	{name: "one output", out: []string{"239.2.2.2:6000%out0"}, want: []func(f *packet.Frame){dst("239.2.2.2", 6000)}},
	{name: "everything kept", out: []string{"239.2.2.2%out0,src=keep"}, want: []func(f *packet.Frame){dst("239.2.2.2", 5000, from("10.1.0.2"))}},
	{name: "policies", out: []string{"239.2.2.2:6000%out0,src=10.9.9.9:77,ttl=dec,dscp=af41,csum=zero"}, want: []func(f *packet.Frame){
		dst("239.2.2.2", 6000, from("10.9.9.9"), func(f *packet.Frame) { f.SrcPort, f.TTL, f.TOS, f.NoChecksum = 77, 15, 34<<2|1, true })}},
	{name: "four outputs", out: []string{"239.2.2.2:6000%out0", "239.2.2.3:6001%out1,ttl=3", "239.2.2.4:6002%out2,src=keep", "239.2.2.5:6003%out0,dscp=be"}, want: []func(f *packet.Frame){
		dst("239.2.2.2", 6000), dst("239.2.2.3", 6001, func(f *packet.Frame) { f.TTL = 3 }), dst("239.2.2.4", 6002, from("10.1.0.2")), dst("239.2.2.5", 6003, func(f *packet.Frame) { f.TOS = 1 })}},
	{name: "any port, port shifted", in: "239.1.1.1%in0", out: []string{"239.2.2.2:+1000%out0"}, want: []func(f *packet.Frame){dst("239.2.2.2", 6000)}},
	{name: "prefix to prefix", in: "239.1.0.0/16%in0,join=239.1.1.1", out: []string{"239.101.0.0/16%out0", "239.102.0.0/16:-1000%out1"},
		want: []func(f *packet.Frame){dst("239.101.1.1", 5000), dst("239.102.1.1", 4000)}},
	{name: "ttl too low", out: []string{"239.2.2.2:6000%out0,minttl=17"}, drop: "ttl"},
	{name: "ttl high enough", out: []string{"239.2.2.2:6000%out0,minttl=16"}, want: []func(f *packet.Frame){dst("239.2.2.2", 6000)}},
	{name: "push", out: []string{"239.2.2.2:6000%out0,vlan=100,pcp=5"}, want: []func(f *packet.Frame){dst("239.2.2.2", 6000, tags(0xa064))}},
	{name: "rewrite, pop and keep", in: "239.1.1.1:5000%in0,vlan=7", frame: tags(0x6007), out: []string{"239.2.2.2:6000%out0,vlan=8", "239.2.2.3:6000%out1,vlan=pop", "239.2.2.4:6000%out2"},
		want: []func(f *packet.Frame){dst("239.2.2.2", 6000, tags(0x6008)), dst("239.2.2.3", 6000, tags()), dst("239.2.2.4", 6000, tags(0x6007))}},
	{name: "pop two tags", in: "239.1.1.1:5000%in0,vlan=9.7", frame: tags(9, 7), out: []string{"239.2.2.2:6000%out0,vlan=pop"}, want: []func(f *packet.Frame){dst("239.2.2.2", 6000, tags())}},
	{name: "hairpin", out: []string{"239.2.2.2:6000%in0"}, want: []func(f *packet.Frame){dst("239.2.2.2", 6000)}},
	{name: "policed", out: []string{"239.2.2.2:6000%out0,rate=1000bit,burst=1"}, drop: "policed"},
	{name: "own address", frame: from("10.2.1.1"), out: []string{"239.2.2.2:6000%out0"}, drop: "loop"},
	{name: "own address, allowed", in: "239.1.1.1:5000%in0,loop=allow", frame: from("10.2.1.1"), out: []string{"239.2.2.2:6000%out0"}, want: []func(f *packet.Frame){dst("239.2.2.2", 6000)}},

	{name: "ipv6", in: "fd00:1::2@[ff3e:0:0:1::7]:5000%in0", frame: v6(), out: []string{"[ff3e::2]:6000%out0", "[ff0e::3]:6000%out1,src=keep,ttl=9,dscp=ef"}, want: []func(f *packet.Frame){
		dst("ff3e::2", 6000), dst("ff0e::3", 6000, from("fd00:1::2"), func(f *packet.Frame) { f.TTL, f.TOS = 9, 46<<2|1 })}},
	{name: "ipv6, prefix, any port, options", in: "fd00:1::2@[ff3e:0:0:1::]/64%in0,join=none", frame: v6(func(f *packet.Frame) { f.Extensions = []byte{17, 0, 1, 4, 0, 0, 0, 0} }), out: []string{"[ff38:0:0:2::]/64%out0"},
		want: []func(f *packet.Frame){dst("ff38:0:0:2::7", 5000)}},
	{name: "ipv6, no checksum", in: "fd00:1::2@[ff3e:0:0:1::7]:5000%in0", frame: v6(func(f *packet.Frame) { f.NoChecksum = true }), out: []string{"[ff3e::2]:6000%out0"}, drop: "no_checksum"},
	{name: "ipv6, no checksum, allowed", in: "fd00:1::2@[ff3e:0:0:1::7]:5000%in0,csum=any", frame: v6(func(f *packet.Frame) { f.NoChecksum = true }), out: []string{"[ff3e::2]:6000%out0"}, want: []func(f *packet.Frame){dst("ff3e::2", 6000)}},
	{name: "ipv6, vlan in a vlan", in: "fd00:1::2@[ff3e:0:0:1::7]:5000%in0,vlan=9.7", frame: v6(tags(9, 7)), out: []string{"[ff3e::2]:6000%out0,vlan=8"}, want: []func(f *packet.Frame){dst("ff3e::2", 6000, tags(8))}},
}

// TestFeatures: every feature of rules, over real interfaces.
func TestFeatures(t *testing.T) {
	t.Parallel()
	onPaths(t, func(t *testing.T, n *network, in *instance, path string) { runFeatures(t, features, n, in, path) })
}

// onPaths runs a test on every path, one after the other with the same relay, which is without rules for each.
func onPaths(t *testing.T, run func(t *testing.T, n *network, in *instance, path string)) {
	t.Helper()
	n := newNetwork(t)
	n.addIPv6(t)
	in := newInstance(t, n.relay)
	in.start()
	for _, path := range paths {
		t.Run(path, func(t *testing.T) {
			n, in := *n, *in
			n.t, in.t = t, t
			defer func() {
				if _, err := in.client.Apply(t.Context(), nil, control.ApplyOptions{}); err != nil {
					t.Errorf("remove the rules: %v", err)
				}
			}()
			run(t, &n, &in, path)
		})
	}
}

func runFeatures(t *testing.T, cases []featureCase, n *network, in *instance, path string) {
	t.Helper()
	// Keeps open what the path opens for the first rule.
	addPath(in, path, "first", "239.99.99.99:9%in0", "239.99.99.98:9%out0")
	for i, c := range cases {
		t.Run(c.name, func(t *testing.T) { c.run(t, n, in, path, fmt.Sprintf("%c%d", path[0], i)) })
	}
}

// paths are those that all features are tested on.
var paths = []string{"kernel", "afxdp", "fanout"}

// TestFragmentedDatagram sends 60 kB through a rule with four outputs: the receivers reassemble the
// fragments.
func TestFragmentedDatagram(t *testing.T) {
	t.Parallel()
	onPaths(t, func(t *testing.T, n *network, in *instance, path string) {
		for _, c := range []struct{ in, to, out string }{
			{"239.1.1.1:5000%in0", "239.1.1.1", "239.2.2.%d:6000%%out%d"},
			{"fd00:1::2@[ff3e::1]:5000%in0", "ff3e::1", "[ff0e::%d]:6000%%out%d"},
		} {
			n.fragmented(t, in, path, c.in, c.to, c.out)
		}
	})
}

func (n *network) fragmented(t *testing.T, in *instance, path, input, to, output string) {
	t.Helper()
	args := []string{"rule", "add", "big", "--path", path, "--in", input}
	var sinks []net.PacketConn
	for i, at := range []int{0, 1, 2, 0} {
		out := fmt.Sprintf(output, i+1, at)
		args = append(args, "--out", out)
		endpoint, _, _ := strings.Cut(out, "%")
		sinks = append(sinks, labtest.Listen(t, n.sinks[at], "sink0", netip.MustParseAddrPort(endpoint)))
	}
	in.mustCLI(args...)
	defer in.mustCLI("rule", "del", "big")
	in.waitState("big", "active")
	payload := make([]byte, 60_000)
	for i := range payload {
		payload[i] = byte(i*7) ^ path[0] // no path's payload repeats another's: see featureCase.run
	}
	labtest.Do(t, n.source, func() error {
		i, err := net.InterfaceByName("src0")
		if err != nil {
			return err
		}
		d := net.Dialer{Control: multicastInterface(i.Index, netip.MustParseAddr(to).Is4())}
		c, err := d.Dial("udp", netip.AddrPortFrom(netip.MustParseAddr(to), 5000).String())
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write(payload)
		return err
	})
	for i, s := range sinks {
		buf := make([]byte, 65536)
		if err := s.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		got, _, err := s.ReadFrom(buf)
		if err != nil || !bytes.Equal(buf[:got], payload) {
			t.Errorf("output %d: %d bytes, %v", i, got, err)
		}
	}
	eventually(t, "all fragments are counted", func() string {
		if status := in.rule("big"); status.Matched.Packets < 40 || len(status.Drops) > 0 {
			return fmt.Sprintf("%+v", status)
		}
		return ""
	})
}

// TestJumbo sends frames of 9,000 bytes through rules of every path. Where the kernel path cannot
// send them they are counted, and auto chooses a path that can.
func TestJumbo(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	for host, names := range map[*lab.Host][]string{n.source: {"src0"}, n.relay: {"in0", "out0", "out1"}, n.sinks[0]: {"sink0"}, n.sinks[1]: {"sink0"}} {
		for _, name := range names {
			l, err := host.Link(name)
			if err == nil {
				err = host.Netlink().LinkSetMTU(l, 9000)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	in := newInstance(t, n.relay)
	in.start()
	// byKernel is the expected outcome on the kernel path: before Linux 6.3 no device sends
	// redirected frames of several buffers.
	sends := n.features(t, "out0")
	byKernel := func(c featureCase) featureCase {
		if !sends.Known {
			c.want, c.drop = nil, "multi_buffer"
		}
		return c
	}
	jumbo := func(f *packet.Frame) { f.Payload = bytes.Repeat([]byte("jumbo "), 1500)[:8972] }
	for i, c := range []featureCase{
		byKernel(featureCase{name: "one output", frame: jumbo, out: []string{"239.2.2.2:6000%out0"}, want: []func(f *packet.Frame){dst("239.2.2.2", 6000)}}),
		byKernel(featureCase{name: "one output, tagged", frame: jumbo, out: []string{"239.2.2.2:6000%out0,vlan=7"}, want: []func(f *packet.Frame){dst("239.2.2.2", 6000, tags(7))}}),
		{name: "one output, auto", path: "auto", frame: jumbo, out: []string{"239.2.2.2:6000%out0"}, want: []func(f *packet.Frame){dst("239.2.2.2", 6000)}},
		{name: "one output, fanout", path: "fanout", frame: jumbo, out: []string{"239.2.2.2:6000%out0"}, want: []func(f *packet.Frame){dst("239.2.2.2", 6000)}},
		{name: "longer than the output's mtu", frame: jumbo, out: []string{"239.2.2.2:6000%out2"}, drop: "mtu"},
		{name: "several outputs", frame: jumbo, out: []string{"239.2.2.2:6000%out0", "239.2.2.3:6000%out1"}, drop: "multi_buffer"},
		{name: "several outputs, auto", path: "auto", frame: jumbo, out: []string{"239.2.2.2:6000%out0", "239.2.2.3:6000%out1,vlan=7"}, want: []func(f *packet.Frame){dst("239.2.2.2", 6000), dst("239.2.2.3", 6000, tags(7))}},
		{name: "several outputs, shorter", frame: func(f *packet.Frame) { f.Payload = make([]byte, 3000) }, out: []string{"239.2.2.2:6000%out0", "239.2.2.3:6000%out1"},
			want: []func(f *packet.Frame){dst("239.2.2.2", 6000), dst("239.2.2.3", 6000)}},
	} {
		t.Run(c.name, func(t *testing.T) { c.run(t, n, in, "kernel", fmt.Sprint("case", i)) })
	}
}

// features is what the kernel reports for an interface of the relay.
func (n *network) features(t *testing.T, ifname string) (f host.Features) {
	t.Helper()
	labtest.Do(t, n.relay, func() error {
		w, err := host.Open(host.Options{})
		if err != nil {
			return err
		}
		defer w.Close()
		s, err := w.Snapshot()
		if err == nil {
			f = s.Link(ifname).Features
		}
		return err
	})
	return f
}

func closeAll(t *testing.T, closers ...io.Closer) {
	for _, c := range closers {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestSourceSpecific: the streams of two sources of one group take different paths, that of a third
// takes the any-source rule's, and a receiver that joined a single source hears it with src=keep.
func TestSourceSpecific(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	for _, cidr := range []string{"10.1.0.3/24", "10.1.0.4/24"} {
		if err := n.source.AddAddr("src0", cidr); err != nil {
			t.Fatal(err)
		}
	}
	in := newInstance(t, n.relay)
	in.start()
	in.add("second", "10.1.0.2@239.1.1.1:5000%in0", "232.2.2.2:6000%out0,src=keep")
	in.add("third", "10.1.0.3@239.1.1.1:5000%in0", "232.2.2.2:6000%out1,src=keep")
	in.add("others", "239.1.1.1:5000%in0", "239.2.2.2:6000%out2")
	sinks := []*sink{
		receive(t, n.sinks[0], "10.1.0.2@232.2.2.2:6000%sink0", traffic.Expected{Source: netip.MustParseAddr("10.1.0.2")}),
		receive(t, n.sinks[1], "10.1.0.3@232.2.2.2:6000%sink0", traffic.Expected{Source: netip.MustParseAddr("10.1.0.3")}),
		receive(t, n.sinks[2], "239.2.2.2:6000%sink0", traffic.Expected{Source: netip.MustParseAddr("10.2.2.1")}),
	}
	const packets = 500
	for i, source := range []string{"10.1.0.2", "10.1.0.3", "10.1.0.4"} {
		send(t, n.source, traffic.SendConfig{Target: target(t, "239.1.1.1:5000%src0"), Source: netip.MustParseAddr(source), TTL: 16,
			Rate: traffic.Rate{Value: easy}, Count: packets}).wait()
		if fault := sinks[i].finish(packets); fault != "" {
			t.Error(fault)
		}
	}
}
