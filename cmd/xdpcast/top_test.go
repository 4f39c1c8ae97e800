package main

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"

	"xdpcast/internal/control"
	"xdpcast/internal/labtest"
)

// look makes what a look brings: rules by what they have matched, so many seconds after the
// first look.
func look(second int, rules ...control.RuleStatus) lookMsg {
	s := control.Stats{Time: clock.Add(time.Duration(second) * time.Second), Rules: rules}
	return lookMsg{seen: seen{stats: s, daemon: &control.Status{Version: "v1.2.3", PID: 42, Started: clock.Add(-time.Hour)}}}
}

// counted is a rule with counters, whose last packet came just before a second.
func counted(name string, second int, matched, sent, dropped uint64) control.RuleStatus {
	last := clock.Add(time.Duration(second)*time.Second - 100*time.Millisecond)
	return control.RuleStatus{
		Rule:  control.Rule{Name: name, In: "239.1.1.1:5000%eth0", Out: []string{"239.2.2.2:6000%eth1"}},
		State: control.StateActive, UsedPath: "kernel", LastSeen: &last,
		Matched: control.Counter{Packets: matched, Bytes: matched * 125},
		Outputs: []control.OutputStatus{{
			Output: "239.2.2.2:6000%eth1", Interface: "eth1", State: control.StateActive, Sent: control.Counter{Packets: sent, Bytes: sent * 125},
			Drops: []control.Drop{{Reason: "ttl", Counter: control.Counter{Packets: dropped}}},
		}},
	}
}

func newTestTop() *topModel {
	return newTopModel(time.Second, 0, "", func() tea.Msg { return nil })
}

// special are the keys that have no text, and the one whose name is none.
var special = map[string]tea.KeyPressMsg{
	"enter": {Code: tea.KeyEnter}, "esc": {Code: tea.KeyEscape}, "tab": {Code: tea.KeyTab}, "backspace": {Code: tea.KeyBackspace},
	"down": {Code: tea.KeyDown}, "up": {Code: tea.KeyUp}, "end": {Code: tea.KeyEnd}, "home": {Code: tea.KeyHome}, "pgdown": {Code: tea.KeyPgDown},
	"space": {Code: tea.KeySpace, Text: " "},
}

func press(m *topModel, keys ...string) (quit bool) {
	for _, key := range keys {
		msg, ok := special[key]
		if !ok {
			msg = tea.KeyPressMsg{Text: key, Code: []rune(key)[0]}
		}
		if _, cmd := m.Update(msg); cmd != nil {
			_, quit = cmd().(tea.QuitMsg)
		}
	}
	return quit
}

// plain is the screen without colours, which must say the same.
func plain(m *topModel) string { return ansi.Strip(strings.Join(m.lines(), "\n")) }

// row is the line of a rule on the screen, without the cursor.
func row(t *testing.T, m *topModel, name string) []string {
	t.Helper()
	for line := range strings.Lines(plain(m)) {
		if fields := strings.Fields(strings.TrimPrefix(line, ">")); len(fields) > 0 && fields[0] == name {
			return fields
		}
	}
	t.Fatalf("rule %s is not on the screen:\n%s", name, plain(m))
	return nil
}

// TestTopRates: rates are differences of counters; the first screen has none, and neither has a
// rule that is new or was replaced.
func TestTopRates(t *testing.T) {
	m := newTestTop()
	m.Update(look(0, counted("cam1", 0, 1_000_000, 900_000, 5)))
	if got := strings.Join(row(t, m, "cam1"), " "); got != "cam1 active kernel - - - - 5 0s" {
		t.Errorf("the first screen has %q", got)
	}
	m.Update(look(2, counted("cam1", 2, 1_004_000, 902_000, 105), counted("new", 2, 500, 500, 0)))
	if got := strings.Join(row(t, m, "cam1"), " "); got != "cam1 dropping kernel 2000 2.00 Mb 1000 50 105 0s" {
		t.Errorf("the second screen has %q", got)
	}
	if got := strings.Join(row(t, m, "new"), " "); got != "new active kernel - - - - 0 0s" {
		t.Errorf("of a new rule, the second screen has %q", got)
	}
	if got := plain(m); !strings.Contains(got, "in 2000/s 2.00 Mb/s  out 1000/s 1.00 Mb/s  drops 50/s (105)") {
		t.Errorf("sums:\n%s", got)
	}
	m.Update(look(3, counted("cam1", 3, 10, 10, 0), counted("new", 3, 500, 500, 0)))
	if got := strings.Join(row(t, m, "cam1"), " "); got != "cam1 active kernel - - - - 0 0s" {
		t.Errorf("of a rule that was replaced, the third screen has %q", got)
	}
	// The clock was set back.
	m.Update(look(1, counted("cam1", 1, 20, 20, 0)))
	if got := strings.Join(row(t, m, "cam1"), " "); got != "cam1 active kernel - - - - 0 0s" {
		t.Errorf("after the clock was set back: %q", got)
	}
}

