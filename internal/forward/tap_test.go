package forward

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/internal/tap"
	"xdpcast/pkg/loader"
)

// seen returns the packets of a tap, without waiting.
func (t *Tap) seen() (all []tapRecord, data [][]byte) {
	for c := t.take(); c != nil; c = t.take() {
		for _, r := range c.records {
			if !r.unwanted {
				all, data = append(all, r), append(data, slices.Clone(c.bytes[r.from:r.to]))
			}
		}
		c.records, c.bytes = c.records[:0], c.bytes[:0]
		t.free <- c
	}
	return all, data
}

func addTap(t testing.TB, set *Set, rule string, opts tap.Options) *Tap {
	t.Helper()
	n, err := set.taps.Add(rule, opts, false)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// Each packet is shown as received, and each copy as sent or with its drop reason: copies that the
// sender took, those that it refused, and packets that no output got.
func TestTapShows(t *testing.T) {
	refuse := error(nil)
	sent := &recorder{refuse: func() error { return refuse }}
	r := rule("r", inFace, "239.1.1.1", 5000, sendTo(outFace(3), "239.9.9.1", 6000), sendTo(outFace(4), "239.9.9.2", 6000))
	other := rule("other", inFace, "239.1.1.2", 5000, sendTo(outFace(3), "239.9.9.1", 6000))
	set, e := newEngine(t, map[int]Sender{3: sent}, r, other) // interface 4 does not exist
	tapped := addTap(t, set, "r", tap.Everything)
	frame, foreign := numbered(0, 1), numbered(0, 2)
	foreign.Dst = other.In.Group
	forwardAll(e, 7, frame.Build(), foreign.Build())
	all, data := tapped.seen()
	var got []string
	for i, rec := range all {
		got = append(got, fmt.Sprintf("slot %d on %d: dropped %v for %v, %d of %d bytes", rec.slot, rec.index, rec.dropped, rec.reason, len(data[i]), rec.length))
	}
	n := len(frame.Build())
	want := []string{
		fmt.Sprintf("slot -1 on 1: dropped false for %v, %d of %d bytes", loader.Reason(0), n, n),
		fmt.Sprintf("slot 1 on 4: dropped true for %v, %d of %d bytes", loader.NoDevice, n, n),
		fmt.Sprintf("slot 0 on 3: dropped false for %v, %d of %d bytes", loader.Reason(0), n, n),
	}
	if !slices.Equal(got, want) {
		t.Fatalf("got  %q\nwant %q", got, want)
	}
	if !bytes.Equal(data[0], frame.Build()) || !bytes.Equal(data[2], sent.sent[0]) || all[0].time != 7 {
		t.Errorf("in %x\nout %x, sent %x", data[0], data[2], sent.sent[0])
	}

	refuse = unix.EMSGSIZE
	forwardAll(e, 8, frame.Build())
	all, _ = tapped.seen()
	if len(all) != 3 || !all[2].dropped || all[2].reason != loader.MTU || all[2].slot != 0 {
		t.Errorf("refused: %+v", all)
	}

	set.taps.Remove(tapped)
	forwardAll(e, 9, frame.Build())
	if all, _ := tapped.seen(); len(all) != 0 || len(e.taps) != 0 {
		t.Errorf("after its end: %+v", all)
	}
}

// Packets that the options exclude are not shown.
func TestTapWants(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(o *tap.Options)
		want   []int // slots, of 10 packets
	}{
		{"in", func(o *tap.Options) { o.Slots, o.Dropped = 0, false }, slices.Repeat([]int{-1}, 10)},
		{"slot 0", func(o *tap.Options) { o.In, o.Slots, o.Dropped = false, 1, false }, slices.Repeat([]int{0}, 10)},
		{"slot 1", func(o *tap.Options) { o.In, o.Slots, o.Dropped = false, 2, false }, nil},
		{"dropped", func(o *tap.Options) { o.In, o.Slots = false, 0 }, slices.Repeat([]int{1}, 10)},
		{"sample", func(o *tap.Options) { o.Sample = 5 }, []int{-1, 1, -1, 1, 0, 0}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := rule("r", inFace, "239.1.1.1", 5000, sendTo(outFace(3), "239.9.9.1", 6000), sendTo(outFace(4), "239.9.9.2", 6000))
			set, e := newEngine(t, map[int]Sender{3: &recorder{}}, r)
			o := tap.Everything
			c.change(&o)
			tapped := addTap(t, set, "r", o)
			var frames [][]byte
			for i := range 10 {
				frames = append(frames, numbered(0, i).Build())
			}
			forwardAll(e, 1, frames...)
			all, _ := tapped.seen()
			var slots []int
			for _, rec := range all {
				slots = append(slots, rec.slot)
			}
			if !slices.Equal(slots, c.want) {
				t.Errorf("slots %v, want %v", slots, c.want)
			}
		})
	}
}

