package e2e_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/internal/traffic"
	"xdpcast/pkg/packet"
)

// container connects a host to the relay the way a container is connected: its frames reach the
// relay through a device of the host, without a wire. It returns the relay's interface for rule
// inputs.
type container func(t *testing.T, n *network, c *lab.Host) (input string)

func addLink(t *testing.T, h *lab.Host, l netlink.Link) {
	t.Helper()
	if err := h.Netlink().LinkAdd(l); err != nil {
		t.Fatalf("add %s: %v", l.Attrs().Name, err)
	}
}

// up gives an interface an address and sets it up.
func up(t *testing.T, h *lab.Host, name, cidr string) {
	t.Helper()
	if cidr != "" {
		if err := h.AddAddr(name, cidr); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.SetUp(name, true); err != nil {
		t.Fatal(err)
	}
}

// connectPort connects the container's eth0 to an interface of the relay, with a veth's offloads.
func connectPort(t *testing.T, n *network, c *lab.Host, name, relayAddr string) {
	t.Helper()
	end := lab.End{Host: n.relay, Name: name}
	if relayAddr != "" {
		end.Addrs = []string{relayAddr}
	}
	labtest.Connect(t, end, lab.End{Host: c, Name: "eth0", Addrs: []string{"10.9.0.2/24"}})
	offload(t, c, "eth0", true)
	offload(t, n.relay, name, true)
}

func offload(t *testing.T, h *lab.Host, name string, on bool) {
	t.Helper()
	labtest.Do(t, h, func() error { return lab.SetTxChecksum(name, on) })
}

var containers = map[string]container{
	"tun": connectTun,
	"veth": func(t *testing.T, n *network, c *lab.Host) string {
		connectPort(t, n, c, "veth0", "10.9.0.1/24")
		return "veth0"
	},
	"bridge": func(t *testing.T, n *network, c *lab.Host) string {
		connectPort(t, n, c, "veth0", "")
		addLink(t, n.relay, &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}})
		member, err := n.relay.Link("veth0")
		if err != nil {
			t.Fatal(err)
		}
		bridge, err := n.relay.Link("br0")
		if err != nil {
			t.Fatal(err)
		}
		if err := n.relay.Netlink().LinkSetMaster(member, bridge); err != nil {
			t.Fatal(err)
		}
		up(t, n.relay, "br0", "10.9.0.1/24")
		return "br0"
	},
	"macvlan": func(t *testing.T, n *network, c *lab.Host) string {
		labtest.Connect(t, lab.End{Host: n.relay, Name: "par0"}, lab.End{Host: labtest.Host(t, "switch"), Name: "par0"})
		offload(t, n.relay, "par0", true)
		parent, err := n.relay.Link("par0")
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"mv0", "eth0"} {
			addLink(t, n.relay, &netlink.Macvlan{LinkAttrs: netlink.LinkAttrs{Name: name, ParentIndex: parent.Attrs().Index}, Mode: netlink.MACVLAN_MODE_BRIDGE})
		}
		moved, err := n.relay.Link("eth0")
		if err == nil {
			err = n.relay.Netlink().LinkSetNsFd(moved, c.FD())
		}
		if err != nil {
			t.Fatal(err)
		}
		up(t, n.relay, "mv0", "10.9.0.1/24")
		up(t, c, "eth0", "10.9.0.2/24")
		return "mv0"
	},
	"vxlan": func(t *testing.T, n *network, c *lab.Host) string {
		labtest.Connect(t, lab.End{Host: n.relay, Name: "under0", Addrs: []string{"10.8.0.1/24"}}, lab.End{Host: c, Name: "under0", Addrs: []string{"10.8.0.2/24"}})
		for _, h := range []*lab.Host{n.relay, c} {
			offload(t, h, "under0", true)
			l, err := h.Link("under0")
			if err != nil {
				t.Fatal(err)
			}
			name, remote, addr := "vx0", "10.8.0.2", "10.9.0.1/24"
			if h == c {
				name, remote, addr = "eth0", "10.8.0.1", "10.9.0.2/24"
			}
			addLink(t, h, &netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: name, MTU: 1450}, VxlanId: 7, VtepDevIndex: l.Attrs().Index, Group: net.ParseIP(remote), Port: 4789})
			up(t, h, name, addr)
		}
		return "vx0"
	},
}

