package rules

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Policy sets the header fields other than the destination. The zero value is the default: source
// address of the output interface, everything else kept.
type Policy struct {
	Source     SourcePolicy
	SourceAddr netip.Addr // only with SourceAddress
	SourcePort uint16     // UDP source port, host byte order; 0 keeps the packet's
	TTL        TTLPolicy
	TTLValue   uint8 // only with TTLSet: 1 to 255; the hop limit in IPv6
	DSCP       DSCPPolicy
	DSCPValue  uint8 // only with DSCPSet: 0 to 63, not shifted (RFC 2474 section 3)
	Checksum   ChecksumPolicy
	MinTTL     uint8 // packets that arrive with a lower TTL or hop limit are dropped; 0: none
	VLAN       VLANPolicy
	VLANTags   VLAN  // only with VLANSet
	PCPSet     bool  // write PCP into the tags; otherwise a copied tag keeps its own and a new one has 0
	PCP        uint8 // priority code point, 0 to 7 (IEEE 802.1Q)
	Broadcast  bool  // Output.Address is a broadcast address of the output's link: frames go to every host
	Rate       Rate
}

// VLANPolicy selects the VLAN tags of a copy.
type VLANPolicy uint8

// The VLAN policies.
const (
	VLANKeep VLANPolicy = iota // the packet's own
	VLANPop                    // no tags
	VLANSet                    // Policy.VLANTags, replacing the packet's
)

func (p VLANPolicy) String() string { return enumString("VLANPolicy", p, "keep", "pop", "set") }

// SourcePolicy selects the source address of a copy.
type SourcePolicy uint8

// The source policies.
const (
	SourceInterface SourcePolicy = iota // the output interface's first address of the family
	SourceKeep                          // the packet's own
	SourceAddress                       // Policy.SourceAddr
)

func (p SourcePolicy) String() string {
	return enumString("SourcePolicy", p, "iface", "keep", "address")
}

// TTLPolicy selects the TTL (hop limit in IPv6) of a copy.
type TTLPolicy uint8

// The TTL policies.
const (
	TTLKeep      TTLPolicy = iota // the packet's own
	TTLDecrement                  // the packet's, decremented
	TTLSet                        // Policy.TTLValue
)

func (p TTLPolicy) String() string { return enumString("TTLPolicy", p, "keep", "dec", "set") }

// DSCPPolicy selects the DSCP of a copy. The ECN bits are always kept.
type DSCPPolicy uint8

// The DSCP policies.
const (
	DSCPKeep DSCPPolicy = iota // the packet's own
	DSCPSet                    // Policy.DSCPValue
)

func (p DSCPPolicy) String() string { return enumString("DSCPPolicy", p, "keep", "set") }

// ChecksumPolicy selects the UDP checksum of a copy.
type ChecksumPolicy uint8

// The checksum policies.
const (
	ChecksumUpdate ChecksumPolicy = iota // updated incrementally; zero (no checksum) stays zero
	ChecksumZero                         // no checksum (RFC 768); IPv4 only
)

func (p ChecksumPolicy) String() string { return enumString("ChecksumPolicy", p, "update", "zero") }

// enumString names a value of an enumeration, or prints its number if it is not one.
func enumString[T ~uint8](kind string, v T, names ...string) string {
	if int(v) < len(names) {
		return names[v]
	}
	return fmt.Sprintf("%s(%d)", kind, uint8(v))
}

// parsePolicy parses what follows the first comma of an output.
func parsePolicy(s string) (Policy, error) {
	var p policyParser
	for item := range strings.SplitSeq(s, ",") {
		if err := p.item(item); err != nil {
			return Policy{}, err
		}
	}
	if p.Rate.Burst != 0 && !p.rate {
		return Policy{}, errBurstAlone(p.Rate.Burst)
	}
	return p.Policy, nil
}

// policyParser has the policy parsed so far and which of its keys were given.
type policyParser struct {
	Policy
	src, sport, ttl, minTTL, dscp, csum, vlan, pcp, broadcast, rate, burst bool
}

