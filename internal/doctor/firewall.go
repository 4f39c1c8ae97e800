package doctor

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// What nftables does to the packets that keep groups joined. Relayed packets bypass it; IGMP and
// MLD queries and reports do not.

// Firewall is the nftables ruleset, and the interfaces on which groups are joined.
type Firewall struct {
	Ruleset Ruleset
	Inputs  []string
	// Groups are the groups of rules, IPv4 or IPv6, by interface.
	Groups map[string][]netip.AddrPort
}

// Ruleset is the part used of what "nft -j list ruleset" prints (libnftables-json(5)).
type Ruleset struct {
	Chains []Chain
	sets   map[string][]json.RawMessage // elements, by family, table and name
}

// Chain is a chain with its rules.
type Chain struct {
	Family, Table, Name string
	Hook, Policy, Dev   string // of a base chain
	Rules               []FirewallRule
}

// FirewallRule is one rule.
type FirewallRule struct {
	Handle      int
	Expressions []map[string]json.RawMessage
}

// ParseRuleset reads the JSON of nft.
func ParseRuleset(data []byte) (Ruleset, error) {
	var doc struct {
		Nftables []struct {
			Chain *struct {
				Family, Table, Name, Hook, Policy string
				Dev                               json.RawMessage
			}
			Rule *struct {
				Family, Table, Chain string
				Handle               int
				Expr                 []map[string]json.RawMessage
			}
			Set *struct {
				Family, Table, Name string
				Elem                []json.RawMessage
			}
		}
	}
	r := Ruleset{sets: map[string][]json.RawMessage{}}
	if err := json.Unmarshal(data, &doc); err != nil {
		return r, fmt.Errorf("nftables ruleset: %w", err)
	}
	index := map[string]int{}
	for _, o := range doc.Nftables {
		switch {
		case o.Chain != nil:
			c := o.Chain
			index[key(c.Family, c.Table, c.Name)] = len(r.Chains)
			r.Chains = append(r.Chains, Chain{Family: c.Family, Table: c.Table, Name: c.Name, Hook: c.Hook, Policy: c.Policy, Dev: strings.Trim(string(c.Dev), `"`)})
		case o.Set != nil:
			r.sets[key(o.Set.Family, o.Set.Table, o.Set.Name)] = o.Set.Elem
		}
	}
	for _, o := range doc.Nftables {
		if o.Rule == nil {
			continue
		}
		if i, ok := index[key(o.Rule.Family, o.Rule.Table, o.Rule.Chain)]; ok {
			r.Chains[i].Rules = append(r.Chains[i].Rules, FirewallRule{o.Rule.Handle, o.Rule.Expr})
		}
	}
	return r, nil
}

func key(parts ...string) string { return strings.Join(parts, "\x00") }

// tri is a three-valued answer: unknown if a rule tests a field that only real packets have.
type tri int8

const (
	no tri = iota
	unknown
	yes
)

func (t tri) not() tri { return yes - t }

func both(a, b tri) tri   { return min(a, b) }
func either(a, b tri) tri { return max(a, b) }

// sample is a packet, as far as its fields are known.
type sample struct {
	what     string // for people
	v6       bool
	outgoing bool
	ifname   string
	protocol []string // its names and numbers
	dst      netip.Addr
	types    []string // of ICMPv6 or IGMP
	port     uint16
	accept   string // rule text that accepts it
	relayed  bool   // a rule relays it: its fate here matters to the host alone
}

// samples are the packets that keep groups joined on an interface.
func samples(ifname string) []sample {
	igmp, icmp := []string{"igmp", "2"}, []string{"icmpv6", "ipv6-icmp", "58"}
	mld := "icmpv6 type { mld-listener-query, mld-listener-report, mld2-listener-report } accept"
	return []sample{
		{what: "IGMP queries", ifname: ifname, protocol: igmp, dst: netip.MustParseAddr("224.0.0.1"), types: []string{"membership-query", "17"}, accept: "ip protocol igmp accept"},
		{what: "IGMP reports", outgoing: true, ifname: ifname, protocol: igmp, dst: netip.MustParseAddr("224.0.0.22"), types: []string{"membership-report-v3", "34"}, accept: "ip protocol igmp accept"},
		{what: "MLD queries", v6: true, ifname: ifname, protocol: icmp, dst: netip.MustParseAddr("ff02::1"), types: []string{"mld-listener-query", "130"}, accept: mld},
		{what: "MLD reports", v6: true, outgoing: true, ifname: ifname, protocol: icmp, dst: netip.MustParseAddr("ff02::16"), types: []string{"mld2-listener-report", "143"}, accept: mld},
	}
}

