package forward

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/fanout"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
)

// counted receives the numbered frames of streams on an interface. Each must arrive
// once, and be the next of its stream.
type counted struct {
	catcher *catcher
	t       testing.TB
	name    string
	total   atomic.Int64
	// disorder counts the frames that were not the next of their stream, if that is no
	// error.
	disorder  atomic.Int64
	unordered atomic.Bool
	// lossy: frames may be missing, but not reordered.
	lossy atomic.Bool
	seen  map[numberedFrame]bool
	next  map[numberedStream]int
	done  chan struct{}
}

// numberedStream are the frames of a stream to one destination.
type numberedStream struct {
	to     [6]byte
	number int
}

func (s numberedStream) String() string { return fmt.Sprintf("%x stream %d", s.to, s.number) }

type numberedFrame struct {
	stream numberedStream
	number int
}

// countOn starts counting on the eth0 of a sink.
func countOn(t testing.TB, h *lab.Host) *counted {
	t.Helper()
	catcher := catch(t, h, "eth0")
	c := &counted{catcher: catcher, t: t, name: h.Name, seen: map[numberedFrame]bool{}, next: map[numberedStream]int{}, done: make(chan struct{})}
	go func() {
		defer close(c.done)
		for {
			block, err := catcher.group.Workers()[0].Wait()
			if errors.Is(err, fanout.ErrWoken) || errors.Is(err, os.ErrClosed) {
				return
			}
			if err != nil {
				continue // the interface was deleted or set down by the test
			}
			var f fanout.Frame
			for block.Next(&f) {
				c.frame(f.Data)
			}
			block.Release()
		}
	}()
	return c
}

func (c *counted) frame(data []byte) {
	stream, n, ok := number(data)
	if !ok {
		return
	}
	key := numberedStream{[6]byte(data), stream}
	if n != c.next[key] {
		c.disorder.Add(1)
		if overtaken := n < c.next[key]; !c.unordered.Load() && (overtaken || !c.lossy.Load()) {
			c.t.Errorf("%s: %s: frame %d after %d", c.name, key, n, c.next[key]-1)
		}
	}
	one := numberedFrame{key, n}
	if c.seen[one] {
		c.t.Errorf("%s: %s frame %d comes twice", c.name, key, n)
	}
	c.seen[one] = true
	c.next[key] = n + 1
	c.total.Add(1)
}

// window bounds the frames in flight. With a burst of 50 they fit the ring of a veth
// (VETH_RING_SIZE of drivers/net/veth.c, 256), so that none is lost however late its receiver runs.
const window = 150

// load sends streams round-robin from one CPU, like a network card that keeps a flow
// on one queue; arrived returns how many of how many frames have arrived.
func (b *bench) load(t testing.TB, streams, frames int, arrived func() int64) {
	t.Helper()
	source := openSender(t, b.source, iface(t, b.source, "eth0").Index)
	onOneCPU(t, func() {
		var burst [][]byte
		for i := range frames {
			burst = append(burst, numbered(i%streams, i/streams).Build())
			if len(burst) < 50 && i < frames-1 {
				continue
			}
			sendFrames(t, source, burst)
			burst = burst[:0]
			labtest.Eventually(t, "earlier frames have arrived", func() bool { return arrived() > int64(i-window) })
		}
	})
	labtest.Eventually(t, fmt.Sprintf("all frames have arrived, of which %d have", arrived()), func() bool { return arrived() >= int64(frames) })
}

// onOneCPU runs fn on one CPU.
func onOneCPU(t testing.TB, fn func()) {
	t.Helper()
	var before, one unix.CPUSet
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		t.Fatal(err)
	}
	for cpu := range 1024 {
		if before.IsSet(cpu) {
			one.Set(cpu)
			break
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.SchedSetaffinity(0, &before); err != nil {
			t.Error(err)
		}
	}()
	fn()
}

