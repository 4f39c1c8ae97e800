package e2e_test

import (
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"xdpcast/internal/control"
	"xdpcast/internal/traffic"
	"xdpcast/pkg/loader"
)

// The streams of the tests that allow no loss: two groups in turn, one rule with one output and one
// with three, one of these on an interface that the first rule also sends on.
const (
	streamTarget = "239.1.1.1:5000%src0"
	oneIn        = "239.1.1.1:5000%in0"
	threeIn      = "239.1.1.2:5000%in0"
	oneOut       = "239.2.1.1:6000%out0"
)

var threeOut = []string{"239.2.2.1:6000%out0", "239.2.2.2:6001%out1,ttl=9", "239.2.2.3:6002%out2,src=keep"}

// TestNothingIsMissing disturbs the daemon in many ways while it relays 100,000 packets per second,
// or as many as the machine can send. Every packet must arrive, once and in order, and be counted.
func TestNothingIsMissing(t *testing.T) {
	tests := []struct {
		name string
		// prepare starts the first daemon, with the rules "one" and "three".
		prepare func(*instance)
		// disturb runs while packets flow.
		disturb func(*testing.T, *instance, *stream)
	}{
		{"killed", startWithAPIRules, func(t *testing.T, in *instance, s *stream) {
			for range 3 {
				restart(t, in, s, syscall.SIGKILL, -1)
			}
		}},
		{"terminated", startWithAPIRules, func(t *testing.T, in *instance, s *stream) {
			for range 3 {
				restart(t, in, s, syscall.SIGTERM, 0)
			}
		}},
		{"killed, rules of a file", startWithFile, func(t *testing.T, in *instance, s *stream) {
			restart(t, in, s, syscall.SIGKILL, -1, "-c", in.dir+"/rules.yaml")
		}},
		{"other rules reloaded", startWithFile, reloadOthers},
		{"other rules added and deleted", startWithAPIRules, addAndDelete},
		{"upgrade without a daemon", startWithAPIRules, func(t *testing.T, in *instance, s *stream) {
			in.running.stop(syscall.SIGTERM)
			in.mustCLI("upgrade")
			s.flows(5000)
			in.start()
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n := newNetwork(t)
			in := newInstance(t, n.relay)
			tt.prepare(in)
			keep := traffic.Expected{Source: netip.MustParseAddr("10.1.0.2")}
			from := func(i int) traffic.Expected {
				return traffic.Expected{Source: netip.MustParseAddr(fmt.Sprintf("10.2.%d.1", i))}
			}
			sinks := []*sink{
				receive(t, n.sinks[0], "239.2.1.1:6000%sink0", from(0)),
				receive(t, n.sinks[0], "239.2.2.1:6000%sink0", from(0)),
				receive(t, n.sinks[1], "239.2.2.2:6001%sink0", from(1)),
				receive(t, n.sinks[2], "239.2.2.3:6002%sink0", keep),
			}
			stream := send(t, n.source, traffic.SendConfig{
				Target: target(t, streamTarget), Groups: 2, TTL: 16, Rate: traffic.Rate{Value: 100_000},
			})
			stream.flows(10_000)
			tt.disturb(t, in, stream)
			stream.flows(10_000)
			sent := stream.stop()
			report := stream.sender.Report()
			t.Logf("%d packets at %.0f a second", sent, report.PacketsPerSecond)
			for i, s := range sinks {
				want := sent / 2
				if i == 0 {
					want = (sent + 1) / 2
				}
				if fault := s.finish(want); fault != "" {
					t.Error(fault)
				}
			}
			checkCounted(t, in.rule("one"), (sent+1)/2)
			checkCounted(t, in.rule("three"), sent/2)
			n.waitJoined("in0", "239.1.1.1", true)
			n.waitJoined("in0", "239.1.1.2", true)
		})
	}
}

// checkCounted checks that a rule matched and sent this many packets and dropped none.
func checkCounted(t *testing.T, r control.RuleStatus, packets uint64) {
	t.Helper()
	if r.State != control.StateActive || r.Matched.Packets != packets || len(r.Drops) > 0 {
		t.Errorf("rule %s: %s, %d packets matched, dropped %v; want %d", r.Name, r.State, r.Matched.Packets, r.Drops, packets)
	}
	for _, o := range r.Outputs {
		if o.Sent.Packets != packets || len(o.Drops) > 0 {
			t.Errorf("rule %s, output %d: %d packets sent, dropped %v; want %d", r.Name, o.Slot, o.Sent.Packets, o.Drops, packets)
		}
	}
}

func startWithAPIRules(in *instance) {
	in.start()
	in.add("one", oneIn, oneOut)
	in.add("three", threeIn, threeOut...)
}

// streamRules is a file with the rules of the streams, and others.
func streamRules(others ...string) string {
	text := "rules:\n  - {name: one, in: " + oneIn + ", out: [" + oneOut + "]}\n" +
		"  - {name: three, in: " + threeIn + ", out: ['" + strings.Join(threeOut, "', '") + "']}\n"
	for i, out := range others {
		text += fmt.Sprintf("  - {name: other%d, in: 239.1.9.%d:5000%%in0, out: [%s]}\n", i, i, out)
	}
	return text
}

