// Package plan decides. From the rules, a snapshot of the host's network and what the kernel
// has answered so far it makes a Plan: what is desired of the kernel, and the state and reason
// of every rule, flow and output. It is pure: it makes no system call and remembers nothing that
// could change its result, so that the same world gives the same plan, whatever happened before.
//
// Some of what it needs is known only once it has been asked for: whether an interface takes
// the program, how a next hop is resolved, whether a group can be joined. A plan therefore
// says what is to be asked and done, the reconcilers of package relay do it, and the answers are
// part of the next world. With unchanged answers a plan is stable: planning again gives the same.
//
// # Which path
//
// A path carries a flow unless the input or the rule rules that out: no program on the input, no
// Ethernet header, local=yes, generic XDP with several outputs. It serves an output unless what is
// known of its interface rules that out: it does not send redirected frames, it has no
// Ethernet header. It delivers unless the MTU of the input allows frames that it could not pass on.
// Nothing is known of an interface that is absent, and of a veth that is down or whose
// peer is, since its features are those of its peer; that never speaks against a path. A link of any
// other kind counts although it is down.
//
// Path auto is the first of kernel, afxdp and fanout that carries the flow, serves every output and
// delivers. The fanout path always does, so that no output of such a rule waits because of the path.
//
// What is in force (Answers.Carried) matters in one case: while something of an output is not known,
// a flow stays on the path that it has if that one carries it, serves all other outputs and
// delivers, though another would come first now. So an interface that comes and goes moves a flow
// once at most. Once everything is known, the world alone decides: a flow leaves a path that
// cannot serve one of its outputs, and follows when the reason against a better path is gone.
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

// Origin says where a rule comes from.
type Origin string

// The origins. Rules of the file win over those of the API.
const (
	OriginFile Origin = "file"
	OriginAPI  Origin = "api"
	// OriginMroute are rules that mirror multicast routes of the kernel. All others win over them.
	OriginMroute Origin = "mroute"
)

// Rule is a rule that somebody wants.
type Rule struct {
	rules.Rule
	Origin Origin
	// Threshold is the greatest TTL threshold of the outputs of a rule of OriginMroute, whose
	// flow is in force only while all of its outputs are ready: else the kernel forwards.
	Threshold uint8
	// Left is why the kernel goes on forwarding in any case; "" when the rule is to take over.
	Left string
	// Expected: Left is what the settings want, or what the route is, and nothing of the host.
	Expected bool
}

// Options are what the operator and the running kernel decide once, at start.
type Options struct {
	// Interfaces are attached even while no rule names them.
	Interfaces []string
	// Steering is when packets of the fanout path are spread over CPUs, and FanoutWorkers
	// how many workers an input of that path has.
	Steering      Steering
	FanoutWorkers int
	// Kernel is what the running kernel can do.
	Kernel Capabilities
}

// Capabilities is what the running kernel can do beyond what the relay needs in any case.
// They are found by trying, never by version numbers: distributions backport.
type Capabilities struct {
	// SocketSG: AF_XDP sockets receive and send frames in several buffers (Linux 6.6).
	SocketSG bool
}

// World is everything that a plan depends on.
type World struct {
	// Rules are in the order of their names, which are unique. Neither the slice nor the rules
	// may be changed afterwards: a Planner compares by pointer first.
	Rules   []*Rule
	Network *network.Snapshot
	Answers Answers
}

// Answers is what the kernel has answered to what earlier plans asked for. What is not in a
// map was not asked for yet.
type Answers struct {
	// Attached says how the relay program runs on links.
	Attached map[network.LinkID]Attached
	// Tags has the links on which VLAN tags are to stay in the frames; nil for those where they
	// do, else why they cannot.
	Tags map[network.LinkID]error
	// Joined says how memberships are.
	Joined map[Membership]Join
	// Carried names the flows that are in force, with their paths. It is the only history in a
	// world: a working path is not left for a better one while packets may flow on it.
	Carried map[string]flow.Path
	// Refused has the flows that a path could not bring into force, by name.
	Refused map[string]error
	// NoTransmit has links that refused frames redirected to them although nothing was known
	// against them (kernels that do not tell features), and how.
	NoTransmit map[network.LinkID]string
	// Neighbours has the entries of Plan.Neighbours that the kernel did not take, and why.
	Neighbours map[network.NeighbourKey]error
}

// ErrNeighbourTableFull is wrapped by an error of Answers.Neighbours when the kernel's table has
// no room (ENOBUFS).
var ErrNeighbourTableFull = errors.New("the neighbour table is full")

// Attached is how the relay program runs on a link.
type Attached struct {
	Generic bool
	Err     error // why it does not; nil when it does
}

// Membership is a group, from one source or any, that is to be joined on a link.
type Membership struct {
	Link          network.LinkID
	Group, Source netip.Addr // the zero Source is any
}

// Join is how a membership is.
type Join struct {
	Joined bool
	// Err is why the last try failed; nil when none did. Transient: it is tried again without
	// anybody's doing.
	Err       error
	Transient bool
	Tries     int
	Next      time.Time // when it is tried again
}

// State is what has become of a rule, a flow or an output. The zero State is none.
type State uint8

