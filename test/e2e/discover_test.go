package e2e_test

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"xdpcast/internal/discover"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/packet"
)

// repeat sends frames on an interface of the source until the returned function is called, which
// returns how many times each was sent.
func (n *network) repeat(t *testing.T, frames ...[]byte) (stop func() int) {
	t.Helper()
	tap := labtest.NewTap(t, n.source, "src0")
	end, rounds := make(chan struct{}), 0
	var done sync.WaitGroup
	done.Go(func() {
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for ; ; rounds++ {
			for _, f := range frames {
				tap.Send(f)
			}
			select {
			case <-end:
				return
			case <-tick.C:
			}
		}
	})
	return func() int {
		close(end)
		done.Wait()
		return rounds + 1
	}
}

// TestDiscover: discover finds streams on the wire, also in VLANs, that no rule takes, and makes
// rules of them. Streams that rules take are left out, on each path.
func TestDiscover(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	in.start()
	in.add("kernel", "239.1.1.1:5000%in0", "239.2.1.1:6000%out0")
	in.mustCLI("rule", "add", "fanout", "--path", "fanout", "--in", "239.1.1.2:5000%in0", "--out", "239.2.1.2:6000%out0")
	in.waitState("kernel", "active")
	in.waitState("fanout", "active")
	frame := func(group string, port uint16, payload string, vlans ...uint16) []byte {
		dst := netip.MustParseAddr(group)
		return packet.Frame{
			SrcMAC: macOf(t, n.source, "src0"), DstMAC: packet.MulticastMAC(dst), VLANs: vlans, Src: netip.MustParseAddr("10.1.0.2"), Dst: dst,
			SrcPort: 4000, DstPort: port, TTL: 9, Payload: []byte(payload),
		}.Build()
	}
	text, err := os.ReadFile("../../internal/discover/testdata/sap-ffmpeg.hex")
	if err != nil {
		t.Fatal(err)
	}
	announcement, err := hex.DecodeString(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	stop := n.repeat(t,
		frame("239.1.1.1", 5000, "kernel"), frame("239.1.1.2", 5000, "fanout"), frame("239.9.9.9", 5004, "free"), frame("239.9.9.9", 5004, "tagged", 7),
		frame("239.9.9.9", 5004, "twice", 100, 7), frame("233.54.12.111", 26400, "SESSION   \x00\x00\x00\x00\x00\x00\x00\x09\x00\x00"), frame("224.2.127.254", 9875, string(announcement)))

	want := []string{
		`10.1.0.2@224.2.127.254:9875 sap "Tour de Test"`, `10.1.0.2@233.54.12.111:26400 moldudp64 "SESSION"`, `10.1.0.2@239.9.9.9:5004 unknown`,
		`10.1.0.2@239.9.9.9:5004%in0,vlan=100.7 unknown`, `10.1.0.2@239.9.9.9:5004%in0,vlan=7 unknown`,
	}
	// A sender on a busy machine may pause for longer than discover looks.
	eventually(t, "all streams are found", func() string {
		var found discover.Result
		if err := json.Unmarshal([]byte(in.mustCLI("discover", "-i", "in0", "--for", "1s", "-o", "json")), &found); err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, s := range found.Streams {
			if s.Source == netip.MustParseAddr("10.1.0.2") && s.Port != 0 {
				got = append(got, strings.TrimSuffix(s.Input().String(), "%in0")+" "+s.Looks.String())
				if s.Packets < 10 || s.TTL != 9 || s.PacketRate <= 0 || s.PacketRate > 1000 {
					return fmt.Sprintf("%+v", s)
				}
			}
		}
		slices.Sort(got)
		if !slices.Equal(got, want) || len(found.Sessions) != 1 || found.Sessions[0].Name != "Tour de Test" || found.Missed != 0 {
			return fmt.Sprintf("%q, sessions %+v, missed %d", got, found.Sessions, found.Missed)
		}
		return ""
	})

	// The relay is not disturbed, and the streams found become rules.
	var made string
	eventually(t, "the streams become rules", func() string {
		made = in.mustCLI("discover", "-i", "in0", "--for", "500ms", "-o", "rules", "--to", "out1")
		if !strings.Contains(made, "Tour-de-Test") || !strings.Contains(made, "moldudp64-233.54.12.111-26400") {
			return made
		}
		return ""
	})
	stop()
	eventually(t, "the relay has counted all that came", func() string {
		kernel, fanout := in.rule("kernel"), in.rule("fanout")
		if kernel.Matched.Packets != fanout.Matched.Packets || kernel.Outputs[0].Sent.Packets != kernel.Matched.Packets {
			return strings.Join([]string{in.mustCLI("stats")}, "")
		}
		return ""
	})
	file := in.write("found.yaml", made)
	in.mustCLI("check", "-c", file)
	in.mustCLI("rule", "apply", file)
	in.waitState("Tour-de-Test", "active")
	if s := in.rule("Tour-de-Test"); s.In != "239.9.9.9:5004%in0" || s.Out[0] != "239.9.9.9:5004%out1" {
		t.Errorf("%+v", s.Rule)
	}
	in.waitState("moldudp64-233.54.12.111-26400", "active")

	// Groups are joined for the duration, then left.
	cmd := exec.Command(program, "discover", "-i", "out2", "--for", "1h", "--join", "239.7.7.0/30")
	cmd.Env = in.env()
	if err := in.host.Start(cmd); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill() }()
	n.waitJoined("out2", "239.7.7.3", true)
	n.waitJoined("out2", "239.7.7.0", true)
	if err := errors.Join(cmd.Process.Signal(os.Interrupt), cmd.Wait()); err != nil {
		t.Errorf("discover: %v", err)
	}
	n.waitJoined("out2", "239.7.7.3", false)

	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"discover"}, 2, "--interface missing"},
		{[]string{"discover", "-i", "nothing0"}, 1, `interface "nothing0" not found`},
		{[]string{"discover", "-i", "in0", "-o", "rules"}, 2, "--to missing"},
		{[]string{"discover", "-i", "in0", "-o", "yaml"}, 2, "want table, json or rules"},
		{[]string{"discover", "-i", "in0", "--join", "10.0.0.1"}, 2, "want a group"},
		{[]string{"discover", "-i", "in0", "--join", "239.0.0.0/8"}, 2, "more than 4096 groups"},
	} {
		if got := in.cli(c.args...); got.code != c.code || !strings.Contains(got.stderr, c.want) {
			t.Errorf("%q: want exit code %d, %q: %s", c.args, c.code, c.want, got)
		}
	}
}
