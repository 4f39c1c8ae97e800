package loader

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"xdpcast/bpf"
	"xdpcast/internal/flowtest"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

func rule1(in flow.Input, out flow.Output, except ...string) flow.Flow {
	r := flow.Flow{Name: "r", In: in, Out: []flow.Output{out}}
	for _, e := range except {
		r.Except = append(r.Except, netip.MustParsePrefix(e))
	}
	return r
}

func sourced(in flow.Input, prefix string) flow.Input {
	in.BySource, in.Source = true, netip.Addr{}
	if prefix != "" {
		p := netip.MustParsePrefix(prefix)
		in.Source, in.SourceLen = p.Addr(), p.Bits()
	}
	return in
}

// runWhole runs the programs on a received frame.
func runWhole(t *testing.T, r *runner, n *testLab, f packet.Frame) ran {
	t.Helper()
	frame := f.Build()
	return r.run(t, n.in.Index, frame, len(frame))
}

// TestSourcePrefixes: the longest prefix that does not exclude the sender takes the packet; its
// precedence is between one source and any.
func TestSourcePrefixes(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 1)
	in := input(n.in, "239.1.1.1", "", 5000)
	out := output(n.out[0], "239.2.2.2", "10.9.9.9", 6000)
	named := func(name string, r flow.Flow) flow.Flow { r.Name = name; return r }
	anyPort := in
	anyPort.Port = 0
	one := in
	one.Source = netip.MustParseAddr("10.1.1.1")
	sync1(t, r.l,
		named("one", rule1(one, out)),
		named("wide", rule1(sourced(in, "10.0.0.0/8"), out, "10.1.0.0/16", "10.2.3.0/24")),
		named("narrow", rule1(sourced(in, "10.2.0.0/16"), out, "10.2.9.9/32")),
		named("any", rule1(in, out)),
		named("ports", rule1(sourced(anyPort, ""), out, "192.168.0.0/16")))
	for source, want := range map[string]string{
		"10.1.1.1": "one", "10.1.1.2": "any", "10.3.0.1": "wide", "10.2.0.1": "narrow", "10.2.3.4": "narrow",
		"10.2.9.9": "wide", "11.0.0.1": "any", "192.168.1.1": "any",
	} {
		f := sourceFrame(n, "239.1.1.1", 5000, []byte("x"))
		f.Src = netip.MustParseAddr(source)
		before := statsOf(t, r.l, want).Matched.Packets
		runWhole(t, r, n, f)
		if got := statsOf(t, r.l, want).Matched.Packets; got != before+1 {
			t.Errorf("a packet from %s is not taken by rule %s", source, want)
		}
	}
	sync1(t, r.l, named("ports", rule1(sourced(anyPort, ""), out, "192.168.0.0/16")))
	for source, want := range map[string]uint32{"10.1.1.1": xdpRedirect, "192.168.1.1": xdpPass, "192.169.1.1": xdpRedirect} {
		f := sourceFrame(n, "239.1.1.1", 77, []byte("x"))
		f.Src = netip.MustParseAddr(source)
		if got := runWhole(t, r, n, f); got.verdict != want {
			t.Errorf("from %s: verdict %d, want %d", source, got.verdict, want)
		}
	}
}

// TestPortRange: one rule, one set of counters, one entry for each port.
func TestPortRange(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 1)
	in := input(n.in, "239.1.1.1", "", 5000)
	in.PortTo = 5010
	out := output(n.out[0], "239.2.2.2", "10.9.9.9", 0)
	out.PortAdd, out.PortShift = true, 1000
	sync1(t, r.l, rule1(in, out))
	for port, want := range map[uint16]uint32{4999: xdpPass, 5000: xdpRedirect, 5005: xdpRedirect, 5010: xdpRedirect, 5011: xdpPass} {
		got := runWhole(t, r, n, sourceFrame(n, "239.1.1.1", port, []byte("x")))
		if got.verdict != want {
			t.Errorf("port %d: verdict %d, want %d", port, got.verdict, want)
		}
		if h, _ := packet.Parse(got.frame); want == xdpRedirect && h.DstPort != port+1000 {
			t.Errorf("port %d leaves as %d", port, h.DstPort)
		}
	}
	if s := statsOf(t, r.l, "r"); s.Matched.Packets != 3 || s.Outputs[0].Sent.Packets != 3 {
		t.Errorf("%+v", s)
	}
	// Another rule for one of the ports is refused.
	other := input(n.in, "239.1.1.1", "", 5005)
	if err := r.l.Sync(pointers([]flow.Flow{rule1(in, out), {Name: "o", In: other, Out: []flow.Output{output(n.out[0], "239.2.2.3", "10.9.9.9", 1)}}})); err == nil {
		t.Error("a port of a range has two rules")
	}
}

