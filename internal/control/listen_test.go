package control

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/internal/lockfile"
)

func TestListen(t *testing.T) {
	old := unix.Umask(0o077) // the modes must not depend on it
	defer unix.Umask(old)
	path := filepath.Join(socketDir(t), "a", "s")
	ln, err := Listen(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]os.FileMode{filepath.Dir(path): os.ModeDir | 0o755, path: os.ModeSocket | 0o600} {
		if info, err := os.Lstat(file); err != nil || info.Mode() != want {
			t.Errorf("%s: mode %v, %v, want %v", file, info.Mode(), err, want)
		}
	}
	if _, err := Listen(path, nil); !errors.Is(err, ErrListening) || !strings.Contains(err.Error(), path) {
		t.Errorf("second Listen: %v, want %v with the path", err, ErrListening)
	}
	ln.Close()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("socket after Close: %v", err)
	}
}

// Whom the socket is not for does not get as far as its queue.
func TestListenLetsIn(t *testing.T) {
	const nobody = 65534
	for name, tt := range map[string]struct {
		groups, member []uint32
		in             bool
	}{
		"nobody":               {nil, nil, false},
		"nobody with one":      {[]uint32{4242}, []uint32{1}, false},
		"nobody with several":  {[]uint32{4242, 4243}, []uint32{1}, false},
		"member":               {[]uint32{4242}, []uint32{4242}, true},
		"member of the second": {[]uint32{5000, 4242, 5000}, []uint32{1, 4242}, true},
	} {
		path := filepath.Join(socketDir(t), "s")
		ln, err := Listen(path, tt.groups)
		if err != nil {
			t.Fatal(err)
		}
		c, err := dialAs(t, nobody, tt.member, path)
		if (err == nil) != tt.in || !tt.in && !errors.Is(err, os.ErrPermission) {
			t.Errorf("%s: %v", name, err)
		}
		if c != nil {
			c.Close()
		}
		ln.Close()
	}
}

// A lock on the directory, which anybody can open, is nobody's business.
func TestListenIgnoresLocksOfOthers(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Fatal(err)
	}
	ln, err := Listen(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	if info, err := os.Stat(path + ".lock"); err != nil || info.Mode() != 0o600 {
		t.Errorf("lock file: mode %v, %v, want 0600", info.Mode(), err)
	}
}

func TestListenReplacesStaleSocket(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	ln, err := Listen(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
}

func TestListenBusyBacklogIsAlive(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	for { // fill the backlog
		c, err := net.Dial("unix", path)
		if err != nil {
			break
		}
		defer c.Close()
	}
	if _, err := Listen(path, nil); !errors.Is(err, ErrListening) {
		t.Errorf("Listen: %v, want %v", err, ErrListening)
	}
}

func TestListenTwoAtOnce(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	lock, err := lockfile.Take(path + ".lock")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path, nil); !errors.Is(err, ErrListening) {
		t.Errorf("Listen while another is about to: %v, want %v", err, ErrListening)
	}
	lock.Close()

	type result struct {
		ln  net.Listener
		err error
	}
	results := make(chan result)
	const n = 16
	for range n {
		go func() {
			ln, err := Listen(path, nil)
			results <- result{ln, err}
		}()
	}
	var won []net.Listener
	for range n {
		r := <-results
		switch {
		case r.err == nil:
			won = append(won, r.ln)
		case !errors.Is(r.err, ErrListening):
			t.Errorf("Listen: %v", r.err)
		}
	}
	if len(won) != 1 {
		t.Errorf("%d of %d listen, want 1", len(won), n)
	}
	for _, ln := range won {
		ln.Close()
	}
}

func TestListenRefuses(t *testing.T) {
	dir := socketDir(t)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	datagram := filepath.Join(dir, "datagram")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: datagram, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for path, want := range map[string]string{
		"":                             "must be a path",
		"@abstract":                    "must be a path",
		"/" + strings.Repeat("x", 200): "at most 107",
		file:                           "not a socket",
		link:                           "not a socket",
		datagram:                       "cannot tell whether",
		filepath.Join(file, "s"):       "not a directory",
	} {
		ln, err := Listen(path, nil)
		if err == nil {
			ln.Close()
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Listen(%q): %v, want %q", path, err, want)
		}
	}
	for _, path := range []string{file, link, datagram} {
		if _, err := os.Lstat(path); err != nil {
			t.Errorf("after Listen: %v", err)
		}
	}
}
