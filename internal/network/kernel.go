package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"xdpcast/internal/genl"
)

// kernel is the kernel interface of a Watcher. Tests inject faults here.
type kernel interface {
	// links lists all links, without addresses, features and queues.
	links() (map[int]*Link, error)
	// link reads one link; nil if it does not exist.
	link(index int) (*Link, error)
	// peerMTU reads the MTU of a link in another network namespace; 0 if it does not exist.
	peerMTU(netns int32, index int) (int, error)
	// addrs lists usable addresses, of all links if index is 0.
	addrs(index int) (map[int][]netip.Addr, error)
	features(index int) (map[int]Features, error)
	// queues lists receive queues: nil if the kernel cannot report them; in a list of all links,
	// those whose driver lacks the operation have no entry.
	queues(index int) (map[int]int, error)
	route(key HopKey) (foundRoute, error)
	// neighbour reads an entry, the zero one if it does not exist.
	neighbour(key NeighbourKey) (neighbourEntry, error)
	close() error
}

// limitedBroadcast is 255.255.255.255 (RFC 919).
var limitedBroadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// families are the generic netlink families of the running kernel; the zero Family if the kernel
// lacks one.
type families struct{ ethtool, netdev genl.Family }

func findFamilies() (f families, err error) {
	for name, family := range map[string]*genl.Family{"ethtool": &f.ethtool, "netdev": &f.netdev} {
		found, err := genl.Find(name)
		switch {
		case err == nil:
			*family = found
		case !errors.Is(err, unix.ENOENT):
			return f, err
		}
	}
	return f, nil
}

// sockets is the kernel interface of the running kernel.
type sockets struct {
	families
	rtnl    *conn
	generic *conn
}

func openKernel(f families) (_ kernel, err error) {
	s := &sockets{families: f}
	if s.rtnl, err = dial(unix.NETLINK_ROUTE); err != nil {
		return nil, err
	}
	if s.generic, err = dial(unix.NETLINK_GENERIC); err != nil {
		return nil, errors.Join(err, s.rtnl.close())
	}
	return s, nil
}

func (s *sockets) close() error { return errors.Join(s.rtnl.close(), s.generic.close()) }

// linkRequest requests a link, or with index 0 all, without their counters.
func linkRequest(index int) []byte {
	body := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(body[4:], uint32(index))
	return appendUint32(body, unix.IFLA_EXT_MASK, extFilterSkipStats)
}

func (s *sockets) links() (all map[int]*Link, err error) {
	err = readAll("interfaces", func() error {
		all = map[int]*Link{}
		return s.rtnl.ask(unix.RTM_GETLINK, unix.NLM_F_DUMP, linkRequest(0), func(data []byte) {
			if l, ok := parseLink(data); ok {
				all[l.Index] = l
			}
		})
	})
	return all, err
}

func (s *sockets) link(index int) (found *Link, err error) {
	err = s.rtnl.ask(unix.RTM_GETLINK, 0, linkRequest(index), func(data []byte) {
		if l, ok := parseLink(data); ok && l.Index == index {
			found = l
		}
	})
	if errors.Is(err, unix.ENODEV) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read interface with index %d: %w", index, err)
	}
	return found, nil
}

func (s *sockets) peerMTU(netns int32, index int) (mtu int, err error) {
	body := appendUint32(linkRequest(index), unix.IFLA_TARGET_NETNSID, uint32(netns))
	err = s.rtnl.ask(unix.RTM_GETLINK, 0, body, func(data []byte) {
		if l, ok := parseLink(data); ok && l.Index == index {
			mtu = l.MTU
		}
	})
	if errors.Is(err, unix.ENODEV) {
		return 0, nil
	}
	return mtu, err
}

func (s *sockets) addrs(index int) (all map[int][]netip.Addr, err error) {
	body := make([]byte, unix.SizeofIfAddrmsg)
	binary.NativeEndian.PutUint32(body[4:], uint32(index))
	err = readAll("addresses", func() error {
		all = map[int][]netip.Addr{}
		return s.rtnl.ask(unix.RTM_GETADDR, unix.NLM_F_DUMP, body, func(data []byte) {
			if i, addr, usable, ok := parseAddr(data); ok && usable {
				all[i] = append(all[i], addr)
			}
		})
	})
	if index != 0 && errors.Is(err, unix.ENODEV) {
		return nil, nil
	}
	return all, err
}

// about sends a command of a family for one interface or, with index 0, all.
func (s *sockets) about(index int, family uint16, command, version uint8, attr []byte, each func(data []byte)) error {
	body := append([]byte{command, version, 0, 0}, attr...)
	if index != 0 {
		return s.generic.ask(family, 0, body, each)
	}
	return readAll("devices", func() error { return s.generic.ask(family, unix.NLM_F_DUMP, body, each) })
}