// openTun opens a tun device whose packets carry their sender's pending offloads, as between a
// virtual machine or a VPN process and the kernel.
func openTun(t *testing.T, h *lab.Host, name string) *os.File {
	t.Helper()
	f := labtest.Tun(t, h, name, unix.IFF_VNET_HDR)
	raw, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var fault error
	err = raw.Control(func(fd uintptr) {
		// Unsegmented datagrams are accepted since Linux 6.2.
		if unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_USO4|unix.TUN_F_USO6) != nil {
			fault = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, unix.TUN_F_CSUM)
		}
	})
	if err := errors.Join(err, fault); err != nil {
		t.Fatal(err)
	}
	return f
}

// connectTun connects the container's eth0 to tun0 of the relay, both without Ethernet header.
func connectTun(t *testing.T, n *network, c *lab.Host) string {
	from, to := openTun(t, c, "eth0"), openTun(t, n.relay, "tun0")
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		packet := make([]byte, 1<<17)
		for {
			length, err := from.Read(packet)
			if err != nil {
				return
			}
			_, _ = to.Write(packet[:length]) // an error is a lost packet, which the test detects
		}
	}()
	t.Cleanup(func() {
		from.Close()
		<-copied
		to.Close()
	})
	up(t, n.relay, "tun0", "10.9.0.1/24")
	up(t, c, "eth0", "10.9.0.2/24")
	return "tun0"
}

// datagrams is the number each sender sends, and their length. That many fit the queues on their way.
const (
	datagrams   = 40
	datagramLen = 1000
)

// sendSegments sends ten datagrams in one call, ten times (UDP_SEGMENT, udp(7)).
func sendSegments(fd int, to *unix.SockaddrInet4) error {
	control := make([]byte, unix.CmsgSpace(2))
	header := control[:unix.CmsgLen(0)]
	binary.NativeEndian.PutUint64(header, uint64(unix.CmsgLen(2)))
	binary.NativeEndian.PutUint32(header[8:], unix.SOL_UDP)
	binary.NativeEndian.PutUint32(header[12:], unix.UDP_SEGMENT)
	binary.NativeEndian.PutUint16(control[unix.CmsgLen(0):], datagramLen)
	for range datagrams / 10 {
		if _, err := unix.SendmsgN(fd, make([]byte, 10*datagramLen), control, to, 0); err != nil {
			return fmt.Errorf("send segments: %w", err)
		}
	}
	return nil
}

func sendPlain(fd int, to *unix.SockaddrInet4) error {
	for range datagrams {
		if err := unix.Sendto(fd, make([]byte, datagramLen), 0, to); err != nil {
			return fmt.Errorf("send: %w", err)
		}
	}
	return nil
}

// sendMany sends all in one call (sendmmsg(2)).
func sendMany(fd int, to *unix.SockaddrInet4) error {
	type message struct { // struct mmsghdr
		header unix.Msghdr
		sent   uint32
	}
	name := unix.RawSockaddrInet4{Family: unix.AF_INET, Port: uint16(to.Port>>8 | to.Port<<8), Addr: to.Addr}
	payload := make([]byte, datagramLen)
	piece := unix.Iovec{Base: &payload[0]}
	piece.SetLen(len(payload))
	messages := make([]message, datagrams)
	for i := range messages {
		messages[i].header = unix.Msghdr{Name: (*byte)(unsafe.Pointer(&name)), Namelen: unix.SizeofSockaddrInet4, Iov: &piece}
		messages[i].header.SetIovlen(1)
	}
	for left := messages; len(left) > 0; {
		sent, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&left[0])), uintptr(len(left)), 0, 0, 0)
		if errno != 0 {
			return fmt.Errorf("sendmmsg: %w", errno)
		}
		left = left[sent:]
	}
	return nil
}

