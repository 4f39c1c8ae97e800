package xsk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

func bytesOf(words []uint64) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), len(words)*8)
}

func TestOptions(t *testing.T) {
	labtest.RequireRoot(t)
	page := unix.Getpagesize()
	for _, c := range []struct {
		opts UMEMOptions
		bad  string
	}{
		{UMEMOptions{}, "Frames"},
		{UMEMOptions{Frames: -1}, "Frames"},
		{UMEMOptions{Frames: maxFrames + 1}, "Frames"},
		{UMEMOptions{Frames: 1, FrameSize: 1024}, "FrameSize"},
		{UMEMOptions{Frames: 1, FrameSize: 3000}, "FrameSize"},
		{UMEMOptions{Frames: 1, FrameSize: 2 * page}, "FrameSize"},
		{UMEMOptions{Frames: 1, FrameSize: -2048}, "FrameSize"},
		{UMEMOptions{Frames: 1, Headroom: -1}, "Headroom"},
		{UMEMOptions{Frames: 1, Headroom: 2048 - 256}, "Headroom"},
		{UMEMOptions{Frames: 1, Mode: 7}, "Mode"},
	} {
		var bad *OptionError
		if _, err := NewUMEM(c.opts); !errors.As(err, &bad) || bad.Option != c.bad {
			t.Errorf("%+v: %v: want an error about %s", c.opts, err, c.bad)
		}
	}
	_, frames := makeUMEM(t, UMEMOptions{Frames: 8})
	for _, c := range []struct {
		ifindex, queue int
		opts           Options
		bad            string
	}{
		{0, 0, Options{}, "ifindex"},
		{-1, 0, Options{}, "ifindex"},
		{1, -1, Options{}, "queue"},
		{1, 65536, Options{}, "queue"},
		{1, 0, Options{FillSize: 3}, "FillSize"},
		{1, 0, Options{CompletionSize: -4}, "CompletionSize"},
		{1, 0, Options{RXSize: 1 << 20}, "RXSize"},
		{1, 0, Options{TXSize: 100}, "TXSize"},
		{1, 0, Options{NoRX: true, NoTX: true}, "NoRX and NoTX"},
		{1, 0, Options{TXBudget: 31}, "TXBudget"},
		{1, 0, Options{TXBudget: 4096}, "TXBudget"},
		{1, 0, Options{NoTX: true, TXBudget: 64}, "TXBudget"},
		{1, 0, Options{SendBuffer: -1}, "SendBuffer"},
		{1, 0, Options{BusyPoll: -1}, "BusyPoll"},
		{1, 0, Options{BusyPoll: time.Minute}, "BusyPoll"},
		{1, 0, Options{PreferBusyPoll: true}, "BusyPoll"},
		{1, 0, Options{BusyPoll: 1, BusyPollBudget: 1 << 16}, "BusyPollBudget"},
	} {
		var bad *OptionError
		if _, err := Open(frames, c.ifindex, c.queue, c.opts); !errors.As(err, &bad) || bad.Option != c.bad {
			t.Errorf("%d, %d, %+v: %v: want an error about %s", c.ifindex, c.queue, c.opts, err, c.bad)
		}
	}
}

func TestBindErrors(t *testing.T) {
	host, peer := pair(t, 0, 2)
	index := labtest.Index(t, host, "eth0")
	_, frames := makeUMEM(t, UMEMOptions{Frames: 64})
	_, others := makeUMEM(t, UMEMOptions{Frames: 64})
	_, zeroCopy := makeUMEM(t, UMEMOptions{Frames: 64, Mode: ModeZeroCopy})
	openOn(t, host, "eth0", frames, 0, Options{})
	for _, c := range []struct {
		name           string
		frames         *Frames
		ifindex, queue int
		want           unix.Errno
	}{
		{"no such interface", others, 1 << 20, 0, unix.ENODEV},
		{"no such interface, shared", frames, 1 << 20, 0, unix.ENODEV},
		{"no such queue", others, index, 2, unix.EINVAL},
		{"no such queue, shared", frames, index, 2, unix.EINVAL},
		{"taken by another UMEM", others, index, 0, unix.EBUSY},
		{"taken by the same UMEM", frames, index, 0, unix.EBUSY},
		{"no zero-copy", zeroCopy, index, 1, unix.EOPNOTSUPP},
	} {
		err := host.Do(func() error {
			_, err := Open(c.frames, c.ifindex, c.queue, Options{})
			return err
		})
		var bind *BindError
		if !errors.As(err, &bind) || !errors.Is(err, c.want) || bind.Queue != c.queue || bind.Ifindex != c.ifindex {
			t.Errorf("%s: %v: want %v", c.name, err, c.want)
		}
		t.Logf("%v", err)
	}
	// The failures left nothing behind: the other queue is available.
	openOn(t, host, "eth0", frames, 1, Options{})
	_ = peer
}

