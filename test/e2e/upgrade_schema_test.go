package e2e_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"xdpcast/bpf"
	"xdpcast/internal/control"
	"xdpcast/internal/labtest"
	"xdpcast/internal/traffic"
)

// buildNext builds this program as a later release whose flow tables, outputs and config have another layout
// number, which it migrates from this one's. With dies, the program ends right after it has migrated.
func buildNext(t *testing.T, dies bool) string {
	t.Helper()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		t.Skipf("no sources and Go here: %v", err)
	}
	root, dir := strings.TrimSpace(string(out)), t.TempDir()
	overlay := map[string]string{}
	patch := func(file, from, to string) {
		t.Helper()
		path := filepath.Join(root, file)
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Count(string(text), from) != 1 {
			t.Fatalf("%s has %q %d times, want it once", file, from, strings.Count(string(text), from))
		}
		overlay[path] = filepath.Join(dir, strings.ReplaceAll(file, "/", "-"))
		if err := os.WriteFile(overlay[path], []byte(strings.Replace(string(text), from, to, 1)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	patch("bpf/bpf.go", fmt.Sprintf("\tSchema = %d\n", bpf.Schema), fmt.Sprintf("\tSchema = %d\n", bpf.Schema+1))
	patch("pkg/loader/schemas.go", "var schemas = map[uint32]*schema{\n", fmt.Sprintf(`var schemas = map[uint32]*schema{
	%d: {
		anew: []string{
			bpf.RelayMapConfig, bpf.RelayMapFlowTables4, bpf.RelayMapFlowTables6, bpf.RelayMapPrefixTables4, bpf.RelayMapPrefixTables6,
			bpf.RelayMapShortcuts, bpf.RelayMapOutputs,
		},
		flow:   int(unsafe.Sizeof(bpf.RelayFlow{})),
		flowOf: func(b []byte) bpf.RelayFlow { return *(*bpf.RelayFlow)(unsafe.Pointer(&b[0])) },
	},
`, bpf.Schema))
	if dies {
		patch("pkg/loader/migrate.go", "\treturn counters, nil\n}\n\nfunc (m *migration) close", "\tos.Exit(3)\n\treturn counters, nil\n}\n\nfunc (m *migration) close")
	}
	text, err := json.Marshal(map[string]any{"Replace": overlay})
	if err != nil {
		t.Fatal(err)
	}
	file, next := filepath.Join(dir, "overlay.json"), filepath.Join(dir, "xdpcast-next")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-overlay", file, "-o", next, "./cmd/xdpcast")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return next
}

// TestExecUpgradeMigrates replaces a daemon of root, and one of another user, by a release with another
// schema while streams flow on each path and a merged one: no packet is lost or reordered on the kernel path, none
// is doubled on any, no leave is sent, and the counters continue. When the new daemon dies right after it
// has migrated the state, the old one continues with state of its own.
func TestExecUpgradeMigrates(t *testing.T) {
	labtest.LongOnly(t, "builds the program as a later release; TestMigrate migrates without a daemon")
	next, dying := buildNext(t, false), buildNext(t, true)
	for _, user := range []string{"", "nobody"} {
		t.Run("user "+user, func(t *testing.T) {
			n, wire := newFastLeaveNetwork(t)
			in := newInstance(t, n.relay)
			binary := in.replaceable()
			paths := []string{"kernel", "fanout", "afxdp"}
			rules := "rules:\n"
			for i, path := range paths {
				rules += fmt.Sprintf("  - {name: %s, in: 239.1.1.%d:5000%%in0, out: ['239.2.1.%d:6000%%out0', '239.2.2.%d:6000%%out1'], path: %[1]s}\n", path, i+1, i+1, i+1)
			}
			const format = "field:3:8"
			rules += "  - {name: merged, in: ['239.1.3.1:5000%in0', '239.1.3.2:5000%in0'], merge: '" + format + ",skew=2s,reset=4s', out: '239.2.3.1:6000%out0'}\n"
			args := []string{"-c", in.write("rules.yaml", rules)}
			if user != "" {
				args = append(args, "--user", user)
			}
			d := in.start(args...)
			waitGroups(t, n.relay, 5)
			in.left(wire)

			const rate = 2_000
			var sinks []*sink
			var streams []*stream
			for i, path := range paths {
				in.waitState(path, control.StateActive)
				sinks = append(sinks, receive(t, n.sinks[0], fmt.Sprintf("239.2.1.%d:6000%%sink0", i+1), traffic.Expected{}))
				streams = append(streams, send(t, n.source, traffic.SendConfig{Target: target(t, fmt.Sprintf("239.1.1.%d:5000%%src0", i+1)), TTL: 16, Rate: traffic.Rate{Value: rate}}))
			}
			merged, stopMerged := mergedStream(t, n, format, rate)
			flow := func() {
				t.Helper()
				for _, s := range streams {
					s.flows(1_000)
				}
				merged.flows(1_000)
			}
			flow()
			before := in.status()

			in.replace(binary, next)
			in.mustCLI("upgrade", "--exec")
			pid := in.follow(before.PID)
			if user != "" {
				unprivileged(t, pid)
			}
			flow()
			if got := d.log.String(); strings.Count(got, fmt.Sprintf(`msg="pinned state migrated" from=%d to=%d`, bpf.Schema, bpf.Schema+1)) != 1 {
				t.Errorf("the log has no migration:\n%s", got)
			}
			if now := in.status(); now.Schema != bpf.Schema+1 || now.Failed+now.Pending != 0 || len(now.Warnings) != len(before.Warnings) {
				t.Errorf("status %+v", now)
			}
			in.add("added", "239.1.2.1:5000%in0", "239.2.9.1:6000%out0")
			if got := in.left(wire); len(got) > 0 {
				t.Errorf("groups were left: %v", got)
			}

			sent := make([]uint64, len(streams))
			for i, s := range streams {
				sent[i] = s.stop()
			}
			if fault := sinks[0].finish(sent[0]); fault != "" {
				t.Error(fault)
			}
			if got := in.rule("kernel"); got.Matched.Packets != sent[0] || got.Outputs[0].Sent.Packets != sent[0] || got.Outputs[1].Sent.Packets != sent[0] {
				t.Errorf("rule kernel: %+v, want %d", got, sent[0])
			}
			for i, path := range paths[1:] {
				// On a busy machine a worker may starve and lose packets, replaced or not.
				s, sent := sinks[i+1], sent[i+1]
				s.wait(sent * 8 / 10)
				total := s.receiver.Report().Total
				t.Logf("%s: %d packets of %d lost, longest gap %v", path, sent-min(sent, total.Received), sent, time.Duration(s.receiver.Report().Groups[0].LongestGapNS))
				if total.Duplicated+total.Foreign > 0 || path == "fanout" && total.Reordered > 0 {
					t.Errorf("%s: received %+v, want each packet once", path, total)
				}
				eventually(t, "each packet of the path "+path+" is accounted for", func() string {
					got := in.rule(path)
					dropped := uint64(0)
					for _, c := range got.Drops {
						dropped += c.Packets
					}
					for _, c := range got.Outputs[0].Drops {
						dropped += c.Packets
					}
					if got.Matched.Packets != got.Outputs[0].Sent.Packets+dropped || got.Outputs[0].Sent.Packets != s.received() {
						return fmt.Sprintf("%+v, %d received", got, s.received())
					}
					return ""
				})
			}
			if faults := stopMerged(); len(faults) > 0 {
				t.Errorf("merged: %v", faults)
			}
		})
		t.Run("dies, user "+user, func(t *testing.T) {
			n, wire := newFastLeaveNetwork(t)
			in := newInstance(t, n.relay)
			binary := in.replaceable()
			args := []string{"-c", in.write("rules.yaml", "rules:\n  - {name: one, in: 239.1.1.1:5000%in0, out: '239.2.1.1:6000%out0', path: kernel}\n  - {name: two, in: 239.1.1.2:5000%in0, out: '239.2.1.2:6000%out0', path: fanout}\n")}
			if user != "" {
				args = append(args, "--user", user)
			}
			in.start(args...)
			waitGroups(t, n.relay, 2)
			in.left(wire)
			s := receive(t, n.sinks[0], "239.2.1.1:6000%sink0", traffic.Expected{})
			stream := send(t, n.source, traffic.SendConfig{Target: target(t, "239.1.1.1:5000%src0"), TTL: 16, Rate: traffic.Rate{Value: 2_000}})
			stream.flows(1_000)
			before := in.status()
			in.replace(binary, dying)
			if got := in.cli("upgrade", "--exec"); got.code != 1 || !strings.Contains(got.stderr, "ended with exit status 3 before it was ready; this daemon continues") {
				t.Errorf("a successor that dies: %s", got)
			}
			now := in.status()
			if now.PID != before.PID || now.Schema != bpf.Schema || now.Failed+now.Pending != 0 {
				t.Errorf("afterwards %+v", now)
			}
			if text := strings.Join(now.Warnings, "\n"); !strings.Contains(text, "pinned state was replaced: counters began anew") || !strings.Contains(text, fmt.Sprintf("it has %d, this xdpcast has %d", bpf.Schema+1, bpf.Schema)) {
				t.Errorf("it warns %q", text)
			}
			at := s.received()
			stream.flows(1_000)
			s.wait(at + 900)
			in.add("added", "239.1.2.1:5000%in0", "239.2.9.1:6000%out0")
			if got := in.left(wire); len(got) > 0 {
				t.Errorf("groups were left: %v", got)
			}
			sent := stream.stop()
			s.wait(sent / 2)
			total := s.receiver.Report().Total
			t.Logf("%d of %d lost", sent-min(sent, total.Received), sent)
			if total.Duplicated+total.Foreign+total.Reordered > 0 {
				t.Errorf("received %+v", total)
			}
			// The next release takes over from here.
			in.replace(binary, next)
			in.mustCLI("upgrade", "--exec")
			in.follow(before.PID)
			if now := in.status(); now.Schema != bpf.Schema+1 || now.Failed+now.Pending != 0 {
				t.Errorf("afterwards %+v", now)
			}
		})
	}
}

// mergedStream sends numbers on two legs to a merging rule's inputs. stop ends it, and returns what is wrong
// with what the rule has relayed.
func mergedStream(t *testing.T, n *network, format string, rate float64) (s *stream, stop func() []string) {
	t.Helper()
	numbering, err := traffic.ParseNumbering(format)
	if err != nil {
		t.Fatal(err)
	}
	legs, err := traffic.ParseLegs("239.1.3.1:5000%src0,239.1.3.2:5000%src0", "", "", "")
	if err != nil {
		t.Fatal(err)
	}
	sub, err := traffic.ParseSubscription("239.2.3.1:6000%sink0")
	if err != nil {
		t.Fatal(err)
	}
	var r *traffic.Receiver
	labtest.Do(t, n.sinks[0], func() (err error) {
		r, err = traffic.NewReceiver(traffic.RecvConfig{Subscriptions: []traffic.Subscription{sub}, Numbering: numbering, FromStart: true, SocketBuffer: 64 << 20})
		return err
	})
	t.Cleanup(func() { _ = r.Close() })
	ended := make(chan error, 1)
	go func() { ended <- r.Run(t.Context()) }()
	s = send(t, n.source, traffic.SendConfig{Legs: legs, Numbering: numbering, TTL: 16, Size: 200, Rate: traffic.Rate{Value: rate}})
	return s, func() []string {
		sent := s.stop()
		eventually(t, "each number arrives", func() string {
			if got := r.Report().Total.Received; got < sent {
				return fmt.Sprintf("%d of %d", got, sent)
			}
			return ""
		})
		return r.Report().Faults()
	}
}