// sendFromPort opens a socket on an interface of a host and sends to port 5000 of the group.
func sendFromPort(t *testing.T, c *lab.Host, ifname, group string, fn func(int, *unix.SockaddrInet4) error) {
	t.Helper()
	labtest.Do(t, c, func() error {
		i, err := net.InterfaceByName(ifname)
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		mreq := unix.IPMreqn{Ifindex: int32(i.Index)}
		if err := errors.Join(unix.SetsockoptIPMreqn(fd, unix.IPPROTO_IP, unix.IP_MULTICAST_IF, &mreq), unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MULTICAST_TTL, 8)); err != nil {
			return err
		}
		to := &unix.SockaddrInet4{Port: 5000, Addr: netip.MustParseAddr(group).As4()}
		return fn(fd, to)
	})
}

// arrive reads a number of datagrams of the right length, and returns how many arrived.
func arrive(t *testing.T, c net.PacketConn, want int) (n int) {
	t.Helper()
	buffer := make([]byte, 65536)
	for n < want {
		if err := c.SetReadDeadline(time.Now().Add(labtest.Timeout)); err != nil {
			t.Fatal(err)
		}
		length, _, err := c.ReadFrom(buffer)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return n
		}
		if err != nil {
			t.Fatal(err)
		}
		if length != datagramLen {
			t.Errorf("a datagram of %d bytes arrived, want %d", length, datagramLen)
		}
		n++
	}
	return n
}

// Whatever a container's sockets and devices leave to offloads - checksums, segmentation of
// datagrams - path auto chooses a path that does it, with one output and with two.
func TestSendersOfThisHost(t *testing.T) {
	for kind, connect := range containers {
		t.Run(kind, func(t *testing.T) {
			n := newNetwork(t)
			in := newInstance(t, n.relay)
			c := labtest.Host(t, "cont")
			input := connect(t, n, c)
			in.start()
			number := 0
			for _, s := range []struct {
				name    string
				offload bool
				send    func(int, *unix.SockaddrInet4) error
			}{{"plain", true, sendPlain}, {"plain without offload", false, sendPlain}, {"segments", true, sendSegments}, {"sendmmsg", true, sendMany}} {
				for outputs := 1; outputs <= 2; outputs++ {
					number++
					group := fmt.Sprintf("239.6.1.%d", number)
					var outs []string
					var sinks []net.PacketConn
					for o := range outputs {
						to := netip.AddrPortFrom(netip.AddrFrom4([4]byte{239, 7, byte(number), byte(o)}), 6000)
						outs = append(outs, fmt.Sprintf("%s%%out%d", to, o))
						sinks = append(sinks, labtest.Listen(t, n.sinks[o], "sink0", to))
					}
					if kind != "macvlan" { // a macvlan has the offloads of its parent
						offload(t, c, "eth0", s.offload)
					}
					name := fmt.Sprintf("r%d", number)
					in.add(name, group+":5000%"+input, outs...)
					in.waitState(name, control.StateActive)
					sendFromPort(t, c, "eth0", group, s.send)
					for o, sink := range sinks {
						if got := arrive(t, sink, datagrams); got != datagrams {
							t.Errorf("%s, %d outputs: %d of %d arrived at output %d: %+v", s.name, outputs, got, datagrams, o, in.rule(name))
						}
					}
					var r control.RuleStatus
					eventually(t, "all are counted", func() string { // after they have left
						r = in.rule(name)
						return sumFault(r)
					})
					if want := map[string]string{"veth": "kernel"}[kind]; want != "" && r.UsedPath != want {
						t.Errorf("%s: path %s, want %s", s.name, r.UsedPath, want)
					}
				}
			}
			if kind == "macvlan" {
				in.add("parent", "239.6.2.1:5000%in0", "239.7.200.1:6000%par0,src=keep")
				if text := in.mustCLI("explain", "parent"); !strings.Contains(text, "do not reach the devices on it: to reach mv0") {
					t.Errorf("explain says\n%s, want that the parent does not reach mv0", text)
				}
			}
			why := in.mustCLI("explain", "r1")
			reason := map[string]string{"veth": "", "tun": "has no Ethernet header"}
			want, ok := reason[kind]
			if !ok {
				want = "carries packets of senders on this host"
			}
			if !strings.Contains(why, want) {
				t.Errorf("explain says\n%s, want why it is path fanout", why)
			}
		})
	}
}

