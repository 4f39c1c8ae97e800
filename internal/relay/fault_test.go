package relay

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/membership"
	"xdpcast/pkg/rules"
)

const (
	anyIn    = "239.1.1.1:5000%in0"
	sourceIn = "10.0.0.2@232.1.1.1:5000%in0"
	out0     = "239.2.2.1:6000%out0"
	out1     = "239.2.2.2:6000%out1"
)

// TestFailedJoinLeavesNothing: a rule whose group cannot be joined is not added, and
// nothing of it remains; it can be added once the cause is gone.
func TestFailedJoinLeavesNothing(t *testing.T) {
	for _, cause := range []error{unix.ENOBUFS, unix.ENOMEM, unix.ENODEV, unix.EPERM, unix.ENOPROTOOPT} {
		t.Run(cause.Error(), func(t *testing.T) {
			p := newPlace(t)
			system := newFaulty()
			p.opts.Membership.System = system
			r := p.start()
			r.mustAdd("there", "239.1.1.9:5000%in0", out0, out1)
			before := p.footprint(r)
			for _, tt := range []struct {
				in  string
				out []string
			}{{anyIn, []string{out0}}, {anyIn, []string{out0, out1}}, {sourceIn, []string{out1, out0}}} {
				system.fail(cause, "")
				_, err := r.add("bad", tt.in, tt.out...)
				var join *membership.JoinError
				if !errors.As(err, &join) || !errors.Is(err, cause) || !errors.Is(err, control.ErrFailed) {
					t.Fatalf("error is %v", err)
				}
				for _, part := range []string{"rule bad: ", "join ", join.Membership.Group.String(), "on in0", cause.Error()} {
					if !strings.Contains(err.Error(), part) || strings.Contains(err.Error(), "\n") {
						t.Errorf("error is %q, want %q in one line", err, part)
					}
				}
				if d := cmp.Diff(before, p.footprint(r)); d != "" {
					t.Errorf("something remains:\n%s", d)
				}
				system.fail(nil, "")
				r.mustAdd("bad", tt.in, tt.out...)
				if err := r.DeleteRule(t.Context(), "bad"); err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff(before, p.footprint(r)); d != "" {
					t.Errorf("something remains of a rule that was removed:\n%s", d)
				}
			}
		})
	}
}

