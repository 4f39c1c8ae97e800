package traffic

import (
	"encoding/binary"
	"fmt"

	"xdpcast/pkg/rules"
)

// Numbering is the format of an additional sequence number for other receivers, such as a rule that
// merges. The zero Numbering is none: the payload begins with our own header.
//
// Our header follows the format's header:
//
//	rtp        12 bytes, RFC 3550 section 5.1
//	rfc4175    20 bytes: and the payload header of RFC 4175 section 4.2, of one line
//	moldudp64  22 bytes: session, number, count 1, and the length of the message
//	pitch       8 bytes: the sequenced unit header, of one message
//	mdp3       12 bytes: number and sending time
//	field      up to the end of the number, or of the count where that is behind it
type Numbering struct{ merge rules.Merge }

const (
	rtpHeader     = 12
	rfc4175Header = 20
	moldHeader    = 20
	pitchHeader   = 8
	mdp3Header    = 12

	rtpPayloadType = 96    // the first dynamic one, RFC 3551 section 6
	rtpClock       = 90000 // Hz
)

// ParseNumbering parses a format as in merge= of a rule, without options.
func ParseNumbering(s string) (Numbering, error) {
	m, err := rules.ParseMerge(s)
	if err != nil {
		return Numbering{}, fmt.Errorf("numbers: %w", err)
	}
	n := Numbering{m}
	f := m.Field
	switch {
	case m != rules.Merge{Format: m.Format, Field: f}:
		return Numbering{}, fmt.Errorf("numbers %q: must be a format without options", s)
	case m.Format == rules.MergeByField && f.Bytes != 2 && f.Bytes != 4 && f.Bytes != 8:
		return Numbering{}, fmt.Errorf("numbers %q: must have 2, 4 or 8 bytes", s)
	case m.Format == rules.MergeByField && f.CountBytes > 2:
		return Numbering{}, fmt.Errorf("numbers %q: the count must have 1 or 2 bytes", s)
	case f.CountBytes > 0 && f.Offset < f.CountOffset+uint16(f.CountBytes) && f.CountOffset < f.Offset+uint16(f.Bytes):
		return Numbering{}, fmt.Errorf("numbers %q: the count must be outside the number", s)
	case n.headerLen() > MaxPayload-HeaderLen:
		return Numbering{}, fmt.Errorf("numbers %q: must be within the first %d bytes", s, MaxPayload-HeaderLen)
	}
	return n, nil
}

// String formats the numbering as ParseNumbering parses it; the zero Numbering is empty.
func (n Numbering) String() string { return n.merge.String() }

// headerLen is the number of bytes before our own header.
func (n Numbering) headerLen() int {
	switch n.merge.Format {
	case rules.MergeNone:
		return 0
	case rules.MergeRTP:
		return rtpHeader
	case rules.MergeRFC4175:
		return rfc4175Header
	case rules.MergeMoldUDP64:
		return moldHeader + 2
	case rules.MergePitch:
		return pitchHeader
	case rules.MergeMDP3:
		return mdp3Header
	}
	f := n.merge.Field
	return max(int(f.Offset)+int(f.Bytes), int(f.CountOffset)+int(f.CountBytes))
}

// bits is the length of a number.
func (n Numbering) bits() uint {
	switch n.merge.Format {
	case rules.MergeRTP:
		return 16
	case rules.MergeMoldUDP64:
		return 64
	case rules.MergeByField:
		return 8 * uint(n.merge.Field.Bytes)
	}
	return 32
}

func (n Numbering) mask() uint64 { return 1<<n.bits() - 1 } // also for 64 bits: the shift gives 0

