package demo

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/internal/traffic"
)

// program is the program that is run as the relay; set once by TestMain, before any
// test. Empty for a user who cannot run it.
var program string

func TestMain(m *testing.M) { os.Exit(buildAndRun(m)) }

func buildAndRun(m *testing.M) int {
	if !labtest.Root() {
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "xdpcast-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if program, err = labtest.Program(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// newLab returns the prefix of a lab of the test's own, and checks in the end that
// nothing is left of it.
func newLab(t *testing.T) string {
	t.Helper()
	labtest.RequireRoot(t)
	prefix := lab.UniqueName("demo")
	before := labtest.OpenFiles(t)
	t.Cleanup(func() {
		if left := labtest.Leftovers(t, prefix); len(left) > 0 {
			t.Errorf("left behind: %q", left)
			if err := Remove(prefix); err != nil {
				t.Log(err)
			}
		}
		if after := labtest.OpenFiles(t); after > before {
			t.Errorf("%d files are open, %d were before", after, before)
		}
	})
	return prefix
}

// observer calls ready before the streams, and flowing once they have begun, each if set.
type observer struct{ ready, flowing func() }

func (o observer) Ready(Lab) error {
	if o.ready != nil {
		o.ready()
	}
	return nil
}

func (o observer) Flowing() {
	if o.flowing != nil {
		o.flowing()
	}
}

func (observer) Progress(time.Duration, Figures, bool) {}

// short is a demonstration of the length that tests can afford.
func short(prefix string) *demonstration {
	return newDemonstration(Config{
		Prefix: prefix, Program: program, Rate: 10000, Duration: 300 * time.Millisecond, Interval: 100 * time.Millisecond,
		Observer: observer{},
	})
}

// A verdict that cannot fail is worth nothing: each sabotage must be found.
func TestFindsSabotage(t *testing.T) {
	var sink, relay *labtest.Tap
	for name, tt := range map[string]struct {
		change   func(d *demonstration)               // before
		prepare  func(t *testing.T, d *demonstration) // when the lab is there
		sabotage func(t *testing.T, d *demonstration) // while the streams flow
		faults   []string                             // that must be among those found
		err      string                               // instead of a verdict
	}{
		"other fields are expected, and only one source is": {
			change: func(d *demonstration) {
				d.streams[0].arrivals[0].want.TTL = 99
				d.streams[1].arrivals[1].want = traffic.Expected{Source: netip.MustParseAddr("10.0.0.6"), SourcePort: 1, TTL: 16, DSCP: new(uint8(0))}
				d.streams[2].to, d.streams[2].rule.In = "239.1.3.1:5000%eth0", "239.1.3.1:5000%eth0"
			},
			faults: []string{
				"one-to-one to sink1: 600 with a wrong ttl (the latest from 10.0.1.1:41001, ttl 15, dscp 26)",
				"one-to-three to sink2: 600 with a wrong source address, 600 with a wrong source port, 600 with a wrong dscp (the latest from 10.0.0.5:41002, ttl 16, dscp 46)",
				"one-source: the rule matched 660 packets of 600 sent", "one-source to sink2: the relay sent 660 copies of 600",
				"one-source to sink2: 60 more than expected, 60 with a wrong source address", "one-source: 60 packets from 10.0.0.6 came through",
			},
		},
		"a packet comes twice": {
			prepare:  func(t *testing.T, d *demonstration) { sink, relay = tapFirst(t, d) },
			sabotage: func(t *testing.T, _ *demonstration) { repeatPacket(t, sink, relay) },
			faults:   []string{"one-to-one to sink1: 1 duplicated"},
		},
		"rules are changed and removed": {
			prepare: func(t *testing.T, d *demonstration) {
				all := d.streams
				d.streams[0].rule.Out[0] = "239.2.1.1:5000%eth1,ttl=3"
				d.streams = d.streams[:3]
				err := d.writeRules()
				if d.streams = all; err != nil {
					t.Fatal(err)
				}
				if _, err := d.client.Reload(t.Context(), control.ApplyOptions{}); err != nil {
					t.Fatal(err)
				}
			},
			faults: []string{"with a wrong ttl (the latest from 10.0.1.1:41001, ttl 3, dscp 26)", "new-port: the rule is not active", "new-port to sink3: the relay sent 0 copies of 600", "lost"},
		},
		"a rule cannot work": {
			change: func(d *demonstration) { d.streams[0].rule.In = "10.9.9.9:5000%eth0" },
			err:    "rule one-to-one: failed: address 10.9.9.9 is neither a multicast group nor an address of this host",
		},
		"a sink's address is wrong": {
			change: func(d *demonstration) { d.streams[0].arrivals[0].at = "10.9.9.9:5000%eth0" },
			err:    "stream one-to-one: sink1: receive 10.9.9.9:5000%eth0: bind: ",
		},
		"the relay is killed": {
			sabotage: func(t *testing.T, d *demonstration) {
				if err := unix.PidfdSendSignal(d.relay.process.fd, unix.SIGKILL, nil, 0); err != nil {
					t.Fatal(err)
				}
			},
			err: "ended before the demonstration did: ",
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := short(newLab(t))
			if tt.change != nil {
				tt.change(d)
			}
			var o observer
			if tt.prepare != nil {
				o.ready = func() { tt.prepare(t, d) }
			}
			if tt.sabotage != nil {
				o.flowing = func() { tt.sabotage(t, d) }
			}
			d.Observer = o
			v, err := d.run(t.Context())
			if tt.err != "" {
				if v != nil || err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("error %v, want %s", err, tt.err)
				}
				return
			}
			if err != nil || v.OK {
				t.Fatalf("error %v, verdict %+v", err, v)
			}
			for _, want := range tt.faults {
				if !slices.ContainsFunc(v.Faults, func(f string) bool { return strings.Contains(f, want) }) {
					t.Errorf("no fault %q in\n%s", want, strings.Join(v.Faults, "\n"))
				}
			}
		})
	}
}

