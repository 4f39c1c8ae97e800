package loader

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"xdpcast/bpf"
	"xdpcast/internal/account"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
)

// A path counts before the Loader is open, and goes on with the same counters: of rules by their ids, and of one that the
// state has under another id, or that nobody knew the ids of. Other processes are locked out from the start.
func TestEarly(t *testing.T) {
	labtest.RequireRoot(t)
	n := newLab(t, 1)
	opts := stateOptions(t)
	if _, err := OpenEarly(opts, 1, nil); err == nil {
		t.Error("there is no pinned state to open")
	}
	l := open(t, opts)
	var rules []flow.Flow
	for _, name := range []string{"known", "wrong", "unknown"} {
		rules = append(rules, flow.Flow{
			Name: name, Path: flow.PathFanout, In: input(n.in, "239.1.1.1", "", uint16(5000+len(rules))),
			Out: []flow.Output{output(n.out[0], "239.2.1.1", "10.1.0.1", uint16(6000+len(rules)))},
		})
	}
	sync1(t, l, rules...)
	state, err := l.StateID()
	if err != nil {
		t.Fatal(err)
	}
	ids := map[string]CounterIDs{}
	for _, rule := range rules[:2] {
		c := l.OpenCounters(rule)
		id, first, ok := c.IDs()
		if !ok {
			t.Fatalf("the counters of %s have no ids", rule.Name)
		}
		ids[rule.Name] = CounterIDs{id, first}
		count(c)
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := OpenEarly(opts, state, ids); !errors.Is(err, ErrLocked) {
		t.Errorf("beside the loader: %v, want ErrLocked", err)
	}
	closeLoader(t, l)
	if _, err := OpenEarly(opts, state+1, ids); !errors.Is(err, ErrOtherState) {
		t.Errorf("%v, want ErrOtherState", err)
	}
	ids["wrong"] = CounterIDs{ids["wrong"].Rule + 50, ids["wrong"].FirstOutput + 50}

	early, err := OpenEarly(opts, state, ids)
	if err != nil {
		t.Fatal(err)
	}
	early.GiveUp = func() error { t.Error("the path gives up"); return nil }
	var open []*account.RuleCounters
	for _, rule := range rules {
		open = append(open, early.OpenCounters(rule))
		count(open[len(open)-1])
	}
	if _, err := Open(opts); !errors.Is(err, ErrLocked) {
		t.Errorf("another loader: %v, want ErrLocked", err)
	}
	opts.Early = early
	l, err = Open(opts)
	if err != nil {
		t.Fatal(err)
	}
	if l.Account() != early.Account() {
		t.Error("the loader has another account")
	}
	for i, want := range []uint64{2, 2, 1} {
		count(open[i])
		if got := statsOf(t, l, rules[i].Name).Matched.Packets; got != want+1 {
			t.Errorf("rule %s has matched %d packets, want %d", rules[i].Name, got, want+1)
		}
		if err := open[i].Close(); err != nil {
			t.Error(err)
		}
	}
	if err := errors.Join(early.Close(), l.Close()); err != nil {
		t.Error(err)
	}

	// State that the loader has to make anew: the path gives up before.
	opts.Early = nil
	early, err = OpenEarly(opts, state, ids)
	if err != nil {
		t.Fatal(err)
	}
	c, gaveUp := early.OpenCounters(rules[0]), false
	early.GiveUp = func() error {
		gaveUp = true
		return errors.Join(c.Close(), early.Close())
	}
	if err := os.Remove(filepath.Join(opts.PinDir, bpf.RelayMapRules)); err != nil {
		t.Fatal(err)
	}
	opts.Early, opts.Replace = early, true
	l, err = Open(opts)
	if err != nil {
		t.Fatal(err)
	}
	defer closeLoader(t, l)
	if !gaveUp {
		t.Error("the path goes on beside a loader that counts elsewhere")
	}
}

// count counts a packet as a worker does.
func count(c *account.RuleCounters) {
	c.Rule.Cell(account.WriterOf(uint8(flow.PathFanout), 0), account.Matched).Add(1, 100)
}