// With any number of workers and streams, every frame leaves once, and each stream in
// order, as long as the kernel keeps it on one worker. In mode cpu it does so if the
// device keeps a stream on one CPU, which a veth with a queue does not always do.
func TestExactlyOnce(t *testing.T) {
	frames := labtest.Soak(3200, 25_600)
	for _, mode := range []fanout.Mode{fanout.ModeCPU, fanout.ModeHash} {
		for _, workers := range []int{1, 2, 3, 8} {
			for _, streams := range []int{1, 256} {
				t.Run(fmt.Sprintf("%s, %d workers, %d streams", mode, workers, streams), func(t *testing.T) {
					b := newBench(t, 2)
					f := b.path(t, FanoutOptions{Workers: workers, Mode: mode})
					sinks := []*counted{countOn(t, b.sinks[0]), countOn(t, b.sinks[1])}
					for _, sink := range sinks {
						sink.unordered.Store(mode == fanout.ModeCPU)
					}
					b.sync(t, f, rule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.9.9.1", 6000), sendTo(b.out[1], "239.9.9.2", 6000)))
					b.load(t, streams, frames, func() int64 { return min(sinks[0].total.Load(), sinks[1].total.Load()) })
					s := adds(t, f, "r", uint64(frames))
					for slot, out := range s.Outputs {
						if out.Sent.Packets != uint64(frames) || sinks[slot].total.Load() != int64(frames) {
							t.Errorf("output %d: %+v, %d arrived", slot, out, sinks[slot].total.Load())
						}
					}
					used := 0
					groups, err := f.Groups()
					if err != nil {
						t.Fatal(err)
					}
					for _, w := range groups[0].Workers {
						if w.Dropped != 0 || w.Failures != 0 {
							t.Errorf("worker: %+v", w)
						}
						if w.Received > 0 {
							used++
						}
					}
					if disorder := sinks[0].disorder.Load() + sinks[1].disorder.Load(); used == 1 && disorder != 0 {
						t.Errorf("%d frames of one worker out of order", disorder)
					}
					if mode == fanout.ModeHash && streams == 256 && used != workers {
						t.Errorf("%d of %d workers had frames, which proves little", used, workers)
					}
				})
			}
		}
	}
}

// While rules are added and removed, and the others get different addresses, no frame
// is lost.
func TestExchangeUnderLoad(t *testing.T) {
	b := newBench(t, 3)
	f := b.path(t, FanoutOptions{Workers: 2, Mode: fanout.ModeHash})
	sink := countOn(t, b.sinks[0])
	steady := rule("steady", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.9.9.1", 6000))
	b.sync(t, f, steady)
	stop := make(chan struct{})
	var exchanged atomic.Int64
	done := make(chan error)
	go func() {
		done <- b.relay.Do(func() error {
			for exchanges := 1; ; exchanges++ {
				select {
				case <-stop:
					return nil
				default:
				}
				changed := steady
				changed.Out = []flow.Output{steady.Out[0]}
				changed.Out[0].TTLMode, changed.Out[0].TTL = 2, uint8(exchanges)|1
				set := []flow.Flow{changed}
				if exchanges%2 == 0 {
					set = append(set, rule("other", b.in, "239.1.1.0", 0, sendTo(b.out[1+exchanges/2%2], "239.9.9.3", 7000)))
					set[1].In.Len = 24
				}
				if exchanges%3 == 0 {
					set = append(set, rule("elsewhere", b.out[1], "239.1.1.1", 5000, sendTo(b.out[2], "239.9.9.4", 7000)))
				}
				if err := f.Sync(set, ownAddresses); err != nil {
					return err
				}
				exchanged.Store(int64(exchanges))
			}
		})
	}()
	const frames = 8000
	// At least one update every 100 frames.
	b.load(t, 8, frames, func() int64 { return min(sink.total.Load(), 100*exchanged.Load()) })
	close(stop)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if s := adds(t, f, "steady", frames); s.Outputs[0].Sent.Packets != frames {
		t.Errorf("%+v", s)
	}
}

// An output whose interface goes down, comes back, or vanishes loses only its own
// copies, with a reason.
func TestOutputFails(t *testing.T) {
	b := newBench(t, 3)
	f := b.path(t, FanoutOptions{Workers: 2, Mode: fanout.ModeHash})
	sink := countOn(t, b.sinks[0])
	r := rule("r", b.in, "239.1.1.1", 5000,
		sendTo(b.out[0], "239.9.9.1", 6000), sendTo(b.out[1], "239.9.9.2", 6000), sendTo(b.out[2], "239.9.9.3", 6000))
	b.sync(t, f, r)
	out := func(slot int) loader.OutputStats { return f.Stats([]string{"r"})[0].Outputs[slot] }
	const frames = 12000
	acts := []struct {
		at int64
		do func() error
	}{
		{frames / 5, func() error { return b.relay.SetUp("out1", false) }},
		{2 * frames / 5, func() error {
			link, err := b.relay.Link("out2")
			if err != nil {
				return err
			}
			return b.relay.Netlink().LinkDel(link)
		}},
		{3 * frames / 5, func() error { return b.relay.SetUp("out1", true) }},
	}
	done := make(chan error, 1)
	var whileDown, whenUp loader.OutputStats
	go func() {
		for i, act := range acts {
			for sink.total.Load() < act.at {
				time.Sleep(time.Millisecond)
			}
			if i == 2 {
				whileDown = out(1)
			}
			if err := act.do(); err != nil {
				done <- err
				return
			}
			if i == 2 {
				whenUp = out(1)
			}
		}
		done <- nil
	}()
	b.load(t, 4, frames, sink.total.Load)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	s := adds(t, f, "r", frames)
	if s.Outputs[0].Sent.Packets != frames {
		t.Errorf("output 0: %+v", s.Outputs[0])
	}
	if whileDown.Drops[loader.NoDevice].Packets == 0 || s.Outputs[1].Sent.Packets <= whenUp.Sent.Packets {
		t.Errorf("output 1: while down %+v, when up %+v, at last %+v", whileDown, whenUp, s.Outputs[1])
	}
	if gone := s.Outputs[2].Drops[loader.NoDevice].Packets; gone == 0 || gone+s.Outputs[2].Sent.Packets != frames {
		t.Errorf("output 2: %+v", s.Outputs[2])
	}

	// It comes back, with another index, and the control loop updates the rules.
	labtest.Connect(t, lab.End{Host: b.relay, Name: "out2"}, lab.End{Host: b.sinks[2], Name: "eth9"})
	back := iface(t, b.relay, "out2")
	r.Out[2].Index = back.Index
	before := out(2).Sent.Packets
	b.sync(t, f, r)
	source := openSender(t, b.source, iface(t, b.source, "eth0").Index)
	sendFrames(t, source, [][]byte{numbered(99, 0).Build()})
	labtest.Eventually(t, "the output sends again", func() bool { return out(2).Sent.Packets == before+1 })
}

// A worker that fails, by an error or a panic, is restarted, and no frame is
// lost.
func TestWorkerFails(t *testing.T) {
	for name, fail := range map[string]func() error{
		"error": func() error { return errors.New("made up") },
		"panic": func() error { panic("made up") },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, 1)
			var calls, failed atomic.Int64
			f := b.pathWith(t, FanoutOptions{Workers: 2, Mode: fanout.ModeHash}, func(s *fanoutSystem) {
				s.wait = func(w *fanout.Worker) (*fanout.Block, error) {
					if calls.Add(1)%5 == 0 && failed.Add(1) <= 5 {
						return nil, fail()
					}
					return w.Wait()
				}
			})
			sink := countOn(t, b.sinks[0])
			b.sync(t, f, rule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.9.9.1", 6000)))
			const frames = 8000
			b.load(t, 8, frames, sink.total.Load)
			adds(t, f, "r", frames)
			groups, err := f.Groups()
			if err != nil {
				t.Fatal(err)
			}
			failures := uint64(0)
			for _, w := range groups[0].Workers {
				failures += w.Failures
			}
			if failures == 0 || failures != uint64(min(5, failed.Load())) {
				t.Errorf("%d failures counted of %d", failures, failed.Load())
			}
		})
	}
}

