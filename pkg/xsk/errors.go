package xsk

import (
	"errors"
	"fmt"
)

// Errors to match with errors.Is. In addition, closed objects return [os.ErrClosed], and
// [Socket.Kick], [Socket.Flush], [Socket.WakeRX] and [Socket.Check] return errors that
// match the kernel's errno (unix.Errno).
var (
	// ErrInUse: sockets of the UMEM are still open.
	ErrInUse = errors.New("still in use")
	// ErrNoHugePages: the system has too few free huge pages.
	ErrNoHugePages = errors.New("not enough free huge pages")
	// ErrStalled: the kernel takes nothing from the TX ring and returns no error, though the
	// completion ring has room. The interface has no transmit queue of the socket's number.
	ErrStalled = errors.New("frames are not taken from the TX ring: the interface has no such transmit queue")
	// ErrOwnership: a frame was used without holding a reference; see
	// [Frames.Verify].
	ErrOwnership = errors.New("frame is not the caller's")
)

// OptionError reports an option with an invalid value.
type OptionError struct {
	Option string
	Value  any
	Want   string // the valid values
}

func (e *OptionError) Error() string {
	return fmt.Sprintf("option %s is %v: want %s", e.Option, e.Value, e.Want)
}

// BindError says that a socket cannot bind to a queue of an interface. Match its cause:
// unix.ENODEV (no such interface), unix.EINVAL (no such queue), unix.EBUSY (the queue
// has a socket, or had one a moment ago: the kernel releases queues after close has
// returned), unix.EOPNOTSUPP (no zero-copy).
type BindError struct {
	Ifindex, Queue int
	Reason         string
	Err            error
}

func (e *BindError) Error() string {
	return fmt.Sprintf("bind to queue %d of interface %d: %s: %v", e.Queue, e.Ifindex, e.Reason, e.Err)
}

func (e *BindError) Unwrap() error { return e.Err }

// DescError reports a descriptor given to [Socket.Send] that the kernel would refuse.
// It would never complete, so it is not sent.
type DescError struct {
	Index  int // among the descriptors of the call
	Desc   Desc
	Reason string
	Err    error // ErrOwnership, or nil
}

func (e *DescError) Error() string {
	return fmt.Sprintf("descriptor %d (address %#x, length %d, options %#x): %s", e.Index, e.Desc.Addr, e.Desc.Len, e.Desc.Options, e.Reason)
}

func (e *DescError) Unwrap() error { return e.Err }

// OwnershipError reports the use of a frame without a reference. It matches
// [ErrOwnership].
type OwnershipError struct {
	Op   string
	Addr uint64 // of the frame, in bytes from the start of the UMEM
	Was  string // the frame's state at that time
}

func (e *OwnershipError) Error() string {
	return fmt.Sprintf("%s of frame %#x, which is %s", e.Op, e.Addr, e.Was)
}

func (e *OwnershipError) Is(target error) bool { return target == ErrOwnership }
