package loader

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// world draws rule sets and frames from few values, so that they often meet.
type world struct {
	*rand.Rand
	in, out []*net.Interface
	// fragments are still to come, on the interface with this index.
	index     int
	fragments [][]byte
}

// within draws an address of a prefix.
func (w *world) within(in flow.Input) netip.Addr {
	host, group := w.random(in.Group).AsSlice(), in.Group.AsSlice()
	for bit := range in.Len {
		mask := byte(0x80 >> (bit % 8))
		host[bit/8] = host[bit/8]&^mask | group[bit/8]&mask
	}
	a, _ := netip.AddrFromSlice(host)
	return a
}

// extensions draws IPv6 extension headers that lead to UDP, mostly.
func (w *world) extensions() (first uint8, b []byte) {
	const udp, hopByHop, destination, fragment = 17, 0, 60, 44
	kinds := []uint8{udp}
	for range 1 + w.IntN(5) {
		kinds = append(kinds, pick[uint8](w, hopByHop, destination, fragment, 43))
	}
	for i := 1; i < len(kinds); i++ {
		length := 0
		if kinds[i] != fragment {
			length = pick(w, 0, 0, 1, 9, 19)
		}
		ext := make([]byte, 8+8*length)
		ext[0], ext[1] = kinds[i-1], byte(length)
		if kinds[i] == fragment {
			ext[1] = 0
			put16(ext, 2, pick[uint16](w, 0, 0, 1, 8))
		}
		b = append(ext, b...)
	}
	return kinds[len(kinds)-1], b
}

func newWorld(seed uint64, n *testLab) *world {
	return &world{
		Rand: rand.New(rand.NewPCG(seed, 1)),
		in:   []*net.Interface{n.in, n.out[0]},
		out:  n.out,
	}
}

func pick[T any](w *world, from ...T) T { return from[w.IntN(len(from))] }

func (w *world) chance(percent int) bool { return w.IntN(100) < percent }

