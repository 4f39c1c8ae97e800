package discover

import (
	"bytes"
	"cmp"
	"compress/zlib"
	"encoding/binary"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Session is an announced session (RFC 2974, RFC 8866).
type Session struct {
	Interface string `json:"interface"`
	VLAN      uint16 `json:"vlan,omitempty"`
	OuterVLAN uint16 `json:"outer_vlan,omitempty"`
	Name      string `json:"name"`
	// Origin is the address of the announcer.
	Origin netip.Addr `json:"origin"`
	Media  []Media    `json:"media"`
}

// Media is one stream of a session.
type Media struct {
	Type  string     `json:"type"` // such as "audio"
	Group netip.Addr `json:"group"`
	Port  uint16     `json:"port"`
	// Source is the only sender to accept (RFC 4570); the zero Addr: any.
	Source netip.Addr `json:"source,omitzero"`
	Format string     `json:"format,omitempty"` // of the payload, such as "L24/48000/2"
}

const (
	// maxSDP bounds the size of a decompressed announcement, in bytes.
	maxSDP = 64 << 10
	// MaxSessions bounds the sessions kept of an interface, and maxMedia the media of each.
	MaxSessions = 10_000
	maxMedia    = 64
	// maxText bounds names, in bytes.
	maxText = 200
)

// announcement is a SAP packet.
type announcement struct {
	origin  netip.Addr
	hash    uint16
	deleted bool
	sdp     []byte
}

// parseSAP parses a SAP packet. ok is false for encrypted ones.
func parseSAP(b []byte) (a announcement, ok bool) {
	const version1, ipv6, deletion, encrypted, compressed = 1, 1 << 4, 1 << 2, 1 << 1, 1 << 0
	if len(b) < 8 || b[0]>>5 != version1 || b[0]&encrypted != 0 {
		return a, false
	}
	a.deleted, a.hash = b[0]&deletion != 0, binary.BigEndian.Uint16(b[2:])
	at := 4
	if b[0]&ipv6 == 0 {
		a.origin = netip.AddrFrom4([4]byte(b[4:8]))
		at += 4
	} else {
		if len(b) < 20 {
			return a, false
		}
		a.origin = netip.AddrFrom16([16]byte(b[4:20]))
		at += 16
	}
	if at += 4 * int(b[1]); at > len(b) { // authentication
		return a, false
	}
	payload := b[at:]
	if b[0]&compressed != 0 {
		z, err := zlib.NewReader(bytes.NewReader(payload))
		if err != nil {
			return a, false
		}
		if payload, err = io.ReadAll(io.LimitReader(z, maxSDP)); err != nil {
			return a, false
		}
	}
	if kind, rest, found := bytes.Cut(payload, []byte{0}); found && !bytes.HasPrefix(payload, []byte("v=0")) {
		if !strings.EqualFold(string(kind), "application/sdp") {
			return a, false
		}
		payload = rest
	}
	a.sdp = payload
	return a, bytes.HasPrefix(payload, []byte("v=0")) || a.deleted
}

// name is the session's name.
func (a *announcement) name() string {
	for line := range sdpLines(a.sdp) {
		if name, ok := strings.CutPrefix(line, "s="); ok {
			return clean(name)
		}
	}
	return ""
}

// clean makes text from the network safe for a terminal: at most maxText bytes of whole characters, which
// neither begin nor end with a space.
func clean(text string) string {
	text = strings.TrimSpace(strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 || r == '\ufffd' {
			return -1
		}
		return r
	}, strings.ToValidUTF8(text, "")))
	return strings.TrimSpace(strings.ToValidUTF8(text[:min(len(text), maxText)], "")) // it may have split a character
}

// sdpLines yields the lines of a session description.
func sdpLines(sdp []byte) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for line := range bytes.Lines(sdp) {
			if !yield(string(bytes.TrimRight(line, "\r\n\x00"))) {
				return
			}
		}
	}
}

