package rules

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Validate checks one rule by itself and reports every fault, joined, each a
// *FieldError; at most 100, and how many more.
//
// A name is 1 to 63 bytes of letters, digits and ". _ : -" and starts with a letter or a digit. A
// rule has 1 to MaxOutputs outputs, all different and all of the input's address family. Addresses
// are multicast or unicast and can be forwarded; a source is unicast; an input of the
// source-specific range names its source. A prefix consists of groups or of unicast addresses, has
// no bits set after its length and says what to join; an output prefix consists of groups and has
// the input's length. No output feeds the rule's own input. Values of a policy are set only with
// the policy that uses them, so that rules compare with Equal.
func (r Rule) Validate() error {
	var list faultList
	r.check(0, r.Name, &list)
	return list.join()
}

// ValidateSet checks every rule of a set and the set as a whole: no two rules with the same name
// (ErrDuplicateName) or input (ErrDuplicateInput), and no rules that feed each other in a loop
// (ErrLoop). Its error is like that of Validate. Its running time is linear in the number of rules
// and outputs.
func ValidateSet(rules []Rule) error {
	var list faultList
	checkSet(rules, nil, &list)
	return list.join()
}

// checkSet adds the faults of a set to the list. place, if not nil, names the position of a rule in
// messages.
func checkSet(rules []Rule, place func(rule int) string, list *faultList) {
	s := newSet(rules, place)
	for i := range s.rules {
		if origin := s.origin(i); i == 0 || s.origin(i-1) != origin {
			rules[origin].check(origin, s.label(i), list)
		}
		s.checkDuplicates(i, list)
	}
	s.checkRanges(list)
	s.checkLoops(list)
}

// ruleSet is a set of rules with indexes for checks across them. A rule with several inputs is in
// it once for each: how the inputs of a set relate does not depend on how rules share them.
type ruleSet struct {
	rules  []Rule
	of     []int // by rule: its index in the given set; nil if identical
	place  func(rule int) string
	names  map[string]int // the first rule of each name
	inputs map[Input]int  // the first rule of each input
}

func newSet(rules []Rule, place func(rule int) string) *ruleSet {
	s := &ruleSet{rules: rules, place: place,
		names: make(map[string]int, len(rules)), inputs: make(map[Input]int, len(rules))}
	s.expand()
	for i, r := range s.rules {
		if _, ok := s.names[r.Name]; !ok && r.Name != "" {
			s.names[r.Name] = i
		}
		if _, ok := s.inputs[r.In]; !ok && r.In != (Input{}) {
			s.inputs[r.In] = i
		}
	}
	return s
}

// expand gives each of several inputs a rule of its own.
func (s *ruleSet) expand() {
	given := s.rules
	for i := range given {
		if given[i].Stream == nil {
			if s.of != nil {
				s.rules, s.of = append(s.rules, given[i]), append(s.of, i)
			}
			continue
		}
		if s.of == nil {
			s.rules = slices.Clone(given[:i])
			for before := range i {
				s.of = append(s.of, before)
			}
		}
		for leg := range given[i].InputCount() {
			s.rules, s.of = append(s.rules, given[i].OfLeg(leg)), append(s.of, i)
		}
	}
}

// origin is the index of a rule in the given set.
func (s *ruleSet) origin(i int) int {
	if s.of == nil {
		return i
	}
	return s.of[i]
}

// inField names the input of a rule, among several with its index.
func (s *ruleSet) inField(i int) string {
	first, n := i, 1
	for ; first > 0 && s.origin(first-1) == s.origin(i); first-- {
		n++
	}
	for last := i; last+1 < len(s.rules) && s.origin(last+1) == s.origin(i); last++ {
		n++
	}
	if n == 1 {
		return "in"
	}
	return end{slot: inputSlot - 1 - (i - first)}.field()
}

// label is FieldError.Rule for a rule.
func (s *ruleSet) label(i int) string {
	if s.rules[i].Name != "" {
		return s.rules[i].Name
	}
	return "#" + strconv.Itoa(s.origin(i)+1)
}

// where is the position of a rule in parentheses, to follow its name.
func (s *ruleSet) where(i int) string {
	if s.place == nil {
		return ""
	}
	return " (" + s.place(s.origin(i)) + ")"
}

