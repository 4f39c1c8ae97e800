package fanout

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/packet"
)

// modeOptions returns options for a mode, with a steering program if it needs
// one.
func modeOptions(t testing.TB, mode Mode, workers int) Options {
	t.Helper()
	opts := Options{Mode: mode, Workers: workers}
	if mode == ModeEBPF {
		opts.Steering = steeringProgram(t, ByAddressesAndPorts)
	}
	return opts
}

func steeringProgram(t testing.TB, by SteerBy) *ebpf.Program {
	t.Helper()
	p, err := NewSteering(by)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// pin keeps the calling goroutine on one CPU, on a thread that ends with it.
func pin(t testing.TB) {
	t.Helper()
	runtime.LockOSThread()
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		t.Fatal(err)
	}
	for cpu := range 1024 {
		if set.IsSet(cpu) {
			set.Zero()
			set.Set(cpu)
			break
		}
	}
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		t.Fatal(err)
	}
}

// With any number of workers, each frame arrives once, in order, and a flow at one
// worker. (Sockets that are not in one group each receive a copy.)
func TestEachFrameOnceInOrder(t *testing.T) {
	b := newBench(t)
	sender := openSender(t, b.source, "eth0", SenderOptions{})
	for _, mode := range []Mode{ModeCPU, ModeHash, ModeEBPF} {
		for workers := 1; workers <= 8; workers++ {
			for _, streams := range []int{1, 256} {
				t.Run(fmt.Sprintf("%s/%d workers/%d streams", mode, workers, streams), func(t *testing.T) {
					const total, burst = 2048, 256
					g := openGroup(t, b.relay, "in", modeOptions(t, mode, workers))
					c := collect(t, g)
					pin(t) // ModeCPU keeps order where the kernel handles a flow on one CPU
					var packets []Packet
					for i := range total {
						packets = append(packets, Packet{Header: frame(i%streams, i/streams).Build()})
					}
					var frames []captured
					for sent := 0; sent < total; sent += burst { // no more than a ring holds while its worker waits for a CPU
						sendAll(t, sender, packets[sent:sent+burst])
						frames = c.udp(sent+burst, toGroup)
					}
					c.stop()
					if extra := len(c.udp(total, toGroup)) - total; extra != 0 {
						t.Errorf("%d frames more than were sent", extra)
					}
					checkOnceInOrder(t, frames, streams, total/streams)
					checkBusy(t, frames, mode, workers, streams)
				})
			}
		}
	}
}

func checkOnceInOrder(t *testing.T, frames []captured, streams, each int) {
	t.Helper()
	next := make([]int, streams)
	worker := make([]int, streams)
	for _, f := range frames {
		stream, number, ok := numbered(f.Data)
		if !ok {
			t.Fatalf("frame %x", f.Data)
		}
		if number != next[stream] {
			t.Fatalf("stream %d: frame %d came when %d was next", stream, number, next[stream])
		}
		if number > 0 && worker[stream] != f.worker {
			t.Fatalf("stream %d is on workers %d and %d", stream, worker[stream], f.worker)
		}
		next[stream]++
		worker[stream] = f.worker
	}
	for stream, n := range next {
		if n != each {
			t.Errorf("stream %d: %d of %d frames", stream, n, each)
		}
	}
}

// checkBusy checks that many streams use all workers. The kernel's hash differs with each boot: of 64 streams none uses one
// of 8 workers once in 600 boots.
func checkBusy(t *testing.T, frames []captured, mode Mode, workers, streams int) {
	t.Helper()
	busy := map[int]bool{}
	for _, f := range frames {
		busy[f.worker] = true
	}
	if mode != ModeCPU && streams == 256 && len(busy) < workers {
		t.Errorf("only %d of %d workers had frames", len(busy), workers)
	}
}

// portFilter accepts UDP over IPv4, without options, to one port.
func portFilter(port uint16) []unix.SockFilter {
	const (
		half = unix.BPF_LD | unix.BPF_H | unix.BPF_ABS
		jeq  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		ret  = unix.BPF_RET | unix.BPF_K
	)
	return []unix.SockFilter{
		{Code: half, K: 12}, {Code: jeq, K: unix.ETH_P_IP, Jf: 3},
		{Code: half, K: 36}, {Code: jeq, K: uint32(port), Jf: 1},
		{Code: ret, K: 1 << 16}, {Code: ret, K: 0},
	}
}

