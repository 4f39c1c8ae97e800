package relay

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/control"
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
