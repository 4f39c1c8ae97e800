package membership

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// What an interface loses while it is elsewhere is found missing, and can be joined again on
// the same index; what it has not lost stays as it is, and nothing goes out for it.
func TestObserve(t *testing.T) {
	b := newBench(t)
	away := labtest.Host(t, "away")
	labtest.Enter(t, b.host)
	m := New(Options{})
	defer m.Close()
	var all []Membership
	for _, ifname := range []string{"eth0", "eth1"} {
		for _, what := range []string{"239.1.1.1", "10.0.0.9@232.1.1.1", "10.0.0.8@232.1.1.1", "ff3e::1", "fd00::9@ff3e::2"} {
			all = append(all, b.membership(t, ifname, what))
		}
	}
	mustJoin(t, m, all...)
	before := b.kernelState(t)
	observe := func() []Membership {
		t.Helper()
		lost, err := m.Observe()
		if err != nil {
			t.Fatal(err)
		}
		return lost
	}
	if lost := observe(); len(lost) != 0 {
		t.Errorf("lost %v although nothing has happened", lost)
	}
	b.set(t, "eth1", false)
	if lost := observe(); len(lost) != 0 {
		t.Errorf("lost %v although an interface is only down", lost)
	}
	b.set(t, "eth1", true)
	if err := b.host.Excursion(lab.End{Host: b.host, Name: "eth0", Addrs: []string{"10.0.0.1/24"}}, away); err != nil {
		t.Fatal(err)
	}
	sameMembers := gocmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	lost := observe()
	if diff := gocmp.Diff(5, len(lost)); diff != "" {
		t.Errorf("lost %v:\n%s", lost, diff)
	}
	for _, ms := range lost {
		if ms.Interface != "eth0" {
			t.Errorf("lost %v", ms)
		}
	}
	if lost := observe(); len(lost) != 0 {
		t.Errorf("lost twice: %v", lost)
	}
	mustJoin(t, m, lost...)
	if diff := gocmp.Diff(before, b.kernelState(t), sameMembers); diff != "" {
		t.Errorf("the kernel (-before +after):\n%s", diff)
	}
	if lost := observe(); len(lost) != 0 {
		t.Errorf("lost %v after it was joined again", lost)
	}
	for _, c := range m.Counters() {
		if c.Memberships != 5 || uint64(c.Memberships) != c.Restored+c.Joins.Succeeded-c.Leaves.Attempted-c.Dropped {
			t.Errorf("counters %+v", c)
		}
	}
	mustLeave(t, m, all...)
}

// A look that takes long, while the manager is used, finds what was lost before it and takes
// nothing for lost that was joined, left or carried over meanwhile.
func TestLookMeanwhile(t *testing.T) {
	b := newBench(t)
	away := labtest.Host(t, "away")
	labtest.Enter(t, b.host)
	m := New(Options{})
	defer m.Close()
	lost, stays, left, again, late := b.membership(t, "eth0", "239.1.1.1"), b.membership(t, "eth1", "239.1.1.1"), b.membership(t, "eth0", "239.1.1.2"), b.membership(t, "eth0", "239.1.1.3"), b.membership(t, "eth0", "239.1.1.4")
	mustJoin(t, m, lost, stays, left, again)
	if err := b.host.Excursion(lab.End{Host: b.host, Name: "eth0", Addrs: []string{"10.0.0.1/24"}}, away); err != nil {
		t.Fatal(err)
	}
	look, err := m.Look()
	if err != nil {
		t.Fatal(err)
	}
	read := make(chan error, 1)
	go func() { read <- look.Read() }()
	if err := <-read; err != nil {
		t.Fatal(err)
	}
	mustLeave(t, m, left)
	_ = m.Leave(again) // the kernel does not know it
	mustJoin(t, m, again, late)
	if got := m.Forget(look); len(got) != 1 || got[0] != lost {
		t.Errorf("lost %v, want %v", got, lost)
	}
	for ms, want := range map[Membership]bool{lost: false, stays: true, left: false, again: true, late: true} {
		held, ok := m.Held(ms)
		if ok != want || ok != m.Holds(ms) || ok && (held.Membership != ms || held.References != 1) {
			t.Errorf("%v is held: %v (%+v), want %v", ms, ok, held, want)
		}
	}
	if look, err = m.Look(); err != nil {
		t.Fatal(err)
	}
	look.Stop()
	if err := look.Read(); err != nil || len(m.Forget(look)) != 0 {
		t.Errorf("a look that was stopped finds something lost, or ends with %v", err)
	}
}