func firewall(h *Host) (found []Finding) {
	f := &h.Firewall
	for _, ifname := range f.Inputs {
		all := samples(ifname)
		for _, g := range f.Groups[ifname] {
			all = append(all, sample{what: "UDP to " + g.String(), v6: g.Addr().Is6(), ifname: ifname, protocol: []string{"udp", "17"}, dst: g.Addr(), port: g.Port(), relayed: true})
		}
		for i := range all {
			for _, v := range f.Ruleset.drops(&all[i]) {
				found = append(found, v.finding(&all[i]))
			}
		}
	}
	return found
}

// dropped is a chain that drops a sample.
type dropped struct {
	chain  *Chain
	rule   *FirewallRule // nil: the policy
	unsure bool          // depends on unknown fields
}

func (d *dropped) finding(s *sample) Finding {
	where := fmt.Sprintf("the policy of chain %s of table %s %s", d.chain.Name, d.chain.Family, d.chain.Table)
	if d.rule != nil {
		where = fmt.Sprintf("rule %d of chain %s of table %s %s", d.rule.Handle, d.chain.Name, d.chain.Family, d.chain.Table)
	}
	chain := fmt.Sprintf("%s %s %s", d.chain.Family, d.chain.Table, d.chain.Name)
	if s.relayed {
		return warning("nft -a list chain "+chain, "%s drops %s on %s: the relay takes them before, receivers on this host get none", where, s.what, s.ifname)
	}
	direction := "coming in by"
	if s.outgoing {
		direction = "leaving by"
	}
	cure := "nft insert rule " + chain + " " + s.accept
	if d.unsure {
		return warning(cure, "%s may drop %s %s %s, which keep groups joined", where, s.what, direction, s.ifname)
	}
	return fault(cure, "%s drops %s %s %s: groups time out in switches and routers, and streams end some minutes after they begin", where, s.what, direction, s.ifname)
}

// drops returns the base chains that drop a sample.
func (r *Ruleset) drops(s *sample) (found []dropped) {
	for i := range r.Chains {
		c := &r.Chains[i]
		if !c.sees(s) {
			continue
		}
		w := walk{r: r, s: s}
		verdict, rule := w.chain(c, 0)
		switch {
		case verdict == drop:
			found = append(found, dropped{c, rule, w.unsure})
		case verdict == next && c.Policy == "drop" && !s.relayed:
			found = append(found, dropped{c, nil, w.unsure})
		}
	}
	return found
}

// sees reports whether a base chain receives a sample.
func (c *Chain) sees(s *sample) bool {
	hooks := []string{"ingress", "prerouting", "input"}
	if s.outgoing {
		hooks = []string{"output", "postrouting", "egress"}
	}
	if !slices.Contains(hooks, c.Hook) {
		return false
	}
	switch c.Family {
	case "ip":
		return !s.v6
	case "ip6":
		return s.v6
	case "netdev":
		devices := strings.FieldsFunc(c.Dev, func(r rune) bool { return strings.ContainsRune("[]\", \n", r) }) // one, or a list
		return slices.Contains(devices, s.ifname)
	}
	return c.Family == "inet"
}

// verdict is a rule's or chain's decision on a packet.
type verdict uint8

const (
	next verdict = iota // continue
	accept
	drop
	back // return
)

// walk evaluates a ruleset for one sample.
type walk struct {
	r      *Ruleset
	s      *sample
	unsure bool
	steps  int
}

// nft refuses rulesets with loops; these bound input from elsewhere.
const maxDepth, maxSteps = 32, 100_000

