package plan

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"xdpcast/internal/network"
	"xdpcast/pkg/flow"
)

const (
	toEth1 = " -> 239.2.2.2:6000%eth1"
	toBoth = " -> 239.2.2.2:6000%eth1 239.2.2.3:6000%eth2"
)

var three = []string{"eth0 10.0.0.1", "eth1 10.1.0.1", "eth2 10.2.0.1"}

// TestStates: topology, rules and answers, and what the plan says of them.
func TestStates(t *testing.T) {
	for _, tt := range []struct {
		name  string
		links []string
		rules []string
		edit  func(t *testing.T, w *World)
		want  []string // lines of describe
	}{
		{name: "all is well", rules: []string{"a: 239.1.1.1:5000%eth0" + toBoth},
			want: []string{"rule a active", "flow a on eth0 active kernel", "out a eth1 active", "out a eth2 active"}},

		// Inputs.
		{name: "input absent", rules: []string{"a: 239.1.1.1:5000%eth9" + toEth1}, want: []string{"rule a pending: interface eth9 not found"}},
		{name: "input down", links: []string{"eth0 down", "eth1 10.1.0.1"}, rules: []string{"a: 239.1.1.1:5000%eth0" + toEth1},
			want: []string{"rule a pending: interface eth0 is down", "flow a on eth0 pending kernel: interface eth0 is down", "out a eth1 active"}},
		{name: "input without carrier", links: []string{"eth0 nocarrier", "eth1 10.1.0.1"}, rules: []string{"a: 239.1.1.1:5000%eth0" + toEth1},
			want: []string{"rule a active", "note a: interface eth0 has no carrier"}},
		{name: "loopback", links: []string{"lo lo 127.0.0.1", "eth1 10.1.0.1"}, rules: []string{"a: 239.1.1.1:5000%lo" + toEth1},
			want: []string{"rule a failed: interface lo is the loopback: want one that leads to a network"}},
		{name: "input without Ethernet", links: []string{"tun0 noeth", "eth1 10.1.0.1"},
			rules: []string{"a: 239.1.1.1:5000%tun0" + toEth1, "k: 239.1.1.2:5000%tun0" + toEth1 + " path=kernel", "x: 239.1.1.3:5000%tun0" + toEth1 + " path=afxdp"},
			want: []string{"rule a active", "flow a on tun0 active fanout", "note a: path fanout: interface tun0 has no Ethernet header",
				"rule k failed: interface tun0 has no Ethernet header, which the kernel path needs", "rule x failed: interface tun0 has no Ethernet header, which the afxdp path needs"}},
		{name: "unicast inputs", rules: []string{"own: 10.2.0.1:5000%eth0" + toEth1, "other: 10.0.0.9:5000%eth0" + toEth1, "prefix: 10.7.0.0/16%eth0" + toEth1},
			want: []string{"rule own active", "rule prefix active",
				"rule other failed: address 10.0.0.9 is neither a multicast group nor an address of this host (on a router, take a prefix: it needs no address of this host)"}},

		// Names.
		{name: "alternative names", links: []string{"eth0 alt=enp3s0f0np0", "eth1 10.1.0.1 alt=enp3s0f1np1"},
			rules: []string{"a: 239.1.1.1:5000%enp3s0f0np0 -> 239.2.2.2:6000%enp3s0f1np1 239.2.2.2:6000%eth1 239.2.2.3:6000%eth1"},
			want:  []string{"rule a active: interface eth1 is known by several names: out[0] sends the same there", "flow a on eth0 active kernel: interface eth1 is known by several names: out[0] sends the same there", "out a eth1 active"}},
		{name: "one input by two names", links: []string{"eth0 alt=enp3s0f0np0", "eth1 10.1.0.1"},
			rules: []string{"a: 239.1.1.1:5000%enp3s0f0np0" + toEth1, "b: 239.1.1.1:5000%eth0" + toEth1},
			want:  []string{"rule b active", "rule a failed: interface eth0 is known by several names: rule b takes the same input by another of them: want an input of its own"}},
		{name: "one input by two names, one in force", links: []string{"eth0 alt=enp3s0f0np0", "eth1 10.1.0.1"},
			rules: []string{"a: 239.1.1.1:5000%enp3s0f0np0" + toEth1, "file/b: 239.1.1.1:5000%eth0" + toEth1},
			edit:  func(_ *testing.T, w *World) { w.Answers.Carried["a"] = flow.PathKernel },
			want:  []string{"rule a active", "rule b failed: interface eth0 is known by several names: rule a takes the same input by another of them: want an input of its own"}},
		{name: "one input by two names, one of the file", links: []string{"eth0 alt=x,y", "eth1 10.1.0.1"},
			rules: []string{"a: 239.1.1.1:5000%eth0" + toEth1, "file/b: 239.1.1.1:5000%x" + toEth1, "c: 239.1.1.1:5000%y" + toEth1},
			want:  []string{"rule b active", "flow b on eth0 active kernel"}},
		{name: "pattern and alternative name", links: []string{"eth0 alt=enp3", "eth1 10.1.0.1"}, rules: []string{"a: 239.1.1.1:5000%eth0+" + toEth1, "b: 239.1.1.1:5000%enp3" + toEth1},
			want: []string{"rule b active", "rule a pending: the interfaces that match eth0+ are taken: rule b takes the same on enp3"}},

		// Patterns.
		{name: "input pattern", links: []string{"lo lo", "in0", "in1 down", "tun0 noeth", "eth1 10.1.0.1"}, rules: []string{"a: 239.1.1.1:5000%+" + toEth1, "b: 239.1.1.1:5000%eth1" + toEth1, "c: 239.1.1.1:5000%x+" + toEth1},
			want: []string{"rule a active: on in1: interface in1 is down", "flow a%in0 on in0 active kernel", "flow a%in1 on in1 pending kernel: interface in1 is down", "flow b on eth1 active kernel", "rule c pending: no interface matches x+"}},
		{name: "longer pattern", links: []string{"in0", "in1", "in1b", "eth1 10.1.0.1"}, rules: []string{"a: 239.1.1.1:5000%in+" + toEth1, "b: 239.1.1.1:5000%in1+" + toEth1, "c: 239.1.1.1:5000%in1" + toEth1},
			want: []string{"flow a%in0 on in0 active kernel", "flow b%in1b on in1b active kernel", "flow c on in1 active kernel"}},
		{name: "output pattern", rules: []string{"a: 239.1.1.1:5000%eth0 -> 239.2.2.2:6000%x+", "b: 239.1.1.2:5000%eth0 -> 239.2.2.2:6000%eth+ 239.2.2.3:6000%x+"},
			want: []string{"rule a pending: no interface matches x+", "flow a on eth0 pending waits: no interface matches x+", "rule b active: no interface matches x+", "out b eth0 active", "out b eth1 active", "out b eth2 active"}},

		// Outputs.
		{name: "output absent", rules: []string{"a: 239.1.1.1:5000%eth0 -> 239.2.2.2:6000%eth9", "b: 239.1.1.2:5000%eth0 -> 239.2.2.2:6000%eth9 239.2.2.2:6000%eth1"},
			want: []string{"rule a pending: interface eth9 not found", "out a eth9 pending: interface eth9 not found", "rule b active: interface eth9 not found", "out b eth1 active"}},
		{name: "output that is the loopback", links: []string{"eth0", "lo lo 127.0.0.1"}, rules: []string{"a: 239.1.1.1:5000%eth0 -> 239.2.2.2:6000%lo"},
			want: []string{"out a lo pending: interface lo is the loopback: want one that leads to a network"}},
		{name: "no address to send from", links: []string{"eth0", "eth1"}, rules: []string{"a: 239.1.1.1:5000%eth0" + toEth1, "b: 239.1.1.2:5000%eth0" + toEth1 + ",src=keep", "c: [ff05::1]:5000%eth0 -> [ff05::2]:6000%eth1"},
			want: []string{"out a eth1 pending: interface eth1 has no IPv4 address to send from (or write src=keep, or src=ADDRESS)", "rule b active",
				"rule c pending: interface eth1 has no IPv6 address to send from (or write src=keep, or src=ADDRESS)"}},
		{name: "output down, without carrier", links: []string{"eth0", "eth1 10.1.0.1 down", "veth2 10.2.0.1 kind=veth nocarrier", "tun3 10.3.0.1 noeth nocarrier"},
			rules: []string{"a: 239.1.1.1:5000%eth0" + toEth1, "b: 239.1.1.2:5000%eth0 -> 239.2.2.2:6000%veth2", "c: 239.1.1.3:5000%eth0 -> 239.2.2.2:6000%tun3"},
			want: []string{"rule a pending: interface eth1 is down", "rule b pending: interface veth2 has no carrier", "out b veth2 pending: interface veth2 has no carrier",
				"rule c pending: interface tun3 has no carrier", "flow c on eth0 pending fanout: interface tun3 has no carrier"}},
		{name: "own address", rules: []string{"a: 239.1.1.1:5000%eth0 -> 10.2.0.1:6000%eth1 239.2.2.3:6000%eth2"},
			want: []string{"rule a failed: output 10.2.0.1:6000%eth1: 10.2.0.1 is an address of this host: want another host's, or a multicast group",
				"out a eth2 pending: output 10.2.0.1:6000%eth1: 10.2.0.1 is an address of this host: want another host's, or a multicast group"}},

		// Next hops.
		{name: "not asked for", rules: []string{"a: 239.1.1.1:5000%eth0 -> 10.1.0.5:6000%eth1"}, want: []string{"rule a pending: next hop is being looked up", "out a eth1 pending: next hop is being looked up"}},
		{name: "no answer", rules: []string{"a: 239.1.1.1:5000%eth0 -> 10.1.0.5:6000%eth1"}, edit: hop(network.Hop{Err: errTaken}),
			want: []string{"out a eth1 no_neighbour: next hop to 10.1.0.5 by interface eth1: another program has it", "blocked a eth1 no_neighbour", "rule a pending: next hop to 10.1.0.5 by interface eth1: another program has it"}},
		{name: "no route", rules: []string{"a: 239.1.1.1:5000%eth0 -> 10.1.0.5:6000%eth1 239.2.2.2:6000%eth2"}, edit: hop(network.Hop{Kind: network.HopNone}),
			want: []string{"rule a active: no route to 10.1.0.5 by interface eth1", "out a eth1 no_neighbour: no route to 10.1.0.5 by interface eth1"}},
		{name: "broadcast", rules: []string{"a: 239.1.1.1:5000%eth0 -> 10.1.0.5:6000%eth1"}, edit: hop(network.Hop{Kind: network.HopBroadcast}),
			want: []string{"rule a failed: output 10.1.0.5:6000%eth1: 10.1.0.5 is a broadcast address of the network of interface eth1: want a host's address, a multicast group, or broadcast=allow"}},
		{name: "local", rules: []string{"a: 239.1.1.1:5000%eth0 -> 10.1.0.5:6000%eth1"}, edit: hop(network.Hop{Kind: network.HopLocal}),
			want: []string{"rule a failed: output 10.1.0.5:6000%eth1: 10.1.0.5 is an address of this host: want another host's, or a multicast group"}},
		{name: "not resolved", rules: []string{"a: 239.1.1.1:5000%eth0 -> 10.1.0.5:6000%eth1"}, edit: hop(network.Hop{Kind: network.HopUnicast, Via: addr("10.1.0.5")}),
			want: []string{"out a eth1 no_neighbour: 10.1.0.5 has not answered yet on interface eth1"}},
		{name: "gateway that does not answer", rules: []string{"a: 239.1.1.1:5000%eth0 -> 10.1.0.5:6000%eth1"}, edit: hop(network.Hop{Kind: network.HopUnicast, Via: addr("10.1.0.254"), Gateway: true, Failed: true}),
			want: []string{"out a eth1 no_neighbour: gateway 10.1.0.254 of 10.1.0.5 does not answer on interface eth1"}},
		{name: "neighbour refused", rules: []string{"a: 239.1.1.1:5000%eth0 -> 10.1.0.5:6000%eth1"}, edit: func(t *testing.T, w *World) {
			hop(network.Hop{Kind: network.HopUnicast, Via: addr("10.1.0.5")})(t, w)
			w.Answers.Neighbours[network.NeighbourKey{Index: 2, Addr: addr("10.1.0.5")}] = errTaken
		}, want: []string{"out a eth1 no_neighbour: neighbour 10.1.0.5 on interface eth1: another program has it"}},
		{name: "neighbour table full", rules: []string{"a: 239.1.1.1:5000%eth0 -> 10.1.0.5:6000%eth1"}, edit: func(t *testing.T, w *World) {
			hop(network.Hop{Kind: network.HopUnicast, Via: addr("10.1.0.5")})(t, w)
			w.Answers.Neighbours[network.NeighbourKey{Index: 2, Addr: addr("10.1.0.5")}] = fmt.Errorf("no buffer space available: %w", ErrNeighbourTableFull)
		}, want: []string{"out a eth1 no_neighbour: the kernel's neighbour table has no room for 10.1.0.5 (sysctl net.ipv4.neigh.default.gc_thresh3, or ipv6): no buffer space available: the neighbour table is full"}},
		{name: "resolved", rules: []string{"a: 239.1.1.1:5000%eth0 -> 10.1.0.5:6000%eth1"}, edit: hop(network.Hop{Kind: network.HopUnicast, Via: addr("10.1.0.5"), Resolved: true, MAC: [6]byte{2, 9}}),
			want: []string{"rule a active", "out a eth1 active"}},
		{name: "no neighbours without Ethernet", links: []string{"eth0", "tun1 10.1.0.1 noeth"}, rules: []string{"a: 239.1.1.1:5000%eth0 -> 10.1.0.5:6000%tun1"}, want: []string{"rule a active", "out a tun1 active"}},

		// What is done to the input first.
		{name: "not attached yet", rules: []string{"a: 239.1.1.1:5000%eth0" + toEth1}, edit: func(_ *testing.T, w *World) { clear(w.Answers.Attached) },
			want: []string{"rule a pending: the relay program is being attached to interface eth0", "flow a on eth0 pending waits: the relay program is being attached to interface eth0",
				"out a eth1 pending: the relay program is being attached to interface eth0"}},
		{name: "not attached again yet", rules: []string{"a: 239.1.1.1:5000%eth0" + toEth1}, edit: func(_ *testing.T, w *World) {
			clear(w.Answers.Attached)
			w.Answers.Carried["a"] = flow.PathAFXDP
		}, want: []string{"flow a on eth0 pending afxdp: the relay program is being attached to interface eth0", "out a eth1 active"}},
		{name: "not attached again yet, and another path is asked for", rules: []string{"a: 239.1.1.1:5000%eth0" + toEth1 + " path=kernel"}, edit: func(_ *testing.T, w *World) {
			clear(w.Answers.Attached)
			w.Answers.Carried["a"] = flow.PathFanout
		}, want: []string{"flow a on eth0 pending waits: the relay program is being attached to interface eth0"}},
		{name: "cannot be attached", rules: []string{"a: 239.1.1.1:5000%eth0" + toEth1, "k: 239.1.1.2:5000%eth0" + toEth1 + " path=kernel", "x: 239.1.1.3:5000%eth0" + toEth1 + " path=afxdp", "f: 239.1.1.4:5000%eth0" + toEth1 + " path=fanout"},
			edit: func(t *testing.T, w *World) { w.Answers.Attached[w.link(t, "eth0").LinkID] = Attached{Err: errTaken} },
			want: []string{"flow a on eth0 active fanout", "note a: path fanout: another program has it", "rule k failed: another program has it", "rule x failed: another program has it", "flow f on eth0 active fanout"}},
		{name: "tags, not known yet", rules: []string{"a: 239.1.1.1:5000%eth0,vlan=7" + toEth1}, want: []string{"flow a on eth0 pending waits: interface eth0 is being made to leave VLAN tags in the frames"}},
		{name: "tags, kept meanwhile", rules: []string{"a: 239.1.1.1:5000%eth0,vlan=7" + toEth1}, edit: func(_ *testing.T, w *World) { w.Answers.Carried["a"] = flow.PathKernel },
			want: []string{"flow a on eth0 pending kernel: interface eth0 is being made to leave VLAN tags in the frames"}},
		{name: "tags, cannot be", rules: []string{"a: 239.1.1.1:5000%eth0,vlan=7" + toEth1, "b: 239.1.1.1:5000%eth0" + toEth1},
			edit: func(t *testing.T, w *World) { w.Answers.Tags[w.link(t, "eth0").LinkID] = errTaken }, want: []string{"rule a failed: another program has it", "rule b active"}},
		{name: "tags", rules: []string{"a: 239.1.1.1:5000%eth0,vlan=7" + toEth1}, edit: func(t *testing.T, w *World) { w.Answers.Tags[w.link(t, "eth0").LinkID] = nil }, want: []string{"rule a active"}},
		{name: "refused", rules: []string{"a: 239.1.1.1:5000%eth0" + toEth1}, edit: func(_ *testing.T, w *World) { w.Answers.Refused["a"] = errTaken },
			want: []string{"rule a failed: another program has it", "flow a on eth0 failed waits: another program has it", "out a eth1 pending: another program has it"}},

		// Memberships.
		{name: "join fails", rules: []string{"a: 239.1.1.1:5000%eth0" + toEth1}, edit: joinFails(false),
			want: []string{"rule a failed: another program has it; 3 tries, next at 10:20:30", "flow a on eth0 failed waits: another program has it; 3 tries, next at 10:20:30"}},
		{name: "join fails, in force", rules: []string{"a: 239.1.1.1:5000%eth0" + toEth1}, edit: func(t *testing.T, w *World) {
			joinFails(true)(t, w)
			w.Answers.Carried["a"] = flow.PathKernel
		}, want: []string{"rule a pending: another program has it; 3 tries, next at 10:20:30", "flow a on eth0 pending kernel: another program has it; 3 tries, next at 10:20:30", "out a eth1 active"}},
		{name: "bridge port", links: []string{"br0 kind=bridge", "eth0 master=br0", "eth1 10.1.0.1"}, rules: []string{"a: 239.1.1.1:5000%eth0" + toEth1, "b: 239.1.1.2:5000%eth0,join=none" + toEth1},
			want: []string{"rule a active", "note a: interface eth0 is a port of the bridge br0, which answers queries for it: groups are joined on br0, too", "flow b on eth0 active kernel"}},
		{name: "port of something else", links: []string{"vrf0 kind=vrf", "eth0 master=vrf0", "eth1 10.1.0.1"}, rules: []string{"a: 239.1.1.1:5000%eth0" + toEth1}, want: []string{"rule a active"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			links := tt.links
			if links == nil {
				links = three
			}
			w := newWorld(t, links, tt.rules...)
			if tt.edit != nil {
				tt.edit(t, &w)
			}
			p := Make(w, Options{})
			check(t, &w, p)
			has(t, p, tt.want)
			for _, r := range p.Rules {
				if strings.Contains(r.Note(), "not path afxdp") {
					continue // TestPaths
				}
				if note := "note " + r.Rule.Name; r.Note() != "" && !slices.ContainsFunc(tt.want, func(line string) bool { return strings.HasPrefix(line, note) }) {
					t.Errorf("rule %s has an unexpected note: %s", r.Rule.Name, r.Note())
				}
			}
		})
	}
}

