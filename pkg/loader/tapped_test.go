package loader

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"xdpcast/internal/flowtest"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// tapRule is a rule of the fanout path, for which the kernel has no outputs.
func tapRule(name string, in flow.Input) flow.Flow {
	return flow.Flow{Name: name, In: in, Path: flow.PathFanout, Out: []flow.Output{{Rewrite: packet.Rewrite{Dst: in.Group, DstPort: 6000}}}}
}

// skbContext is struct __sk_buff up to the field that a test run may set.
type skbContext struct {
	_       [10]uint32
	Ifindex uint32
	_       [37]uint32
}

// Of any frames, the tapped program takes exactly those that the relay program leaves to the packet
// tap.
func TestTappedAgreesWithRelay(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 1)
	program, err := r.l.opts.programs.tapped(r.l.maps, true, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { program.Close() })
	w := newWorld(11, n)
	taken, left := 0, 0
	for set := range 40 {
		rules := w.Rules(set)
		for i := range rules {
			rules[i].Path, rules[i].Local = flowtest.Pick(w, flow.PathKernel, flow.PathFanout, flow.PathFanout), w.Chance(30)
		}
		sync1(t, r.l, rules...)
		o := newOracle(normalized(rules), globalStats(t, r.l), flowtest.Ports{})
		for range 60 {
			index, frame := w.Frame(rules)
			if len(frame) < atIP+40 {
				continue // BPF_PROG_RUN requires whole IP headers in an skb
			}
			// The program marks no fragments that no rule takes; the relay program, which runs
			// first, has marked those of all rules.
			if _, _, err := r.try(r.l.relay, index, frame, len(frame)); err != nil {
				t.Fatal(err)
			}
			rule := o.rule(index, frame)
			want := rule != nil && rule.Path == flow.PathFanout && !rule.Local
			verdict, err := program.Run(&ebpf.RunOptions{Data: frame, Context: skbContext{Ifindex: uint32(index)}})
			if errors.Is(err, unix.EINTR) {
				verdict, err = program.Run(&ebpf.RunOptions{Data: frame, Context: skbContext{Ifindex: uint32(index)}})
			}
			if err != nil {
				t.Fatalf("run on a frame of %d bytes: %v", len(frame), err)
			}
			if got := verdict == tcShot; got != want {
				t.Fatalf("frame %x on interface %d: taken %v, want %v by %+v", frame, index, got, want, rule)
			}
			if want {
				taken++
			} else if rule != nil {
				left++
			}
		}
	}
	if taken < 200 || left < 200 {
		t.Errorf("%d taken and %d left, which proves little", taken, left)
	}
}

// tcShot is TC_ACT_SHOT of include/uapi/linux/pkt_cls.h.
const tcShot = 2

// rule is the one that takes a frame, or nil.
func (o *oracle) rule(index int, frame []byte) *flow.Flow {
	h, ok := packet.Parse(frame)
	if !ok {
		return nil
	}
	return o.first.Find(o.rules, index, frame, &h)
}

// On the wire, where the kernel strips the outer tag from a frame: the host gets none of a rule's
// packets, and all others. With XDP on the interface, or without.
func TestTappedOnTheWire(t *testing.T) {
	for _, mode := range []Mode{ModeAuto, ModeNative, ModeGeneric} {
		t.Run(map[Mode]string{ModeAuto: "without XDP", ModeNative: "native XDP", ModeGeneric: "generic XDP"}[mode], func(t *testing.T) {
			tappedOnTheWire(t, mode)
		})
	}
}

