package network

import (
	"encoding/binary"
	"math"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"xdpcast/internal/genl"
)

// Parsers for the bodies of the kernel's messages (rtnetlink(7), Documentation/netlink/specs). They
// trust nothing: for any bytes, a parser returns whether they were valid.

// From include/uapi/linux; missing in golang.org/x/sys/unix.
const (
	ifaFlagsUsable = unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED // unless optimistic

	extFilterSkipStats = 1 << 3 // RTEXT_FILTER_SKIP_STATS
	rtaNHID            = 30     // RTA_NH_ID

	ndmsgLen                                    = 12 // struct ndmsg
	ndaDst, ndaLLAddr, ndaProtocol, ndaFlagsExt = 1, 2, 12, 15
	ntfExtLearned                               = 1 << 4
	ntfExtManaged                               = 1 << 0

	// nudValid are the states in which the kernel sends to an entry's address (NUD_VALID of
	// include/net/neighbour.h).
	nudValid = unix.NUD_PERMANENT | unix.NUD_NOARP | unix.NUD_REACHABLE | unix.NUD_PROBE | unix.NUD_STALE | unix.NUD_DELAY
	// nudStatic are the states of entries that the kernel never resolves by itself.
	nudStatic = unix.NUD_PERMANENT | unix.NUD_NOARP

	// linux/netdev.h, Linux 6.3.
	netdevVersion         = 1
	netdevDevGet          = 1
	netdevAttrIfindex     = 1
	netdevAttrXDPFeatures = 3
	xdpActBasic           = 1 << 0
	xdpActNDOXmit         = 1 << 2
	xdpActNDOXmitSG       = 1 << 6
)

// ownNetns is this network namespace among the kernel's ids for others, which are at least 0; -1
// means no id (NETNSA_NSID_NOT_ASSIGNED).
const ownNetns = math.MinInt32

// parseLink parses the body of RTM_NEWLINK: struct ifinfomsg and attributes. Fields reported by
// other messages stay zero.
func parseLink(data []byte) (*Link, bool) {
	if len(data) < unix.SizeofIfInfomsg || data[0] != unix.AF_UNSPEC {
		return nil, false
	}
	flags := binary.NativeEndian.Uint32(data[8:])
	const running = unix.IFF_UP | unix.IFF_RUNNING | unix.IFF_LOWER_UP
	l := &Link{
		peerNetns: ownNetns,
		LinkID:    LinkID{Index: int(int32(binary.NativeEndian.Uint32(data[4:])))},
		Loopback:  flags&unix.IFF_LOOPBACK != 0,
		Up:        flags&unix.IFF_UP != 0,
		Carrier:   flags&running == running,
	}
	ether := binary.NativeEndian.Uint16(data[2:]) == unix.ARPHRD_ETHER
	sound := true
	sound = attributes(data[unix.SizeofIfInfomsg:], func(kind uint16, value []byte) {
		switch kind {
		case unix.IFLA_IFNAME:
			l.Name = text(value)
		case unix.IFLA_ADDRESS:
			if ether && len(value) == len(l.MAC) {
				l.Ethernet, l.MAC = true, [6]byte(value)
			}
		case unix.IFLA_MTU:
			l.MTU = int(uint32Of(value))
		case unix.IFLA_LINK:
			l.Lower = int(uint32Of(value))
		case unix.IFLA_LINK_NETNSID:
			l.outside, l.peerNetns = true, int32(uint32Of(value))
		case unix.IFLA_MASTER:
			l.Master = int(uint32Of(value))
		case unix.IFLA_PARENT_DEV_NAME:
			l.Hardware = len(value) > 0
		case unix.IFLA_LINKINFO:
			sound = attributes(value, func(kind uint16, value []byte) {
				switch kind {
				case unix.IFLA_INFO_KIND:
					l.Kind = text(value)
				case unix.IFLA_INFO_SLAVE_KIND:
					l.MasterKind = text(value)
				}
			}) && sound
		case unix.IFLA_PROP_LIST:
			sound = attributes(value, func(kind uint16, value []byte) {
				if kind == unix.IFLA_ALT_IFNAME {
					l.AltNames = append(l.AltNames, text(value))
				}
			}) && sound
		case unix.IFLA_XDP:
			var ok bool
			l.XDP, ok = parseXDP(value)
			sound = ok && sound
		}
	}) && sound
	slices.Sort(l.AltNames)
	if l.Kind == "veth" {
		l.peer = l.Lower
	} else {
		l.peerNetns = ownNetns
	}
	l.outside = l.outside && !paired(l.Kind)
	if l.outside || paired(l.Kind) {
		l.Lower = 0
	}
	return l, sound && l.Index > 0 && l.Name != ""
}

// paired says whether IFLA_LINK of this kind of interface is its peer rather than its lower layer.
func paired(kind string) bool { return kind == "veth" || kind == "netkit" || kind == "vxcan" }

