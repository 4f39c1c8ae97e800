package membership

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sync/errgroup"

	"xdpcast/internal/labtest"
)

// model is what a correct manager would hold: references by membership.
type model struct {
	mu   sync.Mutex
	refs map[Membership]int
}

func (m *model) add(ms Membership, n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.refs[ms] += n; m.refs[ms] == 0 {
		delete(m.refs, ms)
	}
}

func (m *model) dropInterface(index int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for ms := range m.refs {
		if ms.Index == index {
			delete(m.refs, ms)
		}
	}
}

// kernelState is what the kernel should hold for the model: no group here has
// more sources than a socket takes, so one socket holds them, and another one
// any source.
func (m *model) kernelState() kernelState {
	s := kernelState{map[kernelGroup]int{}, map[kernelFilter]string{}}
	specific := map[kernelGroup]bool{}
	for ms := range m.refs {
		g := kernelGroup{ms.Index, ms.Group}
		if ms.Source.IsValid() {
			s.Filters[kernelFilter{ms.Index, ms.Group, ms.Source}] = "1/0"
			specific[g] = true
		} else {
			s.Users[g]++
		}
	}
	for g := range specific {
		s.Users[g]++
	}
	return s
}

// world is the interfaces of the random test. Operations hold the lock to
// read; what re-creates an interface holds it to write, but not while the
// interface is being deleted: joins and leaves run into that.
type world struct {
	sync.RWMutex
	index map[string]int
}

// TestRandomOperations runs random joins, leaves, link flaps and re-creations
// from several goroutines, then compares the kernel, the manager's list and the
// model.
func TestRandomOperations(t *testing.T) {
	b := newBench(t)
	workers, operations, disturbances := 6, 2500, 25
	if testing.Short() {
		operations, disturbances = 300, 5
	}
	m := b.manager(t)
	truth := &model{refs: map[Membership]int{}}
	w := &world{index: map[string]int{"eth0": labtest.Index(t, b.host, "eth0"), "eth1": labtest.Index(t, b.host, "eth1")}}

	var group errgroup.Group
	held := make([][]Membership, workers)
	for i := range workers {
		group.Go(func() error {
			return randomWorker(rand.New(rand.NewPCG(1, uint64(i))), m, w, truth, operations, &held[i])
		})
	}
	stop := make(chan struct{})
	var reader errgroup.Group
	reader.Go(func() error { return readCounters(m, stop) })
	for i := range disturbances {
		w.recreate(t, b, m, truth)
		if i%5 == 0 {
			w.flap(t, b, m)
		}
	}
	if err := group.Wait(); err != nil {
		t.Error(err)
	}
	close(stop)
	if err := reader.Wait(); err != nil {
		t.Error(err)
	}
	checkCounters(t, m)
	for _, c := range m.Counters() {
		t.Logf("%+v", c)
	}
	if diff := cmp.Diff(truth.kernelState(), b.kernelState(t), compareAddrs); diff != "" {
		t.Errorf("kernel state, - wanted + found:\n%s", diff)
	}
	listed := map[Membership]int{}
	for _, s := range m.List() {
		listed[s.Membership] = s.References
	}
	if diff := cmp.Diff(truth.refs, listed, compareAddrs); diff != "" {
		t.Errorf("list, - wanted + found:\n%s", diff)
	}
	for ms, refs := range truth.refs {
		for range refs {
			mustLeave(t, m, ms)
		}
	}
	b.checkState(t)
	checkNothingHeld(t, m)
}

// randomWorker joins and leaves at random, and tells the model what succeeded.
func randomWorker(r *rand.Rand, m *Manager, w *world, truth *model, operations int, held *[]Membership) error {
	for range operations {
		w.RLock()
		err := randomOperation(r, m, w, truth, held)
		w.RUnlock()
		if err != nil {
			return err
		}
	}
	return nil
}

