package packet

import "encoding/binary"

// Checksums says whether the checksums of a frame are correct, computed from scratch. h is the
// result of Parse. A UDP checksum of zero over IPv4 is correct: the sender computed none (RFC 768).
// A fragment's UDP checksum cannot be verified and counts as correct.
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
		return ip, h.Dst.Is4() // IPv6 requires one (RFC 8200 section 8.1)
	}
	length := binary.BigEndian.Uint16(frame[h.UDP+4:])
	datagram := frame[h.UDP : h.UDP+int(length)]
	// The pseudo header: RFC 768, and RFC 8200 section 8.1.
	total := sum(addresses(l3, h)) + protocolUDP + uint64(length) + sum(datagram)
	return ip, fold(total) == 0xffff
}

// addresses returns the source and destination, the beginning of the pseudo header.
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

// FinishChecksum completes the UDP checksum of an unfragmented datagram whose sender left it to a
// device: the field then holds the sum of the pseudo header. It returns false, and changes nothing,
// if the field holds anything else or is already correct.
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

// FillChecksums computes both checksums of a frame from scratch. h is the result of Parse. It
// leaves a fragment's UDP checksum alone.
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
