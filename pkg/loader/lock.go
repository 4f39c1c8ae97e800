package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// lockPath names the lock file of a pin directory: /sys/fs/bpf/xdpcast has
// RunDir/sys-fs-bpf-xdpcast.lock.
func lockPath(opts Options) string {
	name := strings.ReplaceAll(strings.Trim(filepath.Clean(opts.PinDir), "/"), "/", "-")
	return filepath.Join(opts.RunDir, name+".lock")
}

// takeLock keeps two writers of one pin directory apart. The kernel gives the
// lock back when the file is closed, in whatever way the process ends.
func takeLock(opts Options) (*os.File, error) {
	if err := os.MkdirAll(opts.RunDir, 0o755); err != nil {
		return nil, fmt.Errorf("make run directory: %w", err)
	}
	path := lockPath(opts)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open lock file: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		holder := lockHolder(f)
		closeErr := f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.Join(fmt.Errorf("%w %s%s", ErrLocked, opts.PinDir, holder), closeErr)
		}
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), closeErr)
	}
	// The number only tells people who holds the lock; nothing depends on it.
	if err := f.Truncate(0); err == nil {
		_, _ = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	return f, nil
}

func lockHolder(f *os.File) string {
	buf := make([]byte, 16)
	n, _ := f.ReadAt(buf, 0)
	if pid, err := strconv.Atoi(strings.TrimSpace(string(buf[:n]))); err == nil {
		return fmt.Sprintf(" (process %d)", pid)
	}
	return ""
}