func has(t testing.TB, p *Plan, want []string) {
	t.Helper()
	got := describe(p)
	for _, line := range want {
		if !slices.Contains(got, line) {
			t.Errorf("no line %q in\n%s", line, strings.Join(got, "\n"))
		}
	}
}

func hop(h network.Hop) func(*testing.T, *World) {
	return func(t *testing.T, w *World) { w.setHop(t, "eth1", "10.1.0.5", h) }
}

func joinFails(transient bool) func(*testing.T, *World) {
	return func(t *testing.T, w *World) {
		w.Answers.Joined[Membership{Link: w.link(t, "eth0").LinkID, Group: addr("239.1.1.1")}] = Join{
			Err: errTaken, Transient: transient, Tries: 3, Next: time.Date(2030, 1, 1, 10, 20, 30, 0, time.UTC),
		}
	}
}

// TestErrorsAreKept: the kernel's own errors can be matched.
func TestErrorsAreKept(t *testing.T) {
	w := newWorld(t, three, "k: 239.1.1.2:5000%eth0"+toEth1+" path=kernel", "j: 239.1.1.1:5000%eth0"+toEth1, "ok: 239.1.1.3:5000%eth2"+toEth1)
	w.Answers.Attached[w.link(t, "eth0").LinkID] = Attached{Err: errTaken}
	joinFails(true)(t, &w)
	p := Make(w, Options{})
	if k := p.Rule("k"); !errors.Is(k.Err(), errTaken) || !errors.Is(k.Fault(), errTaken) {
		t.Errorf("error is %v", k.Err())
	}
	if j := p.Rule("j"); j.Err() != nil || !errors.Is(j.Fault(), errTaken) {
		t.Errorf("a join that may heal: %v, %v", j.Err(), j.Fault())
	}
	if ok := p.Rule("ok"); ok.Fault() != nil || !ok.Complete() {
		t.Errorf("%+v, %v", ok, ok.Fault())
	}
	if p.Rule("none") != nil {
		t.Error("a rule that there is not is found")
	}
	if r, f := p.Flow("ok"); r != p.Rule("ok") || f != r.Flows[0] {
		t.Errorf("flow is %v of %v", f, r)
	}
	if r, f := p.Flow("none"); r != nil || f != nil {
		t.Error("a flow that there is not is found")
	}
}
