package network

import (
	"fmt"
	"maps"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// errLinkGone is a hop's error when that generation of its link is gone.
var errLinkGone = fmt.Errorf("the interface is gone: %w", unix.ENODEV)

// hops are the requested next hops of unicast destinations.
type hops struct {
	ways       map[HopKey]*way
	neighbours map[NeighbourKey]*neighbour
	answers    map[HopKey]Hop // of the last snapshot, which shares it
	stale      bool           // the requested hops changed since the last snapshot
	// own are this host's addresses: routes looked up by an interface only contain those of that
	// interface.
	own map[netip.Addr]bool
}

// way is the kernel's last answer about a destination.
type way struct {
	route foundRoute
	err   error
	asked bool
}

// neighbour is an entry of the kernel's neighbour tables on a way.
type neighbour struct {
	entry neighbourEntry
	err   error
	asked bool
	// failed: it did not answer. This stays set while the kernel probes it again.
	failed bool
}

func newHops() hops {
	return hops{ways: map[HopKey]*way{}, neighbours: map[NeighbourKey]*neighbour{}}
}

// ask sets the requested hops, and returns whether they changed.
func (h *hops) ask(keys []HopKey) bool {
	ways := make(map[HopKey]*way, len(keys))
	differ := false
	for _, key := range keys {
		known := h.ways[key]
		if known == nil {
			known, differ = &way{}, true
		}
		ways[key] = known
	}
	if !differ && len(ways) == len(h.ways) {
		return false
	}
	h.ways, h.stale = ways, true
	return true
}

// neighbour returns the entry that frames on the way are sent to, if it exists.
func (way *way) neighbour(key HopKey) (NeighbourKey, bool) {
	if way.err != nil || way.route.kind != HopUnicast {
		return NeighbourKey{}, false
	}
	if way.route.gateway.IsValid() {
		return NeighbourKey{key.Link.Index, way.route.gateway}, true
	}
	return NeighbourKey{key.Link.Index, key.Dst}, true
}

// readHops reads the hops marked in unread again, and returns whether any changed. Afterwards only
// routes that are not due yet remain.
func (w *Watcher) readHops(linksDiffer, retrying bool) (differ bool) {
	h := &w.hops
	left := w.routesLeft()
	if h.stale || retrying || linksDiffer || !w.unread.empty() {
		if w.readRoutes(retrying, left.routesChanged()) || h.stale {
			w.followNeighbours()
		}
		w.readNeighbours(retrying)
		if linksDiffer || h.own == nil {
			h.own = w.ownAddrs()
		}
		differ = h.answer(w.links)
		h.stale = false
	}
	w.unread = left
	return differ
}

// routesLeft returns the route changes that are not due yet.
func (w *Watcher) routesLeft() (left news) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.unread.routesChanged() {
		return left
	}
	wait := time.Until(w.routesAt)
	if wait <= 0 {
		return left
	}
	if !w.closed {
		w.timer.Reset(wait)
	}
	return news{routes: w.unread.routes, prefixes: w.unread.prefixes}
}

// readRoutes requests the routes of ways that are new, whose link changed - the kernel does not
// announce the IPv4 routes that it drops when a link goes down or loses an address - and, unless
// they are not due yet, of announced changes. It returns whether any changed.
func (w *Watcher) readRoutes(retrying, wait bool) (differ bool) {
	n, began, announced := &w.unread, time.Now(), false
	for key, way := range w.hops.ways {
		if l := w.links[key.Link.Index]; l == nil || l.LinkID != key.Link {
			continue
		}
		called := !wait && (n.routes || n.about(key.Dst))
		if way.asked && !n.all && !n.links[key.Link.Index] && !called && (way.err == nil || !retrying) {
			continue
		}
		announced = announced || called
		before := *way
		way.route, way.err = w.kernel.route(key)
		way.asked = true
		differ = differ || before.route != way.route || (before.err == nil) != (way.err == nil)
		if way.err != nil {
			w.again()
		}
	}
	if announced {
		w.mu.Lock()
		w.routesAt = time.Now().Add(max(routesPause, routesShare*time.Since(began)))
		w.mu.Unlock()
	}
	return differ
}

