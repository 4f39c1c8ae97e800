package relay

import (
	"testing"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/loader"
)

// What a device can do is asked again when the kernel tells that it has changed: a rule
// that left the kernel path since its output could not send goes back there.
func TestFeaturesChange(t *testing.T) {
	p := newPlace(t)
	gro := func(on bool) {
		t.Helper()
		labtest.Do(t, p.peer, func() error { return lab.SetGRO("out0", on) })
	}
	gro(false)
	r := p.start()
	r.mustAdd("r", "239.1.1.1:5000%in0", "239.2.2.2:6000%out0")
	path := func(want loader.Path) func() bool {
		return func() bool {
			k := r.kernel("r")
			return k != nil && k.Path == want
		}
	}
	labtest.Eventually(t, "the rule is on the afxdp path", path(loader.PathAFXDP))
	gro(true)
	labtest.Eventually(t, "the rule is on the kernel path", path(loader.PathKernel))
}
