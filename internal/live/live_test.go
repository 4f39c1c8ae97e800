package live

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/packet"
)

var group = netip.AddrFrom4([4]byte{239, 1, 1, 1})

const port = 5000

// frameOf is a frame of the source, with this tag.
func frameOf(trial, flow, seq, stamp uint32) []byte {
	payload := make([]byte, 64)
	for i, v := range []uint32{trial, flow, seq, stamp} {
		binary.NativeEndian.PutUint32(payload[4*i:], v)
	}
	return packet.Frame{
		DstMAC: packet.MulticastMAC(group), SrcMAC: [6]byte{2, 0, 0, 0, 0, 1},
		Src: netip.AddrFrom4([4]byte{10, 0, 0, 1}), Dst: group, SrcPort: uint16(10000 + flow), DstPort: port, TTL: 16, Payload: payload,
	}.Build()
}

// newWitness is a witness on a host of its own.
func newWitness(t *testing.T, flows int) *Witness {
	t.Helper()
	h := labtest.Host(t, "live")
	labtest.Connect(t, lab.End{Host: h, Name: "a"}, lab.End{Host: h, Name: "b"})
	var w *Witness
	labtest.Do(t, h, func() (err error) {
		w, err = NewWitness("b", WitnessOptions{Group: group, Port: port, Flows: flows, StampShift: 10})
		return err
	})
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

// run passes a frame to the witness, and returns the verdict.
func (w *Witness) run(t *testing.T, frame []byte) uint32 {
	t.Helper()
	verdict, err := w.objs.Witness.Run(&ebpf.RunOptions{Data: frame})
	if err != nil {
		t.Fatal(err)
	}
	return verdict
}

// The witness counts what an oracle counts that remembers every number, over losses, copies, late packets and
// jumps, with the window as its only limit.
func TestWitness(t *testing.T) {
	labtest.RequireRoot(t)
	const flows = 2
	w := newWitness(t, flows)
	const drop = 1
	for trial := uint32(1); trial <= 6; trial++ {
		if err := w.Expect(trial); err != nil {
			t.Fatal(err)
		}
		random := rand.New(rand.NewPCG(7, uint64(trial)))
		var want Seen
		var highest [flows]uint32
		var seen [flows]map[uint32]bool
		see := func(flow, seq uint32) {
			if got := w.run(t, frameOf(trial, flow, seq, 0)); got != drop {
				t.Fatalf("verdict %d", got)
			}
			if seen[flow] == nil {
				seen[flow] = map[uint32]bool{}
				highest[flow] = seq
			}
			switch {
			case seq < highest[flow] && highest[flow]-seq > Window:
				want.Forgotten++
				return
			case seen[flow][seq]:
				want.Doubled++
				return
			}
			want.Packets++
			if seq < highest[flow] {
				want.Reordered++
			}
			seen[flow][seq] = true
			highest[flow] = max(highest[flow], seq)
		}
		next := [flows]uint32{uint32(random.IntN(3)) * 100, random.Uint32N(1 << 26)}
		for range 4_000 {
			flow := random.Uint32N(flows)
			n := &next[flow]
			switch random.IntN(40) {
			case 0: // lost
				*n += random.Uint32N(500)
			case 1: // a copy, or one that is late
				see(flow, *n-min(*n, random.Uint32N(300)))
			case 2: // far behind
				see(flow, *n-min(*n, Window-200+random.Uint32N(400)))
			case 3:
				if random.IntN(20) == 0 {
					*n += random.Uint32N(3 << 24)
				}
			}
			see(flow, *n)
			*n++
		}
		got, err := w.Read()
		if err != nil {
			t.Fatal(err)
		}
		got.Longest = 0
		if got != want || want.Packets == 0 || want.Doubled == 0 || want.Reordered == 0 || want.Forgotten == 0 {
			t.Fatalf("trial %d: %+v, want %+v", trial, got, want)
		}
	}
}

// Frames that are damaged, of another trial or for others are none of the stream's.
func TestWitnessFindsWrong(t *testing.T) {
	labtest.RequireRoot(t)
	w := newWitness(t, 1)
	if err := w.Expect(2); err != nil {
		t.Fatal(err)
	}
	damaged := frameOf(2, 0, 0, 0)
	damaged[44]++
	header := frameOf(2, 0, 0, 0)
	header[22]-- // TTL
	other := frameOf(2, 0, 0, 0)
	other[33]++
	for _, frame := range [][]byte{frameOf(2, 0, 0, 0), damaged, header, other, frameOf(2, 1, 0, 0), frameOf(1, 0, 0, 0), make([]byte, 60)} {
		w.run(t, frame)
	}
	got, err := w.Read()
	if want := (Seen{Packets: 1, Checksum: 2, Address: 2, Stray: 1}); err != nil || got != want {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
}

// The gap is the time between two packets; not that before the second was sent, if none is missing between them.
func TestWitnessGap(t *testing.T) {
	labtest.RequireRoot(t)
	w := newWitness(t, 1)
	const pause = 40 * time.Millisecond
	for _, tt := range []struct {
		name  string
		seqs  [2]uint32
		sent  bool // the second is sent after the pause
		still bool
	}{
		{"under way", [2]uint32{0, 1}, false, true},
		{"not sent", [2]uint32{0, 1}, true, false},
		{"one missing", [2]uint32{0, 2}, true, true},
	} {
		if err := w.Expect(1); err != nil {
			t.Fatal(err)
		}
		// Programs that are only run see the same clock.
		w.run(t, frameOf(1, 0, tt.seqs[0], stamp(t)))
		second := stamp(t)
		time.Sleep(pause)
		if tt.sent {
			second = stamp(t)
		}
		started := time.Now()
		w.run(t, frameOf(1, 0, tt.seqs[1], second))
		took := time.Since(started)
		got, err := w.Read()
		if err != nil {
			t.Fatal(err)
		}
		const unit = 2 * time.Microsecond // of stamps, rounded
		if tt.still && got.Longest < pause-unit || !tt.still && got.Longest > took+pause/2 {
			t.Errorf("%s: the gap is %v", tt.name, got.Longest)
		}
	}
}

// stamp is the time as frames carry it.
func stamp(t *testing.T) uint32 {
	t.Helper()
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		t.Fatal(err)
	}
	return uint32(now.Nano() >> 10)
}

// pair is a source and a witness, connected directly.
func pair(t *testing.T, flows int) (h, far *lab.Host, s *Source, w *Witness) {
	t.Helper()
	h, far = labtest.Host(t, "live"), labtest.Host(t, "far")
	labtest.Connect(t, lab.End{Host: h, Name: "a"}, lab.End{Host: far, Name: "b"})
	s, err := NewSource(SourceOptions{Frame: frameOf(0, 0, 0, 0), Index: labtest.Index(t, h, "a"), FirstGroup: group, FirstPort: 10000, Flows: flows, StampShift: 10})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	labtest.Do(t, far, func() (err error) {
		w, err = NewWitness("b", WitnessOptions{Group: group, Port: port, Flows: flows, StampShift: 10})
		return err
	})
	t.Cleanup(func() { _ = w.Close() })
	return h, far, s, w
}

// Every frame sent is seen, or was refused by the link, at a rate and as fast as possible; one call
// continues the numbers of another.
func TestSourceToWitness(t *testing.T) {
	labtest.RequireRoot(t)
	const flows = 3
	h, far, s, w := pair(t, flows)
	for trial, plan := range []Plan{
		{Frames: 3 * 5_000, Rate: 200_000, Batch: 4, Stamped: true},
		{Frames: 3 * 20_000, Batch: 64},
		{Frames: 3 * 2_000, Rate: 1e9, Stamped: true, Behind: time.Microsecond},
	} {
		plan.Trial = uint32(trial + 1)
		if err := w.Expect(plan.Trial); err != nil {
			t.Fatal(err)
		}
		var before, after uint64
		refused := func(n *uint64) {
			labtest.Do(t, h, func() (err error) { *n, err = Refused("a"); return err })
		}
		refused(&before)
		const calls = 2
		for range calls {
			labtest.Do(t, h, func() error {
				sent, err := s.Send(t.Context(), plan)
				if err == nil && sent.Frames != uint64(plan.Frames) {
					err = errors.New("not all were sent")
				}
				if plan.Rate == 200_000 && float64(sent.Frames-1)/float64(sent.Ended-sent.Started)*1e9 > 1.001*plan.Rate {
					t.Errorf("%d frames in %d ns are faster than the rate", sent.Frames, sent.Ended-sent.Started)
				}
				if (sent.Shifted > 0) != (plan.Behind > 0) {
					t.Errorf("%+v: it shifted its schedule by %v", plan, sent.Shifted)
				}
				return err
			})
			plan.First += uint32(plan.Frames / flows)
		}
		var got Seen
		labtest.Eventually(t, "all frames are accounted for", func() bool {
			refused(&after)
			var err error
			if got, err = w.Read(); err != nil {
				t.Fatal(err)
			}
			return got.Packets+after-before == uint64(calls*plan.Frames)
		})
		if got.Doubled+got.Reordered+got.Forgotten+got.Checksum+got.Address+got.Stray > 0 {
			t.Errorf("%+v: %+v", plan, got)
		}
	}
	// Frames that are too long for the peer are refused.
	if err := far.Netlink().LinkSetMTU(labtest.Link(t, far, "b"), 68); err != nil {
		t.Fatal(err)
	}
	var before, after uint64
	labtest.Do(t, h, func() (err error) {
		if before, err = Refused("a"); err != nil {
			return err
		}
		if _, err = s.Send(t.Context(), Plan{Trial: 8, Frames: 100}); err != nil {
			return err
		}
		after, err = Refused("a")
		return err
	})
	if after-before != 100 {
		t.Errorf("%d of 100 long frames were refused", after-before)
	}
	// A context that has ended sends nothing.
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	labtest.Do(t, h, func() error {
		sent, err := s.Send(ended, Plan{Trial: 9, Frames: 1000, Rate: 1000})
		if sent.Frames > 900 {
			t.Errorf("%d frames were sent after the end", sent.Frames)
		}
		return err
	})
}

// Legs leave by interfaces of several namespaces, and one of them falls silent at exactly the numbers
// that it was told to. A witness that counts them as one has each number once, and notes when it came.
func TestLegs(t *testing.T) {
	labtest.RequireRoot(t)
	const numbers = 3000
	silences := []Silence{{0, 100}, {500, 501}, {502, 1000}, {numbers - 1, numbers}}
	var s *Source
	var hosts [2]*lab.Host
	var all, seconds *Witness
	for i := range hosts {
		hosts[i] = labtest.Host(t, "leg")
		far := labtest.Host(t, "far")
		labtest.Connect(t, lab.End{Host: hosts[i], Name: "a"}, lab.End{Host: far, Name: "b"})
		labtest.Do(t, far, func() error {
			w, err := NewWitness("b", WitnessOptions{Group: group, Port: port, Flows: 2, StampShift: 10, Legs: true, Arrivals: numbers})
			if err == nil {
				t.Cleanup(func() { _ = w.Close() })
			}
			all, seconds = seconds, w
			return err
		})
	}
	s, err := NewSource(SourceOptions{Frame: frameOf(0, 0, 0, 0), FirstGroup: group, FirstPort: 10000, Flows: 2, Legs: true, StampShift: 10})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	if err := s.SetInterface(2, 1); err == nil {
		t.Error("an interface for a third flow is accepted")
	}
	plan := Plan{Frames: 2 * numbers, Rate: 50_000, Silences: silences}
	silent := 0
	for _, r := range silences {
		silent += int(r.To - r.From)
	}
	refused := func() (all uint64) {
		for _, h := range hosts {
			labtest.Do(t, h, func() error {
				n, err := Refused("a")
				all += n
				return err
			})
		}
		return all
	}
	// run sends, again if a busy machine let a ring overflow.
	run := func() (got, other Seen) {
		for lost := uint64(1); lost > 0; {
			before := refused()
			plan.Trial++
			for _, w := range []*Witness{all, seconds} {
				if err := w.Expect(plan.Trial); err != nil {
					t.Fatal(err)
				}
			}
			labtest.Do(t, hosts[0], func() error {
				_, err := s.Send(t.Context(), plan)
				return err
			})
			labtest.Eventually(t, "all frames are accounted for", func() bool {
				lost = refused() - before
				var err1, err2 error
				got, err1 = all.Read()
				other, err2 = seconds.Read()
				if err := errors.Join(err1, err2); err != nil {
					t.Fatal(err)
				}
				return got.Packets+got.Doubled+other.Packets+lost == uint64(2*numbers-silent)
			})
		}
		return got, other
	}
	for _, second := range hosts { // both legs to one witness, and one to each
		for flow, h := range []*lab.Host{hosts[0], second} {
			labtest.Do(t, h, func() error { return s.SetInterface(flow, labtest.Index(t, h, "a")) })
		}
		got, other := run()
		at, err := all.Arrivals()
		if err != nil || len(at) != numbers {
			t.Fatalf("%d arrivals, %v", len(at), err)
		}
		if second == hosts[0] {
			if got.Packets != numbers || slices.Min(at) == 0 || !slices.IsSorted(at) {
				t.Errorf("both legs: %+v, first at %v", got, at[0])
			}
			continue
		}
		if other.Packets != numbers {
			t.Errorf("one leg: %+v of %d", other, numbers)
		}
		others, err := seconds.Arrivals()
		if err != nil {
			t.Fatal(err)
		}
		for n, when := range at {
			if when > others[n] {
				t.Errorf("number %d came on the second leg %v before the first", n, when-others[n])
			}
			silent := slices.ContainsFunc(silences, func(r Silence) bool { return uint32(n) >= r.From && uint32(n) < r.To })
			if silent != (when == 0) {
				t.Errorf("number %d came at %v, silent %v", n, when, silent)
			}
		}
	}
	for _, wrong := range [][]Silence{{{5, 5}}, {{5, 7}, {7, 9}}, make([]Silence, MaxSilences+1)} {
		if _, err := s.Send(t.Context(), Plan{Frames: 1, Silences: wrong}); err == nil {
			t.Errorf("silences %v are accepted", wrong)
		}
	}
}
