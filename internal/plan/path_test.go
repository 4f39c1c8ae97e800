package plan

import (
	"slices"
	"strings"
	"testing"

	"xdpcast/internal/network"
	"xdpcast/pkg/flow"
)

// TestPaths: which path a rule takes, and why.
func TestPaths(t *testing.T) {
	links := []string{
		"eth0 10.0.0.1", "eth1 10.1.0.1", "eth2 10.2.0.1", "jumbo0 mtu=9000", "tun0 10.3.0.1 noeth", "mute0 10.4.0.1 notx",
		"down0 10.5.0.1 notx down", "veth0 10.6.0.1 kind=veth notx down", "veth1 10.7.0.1 kind=veth notx nocarrier", "nosg0 10.8.0.1 nosg mtu=9000", "old0 10.9.0.1 unknown mtu=9000", "long0 10.10.0.1 unknown mtu=9000",
		"page0 mtu=3502", "more0 mtu=3503",
	}
	all := Capabilities{SocketSG: true}
	const one, two = " -> 239.2.2.1:6000%eth1", " -> 239.2.2.1:6000%eth1 239.2.2.2:6000%eth2"
	to := func(names ...string) string {
		out := " ->"
		for _, name := range names {
			out += " 239.2.2.1:6000%" + name
		}
		return out
	}
	generic := func(t *testing.T, w *World) { w.Answers.Attached[w.link(t, "eth0").LinkID] = Attached{Generic: true} }
	taken := func(t *testing.T, w *World) { w.Answers.Attached[w.link(t, "eth0").LinkID] = Attached{Err: errTaken} }
	carried := func(p flow.Path) func(*testing.T, *World) {
		return func(_ *testing.T, w *World) { w.Answers.Carried["a"] = p }
	}
	for _, tt := range []struct {
		name, rule string
		kernel     *Capabilities // all when nil
		edit       func(*testing.T, *World)
		path       string // "" when the rule is failed
		note       string // or error
	}{
		{name: "auto", rule: "eth0" + two, path: "kernel"},
		{name: "kernel, generic", rule: "eth0" + one + " path=kernel", edit: generic, path: "kernel"},
		{name: "fanout", rule: "eth0" + two + " path=fanout", path: "fanout"},
		{name: "generic, several", rule: "eth0" + two, edit: generic, path: "afxdp",
			note: "path afxdp: interface eth0 runs XDP in generic mode, which supports one output a rule: the kernel's copies would share one buffer"},
		{name: "kernel, generic, several", rule: "eth0" + two + " path=kernel", edit: generic, note: "interface eth0 runs XDP in generic mode, which supports one output a rule: the kernel's copies would share one buffer"},
		{name: "afxdp", rule: "eth0" + one + " path=afxdp", path: "afxdp"},
		{name: "afxdp, output without Ethernet", rule: "eth0" + to("eth1", "tun0") + " path=afxdp", note: "path afxdp: interface tun0 has no Ethernet header"},
		{name: "afxdp, local", rule: "eth0,local=yes" + one + " path=afxdp", note: "path afxdp: local=yes keeps the packets for the host's receivers"},
		{name: "local", rule: "eth0,local=yes" + one, path: "fanout", note: "path fanout: local=yes keeps the packets for the host's receivers"},
		{name: "input without Ethernet", rule: "tun0" + one, path: "fanout", note: "path fanout: interface tun0 has no Ethernet header"},
		{name: "input without program", rule: "eth0" + one, edit: taken, path: "fanout", note: "path fanout: another program has it"},
		{name: "output without Ethernet", rule: "eth0" + to("eth1", "tun0"), path: "fanout",
			note: "path fanout: interface tun0 has no Ethernet header, which the kernel path needs; not path afxdp: interface tun0 has no Ethernet header"},
		{name: "output that does not transmit", rule: "eth0" + to("eth1", "mute0"), path: "afxdp",
			note: "path afxdp: interface mute0 does not send redirected frames (its driver says so; a veth needs generic receive offload at its peer: ethtool -K PEER gro on, or off and on again if it was switched on while the veth was down)"},
		{name: "it does, of a generic program", rule: "eth0" + to("mute0"), edit: generic, path: "kernel"},
		{name: "kernel, output that does not transmit", rule: "eth0" + to("eth1", "mute0") + " path=kernel", path: "kernel"},
		{name: "it does not, though it is down", rule: "eth0" + to("eth1", "down0"), path: "afxdp",
			note: "path afxdp: interface down0 does not send redirected frames (its driver says so; a veth needs generic receive offload at its peer: ethtool -K PEER gro on, or off and on again if it was switched on while the veth was down)"},
		{name: "output that is absent", rule: "eth0" + to("eth1", "late0"), path: "kernel"},
		{name: "a veth that is down", rule: "eth0" + to("eth1", "veth0"), path: "kernel"},
		{name: "a veth whose peer is down", rule: "eth0" + to("eth1", "veth1"), path: "kernel"},
		{name: "output that refused", rule: "eth0" + to("eth1", "old0"), edit: func(t *testing.T, w *World) { w.Answers.NoTransmit[w.link(t, "old0").LinkID] = "7 frames" }, path: "afxdp",
			note: "path afxdp: interface old0 does not send redirected frames (7 frames)"},
		{name: "output that refused, unsaid", rule: "eth0" + to("old0"), edit: func(t *testing.T, w *World) { w.Answers.NoTransmit[w.link(t, "old0").LinkID] = "" }, path: "afxdp",
			note: "path afxdp: interface old0 does not send redirected frames (it refused some)"},

		// Frames in several buffers.
		{name: "jumbo, one", rule: "jumbo0" + one, path: "kernel"},
		{name: "jumbo, two", rule: "jumbo0" + two, path: "afxdp", note: "path afxdp: the kernel path cannot copy frames of more than 3520 bytes to 2 outputs, and the MTU of jumbo0 is 9000"},
		{name: "kernel, jumbo, two", rule: "jumbo0" + two + " path=kernel", path: "kernel",
			note: "the kernel path cannot copy frames of more than 3520 bytes to 2 outputs, and the MTU of jumbo0 is 9000: they are dropped for the reason multi_buffer (paths afxdp and fanout can)"},
		{name: "just not jumbo", rule: "page0" + two, path: "kernel"},
		{name: "just jumbo", rule: "more0" + two, path: "afxdp", note: "path afxdp: the kernel path cannot copy frames of more than 3520 bytes to 2 outputs, and the MTU of more0 is 3503"},
		{name: "jumbo, short MTU of the output", rule: "jumbo0" + one, kernel: &Capabilities{}, path: "kernel"},
		{name: "jumbo, old kernel", rule: "jumbo0" + to("long0"), kernel: &Capabilities{}, path: "fanout",
			note: "path fanout: interface long0 does not send redirected frames of more than 3520 bytes, which come in several buffers (Linux 6.3, and a driver that can), and the MTU of jumbo0 is 9000; not path afxdp: AF_XDP sockets take no frames of more than 3520 bytes before Linux 6.6, and the MTU of jumbo0 is 9000"},
		{name: "jumbo, kernel with sockets", rule: "jumbo0" + to("long0"), kernel: &Capabilities{SocketSG: true}, path: "afxdp", note: "path afxdp: interface long0 does not send redirected frames of more than 3520 bytes, which come in several buffers (Linux 6.3, and a driver that can), and the MTU of jumbo0 is 9000"},
		{name: "jumbo, old kernel, kernel", rule: "jumbo0" + to("long0") + " path=kernel", kernel: &Capabilities{}, path: "kernel",
			note: "interface long0 does not send redirected frames of more than 3520 bytes, which come in several buffers (Linux 6.3, and a driver that can), and the MTU of jumbo0 is 9000: they are dropped for the reason multi_buffer (path fanout can)"},
		{name: "jumbo, old kernel, afxdp", rule: "jumbo0" + one + " path=afxdp", kernel: &Capabilities{}, path: "afxdp",
			note: "AF_XDP sockets take no frames of more than 3520 bytes before Linux 6.6, and the MTU of jumbo0 is 9000: they are dropped for the reason multi_buffer (path fanout can)"},
		{name: "jumbo, driver without", rule: "jumbo0" + to("nosg0"), path: "afxdp", note: "path afxdp: interface nosg0 does not send redirected frames of more than 3520 bytes, which come in several buffers (Linux 6.3, and a driver that can), and the MTU of jumbo0 is 9000"},
		{name: "jumbo, driver that does not tell", rule: "jumbo0" + to("old0"), path: "afxdp", note: "path afxdp: interface old0 does not send redirected frames of more than 3520 bytes, which come in several buffers (Linux 6.3, and a driver that can), and the MTU of jumbo0 is 9000"},
		{name: "jumbo, generic", rule: "jumbo0" + to("nosg0"), edit: func(t *testing.T, w *World) { w.Answers.Attached[w.link(t, "jumbo0").LinkID] = Attached{Generic: true} }, path: "kernel"},

		// What is in force.
		{name: "from kernel, an output comes that does not transmit", rule: "eth0" + to("eth1", "mute0"), edit: carried(flow.PathKernel), path: "afxdp",
			note: "path afxdp: interface mute0 does not send redirected frames (its driver says so; a veth needs generic receive offload at its peer: ethtool -K PEER gro on, or off and on again if it was switched on while the veth was down)"},
		{name: "from fanout, the other program is gone", rule: "eth0" + two, edit: carried(flow.PathFanout), path: "kernel"},
		{name: "from afxdp, an output can transmit now", rule: "eth0" + two, edit: carried(flow.PathAFXDP), path: "kernel"},
		{name: "on afxdp, an output is absent", rule: "eth0" + to("eth1", "late0"), edit: carried(flow.PathAFXDP), path: "afxdp", note: "path afxdp: kept until it is known what interface late0 can do"},
		{name: "on fanout, an output is absent", rule: "eth0" + to("eth1", "late0"), edit: carried(flow.PathFanout), path: "fanout", note: "path fanout: kept until it is known what interface late0 can do"},
		{name: "on fanout, the peer of a veth is down", rule: "eth0" + to("eth1", "veth1"), edit: carried(flow.PathFanout), path: "fanout", note: "path fanout: kept until it is known what interface veth1 can do"},
		{name: "on afxdp, an output is absent and one has no Ethernet header", rule: "eth0" + to("tun0", "late0"), edit: carried(flow.PathAFXDP), path: "fanout",
			note: "path fanout: interface tun0 has no Ethernet header, which the kernel path needs; not path afxdp: interface tun0 has no Ethernet header"},
		{name: "on afxdp, an output is absent and no program is on the input", rule: "eth0" + to("eth1", "late0"), edit: func(t *testing.T, w *World) { carried(flow.PathAFXDP)(t, w); taken(t, w) }, path: "fanout", note: "path fanout: another program has it"},
		{name: "on afxdp, an output is absent and frames are too long", rule: "jumbo0" + to("late0"), kernel: &Capabilities{}, edit: carried(flow.PathAFXDP), path: "kernel"},
		{name: "on kernel, an output is absent", rule: "eth0" + to("eth1", "late0"), edit: carried(flow.PathKernel), path: "kernel"},
		{name: "on fanout, but the rule says kernel", rule: "eth0" + to("eth1", "late0") + " path=kernel", edit: carried(flow.PathFanout), path: "kernel"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, links, "a: 239.1.1.1:5000%"+tt.rule)
			if tt.edit != nil {
				tt.edit(t, &w)
			}
			kernel := all
			if tt.kernel != nil {
				kernel = *tt.kernel
			}
			p := Make(w, Options{Kernel: kernel})
			check(t, &w, p)
			f := p.Rules[0].Flows[0]
			note, path := f.Note(), ""
			if f.Publish {
				path = PathName(f.Flow.Path)
			} else if err := f.Err(); err != nil {
				note = err.Error()
			}
			if path != tt.path || note != tt.note {
				t.Errorf("path %q, %q; want %q, %q", path, note, tt.path, tt.note)
			}
		})
	}
}

