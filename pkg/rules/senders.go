package rules

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Sets of senders and ports of an input: a source prefix, any except some, a range of ports.

// MaxExcept is the maximum number of senders or source prefixes that a rule can exclude, and
// MaxPorts that of ports in a range: each is an entry of the kernel's tables, and with both there
// is an entry for each pair.
const (
	MaxExcept = 64
	MaxPorts  = 1024
)

// Senders is the source prefix of an input, of full length for a single sender. It is invalid if
// any is taken.
func (in Input) Senders() netip.Prefix {
	switch {
	case !in.Source.IsValid():
		return netip.Prefix{}
	case in.SourceLen == 0:
		return netip.PrefixFrom(in.Source, in.Source.BitLen())
	}
	return netip.PrefixFrom(in.Source, int(in.SourceLen))
}

// Sender is the only sender of an input, invalid if it takes several: the source of a
// source-specific join.
func (in Input) Sender() netip.Addr {
	if in.SourceLen != 0 {
		return netip.Addr{}
	}
	return in.Source
}

// senderBits is the length of the source prefix: -1 for any.
func (in Input) senderBits() int { return in.Senders().Bits() }

// lastPort is the last port of an input.
func (in Input) lastPort() uint16 {
	switch {
	case in.Port == 0:
		return 65535
	case in.PortTo == 0:
		return in.Port
	}
	return in.PortTo
}

// Excludes reports whether a sender is excluded.
func (a Acceptance) Excludes(source netip.Addr) bool {
	return source.IsValid() && slices.ContainsFunc(a.Except(), func(p netip.Prefix) bool { return p.Contains(source) })
}

// PortsMeet reports whether an output sends to a port that the input takes, assuming that it takes
// the rest.
func (o Output) PortsMeet(in Input) bool {
	low, high, ok := o.sentPorts(in)
	return ok && low <= in.lastPort() && in.Port <= high
}

// parseSenders parses what precedes '@': ADDRESS[/LEN], in brackets or not.
func (in *Input) parseSenders(s string) error {
	host, length := s, ""
	if i := strings.LastIndexByte(s, '/'); i >= 0 {
		host, length = s[:i], s[i:]
	}
	var err error
	if in.Source, err = parseAddr("source", unbracket(host)); err != nil || length == "" {
		return err
	}
	n, ok := parseNumber(length[1:], 1, in.Source.BitLen())
	if !ok {
		return &FieldError{Field: "source", Value: length, Want: fmt.Sprintf("/1 to /%d", in.Source.BitLen())}
	}
	if n < in.Source.BitLen() { // otherwise the address alone
		in.SourceLen = uint8(n)
	}
	return nil
}

// parsePorts parses what follows the ':' of an input: PORT or PORT-PORT.
func (in *Input) parsePorts(s string) error {
	low, high, isRange := strings.Cut(s, "-")
	first, ok := parseNumber(low, 1, 65535)
	if !isRange {
		if !ok {
			return &FieldError{Field: "port", Value: s, Want: "1 to 65535, or no ':' for any port"}
		}
		in.Port = uint16(first)
		return nil
	}
	last, lastOK := parseNumber(high, 1, 65535)
	if !ok || !lastOK || last <= first {
		return &FieldError{Field: "port", Value: s, Want: wantRange}
	}
	in.Port, in.PortTo = uint16(first), uint16(last)
	return nil
}

const wantRange = "a range of ports from a lower to a higher one, as 5000-5010"

// setExcept parses ADDRESS[/LEN]+ADDRESS[/LEN]...
func (p *optionParser) setExcept(s string) (want string) {
	for text := range strings.SplitSeq(s, "+") {
		prefix, ok := parseSender(text)
		if !ok {
			return "except=ADDRESS+ADDRESS/LEN..."
		}
		p.x.Except = append(p.x.Except, prefix)
	}
	return ""
}

// parseSender parses ADDRESS or ADDRESS/LEN.
func parseSender(s string) (netip.Prefix, bool) {
	if addr, err := netip.ParseAddr(s); err == nil {
		return netip.PrefixFrom(addr, addr.BitLen()), addrFormFault(addr) == ""
	}
	prefix, err := netip.ParsePrefix(s)
	return prefix, err == nil && addrFormFault(prefix.Addr()) == ""
}

func appendExcept(b []byte, except []netip.Prefix) []byte {
	for i, p := range except {
		sign := "+"
		if i == 0 {
			sign = ",except="
		}
		b = appendPrefix(append(b, sign...), p)
	}
	return b
}

// appendPrefix appends a prefix, a single address without its length.
func appendPrefix(b []byte, p netip.Prefix) []byte {
	if p.IsSingleIP() {
		return p.Addr().AppendTo(b)
	}
	return p.AppendTo(b)
}

