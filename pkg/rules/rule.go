// Package rules is the model of what is relayed: a rule takes one UDP stream in
// and sends it out on any number of interfaces, rewritten. The package parses,
// formats, validates, orders and compares rules. It is pure: it makes no system
// call and knows nothing of the host, so whether an interface exists, or a
// unicast input is an address of this host, is for its callers to find out.
//
// All types are plain data. Functions keep no reference to what they are given
// and may be called from any number of goroutines.
package rules

import (
	"net/netip"
	"slices"
	"strings"
)

// MaxOutputs is the most outputs that a rule can have.
const MaxOutputs = 64

// MaxNameLen is the longest rule name in bytes; in the kernel's maps a name has
// 64 bytes with the NUL.
const MaxNameLen = 63

// Rule is one input, or several that carry one stream, and its outputs. The index of an output in
// Out is its slot.
type Rule struct {
	Name   string // unique on the host; see Validate for its form
	In     Input
	Accept Acceptance
	Out    []Output
	Path   Path
	// Stream has the inputs behind the first; nil for a rule with one. It is not changed once the
	// rule is made.
	Stream *Stream
}

// Input says which packets a rule takes: UDP datagrams to Address and Port that
// arrive on Interface. It is comparable and so serves as a map key.
type Input struct {
	Interface string     // a name, or a pattern: "eth+" is every interface whose name begins with eth
	Address   netip.Addr // multicast group or unicast address; with Len the lowest one of the prefix
	Len       uint8      // length of the prefix in bits; 0: Address alone
	Port      uint16     // UDP destination port, host byte order; 0: any
	PortTo    uint16     // the last port of a range that Port begins; 0: Port alone
	Source    netip.Addr // the one sender to take, with SourceLen the lowest one of a prefix; the zero Addr takes any
	SourceLen uint8      // length of the prefix of senders in bits; 0: Source alone
	VLAN      VLAN       // the tags that the frames carry; the zero VLAN takes untagged ones
	FromHost  bool       // packets that sockets of this host send by Interface, rather than those that arrive
}

// VLAN is the tags of a frame (IEEE 802.1Q). The zero VLAN has none.
type VLAN struct {
	ID    uint16 // of the only tag, or of the inner one; 1 to 4094
	Outer uint16 // of the service tag around it (QinQ); 0: there is none
}

// Acceptance says what a rule takes of what its input matches, and which
// memberships bring it.
type Acceptance struct {
	Join   JoinPolicy
	Groups []netip.Addr // with JoinList alone: groups of the input's prefix
	// ZeroChecksum takes IPv6 packets without a UDP checksum (RFC 6935), which
	// are dropped else.
	ZeroChecksum bool
	// Except are senders that are not taken, though Input.Source holds them.
	Except []netip.Prefix
	// AllowLoop takes packets that this host sent, and lets a rule stand that
	// closes a circle.
	AllowLoop bool
	// TwoWay lets a rule stand that closes a circle with others, as relaying both ways
	// between networks does; what this host sent is dropped as ever.
	TwoWay bool
	// Unguarded keeps the loop guard away from the rule.
	Unguarded bool
	// Local leaves the packets to the host's own receivers, too.
	Local bool
	// LocalControl lets addresses of the rule be single groups of one link (LinkScope),
	// which no router forwards.
	LocalControl bool
	// Broadcast says that Input.Address is a broadcast address of the input's link, the
	// limited one or one of a network there, and not of a host.
	Broadcast bool
	// Rate polices the rule as a whole.
	Rate Rate
}

// JoinPolicy says which groups of a rule's input are joined.
type JoinPolicy uint8

// The join policies. A prefix must name one of the last three.
const (
	JoinDefault JoinPolicy = iota // the input's one group; nothing for a unicast input
	JoinNone                      // nothing: the network floods, or another host joins
	JoinAll                       // every group of the prefix, of at most MaxJoinAll
	JoinList                      // Acceptance.Groups
)

// MaxJoinAll is the most groups that a prefix may have to be joined as a whole.
const MaxJoinAll = 4096