// TestFlappingOutput: an output of another kind comes and goes. The flow moves once.
func TestFlappingOutput(t *testing.T) {
	for _, late := range []string{"br9 10.9.0.1 kind=bridge notx", "tun9 10.9.0.1 noeth", "veth9 10.9.0.1 kind=veth notx"} {
		name, _, _ := strings.Cut(late, " ")
		without := newWorld(t, three, "a: 239.1.1.1:5000%eth0 -> 239.2.2.2:6000%eth1 239.2.2.2:6000%"+name)
		with := newWorld(t, append(slices.Clone(three), late), "a: 239.1.1.1:5000%eth0 -> 239.2.2.2:6000%eth1 239.2.2.2:6000%"+name)
		planner := New(Options{})
		var carried map[string]flow.Path
		var paths []flow.Path
		for i := range 6 {
			w := without
			if i%2 == 1 {
				w = with
			}
			w.Answers.Carried = carried
			p := planner.Plan(w)
			check(t, &w, p)
			carried = inForce(p)
			paths = append(paths, p.Rules[0].Flows[0].Flow.Path)
			if ready := p.Rules[0].Complete(); ready != (i%2 == 1) {
				t.Errorf("%s, step %d: the rule is %s (%s)", late, i, p.Rules[0].State, p.Rules[0].Reason)
			}
		}
		if other := paths[1]; other == flow.PathKernel || !slices.Equal(paths, []flow.Path{flow.PathKernel, other, other, other, other, other}) {
			t.Errorf("%s: paths %v", late, paths)
		}
	}
}

