package discover

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
)

// Kind is what a stream looks like.
type Kind string

// The kinds.
const (
	Unknown   Kind = "unknown"
	RTP       Kind = "rtp"       // RFC 3550
	RTCP      Kind = "rtcp"      // RFC 3550 section 6
	MPEGTS    Kind = "mpeg-ts"   // ISO/IEC 13818-1, in UDP or in RTP
	SAP       Kind = "sap"       // RFC 2974
	MoldUDP64 Kind = "moldudp64" // Nasdaq's MoldUDP64 1.00
	PTP       Kind = "ptp"       // IEEE 1588
	IGMP      Kind = "igmp"      // RFC 1112, 2236, 3376
	MLD       Kind = "mld"       // RFC 2710, 3810
)

// Looks is what a stream's payload looks like.
type Looks struct {
	Kind Kind `json:"kind"`
	// PayloadType and SSRC are RTP's.
	PayloadType *uint8  `json:"payload_type,omitempty"`
	SSRC        *uint32 `json:"ssrc,omitempty"`
	// Programs are the program numbers in a transport stream's program association table.
	Programs []uint16 `json:"programs,omitempty"`
	// Session is MoldUDP64's session, or the name announced by SAP.
	Session string `json:"session,omitempty"`
	// Message is PTP's version, domain and message type, or describes the last IGMP or MLD message.
	Message string `json:"message,omitempty"`
}

// String formats Looks as one line for people.
func (l Looks) String() string {
	parts := []string{string(l.Kind)}
	if l.PayloadType != nil {
		if l.Kind == MPEGTS {
			parts = append(parts, "in rtp")
		}
		parts = append(parts, fmt.Sprintf("payload type %d, ssrc %08x", *l.PayloadType, *l.SSRC))
	}
	if len(l.Programs) > 0 {
		word := "program"
		if len(l.Programs) > 1 {
			word = "programs"
		}
		parts = append(parts, word, strings.Trim(fmt.Sprint(l.Programs), "[]"))
	}
	if l.Session != "" {
		parts = append(parts, fmt.Sprintf("%q", l.Session))
	}
	if l.Message != "" {
		parts = append(parts, l.Message)
	}
	return strings.Join(parts, " ")
}

// identity accumulates, packet by packet, what a stream is.
type identity struct {
	kind     Kind
	rtp      rtpHeader
	rtpRuns  int // consecutive packets with one SSRC and increasing sequence numbers
	programs []uint16
	session  string
	message  string
}

const (
	// rtpSure is how many consecutive packets identify RTP: the two version bits alone are too few.
	rtpSure = 3
	// lookAt is how many packets of a stream are inspected; later ones only of transport streams
	// still without a table, and of announcements.
	lookAt = 64
	// maxLook also bounds the search for a table.
	maxLook = 20_000
	// maxPrograms bounds the programs kept of a table.
	maxPrograms = 64
)

// Ports from IANA's registry.
const (
	portPTPEvent, portPTPGeneral = 319, 320
	portSAP                      = 9875
)

// see inspects the payload of the n-th packet of a stream, counting from 1.
func (id *identity) see(payload []byte, port uint16, n uint64) {
	if n > lookAt && (id.kind != MPEGTS || len(id.programs) > 0 || n > maxLook) && id.kind != SAP {
		return
	}
	switch {
	case port == portPTPEvent || port == portPTPGeneral:
		if text, ok := parsePTP(payload); ok {
			id.kind, id.message = PTP, text
		}
	case port == portSAP:
		if s, ok := parseSAP(payload); ok {
			id.kind = SAP
			id.session = s.name()
		}
	case id.ts(payload):
		id.kind = MPEGTS
	case isRTCP(payload):
		id.kind = RTCP
	case id.isRTP(payload): // sets the kind after rtpSure packets
	case id.kind == "" || id.kind == MoldUDP64:
		if session, ok := parseMoldUDP64(payload); ok {
			id.kind, id.session = MoldUDP64, session
		}
	}
}

