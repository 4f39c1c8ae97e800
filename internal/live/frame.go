package live

import (
	"encoding/binary"
)

// MaxFrame is the longest frame that BPF_PROG_RUN sends live: it must fit into a page together
// with the kernel's headroom and tailroom.
const MaxFrame = 3400

// MinFrame holds the headers and the tag of bpf/tag.h.
const MinFrame = 58

const headerLen = 40

// Header is a frame as the source program needs it: without the fields it fills in, and with partial
// checksums of the rest. Sums are of 16-bit words in native byte order (RFC 1071).
type Header struct {
	words         [headerLen / 8]uint64
	IPSum, UDPSum uint64
}

// NewHeader splits an Ethernet frame with IPv4, UDP and an empty tag.
func NewHeader(frame []byte) (h Header) {
	const ip, udp, dst = 14, 34, 30
	f := append([]byte{}, frame...)
	copy(f[2:6], []byte{0, 0, 0, 0})       // group's MAC
	copy(f[24:26], []byte{0, 0})           // IPv4 checksum
	copy(f[dst:dst+4], []byte{0, 0, 0, 0}) // group
	copy(f[udp:udp+2], []byte{0, 0})       // source port
	copy(f[40:42], []byte{0, 0})           // UDP checksum
	for i := range h.words {
		h.words[i] = binary.NativeEndian.Uint64(f[i*8:])
	}
	h.IPSum = Sum(f[ip:udp])
	// The pseudo header: source, group (added later), protocol, length (RFC 768).
	pseudo := []byte{0, 17, f[38], f[39]}
	h.UDPSum = Sum(f[26:dst]) + Sum(pseudo) + Sum(f[udp:])
	return h
}

// Sum adds 16-bit words in native byte order, zero-padding the last one (RFC 1071).
func Sum(b []byte) (s uint64) {
	for ; len(b) > 1; b = b[2:] {
		s += uint64(binary.NativeEndian.Uint16(b))
	}
	if len(b) == 1 {
		s += uint64(binary.NativeEndian.Uint16([]byte{b[0], 0}))
	}
	return s
}

// Checksum is the complement of a sum, folded (RFC 1071).
func Checksum(s uint64) uint16 {
	for s>>16 != 0 {
		s = s&0xffff + s>>16
	}
	return ^uint16(s)
}
