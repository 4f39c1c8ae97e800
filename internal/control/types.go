package control

import "time"

// Rule is a rule as a person writes it; the grammar is that of package rules.
type Rule struct {
	// Name is unique on the host.
	Name string `json:"name"`
	// In is [SOURCE@]ADDRESS[/LEN][:PORT]%INTERFACE[,option...]. Of a rule with several inputs it
	// has all of them, with blanks between.
	In string `json:"in"`
	// Merge or Failover say how several inputs become one stream: FORMAT[,option...], and
	// TIME[,back=TIME].
	Merge    string `json:"merge,omitempty"`
	Failover string `json:"failover,omitempty"`
	// Out holds one endpoint with its policies a slot, in slot order.
	Out []string `json:"out"`
	// Path is "auto" (also when empty), "kernel", "afxdp" or "fanout".
	Path string `json:"path,omitempty"`
}

// Counter counts packets and the bytes of their frames since the rule or the
// interface was first loaded; it survives restarts of the daemon.
type Counter struct {
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

// Drop counts what was dropped for one reason.
type Drop struct {
	Reason string `json:"reason"`
	Counter
}

// Origins of a rule.
const (
	OriginFile = "file" // the daemon's own file; changed by editing it and reloading
	OriginAPI  = "api"  // added through this API
	// OriginMroute is of a rule that mirrors a multicast route of the kernel: its routing
	// daemon changes it.
	OriginMroute = "mroute"
)

// States of a rule or an output. An output may have others that say more,
// such as "no_neighbour".
const (
	StateActive  = "active"
	StatePending = "pending" // waits for something, such as its interface; completes by itself
	StateFailed  = "failed"  // needs a person
	// StateLooping is of a rule that is active and whose packets come back to it; those
	// that do are dropped. Reason says the way that they take.
	StateLooping = "looping"
)

// OutputStatus is one output of a rule. Slot is its number within the rule.
type OutputStatus struct {
	Slot   int    `json:"slot"`
	Output string `json:"output"`
	// Interface is where the copies leave: of an output with a pattern one of
	// those that match, empty as long as none does.
	Interface string `json:"interface,omitempty"`
	State     string `json:"state"`
	Reason    string `json:"reason,omitempty"`
	// NextHop is whom a unicast output sends to, the destination itself or a
	// gateway, and MAC the address that this one was resolved to; both are empty
	// for a group, and while they are not known.
	NextHop string `json:"next_hop,omitempty"`
	MAC     string `json:"mac,omitempty"`

	Sent  Counter `json:"sent"`
	Drops []Drop  `json:"drops"`
}

// InputStatus is one interface that a rule whose input is a pattern takes
// packets on, or one of several inputs.
type InputStatus struct {
	Interface string `json:"interface"`
	State     string `json:"state"`
	Reason    string `json:"reason,omitempty"`
	// What follows is of one of several inputs: how it is written, what matched it, what of that was
	// not relayed, and what it has brought to the stream.
	Input   string     `json:"input,omitempty"`
	Matched Counter    `json:"matched,omitzero"`
	Drops   []Drop     `json:"drops,omitempty"`
	Leg     *LegStatus `json:"leg,omitempty"`
}

// RuleStatus is a rule and what has become of it.
type RuleStatus struct {
	Rule
	// ID is the rule's index in the pinned maps, 0 when it is not in them.
	ID     uint32 `json:"id"`
	Origin string `json:"origin"`
	State  string `json:"state"`
	// Reason says in one line why State is not active.
	Reason string `json:"reason,omitempty"`
	// YieldsTo names rules that get packets which this one matches, too, and WinsOver
	// those that this one takes packets from; at most some of each, and only where
	// rules are listed or shown.
	YieldsTo []string `json:"yields_to,omitempty"`
	WinsOver []string `json:"wins_over,omitempty"`
	// UsedPath is the path that the packets travel, empty when none does yet.
	UsedPath string  `json:"used_path,omitempty"`
	Matched  Counter `json:"matched"`
	// LastSeen is when a packet last matched, nil when none has.
	LastSeen *time.Time `json:"last_seen,omitempty"`
	// Notes count what is worth knowing of the rule's packets and is no drop, by reason:
	// malformed, orphan_fragment, unfinished_checksum, echo.
	Notes []Drop `json:"notes,omitempty"`
	// Drops holds what matched and was dropped before any output saw it.
	Drops   []Drop         `json:"drops"`
	Outputs []OutputStatus `json:"outputs"`
	// Inputs has an entry for each interface that a pattern of the input
	// matches, or for each of several inputs; it is empty for one input that names its interface.
	Inputs []InputStatus `json:"inputs"`
	// Stream is nil for a rule with one input.
	Stream *StreamStatus `json:"stream,omitempty"`
	// ReceiveDrops are those of the rule's path on its interfaces, of all rules there:
	// the kernel does not tell them by rule.
	ReceiveDrops []ReceiveDrop `json:"receive_drops,omitempty"`
}

// States of a membership.
const (
	GroupWanted   = "wanted"
	GroupJoined   = "joined"
	GroupRetrying = "retrying"
	GroupFailed   = "failed"
)

// Multicast is how an interface and its network speak of multicast groups in one
// family.
type Multicast struct {
	// Version is what the kernel speaks: "IGMPv1" to "IGMPv3", "MLDv1" or
	// "MLDv2"; empty when it is not known.
	Version string `json:"version,omitempty"`
	// Querier is who was last heard asking for memberships, and QuerierSeen when;
	// empty when none was. A switch without an address asks from 0.0.0.0.
	Querier     string     `json:"querier,omitempty"`
	QuerierSeen *time.Time `json:"querier_seen,omitempty"`
	// Queries counts them since the program was attached.
	Queries uint64 `json:"queries,omitempty"`
}

// Group is a membership that the daemon holds or wants.
type Group struct {
	Interface string `json:"interface"`
	Index     int    `json:"index"`
	Group     string `json:"group"`
	// Source is empty for any source.
	Source string `json:"source,omitempty"`
	State  string `json:"state"`
	// Since is when State was reached.
	Since *time.Time `json:"since,omitempty"`
	// Tries counts the joins tried for this membership; Next is when the next
	// one is due, and Cause what the last one failed with.
	Tries int        `json:"tries"`
	Next  *time.Time `json:"next,omitempty"`
	Cause string     `json:"cause,omitempty"`
	// Rules names the rules that want the membership.
	Rules []string `json:"rules"`
	// Master is the bridge, bond or team that the interface is a port of, which answers queries
	// for it; the group is joined there, too. For names the ports that a membership of
	// a master is for.
	Master string   `json:"master,omitempty"`
	For    []string `json:"for,omitempty"`
	// LastPacket is when a packet of the group last matched a rule.
	LastPacket *time.Time `json:"last_packet,omitempty"`
	Multicast
	// Detail says all that in one line: "joined, silent for 12s, no querier heard".
	Detail string `json:"detail,omitempty"`
}

// Roles of an interface.
const (
	RoleInput  = "input"
	RoleOutput = "output"
)

// How an interface is.
const (
	LinkUp        = "up"
	LinkNoCarrier = "no_carrier" // administratively up, while no cable is plugged or no peer is up
	LinkDown      = "down"
	LinkAbsent    = "absent"
)

// InterfaceStatus is an interface that rules name.
type InterfaceStatus struct {
	Name string `json:"name"`
	// Index is 0 while the interface is absent.
	Index int `json:"index"`
	// Link is how the interface is; packets go to it, and are counted as sent, only while that
	// is "up".
	Link string `json:"link"`
	// Master is the bridge, bond or other interface that it is a port of, empty for none.
	Master string `json:"master,omitempty"`
	// Mode is "native" or "generic", empty while no program is attached.
	Mode  string   `json:"mode,omitempty"`
	Roles []string `json:"roles"`
	// ProgramID and LinkID are the kernel's, as bpftool shows them.
	ProgramID uint32 `json:"program_id,omitempty"`
	LinkID    uint32 `json:"link_id,omitempty"`
	// Note says in one line what a person should know, such as why the mode is
	// not native.
	Note string `json:"note,omitempty"`

	// JoinsAttempted == JoinsSucceeded + JoinsFailed, whenever one looks.
	JoinsAttempted uint64 `json:"joins_attempted"`
	JoinsSucceeded uint64 `json:"joins_succeeded"`
	JoinsFailed    uint64 `json:"joins_failed"`
	// LeavesAttempted == LeavesSucceeded + LeavesFailed, likewise.
	LeavesAttempted uint64 `json:"leaves_attempted"`
	LeavesSucceeded uint64 `json:"leaves_succeeded"`
	LeavesFailed    uint64 `json:"leaves_failed"`

	// TransmitDrops counts packets that the device did not take after the
	// program had sent them; the kernel does not count their bytes.
	TransmitDrops uint64 `json:"transmit_drops"`

	// IGMP and MLD are nil while no membership is held there, and no querier
	// heard, in the family.
	IGMP *Multicast `json:"igmp,omitempty"`
	MLD  *Multicast `json:"mld,omitempty"`
}

// States of a worker, besides StateActive and StateFailed.
const (
	WorkerDown    = "down"    // its interface is down; goes on by itself
	WorkerMissing = "missing" // the queue has none; it is tried again
)

// Worker takes packets of an input interface to a path in user space: with path afxdp
// those of a receive queue, with path fanout its share of a PACKET_FANOUT group.
type Worker struct {
	Interface string `json:"interface"`
	// Path is "afxdp" or "fanout".
	Path string `json:"path"`
	// Queue is the receive queue; with path fanout the worker's number in its group, those
	// of what this host sends (from=host) numbered behind those of what arrives.
	Queue int    `json:"queue"`
	State string `json:"state"`
	// Cause says why State is not active, or what the worker last failed with.
	Cause string `json:"cause,omitempty"`
	// Failures counts how often the worker has failed and was started again.
	Failures uint64 `json:"failures"`
	// Mode is "zero-copy" or "copy"; with path fanout how the kernel spreads packets:
	// "cpu", "hash" or "ebpf".
	Mode string `json:"mode,omitempty"`
	// Group is the id of the PACKET_FANOUT group; 0 with path afxdp.
	Group uint16 `json:"group,omitempty"`
	// Received counts the packets that came to the worker, and Lost by reason those that
	// the kernel meant for it and that came to no rule. A worker that is closed takes its
	// counters along; Stats.ReceiveDrops keeps them.
	Received uint64 `json:"received"`
	Lost     []Loss `json:"lost"`
	// Socket is nil with path fanout.
	Socket *SocketStatus `json:"socket,omitempty"`
	// Senders are how the copies leave; with path fanout they are not listed.
	Senders []WorkerSender `json:"senders"`
}

// Loss counts packets that were lost on their way to a path in user space. Reasons:
// "ring_full" (the worker did not keep up), "no_frame" (path afxdp: no memory was free
// to receive into, since the worker did not keep up; or the packet was too long for it),
// and "rule_gone" (path afxdp: the rule was removed meanwhile).
type Loss struct {
	Reason  string `json:"reason"`
	Packets uint64 `json:"packets"`
}

// SocketStatus is an AF_XDP socket that receives.
type SocketStatus struct {
	MultiBuffer bool `json:"multi_buffer"` // packets may take several frames
	FrameSize   int  `json:"frame_size"`   // bytes
	// RXNeedWakeup and TXNeedWakeup say whether the kernel asks now to be woken by a
	// system call. In copy mode it always does to send, and never to receive.
	RXNeedWakeup bool `json:"rx_need_wakeup"`
	TXNeedWakeup bool `json:"tx_need_wakeup"`
	// What follows is struct xdp_statistics, as the kernel names it.
	RXDropped       uint64 `json:"rx_dropped"`
	RXInvalidDescs  uint64 `json:"rx_invalid_descs"`
	TXInvalidDescs  uint64 `json:"tx_invalid_descs"`
	RXRingFull      uint64 `json:"rx_ring_full"`
	RXFillRingEmpty uint64 `json:"rx_fill_ring_empty_descs"`
	TXRingEmpty     uint64 `json:"tx_ring_empty_descs"`
}

// WorkerSender is how a worker of path afxdp sends on an interface.
type WorkerSender struct {
	Interface string `json:"interface"`
	// Queue is the transmit queue of an AF_XDP socket; -1 for a packet socket, and
	// Cause says why it is one.
	Queue int    `json:"queue"`
	Mode  string `json:"mode"` // "zero-copy", "copy" or "packet"
	State string `json:"state"`
	Cause string `json:"cause,omitempty"`
	// Lost counts frames that were counted as sent and given up, since the device went
	// before it took them or dropped them later.
	Lost uint64 `json:"lost"`
}

// Status is the daemon at a glance.
type Status struct {
	Version string    `json:"version"`
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
	// Ready is set once the rules are in.
	Ready  bool   `json:"ready"`
	PinDir string `json:"pin_dir"`
	// Schema is the version of the pinned state.
	Schema uint32 `json:"schema"`
	// Config is the daemon's file, empty when it has none.
	Config string `json:"config"`

	// Unconfirmed is the change that waits for confirmation, nil for none.
	Unconfirmed *UnconfirmedChange `json:"unconfirmed,omitempty"`

	Rules   int `json:"rules"`
	Active  int `json:"active"`
	Pending int `json:"pending"`
	Failed  int `json:"failed"`

	// Mroutes is what becomes of the kernel's multicast routes; nil while none are mirrored.
	Mroutes *MrouteStatus `json:"mroutes,omitempty"`

	Interfaces []InterfaceStatus `json:"interfaces"`
	// Workers are those of the paths in user space, by interface, path and queue.
	Workers []Worker `json:"workers"`
	// Passed counts what no rule matched, left untouched.
	Passed Counter `json:"passed"`
	// Drops is the total by reason, over all rules.
	Drops    []Drop   `json:"drops"`
	Warnings []string `json:"warnings"`
}

// MrouteStatus says which multicast routes of the kernel are forwarded in XDP.
type MrouteStatus struct {
	// Entries of the kernel's cache that are resolved, and how many of them are taken over.
	Entries     int `json:"entries"`
	Accelerated int `json:"accelerated"`
	// Left are the others by reason, the most frequent first.
	Left []MroutesLeft `json:"left"`
}

// MroutesLeft is how many multicast routes are left to the kernel for one reason.
type MroutesLeft struct {
	Reason  string `json:"reason"`
	Entries int    `json:"entries"`
	// First is the name of the first rule of them.
	First string `json:"first"`
	// Expected: the settings or the route itself want it so, and nothing of the host is to be
	// changed.
	Expected bool `json:"expected"`
}

// Operations of a Change.
const (
	OpAdd    = "add"
	OpRemove = "remove"
	OpChange = "change"
)

// Change is what Apply or Reload did, or would do, with one rule.
type Change struct {
	Op string `json:"op"`
	// Rule is the rule as it is now, or for OpRemove as it was.
	Rule Rule `json:"rule"`
	// Old is what the rule was before, for OpChange only.
	Old *Rule `json:"old,omitempty"`
}

// ApplyOptions are how to Apply or Reload.
type ApplyOptions struct {
	// DryRun is to say only what would change.
	DryRun bool
	// MaxChanges is how many changes the result lists; 0 is all. 100,000 of them
	// take longer to tell than to do.
	MaxChanges int
	// Confirm is the time in which the change must be confirmed (Backend.Confirm), or the
	// set of before comes back: MinConfirm to MaxConfirm. 0: it need not be.
	Confirm time.Duration
}

// Bounds of ApplyOptions.Confirm.
const (
	MinConfirm = time.Second
	MaxConfirm = 24 * time.Hour
)

// ApplyResult says what became of the rules.
type ApplyResult struct {
	DryRun  bool `json:"dry_run"`
	Added   int  `json:"added"`
	Changed int  `json:"changed"`
	Removed int  `json:"removed"`
	Kept    int  `json:"kept"`
	// Changes lists what was added, changed and removed, in this order; the first
	// ApplyOptions.MaxChanges of it.
	Changes []Change `json:"changes"`
	// Mroute says that the settings of multicast routes changed: OpAdd where none were mirrored
	// before, OpRemove where none are now; empty where they stay.
	Mroute string `json:"mroute,omitempty"`
	// ConfirmBy is when the change is undone unless it is confirmed; nil for one that is
	// final, or that changes nothing.
	ConfirmBy *time.Time `json:"confirm_by,omitempty"`
}

// HistoryEntry is a set of rules that was in force, and the change that brought it in.
type HistoryEntry struct {
	// Back is how many changes ago that was, as Rollback takes it; 0 is in force.
	Back int       `json:"back"`
	Time time.Time `json:"time"`
	// What was done: "rule apply", "rule add cam1", "reload", "rollback 2", "start", ...
	What string `json:"what"`
	// UID is the user who asked for it, nil when the daemon did it by itself.
	UID     *uint32 `json:"uid,omitempty"`
	Added   int     `json:"added"`
	Changed int     `json:"changed"`
	Removed int     `json:"removed"`
	// Rules is how many the set has, of all origins.
	Rules int `json:"rules"`
}

// UnconfirmedChange is a change that is undone at Until unless it is confirmed.
type UnconfirmedChange struct {
	What  string    `json:"what"`
	UID   *uint32   `json:"uid,omitempty"`
	Time  time.Time `json:"time"`
	Until time.Time `json:"until"`
}

// TransmitDrop counts packets that an interface did not take after the program
// had sent them, by the kernel's reason.
type TransmitDrop struct {
	Interface string `json:"interface"`
	Reason    string `json:"reason"`
	Packets   uint64 `json:"packets"`
}

// ReceiveDrop counts packets of the rules of a path on an interface that were lost on
// their way to the path's workers, by the reasons of Loss: the rules' counters of what
// matched have them on path afxdp, and not on path fanout.
type ReceiveDrop struct {
	Interface string `json:"interface"`
	Path      string `json:"path"`
	Loss
}

// Fragments counts fragments by what was known of them.
type Fragments struct {
	// First are those of datagrams that a rule takes.
	First Counter `json:"first"`
	// Later are those that followed their first one.
	Later Counter `json:"later"`
	// Orphan are those whose first one was not seen before, or too long ago: left
	// to the host.
	Orphan Counter `json:"orphan"`
}

// Stats is every counter, read at Time.
type Stats struct {
	Time  time.Time    `json:"time"`
	Rules []RuleStatus `json:"rules"`
	// Passed counts what no rule matched.
	Passed Counter `json:"passed"`
	// PassedBroadcast counts what of Passed was IPv4 UDP in broadcast frames.
	PassedBroadcast Counter `json:"passed_broadcast"`
	// Fragments counts fragments of UDP datagrams.
	Fragments Fragments `json:"fragments"`
	// Drops is the total by reason, over all rules.
	Drops         []Drop         `json:"drops"`
	TransmitDrops []TransmitDrop `json:"transmit_drops"`
	// ReceiveDrops counts since the state was pinned; after a daemon was killed, without its
	// last second.
	ReceiveDrops []ReceiveDrop `json:"receive_drops"`
}

// Explanation says what becomes of a packet, and why.
type Explanation struct {
	// Packet is what was asked for, in its canonical form.
	Packet string `json:"packet"`
	// Why says in a line which rule takes it, or why none does.
	Why string `json:"why"`
	// Candidates are the rules that match, the winner first.
	Candidates []Candidate `json:"candidates"`
	// Path is how the winner's packets travel, empty when none does; PathReason
	// says why so.
	Path       string `json:"path,omitempty"`
	PathReason string `json:"path_reason,omitempty"`
	// Outputs are the winner's.
	Outputs []ExplainedOutput `json:"outputs"`
	// Memberships are those that bring the packet.
	Memberships []Group `json:"memberships"`
	// Notes are what else a person should know of the packet, a line each.
	Notes []string `json:"notes,omitempty"`
}

// Candidate is a rule that matches a packet.
type Candidate struct {
	Rule  string `json:"rule"`
	Input string `json:"input"`
	// Kind is what it is matched by: "source, group, port", for a prefix with its
	// length. Of two kinds the more specific wins.
	Kind   string `json:"kind"`
	State  string `json:"state"`
	Reason string `json:"reason,omitempty"`
}

// ExplainedOutput is one output of the rule that takes a packet.
type ExplainedOutput struct {
	Slot   int    `json:"slot"`
	Output string `json:"output"`
	// Rewrite says in words what the copy looks like.
	Rewrite string `json:"rewrite"`
	State   string `json:"state"`
	Reason  string `json:"reason,omitempty"`
	// NextHop is where a unicast copy goes, once it is known.
	NextHop string `json:"next_hop,omitempty"`
	// Dropped is set while copies for this output are dropped.
	Dropped bool `json:"dropped"`
}

// UpgradeResult is what replaced the daemon.
type UpgradeResult struct {
	PID int `json:"pid"`
	// Took is from the request until the new daemon was ready.
	Took string `json:"took"`
}

// How long a new daemon may take until it is ready: by default, and at most, which leaves time to
// answer the request.
const (
	DefaultUpgradeTimeout = 30 * time.Second
	MaxUpgradeTimeout     = 50 * time.Second
)
