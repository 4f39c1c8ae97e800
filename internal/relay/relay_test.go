package relay

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/membership"
)

// TestSavedRules: rules of the API outlive the relay; where the file now has
// something else, the file wins, and the others stay.
func TestSavedRules(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	for i := range 4 {
		r.mustAdd(fmt.Sprint("r", i), fmt.Sprintf("239.1.1.%d:5000%%in0", i), out0)
	}
	before := p.footprint(r)
	r.stop()
	r = p.start()
	if d := cmp.Diff(before, p.footprint(r)); d != "" {
		t.Errorf("rules are not as before:\n%s", d)
	}
	r.stop()

	p.opts.ConfigFile = p.file("rules.yaml", `rules:
  - {name: r1, in: "239.1.1.9:5000%in0", out: ["239.2.2.1:6000%out1"]}
  - {name: other, in: "239.1.1.2:5000%in0", out: ["239.2.2.1:6000%out1"]}
`)
	r = p.start()
	all, err := r.Rules(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range all {
		got = append(got, strings.Join([]string{s.Name, s.Origin, s.State, s.In}, " "))
	}
	if d := cmp.Diff([]string{
		"other file active 239.1.1.2:5000%in0",
		"r0 api active 239.1.1.0:5000%in0",
		"r1 file active 239.1.1.9:5000%in0",
		"r3 api active 239.1.1.3:5000%in0",
	}, got); d != "" {
		t.Errorf("rules:\n%s", d)
	}
	if err := r.DeleteRule(t.Context(), "r1"); !errors.Is(err, control.ErrConflict) {
		t.Errorf("a rule of the file is deleted: %v", err)
	}
	if _, err := r.add("r1", "239.1.1.77:5000%in0", out0); !errors.Is(err, control.ErrConflict) {
		t.Errorf("a rule of a name that is taken: %v", err)
	}
	if err := r.DeleteRule(t.Context(), "nobody"); !errors.Is(err, control.ErrNotFound) {
		t.Errorf("a rule that is not there is deleted: %v", err)
	}
}

// TestWhatIsNotSavedIsNotDone: a change whose rules cannot be saved fails and is undone,
// since a restart would take it back.
func TestWhatIsNotSavedIsNotDone(t *testing.T) {
	p := newPlace(t)
	if err := os.MkdirAll(p.opts.Loader.RunDir, 0o755); err != nil {
		t.Fatal(err)
	}
	const small = 64 << 10
	if err := unix.Mount("tmpfs", p.opts.Loader.RunDir, "tmpfs", 0, fmt.Sprintf("size=%d,mode=755", small)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(p.opts.Loader.RunDir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	r := p.start()
	r.mustAdd("a", anyIn, out0)
	before := p.footprint(r)
	refuses := func(why string) {
		t.Helper()
		_, added := r.add("b", sourceIn, out0)
		deleted := r.DeleteRule(t.Context(), "a")
		_, applied := r.Apply(t.Context(), nil, control.ApplyOptions{})
		for what, err := range map[string]error{"add": added, "delete": deleted, "apply": applied} {
			if !errors.Is(err, control.ErrFailed) || !strings.Contains(err.Error(), "save rules: ") || !strings.Contains(err.Error(), why) {
				t.Errorf("%s: %v, want that it fails as the rules cannot be saved: %s", what, err, why)
			}
			if diff := cmp.Diff(before, p.footprint(r)); diff != "" {
				t.Errorf("after the failed %s (-before +after):\n%s", what, diff)
			}
		}
	}
	// The directory is full.
	filler := filepath.Join(p.opts.Loader.RunDir, "filler")
	if err := os.WriteFile(filler, make([]byte, small), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("fill the run directory: %v", err)
	}
	refuses("no space left on device")
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	// Something is in the way of what is written first, and of what takes its place.
	for _, path := range []string{p.stateFile() + ".next", p.stateFile()} {
		saved, err := os.ReadFile(p.stateFile())
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(os.RemoveAll(path), os.MkdirAll(path+"/full", 0o700)); err != nil {
			t.Fatal(err)
		}
		if path == p.stateFile() {
			before.Saved = "" // it cannot be read
			if _, err := r.add("b", sourceIn, out0); !errors.Is(err, control.ErrFailed) {
				t.Errorf("add: %v, want that it fails", err)
			}
		} else {
			refuses("directory not empty")
		}
		if err := errors.Join(os.RemoveAll(path), os.WriteFile(p.stateFile(), saved, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.DeleteRule(t.Context(), "a"); err != nil {
		t.Error(err)
	}
	r.mustAdd("b", sourceIn, out0)
	r.stop()
	r = p.start()
	if all, err := r.Rules(t.Context()); err != nil || len(all) != 1 || all[0].Name != "b" {
		t.Errorf("after a restart: %v, %v", all, err)
	}
}

// TestEverythingAtOnce uses the API from many goroutines while interfaces come and
// go. The sum of joins always holds, and all ends well.
func TestEverythingAtOnce(t *testing.T) {
	p := newPlace(t)
	peer := labtest.Host(t, "peer2")
	r := p.start()
	r.mustAdd("stays", anyIn, out0, out1)
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			for i := range 8 {
				name := fmt.Sprintf("w%d-%d", worker, i)
				if _, err := r.add(name, fmt.Sprintf("239.1.%d.%d:5000%%late0", worker+2, i), out0, "239.2.2.9:6000%late0"); err != nil {
					// The interface may go at the wrong moment; then nothing is added.
					if _, err := r.Rule(t.Context(), name); !errors.Is(err, control.ErrNotFound) {
						t.Errorf("rule %s was not added, but is there: %v", name, err)
					}
					continue
				}
				if err := r.DeleteRule(t.Context(), name); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Go(func() {
		for range 40 {
			_, err := r.Stats(t.Context())
			_, err2 := r.Groups(t.Context())
			status, err3 := r.Status(t.Context())
			if err := errors.Join(err, err2, err3); err != nil {
				t.Error(err)
			}
			for _, i := range status.Interfaces {
				if i.JoinsAttempted != i.JoinsSucceeded+i.JoinsFailed {
					t.Errorf("interface %s: %d joins attempted, %d succeeded, %d failed", i.Name, i.JoinsAttempted, i.JoinsSucceeded, i.JoinsFailed)
				}
			}
		}
	})
	for range 6 {
		labtest.Connect(t, lab.End{Host: p.host, Name: "late0", Addrs: []string{"10.9.0.1/24"}},
			lab.End{Host: peer, Name: "late0", Addrs: []string{"10.9.0.2/24"}})
		l, err := p.host.Link("late0")
		if err == nil {
			err = p.host.Netlink().LinkDel(l)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	wg.Wait()
	labtest.Eventually(t, "only the first rule is left", func() bool {
		f := p.footprint(r)
		return len(f.Rules) == 1 && len(f.Kernel) == 1 && f.Fanout == 1 && len(f.Attached) == 3
	})
	if s, err := r.Rule(t.Context(), "stays"); err != nil || s.State != control.StateActive {
		t.Errorf("rule is %s (%s), %v", s.State, s.Reason, err)
	}
}

// TestEmptyFileChangesNothing: what a producer leaves that failed is no order to remove
// every rule.
func TestEmptyFileChangesNothing(t *testing.T) {
	p := newPlace(t)
	p.opts.ConfigFile = p.file("rules.yaml", `rules: [{name: a, in: "239.1.1.1:5000%in0", out: "239.2.2.1:6000%out0"}]`)
	r := p.start()
	before := p.footprint(r)
	for _, text := range []string{"", "# rules:\n", "rules:\n"} {
		p.file("rules.yaml", text)
		if _, err := r.Reload(t.Context(), control.ApplyOptions{}); !errors.Is(err, control.ErrInvalid) || !strings.Contains(err.Error(), `"rules: []" for none`) {
			t.Errorf("reload of %q: %v", text, err)
		}
		if diff := cmp.Diff(before, p.footprint(r)); diff != "" {
			t.Errorf("after the reload of %q (-before +after):\n%s", text, diff)
		}
	}
	p.file("rules.yaml", "rules: []\n")
	if result, err := r.Reload(t.Context(), control.ApplyOptions{}); err != nil || result.Removed != 1 {
		t.Errorf("reload of no rules on purpose: %+v, %v", result, err)
	}
}

// TestMembershipsGoWithTheirInterface: an interface that goes and comes back, with the same
// index or another, is joined anew.
func TestMembershipsGoWithTheirInterface(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	r.mustAdd("a", anyIn, out0)
	r.mustAdd("b", sourceIn, out0)
	onIn0 := func() (lines []string) {
		for line := range strings.Lines(p.groups()) {
			if strings.HasPrefix(line, "in0 group") {
				lines = append(lines, line)
			}
		}
		return lines
	}
	want := onIn0()
	for _, same := range []bool{true, false} {
		in0, err := p.host.Link("in0")
		if err != nil {
			t.Fatal(err)
		}
		if err := p.host.Netlink().LinkDel(in0); err != nil {
			t.Fatal(err)
		}
		labtest.Eventually(t, "the relay knows", func() bool {
			status, err := r.Rule(t.Context(), "a")
			return err == nil && status.State == control.StatePending
		})
		if all, err := r.Groups(t.Context()); err != nil || len(r.groupsHeld(t)) != 0 {
			t.Errorf("held on an interface that is gone: %v, %v, %v", r.groupsHeld(t), all, err)
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "in0"
		if same {
			attrs.Index = in0.Attrs().Index
		}
		if err := p.host.Netlink().LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "peer0"}); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(p.host.AddAddr("in0", "10.0.0.1/24"), p.host.SetUp("in0", true), p.host.SetUp("peer0", true)); err != nil {
			t.Fatal(err)
		}
		labtest.Eventually(t, "the groups are joined again", func() bool { return slices.Equal(onIn0(), want) })
	}
	if log := p.log.String(); strings.Contains(log, "leaving a group failed") {
		t.Error("groups of an interface that is gone were to be left, rather than forgotten")
	}
}

// groupsHeld is what the relay's manager of memberships holds.
func (r *running) groupsHeld(t *testing.T) (held []membership.Status) {
	t.Helper()
	if err := r.do(t.Context(), func() error { held = r.memberships.manager.List(); return nil }); err != nil {
		t.Fatal(err)
	}
	return held
}

// TestTwoRelaysShareARunDirectory: each keeps its own rules there, also over a restart.
func TestTwoRelaysShareARunDirectory(t *testing.T) {
	one, two := newPlace(t), newPlace(t)
	two.opts.Loader.RunDir = one.opts.Loader.RunDir
	first, second := one.start(), two.start()
	first.mustAdd("first", anyIn, out0)
	second.mustAdd("second", sourceIn, out1)
	if first.tags.file == second.tags.file {
		t.Errorf("both note in %s what they have switched off", first.tags.file)
	}
	first.stop()
	second.stop()
	for p, want := range map[*place]string{one: "first", two: "second"} {
		r := p.start()
		all, err := r.Rules(t.Context())
		if err != nil || len(all) != 1 || all[0].Name != want {
			t.Errorf("after a restart: %v, %v, want rule %s alone", all, err, want)
		}
		r.stop()
	}
}
