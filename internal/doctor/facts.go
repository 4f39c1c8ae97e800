package doctor

import (
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/network"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/rules"
)

// Facts is what the checks look at.
type Facts struct {
	Host       Host
	Interfaces []Interface
	Rule       *Rule // nil: none is asked for
}

// Host is what is known of the host as a whole.
type Host struct {
	Release string // of the kernel
	// Lacks says what the kernel lacks that the relay cannot do without; nil for nothing. Has
	// is what it has of the rest.
	Lacks error
	Has   loader.Capabilities
	CPUs  int
	// Mitigations are the files of /sys/devices/system/cpu/vulnerabilities.
	Mitigations map[string]string
	// Apart is the time between two readings of each counter.
	Apart time.Duration

	PinDir  string
	Mounted bool // a BPF file system is where the pin directory is, or is to be made
	// Private says that this file system ends with its mount namespace; empty: it does not.
	Private string
	// Pinned says why pinned state could not be read; nil where it was, or there is none.
	Pinned error

	// Process is the daemon, or this program where none runs.
	Process Process
	// Daemon is nil while none runs, and Rules are those that are in the kernel then.
	Daemon *control.Status
	Rules  int
	// Groups are the memberships of the daemon.
	Groups []control.Group

	Softnet  [2]Softnet
	Backlog  int // net.core.netdev_max_backlog
	Budget   int // net.core.netdev_budget
	Firewall Firewall
	// Unread are the facts that could not be read, a line each.
	Unread []string
}

// Process is what the kernel lets a process do.
type Process struct {
	PID          int
	Capabilities uint64 // effective, a bit for each
	Files, Limit int    // open file descriptors, and how many there may be; 0: not known
	MemLock      uint64 // bytes of memory that it may lock; 0: not known
	// Elsewhere: it is in another network namespace than this program.
	Elsewhere bool
	// ClockOffset is how much the monotonic clock of its time namespace is ahead of the host's.
	ClockOffset time.Duration
}

// Softnet counts what happened to packets between driver and stack, on all CPUs together
// (/proc/net/softnet_stat).
type Softnet struct {
	Dropped  uint64 // no room in the backlog of a CPU
	Squeezed uint64 // rounds that ended before the rings were empty
}

// Interface is what is known of one interface.
type Interface struct {
	Name          string
	Link          *network.Link // nil: absent
	Input, Output bool          // rules take packets there, or send there
	CPUs          int
	Apart         time.Duration
	// Device is read twice.
	Device [2]network.Device

	// Program is the id of the relay program on it, 0 for none, Mode how it runs, and Note why
	// it runs so, as the daemon says.
	Program uint32
	Mode    string
	Note    string
	// Wanted says that a rule needs the relay program there.
	Wanted bool

	// Inputs are those of the rules on it, and Fanout says that some take the fanout path.
	Inputs []Input
	Fanout bool
	// Unfinished counts packets of the rules on it that came with unfinished checksums, and
	// TooLong copies that were too long for it.
	Unfinished, TooLong [2]uint64
	// SmallestOutput is the interface with the smallest MTU to which rules send from here;
	// nil for none.
	SmallestOutput *network.Link

	// IGMP and MLD are as the daemon heard the network; nil without one.
	IGMP, MLD *control.Multicast
	// IGMPVersion is what the kernel speaks, 0: not known; ForcedIGMP and ForcedMLD are the
	// versions that sysctls force, 0 for none, and ForcedBy names the interface of the sysctl.
	IGMPVersion           int
	ForcedIGMP, ForcedMLD int
	ForcedBy              string
	Joined                int // memberships of the daemon on it
	// Receives are the group MAC addresses that the device is told to take (/proc/net/dev_mcast).
	Receives map[[6]byte]bool
	// Master is the bridge that it is a port of, or that it is; nil for none.
	Master     *network.Bridge
	MasterName string
	// Interrupts are the CPUs that the interrupts of its queues go to, one each.
	Interrupts []string
	// Above are macvlan and ipvlan devices on it.
	Above []string
}

// Input is the input of a rule on one interface.
type Input struct {
	rules.Input
	JoinNone bool // nobody joins it
}

// Rule is what is known of the rule that is asked for.
type Rule struct {
	Name  string
	Apart time.Duration
	// Status is read twice.
	Status [2]control.RuleStatus
	// Unsent and Lost are what interfaces did not take, and what was lost before workers, read
	// twice.
	Unsent [2][]control.TransmitDrop
	Lost   [2][]control.ReceiveDrop
	// Groups are its memberships, and Explained what the daemon says; empty and nil without one.
	Groups    []control.Group
	Explained *control.Explanation
	// Inputs and Outputs are its interfaces.
	Inputs, Outputs []*Interface
	// Seen are streams to its groups that came to the host's stack, which no rule took, or a
	// rule on the path fanout; nil: nobody looked.
	Seen []Seen
}

// Seen is a stream that was seen on an input.
type Seen struct {
	Interface string
	Stream    string // SOURCE@GROUP:PORT%INTERFACE[,vlan=N]
	Packets   uint64
}
