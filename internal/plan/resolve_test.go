package plan

import (
	"fmt"
	"go/parser"
	"go/token"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"xdpcast/internal/network"
	"xdpcast/pkg/flow"
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
		{"broadcast", rules.Output{Address: addr("10.0.0.255"), Port: 9, Policy: rules.Policy{Broadcast: true}},
			packet.Rewrite{DstMAC: packet.BroadcastMAC, Dst: addr("10.0.0.255"), DstPort: 9}},
		{"unicast has its MAC later", rules.Output{Address: addr("10.0.0.5"), Port: 6000},
			packet.Rewrite{Dst: addr("10.0.0.5"), DstPort: 6000}},
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
		got := resolvePolicy(&tt.out)
		if got.Rewrite != tt.want || got.Ready || got.Blocked != flow.NotReady {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
	}
}

func TestResolveRate(t *testing.T) {
	for _, tt := range []struct {
		rate rules.Rate
		mtu  int
		want flow.Rate
	}{
		{rules.Rate{}, 1500, flow.Rate{}},
		{rules.Rate{Packets: 1}, 1500, flow.Rate{Packets: 1, Burst: 1}},
		{rules.Rate{Packets: 100_000}, 1500, flow.Rate{Packets: 100_000, Burst: 1000}},
		{rules.Rate{Packets: 100, Burst: 7}, 1500, flow.Rate{Packets: 100, Burst: 7}},
		{rules.Rate{Bits: 1000}, 1500, flow.Rate{Bits: 1000, Burst: 1518}},
		{rules.Rate{Bits: 1000}, 9000, flow.Rate{Bits: 1000, Burst: 9018}},
		{rules.Rate{Bits: 80_000_000}, 1500, flow.Rate{Bits: 80_000_000, Burst: 100_000}},
		{rules.Rate{Bits: 80_000_000, Burst: 10}, 1500, flow.Rate{Bits: 80_000_000, Burst: 10}},
	} {
		if got := resolveRate(tt.rate, tt.mtu); got != tt.want {
			t.Errorf("%+v with MTU %d is %+v, want %+v", tt.rate, tt.mtu, got, tt.want)
		}
	}
}

// TestResolvedFlow: everything that a rule says, and what the interfaces are, is in the flow.
func TestResolvedFlow(t *testing.T) {
	w := newWorld(t, []string{"x", "y", "eth0 mtu=1400", "eth1 2001:db8:1::1 fe80::1 mtu=1300"},
		"a: 2001:db8::1@[ff15::]/64%eth0,vlan=5.4,csum=any,loop=allow,join=none,rate=500pps -> [ff15::1]:1%eth1,ttl=7,rate=1kbit [ff05::9]:+5%eth1,src=keep")
	w.Answers.Tags[w.link(t, "eth0").LinkID] = nil
	p := Make(w, Options{})
	check(t, &w, p)
	want := &flow.Flow{
		Name: "a", Path: flow.PathKernel,
		In:        flow.Input{Index: 3, MAC: [6]byte{2, 0, 0, 0, 0, 3}, Group: addr("ff15::"), Len: 64, Source: addr("2001:db8::1"), VLAN: 4, OuterVLAN: 5},
		AllowLoop: true, TwoWay: true, AllowNoChecksum: true, Rate: flow.Rate{Packets: 500, Burst: 5},
		Out: []flow.Output{
			{Ready: true, Index: 4, MTU: 1300, Rate: flow.Rate{Bits: 1000, Burst: 1318}, Rewrite: packet.Rewrite{
				DstMAC: [6]byte{0x33, 0x33, 0, 0, 0, 1}, SrcMAC: [6]byte{2, 0, 0, 0, 0, 4}, Dst: addr("ff15::1"), Src: addr("2001:db8:1::1"), DstPort: 1, TTLMode: packet.TTLSet, TTL: 7}},
			{Ready: true, Index: 4, MTU: 1300, Rewrite: packet.Rewrite{
				DstMAC: [6]byte{0x33, 0x33, 0, 0, 0, 9}, SrcMAC: [6]byte{2, 0, 0, 0, 0, 4}, Dst: addr("ff05::9"), PortAdd: true, PortShift: 5}},
		},
	}
	if d := cmp.Diff(want, p.Rules[0].Flows[0].Flow, cmp.Comparer(func(a, b flow.Input) bool { return a == b }), cmp.Comparer(func(a, b flow.Output) bool { return a == b })); d != "" {
		t.Errorf("flow (-want +got):\n%s", d)
	}
}

