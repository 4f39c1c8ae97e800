package control

import "time"

// Rule is a rule as written by users; the grammar is that of package rules.
type Rule struct {
	// Name is unique on the host.
	Name string `json:"name"`
	// In is [SOURCE@]ADDRESS[/LEN][:PORT]%INTERFACE[,option...]. For a rule with several inputs it
	// has all of them, separated by blanks.
	In string `json:"in"`
	// Merge or Failover is how several inputs are merged: FORMAT[,option...], and TIME[,back=TIME].
	Merge    string `json:"merge,omitempty"`
	Failover string `json:"failover,omitempty"`
	// Out holds one endpoint with its policies a slot, in slot order.
	Out []string `json:"out"`
	// Path is "auto" (also when empty), "kernel", "afxdp" or "fanout".
	Path string `json:"path,omitempty"`
}

// Counter counts packets and the bytes of their whole frames since the rule or the interface was
// first loaded; it survives restarts of the daemon.
type Counter struct {
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

// Drop counts packets dropped for one reason.
type Drop struct {
	Reason string `json:"reason"`
	Counter
}

// Lost says whether the packets are missing at an output: what another input of the rule has brought
// ("duplicate", "standby") is not.
func (d Drop) Lost() bool { return d.Reason != "duplicate" && d.Reason != "standby" }

// Dropped is the sum of the drops that are losses.
func Dropped(drops []Drop) (packets uint64) {
	for _, d := range drops {
		if d.Lost() {
			packets += d.Packets
		}
	}
	return packets
}

// Origins of a rule.
const (
	OriginFile = "file" // the daemon's own file; changed by editing it and reloading
	OriginAPI  = "api"  // added through this API
	// OriginMroute is the origin of rules that mirror the kernel's multicast routes: the routing
	// daemon changes them.
	OriginMroute = "mroute"
)

// States of a rule or an output. An output may have more specific ones, such as "no_neighbour".
const (
	StateActive  = "active"
	StatePending = "pending" // waits, for example for its interface; completes by itself
	StateFailed  = "failed"  // needs action by the operator
	// StateLooping is the state of an active rule whose packets come back to it; returning ones are
	// dropped. Reason describes the loop path.
	StateLooping = "looping"
)

// OutputStatus is one output of a rule. Slot is its index within the rule.
type OutputStatus struct {
	Slot   int    `json:"slot"`
	Output string `json:"output"`
	// Interface is the output interface: for a pattern one of the matching ones, empty if there is
	// none.
	Interface string `json:"interface,omitempty"`
	State     string `json:"state"`
	Reason    string `json:"reason,omitempty"`
	// NextHop is the neighbour of a unicast output, the destination itself or a gateway, and MAC
	// its link-layer address; both are empty for a group, and while they are not known.
	NextHop string `json:"next_hop,omitempty"`
	MAC     string `json:"mac,omitempty"`

	Sent  Counter `json:"sent"`
	Drops []Drop  `json:"drops"`
}

// InputStatus is one input interface of a rule whose input is a pattern, or one of several inputs.
type InputStatus struct {
	Interface string `json:"interface"`
	State     string `json:"state"`
	Reason    string `json:"reason,omitempty"`
	// The following fields are set for one of several inputs and, except Input, for one with health=:
	// its text, its matched packets, those that were not relayed, and its part in the stream.
	Input   string     `json:"input,omitempty"`
	Matched Counter    `json:"matched,omitzero"`
	Drops   []Drop     `json:"drops,omitempty"`
	Leg     *LegStatus `json:"leg,omitempty"`
}

// RuleStatus is a rule and its state.
type RuleStatus struct {
	Rule
	// ID is the rule's index in the pinned maps, 0 if it is not in them.
	ID     uint32 `json:"id"`
	Origin string `json:"origin"`
	State  string `json:"state"`
	// Reason says in one line why State is not active.
	Reason string `json:"reason,omitempty"`
	// YieldsTo names rules that take precedence for some of this one's packets, and WinsOver those
	// over which this one takes precedence; at most a few of each, and only where rules are listed
	// or shown.
	YieldsTo []string `json:"yields_to,omitempty"`
	WinsOver []string `json:"wins_over,omitempty"`
	// UsedPath is the path of the packets, empty if there is none yet.
	UsedPath string  `json:"used_path,omitempty"`
	Matched  Counter `json:"matched"`
	// LastSeen is when a packet last matched, nil if none has.
	LastSeen *time.Time `json:"last_seen,omitempty"`
	// Notes count conditions of the rule's packets that are not drops, by reason: malformed,
	// orphan_fragment, unfinished_checksum, echo.
	Notes []Drop `json:"notes,omitempty"`
	// Drops counts matched packets that were dropped before any output.
	Drops   []Drop         `json:"drops"`
	Outputs []OutputStatus `json:"outputs"`
	// Inputs has an entry for each interface that a pattern of the input matches, for each of several
	// inputs, or for one with health=; it is empty for any other input that names its interface.
	Inputs []InputStatus `json:"inputs"`
	// Stream is nil for a rule with one input without health=.
	Stream *StreamStatus `json:"stream,omitempty"`
	// ReceiveDrops are those of the rule's path on its interfaces, of all rules there: the kernel
	// does not report them by rule.
	ReceiveDrops []ReceiveDrop `json:"receive_drops,omitempty"`
}

// States of a membership.
const (
	GroupWanted   = "wanted"
	GroupJoined   = "joined"
	GroupRetrying = "retrying"
	GroupFailed   = "failed"
)

// Multicast is the state of multicast group management on an interface in one family.
type Multicast struct {
	// Version is the kernel's version: "IGMPv1" to "IGMPv3", "MLDv1" or "MLDv2"; empty if unknown.
	Version string `json:"version,omitempty"`
	// Querier is the last heard querier, and QuerierSeen when it was heard; empty if none was. A
	// switch without an address sends queries from 0.0.0.0.
	Querier     string     `json:"querier,omitempty"`
	QuerierSeen *time.Time `json:"querier_seen,omitempty"`
	// Queries counts queries since the program was attached.
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
	// Tries counts the attempts to join; Next is when the next one is due, and Cause the error of
	// the last one.
	Tries int        `json:"tries"`
	Next  *time.Time `json:"next,omitempty"`
	Cause string     `json:"cause,omitempty"`
	// Rules names the rules that need the membership.
	Rules []string `json:"rules"`
	// Master is the bridge, bond or team that the interface is a port of, which answers queries for
	// it; the group is joined there, too. For names the ports for which a membership of a master
	// exists.
	Master string   `json:"master,omitempty"`
	For    []string `json:"for,omitempty"`
	// LastPacket is when a packet of the group last matched a rule.
	LastPacket *time.Time `json:"last_packet,omitempty"`
	Multicast
	// Detail summarizes all that in one line: "joined, silent for 12s, no querier heard".
	Detail string `json:"detail,omitempty"`
}

// Roles of an interface.
const (
	RoleInput  = "input"
	RoleOutput = "output"
)

// States of an interface.
const (
	LinkUp        = "up"
	LinkNoCarrier = "no_carrier" // administratively up, but no cable is plugged in or the peer is down
	LinkDown      = "down"
	LinkAbsent    = "absent"
)

// InterfaceStatus is an interface that rules name.
type InterfaceStatus struct {
	Name string `json:"name"`
	// Index is 0 while the interface is absent.
	Index int `json:"index"`
	// Link is the interface's state; packets are sent to it, and counted as sent, only while that
	// is "up".
	Link string `json:"link"`
	// Master is the bridge, bond or other interface that it is a port of, empty if none.
	Master string `json:"master,omitempty"`
	// Mode is "native" or "generic", empty while no program is attached.
	Mode  string   `json:"mode,omitempty"`
	Roles []string `json:"roles"`
	// ProgramID and LinkID are the kernel's ids, as in bpftool.
	ProgramID uint32 `json:"program_id,omitempty"`
	LinkID    uint32 `json:"link_id,omitempty"`
	// Note is a one-line hint, such as why the mode is not native.
	Note string `json:"note,omitempty"`

	// JoinsAttempted == JoinsSucceeded + JoinsFailed at any time.
	JoinsAttempted uint64 `json:"joins_attempted"`
	JoinsSucceeded uint64 `json:"joins_succeeded"`
	JoinsFailed    uint64 `json:"joins_failed"`
	// LeavesAttempted == LeavesSucceeded + LeavesFailed, likewise.
	LeavesAttempted uint64 `json:"leaves_attempted"`
	LeavesSucceeded uint64 `json:"leaves_succeeded"`
	LeavesFailed    uint64 `json:"leaves_failed"`

	// TransmitDrops counts packets that the device refused after the program had sent them; the
	// kernel does not count their bytes.
	TransmitDrops uint64 `json:"transmit_drops"`

	// IGMP and MLD are nil if no membership is held there, and no querier was heard, in the family.
	IGMP *Multicast `json:"igmp,omitempty"`
	MLD  *Multicast `json:"mld,omitempty"`
}

// States of a worker, besides StateActive and StateFailed.
const (
	WorkerDown    = "down"    // its interface is down; resumes by itself
	WorkerMissing = "missing" // the queue has none; it is retried
)

// Worker handles packets of an input interface on a user-space path: on path afxdp those of a
// receive queue, on path fanout its share of a PACKET_FANOUT group.
type Worker struct {
	Interface string `json:"interface"`
	// Path is "afxdp" or "fanout".
	Path string `json:"path"`
	// Queue is the receive queue; on path fanout the worker's number in its group, where workers
	// for packets of this host (from=host) are numbered after the others.
	Queue int    `json:"queue"`
	State string `json:"state"`
	// Cause is why State is not active, or the worker's last error.
	Cause string `json:"cause,omitempty"`
	// Failures counts how often the worker failed and was restarted.
	Failures uint64 `json:"failures"`
	// Mode is "zero-copy" or "copy"; on path fanout how the kernel spreads packets: "cpu", "hash"
	// or "ebpf".
	Mode string `json:"mode,omitempty"`
	// Group is the id of the PACKET_FANOUT group; 0 on path afxdp.
	Group uint16 `json:"group,omitempty"`
	// Received counts the packets that reached the worker, and Lost, by reason, those that the
	// kernel assigned to it but that reached no rule. A closed worker's counters are gone;
	// Stats.ReceiveDrops keeps them.
	Received uint64 `json:"received"`
	Lost     []Loss `json:"lost"`
	// Socket is nil on path fanout.
	Socket *SocketStatus `json:"socket,omitempty"`
	// Senders are how the copies leave; on path fanout they are not listed.
	Senders []WorkerSender `json:"senders"`
}

// Loss counts packets that were lost on their way to a user-space path. Reasons: "ring_full" (the
// worker did not keep up), "no_frame" (path afxdp: no receive memory was free, since the worker did
// not keep up; or the packet was too long for it), and "rule_gone" (path afxdp: the rule was
// removed meanwhile).
type Loss struct {
	Reason  string `json:"reason"`
	Packets uint64 `json:"packets"`
}

// SocketStatus is a receiving AF_XDP socket.
type SocketStatus struct {
	MultiBuffer bool `json:"multi_buffer"` // packets may span several frames
	FrameSize   int  `json:"frame_size"`   // bytes
	// RXNeedWakeup and TXNeedWakeup say whether the kernel currently needs a system call to make
	// progress. In copy mode it always does for sending, and never for receiving.
	RXNeedWakeup bool `json:"rx_need_wakeup"`
	TXNeedWakeup bool `json:"tx_need_wakeup"`
	// The following fields are struct xdp_statistics, with the kernel's names.
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
	// Queue is the transmit queue of an AF_XDP socket; -1 for a packet socket, with the reason in
	// Cause.
	Queue int    `json:"queue"`
	Mode  string `json:"mode"` // "zero-copy", "copy" or "packet"
	State string `json:"state"`
	Cause string `json:"cause,omitempty"`
	// Lost counts frames that were counted as sent but abandoned, because the device disappeared
	// before it took them, or dropped them later.
	Lost uint64 `json:"lost"`
}

// Status is the daemon's status.
type Status struct {
	Version string    `json:"version"`
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
	// Ready is set once the rules are loaded.
	Ready  bool   `json:"ready"`
	PinDir string `json:"pin_dir"`
	// Schema is the version of the pinned state.
	Schema uint32 `json:"schema"`
	// Config is the daemon's file, empty if it has none.
	Config string `json:"config"`
	// Revision changes with every change of the rules, and with the daemon. Mirrored multicast routes
	// do not count.
	Revision string `json:"revision,omitempty"`

	// Unconfirmed is the change that waits for confirmation, nil if none.
	Unconfirmed *UnconfirmedChange `json:"unconfirmed,omitempty"`

	Rules   int `json:"rules"`
	Active  int `json:"active"`
	Pending int `json:"pending"`
	Failed  int `json:"failed"`

	// Mroutes is the state of the kernel's multicast routes; nil while none are mirrored.
	Mroutes *MrouteStatus `json:"mroutes,omitempty"`

	Interfaces []InterfaceStatus `json:"interfaces"`
	// Workers are the workers of the user-space paths, by interface, path and queue.
	Workers []Worker `json:"workers"`
	// Passed counts packets that matched no rule and passed unchanged.
	Passed Counter `json:"passed"`
	// Drops is the total by reason, over all rules.
	Drops    []Drop   `json:"drops"`
	Warnings []string `json:"warnings"`
}

// MrouteStatus is which multicast routes of the kernel are forwarded in XDP.
type MrouteStatus struct {
	// Entries is the number of resolved entries in the kernel's cache, and Taken how many are taken
	// over.
	Entries     int `json:"entries"`
	Accelerated int `json:"accelerated"`
	// Left counts the others by reason, the most frequent first.
	Left []MroutesLeft `json:"left"`
}

// MroutesLeft is the number of multicast routes left to the kernel for one reason.
type MroutesLeft struct {
	Reason  string `json:"reason"`
	Entries int    `json:"entries"`
	// First is the name of the first such rule.
	First string `json:"first"`
	// Expected: due to the settings or the route itself; nothing needs changing on the host.
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
	// Rule is the new rule, or for OpRemove the old one.
	Rule Rule `json:"rule"`
	// Old is the old rule, only for OpChange.
	Old *Rule `json:"old,omitempty"`
}

// ApplyOptions are options of Apply and Reload.
type ApplyOptions struct {
	// DryRun only reports what would change.
	DryRun bool
	// MaxChanges limits the changes listed in the result; 0 is no limit. Listing 100,000 of them
	// takes longer than making them.
	MaxChanges int
	// Confirm is the time within which the change must be confirmed (Backend.Confirm), or the
	// previous set is restored: MinConfirm to MaxConfirm. 0: no confirmation needed.
	Confirm time.Duration
	// Revision makes the change only if the daemon's rules are still those of this revision
	// (Status.Revision, ApplyResult.Revision); KindConflict otherwise. Empty: whatever they are.
	Revision string
}

// Limits of ApplyOptions.Confirm.
const (
	MinConfirm = time.Second
	MaxConfirm = 24 * time.Hour
)

// ApplyResult is the result of a change of the rules.
type ApplyResult struct {
	DryRun bool `json:"dry_run"`
	// Revision is that of the rules after the change, of a dry run that of the current ones.
	Revision string `json:"revision,omitempty"`
	Added    int    `json:"added"`
	Changed  int    `json:"changed"`
	Removed  int    `json:"removed"`
	Kept     int    `json:"kept"`
	// Changes lists the added, changed and removed rules, in this order; at most the first
	// ApplyOptions.MaxChanges.
	Changes []Change `json:"changes"`
	// Mroute says that the settings of multicast routes changed: OpAdd if none were mirrored
	// before, OpRemove if none are now; empty if unchanged.
	Mroute string `json:"mroute,omitempty"`
	// ConfirmBy is when the change is undone unless it is confirmed; nil if it is final, or changes
	// nothing.
	ConfirmBy *time.Time `json:"confirm_by,omitempty"`
}

// HistoryEntry is an earlier set of rules, and the change that introduced it.
type HistoryEntry struct {
	// Back is how many changes ago that was, the argument of Rollback; 0 is the current set.
	Back int       `json:"back"`
	Time time.Time `json:"time"`
	// What is the change: "rule apply", "rule add cam1", "reload", "rollback 2", "start", ...
	What string `json:"what"`
	// UID is the user who made it, nil if the daemon did.
	UID     *uint32 `json:"uid,omitempty"`
	Added   int     `json:"added"`
	Changed int     `json:"changed"`
	Removed int     `json:"removed"`
	// Rules is the number of rules in the set, of all origins.
	Rules int `json:"rules"`
}

// UnconfirmedChange is a change that is undone at Until unless it is confirmed.
type UnconfirmedChange struct {
	What  string    `json:"what"`
	UID   *uint32   `json:"uid,omitempty"`
	Time  time.Time `json:"time"`
	Until time.Time `json:"until"`
}

// TransmitDrop counts packets that an interface refused after the program had sent them, by the
// kernel's reason.
type TransmitDrop struct {
	Interface string `json:"interface"`
	Reason    string `json:"reason"`
	Packets   uint64 `json:"packets"`
}

// ReceiveDrop counts packets of the rules of a path on an interface that were lost on their way to
// the path's workers, by the reasons of Loss: the rules' matched counters include them on path
// afxdp, but not on path fanout.
type ReceiveDrop struct {
	Interface string `json:"interface"`
	Path      string `json:"path"`
	Loss
}

// Fragments counts fragments by kind.
type Fragments struct {
	// First are first fragments of datagrams that match a rule.
	First Counter `json:"first"`
	// Later are those that followed their first one.
	Later Counter `json:"later"`
	// Orphan are those whose first one was not seen, or too long ago: passed to the host.
	Orphan Counter `json:"orphan"`
}

// Stats is every counter, read at Time.
type Stats struct {
	Time  time.Time    `json:"time"`
	Rules []RuleStatus `json:"rules"`
	// Passed counts packets that matched no rule.
	Passed Counter `json:"passed"`
	// PassedBroadcast counts the IPv4 UDP in broadcast frames in Passed.
	PassedBroadcast Counter `json:"passed_broadcast"`
	// Fragments counts fragments of UDP datagrams.
	Fragments Fragments `json:"fragments"`
	// Drops is the total by reason, over all rules.
	Drops         []Drop         `json:"drops"`
	TransmitDrops []TransmitDrop `json:"transmit_drops"`
	// ReceiveDrops counts since the state was pinned; after a kill, without the daemon's last
	// second.
	ReceiveDrops []ReceiveDrop `json:"receive_drops"`
}

// Explanation explains how a packet is handled, and why.
type Explanation struct {
	// Packet is the requested packet, in its canonical form.
	Packet string `json:"packet"`
	// Why says in one line which rule takes it, or why none does.
	Why string `json:"why"`
	// Candidates are the matching rules, the winner first.
	Candidates []Candidate `json:"candidates"`
	// Path is the path of the winner's packets, empty if there is none; PathReason is the reason
	// for it.
	Path       string `json:"path,omitempty"`
	PathReason string `json:"path_reason,omitempty"`
	// Outputs are the winner's.
	Outputs []ExplainedOutput `json:"outputs"`
	// Memberships are those that attract the packet.
	Memberships []Group `json:"memberships"`
	// Notes are hints about the packet, one line each.
	Notes []string `json:"notes,omitempty"`
}

// Candidate is a rule that matches a packet.
type Candidate struct {
	Rule  string `json:"rule"`
	Input string `json:"input"`
	// Kind is what it matches by: "source, group, port", for a prefix with its length. The more
	// specific kind wins.
	Kind   string `json:"kind"`
	State  string `json:"state"`
	Reason string `json:"reason,omitempty"`
}

// ExplainedOutput is one output of the rule that takes a packet.
type ExplainedOutput struct {
	Slot   int    `json:"slot"`
	Output string `json:"output"`
	// Rewrite describes the copy in words.
	Rewrite string `json:"rewrite"`
	State   string `json:"state"`
	Reason  string `json:"reason,omitempty"`
	// NextHop is the neighbour of a unicast copy, once it is known.
	NextHop string `json:"next_hop,omitempty"`
	// Dropped is set while copies for this output are dropped.
	Dropped bool `json:"dropped"`
}

// UpgradeResult identifies the new daemon.
type UpgradeResult struct {
	PID int `json:"pid"`
	// Took is the time from the request until the new daemon was ready.
	Took string `json:"took"`
}

// Time limits for a new daemon to become ready: the default, and the maximum, which leaves time to
// answer the request.
const (
	DefaultUpgradeTimeout = 30 * time.Second
	MaxUpgradeTimeout     = 50 * time.Second
)
