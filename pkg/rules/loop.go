package rules

import (
	"net/netip"
	"strconv"
	"strings"
)

// A frame that leaves an interface does not as a rule come back in on it, but a
// hub, a switch port in loopback or a hairpin port returns it, and a relay that
// then takes it again fills the link. So an output is said to feed an input
// when it sends what the input would take, on the same interface: same address,
// same port, and a source that the input takes.
//
// The source that an output sends from is known only in part:
//
//	src=ADDRESS         known
//	src=keep            known when the rule's input names a source, else any
//	src=iface           unknown here; taken to match inputs of any source alone
//
// A packet of a known source goes to the input of that source if there is one,
// else to the one of any source; that is the precedence of Winner.

// sentSource is the source of the packets that an output of a rule with the
// given input sends: an address, or the zero Addr, with every telling whether it
// may be any at all.
func sentSource(o Output, in Input) (source netip.Addr, every bool) {
	switch o.Policy.Source {
	case SourceKeep:
		return in.Source, !in.Source.IsValid()
	case SourceAddress:
		return o.Policy.SourceAddr, false
	}
	return netip.Addr{}, false
}

// target is the input of any source that takes what an output sends.
func (o Output) target() Input {
	return Input{Interface: o.Interface, Address: o.Address, Port: o.Port}
}

// feedsSelf reports whether an output feeds the input of its own rule.
func feedsSelf(o Output, in Input) bool {
	if o.target() != in.anySource() {
		return false
	}
	source, _ := sentSource(o, in)
	return !in.Source.IsValid() || source == in.Source
}

// feedGraph has a node for each rule, and behind them one for each (interface,
// address, port) that has inputs naming sources: an output that sends from any
// source feeds all of those, and without the node between, n outputs and n
// inputs would make n*n edges.
type feedGraph struct {
	set   *ruleSet
	group map[Input]int // node of the inputs that name a source, by Input.anySource
	edges [][]feedEdge  // by node
}

type feedEdge struct {
	to   int
	slot int // of the output, at a rule's node
}

func newFeedGraph(s *ruleSet) *feedGraph {
	g := &feedGraph{set: s, group: map[Input]int{}, edges: make([][]feedEdge, len(s.rules))}
	shared := s.sharedInterfaces()
	for i, r := range s.rules {
		if shared[r.In.Interface] && r.In.Source.IsValid() && s.inputs[r.In] == i {
			g.addSpecific(r.In.anySource(), i)
		}
	}
	for i, r := range s.rules {
		for slot, o := range r.Out[:min(len(r.Out), MaxOutputs)] {
			if shared[o.Interface] {
				g.addOutput(i, slot, o, r.In)
			}
		}
	}
	return g
}

// sharedInterfaces are those with both inputs and outputs. Most sets have none,
// and then nothing else need be looked at.
func (s *ruleSet) sharedInterfaces() map[string]bool {
	inputs, shared := map[string]bool{}, map[string]bool{}
	for _, r := range s.rules {
		inputs[r.In.Interface] = true
	}
	for _, r := range s.rules {
		for _, o := range r.Out {
			if inputs[o.Interface] {
				shared[o.Interface] = true
			}
		}
	}
	return shared
}

func (g *feedGraph) addSpecific(target Input, rule int) {
	node, ok := g.group[target]
	if !ok {
		node = len(g.edges)
		g.group[target] = node
		g.edges = append(g.edges, nil)
	}
	g.edges[node] = append(g.edges[node], feedEdge{to: rule})
}

func (g *feedGraph) addOutput(rule, slot int, o Output, in Input) {
	if !o.Address.IsValid() {
		return // the rule's own check has reported it
	}
	target := o.target()
	source, every := sentSource(o, in)
	if node, ok := g.group[target]; ok {
		if every {
			g.edges[rule] = append(g.edges[rule], feedEdge{node, slot})
		} else if source.IsValid() {
			specific := target
			specific.Source = source
			if g.addEdge(rule, slot, specific) {
				return // it wins over the input of any source
			}
		}
	}
	g.addEdge(rule, slot, target)
}

// addEdge adds the edge to the rule with an input, if there is one. The edge of
// a rule to itself is left out: its own check reports it.
func (g *feedGraph) addEdge(rule, slot int, in Input) bool {
	to, ok := g.set.inputs[in]
	if ok && to != rule {
		g.edges[rule] = append(g.edges[rule], feedEdge{to, slot})
	}
	return ok
}

// checkLoops reports circles of rules, each once, at the last of its rules.
// Between rules that hang together by many circles not every one is named, but
// one is named as long as there is any.
func (s *ruleSet) checkLoops(list *faultList) {
	g := newFeedGraph(s)
	walk := feedWalk{graph: g, list: list, depth: make([]int, len(g.edges))}
	for i := range s.rules {
		walk.from(i)
	}
}

// feedWalk goes through the graph depth first, without recursion since a chain
// can have as many rules as the set. An edge back to a node on the way here
// closes a circle.
type feedWalk struct {
	graph *feedGraph
	list  *faultList
	depth []int // by node: 0 not seen, doneDepth left behind, else place on the way + 1
	way   []feedStep
}

const doneDepth = -1

// feedStep is a node on the way and how many of its edges have been taken.
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
			w.circle(w.way[d-1:])
		}
	}
}

func (w *feedWalk) enter(node int) {
	w.way = append(w.way, feedStep{node: node})
	w.depth[node] = len(w.way)
}

// circle reports the circle that the last edge taken of steps closes.
func (w *feedWalk) circle(steps []feedStep) {
	if len(w.list.faults) == maxFaults { // a long circle is not put in words just to be counted
		w.list.hidden++
		return
	}
	s := w.graph.set
	var members []feedStep // the rules alone
	for _, step := range steps {
		if step.node < len(s.rules) {
			members = append(members, step)
		}
	}
	last := 0
	for i, m := range members {
		if m.node > members[last].node {
			last = i
		}
	}
	at := members[last]
	slot := w.graph.edges[at.node][at.taken-1].slot
	r := s.rules[at.node]
	w.list.add(fault{at.node, &FieldError{
		Rule: s.label(at.node), Field: outField(slot), Value: r.Out[slot].String(),
		Want: "no loop between rules: " + s.circleText(members), Err: ErrLoop,
	}})
}

// circleText is `a -> b -> a`, beginning with the first rule of the set and
// shortened in the middle when it is long.
func (s *ruleSet) circleText(members []feedStep) string {
	const most = 8
	first := 0
	for i, m := range members {
		if m.node < members[first].node {
			first = i
		}
	}
	var b strings.Builder
	for i := range members {
		if i == most-1 && len(members) > most {
			b.WriteString("(" + strconv.Itoa(len(members)-most) + " more) -> ")
		}
		if i >= most-1 && i < len(members)-1 {
			continue
		}
		node := members[(first+i)%len(members)].node
		b.WriteString(bounded(s.label(node)) + s.where(node) + " -> ")
	}
	b.WriteString(bounded(s.label(members[first].node)))
	return b.String()
}
