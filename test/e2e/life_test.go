package e2e_test

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"xdpcast/internal/labtest"
	"xdpcast/pkg/packet"
)

// TestLife takes a relay through its life on every path: started, killed, upgraded without a
// daemon, started again, terminated, unloaded. Frames are compared byte for byte at each stage. It
// runs on every supported kernel, so it is short.
func TestLife(t *testing.T) {
	n := newNetwork(t)
	n.addIPv6(t)
	in := newInstance(t, n.relay)
	// For each path a rule with one output and one with four, which include rare features; each
	// rule is identified by its group.
	var rules strings.Builder
	rules.WriteString("rules:\n")
	type stream struct {
		path, name, group string
		out               []string
		want              []func(f *packet.Frame)
	}
	var streams []stream
	for i, path := range paths {
		for j, s := range []stream{
			{out: []string{"239.2.2.2:6000%out0,ttl=dec,dscp=af41"}, want: []func(f *packet.Frame){
				dst("239.2.2.2", 6000, func(f *packet.Frame) { f.TTL, f.TOS = 15, 34<<2|1 })}},
			{out: []string{"239.2.2.2:6000%out0", "239.2.2.3:6001%out1,vlan=100", "239.2.2.4:6002%out2,src=keep", "239.2.2.5:6003%out0,csum=zero"}, want: []func(f *packet.Frame){
				dst("239.2.2.2", 6000), dst("239.2.2.3", 6001, tags(100)), dst("239.2.2.4", 6002, from("10.1.0.2")), dst("239.2.2.5", 6003, func(f *packet.Frame) { f.NoChecksum = true })}},
		} {
			s.path, s.name, s.group = path, fmt.Sprintf("%s-%d", path, len(s.out)), fmt.Sprintf("239.1.%d.%d", i+1, j+1)
			streams = append(streams, s)
			fmt.Fprintf(&rules, "  - {name: %s, in: '%s:5000%%in0', out: ['%s'], path: %s}\n", s.name, s.group, strings.Join(s.out, "', '"), path)
		}
	}
	file := in.write("rules.yaml", rules.String())
	check := func(when string, paths ...string) {
		t.Helper()
		for _, s := range streams {
			for _, path := range paths {
				if s.path == path {
					t.Run(when+", "+s.name, func(t *testing.T) { n.relays(t, s.group, s.out, s.want) })
				}
			}
		}
	}

	in.start("-c", file)
	for _, s := range streams {
		if got := in.rule(s.name); got.State != "active" || got.UsedPath != s.path {
			t.Errorf("rule %s: %s on path %s, want active on %s: %s", s.name, got.State, got.UsedPath, s.path, got.Reason)
		}
	}
	check("started", paths...)
	in.running.stop(syscall.SIGKILL)
	// The afxdp path falls back to the kernel path, which supports these rules.
	check("killed", "kernel", "afxdp")
	in.mustCLI("upgrade")
	check("upgraded", "kernel", "afxdp")
	if text := in.mustCLI("stats"); !strings.Contains(text, "kernel-4") {
		t.Errorf("stats without a daemon:\n%s", text)
	}
	in.start("-c", file)
	check("started again", paths...)
	if code := in.running.stop(syscall.SIGTERM); code != 0 {
		t.Errorf("the daemon ended with code %d", code)
	}
	check("terminated", "kernel")
	in.mustCLI("unload", "--all")
	if _, err := os.Stat(in.pinDir); !os.IsNotExist(err) {
		t.Errorf("%s is there after unload: %v", in.pinDir, err)
	}
	if left := attachedPrograms(t, n.relay); len(left) > 0 {
		t.Errorf("programs left after unload: %v", left)
	}
}

// relays sends a frame to a group and compares what leaves by each output.
func (n *network) relays(t *testing.T, group string, out []string, want []func(f *packet.Frame)) {
	t.Helper()
	frame := n.frame(t, group)
	frame.DstMAC = packet.MulticastMAC(frame.Dst)
	source, taps := labtest.NewTap(t, n.source, "src0"), n.taps(t, out)
	source.Send(frame.Build())
	n.compare(t, frame, taps, out, want)
}
