package membership

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// wantState builds a kernelState from lines "IFNAME GROUP USERS" and "IFNAME
// SOURCE@GROUP INC/EXC".
func (b bench) wantState(t testing.TB, lines ...string) kernelState {
	t.Helper()
	s := kernelState{map[kernelGroup]int{}, map[kernelFilter]string{}}
	for _, line := range lines {
		f := strings.Fields(line)
		ms := b.membership(t, f[0], f[1])
		if ms.Source.IsValid() {
			s.Filters[kernelFilter{ms.Index, ms.Group, ms.Source}] = f[2]
		} else {
			s.Users[kernelGroup{ms.Index, ms.Group}] = number(t, f[2], 10)
		}
	}
	return s
}

var compareAddrs = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func (b bench) checkState(t testing.TB, lines ...string) {
	t.Helper()
	if diff := cmp.Diff(b.wantState(t, lines...), b.kernelState(t), compareAddrs); diff != "" {
		t.Errorf("kernel state, - wanted + found:\n%s", diff)
	}
}

func TestJoinAndLeaveInTheKernel(t *testing.T) {
	b := newBench(t)
	tests := []struct {
		name    string
		joins   []string // "IFNAME [SOURCE@]GROUP"
		state   []string
		sockets int
	}{
		{"any source",
			[]string{"eth0 239.1.1.1"},
			[]string{"eth0 239.1.1.1 1"}, 1},
		{"any source, IPv6",
			[]string{"eth0 ff1e::1"},
			[]string{"eth0 ff1e::1 1"}, 1},
		{"one source",
			[]string{"eth0 10.9.0.5@232.1.1.1"},
			[]string{"eth0 232.1.1.1 1", "eth0 10.9.0.5@232.1.1.1 1/0"}, 1},
		{"one source, IPv6",
			[]string{"eth0 fd00::5@ff3e::1"},
			[]string{"eth0 ff3e::1 1", "eth0 fd00::5@ff3e::1 1/0"}, 1},
		{"two sources share a socket",
			[]string{"eth0 10.9.0.5@232.1.1.1", "eth0 10.9.0.6@232.1.1.1"},
			[]string{"eth0 232.1.1.1 1", "eth0 10.9.0.5@232.1.1.1 1/0", "eth0 10.9.0.6@232.1.1.1 1/0"}, 1},
		{"any source and one source on a group need two sockets",
			[]string{"eth0 239.1.1.1", "eth0 10.9.0.5@239.1.1.1", "eth0 ff1e::1", "eth0 fd00::5@ff1e::1"},
			[]string{"eth0 239.1.1.1 2", "eth0 10.9.0.5@239.1.1.1 1/0", "eth0 ff1e::1 2", "eth0 fd00::5@ff1e::1 1/0"}, 4},
		{"one group on two interfaces",
			[]string{"eth0 239.1.1.1", "eth1 239.1.1.1", "eth1 10.9.0.5@239.1.1.1"},
			[]string{"eth0 239.1.1.1 1", "eth1 239.1.1.1 2", "eth1 10.9.0.5@239.1.1.1 1/0"}, 3},
		{"groups that share an Ethernet address (RFC 1112 section 6.4)",
			[]string{"eth0 239.1.1.1", "eth0 239.129.1.1"},
			[]string{"eth0 239.1.1.1 1", "eth0 239.129.1.1 1"}, 1},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			before := openSockets()
			m := b.manager(t)
			var all []Membership
			for _, join := range test.joins {
				ifname, what, _ := strings.Cut(join, " ")
				all = append(all, b.membership(t, ifname, what))
			}
			mustJoin(t, m, all...)
			b.checkState(t, test.state...)
			if got := openSockets() - before; got != test.sockets {
				t.Errorf("%d helper sockets, want %d", got, test.sockets)
			}
			mustLeave(t, m, all...)
			b.checkState(t)
			if got := openSockets() - before; got != 0 {
				t.Errorf("%d helper sockets after leaving all, want none", got)
			}
			checkNothingHeld(t, m)
		})
	}
}

