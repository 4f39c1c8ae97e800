package e2e_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/packet"
)

// sendFrom sends datagrams to a group from a plain socket of a host.
func sendFrom(t *testing.T, h *lab.Host, ifname string, to netip.AddrPort, segment int, payload []byte) {
	t.Helper()
	labtest.Do(t, h, func() error {
		l, err := h.Link(ifname)
		if err != nil {
			return err
		}
		family := unix.AF_INET
		if to.Addr().Is6() {
			family = unix.AF_INET6
		}
		fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if to.Addr().Is6() {
			err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_IF, l.Attrs().Index)
		} else {
			err = unix.SetsockoptIPMreqn(fd, unix.IPPROTO_IP, unix.IP_MULTICAST_IF, &unix.IPMreqn{Ifindex: int32(l.Attrs().Index)})
		}
		if err == nil && segment != 0 {
			err = unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT, segment)
		}
		if err != nil {
			return err
		}
		if to.Addr().Is6() {
			return unix.Sendto(fd, payload, 0, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16(), ZoneId: uint32(l.Attrs().Index)})
		}
		return unix.Sendto(fd, payload, 0, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()})
	})
}

// finished is a frame with complete checksums: a veth leaves out those that a NIC would fill in.
func finished(t *testing.T, frame []byte) []byte {
	t.Helper()
	h, ok := packet.Parse(frame)
	if !ok {
		t.Fatalf("%x is no UDP packet", frame)
	}
	packet.FillChecksums(frame, &h)
	return frame
}

