package plan

import (
	"fmt"
	"net/netip"
	"strings"

	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// RewriteText describes an output's rewriting of a packet in words.
func RewriteText(o *flow.Output, k Packet) string {
	parts := []string{"to " + destinationText(o, k)}
	if o.DstMAC == packet.BroadcastMAC {
		parts = append(parts, "to every host on the link")
	}
	switch {
	case o.Src.IsValid() && o.SrcPort != 0:
		parts = append(parts, "from "+netip.AddrPortFrom(o.Src, o.SrcPort).String())
	case o.Src.IsValid():
		parts = append(parts, "from "+o.Src.String()+", source port kept")
	case o.SrcPort != 0:
		parts = append(parts, fmt.Sprintf("source kept, from port %d", o.SrcPort))
	default:
		parts = append(parts, "source kept")
	}
	switch o.TTLMode {
	case packet.TTLDecrement:
		parts = append(parts, "ttl one less")
	case packet.TTLSet:
		parts = append(parts, fmt.Sprintf("ttl %d", o.TTL))
	}
	if o.MinTTL != 0 {
		parts = append(parts, fmt.Sprintf("dropped with a ttl below %d", o.MinTTL))
	}
	if o.SetDSCP {
		parts = append(parts, fmt.Sprintf("dscp %d", o.DSCP))
	}
	if o.ZeroChecksum {
		parts = append(parts, "no UDP checksum")
	}
	parts = append(parts, tagText(o)...)
	switch {
	case o.Rate.Packets != 0:
		parts = append(parts, fmt.Sprintf("at most %d packets a second, %d at once", o.Rate.Packets, o.Rate.Burst))
	case o.Rate.Bits != 0:
		parts = append(parts, fmt.Sprintf("at most %d bits a second, %d bytes at once", o.Rate.Bits, o.Rate.Burst))
	}
	return strings.Join(parts, ", ")
}

func tagText(o *flow.Output) (parts []string) {
	switch {
	case o.VLAN == packet.VLANPop:
		parts = append(parts, "VLAN tags removed")
	case o.VLAN == packet.VLANSet && o.OuterVLAN != 0:
		parts = append(parts, fmt.Sprintf("VLAN %d.%d", o.OuterVLAN, o.VLANID))
	case o.VLAN == packet.VLANSet:
		parts = append(parts, fmt.Sprintf("VLAN %d", o.VLANID))
	}
	if o.SetPCP {
		parts = append(parts, fmt.Sprintf("priority %d", o.PCP))
	}
	return parts
}

// destinationText is the destination address and port of a copy.
func destinationText(o *flow.Output, k Packet) string {
	dst := o.Dst
	if o.DstLen != 0 {
		dst = merge(o.Dst, k.Destination, int(o.DstLen))
	}
	switch port := int32(k.Port) + o.PortShift; {
	case !o.PortAdd:
		return netip.AddrPortFrom(dst, o.DstPort).String()
	case k.Port != 0 && (port < 1 || port > 65535):
		return fmt.Sprintf("%s, dropped: port %d", dst, port)
	case k.Port != 0:
		return netip.AddrPortFrom(dst, uint16(port)).String()
	case o.PortShift == 0:
		return dst.String() + ", port kept"
	default:
		return fmt.Sprintf("%s, port %+d", dst, o.PortShift)
	}
}

// merge joins the prefix bits of prefix with the remaining bits of addr.
func merge(prefix, addr netip.Addr, bits int) netip.Addr {
	p, a := prefix.AsSlice(), addr.AsSlice()
	if len(p) != len(a) {
		return prefix
	}
	for i := range p {
		mask := byte(0xff)
		switch {
		case bits <= i*8:
			mask = 0
		case bits < i*8+8:
			mask = 0xff << (i*8 + 8 - bits)
		}
		p[i] = p[i]&mask | a[i]&^mask
	}
	merged, _ := netip.AddrFromSlice(p)
	return merged
}
