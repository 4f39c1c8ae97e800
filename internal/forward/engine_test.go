package forward

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
	"xdpcast/pkg/fanout"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
)

var inFace = &net.Interface{Index: 1, HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 1, 1}}

func outFace(index int) *net.Interface {
	return &net.Interface{Index: index, MTU: 1500, HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 1, byte(index)}}
}

// newEngine makes a set with one engine for interface 1, with senders by interface; a
// nil sender means that the interface does not exist.
func newEngine(t testing.TB, senders map[int]Sender, rules ...flow.Flow) (*Set, *Engine) {
	t.Helper()
	set := NewSet(1)
	e, err := set.NewEngine(1, 0, func(index int) (Sender, error) {
		if s := senders[index]; s != nil {
			return s, nil
		}
		return nil, unix.ENODEV
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := set.Update(rules, ownAddresses, nil); err != nil {
		t.Fatal(err)
	}
	return set, e
}

// forwardAll forwards one batch.
func forwardAll(e *Engine, at int64, frames ...[]byte) {
	e.Begin()
	for _, f := range frames {
		e.Frame(1, f, at)
	}
	e.End()
}

// Packets refused by a sender are dropped with its reason, for its output alone, and
// later packets are tried.
func TestRefused(t *testing.T) {
	frames := make([][]byte, 100)
	for i := range frames {
		frames[i] = numbered(0, i).Build()
	}
	for _, c := range []struct {
		err    error
		reason loader.Reason
	}{
		{unix.EAGAIN, loader.TxFull},
		{unix.ENOBUFS, loader.TxFull},
		{unix.ENOMEM, loader.TxFull},
		{unix.EMSGSIZE, loader.MTU},
		{unix.ENETDOWN, loader.NoDevice},
		{unix.ENXIO, loader.NoDevice},
		{unix.ENODEV, loader.NoDevice},
		{unix.EINVAL, loader.Internal},
	} {
		t.Run(c.err.Error(), func(t *testing.T) {
			good, bad := &recorder{}, &recorder{refuse: func() error { return c.err }}
			r := rule("r", inFace, "239.1.1.1", 5000, sendTo(outFace(3), "239.9.9.1", 6000), sendTo(outFace(4), "239.9.9.2", 6000))
			set, e := newEngine(t, map[int]Sender{3: good, 4: bad}, r)
			forwardAll(e, 1, frames...)
			s := set.Stats(nil)[0]
			if s.Outputs[0].Sent != s.Matched || len(good.sent) != len(frames) {
				t.Errorf("the good output: %+v, %d frames", s.Outputs[0], len(good.sent))
			}
			if drops := s.Outputs[1].Drops; len(drops) != 1 || drops[c.reason] != s.Matched {
				t.Errorf("the bad output: %+v, want all for reason %v", s.Outputs[1], c.reason)
			}
			bad.refuse = nil
			forwardAll(e, 1, frames[0])
			if got := set.Stats(nil)[0].Outputs[1].Sent.Packets; got != 1 {
				t.Errorf("%d sent when it was good again", got)
			}
		})
	}
}

// A device that is briefly full loses nothing; one that stays full costs a bounded
// share of time.
func TestBoundedRetry(t *testing.T) {
	refusals := 0
	busy := &recorder{refuse: func() error {
		if refusals++; refusals == 1 {
			return unix.EAGAIN
		}
		return nil
	}}
	r := rule("r", inFace, "239.1.1.1", 5000, sendTo(outFace(3), "239.9.9.1", 6000))
	set, e := newEngine(t, map[int]Sender{3: busy}, r)
	forwardAll(e, 1, numbered(0, 0).Build())
	if s := set.Stats(nil)[0]; s.Outputs[0].Sent.Packets != 1 || refusals != 2 {
		t.Errorf("%+v after %d tries", s.Outputs[0], refusals)
	}

	// Packets every 10 us, none of which are taken, and a thread that oversleeps.
	for _, queues := range []int{1, 16} {
		q, now, waited := newQueue(&recorder{}), time.Now(), time.Duration(0)
		for end := now.Add(time.Second); now.Before(end); now = now.Add(10 * time.Microsecond) {
			if pause := q.pause(now, queues); pause > 0 {
				now = now.Add(3 * pause)
				waited += 3 * pause
				q.waited(now)
			}
		}
		most := time.Second/time.Duration(patience*queues) + maxPatience + 3*retryPause
		if waited > most || waited < most/2 {
			t.Errorf("%d queues: waited %v of a second, want at most %v", queues, waited, most)
		}
	}
}

// Drops of an output whose interface does not exist are counted, and the next Update
// that finds the interface opens it.
func TestInterfaceComes(t *testing.T) {
	senders := map[int]Sender{}
	r := rule("r", inFace, "239.1.1.1", 5000, sendTo(outFace(3), "239.9.9.1", 6000))
	set, e := newEngine(t, senders, r)
	forwardAll(e, 1, numbered(0, 0).Build())
	if s := set.Stats(nil)[0]; s.Outputs[0].Drops[loader.NoDevice].Packets != 1 {
		t.Fatalf("%+v", s)
	}
	first := &recorder{refuse: func() error { return unix.ENXIO }}
	senders[3] = first
	if err := set.Update([]flow.Flow{r}, ownAddresses, nil); err != nil {
		t.Fatal(err)
	}
	forwardAll(e, 1, numbered(0, 1).Build()) // gone again
	second := &recorder{}
	senders[3] = second
	if err := set.Update([]flow.Flow{r}, ownAddresses, nil); err != nil {
		t.Fatal(err)
	}
	forwardAll(e, 1, numbered(0, 2).Build())
	if len(second.sent) != 1 || !first.closed || second.closed {
		t.Errorf("%d sent; first closed %v, second closed %v", len(second.sent), first.closed, second.closed)
	}
	if err := set.Remove(e); err != nil || !second.closed {
		t.Errorf("removed: %v, closed %v", err, second.closed)
	}
}

// A sender that cannot be opened leaves the rules unchanged, and no sender open.
func TestUpdateFails(t *testing.T) {
	kept, fresh := &recorder{}, &recorder{}
	senders := map[int]Sender{3: kept, 4: fresh}
	set := NewSet(1)
	e, err := set.NewEngine(1, 0, func(index int) (Sender, error) {
		if s := senders[index]; s != nil {
			return s, nil
		}
		return nil, unix.EMFILE
	})
	if err != nil {
		t.Fatal(err)
	}
	old := rule("old", inFace, "239.1.1.1", 5000, sendTo(outFace(3), "239.9.9.1", 6000))
	if err := set.Update([]flow.Flow{old}, nil, nil); err != nil {
		t.Fatal(err)
	}
	bad := old
	bad.Out = []flow.Output{old.Out[0], sendTo(outFace(4), "239.9.9.2", 6000), sendTo(outFace(5), "239.9.9.3", 6000)}
	if err := set.Update([]flow.Flow{bad}, nil, nil); !errors.Is(err, unix.EMFILE) {
		t.Fatalf("update: %v", err)
	}
	if kept.closed || !fresh.closed {
		t.Errorf("kept closed %v, fresh closed %v", kept.closed, fresh.closed)
	}
	forwardAll(e, 1, numbered(0, 0).Build())
	if s := set.Stats(nil); len(s) != 1 || len(s[0].Outputs) != 1 || s[0].Outputs[0].Sent.Packets != 1 {
		t.Errorf("%+v", s)
	}
}

// A rule that no engine could forward is refused with its name.
func TestUpdateRefuses(t *testing.T) {
	good := rule("r", inFace, "239.1.1.1", 5000, sendTo(outFace(3), "239.9.9.1", 6000))
	for name, change := range map[string]func(*flow.Flow){
		"no name":         func(r *flow.Flow) { r.Name = "" },
		"no outputs":      func(r *flow.Flow) { r.Out = nil },
		"no input":        func(r *flow.Flow) { r.In.Index = 0 },
		"no group":        func(r *flow.Flow) { r.In.Group = netip.Addr{} },
		"mapped group":    func(r *flow.Flow) { r.In.Group = netip.MustParseAddr("::ffff:239.1.1.1") },
		"prefix too long": func(r *flow.Flow) { r.In.Len = 33 },
		"prefix bits":     func(r *flow.Flow) { r.In.Len = 16 },
		"source family":   func(r *flow.Flow) { r.In.Source = netip.MustParseAddr("fd00::1") },
		"family":          func(r *flow.Flow) { r.Out[0].Dst = netip.MustParseAddr("ff3e::1") },
		"output source":   func(r *flow.Flow) { r.Out[0].Src = netip.MustParseAddr("fd00::1") },
		"output prefix":   func(r *flow.Flow) { r.Out[0].DstLen = 33 },
		"output port":     func(r *flow.Flow) { r.Out[0].DstPort = 0 },
		"output index":    func(r *flow.Flow) { r.Out[0].Index = 0 },
		"output VLAN":     func(r *flow.Flow) { r.Out[0].VLAN = 3 },
		"blocked":         func(r *flow.Flow) { r.Out[0].Ready, r.Out[0].Blocked = false, 200 },
	} {
		t.Run(name, func(t *testing.T) {
			r := good
			r.Out = slices.Clone(good.Out)
			change(&r)
			var refused *loader.RuleError
			if err := NewSet(1).Update([]flow.Flow{r}, nil, nil); !errors.As(err, &refused) || refused.Rule != r.Name {
				t.Errorf("update: %v", err)
			}
		})
	}
	for name, twice := range map[string]string{"name": "r", "input": "other"} {
		second := good
		second.Name = twice
		if name == "name" {
			second.In.Port = 1
		}
		if err := NewSet(1).Update([]flow.Flow{good, second}, nil, nil); err == nil {
			t.Errorf("the same %s twice was taken", name)
		}
	}
}

// A rule and an output pass packets according to their rates, in packets and in bytes,
// and a change of address does not refill their buckets.
func TestPoliced(t *testing.T) {
	sink := &recorder{}
	r := rule("r", inFace, "239.1.1.1", 5000, sendTo(outFace(3), "239.9.9.1", 6000))
	r.Rate = flow.Rate{Packets: 1000, Burst: 4}
	frame := numbered(0, 0).Build()
	r.Out[0].Rate = flow.Rate{Bits: uint64(len(frame)) * 8 * 500, Burst: 2 * uint64(len(frame))} // 500 packets a second
	set, e := newEngine(t, map[int]Sender{3: sink}, r)
	at := int64(time.Hour)
	for range 10 {
		forwardAll(e, at, frame)
	}
	s := set.Stats(nil)[0]
	if s.Drops[loader.Policed].Packets != 6 || s.Outputs[0].Drops[loader.Policed].Packets != 2 || s.Outputs[0].Sent.Packets != 2 {
		t.Fatalf("%+v", s)
	}
	r.Out = slices.Clone(r.Out)
	r.Out[0].DstMAC = [6]byte{1, 2, 3, 4, 5, 6}
	if err := set.Update([]flow.Flow{r}, ownAddresses, nil); err != nil {
		t.Fatal(err)
	}
	forwardAll(e, at, frame)
	forwardAll(e, at+int64(2*time.Millisecond), frame, frame, frame)
	s = set.Stats(nil)[0]
	if s.Drops[loader.Policed].Packets != 8 || s.Outputs[0].Sent.Packets != 3 || s.Matched.Packets != 14 {
		t.Errorf("%+v", s)
	}
	if accounted(&s, 0) != s.Matched {
		t.Errorf("%+v does not add up", s)
	}
}

// Later fragments use the port of the first for two seconds, whichever worker received
// it; those without a first one match no rule.
func TestFragments(t *testing.T) {
	sink := &recorder{}
	long := numbered(0, 0)
	long.Payload = bytes.Repeat([]byte{1}, 100)
	parts := packet.Fragment(long.Build(), 7, 48)
	r := rule("r", inFace, "239.1.1.1", 5000, sendTo(outFace(3), "239.9.9.1", 6000))
	set := NewSet(2)
	var engines []*Engine
	for i := range 2 {
		e, err := set.NewEngine(1, i, func(int) (Sender, error) { return sink, nil })
		if err != nil {
			t.Fatal(err)
		}
		engines = append(engines, e)
	}
	if err := set.Update([]flow.Flow{r}, nil, nil); err != nil {
		t.Fatal(err)
	}
	at := int64(time.Minute)
	forwardAll(engines[0], at, parts[1]) // too early
	forwardAll(engines[0], at, parts[0])
	forwardAll(engines[1], at+fragmentTimeout, parts[1:]...)
	forwardAll(engines[1], at+fragmentTimeout+1, parts[1])
	f := set.Fragments()
	if f.First.Packets != 1 || f.Later.Packets != uint64(len(parts)-1) || f.Orphan.Packets != 2 {
		t.Errorf("%+v", f)
	}
	if len(sink.sent) != len(parts) {
		t.Errorf("%d of %d fragments sent", len(sink.sent), len(parts))
	}
	if err := set.Remove(engines[1]); err != nil {
		t.Fatal(err)
	}
	if again := set.Fragments(); again != f {
		t.Errorf("%+v after an engine went, %+v before", again, f)
	}
}

// The table of fragments is bounded: of many datagrams, it keeps the last.
func TestFragmentsBounded(t *testing.T) {
	f := newFragments()
	h := packet.Headers{Src: netip.MustParseAddr("10.0.0.1"), Dst: netip.MustParseAddr("239.1.1.1"), DstPort: 5000}
	const datagrams = 20 * fragmentBuckets * fragmentWays
	for id := range uint32(datagrams) {
		h.FragmentID = id
		f.remember(1, &h, int64(id)+1)
	}
	known := 0
	for id := uint32(datagrams - 1000); id < datagrams; id++ {
		h.FragmentID = id
		if f.port(1, &h, datagrams) == 5000 {
			known++
		}
	}
	if known != 1000 {
		t.Errorf("%d of the last 1000 datagrams are known", known)
	}
	h.FragmentID = 0
	if f.port(1, &h, datagrams) != 0 {
		t.Error("the first datagram is still known")
	}
}

// A rule can be identified by the number of its first output, as the relay program does.
func TestByFirstOutput(t *testing.T) {
	sink := &recorder{}
	r := rule("r", inFace, "239.1.1.1", 5000, sendTo(outFace(3), "239.9.9.1", 6000))
	set, e := newEngine(t, map[int]Sender{3: sink})
	if err := set.Update([]flow.Flow{r}, ownAddresses, map[string]uint32{"r": 42}); err != nil {
		t.Fatal(err)
	}
	frame := numbered(0, 0).Build()
	want := expect(t, r.Out[0], frame)
	h, _ := packet.Parse(frame)
	copy(frame[:12], "handed over!") // in place of the MAC addresses
	e.Begin()
	if e.Table().ByFirstOutput(41) != nil {
		t.Error("a rule for a number that none has")
	}
	e.Deliver(e.Table().ByFirstOutput(42), frame, &h, 1)
	e.End()
	if len(sink.sent) != 1 || !bytes.Equal(sink.sent[0], want) {
		t.Errorf("sent %x, want %x", sink.sent, want)
	}
	if s := set.Stats([]string{"r", "none"}); len(s) != 1 || s[0].Matched.Packets != 1 || s[0].LastSeen < 0 {
		t.Errorf("%+v", s)
	}
}

// taker is a sender that takes everything.
type taker struct{ packets, bytes int }

func (s *taker) Send(packets []fanout.Packet) (int, error) {
	for _, p := range packets {
		s.bytes += len(p.Header) + len(p.Payload)
	}
	s.packets += len(packets)
	return len(packets), nil
}
func (*taker) Ethernet() bool { return true }
func (*taker) Close() error   { return nil }

// There is no allocation per packet: whole, fragment, policed or without an Ethernet
// header.
func TestNothingAllocated(t *testing.T) {
	sink := &taker{}
	a := rule("a", inFace, "239.1.1.1", 5000, sendTo(outFace(3), "239.9.9.1", 6000), sendTo(outFace(3), "239.9.9.2", 6000))
	a.Rate = flow.Rate{Packets: 1, Burst: 100}
	b := rule("b", inFace, "239.1.0.0", 0, sendTo(outFace(3), "239.9.9.1", 6000))
	b.In.Len = 16
	c := rule("c", inFace, "ff3e::1", 5000, sendTo(outFace(3), "ff3e::9", 6000))
	set, e := newEngine(t, map[int]Sender{3: sink}, a, b, c)
	v6, prefix, long := numbered(0, 0), numbered(0, 0), numbered(0, 0)
	v6.Src, v6.Dst = netip.MustParseAddr("fd00::1"), netip.MustParseAddr("ff3e::1")
	prefix.Dst = netip.MustParseAddr("239.1.7.7")
	long.Payload = make([]byte, 500)
	frames := append([][]byte{numbered(0, 0).Build(), v6.Build(), prefix.Build()}, packet.Fragment(long.Build(), 1, 200)...)
	at := int64(1)
	allocs := testing.AllocsPerRun(500, func() {
		e.Begin()
		for _, f := range frames {
			e.Frame(1, f, at)
			e.Packet(1, f[14:], at)
		}
		e.End()
		at++
	})
	if allocs != 0 {
		t.Errorf("%v allocations a run", allocs)
	}
	if sink.packets == 0 || set.Stats([]string{"a"})[0].Drops[loader.Policed].Packets == 0 {
		t.Errorf("%d packets sent, %+v", sink.packets, set.Stats(nil))
	}
}

// Readers never see a counter decrease, nor more copies than packets.
func TestCountersWhileForwarding(t *testing.T) {
	set, e := newEngine(t, map[int]Sender{3: &taker{}}, rule("r", inFace, "239.1.1.1", 5000, sendTo(outFace(3), "239.9.9.1", 6000)))
	frames := slices.Repeat([][]byte{numbered(0, 0).Build()}, 100)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 500 {
			forwardAll(e, 1, frames...)
		}
	}()
	var last loader.RuleStats
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		s := set.Stats(nil)[0]
		if s.Matched.Packets < last.Matched.Packets || s.Matched.Bytes < last.Matched.Bytes {
			t.Fatalf("%+v after %+v", s, last)
		}
		last = s
	}
	if last.Matched.Packets != 50000 || last.Outputs[0].Sent != last.Matched {
		t.Errorf("%+v", last)
	}
}

