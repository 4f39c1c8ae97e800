// Package flow defines resolved flows: the handling of a rule's packets on one input interface,
// with every name resolved to an index and every policy to addresses. Package plan makes them;
// packages loader and forward implement them.
//
// All types are plain data; functions keep no references to their arguments and may be called from
// any number of goroutines.
package flow

import (
	"fmt"
	"net/netip"
	"slices"

	"xdpcast/pkg/packet"
)

// Limits of a flow, as in the BPF programs (NAME_LEN and MAX_SLOTS of bpf/include/abi.h); a test of
// package loader compares them.
const (
	MaxName    = 79 // bytes
	MaxOutputs = 64
)

// Flow is a rule on one input interface with everything resolved: interfaces are indexes, policies
// are addresses. Ports and VLAN ids are in host byte order. There may be 100,000 of them: fields of
// one byte are together.
type Flow struct {
	Name string // unique; 1 to MaxName bytes
	In   Input
	Out  []Output // 1 to MaxOutputs; the index of an output is its slot
	// Path defaults to PathKernel.
	Path Path
	// Fallback lets the kernel path serve a flow of PathAFXDP while no socket does.
	Fallback bool
	// Local leaves the packets of a flow of PathFanout to the host's own receivers, too.
	Local bool
	// Steered spreads the packets of a flow of PathFanout over the CPUs of loader.SetSteering, by
	// flow. The input must run the relay program in native mode: a buffer copied by generic XDP
	// reaches the other CPU with its headers misplaced (Linux 6.18).
	Steered bool
	// AllowLoop takes packets that this host sent.
	AllowLoop bool
	// Broadcast declares In.Group a broadcast address of the link rather than this host's: frames
	// for any MAC address are taken.
	Broadcast bool
	// Unguarded turns the loop guard off.
	Unguarded bool
	// TwoWay says that a loop with this flow is intended: the loop guard also recognises returns by
	// the number of packets per sender, not only by marks.
	TwoWay bool
	// Fronted says that packets of a flow of PathFanout pass the relay program before its workers,
	// and are guarded there.
	Fronted bool
	// AllowNoChecksum takes IPv6 packets without a UDP checksum.
	AllowNoChecksum bool
	// Finish completes UDP checksums that the sender left to a device without offload. The input
	// may receive from a local stack, and runs the relay program in native mode, or the path is
	// PathAFXDP.
	Finish bool
	// Routed says that the flow mirrors a multicast route of the kernel: packets that the relay
	// would not forward exactly like the kernel pass to it, as does every packet with a TTL of at
	// most Routed, the greatest threshold of an output. 0: not routed. The path is PathKernel, and
	// every output is Ready.
	Routed uint8
	// Except are senders that a flow with In.BySource excludes, sorted.
	Except []netip.Prefix
	// Rate limits the flow as a whole.
	Rate Rate
	// Leg is set for one of several inputs of a stream, or for an input that is monitored; it is never
	// changed.
	Leg *Leg
}

// Leg identifies a flow's stream and input. It is comparable.
type Leg struct {
	// Of is the name of the stream. The flow's is Of, LegSeparator and Number, and the same with
	// packet.StreamSingle.
	Of       string
	Number   int // 0 to packet.MaxLegs-1, by preference
	Settings packet.Stream
}

// Several says whether a flow with the leg, nil for none, is one of several inputs.
func (l *Leg) Several() bool { return l != nil && l.Settings.Kind != packet.StreamSingle }

func (l *Leg) equal(o *Leg) bool { return l == o || l != nil && o != nil && *l == *o }

// LegSeparator separates the stream and the number in a leg's name; it cannot occur in a rule's
// name.
const LegSeparator = "%"

