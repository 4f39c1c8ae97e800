package traffic

import (
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mmsghdr is struct mmsghdr of sendmmsg(2) and recvmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	// n is the number of bytes sent or received.
	n uint32
}

// slotGap keeps the starts of neighbouring buffers out of the same cache sets, which they would
// share at strides of a power of two.
const slotGap = 128

// controlLen has room for a timestamp, a TTL and a TOS.
const controlLen = 128

// mmsgs are the message headers and buffers for one sendmmsg or recvmmsg. The headers point into
// the other slices, which therefore never grow.
type mmsgs struct {
	hdrs     []mmsghdr
	iovs     []unix.Iovec
	names    []unix.RawSockaddrInet6
	controls []byte
	payloads []byte
	stride   int
}

// newMmsgs makes room for n messages of up to size payload bytes.
func newMmsgs(n, size int) *mmsgs {
	m := &mmsgs{
		hdrs:     make([]mmsghdr, n),
		iovs:     make([]unix.Iovec, n),
		names:    make([]unix.RawSockaddrInet6, n),
		controls: make([]byte, n*controlLen),
		stride:   size + slotGap,
	}
	m.payloads = make([]byte, n*m.stride)
	for i := range m.hdrs {
		m.iovs[i].Base = &m.payloads[i*m.stride]
		m.iovs[i].SetLen(size)
		m.hdrs[i].hdr.Iov = &m.iovs[i]
		m.hdrs[i].hdr.SetIovlen(1)
	}
	return m
}

// payload is the buffer of message i, n bytes of it.
func (m *mmsgs) payload(i, n int) []byte {
	start := i * m.stride
	return m.payloads[start : start+n]
}

// control is the control data of received message i.
func (m *mmsgs) control(i int) []byte {
	n := min(int(m.hdrs[i].hdr.Controllen), controlLen)
	return m.controls[i*controlLen : i*controlLen+n]
}

// send sends the first n messages without blocking and returns how many were sent. An error is
// about the first unsent one, and is only returned if none was sent.
func (m *mmsgs) send(fd, n int) (int, unix.Errno) {
	return m.call(unix.SYS_SENDMMSG, fd, n)
}

// receive reads as many messages as are available without blocking; EAGAIN if there are none.
func (m *mmsgs) receive(fd int) (int, unix.Errno) {
	for i := range m.hdrs {
		h := &m.hdrs[i].hdr
		h.Name = (*byte)(unsafe.Pointer(&m.names[i]))
		h.Namelen = unix.SizeofSockaddrInet6
		h.Control = &m.controls[i*controlLen]
		h.SetControllen(controlLen)
	}
	return m.call(unix.SYS_RECVMMSG, fd, len(m.hdrs))
}

func (m *mmsgs) call(trap uintptr, fd, n int) (int, unix.Errno) {
	done, _, errno := unix.Syscall6(trap, uintptr(fd), uintptr(unsafe.Pointer(&m.hdrs[0])), uintptr(n), unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(done), 0
}

// fields parses the control data of received message i: its header fields and its arrival time
// (CLOCK_REALTIME, ns).
func (m *mmsgs) fields(i int) (f Fields, arrival int64) {
	f.Source = addrPort(&m.names[i])
	rest := m.control(i)
	for len(rest) >= unix.SizeofCmsghdr {
		hdr, data, next, err := unix.ParseOneSocketControlMessage(rest)
		if err != nil {
			break
		}
		rest = next
		switch {
		case hdr.Level == unix.SOL_SOCKET && hdr.Type == unix.SO_TIMESTAMPNS_NEW && len(data) >= 16:
			// struct __kernel_timespec: two 64-bit numbers on every machine.
			ts := (*[2]int64)(unsafe.Pointer(&data[0]))
			arrival = ts[0]*1e9 + ts[1]
		case hdr.Level == unix.IPPROTO_IP && hdr.Type == unix.IP_TTL && len(data) >= 4,
			hdr.Level == unix.IPPROTO_IPV6 && hdr.Type == unix.IPV6_HOPLIMIT && len(data) >= 4:
			f.TTL = uint8(*(*int32)(unsafe.Pointer(&data[0])))
		case hdr.Level == unix.IPPROTO_IP && hdr.Type == unix.IP_TOS && len(data) >= 1:
			f.DSCP = data[0] >> 2
		case hdr.Level == unix.IPPROTO_IPV6 && hdr.Type == unix.IPV6_TCLASS && len(data) >= 4:
			f.DSCP = uint8(*(*int32)(unsafe.Pointer(&data[0]))) >> 2
		}
	}
	if arrival == 0 {
		arrival = time.Now().UnixNano()
	}
	return f, arrival
}