// item parses one KEY=VALUE.
func (p *policyParser) item(item string) error {
	key, value, _ := strings.Cut(item, "=")
	var seen *bool
	var want string
	switch key {
	case "src":
		seen, want = &p.src, p.setSource(value)
	case "sport":
		seen, want = &p.sport, p.setSourcePort(value)
	case "ttl":
		seen, want = &p.ttl, p.setTTL(value)
	case "dscp":
		seen, want = &p.dscp, p.setDSCP(value)
	case "csum":
		seen, want = &p.csum, p.setChecksum(value)
	case "minttl":
		seen, want = &p.minTTL, p.setMinTTL(value)
	case "vlan":
		seen, want = &p.vlan, p.setVLAN(value)
	case "pcp":
		seen, want = &p.pcp, p.setPCP(value)
	case "broadcast":
		seen, p.Broadcast, want = &p.broadcast, true, wantAllow(key, value)
	case "rate":
		seen, want = &p.rate, p.Rate.set(value)
	case "burst":
		seen, want = &p.burst, p.Rate.setBurst(value)
	default:
		return &FieldError{Field: "policy", Value: item, Want: "KEY=VALUE, KEY one of src, sport, ttl, minttl, dscp, csum, vlan, pcp, broadcast, rate, burst"}
	}
	return checkItem(item, key, seen, want, "policy")
}

// The setters below return what would be valid, or "" if they accepted the value.

func (p *policyParser) setSource(s string) (want string) {
	const usage = "src=iface, src=keep, src=ADDRESS or src=ADDRESS:PORT (IPv6: src=[ADDRESS]:PORT)"
	switch s {
	case "iface":
		p.Source = SourceInterface
		return ""
	case "keep":
		p.Source = SourceKeep
		return ""
	}
	host, port, hasPort := splitPort(s)
	addr, err := parseAddr("src", host)
	if err != nil || addr.Is4() && s[0] == '[' {
		return usage
	}
	p.Source, p.SourceAddr = SourceAddress, addr
	if !hasPort {
		return ""
	}
	if p.sport {
		return "the source port only once: sport has it"
	}
	n, ok := parseNumber(port, 1, 65535)
	if !ok {
		return usage + ", PORT 1 to 65535"
	}
	p.SourcePort = uint16(n)
	return ""
}

func (p *policyParser) setSourcePort(s string) (want string) {
	if p.SourcePort != 0 {
		return "the source port only once: it has been set"
	}
	if s == "keep" {
		return ""
	}
	n, ok := parseNumber(s, 1, 65535)
	if !ok {
		return "sport=keep or sport=1 to 65535"
	}
	p.SourcePort = uint16(n)
	return ""
}

func (p *policyParser) setTTL(s string) (want string) {
	switch s {
	case "keep":
		p.TTL = TTLKeep
		return ""
	case "dec":
		p.TTL = TTLDecrement
		return ""
	}
	n, ok := parseNumber(s, 1, 255)
	if !ok {
		return "ttl=keep, ttl=dec or ttl=1 to 255"
	}
	p.TTL, p.TTLValue = TTLSet, uint8(n)
	return ""
}

func (p *policyParser) setMinTTL(s string) (want string) {
	n, ok := parseNumber(s, 1, 255)
	if !ok {
		return "minttl=1 to 255"
	}
	p.MinTTL = uint8(n)
	return ""
}

func (p *policyParser) setVLAN(s string) (want string) {
	switch s {
	case "keep":
		p.VLAN = VLANKeep
		return ""
	case "pop":
		p.VLAN = VLANPop
		return ""
	}
	var ok bool
	if p.VLANTags, ok = parseVLAN(s); !ok {
		return "vlan=keep, vlan=pop, vlan=ID or vlan=OUTER.ID, each 1 to 4094"
	}
	p.VLAN = VLANSet
	return ""
}

func (p *policyParser) setPCP(s string) (want string) {
	n, ok := parseNumber(s, 0, 7)
	if !ok {
		return "pcp=0 to 7"
	}
	p.PCPSet, p.PCP = true, uint8(n)
	return ""
}

