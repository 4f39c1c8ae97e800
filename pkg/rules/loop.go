package rules

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// A frame that leaves an interface normally does not come back in on it, but a hub, a switch port
// in loopback or a hairpin port returns it, and a relay that takes it again floods the link. So an
// output feeds an input if it sends what the input would take, on the same interface: same address,
// same port, same VLAN tags, and a source that the input takes.
//
// The source address of an output is only partly known:
//
//	src=ADDRESS         known
//	src=keep            known if the rule's input names a source, otherwise any
//	src=iface           unknown here; assumed to match only inputs of any source
//
// An output may send many kinds of packets: to every address of a prefix, to every port, on every
// interface of a pattern. It feeds a rule if it sends at least one that the rule gets, by the
// precedence of Before. Rules that feed each other in a loop are refused, even if no single packet
// travels all of it: for example if what the first sends of one group comes back as another that it
// does not take, or the port grows until it is out of range, or two rules together, but neither
// alone, take everything that feeds the third. A legitimate set uses loop=allow, or loop=two-way if
// it should drop packets sent by this host.
//
// An output to a pattern does not send on its packet's input interface if that would feed its own
// input.

// sent is the traffic of an output of a rule with the given input; false if there is none.
func (o Output) sent(in Input) (traffic, bool) {
	t := traffic{iface: o.Interface, prefix: o.prefix(), vlan: in.VLAN}
	switch o.Policy.VLAN {
	case VLANPop:
		t.vlan = VLAN{}
	case VLANSet:
		t.vlan = o.Policy.VLANTags
	}
	switch o.Policy.Source {
	case SourceKeep:
		t.source, t.every = in.Senders(), !in.Source.IsValid()
	case SourceAddress:
		t.source = oneAddr(o.Policy.SourceAddr)
	}
	var ok bool
	t.low, t.high, ok = o.sentPorts(in)
	return t, ok && t.prefix.IsValid()
}

// prefix is the destination prefix of an output, masked.
func (o Output) prefix() netip.Prefix {
	return Input{Address: o.Address, Len: o.Len}.Prefix().Masked()
}

// sentPorts are the destination ports of an output, given its input; false if there are none.
func (o Output) sentPorts(in Input) (low, high uint16, ok bool) {
	from, to := int32(in.Port), int32(in.lastPort()) // packets to port 0 also match an input of any port
	switch o.PortMode {
	case PortSet:
		return o.Port, o.Port, o.Port != 0
	case PortKeep:
		return uint16(from), uint16(to), true
	case PortAdd:
		from, to = max(from+o.PortShift, 1), min(to+o.PortShift, 65535)
		return uint16(from), uint16(to), from <= to
	}
	return 0, 0, false
}

// feeds reports whether an output of a rule with the given input sends packets that another input,
// or this one, matches, on the same interface. An output to a pattern sends none on its packet's
// input interface: if both interfaces are patterns it feeds the input through two interfaces, and
// if the input's is a name, not at all.
func feeds(o Output, from, in Input) bool {
	sent, ok := o.sent(from)
	return ok && (!isPattern(o.Interface) || isPattern(in.Interface)) && sent.overlaps(in.traffic())
}

// feedsSelf reports whether an output feeds the input of its own rule, unless the rule allows it.
// Relaying both ways is between interfaces, so with TwoWay a pattern may feed itself, but a named
// interface may not.
func (r Rule) feedsSelf(o Output) bool {
	if r.Stream != nil {
		for from := range r.InputCount() {
			for to := range r.InputCount() {
				if r.OfLeg(to).fedBy(o, r.Leg(from).In) {
					return true
				}
			}
		}
		return false
	}
	return r.fedBy(o, r.In)
}

// fedBy is feedsSelf for a rule with one input and traffic of an output of another.
func (r Rule) fedBy(o Output, from Input) bool {
	if r.Accept.AllowLoop || r.Accept.TwoWay && isPattern(o.Interface) || !feeds(o, from, r.In) {
		return false
	}
	sent, _ := o.sent(from)
	return !r.excludes(sent)
}

// excludes reports whether all of some traffic comes from senders that a rule excludes.
func (r Rule) excludes(t traffic) bool {
	return t.source.IsValid() && slices.ContainsFunc(r.Accept.Except(), func(p netip.Prefix) bool {
		return p.Bits() <= t.source.Bits() && p.Contains(t.source.Addr())
	})
}

// insist ends the error about a loop: how to allow it, and what then happens to looping packets.
const insist = " (loop=two-way on an input allows a loop between interfaces, loop=allow any loop: looping packets are detected and dropped)"