// TestAllGroups: the prefix of all groups excludes those that stay on one link.
func TestAllGroups(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 1)
	all4 := input(n.in, "224.0.0.0", "", 0)
	all4.Len = 4
	all6 := input(n.in, "ff00::", "", 0)
	all6.Len = 8
	four, six := rule1(all4, output(n.out[0], "239.2.2.2", "10.9.9.9", 1)), rule1(all6, output(n.out[0], "ff05::2", "fd00::9", 1))
	six.Name = "six"
	sync1(t, r.l, four, six)
	for group, want := range map[string]uint32{
		"224.0.0.251": xdpPass, "224.0.1.1": xdpRedirect, "239.255.255.255": xdpRedirect, "224.0.0.0": xdpPass, "223.1.1.1": xdpPass,
		"ff02::fb": xdpPass, "ff12::1": xdpPass, "ff01::1": xdpPass, "ff03::1": xdpRedirect, "ff0e::1": xdpRedirect, "ff3e::1": xdpRedirect,
	} {
		f := sourceFrame(n, group, 5000, []byte("x"))
		if f.Dst.Is6() {
			f.Src = netip.MustParseAddr("fd00::7")
		}
		if got := runWhole(t, r, n, f); got.verdict != want {
			t.Errorf("%s: verdict %d, want %d", group, got.verdict, want)
		}
	}
}

// TestSendersAreAdopted: the rules that a restarted process reads back decide the same for every
// packet, and keep their ids.
func TestSendersAreAdopted(t *testing.T) {
	t.Parallel()
	n := newLab(t, 3)
	for seed := range uint64(12) {
		opts := stateOptions(t)
		opts.Logger = nil
		w := newWorld(100+seed, n)
		rules := normalized(w.Rules(int(seed)))
		l := open(t, opts)
		sync1(t, l, rules...)
		ids := map[string]uint32{}
		for name, e := range l.rules {
			ids[name] = e.id
		}
		extra := l.extra
		closeLoader(t, l)
		l = open(t, opts)
		adopted := l.Rules()
		if len(adopted) != len(rules) {
			t.Fatalf("seed %d: %d rules adopted of %d", seed, len(adopted), len(rules))
		}
		for _, r := range rules {
			if e := l.rules[r.Name]; e == nil || e.rule.In != r.In {
				t.Errorf("seed %d: rule %s is %+v, adopted as %+v", seed, r.Name, r.In, e)
			}
		}
		if l.extra > extra {
			t.Errorf("seed %d: %d entries more than one each, were %d", seed, l.extra, extra)
		}
		for range 2000 {
			index, frame := w.Frame(rules)
			h, ok := packet.Parse(frame)
			if !ok || h.Part != packet.Whole {
				continue
			}
			a, b := flowtest.Match(rules, index, &h, h.DstPort), flowtest.Match(adopted, index, &h, h.DstPort)
			if (a == nil) != (b == nil) || a != nil && a.Name != b.Name {
				t.Fatalf("seed %d: %+v went to %v, goes to %v", seed, h, a, b)
			}
		}
		sync1(t, l, rules...)
		for name, id := range ids {
			if l.rules[name].id != id {
				t.Errorf("seed %d: rule %s has number %d, had %d", seed, name, l.rules[name].id, id)
			}
		}
		if l.extra != extra {
			t.Errorf("seed %d: %d entries more than one each, want %d", seed, l.extra, extra)
		}
		closeLoader(t, l)
		if err := Unload(opts); err != nil {
			t.Fatal(err)
		}
	}
}

