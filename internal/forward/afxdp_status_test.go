package forward

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
	"xdpcast/pkg/fanout"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/xsk"
)

// Losses of a worker that does not keep up are reported, even after it has ended.
func TestAFXDPLost(t *testing.T) {
	b := newXDPBench(t, 1, 1, 0)
	b.open(t)
	r := xdpRule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.2.2.1", 6000))
	b.sync(t, r)
	w := b.path.inputs[b.in.Index].workers[0]
	source := openSender(t, b.source, iface(t, b.source, "eth0").Index)
	const frames = 3*ringSize + 500
	b.whileStalled(t, w, 0, frames, source)
	labtest.Eventually(t, "the rest is through", func() bool {
		return b.path.Stats(nil)[0].Matched.Packets+b.unseen(t) == frames
	})
	in := b.inputs(t)[0]
	q := in.Workers[0]
	if in.Lost.RingFull+in.Lost.NoFrame == 0 || in.Lost != (Lost{q.Socket.RXDropped, q.Socket.RXRingFull, 0}) || q.Received != frames-b.unseen(t) {
		t.Errorf("%+v", in)
	}
	if q.WakeRX || !q.WakeTX {
		t.Errorf("wakeup for RX %v and TX %v: copy mode asks for TX alone", q.WakeRX, q.WakeTX)
	}
	b.sync(t)
	after := b.inputs(t)
	if len(after) != 1 || after[0].Lost != in.Lost || len(after[0].Workers) != 0 || after[0].Interface != "in" {
		t.Errorf("without rules: %+v, want %+v lost", after, in.Lost)
	}
	b.sync(t, r)
	if after := b.inputs(t); len(after) != 1 || after[0].Lost != in.Lost || len(after[0].Workers) != 1 {
		t.Errorf("with the rule again: %+v, want %+v lost", after, in.Lost)
	}
}

// whileStalled sends frames, after earlier ones. They match before the worker reads its ring.
func (b *xdpBench) whileStalled(t *testing.T, w *afxdpWorker, earlier, frames int, source *fanout.Sender) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for n := 0; n < frames; {
		var burst [][]byte // few enough for the ring of a veth
		for ; n < frames && len(burst) < 50; n++ {
			burst = append(burst, numbered(0, earlier+n).Build())
		}
		sendFrames(t, source, burst)
	}
	// Checked by a reader, which does not wait for the worker.
	labtest.Eventually(t, "all have matched", func() bool {
		reader, err := loader.OpenReader(b.opts.PinDir)
		if err != nil {
			t.Error(err)
			return true
		}
		defer reader.Close()
		stats, err := reader.Stats()
		if err != nil {
			t.Error(err)
		}
		return err != nil || stats.Rules[0].Matched.Packets == uint64(earlier+frames)
	})
}

// What the outputs do not need for copies is for receiving: while the worker does not run, as many packets wait. The
// rest is still there for copies when it runs again, and all are received again afterwards.
func TestAFXDPRings(t *testing.T) {
	b := newXDPBench(t, 4, 1, 0)
	sizes := []struct{ outputs, frames, room int }{
		{1, minFrames, 2 * ringSize}, {2, minFrames, ringSize}, {1, 0, 3 * ringSize}, {2, 0, 2 * ringSize}, {4, 8 * ringSize, 4 * ringSize},
		{1, 8 * ringSize, 7 * ringSize}, {2, 8 * ringSize, 6 * ringSize},
	}
	for number, tt := range sizes[:labtest.Soak(5, len(sizes))] {
		t.Run(fmt.Sprintf("%d outputs, %d frames", tt.outputs, tt.frames), func(t *testing.T) {
			room := tt.room
			b.openWith(t, AFXDPOptions{Frames: tt.frames, CheckOwnership: true})
			defer b.sync(t) // without rules
			var outs []flow.Output
			for i, o := range b.out[:tt.outputs] {
				outs = append(outs, sendTo(o, fmt.Sprintf("239.2.2.%d", i+1), 6000))
			}
			b.sync(t, xdpRule(fmt.Sprintf("r%d", number), b.in, "239.1.1.1", 5000, outs...))
			source := openSender(t, b.source, iface(t, b.source, "eth0").Index)
			w := b.path.inputs[b.in.Index].workers[0]
			for round := range 2 {
				b.whileStalled(t, w, room*round, room, source)
				labtest.Eventually(t, "all came to the worker", func() bool {
					return b.path.Stats(nil)[0].Matched.Packets+b.unseen(t) == uint64(room*(round+1))
				})
			}
			if lost := b.unseen(t); lost != 0 {
				t.Errorf("%d of %d frames lost", lost, 2*room)
			}
			for _, out := range b.path.Stats(nil)[0].Outputs {
				if out.Sent.Packets != uint64(2*room) {
					t.Errorf("sent %d of %d: %+v", out.Sent.Packets, 2*room, out)
				}
			}
		})
	}
}

