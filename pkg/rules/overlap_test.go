package rules

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// packet is one packet on the wire, as far as inputs look at it.
type packet struct {
	iface  string
	vlan   VLAN
	dst    netip.Addr
	port   uint16
	source netip.Addr
	sent   bool // by this host
}

var packetInterfaces = []string{"eth0", "eth1", "eth10", "wan0"}

// allPackets are packets of every kind that randomRules can tell apart, with
// something in each part that no rule names.
func allPackets() (all []packet) {
	for _, iface := range packetInterfaces {
		for _, vlan := range []VLAN{{}, {ID: 7}, {ID: 7, Outer: 5}} {
			for dst := range byte(4) {
				for _, port := range []uint16{1, 2, 3, 4, 65533, 65534, 65535} {
					for _, source := range []string{"10.0.0.0", "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.9"} {
						all = append(all, packet{iface, vlan, netip.AddrFrom4([4]byte{239, 0, 0, dst}), port, addr(source), false})
					}
				}
			}
		}
	}
	return all
}

func ifaceMatches(text, name string) bool {
	if begin, ok := strings.CutSuffix(text, "+"); ok {
		return strings.HasPrefix(name, begin)
	}
	return text == name
}

func (p packet) matches(in Input) bool {
	return in.FromHost == p.sent && ifaceMatches(in.Interface, p.iface) && in.VLAN == p.vlan && in.Prefix().Contains(p.dst) &&
		p.toPort(in) && (!in.Source.IsValid() || in.Senders().Contains(p.source))
}

func (p packet) toPort(in Input) bool {
	return in.Port == 0 || in.Port == p.port || in.PortTo != 0 && in.Port < p.port && p.port <= in.PortTo
}

// takenBy is matches for a rule that may leave senders out.
func (p packet) takenBy(r Rule) bool {
	return p.matches(r.In) && !slices.ContainsFunc(r.Accept.Except(), func(e netip.Prefix) bool { return e.Contains(p.source) })
}

// sentBy reports whether an output sends the packet for some packet that its rule
// matches. What it sends by src=iface is of the source that no rule names.
func (p packet) sentBy(r Rule, slot int) bool {
	o := r.Out[slot]
	vlan := r.In.VLAN
	switch o.Policy.VLAN {
	case VLANPop:
		vlan = VLAN{}
	case VLANSet:
		vlan = o.Policy.VLANTags
	}
	source := addr("10.0.0.9")
	switch o.Policy.Source {
	case SourceAddress:
		source = o.Policy.SourceAddr
	case SourceKeep:
		source = p.source
		if !(packet{source: source, iface: "a", dst: r.In.Address}).takenBy(Rule{In: Input{Interface: "a", Address: r.In.Address, Source: r.In.Source, SourceLen: r.In.SourceLen}, Accept: r.Accept}) {
			return false
		}
	}
	prefix := Input{Address: o.Address, Len: o.Len}.Prefix()
	return ifaceMatches(o.Interface, p.iface) && p.vlan == vlan && p.source == source && prefix.Contains(p.dst) && p.portSentBy(r.In, o)
}

func (p packet) portSentBy(in Input, o Output) bool {
	if o.PortMode == PortSet {
		return p.port == o.Port
	}
	came := int32(p.port) - o.PortShift // a shift of 0 keeps it
	return came >= 0 && came <= 65535 && packet{port: uint16(came)}.toPort(in)
}

// rank is higher the earlier an input goes.
func rank(in Input) int {
	n := 0
	for _, has := range []bool{in.Len == 0, in.Port != 0, in.Source.IsValid()} {
		n *= 2
		if has {
			n++
		}
	}
	n = n*64 + in.Senders().Bits() + 1
	n = n*256 + int(in.Len)
	if begin, ok := strings.CutSuffix(in.Interface, "+"); ok {
		return n*32 + len(begin)
	}
	return n*32 + 31
}

// winners is by packet the rule that gets it, or -1.
func winners(rules []Rule, packets []packet) []int {
	all := make([]int, len(packets))
	for i, p := range packets {
		all[i] = -1
		for n, r := range rules {
			if p.takenBy(r) && (all[i] < 0 || rank(r.In) > rank(rules[all[i]].In)) {
				all[i] = n
			}
		}
	}
	return all
}