// TestFallback: the kernel path stands in for AF_XDP sockets where it could carry the flow.
func TestFallback(t *testing.T) {
	w := newWorld(t, []string{"eth0", "eth1 10.1.0.1", "mute0 10.2.0.1 notx", "jumbo0 mtu=9000"},
		"could: 239.1.1.1:5000%eth0 -> 239.2.2.2:1%eth1 path=afxdp", "mute: 239.1.1.2:5000%eth0 -> 239.2.2.2:1%mute0 path=afxdp",
		"jumbo: 239.1.1.1:5000%jumbo0 -> 239.2.2.2:1%eth1 239.2.2.3:1%eth1 path=afxdp", "kernel: 239.1.1.3:5000%eth0 -> 239.2.2.2:1%eth1")
	p := Make(w, Options{Kernel: Capabilities{SocketSG: true}})
	for name, want := range map[string]bool{"could": true, "mute": false, "jumbo": false, "kernel": false} {
		if _, f := p.Flow(name); f.Flow.Fallback != want {
			t.Errorf("%s: fallback %v, want %v", name, f.Flow.Fallback, want)
		}
	}
}

// TestSteers: when packets of the fanout path are spread over CPUs.
func TestSteers(t *testing.T) {
	native, generic, none := Attached{}, Attached{Generic: true}, Attached{Err: errTaken}
	for _, tt := range []struct {
		link     string
		steering Steering
		workers  int
		attached Attached
		want     bool
	}{
		{"eth0 hardware queues=1", SteerAuto, 2, native, true},
		{"eth0 hardware queues=2", SteerAuto, 2, native, false},
		{"eth0 hardware queues=0", SteerAuto, 2, native, false},
		{"eth0 queues=1", SteerAuto, 2, native, false},
		{"eth0 queues=1", SteerOn, 2, native, true},
		{"eth0 queues=1", SteerOn, 2, generic, false},
		{"eth0 queues=1", SteerOn, 2, none, false},
		{"eth0 hardware queues=1", SteerOff, 2, native, false},
		{"eth0 noeth queues=1", SteerOn, 2, native, false},
	} {
		w := newWorld(t, []string{tt.link, "eth1 10.1.0.1"}, "a: 239.1.1.1:5000%eth0 -> 239.2.2.2:6000%eth1 path=fanout")
		w.Answers.Attached[w.link(t, "eth0").LinkID] = tt.attached
		p := Make(w, Options{Steering: tt.steering, FanoutWorkers: tt.workers})
		if got := p.Rules[0].Flows[0].Flow.Steered; got != tt.want {
			t.Errorf("%+v: %v", tt, got)
		}
	}
	if w := newWorld(t, []string{"eth0 hardware", "eth1 10.1.0.1"}, "a: 239.1.1.1:5000%eth0 -> 239.2.2.2:6000%eth1"); Make(w, Options{Steering: SteerOn, FanoutWorkers: 9}).Rules[0].Flows[0].Flow.Steered {
		t.Error("a flow of the kernel path is steered")
	}
	for _, s := range []Steering{SteerAuto, SteerOn, SteerOff} {
		if got, err := ParseSteering(s.String()); err != nil || got != s {
			t.Errorf("%v: %v, %v", s, got, err)
		}
	}
	if _, err := ParseSteering("yes"); err == nil || !strings.Contains(err.Error(), `steering "yes": want auto, on or off`) {
		t.Error(err)
	}
}