// tapFirst opens both ends of the first sink's cable.
func tapFirst(t *testing.T, d *demonstration) (sink, relay *labtest.Tap) {
	return labtest.NewTap(t, d.hosts["sink1"], "eth0"), labtest.NewTap(t, d.hosts[relayHost], "eth1")
}

// repeatPacket takes a packet that has arrived at the first sink and sends it there again.
func repeatPacket(t *testing.T, sink, relay *labtest.Tap) {
	group := []byte{239, 2, 1, 1}
	frame := sink.Receive(labtest.Timeout, func(f []byte) bool { return len(f) > 34 && bytes.Equal(f[30:34], group) })
	if frame == nil {
		t.Fatal("no packet of the stream")
	}
	relay.Send(frame)
}

// A process that does not want to end is killed, and that is said.
func TestProcessStop(t *testing.T) {
	for name, tt := range map[string]struct{ script, want string }{
		"ends":    {`echo ready; exec sleep 60`, ""},
		"refuses": {`trap "" TERM; echo ready; while :; do sleep 60; done`, "was killed"},
	} {
		cmd := exec.Command("sh", "-c", tt.script)
		cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(out, make([]byte, len("ready\n"))); err != nil {
			t.Fatal(err)
		}
		p, err := openProcess(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		if p.ended() {
			t.Errorf("%s: ended already", name)
		}
		patience := labtest.Timeout
		if tt.want != "" {
			patience = 100 * time.Millisecond
		}
		err = p.stop(patience)
		if got := errorText(err); !strings.Contains(got, tt.want) || tt.want == "" && got != "" {
			t.Errorf("%s: %v", name, err)
		}
		if !p.ended() {
			t.Errorf("%s: not ended", name)
		}
		p.close()
		_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL) // the sleep that a killed shell leaves
		_ = cmd.Wait()                                // a signal ended it
	}
}

