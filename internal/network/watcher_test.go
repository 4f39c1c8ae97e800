package network

import (
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// passing loads an XDP program that passes everything.
func passing(t testing.TB) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()}, License: "GPL"})
	must(t, err)
	t.Cleanup(func() { p.Close() })
	return p
}

// TestEvents: each change of a link is announced, and seen.
func TestEvents(t *testing.T) {
	h, peer := labtest.Host(t, "network"), labtest.Host(t, "networkp")
	connect := func(name string) {
		labtest.Connect(t, lab.End{Host: h, Name: name, Queues: 2}, lab.End{Host: peer, Name: name, Queues: 2})
	}
	connect("eth0")
	add(t, h, &netlink.Bridge{LinkAttrs: attrs("br0")})
	must(t, h.SetUp("br0", true))
	program := passing(t)
	nl := h.Netlink()
	index := linkOf(t, h, "eth0").Attrs().Index
	eth := func() netlink.Link { return linkOf(t, h, "eth0") }
	attach := func(fd, flags int) error {
		return h.Do(func() error { return netlink.LinkSetXdpFdWithFlags(eth(), fd, flags) })
	}
	// Before Linux 6.3 no device says what it can.
	said := labtest.DevicesTellFeatures(t, h)
	says := func(f Features) Features {
		if !said {
			return Features{}
		}
		return f
	}
	f := follow(t, watchHost(t, h, receiveBuffer))
	addrs := func(l *Link, want ...netip.Addr) bool {
		return slices.Equal(slices.DeleteFunc(slices.Clone(l.Addrs), netip.Addr.Is6), want)
	}
	for _, tt := range []struct {
		name string
		do   func() error
		want func(l *Link) bool
	}{
		{"as made", func() error { return nil }, func(l *Link) bool {
			return l.Name == "eth0" && l.Kind == "veth" && l.Ethernet && !l.Loopback && !l.Hardware && l.Lower == 0 && l.Running() &&
				l.MTU == 1500 && l.Queues == 2 && l.Features == says(Features{true, true, true, true})
		}},
		{"down", func() error { return h.SetUp("eth0", false) }, func(l *Link) bool { return !l.Up && !l.Carrier }},
		{"up", func() error { return h.SetUp("eth0", true) }, (*Link).Running},
		{"peer down", func() error { return peer.SetUp("eth0", false) }, func(l *Link) bool { return l.Up && !l.Carrier }},
		{"peer up", func() error { return peer.SetUp("eth0", true) }, (*Link).Running},
		{"receive offload of the peer off", func() error { return peer.Do(func() error { return lab.SetGRO("eth0", false) }) },
			func(l *Link) bool { return l.Features == says(Features{Known: true, Native: true}) }},
		{"receive offload of the peer on", func() error { return peer.Do(func() error { return lab.SetGRO("eth0", true) }) },
			func(l *Link) bool { return l.Features == says(Features{true, true, true, true}) }},
		{"one queue", func() error {
			if err := peer.Do(func() error { return lab.SetChannels("eth0", 2, 1) }); err != nil {
				return err
			}
			return h.Do(func() error { return lab.SetChannels("eth0", 1, 1) })
		}, func(l *Link) bool { return l.Queues == 1 }},
		{"two queues", func() error { return h.Do(func() error { return lab.SetChannels("eth0", 2, 2) }) }, func(l *Link) bool { return l.Queues == 2 }},
		{"MTU", func() error { return nl.LinkSetMTU(eth(), 1400) }, func(l *Link) bool { return l.MTU == 1400 }},
		{"MAC", func() error { return nl.LinkSetHardwareAddr(eth(), mac("02:00:00:00:00:07")) },
			func(l *Link) bool { return l.MAC == [6]byte{2, 0, 0, 0, 0, 7} }},
		{"alternative names", func() error {
			return errors.Join(nl.LinkAddAltName(eth(), "wire-number-two-of-the-front"), nl.LinkAddAltName(eth(), "alt"))
		}, func(l *Link) bool { return slices.Equal(l.AltNames, []string{"alt", "wire-number-two-of-the-front"}) }},
		{"alternative name removed", func() error { return nl.LinkDelAltName(eth(), "alt") }, func(l *Link) bool { return len(l.AltNames) == 1 }},
		{"address", func() error { return nl.AddrAdd(eth(), mustAddr("10.0.0.1/24")) },
			func(l *Link) bool { return addrs(l, netip.MustParseAddr("10.0.0.1")) }},
		{"address gone", func() error { return nl.AddrDel(eth(), mustAddr("10.0.0.1/24")) }, func(l *Link) bool { return addrs(l) }},
		{"point to point", func() error {
			a := mustAddr("10.0.0.1/32")
			a.Peer = mustAddr("10.0.9.9/32").IPNet
			return nl.AddrAdd(eth(), a)
		}, func(l *Link) bool { return addrs(l, netip.MustParseAddr("10.0.0.1")) }},
		{"master", func() error { return nl.LinkSetMaster(eth(), linkOf(t, h, "br0")) },
			func(l *Link) bool { return l.Master == linkOf(t, h, "br0").Attrs().Index && l.MasterKind == "bridge" }},
		{"no master", func() error { return nl.LinkSetNoMaster(eth()) }, func(l *Link) bool { return l.Master == 0 && l.MasterKind == "" }},
		{"program", func() error { return attach(program.FD(), unix.XDP_FLAGS_SKB_MODE) },
			func(l *Link) bool { return slices.Equal(l.XDP, []XDP{{idOf(t, program), true}}) }},
		{"program gone", func() error { return attach(-1, unix.XDP_FLAGS_SKB_MODE) }, func(l *Link) bool { return len(l.XDP) == 0 }},
		{"program in the driver", func() error { return attach(program.FD(), unix.XDP_FLAGS_DRV_MODE) },
			func(l *Link) bool { return slices.Equal(l.XDP, []XDP{{idOf(t, program), false}}) }},
		// Before Linux 6.2 a link is renamed while it is down.
		{"down again", func() error { return h.SetUp("eth0", false) }, func(l *Link) bool { return !l.Up }},
		{"rename", func() error { return nl.LinkSetName(eth(), "wan") }, func(l *Link) bool { return l.Name == "wan" }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f.t = t
			before := f.last.ByIndex(index)
			must(t, tt.do())
			s := f.until(tt.name, func(s *Snapshot) bool { l := s.ByIndex(index); return l != nil && tt.want(l) })
			if l := s.ByIndex(index); l.LinkID != before.LinkID {
				t.Errorf("the link is %v, was %v", l.LinkID, before.LinkID)
			}
			f.agree(h, nil)
			for _, name := range append(f.last.ByIndex(index).AltNames, f.last.ByIndex(index).Name) {
				if got := f.last.Link(name); got != f.last.ByIndex(index) {
					t.Errorf("link %s is %v", name, got)
				}
			}
		})
	}
}

