package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/internal/network"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/membership"
	"xdpcast/pkg/packet"
)

func TestMain(m *testing.M) { labtest.Main(m) }

// patient is a host with a made-up relay but a real network:
//
//	source src0 ---- in0 relay out0 ---- sink0 sink
type patient struct {
	t            testing.TB
	relay, other *lab.Host
	status       *control.Status // nil: no daemon
	groups       []control.Group
	stats        control.Stats
	opts         Options
	// before is called on the gathering thread, which ends afterwards.
	before func() error
	// between is called while the doctor waits for its second reading.
	between func()
}

func (p *patient) Status(context.Context) (control.Status, error) {
	if p.status == nil {
		return control.Status{}, control.ErrNotRunning
	}
	return *p.status, nil
}

func (p *patient) Groups(context.Context) ([]control.Group, error) { return p.groups, nil }

func (p *patient) Explain(context.Context, string) (control.Explanation, error) {
	return control.Explanation{PathReason: "native XDP on in0"}, nil
}

const testInput = "10.1.0.2@239.1.1.1:5000%in0"

func newPatient(t testing.TB) *patient {
	t.Helper()
	p := &patient{t: t, relay: labtest.Host(t, "relay"), other: labtest.Host(t, "other")}
	labtest.Connect(t, lab.End{Host: p.relay, Name: "in0", Addrs: []string{"10.1.0.1/24"}}, lab.End{Host: p.other, Name: "src0", Addrs: []string{"10.1.0.2/24"}})
	labtest.Connect(t, lab.End{Host: p.relay, Name: "out0", Addrs: []string{"10.2.0.1/24"}}, lab.End{Host: p.other, Name: "sink0", Addrs: []string{"10.2.0.2/24"}})
	p.status = &control.Status{
		PID: processIn(t, p.relay), Ready: true, PinDir: filepath.Join(bpfFileSystem(t), "xdpcast"), Rules: 1, Active: 1,
		Interfaces: []control.InterfaceStatus{
			{Name: "in0", ProgramID: 7, Mode: "native", IGMP: &control.Multicast{Version: "IGMPv3", Querier: "10.1.0.254"}},
			{Name: "out0", ProgramID: 7, Mode: "native"},
		},
	}
	p.groups = []control.Group{{Interface: "in0", Group: "239.1.1.1", Source: "10.1.0.2", State: control.GroupJoined, Rules: []string{"cam1"}, Multicast: control.Multicast{Version: "IGMPv3", Querier: "10.1.0.254"}}}
	p.rule(testInput)
	p.opts = Options{Daemon: p, PinDir: p.status.PinDir, Apart: time.Millisecond, Root: os.DirFS("/")}
	reading := 0
	p.opts.Stats = func(context.Context) (control.Stats, error) {
		if reading++; reading == 3 && p.between != nil { // one reads the rules, two the counters
			p.between()
		}
		return p.stats, nil
	}
	return p
}

// bpfFileSystem mounts a private BPF file system: the machine may have none.
func bpfFileSystem(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, "mode=700"); err != nil {
		t.Fatalf("mount BPF file system: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount BPF file system: %v", err)
		}
	})
	return dir
}

// processIn starts an idle process in a host to stand in for the daemon, by a command that execs
// it.
func processIn(t testing.TB, h *lab.Host, command ...string) int {
	t.Helper()
	command = append(command, "cat")
	cmd := exec.CommandContext(t.Context(), command[0], command[1:]...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	labtest.Do(t, h, cmd.Start)
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	// An echo is the sign that it has loaded its libraries: under a lowered limit it could not, and
	// the file descriptors of the loader would be counted.
	if _, err := io.WriteString(in, "\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
		t.Fatalf("%q ended at its start: %v", command, err)
	}
	return cmd.Process.Pid
}

// process replaces the daemon's process by one started by a command, such as setpriv(1).
func (p *patient) process(command ...string) {
	p.t.Helper()
	p.status.PID = processIn(p.t, p.relay, command...)
}

// files is the number of file descriptors that the daemon's process has open, including inherited
// ones.
func (p *patient) files() uint64 {
	p.t.Helper()
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.status.PID))
	if err != nil {
		p.t.Fatal(err)
	}
	return uint64(len(open))
}

