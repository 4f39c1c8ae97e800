package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"xdpcast/internal/control"
	"xdpcast/pkg/rules"
)

var update = flag.Bool("update", false, "write the golden files and docs/cli.md instead of comparing")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The clock of the tests, and times before it.
var clock = time.Date(2025, 1, 2, 3, 4, 5, 0, time.UTC)

func before(d time.Duration) *time.Time {
	t := clock.Add(-d)
	return &t
}

// backend is a daemon with two rules. It notes what it is asked to change.
type backend struct {
	mu    sync.Mutex
	calls []string
	looks int
	err   error
}

func (b *backend) note(call string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls = append(b.calls, call)
	return b.err
}

func (b *backend) list() []control.RuleStatus {
	return []control.RuleStatus{
		{
			Rule: control.Rule{
				Name: "cam1", In: "10.0.0.5@239.1.1.1:5000%eth0",
				Out: []string{"239.2.2.2:6000%eth1,src=keep,ttl=8", "10.0.9.9:6000%eth2"}, Path: "auto",
			},
			ID: 3, Origin: control.OriginAPI, State: control.StateActive, UsedPath: "kernel",
			Matched: control.Counter{Packets: 1_234_567, Bytes: 1_604_937_100}, LastSeen: before(2 * time.Second),
			YieldsTo: []string{"cam0"}, WinsOver: []string{"wide", "wider"},
			Drops:  []control.Drop{{Reason: "ttl", Counter: control.Counter{Packets: 2, Bytes: 2600}}},
			Inputs: []control.InputStatus{{Interface: "eth0", State: control.StateActive}, {Interface: "eth1", State: control.StatePending, Reason: "interface eth1 is down"}},
			Outputs: []control.OutputStatus{
				{Slot: 0, Output: "239.2.2.2:6000%eth1,src=keep,ttl=8", State: control.StateActive, Sent: control.Counter{Packets: 1_234_565, Bytes: 1_604_934_500}},
				{Slot: 1, Output: "10.0.9.9:6000%eth2", Interface: "eth2", State: "no_neighbour", Reason: "10.0.9.9 does not answer", NextHop: "10.0.8.1", MAC: "02:00:00:00:00:07", Drops: []control.Drop{{Reason: "no_neighbour", Counter: control.Counter{Packets: 1_234_565, Bytes: 1_604_934_500}}}},
			},
		},
		{
			Rule:   control.Rule{Name: "feed-a", In: "239.9.0.1:15000%eth7", Out: []string{"239.9.0.1:15000%eth1"}, Path: "kernel"},
			Origin: control.OriginFile, State: control.StatePending, Reason: "interface eth7 not found",
			Outputs: []control.OutputStatus{{Output: "239.9.0.1:15000%eth1", State: control.StatePending}},
		},
	}
}

func (b *backend) Status(context.Context) (control.Status, error) {
	return control.Status{
		Version: "v1.2.3", PID: 42, Started: clock.Add(-27 * time.Hour), Ready: true, PinDir: "/sys/fs/bpf/xdpcast", Schema: 1,
		Config: "/etc/xdpcast/rules.yaml", Rules: 2, Active: 1, Pending: 1,
		Interfaces: []control.InterfaceStatus{
			{Name: "eth0", Index: 2, Link: control.LinkUp, Mode: "native", Roles: []string{"input"}, ProgramID: 71, LinkID: 12, JoinsAttempted: 3, JoinsSucceeded: 2, JoinsFailed: 1, LeavesAttempted: 1, LeavesSucceeded: 1},
			{Name: "eth1", Index: 3, Link: control.LinkNoCarrier, Master: "br0", Mode: "generic", Roles: []string{"input", "output"}, ProgramID: 71, LinkID: 13, Note: "driver has no native XDP", TransmitDrops: 250_000},
			{Name: "eth7", Link: control.LinkAbsent, Roles: []string{"input"}},
		},
		Workers: []control.Worker{
			{
				Interface: "eth0", Path: "afxdp", Queue: 0, State: control.StateActive, Mode: "copy", Received: 99_000,
				Lost:   []control.Loss{{Reason: "ring_full", Packets: 1000}, {Reason: "rule_gone", Packets: 3}},
				Socket: &control.SocketStatus{MultiBuffer: true, FrameSize: 2048, TXNeedWakeup: true, RXRingFull: 1000, TXRingEmpty: 12},
				Senders: []control.WorkerSender{
					{Interface: "eth1", Queue: 0, Mode: "copy", State: control.StateActive, Lost: 2},
					{Interface: "wg0", Queue: -1, Mode: "packet", State: control.StateActive, Cause: "the interface has no Ethernet header"},
				},
			},
			{Interface: "eth0", Path: "afxdp", Queue: 1, State: control.WorkerMissing, Cause: "bind to queue 1 of interface 2: another socket has it: device or resource busy"},
			{Interface: "eth3", Path: "fanout", Queue: 0, State: control.StateActive, Mode: "hash", Group: 4711, Received: 5, Lost: []control.Loss{{Reason: "ring_full", Packets: 7}}, Failures: 1},
		},
		Passed:   control.Counter{Packets: 99_999, Bytes: 6_400_000},
		Drops:    []control.Drop{{Reason: "ttl", Counter: control.Counter{Packets: 2, Bytes: 2600}}, {Reason: "loop"}},
		Warnings: []string{"eth1: generic mode is slow"},
	}, b.note("status")
}