func randomInput(random *rand.Rand) Input {
	in := Input{
		Interface: pick(random, "eth0", "eth1", "eth0", "eth1", "eth+", "eth1+", "+"),
		Address:   netip.AddrFrom4([4]byte{239, 0, 0, byte(random.IntN(4))}),
		Port:      pick[uint16](random, 0, 0, 1, 1, 1, 2, 2, 65535),
		VLAN:      pick(random, VLAN{}, VLAN{}, VLAN{}, VLAN{ID: 7}, VLAN{ID: 7, Outer: 5}),
	}
	if random.IntN(2) == 0 {
		in.Len = pick[uint8](random, 30, 31)
		in.Address = in.Prefix().Masked().Addr()
	}
	if random.IntN(3) == 0 {
		in.Source = addr(pick(random, "10.0.0.1", "10.0.0.2"))
	}
	if random.IntN(4) == 0 {
		in.Source, in.SourceLen = addr("10.0.0.0"), pick[uint8](random, 30, 31)
	}
	if in.Port != 0 && in.Port < 65535 && random.IntN(3) == 0 {
		in.PortTo = pick[uint16](random, 2, 3, 65534, 65535)
		if in.PortTo <= in.Port || in.Port == 1 && in.PortTo == 65535 { // none but port 0 is left then
			in.PortTo = 0
		}
	}
	return in
}

// rangesClash reports whether a set cannot have both inputs, since a range of one has
// a port of the other.
func rangesClash(a, b Input) bool {
	same := a.withoutPorts()
	same.Interface = b.Interface
	return a.PortTo+b.PortTo != 0 && a.Port != 0 && b.Port != 0 && same == b.withoutPorts() && a.Overlaps(b) && (a.Port != b.Port || a.PortTo != b.PortTo)
}

func randomOutput(random *rand.Rand, in Input) Output {
	o := Output{Interface: pick(random, "eth0", "eth1", "eth+", "eth10", "wan0"), Address: netip.AddrFrom4([4]byte{239, 0, 0, byte(random.IntN(4))})}
	if in.Len != 0 && random.IntN(3) > 0 {
		o.Len = in.Len
		o.Address = o.prefix().Addr()
	}
	switch o.PortMode = PortMode(random.IntN(3)); o.PortMode {
	case PortSet:
		o.Port = pick[uint16](random, 1, 1, 2, 2, 3, 65535)
	case PortAdd:
		o.PortShift = pick[int32](random, 1, -1, 65534)
	}
	switch o.Policy.Source = SourcePolicy(random.IntN(3)); o.Policy.Source {
	case SourceAddress:
		o.Policy.SourceAddr = addr(pick(random, "10.0.0.1", "10.0.0.2", "10.0.0.9"))
	}
	switch o.Policy.VLAN = pick(random, VLANKeep, VLANKeep, VLANPop, VLANSet); o.Policy.VLAN {
	case VLANSet:
		o.Policy.VLANTags = pick(random, VLAN{ID: 7}, VLAN{ID: 7, Outer: 5})
	}
	return o
}

// randomRules are up to n rules of different inputs, over few of everything.
func randomRules(random *rand.Rand, n int) (rules []Rule) {
	taken := map[Input]bool{}
	excepts := random.IntN(4) == 0
	simple := random.IntN(3) == 0 // no tags, so that more of them meet
	for range n {
		in := randomInput(random)
		if simple {
			in.VLAN = VLAN{}
		}
		if taken[in] || slices.ContainsFunc(rules, func(r Rule) bool { return rangesClash(r.In, in) }) {
			continue
		}
		taken[in] = true
		r := Rule{Name: fmt.Sprintf("r%d", len(rules)), In: in}
		r.Accept.AllowLoop = random.IntN(10) == 0
		if excepts && (!in.Source.IsValid() || in.SourceLen != 0) && random.IntN(2) == 0 {
			r.Accept.Extra = &Extra{Except: []netip.Prefix{netip.MustParsePrefix(pick(random, "10.0.0.1/32", "10.0.0.2/32", "10.0.0.0/31"))}}
			if in.SourceLen == 31 {
				r.Accept.Extra.Except[0] = netip.MustParsePrefix("10.0.0.1/32")
			}
		}
		for range 1 + random.IntN(2) {
			o := randomOutput(random, in)
			if simple {
				o.Policy.VLAN, o.Policy.VLANTags = VLANKeep, VLAN{}
			}
			r.Out = append(r.Out, o)
		}
		rules = append(rules, r)
	}
	return rules
}

