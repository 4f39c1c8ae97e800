package rules

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"xdpcast/internal/labtest"
)

// A summary admits only rules with which the set stays valid, whatever came and went before; and those
// of sets whose inputs and outputs are on different interfaces unless something is wrong.
func TestSummary(t *testing.T) {
	admitted, refused, releases, kept := 0, 0, 0, 0
	for seed := range labtest.Soak(200, 2000) {
		random := rand.New(rand.NewPCG(uint64(200+seed), 1)) // from 200 on, rules that others need come soon
		pick := func(from ...string) string { return from[random.IntN(len(from))] }
		shared := seed%2 == 0
		ins, outs := []string{"in0", "in1", "in+", "both"}, []string{"out0", "out1", "out+"}
		if shared {
			ins, outs = append(ins, "out0", "ou+"), append(outs, "in0", "both", "+")
		}
		s := NewSummary()
		var set []Rule
		for step := range 60 {
			if len(set) > 0 && random.IntN(4) == 0 {
				at := random.IntN(len(set))
				without := slices.Delete(slices.Clone(set), at, at+1)
				err := ValidateSet(without)
				switch released := s.Releases(&set[at]); {
				case released && err != nil:
					t.Fatalf("seed %d: %v is released: %v", seed, set[at], err)
				case released:
					releases++
				case err != nil:
					kept++
					continue
				}
				s.Remove(&set[at])
				set = without
			}
			r := Rule{Name: fmt.Sprint("r", step)}
			in := pick("239.1.1.1", "239.1.1.2", "10.0.0.1@239.1.1.1", "10.0.0.0/8@239.1.1.1") + pick(":5000", ":5001", "", ":5000-5003") + "%" + pick(ins...) + pick("", "", ",vlan=7")
			if random.IntN(8) == 0 {
				in += " " + pick("239.1.1.3", "239.1.1.1") + ":5000%" + pick("in0", "in1")
				if err := r.ParseStream("rtp", ""); err != nil {
					t.Fatal(err)
				}
			}
			if err := r.ParseInputs(in); err != nil {
				t.Fatal(err)
			}
			for range 1 + random.IntN(2) {
				o, err := ParseOutput(pick("239.1.1.1", "239.1.1.2", "239.2.2.2", "10.9.9.9") + pick(":5000", ":6000") + "%" + pick(outs...))
				if err != nil {
					t.Fatal(err)
				}
				r.Out = append(r.Out, o)
			}
			if r.Validate() != nil {
				continue
			}
			err := ValidateSet(append(slices.Clone(set), r))
			switch admits := s.Admits(&r); {
			case admits && err != nil:
				t.Fatalf("seed %d: %v is admitted: %v", seed, r, err)
			case admits:
				admitted++
			case err == nil:
				refused++
			}
			if err == nil {
				s.Add(&r)
				set = append(set, r)
			}
		}
		for i := range set {
			s.Remove(&set[i])
		}
		if len(s.inputs)+len(s.ins)+len(s.outs)+s.ranges != 0 {
			t.Fatalf("seed %d: a set without rules leaves %+v", seed, s)
		}
	}
	if admitted < 100 || refused < 100 {
		t.Errorf("%d rules are admitted, and %d are left to ValidateSet: the test shows little", admitted, refused)
	}
	if releases < 100 || kept < 1 {
		t.Errorf("%d rules are released, and %d are needed: the test shows little", releases, kept)
	}
}

// BenchmarkSummary measures what checking one rule more costs beside many.
func BenchmarkSummary(b *testing.B) {
	for _, count := range []int{1_000, 100_000} {
		s := NewSummary()
		for i := range count {
			s.Add(&Rule{Name: fmt.Sprint("r", i), In: Input{Interface: "in0", Address: benchAddr(i), Port: 5000}, Out: []Output{{Interface: "out0", Address: benchAddr(i), Port: 6000}}})
		}
		one := Rule{Name: "one", In: Input{Interface: "in0", Address: benchAddr(count), Port: 5000}, Out: []Output{{Interface: "out0", Address: benchAddr(count), Port: 6000}}}
		b.Run(fmt.Sprintf("rules=%d", count), func(b *testing.B) {
			for b.Loop() {
				if !s.Admits(&one) {
					b.Fatal("it is not admitted")
				}
				s.Add(&one)
				s.Remove(&one)
			}
		})
	}
}

func benchAddr(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{239, byte(1 + i>>16), byte(i >> 8), byte(i)})
}
