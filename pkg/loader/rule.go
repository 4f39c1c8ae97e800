package loader

import (
	"maps"
	"net/netip"
	"slices"

	"xdpcast/pkg/packet"
)

// Rule is a rule with everything resolved: interfaces are indexes, policies are
// addresses.
type Rule struct {
	Name string // 1 to 79 bytes
	In   Input
	Out  []Output // 1 to 64
	// Path is PathKernel when it is not set.
	Path Path
	// Fallback lets the kernel path serve a rule of PathAFXDP while no socket does.
	Fallback bool
	// Local leaves the packets of a rule of PathFanout to the host's own receivers, too.
	Local bool
	// Steered spreads the packets of a rule of PathFanout over the CPUs of SetSteering, by
	// flow. The input must have the relay program, in native mode: a buffer that generic XDP
	// has copied comes to the other CPU with its headers misplaced (Linux 6.18).
	Steered bool
	// AllowLoop takes packets that this host sent.
	AllowLoop bool
	// AllowNoChecksum takes IPv6 packets without a UDP checksum.
	AllowNoChecksum bool
	// Rate polices the rule as a whole.
	Rate Rate
}

// Input is what a packet is matched by. It is comparable.
type Input struct {
	Index int     // interface index
	MAC   [6]byte // the interface's own, for the loop check and for unicast inputs
	Group netip.Addr
	// Len makes Group a prefix of so many bits; 0: Group alone.
	Len int
	// Source is any when it is not valid.
	Source netip.Addr
	Port   uint16 // 0: any
	// VLAN is the VLAN of the only tag, or of the inner one; OuterVLAN of the one
	// around it. 0: no such tag.
	VLAN, OuterVLAN uint16
}

// Output is where a copy goes and what it looks like.
type Output struct {
	// Ready is false while the output cannot send; its copies are dropped and
	// counted for the reason in Blocked.
	Ready   bool
	Blocked Reason // NotReady or NoNeighbour; 0 is NotReady
	Index   int    // interface index
	MTU     int    // bytes of IP packet
	packet.Rewrite
	Rate Rate
}

// Rate bounds a flow with a token bucket. The zero Rate does not. Packets or Bits is
// set, never both.
type Rate struct {
	Packets uint64 // a second
	Bits    uint64 // a second, of whole frames
	Burst   uint64 // packets with Packets, bytes with Bits; at least 1
}

// Path is how the packets of a rule travel.
type Path uint8

// The paths.
const (
	PathKernel Path = 1 + iota
	PathAFXDP       // to the AF_XDP socket of the interface and queue
	PathFanout      // to the stack, whose packet tap gives them to a PACKET_FANOUT group
)

// Key is Input without what may change in place: rules must differ in it.
func (in Input) Key() Input {
	in.MAC = [6]byte{}
	return in
}

// Equal says whether two rules are the same in everything.
func (r Rule) Equal(o Rule) bool {
	return r.Name == o.Name && r.In == o.In && r.Path == o.Path && r.Fallback == o.Fallback && r.Local == o.Local && r.Steered == o.Steered &&
		r.AllowLoop == o.AllowLoop && r.AllowNoChecksum == o.AllowNoChecksum && r.Rate == o.Rate &&
		slices.Equal(r.Out, o.Out)
}

// Continues says whether r is the same rule as old with other addresses, so that
// its counters go on. Both are Normalized.
func (r Rule) Continues(old Rule) bool {
	if r.Name != old.Name || r.In.Key() != old.In.Key() || len(r.Out) != len(old.Out) {
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

// Used returns the indexes of all interfaces that the rules in force name.
func (l *Loader) Used() []int {
	used := map[int]bool{}
	for _, e := range l.rules {
		used[e.rule.In.Index] = true
		for _, o := range e.rule.Out {
			if o.Index != 0 {
				used[o.Index] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(used))
}

// Has says whether a rule is in force.
func (l *Loader) Has(name string) bool { return l.rules[name] != nil }

// FirstOutput returns the number by which the relay program names a rule in force to
// the sockets of PathAFXDP (struct handover of bpf/include/handover.h). It changes when
// the number of outputs does, and another rule may get it then.
func (l *Loader) FirstOutput(name string) (uint32, bool) {
	e := l.rules[name]
	if e == nil {
		return 0, false
	}
	return e.first, true
}

// Rules returns the names and resolved forms of the rules in force, unordered.
func (l *Loader) Rules() []Rule {
	all := make([]Rule, 0, len(l.rules))
	for _, e := range l.rules {
		all = append(all, e.rule)
	}
	return all
}
