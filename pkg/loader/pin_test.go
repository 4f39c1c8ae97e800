package loader

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// The pins are shared: another run directory, as in another container, does not allow a second
// owner.
func TestPinsHaveOneOwnerWhateverTheRunDirectory(t *testing.T) {
	n := newLab(t, 2)
	opts := stateOptions(t)
	l := open(t, opts)
	sync1(t, l, someRules(n)...)
	before := dump(t, l)
	other := opts
	other.RunDir += "2"
	if _, err := Open(other); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), opts.PinDir) {
		t.Errorf("Open with another run directory: %v, want ErrLocked with the pin directory", err)
	}
	if err := Unload(other); !errors.Is(err, ErrLocked) {
		t.Errorf("Unload with another run directory: %v, want ErrLocked", err)
	}
	if diff := cmp.Diff(before, dump(t, l)); diff != "" {
		t.Errorf("after the refused Open (-before +after):\n%s", diff)
	}
	closeLoader(t, l)
	open(t, other)
}

// Of many processes that start at once on pins that do not exist yet, each with its own run
// directory, one gets them, and nothing half-built remains.
func TestManyStartAtOnce(t *testing.T) {
	n := newLab(t, 0)
	opts := stateOptions(t)
	closeLoader(t, open(t, opts)) // mounts
	if err := Unload(opts); err != nil {
		t.Fatal(err)
	}
	const many = 6
	loaders, errs := make([]*Loader, many), make([]error, many)
	var wg sync.WaitGroup
	for i := range many {
		wg.Go(func() {
			errs[i] = n.relay.Do(func() error {
				o := opts
				o.RunDir = filepath.Join(filepath.Dir(opts.RunDir), "run"+string(rune('a'+i)))
				var err error
				loaders[i], err = Open(o)
				return err
			})
		})
	}
	wg.Wait()
	won := 0
	for i, err := range errs {
		switch {
		case err == nil:
			won++
			defer closeLoader(t, loaders[i])
		case !errors.Is(err, ErrLocked):
			t.Errorf("Open: %v", err)
		}
	}
	if won != 1 {
		t.Errorf("%d of %d own the pins, want 1", won, many)
	}
	if left, err := filepath.Glob(opts.PinDir + stagingMark + "*"); err != nil || len(left) != 0 {
		t.Errorf("left half-built: %v, %v", left, err)
	}
}

