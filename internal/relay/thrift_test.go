package relay

import (
	"runtime"
	"runtime/debug"
	"testing"
	"time"
	"weak"

	"github.com/vishvananda/netlink"

	"xdpcast/internal/labtest"
	"xdpcast/internal/plan"
)

// Garbage is collected earlier between begin and end, unless it is already, or never by its share; afterwards it is as
// before.
func TestThrift(t *testing.T) {
	original := debug.SetGCPercent(100)
	defer debug.SetGCPercent(original)
	for _, tt := range []struct{ before, during int }{{100, busyGarbage}, {400, busyGarbage}, {busyGarbage, busyGarbage}, {20, 20}, {-1, -1}} {
		debug.SetGCPercent(tt.before)
		percent := func() int {
			now := debug.SetGCPercent(tt.before)
			debug.SetGCPercent(now)
			return now
		}
		var one thrift
		one.end()
		for _, during := range []int{tt.during, tt.during} {
			if one.begin(); percent() != during {
				t.Errorf("%d%% during %d%%, want %d%%", percent(), tt.before, during)
			}
		}
		for range 2 {
			if one.end(); percent() != tt.before {
				t.Errorf("%d%% after %d%%", percent(), tt.before)
			}
		}
	}
}

// heapOfRule is how many bytes of the heap a rule may take, with a membership and one output or two: the rule, its plan, its flow,
// and where tables, memberships and history refer to them.
const heapOfRule = 1400

// A rule takes little memory, also after it was planned again: what was joined, left or published for the plan before does
// not keep that.
func TestHeapOfRules(t *testing.T) {
	const count = 10_000
	p := newPlace(t)
	p.opts.observeEvery = 50 * time.Millisecond
	p.opts.Loader.MaxRules, p.opts.Loader.MaxOutputs = 2*count, 4*count
	r := p.start()
	heap := func() int {
		runtime.GC()
		runtime.GC() // what finalizers and weak pointers kept until the first
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int(m.HeapAlloc)
	}
	without := heap()
	apply(t, r, scaleRules(count, count))
	look := func() (rule weak.Pointer[plan.RulePlan], settled bool) {
		t.Helper()
		if err := r.do(t.Context(), func() error {
			rule, settled = weak.Make(r.plan.Rules[0]), !r.stale && r.memberships.look == nil
			for _, rule := range r.plan.Rules {
				settled = settled && rule.Complete()
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return rule, settled
	}
	labtest.Eventually(t, "all rules are active", func() bool { _, settled := look(); return settled })
	old, _ := look()
	// All rules are planned again, and need the same memberships.
	if err := p.host.Do(func() error {
		link, err := netlink.LinkByName("in0")
		if err != nil {
			return err
		}
		return netlink.LinkSetMTU(link, 1400)
	}); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "another plan is made", func() bool { now, settled := look(); return now != old && settled })
	labtest.Eventually(t, "the old one is forgotten", func() bool {
		runtime.GC()
		return old.Value() == nil
	})
	each := 0
	for range 10 { // the least: a look at the memberships may be in memory
		if now := (heap() - without) / count; each == 0 || now < each {
			each = now
		}
		labtest.Eventually(t, "no look at the memberships is in progress", func() bool { _, settled := look(); return settled })
	}
	if t.Logf("%d bytes for each rule", each); each > heapOfRule {
		t.Errorf("a rule takes %d bytes of the heap, want at most %d", each, heapOfRule)
	}
}
