package network

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// routed makes a host whose eth0 and eth1 lead to a peer's.
func routed(t *testing.T) (h, peer *lab.Host) {
	h, peer = labtest.Host(t, "network"), labtest.Host(t, "networkp")
	for i, name := range []string{"eth0", "eth1"} {
		labtest.Connect(t, lab.End{Host: h, Name: name, Addrs: []string{fmt.Sprintf("10.%d.0.1/24", i), fmt.Sprintf("2001:db8:%d::1/64", i)}},
			lab.End{Host: peer, Name: name, Addrs: []string{fmt.Sprintf("10.%d.0.2/24", i), fmt.Sprintf("2001:db8:%d::2/64", i)}})
	}
	// The kernel makes the link-local addresses a moment after the carrier.
	labtest.Eventually(t, "there are link-local addresses", func() bool {
		for _, name := range []string{"eth0", "eth1"} {
			list, err := h.Netlink().AddrList(linkOf(t, h, name), netlink.FAMILY_V6)
			must(t, err)
			if len(list) != 2 || slices.ContainsFunc(list, func(a netlink.Addr) bool { return a.Flags&unix.IFA_F_TENTATIVE != 0 }) {
				return false
			}
		}
		return true
	})
	return h, peer
}

func routeTo(t testing.TB, h *lab.Host, dst, gateway, ifname string) *netlink.Route {
	t.Helper()
	prefix, err := netlink.ParseIPNet(dst)
	must(t, err)
	r := &netlink.Route{Dst: prefix}
	if ifname != "" {
		r.LinkIndex = linkOf(t, h, ifname).Attrs().Index
	}
	if gateway != "" {
		r.Gw = netip.MustParseAddr(gateway).AsSlice()
	}
	return r
}

func permanent(t testing.TB, h *lab.Host, ifname, addr, to string) *netlink.Neigh {
	t.Helper()
	return &netlink.Neigh{LinkIndex: linkOf(t, h, ifname).Attrs().Index, State: unix.NUD_PERMANENT, IP: netip.MustParseAddr(addr).AsSlice(), HardwareAddr: mac(to)}
}