// tappedOnTheWire attaches in the given mode, not at all for ModeAuto.
func tappedOnTheWire(t *testing.T, mode Mode) {
	n := newLab(t, 0)
	l := open(t, testOptions(t))
	if mode != ModeAuto {
		if _, err := l.Attach(n.in.Index, mode); err != nil {
			t.Fatal(err)
		}
	}
	vlan := func(inner, outer uint16) flow.Input {
		in := input(n.in, "239.1.1.1", "", 5000)
		in.VLAN, in.OuterVLAN = inner, outer
		return in
	}
	v6 := input(n.in, "ff3e::1", "", 5000)
	local := tapRule("local", input(n.in, "239.1.1.2", "", 5000))
	local.Local = true
	sync1(t, l, tapRule("plain", vlan(0, 0)), tapRule("tag", vlan(7, 0)), tapRule("tags", vlan(7, 9)), tapRule("v6", v6), local,
		tapRule("prefix", flow.Input{Index: n.in.Index, MAC: mac(n.in), Group: netip.MustParseAddr("239.7.0.0"), Len: 16}),
		tapRule("host", input(n.in, "10.0.0.2", "", 5000)))
	source := labtest.NewTap(t, n.source, "eth0")
	plain := sourceFrame(n, "239.1.1.1", 5000, make([]byte, 64))
	with := func(change func(*packet.Frame)) packet.Frame {
		f := plain
		change(&f)
		return f
	}
	to := func(group string) packet.Frame {
		return with(func(f *packet.Frame) {
			f.Dst = netip.MustParseAddr(group)
			f.DstMAC = packet.MulticastMAC(f.Dst)
			if f.Dst.Is6() {
				f.Src = netip.MustParseAddr("2001:db8::7")
			}
		})
	}
	tags := func(tags ...uint16) packet.Frame { return with(func(f *packet.Frame) { f.VLANs = tags }) }
	host := to("10.0.0.2")
	host.DstMAC = mac(n.in)
	foreign := host
	foreign.DstMAC[5] ^= 1
	long := with(func(f *packet.Frame) { f.Payload = make([]byte, 1400) })
	extended := to("ff3e::1")
	extended.FirstExtension, extended.Extensions = unix.IPPROTO_HOPOPTS, append([]byte{unix.IPPROTO_UDP, 0, 1, 4}, make([]byte, 4)...)
	for _, c := range []struct {
		name   string
		frames [][]byte
		kept   int
	}{
		{"IPv4", [][]byte{plain.Build()}, 1},
		{"other port", [][]byte{with(func(f *packet.Frame) { f.DstPort = 5001 }).Build()}, 0},
		{"other group", [][]byte{to("239.1.1.3").Build()}, 0},
		{"local", [][]byte{to("239.1.1.2").Build()}, 0},
		{"prefix", [][]byte{to("239.7.1.1").Build()}, 1},
		{"IPv6", [][]byte{to("ff3e::1").Build()}, 1},
		{"IPv6 with an extension header", [][]byte{extended.Build()}, 1},
		{"a tag", [][]byte{tags(7).Build()}, 1},
		{"another tag", [][]byte{tags(8).Build()}, 0},
		{"a priority tag", [][]byte{tags(0xe000).Build()}, 1},
		{"two tags", [][]byte{tags(9, 7).Build()}, 1},
		{"two tags the other way", [][]byte{tags(7, 9).Build()}, 0},
		{"three tags", [][]byte{tags(3, 9, 7).Build()}, 0},
		{"unicast", [][]byte{host.Build()}, 1},
		{"for another host", [][]byte{foreign.Build()}, 0},
		{"fragments", packet.Fragment(long.Build(), 77, 400), 4},
		{"tagged fragments", packet.Fragment(with(func(f *packet.Frame) { f.VLANs, f.Payload = []uint16{9, 7}, make([]byte, 1400) }).Build(), 78, 400), 4},
	} {
		before := globalStats(t, l).Kept.Packets
		for _, frame := range c.frames {
			source.Send(frame)
		}
		// The last one is taken, and shows that those before it have passed.
		source.Send(plain.Build())
		var got uint64
		labtest.Eventually(t, c.name+": all are through", func() bool {
			got = globalStats(t, l).Kept.Packets - before
			return got > uint64(c.kept)
		})
		if got != uint64(c.kept)+1 {
			t.Errorf("%s: %d of %d frames kept from the host, want %d", c.name, got-1, len(c.frames), c.kept)
		}
	}
}