// about says whether a route change was announced for a destination.
func (n *news) about(dst netip.Addr) bool {
	for p := range n.prefixes {
		if p.Contains(dst) {
			return true
		}
	}
	return false
}

// followNeighbours determines the neighbours on the ways, and subscribes to them before they are
// read, so that no change is missed.
func (w *Watcher) followNeighbours() {
	neighbours, followed := map[NeighbourKey]*neighbour{}, map[NeighbourKey]bool{}
	for key, way := range w.hops.ways {
		at, ok := way.neighbour(key)
		if !ok {
			continue
		}
		if neighbours[at] = w.hops.neighbours[at]; neighbours[at] == nil {
			neighbours[at] = &neighbour{}
			w.hops.neighbours[at] = neighbours[at]
		}
		followed[at] = true
	}
	w.hops.neighbours = neighbours
	w.mu.Lock()
	defer w.mu.Unlock()
	w.of.neighbours = followed
}

// readNeighbours requests new and changed entries.
func (w *Watcher) readNeighbours(retrying bool) {
	n := &w.unread
	for key, known := range w.hops.neighbours {
		if known.asked && !n.all && !n.tables && !n.links[key.Index] && !n.neighbours[key] && (known.err == nil || !retrying) {
			continue
		}
		e, err := w.kernel.neighbour(key)
		known.asked, known.err = true, err
		if err != nil {
			w.again()
			continue
		}
		known.entry = e
		known.failed = e.state&unix.NUD_FAILED != 0 || known.failed && e.state&unix.NUD_INCOMPLETE != 0
	}
}

// answer composes the hops of the next snapshot, and returns whether any changed.
func (h *hops) answer(links map[int]*Link) (differ bool) {
	answers := make(map[HopKey]Hop, len(h.ways))
	differ = len(h.ways) != len(h.answers)
	for key, way := range h.ways {
		hop := Hop{Err: errLinkGone}
		if l := links[key.Link.Index]; l != nil && l.LinkID == key.Link {
			hop = h.hop(key, way)
		}
		before, known := h.answers[key]
		differ = differ || !known || !before.Equal(hop)
		answers[key] = hop
	}
	if differ {
		h.answers = answers
	}
	return differ
}

func (h *hops) hop(key HopKey, way *way) Hop {
	if h.own[key.Dst] {
		return Hop{Kind: HopLocal}
	}
	if way.err != nil {
		return Hop{Err: way.err}
	}
	hop := Hop{Kind: way.route.kind}
	at, ok := way.neighbour(key)
	if !ok {
		return hop
	}
	hop.Via, hop.Gateway = at.Addr, at.Addr != key.Dst
	n := h.neighbours[at]
	hop.Err, hop.Failed = n.err, n.failed
	if n.err == nil && n.entry.valid() {
		hop.MAC, hop.Resolved = n.entry.mac, true
	}
	return hop
}

// ownAddrs returns the addresses of all links; nil if no hops are requested.
func (w *Watcher) ownAddrs() map[netip.Addr]bool {
	if len(w.hops.ways) == 0 {
		return nil
	}
	own := map[netip.Addr]bool{}
	for _, l := range w.links {
		for _, addr := range l.Addrs {
			own[addr] = true
		}
	}
	return own
}

// compose makes a snapshot of the current state.
func (w *Watcher) compose(linksDiffer bool) *Snapshot {
	if !linksDiffer {
		s := *w.last
		s.hops = w.hops.answers
		return &s
	}
	links := make([]*Link, 0, len(w.links))
	for l := range maps.Values(w.links) {
		links = append(links, l)
	}
	return NewSnapshot(links, w.hops.answers)
}
