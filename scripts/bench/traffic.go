package main

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"xdpcast/internal/live"
	"xdpcast/pkg/packet"
)

// setup is what a subject is measured with.
type setup struct {
	Outputs int `json:"outputs"`
	// Frame is the length of an Ethernet frame in bytes, without the frame check sequence, which a
	// veth lacks.
	Frame int `json:"frame_bytes"`
	// Mixed: frames have turns of several lengths, of which Frame is the longest.
	Mixed bool `json:"mixed,omitempty"`
	Rules int  `json:"rules"`
	Flows int  `json:"flows"`
	// Queues is the number of receive queues of the relay's input, each fed by a CPU.
	Queues int `json:"queues"`
}

func (s setup) String() string {
	return fmt.Sprintf("%d outputs, %s bytes, %d rules, %d flows, %d queues", s.Outputs, s.bytes(), s.Rules, s.Flows, s.Queues)
}

// bytes is the length of the frames.
func (s setup) bytes() string {
	if s.Mixed {
		return "60 to " + fmt.Sprint(s.Frame)
	}
	return fmt.Sprint(s.Frame)
}

// Limits of internal/live/bpf/tag.h and of the address ranges below.
const (
	maxOutputs = 64
	maxFlows   = 4096
	maxRules   = 1 << 17
	leastFrame = live.MinFrame
	mostFrame  = 9000
	mixedFrame = live.MixedFrame
)

// Addresses of the traffic. Rule n listens to the group firstGroup + n and sends to firstOut +
// slot.
const (
	groupPort = 5000
	outPort   = 6000
	flowPort  = 10000
)

var (
	sourceAddr = netip.AddrFrom4([4]byte{10, 0, 0, 1})
	firstGroup = netip.AddrFrom4([4]byte{239, 16, 0, 0})
	firstOut   = netip.AddrFrom4([4]byte{239, 200, 0, 0})
)

// plus returns the IPv4 address n after a.
func plus(a netip.Addr, n int) netip.Addr {
	b := a.As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+uint32(n))
	return netip.AddrFrom4(b)
}

func number(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

// groupStep is the distance between the groups of consecutive flows: the flows are spread over all
// rules, or share the only one.
func (s setup) groupStep() int {
	if s.Rules < s.Flows {
		return 0
	}
	return s.Rules / s.Flows
}

// check returns what is wrong with a setup.
func (s setup) check() error {
	switch {
	case s.Outputs < 1 || s.Outputs > maxOutputs:
		return fmt.Errorf("outputs %d: want 1 to %d", s.Outputs, maxOutputs)
	case s.Frame < leastFrame || s.Frame > mostFrame:
		return fmt.Errorf("frame of %d bytes: want %d to %d", s.Frame, leastFrame, mostFrame)
	case s.Mixed && s.Frame != mixedFrame:
		return fmt.Errorf("mixed frames of at most %d bytes: want %d", s.Frame, mixedFrame)
	case s.Rules < 1 || s.Rules > maxRules:
		return fmt.Errorf("rules %d: want 1 to %d", s.Rules, maxRules)
	case s.Flows < 1 || s.Flows > maxFlows:
		return fmt.Errorf("flows %d: want 1 to %d", s.Flows, maxFlows)
	case s.Rules > 1 && s.Rules < s.Flows:
		return fmt.Errorf("%d flows over %d rules: want one rule, or at least as many as flows", s.Flows, s.Rules)
	case s.Queues < 1 || s.Queues > s.Flows:
		return fmt.Errorf("queues %d: want 1 to as many as flows (%d)", s.Queues, s.Flows)
	}
	return nil
}

// template is a frame of flow 0 and group 0 with an empty tag.
func (s setup) template() []byte {
	return packet.Frame{
		DstMAC: packet.MulticastMAC(firstGroup), SrcMAC: [6]byte{2, 0, 0, 0, 0, 1},
		Src: sourceAddr, Dst: firstGroup, DstPort: groupPort, TTL: 16, Payload: make([]byte, s.Frame-42),
	}.Build()
}
