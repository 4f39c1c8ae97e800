// Package packet parses and rewrites Ethernet frames in Go: the twin of the BPF programs
// (bpf/include/parse.h and rewrite.h), their oracle in tests, and the rewriting of the user-space
// paths. Nothing on the packet path allocates or retains its arguments. Ports, VLAN ids and lengths
// in structs are in host byte order.
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

	protocolHopByHop    = 0
	protocolFragment    = 44
	protocolDestination = 60
)

// Parsed headers: VLAN tags, and IPv6 extension headers (RFC 8200 section 4), up to a number and
// length.
const (
	maxVLANTags       = 2
	maxExtensions     = 4
	maxExtensionBytes = 160
)

// Part says which part of a datagram a packet is.
type Part uint8

// The parts of a datagram.
const (
	Whole         Part = iota
	FirstFragment      // of several; only it has the UDP header
	LaterFragment      // one of the others
)

// Headers are the offsets of a frame's headers and the fields that flows match.
type Headers struct {
	// L3 and UDP are offsets into the frame, in bytes; UDP is 0 in later fragments.
	L3, UDP int
	// Payload is the offset after the headers, including UDP.
	Payload int
	// L3Len is the length of the IP packet, without trailing padding.
	L3Len int
	// VLAN is that of the only tag, or of the inner one, and OuterVLAN that of the outer of two; 0
	// without such a tag, or for a priority tag.
	VLAN, OuterVLAN  uint16
	Part             Part
	FragmentID       uint32 // not set in unfragmented packets
	Src, Dst         netip.Addr
	SrcPort, DstPort uint16 // 0 in later fragments
}

// Parse parses a UDP packet over IPv4 or IPv6 in an Ethernet frame, after up to two VLAN tags and,
// in IPv6, hop-by-hop options, destination options and a fragment header. It returns false for
// every frame that the relay leaves alone: other protocols, and malformed or truncated packets.
func Parse(frame []byte) (h Headers, ok bool) {
	h, ok = parse(frame)
	if !ok || h.L3+h.L3Len > len(frame) {
		return Headers{}, false
	}
	return h, true
}

// Malformed parses the addresses and ports of a UDP packet that Parse refuses because its datagram
// exceeds the packet, or the packet exceeds the frame. It returns false for all others.
func Malformed(frame []byte) (h Headers, ok bool) {
	h, ok = parse(frame)
	if !ok || h.L3+h.L3Len <= len(frame) {
		return Headers{}, false
	}
	return h, true
}

// malformed is the packet length that marks a datagram exceeding its packet: longer than any frame
// (MALFORMED of bpf/include/parse.h).
const malformed = 0x7fffffff

// parse is Parse without the check of the packet's length.
func parse(frame []byte) (h Headers, ok bool) {
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
	return h, ok
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
		h.OuterVLAN, h.VLAN = h.VLAN, binary.BigEndian.Uint16(frame[h.L3:])&0x0fff
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
	h.L3Len = int(binary.BigEndian.Uint16(ip[2:]))
	h.Src = netip.AddrFrom4([4]byte(ip[12:16]))
	h.Dst = netip.AddrFrom4([4]byte(ip[16:20]))
	fragment := binary.BigEndian.Uint16(ip[6:])
	if fragment&0x3fff != 0 {
		h.Part, h.FragmentID = FirstFragment, uint32(binary.NativeEndian.Uint16(ip[4:]))
	}
	if fragment&0x1fff != 0 {
		h.Part = LaterFragment
		h.Payload = h.L3 + headerLen
		return h.L3Len > headerLen
	}
	if h.L3Len < headerLen+udpLen {
		h.L3Len = malformed
	}
	return h.parseUDP(frame, headerLen)
}

func (h *Headers) parseIPv6(frame []byte) bool {
	if len(frame) < h.L3+ip6Len {
		return false
	}
	ip := frame[h.L3:]
	if ip[0]>>4 != 6 {
		return false
	}
	h.L3Len = ip6Len + int(binary.BigEndian.Uint16(ip[4:]))
	h.Src = netip.AddrFrom16([16]byte(ip[8:24]))
	h.Dst = netip.AddrFrom16([16]byte(ip[24:40]))
	headerLen, ok := h.walkExtensions(ip)
	if !ok || headerLen > ip6Len && headerLen >= h.L3Len {
		return false
	}
	if h.Part == LaterFragment {
		h.Payload = h.L3 + headerLen
		return true
	}
	return h.parseUDP(frame, headerLen)
}

// walkExtensions returns the length of the IPv6 header and its extensions; false if they do not
// lead to UDP.
func (h *Headers) walkExtensions(ip []byte) (headerLen int, ok bool) {
	next := ip[6]
	headerLen = ip6Len
	for i := 0; i < maxExtensions && next != protocolUDP && h.Part != LaterFragment; i++ {
		if headerLen > ip6Len+maxExtensionBytes-8 || headerLen+8 > len(ip) {
			return 0, false
		}
		ext := ip[headerLen:]
		switch {
		case next == protocolFragment && h.Part == Whole:
			h.FragmentID = binary.NativeEndian.Uint32(ext[4:])
			if offset := binary.BigEndian.Uint16(ext[2:]); offset&0xfff8 != 0 {
				h.Part = LaterFragment
			} else if offset&1 != 0 {
				h.Part = FirstFragment
			}
			headerLen += 8
		case next == protocolHopByHop || next == protocolDestination:
			headerLen += (int(ext[1]) + 1) * 8
		default:
			return 0, false
		}
		next = ext[0]
	}
	// A later fragment continues with the protocol that the first one begins with, and that only
	// the first contains: UDP, or options before it.
	leads := next == protocolUDP || h.Part == LaterFragment && next == protocolDestination
	return headerLen, leads && headerLen <= ip6Len+maxExtensionBytes
}

func (h *Headers) parseUDP(frame []byte, headerLen int) bool {
	h.UDP = h.L3 + headerLen
	if len(frame) < h.UDP+udpLen {
		return false
	}
	udp := frame[h.UDP:]
	length := int(binary.BigEndian.Uint16(udp[4:]))
	// In a first fragment, the datagram's length exceeds the fragment.
	if length < udpLen || h.Part == Whole && headerLen+length > h.L3Len {
		h.L3Len = malformed
	}
	h.Payload = h.UDP + udpLen
	h.SrcPort = binary.BigEndian.Uint16(udp[0:])
	h.DstPort = binary.BigEndian.Uint16(udp[2:])
	return true
}

// BroadcastMAC is the Ethernet address of every host on a link.
var BroadcastMAC = [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// MulticastMAC returns the Ethernet address of a multicast group: RFC 1112 section 6.4 for IPv4,
// RFC 2464 section 7 for IPv6.
func MulticastMAC(group netip.Addr) [6]byte {
	b := group.As16()
	if group.Unmap().Is4() {
		return [6]byte{0x01, 0x00, 0x5e, b[13] & 0x7f, b[14], b[15]}
	}
	return [6]byte{0x33, 0x33, b[12], b[13], b[14], b[15]}
}