func (s *ruleSet) checkDuplicates(i int, list *faultList) {
	r := s.rules[i]
	if first, ok := s.names[r.Name]; ok && s.origin(first) != s.origin(i) && (i == 0 || s.origin(i-1) != s.origin(i)) {
		list.add(fault{s.origin(i), &FieldError{Rule: s.label(i), Field: "name", Value: r.Name, Err: ErrDuplicateName,
			Want: "a unique name: rule #" + strconv.Itoa(s.origin(first)+1) + s.where(first) + " has it"}})
	}
	if first, ok := s.inputs[r.In]; ok && s.origin(first) != s.origin(i) {
		list.add(fault{s.origin(i), &FieldError{Rule: s.label(i), Field: s.inField(i), Value: r.In.String(), Err: ErrDuplicateInput,
			Want: "an input of its own: rule " + quote(s.label(first)) + s.where(first) + " takes it"}})
	}
}

// check reports the faults of one rule under the given label.
func (r Rule) check(index int, label string, list *faultList) {
	c := checker{index: index, rule: label, list: list, localControl: r.Accept.LocalControl}
	if !validName(r.Name) {
		c.fault(nil, "name", r.Name, fmt.Sprintf("1 to %d bytes of A-Z a-z 0-9 . _ : -, a letter or digit first", MaxNameLen))
	}
	if r.Path > PathFanout {
		c.fault(nil, "path", r.Path.String(), wantPath)
	}
	for i := range r.InputCount() {
		leg := r.Leg(i)
		c.localControl = c.localControl || leg.Accept.LocalControl
		c.input(legSlot(&r, i), leg.In, leg.Accept, r.Path)
	}
	c.stream(&r)
	c.outputs(r)
	c.localControlNeeded(r)
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
	// localControl allows single link-local groups.
	localControl bool
}

func (c *checker) fault(class error, field, value, want string) {
	c.list.add(fault{c.index, &FieldError{Rule: c.rule, Field: field, Value: value, Want: want, Err: class}})
}

// end is one end of a rule: its input or the output in a slot. It reports the faults of that end;
// their field names are only built if there is a fault.
type end struct {
	*checker
	slot int // inputSlot for the only input, lower values for each of several
}

const inputSlot = -1

func (e end) fault(class error, part, value, want string) {
	e.checker.fault(class, e.field()+part, value, want)
}

func (e end) field() string {
	switch {
	case e.slot == inputSlot:
		return "in"
	case e.slot < inputSlot:
		return "in[" + strconv.Itoa(inputSlot-1-e.slot) + "]"
	}
	return outField(e.slot)
}

func outField(slot int) string { return "out[" + strconv.Itoa(slot) + "]" }

func (c *checker) input(slot int, in Input, accept Acceptance, path Path) {
	e := end{c, slot}
	if in == (Input{}) {
		e.fault(nil, "", "", inputForm)
		return
	}
	e.target(in.Interface, in.Address, in.Len, accept.Broadcast)
	e.vlan(in.VLAN)
	e.senders(in, accept)
	e.ports(in)
	if e.fromHost(in, accept, path); !in.FromHost {
		e.join(in, accept)
	}
	if accept.Local && path != PathAuto && path != PathFanout {
		e.fault(nil, ".local", "yes", "path auto or fanout: path "+path.String()+" takes the packets away from the host's receivers")
	}
	if accept.ZeroChecksum && in.Address.Is4() {
		e.fault(nil, ".csum", "any", "no csum: IPv4 packets without a UDP checksum are always taken")
	}
	e.rate(accept.Rate())
}

// join checks which memberships the input has.
func (e end) join(in Input, accept Acceptance) {
	if accept.Join != JoinList && len(accept.Groups()) > 0 {
		e.fault(nil, ".join", accept.Groups()[0].String(), "no groups with join="+accept.Join.String())
	}
	switch {
	case accept.Join > JoinList:
		e.fault(nil, ".join", accept.Join.String(), "one of the policies declared")
	case !in.Address.IsValid():
	case !in.Multicast():
		if accept.Join > JoinNone {
			e.fault(nil, ".join", accept.Join.String(), "no join: a unicast address is not joined")
		}
	case accept.Join == JoinDefault && in.Len != 0:
		e.fault(nil, ".join", "", joinForms(in))
	case accept.Join == JoinAll && in.Address.BitLen()-int(in.lengthOrAll()) > maxJoinBits:
		e.fault(nil, ".join", "all", fmt.Sprintf("join=none or join=GROUP+GROUP...: %v has more than %d groups", in.Prefix(), MaxJoinAll))
	case accept.Join == JoinList:
		e.joinList(in, accept.Groups())
	}
}