// TestSavedRulesHeal: if the file of the API rules is left with others, the daemon says so while it cannot save its own, and
// saves them as soon as it can.
func TestSavedRulesHeal(t *testing.T) {
	p := newPlace(t)
	p.opts.StateFile = filepath.Join(t.TempDir(), "there", "saved.yaml")
	p.opts.observeEvery = 25 * time.Millisecond
	r := p.start()
	r.mustAdd("there", "239.1.1.9:5000%in0", out0)
	want, err := os.ReadFile(p.opts.StateFile)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Dir(p.opts.StateFile)
	if err := errors.Join(os.RemoveAll(dir), os.WriteFile(dir, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := r.do(t.Context(), func() error {
		r.unsaved = true
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	warns := func() bool {
		s, err := r.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(strings.Join(s.Warnings, "\n"), "the saved rules are not those of the daemon: ")
	}
	labtest.Eventually(t, "the status warns", warns)
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "the rules are saved", func() bool {
		got, err := os.ReadFile(p.opts.StateFile)
		return err == nil && string(got) == string(want)
	})
	labtest.Eventually(t, "the status warns no more", func() bool { return !warns() })
}

// TestFullLeavesNothing: the same for a rule that the maps have no room for.
func TestFullLeavesNothing(t *testing.T) {
	p := newPlace(t)
	p.opts.Loader.MaxRules, p.opts.Loader.MaxOutputs = 2, 4
	r := p.start()
	many := []string{out0, out1, "239.2.2.3:6000%out0"}
	r.mustAdd("a", "239.1.1.9:5000%in0", many...)
	before := p.footprint(r)
	check := func(wantText string, out ...string) {
		t.Helper()
		_, err := r.add("bad", anyIn, out...)
		var refused *loader.RuleError
		if !errors.Is(err, loader.ErrFull) || !errors.As(err, &refused) || err.Error() != wantText {
			t.Errorf("error is %v, want %q", err, wantText)
		}
		if d := cmp.Diff(before, p.footprint(r)); d != "" {
			t.Errorf("something remains:\n%s", d)
		}
	}
	check("rule bad: outputs: no room left: no 3 in a row of 4", many...)
	r.mustAdd("b", "239.1.1.8:5000%in0", out1)
	before = p.footprint(r)
	check("rule bad: outputs: no room left: no 1 in a row of 4", out0)
	if err := r.DeleteRule(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	r.mustAdd("bad", anyIn, out0)
}

// TestFailedApplyChangesNothing: when one rule of a set fails, those that were to be
// changed and removed with it have not been touched.
func TestFailedApplyChangesNothing(t *testing.T) {
	tests := []struct {
		name  string
		fault func(*faulty)
		want  error
		bad   control.Rule
	}{
		{"join", func(f *faulty) { f.fail(unix.ENOBUFS, "\xef\x01\x01\x05") }, unix.ENOBUFS,
			control.Rule{Name: "bad", In: "239.1.1.5:5000%in0", Out: []string{out0, out1}}},
		{"kernel", func(*faulty) {}, loader.ErrFull,
			control.Rule{Name: "worse", In: "239.1.1.5:5000%in0", Out: manyOut(60)}},
		{"resolve", func(*faulty) {}, nil,
			control.Rule{Name: "bad", In: "10.99.0.1:5000%in0", Out: []string{out0}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := newPlace(t)
			system := newFaulty()
			p.opts.Membership.System = system
			r := p.start()
			r.mustAdd("stays", "239.1.1.1:5000%in0", out0)
			r.mustAdd("changes", "239.1.1.2:5000%in0", out0, out1)
			r.mustAdd("goes", sourceIn, out1)
			before := p.footprint(r)
			tt.fault(system)
			_, err := r.Apply(t.Context(), parsed(t,
				control.Rule{Name: "stays", In: "239.1.1.1:5000%in0", Out: []string{out0}},
				control.Rule{Name: "changes", In: "239.1.1.3:5000%in0", Out: []string{out1}},
				tt.bad,
			), control.ApplyOptions{})
			if err == nil || tt.want != nil && !errors.Is(err, tt.want) || !strings.Contains(err.Error(), "rule "+tt.bad.Name+": ") {
				t.Errorf("error is %v, want %v", err, tt.want)
			}
			if d := cmp.Diff(before, p.footprint(r)); d != "" {
				t.Errorf("something has changed:\n%s", d)
			}
			status, err := r.Status(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for _, i := range status.Interfaces {
				// The new group of the rule that changes was joined in vain.
				if i.Name == "in0" && i.LeavesAttempted > 2 {
					t.Errorf("%d groups have been left, some of them in use", i.LeavesAttempted)
				}
			}
		})
	}
}

// parsed reads rules as the API does.
func parsed(t *testing.T, all ...control.Rule) []rules.Rule {
	t.Helper()
	var out []rules.Rule
	for _, c := range all {
		rule, err := control.ToRule(c)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, rule)
	}
	return out
}

func manyOut(n int) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = fmt.Sprintf("239.2.2.1:%d%%out0", 6000+i)
	}
	return all
}

// TestJoinsAreRetried: a rule of a file is tried again until its group is joined,
// and one can see how it stands.
func TestJoinsAreRetried(t *testing.T) {
	for _, tt := range []struct {
		cause error
		group string // state of the membership
		rule  string // state of the rule
	}{
		{unix.ENOBUFS, control.GroupRetrying, control.StatePending},
		{unix.EPERM, control.GroupFailed, control.StateFailed},
	} {
		t.Run(tt.cause.Error(), func(t *testing.T) {
			p := newPlace(t)
			system := newFaulty()
			system.fail(tt.cause, "\xef\x01\x01\x01")
			p.opts.Membership.System = system
			p.opts.ConfigFile = p.file("rules.yaml", "rules:\n  - {name: late, in: "+anyIn+", out: ["+out0+"]}\n  - {name: good, in: 239.1.1.9:5000%in0, out: ["+out0+"]}\n")
			r := p.start()
			group := func() control.Group {
				t.Helper()
				all, err := r.Groups(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				for _, g := range all {
					if g.Group == "239.1.1.1" {
						return g
					}
				}
				t.Fatalf("group is not listed: %+v", all)
				return control.Group{}
			}
			labtest.Eventually(t, "there were three tries", func() bool { return group().Tries >= 3 })
			g := group()
			if g.State != tt.group || g.Next == nil || !strings.Contains(g.Cause, tt.cause.Error()) || !cmp.Equal(g.Rules, []string{"late"}) {
				t.Errorf("group is %+v", g)
			}
			late, err := r.Rule(t.Context(), "late")
			if err != nil {
				t.Fatal(err)
			}
			// It is in force nevertheless: what arrives without the membership is relayed.
			if late.State != tt.rule || !strings.Contains(late.Reason, "tries, next at") || late.UsedPath != "kernel" || r.kernel("late") == nil {
				t.Errorf("rule is %s (%s), path %q", late.State, late.Reason, late.UsedPath)
			}
			if good, err := r.Rule(t.Context(), "good"); err != nil || good.State != control.StateActive {
				t.Errorf("the other rule is %s (%s), %v", good.State, good.Reason, err)
			}
			system.fail(nil, "")
			labtest.Eventually(t, "the group is joined", func() bool { return group().State == control.GroupJoined })
			if g := group(); g.Cause != "" || g.Next != nil {
				t.Errorf("group is %+v", g)
			}
			labtest.Eventually(t, "the rule is active", func() bool {
				late, err := r.Rule(t.Context(), "late")
				return err == nil && late.State == control.StateActive && late.Reason == ""
			})
		})
	}
}

// TestJoinFailsAtRestart: a rule that is in the kernel stays there when its group
// cannot be joined: what arrives is relayed all the same.
func TestJoinFailsAtRestart(t *testing.T) {
	p := newPlace(t)
	system := newFaulty()
	p.opts.Membership.System = system
	r := p.start()
	id := r.mustAdd("a", anyIn, out0, out1).ID
	r.stop()
	system.fail(unix.ENOBUFS, "")
	r = p.start()
	got, err := r.Rule(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	if got.State != control.StatePending || got.ID != id || got.UsedPath != "kernel" {
		t.Errorf("rule is %s (%s), id %d, path %q; want it pending, in the kernel as number %d", got.State, got.Reason, got.ID, got.UsedPath, id)
	}
	system.fail(nil, "")
	labtest.Eventually(t, "the rule is active", func() bool {
		got, err := r.Rule(t.Context(), "a")
		return err == nil && got.State == control.StateActive && got.ID == id
	})
}

// TestBadStart: what keeps a relay from starting is said, and nothing is touched.
func TestBadStart(t *testing.T) {
	for _, tt := range []struct {
		name    string
		prepare func(*place)
		want    string
	}{
		{"file absent", func(p *place) { p.opts.ConfigFile = "/nonexistent/rules.yaml" }, "/nonexistent/rules.yaml: no such file"},
		{"file broken", func(p *place) { p.opts.ConfigFile = p.file("rules.yaml", "rules: 7\n") }, "rules.yaml:1: "},
		{"saved rules broken", func(p *place) { p.opts.StateFile = p.file("saved.yaml", "{") }, "saved.yaml:1: did not find expected node content; remove the file to start without them"},
		{"saved rules wrong", func(p *place) {
			p.opts.StateFile = p.file("saved.yaml", "rules:\n  - name: a\n    in: x\n    out: []\n")
		}, `saved.yaml:3: rule "a": `},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPlace(t)
			tt.prepare(p)
			files := openFiles(t)
			if _, err := p.tryStart(); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error is %v, want %q", err, tt.want)
			}
			if _, err := os.Stat(p.opts.Loader.PinDir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("pin directory: %v", err)
			}
			if n := openFiles(t); n != files {
				t.Errorf("%d files are open, before %d", n, files)
			}
		})
	}
	t.Run("another runs", func(t *testing.T) {
		p := newPlace(t)
		p.start()
		files := openFiles(t)
		if _, err := p.tryStart(); !errors.Is(err, loader.ErrLocked) {
			t.Errorf("error is %v, want ErrLocked", err)
		}
		if n := openFiles(t); n != files {
			t.Errorf("%d files are open, before %d", n, files)
		}
	})
}

// TestNothingLeaks: a relay that has run, with rules, leaves no file open.
func TestNothingLeaks(t *testing.T) {
	p := newPlace(t)
	files := openFiles(t)
	for range 3 {
		r := p.start()
		for i := range 5 {
			name := fmt.Sprint("r", i)
			if i%2 == 0 {
				_ = r.DeleteRule(t.Context(), name) // saved by the relay before
				r.mustAdd(name, fmt.Sprintf("239.1.1.%d:5000%%in0", i+1), out0, out1)
			}
		}
		r.stop()
		if n := openFiles(t); n != files {
			t.Errorf("%d files are open, before %d", n, files)
		}
		if _, err := r.Rules(t.Context()); !errors.Is(err, control.ErrUnavailable) {
			t.Errorf("a relay that has ended says %v", err)
		}
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir(filepath.Join("/proc", "self", "fd"))
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}