func (b *backend) Rules(context.Context) ([]control.RuleStatus, error) {
	return b.list(), b.note("rules")
}

func (b *backend) Rule(_ context.Context, name string) (control.RuleStatus, error) {
	for _, r := range b.list() {
		if r.Name == name {
			return r, b.note("rule " + name)
		}
	}
	return control.RuleStatus{}, control.Errorf(control.KindNotFound, "rule %q: %w", name, control.ErrNotFound)
}

func (b *backend) AddRule(_ context.Context, r control.Rule) (control.RuleStatus, error) {
	s := control.RuleStatus{Rule: r, State: control.StateActive, UsedPath: "kernel"}
	if strings.HasSuffix(r.In, "%eth7") {
		s.State, s.UsedPath, s.Reason = control.StatePending, "", "interface eth7 not found"
	}
	return s, b.note("add " + ruleText(r))
}

func (b *backend) PutRule(_ context.Context, r control.Rule, _ control.ApplyOptions) (control.ApplyResult, error) {
	return control.ApplyResult{Added: 1}, b.note("put " + r.Name)
}

func (b *backend) DeleteRule(_ context.Context, name string) error {
	if strings.HasPrefix(name, "no") {
		return control.Errorf(control.KindNotFound, "rule %q: %w", name, control.ErrNotFound)
	}
	return b.note("del " + name)
}

func (b *backend) Apply(_ context.Context, list []rules.Rule, o control.ApplyOptions) (control.ApplyResult, error) {
	call := "apply"
	if o.DryRun {
		call = "dry run"
	}
	result := control.ApplyResult{DryRun: o.DryRun, Added: len(list), Changed: 1, Removed: 1, Kept: 1}
	for _, r := range list {
		call += " " + r.Name
		result.Changes = append(result.Changes, control.Change{Op: control.OpAdd, Rule: control.FromRule(r)})
	}
	old := b.list()
	changed := old[0].Rule
	changed.Path = "kernel"
	result.Changes = append(result.Changes, control.Change{Op: control.OpChange, Rule: changed, Old: &old[0].Rule},
		control.Change{Op: control.OpRemove, Rule: old[1].Rule})
	return result, b.note(call)
}

func (b *backend) Groups(context.Context) ([]control.Group, error) {
	return []control.Group{
		{Interface: "eth0", Index: 2, Group: "239.1.1.1", Source: "10.0.0.5", State: control.GroupJoined, Since: before(90 * time.Minute), Tries: 1, Rules: []string{"cam1"}, LastPacket: before(2 * time.Second),
			Multicast: control.Multicast{Version: "IGMPv3", Querier: "10.0.0.254", QuerierSeen: before(70 * time.Second), Queries: 44}, Detail: "joined, receiving, querier 10.0.0.254"},
		{Interface: "eth1", Index: 3, Group: "239.1.1.1", State: control.GroupJoined, Since: before(12 * time.Second), Tries: 1, Rules: []string{"cam2"},
			Multicast: control.Multicast{Version: "IGMPv3"}, Detail: "joined, silent for 12s, no querier heard"},
		{Interface: "eth7", Group: "239.9.0.1", State: control.GroupRetrying, Since: before(time.Minute), Tries: 3, Next: before(-4 * time.Second), Cause: "interface eth7 not found", Rules: []string{"feed-a", "feed-b"},
			Detail: "retrying: interface eth7 not found (next try in 4s)"},
	}, b.note("groups")
}

