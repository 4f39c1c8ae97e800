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

// TestAFXDPWithoutDaemon: without a daemon, however it ended, the kernel path serves the rules of
// path afxdp that it can, and drops the packets of the others with reason no_socket. On a kernel
// that does not report which devices send redirected frames (before Linux 6.3) there are no others.
func TestAFXDPWithoutDaemon(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	told := n.features(t, "out1").Known
	// A veth sends redirected frames only to a peer with receive offload: the kernel
	// path cannot serve out1.
	labtest.Do(t, n.sinks[1], func() error { return lab.SetGRO("sink0", false) })
	in := newInstance(t, n.relay)
	in.start()
	in.mustCLI("rule", "add", "falls", "--path", "afxdp", "--in", "239.1.1.1:5000%in0", "--out", "239.2.2.0:6000%out0")
	rules := []string{"falls"}
	if told {
		in.mustCLI("rule", "add", "stops", "--path", "afxdp", "--in", "239.1.1.2:5000%in0", "--out", "239.2.2.1:6000%out1")
		rules = append(rules, "stops")
	}
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			probeAll := func() {
				n.probe("239.1.1.1:5000", n.end(0))
				if told {
					n.probe("239.1.1.2:5000", n.end(1))
				}
			}
			probeAll()
			for _, name := range rules {
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
			in.running.stop(sig)
			n.probe("239.1.1.1:5000", n.end(0))
			if told {
				stopped(t, n, in)
			}
			if got := in.noSocket(t, "falls"); got != 0 {
				t.Errorf("%d packets of the rule that falls back dropped for no_socket", got)
			}
			in.start()
			for _, name := range rules {
				in.waitState(name, control.StateActive)
			}
			probeAll()
		})
	}
}

// stopped sends to the rule stops, and requires every packet to be dropped.
func stopped(t *testing.T, n *network, in *instance) {
	t.Helper()
	before := in.noSocket(t, "stops")
	lost := receive(t, n.sinks[1], "239.2.2.1:6000%sink0", traffic.Expected{})
	send(t, n.source, traffic.SendConfig{Target: target(t, "239.1.1.2:5000%src0"), Count: 200, TTL: 16, Rate: traffic.Rate{Value: easy}}).wait()
	eventually(t, "all are counted", func() string {
		if got := in.noSocket(t, "stops") - before; got != 200 {
			return fmt.Sprintf("%d packets dropped for no_socket", got)
		}
		return ""
	})
	if got := lost.received(); got != 0 {
		t.Errorf("%d packets came out without a daemon", got)
	}
}

// noSocket is the number of packets of a rule that the program dropped for lack of a socket; the
// command line must report the same with and without a daemon.
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