func TestTopStates(t *testing.T) {
	failed, pending, silent := counted("failed", 0, 1, 1, 0), counted("pending", 0, 1, 1, 0), counted("silent", -60, 1, 1, 0)
	failed.State, failed.Reason = control.StateFailed, "no such thing"
	pending.State = control.StatePending
	never := counted("never", 0, 0, 0, 0)
	never.LastSeen = nil
	m := newTestTop()
	m.Update(look(0, counted("busy", 0, 0, 0, 0), counted("drops", 0, 0, 0, 0), never, failed, pending, silent))
	m.Update(look(1, counted("busy", 1, 500, 0, 0), counted("drops", 1, 100, 0, 3), never, failed, pending, silent))
	var order []string
	for _, r := range m.shown() {
		order = append(order, r.Name+" "+r.stateWord())
	}
	if got, want := strings.Join(order, ", "), "failed failed, drops dropping, pending pending, silent silent, busy active, never active"; got != want {
		t.Errorf("by trouble: %s, want %s", got, want)
	}
	if got := plain(m); !strings.Contains(got, "6 rules: 4 active, 1 failed, 1 dropping, 1 pending, 1 silent") {
		t.Errorf("states:\n%s", got)
	}
	for _, want := range []string{"rate", "bits", "drops", "state", "name"} {
		press(m, "s")
		if got := plain(m); !strings.Contains(got, "s sort: "+want) {
			t.Errorf("want sort by %s:\n%s", want, got)
		}
		first := m.shown()[0].Name
		if wantFirst := map[string]string{"rate": "busy", "bits": "busy", "drops": "drops", "state": "busy", "name": "busy"}[want]; first != wantFirst {
			t.Errorf("by %s %s is first, want %s", want, first, wantFirst)
		}
	}
	press(m, "r")
	if first := m.shown()[0].Name; first != "silent" {
		t.Errorf("by name, reversed, %s is first", first)
	}
}

func TestTopFilter(t *testing.T) {
	m := newTestTop()
	m.Update(look(0, counted("cam1", 0, 0, 0, 0), counted("cam2", 0, 0, 0, 0), counted("feed", 0, 0, 0, 0)))
	names := func() (all []string) {
		for _, r := range m.shown() {
			all = append(all, r.Name)
		}
		return all
	}
	if press(m, "/", "C", "a", "m", "q"); fmt.Sprint(names()) != "[]" {
		t.Errorf("q is a letter of the filter: %v", names())
	}
	if got := plain(m); !strings.Contains(got, `no rule has "Camq"`) || !strings.Contains(got, "filter: Camq_") {
		t.Errorf("while typing:\n%s", got)
	}
	if press(m, "backspace", "enter"); fmt.Sprint(names()) != "[cam1 cam2]" {
		t.Errorf("got %v", names())
	}
	if press(m, "esc"); fmt.Sprint(names()) != "[cam1 cam2 feed]" {
		t.Errorf("got %v", names())
	}
	if !press(m, "q") {
		t.Error("q does not quit")
	}
}

// TestTopCursor: the cursor stays on its rule when the order changes, and stays in view.
func TestTopCursor(t *testing.T) {
	rules := func(second int, last string) lookMsg {
		var all []control.RuleStatus
		for i := range 100 {
			name := fmt.Sprintf("rule%03d", i)
			n := uint64(0)
			if name == last && second > 0 {
				n = 1000
			}
			all = append(all, counted(name, second, n, n, 0))
		}
		return look(second, all...)
	}
	m := newTestTop()
	m.Update(rules(0, ""))
	onCursor := func() string {
		for line := range strings.Lines(plain(m)) {
			if name, ok := strings.CutPrefix(line, ">"); ok {
				return strings.Fields(name)[0]
			}
		}
		return ""
	}
	for _, c := range []struct{ key, want string }{
		{"", "rule000"}, {"up", "rule000"}, {"down", "rule001"}, {"pgdown", "rule020"}, {"end", "rule099"}, {"down", "rule099"}, {"k", "rule098"}, {"home", "rule000"}, {"j", "rule001"},
	} {
		if c.key != "" {
			press(m, c.key)
		}
		if got := onCursor(); got != c.want {
			t.Fatalf("after %q the cursor is on %q, want %s:\n%s", c.key, got, c.want, plain(m))
		}
	}
	m.Update(rules(1, "rule099"))
	if got := onCursor(); got != "rule001" {
		t.Errorf("after the order changed the cursor is on %q", got)
	}
	m.Update(tea.WindowSizeMsg{Width: 80, Height: 6})
	if got := onCursor(); got != "rule001" {
		t.Errorf("on a small screen the cursor is on %q:\n%s", got, plain(m))
	}
}