// limit lowers a limit of the daemon's process.
func (p *patient) limit(resource int, to uint64) {
	p.t.Helper()
	if err := unix.Prlimit(p.status.PID, resource, &unix.Rlimit{Cur: to, Max: to}, nil); err != nil {
		p.t.Fatalf("prlimit: %v", err)
	}
}

// tooLong makes out0 drop a packet that is too long for its peer.
func (p *patient) tooLong() {
	p.t.Helper()
	if err := p.other.Netlink().LinkSetMTU(labtest.Link(p.t, p.other, "sink0"), 1000); err != nil {
		p.t.Fatal(err)
	}
	group := netip.MustParseAddr("239.2.1.1")
	frame := packet.Frame{DstMAC: packet.MulticastMAC(group), Src: netip.MustParseAddr("10.2.0.1"), Dst: group, TTL: 1, Payload: make([]byte, 1200)}
	labtest.NewTap(p.t, p.relay, "out0").Send(frame.Build())
}

// rule gives the relay another input.
func (p *patient) rule(in string) {
	p.stats.Rules = []control.RuleStatus{{
		Rule: control.Rule{Name: "cam1", In: in, Out: []string{"239.2.1.1:6000%out0"}}, State: control.StateActive, UsedPath: "kernel",
		Outputs: []control.OutputStatus{{Output: "239.2.1.1:6000%out0", Interface: "out0", State: control.StateActive}},
	}}
}

// examine gathers and diagnoses in the relay's namespace.
func (p *patient) examine() Report {
	p.t.Helper()
	var r Report
	labtest.Do(p.t, p.relay, func() error {
		if p.before != nil {
			if err := p.before(); err != nil {
				return err
			}
		}
		facts, err := Gather(p.t.Context(), p.opts)
		if err == nil {
			r = Diagnose(facts)
		}
		return err
	})
	return r
}

// worst is the most severe finding of a check in a section; findings about the test machine are not
// predictable.
func (r *Report) worst(section, check string) (worst Finding) {
	for _, s := range r.Sections {
		for _, f := range s.Findings {
			if s.Title() == section && f.Check == check && (worst.Check == "" || f.Level > worst.Level) {
				worst = f
			}
		}
	}
	return worst
}

// over is the host's files with others laid over them.
type over struct {
	files fstest.MapFS
	below fs.FS
}

func (o over) Open(name string) (fs.File, error) {
	if _, ok := o.files[name]; ok {
		return o.files.Open(name)
	}
	return o.below.Open(name)
}

// file gives the doctor a text that the kernel cannot be made to have.
func (p *patient) file(name, text string) {
	p.opts.Root = over{fstest.MapFS{name: {Data: []byte(text)}}, p.opts.Root}
}

// ReadLink implements fs.ReadLinkFS.
func (o over) ReadLink(name string) (string, error) { return fs.ReadLink(o.below, name) }

// Lstat implements fs.ReadLinkFS.
func (o over) Lstat(name string) (fs.FileInfo, error) { return fs.Lstat(o.below, name) }

func nft(t testing.TB, h *lab.Host, script string) {
	t.Helper()
	program, err := exec.LookPath("nft")
	if err != nil {
		labtest.Lacking(t, "nft is not installed: scripts/setup --test installs it")
	}
	cmd := exec.CommandContext(t.Context(), program, "-f", "-")
	cmd.Stdin = strings.NewReader(script)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	labtest.Do(t, h, cmd.Start)
	if err := cmd.Wait(); err != nil {
		t.Fatalf("nft: %v\n%s", err, out.String())
	}
}

// passing is a program that passes everything.
func passing(t testing.TB, kind ebpf.ProgramType) *ebpf.Program {
	t.Helper()
	verdict := int32(2) // XDP_PASS
	if kind == ebpf.SchedCLS {
		verdict = 0 // TC_ACT_OK
	}
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "foreign", Type: kind, License: "MIT", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, verdict), asm.Return()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func addLink(t testing.TB, h *lab.Host, l netlink.Link) {
	t.Helper()
	if err := errors.Join(h.Netlink().LinkAdd(l), h.Netlink().LinkSetUp(l)); err != nil {
		t.Fatal(err)
	}
}