const maxJoinBits = 12 // of MaxJoinAll

func joinForms(in Input) string {
	all := "join=all to join every group, "
	if in.Address.BitLen()-int(in.Len) > maxJoinBits {
		all = ""
	}
	return all + "join=GROUP+GROUP... to join some, or join=none when the network floods the groups or another program joins them"
}

func (e end) joinList(in Input, groups []netip.Addr) {
	if len(groups) == 0 {
		e.fault(nil, ".join", "", "join=GROUP+GROUP...")
	}
	seen := make(map[netip.Addr]bool, len(groups))
	for _, g := range groups {
		if !in.Prefix().Contains(g) {
			e.fault(nil, ".join", g.String(), fmt.Sprintf("groups of the input, %v", in.Prefix()))
		}
		if want := linkLocalFault(g); want != "" && in.Len != 0 && in.Prefix().Contains(g) {
			e.fault(ErrLinkLocal, ".join", g.String(), want)
		}
		if seen[g] {
			e.fault(nil, ".join", g.String(), "each group once")
		}
		seen[g] = true
	}
}

func (in Input) lengthOrAll() uint8 {
	if in.Len == 0 {
		return uint8(in.Address.BitLen())
	}
	return in.Len
}

func (e end) vlan(v VLAN) {
	if v.ID > maxVLAN || v.Outer > maxVLAN || v.ID == 0 && v.Outer != 0 {
		e.fault(nil, ".vlan", v.String(), "VLANs of 1 to 4094 (IEEE 802.1Q section 9.6)")
	}
}

// minBitRate is below any real stream, and still counted exactly enough by the token bucket.
const minBitRate = 1000

func (e end) rate(r Rate) {
	switch {
	case r.Packets != 0 && r.Bits != 0:
		e.fault(nil, ".rate", fmt.Sprintf("%dpps and %dbit", r.Packets, r.Bits), "packets or bits, not both")
	case r.Burst != 0 && r.Packets == 0 && r.Bits == 0:
		e.fault(nil, ".burst", strconv.FormatUint(r.Burst, 10), "a rate, too")
	case r.Bits != 0 && r.Bits < minBitRate:
		e.fault(nil, ".rate", fmt.Sprintf("%dbit", r.Bits), "1kbit or more")
	case r.Packets > maxRate || r.Bits > maxRate || r.Burst > maxRate:
		e.fault(nil, ".rate", fmt.Sprintf("%d", max(r.Packets, r.Bits, r.Burst)), "at most 1000000G")
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
		e.target(o.Interface, o.Address, o.Len, o.Policy.Broadcast)
		e.prefix(o, r.In)
		e.port(o, r.In)
		e.family(o.Address, r.In.Address)
		e.policy(o)
		e.priority(o, r.In)
		e.unique(o, r.Out[:slot])
		for i := 1; i < r.InputCount(); i++ {
			one := r.OfLeg(i)
			e.port(o, one.In)
			e.priority(o, one.In)
		}
		if r.feedsSelf(o) {
			e.fault(ErrLoop, "", o.String(), fmt.Sprintf("no loop: it feeds the rule's own input, %[1]s -> %[1]s%[2]s", bounded(c.rule), insist))
		}
	}
}

// target checks what inputs and outputs have in common.
func (e end) target(iface string, addr netip.Addr, length uint8, broadcast bool) {
	if broadcast {
		e.broadcast(addr, length)
	}
	if want := interfaceFault(iface); want != "" {
		e.fault(nil, ".interface", iface, want)
	}
	if !addr.IsValid() {
		e.fault(nil, ".address", "", "a multicast group or a unicast address")
		return
	}
	if want := e.addrFault(addr, broadcast); want != "" {
		e.fault(nil, ".address", addr.String(), want)
		return
	}
	if length == 0 {
		if want := e.linkLocalFault(addr); want != "" {
			e.fault(ErrLinkLocal, ".address", addr.String(), want)
		}
		return
	}
	e.wholePrefix(addr, length)
}

