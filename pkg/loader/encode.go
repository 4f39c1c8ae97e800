package loader

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"

	"xdpcast/bpf"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

var paths = map[flow.Path]bpf.RelayRulePath{
	flow.PathKernel: bpf.RelayRulePathPATH_KERNEL,
	flow.PathAFXDP:  bpf.RelayRulePathPATH_AFXDP,
	flow.PathFanout: bpf.RelayRulePathPATH_FANOUT,
}

func encodeFlow(e *entry) bpf.RelayFlow {
	value := bpf.RelayFlow{
		Rule:        e.id,
		FirstOutput: e.first,
		Device:      e.row,
		Outputs:     uint8(len(e.rule.Out)),
		MinMtu:      flow.MaxMTU,
		Path:        uint8(paths[e.rule.Path]),
		Flags:       encodeFlags(e.rule),
		InputMac:    e.rule.In.MAC,
		Sockets:     e.sockets,
		Stream:      uint16(e.stream),
		Routed:      e.rule.Routed,
	}
	if e.rule.Leg != nil {
		value.Leg = uint8(e.rule.Leg.Number)
	}
	for _, o := range e.rule.Out {
		if !o.Ready {
			value.MinMtu = 0
			continue
		}
		room := o.MTU
		if o.VLAN == packet.VLANSet && o.OuterVLAN != 0 {
			room = max(0, room-vlanTag) // the kernel has room for one tag
		}
		value.MinMtu = min(value.MinMtu, uint16(room))
	}
	return value
}

// vlanTag is the length of a tag in bytes.
const vlanTag = 4

func encodeFlags(r *flow.Flow) (flags uint16) {
	set := func(flag bpf.RelayFlowFlag, on bool) {
		if on {
			flags |= uint16(flag)
		}
	}
	set(bpf.RelayFlowFlagFLOW_UNICAST, r.Unicast())
	set(bpf.RelayFlowFlagFLOW_ALLOW_LOOP, r.AllowLoop)
	set(bpf.RelayFlowFlagFLOW_UNGUARDED, r.Unguarded)
	set(bpf.RelayFlowFlagFLOW_NO_CHECKSUM, r.AllowNoChecksum)
	set(bpf.RelayFlowFlagFLOW_POLICED, r.Rate != flow.Rate{})
	set(bpf.RelayFlowFlagFLOW_FALLBACK, r.Fallback)
	set(bpf.RelayFlowFlagFLOW_LOCAL, r.Local)
	set(bpf.RelayFlowFlagFLOW_STEERED, r.Steered)
	set(bpf.RelayFlowFlagFLOW_TWO_WAY, r.TwoWay)
	set(bpf.RelayFlowFlagFLOW_FINISH, r.Finish)
	set(bpf.RelayFlowFlagFLOW_LONG_WAY, r.Leg != nil && !isPlain(&r.Leg.Settings))
	return flags
}

// decodeFlow sets the fields of a rule that its flow entry holds.
func decodeFlow(r *flow.Flow, flow *bpf.RelayFlow) error {
	for path, value := range paths {
		if flow.Path == uint8(value) {
			r.Path = path
		}
	}
	if r.Path == 0 {
		return fmt.Errorf("path %d is none of this release", flow.Path)
	}
	has := func(flag bpf.RelayFlowFlag) bool { return flow.Flags&uint16(flag) != 0 }
	r.Routed = flow.Routed
	r.AllowLoop = has(bpf.RelayFlowFlagFLOW_ALLOW_LOOP)
	r.Broadcast = !r.In.Group.IsMulticast() && !has(bpf.RelayFlowFlagFLOW_UNICAST)
	r.Unguarded = has(bpf.RelayFlowFlagFLOW_UNGUARDED)
	r.AllowNoChecksum = has(bpf.RelayFlowFlagFLOW_NO_CHECKSUM)
	r.Fallback = has(bpf.RelayFlowFlagFLOW_FALLBACK)
	r.Steered = has(bpf.RelayFlowFlagFLOW_STEERED)
	r.Local = has(bpf.RelayFlowFlagFLOW_LOCAL)
	r.TwoWay = has(bpf.RelayFlowFlagFLOW_TWO_WAY)
	r.Finish = has(bpf.RelayFlowFlagFLOW_FINISH)
	return nil
}

func encodeRule(e *entry) bpf.RelayRule {
	r := bpf.RelayRule{
		FirstOutput: e.first,
		FirstStats:  e.firstStats,
		Outputs:     uint16(len(e.rule.Out)),
		Path:        uint8(paths[e.rule.Path]),
	}
	for i := range len(e.rule.Name) {
		r.Name[i] = int8(e.rule.Name[i])
	}
	return r
}

func decodeName(name [bpf.NameLen]int8) (string, error) {
	var b []byte
	for _, c := range name {
		if c == 0 {
			break
		}
		b = append(b, byte(c))
	}
	if len(b) == 0 || len(b) == bpf.NameLen {
		return "", errors.New("rule has no name")
	}
	return string(b), nil
}

