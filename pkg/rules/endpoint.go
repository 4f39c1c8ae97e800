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
//	input   [SOURCE@]ADDRESS:PORT%INTERFACE
//	output  ADDRESS:PORT%INTERFACE[,policy...]
//
// An IPv6 ADDRESS is in brackets, SOURCE may be. Policies, each at most once:
//
//	src=iface|keep|ADDRESS|ADDRESS:PORT   sport=keep|N   ttl=keep|dec|N
//	dscp=keep|NAME|N                      csum=update|zero
//
// The first '%' ends the address and the first ',' the interface, so neither
// can be part of an interface name here, though the kernel would allow them.

const (
	inputForm  = "[SOURCE@]ADDRESS:PORT%INTERFACE"
	outputForm = "ADDRESS:PORT%INTERFACE[,policy...]"
)

// ParseInput reads an input, `10.0.0.5@239.1.1.1:5000%eth0`. It checks the form
// alone; Rule.Validate checks what it means. The error names the part that is
// wrong, the whole text and what would be right, and holds a *FieldError.
func ParseInput(s string) (Input, error) {
	in, err := parseInput(s)
	if err != nil {
		return Input{}, fmt.Errorf("input %s: %w", quote(s), err)
	}
	return in, nil
}

// ParseOutput reads an output, `239.2.2.2:6000%eth1,ttl=8,src=keep,dscp=af41`.
// As with ParseInput, it checks the form alone.
func ParseOutput(s string) (Output, error) {
	out, err := parseOutput(s)
	if err != nil {
		return Output{}, fmt.Errorf("output %s: %w", quote(s), err)
	}
	return out, nil
}

// String is the canonical form: ParseInput of it gives the input back, if the
// input is valid.
func (in Input) String() string {
	var b []byte
	if in.Source.IsValid() {
		b = append(in.Source.AppendTo(b), '@')
	}
	return string(appendTarget(b, in.Address, in.Port, in.Interface))
}

// String is the canonical form, defaults left out: ParseOutput of it gives the
// output back, if the output is valid.
func (o Output) String() string {
	return string(appendPolicy(appendTarget(nil, o.Address, o.Port, o.Interface), o.Policy))
}

func appendTarget(b []byte, addr netip.Addr, port uint16, iface string) []byte {
	if addr.IsValid() {
		b = netip.AddrPortFrom(addr, port).AppendTo(b)
	} else {
		b = strconv.AppendUint(append(b, ':'), uint64(port), 10)
	}
	return append(append(b, '%'), iface...)
}

func parseInput(s string) (Input, error) {
	left, iface, err := cutInterface(s)
	if err != nil {
		return Input{}, err
	}
	if name, policies, ok := strings.Cut(iface, ","); ok {
		return Input{}, &FieldError{Field: "interface", Value: iface,
			Want: fmt.Sprintf("%s alone: an input takes no policies (%s)", quote(name), quote(policies))}
	}
	if want := interfaceFault(iface); want != "" {
		return Input{}, &FieldError{Field: "interface", Value: iface, Want: want}
	}
	in := Input{Interface: iface}
	if source, target, ok := strings.Cut(left, "@"); ok {
		if in.Source, err = parseAddr("source", unbracket(source)); err != nil {
			return Input{}, err
		}
		left = target
	}
	in.Address, in.Port, err = parseTarget(left)
	if err != nil {
		return Input{}, err
	}
	return in, nil
}

func parseOutput(s string) (Output, error) {
	endpoint, policies, hasPolicies := strings.Cut(s, ",")
	left, iface, err := cutInterface(endpoint)
	if err != nil {
		return Output{}, err
	}
	if want := interfaceFault(iface); want != "" {
		return Output{}, &FieldError{Field: "interface", Value: iface, Want: want}
	}
	out := Output{Interface: iface}
	if source, target, ok := strings.Cut(left, "@"); ok {
		return Output{}, &FieldError{Field: "address", Value: left,
			Want: fmt.Sprintf("%s alone: the source of an output is a policy, src=%s", bounded(target), bounded(source))}
	}
	if out.Address, out.Port, err = parseTarget(left); err != nil {
		return Output{}, err
	}
	if hasPolicies {
		out.Policy, err = parsePolicy(policies)
	}
	if err != nil {
		return Output{}, err
	}
	return out, nil
}

