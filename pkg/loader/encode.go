package loader

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"

	"xdpcast/bpf"
	"xdpcast/pkg/packet"
)

const maxMTU = 0xffff

// flowEntry is one entry of a flow table. Its key is a *bpf.RelayFlow4 or
// *bpf.RelayFlow6.
type flowEntry struct {
	key   any
	value bpf.RelayFlow
}

// normalize clips what the ABI has less room for, so that what is read back is
// what was written, and leaves no IPv6 packet without a UDP checksum, which
// receivers would drop (RFC 8200 section 8.1).
func normalize(r Rule) Rule {
	out := make([]Output, len(r.Out))
	for i, o := range r.Out {
		o.MTU = min(o.MTU, maxMTU)
		o.ZeroChecksum = o.ZeroChecksum && o.Dst.Is4()
		out[i] = o
	}
	r.Out = out
	return r
}

// check refuses what cannot be encoded. Callers validate rules for people; this
// guards the kernel's state.
func check(r Rule) error {
	switch {
	case r.Name == "" || len(r.Name) >= bpf.NameLen:
		return fmt.Errorf("name %q: want 1 to %d bytes", r.Name, bpf.NameLen-1)
	case bytes.IndexByte([]byte(r.Name), 0) >= 0:
		return fmt.Errorf("name %q: holds a NUL byte", r.Name)
	case len(r.Out) == 0 || len(r.Out) > bpf.MaxSlots:
		return fmt.Errorf("%d outputs: want 1 to %d", len(r.Out), bpf.MaxSlots)
	case r.In.Index <= 0:
		return fmt.Errorf("input interface index %d: want a positive number", r.In.Index)
	case !r.In.Group.IsValid() || r.In.Group.Is4In6() || r.In.Group.Zone() != "":
		return fmt.Errorf("input address %v: want IPv4 or IPv6 without a zone", r.In.Group)
	case r.In.Source.IsValid() && (r.In.Source.BitLen() != r.In.Group.BitLen() || r.In.Source.IsUnspecified()):
		return fmt.Errorf("input source %v: want an address of the family of %v", r.In.Source, r.In.Group)
	}
	for slot, o := range r.Out {
		switch {
		case o.Dst.BitLen() != r.In.Group.BitLen():
			return fmt.Errorf("output %d: address %v is of another family than %v", slot, o.Dst, r.In.Group)
		case o.Src.IsValid() && o.Src.BitLen() != o.Dst.BitLen():
			return fmt.Errorf("output %d: source %v is of another family than %v", slot, o.Src, o.Dst)
		case o.Ready && o.Index <= 0:
			return fmt.Errorf("output %d: interface index %d: want a positive number", slot, o.Index)
		case o.MTU < 0:
			return fmt.Errorf("output %d: mtu %d: want a positive number", slot, o.MTU)
		}
	}
	return nil
}

func encodeKey(in Input) any {
	if in.Group.Is4() {
		key := &bpf.RelayFlow4{Ifindex: uint32(in.Index), Port: in.Port, Group: in.Group.As4()}
		if in.Source.IsValid() {
			key.Source = in.Source.As4()
		}
		return key
	}
	key := &bpf.RelayFlow6{Ifindex: uint32(in.Index), Port: in.Port, Group: in.Group.As16()}
	if in.Source.IsValid() {
		key.Source = in.Source.As16()
	}
	return key
}

func decodeKey4(key *bpf.RelayFlow4) Input {
	in := Input{Index: int(key.Ifindex), Port: key.Port, Group: netip.AddrFrom4(key.Group)}
	if key.Source != [4]byte{} {
		in.Source = netip.AddrFrom4(key.Source)
	}
	return in
}

func decodeKey6(key *bpf.RelayFlow6) Input {
	in := Input{Index: int(key.Ifindex), Port: key.Port, Group: netip.AddrFrom16(key.Group)}
	if key.Source != [16]byte{} {
		in.Source = netip.AddrFrom16(key.Source)
	}
	return in
}

