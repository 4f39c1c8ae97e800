package labtest

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
)

// Link returns the named interface of the host.
func Link(t testing.TB, h *lab.Host, ifname string) netlink.Link {
	t.Helper()
	l, err := h.Link(ifname)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// Index returns the index of the named interface of the host.
func Index(t testing.TB, h *lab.Host, ifname string) int {
	t.Helper()
	return Link(t, h, ifname).Attrs().Index
}

// Running says whether the named interface of the host is up and the kernel has seen its carrier;
// frames sent before that are dropped.
func Running(h *lab.Host, ifname string) bool {
	l, err := h.Link(ifname)
	return err == nil && l.Attrs().OperState == netlink.OperUp
}

// RemoveLink deletes the named interface of the host, and a veth's peer with it.
func RemoveLink(t testing.TB, h *lab.Host, ifname string) {
	t.Helper()
	if err := h.Netlink().LinkDel(Link(t, h, ifname)); err != nil {
		t.Fatal(err)
	}
}

// Sysctl writes a setting of the host's namespace: a path below /proc/sys, such as
// net/ipv4/ip_forward.
func Sysctl(t testing.TB, h *lab.Host, path, value string) {
	t.Helper()
	Do(t, h, func() error { return os.WriteFile("/proc/sys/"+path, []byte(value), 0o644) })
}

// Listen joins a group on the named interface of the host and receives its packets there, into a
// large buffer. The socket is closed when the test ends.
func Listen(t testing.TB, h *lab.Host, ifname string, group netip.AddrPort) *net.UDPConn {
	t.Helper()
	var conn *net.UDPConn
	Do(t, h, func() error {
		i, err := net.InterfaceByName(ifname)
		if err != nil {
			return err
		}
		conn, err = net.ListenMulticastUDP("udp", i, net.UDPAddrFromAddrPort(group))
		return err
	})
	t.Cleanup(func() { conn.Close() })
	GrowBuffer(t, conn)
	return conn
}

// Tun makes a tun device in the host, with IFF_VNET_HDR or other flags besides IFF_NO_PI, and
// returns its other end: frames written there arrive on the device, and frames sent by the device
// are read there. It is closed when the test ends.
func Tun(t testing.TB, h *lab.Host, name string, flags uint16) *os.File {
	t.Helper()
	var f *os.File
	Do(t, h, func() error { // the device is in the namespace of the opening thread
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("open /dev/net/tun: %w", err)
		}
		request, err := unix.NewIfreq(name)
		if err != nil {
			return errors.Join(err, unix.Close(fd))
		}
		request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | flags)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
			return errors.Join(fmt.Errorf("make tun device %s: %w", name, err), unix.Close(fd))
		}
		f = os.NewFile(uintptr(fd), name)
		return nil
	})
	t.Cleanup(func() { f.Close() })
	return f
}