// An unread tap does not affect the stream: every packet is sent, and every packet is either
// shown or counted as lost.
func TestTapNotRead(t *testing.T) {
	sink := &taker{}
	r := rule("r", inFace, "239.1.1.1", 5000, sendTo(outFace(3), "239.9.9.1", 6000))
	set, e := newEngine(t, map[int]Sender{3: sink}, r)
	tapped := addTap(t, set, "r", tap.Everything)
	frame := numbered(0, 0)
	frame.Payload = append(frame.Payload, make([]byte, 1000)...)
	wire := frame.Build()
	batch := slices.Repeat([][]byte{wire}, 64)
	const batches = 1000
	for range batches {
		forwardAll(e, 1, batch...)
	}
	all, _ := tapped.seen()
	if n := uint64(len(all)) + tapped.Lost(); n != 2*64*batches {
		t.Errorf("%d shown and %d lost, want %d together", len(all), tapped.Lost(), 2*64*batches)
	}
	if sink.packets != 64*batches || tapped.Lost() == 0 || len(all) == 0 {
		t.Errorf("%d sent, %d shown, %d lost", sink.packets, len(all), tapped.Lost())
	}
	// It is read again.
	forwardAll(e, 1, wire)
	if all, _ := tapped.seen(); len(all) != 2 {
		t.Errorf("%d shown afterwards, want 2", len(all))
	}
}

// With a tap, there is no allocation per packet, either.
func TestTapAllocatesNothing(t *testing.T) {
	r := rule("r", inFace, "239.1.1.1", 5000, sendTo(outFace(3), "239.9.9.1", 6000), sendTo(outFace(5), "239.9.9.2", 6000))
	set, e := newEngine(t, map[int]Sender{3: &taker{}}, r)
	tapped := addTap(t, set, "r", tap.Everything)
	frame := numbered(0, 0).Build()
	run := func() {
		forwardAll(e, 1, frame, frame)
		c := tapped.take()
		if c == nil {
			t.Error("nothing was shown")
			return
		}
		c.records, c.bytes = c.records[:0], c.bytes[:0]
		tapped.free <- c
	}
	if allocs := testing.AllocsPerRun(500, run); allocs != 0 {
		t.Errorf("%v allocations a run", allocs)
	}
}

// Taps are added and removed while packets flow; each sees some.
func TestTapsWhileForwarding(t *testing.T) {
	r := rule("r", inFace, "239.1.1.1", 5000, sendTo(outFace(3), "239.9.9.1", 6000))
	set, e := newEngine(t, map[int]Sender{3: &taker{}}, r)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		frame := numbered(0, 0).Build()
		for ctx.Err() == nil {
			forwardAll(e, 1, frame, frame, frame)
		}
	}()
	for range 50 {
		var all []*Tap
		for range MaxTaps {
			all = append(all, addTap(t, set, "r", tap.Everything))
		}
		if _, err := set.taps.Add("r", tap.Everything, false); !errors.Is(err, ErrTaps) {
			t.Errorf("one more: %v", err)
		}
		for _, one := range all {
			c := one.take()
			for ; c == nil; c = one.take() {
				runtime.Gosched()
			}
			if len(c.records) == 0 {
				t.Error("a chunk without packets")
			}
			set.taps.Remove(one)
		}
	}
	cancel()
	<-done
}

// BenchmarkTap measures a packet with one output in an engine whose sender discards it: untapped, while its rule is
// tapped and read, and while another is. ns/op are per packet.
func BenchmarkTap(b *testing.B) {
	for _, tapped := range []string{"nobody", "r", "other"} {
		b.Run("tapped="+tapped, func(b *testing.B) {
			r := rule("r", inFace, "239.1.1.1", 5000, sendTo(outFace(3), "239.9.9.1", 6000))
			sink := &taker{}
			set, e := newEngine(b, map[int]Sender{3: sink}, r)
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan struct{})
			var one *Tap
			w, err := tap.NewWriter(io.Discard, "test", func(int) string { return "eth0" }, 0)
			if err != nil {
				b.Fatal(err)
			}
			if tapped != "nobody" {
				one = addTap(b, set, tapped, tap.Everything)
			}
			go func() {
				defer close(done)
				if one != nil {
					one.Run(ctx, w)
				}
			}()
			batch := slices.Repeat([][]byte{numbered(0, 0).Build()}, 64)
			packets := 0
			for b.Loop() {
				forwardAll(e, 1, batch...)
				packets += len(batch)
			}
			cancel()
			<-done
			if sink.packets != packets {
				b.Fatalf("%d of %d packets were sent", sink.packets, packets)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(packets), "ns/packet")
			if one != nil {
				b.ReportMetric(float64(one.Lost())/float64(packets), "lost/packet")
			}
		})
	}
}
