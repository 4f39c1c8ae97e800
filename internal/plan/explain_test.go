package plan

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"xdpcast/internal/network"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

func explain(t testing.TB, p *Plan, text string, known Known) Explanation {
	t.Helper()
	k, err := p.ParsePacket(text)
	if err != nil {
		t.Fatal(err)
	}
	return p.Explain(k, known)
}

func (e *Explanation) names() (all []string) {
	for _, c := range e.Candidates {
		all = append(all, c.Rule.Rule.Name)
	}
	return all
}

// TestExplain: the precedence of rules that overlap, what the winner does, and why nothing takes a
// packet.
func TestExplain(t *testing.T) {
	w := newWorld(t, []string{"in0 10.0.0.1 alt=uplink", "out0 10.1.0.1", "out1 10.2.0.1"},
		"sourced: 10.0.0.2@239.1.1.1:5000%in0 -> 239.2.2.1:6000%out0",
		"any-port: 239.1.1.1%in0 -> 239.2.2.1:6000%out0",
		"wide: 239.1.0.0/16%in0,join=none -> 239.2.2.1:6000%out0",
		"narrow: 239.1.1.0/24%in0,join=none -> 239.7.7.0/24:+10%out0 10.1.0.5:7000%out1,ttl=dec,sport=9",
		"pattern: 239.1.1.1:5000%in+ -> 239.2.2.1:6000%out0",
		"later: 239.1.1.1:5000%eth9 -> 239.2.2.1:6000%out0",
		"down: 239.8.1.1:5000%in0 -> 239.2.2.1:6000%nowhere+",
		"loop: 239.9.1.1:5000%in0,loop=allow -> 239.2.2.1:6000%out0",
	)
	w.setHop(t, "out1", "10.1.0.5", network.Hop{Kind: network.HopUnicast, Via: addr("10.1.0.5")})
	p := Make(w, Options{})

	e := explain(t, p, "10.0.0.2@239.1.1.1:5000%in0", Known{})
	if want := []string{"sourced", "pattern", "any-port", "narrow", "wide"}; !slices.Equal(e.names(), want) {
		t.Errorf("candidates %v, want %v", e.names(), want)
	}
	if want := "rule sourced takes it: (source, group, port) comes before (any source, group, port)"; e.Why != want {
		t.Errorf("why is %q, want %q", e.Why, want)
	}
	if len(e.Memberships) != 1 || e.Memberships[0].Source != addr("10.0.0.2") || e.Path != "kernel" || e.PathReason != "native XDP on in0" || len(e.Notes) != 0 {
		t.Errorf("%+v", e)
	}
	if by := explain(t, p, "10.0.0.2@239.1.1.1:5000%uplink", Known{}); by.Why != e.Why || !slices.Equal(by.names(), e.names()) || by.Packet.Interface != "uplink" {
		t.Errorf("by another name: %+v", by)
	}

	e = explain(t, p, "10.0.0.9@239.1.1.7:5000%in0", Known{})
	if want := []string{"narrow", "wide"}; !slices.Equal(e.names(), want) || e.Candidates[0].Kind != "any source, prefix of 24 bits, any port" || len(e.Memberships) != 0 {
		t.Errorf("%+v", e)
	}
	o := e.Outputs
	if o[0].Rewrite != "to 239.7.7.7:5010, from 10.1.0.1, source port kept" || o[0].Dropped || o[0].Output != "239.7.7.0/24:+10%out0" {
		t.Errorf("%+v", o[0])
	}
	if o[1].Rewrite != "to 10.1.0.5:7000, from 10.2.0.1:9, ttl one less" || !o[1].Dropped || o[1].State != NoNeighbour || o[1].NextHop != "" {
		t.Errorf("%+v", o[1])
	}
	if via, mac := p.NextHop(&o[1].OutputPlan); via != "10.1.0.5" || mac != "" {
		t.Errorf("next hop %s, %s", via, mac)
	}
	if via, mac := p.NextHop(&o[0].OutputPlan); via != "" || mac != "" {
		t.Errorf("next hop of a group %s, %s", via, mac)
	}
	w.setHop(t, "out1", "10.1.0.5", network.Hop{Kind: network.HopUnicast, Via: addr("10.2.0.254"), Gateway: true, Resolved: true, MAC: [6]byte{2, 0, 0, 0, 0, 0x33}})
	p = Make(w, Options{})
	e = explain(t, p, "239.1.1.7%in0", Known{})
	if e.Outputs[1].NextHop != "gateway 10.2.0.254 of 10.1.0.5 at 02:00:00:00:00:33" || e.Outputs[0].Rewrite != "to 239.7.7.7, port +10, from 10.1.0.1, source port kept" {
		t.Errorf("%+v", e.Outputs)
	}
	if via, mac := p.NextHop(&e.Outputs[1].OutputPlan); via != "10.2.0.254" || mac != "02:00:00:00:00:33" {
		t.Errorf("next hop %s, %s", via, mac)
	}

	for packet, want := range map[string]string{
		"239.1.1.1:5000%eth7":         "no rule takes it: interface eth7 not found",
		"239.9.2.1:5000%in0":          "no rule takes it: it passes to the host unchanged",
		"239.1.1.1:5000%in0,vlan=3":   "no rule takes it: rule any-port (239.1.1.1%in0) takes another VLAN",
		"239.1.1.1:5000%out1":         "no rule takes it: rule any-port (239.1.1.1%in0) takes another interface",
		"239.8.1.1:5001%in0":          "no rule takes it: rule down (239.8.1.1:5000%in0) takes another port",
		"239.8.1.1:5000%in0":          "rule down would take it, but is not in the kernel: no interface matches nowhere+",
		"239.1.1.1:5000%eth9":         "rule later would take it, but is not in the kernel: interface eth9 not found",
		"239.1.2.1:5000%in0":          "rule wide takes it: no other matches",
		"10.1.0.1@239.1.2.1:5%in0":    "rule wide takes it and drops it, reason loop: 10.1.0.1 is an address of this host (loop=allow on the input takes packets that come back from the network; packets that this host itself sends there do not arrive on the interface, and are never relayed)",
		"10.1.0.1@239.9.1.1:5000%in0": "rule loop takes it: no other matches",
		"loop":                        "rule loop takes it: no other matches",
	} {
		e := explain(t, p, packet, Known{})
		if e.Why != want {
			t.Errorf("%s: %q, want %q", packet, e.Why, want)
		}
		dropped := strings.Contains(want, "reason loop")
		if len(e.Outputs) > 0 && e.Outputs[0].Dropped != (dropped || !e.Flow.Publish) {
			t.Errorf("%s: output %+v", packet, e.Outputs[0])
		}
	}
	for packet, want := range map[string]string{
		"none":                    `no rule is named "none": want a rule's name, or a packet as [SOURCE@]ADDRESS[:PORT]%INTERFACE[,vlan=ID]`,
		"239.1.0.0/16%in0":        `packet "239.1.0.0/16%in0": want one address on one interface, with no option but vlan and from`,
		"239.1.1.1%in+":           `packet "239.1.1.1%in+": want one address on one interface, with no option but vlan and from`,
		"239.1.1.1%in0,local=yes": `packet "239.1.1.1%in0,local=yes": want one address on one interface, with no option but vlan and from`,
	} {
		if _, err := p.ParsePacket(packet); err == nil || err.Error() != want || errors.Is(err, ErrNoRule) != (packet == "none") {
			t.Errorf("%s: %v", packet, err)
		}
	}
	if _, err := p.ParsePacket("x%y%z"); err == nil {
		t.Error("no error")
	}
}

