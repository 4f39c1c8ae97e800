package packet

import "encoding/binary"

// Checksums says whether the checksums of a frame are right, computed from
// scratch. h is what Parse said of it. A UDP checksum of zero over IPv4 is right:
// the sender made none (RFC 768). A fragment's UDP checksum cannot be told and
// counts as right.
func Checksums(frame []byte, h *Headers) (ip, udp bool) {
	l3 := frame[h.L3 : h.L3+h.L3Len]
	ip = true
	if h.Dst.Is4() {
		ip = fold(sum(l3[:int(l3[0]&0x0f)*4])) == 0xffff
	}
	if h.Part != Whole {
		return ip, true
	}
	if binary.BigEndian.Uint16(frame[h.UDP+6:]) == 0 {
		return ip, h.Dst.Is4() // IPv6 wants one (RFC 8200 section 8.1)
	}
	length := binary.BigEndian.Uint16(frame[h.UDP+4:])
	datagram := frame[h.UDP : h.UDP+int(length)]
	// The pseudo header: RFC 768, and RFC 8200 section 8.1.
	total := sum(addresses(l3, h)) + protocolUDP + uint64(length) + sum(datagram)
	return ip, fold(total) == 0xffff
}

// addresses returns the source and destination, which the pseudo header begins with.
func addresses(l3 []byte, h *Headers) []byte {
	if h.Dst.Is4() {
		return l3[12:20]
	}
	return l3[8:40]
}

func sum(b []byte) (total uint64) {
	for ; len(b) >= 2; b = b[2:] {
		total += uint64(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		total += uint64(b[0]) << 8
	}
	return total
}

// FinishChecksum computes the UDP checksum of a whole datagram whose sender left that to
// a device: the field holds the sum of the pseudo header. It is false where that is not so, and
// where the checksum is right all the same, which it then stays.
func FinishChecksum(frame []byte, h *Headers) bool {
	if h.Part != Whole {
		return false
	}
	l3 := frame[h.L3 : h.L3+h.L3Len]
	length := binary.BigEndian.Uint16(frame[h.UDP+4:])
	pseudo := sum(addresses(l3, h)) + protocolUDP + uint64(length)
	check := binary.BigEndian.Uint16(frame[h.UDP+6:])
	if check == 0 || fold(pseudo) != check {
		return false
	}
	finished := ^fold(sum(frame[h.UDP : h.UDP+int(length)]))
	if finished == 0 {
		finished = 0xffff
	}
	binary.BigEndian.PutUint16(frame[h.UDP+6:], finished)
	return finished != check
}

// FillChecksums computes both checksums of a frame from scratch. h is what Parse
// said of it. A fragment's UDP checksum is left as it is.
func FillChecksums(frame []byte, h *Headers) {
	l3 := frame[h.L3 : h.L3+h.L3Len]
	if h.Dst.Is4() {
		binary.BigEndian.PutUint16(l3[10:], 0)
		binary.BigEndian.PutUint16(l3[10:], ^fold(sum(l3[:int(l3[0]&0x0f)*4])))
	}
	if h.Part != Whole {
		return
	}
	length := binary.BigEndian.Uint16(frame[h.UDP+4:])
	datagram := frame[h.UDP : h.UDP+int(length)]
	binary.BigEndian.PutUint16(datagram[6:], 0)
	check := ^fold(sum(addresses(l3, h)) + protocolUDP + uint64(length) + sum(datagram))
	if check == 0 {
		check = 0xffff
	}
	binary.BigEndian.PutUint16(datagram[6:], check)
}
