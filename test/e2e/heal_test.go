package e2e_test

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/internal/traffic"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
)

// ends is where the packets of a probe must arrive, and from which address.
type ends struct {
	host     *lab.Host
	endpoint string
	source   string
}

func (n *network) end(i int) ends {
	return ends{n.sinks[i], fmt.Sprintf("239.2.2.%d:6000%%sink0", i), fmt.Sprintf("10.2.%d.1", i)}
}

// probe sends packets to a group and checks that each arrives at every end.
func (n *network) probe(group string, want ...ends) {
	n.t.Helper()
	var sinks []*sink
	for _, e := range want {
		sinks = append(sinks, receive(n.t, e.host, e.endpoint, traffic.Expected{Source: netip.MustParseAddr(e.source)}))
	}
	const packets = 200
	s := send(n.t, n.source, traffic.SendConfig{
		Target: target(n.t, group+"%src0"), Count: packets, TTL: 16, Rate: traffic.Rate{Value: easy},
	})
	s.wait()
	for _, s := range sinks {
		if fault := s.finish(packets); fault != "" {
			n.t.Errorf("probe of %s: %s", group, fault)
		}
	}
}

// waitKernel waits until the rules in the kernel meet the condition.
func (in *instance) waitKernel(what string, lacks func([]flow.Flow) string) {
	in.t.Helper()
	eventually(in.t, what, func() string {
		r, err := loader.OpenReader(in.pinDir)
		if err != nil {
			return err.Error()
		}
		defer r.Close()
		all, err := r.Rules()
		if err != nil {
			return err.Error()
		}
		return lacks(all)
	})
}

// waitOutput waits until an output of a rule has a state.
func (in *instance) waitOutput(name string, slot int, state, reason string) {
	in.t.Helper()
	eventually(in.t, fmt.Sprintf("output %d of rule %s is %s", slot, name, state), func() string {
		o := in.rule(name).Outputs[slot]
		if o.State == state && strings.Contains(o.Reason, reason) {
			return ""
		}
		return fmt.Sprintf("it is %s (%s)", o.State, o.Reason)
	})
}

func TestPendingCompletes(t *testing.T) {
	n := newNetwork(t)
	labtest.RemoveLink(n.t, n.relay, "in0")
	labtest.RemoveLink(n.t, n.relay, "out1")
	in := newInstance(t, n.relay)
	in.start()
	text := in.mustCLI("rule", "add", "late", "--in", "239.1.1.1:5000%in0", "--out", "239.2.2.0:6000%out0", "--out", "239.2.2.1:6000%out1")
	if want := "rule late: pending: interface in0 not found\n"; text != want {
		t.Errorf("rule add says %q, want %q", text, want)
	}
	if list := in.mustCLI("rule", "list"); !strings.Contains(list, "pending") {
		t.Errorf("rule list says %q", list)
	}

	n.connectInput()
	in.waitOutput("late", 0, control.StateActive, "")
	in.waitOutput("late", 1, control.StatePending, "interface out1 not found")
	n.waitJoined("in0", "239.1.1.1", true)
	n.probe("239.1.1.1:5000", n.end(0))

	n.connectOutput(1)
	in.waitOutput("late", 1, control.StateActive, "")
	n.probe("239.1.1.1:5000", n.end(0), n.end(1))
	if got := in.rule("late"); got.State != control.StateActive || got.Reason != "" {
		t.Errorf("rule is %s (%s)", got.State, got.Reason)
	}
}

