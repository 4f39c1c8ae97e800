package forward

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"xdpcast/pkg/fanout"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
)

// world draws rule sets and frames from few values, so that they often meet.
type world struct{ *rand.Rand }

func pick[T any](w world, from ...T) T { return from[w.IntN(len(from))] }

func (w world) chance(percent int) bool { return w.IntN(100) < percent }

var (
	groups4  = []string{"239.1.1.1", "239.129.1.1", "239.1.2.1", "10.0.0.2", "255.255.255.255", "10.0.0.255"}
	groups6  = []string{"ff3e::1", "ff3e::8000:1", "fd00::2"}
	sources4 = []string{"192.168.7.7", "192.168.7.9", "192.168.9.9", "192.1.7.7", "255.255.255.255"}
	sources6 = []string{"2001:db8::7", "2001:db8::9", "2001:dbf::7", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"}
	ports    = []uint16{1, 5000, 65535}
	inputs   = []int{1, 2}
	devices  = []int{3, 4, 5}
)

func macOf(index int) [6]byte { return [6]byte{2, 0, 0, 0, 1, byte(index)} }

func (w world) addr(of []string) netip.Addr { return netip.MustParseAddr(pick(w, of...)) }

func (w world) rules(set int) (rules []flow.Flow) {
	seen := map[flow.Input]bool{}
	for i := range 1 + w.IntN(16) {
		groups, sources := groups4, sources4
		if w.chance(40) {
			groups, sources = groups6, sources6
		}
		in := flow.Input{Index: pick(w, inputs...), Group: w.addr(groups), Port: pick(w, 0, ports[0], ports[1], ports[2])}
		if w.chance(40) {
			in.Source = w.addr(sources)
		}
		if w.chance(30) {
			in.Len = pick(w, 4, 8, 16, 24, 31)
			in.Group = netip.PrefixFrom(in.Group, in.Len).Masked().Addr()
		}
		if w.chance(30) {
			in.VLAN, in.OuterVLAN = pick[uint16](w, 7, 4094), pick[uint16](w, 0, 0, 9)
		}
		r := flow.Flow{Name: fmt.Sprintf("set%d-%d", set, i), In: in, AllowLoop: w.chance(20), AllowNoChecksum: w.chance(20),
			Unguarded: true} // the loop guard marks what random frames repeat; TestGuardDifferential is for it
		w.spread(&r, sources)
		taken := false
		for in := range r.In.EveryPort() {
			taken = taken || seen[in]
		}
		if taken {
			continue
		}
		for in := range r.In.EveryPort() {
			seen[in] = true
		}
		r.In.MAC = macOf(in.Index)
		r.Broadcast = in.Len == 0 && in.Group.Is4() && !in.Group.IsMulticast() && w.chance(50)
		for range pick(w, 1, 1, 2, 3, 5, 64) {
			r.Out = append(r.Out, w.output(in.Group))
		}
		rules = append(rules, r)
	}
	return rules
}

// spread makes a rule take a range of ports, a prefix of sources, or any but some.
func (w world) spread(r *flow.Flow, sources []string) {
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

func (w world) output(family netip.Addr) flow.Output {
	o := flow.Output{
		Ready: w.chance(90), Blocked: pick(w, flow.NotReady, flow.NoNeighbour), Index: pick(w, devices...),
		MTU: pick[int32](w, 28, 60, 100, 1500, 1500, 1500, 70000),
	}
	o.SrcMAC, o.DstPort, o.SrcPort = macOf(o.Index), uint16(1+w.IntN(65535)), pick(w, 0, 0, uint16(w.Uint32()))
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
	o.DstLen = pick[uint8](w, 0, 1, 8, 16, 31, uint8(1+w.IntN(o.Dst.BitLen())))
	o.PortAdd, o.PortShift = w.chance(30), pick[int32](w, 0, 1, -1, 60000, -60000)
	o.MinTTL = pick[uint8](w, 0, 0, 0, 2, 64)
	o.VLAN = pick(w, packet.VLANKeep, packet.VLANPop, packet.VLANSet)
	o.VLANID, o.OuterVLAN = uint16(1+w.IntN(4094)), pick[uint16](w, 0, 0, 4094)
	o.SetPCP, o.PCP = w.chance(30), uint8(w.IntN(8))
	return o
}

func (w world) random(family netip.Addr) netip.Addr {
	b := make([]byte, family.BitLen()/8)
	for i := range b {
		b[i] = pick(w, 0, 0xff, byte(w.Uint32()))
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// within draws an address of a prefix.
func (w world) within(in flow.Input) netip.Addr {
	host, group := w.random(in.Group).AsSlice(), in.Group.AsSlice()
	for bit := range in.Len {
		mask := byte(0x80 >> (bit % 8))
		host[bit/8] = host[bit/8]&^mask | group[bit/8]&mask
	}
	a, _ := netip.AddrFromSlice(host)
	return a
}

// frames draws a frame, or the fragments of one, that most often is for a rule and
// whole, and sometimes broken in one place.
func (w world) frames(rules []flow.Flow) (index int, frames [][]byte) {
	groups, sources := groups4, sources4
	if w.chance(40) {
		groups, sources = groups6, sources6
	}
	f := packet.Frame{
		SrcMAC: [6]byte{2, 0, 0, 0, 0, 1}, Src: w.addr(sources), Dst: w.addr(groups),
		SrcPort: uint16(w.Uint32()), DstPort: pick(w, ports...),
		TTL: pick[uint8](w, 0, 1, 2, 64, 255), TOS: uint8(w.Uint32()),
		NoChecksum: w.chance(10), Payload: make([]byte, pick(w, 0, 1, 2, 31, 72, 73, w.IntN(1600))),
	}
	index = pick(w, inputs...)
	if w.chance(80) {
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
			f.Src = pick(w, w.random(in.Group), w.addr(map[bool][]string{true: sources4, false: sources6}[in.Group.Is4()]))
		}
	}
	if f.DstMAC = packet.MulticastMAC(f.Dst); !f.Dst.IsMulticast() && w.chance(80) {
		f.DstMAC = macOf(index)
	}
	if w.chance(3) {
		f.SrcMAC = macOf(index)
	}
	for i := range f.Payload {
		f.Payload[i] = byte(w.Uint32())
	}
	if w.chance(10) {
		f.VLANs = append(f.VLANs, pick[uint16](w, 0, 0xe000, 7, 0x1007))
	}
	if w.chance(10) && f.Dst.Is4() {
		f.Options = bytes.Repeat([]byte{1}, 4*(1+w.IntN(10)))
	}
	if w.chance(20) {
		f.Padding = w.IntN(20)
	}
	b := f.Build()
	if w.chance(15) {
		frames = packet.Fragment(b, w.Uint32(), 8*(1+w.IntN(40)))
		if w.chance(30) {
			w.Shuffle(len(frames), func(i, j int) { frames[i], frames[j] = frames[j], frames[i] })
		}
		return index, frames
	}
	if w.chance(30) {
		for range 1 + w.IntN(3) {
			b[w.IntN(min(len(b), 80))] ^= 1 << w.IntN(8)
		}
	}
	return index, [][]byte{b}
}

// oracle says in plain Go what is to become of a frame, and keeps the counters: the
// oracle that package loader holds the BPF programs to.
type oracle struct {
	rules []flow.Flow
	first map[firstKey]uint16
	want  map[string]*loader.RuleStats
}

type firstKey struct {
	index       int
	vlan, outer uint16
	id          uint32
	src, dst    netip.Addr
}

func newOracle(rules []flow.Flow, first map[firstKey]uint16) *oracle {
	o := &oracle{rules: rules, first: first, want: map[string]*loader.RuleStats{}}
	for _, r := range rules {
		s := &loader.RuleStats{Name: r.Name, Drops: map[loader.Reason]loader.Counter{}}
		for range r.Out {
			s.Outputs = append(s.Outputs, loader.OutputStats{Drops: map[loader.Reason]loader.Counter{}})
		}
		o.want[r.Name] = s
	}
	return o
}

func (o *oracle) match(index int, h *packet.Headers, port uint16) (best *flow.Flow) {
	rank := func(in flow.Input) (n int) {
		if in.Len == 0 {
			n += 400_000
		}
		if in.Port != 0 {
			n += 200_000
		}
		switch {
		case in.BySource:
			n += 1000 * (1 + in.SourceLen)
		case in.Source.IsValid():
			n += 1000 * (1 + in.Source.BitLen())
		}
		return n + in.Len
	}
	for i := range o.rules {
		in := o.rules[i].In
		length := in.Len
		if length == 0 {
			length = in.Group.BitLen()
		}
		if in.Index == index && in.VLAN == h.VLAN && in.OuterVLAN == h.OuterVLAN &&
			(in.Port == 0 || in.Port <= port && port <= max(in.Port, in.PortTo)) &&
			(!in.Source.IsValid() || in.Source == h.Src || in.SourceLen != 0 && netip.PrefixFrom(in.Source, in.SourceLen).Contains(h.Src)) &&
			!slices.ContainsFunc(o.rules[i].Except, func(p netip.Prefix) bool { return p.Contains(h.Src) }) &&
			(in.Len == 0 || !ofOneLink(h.Dst)) && netip.PrefixFrom(in.Group, length).Contains(h.Dst) && (best == nil || rank(in) > rank(best.In)) {
			best = &o.rules[i]
		}
	}
	return best
}

// ofOneLink says whether no prefix takes a group.
func ofOneLink(dst netip.Addr) bool {
	return netip.MustParsePrefix("224.0.0.0/24").Contains(dst) || dst.Is6() && dst.IsMulticast() && dst.As16()[1]&15 < 3
}

// frame returns the copies by device, in the order of the outputs.
func (o *oracle) frame(index int, frame []byte) (copies map[int][][]byte) {
	copies = map[int][][]byte{}
	h, ok := packet.Parse(frame)
	if !ok {
		return copies
	}
	key, port := firstKey{index, h.VLAN, h.OuterVLAN, h.FragmentID, h.Src, h.Dst}, h.DstPort
	if h.Part == packet.LaterFragment {
		if port = o.first[key]; port == 0 {
			return copies
		}
	}
	r := o.match(index, &h, port)
	if r == nil || !r.In.Group.IsMulticast() && !r.Broadcast && [6]byte(frame[0:6]) != r.In.MAC {
		return copies
	}
	if h.Part == packet.FirstFragment {
		o.first[key] = h.DstPort
	}
	stats, one := o.want[r.Name], loader.Counter{Packets: 1, Bytes: uint64(len(frame))}
	count(&stats.Matched, one)
	if reason, drop := o.drop(r, frame, &h); drop {
		countReason(stats.Drops, reason, one)
		return copies
	}
	for slot := range r.Out {
		out := &r.Out[slot]
		sent, reason := copyOf(out, frame, &h)
		if sent == nil {
			countReason(stats.Outputs[slot].Drops, reason, one)
			continue
		}
		count(&stats.Outputs[slot].Sent, one)
		copies[out.Index] = append(copies[out.Index], sent)
	}
	return copies
}

func (o *oracle) drop(r *flow.Flow, frame []byte, h *packet.Headers) (loader.Reason, bool) {
	switch {
	case !r.AllowLoop && ([6]byte(frame[6:12]) == r.In.MAC || slices.Contains(ownAddresses, h.Src)):
		return loader.Loop, true
	case !r.AllowNoChecksum && h.Part != packet.LaterFragment && h.Dst.Is6() && frame[h.UDP+6] == 0 && frame[h.UDP+7] == 0:
		return loader.NoChecksum, true
	default:
		return 0, false
	}
}

func copyOf(out *flow.Output, frame []byte, h *packet.Headers) ([]byte, loader.Reason) {
	if !out.Ready {
		return nil, loader.ReasonOf(out.Blocked)
	}
	if out.TooLong(h, len(frame), int(min(out.MTU, 0xffff)), true) {
		return nil, loader.MTU
	}
	switch sent, outcome := out.Append(nil, frame, h); outcome {
	case packet.EndsByTTL:
		return nil, loader.TTL
	case packet.EndsByPort:
		return nil, loader.Port
	default:
		return append(sent, frame[h.Payload:]...), 0
	}
}

func count(c *loader.Counter, more loader.Counter) {
	c.Packets += more.Packets
	c.Bytes += more.Bytes
}

func countReason(m map[loader.Reason]loader.Counter, reason loader.Reason, more loader.Counter) {
	c := m[reason]
	count(&c, more)
	m[reason] = c
}

// recorder is a sender that keeps what it is given, and refuses what it is told to.
type recorder struct {
	sent    [][]byte
	headers bool // frames have no Ethernet header
	refuse  func() error
	closed  bool
}

func (r *recorder) Send(packets []fanout.Packet) (int, error) {
	for i, p := range packets {
		if r.refuse != nil {
			if err := r.refuse(); err != nil {
				return i, err
			}
		}
		r.sent = append(r.sent, append(bytes.Clone(p.Header), p.Payload...))
	}
	return len(packets), nil
}

func (r *recorder) Ethernet() bool { return !r.headers }

func (r *recorder) Close() error {
	r.closed = true
	return nil
}

// Random rules and frames: the engine gives the same copies and counters as the
// oracle that the BPF programs are held to.
func TestDifferential(t *testing.T) {
	w := world{rand.New(rand.NewPCG(20261123, 1))}
	set := NewSet(1)
	senders := map[int]*recorder{}
	engines := map[int]*Engine{}
	for _, input := range inputs {
		e, err := set.NewEngine(input, 0, func(index int) (Sender, error) {
			s := senders[index]
			if s == nil {
				s = &recorder{}
				senders[index] = s
			}
			return s, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		engines[input] = e
	}
	first := map[firstKey]uint16{}
	frames, matched, sent := 0, uint64(0), uint64(0)
	for n := range 300 {
		rules := w.rules(n)
		if err := set.Update(rules, ownAddresses, nil); err != nil {
			t.Fatal(err)
		}
		o := newOracle(rules, first)
		for range 40 {
			index, some := w.frames(rules)
			for _, s := range senders {
				s.sent = nil
			}
			want := map[int][][]byte{}
			e := engines[index]
			e.Begin()
			for _, frame := range some {
				before := bytes.Clone(frame)
				for device, copies := range o.frame(index, frame) {
					want[device] = append(want[device], copies...)
				}
				e.Frame(index, frame, int64(n+1))
				if !bytes.Equal(before, frame) {
					t.Fatalf("frame %x was changed", before)
				}
				frames++
			}
			e.End()
			for _, device := range devices {
				var got [][]byte
				if s := senders[device]; s != nil {
					got = s.sent
				}
				if !slices.EqualFunc(got, want[device], bytes.Equal) {
					t.Fatalf("frames %x on %d, device %d:\n got  %x\n want %x", some, index, device, got, want[device])
				}
			}
		}
		for _, s := range set.Stats(nil) {
			want := o.want[s.Name]
			matched += s.Matched.Packets
			s.LastSeen = 0
			for slot := range s.Outputs {
				s.Outputs[slot].Rule = flow.Output{}
				sent += s.Outputs[slot].Sent.Packets
			}
			if diff := cmp.Diff(*want, s, cmp.Comparer(func(a, b flow.Output) bool { return true })); diff != "" {
				t.Fatalf("rule %s (-oracle +got):\n%s", s.Name, diff)
			}
		}
	}
	if matched < uint64(frames)/3 || sent < matched {
		t.Errorf("%d of %d frames matched, and %d copies left, which proves little", matched, frames, sent)
	}
	t.Logf("%d frames, %d matched, %d copies", frames, matched, sent)
}