// The kernel never gets frames for receiving that the senders may still take.
func TestAFXDPFramesForCopies(t *testing.T) {
	for frames := minFrames; frames <= maxFrames; frames += 1000 {
		o := AFXDPOptions{Frames: frames}
		if n := o.receiveFrames(); n < ringSize || n > maxReceiveRing || o.copyFrames() < n || n+o.copyFrames() != frames {
			t.Fatalf("%d frames: %d for receiving, %d for copies", frames, n, o.copyFrames())
		}
		if ring := o.receiveRing(); ring < min(frames-ringSize, maxReceiveRing) || ring > maxReceiveRing || ring&(ring-1) != 0 {
			t.Fatalf("%d frames: a ring of %d", frames, ring)
		}
	}
}

// A queue used by another program is reported with the cause, and taken once it is free.
func TestAFXDPQueueTaken(t *testing.T) {
	b := newXDPBench(t, 1, 2, 0)
	umem, err := xsk.NewUMEM(xsk.UMEMOptions{Frames: 64})
	if err != nil {
		t.Fatal(err)
	}
	defer umem.Close()
	frames, err := umem.NewFrames(64)
	if err != nil {
		t.Fatal(err)
	}
	var other *xsk.Socket
	labtest.Do(t, b.relay, func() (err error) {
		other, err = xsk.Open(frames, b.in.Index, 1, xsk.Options{NoTX: true})
		return err
	})
	defer other.Close()
	b.open(t)
	r := xdpRule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.2.2.1", 6000))
	b.sync(t, r)
	in := b.inputs(t)[0]
	if len(in.Workers) != 1 || len(in.Missing) != 1 || in.Missing[0].Queue != 1 || !errors.Is(in.Missing[0].Err, unix.EBUSY) || !b.path.Pending() {
		t.Errorf("pending %v: %+v", b.path.Pending(), in)
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "the kernel has given the queue up", func() bool {
		b.sync(t, r)
		return !b.path.Pending()
	})
	if in := b.inputs(t)[0]; len(in.Workers) != 2 || len(in.Missing) != 0 || in.Error != nil || b.path.Pending() {
		t.Errorf("pending %v: %+v", b.path.Pending(), in)
	}
}