// TestSourceFlows: each prefix that rules name has the rule of the longest one that takes it.
func TestSourceFlows(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	for range 2000 {
		var entries []*entry
		taken := map[flow.Input]bool{}
		for id := range uint32(1 + random.IntN(5)) {
			addr := func() netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, byte(random.IntN(16))}) }
			r := flow.Flow{In: flow.Input{Index: 1, Group: netip.MustParseAddr("239.1.1.1"), BySource: true}, Out: make([]flow.Output, 1)}
			if random.IntN(4) > 0 {
				r.In.SourceLen = 28 + random.IntN(4)
				r.In.Source = netip.PrefixFrom(addr(), r.In.SourceLen).Masked().Addr()
			}
			for range random.IntN(3) {
				p := netip.PrefixFrom(addr(), 29+random.IntN(4)).Masked()
				if flow.Covers(r.In.Senders(), p) && p.Bits() > r.In.SourceLen {
					r.Except = append(r.Except, p)
				}
			}
			if taken[r.In] {
				continue
			}
			taken[r.In] = true
			normal := r.Normalized()
			entries = append(entries, &entry{rule: &normal, id: 1 + id})
		}
		flows := sourceFlows(entries)
		for last := range byte(16) {
			source := netip.AddrFrom4([4]byte{10, 0, 0, last})
			var want uint32
			bits := -1
			for _, e := range entries {
				if e.rule.TakesSource(source) && e.rule.In.SourceLen > bits {
					want, bits = e.id, e.rule.In.SourceLen
				}
			}
			var got uint32
			longest := -1
			for _, f := range flows { // as in the kernel's trie
				if p := f.in.Senders(); p.Contains(source) && p.Bits() > longest {
					got, longest = f.value.Rule, p.Bits()
				}
			}
			if got != want {
				t.Fatalf("%v goes to %d, want %d: %+v", source, got, want, flows)
			}
		}
	}
}

func FuzzSourceKeys(f *testing.F) {
	f.Add(uint32(1), uint16(5000), []byte{239, 1, 1, 1}, []byte{10, 0, 0, 0}, uint8(8), uint16(0))
	f.Add(uint32(1), uint16(0), make([]byte, 16), make([]byte, 16), uint8(0), uint16(7))
	f.Fuzz(func(t *testing.T, index uint32, port uint16, group, source []byte, length uint8, vlan uint16) {
		in := flow.Input{Index: int(index), Port: port, VLAN: vlan, BySource: true, SourceLen: int(length)}
		var ok bool
		if in.Group, ok = netip.AddrFromSlice(group); !ok || in.Group.Is4In6() || int(length) > in.Group.BitLen() {
			t.Skip("no group")
		}
		if in.Source, ok = netip.AddrFromSlice(source); !ok || in.Source.BitLen() != in.Group.BitLen() {
			t.Skip("no source")
		}
		var got flow.Input
		switch key := encodeKey(in).(type) {
		case *bpf.RelayPrefix4:
			got = decodePrefix4(key).in
		case *bpf.RelayPrefix6:
			got = decodePrefix6(key).in
		}
		if got != in {
			t.Fatalf("%+v became %+v", in, got)
		}
	})
}

func TestNormalExcept(t *testing.T) {
	p := func(all ...string) (list []netip.Prefix) {
		for _, s := range all {
			list = append(list, netip.MustParsePrefix(s))
		}
		return list
	}
	got := flow.NormalExcept(p("10.2.0.0/16", "10.1.1.0/24", "10.1.0.0/16", "10.1.0.0/16", "10.1.1.1/32", "10.3.0.0/16"))
	if !slices.Equal(got, p("10.1.0.0/16", "10.2.0.0/16", "10.3.0.0/16")) || flow.NormalExcept(nil) != nil {
		t.Error(got)
	}
}