// Opening and closing under traffic lets in no frame that the filter rejects, and no
// frame twice.
func TestOpenUnderLoad(t *testing.T) {
	b := newBench(t)
	flood(t, openSender(t, b.source, "eth0", SenderOptions{}))
	for range 10 {
		g := openGroup(t, b.relay, "in", Options{Workers: 4, Mode: ModeHash, Filter: Filter{Classic: portFilter(5001)}})
		c := collect(t, g)
		c.udp(50, nil)
		c.stop()
		if err := g.Close(); err != nil {
			t.Error(err)
		}
		for i, f := range c.frames {
			stream, number, ok := numbered(f.Data)
			if !ok || stream != 1 {
				t.Fatalf("foreign frame %x", f.Data)
			}
			if i > 0 {
				// A full ring may drop, on a busy machine.
				if _, before, _ := numbered(c.frames[i-1].Data); number <= before {
					t.Fatalf("frame %d came after %d", number, before)
				}
			}
		}
	}
}

// flood sends numbered frames of streams 0 and 1 until the test ends, ignoring
// losses.
func flood(t *testing.T, sender *Sender) {
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			default:
				_, _ = sender.Send([]Packet{{Header: frame(0, n).Build()}, {Header: frame(1, n).Build()}})
			}
		}
	})
	t.Cleanup(func() {
		close(stop)
		wg.Wait()
	})
}

// The group is full with its own workers: another program cannot join and take its
// packets. A second group has another id.
func TestForeignSocketCannotJoin(t *testing.T) { eachRing(t, testForeignSocketCannotJoin) }

func testForeignSocketCannotJoin(t *testing.T, ring int) {
	mode := uint32(unix.PACKET_FANOUT_CPU)
	if ring > 0 {
		mode = unix.PACKET_FANOUT_EBPF
	}
	b := newBench(t)
	g := openGroup(t, b.relay, "in", Options{Workers: 2, Frames: ring})
	other := openGroup(t, b.relay, "in", Options{Workers: 2, Frames: ring})
	if g.ID() == other.ID() {
		t.Errorf("both groups are number %d", g.ID())
	}
	labtest.Do(t, b.relay, func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_ALL), Ifindex: index(t, b.relay, "in")}); err != nil {
			return err
		}
		args := uint32(g.ID()) | (mode|unix.PACKET_FANOUT_FLAG_IGNORE_OUTGOING)<<16
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_FANOUT, int(args)); err != unix.ENOSPC {
			t.Errorf("joining answered %v, want ENOSPC", err)
		}
		return nil
	})
}

// A receiver on the relay's host still gets its packets, and packets that the host
// sends are not received.
func TestHostTrafficUntouched(t *testing.T) { eachRing(t, testHostTrafficUntouched) }

func testHostTrafficUntouched(t *testing.T, ring int) {
	b := newBench(t)
	local := labtest.Listen(t, b.relay, "in", netip.MustParseAddrPort("239.1.1.1:5000"))
	g := openGroup(t, b.relay, "in", Options{Workers: 2, Mode: ModeHash, Frames: ring})
	c := collect(t, g)
	back := openSender(t, b.relay, "in", SenderOptions{})
	forth := openSender(t, b.source, "eth0", SenderOptions{})
	const n = 100
	for i := range n {
		sendAll(t, back, []Packet{{Header: frame(7, i).Build()}})
		sendAll(t, forth, []Packet{{Header: frame(0, i).Build()}})
	}
	frames := c.udp(n, toGroup)
	c.stop()
	checkOnceInOrder(t, frames, 1, n)
	buf := make([]byte, 100)
	if err := local.SetReadDeadline(time.Now().Add(labtest.Timeout)); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		size, err := local.Read(buf)
		if err != nil || !bytes.Equal(buf[:size], frame(0, i).Payload) {
			t.Fatalf("local receiver: datagram %d is %x, %v", i, buf[:size], err)
		}
	}
}

