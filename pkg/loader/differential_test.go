package loader

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"xdpcast/internal/flowtest"
	"xdpcast/pkg/flow"
)

// ownAddresses are those set as the host's own.
var ownAddresses = flowtest.OwnAddresses()

func newWorld(seed uint64, n *testLab) *flowtest.World {
	w := &flowtest.World{Rand: rand.New(rand.NewPCG(seed, 1)), In: []flowtest.Interface{{Index: n.in.Index, MAC: mac(n.in)}}}
	for _, out := range n.out {
		w.Out = append(w.Out, flowtest.Interface{Index: out.Index, MAC: mac(out)})
	}
	w.In = append(w.In, w.Out[0])
	return w
}

// differential runs one frame through the programs and the oracle and compares the copies and the
// counters.
func differential(t testing.TB, r *runner, o *oracle, index int, frame []byte, linear int) {
	t.Helper()
	got := r.run(t, index, frame, linear)
	verdict, copies := o.frame(index, frame, linear)
	describe := func() string { return fmt.Sprintf("frame %x, %d linear, on interface %d", frame, linear, index) }
	if got.verdict != verdict {
		t.Fatalf("%s: verdict %d, the twin says %d", describe(), got.verdict, verdict)
	}
	if verdict == xdpPass && !bytes.Equal(got.frame, frame) {
		t.Fatalf("%s: not sent, but changed to %x", describe(), got.frame)
	}
	for slot := range len(copies) + len(got.copies) + 64 {
		if !bytes.Equal(got.copies[slot], copies[slot]) {
			t.Fatalf("%s: output %d:\n got  %x\n twin %x", describe(), slot, got.copies[slot], copies[slot])
		}
	}
	stats := globalStats(t, r.l)
	if stats.Passed.subtract(o.passedBefore); stats.Passed != o.passed {
		t.Fatalf("%s: passed %+v, want %+v", describe(), stats.Passed, o.passed)
	}
	if len(stats.Rules) != len(o.want) {
		t.Fatalf("%d rules have counters, want %d", len(stats.Rules), len(o.want))
	}
	for _, s := range stats.Rules {
		if diff := cmp.Diff(counters(*o.want[s.Name]), counters(s)); diff != "" {
			t.Fatalf("%s: counters of rule %s (-twin +got):\n%s", describe(), s.Name, diff)
		}
	}
}

// checkTotals compares the total drops with those by rule and output.
func checkTotals(t testing.TB, o *oracle, drops map[Reason]Counter) {
	t.Helper()
	want := map[Reason]Counter{}
	addAll := func(m map[Reason]Counter) {
		for reason, c := range m {
			total := want[reason]
			total.add(c.Packets, c.Bytes)
			want[reason] = total
		}
	}
	for _, r := range o.want {
		addAll(r.Drops)
		for _, out := range r.Outputs {
			addAll(out.Drops)
		}
	}
	if diff := cmp.Diff(want, drops); diff != "" {
		t.Fatalf("drops of all rules (-by rule +got):\n%s", diff)
	}
}

// Random rules and frames: the programs and their twin in Go give the same verdict,
// the same bytes in every copy, and the same counters.
func TestDifferential(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 3)
	testDifferential(t, n, r)
	if !r.partial {
		t.Log("no frame of several buffers: this kernel cannot run a program on one (Linux 6.18)")
	}
}

// The programs give the same results as loaded for a kernel without multi-buffer frames (before
// Linux 5.18).
func TestDifferentialOnOldKernel(t *testing.T) {
	t.Parallel()
	n := newLab(t, 3)
	opts := testOptions(t)
	opts.programs = embedded{fragmentTimeout: time.Hour}
	opts.probes = Capabilities{}.answers()
	l := open(t, opts)
	attachAll(t, l, append([]*net.Interface{n.in}, n.out...)...)
	r := newRunner(t, l, n.relay)
	r.partial = false // a test run spreads a frame over buffers nevertheless
	testDifferential(t, n, r)
}

func testDifferential(t *testing.T, n *testLab, r *runner) {
	t.Helper()
	w := newWorld(20261122, n)
	if err := r.l.SetOwnAddresses(ownAddresses); err != nil {
		t.Fatal(err)
	}
	first := flowtest.Ports{}
	sent, matched, done := 0, uint64(0), uint64(0)
	for set := range 15 {
		rules := w.Rules(set)
		sync1(t, r.l, rules...)
		if set%3 == 2 { // the flow tables alone must give the same result
			r.l.shortcuts.open = false
			if err := r.l.writeConfig(); err != nil {
				t.Fatal(err)
			}
		}
		before := globalStats(t, r.l)
		o := newOracle(normalized(rules), before, first)
		for range 100 {
			index, frame := w.Frame(rules)
			linear := len(frame)
			if r.partial && w.Chance(10) {
				linear = 14 + w.IntN(len(frame)-13)
			}
			differential(t, r, o, index, frame, linear)
			sent++
		}
		checkTotals(t, o, subtractDrops(globalStats(t, r.l).Drops, before.Drops))
		for _, s := range o.want {
			matched += s.Matched.Packets
			for _, out := range s.Outputs {
				done += out.Sent.Packets
			}
		}
	}
	if matched < uint64(sent)/3 || done < matched {
		t.Errorf("only %d of %d frames matched a rule, and %d copies left, which proves little", matched, sent, done)
	}
}

func normalized(rules []flow.Flow) []flow.Flow {
	out := make([]flow.Flow, len(rules))
	for i, r := range rules {
		out[i] = r.Normalized()
	}
	return out
}

// FuzzRelay compares the programs with their twin on fuzzed frames, for rule sets drawn by seed.
func FuzzRelay(f *testing.F) {
	for seed := range uint64(24) {
		w := &flowtest.World{Rand: rand.New(rand.NewPCG(seed, 2)), In: []flowtest.Interface{{Index: 1, MAC: [6]byte{2, 0, 0, 0, 0, 2}}}}
		_, frame := w.Frame(nil)
		f.Add(uint8(seed/8), frame, uint16(0))
	}
	opts := testOptions(f)
	opts.programs = embedded{fragmentTimeout: time.Hour, anyTick: true}
	opts.Logger = nil // a fuzz target may not log through f
	n := newLab(f, 3)
	l := open(f, opts)
	attachAll(f, l, append([]*net.Interface{n.in}, n.out...)...)
	if err := l.SetOwnAddresses(ownAddresses); err != nil {
		f.Fatal(err)
	}
	r := newRunner(f, l, n.relay)
	var o *oracle
	ports := flowtest.Ports{}
	current, set := -1, 0
	f.Fuzz(func(t *testing.T, seed uint8, frame []byte, linear uint16) {
		if len(frame) < 14 || len(frame) > 3000 {
			t.Skip("the kernel runs programs on whole Ethernet headers and up to a page")
		}
		r.enter(t)
		if current != int(seed%32) {
			current = int(seed % 32)
			set++
			rules := newWorld(uint64(current), n).Rules(set)
			sync1(t, r.l, rules...)
			o = newOracle(normalized(rules), globalStats(t, r.l), ports)
		}
		first := len(frame)
		if linear != 0 && r.partial {
			first = 14 + int(linear)%(len(frame)-13)
		}
		differential(t, r, o, n.in.Index, frame, first)
	})
}
