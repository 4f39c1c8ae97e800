package loader

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
)

// answers is a kernel whose probes give these results.
func (c Capabilities) answers() *kernelProbes {
	p := probesOfKernel()
	p.multiBuffer, p.socketMultiBuffer, p.tcx = always(c.MultiBuffer), always(c.SocketMultiBuffer), always(c.TCX)
	return p
}

func always(has bool) probe { return func() (bool, error) { return has, nil } }

// The probes find the features of the running kernel.
func TestProbe(t *testing.T) {
	labtest.RequireRoot(t)
	got, err := probesOfKernel().run()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("Linux %s: %+v", kernelRelease(), got)
	major, minor := 0, 0
	if _, err := fmt.Sscanf(kernelRelease(), "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	// At least the features of that release; distributions may have backported more.
	since := func(since int) bool { return major*100+minor >= since }
	if since(518) && !got.MultiBuffer || since(606) && !got.SocketMultiBuffer || since(606) && !got.TCX {
		t.Errorf("got %+v, which is less than the release has", got)
	}
}

// A kernel that lacks something is refused with one line that names each feature and the release
// that has it, before anything is created.
func TestProbeNamesWhatIsMissing(t *testing.T) {
	needs := probesOfKernel().needs
	for missing := range 1 << len(needs) {
		p := probesOfKernel()
		for i := range p.needs {
			p.needs[i].has = always(missing&(1<<i) == 0)
		}
		_, err := p.run()
		if missing == 0 {
			continue // the others query the kernel
		}
		if !errors.Is(err, ErrNotSupported) {
			t.Fatalf("got %v, want %v", err, ErrNotSupported)
		}
		text := err.Error()
		if strings.Contains(text, "\n") || !strings.Contains(text, kernelRelease()) {
			t.Errorf("%q: want one line with the release %s", text, kernelRelease())
		}
		for i, n := range needs {
			if got, want := strings.Contains(text, n.what+", since Linux "+n.since), missing&(1<<i) != 0; got != want {
				t.Errorf("%q: names %s: %v, want %v", text, n.what, got, want)
			}
		}
	}
}

// A failed probe is an error of its own: it says nothing about the kernel, but names missing
// permissions.
func TestProbeFails(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want string
	}{
		{unix.ENOMEM, "find out whether the kernel has"},
		{unix.EPERM, "needs root, or the capabilities"},
	} {
		fails := func() (bool, error) { return false, tt.err }
		for _, p := range []*kernelProbes{
			{needs: []need{{"a thing", "9.9", fails}}},
			{multiBuffer: fails, socketMultiBuffer: always(true), tcx: always(true)},
			{multiBuffer: always(true), socketMultiBuffer: fails, tcx: always(true)},
			{multiBuffer: always(true), socketMultiBuffer: always(true), tcx: fails},
		} {
			_, err := p.run()
			if !errors.Is(err, tt.err) || errors.Is(err, ErrNotSupported) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q and %v", err, tt.want, tt.err)
			}
		}
	}
}

// Open creates nothing on a kernel that is too old.
func TestOpenOnOldKernel(t *testing.T) {
	labtest.Enter(t, labtest.Host(t, "old"))
	opts := testOptions(t)
	opts.probes = probesOfKernel()
	opts.probes.needs[len(opts.probes.needs)-1].has = always(false)
	l, err := Open(opts)
	if err == nil {
		l.Close()
	}
	if !errors.Is(err, ErrNotSupported) || !strings.Contains(err.Error(), "SO_NETNS_COOKIE") {
		t.Errorf("got %v, want %v with SO_NETNS_COOKIE", err, ErrNotSupported)
	}
	if err := Unload(opts); !errors.Is(err, ErrNotLoaded) {
		t.Errorf("unload: got %v, want %v", err, ErrNotLoaded)
	}
}