// put fills all of b with a packet, numbered first + h.Seq.
func (n Numbering) put(b []byte, h Header, first uint64) {
	p, number := b[n.headerLen():], first+h.Seq
	Encode(p, h)
	switch n.merge.Format {
	case rules.MergeRTP, rules.MergeRFC4175:
		b[0], b[1] = 2<<6, rtpPayloadType
		binary.BigEndian.PutUint16(b[2:], uint16(number))
		seconds, ns := uint64(h.SentAt)/1e9, uint64(h.SentAt)%1e9
		binary.BigEndian.PutUint32(b[4:], uint32(seconds*rtpClock+ns*rtpClock/1e9))
		binary.BigEndian.PutUint32(b[8:], uint32(session(h)))
		if n.merge.Format == rules.MergeRTP {
			return
		}
		binary.BigEndian.PutUint16(b[12:], uint16(number>>16))
		binary.BigEndian.PutUint16(b[14:], uint16(len(p)))
		clear(b[16:rfc4175Header]) // the first line, from its beginning
	case rules.MergeMoldUDP64:
		putHex(b[:10], session(h))
		binary.BigEndian.PutUint64(b[10:], number)
		binary.BigEndian.PutUint16(b[18:], 1)
		binary.BigEndian.PutUint16(b[20:], uint16(len(p)))
	case rules.MergePitch:
		binary.LittleEndian.PutUint16(b, uint16(len(b)))
		b[2], b[3] = 1, 1
		binary.LittleEndian.PutUint32(b[4:], uint32(number))
	case rules.MergeMDP3:
		binary.LittleEndian.PutUint32(b, uint32(number))
		binary.LittleEndian.PutUint64(b[4:], uint64(h.SentAt))
	case rules.MergeByField:
		f := n.merge.Field
		clear(b[:n.headerLen()])
		putField(b[f.Offset:], number, f.Bytes, f.Little)
		putField(b[f.CountOffset:], 1, f.CountBytes, f.Little)
	}
}

// session identifies a sender and one of its flows.
func session(h Header) uint64 { return h.Stream + uint64(h.Flow)*fillFactor }

// putHex fills b with the lower hexadecimal digits of v.
func putHex(b []byte, v uint64) {
	const digits = "0123456789ABCDEF"
	for i := len(b) - 1; i >= 0; i-- {
		b[i] = digits[v&0xf]
		v >>= 4
	}
}

func putField(b []byte, v uint64, width uint8, little bool) {
	for i := range int(width) {
		at := i
		if !little {
			at = int(width) - 1 - i
		}
		b[at] = byte(v >> (8 * i))
	}
}

func field(b []byte, offset uint16, width uint8, little bool) (v uint64) {
	for i := range int(width) {
		at := int(width) - 1 - i
		if !little {
			at = i
		}
		v = v<<8 | uint64(b[int(offset)+at])
	}
	return v
}

// numbered is the content of the format's header of a packet.
type numbered struct {
	session, number uint64
	count           int // sequence numbers that the packet takes
}

// read parses the number of any sender's packet. It returns false for packets without one, such as
// heartbeats and RTCP.
func (n Numbering) read(b []byte) (numbered, bool) {
	out := numbered{count: 1}
	switch f := n.merge.Field; n.merge.Format {
	case rules.MergeRTP, rules.MergeRFC4175:
		// RTCP on the port: RFC 5761, section 4.
		if len(b) < rtpHeader || b[0]>>6 != 2 || b[1] >= 192 && b[1] <= 223 {
			return out, false
		}
		out.session, out.number = uint64(binary.BigEndian.Uint32(b[8:])), uint64(binary.BigEndian.Uint16(b[2:]))
		if n.merge.Format == rules.MergeRTP {
			return out, true
		}
		at := rtpHeader + 4*int(b[0]&0xf)
		if b[0]&0x10 != 0 {
			if len(b) < at+4 {
				return out, false
			}
			at += 4 + 4*int(binary.BigEndian.Uint16(b[at+2:]))
		}
		if len(b) < at+2 {
			return out, false
		}
		out.number |= uint64(binary.BigEndian.Uint16(b[at:])) << 16
	case rules.MergeMoldUDP64:
		if len(b) < moldHeader {
			return out, false
		}
		out.count = int(binary.BigEndian.Uint16(b[18:]))
		if out.count == 0xffff { // end of the session
			return out, false
		}
		out.session = binary.BigEndian.Uint64(b[2:]) + fillFactor*uint64(binary.BigEndian.Uint16(b))
		out.number = binary.BigEndian.Uint64(b[10:])
	case rules.MergePitch:
		if len(b) < pitchHeader {
			return out, false
		}
		out.count, out.number = int(b[2]), uint64(binary.LittleEndian.Uint32(b[4:]))
	case rules.MergeMDP3:
		if len(b) < mdp3Header {
			return out, false
		}
		out.number = uint64(binary.LittleEndian.Uint32(b))
	default:
		if len(b) < n.headerLen() {
			return out, false
		}
		out.number = field(b, f.Offset, f.Bytes, f.Little)
		if f.CountBytes > 0 {
			out.count = int(field(b, f.CountOffset, f.CountBytes, f.Little))
		}
	}
	return out, out.count > 0
}
