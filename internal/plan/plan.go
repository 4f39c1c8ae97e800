// Package plan makes the decisions. From the rules, a snapshot of the host's network and the
// kernel's answers so far it makes a Plan: the desired kernel state, and the state and reason of
// every rule, flow and output. It is pure: it makes no system calls and keeps no state that could
// change its result, so the same World gives the same Plan, whatever happened before.
//
// Some inputs are known only after a request: whether an interface accepts the program, how a next
// hop resolves, whether a group can be joined. A plan therefore lists what to request and do, the
// reconcilers of package relay do it, and the answers are part of the next World. With unchanged
// answers a plan is stable: planning again gives the same.
//
// # Which path
//
// A path carries a flow unless the input or the rule prevents it: no program on the input, no
// Ethernet header, local=yes, generic XDP with several outputs. It serves an output unless its
// interface is known to prevent it: it does not send redirected frames, it has no Ethernet header.
// It delivers unless the MTU of the input allows frames that it cannot send. Nothing is known about
// an absent interface, nor about a veth that is down or whose peer is down, since its features
// depend on the peer; the unknown never counts against a path. Links of any other kind count even
// while they are down.
//
// Path auto is the first of kernel, afxdp and fanout that carries the flow, serves every output and
// delivers. The fanout path always does, so no output of such a rule waits because of the path.
//
// The current path (Answers.Carried) matters in one case: while something about an output is not
// known, a flow keeps its path if that carries it, serves all other outputs and delivers, even if
// another would now be preferred. So a flapping interface moves a flow at most once. Once
// everything is known, only the World decides: a flow leaves a path that cannot serve one of its
// outputs, and moves to a better one when the reason against it is gone.
package plan

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"xdpcast/internal/network"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/rules"
)

// Origin is where a rule comes from.
type Origin string

// The origins. Rules of the file take precedence over those of the API.
const (
	OriginFile Origin = "file"
	OriginAPI  Origin = "api"
	// OriginMroute are rules that mirror the kernel's multicast routes. All others take precedence.
	OriginMroute Origin = "mroute"
)

// Rule is a rule and its origin.
type Rule struct {
	rules.Rule
	Origin Origin
	// Threshold is the greatest TTL threshold of the outputs of a rule of OriginMroute, whose flow
	// is published only while all of its outputs are ready: otherwise the kernel forwards.
	Threshold uint8
	// Expected: Left is due to the settings or the route itself, not to the state of the host.
	Expected bool
	// Left is why the kernel keeps forwarding in any case; "" if the rule should take over.
	Left string
}

// Options are fixed at start by the operator and the running kernel.
type Options struct {
	// Interfaces are attached even if no rule names them.
	Interfaces []string
	// Steering says when packets of the fanout path are spread over CPUs, and FanoutWorkers how
	// many workers an input of that path has.
	Steering      Steering
	FanoutWorkers int
	// Kernel is what the running kernel supports.
	Kernel Capabilities
}

// Capabilities are kernel features beyond the relay's minimum. They are probed, never derived from
// version numbers: distributions backport.
type Capabilities struct {
	// SocketSG: AF_XDP sockets receive and send frames in several buffers (Linux 6.6).
	SocketSG bool
}

// World is everything that a plan depends on.
type World struct {
	// Rules are ordered by name, and names are unique. Neither the slice nor the rules may be
	// modified afterwards: a Planner compares by pointer first.
	Rules []*Rule
	// Interfaces are attached although no rule names them, beside those of the Options: which they
	// are changes while packets flow.
	Interfaces []string
	Network    *network.Snapshot
	Answers    Answers
}