// TestSets: what a plan wants besides flows.
func TestSets(t *testing.T) {
	w := newWorld(t, []string{"eth0 10.0.0.1", "eth1 10.1.0.1", "eth2", "tun0 10.3.0.1 noeth", "br0 kind=bridge", "eth5 master=br0 down", "eth6", "eth7", "lo lo"},
		"a: 239.1.1.1:5000%eth0,vlan=7 -> 239.2.2.2:1%eth1 10.1.0.5:1%eth1 239.2.2.2:1%tun0",
		"b: 239.1.1.1:5000%eth5 -> 239.2.2.2:1%eth1 10.1.0.5:7%eth1 10.9.9.9:1%tun0",
		"c: 239.1.1.0/30%eth5,join=all -> 239.2.2.2:1%eth9",
		"d: 239.1.2.0/24%eth5,join=239.1.2.7+239.1.2.8 -> 10.1.0.6:1%eth1",
		"e: 10.7.0.0/16%eth2 -> 239.2.2.2:1%eth1",
		"f: 10.0.0.9@239.1.1.1:5000%eth0 -> 239.2.2.2:1%eth1,src=keep",
		"g: 239.1.1.1:5000%lo -> 239.2.2.2:1%eth7",
	)
	w.setHop(t, "eth1", "10.1.0.5", network.Hop{Kind: network.HopUnicast, Via: addr("10.1.0.254"), Gateway: true})
	w.Answers.Tags[w.link(t, "eth0").LinkID] = nil
	p := Make(w, Options{Interfaces: []string{"eth6", "none", "tun0"}})
	check(t, &w, p)
	id := func(name string) network.LinkID { return w.link(t, name).LinkID }
	if want := []network.LinkID{id("eth0"), id("eth1"), id("eth2"), id("eth5"), id("eth6"), id("eth7")}; !slices.Equal(p.Attach, want) {
		t.Errorf("attach %v, want %v", p.Attach, want)
	}
	if want := []network.LinkID{id("eth0")}; !slices.Equal(p.Tags, want) {
		t.Errorf("tags %v, want %v", p.Tags, want)
	}
	if want := []network.HopKey{{Link: id("eth1"), Dst: addr("10.1.0.5")}, {Link: id("eth1"), Dst: addr("10.1.0.6")}}; !slices.Equal(p.Hops, want) {
		t.Errorf("ways %v, want %v", p.Hops, want)
	}
	if want := []network.NeighbourKey{{Index: 2, Addr: addr("10.1.0.254")}}; !slices.Equal(p.Neighbours, want) {
		t.Errorf("neighbours %v, want %v", p.Neighbours, want)
	}
	var want []Membership
	want = append(want, Membership{Link: id("eth0"), Group: addr("239.1.1.1")})
	for _, group := range []string{"239.1.1.1", "239.1.1.0", "239.1.1.2", "239.1.1.3", "239.1.2.7", "239.1.2.8"} {
		want = append(want, Membership{Link: id("eth5"), Group: addr(group)}, Membership{Link: id("br0"), Group: addr(group)})
	}
	want = append(want, Membership{Link: id("eth0"), Group: addr("239.1.1.1"), Source: addr("10.0.0.9")})
	got := newDistinct[Membership](0)
	for m := range p.Memberships() {
		got.add(m)
	}
	if got := got.list; !slices.Equal(got, want) {
		t.Errorf("memberships %v, want %v", got, want)
	}
}

