package loader

import (
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"xdpcast/internal/labtest"
	"xdpcast/internal/tap"
	"xdpcast/pkg/flow"
)

// TestTapCost: while a rule is tapped the relay program decides as before, and the tap records each
// packet or counts it as lost, at any packet rate. It reports the cost of a packet meanwhile, and
// that of a rule next to the tapped one, as the minimum of short bursts.
func TestTapCost(t *testing.T) {
	n := newLab(t, 1)
	opts := testOptions(t)
	opts.programs = embedded{noPacket: true} // the frame is processed again and again
	l := open(t, opts)
	attachAll(t, l, n.in, n.out[0])
	newRunner(t, l, n.relay) // stays on one CPU
	rule := func(name, group string) flow.Flow {
		return flow.Flow{Name: name, In: input(n.in, group, "", 5000), Out: []flow.Output{output(n.out[0], group, "10.1.0.1", 5000)}}
	}
	sync1(t, l, rule("tapped", "239.1.1.1"), rule("beside", "239.1.1.2"))
	frame := sourceFrame(n, "239.1.1.1", 5000, make([]byte, 86)).Build()
	const burst, bursts = 1_000, 50
	// A signal interrupts a burst, which is then repeated: the counters say how many packets there were.
	matched := func() uint64 { return statsOf(t, l, "tapped").Matched.Packets }
	runs := uint64(0)
	cost := func() time.Duration {
		t.Helper()
		least := time.Hour
		for range bursts {
			least = min(least, measure(t, l.relay, n.in.Index, frame, burst, xdpRedirect))
			runs += burst
		}
		return least / burst
	}
	// tapping measures while a rule is tapped.
	tapping := func(name string) (each time.Duration, written, lost, sent uint64) {
		t.Helper()
		tapped, err := OpenTap(TapOptions{PinDir: opts.PinDir, Rule: name, Options: tap.Everything})
		labtest.NeedsKernel(t, !errors.Is(err, ErrNotSupported), "tracing of BPF programs", "6.0; some refuse it to everybody")
		if err != nil {
			t.Fatal(err)
		}
		w, err := tap.NewWriter(io.Discard, "test", func(int) string { return "eth0" }, 0)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- tapped.Run(ctx, w, nil) }()
		before := matched()
		each = cost()
		cancel()
		err = errors.Join(<-ended, w.Close(tapped.Lost()))
		lost = tapped.Lost()
		if err := errors.Join(err, tapped.Close()); err != nil {
			t.Fatal(err)
		}
		return each, w.Written(), lost, matched() - before
	}
	cost() // warm
	without := cost()
	tapped, written, lost, sent := tapping("tapped")
	if written+lost != 2*sent || written == 0 { // in and out
		t.Errorf("%d packets in and out: %d recorded, %d lost", 2*sent, written, lost)
	}
	beside, others, _, _ := tapping("beside")
	if others != 0 {
		t.Errorf("%d packets of another rule were recorded", others)
	}
	after := cost()
	if s := statsOf(t, l, "tapped"); s.Matched.Packets < runs || s.Outputs[0].Sent != s.Matched || len(s.Drops) != 0 {
		t.Errorf("of %d packets at least: %+v", runs, s)
	}
	t.Logf("a packet costs %v; while its rule is tapped %v, with %d recorded and %d lost by the tap; while another is %v; afterwards %v", without, tapped, written, lost, beside, after)
}
