package rules

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Validate checks one rule by itself and reports every fault, joined, each a
// *FieldError; at most 100, and how many more.
//
// A name is 1 to 63 bytes of letters, digits and ". _ : -" and starts with a
// letter or a digit. A rule has 1 to MaxOutputs outputs, all different and all
// of the input's address family. Addresses are multicast or unicast and can be
// forwarded; a source is unicast; an input of the source-specific range names
// its source. No output feeds the rule's own input. Values of a policy are set
// only with the policy that uses them, so that rules compare with Equal.
func (r Rule) Validate() error {
	var list faultList
	r.check(0, r.Name, &list)
	return list.join()
}

// ValidateSet checks every rule of a set and the set as a whole: no two rules
// with one name (ErrDuplicateName) or one input (ErrDuplicateInput), and no
// rules that feed each other in a circle (ErrLoop). It reports as Validate does.
// The time it takes grows with the number of rules and outputs, no faster.
func ValidateSet(rules []Rule) error {
	var list faultList
	checkSet(rules, nil, &list)
	return list.join()
}

// checkSet adds the faults of a set to the list. place, if not nil, says in
// messages where a rule is to be found.
func checkSet(rules []Rule, place func(rule int) string, list *faultList) {
	s := newSet(rules, place)
	for i, r := range rules {
		r.check(i, s.label(i), list)
		s.checkDuplicates(i, list)
	}
	s.checkLoops(list)
}

// ruleSet is a set of rules with what is needed to look across them.
type ruleSet struct {
	rules  []Rule
	place  func(rule int) string
	names  map[string]int // the first rule of each name
	inputs map[Input]int  // the first rule of each input
}

func newSet(rules []Rule, place func(rule int) string) *ruleSet {
	s := &ruleSet{rules: rules, place: place,
		names: make(map[string]int, len(rules)), inputs: make(map[Input]int, len(rules))}
	for i, r := range rules {
		if _, ok := s.names[r.Name]; !ok && r.Name != "" {
			s.names[r.Name] = i
		}
		if _, ok := s.inputs[r.In]; !ok && r.In != (Input{}) {
			s.inputs[r.In] = i
		}
	}
	return s
}

// label is what FieldError.Rule holds for a rule.
func (s *ruleSet) label(i int) string {
	if s.rules[i].Name != "" {
		return s.rules[i].Name
	}
	return "#" + strconv.Itoa(i+1)
}

// where is the place of a rule in brackets, to follow its name.
func (s *ruleSet) where(i int) string {
	if s.place == nil {
		return ""
	}
	return " (" + s.place(i) + ")"
}

func (s *ruleSet) checkDuplicates(i int, list *faultList) {
	r := s.rules[i]
	if first, ok := s.names[r.Name]; ok && first != i {
		list.add(fault{i, &FieldError{Rule: s.label(i), Field: "name", Value: r.Name, Err: ErrDuplicateName,
			Want: "a unique name: rule #" + strconv.Itoa(first+1) + s.where(first) + " has it"}})
	}
	if first, ok := s.inputs[r.In]; ok && first != i {
		list.add(fault{i, &FieldError{Rule: s.label(i), Field: "in", Value: r.In.String(), Err: ErrDuplicateInput,
			Want: "an input of its own: rule " + quote(s.label(first)) + s.where(first) + " takes it"}})
	}
}

// check reports the faults of one rule under the label given.
func (r Rule) check(index int, label string, list *faultList) {
	c := checker{index: index, rule: label, list: list}
	if !validName(r.Name) {
		c.fault(nil, "name", r.Name, fmt.Sprintf("1 to %d bytes of A-Z a-z 0-9 . _ : -, a letter or digit first", MaxNameLen))
	}
	if r.Path > PathFanout {
		c.fault(nil, "path", r.Path.String(), wantPath)
	}
	c.input(r.In)
	c.outputs(r)
}

func validName(s string) bool {
	if s == "" || len(s) > MaxNameLen || strings.IndexByte("._:-", s[0]) >= 0 {
		return false
	}
	for i := range len(s) {
		switch b := s[i]; {
		case b >= '0' && b <= '9', b >= 'A' && b <= 'Z', b >= 'a' && b <= 'z':
		case strings.IndexByte("._:-", b) >= 0:
		default:
			return false
		}
	}
	return true
}

