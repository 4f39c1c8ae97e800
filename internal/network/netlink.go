package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// errInterrupted: a list changed while the kernel wrote it (NLM_F_DUMP_INTR). Missing entries would
// look as if they were gone.
var errInterrupted = errors.New("the list changed while it was read")

// dumps is how often a list is read again that changes while it is read.
const dumps = 10

// readAll calls read until the kernel does not interrupt it.
func readAll(what string, read func() error) error {
	for try := 1; ; try++ {
		err := read()
		if err == nil {
			return nil
		}
		// EBUSY: the answers to an abandoned list are still pending.
		if try == dumps || !errors.Is(err, errInterrupted) && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("list %s: %w", what, err)
		}
	}
}

// message is a netlink message.
type message struct {
	kind, flags uint16
	seq         uint32
	data        []byte
}

// nextMessage splits the first message off b. ok is false if b does not begin with a whole one.
func nextMessage(b []byte) (m message, rest []byte, ok bool) {
	if len(b) < unix.SizeofNlMsghdr {
		return m, nil, false
	}
	size := binary.NativeEndian.Uint32(b)
	if size < unix.SizeofNlMsghdr || uint64(size) > uint64(len(b)) {
		return m, nil, false
	}
	m = message{
		kind: binary.NativeEndian.Uint16(b[4:]), flags: binary.NativeEndian.Uint16(b[6:]),
		seq: binary.NativeEndian.Uint32(b[8:]), data: b[unix.SizeofNlMsghdr:size],
	}
	return m, b[min(len(b), align(int(size))):], true
}

// align is NLMSG_ALIGN and RTA_ALIGN.
func align(n int) int { return (n + 3) &^ 3 }

// attributes calls each for the attributes in b, without the flags in their types. It returns
// whether b consists of whole attributes.
func attributes(b []byte, each func(kind uint16, value []byte)) bool {
	for len(b) >= unix.SizeofRtAttr {
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofRtAttr || size > len(b) {
			return false
		}
		each(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofRtAttr:size])
		b = b[min(len(b), align(size)):]
	}
	return len(b) == 0
}

// appendAttribute appends an attribute.
func appendAttribute(b []byte, kind uint16, value []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofRtAttr+len(value)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, value...)
	return append(b, make([]byte, align(len(value))-len(value))...)
}

func appendUint32(b []byte, kind uint16, value uint32) []byte {
	return appendAttribute(b, kind, binary.NativeEndian.AppendUint32(nil, value))
}

// text is a string attribute, which ends with a null byte.
func text(value []byte) string { return unix.ByteSliceToString(value) }

func uint32Of(value []byte) uint32 {
	if len(value) < 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(value)
}

// receiveSize fits the kernel's largest read: up to 32 KiB of a list.
const receiveSize = 64 << 10

// conn sends requests to the kernel, in the network namespace of the thread that opened it. Its
// methods may be called from any goroutine.
type conn struct {
	mu  sync.Mutex
	fd  int
	seq uint32
	buf []byte
}

// dial opens a conn. The caller must close it.
func dial(protocol int) (_ *conn, err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	if err := errors.Join(
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		// Needed for filters of lists.
		unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1),
		// The kernel answers before sendto returns; this is for a kernel that does not.
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 30}),
	); err != nil {
		return nil, errors.Join(fmt.Errorf("set up netlink socket: %w", err), unix.Close(fd))
	}
	return &conn{fd: fd, buf: make([]byte, receiveSize)}, nil
}

func (c *conn) close() error { return unix.Close(c.fd) }

// ask sends a request and calls each with the body of every answer, which is valid only during the
// call. flags are without NLM_F_REQUEST: NLM_F_DUMP for a list, NLM_F_ACK if only an
// acknowledgement is expected. Errors to match: the kernel's, and errInterrupted.
func (c *conn) ask(kind, flags uint16, body []byte, each func(data []byte)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seq++
	request := binary.NativeEndian.AppendUint32(make([]byte, 0, unix.SizeofNlMsghdr+len(body)), uint32(unix.SizeofNlMsghdr+len(body)))
	request = binary.NativeEndian.AppendUint16(request, kind)
	request = binary.NativeEndian.AppendUint16(request, flags|unix.NLM_F_REQUEST)
	request = binary.NativeEndian.AppendUint32(request, c.seq)
	request = append(binary.NativeEndian.AppendUint32(request, 0), body...)
	if err := ignoringEINTR(func() error {
		return unix.Sendto(c.fd, request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	}); err != nil {
		return err
	}
	a := answers{seq: c.seq, list: flags&unix.NLM_F_DUMP == unix.NLM_F_DUMP, each: each}
	for !a.done {
		n, err := 0, error(nil)
		if err = ignoringEINTR(func() error {
			n, _, err = unix.Recvfrom(c.fd, c.buf, unix.MSG_TRUNC)
			return err
		}); errors.Is(err, unix.EAGAIN) {
			return unix.ETIMEDOUT
		} else if err != nil {
			return err
		}
		if n > len(c.buf) {
			return fmt.Errorf("an answer of %d bytes: %w", n, unix.EMSGSIZE)
		}
		if err := a.read(c.buf[:n]); err != nil {
			return err
		}
	}
	if a.interrupted {
		return errInterrupted
	}
	return nil
}

func ignoringEINTR(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// answers reads the answers to a request.
type answers struct {
	seq               uint32
	list              bool
	each              func(data []byte)
	done, interrupted bool
}

// read handles the result of one read.
func (a *answers) read(b []byte) error {
	for len(b) > 0 && !a.done {
		m, rest, ok := nextMessage(b)
		if !ok {
			return fmt.Errorf("an answer that is no netlink message: %w", unix.EBADMSG)
		}
		b = rest
		if m.seq != a.seq {
			continue // to an earlier, abandoned request
		}
		a.interrupted = a.interrupted || m.flags&unix.NLM_F_DUMP_INTR != 0
		switch m.kind {
		case unix.NLMSG_DONE, unix.NLMSG_ERROR:
			a.done = true
			if errno := -int32(uint32Of(m.data)); errno != 0 {
				return unix.Errno(errno)
			}
		default:
			a.each(m.data)
			a.done = !a.list && m.flags&unix.NLM_F_MULTI == 0
		}
	}
	return nil
}
