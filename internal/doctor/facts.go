package doctor

import (
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/network"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/rules"
)

// Facts is the input of the checks.
type Facts struct {
	Host       Host
	Interfaces []Interface
	Rule       *Rule // nil: none requested
}

// Host has the facts about the host as a whole.
type Host struct {
	Release string // of the kernel
	// Lacks is what the relay requires and the kernel lacks; nil for nothing. Has is what it has of
	// the optional features.
	Lacks error
	Has   loader.Capabilities
	CPUs  int
	// Mitigations maps the files of /sys/devices/system/cpu/vulnerabilities to their contents.
	Mitigations map[string]string
	// Apart is the time between the two readings of each counter.
	Apart time.Duration

	PinDir  string
	Mounted bool // the pin directory is, or would be created, on a BPF file system
	// Private says why this file system ends with its mount namespace; empty: it does not.
	Private string
	// Pinned is why pinned state could not be read; nil if it was, or there is none.
	Pinned error

	// Process is the daemon, or this program if none runs.
	Process Process
	// Daemon is nil if none runs; Rules is then the number of rules in the kernel.
	Daemon *control.Status
	Rules  int
	// Groups are the daemon's memberships.
	Groups []control.Group

	Softnet  [2]Softnet
	Backlog  int // net.core.netdev_max_backlog
	Budget   int // net.core.netdev_budget
	Firewall Firewall
	// Unread lists the facts that could not be read, one per line.
	Unread []string
}

// Process is the privileges and limits of a process.
type Process struct {
	PID          int
	Capabilities uint64 // effective, one bit each
	Files, Limit int    // open file descriptors and their maximum; 0: unknown
	MemLock      uint64 // bytes of memory that it may lock; 0: unknown
	// Elsewhere: its network namespace is not this program's.
	Elsewhere bool
	// ClockOffset is how far the monotonic clock of its time namespace is ahead of the host's.
	ClockOffset time.Duration
}

// Softnet counts packets lost or delayed between driver and stack, summed over all CPUs
// (/proc/net/softnet_stat).
type Softnet struct {
	Dropped  uint64 // a CPU's backlog was full
	Squeezed uint64 // polls that ended before the rings were empty
}

// Interface has the facts about one interface.
type Interface struct {
	Name          string
	Link          *network.Link // nil: absent
	Input, Output bool          // rules receive or send on it
	CPUs          int
	Apart         time.Duration
	// Device is read twice.
	Device [2]network.Device

	// Program is the id of the relay program on it, 0 for none; Mode is its XDP mode, and Note the
	// daemon's reason for the mode.
	Program uint32
	Mode    string
	Note    string
	// Wanted: a rule needs the relay program on it.
	Wanted bool

	// Inputs are the inputs of rules on it; Fanout: some use the path fanout.
	Inputs []Input
	Fanout bool
	// Unfinished counts packets of its rules that arrived with incomplete checksums, and TooLong
	// copies that were too long for it.
	Unfinished, TooLong [2]uint64
	// SmallestOutput is the interface with the smallest MTU among the outputs of its rules; nil for
	// none.
	SmallestOutput *network.Link

	// IGMP and MLD are what the daemon heard from the network; nil without a daemon.
	IGMP, MLD *control.Multicast
	// IGMPVersion is the version that the kernel uses, 0: unknown; ForcedIGMP and ForcedMLD are the
	// versions forced by sysctls, 0: none, and ForcedBy is the interface that the sysctl names.
	IGMPVersion           int
	ForcedIGMP, ForcedMLD int
	ForcedBy              string
	Joined                int // the daemon's memberships on it
	// Receives are the group MAC addresses that the device is set to receive (/proc/net/dev_mcast).
	Receives map[[6]byte]bool
	// Master is the bridge that it is, or is a port of; nil for none.
	Master     *network.Bridge
	MasterName string
	// Interrupts are the CPUs of its queues' interrupts, one entry per interrupt.
	Interrupts []string
	// Above are the macvlan and ipvlan devices on it.
	Above []string
}

// Input is the input of a rule on one interface.
type Input struct {
	rules.Input
	JoinNone bool // not joined
}

// Rule has the facts about the requested rule.
type Rule struct {
	Name  string
	Apart time.Duration
	// Status is read twice.
	Status [2]control.RuleStatus
	// Unsent counts frames that interfaces did not accept, and Lost packets lost before workers;
	// both are read twice.
	Unsent [2][]control.TransmitDrop
	Lost   [2][]control.ReceiveDrop
	// Groups are its memberships, and Explained the daemon's explanation; empty and nil without a
	// daemon.
	Groups    []control.Group
	Explained *control.Explanation
	// Inputs and Outputs are its interfaces.
	Inputs, Outputs []*Interface
	// Seen are streams to its groups that reached the host's stack: no rule took them, or one on
	// the path fanout did. Nil: not watched.
	Seen []Seen
}

// Seen is a stream seen on an input.
type Seen struct {
	Interface string
	Stream    string // SOURCE@GROUP:PORT%INTERFACE[,vlan=N]
	Packets   uint64
}
