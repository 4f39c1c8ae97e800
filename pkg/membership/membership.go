package membership

import (
	"cmp"
	"fmt"
	"net/netip"
	"strconv"

	"golang.org/x/sys/unix"
)

// Membership is one multicast group on one interface, from any source or from one. Index,
// Generation, Group and Source identify it.
type Membership struct {
	// Interface is the name used in messages and counters. It is not looked up.
	Interface string
	// Index is the interface's index (RFC 3493 section 4).
	Index int
	// Generation distinguishes successive interfaces with this index, since memberships end with
	// each; 0 if the caller does not track them.
	Generation uint64
	// Group is the multicast group, without a zone.
	Group netip.Addr
	// Source is the sender, of the group's family and without a zone. The zero
	// Addr means any source.
	Source netip.Addr
}

// String formats a membership for people: "239.1.1.1 from 10.0.0.5 on eth0".
func (m Membership) String() string {
	s := m.Group.String()
	if m.Source.IsValid() {
		s += " from " + m.Source.String()
	}
	return s + " on " + interfaceLabel(m.Interface, m.Index)
}

// key identifies a membership on its interface: IPv4 addresses in IPv6 notation, which validate
// refuses otherwise, and :: for any source. There may be 100,000 of them.
type key struct {
	group, source [16]byte
}

// life is one generation of an interface.
type life struct {
	index      int
	generation uint64
}

func (m Membership) life() life { return life{m.Index, m.Generation} }

func (m Membership) key() key {
	k := key{group: m.Group.As16()}
	if m.Source.IsValid() {
		k.source = m.Source.As16()
	}
	return k
}

// addrs returns the group and the source of a membership; the zero Addr is any source.
func (k key) addrs() (group, source netip.Addr) {
	if k.source != ([16]byte{}) {
		source = netip.AddrFrom16(k.source).Unmap()
	}
	return netip.AddrFrom16(k.group).Unmap(), source
}

func (m Membership) family() family {
	if m.Group.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// Compare orders memberships by interface, then group, then source.
func (m Membership) Compare(o Membership) int {
	return cmp.Or(
		cmp.Compare(m.Interface, o.Interface),
		cmp.Compare(m.Index, o.Index),
		cmp.Compare(m.Generation, o.Generation),
		m.Group.Compare(o.Group),
		m.Source.Compare(o.Source),
	)
}

// validate refuses what the kernel would refuse or, worse, misunderstand: with index 0 it would
// choose an interface by its routes.
func (m Membership) validate() error {
	switch {
	case !m.Group.IsValid():
		return fmt.Errorf("no group given, want one in 224.0.0.0/4 or ff00::/8: %w", unix.EINVAL)
	case m.Group.Zone() != "" || m.Source.Zone() != "":
		return fmt.Errorf("address with a zone, want it without: the index names the interface: %w", unix.EINVAL)
	case m.Group.Is4In6() || m.Source.Is4In6():
		return fmt.Errorf("IPv4 address in IPv6 notation, want plain IPv4: %w", unix.EINVAL)
	case !m.Group.IsMulticast():
		return fmt.Errorf("not a multicast group, want one in 224.0.0.0/4 (RFC 5771) or ff00::/8 (RFC 4291): %w", unix.EINVAL)
	case m.Source.IsValid() && m.Source.Is4() != m.Group.Is4():
		return fmt.Errorf("source and group are of different families: %w", unix.EINVAL)
	case m.Source.IsValid() && (m.Source.IsMulticast() || m.Source.IsUnspecified()):
		return fmt.Errorf("source is not a unicast address: %w", unix.EINVAL)
	case m.Index <= 0 || int64(m.Index) > 1<<31-1:
		return &InterfaceNotFoundError{Interface: m.Interface, Index: m.Index, Err: unix.ENODEV}
	}
	return nil
}

// interfaceLabel names an interface in messages, with or without a known name.
func interfaceLabel(name string, index int) string {
	if name == "" {
		return "interface " + strconv.Itoa(index)
	}
	return name
}
