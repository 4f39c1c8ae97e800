package control

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// maxSocketPath is what fits sockaddr_un.sun_path with its closing NUL, unix(7).
const maxSocketPath = 107

// Listen makes the unix socket at path, and its directory (0755) if that is
// absent. A socket that a dead daemon left is replaced; a live one is not:
// errors.Is(err, ErrListening). Anything else at path is left alone and an
// error. Anybody may connect: Server decides by who the peer is.
//
// The caller closes the listener, or gives it to Server.Serve which does;
// closing removes the socket.
func Listen(path string) (net.Listener, error) {
	switch {
	case path == "" || strings.HasPrefix(path, "@"):
		return nil, fmt.Errorf("listen: socket %q: must be a path", path)
	case len(path) > maxSocketPath:
		return nil, fmt.Errorf("listen: socket %q: path of %d bytes, at most %d fit a unix socket", path, len(path), maxSocketPath)
	}
	dir := filepath.Dir(path)
	if err := makeDir(dir); err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}

	// Two daemons that start at once would both find a dead socket, and the
	// second would remove the first one's new socket. The lock on the
	// directory keeps one of them out from the look to the bind.
	unlock, err := lockDir(dir)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("%w at %s, or about to", ErrListening, path)
	} else if err != nil {
		return nil, fmt.Errorf("listen: lock %s: %w", dir, err)
	}
	defer unlock()

	if err := removeStale(path); err != nil {
		return nil, err
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		ln.Close()
		return nil, fmt.Errorf("listen: %w", err)
	}
	return ln, nil
}

// makeDir makes an absent directory 0755 whatever the umask; one that is there
// is the administrator's.
func makeDir(dir string) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.Chmod(dir, 0o755)
}

// lockDir takes flock(2) on a directory, EWOULDBLOCK when somebody else has it.
func lockDir(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

// removeStale removes the socket at path if nobody listens on it.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("listen: %w", err)
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("listen: %s is there and not a socket: remove it or choose another path", path)
	}

	c, err := net.DialTimeout("unix", path, time.Second)
	switch {
	case err == nil:
		c.Close()
		return fmt.Errorf("%w at %s", ErrListening, path)
	case errors.Is(err, unix.EAGAIN), errors.Is(err, os.ErrDeadlineExceeded): // alive, its backlog full
		return fmt.Errorf("%w at %s", ErrListening, path)
	case !errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("listen: cannot tell whether %s is in use: %w", path, err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("listen: remove stale socket: %w", err)
	}
	return nil
}
