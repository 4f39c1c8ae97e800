package loader

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"xdpcast/internal/flowtest"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// prefixed is an input with a prefix of groups, and of senders if that is not empty.
func prefixed(in flow.Input, groups, senders string) flow.Input {
	p := netip.MustParsePrefix(groups)
	in.Group, in.Len = p.Addr(), p.Bits()
	if senders != "" {
		return sourced(in, senders)
	}
	return in
}

// TestBothPrefixes: the longer prefix of senders decides, then that of groups. A single sender goes
// before, and any sender after; rules that exclude some senders are no more specific than others.
func TestBothPrefixes(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 1)
	in := input(n.in, "239.1.1.1", "", 5000)
	any6 := input(n.in, "ff05::1", "", 0)
	out, out6 := output(n.out[0], "239.2.2.2", "10.9.9.9", 6000), output(n.out[0], "ff05::2", "fd00::9", 6000)
	anyPort := in
	anyPort.Port = 0
	one := prefixed(in, "239.1.0.0/16", "")
	one.Source = netip.MustParseAddr("10.2.3.4")
	named := func(name string, r flow.Flow) flow.Flow { r.Name = name; return r }
	rules := []flow.Flow{
		named("one", rule1(one, out)),
		named("wide", rule1(prefixed(in, "239.1.0.0/16", "10.0.0.0/8"), out, "10.1.0.0/16")),
		named("narrow", rule1(prefixed(in, "239.0.0.0/8", "10.2.0.0/16"), out, "10.2.9.9/32")),
		named("inner", rule1(prefixed(in, "239.1.2.0/24", "10.0.0.0/8"), out)),
		named("but", rule1(sourced(prefixed(in, "239.0.0.0/8", ""), ""), out, "192.168.0.0/16")),
		named("any", rule1(prefixed(in, "239.1.2.0/28", ""), out)),
		named("outer", rule1(prefixed(in, "232.0.0.0/5", ""), out)),
		named("port", rule1(prefixed(anyPort, "239.0.0.0/8", "10.0.0.0/8"), out)),
		named("exact", rule1(input(n.in, "239.1.2.5", "", 5000), out)),
		named("six", rule1(prefixed(any6, "ff05::/16", "2001:db8::/32"), out6, "2001:db8:1::/48")),
		named("six-any", rule1(prefixed(any6, "ff05::/16", ""), out6)),
	}
	check := func(want map[string]string) {
		t.Helper()
		for packet, name := range want {
			var source, group string
			port := uint16(5000)
			if _, err := fmt.Sscanf(packet, "%s %s %d", &source, &group, &port); err != nil && port != 5000 {
				t.Fatal(err)
			}
			f := sourceFrame(n, group, port, []byte("x"))
			f.Src = netip.MustParseAddr(source)
			before := uint64(0)
			if name != "" {
				before = statsOf(t, r.l, name).Matched.Packets
			}
			got := runWhole(t, r, n, f)
			if name == "" {
				if got.verdict != xdpPass {
					t.Errorf("%s: verdict %d, want none to take it", packet, got.verdict)
				}
			} else if got := statsOf(t, r.l, name).Matched.Packets; got != before+1 {
				t.Errorf("%s is not taken by %s", packet, name)
			}
		}
	}
	want := map[string]string{
		"10.2.3.4 239.1.1.1":         "one",
		"10.2.3.5 239.1.1.1":         "narrow", // the longer prefix of senders, whatever the groups
		"10.2.3.5 239.1.2.1":         "narrow",
		"10.2.9.9 239.1.1.1":         "wide",
		"10.3.0.1 239.1.1.1":         "wide",
		"10.3.0.1 239.1.2.99":        "inner",
		"10.3.0.1 239.1.2.1":         "inner", // senders before groups
		"10.1.0.1 239.1.1.1":         "but",
		"10.1.0.1 239.1.2.99":        "inner",
		"11.0.0.1 239.1.1.1":         "but",
		"11.0.0.1 239.1.2.1":         "any", // neither names its senders: the longer prefix of groups
		"192.168.0.1 239.1.1.1":      "outer",
		"192.168.0.1 239.1.2.1":      "any",
		"11.0.0.1 238.1.1.1":         "outer",
		"10.3.0.1 239.1.2.5":         "exact",
		"10.3.0.1 239.9.9.9 77":      "port",
		"11.0.0.1 239.9.9.9 77":      "",
		"10.3.0.1 224.0.0.5":         "",
		"2001:db8::1 ff05::9":        "six",
		"2001:db8:1::1 ff05::9":      "six-any",
		"2001:db9::1 ff05::9":        "six-any",
		"2001:db8::1 ff02::9":        "",
		"2001:db8:ffff::1 ff05::9 7": "six",
	}
	sync1(t, r.l, rules...)
	check(want)
	// One that takes senders from others, and returns them, without a change of those.
	sync1(t, r.l, slices.DeleteFunc(slices.Clone(rules), func(r flow.Flow) bool { return r.Name == "any" })...)
	check(map[string]string{"11.0.0.1 239.1.2.1": "but", "192.168.0.1 239.1.2.1": "outer", "10.3.0.1 239.1.2.1": "inner"})
	sync1(t, r.l, rules...)
	check(want)
	kernelFits(t, r.l)
	allocatorsFit(t, r.l)
	// Without the last one, any sender is found as before.
	sync1(t, r.l, rules[6], rules[10])
	check(map[string]string{"11.0.0.1 239.1.2.1": "outer", "2001:db8::1 ff05::9": "six-any"})
	if r.l.both != 0 {
		t.Errorf("%d rules have both prefixes", r.l.both)
	}
}