// isRTP tracks the sequence numbers of RTP packets.
func (id *identity) isRTP(payload []byte) bool {
	h, body, ok := parseRTP(payload)
	if !ok {
		id.rtpRuns = 0
		return false
	}
	// Lost packets leave gaps, so accept any slightly larger number.
	if id.rtpRuns > 0 && h.ssrc == id.rtp.ssrc && h.payloadType == id.rtp.payloadType && h.sequence-id.rtp.sequence-1 < 100 {
		id.rtpRuns++
	} else {
		id.rtpRuns = 1
	}
	id.rtp = h
	if id.rtpRuns < rtpSure {
		return id.kind == RTP
	}
	if id.kind == "" || id.kind == MoldUDP64 {
		id.kind = RTP
	}
	if id.ts(body) {
		id.kind = MPEGTS
	}
	return true
}

// ts looks for transport stream packets and their program association table.
func (id *identity) ts(payload []byte) bool {
	if !isTS(payload) {
		return false
	}
	for ; len(payload) >= tsLen; payload = payload[tsLen:] {
		for _, p := range programsOf(payload[:tsLen]) {
			if !slices.Contains(id.programs, p) && len(id.programs) < maxPrograms {
				id.programs = append(id.programs, p)
			}
		}
	}
	return true
}

// control records an IGMP or MLD message.
func (id *identity) control(m controlMessage) { id.kind, id.message = m.kind, m.text }

func (id *identity) looks() Looks {
	l := Looks{Kind: id.kind, Session: id.session, Message: id.message}
	if l.Kind == "" {
		l.Kind = Unknown
	}
	if id.rtpRuns >= rtpSure && (id.kind == RTP || id.kind == MPEGTS) {
		l.PayloadType, l.SSRC = &id.rtp.payloadType, &id.rtp.ssrc
	}
	if id.kind == MPEGTS {
		l.Programs = slices.Sorted(slices.Values(id.programs))
	}
	return l
}

// rtpHeader has fields of the fixed header of RFC 3550 section 5.1.
type rtpHeader struct {
	payloadType uint8
	sequence    uint16
	ssrc        uint32
}

// parseRTP parses the header, and returns what follows it, without padding.
func parseRTP(b []byte) (h rtpHeader, body []byte, ok bool) {
	const fixed = 12
	if len(b) < fixed || b[0]>>6 != 2 {
		return h, nil, false
	}
	h = rtpHeader{b[1] & 0x7f, binary.BigEndian.Uint16(b[2:]), binary.BigEndian.Uint32(b[8:])}
	if h.payloadType >= 72 && h.payloadType <= 76 { // RTCP (RFC 5761 section 4)
		return h, nil, false
	}
	length := fixed + 4*int(b[0]&0xf)
	if b[0]&0x10 != 0 { // an extension
		if len(b) < length+4 {
			return h, nil, false
		}
		length += 4 + 4*int(binary.BigEndian.Uint16(b[length+2:]))
	}
	end := len(b)
	if b[0]&0x20 != 0 { // padding
		end -= int(b[len(b)-1])
	}
	if length > end {
		return h, nil, false
	}
	return h, b[length:end], true
}

// isRTCP reports whether a payload consists of whole RTCP packets, the first of which is a report
// (section 6.4).
func isRTCP(b []byte) bool {
	const header, senderReport, receiverReport = 4, 200, 201
	if len(b) < 2*header || b[1] != senderReport && b[1] != receiverReport {
		return false
	}
	for len(b) >= header && b[0]>>6 == 2 && b[1] >= senderReport {
		length := header * (1 + int(binary.BigEndian.Uint16(b[2:])))
		if length > len(b) {
			return false
		}
		b = b[length:]
	}
	return len(b) == 0
}