// Input is the match of a flow. It is comparable.
type Input struct {
	Index int     // interface index
	MAC   [6]byte // the interface's own, for the loop check and for unicast inputs
	// BySource makes Source a prefix of SourceLen bits; an invalid Source takes any sender except
	// Flow.Except.
	BySource bool
	// FromHost takes packets that sockets of this host send on the interface, rather than arriving
	// ones; only with PathFanout.
	FromHost bool
	Group    netip.Addr
	// An invalid Source means any.
	Source netip.Addr
	// Len makes Group a prefix of this many bits; 0: Group alone.
	Len       int
	SourceLen int    // see BySource
	Port      uint16 // 0: any
	PortTo    uint16 // the last port of a range that starts at Port; 0: Port alone
	// VLAN is the VLAN of the only tag, or of the inner one; OuterVLAN that of the tag around it.
	// 0: no such tag.
	VLAN, OuterVLAN uint16
}

// Output is the destination of a copy and its rewriting.
type Output struct {
	// Ready is false while the output cannot send; its copies are dropped and counted with the
	// reason in Blocked.
	Ready   bool
	Blocked Blocked
	// OneBuffer: the device does not send frames in several buffers (loader.Features). The kernel
	// path of a flow with one output drops them with the reason loader.MultiBuffer.
	OneBuffer bool
	MTU       int32 // of the IP packet, in bytes
	Index     int   // interface index
	packet.Rewrite
	Rate Rate
}

// Blocked is why an output cannot send.
type Blocked uint8

// The reasons of a blocked output. The zero value is the usual one.
const (
	NotReady    Blocked = iota // its interface or source address is missing
	NoNeighbour                // its next hop has no link-layer address
	NoCarrier                  // its interface is up and has no carrier
	blockedKinds
)

// String is the drop reason of the copies.
func (b Blocked) String() string {
	switch b {
	case NotReady:
		return "not_ready"
	case NoNeighbour:
		return "no_neighbour"
	case NoCarrier:
		return "no_carrier"
	}
	return fmt.Sprintf("Blocked(%d)", uint8(b))
}

// Rate limits a flow with a token bucket. The zero Rate is no limit. Packets or Bits is set, never
// both.
type Rate struct {
	Packets uint64 // a second
	Bits    uint64 // a second, of whole frames
	Burst   uint64 // packets with Packets, bytes with Bits; at least 1
}

// Path is how the packets of a flow travel.
type Path uint8

// The paths.
const (
	PathKernel Path = 1 + iota // only XDP programs
	PathAFXDP                  // to the AF_XDP socket of the interface and queue
	PathFanout                 // to the stack, whose packet tap delivers them to a PACKET_FANOUT group
)

// Unicast says whether only frames to the input's MAC address are taken.
func (r Flow) Unicast() bool { return !r.In.Group.IsMulticast() && !r.Broadcast }

// Key is the part of Input that cannot change while the flow is published: flows must differ in it.
func (in Input) Key() Input {
	in.MAC = [6]byte{}
	return in
}

// Equal says whether two flows are equal in all fields.
func (r Flow) Equal(o Flow) bool {
	return r.Name == o.Name && r.In == o.In && r.Path == o.Path && r.Fallback == o.Fallback && r.Local == o.Local && r.Steered == o.Steered &&
		r.AllowLoop == o.AllowLoop && r.Unguarded == o.Unguarded && r.TwoWay == o.TwoWay && r.Fronted == o.Fronted && r.Broadcast == o.Broadcast && r.AllowNoChecksum == o.AllowNoChecksum && r.Finish == o.Finish && r.Rate == o.Rate && r.Routed == o.Routed && r.Leg.equal(o.Leg) &&
		slices.Equal(r.Except, o.Except) && slices.Equal(r.Out, o.Out)
}

// Continues says whether r is the same flow as old with other addresses or other excluded senders,
// so that its counters continue. Both must be Normalized.
func (r Flow) Continues(old Flow) bool {
	a, b := r.In.Key(), old.In.Key()
	a.BySource = b.BySource // set by the first excluded sender
	if r.Name != old.Name || a != b || len(r.Out) != len(old.Out) {
		return false
	}
	for i := range r.Out {
		a, b := &r.Out[i], &old.Out[i]
		if a.Dst != b.Dst || a.DstLen != b.DstLen || a.DstPort != b.DstPort || a.PortAdd != b.PortAdd || a.PortShift != b.PortShift {
			return false
		}
	}
	return true
}
