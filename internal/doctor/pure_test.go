package doctor

import (
	"errors"
	"math"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/labtest"
	"xdpcast/internal/network"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/rules"
)

func healthyInterface() *Interface {
	return &Interface{
		Name: "eth0", Input: true, Output: true, CPUs: 8, Apart: 2 * time.Second, Program: 7, Mode: "native", Wanted: true,
		Link: &network.Link{
			LinkID: network.LinkID{Index: 2, Generation: 1}, Name: "eth0", Hardware: true, Ethernet: true, MTU: 1500, Up: true, Carrier: true, Queues: 8,
			Features: network.Features{Known: true, Native: true, Transmit: true, TransmitSG: true}, XDP: []network.XDP{{Program: 7}},
		},
	}
}

func healthyHost() *Host {
	return &Host{
		Release: "6.12.0", Has: loader.Capabilities{MultiBuffer: true, SocketMultiBuffer: true, TCX: true}, CPUs: 8, Apart: 2 * time.Second, Mounted: true,
		Process: Process{PID: 42, Capabilities: math.MaxUint64, Files: 20, Limit: 1024, MemLock: math.MaxUint64}, Backlog: 1000, Budget: 300,
		Daemon: &control.Status{Ready: true, Active: 1},
	}
}

// hardwareFaults are faults that no namespace can have, made from facts.
var hardwareFaults = []struct {
	check      string
	make       func(h *Host, i *Interface)
	level      Level
	text, cure string
}{
	{"kernel", func(h *Host, _ *Interface) {
		h.Lacks = errors.New("the kernel is too old (5.10), which lacks the moon")
	}, Fault, "lacks the moon", "Linux 6.1"},
	{"kernel", func(h *Host, _ *Interface) { h.Has.TCX = false }, Warning, "host's stack", "Linux 6.6"},
	{"daemon", func(h *Host, _ *Interface) { h.Daemon.Ready = false }, Warning, "not brought its rules in", "journalctl"},
	{"daemon", func(h *Host, _ *Interface) { h.Daemon.Pending = 1 }, Warning, "1 rule is pending", "rule list"},
	{"daemon", func(h *Host, _ *Interface) {
		h.Daemon.Pending = 2
		h.Daemon.Mroutes = &control.MrouteStatus{Entries: 3, Accelerated: 2, Left: []control.MroutesLeft{{Reason: "no outputs", Entries: 1, First: "mroute/a/b", Expected: true}}}
	}, Warning, "1 rule is pending", "rule list"},
	{"routes", func(h *Host, _ *Interface) {
		h.Daemon.Pending = 1
		h.Daemon.Mroutes = &control.MrouteStatus{Entries: 3, Accelerated: 2, Left: []control.MroutesLeft{{Reason: "interface tun0 has no Ethernet header", Entries: 1, First: "mroute/a/b"}}}
	}, Warning, "1 of 3 multicast routes are left to the kernel, the first mroute/a/b: interface tun0", "rule show mroute/a/b"},
	{"daemon", func(h *Host, _ *Interface) { h.Daemon.Warnings = []string{"clouds"} }, Warning, "clouds", "status"},
	{"daemon", func(h *Host, _ *Interface) {
		h.Daemon.Workers = []control.Worker{{Interface: "eth0", Path: "afxdp", Queue: 3, State: control.WorkerMissing, Cause: "no memory"}}
	}, Warning, "worker 3 of the path afxdp on eth0 is missing: no memory", "status"},
	{"softnet", func(h *Host, _ *Interface) { h.Softnet = [2]Softnet{{Dropped: 3}, {Dropped: 10}} }, Fault, "dropped 7 packets in 2s", "netdev_max_backlog=4000"},
	{"softnet", func(h *Host, _ *Interface) { h.Softnet = [2]Softnet{{Squeezed: 3}, {Squeezed: 10}} }, Warning, "7 rounds", "netdev_budget=600"},
	{"program", func(_ *Host, i *Interface) {
		i.Link.XDP = append(i.Link.XDP, network.XDP{Program: 9, Generic: true})
	}, Warning, "another XDP program, id 9", "xdpgeneric off"},
	{"native", func(_ *Host, i *Interface) {
		i.Mode = "generic"
		i.Device[1].Features = map[string]bool{"rx-lro": true}
	}, Warning, "generic mode", "lro off"},
	{"native", func(_ *Host, i *Interface) { i.Mode, i.Link.MTU = "generic", 9000 }, Warning, "generic mode", "mtu 1500"},
	{"transmit", func(_ *Host, i *Interface) { i.Link.Features.Transmit = false }, Warning, "does not send redirected frames", "path: auto"},
	{"queues", func(_ *Host, i *Interface) { i.Link.Queues = 1 }, Warning, "one queue", "ethtool -L eth0 combined 8"},
	{"ring", func(_ *Host, i *Interface) {
		i.Device[0] = network.Device{RxRing: 512, RxRingMax: 4096, Counters: network.Counters{RxMissed: 5}}
		i.Device[1] = network.Device{RxRing: 512, RxRingMax: 4096, Counters: network.Counters{RxMissed: 9}}
	}, Fault, "512 of 4096 descriptors, and 4 packets", "ethtool -G eth0 rx 4096"},
	{"ring", func(_ *Host, i *Interface) {
		for turn := range i.Device {
			i.Device[turn] = network.Device{RxRing: 512, RxRingMax: 4096, Counters: network.Counters{RxFifo: 9}}
		}
	}, Warning, "9 packets have found no room", "ethtool -G eth0 rx 4096"},
	{"lost", func(_ *Host, i *Interface) {
		i.Device[0].Statistics = map[string]uint64{"rx_out_of_buffer": 1, "rx_queue_0_xdp_drops": 5}
		i.Device[1].Statistics = map[string]uint64{"rx_out_of_buffer": 4, "rx_queue_0_xdp_drops": 9}
	}, Fault, "in 2s, rx_out_of_buffer +3", "ethtool -S eth0"},
	{"lost", func(_ *Host, i *Interface) {
		i.Device[0].Counters.RxErrors, i.Device[1].Counters.RxErrors = 6, 6
	}, Warning, "rx_errors 6", "ethtool -S eth0"},
	{"interrupts", func(_ *Host, i *Interface) { i.Interrupts = []string{"0", "0", "0"} }, Warning, "all 3 interrupts of eth0 go to CPU 0", "irqbalance"},
	{"lro", func(_ *Host, i *Interface) { i.Device[1].Features = map[string]bool{"rx-lro": true} }, Fault, "large receive offload", "ethtool -K eth0 lro off"},
	{"vlan", func(_ *Host, i *Interface) {
		i.Device[1].Features = map[string]bool{"rx-vlan-filter": true}
		i.Inputs = inputs("239.1.1.1:5000%eth0,vlan=7")
	}, Warning, "rx-vlan-filter", "rx-vlan-filter off"},
	{"mtu", func(_ *Host, i *Interface) { i.TooLong = [2]uint64{3, 8} }, Fault, "5 copies in 2s were too long for eth0", "ip link set dev eth0 mtu"},
	{"mtu", func(_ *Host, i *Interface) { i.TooLong = [2]uint64{8, 8} }, Warning, "8 copies have been too long", "ip link set dev eth0 mtu"},
	{"checksums", func(_ *Host, i *Interface) { i.Unfinished = [2]uint64{1, 3} }, Warning, "2 packets in 2s came to eth0 with unfinished checksums", "tx off"},
}