func idOf(t testing.TB, p *ebpf.Program) uint32 {
	t.Helper()
	info, err := p.Info()
	must(t, err)
	id, _ := info.ID()
	return uint32(id)
}

// TestCarrier: what the kernel says of devices that have no wire.
func TestCarrier(t *testing.T) {
	h := labtest.Host(t, "network")
	f := follow(t, watchHost(t, h, receiveBuffer))
	carrier := func(name string, want bool) {
		t.Helper()
		f.until(fmt.Sprintf("the carrier of %s is %v", name, want), func(s *Snapshot) bool {
			l := s.Link(name)
			return l != nil && l.Up && l.Carrier == want
		})
	}
	carrier("lo", true)
	add(t, h, &netlink.Ifb{LinkAttrs: attrs("ifb0")})
	must(t, h.SetUp("ifb0", true))
	carrier("ifb0", true)
	add(t, h, &netlink.Bridge{LinkAttrs: attrs("br0")})
	must(t, h.SetUp("br0", true))
	carrier("br0", true) // until it has had a port, to the kernel
	must(t, h.Netlink().LinkSetMaster(linkOf(t, h, "ifb0"), linkOf(t, h, "br0")))
	carrier("br0", true)
	must(t, h.Netlink().LinkSetNoMaster(linkOf(t, h, "ifb0")))
	carrier("br0", false)
	add(t, h, &netlink.Veth{LinkAttrs: attrs("wire0"), PeerName: "wire1"})
	must(t, h.SetUp("wire0", true))
	must(t, h.SetUp("wire1", true))
	lower := linkOf(t, h, "wire0").Attrs().Index
	a := attrs("mac0")
	a.ParentIndex = lower
	add(t, h, &netlink.Macvlan{LinkAttrs: a, Mode: netlink.MACVLAN_MODE_BRIDGE})
	must(t, h.SetUp("mac0", true))
	carrier("mac0", true)
	if l := f.last.Link("mac0"); l.Lower != lower || l.Kind != "macvlan" {
		t.Errorf("macvlan is %+v", l)
	}
	must(t, h.SetUp("wire1", false))
	carrier("mac0", false)

	// A tun device has a carrier while somebody reads it.
	var reader *os.File
	attach := func() {
		labtest.Do(t, h, func() error {
			fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				labtest.Lacking(t, "no /dev/net/tun: "+err.Error())
			}
			request, err := unix.NewIfreq("tun0")
			if err != nil {
				return err
			}
			request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
			if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
				return err
			}
			reader = os.NewFile(uintptr(fd), "tun")
			return unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1)
		})
	}
	attach()
	must(t, h.SetUp("tun0", true))
	carrier("tun0", true)
	if l := f.last.Link("tun0"); l.Ethernet || l.MAC != [6]byte{} {
		t.Errorf("tun is %+v", l)
	}
	must(t, reader.Close())
	carrier("tun0", false)
	attach()
	carrier("tun0", true)
	must(t, reader.Close())
	f.agree(h, nil)
}

