package forward

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
	"xdpcast/internal/live"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
)

// follow sends a stream to 239.1.1.1:5000 in the kernel, from one CPU, and counts what an output to
// 239.9.9.1:6000 sends. finish returns that once nothing more comes, and how many the links let through.
func follow(t *testing.T, b *xdpBench, rate float64) (seen func() live.Seen, finish func() (live.Seen, uint64)) {
	t.Helper()
	group := netip.MustParseAddr("239.1.1.1")
	source, err := live.NewSource(live.SourceOptions{
		Frame: udpFrame(group.String(), "10.0.0.1", 64, func(f *packet.Frame) { clear(f.Payload) }), Index: labtest.Index(t, b.source, "eth0"),
		FirstGroup: group, FirstPort: 4000, Flows: 1, StampShift: 10,
	})
	if err != nil {
		t.Fatal(err)
	}
	var w *live.Witness
	labtest.Do(t, b.sinks[0], func() (err error) {
		w, err = live.NewWitness("eth0", live.WitnessOptions{Group: netip.MustParseAddr("239.9.9.1"), Port: 6000, Flows: 1, StampShift: 10})
		return err
	})
	refused := func() (in, out uint64) {
		labtest.Do(t, b.source, func() (err error) { in, err = live.Refused("eth0"); return err })
		labtest.Do(t, b.relay, func() (err error) { out, err = live.Refused("out0"); return err })
		return in, out
	}
	in, out := refused()
	if err := w.Expect(1); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	sent := make(chan live.Sent, 1)
	go func() {
		var done live.Sent
		err := b.source.Do(func() (err error) {
			if err := live.Pin(0); err != nil {
				return err
			}
			done, err = source.Send(ctx, live.Plan{Trial: 1, Frames: int(rate) * 60, Rate: rate, Stamped: true, Behind: 2 * time.Millisecond})
			return err
		})
		if err != nil {
			t.Error(err)
		}
		sent <- done
	}()
	t.Cleanup(func() {
		stop()
		if err := errors.Join(source.Close(), w.Close()); err != nil {
			t.Error(err)
		}
	})
	seen = func() live.Seen {
		s, err := w.Read()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	return seen, func() (got live.Seen, taken uint64) {
		stop()
		done := <-sent
		inNow, outNow := refused()
		taken = done.Frames - (inNow - in)
		labtest.Eventually(t, "all packets are accounted for", func() bool {
			_, outNow = refused()
			got = seen()
			return got.Packets+outNow-out+b.kernelStats(t, "r").Drops[loader.NoSocket].Packets+b.unseen(t) >= taken
		})
		return got, taken - (outNow - out)
	}
}

func duplicated(t *testing.T, f *os.File) *os.File {
	t.Helper()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), f.Name())
}

// handOver lets another path take over from the current one, as in another process.
func (b *xdpBench) handOver(t *testing.T, opts AFXDPOptions, rules ...flow.Flow) (log string) {
	t.Helper()
	h, err := b.path.HandOver()
	if err != nil {
		t.Fatal(err)
	}
	return b.handOverTo(t, h, b.loader, opts, rules...)
}

func (b *xdpBench) handOverTo(t *testing.T, h *AFXDPHandover, sockets Sockets, opts AFXDPOptions, rules ...flow.Flow) (log string) {
	t.Helper()
	old := b.path
	var err error
	// The descriptors are the other process's, of which it closes its own.
	to := &AFXDPHandover{State: duplicated(t, h.State)}
	for _, f := range h.Files {
		to.Files = append(to.Files, duplicated(t, f))
	}
	var text bytes.Buffer
	opts.Loader, opts.Accounts, opts.CheckOwnership = sockets, b.loader, true
	opts.Logger = slog.New(slog.NewTextHandler(&text, nil))
	opts.Inherited = to
	if opts.Suspend == nil {
		opts.Suspend = func() error { return old.Suspend(h) }
	}
	opts.TakeOver = func() error { return errors.Join(old.Close(), h.Close()) }
	if b.path, err = OpenAFXDP(opts); err != nil {
		t.Fatal(err)
	}
	path := b.path
	t.Cleanup(func() {
		if err := path.Close(); err != nil {
			t.Error(err)
		}
	})
	b.sync(t, rules...)
	if err := old.Leave(); err != nil {
		t.Error(err)
	}
	_ = h.Close() // or TakeOver has done so
	return text.String()
}

// handsOver is a bench with a rule whose packets flow.
func handsOver(t *testing.T) (b *xdpBench, r flow.Flow, more func(), finish func() (live.Seen, uint64)) {
	labtest.RequireRoot(t)
	b = newXDPBench(t, 1, 1, 0)
	b.open(t)
	r = xdpRule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.9.9.1", 6000))
	b.sync(t, r)
	// The rings hold two seconds of it.
	seen, finish := follow(t, b, 2_000)
	more = func() {
		t.Helper()
		from := seen().Packets
		labtest.Eventually(t, "packets flow", func() bool { return seen().Packets >= from+200 })
	}
	more()
	return b, r, more, finish
}

// needsInheritance skips a test on a kernel that refused to map the sockets, by the log of the path.
func needsInheritance(t *testing.T, log string) {
	t.Helper()
	if strings.Contains(log, "not inherited") && strings.Contains(log, "device or resource busy") {
		labtest.NeedsKernel(t, false, "mapping the rings of a bound AF_XDP socket", "6.4")
	}
}

// TestAFXDPHandsOver passes the sockets of a path to another one several times while packets flow: none is lost,
// doubled or overtaken, even of a rule that nothing else could carry meanwhile.
func TestAFXDPHandsOver(t *testing.T) {
	b, r, more, finish := handsOver(t)
	for range 4 {
		log := b.handOver(t, AFXDPOptions{}, r)
		needsInheritance(t, log)
		if strings.Contains(log, "not inherited") {
			t.Errorf("the sockets are not inherited:\n%s", log)
		}
		more()
	}
	got, taken := finish()
	t.Logf("longest gap %v", got.Longest)
	got.Longest = 0
	if want := (live.Seen{Packets: taken}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if lost := b.unseen(t); lost > 0 {
		t.Errorf("%d packets were lost", lost)
	}
}

// A path with other options opens sockets of its own, and so does one whose predecessor fails to suspend.
func TestAFXDPHandsOverNothing(t *testing.T) {
	b, r, more, finish := handsOver(t)
	if log := b.handOver(t, AFXDPOptions{Frames: 2 * defaultFrames}, r); !strings.Contains(log, "other options") {
		t.Errorf("sockets with other options are inherited:\n%s", log)
	}
	more()
	log := b.handOver(t, AFXDPOptions{Frames: 2 * defaultFrames, Suspend: func() error { return errors.New("too late") }}, r)
	more()
	needsInheritance(t, log)
	if !strings.Contains(log, "too late") {
		t.Errorf("sockets that are not suspended are inherited:\n%s", log)
	}
	got, taken := finish()
	if got.Doubled+got.Reordered+got.Checksum+got.Address+got.Stray > 0 || got.Packets > taken {
		t.Errorf("%+v of %d", got, taken)
	}
}
