package relay

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// routesPause is the least time between two looks at the routes: a router's table
// may change all the time, and nothing of it need concern us.
const routesPause = 100 * time.Millisecond

// hopKey is where a unicast output sends: an address by way of an interface.
type hopKey struct {
	index int
	dst   netip.Addr
}

// nextHop is the way to a unicast destination.
type nextHop struct {
	key       hopKey
	via       netip.Addr // whose link-layer address the frames get; the zero Addr when there is no route
	gateway   bool       // via is not the destination itself
	err       error      // why there is no route
	neighbour *neighbour // nil without via
	asked     uint64     // the round in which the route was last asked for
	used      uint64     // the last round in which a rule had it
}

// neighbour is an entry of the kernel's tables that a rule needs.
type neighbour struct {
	neighbourEntry
	err    error // why the kernel did not take it
	failed bool  // it did not answer the last time it was asked
	asked  uint64
	used   uint64
}

// tables are the kernel's, of routes and neighbours. See rtnl; tests inject faults.
type tables interface {
	route(key hopKey) (netip.Addr, error)
	neighbour(key neighbourKey) (neighbourEntry, bool, error)
	manage(key neighbourKey) error
	forget(key neighbourKey) error
	Close()
}

// hops knows the ways to the unicast destinations, and keeps the neighbours on them
// resolved. A round is one reconcile.
type hops struct {
	rtnl       tables // nil until a rule has a unicast output
	openTables func() (tables, error)
	watch      *watch
	round      uint64
	hops       map[hopKey]*nextHop
	neighbours map[neighbourKey]*neighbour

	routesChanged bool
	routesAsked   time.Time
}

func newHops(w *watch) *hops {
	return &hops{openTables: newRtnl, watch: w, hops: map[hopKey]*nextHop{}, neighbours: map[neighbourKey]*neighbour{}}
}

func (h *hops) close() {
	if h.rtnl != nil {
		h.rtnl.Close()
	}
}

// adopt takes over what an earlier process left, to be used or removed.
func (h *hops) adopt() error {
	left, err := neighboursLeft()
	if err != nil || len(left) == 0 {
		return err
	}
	if err := h.open(); err != nil {
		return err
	}
	for _, e := range left {
		h.neighbours[e.key] = &neighbour{neighbourEntry: e}
		h.watch.follow(e.key, true)
	}
	return nil
}

func (h *hops) open() (err error) {
	if h.rtnl == nil {
		h.rtnl, err = h.openTables()
	}
	return err
}

// to returns the way to a destination. What is not known to work is asked for once
// a round.
func (h *hops) to(index int, dst netip.Addr) *nextHop {
	key := hopKey{index, dst}
	hop := h.hops[key]
	if hop == nil {
		h.watch.followRoutes(true)
		hop = &nextHop{key: key}
		h.hops[key] = hop
	}
	hop.used = h.round
	if hop.asked == 0 || hop.err != nil && hop.asked != h.round {
		h.askRoute(hop)
	}
	if hop.via.IsValid() {
		hop.neighbour = h.neighbour(neighbourKey{index, hop.via})
	}
	return hop
}

// askRoute asks for the route by the output's interface, whatever other interface
// the host itself would take.
func (h *hops) askRoute(hop *nextHop) {
	hop.asked, hop.via, hop.gateway, hop.neighbour = h.round, netip.Addr{}, false, nil
	if hop.err = h.open(); hop.err != nil {
		return
	}
	hop.via, hop.err = h.rtnl.route(hop.key)
	hop.gateway = hop.via.IsValid() && hop.via != hop.key.dst
}

// errNoRoute is why there is no next hop.
var errNoRoute = errors.New("no route")

// errBroadcast is why there is none either, whatever answers.
var errBroadcast = errors.New("a broadcast address of the network")