// wholePrefix checks that a prefix has addresses of one kind.
func (e end) wholePrefix(addr netip.Addr, length uint8) {
	if int(length) >= addr.BitLen() {
		e.fault(nil, ".prefix", fmt.Sprintf("/%d", length), fmt.Sprintf("/1 to /%d, or none for the address alone", addr.BitLen()-1))
		return
	}
	p := netip.PrefixFrom(addr, int(length))
	if p.Masked() != p {
		e.fault(nil, ".address", p.String(), p.Masked().String()+", without host bits")
		return
	}
	if isAllGroups(p) {
		return
	}
	if addr.Is6() { // the lowest group of a prefix has the narrowest scope
		if want := linkLocalFault(addr); want != "" {
			e.fault(ErrLinkLocal, ".address", p.String(), want)
			return
		}
	}
	for _, kind := range addressKinds {
		if !p.Overlaps(kind.prefix) || kind.whole && kind.prefix.Bits() <= p.Bits() {
			continue
		}
		e.fault(kind.class, ".address", p.String(), fmt.Sprintf("a prefix %s %v (%s)", kind.want, kind.prefix, kind.source))
		return
	}
}

// addressKinds are the blocks that a prefix must lie in entirely or not at all.
var addressKinds = [...]struct {
	prefix netip.Prefix
	whole  bool // lying in it is allowed
	want   string
	class  error
	source string
}{
	{netip.MustParsePrefix("224.0.0.0/24"), false, "without", ErrLinkLocal, "never forwarded between links, RFC 5771 section 4"},
	{netip.MustParsePrefix("0.0.0.0/8"), false, "without", nil, "this network, RFC 1122 section 3.2.1.3"},
	{netip.MustParsePrefix("127.0.0.0/8"), false, "without", nil, "loopback, RFC 1122 section 3.2.1.3"},
	{netip.MustParsePrefix("240.0.0.0/4"), false, "without", nil, "reserved, RFC 1112 section 4"},
	{netip.MustParsePrefix("224.0.0.0/4"), true, "inside or outside of", nil, "multicast, RFC 5771 section 3"},
	{netip.MustParsePrefix("::/127"), false, "without", nil, "unspecified and loopback, RFC 4291 section 2.5"},
	{netip.MustParsePrefix("::ffff:0:0/96"), false, "without", nil, "IPv4-mapped, RFC 4291 section 2.5.5.2"},
	{netip.MustParsePrefix("ff00::/8"), true, "inside or outside of", nil, "multicast, RFC 4291 section 2.7"},
}

// prefix checks an output prefix.
func (e end) prefix(o Output, in Input) {
	e.allGroups(o, in)
	switch {
	case o.Len == 0 || !o.Address.IsValid() || !in.Address.IsValid():
	case o.Len != in.Len:
		e.fault(nil, ".address", netip.PrefixFrom(o.Address, int(o.Len)).String(),
			fmt.Sprintf("one address, or a prefix as long as the input's, /%d", in.lengthOrAll()))
	case !o.Address.IsMulticast():
		e.fault(nil, ".address", netip.PrefixFrom(o.Address, int(o.Len)).String(),
			"a prefix of groups: unicast addresses have a neighbour each, write one output for each")
	}
}

// port checks the destination port of an output.
func (e end) port(o Output, in Input) {
	if o.PortMode != PortSet && o.Port != 0 || o.PortMode != PortAdd && o.PortShift != 0 {
		e.fault(nil, ".port", strconv.Itoa(int(max(int32(o.Port), o.PortShift))), "no value with a port that is not set to it")
		return
	}
	switch o.PortMode {
	case PortSet:
		if o.Port == 0 {
			e.fault(nil, ".port", "0", "1 to 65535")
		}
	case PortKeep:
	case PortAdd:
		if o.PortShift == 0 || o.PortShift > 65534 || o.PortShift < -65534 {
			e.fault(nil, ".port", fmt.Sprintf("%+d", o.PortShift), "+1 to +65534 or -1 to -65534")
			return
		}
		for _, port := range [...]uint16{in.Port, in.PortTo} {
			if to := int32(port) + o.PortShift; port != 0 && (to < 1 || to > 65535) {
				e.fault(nil, ".port", fmt.Sprintf("%+d", o.PortShift), fmt.Sprintf("what leaves the input's port %d within 1 to 65535: it would be %d", port, to))
				break
			}
		}
	default:
		e.fault(nil, ".port", strconv.Itoa(int(o.PortMode)), "one of the modes declared")
	}
}

