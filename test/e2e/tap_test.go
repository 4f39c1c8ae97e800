package e2e_test

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/internal/traffic"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
)

// TestLocalReceivers: with local=yes the relay's own receivers get each relayed packet once, and so
// do the sinks.
func TestLocalReceivers(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	in.start()
	rule := in.add("both", "239.1.1.1:5000%in0,local=yes", "239.2.2.2:6000%out0", "239.2.2.3:6000%out1")
	if s := in.rule("both"); s.UsedPath != "fanout" || !strings.Contains(s.Reason, "local=yes") {
		t.Errorf("path %s, %q: want fanout and why (%+v)", s.UsedPath, s.Reason, rule)
	}
	sinks := []*sink{
		receive(t, n.relay, "239.1.1.1:5000%in0", traffic.Expected{Source: netip.MustParseAddr("10.1.0.2")}),
		receive(t, n.sinks[0], "239.2.2.2:6000%sink0", traffic.Expected{Source: netip.MustParseAddr("10.2.0.1")}),
		receive(t, n.sinks[1], "239.2.2.3:6000%sink0", traffic.Expected{Source: netip.MustParseAddr("10.2.1.1")}),
	}
	const packets = 1000
	send(t, n.source, traffic.SendConfig{Target: target(t, "239.1.1.1:5000%src0"), TTL: 16, Rate: traffic.Rate{Value: easy}, Count: packets}).wait()
	for _, s := range sinks {
		if fault := s.finish(packets); fault != "" {
			t.Error(fault)
		}
	}
	eventually(t, "all are counted", func() string {
		s := in.rule("both")
		if s.Matched.Packets != packets || s.Outputs[0].Sent.Packets != packets || s.Outputs[1].Sent.Packets != packets || len(s.Drops) != 0 {
			return fmt.Sprintf("%+v", s)
		}
		return ""
	})
}

// routesMulticast makes the kernel of a host route a group from in0 to out0, until the test ends
// (include/uapi/linux/mroute.h).
func routesMulticast(t *testing.T, h *lab.Host, source, group string) {
	t.Helper()
	const mrtInit, mrtAddVIF, mrtAddMFC, useIndex = 200, 202, 204, 8
	type vifctl struct {
		number           uint16
		flags, threshold uint8
		rate             uint32
		index            int32
		remote           [4]byte
	}
	type mfcctl struct {
		origin, group                 [4]byte
		parent                        uint16
		ttls                          [32]uint8
		packets, bytes, wrong, expire uint32
	}
	labtest.Do(t, h, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_IGMP)
		if err != nil {
			return err
		}
		t.Cleanup(func() { unix.Close(fd) })
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, mrtInit, 1); err != nil {
			return fmt.Errorf("MRT_INIT: %w", err)
		}
		set := func(option int, p unsafe.Pointer, size uintptr) error {
			return unix.SetsockoptString(fd, unix.IPPROTO_IP, option, string(unsafe.Slice((*byte)(p), size)))
		}
		for i, name := range []string{"in0", "out0"} {
			link, err := h.Link(name)
			if err != nil {
				return err
			}
			vif := vifctl{number: uint16(i), flags: useIndex, threshold: 1, index: int32(link.Attrs().Index)}
			if err := set(mrtAddVIF, unsafe.Pointer(&vif), unsafe.Sizeof(vif)); err != nil {
				return fmt.Errorf("MRT_ADD_VIF %s: %w", name, err)
			}
		}
		route := mfcctl{origin: netip.MustParseAddr(source).As4(), group: netip.MustParseAddr(group).As4()}
		route.ttls[1] = 1
		if err := set(mrtAddMFC, unsafe.Pointer(&route), unsafe.Sizeof(route)); err != nil {
			return fmt.Errorf("MRT_ADD_MFC: %w", err)
		}
		return nil
	})
}

