package discover

import (
	"encoding/binary"
	"fmt"
	"net/netip"
)

// controlMessage is an IGMP or MLD message.
type controlMessage struct {
	vlan, outer uint16
	src, dst    netip.Addr
	ttl         uint8
	kind        Kind
	text        string
}

// parseControl parses an IGMP (RFC 1112, 2236, 3376) or MLD (RFC 2710, 3810) frame with up to two
// VLAN tags.
func parseControl(frame []byte) (m controlMessage, ok bool) {
	const ethernet, vlan = 14, 4
	if len(frame) < ethernet {
		return m, false
	}
	protocol, at := binary.BigEndian.Uint16(frame[12:]), ethernet
	for range 2 {
		if protocol != 0x8100 && protocol != 0x88a8 {
			break
		}
		if len(frame) < at+vlan {
			return m, false
		}
		m.outer, m.vlan = m.vlan, binary.BigEndian.Uint16(frame[at:])&0xfff
		protocol = binary.BigEndian.Uint16(frame[at+2:])
		at += vlan
	}
	switch protocol {
	case 0x0800:
		return m, m.ipv4(frame[at:])
	case 0x86dd:
		return m, m.ipv6(frame[at:])
	}
	return m, false
}

func (m *controlMessage) ipv4(ip []byte) bool {
	const header, igmp = 20, 2
	if len(ip) < header || ip[0]>>4 != 4 || ip[9] != igmp || binary.BigEndian.Uint16(ip[6:])&0x3fff != 0 {
		return false
	}
	length, total := int(ip[0]&0xf)*4, int(binary.BigEndian.Uint16(ip[2:]))
	if length < header || total > len(ip) || total < length+8 {
		return false
	}
	m.src, m.dst, m.ttl, m.kind = netip.AddrFrom4([4]byte(ip[12:16])), netip.AddrFrom4([4]byte(ip[16:20])), ip[8], IGMP
	body := ip[length:total]
	switch body[0] {
	case 0x11:
		m.text = queryText("IGMP", igmpVersion(body), netip.AddrFrom4([4]byte(body[4:8])))
	case 0x12:
		m.text = "IGMPv1 report"
	case 0x16:
		m.text = "IGMPv2 report"
	case 0x17:
		m.text = "IGMPv2 leave"
	case 0x22:
		m.text = "IGMPv3 report"
	default:
		m.text = fmt.Sprintf("message of type %#02x", body[0])
	}
	return true
}

// igmpVersion is the version of a query (RFC 3376 section 7.1).
func igmpVersion(query []byte) int {
	switch {
	case len(query) >= 12:
		return 3
	case query[1] == 0:
		return 1
	}
	return 2
}

func queryText(protocol string, version int, group netip.Addr) string {
	if group.IsUnspecified() {
		return fmt.Sprintf("%sv%d general query", protocol, version)
	}
	return fmt.Sprintf("%sv%d query for %s", protocol, version, group)
}

func (m *controlMessage) ipv6(ip []byte) bool {
	const header, hopByHop, icmpv6, mld = 40, 0, 58, 24
	if len(ip) < header || ip[0]>>4 != 6 {
		return false
	}
	next, end := ip[6], header+int(binary.BigEndian.Uint16(ip[4:]))
	if end > len(ip) {
		return false
	}
	body := ip[header:end]
	if next == hopByHop { // MLD carries the router alert
		if len(body) < 8 || (int(body[1])+1)*8 > len(body) {
			return false
		}
		next, body = body[0], body[(int(body[1])+1)*8:]
	}
	if next != icmpv6 || len(body) < 8 {
		return false
	}
	m.src, m.dst, m.ttl, m.kind = netip.AddrFrom16([16]byte(ip[8:24])), netip.AddrFrom16([16]byte(ip[24:40])), ip[7], MLD
	switch body[0] {
	case 130:
		if len(body) < mld {
			return false
		}
		version := 1
		if len(body) >= mld+4 {
			version = 2
		}
		m.text = queryText("MLD", version, netip.AddrFrom16([16]byte(body[8:24])))
	case 131:
		m.text = "MLDv1 report"
	case 132:
		m.text = "MLDv1 done"
	case 143:
		m.text = "MLDv2 report"
	default:
		return false // neighbour and router discovery: no groups to relay
	}
	return true
}
