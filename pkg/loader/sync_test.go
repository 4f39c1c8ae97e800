package loader

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

func rulesOf(l *Loader) []flow.Flow {
	rules := l.Rules()
	slices.SortFunc(rules, func(a, b flow.Flow) int { return strings.Compare(a.Name, b.Name) })
	return rules
}

// inKernel reads the rules back, as another process sees them.
func inKernel(t testing.TB, l *Loader) []flow.Flow {
	t.Helper()
	r, err := OpenReader(l.opts.PinDir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	rules, err := r.Rules()
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(rules, func(a, b flow.Flow) int { return strings.Compare(a.Name, b.Name) })
	return rules
}

func sorted(rules []flow.Flow) []flow.Flow {
	rules = normalized(rules)
	slices.SortFunc(rules, func(a, b flow.Flow) int { return strings.Compare(a.Name, b.Name) })
	return rules
}

// sameRules compares rules. For excluded senders the flow tables hold only what happens to their
// packets: if another rule takes some of them, several sets of prefixes are equivalent, so it
// compares the results.
func sameRules(t testing.TB, what string, want, got []flow.Flow) {
	t.Helper()
	text := func(rules []flow.Flow) string {
		rules = slices.Clone(rules)
		for i := range rules {
			rules[i].Except = nil
		}
		return fmt.Sprintf("%+v", rules)
	}
	if diff := cmp.Diff(text(want), text(got)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
	for _, r := range slices.Concat(want, got) {
		for _, p := range append(slices.Clone(r.Except), r.In.Senders()) {
			if a, b := takerOf(want, r.In, p), takerOf(got, r.In, p); r.In.BySource && a != b {
				t.Errorf("%s: senders of %v to %v: rule %q takes them, want %q", what, p, r.In.AnySource(), b, a)
			}
		}
	}
}

// takerOf names the rule that takes the senders of a prefix, among those with an input that is
// equal except for its sources.
func takerOf(rules []flow.Flow, in flow.Input, senders netip.Prefix) (name string) {
	length := -1
	for i := range rules {
		r := &rules[i]
		if r.In.BySource && r.In.AnySource() == in.AnySource() && r.TakesAll(senders) && r.In.SourceLen > length {
			name, length = r.Name, r.In.SourceLen
		}
	}
	return name
}

// Any set can follow any other: the kernel holds exactly the wanted rules, and without rules
// everything is free again. Some steps include a restart.
func TestSyncRandomSets(t *testing.T) {
	t.Parallel()
	n := newLab(t, 3)
	l := open(t, stateOptions(t))
	attachAll(t, l, append(n.out, n.in)...)
	w := newWorld(7, n)
	var rules []flow.Flow
	for step := range 40 {
		switch w.IntN(7) {
		case 0: // all replaced
			rules = w.Rules(step)
		case 1: // some added; inputs already used are skipped
			for _, r := range w.Rules(step) {
				if !slices.ContainsFunc(rules, func(o flow.Flow) bool { return o.In.Key() == r.In.Key() }) {
					rules = append(rules, r)
				}
			}
		case 2: // some removed
			rules = slices.DeleteFunc(rules, func(flow.Flow) bool { return w.Chance(40) })
		case 3: // outputs change
			for i := range rules {
				if w.Chance(30) {
					rules[i].Out = append(slices.Clone(rules[i].Out), w.Output(rules[i].In.Group))[:min(64, len(rules[i].Out)+1)]
				}
			}
		case 4: // addresses change
			for i := range rules {
				rules[i].In.MAC[5] = byte(step)
				rules[i].Out = slices.Clone(rules[i].Out)
				for slot := range rules[i].Out {
					rules[i].Out[slot].Ready = w.Chance(80)
					rules[i].Out[slot].SrcMAC[5] = byte(step)
				}
			}
		case 5: // inputs are swapped
			if len(rules) > 1 {
				rules[0].Name, rules[1].Name = rules[1].Name, rules[0].Name
			}
		case 6: // one is removed
			if len(rules) > 0 {
				rules = slices.Delete(rules, 0, 1)
			}
		}
		if w.Chance(50) {
			change1(t, l, rules...)
		} else {
			sync1(t, l, rules...)
		}
		if w.Chance(10) {
			l = reopen(t, l)
		}
		sameRules(t, fmt.Sprintf("step %d", step), sorted(rules), inKernel(t, l))
		sameRules(t, fmt.Sprintf("step %d, in memory", step), sorted(rules), rulesOf(l))
		kernelFits(t, l)
		allocatorsFit(t, l)
		if t.Failed() {
			t.FailNow()
		}
	}
	sync1(t, l)
	kernelFits(t, l)
	allocatorsFit(t, l)
}

func TestSyncRefusals(t *testing.T) {
	t.Parallel()
	n := newLab(t, 2)
	opts := stateOptions(t)
	opts.MaxRules, opts.MaxOutputs = 8, 12
	l := open(t, opts)
	rules := someRules(n)
	sync1(t, l, rules...)
	before := dump(t, l)
	out := output(n.out[0], "239.3.3.3", "10.1.0.1", 7000)
	extra := func(edit func(r *flow.Flow)) []flow.Flow {
		r := flow.Flow{Name: "extra", In: input(n.in, "239.1.1.9", "", 5000), Out: []flow.Output{out}}
		edit(&r)
		return append(slices.Clone(rules), r)
	}
	edit := func(change func(o *flow.Output)) func(r *flow.Flow) { return func(r *flow.Flow) { change(&r.Out[0]) } }
	nowhere := out
	nowhere.Index = 9999
	for _, c := range []struct {
		name string
		want []flow.Flow
		is   error
		says string
	}{
		{"too many rules", func() []flow.Flow {
			all := extra(func(*flow.Flow) {})
			for i := range uint16(3) {
				all = append(all, flow.Flow{Name: fmt.Sprint("more", i), In: input(n.in, "239.1.1.8", "", i), Out: []flow.Output{out}})
			}
			return all
		}(), ErrFull, "rule more2"},
		{"too many outputs", extra(func(r *flow.Flow) { r.Out = slices.Repeat(r.Out, 5) }), ErrFull, "rule extra"},
		{"no such interface", extra(func(r *flow.Flow) { r.Out = []flow.Output{nowhere} }), nil, "index 9999"},
		{"no such interface, second of several", extra(func(r *flow.Flow) { r.Out = []flow.Output{out, nowhere} }), nil, "index 9999"},
		{"no such interface, and everything else changes", func() []flow.Flow {
			all := extra(func(r *flow.Flow) { r.Out = []flow.Output{nowhere} })
			all[0].In.Port, all[1].Out = 9, all[1].Out[:1]
			return slices.Delete(all, 2, 3)
		}(), nil, "index 9999"},
		{"name used twice", extra(func(r *flow.Flow) { r.Name = "one" }), nil, "name is used twice"},
		{"input used twice", extra(func(r *flow.Flow) { r.In = rules[0].In }), nil, "same input as rule one"},
		{"no name", extra(func(r *flow.Flow) { r.Name = "" }), nil, "name"},
		{"name too long", extra(func(r *flow.Flow) { r.Name = strings.Repeat("x", 80) }), nil, "79"},
		{"NUL in the name", extra(func(r *flow.Flow) { r.Name = "a\x00b" }), nil, "NUL"},
		{"no outputs", extra(func(r *flow.Flow) { r.Out = nil }), nil, "0 outputs"},
		{"65 outputs", extra(func(r *flow.Flow) { r.Out = slices.Repeat(r.Out, 65) }), nil, "65 outputs"},
		{"no input interface", extra(func(r *flow.Flow) { r.In.Index = 0 }), nil, "interface index 0"},
		{"no group", extra(func(r *flow.Flow) { r.In.Group = netip.Addr{} }), nil, "input address"},
		{"IPv4 in IPv6", extra(func(r *flow.Flow) { r.In.Group = netip.MustParseAddr("::ffff:239.1.1.1") }), nil, "input address"},
		{"zone", extra(func(r *flow.Flow) { r.In.Group = netip.MustParseAddr("ff02::1%in") }), nil, "zone"},
		{"source of another family", extra(func(r *flow.Flow) { r.In.Source = netip.MustParseAddr("fd00::1") }), nil, "source"},
		{"source that is any", extra(func(r *flow.Flow) { r.In.Source = netip.MustParseAddr("0.0.0.0") }), nil, "source"},
		{"output of another family", extra(func(r *flow.Flow) { r.Out = []flow.Output{output(n.out[0], "ff3e::1", "fd00::1", 1)} }), nil, "another family"},
		{"output without an address", extra(func(r *flow.Flow) { r.Out = []flow.Output{{}} }), nil, "another family"},
		{"output source of another family", extra(func(r *flow.Flow) { r.Out = []flow.Output{output(n.out[0], "239.1.1.1", "fd00::1", 1)} }), nil, "another family"},
		{"output ready without an interface", extra(func(r *flow.Flow) {
			o := out
			o.Index = 0
			r.Out = []flow.Output{o}
		}), nil, "interface index 0"},
		{"output port 0", extra(edit(func(o *flow.Output) { o.DstPort = 0 })), nil, "port 0: want 1 to 65535"},
		{"output prefix too long", extra(edit(func(o *flow.Output) { o.DstLen = 33 })), nil, "prefix length 33: want 0 to 32"},
		{"output VLAN 4095", extra(edit(func(o *flow.Output) { o.VLAN, o.VLANID = packet.VLANSet, 4095 })), nil, "VLAN 0.4095: want 1 to 4094"},
		{"output VLAN 0 in another", extra(edit(func(o *flow.Output) { o.VLAN, o.OuterVLAN = packet.VLANSet, 7 })), nil, "VLAN 7.0: want 1 to 4094"},
		{"output priority 8", extra(edit(func(o *flow.Output) { o.SetPCP, o.PCP = true, 8 })), nil, "priority 8: want 0 to 7"},
		{"output port shifted too far", extra(edit(func(o *flow.Output) { o.PortAdd, o.PortShift = true, 65535 })), nil, "port shift 65535"},
		{"output blocked for another reason", extra(edit(func(o *flow.Output) { o.Ready, o.Blocked = false, 200 })), nil, "blocked for reason Blocked(200)"},
		{"output rate of both kinds", extra(edit(func(o *flow.Output) { o.Rate = flow.Rate{Packets: 1, Bits: 8000, Burst: 1} })), nil, "want one of them"},
		{"burst without a rate", extra(func(r *flow.Flow) { r.Rate.Burst = 5 }), nil, "burst of 5 without a rate"},
		{"rate without a burst", extra(func(r *flow.Flow) { r.Rate.Packets = 5 }), nil, "burst 0: want 1 or more"},
		{"rate too low", extra(func(r *flow.Flow) { r.Rate = flow.Rate{Bits: 999, Burst: 1} }), nil, "want 1000 or more"},
		{"input prefix too long", extra(func(r *flow.Flow) { r.In.Len = 33 }), nil, "prefix length 33"},
		{"input prefix with host bits", extra(func(r *flow.Flow) { r.In.Len = 16 }), nil, "239.1.1.9/16: want no host bits"},
		{"input VLAN 4095", extra(func(r *flow.Flow) { r.In.VLAN = 4095 }), nil, "VLAN 0.4095"},
		{"input outer VLAN alone", extra(func(r *flow.Flow) { r.In.OuterVLAN = 7 }), nil, "VLAN 7.0"},
		{"path of another release", extra(func(r *flow.Flow) { r.Path = 9 }), nil, "path 9"},
		{"negative mtu", extra(func(r *flow.Flow) {
			o := out
			o.MTU = -1
			r.Out = []flow.Output{o}
		}), nil, "mtu -1"},
	} {
		err := l.Sync(pointers(c.want))
		var ruleErr *RuleError
		if !errors.As(err, &ruleErr) || !strings.Contains(fmt.Sprint(err), c.says) || (c.is != nil && !errors.Is(err, c.is)) {
			t.Errorf("%s: %v, want a RuleError that is %v and says %q", c.name, err, c.is, c.says)
		}
		if diff := cmp.Diff(before, dump(t, l)); diff != "" {
			t.Fatalf("%s: has changed something (-before +after):\n%s", c.name, diff)
		}
	}
	sync1(t, l, extra(func(*flow.Flow) {})...) // there is space after all
}

// A failure midway leaks nothing, however often it happens.
func TestSyncFailuresDoNotLeak(t *testing.T) {
	t.Parallel()
	n := newLab(t, 2)
	opts := stateOptions(t)
	opts.MaxRules, opts.MaxOutputs, opts.Logger = 16, 64, nil
	l := open(t, opts)
	rules := someRules(n)
	sync1(t, l, rules...)
	before := dump(t, l)
	nowhere := output(n.out[0], "239.3.3.3", "10.1.0.1", 7000)
	nowhere.Index = 9999
	good := output(n.out[1], "239.3.3.4", "10.1.1.1", 7000)
	bad := append(slices.Clone(rules),
		flow.Flow{Name: "good", In: input(n.in, "239.1.1.8", "", 5000), Out: []flow.Output{good}},
		flow.Flow{Name: "bad", In: input(n.in, "239.1.1.9", "", 5000), Out: []flow.Output{nowhere}})
	several := slices.Clone(bad)
	several[len(several)-1].Out = []flow.Output{good, good, nowhere}
	for i := range 1000 {
		want := bad
		if i%20 == 0 {
			want = several // makes a devmap, which the kernel is slow to free
		}
		if err := l.Sync(pointers(want)); err == nil {
			t.Fatal("an interface that is not there is accepted")
		}
	}
	if diff := cmp.Diff(before, dump(t, l)); diff != "" {
		t.Errorf("after 1000 failures (-before +after):\n%s", diff)
	}
	kernelFits(t, l)
	allocatorsFit(t, l)
	sync1(t, l, bad[:len(bad)-1]...)
}

// An unchanged rule loses nothing while others come, change and go, and flow tables are swapped and
// grow.
func TestSyncDoesNotDisturb(t *testing.T) {
	t.Parallel()
	n := newLab(t, 2)
	opts := testOptions(t)
	opts.MaxRules = 4096
	l := open(t, opts)
	attachAll(t, l, append(n.out, n.in)...)
	steady := someRules(n)[:2]
	sync1(t, l, steady...)
	one, two := startStream(t, n, "239.1.1.1", 1), startStream(t, n, "239.1.1.2", 1, 1)
	more := func(count, port int) []flow.Flow {
		rules := slices.Clone(steady)
		for i := range count {
			in := input(n.in, fmt.Sprintf("239.5.%d.%d", i/250, i%250), "", 5000)
			rules = append(rules, flow.Flow{Name: fmt.Sprintf("more%d", i), In: in, Out: []flow.Output{output(n.out[i%2], "239.6.6.6", "10.1.0.1", uint16(port))}})
		}
		return rules
	}
	for round, count := range []int{1, 0, 40, 39, 1500, 3, 0} {
		one.more()
		two.more()
		sync1(t, l, more(count, 1)...)
		sync1(t, l, more(count, 2+round)...)
	}
	// The interface of the only output gets an egress program in its row, and loses its last other
	// user.
	two.finish()
	sync1(t, l, steady[0])
	one.more()
	one.finish()
	s := statsOf(t, l, "one")
	if want := one.sent.Load(); s.Matched.Packets != want || s.Outputs[0].Sent.Packets != want || len(s.Drops)+len(s.Outputs[0].Drops) != 0 {
		t.Errorf("%d frames sent, counters %+v", want, s)
	}
}

// Counters survive a change of addresses, and restart with another destination.
func TestSyncCounters(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 2)
	rule := flow.Flow{Name: "r", In: input(n.in, "239.1.1.1", "", 5000), Out: []flow.Output{
		output(n.out[0], "239.2.2.1", "10.1.0.1", 6000), output(n.out[1], "239.2.2.2", "10.1.1.1", 6000),
	}}
	rule.Out[1].TTLMode = packet.TTLDecrement
	frame := sourceFrame(n, "239.1.1.1", 5000, nil)
	frame.TTL, frame.Padding = 1, 18
	one := frame.Build()
	matched, sent, dropped := 0, 0, 0
	check := func(what string) {
		t.Helper()
		s := statsOf(t, r.l, "r")
		got := [3]uint64{s.Matched.Packets, s.Outputs[0].Sent.Packets, s.Outputs[1].Drops[TTL].Packets}
		if want := [3]uint64{uint64(matched), uint64(sent), uint64(dropped)}; got != want {
			t.Errorf("%s: matched, sent and dropped are %d, want %d", what, got, want)
		}
	}
	step := func(what string, change func()) {
		t.Helper()
		rule.Out = slices.Clone(rule.Out)
		change()
		sync1(t, r.l, rule)
		check(what)
		r.run(t, n.in.Index, one, len(one))
		matched, sent, dropped = matched+1, sent+1, dropped+1
		check(what + ", one more")
	}
	again := func() { matched, sent, dropped = 0, 0, 0 }
	step("new", func() {})
	step("MAC", func() { rule.Out[0].SrcMAC[5]++; rule.Out[0].DstMAC[5]++ })
	step("source address", func() { rule.Out[0].Src = netip.MustParseAddr("10.9.9.9") })
	step("input MAC", func() { rule.In.MAC[5]++ })
	step("interface", func() { rule.Out[0].Index = n.out[1].Index })
	step("destination", func() { rule.Out[0].Dst = netip.MustParseAddr("239.2.2.9"); again() })
	step("destination port", func() { rule.Out[0].DstPort++; again() })
	step("input port stays, source is new", func() { rule.In.Source = netip.MustParseAddr("192.168.7.7"); again() })
	rule.Out = append(rule.Out, rule.Out[0])
	step("third output", again)
	r.l = reopen(t, r.l)
	check("restarted")
	sync1(t, r.l)
	again()
	step("removed and added", func() {})
}

// Ids of rules, outputs and counters are reused without a trace of their past: no counters, no
// drops, no position in the order of outputs.
func TestNumbersAreUsedAgain(t *testing.T) {
	t.Parallel()
	n := newLab(t, 1)
	opts := testOptions(t)
	opts.MaxRules, opts.MaxOutputs = 2, 4
	l := open(t, opts)
	attachAll(t, l, n.in, n.out[0])
	r := newRunner(t, l, n.relay)
	frame := sourceFrame(n, "239.1.1.1", 5000, []byte("payload")).Build()
	looped := sourceFrame(n, "239.1.1.1", 5000, []byte("payload"))
	looped.SrcMAC = mac(n.in)
	loop := looped.Build()
	for round := range 20 {
		rule := flow.Flow{Name: fmt.Sprintf("round%d", round), In: input(n.in, "239.1.1.1", "", 5000)}
		for i := range 2 {
			rule.Out = append(rule.Out, output(n.out[0], fmt.Sprintf("239.2.2.%d", i), "10.1.0.1", uint16(round+1)))
		}
		sync1(t, r.l, rule)
		got := r.run(t, n.in.Index, frame, len(frame))
		for slot, o := range rule.Out {
			if want := forwarded(t, frame, o.Rewrite); !slices.Equal(got.copies[slot], want) {
				t.Fatalf("round %d, output %d:\n got %x\nwant %x", round, slot, got.copies[slot], want)
			}
		}
		r.run(t, n.in.Index, loop, len(loop))
		size := uint64(len(frame))
		want := counted{Matched: Counter{2, 2 * size}, Drops: map[Reason]Counter{Loop: {1, size}}, Sent: []Counter{{1, size}, {1, size}}, Dropped: []map[Reason]Counter{{}, {}}}
		if diff := cmp.Diff(want, counters(statsOf(t, r.l, rule.Name))); diff != "" {
			t.Fatalf("round %d: counters (-want +got):\n%s", round, diff)
		}
		if round%3 == 2 {
			r.l = reopen(t, r.l)
		}
	}
}

// A process that dies between any two steps leaves what the next can take over.
func TestDiesAfterPublishing(t *testing.T) {
	t.Parallel()
	n := newLab(t, 2)
	for _, c := range []struct {
		name         string
		before, want []flow.Flow
	}{
		{"one more", someRules(n)[:1], someRules(n)[:2]},
		{"first", nil, someRules(n)},
		{"other destination", someRules(n)[:1], func() []flow.Flow {
			r := someRules(n)[:1]
			r[0].Out[0].DstPort++
			return r
		}()},
		{"other address", someRules(n)[:2], func() []flow.Flow {
			r := someRules(n)[:2]
			r[1].Out[1].SrcMAC[5]++
			return r
		}()},
		{"others", someRules(n)[:3], someRules(n)[3:]},
		{"none", someRules(n), nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			labtest.Enter(t, n.relay)
			l := open(t, stateOptions(t))
			sync1(t, l, c.before...)
			// As Sync does it, up to the point where the process dies.
			s := &transaction{Loader: l, reused: map[uint32]bool{}, reusedStats: map[uint32]bool{}, staged: staged{open: openBroadcasts{}}}
			err := s.plan(pointers(c.want))
			for _, change := range s.changes {
				if err == nil && change.new != nil {
					err = s.stage(change)
				}
			}
			if err == nil {
				err = errors.Join(s.flush(), s.publish())
			}
			if err != nil {
				t.Fatal(err)
			}
			shortcutsAgree(t, l.maps) // before anything corrects them
			l = reopen(t, l)
			sameRules(t, "adopted rules", sorted(c.want), rulesOf(l))
			allocatorsFit(t, l)
			sync1(t, l, c.want...)
			kernelFits(t, l)
			sync1(t, l, c.before...)
			kernelFits(t, l)
			allocatorsFit(t, l)
		})
	}
}