// For any bytes, the engine neither panics nor miscounts.
func FuzzEngine(f *testing.F) {
	w := newWorld(1, 2)
	rules := unguarded(w, 0)
	for range 20 {
		_, frames := w.Frames(rules)
		f.Add(frames[0])
	}
	senders := map[int]Sender{3: &taker{}, 4: &taker{}, 5: &taker{}}
	set, e := newEngine(f, senders, rules...)
	at := int64(0)
	f.Fuzz(func(t *testing.T, data []byte) {
		at++
		e.Begin()
		e.Frame(1, data, at)
		e.Packet(1, data, at)
		e.End()
		for _, s := range set.Stats(nil) {
			for slot := range s.Outputs {
				if accounted(&s, slot) != s.Matched {
					t.Fatalf("rule %s, output %d: %+v", s.Name, slot, s)
				}
			}
		}
	})
}

// BenchmarkEngine is the engine alone.
func BenchmarkEngine(b *testing.B) {
	for name, outputs := range map[string]int{"1 output": 1, "4 outputs": 4} {
		b.Run(name, func(b *testing.B) {
			r := rule("r", inFace, "239.1.1.1", 5000)
			for i := range outputs {
				r.Out = append(r.Out, sendTo(outFace(3+i), "239.9.9.1", 6000))
			}
			sink := &taker{}
			_, e := newEngine(b, map[int]Sender{3: sink, 4: sink, 5: sink, 6: sink}, r)
			frame := numbered(0, 0).Build()
			b.ReportAllocs()
			for b.Loop() {
				e.Begin()
				for range 64 {
					e.Frame(1, frame, 1)
				}
				e.End()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/64, "ns/frame")
		})
	}
}