func (p *policyParser) setDSCP(s string) (want string) {
	if s == "keep" {
		p.DSCP = DSCPKeep
		return ""
	}
	n, ok := dscpByName(strings.ToLower(s))
	if !ok {
		n, ok = parseNumber(s, 0, 63)
	}
	if !ok {
		return "dscp=keep, dscp=0 to 63, or a name: be, cs0 to cs7, af11 to af43, ef, voice-admit, le"
	}
	p.DSCP, p.DSCPValue = DSCPSet, uint8(n)
	return ""
}

func (p *policyParser) setChecksum(s string) (want string) {
	switch s {
	case "update":
		p.Checksum = ChecksumUpdate
	case "zero":
		p.Checksum = ChecksumZero
	default:
		return "csum=update or csum=zero"
	}
	return ""
}

// dscpNames are the named code points other than the class selectors csN and the assured forwarding
// classes afXY.
var dscpNames = [...]struct {
	name  string
	value int
}{
	{"be", 0}, // the canonical name; cs0 and default are also parsed (RFC 2474 section 4.1)
	{"default", 0},
	{"le", 1},           // RFC 8622
	{"voice-admit", 44}, // RFC 5865
	{"ef", 46},          // RFC 3246
}

// dscpByName returns the code point of a lower-case name.
func dscpByName(s string) (int, bool) {
	for _, n := range dscpNames {
		if s == n.name {
			return n.value, true
		}
	}
	if len(s) == 3 && s[:2] == "cs" && s[2] >= '0' && s[2] <= '7' { // RFC 2474 section 4.2.2
		return int(s[2]-'0') << 3, true
	}
	if len(s) == 4 && s[:2] == "af" && s[2] >= '1' && s[2] <= '4' && s[3] >= '1' && s[3] <= '3' { // RFC 2597 section 6
		return int(s[2]-'0')<<3 | int(s[3]-'0')<<1, true
	}
	return 0, false
}

// dscpName is the canonical name of a code point, or its number.
func dscpName(v uint8) string {
	for _, n := range dscpNames {
		if int(v) == n.value {
			return n.name
		}
	}
	class, low := v>>3, v&7
	switch {
	case v > 63:
	case low == 0:
		return fmt.Sprintf("cs%d", class)
	case class >= 1 && class <= 4 && (low == 2 || low == 4 || low == 6):
		return fmt.Sprintf("af%d%d", class, low>>1)
	}
	return strconv.Itoa(int(v))
}

// appendPolicy appends the policies that are not the default, each preceded by a comma.
func appendPolicy(b []byte, p Policy) []byte {
	sport := p.SourcePort
	switch p.Source {
	case SourceInterface:
	case SourceAddress:
		b = append(b, ",src="...)
		if sport == 0 {
			b = p.SourceAddr.AppendTo(b)
		} else {
			b = netip.AddrPortFrom(p.SourceAddr, sport).AppendTo(b)
			sport = 0
		}
	default:
		b = append(append(b, ",src="...), p.Source.String()...)
	}
	if sport != 0 {
		b = strconv.AppendUint(append(b, ",sport="...), uint64(sport), 10)
	}
	switch p.TTL {
	case TTLKeep:
	case TTLSet:
		b = strconv.AppendUint(append(b, ",ttl="...), uint64(p.TTLValue), 10)
	default:
		b = append(append(b, ",ttl="...), p.TTL.String()...)
	}
	if p.DSCP == DSCPSet {
		b = append(append(b, ",dscp="...), dscpName(p.DSCPValue)...)
	} else if p.DSCP != DSCPKeep {
		b = append(append(b, ",dscp="...), p.DSCP.String()...)
	}
	if p.Checksum != ChecksumUpdate {
		b = append(append(b, ",csum="...), p.Checksum.String()...)
	}
	if p.MinTTL != 0 {
		b = strconv.AppendUint(append(b, ",minttl="...), uint64(p.MinTTL), 10)
	}
	switch p.VLAN {
	case VLANKeep:
	case VLANSet:
		b = append(append(b, ",vlan="...), p.VLANTags.String()...)
	default:
		b = append(append(b, ",vlan="...), p.VLAN.String()...)
	}
	if p.PCPSet {
		b = strconv.AppendUint(append(b, ",pcp="...), uint64(p.PCP), 10)
	}
	if p.Broadcast {
		b = append(b, ",broadcast=allow"...)
	}
	return appendRate(b, p.Rate)
}
