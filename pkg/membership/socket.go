package membership

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// System is the system calls that a [Manager] makes. Tests inject faults; everything else uses
// [Kernel]. A manager never calls its methods concurrently.
type System interface {
	// Socket opens an unbound UDP socket of the family, AF_INET or AF_INET6, in the network
	// namespace of the calling thread, with close-on-exec.
	Socket(family int) (fd int, err error)
	// Setsockopt is setsockopt(2).
	Setsockopt(fd, level, option int, value []byte) error
	// Getsockopt is getsockopt(2): value passes the request and receives the answer of n bytes.
	Getsockopt(fd, level, option int, value []byte) (n int, err error)
	// InterfaceName returns the name of the interface with this index in the
	// socket's network namespace, ENODEV if there is none.
	InterfaceName(fd, index int) (string, error)
	// Close closes a socket. The descriptor is closed even if it returns an error.
	Close(fd int) error
}

// Kernel returns the System that calls the kernel.
func Kernel() System { return kernel{} }

type kernel struct{}

func (kernel) Socket(family int) (int, error) {
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.IPPROTO_UDP)
	if err != nil {
		return -1, err
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	// The kernel assigns the lowest free number: all lower ones are in use.
	if kept := reserve(limit.Cur); uint64(fd) >= limit.Cur-kept {
		return -1, errors.Join(fmt.Errorf("%w: the last %d of %d file descriptors are kept for rules and requests (raise the limit: ulimit -n, or LimitNOFILE= of the service)",
			unix.EMFILE, kept, limit.Cur), unix.Close(fd))
	}
	return fd, nil
}

// reserve is how many of limit file descriptors helper sockets leave to the rest of the process.
func reserve(limit uint64) uint64 { return min(max(limit/4, 16), 256, limit) }

func (kernel) Setsockopt(fd, level, option int, value []byte) error {
	return unix.SetsockoptString(fd, level, option, string(value))
}

func (kernel) Getsockopt(fd, level, option int, value []byte) (int, error) {
	length := uint32(len(value))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(unsafe.SliceData(value))), uintptr(unsafe.Pointer(&length)), 0)
	if errno != 0 {
		return 0, errno
	}
	return int(length), nil
}

func (kernel) InterfaceName(fd, index int) (string, error) {
	request, err := unix.NewIfreq("")
	if err != nil {
		return "", err
	}
	request.SetUint32(uint32(index))
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFNAME, request); err != nil {
		return "", err
	}
	return request.Name(), nil
}

func (kernel) Close(fd int) error { return unix.Close(fd) }

// family is AF_INET or AF_INET6.
type family int

func (f family) String() string {
	if f == unix.AF_INET {
		return "IPv4"
	}
	return "IPv6"
}

// level is the protocol level of the MCAST_ options.
func (f family) level() int {
	if f == unix.AF_INET {
		return unix.IPPROTO_IP
	}
	return unix.IPPROTO_IPV6
}

// Sizes of struct group_req and struct group_source_req of RFC 3678 section 5.1 and
// include/uapi/linux/in.h. Both begin with a 32-bit interface index; the addresses that follow are
// aligned like pointers.
const (
	sizeofSockaddrStorage = 128
	offsetOfGroup         = bits.UintSize / 8
	offsetOfSource        = offsetOfGroup + sizeofSockaddrStorage
	sizeofGroupReq        = offsetOfSource
	sizeofGroupSourceReq  = offsetOfSource + sizeofSockaddrStorage
)

// join is the socket option, and its value, that joins m.
func (m Membership) join() (option int, value []byte) {
	if m.Source.IsValid() {
		return unix.MCAST_JOIN_SOURCE_GROUP, m.groupSourceReq()
	}
	return unix.MCAST_JOIN_GROUP, m.groupReq()
}

// leave is the socket option, and its value, that leaves m. Leaving the last source of a group
// leaves the group.
func (m Membership) leave() (option int, value []byte) {
	if m.Source.IsValid() {
		return unix.MCAST_LEAVE_SOURCE_GROUP, m.groupSourceReq()
	}
	return unix.MCAST_LEAVE_GROUP, m.groupReq()
}

func (m Membership) groupReq() []byte {
	b := make([]byte, sizeofGroupReq)
	binary.NativeEndian.PutUint32(b, uint32(m.Index))
	putSockaddr(b[offsetOfGroup:], m.Group)
	return b
}

func (m Membership) groupSourceReq() []byte {
	b := make([]byte, sizeofGroupSourceReq)
	copy(b, m.groupReq())
	putSockaddr(b[offsetOfSource:], m.Source)
	return b
}

// sourcesOf reads what a socket holds of a group on an interface: any source, or these. The error
// is EADDRNOTAVAIL if it holds nothing. It is getsockopt MCAST_MSFILTER with a struct group_filter
// (RFC 3678 section 5.1): a struct group_req, the mode and the number of sources as 32-bit numbers,
// the sources. Any source is the mode "exclude" without sources.
func sourcesOf(sys System, fd, index int, group netip.Addr) (all bool, sources []netip.Addr, err error) {
	const exclude = 0 // MCAST_EXCLUDE of include/uapi/linux/in.h
	ms := Membership{Index: index, Group: group}
	for room := 16; ; {
		value := make([]byte, sizeofGroupReq+8+room*sizeofSockaddrStorage)
		copy(value, ms.groupReq())
		binary.NativeEndian.PutUint32(value[sizeofGroupReq+4:], uint32(room))
		if _, err := sys.Getsockopt(fd, ms.family().level(), unix.MCAST_MSFILTER, value); err != nil {
			return false, nil, err
		}
		mode := binary.NativeEndian.Uint32(value[sizeofGroupReq:])
		n := int(binary.NativeEndian.Uint32(value[sizeofGroupReq+4:]))
		if n > room {
			room = n
			continue
		}
		if mode == exclude {
			return n == 0, nil, nil
		}
		for i := range n {
			sources = append(sources, sockaddr(value[sizeofGroupReq+8+i*sizeofSockaddrStorage:]))
		}
		return false, sources, nil
	}
}

// sockaddr parses what putSockaddr writes.
func sockaddr(b []byte) netip.Addr {
	if binary.NativeEndian.Uint16(b) == unix.AF_INET {
		return netip.AddrFrom4([4]byte(b[4:]))
	}
	return netip.AddrFrom16([16]byte(b[8:]))
}

// putSockaddr writes a struct sockaddr_in or sockaddr_in6 with port 0.
func putSockaddr(b []byte, addr netip.Addr) {
	if addr.Is4() {
		binary.NativeEndian.PutUint16(b, unix.AF_INET)
		copy(b[4:], addr.AsSlice()) // after the port
		return
	}
	binary.NativeEndian.PutUint16(b, unix.AF_INET6)
	copy(b[8:], addr.AsSlice()) // after the port and the flow label
}