// The options are applied to the sockets and threads.
func TestAFXDPSettings(t *testing.T) {
	b := newXDPBench(t, 1, 1, 0)
	cpu := labtest.CPUs()[0]
	b.openWith(t, AFXDPOptions{
		CheckOwnership: true, CPUs: []int{cpu}, Frames: minFrames,
		BusyPoll: 30 * time.Microsecond, PreferBusyPoll: true, BusyPollBudget: 16,
	})
	r := xdpRule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.2.2.1", 6000))
	b.sync(t, r)
	w := b.path.inputs[b.in.Index].workers[0]
	for name, option := range map[string]struct{ number, want int }{
		"SO_BUSY_POLL": {unix.SO_BUSY_POLL, 30}, "SO_PREFER_BUSY_POLL": {unix.SO_PREFER_BUSY_POLL, 1},
	} {
		if got, err := unix.GetsockoptInt(w.fd, unix.SOL_SOCKET, option.number); err != nil || got != option.want {
			t.Errorf("%s is %d, %v, want %d", name, got, err, option.want)
		}
	}
	if got := len(w.claims); got != minFrames {
		t.Errorf("%d frames, want %d", got, minFrames)
	}
	labtest.Eventually(t, "a thread is pinned", func() bool {
		threads, err := filepath.Glob("/proc/self/task/*/status")
		if err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(threads, func(name string) bool {
			status, _ := os.ReadFile(name) // a thread may end meanwhile
			return strings.Contains(string(status), fmt.Sprintf("Cpus_allowed_list:\t%d\n", cpu))
		})
	})
	source, c := openSender(t, b.source, iface(t, b.source, "eth0").Index), catch(t, b.sinks[0], "eth0")
	f := numbered(0, 0).Build()
	sendFrames(t, source, [][]byte{f})
	receive(t, c, [][]byte{expect(t, r.Out[0], f)})
}

// Without huge pages each queue reports that, and how many are needed.
func TestAFXDPHugePages(t *testing.T) {
	b := newXDPBench(t, 1, 1, 0)
	b.openWith(t, AFXDPOptions{HugePages: true, Frames: 16 * ringSize})
	b.sync(t, xdpRule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.2.2.1", 6000)))
	in := b.inputs(t)[0]
	switch {
	case len(in.Workers) == 1 && len(in.Missing) == 0: // the machine has them
	case len(in.Missing) != 1 || !errors.Is(in.Missing[0].Err, xsk.ErrNoHugePages) || !strings.Contains(in.Missing[0].Err.Error(), "need 32 of 2 MB"):
		t.Errorf("%+v", in)
	}
}

// Invalid options are refused when the path is opened.
func TestAFXDPOptions(t *testing.T) {
	for _, opts := range []AFXDPOptions{
		{Queues: -1}, {Queues: 100_000}, {CPUs: []int{-1}}, {CPUs: []int{1 << 20}}, {Frames: 1}, {Frames: 1 << 30}, {Priority: -1}, {Priority: 100}, {BusyPoll: -1}, {PreferBusyPoll: true},
	} {
		opts.Loader = &loader.Loader{}
		var wrong *xsk.OptionError
		if _, err := OpenAFXDP(opts); !errors.As(err, &wrong) {
			t.Errorf("%+v: %v", opts, err)
		}
	}
}

// Packets that a device did not take are reported even after its sender was closed.
func TestAFXDPUnsent(t *testing.T) {
	b := newXDPBench(t, 1, 1, 0)
	b.open(t)
	r := xdpRule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.2.2.1", 6000))
	b.sync(t, r)
	if got := b.path.Unsent(); len(got) != 0 {
		t.Errorf("%v unsent at first", got)
	}
	// Frames that are in the TX ring when the device goes: no worker sends them.
	w := b.path.inputs[b.in.Index].workers[0]
	w.mu.Lock()
	s := w.senders[0]
	for range 3 {
		addr, ok := w.frames.Get()
		if !ok {
			t.Fatal("no frame is free")
		}
		if n, err := s.socket.Send([]xsk.Desc{{Addr: addr, Len: 60}}); n != 1 || err != nil {
			t.Fatal(n, err)
		}
	}
	err := b.relay.SetUp("out0", false)
	w.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	want := map[int]uint64{b.out[0].Index: 3}
	labtest.Eventually(t, "the sender has noticed", func() bool { return maps.Equal(b.path.Unsent(), want) })
	b.sync(t)
	if got := b.path.Unsent(); !maps.Equal(got, want) {
		t.Errorf("%v unsent without rules, want %v", got, want)
	}
}