// What is held and not wanted is found, the newest first.
func TestUnwanted(t *testing.T) {
	b := newBench(t)
	m := b.manager(t)
	var all []Membership
	for i := range 40 {
		ifname := []string{"eth0", "eth1"}[i%2]
		all = append(all, b.membership(t, ifname, fmt.Sprintf("239.1.1.%d", i)))
	}
	mustJoin(t, m, all...)
	wanted := slices.Clone(all[10:20])
	for i := range wanted {
		wanted[i].Interface = "" // counts for nothing
	}
	want := slices.Concat(all[:10], all[20:])
	slices.Reverse(want)
	for range 2 {
		if got := m.Unwanted(slices.Values(wanted)); !slices.Equal(got, want) {
			t.Errorf("unwanted %v, want %v", got, want)
		}
	}
	mustLeave(t, m, want...)
	if got := m.Unwanted(slices.Values(all)); len(got) != 0 || len(m.List()) != 10 || m.Len() != 10 {
		t.Errorf("unwanted %v, %d held", got, m.Len())
	}
}

// Lives of one index are kept apart: the end of the first one leaves the next one alone.
func TestGenerations(t *testing.T) {
	b := newBench(t)
	m := b.manager(t)
	first := b.membership(t, "eth0", "239.1.1.1")
	first.Generation = 1
	mustJoin(t, m, first)
	labtest.RemoveLink(t, b.host, "eth0")
	labtest.Connect(t, lab.End{Host: b.host, Name: "eth0", Index: first.Index}, lab.End{Host: b.peer, Name: "eth0"})
	second := first
	second.Generation = 2
	m.DropInterface(first.Index, 1)
	mustJoin(t, m, second)
	m.DropInterface(first.Index, 1) // again: nothing
	if got := m.List(); len(got) != 1 || got[0].Membership != second {
		t.Errorf("held: %+v", got)
	}
	if got := b.kernelState(t).Users[kernelGroup{second.Index, second.Group}]; got != 1 {
		t.Errorf("%d sockets hold the group, want 1", got)
	}
	if err := m.Leave(first); !errors.Is(err, ErrNotJoined) {
		t.Errorf("the first life is left: %v", err)
	}
}

// Counters of interfaces that are gone can be forgotten; those of memberships that are held
// stay.
func TestPrune(t *testing.T) {
	b := newBench(t)
	m := b.manager(t)
	mustJoin(t, m, b.membership(t, "eth0", "239.1.1.1"), b.membership(t, "eth1", "239.1.1.1"))
	mustLeave(t, m, b.membership(t, "eth1", "239.1.1.1"))
	names := func() (all []string) {
		for _, c := range m.Counters() {
			all = append(all, c.Interface)
		}
		return all
	}
	m.Prune(func(name string) bool { return name == "eth1" })
	if got := names(); !gocmp.Equal(got, []string{"eth0", "eth1"}) {
		t.Errorf("counters of %v", got)
	}
	m.Prune(func(string) bool { return false })
	if got := names(); !gocmp.Equal(got, []string{"eth0"}) {
		t.Errorf("counters of %v", got)
	}
}

