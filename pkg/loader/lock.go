package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"xdpcast/internal/lockfile"
)

// Locks are the open lock files with which a Loader excludes other writers. The locks are held as
// long as a process has the files open.
type Locks struct{ Run, Pins *os.File }

// Close closes the files that are set.
func (l Locks) Close() error { return (&locks{l.Run, l.Pins}).Close() }

// Locks returns duplicates of the open lock files, to be inherited by another Loader while this one
// is paused (Options.Inherited). The caller closes them.
func (l *Loader) Locks() (held Locks, err error) { return l.lock.duplicates() }

func (l *locks) duplicates() (held Locks, err error) {
	if held.Run, err = duplicate(l.run); err != nil {
		return held, err
	}
	if held.Pins, err = duplicate(l.pins); err != nil {
		return held, errors.Join(err, held.Run.Close())
	}
	return held, nil
}

func duplicate(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("duplicate the lock %s: %w", f.Name(), err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// locks exclude other writers: the lock of the run directory's files, which belong to one pin
// directory, and that of the pin directory itself, which processes with other run directories may
// share. Either may be nil.
type locks struct{ run, pins *os.File }

// Close releases the locks.
func (l *locks) Close() error {
	var errs []error
	for _, f := range []*os.File{l.pins, l.run} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	*l = locks{}
	return errors.Join(errs...)
}

// firstReleased is above the numbers of other descriptors: the kernel closes the files of a killed process from the
// highest number on, see hold.NewLife.
const firstReleased = 7168

// ReleaseFirst makes the kernel release the locks before it closes anything else, should the process be killed: for one
// that waits to go on.
func (l *Loader) ReleaseFirst() {
	var limit unix.Rlimit
	least := firstReleased
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err == nil {
		least = int(min(limit.Cur/8*7, firstReleased))
	}
	for _, f := range []**os.File{&l.lock.run, &l.lock.pins} {
		if *f == nil || int((*f).Fd()) >= least {
			continue
		}
		fd, err := unix.FcntlInt((*f).Fd(), unix.F_DUPFD_CLOEXEC, least)
		if err != nil {
			l.log.Debug("a lock has no high descriptor", "error", err)
			continue
		}
		high := os.NewFile(uintptr(fd), (*f).Name())
		if err := (*f).Close(); err != nil {
			l.log.Debug("close the lower descriptor of a lock", "error", err)
		}
		*f = high
	}
}

// dropPins releases the lock of the pin directory.
func (l *locks) dropPins() error {
	f := l.pins
	l.pins = nil
	return f.Close()
}

// renew locks the pin directory again if it was removed and re-created since it was locked.
func (l *locks) renew(opts Options) error {
	same, err := isAt(l.pins, opts.PinDir)
	if err != nil || same {
		return err
	}
	f, err := takePinLock(opts)
	if err != nil {
		return err
	}
	old := l.pins
	l.pins = f
	return old.Close()
}

// LockPath is the lock file of a pin directory: RunDir/sys-fs-bpf-xdpcast.lock for
// /sys/fs/bpf/xdpcast.
func LockPath(opts Options) string { return filepath.Join(opts.RunDir, runName(opts.PinDir)+".lock") }

// takeRunLock locks the run directory's files of a pin directory. It creates the directory if
// necessary, and refuses one in which other users could plant files.
func takeRunLock(opts Options) (*os.File, error) {
	if err := os.MkdirAll(opts.RunDir, 0o755); err != nil {
		return nil, fmt.Errorf("make run directory: %w", err)
	}
	if err := lockfile.Private(opts.RunDir); err != nil {
		return nil, fmt.Errorf("run directory: %w", err)
	}
	if f := opts.Inherited.Run; f != nil {
		f, err := lockfile.Inherit(f, LockPath(opts))
		return f, lockError(opts, err)
	}
	f, err := lockfile.Take(LockPath(opts))
	return f, lockError(opts, err)
}

// takePinLock locks an existing pin directory. The error matches os.ErrNotExist if there is none.
func takePinLock(opts Options) (*os.File, error) {
	if f := opts.Inherited.Pins; f != nil {
		f, err := lockfile.Inherit(f, opts.PinDir)
		return f, lockError(opts, err)
	}
	for {
		f, err := lockfile.TakeDir(opts.PinDir)
		if err != nil {
			return nil, lockError(opts, err)
		}
		same, err := isAt(f, opts.PinDir)
		if err == nil && same {
			return f, nil
		}
		// It was unloaded, and perhaps re-created, between opening and locking.
		if err := errors.Join(err, f.Close()); err != nil {
			return nil, err
		}
	}
}

// isAt says whether a path still refers to an open file.
func isAt(f *os.File, path string) (bool, error) {
	var open, there unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &open); err != nil {
		return false, fmt.Errorf("stat %s: %w", path, err)
	}
	err := unix.Lstat(path, &there)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("stat %s: %w", path, err)
	}
	return open.Dev == there.Dev && open.Ino == there.Ino, nil
}

func lockError(opts Options, err error) error {
	var held *lockfile.HeldError
	if errors.As(err, &held) {
		return fmt.Errorf("%w %s%s", ErrLocked, opts.PinDir, held.Process())
	}
	return err
}

// RunFile is the path of a file in the run directory, such as api-rules.yaml, that belongs to a pin
// directory, so that daemons with different pins can share a run directory. For the default pin
// directory it is the name alone, for /sys/fs/bpf/two it is sys-fs-bpf-two.api-rules.yaml.
func RunFile(runDir, pinDir, name string) string {
	if filepath.Clean(pinDir) != DefaultPinDir {
		name = runName(pinDir) + "." + name
	}
	return filepath.Join(runDir, name)
}

// runName encodes a pin directory as a file name, without collisions: '/' becomes '-', and '-' is
// escaped.
func runName(pinDir string) string {
	var name []byte
	for i, c := range []byte(filepath.Clean(pinDir)) {
		switch {
		case c == '/' && i == 0:
		case c == '/':
			name = append(name, '-')
		case c == '-' || c == '%':
			name = fmt.Appendf(name, "%%%02x", c)
		default:
			name = append(name, c)
		}
	}
	return string(name)
}
