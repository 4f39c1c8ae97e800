package fanout

import (
	"fmt"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Defaults of [SenderOptions]: packets, and bytes.
const (
	DefaultBatch      = 64
	DefaultSendBuffer = 4 << 20
)

// Mark is the mark (SO_MARK) of the frames that a Sender sends, "xdpc" in ASCII: it lets a
// packet tap distinguish them from frames of other sockets of the host.
const Mark = 0x78647063

// maxBatch is UIO_MAXIOV, the most that one sendmmsg(2) takes.
const maxBatch = 1024

// SenderOptions configure a [Sender]. The zero value is valid.
type SenderOptions struct {
	// BypassQdisc passes frames to the driver without queueing (PACKET_QDISC_BYPASS):
	// faster, but a driver without room drops them, with ENOBUFS.
	BypassQdisc bool
	// Batch is the number of frames sent per system call, at most 1024; 0 means
	// DefaultBatch.
	Batch int
	// SendBuffer bounds the memory of frames in flight, in bytes; 0 means
	// DefaultSendBuffer. Without CAP_NET_ADMIN net.core.wmem_max bounds it, too.
	SendBuffer int
}

// Packet is a frame to send, in two parts, so that copies with different headers
// share a payload. Either may be empty; the kernel copies both in Send.
//
// It begins with the Ethernet header, or with the IP header on an interface
// without one, and is sent unchanged: the kernel computes no checksum, looks up
// no address, and bypasses routing and netfilter.
type Packet struct {
	Header, Payload []byte
}

// Sender sends frames out of one interface. It is for one goroutine at a time.
//
// It uses a packet socket on interfaces without an Ethernet header, too: a UDP
// socket would choose the source port, the IPv4 identification and the checksum
// itself, and needs a route; this sends every byte as given.
//
// Frames leave in the order of Send on an interface with one transmit queue. With
// several, the kernel may select the queue by CPU: a goroutine that sends a flow
// should then stay on one (runtime.LockOSThread, sched_setaffinity).
type Sender struct {
	fd       int
	ethernet bool
	headers  []mmsghdr
	iovecs   []unix.Iovec // two per header
	// toIPv4 and toIPv6 give the interface and the protocol, since devices without a
	// link-layer header cannot read the latter from the frame.
	toIPv4, toIPv6 unix.RawSockaddrLinklayer
	fds            [1]unix.PollFd
}

// mmsghdr is struct mmsghdr of sendmmsg(2).
type mmsghdr struct {
	header unix.Msghdr
	length uint32
}

// OpenSender opens a sender on the interface with this index in the network
// namespace of the calling thread. The caller must Close it. It needs
// CAP_NET_RAW. Errors wrap the kernel's errno: ENODEV if there is no such
// interface. The interface may be down.
func OpenSender(index int, opts SenderOptions) (*Sender, error) {
	setDefault(&opts.Batch, DefaultBatch)
	setDefault(&opts.SendBuffer, DefaultSendBuffer)
	if index <= 0 || opts.Batch < 0 || opts.Batch > maxBatch || opts.SendBuffer < 0 {
		return nil, fmt.Errorf("open sender: interface index %d, batch %d, send buffer %d: must be positive, the batch at most %d",
			index, opts.Batch, opts.SendBuffer, maxBatch)
	}
	// Protocol 0, here and in bind, receives nothing.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open sender on interface %d: open packet socket: %w", index, err)
	}
	s := &Sender{fd: fd}
	if err := s.configure(index, opts); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("open sender on interface %d: %w", index, err)
	}
	return s, nil
}

func (s *Sender) configure(index int, opts SenderOptions) error {
	if opts.BypassQdisc {
		if err := unix.SetsockoptInt(s.fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1); err != nil {
			return fmt.Errorf("set PACKET_QDISC_BYPASS: %w", err)
		}
	}
	if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_MARK, Mark); err != nil {
		return fmt.Errorf("set mark: %w", err)
	}
	err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, opts.SendBuffer)
	if err == unix.EPERM {
		err = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, opts.SendBuffer)
	}
	if err != nil {
		return fmt.Errorf("set send buffer of %d bytes: %w", opts.SendBuffer, err)
	}
	if err := unix.Bind(s.fd, &unix.SockaddrLinklayer{Ifindex: index}); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	link, err := kernel().boundTo(s.fd)
	if err != nil {
		return fmt.Errorf("read hardware type: %w", err)
	}
	s.ethernet = hasEthernetHeader(link.Hatype)
	s.toIPv4 = linkAddress(index, unix.ETH_P_IP)
	s.toIPv6 = linkAddress(index, unix.ETH_P_IPV6)
	s.fds[0] = unix.PollFd{Fd: int32(s.fd), Events: unix.POLLOUT}
	s.headers = make([]mmsghdr, opts.Batch)
	s.iovecs = make([]unix.Iovec, 2*opts.Batch)
	for i := range s.headers {
		s.headers[i].header.Iov = &s.iovecs[2*i]
		s.headers[i].header.SetIovlen(2)
	}
	return nil
}

