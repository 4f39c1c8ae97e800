package rules

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// The grammar of endpoints:
//
//	input   [SOURCE[/LEN]@]ADDRESS[/LEN][:PORT[-PORT]]%INTERFACE[,option...]
//	output  ADDRESS[/LEN][:PORT|:+N|:-N]%INTERFACE[,policy...]
//
// An IPv6 ADDRESS is in brackets, SOURCE may be; LEN follows the brackets. An INTERFACE that ends
// in '+' is a pattern. Without PORT an input takes any, and an output keeps the packet's. Options
// and policies, each at most once:
//
//	vlan=ID|OUTER.ID   from=host   join=none|all|GROUP+GROUP...   csum=any   local=yes
//	loop=two-way|allow   loop-guard=off   except=SOURCE[/LEN]+SOURCE[/LEN]...
//	local-control=allow   broadcast=allow   rate=Npps|Nbit   burst=N   health=FORMAT[/CLOCK]
//
//	src=iface|keep|ADDRESS|ADDRESS:PORT   sport=keep|N
//	ttl=keep|dec|N   minttl=N   dscp=keep|NAME|N   csum=update|zero
//	vlan=keep|pop|ID|OUTER.ID   pcp=0..7   broadcast=allow   rate=Npps|Nbit   burst=N
//
// The first '%' ends the address and the first ',' the interface, so neither
// can be part of an interface name here, though the kernel would allow them.

const (
	inputForm  = "[SOURCE@]ADDRESS[/LEN][:PORT]%INTERFACE[,option...]"
	outputForm = "ADDRESS[/LEN][:PORT]%INTERFACE[,policy...]"
)

// ParseInput parses an input with its options, `10.0.0.5@239.1.1.1:5000%eth0,vlan=7`. It checks
// only the syntax; Rule.Validate checks the meaning. The error names the wrong part, the whole text
// and what would be valid, and wraps a *FieldError.
func ParseInput(s string) (Input, Acceptance, error) {
	in, accept, err := parseInput(s)
	if err != nil {
		return Input{}, Acceptance{}, fmt.Errorf("input %s: %w", quote(s), err)
	}
	return in, accept, nil
}

// ParseInputs parses the inputs of a rule: one, or several separated by blanks. Errors are those of
// ParseInput.
func ParseInputs(s string) (all []Input, err error) {
	for _, text := range strings.Fields(s) {
		in, _, err := ParseInput(text)
		if err != nil {
			return nil, err
		}
		all = append(all, in)
	}
	return all, nil
}

// ParseOutput parses an output, `239.2.2.2:6000%eth1,ttl=8,src=keep,dscp=af41`. Like ParseInput, it
// checks only the syntax.
func ParseOutput(s string) (Output, error) {
	out, err := parseOutput(s)
	if err != nil {
		return Output{}, fmt.Errorf("output %s: %w", quote(s), err)
	}
	return out, nil
}

// String is the canonical form without the options in Acceptance: for a valid input, ParseInput
// returns an equal one.
func (in Input) String() string { return string(in.append(nil)) }

func (in Input) append(b []byte) []byte {
	if in.Source.IsValid() {
		b = append(appendPrefix(b, in.Senders()), '@')
	}
	port := ""
	if in.Port != 0 {
		port = strconv.Itoa(int(in.Port))
	}
	if in.PortTo != 0 {
		port += "-" + strconv.Itoa(int(in.PortTo))
	}
	b = appendTarget(b, in.Address, in.Len, port, in.Interface)
	if in.VLAN != (VLAN{}) {
		b = append(append(b, ",vlan="...), in.VLAN.String()...)
	}
	if in.FromHost {
		b = append(b, ",from=host"...)
	}
	return b
}

// FormatInput is the canonical form of an input with its options, without defaults: the inverse of
// ParseInput.
func FormatInput(in Input, accept Acceptance) string {
	return string(appendAcceptance(in.append(nil), accept))
}

// String is the canonical form without defaults: for a valid output, ParseOutput returns an equal
// one.
func (o Output) String() string {
	port := ""
	switch o.PortMode {
	case PortSet:
		port = strconv.Itoa(int(o.Port))
	case PortAdd:
		port = fmt.Sprintf("%+d", o.PortShift)
	}
	return string(appendPolicy(appendTarget(nil, o.Address, o.Len, port, o.Interface), o.Policy))
}

func appendTarget(b []byte, addr netip.Addr, length uint8, port, iface string) []byte {
	bracket := addr.Is6()
	if bracket {
		b = append(b, '[')
	}
	if addr.IsValid() {
		b = addr.AppendTo(b)
	}
	if bracket {
		b = append(b, ']')
	}
	if length != 0 {
		b = strconv.AppendUint(append(b, '/'), uint64(length), 10)
	}
	if port != "" {
		b = append(append(b, ':'), port...)
	}
	return append(append(b, '%'), iface...)
}

