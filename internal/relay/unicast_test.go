package relay

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/internal/network"
	"xdpcast/pkg/flow"
)

// kernel returns a rule as the loader has it; nil when it does not.
func (r *running) kernel(name string) (found *flow.Flow) {
	r.t.Helper()
	if err := r.do(r.t.Context(), func() error {
		for _, rule := range r.loader.Rules() {
			if rule.Name == name {
				found = &rule
			}
		}
		return nil
	}); err != nil {
		r.t.Fatal(err)
	}
	return found
}

// waitOutput waits until an output has a state, and a reason that holds a text.
func (r *running) waitOutput(rule string, slot int, state, reason string) {
	r.t.Helper()
	var last control.OutputStatus
	defer func() {
		if r.t.Failed() {
			r.t.Logf("output is %s (%s)", last.State, last.Reason)
		}
	}()
	labtest.Eventually(r.t, fmt.Sprintf("output %d of rule %s is %s (%s)", slot, rule, state, reason), func() bool {
		s, err := r.Rule(r.t.Context(), rule)
		if err != nil {
			r.t.Fatal(err)
		}
		last = s.Outputs[slot]
		return last.State == state && strings.Contains(last.Reason, reason)
	})
}

// waitMAC waits until an output that sends has a link-layer address.
func (r *running) waitMAC(rule string, slot int, mac [6]byte) {
	r.t.Helper()
	labtest.Eventually(r.t, fmt.Sprintf("output %d of rule %s goes to %s", slot, rule, net.HardwareAddr(mac[:])), func() bool {
		k := r.kernel(rule)
		return k != nil && k.Out[slot].Ready && k.Out[slot].DstMAC == mac
	})
}

func macOf(t testing.TB, h *lab.Host, ifname string) [6]byte {
	t.Helper()
	l, err := h.Link(ifname)
	if err != nil {
		t.Fatal(err)
	}
	return [6]byte(l.Attrs().HardwareAddr)
}

func setSysctl(t testing.TB, h *lab.Host, name, value string) {
	t.Helper()
	labtest.Do(t, h, func() error { return os.WriteFile("/proc/sys/net/"+name, []byte(value), 0o644) })
}

// neighboursOf lists the entries of a host that are managed, or permanent.
func neighboursOf(t testing.TB, h *lab.Host) (all []string) {
	t.Helper()
	labtest.Do(t, h, func() error {
		for _, f := range []int{unix.AF_INET, unix.AF_INET6} {
			list, err := h.Netlink().NeighList(0, f)
			if err != nil {
				return err
			}
			for _, n := range list {
				switch {
				case n.FlagsExt&netlink.NTF_EXT_MANAGED != 0:
					all = append(all, "managed "+n.IP.String())
				case n.State&unix.NUD_PERMANENT != 0:
					all = append(all, "permanent "+n.IP.String())
				}
			}
		}
		return nil
	})
	slices.Sort(all)
	return all
}

func waitNeighbours(t testing.TB, h *lab.Host, want ...string) {
	t.Helper()
	labtest.Eventually(t, fmt.Sprintf("the neighbours kept are %q", want), func() bool {
		return slices.Equal(neighboursOf(t, h), want)
	})
}

func route(t testing.TB, h *lab.Host, dst, gateway, ifname string) *netlink.Route {
	t.Helper()
	l, err := h.Link(ifname)
	if err != nil {
		t.Fatal(err)
	}
	ipnet, err := netlink.ParseIPNet(dst)
	if err != nil {
		t.Fatal(err)
	}
	return &netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipnet, Gw: net.ParseIP(gateway)}
}

func permanent(t testing.TB, h *lab.Host, ifname, addr, mac string) *netlink.Neigh {
	t.Helper()
	l, err := h.Link(ifname)
	if err != nil {
		t.Fatal(err)
	}
	hw, err := net.ParseMAC(mac)
	if err != nil {
		t.Fatal(err)
	}
	return &netlink.Neigh{LinkIndex: l.Attrs().Index, State: unix.NUD_PERMANENT, IP: net.ParseIP(addr), HardwareAddr: hw}
}