// Rate bounds a flow with a token bucket. The zero Rate does not. Packets or
// Bits is set, never both.
type Rate struct {
	Packets uint64 // a second
	Bits    uint64 // a second, of whole frames as counted elsewhere
	Burst   uint64 // packets with Packets, bytes with Bits; 0: what comes in 10 ms, at least one packet
}

// Output says where a copy goes and how it is rewritten.
type Output struct {
	Interface string     // a name, or a pattern as in Input
	Address   netip.Addr // multicast group or unicast address; with Len the lowest one of the prefix
	Len       uint8      // 0: Address alone; else as long as the input's: the packet's own bits follow it
	PortMode  PortMode
	Port      uint16 // with PortSet: UDP destination port, host byte order
	PortShift int32  // with PortAdd: what is added to the packet's, -65534 to 65534 without 0
	Policy    Policy
}

// PortMode says which UDP destination port a copy carries.
type PortMode uint8

// The modes of the destination port.
const (
	PortSet  PortMode = iota // Output.Port
	PortKeep                 // the packet's own
	PortAdd                  // the packet's own and Output.PortShift; a packet whose port would leave 1 to 65535 is dropped
)

// Prefix is the prefix of a group or address, of its full length without Len.
func (in Input) Prefix() netip.Prefix {
	if in.Len == 0 {
		return netip.PrefixFrom(in.Address, in.Address.BitLen())
	}
	return netip.PrefixFrom(in.Address, int(in.Len))
}

// IsPattern reports whether an interface text is a pattern, and the beginning of the
// names that it takes.
func IsPattern(iface string) (begin string, ok bool) { return strings.CutSuffix(iface, "+") }

// Multicast reports whether the input is a group, to be joined, rather than a
// unicast address.
func (in Input) Multicast() bool { return in.Address.IsMulticast() }

// Path is how the packets of a rule travel.
type Path uint8

// The paths. PathAuto takes the best that works on the rule's interfaces.
const (
	PathAuto   Path = iota
	PathKernel      // XDP, never leaves the kernel
	PathAFXDP       // AF_XDP sockets
	PathFanout      // AF_PACKET sockets in a PACKET_FANOUT group
)

// String is the word that ParsePath takes.
func (p Path) String() string { return enumString("Path", p, "auto", "kernel", "afxdp", "fanout") }

// ParsePath is the reverse of Path.String. Its error is a *FieldError.
func ParsePath(s string) (Path, error) {
	for p := PathAuto; p <= PathFanout; p++ {
		if s == p.String() {
			return p, nil
		}
	}
	return 0, &FieldError{Field: "path", Value: s, Want: wantPath}
}

const wantPath = "auto, kernel, afxdp or fanout"

// Equal reports whether two rules are the same in everything. The order of the
// outputs counts: it is their slots.
func Equal(a, b Rule) bool {
	return a.Name == b.Name && a.In == b.In && a.Path == b.Path && slices.Equal(a.Out, b.Out) &&
		equalAcceptance(a.Accept, b.Accept) && equalStream(a.Stream, b.Stream)
}

func equalAcceptance(a, b Acceptance) bool {
	return a.Join == b.Join && slices.Equal(a.Groups, b.Groups) && slices.Equal(a.Except, b.Except) && a.ZeroChecksum == b.ZeroChecksum &&
		a.AllowLoop == b.AllowLoop && a.TwoWay == b.TwoWay && a.Unguarded == b.Unguarded && a.Local == b.Local && a.LocalControl == b.LocalControl && a.Broadcast == b.Broadcast &&
		a.Rate == b.Rate
}

// String is the rule on one line, for people.
func (r Rule) String() string {
	var b strings.Builder
	b.WriteString(r.Name + " " + r.FormatInputs() + " ->")
	for _, o := range r.Out {
		b.WriteString(" " + o.String())
	}
	if r.Path != PathAuto {
		b.WriteString(" path=" + r.Path.String())
	}
	merge, failover := r.FormatStream()
	if merge != "" {
		b.WriteString(" merge=" + merge)
	}
	if failover != "" {
		b.WriteString(" failover=" + failover)
	}
	return b.String()
}
