package loader

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"xdpcast/bpf"
	"xdpcast/pkg/flow"
)

// inputKinds are the kinds of input that match packets of a group from the source of sourceFrame:
// each is found by a different lookup.
func inputKinds(n *testLab, group string) (kinds []flow.Input) {
	address := netip.MustParseAddr(group)
	source, bits := "192.168.7.7", 24
	if address.Is6() {
		source, bits = "fd00:7::7", 112
	}
	prefix := netip.PrefixFrom(address, bits).Masked().Addr().String()
	for _, from := range []string{"", source} {
		for _, port := range []uint16{0, 5000} {
			in := input(n.in, prefix, from, port)
			in.Len = bits
			kinds = append(kinds, input(n.in, group, from, port), in)
		}
	}
	return kinds
}

// Rules change from each kind of input to every other, several at once and in all directions, some
// to another name, and lose or duplicate no packet.
func TestInputsChangeKindUnderTraffic(t *testing.T) {
	t.Parallel()
	for _, family := range []struct{ name, in, out, src string }{
		{"IPv4", "239.1.%d.1", "239.9.9.%d", "10.1.0.1"},
		{"IPv6", "ff0e::%d:1", "ff0e:9::%d", "fd00:1::1"},
	} {
		t.Run(family.name, func(t *testing.T) {
			n := newLab(t, 1)
			l := open(t, testOptions(t))
			attachAll(t, l, append(n.out, n.in)...)
			const kinds = 8
			rules := func(step, offset int) (all []flow.Flow) {
				for i := range kinds {
					name := fmt.Sprint("stays", i)
					if i%2 == 1 {
						name = fmt.Sprint("renamed", i, "-", step)
					}
					in := inputKinds(n, fmt.Sprintf(family.in, i+1))[(i+offset)%kinds]
					all = append(all, flow.Flow{Name: name, In: in, Out: []flow.Output{output(n.out[0], fmt.Sprintf(family.out, i+1), family.src, 6000)}})
				}
				return all
			}
			sync1(t, l, rules(0, 0)...)
			var streams []*stream
			for i := range kinds {
				streams = append(streams, startStream(t, n, fmt.Sprintf(family.in, i+1), 1))
			}
			// The differences between successive offsets are 1 to 7: each kind changes to every
			// other.
			for step, offset := range []int{1, 3, 6, 2, 7, 5, 4} {
				sync1(t, l, rules(step+1, offset)...)
				for _, s := range streams {
					s.more()
				}
				if t.Failed() {
					t.Fatalf("in step %d", step)
				}
			}
			// A single rule moves from one table to the other and back.
			one := rules(8, 4)
			for _, offset := range []int{0, 1, 0} {
				one[0] = rules(8, offset)[0]
				sync1(t, l, one...)
			}
			for _, s := range streams {
				s.more()
				s.finish()
			}
			kernelFits(t, l)
			allocatorsFit(t, l)
		})
	}
}

// What programs may still use is not reused before a grace period: after a change, and after an
// adoption that closes the shortcuts.
func TestWaitsBeforeReuse(t *testing.T) {
	t.Parallel()
	n := newLab(t, 2)
	opts := testOptions(t)
	var l *Loader
	var old []*entry // published before
	var before []string
	waits := 0
	opts.wait = func() {
		waits++
		waitForPrograms()
		if l == nil {
			return
		}
		config, err := l.maps.config(l.opts.PinDir)
		if err != nil || config.ShortcutShift != 0 {
			t.Errorf("wait %d: shortcuts are open (shift %d), %v", waits, config.ShortcutShift, err)
		}
		if diff := cmp.Diff(before, usedByPrograms(t, l, old)); diff != "" {
			t.Errorf("wait %d: what old rules are found by or point to has changed (-before +now):\n%s", waits, diff)
		}
	}
	l = open(t, opts)
	attachAll(t, l, append(n.out, n.in)...)
	change := func(what string, want int, rules ...flow.Flow) {
		t.Helper()
		old = slices.Collect(maps.Values(l.rules))
		before, waits = usedByPrograms(t, l, old), 0
		sync1(t, l, rules...)
		if waits != want {
			t.Errorf("%s: waited %d times, want %d", what, waits, want)
		}
	}
	rules := someRules(n)
	change("several rules are added", 2, rules...) // the lookups that they need first
	other := rules[0]
	other.Out = []flow.Output{output(n.out[1], "239.8.8.8", "10.1.1.1", 1)}
	change("one rule changes", 1, append([]flow.Flow{other}, rules[1:]...)...)
	change("one rule goes", 1, rules[1:]...)
	change("one rule is added", 0, rules...) // programs use nothing of it yet
	moved := rules[0]
	moved.In.Port = 0
	change("one rule changes to a new kind", 2, append([]flow.Flow{moved}, rules[1:]...)...)
	change("all go", 1)
	change("all come back", 2, rules...)
	closeLoader(t, l)
	l, waits = nil, 0
	l = open(t, opts)
	if waits != 1 {
		t.Errorf("adoption: waited %d times, want once", waits)
	}
}

// usedByPrograms lists what programs that saw old rules may still use: the shortcuts, and the rows
// of these rules and their outputs.
func usedByPrograms(t *testing.T, l *Loader, old []*entry) (used []string) {
	t.Helper()
	for i := range l.maps.Shortcuts.MaxEntries() {
		var s bpf.RelayShortcut
		if err := l.maps.Shortcuts.Lookup(i, &s); err != nil {
			t.Fatal(err)
		}
		if s != (bpf.RelayShortcut{}) {
			used = append(used, fmt.Sprintf("shortcut %d %+v", i, s))
		}
	}
	for _, e := range old {
		var r bpf.RelayRule
		if err := l.maps.Rules.Lookup(e.id, &r); err != nil {
			t.Fatal(err)
		}
		used = append(used, fmt.Sprintf("rule %d %+v", e.id, r))
		for slot := range e.rule.Out {
			var o bpf.RelayOutput
			if err := l.maps.Outputs.Lookup(e.first+uint32(slot), &o); err != nil {
				t.Fatal(err)
			}
			used = append(used, fmt.Sprintf("output %d %+v", e.first+uint32(slot), o))
		}
	}
	return used
}
