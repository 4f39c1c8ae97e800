package membership

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"net/netip"

	"golang.org/x/sys/unix"
)

// System is the system calls that a [Manager] makes. Tests put faults between
// the two; everything else uses [Kernel]. Its methods are never called
// concurrently by one manager.
type System interface {
	// Socket opens an unbound UDP socket of the family, AF_INET or AF_INET6, in
	// the network namespace of the calling thread, closed on exec.
	Socket(family int) (fd int, err error)
	// Setsockopt is setsockopt(2).
	Setsockopt(fd, level, option int, value []byte) error
	// InterfaceName returns the name of the interface with this index in the
	// socket's network namespace, ENODEV if there is none.
	InterfaceName(fd, index int) (string, error)
	// Close closes a socket. Whatever it answers, the descriptor is gone.
	Close(fd int) error
}

// Kernel returns the System that is the kernel.
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
	// The kernel gives the lowest number that is free: all below it are in use.
	if kept := reserve(limit.Cur); uint64(fd) >= limit.Cur-kept {
		return -1, errors.Join(fmt.Errorf("%w: the last %d of %d file descriptors are kept for rules and requests (raise the limit: ulimit -n, or LimitNOFILE= of the service)",
			unix.EMFILE, kept, limit.Cur), unix.Close(fd))
	}
	return fd, nil
}

// reserve is how many file descriptors helper sockets leave for everything else that the
// process does, of so many.
func reserve(limit uint64) uint64 { return min(max(limit/4, 16), 256, limit) }

func (kernel) Setsockopt(fd, level, option int, value []byte) error {
	return unix.SetsockoptString(fd, level, option, string(value))
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

// level is the protocol that the MCAST_ options are set at.
func (f family) level() int {
	if f == unix.AF_INET {
		return unix.IPPROTO_IP
	}
	return unix.IPPROTO_IPV6
}

// Sizes of struct group_req and struct group_source_req of RFC 3678 section 5.1
// and include/uapi/linux/in.h. Both begin with a 32-bit interface index; the
// addresses that follow are aligned as pointers are.
const (
	sizeofSockaddrStorage = 128
	offsetOfGroup         = bits.UintSize / 8
	offsetOfSource        = offsetOfGroup + sizeofSockaddrStorage
	sizeofGroupReq        = offsetOfSource
	sizeofGroupSourceReq  = offsetOfSource + sizeofSockaddrStorage
)

// join is the option and its value that join m.
func (m Membership) join() (option int, value []byte) {
	if m.Source.IsValid() {
		return unix.MCAST_JOIN_SOURCE_GROUP, m.groupSourceReq()
	}
	return unix.MCAST_JOIN_GROUP, m.groupReq()
}

// leave is the option and its value that leave m. Leaving the last source of a
// group leaves the group.
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
