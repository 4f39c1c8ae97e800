package fanout

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/packet"
)

// bench is a source whose eth0 is connected to the relay's in, and a sink whose
// eth0 is connected to the relay's out.
type bench struct {
	source, relay, sink *lab.Host
}

func newBench(t testing.TB) *bench {
	t.Helper()
	b := &bench{labtest.Host(t, "src"), labtest.Host(t, "rly"), labtest.Host(t, "snk")}
	labtest.Connect(t,
		lab.End{Host: b.source, Name: "eth0", Addrs: []string{"10.0.0.1/24", "fd00::1/64"}},
		lab.End{Host: b.relay, Name: "in", Addrs: []string{"10.0.0.2/24", "fd00::2/64"}})
	labtest.Connect(t, lab.End{Host: b.relay, Name: "out"}, lab.End{Host: b.sink, Name: "eth0"})
	for _, h := range []*lab.Host{b.source, b.relay} {
		if err := h.AddRoute("224.0.0.0/4", map[*lab.Host]string{b.source: "eth0", b.relay: "in"}[h]); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

func index(t testing.TB, h *lab.Host, name string) int {
	t.Helper()
	link, err := h.Link(name)
	if err != nil {
		t.Fatal(err)
	}
	return link.Attrs().Index
}

// openGroup opens a group on an interface of the host. It is
// closed when the test ends.
func openGroup(t testing.TB, h *lab.Host, ifname string, opts Options) *Group {
	t.Helper()
	return openGroupOn(t, kernel(), h, ifname, opts)
}

func openGroupOn(t testing.TB, sys *system, h *lab.Host, ifname string, opts Options) *Group {
	t.Helper()
	opts.Interface, opts.Index = ifname, index(t, h, ifname)
	// A busy machine may not let a worker read for so long: 640 ms.
	setDefault(&opts.Blocks, 64)
	if opts.BlockTimeout == 0 {
		opts.BlockTimeout = 10 * time.Millisecond
	}
	var g *Group
	labtest.Do(t, h, func() (err error) {
		g, err = open(opts, sys)
		return err
	})
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	})
	return g
}

// openSender opens a sender that is closed when the test ends. That of a test waits until the kernel has delivered what
// it has in flight, 200 frames or so: a CPU's backlog queues 1,000 (net.core.netdev_max_backlog), and drops the others
// if its softirqs wait for the CPU.
func openSender(t testing.TB, h *lab.Host, ifname string, opts SenderOptions) *Sender {
	t.Helper()
	if _, isBenchmark := t.(*testing.B); !isBenchmark {
		setDefault(&opts.SendBuffer, 64<<10)
	}
	var s *Sender
	labtest.Do(t, h, func() (err error) {
		s, err = OpenSender(index(t, h, ifname), opts)
		return err
	})
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// eachRing runs a test with the ring of blocks only, and with a frame ring.
func eachRing(t *testing.T, test func(t *testing.T, ring int)) {
	for _, ring := range []int{0, minFrames} {
		t.Run(fmt.Sprintf("%d frames", ring), func(t *testing.T) { test(t, ring) })
	}
}

// sendAll sends every packet, waiting for room.
func sendAll(t testing.TB, s *Sender, packets []Packet) {
	t.Helper()
	for len(packets) > 0 {
		n, err := s.Send(packets)
		packets = packets[n:]
		if err != nil && err != unix.EAGAIN && err != unix.ENOBUFS {
			t.Fatalf("send: %v", err)
		}
		if err == unix.EAGAIN {
			if _, err := s.Wait(labtest.Timeout); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// frame is a UDP frame of stream to 239.1.1.1, numbered in its payload.
func frame(stream, number int) packet.Frame {
	payload := binary.BigEndian.AppendUint32(nil, uint32(stream))
	payload = binary.BigEndian.AppendUint32(payload, uint32(number))
	dst := netip.MustParseAddr("239.1.1.1")
	return packet.Frame{
		DstMAC: packet.MulticastMAC(dst), SrcMAC: [6]byte{2, 0, 0, 0, 0, 9},
		Src: netip.MustParseAddr("10.0.0.1"), Dst: dst,
		SrcPort: 4000, DstPort: uint16(5000 + stream), TTL: 8, Payload: append(payload, "testing testing"...),
	}
}

// numbered reads back what frame wrote.
func numbered(data []byte) (stream, number int, ok bool) {
	h, ok := packet.Parse(data)
	if !ok || len(data) < h.UDP+16 {
		return 0, 0, false
	}
	payload := data[h.UDP+8:]
	return int(binary.BigEndian.Uint32(payload)), int(binary.BigEndian.Uint32(payload[4:])), true
}

// captured is a copy of a frame.
type captured struct {
	Frame
	worker int
}

// collector reads all workers of a group, each in a goroutine.
type collector struct {
	t     testing.TB
	group *Group
	wg    sync.WaitGroup

	mu     sync.Mutex
	frames []captured
	errs   []error
}

// collect starts reading, until the test ends or the collector is stopped.
func collect(t testing.TB, g *Group) *collector {
	c := &collector{t: t, group: g}
	for i, w := range g.Workers() {
		c.wg.Go(func() { c.read(i, w) })
	}
	t.Cleanup(c.stop)
	return c
}

func (c *collector) read(number int, w *Worker) {
	for {
		block, err := w.Wait()
		if errors.Is(err, ErrWoken) || errors.Is(err, os.ErrClosed) {
			return
		}
		c.mu.Lock()
		if err != nil {
			c.errs = append(c.errs, err)
			c.mu.Unlock()
			continue
		}
		var f Frame
		for block.Next(&f) {
			c.frames = append(c.frames, captured{clone(f), number})
		}
		c.mu.Unlock()
		block.Release()
	}
}

// clone copies a frame out of its block, with the memory around its data.
func clone(f Frame) Frame {
	f.room = append([]byte(nil), f.room...)
	f.Data = f.room[len(f.room)-len(f.Data):]
	return f
}

func (c *collector) stop() {
	for _, w := range c.group.Workers() {
		w.Wake()
	}
	c.wg.Wait()
}

// udp returns the UDP frames for which keep is true, once there are at least n.
func (c *collector) udp(n int, keep func(packet.Headers) bool) (frames []captured) {
	c.t.Helper()
	defer func() {
		if c.t.Failed() {
			c.t.Logf("%d frames of %d; %+v", len(frames), n, groupStats(c.t, c.group))
		}
	}()
	labtest.Eventually(c.t, "the frames have arrived", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		frames = nil
		for _, f := range c.frames {
			h, ok := packet.Parse(f.Data)
			if ok && (keep == nil || keep(h)) {
				frames = append(frames, f)
			}
		}
		return len(frames) >= n
	})
	return frames
}

func (c *collector) errors() []error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]error(nil), c.errs...)
}

// toGroup accepts the frames made by frame.
func toGroup(h packet.Headers) bool { return h.Dst == netip.MustParseAddr("239.1.1.1") }