// TestGenerations: each life of a link is told from the others, also of the same index and
// between two snapshots; what only looks like an end is none.
func TestGenerations(t *testing.T) {
	h, peer := labtest.Host(t, "network"), labtest.Host(t, "networkp")
	nl := h.Netlink()
	a := attrs("eth0")
	a.Index = 4000
	remake := func() error { return nl.LinkAdd(&netlink.Ifb{LinkAttrs: a}) }
	must(t, remake())
	add(t, h, &netlink.Bridge{LinkAttrs: attrs("br0")})
	w := watchHost(t, h, receiveBuffer)
	last := snapshot(t, w).ByIndex(4000)
	other := snapshot(t, w).Link("br0")
	eth := func() netlink.Link { return linkOf(t, h, "eth0") }
	for _, tt := range []struct {
		name  string
		do    func() error
		other bool // another life
	}{
		{"made again", func() error { return errors.Join(nl.LinkDel(eth()), remake()) }, true},
		{"made again twice", func() error { return errors.Join(nl.LinkDel(eth()), remake(), nl.LinkDel(eth()), remake()) }, true},
		{"away and back", func() error {
			err := nl.LinkSetNsFd(eth(), peer.FD())
			return errors.Join(err, peer.Netlink().LinkSetNsFd(linkOf(t, peer, "eth0"), h.FD()))
		}, true},
		{"enslaved", func() error { return nl.LinkSetMaster(eth(), linkOf(t, h, "br0")) }, false},
		{"freed", func() error { return nl.LinkSetNoMaster(eth()) }, false},
		{"renamed", func() error { return nl.LinkSetName(eth(), "eth1") }, false},
		{"renamed back", func() error { return nl.LinkSetName(linkOf(t, h, "eth1"), "eth0") }, false},
		{"down and up", func() error { return errors.Join(h.SetUp("eth0", true), h.SetUp("eth0", false)) }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			must(t, tt.do())
			s := snapshot(t, w)
			l := s.ByIndex(4000)
			if l == nil {
				t.Fatalf("the link is gone:\n%s", describe(s))
			}
			if (l.Generation > last.Generation) != tt.other || l.Generation < last.Generation {
				t.Errorf("the link is %v, was %v", l.LinkID, last.LinkID)
			}
			if s.Link(l.Name) != l {
				t.Errorf("link %s is %+v", l.Name, s.Link(l.Name))
			}
			last = l
		})
	}
	must(t, nl.LinkDel(eth()))
	if l := snapshot(t, w).ByIndex(4000); l != nil {
		t.Errorf("the link is there after its end: %+v", l)
	}
	must(t, remake())
	if l := snapshot(t, w).ByIndex(4000); l == nil || l.Generation <= last.Generation {
		t.Errorf("the link is %+v, was %v", l, last.LinkID)
	}
	if now := snapshot(t, w).Link("br0"); now.LinkID != other.LinkID {
		t.Errorf("another link is %v, was %v", now.LinkID, other.LinkID)
	}
}