func parseInput(s string) (in Input, accept Acceptance, err error) {
	endpoint, options, hasOptions := strings.Cut(s, ",")
	left, iface, err := cutInterface(endpoint)
	if err != nil {
		return in, accept, err
	}
	in.Interface = iface
	if source, target, ok := strings.Cut(left, "@"); ok {
		if err = in.parseSenders(source); err != nil {
			return in, accept, err
		}
		left = target
	}
	var port string
	if in.Address, in.Len, port, err = parseTarget(left); err != nil {
		return in, accept, err
	}
	if port != "" {
		if err := in.parsePorts(port[1:]); err != nil {
			return in, accept, err
		}
	}
	if hasOptions {
		accept, err = parseOptions(options, &in)
	}
	return in, accept, err
}

func parseOutput(s string) (out Output, err error) {
	endpoint, policies, hasPolicies := strings.Cut(s, ",")
	left, iface, err := cutInterface(endpoint)
	if err != nil {
		return out, err
	}
	out.Interface = iface
	if source, target, ok := strings.Cut(left, "@"); ok {
		return out, &FieldError{Field: "address", Value: left,
			Want: fmt.Sprintf("%s alone: the source of an output is a policy, src=%s", bounded(target), bounded(source))}
	}
	var port string
	if out.Address, out.Len, port, err = parseTarget(left); err != nil {
		return out, err
	}
	if err := out.setPort(port); err != nil {
		return out, err
	}
	if hasPolicies {
		out.Policy, err = parsePolicy(policies)
	}
	return out, err
}

// setPort parses what follows the address: ":PORT", ":+N", ":-N" or nothing.
func (o *Output) setPort(s string) error {
	const want = "1 to 65535, +N or -N to shift the packet's, or no ':' to keep it"
	if s == "" {
		o.PortMode = PortKeep
		return nil
	}
	s = s[1:]
	if digits := strings.TrimLeft(s, "+-"); len(digits) == len(s)-1 {
		n, ok := parseNumber(digits, 1, 65534)
		if !ok {
			return &FieldError{Field: "port", Value: s, Want: want}
		}
		o.PortMode, o.PortShift = PortAdd, int32(n)
		if s[0] == '-' {
			o.PortShift = -o.PortShift
		}
		return nil
	}
	n, ok := parseNumber(s, 1, 65535)
	if !ok {
		return &FieldError{Field: "port", Value: s, Want: want}
	}
	o.Port = uint16(n)
	return nil
}

// cutInterface cuts s at its '%'.
func cutInterface(s string) (left, iface string, err error) {
	left, iface, ok := strings.Cut(s, "%")
	if !ok {
		return "", "", &FieldError{Field: "interface", Want: "ADDRESS[/LEN][:PORT]%INTERFACE"}
	}
	if strings.Contains(iface, "%") || strings.Contains(iface, "]") && strings.LastIndexByte(left, '[') > strings.LastIndexByte(left, ']') {
		return "", "", &FieldError{Field: "interface", Value: iface,
			Want: "one '%' alone, before the interface: addresses take no zone, and an interface with '%' in its name cannot be written"}
	}
	if want := interfaceFault(iface); want != "" {
		return "", "", &FieldError{Field: "interface", Value: iface, Want: want}
	}
	return left, iface, nil
}

// parseTarget parses ADDRESS[/LEN] and returns the rest, ":PORT" or nothing.
func parseTarget(s string) (addr netip.Addr, length uint8, port string, err error) {
	host, rest := splitHost(s)
	if host == "" {
		return addr, 0, "", &FieldError{Field: "address", Want: "ADDRESS[/LEN][:PORT]"}
	}
	if addr, err = parseAddr("address", host); err != nil {
		return addr, 0, "", err
	}
	switch bracket := s[0] == '['; {
	case addr.Is4() && bracket:
		return addr, 0, "", &FieldError{Field: "address", Value: s, Want: "no brackets around an IPv4 address"}
	case addr.Is6() && !bracket:
		return addr, 0, "", &FieldError{Field: "address", Value: s, Want: "brackets around an IPv6 address, which end it before a port: [ADDRESS]:PORT"}
	}
	prefix := rest
	if i := strings.IndexByte(rest, ':'); i >= 0 {
		prefix, port = rest[:i], rest[i:]
	}
	if prefix == "" {
		return addr, 0, port, nil
	}
	n, ok := parseNumber(prefix[1:], 1, addr.BitLen())
	if !ok {
		return addr, 0, "", &FieldError{Field: "prefix", Value: prefix, Want: fmt.Sprintf("/1 to /%d", addr.BitLen())}
	}
	if n == addr.BitLen() {
		n = 0 // a single address
	}
	return addr, uint8(n), port, nil
}