// Answers are the kernel's answers to requests of earlier plans. What is missing from a map was not
// requested yet.
type Answers struct {
	// Attached says how the relay program runs on links.
	Attached map[network.LinkID]Attached
	// Tags has the links on which VLAN tags should stay in the frames; nil if they do, otherwise
	// why they cannot.
	Tags map[network.LinkID]error
	// Joined has the state of memberships.
	Joined map[Membership]Join
	// Carried has the published flows, with their paths. It is the only history in a World: a
	// working path is not left for a better one while packets may flow on it.
	Carried map[string]flow.Path
	// Recarried, if not nil, has the names of the flows whose Carried differs from that of the
	// Planner's last World, so that it looks at no other. Names of flows that are the same, or gone,
	// do no harm.
	Recarried []string
	// Refused has the flows that a path could not bring into force, by name.
	Refused map[string]error
	// NoTransmit has links that refused redirected frames although nothing was known against them
	// (kernels that do not report features), with the error.
	NoTransmit map[network.LinkID]string
	// Neighbours has the entries of Plan.Neighbours that the kernel refused, and why.
	Neighbours map[network.NeighbourKey]error
}

// ErrNeighbourTableFull is wrapped by an error of Answers.Neighbours if the kernel's table is full
// (ENOBUFS).
var ErrNeighbourTableFull = errors.New("the neighbour table is full")

// Attached is how the relay program runs on a link.
type Attached struct {
	Generic bool
	Err     error // why it does not run; nil if it does
}

// Membership is a group, from one source or any, to join on a link.
type Membership struct {
	Link          network.LinkID
	Group, Source netip.Addr // the zero Source is any
}

// Join is the state of a membership.
type Join struct {
	Joined bool
	// Err is the last failure; nil if there was none. Transient: it is retried automatically.
	Err       error
	Transient bool
	Tries     int
	Next      time.Time // when it is retried
}

// State is the state of a rule, a flow or an output. The zero State is none.
type State uint8

// The states.
const (
	Active      State = 1 + iota // packets flow
	Pending                      // waits, for example for its interface; completes by itself
	NoNeighbour                  // an output whose next hop has no link-layer address; completes by itself
	Failed                       // needs action by the operator
)

// String is the name of a state in the API.
func (s State) String() string {
	switch s {
	case Active:
		return "active"
	case Pending:
		return "pending"
	case NoNeighbour:
		return "no_neighbour"
	case Failed:
		return "failed"
	}
	return fmt.Sprintf("State(%d)", uint8(s))
}

// Plan is the desired state, with reasons. It is immutable: any number of goroutines may read it,
// and it may be kept.
type Plan struct {
	// Rules has an entry for each rule of the World, by name.
	Rules []*RulePlan
	// Attach are the links that need the relay program, by index: inputs, and outputs, since most
	// drivers send redirected frames only while they have a program.
	Attach []network.LinkID
	// Tags are the links on which VLAN tags should stay in the frames, by index.
	Tags []network.LinkID
	// Joins changes when Memberships does: two plans of one Planner with the same Joins need the
	// same memberships.
	Joins uint64
	// Hops are the next hops to resolve, without duplicates.
	Hops []network.HopKey
	// Neighbours are the entries that the kernel should keep resolved, without duplicates.
	Neighbours []network.NeighbourKey

	seen    seen // what it was made from
	planned int
}

// Planned is how many rules were planned for it; the others have the plan of before.
func (p *Plan) Planned() int { return p.planned }

// RulePlan is the plan of one rule.
type RulePlan struct {
	Rule   *Rule
	State  State
	Reason string // one line, what is wrong; empty if nothing is
	// Flows are the rule's flows on each of its input interfaces, by name: at most one unless the
	// input is a pattern.
	Flows []*FlowPlan

	taken *Rule // the rule with the same input under another name of the interface
}

// Err is why a rule is failed: the first error of its flows; nil if it is not failed.
func (r *RulePlan) Err() error {
	if r.State == Failed {
		for _, f := range r.Flows {
			if err := f.Err(); err != nil {
				return err
			}
		}
	}
	return nil
}

// Complete says whether the rule waits for nothing.
func (r *RulePlan) Complete() bool { return r.State == Active && r.Reason == "" }

// Note is a hint for the user although nothing is wrong.
func (r *RulePlan) Note() string {
	for _, f := range r.Flows {
		if note := f.Note(); note != "" {
			return note
		}
	}
	return ""
}