func inputs(texts ...string) (all []Input) {
	for _, text := range texts {
		in, accept, err := rules.ParseInput(text)
		if err != nil {
			panic(err)
		}
		all = append(all, Input{in, accept.Join == rules.JoinNone})
	}
	return all
}

func TestHardwareFaults(t *testing.T) {
	r := Diagnose(&Facts{Host: *healthyHost(), Interfaces: []Interface{*healthyInterface()}})
	if r.Faults+r.Warnings != 0 {
		t.Fatalf("of a healthy host: %+v", r)
	}
	for _, c := range hardwareFaults {
		t.Run(c.check+" "+c.text, func(t *testing.T) {
			h, i := healthyHost(), healthyInterface()
			c.make(h, i)
			r := Diagnose(&Facts{Host: *h, Interfaces: []Interface{*i}})
			f := r.worst("host", c.check)
			if f.Check == "" {
				f = r.worst("interface eth0", c.check)
			}
			if f.Level != c.level || !strings.Contains(f.Text, c.text) || !strings.Contains(f.Cure, c.cure) {
				t.Errorf("got %+v, want %v %q, cure %q", f, c.level, c.text, c.cure)
			}
			if c.check == "lost" && strings.Contains(f.Text, "xdp_drops") {
				t.Errorf("what programs drop on purpose is taken for a loss: %s", f.Text)
			}
		})
	}
}

