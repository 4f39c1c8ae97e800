// Package rules is the model of rules: a rule takes one UDP stream in and sends it out on any
// number of interfaces, rewritten. The package parses, formats, validates, orders and compares
// rules. It is pure: it makes no system calls and knows nothing about the host, so callers check
// whether an interface exists, or a unicast input is an address of this host.
//
// All types are plain data. Functions keep no references to their arguments and may be called from
// any number of goroutines.
package rules

import (
	"net/netip"
	"slices"
	"strings"
)

// MaxOutputs is the maximum number of outputs of a rule.
const MaxOutputs = 64

// MaxNameLen is the maximum length of a rule name in bytes; in the kernel's maps a name has 64
// bytes with the NUL.
const MaxNameLen = 63

// Rule is one input, or several that carry one stream, and its outputs. The index of an output in
// Out is its slot.
type Rule struct {
	Name   string // unique on the host; see Validate for its form
	In     Input
	Accept Acceptance
	Out    []Output
	Path   Path
	// Stream has the inputs after the first; nil for a rule with one input. It must not be
	// modified.
	Stream *Stream
}

// Input selects the packets of a rule: UDP datagrams to Address and Port that arrive on Interface.
// It is comparable, and so usable as a map key.
type Input struct {
	Interface string     // a name, or a pattern: "eth+" is every interface whose name begins with eth
	Address   netip.Addr // multicast group or unicast address; with Len the lowest address of the prefix
	Len       uint8      // prefix length in bits; 0: Address alone
	Port      uint16     // UDP destination port, host byte order; 0: any
	PortTo    uint16     // the last port of a range that starts at Port; 0: Port alone
	Source    netip.Addr // the only sender to take, with SourceLen the lowest address of a prefix; the zero Addr takes any
	SourceLen uint8      // length of the source prefix in bits; 0: Source alone
	VLAN      VLAN       // the tags of the frames; the zero VLAN takes untagged ones
	FromHost  bool       // packets that sockets of this host send on Interface, rather than arriving ones
}

// VLAN is the tags of a frame (IEEE 802.1Q). The zero VLAN has none.
type VLAN struct {
	ID    uint16 // of the only tag, or of the inner one; 1 to 4094
	Outer uint16 // of the service tag around it (QinQ); 0: none
}

// Acceptance restricts and extends the packets that a rule takes, and sets its memberships. There
// may be 100,000 of them: fields of one byte are together.
type Acceptance struct {
	Join JoinPolicy
	// ZeroChecksum takes IPv6 packets without a UDP checksum (RFC 6935), which are otherwise
	// dropped.
	ZeroChecksum bool
	// AllowLoop takes packets that this host sent, and allows a rule that closes a loop.
	AllowLoop bool
	// TwoWay allows a rule that closes a loop with others, as relaying both ways between networks
	// does; packets sent by this host are still dropped.
	TwoWay bool
	// Unguarded turns the loop guard off for the rule.
	Unguarded bool
	// Local leaves the packets to the host's own receivers, too.
	Local bool
	// LocalControl allows single link-local groups (LinkScope), which no router forwards, as
	// addresses of the rule.
	LocalControl bool
	// Broadcast declares Input.Address a broadcast address of the input's link, the limited one or
	// one of a network there, rather than a host's.
	Broadcast bool
	// Extra is what few rules have; nil: none of it. It must not be modified.
	Extra *Extra
}

// Extra is the part of an Acceptance that few rules have: 100,000 have room for 10 MB of it.
type Extra struct {
	// Groups are those of the input's prefix to join, with JoinList alone.
	Groups []netip.Addr
	// Except are senders to exclude, within Input.Source.
	Except []netip.Prefix
	// Rate limits the rule as a whole.
	Rate Rate
	// Health watches the numbers of the packets.
	Health Health
}

// extra is what a.Extra points to, if anything.
func (a Acceptance) extra() Extra {
	if a.Extra == nil {
		return Extra{}
	}
	return *a.Extra
}

// Groups is Extra.Groups, if there are any.
func (a Acceptance) Groups() []netip.Addr { return a.extra().Groups }

// Except is Extra.Except, if there is any.
func (a Acceptance) Except() []netip.Prefix { return a.extra().Except }

// Rate is Extra.Rate, or none.
func (a Acceptance) Rate() Rate { return a.extra().Rate }

// Health is Extra.Health, or none.
func (a Acceptance) Health() Health { return a.extra().Health }