func TestUMEMClose(t *testing.T) {
	host, _ := pair(t, 0, 1)
	u, frames := makeUMEM(t, UMEMOptions{Frames: 64})
	s := openOn(t, host, "eth0", frames, 0, Options{})
	addr, _ := frames.Get()
	frames.Release(addr)
	if err := u.Close(); !errors.Is(err, ErrInUse) {
		t.Fatalf("close with a socket open: %v", err)
	}
	if u.Frame(0) == nil {
		t.Fatal("the memory is gone although Close was refused")
	}
	for range 2 {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := u.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if u.Frame(0) != nil || u.Data(Desc{Len: 1}) != nil {
		t.Error("a closed UMEM has memory")
	}
	if _, err := u.NewFrames(1); !errors.Is(err, os.ErrClosed) {
		t.Errorf("frames of a closed UMEM: %v", err)
	}
	if err := host.Do(func() error { _, err := Open(frames, s.Ifindex(), 0, Options{}); return err }); !errors.Is(err, os.ErrClosed) {
		t.Errorf("socket of a closed UMEM: %v", err)
	}
}

// Every method of a closed socket returns.
func TestClosedSocket(t *testing.T) {
	host, _ := pair(t, 0, 1)
	_, frames := makeUMEM(t, UMEMOptions{Frames: 64})
	s := openOn(t, host, "eth0", frames, 0, Options{})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	addr, _ := frames.Get()
	n, err := s.Send([]Desc{{Addr: addr, Len: 60}})
	if n != 0 || err != nil || s.Fill(8) != 0 || s.Receive(make([]Desc, 8)) != 0 || s.Complete(8) != 0 || s.Unsent() != 0 || s.Outstanding() != 0 || s.FD() != -1 {
		t.Error("a closed socket transfers frames")
	}
	frames.Release(addr)
	_, statsErr := s.Statistics()
	for _, err := range []error{s.Kick(), s.Flush(), s.WakeRX(), s.Check(), statsErr} {
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("got %v: want %v", err, os.ErrClosed)
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	w, err := NewWaiter()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := w.Set(s, Readable); !errors.Is(err, os.ErrClosed) {
		t.Errorf("waiting for a closed socket: %v", err)
	}
}

// Frames in all rings of a socket are returned when it is closed, and usable by the next.
func TestCloseReclaimsFrames(t *testing.T) {
	src, dst := pair(t, 0, 1)
	_, frames := makeUMEM(t, UMEMOptions{Frames: 128})
	for round := range 5 {
		t.Run(fmt.Sprint(round), func(t *testing.T) {
			s := openOn(t, dst, "eth0", frames, 0, Options{FillSize: 32, RXSize: 32, TXSize: 32})
			s.Fill(32)
			redirect(t, dst, "eth0", s)
			tap := labtest.NewTap(t, src, "eth0")
			for i := range uint32(8) {
				tap.Send(frame(i, 60))
			}
			// In the RX ring, not received; completed, not taken; in the TX ring, not sent.
			labtest.Eventually(t, "packets arrive", func() bool { return s.rx.producer.Load() >= 8 })
			shared, _ := frames.Get()
			frames.Retain(shared, 7)
			for i := range uint32(8) {
				if n, err := s.Send(append(write(t, frames, frame(i, 60), 2048), Desc{Addr: shared, Len: 60})); n != 2 || err != nil {
					t.Fatal(n, err)
				}
				if i == 3 {
					flush(t, s)
				}
			}
			if err := frames.Verify(); err != nil {
				t.Fatal(err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if frames.Free() != frames.Len() || frames.Retired() != 0 {
				t.Fatalf("%d of %d frames are free, %d retired", frames.Free(), frames.Len(), frames.Retired())
			}
			if err := frames.Verify(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// Frames that the driver still holds are not reused.
func TestCloseRetiresFramesInFlight(t *testing.T) {
	host, _ := pair(t, 0, 1)
	_, frames := makeUMEM(t, UMEMOptions{Frames: 16})
	s := openOn(t, host, "eth0", frames, 0, Options{})
	shared, _ := frames.Get()
	frames.Retain(shared, 1)
	if n, err := s.Send([]Desc{{Addr: shared, Len: 60}, {Addr: shared, Len: 60}}); n != 2 || err != nil {
		t.Fatal(n, err)
	}
	// The kernel has taken one and not completed it, as with a slow device.
	s.tx.consumer.Add(1)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if frames.Retired() != 1 || frames.Free() != 15 {
		t.Errorf("%d frames retired, %d free: want 1 and 15", frames.Retired(), frames.Free())
	}
}

// A zero-copy driver can still write for a moment to the frames that it was given.
func TestCloseRetiresFramesOfADriver(t *testing.T) {
	host, _ := pair(t, 0, 1)
	_, frames := makeUMEM(t, UMEMOptions{Frames: 16})
	s := openOn(t, host, "eth0", frames, 0, Options{FillSize: 8, NoTX: true})
	s.zeroCopy = true // no driver here supports it
	s.Fill(8)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if frames.Retired() != 8 || frames.Free() != 8 {
		t.Errorf("%d frames retired, %d free: want 8 and 8", frames.Retired(), frames.Free())
	}
}

// Many sockets and UMEMs leave nothing behind.
func TestLeaks(t *testing.T) {
	host, _ := pair(t, 0, 4)
	index := labtest.Index(t, host, "eth0")
	labtest.Enter(t, host)
	before := holding(t)
	cycles := labtest.Soak(200, 1000)
	for i := range cycles {
		u, err := NewUMEM(UMEMOptions{Frames: 64, FrameSize: 4096})
		if err != nil {
			t.Fatal(err)
		}
		f, err := u.NewFrames(64)
		if err != nil {
			t.Fatal(err)
		}
		var s *Socket
		labtest.Eventually(t, "the queue is free", func() bool {
			s, err = Open(f, index, i%4, Options{FillSize: 64, CompletionSize: 64, RXSize: 64, TXSize: 64})
			if err != nil && !errors.Is(err, unix.EBUSY) {
				t.Fatal(err)
			}
			return err == nil
		})
		s.Fill(16)
		if _, err := Open(f, index, i%4, Options{}); !errors.Is(err, unix.EBUSY) { // failing leaks nothing either
			t.Fatal(err)
		}
		if err := errors.Join(s.Close(), u.Close()); err != nil {
			t.Fatal(err)
		}
		if f.Free() != 64 {
			t.Fatalf("%d frames free", f.Free())
		}
	}
	after := holding(t)
	if after.fds != before.fds || after.ringMaps != before.ringMaps {
		t.Errorf("before %+v, after %+v", before, after)
	}
	// The UMEMs were 64 pages each; the Go heap grows, too, but not by that much.
	if grown := after.mapped - before.mapped; grown > cycles*64/2 {
		t.Errorf("%d more pages are mapped", grown)
	}
}

// holdingCounts are the process's resources that a leak would increase.
type holdingCounts struct{ fds, ringMaps, mapped int }

func holding(t *testing.T) (h holdingCounts) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	statm, err := os.ReadFile("/proc/self/statm") // in pages, first what is mapped
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(string(statm), &h.mapped); err != nil {
		t.Fatal(err)
	}
	h.fds = len(fds)
	h.ringMaps = strings.Count(string(maps), "socket:[")
	return h
}

// The kernel unlocks the pages again: with room for only a few UMEMs (RLIMIT_MEMLOCK,
// without CAP_IPC_LOCK), any number can be opened and closed.
func TestLockedPagesAreGivenBack(t *testing.T) {
	const size, room = 64 * 4096, 4
	host, _ := pair(t, 0, 1)
	index := labtest.Index(t, host, "eth0")
	labtest.Enter(t, host)
	var before unix.Rlimit
	err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &before)
	if limit := (unix.Rlimit{Cur: room * size, Max: before.Max}); err == nil {
		err = unix.Setrlimit(unix.RLIMIT_MEMLOCK, &limit)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &before); err != nil {
			t.Error(err)
		}
	})
	withoutCapability(t, unix.CAP_IPC_LOCK)
	// open opens a socket on the queue, which registers a UMEM of so many times the size.
	open := func(times int) error {
		u, err := NewUMEM(UMEMOptions{Frames: times * size / 4096, FrameSize: 4096})
		if err != nil {
			t.Fatal(err)
		}
		defer u.Close()
		f, err := u.NewFrames(1)
		if err != nil {
			t.Fatal(err)
		}
		s, err := Open(f, index, 0, Options{FillSize: 1, CompletionSize: 1, RXSize: 1, TXSize: 1})
		if err != nil {
			return err
		}
		return s.Close()
	}
	if err := open(room + 1); !errors.Is(err, unix.ENOBUFS) {
		t.Fatalf("more than the limit: %v, want %v", err, unix.ENOBUFS)
	}
	for range 25 * room {
		var err error
		// Pages and queue are released a moment after the close.
		labtest.Eventually(t, "there is room", func() bool {
			err = open(1)
			return !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EBUSY)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// withoutCapability removes a capability from the calling thread, which must be locked,
// until the test ends.
func withoutCapability(t *testing.T, capability int) {
	t.Helper()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var before [2]unix.CapUserData
	if err := unix.Capget(&header, &before[0]); err != nil {
		t.Fatal(err)
	}
	without := before
	without[capability/32].Effective &^= 1 << (capability % 32)
	if err := unix.Capset(&header, &without[0]); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Capset(&header, &before[0]); err != nil {
			t.Error(err)
		}
	})
}

// Without free huge pages the error is ErrNoHugePages.
func TestHugePages(t *testing.T) {
	const count = "/proc/sys/vm/nr_hugepages"
	before, err := os.ReadFile(count)
	if err != nil {
		t.Skipf("the kernel has no huge pages: %v", err)
	}
	labtest.RequireRoot(t)
	u, err := NewUMEM(UMEMOptions{Frames: 1 << 22, HugePages: true}) // 8 GB
	if !errors.Is(err, ErrNoHugePages) {
		t.Errorf("8 GB of huge pages: %v", err)
		if err == nil {
			u.Close()
		}
	}
	if err := os.WriteFile(count, []byte("4"), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(count, before, 0o644); err != nil {
			t.Error(err)
		}
	})
	src, dst := pair(t, 0, 1)
	_, frames := makeUMEM(t, UMEMOptions{Frames: 100, HugePages: true})
	s := openOn(t, src, "eth0", frames, 0, Options{})
	tap := labtest.NewTap(t, dst, "eth0")
	send(t, s, write(t, frames, frame(1, 500), 2048))
	equal(t, "sent from a huge page", tap.Collect(1, ours)[0], frame(1, 500))
	completeAll(t, s)
}

func TestInterfaceDown(t *testing.T) {
	host, peer := pair(t, 0, 1)
	_, frames := makeUMEM(t, UMEMOptions{Frames: 64})
	s := openOn(t, host, "eth0", frames, 0, Options{FillSize: 16})
	s.Fill(16)
	if err := s.Check(); err != nil {
		t.Fatal(err)
	}
	if err := host.SetUp("eth0", false); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Send(write(t, frames, frame(1, 60), 2048)); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	for what, err := range map[string]error{"Kick": s.Kick(), "Flush": s.Flush(), "Check": s.Check()} {
		if !errors.Is(err, unix.ENETDOWN) {
			t.Errorf("%s: %v: want ENETDOWN", what, err)
		}
	}
	// Once up again, the same socket continues with the contents of its ring.
	if err := host.SetUp("eth0", true); err != nil {
		t.Fatal(err)
	}
	tap := labtest.NewTap(t, peer, "eth0")
	labtest.Eventually(t, "eth0 is up", func() bool { return labtest.Running(host, "eth0") })
	labtest.Eventually(t, "the frame is sent", func() bool { return s.Flush() == nil })
	equal(t, "sent after the interface came up", tap.Collect(1, ours)[0], frame(1, 60))
	completeAll(t, s)
}

// A device that drops reports it once per packet; the packets complete, and Flush continues.
func TestDeviceDrops(t *testing.T) {
	needsMultiBuffer(t)
	host, peer := pair(t, 0, 1)
	_, frames := makeUMEM(t, UMEMOptions{Frames: 64, MultiBuffer: true})
	s := openOn(t, host, "eth0", frames, 0, Options{})
	if err := peer.SetUp("eth0", false); err != nil { // removes the carrier
		t.Fatal(err)
	}
	var descs []Desc
	for i := range uint32(10) {
		descs = append(descs, write(t, frames, frame(i, 1000), 600)...)
	}
	if n, err := s.Send(descs); n != len(descs) || err != nil {
		t.Fatal(n, err)
	}
	if err := s.Kick(); !errors.Is(err, unix.EBUSY) {
		t.Errorf("kick: %v: want EBUSY", err)
	}
	if err := s.Flush(); err != nil {
		t.Errorf("flush: %v", err)
	}
	completeAll(t, s)
	if stats, err := s.Statistics(); err != nil || stats.TXDeviceDropped != 10 {
		t.Errorf("statistics %+v, %v: want 10 packets dropped", stats, err)
	}
}

// An interface disappears under a socket; the UMEM keeps working with others, although
// the socket that registered it is unusable.
func TestInterfaceVanishes(t *testing.T) {
	host, peer := pair(t, 0, 1)
	connect(t, host, "eth1", peer, "eth1", 0, 1)
	_, frames := makeUMEM(t, UMEMOptions{Frames: 64})
	s := openOn(t, host, "eth0", frames, 0, Options{FillSize: 16})
	s.Fill(16)
	labtest.RemoveLink(t, host, "eth0")
	if n, err := s.Send(write(t, frames, frame(1, 60), 2048)); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	for what, err := range map[string]error{"Kick": s.Kick(), "Flush": s.Flush(), "Check": s.Check()} {
		if !errors.Is(err, unix.ENXIO) {
			t.Errorf("%s: %v: want ENXIO", what, err)
		}
	}
	other := openOn(t, host, "eth1", frames, 0, Options{})
	tap := labtest.NewTap(t, peer, "eth1")
	send(t, other, write(t, frames, frame(2, 60), 2048))
	equal(t, "sent by the other", tap.Collect(1, ours)[0], frame(2, 60))
	completeAll(t, other)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if frames.Free() != frames.Len() {
		t.Errorf("%d of %d frames are free", frames.Free(), frames.Len())
	}
}

// Two registrations of one memory, as after an interface vanished or with a driver of
// another mode: a frame received through one is sent through the other.
func TestForwardAcrossRegistrations(t *testing.T) {
	src, relay, dst := newHost(t, "src"), newHost(t, "rly"), newHost(t, "dst")
	connect(t, src, "eth0", relay, "in", 0, 1)
	connect(t, relay, "out", dst, "eth0", 0, 1)
	u, frames := makeUMEM(t, UMEMOptions{Frames: 64})
	in := openOn(t, relay, "in", frames, 0, Options{})
	// The second does not see the first, and registers the memory itself.
	u.sockets = nil
	out := openOn(t, relay, "out", frames, 0, Options{})
	u.sockets = append(u.sockets, in)
	in.Fill(16)
	redirect(t, relay, "in", in)
	tap := labtest.NewTap(t, dst, "eth0")
	labtest.NewTap(t, src, "eth0").Send(frame(3, 300))
	var d [1]Desc
	labtest.Eventually(t, "the packet arrives", func() bool {
		if in.Receive(d[:]) == 1 && !ours(u.Data(d[0])) {
			frames.Release(d[0].Addr)
			return false
		}
		return d[0].Len == 300
	})
	send(t, out, d[:])
	equal(t, "forwarded", tap.Collect(1, ours)[0], frame(3, 300))
	completeAll(t, out)
}

func TestTXRingFull(t *testing.T) {
	needsMultiBuffer(t)
	host, _ := pair(t, 0, 1)
	_, frames := makeUMEM(t, UMEMOptions{Frames: 64, MultiBuffer: true})
	s := openOn(t, host, "eth0", frames, 0, Options{TXSize: 8, CompletionSize: 8})
	var descs []Desc
	for i := range uint32(12) {
		descs = append(descs, write(t, frames, frame(i, 60), 2048)...)
	}
	if n, err := s.Send(descs[:6]); n != 6 || err != nil {
		t.Fatal(n, err)
	}
	// Two of three fit: a packet is never cut.
	descs[6].Options, descs[7].Options = Continued, Continued
	if n, err := s.Send(descs[6:9]); n != 0 || err != nil {
		t.Fatalf("a packet of three in room for two: %d, %v", n, err)
	}
	descs[6].Options, descs[7].Options = 0, 0
	if n, err := s.Send(descs[6:]); n != 2 || err != nil {
		t.Fatalf("six packets in room for two: %d, %v", n, err)
	}
	if n, err := s.Send(descs[8:]); n != 0 || err != nil {
		t.Fatalf("a full ring: %d, %v", n, err)
	}
	flush(t, s)
	// The completion ring is full now: the kernel takes no more, and says EAGAIN, or nothing as Linux 6.12
	// does, until Flush takes the completions.
	if n, err := s.Send(descs[8:]); n != 4 || err != nil {
		t.Fatal(n, err)
	}
	if err := s.Kick(); err != nil && !errors.Is(err, unix.EAGAIN) {
		t.Errorf("kick with a full completion ring: %v", err)
	}
	if err := s.Flush(); err != nil {
		t.Error(err)
	}
	completeAll(t, s)
}

func TestFillRingEmpty(t *testing.T) {
	src, dst := pair(t, 0, 1)
	_, frames := makeUMEM(t, UMEMOptions{Frames: 64})
	s := openOn(t, dst, "eth0", frames, 0, Options{FillSize: 4, RXSize: 2})
	redirect(t, dst, "eth0", s)
	tap := labtest.NewTap(t, src, "eth0")
	stat := func() Statistics {
		stats, err := s.Statistics()
		if err != nil {
			t.Fatal(err)
		}
		return stats
	}
	tap.Send(frame(1, 60))
	labtest.Eventually(t, "a packet finds no frame", func() bool { return stat().FillRingEmpty > 0 && stat().RXDropped > 0 })
	s.Fill(4)
	for i := range uint32(4) {
		tap.Send(frame(i, 60))
	}
	labtest.Eventually(t, "a packet finds the RX ring full", func() bool { return stat().RXRingFull > 0 })
	packets := receive(t, s, 2)
	equal(t, "first", packets[0], frame(0, 60))
	// Longer than a frame and no MultiBuffer.
	before := stat().RXDropped
	if err := errors.Join(resize(src, 4000), resize(dst, 3000)); err != nil {
		t.Fatal(err)
	}
	tap.Send(frame(9, 2500))
	labtest.Eventually(t, "a long packet is dropped", func() bool { return stat().RXDropped > before })
}

func resize(h *lab.Host, mtu int) error {
	l, err := h.Link("eth0")
	if err != nil {
		return err
	}
	return h.Netlink().LinkSetMTU(l, mtu)
}

// A nonexistent transmit queue never takes a frame, and the kernel returns no error.
func TestNoTransmitQueue(t *testing.T) {
	host, peer := newHost(t, "xska"), newHost(t, "xskb")
	if err := connectUneven(host, peer); err != nil {
		t.Fatal(err)
	}
	_, frames := makeUMEM(t, UMEMOptions{Frames: 16})
	s := openOn(t, host, "eth0", frames, 1, Options{})
	if n, err := s.Send(write(t, frames, frame(1, 60), 2048)); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	if err := s.Flush(); !errors.Is(err, ErrStalled) {
		t.Errorf("got %v: want %v", err, ErrStalled)
	}
}

// Frames held by a slow device fill the completion ring: that is not a nonexistent queue.
func TestSlowDeviceIsNotStalled(t *testing.T) {
	host, _ := pair(t, 0, 1)
	nl := host.Netlink()
	eth0 := labtest.Link(t, host, "eth0")
	// A bridge passes frames to the queueing discipline of its port, which releases one now and then.
	off := false
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "slow0"}, MulticastSnooping: &off}
	if err := nl.LinkAdd(bridge); err != nil {
		t.Fatal(err)
	}
	if err := nl.LinkSetMaster(eth0, bridge); err != nil {
		t.Fatal(err)
	}
	if err := host.SetUp("slow0", true); err != nil {
		t.Fatal(err)
	}
	const rate = 12_500 // bytes a second: twelve frames
	tbf := &netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: eth0.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
		Rate:       rate, Limit: 1 << 20, Buffer: netlink.Xmittime(rate, 3000),
	}
	if err := nl.QdiscReplace(tbf); err != nil {
		labtest.Lacking(t, fmt.Sprintf("needs a token bucket filter (sch_tbf): %v", err))
	}
	_, frames := makeUMEM(t, UMEMOptions{Frames: 64})
	s := openOn(t, host, "slow0", frames, 0, Options{CompletionSize: 8, TXSize: 32})
	var descs []Desc
	for i := range uint32(32) {
		descs = append(descs, write(t, frames, frame(i, 1000), 2048)...)
	}
	if n, err := s.Send(descs); n != len(descs) || err != nil {
		t.Fatal(n, err)
	}
	if err := s.Flush(); !errors.Is(err, unix.EAGAIN) || s.Unsent() == 0 {
		t.Errorf("got %v with %d unsent: want %v", err, s.Unsent(), unix.EAGAIN)
	}
	if err := nl.QdiscDel(tbf); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "all are sent", func() bool { return s.Flush() == nil })
	completeAll(t, s)
}

func TestSendRefuses(t *testing.T) {
	needsMultiBuffer(t)
	host, _ := pair(t, 0, 1)
	u, err := NewUMEM(UMEMOptions{Frames: 64, MultiBuffer: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := u.Close(); err != nil {
			t.Error(err)
		}
	})
	frames, _ := u.NewFrames(32)
	others, _ := u.NewFrames(32)
	_, single := makeUMEM(t, UMEMOptions{Frames: 4})
	s := openOn(t, host, "eth0", frames, 0, Options{TXSize: 32, CompletionSize: 32})
	addr, _ := frames.Get()
	foreign, _ := others.Get()
	frames.Retain(addr, 40)
	long := make([]Desc, MaxSegments+1)
	for i := range long {
		long[i] = Desc{addr, 10, Continued}
	}
	long[MaxSegments].Options = 0
	for _, c := range []struct {
		name  string
		descs []Desc
		taken int
		index int
	}{
		{"empty", []Desc{{addr, 0, 0}}, 0, 0},
		{"beyond its frame", []Desc{{addr + 2000, 49, 0}}, 0, 0},
		{"huge length", []Desc{{addr, ^uint32(0), 0}}, 0, 0},
		{"outside of the UMEM", []Desc{{64 * 2048, 60, 0}}, 0, 0},
		{"huge address", []Desc{{^uint64(0), 1, 0}}, 0, 0},
		{"another owner's", []Desc{{foreign, 60, 0}}, 0, 0},
		{"unknown option", []Desc{{addr, 60, 4}}, 0, 0},
		{"second", []Desc{{addr, 60, 0}, {addr, 0, 0}}, 1, 1},
		{"within a packet", []Desc{{addr, 60, 0}, {addr, 60, Continued}, {addr, 0, 0}}, 1, 2},
		{"no end", []Desc{{addr, 60, 0}, {addr, 60, Continued}}, 1, 1},
		{"too many frames", long, 0, MaxSegments},
	} {
		before := s.Outstanding()
		n, err := s.Send(c.descs)
		var bad *DescError
		if n != c.taken || !errors.As(err, &bad) || bad.Index != c.index || s.Outstanding()-before != n {
			t.Errorf("%s: %d taken, %v: want %d and an error about %d", c.name, n, err, c.taken, c.index)
		}
	}
	if err := frames.Verify(); err != nil {
		t.Error(err)
	}
	flush(t, s)
	completeAll(t, s)
	if stats, err := s.Statistics(); err != nil || stats.TXInvalid != 0 {
		t.Errorf("statistics %+v, %v", stats, err)
	}
	one := openOn(t, labtestPeer(t), "eth0", single, 0, Options{})
	a, _ := single.Get()
	if n, err := one.Send([]Desc{{a, 60, Continued}, {a, 60, 0}}); n != 0 || err == nil {
		t.Errorf("two frames a packet without MultiBuffer: %d, %v", n, err)
	}
}

func TestWaiter(t *testing.T) {
	src, dst := pair(t, 0, 1)
	_, frames := makeUMEM(t, UMEMOptions{Frames: 64})
	s := openOn(t, dst, "eth0", frames, 0, Options{})
	s.Fill(32)
	redirect(t, dst, "eth0", s)
	w, err := NewWaiter()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for range 2 {
			if err := w.Close(); err != nil {
				t.Error(err)
			}
		}
		w.Wake()
		if _, err := w.Wait(0); !errors.Is(err, os.ErrClosed) {
			t.Errorf("wait of a closed waiter: %v", err)
		}
	})
	wait := func(timeout time.Duration, want int) {
		t.Helper()
		if ready, err := w.Wait(timeout); ready != want || err != nil {
			t.Fatalf("%d ready, %v: want %d", ready, err, want)
		}
	}
	var bad *OptionError
	if err := w.Set(s, 64); !errors.As(err, &bad) {
		t.Errorf("event 64: %v", err)
	}
	wait(0, 0)
	w.Wake()
	w.Wake()
	wait(-1, 0) // or it would never end
	wait(0, 0)  // both calls were consumed
	if err := w.Set(s, Writable); err != nil {
		t.Fatal(err)
	}
	wait(-1, 1)
	if err := w.Set(s, Readable); err != nil {
		t.Fatal(err)
	}
	tap := labtest.NewTap(t, src, "eth0")
	receive(t, s, 0)
	wait(time.Millisecond, 0)
	tap.Send(frame(1, 60))
	wait(-1, 1)
	receive(t, s, 1)
	// Wake from elsewhere, as when a context ends.
	ctx, cancel := context.WithCancel(context.Background())
	defer context.AfterFunc(ctx, w.Wake)()
	go cancel()
	for ctx.Err() == nil {
		wait(-1, 0)
	}
	if err := w.Set(s, 0); err != nil {
		t.Fatal(err)
	}
	tap.Send(frame(2, 60))
	receive(t, s, 1)
	wait(0, 0)
	if err := w.Set(s, Readable); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Wait(-1); !errors.Is(err, os.ErrClosed) {
		t.Errorf("wait for a closed socket: %v", err)
	}
}

