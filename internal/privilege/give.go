package privilege

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// Give creates a directory with a mode unless it exists, and chowns it and everything in it to a
// user and group, if Ours accepts that. Only root can do it.
//
// Symbolic links are chowned, not followed: a user who could write in the directory earlier may
// have planted them.
func Give(dir string, mode fs.FileMode, uid, gid int, ours func(name string) bool) error {
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		if err := makeDir(dir, mode); err != nil {
			return err
		}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	err = give(root, uid, gid, ours)
	return errors.Join(err, root.Close())
}

// Ours refuses a directory that others also use, such as /run: one with a name for which ours
// returns false. It also refuses hard links of files, which may refer to any file. A missing
// directory is accepted.
func Ours(dir string, ours func(name string) bool) error {
	root, err := os.OpenRoot(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = others(root, -1, -1, ours)
	return errors.Join(err, root.Close())
}

func makeDir(dir string, mode fs.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(dir, mode); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return os.Chmod(dir, mode) // regardless of the umask
}

func give(root *os.Root, uid, gid int, ours func(name string) bool) error {
	paths, err := others(root, uid, gid, ours)
	if err != nil {
		return err
	}
	for _, path := range paths {
		if err := root.Lchown(path, uid, gid); err != nil {
			return fmt.Errorf("give it to user %d: %w", uid, err)
		}
	}
	return nil
}

// others lists what does not belong to a user and group yet.
func others(root *os.Root, uid, gid int, ours func(name string) bool) (paths []string, err error) {
	err = fs.WalkDir(root.FS(), ".", func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if top, _, _ := strings.Cut(path, "/"); path != "." && !ours(top) {
			return fmt.Errorf("directory %s has %s, which is not of xdpcast: want a directory for xdpcast alone", root.Name(), top)
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		switch {
		case info.Mode().IsRegular() && st.Nlink > 1:
			return fmt.Errorf("file %s has %d hard links: remove it", filepath.Join(root.Name(), path), st.Nlink)
		case int(st.Uid) != uid || int(st.Gid) != gid:
			paths = append(paths, path)
		}
		return nil
	})
	return paths, err
}
