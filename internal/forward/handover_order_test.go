package forward

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"xdpcast/internal/labtest"
	"xdpcast/pkg/fanout"
)

// order records what a path that takes over does, and which descriptors it opens while packets wait for it.
type order struct {
	t      *testing.T
	steps  []string
	before map[string]bool
}

// prepare is a Prepare.
func (o *order) prepare(do func()) {
	o.steps = append(o.steps, "prepare")
	do()
	o.steps = append(o.steps, "prepared")
}

// suspend makes a Suspend.
func (o *order) suspend(old func() error) func() error {
	return func() error {
		o.steps = append(o.steps, "suspend")
		o.before = descriptors(o.t)
		return old()
	}
}

// runs is called when a worker starts.
func (o *order) runs() {
	o.steps = append(o.steps, "run")
	for what := range descriptors(o.t) {
		if !o.before[what] {
			o.t.Errorf("%s was opened while packets waited", what)
		}
	}
}

// descriptors returns what the process has open, but the directory that it is read from.
func descriptors(t *testing.T) map[string]bool {
	t.Helper()
	const dir = "/proc/self/fd"
	fds, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	open := map[string]bool{}
	for _, fd := range fds {
		if what, err := os.Readlink(filepath.Join(dir, fd.Name())); err == nil && !strings.HasPrefix(what, "/proc/") {
			open[fd.Name()+": "+what] = true
		}
	}
	return open
}

func (o *order) check(want ...string) {
	o.t.Helper()
	if !slices.Equal(o.steps, want) {
		o.t.Errorf("steps %v, want %v", o.steps, want)
	}
}

// watchedSockets is a Sockets that records when a queue's packets are directed to a worker, which is when it starts.
type watchedSockets struct {
	Sockets
	order *order
}

func (s watchedSockets) SetSocket(index, queue, fd int) error {
	s.order.runs()
	return s.Sockets.SetSocket(index, queue, fd)
}

// A path that takes over opens everything while the other one still forwards; while packets wait, it opens nothing.
func TestAFXDPPreparesFirst(t *testing.T) {
	b, r, more, finish := handsOver(t)
	o := &order{t: t}
	old := b.path
	h, err := old.HandOver()
	if err != nil {
		t.Fatal(err)
	}
	opts := AFXDPOptions{Prepare: o.prepare, Suspend: o.suspend(func() error { return old.Suspend(h) })}
	log := b.handOverTo(t, h, watchedSockets{b.loader, o}, opts, r)
	needsInheritance(t, log)
	o.check("prepare", "prepared", "suspend", "run")
	if !strings.Contains(log, "AF_XDP sockets taken over") {
		t.Errorf("it does not log how long packets waited:\n%s", log)
	}
	more()
	finish()
	// Later changes are none of a take-over.
	b.sync(t, r)
	o.check("prepare", "prepared", "suspend", "run")
}

func TestFanoutPreparesFirst(t *testing.T) {
	labtest.RequireRoot(t)
	b := newBench(t, 1)
	opts := FanoutOptions{Workers: 2, Mode: fanout.ModeHash}
	r := rule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.9.9.1", 6000))
	old := b.path(t, opts)
	b.sync(t, old, r)
	o := &order{t: t}
	opts.Prepare, opts.Suspend = o.prepare, o.suspend(old.Suspend)
	next, log := b.successor(t, old, opts)
	senders := 0
	open, wait := next.system.openSender, next.system.wait
	next.system.openSender = func(index int, opts fanout.SenderOptions) (Sender, error) {
		if senders++; o.before != nil {
			t.Error("a sender was opened while packets waited")
		}
		return open(index, opts)
	}
	running := make(chan map[string]bool, 2)
	next.system.wait = func(w *fanout.Worker) (*fanout.Block, error) {
		select {
		case running <- descriptors(t):
		default:
		}
		return wait(w)
	}
	b.sync(t, next, r)
	o.check("prepare", "prepared", "suspend")
	if senders != 2 {
		t.Errorf("%d senders were opened, want one for each worker", senders)
	}
	for what := range <-running {
		if !o.before[what] {
			t.Errorf("%s was opened while packets waited", what)
		}
	}
	if !strings.Contains(log.String(), "fanout rings taken over") {
		t.Errorf("it does not log how long packets waited:\n%s", log)
	}
}
