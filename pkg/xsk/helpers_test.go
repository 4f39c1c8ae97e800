package xsk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

const (
	xdpPass    = 2
	rxQueue    = 16 // offset of rx_queue_index in struct xdp_md
	etherType  = 0x88b5
	headerLen  = 14
	allOfThem  = 1 << 16
	batchOfAll = 256
)

// newHost makes a host whose stack sends nothing by itself.
func newHost(t testing.TB, prefix string) *lab.Host {
	t.Helper()
	h := labtest.Host(t, prefix)
	labtest.Sysctl(t, h, "net/ipv6/conf/default/disable_ipv6", "1")
	return h
}

// pair is a veth between two hosts; both ends are called eth0.
func pair(t testing.TB, mtu, queues int) (a, b *lab.Host) {
	t.Helper()
	a, b = newHost(t, "xska"), newHost(t, "xskb")
	connect(t, a, "eth0", b, "eth0", mtu, queues)
	return a, b
}

func connect(t testing.TB, a *lab.Host, aName string, b *lab.Host, bName string, mtu, queues int) {
	t.Helper()
	if err := lab.Connect(lab.End{Host: a, Name: aName, Queues: queues}, lab.End{Host: b, Name: bName, Queues: queues}, mtu); err != nil {
		t.Fatal(err)
	}
}

func makeUMEM(t testing.TB, opts UMEMOptions) (*UMEM, *Frames) {
	t.Helper()
	opts.CheckOwnership = true
	return makeUMEMAsIs(t, opts)
}

// makeUMEMAsIs assigns all frames to one owner, and verifies at the end of the test
// that each was accounted for once.
func makeUMEMAsIs(t testing.TB, opts UMEMOptions) (*UMEM, *Frames) {
	t.Helper()
	u, err := NewUMEM(opts)
	if err != nil {
		t.Fatal(err)
	}
	f, err := u.NewFrames(opts.Frames)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Verify(); err != nil {
			t.Error(err)
		}
		if err := u.Close(); err != nil {
			t.Error(err)
		}
	})
	return u, f
}

// needsMultiBuffer skips a test whose packets have several frames.
func needsMultiBuffer(t testing.TB) {
	t.Helper()
	labtest.NeedsKernel(t, labtest.MultiBufferSockets(t), "packets of several frames in AF_XDP sockets", "6.6")
}

// needsBudget skips a test that sets a TXBudget other than the kernel's default.
func needsBudget(t testing.TB, budget int) {
	t.Helper()
	if budget != 0 {
		labtest.NeedsKernel(t, labtest.TXBudget(t), "XDP_MAX_TX_SKB_BUDGET", "6.17")
	}
}

// openOn opens a socket inside a host. It retries, since the kernel releases a queue a
// moment after its last socket was closed.
func openOn(t testing.TB, h *lab.Host, name string, f *Frames, queue int, opts Options) *Socket {
	t.Helper()
	index := labtest.Index(t, h, name)
	var s *Socket
	labtest.Eventually(t, "the queue is free", func() bool {
		err := h.Do(func() (err error) {
			s, err = Open(f, index, queue, opts)
			return err
		})
		if err != nil && !errors.Is(err, unix.EBUSY) {
			t.Fatal(err)
		}
		return err == nil
	})
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// redirect attaches a program that redirects every frame to the socket of its queue, and
// passes frames of queues without one. It accepts packets of several buffers.
func redirect(t testing.TB, h *lab.Host, name string, sockets ...*Socket) {
	t.Helper()
	index := labtest.Index(t, h, name)
	xsks, err := ebpf.NewMap(&ebpf.MapSpec{Name: "xsks", Type: ebpf.XSKMap, KeySize: 4, ValueSize: 4, MaxEntries: 64})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { xsks.Close() })
	for _, s := range sockets {
		if err := xsks.Put(uint32(s.Queue()), uint32(s.FD())); err != nil {
			t.Fatal(err)
		}
	}
	attach(t, h, index, asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, rxQueue, asm.Word),
		asm.LoadMapPtr(asm.R1, xsks.FD()),
		asm.Mov.Imm(asm.R3, xdpPass),
		asm.FnRedirectMap.Call(),
		asm.Return(),
	})
}