// route returns the next hop of a destination by an interface: the gateway, or the
// destination itself. It asks for the entry of the routing table
// (RTM_F_FIB_MATCH), since without one IPv4 takes any destination to be on the link.
// Of several gateways by the interface the first one is used.
func (c *rtnl) route(key hopKey) (netip.Addr, error) {
	found, err := c.routes.RouteGetWithOptions(net.IP(key.dst.AsSlice()), &netlink.RouteGetOptions{OifIndex: key.index, FIBMatch: true})
	switch {
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENODEV), err == nil && len(found) == 0:
		return netip.Addr{}, errNoRoute
	case err != nil:
		return netip.Addr{}, fmt.Errorf("look up route: %w", err)
	}
	r := found[0]
	switch r.Type {
	case unix.RTN_UNICAST:
	case unix.RTN_BROADCAST:
		return netip.Addr{}, fmt.Errorf("%s is %w", key.dst, errBroadcast)
	case unix.RTN_LOCAL:
		return netip.Addr{}, fmt.Errorf("%s is an address of this host", key.dst)
	default:
		return netip.Addr{}, errNoRoute
	}
	gw, via := r.Gw, r.Via
	for _, n := range r.MultiPath {
		if n.LinkIndex == key.index {
			gw, via = n.Gw, n.Via
			break
		}
	}
	if v, ok := via.(*netlink.Via); ok && len(gw) == 0 {
		gw = v.Addr // an IPv4 route by an IPv6 gateway (RFC 5549)
	}
	addr, ok := netip.AddrFromSlice(gw)
	if !ok || addr.IsUnspecified() {
		return key.dst, nil
	}
	return addr.Unmap(), nil
}

// neighbour returns an entry that is used from now on.
func (h *hops) neighbour(key neighbourKey) *neighbour {
	n := h.neighbours[key]
	if n == nil {
		n = &neighbour{neighbourEntry: neighbourEntry{key: key}}
		h.neighbours[key] = n
		h.watch.follow(key, true) // first, so that no change is missed
	}
	n.used = h.round
	if (n.asked == 0 || !n.valid()) && n.asked != h.round {
		h.askNeighbour(n)
	}
	return n
}

// askNeighbour reads an entry, and has the kernel keep it resolved unless somebody
// has already seen to that: permanent entries, and those managed for others, are
// left as they are.
func (h *hops) askNeighbour(n *neighbour) {
	n.asked = h.round
	key := n.key
	if n.err = h.open(); n.err != nil {
		return
	}
	e, ok, err := h.rtnl.neighbour(key)
	if err == nil && (!ok || !e.managed && !e.static()) {
		if err = h.rtnl.manage(key); err == nil {
			e, _, err = h.rtnl.neighbour(key)
		}
	}
	n.neighbourEntry, n.err = e, err
	n.key = key
	// While it is asked again, that it did not answer is still what is known.
	n.failed = !n.valid() && (n.failed || n.state&unix.NUD_FAILED != 0)
}

// refresh asks again for what may have changed, and returns the neighbours and ways
// that have.
func (h *hops) refresh(n news) (changed bool) {
	h.round++
	for key := range n.neighbours {
		if known := h.neighbours[key]; known != nil {
			changed = h.recheck(known) || changed
		}
	}
	if n.lost {
		for _, known := range h.neighbours {
			changed = h.recheck(known) || changed
		}
	}
	if n.routes || n.lost {
		h.routesChanged = true
	}
	if h.routesChanged && h.untilRoutes() == 0 {
		changed = h.refreshRoutes() || changed
	}
	return changed
}

// recheck reads a neighbour again and says whether frames are to look otherwise now.
func (h *hops) recheck(n *neighbour) bool {
	if n.used == 0 {
		return false // left by an earlier process and not used so far
	}
	valid, failed, mac := n.valid(), n.failed, n.mac
	h.askNeighbour(n)
	return n.valid() != valid || n.failed != failed || n.mac != mac
}