// checker reports the faults of one rule.
type checker struct {
	index int
	rule  string
	list  *faultList
}

func (c *checker) fault(class error, field, value, want string) {
	c.list.add(fault{c.index, &FieldError{Rule: c.rule, Field: field, Value: value, Want: want, Err: class}})
}

// end is one end of a rule: its input or the output in a slot. It reports the
// parts of that end; their names are put together only when there is a fault.
type end struct {
	*checker
	slot int // inputSlot for the input
}

const inputSlot = -1

func (e end) fault(class error, part, value, want string) {
	e.checker.fault(class, e.field()+part, value, want)
}

func (e end) field() string {
	if e.slot == inputSlot {
		return "in"
	}
	return outField(e.slot)
}

func outField(slot int) string { return "out[" + strconv.Itoa(slot) + "]" }

func (c *checker) input(in Input) {
	e := end{c, inputSlot}
	if in == (Input{}) {
		e.fault(nil, "", "", inputForm)
		return
	}
	e.target(in.Interface, in.Address, in.Port)
	if in.Source.IsValid() {
		e.source(".source", in.Source, in.Address)
	} else if ssm := ssmRange(in.Address); ssm != "" {
		e.fault(ErrNeedSource, ".source", "", fmt.Sprintf("SOURCE@%s: groups of %s need a source (RFC 4607 section 4.1)", bounded(in.Address.String()), ssm))
	}
}

func (c *checker) outputs(r Rule) {
	if len(r.Out) == 0 {
		c.fault(nil, "out", "", fmt.Sprintf("1 to %d outputs", MaxOutputs))
		return
	}
	if n := len(r.Out); n > MaxOutputs {
		c.fault(ErrTooManyOutputs, "out", strconv.Itoa(n)+" outputs", fmt.Sprintf("1 to %d outputs", MaxOutputs))
		r.Out = r.Out[:MaxOutputs]
	}
	for slot, o := range r.Out {
		e := end{c, slot}
		if o == (Output{}) {
			e.fault(nil, "", "", outputForm)
			continue
		}
		e.target(o.Interface, o.Address, o.Port)
		e.family(o.Address, r.In.Address)
		e.policy(o)
		e.unique(o, r.Out[:slot])
		if feedsSelf(o, r.In) {
			e.fault(ErrLoop, "", o.String(), fmt.Sprintf("no loop: it feeds the rule's own input, %[1]s -> %[1]s", bounded(c.rule)))
		}
	}
}

// target checks what inputs and outputs have in common.
func (e end) target(iface string, addr netip.Addr, port uint16) {
	if want := interfaceFault(iface); want != "" {
		e.fault(nil, ".interface", iface, want)
	}
	if port == 0 {
		e.fault(nil, ".port", "0", "1 to 65535")
	}
	if !addr.IsValid() {
		e.fault(nil, ".address", "", "a multicast group or a unicast address")
	} else if want := addrFault(addr); want != "" {
		e.fault(nil, ".address", addr.String(), want)
	} else if want := linkLocalFault(addr); want != "" {
		e.fault(ErrLinkLocal, ".address", addr.String(), want)
	}
}

// family checks that an output is of the input's address family.
func (e end) family(addr, in netip.Addr) {
	if addr.IsValid() && in.IsValid() && addr.Unmap().Is4() != in.Unmap().Is4() {
		e.fault(ErrFamily, ".address", addr.String(),
			fmt.Sprintf("the family of the input, %s: a rule cannot translate between IPv4 and IPv6", bounded(in.String())))
	}
}

// source checks a source address that goes with a destination.
func (e end) source(part string, source, addr netip.Addr) {
	if !source.IsValid() {
		e.fault(nil, part, "", "a unicast address")
		return
	}
	if want := addrFault(source); want != "" {
		e.fault(nil, part, source.String(), want)
		return
	}
	if source.IsMulticast() {
		e.fault(nil, part, source.String(), "a unicast address: a group is never a source")
	}
	if addr.IsValid() && source.Is4() != addr.Unmap().Is4() {
		e.fault(ErrFamily, part, source.String(), "the family of "+bounded(addr.String()))
	}
}