// madeUp are the checks whose faults no test of this package makes for real, and why.
var madeUp = map[string]string{
	"kernel":      "TestKernelCheck holds it against the kernel that runs, and test/kernels.txt has it run on Linux 6.1",
	"mitigations": "the kernel decides on them when it starts",
	"routes":      "TestMrouteConfig of test/e2e has real routes",
	"checksums":   "TestDoctorCounters of test/e2e has a sender that leaves them unfinished",
	"softnet":     "it counts on CPUs of the whole machine, which other tests use",
	"facts":       "what is not to be read is only there on a damaged system",
	"queues":      "a network card's",
	"ring":        "a network card's",
	"interrupts":  "a network card's",
	"lro":         "a network card's: no virtual device has it",
}

// TestEveryCheckHasAFault: every check finds a fault in some test, a real one if a test can make
// it. What the daemon reports to the checks is real in test/e2e (TestDoctor, TestDoctorCounters,
// TestDoctorAndDaemon).
func TestEveryCheckHasAFault(t *testing.T) {
	isMade, isMadeUp := map[string]bool{}, map[string]bool{}
	for _, f := range faults {
		isMade[f.check] = true
	}
	for _, f := range hardwareFaults {
		isMadeUp[f.check] = true
	}
	var all []string
	for _, c := range hostChecks {
		all = append(all, c.name)
	}
	for _, c := range interfaceChecks {
		all = append(all, c.name)
	}
	for _, name := range all {
		if madeUp[name] == "" && !isMade[name] {
			t.Errorf("no test makes the fault of check %s", name)
		}
		if madeUp[name] != "" && !isMade[name] && !isMadeUp[name] {
			t.Errorf("no test makes up the fault of check %s", name)
		}
	}
	for name := range madeUp {
		if !slices.Contains(all, name) {
			t.Errorf("there is no check %s", name)
		}
	}
}

// TestCures: every drop reason has a cure.
func TestCures(t *testing.T) {
	for reason := loader.Reason(0); !strings.HasPrefix(reason.String(), "reason_"); reason++ {
		if cures[reason.String()] == "" {
			t.Errorf("drop reason %s has no cure", reason)
		}
	}
}

