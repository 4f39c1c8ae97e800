package plan

import (
	"fmt"
	"net/netip"
	"runtime"
	"testing"

	"xdpcast/internal/network"
	"xdpcast/pkg/rules"
)

// manyRules are rules on in0 that want a group each, with one output or two, and some on other
// links.
func manyRules(count int) []*Rule {
	all := make([]*Rule, count)
	group := func(first byte, i int) netip.Addr {
		return netip.AddrFrom4([4]byte{239, first + byte(i>>16), byte(i >> 8), byte(i)})
	}
	for i := range all {
		r := &Rule{Origin: OriginFile, Rule: rules.Rule{
			Name: fmt.Sprintf("rule-%06d", i),
			In:   rules.Input{Interface: "in0", Address: group(1, i), Port: 5000},
			Out:  []rules.Output{{Interface: "out0", Address: group(100, i), Port: 6000}},
		}}
		if i%2 == 1 {
			r.Out = append(r.Out, rules.Output{Interface: "out1", Address: group(100, i), Port: 6000})
		}
		all[i] = r
	}
	return all
}

// manyWorld is one in which these rules are in force, and one more on links of its own.
func manyWorld(t testing.TB, count int) World {
	w := newWorld(t, []string{"in0 10.0.0.1", "out0 10.1.0.1", "out1 10.2.0.1", "in9 10.8.0.1", "out9 10.9.0.1"})
	w.Rules = append(manyRules(count), parseRule(t, "some: 239.9.9.9:5000%in9 -> 239.9.9.8:5000%out9"))
	for range 2 {
		p := Make(w, Options{})
		w.Answers.Carried = inForce(p)
		for m := range p.Memberships() {
			w.Answers.Joined[m] = Join{Joined: true, Tries: 1}
		}
	}
	return w
}

// flip gives the snapshot with a link up, and with it down.
func flip(w *World, name string) [2]*network.Snapshot {
	down := make([]*network.Link, 0, 5)
	for _, l := range w.Network.Links() {
		if l.Name == name {
			changed := *l
			changed.Up, changed.Carrier = false, false
			l = &changed
		}
		down = append(down, l)
	}
	return [2]*network.Snapshot{network.NewSnapshot(down, nil), w.Network}
}

// BenchmarkPlan measures what the control loop pays for a plan: anew, when an interface of one rule
// changes, when one of all rules does, when nothing does, and when a rule comes.
func BenchmarkPlan(b *testing.B) {
	for _, count := range []int{10_000, 100_000} {
		w := manyWorld(b, count)
		b.Run(fmt.Sprintf("rules=%d/anew", count), func(b *testing.B) {
			for b.Loop() {
				Make(w, Options{})
			}
		})
		for _, name := range []string{"out9", "out1"} {
			b.Run(fmt.Sprintf("rules=%d/link=%s", count, name), func(b *testing.B) {
				planner := New(Options{})
				planner.Plan(w)
				w, snapshots := w, flip(&w, name)
				for i := 0; b.Loop(); i++ {
					w.Network = snapshots[i%2]
					planner.Plan(w)
				}
			})
		}
		b.Run(fmt.Sprintf("rules=%d/nothing", count), func(b *testing.B) {
			planner := New(Options{})
			planner.Plan(w)
			for b.Loop() {
				planner.Plan(w)
			}
		})
		b.Run(fmt.Sprintf("rules=%d/rule", count), func(b *testing.B) {
			planner := New(Options{})
			planner.Plan(w)
			w := w
			sets := [2][]*Rule{w.Rules[1:], w.Rules}
			for i := 0; b.Loop(); i++ {
				w.Rules = sets[i%2]
				planner.Plan(w)
			}
		})
		b.Run(fmt.Sprintf("rules=%d/rule, paths known", count), func(b *testing.B) {
			planner := New(Options{})
			planner.Plan(w)
			w := w
			w.Answers.Recarried = []string{}
			sets := [2][]*Rule{w.Rules[1:], w.Rules}
			for i := 0; b.Loop(); i++ {
				w.Rules = sets[i%2]
				planner.Plan(w)
			}
		})
		b.Run(fmt.Sprintf("rules=%d/memory", count), func(b *testing.B) {
			for b.Loop() {
				before := heap()
				planner := New(Options{})
				planner.Plan(w)
				b.ReportMetric(float64(heap()-before)/float64(count), "B/rule")
				runtime.KeepAlive(planner)
			}
		})
	}
}

func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// TestUntouchedRulesKeepTheirPlans: an event costs in proportion to the rules that depend on it.
func TestUntouchedRulesKeepTheirPlans(t *testing.T) {
	w := manyWorld(t, 1000)
	planner := New(Options{})
	before := planner.Plan(w)
	planned := func(what string, want int) {
		t.Helper()
		after := planner.Plan(w)
		count := 0
		for i := range after.Rules {
			if after.Rules[i] != before.Rules[i] {
				count++
			}
		}
		if count != want {
			t.Errorf("%s: %d rules are planned again, want %d", what, count, want)
		}
		before = after
	}
	planned("nothing", 0)
	for i, want := range map[string]int{"out9": 1, "out1": 500, "in0": 1000} {
		snapshots := flip(&w, i)
		w.Network = snapshots[0]
		planned(i+" down", want)
		w.Network = snapshots[1]
		planned(i+" up", want)
	}
	w.Answers.Attached[w.link(t, "out9").LinkID] = Attached{Generic: true}
	planned("an attachment", 1)
	for m := range w.Answers.Joined {
		w.Answers.Joined[m] = Join{Err: errTaken}
		break
	}
	planned("a membership", 1)
	clear(w.Answers.Joined)
	planned("no membership", 1)
	w.Answers.Refused["some"] = errTaken
	planned("a refusal", 1)
	delete(w.Answers.Carried, "some")
	planned("a flow that is not in force", 1)
	delete(w.Answers.Refused, "some")
	planned("no refusal", 1)
	w.Answers.Carried = inForce(before)
	planned("flows that came into force as planned", 0)
}

// TestMemory bounds what a plan takes for a rule with one output or two and a group: a field
// more of what there is once a rule or once an output is 800 kB with 100,000 of them.
func TestMemory(t *testing.T) {
	const count, most = 20_000, 730 // 1.5 outputs a rule
	w := manyWorld(t, count)
	before := heap()
	planner := New(Options{})
	p := planner.Plan(w)
	if each := (heap() - before) / count; each > most {
		t.Errorf("%d bytes a rule, want %d at most", each, most)
	} else {
		t.Logf("%d bytes a rule", each)
	}
	p2 := p
	for _, snapshot := range flip(&w, "in0") {
		w.Network = snapshot
		p2 = planner.Plan(w)
	}
	shared := 0
	for i := range p.Rules {
		if p.Rules[i].Flows[0].Flow == p2.Rules[i].Flows[0].Flow {
			shared++
		}
	}
	if shared < count {
		t.Errorf("%d flows that are the same again are shared, want %d", shared, count)
	}
	runtime.KeepAlive(w)
}
