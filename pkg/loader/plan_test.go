package loader

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"testing"

	"xdpcast/pkg/flow"
)

// The checks that a plan skips for unchanged flows must not show: it refuses what a comparison
// of all flows refuses, and finds the same changes.
func TestPlanTakesNothingForGranted(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	device := &net.Interface{Index: 2, MTU: 1500, HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 1}}
	one := func() *flow.Flow {
		r := &flow.Flow{Name: fmt.Sprint("r", rng.IntN(12)), Path: flow.PathKernel}
		r.In = flow.Input{Index: 1, Group: netip.AddrFrom4([4]byte{239, 1, 1, byte(rng.IntN(4))}), Port: uint16(5000 + rng.IntN(4))}
		if rng.IntN(4) == 0 {
			r.In.PortTo = r.In.Port + uint16(1+rng.IntN(2))
		}
		r.Out = []flow.Output{output(device, netip.AddrFrom4([4]byte{239, 2, 2, byte(rng.IntN(2))}).String(), "10.1.0.1", 6000)}
		if r.In.PortTo != 0 {
			r.Out[0].DstPort, r.Out[0].PortAdd = 0, true
		}
		return r
	}
	l := &Loader{rules: map[string]*entry{}, keep: map[int]int{}, lookups: lookupCount{}}
	var inForce []*flow.Flow
	plans, refused, kept := 0, 0, 0
	for range 20_000 {
		want := slices.Clone(inForce)
		for range rng.IntN(4) {
			switch at := 0; {
			case len(want) > 0 && rng.IntN(5) == 0:
				at = rng.IntN(len(want))
				want = slices.Delete(want, at, at+1)
			case len(want) > 0 && rng.IntN(3) == 0:
				at = rng.IntN(len(want))
				same := *want[at]
				want[at] = &same // equal, at another address
			case len(want) > 0 && rng.IntN(8) == 0:
				want = append(want, want[rng.IntN(len(want))]) // duplicate
			case len(want) > 0 && rng.IntN(3) == 0:
				want[rng.IntN(len(want))] = one()
			default:
				want = append(want, one())
			}
		}
		rng.Shuffle(len(want), func(i, j int) { want[i], want[j] = want[j], want[i] })
		s := &transaction{Loader: l}
		var err error
		if rng.IntN(2) == 0 {
			err = s.plan(want)
		} else {
			err = s.planChange(want, goneOf(l, want))
		}
		if err == nil {
			err = s.claimInputs()
		}
		if err != nil {
			if err := s.takeBack(); err != nil {
				t.Fatal(err)
			}
		}
		plans++
		if right := together(want); (err == nil) != right {
			t.Fatalf("after %d plans: %v, want it accepted: %v\nin force %+v\nwanted   %+v", plans, err, right, values(inForce), values(want))
		}
		if err != nil {
			refused++
			continue
		}
		next := map[string]*entry{}
		for name, e := range l.rules {
			next[name] = e
		}
		for _, c := range s.changes {
			if c.old != nil {
				delete(next, c.old.rule.Name)
			}
			if c.new != nil && c.old != nil && c.old.rule.Equal(*c.new.rule) {
				t.Fatalf("%s changes into itself", c.new.rule.Name)
			}
		}
		kept += len(next)
		for _, c := range s.changes {
			if c.new != nil {
				next[c.new.rule.Name] = c.new
			}
		}
		if len(next) != len(want) {
			t.Fatalf("%d rules, want %d", len(next), len(want))
		}
		for _, r := range want {
			if e := next[r.Name]; e == nil || !e.rule.Equal(r.Normalized()) {
				t.Fatalf("%s is %+v, want %+v", r.Name, e, *r)
			}
		}
		for _, c := range s.changes {
			if c.old != nil {
				l.places.remove(c.old)
				l.leave(c.old)
			}
			if c.new != nil {
				l.enter(c.new)
			}
		}
		if !maps.Equal(l.rules, next) || l.places.count != len(next) {
			t.Fatalf("%d rules, %d with a place, want %d", len(l.rules), l.places.count, len(next))
		}
		inForce = want
	}
	if refused < plans/20 || kept < plans/2 || plans-refused < plans/20 {
		t.Errorf("%d plans, %d refused, %d rules kept: too few of one kind", plans, refused, kept)
	}
}

// goneOf are the names of the current rules that are not wanted.
func goneOf(l *Loader, want []*flow.Flow) (names []string) {
	for name := range l.rules {
		if !slices.ContainsFunc(want, func(r *flow.Flow) bool { return r.Name == name }) {
			names = append(names, name)
		}
	}
	return names
}

// together says, by checking all pairs, whether rules may be published together.
func together(rules []*flow.Flow) bool {
	for i, a := range rules {
		if a.Check() != nil {
			return false
		}
		for _, b := range rules[:i] {
			if a.Name == b.Name {
				return false
			}
			from, to := max(a.In.Port, b.In.Port), min(max(a.In.Port, a.In.PortTo), max(b.In.Port, b.In.PortTo))
			if a.In.Group == b.In.Group && from <= to {
				return false
			}
		}
	}
	return true
}

func values(rules []*flow.Flow) (all []flow.Flow) {
	for _, r := range rules {
		all = append(all, *r)
	}
	return all
}
