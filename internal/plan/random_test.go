package plan

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"xdpcast/internal/labtest"
	"xdpcast/internal/network"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/rules"
)

// dice gives numbers from bytes, and 0 behind their end: so that a fuzzer can steer what a test makes
// of them.
type dice struct{ data []byte }

func (d *dice) n(sides int) int {
	if len(d.data) == 0 || sides <= 1 {
		return 0
	}
	b := d.data[0]
	d.data = d.data[1:]
	return int(b) % sides
}

// rare is true once in so many.
func (d *dice) rare(sides int) bool { return d.n(sides) == sides-1 }

func pick[T any](d *dice, from ...T) T { return from[d.n(len(from))] }

// model is a host that tests make up, and how its kernel would answer.
type model struct {
	links  []*network.Link
	routes map[netip.Addr]network.Hop // by destination, whatever the link
	rules  []*Rule

	taken   map[string]bool // links that another's program holds
	generic map[string]bool
	noTags  map[string]bool
	noJoin  map[netip.Addr]bool
	fails   map[string]bool // flows that their path does not take
	answers Answers
	planned map[string]flow.Path // answers.Carried of the last plan; nil: none
	hops    []network.HopKey     // asked for
	snap    *network.Snapshot
}

var linkNames = []string{"eth0", "eth1", "veth0", "veth1", "br0", "tun0", "lo", "eth10"}

func newModel(d *dice) *model {
	m := &model{
		routes: map[netip.Addr]network.Hop{}, taken: map[string]bool{}, generic: map[string]bool{}, noTags: map[string]bool{},
		noJoin: map[netip.Addr]bool{}, fails: map[string]bool{}, answers: attachedTo(nil),
	}
	m.snapshot()
	for range 5 + d.n(12) {
		m.change(d)
	}
	return m
}

// change makes one thing of the host another.
func (m *model) change(d *dice) {
	switch d.n(9) {
	case 0, 1, 2:
		m.changeLink(d, linkNames[d.n(len(linkNames))])
	case 3, 4, 5:
		m.changeRule(d)
	case 6:
		m.routes[pick(d, hopTargets...)] = randomHop(d)
	default:
		m.changeAnswers(d)
	}
	m.snapshot()
}

func randomHop(d *dice) network.Hop {
	h := network.Hop{Kind: network.HopKind(d.n(5))}
	if h.Kind == network.HopUnknown && d.rare(2) {
		h.Err = errTaken
	}
	if h.Kind == network.HopUnicast {
		h.Via, h.Gateway = pick(d, addr("10.1.0.5"), addr("10.1.0.254"), addr("fe80::1")), d.rare(2)
		if h.Resolved = d.n(3) != 0; h.Resolved {
			h.MAC = [6]byte{2, 1}
		} else {
			h.Failed = d.rare(2)
		}
	}
	return h
}

func (m *model) changeLink(d *dice, name string) {
	i := slices.IndexFunc(m.links, func(l *network.Link) bool { return l.Name == name })
	if i < 0 {
		m.links = append(m.links, m.newLink(d, name))
		return
	}
	if d.rare(5) {
		m.links = slices.Delete(slices.Clone(m.links), i, i+1)
		return
	}
	l := *m.links[i] // links are values that do not change
	switch d.n(10) {
	case 0:
		l.Up = !l.Up
		l.Carrier = l.Up
	case 1:
		l.Carrier = l.Up && !l.Carrier
	case 2:
		l.MTU = pick(d, 1500, 9000)
	case 3:
		l.Features.Transmit = !l.Features.Transmit
	case 4:
		l.Generation++
	case 5:
		l.MAC[4]++
	case 6:
		l.Addrs = randomAddrs(d)
	case 7:
		l.AltNames = m.freeNames(d, name)
	case 8:
		l.Master = 0
		if master := m.master(); master != nil && name != "br0" {
			l.Master, l.MasterKind = master.Index, master.Kind
		}
	case 9: // it is renamed
		to := linkNames[d.n(len(linkNames))]
		if !slices.ContainsFunc(m.links, func(l *network.Link) bool { return l.Name == to }) {
			l.Name = to
		}
	}
	m.links = slices.Clone(m.links)
	m.links[i] = &l
}

func (m *model) master() *network.Link {
	for _, l := range m.links {
		if l.Name == "br0" {
			return l
		}
	}
	return nil
}

