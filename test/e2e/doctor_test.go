package e2e_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"xdpcast/bpf"
	"xdpcast/internal/doctor"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/internal/traffic"
	"xdpcast/pkg/packet"
)

// diagnosis runs the doctor and returns its report, whose faults must match the exit code.
func (in *instance) diagnosis(args ...string) doctor.Report {
	in.t.Helper()
	got := in.cli(append([]string{"doctor", "-o", "json"}, args...)...)
	var r doctor.Report
	if err := json.Unmarshal([]byte(got.stdout), &r); err != nil {
		in.t.Fatalf("%v: %s", err, got)
	}
	if want := min(r.Faults, 1); got.code != want {
		in.t.Fatalf("doctor %v: want exit code %d: %s", args, want, got)
	}
	return r
}

// diagnoses runs the doctor until its report lacks nothing: a sender on a busy machine may pause for longer than the doctor
// looks.
func (in *instance) diagnoses(what string, lacks func(doctor.Report) string, args ...string) {
	in.t.Helper()
	eventually(in.t, "the doctor reports "+what, func() string { return lacks(in.diagnosis(args...)) })
}

// check returns the worst finding of a check; the levels of the machine's own faults vary.
func check(r doctor.Report, section, name string) (worst doctor.Finding) {
	for _, s := range r.Sections {
		for _, f := range s.Findings {
			if s.Title() == section && f.Check == name && (worst.Check == "" || f.Level > worst.Level) {
				worst = f
			}
		}
	}
	return worst
}

// addRepeated: the doctor names what arrives in place of a rule's stream.
func (n *network) addRepeated(t *testing.T, in *instance) {
	t.Helper()
	group := netip.MustParseAddr("239.1.1.1")
	frame := packet.Frame{
		SrcMAC: macOf(t, n.source, "src0"), DstMAC: packet.MulticastMAC(group), VLANs: []uint16{7}, Src: netip.MustParseAddr("10.1.0.2"), Dst: group,
		SrcPort: 4000, DstPort: 5001, TTL: 9, Payload: []byte("elsewhere"),
	}
	stop := n.repeat(t, frame.Build())
	defer stop()
	const stream = "10.1.0.2@239.1.1.1:5001%in0,vlan=7"
	// A sender on a busy machine may pause for longer than the doctor looks.
	eventually(t, "the doctor names the stream that arrives instead", func() string {
		r := in.diagnosis("cam1", "--for", "500ms")
		f, verdict := check(r, "rule cam1", "matched"), r.Sections[0].Verdict
		if !strings.Contains(f.Text, "What comes in instead: "+stream) || !strings.Contains(f.Cure, "--in "+stream) || !strings.HasPrefix(verdict, "packets end at the flow table") {
			return fmt.Sprintf("%+v, verdict %q", f, verdict)
		}
		return ""
	})
}

