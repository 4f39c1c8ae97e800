package rules

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// parseOptions parses what follows the first comma of an input. It sets the options that belong to
// the input itself in in, and returns the rest.
func parseOptions(s string, in *Input) (Acceptance, error) {
	var p optionParser
	for item := range strings.SplitSeq(s, ",") {
		if err := p.item(item); err != nil {
			return Acceptance{}, err
		}
	}
	if p.x.Rate.Burst != 0 && !p.rate {
		return Acceptance{}, errBurstAlone(p.x.Rate.Burst)
	}
	in.VLAN, in.FromHost = p.vlan, p.from
	return p.Acceptance.with(p.x), nil
}

func errBurstAlone(burst uint64) error {
	return &FieldError{Field: "burst", Value: strconv.FormatUint(burst, 10), Want: "rate=Npps or rate=Nbit, too"}
}

// optionParser has the options parsed so far and which of their keys were given.
type optionParser struct {
	Acceptance
	x                                                                                                   Extra // of Acceptance
	vlan                                                                                                VLAN
	hasVLAN, from, join, except, csum, loop, guard, local, localControl, broadcast, rate, burst, health bool
}

// item parses one KEY=VALUE.
func (p *optionParser) item(item string) error {
	key, value, _ := strings.Cut(item, "=")
	var seen *bool
	var want string
	switch key {
	case "vlan":
		seen, want = &p.hasVLAN, p.setVLAN(value)
	case "from":
		seen = &p.from
		if value != "host" {
			want = "from=host"
		}
	case "join":
		seen, want = &p.join, p.setJoin(value)
	case "except":
		seen, want = &p.except, p.setExcept(value)
	case "csum":
		seen, p.ZeroChecksum = &p.csum, true
		if value != "any" {
			want = "csum=any"
		}
	case "loop":
		seen, want = &p.loop, p.setLoop(value)
	case "loop-guard":
		seen, p.Unguarded = &p.guard, true
		if value != "off" {
			want = "loop-guard=off"
		}
	case "local":
		seen, p.Local = &p.local, true
		if value != "yes" {
			want = "local=yes"
		}
	case "local-control":
		seen, p.LocalControl, want = &p.localControl, true, wantAllow(key, value)
	case "broadcast":
		seen, p.Broadcast, want = &p.broadcast, true, wantAllow(key, value)
	case "rate":
		seen, want = &p.rate, p.x.Rate.set(value)
	case "burst":
		seen, want = &p.burst, p.x.Rate.setBurst(value)
	case "health":
		seen, want = &p.health, p.x.Health.set(value)
	default:
		return &FieldError{Field: "option", Value: item, Want: "KEY=VALUE, KEY one of vlan, from, join, except, csum, loop, loop-guard, local, local-control, broadcast, rate, burst, health"}
	}
	return checkItem(item, key, seen, want, "option")
}

// wantAllow checks a key whose only value is allow.
func wantAllow(key, value string) (want string) {
	if value != "allow" {
		return key + "=allow"
	}
	return ""
}

// checkItem refuses a repeated key or a wrong value.
func checkItem(item, key string, seen *bool, want, field string) error {
	if *seen {
		want = key + " only once"
	}
	*seen = true
	if want != "" {
		return &FieldError{Field: field, Value: item, Want: want}
	}
	return nil
}

func (p *optionParser) setVLAN(s string) (want string) {
	var ok bool
	if p.vlan, ok = parseVLAN(s); !ok {
		return "vlan=ID or vlan=OUTER.ID, each 1 to 4094"
	}
	return ""
}

func (p *optionParser) setLoop(s string) (want string) {
	switch s {
	case "two-way":
		p.TwoWay = true
	case "allow":
		p.AllowLoop = true
	default:
		return "loop=two-way or loop=allow"
	}
	return ""
}

func (p *optionParser) setJoin(s string) (want string) {
	switch s {
	case "none":
		p.Join = JoinNone
		return ""
	case "all":
		p.Join = JoinAll
		return ""
	}
	p.Join = JoinList
	for group := range strings.SplitSeq(s, "+") {
		addr, err := netip.ParseAddr(group)
		if err != nil || addrFormFault(addr) != "" {
			return "join=none, join=all or join=GROUP+GROUP..."
		}
		p.x.Groups = append(p.x.Groups, addr)
	}
	return ""
}

// maxVLAN is the highest VLAN identifier: 4095 is reserved (IEEE 802.1Q section 9.6).
const maxVLAN = 4094