func (b *backend) Explain(_ context.Context, packet string) (control.Explanation, error) {
	e := control.Explanation{
		Packet: packet, Why: "rule cam1 takes it: (source, group, port) comes before (any source, prefix of 16 bits, any port)",
		Candidates: []control.Candidate{
			{Rule: "cam1", Input: "10.0.0.5@239.1.1.1:5000%eth0", Kind: "source, group, port", State: control.StateActive},
			{Rule: "all", Input: "239.1.0.0/16%eth0", Kind: "any source, prefix of 16 bits, any port", State: control.StatePending, Reason: "interface eth7 not found"},
		},
		Path: "kernel", PathReason: "native XDP on eth0",
		Outputs: []control.ExplainedOutput{
			{Slot: 0, Output: "239.2.2.2:6000%eth1", Rewrite: "to 239.2.2.2:6000, from 10.1.0.1, source port kept", State: control.StateActive},
			{Slot: 1, Output: "10.0.9.9:6000%eth2", Rewrite: "to 10.0.9.9:6000, source kept, ttl 16", State: "no_neighbour", Reason: "nobody answers for 10.0.9.9 on eth2", NextHop: "10.0.9.9 on eth2", Dropped: true},
		},
	}
	groups, err := b.Groups(context.Background())
	e.Memberships = groups[:1]
	return e, err
}

// Stats counts on by 1,000 packets of 1,250 bytes and one second a look.
func (b *backend) Stats(context.Context) (control.Stats, error) {
	err := b.note("stats")
	b.mu.Lock()
	defer b.mu.Unlock()
	list := b.list()
	n := uint64(b.looks * 1000)
	list[0].Matched.Packets += n
	list[0].Matched.Bytes += n * 1250
	s := control.Stats{
		Time: clock.Add(time.Duration(b.looks) * time.Second), Rules: list,
		Drops:         []control.Drop{{Reason: "no_neighbour", Counter: control.Counter{Packets: 1_234_565, Bytes: 1_604_934_500}}, {Reason: "ttl", Counter: control.Counter{Packets: 2, Bytes: 2600}}},
		TransmitDrops: []control.TransmitDrop{{Interface: "eth1", Reason: "ENOSPC", Packets: 250_000}},
		ReceiveDrops:  []control.ReceiveDrop{{Interface: "eth0", Path: "afxdp", Loss: control.Loss{Reason: "ring_full", Packets: 1000}}},
	}
	b.looks++
	return s, err
}

func (b *backend) Reload(_ context.Context, o control.ApplyOptions) (control.ApplyResult, error) {
	return control.ApplyResult{
		DryRun: o.DryRun, Added: 1200, Kept: 3, Changes: []control.Change{{Op: control.OpAdd, Rule: b.list()[0].Rule}},
	}, b.note("reload")
}

func (b *backend) Confirm(context.Context) (control.UnconfirmedChange, error) {
	return control.UnconfirmedChange{What: "reload", UID: root(), Time: clock.Add(-time.Minute), Until: clock.Add(time.Minute)}, b.note("confirm")
}

func root() *uint32 { return new(uint32) }

func (b *backend) History(context.Context) ([]control.HistoryEntry, error) {
	nobody := uint32(4_000_000_001)
	return []control.HistoryEntry{
		{Back: 0, Time: clock.Add(-2 * time.Second), What: "undone: reload was not confirmed", Added: 1, Removed: 12, Rules: 1000},
		{Back: 1, Time: clock.Add(-2 * time.Minute), What: "reload", UID: root(), Added: 12, Removed: 1, Changed: 3, Rules: 1011},
		{Back: 2, Time: clock.Add(-50 * time.Hour), What: "rule add cam1", UID: &nobody, Added: 1, Rules: 1000},
	}, b.note("history")
}

func (b *backend) Rollback(_ context.Context, back int, o control.ApplyOptions) (control.ApplyResult, error) {
	if back > 2 {
		return control.ApplyResult{}, control.Errorf(control.KindNotFound, "rollback %d: 2 earlier sets are kept", back)
	}
	result := control.ApplyResult{DryRun: o.DryRun, Removed: 1, Kept: 3, Changes: []control.Change{{Op: control.OpRemove, Rule: b.list()[0].Rule}}}
	if o.Confirm > 0 {
		by := clock.Add(o.Confirm)
		result.ConfirmBy = &by
	}
	return result, b.note(fmt.Sprint("rollback ", back))
}