// A waiting thread uses no CPU time.
func TestWaitIsIdle(t *testing.T) {
	host, _ := pair(t, 0, 1)
	_, frames := makeUMEM(t, UMEMOptions{Frames: 64})
	s := openOn(t, host, "eth0", frames, 0, Options{NoTX: true})
	labtest.Enter(t, host) // locks the thread
	w, err := NewWaiter()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := w.Set(s, Readable); err != nil {
		t.Fatal(err)
	}
	before := threadTime(t)
	if ready, err := w.Wait(200 * time.Millisecond); ready != 0 || err != nil {
		t.Fatal(ready, err)
	}
	if used := threadTime(t) - before; used > 50*time.Millisecond {
		t.Errorf("%v of processor time in 200ms of waiting", used)
	}
}

func threadTime(t testing.TB) time.Duration {
	t.Helper()
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &usage); err != nil {
		t.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

func TestBusyPollOptions(t *testing.T) {
	src, dst := pair(t, 0, 1)
	_, frames := makeUMEM(t, UMEMOptions{Frames: 64})
	s := openOn(t, dst, "eth0", frames, 0, Options{BusyPoll: 20 * time.Microsecond, PreferBusyPoll: true, BusyPollBudget: 64, SendBuffer: 1 << 20})
	for _, o := range []struct{ opt, want int }{
		{unix.SO_BUSY_POLL, 20}, {unix.SO_PREFER_BUSY_POLL, 1}, {unix.SO_SNDBUF, 2 << 20}, // the kernel doubles it
	} {
		if got, err := unix.GetsockoptInt(s.FD(), unix.SOL_SOCKET, o.opt); got != o.want || err != nil {
			t.Errorf("option %d is %d, %v: want %d", o.opt, got, err, o.want)
		}
	}
	s.Fill(32)
	redirect(t, dst, "eth0", s)
	labtest.NewTap(t, src, "eth0").Send(frame(1, 60))
	if err := s.WakeRX(); err != nil {
		t.Error(err)
	}
	receive(t, s, 1)
}