func encodeOutput(o flow.Output, stats, policer uint32) bpf.RelayOutput {
	b := bpf.RelayOutput{
		DstMac: o.DstMAC, SrcMac: o.SrcMAC,
		Dst:     encodeAddr(o.Dst),
		DstPort: o.DstPort, SrcPort: o.SrcPort,
		Ifindex: uint32(o.Index),
		Stats:   stats,
		Mtu:     uint16(o.MTU),
		TtlMode: uint8(o.TTLMode), Ttl: o.TTL,
		Dscp:      o.DSCP,
		Family:    4,
		PortShift: o.PortShift,
		Vlan:      o.VLANID, OuterVlan: o.OuterVLAN, VlanMode: uint8(o.VLAN),
		Pcp:     o.PCP,
		MinTtl:  o.MinTTL,
		DstLen:  o.DstLen,
		Blocked: uint8(ReasonOf(o.Blocked)),
		Policer: policer,
	}
	if o.Dst.Is6() {
		b.Family = 6
	}
	if o.Src.IsValid() {
		b.Src = encodeAddr(o.Src)
	}
	set := func(flag bpf.RelayOutputFlag, on bool) {
		if on {
			b.Flags |= uint16(flag)
		}
	}
	set(bpf.RelayOutputFlagOUTPUT_READY, o.Ready)
	set(bpf.RelayOutputFlagOUTPUT_SOURCE_SET, o.Src.IsValid())
	set(bpf.RelayOutputFlagOUTPUT_DSCP_SET, o.SetDSCP)
	set(bpf.RelayOutputFlagOUTPUT_CHECKSUM_ZERO, o.ZeroChecksum)
	set(bpf.RelayOutputFlagOUTPUT_PORT_ADD, o.PortAdd)
	set(bpf.RelayOutputFlagOUTPUT_PCP_SET, o.SetPCP)
	set(bpf.RelayOutputFlagOUTPUT_POLICED, o.Rate != flow.Rate{})
	set(bpf.RelayOutputFlagOUTPUT_ONE_BUFFER, o.OneBuffer)
	set(bpf.RelayOutputFlagOUTPUT_RARE, o.OneBuffer || o.PortAdd || o.SetPCP || o.Rate != flow.Rate{} ||
		o.VLAN != packet.VLANKeep || o.MinTTL != 0 || o.DstLen != 0)
	return b
}

// decodeOutput is the inverse of encodeOutput, except for the rate, which the policer holds.
func decodeOutput(b *bpf.RelayOutput) (flow.Output, error) {
	if b.Family != 4 && b.Family != 6 {
		return flow.Output{}, fmt.Errorf("output has family %d: want 4 or 6", b.Family)
	}
	has := func(flag bpf.RelayOutputFlag) bool { return b.Flags&uint16(flag) != 0 }
	o := flow.Output{
		Ready:   has(bpf.RelayOutputFlagOUTPUT_READY),
		Blocked: blockedOf(Reason(b.Blocked)),
		Index:   int(b.Ifindex),
		MTU:     int32(b.Mtu),

		OneBuffer: has(bpf.RelayOutputFlagOUTPUT_ONE_BUFFER),
		Rewrite: packet.Rewrite{
			DstMAC: b.DstMac, SrcMAC: b.SrcMac,
			Dst:     decodeAddr(b.Dst, b.Family),
			DstPort: b.DstPort, SrcPort: b.SrcPort,
			TTLMode: packet.TTLMode(b.TtlMode), TTL: b.Ttl,
			SetDSCP:      has(bpf.RelayOutputFlagOUTPUT_DSCP_SET),
			DSCP:         b.Dscp,
			ZeroChecksum: has(bpf.RelayOutputFlagOUTPUT_CHECKSUM_ZERO),
			DstLen:       b.DstLen,
			PortAdd:      has(bpf.RelayOutputFlagOUTPUT_PORT_ADD),
			PortShift:    b.PortShift,
			MinTTL:       b.MinTtl,
			VLAN:         packet.VLANMode(b.VlanMode),
			VLANID:       b.Vlan, OuterVLAN: b.OuterVlan,
			SetPCP: has(bpf.RelayOutputFlagOUTPUT_PCP_SET),
			PCP:    b.Pcp,
		},
	}
	if has(bpf.RelayOutputFlagOUTPUT_SOURCE_SET) {
		o.Src = decodeAddr(b.Src, b.Family)
	}
	return o, nil
}

// encodeAddr stores an IPv4 address in the first four bytes.
func encodeAddr(a netip.Addr) (b [16]byte) {
	copy(b[:], a.AsSlice())
	return b
}

func decodeAddr(b [16]byte, family uint8) netip.Addr {
	if family == 4 {
		return netip.AddrFrom4([4]byte(b[:4]))
	}
	return netip.AddrFrom16(b)
}

// encodeCopies lists the ready outputs sorted by interface, followed by those that are not ready.
func encodeCopies(out []flow.Output) []bpf.RelayCopy {
	copies := make([]bpf.RelayCopy, len(out))
	for slot, o := range out {
		copies[slot] = bpf.RelayCopy{Ifindex: math.MaxUint32, Slot: uint16(slot)}
		if o.Ready {
			copies[slot].Ifindex = uint32(o.Index)
		}
	}
	slices.SortStableFunc(copies, func(a, b bpf.RelayCopy) int { return cmp.Compare(a.Ifindex, b.Ifindex) })
	for i, first := 0, 0; i < len(copies); i++ {
		if copies[i].Ifindex != copies[first].Ifindex {
			first = i
		}
		copies[first].Same++
	}
	return copies
}
