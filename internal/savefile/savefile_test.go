package savefile

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
)

const nobody = 65534

// asNobody calls a function on a thread with the rights of another user to files.
func asNobody(t *testing.T, do func() error) (err error) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // the thread ends with the goroutine
		if err = unix.Setfsuid(nobody); err == nil {
			err = do()
		}
	}()
	<-done
	return err
}

// A directory that cannot be synced, here since it cannot be opened, leaves the old file, and nothing else.
func TestFailedSyncChangesNothing(t *testing.T) {
	labtest.RequireRoot(t)
	for _, c := range []struct{ name, before, want string }{{"replaced", "old", "old"}, {"new", "", ""}} {
		t.Run(c.name, func(t *testing.T) {
			dir, err := os.MkdirTemp("", "savefile-")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.RemoveAll(dir) })
			path := filepath.Join(dir, "file")
			if err := os.Chown(dir, nobody, nobody); err != nil {
				t.Fatal(err)
			}
			if c.before != "" {
				if err := asNobody(t, func() error { return Write(path, []byte(c.before)) }); err != nil {
					t.Fatal(err)
				}
			}
			read := func() string {
				t.Helper()
				text, err := os.ReadFile(path)
				if err != nil && !errors.Is(err, os.ErrNotExist) {
					t.Fatal(err)
				}
				return string(text)
			}
			if err := os.Chmod(dir, 0o300); err != nil {
				t.Fatal(err)
			}
			if err := asNobody(t, func() error { return Write(path, []byte("new")) }); !errors.Is(err, os.ErrPermission) || errors.Is(err, ErrNewer) {
				t.Errorf("the error is %v, want that of the directory", err)
			}
			if got := read(); got != c.want {
				t.Errorf("after a failure the file has %q, want %q", got, c.want)
			}
			if _, err := os.Stat(path + ".next"); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("what was to replace it is left: %v", err)
			}
			if err := os.Chmod(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := asNobody(t, func() error { return Write(path, []byte("newer")) }); err != nil || read() != "newer" {
				t.Errorf("then it is %q, %v", read(), err)
			}
		})
	}
}

// A file system on which two files cannot be exchanged restores the text of the old one.
func TestRestoreText(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := errors.Join(Write(path, []byte("old")), Stage(path, []byte("new"))); err != nil {
		t.Fatal(err)
	}
	undo, err := overwrite(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"new", "old"} {
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("the file has %q, %v, want %q", got, err, want)
		}
		if want == "new" {
			if err := undo(); err != nil {
				t.Error(err)
			}
		}
	}
}

// A directory is not replaced.
func TestDirectoryStays(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := Write(path, []byte("new")); err == nil {
		t.Error("a directory was replaced")
	}
	if info, err := os.Stat(path); err != nil || !info.IsDir() {
		t.Errorf("the directory is %v, %v", info, err)
	}
}
