package main

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
)

// The proofs of a report hold, and the lab leaves nothing behind.
func TestProofs(t *testing.T) {
	labtest.RequireRoot(t)
	all, top, err := prove(t.Context(), options{trial: 20 * time.Millisecond, precision: 0.5})
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 3 || top.Full == 0 || top.LossFree == 0 {
		t.Errorf("%+v, %+v", all, top)
	}
}

// Every copy arrives once where it belongs, for all numbers of outputs, flows and queues and all
// lengths.
func TestTrialAccountsForAll(t *testing.T) {
	labtest.RequireRoot(t)
	for _, with := range []setup{
		{Outputs: 1, Frame: leastFrame, Rules: 1, Flows: 1, Queues: 1},
		{Outputs: 3, Frame: 64, Rules: 1, Flows: 1, Queues: 1},
		{Outputs: 4, Frame: 1400, Rules: 100, Flows: 64, Queues: 2},
		{Outputs: 1, Frame: mostFrame, Rules: 1, Flows: 5, Queues: 1},
		{Outputs: 64, Frame: 128, Rules: 1, Flows: maxFlows, Queues: 1},
	} {
		b, err := newBench(t.Context(), broadcast(), with, options{})
		if err != nil {
			t.Fatal(err)
		}
		// Rounded down to the same number per queue, as the source sends.
		frames := 5000 / with.Queues * with.Queues
		labtest.Eventually(t, "all arrives", func() bool {
			got, err := b.run(t.Context(), trialPlan{frames: frames, rate: 50_000, timed: true})
			if err != nil {
				t.Fatalf("%v: %v", with, err)
			}
			if got.frames != uint64(frames) || got.bytes != got.packets*uint64(with.Frame) {
				t.Fatalf("%v: %d of %d frames sent, %d bytes in %d copies", with, got.frames, frames, got.bytes, got.packets)
			}
			if with.Outputs <= mostSinks && (got.missing > uint64(max(got.lost(), 0)) || got.late != 0) {
				t.Fatalf("%v: %d numbers missing, %d late, %d lost", with, got.missing, got.late, got.lost())
			}
			if got.arrived.latency.n != got.packets {
				t.Fatalf("%v: %d of %d copies timed", with, got.arrived.latency.n, got.packets)
			}
			return got.lost() == 0
		})
		if err := b.close(); err != nil {
			t.Errorf("%v: %v", with, err)
		}
	}
}

// The source keeps its rate: never faster, and no slower than the machine allows.
func TestSourceKeepsItsRate(t *testing.T) {
	labtest.RequireRoot(t)
	err := with(t.Context(), direct(), options{}, func(b *bench) error {
		for _, rate := range []float64{1000, 123_456} {
			got, err := b.run(t.Context(), trialPlan{frames: framesFor(rate, 100*time.Millisecond), rate: rate})
			if err != nil {
				return err
			}
			// n frames have n-1 intervals.
			if most := rate * float64(got.frames) / float64(got.frames-1) * 1.001; got.rate() > most {
				t.Errorf("%.0f frames/s, want at most %.0f", got.rate(), most)
			}
			if got.waited <= 0 || got.waited > got.took() {
				t.Errorf("of %v it waited %v", got.took(), got.waited)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A subject that cannot start leaves nothing behind, and reports why.
func TestSubjectThatDoesNotStart(t *testing.T) {
	labtest.RequireRoot(t)
	_, err := newBench(t.Context(), xdpcast("kernel"), everyday, options{program: "/nonexistent/xdpcast"})
	if err == nil || errors.Is(err, errAddress) {
		t.Errorf("the error is %v", err)
	}
}

// The BPF source program and its Go twin write the same frames: both are received by a sink that
// checks the addresses, and by the host's own stack, which verifies both checksums.
func TestFramesHaveChecksums(t *testing.T) {
	labtest.RequireRoot(t)
	for _, with := range []setup{{Frame: 64}, {Frame: 1400}, {Frame: mostFrame}, {Frame: mixedFrame, Mixed: true}} {
		frames := 7
		if with.Mixed {
			frames = 12
		}
		with.Outputs, with.Rules, with.Flows, with.Queues = 1, 1, frames, 1
		n, err := newNetwork(with, subject{})
		if err != nil {
			t.Fatal(err)
		}
		var fd int
		labtest.Do(t, n.relay, func() (err error) {
			fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			in, err := net.InterfaceByName("in")
			if err != nil {
				return err
			}
			return errors.Join(
				unix.SetsockoptIPMreqn(fd, unix.IPPROTO_IP, unix.IP_ADD_MEMBERSHIP, &unix.IPMreqn{Multiaddr: firstGroup.As4(), Ifindex: int32(in.Index)}),
				unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(labtest.Timeout.Seconds())}),
				unix.Bind(fd, &unix.SockaddrInet4{Port: groupPort}))
		})
		if _, err := n.source.send(t.Context(), plan{trial: 1, frames: frames, rate: 1000, batch: 1, stamped: true}); err != nil {
			t.Error(err)
		}
		buf := make([]byte, mostFrame)
		for i := range frames {
			got, from, err := unix.Recvfrom(fd, buf, 0)
			size := with.Frame
			if with.Mixed {
				size = []int{60, 60, 590, 60, 590, 60, 60, 1514, 60, 590, 60, 590}[i%12]
			}
			if err != nil || got != size-42 {
				t.Errorf("%v, frame %d: %d bytes, %v, want %d", with, i, got, err, size-42)
				break
			}
			if addr := from.(*unix.SockaddrInet4); addr.Port != flowPort+i || netip.AddrFrom4(addr.Addr) != sourceAddr {
				t.Errorf("%v, frame %d: from %v port %d", with, i, addr.Addr, addr.Port)
			}
		}
		if err := errors.Join(unix.Close(fd), n.close()); err != nil {
			t.Error(err)
		}
	}
}