// refreshRoutes asks for every way again.
func (h *hops) refreshRoutes() (changed bool) {
	h.routesChanged, h.routesAsked = false, time.Now()
	for _, hop := range h.hops {
		via := hop.via
		h.askRoute(hop)
		changed = changed || hop.via != via
	}
	return changed
}

// untilRoutes says when the routes may be asked for again.
func (h *hops) untilRoutes() time.Duration {
	return max(0, routesPause-time.Since(h.routesAsked))
}

// wake says when the routes are to be asked for.
func (h *hops) wake() time.Duration {
	if !h.routesChanged {
		return idle
	}
	return h.untilRoutes()
}

// sweep forgets what no rule used in this round, and removes what the relay made.
func (h *hops) sweep() error {
	for key, hop := range h.hops {
		if hop.used != h.round {
			delete(h.hops, key)
		}
	}
	if len(h.hops) == 0 {
		h.watch.followRoutes(false)
	}
	var errs []error
	for key, n := range h.neighbours {
		if n.used == h.round {
			continue
		}
		delete(h.neighbours, key)
		h.watch.follow(key, false)
		if n.ours() && !n.static() { // one made permanent has become somebody else's
			if err := h.rtnl.forget(key); err != nil {
				errs = append(errs, fmt.Errorf("remove neighbour %s: %w", key.addr, err))
			}
		}
	}
	return errors.Join(errs...)
}

// dropInterface forgets what was known of an interface that is gone.
func (h *hops) dropInterface(index int) {
	for key := range h.hops {
		if key.index == index {
			delete(h.hops, key)
		}
	}
	for key := range h.neighbours {
		if key.index == index {
			delete(h.neighbours, key)
			h.watch.follow(key, false)
		}
	}
}

// ready says whether frames can be sent that way.
func (hop *nextHop) ready() bool { return hop.neighbour != nil && hop.neighbour.valid() }

// why says in words why frames cannot be sent that way; ifname is the interface's.
func (hop *nextHop) why(ifname string) string {
	n := hop.neighbour
	switch {
	case errors.Is(hop.err, errNoRoute):
		return fmt.Sprintf("no route to %s by interface %s", hop.key.dst, ifname)
	case hop.err != nil:
		return fmt.Sprintf("next hop to %s by interface %s: %v", hop.key.dst, ifname, hop.err)
	case n == nil || n.valid():
		return ""
	case errors.Is(n.err, unix.ENOBUFS):
		return fmt.Sprintf("the kernel's neighbour table has no room for %s (sysctl net.ipv4.neigh.default.gc_thresh3, or ipv6): %v", hop.who(), n.err)
	case n.err != nil:
		return fmt.Sprintf("neighbour %s on interface %s: %v", hop.who(), ifname, n.err)
	case n.failed:
		return fmt.Sprintf("%s does not answer on interface %s", hop.who(), ifname)
	}
	return fmt.Sprintf("%s has not answered yet on interface %s", hop.who(), ifname)
}

// who names the neighbour.
func (hop *nextHop) who() string {
	if hop.gateway {
		return fmt.Sprintf("gateway %s of %s", hop.via, hop.key.dst)
	}
	return hop.via.String()
}

// describe says in words where frames go.
func (hop *nextHop) describe() string {
	if !hop.ready() {
		return ""
	}
	return fmt.Sprintf("%s at %s", hop.who(), net.HardwareAddr(hop.neighbour.mac[:]))
}

// addresses are those of the neighbour, as far as they are known; empty of no hop.
func (hop *nextHop) addresses() (via, mac string) {
	if hop == nil || !hop.via.IsValid() {
		return "", ""
	}
	if hop.ready() {
		mac = net.HardwareAddr(hop.neighbour.mac[:]).String()
	}
	return hop.via.String(), mac
}

// use notes that a rule still sends that way.
func (h *hops) use(hop *nextHop) {
	hop.used = h.round
	if hop.neighbour != nil {
		hop.neighbour.used = h.round
	}
}