// TestDoctor: the doctor follows the packets of a rule with live counters, and reports where they
// end, with and without a daemon.
func TestDoctor(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	in.start()
	in.add("cam1", "239.1.1.1:5000%in0", "239.2.1.1:6000%out0,ttl=dec", "239.2.1.2:6000%out1")
	in.waitState("cam1", "active")
	stream := send(t, n.source, traffic.SendConfig{Target: target(t, streamTarget), TTL: 16, Rate: traffic.Rate{Value: 2_000}})
	stream.flows(100)

	in.diagnoses("a rule whose packets are relayed", func(r doctor.Report) string {
		if s := r.Sections[0]; s.Title() != "rule cam1" || !strings.HasSuffix(s.Verdict, "went the whole way, from in0 to the wire") {
			return fmt.Sprintf("verdict %q of %q", s.Verdict, s.Title())
		}
		for _, s := range r.Sections { // the host section has the machine's own faults
			for _, f := range s.Findings {
				if s.Kind != "host" && f.Level == doctor.Fault {
					return fmt.Sprintf("%s: %+v", s.Title(), f)
				}
			}
		}
		for _, name := range []string{"card", "matched", "output 0", "output 1", "wire"} {
			if f := check(r, "rule cam1", name); f.Level != doctor.OK || f.Packets == 0 {
				return fmt.Sprintf("%s: %+v", name, f)
			}
		}
		return ""
	}, "cam1", "--for", "1s")
	stream.stop()

	// The TTL expires at one of two outputs.
	stream = send(t, n.source, traffic.SendConfig{Target: target(t, streamTarget), TTL: 1, Rate: traffic.Rate{Value: 2_000}})
	stream.flows(100)
	in.diagnoses("an output whose copies expire", func(r doctor.Report) string {
		if f := check(r, "rule cam1", "output 0"); f.Level != doctor.Fault || !strings.Contains(f.Text, "reason ttl") || f.Packets == 0 || !strings.Contains(f.Cure, "TTL") {
			return fmt.Sprintf("%+v", f)
		}
		if f := check(r, "rule cam1", "output 1"); f.Level != doctor.OK || f.Packets == 0 {
			return fmt.Sprintf("%+v", f)
		}
		return ""
	}, "cam1", "--for", "500ms")

	// Without a daemon, from the pinned state.
	in.running.stop(syscall.SIGTERM)
	in.running = nil
	in.diagnoses("a missing daemon", func(r doctor.Report) string {
		if f := check(r, "rule cam1", "matched"); f.Level != doctor.OK || f.Packets == 0 {
			return fmt.Sprintf("%+v", f)
		}
		if f := check(r, "rule cam1", "membership"); f.Level != doctor.Fault || f.Cure != "systemctl start xdpcast" {
			return fmt.Sprintf("%+v", f)
		}
		if f := check(r, "host", "daemon"); f.Level != doctor.Fault {
			return fmt.Sprintf("%+v", f)
		}
		if f := check(r, "interface in0", "program"); f.Level != doctor.OK {
			return fmt.Sprintf("%+v", f)
		}
		return ""
	}, "cam1", "--for", "500ms")
	stream.stop()

	in.start()
	r := in.diagnosis("cam1", "--for", "100ms")
	if f := check(r, "rule cam1", "matched"); f.Level != doctor.Fault || !strings.Contains(r.Sections[0].Verdict, "packets end before the host") {
		t.Errorf("of a silent stream: %+v, verdict %q", f, r.Sections[0].Verdict)
	}
	// The stream arrives on another port and in a VLAN.
	n.addRepeated(t, in)
	if got := in.cli("doctor", "nobody"); got.code != 2 || !strings.Contains(got.stderr, `no such rule: "nobody"`) {
		t.Errorf("of no rule: %s", got)
	}
	if got := in.cli("doctor", "--for", "0s"); got.code != 2 {
		t.Errorf("--for 0s: %s", got)
	}
	if got := in.cli("doctor", "--for", "100ms", "-i", "nothing0"); got.code != 1 || !strings.Contains(got.stdout, "interface nothing0 not found") {
		t.Errorf("of an absent interface: %s", got)
	}
}

// TestDoctorCounters: faults that only the kernel's counters show: incomplete checksums, and copies
// that are too long.
func TestDoctorCounters(t *testing.T) {
	n := newNetwork(t)
	labtest.Do(t, n.source, func() error { return lab.SetTxChecksum("src0", true) })
	if err := n.relay.Netlink().LinkSetMTU(labtest.Link(t, n.relay, "out0"), 1200); err != nil {
		t.Fatal(err)
	}
	in := newInstance(t, n.relay)
	in.start()
	in.mustCLI("rule", "add", "cam1", "--path", "kernel", "--in", "239.1.1.1:5000%in0", "--out", "239.2.1.1:6000%out0", "--out", "239.2.1.2:6000%out1")
	in.waitState("cam1", "active")
	stream := send(t, n.source, traffic.SendConfig{Target: target(t, streamTarget), TTL: 16, Size: 1400, Rate: traffic.Rate{Value: 500}})
	defer stream.stop()
	stream.flows(100)
	in.diagnoses("what the counters show", func(r doctor.Report) string {
		for _, c := range []struct {
			section, check string
			level          doctor.Level
			text, cure     string
		}{
			{"interface in0", "checksums", doctor.Warning, "came to in0 with unfinished checksums", "tx off"},
			{"interface out0", "mtu", doctor.Fault, "were too long for out0 (MTU 1200)", "ip link set dev out0 mtu"},
			{"rule cam1", "output 0", doctor.Fault, "reason mtu", "ip link set dev out0 mtu"},
			{"rule cam1", "output 1", doctor.OK, "copies left for", ""},
		} {
			if f := check(r, c.section, c.check); f.Level != c.level || !strings.Contains(f.Text, c.text) || !strings.Contains(f.Cure, c.cure) {
				return fmt.Sprintf("%s, %s: %+v", c.section, c.check, f)
			}
		}
		return ""
	}, "cam1", "--for", "500ms")
}

