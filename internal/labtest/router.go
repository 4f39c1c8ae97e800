package labtest

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
)

// Options of the multicast routing sockets: include/uapi/linux/mroute.h and mroute6.h. Those of
// IPv6 have the same numbers.
const (
	mrtInit   = 200
	mrtAddVIF = 202
	mrtDelVIF = 203
	mrtAddMFC = 204
	mrtDelMFC = 205
	mrtTable  = 209

	vifUseIndex = 0x8 // VIFF_USE_IFINDEX
	maxVIFs     = 32

	routeCount = 0x89e1 // SIOCGETSGCNT, and SIOCGETSGCNT_IN6
)

// Router is a scripted multicast routing daemon: it owns the kernel's multicast forwarding cache of
// one family and table of a host. Virtual interfaces are numbered in the order in which they are
// added.
type Router struct {
	t    testing.TB
	host *lab.Host
	is4  bool
	fd   int
	vifs map[string]int
}

// NewRouter becomes the routing daemon of a host; table 0 is the default one. It ends with the
// test, or with Close.
func NewRouter(t testing.TB, h *lab.Host, is4 bool, table uint32) *Router {
	t.Helper()
	r := &Router{t: t, host: h, is4: is4, fd: -1, vifs: map[string]int{}}
	Do(t, h, func() (err error) {
		family, protocol := unix.AF_INET, unix.IPPROTO_IGMP
		if !is4 {
			family, protocol = unix.AF_INET6, unix.IPPROTO_ICMPV6
		}
		if r.fd, err = unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol); err != nil {
			return err
		}
		if table != 0 {
			if err := unix.SetsockoptInt(r.fd, r.level(), mrtTable, int(table)); err != nil {
				return err
			}
		}
		return unix.SetsockoptInt(r.fd, r.level(), mrtInit, 1)
	})
	t.Cleanup(r.Close)
	return r
}

func (r *Router) level() int {
	if r.is4 {
		return unix.IPPROTO_IP
	}
	return unix.IPPROTO_IPV6
}

// Close ends the daemon: the kernel forgets its entries.
func (r *Router) Close() {
	if r.fd >= 0 {
		_ = unix.Close(r.fd)
		r.fd = -1
	}
}

func (r *Router) set(option int, value []byte) {
	r.t.Helper()
	// The socket belongs to the namespace in which it was opened, wherever it is used.
	if err := unix.SetsockoptString(r.fd, r.level(), option, string(value)); err != nil {
		r.t.Fatalf("multicast routing option %d: %v", option, err)
	}
}

// AddVIF makes an interface a virtual one, by which packets leave whose TTL exceeds a threshold.
func (r *Router) AddVIF(ifname string, threshold uint8) {
	r.t.Helper()
	index := Index(r.t, r.host, ifname)
	r.vifs[ifname] = len(r.vifs)
	vif := make([]byte, 16) // struct vifctl
	if !r.is4 {
		vif = vif[:12] // struct mif6ctl
	}
	binary.NativeEndian.PutUint16(vif, uint16(r.vifs[ifname]))
	vif[3] = threshold
	if r.is4 {
		vif[2] = vifUseIndex
		binary.NativeEndian.PutUint32(vif[8:], uint32(index))
	} else {
		binary.NativeEndian.PutUint16(vif[4:], uint16(index))
	}
	r.set(mrtAddVIF, vif)
}

// DeleteVIF takes a virtual interface away, and with it the outputs that name it.
func (r *Router) DeleteVIF(ifname string) {
	r.t.Helper()
	vif := make([]byte, 16)
	binary.NativeEndian.PutUint16(vif, uint16(r.vifs[ifname]))
	if !r.is4 {
		vif = vif[:2] // mifi_t
	}
	r.set(mrtDelVIF, vif)
	delete(r.vifs, ifname)
}

// Add adds an entry, or replaces it; an output has the threshold of its virtual interface.
func (r *Router) Add(source, group, input string, outputs map[string]uint8) {
	r.t.Helper()
	r.set(mrtAddMFC, r.entry(source, group, input, outputs))
}

// Delete removes an entry.
func (r *Router) Delete(source, group, input string) {
	r.t.Helper()
	r.set(mrtDelMFC, r.entry(source, group, input, nil))
}

// Packets is how many packets the kernel has counted for an entry, as daemons ask for it.
func (r *Router) Packets(source, group string) uint64 {
	r.t.Helper()
	s, g := netip.MustParseAddr(source).AsSlice(), netip.MustParseAddr(group).AsSlice()
	b := make([]byte, 80) // struct sioc_sg_req6: two addresses, then counters of 8 bytes
	at := 56
	if r.is4 {
		copy(b, s)
		copy(b[4:], g)
		at = 8
	} else {
		copy(b[8:], s)
		copy(b[unix.SizeofSockaddrInet6+8:], g)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(r.fd), routeCount, uintptr(unsafe.Pointer(&b[0]))); errno != 0 {
		r.t.Fatalf("count of (%s, %s): %v", source, group, errno)
	}
	return binary.NativeEndian.Uint64(b[at:])
}

// entry is struct mfcctl, or struct mf6cctl.
func (r *Router) entry(source, group, input string, outputs map[string]uint8) []byte {
	s, g := netip.MustParseAddr(source).AsSlice(), netip.MustParseAddr(group).AsSlice()
	parent := uint16(r.vifs[input])
	if r.is4 {
		b := make([]byte, 60)
		copy(b, s)
		copy(b[4:], g)
		binary.NativeEndian.PutUint16(b[8:], parent)
		for name, threshold := range outputs {
			b[10+r.vifs[name]] = threshold
		}
		return b
	}
	const sockaddr = unix.SizeofSockaddrInet6
	b := make([]byte, 2*sockaddr+4+maxVIFs)
	for at, addr := range map[int][]byte{0: s, sockaddr: g} {
		binary.NativeEndian.PutUint16(b[at:], unix.AF_INET6)
		copy(b[at+8:], addr)
	}
	binary.NativeEndian.PutUint16(b[2*sockaddr:], parent)
	var set uint32
	for name := range outputs {
		set |= 1 << r.vifs[name]
	}
	binary.NativeEndian.PutUint32(b[2*sockaddr+4:], set)
	return b
}