// The first excluded sender, and the removal of the last one, move a rule between the tables while
// its counters and its rate continue.
func TestExceptKeepsCounters(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 1)
	for _, in := range []flow.Input{input(n.in, "239.1.1.1", "", 5000), input(n.in, "ff0e::1", "", 0)} {
		out := output(n.out[0], "239.2.2.2", "10.9.9.9", 6000)
		left, other := "192.168.9.9/32", "192.168.9.9"
		if in.Group.Is6() {
			out = output(n.out[0], "ff0e::2", "fd00:9::9", 6000)
			left, other = "fd00:9::9/128", "fd00:9::9"
		}
		want := uint64(0)
		for i, r1 := range []flow.Flow{rule1(in, out), rule1(sourced(in, ""), out, left), rule1(in, out), rule1(sourced(in, ""), out, left)} {
			r1.Rate = flow.Rate{Packets: 1, Burst: 3}
			sync1(t, r.l, r1)
			allocatorsFit(t, r.l)
			kernelFits(t, r.l)
			f := sourceFrame(n, in.Group.String(), 5000, []byte{byte(i)})
			runWhole(t, r, n, f)
			want++
			f.Src = netip.MustParseAddr(other)
			if got := runWhole(t, r, n, f); (got.verdict == xdpPass) != (len(r1.Except) > 0) {
				t.Errorf("step %d: a packet of the sender that is left out: verdict %d", i, got.verdict)
			}
			if len(r1.Except) == 0 {
				want++
			}
			if got := statsOf(t, r.l, "r").Matched.Packets; got != want {
				t.Errorf("step %d: %d packets matched, want %d", i, got, want)
			}
		}
		if got := statsOf(t, r.l, "r"); got.Drops[Policed].Packets == 0 {
			t.Errorf("%v: a change of the senders has filled the bucket of the rate: %+v", in.Group, got)
		}
	}
}

// A process that dies while it moves a rule between the tables leaves both entries, with one id and
// the same counters; the next one continues with either.
func TestAdoptsRuleWithHalfAnExcept(t *testing.T) {
	t.Parallel()
	n := newLab(t, 1)
	in, out := input(n.in, "239.1.1.1", "", 5000), output(n.out[0], "239.2.2.2", "10.9.9.9", 6000)
	plain, except := rule1(in, out), rule1(sourced(in, ""), out, "10.9.9.9/32")
	for _, way := range [][2]flow.Flow{{plain, except}, {except, plain}} {
		l := open(t, stateOptions(t))
		sync1(t, l, way[0])
		var before []flowEntry
		for kind := range tableKinds {
			flows, err := readKind(kind, l.tables[kind])
			if err != nil {
				t.Fatal(err)
			}
			before = append(before, flows...)
		}
		id, stats := l.rules["r"].id, l.rules["r"].firstStats
		outputs, err := readArray[bpf.RelayOutput](l.maps.Outputs, 1)
		if err != nil {
			t.Fatal(err)
		}
		first := l.rules["r"].first
		sync1(t, l, way[1])
		// The first rule's outputs, in addition to the second's.
		if err := l.maps.Outputs.Put(first, &outputs[0]); err != nil {
			t.Fatal(err)
		}
		for _, f := range before {
			if err := l.tableOf(f.in).Put(f.key(), &f.value); err != nil {
				t.Fatal(err)
			}
		}
		l = reopen(t, l)
		if rules := l.Rules(); len(rules) != 1 || l.rules["r"].id != id || l.rules["r"].firstStats != stats {
			t.Fatalf("adopted %+v", rules)
		}
		if flows, err := l.tables.read(); err != nil || len(flows) != 1 {
			t.Fatalf("%d flow entries, %v", len(flows), err)
		}
		for _, r1 := range []flow.Flow{except, plain} {
			sync1(t, l, r1)
			kernelFits(t, l)
			allocatorsFit(t, l)
			if l.rules["r"].id != id {
				t.Error("the rule has another number")
			}
		}
	}
}
