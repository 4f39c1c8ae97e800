// Package savefile replaces files atomically: a reader, or a crash, sees the old file or the new
// one, and after success the new one is on disk.
package savefile

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Stage writes data to path.next and syncs it, for Commit to rename. It creates the directory if
// necessary, and does not follow links.
func Stage(path string, data []byte) error { return StageParts(path, [][]byte{data}) }

// StageParts is Stage for the concatenated parts.
func StageParts(path string, parts [][]byte) error {
	next := path + ".next"
	if err := os.MkdirAll(filepath.Dir(next), 0o755); err != nil {
		return err
	}
	if err := os.Remove(next); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err // left by a dead process
	}
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err = write(f, parts); err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		Discard(path)
	}
	return err
}

// buffered is how many bytes are collected for one system call.
const buffered = 256 << 10

func write(to io.Writer, parts [][]byte) error {
	if len(parts) == 1 {
		_, err := to.Write(parts[0])
		return err
	}
	b := bufio.NewWriterSize(to, buffered)
	for _, p := range parts {
		if _, err := b.Write(p); err != nil {
			return err
		}
	}
	return b.Flush()
}

// Discard removes what Stage wrote.
func Discard(path string) { _ = os.Remove(path + ".next") }

// ErrNewer is matched by the error of a Commit that has failed and left the new file.
var ErrNewer = errors.New("the file is the new one")

// Commit puts path.next in the place of path, and syncs the directory. After an error the file is the old one, unless the
// error matches ErrNewer; a host that loses power then may come back with either.
func Commit(path string) error {
	undo, err := replace(path)
	if err == nil {
		if err = syncDir(filepath.Dir(path)); err != nil {
			if failed := undo(); failed != nil {
				err = errors.Join(err, fmt.Errorf("%w: %w", ErrNewer, failed))
			}
		}
	}
	Discard(path)
	return err
}

// replace puts path.next in the place of path, which it leaves at path.next if it can, for undo.
func replace(path string) (undo func() error, err error) {
	next := path + ".next"
	exchange := func() error { return unix.Renameat2(unix.AT_FDCWD, next, unix.AT_FDCWD, path, unix.RENAME_EXCHANGE) }
	info, err := os.Lstat(path)
	if err == nil && !info.IsDir() {
		if err = exchange(); err == nil {
			return exchange, nil
		}
	}
	if errors.Is(err, os.ErrNotExist) {
		return func() error { return os.Remove(path) }, os.Rename(next, path)
	}
	return overwrite(path)
}

// overwrite is replace on a file system that cannot exchange two files.
func overwrite(path string) (undo func() error, err error) {
	old, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return func() error {
		if err := Stage(path, old); err != nil {
			return err
		}
		return os.Rename(path+".next", path)
	}, os.Rename(path+".next", path)
}

// Write is Stage and Commit.
func Write(path string, data []byte) error { return WriteParts(path, [][]byte{data}) }

// WriteParts is Write for the concatenated parts.
func WriteParts(path string, parts [][]byte) error {
	if err := StageParts(path, parts); err != nil {
		return err
	}
	return Commit(path)
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