// TestFirewall: rulesets as nft prints them, and their effects on IGMP, MLD and groups.
func TestFirewall(t *testing.T) {
	program, err := exec.LookPath("nft")
	if err != nil {
		labtest.Lacking(t, "nft is not installed: scripts/setup --test installs it")
	}
	const inBase = "add table inet f; add chain inet f in { type filter hook input priority 0; policy drop; }; "
	for _, c := range []struct {
		name, script string
		want         []string // of each finding, in order: level and a part of its text
	}{
		{"empty", "", nil},
		{"policy accept", "add table inet f; add chain inet f in { type filter hook input priority 0; policy accept; }", nil},
		{"policy drop", inBase, []string{"fault the policy of chain in of table inet f drops IGMP queries", "fault the policy of chain in of table inet f drops MLD queries"}},
		{"accepted by protocol", inBase + "add rule inet f in meta l4proto { igmp, icmpv6 } accept", nil},
		{"accepted by type", inBase + "add rule inet f in igmp type membership-query accept; add rule inet f in icmpv6 type mld-listener-query accept", nil},
		{"accepted by interface", inBase + "add rule inet f in iifname \"in*\" accept", nil},
		{"accepted on another interface", inBase + "add rule inet f in iifname eth7 meta l4proto { 2, 58 } accept", []string{"fault the policy", "fault the policy"}},
		{"perhaps accepted", inBase + "add rule inet f in ip saddr 10.1.0.254 ip protocol igmp accept; add rule inet f in meta l4proto icmpv6 accept", []string{"warning the policy of chain in of table inet f may drop IGMP queries"}},
		{"established alone", inBase + "add rule inet f in ct state established,related accept; add rule inet f in meta pkttype multicast accept", nil},
		{"a chain apart", inBase + "add chain inet f more; add rule inet f more ip protocol igmp drop; add rule inet f in meta nfproto ipv6 accept; add rule inet f in jump more; add rule inet f in accept",
			[]string{"fault rule"}},
		{"a chain that returns", inBase + "add chain inet f more; add rule inet f more ip protocol igmp return; add rule inet f more drop; add rule inet f in meta nfproto ipv6 accept; add rule inet f in jump more; add rule inet f in accept",
			[]string{"warning rule 4 of chain in of table inet f drops UDP to 239.1.1.1:5000 on in0: the relay takes them before"}},
		{"a set", "add table ip f; add set ip f groups { type ipv4_addr; flags interval; elements = { 224.0.0.0/24 } }; add chain ip f out { type filter hook output priority 0; }; add rule ip f out ip daddr @groups drop",
			[]string{"fault rule 3 of chain out of table ip f drops IGMP reports leaving by in0"}},
		{"a rate", "add table ip f; add chain ip f in { type filter hook input priority 0; }; add rule ip f in ip protocol igmp limit rate over 10/second drop", []string{"fault rule"}},
		{"something else", "add table ip f; add chain ip f in { type filter hook input priority 0; }; add rule ip f in ip saddr 192.0.2.1 drop; add rule ip f in tcp dport 22 drop; add rule ip f in ip protocol != igmp drop",
			[]string{"warning rule"}},
		{"a group in a range", "add table ip f; add chain ip f in { type filter hook input priority 0; }; add rule ip f in ip daddr 239.1.0.0-239.1.255.255 udp dport { 5000, 6000 } drop",
			[]string{"warning rule 3 of chain in of table ip f drops UDP to 239.1.1.1:5000 on in0"}},
		{"another port", "add table ip f; add chain ip f in { type filter hook input priority 0; }; add rule ip f in ip daddr 239.1.1.1 udp dport 5001 drop", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			host := labtest.Host(t, "fw")
			nft(t, host, c.script)
			cmd := exec.CommandContext(t.Context(), program, "-j", "list", "ruleset")
			var out strings.Builder
			cmd.Stdout = &out
			labtest.Do(t, host, cmd.Start)
			if err := cmd.Wait(); err != nil {
				t.Fatal(err)
			}
			ruleset, err := ParseRuleset([]byte(out.String()))
			if err != nil {
				t.Fatal(err)
			}
			h := Host{Firewall: Firewall{Ruleset: ruleset, Inputs: []string{"in0"}, Groups: map[string][]netip.AddrPort{"in0": {netip.MustParseAddrPort("239.1.1.1:5000")}}}}
			got := firewall(&h)
			if len(got) != len(c.want) {
				t.Fatalf("got %+v, want %q\n%s", got, c.want, out.String())
			}
			for i, f := range got {
				if text := f.Level.String() + " " + f.Text; !strings.HasPrefix(text, c.want[i]) {
					t.Errorf("got %q, want %q", text, c.want[i])
				}
			}
		})
	}
}