// TestUnchanged: links that are as they were keep their pointers, a snapshot of the same is the
// same, and asks the kernel nothing.
func TestUnchanged(t *testing.T) {
	h := labtest.Host(t, "network")
	for i := range 20 {
		add(t, h, &netlink.Ifb{LinkAttrs: attrs(fmt.Sprint("eth", i))})
	}
	w := watchHost(t, h, receiveBuffer)
	first := snapshot(t, w)
	c := count(w)
	if again := snapshot(t, w); again != first || len(c.calls) != 0 {
		t.Errorf("nothing changed, and the kernel was asked %v; the same snapshot: %v", c.calls, again == first)
	}
	must(t, h.Netlink().LinkSetMTU(linkOf(t, h, "eth7"), 1400))
	second := snapshot(t, w)
	if got := c.take(); len(got) != 4 || got["link"] != 1 || got["addrs"] != 1 || got["features"] != 1 || got["queues"] != 1 {
		t.Errorf("one link changed, and the kernel was asked %v", got)
	}
	d := Diff(first, second)
	if len(d.Links) != 1 || !d.Links["eth7"] || d.Own || len(d.Hops) != 0 {
		t.Errorf("the difference is %+v", d)
	}
	for _, l := range second.Links() {
		if same := l == first.Link(l.Name); same == (l.Name == "eth7") {
			t.Errorf("link %s is the same pointer: %v", l.Name, same)
		}
	}
	w.Resync()
	if again := snapshot(t, w); again != second {
		t.Error("a look at everything made another snapshot of the same")
	}
	if got := c.take(); got["links"] != 1 || got["all addrs"] != 1 || got["all features"] != 1 || got["all queues"] != 1 {
		t.Errorf("for a look at everything the kernel was asked %v", got)
	}
	select {
	case <-w.Changed():
	default:
		t.Error("Resync was not announced")
	}
}

// TestStorm: many links that come and go cost a look at the lists, not one at each.
func TestStorm(t *testing.T) {
	h := labtest.Host(t, "network")
	w := watchHost(t, h, receiveBuffer)
	first := snapshot(t, w)
	c := count(w)
	for i := range 1000 {
		l := &netlink.Veth{LinkAttrs: attrs("v"), PeerName: "p"}
		add(t, h, l)
		must(t, h.Netlink().LinkDel(l))
		if i == 500 {
			add(t, h, &netlink.Ifb{LinkAttrs: attrs("stays")})
		}
	}
	s := snapshot(t, w)
	if d := Diff(first, s); len(d.Links) != 1 || !d.Links["stays"] {
		t.Errorf("the difference is %+v", d)
	}
	got := c.take()
	if got["links"] != 1 || got["all addrs"] != 1 || got["link"] != 0 || got["addrs"] != 0 {
		t.Errorf("the kernel was asked %v", got)
	}
}

// TestOverflow: announcements that are lost lose nothing, but that each link may be another.
func TestOverflow(t *testing.T) {
	h := labtest.Host(t, "network")
	a := attrs("eth0")
	a.Index = 4000
	add(t, h, &netlink.Ifb{LinkAttrs: a})
	w := watchHost(t, h, 1) // the kernel's least
	before := snapshot(t, w)
	lost := false
	for range 100 {
		// While it is held, nothing is read.
		w.mu.Lock()
		for i := range 20 {
			must(t, h.Netlink().LinkSetMTU(linkOf(t, h, "lo"), 10000+i))
		}
		must(t, h.Netlink().LinkDel(linkOf(t, h, "eth0")))
		add(t, h, &netlink.Ifb{LinkAttrs: a})
		w.mu.Unlock()
		s := snapshot(t, w)
		if d := describe(anew(t, h, nil)); describe(s) != d {
			t.Fatalf("the snapshot is\n%s, read anew it is\n%s", describe(s), d)
		}
		if l := s.ByIndex(4000); l.Generation <= before.ByIndex(4000).Generation {
			t.Fatalf("the link is %v, was %v", l.LinkID, before.ByIndex(4000).LinkID)
		}
		lost = lost || s.Link("lo").Generation > before.Link("lo").Generation
		before = s
	}
	if !lost {
		t.Error("nothing was lost: the test shows nothing")
	}
}