func (e end) policy(o Output) {
	p := o.Policy
	if p.Source == SourceAddress {
		e.source(".src", p.SourceAddr, o.Address)
	} else {
		e.plain(".src", p.Source, p.Source <= SourceAddress, p.SourceAddr, !p.SourceAddr.IsValid())
	}
	if p.TTL != TTLSet {
		e.plain(".ttl", p.TTL, p.TTL <= TTLSet, p.TTLValue, p.TTLValue == 0)
	} else if p.TTLValue == 0 {
		e.fault(nil, ".ttl", "0", "1 to 255")
	}
	if p.DSCP != DSCPSet {
		e.plain(".dscp", p.DSCP, p.DSCP <= DSCPSet, p.DSCPValue, p.DSCPValue == 0)
	} else if p.DSCPValue > 63 {
		e.fault(nil, ".dscp", strconv.Itoa(int(p.DSCPValue)), "0 to 63")
	}
	e.plain(".csum", p.Checksum, p.Checksum <= ChecksumZero, nil, true)
	if p.Checksum == ChecksumZero && o.Address.Is6() {
		e.fault(nil, ".csum", p.Checksum.String(), "update: IPv6 needs the UDP checksum (RFC 8200 section 8.1)")
	}
}

// plain checks a policy that takes no value: that it is one of its enumeration,
// and that the value beside it is not set.
func (e end) plain(part string, policy fmt.Stringer, known bool, value any, unset bool) {
	if !known {
		e.fault(nil, part, policy.String(), "one of the policies declared")
	} else if !unset {
		e.fault(nil, part, fmt.Sprint(value), fmt.Sprintf("no value with policy %v", policy))
	}
}

// unique checks an output against those in the slots before it.
func (e end) unique(o Output, before []Output) {
	for slot, b := range before {
		if b.Port == o.Port && b.Address == o.Address && b.Interface == o.Interface {
			e.fault(ErrDuplicateOutput, "", o.String(), "another interface, address or port: "+outField(slot)+" has these")
			return
		}
	}
}

// addrFault says what is wanted instead of an address that no packet on a wire
// carries, "" when the address is good.
func addrFault(a netip.Addr) string {
	if want := addrFormFault(a); want != "" {
		return want
	}
	if a.Is6() {
		switch {
		case a.IsUnspecified():
			return "an address other than the unspecified one (RFC 4291 section 2.5.2)"
		case a.IsLoopback():
			return "an address other than loopback (RFC 4291 section 2.5.3)"
		}
		return ""
	}
	switch b := a.As4(); {
	case b[0] == 0:
		return "an address outside 0.0.0.0/8, this network (RFC 1122 section 3.2.1.3)"
	case b[0] == 127:
		return "an address outside 127.0.0.0/8, loopback (RFC 1122 section 3.2.1.3)"
	case b == [4]byte{255, 255, 255, 255}:
		return "an address other than broadcast (RFC 1122 section 3.2.1.3)"
	case b[0] >= 240:
		return "an address outside 240.0.0.0/4, reserved (RFC 1112 section 4)"
	}
	return ""
}

// linkLocalFault says what is wanted instead of a group that no router may
// forward, "" for any other address.
func linkLocalFault(a netip.Addr) string {
	if a.Is4() {
		if b := a.As4(); b[0] == 224 && b[1] == 0 && b[2] == 0 {
			return "a group outside 224.0.0.0/24: local network control is never forwarded between links (RFC 5771 section 4)"
		}
		return ""
	}
	// The scope is the low half of the second byte: 0 reserved, 1 interface-local,
	// 2 link-local.
	if b := a.As16(); b[0] == 0xff && b[1]&0xf <= 2 {
		return "a group of scope 3 or wider, ffx3::/16 and up: narrower ones are never forwarded between links (RFC 4291 section 2.7)"
	}
	return ""
}

// ssmRange is the source-specific range that holds a group (RFC 4607 section 1),
// "" when none does.
func ssmRange(a netip.Addr) string {
	switch {
	case a.Is4() && a.As4()[0] == 232:
		return "232.0.0.0/8"
	case a.Is6():
		if b := a.As16(); b[0] == 0xff && b[1]>>4 == 3 && b[2] == 0 && b[3] == 0 {
			return "ff3x::/32"
		}
	}
	return ""
}