// TestBefore: each input goes before all that follow it.
func TestBefore(t *testing.T) {
	var order []Input
	for _, s := range []string{
		"10.0.0.5@239.1.1.1:1%eth0",
		"10.0.0.5@239.1.1.1:1%eth+",
		"10.0.0.5@239.1.1.1:1%e+",
		"10.0.0.0/24@239.1.1.1:1%eth0",
		"10.0.0.0/8@239.1.1.1:1-5%eth0",
		"239.1.1.1:1%eth0",
		"239.1.1.1:1%eth+",
		"10.0.0.5@239.1.1.1%eth0",
		"239.1.1.1%eth0",
		"239.1.1.1%+",
		"10.0.0.5@239.1.1.0/24:1%eth0",
		"10.0.0.5@239.1.1.0/24:1%eth+",
		"10.0.0.5@239.1.0.0/16:1%eth0",
		"239.1.1.0/24:1%eth0",
		"239.1.0.0/16:1%eth0",
		"239.1.0.0/16:1%eth+",
		"10.0.0.5@239.1.1.0/24%eth0",
		"10.0.0.5@239.1.0.0/16%eth0",
		"239.1.1.0/24%eth0",
		"239.1.0.0/16%eth0",
		"239.1.0.0/16%eth+",
		"239.1.0.0/16%+",
	} {
		order = append(order, mustInput(t, s))
	}
	for i, a := range order {
		for j, b := range order {
			if Before(a, b) != (i < j) {
				t.Errorf("Before(%v, %v) is %v", a, b, i >= j)
			}
			if !a.Overlaps(b) {
				t.Errorf("%v and %v do not overlap", a, b)
			}
			if w, ok := Winner(a, b); !ok || w != order[min(i, j)] {
				t.Errorf("Winner(%v, %v) = %v, %v", a, b, w, ok)
			}
		}
	}
}

func TestInputOverlaps(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"239.1.1.1:1%eth0", "239.1.1.1:1%eth0", true},
		{"239.1.1.1:1%eth0,from=host", "239.1.1.1:1%eth0", false},
		{"239.1.1.1:1%eth0,from=host", "239.1.0.0/16%eth+,from=host", true},
		{"224.0.0.0/4%eth0", "224.0.0.251:1%eth0", false},
		{"224.0.0.0/4%eth0", "224.0.1.251:1%eth0", true},
		{"[ff00::]/8%eth0", "[ff02::fb]:1%eth0", false},
		{"[ff00::]/8%eth0", "[ff05::fb]:1%eth0", true},
		{"239.1.1.1:1-5%eth0", "239.1.1.1:5-9%eth0", true},
		{"239.1.1.1:1-5%eth0", "239.1.1.1:6-9%eth0", false},
		{"10.0.0.0/8@239.1.1.1:1%eth0", "10.1.0.0/16@239.1.1.1:1%eth0", true},
		{"10.0.0.0/8@239.1.1.1:1%eth0", "11.0.0.1@239.1.1.1:1%eth0", false},
		{"239.1.1.1:1%eth0", "239.1.1.1:2%eth0", false},
		{"239.1.1.1:1%eth0", "239.1.1.1%eth0", true},
		{"239.1.1.1:1%eth0", "239.1.1.2%eth0", false},
		{"239.1.1.1:1%eth0", "239.1.1.1:1%eth1", false},
		{"239.1.1.1:1%eth0", "239.1.1.1:1%eth+", true},
		{"239.1.1.1:1%eth", "239.1.1.1:1%eth+", true},
		{"239.1.1.1:1%et", "239.1.1.1:1%eth+", false},
		{"239.1.1.1:1%eth1+", "239.1.1.1:1%eth+", true},
		{"239.1.1.1:1%eth1+", "239.1.1.1:1%eth2+", false},
		{"239.1.1.1:1%wan0", "239.1.1.1:1%+", true},
		{"239.1.1.1:1%eth0,vlan=7", "239.1.1.1:1%eth0", false},
		{"239.1.1.1:1%eth0,vlan=7", "239.1.1.1:1%eth0,vlan=7", true},
		{"239.1.1.1:1%eth0,vlan=7", "239.1.1.1:1%eth0,vlan=8.7", false},
		{"239.1.0.0/16:1%eth0", "239.1.1.1:1%eth0", true},
		{"239.1.0.0/16:1%eth0", "239.2.1.1:1%eth0", false},
		{"239.1.0.0/16:1%eth0", "239.0.0.0/8%eth0", true},
		{"239.1.0.0/16:1%eth0", "239.2.0.0/16%eth0", false},
		{"10.0.0.5@239.1.0.0/16%eth0", "10.0.0.6@239.1.0.0/16%eth0", false},
		{"10.0.0.5@239.1.0.0/16%eth0", "239.1.1.1:1%eth0", true},
		{"10.0.0.1%eth0", "10.0.0.1:5%eth0", true},
		{"10.0.0.1%eth0", "10.0.0.2:5%eth0", false},
		{"[ff1e:1::]/64%eth0", "[ff1e:1::5]:1%eth0", true},
		{"[ff1e:1::]/64%eth0", "[ff1e:2::5]:1%eth0", false},
		{"[ff1e:1::]/64%eth0", "239.1.1.1:1%eth0", false},
	} {
		a, b := mustInput(t, c.a), mustInput(t, c.b)
		if a.Overlaps(b) != c.want || b.Overlaps(a) != c.want {
			t.Errorf("%s and %s: overlap %v, %v, want %v", c.a, c.b, a.Overlaps(b), b.Overlaps(a), c.want)
		}
	}
	if (Input{}).Overlaps(Input{}) {
		t.Error("the zero input overlaps")
	}
}

