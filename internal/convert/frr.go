package convert

import (
	"fmt"
	"net/netip"
	"slices"
)

// frr parses the static multicast routes of FRR's pimd and its memberships:
//
//	interface IIF [vrf NAME]
//	 ip mroute OIF GROUP [SOURCE]
//	 ip igmp join GROUP [SOURCE]        also join-group and static-group
//	 ipv6 mroute OIF GROUP [SOURCE]
//	 ipv6 mld join GROUP [SOURCE]
//
// Routes of one group, source and interface become one rule, with an output for each. `ip mroute
// PREFIX NEXTHOP`, outside an interface block, is a route for the reverse path check and not for
// groups.
func (c *converter) frr(lines []source) {
	var joined []membership
	var routes []route
	iface := ""
	for _, l := range lines {
		switch {
		case l.word(0) == "interface" && l.word(1) != "":
			iface = l.word(1)
			continue
		case l.word(0) == "exit" || l.word(0) == "end" || l.word(0) == "exit-vrf":
			iface = ""
			continue
		case !inInterface(l):
			iface = ""
		}
		family, what := l.word(0), l.word(1)
		switch {
		case family != "ip" && family != "ipv6", what != "mroute" && what != "igmp" && what != "mld":
			c.note(l, "not a static multicast route")
		case what == "mroute" && iface == "":
			c.note(l, "a route for the reverse path check, which the relay does not make")
		case what == "mroute":
			r, err := frrRoute(l, iface, 3)
			r.out = []string{l.word(2)}
			if err != nil {
				c.note(l, "%v", err)
				continue
			}
			at := slices.IndexFunc(routes, r.same)
			switch {
			case at < 0:
				routes = append(routes, r)
			case slices.Contains(routes[at].out, r.out[0]):
				c.note(l, "line %d says the same", routes[at].line.number)
			default:
				routes[at].out = append(routes[at].out, r.out[0])
			}
		case iface != "" && (l.word(2) == "join" || l.word(2) == "join-group" || l.word(2) == "static-group"):
			r, err := frrRoute(l, iface, 3)
			if err != nil {
				c.note(l, "%v", err)
				continue
			}
			joined = append(joined, membership{line: l, iface: iface, group: r.group, source: r.source})
		default:
			c.note(l, "a querier, which the relay is not")
		}
	}
	for _, r := range routes {
		r.joinBy(joined)
		c.routes = append(c.routes, r)
	}
	c.notJoined(joined)
}

// inInterface says whether a line can be in an interface block. vtysh indents it, files written by
// hand may not; a line that begins another block is not in it.
func inInterface(l source) bool {
	switch l.word(0) {
	case "router", "route-map", "vrf", "line", "access-list", "key", "pseudowire", "segment-routing", "bfd", "frr", "hostname", "log", "service":
		return false
	}
	return true
}

// same says whether two routes have the same input.
func (r route) same(o route) bool {
	return r.iface == o.iface && r.group == o.group && r.source == o.source
}

// frrRoute parses GROUP [SOURCE] from a word on.
func frrRoute(l source, iface string, at int) (r route, err error) {
	r.line, r.iface = l, iface
	group, err := netip.ParseAddr(l.word(at))
	if err != nil || group.Zone() != "" || !group.IsMulticast() || len(l.words) > at+2 {
		return r, fmt.Errorf("want a multicast group, optionally followed by a source")
	}
	r.group = netip.PrefixFrom(group, group.BitLen())
	if text := l.word(at + 1); text != "" {
		source, err := netip.ParseAddr(text)
		if err != nil || source.Zone() != "" {
			return r, fmt.Errorf("source %q: want an address", bounded(text))
		}
		if !source.IsUnspecified() {
			r.source = netip.PrefixFrom(source, source.BitLen())
		}
	}
	return r, nil
}
