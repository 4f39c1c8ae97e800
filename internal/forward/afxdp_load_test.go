package forward

import (
	"fmt"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/fanout"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
)

// tally counts the numbered frames that arrive on an interface, and those that arrive
// more than once.
type tally struct {
	catcher         *catcher
	seen            []bool // by number * streams + stream
	streams         int
	arrived, double atomic.Int64
}

func tallyOn(t *testing.T, h *lab.Host, streams, frames int) *tally {
	t.Helper()
	y := &tally{catcher: catch(t, h, "eth0"), streams: streams, seen: make([]bool, frames)}
	w, done := y.catcher.group.Workers()[0], make(chan struct{})
	var stop atomic.Bool
	go func() {
		defer close(done)
		for !stop.Load() {
			block, err := w.Wait()
			if err != nil {
				continue
			}
			var f fanout.Frame
			for block.Next(&f) {
				y.frame(f.Data)
			}
			block.Release()
		}
	}()
	t.Cleanup(func() {
		stop.Store(true)
		w.Wake()
		<-done
	})
	return y
}

func (y *tally) frame(data []byte) {
	stream, n, ok := number(data)
	at := n*y.streams + stream
	switch {
	case !ok || at >= len(y.seen):
	case y.seen[at]:
		y.double.Add(1)
	default:
		y.seen[at] = true
		y.arrived.Add(1)
	}
}

// dropped returns how many frames did not fit into the tally's own ring.
func (y *tally) dropped(t *testing.T) int64 {
	t.Helper()
	stats, err := y.catcher.group.Stats()
	if err != nil {
		t.Fatal(err)
	}
	return int64(stats[0].Dropped)
}

// TestAFXDPHalfCapacity relays 50 streams over two queues at half the rate that the same
// run forwards without loss. No frame may be duplicated, and only those may be missing that
// the source's device, a ring, or the receiver's tap counted as dropped: on a busy machine
// a thread may not run for a long time.
func TestAFXDPHalfCapacity(t *testing.T) {
	const streams = 50
	for _, c := range []struct{ outputs, size, frames int }{
		{1, 64, 10000}, {1, 8900, 2000}, {4, 64, 5000}, {4, 8900, 1000}, {16, 64, 2000}, {16, 8900, 500},
	} {
		t.Run(fmt.Sprintf("%d outputs, %d bytes", c.outputs, c.size), func(t *testing.T) {
			b := newXDPBench(t, c.outputs, 2, 9000)
			b.openWith(t, AFXDPOptions{})
			var out []flow.Output
			for i, o := range b.out {
				out = append(out, sendTo(o, fmt.Sprintf("239.2.2.%d", i+1), 6000))
			}
			b.sync(t, xdpRule("r", b.in, "239.1.1.1", 5000, out...))
			frames := make([][]byte, 2*c.frames) // the first half measures
			for i := range frames {
				f := numbered(i%streams, i/streams)
				f.Payload = append(f.Payload, make([]byte, c.size-len(f.Payload))...)
				frames[i] = f.Build()
			}
			var sinks []*tally
			for _, h := range b.sinks {
				sinks = append(sinks, tallyOn(t, h, streams, len(frames)))
			}
			source := openSender(t, b.source, iface(t, b.source, "eth0").Index)
			rate := b.capacity(t, source, frames[:c.frames])
			start := time.Now()
			onOneCPU(t, func() {
				for sent := 0; sent < c.frames; runtime.Gosched() {
					due := min(int(time.Since(start).Seconds()*rate/2), c.frames)
					for ; sent < due; sent++ {
						sendFrames(t, source, frames[c.frames+sent:c.frames+sent+1])
					}
				}
			})
			t.Logf("%.0f frames a second are %.0f half of the capacity", float64(c.frames)/time.Since(start).Seconds(), rate/2)
			b.allAccounted(t, sinks, uint64(len(frames)))
		})
	}
}

// capacity measures how many frames per second the path forwards if a sender waits for it.
func (b *xdpBench) capacity(t *testing.T, source *fanout.Sender, frames [][]byte) (rate float64) {
	t.Helper()
	const burst, ahead = 32, 256
	start := time.Now()
	onOneCPU(t, func() {
		lost := 0
		for sent := 0; sent < len(frames); {
			some := frames[sent:min(sent+burst, len(frames))]
			sendFrames(t, source, some)
			sent += len(some)
			waiting := time.Now()
			for int(b.path.Stats(nil)[0].Matched.Packets)+lost+ahead < sent {
				// Checked late, since it delays the worker. Lost frames never arrive.
				if time.Since(waiting) > 50*time.Millisecond {
					lost = int(b.unseen(t) + b.sourceDrops(t))
				}
				runtime.Gosched()
			}
		}
	})
	return float64(len(frames)) / time.Since(start).Seconds()
}

// sourceDrops returns the frames that the source's device dropped.
func (b *xdpBench) sourceDrops(t *testing.T) uint64 {
	t.Helper()
	link, err := b.source.Link("eth0")
	if err != nil {
		t.Fatal(err)
	}
	return link.Attrs().Statistics.TxDropped
}

// allAccounted checks that each of so many frames arrived once at each sink, or is
// accounted for.
func (b *xdpBench) allAccounted(t *testing.T, sinks []*tally, sent uint64) {
	t.Helper()
	var s loader.RuleStats
	labtest.Eventually(t, "all frames are accounted for", func() bool {
		s = b.path.Stats(nil)[0]
		for i := range sinks {
			if accounted(&s, i) != s.Matched { // another worker may lag
				return false
			}
		}
		return b.sourceDrops(t)+b.unseen(t)+s.Matched.Packets >= sent
	})
	if got := b.sourceDrops(t) + b.unseen(t) + s.Matched.Packets; got != sent {
		t.Errorf("%d of %d frames are accounted for", got, sent)
	}
	if matched := b.kernelStats(t, "r").Matched.Packets; matched != b.unseen(t)+s.Matched.Packets {
		t.Errorf("%d frames matched, %d came to the workers and %d were lost before", matched, s.Matched.Packets, b.unseen(t))
	}
	for i, y := range sinks {
		if accounted(&s, i) != s.Matched {
			t.Errorf("output %d: %+v of %+v", i, s.Outputs[i], s.Matched)
		}
		want := int64(s.Outputs[i].Sent.Packets)
		labtest.Eventually(t, fmt.Sprintf("the frames of output %d have arrived", i), func() bool { return y.arrived.Load()+y.dropped(t) >= want })
		if got := y.arrived.Load() + y.dropped(t); got != want || y.double.Load() != 0 {
			t.Errorf("output %d: %d frames arrived, %d came twice, %d found no room in the tap, want %d", i, y.arrived.Load(), y.double.Load(), y.dropped(t), want)
		}
	}
	lost := sent - s.Matched.Packets
	if lost > 0 || s.Outputs[0].Sent.Packets != s.Matched.Packets {
		t.Logf("of %d frames the source's device dropped %d, rings %d, output 0 %v", sent, b.sourceDrops(t), b.unseen(t), s.Outputs[0].Drops)
	}
	for q := range 2 {
		if b.path.set.table.rules[0].counts.workers[q] == nil {
			t.Errorf("queue %d had no frames, which proves little", q)
		}
	}
}
