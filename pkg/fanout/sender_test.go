package fanout

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/packet"
)

// Frames leave unchanged and in order, in one part or in two that share a payload,
// with and without the qdisc.
func TestSendByteExact(t *testing.T) {
	for _, bypass := range []bool{false, true} {
		t.Run("bypass "+strconv.FormatBool(bypass), func(t *testing.T) {
			b := newBench(t)
			tap := labtest.NewTap(t, b.sink, "eth0")
			sender := openSender(t, b.relay, "out", SenderOptions{BypassQdisc: bypass, Batch: 7})
			if !sender.Ethernet() {
				t.Error("an Ethernet device is said to be none")
			}
			var packets []Packet
			var want [][]byte
			shared := bytes.Repeat([]byte("payload "), 100)
			for i := range 100 {
				f := frame(i%3, i)
				f.Payload = shared[:8*i]
				f.Padding = 18
				data := f.Build()
				cut := min(42, len(data))
				switch i % 3 {
				case 0:
					packets = append(packets, Packet{Header: data[:cut], Payload: data[cut:]})
				case 1:
					packets = append(packets, Packet{Header: data})
				case 2:
					packets = append(packets, Packet{Payload: data})
				}
				want = append(want, data)
			}
			if n, err := sender.Send(packets); n != len(packets) || err != nil {
				t.Fatalf("sent %d, %v", n, err)
			}
			for i, got := range tap.Collect(len(want), isUDP) {
				if !bytes.Equal(got, want[i]) {
					t.Fatalf("frame %d:\n got %x\nwant %x", i, got, want[i])
				}
			}
			if n, err := sender.Send(nil); n != 0 || err != nil {
				t.Errorf("nothing to send: %d, %v", n, err)
			}
		})
	}
}

func isUDP(f []byte) bool {
	_, ok := packet.Parse(f)
	return ok
}

// A frame refused by the kernel is identified, and the others are unaffected.
func TestSendNamesTheFrame(t *testing.T) {
	b := newBench(t)
	tap := labtest.NewTap(t, b.sink, "eth0")
	sender := openSender(t, b.relay, "out", SenderOptions{Batch: 4})
	long := frame(0, 0)
	long.Payload = make([]byte, 1473)
	bad := map[int]Packet{0: {Header: long.Build()}, 5: {Header: make([]byte, 13)}, 6: {}, 9: {Header: long.Build()}}
	reasons := map[int]error{0: unix.EMSGSIZE, 5: unix.EINVAL, 6: unix.EINVAL, 9: unix.EMSGSIZE}
	var packets []Packet
	for i := range 10 {
		p, ok := bad[i]
		if !ok {
			p = Packet{Header: frame(0, i).Build()}
		}
		packets = append(packets, p)
	}
	got := map[int]error{}
	for at := 0; at < len(packets); {
		n, err := sender.Send(packets[at:])
		at += n
		if err != nil {
			got[at] = err
			at++
		}
	}
	if len(got) != len(reasons) {
		t.Errorf("refused: %v, want %v", got, reasons)
	}
	for i, want := range reasons {
		if got[i] != want {
			t.Errorf("frame %d: %v, want %v", i, got[i], want)
		}
	}
	frames := tap.Collect(len(packets)-len(bad), isUDP)
	for i, want := range []int{1, 2, 3, 4, 7, 8} {
		if _, number, _ := numbered(frames[i]); number != want {
			t.Errorf("frame %d came, want %d", number, want)
		}
	}
}

// A full queue returns ENOBUFS.
func TestSendQueueFull(t *testing.T) {
	b := newBench(t)
	slowDown(t, b.relay, "out", 300)
	sender := openSender(t, b.relay, "out", SenderOptions{})
	packets := slices.Repeat([]Packet{{Header: frame(0, 0).Build()}}, 10000)
	if n, err := sender.Send(packets); n == 0 || err != unix.ENOBUFS {
		t.Errorf("sent %d, %v", n, err)
	}
}