// senders checks the senders of an input.
func (e end) senders(in Input, accept Acceptance) {
	switch {
	case in.Source.IsValid():
		e.source(".source", in.Source, in.Address)
		e.senderPrefix(in)
	case in.SourceLen != 0:
		e.fault(nil, ".source", fmt.Sprintf("/%d", in.SourceLen), "an address in front of the length")
	}
	if ssm := ssmRange(in.Address); ssm != "" && (!in.Source.IsValid() || in.SourceLen != 0) && accept.Join != JoinNone && !in.FromHost {
		value, want := "", fmt.Sprintf("SOURCE@%s", bounded(in.Address.String()))
		if in.SourceLen != 0 {
			value, want = in.Senders().String(), "one source, or join=none"
		}
		e.fault(ErrNeedSource, ".source", value, fmt.Sprintf("%s: groups of %s need a source (RFC 4607 section 4.1)", want, ssm))
	}
	e.except(in, accept.Except())
}

// multicasts are addresses that no sender has.
var multicasts = [...]netip.Prefix{netip.MustParsePrefix("224.0.0.0/4"), netip.MustParsePrefix("ff00::/8")}

func (e end) senderPrefix(in Input) {
	if in.SourceLen == 0 {
		return
	}
	p := in.Senders()
	switch {
	case int(in.SourceLen) >= in.Source.BitLen():
		e.fault(nil, ".source", fmt.Sprintf("/%d", in.SourceLen), fmt.Sprintf("/1 to /%d, or none for the address alone", in.Source.BitLen()-1))
	case p.Masked() != p:
		e.fault(nil, ".source", p.String(), p.Masked().String()+", without host bits")
	case p.Overlaps(multicasts[0]) && !in.Source.IsMulticast(), p.Overlaps(multicasts[1]) && !in.Source.IsMulticast():
		e.fault(nil, ".source", p.String(), "a prefix of unicast addresses: a group is never a source")
	}
}

// except checks the excluded senders.
func (e end) except(in Input, except []netip.Prefix) {
	switch {
	case len(except) == 0:
		return
	case len(except) > MaxExcept:
		e.fault(nil, ".except", fmt.Sprintf("%d prefixes", len(except)), fmt.Sprintf("at most %d", MaxExcept))
		return
	case in.Source.IsValid() && in.SourceLen == 0:
		e.fault(nil, ".except", prefixText(except[0]), "no except: one sender alone is taken")
		return
	}
	for i, p := range except {
		switch {
		case !p.IsValid() || p.Addr().Is4In6() || p.Addr().Zone() != "":
			e.fault(nil, ".except", p.String(), "addresses, or prefixes of addresses")
		case p.Masked() != p:
			e.fault(nil, ".except", p.String(), p.Masked().String()+", without host bits")
		case in.Address.IsValid() && p.Addr().Is4() != in.Address.Is4():
			e.fault(ErrFamily, ".except", prefixText(p), "the family of "+bounded(in.Address.String()))
		case in.Source.IsValid() && (!in.Senders().Contains(p.Addr()) || p.Bits() <= int(in.SourceLen)):
			e.fault(nil, ".except", prefixText(p), fmt.Sprintf("senders of the input, %v", in.Senders()))
		case slices.ContainsFunc(except[:i], p.Overlaps):
			e.fault(nil, ".except", prefixText(p), "each sender once")
		}
	}
}

func prefixText(p netip.Prefix) string { return string(appendPrefix(nil, p)) }

// ports checks a range of ports.
func (e end) ports(in Input) {
	switch {
	case in.PortTo == 0:
	case in.Port == 0 || in.PortTo <= in.Port:
		e.fault(nil, ".port", fmt.Sprintf("%d-%d", in.Port, in.PortTo), wantRange)
	case int(in.PortTo)-int(in.Port) >= MaxPorts:
		e.fault(nil, ".port", fmt.Sprintf("%d-%d", in.Port, in.PortTo), fmt.Sprintf("at most %d ports, or no ':' for any port", MaxPorts))
	}
}

// withoutPorts is an input without its ports.
func (in Input) withoutPorts() Input {
	in.Port, in.PortTo = 0, 0
	return in
}

// checkRanges reports port ranges that overlap with another rule's for the same group and senders:
// neither would take precedence.
func (s *ruleSet) checkRanges(list *faultList) {
	if !slices.ContainsFunc(s.rules, func(r Rule) bool { return r.In.PortTo != 0 }) {
		return
	}
	pool := newInputPool(s.rules, s.inputs, func(int) bool { return true })
	for i, r := range s.rules {
		if r.In.PortTo == 0 {
			continue
		}
		for other := range pool.each(r.In.traffic(), false) {
			o := s.rules[other].In
			same := r.In.withoutPorts()
			same.Interface = o.Interface
			if other == i || o.Port == 0 || o.withoutPorts() != same || o.Port == r.In.Port && o.PortTo == r.In.PortTo ||
				o.PortTo != 0 && other > i {
				continue
			}
			list.add(fault{s.origin(i), &FieldError{Rule: s.label(i), Field: s.inField(i), Value: r.In.String(), Err: ErrDuplicateInput,
				Want: "ports that no other rule has for the same: rule " + quote(s.label(other)) + s.where(other) + " takes " + o.String()}})
			break
		}
	}
}
