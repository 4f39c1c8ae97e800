// Package mroute follows the kernel's multicast forwarding cache (MFC): what multicast routing
// daemons (FRR, smcroute, pimd, igmpproxy) have the kernel forward. A Watcher keeps a copy of it
// through netlink, Convert makes rules from its entries, and a Keepalive advances the kernel's
// counters of entries whose packets bypass it, since the daemons rely on these. The package never
// writes the cache.
//
// The formats are those of net/ipv4/ipmr_base.c (mr_fill_mroute) and
// include/uapi/linux/rtnetlink.h.
package mroute

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"xdpcast/pkg/rules"
)

// Netlink families of the MFC (include/uapi/linux/rtnetlink.h).
const (
	familyIPv4 = 128 // RTNL_FAMILY_IPMR
	familyIPv6 = 129 // RTNL_FAMILY_IP6MR
)

// The kernel's default tables: RT_TABLE_DEFAULT for IPv4, RT6_TABLE_DFLT for IPv6.
const (
	defaultTable4 = 253
	defaultTable6 = 254
)

// Main is the table that routing daemons use unless configured otherwise.
const Main = rules.MrouteMain

// Key identifies an entry.
type Key struct {
	// Table is Main, or the number of another table.
	Table uint32
	// Source is the unspecified address for (*,G).
	Source, Group netip.Addr
}

func (k Key) String() string {
	source := "*"
	if !k.Source.IsUnspecified() {
		source = k.Source.String()
	}
	if k.Table == Main {
		return fmt.Sprintf("(%s, %s)", source, k.Group)
	}
	return fmt.Sprintf("(%s, %s) of table %d", source, k.Group, k.Table)
}

// Compare orders keys.
func (k Key) Compare(o Key) int {
	return cmp.Or(cmp.Compare(k.Table, o.Table), k.Group.Compare(o.Group), k.Source.Compare(o.Source))
}

// Output is a virtual interface (VIF) that packets leave by.
type Output struct {
	Index int // interface index
	// Threshold is the TTL that a packet must exceed.
	Threshold uint8
}

// Entry is a resolved entry of the cache. It is immutable.
type Entry struct {
	Key
	Input   int      // interface index
	Outputs []Output // by index
}

// Equal reports whether two entries are identical.
func (e *Entry) Equal(o *Entry) bool {
	return e.Key == o.Key && e.Input == o.Input && slices.Equal(e.Outputs, o.Outputs)
}

// Threshold is the largest TTL with which a packet misses some output: at least 1, with which it
// misses all.
func (e *Entry) Threshold() uint8 {
	threshold := uint8(1)
	for _, o := range e.Outputs {
		threshold = max(threshold, o.Threshold)
	}
	return threshold
}

// message is one notification or dump answer: an entry, or its deletion.
type message struct {
	entry Entry
	// resolved is false for an entry whose route is still being resolved, and for a deleted one.
	resolved bool
}

// parse reads the body of an RTM_NEWROUTE or RTM_DELROUTE. ok is false for anything but an entry of
// the cache: other routes, and truncated messages.
func parse(body []byte) (m message, ok bool) {
	if len(body) < unix.SizeofRtMsg {
		return m, false
	}
	family, table, flags := body[0], uint32(body[4]), binary.NativeEndian.Uint32(body[8:])
	size, standard := 4, uint32(defaultTable4)
	switch family {
	case familyIPv4:
	case familyIPv6:
		size, standard = 16, defaultTable6
	default:
		return m, false
	}
	e := &m.entry
	e.Source = netip.IPv4Unspecified()
	if size == 16 {
		e.Source = netip.IPv6Unspecified()
	}
	good := true
	address := func(to *netip.Addr, value []byte) {
		a, ok := netip.AddrFromSlice(value)
		good = good && ok && len(value) == size
		*to = a
	}
	for kind, value := range attributes(body[unix.SizeofRtMsg:], &good) {
		switch kind {
		case unix.RTA_SRC:
			address(&e.Source, value)
		case unix.RTA_DST:
			address(&e.Group, value)
		case unix.RTA_IIF:
			if good = good && len(value) == 4; good {
				e.Input = int(binary.NativeEndian.Uint32(value))
			}
		case unix.RTA_TABLE:
			if good = good && len(value) == 4; good {
				table = binary.NativeEndian.Uint32(value)
			}
		case unix.RTA_MULTIPATH:
			good = good && e.outputs(value)
		}
	}
	if e.Table = table; table == standard {
		e.Table = Main
	}
	slices.SortFunc(e.Outputs, func(a, b Output) int { return cmp.Compare(a.Index, b.Index) })
	m.resolved = flags&unix.RTNH_F_UNRESOLVED == 0 && e.Input > 0
	return m, good && e.Group.IsMulticast()
}

// outputs reads a list of struct rtnexthop, whose rtnh_hops is the threshold.
func (e *Entry) outputs(b []byte) bool {
	for len(b) > 0 {
		if len(b) < unix.SizeofRtNexthop {
			return false
		}
		length := int(binary.NativeEndian.Uint16(b))
		index := int32(binary.NativeEndian.Uint32(b[4:]))
		if length < unix.SizeofRtNexthop || length > len(b) || index <= 0 {
			return false
		}
		e.Outputs = append(e.Outputs, Output{Index: int(index), Threshold: b[3]})
		b = b[min(aligned(length), len(b)):]
	}
	return true
}

// attributes yields the attributes of a message, and clears good if they are truncated.
func attributes(b []byte, good *bool) func(yield func(kind uint16, value []byte) bool) {
	return func(yield func(kind uint16, value []byte) bool) {
		for len(b) > 0 {
			if len(b) < unix.SizeofRtAttr {
				*good = false
				return
			}
			length, kind := int(binary.NativeEndian.Uint16(b)), binary.NativeEndian.Uint16(b[2:])
			if length < unix.SizeofRtAttr || length > len(b) {
				*good = false
				return
			}
			if !yield(kind&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofRtAttr:length]) {
				return
			}
			b = b[min(aligned(length), len(b)):]
		}
	}
}

func aligned(n int) int { return (n + 3) &^ 3 }

// From include/uapi/linux/netconf.h; struct netconfmsg is padded to the alignment of attributes.
const (
	sizeofNetconfMsg    = 4
	netconfIndex        = 1 // NETCONFA_IFINDEX
	netconfMCForwarding = 4 // NETCONFA_MC_FORWARDING
)

// forwards reads the body of an RTM_NEWNETCONF: the index of an interface that multicast routing
// uses. ok is false for other interfaces, and for NETCONFA_IFINDEX_ALL and
// NETCONFA_IFINDEX_DEFAULT.
func forwards(body []byte) (index int, ok bool) {
	if len(body) < sizeofNetconfMsg {
		return 0, false
	}
	good, on := true, false
	for kind, value := range attributes(body[sizeofNetconfMsg:], &good) {
		if len(value) != 4 {
			continue
		}
		switch n := int32(binary.NativeEndian.Uint32(value)); kind {
		case netconfIndex:
			index = int(n)
		case netconfMCForwarding:
			on = n != 0
		}
	}
	return index, good && on && index > 0
}

// deletedLink reads the interface index of an RTM_DELLINK. It ignores those of family AF_BRIDGE:
// the port only left its bridge.
func deletedLink(body []byte) (index int, ok bool) {
	if len(body) < unix.SizeofIfInfomsg || body[0] != unix.AF_UNSPEC {
		return 0, false
	}
	return int(int32(binary.NativeEndian.Uint32(body[4:]))), true
}