// cutInterface cuts s at its '%'.
func cutInterface(s string) (left, iface string, err error) {
	left, iface, ok := strings.Cut(s, "%")
	if !ok {
		return "", "", &FieldError{Field: "interface", Want: "ADDRESS:PORT%INTERFACE"}
	}
	if strings.Contains(iface, "%") || strings.Contains(iface, "]") && strings.LastIndexByte(left, '[') > strings.LastIndexByte(left, ']') {
		return "", "", &FieldError{Field: "interface", Value: iface,
			Want: "one '%' alone, before the interface: addresses take no zone, and an interface with '%' in its name cannot be written"}
	}
	return left, iface, nil
}

// parseTarget reads ADDRESS:PORT.
func parseTarget(s string) (netip.Addr, uint16, error) {
	host, port, hasPort := splitPort(s)
	if host == "" {
		return netip.Addr{}, 0, &FieldError{Field: "address", Want: "ADDRESS:PORT"}
	}
	addr, err := parseAddr("address", host)
	if err != nil {
		return netip.Addr{}, 0, err
	}
	if !hasPort || port == "" {
		return netip.Addr{}, 0, &FieldError{Field: "port", Want: portForm(addr)}
	}
	if addr.Is4() && s[0] == '[' {
		return netip.Addr{}, 0, &FieldError{Field: "address", Value: s, Want: "no brackets around an IPv4 address"}
	}
	n, ok := parseNumber(port, 1, 65535)
	if !ok {
		return netip.Addr{}, 0, &FieldError{Field: "port", Value: port, Want: "1 to 65535"}
	}
	return addr, uint16(n), nil
}

func portForm(addr netip.Addr) string {
	if addr.Is4() {
		return "ADDRESS:PORT"
	}
	return "[ADDRESS]:PORT"
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
		return s, "", false // not an address: its parser says so
	}
	if strings.Count(s, ":") == 1 {
		host, port, _ = strings.Cut(s, ":")
		return host, port, true
	}
	return s, "", false
}

// unbracket takes the brackets off an address that stands in them.
func unbracket(s string) string {
	if len(s) >= 2 && s[0] == '[' && s[len(s)-1] == ']' && strings.Contains(s, ":") {
		return s[1 : len(s)-1]
	}
	return s
}

// parseAddr reads an address without port; field names it in the error.
func parseAddr(field, s string) (netip.Addr, error) {
	fail := func(want string) (netip.Addr, error) {
		return netip.Addr{}, &FieldError{Field: field, Value: s, Want: want}
	}
	if strings.Contains(s, "/") {
		return fail("one address: prefixes are not supported")
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

// addrFormFault says what to write for an address in a form that is not
// accepted, "" when it is accepted.
func addrFormFault(addr netip.Addr) string {
	switch {
	case addr.Zone() != "":
		return "an address without a zone"
	case addr.Is4In6():
		return addr.Unmap().String() + ": IPv4-mapped IPv6 addresses are not sent on a wire (RFC 4291 section 2.5.5.2)"
	}
	return ""
}

// interfaceFault says what an interface name should be, "" when it is right.
// What the kernel takes is in dev_valid_name (net/core/dev.c): 1 to 15 bytes,
// neither "." nor "..", no '/', ':' or white space, which includes byte 0xa0.
// Beyond that, names that the grammar or a terminal cannot show are refused.
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
	case strings.HasSuffix(name, "+"):
		return "one interface: patterns ending in '+' are not supported"
	case !utf8.ValidString(name) || strings.IndexByte(name, 0xa0) >= 0 || strings.ContainsFunc(name, unshown):
		return "an interface name of printable characters without white space"
	}
	return ""
}

func unshown(r rune) bool { return r == ' ' || !unicode.IsPrint(r) }

// parseNumber reads a decimal number of lo to hi, without sign or leading zero.
func parseNumber(s string, lo, hi int) (int, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || len(s) > 1 && s[0] == '0' || int(n) < lo || int(n) > hi {
		return 0, false
	}
	return int(n), true
}

// bounded cuts what a message repeats of a value without quoting it.
func bounded(s string) string {
	q := quote(s)
	return q[1 : len(q)-1]
}
