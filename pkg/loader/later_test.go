package loader

import (
	"testing"

	"xdpcast/bpf"
)

// What Open leaves for later is done by the first Observe, and before that by a Sync that changes rules.
func TestLater(t *testing.T) {
	t.Parallel()
	n := newLab(t, 2)
	opts := testOptions(t)
	opts.Later = true
	l := open(t, opts)
	attachAll(t, l, append(n.out, n.in)...)
	rules := someRules(n)
	sync1(t, l, rules...)

	const row = 4000
	orphan := func() (found bool) {
		t.Helper()
		var c bpf.RelayCopy
		if err := l.maps.Copies.Lookup(uint32(row), &c); err != nil {
			t.Fatal(err)
		}
		return c != bpf.RelayCopy{}
	}
	leaveOne := func() {
		t.Helper()
		if err := l.maps.Copies.Put(uint32(row), &bpf.RelayCopy{Ifindex: 1, Same: 1}); err != nil {
			t.Fatal(err)
		}
		l = reopen(t, l)
		if !orphan() {
			t.Error("Open has cleared the row")
		}
	}
	leaveOne()
	sync1(t, l, rules...)
	if !orphan() {
		t.Error("the row was cleared by a Sync of nothing")
	}
	sync1(t, l, rules[1:]...)
	if orphan() {
		t.Error("the row is still there when rules have changed")
	}
	sync1(t, l, rules...)

	leaveOne()
	if o := l.Observe(); len(o.Errs) > 0 || orphan() {
		t.Errorf("Observe has left the row, or failed: %v", o.Errs)
	}
	kernelFits(t, l)
}
