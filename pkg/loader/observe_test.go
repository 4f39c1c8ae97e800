package loader

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"xdpcast/bpf"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
)

// nothingIsLost checks that everything is as it was left.
func nothingIsLost(t *testing.T, l *Loader) {
	t.Helper()
	if diff := cmp.Diff(Observation{}, l.Observe(), cmp.Comparer(func(a, b error) bool { return a == b })); diff != "" {
		t.Errorf("not as it was left:\n%s", diff)
	}
}

// away moves every interface of the relay out of the network namespace and back, with the same
// index.
func (n *testLab) away(t *testing.T) {
	t.Helper()
	other := labtest.Host(t, "away")
	ends := []lab.End{{Host: n.relay, Name: "in", Addrs: []string{"10.0.0.2/24"}}}
	for _, o := range n.out {
		ends = append(ends, lab.End{Host: n.relay, Name: o.Name})
	}
	for _, e := range ends {
		if err := n.relay.Excursion(e, other); err != nil {
			t.Fatal(err)
		}
	}
}

// What the kernel dropped with an interface that returned with its index is detected and restored,
// also by the next process, and packets flow.
func TestInterfacesGoAndComeBack(t *testing.T) {
	t.Parallel()
	n := newLab(t, 2)
	l := open(t, testOptions(t))
	attachAll(t, l, append(n.out, n.in)...)
	sync1(t, l, someRules(n)...)
	nothingIsLost(t, l)
	flows := func() {
		t.Helper()
		attachAll(t, l, append(n.out, n.in)...)
		nothingIsLost(t, l)
		for _, i := range append(n.out, n.in) {
			if xdpProgram(t, i.Index) != uint32(programID(t, l.relay)) {
				t.Errorf("%s does not run the relay program", i.Name)
			}
		}
		one, two := startStream(t, n, "239.1.1.1", 1), startStream(t, n, "239.1.1.2", 1, 1)
		one.more()
		two.more()
		one.finish()
		two.finish()
	}
	flows()
	before := dump(t, l)
	n.away(t)
	o := l.Observe()
	if len(o.Errs) != 0 || !strings.Contains(strings.Join(o.Repaired, "\n"), "out0") {
		t.Errorf("observed %+v", o)
	}
	flows()
	if diff := cmp.Diff(before, dump(t, l)); diff != "" {
		t.Errorf("the state (-before +after):\n%s", diff)
	}
	n.away(t)
	l = reopen(t, l) // not by Observe
	flows()
}

// An interface that is deleted and recreated with the same index is a different one for all of
// Observe, Attach, and the next process.
func TestInterfaceIsMadeAgain(t *testing.T) {
	t.Parallel()
	n := newLab(t, 2)
	l := open(t, testOptions(t))
	attachAll(t, l, append(n.out, n.in)...)
	sync1(t, l, someRules(n)...)
	again := func() {
		t.Helper()
		if err := n.relay.Netlink().LinkDel(linkOf(t, n.relay, "out1")); err != nil {
			t.Fatal(err)
		}
		labtest.Connect(t, lab.End{Host: n.relay, Name: "out1", Index: n.out[1].Index}, lab.End{Host: n.sinks[1], Name: "eth0"})
	}
	again()
	o := l.Observe()
	if len(o.Lost) != 1 || o.Lost[0].Index != n.out[1].Index || len(o.Errs) != 0 {
		t.Errorf("observed %+v", o)
	}
	flows := func() {
		t.Helper()
		attachAll(t, l, append(n.out, n.in)...)
		if xdpProgram(t, n.out[1].Index) != uint32(programID(t, l.relay)) {
			t.Error("out1 does not run the relay program")
		}
		l.Observe()
		nothingIsLost(t, l)
		two := startStream(t, n, "239.1.1.2", 1, 1)
		two.more()
		two.finish()
	}
	flows()
	again()
	flows() // Attach has checked first
	again()
	l = reopen(t, l)
	flows()
}