// A worker that panics during a batch continues with the next one, and its counters
// add up.
func TestPanicInBatch(t *testing.T) {
	b := newBench(t, 1)
	var calls atomic.Int64
	f := b.pathWith(t, FanoutOptions{Workers: 1}, func(s *fanoutSystem) {
		open := s.openSender
		s.openSender = func(index int, opts fanout.SenderOptions) (Sender, error) {
			sender, err := open(index, opts)
			return &panicking{sender, &calls}, err
		}
	})
	b.sync(t, f, rule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.9.9.1", 6000)))
	source := openSender(t, b.source, iface(t, b.source, "eth0").Index)
	total := func() (sent, dropped uint64) {
		s := f.Stats(nil)[0].Outputs[0]
		return s.Sent.Packets, s.Drops[loader.Internal].Packets
	}
	for i := 0; ; i++ {
		sendFrames(t, source, [][]byte{numbered(0, i).Build()})
		if sent, dropped := total(); sent > 20 && dropped > 0 && calls.Load() > 10 {
			break
		}
		if i > 1000 {
			time.Sleep(time.Millisecond)
		}
		if i > 1000+int(labtest.Timeout/time.Millisecond) {
			t.Fatalf("%+v", f.Stats(nil))
		}
	}
	labtest.Eventually(t, "all is accounted for", func() bool {
		s := f.Stats(nil)[0]
		return accounted(&s, 0) == s.Matched
	})
}

// panicking is a sender that panics at its fifth call.
type panicking struct {
	Sender
	calls *atomic.Int64
}

func (p *panicking) Send(packets []fanout.Packet) (int, error) {
	if p.calls.Add(1) == 5 {
		panic("made up")
	}
	return p.Sender.Send(packets)
}