func TestTopDetailAndScreens(t *testing.T) {
	m := newTestTop()
	second := look(1, counted("cam1", 1, 2000, 1000, 7))
	second.seen.groups = []control.Group{{Group: "239.1.1.1", Interface: "eth0", Rules: []string{"cam1"}, Detail: "joined, receiving, no querier heard"}, {Group: "239.9.9.9", Rules: []string{"other"}}}
	second.seen.daemon.Interfaces = []control.InterfaceStatus{{Name: "eth1", Link: control.LinkDown, Mode: "native", Roles: []string{"output"}, TransmitDrops: 17}}
	first := look(0, counted("cam1", 0, 0, 0, 0))
	first.seen.daemon.Interfaces = []control.InterfaceStatus{{Name: "eth1", Link: control.LinkUp}}
	m.Update(first)
	m.Update(second)
	press(m, "enter")
	for _, want := range []string{"rule     cam1", "2000 packets, 250 kB; 2000/s 2.00 Mb/s", "239.2.2.2:6000%eth1", "output 0  ttl", "joined, receiving, no querier heard", "esc back"} {
		if got := plain(m); !strings.Contains(got, want) {
			t.Errorf("the rule alone lacks %q:\n%s", want, got)
		}
	}
	if strings.Contains(plain(m), "239.9.9.9") {
		t.Error("another rule's group is shown")
	}
	press(m, "2")
	if got := strings.Join(row(t, m, "eth1"), " "); got != "eth1 down native output 0 0 b 1000 1.00 Mb 17" {
		t.Errorf("interface: %q", got)
	}
	if got := strings.Join(row(t, m, "eth0"), " "); got != "eth0 - - - 2000 2.00 Mb 0 0 b 0" {
		t.Errorf("interface: %q", got)
	}
	press(m, "tab")
	if got := plain(m); !strings.Contains(got, "interface eth1: down, was up") {
		t.Errorf("events:\n%s", got)
	}
	press(m, "1", "enter")
	m.Update(look(2))
	if got := plain(m); !strings.Contains(got, "rule cam1 is gone") {
		t.Errorf("of a rule that is gone:\n%s", got)
	}
	press(m, "?")
	if got := plain(m); !strings.Contains(got, "any key closes this") {
		t.Errorf("help:\n%s", got)
	}
	if press(m, "q"); m.help || m.detail == "" {
		t.Error("a key closes the help, and does no more")
	}
}

func TestTopEvents(t *testing.T) {
	before := look(0, counted("gone", 0, 0, 0, 0), counted("moves", 0, 0, 0, 0), counted("waits", 0, 0, 0, 0)).seen
	moves, waits := counted("moves", 1, 0, 0, 0), counted("waits", 1, 0, 0, 0)
	moves.UsedPath = "fanout"
	waits.State, waits.Reason, waits.Outputs[0].State = control.StatePending, "no carrier", "no_neighbour"
	now := look(1, moves, waits, counted("fresh", 1, 0, 0, 0)).seen
	var got []string
	for _, e := range changes(&before, &now, false) {
		got = append(got, e.text)
	}
	want := []string{"rule moves: path fanout, was kernel", "rule waits: pending: no carrier, was active", "rule waits, output 0: no_neighbour, was active", "rule fresh is new: active", "rule gone is gone"}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := changes(&before, &now, true); len(got) != 0 {
		t.Errorf("beside the daemon's events: %v", got)
	}
	now.daemon = nil
	if got := changes(&before, &now, false); len(got) != 1 || !strings.Contains(got[0].text, "the daemon is gone") {
		t.Errorf("got %v", got)
	}
}

// TestTopDaemonEvents: the daemon's events are shown, also those of before; a paused screen holds
// them back.
func TestTopDaemonEvents(t *testing.T) {
	m := newTestTop()
	m.Update(look(0, counted("cam1", 0, 0, 0, 0)))
	event := func(number uint64, state string) eventMsg {
		return eventMsg{control.Event{Number: number, Time: clock.Add(time.Duration(number) * time.Second), Kind: "rule", Rule: "cam1", State: state, Cause: "so\x1b[2J"}}
	}
	m.Update(event(7, "pending"))
	press(m, "3")
	if got := plain(m); !strings.Contains(got, "Jan  2 03:04:12  rule cam1: pending: so [2J") {
		t.Errorf("events:\n%s", got)
	}
	press(m, "p")
	m.Update(event(8, "active"))
	if got := plain(m); strings.Contains(got, "rule cam1: active") {
		t.Errorf("paused:\n%s", got)
	}
	press(m, "p")
	if got := plain(m); strings.Index(got, "rule cam1: active") > strings.Index(got, "rule cam1: pending") || !strings.Contains(got, "rule cam1: active") {
		t.Errorf("after the pause:\n%s", got)
	}
	failed := counted("cam1", 1, 0, 0, 0)
	failed.State = control.StateFailed
	m.Update(look(1, failed))
	if got := plain(m); strings.Contains(got, "was active") {
		t.Errorf("what the daemon tells is guessed, too:\n%s", got)
	}
	for i := range 3 * maxTopEvents {
		m.Update(event(uint64(i), "active"))
	}
	if len(m.events) != maxTopEvents {
		t.Errorf("%d events are kept", len(m.events))
	}
}