// A packet that would match a rule but is truncated is reported by stats, rule show and explain, on
// every path.
func TestMalformedIsTold(t *testing.T) {
	for _, path := range []string{"kernel", "afxdp", "fanout"} {
		t.Run(path, func(t *testing.T) {
			n := newNetwork(t)
			in := newInstance(t, n.relay)
			in.start()
			in.mustCLI("rule", "add", "m", "--path", path, "--in", "239.9.1.1:5000%in0", "--out", "239.9.2.1:6000%out0")
			in.waitState("m", control.StateActive)
			group := netip.MustParseAddr("239.9.1.1")
			f := packet.Frame{
				DstMAC: packet.MulticastMAC(group), SrcMAC: [6]byte{2, 0, 0, 0, 0, 1}, Src: netip.MustParseAddr("10.1.0.2"), Dst: group,
				SrcPort: 4000, DstPort: 5000, TTL: 8, Payload: []byte("payload"),
			}
			frame := f.Build()
			binary.BigEndian.PutUint16(frame[38:], 2000) // the length of the datagram
			labtest.NewTap(t, n.source, "src0").Send(frame)
			for _, command := range [][]string{{"stats"}, {"stats", "m"}, {"rule", "show", "m"}, {"explain", "m"}} {
				eventually(t, strings.Join(command, " ")+" tells", func() string {
					if text := in.mustCLI(command...); !strings.Contains(text, "malformed") {
						return text
					}
					return ""
				})
			}
			if r := in.rule("m"); r.Matched.Packets != 0 {
				t.Errorf("%d packets matched", r.Matched.Packets)
			}
		})
	}
}

// Processes of the relay's host that send to each other reach each other whatever rules the
// interface has.
func TestLocalTrafficOfTheRelay(t *testing.T) {
	onPaths(t, func(t *testing.T, n *network, in *instance, path string) {
		in.mustCLI("rule", "add", "l", "--path", path, "--in", "239.9.1.1:5000%in0", "--out", "239.9.2.1:6000%out0")
		in.waitState("l", control.StateActive)
		c := labtest.Listen(t, n.relay, "in0", netip.MustParseAddrPort("239.9.1.1:5000"))
		sendFromPort(t, n.relay, "in0", "239.9.1.1", sendPlain)
		if got := arrive(t, c, datagrams); got != datagrams {
			t.Errorf("%d of %d arrived", got, datagrams)
		}
		if r := in.rule("l"); r.Matched.Packets != 0 {
			t.Errorf("the rule matched %d", r.Matched.Packets)
		}
	})
}

// An output without carrier waits, and drops for that reason on every path.
func TestNoCarrier(t *testing.T) {
	const packets = 20
	onPaths(t, func(t *testing.T, n *network, in *instance, path string) {
		in.mustCLI("rule", "add", "r", "--path", path, "--in", "239.1.1.1:5000%in0", "--out", "239.2.1.1:6000%out0", "--out", "239.2.1.2:6000%out1")
		in.waitState("r", control.StateActive)
		if err := n.sinks[0].SetUp("sink0", false); err != nil {
			t.Fatal(err)
		}
		in.waitOutput("r", 0, control.StatePending, "interface out0 has no carrier")
		sink := receive(t, n.sinks[1], "239.2.1.2:6000%sink0", traffic.Expected{})
		send(t, n.source, traffic.SendConfig{Target: target(t, "239.1.1.1:5000%src0"), TTL: 8, Count: packets}).wait()
		sink.wait(packets)
		eventually(t, "all are counted", func() string { return sumFault(in.rule("r")) })
		r := in.rule("r")
		if o := r.Outputs[0]; o.Sent.Packets != 0 || packetsFor(o.Drops, "no_carrier") != packets || len(o.Drops) != 1 {
			t.Errorf("output without carrier: %+v", o)
		}
		if o := r.Outputs[1]; o.Sent.Packets != packets || len(o.Drops) != 0 {
			t.Errorf("the other output: %+v", o)
		}
		if s, err := in.client.Stats(t.Context()); err != nil || len(s.TransmitDrops) > 0 {
			t.Errorf("%v: what devices did not take: %+v, want none", err, s.TransmitDrops)
		}
		if err := n.sinks[0].SetUp("sink0", true); err != nil {
			t.Fatal(err)
		}
		in.waitOutput("r", 0, control.StateActive, "")
	})
}