// LeftToKernel is why the kernel forwards the packets of a rule of OriginMroute; "" if the relay
// does.
func (r *RulePlan) LeftToKernel() string {
	if r.Rule.Origin != OriginMroute || r.State == Active {
		return ""
	}
	return cmp.Or(strings.TrimPrefix(r.Reason, leftToKernel), r.State.String())
}

// Fault is why adding a rule is refused: the rule or one of its flows is failed, or a membership
// could not be joined, even if that may recover by itself. It is nil if all is well.
func (r *RulePlan) Fault() error {
	for _, f := range r.Flows {
		if err := cmp.Or(f.Err(), f.NotJoined()); err != nil {
			return err
		}
	}
	return nil
}

// FlowPlan is a rule on one input interface. There may be 100,000 of them: rare fields are in more.
type FlowPlan struct {
	In      *network.Link // the input
	State   State
	Publish bool // Flow should be published
	joins   bool // see Memberships
	carried flow.Path
	Reason  string
	// Outputs are the sources of Flow.Out, slot by slot.
	Outputs []OutputPlan
	// Flow is the flow to publish; its name is always set. It is never modified, and shared with
	// the next plan while it is unchanged.
	Flow *flow.Flow

	rule *Rule
	more *flowNotes // nil: none
}

// flowNotes are fields that most flows do not need.
type flowNotes struct {
	err, notJoined   error
	note, pathReason string
	master           *network.Link
}

func (f *FlowPlan) notes() flowNotes {
	if f.more == nil {
		return flowNotes{}
	}
	return *f.more
}

// noted returns the notes for modification, while the flow is being planned.
func (f *FlowPlan) noted() *flowNotes {
	if f.more == nil {
		f.more = &flowNotes{}
	}
	return f.more
}

// Err is why a flow is failed; otherwise nil.
func (f *FlowPlan) Err() error { return f.notes().err }

// NotJoined is the error of the first failed membership. The flow may be pending because of it, or
// failed.
func (f *FlowPlan) NotJoined() error { return f.notes().notJoined }

// Note is a hint for the user although nothing is wrong.
func (f *FlowPlan) Note() string { return f.notes().note }

// PathReason is why the packets do not travel the kernel path, empty if they do or the rule names
// another path; part of Note.
func (f *FlowPlan) PathReason() string { return f.notes().pathReason }

// OutputPlan is one output of a flow: an output of the rule on one interface. It is Active exactly
// if the output of Flow is Ready.
type OutputPlan struct {
	// Interface is the interface's own name, or the rule's text while it is absent.
	Interface string
	Reason    string
	Hop       *network.HopKey // of a unicast output whose next hop is requested; otherwise nil
	Out       uint8           // index of the output in the rule
	State     State
}

// Rule returns the plan of the named rule, nil if there is none.
func (p *Plan) Rule(name string) *RulePlan {
	i, ok := slices.BinarySearchFunc(p.Rules, name, func(r *RulePlan, name string) int { return strings.Compare(r.Rule.Name, name) })
	if !ok {
		return nil
	}
	return p.Rules[i]
}

// Flow returns the plan of the flow with a name as from FlowName, with its rule; nil if there is
// none.
func (p *Plan) Flow(name string) (*RulePlan, *FlowPlan) {
	r := p.Rule(ruleOfFlow(name))
	if r == nil {
		return nil, nil
	}
	for _, f := range r.Flows {
		if f.Flow.Name == name {
			return r, f
		}
	}
	return nil, nil
}

// FlowName is the name of a flow: the rule's name, followed by the interface if the input is a
// pattern. The separator cannot occur in a rule's name.
func FlowName(rule *rules.Rule, ifname string) string {
	if !isPattern(rule.In.Interface) {
		return rule.Name
	}
	return rule.Name + flowSeparator + ifname
}

const flowSeparator = "%"

// ruleOfFlow is the name of the rule of a flow.
func ruleOfFlow(name string) string {
	rule, _, _ := strings.Cut(name, flowSeparator)
	return rule
}
