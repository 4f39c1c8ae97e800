package membership

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// ErrNotJoined is the cause of a [LeaveError] for a membership that is not held: never joined,
// already left, or dropped with its interface. The only other cause not from the kernel is
// [os.ErrClosed], of a closed [Manager].
var ErrNotJoined = errors.New("not joined")

// JoinError says that a membership was not joined. Every error of [Manager.Join] is one; it may
// wrap a more specific [InterfaceNotFoundError] or [HelperSocketError]. The kernel's errno is at
// the end of the chain.
type JoinError struct {
	Membership Membership
	Err        error
}

func (e *JoinError) Error() string { return fmt.Sprintf("join %v: %v", e.Membership, e.Err) }
func (e *JoinError) Unwrap() error { return e.Err }

// LeaveError says that the kernel did not confirm that a membership was left. It is informational:
// the membership is forgotten nevertheless, and the helper socket that held it will be closed as
// soon as it holds no other, which the kernel cannot refuse.
type LeaveError struct {
	Membership Membership
	Err        error
}

func (e *LeaveError) Error() string { return fmt.Sprintf("leave %v: %v", e.Membership, e.Err) }
func (e *LeaveError) Unwrap() error { return e.Err }

// InterfaceNotFoundError says that no interface has this index.
type InterfaceNotFoundError struct {
	Interface string
	Index     int
	Err       error
}

func (e *InterfaceNotFoundError) Error() string {
	return fmt.Sprintf("no interface with index %d: %v", e.Index, e.Err)
}
func (e *InterfaceNotFoundError) Unwrap() error { return e.Err }

// HelperSocketError says that a helper socket could not be opened.
type HelperSocketError struct {
	Interface string
	// Family is "IPv4" or "IPv6".
	Family string
	Err    error
}

func (e *HelperSocketError) Error() string {
	return fmt.Sprintf("open %s helper socket for %s: %v", e.Family, e.Interface, e.Err)
}
func (e *HelperSocketError) Unwrap() error { return e.Err }

// Transient reports whether a join that failed with err is worth retrying unchanged.
func Transient(err error) bool {
	// Not transient: EADDRINUSE and EADDRNOTAVAIL (the socket holds it already: another socket has
	// been tried by then), EINVAL (a wrong address, or an interface with too small an MTU for
	// IPv6), EPERM and EACCES (a security policy), EAFNOSUPPORT and EPROTONOSUPPORT (a kernel
	// without the family), ENOPROTOOPT (a kernel without multicast).
	for _, errno := range []error{
		unix.ENOBUFS,  // no memory, even for a fresh socket
		unix.ENOMEM,   // likewise
		unix.ENODEV,   // the interface, or its IP layer, does not exist yet
		unix.ENETDOWN, // the interface is coming up
		unix.EMFILE,   // the process has too many open files
		unix.ENFILE,   // the host has
		unix.EINTR,    // interrupted by a signal
		unix.EAGAIN,   // transient by definition
	} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}