// TestExplainPath: why the packets travel as they do, and what else there is to know.
func TestExplainPath(t *testing.T) {
	w := newWorld(t, []string{"br0 kind=bridge", "eth0 master=br0", "eth1 10.1.0.1", "tun0 noeth"},
		"a: 10.0.0.9@232.1.1.1:5000%eth0 -> 239.2.2.1:6000%eth1 239.2.2.2:6000%eth1", "t: 239.1.1.1:5000%tun0 -> 239.2.2.1:6000%eth1", "six: 2001:db8::9@[ff35::1]:5000%eth0,join=none -> [ff05::2]:5000%eth1,src=keep",
		"f: 239.1.1.2:5000%tun0 -> 239.2.2.1:6000%eth1 path=fanout", "v6: 2001:db8::9@[ff35::2]:5000%eth0 -> [ff05::2]:5000%eth1,src=keep")
	p := Make(w, Options{})
	const bridged = "interface eth0 is a port of the bridge br0, which answers queries for it: groups are joined on br0, too"
	e := explain(t, p, "a", Known{QuerierVersion: 2})
	if len(e.Notes) != 2 || e.Notes[0] != bridged || e.Notes[1] != "the querier on eth0 speaks IGMPv2, which has no sources: the network only learns of group 232.1.1.1 alone, not of source 10.0.0.9, and delivers every sender's packets (want IGMPv3)" {
		t.Errorf("notes %q", e.Notes)
	}
	if len(e.Memberships) != 2 {
		t.Errorf("memberships %v", e.Memberships)
	}
	for packet, known := range map[string]int{"a": 3, "v6": 2, "six": 1, "t": 1} {
		if e := explain(t, p, packet, Known{QuerierVersion: known}); strings.Contains(strings.Join(e.Notes, ""), "querier on") {
			t.Errorf("%s with version %d: %q", packet, known, e.Notes)
		}
	}
	if e := explain(t, p, "v6", Known{QuerierVersion: 1}); len(e.Notes) != 2 || !strings.Contains(e.Notes[1], "speaks MLDv1") || !strings.Contains(e.Notes[1], "(want MLDv2)") {
		t.Errorf("notes %q", e.Notes)
	}
	w.Answers.Attached[w.link(t, "eth0").LinkID] = Attached{Generic: true}
	p = Make(w, Options{})
	for packet, want := range map[string]string{
		"a": "path afxdp: interface eth0 runs XDP in generic mode, which supports one output a rule: the kernel's copies would share one buffer",
		"t": "path fanout: interface tun0 has no Ethernet header", "f": "no program on tun0", "v6": "generic XDP on eth0",
	} {
		if e := explain(t, p, packet, Known{}); e.PathReason != want {
			t.Errorf("%s: %q, want %q", packet, e.PathReason, want)
		}
	}
}

