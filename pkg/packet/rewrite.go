package packet

import (
	"encoding/binary"
	"net/netip"
)

// TTLMode selects the rewriting of the TTL or hop limit.
type TTLMode uint8

// The modes of the TTL.
const (
	TTLKeep TTLMode = iota
	TTLDecrement
	TTLSet
)

// Rewrite is the rewriting of one output, with everything resolved: its policies together with the
// addresses of its interface. Ports, VLAN ids and MTUs are in host byte order.
type Rewrite struct {
	DstMAC, SrcMAC [6]byte
	Dst            netip.Addr
	// An invalid Src keeps the packet's.
	Src     netip.Addr
	DstPort uint16
	// A SrcPort of 0 keeps the packet's.
	SrcPort uint16
	TTLMode TTLMode
	TTL     uint8 // with TTLSet
	// SetDSCP writes DSCP; the two ECN bits are always kept (RFC 3168).
	SetDSCP bool
	DSCP    uint8
	// ZeroChecksum sends IPv4 without a UDP checksum.
	ZeroChecksum bool
	// DstLen is the number of bits of Dst to write if it is a prefix: the others are the packet's,
	// and DstMAC is derived from the result. 0: all bits.
	DstLen uint8
	// PortAdd sends to the packet's port plus PortShift rather than to DstPort.
	PortAdd   bool
	PortShift int32
	// MinTTL is the lowest accepted TTL or hop limit; 0: any.
	MinTTL uint8
	VLAN   VLANMode
	// VLANID and OuterVLAN are the tags with VLANSet; with OuterVLAN 0 there is one tag.
	VLANID, OuterVLAN uint16
	// SetPCP writes PCP into the outgoing tags.
	SetPCP bool
	PCP    uint8
}

// VLANMode selects the VLAN tags of a copy.
type VLANMode uint8

// The modes of the VLAN tags.
const (
	VLANKeep VLANMode = iota
	VLANPop
	VLANSet
)

// Outcome is the result of rewriting a packet.
type Outcome uint8

// The outcomes.
const (
	Rewritten  Outcome = iota
	EndsByTTL          // the TTL or hop limit is too low, or would reach 0
	EndsByPort         // the destination port would leave 1 to 65535
)

// frameRoom is what the kernel allows a frame beyond the MTU: Ethernet and one tag (FRAME_ROOM of
// bpf/include/rewrite.h).
const frameRoom = ethLen + vlanLen

// TooLong says whether the copy of a frame of this many bytes is too long for a device with this
// MTU: including pushed or kept tags, and trailing bytes after the IP packet. Without Ethernet,
// only the packet counts.
func (r *Rewrite) TooLong(h *Headers, frame, mtu int, ethernet bool) bool {
	if h.L3Len > mtu || !ethernet {
		return h.L3Len > mtu
	}
	header := h.L3
	switch {
	case r.VLAN == VLANPop:
		header = ethLen
	case r.VLAN == VLANSet && r.OuterVLAN != 0:
		header = ethLen + 2*vlanLen
	case r.VLAN == VLANSet:
		header = ethLen + vlanLen
	}
	return frame-h.L3+header > mtu+frameRoom
}

// MaxHeaders is the maximum that Append appends, in bytes: Ethernet, two tags, IPv6 with extension
// headers, UDP.
const MaxHeaders = ethLen + maxVLANTags*vlanLen + ip6Len + maxExtensionBytes + udpLen

// Append appends the rewritten headers of frame to dst; the rest of the packet is
// frame[h.Payload:], unchanged. h is the result of Parse; its address family must be that of r.Dst.
// If the packet must be dropped, dst is returned unchanged. Checksums are updated incrementally
// (RFC 1624, equation 3), so that a wrong one stays wrong and the receiver detects it.
func (r *Rewrite) Append(dst, frame []byte, h *Headers) ([]byte, Outcome) {
	port := r.newPort(h.DstPort)
	if h.Part != LaterFragment && port == 0 && r.PortAdd {
		if r.newTTL(ttl(frame, h)) == 0 {
			return dst, EndsByTTL
		}
		return dst, EndsByPort
	}
	at := len(dst)
	dst = r.appendEthernet(dst, frame, h)
	l3 := len(dst)
	dst = append(dst, frame[h.L3:h.Payload]...)
	ip := dst[l3:]
	var addresses uint64
	var ok bool
	if h.Dst.Is4() {
		addresses, ok = r.applyIPv4(ip)
	} else {
		addresses, ok = r.applyIPv6(ip)
	}
	if !ok {
		return dst[:at], EndsByTTL
	}
	if h.Part != LaterFragment {
		r.applyUDP(ip[h.UDP-h.L3:], port, addresses)
	}
	if r.DstLen != 0 && r.DstMAC[0]&1 != 0 {
		r.applyGroupMAC(dst[at:], ip, h.Dst.Is4())
	}
	return dst, Rewritten
}

// Apply is Append in place, for an output that keeps the tags.
func (r *Rewrite) Apply(frame []byte, h *Headers) Outcome {
	var room [MaxHeaders]byte
	headers, outcome := r.Append(room[:0], frame, h)
	copy(frame, headers)
	return outcome
}