// slowDown gives an interface a queue of so many bytes, and a megabit a second.
func slowDown(t *testing.T, h *lab.Host, ifname string, queue uint32) {
	t.Helper()
	if err := h.Netlink().QdiscReplace(&netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index(t, h, ifname), Parent: netlink.HANDLE_ROOT, Handle: netlink.MakeHandle(9, 0)},
		Rate:       125000, Limit: queue, Buffer: 20000,
	}); err != nil {
		labtest.Lacking(t, fmt.Sprintf("needs a token bucket filter (sch_tbf): %v", err))
	}
}

// A slow queue fills the send buffer: EAGAIN, until there is room.
func TestSendBufferFull(t *testing.T) {
	b := newBench(t)
	slowDown(t, b.relay, "out", 1<<20)
	sender := openSender(t, b.relay, "out", SenderOptions{SendBuffer: 8192})
	packets := slices.Repeat([]Packet{{Header: frame(0, 0).Build()}}, 10000)
	n, err := sender.Send(packets)
	if n == 0 || err != unix.EAGAIN {
		t.Fatalf("sent %d, %v", n, err)
	}
	if ok, err := sender.Wait(0); ok || err != nil {
		t.Errorf("room at once: %v, %v", ok, err)
	}
	if ok, err := sender.Wait(labtest.Timeout); !ok || err != nil {
		t.Errorf("waited: %v, %v", ok, err)
	}
	if n, err := sender.Send(packets[:1]); n != 1 || err != nil {
		t.Errorf("then sent %d, %v", n, err)
	}
}

// The output goes down, comes up, and is deleted while frames are being sent.
func TestOutputDownAndDeletedUnderLoad(t *testing.T) {
	b := newBench(t)
	sender := openSender(t, b.relay, "out", SenderOptions{})
	packets := slices.Repeat([]Packet{{Header: frame(0, 0).Build()}}, 100)
	until := func(want error) {
		t.Helper()
		labtest.Eventually(t, "sending answers "+want.Error(), func() bool {
			_, err := sender.Send(packets)
			if err != nil && !errors.Is(err, want) && err != unix.ENETDOWN && err != unix.EAGAIN && err != unix.ENOBUFS {
				t.Fatalf("sending answers %v", err)
			}
			return errors.Is(err, want)
		})
	}
	setUp(t, b.relay, "out", false)
	until(unix.ENETDOWN)
	setUp(t, b.relay, "out", true)
	labtest.Eventually(t, "it sends again", func() bool {
		n, _ := sender.Send(packets)
		return n == len(packets)
	})
	deleted := make(chan error)
	go func() {
		link, err := b.relay.Link("out")
		if err == nil {
			err = b.relay.Netlink().LinkDel(link)
		}
		deleted <- err
	}()
	until(unix.ENXIO)
	if err := <-deleted; err != nil {
		t.Fatal(err)
	}
}

func TestOpenSenderRefuses(t *testing.T) {
	labtest.RequireRoot(t)
	before := labtest.Held()
	for _, test := range []struct {
		index int
		opts  SenderOptions
		want  error
	}{
		{0, SenderOptions{}, nil},
		{1, SenderOptions{Batch: 1025}, nil},
		{1, SenderOptions{Batch: -1}, nil},
		{1, SenderOptions{SendBuffer: -1}, nil},
		{1 << 30, SenderOptions{}, unix.ENODEV},
	} {
		s, err := OpenSender(test.index, test.opts)
		if err == nil || s != nil || test.want != nil && !errors.Is(err, test.want) {
			t.Errorf("%+v: %v", test, err)
		}
	}
	if after := labtest.Held(); after != before {
		t.Errorf("holds %+v, want %+v", after, before)
	}
}

func TestSenderClosed(t *testing.T) {
	b := newBench(t)
	sender := openSender(t, b.relay, "out", SenderOptions{})
	for range 2 {
		if err := sender.Close(); err != nil {
			t.Error(err)
		}
	}
	if n, err := sender.Send([]Packet{{Header: frame(0, 0).Build()}}); n != 0 || err != unix.EBADF {
		t.Errorf("sent %d, %v", n, err)
	}
	if _, err := sender.Wait(0); err != nil && !errors.Is(err, unix.EBADF) {
		t.Error(err)
	}
}

