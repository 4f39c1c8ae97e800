// Package flow holds resolved flows: what is to become of the packets of a rule on one
// input interface, with every name turned into an index and every policy into addresses.
// It is what package plan makes, and what packages loader and forward bring into force.
//
// All types are plain data; functions keep no reference to what they are given and may be
// called from any number of goroutines.
package flow

import (
	"fmt"
	"net/netip"
	"slices"

	"xdpcast/pkg/packet"
)

// Limits of a flow. They are those of the BPF programs (NAME_LEN and MAX_SLOTS of
// bpf/include/abi.h); a test of package loader compares them.
const (
	MaxName    = 79 // bytes
	MaxOutputs = 64
)

// Flow is a rule on one input interface with everything resolved: interfaces are
// indexes, policies are addresses.
type Flow struct {
	Name string // unique; 1 to MaxName bytes
	In   Input
	Out  []Output // 1 to MaxOutputs; the index of an output is its slot
	// Path is PathKernel when it is not set.
	Path Path
	// Fallback lets the kernel path serve a flow of PathAFXDP while no socket does.
	Fallback bool
	// Local leaves the packets of a flow of PathFanout to the host's own receivers, too.
	Local bool
	// Steered spreads the packets of a flow of PathFanout over the CPUs of loader.SetSteering, by
	// flow. The input must have the relay program, in native mode: a buffer that generic XDP
	// has copied comes to the other CPU with its headers misplaced (Linux 6.18).
	Steered bool
	// AllowLoop takes packets that this host sent.
	AllowLoop bool
	// Broadcast says that In.Group is a broadcast address of the link, and not this host's:
	// frames for any MAC address are taken.
	Broadcast bool
	// Unguarded keeps the loop guard away from its packets.
	Unguarded bool
	// TwoWay says that a circle with this flow is meant: the loop guard tells returns by the
	// numbers of senders, too, and not by marks alone.
	TwoWay bool
	// Fronted says that the relay program sees the packets of a flow of PathFanout before its
	// workers do, and guards them.
	Fronted bool
	// AllowNoChecksum takes IPv6 packets without a UDP checksum.
	AllowNoChecksum bool
	// Except are senders that a flow with In.BySource does not take, sorted.
	Except []netip.Prefix
	// Finish completes UDP checksums that their sender left to a device that was none. The
	// input is one that a local stack may send over, and runs the relay program in native
	// mode, or the path is PathAFXDP.
	Finish bool
	// Rate polices the flow as a whole.
	Rate Rate
	// Routed says that the flow mirrors a multicast route of the kernel: what the relay would not
	// forward exactly as the kernel does passes to it, and so does every packet whose TTL is at
	// most Routed, the greatest threshold of an output. 0: not routed. The path is
	// PathKernel, and every output is Ready.
	Routed uint8
	// Leg is set for a flow that is one of several inputs of a stream.
	Leg Leg
}

// Leg says of which stream a flow is an input. It is comparable.
type Leg struct {
	Of       string // name of the stream; empty for a flow that is none. The flow's is Of, LegSeparator and Number
	Number   int    // 0 to packet.MaxLegs-1, by preference
	Settings packet.Stream
}

// LegSeparator is what a leg's name has between that of the stream and its number; it cannot be in
// the name of a rule.
const LegSeparator = "%"

// Input is what a packet is matched by. It is comparable.
type Input struct {
	Index int     // interface index
	MAC   [6]byte // the interface's own, for the loop check and for unicast inputs
	// BySource makes Source a prefix of SourceLen bits; without Source any sender is
	// taken but those of Flow.Except.
	BySource bool
	// FromHost takes packets that sockets of this host send by the interface, rather than
	// those that arrive; with PathFanout alone.
	FromHost bool
	Group    netip.Addr
	// Source is any when it is not valid.
	Source netip.Addr
	// Len makes Group a prefix of so many bits; 0: Group alone.
	Len       int
	SourceLen int    // see BySource
	Port      uint16 // 0: any
	PortTo    uint16 // the last port of a range that Port begins; 0: Port alone
	// VLAN is the VLAN of the only tag, or of the inner one; OuterVLAN of the one
	// around it. 0: no such tag.
	VLAN, OuterVLAN uint16
}

// Output is where a copy goes and what it looks like.
type Output struct {
	// Ready is false while the output cannot send; its copies are dropped and
	// counted for the reason in Blocked.
	Ready   bool
	Blocked Blocked
	// OneBuffer: the device does not send frames of several buffers (loader.Features).
	// The kernel path of a flow with one output drops them for the reason
	// loader.MultiBuffer.
	OneBuffer bool
	MTU       int32 // bytes of IP packet
	Index     int   // interface index
	packet.Rewrite
	Rate Rate
}

// Blocked says why an output cannot send.
type Blocked uint8

// Why an output is blocked. The zero value is the usual one.
const (
	NotReady    Blocked = iota // its interface or source address is missing
	NoNeighbour                // its next hop has no link-layer address
	NoCarrier                  // its interface is up and carries nothing
	blockedKinds
)

// String is the drop reason that the copies are counted for.
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

// Rate bounds a flow with a token bucket. The zero Rate does not. Packets or Bits is
// set, never both.
type Rate struct {
	Packets uint64 // a second
	Bits    uint64 // a second, of whole frames
	Burst   uint64 // packets with Packets, bytes with Bits; at least 1
}

// Path is how the packets of a flow travel.
type Path uint8

// The paths.
const (
	PathKernel Path = 1 + iota // XDP programs alone
	PathAFXDP                  // to the AF_XDP socket of the interface and queue
	PathFanout                 // to the stack, whose packet tap gives them to a PACKET_FANOUT group
)

// Unicast says whether only frames to the input's MAC address are taken.
func (r Flow) Unicast() bool { return !r.In.Group.IsMulticast() && !r.Broadcast }

// Key is Input without what may change while it is in force: flows must differ in it.
func (in Input) Key() Input {
	in.MAC = [6]byte{}
	return in
}

// Equal says whether two flows are the same in everything.
func (r Flow) Equal(o Flow) bool {
	return r.Name == o.Name && r.In == o.In && r.Path == o.Path && r.Fallback == o.Fallback && r.Local == o.Local && r.Steered == o.Steered &&
		r.AllowLoop == o.AllowLoop && r.Unguarded == o.Unguarded && r.TwoWay == o.TwoWay && r.Fronted == o.Fronted && r.Broadcast == o.Broadcast && r.AllowNoChecksum == o.AllowNoChecksum && r.Finish == o.Finish && r.Rate == o.Rate && r.Routed == o.Routed && r.Leg == o.Leg &&
		slices.Equal(r.Except, o.Except) && slices.Equal(r.Out, o.Out)
}

// Continues says whether r is the same flow as old with other addresses or other senders left
// out, so that its counters go on. Both are Normalized.
func (r Flow) Continues(old Flow) bool {
	a, b := r.In.Key(), old.In.Key()
	a.BySource = b.BySource // the first sender that is left out sets it
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
