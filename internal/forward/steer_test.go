package forward

import (
	"bytes"
	"fmt"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
)

// steered is the fanout path on an input with one receive queue and the relay program,
// which spreads flows over two CPUs.
type steered struct {
	*xdpBench
	fanout *Fanout
	rule   flow.Flow
}

// cpusOf returns two CPUs of different workers.
func cpusOf(t testing.TB) []int {
	t.Helper()
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		t.Fatal(err)
	}
	var cpus []int
	for cpu := range 1024 {
		if set.IsSet(cpu) && !slices.ContainsFunc(cpus, func(c int) bool { return c%2 == cpu%2 }) {
			cpus = append(cpus, cpu)
		}
	}
	if len(cpus) < 2 {
		labtest.Lacking(t, "needs two CPUs, an even and an odd one")
	}
	return cpus
}

func newSteered(t testing.TB, mtu int) *steered {
	t.Helper()
	s := &steered{xdpBench: newXDPBench(t, 1, 1, mtu)}
	s.fanout = s.bench.path(t, FanoutOptions{Workers: 2})
	s.rule = rule("r", s.in, "239.1.1.1", 0, sendTo(s.out[0], "239.9.9.1", 6000))
	s.rule.Steered = true
	s.sync(t)
	return s
}

func (s *steered) sync(t testing.TB) {
	t.Helper()
	s.bench.sync(t, s.fanout, s.rule)
	labtest.Do(t, s.relay, func() error {
		if err := s.loader.SetSteering(cpusOf(t)); err != nil {
			return err
		}
		kernel := s.rule
		kernel.Out = slices.Clone(s.rule.Out)
		kernel.Out[0].Ready = false
		return s.loader.Sync([]*flow.Flow{&kernel})
	})
	if w := s.loader.Warnings(); len(w) != 0 && labtest.TCX(t) { // without tcx it warns
		t.Errorf("warnings %q", w)
	}
}

// portOf gives each stream its own port.
func portOf(stream, n int) packet.Frame {
	f := numbered(stream, n)
	f.DstPort = uint16(5000 + stream)
	return f
}

// sends sends streams round-robin from number from to number to, and waits until they
// have arrived.
func (s *steered) sends(t testing.TB, streams, from, to int, sink *counted) {
	t.Helper()
	source := openSender(t, s.source, iface(t, s.source, "eth0").Index)
	onOneCPU(t, func() {
		for n := from; n < to; n++ {
			var burst [][]byte
			for stream := range streams {
				burst = append(burst, portOf(stream, n).Build())
			}
			sendFrames(t, source, burst)
			labtest.Eventually(t, "earlier frames have arrived", func() bool { return sink.total.Load() > int64((n+1)*streams-window) })
		}
	})
	labtest.Eventually(t, fmt.Sprintf("%d frames have arrived", to*streams), func() bool { return sink.total.Load() >= int64(to*streams) })
}

func (s *steered) received(t testing.TB) (frames []uint64) {
	t.Helper()
	groups, err := s.fanout.Groups()
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range groups[0].Workers {
		if w.Dropped != 0 || w.Failures != 0 {
			t.Errorf("worker: %+v", w)
		}
		frames = append(frames, w.Received)
	}
	return frames
}

// From one receive queue to two workers, each stream on one of them: every frame once,
// in the order of its stream, while the interface goes down and up and the control
// process is replaced.
func TestSteered(t *testing.T) {
	s := newSteered(t, 0)
	sink := countOn(t, s.sinks[0])
	const streams, each = 64, 100
	s.sends(t, streams, 0, each, sink)
	if got := s.received(t); got[0] < streams/8*each || got[1] < streams/8*each || got[0]+got[1] != streams*each {
		t.Errorf("the workers had %d frames of %d", got, streams*each)
	}
	adds(t, s.fanout, "r", streams*each)

	if err := s.relay.SetUp("in", false); err != nil {
		t.Fatal(err)
	}
	s.up(t, "in", s.source)
	s.sends(t, streams, each, 2*each, sink)

	s.reopen(t)
	s.sync(t)
	s.sends(t, streams, 2*each, 3*each, sink)
	if got := s.received(t); got[0] < streams/4*each || got[1] < streams/4*each || got[0]+got[1] != 3*streams*each {
		t.Errorf("the workers had %d frames of %d", got, 3*streams*each)
	}
}

// reopen makes another Loader take over the kernel's state.
func (s *steered) reopen(t testing.TB) {
	t.Helper()
	opts := s.opts
	labtest.Do(t, s.relay, func() error {
		if err := s.loader.Close(); err != nil {
			return err
		}
		l, err := loader.Open(opts)
		if err == nil {
			s.loader = l
		}
		return err
	})
}

// The fragments of a datagram, and the whole datagrams of its flow, stay together.
func TestSteeredFragments(t *testing.T) {
	s := newSteered(t, 0)
	sink := catch(t, s.sinks[0], "eth0")
	source := openSender(t, s.source, iface(t, s.source, "eth0").Index)
	const streams, each, parts = 16, 8, 4
	var got [][]byte
	for n := range each { // at a pace: a round fits the queues on the way
		for stream := range streams {
			long := portOf(stream, 2*n)
			long.Payload = append(long.Payload, make([]byte, 1400)...)
			frames := append(packet.Fragment(long.Build(), uint32(1+n*streams+stream), 400), portOf(stream, 2*n+1).Build())
			if len(frames) != parts+1 {
				t.Fatalf("%d fragments, want %d", len(frames)-1, parts)
			}
			sendFrames(t, source, frames)
		}
		got = append(got, sink.frames(t, streams*(parts+1))...)
	}
	next := map[string]int{}
	for _, frame := range got {
		h, _ := packet.Parse(frame)
		if h.Part != packet.Whole && h.Part != packet.FirstFragment {
			continue
		}
		stream, n, _ := number(frame)
		key := fmt.Sprint(stream)
		if n != next[key] {
			t.Errorf("stream %d: datagram %d comes as number %d", stream, n, next[key])
		}
		next[key]++
	}
	f := s.fanout.Fragments()
	if f.First.Packets != streams*each || f.Later.Packets != streams*each*(parts-1) || f.Orphan.Packets != 0 {
		t.Errorf("fragments %+v", f)
	}
	if got := s.received(t); got[0] == 0 || got[1] == 0 {
		t.Errorf("the workers had %d frames, which proves little", got)
	}
	labtest.Do(t, s.relay, func() error {
		stats, err := s.loader.Stats()
		if stats.Fragments.First.Packets != 0 || stats.Fragments.Later.Packets != 0 {
			t.Errorf("counted twice: %+v", stats.Fragments)
		}
		return err
	})
}

// A frame of several buffers reaches its worker whole.
func TestSteeredJumbo(t *testing.T) {
	s := newSteered(t, 9000)
	sink := catch(t, s.sinks[0], "eth0")
	source := openSender(t, s.source, iface(t, s.source, "eth0").Index)
	for stream := range 8 {
		f := portOf(stream, 0)
		f.Payload = append(f.Payload, bytes.Repeat([]byte{byte(stream), 7}, 4000)...)
		frame := f.Build()
		sendFrames(t, source, [][]byte{frame})
		receive(t, sink, [][]byte{expect(t, s.rule.Out[0], frame)})
	}
}