func randomOperation(r *rand.Rand, m *Manager, w *world, truth *model, held *[]Membership) error {
	if n := len(*held); n > 0 && r.IntN(100) < 48 {
		i := r.IntN(n)
		ms := (*held)[i]
		(*held)[i] = (*held)[n-1]
		*held = (*held)[:n-1]
		err := m.Leave(ms)
		if ms.Index != w.index["eth0"] && ms.Index != w.index["eth1"] {
			if !errors.Is(err, ErrNotJoined) {
				return fmt.Errorf("left what was dropped: %w", err)
			}
			return nil
		}
		truth.add(ms, -1)
		if err != nil && ms.Interface != "eth1" { // eth1 may be gone at any time
			return err
		}
		return nil
	}
	ms := randomMembership(r, w)
	err := m.Join(ms)
	if err == nil {
		truth.add(ms, 1)
		*held = append(*held, ms)
		return nil
	}
	if ms.Interface == "eth1" && Transient(err) {
		return nil
	}
	return err
}

// randomMembership picks from groups enough that sockets fill up, and few
// enough that workers meet.
func randomMembership(r *rand.Rand, w *world) Membership {
	ifname := []string{"eth0", "eth1"}[r.IntN(2)]
	group, source := r.IntN(60), r.IntN(4)
	what := fmt.Sprintf("239.1.1.%d", group)
	if source > 0 {
		what = fmt.Sprintf("10.9.0.%d@%s", source, what)
	}
	if r.IntN(3) == 0 {
		what = fmt.Sprintf("ff1e::%x", group)
		if source > 0 {
			what = fmt.Sprintf("fd00::%x@%s", source, what)
		}
	}
	return parseMembership(ifname, w.index[ifname], what)
}

// readCounters checks, until told to stop, that attempts are the sum of their
// outcomes and that memberships are what is listed.
func readCounters(m *Manager, stop <-chan struct{}) error {
	for {
		for _, c := range m.Counters() {
			if c.Joins.Attempted != c.Joins.Succeeded+c.Joins.Failed ||
				c.Leaves.Attempted != c.Leaves.Succeeded+c.Leaves.Failed ||
				uint64(c.Memberships) != c.Restored+c.Joins.Succeeded-c.Leaves.Attempted-c.Dropped {
				return fmt.Errorf("counters do not add up: %+v", c)
			}
		}
		for _, s := range m.List() {
			if s.References < 1 {
				return fmt.Errorf("listed without a reference: %+v", s)
			}
		}
		select {
		case <-stop:
			return nil
		default:
		}
	}
}

// flap takes eth0 down and up. Nothing else may happen meanwhile, since the
// kernel would bring back sources that were left.
func (w *world) flap(t *testing.T, b bench, m *Manager) {
	w.Lock()
	defer w.Unlock()
	b.set(t, "eth0", false)
	b.set(t, "eth0", true)
	for _, err := range m.Refresh(w.index["eth0"], 0) {
		t.Error(err)
	}
}

// recreate deletes eth1, makes it again and tells the manager and the model.
func (w *world) recreate(t *testing.T, b bench, m *Manager, truth *model) {
	labtest.RemoveLink(t, b.host, "eth1")
	w.Lock()
	defer w.Unlock()
	m.DropInterface(w.index["eth1"], 0)
	truth.dropInterface(w.index["eth1"])
	w.index["eth1"] = b.connect(t, "eth1")
}

// TestCountersWhileJoining reads counters while joins succeed and fail.
func TestCountersWhileJoining(t *testing.T) {
	b := newBench(t)
	m := b.manager(t)
	stop := make(chan struct{})
	var readers, writers errgroup.Group
	for range 2 {
		readers.Go(func() error { return readCounters(m, stop) })
	}
	good, bad := b.membership(t, "eth0", "239.1.1.1"), parseMembership("eth0", 9999, "239.1.1.1")
	for range 3 {
		writers.Go(func() error {
			for range 200 {
				if err := m.Join(bad); err == nil {
					return errors.New("joined on an interface that is not there")
				}
				if err := errors.Join(m.Join(good), m.Leave(good)); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := writers.Wait(); err != nil {
		t.Error(err)
	}
	close(stop)
	if err := readers.Wait(); err != nil {
		t.Error(err)
	}
	c := m.Counters()[0]
	if c.Joins.Failed != 600 || c.Joins.Succeeded != c.Leaves.Succeeded || c.Leaves.Failed != 0 {
		t.Errorf("counters are %+v", c)
	}
	b.checkState(t)
}