// crashSets are the sets that a process applies in turn until it is killed.
func crashSets(n *testLab) [][]flow.Flow {
	sets := [][]flow.Flow{someRules(n), someRules(n)[1:4], nil, someRules(n)}
	sets[3][1].Out[0].SrcMAC[5]++
	sets[3][2].Out = sets[3][2].Out[:1]
	sets[3][0].Out[0].DstPort++
	for i := range 200 {
		sets[1] = append(sets[1], flow.Flow{Name: fmt.Sprint("more", i), In: input(n.in, fmt.Sprintf("239.7.0.%d", i), "", 1), Out: []flow.Output{output(n.out[i%2], "239.8.8.8", "10.1.0.1", 1)}})
	}
	return sets
}

const crashDir = "XDPCAST_TEST_CRASH_DIR"

// TestCrashChild is the process that TestKilled kills.
func TestCrashChild(t *testing.T) {
	dir := os.Getenv(crashDir)
	if dir == "" {
		t.Skip("is started by TestKilled")
	}
	l, err := Open(Options{PinDir: dir + "/bpf/xdpcast", RunDir: dir + "/run", MaxRules: 512, MaxOutputs: 1024})
	if err != nil {
		t.Fatal(err)
	}
	n := &testLab{in: iface(t, "in"), out: []*net.Interface{iface(t, "out0"), iface(t, "out1")}}
	for i := 0; ; i++ {
		sets := crashSets(n)
		sync1(t, l, sets[i%len(sets)]...)
		fmt.Println("applied")
	}
}

