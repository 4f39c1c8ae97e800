package relay

import (
	"strings"
	"testing"
	"time"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
)

// What a device can do is asked again when the kernel tells that it has changed: a rule
// that left the kernel path since its output could not send goes back there.
func TestFeaturesChange(t *testing.T) {
	p := newPlace(t)
	labtest.NeedsKernel(t, labtest.DevicesTellFeatures(t, p.host), "XDP features of devices", "6.3")
	gro := func(on bool) {
		t.Helper()
		labtest.Do(t, p.peer, func() error { return lab.SetGRO("out0", on) })
	}
	gro(false)
	r := p.start()
	r.mustAdd("r", "239.1.1.1:5000%in0", "239.2.2.2:6000%out0")
	path := func(want flow.Path) func() bool {
		return func() bool {
			k := r.kernel("r")
			return k != nil && k.Path == want
		}
	}
	labtest.Eventually(t, "the rule is on the afxdp path", path(flow.PathAFXDP))
	gro(true)
	labtest.Eventually(t, "the rule is on the kernel path", path(flow.PathKernel))
}

// Native mode that the driver refused is tried again once nothing flows: never while the interface
// carries packets, since the change loses some.
func TestNativeModeOncePossible(t *testing.T) {
	p := newQuickPlace(t)
	p.connectQueues("inq", "10.4.0.1/24", "10.4.0.2/24", 2)
	labtest.Do(t, p.host, func() error { return lab.SetChannels("inq", 1, 2) })
	r := p.start()
	rule := stream("r", "inq", "239.1.1.1", to("out0", "239.2.2.1"))
	r.mustPut(rule)
	mode := func() (mode string, link uint32, note string) {
		t.Helper()
		status, err := r.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range status.Interfaces {
			if i.Name == "inq" {
				return i.Mode, i.LinkID, i.Note
			}
		}
		return "", 0, ""
	}
	found, link, note := mode()
	if want := "too few queues"; found != "generic" || !strings.Contains(note, want) {
		t.Fatalf("mode is %s (%s), want generic: %s", found, note, want)
	}
	looked := func() {
		t.Helper()
		for range 2 {
			var at time.Time
			if err := r.do(t.Context(), func() error { at = r.observed; return nil }); err != nil {
				t.Fatal(err)
			}
			labtest.Eventually(t, "the relay has looked at everything", func() bool {
				after := at
				_ = r.do(t.Context(), func() error { after = r.observed; return nil })
				return after.After(at)
			})
		}
	}
	labtest.Do(t, p.peer, func() error { return lab.SetChannels("inq", 2, 1) })
	looked()
	if found, now, _ := mode(); found != "generic" || now != link {
		t.Errorf("mode is %s on link %d, want generic on link %d while packets may flow", found, now, link)
	}
	p.arrives("in generic mode", "239.1.1.1:5000%inq", "239.2.2.1:6000%out0")
	if err := p.peer.SetUp("inq", false); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "native mode", func() bool { found, _, note := mode(); return found == "native" && note == "" })
	if err := p.peer.SetUp("inq", true); err != nil {
		t.Fatal(err)
	}
	r.waitRule("r", "kernel")
	p.arrives("in native mode", "239.1.1.1:5000%inq", "239.2.2.1:6000%out0")

	// What is still refused is tried seldom, and what was attached is attached again.
	if err := p.host.SetUp("inq", false); err != nil {
		t.Fatal(err)
	}
	r.stop()
	if err := loader.Unload(p.opts.Loader); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "the kernel has detached the program", func() bool {
		return p.peer.Do(func() error { return lab.SetChannels("inq", 2, 2) }) == nil
	})
	r = p.start()
	looked()
	tries := func() (n int) {
		if err := r.do(t.Context(), func() error {
			for _, try := range r.attachments.notNative {
				n = try.tries
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return n
	}
	r.mustPut(rule)
	if found, _, note := mode(); found != "generic" || !strings.Contains(note, "too few queues") || tries() > 2 {
		t.Errorf("mode is %s (%s) after %d tries", found, note, tries())
	}
	labtest.Do(t, p.peer, func() error { return lab.SetChannels("inq", 2, 1) })
	labtest.Eventually(t, "native mode by the next try", func() bool { found, _, _ := mode(); return found == "native" })
	if n := tries(); n != 0 {
		t.Errorf("%d tries are remembered", n)
	}
}
