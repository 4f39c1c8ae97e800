package plan

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"xdpcast/internal/network"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/rules"
)

// Topologies are written a line a link: its name, its addresses, and what is not as usual of it.
//
//	eth0 10.0.0.1              an Ethernet interface with an address, up, with a carrier
//	veth1 kind=veth notx       frames that are redirected to it vanish
//	eth2 down master=br0       a port of a bridge, which is down
//	tun0 noeth nocarrier       a tun device that nobody reads
//
// Rules are written as xdpcast reload shows them, "NAME: INPUT -> OUTPUT... [path=PATH]".

func parseLinks(t testing.TB, lines ...string) (all []*network.Link) {
	t.Helper()
	for i, line := range lines {
		words := strings.Fields(line)
		l := &network.Link{
			LinkID: network.LinkID{Index: i + 1, Generation: 1}, Name: words[0], MAC: [6]byte{2, 0, 0, 0, 0, byte(i + 1)},
			Ethernet: true, MTU: 1500, Up: true, Carrier: true, Queues: 1,
			Features: network.Features{Known: true, Native: true, Transmit: true, TransmitSG: true},
		}
		for _, word := range words[1:] {
			setLink(t, l, word)
		}
		all = append(all, l)
	}
	for _, l := range all { // a master is named; its index follows
		for _, m := range all {
			if l.MasterKind != "" && m.Name == l.MasterKind {
				l.Master, l.MasterKind = m.Index, m.Kind
				break
			}
		}
	}
	return all
}

func setLink(t testing.TB, l *network.Link, word string) {
	t.Helper()
	key, value, _ := strings.Cut(word, "=")
	number, _ := strconv.Atoi(value)
	switch key {
	case "down":
		l.Up, l.Carrier = false, false
	case "nocarrier":
		l.Carrier = false
	case "noeth":
		l.Ethernet, l.MAC = false, [6]byte{}
	case "lo":
		l.Loopback, l.Ethernet = true, false
	case "notx":
		l.Features.Transmit, l.Features.TransmitSG = false, false
	case "nosg":
		l.Features.TransmitSG = false
	case "unknown":
		l.Features = network.Features{}
	case "hardware":
		l.Hardware = true
	case "mtu":
		l.MTU = number
	case "queues":
		l.Queues = number
	case "gen":
		l.Generation = uint64(number)
	case "index":
		l.Index = number
	case "kind":
		l.Kind = value
	case "master":
		l.MasterKind = value
	case "alt":
		l.AltNames = strings.Split(value, ",")
	default:
		l.Addrs = append(l.Addrs, netip.MustParseAddr(word))
	}
}

func parseRule(t testing.TB, text string) *Rule {
	t.Helper()
	r := &Rule{Origin: OriginAPI}
	name, rest, _ := strings.Cut(text, ": ")
	if file, ok := strings.CutPrefix(name, "file/"); ok {
		name, r.Origin = file, OriginFile
	}
	in, out, ok := strings.Cut(rest, " -> ")
	if !ok {
		t.Fatalf("rule %q: want NAME: INPUT -> OUTPUT", text)
	}
	var err error
	r.Name = name
	if err := r.ParseInputs(in); err != nil {
		t.Fatal(err)
	}
	for _, word := range strings.Fields(out) {
		if merge, ok := strings.CutPrefix(word, "merge="); ok {
			if err := r.ParseStream(merge, ""); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if failover, ok := strings.CutPrefix(word, "failover="); ok {
			if err := r.ParseStream("", failover); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if path, ok := strings.CutPrefix(word, "path="); ok {
			if r.Path, err = rules.ParsePath(path); err != nil {
				t.Fatal(err)
			}
			continue
		}
		o, err := rules.ParseOutput(word)
		if err != nil {
			t.Fatal(err)
		}
		r.Out = append(r.Out, o)
	}
	return r
}

func parseRules(t testing.TB, lines ...string) (all []*Rule) {
	t.Helper()
	for _, line := range lines {
		all = append(all, parseRule(t, line))
	}
	slices.SortFunc(all, func(a, b *Rule) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// newWorld is one where every link with an Ethernet header runs the program in native mode.
func newWorld(t testing.TB, links []string, rules ...string) World {
	t.Helper()
	return World{Rules: parseRules(t, rules...), Network: network.NewSnapshot(parseLinks(t, links...), nil), Answers: attachedTo(parseLinks(t, links...))}
}

func attachedTo(links []*network.Link) Answers {
	a := Answers{
		Attached: map[network.LinkID]Attached{}, Tags: map[network.LinkID]error{}, Joined: map[Membership]Join{}, Carried: map[string]flow.Path{},
		Refused: map[string]error{}, NoTransmit: map[network.LinkID]string{}, Neighbours: map[network.NeighbourKey]error{},
	}
	for _, l := range links {
		if l.Ethernet {
			a.Attached[l.LinkID] = Attached{}
		}
	}
	return a
}

// link finds a link that must be there.
func (w *World) link(t testing.TB, name string) *network.Link {
	t.Helper()
	l := w.Network.Link(name)
	if l == nil {
		t.Fatalf("no link %s", name)
	}
	return l
}

// setHop makes the snapshot answer a way by a link.
func (w *World) setHop(t testing.TB, ifname, dst string, hop network.Hop) {
	t.Helper()
	hops := map[network.HopKey]network.Hop{}
	for _, l := range w.Network.Links() {
		for _, d := range hopTargets {
			if h := w.Network.Hop(network.HopKey{Link: l.LinkID, Dst: d}); h.Kind != network.HopUnknown || h.Err != nil {
				hops[network.HopKey{Link: l.LinkID, Dst: d}] = h
			}
		}
	}
	hops[network.HopKey{Link: w.link(t, ifname).LinkID, Dst: addr(dst)}] = hop
	w.Network = network.NewSnapshot(w.Network.Links(), hops)
}

var hopTargets = []netip.Addr{addr("10.1.0.5"), addr("10.1.0.6"), addr("10.1.0.255"), addr("10.9.0.1"), addr("2001:db8::5")}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// describe writes a plan as lines: rules, and below them flows and outputs.
func describe(p *Plan) (lines []string) {
	reason := func(text string) string {
		if text == "" {
			return ""
		}
		return ": " + text
	}
	for _, r := range p.Rules {
		lines = append(lines, fmt.Sprintf("rule %s %s%s", r.Rule.Name, r.State, reason(r.Reason)))
		for _, f := range r.Flows {
			state := "waits"
			if f.Publish {
				state = PathName(f.Flow.Path)
			}
			lines = append(lines, fmt.Sprintf("flow %s on %s %s %s%s", f.Flow.Name, f.In.Name, f.State, state, reason(f.Reason)))
			if note := f.Note(); note != "" {
				lines = append(lines, fmt.Sprintf("note %s: %s", f.Flow.Name, note))
			}
			for i, o := range f.Outputs {
				lines = append(lines, fmt.Sprintf("out %s %s %s%s", f.Flow.Name, o.Interface, o.State, reason(o.Reason)))
				if f.Flow.Out[i].Blocked == flow.NoNeighbour {
					lines = append(lines, fmt.Sprintf("blocked %s %s no_neighbour", f.Flow.Name, o.Interface))
				}
			}
		}
	}
	return lines
}

var errTaken = errors.New("another program has it")