// Packets that the host sends are not received even if the kernel accepts the flag and
// ignores it: with no filter, with one, and with one set later.
func TestHostTrafficIgnoredBeforeLinux62(t *testing.T) {
	old := kernel()
	old.setFanout = func(fd int, args fanoutArgs) error {
		args.modeFlags &^= unix.PACKET_FANOUT_FLAG_IGNORE_OUTGOING
		return setFanout(fd, args)
	}
	// A jump in the program: its offsets are relative, so that the prepended
	// instructions must not change them.
	jump := []unix.SockFilter{{Code: unix.BPF_JMP | unix.BPF_JA, K: 1}, {Code: unix.BPF_RET | unix.BPF_K, K: 0}, {Code: unix.BPF_RET | unix.BPF_K, K: math.MaxUint32}}
	for _, tt := range []struct {
		name          string
		filter, later Filter
	}{
		{"no filter", Filter{}, Filter{}},
		{"classic", Filter{Classic: jump}, Filter{Classic: jump}},
		{"classic later", Filter{}, Filter{Classic: jump}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			g := openGroupOn(t, old, b.relay, "in", Options{Filter: tt.filter})
			if err := g.SetFilter(tt.later); err != nil {
				t.Fatal(err)
			}
			c := collect(t, g)
			back := openSender(t, b.relay, "in", SenderOptions{})
			forth := openSender(t, b.source, "eth0", SenderOptions{})
			const n = 20
			for i := range n {
				sendAll(t, back, []Packet{{Header: frame(0, i).Build()}})
				sendAll(t, forth, []Packet{{Header: frame(0, i).Build()}})
			}
			frames := c.udp(n, toGroup)
			c.stop()
			checkOnceInOrder(t, frames, 1, n)
		})
	}
}

func TestVLANTags(t *testing.T) { eachRing(t, testVLANTags) }

func testVLANTags(t *testing.T, ring int) {
	b := newBench(t)
	c := collect(t, openGroup(t, b.relay, "in", Options{Frames: ring}))
	sender := openSender(t, b.source, "eth0", SenderOptions{})
	for i, test := range []struct {
		tags     []uint16
		protocol uint16
	}{
		{nil, 0},
		{[]uint16{100}, 0x8100},
		{[]uint16{0xe000 | 4094}, 0x8100},
		{[]uint16{0}, 0x8100},
		{[]uint16{7, 8}, 0x8100},
		{[]uint16{7, 8}, 0x88a8},
	} {
		f := frame(i, 0)
		f.VLANs = test.tags
		want := f.Build()
		if test.protocol == 0x88a8 {
			want[12], want[13] = 0x88, 0xa8
		}
		sendAll(t, sender, []Packet{{Header: want}})
		got := c.udp(1, func(h packet.Headers) bool { return h.DstPort == f.DstPort })[0]
		if got.VLANProtocol != test.protocol || test.tags != nil && got.VLANTag != test.tags[0] {
			t.Errorf("%v: tag %#x, protocol %#x", test.tags, got.VLANTag, got.VLANProtocol)
		}
		if lacks := len(want) - len(got.Data); test.tags != nil && lacks != vlanLen || got.WireLen != len(got.Data) {
			t.Errorf("%v: %d bytes fewer, wire length %d", test.tags, lacks, got.WireLen)
		}
		got.RestoreVLAN()
		if !bytes.Equal(got.Data, want) || got.WireLen != len(want) {
			t.Errorf("%v:\n got %x\nwant %x", test.tags, got.Data, want)
		}
		got.RestoreVLAN()
		if !bytes.Equal(got.Data, want) {
			t.Errorf("%v: restored twice: %x", test.tags, got.Data)
		}
	}
}

// An unread ring fills; every further frame is counted as dropped, and the counters
// never decrease although each read resets the kernel's.
func TestRingFull(t *testing.T) { eachRing(t, testRingFull) }

func testRingFull(t *testing.T, ring int) {
	b := newBench(t)
	g := openGroup(t, b.relay, "in", Options{Blocks: 2, Frames: ring, Filter: Filter{Classic: portFilter(5000)}})
	sender := openSender(t, b.source, "eth0", SenderOptions{})
	f := frame(0, 0)
	f.Payload = append(f.Payload, make([]byte, 1300)...)
	const burst = 300
	packets := slices.Repeat([]Packet{{Header: f.Build()}}, burst)
	var before Stats
	for round := 1; round <= 4; round++ {
		sendAll(t, sender, packets)
		var s Stats
		labtest.Eventually(t, "all frames are counted", func() bool {
			s = groupStats(t, g)[0]
			return s.Received+s.Dropped == uint64(round*burst)
		})
		if s.Received < before.Received || s.Dropped < before.Dropped || s.Freezes < before.Freezes {
			t.Errorf("counters went from %+v to %+v", before, s)
		}
		before = s
	}
	if before.Dropped == 0 || before.Freezes == 0 {
		t.Errorf("the ring did not fill: %+v", before)
	}
	c := collect(t, g)
	c.udp(int(before.Received), nil)
	sendAll(t, sender, packets[:1]) // it receives again
	frames := c.udp(int(before.Received)+1, nil)
	c.stop()
	if err := g.Close(); err != nil {
		t.Error(err)
	}
	if s := groupStats(t, g)[0]; s.Received != uint64(len(frames)) || s.Truncated+s.Malformed != 0 {
		t.Errorf("%+v, but %d frames were handed out", s, len(frames))
	}
}

