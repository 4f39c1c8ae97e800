package xsk

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// getsockopt reads a socket option of level SOL_XDP whose value is a T.
func getsockopt[T any](fd, opt int) (T, error) {
	var value T
	size := uint32(unsafe.Sizeof(value))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_XDP, uintptr(opt), uintptr(unsafe.Pointer(&value)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return value, errno
	}
	if size != uint32(unsafe.Sizeof(value)) {
		return value, fmt.Errorf("option %d has %d bytes: want %d (Linux 5.9)", opt, size, unsafe.Sizeof(value))
	}
	return value, nil
}

// setsockopt writes a socket option of level SOL_XDP.
func setsockopt[T any](fd, opt int, value *T) error {
	_, _, errno := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_XDP, uintptr(opt), uintptr(unsafe.Pointer(value)), unsafe.Sizeof(*value), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func bindTo(fd int, s *Socket, flags uint16, shared int) error {
	return unix.Bind(fd, &unix.SockaddrXDP{Flags: flags, Ifindex: uint32(s.ifindex), QueueID: uint32(s.queue), SharedUmemFD: uint32(shared)})
}

// wakeTX is sendto(fd, NULL, 0, MSG_DONTWAIT). x/sys's Sendto requires an address.
func wakeTX(fd int) error {
	_, _, errno := unix.Syscall6(unix.SYS_SENDTO, uintptr(fd), 0, 0, unix.MSG_DONTWAIT, 0, 0)
	return asError(errno)
}

// wakeRX is recvfrom(fd, NULL, 0, MSG_DONTWAIT).
func wakeRX(fd int) error {
	_, _, errno := unix.Syscall6(unix.SYS_RECVFROM, uintptr(fd), 0, 0, unix.MSG_DONTWAIT, 0, 0)
	return asError(errno)
}

// asError does not allocate: the runtime preallocates values below 256, and errnos are
// smaller.
func asError(errno unix.Errno) error {
	if errno != 0 {
		return errno
	}
	return nil
}
