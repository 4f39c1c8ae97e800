package traffic

import (
	"errors"
	"fmt"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrNoInterface is matched by the error for an interface that does not exist in the network
// namespace.
var ErrNoInterface = errors.New("no such interface in this network namespace")

// openUDP opens a non-blocking UDP socket of the family of addr that only uses the interface, and
// returns it with the interface's index. The caller closes it.
//
// The socket is bound to the device, because not every check in the stack considers the interface:
// an IPv6 membership on one interface accepts the group on all of them, and a unicast address
// answers on all of them.
func openUDP(addr netip.Addr, ifname string) (fd int, ifindex uint32, err error) {
	family := unix.AF_INET
	if addr.Is6() {
		family = unix.AF_INET6
	}
	fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_UDP)
	if err != nil {
		return -1, 0, fmt.Errorf("udp socket: %w", err)
	}
	if ifindex, err = bindDevice(fd, ifname); err != nil {
		unix.Close(fd)
		return -1, 0, err
	}
	return fd, ifindex, nil
}

func bindDevice(fd int, ifname string) (ifindex uint32, err error) {
	ifr, err := unix.NewIfreq(ifname)
	if err != nil {
		return 0, fmt.Errorf("interface %q: %w", ifname, err)
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr); err != nil {
		if errors.Is(err, unix.ENODEV) {
			err = ErrNoInterface
		}
		return 0, fmt.Errorf("interface %q: %w", ifname, err)
	}
	if err := unix.BindToDevice(fd, ifname); err != nil {
		return 0, fmt.Errorf("bind to interface %q: %w", ifname, err)
	}
	return ifr.Uint32(), nil
}

// option is one integer socket option, with the name for errors.
type option struct {
	name       string
	level, opt int
	value      int
}

func setOptions(fd int, options []option) error {
	for _, o := range options {
		if err := unix.SetsockoptInt(fd, o.level, o.opt, o.value); err != nil {
			return fmt.Errorf("set %s to %d: %w", o.name, o.value, err)
		}
	}
	return nil
}

// setBuffer sets the size of a socket buffer in bytes and returns what the kernel granted.
// Exceeding net.core.rmem_max or wmem_max requires CAP_NET_ADMIN; otherwise the size is clamped.
// The kernel doubles the value for its own overhead and reports the double (socket(7)); this
// returns half of that.
func setBuffer(fd, force, plain, size int) (granted int, err error) {
	err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, size)
	if errors.Is(err, unix.EPERM) {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, plain, size)
	}
	if err != nil {
		return 0, fmt.Errorf("set socket buffer to %d bytes: %w", size, err)
	}
	granted, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, plain)
	if err != nil {
		return 0, fmt.Errorf("read socket buffer size: %w", err)
	}
	return granted / 2, nil
}

// sockaddr returns the address for bind. An IPv6 address carries the interface; the kernel uses it
// only for link-local scope.
func sockaddr(addr netip.AddrPort, ifindex uint32) unix.Sockaddr {
	if addr.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16(), ZoneId: ifindex}
}

// rawSockaddr is sockaddr in the kernel's format, with its length. An IPv4 address takes the first
// part of the memory.
func rawSockaddr(addr netip.AddrPort, ifindex uint32) (raw unix.RawSockaddrInet6, size uint32) {
	port := addr.Port()
	bigEndian := [2]byte{byte(port >> 8), byte(port)}
	if addr.Addr().Is4() {
		in4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(&raw))
		in4.Family = unix.AF_INET
		in4.Port = *(*uint16)(unsafe.Pointer(&bigEndian))
		in4.Addr = addr.Addr().As4()
		return raw, unix.SizeofSockaddrInet4
	}
	raw.Family = unix.AF_INET6
	raw.Port = *(*uint16)(unsafe.Pointer(&bigEndian))
	raw.Addr = addr.Addr().As16()
	raw.Scope_id = ifindex
	return raw, unix.SizeofSockaddrInet6
}

// addrPort is the inverse of rawSockaddr, without the interface; the zero value for another family.
func addrPort(raw *unix.RawSockaddrInet6) netip.AddrPort {
	bigEndian := (*[2]byte)(unsafe.Pointer(&raw.Port))
	port := uint16(bigEndian[0])<<8 | uint16(bigEndian[1])
	switch raw.Family {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(raw)).Addr), port)
	case unix.AF_INET6:
		return netip.AddrPortFrom(netip.AddrFrom16(raw.Addr), port)
	}
	return netip.AddrPort{}
}

// sockaddrStorage is struct sockaddr_storage of include/uapi/linux/socket.h:
// 128 bytes, aligned like a pointer.
type sockaddrStorage struct {
	_    [0]uintptr
	data [128]byte
}

func storage(addr netip.Addr) sockaddrStorage {
	var s sockaddrStorage
	raw, _ := rawSockaddr(netip.AddrPortFrom(addr, 0), 0)
	*(*unix.RawSockaddrInet6)(unsafe.Pointer(&s)) = raw
	return s
}

// groupReq and groupSourceReq are struct group_req and group_source_req of
// include/uapi/linux/in.h (RFC 3678, section 5).
type groupReq struct {
	ifindex uint32
	group   sockaddrStorage
}

type groupSourceReq struct {
	ifindex uint32
	group   sockaddrStorage
	source  sockaddrStorage
}

// join makes the socket a member of the subscription's group. The membership ends with the socket.
func join(fd int, sub Subscription, ifindex uint32) error {
	group := sub.Addr.Addr()
	level := unix.IPPROTO_IP
	if group.Is6() {
		level = unix.IPPROTO_IPV6
	}
	var err error
	if sub.Source.IsValid() {
		req := groupSourceReq{ifindex: ifindex, group: storage(group), source: storage(sub.Source)}
		err = setsockopt(fd, level, unix.MCAST_JOIN_SOURCE_GROUP, unsafe.Pointer(&req), unsafe.Sizeof(req))
	} else {
		req := groupReq{ifindex: ifindex, group: storage(group)}
		err = setsockopt(fd, level, unix.MCAST_JOIN_GROUP, unsafe.Pointer(&req), unsafe.Sizeof(req))
	}
	if err != nil {
		return fmt.Errorf("join %s on %s: %w", group, sub.Interface, err)
	}
	return nil
}

func setsockopt(fd, level, opt int, value unsafe.Pointer, size uintptr) error {
	_, _, errno := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(opt), uintptr(value), size, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// socketDrops reads the socket's drop counter (SK_MEMINFO_DROPS), which wraps.
func socketDrops(fd int) (uint32, error) {
	var info [unix.SK_MEMINFO_DROPS + 1]uint32
	size := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return 0, fmt.Errorf("read socket memory information: %w", errno)
	}
	return info[unix.SK_MEMINFO_DROPS], nil
}