func groupStats(t testing.TB, g *Group) []Stats {
	t.Helper()
	stats, err := g.Stats()
	if err != nil {
		t.Fatal(err)
	}
	return stats
}

// A filter program truncates and selects; it can be replaced, and a failed replacement
// keeps the previous one.
func TestSetFilter(t *testing.T) { eachRing(t, testSetFilter) }

func testSetFilter(t *testing.T, ring int) {
	b := newBench(t)
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SocketFilter, License: "MIT",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 40), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	g := openGroup(t, b.relay, "in", Options{Workers: 2, Mode: ModeHash, Frames: ring, Filter: Filter{Program: program}})
	c := collect(t, g)
	sender := openSender(t, b.source, "eth0", SenderOptions{})
	cut := frame(0, 0).Build()
	sendAll(t, sender, []Packet{{Header: cut}})
	labtest.Eventually(t, "a cut frame is seen", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return slices.ContainsFunc(c.frames, func(f captured) bool {
			return bytes.Equal(f.Data, cut[:40]) && f.WireLen == len(cut)
		})
	})
	stats := groupStats(t, g)
	if n := stats[0].Truncated + stats[1].Truncated; n == 0 {
		t.Error("no frame counted as truncated")
	}

	if err := g.SetFilter(Filter{Classic: portFilter(5001)}); err != nil {
		t.Fatal(err)
	}
	bad := Filter{Classic: []unix.SockFilter{{Code: 0xffff}}}
	var failure *Error
	if err := g.SetFilter(bad); !errors.Is(err, unix.EINVAL) || !errors.As(err, &failure) || failure.Step != StepFilter {
		t.Errorf("a bad filter: %v", err)
	}
	if err := g.SetFilter(Filter{Program: program, Classic: keep(1)}); err == nil {
		t.Error("a filter of two kinds was taken")
	}
	c.mu.Lock()
	c.frames = nil
	c.mu.Unlock()
	sendAll(t, sender, []Packet{{Header: frame(0, 1).Build()}, {Header: frame(1, 1).Build()}})
	if frames := c.udp(1, nil); len(frames) != 1 || len(frames[0].Data) != len(cut) {
		t.Errorf("%d frames", len(frames))
	}
	if err := g.SetFilter(Filter{}); err != nil {
		t.Fatal(err)
	}
	sendAll(t, sender, []Packet{{Header: frame(2, 1).Build()}})
	c.udp(2, nil)
}

// The interface goes down: Wait reports it once, and continues when it is up again.
// Then it is deleted.
func TestInterfaceDownUpGone(t *testing.T) { eachRing(t, testInterfaceDownUpGone) }

func testInterfaceDownUpGone(t *testing.T, ring int) {
	b := newBench(t)
	g := openGroup(t, b.relay, "in", Options{Workers: 2, Mode: ModeHash, Frames: ring})
	c := collect(t, g)
	sender := openSender(t, b.source, "eth0", SenderOptions{})
	for round := range 2 {
		setUp(t, b.relay, "in", false)
		labtest.Eventually(t, "both workers know", func() bool { return len(c.errors()) == 2*(round+1) })
		setUp(t, b.relay, "in", true)
		sendUntilSeen(t, sender, c, round)
	}
	for _, err := range c.errors() {
		var failure *Error
		if !errors.Is(err, unix.ENETDOWN) || !errors.As(err, &failure) || failure.Step != StepReceive {
			t.Errorf("error is %v", err)
		}
	}
	labtest.RemoveLink(t, b.relay, "in")
	labtest.Eventually(t, "both workers know that it is gone", func() bool {
		n := 0
		for _, err := range c.errors() {
			if errors.Is(err, unix.ENODEV) {
				n++
			}
		}
		return n >= 2
	})
}

