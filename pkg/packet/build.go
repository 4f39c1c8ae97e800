package packet

import (
	"encoding/binary"
	"net/netip"
)

// Frame describes a UDP packet to build.
type Frame struct {
	DstMAC, SrcMAC   [6]byte
	VLANs            []uint16 // tag control words, outermost first
	Src, Dst         netip.Addr
	SrcPort, DstPort uint16
	TTL, TOS         uint8
	Options          []byte // IPv4 options; a multiple of 4 bytes
	// Extensions are IPv6 extension headers; FirstExtension is the protocol number of the first.
	// The last one's next header is UDP.
	FirstExtension uint8
	Extensions     []byte
	NoChecksum     bool // leave the UDP checksum zero
	Payload        []byte
	Padding        int // bytes after the IP packet
}

// Build returns the frame with both checksums computed.
func (f Frame) Build() []byte {
	b := append(append([]byte{}, f.DstMAC[:]...), f.SrcMAC[:]...)
	for _, tci := range f.VLANs {
		b = binary.BigEndian.AppendUint16(b, etherVLAN)
		b = binary.BigEndian.AppendUint16(b, tci)
	}
	if f.Dst.Is4() {
		b = f.appendIPv4(b)
	} else {
		b = f.appendIPv6(b)
	}
	b = binary.BigEndian.AppendUint16(b, f.SrcPort)
	b = binary.BigEndian.AppendUint16(b, f.DstPort)
	b = binary.BigEndian.AppendUint16(b, uint16(udpLen+len(f.Payload)))
	b = append(b, 0, 0)
	b = append(b, f.Payload...)
	b = append(b, make([]byte, f.Padding)...)
	if h, ok := Parse(b); ok {
		FillChecksums(b, &h)
		if f.NoChecksum && h.UDP != 0 {
			binary.BigEndian.PutUint16(b[h.UDP+6:], 0)
		}
	}
	return b
}

func (f Frame) appendIPv4(b []byte) []byte {
	headerLen := ip4Len + len(f.Options)
	b = binary.BigEndian.AppendUint16(b, etherIPv4)
	b = append(b, byte(4<<4|headerLen/4), f.TOS)
	b = binary.BigEndian.AppendUint16(b, uint16(headerLen+udpLen+len(f.Payload)))
	b = append(b, 0, 0, 0, 0, f.TTL, protocolUDP, 0, 0)
	b = append(b, f.Src.AsSlice()...)
	b = append(b, f.Dst.AsSlice()...)
	return append(b, f.Options...)
}

func (f Frame) appendIPv6(b []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, etherIPv6)
	b = append(b, 6<<4|f.TOS>>4, f.TOS<<4, 0, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(len(f.Extensions)+udpLen+len(f.Payload)))
	next := uint8(protocolUDP)
	if len(f.Extensions) > 0 {
		next = f.FirstExtension
	}
	b = append(b, next, f.TTL)
	b = append(b, f.Src.AsSlice()...)
	b = append(b, f.Dst.AsSlice()...)
	return append(b, f.Extensions...)
}

// Fragment splits an unfragmented frame into fragments of at most size bytes of payload each, a
// multiple of 8 (RFC 791 section 3.2, RFC 8200 section 4.5), with the given identification. The
// frame must have no IPv6 extension headers.
func Fragment(frame []byte, id uint32, size int) [][]byte {
	h, ok := Parse(frame)
	if !ok || h.Part != Whole {
		return nil
	}
	payload := frame[h.UDP : h.L3+h.L3Len]
	var all [][]byte
	for at := 0; at < len(payload); at += size {
		part := payload[at:min(at+size, len(payload))]
		more := uint16(0)
		if at+size < len(payload) {
			more = 1
		}
		b := append([]byte{}, frame[:h.UDP]...)
		ip := b[h.L3:]
		if h.Dst.Is4() {
			binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+len(part)))
			binary.BigEndian.PutUint16(ip[4:], uint16(id))
			binary.BigEndian.PutUint16(ip[6:], more<<13|uint16(at/8))
			binary.BigEndian.PutUint16(ip[10:], 0)
			binary.BigEndian.PutUint16(ip[10:], ^fold(sum(ip)))
		} else {
			binary.BigEndian.PutUint16(ip[4:], uint16(8+len(part)))
			ip[6] = protocolFragment
			b = append(b, protocolUDP, 0)
			b = binary.BigEndian.AppendUint16(b, uint16(at)|more)
			b = binary.BigEndian.AppendUint32(b, id)
		}
		all = append(all, append(b, part...))
	}
	return all
}
