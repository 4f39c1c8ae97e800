// Package plan decides. From the rules, a snapshot of the host's network and what the kernel
// has answered so far it makes a Plan: what is desired of the kernel, and the state and reason
// of every rule, flow and output. It is pure: it makes no system call and remembers nothing that
// could change its result, so that the same world gives the same plan, whatever happened before.
//
// Some of what it needs is known only once it has been asked for: whether an interface takes
// the program, how a next hop is resolved, whether a group can be joined. A plan therefore
// says what is to be asked and done, the reconcilers of package relay do it, and the answers are
// part of the next world. With unchanged answers a plan is stable: planning again gives the same.
package plan

import (
	"fmt"
	"net/netip"
	"time"

	"xdpcast/pkg/flow"
	"xdpcast/pkg/network"
	"xdpcast/pkg/rules"
)

// Origin says where a rule comes from.
type Origin string

// The origins. Rules of the file win over those of the API.
const (
	OriginFile Origin = "file"
	OriginAPI  Origin = "api"
)

// Rule is a rule that somebody wants.
type Rule struct {
	rules.Rule
	Origin Origin
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
	// RedirectSG: frames in several buffers can be redirected to devices that can send them
	// (devmap, Linux 6.3).
	RedirectSG bool
	// SocketSG: AF_XDP sockets receive and send frames in several buffers (Linux 6.6).
	SocketSG bool
}

// World is everything that a plan depends on.
type World struct {
	Rules   []Rule // by name, which is unique
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
	// against them (kernels that do not tell features).
	NoTransmit map[network.LinkID]string
}

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

// State is what has become of a rule, a flow or an output.
type State string

// The states.
const (
	Active      State = "active"       // packets go through
	Pending     State = "pending"      // waits for something, such as its interface; completes by itself
	NoNeighbour State = "no_neighbour" // an output whose next hop has no link-layer address; completes by itself
	Failed      State = "failed"       // needs a person
)

// Plan is what is desired, and why.
type Plan struct {
	// Rules has an entry for each rule of the world, by name.
	Rules []*RulePlan
	// Attach are the links that are to run the relay program, by index: inputs, and outputs,
	// most of whose drivers send redirected frames only while they have a program.
	Attach []network.LinkID
	// Tags are the links on which VLAN tags are to stay in the frames.
	Tags []network.LinkID
	// Memberships are those that flows need, without duplicates.
	Memberships []Membership
	// Hops are the ways that are to be asked for, without duplicates.
	Hops []network.HopKey
	// Neighbours are the entries that the kernel is to keep resolved, without duplicates.
	Neighbours []network.NeighbourKey
}

// RulePlan is a rule and what it comes to.
type RulePlan struct {
	Rule   Rule
	State  State
	Reason string // in a line, what is not as it should be; empty when nothing is
	Err    error  // why it is failed; nil otherwise
	// Flows are the rule on each of its input interfaces, by name: one at most unless the
	// input is a pattern.
	Flows []*FlowPlan
}

// Complete says whether nothing is left to wait for.
func (r *RulePlan) Complete() bool { return r.State == Active && r.Reason == "" }

// FlowPlan is a rule on one input interface.
type FlowPlan struct {
	Input  string // the interface's name
	Link   network.LinkID
	State  State
	Reason string
	Err    error
	Note   string // what a person should know although nothing is wrong
	// Outputs are what Flow.Out is made of, slot by slot.
	Outputs     []OutputPlan
	Memberships []Membership
	// Flow is to be in force when Publish says so.
	Flow    flow.Flow
	Publish bool
}

// OutputPlan is one output of a flow: an output of the rule on one interface.
type OutputPlan struct {
	Out       int // number of the output in the rule
	Interface string
	State     State
	Reason    string
	Hop       network.HopKey // of a unicast output; else the zero HopKey
}

// Steering says when packets of the fanout path are spread over the workers' CPUs.
type Steering uint8

// The choices. Auto does so on network cards in native XDP mode that have fewer receive
// queues than there are workers. A device without hardware receives on its sender's CPU,
// and its frames may lack the checksum, which is lost on the way to another CPU.
const (
	SteerAuto Steering = iota
	SteerOn            // on every interface in native mode with too few queues
	SteerOff
)

func (s Steering) String() string {
	switch s {
	case SteerOn:
		return "on"
	case SteerOff:
		return "off"
	default:
		return "auto"
	}
}

// ParseSteering reads what String writes.
func ParseSteering(s string) (Steering, error) {
	for _, choice := range []Steering{SteerAuto, SteerOn, SteerOff} {
		if s == choice.String() {
			return choice, nil
		}
	}
	return 0, fmt.Errorf("steering %q: want auto, on or off", s)
}