// splitHost splits an address from what follows it: "/LEN", ":PORT" or both.
// Without brackets, more than one ':' is an IPv6 address.
func splitHost(s string) (host, rest string) {
	end := len(s)
	switch {
	case strings.HasPrefix(s, "["):
		i := strings.IndexByte(s, ']')
		if i < 0 || i+1 < len(s) && s[i+1] != ':' && s[i+1] != '/' {
			return s, "" // not an address: its parser reports it
		}
		return s[1:i], s[i+1:]
	case strings.Count(s, ":") > 1:
		if i := strings.IndexByte(s, '/'); i >= 0 {
			end = i
		}
	default:
		if i := strings.IndexAny(s, "/:"); i >= 0 {
			end = i
		}
	}
	return s[:end], s[end:]
}

// splitPort splits ADDRESS:PORT. Without brackets, more than one ':' is an IPv6
// address and no port.
func splitPort(s string) (host, port string, hasPort bool) {
	if strings.HasPrefix(s, "[") {
		end := strings.IndexByte(s, ']')
		rest := s[end+1:]
		switch {
		case end > 0 && rest == "":
			return s[1:end], "", false
		case end > 0 && rest[0] == ':':
			return s[1:end], rest[1:], true
		}
		return s, "", false // not an address: its parser reports it
	}
	if strings.Count(s, ":") == 1 {
		host, port, _ = strings.Cut(s, ":")
		return host, port, true
	}
	return s, "", false
}

// unbracket removes the brackets around an address, if any.
func unbracket(s string) string {
	if len(s) >= 2 && s[0] == '[' && s[len(s)-1] == ']' && strings.Contains(s, ":") {
		return s[1 : len(s)-1]
	}
	return s
}

// parseAddr parses an address without port; field names it in the error.
func parseAddr(field, s string) (netip.Addr, error) {
	fail := func(want string) (netip.Addr, error) {
		return netip.Addr{}, &FieldError{Field: field, Value: s, Want: want}
	}
	if strings.Contains(s, "/") {
		return fail("one address, without a prefix length")
	}
	if strings.HasPrefix(s, "[") {
		return fail("an IPv4 address, or an IPv6 one in brackets")
	}
	addr, err := netip.ParseAddr(s)
	if err != nil {
		return fail("an IPv4 or IPv6 address")
	}
	if want := addrFormFault(addr); want != "" {
		return fail(want)
	}
	return addr, nil
}

// addrFormFault says how to write an address in an unaccepted form, "" if it is accepted.
func addrFormFault(addr netip.Addr) string {
	switch {
	case addr.Zone() != "":
		return "an address without a zone"
	case addr.Is4In6():
		return addr.Unmap().String() + ": IPv4-mapped IPv6 addresses are not sent on a wire (RFC 4291 section 2.5.5.2)"
	}
	return ""
}

// interfaceFault says what an interface name should be, "" if it is valid. The kernel's rule is
// dev_valid_name (net/core/dev.c): 1 to 15 bytes, neither "." nor "..", no '/', ':' or white space,
// which includes byte 0xa0. It also refuses names that the grammar or a terminal cannot show.
func interfaceFault(name string) string {
	switch {
	case name == "":
		return "an interface name"
	case len(name) > 15:
		return "at most 15 bytes"
	case name == "." || name == "..":
		return `an interface name other than "." and ".."`
	case strings.Contains(name, "@"):
		return "the name alone, without the '@' and what follows it in the output of ip link"
	case strings.ContainsAny(name, "/:,%"):
		return "an interface name without '/', ':', ',' or '%'"
	case !utf8.ValidString(name) || strings.IndexByte(name, 0xa0) >= 0 || strings.ContainsFunc(name, unshown):
		return "an interface name of printable characters without white space"
	}
	return ""
}

func unshown(r rune) bool { return r == ' ' || !unicode.IsPrint(r) }

// parseNumber parses a decimal number of lo to hi, without sign or leading zero.
func parseNumber(s string, lo, hi int) (int, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || len(s) > 1 && s[0] == '0' || int(n) < lo || int(n) > hi {
		return 0, false
	}
	return int(n), true
}

// bounded truncates a value for a message, without quoting it.
func bounded(s string) string {
	q := quote(s)
	return q[1 : len(q)-1]
}
