package discover

import (
	"fmt"
	"net/netip"
	"strings"

	"xdpcast/pkg/rules"
)

// Proposal is a rule that would take a stream.
type Proposal struct {
	Rule rules.Rule
	Why  string // a line for a comment
}

// Rules proposes a rule for each UDP stream and each announced one, which sends it to the same
// group and port on another interface. left counts those without a valid rule, such as streams
// within one link, which no router forwards.
func (r *Result) Rules(to string) (proposals []Proposal, left int) {
	p := proposer{to: to, names: map[string]bool{}, senders: map[rules.Input]int{}, taken: map[rules.Input]bool{}}
	for i := range r.Streams {
		p.senders[withoutSource(r.Streams[i].Input())]++
	}
	for _, s := range r.Sessions {
		for n, m := range s.Media {
			name := s.Name
			if len(s.Media) > 1 {
				name += "-" + m.Type
			}
			in := rules.Input{Interface: s.Interface, Address: m.Group, Port: m.Port, Source: m.Source, VLAN: rules.VLAN{ID: s.VLAN, Outer: s.OuterVLAN}}
			p.add(name, in, strings.TrimSpace(fmt.Sprintf("announced by %s: %q, stream %d: %s %s", s.Origin, s.Name, n+1, m.Type, m.Format)))
		}
	}
	for i := range r.Streams {
		s := &r.Streams[i]
		if s.Port == 0 || s.Kind == SAP || s.Kind == PTP {
			continue
		}
		in := s.Input()
		if p.taken[in] {
			continue // covered by its announcement
		}
		if p.senders[withoutSource(in)] == 1 && !sourceSpecific(in.Address) {
			in.Source = netip.Addr{} // any sender
		}
		p.add(fmt.Sprintf("%s-%s-%d", s.Kind, s.Group, s.Port), in, fmt.Sprintf("from %s, %.1f packets/s, %s", s.Source, s.PacketRate, s.Looks))
	}
	return p.all, p.left
}

// sourceSpecific reports whether a group can only be joined with a source (RFC 4607).
func sourceSpecific(group netip.Addr) bool {
	b := group.As16()
	return group.Is4() && b[12] == 232 || group.Is6() && b[0] == 0xff && b[1]>>4 == 3
}

func withoutSource(in rules.Input) rules.Input {
	in.Source = netip.Addr{}
	return in
}

type proposer struct {
	to      string
	all     []Proposal
	left    int
	names   map[string]bool
	senders map[rules.Input]int
	taken   map[rules.Input]bool
}

// add proposes a rule, unless one takes the same stream already or it would be invalid.
func (p *proposer) add(name string, in rules.Input, why string) {
	if p.taken[in] || p.taken[withoutSource(in)] {
		return
	}
	rule := rules.Rule{Name: p.name(name, in), In: in, Out: []rules.Output{{Interface: p.to, Address: in.Address, Port: in.Port}}}
	if p.to == in.Interface || rules.ValidateSet([]rules.Rule{rule}) != nil {
		p.left++
		return
	}
	p.taken[in] = true
	p.names[rule.Name] = true
	p.all = append(p.all, Proposal{rule, why})
}

// name makes a unique rule name from a text: letters, digits and "._:-".
func (p *proposer) name(text string, in rules.Input) string {
	slug := strings.Join(strings.FieldsFunc(text, func(r rune) bool {
		letter := r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r >= 'A' && r <= 'Z'
		return !letter && !strings.ContainsRune("._:", r)
	}), "-")
	slug = strings.TrimLeft(slug, "._:-")
	const room = 8 // for a numeric suffix
	slug = strings.TrimRight(slug[:min(len(slug), rules.MaxNameLen-room)], "._:-")
	if slug == "" {
		slug = fmt.Sprintf("stream-%d", in.Port)
	}
	name := slug
	for n := 2; p.names[name]; n++ {
		name = fmt.Sprintf("%s-%d", slug, n)
	}
	return name
}
