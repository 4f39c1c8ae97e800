package relay

import (
	"fmt"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"xdpcast/internal/control"
	"xdpcast/internal/labtest"
)

// Interfaces that come one after another, and that no rule uses, leave the CPU to others for most of the time, however
// long it takes to read them. A change of an interface that a rule uses waits for none of that.
func TestStormIsPaced(t *testing.T) {
	p := newPlace(t)
	var busy atomic.Int64
	p.opts.Reconciled = func(took time.Duration) { busy.Add(int64(took)) }
	p.opts.observeEvery = time.Hour
	r := p.start()
	r.mustAdd("r", "239.1.1.1:5000%in0", "239.2.1.1:6000%out0")
	links := p.host.Netlink()
	before, started := busy.Load(), time.Now()
	n := 0
	for ; time.Since(started) < 1500*time.Millisecond || n < 20; n++ {
		if err := links.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("storm%d", n)}, PeerName: fmt.Sprintf("mrots%d", n)}); err != nil {
			t.Fatal(err)
		}
	}
	spent, took := time.Duration(busy.Load()-before), time.Since(started)
	t.Logf("%d interfaces in %v, the loop was busy for %v", n, took, spent)
	if spent > took*6/10 { // a fifth, and more where a reconcile takes longer than an eighth of a second
		t.Errorf("%d interfaces in %v kept the loop busy for %v", n, took, spent)
	}
	last := fmt.Sprintf("storm%d", n-1)
	labtest.Eventually(t, "all are known", func() bool {
		known := false
		err := r.do(t.Context(), func() error {
			known = r.network.Link(last) != nil
			return nil
		})
		return err == nil && known
	})

	notSoon := func() {
		t.Helper()
		if err := r.do(t.Context(), func() error {
			r.pace.free = time.Now().Add(time.Hour)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	state := func(name string, want func(string) bool) func() bool {
		return func() bool {
			rule, err := r.Rule(t.Context(), name)
			return err == nil && want(rule.State)
		}
	}
	active := func(s string) bool { return s == control.StateActive }
	notSoon()
	if err := p.peer.SetUp("out0", false); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "the rule waits for a carrier", state("r", func(s string) bool { return !active(s) }))
	notSoon()
	if err := p.peer.SetUp("out0", true); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "the rule has its carrier", state("r", active))

	// An interface that does not exist, and that no flow can use yet.
	if status, err := r.add("late", "239.1.1.2:5000%in0", "239.2.1.2:6000%late0,src=keep"); err != nil || status.State != control.StatePending {
		t.Fatal(status.State, err)
	}
	matters := func() (any bool) {
		if err := r.do(t.Context(), func() error {
			any = r.uses(1 << 30)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return any
	}
	if !matters() {
		t.Error("a rule waits, but a new interface does not matter")
	}
	notSoon()
	late := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "late0", Flags: net.FlagUp}, PeerName: "late1"}
	if err := links.LinkAdd(late); err != nil {
		t.Fatal(err)
	}
	peer, err := links.LinkByName("late1")
	if err != nil {
		t.Fatal(err)
	}
	if err := links.LinkSetUp(peer); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "the rule has its interface", state("late", active))
	if matters() {
		t.Error("no rule waits, but any interface matters")
	}
}
