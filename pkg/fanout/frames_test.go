package fanout

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/packet"
)

// With two rings, too, each frame arrives once, and each flow in order, however the frames
// are spread over the rings: too many for one, too long, merged.
func TestFrameRingOrder(t *testing.T) {
	b := newBench(t)
	sender := openSender(t, b.source, "eth0", SenderOptions{})
	for _, mode := range []Mode{ModeCPU, ModeHash} {
		for _, workers := range []int{1, 2, 5} {
			for _, pause := range []time.Duration{0, 200 * time.Microsecond, 3 * time.Millisecond} {
				t.Run(fmt.Sprintf("%s/%d workers/pause %v", mode, workers, pause), func(t *testing.T) {
					const total, streams, burst = 6400, 4, 160
					g := openGroup(t, b.relay, "in", Options{Mode: mode, Workers: workers, Frames: minFrames})
					c := collect(t, g)
					pin(t)
					var packets []Packet
					for i := range total {
						packets = append(packets, Packet{Header: frame(i%streams, i/streams).Build()})
					}
					for len(packets) > 0 {
						sendAll(t, sender, packets[:burst])
						packets = packets[burst:]
						time.Sleep(pause)
					}
					checkOnceInOrder(t, c.udp(total, toGroup), streams, total/streams)
					taken := uint64(0)
					for i, s := range groupStats(t, g) {
						taken += atomic.LoadUint64(&g.choice.of(i).taken)
						if s.Dropped+s.Malformed+s.Truncated != 0 {
							t.Errorf("worker %d: %+v", i, s)
						}
					}
					if taken == 0 {
						t.Error("no frame came by the frame ring")
					}
				})
			}
		}
	}
}

// A single frame is handed over immediately, not at a block's timeout.
func TestFrameRingIsPrompt(t *testing.T) {
	b := newBench(t)
	g := openGroup(t, b.relay, "in", Options{Frames: minFrames, Blocks: 4, BlockTimeout: time.Second, Filter: Filter{Classic: portFilter(5000)}})
	c := collect(t, g)
	sender := openSender(t, b.source, "eth0", SenderOptions{})
	start := time.Now()
	const total = 20
	for i := range total {
		sendAll(t, sender, []Packet{{Header: frame(0, i).Build()}})
		c.udp(i+1, toGroup)
	}
	if took := time.Since(start); took > total*time.Second/2 {
		t.Errorf("%d frames one after the other took %v", total, took)
	}
	c.stop()
}

// Frames that arrive while the worker does not read and exceed the frame ring wait in blocks;
// then frames use the frame ring again.
func TestFrameRingOverflows(t *testing.T) {
	b := newBench(t)
	g := openGroup(t, b.relay, "in", Options{Frames: minFrames, Filter: Filter{Classic: portFilter(5000)}})
	sender := openSender(t, b.source, "eth0", SenderOptions{})
	const total = 3000
	taken := func() uint64 { return atomic.LoadUint64(&g.choice.of(0).taken) }
	next := 0
	send := func(n int) {
		var packets []Packet
		for range n {
			packets = append(packets, Packet{Header: frame(0, next).Build()})
			next++
		}
		sendAll(t, sender, packets)
	}
	c := collect(t, g)
	send(1)
	c.udp(1, toGroup)
	c.stop()
	send(total)
	labtest.Eventually(t, "all frames are in the rings", func() bool { return groupStats(t, g)[0].Received == uint64(next) })
	if n := taken(); n == 0 || n >= minFrames+64 {
		t.Errorf("%d frames went by the frame ring of %d", n, minFrames)
	}
	again := collect(t, g)
	again.udp(total, toGroup)
	before := taken()
	labtest.Eventually(t, "frames come by the frame ring again", func() bool {
		send(1)
		again.udp(next-1, toGroup)
		return taken() > before
	})
	again.stop()
	checkOnceInOrder(t, append(c.udp(1, toGroup), again.udp(next-1, toGroup)...), 1, next)
	if s := groupStats(t, g)[0]; s.Dropped != 0 || s.Malformed != 0 || s.Truncated != 0 {
		t.Errorf("%+v", s)
	}
}