// newTun makes a tun device that is up, and returns the other end.
func newTun(t *testing.T, h *lab.Host, name string) *os.File {
	t.Helper()
	var file *os.File
	labtest.Do(t, h, func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		request, err := unix.NewIfreq(name)
		if err == nil {
			request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
		}
		if err != nil {
			unix.Close(fd)
			return err
		}
		file = os.NewFile(uintptr(fd), name)
		return nil
	})
	t.Cleanup(func() { file.Close() })
	setUp(t, h, name, true)
	return file
}

// l3 is a packet without an Ethernet header, as on a tun device.
func l3(f packet.Frame, v6 bool) []byte {
	if v6 {
		f.Src, f.Dst = netip.MustParseAddr("fd00::1"), netip.MustParseAddr("ff3e::1")
	}
	return f.Build()[etherLen:]
}

// Packets sent to a device without an Ethernet header are read back byte for byte:
// addresses, both ports, identification, TTL, DSCP and checksums.
func TestTunOutput(t *testing.T) {
	h := labtest.Host(t, "tun")
	file := newTun(t, h, "tun0")
	sender := openSender(t, h, "tun0", SenderOptions{})
	if sender.Ethernet() {
		t.Error("a tun device is said to have an Ethernet header")
	}
	var packets []Packet
	var want [][]byte
	for i := range 50 {
		f := frame(i%3, i)
		f.SrcPort, f.TTL, f.TOS = uint16(i+1), uint8(i+1), uint8(i<<2)
		data := l3(f, i%2 == 1)
		if i%2 == 0 {
			data[4], data[5] = 0x12, byte(i) // the identification, and the sum made good
			data[10], data[11] = 0, 0
			check := ^fold(sum(data[:ip4Len]))
			data[10], data[11] = byte(check>>8), byte(check)
		}
		cut := 20 * (i % 3)
		packets = append(packets, Packet{Header: data[:cut], Payload: data[cut:]})
		want = append(want, data)
	}
	if n, err := sender.Send(packets); n != len(packets) || err != nil {
		t.Fatalf("sent %d, %v", n, err)
	}
	if err := file.SetReadDeadline(time.Now().Add(labtest.Timeout)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 2000)
	for i := 0; i < len(want); {
		n, err := file.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := packet.Parse(append(ethernet(buf[:n]), buf[:n]...)); !ok {
			continue // the host's own
		}
		if !bytes.Equal(buf[:n], want[i]) {
			t.Fatalf("packet %d:\n got %x\nwant %x", i, buf[:n], want[i])
		}
		i++
	}
	long := frame(0, 0)
	long.Payload = make([]byte, 1473)
	if n, err := sender.Send([]Packet{{Header: l3(long, false)}}); n != 0 || err != unix.EMSGSIZE {
		t.Errorf("a long packet: sent %d, %v", n, err)
	}
	if err := file.Close(); err != nil { // which deletes the device
		t.Fatal(err)
	}
	if n, err := sender.Send(packets); n != 0 || err != unix.ENXIO {
		t.Errorf("the device is gone: sent %d, %v", n, err)
	}
}

// ethernet is the header that packet.Parse requires before an IP packet.
func ethernet(ip []byte) []byte {
	header := make([]byte, etherLen)
	header[12], header[13] = 0x08, 0x00
	if ip[0]>>4 == 6 {
		header[12], header[13] = 0x86, 0xdd
	}
	return header
}

func TestTunInput(t *testing.T) {
	h := labtest.Host(t, "tun")
	file := newTun(t, h, "tun0")
	g := openGroup(t, h, "tun0", modeOptions(t, ModeEBPF, 2))
	if g.Ethernet() {
		t.Error("a tun device is said to have an Ethernet header")
	}
	c := collect(t, g)
	want := map[string]bool{}
	for i := range 50 {
		data := l3(frame(i%3, i), i%2 == 1)
		if _, err := file.Write(data); err != nil {
			t.Fatal(err)
		}
		want[string(data)] = true
	}
	labtest.Eventually(t, "all have come, each once", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		n := 0
		for _, f := range c.frames {
			if want[string(f.Data)] {
				n++
			}
		}
		return n == len(want)
	})
}