// with returns a with an extra part, nil if that is empty.
func (a Acceptance) with(x Extra) Acceptance {
	a.Extra = nil
	if len(x.Groups) > 0 || len(x.Except) > 0 || x.Rate != (Rate{}) || x.Health != (Health{}) {
		a.Extra = &x
	}
	return a
}

// JoinPolicy selects which groups of a rule's input are joined.
type JoinPolicy uint8

// The join policies. A prefix must name one of the last three.
const (
	JoinDefault JoinPolicy = iota // a single group; nothing for a unicast input
	JoinNone                      // nothing: the network floods, or another host joins
	JoinAll                       // every group of the prefix, at most MaxJoinAll
	JoinList                      // Extra.Groups
)

// MaxJoinAll is the maximum number of groups of a prefix with JoinAll.
const MaxJoinAll = 4096

// Rate limits a flow with a token bucket. The zero Rate is no limit. Packets or Bits is set, never
// both.
type Rate struct {
	Packets uint64 // a second
	Bits    uint64 // a second, of whole frames, as in all counters
	Burst   uint64 // packets with Packets, bytes with Bits; 0: 10 ms of the rate, at least one packet
}

// Output is the destination of a copy and its rewriting.
type Output struct {
	Interface string     // a name, or a pattern as in Input
	Address   netip.Addr // multicast group or unicast address; with Len the lowest address of the prefix
	Len       uint8      // 0: Address alone; otherwise the input's prefix length: the packet's own bits follow the prefix
	PortMode  PortMode
	Port      uint16 // with PortSet: UDP destination port, host byte order
	PortShift int32  // with PortAdd: added to the packet's, -65534 to 65534 except 0
	Policy    Policy
}

// PortMode selects the UDP destination port of a copy.
type PortMode uint8

// The port modes.
const (
	PortSet  PortMode = iota // Output.Port
	PortKeep                 // the packet's own
	PortAdd                  // the packet's plus Output.PortShift; a packet whose port would leave 1 to 65535 is dropped
)

// Prefix is the prefix of the group or address, of full length without Len.
func (in Input) Prefix() netip.Prefix {
	if in.Len == 0 {
		return netip.PrefixFrom(in.Address, in.Address.BitLen())
	}
	return netip.PrefixFrom(in.Address, int(in.Len))
}

// IsPattern reports whether an interface text is a pattern, and returns the prefix of the names
// that it matches.
func IsPattern(iface string) (begin string, ok bool) { return strings.CutSuffix(iface, "+") }

// Multicast reports whether the input is a group, which is joined, rather than a unicast address.
func (in Input) Multicast() bool { return in.Address.IsMulticast() }

// Path is how the packets of a rule travel.
type Path uint8

// The paths. PathAuto takes the best path that works on the rule's interfaces.
const (
	PathAuto   Path = iota
	PathKernel      // XDP, never leaves the kernel
	PathAFXDP       // AF_XDP sockets
	PathFanout      // AF_PACKET sockets in a PACKET_FANOUT group
)

// String is the name that ParsePath parses.
func (p Path) String() string { return enumString("Path", p, "auto", "kernel", "afxdp", "fanout") }

// ParsePath is the inverse of Path.String. Its error is a *FieldError.
func ParsePath(s string) (Path, error) {
	for p := PathAuto; p <= PathFanout; p++ {
		if s == p.String() {
			return p, nil
		}
	}
	return 0, &FieldError{Field: "path", Value: s, Want: wantPath}
}

const wantPath = "auto, kernel, afxdp or fanout"

// Equal reports whether two rules are equal in all fields, including the order of the outputs,
// which determines their slots.
func Equal(a, b Rule) bool {
	return a.Name == b.Name && a.In == b.In && a.Path == b.Path && slices.Equal(a.Out, b.Out) &&
		equalAcceptance(a.Accept, b.Accept) && equalStream(a.Stream, b.Stream)
}

func equalAcceptance(a, b Acceptance) bool {
	return a.Join == b.Join && equalExtra(a, b) && a.ZeroChecksum == b.ZeroChecksum &&
		a.AllowLoop == b.AllowLoop && a.TwoWay == b.TwoWay && a.Unguarded == b.Unguarded && a.Local == b.Local && a.LocalControl == b.LocalControl && a.Broadcast == b.Broadcast
}

func equalExtra(a, b Acceptance) bool {
	if a.Extra == b.Extra {
		return true
	}
	x, y := a.extra(), b.extra()
	return slices.Equal(x.Groups, y.Groups) && slices.Equal(x.Except, y.Except) && x.Rate == y.Rate && x.Health == y.Health
}

// String formats the rule as one line.
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
