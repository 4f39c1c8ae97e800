package plan

import (
	"slices"
	"testing"
	"time"

	"xdpcast/internal/network"
	"xdpcast/pkg/flow"
)

// TestPlannerFollows: after each single change, and after it is taken back, a Planner plans as if it
// had seen nothing before; and each change is one that matters.
func TestPlannerFollows(t *testing.T) {
	links := []string{"br0 kind=bridge", "eth0 10.0.0.1 master=br0 alt=uplink", "eth1 10.1.0.1", "eth2 10.2.0.1", "veth0 10.3.0.1 kind=veth", "tun0 10.4.0.1 noeth"}
	start := func(t *testing.T) World {
		w := newWorld(t, links,
			"a: 239.1.1.1:5000%eth0 -> 239.2.2.1:1%eth1", "b: 239.1.1.2:5000%eth0,vlan=7 -> 239.2.2.1:1%eth1 239.2.2.1:1%veth0", "c: 10.4.0.1:5000%eth1 -> 239.2.2.1:1%eth2",
			"d: 239.1.1.3:5000%eth1 -> 10.1.0.5:1%eth2", "e: 239.1.1.4:5000%eth+ -> 239.2.2.1:1%veth0", "f: 239.1.1.5:5000%eth2 -> 239.2.2.1:1%e+", "g: 239.1.1.6:5000%eth2 -> 239.2.2.1:1%eth1 239.2.2.1:1%late0")
		w.setHop(t, "eth2", "10.1.0.5", network.Hop{Kind: network.HopUnicast, Via: addr("10.2.0.5")})
		w.Answers.Tags[w.link(t, "eth0").LinkID] = nil
		return w
	}
	edit := func(name string, change func(l *network.Link)) func(*testing.T, *World) {
		return func(t *testing.T, w *World) {
			all := slices.Clone(w.Network.Links())
			i := slices.Index(all, w.link(t, name))
			changed := *all[i]
			change(&changed)
			all[i] = &changed
			key := network.HopKey{Link: w.link(t, "eth2").LinkID, Dst: addr("10.1.0.5")}
			w.Network = network.NewSnapshot(all, map[network.HopKey]network.Hop{key: w.Network.Hop(key)})
		}
	}
	put := func(rule string) func(*testing.T, *World) {
		return func(t *testing.T, w *World) {
			r := parseRule(t, rule)
			w.Rules = slices.DeleteFunc(slices.Clone(w.Rules), func(o *Rule) bool { return o.Name == r.Name })
			at, _ := slices.BinarySearchFunc(w.Rules, r.Name, func(o *Rule, name string) int {
				if o.Name < name {
					return -1
				}
				return 1
			})
			w.Rules = slices.Insert(w.Rules, at, r)
		}
	}
	for name, change := range map[string]func(*testing.T, *World){
		"input down":                   edit("eth0", func(l *network.Link) { l.Up = false }),
		"output MTU":                   edit("eth1", func(l *network.Link) { l.MTU = 1400 }),
		"output MAC":                   edit("veth0", func(l *network.Link) { l.MAC[5]++ }),
		"output in two lives":          edit("eth1", func(l *network.Link) { l.Generation++ }),
		"output carrier":               edit("eth1", func(l *network.Link) { l.Carrier = false }),
		"output features":              edit("veth0", func(l *network.Link) { l.Features.Transmit = false }),
		"output renamed":               edit("veth0", func(l *network.Link) { l.Name = "late0" }),
		"alternative name":             edit("veth0", func(l *network.Link) { l.AltNames = []string{"late0"} }),
		"an address that a rule takes": edit("tun0", func(l *network.Link) { l.Addrs = nil }),
		"an address is ours now":       edit("tun0", func(l *network.Link) { l.Addrs = append(slices.Clone(l.Addrs), addr("10.1.0.5")) }),
		"another address":              edit("eth2", func(l *network.Link) { l.Addrs = nil }),
		"master of another kind":       edit("br0", func(l *network.Link) { l.Kind = "vrf" }),
		"master in two lives":          edit("br0", func(l *network.Link) { l.Generation++ }),
		"master renamed":               edit("br0", func(l *network.Link) { l.Name = "br1" }),
		"no port":                      edit("eth0", func(l *network.Link) { l.Master = 0 }),
		"next hop":                     func(t *testing.T, w *World) { w.setHop(t, "eth2", "10.1.0.5", network.Hop{Kind: network.HopNone}) },
		"neighbour": func(t *testing.T, w *World) {
			w.setHop(t, "eth2", "10.1.0.5", network.Hop{Kind: network.HopUnicast, Via: addr("10.2.0.5"), Resolved: true, MAC: [6]byte{2}})
		},
		"neighbour refused": func(t *testing.T, w *World) {
			w.Answers.Neighbours[network.NeighbourKey{Index: 4, Addr: addr("10.2.0.5")}] = errTaken
		},
		"attached in generic mode": func(t *testing.T, w *World) { w.Answers.Attached[w.link(t, "eth0").LinkID] = Attached{Generic: true} },
		"not attached":             func(t *testing.T, w *World) { delete(w.Answers.Attached, w.link(t, "eth1").LinkID) },
		"cannot be attached":       func(t *testing.T, w *World) { w.Answers.Attached[w.link(t, "eth2").LinkID] = Attached{Err: errTaken} },
		"tags":                     func(t *testing.T, w *World) { w.Answers.Tags[w.link(t, "eth0").LinkID] = errTaken },
		"tags not asked for":       func(t *testing.T, w *World) { clear(w.Answers.Tags) },
		"frames refused":           func(t *testing.T, w *World) { w.Answers.NoTransmit[w.link(t, "veth0").LinkID] = "some" },
		"join failed":              joinFails(false),
		"join failed on the master": func(t *testing.T, w *World) {
			w.Answers.Joined[Membership{Link: w.link(t, "br0").LinkID, Group: addr("239.1.1.1")}] = Join{Err: errTaken, Next: time.Unix(0, 0)}
		},
		"flow refused":                   func(_ *testing.T, w *World) { w.Answers.Refused["a"] = errTaken },
		"flow of a pattern refused":      func(_ *testing.T, w *World) { w.Answers.Refused["e%eth1"] = errTaken },
		"flow in force on a later path":  func(_ *testing.T, w *World) { w.Answers.Carried["g"] = flow.PathFanout },
		"rule removed":                   func(_ *testing.T, w *World) { w.Rules = slices.Delete(slices.Clone(w.Rules), 1, 2) },
		"rule replaced":                  put("a: 239.1.1.1:5000%eth0 -> 239.2.2.1:1%eth2"),
		"rule that wins over a pattern":  put("x: 239.1.1.4:5000%eth1 -> 239.2.2.1:1%eth2"),
		"rule that wins by another name": put("x: 239.1.1.4:5000%uplink -> 239.2.2.1:1%eth2"),
		"same input by another name":     put("0: 239.1.1.1:5000%uplink -> 239.2.2.1:1%eth2"),
		"same input of the file":         put("file/x: 239.1.1.1:5000%uplink -> 239.2.2.1:1%eth2"),
	} {
		t.Run(name, func(t *testing.T) {
			planner := New(Options{})
			w := start(t)
			before := planner.Plan(w)
			samePlan(t, "before", before, Make(w, Options{}))
			changed := start(t)
			changed.Rules, changed.Network = w.Rules, w.Network
			change(t, &changed)
			after := planner.Plan(changed)
			check(t, &changed, after)
			samePlan(t, "after", after, Make(changed, Options{}))
			if equalPlans(before, after) {
				t.Error("the change changes nothing")
			}
			back := planner.Plan(w)
			samePlan(t, "taken back", back, before)
		})
	}
}

// TestPlansAreShared: a plan is read while the next one is made. The race detector watches.
func TestPlansAreShared(t *testing.T) {
	w := newWorld(t, three, "a: 239.1.1.1:5000%eth+"+toEth1, "b: 239.1.1.1:5000%eth0"+toBoth, "c: 239.1.0.0/16%eth0,join=none"+toEth1)
	planner := New(Options{})
	p := planner.Plan(w)
	done := make(chan string)
	go func() {
		text := ""
		for range 100 {
			text = explain(t, p, "239.1.1.1:5000%eth0", Known{}).Why
			p.Overlaps()
		}
		done <- text
	}()
	for i := range 100 {
		next := w
		next.Network = flip(&w, "eth1")[i%2]
		next.Answers.Refused = map[string]error{"a": errTaken}
		planner.Plan(next)
	}
	if why, want := <-done, "rule b takes it: (any source, group, port) comes before (any source, prefix of 16 bits, any port)"; why != want {
		t.Errorf("why is %q, want %q", why, want)
	}
}