func TestAddGroups(t *testing.T) {
	joined, index := &joinedGroups{}, 0
	add := func(table string, line func([]byte) error) (err error) {
		for text := range strings.Lines(table) {
			err = cmp.Or(err, line([]byte(text)))
		}
		return err
	}
	add4 := func(line []byte) error { return addGroup4(joined, &index, line) }
	add6 := func(line []byte) error { return addGroup6(joined, line) }
	if err := add("Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n12\ta:b       :     1      V3\n\t\t\t\t010107EF     1 0:00000000\t\t0\n", add4); err != nil {
		t.Fatal(err)
	}
	if err := add("7    eth0            ff3e0000000000000000000000000001     1 00000004 0\n", add6); err != nil {
		t.Fatal(err)
	}
	want := &joinedGroups{}
	want.add(1, netip.MustParseAddr("224.0.0.1"))
	want.add(12, netip.MustParseAddr("239.7.1.1"))
	want.add(7, netip.MustParseAddr("ff3e::1"))
	if !slices.Equal(joined.list, want.list) {
		t.Errorf("groups are %v, want %v", joined.list, want.list)
	}
	for _, bad := range []string{"x\tlo :\n", "\tzz 1\n"} {
		if err := add(bad, add4); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
	for _, bad := range []string{"7 eth0\n", "x eth0 ff3e0000000000000000000000000001\n", "7 eth0 ff3e\n", "7 eth0 " + strings.Repeat("z", 32) + "\n"} {
		if err := add(bad, add6); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

// A look, which the daemon takes every few seconds, allocates little more than the list of the groups.
func TestLookMemory(t *testing.T) {
	const groups = 10_000
	var table strings.Builder
	table.WriteString("Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n7\teth0      :     1      V3\n")
	for i := range groups {
		fmt.Fprintf(&table, "\t\t\t\t%08X     1 0:00000000\t\t0\n", 0xef|i<<8)
	}
	file := filepath.Join(t.TempDir(), "igmp")
	if err := os.WriteFile(file, []byte(table.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	index := 0
	l := &Look{room: groups, tables: []groupTable{{name: "igmp", file: f, add: func(joined *joinedGroups, line []byte) error { return addGroup4(joined, &index, line) }}}}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	joined, err := l.joined()
	runtime.ReadMemStats(&after)
	if err != nil || len(joined.list) != groups {
		t.Fatal(len(joined.list), err)
	}
	if each := (after.TotalAlloc - before.TotalAlloc) / groups; each > 40 {
		t.Errorf("%d bytes for each group, want at most 40", each)
	}
	for i := range groups {
		if group := netip.AddrFrom4([4]byte{0xef, byte(i), byte(i >> 8), byte(i >> 16)}); !joined.has(7, group) || joined.has(8, group) {
			t.Fatalf("%v is not found, or on another interface", group)
		}
	}
}

// What is carried over to another life of an interface is kept where the kernel still holds it,
// with no word to the network, and found lost where it does not.
func TestReborn(t *testing.T) {
	b := newBench(t)
	away := labtest.Host(t, "away")
	labtest.Enter(t, b.host)
	m := New(Options{})
	defer m.Close()
	ms := b.membership(t, "eth0", "239.1.1.1")
	ms.Generation = 1
	mustJoin(t, m, ms)
	observe := func() []Membership {
		t.Helper()
		lost, err := m.Observe()
		if err != nil {
			t.Fatal(err)
		}
		return lost
	}
	m.Reborn(ms.Index, 1, 2) // announcements were lost, the interface is the same
	if lost := observe(); len(lost) != 0 {
		t.Errorf("lost %v", lost)
	}
	for _, c := range m.Counters() {
		if c.Leaves.Attempted != 0 || c.Joins.Attempted != 1 {
			t.Errorf("counters %+v", c)
		}
	}
	if err := b.host.Excursion(lab.End{Host: b.host, Name: "eth0", Addrs: []string{"10.0.0.1/24"}}, away); err != nil {
		t.Fatal(err)
	}
	m.Reborn(ms.Index, 2, 3)
	ms.Generation = 3
	if lost := observe(); len(lost) != 1 || lost[0] != ms {
		t.Errorf("lost %v, want %v of generation 3", lost, ms)
	}
	mustJoin(t, m, ms)
	if got := b.kernelState(t).Users[kernelGroup{ms.Index, ms.Group}]; got != 1 {
		t.Errorf("%d sockets hold the group, want 1", got)
	}
	if got := m.List(); len(got) != 1 || got[0].Membership != ms {
		t.Errorf("held: %+v", got)
	}
}