// closing is a sender that reports its Close.
type closing struct {
	recorder
	done chan struct{}
}

func (c *closing) Close() error {
	close(c.done)
	return c.recorder.Close()
}

// An update closes no sender that a batch still uses: it waits for the end of the batch.
func TestUpdateWaitsForTheBatch(t *testing.T) {
	sender := &closing{done: make(chan struct{})}
	r := rule("r", inFace, "239.1.1.1", 5000, sendTo(outFace(3), "239.9.9.1", 6000))
	set, e := newEngine(t, map[int]Sender{3: sender}, r)
	before := e.next.Load()
	e.Begin()
	updated := make(chan error, 1)
	go func() { updated <- set.Update(nil, ownAddresses, nil) }()
	labtest.Eventually(t, "the rules are replaced", func() bool { return e.next.Load() != before })
	select {
	case <-sender.done:
		t.Error("the sender is closed within the batch")
	case err := <-updated:
		t.Errorf("the update is done within the batch: %v", err)
	case <-time.After(100 * time.Millisecond): // long enough for an Update that does not wait
	}
	frame := numbered(0, 1).Build()
	e.Frame(1, frame, 1) // with the rules of the batch
	e.End()
	if err := <-updated; err != nil {
		t.Error(err)
	}
	if !sender.closed || len(sender.sent) != 1 {
		t.Errorf("closed: %v, %d sent, want closed after 1", sender.closed, len(sender.sent))
	}
}