// faults are real faults: how to make each, and what the doctor must report.
var faults = []struct {
	name           string
	make           func(p *patient)
	section, check string
	level          Level
	text, cure     string // parts
}{
	{"an interface is down", func(p *patient) {
		if err := p.relay.SetUp("in0", false); err != nil {
			p.t.Fatal(err)
		}
	}, "interface in0", "link", Fault, "interface in0 is down", "ip link set dev in0 up"},
	{"an interface has no carrier", func(p *patient) {
		if err := p.other.SetUp("sink0", false); err != nil {
			p.t.Fatal(err)
		}
		labtest.Eventually(p.t, "the carrier is gone", func() bool { return !labtest.Running(p.relay, "out0") })
	}, "interface out0", "link", Fault, "out0 has no carrier", "ethtool out0"},
	{"an interface is absent", func(p *patient) { p.rule("239.1.1.1:5000%eth9") },
		"interface eth9", "link", Fault, "interface eth9 not found", "ip link"},
	{"another XDP program", func(p *patient) {
		p.status.Interfaces[0] = control.InterfaceStatus{Name: "in0"}
		program := passing(p.t, ebpf.XDP)
		var lk link.Link
		labtest.Do(p.t, p.relay, func() (err error) {
			lk, err = link.AttachXDP(link.XDPOptions{Program: program, Interface: labtest.Index(p.t, p.relay, "in0")})
			return err
		})
		p.t.Cleanup(func() { lk.Close() })
	}, "interface in0", "program", Fault, "another XDP program", "xdpdrv off"},
	{"the relay program is missing", func(p *patient) { p.status.Interfaces[0].ProgramID = 0 },
		"interface in0", "program", Fault, "the relay program is not on in0", "xdpcast status"},
	{"a device without native XDP", func(p *patient) {
		addLink(p.t, p.relay, &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}})
		p.rule("239.1.1.1:5000%br0")
	}, "interface br0", "native", Warning, "has no native XDP", "native XDP"},
	{"generic mode", func(p *patient) {
		p.status.Interfaces[0].Mode, p.status.Interfaces[0].Note = "generic", "native: too few queues"
	}, "interface in0", "native", Warning, "generic mode on in0, which is slower and cannot copy: native: too few queues", "ethtool -L in0 rx"},
	{"a veth whose peer has no GRO", func(p *patient) {
		labtest.Do(p.t, p.other, func() error { return lab.SetGRO("sink0", false) })
	}, "interface out0", "transmit", Warning, "does not send redirected frames", "gro on"},
	{"datagrams are merged", func(p *patient) {
		labtest.Do(p.t, p.relay, func() error { return lab.SetFeature("in0", "rx-udp-gro-forwarding", true) })
		p.stats.Rules[0].UsedPath = "fanout"
	}, "interface in0", "gro", Warning, "rx-udp-gro-forwarding is on", "ethtool -K in0 rx-udp-gro-forwarding off"},
	{"the device takes VLAN tags off", func(p *patient) {
		labtest.Do(p.t, p.relay, func() error { return lab.SetFeature("in0", network.TagFeatures()[0], true) })
		p.rule("239.1.1.1:5000%in0,vlan=100")
	}, "interface in0", "vlan", Fault, "strips VLAN tags", "ethtool -K in0 rxvlan off"},
	{"a group that nobody joins", func(p *patient) { p.rule("239.1.0.0/16%in0,join=none") },
		"interface in0", "filter", Warning, "239.1.0.0/16%in0", "allmulticast on"},
	{"a bridge that snoops without querier", func(p *patient) {
		snooping := true
		bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}, MulticastSnooping: &snooping}
		addLink(p.t, p.relay, bridge)
		if err := p.relay.Netlink().LinkSetMaster(labtest.Link(p.t, p.relay, "in0"), bridge); err != nil {
			p.t.Fatal(err)
		}
	}, "interface in0", "querier", Warning, "bridge br0 snoops without a querier", "ip link set dev br0 type bridge mcast_querier 1"},
	{"no querier", func(p *patient) { p.status.Interfaces[0].IGMP.Querier = "" },
		"interface in0", "querier", Warning, "no IGMP querier was heard on in0", "querier"},
	{"an IGMP version is forced", func(p *patient) { labtest.Sysctl(p.t, p.relay, "net/ipv4/conf/in0/force_igmp_version", "2") },
		"interface in0", "igmp", Fault, "IGMPv2 is forced on in0", "sysctl -w net.ipv4.conf.in0.force_igmp_version=0"},
	{"an IGMP version is forced everywhere", func(p *patient) {
		labtest.Sysctl(p.t, p.relay, "net/ipv4/conf/all/force_igmp_version", "1")
	}, "interface in0", "igmp", Fault, "IGMPv1 is forced on in0", "sysctl -w net.ipv4.conf.all.force_igmp_version=0"},
	{"an MLD version is forced", func(p *patient) { labtest.Sysctl(p.t, p.relay, "net/ipv6/conf/in0/force_mld_version", "1") },
		"interface in0", "igmp", Fault, "MLDv1 is forced on in0", "sysctl -w net.ipv6.conf.in0.force_mld_version=0"},
	{"an output with a smaller MTU", func(p *patient) {
		if err := p.relay.Netlink().LinkSetMTU(labtest.Link(p.t, p.relay, "out0"), 1400); err != nil {
			p.t.Fatal(err)
		}
	}, "interface in0", "mtu", Warning, "takes in packets of 1500 bytes, and out0 sends 1400", "ip link set dev out0 mtu 1500"},
	{"a filter of traffic control", func(p *patient) {
		l := labtest.Link(p.t, p.relay, "in0")
		qdisc := &netlink.GenericQdisc{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}, QdiscType: "clsact"}
		program := passing(p.t, ebpf.SchedCLS)
		filter := &netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{LinkIndex: l.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Priority: 1, Protocol: unix.ETH_P_ALL},
			Fd:          program.FD(), Name: "foreign", DirectAction: true,
		}
		if err := errors.Join(p.relay.Netlink().QdiscAdd(qdisc), p.relay.Netlink().FilterAdd(filter)); err != nil {
			p.t.Fatal(err)
		}
	}, "interface in0", "programs", Warning, "ingress of in0 has bpf program foreign", "tc filter show dev in0 ingress"},
	{"a macvlan device on an output", func(p *patient) {
		addLink(p.t, p.relay, &netlink.Macvlan{LinkAttrs: netlink.LinkAttrs{Name: "mv0", ParentIndex: labtest.Index(p.t, p.relay, "out0")}, Mode: netlink.MACVLAN_MODE_BRIDGE})
	}, "interface out0", "macvlan", Warning, "do not reach the devices on it: mv0", "type macvlan"},
	{"a firewall drops queries", func(p *patient) {
		nft(p.t, p.relay, "add table inet f; add chain inet f in { type filter hook input priority 0; }; add rule inet f in ip protocol igmp drop")
	},
		"host", "firewall", Fault, "drops IGMP queries coming in by in0", "nft insert rule inet f in ip protocol igmp accept"},
	{"a firewall's policy drops reports", func(p *patient) {
		nft(p.t, p.relay, "add table ip f; add chain ip f out { type filter hook output priority 0; policy drop; }; add rule ip f out ip protocol tcp accept")
	},
		"host", "firewall", Fault, "the policy of chain out of table ip f drops IGMP reports leaving by in0", "nft insert rule ip f out ip protocol igmp accept"},
	{"a firewall drops a group", func(p *patient) {
		nft(p.t, p.relay, "add table ip f; add chain ip f pre { type filter hook prerouting priority -300; }; add rule ip f pre ip daddr 239.0.0.0/8 udp dport 4000-6000 drop")
	},
		"host", "firewall", Warning, "drops UDP to 239.1.1.1:5000 on in0", "nft -a list chain ip f pre"},
	{"no BPF file system", func(p *patient) { p.status.PinDir = p.t.(*testing.T).TempDir() },
		"host", "bpffs", Fault, "no BPF file system", "mount -t bpf"},
	{"state of another release", func(p *patient) {
		p.opts.Stats = func(context.Context) (control.Stats, error) {
			return control.Stats{}, fmt.Errorf("state: %w", loader.ErrSchema)
		}
	}, "host", "pinned", Fault, "", "start xdpcast, which migrates or replaces it"},
	{"no daemon", func(p *patient) { p.status = nil },
		"host", "daemon", Fault, "no daemon runs", "systemctl start xdpcast"},
	{"the daemon is in another namespace", func(p *patient) { p.status.PID = processIn(p.t, p.other) },
		"host", "namespace", Fault, "is in another network namespace", "nsenter -t "},
	{"rules failed", func(p *patient) { p.status.Failed = 2 },
		"host", "daemon", Fault, "2 rules failed", "xdpcast rule list"},
	{"a group is not joined", func(p *patient) {
		p.groups[0].State, p.groups[0].Cause = control.GroupRetrying, "socket: too many open files"
	},
		"host", "memberships", Fault, "1 group is not joined: socket: too many open files", "LimitNOFILE"},
	{"capabilities are missing", func(p *patient) { p.process("setpriv", "--bounding-set=-all", "--inh-caps=-all") },
		"host", "capabilities", Fault, "CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN", "AmbientCapabilities"},
	{"a capability of two paths is missing", func(p *patient) { p.process("setpriv", "--bounding-set=-net_raw", "--inh-caps=-all") },
		"host", "capabilities", Warning, "lacks CAP_NET_RAW: the paths afxdp and fanout do not work", "AmbientCapabilities=CAP_NET_RAW"},
	{"file descriptors have run out", func(p *patient) { p.limit(unix.RLIMIT_NOFILE, p.files()) },
		"host", "descriptors", Fault, "file descriptors open; 20 groups take one: joins fail", "LimitNOFILE="},
	{"file descriptors run out", func(p *patient) {
		p.process("sh", "-c", `for n in 3 4 5 6 7 8 9; do eval "exec $n</dev/null"; done; exec "$@"`, "sh")
		p.limit(unix.RLIMIT_NOFILE, p.files()+1)
	}, "host", "descriptors", Warning, "file descriptors open; 20 groups take one", "LimitNOFILE="},
	{"memory may not be locked", func(p *patient) {
		p.process("setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-all")
		p.limit(unix.RLIMIT_MEMLOCK, 64<<10)
	}, "host", "memlock", Warning, "may lock 64 kB", "LimitMEMLOCK"},
	{"a time namespace", func(p *patient) { p.process("unshare", "--time", "--monotonic=3600") },
		"host", "clock", Warning, "is off by 1h0m0s", "nsenter -t 1 -T"},
	{"a BPF file system of a mount namespace", func(p *patient) {
		dir := p.t.(*testing.T).TempDir()
		p.status.PinDir = filepath.Join(dir, "xdpcast")
		p.before = func() error {
			return errors.Join(unix.Unshare(unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
				unix.Mount("bpf", dir, "bpf", 0, "mode=700"), os.Mkdir(p.status.PinDir, 0o700))
		}
	}, "host", "bpffs", Warning, "is mounted in this mount namespace alone", "nsenter --net="},
	{"a querier of another version", func(p *patient) {
		labtest.NewTap(p.t, p.other, "src0").Send(labtest.IGMP2Query("10.1.0.2"))
		labtest.Eventually(p.t, "the kernel speaks it", func() bool {
			versions := map[int]int{}
			labtest.Do(p.t, p.relay, func() (err error) { versions, err = membership.IGMPVersions(); return err })
			return versions[labtest.Index(p.t, p.relay, "in0")] == 2
		})
	}, "interface in0", "igmp", Warning, "the querier on in0 speaks IGMPv2", "IGMPv3"},
	{"an IGMP version is forced, and no source named", func(p *patient) {
		labtest.Sysctl(p.t, p.relay, "net/ipv4/conf/in0/force_igmp_version", "2")
		p.rule("239.1.1.1:5000%in0")
	}, "interface in0", "igmp", Warning, "IGMPv2 is forced on in0: no source can be named", "sysctl -w net.ipv4.conf.in0.force_igmp_version=0"},
	{"a device gives up packets", func(p *patient) { p.between = p.tooLong },
		"interface out0", "lost", Fault, "tx_dropped +1", "ethtool -S out0"},
	{"a device has given up packets", func(p *patient) { p.tooLong() },
		"interface out0", "lost", Warning, "tx_dropped 1", "ethtool -S out0"},
	{"an output that sends no redirected frames", func(p *patient) {
		addLink(p.t, p.relay, &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}})
		p.stats.Rules[0].Outputs[0].Interface = "br0"
	}, "interface br0", "transmit", Warning, "the driver of br0 (bridge) does not send redirected frames", "path: auto"},
	{"a program at the egress", func(p *patient) {
		labtest.NeedsKernel(p.t, labtest.TCX(p.t), "programs of traffic control by links", "6.6")
		program := passing(p.t, ebpf.SchedCLS)
		var lk link.Link
		labtest.Do(p.t, p.relay, func() (err error) {
			lk, err = link.AttachTCX(link.TCXOptions{Program: program, Attach: ebpf.AttachTCXEgress, Interface: labtest.Index(p.t, p.relay, "out0")})
			return err
		})
		p.t.Cleanup(func() { lk.Close() })
	}, "interface out0", "programs", Warning, "egress of out0 has tcx program foreign", "bpftool net"},
	{"retpolines", func(p *patient) {
		p.file("sys/devices/system/cpu/vulnerabilities/spectre_v2", "Mitigation: Retpolines; PBRSB-eIBRS: Not affected\n")
	}, "host", "mitigations", Warning, "spectre_v2: Mitigation: Retpolines", "mitigations=off"},
	{"CPUs have dropped packets", func(p *patient) {
		p.file("proc/net/softnet_stat", "000003e8 0000000a 00000001 00000000\n000003e8 00000001 00000000 00000000\n")
	},
		"host", "softnet", Warning, "CPUs have dropped 11 packets", "sysctl -w net.core.netdev_max_backlog="},
	{"a file cannot be read", func(p *patient) { p.file("proc/net/softnet_stat", "nonsense\n") },
		"host", "facts", Warning, "drops of CPUs", ""},
}

