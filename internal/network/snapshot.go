// Package network reads this host's network. A Watcher listens to the kernel and makes Snapshots:
// values with the links, their addresses and features, and the requested next hops. No other
// package reads the host's network, so all decisions are based on one consistent view.
//
// A Snapshot is immutable: it may be read from any number of goroutines and kept.
package network

import (
	"cmp"
	"net/netip"
	"slices"
)

// LinkID identifies an interface over its life. An index alone does not: an interface that is
// deleted and recreated, or that leaves the network namespace and comes back, may have the same
// index, while the kernel has dropped everything attached to the old one.
type LinkID struct {
	Index      int
	Generation uint64 // at least 1; unique for each life of an index
}

// Link is an interface as last described by the kernel.
type Link struct {
	LinkID
	Name     string
	AltNames []string // alternative names (ip link property), sorted
	Kind     string   // IFLA_INFO_KIND, such as "veth" or "bridge"; empty for network cards
	// Master is the index of the bridge, bond or team that the interface is a port of, and
	// MasterKind its kind; 0 and empty if none.
	Master     int
	MasterKind string
	// Lower is the index of the interface that this one is stacked on (IFLA_LINK): a macvlan's
	// parent. 0 if none, if it is in another network namespace, and for a veth, whose peer is not a
	// lower layer.
	Lower    int
	outside  bool // its lower interface is in another network namespace
	Hardware bool // backed by a device on a bus
	MAC      [6]byte
	Ethernet bool // frames have an Ethernet header
	Loopback bool
	MTU      int
	// PeerMTU is the MTU of a veth's peer, which may be in another network namespace, or the
	// smallest of those of a bond's ports; 0: no peer, or PeerUnread says why it is unknown.
	PeerMTU    int
	PeerUnread string
	peer       int   // index of a veth's peer; 0: not a veth
	peerNetns  int32 // the kernel's id of the peer's network namespace; ownNetns: this one
	Up         bool  // administratively
	// Carrier: the link is up, its lower layer too, and it is ready to send: flags IFF_LOWER_UP and
	// IFF_RUNNING. The first is the driver's carrier: a cable is plugged in, a veth's peer is up, a
	// tun device is being read, a port of a bridge has a carrier - a bridge that never had a port
	// has it, too. The second is the operational state of RFC 2863, up or unknown, which follows a
	// moment later, and is missing on a port that waits for 802.1X.
	Carrier  bool
	Queues   int // receive queues; 0: unknown
	Features Features
	// XDP are all attached programs, including those of other software. The kernel does not
	// announce those of BPF links: see Watcher.
	XDP   []XDP
	Addrs []netip.Addr // usable unicast addresses, in the kernel's order
}

// Features are an interface's XDP features, as reported by its driver.
type Features struct {
	// Known is false on kernels that do not report features (before Linux 6.3).
	Known bool
	// Native: programs run in the driver.
	Native bool
	// Transmit: frames redirected to the interface are sent. A veth has it only while its peer has
	// generic receive offload or an XDP program.
	Transmit bool
	// TransmitSG: so are frames in several buffers.
	TransmitSG bool
}

// XDP is a program attached to an interface.
type XDP struct {
	Program uint32 // the kernel's id
	Generic bool   // in the stack rather than in the driver
}

// Running says whether the link can carry frames.
func (l *Link) Running() bool { return l.Up && l.Carrier }

// SendMTU is the MTU for sending on the link: the peer's if that is smaller, since a veth refuses
// frames that its peer would refuse, and with them the rest of a bulk of redirected frames
// (veth_xdp_xmit in drivers/net/veth.c).
func (l *Link) SendMTU() int {
	if l.PeerMTU != 0 {
		return min(l.MTU, l.PeerMTU)
	}
	return l.MTU
}

// FirstAddr is the source address for sending on the link in a family: the first of its addresses,
// in IPv6 preferably one that is valid beyond the link.
func (l *Link) FirstAddr(is4 bool) (addr netip.Addr, ok bool) {
	for _, a := range l.Addrs {
		if a.Is4() != is4 {
			continue
		}
		if !a.IsLinkLocalUnicast() {
			return a, true
		}
		if !addr.IsValid() {
			addr = a
		}
	}
	return addr, addr.IsValid()
}

// Equal says whether two descriptions are equal in all fields.
func (l *Link) Equal(o *Link) bool {
	return l.LinkID == o.LinkID && l.Name == o.Name && l.Kind == o.Kind && l.Master == o.Master && l.MasterKind == o.MasterKind &&
		l.Lower == o.Lower && l.outside == o.outside && l.Hardware == o.Hardware && l.MAC == o.MAC && l.Ethernet == o.Ethernet && l.Loopback == o.Loopback &&
		l.MTU == o.MTU && l.PeerMTU == o.PeerMTU && l.PeerUnread == o.PeerUnread && l.peer == o.peer && l.peerNetns == o.peerNetns && l.Up == o.Up && l.Carrier == o.Carrier && l.Queues == o.Queues && l.Features == o.Features &&
		slices.Equal(l.XDP, o.XDP) && slices.Equal(l.AltNames, o.AltNames) && slices.Equal(l.Addrs, o.Addrs)
}

// HopKey is the destination of a unicast output: an address by an interface.
type HopKey struct {
	Link LinkID
	Dst  netip.Addr
}

// HopKind is the kind of the host's route to a destination by an interface.
type HopKind uint8

// The kinds.
const (
	HopUnknown   HopKind = iota // not requested yet, or Err says why there is no answer
	HopNone                     // no route by the interface, or one that prohibits
	HopUnicast                  // Via is the neighbour to send to
	HopBroadcast                // a broadcast address of the interface's network
	HopLocal                    // an address of this host
)