// TestFromHost: packets that a socket of the relay's host sends on an interface are relayed, byte
// for byte, and also leave there. Packets that arrive there, and those the relay itself sends
// there, are not relayed.
func TestFromHost(t *testing.T) {
	n := newNetwork(t)
	n.addIPv6(t)
	in := newInstance(t, n.relay)
	in.start()
	in.mustCLI("rule", "add", "sent", "--in", "239.1.1.1:5000%in0,from=host", "--out", "239.2.2.2:6000%out0,src=keep,ttl=9", "--out", "239.2.2.3%out1,src=10.9.9.9,ttl=9")
	in.mustCLI("rule", "add", "sent6", "--in", "[ff3e:0:0:1::7]:5000%in0,from=host", "--out", "[ff3e::2]:6000%out0,src=keep,ttl=9")
	if got := in.waitState("sent", "active"); got.UsedPath != "fanout" {
		t.Fatalf("%+v", got)
	}
	if groups := igmp(t, n.relay); len(groups["in0"]) != 0 {
		t.Errorf("joined %v", groups)
	}
	source := labtest.NewTap(t, n.source, "src0")
	taps := n.taps(t, []string{"239.2.2.2:6000%out0", "239.2.2.3%out1"})
	ours := func(frame []byte) bool {
		h, ok := packet.Parse(frame)
		return ok && (h.DstPort == 5000 || h.DstPort == 6000)
	}
	collect := func(tap *labtest.Tap, count int) [][]byte { return tap.Collect(count, ours) }

	want := func(frame []byte, ifname string, r packet.Rewrite) []byte {
		r.SrcMAC, r.DstMAC = macOf(t, n.relay, ifname), packet.MulticastMAC(r.Dst)
		r.TTLMode, r.TTL = packet.TTLSet, 9
		h, _ := packet.Parse(frame)
		frame = bytes.Clone(frame)
		r.Apply(frame, &h)
		return frame
	}
	check := func(what string, got, want []byte) {
		t.Helper()
		if !bytes.Equal(got, want) {
			t.Errorf("%s:\n got  %x\n want %x", what, got, want)
		}
	}
	group := netip.MustParseAddrPort("239.1.1.1:5000")
	sendFrom(t, n.relay, "in0", group, 0, []byte("from a socket of the host"))
	left := finished(t, collect(source, 1)[0])
	check("out0", collect(taps["out0"], 1)[0], want(left, "out0", packet.Rewrite{Dst: netip.MustParseAddr("239.2.2.2"), DstPort: 6000}))
	check("out1", collect(taps["out1"], 1)[0], want(left, "out1", packet.Rewrite{Dst: netip.MustParseAddr("239.2.2.3"), DstPort: 5000, Src: netip.MustParseAddr("10.9.9.9")}))

	sendFrom(t, n.relay, "in0", netip.MustParseAddrPort("[ff3e:0:0:1::7]:5000"), 0, []byte("over IPv6"))
	left = finished(t, collect(source, 1)[0])
	check("ipv6", collect(taps["out0"], 1)[0], want(left, "out0", packet.Rewrite{Dst: netip.MustParseAddr("ff3e::2"), DstPort: 6000}))

	// Ten datagrams in one call, which stay one frame until the device; a kernel that does not describe such
	// frames to packet sockets does not make them for devices without checksum offload either.
	sent := uint64(1)
	if labtest.MergedDatagrams(t, n.relay) {
		sent += 10
		sendFrom(t, n.relay, "in0", group, 100, bytes.Repeat([]byte("0123456789"), 100))
		for i, frame := range collect(taps["out0"], 10) {
			if h, _ := packet.Parse(frame); len(frame) != 14+20+8+100 || h.DstPort != 6000 || h.Dst != netip.MustParseAddr("239.2.2.2") {
				t.Errorf("datagram %d: %x", i, frame)
			}
			check(fmt.Sprintf("checksums of datagram %d", i), frame, finished(t, bytes.Clone(frame)))
		}
	}
	eventually(t, "all are counted", func() string {
		s := in.rule("sent")
		if s.Matched.Packets != sent || s.Outputs[0].Sent.Packets != sent || s.Outputs[1].Sent.Packets != sent || len(s.Drops) != 0 {
			return fmt.Sprintf("%+v", s)
		}
		return ""
	})

	// The host sends neither arriving packets nor the relay's own copies.
	in.mustCLI("rule", "add", "arrives", "--path", "fanout", "--in", "239.1.1.1:5000%in0", "--out", "239.3.3.3:6000%out0")
	in.mustCLI("rule", "add", "copies", "--in", "239.3.3.3:6000%out0,from=host", "--out", "239.4.4.4:6000%out1")
	n.sendStream(t, 5)
	eventually(t, "the rule for what arrives has it", func() string {
		if s := in.rule("arrives"); s.Matched.Packets != 5 || s.Outputs[0].Sent.Packets != 5 {
			return fmt.Sprintf("%+v", s)
		}
		return ""
	})
	// This one arrives after any packet relayed by mistake.
	sendFrom(t, n.relay, "out0", netip.MustParseAddrPort("239.3.3.3:6000"), 0, []byte("last"))
	eventually(t, "the last packet is taken", func() string {
		if s := in.rule("copies"); s.Matched.Packets == 0 {
			return fmt.Sprintf("%+v", s)
		}
		return ""
	})
	if s := in.rule("copies"); s.Matched.Packets != 1 {
		t.Errorf("the relay took %d of its own copies for what a socket sent", s.Matched.Packets-1)
	}
	if s := in.rule("sent"); s.Matched.Packets != sent {
		t.Errorf("%d packets that arrived were taken for what a socket sent", s.Matched.Packets-sent)
	}
	{
		text := in.mustCLI("status", "-o", "json")
		var status control.Status
		if err := json.Unmarshal([]byte(text), &status); err != nil {
			t.Fatal(err)
		}
		seen := map[string]bool{}
		for _, w := range status.Workers {
			key := fmt.Sprint(w.Interface, w.Path, w.Queue)
			if seen[key] {
				t.Errorf("two workers are %s %s %d", w.Interface, w.Path, w.Queue)
			}
			seen[key] = true
		}
	}
	if text := in.mustCLI("explain", "239.1.1.1:5000%in0,from=host"); !strings.Contains(text, "rule sent takes it") {
		t.Errorf("explain says\n%s", text)
	}
	if text := in.mustCLI("explain", "239.1.1.1:5000%in0"); !strings.Contains(text, "rule arrives takes it: no other matches") {
		t.Errorf("explain says\n%s", text)
	}
}

// sendStream sends frames of the default stream.
func (n *network) sendStream(t *testing.T, count int) {
	t.Helper()
	source := labtest.NewTap(t, n.source, "src0")
	frame := packet.Frame{
		SrcMAC: macOf(t, n.source, "src0"), DstMAC: packet.MulticastMAC(netip.MustParseAddr("239.1.1.1")),
		Src: netip.MustParseAddr("10.1.0.2"), Dst: netip.MustParseAddr("239.1.1.1"), SrcPort: 4000, DstPort: 5000, TTL: 16, Payload: []byte("x"),
	}.Build()
	for range count {
		source.Send(frame)
	}
}
