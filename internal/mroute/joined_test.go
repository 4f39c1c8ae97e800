package mroute

import (
	"net/netip"
	"testing"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/membership"
)

// TestJoined: the memberships of sockets are read back from the kernel with their sources, and
// ignored sockets do not count.
func TestJoined(t *testing.T) {
	labtest.RequireRoot(t)
	host := labtest.Host(t, "jn")
	for _, name := range []string{"eth0", "eth1"} {
		labtest.Connect(t, lab.End{Host: host, Name: name}, lab.End{Host: labtest.Host(t, "peer"), Name: "eth0"})
	}
	labtest.Enter(t, host)
	index := labtest.Index(t, host, "eth0")
	for _, family := range []struct{ group, specific, s1, s2 string }{
		{"239.1.1.1", "232.1.1.1", "10.0.0.1", "10.0.0.2"},
		{"ff0e::1:1", "ff3e::1:1", "fd00::1", "fd00::2"},
	} {
		s1, s2 := netip.MustParseAddr(family.s1), netip.MustParseAddr(family.s2)
		own, others, third := membership.New(membership.Options{}), membership.New(membership.Options{}), membership.New(membership.Options{})
		receives := func(group string, source netip.Addr) bool {
			t.Helper()
			joined, err := ReadJoined()
			if err != nil {
				t.Fatal(err)
			}
			g := netip.MustParseAddr(group)
			if other, ok := joined[On{labtest.Index(t, host, "eth1"), g}]; ok {
				t.Errorf("joined on another interface: %+v", other)
			}
			sockets, sources := own.Sockets(index, g)
			return joined[On{index, g}].Receives(source, sockets, sources)
		}
		check := func(what, group string, want1, want2 bool) {
			t.Helper()
			if got1, got2 := receives(group, s1), receives(group, s2); got1 != want1 || got2 != want2 {
				t.Errorf("%s, group %s: received from %s: %v, want %v; from %s: %v, want %v", what, group, s1, got1, want1, s2, got2, want2)
			}
		}
		change := func(m *membership.Manager, group string, source netip.Addr, join bool) {
			t.Helper()
			ms := membership.Membership{Interface: "eth0", Index: index, Group: netip.MustParseAddr(group), Source: source}
			do := m.Leave
			if join {
				do = m.Join
			}
			if err := do(ms); err != nil {
				t.Fatal(err)
			}
		}
		check("nobody", family.group, false, false)
		change(own, family.group, netip.Addr{}, true)
		check("only those left out", family.group, false, false)
		change(others, family.group, netip.Addr{}, true)
		check("a program for any source", family.group, true, true)
		change(others, family.group, netip.Addr{}, false)
		check("it left", family.group, false, false)

		change(others, family.specific, s1, true)
		check("a program for one source", family.specific, true, false)
		change(own, family.specific, s2, true)
		check("and one left out for another", family.specific, true, false)
		change(others, family.specific, s1, false)
		check("the program left", family.specific, false, false)
		change(own, family.specific, s1, true)
		change(others, family.specific, s1, true)
		check("the same source as one left out", family.specific, true, false)
		change(third, family.specific, s1, true)
		change(others, family.specific, s1, false)
		check("another program for it", family.specific, true, false)
		for _, m := range []*membership.Manager{own, others, third} {
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestReceives: when in doubt, a packet counts as received.
func TestReceives(t *testing.T) {
	s1, s2 := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	for _, c := range []struct {
		name    string
		joins   Joins
		without int
		named   []netip.Addr
		want    bool
	}{
		{"nobody", Joins{}, 0, nil, false},
		{"any source", Joins{Sockets: 1}, 0, nil, true},
		{"any source, left out", Joins{Sockets: 1}, 1, nil, false},
		{"only another", Joins{Sockets: 1, sources: map[netip.Addr]int{s2: 1}}, 0, nil, false},
		{"all but another", Joins{Sockets: 1, sources: map[netip.Addr]int{s2: 0}}, 0, nil, true},
		{"all but this one: not told", Joins{Sockets: 1, sources: map[netip.Addr]int{s1: 0}}, 0, nil, true},
		{"one for another and one for any", Joins{Sockets: 2, sources: map[netip.Addr]int{s2: 1}}, 0, nil, true},
		{"of which that for any is left out", Joins{Sockets: 2, sources: map[netip.Addr]int{s2: 1}}, 1, nil, false},
		{"of which that for the other is left out", Joins{Sockets: 2, sources: map[netip.Addr]int{s2: 1}}, 1, []netip.Addr{s2}, true},
		{"this one, by two", Joins{Sockets: 2, sources: map[netip.Addr]int{s1: 2}}, 1, []netip.Addr{s1}, true},
	} {
		if got := c.joins.Receives(s1, c.without, c.named); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

// FuzzJoined: no text of the kernel's lists panics.
func FuzzJoined(f *testing.F) {
	f.Add([]byte("Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n7\teth0      :     1      V3\n\t\t\t\t010101EF     2 0:00000000\t\t0\n"))
	f.Add([]byte("7    eth0            ff3e0000000000000000000000000001     1 00000004 0\n"))
	f.Add([]byte("Idx Device        MCA        SRC    INC    EXC\n  7   eth0 0xe8010101 0x0a000005      1      0\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, parse := range []func(Joined, []byte) error{Joined.addGroups4, Joined.addGroups6, Joined.addSources4, Joined.addSources6} {
			j := Joined{}
			_ = parse(j, data)
			_ = parse(j, data)
		}
	})
}
