package loader

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/bpf"
)

func TestMissingCapabilitiesAreNamed(t *testing.T) {
	bit := func(numbers ...uint) (set uint64) {
		for _, n := range numbers {
			set |= 1 << n
		}
		return set
	}
	const all = 1<<41 - 1
	for _, tt := range []struct {
		without       uint64
		warning, fail string
	}{
		{0, "", ""},
		{bit(unix.CAP_BPF, unix.CAP_PERFMON), "", ""}, // included in CAP_SYS_ADMIN
		{bit(unix.CAP_SYS_ADMIN), "", ""},
		{bit(unix.CAP_SYS_ADMIN, unix.CAP_BPF), "", "without CAP_BPF (see"},
		{bit(unix.CAP_SYS_ADMIN, unix.CAP_PERFMON), "", "without CAP_PERFMON (see"},
		{bit(unix.CAP_NET_ADMIN), "", "without CAP_NET_ADMIN (see"},
		{bit(unix.CAP_NET_RAW), "without CAP_NET_RAW the paths afxdp and fanout do not work", ""},
		{all, "", "without CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN (see"},
	} {
		warning, err := capabilitiesIn(all &^ tt.without)
		if warning != tt.warning || (err == nil) != (tt.fail == "") || err != nil && (!strings.Contains(err.Error(), tt.fail) || !errors.Is(err, os.ErrPermission)) {
			t.Errorf("without %#x: %q, %v, want %q, %q", tt.without, warning, err, tt.warning, tt.fail)
		}
	}
}

// onThread runs fn on a thread that ends with it.
func onThread(t *testing.T, fn func() error) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked
		done <- fn()
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// Open itself checks, before it touches anything.
func TestOpenWithoutCapabilities(t *testing.T) {
	newLab(t, 0)
	opts := testOptions(t)
	onThread(t, func() error {
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		if err := unix.Capget(&header, &data[0]); err != nil {
			return err
		}
		for _, n := range []int{unix.CAP_SYS_ADMIN, unix.CAP_BPF, unix.CAP_PERFMON} {
			data[n/32].Effective &^= 1 << (n % 32)
		}
		if err := unix.Capset(&header, &data[0]); err != nil {
			return err
		}
		if _, err := Open(opts); err == nil || !strings.Contains(err.Error(), "without CAP_BPF, CAP_PERFMON (see capabilities(7))") {
			t.Errorf("Open: %v, want that it names CAP_BPF and CAP_PERFMON", err)
		}
		return nil
	})
	if _, err := os.Stat(opts.RunDir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the refused Open has made the run directory: %v", err)
	}
}

func TestPrivateMountIsWarnedOf(t *testing.T) {
	n := newLab(t, 0)
	opts := stateOptions(t)
	for _, w := range open(t, opts).Warnings() {
		t.Errorf("warning %q", w)
	}
	other := stateOptions(t)
	onThread(t, func() error {
		if err := unix.Setns(n.relay.FD(), unix.CLONE_NEWNET); err != nil {
			return err
		}
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return err
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return err
		}
		l, err := Open(other)
		if err != nil {
			return err
		}
		warnings := l.Warnings()
		if !slices.ContainsFunc(warnings, func(w string) bool {
			return strings.Contains(w, other.PinDir+" is mounted in this mount namespace alone") && strings.Contains(w, "nsenter --net=")
		}) {
			t.Errorf("warnings %q, want one of the mount", warnings)
		}
		return l.Close()
	})
}

// The error names a removed pin, and what to do.
func TestMissingPinIsNamed(t *testing.T) {
	for _, pin := range []string{bpf.RelayMapConfig, bpf.RelayMapOutputs, "programs/relay", "programs/egress", "links"} {
		t.Run(filepath.Base(pin), func(t *testing.T) {
			newLab(t, 0)
			opts := stateOptions(t)
			closeLoader(t, open(t, opts))
			path := filepath.Join(opts.PinDir, pin)
			if err := os.RemoveAll(path); err != nil {
				t.Fatal(err)
			}
			want := "pinned state is damaged (" + opts.PinDir + "): pin " + path + ` is missing; "xdpcast unload --all --pin-dir ` + opts.PinDir + `" removes it, and ends its relaying`
			if _, err := Open(opts); err == nil || err.Error() != want {
				t.Errorf("Open: %v\nwant %s", err, want)
			}
			if err := Unload(opts); err != nil {
				t.Errorf("Unload: %v", err)
			}
			closeLoader(t, open(t, opts))
		})
	}
}
