package supervision

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"xdpcast/internal/control"
	"xdpcast/internal/labtest"
)

// Behind a snooping switch packets reach the relay only while it is a member, for all of its
// groups; and the relay shows the querier and its version.
func TestSnoopingSwitch(t *testing.T) {
	for _, c := range []struct {
		version       string
		from          string
		igmp, mld     uint8
		fence, groups string
		n             int
		querier       string // prefix of its address
	}{
		{"IGMPv3", "", 3, 2, "239.255.0.1", "239.1.1.1", 500, "10.0.0.254"},
		{"IGMPv3", "10.0.0.1@", 3, 2, "232.255.0.1", "232.1.1.1", 100, "10.0.0.254"},
		{"IGMPv2", "", 2, 2, "239.255.0.1", "239.1.1.1", 500, "10.0.0.254"},
		{"MLDv2", "", 3, 2, "ff1e::ff:1", "ff1e::1:1", 100, "fe80::"},
		{"MLDv2", "fd00::1@", 3, 2, "ff3e::ff:1", "ff3e::1:1", 100, "fe80::"},
		{"MLDv1", "", 3, 1, "ff1e::ff:1", "ff1e::1:1", 100, "fe80::"},
	} {
		t.Run(c.from+c.version, func(t *testing.T) {
			n := newNetwork(t, snooping(t, c.igmp, c.mld))
			n.from = c.from
			fence, groups := netip.MustParseAddr(c.fence), consecutive(c.groups, c.n)
			n.apply(t, fence)
			labtest.Eventually(t, "the querier is heard, and answered in its version", func() bool {
				g := n.groups(t)[0]
				return strings.HasPrefix(g.Querier, c.querier) && g.Version == c.version
			})
			labtest.Eventually(t, "the switch forwards only what is joined", func() bool {
				got, ok := n.probe(fence, groups[:1])
				return ok && len(got.stack) == 0
			})
			none := map[netip.Addr]int{}
			n.mustReach(t, fence, groups, reached{none, none})

			n.apply(t, append(groups, fence)...)
			labtest.Eventually(t, "all groups come through the switch", func() bool {
				got, ok := n.probe(fence, groups)
				return ok && len(got.sink) == len(groups)
			})
			for range 3 {
				n.mustReach(t, fence, groups, reached{none, once(groups)})
			}
			checkGroups(t, n.groups(t), len(groups)+1, c.version, c.querier)
			n.checkInterface(t, fence.Is4(), c.version, c.querier)

			stay, leave := groups[:c.n/2], groups[c.n/2:]
			n.apply(t, append(append([]netip.Addr{}, stay...), fence)...)
			labtest.Eventually(t, "the switch keeps back what was left", func() bool {
				got, ok := n.probe(fence, leave)
				return ok && len(got.stack) == 0
			})
			n.mustReach(t, fence, groups, reached{none, once(stay)})
		})
	}
}

func once(groups []netip.Addr) map[netip.Addr]int {
	counts := make(map[netip.Addr]int, len(groups))
	for _, g := range groups {
		counts[g] = 1
	}
	return counts
}

func (n *network) mustReach(t *testing.T, fence netip.Addr, groups []netip.Addr, want reached) {
	t.Helper()
	got, ok := n.probeFor(labtest.Timeout, fence, groups)
	if !ok {
		t.Fatal("a fence was lost")
	}
	for _, g := range groups {
		if got.stack[g] != want.stack[g] || got.sink[g] != want.sink[g] {
			t.Errorf("%s came %d times to the relay without a rule and %d times to the sink, want %d and %d", g, got.stack[g], got.sink[g], want.stack[g], want.sink[g])
		}
	}
}

func checkGroups(t *testing.T, all []control.Group, want int, version, querier string) {
	t.Helper()
	if len(all) != want {
		t.Fatalf("%d memberships, want %d", len(all), want)
	}
	for _, g := range all {
		wantDetail := "joined, receiving, querier " + g.Querier
		if g.State != control.GroupJoined || g.Detail != wantDetail || g.Version != version || !strings.HasPrefix(g.Querier, querier) || g.QuerierSeen == nil || g.Queries == 0 {
			t.Fatalf("membership %+v, want it joined, with %s, querier %s and detail %q", g, version, querier, wantDetail)
		}
	}
}