// A process killed at any moment leaves one of the rule sets between which it was changing.
func TestKilled(t *testing.T) {
	n := newLab(t, 2)
	opts := testOptions(t)
	opts.MaxRules, opts.MaxOutputs = 512, 1024
	l := open(t, opts)
	closeLoader(t, l)
	random := rand.New(rand.NewPCG(3, 3))
	// One write publishes the changes of one family.
	ofFamily := func(rules []flow.Flow, six bool) string {
		rules = slices.DeleteFunc(slices.Clone(rules), func(r flow.Flow) bool { return r.In.Group.Is6() != six })
		return fmt.Sprintf("%+v", sorted(rules))
	}
	allowed := map[string]bool{}
	for _, set := range crashSets(n) {
		allowed[ofFamily(set, false)], allowed[ofFamily(set, true)] = true, true
	}
	for range 6 {
		killChild(t, n, strings.TrimSuffix(opts.PinDir, "/bpf/xdpcast"), 1+random.IntN(8), time.Duration(random.Int64N(int64(20*time.Millisecond))))
		m, err := openMaps(opts.PinDir, false, nil)
		if err != nil {
			t.Fatal(err)
		}
		shortcutsAgree(t, m)
		m.Close()
		l := open(t, opts)
		if !l.Adopted() {
			t.Fatal("the pinned state is not adopted")
		}
		if got := rulesOf(l); !allowed[ofFamily(got, false)] || !allowed[ofFamily(got, true)] {
			t.Errorf("%d rules, which are none of the sets", len(got))
		}
		allocatorsFit(t, l)
		sync1(t, l, someRules(n)...)
		kernelFits(t, l)
		closeLoader(t, l)
	}
}

// killChild lets a child apply some sets and kills it some time into the next.
func killChild(t *testing.T, n *testLab, dir string, sets int, while time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), labtest.Timeout)
	defer cancel()
	child := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestCrashChild$")
	child.Env = append(os.Environ(), crashDir+"="+dir)
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := n.relay.Start(child); err != nil {
		t.Fatal(err)
	}
	lines, applied := bufio.NewScanner(out), 0
	for applied < sets && lines.Scan() {
		if lines.Text() == "applied" {
			applied++
		} else {
			t.Log("child: ", lines.Text())
		}
	}
	for start := time.Now(); time.Since(start) < while; { // shorter than a sleep can be
		continue
	}
	if err := child.Process.Kill(); err != nil {
		t.Error(err)
	}
	err = child.Wait()
	var exit *exec.ExitError
	if applied < sets || !errors.As(err, &exit) || exit.Exited() {
		t.Fatalf("child: applied %d sets, %v", applied, err)
	}
}