// TestFaults: an answer that fails changes nothing, and is asked for again.
func TestFaults(t *testing.T) {
	h := labtest.Host(t, "network")
	w := watchHost(t, h, receiveBuffer)
	first := snapshot(t, w)
	c := count(w)
	for _, what := range []string{"link", "addrs", "features", "links", "all addrs", "all features"} {
		t.Run(what, func(t *testing.T) {
			c.fail = func(asked string) error {
				if asked == what {
					return unix.ENOBUFS
				}
				return nil
			}
			mtu := first.Link("lo").MTU - 1
			must(t, h.Netlink().LinkSetMTU(linkOf(t, h, "lo"), mtu))
			if what[0] == 'a' && what != "addrs" || what == "links" {
				w.Resync()
			}
			if s, err := w.Snapshot(); !errors.Is(err, unix.ENOBUFS) || s != nil {
				t.Fatalf("snapshot is %v, error %v", s, err)
			}
			if due := w.Due(); due > retryPause {
				t.Errorf("it is due in %v", due)
			}
			c.fail = nil
			s := snapshot(t, w)
			if l := s.Link("lo"); l.MTU != mtu || l.LinkID != first.Link("lo").LinkID {
				t.Errorf("the link is %+v", l)
			}
			first = s
		})
	}
	// Without queues a link is as good.
	c.fail = func(asked string) error {
		if asked == "all queues" {
			return unix.ENODEV
		}
		return nil
	}
	w.Resync()
	if s := snapshot(t, w); s != first {
		t.Errorf("with devices asleep it is another snapshot:\n%s", describe(s))
	}
}

// TestInterrupted: a list that changes while it is read is read again, and given up at last.
func TestInterrupted(t *testing.T) {
	for _, tt := range []struct {
		times int
		err   error
		want  bool
	}{{0, nil, true}, {3, errInterrupted, true}, {3, unix.EBUSY, true}, {dumps, errInterrupted, false}, {1, unix.EPERM, false}} {
		tries := 0
		err := readAll("things", func() error {
			if tries++; tries <= tt.times {
				return tt.err
			}
			return nil
		})
		if (err == nil) != tt.want || err != nil && !errors.Is(err, tt.err) {
			t.Errorf("%d times %v: error is %v", tt.times, tt.err, err)
		}
	}
}

// TestClosed: a watcher that is closed says so and can be closed again.
func TestClosed(t *testing.T) {
	h := labtest.Host(t, "network")
	w := watchHost(t, h, receiveBuffer)
	snapshot(t, w)
	must(t, w.Close())
	if _, err := w.Snapshot(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("error is %v", err)
	}
	w.Ask([]HopKey{{Dst: netip.MustParseAddr("10.0.0.1")}})
	w.Resync()
	w.Due()
}

var linksFlag = flag.Int("links", 500, "links of TestManyLinks")

// TestManyLinks: a change of one link among many costs a look at that link.
func TestManyLinks(t *testing.T) {
	h := labtest.Host(t, "network")
	var batch strings.Builder
	for i := range *linksFlag {
		fmt.Fprintf(&batch, "link add eth%d type ifb\n", i)
	}
	must(t, h.Do(func() error {
		cmd := exec.Command("ip", "-batch", "-")
		cmd.Stdin = strings.NewReader(batch.String())
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}))
	began := time.Now()
	w := watchHost(t, h, receiveBuffer)
	last := snapshot(t, w)
	t.Logf("%d links: the first snapshot took %v", len(last.Links()), time.Since(began))
	c := count(w)
	least := time.Hour
	for i := range 20 {
		name := fmt.Sprint("eth", i*len(last.Links())/25)
		must(t, h.Netlink().LinkSetMTU(linkOf(t, h, name), 1400))
		began = time.Now()
		s := snapshot(t, w)
		least = min(least, time.Since(began))
		if d := Diff(last, s); len(d.Links) != 1 || !d.Links[name] {
			t.Fatalf("the difference is %+v", d)
		}
		last = s
		if got := c.take(); len(got) != 4 || got["link"] != 1 || got["addrs"] != 1 || got["features"] != 1 || got["queues"] != 1 {
			t.Fatalf("the kernel was asked %v", got)
		}
	}
	t.Logf("one after a change of one took %v", least)
}