func (w *walk) chain(c *Chain, depth int) (verdict, *FirewallRule) {
	if depth > maxDepth {
		return next, nil
	}
	for i := range c.Rules {
		if w.steps++; w.steps > maxSteps {
			return next, nil
		}
		rule := &c.Rules[i]
		v, by := w.rule(c, rule, depth)
		switch v {
		case accept, drop:
			return v, by
		case back:
			return next, nil
		}
	}
	return next, nil
}

// rule evaluates one rule.
func (w *walk) rule(c *Chain, rule *FirewallRule, depth int) (verdict, *FirewallRule) {
	match, specific := yes, false
	for _, e := range rule.Expressions {
		if raw, ok := e["match"]; ok {
			m, about := w.match(c, raw)
			match, specific = both(match, m), specific || about
			if match == no {
				return next, nil
			}
			continue
		}
		v, by := w.statement(c, rule, e, depth)
		switch {
		case v == next:
		case match == yes:
			return v, by
		case v == accept:
			w.unsure = true // it may have been accepted here
		case v == drop && specific:
			w.unsure = true
			return v, by
		default: // a rule about something else, hardly meant for this packet
			return next, nil
		}
	}
	return next, nil
}

// statement evaluates a statement that ends or redirects the evaluation.
func (w *walk) statement(c *Chain, rule *FirewallRule, e map[string]json.RawMessage, depth int) (verdict, *FirewallRule) {
	for name, raw := range e {
		switch name {
		case "accept":
			return accept, rule
		case "drop", "reject":
			return drop, rule
		case "return":
			return back, rule
		case "jump", "goto":
			var to struct{ Target string }
			if json.Unmarshal(raw, &to) != nil {
				return next, nil
			}
			for i := range w.r.Chains {
				if t := &w.r.Chains[i]; t.Family == c.Family && t.Table == c.Table && t.Name == to.Target {
					v, by := w.chain(t, depth+1)
					if v == next && name == "goto" {
						return back, rule
					}
					return v, by
				}
			}
		case "vmap", "queue", "fwd":
			w.unsure = true
		}
	}
	return next, nil
}

// match reports whether an expression matches the sample, and whether it tests something specific
// to it: protocol, type or group.
func (w *walk) match(c *Chain, raw json.RawMessage) (m tri, specific bool) {
	var e struct {
		Op    string
		Left  map[string]json.RawMessage
		Right json.RawMessage
	}
	if json.Unmarshal(raw, &e) != nil {
		return unknown, false
	}
	var values []string
	values, specific, m = w.left(e.Left)
	if m == unknown && values != nil {
		m = w.in(c, values, e.Right)
	}
	switch e.Op {
	case "==", "in", "":
		return m, specific && m == yes
	case "!=":
		return m.not(), false
	}
	return unknown, false
}

// left returns the sample's values of the field that an expression tests, or no if the packet has
// no such field.
func (w *walk) left(left map[string]json.RawMessage) (values []string, specific bool, m tri) {
	var f struct{ Key, Protocol, Field string }
	s := w.s
	if raw, ok := left["meta"]; ok && json.Unmarshal(raw, &f) == nil {
		switch {
		case f.Key == "l4proto":
			return s.protocol, true, unknown
		case f.Key == "nfproto" && s.v6:
			return []string{"ipv6", "10"}, false, unknown
		case f.Key == "nfproto":
			return []string{"ipv4", "2"}, false, unknown
		case f.Key == "protocol" && s.v6:
			return []string{"ip6", "ipv6"}, false, unknown
		case f.Key == "protocol":
			return []string{"ip"}, false, unknown
		case (f.Key == "iifname" || f.Key == "iif") != s.outgoing && strings.HasPrefix(f.Key, "iif"),
			(f.Key == "oifname" || f.Key == "oif") == s.outgoing && strings.HasPrefix(f.Key, "oif"):
			return []string{s.ifname}, false, unknown
		case f.Key == "pkttype" && !s.outgoing:
			return []string{"multicast"}, false, unknown
		}
		return nil, false, unknown
	}
	if raw, ok := left["ct"]; ok && json.Unmarshal(raw, &f) == nil && f.Key == "state" {
		return []string{"new"}, false, unknown
	}
	if raw, ok := left["payload"]; ok && json.Unmarshal(raw, &f) == nil {
		return w.payload(f.Protocol, f.Field)
	}
	return nil, false, unknown
}