// Hop is the next hop of a unicast destination. It is comparable except for Err.
type Hop struct {
	Kind HopKind
	// Via is the neighbour whose link-layer address the frames get: the destination itself or, with
	// Gateway, a router. Only valid for HopUnicast.
	Via     netip.Addr
	Gateway bool
	// MAC is the neighbour's address; Resolved says whether it is known, and Failed that the
	// neighbour did not answer the last probe, also while it is probed again. All are zero if the
	// kernel has no entry for it: Neighbours.Manage creates one.
	MAC      [6]byte
	Resolved bool
	Failed   bool
	// Err is why the kernel gave no answer about the route or, for HopUnicast, about the neighbour;
	// nil if it did. It is retried (Watcher.Due).
	Err error
}

// Equal compares all fields, errors by their texts.
func (h Hop) Equal(o Hop) bool {
	a, b := h.Err, o.Err
	if (a == nil) != (b == nil) || a != nil && a.Error() != b.Error() {
		return false
	}
	h.Err, o.Err = nil, nil
	return h == o
}

// NeighbourKey identifies an entry of the kernel's neighbour tables.
type NeighbourKey struct {
	Index int
	Addr  netip.Addr
}

// Snapshot is this host's network at one moment.
type Snapshot struct {
	links  []*Link // by name
	names  map[string]*Link
	index  map[int]*Link
	own    []netip.Addr // sorted
	hops   map[HopKey]Hop
	ownMAC [][6]byte // sorted
}

// NewSnapshot makes a snapshot of links and hops, and takes ownership: they must not be modified
// afterwards. If a name is one link's own and another's alternative name, it refers to the first.
func NewSnapshot(links []*Link, hops map[HopKey]Hop) *Snapshot {
	s := &Snapshot{links: slices.Clone(links), names: make(map[string]*Link, len(links)), index: make(map[int]*Link, len(links)), hops: hops}
	slices.SortFunc(s.links, func(a, b *Link) int { return cmp.Compare(a.Name, b.Name) })
	for _, l := range s.links {
		s.index[l.Index] = l
		for _, name := range l.AltNames {
			s.names[name] = l
		}
		s.own = append(s.own, l.Addrs...)
		if l.Ethernet {
			s.ownMAC = append(s.ownMAC, l.MAC)
		}
	}
	for _, l := range s.links {
		s.names[l.Name] = l
	}
	slices.SortFunc(s.own, netip.Addr.Compare)
	s.own = slices.Compact(s.own)
	slices.SortFunc(s.ownMAC, func(a, b [6]byte) int { return slices.Compare(a[:], b[:]) })
	s.ownMAC = slices.Compact(s.ownMAC)
	return s
}

// Link returns the link with a name or alternative name, nil if there is none.
func (s *Snapshot) Link(name string) *Link { return s.names[name] }

// ByIndex returns the link with an index, nil if there is none.
func (s *Snapshot) ByIndex(index int) *Link { return s.index[index] }

// Links returns all links by name. The caller must not change them.
func (s *Snapshot) Links() []*Link { return s.links }

// Own returns every unicast address of the host, sorted.
func (s *Snapshot) Own() []netip.Addr { return s.own }

// IsOwn says whether an address is one of the host's.
func (s *Snapshot) IsOwn(addr netip.Addr) bool {
	_, ok := slices.BinarySearchFunc(s.own, addr, netip.Addr.Compare)
	return ok
}

// OwnMACs returns the MAC addresses of all links with an Ethernet header, sorted.
func (s *Snapshot) OwnMACs() [][6]byte { return s.ownMAC }

// Hop returns the next hop of a destination. Its Kind is HopUnknown if the snapshot was not asked
// for it: the caller requests it, and decides again with the next snapshot.
func (s *Snapshot) Hop(key HopKey) Hop { return s.hops[key] }

// Change is the difference between two snapshots.
type Change struct {
	// Links are the old and new names and alternative names of links that appeared, disappeared or
	// changed.
	Links map[string]bool
	// Indexes are their indexes.
	Indexes map[int]bool
	// Own: the host's addresses, or the MAC addresses of its links, changed.
	Own bool
	// Hops are the next hops that changed.
	Hops map[HopKey]bool
}

// Empty says whether nothing changed.
func (c Change) Empty() bool { return len(c.Links) == 0 && !c.Own && len(c.Hops) == 0 }

// Diff compares two snapshots. before may be nil: everything is new then.
func Diff(before, now *Snapshot) Change {
	c := Change{Links: map[string]bool{}, Indexes: map[int]bool{}, Hops: map[HopKey]bool{}}
	if before == nil {
		before = NewSnapshot(nil, nil)
		c.Own = true
	}
	note := func(l *Link) {
		c.Indexes[l.Index], c.Links[l.Name] = true, true
		for _, name := range l.AltNames {
			c.Links[name] = true
		}
	}
	for _, l := range now.links {
		old := before.index[l.Index]
		if old == l || old != nil && old.Equal(l) {
			continue
		}
		note(l)
		if old != nil {
			note(old)
		}
	}
	for _, old := range before.links {
		if now.index[old.Index] == nil {
			note(old)
		}
	}
	c.Own = c.Own || !slices.Equal(before.own, now.own) || !slices.Equal(before.ownMAC, now.ownMAC)
	for key, hop := range now.hops {
		if old, ok := before.hops[key]; !ok || !old.Equal(hop) {
			c.Hops[key] = true
		}
	}
	for key := range before.hops {
		if _, ok := now.hops[key]; !ok {
			c.Hops[key] = true
		}
	}
	return c
}
