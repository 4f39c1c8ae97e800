package convert

import (
	"fmt"
	"net/netip"
	"strings"

	"xdpcast/pkg/rules"
)

// igmpproxy parses igmpproxy.conf(5):
//
//	quickleave
//	phyint IFNAME upstream|downstream|disabled [ratelimit N] [threshold N]
//	    altnet NETWORK
//	    whitelist GROUPS
//	    blacklist GROUPS
//
// The program forwards the groups that hosts downstream have joined. Its static part is which
// groups may be forwarded from the upstream to the downstream interfaces: the whitelist, or
// otherwise all.
func (c *converter) igmpproxy(lines []source) {
	var up []upstream
	var down []string
	role := ""
	for _, l := range lines {
		switch word := l.word(0); word {
		case "phyint":
			var err error
			if role, err = c.proxyInterface(l); err != nil {
				c.note(l, "%v", err)
				role = ""
				continue
			}
			switch role {
			case "upstream":
				up = append(up, upstream{line: l, iface: l.word(1)})
			case "downstream":
				down = append(down, l.word(1))
			}
		case "quickleave":
			c.note(l, "memberships are held while the rules are there")
		case "altnet":
			c.note(l, "the rules take the groups from any sender; NETWORK@GROUP limits a rule for one group")
		case "whitelist":
			p, err := parsePrefix(l.word(1))
			switch {
			case err != nil:
				c.note(l, "%v", err)
			case role != "upstream":
				c.note(l, "want it below the interface upstream")
			default:
				u := &up[len(up)-1]
				u.groups = append(u.groups, route{line: l, group: p})
			}
		case "blacklist":
			c.note(l, "the groups are relayed if a rule takes them: give them a rule of their own or narrow the others")
		default:
			c.note(l, "%q: want phyint, altnet, whitelist or quickleave", bounded(word))
		}
	}
	for _, u := range up {
		c.upstream(u, down)
	}
	if len(up) > 0 {
		return
	}
	for _, l := range lines {
		if l.word(2) == "downstream" {
			c.note(l, "there is no interface upstream")
		}
	}
}

// upstream is an interface from which groups come.
type upstream struct {
	line   source
	iface  string
	groups []route // of its whitelist
}

func (c *converter) upstream(u upstream, down []string) {
	if len(down) == 0 {
		c.note(u.line, "there is no interface downstream")
		return
	}
	if len(u.groups) == 0 {
		all := netip.MustParsePrefix("224.0.0.0/4")
		u.groups = []route{{line: u.line, group: all, note: "in part: every group is relayed, and none joined: name those in use, or join=GROUP+GROUP..."}}
	}
	for _, r := range u.groups {
		r.iface, r.out = u.iface, down
		switch bits := r.group.Addr().BitLen() - r.group.Bits(); {
		case bits == 0:
		case bits <= maxJoinBits:
			r.join = rules.JoinAll
		default:
			r.join = rules.JoinNone
			if r.note == "" {
				r.note = "in part: the groups are too many to join all, and none is joined: write join=GROUP+GROUP... for those in use"
			}
		}
		c.routes = append(c.routes, r)
	}
}

// proxyInterface parses a phyint line and returns the interface's role.
func (c *converter) proxyInterface(l source) (role string, err error) {
	name, role := l.word(1), l.word(2)
	switch role {
	case "upstream", "downstream", "disabled":
	default:
		return "", fmt.Errorf("%q: want upstream, downstream or disabled", bounded(role))
	}
	var lost []string
	for i := 3; i < len(l.words); i += 2 {
		switch word := l.words[i]; word {
		case "ratelimit":
			if l.word(i+1) != "0" {
				lost = append(lost, "ratelimit has no effect in the kernel; rate= of an output bounds it")
			}
		case "threshold":
			if err := c.threshold(name, l.word(i+1)); err != nil {
				return "", err
			}
		default:
			lost = append(lost, fmt.Sprintf("%q is not known", bounded(word)))
		}
	}
	if len(lost) > 0 {
		c.result.Lines = append(c.result.Lines, Line{Number: l.number, Text: l.text, Note: "in part: " + strings.Join(lost, "; ")})
	}
	return role, nil
}