// parseSDP reads the name and the multicast media of a session description (RFC 8866).
func parseSDP(sdp []byte) (name string, media []Media) {
	var session, own netip.Addr // connection addresses: of the session, and of the media
	var source netip.Addr
	var m *Media
	end := func() {
		if m == nil {
			return
		}
		if m.Group = session; own.IsValid() {
			m.Group = own
		}
		if !m.Source.IsValid() {
			m.Source = source
		}
		if m.Group.IsMulticast() && m.Port != 0 && len(media) < maxMedia {
			media = append(media, *m)
		}
		m, own = nil, netip.Addr{}
	}
	for line := range sdpLines(sdp) {
		kind, value, _ := strings.Cut(line, "=")
		switch kind {
		case "s":
			name = clean(value)
		case "c":
			if addr := connection(value); m != nil {
				own = addr
			} else {
				session = addr
			}
		case "m":
			end()
			m = parseMedia(value)
		case "a":
			if filter, ok := strings.CutPrefix(value, "source-filter:"); ok {
				if addr := sourceFilter(filter); m != nil {
					m.Source = addr
				} else {
					source = addr
				}
			}
			if format, ok := strings.CutPrefix(value, "rtpmap:"); ok && m != nil && m.Format == "" {
				_, m.Format, _ = strings.Cut(format, " ")
				m.Format = clean(m.Format)
			}
		}
	}
	end()
	return name, media
}

// parseMedia parses "audio 5004 RTP/AVP 97"; nil if malformed.
func parseMedia(value string) *Media {
	fields := strings.Fields(value)
	if len(fields) < 2 {
		return nil
	}
	port, _, _ := strings.Cut(fields[1], "/") // followed by the number of ports
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return nil
	}
	return &Media{Type: clean(fields[0]), Port: uint16(n)}
}

// connection reads "IN IP4 239.1.1.1/32" (RFC 8866 section 5.7).
func connection(value string) netip.Addr {
	fields := strings.Fields(value)
	if len(fields) != 3 || fields[0] != "IN" {
		return netip.Addr{}
	}
	text, _, _ := strings.Cut(fields[2], "/")
	return address(text)
}

// sourceFilter reads " incl IN IP4 239.1.1.1 10.0.0.5" with one source (RFC 4570).
func sourceFilter(value string) netip.Addr {
	fields := strings.Fields(value)
	if len(fields) != 5 || fields[0] != "incl" {
		return netip.Addr{}
	}
	if addr := address(fields[4]); !addr.IsMulticast() {
		return addr
	}
	return netip.Addr{}
}

func address(text string) netip.Addr {
	addr, err := netip.ParseAddr(text)
	if err != nil || addr.Zone() != "" || addr.Is4In6() || addr.IsUnspecified() {
		return netip.Addr{}
	}
	return addr
}

// sessionKey identifies an announcement (RFC 2974 section 6) and the VLANs that it arrived on.
type sessionKey struct {
	vlan, outer uint16
	origin      netip.Addr
	hash        uint16
}

// sessions are those announced on one interface.
type sessions struct {
	all    map[sessionKey]Session
	unkept uint64
}

// see records an announcement, or a deletion.
func (s *sessions) see(payload []byte, ifname string, vlan, outer uint16) {
	a, ok := parseSAP(payload)
	if !ok {
		return
	}
	k := sessionKey{vlan, outer, a.origin, a.hash}
	if a.deleted {
		delete(s.all, k)
		return
	}
	name, media := parseSDP(a.sdp)
	if s.all == nil {
		s.all = map[sessionKey]Session{}
	}
	if _, known := s.all[k]; !known && len(s.all) >= MaxSessions {
		s.unkept++
	} else {
		s.all[k] = Session{Interface: ifname, VLAN: vlan, OuterVLAN: outer, Name: name, Origin: a.origin, Media: media}
	}
}

func (s *sessions) list() []Session {
	list := make([]Session, 0, len(s.all))
	for _, session := range s.all {
		list = append(list, session)
	}
	slices.SortFunc(list, func(a, b Session) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), a.Origin.Compare(b.Origin), cmp.Compare(a.VLAN, b.VLAN), cmp.Compare(len(a.Media), len(b.Media)))
	})
	return list
}