// TestHostGetsNoCopy: packets that a rule of the fanout path takes go only to its outputs, once,
// and to no receiver or multicast route of the host, with and without a running daemon. The host
// gets them all with local=yes, and without tcx (before Linux 6.6), which status warns about. XDP
// is on the input, or not.
func TestHostGetsNoCopy(t *testing.T) {
	t.Parallel()
	tcx := labtest.Root() && labtest.TCX(t)
	for _, c := range []struct {
		name, input string
		busy        bool // a foreign XDP program is on the input
		local       bool
	}{
		{"taken", "239.1.1.1:5000%in0", false, false},
		{"taken without XDP", "239.1.1.1:5000%in0", true, false},
		{"left", "239.1.1.1:5000%in0,local=yes", false, true},
		{"left without XDP", "239.1.1.1:5000%in0,local=yes", true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			untaken := c.local || !tcx
			n := newNetwork(t)
			if c.busy {
				attachOther(t, n.relay, "in0")
			}
			routesMulticast(t, n.relay, "10.1.0.2", "239.1.1.1")
			in := newInstance(t, n.relay)
			d := in.start()
			if _, err := in.client.AddRule(t.Context(), control.Rule{Name: "r", In: c.input, Out: []string{"239.2.2.2:6000%out0,ttl=9"}, Path: "fanout"}); err != nil {
				t.Fatal(err)
			}
			relayed := receive(t, n.sinks[0], "239.2.2.2:6000%sink0", traffic.Expected{Source: netip.MustParseAddr("10.2.0.1")})
			host := receive(t, n.relay, "239.1.1.1:5000%in0", traffic.Expected{})
			routed := receive(t, n.sinks[0], "239.1.1.1:5000%sink0", traffic.Expected{})
			const packets = 1000
			flow := func() {
				t.Helper()
				send(t, n.source, traffic.SendConfig{Target: target(t, "239.1.1.1:5000%src0"), TTL: 16, Rate: traffic.Rate{Value: easy}, Count: packets}).wait()
			}
			flow()
			if fault := relayed.finish(packets); fault != "" {
				t.Error(fault)
			}
			const warning = "packets of the fanout path from in0 reach the host's stack, too"
			if status := in.mustCLI("status"); strings.Contains(status, warning) != (untaken && !c.local) {
				t.Errorf("status warns wrongly of packets that reach the host's stack (tcx: %v):\n%s", tcx, status)
			}
			if untaken {
				for _, s := range []*sink{host, routed} {
					if fault := s.finish(packets); fault != "" {
						t.Error(fault)
					}
				}
				if kept := in.kept(); kept != 0 {
					t.Errorf("%d packets were kept from the host", kept)
				}
				return
			}
			keeps := func(what string, want uint64) {
				t.Helper()
				eventually(t, fmt.Sprintf("%s: %d packets are kept from the host", what, want), func() string {
					if kept := in.kept(); kept != want {
						return fmt.Sprint(kept)
					}
					return ""
				})
			}
			keeps("with the daemon", packets)
			d.stop(unix.SIGKILL)
			flow()
			keeps("without it", 2*packets)
			for _, s := range []*sink{host, routed} {
				if fault := s.finish(0); fault != "" {
					t.Error(fault)
				}
			}
		})
	}
}

// kept is the number of packets that the relay took from the host's stack.
func (in *instance) kept() uint64 {
	in.t.Helper()
	var kept uint64
	labtest.Do(in.t, in.host, func() error {
		r, err := loader.OpenReader(in.pinDir)
		if err != nil {
			return err
		}
		defer r.Close()
		stats, err := r.Stats()
		kept = stats.Kept.Packets
		return err
	})
	return kept
}

// TestSteer: with run --fanout-steer on the streams of a single-queue input go through the workers'
// CPUs, each packet once and in order, before and after a restart.
func TestSteer(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	// A device's checksum is lost on the way to another CPU.
	labtest.Do(t, n.source, func() error { return lab.SetTxChecksum("src0", false) })
	in := newInstance(t, n.relay)
	const streams, packets = 4, 60 // together fewer than a veth queues (VETH_RING_SIZE, 256), should the CPU behind it not run
	d := in.start("--fanout-steer", "on", "--fanout-workers", "2")
	for i := range streams {
		rule := control.Rule{Name: fmt.Sprint("r", i), In: fmt.Sprintf("239.1.1.%d:5000%%in0", i), Out: []string{fmt.Sprintf("239.2.2.%d:6000%%out0", i)}, Path: "fanout"}
		if _, err := in.client.AddRule(t.Context(), rule); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		var sinks []*sink
		for i := range streams {
			sinks = append(sinks, receive(t, n.sinks[0], fmt.Sprintf("239.2.2.%d:6000%%sink0", i), traffic.Expected{Source: netip.MustParseAddr("10.2.0.1")}))
		}
		var all []*stream
		for i := range streams {
			all = append(all, send(t, n.source, traffic.SendConfig{Target: target(t, fmt.Sprintf("239.1.1.%d:5000%%src0", i)), TTL: 16, Rate: traffic.Rate{Value: easy}, Count: packets}))
		}
		for _, s := range all {
			s.wait()
		}
		for _, s := range sinks {
			if fault := s.finish(packets); fault != "" {
				t.Error(fault)
			}
		}
		for _, r := range in.kernelRules() {
			if !r.Steered {
				t.Errorf("rule %s is not steered", r.Name)
			}
		}
		d.stop(unix.SIGKILL)
		d = in.start("--fanout-steer", "on", "--fanout-workers", "2")
	}
}

