package relay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// neighbourKey names an entry of the kernel's neighbour tables.
type neighbourKey struct {
	index int
	addr  netip.Addr
}

// neighbourEntry is an entry as the kernel last described it.
type neighbourEntry struct {
	key      neighbourKey
	state    uint16 // NUD_*
	mac      [6]byte
	hasMAC   bool
	managed  bool
	protocol uint8
}

const (
	ndmsgLen = 12 // struct ndmsg

	// nudValid are the states in which the kernel itself sends to an entry's
	// address (NUD_VALID of include/net/neighbour.h).
	nudValid = unix.NUD_PERMANENT | unix.NUD_NOARP | unix.NUD_REACHABLE | unix.NUD_PROBE | unix.NUD_STALE | unix.NUD_DELAY
	// nudStatic are those of entries that the kernel never resolves by itself.
	nudStatic = unix.NUD_PERMANENT | unix.NUD_NOARP

	// Of include/uapi/linux/neighbour.h.
	ndaDst, ndaLLAddr, ndaProtocol, ndaFlagsExt = 1, 2, 12, 15
	ntfExtLearned                               = 1 << 4
	ntfExtManaged                               = 1 << 0

	// protocolOurs marks the entries that the relay made, so that a later process
	// knows them again. The kernel hands such numbers on unread; iproute2 shows it
	// as "proto 120" (/etc/iproute2/rt_protos has nothing there).
	protocolOurs = 120
)

func (e *neighbourEntry) valid() bool  { return e.state&nudValid != 0 && e.hasMAC }
func (e *neighbourEntry) static() bool { return e.state&nudStatic != 0 }
func (e *neighbourEntry) ours() bool   { return e.protocol == protocolOurs }

// parseNeighbour reads a message of a neighbour table for IPv4 or IPv6.
func parseNeighbour(data []byte) (e neighbourEntry, ok bool) {
	if len(data) < ndmsgLen || data[0] != unix.AF_INET && data[0] != unix.AF_INET6 {
		return e, false
	}
	e.key.index = int(binary.NativeEndian.Uint32(data[4:]))
	e.state = binary.NativeEndian.Uint16(data[8:])
	attrs, err := nl.ParseRouteAttr(data[ndmsgLen:])
	if err != nil {
		return e, false
	}
	for _, a := range attrs {
		switch a.Attr.Type & nl.NLA_TYPE_MASK {
		case ndaDst:
			e.key.addr, ok = netip.AddrFromSlice(a.Value)
		case ndaLLAddr:
			if len(a.Value) == len(e.mac) {
				e.mac, e.hasMAC = [6]byte(a.Value), true
			}
		case ndaProtocol:
			if len(a.Value) >= 1 {
				e.protocol = a.Value[0]
			}
		case ndaFlagsExt:
			if len(a.Value) >= 4 {
				e.managed = binary.NativeEndian.Uint32(a.Value)&ntfExtManaged != 0
			}
		}
	}
	return e, ok
}

// appendNdmsg writes struct ndmsg; without an address for every family.
func appendNdmsg(b []byte, key neighbourKey, flags uint8) []byte {
	family := byte(unix.AF_UNSPEC)
	switch {
	case key.addr.Is4():
		family = unix.AF_INET
	case key.addr.Is6():
		family = unix.AF_INET6
	}
	b = append(b, family, 0, 0, 0)
	b = binary.NativeEndian.AppendUint32(b, uint32(key.index))
	return append(b, 0, 0, flags, 0) // no state: that of the entry is kept
}

// rtnl asks the kernel about routes and neighbours, in the network namespace of the
// thread that made it.
type rtnl struct {
	routes  *netlink.Handle
	sockets map[int]*nl.SocketHandle
}

func newRtnl() (tables, error) {
	routes, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	socket, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_ROUTE)
	if err != nil {
		routes.Close()
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	return &rtnl{routes, map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: socket}}}, nil
}

// Close closes the sockets.
func (c *rtnl) Close() {
	c.routes.Close()
	for _, s := range c.sockets {
		s.Close()
	}
}

// rawData is a part of a request that is bytes already.
type rawData []byte

func (d rawData) Len() int          { return len(d) }
func (d rawData) Serialize() []byte { return d }

func neighbourRequest(kind, flags int, key neighbourKey, ntf uint8) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(kind, flags)
	req.AddData(rawData(appendNdmsg(nil, key, ntf)))
	if key.addr.IsValid() {
		req.AddData(nl.NewRtAttr(ndaDst, key.addr.AsSlice()))
	}
	return req
}

func (c *rtnl) request(kind, flags int, key neighbourKey, ntf uint8) *nl.NetlinkRequest {
	req := neighbourRequest(kind, flags, key, ntf)
	req.Sockets = c.sockets
	return req
}

// neighbour reads one entry; false when there is none.
func (c *rtnl) neighbour(key neighbourKey) (neighbourEntry, bool, error) {
	answers, err := c.request(unix.RTM_GETNEIGH, 0, key, 0).Execute(unix.NETLINK_ROUTE, unix.RTM_NEWNEIGH)
	if errors.Is(err, unix.ENOENT) {
		return neighbourEntry{}, false, nil
	}
	if err != nil {
		return neighbourEntry{}, false, fmt.Errorf("read neighbour %s: %w", key.addr, err)
	}
	for _, a := range answers {
		if e, ok := parseNeighbour(a); ok && e.key == key {
			return e, true, nil
		}
	}
	return neighbourEntry{}, false, nil
}

// manage has the kernel resolve a neighbour and keep it resolved (NTF_EXT_MANAGED,
// Linux 5.16). An entry that is there keeps its state. NTF_EXT_LEARNED keeps it out
// of the collection of garbage.
func (c *rtnl) manage(key neighbourKey) error {
	req := c.request(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE|unix.NLM_F_ACK, key, ntfExtLearned)
	req.AddData(nl.NewRtAttr(ndaFlagsExt, nl.Uint32Attr(ntfExtManaged)))
	req.AddData(nl.NewRtAttr(ndaProtocol, []byte{protocolOurs}))
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// forget removes an entry. It is no error if it is gone.
func (c *rtnl) forget(key neighbourKey) error {
	_, err := c.request(unix.RTM_DELNEIGH, unix.NLM_F_ACK, key, 0).Execute(unix.NETLINK_ROUTE, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// neighboursLeft returns the entries that an earlier process made.
func neighboursLeft() ([]neighbourEntry, error) {
	return readAll("neighbours", func() ([]neighbourEntry, error) {
		answers, err := neighbourRequest(unix.RTM_GETNEIGH, unix.NLM_F_DUMP, neighbourKey{}, 0).Execute(unix.NETLINK_ROUTE, unix.RTM_NEWNEIGH)
		var all []neighbourEntry
		for _, a := range answers {
			if e, ok := parseNeighbour(a); ok && e.ours() {
				all = append(all, e)
			}
		}
		return all, err
	})
}