// Only root can open the lock files, so no other user can keep the lock.
func TestLocksCannotBeOpenedByOthers(t *testing.T) {
	newLab(t, 0)
	opts := stateOptions(t)
	if err := os.Mkdir(opts.RunDir, 0o755); err != nil {
		t.Fatal(err)
	}
	// As an earlier release left it.
	if err := os.WriteFile(LockPath(opts), []byte("77\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	l := open(t, opts)
	for _, path := range []string{LockPath(opts), opts.PinDir} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: mode %v, %v, others can open it", path, info.Mode(), err)
		}
	}
	// The run directory itself can be opened: its lock must not count.
	closeLoader(t, l)
	dir, err := os.Open(opts.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Fatal(err)
	}
	l = open(t, opts)
	closeLoader(t, l)
	if err := os.Chmod(opts.PinDir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(opts); err == nil || !strings.Contains(err.Error(), "chmod 700 "+opts.PinDir) {
		t.Errorf("Open of pins that others can open: %v", err)
	}
	if err := os.Chmod(opts.PinDir, 0o700); err != nil {
		t.Fatal(err)
	}
}

func TestRunDirectoryOfOthersIsRefused(t *testing.T) {
	newLab(t, 0)
	opts := stateOptions(t)
	if err := errors.Join(os.Mkdir(opts.RunDir, 0o755), os.Chmod(opts.RunDir, 0o777|os.ModeSticky)); err != nil {
		t.Fatal(err)
	}
	precious := filepath.Join(filepath.Dir(opts.RunDir), "precious")
	if err := errors.Join(os.WriteFile(precious, []byte("precious"), 0o600), os.Symlink(precious, LockPath(opts))); err != nil {
		t.Fatal(err)
	}
	want := func(text string) {
		t.Helper()
		if l, err := Open(opts); err == nil || !strings.Contains(err.Error(), text) {
			l.Close()
			t.Errorf("Open: %v, want %q", err, text)
		}
		if data, err := os.ReadFile(precious); err != nil || string(data) != "precious" {
			t.Errorf("behind the planted link: %q, %v", data, err)
		}
	}
	want("may be written by others (mode 01777)")
	if err := os.Chmod(opts.RunDir, 0o755); err != nil {
		t.Fatal(err)
	}
	want("symbolic link")
	if err := os.Remove(LockPath(opts)); err != nil {
		t.Fatal(err)
	}
	open(t, opts)
}

// A BPF file system is mounted only where it hides nothing, and not left after an error.
func TestMountHidesNothing(t *testing.T) {
	newLab(t, 0)
	dir := t.TempDir()
	opts := Options{RunDir: filepath.Join(dir, "run")}
	for _, path := range []string{"full/bpf", "other", "file"} {
		if err := os.MkdirAll(filepath.Join(dir, path), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "full/bpf/precious"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Chdir(filepath.Join(dir, "other"))
	for _, c := range []struct{ pinDir, want string }{
		{"pins", dir + "/other is no BPF file system, and none is mounted over it, as it is not called bpf"},
		{"/xdpcast_no_such_pins", "/ is no BPF file system"},
		{filepath.Join(dir, "pins"), "as it is not called bpf"},
		{filepath.Join(dir, "new", "pins"), "as it is not called bpf"},
		{filepath.Join(dir, "full", "bpf", "pins"), "as it is not empty"},
		{filepath.Join(dir, "bpf", "with.dot"), "no dot"},
	} {
		opts.PinDir = c.pinDir
		if l, err := Open(opts); err == nil || !strings.Contains(err.Error(), c.want) {
			l.Close()
			t.Errorf("pin directory %s: %v, want %q", c.pinDir, err, c.want)
		}
	}
	// A failure after the mount undoes it.
	opts.PinDir, opts.programs = filepath.Join(dir, "a", "b", "bpf", "pins"), brokenRelease{}
	if _, err := Open(opts); !errors.Is(err, errBroken) {
		t.Errorf("Open: %v, want %v", err, errBroken)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || strings.Contains(string(mounts), dir) {
		t.Errorf("mounts below %s are left, %v:\n%s", dir, err, mounts)
	}
	if _, err := os.Lstat(filepath.Join(dir, "a")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("directories made for the mount are left: %v", err)
	}
	// A relative path keeps its meaning when the working directory changes later.
	if err := os.Mkdir(filepath.Join(dir, "bpf"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(filepath.Join(dir, "bpf"), unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	opts.PinDir, opts.programs = "../bpf/pins", nil
	l := open(t, opts)
	if want := filepath.Join(dir, "bpf", "pins"); l.opts.PinDir != want {
		t.Errorf("pin directory %s, want %s", l.opts.PinDir, want)
	}
}

// Another instance whose name looks half-built, alive or not, keeps its pins; so does one that is
// being built.
func TestSweepsOnlyWhatTheDeadLeft(t *testing.T) {
	newLab(t, 0)
	opts := stateOptions(t)
	alive := opts
	alive.PinDir += "_new_1"
	one := open(t, alive)
	stopped := opts
	stopped.PinDir += "_new_2"
	closeLoader(t, open(t, stopped))
	odd := opts
	odd.PinDir = filepath.Join(filepath.Dir(opts.PinDir), "x[ab]*")
	matched := opts
	matched.PinDir = filepath.Join(filepath.Dir(opts.PinDir), "xa_new_3")
	closeLoader(t, open(t, matched))
	building, err := newStaging(opts.PinDir)
	if err != nil {
		t.Fatal(err)
	}
	dead, err := newStaging(opts.PinDir)
	if err != nil {
		t.Fatal(err)
	}
	dead.Close()
	for _, o := range []Options{opts, odd} {
		open(t, o)
	}
	for path, want := range map[string]bool{
		alive.PinDir: true, stopped.PinDir: true, matched.PinDir: true, building.Name(): true, dead.Name(): false,
	} {
		if _, err := os.Stat(filepath.Join(path)); (err == nil) != want {
			t.Errorf("%s is there: %v, want %v", path, err == nil, want)
		}
	}
	if _, err := one.Stats(); err != nil {
		t.Error(err)
	}
	building.Close()
}

// File names in the run directory are unique to one pin directory.
func TestRunFilesOfTwoPinDirectoriesDiffer(t *testing.T) {
	seen := map[string]string{}
	for _, pins := range []string{DefaultPinDir, "/sys/fs/bpf/two", "/sys/fs/bpf-two", "/sys/fs-bpf/two", "/sys/fs/bpf%2dtwo", "/a/%2d", "/a/-", "/a//b", "/a-b"} {
		for _, kind := range []string{RunFile("/run", pins, "api-rules.yaml"), LockPath(Options{RunDir: "/run", PinDir: pins})} {
			if other, taken := seen[kind]; taken || filepath.Dir(kind) != "/run" {
				t.Errorf("%s and %s share %s", pins, other, kind)
			}
			seen[kind] = pins
		}
	}
	if got := RunFile("/run/xdpcast", DefaultPinDir+"/", "api-rules.yaml"); got != "/run/xdpcast/api-rules.yaml" {
		t.Errorf("for the default pin directory: %s", got)
	}
}