// parseVLAN parses ID or OUTER.ID.
func parseVLAN(s string) (v VLAN, ok bool) {
	outer, id, double := strings.Cut(s, ".")
	if !double {
		outer, id = "", s
	}
	n, ok := parseNumber(id, 1, maxVLAN)
	if !ok {
		return VLAN{}, false
	}
	v.ID = uint16(n)
	if double {
		if n, ok = parseNumber(outer, 1, maxVLAN); !ok {
			return VLAN{}, false
		}
		v.Outer = uint16(n)
	}
	return v, true
}

// String is ID or OUTER.ID.
func (v VLAN) String() string {
	if v.Outer == 0 {
		return strconv.Itoa(int(v.ID))
	}
	return fmt.Sprintf("%d.%d", v.Outer, v.ID)
}

func (p JoinPolicy) String() string {
	return enumString("JoinPolicy", p, "default", "none", "all", "list")
}

// appendAcceptance appends the options that are not the default, each preceded by a comma.
func appendAcceptance(b []byte, a Acceptance) []byte {
	switch a.Join {
	case JoinDefault:
	case JoinList:
		b = append(b, ",join="...)
		for i, g := range a.Groups() {
			if i > 0 {
				b = append(b, '+')
			}
			b = g.AppendTo(b)
		}
	default:
		b = append(append(b, ",join="...), a.Join.String()...)
	}
	b = appendExcept(b, a.Except())
	if a.ZeroChecksum {
		b = append(b, ",csum=any"...)
	}
	if a.AllowLoop {
		b = append(b, ",loop=allow"...)
	} else if a.TwoWay { // implied by loop=allow
		b = append(b, ",loop=two-way"...)
	}
	if a.Unguarded {
		b = append(b, ",loop-guard=off"...)
	}
	if a.Local {
		b = append(b, ",local=yes"...)
	}
	if a.LocalControl {
		b = append(b, ",local-control=allow"...)
	}
	if a.Broadcast {
		b = append(b, ",broadcast=allow"...)
	}
	b = appendRate(b, a.Rate())
	if h := a.Health(); h != (Health{}) {
		b = append(append(b, ",health="...), h.String()...)
	}
	return b
}

// units are the multipliers of a rate or burst, the largest first.
var units = [...]struct {
	suffix string
	factor uint64
}{{"G", 1e9}, {"M", 1e6}, {"k", 1e3}, {"", 1}}

// maxRate is a limit far above any real rate or burst: 1 Pbit/s.
const maxRate = 1e15

// parseCount parses a number with an optional suffix k, M or G.
func parseCount(s string) (uint64, bool) {
	factor := uint64(1)
	for _, u := range units {
		if rest, ok := strings.CutSuffix(s, u.suffix); ok {
			s, factor = rest, u.factor
			break
		}
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || len(s) > 1 && s[0] == '0' || s[0] == '+' || n == 0 || n > maxRate/factor {
		return 0, false
	}
	return n * factor, true
}

func appendCount(b []byte, n uint64) []byte {
	for _, u := range units {
		if n >= u.factor && n%u.factor == 0 {
			return append(strconv.AppendUint(b, n/u.factor, 10), u.suffix...)
		}
	}
	return append(b, '0')
}

func (r *Rate) set(s string) (want string) {
	const usage = "rate=Npps or rate=Nbit, N a number, or one with k, M or G (rate=100kpps, rate=50Mbit)"
	if count, ok := strings.CutSuffix(s, "pps"); ok {
		if r.Packets, ok = parseCount(count); ok {
			return ""
		}
	} else if count, ok := strings.CutSuffix(s, "bit"); ok {
		if r.Bits, ok = parseCount(count); ok {
			return ""
		}
	}
	return usage
}

func (r *Rate) setBurst(s string) (want string) {
	var ok bool
	if r.Burst, ok = parseCount(s); !ok {
		return "burst=N, packets or bytes as the rate is of packets or bits, N a number, or one with k, M or G"
	}
	return ""
}

// appendRate appends a rate and its burst, each preceded by a comma.
func appendRate(b []byte, r Rate) []byte {
	switch {
	case r.Packets != 0:
		b = append(appendCount(append(b, ",rate="...), r.Packets), "pps"...)
	case r.Bits != 0:
		b = append(appendCount(append(b, ",rate="...), r.Bits), "bit"...)
	}
	if r.Burst != 0 {
		b = appendCount(append(b, ",burst="...), r.Burst)
	}
	return b
}