func encodeFlow(e *entry) bpf.RelayFlow {
	flow := bpf.RelayFlow{
		Rule:        e.id,
		FirstOutput: e.first,
		Port:        e.row,
		Outputs:     uint16(len(e.rule.Out)),
		MinMtu:      maxMTU,
		Path:        uint8(bpf.RelayRulePathPATH_KERNEL),
		InputMac:    e.rule.In.MAC,
	}
	for _, o := range e.rule.Out {
		if !o.Ready {
			flow.MinMtu = 0
			continue
		}
		flow.MinMtu = min(flow.MinMtu, uint16(o.MTU))
	}
	return flow
}

func encodeRule(e *entry) bpf.RelayRule {
	r := bpf.RelayRule{
		FirstOutput: e.first,
		FirstStats:  e.firstStats,
		Outputs:     uint16(len(e.rule.Out)),
		Path:        uint8(bpf.RelayRulePathPATH_KERNEL),
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

func encodeOutput(o Output, stats uint32) bpf.RelayOutput {
	b := bpf.RelayOutput{
		DstMac: o.DstMAC, SrcMac: o.SrcMAC,
		Dst:     encodeAddr(o.Dst),
		DstPort: o.DstPort, SrcPort: o.SrcPort,
		Ifindex: uint32(o.Index),
		Stats:   stats,
		Mtu:     uint16(o.MTU),
		TtlMode: uint8(o.TTLMode), Ttl: o.TTL,
		Dscp:   o.DSCP,
		Family: 4,
	}
	if o.Dst.Is6() {
		b.Family = 6
	}
	if o.Ready {
		b.Flags |= uint8(bpf.RelayOutputFlagOUTPUT_READY)
	}
	if o.Src.IsValid() {
		b.Flags |= uint8(bpf.RelayOutputFlagOUTPUT_SOURCE_SET)
		b.Src = encodeAddr(o.Src)
	}
	if o.SetDSCP {
		b.Flags |= uint8(bpf.RelayOutputFlagOUTPUT_DSCP_SET)
	}
	if o.ZeroChecksum {
		b.Flags |= uint8(bpf.RelayOutputFlagOUTPUT_CHECKSUM_ZERO)
	}
	return b
}

// decodeOutput is the inverse of encodeOutput.
func decodeOutput(b *bpf.RelayOutput) (Output, error) {
	if b.Family != 4 && b.Family != 6 {
		return Output{}, fmt.Errorf("output has family %d: want 4 or 6", b.Family)
	}
	has := func(flag bpf.RelayOutputFlag) bool { return b.Flags&uint8(flag) != 0 }
	o := Output{
		Ready: has(bpf.RelayOutputFlagOUTPUT_READY),
		Index: int(b.Ifindex),
		MTU:   int(b.Mtu),
		Rewrite: packet.Rewrite{
			DstMAC: b.DstMac, SrcMAC: b.SrcMac,
			Dst:     decodeAddr(b.Dst, b.Family),
			DstPort: b.DstPort, SrcPort: b.SrcPort,
			TTLMode: packet.TTLMode(b.TtlMode), TTL: b.Ttl,
			SetDSCP:      has(bpf.RelayOutputFlagOUTPUT_DSCP_SET),
			DSCP:         b.Dscp,
			ZeroChecksum: has(bpf.RelayOutputFlagOUTPUT_CHECKSUM_ZERO),
		},
	}
	if has(bpf.RelayOutputFlagOUTPUT_SOURCE_SET) {
		o.Src = decodeAddr(b.Src, b.Family)
	}
	return o, nil
}

// encodeAddr puts an IPv4 address into the first four bytes.
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

// encodeCopies lists the outputs that are ready, and those that are not behind
// them, sorted by interface.
func encodeCopies(out []Output) []bpf.RelayCopy {
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