func attach(t testing.TB, h *lab.Host, index int, code asm.Instructions) {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, Flags: unix.BPF_F_XDP_HAS_FRAGS, License: "GPL", Instructions: code})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	var l link.Link
	labtest.Do(t, h, func() (err error) {
		l, err = link.AttachXDP(link.XDPOptions{Program: p, Interface: index, Flags: link.XDPDriverMode})
		return err
	})
	t.Cleanup(func() { l.Close() })
}

// frame is an Ethernet frame of a size, with its own number and payload.
func frame(number uint32, size int) []byte {
	f := make([]byte, size)
	copy(f, []byte{0x01, 0x00, 0x5e, 1, 2, 3, 0x02, 0, 0, 0, 0, 1})
	binary.BigEndian.PutUint16(f[12:], etherType)
	binary.BigEndian.PutUint32(f[headerLen:], number)
	for i := headerLen + 4; i < size; i++ {
		f[i] = byte(i*7 + int(number)*13)
	}
	return f
}

// ours are the frames that tests send, not those of the hosts' stacks.
func ours(f []byte) bool {
	return len(f) >= headerLen && binary.BigEndian.Uint16(f[12:]) == etherType
}

// receive returns the next n packets that tests have sent, and fills the fill ring.
func receive(t testing.TB, s *Socket, n int) (packets [][]byte) {
	t.Helper()
	var descs [batchOfAll]Desc
	var packet []byte
	labtest.Eventually(t, "the packets are received", func() bool {
		got := descs[:s.Receive(descs[:])]
		for _, d := range got {
			packet = append(packet, s.frames.umem.Data(d)...)
			if d.Options&Continued != 0 {
				continue
			}
			if ours(packet) {
				packets = append(packets, packet)
			}
			packet = nil
		}
		s.frames.ReleaseAll(got)
		s.Fill(allOfThem)
		return len(packets) >= n
	})
	if len(packets) != n {
		t.Fatalf("received %d packets: want %d", len(packets), n)
	}
	return packets
}

// write puts a packet into new frames, each but the last filled with up to size bytes.
func write(t testing.TB, f *Frames, packet []byte, size int) (descs []Desc) {
	t.Helper()
	for len(packet) > 0 {
		addr, ok := f.Get()
		if !ok {
			t.Fatal("no free frame")
		}
		n := copy(f.umem.Frame(addr)[:size], packet)
		packet = packet[n:]
		d := Desc{Addr: addr, Len: uint32(n)}
		if len(packet) > 0 {
			d.Options = Continued
		}
		descs = append(descs, d)
	}
	return descs
}

// send sends all descriptors, retrying as often as necessary.
func send(t testing.TB, s *Socket, descs []Desc) {
	t.Helper()
	labtest.Eventually(t, "all is sent", func() bool {
		n, err := s.Send(descs)
		if err != nil {
			t.Fatal(err)
		}
		descs = descs[n:]
		flush(t, s)
		return len(descs) == 0 && s.Unsent() == 0
	})
}

func flush(t testing.TB, s *Socket) {
	t.Helper()
	if err := s.Flush(); err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.ENOBUFS) {
		t.Fatal(err)
	}
}

func completeAll(t testing.TB, s *Socket) {
	t.Helper()
	labtest.Eventually(t, "all is completed", func() bool {
		s.Complete(allOfThem)
		return s.Outstanding() == 0
	})
}

func equal(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		t.Fatalf("%s:\ngot  %d bytes % x\nwant %d bytes % x", what, len(got), got[:min(len(got), 64)], len(want), want[:min(len(want), 64)])
	}
}

// connectUneven makes eth0 of a host with two receive queues and one transmit queue.
func connectUneven(host, peer *lab.Host) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.NumRxQueues, attrs.NumTxQueues = "eth0", 2, 1
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNumRxQueues: 1, PeerNumTxQueues: 2, PeerNamespace: netlink.NsFd(peer.FD())}
	if err := host.Netlink().LinkAdd(veth); err != nil {
		return err
	}
	return errors.Join(host.SetUp("eth0", true), peer.SetUp("eth0", true))
}