// TestOrderOfRandomInputs: Before and Compare are strict total orders that agree
// with the packets.
func TestOrderOfRandomInputs(t *testing.T) {
	random := rand.New(rand.NewPCG(9, 10))
	packets := allPackets()
	for range 5000 {
		a, b, c := randomInput(random), randomInput(random), randomInput(random)
		overlap := slices.ContainsFunc(packets, func(p packet) bool { return p.matches(a) && p.matches(b) })
		if a.Overlaps(b) != overlap || b.Overlaps(a) != overlap {
			t.Fatalf("%v and %v: overlap %v, want %v", a, b, a.Overlaps(b), overlap)
		}
		if overlap && a != b && !rangesClash(a, b) && Before(a, b) != (rank(a) > rank(b)) {
			t.Fatalf("Before(%v, %v) = %v", a, b, Before(a, b))
		}
		if Before(a, b) == Before(b, a) && a != b || Before(a, a) {
			t.Fatalf("Before(%v, %v) = %v both ways", a, b, Before(a, b))
		}
		if Before(a, b) && Before(b, c) && !Before(a, c) {
			t.Fatalf("Before: %v, %v, %v are no order", a, b, c)
		}
		if Compare(a, b) != -Compare(b, a) || (Compare(a, b) == 0) != (a == b) {
			t.Fatalf("Compare(%v, %v) = %d, the reverse %d", a, b, Compare(a, b), Compare(b, a))
		}
		if Compare(a, b) < 0 && Compare(b, c) < 0 && Compare(a, c) >= 0 {
			t.Fatalf("Compare: %v, %v, %v are no order", a, b, c)
		}
		if overlap && a != b && (a.Port == b.Port || a.PortTo+b.PortTo == 0) && !rangesClash(a, b) && a.Interface == b.Interface && a.Address == b.Address && Before(a, b) != (Compare(a, b) < 0) {
			t.Fatalf("%v and %v: Before %v, Compare %d", a, b, Before(a, b), Compare(a, b))
		}
	}
}

func TestOverlaps(t *testing.T) {
	rules := mustRules(t,
		"all 239.0.0.0/8%+ -> 239.9.9.9:1%x",
		"site 239.1.0.0/16%eth+ -> 239.9.9.9:1%x",
		"one 239.1.1.1:5000%eth0 -> 239.9.9.9:1%x",
		"from 10.0.0.5@239.1.1.1:5000%eth0 -> 239.9.9.9:1%x",
		"other 10.0.0.6@239.1.1.1:5000%eth0 -> 239.9.9.9:1%x",
		"away 239.2.1.1%wan0 -> 239.9.9.9:1%x",
		"alone 10.0.0.1:1%eth0 -> 239.9.9.9:1%x",
		"tagged 239.1.1.1:5000%eth0,vlan=7 -> 239.9.9.9:1%x",
	)
	want := []string{
		"from> other> one> away> site>",
		"from> other> one> all<",
		"from> other> site< all<",
		"one< site< all<",
		"one< site< all<",
		"all<",
		"",
		"",
	}
	for i, list := range Overlaps(rules, 10) {
		var words []string
		for _, o := range list {
			words = append(words, rules[o.Rule].Name+map[bool]string{true: ">", false: "<"}[o.Wins])
		}
		if got := strings.Join(words, " "); got != want[i] {
			t.Errorf("%s: %q, want %q", rules[i].Name, got, want[i])
		}
	}
	for _, list := range Overlaps(rules, 2) {
		if len(list) > 2 {
			t.Errorf("limit 2: %v", list)
		}
	}
	if got := Overlaps(rules, 0); len(got) != len(rules) || got[0] != nil {
		t.Errorf("limit 0: %v", got)
	}
}

