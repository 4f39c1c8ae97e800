package packet

import (
	"encoding/binary"
	"net/netip"
)

// TTLMode says what becomes of the TTL or hop limit.
type TTLMode uint8

// The modes of the TTL.
const (
	TTLKeep TTLMode = iota
	TTLDecrement
	TTLSet
)

// Rewrite is what one output makes of a packet, with everything resolved: an
// output's policy together with the addresses of its interface.
type Rewrite struct {
	DstMAC, SrcMAC [6]byte
	Dst            netip.Addr
	// Src is kept when it is not valid.
	Src     netip.Addr
	DstPort uint16
	// SrcPort is kept when it is 0.
	SrcPort uint16
	TTLMode TTLMode
	TTL     uint8 // with TTLSet
	// SetDSCP writes DSCP; the two ECN bits are always kept (RFC 3168).
	SetDSCP bool
	DSCP    uint8
	// ZeroChecksum sends IPv4 without a UDP checksum.
	ZeroChecksum bool
	// DstLen is how many bits of Dst to write when it is a prefix: the others are
	// the packet's own, and DstMAC is made from the whole. 0: all of them.
	DstLen uint8
	// PortAdd adds DstPort to the packet's port (modulo 65536, as two's complement)
	// rather than write it: with a DstPort of 0 the port is kept.
	PortAdd bool
	// MinTTL is the lowest TTL or hop limit that may arrive; 0: any.
	MinTTL uint8
	VLAN   VLANMode
	// VLANID and OuterVLAN are the tags with VLANSet: OuterVLAN 0 is one tag alone.
	VLANID, OuterVLAN uint16
	// SetPCP writes PCP into the tags that leave.
	SetPCP bool
	PCP    uint8
}

// VLANMode says which VLAN tags a copy carries.
type VLANMode uint8

// The modes of the VLAN tags.
const (
	VLANKeep VLANMode = iota
	VLANPop
	VLANSet
)

// Apply rewrites a frame in place. h is what Parse said of it; the address family
// must be that of r.Dst. It is false, and the frame is unchanged, when the TTL
// would reach 0. Checksums are updated incrementally (RFC 1624, equation 3), so
// that a wrong one stays wrong and the receiver finds out.
func (r *Rewrite) Apply(frame []byte, h *Headers) bool {
	ip := frame[h.L3:]
	var ok bool
	var addresses uint64
	if h.Dst.Is4() {
		addresses, ok = r.applyIPv4(ip)
	} else {
		addresses, ok = r.applyIPv6(ip)
	}
	if !ok {
		return false
	}
	r.applyUDP(frame[h.UDP:h.UDP+udpLen], addresses)
	copy(frame[0:6], r.DstMAC[:])
	copy(frame[6:12], r.SrcMAC[:])
	return true
}

// applyIPv4 returns what the sum of the addresses changed by.
func (r *Rewrite) applyIPv4(ip []byte) (addresses uint64, ok bool) {
	ttl := r.newTTL(ip[8])
	if ttl == 0 {
		return 0, false
	}
	dst := r.Dst.As4()
	addresses = replace(ip[16:20], dst[:])
	if r.Src.IsValid() {
		src := r.Src.As4()
		addresses += replace(ip[12:16], src[:])
	}
	sum := uint64(^binary.BigEndian.Uint16(ip[10:])) + addresses
	sum += replace(ip[8:10], []byte{ttl, ip[9]})
	if r.SetDSCP {
		sum += replace(ip[0:2], []byte{ip[0], r.DSCP<<2 | ip[1]&0x03})
	}
	binary.BigEndian.PutUint16(ip[10:], ^fold(sum))
	return addresses, true
}

func (r *Rewrite) applyIPv6(ip []byte) (addresses uint64, ok bool) {
	ttl := r.newTTL(ip[7])
	if ttl == 0 {
		return 0, false
	}
	dst := r.Dst.As16()
	addresses = replace(ip[24:40], dst[:])
	if r.Src.IsValid() {
		src := r.Src.As16()
		addresses += replace(ip[8:24], src[:])
	}
	ip[7] = ttl
	if r.SetDSCP {
		ip[0] = ip[0]&0xf0 | r.DSCP>>2
		ip[1] = r.DSCP<<6 | ip[1]&0x3f
	}
	return addresses, true
}

func (r *Rewrite) applyUDP(udp []byte, addresses uint64) {
	check := binary.BigEndian.Uint16(udp[6:])
	sum := uint64(^check) + addresses
	sum += replace(udp[2:4], []byte{byte(r.DstPort >> 8), byte(r.DstPort)})
	if r.SrcPort != 0 {
		sum += replace(udp[0:2], []byte{byte(r.SrcPort >> 8), byte(r.SrcPort)})
	}
	switch {
	case check == 0: // sent without one: stays so
	case r.ZeroChecksum && r.Dst.Is4():
		binary.BigEndian.PutUint16(udp[6:], 0)
	default:
		if check = ^fold(sum); check == 0 {
			check = 0xffff // RFC 768: a computed zero is sent as all ones
		}
		binary.BigEndian.PutUint16(udp[6:], check)
	}
}

// newTTL returns the TTL to send, 0 when the packet ends here.
func (r *Rewrite) newTTL(ttl uint8) uint8 {
	switch r.TTLMode {
	case TTLSet:
		return r.TTL
	case TTLDecrement:
		if ttl == 0 {
			return 0
		}
		return ttl - 1
	default:
		return ttl
	}
}

// replace copies to over from, both of the same even length, and returns what the
// sum of their 16-bit words changed by, in ones' complement.
func replace(from, to []byte) (delta uint64) {
	for i := 0; i < len(to); i += 2 {
		delta += uint64(^binary.BigEndian.Uint16(from[i:])) + uint64(binary.BigEndian.Uint16(to[i:]))
	}
	copy(from, to)
	return delta
}

// fold folds a sum of 16-bit words to 16 bits.
func fold(sum uint64) uint16 {
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}
