package lockfile

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
)

func TestTake(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "lock")
	// As an earlier release left it.
	if err := os.WriteFile(path, []byte("123\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := Take(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v, want 0600", info.Mode(), err)
	}
	process := fmt.Sprintf("(process %d)", os.Getpid())
	var held *HeldError
	if _, err := Take(path); !errors.As(err, &held) || !strings.Contains(err.Error(), process) {
		t.Errorf("second Take: %v, want that it is held by %s", err, process)
	}
	f.Close()
	f, err = Take(path)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
}

func TestTakeDir(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "d")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	f, err := TakeDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var held *HeldError
	if _, err := TakeDir(dir); !errors.As(err, &held) || held.Path != dir || held.PID != os.Getpid() {
		t.Errorf("second TakeDir: %v, want that %s is held by this process", err, dir)
	}
	f.Close()
	if err := os.Chmod(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	if _, err := TakeDir(dir); err == nil || !strings.Contains(err.Error(), "chmod 700 "+dir) {
		t.Errorf("directory that others can open: %v", err)
	}
	if _, err := TakeDir(dir + "x"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
}

// What others have planted is neither followed nor waited for.
func TestRefuses(t *testing.T) {
	dir := t.TempDir()
	precious := filepath.Join(dir, "precious")
	if err := os.WriteFile(precious, []byte("precious"), 0o644); err != nil {
		t.Fatal(err)
	}
	link, pipe, foreign := filepath.Join(dir, "link"), filepath.Join(dir, "pipe"), filepath.Join(dir, "foreign")
	if err := errors.Join(os.Symlink(precious, link), unix.Mkfifo(pipe, 0o666)); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{link: "symbolic link", pipe: "not a file", dir: "is a directory"}
	if os.Geteuid() == 0 {
		if err := errors.Join(os.WriteFile(foreign, nil, 0o600), os.Chown(foreign, 65534, 65534)); err != nil {
			t.Fatal(err)
		}
		want[foreign] = "belongs to user 65534"
	}
	for path, text := range want {
		if f, err := Take(path); err == nil || !strings.Contains(err.Error(), text) {
			f.Close()
			t.Errorf("Take(%s): %v, want %q", path, err, text)
		}
	}
	if data, err := os.ReadFile(precious); err != nil || string(data) != "precious" {
		t.Errorf("behind the link: %q, %v", data, err)
	}
	dirLink := filepath.Join(dir, "dirlink")
	if err := os.Symlink(dir, dirLink); err != nil {
		t.Fatal(err)
	}
	if _, err := TakeDir(dirLink); err == nil {
		t.Error("TakeDir follows a symbolic link")
	}
}

func TestPrivate(t *testing.T) {
	dir := t.TempDir()
	for mode, ok := range map[os.FileMode]bool{
		0o700: true, 0o755: true, 0o775: false, 0o757: false, 0o777 | os.ModeSticky: false,
	} {
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		err := Private(dir)
		if (err == nil) != ok || err != nil && !strings.Contains(err.Error(), "chmod 755 "+dir) {
			t.Errorf("mode %v: %v, want ok %v", mode, err, ok)
		}
	}
	labtest.RequireRoot(t)
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chown(dir, 65534, -1)); err != nil {
		t.Fatal(err)
	}
	// Only root can have made it for that user, unless others may write where it is.
	if err := Private(dir); err != nil {
		t.Errorf("directory that root has given to another user: %v", err)
	}
	if err := os.Chmod(filepath.Dir(dir), 0o777); err != nil {
		t.Fatal(err)
	}
	if err := Private(dir); err == nil || !strings.Contains(err.Error(), "belongs to user 65534") {
		t.Errorf("directory of another user: %v", err)
	}
}
