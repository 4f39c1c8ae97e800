package membership

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// TestMain fails the run when goroutines or sockets are left behind.
func TestMain(m *testing.M) {
	before := openSockets()
	code := m.Run()
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if after := openSockets(); after != before {
		fmt.Fprintf(os.Stderr, "%d sockets open before the tests, %d after\n", before, after)
		code = 1
	}
	os.Exit(code)
}

// openSockets counts this process's sockets.
func openSockets() int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		panic(err)
	}
	n := 0
	for _, e := range entries {
		if target, _ := os.Readlink("/proc/self/fd/" + e.Name()); strings.HasPrefix(target, "socket:") {
			n++
		}
	}
	return n
}

// hostSystem is the kernel, in a host's namespace whatever the calling thread.
type hostSystem struct {
	System
	host *lab.Host
}

func (s hostSystem) Socket(family int) (fd int, err error) {
	err = s.host.Do(func() error {
		fd, err = s.System.Socket(family)
		return err
	})
	return fd, err
}

// bench is a host with interfaces eth0 and eth1, each connected to the peer's
// interface of the same name.
type bench struct {
	host, peer *lab.Host
}

func newBench(t testing.TB) bench {
	t.Helper()
	b := bench{labtest.Host(t, "mbr"), labtest.Host(t, "peer")}
	b.connect(t, "eth0")
	b.connect(t, "eth1")
	return b
}

// connect makes the named interface and returns its index, when it is able to
// send.
func (b bench) connect(t testing.TB, name string) int {
	t.Helper()
	subnet := "10.0." + strings.TrimPrefix(name, "eth")
	labtest.Connect(t,
		lab.End{Host: b.host, Name: name, Addrs: []string{subnet + ".1/24"}},
		lab.End{Host: b.peer, Name: name, Addrs: []string{subnet + ".2/24"}})
	labtest.Eventually(t, name+" is up with its link-local address", func() bool {
		return labtest.Running(b.host, name) && b.linkLocal(t, name).IsValid()
	})
	return labtest.Index(t, b.host, name)
}

// set takes an interface down or up, and waits until it is no longer running,
// or is again: the kernel's own reaction to both comes a little later.
func (b bench) set(t testing.TB, name string, up bool) {
	t.Helper()
	if err := b.host.SetUp(name, up); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, fmt.Sprintf("%s is running: %v", name, up), func() bool { return labtest.Running(b.host, name) == up })
}

func (b bench) linkLocal(t testing.TB, name string) netip.Addr {
	t.Helper()
	link, err := b.host.Link(name)
	if err != nil {
		t.Fatal(err)
	}
	addrs, err := b.host.Netlink().AddrList(link, unix.AF_INET6)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if addr, ok := netip.AddrFromSlice(a.IP); ok && addr.IsLinkLocalUnicast() && a.Flags&unix.IFA_F_TENTATIVE == 0 {
			return addr
		}
	}
	return netip.Addr{}
}

// membership parses "GROUP" or "SOURCE@GROUP".
func (b bench) membership(t testing.TB, ifname, what string) Membership {
	t.Helper()
	return parseMembership(ifname, labtest.Index(t, b.host, ifname), what)
}

func parseMembership(ifname string, index int, what string) Membership {
	m := Membership{Interface: ifname, Index: index}
	if source, group, ok := strings.Cut(what, "@"); ok {
		m.Source, m.Group = netip.MustParseAddr(source), netip.MustParseAddr(group)
	} else {
		m.Group = netip.MustParseAddr(what)
	}
	return m
}

// manager makes a manager whose sockets are in the host, closed after the test.
func (b bench) manager(t testing.TB) *Manager {
	t.Helper()
	return managerOn(t, hostSystem{Kernel(), b.host})
}

