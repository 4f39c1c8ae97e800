package relay

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"xdpcast/internal/control"
	"xdpcast/internal/history"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/rules"
)

// testClock is the time since boot of a test.
type testClock struct{ now atomic.Int64 }

func (c *testClock) set(p *place, boot string) {
	p.opts.clock = &history.Clock{Boot: boot, Now: func() time.Duration { return time.Duration(c.now.Load()) }}
}

// pass lets time pass, and has the loop notice.
func (c *testClock) pass(t *testing.T, r *running, d time.Duration) {
	t.Helper()
	c.now.Add(int64(d))
	for range 2 { // each waits for a turn of the loop, which begins with what is due
		if _, err := r.Status(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// named is a rule that differs from others by its name and version alone.
func named(name string, version int) control.Rule {
	n := int(name[0]-'a') + 1
	return control.Rule{Name: name, In: fmt.Sprintf("239.1.1.%d:5000%%in0", n), Out: []string{fmt.Sprintf("239.2.2.%d:%d%%out0", n, 6000+version)}, Path: "auto"}
}

// ruleSet is a set of rules by name, each in a version.
type ruleSet map[string]int

func (s ruleSet) rules(t *testing.T) []rules.Rule {
	t.Helper()
	var all []control.Rule
	for _, name := range slices.Sorted(maps.Keys(s)) {
		all = append(all, named(name, s[name]))
	}
	return parsed(t, all...)
}

func (s ruleSet) file(t *testing.T) string {
	t.Helper()
	text, err := rules.FormatFile(s.rules(t))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// sets are the rules in force by origin.
type sets struct{ File, API ruleSet }

func (s sets) equal(o sets) bool { return maps.Equal(s.File, o.File) && maps.Equal(s.API, o.API) }

// inForce reads the sets in force, from what the kernel relays.
func inForce(t *testing.T, r *running) sets {
	t.Helper()
	all, err := r.Rules(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s := sets{ruleSet{}, ruleSet{}}
	for _, rule := range all {
		var n, port int
		if _, err := fmt.Sscanf(rule.Out[0], "239.2.2.%d:%d%%out0", &n, &port); err != nil || rule.State != control.StateActive {
			t.Fatalf("rule %+v: %v", rule, err)
		}
		if rule.Origin == control.OriginFile {
			s.File[rule.Name] = port - 6000
		} else {
			s.API[rule.Name] = port - 6000
		}
	}
	return s
}

// model is what a relay is to do with changes, in the simplest terms.
type model struct {
	disk   ruleSet // the file
	read   ruleSet // as it was read last
	now    sets
	past   []sets        // the last one is in force
	before *sets         // what comes back without a confirmation
	waited time.Duration // for one
}

func (m *model) changed(to sets) {
	if m.now.equal(to) {
		return
	}
	m.now = to
	m.past = append(m.past, to)
	m.past = m.past[max(0, len(m.past)-history.MaxEntries):]
}

func (m *model) undo() {
	to := *m.before
	m.before = nil
	m.now = to
	m.past = append(m.past, to)
	m.past = m.past[max(0, len(m.past)-history.MaxEntries):]
}

// TestRandomChanges makes random changes of rules of both origins, some of which wait for
// confirmation, confirms, rolls back, edits the file, lets time pass, and restarts the relay
// at any moment, also with the time over. After every step the rules in force, and the sets
// that can be brought back, are those of the model.
func TestRandomChanges(t *testing.T) {
	for seed := range uint64(labtest.Soak(1, 20)) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { randomChanges(t, rand.New(rand.NewPCG(seed, 18))) })
	}
}

func randomChanges(t *testing.T, random *rand.Rand) {
	p, clock := newPlace(t), &testClock{}
	clock.set(p, "boot")
	// Names of the two origins are different ones: what a conflict does is not the subject.
	draw := func(names string) ruleSet {
		s := ruleSet{}
		for _, name := range names {
			if random.IntN(2) == 0 {
				s[string(name)] = random.IntN(3)
			}
		}
		return s
	}
	m := &model{disk: draw("abc"), before: nil}
	m.read = m.disk
	m.now = sets{m.disk, ruleSet{}}
	m.past = []sets{m.now}
	p.opts.ConfigFile = p.file("rules.yaml", m.disk.file(t))
	r := p.start()
	const window = time.Minute
	var steps []string
	refused := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, control.ErrConflict) || !strings.Contains(err.Error(), "a change waits for confirmation until ") {
			t.Fatalf("%s while a change waits for confirmation: %v", what, err)
		}
	}
	// change does something that changes the rules to others, or is refused.
	change := func(what string, confirm time.Duration, to sets, do func(control.ApplyOptions) (control.ApplyResult, error)) bool {
		t.Helper()
		steps = append(steps, what)
		result, err := do(control.ApplyOptions{Confirm: confirm})
		if m.before != nil {
			refused(what, err)
			return false
		}
		if err != nil {
			t.Fatalf("%v: %v", steps, err)
		}
		waits := confirm > 0 && !m.now.equal(to)
		if got := result.ConfirmBy != nil; got != waits {
			t.Fatalf("%v: it waits for confirmation: %v, want %v", steps, got, waits)
		}
		if waits {
			before := m.now
			m.before, m.waited = &before, 0
		}
		m.changed(to)
		return true
	}
	for range 40 {
		confirm := time.Duration(random.IntN(2)) * window
		switch random.IntN(12) {
		case 9, 10, 11:
			name := string("xyz"[random.IntN(3)])
			api := maps.Clone(m.now.API)
			if _, has := api[name]; has {
				delete(api, name)
				change("rule del "+name, 0, sets{m.now.File, api}, func(control.ApplyOptions) (control.ApplyResult, error) {
					return control.ApplyResult{}, r.DeleteRule(t.Context(), name)
				})
				break
			}
			api[name] = random.IntN(3)
			change(fmt.Sprint("rule add ", name, api[name]), 0, sets{m.now.File, api}, func(control.ApplyOptions) (control.ApplyResult, error) {
				_, err := r.AddRule(t.Context(), control.FromRule(ruleSet{name: api[name]}.rules(t)[0]))
				return control.ApplyResult{}, err
			})
		case 0:
			api := draw("xyz")
			change(fmt.Sprint("apply ", api, confirm), confirm, sets{m.now.File, api}, func(o control.ApplyOptions) (control.ApplyResult, error) {
				return r.Apply(t.Context(), api.rules(t), o)
			})
		case 1:
			disk := m.disk
			if change(fmt.Sprint("reload ", disk, confirm), confirm, sets{disk, m.now.API}, func(o control.ApplyOptions) (control.ApplyResult, error) {
				return r.Reload(t.Context(), o)
			}) {
				m.read = disk
			}
		case 2:
			m.disk = draw("abc")
			steps = append(steps, fmt.Sprint("edit ", m.disk))
			p.file("rules.yaml", m.disk.file(t))
		case 3:
			steps = append(steps, "confirm")
			_, err := r.Confirm(t.Context())
			if m.before == nil && (!errors.Is(err, control.ErrConflict) || err.Error() != "no change waits for confirmation") {
				t.Fatalf("confirm of nothing: %v", err)
			}
			if m.before != nil && err != nil {
				t.Fatal(err)
			}
			m.before = nil
		case 4:
			back := 1 + random.IntN(len(m.past)+1)
			if _, err := r.Rollback(t.Context(), 0, control.ApplyOptions{DryRun: true}); !errors.Is(err, control.ErrInvalid) {
				t.Fatalf("%v: dry run of rollback 0: %v", steps, err)
			}
			if m.before == nil {
				if _, err := r.Rollback(t.Context(), 0, control.ApplyOptions{}); !errors.Is(err, control.ErrConflict) {
					t.Fatalf("%v: rollback 0 while nothing waits: %v", steps, err)
				}
			}
			if m.before != nil && back == 1 && confirm == 0 {
				steps = append(steps, "rollback of the change that waits")
				if _, err := r.Rollback(t.Context(), len(steps)%2, control.ApplyOptions{}); err != nil { // 0 or 1
					t.Fatalf("%v: %v", steps, err)
				}
				m.undo()
				break
			}
			to := m.now
			if at := len(m.past) - 1 - back; at >= 0 {
				to = m.past[at]
			} else if m.before == nil {
				_, err := r.Rollback(t.Context(), back, control.ApplyOptions{})
				if !errors.Is(err, control.ErrNotFound) || !strings.Contains(err.Error(), "kept (\"xdpcast history\" lists them)") {
					t.Fatalf("%v: rollback past the end: %v", steps, err)
				}
				break
			}
			change(fmt.Sprint("rollback ", back, confirm), confirm, to, func(o control.ApplyOptions) (control.ApplyResult, error) {
				return r.Rollback(t.Context(), back, o)
			})
		case 5, 6:
			what, d := "half of the time passes", window/2
			if random.IntN(2) == 0 {
				what, d = "time passes", window
			}
			steps = append(steps, what)
			clock.pass(t, r, d)
			if m.waited += d; m.before != nil && m.waited >= window {
				m.undo()
			}
		case 7, 8:
			what := []string{"restart", "restart, the time is over", "reboot"}[random.IntN(3)]
			steps = append(steps, what)
			r.stop()
			over := what != "restart"
			switch what {
			case "reboot":
				clock.set(p, fmt.Sprint("boot", len(steps)))
				clock.now.Store(0)
			case "restart, the time is over":
				clock.now.Add(int64(window))
			}
			r = p.start()
			edited := !maps.Equal(m.disk, m.read)
			if m.before != nil && edited { // the author of the file wins
				before := sets{m.disk, m.before.API}
				m.before = &before
			}
			if edited {
				m.now.File = m.disk
			}
			m.read = m.disk
			switch {
			case over && m.before != nil:
				m.undo()
			case edited:
				if last := m.past[len(m.past)-1]; !last.equal(m.now) {
					m.past = append(m.past, m.now)
				}
			}
		}
		if d := cmp.Diff(m.now, inForce(t, r)); d != "" {
			t.Fatalf("%s\nin force (-want, +got):\n%s", strings.Join(steps, "\n"), d)
		}
		if err := r.checkKept(); err != nil {
			t.Fatalf("%s\n%v", strings.Join(steps, "\n"), err)
		}
		kept, err := r.History(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(kept) != len(m.past) {
			t.Fatalf("%s\n%d sets are kept, want %d: %+v", strings.Join(steps, "\n"), len(kept), len(m.past), kept)
		}
		status, err := r.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if waits := status.Unconfirmed != nil; waits != (m.before != nil) {
			t.Fatalf("%s\na change waits for confirmation: %v", strings.Join(steps, "\n"), waits)
		}
		heldOff := slices.ContainsFunc(status.Warnings, func(w string) bool { return strings.HasPrefix(w, "file: an earlier set is in force since ") })
		if want := !maps.Equal(m.now.File, m.read); heldOff != want {
			t.Fatalf("%s\nit is said that the file is not in force: %v, want %v: %q", strings.Join(steps, "\n"), heldOff, want, status.Warnings)
		}
	}
}

// TestChangesSay checks what a person is told of changes.
func TestChangesSay(t *testing.T) {
	p, clock := newPlace(t), &testClock{}
	clock.set(p, "boot")
	r := p.start()
	if _, err := r.Rollback(t.Context(), 1, control.ApplyOptions{}); err == nil || err.Error() != `rollback 1: no earlier set is kept ("xdpcast history" lists them)` {
		t.Errorf("rollback of nothing: %v", err)
	}
	r.mustAdd("first", anyIn, out0)
	if _, err := r.Apply(t.Context(), ruleSet{"x": 1}.rules(t), control.ApplyOptions{Confirm: time.Minute}); err != nil {
		t.Fatal(err)
	}
	_, err := r.add("second", "239.1.1.2:5000%in0", out0)
	if err == nil || !strings.HasPrefix(err.Error(), "a change waits for confirmation until ") || !strings.HasSuffix(err.Error(), `(rule apply): "xdpcast confirm" keeps it, "xdpcast rollback" undoes it`) {
		t.Errorf("add while a change waits: %v", err)
	}
	if err := r.DeleteRule(t.Context(), "x"); !errors.Is(err, control.ErrConflict) {
		t.Errorf("delete while a change waits: %v", err)
	}
	if _, err := r.Apply(t.Context(), nil, control.ApplyOptions{DryRun: true}); err != nil {
		t.Errorf("a dry run while a change waits: %v", err)
	}
	clock.pass(t, r, time.Minute)
	if _, err := r.Confirm(t.Context()); err == nil || err.Error() != "no change waits for confirmation" {
		t.Errorf("confirm too late: %v", err)
	}
	if err := r.DeleteRule(t.Context(), "first"); err != nil {
		t.Fatal(err)
	}
	all, err := r.History(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range all {
		got = append(got, fmt.Sprintf("%d %s: %d rules, +%d ~%d -%d", e.Back, e.What, e.Rules, e.Added, e.Changed, e.Removed))
	}
	want := []string{
		"0 rule del first: 0 rules, +0 ~0 -1", "1 undone: rule apply was not confirmed: 1 rules, +1 ~0 -1",
		"2 rule apply: 1 rules, +1 ~0 -1", "3 rule add first: 1 rules, +1 ~0 -0", "4 start: 0 rules, +0 ~0 -0",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("history:\n%s", d)
	}
	if log := p.log.String(); !strings.Contains(log, `msg="a change was not confirmed: the previous set is restored" change="rule apply"`) {
		t.Errorf("the log does not say that a change was undone:\n%s", log)
	}
}

// TestFailedChangeWaitsForNothing: a change that is not made leaves none to confirm.
func TestFailedChangeWaitsForNothing(t *testing.T) {
	p := newPlace(t)
	p.opts.Loader.MaxRules, p.opts.Loader.MaxOutputs = 2, 4
	r := p.start()
	r.mustAdd("there", "239.1.1.9:5000%in0", out0, out1)
	before := p.footprint(r)
	_, err := r.Apply(t.Context(), parsed(t, control.Rule{Name: "bad", In: anyIn, Out: manyOut(60)}), control.ApplyOptions{Confirm: time.Hour})
	if err == nil {
		t.Fatal("a rule for which there is no room was taken")
	}
	if d := cmp.Diff(before, p.footprint(r)); d != "" {
		t.Errorf("something has changed:\n%s", d)
	}
	if _, err := r.Confirm(t.Context()); !errors.Is(err, control.ErrConflict) {
		t.Errorf("confirm of a change that failed: %v", err)
	}
	r.stop()
	r = p.start()
	if _, err := r.Confirm(t.Context()); !errors.Is(err, control.ErrConflict) {
		t.Errorf("confirm of a change that failed, after a restart: %v", err)
	}
}

// TestDiskFails: where sets cannot be kept, changes are made and said not to be kept; those
// that must be undone are refused, and what is undone meanwhile is undone in the kernel.
func TestDiskFails(t *testing.T) {
	p, clock := newPlace(t), &testClock{}
	clock.set(p, "boot")
	p.opts.StateDir = filepath.Join(t.TempDir(), "state")
	block := func() { // root writes whatever the mode is
		for _, name := range []string{"changes.json.next", "sets"} {
			if err := os.Rename(p.kept(name), p.kept(name)+".away"); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
		}
		if err := os.MkdirAll(p.kept("changes.json.next")+"/x", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p.kept("sets"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	unblock := func() {
		if err := os.RemoveAll(p.kept("changes.json.next")); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(p.kept("sets")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(p.kept("sets")+".away", p.kept("sets")); err != nil {
			t.Fatal(err)
		}
	}
	r := p.start()
	block()
	r.mustAdd("x", anyIn, out0)
	if _, err := r.Apply(t.Context(), nil, control.ApplyOptions{Confirm: time.Minute}); err == nil || !strings.HasPrefix(err.Error(), "nothing was changed, since it could not be undone: ") {
		t.Errorf("a change that could not be undone: %v", err)
	}
	if _, err := r.Rollback(t.Context(), 1, control.ApplyOptions{}); err == nil || !strings.HasPrefix(err.Error(), "the current set is not kept: ") {
		t.Errorf("rollback: %v", err)
	}
	warned := func(text string) bool {
		t.Helper()
		status, err := r.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(status.Warnings, func(w string) bool { return strings.Contains(w, text) })
	}
	if !warned("history: the current set is not kept: ") {
		t.Error("nobody is told that the set is not kept")
	}
	unblock()
	if _, err := r.Apply(t.Context(), ruleSet{"y": 1}.rules(t), control.ApplyOptions{Confirm: time.Minute}); err != nil {
		t.Fatal(err)
	}
	if warned("history: ") {
		t.Error("a warning stays that is not true any more")
	}
	block()
	clock.pass(t, r, time.Minute)
	if all, err := r.Rules(t.Context()); err != nil || len(all) != 1 || all[0].Name != "x" {
		t.Errorf("the set of before is not in force again: %v, %v", all, err)
	}
	if _, err := r.Confirm(t.Context()); err == nil || err.Error() != "too late: rule apply has been undone" {
		t.Errorf("confirm of what was undone: %v", err)
	}
	if _, err := r.add("z", "239.1.1.3:5000%in0", out0); !errors.Is(err, control.ErrConflict) || !strings.Contains(err.Error(), "rule apply was undone, which cannot be saved yet: ") {
		t.Errorf("another change: %v", err)
	}
	unblock()
	labtest.Eventually(t, "what was undone is saved", func() bool {
		_, err := r.add("z", "239.1.1.3:5000%in0", out0)
		return err == nil
	})
}

// kept is a file of the state directory.
func (p *place) kept(name string) string { return (&Relay{opts: p.opts}).keptFile(name) }

// TestDamagedFiles damages each file that a daemon leaves: the next one names it, and starts, or, where the file holds
// rules, leaves the kernel as it is.
func TestDamagedFiles(t *testing.T) {
	p := newPlace(t)
	p.opts.StateDir = t.TempDir()
	r := p.start()
	r.mustAdd("x", anyIn, out0)
	r.stop()
	run := func(name string) string { return loader.RunFile(p.opts.Loader.RunDir, p.opts.Loader.PinDir, name) }
	rules := run("api-rules.yaml")
	named := map[string]bool{}
	for _, name := range []string{"attached.json", "offloads.json"} {
		named[run(name)] = true
	}
	for _, dir := range []string{p.opts.Loader.RunDir, p.opts.StateDir} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if e.Type().IsRegular() {
				named[filepath.Join(dir, e.Name())] = true
			}
		}
	}
	for file := range named {
		intact, err := os.ReadFile(file)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		if strings.HasSuffix(file, "lock") {
			continue
		}
		if err := os.WriteFile(file, []byte("{\x00"), 0o600); err != nil {
			t.Fatal(err)
		}
		said := len(p.log.String())
		if file == rules {
			if _, err := p.tryStart(); err == nil {
				t.Errorf("%s is damaged, and a daemon starts without its rules", file)
			} else if !strings.Contains(err.Error(), file) {
				t.Errorf("%s is damaged: %v", file, err)
			}
		} else {
			r := p.start()
			if all, err := r.Rules(t.Context()); err != nil || len(all) != 1 {
				t.Errorf("%s is damaged: rules %v, %v", file, all, err)
			}
			r.stop()
			if said := p.log.String()[said:]; !strings.Contains(said, filepath.Base(file)) {
				t.Errorf("%s is damaged, and not named:\n%s", file, said)
			}
		}
		if intact == nil {
			err = os.RemoveAll(file)
		} else {
			err = os.WriteFile(file, intact, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestDamagedHistory: what cannot be read is told, and no rule is lost for it.
func TestDamagedHistory(t *testing.T) {
	for _, tt := range []struct {
		name, text, log, history string
	}{
		{"damaged", "{", "the history of rules cannot be read: starting without it", ""},
		{"later", `{"version": 9}`, "no history of rules is kept: ", "version 9 is of a later release: want at most 1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPlace(t)
			p.opts.StateDir = t.TempDir()
			r := p.start()
			r.mustAdd("x", anyIn, out0)
			r.stop()
			if err := os.WriteFile(p.kept("changes.json"), []byte(tt.text), 0o600); err != nil {
				t.Fatal(err)
			}
			r = p.start()
			if all, err := r.Rules(t.Context()); err != nil || len(all) != 1 {
				t.Errorf("rules: %v, %v", all, err)
			}
			if !strings.Contains(p.log.String(), tt.log) {
				t.Errorf("the log does not say %q:\n%s", tt.log, p.log)
			}
			all, err := r.History(t.Context())
			if tt.history == "" {
				if err != nil || len(all) != 1 {
					t.Errorf("history: %v, %v", all, err)
				}
				if kept, err := os.ReadFile(p.kept("changes.json") + ".damaged"); err != nil || string(kept) != tt.text {
					t.Errorf("what was damaged is not kept: %q, %v", kept, err)
				}
				return
			}
			for what, err := range map[string]error{
				"history":  err,
				"rollback": second(r.Rollback(t.Context(), 1, control.ApplyOptions{})),
				"apply":    second(r.Apply(t.Context(), nil, control.ApplyOptions{Confirm: time.Minute})),
			} {
				if err == nil || !strings.Contains(err.Error(), tt.history) {
					t.Errorf("%s: %v, want %q", what, err, tt.history)
				}
			}
			if kept, err := os.ReadFile(p.kept("changes.json")); err != nil || string(kept) != tt.text {
				t.Errorf("what a later release has kept is %q now, %v", kept, err)
			}
			r.mustAdd("y", "239.1.1.2:5000%in0", out0)
		})
	}
}

func second[T any](_ T, err error) error { return err }

// TestNeededRuleStays: a rule that takes what others would send to each other in a loop is refused to be
// deleted. Without it the saved set would not be valid, and the next start would omit rules.
func TestNeededRuleStays(t *testing.T) {
	r := newPlace(t).start()
	r.mustAdd("there", "239.1.1.1:5000%in0", "239.1.1.2:5000%out0")
	r.mustAdd("taken", "239.1.1.2:5000%out0", "239.9.9.9:6000%in0")
	r.mustAdd("back", "239.1.1.2%out0", "239.1.1.1:5000%in0")
	err := r.DeleteRule(t.Context(), "taken")
	if !errors.Is(err, control.ErrConflict) || !errors.Is(err, rules.ErrLoop) || !strings.HasPrefix(err.Error(), "rule taken is needed: it takes packets that other rules would send to each other without it; delete one of those first: ") ||
		!strings.Contains(err.Error(), "back") || !strings.Contains(err.Error(), "there") {
		t.Fatalf("a rule is deleted that keeps others from a loop: %v", err)
	}
	for _, name := range []string{"back", "taken", "there"} {
		if err := r.DeleteRule(t.Context(), name); err != nil {
			t.Error(err)
		}
	}
}

// TestRevision: a change that was decided on other rules than the current ones is refused, whoever changed
// them; a dry run, or a change that failed, changes no revision.
func TestRevision(t *testing.T) {
	p, clock := newPlace(t), &testClock{}
	clock.set(p, "boot")
	p.opts.ConfigFile = p.file("rules.yaml", ruleSet{"f": 1}.file(t))
	r := p.start()
	revision := func() string {
		t.Helper()
		status, err := r.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return status.Revision
	}
	first, err := r.Apply(t.Context(), ruleSet{"x": 1}.rules(t), control.ApplyOptions{DryRun: true})
	if err != nil || first.Revision == "" || first.Revision != revision() {
		t.Fatalf("revision %q of a dry run, want %q: %v", first.Revision, revision(), err)
	}
	if _, err := r.add("f", anyIn, out0); err == nil || revision() != first.Revision {
		t.Errorf("a refused change: %v, revision %s, want %s", err, revision(), first.Revision)
	}
	old := control.ApplyOptions{Revision: first.Revision}
	done, err := r.Apply(t.Context(), ruleSet{"x": 1}.rules(t), old)
	if err != nil || done.Revision == first.Revision || done.Revision != revision() {
		t.Fatalf("%+v, %v, revision %s", done, err, revision())
	}
	for what, change := range map[string]func(control.ApplyOptions) (control.ApplyResult, error){
		"apply": func(o control.ApplyOptions) (control.ApplyResult, error) { return r.Apply(t.Context(), nil, o) },
		"put": func(o control.ApplyOptions) (control.ApplyResult, error) {
			return r.PutRule(t.Context(), named("x", 2), o)
		},
		"reload":   func(o control.ApplyOptions) (control.ApplyResult, error) { return r.Reload(t.Context(), o) },
		"rollback": func(o control.ApplyOptions) (control.ApplyResult, error) { return r.Rollback(t.Context(), 1, o) },
	} {
		if _, err := change(old); !errors.Is(err, control.ErrConflict) || !strings.Contains(err.Error(), "look at the difference again") {
			t.Errorf("%s of another revision: %v", what, err)
		}
	}
	if got, want := inForce(t, r), (sets{ruleSet{"f": 1}, ruleSet{"x": 1}}); !got.equal(want) {
		t.Errorf("%v in force, want %v", got, want)
	}
	// An undone change is none that anybody has seen.
	if _, err := r.Apply(t.Context(), nil, control.ApplyOptions{Confirm: time.Minute, Revision: done.Revision}); err != nil {
		t.Fatal(err)
	}
	waiting := revision()
	clock.pass(t, r, time.Minute)
	if now := revision(); now == waiting || now == done.Revision {
		t.Errorf("revision %s after a change was undone, %s while it waited, %s before", now, waiting, done.Revision)
	}
	// Another daemon has other revisions.
	before := revision()
	r.stop()
	r = p.start()
	if revision() == before {
		t.Errorf("the next daemon has the revision %s of the one before", before)
	}
}
