package network

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// watchHost opens a watcher in a host for a test.
func watchHost(t testing.TB, h *lab.Host, room int) *Watcher {
	t.Helper()
	var w *Watcher
	labtest.Do(t, h, func() (err error) {
		w, err = open(Options{}, room)
		return err
	})
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Errorf("close watcher: %v", err)
		}
	})
	return w
}

func snapshot(t testing.TB, w *Watcher) *Snapshot {
	t.Helper()
	s, err := w.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// anew reads the host's network with a watcher of its own: the oracle.
func anew(t testing.TB, h *lab.Host, keys []HopKey) *Snapshot {
	t.Helper()
	var s *Snapshot
	labtest.Do(t, h, func() error {
		w, err := Open(Options{})
		if err != nil {
			return err
		}
		defer w.Close()
		if s, err = w.Snapshot(); err != nil {
			return err
		}
		// Its generations are others.
		own := slices.Clone(keys)
		for i := range own {
			if l := s.ByIndex(own[i].Link.Index); l != nil {
				own[i].Link = l.LinkID
			}
		}
		w.Ask(own)
		s, err = w.Snapshot()
		return err
	})
	return s
}

// describe writes a snapshot down, but for generations and whether a neighbour that is asked
// did not answer before, which is remembered.
func describe(s *Snapshot) string {
	var b strings.Builder
	for _, l := range s.Links() {
		c := *l
		c.Generation = 0
		fmt.Fprintf(&b, "%+v\n", c)
	}
	var hops []string
	for key, hop := range s.hops {
		if l := s.ByIndex(key.Link.Index); l == nil || l.LinkID != key.Link {
			continue
		}
		hop.Failed = false
		hops = append(hops, fmt.Sprintf("%d %s: %+v\n", key.Link.Index, key.Dst, hop))
	}
	slices.Sort(hops)
	return b.String() + strings.Join(hops, "")
}

// follower takes snapshots as a relay does: only when it is told to.
type follower struct {
	t    testing.TB
	w    *Watcher
	last *Snapshot
}

func follow(t testing.TB, w *Watcher) *follower { return &follower{t, w, snapshot(t, w)} }

func (f *follower) step() *Snapshot {
	f.t.Helper()
	select {
	case <-f.w.Changed():
	case <-time.After(min(f.w.Due(), time.Millisecond)):
		if f.w.Due() > 0 {
			return f.last
		}
	}
	f.last = snapshot(f.t, f.w)
	return f.last
}

// until takes snapshots until one meets the condition.
func (f *follower) until(what string, condition func(s *Snapshot) bool) *Snapshot {
	f.t.Helper()
	for deadline := time.Now().Add(labtest.Timeout); !condition(f.last); f.step() {
		if time.Now().After(deadline) {
			f.t.Fatalf("timed out waiting until %s; the last snapshot is\n%s", what, describe(f.last))
		}
	}
	return f.last
}

// agree waits until what the watcher says is what a new one reads; ask asks for hops.
func (f *follower) agree(h *lab.Host, ask func() []HopKey) *Snapshot {
	f.t.Helper()
	var want string
	for deadline := time.Now().Add(labtest.Timeout); ; f.step() {
		var keys []HopKey
		if ask != nil {
			keys = ask()
		}
		if want = describe(anew(f.t, h, keys)); describe(f.last) == want {
			return f.last
		}
		if time.Now().After(deadline) {
			f.t.Fatalf("the snapshot is\n%s, read anew it is\n%s", describe(f.last), want)
		}
	}
}

// counting is the kernel, and counts what it is asked; it fails where a test says so.
type counting struct {
	kernel
	calls map[string]int
	fail  func(what string) error
}

// count has the watcher ask through a counter.
func count(w *Watcher) *counting {
	c := &counting{kernel: w.kernel, calls: map[string]int{}}
	w.kernel = c
	return c
}

func (c *counting) note(what string) error {
	c.calls[what]++
	if c.fail != nil {
		return c.fail(what)
	}
	return nil
}

func (c *counting) take() map[string]int {
	calls := maps.Clone(c.calls)
	clear(c.calls)
	return calls
}

func (c *counting) links() (map[int]*Link, error) {
	if err := c.note("links"); err != nil {
		return nil, err
	}
	return c.kernel.links()
}

func (c *counting) link(index int) (*Link, error) {
	if err := c.note("link"); err != nil {
		return nil, err
	}
	return c.kernel.link(index)
}

func (c *counting) peerMTU(netns int32, index int) (int, error) {
	if err := c.note("peer"); err != nil {
		return 0, err
	}
	return c.kernel.peerMTU(netns, index)
}

func (c *counting) addrs(index int) (map[int][]netip.Addr, error) {
	if err := c.note(all("addrs", index)); err != nil {
		return nil, err
	}
	return c.kernel.addrs(index)
}

func (c *counting) features(index int) (map[int]Features, error) {
	if err := c.note(all("features", index)); err != nil {
		return nil, err
	}
	return c.kernel.features(index)
}

func (c *counting) queues(index int) (map[int]int, error) {
	if err := c.note(all("queues", index)); err != nil {
		return nil, err
	}
	return c.kernel.queues(index)
}

func (c *counting) route(key HopKey) (foundRoute, error) {
	if err := c.note("route"); err != nil {
		return foundRoute{}, err
	}
	return c.kernel.route(key)
}

func (c *counting) neighbour(key NeighbourKey) (neighbourEntry, error) {
	if err := c.note("neighbour"); err != nil {
		return neighbourEntry{}, err
	}
	return c.kernel.neighbour(key)
}

func all(what string, index int) string {
	if index == 0 {
		return "all " + what
	}
	return what
}

// must is for what tests do to a host.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func linkOf(t testing.TB, h *lab.Host, ifname string) netlink.Link {
	t.Helper()
	l, err := h.Link(ifname)
	must(t, err)
	return l
}

func add(t testing.TB, h *lab.Host, l netlink.Link) {
	t.Helper()
	must(t, h.Netlink().LinkAdd(l))
}

func attrs(name string) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name = name
	return a
}

func mustAddr(s string) *netlink.Addr {
	a, err := netlink.ParseAddr(s)
	if err != nil {
		panic(err)
	}
	return a
}

func mac(s string) net.HardwareAddr {
	m, err := net.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return m
}

// runIP runs ip(8) in a host.
func runIP(h *lab.Host, args ...string) error {
	return h.Do(func() error {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, out)
		}
		return nil
	})
}