func managerOn(t testing.TB, sys System) *Manager {
	t.Helper()
	m := New(Options{System: sys})
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func mustJoin(t testing.TB, m *Manager, all ...Membership) {
	t.Helper()
	for _, ms := range all {
		if err := m.Join(ms); err != nil {
			t.Fatal(err)
		}
	}
}

func mustLeave(t testing.TB, m *Manager, all ...Membership) {
	t.Helper()
	for _, ms := range all {
		if err := m.Leave(ms); err != nil {
			t.Fatal(err)
		}
	}
}

// kernelState is what /proc/net says about groups: how many sockets hold each,
// and for how many of them each source is included or excluded.
type kernelState struct {
	Users   map[kernelGroup]int
	Filters map[kernelFilter]string // "INC/EXC"
}

type kernelGroup struct {
	Index int
	Group netip.Addr
}

type kernelFilter struct {
	Index         int
	Group, Source netip.Addr
}

// kernelState reads igmp, igmp6, mcfilter and mcfilter6, leaving out the groups
// of the link-local control blocks that every host is in by itself.
func (b bench) kernelState(t testing.TB) kernelState {
	t.Helper()
	state := kernelState{map[kernelGroup]int{}, map[kernelFilter]string{}}
	labtest.Do(t, b.host, func() error {
		return withSentinels(func() {
			state.readGroups4(t)
			state.readGroups6(t)
			state.readFilters(t, "mcfilter")
			state.readFilters(t, "mcfilter6")
		})
	})
	for g := range state.Users {
		if g.Group.IsLinkLocalMulticast() || g.Group.IsInterfaceLocalMulticast() || g.Index == loopback {
			delete(state.Users, g)
		}
	}
	for f := range state.Filters {
		if f.Index == loopback {
			delete(state.Filters, f)
		}
	}
	return state
}

// loopback is the index of lo, the first interface in every namespace.
const loopback = 1

// withSentinels runs fn while the newest group of lo has a source. Otherwise
// mcfilter and mcfilter6 may come out empty: the kernel's walk through them
// (igmp_mcf_get_first) starts at the first interface whose newest group has a
// source, and gives up if there is none.
func withSentinels(fn func()) error {
	for _, what := range []string{"127.0.0.9@232.255.255.255", "fd00::9@ff3e::ffff:ffff"} {
		ms := parseMembership("lo", loopback, what)
		fd, err := Kernel().Socket(int(ms.family()))
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		option, value := ms.join()
		if err := Kernel().Setsockopt(fd, ms.family().level(), option, value); err != nil {
			return err
		}
	}
	fn()
	return nil
}

// procLines splits a file of the calling thread's /proc/net into fields.
func procLines(t testing.TB, name string) [][]string {
	data, err := os.ReadFile("/proc/thread-self/net/" + name)
	if err != nil {
		t.Error(err)
	}
	var lines [][]string
	for line := range strings.Lines(string(data)) {
		lines = append(lines, strings.Fields(line))
	}
	return lines
}

// readGroups4 reads a line an interface, "7 eth0 : 2 V3", each followed by a
// line a group, "010107EF 1 0:00000000 0". The group is a number of the host's
// byte order over the address's bytes.
func (s kernelState) readGroups4(t testing.TB) {
	index := 0
	for i, f := range procLines(t, "igmp") {
		if i == 0 {
			continue
		}
		if len(f[0]) != 8 {
			index = number(t, f[0], 10)
			continue
		}
		var addr [4]byte
		binary.NativeEndian.PutUint32(addr[:], uint32(number(t, f[0], 16)))
		s.Users[kernelGroup{index, netip.AddrFrom4(addr)}] = number(t, f[1], 10)
	}
}

// readGroups6 reads lines like "7 eth0 ff3e...01 1 00000004 0".
func (s kernelState) readGroups6(t testing.TB) {
	for _, f := range procLines(t, "igmp6") {
		s.Users[kernelGroup{number(t, f[0], 10), procAddr(t, f[2])}] = number(t, f[3], 10)
	}
}

// readFilters reads lines like "7 eth0 0xef010101 0x0a000005 1 0"; in IPv6 the
// addresses are without 0x.
func (s kernelState) readFilters(t testing.TB, name string) {
	for i, f := range procLines(t, name) {
		if i > 0 {
			s.Filters[kernelFilter{number(t, f[0], 10), procAddr(t, f[2]), procAddr(t, f[3])}] = f[4] + "/" + f[5]
		}
	}
}

func procAddr(t testing.TB, hex string) netip.Addr {
	hex = strings.TrimPrefix(hex, "0x")
	bytes := make([]byte, len(hex)/2)
	for i := range bytes {
		bytes[i] = byte(number(t, hex[2*i:2*i+2], 16))
	}
	addr, ok := netip.AddrFromSlice(bytes)
	if !ok {
		t.Errorf("no address: %q", hex)
	}
	return addr
}

func number(t testing.TB, s string, base int) int {
	n, err := strconv.ParseUint(s, base, 32)
	if err != nil {
		t.Error(err)
	}
	return int(n)
}
