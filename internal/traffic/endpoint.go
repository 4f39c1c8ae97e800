package traffic

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Target is the destination of packets: an address and port, through an interface.
type Target struct {
	Addr      netip.AddrPort
	Interface string
}

// Subscription is what a receiver listens to: a target and, for a source-specific one (RFC 4607),
// the only sender.
type Subscription struct {
	// Source is the zero Addr for any source.
	Source netip.Addr
	Target
}

// ParseTarget parses ADDRESS:PORT%INTERFACE, or [ADDRESS]:PORT%INTERFACE for IPv6.
func ParseTarget(s string) (Target, error) {
	t, err := parseTarget(s)
	if err != nil {
		return Target{}, fmt.Errorf("endpoint %q: %w", s, err)
	}
	return t, nil
}

// ParseSubscription parses [SOURCE@]ADDRESS:PORT%INTERFACE; an IPv6 address is in brackets, an IPv6
// source may be.
func ParseSubscription(s string) (Subscription, error) {
	sub, err := parseSubscription(s)
	if err != nil {
		return Subscription{}, fmt.Errorf("endpoint %q: %w", s, err)
	}
	return sub, nil
}

// String formats the target as ParseTarget parses it.
func (t Target) String() string { return t.Addr.String() + "%" + t.Interface }

// String formats the subscription as ParseSubscription parses it.
func (s Subscription) String() string {
	if !s.Source.IsValid() {
		return s.Target.String()
	}
	if s.Source.Is6() {
		return "[" + s.Source.String() + "]@" + s.Target.String()
	}
	return s.Source.String() + "@" + s.Target.String()
}

func parseTarget(s string) (Target, error) {
	// The interface follows the last %: an earlier one would be a zone, which
	// parseAddr refuses.
	i := strings.LastIndexByte(s, '%')
	if i < 0 || i < strings.LastIndexByte(s, ']') {
		return Target{}, fmt.Errorf("no interface: must end in %%INTERFACE, such as %%eth0")
	}
	addrPort, ifname := s[:i], s[i+1:]
	if strings.ContainsRune(ifname, ':') {
		return Target{}, fmt.Errorf("port after the interface: must be ADDRESS:PORT%%INTERFACE")
	}
	if err := checkInterfaceName(ifname); err != nil {
		return Target{}, err
	}
	colon := strings.LastIndexByte(addrPort, ':')
	if colon < 0 || colon < strings.LastIndexByte(addrPort, ']') {
		return Target{}, fmt.Errorf("no port: must be ADDRESS:PORT%%INTERFACE")
	}
	addr, err := parseHost(addrPort[:colon])
	if err != nil {
		return Target{}, err
	}
	port, err := ParsePort(addrPort[colon+1:])
	if err != nil {
		return Target{}, err
	}
	return Target{Addr: netip.AddrPortFrom(addr, port), Interface: ifname}, nil
}

func parseSubscription(s string) (Subscription, error) {
	source, target, found := strings.Cut(s, "@")
	if !found {
		t, err := parseTarget(s)
		return Subscription{Target: t}, err
	}
	t, err := parseTarget(target)
	if err != nil {
		return Subscription{}, err
	}
	if inner, ok := strings.CutPrefix(source, "["); ok {
		if source, ok = strings.CutSuffix(inner, "]"); !ok {
			return Subscription{}, fmt.Errorf("source %q: bracket not closed", "["+inner)
		}
	}
	from, err := parseAddr(source)
	if err != nil {
		return Subscription{}, fmt.Errorf("source: %w", err)
	}
	sub := Subscription{Source: from, Target: t}
	return sub, sub.check()
}

// check says whether source and address are compatible.
func (s Subscription) check() error {
	switch {
	case !s.Source.IsValid():
		return nil
	case s.Source.IsMulticast():
		return fmt.Errorf("source %s: must be a unicast address", s.Source)
	case !s.Addr.Addr().IsMulticast():
		return fmt.Errorf("source %s with address %s, which is not multicast: only groups are source-specific", s.Source, s.Addr.Addr())
	case s.Source.Is4() != s.Addr.Addr().Is4():
		return fmt.Errorf("source %s and group %s: must be of one family", s.Source, s.Addr.Addr())
	}
	return nil
}