func TestInputComesBack(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	in.start()
	in.add("any", "239.1.1.1:5000%in0", "239.2.2.0:6000%out0")
	in.add("source", "10.1.0.2@232.1.1.1:5000%in0", "239.2.2.1:6000%out1", "239.2.2.2:6000%out2")
	check := func() {
		t.Helper()
		in.waitState("any", control.StateActive)
		in.waitState("source", control.StateActive)
		n.waitJoined("in0", "239.1.1.1", true)
		n.waitJoined("in0", "232.1.1.1", true)
		n.probe("239.1.1.1:5000", n.end(0))
		n.probe("232.1.1.1:5000", n.end(1), n.end(2))
	}
	check()

	t.Run("re-created", func(t *testing.T) {
		for range 3 {
			labtest.RemoveLink(n.t, n.relay, "in0")
			got := in.waitState("source", control.StatePending)
			if want := "interface in0 not found"; got.Reason != want {
				t.Errorf("reason is %q, want %q", got.Reason, want)
			}
			n.connectInput()
			check()
		}
	})
	t.Run("re-created at once", func(t *testing.T) {
		for range 3 {
			labtest.RemoveLink(n.t, n.relay, "in0")
			n.connectInput()
			index := linkIndex(t, n.relay, "in0")
			in.waitKernel("rules are those of the new interface", func(all []flow.Flow) string {
				for _, r := range all {
					if r.In.Index != index {
						return fmt.Sprintf("rule %s has index %d, not %d", r.Name, r.In.Index, index)
					}
				}
				if len(all) != 2 {
					return fmt.Sprintf("%d rules", len(all))
				}
				return ""
			})
			check()
		}
	})
	t.Run("down and up", func(t *testing.T) {
		if err := n.relay.SetUp("in0", false); err != nil {
			t.Fatal(err)
		}
		got := in.waitState("any", control.StatePending)
		if want := "interface in0 is down"; got.Reason != want {
			t.Errorf("reason is %q, want %q", got.Reason, want)
		}
		// A source joined while the interface is down must be heard later, too.
		in.add("down", "10.1.0.2@232.1.1.2:5000%in0", "239.2.2.0:6000%out0")
		if err := n.relay.SetUp("in0", true); err != nil {
			t.Fatal(err)
		}
		check()
		in.waitState("down", control.StateActive)
		n.probe("232.1.1.2:5000", n.end(0))
		if err := in.client.DeleteRule(t.Context(), "down"); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("renamed", func(t *testing.T) {
		n.rename("in0", "cam0")
		in.waitState("any", control.StatePending)
		n.waitJoined("cam0", "239.1.1.1", false)
		eventually(t, "the program is off the interface", func() string {
			if ids := attachedPrograms(t, n.relay); ids["cam0"] != 0 {
				return fmt.Sprint(ids)
			}
			return ""
		})
		n.rename("cam0", "in0")
		check()
	})
	t.Run("other MAC", func(t *testing.T) {
		setMAC(t, n.relay, "in0", "02:00:00:00:00:77")
		in.waitKernel("the loop check knows the MAC", func(all []flow.Flow) string {
			for _, r := range all {
				if r.In.MAC != [6]byte{2, 0, 0, 0, 0, 0x77} {
					return fmt.Sprintf("rule %s has %x", r.Name, r.In.MAC)
				}
			}
			return ""
		})
		check()
	})
}

func linkIndex(t *testing.T, h *lab.Host, name string) int {
	t.Helper()
	l, err := h.Link(name)
	if err != nil {
		t.Fatal(err)
	}
	return l.Attrs().Index
}

func setMAC(t *testing.T, h *lab.Host, name, mac string) {
	t.Helper()
	l, err := h.Link(name)
	if err != nil {
		t.Fatal(err)
	}
	addr, err := net.ParseMAC(mac)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Netlink().LinkSetHardwareAddr(l, addr); err != nil {
		t.Fatal(err)
	}
}

// TestOutputComesBack subjects one of a rule's three outputs to everything that happens to
// interfaces, while packets flow. The other two must not miss one.
func TestOutputComesBack(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	in.start()
	in.add("three", "239.1.1.2:5000%in0", "239.2.2.0:6000%out0", "239.2.2.1:6000%out1", "239.2.2.2:6000%out2")
	in.add("single", "239.1.1.3:5000%in0", "239.2.3.1:6000%out1")
	others := []*sink{
		receive(t, n.sinks[0], "239.2.2.0:6000%sink0", traffic.Expected{Source: netip.MustParseAddr("10.2.0.1")}),
		receive(t, n.sinks[2], "239.2.2.2:6000%sink0", traffic.Expected{Source: netip.MustParseAddr("10.2.2.1")}),
	}
	stream := send(t, n.source, traffic.SendConfig{Target: target(t, "239.1.1.2:5000%src0"), TTL: 16, Rate: traffic.Rate{Value: easy}})
	stream.flows(1_000)

	pending := func(reason string) {
		t.Helper()
		in.waitOutput("three", 1, control.StatePending, reason)
		in.waitState("single", control.StatePending)
		if got := in.rule("three"); got.State != control.StateActive || !strings.Contains(got.Reason, reason) {
			t.Errorf("rule is %s (%s), want active, and the reason of the output", got.State, got.Reason)
		}
		stream.flows(500)
	}
	active := func(source string) {
		t.Helper()
		in.waitOutput("three", 1, control.StateActive, "")
		in.waitState("single", control.StateActive)
		want := netip.MustParseAddr(source)
		in.waitKernel("packets leave from "+source, func(all []flow.Flow) string {
			for _, r := range all {
				for _, o := range r.Out {
					if r.Name == "single" && o.Src != want {
						return fmt.Sprintf("they leave from %v", o.Src)
					}
				}
			}
			return ""
		})
		n.probe("239.1.1.3:5000", ends{n.sinks[1], "239.2.3.1:6000%sink0", source})
		late := receive(t, n.sinks[1], "239.2.2.1:6000%sink0", traffic.Expected{Source: want})
		late.wait(100)
		n.probeMAC(1)
	}
	active("10.2.1.1")

	labtest.RemoveLink(n.t, n.relay, "out1")
	pending("interface out1 not found")
	n.connectOutput(1)
	active("10.2.1.1")

	// Before the daemon can notice.
	labtest.RemoveLink(n.t, n.relay, "out1")
	n.connectOutput(1)
	n.setAddr("out1", "10.2.1.50/24")
	active("10.2.1.50")

	if err := n.relay.SetUp("out1", false); err != nil {
		t.Fatal(err)
	}
	pending("interface out1 is down")
	if err := n.relay.SetUp("out1", true); err != nil {
		t.Fatal(err)
	}
	active("10.2.1.50")

	n.setAddr("out1", "10.2.1.77/24")
	active("10.2.1.77")

	setMAC(t, n.relay, "out1", "02:00:00:00:00:99")
	in.waitKernel("the rules have the MAC", func(all []flow.Flow) string {
		for _, r := range all {
			if r.Name == "three" && r.Out[1].SrcMAC != [6]byte{2, 0, 0, 0, 0, 0x99} {
				return fmt.Sprintf("%x", r.Out[1].SrcMAC)
			}
		}
		return ""
	})
	active("10.2.1.77")

	n.rename("out1", "net1")
	pending("interface out1 not found")
	n.rename("net1", "out1")
	active("10.2.1.77")

	sent := stream.stop()
	for _, s := range others {
		if fault := s.finish(sent); fault != "" {
			t.Error(fault)
		}
	}
	got := in.checkSum(t, "three", sent)
	if i := slices.IndexFunc(got.Outputs[1].Drops, func(d control.Drop) bool { return d.Reason == "not_ready" && d.Packets > 0 }); i < 0 {
		t.Errorf("output 1 dropped %v, want some for not being ready", got.Outputs[1].Drops)
	}
}

// checkSum waits until every packet of a rule is accounted for at each output: a copy may be counted after others of its
// packet have arrived.
func (in *instance) checkSum(t *testing.T, name string, packets uint64) (r control.RuleStatus) {
	t.Helper()
	eventually(t, "every packet of rule "+name+" is accounted for", func() string {
		r = in.rule(name)
		if r.Matched.Packets != packets {
			return fmt.Sprintf("matched %d packets of %d", r.Matched.Packets, packets)
		}
		return sumFault(r)
	})
	return r
}

// probeMAC checks the destination MAC of a packet of the running stream.
func (n *network) probeMAC(i int) {
	n.t.Helper()
	tap := labtest.NewTap(n.t, n.sinks[i], "sink0")
	frame := tap.Receive(patience, func(f []byte) bool {
		// IPv4, UDP, to the group of the output.
		return len(f) > 42 && f[12] == 8 && f[13] == 0 && f[23] == 17 && bytes.Equal(f[30:34], []byte{239, 2, 2, byte(i)})
	})
	if frame == nil {
		n.t.Fatalf("no packet of the stream at sink %d", i)
	}
	out, err := n.relay.Link(fmt.Sprintf("out%d", i))
	if err != nil {
		n.t.Fatal(err)
	}
	if mac := net.HardwareAddr(frame[6:12]); mac.String() != out.Attrs().HardwareAddr.String() {
		n.t.Errorf("packet leaves with MAC %s, want that of the interface, %s", mac, out.Attrs().HardwareAddr)
	}
}