// TestTentative: an address counts when the kernel has found no duplicate of it.
func TestTentative(t *testing.T) {
	h, peer := labtest.Host(t, "network"), labtest.Host(t, "networkp")
	labtest.Connect(t, lab.End{Host: h, Name: "eth0"}, lab.End{Host: peer, Name: "eth0"})
	addr := netip.MustParseAddr("2001:db8::1")
	labtest.Do(t, h, func() error { return os.WriteFile("/proc/sys/net/ipv6/conf/eth0/accept_dad", []byte("1"), 0o644) })
	labtest.Do(t, h, func() error { return os.WriteFile("/proc/sys/net/ipv6/conf/all/accept_dad", []byte("1"), 0o644) })
	f := follow(t, watchHost(t, h, receiveBuffer))
	must(t, h.Netlink().AddrAdd(linkOf(t, h, "eth0"), mustAddr("2001:db8::1/64")))
	if s := snapshot(t, f.w); s.IsOwn(addr) {
		t.Error("the address counts while duplicates of it are looked for")
	}
	f.until("the address counts", func(s *Snapshot) bool { return s.IsOwn(addr) })
}

// TestBPFLink: a program of a BPF link is not announced; Resync sees it come and go.
func TestBPFLink(t *testing.T) {
	h := labtest.Host(t, "network")
	add(t, h, &netlink.Bridge{LinkAttrs: attrs("br0")})
	w := watchHost(t, h, receiveBuffer)
	snapshot(t, w)
	program := passing(t)
	var l link.Link
	labtest.Do(t, h, func() (err error) {
		l, err = link.AttachXDP(link.XDPOptions{Program: program, Interface: linkOf(t, h, "br0").Attrs().Index, Flags: link.XDPGenericMode})
		return err
	})
	w.Resync()
	if got := snapshot(t, w).Link("br0").XDP; !slices.Equal(got, []XDP{{idOf(t, program), true}}) {
		t.Errorf("the programs are %v", got)
	}
	must(t, l.Close())
	w.Resync()
	if got := snapshot(t, w).Link("br0").XDP; len(got) != 0 {
		t.Errorf("the programs are %v", got)
	}
}

// TestConcurrent: everything may be called at once, also while the watcher is closed.
func TestConcurrent(t *testing.T) {
	h := labtest.Host(t, "network")
	add(t, h, &netlink.Bridge{LinkAttrs: attrs("br0")})
	w := watchHost(t, h, receiveBuffer)
	key := HopKey{snapshot(t, w).Link("br0").LinkID, netip.MustParseAddr("10.0.0.2")}
	var all sync.WaitGroup
	closed := make(chan struct{})
	for _, call := range []func(){
		func() { _, _ = w.Snapshot() }, func() { _, _ = w.Snapshot() }, func() { w.Due() }, w.Resync,
		func() { w.Ask([]HopKey{key}) }, func() { w.Ask(nil) },
		func() { _ = h.SetUp("br0", true); _ = h.SetUp("br0", false) },
	} {
		all.Go(func() {
			for range 50 {
				call()
			}
			<-closed
			call()
		})
	}
	<-w.Changed()
	must(t, w.Close())
	close(closed)
	all.Wait()
	must(t, w.Close())
}

