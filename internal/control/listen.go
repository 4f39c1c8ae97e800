package control

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/lockfile"
	"xdpcast/internal/pause"
)

// maxSocketPath is the length limit of sockaddr_un.sun_path with its closing NUL, unix(7).
const maxSocketPath = 107

// Listen creates the unix socket at path, and its directory (0755) if that does not exist. Only
// root, the process's own user and members of readGroups can connect to it (if there are groups and
// its file system has no access control lists, everyone can); the Server decides what they may do.
// It replaces a socket left by a dead daemon, but not a live one: errors.Is(err, ErrListening).
// Anything else at path is an error and left alone. A lock file stays next to the socket.
//
// The caller closes the listener, or passes it to Server.Serve which does; closing removes the
// socket.
func Listen(path string, readGroups []uint32) (_ *Listener, err error) {
	switch {
	case path == "" || strings.HasPrefix(path, "@"):
		return nil, fmt.Errorf("listen: socket %q: must be a path", path)
	case len(path) > maxSocketPath:
		return nil, fmt.Errorf("listen: socket %q: path of %d bytes, at most %d fit a unix socket", path, len(path), maxSocketPath)
	}
	if err := makeDir(filepath.Dir(path)); err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}

	// Of two daemons that start simultaneously, both would find a dead socket, and the second would
	// remove the new socket of the first. The lock excludes one of them from the check until the
	// bind.
	lock, err := lockfile.Take(path + ".lock")
	var held *lockfile.HeldError
	if errors.As(err, &held) {
		return nil, fmt.Errorf("%w at %s, or about to", ErrListening, path)
	} else if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	defer func() { err = errors.Join(err, lock.Close()) }()

	if err := removeStale(path); err != nil {
		return nil, err
	}
	// The socket has the mode of its descriptor from the start (unix_bind in net/unix/af_unix.c).
	private := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var chmodErr error
		err := c.Control(func(fd uintptr) { chmodErr = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(err, chmodErr)
	}}
	ln, err := private.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	if err := letIn(path, readGroups); err != nil {
		return nil, errors.Join(fmt.Errorf("listen: %w", err), ln.Close())
	}
	return newListener(ln)
}

// Listener accepts connections to a control socket.
type Listener struct {
	*net.UnixListener
	gate *pause.Gate
}

// Close stops listening, and removes the socket unless Leave was called.
func (l *Listener) Close() error {
	l.gate.Close()
	return l.UnixListener.Close()
}

// Accept is AcceptUnix.
func (l *Listener) Accept() (net.Conn, error) { return l.AcceptUnix() }

func newListener(ln net.Listener) (*Listener, error) {
	u, ok := ln.(*net.UnixListener)
	if !ok {
		return nil, errors.Join(fmt.Errorf("listen: %v is no unix socket", ln.Addr()), ln.Close())
	}
	u.SetUnlinkOnClose(true)
	return &Listener{UnixListener: u, gate: pause.NewGate(u.SetDeadline)}, nil
}

// Inherit is Listen for a socket on which another process listens at path, and which it hands over;
// Inherit takes ownership of ln. Before Own, Close leaves the socket to the other process.
func Inherit(ln net.Listener, path string) (*Listener, error) {
	if ln.Addr().Network() != "unix" || ln.Addr().String() != path {
		return nil, errors.Join(fmt.Errorf("listen: the socket that was passed is %v, want %s", ln.Addr(), path), ln.Close())
	}
	l, err := newListener(ln)
	if err == nil {
		l.Leave()
	}
	return l, err
}

// Own makes Close remove the socket.
func (l *Listener) Own() { l.SetUnlinkOnClose(true) }

// Pause makes clients wait in the socket's queue until resume is called, or for another process
// that also listens on it.
func (l *Listener) Pause() (resume func()) {
	resume, _ = l.gate.Pause()
	return resume
}

// Leave makes Close leave the socket to another process that also listens on it.
func (l *Listener) Leave() { l.SetUnlinkOnClose(false) }

// AcceptUnix is net.UnixListener's, with support for pauses.
func (l *Listener) AcceptUnix() (*net.UnixConn, error) {
	for {
		c, err := l.UnixListener.AcceptUnix()
		if err == nil {
			return c, nil
		}
		if err := l.gate.Again(err); err != nil {
			return nil, err
		}
	}
}

// letIn lets its owner and members of groups connect to the socket at path, whatever the umask.
// Without others, only clients with access can fill its queue.
func letIn(path string, groups []uint32) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open socket %s: %w", path, err)
	}
	defer unix.Close(fd)
	socket := fmt.Sprintf("/proc/self/fd/%d", fd)
	if len(groups) == 0 {
		return os.Chmod(socket, 0o600)
	}
	// Not by chown, which the packaged service is not allowed.
	err = unix.Setxattr(socket, "system.posix_acl_access", groupACL(groups), 0)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return os.Chmod(socket, 0o666) // the Server distinguishes them
	}
	if err != nil {
		return fmt.Errorf("give groups %s access to socket %s: %w", join(groups, ", "), path, err)
	}
	return nil
}

// groupACL is an access control list in the form of the xattr system.posix_acl_access
// (include/uapi/linux/posix_acl_xattr.h, little-endian): mode 0600 plus groups with read and write
// access.
func groupACL(groups []uint32) []byte {
	const (
		version                             = 2
		userObj, groupObj, group, mask, oth = 0x01, 0x04, 0x08, 0x10, 0x20
		none, readWrite                     = 0, 6
		noID                                = 1<<32 - 1
	)
	acl := binary.LittleEndian.AppendUint32(nil, version)
	add := func(tag, perm uint16, id uint32) {
		acl = binary.LittleEndian.AppendUint16(acl, tag)
		acl = binary.LittleEndian.AppendUint16(acl, perm)
		acl = binary.LittleEndian.AppendUint32(acl, id)
	}
	add(userObj, readWrite, noID)
	add(groupObj, none, noID)
	sorted := slices.Clone(groups)
	slices.Sort(sorted)
	for _, gid := range slices.Compact(sorted) {
		add(group, readWrite, gid)
	}
	add(mask, readWrite, noID)
	add(oth, none, noID)
	return acl
}

// makeDir creates a missing directory with mode 0755, whatever the umask; an existing one belongs
// to the administrator.
func makeDir(dir string) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.Chmod(dir, 0o755)
}

// removeStale removes the socket at path if no process listens on it.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("listen: %w", err)
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("listen: %s exists and is not a socket: remove it or choose another path", path)
	}

	c, err := net.DialTimeout("unix", path, time.Second)
	switch {
	case err == nil:
		c.Close()
		return fmt.Errorf("%w at %s", ErrListening, path)
	case errors.Is(err, unix.EAGAIN), errors.Is(err, os.ErrDeadlineExceeded): // alive with a full backlog
		return fmt.Errorf("%w at %s", ErrListening, path)
	case !errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("listen: cannot tell whether %s is in use: %w", path, err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("listen: remove stale socket: %w", err)
	}
	return nil
}