// payload is left for a header field.
func (w *walk) payload(protocol, field string) (values []string, specific bool, m tri) {
	s := w.s
	switch protocol {
	case "ip", "ip6":
		if (protocol == "ip6") != s.v6 {
			return nil, false, no
		}
		switch field {
		case "protocol", "nexthdr":
			if s.v6 && s.types != nil {
				return []string{"hopopt", "0"}, true, unknown // the router alert's header comes first
			}
			return s.protocol, true, unknown
		case "daddr":
			return []string{s.dst.String()}, true, unknown
		}
		return nil, false, unknown
	case "igmp", "icmpv6", "icmp", "udp", "tcp":
		if !slices.Contains(s.protocol, protocol) {
			return nil, false, no
		}
		switch {
		case field == "type" && s.types != nil:
			return s.types, true, unknown
		case field == "dport" && s.port != 0:
			return []string{fmt.Sprint(s.port)}, true, unknown
		}
	}
	return nil, false, unknown
}

// in reports whether one of the values equals the right side of a match, or is in it.
func (w *walk) in(c *Chain, values []string, right json.RawMessage) tri {
	var text string
	if json.Unmarshal(right, &text) == nil {
		if name, ok := strings.CutPrefix(text, "@"); ok {
			return w.inAny(c, values, w.r.sets[key(c.Family, c.Table, name)])
		}
		return isOneOf(values, text)
	}
	var number json.Number
	if json.Unmarshal(right, &number) == nil {
		return isOneOf(values, number.String())
	}
	var list []json.RawMessage
	if json.Unmarshal(right, &list) == nil {
		return w.inAny(c, values, list)
	}
	var o struct {
		Set    json.RawMessage
		Prefix *struct {
			Addr string
			Len  int
		}
		Range []json.RawMessage
		Elem  *struct{ Val json.RawMessage }
	}
	if json.Unmarshal(right, &o) != nil {
		return unknown
	}
	switch {
	case o.Set != nil:
		return w.in(c, values, o.Set)
	case o.Elem != nil:
		return w.in(c, values, o.Elem.Val)
	case o.Prefix != nil:
		return inPrefix(values, o.Prefix.Addr, o.Prefix.Len)
	case len(o.Range) == 2:
		return inRange(values, o.Range)
	}
	return unknown
}

func (w *walk) inAny(c *Chain, values []string, list []json.RawMessage) tri {
	m := no
	for _, right := range list {
		m = either(m, w.in(c, values, right))
	}
	return m
}

func isOneOf(values []string, text string) tri {
	begin, pattern := strings.CutSuffix(text, "*") // wildcard of an interface name
	for _, v := range values {
		if v == text || pattern && strings.HasPrefix(v, begin) {
			return yes
		}
	}
	return no
}

func inPrefix(values []string, addr string, length int) tri {
	base, err := netip.ParseAddr(addr)
	if err != nil {
		return unknown
	}
	prefix, err := base.Prefix(length)
	if err != nil {
		return unknown
	}
	for _, v := range values {
		if a, err := netip.ParseAddr(v); err == nil && prefix.Contains(a) {
			return yes
		}
	}
	return no
}

// inRange compares addresses, or numbers.
func inRange(values []string, bounds []json.RawMessage) tri {
	var low, high netip.Addr
	if json.Unmarshal(bounds[0], &low) == nil && json.Unmarshal(bounds[1], &high) == nil && low.IsValid() {
		for _, v := range values {
			if a, err := netip.ParseAddr(v); err == nil && low.Compare(a) <= 0 && a.Compare(high) <= 0 {
				return yes
			}
		}
		return no
	}
	var from, to int
	if json.Unmarshal(bounds[0], &from) != nil || json.Unmarshal(bounds[1], &to) != nil {
		return unknown
	}
	for _, v := range values {
		var n int
		if _, err := fmt.Sscan(v, &n); err == nil && from <= n && n <= to {
			return yes
		}
	}
	return no
}