// daemon serves b; the commands find it by the environment.
func daemon(t *testing.T, b control.Backend) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "cli") // a short path: it must fit a socket's name
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	ln, err := control.Listen(socket, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- control.NewServer(b, control.Options{}).Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Setenv("XDPCAST_SOCKET", socket)
}

// result is what a command did.
type result struct {
	code           int
	stdout, stderr string
}

func call(stdin string, args ...string) result {
	var stdout, stderr bytes.Buffer
	code := runAt(context.Background(), func() time.Time { return clock }, append([]string{"xdpcast"}, args...), strings.NewReader(stdin), &stdout, &stderr)
	return result{code, stdout.String(), stderr.String()}
}

// golden compares got with a file of testdata.
func golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got), write it anew with -update:\n%s", file, diff)
	}
}

func TestGolden(t *testing.T) {
	daemon(t, &backend{})
	for name, args := range map[string]string{
		"rule_list": "rule list", "rule_show": "rule show cam1", "rule_show_pending": "rule show feed-a",
		"group_list": "group list", "group_show": "group show 239.1.1.1", "group_show_retrying": "group show [239.9.0.1]%eth7",
		"stats_name": "stats cam1", "status": "status",
		"explain":    "explain 10.0.0.5@239.1.1.1:5000%eth0",
		"rule_apply": "rule apply --dry-run -", "reload": "reload",
		"history": "history", "rollback": "rollback 2", "confirm": "confirm",
	} {
		for _, format := range []string{"table", "json"} {
			got := call("rules: [{name: new, in: 239.3.3.3:1%eth0, out: [239.4.4.4:2%eth1]}]\n", append(strings.Fields(args), "-o", format)...)
			if got.code != exitDone || got.stderr != "" {
				t.Errorf("%s: %+v", args, got)
			}
			golden(t, filepath.Join("testdata", name+"."+format), got.stdout)
			if format == "json" && !json.Valid([]byte(got.stdout)) {
				t.Errorf("%s: not JSON: %s", args, got.stdout)
			}
		}
	}
	for name, args := range map[string]string{"export.yaml": "rule export", "export_file.yaml": "rule export --origin file"} {
		got := call("", strings.Fields(args)...)
		if got.code != exitDone {
			t.Errorf("%s: %+v", args, got)
		}
		golden(t, filepath.Join("testdata", name), got.stdout)
	}
}

func TestGoldenStats(t *testing.T) {
	for _, format := range []string{"table", "json"} {
		daemon(t, &backend{}) // a new one: its counters move on
		golden(t, "testdata/stats."+format, call("", "stats", "-o", format).stdout)
	}
}

func TestExportIsWhatApplyReads(t *testing.T) {
	b := &backend{}
	daemon(t, b)
	exported := call("", "rule", "export")
	got := call(exported.stdout, "rule", "apply", "-")
	if got.code != exitDone || b.calls[len(b.calls)-1] != "apply cam1 feed-a" {
		t.Errorf("apply of an export: %+v, %q", got, b.calls)
	}
}

