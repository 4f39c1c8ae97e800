package network

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"

	"xdpcast/internal/genl"
)

// news are the kernel's notifications. They only say what to read again, so an answer is never
// older than its question, and lost notifications cost no more than reading everything.
type news struct {
	links map[int]bool // indexes: the link, its addresses, features or queues
	gone  map[int]bool // indexes whose link was deleted: now used by another link, or none
	all   bool         // every link
	// reborn: deletions may have been missed.
	reborn bool

	prefixes   map[netip.Prefix]bool // destinations whose routes changed
	routes     bool                  // all routes
	neighbours map[NeighbourKey]bool
	tables     bool // all neighbours
}

// empty says whether nothing needs to be read.
func (n *news) empty() bool {
	return len(n.links) == 0 && !n.all && !n.routesChanged() && len(n.neighbours) == 0 && !n.tables
}

func (n *news) routesChanged() bool { return n.routes || len(n.prefixes) > 0 }

// link marks a link as possibly changed.
func (n *news) link(index int) {
	if n.links == nil {
		n.links = map[int]bool{}
	}
	n.links[index] = true
}

// add merges more news.
func (n *news) add(more news) {
	n.links = union(n.links, more.links)
	n.gone = union(n.gone, more.gone)
	n.prefixes = union(n.prefixes, more.prefixes)
	n.neighbours = union(n.neighbours, more.neighbours)
	n.all, n.reborn = n.all || more.all, n.reborn || more.reborn
	n.routes, n.tables = n.routes || more.routes, n.tables || more.tables
}

func union[K comparable](a, b map[K]bool) map[K]bool {
	if len(a) == 0 {
		return b
	}
	maps.Copy(a, b)
	return a
}

// manyPrefixes is the number of changed prefixes from which all routes are read again.
const manyPrefixes = 256

// interests are the routes and neighbours that matter.
type interests struct {
	dsts       []netip.Addr // sorted
	neighbours map[NeighbourKey]bool
}

// routed says whether a destination is within a prefix.
func (i *interests) routed(p netip.Prefix) bool {
	at, found := slices.BinarySearchFunc(i.dsts, p.Addr(), netip.Addr.Compare)
	return found || at < len(i.dsts) && p.Contains(i.dsts[at])
}

// hearLink handles a notification about links and addresses.
func (n *news) hearLink(m message) {
	family, index, ok := parseIndex(m.data)
	switch {
	case !ok:
		n.all = true
	case m.kind == unix.RTM_DELLINK && family == unix.AF_UNSPEC:
		// Those of AF_BRIDGE say that the link left its bridge.
		if n.gone == nil {
			n.gone = map[int]bool{}
		}
		n.gone[index] = true
		n.link(index)
	default:
		n.link(index)
	}
}

// hearWay handles a notification about routes, rules, nexthop objects and neighbours.
func (n *news) hearWay(m message, of *interests) {
	switch m.kind {
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		if e, ok := parseNeighbour(m.data); ok && of.neighbours[e.NeighbourKey] {
			if n.neighbours == nil {
				n.neighbours = map[NeighbourKey]bool{}
			}
			n.neighbours[e.NeighbourKey] = true
		}
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		prefix, ok := parseRoutePrefix(m.data)
		switch {
		case !ok || n.routes || !of.routed(prefix):
		case len(n.prefixes) >= manyPrefixes:
			n.routes, n.prefixes = true, nil
		default:
			if n.prefixes == nil {
				n.prefixes = map[netip.Prefix]bool{}
			}
			n.prefixes[prefix] = true
		}
	default:
		n.routes = n.routes || len(of.dsts) > 0
	}
}

// hearFeatures handles a notification of the netdev family.
func (n *news) hearFeatures(m message) {
	if index, _, ok := parseFeatures(m.data); ok {
		n.link(index)
	}
}

// hearQueues handles a notification of the ethtool family; only those about queues matter.
func (n *news) hearQueues(m message) {
	if len(m.data) < genl.HeaderLen || m.data[0] != unix.ETHTOOL_MSG_CHANNELS_NTF {
		return
	}
	if index, _, ok := parseChannels(m.data); ok {
		n.link(index)
	}
}

// listener is a socket that receives notifications. Each kind has its own socket, so that a
// constantly changing routing table overflows only its own.
type listener struct {
	socket *os.File
	raw    syscall.RawConn
	buf    []byte
	hear   func(m message) // called with the watcher's lock
	lost   func()          // the same; notifications were dropped
}

// receiveBuffer is the space for notifications: 4 MiB hold those of about a thousand links that
// appear or disappear at once. It is used only while they are unread.
const receiveBuffer = 16 << 20

// listen opens a socket on multicast groups. The caller must close it.
func listen(protocol, room int, groups ...uint32) (*listener, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, room) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, room) // limited by net.core.rmem_max
	}
	err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	for _, group := range groups {
		if err == nil {
			err = join(fd, group, true)
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen to netlink protocol %d: %w", protocol, err), unix.Close(fd))
	}
	l := &listener{socket: os.NewFile(uintptr(fd), "netlink"), buf: make([]byte, receiveSize)}
	if l.raw, err = l.socket.SyscallConn(); err != nil {
		return nil, errors.Join(err, l.socket.Close())
	}
	return l, nil
}

func join(fd int, group uint32, on bool) error {
	option := unix.NETLINK_ADD_MEMBERSHIP
	if !on {
		option = unix.NETLINK_DROP_MEMBERSHIP
	}
	return unix.SetsockoptInt(fd, unix.SOL_NETLINK, option, int(group))
}

// drain handles everything that has arrived. The watcher's lock is held.
func (l *listener) drain(fd int) {
	for {
		n, from, err := unix.Recvfrom(fd, l.buf, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ENOBUFS):
			l.lost() // the rest of the socket follows
			continue
		case err != nil:
			return // empty, or closed
		}
		if sender, ok := from.(*unix.SockaddrNetlink); !ok || sender.Pid != 0 {
			continue // not from the kernel
		}
		if n > len(l.buf) {
			l.lost()
			continue
		}
		for b := l.buf[:n]; len(b) > 0; {
			m, rest, ok := nextMessage(b)
			if !ok {
				l.lost()
				break
			}
			l.hear(m)
			b = rest
		}
	}
}