func drops(reason string, packets uint64) []control.Drop {
	return []control.Drop{{Reason: reason, Counter: control.Counter{Packets: packets}}}
}

// The interfaces of a daemon in another namespace are not those that the doctor sees, which are nothing to it even if
// they have the same names.
func TestElsewhere(t *testing.T) {
	h, i := healthyHost(), healthyInterface()
	h.Process.PID, h.Process.Elsewhere = 4711, true
	absent := &Interface{Name: "in0"}
	rule := &Rule{Name: "cam1", Inputs: []*Interface{absent}, Outputs: []*Interface{absent}}
	for turn := range rule.Status {
		rule.Status[turn] = control.RuleStatus{Rule: control.Rule{Name: "cam1", In: "239.1.1.1:5000%in0"}, State: control.StateActive}
	}
	r := Diagnose(&Facts{Host: *h, Interfaces: []Interface{*i, *absent}, Rule: rule})
	for _, s := range r.Sections {
		if s.Kind == "interface" {
			t.Errorf("%s is checked", s.Title())
		}
		for _, f := range s.Findings {
			if strings.Contains(f.Text, "not found") {
				t.Errorf("%s: %s", s.Title(), f.Text)
			}
		}
		if strings.Contains(s.Verdict, "not found") {
			t.Errorf("%s: %s", s.Title(), s.Verdict)
		}
	}
	for _, of := range []string{"rule cam1", "host"} {
		if f := r.worst(of, "namespace"); f.Level != Fault || f.Cure != "nsenter -t 4711 -n xdpcast doctor" {
			t.Errorf("%s: %+v", of, f)
		}
	}
}