// TestFaults: each fault is reported with its cure, and only when present.
func TestFaults(t *testing.T) {
	healthy := newPatient(t).examine()
	for _, c := range faults {
		t.Run(c.name, func(t *testing.T) {
			if f := healthy.worst(c.section, c.check); f.Level == c.level && c.check != "mitigations" && c.check != "softnet" {
				t.Fatalf("it is found without the fault: %+v", f)
			}
			p := newPatient(t)
			c.make(p)
			r := p.examine()
			f := r.worst(c.section, c.check)
			if f.Level != c.level || !strings.Contains(f.Text, c.text) || !strings.Contains(f.Cure, c.cure) || f.Cure == "" {
				report, _ := json.MarshalIndent(r, "", " ")
				t.Errorf("got %+v, want %v %q, cure %q; the report:\n%s", f, c.level, c.text, c.cure, report)
			}
			if total := r.Faults + r.Warnings; total == 0 || c.level == Fault && r.Faults == 0 {
				t.Errorf("%d faults, %d warnings", r.Faults, r.Warnings)
			}
		})
	}
}

// TestKernelCheck: the check kernel reports what this kernel lacks, by its release: Linux 6.1 lacks
// what came with 6.6.
func TestKernelCheck(t *testing.T) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		t.Fatal(err)
	}
	release := unix.ByteSliceToString(name.Release[:])
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		t.Fatalf("%s: %v", release, err)
	}
	var found []string
	r := newPatient(t).examine()
	for _, f := range r.Sections[0].Findings {
		if f.Check == "kernel" && f.Level != OK {
			found = append(found, f.Text)
		}
	}
	want := 0
	if major < 6 || major == 6 && minor < 6 {
		want = 2
	}
	all := strings.Join(found, "\n")
	if len(found) != want || want > 0 && (!strings.Contains(all, "reason multi_buffer") || !strings.Contains(all, "host's stack") || !strings.Contains(all, "Linux "+release)) {
		t.Errorf("on Linux %s: %q", release, found)
	}
}