// parseHost parses an IPv4 address, or an IPv6 address in brackets.
func parseHost(s string) (netip.Addr, error) {
	inner, bracketed := strings.CutPrefix(s, "[")
	if bracketed {
		var closed bool
		if inner, closed = strings.CutSuffix(inner, "]"); !closed {
			return netip.Addr{}, fmt.Errorf("address %q: bracket not closed", s)
		}
	}
	addr, err := parseAddr(inner)
	if err != nil {
		return netip.Addr{}, err
	}
	if addr.Is6() != bracketed {
		return netip.Addr{}, fmt.Errorf("address %q: an IPv6 address stands in brackets, an IPv4 address does not", s)
	}
	return addr, nil
}

func parseAddr(s string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(s)
	switch {
	case err != nil:
		return netip.Addr{}, fmt.Errorf("address %q: must be an IPv4 or IPv6 address", s)
	case addr.Zone() != "":
		return netip.Addr{}, fmt.Errorf("address %q: must be without a zone, the interface follows the port", s)
	case addr.Is4In6():
		return netip.Addr{}, fmt.Errorf("address %q: must be written as IPv4, %s", s, addr.Unmap())
	case addr.IsUnspecified():
		return netip.Addr{}, fmt.Errorf("address %q: must not be the unspecified address", s)
	}
	return addr, nil
}

// ParsePort parses a UDP port, 1 to 65535.
func ParsePort(s string) (uint16, error) {
	port, err := strconv.ParseUint(s, 10, 16)
	if err != nil || port == 0 {
		return 0, fmt.Errorf("port %q: must be 1 to 65535", s)
	}
	return uint16(port), nil
}

// checkInterfaceName is the kernel's dev_valid_name (net/core/dev.c).
func checkInterfaceName(name string) error {
	if name == "" {
		return fmt.Errorf("no interface: must end in %%INTERFACE, such as %%eth0")
	}
	if len(name) >= unix.IFNAMSIZ || name == "." || name == ".." || strings.ContainsAny(name, "/: \t\n\v\f\r\x00%@]") {
		return fmt.Errorf("interface %q: must be a name of up to %d bytes", name, unix.IFNAMSIZ-1)
	}
	return nil
}

// ParseDSCP parses a differentiated services code point: 0 to 63, or a name of RFC 2474 (cs0 to
// cs7), RFC 2597 (af11 to af43), RFC 3246 (ef), RFC 5865 (va) or RFC 8622 (le).
func ParseDSCP(s string) (uint8, error) {
	if n, err := strconv.ParseUint(s, 10, 8); err == nil && n <= 63 {
		return uint8(n), nil
	}
	switch name := strings.ToLower(s); {
	case name == "ef":
		return 46, nil
	case name == "va":
		return 44, nil
	case name == "le":
		return 1, nil
	case len(name) == 3 && name[:2] == "cs" && name[2] >= '0' && name[2] <= '7':
		return (name[2] - '0') << 3, nil
	case len(name) == 4 && name[:2] == "af" && name[2] >= '1' && name[2] <= '4' && name[3] >= '1' && name[3] <= '3':
		return (name[2]-'0')<<3 | (name[3]-'0')<<1, nil
	}
	return 0, fmt.Errorf("dscp %q: must be 0 to 63, or a name such as ef, af41 or cs3", s)
}

// maxGroups limits the sockets of a receiver and the addresses of a sender.
const maxGroups = 65536

// expand returns n targets with consecutive group addresses, beginning with t.
func (t Target) expand(n int) ([]Target, error) {
	if n < 1 || n > maxGroups {
		return nil, fmt.Errorf("groups %d: must be 1 to %d", n, maxGroups)
	}
	if n > 1 && !t.Addr.Addr().IsMulticast() {
		return nil, fmt.Errorf("groups %d from %s: the address must be multicast", n, t.Addr.Addr())
	}
	targets := make([]Target, n)
	addr := t.Addr.Addr()
	for i := range targets {
		if n > 1 && !addr.IsMulticast() {
			return nil, fmt.Errorf("groups %d from %s: only %d multicast addresses follow", n, t.Addr.Addr(), i)
		}
		targets[i] = Target{Addr: netip.AddrPortFrom(addr, t.Addr.Port()), Interface: t.Interface}
		addr = addr.Next()
	}
	return targets, nil
}