// A group on an interface that is down starts receiving when it is up.
func TestOpenWhileDown(t *testing.T) { eachRing(t, testOpenWhileDown) }

func testOpenWhileDown(t *testing.T, ring int) {
	b := newBench(t)
	setUp(t, b.relay, "in", false)
	opts := Options{Interface: "in", Index: index(t, b.relay, "in"), Workers: 2, Mode: ModeHash, Blocks: 4, Frames: ring}
	var g *Group
	err := b.relay.Do(func() (err error) {
		g, err = Open(opts)
		return err
	})
	if errors.Is(err, unix.ENETDOWN) {
		t.Logf("this kernel does not: %v", err) // before Linux 6.13
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	c := collect(t, g)
	labtest.Eventually(t, "both workers know", func() bool { return len(c.errors()) == 2 })
	setUp(t, b.relay, "in", true)
	sendUntilSeen(t, openSender(t, b.source, "eth0", SenderOptions{}), c, 0)
	c.stop()
}

func setUp(t testing.TB, h *lab.Host, ifname string, up bool) {
	t.Helper()
	if err := h.SetUp(ifname, up); err != nil {
		t.Fatal(err)
	}
}

// sendUntilSeen sends frames of a stream until one arrives: an interface takes a
// while to come up.
func sendUntilSeen(t testing.TB, s *Sender, c *collector, stream int) {
	t.Helper()
	labtest.Eventually(t, "frames arrive again", func() bool {
		_, _ = s.Send([]Packet{{Header: frame(stream, 0).Build()}})
		c.mu.Lock()
		defer c.mu.Unlock()
		return slices.ContainsFunc(c.frames, func(f captured) bool {
			got, _, ok := numbered(f.Data)
			return ok && got == stream
		})
	})
}

// Close ends Wait, waits for a held block, and may be called twice; other methods may
// be called afterwards.
func TestClose(t *testing.T) {
	b := newBench(t)
	g := openGroup(t, b.relay, "in", Options{Workers: 2, Mode: ModeCPU})
	before := labtest.Held()
	c := collect(t, g)
	closed := make(chan error)
	for range 2 {
		go func() { closed <- g.Close() }()
	}
	for range 2 {
		if err := <-closed; err != nil {
			t.Error(err)
		}
	}
	c.wg.Wait()
	want := before
	want.Sockets, want.Eventfds, want.Memory, want.Rings = before.Sockets-2, before.Eventfds-2, before.Memory-1, before.Rings-2
	if after := labtest.Held(); after != want {
		t.Errorf("holds %+v, want %+v", after, want)
	}
	w := g.Workers()[0]
	if _, err := w.Wait(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Wait: %v", err)
	}
	w.Wake()
	if err := g.SetFilter(Filter{}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("SetFilter: %v", err)
	}
	groupStats(t, g)
}

func TestCloseWaitsForBlock(t *testing.T) { eachRing(t, testCloseWaitsForBlock) }

func testCloseWaitsForBlock(t *testing.T, ring int) {
	b := newBench(t)
	g := openGroup(t, b.relay, "in", Options{Frames: ring})
	sendAll(t, openSender(t, b.source, "eth0", SenderOptions{}), []Packet{{Header: frame(0, 0).Build()}})
	w := g.Workers()[0]
	block, err := w.Wait()
	if err != nil {
		t.Fatal(err)
	}
	closed := make(chan error)
	go func() { closed <- g.Close() }()
	labtest.Eventually(t, "it is closing", w.closed.Load)
	var f Frame
	for block.Next(&f) { // the memory is still mapped
		_ = bytes.Clone(f.Data)
	}
	select {
	case err := <-closed:
		t.Errorf("Close returned %v while a block was held", err)
	default:
	}
	block.Release()
	block.Release()
	if err := <-closed; err != nil {
		t.Error(err)
	}
}

// A goroutine that ended while holding a block is replaced by another, and only that
// block is lost.
func TestGoroutineReplaced(t *testing.T) { eachRing(t, testGoroutineReplaced) }

func testGoroutineReplaced(t *testing.T, ring int) {
	b := newBench(t)
	g := openGroup(t, b.relay, "in", Options{Frames: ring, Filter: Filter{Classic: portFilter(5000)}})
	sender := openSender(t, b.source, "eth0", SenderOptions{})
	sendAll(t, sender, []Packet{{Header: frame(0, 0).Build()}})
	taken := make(chan error)
	go func() {
		block, err := g.Workers()[0].Wait()
		var f Frame
		if err == nil && !block.Next(&f) {
			err = errors.New("no frame in the block")
		}
		taken <- err
	}()
	if err := <-taken; err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		sendAll(t, sender, []Packet{{Header: frame(0, i).Build()}})
	}
	c := collect(t, g)
	frames := c.udp(10, nil)
	c.stop()
	checkOnceInOrder(t, frames, 1, 10)
}

