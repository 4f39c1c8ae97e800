package e2e_test

import (
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"xdpcast/internal/labtest"
	"xdpcast/pkg/packet"
)

// senderFeatures are rules for some senders, port ranges, and all groups.
var senderFeatures = []featureCase{
	{name: "prefix of sources", in: "10.1.0.0/30@239.1.1.1:5000%in0", out: []string{"239.2.2.2:6000%out0", "239.2.2.3:6000%out1,src=keep"},
		want: []func(f *packet.Frame){dst("239.2.2.2", 6000), dst("239.2.2.3", 6000, from("10.1.0.2"))}},
	{name: "prefix of sources, any port", in: "10.0.0.0/8@239.1.1.1%in0,except=10.2.0.0/16+10.1.0.1", out: []string{"239.2.2.2%out0"},
		want: []func(f *packet.Frame){dst("239.2.2.2", 5000)}},
	{name: "any but one", in: "239.1.1.1:5000%in0,except=10.1.0.3", out: []string{"239.2.2.2:6000%out0"},
		want: []func(f *packet.Frame){dst("239.2.2.2", 6000)}},
	{name: "first port of a range", in: "239.1.1.1:5000-5010%in0", out: []string{"239.2.2.2:+1000%out0", "239.2.2.3%out1"},
		want: []func(f *packet.Frame){dst("239.2.2.2", 6000), dst("239.2.2.3", 5000)}},
	{name: "last port of a range, prefix of sources", in: "10.1.0.0/24@239.1.1.1:4990-5000%in0", out: []string{"239.2.2.2:-10%out0"},
		want: []func(f *packet.Frame){dst("239.2.2.2", 4990)}},
	{name: "range to one port, prefix of groups", in: "239.1.0.0/16:4999-5001%in0,join=239.1.1.1", out: []string{"239.101.0.0/16:7%out0"},
		want: []func(f *packet.Frame){dst("239.101.1.1", 7)}},
	{name: "all groups", in: "224.0.0.0/4%in0,join=239.1.1.1", out: []string{"224.0.0.0/4%out0,ttl=dec"},
		want: []func(f *packet.Frame){dst("239.1.1.1", 5000, func(f *packet.Frame) { f.TTL = 15 })}},
	{name: "ipv6, prefix of sources, range", in: "fd00:1::/64@[ff3e:0:0:1::7]:5000-5001%in0,join=none,except=fd00:1::3", frame: v6(), out: []string{"[ff3e::2]:+1%out0"},
		want: []func(f *packet.Frame){dst("ff3e::2", 5001)}},
	{name: "ipv6, prefixes of both", in: "fd00:1::/64@[ff3e::]/32%in0,join=none,except=fd00:1::3", frame: v6(), out: []string{"[ff3e::2]%out0"},
		want: []func(f *packet.Frame){dst("ff3e::2", 5000)}},
	{name: "ipv6, all groups", in: "[ff00::]/8%in0,join=none", frame: v6(), out: []string{"[ff00::]/8%out0"},
		want: []func(f *packet.Frame){dst("ff3e:0:0:1::7", 5000)}},
}

