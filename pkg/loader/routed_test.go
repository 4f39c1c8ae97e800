package loader

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// routedFlow mirrors a multicast route to a number of outputs.
func routedFlow(n *testLab, name string, source netip.Addr, outputs int) *flow.Flow {
	group := netip.MustParseAddr("239.1.1.1")
	f := &flow.Flow{
		Name: name, In: flow.Input{Index: n.in.Index, MAC: mac(n.in), Group: group, Source: source},
		Path: flow.PathKernel, Routed: 1, Unguarded: true,
	}
	for _, out := range n.out[:outputs] {
		f.Out = append(f.Out, flow.Output{
			Ready: true, Index: out.Index, MTU: 1500,
			Rewrite: packet.Rewrite{DstMAC: packet.MulticastMAC(group), SrcMAC: mac(out), Dst: group, PortAdd: true, TTLMode: packet.TTLDecrement},
		})
	}
	return f
}

// TestHeldRoutes: the kernel handles the packets of a routed flow from before it is published until
// it is released, and while it is held, also across a change of it and a new process; other flows
// are not affected.
func TestHeldRoutes(t *testing.T) {
	labtest.RequireRoot(t)
	n := newLab(t, 2)
	opts := testOptions(t)
	l := open(t, opts)
	attachAll(t, l, n.in, n.out[0], n.out[1])
	if err := l.MirrorUntil(time.Hour); err != nil {
		t.Fatal(err)
	}
	first, second := netip.MustParseAddr("10.0.0.5"), netip.MustParseAddr("10.0.0.6")
	frame := func(source netip.Addr) []byte {
		group := netip.MustParseAddr("239.1.1.1")
		return packet.Frame{
			SrcMAC: [6]byte{2, 0, 0, 0, 0, 1}, DstMAC: packet.MulticastMAC(group), Src: source, Dst: group,
			SrcPort: 4000, DstPort: 5000, TTL: 16, Payload: make([]byte, 40),
		}.Build()
	}
	sync := func(flows ...*flow.Flow) {
		t.Helper()
		if err := l.Sync(flows); err != nil {
			t.Fatal(err)
		}
	}
	wants := func(when string, held ...string) {
		t.Helper()
		if got := l.HeldRouted(); !slices.Equal(got, held) {
			t.Errorf("%s: %v are held, want %v", when, got, held)
		}
		r := newRunner(t, l, n.relay)
		for name, source := range map[string]netip.Addr{"a": first, "b": second} {
			want := uint32(xdpRedirect)
			if slices.Contains(held, name) {
				want = xdpPass
			}
			f := frame(source)
			if got := r.run(t, n.in.Index, f, len(f)).verdict; got != want {
				t.Errorf("%s: a packet of %s has verdict %d, want %d", when, name, got, want)
			}
		}
	}
	a, b := routedFlow(n, "a", first, 1), routedFlow(n, "b", second, 2)
	sync(a, b)
	wants("both are new", "a", "b")
	l.ReleaseRouted("a")
	l.ReleaseRouted("b")
	l.ReleaseRouted("c")
	wants("released")
	l.HoldRouted("b")
	l.HoldRouted("c")
	wants("b was held", "b")
	l.ReleaseRouted("b")
	b = routedFlow(n, "b", second, 1)
	sync(a, b)
	wants("b was changed", "b")
	l.HoldRouted("a")
	sync(a, b)
	wants("nothing was changed", "a", "b")
	closeLoader(t, l)
	l = open(t, opts)
	wants("by another process", "a", "b")
	l.ReleaseRouted("a")
	wants("a is released", "b")
	sync(a)
	l.HoldRouted("b") // its outputs are free
	sync(a, b)
	l.ReleaseRouted("b")
	wants("b is there again")
}
