package rules

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
)

func TestCompute(t *testing.T) {
	have := mustRules(t,
		"gone1 239.1.1.1:1%eth0 -> 239.2.2.1:1%eth1",
		"same 239.1.1.2:1%eth0 -> 239.2.2.2:1%eth1",
		"moved 239.1.1.3:1%eth0 -> 239.2.2.3:1%eth1 239.2.2.4:1%eth1",
		"gone2 239.1.1.4:1%eth0 -> 239.2.2.4:1%eth1",
		"swapped 239.1.1.5:1%eth0 -> 239.2.2.5:1%eth1 239.2.2.6:1%eth1")
	want := mustRules(t,
		"new2 239.1.1.1:1%eth0 -> 239.2.2.1:1%eth1",
		"swapped 239.1.1.5:1%eth0 -> 239.2.2.6:1%eth1 239.2.2.5:1%eth1",
		"same 239.1.1.2:1%eth0 -> 239.2.2.2:1%eth1",
		"moved 239.1.1.3:7%eth0 -> 239.2.2.4:1%eth1 239.2.2.9:1%eth1,ttl=3",
		"new1 239.1.1.6:1%eth0 -> 239.2.2.1:1%eth1,src=keep")
	want[3].Path = PathKernel
	d := Compute(have, want)
	const text = `- gone2
- gone1
~ swapped out in another order
~ moved in 239.1.1.3:1%eth0 => 239.1.1.3:7%eth0; out -239.2.2.3:1%eth1 +239.2.2.9:1%eth1,ttl=3; path auto => kernel
+ new2 239.1.1.1:1%eth0 -> 239.2.2.1:1%eth1
+ new1 239.1.1.6:1%eth0 -> 239.2.2.1:1%eth1,src=keep
`
	if d.String() != text {
		t.Errorf("got:\n%swant:\n%s", d, text)
	}
	if len(d.Keep) != 1 || d.Keep[0].Name != "same" || d.Empty() {
		t.Errorf("keep %v, empty %v", d.Keep, d.Empty())
	}
	if !reflect.DeepEqual(d.Change[1], Change{Old: have[2], New: want[3]}) {
		t.Errorf("change %+v", d.Change[1])
	}
	for _, same := range [][]Rule{nil, have} {
		if d := Compute(same, slices.Clone(same)); !d.Empty() || d.String() != "" || len(d.Keep) != len(same) {
			t.Errorf("a set against itself: %+v", d)
		}
	}
}

// TestChangeOfOptions: that an option of the input alone changes is a change, and is
// said.
func TestChangeOfOptions(t *testing.T) {
	have := mustRules(t, "a 239.1.1.1:1%eth0 -> 239.2.2.1:1%eth1")
	want := slices.Clone(have)
	want[0].Accept = Acceptance{Extra: &Extra{Rate: Rate{Packets: 5}}, AllowLoop: true}
	const text = "~ a in 239.1.1.1:1%eth0 => 239.1.1.1:1%eth0,loop=allow,rate=5pps\n"
	if got := Compute(have, want).String(); got != text {
		t.Errorf("%q, want %q", got, text)
	}
}

// TestComputeProperty: the difference, applied to what there is, gives what is
// wanted; no rule is in two parts of it; it is the same each time.
func TestComputeProperty(t *testing.T) {
	random := rand.New(rand.NewPCG(7, 8))
	for range 3000 {
		have, want := randomSet(random), randomSet(random)
		d := Compute(have, want)
		set := map[string]Rule{}
		for _, r := range have {
			set[r.Name] = r
		}
		take := func(r Rule) {
			t.Helper()
			if !Equal(set[r.Name], r) {
				t.Fatalf("%v is not in the set as it stands", r)
			}
			delete(set, r.Name)
		}
		put := func(r Rule) {
			t.Helper()
			if _, ok := set[r.Name]; ok {
				t.Fatalf("%v is in the set twice", r)
			}
			set[r.Name] = r
		}
		for _, r := range d.Remove {
			take(r)
		}
		for _, c := range d.Change {
			if Equal(c.Old, c.New) {
				t.Fatalf("no change: %v", c)
			}
			take(c.Old)
			put(c.New)
		}
		for _, r := range d.Keep {
			take(r)
			put(r)
		}
		for _, r := range d.Add {
			put(r)
		}
		if len(set) != len(want) || len(want) != len(d.Add)+len(d.Change)+len(d.Keep) || len(have) != len(d.Remove)+len(d.Change)+len(d.Keep) {
			t.Fatalf("%v\n%v\n%+v", have, want, d)
		}
		for _, r := range want {
			if !Equal(set[r.Name], r) {
				t.Fatalf("got %v, want %v", set[r.Name], r)
			}
		}
		if again := Compute(have, want); !reflect.DeepEqual(d, again) {
			t.Fatalf("%+v, then %+v", d, again)
		}
	}
}

// TestComputeDuplicates: sets that ValidateSet refuses give the first of a name.
func TestComputeDuplicates(t *testing.T) {
	have := mustRules(t, "a 239.1.1.1:1%eth0 ->", "a 239.1.1.2:1%eth0 ->", "b 239.1.1.3:1%eth0 ->", "b 239.1.1.4:1%eth0 ->")
	want := mustRules(t, "a 239.1.1.1:1%eth0 ->", "a 239.1.1.9:1%eth0 ->", "c 239.1.1.3:1%eth0 ->", "c 239.1.1.4:1%eth0 ->")
	d := Compute(have, want)
	if len(d.Keep) != 1 || len(d.Change) != 0 || d.String() != "- b\n+ c 239.1.1.3:1%eth0 ->\n" {
		t.Errorf("%+v", d)
	}
}

// randomSet is up to eight of twelve names, each in one of a few shapes.
func randomSet(random *rand.Rand) []Rule {
	var rules []Rule
	for _, i := range random.Perm(12)[:random.IntN(9)] {
		r := Rule{Name: fmt.Sprintf("r%d", i), Path: Path(random.IntN(2)),
			In: Input{Interface: "eth0", Address: addr("239.1.1.1"), Port: uint16(1 + random.IntN(2))}}
		for range 1 + random.IntN(2) {
			r.Out = append(r.Out, Output{Interface: "eth1", Address: addr("239.2.2.2"), Port: uint16(1 + random.IntN(2))})
		}
		rules = append(rules, r)
	}
	return rules
}