// TestHops: what the routes and neighbours say of a destination by an interface, after each
// change.
func TestHops(t *testing.T) {
	h, peer := routed(t)
	nl := h.Netlink()
	f := follow(t, watchHost(t, h, receiveBuffer))
	key := func(dst string) HopKey { return HopKey{f.last.Link("eth0").LinkID, netip.MustParseAddr(dst)} }
	var keys []HopKey
	for _, dst := range []string{"10.0.0.2", "10.0.0.255", "10.0.0.1", "10.1.0.1", "10.1.0.2", "10.99.0.5", "2001:db8::2", "2001:db8::1", "2001:db8:99::5", "fe80::77", "255.255.255.255"} {
		keys = append(keys, key(dst))
	}
	f.w.Ask(keys)
	f.last = snapshot(t, f.w)
	far := "10.99.0.5"
	via := func(addr string, gateway bool, to string) Hop {
		hop := Hop{Kind: HopUnicast, Via: netip.MustParseAddr(addr), Gateway: gateway}
		if to != "" {
			hop.MAC, hop.Resolved = [6]byte(mac(to)), true
		}
		return hop
	}
	none := func() error { return nil }
	for _, tt := range []struct {
		name string
		do   func() error
		dst  string
		want Hop
	}{
		{"on the link", none, "10.0.0.2", via("10.0.0.2", false, "")},
		{"broadcast", none, "10.0.0.255", Hop{Kind: HopBroadcast}},
		{"limited broadcast", none, "255.255.255.255", Hop{Kind: HopBroadcast}},
		{"own", none, "10.0.0.1", Hop{Kind: HopLocal}},
		{"own of another interface", none, "10.1.0.1", Hop{Kind: HopLocal}},
		{"by another interface alone", none, "10.1.0.2", Hop{Kind: HopNone}},
		{"no route", none, far, Hop{Kind: HopNone}},
		{"IPv6 on the link", none, "2001:db8::2", via("2001:db8::2", false, "")},
		{"IPv6 own", none, "2001:db8::1", Hop{Kind: HopLocal}},
		{"IPv6 without a route", none, "2001:db8:99::5", Hop{Kind: HopNone}},
		{"neighbour", func() error { return nl.NeighSet(permanent(t, h, "eth0", "10.0.0.2", "02:00:00:00:00:02")) },
			"10.0.0.2", via("10.0.0.2", false, "02:00:00:00:00:02")},
		{"route by another interface", func() error { return nl.RouteAdd(routeTo(t, h, "10.99.0.0/16", "10.1.0.2", "eth1")) },
			far, Hop{Kind: HopNone}},
		{"gateway", func() error { return nl.RouteAdd(routeTo(t, h, "10.99.0.0/24", "10.0.0.2", "eth0")) },
			far, via("10.0.0.2", true, "02:00:00:00:00:02")},
		{"neighbour with another MAC", func() error { return nl.NeighSet(permanent(t, h, "eth0", "10.0.0.2", "02:00:00:00:00:03")) },
			far, via("10.0.0.2", true, "02:00:00:00:00:03")},
		{"unrelated route", func() error { return nl.RouteAdd(routeTo(t, h, "203.0.113.0/24", "10.0.0.77", "eth0")) },
			far, via("10.0.0.2", true, "02:00:00:00:00:03")},
		{"another gateway", func() error { return nl.RouteReplace(routeTo(t, h, "10.99.0.0/24", "10.0.0.3", "eth0")) },
			far, via("10.0.0.3", true, "")},
		{"its neighbour", func() error { return nl.NeighSet(permanent(t, h, "eth0", "10.0.0.3", "02:00:00:00:00:04")) },
			far, via("10.0.0.3", true, "02:00:00:00:00:04")},
		{"several gateways", func() error {
			r := routeTo(t, h, "10.99.0.0/24", "", "")
			for i, gw := range []string{"10.1.0.2", "10.0.0.2"} {
				r.MultiPath = append(r.MultiPath, &netlink.NexthopInfo{LinkIndex: linkOf(t, h, fmt.Sprint("eth", 1-i)).Attrs().Index, Gw: netip.MustParseAddr(gw).AsSlice()})
			}
			return nl.RouteReplace(r)
		}, far, via("10.0.0.2", true, "02:00:00:00:00:03")},
		{"blackhole", func() error {
			r := routeTo(t, h, "10.99.0.5/32", "", "")
			r.Type = unix.RTN_BLACKHOLE
			return nl.RouteAdd(r)
		}, far, Hop{Kind: HopNone}},
		{"prohibited", func() error {
			r := routeTo(t, h, "10.99.0.5/32", "", "")
			r.Type = unix.RTN_PROHIBIT
			return nl.RouteReplace(r)
		}, far, Hop{Kind: HopNone}},
		{"IPv4 by IPv6", func() error {
			r := routeTo(t, h, "10.99.0.5/32", "", "eth0")
			r.Via = &netlink.Via{AddrFamily: unix.AF_INET6, Addr: netip.MustParseAddr("fe80::2").AsSlice()}
			return nl.RouteReplace(r)
		}, far, via("fe80::2", true, "")},
		{"rule", func() error {
			rule := netlink.NewRule()
			rule.Dst, rule.Table, rule.Priority = routeTo(t, h, "10.0.0.2/32", "", "").Dst, 77, 5
			r := routeTo(t, h, "0.0.0.0/0", "10.0.0.3", "eth0")
			r.Table = 77
			return errors.Join(nl.RouteAdd(r), nl.RuleAdd(rule))
		}, "10.0.0.2", via("10.0.0.3", true, "02:00:00:00:00:04")},
		{"no rule", func() error {
			rule := netlink.NewRule()
			rule.Dst, rule.Table, rule.Priority = routeTo(t, h, "10.0.0.2/32", "", "").Dst, 77, 5
			return nl.RuleDel(rule)
		}, "10.0.0.2", via("10.0.0.2", false, "02:00:00:00:00:03")},
		{"IPv6 gateway", func() error { return nl.RouteAdd(routeTo(t, h, "2001:db8:99::/48", "fe80::2", "eth0")) },
			"2001:db8:99::5", via("fe80::2", true, "")},
		// The kernel drops IPv4 routes unannounced.
		{"down", func() error { return h.SetUp("eth0", false) }, "10.0.0.2", Hop{Kind: HopNone}},
		{"up", func() error { return h.SetUp("eth0", true) }, "10.0.0.2", via("10.0.0.2", false, "")},
		{"address gone", func() error { return nl.AddrDel(linkOf(t, h, "eth0"), mustAddr("10.0.0.1/24")) }, "10.0.0.2", Hop{Kind: HopNone}},
		{"own no more", none, "10.0.0.1", Hop{Kind: HopNone}},
		{"address back", func() error { return nl.AddrAdd(linkOf(t, h, "eth0"), mustAddr("10.0.0.1/24")) },
			"10.0.0.2", via("10.0.0.2", false, "")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f.t = t
			must(t, tt.do())
			f.until(fmt.Sprintf("%s is %+v", tt.dst, tt.want), func(s *Snapshot) bool { return s.Hop(key(tt.dst)).Equal(tt.want) })
			f.agree(h, func() []HopKey { return keys })
		})
	}
	f.t = t
	_ = peer

	// What is not asked for any more is not in the snapshot, and not followed.
	f.w.Ask(keys[:1])
	if s := snapshot(t, f.w); len(s.hops) != 1 || s.Hop(keys[5]).Kind != HopUnknown {
		t.Errorf("there are still %d hops", len(s.hops))
	}
	c := count(f.w)
	// Of the link that came up last, the kernel announces the carrier, addresses and routes a moment later.
	var calls map[string]int
	defer func() {
		if t.Failed() {
			t.Logf("for what nobody asks the kernel was last asked %v", calls)
		}
	}()
	labtest.Eventually(t, "the kernel is asked nothing for what nobody asks", func() bool {
		must(t, nl.NeighSet(permanent(t, h, "eth0", "10.0.0.3", "02:00:00:00:00:05")))
		must(t, nl.RouteReplace(routeTo(t, h, "10.99.0.0/24", "10.0.0.3", "eth0")))
		snapshot(t, f.w)
		calls = c.take()
		return len(calls) == 0
	})
	f.w.Ask(nil)
	if s := snapshot(t, f.w); len(s.hops) != 0 {
		t.Errorf("there are still %d hops", len(s.hops))
	}
	// The life of a link is over: so are the ways by it.
	f.w.Ask([]HopKey{{LinkID{keys[0].Link.Index, 1 << 40}, keys[0].Dst}})
	if hop := snapshot(t, f.w).Hop(HopKey{LinkID{keys[0].Link.Index, 1 << 40}, keys[0].Dst}); !errors.Is(hop.Err, unix.ENODEV) || hop.Kind != HopUnknown {
		t.Errorf("the hop by another life of the link is %+v", hop)
	}
}