// What each command line asks of the daemon, says and exits with.
func TestCommands(t *testing.T) {
	file := filepath.Join(t.TempDir(), "rules.yaml")
	bad := filepath.Join(t.TempDir(), "bad.yaml")
	for name, text := range map[string]string{
		file: "rules:\n  - name: a\n    in: 239.3.3.3:1%eth0\n    out: [239.4.4.4:2%eth1]\n",
		bad:  "rules:\n  - name: a\n    in: 239.3.3.3:0%eth0\n    out: [239.4.4.4:2%eth1]\n  - name: b\n    colour: red\n",
	} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const in, out = "239.1.1.1:5000%eth0", "239.2.2.2:6000%eth1,src=keep,ttl=8"
	const added = "add cam1: " + in + " -> " + out
	for _, tt := range []struct {
		args   []string
		call   string // what the daemon was asked, "" for nothing
		code   int
		stdout string
		stderr []string // parts; nil for nothing
	}{
		// Flags before, behind and around the name, in every spelling.
		{[]string{"rule", "add", "cam1", "--in", in, "--out", out}, added, 0, "rule cam1: active, path kernel, 1 output\n", nil},
		{[]string{"rule", "add", "--in", in, "--out", out, "cam1"}, added, 0, "rule cam1: active, path kernel, 1 output\n", nil},
		{[]string{"rule", "add", "--in=" + in, "cam1", "-out=" + out}, added, 0, "rule cam1: active, path kernel, 1 output\n", nil},
		{[]string{"rule", "add", "--in", in, "--out", out, "--", "cam1"}, added, 0, "rule cam1: active, path kernel, 1 output\n", nil},
		{[]string{"rule", "add", "cam1", "--in", in, "--out", out, "--out", "10.0.9.9:6000%eth2", "--path", "kernel"}, added + " 10.0.9.9:6000%eth2 (path kernel)", 0, "rule cam1: active, path kernel, 2 outputs\n", nil},
		{[]string{"rule", "add", "cam1", "--in", "239.1.1.1:5000%eth7", "--out", out}, "add cam1: 239.1.1.1:5000%eth7 -> " + out, 0, "rule cam1: pending: interface eth7 not found\n", nil},
		{[]string{"rule", "del", "cam1", "help", "h"}, "del cam1 del help del h", 0, "rule cam1: removed\nrule help: removed\nrule h: removed\n", nil},
		{[]string{"rule", "del", "--", "-x", "--in"}, "del -x del --in", 0, "rule -x: removed\nrule --in: removed\n", nil},
		{[]string{"rule", "del", "none", "cam1", "nope"}, "del cam1", 1, "rule cam1: removed\n", []string{"xdpcast: rule \"none\": not found\nxdpcast: rule \"nope\": not found\n"}},
		{[]string{"rule", "show", "none"}, "", 1, "", []string{`xdpcast: rule "none": not found`}},
		{[]string{"stats", "none"}, "", 1, "", []string{`xdpcast: rule "none": not found`}},
		{[]string{"group", "show", "239.7.7.7%eth0"}, "groups", 1, "", []string{`no membership of 239.7.7.7%eth0: see "xdpcast group list"`}},
		{[]string{"group", "show", "239.1.1.1%eth7"}, "groups", 1, "", []string{`no membership of 239.1.1.1%eth7`}},
		{[]string{"rule", "apply", file}, "apply a", 0, "+ a: 239.3.3.3:1%eth0 -> 239.4.4.4:2%eth1\n" +
			"< cam1: 10.0.0.5@239.1.1.1:5000%eth0 -> 239.2.2.2:6000%eth1,src=keep,ttl=8 10.0.9.9:6000%eth2\n" +
			"> cam1: 10.0.0.5@239.1.1.1:5000%eth0 -> 239.2.2.2:6000%eth1,src=keep,ttl=8 10.0.9.9:6000%eth2 (path kernel)\n" +
			"- feed-a: 239.9.0.1:15000%eth7 -> 239.9.0.1:15000%eth1 (path kernel)\n" +
			"1 added, 1 removed, 1 changed, 1 kept\n", nil},
		{[]string{"rule", "apply", bad}, "", 1, "", []string{"xdpcast: " + bad + ":3: ", "xdpcast: " + bad + ":6: ", "colour"}},
		{[]string{"rule", "apply", "-"}, "", 1, "", []string{`xdpcast: stdin: rules missing: want them in a list below "rules:", or "rules: []" for none`}}, // of nothing
		{[]string{"rule", "apply", "/absent"}, "", 1, "", []string{"/absent: no such file"}},
		{[]string{"check", file}, "", 0, "ok: 1 rule\n", nil},
		{[]string{"check", "-c", file}, "", 0, "ok: 1 rule\n", nil},
		{[]string{"check", bad}, "", 1, "", []string{"xdpcast: " + bad + ":3: ", "port", "xdpcast: " + bad + ":6: ", "colour"}},
		{[]string{"check", "/proc/self"}, "", 1, "", []string{"is a directory"}},
		{[]string{"convert", "/proc/self"}, "", 1, "", []string{"is a directory"}},
		{[]string{"convert", file}, "", 1, "", []string{"xdpcast: " + file + ": no line of smcroute.conf (mroute from ...), igmpproxy.conf"}},
		{[]string{"convert", "--from", "frr", "/dev/null"}, "", 0, "rules: []\n", []string{"xdpcast: frr: 0 rules; 0 lines without an equivalent, in whole or in part\n"}},
		{[]string{"rollback"}, "rollback 1", 0, "- cam1: 10.0.0.5@239.1.1.1:5000%eth0 -> 239.2.2.2:6000%eth1,src=keep,ttl=8 10.0.9.9:6000%eth2\n0 added, 1 removed, 0 changed, 3 kept\n", nil},
		{[]string{"rollback", "3"}, "", 1, "", []string{"xdpcast: rollback 3: 2 earlier sets are kept\n"}},
		{[]string{"--version"}, "", 0, "xdpcast version " + buildVersion() + "\n", nil},

		{[]string{"rule", "add", "cam1", "--in", "239.1.1.1:5000%eth0,vlan=7", "--out", "239.1.1.1:5000%eth0,vlan=7", "--allow-loop"}, "add cam1: 239.1.1.1:5000%eth0,vlan=7,loop=allow -> 239.1.1.1:5000%eth0,vlan=7", 0, "rule cam1: active, path kernel, 1 output\n", nil},
		{[]string{"rule", "add", "cam1", "--in", in + ",loop=allow", "--out", in, "--allow-loop"}, "add cam1: " + in + ",loop=allow -> " + in, 0, "rule cam1: active, path kernel, 1 output\n", nil},

		// Wrong usage.
		{[]string{"rule", "add", "cam1", "--in", in, "--out", in}, "", 2, "", []string{"want no loop: it feeds the rule's own input, cam1 -> cam1"}},
		{[]string{"rule", "add", "cam1", "--in", "x", "--out", in, "--allow-loop"}, "", 2, "", []string{`input "x": interface missing`}},
		{[]string{"rool"}, "", 2, "", []string{`xdpcast: unknown command "rool": want one of run, `}},
		{[]string{"rule"}, "", 2, "", []string{"xdpcast rule: which? want one of add, del, show, list, export, apply"}},
		{[]string{"rule", "ad"}, "", 2, "", []string{`xdpcast rule: unknown command "ad": want one of add, `}},
		{[]string{"--nope"}, "", 2, "", []string{"flag provided but not defined: -nope; see \"xdpcast --help\""}},
		{[]string{"rule", "list", "--nope", "x"}, "", 2, "", []string{"-nope; see \"xdpcast rule list --help\""}},
		{[]string{"rule", "list", "x"}, "", 2, "", []string{`unexpected argument "x"`}},
		{[]string{"rule", "list", "-o", "yaml"}, "", 2, "", []string{`--output "yaml": want table or json`}},
		{[]string{"rule", "add"}, "", 2, "", []string{"xdpcast rule add: NAME missing"}},
		{[]string{"rule", "add", "cam1", "--out", out}, "", 2, "", []string{"--in missing"}},
		{[]string{"rule", "add", "cam1", "--in", in}, "", 2, "", []string{"--out missing"}},
		{[]string{"rule", "add", "cam1", "--out", out, "--in"}, "", 2, "", []string{"flag needs an argument: -in"}},
		{[]string{"rule", "add", "cam1", "cam2", "--in", in, "--out", out}, "", 2, "", []string{`unexpected argument "cam2"`}},
		{[]string{"rule", "add", "cam1", in, out}, "", 2, "", []string{`unexpected argument "` + in + `": give an endpoint with --in or --out`}},
		{[]string{"rule", "add", "cam1", "--in", "239.1.1.1:0%eth0", "--out", out}, "", 2, "", []string{`rule "cam1": `, "port", `"0"`, "65535"}},
		{[]string{"rule", "add", "cam1", "--in", in, "--out", out, "--path", "fast"}, "", 2, "", []string{`rule "cam1": path "fast": want auto, kernel, afxdp or fanout`}},
		{[]string{"rule", "del"}, "", 2, "", []string{"NAME... missing"}},
		{[]string{"rule", "show"}, "", 2, "", []string{"NAME missing"}},
		{[]string{"group", "show"}, "", 2, "", []string{"GROUP[%INTERFACE] missing"}},
		{[]string{"group", "show", "cam1"}, "", 2, "", []string{`"cam1": want GROUP or GROUP%INTERFACE`}},
		{[]string{"group", "show", "239.1.1.1%"}, "", 2, "", []string{`"239.1.1.1%": want GROUP or GROUP%INTERFACE`}},
		{[]string{"rule", "apply"}, "", 2, "", []string{"FILE missing"}},
		{[]string{"rule", "apply", file, "--confirm", "2"}, "", 2, "", []string{`--confirm: "2": want a time from 1s to 24h, such as 2m`}},
		{[]string{"reload", "--confirm", "0s"}, "", 2, "", []string{`--confirm: "0s": want a time from 1s to 24h, such as 2m`}},
		{[]string{"reload", "--confirm", "2m", "--dry-run"}, "", 2, "", []string{"--dry-run and --confirm together: a dry run has nothing to confirm"}},
		{[]string{"rollback", "0"}, "", 2, "", []string{`rollback "0": want how many changes to go back, 1 or more`}},
		{[]string{"rollback", "1", "2"}, "", 2, "", []string{`unexpected argument "2"`}},
		{[]string{"confirm", "1"}, "", 2, "", []string{`unexpected argument "1"`}},
		{[]string{"rule", "export", "--origin", "x"}, "", 2, "", []string{`--origin "x": want file or api`}},
		{[]string{"check"}, "", 2, "", []string{"FILE missing"}},
		{[]string{"convert"}, "", 2, "", []string{"FILE"}},
		{[]string{"convert", "--from", "mrouted", file}, "", 2, "", []string{`--from "mrouted": want smcroute, igmpproxy, frr or detect`}},
		{[]string{"check", "-c", file, file}, "", 2, "", []string{"one file at a time"}},
		{[]string{"stats", "--watch", "--interval", "1ms"}, "", 2, "", []string{"--interval 1ms: want at least 100ms"}},
		{[]string{"stats", "--interval", "soon"}, "", 2, "", []string{`invalid value "soon" for flag -interval`}},
	} {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			b := &backend{}
			daemon(t, b)
			got := call("", tt.args...)
			if asked := strings.Join(b.calls, " "); got.code != tt.code || got.stdout != tt.stdout || asked != tt.call {
				t.Errorf("%+v, the daemon was asked %q; want %d, %q, %q", got, asked, tt.code, tt.stdout, tt.call)
			}
			for _, part := range tt.stderr {
				if !strings.Contains(got.stderr, part) {
					t.Errorf("stderr %q does not say %q", got.stderr, part)
				}
			}
			if tt.stderr == nil && got.stderr != "" {
				t.Errorf("stderr %q", got.stderr)
			}
			for line := range strings.Lines(got.stderr) {
				if !strings.HasPrefix(line, "xdpcast: ") {
					t.Errorf("stderr line %q", line)
				}
			}
		})
	}
}