// TestTopPause: a paused screen stays as it is; the next rate is that of the whole pause.
func TestTopPause(t *testing.T) {
	m := newTestTop()
	m.Update(look(0, counted("cam1", 0, 0, 0, 0)))
	press(m, "space")
	m.Update(look(1, counted("cam1", 1, 100, 0, 0)))
	if got := plain(m); !strings.Contains(got, "PAUSED") || row(t, m, "cam1")[3] != "-" {
		t.Errorf("paused:\n%s", got)
	}
	press(m, "p")
	m.Update(look(4, counted("cam1", 4, 400, 0, 0)))
	if got := row(t, m, "cam1"); got[3] != "100" {
		t.Errorf("after the pause: %q", got)
	}
	m.Update(lookMsg{err: errors.New("no answer\x1b[2J")})
	if got := strings.Join(m.lines(), "\n"); !strings.Contains(got, "! no answer [2J") || row(t, m, "cam1")[3] != "100" {
		t.Errorf("after an error: %q", got)
	}
}

// TestTopSize: at every size the screen has as many lines, none is wider, nothing panics; with
// 10,000 rules a look is shown in time.
func TestTopSize(t *testing.T) {
	many := func(second int) lookMsg {
		var all []control.RuleStatus
		for i := range 10_000 {
			all = append(all, counted(fmt.Sprintf("a-rule-with-a-long-name-%05d", i), second, uint64(i*second), uint64(i*second), 0))
		}
		return look(second, all...)
	}
	m := newTestTop()
	m.Update(many(0))
	second := many(1)
	begin := labtest.CPUTime(t)
	m.Update(second)
	m.View()
	took := labtest.CPUTime(t) - begin
	t.Logf("a look at 10,000 rules is taken and shown in %v of CPU time", took)
	if took > 5*time.Second { // some 50 ms without the race detector
		t.Errorf("a look at 10,000 rules took %v of CPU time", took)
	}
	if got := plain(m); !strings.Contains(got, "in 50.0M/s") || !strings.Contains(got, "10000 rules: 10000 active") {
		t.Errorf("of 10,000 rules:\n%s", got)
	}
	if r := m.shown()[0]; r.Name != "a-rule-with-a-long-name-09999" || r.rate.packets != 9999 {
		t.Errorf("first is %s with %v", r.Name, r.rate)
	}
	m.Update(look(2, second.seen.stats.Rules[9_000:]...)) // more than a screen has, and sorted for each key
	for _, width := range []int{1, 20, 79, 80, 81, 110, 160, 300} {
		for _, height := range []int{1, 2, 5, 24, 60} {
			m.Update(tea.WindowSizeMsg{Width: width, Height: height})
			for _, keys := range [][]string{{"1"}, {"end"}, {"enter"}, {"end"}, {"2"}, {"3"}, {"?"}, {"x"}, {"1"}, {"home"}} {
				press(m, keys...)
				lines := m.lines()
				if len(lines) != height {
					t.Fatalf("%dx%d has %d lines after %v", width, height, len(lines), keys)
				}
				for _, line := range lines {
					if n := ansi.StringWidth(line); n > width {
						t.Fatalf("%dx%d: a line is %d wide after %v: %q", width, height, n, keys, ansi.Strip(line))
					}
				}
			}
		}
	}
}

func TestTopUsage(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"top"}, "top needs a terminal"},
		{[]string{"top", "--interval", "1ms"}, "--interval 1ms: want"},
		{[]string{"top", "--sort", "size"}, `--sort "size": want one of trouble, rate, bits, drops, state, name`},
		{[]string{"top", "eth0"}, `unexpected argument "eth0"`},
	} {
		var stdout, stderr strings.Builder
		code := run(t.Context(), append([]string{"xdpcast"}, c.args...), strings.NewReader(""), &stdout, &stderr)
		if code != exitUsage || !strings.Contains(stderr.String(), c.want) {
			t.Errorf("%q: exit code %d, %q; want %q", c.args, code, stderr.String(), c.want)
		}
	}
}