// TestHopKeeps: a hop stays resolved while unrelated routes change, and the kernel is asked
// again only about destinations that a change is about, not more often than every 100 ms.
func TestHopKeeps(t *testing.T) {
	h, _ := routed(t)
	nl := h.Netlink()
	must(t, nl.NeighSet(permanent(t, h, "eth0", "10.0.0.2", "02:00:00:00:00:02")))
	w := watchHost(t, h, receiveBuffer)
	key := HopKey{snapshot(t, w).Link("eth0").LinkID, netip.MustParseAddr("10.0.0.2")}
	w.Ask([]HopKey{key})
	first := snapshot(t, w)
	if !first.Hop(key).Resolved {
		t.Fatalf("the hop is %+v", first.Hop(key))
	}
	c := count(w)
	must(t, nl.RouteAdd(routeTo(t, h, "203.0.113.0/24", "10.0.0.77", "eth0")))
	if s := snapshot(t, w); s != first || len(c.calls) != 0 {
		t.Errorf("an unrelated route changed, and the kernel was asked %v; the same snapshot: %v", c.calls, s == first)
	}
	began := time.Now()
	for i := range 200 {
		must(t, nl.RouteReplace(routeTo(t, h, "10.0.0.0/25", "", "eth0")))
		must(t, nl.RouteReplace(routeTo(t, h, "10.0.0.0/26", "", "eth0")))
		must(t, nl.RouteDel(routeTo(t, h, "10.0.0.0/26", "", "eth0")))
		if s := snapshot(t, w); s != first {
			t.Fatalf("after %d changes the hop is %+v", i, s.Hop(key))
		}
	}
	if most := 1 + int(time.Since(began)/routesPause); c.calls["route"] == 0 || c.calls["route"] > most {
		t.Errorf("the route was asked for %d times, at most %d are due", c.calls["route"], most)
	}
	// The last change waits for its time, which is announced.
	must(t, nl.RouteReplace(routeTo(t, h, "10.0.0.2/32", "10.0.0.99", "eth0")))
	w.mu.Lock()
	const pause = 2 * time.Second
	w.routesAt = time.Now().Add(pause)
	due := w.routesAt
	w.mu.Unlock()
	if s := snapshot(t, w); s != first && time.Now().Before(due) {
		t.Error("the pause was not kept")
	}
	if d := w.Due(); d == 0 && time.Now().Before(due) || d > pause {
		t.Errorf("the last change is due in %v", d)
	}
	for snapshot(t, w).Hop(key).Via != netip.MustParseAddr("10.0.0.99") {
		select {
		case <-w.Changed():
		case <-time.After(labtest.Timeout):
			t.Fatal("the last change was never announced")
		}
	}
}