func TestDaemonErrors(t *testing.T) {
	b := &backend{err: control.Errorf(control.KindConflict, "rule \"cam1\": input is taken by rule \"cam0\"")}
	daemon(t, b)
	for _, args := range []string{
		"rule add cam1 --in 239.1.1.1:5000%eth0 --out 239.2.2.2:6000%eth1", "rule del cam1", "rule list", "rule show cam1", "rule export",
		"group list", "group show 239.1.1.1", "stats", "stats --watch", "status", "reload", "confirm", "history", "rollback",
	} {
		got := call("", strings.Fields(args)...)
		if want := (result{1, "", "xdpcast: rule \"cam1\": input is taken by rule \"cam0\"\n"}); got != want {
			t.Errorf("%s: %+v, want %+v", args, got, want)
		}
	}
}

func TestNoDaemon(t *testing.T) {
	t.Setenv("XDPCAST_PIN_DIR", filepath.Join(t.TempDir(), "absent")) // whatever this machine's own daemon has pinned
	socket := filepath.Join(t.TempDir(), "s")
	want := result{1, "", "xdpcast: no xdpcast is running (no answer at " + socket + "): start one with \"xdpcast run\"\n"}
	for _, args := range []string{"status", "rule list", "group list", "group show 239.1.1.1", "stats", "rule del a b", "reload", "confirm", "history", "rollback"} {
		for name, line := range map[string][]string{
			"before": append([]string{"--socket", socket}, strings.Fields(args)...),
			"behind": append(strings.Fields(args), "--socket="+socket),
		} {
			if got := call("", line...); got != want {
				t.Errorf("%s, flag %s: %+v, want %+v", args, name, got, want)
			}
		}
	}
}