// TestOverlaps: rules say which others take packets that they match, by whatever name.
func TestOverlaps(t *testing.T) {
	w := newWorld(t, []string{"in0 alt=uplink", "out0 10.1.0.1"}, "all: 239.1.0.0/16%uplink,join=none -> 239.2.2.7:6000%out0", "one: 239.1.1.1:5000%in0 -> 239.2.2.7:6000%out0", "else: 239.2.1.1:5000%in0 -> 239.2.2.7:6000%out0")
	got := Make(w, Options{}).Overlaps()
	if len(got) != 2 || !slices.Equal(got["all"].YieldsTo, []string{"one"}) || got["all"].WinsOver != nil || !slices.Equal(got["one"].WinsOver, []string{"all"}) || got["one"].YieldsTo != nil {
		t.Errorf("%+v", got)
	}
}

func TestMerge(t *testing.T) {
	for _, tt := range []struct {
		prefix, addr string
		bits         int
		want         string
	}{
		{"239.101.0.0", "239.1.2.3", 16, "239.101.2.3"},
		{"239.101.16.0", "239.1.255.3", 20, "239.101.31.3"},
		{"239.101.0.1", "239.1.2.3", 32, "239.101.0.1"},
		{"239.101.0.0", "239.1.2.3", 9, "239.1.2.3"},
		{"ff15:1::", "ff18:2::77", 32, "ff15:1::77"},
		{"ff15:1::", "239.1.2.3", 32, "ff15:1::"},
	} {
		if got := merge(addr(tt.prefix), addr(tt.addr), tt.bits); got != addr(tt.want) {
			t.Errorf("%v: %v", tt, got)
		}
	}
}

func TestRewriteText(t *testing.T) {
	k := Packet{Destination: addr("239.1.1.1"), Port: 5000}
	for _, tt := range []struct {
		rewrite packet.Rewrite
		rate    flow.Rate
		want    string
	}{
		{packet.Rewrite{DstPort: 1}, flow.Rate{}, "to 239.2.2.2:1, source kept"},
		{packet.Rewrite{PortAdd: true, SrcPort: 5, TTLMode: packet.TTLSet, TTL: 7, MinTTL: 2, SetDSCP: true, DSCP: 46, ZeroChecksum: true}, flow.Rate{Packets: 5, Burst: 2},
			"to 239.2.2.2:5000, source kept, from port 5, ttl 7, dropped with a ttl below 2, dscp 46, no UDP checksum, at most 5 packets a second, 2 at once"},
		{packet.Rewrite{DstPort: 1, VLAN: packet.VLANSet, VLANID: 7, OuterVLAN: 8, SetPCP: true, PCP: 1}, flow.Rate{Bits: 8, Burst: 9},
			"to 239.2.2.2:1, source kept, VLAN 8.7, priority 1, at most 8 bits a second, 9 bytes at once"},
		{packet.Rewrite{DstPort: 1, VLAN: packet.VLANSet, VLANID: 7}, flow.Rate{}, "to 239.2.2.2:1, source kept, VLAN 7"},
		{packet.Rewrite{DstPort: 1, VLAN: packet.VLANPop}, flow.Rate{}, "to 239.2.2.2:1, source kept, VLAN tags removed"},
		{packet.Rewrite{DstPort: 1, DstMAC: packet.BroadcastMAC}, flow.Rate{}, "to 239.2.2.2:1, to every host on the link, source kept"},
		{packet.Rewrite{PortAdd: true, PortShift: -5000}, flow.Rate{}, "to 239.2.2.2, dropped: port 0, source kept"},
	} {
		tt.rewrite.Dst = addr("239.2.2.2")
		if got := RewriteText(&flow.Output{Rewrite: tt.rewrite, Rate: tt.rate}, k); got != tt.want {
			t.Errorf("%q, want %q", got, fmt.Sprint(tt.want))
		}
	}
}
