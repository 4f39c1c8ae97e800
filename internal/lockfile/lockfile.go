// Package lockfile provides mutual exclusion of processes by flock(2), on files and directories
// that only their owner can open: anyone who can open a file for reading can lock it.
//
// The kernel releases a lock when its file is closed, however the process ends.
package lockfile

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// HeldError is the error of Take and TakeDir while another process holds the lock.
type HeldError struct {
	Path string
	// PID is the process, 0 if /proc/locks does not name it.
	PID int
}

func (e *HeldError) Error() string { return e.Path + " is locked" + e.Process() }

// Process is " (process 123)", or empty if unknown.
func (e *HeldError) Process() string {
	if e.PID == 0 {
		return ""
	}
	return fmt.Sprintf(" (process %d)", e.PID)
}

// Take locks the file at path, creating it (0600) if necessary. It does not follow a symbolic link,
// and refuses a file of another user, unless root takes it in a directory of that user that Private
// accepts. The file remains when it is closed: removing it could remove the next holder's lock.
func Take(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, unix.ELOOP) {
		return nil, fmt.Errorf("lock file %s is a symbolic link: remove it", path)
	}
	if err != nil {
		return nil, fmt.Errorf("open lock file: %w", err)
	}
	if err := take(f, fs.FileMode.IsRegular, "a file"); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	// Earlier releases made it 0644.
	info, err := f.Stat()
	if err == nil && info.Mode().Perm() != 0o600 {
		err = f.Chmod(0o600)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock file: %w", err), f.Close())
	}
	return f, nil
}

// TakeDir locks a directory, which must have mode 0700. It refuses one of another user, unless root
// takes it and only root can have made it for that user.
func TakeDir(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOTDIR) {
		return nil, fmt.Errorf("%s is no directory itself: want one, and no symbolic link to one", path)
	}
	if err != nil {
		return nil, fmt.Errorf("open directory: %w", err)
	}
	info, err := f.Stat()
	if err == nil && info.Mode().Perm()&0o077 != 0 {
		err = fmt.Errorf("directory %s has mode %#o, so that others can keep its lock: want 0700 (chmod 700 %s)", path, info.Mode().Perm(), path)
	}
	if err == nil {
		err = take(f, fs.FileMode.IsDir, "a directory")
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// Inherit takes over the lock of path from a process that holds it, by its open file: then both
// processes hold it, and one of them must be paused. It takes ownership of f; after an error f is
// closed, and the lock is the other process's.
func Inherit(f *os.File, path string) (*os.File, error) {
	there, err := os.Lstat(path)
	if err == nil {
		var open fs.FileInfo
		if open, err = f.Stat(); err == nil && !os.SameFile(there, open) {
			err = fmt.Errorf("what came as the lock of %s is another file", path)
		}
	}
	if err == nil {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
			err = &HeldError{Path: path, PID: holder(f)}
		}
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func take(f *os.File, isKind func(fs.FileMode) bool, kind string) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !isKind(info.Mode()) {
		return fmt.Errorf("%s is not %s: remove it, or choose another place", f.Name(), kind)
	}
	if uid := owner(info); uid != os.Geteuid() && !givenTo(uid, f.Name(), info) {
		return fmt.Errorf("%s belongs to user %d, who can open it: remove it, or choose another place", f.Name(), uid)
	}
	switch err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
	case errors.Is(err, unix.EWOULDBLOCK):
		return &HeldError{Path: f.Name(), PID: holder(f)}
	case err != nil:
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return nil
}

func owner(info fs.FileInfo) int { return int(info.Sys().(*syscall.Stat_t).Uid) }

// Private refuses a directory in which other users may create, replace or remove files.
func Private(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s is not a directory", dir)
	}
	if info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("directory %s may be written by others (mode %#o): choose one that may not, or chmod 755 %s", dir, unixMode(info.Mode()), dir)
	}
	if uid := owner(info); uid != 0 && uid != os.Geteuid() && !givenTo(uid, dir, info) {
		return fmt.Errorf("directory %s belongs to user %d: want one of root's, or of user %d's own", dir, uid, os.Geteuid())
	}
	return nil
}

// givenTo says whether root, as the caller, may use what belongs to another user: a directory that
// only root can have made for that user, as for a service, or a file in such a directory.
func givenTo(uid int, path string, info fs.FileInfo) bool {
	path, err := filepath.Abs(path)
	if err != nil || os.Geteuid() != 0 {
		return false
	}
	if !info.IsDir() {
		path = filepath.Dir(path)
		if info, err = os.Stat(path); err != nil || owner(info) != uid || info.Mode().Perm()&0o022 != 0 {
			return false
		}
	}
	parent, err := os.Stat(filepath.Dir(path))
	return err == nil && owner(parent) == 0 && parent.Mode().Perm()&0o022 == 0
}

func unixMode(m fs.FileMode) uint32 {
	mode := uint32(m.Perm())
	if m&fs.ModeSticky != 0 {
		mode |= unix.S_ISVTX
	}
	return mode
}

// holder is the process that holds the lock of a file, from proc_locks(5):
//
//	1: FLOCK  ADVISORY  WRITE 10775 00:27:17084 0 EOF
//
// with the device in hexadecimal; 0 if it is unknown, as for a process of another PID namespace.
func holder(f *os.File) int {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0
	}
	file := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	locks, err := os.Open("/proc/locks")
	if err != nil {
		return 0
	}
	defer locks.Close()
	for lines := bufio.NewScanner(locks); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) < 6 || fields[1] != "FLOCK" || fields[5] != file {
			continue
		}
		if pid, err := strconv.Atoi(fields[4]); err == nil && pid > 0 {
			return pid
		}
	}
	return 0
}