func (n *network) checkInterface(t *testing.T, is4 bool, version, querier string) {
	t.Helper()
	s, err := n.r.Status(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range s.Interfaces {
		m := i.MLD
		if is4 {
			m = i.IGMP
		}
		switch {
		case i.Name == "in" && (m == nil || m.Version != version || !strings.HasPrefix(m.Querier, querier)):
			t.Errorf("interface in: %+v, want %s and querier %s", m, version, querier)
		case i.Name == "out" && m != nil:
			t.Errorf("interface out: %+v, want nothing", m)
		}
	}
}

// Between two hosts there is no querier, which is not an error.
func TestNoQuerier(t *testing.T) {
	n := newNetwork(t, plain(t))
	group := netip.MustParseAddr("239.1.1.1")
	n.apply(t, group)
	want := func(detail string) {
		t.Helper()
		g := n.groups(t)[0]
		if g.Detail != detail || g.State != control.GroupJoined || g.Version != "IGMPv3" || g.Querier != "" || g.QuerierSeen != nil || g.Queries != 0 {
			t.Errorf("membership %+v, want detail %q, IGMPv3 and no querier", g, detail)
		}
	}
	want("joined, no packet yet, no querier heard")
	n.send.Send(frame(group, []byte("first")))
	n.receive.Collect(1, func(b []byte) bool { _, _, ok := payload(b, outPort); return ok })
	want("joined, receiving, no querier heard")
}

// 64 rules on one interface, 64 streams at once: every packet of every stream reaches its output,
// once, in order and unchanged.
func TestManyStreams(t *testing.T) {
	const streams, packets, lot = 64, 200, 64
	n := newNetwork(t, plain(t))
	groups := consecutive("239.64.1.1", streams)
	n.apply(t, groups...)
	for _, g := range n.groups(t) {
		if g.State != control.GroupJoined {
			t.Fatalf("membership %+v", g)
		}
	}
	next := map[netip.Addr]uint32{}
	for sequence := range uint32(packets) {
		for _, g := range groups {
			n.send.Send(frame(g, streamPayload(g, sequence)))
		}
		// A batch fits the shortest queue on the path.
		for _, b := range n.receive.Collect(lot, func(b []byte) bool { _, _, ok := payload(b, outPort); return ok }) {
			g, data, _ := payload(b, outPort)
			if want := streamPayload(g, next[g]); !bytes.Equal(data, want) {
				t.Fatalf("%s: packet %x, want number %d, %x", g, data, next[g], want)
			}
			next[g]++
		}
	}
	for _, g := range groups {
		if next[g] != packets {
			t.Errorf("%s: %d packets, want %d", g, next[g], packets)
		}
	}
	n.checkStreams(t, streams, packets)
}

// streamPayload differs between groups and packets, in content and in length.
func streamPayload(group netip.Addr, sequence uint32) []byte {
	b := binary.BigEndian.AppendUint32([]byte(fmt.Sprint(group, " ")), sequence)
	return append(b, bytes.Repeat([]byte{byte(sequence)}, int(sequence)%97)...)
}

func (n *network) checkStreams(t *testing.T, streams, packets int) {
	t.Helper()
	s, err := n.r.Stats(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Rules) != streams || len(s.Drops) != 0 || len(s.TransmitDrops) != 0 {
		t.Errorf("%d rules, drops %+v, %+v, want %d and none", len(s.Rules), s.Drops, s.TransmitDrops, streams)
	}
	for _, r := range s.Rules {
		if r.Matched.Packets != uint64(packets) || len(r.Outputs) != 1 || r.Outputs[0].Sent != r.Matched {
			t.Errorf("rule %s: matched %+v, outputs %+v, want %d packets", r.Name, r.Matched, r.Outputs, packets)
		}
	}
}
