package relay

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
	"xdpcast/pkg/rules"
)

func TestResolvePolicy(t *testing.T) {
	dst := addr("239.2.0.0")
	for _, tt := range []struct {
		name string
		out  rules.Output
		want packet.Rewrite
	}{
		{"plain", rules.Output{Address: addr("239.2.2.1"), Port: 6000},
			packet.Rewrite{DstMAC: [6]byte{1, 0, 0x5e, 2, 2, 1}, Dst: addr("239.2.2.1"), DstPort: 6000}},
		{"IPv6", rules.Output{Address: addr("ff15::1"), Port: 6000},
			packet.Rewrite{DstMAC: [6]byte{0x33, 0x33, 0, 0, 0, 1}, Dst: addr("ff15::1"), DstPort: 6000}},
		{"unicast has its MAC later", rules.Output{Address: addr("10.0.0.5"), Port: 6000},
			packet.Rewrite{Dst: addr("10.0.0.5"), DstPort: 6000}},
		{"broadcast", rules.Output{Address: addr("10.0.0.255"), Port: 9, Policy: rules.Policy{Broadcast: true}},
			packet.Rewrite{DstMAC: packet.BroadcastMAC, Dst: addr("10.0.0.255"), DstPort: 9}},
		{"prefix", rules.Output{Address: dst, Len: 16, PortMode: rules.PortKeep},
			packet.Rewrite{DstMAC: packet.MulticastMAC(dst), Dst: dst, DstLen: 16, PortAdd: true}},
		{"port added", rules.Output{Address: dst, PortMode: rules.PortAdd, PortShift: 1000},
			packet.Rewrite{DstMAC: packet.MulticastMAC(dst), Dst: dst, PortAdd: true, PortShift: 1000}},
		{"port taken away", rules.Output{Address: dst, PortMode: rules.PortAdd, PortShift: -1000},
			packet.Rewrite{DstMAC: packet.MulticastMAC(dst), Dst: dst, PortAdd: true, PortShift: -1000}},
		{"all of IP and UDP", rules.Output{Address: dst, Port: 1, Policy: rules.Policy{
			Source: rules.SourceAddress, SourceAddr: addr("10.0.0.9"), SourcePort: 7, TTL: rules.TTLSet, TTLValue: 9,
			DSCP: rules.DSCPSet, DSCPValue: 46, Checksum: rules.ChecksumZero, MinTTL: 3}},
			packet.Rewrite{DstMAC: packet.MulticastMAC(dst), Dst: dst, DstPort: 1, Src: addr("10.0.0.9"), SrcPort: 7,
				TTLMode: packet.TTLSet, TTL: 9, SetDSCP: true, DSCP: 46, ZeroChecksum: true, MinTTL: 3}},
		{"TTL less", rules.Output{Address: dst, Port: 1, Policy: rules.Policy{TTL: rules.TTLDecrement}},
			packet.Rewrite{DstMAC: packet.MulticastMAC(dst), Dst: dst, DstPort: 1, TTLMode: packet.TTLDecrement}},
		{"VLAN set", rules.Output{Address: dst, Port: 1, Policy: rules.Policy{VLAN: rules.VLANSet, VLANTags: rules.VLAN{ID: 5, Outer: 6}, PCPSet: true, PCP: 3}},
			packet.Rewrite{DstMAC: packet.MulticastMAC(dst), Dst: dst, DstPort: 1, VLAN: packet.VLANSet, VLANID: 5, OuterVLAN: 6, SetPCP: true, PCP: 3}},
		{"VLAN popped", rules.Output{Address: dst, Port: 1, Policy: rules.Policy{VLAN: rules.VLANPop}},
			packet.Rewrite{DstMAC: packet.MulticastMAC(dst), Dst: dst, DstPort: 1, VLAN: packet.VLANPop}},
	} {
		got := resolvePolicy(tt.out)
		if got.Rewrite != tt.want || got.Ready || got.Blocked != 0 {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
	}
}

func TestResolveRate(t *testing.T) {
	for _, tt := range []struct {
		rate rules.Rate
		mtu  int
		want loader.Rate
	}{
		{rules.Rate{}, 1500, loader.Rate{}},
		{rules.Rate{Packets: 1}, 1500, loader.Rate{Packets: 1, Burst: 1}},
		{rules.Rate{Packets: 100_000}, 1500, loader.Rate{Packets: 100_000, Burst: 1000}},
		{rules.Rate{Packets: 100, Burst: 7}, 1500, loader.Rate{Packets: 100, Burst: 7}},
		{rules.Rate{Bits: 1000}, 1500, loader.Rate{Bits: 1000, Burst: 1518}},
		{rules.Rate{Bits: 1000}, 9000, loader.Rate{Bits: 1000, Burst: 9018}},
		{rules.Rate{Bits: 80_000_000}, 1500, loader.Rate{Bits: 80_000_000, Burst: 100_000}},
		{rules.Rate{Bits: 80_000_000, Burst: 10}, 1500, loader.Rate{Bits: 80_000_000, Burst: 10}},
	} {
		if got := resolveRate(tt.rate, tt.mtu); got != tt.want {
			t.Errorf("%+v with MTU %d is %+v, want %+v", tt.rate, tt.mtu, got, tt.want)
		}
	}
}

func TestChoosePath(t *testing.T) {
	const kernel, sockets, tapped = loader.PathKernel, loader.PathAFXDP, loader.PathFanout
	for _, tt := range []struct {
		name      string
		path      rules.Path
		out       []string // interfaces
		edit      func(rule *rules.Rule, in *iface, n *instance)
		generic   bool
		want      loader.Path
		note, err string
	}{
		{name: "auto", out: []string{"eth1", "eth2"}, want: kernel},
		{name: "kernel, generic", path: rules.PathKernel, out: []string{"eth1"}, generic: true, want: kernel},
		{name: "fanout", path: rules.PathFanout, out: []string{"eth1"}, want: tapped},
		{name: "generic, several", out: []string{"eth1", "eth2"}, generic: true, want: sockets, note: "path afxdp: interface eth0 runs XDP in generic mode, which supports one output a rule"},
		{name: "kernel, generic, several", path: rules.PathKernel, out: []string{"eth1", "eth2"}, generic: true, err: "in generic mode, which supports one output a rule"},
		{name: "afxdp", path: rules.PathAFXDP, out: []string{"eth1"}, want: sockets},
		{name: "afxdp, output without Ethernet", path: rules.PathAFXDP, out: []string{"eth1", "tun0"}, err: "path afxdp: interface tun0 has no Ethernet header"},
		{name: "jumbo, one", out: []string{"eth1"}, edit: mtu(9000), want: kernel},
		{name: "jumbo, two", out: []string{"eth1", "eth2"}, edit: mtu(9000), want: sockets, note: "path afxdp: the kernel path cannot copy frames of more than 3520 bytes to 2 outputs, and the MTU of eth0 is 9000"},
		{name: "kernel, jumbo, two", path: rules.PathKernel, out: []string{"eth1", "eth2"}, edit: mtu(9000), want: kernel, note: "dropped for the reason multi_buffer"},
		{name: "just not jumbo", out: []string{"eth1", "eth2"}, edit: mtu(3502), want: kernel},
		{name: "just jumbo", out: []string{"eth1", "eth2"}, edit: mtu(3503), want: sockets, note: "3520"},
		{name: "local", out: []string{"eth1"}, edit: func(rule *rules.Rule, _ *iface, _ *instance) { rule.Accept.Local = true }, want: tapped, note: "local=yes"},
		{name: "input without Ethernet", out: []string{"eth1"}, edit: func(_ *rules.Rule, in *iface, _ *instance) { in.ethernet = false }, want: tapped, note: "interface eth0 has no Ethernet header"},
		{name: "input without XDP", out: []string{"eth1"}, edit: func(_ *rules.Rule, _ *iface, n *instance) { n.noXDP = errors.New("taken") }, want: tapped, note: "path fanout: taken"},
		{name: "output without Ethernet", out: []string{"eth1", "tun0"}, want: tapped, note: "interface tun0 has no Ethernet header"},
		{name: "output that does not transmit", out: []string{"eth1", "mute0"}, want: sockets, note: "interface mute0 does not send redirected frames"},
		{name: "output that is down", out: []string{"eth1", "down0"}, want: kernel},
		{name: "output that is absent", out: []string{"eth1", "late0"}, want: kernel},
		{name: "kernel, output that does not transmit", path: rules.PathKernel, out: []string{"eth1", "mute0"}, want: kernel},
	} {
		r := &Relay{interfaces: map[string]*iface{}, features: map[int]loader.Features{}}
		for i, name := range []string{"eth0", "eth1", "eth2", "tun0", "mute0", "down0"} {
			r.interfaces[name] = &iface{name: name, index: i + 1, mtu: 1500, ethernet: name != "tun0", up: name != "down0"}
			r.features[i+1] = loader.Features{Known: true, Transmit: name != "mute0" && name != "down0"}
		}
		rule, in, n := rules.Rule{Path: tt.path}, r.interfaces["eth0"], &instance{}
		for _, name := range tt.out {
			n.slots = append(n.slots, slot{ifname: name})
		}
		if tt.edit != nil {
			tt.edit(&rule, in, n)
		}
		path, note, err := r.choosePath(&rule, in, n, tt.generic)
		text := ""
		if err != nil {
			text = err.Error()
		}
		if !strings.Contains(text, tt.err) || (tt.err == "") != (err == nil) || !strings.Contains(note, tt.note) || (tt.note == "") != (note == "") || path != tt.want {
			t.Errorf("%s: path %v, %q, %v", tt.name, path, note, err)
		}
	}
}

func mtu(n int) func(*rules.Rule, *iface, *instance) {
	return func(_ *rules.Rule, in *iface, _ *instance) { in.mtu = n }
}

func TestLongerPatterns(t *testing.T) {
	for _, tt := range []struct {
		pattern, name string
		want          []string
	}{
		{"+", "ab", []string{"ab+", "a+"}},
		{"a+", "ab", []string{"ab+"}},
		{"ab+", "ab", nil},
	} {
		if d := cmp.Diff(tt.want, longerPatterns(tt.pattern, tt.name)); d != "" {
			t.Errorf("%s, %s:\n%s", tt.pattern, tt.name, d)
		}
	}
}

// TestResolvedRule: what has nothing to do with interfaces reaches the kernel's form.
func TestResolvedRule(t *testing.T) {
	r := &Relay{interfaces: map[string]*iface{"eth0": {name: "eth0", index: 3, ethernet: true, up: true, mtu: 1500, mac: [6]byte{2}}}}
	rule := rules.Rule{
		Name: "a", In: rules.Input{Interface: "eth0", Address: addr("ff15::"), Len: 64, Source: addr("2001:db8::1"), VLAN: rules.VLAN{ID: 4, Outer: 5}},
		Accept: rules.Acceptance{ZeroChecksum: true, AllowLoop: true, Rate: rules.Rate{Packets: 5}},
		Out:    []rules.Output{{Interface: "eth1", Address: addr("ff15::1"), Port: 1}},
	}
	n := r.resolveInstance(&rule, r.interfaces["eth0"])
	want := loader.Rule{
		Name: "a", In: loader.Input{Index: 3, MAC: [6]byte{2}, Group: addr("ff15::"), Len: 64, Source: addr("2001:db8::1"), VLAN: 4, OuterVLAN: 5},
		AllowLoop: true, AllowNoChecksum: true, Rate: loader.Rate{Packets: 5, Burst: 1},
	}
	n.resolved.Out = nil
	if d := cmp.Diff(want, n.resolved, cmp.Comparer(func(a, b loader.Input) bool { return a == b })); d != "" {
		t.Errorf("rule:\n%s", d)
	}
}
