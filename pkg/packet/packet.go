// Package packet parses and rewrites frames in Go: the twin of the BPF programs
// (bpf/include/parse.h and rewrite.h), their oracle in tests, and the rewrite of
// the user-space paths. Nothing here allocates or keeps what it is given.
package packet

import (
	"encoding/binary"
	"net/netip"
)

// Sizes of headers in bytes.
const (
	ethLen  = 14 // IEEE 802.3: destination, source, EtherType
	vlanLen = 4  // IEEE 802.1Q: tag control, EtherType
	ip4Len  = 20 // RFC 791 section 3.1, without options
	ip6Len  = 40 // RFC 8200 section 3
	udpLen  = 8  // RFC 768
)

// EtherTypes and protocol numbers (IANA).
const (
	etherIPv4   = 0x0800
	etherIPv6   = 0x86dd
	etherVLAN   = 0x8100
	etherQinQ   = 0x88a8
	protocolUDP = 17
)

const maxVLANTags = 2

// Headers says where the headers of a frame lie and what a flow is matched by.
type Headers struct {
	// L3 and UDP are offsets into the frame, in bytes.
	L3, UDP int
	// L3Len is the length of the IP packet, without padding behind it.
	L3Len int
	// VLAN of the outer tag; 0 without a tag, or with a priority tag.
	VLAN uint16
	// Fragment is set for the first of several fragments.
	Fragment         bool
	Src, Dst         netip.Addr
	SrcPort, DstPort uint16
}

// Parse finds the headers of a UDP packet over IPv4 or IPv6 in an Ethernet
// frame, behind up to two VLAN tags. It is false for every frame that the relay
// leaves alone: other protocols, later fragments, IPv6 extension headers, and
// what is malformed or cut short.
func Parse(frame []byte) (h Headers, ok bool) {
	proto, ok := h.parseEthernet(frame)
	if !ok {
		return Headers{}, false
	}
	switch proto {
	case etherIPv4:
		ok = h.parseIPv4(frame)
	case etherIPv6:
		ok = h.parseIPv6(frame)
	default:
		ok = false
	}
	if !ok || h.L3+h.L3Len > len(frame) {
		return Headers{}, false
	}
	return h, true
}

func (h *Headers) parseEthernet(frame []byte) (proto uint16, ok bool) {
	if len(frame) < ethLen {
		return 0, false
	}
	proto = binary.BigEndian.Uint16(frame[12:])
	h.L3 = ethLen
	for range maxVLANTags {
		if proto != etherVLAN && proto != etherQinQ {
			break
		}
		if len(frame) < h.L3+vlanLen {
			return 0, false
		}
		if h.VLAN == 0 {
			h.VLAN = binary.BigEndian.Uint16(frame[h.L3:]) & 0x0fff
		}
		proto = binary.BigEndian.Uint16(frame[h.L3+2:])
		h.L3 += vlanLen
	}
	return proto, true
}

func (h *Headers) parseIPv4(frame []byte) bool {
	if len(frame) < h.L3+ip4Len {
		return false
	}
	ip := frame[h.L3:]
	headerLen := int(ip[0]&0x0f) * 4
	if ip[0]>>4 != 4 || headerLen < ip4Len || ip[9] != protocolUDP {
		return false
	}
	fragment := binary.BigEndian.Uint16(ip[6:])
	if fragment&0x1fff != 0 {
		return false // a later fragment: no ports
	}
	h.Fragment = fragment&0x2000 != 0
	h.L3Len = int(binary.BigEndian.Uint16(ip[2:]))
	h.Src = netip.AddrFrom4([4]byte(ip[12:16]))
	h.Dst = netip.AddrFrom4([4]byte(ip[16:20]))
	return h.L3Len >= headerLen+udpLen && h.parseUDP(frame, headerLen)
}

func (h *Headers) parseIPv6(frame []byte) bool {
	if len(frame) < h.L3+ip6Len {
		return false
	}
	ip := frame[h.L3:]
	if ip[0]>>4 != 6 || ip[6] != protocolUDP {
		return false
	}
	h.L3Len = ip6Len + int(binary.BigEndian.Uint16(ip[4:]))
	h.Src = netip.AddrFrom16([16]byte(ip[8:24]))
	h.Dst = netip.AddrFrom16([16]byte(ip[24:40]))
	return h.parseUDP(frame, ip6Len)
}

func (h *Headers) parseUDP(frame []byte, headerLen int) bool {
	h.UDP = h.L3 + headerLen
	if len(frame) < h.UDP+udpLen {
		return false
	}
	udp := frame[h.UDP:]
	length := int(binary.BigEndian.Uint16(udp[4:]))
	// The length of a first fragment's datagram goes beyond the fragment.
	if length < udpLen || !h.Fragment && headerLen+length > h.L3Len {
		return false
	}
	h.SrcPort = binary.BigEndian.Uint16(udp[0:])
	h.DstPort = binary.BigEndian.Uint16(udp[2:])
	return true
}

// MulticastMAC returns the Ethernet address that a multicast group is sent to:
// RFC 1112 section 6.4 for IPv4, RFC 2464 section 7 for IPv6.
func MulticastMAC(group netip.Addr) [6]byte {
	b := group.As16()
	if group.Unmap().Is4() {
		return [6]byte{0x01, 0x00, 0x5e, b[13] & 0x7f, b[14], b[15]}
	}
	return [6]byte{0x33, 0x33, b[12], b[13], b[14], b[15]}
}