// tsLen is the length of a transport stream packet (ISO/IEC 13818-1 section 2.4.3.2).
const tsLen, tsSync = 188, 0x47

// isTS reports whether a payload consists of whole transport stream packets.
func isTS(b []byte) bool {
	if len(b) < tsLen || len(b)%tsLen != 0 {
		return false
	}
	for i := 0; i < len(b); i += tsLen {
		if b[i] != tsSync {
			return false
		}
	}
	return true
}

// programsOf parses the program association table that begins in a transport stream packet (section
// 2.4.4.3); nil if there is none or it is incomplete.
func programsOf(p []byte) (programs []uint16) {
	const patPID = 0
	begins, pid := p[1]&0x40 != 0, binary.BigEndian.Uint16(p[1:])&0x1fff
	if p[1]&0x80 != 0 || !begins || pid != patPID || p[3]&0x10 == 0 {
		return nil
	}
	at := 4
	if p[3]&0x20 != 0 { // an adaptation field
		at += 1 + int(p[4])
	}
	if at >= len(p) {
		return nil
	}
	at += 1 + int(p[at]) // the pointer field
	if at+8 > len(p) || p[at] != 0 {
		return nil
	}
	section := p[at:]
	length := 3 + int(binary.BigEndian.Uint16(section[1:])&0x0fff)
	if length < 12 || length > len(section) || crcMPEG(section[:length]) != 0 {
		return nil
	}
	for entries := section[8 : length-4]; len(entries) >= 4; entries = entries[4:] {
		if n := binary.BigEndian.Uint16(entries); n != 0 { // 0 is the network information table
			programs = append(programs, n)
		}
	}
	return programs
}

// crcMPEG is the CRC of annex A, which is 0 over a section that includes its own.
func crcMPEG(b []byte) uint32 {
	crc := uint32(0xffffffff)
	for _, v := range b {
		crc ^= uint32(v) << 24
		for range 8 {
			if crc&0x80000000 != 0 {
				crc = crc<<1 ^ 0x04c11db7
			} else {
				crc <<= 1
			}
		}
	}
	return crc
}

// parseMoldUDP64 parses a downstream packet: session, sequence number, count, and that many
// messages with their lengths, which must fill it exactly.
func parseMoldUDP64(b []byte) (session string, ok bool) {
	const header, heartbeat, endOfSession = 20, 0, 0xffff
	if len(b) < header || binary.BigEndian.Uint64(b[10:]) == 0 {
		return "", false
	}
	for _, c := range b[:10] {
		if c < ' ' || c > '~' {
			return "", false
		}
	}
	count, rest := binary.BigEndian.Uint16(b[18:]), b[header:]
	if count != endOfSession {
		for range count {
			if len(rest) < 2 {
				return "", false
			}
			n := int(binary.BigEndian.Uint16(rest))
			if n > len(rest)-2 {
				return "", false
			}
			rest = rest[2+n:]
		}
	}
	if len(rest) != 0 {
		return "", false
	}
	session = strings.TrimSpace(string(b[:10]))
	return session, session != ""
}

// ptpMessages are the message types of IEEE 1588-2019 table 36.
var ptpMessages = map[byte]string{
	0: "sync", 1: "delay request", 2: "peer delay request", 3: "peer delay response", 8: "follow-up", 9: "delay response",
	10: "peer delay follow-up", 11: "announce", 12: "signaling", 13: "management",
}

// parsePTP parses the common header of section 13.3, or only recognizes version 1.
func parsePTP(b []byte) (text string, ok bool) {
	const header = 34
	if len(b) < header {
		return "", false
	}
	switch version := b[1] & 0xf; version {
	case 1:
		return "version 1", true
	case 2:
		message, known := ptpMessages[b[0]&0xf]
		length := int(binary.BigEndian.Uint16(b[2:]))
		return fmt.Sprintf("version 2, domain %d, %s", b[4], message), known && length >= header && length <= len(b)
	}
	return "", false
}
