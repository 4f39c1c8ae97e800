package loader

import (
	"testing"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
)

// otherTransmit is this release with other transmit programs.
func otherTransmit(t *testing.T) programSource {
	t.Helper()
	spec, err := bpf.LoadTransmit()
	if err != nil {
		t.Fatal(err)
	}
	for name := range spec.Programs {
		padded(spec, name)
	}
	return embedded{known: &definitions{transmitted: spec}}
}

// transmitting are the ids of the programs that the tracing links run.
func transmitting(t *testing.T, l *Loader) map[string]ebpf.ProgramID {
	t.Helper()
	ids := map[string]ebpf.ProgramID{}
	for name, lk := range l.transmit {
		info, err := lk.Info()
		if err != nil {
			t.Fatal(err)
		}
		ids[name] = info.Program
	}
	return ids
}

// What Open leaves for later is done by the first Observe, and what a change of rules needs by that; programs whose
// maps are others, or not all of which are attached, are not left for later.
func TestLater(t *testing.T) {
	t.Parallel()
	n := newLab(t, 2)
	opts := testOptions(t)
	opts.programs = otherTransmit(t)
	l := open(t, opts)
	attachAll(t, l, append(n.out, n.in)...)
	rules := someRules(n)
	sync1(t, l, rules...)
	old := transmitting(t, l)
	if len(old) != 4 {
		t.Fatalf("%d programs are attached", len(old))
	}

	const row = 4000
	orphan := func() (found bool) {
		t.Helper()
		var c bpf.RelayCopy
		if err := l.maps.Copies.Lookup(uint32(row), &c); err != nil {
			t.Fatal(err)
		}
		return c != bpf.RelayCopy{}
	}
	makeOrphan := func() {
		t.Helper()
		if err := l.maps.Copies.Put(uint32(row), &bpf.RelayCopy{Ifindex: 1, Same: 1}); err != nil {
			t.Fatal(err)
		}
	}
	changed := func(programs map[string]ebpf.ProgramID) (n int) {
		for name, id := range transmitting(t, l) {
			if programs[name] != id {
				n++
			}
		}
		return n
	}
	makeOrphan()
	opts.Later, opts.programs = true, nil
	closeLoader(t, l)
	l = open(t, opts)
	if changed(old) != 0 || !orphan() {
		t.Errorf("%d programs were replaced by Open, and the orphan is there: %v", changed(old), orphan())
	}
	if warnings := l.Warnings(); len(warnings) > 0 {
		t.Error(warnings)
	}
	// The same rules change nothing; others clear the rows first.
	sync1(t, l, rules...)
	if !orphan() {
		t.Error("the orphan was cleared by a Sync of nothing")
	}
	sync1(t, l, rules[1:]...)
	if orphan() {
		t.Error("the orphan is still there when rules have changed")
	}
	sync1(t, l, rules...)
	if o := l.Observe(); len(o.Errs) > 0 {
		t.Error(o.Errs)
	}
	if changed(old) != 4 {
		t.Errorf("Observe replaced %d programs, want all", changed(old))
	}
	now := transmitting(t, l)
	l.Observe()
	if changed(now) != 0 {
		t.Error("the second Observe replaced programs")
	}

	// The next one finds its own programs.
	makeOrphan()
	l = reopen(t, l)
	if l.Observe(); changed(now) != 0 || orphan() {
		t.Errorf("%d programs were replaced by Observe, and the orphan is there: %v", changed(now), orphan())
	}
	kernelFits(t, l)

	// One that is missing is attached by Open.
	if err := removePins(l.opts.PinDir + "/" + linksDir + "/" + pinDevmapXmit); err != nil {
		t.Fatal(err)
	}
	l = reopen(t, l)
	if len(transmitting(t, l)) != 4 {
		t.Errorf("%d programs are attached", len(transmitting(t, l)))
	}
}