// TestOverlapsOfEqualInputs: a set that is not valid, of one input twice.
func TestOverlapsOfEqualInputs(t *testing.T) {
	rules := mustRules(t, "a 239.1.1.1:1%eth0 -> 239.9.9.9:1%x", "b 239.1.1.1:1%eth0 -> 239.9.9.9:1%x")
	got := Overlaps(append(rules, Rule{}, Rule{Name: "c", In: Input{Interface: "+", Len: 200}}), 10)
	if len(got) != 4 || got[0] != nil || !slices.Equal(got[1], []Overlap{{Rule: 0, Wins: true}}) || got[2] != nil || got[3] != nil {
		t.Errorf("%v", got)
	}
}

// TestOverlapsAgainstAllPairs compares with a look at every pair.
func TestOverlapsAgainstAllPairs(t *testing.T) {
	random := rand.New(rand.NewPCG(11, 12))
	for range 100 {
		rules := randomRules(random, 60)
		got, some := Overlaps(rules, len(rules)), Overlaps(rules, 3)
		for i, r := range rules {
			var want []Overlap
			for j, o := range rules {
				if i == j {
					continue
				}
				if w, ok := Winner(r.In, o.In); ok && !o.excludes(r.In.traffic()) {
					want = append(want, Overlap{j, w == o.In})
				}
			}
			slices.SortFunc(want, func(a, b Overlap) int {
				if Before(rules[a.Rule].In, rules[b.Rule].In) {
					return -1
				}
				return 1
			})
			if !slices.Equal(got[i], want) {
				t.Fatalf("%v: %v, want %v", r, got[i], want)
			}
			if len(some[i]) != min(3, len(want)) {
				t.Fatalf("%v: %d of %d, limit 3", r, len(some[i]), len(want))
			}
			for _, o := range some[i] {
				if !slices.Contains(want, o) {
					t.Fatalf("%v: %v is not among %v", r, o, want)
				}
			}
		}
	}
}

// FuzzOverlap holds the order, the overlap and the loops of two inputs to their laws.
func FuzzOverlap(f *testing.F) {
	for _, s := range []string{"239.1.1.1:1%eth0", "239.1.0.0/16%eth+", "10.0.0.5@239.1.1.1:1%+,vlan=7", "[ff1e::]/16%a", "[2001:db8::1]:9%b", "0.0.0.0/1%+"} {
		f.Add(s, s, "239.2.0.0/16:+9%eth+,vlan=pop,src=keep")
		f.Add(s, "239.0.0.0/8%eth0", "239.1.1.1%eth0,src=10.0.0.5")
	}
	f.Fuzz(func(t *testing.T, first, second, output string) {
		a, acceptA, errA := ParseInput(first)
		b, acceptB, errB := ParseInput(second)
		o, errO := ParseOutput(output)
		if errA != nil || errB != nil || errO != nil {
			return
		}
		if a.Overlaps(b) != b.Overlaps(a) || !a.Overlaps(a) {
			t.Errorf("%v and %v: overlap %v, %v", a, b, a.Overlaps(b), b.Overlaps(a))
		}
		if Before(a, b) == Before(b, a) && a != b {
			t.Errorf("Before(%v, %v) = %v both ways", a, b, Before(a, b))
		}
		rules := []Rule{{Name: "a", In: a, Accept: acceptA, Out: []Output{o}}, {Name: "b", In: b, Accept: acceptB, Out: []Output{o}}}
		if got := Overlaps(rules, 2); a != b && acceptB.Except() == nil && (len(got[0]) == 1) != a.Overlaps(b) {
			t.Errorf("%v and %v: %v", a, b, got)
		}
		if mirror, ok := mirrorRule(rules[0]); ok && !acceptA.AllowLoop && acceptA.Except() == nil && ValidateSet([]Rule{rules[0], mirror}) == nil {
			t.Errorf("%v and %v: no loop", rules[0], mirror)
		}
	})
}

func BenchmarkOverlaps(b *testing.B) {
	mixed := camRules(manyRules)
	for i := range mixed {
		switch i % 10 {
		case 0:
			mixed[i].In.Port = 0
		case 1:
			mixed[i].In.Len = 24
			mixed[i].In.Address = mixed[i].In.Prefix().Masked().Addr()
		case 2:
			mixed[i].In.Interface = "eth+"
		}
	}
	all := append(camRules(manyRules), mustRule(b, "all 239.0.0.0/8%eth+ -> 239.1.1.1:1%x"))
	for _, set := range []struct {
		name  string
		rules []Rule
	}{{"exact", camRules(manyRules)}, {"mixed", mixed}, {"one over all", all}, {"fan", fanRules(manyRules)}} {
		b.Run(set.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				Overlaps(set.rules, 10)
			}
		})
	}
}