func (s *sockets) features(index int) (map[int]Features, error) {
	all := map[int]Features{}
	if s.netdev.ID == 0 {
		return all, nil
	}
	var attr []byte
	if index != 0 {
		attr = appendUint32(nil, netdevAttrIfindex, uint32(index))
	}
	err := s.about(index, s.netdev.ID, netdevDevGet, netdevVersion, attr, func(data []byte) {
		if i, f, ok := parseFeatures(data); ok {
			all[i] = f
		}
	})
	if index != 0 && errors.Is(err, unix.ENODEV) {
		return all, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read xdp features: %w", err)
	}
	return all, nil
}

func (s *sockets) queues(index int) (map[int]int, error) {
	if s.ethtool.ID == 0 {
		return nil, nil
	}
	all := map[int]int{}
	var attr []byte
	if index != 0 {
		attr = appendAttribute(nil, unix.ETHTOOL_A_CHANNELS_HEADER|unix.NLA_F_NESTED, appendUint32(nil, unix.ETHTOOL_A_HEADER_DEV_INDEX, uint32(index)))
	}
	err := s.about(index, s.ethtool.ID, unix.ETHTOOL_MSG_CHANNELS_GET, unix.ETHTOOL_GENL_VERSION, attr, func(data []byte) {
		if i, n, ok := parseChannels(data); ok {
			all[i] = n
		}
	})
	switch {
	case index != 0 && errors.Is(err, unix.EOPNOTSUPP):
		all[index] = 1 // a driver without the operation has one queue each way
	case index != 0 && errors.Is(err, unix.ENODEV): // gone, or asleep
	case err != nil:
		return nil, fmt.Errorf("read queues: %w", err)
	}
	return all, nil
}

// route requests the entry of the routing table (RTM_F_FIB_MATCH) by the output's interface, even
// if the host itself would use another: without a route, IPv4 treats any destination as on-link.
func (s *sockets) route(key HopKey) (foundRoute, error) {
	if key.Dst == limitedBroadcast {
		return foundRoute{kind: HopBroadcast}, nil // no routing table has it
	}
	r, err := s.lookUp(key, unix.RTM_F_FIB_MATCH)
	if err == nil && r.object {
		r, err = s.lookUp(key, 0)
	}
	switch {
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENODEV),
		// Routes of the types prohibit, blackhole and throw return these errors.
		errors.Is(err, unix.EACCES), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EAGAIN):
		return foundRoute{kind: HopNone}, nil
	case err != nil:
		return r, fmt.Errorf("look up route: %w", err)
	}
	return r, nil
}

func (s *sockets) lookUp(key HopKey, flags uint32) (found foundRoute, err error) {
	family := byte(unix.AF_INET)
	if key.Dst.Is6() {
		family = unix.AF_INET6
	}
	body := []byte{family, byte(key.Dst.BitLen()), 0, 0, 0, 0, 0, 0}
	body = binary.NativeEndian.AppendUint32(body, flags)
	body = appendAttribute(body, unix.RTA_DST, key.Dst.AsSlice())
	body = appendUint32(body, unix.RTA_OIF, uint32(key.Link.Index))
	found.kind = HopNone
	err = s.rtnl.ask(unix.RTM_GETROUTE, 0, body, func(data []byte) {
		if r, ok := parseRoute(data, key.Link.Index); ok {
			found = r
		}
	})
	return found, err
}

func (s *sockets) neighbour(key NeighbourKey) (neighbourEntry, error) {
	return readNeighbour(s.rtnl, key)
}

// neighbourRequest is struct ndmsg and the address.
func neighbourRequest(key NeighbourKey, flags byte) []byte {
	family := byte(unix.AF_UNSPEC) // for a list: all
	switch {
	case key.Addr.Is4():
		family = unix.AF_INET
	case key.Addr.Is6():
		family = unix.AF_INET6
	}
	body := []byte{family, 0, 0, 0}
	body = binary.NativeEndian.AppendUint32(body, uint32(key.Index))
	body = append(body, 0, 0, flags, 0) // no state: the entry keeps its own
	if key.Addr.IsValid() {
		body = appendAttribute(body, ndaDst, key.Addr.AsSlice())
	}
	return body
}

// readNeighbour reads one entry; the zero one if it does not exist.
func readNeighbour(c *conn, key NeighbourKey) (found neighbourEntry, err error) {
	err = c.ask(unix.RTM_GETNEIGH, 0, neighbourRequest(key, 0), func(data []byte) {
		if e, ok := parseNeighbour(data); ok && e.NeighbourKey == key {
			found = e
		}
	})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		return neighbourEntry{}, nil
	}
	if err != nil {
		return found, fmt.Errorf("read neighbour %s: %w", key.Addr, err)
	}
	return found, nil
}