// maxFeedPairs limits the search in sets where very many outputs of many addresses, ports or
// sources overlap with very many inputs each. After so many pairs of output and input, outputs are
// assumed to send from every source to every port: all loops are still found, but some reported
// loops may not exist.
const maxFeedPairs = 1 << 20

// feedGraph has a node for each rule, followed by one for each kind of traffic that may feed more
// than one rule: without these nodes, n outputs and n inputs would make n*n edges.
type feedGraph struct {
	set      *ruleSet
	pool     *inputPool
	boxes    map[traffic]*feedBox
	edges    [][]feedEdge // by node
	pairs    int          // of traffic and input, examined so far
	maxPairs int
	list     *faultList
}

type feedEdge struct {
	to   int
	slot int // of the output, at a rule's node
}

// feedHop is an output on a loop.
type feedHop struct {
	rule, slot int
}

// feedBox is the node of one kind of traffic.
type feedBox struct {
	node int
	fed  []int   // rules, sorted
	self feedHop // the first such output whose own rule is in fed
	has  bool    // self is set
}

func newFeedGraph(s *ruleSet, maxPairs int, list *faultList) *feedGraph {
	g := &feedGraph{set: s, boxes: map[traffic]*feedBox{}, edges: make([][]feedEdge, len(s.rules)),
		maxPairs: maxPairs, list: list}
	inputs, outputs := s.sharedInterfaces()
	if len(outputs) == 0 {
		return g
	}
	g.pool = newInputPool(s.rules, s.inputs, func(rule int) bool { return inputs[s.rules[rule].In.Interface] })
	for i, r := range s.rules {
		if r.Accept.AllowLoop || r.Accept.TwoWay {
			continue
		}
		for slot, o := range r.Out[:min(len(r.Out), MaxOutputs)] {
			if !outputs[o.Interface] {
				continue
			}
			if sent, ok := o.sent(r.In); ok {
				g.addOutput(feedHop{i, slot}, sent)
			}
		}
	}
	return g
}

// sharedInterfaces are the interface texts of inputs that overlap with those of outputs, and vice
// versa. Most sets have none, and nothing else needs to be checked.
func (s *ruleSet) sharedInterfaces() (inputs, outputs map[string]bool) {
	var all ifaceSet
	for _, r := range s.rules {
		all.add(r.In.Interface)
	}
	inputs, outputs = map[string]bool{}, map[string]bool{}
	for _, r := range s.rules {
		for _, o := range r.Out {
			if outputs[o.Interface] {
				continue
			}
			for _, iface := range all.overlapping(o.Interface) {
				inputs[iface], outputs[o.Interface] = true, true
			}
		}
	}
	return inputs, outputs
}

// addOutput adds the edges of an output, except one from a rule to itself, which the rule's own
// check reports.
func (g *feedGraph) addOutput(hop feedHop, sent traffic) {
	if sent.exact() && !sent.every && (!sent.source.IsValid() || sent.source.IsSingleIP()) {
		if to, ok := g.winner(sent); ok && to != hop.rule {
			g.addEdge(hop, to)
		}
		return
	}
	box := g.box(sent)
	if len(box.fed) == 0 {
		return
	}
	_, self := slices.BinarySearch(box.fed, hop.rule)
	switch {
	case !self:
		g.addEdge(hop, box.node)
	case !box.has: // its own edges, without the one to itself
		box.self, box.has = hop, true
		for _, to := range box.fed {
			if to != hop.rule {
				g.addEdge(hop, to)
			}
		}
	case box.self.rule != hop.rule: // each feeds both
		g.report([]feedHop{box.self, hop})
	}
}

func (g *feedGraph) addEdge(from feedHop, to int) {
	g.edges[from.rule] = append(g.edges[from.rule], feedEdge{to, from.slot})
}

// winner is the rule that gets traffic which each input matches either completely or not at all.
func (g *feedGraph) winner(sent traffic) (rule int, ok bool) {
	for i := range g.pool.each(sent, false) {
		if !ok || Before(g.set.rules[i].In, g.set.rules[rule].In) {
			rule, ok = i, true
		}
	}
	return rule, ok
}

