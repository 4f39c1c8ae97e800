package labtest

import (
	"errors"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A process that is being started holds copies of this one's descriptors, also of those that are closed on execve,
// until it has called execve. Tests whose process starts others meanwhile must not rely on a close.

// WriteProgram writes a program or script that is executed later. No process is started from this one while the file
// is open for writing: execve of a file that anyone has open for writing fails with ETXTBSY (golang.org/issue/22315).
func WriteProgram(t testing.TB, path string, data []byte) {
	t.Helper()
	var err error
	WithoutForks(func() {
		if err = os.WriteFile(path, data, 0o755); err == nil {
			err = os.Chmod(path, 0o755) // whatever the umask
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}

// WithoutForks runs fn while no process is started from this one, so that what fn opens and closes - a lock, a file
// open for writing - is closed once it returns. fn must not start a process, nor end the test.
func WithoutForks(fn func()) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	fn()
}

// Unmount unmounts what is mounted on a directory, if anything is. It does without MNT_DETACH, so that a descriptor left
// open in there fails the test, and waits for copies held by processes that are being started.
func Unmount(t testing.TB, dir string) {
	t.Helper()
	err := unix.Unmount(dir, 0)
	for deadline := time.Now().Add(Timeout); errors.Is(err, unix.EBUSY) && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
		err = unix.Unmount(dir, 0)
	}
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		t.Errorf("unmount %s: %v", dir, err)
	}
}

// GrowBuffer gives a socket a receive buffer that loses nothing while its reader gets no CPU for seconds.
func GrowBuffer(t testing.TB, c syscall.Conn) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var set error
	err = raw.Control(func(fd uintptr) {
		set = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20)
	})
	if err := errors.Join(err, set); err != nil {
		t.Fatal(err)
	}
}
