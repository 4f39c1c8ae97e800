package convert

import (
	"fmt"
	"net/netip"
	"strings"
)

// smcroute parses smcroute.conf(5):
//
//	phyint IFNAME [enable|disable] [mrdisc] [ttl-threshold TTL]
//	mgroup from IIF [source ADDR[/LEN]] group GROUP[/LEN]
//	ssmgroup from IIF source ADDR group GROUP
//	mroute from IIF [source ADDR[/LEN]] group GROUP[/LEN] to OIF [OIF ...]
//	include PATH
func (c *converter) smcroute(lines []source) {
	var joined []membership
	disabled := map[string]bool{}
	var routes []route
	for _, l := range lines {
		switch l.word(0) {
		case "phyint":
			if err := c.phyint(l, disabled); err != nil {
				c.note(l, "%v", err)
			}
		case "mgroup", "ssmgroup":
			r, err := parseRoute(l)
			switch {
			case err != nil:
				c.note(l, "%v", err)
			case len(r.out) > 0:
				c.note(l, "%q: want from INTERFACE group GROUP alone", "to")
			default:
				joined = append(joined, membership{line: l, iface: r.iface, group: r.group, source: r.source})
			}
		case "mroute":
			r, err := parseRoute(l)
			if err == nil && len(r.out) == 0 {
				err = fmt.Errorf("want interfaces after \"to\"")
			}
			if err != nil {
				c.note(l, "%v", err)
				continue
			}
			routes = append(routes, r)
		case "include":
			c.note(l, "convert the files that it names, too, and include the results")
		default:
			c.note(l, "%q: want phyint, mgroup, mroute or include", bounded(l.word(0)))
		}
	}
	for _, r := range routes {
		if disabled[r.iface] {
			c.note(r.line, "interface %s is disabled", r.iface)
			continue
		}
		var out []string
		for _, name := range r.out {
			switch {
			case disabled[name]:
				r.note = "in part: interface " + name + " is disabled"
			case name == r.iface:
				r.note = "in part: nothing is routed back to " + name
			default:
				out = append(out, name)
			}
		}
		r.out = out
		r.joinBy(joined)
		c.routes = append(c.routes, r)
	}
	c.notJoined(joined)
}

// phyint parses the settings of an interface.
func (c *converter) phyint(l source, disabled map[string]bool) error {
	name := l.word(1)
	if name == "" {
		return fmt.Errorf("want an interface")
	}
	var lost []string
	for i := 2; i < len(l.words); i++ {
		switch word := l.words[i]; word {
		case "enable":
			disabled[name] = false
		case "disable":
			disabled[name] = true
		case "ttl-threshold", "threshold":
			i++
			if err := c.threshold(name, l.word(i)); err != nil {
				return err
			}
		case "mrdisc":
			lost = append(lost, "the relay does not announce itself as a router (RFC 4286): it joins what it takes")
		default:
			lost = append(lost, fmt.Sprintf("%q is not known", bounded(word)))
		}
	}
	if len(lost) > 0 {
		return fmt.Errorf("%s", strings.Join(lost, "; "))
	}
	return nil // enable and disable: an interface is used if a rule names it
}

// parseRoute parses from IIF [source ADDR] group GROUP [to OIF...]; the parts before "to" may have
// any order.
func parseRoute(l source) (r route, err error) {
	r.line = l
	for i := 1; i < len(l.words); i += 2 {
		value := l.word(i + 1)
		switch word := l.words[i]; word {
		case "from":
			r.iface = value
		case "group":
			if r.group, err = parsePrefix(value); err == nil && !r.group.Addr().IsMulticast() {
				err = fmt.Errorf("group %s: want a multicast group", r.group)
			}
		case "source":
			r.source, err = parsePrefix(value)
			if err == nil && r.source.Addr().IsUnspecified() {
				r.source = netip.Prefix{} // any
			}
		case "to":
			r.out = l.words[i+1:]
			i = len(l.words)
		default:
			err = fmt.Errorf("%q: want from, source, group or to", bounded(word))
		}
		if err != nil {
			return r, err
		}
	}
	switch {
	case r.iface == "":
		return r, fmt.Errorf("want from INTERFACE")
	case !r.group.IsValid():
		return r, fmt.Errorf("want group GROUP")
	}
	return r, nil
}