func (m *model) newLink(d *dice, name string) *network.Link {
	l := &network.Link{
		LinkID: network.LinkID{Index: m.freeIndex(), Generation: uint64(1 + d.n(200))}, Name: name,
		Ethernet: name != "tun0" && name != "lo", Loopback: name == "lo", MTU: pick(d, 1500, 9000), Up: !d.rare(4), Queues: d.n(3), Hardware: d.rare(2),
		Features: network.Features{Known: !d.rare(3), Transmit: !d.rare(3), TransmitSG: d.rare(2)}, Addrs: randomAddrs(d), AltNames: m.freeNames(d, name),
	}
	l.Carrier = l.Up && !d.rare(4)
	if l.Ethernet {
		l.MAC = [6]byte{2, 0, 0, 0, 0, byte(l.Index)}
	}
	switch {
	case strings.HasPrefix(name, "veth"):
		l.Kind = "veth"
	case name == "br0":
		l.Kind, l.Features = pick(d, "bridge", "bond", "vrf"), network.Features{Known: true}
	}
	return l
}

// freeIndex is the index of a new link: mostly that of one that was removed.
func (m *model) freeIndex() int {
	for index := 1; ; index++ {
		if !slices.ContainsFunc(m.links, func(l *network.Link) bool { return l.Index == index }) {
			return index
		}
	}
}

func randomAddrs(d *dice) (all []netip.Addr) {
	for _, a := range []netip.Addr{addr("10.1.0.1"), addr("fe80::1"), addr("2001:db8::1"), addr("10.1.0.6")} {
		if !d.rare(3) {
			all = append(all, a)
		}
	}
	return all
}

// freeNames are alternative names that no other link has.
func (m *model) freeNames(d *dice, name string) (all []string) {
	for _, alt := range []string{"alt0", "alt1"} {
		if d.rare(3) && !slices.ContainsFunc(m.links, func(l *network.Link) bool { return l.Name != name && slices.Contains(l.AltNames, alt) }) {
			all = append(all, alt)
		}
	}
	return all
}

var ruleNames = []string{"a", "b", "c", "d", "e", "f"}

// changeRule adds, replaces or removes a rule, as far as the set stays valid.
func (m *model) changeRule(d *dice) {
	name := ruleNames[d.n(len(ruleNames))]
	next := slices.DeleteFunc(slices.Clone(m.rules), func(r *Rule) bool { return r.Name == name })
	if !d.rare(4) {
		next = append(next, randomRule(d, name))
	}
	slices.SortFunc(next, func(a, b *Rule) int { return strings.Compare(a.Name, b.Name) })
	var set []rules.Rule
	for _, r := range next {
		set = append(set, r.Rule)
	}
	if rules.ValidateSet(set) == nil {
		m.rules = next
	}
}

func randomRule(d *dice, name string) *Rule {
	r := &Rule{Origin: pick(d, OriginAPI, OriginFile)}
	is6 := d.rare(6)
	names := []string{"eth0", "eth1", "veth0", "br0", "tun0", "alt0", "alt1", "eth+", "+", "eth1+", "veth1", "lo"}
	in := pick(d, "239.1.1.1:5000", "239.1.1.2", "10.9.9.9@239.1.1.1:5000", "10.1.0.1:5000", "239.1.1.0/30", "10.7.0.0/16")
	if is6 {
		in = pick(d, "[ff05::1]:5000", "[2001:db8::1]:5000", "2001:db8::9@[ff05::1]:5000")
	}
	in += "%" + pick(d, names...)
	if strings.HasPrefix(in, "239.1.1.0/30") {
		in += ",join=" + pick(d, "all", "none", "239.1.1.1+239.1.1.2")
	}
	in += pick(d, "", "", "", ",vlan=7", ",local=yes", ",rate=1Mbit")
	if d.rare(2) {
		in += ",loop=allow"
	}
	var err error
	if r.In, r.Accept, err = rules.ParseInput(in); err != nil {
		panic(err)
	}
	if !is6 && d.rare(4) { // another input of the stream
		if err := r.ParseInputs(in + " " + pick(d, "239.1.1.1:5000", "239.1.1.3:5000", "10.9.9.9@239.1.1.1:5000") + "%" + pick(d, names...)); err != nil {
			panic(err)
		}
		merge := pick(d, "rtp", "")
		if err := r.ParseStream(merge, map[string]string{"": "20ms"}[merge]); err != nil {
			panic(err)
		}
	}
	for range 1 + d.n(3) {
		out := pick(d, "239.2.2.1:6000", "239.2.2.2", "239.2.2.3:+1", "10.1.0.5:6000", "10.1.0.255:6000", "10.1.0.6:7000", "239.1.1.1:5000")
		if is6 {
			out = pick(d, "[ff05::2]:6000", "[2001:db8::5]:6000", "[ff05::1]:5000")
		}
		out += "%" + pick(d, names...) + pick(d, "", "", ",src=keep", ",ttl=dec", ",rate=10pps")
		o, err := rules.ParseOutput(out)
		if err != nil {
			panic(err)
		}
		r.Out = append(r.Out, o)
	}
	r.Name, r.Path = name, rules.Path(pick(d, 0, 0, 0, 1, 2, 3))
	return r
}