// kernelRules are the rules in the kernel.
func (in *instance) kernelRules() (rules []flow.Flow) {
	in.t.Helper()
	labtest.Do(in.t, in.host, func() error {
		r, err := loader.OpenReader(in.pinDir)
		if err != nil {
			return err
		}
		defer r.Close()
		rules, err = r.Rules()
		return err
	})
	return rules
}

// newTun creates a tun device, which has no Ethernet header, and returns its other end.
func newTun(t *testing.T, h *lab.Host, name, cidr string) *os.File {
	t.Helper()
	f := labtest.Tun(t, h, name, 0)
	if err := h.AddAddr(name, cidr); err != nil {
		t.Fatal(err)
	}
	if err := h.SetUp(name, true); err != nil {
		t.Fatal(err)
	}
	return f
}

// TestTunOutput: a rule with an output without Ethernet header takes the fanout path by itself and
// says why; a unicast output there needs no neighbour.
func TestTunOutput(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	tun := newTun(t, n.relay, "tun0", "10.8.0.1/24")
	in := newInstance(t, n.relay)
	in.start()
	in.add("mixed", "239.1.1.1:5000%in0", "10.8.0.9:7000%tun0,ttl=5", "239.2.2.2:6000%out0")
	if s := in.rule("mixed"); s.UsedPath != "fanout" || !strings.Contains(s.Reason, "interface tun0 has no Ethernet header") {
		t.Errorf("path %s, %q: want fanout and why", s.UsedPath, s.Reason)
	}
	frame := packet.Frame{
		SrcMAC: macOf(t, n.source, "src0"), DstMAC: packet.MulticastMAC(netip.MustParseAddr("239.1.1.1")),
		Src: netip.MustParseAddr("10.1.0.2"), Dst: netip.MustParseAddr("239.1.1.1"), SrcPort: 4000, DstPort: 5000, TTL: 16, Payload: []byte("through the tunnel"),
	}
	source, taps := labtest.NewTap(t, n.source, "src0"), n.taps(t, []string{"239.2.2.2:6000%out0"})
	source.Send(frame.Build())
	want := frame
	want.Src, want.Dst, want.DstPort, want.TTL = netip.MustParseAddr("10.8.0.1"), netip.MustParseAddr("10.8.0.9"), 7000, 5
	buf := make([]byte, 2048)
	for {
		if err := tun.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		got, err := tun.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		if buf[0]>>4 == 4 { // not the kernel's own IPv6
			if !bytes.Equal(buf[:got], want.Build()[14:]) {
				t.Errorf("tunnel\n got  %x\n want %x", buf[:got], want.Build()[14:])
			}
			break
		}
	}
	if got := taps["out0"].Collect(1, isUDP)[0]; !bytes.HasSuffix(got, frame.Payload) {
		t.Errorf("output beside it: %x", got)
	}
}

// TestPathChanges: a stream continues, without lost or duplicate packets, while its rule moves to
// the fanout path and back.
func TestPathChanges(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	file := func(path string) string {
		return "rules:\n  - name: cam1\n    in: 239.1.1.1:5000%in0\n    out: 239.2.2.2:6000%out0\n    path: " + path + "\n"
	}
	config := in.write("rules.yaml", file("kernel"))
	in.start("-c", config)
	in.waitState("cam1", "active")
	s := receive(t, n.sinks[0], "239.2.2.2:6000%sink0", traffic.Expected{Source: netip.MustParseAddr("10.2.0.1")})
	stream := send(t, n.source, traffic.SendConfig{Target: target(t, "239.1.1.1:5000%src0"), TTL: 16, Rate: traffic.Rate{Value: 5_000}})
	for _, path := range []string{"fanout", "kernel", "fanout", "kernel"} {
		stream.flows(500)
		in.write("rules.yaml", file(path))
		in.mustCLI("reload")
		if got := in.waitState("cam1", "active").UsedPath; got != path {
			t.Errorf("path is %s, want %s", got, path)
		}
	}
	stream.flows(500)
	sent := stream.stop()
	fault := s.finish(sent)
	// Packets still in the rings may leave after those of the kernel path.
	if r := s.receiver.Report().Total; r.Received != sent || r.Duplicated != 0 || r.Lost != 0 {
		t.Error(fault)
	}
}
