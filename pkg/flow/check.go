package flow

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"xdpcast/pkg/packet"
)

// MaxMTU is the largest distinguished MTU of an output: no IP packet is longer.
const MaxMTU = 0xffff

// Normalized returns the canonical form of a flow: it clips values to the ranges of the ABI, so
// that reading back returns what was written, and never clears the UDP checksum of IPv6 packets,
// which receivers would drop (RFC 8200 section 8.1). Outputs that are already normalized are shared
// with r, not copied.
func (r Flow) Normalized() Flow {
	shared := true
	for i, o := range r.Out {
		n := o.normalized()
		if n == o {
			continue
		}
		if shared {
			r.Out, shared = slices.Clone(r.Out), false
		}
		r.Out[i] = n
	}
	if r.Path == 0 {
		r.Path = PathKernel
	}
	if r.In.Len == r.In.Group.BitLen() {
		r.In.Len = 0
	}
	r.Except = NormalExcept(r.Except)
	return r
}

func (o Output) normalized() Output {
	o.MTU = min(o.MTU, MaxMTU)
	o.ZeroChecksum = o.ZeroChecksum && o.Dst.Is4()
	if o.Ready {
		o.Blocked = NotReady
	}
	if int(o.DstLen) == o.Dst.BitLen() {
		o.DstLen = 0
	}
	if !o.PortAdd {
		o.PortShift = 0
	} else {
		o.DstPort = 0
	}
	if o.VLAN != packet.VLANSet {
		o.VLANID, o.OuterVLAN = 0, 0
	}
	if !o.SetPCP {
		o.PCP = 0
	}
	return o
}

// Check refuses flows that no path can carry. Rules are validated with messages for users
// elsewhere; this protects the kernel's state and the workers. The flow must be Normalized.
func (r Flow) Check() error {
	switch {
	case r.Name == "" || len(r.Name) > MaxName:
		return fmt.Errorf("name %q: want 1 to %d bytes", r.Name, MaxName)
	case strings.IndexByte(r.Name, 0) >= 0:
		return fmt.Errorf("name %q: holds a NUL byte", r.Name)
	case len(r.Out) == 0 || len(r.Out) > MaxOutputs:
		return fmt.Errorf("%d outputs: want 1 to %d", len(r.Out), MaxOutputs)
	case r.Routed != 0 && (r.In.Len != 0 || r.Rate != Rate{}):
		return fmt.Errorf("a multicast route of the kernel: want one group, and no rate")
	case r.Routed != 0 && (r.Path != PathKernel || slices.ContainsFunc(r.Out, func(o Output) bool { return !o.Ready })):
		return fmt.Errorf("a multicast route of the kernel: want the kernel path, and outputs that are all ready")
	case r.In.Index <= 0:
		return fmt.Errorf("input interface index %d: want a positive number", r.In.Index)
	case !r.In.Group.IsValid() || r.In.Group.Is4In6() || r.In.Group.Zone() != "":
		return fmt.Errorf("input address %v: want IPv4 or IPv6 without a zone", r.In.Group)
	case r.In.Len < 0 || r.In.Len > r.In.Group.BitLen():
		return fmt.Errorf("input prefix length %d: want 0 to %d", r.In.Len, r.In.Group.BitLen())
	case r.In.Len != 0 && netip.PrefixFrom(r.In.Group, r.In.Len).Masked().Addr() != r.In.Group:
		return fmt.Errorf("input prefix %v/%d: want no host bits", r.In.Group, r.In.Len)
	case r.In.VLAN > maxVLAN || r.In.OuterVLAN > maxVLAN || r.In.VLAN == 0 && r.In.OuterVLAN != 0:
		return fmt.Errorf("input VLAN %d.%d: want 1 to %d", r.In.OuterVLAN, r.In.VLAN, maxVLAN)
	case r.Broadcast && (!r.In.Group.Is4() || r.In.Group.IsMulticast() || r.In.Len != 0):
		return fmt.Errorf("input address %v: want one IPv4 address other than a group for broadcast", netip.PrefixFrom(r.In.Group, r.In.Len))
	case r.In.FromHost && r.Path != PathFanout:
		return fmt.Errorf("path %d: want fanout for what this host sends", r.Path)
	case r.Path > PathFanout:
		return fmt.Errorf("path %d: want kernel, afxdp or fanout", r.Path)
	case r.In.Source.IsValid() && (r.In.Source.BitLen() != r.In.Group.BitLen() || r.In.Source.IsUnspecified()):
		return fmt.Errorf("input source %v: want an address of the family of %v", r.In.Source, r.In.Group)
	}
	if err := cmp.Or(r.checkSenders(), checkRate(r.Rate), r.checkLeg()); err != nil {
		return err
	}
	for slot, o := range r.Out {
		if err := checkOutput(slot, o, r.In); err != nil {
			return err
		}
		if r.Routed != 0 && !r.routes(&o) {
			return fmt.Errorf("output %d: a multicast route of the kernel: want its group, and a TTL one less, and nothing else rewritten", slot)
		}
	}
	return nil
}