// checkNothingHeld looks inside: what is left is the counters.
func checkNothingHeld(t testing.TB, m *Manager) {
	t.Helper()
	if len(m.List()) != 0 || len(m.ifaces) != 0 {
		t.Errorf("held after leaving all: %v, %d interfaces", m.List(), len(m.ifaces))
	}
	checkCounters(t, m)
}

// checkCounters checks what holds for counters at any time.
func checkCounters(t testing.TB, m *Manager) {
	t.Helper()
	for _, c := range m.Counters() {
		if c.Joins.Attempted != c.Joins.Succeeded+c.Joins.Failed || c.Leaves.Attempted != c.Leaves.Succeeded+c.Leaves.Failed {
			t.Errorf("attempts are not the sum of their outcomes: %+v", c)
		}
		if uint64(c.Memberships) != c.Restored+c.Joins.Succeeded-c.Leaves.Attempted-c.Dropped {
			t.Errorf("memberships are not what was joined and not left: %+v", c)
		}
	}
}

// TestSourcesBeyondTheSocketLimit joins more sources of one group than a socket
// takes, beside any source, leaves some in the middle and joins them again.
func TestSourcesBeyondTheSocketLimit(t *testing.T) {
	b := newBench(t)
	for _, test := range []struct {
		group, source string // source with %d
		perSocket     int    // igmp_max_msf, mld_max_msf
	}{
		{"232.1.1.1", "10.9.0.%d", 10},
		{"ff3e::1", "fd00::%x", 64},
	} {
		t.Run(test.group, func(t *testing.T) {
			m := b.manager(t)
			n := 2*test.perSocket + 5
			var all []Membership
			var lines []string
			for i := 1; i <= n; i++ {
				what := fmt.Sprintf(test.source+"@%s", i, test.group)
				all = append(all, b.membership(t, "eth0", what))
				lines = append(lines, "eth0 "+what+" 1/0")
			}
			asm := b.membership(t, "eth0", test.group)
			mustJoin(t, m, all[:n/2]...)
			mustJoin(t, m, asm)
			mustJoin(t, m, all[n/2:]...)
			b.checkState(t, append(lines, "eth0 "+test.group+" 4")...)

			mustLeave(t, m, all[3:test.perSocket+3]...)
			mustJoin(t, m, all[3:test.perSocket+3]...)
			b.checkState(t, append(lines, "eth0 "+test.group+" 4")...)

			mustLeave(t, m, asm)
			b.checkState(t, append(lines, "eth0 "+test.group+" 3")...)
			mustLeave(t, m, all...)
			b.checkState(t)
			checkNothingHeld(t, m)
		})
	}
}

// TestGroupsBeyondTheSocketLimit: 45 groups, any source and source-specific,
// need three sockets each at 20 a socket; when the sockets have room again, it
// is used before a new one is opened.
func TestGroupsBeyondTheSocketLimit(t *testing.T) {
	b := newBench(t)
	for _, kind := range []string{"239.1.1.%d", "10.9.0.5@232.1.1.%d"} {
		t.Run(kind, func(t *testing.T) {
			m := b.manager(t)
			before := openSockets()
			var all []Membership
			for i := range 45 {
				all = append(all, b.membership(t, "eth0", fmt.Sprintf(kind, i)))
			}
			mustJoin(t, m, all...)
			if got := openSockets() - before; got != 3 {
				t.Errorf("%d helper sockets, want 3", got)
			}
			for i := 0; i < 40; i += 10 {
				mustLeave(t, m, all[i])
			}
			for i := range 4 + 15 {
				mustJoin(t, m, b.membership(t, "eth0", fmt.Sprintf(kind, 100+i)))
			}
			if got := openSockets() - before; got != 3 {
				t.Errorf("%d helper sockets, want 3", got)
			}
			if got := len(b.kernelState(t).Users); got != 60 {
				t.Errorf("kernel holds %d groups, want 60", got)
			}
		})
	}
}