func TestWake(t *testing.T) { eachRing(t, testWake) }

func testWake(t *testing.T, ring int) {
	b := newBench(t)
	g := openGroup(t, b.relay, "in", Options{Frames: ring})
	w := g.Workers()[0]
	w.Wake()
	w.Wake() // counts as one call
	if _, err := w.Wait(); !errors.Is(err, ErrWoken) {
		t.Errorf("first Wait: %v", err)
	}
	sendAll(t, openSender(t, b.source, "eth0", SenderOptions{}), []Packet{{Header: frame(0, 0).Build()}})
	if _, err := w.Wait(); err != nil {
		t.Errorf("second Wait: %v", err)
	}
	w.block.Release()
}

func TestOpenRefuses(t *testing.T) {
	labtest.RequireRoot(t)
	program := steeringProgram(t, ByAddresses)
	valid := Options{Interface: "lo", Index: 1}
	for _, test := range []struct {
		change func(*Options)
		want   string
	}{
		{func(o *Options) { o.Index = 0 }, "interface index 0"},
		{func(o *Options) { o.Workers = -1 }, "-1 workers"},
		{func(o *Options) { o.Workers = 1 << 17 }, "131072 workers"},
		{func(o *Options) { o.Mode = 9 }, "mode 9"},
		{func(o *Options) { o.Mode = ModeEBPF }, "steering program"},
		{func(o *Options) { o.Steering = program }, "steering program"},
		{func(o *Options) { o.BlockSize = 4096 }, "block size 4096"},
		{func(o *Options) { o.BlockSize = 3 << 17 }, "block size 393216"},
		{func(o *Options) { o.Blocks = 1 }, "1 blocks"},
		{func(o *Options) { o.Blocks = 1 << 20 }, "1048576 blocks"},
		{func(o *Options) { o.BlockTimeout = time.Microsecond }, "block timeout 1µs"},
		{func(o *Options) { o.BlockTimeout = time.Minute }, "block timeout 1m0s"},
		{func(o *Options) { o.Filter = Filter{Program: program, Classic: keep(1)} }, "one of the two"},
		{func(o *Options) { o.Filter.Classic = make([]unix.SockFilter, 1<<16) }, "65536"},
		{func(o *Options) { o.Frames = 100 }, "100 frames: must be 0, or a power of two from 64 to 65536"},
		{func(o *Options) { o.Frames, o.FrameSize = 64, 1024 }, "frame size 1024: must be a power of two from 2048 to 65536"},
		{func(o *Options) { o.Frames, o.Mode, o.Steering = 64, ModeEBPF, program }, "no frame ring"},
		{func(o *Options) { o.Frames, o.Workers = 64, 1025 }, "1025 workers with a frame ring"},
		{func(o *Options) { o.Index = 1 << 30 }, "bind: no such device"},
	} {
		opts := valid
		test.change(&opts)
		g, err := Open(opts)
		var failure *Error
		if !errors.As(err, &failure) || g != nil || !strings.Contains(err.Error(), test.want) ||
			!strings.HasPrefix(err.Error(), "PACKET_FANOUT new group (mode "+opts.Mode.String()+") on lo: ") {
			t.Errorf("error is %v, want %q", err, test.want)
		}
	}
}