// On a device without an Ethernet header the IP header comes first.
func TestTappedWithoutEthernet(t *testing.T) {
	t.Parallel()
	n := newLab(t, 0)
	l := open(t, testOptions(t))
	tun := newTun(t, "tun0")
	i := iface(t, "tun0")
	in := flow.Input{Index: i.Index, Group: netip.MustParseAddr("239.1.1.1"), Port: 5000}
	unicast := flow.Input{Index: i.Index, Group: netip.MustParseAddr("10.7.0.1"), Port: 5000}
	sync1(t, l, tapRule("r", in), tapRule("u", unicast))
	to := func(addr string, port uint16) []byte {
		return sourceFrame(n, addr, port, make([]byte, 32)).Build()[14:]
	}
	for _, p := range [][]byte{to("239.1.1.1", 5001), to("239.1.1.1", 5000), to("10.7.0.1", 5000), to("239.1.1.2", 5000)} {
		if _, err := tun.Write(p); err != nil {
			t.Fatal(err)
		}
	}
	// A tun receives within its writer's call.
	if kept := globalStats(t, l).Kept; kept != (Counter{2, 2 * 60}) {
		t.Errorf("kept %+v, want 2 packets of 60 bytes", kept)
	}
}

func newTun(t testing.TB, name string) *os.File {
	t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), name)
	t.Cleanup(func() { f.Close() })
	request, err := unix.NewIfreq(name)
	if err != nil {
		t.Fatal(err)
	}
	request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		t.Fatal(err)
	}
	dev, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetUp(dev)
	}
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// tappedOn lists the programs at the tcx ingress of an interface.
func tappedOn(t testing.TB, i *net.Interface) (names []string) {
	t.Helper()
	result, err := link.QueryPrograms(link.QueryOptions{Target: i.Index, Attach: ebpf.AttachTCXIngress})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range result.Programs {
		program, err := ebpf.NewProgramFromID(p.ID)
		if err != nil {
			t.Fatal(err)
		}
		info, err := program.Info()
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, info.Name)
		program.Close()
	}
	return names
}

// The program is attached while a rule needs it, whoever owns the pinned state, before foreign
// ones, which stay.
func TestTappedComesAndGoes(t *testing.T) {
	t.Parallel()
	n := newLab(t, 1)
	opts := testOptions(t)
	l := open(t, opts)
	other, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "other", Type: ebpf.SchedCLS, License: "MIT", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { other.Close() })
	others, err := link.AttachTCX(link.TCXOptions{Program: other, Interface: n.in.Index, Attach: ebpf.AttachTCXIngress})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { others.Close() })
	expect := func(when string, want ...string) {
		t.Helper()
		if diff := cmp.Diff(want, tappedOn(t, n.in)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", when, diff)
		}
	}
	local := tapRule("r", input(n.in, "239.1.1.1", "", 5000))
	local.Local = true
	kernel := flow.Flow{Name: "k", In: input(n.in, "239.1.1.2", "", 5000), Out: []flow.Output{output(n.out[0], "239.2.2.2", "10.1.0.1", 6000)}}
	sync1(t, l, local, kernel)
	expect("no rule keeps packets", "other")
	taking := tapRule("r", local.In)
	sync1(t, l, taking, kernel)
	expect("a rule does", "tapped", "other")
	closeLoader(t, l)
	expect("without a process", "tapped", "other")
	l = open(t, opts)
	if rules := l.Rules(); !slices.ContainsFunc(rules, taking.Normalized().Equal) {
		t.Errorf("adopted %+v", rules)
	}
	expect("adopted", "tapped", "other")
	closeLoader(t, l)
	opts.programs = laterTapped{}
	l = open(t, opts)
	expect("another release", "later", "other")
	sync1(t, l, kernel)
	expect("no rule any more", "other")
	sync1(t, l, taking)
	closeLoader(t, l)
	if err := Unload(opts); err != nil {
		t.Fatal(err)
	}
	expect("unloaded", "other")
}