func TestHelp(t *testing.T) {
	for _, args := range []string{"", "help", "--help", "rule --help", "rule add --help", "rule add cam1 -h", "help rule", "stats --help"} {
		got := call("", strings.Fields(args)...)
		if got.code != exitDone || got.stderr != "" || !strings.Contains(got.stdout, "USAGE:") {
			t.Errorf("xdpcast %s: %+v", args, got)
		}
	}
}

// blocks ends the context once sep has been written n times.
type blocks struct {
	buf    bytes.Buffer
	sep    string
	n      int
	cancel func()
}

func (b *blocks) Write(p []byte) (int, error) {
	n, err := b.buf.Write(p)
	if strings.Count(b.buf.String(), b.sep) >= b.n {
		b.cancel()
	}
	return n, err
}

func TestWatch(t *testing.T) {
	for format, sep := range map[string]string{"table": "UNSENT BY  PACKETS  REASON\neth1          250k  ENOSPC\n", "json": "\n"} {
		daemon(t, &backend{})
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		out := &blocks{sep: sep, n: 2, cancel: cancel}
		var stderr bytes.Buffer
		code := run(ctx, strings.Fields("xdpcast stats --watch --interval 100ms -o "+format), nil, out, &stderr)
		if code != exitDone || stderr.Len() > 0 {
			t.Errorf("%s: exit code %d, %s", format, code, &stderr)
		}
		if format == "table" {
			golden(t, "testdata/stats_watch.table", out.buf.String())
			continue
		}
		for line := range strings.Lines(out.buf.String()) {
			var s control.Stats
			if err := json.Unmarshal([]byte(line), &s); err != nil || len(s.Rules) != 2 {
				t.Errorf("line %q: %v", line, err)
			}
		}
	}
}