// Frames too long for a slot, and merged ones, arrive whole, and in order with the short ones
// between which they were sent.
func TestFrameRingOrderOfLongAndMerged(t *testing.T) {
	b := newBench(t)
	for h, ifname := range map[*lab.Host]string{b.source: "eth0", b.relay: "in"} {
		l, err := h.Link(ifname)
		if err == nil {
			err = h.Netlink().LinkSetMTU(l, 9000)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	labtest.Do(t, b.source, func() error { return lab.SetTxChecksum("eth0", true) })
	merged := labtest.MergedDatagrams(t, b.relay)
	g := openGroup(t, b.relay, "in", Options{Frames: minFrames, Filter: Filter{Classic: portFilter(5000)}})
	c := collect(t, g)
	var conn *net.UDPConn
	labtest.Do(t, b.source, func() error {
		some, err := net.Dial("udp", "239.1.1.1:5000")
		if err != nil {
			return err
		}
		conn = some.(*net.UDPConn)
		return nil
	})
	defer conn.Close()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	segment := func(n int) {
		if err := errors.Join(raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, n) }), err); err != nil {
			t.Fatal(err)
		}
	}
	// Each datagram begins with its number.
	var want []int
	datagram := func(length int) []byte {
		want = append(want, length)
		return append(binary.BigEndian.AppendUint32(nil, uint32(len(want)-1)), make([]byte, length-4)...)
	}
	write := func(payload []byte) {
		if _, err := conn.Write(payload); err != nil {
			t.Fatal(err)
		}
	}
	for round := range 200 {
		write(datagram(100))
		switch {
		case round%3 == 1:
			write(datagram(5000))
		case round%3 == 2 && merged:
			segment(300)
			write(slices.Concat(datagram(300), datagram(300), datagram(200)))
			segment(0)
		}
		write(datagram(50))
		if round%20 == 0 {
			time.Sleep(2 * time.Millisecond)
		}
	}
	frames := c.udp(len(want), toGroup)
	c.stop()
	for i, f := range frames {
		h, _ := packet.Parse(f.Data)
		payload := f.Data[h.UDP+8:]
		if n := int(binary.BigEndian.Uint32(payload)); n != i || len(payload) != want[i] || f.WireLen != len(f.Data) {
			t.Fatalf("frame %d: number %d, %d bytes, want %d; wire length %d of %d", i, n, len(payload), want[i], f.WireLen, len(f.Data))
		}
	}
	if n := atomic.LoadUint64(&g.choice.of(0).taken); n == 0 {
		t.Error("none came by the frame ring")
	}
}

// A frame that the kernel cannot describe in a virtio header is dropped and counted, and later
// ones arrive: a TPACKET_V2 socket with such a header would never receive again.
func TestUndescribedFrameDoesNotDeafen(t *testing.T) { eachRing(t, testUndescribedFrameDoesNotDeafen) }

func testUndescribedFrameDoesNotDeafen(t *testing.T, ring int) {
	h := labtest.Host(t, "tap")
	tap := openTap(t, h, "tap0")
	setUp(t, h, "tap0", true)
	g := openGroup(t, h, "tap0", Options{Frames: ring, Filter: Filter{Classic: portFilter(5000)}})
	c := collect(t, g)
	f := frame(0, 0)
	write := func(gso, segment int, data []byte) {
		t.Helper()
		header := make([]byte, sizeofVnetHeader)
		header[1] = byte(gso)
		if gso != 0 {
			header[0] = unix.VIRTIO_NET_HDR_F_NEEDS_CSUM
			binary.NativeEndian.PutUint16(header[2:], 42)
			binary.NativeEndian.PutUint16(header[4:], uint16(segment))
			binary.NativeEndian.PutUint16(header[6:], 34)
			binary.NativeEndian.PutUint16(header[8:], 6)
		}
		if _, err := unix.Write(tap, append(header, data...)); err != nil {
			t.Fatal(err)
		}
	}
	long := f
	long.Payload = make([]byte, 1300)
	const gsoUDP = 3 // VIRTIO_NET_HDR_GSO_UDP: a datagram to be sent in fragments
	write(gsoUDP, 800, long.Build())
	labtest.Eventually(t, "it is counted as dropped", func() bool { return groupStats(t, g)[0].Dropped == 1 })
	for i := range 3 * minFrames {
		write(0, 0, frame(0, i).Build())
	}
	frames := c.udp(3*minFrames, toGroup)
	c.stop()
	checkOnceInOrder(t, frames, 1, 3*minFrames)
}

// openTap makes a tap device of the host whose frames have a virtio header.
func openTap(t testing.TB, h *lab.Host, name string) (fd int) {
	t.Helper()
	labtest.Do(t, h, func() (err error) {
		if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
			return err
		}
		request, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		return unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	})
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}