// TestSocketMemoryLimit makes net.core.optmem_max the limit: in steps small
// enough that both halves of a source's join - the group, then the source - run
// into it.
func TestSocketMemoryLimit(t *testing.T) {
	own := false
	labtest.Do(t, labtest.Host(t, "membership"), func() error {
		_, err := os.Stat("/proc/sys/net/core/optmem_max")
		own = err == nil
		return nil
	})
	labtest.NeedsKernel(t, own, "net.core.optmem_max of a network namespace", "6.8")
	const lowest = 320 // one source of an IPv6 group takes some 270 bytes
	for _, kind := range []string{"239.1.1.%d", "10.9.0.5@232.1.1.%d", "ff1e::%x", "fd00::5@ff3e::%x"} {
		t.Run(kind, func(t *testing.T) {
			b := newBench(t)
			for limit := lowest; limit <= 1000; limit += 16 {
				labtest.Sysctl(t, b.host, "net/core/optmem_max", fmt.Sprint(limit))
				m := b.manager(t)
				var all []Membership
				for i := 1; i <= 25; i++ {
					all = append(all, b.membership(t, "eth0", fmt.Sprintf(kind, i)))
				}
				before := openSockets()
				mustJoin(t, m, all...)
				if got := openSockets() - before; limit == lowest && got < 3 {
					t.Fatalf("%d helper sockets at a limit of %d bytes: is it the host's own?", got, limit)
				}
				state := b.kernelState(t)
				for _, ms := range all {
					if users := state.Users[kernelGroup{ms.Index, ms.Group}]; users != 1 {
						t.Errorf("limit %d: %v is held by %d sockets, want 1", limit, ms, users)
					}
					filter := state.Filters[kernelFilter{ms.Index, ms.Group, ms.Source}]
					if ms.Source.IsValid() && filter != "1/0" {
						t.Errorf("limit %d: %v has filter %q, want 1/0", limit, ms, filter)
					}
				}
				mustLeave(t, m, all...)
				b.checkState(t)
				checkNothingHeld(t, m)
			}
		})
	}
}

func TestReferences(t *testing.T) {
	b := newBench(t)
	m := b.manager(t)
	ms := b.membership(t, "eth0", "239.1.1.1")
	before := time.Now()
	mustJoin(t, m, ms, ms, ms)
	b.checkState(t, "eth0 239.1.1.1 1")
	list := m.List()
	if len(list) != 1 || list[0].Membership != ms || list[0].References != 3 {
		t.Errorf("list is %+v, want one membership with 3 references", list)
	}
	if since := list[0].Since; since.Before(before) || since.After(time.Now()) {
		t.Errorf("joined since %v", since)
	}
	mustLeave(t, m, ms, ms)
	b.checkState(t, "eth0 239.1.1.1 1")
	mustLeave(t, m, ms)
	b.checkState(t)
	want := []Counters{{Interface: "eth0", Joins: Attempts{1, 1, 0}, Leaves: Attempts{1, 1, 0}}}
	if diff := cmp.Diff(want, m.Counters()); diff != "" {
		t.Errorf("counters:\n%s", diff)
	}
	var leave *LeaveError
	if err := m.Leave(ms); !errors.As(err, &leave) || !errors.Is(err, ErrNotJoined) {
		t.Errorf("leaving once too often: %v", err)
	}
	if diff := cmp.Diff(want, m.Counters()); diff != "" {
		t.Errorf("counters:\n%s", diff)
	}
}