// TestFollow: the verdict says where the packets of a rule end.
func TestFollow(t *testing.T) {
	const in, out = "239.1.1.1:5000%eth0", "239.2.2.2:6000%eth1"
	healthy := func() *Facts {
		i, o := healthyInterface(), healthyInterface()
		o.Name, o.Input, o.Link.Name = "eth1", false, "eth1"
		i.Device[1].Counters.RxPackets, o.Device[1].Counters.TxPackets = 120, 100
		r := &Rule{
			Name: "cam1", Apart: 2 * time.Second, Inputs: []*Interface{i}, Outputs: []*Interface{o},
			Groups: []control.Group{{Interface: "eth0", Group: "239.1.1.1", State: control.GroupJoined, Multicast: control.Multicast{Version: "IGMPv3", Querier: "10.0.0.1"}}},
		}
		for turn := range r.Status {
			r.Status[turn] = control.RuleStatus{
				Rule: control.Rule{Name: "cam1", In: in, Out: []string{out}}, State: control.StateActive, UsedPath: "kernel", Matched: control.Counter{Packets: uint64(100 * turn)},
				Outputs: []control.OutputStatus{{Output: out, Interface: "eth1", State: control.StateActive, Sent: control.Counter{Packets: uint64(100 * turn)}}},
			}
		}
		return &Facts{Host: *healthyHost(), Rule: r}
	}
	silent := func(r *Rule) {
		r.Status[1].Matched.Packets, r.Status[1].Outputs[0].Sent.Packets = 0, 0
		r.Outputs[0].Device[1].Counters.TxPackets = 0
	}
	twoInputs := func(r *Rule) {
		for turn := range r.Status {
			r.Status[turn].In, r.Status[turn].Merge = in+" 239.1.2.1:5000%eth3", "rtp"
		}
	}
	for _, c := range []struct {
		name             string
		make             func(r *Rule)
		check            string // with the fault or warning
		level            Level
		text, cure, ends string
	}{
		{"all is well", func(*Rule) {}, "matched", OK, "100 packets matched", "", "100 packets in 2s went the whole way, from eth0 to the wire"},
		{"the input is down", func(r *Rule) { silent(r); r.Inputs[0].Link.Up = false }, "input", Fault, "eth0 is down", "ip link set dev eth0 up", "packets end before the host: interface eth0 is down"},
		{"no input matches", func(r *Rule) { silent(r); r.Inputs = nil }, "input", Fault, "no interface matches", "ip link", "packets end before the host"},
		{"nothing comes", silent, "matched", Fault, "none has since the rule came", "TTL", "packets end before the host: nothing that the rule takes"},
		{"another port comes", func(r *Rule) { silent(r); r.Seen = []Seen{{"eth0", "10.0.0.5@239.1.1.1:5001%eth0", 7}} },
			"matched", Fault, "What comes in instead: 10.0.0.5@239.1.1.1:5001%eth0 (7 packets)", "--in 10.0.0.5@239.1.1.1:5001%eth0", "packets end at the flow table"},
		{"the group is not joined", func(r *Rule) {
			silent(r)
			r.Groups[0].State, r.Groups[0].Cause = control.GroupFailed, "no buffer space"
		},
			"membership", Fault, "239.1.1.1 is not joined on eth0: no buffer space", "group show 239.1.1.1", "packets end before the host"},
		{"the TTL is too small", func(r *Rule) {
			r.Status[1].Outputs[0].Sent.Packets, r.Status[1].Outputs[0].Drops = 0, drops("ttl", 100)
		}, "output 0", Fault, "100 copies for 239.2.2.2:6000%eth1 were dropped, reason ttl", "raise the sender's TTL", "packets end at the outputs: reason ttl"},
		{"dropped before", func(r *Rule) { r.Status[1].Outputs[0].Sent.Packets, r.Status[1].Drops = 0, drops("loop", 100) },
			"dropped", Fault, "100 packets were dropped before they were copied, reason loop", "sends the relay's packets back", "packets end in the relay, before any copy: reason loop"},
		{"some are policed", func(r *Rule) { r.Status[1].Drops = drops("policed", 10) },
			"dropped", Fault, "10 packets", "rate=", "went the whole way"},
		{"packets come again", func(r *Rule) { r.Status[1].Notes = drops("echo", 40) },
			"noted", Warning, "40 packets came again from another sender, reason echo", "loop=two-way on the input", "went the whole way"},
		{"the output waits", func(r *Rule) {
			o := &r.Status[1].Outputs[0]
			o.State, o.Reason, o.Sent.Packets, o.Drops = control.StatePending, "eth1 has no address", 0, drops("not_ready", 100)
		}, "output 0", Fault, "pending: eth1 has no address", "rule show cam1", "packets end at the outputs: reason not_ready"},
		{"lost before workers", func(r *Rule) {
			r.Status[1].UsedPath = "afxdp"
			r.Lost[1] = []control.ReceiveDrop{{Interface: "eth0", Path: "afxdp", Loss: control.Loss{Reason: "ring_full", Packets: 9}}}
		}, "workers", Fault, "9 packets of the path afxdp were lost on eth0", "RING FULL", "went the whole way"},
		{"the device takes none", func(r *Rule) {
			r.Unsent[1] = []control.TransmitDrop{{Interface: "eth1", Reason: "driver", Packets: 100}}
		}, "wire", Fault, "eth1 did not take 100 frames", "ethtool -g eth1", "packets end at the device eth1"},
		{"the rule is not in force", func(r *Rule) {
			silent(r)
			r.Status[1].State, r.Status[1].Reason, r.Status[1].UsedPath = control.StateFailed, "no route", ""
		}, "state", Fault, "failed: no route", "rule show cam1", "packets end at the rule, which is not active: no route"},
		{"two inputs", func(r *Rule) {
			twoInputs(r)
			r.Status[1].Drops, r.Status[1].Outputs[0].Sent.Packets = drops("duplicate", 40), 60
		}, "membership", OK, "239.1.1.1 is joined", "", "60 packets in 2s went the whole way, from eth0 and eth3 to the wire; 40 more had come by another input before"},
		{"two inputs, silent", func(r *Rule) { twoInputs(r); silent(r) },
			"matched", Fault, "none has since the rule came", "send to 239.1.1.1 and 239.1.2.1, and its TTL be large enough; xdpcast discover -i eth0 -i eth3 lists", "nothing that the rule takes came in on eth0 and eth3"},
		{"two inputs, one not joined", func(r *Rule) { twoInputs(r); r.Groups[0].State = control.GroupRetrying },
			"membership", Fault, "239.1.1.1 is not joined on eth0", "group show 239.1.1.1", "went the whole way"},
		{"the rule waits for its input", func(r *Rule) {
			silent(r)
			r.Status[1].State, r.Status[1].Reason, r.Status[1].UsedPath, r.Status[1].Outputs[0].State = control.StatePending, "interface eth0 not found", "", control.StatePending
		}, "output 0", Fault, "is pending: interface eth0 not found", "rule show cam1", "packets end at the rule"},
		{"some copies are too long", func(r *Rule) {
			r.Status[1].Outputs[0].Sent.Packets, r.Status[1].Outputs[0].Drops = 90, drops("mtu", 10)
		}, "output 0", Fault, "10 copies", "mtu", "to the wire; not on every output: see the faults"},
		{"it loops", func(r *Rule) { r.Status[1].State, r.Status[1].Reason = control.StateLooping, "by out0" }, "state", Fault, "by out0", "explain cam1", "went the whole way"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := healthy()
			c.make(f.Rule)
			r := Diagnose(f)
			got := r.worst("rule cam1", c.check)
			if got.Level != c.level || !strings.Contains(got.Text, c.text) || !strings.Contains(got.Cure, c.cure) {
				t.Errorf("got %+v, want %v %q, cure %q", got, c.level, c.text, c.cure)
			}
			if !strings.Contains(r.Sections[0].Verdict, c.ends) {
				t.Errorf("verdict %q, want %q", r.Sections[0].Verdict, c.ends)
			}
		})
	}
	f := healthy()
	f.Host.Daemon = nil
	r := Diagnose(f)
	if got := r.worst("rule cam1", "membership"); got.Level != Fault || !strings.Contains(got.Text, "the group is not joined") {
		t.Errorf("without a daemon: %+v", got)
	}
}