// family checks that an output is of the input's address family.
func (e end) family(addr, in netip.Addr) {
	if addr.IsValid() && in.IsValid() && addr.Unmap().Is4() != in.Unmap().Is4() {
		e.fault(ErrFamily, ".address", addr.String(),
			fmt.Sprintf("the family of the input, %s: a rule cannot translate between IPv4 and IPv6", bounded(in.String())))
	}
}

// source checks a source address against its destination.
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
		plain(e, ".src", p.Source, p.Source <= SourceAddress, p.SourceAddr, !p.SourceAddr.IsValid())
	}
	if p.TTL != TTLSet {
		plain(e, ".ttl", p.TTL, p.TTL <= TTLSet, p.TTLValue, p.TTLValue == 0)
	} else if p.TTLValue == 0 {
		e.fault(nil, ".ttl", "0", "1 to 255")
	}
	if p.DSCP != DSCPSet {
		plain(e, ".dscp", p.DSCP, p.DSCP <= DSCPSet, p.DSCPValue, p.DSCPValue == 0)
	} else if p.DSCPValue > 63 {
		e.fault(nil, ".dscp", strconv.Itoa(int(p.DSCPValue)), "0 to 63")
	}
	if p.VLAN == VLANSet {
		if e.vlan(p.VLANTags); p.VLANTags.ID == 0 {
			e.fault(nil, ".vlan", "", "vlan=ID or vlan=OUTER.ID")
		}
	} else {
		plain(e, ".vlan", p.VLAN, p.VLAN <= VLANSet, p.VLANTags, p.VLANTags == VLAN{})
	}
	if p.PCP > 7 || p.PCP != 0 && !p.PCPSet {
		e.fault(nil, ".pcp", strconv.Itoa(int(p.PCP)), "0 to 7")
	}
	e.rate(p.Rate)
	plain(e, ".csum", p.Checksum, p.Checksum <= ChecksumZero, 0, true)
	if p.Checksum == ChecksumZero && o.Address.Is6() {
		e.fault(nil, ".csum", p.Checksum.String(), "update: IPv6 needs the UDP checksum (RFC 8200 section 8.1)")
	}
}

// priority checks that a copy with a priority has a tag to carry it.
func (e end) priority(o Output, in Input) {
	if p := o.Policy; p.PCPSet && p.PCP <= 7 && (p.VLAN == VLANPop || p.VLAN == VLANKeep && in.VLAN == VLAN{}) {
		e.fault(nil, ".pcp", strconv.Itoa(int(p.PCP)), "a copy with a VLAN tag, which carries the priority, such as vlan=ID")
	}
}

// plain checks a policy without a value: it must be one of its enumeration, and its value must not
// be set.
func plain[V any](e end, part string, policy fmt.Stringer, known bool, value V, unset bool) {
	if !known {
		e.fault(nil, part, policy.String(), "one of the policies declared")
	} else if !unset {
		e.fault(nil, part, fmt.Sprint(value), fmt.Sprintf("no value with policy %v", policy))
	}
}

// unique checks an output against those in earlier slots.
func (e end) unique(o Output, before []Output) {
	for slot, b := range before {
		if b.Interface == o.Interface && b.Address == o.Address && b.Len == o.Len && b.PortMode == o.PortMode && b.Port == o.Port &&
			b.PortShift == o.PortShift && b.Policy.VLAN == o.Policy.VLAN && b.Policy.VLANTags == o.Policy.VLANTags {
			e.fault(ErrDuplicateOutput, "", o.String(), "another interface, address, port or VLAN: "+outField(slot)+" has these")
			return
		}
	}
}

// addrFault says what to use instead of an address that never appears on a wire, "" if the address
// is valid.
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

// linkLocalFault says what to use instead of a group that no router may forward, "" for any other
// address.
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

// ssmRange is the source-specific range that contains a group (RFC 4607 section 1), "" if none
// does.
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
