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
	NoChecksum       bool   // leave the UDP checksum zero
	Payload          []byte
	Padding          int // bytes behind the IP packet
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
		if f.NoChecksum {
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
	b = binary.BigEndian.AppendUint16(b, uint16(udpLen+len(f.Payload)))
	b = append(b, protocolUDP, f.TTL)
	b = append(b, f.Src.AsSlice()...)
	return append(b, f.Dst.AsSlice()...)
}