// A link that was detached by force is detected, and attached again.
func TestForcedDetach(t *testing.T) {
	t.Parallel()
	n := newLab(t, 1)
	l := open(t, testOptions(t))
	attachAll(t, l, n.in)
	local := tapRule("r", input(n.in, "239.1.1.1", "", 5000))
	sync1(t, l, local)
	for what, pin := range map[string]string{"XDP": linkPin(l.opts.PinDir, n.in.Index), "tcx": tappedPin(l.opts.PinDir, n.in.Index)} {
		lk, err := link.LoadPinnedLink(pin, nil)
		if err == nil {
			err = errors.Join(lk.Detach(), lk.Close())
		}
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	o := l.Observe()
	if len(o.Lost) != 1 || o.Lost[0].Interface != "in" || len(o.Repaired) != 1 || len(o.Errs) != 0 {
		t.Errorf("observed %+v", o)
	}
	if len(l.Attachments()) != 0 || len(tappedOn(t, n.in)) != 1 {
		t.Errorf("attached %v, tcx %v", l.Attachments(), tappedOn(t, n.in))
	}
	attachAll(t, l, n.in)
	nothingIsLost(t, l)
	if xdpProgram(t, n.in.Index) == 0 {
		t.Error("no program runs")
	}
}

// If another process updates a link with another program, the relay program is put back.
func TestForeignUpdateOfLink(t *testing.T) {
	t.Parallel()
	n := newLab(t, 1)
	l := open(t, testOptions(t))
	attachAll(t, l, n.in)
	other, err := otherRelease{}.relay(l.maps, l.can, nil)
	if err == nil {
		err = errors.Join(l.links[n.in.Index].link.Update(other), other.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	if o := l.Observe(); len(o.Repaired) != 1 || len(o.Lost) != 0 || len(o.Errs) != 0 {
		t.Errorf("observed %+v", o)
	}
	if got, want := xdpProgram(t, n.in.Index), uint32(programID(t, l.relay)); got != want {
		t.Errorf("program %d runs, want %d", got, want)
	}
	nothingIsLost(t, l)
}

// Removed pins, one by one or all, are restored, and the next process adopts them.
func TestPinsAreRemoved(t *testing.T) {
	t.Parallel()
	n := newLab(t, 2)
	l := open(t, stateOptions(t))
	attachAll(t, l, append(n.out, n.in)...)
	rules := append(someRules(n), tapRule("tap", input(n.in, "239.9.9.9", "", 5000)))
	sync1(t, l, rules...)
	pins := pinsBelow(t, l.opts.PinDir)
	check := func(what string, removed int) {
		t.Helper()
		o := l.Observe()
		if len(o.Repaired) != 1 || len(o.Errs) != 0 || len(o.Lost) != 0 {
			t.Errorf("%s: observed %+v", what, o)
		}
		if diff := cmp.Diff(pins, pinsBelow(t, l.opts.PinDir)); diff != "" {
			t.Errorf("%s: pins (-before +after):\n%s", what, diff)
		}
		nothingIsLost(t, l)
	}
	for round := range 2 { // restored pins can be removed again
		for _, pin := range pins[1:] {
			if err := os.RemoveAll(pin); err != nil {
				t.Fatal(err)
			}
			check(pin, 1)
		}
		if err := os.RemoveAll(l.opts.PinDir); err != nil {
			t.Fatal(err)
		}
		check("all", round)
		before := dump(t, l)
		l = reopen(t, l)
		if diff := cmp.Diff(before, dump(t, l)); diff != "" {
			t.Errorf("adopted (-before +after):\n%s", diff)
		}
	}
}

// A map config overwritten by another process is corrected.
func TestConfigIsChanged(t *testing.T) {
	t.Parallel()
	n := newLab(t, 1)
	l := open(t, stateOptions(t))
	sync1(t, l, someRulesOn1(n)...)
	before := dump(t, l)
	var config bpf.RelayConfig
	config.Schema = bpf.Schema
	if err := l.maps.Config.Put(uint32(0), &config); err != nil {
		t.Fatal(err)
	}
	if o := l.Observe(); len(o.Repaired) != 1 || len(o.Errs) != 0 {
		t.Errorf("observed %+v", o)
	}
	if diff := cmp.Diff(before, dump(t, l)); diff != "" {
		t.Errorf("the state (-before +after):\n%s", diff)
	}
}

func someRulesOn1(n *testLab) []flow.Flow {
	return []flow.Flow{{Name: "one", In: input(n.in, "239.1.1.1", "", 5000), Out: []flow.Output{output(n.out[0], "239.2.2.1", "10.1.0.1", 6000)}}}
}

// Very many devmaps are checked in turn, each sooner or later.
func TestManyDevmapsAreObserved(t *testing.T) {
	t.Parallel()
	n := newLab(t, 1)
	opts := stateOptions(t)
	opts.MaxOutputs = 1 << 16
	l := open(t, opts)
	var rules []flow.Flow
	for i := range 300 { // as many different devmaps, with more rows than one Observe reads
		r := flow.Flow{Name: "r" + string(rune('A'+i)), In: input(n.in, "239.1.1.1", "", uint16(5000+i))}
		for port := range 2 + i%60 {
			o := output(n.out[0], "239.2.2.1", "10.1.0.1", uint16(6000+port))
			if o.Ready = port != 0; !o.Ready {
				o.Index = 0
			}
			r.Out = append(r.Out, o)
		}
		rules = append(rules, r)
	}
	sync1(t, l, rules...)
	seen := map[string]bool{}
	for range len(l.broadcasts) {
		l.Observe()
		seen[l.broadcastCursor] = true
	}
	nothingIsLost(t, l)
	if len(seen) == 0 {
		t.Error("no devmap was looked at")
	}
}

// State of another network namespace is refused, with advice, while it serves an interface, and
// removed once that namespace is gone.
func TestNamespaceIsGone(t *testing.T) {
	t.Parallel()
	n := newLab(t, 1)
	container := labtest.Host(t, "gone")
	labtest.Connect(t, lab.End{Host: container, Name: "eth0"}, lab.End{Host: n.relay, Name: "veth0"})
	opts := stateOptions(t)
	labtest.Do(t, container, func() error {
		l, err := Open(opts)
		if err != nil {
			return err
		}
		_, err = l.Attach(iface(t, "eth0").Index, ModeNative)
		return errors.Join(err, l.Close())
	})
	r, err := OpenReader(opts.PinDir)
	if err != nil {
		t.Fatal(err)
	}
	if here, err := r.Here(); err != nil || here {
		t.Errorf("the state is called this namespace's: %v, %v", here, err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = Open(opts)
	if !errors.Is(err, ErrForeignNamespace) || !strings.Contains(err.Error(), "unload --all --pin-dir "+opts.PinDir) {
		t.Errorf("Open: %v, want ErrForeignNamespace and what to do", err)
	}
	if err := n.relay.Netlink().LinkDel(linkOf(t, n.relay, "veth0")); err != nil {
		t.Fatal(err)
	}
	l := open(t, opts)
	if l.Adopted() || len(l.Attachments()) != 0 {
		t.Error("the state of a namespace that is gone is adopted")
	}
	attachAll(t, l, n.in)
	sync1(t, l, someRulesOn1(n)...)
	if _, err := os.Stat(filepath.Join(opts.PinDir, linksDir)); err != nil {
		t.Error(err)
	}
	l = reopen(t, l)
	if !slices.ContainsFunc(l.Rules(), func(r flow.Flow) bool { return r.Name == "one" }) {
		t.Error("the rule is gone")
	}
}

// The links of the counting programs are watched, too.
func TestTransmitPinIsRemoved(t *testing.T) {
	t.Parallel()
	newLab(t, 0)
	l := open(t, stateOptions(t))
	if err := unix.Unlink(filepath.Join(l.opts.PinDir, linksDir, pinDevmapXmit)); err != nil {
		t.Fatal(err)
	}
	if o := l.Observe(); len(o.Repaired) != 1 || len(o.Errs) != 0 || len(l.transmit) != 4 {
		t.Errorf("observed %+v", o)
	}
	nothingIsLost(t, l)
}

func linkOf(t *testing.T, h *lab.Host, name string) netlink.Link {
	t.Helper()
	l, err := h.Link(name)
	if err != nil {
		t.Fatal(err)
	}
	return l
}
