package traffic

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
)

// The payload of a numbered packet. All integers are big endian.
//
//	offset size
//	     0    4 magic, "XDPC"
//	     4    1 version, 1
//	     5    1 zero
//	     6    2 length of the whole UDP payload, this header included
//	     8    8 stream: random for each run of a sender
//	    16    8 sequence number, from 0 for each flow
//	    24    8 send time, CLOCK_REALTIME, nanoseconds since 1970-01-01 UTC
//	    32    4 flow: which of the sender's groups, from 0
//	    36    4 CRC-32C (RFC 3720, appendix B.4) of bytes 0 to 35
//	    40    - fill
//
// Byte i of the fill is the top byte of (sequence mod 4096 + i) *
// 0x9e3779b97f4a7c15 mod 2^64, so a receiver can tell every one of them.
//
// The send time is CLOCK_REALTIME, not a monotonic clock, so that two hosts
// whose clocks PTP or NTP holds together can measure the way between them.
const (
	magic   = 0x58445043
	version = 1

	// HeaderLen is the length of the header, in bytes: the smallest payload.
	HeaderLen = 40
	// MaxPayload is the largest UDP payload that fits an IPv4 packet without
	// options (RFC 768, RFC 791): 65535 less 20 and 8.
	MaxPayload = 65507

	fillPeriod = 4096
	fillFactor = 0x9e3779b97f4a7c15
)

// What can be wrong with a payload. Decode returns these values themselves.
var (
	// ErrForeign: the payload is not one of ours.
	ErrForeign = errors.New("not a numbered packet")
	// ErrVersion: the payload is intact and of a version that is not known here.
	ErrVersion = errors.New("numbered packet of another version")
	// ErrCorrupt: the payload is one of ours and was changed or cut on the way.
	ErrCorrupt = errors.New("corrupt numbered packet")
)

// castagnoli and pattern are written once, here, and only read afterwards.
var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	pattern    = makePattern()
)

func makePattern() []byte {
	p := make([]byte, fillPeriod+MaxPayload)
	for i := range p {
		p[i] = byte(uint64(i) * fillFactor >> 56)
	}
	return p
}

// fill returns the n bytes that follow the header of packet seq. They belong
// to the pattern and must not be written.
func fill(seq uint64, n int) []byte {
	start := int(seq % fillPeriod)
	return pattern[start : start+n]
}

// Header is what a numbered packet says of itself.
type Header struct {
	// Stream tells runs of a sender apart.
	Stream uint64
	// Seq numbers the packets of one flow from 0.
	Seq uint64
	// SentAt is CLOCK_REALTIME in nanoseconds since 1970-01-01 UTC.
	SentAt int64
	// Flow is the number of the group within the sender's groups.
	Flow uint32
}

// Encode fills the whole of b with the packet that h describes. The length of
// b must be HeaderLen to MaxPayload.
func Encode(b []byte, h Header) {
	binary.BigEndian.PutUint32(b, magic)
	b[4], b[5] = version, 0
	binary.BigEndian.PutUint16(b[6:], uint16(len(b)))
	binary.BigEndian.PutUint64(b[8:], h.Stream)
	binary.BigEndian.PutUint64(b[16:], h.Seq)
	binary.BigEndian.PutUint64(b[24:], uint64(h.SentAt))
	binary.BigEndian.PutUint32(b[32:], h.Flow)
	binary.BigEndian.PutUint32(b[36:], crc32.Checksum(b[:36], castagnoli))
	copy(b[HeaderLen:], fill(h.Seq, len(b)-HeaderLen))
}

// Decode reads and verifies a whole payload. The error is ErrForeign,
// ErrVersion, ErrCorrupt or nil; with an error the header is zero. It accepts
// exactly what Encode makes, and keeps no reference to b.
func Decode(b []byte) (Header, error) {
	if len(b) < 4 || binary.BigEndian.Uint32(b) != magic {
		return Header{}, ErrForeign
	}
	if len(b) < HeaderLen || crc32.Checksum(b[:36], castagnoli) != binary.BigEndian.Uint32(b[36:]) {
		return Header{}, ErrCorrupt
	}
	if b[4] != version {
		return Header{}, ErrVersion
	}
	h := Header{
		Stream: binary.BigEndian.Uint64(b[8:]),
		Seq:    binary.BigEndian.Uint64(b[16:]),
		SentAt: int64(binary.BigEndian.Uint64(b[24:])),
		Flow:   binary.BigEndian.Uint32(b[32:]),
	}
	// Checked first: it also bounds the fill to the pattern.
	if len(b) > MaxPayload || int(binary.BigEndian.Uint16(b[6:])) != len(b) || b[5] != 0 {
		return Header{}, ErrCorrupt
	}
	if !bytes.Equal(b[HeaderLen:], fill(h.Seq, len(b)-HeaderLen)) {
		return Header{}, ErrCorrupt
	}
	return h, nil
}