// TestSenderFeatures: source prefixes, excluded senders, port ranges and the prefix of all groups,
// on every path. A rule does not take what it excludes.
func TestSenderFeatures(t *testing.T) {
	onPaths(t, func(t *testing.T, n *network, in *instance, path string) {
		runFeatures(t, senderFeatures, n, in, path)
		t.Run("what is left out", func(t *testing.T) {
			in.mustCLI("rule", "add", "wide", "--path", path, "--in", "10.0.0.0/8@239.1.1.1:5000-5010%in0,except=10.1.0.0/30", "--out", "239.2.2.9:6000%out0")
			defer in.mustCLI("rule", "del", "wide")
			if text := in.mustCLI("explain", "10.1.0.2@239.1.1.1:5000%in0"); !strings.Contains(text, "no rule takes it: rule wide (10.0.0.0/8@239.1.1.1:5000-5010%in0) excludes its sender") {
				t.Errorf("explain says\n%s", text)
			}
			if text := in.mustCLI("explain", "10.1.0.9@239.1.1.1:5000%in0"); !strings.Contains(text, "source prefix of 8 bits, group, range of ports") {
				t.Errorf("explain says\n%s", text)
			}
			rest := featureCase{in: "239.1.1.1%in0", out: []string{"239.2.2.2:6000%out0"}, want: []func(f *packet.Frame){dst("239.2.2.2", 6000)}}
			rest.run(t, n, in, path, "rest"+path[:1])
			if s := in.rule("wide"); s.Matched.Packets != 0 {
				t.Errorf("rule wide took %d packets", s.Matched.Packets)
			}
		})
		t.Run("prefixes of both", func(t *testing.T) {
			for name, input := range map[string]string{
				"site":   "10.0.0.0/8@239.1.1.0/24:5000%in0,join=none",
				"others": "239.1.0.0/16:5000%in0,join=none,except=10.9.0.0/16",
			} {
				in.mustCLI("rule", "add", name, "--path", path, "--in", input, "--out", "239.2.2.9:6000%out0")
				defer in.mustCLI("rule", "del", name)
			}
			for packet, want := range map[string]string{
				"10.1.0.2@239.1.1.1:5000%in0": "rule hall takes it: (source prefix of 16 bits, prefix of 16 bits, port) comes before (source prefix of 8 bits, prefix of 24 bits, port)",
				"10.1.7.1@239.1.1.1:5000%in0": "rule site takes it: (source prefix of 8 bits, prefix of 24 bits, port) comes before (any source, prefix of 16 bits, port)",
				"10.9.0.1@239.1.2.1:5000%in0": "no rule takes it: rule others (239.1.0.0/16:5000%in0) excludes its sender",
			} {
				in.mustCLI("rule", "add", "hall", "--path", path, "--in", "10.1.0.0/16@239.1.0.0/16:5000%in0,join=none,except=10.1.7.0/24", "--out", "239.2.2.8:6000%out0")
				if text := in.mustCLI("explain", packet); !strings.Contains(text, want) {
					t.Errorf("explain %s does not say %q:\n%s", packet, want, text)
				}
				in.mustCLI("rule", "del", "hall")
			}
			hall := featureCase{in: "10.1.0.0/16@239.1.0.0/16:5000%in0,join=none,except=10.1.7.0/24", out: []string{"239.2.0.0/16:6000%out0"}, want: []func(f *packet.Frame){dst("239.2.1.1", 6000)}}
			hall.run(t, n, in, path, "hall"+path[:1])
			for _, name := range []string{"site", "others"} {
				if s := in.rule(name); s.Matched.Packets != 0 {
					t.Errorf("rule %s took %d packets", name, s.Matched.Packets)
				}
			}
		})
	})
}

// TestSendersSurviveRestart: the counters of such rules continue.
func TestSendersSurviveRestart(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	d := in.start()
	in.add("wide", "10.0.0.0/8@239.1.1.1:5000-5010%in0,except=10.1.9.0/24", "239.2.2.9:+1000%out0")
	n.sendFrames(t, 5)
	before := in.rule("wide")
	if before.Matched.Packets != 5 {
		t.Fatalf("%+v", before)
	}
	if code := d.stop(syscall.SIGKILL); code == 0 {
		t.Error("killed, and exit code 0")
	}
	n.sendFrames(t, 5)
	in.start()
	after := in.rule("wide")
	if after.ID != before.ID || after.Matched.Packets != 10 || after.Outputs[0].Sent.Packets != 10 || after.In != before.In {
		t.Errorf("%+v\nwas %+v", after, before)
	}
}

// sendFrames sends frames of the default stream, and waits for their copies.
func (n *network) sendFrames(t *testing.T, count int) {
	t.Helper()
	frame := packet.Frame{
		SrcMAC: macOf(t, n.source, "src0"), DstMAC: packet.MulticastMAC(netip.MustParseAddr("239.1.1.1")),
		Src: netip.MustParseAddr("10.1.0.2"), Dst: netip.MustParseAddr("239.1.1.1"), SrcPort: 4000, DstPort: 5003, TTL: 16, Payload: []byte("x"),
	}.Build()
	tap := labtest.NewTap(t, n.sinks[0], "sink0")
	source := labtest.NewTap(t, n.source, "src0")
	for range count {
		source.Send(frame)
	}
	tap.Collect(count, isUDP)
}