// TestUnicastNeighbour: the next hop is resolved and kept so, its MAC followed, and
// the entry goes with the rule.
func TestUnicastNeighbour(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	if _, err := r.add("uni", anyIn, "10.1.0.2:6000%out0", out1); err != nil {
		t.Fatal(err)
	}
	r.waitMAC("uni", 0, macOf(t, p.peer, "out0"))
	r.waitOutput("uni", 0, control.StateActive, "")
	waitNeighbours(t, p.host, "managed 10.1.0.2")

	// Another rule by the same neighbour is complete at once.
	r.mustAdd("other", "239.1.1.7:5000%in0", "10.1.0.2:7000%out0")

	setSysctl(t, p.peer, "ipv4/conf/out0/arp_notify", "1")
	l, err := p.peer.Link("out0")
	if err != nil {
		t.Fatal(err)
	}
	mac := [6]byte{2, 0, 0, 0, 0, 0x42}
	if err := p.peer.Netlink().LinkSetHardwareAddr(l, mac[:]); err != nil {
		t.Fatal(err)
	}
	r.waitMAC("uni", 0, mac)
	r.waitMAC("other", 0, mac)

	for i, name := range []string{"uni", "other"} {
		if len(neighboursOf(t, p.host)) != 1 {
			t.Errorf("with %d rules less the neighbours are %q", i, neighboursOf(t, p.host))
		}
		if err := r.DeleteRule(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	waitNeighbours(t, p.host)
}

// TestUnicastUnresolved: an address that does not answer blocks its output alone,
// says so, and heals.
func TestUnicastUnresolved(t *testing.T) {
	p := newPlace(t)
	// At once and once a second, rather than for 3 seconds and every 5.
	setSysctl(t, p.host, "ipv4/neigh/out0/retrans_time_ms", "20")
	setSysctl(t, p.host, "ipv4/neigh/out0/interval_probe_time_ms", "1000")
	r := p.start()
	status, err := r.add("uni", anyIn, "10.1.0.77:6000%out0", out1)
	if err != nil {
		t.Fatal(err)
	}
	if status.State != control.StateActive || status.Outputs[0].State != "no_neighbour" {
		t.Errorf("rule is %s, output %+v", status.State, status.Outputs[0])
	}
	r.waitOutput("uni", 0, "no_neighbour", "10.1.0.77 does not answer on interface out0")
	k := r.kernel("uni")
	if k.Out[0].Ready || k.Out[0].Blocked != flow.NoNeighbour || !k.Out[1].Ready {
		t.Errorf("outputs are %+v", k.Out)
	}
	single, err := r.add("single", "239.1.1.8:5000%in0", "10.1.0.77:7000%out0")
	if err != nil || single.State != control.StatePending {
		t.Errorf("a rule with nothing else is %s (%s), %v", single.State, single.Reason, err)
	}
	if err := p.peer.AddAddr("out0", "10.1.0.77/24"); err != nil {
		t.Fatal(err)
	}
	r.waitMAC("uni", 0, macOf(t, p.peer, "out0"))
	r.waitMAC("single", 0, macOf(t, p.peer, "out0"))
	r.waitOutput("uni", 0, control.StateActive, "")

	// Somebody removes the entry: it is made again.
	if err := p.host.Netlink().NeighDel(&netlink.Neigh{LinkIndex: k.Out[0].Index, IP: net.ParseIP("10.1.0.77")}); err != nil {
		t.Fatal(err)
	}
	waitNeighbours(t, p.host, "managed 10.1.0.77")
	r.waitMAC("uni", 0, macOf(t, p.peer, "out0"))

	// The interface goes down, which removes the entry, and up again.
	if err := p.host.SetUp("out0", false); err != nil {
		t.Fatal(err)
	}
	r.waitOutput("uni", 0, control.StatePending, "interface out0 is down")
	if err := p.host.SetUp("out0", true); err != nil {
		t.Fatal(err)
	}
	r.waitMAC("uni", 0, macOf(t, p.peer, "out0"))
}

// TestUnicastGateway: the route by the output's interface decides the next hop, and
// is followed. Entries of somebody else's are used and left alone.
func TestUnicastGateway(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	if _, err := r.add("uni", anyIn, "10.99.0.5:6000%out0"); err != nil {
		t.Fatal(err)
	}
	r.waitOutput("uni", 0, "no_neighbour", "no route to 10.99.0.5 by interface out0")
	if got := neighboursOf(t, p.host); len(got) != 0 {
		t.Errorf("without a route, the neighbours are %q", got)
	}
	nl := p.host.Netlink()
	// A route by another interface is none.
	if err := nl.RouteAdd(route(t, p.host, "10.99.0.0/16", "10.2.0.2", "out1")); err != nil {
		t.Fatal(err)
	}
	if err := nl.RouteAdd(route(t, p.host, "10.99.0.0/24", "10.1.0.2", "out0")); err != nil {
		t.Fatal(err)
	}
	r.waitMAC("uni", 0, macOf(t, p.peer, "out0"))
	waitNeighbours(t, p.host, "managed 10.1.0.2")

	if err := nl.NeighSet(permanent(t, p.host, "out0", "10.1.0.3", "02:00:00:00:00:33")); err != nil {
		t.Fatal(err)
	}
	if err := nl.RouteReplace(route(t, p.host, "10.99.0.0/24", "10.1.0.3", "out0")); err != nil {
		t.Fatal(err)
	}
	r.waitMAC("uni", 0, [6]byte{2, 0, 0, 0, 0, 0x33})
	waitNeighbours(t, p.host, "permanent 10.1.0.3")
	if err := nl.NeighSet(permanent(t, p.host, "out0", "10.1.0.3", "02:00:00:00:00:34")); err != nil {
		t.Fatal(err)
	}
	r.waitMAC("uni", 0, [6]byte{2, 0, 0, 0, 0, 0x34})

	if err := nl.RouteDel(route(t, p.host, "10.99.0.0/24", "10.1.0.3", "out0")); err != nil {
		t.Fatal(err)
	}
	r.waitOutput("uni", 0, "no_neighbour", "no route to 10.99.0.5 by interface out0")
	if err := r.DeleteRule(t.Context(), "uni"); err != nil {
		t.Fatal(err)
	}
	waitNeighbours(t, p.host, "permanent 10.1.0.3")
}

// TestUnicastIPv6: a gateway is most often a link-local address.
func TestUnicastIPv6(t *testing.T) {
	p := newPlace(t)
	for _, e := range []struct {
		h    *lab.Host
		addr string
	}{{p.host, "2001:db8:1::1/64"}, {p.host, "fe80::11/64"}, {p.peer, "fe80::2/64"}, {p.peer, "2001:db8:1::2/64"}} {
		if err := e.h.AddAddr("out0", e.addr); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.host.Netlink().RouteAdd(route(t, p.host, "2001:db8:99::/48", "fe80::2", "out0")); err != nil {
		t.Fatal(err)
	}
	r := p.start()
	for i, out := range []string{"[2001:db8:99::5]:6000%out0", "[2001:db8:1::2]:6000%out0", "[2001:db8:98::5]:6000%out0"} {
		if _, err := r.add(fmt.Sprint("uni", i), fmt.Sprintf("[ff35::%d]:5000%%in0", i+1), out); err != nil {
			if _, err = r.add(fmt.Sprint("uni", i), fmt.Sprintf("[ff15::%d]:5000%%in0", i+1), out); err != nil {
				t.Fatal(err)
			}
		}
	}
	r.waitMAC("uni0", 0, macOf(t, p.peer, "out0"))
	r.waitMAC("uni1", 0, macOf(t, p.peer, "out0"))
	r.waitOutput("uni2", 0, "no_neighbour", "no route to 2001:db8:98::5 by interface out0")
	if got := r.kernel("uni0").Out[0].Src; got != netip.MustParseAddr("2001:db8:1::1") {
		t.Errorf("source is %v", got)
	}
	waitNeighbours(t, p.host, "managed 2001:db8:1::2", "managed fe80::2")
}

// TestUnicastRestart: entries outlive the process, are known again, and go when no
// rule needs them.
func TestUnicastRestart(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	for i := range 2 {
		if _, err := r.add(fmt.Sprint("uni", i), fmt.Sprintf("239.1.1.%d:5000%%in0", i+1), fmt.Sprintf("10.%d.0.2:6000%%out%d", i+1, i)); err != nil {
			t.Fatal(err)
		}
		r.waitMAC(fmt.Sprint("uni", i), 0, macOf(t, p.peer, fmt.Sprint("out", i)))
	}
	before := *r.kernel("uni0")
	r.stop()
	waitNeighbours(t, p.host, "managed 10.1.0.2", "managed 10.2.0.2")
	if err := os.WriteFile(p.stateFile(), fmt.Appendf(nil, "rules: [{name: uni0, in: %s, out: 10.1.0.2:6000%%out0}]\n", anyIn), 0o600); err != nil {
		t.Fatal(err)
	}
	r = p.start()
	if after := r.kernel("uni0"); !slices.Equal(after.Out, before.Out) {
		t.Errorf("output is %+v, was %+v", after.Out, before.Out)
	}
	waitNeighbours(t, p.host, "managed 10.1.0.2")
	if err := r.DeleteRule(t.Context(), "uni0"); err != nil {
		t.Fatal(err)
	}
	waitNeighbours(t, p.host)
}

// TestPermanentNeighbourStays: an entry of the relay's that somebody makes permanent has
// become theirs, and stays when no rule needs it.
func TestPermanentNeighbourStays(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	if _, err := r.add("uni", anyIn, "10.1.0.2:6000%out0"); err != nil {
		t.Fatal(err)
	}
	r.waitMAC("uni", 0, macOf(t, p.peer, "out0"))
	theirs := permanent(t, p.host, "out0", "10.1.0.2", "02:00:00:00:00:77")
	if err := p.host.Netlink().NeighSet(theirs); err != nil {
		t.Fatal(err)
	}
	r.waitMAC("uni", 0, [6]byte{2, 0, 0, 0, 0, 0x77})
	if err := r.DeleteRule(t.Context(), "uni"); err != nil {
		t.Fatal(err)
	}
	left, err := p.host.Netlink().NeighList(theirs.LinkIndex, netlink.FAMILY_V4)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(left, func(n netlink.Neigh) bool {
		return n.IP.Equal(theirs.IP) && n.State == unix.NUD_PERMANENT && n.HardwareAddr.String() == theirs.HardwareAddr.String()
	}) {
		t.Errorf("of neighbours are left %v, want the permanent one among them", left)
	}
}

// TestUnicastRefused: what can never be sent is no rule.
func TestUnicastRefused(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	before := p.footprint(r)
	for _, tt := range []struct{ out, want string }{
		{"10.1.0.1:6000%out0", "rule bad: output 10.1.0.1:6000%out0: 10.1.0.1 is an address of this host: want another host's, or a multicast group"},
		{"10.2.0.1:6000%out0", "rule bad: output 10.2.0.1:6000%out0: 10.2.0.1 is an address of this host: want another host's, or a multicast group"},
		{"10.1.0.255:6000%out0", "rule bad: output 10.1.0.255:6000%out0: 10.1.0.255 is a broadcast address of the network of interface out0: want a host's address, a multicast group, or broadcast=allow"},
	} {
		if _, err := r.add("bad", anyIn, out1, tt.out); err == nil || err.Error() != tt.want || !errors.Is(err, control.ErrFailed) {
			t.Errorf("output %s: %v, want %s", tt.out, err, tt.want)
		}
	}
	if after := p.footprint(r); !slices.Equal(after.Rules, before.Rules) || after.Groups != before.Groups {
		t.Errorf("something remains: %+v", after)
	}
	// One whose interface is late fails as soon as that is known.
	if _, err := r.add("late", anyIn, "10.5.0.255:6000%late0"); err != nil {
		t.Fatal(err)
	}
	labtest.Connect(t, lab.End{Host: p.host, Name: "late0", Addrs: []string{"10.5.0.1/24"}}, lab.End{Host: p.peer, Name: "late0"})
	labtest.Eventually(t, "the rule fails", func() bool {
		status, err := r.Rule(t.Context(), "late")
		if err != nil {
			t.Fatal(err)
		}
		return status.State == control.StateFailed && strings.Contains(status.Reason, "10.5.0.255 is a broadcast address")
	})
}

// faultyTables are the kernel's, but for entries that it does not take.
type faultyTables struct {
	neighbourTables
	err error
}

func (f *faultyTables) Manage(key network.NeighbourKey) error {
	if f.err != nil {
		return f.err
	}
	return f.neighbourTables.Manage(key)
}

// TestNeighbourTableFull: that is shown, and tried again.
func TestNeighbourTableFull(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	faulty := &faultyTables{err: unix.ENOBUFS}
	set := func(err error) {
		if err := r.do(t.Context(), func() error {
			r.neighbours.open = func() (_ neighbourTables, err error) {
				faulty.neighbourTables, err = network.OpenNeighbours()
				return faulty, err
			}
			faulty.err = err
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	set(unix.ENOBUFS)
	if _, err := r.add("uni", anyIn, "10.1.0.2:6000%out0"); err != nil {
		t.Fatal(err)
	}
	r.waitOutput("uni", 0, "no_neighbour", "neighbour table has no room for 10.1.0.2")
	set(nil)
	r.waitMAC("uni", 0, macOf(t, p.peer, "out0"))
}