func linkAddress(index int, protocol uint16) unix.RawSockaddrLinklayer {
	return unix.RawSockaddrLinklayer{Family: unix.AF_PACKET, Protocol: networkOrder(protocol), Ifindex: int32(index)}
}

// Stale asks the kernel whether the interface for which the sender was opened is gone,
// even if another has its index now.
func (s *Sender) Stale() bool {
	link, err := kernel().boundTo(s.fd)
	return err == nil && link.Ifindex != int(s.toIPv4.Ifindex)
}

// Ethernet reports whether frames must begin with an Ethernet header, rather than
// with the IP header.
func (s *Sender) Ethernet() bool { return s.ethernet }

// Send sends the packets in order. It never blocks, and does not allocate. It
// returns how many the kernel took; if not all, err is the reason for refusing
// packets[n]. The caller may continue with packets[n+1:], or retry packets[n]:
//
//	EAGAIN    the send buffer is full; Wait, and try again
//	ENOBUFS   the interface's queue dropped it, or memory is short
//	EMSGSIZE  it is longer than the MTU allows
//	ENETDOWN  the interface is down; sending works again once it is up
//	ENXIO     the interface is gone; close the sender
//	EINVAL    it is shorter than its link-layer header
//
// Errors are unwrapped unix.Errno values, so that they can be counted by value.
func (s *Sender) Send(packets []Packet) (n int, err error) {
	for n < len(packets) {
		batch := min(len(s.headers), len(packets)-n)
		sent, errno := s.sendBatch(packets[n : n+batch])
		// After a partial success sendmmsg does not report why it stopped. Trying the
		// next packet gets the error again, or sends it.
		n += sent
		if errno != 0 && errno != unix.EINTR {
			return n, errno
		}
	}
	return n, nil
}

func (s *Sender) sendBatch(packets []Packet) (sent int, errno unix.Errno) {
	for i := range packets {
		s.fill(i, &packets[i])
	}
	r, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(s.fd), uintptr(unsafe.Pointer(&s.headers[0])),
		uintptr(len(packets)), unix.MSG_DONTWAIT, 0, 0)
	runtime.KeepAlive(packets)
	// The packets' memory may be unmapped before the next Send: keep no pointer into
	// it.
	clear(s.iovecs[:2*len(packets)])
	if errno != 0 {
		return 0, errno
	}
	return int(r), 0
}

func (s *Sender) fill(i int, p *Packet) {
	iov := s.iovecs[2*i : 2*i+2]
	iov[0].Base, iov[1].Base = unsafe.SliceData(p.Header), unsafe.SliceData(p.Payload)
	iov[0].SetLen(len(p.Header))
	iov[1].SetLen(len(p.Payload))
	if s.ethernet {
		return
	}
	to := &s.toIPv4
	if first, ok := p.first(); ok && first>>4 == 6 {
		to = &s.toIPv6
	}
	s.headers[i].header.Name = (*byte)(unsafe.Pointer(to))
	s.headers[i].header.Namelen = unix.SizeofSockaddrLinklayer
}

// first returns the packet's first byte.
func (p *Packet) first() (b byte, ok bool) {
	switch {
	case len(p.Header) > 0:
		return p.Header[0], true
	case len(p.Payload) > 0:
		return p.Payload[0], true
	}
	return 0, false
}

// Wait waits until the send buffer has room, for at most timeout, rounded to
// milliseconds. It returns false on a timeout.
func (s *Sender) Wait(timeout time.Duration) (bool, error) {
	n, err := unix.Poll(s.fds[:], int(timeout.Round(time.Millisecond)/time.Millisecond))
	if err != nil && err != unix.EINTR {
		return false, fmt.Errorf("wait for room in the send buffer: %w", err)
	}
	return n > 0, nil
}

// Close closes the sender. A second Close does nothing.
func (s *Sender) Close() error {
	if s.fd < 0 {
		return nil
	}
	err := unix.Close(s.fd)
	s.fd = -1
	return err
}