func (m *model) changeAnswers(d *dice) {
	toggle := func(set map[string]bool, key string) { set[key] = !set[key] }
	switch link := linkNames[d.n(len(linkNames))]; d.n(8) {
	case 0:
		toggle(m.taken, link)
	case 1:
		toggle(m.generic, link)
	case 2:
		toggle(m.noTags, link)
	case 3:
		group := pick(d, addr("239.1.1.1"), addr("239.1.1.2"), addr("ff05::1"))
		m.noJoin[group] = !m.noJoin[group]
	case 4:
		toggle(m.fails, pick(d, "a", "b", "c%eth0", "d", "a%0", "b%1"))
	case 5:
		if l := m.snap.Link(link); l != nil {
			m.answers.NoTransmit[l.LinkID] = pick(d, "", "3 frames")
		}
	case 6:
		clear(m.answers.NoTransmit)
	case 7: // the relay is started anew: what is in force stays
		carried := m.answers.Carried
		m.answers = attachedTo(nil)
		m.answers.Carried = carried
	}
}

// snapshot makes the picture of the host, with the ways that were asked for.
func (m *model) snapshot() {
	hops := map[network.HopKey]network.Hop{}
	for _, key := range m.hops {
		hops[key] = m.routes[key.Dst]
	}
	m.snap = network.NewSnapshot(m.links, hops)
}

func (m *model) world() World { return World{Rules: m.rules, Network: m.snap, Answers: m.answers} }

// act does what a plan wants, as the reconcilers and the kernel would.
func (m *model) act(p *Plan) {
	a := &m.answers
	for _, id := range p.Attach {
		name := m.snap.ByIndex(id.Index).Name
		a.Attached[id] = Attached{Generic: m.generic[name]}
		if m.taken[name] {
			a.Attached[id] = Attached{Err: errTaken}
		}
	}
	for _, id := range p.Tags {
		a.Tags[id] = nil
		if m.noTags[m.snap.ByIndex(id.Index).Name] {
			a.Tags[id] = errTaken
		}
	}
	clear(a.Refused)
	for name := range m.fails {
		if m.fails[name] {
			a.Refused[name] = errTaken
		}
	}
	a.Carried = inForce(p)
	joined := map[Membership]Join{}
	for membership := range p.Memberships() {
		joined[membership] = Join{Joined: true, Tries: 1}
		if m.noJoin[membership.Group] {
			joined[membership] = Join{Err: errTaken, Transient: membership.Group.Is6(), Tries: 2, Next: time.Unix(1e9, 0)}
		}
	}
	a.Joined = joined
	m.hops = p.Hops
	m.snapshot()
}

// recarried is Answers.Recarried; nil, for that nothing is known, for the first plan.
func (m *model) recarried() (names []string) {
	if m.planned != nil {
		names = []string{}
	}
	for name, path := range m.answers.Carried {
		if m.planned != nil && m.planned[name] != path {
			names = append(names, name)
		}
	}
	for name := range m.planned {
		if m.answers.Carried[name] == 0 {
			names = append(names, name)
		}
	}
	m.planned = maps.Clone(m.answers.Carried)
	return names
}

// rounds is how often plan and answers may follow each other until nothing changes.
const rounds = 8