func startWithFile(in *instance) {
	in.start("-c", in.write("rules.yaml", streamRules("239.2.9.1:6000%out0")))
}

// restart ends the daemon, lets packets flow without one, and starts the next, which must find
// everything unchanged.
func restart(t *testing.T, in *instance, s *stream, sig syscall.Signal, code int, args ...string) {
	t.Helper()
	pinned, programs, rules := pins(t, in.pinDir), attachedPrograms(t, in.host), withoutCounters(in.rules())
	if got := in.running.stop(sig); got != code {
		t.Errorf("exit code is %d after %v, want %d:\n%s", got, sig, code, in.running.log.String())
	}
	s.flows(10_000)
	in.start(args...)
	s.flows(5_000)
	if !strings.Contains(in.running.log.String(), "pinned state adopted") {
		t.Errorf("the next daemon has not adopted the state:\n%s", in.running.log.String())
	}
	if d := cmp.Diff(pinned, pins(t, in.pinDir)); d != "" {
		t.Errorf("ids of what is pinned have changed:\n%s", d)
	}
	if d := cmp.Diff(programs, attachedPrograms(t, in.host)); d != "" {
		t.Errorf("programs have changed:\n%s", d)
	}
	if d := cmp.Diff(rules, withoutCounters(in.rules())); d != "" {
		t.Errorf("rules have changed:\n%s", d)
	}
}

// withoutCounters strips what changes while packets flow.
func withoutCounters(all []control.RuleStatus) []control.RuleStatus {
	for i := range all {
		all[i].Matched, all[i].LastSeen, all[i].Drops, all[i].Notes = control.Counter{}, nil, nil, nil
		for k := range all[i].Outputs {
			o := &all[i].Outputs[k]
			o.Sent, o.Drops = control.Counter{}, nil
		}
	}
	return all
}

// reloadOthers reloads files that add, change and remove other rules.
func reloadOthers(t *testing.T, in *instance, s *stream) {
	ids := func() [2]uint32 { return [2]uint32{in.rule("one").ID, in.rule("three").ID} }
	before := ids()
	for i, others := range [][]string{
		{"239.2.9.2:6000%out0"}, {}, {"239.2.9.1:6000%out0", "'239.2.9.2:6000%out0', '239.2.9.3:6000%out1'"},
		{"'239.2.9.1:6000%out0', '239.2.9.3:6000%out1'", "239.2.9.2:6000%out0"}, {}, {"239.2.9.1:6000%out2"},
	} {
		in.write("rules.yaml", streamRules(others...))
		in.running.signal(syscall.SIGHUP)
		in.running.waitLog("msg=reloaded", i+1)
		if got := len(in.rules()); got != 2+len(others) {
			t.Errorf("%d rules after reload %d, want %d", got, i, 2+len(others))
		}
		s.flows(2_000)
	}
	if after := ids(); after != before {
		t.Errorf("ids of rules that stayed are %v, were %v", after, before)
	}
}

// addAndDelete adds and deletes rules with one and three outputs, on the interfaces that the
// streams use.
func addAndDelete(t *testing.T, in *instance, s *stream) {
	for range 10 {
		in.add("a", "239.1.9.1:5000%in0", "239.2.9.1:6000%out0")
		in.add("b", "239.1.9.2:5000%in0", "239.2.9.2:6000%out0", "239.2.9.3:6000%out1", "239.2.9.4:6000%out2")
		for _, name := range []string{"a", "b"} {
			if err := in.client.DeleteRule(t.Context(), name); err != nil {
				t.Fatal(err)
			}
		}
		s.flows(1_000)
	}
}

// TestLoadThenRun loads the programs without a daemon while packets pass through to the relay's own
// stack, and then starts a daemon. No packet is lost, and the daemon keeps the links that it finds.
func TestLoadThenRun(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	local := receive(t, n.relay, "239.9.9.9:5000%in0", traffic.Expected{})
	stream := send(t, n.source, traffic.SendConfig{Target: target(t, "239.9.9.9:5000%src0"), Rate: traffic.Rate{Value: easy}})
	stream.flows(500)

	text := in.mustCLI("load", "-i", "in0", "-i", "out0")
	if !strings.Contains(text, "in0: attached, native mode") {
		t.Errorf("load says %q", text)
	}
	stream.flows(500)
	loaded := pins(t, in.pinDir)
	in.start()
	if d := cmp.Diff(loaded, pins(t, in.pinDir)); d != "" {
		t.Errorf("ids of what is pinned have changed:\n%s", d)
	}
	in.add("one", oneIn, oneOut)
	stream.flows(500)
	if err := in.client.DeleteRule(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
	// Programs loaded by hand stay attached when no rule needs them any more.
	if d := cmp.Diff(loaded, pins(t, in.pinDir)); d != "" {
		t.Errorf("ids of what is pinned have changed with a rule that came and went:\n%s", d)
	}
	stream.flows(500)
	if fault := local.finish(stream.stop()); fault != "" {
		t.Error(fault)
	}

	in.running.stop(syscall.SIGTERM)
	in.mustCLI("unload", "--all")
	if left := attachedPrograms(t, n.relay); len(left) > 0 {
		t.Errorf("programs are attached after unload: %v", left)
	}
	if _, err := loader.OpenReader(in.pinDir); err == nil {
		t.Error("pinned state is there after unload")
	}
}