// TestGuardedFlows: the loop guard watches every rule that does not refuse it, goes by numbers
// where a circle is meant, and is in front of the workers where the relay program is.
func TestGuardedFlows(t *testing.T) {
	for _, c := range []struct {
		rule                       string
		attached                   Attached
		unguarded, twoWay, fronted bool
	}{
		{rule: "eth0 -> 239.2.2.1:6000%eth1"},
		{rule: "eth0,loop-guard=off -> 239.2.2.1:6000%eth1", unguarded: true},
		{rule: "eth0,loop=two-way -> 239.2.2.1:6000%eth1", twoWay: true},
		{rule: "eth0,loop=two-way -> 239.2.2.1:6000%eth1 path=afxdp", twoWay: true},
		{rule: "eth0,loop=two-way,loop-guard=off -> 239.2.2.1:6000%eth1", unguarded: true, twoWay: true},
		{rule: "eth0,loop=allow -> 239.2.2.1:6000%eth1 path=fanout", twoWay: true, fronted: true},
		{rule: "eth0 -> 239.2.2.1:6000%eth1 path=fanout", fronted: true},
		{rule: "eth0 -> 239.2.2.1:6000%eth1 path=fanout", attached: Attached{Generic: true}, fronted: true},
		{rule: "eth0 -> 239.2.2.1:6000%eth1 path=fanout", attached: Attached{Err: errTaken}},
		{rule: "eth0,local=yes -> 239.2.2.1:6000%eth1 path=fanout"},
		{rule: "eth0,from=host -> 239.2.2.1:6000%eth1 path=fanout"},
		{rule: "tun0 -> 239.2.2.1:6000%eth1 path=fanout"},
	} {
		w := newWorld(t, []string{"eth0 10.0.0.1", "eth1 10.1.0.1", "tun0 noeth"}, "a: 239.1.1.1:5000%"+c.rule)
		w.Answers.Attached[w.link(t, "eth0").LinkID] = c.attached
		p := Make(w, Options{})
		f := p.Rules[0].Flows[0]
		if !f.Publish || f.Flow.Unguarded != c.unguarded || f.Flow.TwoWay != c.twoWay || f.Flow.Fronted != c.fronted {
			t.Errorf("%+v: published %v, flow %+v", c, f.Publish, f.Flow)
		}
	}
}
