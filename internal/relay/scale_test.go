package relay

import (
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/internal/plan"
	"xdpcast/pkg/rules"
)

// scaleRules are many rules on in0, with one output or two, that want so many
// different groups.
func scaleRules(count, groups int) []rules.Rule {
	all := make([]rules.Rule, count)
	group := func(first byte, i int) netip.Addr {
		return netip.AddrFrom4([4]byte{239, first, byte(i >> 8), byte(i)}) // 65,536 in one second byte
	}
	for i := range all {
		g := i % groups
		r := rules.Rule{
			Name: fmt.Sprintf("rule-%06d", i),
			In:   rules.Input{Interface: "in0", Address: group(byte(1+g>>16), g), Port: uint16(5000 + i/groups)},
			Out:  []rules.Output{{Interface: "out0", Address: group(byte(100+i>>16), i), Port: 6000}},
		}
		if i%2 == 1 {
			r.Out = append(r.Out, rules.Output{Interface: "out1", Address: group(byte(100+i>>16), i), Port: 6000})
		}
		all[i] = r
	}
	return all
}

// BenchmarkApply measures what applying a rule set costs the control loop, apart
// from reading and validating it, and what one rule more costs then. The part of
// the kernel's tables (loader.Sync) is given by itself.
func BenchmarkApply(b *testing.B) {
	for _, groups := range []int{1_000, 100_000} {
		b.Run(fmt.Sprintf("rules=100000/groups=%d", groups), func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				p := newPlace(b)
				p.opts.Loader.MaxRules, p.opts.Loader.MaxOutputs = 1<<18, 1<<19
				r := p.start()
				all := scaleRules(100_000, groups)
				b.StartTimer()
				apply(b, r, all)
				b.StopTimer()
				all = nil
				debug.FreeOSMemory()
				b.ReportMetric(float64(residentBytes(b))/1e6, "MB-resident")
				runtime.GC()
				var m runtime.MemStats
				runtime.ReadMemStats(&m)
				b.ReportMetric(float64(m.HeapAlloc)/1e6, "MB-live")
				one := scaleRules(100_001, 100_001)[100_000]
				one.Name = "one-more"
				started := time.Now()
				apply(b, r, []rules.Rule{one})
				b.ReportMetric(float64(time.Since(started).Microseconds()), "µs/one-more")
				started = time.Now()
				if err := r.do(b.Context(), func() error { return r.replace(edit{remove: []string{"one-more"}}, false) }); err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64(time.Since(started).Microseconds()), "µs/one-less")
				started = time.Now()
				if err := r.do(b.Context(), func() error { return r.reconcile(nil) }); err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64(time.Since(started).Microseconds()), "µs/nothing")
				r.stop()
				r.Relay = nil // the test's cleanup holds r, and the next iteration measures live memory
				b.StartTimer()
			}
		})
	}
}

// apply puts rules in as AddRule and Apply do once they are validated.
func apply(t testing.TB, r *running, all []rules.Rule) {
	t.Helper()
	var e edit
	for _, rule := range all {
		e.put = append(e.put, &plan.Rule{Rule: rule, Origin: plan.OriginFile})
	}
	if err := r.do(t.Context(), func() error { return r.replace(e, false) }); err != nil {
		t.Fatal(err)
	}
}

func residentBytes(t testing.TB) int {
	t.Helper()
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "VmRSS:")
	var kB int
	if _, err := fmt.Sscan(rest, &kB); err != nil {
		t.Fatal(err)
	}
	return kB << 10
}

// BenchmarkRestart measures how long a new process takes until it has taken over the
// programs and maps of the last one, and joined all groups again.
func BenchmarkRestart(b *testing.B) {
	for _, count := range []int{3, 10_000, 100_000} {
		b.Run(fmt.Sprintf("rules=%d", count), func(b *testing.B) {
			p := newPlace(b)
			p.opts.Loader.MaxRules, p.opts.Loader.MaxOutputs = 0, 0
			text := strings.Builder{}
			text.WriteString("rules:\n")
			for _, r := range scaleRules(count, count) {
				fmt.Fprintf(&text, "  - {name: %s, in: %v, out: [%q]}\n", r.Name, r.In, r.Out[0])
			}
			p.opts.ConfigFile = p.file("rules.yaml", text.String())
			r := p.start()
			for b.Loop() {
				b.StopTimer()
				r.stop()
				b.StartTimer()
				r = p.start()
			}
			b.StopTimer()
			status, err := r.Status(b.Context())
			if err != nil || status.Active != count {
				b.Fatalf("status is %+v, %v", status, err)
			}
		})
	}
}