func FuzzRuleset(f *testing.F) {
	f.Add([]byte(`{"nftables": [{"chain": {"family": "inet", "table": "f", "name": "in", "hook": "input", "policy": "drop"}}, {"rule": {"family": "inet", "table": "f", "chain": "in", "handle": 2, "expr": [{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "daddr"}}, "right": {"set": [{"prefix": {"addr": "224.0.0.0", "len": 24}}, {"range": ["224.0.0.1", "224.0.0.9"]}]}}}, {"jump": {"target": "in"}}]}}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := ParseRuleset(data)
		if err != nil {
			return
		}
		firewall(&Host{Firewall: Firewall{Ruleset: r, Inputs: []string{"in0"}}})
	})
}

func FuzzProc(f *testing.F) {
	f.Add("2    eth0            1     0     01005e000001\n")
	f.Add("000003e8 0000000a 00000001\n")
	f.Add("Max open files            1024                 524288               files\nCapEff:\t000001ffffffffff\nmonotonic -5 17\n")
	f.Add("           CPU0       CPU1\n  24:          0       7   PCI-MSI 1-edge      eth0\n")
	f.Fuzz(func(t *testing.T, text string) {
		if _, err := parseSoftnet(text); err != nil && !errors.Is(err, errForm) {
			t.Error(err)
		}
		if _, err := parseDevMcast(text); err != nil && !errors.Is(err, errForm) {
			t.Error(err)
		}
		if _, err := parseLimit(text, "Max open files"); err != nil && !errors.Is(err, errForm) {
			t.Error(err)
		}
		parseInterrupts(text)
		_, _ = parseCapabilities(text)
		_, _ = parseClockOffset(text)
	})
}

func TestProc(t *testing.T) {
	if s, err := parseSoftnet("037efe34 00000002 00000067 0\n01c89556 00000001 000000a0 0\n"); err != nil || s != (Softnet{3, 0x107}) {
		t.Errorf("softnet: %+v, %v", s, err)
	}
	if m, err := parseDevMcast("2    eth0            1     0     01005e000001\n3    tun0  1 0 00\n"); err != nil || !m["eth0"][[6]byte{1, 0, 0x5e, 0, 0, 1}] || len(m) != 1 {
		t.Errorf("dev_mcast: %v, %v", m, err)
	}
	if busy := parseInterrupts("   CPU0 CPU1\n 24: 0 7 PCI-MSI 1-edge eth0\n 25: 0 0 PCI-MSI eth1\n"); !busy["24"] || busy["25"] {
		t.Errorf("interrupts: %v", busy)
	}
	if d, err := parseClockOffset("monotonic           5         17\nboottime            0         0\n"); err != nil || d != 5*time.Second+17 {
		t.Errorf("timens_offsets: %v, %v", d, err)
	}
}

// TestDocuments: docs/operations.md names every check.
func TestDocuments(t *testing.T) {
	text, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, c := range hostChecks {
		names = append(names, c.name)
	}
	for _, c := range interfaceChecks {
		names = append(names, c.name)
	}
	for _, name := range names {
		if !strings.Contains(string(text), "`"+name+"`") {
			t.Errorf("docs/operations.md does not name the check %s", name)
		}
	}
}

// TestSeveralInputs: facts about a rule cover all of its inputs.
func TestSeveralInputs(t *testing.T) {
	merged := control.RuleStatus{Rule: control.Rule{Name: "merged", In: "239.1.1.1:5000%eth0 239.1.2.1:5000%eth3", Merge: "rtp"}, Notes: drops("unfinished_checksum", 7)}
	up := &network.Link{Name: "eth0", Up: true}
	g := gatherer{Options: Options{Rule: "merged"}, f: &Facts{Rule: &Rule{Name: "merged", Inputs: []*Interface{{Name: "eth0", Link: up}}}},
		byName: map[string]*Interface{"eth0": {Name: "eth0"}, "eth3": {Name: "eth3"}}}
	g.stats[0].Rules = []control.RuleStatus{merged, {Rule: control.Rule{Name: "other", In: "239.9.9.9:5000%eth0"}}}
	o := g.watch()
	if len(o.Taken) != 3 || !slices.Equal(o.Only, []netip.Prefix{netip.MustParsePrefix("239.1.1.1/32"), netip.MustParsePrefix("239.1.2.1/32")}) || len(o.Interfaces) != 1 {
		t.Errorf("watched: %+v", o)
	}
	g.count(&merged, 1)
	for name, i := range g.byName {
		if i.Unfinished[1] != 7 {
			t.Errorf("%s: %d packets with unfinished checksums, want 7", name, i.Unfinished[1])
		}
	}
}

func TestChainOfDevice(t *testing.T) {
	s := sample{ifname: "eth1"}
	for dev, want := range map[string]bool{`eth1`: true, `eth10`: false, `["eth0", "eth1"]`: true, `["eth10"]`: false, ``: false} {
		c := Chain{Family: "netdev", Hook: "ingress", Dev: dev}
		if got := c.sees(&s); got != want {
			t.Errorf("a chain of %s: %v, want %v", dev, got, want)
		}
	}
}