var (
	groups4  = []string{"239.1.1.1", "239.129.1.1", "239.1.2.1", "10.0.0.2", "255.255.255.255", "10.0.0.255"}
	groups6  = []string{"ff3e::1", "ff3e::8000:1", "fd00::2"}
	sources4 = []string{"192.168.7.7", "192.168.7.9", "192.168.9.9", "192.1.7.7", "255.255.255.255"}
	sources6 = []string{"2001:db8::7", "2001:db8::9", "2001:dbf::7", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"}
	ports    = []uint16{1, 5000, 65535}

	// ownAddresses are those that the loader is told are the host's.
	ownAddresses = []netip.Addr{netip.MustParseAddr("192.168.7.9"), netip.MustParseAddr("2001:db8::9")}
)

func (w *world) addr(of []string) netip.Addr { return netip.MustParseAddr(pick(w, of...)) }

// rules draws a rule set; names are unique to the set, so that all counters start
// at nothing.
func (w *world) rules(set int) (rules []flow.Flow) {
	inputs := map[flow.Input]bool{}
	for i := range 1 + w.IntN(12) {
		groups, sources := groups4, sources4
		if w.chance(40) {
			groups, sources = groups6, sources6
		}
		in := pick(w, w.in...)
		r := flow.Flow{Name: fmt.Sprintf("set%d-%d", set, i), In: flow.Input{Index: in.Index, MAC: mac(in), Group: w.addr(groups), Port: pick(w, ports...)}}
		if w.chance(40) {
			r.In.Source = w.addr(sources)
		}
		if w.chance(25) {
			r.In.Port = 0
		}
		if w.chance(30) {
			r.In.Len = pick(w, 4, 8, 16, 24, 31)
			r.In.Group = netip.PrefixFrom(r.In.Group, r.In.Len).Masked().Addr()
		}
		if w.chance(30) {
			r.In.VLAN, r.In.OuterVLAN = pick[uint16](w, 7, 4094), pick[uint16](w, 0, 0, 9)
		}
		r.Broadcast = r.In.Len == 0 && r.In.Group.Is4() && !r.In.Group.IsMulticast() && w.chance(50)
		r.AllowLoop, r.AllowNoChecksum = w.chance(20), w.chance(20)
		w.spread(&r, sources)
		taken := false
		for in := range r.In.Key().EveryPort() {
			taken = taken || inputs[in]
		}
		if taken {
			continue
		}
		for in := range r.In.Key().EveryPort() {
			inputs[in] = true
		}
		for range pick(w, 1, 1, 2, 3, 5, 64) {
			r.Out = append(r.Out, w.output(r.In.Group))
		}
		rules = append(rules, r)
	}
	return rules
}

// spread makes a rule take a range of devices, a prefix of sources, or any but some.
func (w *world) spread(r *flow.Flow, sources []string) {
	in := &r.In
	if in.Port == 5000 && w.chance(30) {
		in.PortTo = pick[uint16](w, 5001, 5003)
	}
	if in.Len != 0 || !w.chance(40) {
		return
	}
	in.BySource, in.Source = true, netip.Addr{}
	if w.chance(70) {
		in.SourceLen = pick(w, 8, 16, 24, 31)
		in.Source = netip.PrefixFrom(w.addr(sources), in.SourceLen).Masked().Addr()
	}
	for range w.IntN(3) {
		source := w.addr(sources)
		p := netip.PrefixFrom(source, pick(w, 9, 17, 25, source.BitLen())).Masked()
		if p.Bits() > in.SourceLen && (!in.Source.IsValid() || netip.PrefixFrom(in.Source, in.SourceLen).Contains(source)) {
			r.Except = append(r.Except, p)
		}
	}
	*r = r.Normalized()
}

func (w *world) output(family netip.Addr) flow.Output {
	out := pick(w, w.out...)
	o := flow.Output{Ready: w.chance(90), Index: out.Index, MTU: pick[int32](w, 28, 60, 100, 1500, 1500, 1500, 70000)}
	o.SrcMAC = mac(out)
	o.DstPort = uint16(1 + w.IntN(65535))
	o.SrcPort = pick(w, 0, 0, uint16(w.Uint32()))
	o.TTLMode, o.TTL = pick(w, packet.TTLKeep, packet.TTLDecrement, packet.TTLSet), pick(w, 1, 64, 255, uint8(w.Uint32()))
	o.SetDSCP, o.DSCP = w.chance(50), uint8(w.IntN(64))
	o.ZeroChecksum = w.chance(20)
	o.Dst = w.random(family)
	if w.chance(70) {
		o.Src = w.random(family)
	}
	o.DstMAC = packet.MulticastMAC(o.Dst)
	if w.chance(50) {
		return o
	}
	o.Blocked = pick(w, flow.NotReady, flow.NoNeighbour)
	o.DstLen = pick[uint8](w, 0, 1, 8, 16, 31, uint8(1+w.IntN(o.Dst.BitLen())))
	if w.chance(20) {
		o.DstMAC[0] = 2 // a neighbour's
	}
	o.PortAdd, o.PortShift = w.chance(30), pick[int32](w, 0, 1, -1, 60000, -60000)
	o.MinTTL = pick[uint8](w, 0, 0, 0, 2, 64)
	o.VLAN = pick(w, packet.VLANKeep, packet.VLANPop, packet.VLANSet)
	o.VLANID, o.OuterVLAN = uint16(1+w.IntN(4094)), pick[uint16](w, 0, 0, 4094)
	o.SetPCP, o.PCP = w.chance(30), uint8(w.IntN(8))
	o.OneBuffer = w.chance(30)
	return o
}

func (w *world) random(family netip.Addr) netip.Addr {
	b := make([]byte, family.BitLen()/8)
	for i := range b {
		b[i] = pick(w, 0, 0xff, byte(w.Uint32()))
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// frame draws a frame that most often is for a rule and whole, and sometimes broken
// in one place.
func (w *world) frame(rules []flow.Flow) (index int, frame []byte) {
	if len(w.fragments) > 0 {
		index, frame = w.index, w.fragments[0]
		w.fragments = w.fragments[1:]
		return index, frame
	}
	groups, sources := groups4, sources4
	if w.chance(40) {
		groups, sources = groups6, sources6
	}
	f := packet.Frame{
		SrcMAC: [6]byte{2, 0, 0, 0, 0, 1}, Src: w.addr(sources), Dst: w.addr(groups),
		SrcPort: uint16(w.Uint32()), DstPort: pick(w, ports...),
		TTL: pick[uint8](w, 0, 1, 2, 64, 255), TOS: uint8(w.Uint32()),
		NoChecksum: w.chance(10), Payload: make([]byte, pick(w, 0, 1, 2, 31, 32, 33, 72, 73, w.IntN(1600))),
	}
	index = pick(w, w.in...).Index
	if len(rules) > 0 && w.chance(70) {
		in := pick(w, rules...).In
		index, f.Dst = in.Index, in.Group
		if in.Port != 0 {
			f.DstPort = in.Port
		}
		if in.PortTo != 0 {
			f.DstPort = pick(w, in.PortTo, in.PortTo-1, in.PortTo+1)
		}
		if in.Len != 0 {
			f.Dst = w.within(in)
		}
		if in.VLAN != 0 {
			f.VLANs = []uint16{uint16(w.IntN(16))<<12 | in.VLAN}
		}
		if in.OuterVLAN != 0 {
			f.VLANs = []uint16{in.OuterVLAN, f.VLANs[0]}
		}
		if f.Src = in.Source; !f.Src.IsValid() || w.chance(20) {
			f.Src = w.random(in.Group)
		}
		if in.BySource && w.chance(80) {
			f.Src = w.addr(map[bool][]string{true: sources4, false: sources6}[in.Group.Is4()])
		}
	}
	if f.DstMAC = packet.MulticastMAC(f.Dst); !f.Dst.IsMulticast() && w.chance(80) {
		f.DstMAC = mac(w.in[0])
		if len(w.in) > 1 && index == w.in[1].Index {
			f.DstMAC = mac(w.in[1])
		}
	}
	if w.chance(3) {
		f.SrcMAC = mac(pick(w, w.in...))
	}
	fill := pick(w, 0, 0xff, 0x1ff)
	for i := range f.Payload {
		f.Payload[i] = byte(min(fill, 0xff))
		if fill == 0x1ff {
			f.Payload[i] = byte(w.Uint32())
		}
	}
	if w.chance(10) {
		f.VLANs = append(f.VLANs, pick[uint16](w, 0, 0xe000, 7, 0x1007))
		if w.chance(30) {
			f.VLANs = append(f.VLANs, pick[uint16](w, 0, 9))
		}
	}
	if w.chance(10) && f.Dst.Is4() {
		f.Options = bytes.Repeat([]byte{1}, 4*(1+w.IntN(10)))
	}
	if w.chance(10) && f.Dst.Is6() {
		f.FirstExtension, f.Extensions = w.extensions()
	}
	if w.chance(20) {
		f.Padding = w.IntN(20)
	}
	b := f.Build()
	if w.chance(15) && f.Extensions == nil {
		w.index, w.fragments = index, packet.Fragment(b, w.Uint32(), 8*(1+w.IntN(40)))
		if w.chance(30) {
			w.Shuffle(len(w.fragments), func(i, j int) { w.fragments[i], w.fragments[j] = w.fragments[j], w.fragments[i] })
		}
		return w.frame(rules)
	}
	if w.chance(40) {
		b = w.mutate(b)
	}
	return index, b
}

func (w *world) mutate(b []byte) []byte {
	headers := min(len(b), 80)
	switch w.IntN(5) {
	case 0: // one bit of a header
		b[w.IntN(headers)] ^= 1 << w.IntN(8)
	case 1: // one byte of a header
		b[w.IntN(headers)] = byte(w.Uint32())
	case 2: // cut short
		b = b[:max(14, w.IntN(len(b)))]
	case 3: // a fragment
		if len(b) > atIP+8 {
			put16(b, atIP+6, pick[uint16](w, 0x2000, 0x4000, 1, 0x2001, 0x8000))
		}
	default: // some of everything
		for range 1 + w.IntN(6) {
			b[w.IntN(len(b))] ^= byte(1 + w.IntN(255))
		}
	}
	return b
}

// differential runs one frame through the programs and the oracle and compares what
// leaves and what is counted.
func differential(t testing.TB, r *runner, o *oracle, index int, frame []byte, linear int) {
	t.Helper()
	got := r.run(t, index, frame, linear)
	verdict, copies := o.frame(index, frame, linear)
	describe := func() string { return fmt.Sprintf("frame %x, %d linear, on interface %d", frame, linear, index) }
	if got.verdict != verdict {
		t.Fatalf("%s: verdict %d, the twin says %d", describe(), got.verdict, verdict)
	}
	if verdict == xdpPass && !bytes.Equal(got.frame, frame) {
		t.Fatalf("%s: not sent, but changed to %x", describe(), got.frame)
	}
	for slot := range len(copies) + len(got.copies) + 64 {
		if !bytes.Equal(got.copies[slot], copies[slot]) {
			t.Fatalf("%s: output %d:\n got  %x\n twin %x", describe(), slot, got.copies[slot], copies[slot])
		}
	}
	stats := globalStats(t, r.l)
	if stats.Passed.subtract(o.passedBefore); stats.Passed != o.passed {
		t.Fatalf("%s: passed %+v, want %+v", describe(), stats.Passed, o.passed)
	}
	if len(stats.Rules) != len(o.want) {
		t.Fatalf("%d rules have counters, want %d", len(stats.Rules), len(o.want))
	}
	for _, s := range stats.Rules {
		if diff := cmp.Diff(counters(*o.want[s.Name]), counters(s)); diff != "" {
			t.Fatalf("%s: counters of rule %s (-twin +got):\n%s", describe(), s.Name, diff)
		}
	}
}

// checkTotals compares the drops of all rules with those by rule and output.
func checkTotals(t testing.TB, o *oracle, drops map[Reason]Counter) {
	t.Helper()
	want := map[Reason]Counter{}
	addAll := func(m map[Reason]Counter) {
		for reason, c := range m {
			total := want[reason]
			total.add(c.Packets, c.Bytes)
			want[reason] = total
		}
	}
	for _, r := range o.want {
		addAll(r.Drops)
		for _, out := range r.Outputs {
			addAll(out.Drops)
		}
	}
	if diff := cmp.Diff(want, drops); diff != "" {
		t.Fatalf("drops of all rules (-by rule +got):\n%s", diff)
	}
}

// Random rules and frames: the programs and their twin in Go give the same verdict,
// the same bytes in every copy, and the same counters.
func TestDifferential(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 3)
	testDifferential(t, n, r)
	if !r.partial {
		t.Log("no frame of several buffers: this kernel cannot run a program on one (Linux 6.18)")
	}
}

// The programs as they are loaded for a kernel without frames of several buffers (before
// Linux 5.18) give the same, too.
func TestDifferentialOnOldKernel(t *testing.T) {
	t.Parallel()
	n := newLab(t, 3)
	opts := testOptions(t)
	opts.programs = embedded{fragmentTimeout: time.Hour}
	opts.probes = Capabilities{}.answers()
	l := open(t, opts)
	attachAll(t, l, append([]*net.Interface{n.in}, n.out...)...)
	r := newRunner(t, l, n.relay)
	r.partial = false // a test run spreads a frame over buffers even so
	testDifferential(t, n, r)
}

func testDifferential(t *testing.T, n *testLab, r *runner) {
	t.Helper()
	w := newWorld(20261122, n)
	if err := r.l.SetOwnAddresses(ownAddresses); err != nil {
		t.Fatal(err)
	}
	first := map[fragmentKey]uint16{}
	sent, matched, done := 0, uint64(0), uint64(0)
	for set := range 15 {
		rules := w.rules(set)
		sync1(t, r.l, rules...)
		if set%3 == 2 { // the flow tables alone have to say the same
			r.l.shortcuts.open = false
			if err := r.l.writeConfig(); err != nil {
				t.Fatal(err)
			}
		}
		before := globalStats(t, r.l)
		o := newOracle(normalized(rules), before, first)
		for range 100 {
			index, frame := w.frame(rules)
			linear := len(frame)
			if r.partial && w.chance(10) {
				linear = 14 + w.IntN(len(frame)-13)
			}
			differential(t, r, o, index, frame, linear)
			sent++
		}
		checkTotals(t, o, subtractDrops(globalStats(t, r.l).Drops, before.Drops))
		for _, s := range o.want {
			matched += s.Matched.Packets
			for _, out := range s.Outputs {
				done += out.Sent.Packets
			}
		}
	}
	if matched < uint64(sent)/3 || done < matched {
		t.Errorf("only %d of %d frames matched a rule, and %d copies left, which proves little", matched, sent, done)
	}
}

func normalized(rules []flow.Flow) []flow.Flow {
	out := make([]flow.Flow, len(rules))
	for i, r := range rules {
		out[i] = r.Normalized()
	}
	return out
}

// FuzzRelay compares the programs with their twin on whatever the fuzzer makes of
// frames, for rule sets drawn by seed.
func FuzzRelay(f *testing.F) {
	for seed := range uint64(24) {
		w := &world{Rand: rand.New(rand.NewPCG(seed, 2)), in: []*net.Interface{{Index: 1, HardwareAddr: []byte{2, 0, 0, 0, 0, 2}}}}
		_, frame := w.frame(nil)
		f.Add(uint8(seed/8), frame, uint16(0))
	}
	opts := testOptions(f)
	opts.programs = embedded{fragmentTimeout: time.Hour}
	opts.Logger = nil // a fuzz target may not log through f
	n := newLab(f, 3)
	l := open(f, opts)
	attachAll(f, l, append([]*net.Interface{n.in}, n.out...)...)
	if err := l.SetOwnAddresses(ownAddresses); err != nil {
		f.Fatal(err)
	}
	r := newRunner(f, l, n.relay)
	var o *oracle
	ports := map[fragmentKey]uint16{}
	current, set := -1, 0
	f.Fuzz(func(t *testing.T, seed uint8, frame []byte, linear uint16) {
		if len(frame) < 14 || len(frame) > 3000 {
			t.Skip("the kernel runs programs on whole Ethernet headers and up to a page")
		}
		r.enter(t)
		if current != int(seed%32) {
			current = int(seed % 32)
			set++
			rules := newWorld(uint64(current), n).rules(set)
			sync1(t, r.l, rules...)
			o = newOracle(normalized(rules), globalStats(t, r.l), ports)
		}
		first := len(frame)
		if linear != 0 && r.partial {
			first = 14 + int(linear)%(len(frame)-13)
		}
		differential(t, r, o, n.in.Index, frame, first)
	})
}