// BenchmarkChange measures what one rule more and one less cost with many others.
func BenchmarkChange(b *testing.B) {
	for _, count := range []int{10_000, 100_000} {
		b.Run(fmt.Sprintf("rules=%d", count), func(b *testing.B) {
			p := newPlace(b)
			p.opts.observeEvery = time.Hour
			p.opts.Loader.MaxRules, p.opts.Loader.MaxOutputs = 1<<18, 1<<19
			r := p.start()
			all := scaleRules(count+1, count+1)
			apply(b, r, all[:count])
			one := []rules.Rule{all[count]}
			for b.Loop() {
				apply(b, r, one)
				if err := r.do(b.Context(), func() error { return r.replace(edit{remove: []string{one[0].Name}}, false) }); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkAddRule measures what adding and deleting a rule through the API costs with many others,
// which are of the API, too: validation, the saved file and the history are part of it.
func BenchmarkAddRule(b *testing.B) {
	for _, count := range []int{1_000, 100_000} {
		b.Run(fmt.Sprintf("rules=%d", count), func(b *testing.B) {
			p := newPlace(b)
			p.opts.observeEvery = time.Hour
			p.opts.Loader.MaxRules, p.opts.Loader.MaxOutputs = 1<<18, 1<<19
			r := p.start()
			all := scaleRules(count+1, count+1)
			if _, err := r.Apply(b.Context(), all[:count], control.ApplyOptions{MaxChanges: 1}); err != nil {
				b.Fatal(err)
			}
			one := all[count]
			one.Name = "rule-000500-more"
			for b.Loop() {
				if _, err := r.AddRule(b.Context(), control.FromRule(one)); err != nil {
					b.Fatal(err)
				}
				if err := r.DeleteRule(b.Context(), one.Name); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkEvent measures what an event costs the control loop that touches an interface which
// no rule names.
func BenchmarkEvent(b *testing.B) {
	for _, count := range []int{10_000, 100_000} {
		b.Run(fmt.Sprintf("rules=%d", count), func(b *testing.B) {
			p := newPlace(b)
			p.opts.observeEvery = time.Hour
			p.opts.Loader.MaxRules, p.opts.Loader.MaxOutputs = 1<<18, 1<<19
			r := p.start()
			apply(b, r, scaleRules(count, 1000))
			p.connect("other0", "10.77.0.1/24")
			for i := 0; b.Loop(); i++ {
				b.StopTimer()
				if err := p.host.AddAddr("other0", fmt.Sprintf("10.78.%d.%d/24", i>>8&255, i&255)); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				if err := r.do(b.Context(), func() error { return r.reconcile(nil) }); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// An event that touches an interface which no rule names leaves all rules as they were planned.
func TestUnrelatedInterface(t *testing.T) {
	p := newPlace(t)
	p.opts.Loader.MaxRules, p.opts.Loader.MaxOutputs = 1024, 2048
	r := p.start()
	apply(t, r, scaleRules(500, 500))
	planned := func() (all []*plan.RulePlan, links int) {
		t.Helper()
		if err := r.do(t.Context(), func() error {
			all, links = r.plan.Rules, len(r.network.Links())
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return all, links
	}
	before, had := planned()
	p.connect("other0", "10.77.0.1/24")
	var after []*plan.RulePlan
	labtest.Eventually(t, "the relay knows of the interface", func() bool {
		var links int
		after, links = planned()
		return links == had+1
	})
	if !slices.Equal(before, after) {
		t.Error("rules were planned again")
	}
}

// With very many groups, what is joined is read beside the control loop, which hears of what was lost
// all the same.
func TestLooksBesideTheLoop(t *testing.T) {
	p := newPlace(t)
	p.opts.Loader.MaxRules, p.opts.Loader.MaxOutputs = 4096, 8192
	p.opts.observeEvery = 50 * time.Millisecond
	r := p.start()
	apply(t, r, scaleRules(quickLen+1, quickLen+1))
	looked := func() (at time.Time, took time.Duration) {
		t.Helper()
		if err := r.do(t.Context(), func() error { at, took = r.memberships.observed, r.memberships.took; return nil }); err != nil {
			t.Fatal(err)
		}
		return at, took
	}
	labtest.Eventually(t, "the first look is done", func() bool { at, _ := looked(); return !at.IsZero() })
	lost := netip.AddrFrom4([4]byte{239, 1, 0, 7})
	if err := r.do(t.Context(), func() error {
		// It takes long, and was a long time ago: the next one is beside the loop.
		r.memberships.observed, r.memberships.took = time.Time{}, time.Hour
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := p.host.Excursion(lab.End{Host: p.host, Name: "in0", Addrs: []string{"10.0.0.1/24"}}, labtest.Host(t, "away")); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "all groups are joined again", func() bool {
		groups := strings.Count(p.groups(), "in0 group")
		held := false
		_ = r.do(t.Context(), func() error {
			for m := range r.plan.Memberships() {
				held = held || m.Group == lost && r.memberships.manager.Holds(joinable(m, ""))
			}
			return nil
		})
		return groups > quickLen && held
	})
	labtest.Eventually(t, "another look is done", func() bool { _, took := looked(); return took != time.Hour })
}

// A look at few groups was quick; one at many is beside the control loop even so.
func TestManyGroupsAfterFew(t *testing.T) {
	p := newPlace(t)
	p.opts.Loader.MaxRules, p.opts.Loader.MaxOutputs = 4096, 8192
	p.opts.observeEvery = time.Hour
	r := p.start()
	look := func() (beside bool) {
		t.Helper()
		if err := r.do(t.Context(), func() error {
			err := r.memberships.observe(true)
			beside = r.memberships.look != nil // until the loop goes on
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return beside
	}
	apply(t, r, scaleRules(quickLen+1, quickLen+1)[:1])
	labtest.Eventually(t, "a look at one group is quick", func() bool {
		beside := look()
		if beside { // on a busy machine
			_ = r.do(t.Context(), func() error { r.memberships.took = 0; return nil })
		}
		return !beside
	})
	_ = r.do(t.Context(), func() error { r.memberships.took = 0; return nil })
	apply(t, r, scaleRules(quickLen+1, quickLen+1))
	if !look() {
		t.Errorf("the control loop looked at %d groups itself", quickLen+1)
	}
}

// BenchmarkLooks measures what those who look cost the control loop, with 10,000 rules of four outputs: Stats of
// each scrape and of pages, Matched of the page's history.
func BenchmarkLooks(b *testing.B) {
	p := newPlace(b)
	p.opts.Loader.MaxRules, p.opts.Loader.MaxOutputs = 1<<14, 1<<16
	r := p.start()
	const many = 10_000
	all := scaleRules(many, many)
	for i := range all {
		all[i].Out = nil
		for slot := range 4 {
			group := netip.AddrFrom4([4]byte{239, byte(100 + slot), byte(i >> 8), byte(i)})
			all[i].Out = append(all[i].Out, rules.Output{Interface: []string{"out0", "out1"}[slot%2], Address: group, Port: 6000})
		}
	}
	apply(b, r, all)
	b.Run("stats", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if s, err := r.Stats(b.Context()); err != nil || len(s.Rules) != many {
				b.Fatal(len(s.Rules), err)
			}
		}
	})
	b.Run("matched", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if m, err := r.Matched(b.Context()); err != nil || len(m) != many {
				b.Fatal(len(m), err)
			}
		}
	})
}

// Very many groups are joined beside publishing the flows, in the relay's network namespace. One that
// cannot be joined holds back only its own rule, and is joined when it can be.
func TestJoinsAhead(t *testing.T) {
	p := newPlace(t)
	system := newFaulty()
	p.opts.Membership.System = system
	p.opts.Loader.MaxRules, p.opts.Loader.MaxOutputs = 8192, 16384
	r := p.start()
	const count = manyJoins + 100
	all := scaleRules(count, count)
	bad := all[count/2]
	group := bad.In.Address.As4()
	system.fail(unix.ENOBUFS, string(group[:]))
	apply(t, r, all)
	states := func() (active int, other string) {
		t.Helper()
		if err := r.do(t.Context(), func() error {
			for _, rule := range r.plan.Rules {
				if rule.State == plan.Active {
					active++
				} else {
					other += rule.Rule.Name
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return active, other
	}
	if active, other := states(); active != count-1 || other != bad.Name {
		t.Errorf("%d rules are active, want all %d but %s: %s are not", active, count, bad.Name, other)
	}
	if joined := strings.Count(p.groups(), "in0 group"); joined < count-1 {
		t.Errorf("%d groups are joined, want %d", joined, count-1)
	}
	system.fail(nil, "")
	labtest.Eventually(t, "the last group is joined", func() bool { active, _ := states(); return active == count })
	// All are left again, by the difference and as a whole.
	for _, rest := range [][]string{{all[0].Name}, nil} {
		e := edit{remove: rest}
		if rest == nil {
			for _, rule := range all[1:] {
				e.remove = append(e.remove, rule.Name)
			}
		}
		if err := r.do(t.Context(), func() error { return r.replace(e, false) }); err != nil {
			t.Fatal(err)
		}
	}
	if held := r.memberships.manager.Len(); held != 0 {
		t.Errorf("%d groups are held without rules", held)
	}
}