// TestNexthopObjects: routes by such objects are followed, also where the kernel hides what
// they stand for.
func TestNexthopObjects(t *testing.T) {
	h, _ := routed(t)
	ip := func(args ...string) {
		t.Helper()
		must(t, runIP(h, args...))
	}
	ip("nexthop", "add", "id", "5", "via", "10.0.0.2", "dev", "eth0")
	ip("route", "add", "10.99.0.0/24", "nhid", "5")
	f := follow(t, watchHost(t, h, receiveBuffer))
	key := HopKey{f.last.Link("eth0").LinkID, netip.MustParseAddr("10.99.0.5")}
	f.w.Ask([]HopKey{key})
	f.last = snapshot(t, f.w)
	until := func(via string) {
		t.Helper()
		f.until("the way is by "+via, func(s *Snapshot) bool { return s.Hop(key).Via == netip.MustParseAddr(via) && s.Hop(key).Gateway })
	}
	until("10.0.0.2")
	ip("nexthop", "replace", "id", "5", "via", "10.0.0.3", "dev", "eth0")
	until("10.0.0.3")
	labtest.Do(t, h, func() error { return os.WriteFile("/proc/sys/net/ipv4/nexthop_compat_mode", []byte("0"), 0o644) })
	ip("nexthop", "replace", "id", "5", "via", "10.0.0.4", "dev", "eth0")
	until("10.0.0.4")
	f.w.Resync()
	until("10.0.0.4")
}

// TestNeighbourAnswers: whether a neighbour that the kernel keeps resolved answers is seen, and
// remembered while it is asked again.
func TestNeighbourAnswers(t *testing.T) {
	h, peer := routed(t)
	var n *Neighbours
	labtest.Do(t, h, func() (err error) { n, err = OpenNeighbours(); return err })
	defer n.Close()
	f := follow(t, watchHost(t, h, receiveBuffer))
	id := f.last.Link("eth0").LinkID
	there, silent := HopKey{id, netip.MustParseAddr("10.0.0.2")}, HopKey{id, netip.MustParseAddr("10.0.0.9")}
	f.w.Ask([]HopKey{there, silent})
	f.last = snapshot(t, f.w)
	for _, key := range []HopKey{there, silent} {
		if hop := f.last.Hop(key); hop.Kind != HopUnicast || hop.Resolved || hop.Failed || hop.Err != nil {
			t.Errorf("before anybody asks %s is %+v", key.Dst, hop)
		}
		must(t, n.Manage(NeighbourKey{id.Index, key.Dst}))
	}
	want := [6]byte(linkOf(t, peer, "eth0").Attrs().HardwareAddr)
	f.until("the neighbour answers", func(s *Snapshot) bool { hop := s.Hop(there); return hop.Resolved && hop.MAC == want && !hop.Failed })
	f.until("the other fails", func(s *Snapshot) bool { return s.Hop(silent).Failed })
	must(t, n.Forget(NeighbourKey{id.Index, silent.Dst}))
	must(t, n.Manage(NeighbourKey{id.Index, silent.Dst}))
	must(t, peer.AddAddr("eth0", "10.0.0.9/24"))
	f.until("the other answers", func(s *Snapshot) bool { return s.Hop(silent).Resolved && !s.Hop(silent).Failed })
	must(t, peer.Netlink().LinkSetHardwareAddr(linkOf(t, peer, "eth0"), mac("02:00:00:00:00:09")))
	must(t, h.Netlink().NeighDel(&netlink.Neigh{LinkIndex: id.Index, IP: netip.MustParseAddr("10.0.0.2").AsSlice()}))
	f.until("the entry is gone", func(s *Snapshot) bool { return !s.Hop(there).Resolved })
	must(t, n.Manage(NeighbourKey{id.Index, there.Dst}))
	f.until("the other MAC is known", func(s *Snapshot) bool { return s.Hop(there).MAC == [6]byte{2, 0, 0, 0, 0, 9} })
}