// parseXDP parses IFLA_XDP. There is an attribute for each mode in which a program is attached,
// also if there are several (XDP_ATTACHED_MULTI).
func parseXDP(data []byte) (all []XDP, sound bool) {
	sound = attributes(data, func(kind uint16, value []byte) {
		id := uint32Of(value)
		if id == 0 {
			return
		}
		switch kind {
		case unix.IFLA_XDP_DRV_PROG_ID, unix.IFLA_XDP_HW_PROG_ID:
			all = append(all, XDP{Program: id})
		case unix.IFLA_XDP_SKB_PROG_ID:
			all = append(all, XDP{Program: id, Generic: true})
		}
	})
	return all, sound
}

// parseIndex reads the interface index of a message about a link or an address: both have it at the
// same offset.
func parseIndex(data []byte) (family byte, index int, ok bool) {
	if len(data) < 8 {
		return 0, 0, false
	}
	return data[0], int(int32(binary.NativeEndian.Uint32(data[4:]))), true
}

// parseAddr parses the body of RTM_NEWADDR: struct ifaddrmsg and attributes. usable is false for an
// address that must not be a source: while duplicate address detection runs, and if it failed.
func parseAddr(data []byte) (index int, addr netip.Addr, usable, ok bool) {
	if len(data) < unix.SizeofIfAddrmsg {
		return 0, addr, false, false
	}
	index = int(int32(binary.NativeEndian.Uint32(data[4:])))
	flags := uint32(data[2])
	var local netip.Addr
	sound := attributes(data[unix.SizeofIfAddrmsg:], func(kind uint16, value []byte) {
		switch kind {
		case unix.IFA_ADDRESS:
			addr = addrOf(data[0], value)
		case unix.IFA_LOCAL:
			local = addrOf(data[0], value)
		case unix.IFA_FLAGS:
			flags = uint32Of(value)
		}
	})
	if local.IsValid() {
		addr = local // IFA_ADDRESS is the other end's of a point-to-point link
	}
	usable = flags&ifaFlagsUsable == 0 || flags&unix.IFA_F_OPTIMISTIC != 0
	return index, addr, usable, sound && addr.IsValid()
}

// addrOf reads an address of a family; the zero Addr if the length is wrong.
func addrOf(family byte, value []byte) netip.Addr {
	if family == unix.AF_INET && len(value) == 4 || family == unix.AF_INET6 && len(value) == 16 {
		addr, _ := netip.AddrFromSlice(value)
		return addr
	}
	return netip.Addr{}
}

// parseFeatures parses an answer or notification of the netdev family about a device, with its
// generic netlink header.
func parseFeatures(data []byte) (index int, f Features, ok bool) {
	if len(data) < genl.HeaderLen {
		return 0, f, false
	}
	sound := attributes(data[genl.HeaderLen:], func(kind uint16, value []byte) {
		switch {
		case kind == netdevAttrIfindex:
			index = int(uint32Of(value))
		case kind == netdevAttrXDPFeatures && len(value) >= 8:
			bits := binary.NativeEndian.Uint64(value)
			f = Features{Known: true, Native: bits&xdpActBasic != 0, Transmit: bits&xdpActNDOXmit != 0, TransmitSG: bits&xdpActNDOXmitSG != 0}
		}
	})
	return index, f, sound && index > 0
}

// parseChannels parses an answer or notification of the ethtool family about queues
// (Documentation/networking/ethtool-netlink.rst), with its generic netlink header.
func parseChannels(data []byte) (index, receive int, ok bool) {
	if len(data) < genl.HeaderLen {
		return 0, 0, false
	}
	inside := true
	sound := attributes(data[genl.HeaderLen:], func(kind uint16, value []byte) {
		switch kind {
		case unix.ETHTOOL_A_CHANNELS_HEADER:
			inside = attributes(value, func(kind uint16, value []byte) {
				if kind == unix.ETHTOOL_A_HEADER_DEV_INDEX {
					index = int(uint32Of(value))
				}
			})
		case unix.ETHTOOL_A_CHANNELS_RX_COUNT, unix.ETHTOOL_A_CHANNELS_COMBINED_COUNT:
			receive += int(uint32Of(value))
		}
	})
	return index, max(1, receive), sound && inside && index > 0
}

// foundRoute is the kernel's route for a destination.
type foundRoute struct {
	kind    HopKind
	gateway netip.Addr // the zero Addr: the destination itself
	// object: the route uses a nexthop object and does not include its gateway (sysctl
	// net.ipv4.nexthop_compat_mode).
	object bool
}