// box is the node of some traffic, created on first use.
func (g *feedGraph) box(sent traffic) *feedBox {
	if g.pairs > g.maxPairs {
		sent.low, sent.high, sent.source, sent.every = 0, 65535, netip.Prefix{}, true
	}
	if b := g.boxes[sent]; b != nil {
		return b
	}
	b := &feedBox{node: len(g.edges)}
	for i := range g.pool.each(sent, false) {
		g.pairs++
		if !g.shadowed(sent, i) {
			b.fed = append(b.fed, i)
		}
	}
	slices.Sort(b.fed)
	edges := make([]feedEdge, len(b.fed))
	for i, to := range b.fed {
		edges[i].to = to
	}
	g.edges = append(g.edges, edges)
	g.boxes[sent] = b
	return b
}

// shadowed reports whether another rule gets all of the traffic that a rule matches. The other
// input is narrower in some respect and takes precedence, but is not narrower than the traffic: so
// this rule matches only a part of that.
func (g *feedGraph) shadowed(sent traffic, rule int) bool {
	in := g.set.rules[rule].In
	if sent.covers(in.traffic()) {
		return false
	}
	for i := range g.pool.each(sent.meet(in.traffic()), true) {
		if Before(g.set.rules[i].In, in) {
			return true
		}
	}
	return false
}

// checkLoops reports loops of rules, each once, at the last of its rules. Among rules connected by
// many loops not every one is reported, but at least one is.
func (s *ruleSet) checkLoops(list *faultList) { s.findLoops(maxFeedPairs, list) }

func (s *ruleSet) findLoops(maxPairs int, list *faultList) {
	g := newFeedGraph(s, maxPairs, list)
	walk := feedWalk{graph: g, depth: make([]int, len(g.edges))}
	for i := range s.rules {
		walk.from(i)
	}
}

// feedWalk traverses the graph depth-first, iteratively, since a chain can have as many rules as
// the set. An edge back to a node on the current path closes a loop.
type feedWalk struct {
	graph *feedGraph
	depth []int // by node: 0 not seen, doneDepth finished, otherwise index on the path + 1
	way   []feedStep
}

const doneDepth = -1

// feedStep is a node on the path and the number of its edges taken.
type feedStep struct {
	node, taken int
}

func (w *feedWalk) from(node int) {
	if w.depth[node] != 0 {
		return
	}
	w.enter(node)
	for len(w.way) > 0 {
		step := &w.way[len(w.way)-1]
		edges := w.graph.edges[step.node]
		if step.taken == len(edges) {
			w.depth[step.node] = doneDepth
			w.way = w.way[:len(w.way)-1]
			continue
		}
		to := edges[step.taken].to
		step.taken++
		switch d := w.depth[to]; {
		case d == 0:
			w.enter(to)
		case d > 0:
			w.closes(w.way[d-1:])
		}
	}
}

func (w *feedWalk) enter(node int) {
	w.way = append(w.way, feedStep{node: node})
	w.depth[node] = len(w.way)
}

// closes reports the loop that the last edge of steps closes.
func (w *feedWalk) closes(steps []feedStep) {
	g := w.graph
	if len(g.list.faults) == maxFaults { // do not format a long loop only to count it
		g.list.hidden++
		return
	}
	var circle []feedHop
	for _, step := range steps {
		if step.node < len(g.set.rules) { // only the rules
			circle = append(circle, feedHop{step.node, g.edges[step.node][step.taken-1].slot})
		}
	}
	g.report(circle)
}

func (g *feedGraph) report(circle []feedHop) {
	s := g.set
	last := circle[0]
	for _, hop := range circle {
		if hop.rule > last.rule {
			last = hop
		}
	}
	g.list.add(fault{s.origin(last.rule), &FieldError{
		Rule: s.label(last.rule), Field: outField(last.slot), Value: s.rules[last.rule].Out[last.slot].String(),
		Want: "no loop between rules: " + s.circleText(circle) + insist, Err: ErrLoop,
	}})
}

// circleText is `a -> b -> a`, beginning with the first rule of the set and shortened in the middle
// if it is long.
func (s *ruleSet) circleText(circle []feedHop) string {
	const most = 8
	first := 0
	for i, hop := range circle {
		if hop.rule < circle[first].rule {
			first = i
		}
	}
	var b strings.Builder
	for i := range circle {
		if i == most-1 && len(circle) > most {
			b.WriteString("(" + strconv.Itoa(len(circle)-most) + " more) -> ")
		}
		if i >= most-1 && i < len(circle)-1 {
			continue
		}
		rule := circle[(first+i)%len(circle)].rule
		b.WriteString(bounded(s.label(rule)) + s.where(rule) + " -> ")
	}
	b.WriteString(bounded(s.label(circle[first].rule)))
	return b.String()
}