// TestNeighbours: entries are made, known again, and removed, and others' are left alone.
func TestNeighbours(t *testing.T) {
	h, _ := routed(t)
	var n *Neighbours
	labtest.Do(t, h, func() (err error) { n, err = OpenNeighbours(); return err })
	defer n.Close()
	index := linkOf(t, h, "eth0").Attrs().Index
	key := func(addr string) NeighbourKey { return NeighbourKey{index, netip.MustParseAddr(addr)} }
	observe := func(want ...Neighbour) {
		t.Helper()
		got, err := n.Observe()
		must(t, err)
		slices.SortFunc(got, func(a, b Neighbour) int { return a.Addr.Compare(b.Addr) })
		if !slices.Equal(got, want) {
			t.Errorf("the entries are %+v, want %+v", got, want)
		}
	}
	observe()
	for range 2 {
		for _, addr := range []string{"10.0.0.2", "10.0.0.3", "2001:db8::2"} {
			must(t, n.Manage(key(addr)))
		}
	}
	observe(Neighbour{key("10.0.0.2"), true, false}, Neighbour{key("10.0.0.3"), true, false}, Neighbour{key("2001:db8::2"), true, false})
	// One that somebody has, and one that somebody takes over.
	must(t, h.Netlink().NeighSet(permanent(t, h, "eth0", "10.0.0.4", "02:00:00:00:00:04")))
	must(t, n.Manage(key("10.0.0.4")))
	must(t, h.Netlink().NeighSet(permanent(t, h, "eth0", "10.0.0.3", "02:00:00:00:00:03")))
	for _, addr := range []string{"10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "2001:db8::2"} {
		must(t, n.Forget(key(addr)))
	}
	for _, e := range func() []Neighbour { got, err := n.Observe(); must(t, err); return got }() {
		if !e.Static {
			t.Errorf("entry %+v remains", e)
		}
	}
	list, err := h.Netlink().NeighList(index, unix.AF_INET)
	must(t, err)
	for _, addr := range []string{"10.0.0.3", "10.0.0.4"} {
		if !slices.ContainsFunc(list, func(e netlink.Neigh) bool { return e.IP.String() == addr && e.State&unix.NUD_PERMANENT != 0 }) {
			t.Errorf("the permanent entry of %s is gone", addr)
		}
	}
	if err := n.Manage(NeighbourKey{1 << 20, netip.MustParseAddr("10.0.0.2")}); !errors.Is(err, unix.ENODEV) {
		t.Errorf("without an interface, the error is %v", err)
	}
}

// TestHopFaults: why the kernel gives no answer is in the hop, and it is asked again.
func TestHopFaults(t *testing.T) {
	h, _ := routed(t)
	must(t, h.Netlink().NeighSet(permanent(t, h, "eth0", "10.0.0.2", "02:00:00:00:00:02")))
	w := watchHost(t, h, receiveBuffer)
	key := HopKey{snapshot(t, w).Link("eth0").LinkID, netip.MustParseAddr("10.0.0.2")}
	c := count(w)
	for _, what := range []string{"route", "neighbour"} {
		c.fail = func(asked string) error {
			if asked == what {
				return unix.ENOBUFS
			}
			return nil
		}
		w.Ask([]HopKey{key})
		if hop := snapshot(t, w).Hop(key); !errors.Is(hop.Err, unix.ENOBUFS) || hop.Resolved {
			t.Errorf("without an answer about the %s the hop is %+v", what, hop)
		}
		if due := w.Due(); due > retryPause {
			t.Errorf("it is due in %v", due)
		}
		c.fail = nil
		f := follow(t, w)
		f.until("the hop is resolved", func(s *Snapshot) bool { return s.Hop(key).Resolved && s.Hop(key).Err == nil })
		w.Ask(nil)
		snapshot(t, w)
	}
}