// parseRoute parses the body of RTM_NEWROUTE as the answer for a destination by an interface:
// struct rtmsg and attributes. Of several gateways by the interface it uses the first.
func parseRoute(data []byte, index int) (r foundRoute, ok bool) {
	if len(data) < unix.SizeofRtMsg {
		return r, false
	}
	switch data[7] {
	case unix.RTN_UNICAST:
		r.kind = HopUnicast
	case unix.RTN_BROADCAST:
		r.kind = HopBroadcast
	case unix.RTN_LOCAL:
		r.kind = HopLocal
	default:
		r.kind = HopNone
	}
	inside, object := true, false
	sound := attributes(data[unix.SizeofRtMsg:], func(kind uint16, value []byte) {
		switch kind {
		case unix.RTA_MULTIPATH:
			var gateway netip.Addr
			if gateway, inside = parseMultipath(data[0], value, index); gateway.IsValid() {
				r.gateway = gateway
			}
		case rtaNHID:
			object = true
		default:
			if gateway := gatewayOf(data[0], kind, value); gateway.IsValid() {
				r.gateway = gateway
			}
		}
	})
	if r.kind != HopUnicast {
		r.gateway = netip.Addr{}
	}
	r.object = object && r.kind == HopUnicast && !r.gateway.IsValid()
	return r, sound && inside
}

// gatewayOf reads RTA_GATEWAY or RTA_VIA: an IPv4 route by an IPv6 gateway (RFC 5549).
func gatewayOf(family byte, kind uint16, value []byte) (gateway netip.Addr) {
	switch {
	case kind == unix.RTA_GATEWAY:
		gateway = addrOf(family, value)
	case kind == unix.RTA_VIA && len(value) >= 2: // struct rtvia
		gateway = addrOf(byte(binary.NativeEndian.Uint16(value)), value[2:])
	}
	if gateway.IsValid() && gateway.IsUnspecified() {
		return netip.Addr{}
	}
	return gateway
}

// parseMultipath parses RTA_MULTIPATH, a list of struct rtnexthop with attributes, and returns the
// gateway of the first next hop by an interface.
func parseMultipath(family byte, b []byte, index int) (gateway netip.Addr, sound bool) {
	for len(b) > 0 {
		if len(b) < unix.SizeofRtNexthop {
			return gateway, false
		}
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofRtNexthop || size > len(b) {
			return gateway, false
		}
		var way netip.Addr
		if !attributes(b[unix.SizeofRtNexthop:size], func(kind uint16, value []byte) {
			if g := gatewayOf(family, kind, value); g.IsValid() {
				way = g
			}
		}) {
			return gateway, false
		}
		if int(int32(binary.NativeEndian.Uint32(b[4:]))) == index {
			return way, true
		}
		b = b[min(len(b), align(size)):]
	}
	return gateway, true
}

// parseRoutePrefix returns the destinations affected by a route change.
func parseRoutePrefix(data []byte) (prefix netip.Prefix, ok bool) {
	if len(data) < unix.SizeofRtMsg {
		return prefix, false
	}
	var dst netip.Addr
	switch data[0] {
	case unix.AF_INET:
		dst = netip.IPv4Unspecified()
	case unix.AF_INET6:
		dst = netip.IPv6Unspecified()
	default:
		return prefix, false
	}
	sound := attributes(data[unix.SizeofRtMsg:], func(kind uint16, value []byte) {
		if kind == unix.RTA_DST {
			if addr := addrOf(data[0], value); addr.IsValid() {
				dst = addr
			}
		}
	})
	prefix, err := dst.Prefix(int(data[1]))
	return prefix, sound && err == nil
}

// neighbourEntry is an entry of the kernel's neighbour tables.
type neighbourEntry struct {
	NeighbourKey
	state    uint16 // NUD_*
	mac      [6]byte
	hasMAC   bool
	managed  bool
	protocol uint8
}

func (e *neighbourEntry) valid() bool  { return e.state&nudValid != 0 && e.hasMAC }
func (e *neighbourEntry) static() bool { return e.state&nudStatic != 0 }
func (e *neighbourEntry) ours() bool   { return e.protocol == protocolOurs }

// parseNeighbour parses the body of RTM_NEWNEIGH or RTM_DELNEIGH for IPv4 or IPv6: struct ndmsg and
// attributes (include/uapi/linux/neighbour.h).
func parseNeighbour(data []byte) (e neighbourEntry, ok bool) {
	if len(data) < ndmsgLen {
		return e, false
	}
	e.Index = int(int32(binary.NativeEndian.Uint32(data[4:])))
	e.state = binary.NativeEndian.Uint16(data[8:])
	sound := attributes(data[ndmsgLen:], func(kind uint16, value []byte) {
		switch kind {
		case ndaDst:
			e.Addr = addrOf(data[0], value)
		case ndaLLAddr:
			if len(value) == len(e.mac) {
				e.mac, e.hasMAC = [6]byte(value), true
			}
		case ndaProtocol:
			if len(value) >= 1 {
				e.protocol = value[0]
			}
		case ndaFlagsExt:
			e.managed = uint32Of(value)&ntfExtManaged != 0
		}
	})
	return e, sound && e.Addr.IsValid()
}