// The states.
const (
	Active      State = 1 + iota // packets go through
	Pending                      // waits for something, such as its interface; completes by itself
	NoNeighbour                  // an output whose next hop has no link-layer address; completes by itself
	Failed                       // needs a person
)

// String is the word of a state in the API.
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

// Plan is what is desired, and why. It is immutable: it may be read from any number of goroutines,
// and kept.
type Plan struct {
	// Rules has an entry for each rule of the world, by name.
	Rules []*RulePlan
	// Attach are the links that are to run the relay program, by index: inputs, and outputs,
	// most of whose drivers send redirected frames only while they have a program.
	Attach []network.LinkID
	// Tags are the links on which VLAN tags are to stay in the frames, by index.
	Tags []network.LinkID
	// Joins changes when Memberships does: two plans of one Planner with the same Joins want the same.
	Joins uint64
	// Hops are the ways that are to be asked for, without duplicates.
	Hops []network.HopKey
	// Neighbours are the entries that the kernel is to keep resolved, without duplicates.
	Neighbours []network.NeighbourKey

	seen seen // what it was made from
}

// RulePlan is a rule and what it comes to.
type RulePlan struct {
	Rule   *Rule
	State  State
	Reason string // in a line, what is not as it should be; empty when nothing is
	// Flows are the rule on each of its input interfaces, by name: one at most unless the
	// input is a pattern.
	Flows []*FlowPlan

	taken *Rule // the rule that takes the same input by another name of the interface
}

// Err is why a rule is failed: the error of its first flow that has one; nil when it is not.
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

// Complete says whether nothing is left to wait for.
func (r *RulePlan) Complete() bool { return r.State == Active && r.Reason == "" }

// Note is what a person should know of the rule although nothing is wrong.
func (r *RulePlan) Note() string {
	for _, f := range r.Flows {
		if note := f.Note(); note != "" {
			return note
		}
	}
	return ""
}

// LeftToKernel is why the kernel forwards the packets of a rule of OriginMroute; "" when the relay
// does.
func (r *RulePlan) LeftToKernel() string {
	if r.Rule.Origin != OriginMroute || r.State == Active {
		return ""
	}
	return cmp.Or(strings.TrimPrefix(r.Reason, leftToKernel), r.State.String())
}

// Fault is why a rule that somebody adds is refused: it is failed, one of its flows is, or a
// membership could not be joined, even if that may heal by itself. It is nil when all is well.
func (r *RulePlan) Fault() error {
	for _, f := range r.Flows {
		if err := cmp.Or(f.Err(), f.NotJoined()); err != nil {
			return err
		}
	}
	return nil
}

// FlowPlan is a rule on one input interface. There may be 100,000 of them: what few have is in more.
type FlowPlan struct {
	In      *network.Link // the input
	State   State
	Publish bool // Flow is to be in force
	joins   bool // see Memberships
	carried flow.Path
	Reason  string
	// Outputs are what Flow.Out is made of, slot by slot.
	Outputs []OutputPlan
	// Flow is what to bring into force, with its name in any case. It is never changed, and shared
	// with the next plan while it stays the same.
	Flow *flow.Flow

	rule *Rule
	more *flowNotes // nil: nothing
}

// flowNotes is what most flows have nothing of.
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

// noted is notes to be changed, while the flow is being planned.
func (f *FlowPlan) noted() *flowNotes {
	if f.more == nil {
		f.more = &flowNotes{}
	}
	return f.more
}

// Err is why a flow is failed; nil otherwise.
func (f *FlowPlan) Err() error { return f.notes().err }

// NotJoined is why the first of Memberships that failed is not joined. The flow may be pending
// with it, or failed.
func (f *FlowPlan) NotJoined() error { return f.notes().notJoined }

// Note is what a person should know although nothing is wrong.
func (f *FlowPlan) Note() string { return f.notes().note }

// PathReason is why the packets do not travel the kernel path, empty when they do or
// the rule asks for another; part of Note.
func (f *FlowPlan) PathReason() string { return f.notes().pathReason }

// OutputPlan is one output of a flow: an output of the rule on one interface. It is Active
// when the output of Flow is Ready, and never otherwise.
type OutputPlan struct {
	// Interface is the interface's own name, or while it is absent the rule's text.
	Interface string
	Reason    string
	Hop       *network.HopKey // of a unicast output whose way is asked for; else nil
	Out       uint8           // number of the output in the rule
	State     State
}

// Rule returns the plan of a rule, nil when there is none of that name.
func (p *Plan) Rule(name string) *RulePlan {
	i, ok := slices.BinarySearchFunc(p.Rules, name, func(r *RulePlan, name string) int { return strings.Compare(r.Rule.Name, name) })
	if !ok {
		return nil
	}
	return p.Rules[i]
}

// Flow returns the plan of a flow by the name that FlowName gives, with its rule; nil when there
// is none.
func (p *Plan) Flow(name string) (*RulePlan, *FlowPlan) {
	rule, _, _ := strings.Cut(name, flowSeparator)
	r := p.Rule(rule)
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

// FlowName is what a flow is known by: the rule's name, with the interface behind it when the
// input is a pattern. The sign between cannot be in a rule's name.
func FlowName(rule *rules.Rule, ifname string) string {
	if !isPattern(rule.In.Interface) {
		return rule.Name
	}
	return rule.Name + flowSeparator + ifname
}

const flowSeparator = "%"