func TestRates(t *testing.T) {
	look := func(second int, packets uint64) control.Stats {
		return control.Stats{Time: clock.Add(time.Duration(second) * time.Second), Rules: []control.RuleStatus{{
			Rule: control.Rule{Name: "a"}, Matched: control.Counter{Packets: packets, Bytes: packets * 100},
		}}}
	}
	key := endpointKey{"a", matchedSlot}
	first := look(0, 1000)
	for name, tt := range map[string]struct {
		before *control.Stats
		now    control.Stats
		want   map[endpointKey]rate
	}{
		"first look":        {nil, first, map[endpointKey]rate{}},
		"counting":          {&first, look(2, 1500), map[endpointKey]rate{key: {250, 200_000}}},
		"still":             {&first, look(2, 1000), map[endpointKey]rate{key: {0, 0}}},
		"counter restarted": {&first, look(2, 10), map[endpointKey]rate{}},
		"clock set back":    {&first, look(-5, 2000), map[endpointKey]rate{}},
		"same time":         {&first, look(0, 2000), map[endpointKey]rate{}},
		"rule is new":       {&control.Stats{Time: clock}, look(1, 5), map[endpointKey]rate{}},
	} {
		if diff := cmp.Diff(tt.want, rates(tt.before, tt.now), cmp.AllowUnexported(rate{}, endpointKey{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestHumanNumbers(t *testing.T) {
	for n, want := range map[uint64]string{0: "0", 99_999: "99999", 100_000: "100k", 999_499: "999k", 999_500: "1.00M", 1_234_567: "1.23M", 12_345_678: "12.3M", 1<<64 - 1: "18.4E"} {
		if got := humanCount(n); got != want {
			t.Errorf("humanCount(%d) = %s, want %s", n, got, want)
		}
	}
	for n, want := range map[uint64]string{0: "0 B", 999: "999 B", 1000: "1.00 kB", 9_996: "10.0 kB", 99_960: "100 kB", 2_600_000_000: "2.60 GB"} {
		if got := humanBytes(n); got != want {
			t.Errorf("humanBytes(%d) = %s, want %s", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{-time.Hour: "0s", 59 * time.Second: "59s", 61 * time.Second: "1m1s", 3*time.Hour + 12*time.Minute: "3h12m", 49 * time.Hour: "2d1h"} {
		if got := age(d); got != want {
			t.Errorf("age(%v) = %s, want %s", d, got, want)
		}
	}
}

// What a daemon, or who wrote its rules, puts into a cell must not reach the terminal raw.
func TestTableIsPrintable(t *testing.T) {
	tab := newTable("A", ">B")
	tab.add("x\x1b[2J\ty\nz\u009b", "1")
	var out strings.Builder
	if err := tab.write(&out); err != nil {
		t.Fatal(err)
	}
	if want := "A           B\nx [2J y z   1\n"; out.String() != want {
		t.Errorf("%q, want %q", out.String(), want)
	}
}

// The reason of a path begins with the path, since it stands alone as a rule's reason, too.
func TestExplainNamesThePathOnce(t *testing.T) {
	var b strings.Builder
	if err := explainText(&b, control.Explanation{Packet: "p", Why: "w", Path: "afxdp", PathReason: "path afxdp: out0 is slow"}, clock); err != nil {
		t.Fatal(err)
	}
	if want := "afxdp: out0 is slow"; !strings.Contains(b.String(), want) || strings.Contains(b.String(), "path afxdp") {
		t.Errorf("got %q, want %q", b.String(), want)
	}
}