func TestListIsSorted(t *testing.T) {
	b := newBench(t)
	m := b.manager(t)
	want := []string{
		"239.1.1.1 on eth0", "239.1.1.1 from 10.9.0.5 on eth0", "239.1.1.1 from 10.9.0.10 on eth0",
		"239.1.1.10 on eth0", "ff1e::1 on eth0", "239.1.1.1 on eth1",
	}
	for _, i := range []int{5, 3, 2, 0, 4, 1} {
		what, ifname, _ := strings.Cut(want[i], " on ")
		if group, source, ok := strings.Cut(what, " from "); ok {
			what = source + "@" + group
		}
		mustJoin(t, m, b.membership(t, ifname, what))
	}
	var got []string
	for _, s := range m.List() {
		got = append(got, s.String())
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestInterfaceThatIsNotThere(t *testing.T) {
	b := newBench(t)
	m := b.manager(t)
	for _, index := range []int{-1, 0, 9999} {
		for _, what := range []string{"239.1.1.1", "10.9.0.5@239.1.1.1", "ff1e::1", "fd00::5@ff3e::1"} {
			ms := parseMembership("eth7", index, what)
			err := m.Join(ms)
			var notFound *InterfaceNotFoundError
			var join *JoinError
			if !errors.As(err, &notFound) || notFound.Index != index || notFound.Interface != "eth7" ||
				!errors.As(err, &join) || join.Membership != ms || !errors.Is(err, unix.ENODEV) {
				t.Errorf("join on index %d: %v", index, err)
			}
			if !Transient(err) {
				t.Errorf("%v is not transient: the interface may yet come", err)
			}
		}
	}
	checkNothingHeld(t, m)
	// Index 0 and below never reach the kernel.
	want := []Counters{{Interface: "eth7", Joins: Attempts{4, 0, 4}}}
	if diff := cmp.Diff(want, m.Counters()); diff != "" {
		t.Errorf("counters:\n%s", diff)
	}
}

// TestInterfaceWithoutIP: the kernel runs no IPv6 on an interface with an MTU
// below 1280 and no IPv4 below 68.
func TestInterfaceWithoutIP(t *testing.T) {
	b := newBench(t)
	m := b.manager(t)
	link, err := b.host.Link("eth0")
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ mtu, restored int }{{1279, 1500}} {
		if err := b.host.Netlink().LinkSetMTU(link, test.mtu); err != nil {
			t.Fatal(err)
		}
		for _, what := range []string{"ff1e::1", "fd00::5@ff3e::1"} {
			ms := b.membership(t, "eth0", what)
			err := m.Join(ms)
			var notFound *InterfaceNotFoundError
			if err == nil || errors.As(err, &notFound) || !strings.Contains(err.Error(), "MTU") {
				t.Errorf("MTU %d: %v", test.mtu, err)
			}
		}
		mustJoin(t, m, b.membership(t, "eth0", "239.1.1.1"))
		if err := b.host.Netlink().LinkSetMTU(link, test.restored); err != nil {
			t.Fatal(err)
		}
		mustJoin(t, m, b.membership(t, "eth0", "ff1e::1"), b.membership(t, "eth0", "fd00::5@ff3e::1"))
	}
}

func TestInterfaceWithoutAnAddress(t *testing.T) {
	b := newBench(t)
	labtest.Connect(t, lab.End{Host: b.host, Name: "bare"}, lab.End{Host: b.peer, Name: "bare"})
	m := b.manager(t)
	mustJoin(t, m, b.membership(t, "bare", "239.1.1.1"), b.membership(t, "bare", "10.9.0.5@232.1.1.1"))
	b.checkState(t, "bare 239.1.1.1 1", "bare 232.1.1.1 1", "bare 10.9.0.5@232.1.1.1 1/0")
}

// TestInterfaceChanges: what happens to an interface short of deleting it
// leaves its memberships alone.
func TestInterfaceChanges(t *testing.T) {
	b := newBench(t)
	m := b.manager(t)
	whats := []string{"239.1.1.1", "10.9.0.5@239.1.1.1", "ff1e::1", "fd00::5@ff1e::1"}
	var all []Membership
	for _, what := range whats {
		all = append(all, b.membership(t, "eth0", what))
	}
	mustJoin(t, m, all...)
	link, err := b.host.Link("eth0")
	if err != nil {
		t.Fatal(err)
	}
	nl := b.host.Netlink()
	for _, err := range []error{
		nl.LinkSetDown(link),
		nl.LinkSetName(link, "video0"),
		nl.LinkSetUp(link),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	addrs, err := nl.AddrList(link, unix.AF_UNSPEC)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if err := nl.AddrDel(link, &a); err != nil {
			t.Fatal(err)
		}
	}
	labtest.Eventually(t, "the interface is running", func() bool { return labtest.Running(b.host, "video0") })
	b.checkState(t, "video0 239.1.1.1 2", "video0 10.9.0.5@239.1.1.1 1/0", "video0 ff1e::1 2", "video0 fd00::5@ff1e::1 1/0")
	// The new name means the same memberships.
	for _, what := range whats {
		mustJoin(t, m, b.membership(t, "video0", what))
	}
	if got := len(m.List()); got != len(all) {
		t.Errorf("%d memberships, want %d", got, len(all))
	}
	mustLeave(t, m, all...)
	for _, what := range whats {
		mustLeave(t, m, b.membership(t, "video0", what))
	}
	b.checkState(t)
	checkNothingHeld(t, m)
}

// TestSourcesAfterInterfaceWasDown: whatever is joined and left around a time
// when the interface is down, every source that is held passes the interface's
// filter after a refresh.
func TestSourcesAfterInterfaceWasDown(t *testing.T) {
	for _, family := range []struct{ group, source string }{{"239.1.1.1", "10.9.0.%s"}, {"ff1e::1", "fd00::%s"}} {
		for _, script := range []string{ // +N, -N: join, leave source N (0: any); d, u: down, up
			"+1 d u",
			"+1 d +2 u",
			"+1 d -1 u",
			"+1 +2 d -1 u",
			"d +1 u",
			"+1 d -1 +2 u",
			"+1 d -1 +1 u",
			"+0 +1 d +2 u",
			"+1 d +0 u",
			"+1 d +0 u -0",
			"+0 +1 d -0 u",
			"+1 d u +2",
			"+1 +2 d u d u -2",
		} {
			t.Run(family.group+" "+script, func(t *testing.T) {
				t.Parallel() // the kernel takes its time to call an interface running
				b := newBench(t)
				m := b.manager(t)
				for _, step := range strings.Fields(script) {
					what := family.group
					if source := step[1:]; source != "0" {
						what = fmt.Sprintf(family.source, source) + "@" + what
					}
					switch step[0] {
					case '+':
						mustJoin(t, m, b.membership(t, "eth0", what))
					case '-':
						mustLeave(t, m, b.membership(t, "eth0", what))
					default:
						b.set(t, "eth0", step == "u")
					}
				}
				if failed := m.Refresh(labtest.Index(t, b.host, "eth0"), 0); failed != nil {
					t.Errorf("refresh: %v", failed)
				}
				state := b.kernelState(t)
				for _, s := range m.List() {
					if s.Source.IsValid() && state.Filters[kernelFilter{s.Index, s.Group, s.Source}] != "1/0" {
						t.Errorf("%v is not in the filter %v", s.Membership, state.Filters)
					}
				}
				checkCounters(t, m)
			})
		}
	}
}

// TestInterfaceRecreated also shows what the kernel answers to leaves on an
// interface that is gone, when DropInterface has not been called yet.
func TestInterfaceRecreated(t *testing.T) {
	b := newBench(t)
	m := b.manager(t)
	before := openSockets()
	var old []Membership
	for _, what := range []string{"239.1.1.1", "239.1.1.2", "10.9.0.5@239.1.1.1", "10.9.0.6@239.1.1.1", "ff1e::1", "fd00::5@ff1e::1"} {
		old = append(old, b.membership(t, "eth0", what))
	}
	mustJoin(t, m, old...)
	mustJoin(t, m, b.membership(t, "eth1", "239.1.1.1"))
	labtest.RemoveLink(t, b.host, "eth0")

	// Leaves answer one way or the other, and forget the membership either way.
	for _, ms := range []Membership{old[0], old[2], old[4]} {
		if err := m.Leave(ms); err != nil {
			t.Logf("on a deleted interface: %v", err)
		}
		if err := m.Leave(ms); !errors.Is(err, ErrNotJoined) {
			t.Errorf("left twice: %v", err)
		}
	}
	var notFound *InterfaceNotFoundError
	if err := m.Join(old[0]); !errors.As(err, &notFound) {
		t.Errorf("join on a deleted interface: %v", err)
	}

	m.DropInterface(old[0].Index, 0)
	if got := openSockets() - before; got != 1 {
		t.Errorf("%d helper sockets after dropping eth0, want eth1's", got)
	}
	if err := m.Leave(old[1]); !errors.Is(err, ErrNotJoined) {
		t.Errorf("leaving what was dropped: %v", err)
	}
	checkCounters(t, m)

	b.connect(t, "eth0")
	if labtest.Index(t, b.host, "eth0") == old[0].Index {
		t.Fatal("the new interface has the old one's index")
	}
	mustJoin(t, m, b.membership(t, "eth0", "239.1.1.1"))
	b.checkState(t, "eth0 239.1.1.1 1", "eth1 239.1.1.1 1")
	m.DropInterface(old[0].Index, 0) // again: nothing
	m.DropInterface(9999, 0)         // never there
	b.checkState(t, "eth0 239.1.1.1 1", "eth1 239.1.1.1 1")
}

func TestCloseLeavesEverything(t *testing.T) {
	b := newBench(t)
	m := b.manager(t)
	before := openSockets()
	ms := b.membership(t, "eth0", "239.1.1.1")
	mustJoin(t, m, ms, ms, b.membership(t, "eth1", "fd00::5@ff3e::1"))
	for range 2 {
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
	b.checkState(t)
	if got := openSockets(); got != before {
		t.Errorf("%d sockets, want %d", got, before)
	}
	if err := m.Join(ms); !errors.Is(err, os.ErrClosed) || Transient(err) {
		t.Errorf("join after close: %v", err)
	}
	if err := m.Leave(ms); !errors.Is(err, os.ErrClosed) {
		t.Errorf("leave after close: %v", err)
	}
	checkNothingHeld(t, m)
	want := []Counters{
		{Interface: "eth0", Joins: Attempts{1, 1, 0}, Dropped: 1},
		{Interface: "eth1", Joins: Attempts{1, 1, 0}, Dropped: 1},
	}
	if diff := cmp.Diff(want, m.Counters()); diff != "" {
		t.Error(diff)
	}
}

// TestHelperSocketsReceiveNothing: they have no port, so they are not in the
// kernel's table of UDP sockets, although the groups' traffic arrives.
func TestHelperSocketsReceiveNothing(t *testing.T) {
	b := newBench(t)
	m := b.manager(t)
	mustJoin(t, m, b.membership(t, "eth0", "239.1.1.1"), b.membership(t, "eth0", "10.0.0.2@239.1.1.1"),
		b.membership(t, "eth0", "ff1e::1"))
	// A socket that is bound shows when the traffic has been delivered.
	witness := -1
	labtest.Do(t, b.host, func() (err error) {
		for _, table := range []string{"udp", "udp6"} {
			if lines := procLines(t, table); len(lines) != 1 { // the heading
				t.Errorf("%s holds %v", table, lines[1:])
			}
		}
		if witness, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err := unix.SetsockoptTimeval(witness, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 20}); err != nil {
			return err
		}
		return unix.Bind(witness, &unix.SockaddrInet4{Port: 5000})
	})
	defer unix.Close(witness)
	labtest.Do(t, b.peer, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		mreq := &unix.IPMreqn{Ifindex: 0, Address: [4]byte{10, 0, 0, 2}}
		if err := unix.SetsockoptIPMreqn(fd, unix.IPPROTO_IP, unix.IP_MULTICAST_IF, mreq); err != nil {
			return err
		}
		return unix.Sendto(fd, []byte("hello"), 0, &unix.SockaddrInet4{Port: 5000, Addr: [4]byte{239, 1, 1, 1}})
	})
	buf := make([]byte, 16)
	if n, _, err := unix.Recvfrom(witness, buf, 0); err != nil || string(buf[:n]) != "hello" {
		t.Fatalf("the witness got %q, %v", buf[:n], err)
	}
	for _, p := range m.ifaces {
		for s := range p.shards {
			if n, _, err := unix.Recvfrom(s.fd, buf, unix.MSG_DONTWAIT); !errors.Is(err, unix.EAGAIN) {
				t.Errorf("a helper socket received: %d bytes, %v", n, err)
			}
		}
	}
}