// appendEthernet appends the MACs, the tags and the EtherType.
func (r *Rewrite) appendEthernet(dst, frame []byte, h *Headers) []byte {
	dst = append(append(dst, r.DstMAC[:]...), r.SrcMAC[:]...)
	tags := frame[2*6 : h.L3-2] // TPID and TCI each
	switch r.VLAN {
	case VLANKeep:
		for i := 0; i < len(tags); i += vlanLen {
			old := binary.BigEndian.Uint16(tags[i+2:])
			dst = append(dst, tags[i], tags[i+1])
			dst = binary.BigEndian.AppendUint16(dst, r.tci(old&0x0fff, old))
		}
	case VLANSet:
		var first, last uint16
		if len(tags) > 0 {
			first = binary.BigEndian.Uint16(tags[2:])
			last = binary.BigEndian.Uint16(tags[len(tags)-2:])
		}
		if r.OuterVLAN != 0 {
			dst = binary.BigEndian.AppendUint16(dst, etherQinQ)
			dst = binary.BigEndian.AppendUint16(dst, r.tci(r.OuterVLAN, first))
		}
		dst = binary.BigEndian.AppendUint16(dst, etherVLAN)
		dst = binary.BigEndian.AppendUint16(dst, r.tci(r.VLANID, last))
	}
	return append(dst, frame[h.L3-2], frame[h.L3-1])
}

// tci is the control word of a new tag that replaces old: the priority and drop eligible bits stay,
// unless the priority is set.
func (r *Rewrite) tci(id, old uint16) uint16 {
	if r.SetPCP {
		return uint16(r.PCP)<<13 | old&0x1000 | id
	}
	return old&0xf000 | id
}

// applyGroupMAC completes the destination MAC of a group that depends on the packet.
func (r *Rewrite) applyGroupMAC(eth, ip []byte, is4 bool) {
	if is4 {
		eth[2], eth[3], eth[4], eth[5] = 0x5e, ip[17]&0x7f, ip[18], ip[19]
		return
	}
	copy(eth[2:6], ip[36:40])
}

func ttl(frame []byte, h *Headers) uint8 {
	if h.Dst.Is4() {
		return frame[h.L3+8]
	}
	return frame[h.L3+7]
}

// newPort is the new destination port, 0 if it is out of range.
func (r *Rewrite) newPort(port uint16) uint16 {
	if !r.PortAdd {
		return r.DstPort
	}
	if p := int32(port) + r.PortShift; p > 0 && p <= 0xffff {
		return uint16(p)
	}
	return 0
}

// applyIPv4 returns the change of the sum of the addresses.
func (r *Rewrite) applyIPv4(ip []byte) (addresses uint64, ok bool) {
	ttl := r.newTTL(ip[8])
	if ttl == 0 {
		return 0, false
	}
	dst := r.Dst.As4()
	r.keepHostBits(dst[:], ip[16:20])
	addresses = replace(ip[16:20], dst[:])
	var number uint64
	if r.Src.IsValid() {
		src := r.Src.As4()
		if binary.BigEndian.Uint16(ip[6:])&0x3fff != 0 {
			id := mergedID([2]byte(ip[4:]), [4]byte(ip[12:]))
			number = replace(ip[4:6], id[:])
		}
		addresses += replace(ip[12:16], src[:])
	}
	sum := uint64(^binary.BigEndian.Uint16(ip[10:])) + addresses + number
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
	r.keepHostBits(dst[:], ip[24:40])
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

// mergedID is the identification of a fragment sent from another source address, hashed from the
// original address and identification: two merged senders may use the same identification
// (merged_id of bpf/include/rewrite.h).
func mergedID(id [2]byte, source [4]byte) (merged [2]byte) {
	mask := uint16(binary.NativeEndian.Uint32(source[:]) * 0x9e3779b1 >> 16)
	binary.NativeEndian.PutUint16(merged[:], binary.NativeEndian.Uint16(id[:])^mask)
	return merged
}

// keepHostBits copies the bits of the packet's address after the prefix to dst.
func (r *Rewrite) keepHostBits(dst, packet []byte) {
	if r.DstLen == 0 {
		return
	}
	for i := range dst {
		mask := byte(0xff)
		if bits := int(r.DstLen) - 8*i; bits < 8 {
			mask = ^byte(0xff >> max(bits, 0))
		}
		dst[i] = dst[i]&mask | packet[i]&^mask
	}
}

func (r *Rewrite) applyUDP(udp []byte, port uint16, addresses uint64) {
	check := binary.BigEndian.Uint16(udp[6:])
	sum := uint64(^check) + addresses
	sum += replace(udp[2:4], []byte{byte(port >> 8), byte(port)})
	if r.SrcPort != 0 {
		sum += replace(udp[0:2], []byte{byte(r.SrcPort >> 8), byte(r.SrcPort)})
	}
	switch {
	case check == 0: // sent without a checksum: unchanged
	case r.ZeroChecksum && r.Dst.Is4():
		binary.BigEndian.PutUint16(udp[6:], 0)
	default:
		if check = ^fold(sum); check == 0 {
			check = 0xffff // RFC 768: a computed zero is sent as all ones
		}
		binary.BigEndian.PutUint16(udp[6:], check)
	}
}

// newTTL returns the new TTL, 0 if the packet ends here.
func (r *Rewrite) newTTL(ttl uint8) uint8 {
	if ttl < r.MinTTL {
		return 0
	}
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

// replace copies from to to, both of the same even length, and returns the change of the sum of
// their 16-bit words, in ones' complement.
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
