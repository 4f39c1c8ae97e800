package fanout

import (
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
)

// system holds the system calls that a group makes. Tests replace them to inject
// faults.
type system struct {
	socket      func(domain, kind, protocol int) (int, error)
	setInt      func(fd, level, option, value int) error
	getInt      func(fd, level, option int) (int, error)
	setFilter   func(fd int, program []unix.SockFilter) error
	setRing     func(fd int, ring *unix.TpacketReq3) error
	setFrames   func(fd int, ring *unix.TpacketReq) error
	setFanout   func(fd int, args fanoutArgs) error
	mmap        func(fd, size int) ([]byte, error)
	munmap      func(memory []byte) error
	bind        func(fd int, address unix.Sockaddr) error
	getsockname func(fd int) (unix.Sockaddr, error)
	eventfd     func() (int, error)
	poll        func(fds []unix.PollFd, milliseconds int) (int, error)
	statistics  func(fd int) (*unix.TpacketStatsV3, error)
	memory      func(size int) (int, error)
	seals       func(fd int) (int, error)
	namespace   func(fd int) (uint64, error)
	close       func(fd int) error
}

// fanoutArgs is struct fanout_args of include/uapi/linux/if_packet.h.
type fanoutArgs struct {
	id         uint16
	modeFlags  uint16
	maxMembers uint32
}

// kernel returns the real system calls.
func kernel() *system {
	return &system{
		socket:      unix.Socket,
		setInt:      unix.SetsockoptInt,
		getInt:      unix.GetsockoptInt,
		setFilter:   attachClassic,
		setRing:     setRing,
		setFrames:   setFrames,
		setFanout:   setFanout,
		mmap:        mapRing,
		munmap:      unix.Munmap,
		bind:        unix.Bind,
		getsockname: unix.Getsockname,
		eventfd:     func() (int, error) { return unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK) },
		poll:        unix.Poll,
		statistics: func(fd int) (*unix.TpacketStatsV3, error) {
			return unix.GetsockoptTpacketStatsV3(fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
		},
		memory:    newMemory,
		seals:     func(fd int) (int, error) { return unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0) },
		namespace: func(fd int) (uint64, error) { return unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE) },
		close:     unix.Close,
	}
}

// memorySeals keep the size of newMemory: a process that reads memory beyond the end of a file that another
// has truncated gets SIGBUS.
const memorySeals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL

// newMemory returns the descriptor of zeroed memory that another process can map, and whose size cannot
// change.
func newMemory(size int) (int, error) {
	fd, err := unix.MemfdCreate("xdpcast-fanout", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return -1, err
	}
	err = unix.Ftruncate(fd, int64(size))
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, memorySeals)
	}
	if err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

// ownNamespace returns the cookie of the network namespace of the calling thread.
func (s *system) ownNamespace() (cookie uint64, err error) {
	fd, err := s.openPacket()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, s.close(fd)) }()
	return s.namespace(fd)
}

func attachClassic(fd int, program []unix.SockFilter) error {
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
		&unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]})
}

func setRing(fd int, ring *unix.TpacketReq3) error {
	return unix.SetsockoptTpacketReq3(fd, unix.SOL_PACKET, unix.PACKET_RX_RING, ring)
}

func setFrames(fd int, ring *unix.TpacketReq) error {
	return unix.SetsockoptTpacketReq(fd, unix.SOL_PACKET, unix.PACKET_RX_RING, ring)
}

func setFanout(fd int, args fanoutArgs) error {
	var b [8]byte
	// Written as one word, as before the kernel introduced the struct: the id is the
	// low half in either byte order.
	binary.NativeEndian.PutUint32(b[:], uint32(args.id)|uint32(args.modeFlags)<<16)
	binary.NativeEndian.PutUint32(b[4:], args.maxMembers)
	return unix.SetsockoptString(fd, unix.SOL_PACKET, unix.PACKET_FANOUT, string(b[:]))
}

func mapRing(fd, size int) ([]byte, error) {
	return unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
}

// networkOrder returns v as the kernel's __be16.
func networkOrder(v uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v))
}
