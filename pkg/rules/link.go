package rules

import (
	"fmt"
	"net/netip"
)

// Link-local addresses: groups that no router may forward, and broadcast. A rule relays them only
// if it says so.

// LinkScope reports whether a group is link-local, though it leaves the host: 224.0.0.0/24 (RFC
// 5771 section 4) or IPv6 scope 2 (RFC 4291 section 2.7).
func LinkScope(a netip.Addr) bool {
	if a.Is4() {
		b := a.As4()
		return b[0] == 224 && b[1] == 0 && b[2] == 0
	}
	b := a.As16()
	return b[0] == 0xff && b[1]&0xf == 2
}

// limitedBroadcast is 255.255.255.255 (RFC 919 section 7).
var limitedBroadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// Unicast reports whether an output sends to a single host, through its next hop.
func (o Output) Unicast() bool { return !o.Address.IsMulticast() && !o.Policy.Broadcast }

const (
	insistLocalControl = ", unless the rule's input says local-control=allow"
	insistBroadcast    = ", unless it has broadcast=allow"
)

// addrFault is the fault of an input or output address; broadcast declares it a broadcast address
// of the link.
func (e end) addrFault(addr netip.Addr, broadcast bool) string {
	switch {
	case addr != limitedBroadcast:
		return addrFault(addr)
	case broadcast:
		return ""
	}
	return addrFault(addr) + insistBroadcast
}

// linkLocalFault is the fault of a single group that no router may forward.
func (e end) linkLocalFault(addr netip.Addr) string {
	want := linkLocalFault(addr)
	switch {
	case want == "" || !LinkScope(addr):
		return want
	case e.localControl:
		return ""
	}
	return want + insistLocalControl
}

// localControlNeeded refuses the option in a rule that does not need it.
func (c *checker) localControlNeeded(r Rule) {
	for _, o := range r.Out {
		if o.Len == 0 && o.Address.IsValid() && LinkScope(o.Address) {
			return
		}
	}
	for i := range r.InputCount() {
		leg := r.Leg(i)
		if !leg.Accept.LocalControl || leg.In.Len == 0 && leg.In.Address.IsValid() && LinkScope(leg.In.Address) {
			continue
		}
		end{c, legSlot(&r, i)}.fault(nil, ".local-control", "allow", "no local-control: no address of the rule is a single group of 224.0.0.0/24 or ffx2::/16")
	}
}

// broadcast checks the option for an address.
func (e end) broadcast(addr netip.Addr, length uint8) {
	switch {
	case !addr.IsValid():
	case addr.Is6():
		e.fault(nil, ".broadcast", "allow", "no broadcast: IPv6 has none (RFC 4291 section 2)")
	case addr.IsMulticast():
		e.fault(nil, ".broadcast", "allow", fmt.Sprintf("no broadcast: %v is a group", addr))
	case length != 0:
		e.fault(nil, ".broadcast", "allow", "one address, without a prefix length: 255.255.255.255, or the highest of a network of the link")
	}
}

// The prefixes of all groups. They exclude the groups that no router may forward.
var (
	allGroups4 = netip.MustParsePrefix("224.0.0.0/4")
	allGroups6 = netip.MustParsePrefix("ff00::/8")
)

func isAllGroups(p netip.Prefix) bool { return p == allGroups4 || p == allGroups6 }

// meets reports whether two prefixes overlap: a single address that no router may forward is in no
// prefix that is longer.
func meets(a, b netip.Prefix) bool {
	if !a.Overlaps(b) {
		return false
	}
	if a.Bits() > b.Bits() {
		a, b = b, a
	}
	return a.IsSingleIP() || !b.IsSingleIP() || linkLocalFault(b.Addr()) == ""
}

// allGroups checks an output to the prefix of all groups.
func (e end) allGroups(o Output, in Input) {
	if p := (Input{Address: o.Address, Len: o.Len}).Prefix(); o.Len == in.Len && isAllGroups(p) && in.Prefix() != p {
		e.fault(ErrLinkLocal, ".address", p.String(), fmt.Sprintf("an input of %v, too: otherwise some would go to groups that are never forwarded between links", p))
	}
}