// TestPeerMTU: the MTU of a veth's peer is known, in this network namespace and in another.
func TestPeerMTU(t *testing.T) {
	h, peer := labtest.Host(t, "network"), labtest.Host(t, "networkp")
	for _, name := range []string{"eth0", "eth1"} {
		labtest.Connect(t, lab.End{Host: h, Name: name}, lab.End{Host: peer, Name: name})
	}
	add(t, h, &netlink.Veth{LinkAttrs: attrs("own0"), PeerName: "own1"})
	set := func(h *lab.Host, name string, mtu int) {
		t.Helper()
		must(t, h.Netlink().LinkSetMTU(linkOf(t, h, name), mtu))
	}
	set(peer, "eth0", 1400)
	w := watchHost(t, h, receiveBuffer)
	f := follow(t, w)
	want := func(when string, mtus map[string][2]int) {
		t.Helper()
		f.until(when, func(s *Snapshot) bool {
			for name, mtu := range mtus {
				if l := s.Link(name); l == nil || l.PeerMTU != mtu[0] || l.SendMTU() != mtu[1] || l.PeerUnread != "" {
					return false
				}
			}
			return true
		})
		f.agree(h, nil)
	}
	want("as made", map[string][2]int{"eth0": {1400, 1400}, "eth1": {1500, 1500}, "own0": {1500, 1500}, "own1": {1500, 1500}, "lo": {0, 65536}})
	set(h, "own1", 1300)
	want("the peer here is announced", map[string][2]int{"own0": {1300, 1300}, "own1": {1500, 1300}})
	set(peer, "eth1", 1600)
	want("the peer elsewhere is announced", map[string][2]int{"eth1": {1600, 1500}})
	set(peer, "eth0", 1200)
	want("and another, that shrinks", map[string][2]int{"eth0": {1200, 1200}})
	heard := func(change func()) (n int) {
		t.Helper()
		w.state.Lock()
		defer w.state.Unlock()
		w.take()
		w.mu.Lock()
		hear := w.foreign.hear
		w.foreign.hear = func(m message) { n++; hear(m) }
		w.mu.Unlock()
		change()
		w.take()
		w.mu.Lock()
		w.foreign.hear = hear
		w.mu.Unlock()
		w.signal() // what has been taken is yet to be looked at
		return n
	}
	if n := heard(func() { add(t, peer, &netlink.Veth{LinkAttrs: attrs("other0"), PeerName: "other1"}) }); n != 0 {
		t.Errorf("%d announcements of a link that is no peer are heard", n)
	}
	if heard(func() { set(peer, "eth0", 1250) }) == 0 {
		t.Error("nothing is heard of a peer")
	}
	want("it was heard", map[string][2]int{"eth0": {1250, 1250}})
	set(peer, "eth0", 1400)
	want("as before", map[string][2]int{"eth0": {1400, 1400}})
	set(h, "eth1", 9000)
	want("its own changes", map[string][2]int{"eth1": {1600, 1600}})

	counted := count(w)
	counted.fail = func(what string) error {
		if what == "peer" {
			return unix.EPERM
		}
		return nil
	}
	w.Resync()
	f.until("it cannot be read", func(s *Snapshot) bool {
		return s.Link("eth0").PeerMTU == 0 && s.Link("eth0").PeerUnread == unix.EPERM.Error()
	})
}

// TestBondPeerMTU: a bond sends what the peers of all its ports take.
func TestBondPeerMTU(t *testing.T) {
	port := func(index, master, peerMTU int) *Link {
		return &Link{LinkID: LinkID{index, 1}, Kind: "veth", Master: master, MasterKind: bond, MTU: 1500, PeerMTU: peerMTU}
	}
	w := &Watcher{links: map[int]*Link{
		1: {LinkID: LinkID{1, 1}, Kind: bond, MTU: 1500}, 2: {LinkID: LinkID{2, 1}, Kind: bond, MTU: 1500},
		3: port(3, 1, 1600), 4: port(4, 1, 1400), 5: port(5, 9, 1000), 6: port(6, 2, 0),
	}}
	before := w.links[1]
	if !w.boundBonds() || w.links[1].SendMTU() != 1400 || w.links[2].SendMTU() != 1500 || before.PeerMTU != 0 {
		t.Errorf("%+v, %+v; the link of before: %+v", w.links[1], w.links[2], before)
	}
	if w.boundBonds() {
		t.Error("nothing is different, and something is said to be")
	}
	// Read anew it is the same, until a port goes.
	if w.replace(1, before) || w.boundBonds() {
		t.Errorf("read anew: %+v", w.links[1])
	}
	delete(w.links, 4)
	if !w.boundBonds() || w.links[1].PeerMTU != 1600 {
		t.Errorf("%+v", w.links[1])
	}
}