// An interface that disappears takes the program with it, and one that cannot have it causes a
// warning, not a failure of the rule.
func TestTappedFails(t *testing.T) {
	t.Parallel()
	n := newLab(t, 0)
	opts := testOptions(t)
	source := &failingTapped{}
	opts.programs = source
	l := open(t, opts)
	source.err = errors.New("made up")
	rule := tapRule("r", input(n.in, "239.1.1.1", "", 5000))
	sync1(t, l, rule)
	if w := l.Warnings(); len(w) != 1 || w[0] != "packets of the fanout path from in reach the host's stack, too: made up" {
		t.Errorf("warnings %q", w)
	}
	source.err = nil
	sync1(t, l, rule)
	if w := l.Warnings(); len(w) != 0 || len(tappedOn(t, n.in)) != 1 {
		t.Errorf("warnings %q, programs %v", w, tappedOn(t, n.in))
	}
	dev, err := netlink.LinkByIndex(n.in.Index)
	if err == nil {
		err = netlink.LinkDel(dev)
	}
	if err != nil {
		t.Fatal(err)
	}
	closeLoader(t, l)
	l = open(t, opts)
	sync1(t, l)
	pins, err := os.ReadDir(opts.PinDir + "/links")
	if err != nil {
		t.Fatal(err)
	}
	for _, pin := range pins {
		if strings.HasPrefix(pin.Name(), pinTapped) {
			t.Errorf("pin %s is left", pin.Name())
		}
	}
}

// laterTapped is a release whose tapped program does nothing.
type laterTapped struct{ embedded }

func (laterTapped) tapped(*mapSet, bool, *ebpf.Program) (*ebpf.Program, error) {
	return ebpf.NewProgram(&ebpf.ProgramSpec{Name: "later", Type: ebpf.SchedCLS, License: "MIT", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}})
}

type failingTapped struct {
	embedded
	err error
}

func (f *failingTapped) tapped(m *mapSet, ethernet bool, have *ebpf.Program) (*ebpf.Program, error) {
	if f.err != nil {
		return nil, f.err
	}
	return f.embedded.tapped(m, ethernet, have)
}

// What the tapped program saves the machine: a frame of a group joined by the host, without a
// receiver, sent and received on one CPU.
func BenchmarkTapped(b *testing.B) {
	for _, local := range []bool{false, true} {
		b.Run(map[bool]string{false: "taken", true: "left"}[local], func(b *testing.B) {
			n := newLab(b, 0)
			l := open(b, testOptions(b))
			rule := tapRule("r", input(n.in, "239.1.1.1", "", 5000))
			rule.Local = local
			sync1(b, l, rule)
			joined, err := net.ListenMulticastUDP("udp4", n.in, &net.UDPAddr{IP: net.IPv4(239, 1, 1, 1), Port: 7})
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { joined.Close() })
			frame := sourceFrame(n, "239.1.1.1", 5000, make([]byte, 100)).Build()
			source := labtest.NewTap(b, n.source, "eth0")
			received := func() uint64 {
				dev, err := netlink.LinkByIndex(n.in.Index)
				if err != nil {
					b.Fatal(err)
				}
				return dev.Attrs().Statistics.RxPackets
			}
			before := received()
			b.ResetTimer()
			for range b.N {
				source.Send(frame)
			}
			labtest.Eventually(b, "all frames have arrived", func() bool { return received()-before >= uint64(b.N) })
			b.StopTimer()
			if kept := globalStats(b, l).Kept.Packets; !local && kept != uint64(b.N) || local && kept != 0 {
				b.Errorf("%d of %d frames kept", kept, b.N)
			}
		})
	}
}