// TestDoctorAndDaemon: faults that a daemon reports, each produced for real.
func TestDoctorAndDaemon(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	if err := n.relay.Netlink().LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(n.relay.SetUp("br0", true), n.relay.AddAddr("br0", "10.9.0.1/24")); err != nil {
		t.Fatal(err)
	}
	in := newInstance(t, n.relay)
	want := func(what, section, name string, level doctor.Level, text, cure string) {
		t.Helper()
		last := doctor.Finding{}
		eventually(t, "the doctor finds "+what, func() string {
			last = check(in.diagnosis("--for", "100ms"), section, name)
			if last.Level != level || !strings.Contains(last.Text, text) || !strings.Contains(last.Cure, cure) {
				return fmt.Sprintf("%+v", last)
			}
			return ""
		})
	}
	d := in.start("--mode", "native")
	in.add("cam1", "239.1.1.1:5000%in0", "239.2.1.1:6000%out0")
	in.waitState("cam1", "active")
	want("no querier", "interface in0", "querier", doctor.Warning, "no IGMP querier was heard on in0", "igmp snooping querier")

	in.mustCLI("rule", "add", "late", "--in", "239.1.1.2:5000%absent0", "--out", "239.2.1.1:6000%out0")
	want("a rule that waits", "host", "daemon", doctor.Warning, "1 rule is pending", "xdpcast rule list")
	in.mustCLI("rule", "del", "late")
	want("nothing", "host", "daemon", doctor.OK, "", "")

	in.mustCLI("rule", "add", "bridged", "--in", "239.1.1.3:5000%br0", "--out", "239.2.1.1:6000%out0")
	want("an interface without the program", "interface br0", "program", doctor.Fault, "the relay program is not on br0", "xdpcast status")
	in.mustCLI("rule", "del", "bridged")

	d.stop(syscall.SIGTERM)

	// No descriptors are left for the sockets of more groups.
	file := func(groups int) string {
		b := strings.Builder{}
		b.WriteString("rules:\n")
		for i := range groups {
			fmt.Fprintf(&b, "  - {name: g%d, in: \"239.3.3.%d:5000%%in0\", out: \"239.4.4.%d:5000%%out0\"}\n", i, i, i)
		}
		return in.write("rules.yaml", b.String())
	}
	labtest.Sysctl(t, n.relay, "net/ipv4/igmp_max_memberships", "1")
	d = in.start("--mode", "native", "-c", file(1))
	in.waitState("g0", "active")
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	limit := uint64(len(open) + 40) // a quarter of which is kept for requests
	if err := unix.Prlimit(d.cmd.Process.Pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: limit, Max: limit}, nil); err != nil {
		t.Fatal(err)
	}
	file(100)
	in.cli("reload")
	want("groups that are not joined", "host", "memberships", doctor.Fault, "not joined: ", "LimitNOFILE")
	d.stop(syscall.SIGKILL)
	in.mustCLI("unload", "--all")

	d = in.start("--mode", "generic", "-c", file(1))
	want("generic mode", "interface in0", "native", doctor.Warning, "XDP runs in generic mode on in0", "--mode native")
	d.stop(syscall.SIGTERM)
	in.running = nil

	// The pinned state is from another release.
	labtest.Do(t, n.relay, func() error {
		m, err := ebpf.LoadPinnedMap(filepath.Join(in.pinDir, "config"), nil)
		if err != nil {
			return err
		}
		defer m.Close()
		var config bpf.RelayConfig
		if err := m.Lookup(uint32(0), &config); err != nil {
			return err
		}
		config.Schema++
		return m.Put(uint32(0), &config)
	})
	want("state of another release", "host", "pinned", doctor.Fault, "schema", "start xdpcast, which migrates or replaces it")
}