// A process that cannot be watched is not taken for one that has ended.
func TestProcessUnknown(t *testing.T) {
	p := process{fd: 1 << 30}
	if p.endsWithin(labtest.Timeout) {
		t.Error("it has ended")
	}
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func TestListenerOf(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	if pid, err := listenerOf(socket); pid != 0 || err != nil {
		t.Errorf("no socket: %d, %v", pid, err)
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	if pid, err := listenerOf(socket); pid != os.Getpid() || err != nil {
		t.Errorf("own socket: %d, %v", pid, err)
	}
	ln.SetUnlinkOnClose(false)
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	if pid, err := listenerOf(socket); pid != 0 || err != nil {
		t.Errorf("dead socket: %d, %v", pid, err)
	}
}

// flawless is a stream of 100 packets with one output, and its rule's status, as
// they have to be.
func flawless() (flown, control.Stats) {
	s := testStreams()[2]
	source, other := traffic.SendReport{Packets: 100, Stream: "a"}, traffic.SendReport{Packets: 10, Stream: "b"}
	c := traffic.Counters{Datagrams: 100, Received: 100}
	r := traffic.RecvReport{Total: c, Groups: []traffic.GroupReport{{Counters: c, Flows: []traffic.Flow{{Stream: "a", Received: 100}}}}}
	n := control.Counter{Packets: 100}
	return flown{stream: s, count: 100, sent: source, other: other, received: []traffic.RecvReport{r}}, control.Stats{
		Rules: []control.RuleStatus{{
			Rule: s.rule, State: control.StateActive, UsedPath: "kernel", Matched: n,
			Outputs: []control.OutputStatus{{State: control.StateActive, Sent: n}},
		}},
		Passed: control.Counter{Packets: 12},
	}
}

func TestJudge(t *testing.T) {
	drop := []control.Drop{{Reason: "ttl", Counter: control.Counter{Packets: 3}}, {Reason: "loop"}}
	for name, tt := range map[string]struct {
		change func(f *flown, s *control.Stats)
		want   []string
	}{
		"flawless":        {func(*flown, *control.Stats) {}, []string{}},
		"sent too few":    {func(f *flown, _ *control.Stats) { f.count = 101 }, []string{"one-source: 100 packets sent, not 101"}},
		"matched too few": {func(_ *flown, s *control.Stats) { s.Rules[0].Matched.Packets = 99 }, []string{"one-source: the rule matched 99 packets of 100 sent"}},
		"relayed too many": {func(_ *flown, s *control.Stats) { s.Rules[0].Outputs[0].Sent.Packets = 101 },
			[]string{"one-source to sink2: the relay sent 101 copies of 100"}},
		"dropped before": {func(_ *flown, s *control.Stats) { s.Rules[0].Drops = drop }, []string{"one-source: the relay dropped 3 packets: ttl"}},
		"dropped at the output": {func(_ *flown, s *control.Stats) { s.Rules[0].Outputs[0].Drops = drop },
			[]string{"one-source to sink2: the relay dropped 3 packets: ttl"}},
		"pending": {func(_ *flown, s *control.Stats) {
			s.Rules[0].State, s.Rules[0].Reason = control.StatePending, "interface eth2 is down"
		},
			[]string{"one-source: the rule is not active: pending: interface eth2 is down"}},
		"no path": {func(_ *flown, s *control.Stats) { s.Rules[0].UsedPath = "" }, []string{"one-source: the rule is not active: active"}},
		"no rule": {func(_ *flown, s *control.Stats) { s.Rules = nil }, []string{
			"one-source: the rule is not active: -", "one-source: the rule matched 0 packets of 100 sent", "one-source to sink2: the relay sent 0 copies of 100"}},
		"received": {func(f *flown, _ *control.Stats) {
			f.received[0].Total.Lost, f.received[0].Total.Duplicated, f.received[0].Total.Corrupt, f.received[0].Total.Foreign = 1, 2, 3, 4
		}, []string{"one-source to sink2: 1 lost, 2 duplicated, 3 corrupt", "one-source to sink2: 4 packets not from the source"}},
		"the other came through": {func(f *flown, _ *control.Stats) {
			f.received[0].Groups[0].Flows = append(f.received[0].Groups[0].Flows, traffic.Flow{Stream: "b", Received: 1})
		}, []string{"one-source: 1 packet from 10.0.0.6 came through, which the rule does not name"}},
		"the other was not sent": {func(f *flown, _ *control.Stats) { f.other = traffic.SendReport{} },
			[]string{"one-source: the other source, 10.0.0.6, sent nothing"}},
		"the other was not seen": {func(_ *flown, s *control.Stats) { s.Passed.Packets = 9 },
			[]string{"the relay saw 9 packets that no rule matched, but other sources sent 10"}},
		"not transmitted": {func(_ *flown, s *control.Stats) {
			s.TransmitDrops = []control.TransmitDrop{{Interface: "eth2", Reason: "driver", Packets: 5}}
		}, []string{"the relay's interface eth2 did not take 5 packets (driver)"}},
	} {
		f, s := flawless()
		tt.change(&f, &s)
		v := judge([]flown{f}, s)
		if diff := cmp.Diff(tt.want, v.Faults); diff != "" || v.OK != (len(tt.want) == 0) {
			t.Errorf("%s: ok %v (-want +got):\n%s", name, v.OK, diff)
		}
	}
}

// What is judged of a stream that comes on two legs.
func TestJudgeLegs(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(f *flown, r *control.RuleStatus)
		want   []string
	}{
		"flawless":        {func(*flown, *control.RuleStatus) {}, []string{}},
		"matched too few": {func(_ *flown, r *control.RuleStatus) { r.Inputs[1].Matched.Packets = 94 }, []string{"two-legs: input 1 matched 94 packets of 95 sent"}},
		"no loss": {func(f *flown, r *control.RuleStatus) {
			f.sent.Legs[0].LeftOut, f.sent.Legs[0].Packets = 0, 100
			r.Inputs[0].Matched.Packets, r.Matched.Packets, r.Drops[0].Packets = 100, 195, 95
		}, []string{"two-legs: nothing is lost on a"}},
		"a copy too many":   {func(_ *flown, r *control.RuleStatus) { r.Drops[0].Packets = 88 }, []string{"two-legs: 100 packets and 89 copies became 100 and 88 dropped"}},
		"another reason":    {func(_ *flown, r *control.RuleStatus) { r.Drops[1].Packets = 1 }, []string{"two-legs: the relay dropped 1 packet: late"}},
		"the relay is mute": {func(_ *flown, r *control.RuleStatus) { r.Inputs = nil }, []string{"two-legs: input 0 matched 0 packets of 94 sent", "two-legs: input 1 matched 0 packets of 95 sent", "two-legs: 100 packets and 89 copies became 0 and 89 dropped"}},
	} {
		n := func(packets uint64) control.Counter { return control.Counter{Packets: packets} }
		c := traffic.Counters{Datagrams: 100, Received: 100}
		f := flown{
			stream: testStreams()[4], count: 100, received: []traffic.RecvReport{{Total: c, Groups: []traffic.GroupReport{{Counters: c}}}},
			sent: traffic.SendReport{Packets: 100, Legs: []traffic.LegReport{{Target: "a", Packets: 94, LeftOut: 6}, {Target: "b", Packets: 95, LeftOut: 5}}},
		}
		r := control.RuleStatus{
			Rule: f.rule, State: control.StateActive, UsedPath: "kernel", Matched: n(189), Drops: []control.Drop{{Reason: "duplicate", Counter: n(89)}, {Reason: "late"}},
			Outputs: []control.OutputStatus{{State: control.StateActive, Sent: n(100)}},
			Inputs:  []control.InputStatus{{Matched: n(94), Leg: &control.LegStatus{Won: 94}}, {Matched: n(95), Leg: &control.LegStatus{Won: 6}}},
		}
		tt.change(&f, &r)
		v := judge([]flown{f}, control.Stats{Rules: []control.RuleStatus{r}})
		if diff := cmp.Diff(tt.want, v.Faults); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestSentSoFar(t *testing.T) {
	arrived := func(flows ...traffic.Flow) []traffic.RecvReport {
		return []traffic.RecvReport{{}, {Groups: []traffic.GroupReport{{Flows: flows}}}}
	}
	for name, tt := range map[string]struct {
		received []traffic.RecvReport
		want     uint64
	}{
		"nothing arrived":           {nil, 64},
		"all that is counted":       {arrived(traffic.Flow{Stream: "a", HighestSeq: 63}), 64},
		"more than is counted":      {arrived(traffic.Flow{Stream: "a", HighestSeq: 99}), 100},
		"packets of another sender": {arrived(traffic.Flow{Stream: "b", HighestSeq: 99}), 64},
		"beside another's":          {arrived(traffic.Flow{Stream: "b", HighestSeq: 99}, traffic.Flow{Stream: "a", HighestSeq: 70}), 71},
	} {
		if got := sentSoFar(traffic.SendReport{Stream: "a", Packets: 64}, tt.received); got != tt.want {
			t.Errorf("%s: %d, want %d", name, got, tt.want)
		}
	}
}
