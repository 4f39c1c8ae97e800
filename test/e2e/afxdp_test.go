package e2e_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/internal/traffic"
)

// TestAFXDPWithoutDaemon: while the daemon is gone, however it went, the kernel path
// serves the rules of path afxdp that it can, and drops the packets of others for the
// reason no_socket.
func TestAFXDPWithoutDaemon(t *testing.T) {
	n := newNetwork(t)
	if !n.features(t, "out1").Known {
		t.Skip("this kernel does not tell which devices send redirected frames (Linux 6.3), so that every rule falls back")
	}
	// A veth sends redirected frames only to a peer with receive offload: the kernel
	// path cannot serve out1.
	labtest.Do(t, n.sinks[1], func() error { return lab.SetGRO("sink0", false) })
	in := newInstance(t, n.relay)
	in.start()
	in.mustCLI("rule", "add", "falls", "--path", "afxdp", "--in", "239.1.1.1:5000%in0", "--out", "239.2.2.0:6000%out0")
	in.mustCLI("rule", "add", "stops", "--path", "afxdp", "--in", "239.1.1.2:5000%in0", "--out", "239.2.2.1:6000%out1")
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			n.probe("239.1.1.1:5000", n.end(0))
			n.probe("239.1.1.2:5000", n.end(1))
			for _, name := range []string{"falls", "stops"} {
				if r := in.rule(name); r.UsedPath != "afxdp" || r.State != control.StateActive || len(r.Drops) > 0 && name == "falls" {
					t.Errorf("%+v", r)
				}
			}
			text := in.mustCLI("status")
			if !slices.ContainsFunc(strings.Split(text, "\n"), func(line string) bool {
				return strings.HasPrefix(line, "in0 ") && strings.Contains(line, " afxdp ") && strings.Contains(line, " copy")
			}) {
				t.Errorf("status has no worker of path afxdp on in0:\n%s", text)
			}
			before := in.noSocket(t, "stops")
			in.running.stop(sig)
			n.probe("239.1.1.1:5000", n.end(0))
			lost := receive(t, n.sinks[1], "239.2.2.1:6000%sink0", traffic.Expected{})
			s := send(t, n.source, traffic.SendConfig{Target: target(t, "239.1.1.2:5000%src0"), Count: 200, TTL: 16, Rate: traffic.Rate{Value: 20_000}})
			s.wait()
			eventually(t, "all are counted", func() string {
				if got := in.noSocket(t, "stops") - before; got != 200 {
					return fmt.Sprintf("%d packets dropped for no_socket", got)
				}
				return ""
			})
			if got := lost.received(); got != 0 {
				t.Errorf("%d packets came out without a daemon", got)
			}
			if got := in.noSocket(t, "falls"); got != 0 {
				t.Errorf("%d packets of the rule that falls back dropped for no_socket", got)
			}
			in.start()
			in.waitState("falls", control.StateActive)
			in.waitState("stops", control.StateActive)
			n.probe("239.1.1.1:5000", n.end(0))
			n.probe("239.1.1.2:5000", n.end(1))
		})
	}
}

// noSocket is how many packets of a rule the program dropped for want of a socket, as
// the command line tells with a daemon and without.
func (in *instance) noSocket(t *testing.T, rule string) (packets uint64) {
	t.Helper()
	var s control.Stats
	if err := json.Unmarshal([]byte(in.mustCLI("stats", rule, "-o", "json")), &s); err != nil {
		t.Fatal(err)
	}
	for _, r := range s.Rules {
		for _, d := range r.Drops {
			if d.Reason == "no_socket" {
				packets += d.Packets
			}
		}
	}
	return packets
}