// The steering program keeps a flow together regardless of TTL, tags and size, and
// distinguishes flows by the requested fields.
func TestSteering(t *testing.T) {
	b := newBench(t)
	sender := openSender(t, b.source, "eth0", SenderOptions{})
	for _, by := range []SteerBy{ByAddresses, ByAddressesAndPorts} {
		t.Run(fmt.Sprint(by), func(t *testing.T) {
			opts := Options{Mode: ModeEBPF, Workers: 4, Steering: steeringProgram(t, by)}
			c := collect(t, openGroup(t, b.relay, "in", opts))
			const flows, each = 64, 6
			flow := func(v6, ports bool, i int) packet.Frame {
				f := frame(0, 0)
				if v6 {
					f.Src, f.Dst = netip.MustParseAddr("fd00::1"), netip.MustParseAddr("ff3e::1")
					f.DstMAC = packet.MulticastMAC(f.Dst)
				}
				if ports {
					f.SrcPort, f.DstPort = uint16(1000+i), uint16(2000+i)
					return f
				}
				dst := f.Dst.AsSlice()
				dst[len(dst)-1] = byte(i)
				f.Dst, _ = netip.AddrFromSlice(dst)
				return f
			}
			for _, kind := range []struct{ v6, ports bool }{{false, false}, {false, true}, {true, false}, {true, true}} {
				c.mu.Lock()
				c.frames = nil
				c.mu.Unlock()
				for i := range flows {
					for k := range each {
						f := flow(kind.v6, kind.ports, i)
						f.TTL, f.TOS = uint8(k+2), uint8(k<<2)
						f.VLANs = [][]uint16{nil, {5}, {5, 6}}[k%3]
						f.Payload = append(f.Payload, make([]byte, 100*k)...)
						sendAll(t, sender, []Packet{{Header: f.Build()}})
					}
				}
				type key struct {
					dst  netip.Addr
					port uint16
				}
				workers, busy := map[key]int{}, map[int]bool{}
				ours := func(h packet.Headers) bool { return h.SrcPort == 4000 || h.SrcPort >= 1000 && h.SrcPort < 1000+flows }
				for _, f := range c.udp(flows*each, ours) {
					h, _ := packet.Parse(f.Data)
					k := key{h.Dst, h.DstPort}
					if w, ok := workers[k]; ok && w != f.worker {
						t.Fatalf("%+v: flow %v is on workers %d and %d", kind, k, w, f.worker)
					}
					workers[k], busy[f.worker] = f.worker, true
				}
				want := 4
				if kind.ports && by == ByAddresses {
					want = 1
				}
				if len(workers) != flows || len(busy) != want {
					t.Errorf("%+v: %d flows on %d workers, want %d on %d", kind, len(workers), len(busy), flows, want)
				}
			}
		})
	}
}

// Groups and senders, opened and closed many times under traffic with a waiting
// worker, leave no descriptor, mapping or goroutine.
func TestOpenCloseMany(t *testing.T) {
	times := labtest.Soak(100, 1000)
	eachRing(t, func(t *testing.T, ring int) { testOpenCloseMany(t, ring, times) })
}

func testOpenCloseMany(t *testing.T, ring, times int) {
	b := newBench(t)
	labtest.Enter(t, b.relay)
	in, out := index(t, b.relay, "in"), index(t, b.relay, "out")
	source := openSender(t, b.source, "eth0", SenderOptions{})
	packets := []Packet{{Header: frame(1, 0).Build()}, {Header: frame(2, 0).Build()}}
	before, goroutines := labtest.Held(), runtime.NumGoroutine()
	for i := range times {
		g, err := Open(Options{Interface: "in", Index: in, Workers: 2, Mode: ModeHash, Blocks: 2, Frames: ring})
		if err != nil {
			t.Fatalf("cycle %d: %v", i, err)
		}
		sender, err := OpenSender(out, SenderOptions{})
		if err != nil {
			t.Fatalf("cycle %d: %v", i, err)
		}
		ended := make(chan error)
		go func() {
			for {
				if _, err := g.Workers()[0].Wait(); err != nil {
					ended <- err
					return
				}
			}
		}()
		sendAll(t, source, packets)
		if err := errors.Join(g.Close(), sender.Close()); err != nil {
			t.Fatalf("cycle %d: %v", i, err)
		}
		if err := <-ended; !errors.Is(err, os.ErrClosed) {
			t.Fatalf("cycle %d: %v", i, err)
		}
		if i%10 != 0 {
			continue
		}
		if after := labtest.Held(); after != before {
			t.Fatalf("cycle %d: holds %+v, want %+v", i, after, before)
		}
	}
	if after := labtest.Held(); after != before {
		t.Errorf("holds %+v, want %+v", after, before)
	}
	labtest.Eventually(t, "goroutines have ended", func() bool { return runtime.NumGoroutine() <= goroutines })
}
