package labtest

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// IGMP2Query is the frame of a general query of IGMPv2 (RFC 2236, section 2) from an address.
func IGMP2Query(source string) []byte {
	from := netip.MustParseAddr(source).As4()
	igmp := []byte{0x11, 100, 0, 0, 0, 0, 0, 0}
	ip := []byte{0x45, 0, 0, 28, 0, 0, 0, 0, 1, unix.IPPROTO_IGMP, 0, 0, from[0], from[1], from[2], from[3], 224, 0, 0, 1}
	binary.BigEndian.PutUint16(igmp[2:], checksum(igmp))
	binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	return slices.Concat([]byte{1, 0, 0x5e, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0}, ip, igmp)
}

// checksum is that of RFC 1071, of an even number of bytes.
func checksum(b []byte) uint16 {
	sum := uint32(0)
	for ; len(b) > 0; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