// TestClasses: the two steps find the winning rule, and reading back gives the same rules.
func TestClasses(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	for round := range 2000 {
		var both, anySender []*entry
		var rules []flow.Flow
		taken := map[flow.Input]bool{}
		for id := range uint32(1 + random.IntN(6)) {
			source := func() netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, byte(random.IntN(8))}) }
			r := flow.Flow{Name: fmt.Sprint(id), In: flow.Input{Index: 1, Port: 5000, Len: 28 + random.IntN(5), BySource: random.IntN(4) > 0}, Out: make([]flow.Output, 1)}
			r.In.Group = netip.PrefixFrom(netip.AddrFrom4([4]byte{239, 1, 1, byte(random.IntN(8))}), r.In.Len).Masked().Addr()
			if r.In.Len == 32 {
				r.In.Len = 31
				r.In.Group = netip.PrefixFrom(r.In.Group, r.In.Len).Masked().Addr()
			}
			if random.IntN(3) == 0 {
				r.In.PortTo = 5001
			}
			if r.In.BySource && random.IntN(3) > 0 {
				r.In.SourceLen = 29 + random.IntN(3)
				r.In.Source = netip.PrefixFrom(source(), r.In.SourceLen).Masked().Addr()
			}
			for range random.IntN(3) {
				p := netip.PrefixFrom(source(), 30+random.IntN(3)).Masked()
				if r.In.BySource && flow.Covers(r.In.Senders(), p) && p.Bits() > r.In.SourceLen {
					r.Except = append(r.Except, p)
				}
			}
			clash := false
			for in := range r.In.EveryPort() {
				clash = clash || taken[in]
			}
			if clash {
				continue
			}
			for in := range r.In.EveryPort() {
				taken[in] = true
			}
			normal := r.Normalized()
			rules = append(rules, normal)
			if e := (&entry{rule: &normal, id: 1 + id}); normal.In.BySource {
				both = append(both, e)
			} else {
				anySender = append(anySender, e)
			}
		}
		flows, err := bothFlows(both, anySender)
		if err != nil {
			t.Fatal(err)
		}
		read := gatherBoth(slices.Clone(flows))
		if len(read) != len(both) {
			t.Fatalf("round %d: %d rules are read back of %d: %+v", round, len(read), len(both), read)
		}
		var again []flow.Flow
		for _, r := range rules {
			if !r.In.BySource {
				again = append(again, r)
			}
		}
		for _, f := range read {
			again = append(again, flow.Flow{Name: fmt.Sprint(f.value.Rule - 1), In: f.in, Except: f.except})
		}
		for _, port := range []uint16{5000, 5001} {
			for at := range byte(64) {
				h := packet.Headers{Src: netip.AddrFrom4([4]byte{10, 0, 0, at & 7}), Dst: netip.AddrFrom4([4]byte{239, 1, 1, at >> 3})}
				want, reread := flowtest.Match(rules, 1, &h, port), flowtest.Match(again, 1, &h, port)
				if got := twoSteps(flows, &h, port); got != 0 {
					if want == nil || want.Name != fmt.Sprint(got-1) {
						t.Fatalf("round %d: %v to %v:%d goes to %d, want %+v of %+v", round, h.Src, h.Dst, port, got-1, want, rules)
					}
				} else if want != nil && want.In.BySource {
					t.Fatalf("round %d: %v to %v:%d is not found, want %+v of %+v", round, h.Src, h.Dst, port, want, rules)
				}
				if (want == nil) != (reread == nil) || want != nil && want.Name != reread.Name {
					t.Fatalf("round %d: %v to %v:%d goes to %+v after it was read back, want %+v", round, h.Src, h.Dst, port, reread, want)
				}
			}
		}
	}
}

// twoSteps is the id of the rule that the programs find, with lookups as in the kernel's trie; 0
// for none.
func twoSteps(flows []flowEntry, h *packet.Headers, port uint16) (rule uint32) {
	longest, class := -1, uint32(0)
	for _, f := range flows {
		if f.step == classStep && f.in.Port == port && f.in.Senders().Contains(h.Src) && f.in.SourceLen > longest {
			longest, class = f.in.SourceLen, f.class
		}
	}
	if longest < 0 {
		return 0
	}
	longest = -1
	for _, f := range flows {
		if f.step == inClassStep && f.in.Port == port && f.class == class && groups(f.in).Contains(h.Dst) && f.in.Len > longest {
			longest, rule = f.in.Len, 0
			if f.value.Path != 0 {
				rule = f.value.Rule
			}
		}
	}
	return rule
}

// TestTooManyClasses: rules that would fill the table without limit are refused, and nothing
// changes.
func TestTooManyClasses(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 1)
	in := input(n.in, "239.1.1.1", "", 5000)
	out := output(n.out[0], "239.2.2.2", "10.9.9.9", 6000)
	var rules []flow.Flow
	random := rand.New(rand.NewPCG(7, 8))
	for i := range 200 {
		r := rule1(sourced(prefixed(in, fmt.Sprintf("239.%d.0.0/16", i), ""), ""), out)
		r.Name = fmt.Sprint("rule", i)
		for range 64 { // few senders are excluded by the same rules
			r.Except = append(r.Except, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(random.IntN(32)), byte(random.IntN(200))}), 32))
		}
		rules = append(rules, r.Normalized())
	}
	sync1(t, r.l, rules[0])
	err := r.l.Sync(pointers(rules))
	var refused *RuleError
	if !errors.Is(err, ErrFull) || !errors.As(err, &refused) || refused.Rule != "rule199" {
		t.Fatalf("error is %v", err)
	}
	if got := r.l.Rules(); len(got) != 1 || got[0].Name != "rule0" {
		t.Errorf("%d rules are in force", len(got))
	}
	kernelFits(t, r.l)
}