// settle plans and acts until the plan is stable.
func (m *model) settle(t testing.TB, planner *Planner, opts Options) *Plan {
	t.Helper()
	var last *Plan
	for range rounds {
		w := m.world()
		hinted := w
		hinted.Answers.Recarried = m.recarried()
		p := planner.Plan(hinted)
		check(t, &w, p)
		samePlan(t, "the plan with a memo, and anew", p, Make(w, opts))
		if last != nil && equalPlans(p, last) {
			return p
		}
		last = p
		if t.Failed() {
			return p
		}
		m.act(p)
	}
	t.Errorf("no stable plan after %d rounds:\n%s", rounds, strings.Join(describe(last), "\n"))
	return last
}

func randomOptions(d *dice) Options {
	return Options{
		Interfaces: []string{pick(d, "eth0", "alt0", "none")}, Steering: Steering(d.n(3)), FanoutWorkers: d.n(3),
		Kernel: Capabilities{SocketSG: d.rare(2)},
	}
}

// play runs a random world through random changes: plans are total, stable, and the same with a
// memo and anew.
func play(t testing.TB, data []byte) {
	d := &dice{data}
	opts := randomOptions(d)
	planner := New(opts)
	m := newModel(d)
	for range 12 {
		p := m.settle(t, planner, opts)
		if t.Failed() {
			return
		}
		isStable(t, m, opts)
		for _, r := range m.rules {
			for _, text := range []string{r.Name, "10.1.0.1@239.1.1.1:5000%eth0", "239.1.1.2:7%alt0"} {
				if k, err := p.ParsePacket(text); err == nil {
					_ = p.Explain(k, Known{QuerierVersion: d.n(4)})
				}
			}
		}
		_ = p.Overlaps()
		for range 1 + d.n(3) {
			m.change(d)
		}
	}
}

// isStable holds plans to this, whatever is in force: once what they publish is in force, each flow
// that was published is planned as it was, and from then on so is everything. The first is
// what a Planner goes by when it keeps the plan of a flow that has come into force.
func isStable(t testing.TB, m *model, opts Options) {
	t.Helper()
	for _, carried := range []flow.Path{0, flow.PathKernel, flow.PathAFXDP, flow.PathFanout} {
		w := m.world()
		w.Answers.Carried = map[string]flow.Path{}
		for _, r := range Make(w, opts).Rules {
			for _, f := range r.Flows {
				if carried != 0 {
					w.Answers.Carried[f.Flow.Name] = carried
				}
			}
		}
		first := Make(w, opts)
		check(t, &w, first)
		w.Answers.Carried = inForce(first)
		second := Make(w, opts)
		if a, b := published(first), published(second); !reflect.DeepEqual(a, b) {
			t.Errorf("carried on path %d, then as planned:\n%s\n%s", carried, strings.Join(describe(first), "\n"), strings.Join(describe(second), "\n"))
		}
		w.Answers.Carried = inForce(second)
		samePlan(t, fmt.Sprintf("carried on path %d, then as planned twice", carried), Make(w, opts), second)
	}
}

// inForce is what Answers.Carried is once a plan is applied.
func inForce(p *Plan) map[string]flow.Path {
	carried := map[string]flow.Path{}
	for _, r := range p.Rules {
		for _, f := range r.Flows {
			if f.Publish {
				carried[f.Flow.Name] = f.Flow.Path
			}
		}
	}
	return carried
}

// published are the flows that a plan publishes, with all that can be seen of them.
func published(p *Plan) (all []*FlowPlan) {
	for _, r := range p.Rules {
		for _, f := range r.Flows {
			if f.Publish {
				seen := *f
				seen.carried = 0
				all = append(all, &seen)
			}
		}
	}
	return all
}

// TestRandomWorlds plays many games; the seed of one that fails is in its name.
func TestRandomWorlds(t *testing.T) {
	seeds := uint64(labtest.Soak(100, 3000))
	if testing.Short() {
		seeds = 50
	}
	for seed := range seeds {
		r := rand.New(rand.NewPCG(seed, 1))
		data := make([]byte, 1200)
		for i := range data {
			data[i] = byte(r.Uint32())
		}
		if !t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) { play(t, data) }) {
			return
		}
	}
}

// FuzzPlan lets the fuzzer roll the dice.
func FuzzPlan(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte("the dice of a world, and of what happens to it"))
	r := rand.New(rand.NewPCG(1, 2))
	for range 10 {
		data := make([]byte, 600)
		for i := range data {
			data[i] = byte(r.Uint32())
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) { play(t, data) })
}