// routes says whether an output of a routed flow rewrites like the kernel.
func (r *Flow) routes(o *Output) bool {
	return o.Rate == Rate{} && o.Rewrite == packet.Rewrite{
		DstMAC: o.DstMAC, SrcMAC: o.SrcMAC, Dst: r.In.Group, PortAdd: true, TTLMode: packet.TTLDecrement,
	}
}

func (r Flow) checkLeg() error {
	if r.Leg == nil {
		return nil
	}
	if r.In.FromHost {
		return errors.New("what this host sends passes no relay program, and is no leg of a stream")
	}
	if !r.Leg.Several() {
		if r.Leg.Number != 0 || r.Name != r.Leg.Of {
			return fmt.Errorf("input %d of %s is watched: want 0, and the name %[2]s", r.Leg.Number, r.Leg.Of)
		}
		return r.Leg.Settings.Check()
	}
	if r.Leg.Number < 0 || r.Leg.Number >= packet.MaxLegs || r.Name != fmt.Sprint(r.Leg.Of, LegSeparator, r.Leg.Number) {
		return fmt.Errorf("leg %d of stream %s: want 0 to %d, and the name %s%s%[1]d", r.Leg.Number, r.Leg.Of, packet.MaxLegs-1, r.Leg.Of, LegSeparator)
	}
	return r.Leg.Settings.Check()
}

const maxVLAN = 4094 // IEEE 802.1Q: 4095 is reserved

func checkOutput(slot int, o Output, in Input) error {
	if err := checkRate(o.Rate); err != nil {
		return fmt.Errorf("output %d: %w", slot, err)
	}
	switch {
	case o.Dst.BitLen() != in.Group.BitLen():
		return fmt.Errorf("output %d: address %v is of another family than %v", slot, o.Dst, in.Group)
	case int(o.DstLen) > o.Dst.BitLen():
		return fmt.Errorf("output %d: prefix length %d: want 0 to %d", slot, o.DstLen, o.Dst.BitLen())
	case o.VLAN > packet.VLANSet || o.VLAN == packet.VLANSet && (o.VLANID == 0 || o.VLANID > maxVLAN || o.OuterVLAN > maxVLAN):
		return fmt.Errorf("output %d: VLAN %d.%d: want 1 to %d", slot, o.OuterVLAN, o.VLANID, maxVLAN)
	case o.PCP > 7:
		return fmt.Errorf("output %d: priority %d: want 0 to 7", slot, o.PCP)
	case !o.PortAdd && o.DstPort == 0:
		return fmt.Errorf("output %d: port 0: want 1 to 65535", slot)
	case o.PortAdd && (o.PortShift > 65534 || o.PortShift < -65534):
		return fmt.Errorf("output %d: port shift %d: want -65534 to 65534", slot, o.PortShift)
	case o.Blocked >= blockedKinds:
		return fmt.Errorf("output %d: blocked for reason %v: want not_ready, no_neighbour or no_carrier", slot, o.Blocked)
	case o.Src.IsValid() && o.Src.BitLen() != o.Dst.BitLen():
		return fmt.Errorf("output %d: source %v is of another family than %v", slot, o.Src, o.Dst)
	case o.Ready && o.Index <= 0:
		return fmt.Errorf("output %d: interface index %d: want a positive number", slot, o.Index)
	case o.MTU < 0:
		return fmt.Errorf("output %d: mtu %d: want a positive number", slot, o.MTU)
	}
	return nil
}

// MinBitRate is the lowest rate of a Rate in bits a second.
const MinBitRate = 1000

func checkRate(r Rate) error {
	switch {
	case r == Rate{}:
	case r.Packets != 0 && r.Bits != 0:
		return fmt.Errorf("rate of %d packets and %d bits a second: want one of them", r.Packets, r.Bits)
	case r.Packets == 0 && r.Bits == 0:
		return fmt.Errorf("burst of %d without a rate", r.Burst)
	case r.Bits != 0 && r.Bits < MinBitRate:
		return fmt.Errorf("rate of %d bits a second: want %d or more", r.Bits, MinBitRate)
	case r.Burst == 0:
		return fmt.Errorf("burst 0: want 1 or more")
	}
	return nil
}