// TestSlots: how patterns of outputs are expanded.
func TestSlots(t *testing.T) {
	var many []string
	for i := range 70 {
		many = append(many, fmt.Sprintf("eth%02d", i))
	}
	for _, tt := range []struct {
		name, rule string
		links      []string
		want       string
		reason     string
	}{
		{"by name", "239.1.1.1:5000%eth0 -> 239.2.2.2:6%+", []string{"eth0", "eth1", "b"}, "0b 0eth0 0eth1", ""},
		{"named besides", "239.1.1.1:5000%eth0 -> 239.2.2.2:6%eth+ 239.2.2.2:6%eth1", []string{"eth0", "eth1"}, "0eth0 1eth1", ""},
		{"named besides by another name", "239.1.1.1:5000%eth0 -> 239.2.2.2:6%eth+ 239.2.2.2:6%enp1", []string{"eth0", "eth1 alt=enp1"}, "0eth0 1eth1", ""},
		{"two patterns", "239.1.1.1:5000%eth0 -> 239.2.2.2:6%e+ 239.2.2.2:6%eth+", []string{"eth0", "eth1", "ens1"}, "0ens1 1eth0 1eth1", ""},
		{"patterns that send different things", "239.1.1.1:5000%eth0 -> 239.2.2.3:6%e+ 239.2.2.2:6%eth+", []string{"eth0"}, "0eth0 1eth0", ""},
		{"feeds itself", "239.1.0.0/16%eth0,join=none -> 239.1.0.0/16%+", []string{"eth0", "eth1"}, "0eth1", ""},
		{"feeds itself, one port", "239.1.1.1:5000%eth0 -> 239.1.1.1:5000%+", []string{"eth0", "eth1"}, "0eth1", ""},
		{"another port", "239.1.1.1:5000%eth0 -> 239.1.1.1:5001%+ 239.1.1.1:+2%+", []string{"eth0", "eth1"}, "0eth0 0eth1 1eth0 1eth1", ""},
		{"feeds itself, shifted, any port", "239.1.0.0/16%eth0,join=none -> 239.1.0.0/16:+5%+", []string{"eth0", "eth1"}, "0eth1", ""},
		{"feeds itself on another VLAN", "239.1.0.0/16%eth0,join=none -> 239.1.0.0/16%+,vlan=7", []string{"eth0", "eth1"}, "0eth0 0eth1", ""},
		{"feeds itself without tags", "239.1.0.0/16%eth0,join=none -> 239.1.0.0/16%+,vlan=pop", []string{"eth0", "eth1"}, "0eth1", ""},
		{"may feed itself", "239.1.0.0/16%eth0,join=none,loop=allow -> 239.1.0.0/16%+", []string{"eth0", "eth1"}, "0eth0 0eth1", ""},
		{"from another source", "10.9.9.9@239.1.1.1:5000%eth0 -> 239.1.1.1:5000%+", []string{"eth0 10.0.0.1", "eth1"}, "0eth0 0eth1", ""},
		{"from the source", "10.0.0.1@239.1.1.1:5000%eth0 -> 239.1.1.1:5000%+", []string{"eth0 10.0.0.1", "eth1"}, "0eth1", ""},
		{"from a source given", "10.9.9.9@239.1.1.1:5000%eth0 -> 239.1.1.1:5000%+,src=10.9.9.9", []string{"eth0", "eth1"}, "0eth1", ""},
		{"keeping the source", "10.9.9.9@239.1.1.1:5000%eth0 -> 239.1.1.1:5000%+,src=keep", []string{"eth0", "eth1"}, "0eth1", ""},
		{"one name and another", "239.1.1.1:5000%eth0 -> 239.2.2.2:6%eth1 239.2.2.2:6%enp1,vlan=7 239.2.2.2:6%enp1", []string{"eth0", "eth1 alt=enp1"}, "0eth1 1eth1", "interface eth1 is known by several names: out[0] sends the same there"},
		{"no match", "239.1.1.1:5000%eth0 -> 239.2.2.2:6%x+", []string{"eth0"}, "", "no interface matches x+"},
		{"too many", "239.1.1.1:5000%eth00 -> 239.2.2.2:6%eth+", many, "64", "70 outputs after expanding the patterns: only the first 64 are served, up to eth63"},
	} {
		w := newWorld(t, tt.links, "a: "+tt.rule)
		m := &maker{opts: &Options{}, net: w.Network, answers: &w.Answers}
		slots, reason := m.slotsOf(&w.Rules[0].Rule, w.link(t, w.Rules[0].In.Interface))
		var names []string
		for _, s := range slots {
			names = append(names, fmt.Sprint(s.out, s.ifname))
		}
		got := strings.Join(names, " ")
		if len(slots) == rules.MaxOutputs {
			got = strconv.Itoa(len(slots))
		}
		if got != tt.want || reason != tt.reason {
			t.Errorf("%s: %q (%s), want %q (%s)", tt.name, got, reason, tt.want, tt.reason)
		}
	}
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

// TestIsPure: the package asks nobody, neither the kernel nor a clock nor dice.
func TestIsPure(t *testing.T) {
	may := []string{"cmp", "errors", "fmt", "hash/maphash", "iter", "maps", "net/netip", "slices", "strings", "time", "xdpcast/pkg/flow", "xdpcast/internal/network", "xdpcast/pkg/packet", "xdpcast/pkg/rules"}
	files, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		name := f.Name()
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, spec := range parsed.Imports {
			if path, _ := strconv.Unquote(spec.Path.Value); !slices.Contains(may, path) {
				t.Errorf("%s imports %s", name, path)
			}
		}
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, call := range []string{"time.Now", "time.Since", "time.Until", "time.Sleep"} {
			if strings.Contains(string(text), call) {
				t.Errorf("%s calls %s", name, call)
			}
		}
	}
}

// TestSourceTo: for a group of the link, the link's own address goes first.
func TestSourceTo(t *testing.T) {
	l := &network.Link{Addrs: []netip.Addr{addr("10.0.0.1"), addr("2001:db8::1"), addr("fe80::1"), addr("169.254.0.1")}}
	for dst, want := range map[string]string{
		"239.1.1.1": "10.0.0.1", "224.0.0.251": "10.0.0.1", "255.255.255.255": "10.0.0.1",
		"ff05::1": "2001:db8::1", "ff02::fb": "fe80::1", "ff12::1": "fe80::1", "2001:db8::9": "2001:db8::1",
	} {
		if got, ok := sourceTo(l, addr(dst)); !ok || got != addr(want) {
			t.Errorf("to %s: %v, %v; want %s", dst, got, ok, want)
		}
	}
	l = &network.Link{Addrs: []netip.Addr{addr("2001:db8::1")}}
	if got, ok := sourceTo(l, addr("ff02::fb")); !ok || got != addr("2001:db8::1") {
		t.Errorf("without an address of the link: %v, %v", got, ok)
	}
}
