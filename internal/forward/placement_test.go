package forward

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
)

// A thread uses those of its CPUs on which it waits least, and forgets what is long ago.
func TestWaits(t *testing.T) {
	type wait struct {
		after  time.Duration // the wait before
		cpu    int
		waited time.Duration
	}
	ms := time.Millisecond
	for _, tt := range []struct {
		name  string
		cpus  []int
		waits []wait
		later time.Duration
		want  []int
	}{
		{"no waits", []int{0, 1}, nil, 0, []int{0, 1}},
		{"few waits", []int{0, 1}, []wait{{0, 0, 19 * ms}}, 0, []int{0, 1}},
		{"many waits", []int{0, 1}, []wait{{0, 0, 20 * ms}}, 0, []int{1}},
		{"many small ones", []int{0, 1}, slices.Repeat([]wait{{5 * ms, 0, ms}}, 25), 0, []int{1}},
		{"small ones now and then", []int{0, 1}, slices.Repeat([]wait{{time.Second, 0, ms}}, 100), 0, []int{0, 1}},
		{"both as bad", []int{0, 1}, []wait{{0, 0, 19 * ms}, {0, 1, 300 * ms}, {0, 0, 290 * ms}}, 0, []int{0, 1}},
		{"avoided until the other is as bad", []int{0, 1}, []wait{{0, 0, 300 * ms}, {0, 1, 290 * ms}}, 0, []int{1}},
		{"the other is as bad", []int{0, 1}, []wait{{0, 0, 300 * ms}, {0, 1, 301 * ms}}, 0, []int{0, 1}},
		{"the better of both", []int{0, 1}, []wait{{0, 0, 310 * ms}, {0, 1, 150 * ms}}, 0, []int{1}},
		{"the other has become bad", []int{0, 1}, []wait{{0, 0, 30 * ms}, {time.Second, 1, 70 * ms}}, 0, []int{0}},
		{"many CPUs", []int{1, 2, 5, 70}, []wait{{0, 5, 30 * ms}, {0, 70, 21 * ms}, {0, 1, 10 * ms}}, 0, []int{1, 2}},
		{"all are bad", []int{1, 2, 5}, []wait{{0, 5, 300 * ms}, {0, 2, 110 * ms}, {0, 1, 60 * ms}}, 0, []int{1}},
		{"not yet forgotten", []int{0, 1}, []wait{{0, 0, 50 * ms}}, 20 * time.Second, []int{1}},
		{"forgotten", []int{0, 1}, []wait{{0, 0, 50 * ms}}, 25 * time.Second, []int{0, 1}},
		{"the only one", []int{3}, []wait{{0, 3, time.Minute}}, 0, []int{3}},
		{"waits elsewhere", []int{3, 4}, []wait{{0, 0, time.Minute}}, 0, []int{3, 4}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w, now := newWaits(tt.cpus), time.Now()
			var set unix.CPUSet
			for _, cpu := range tt.cpus {
				set.Set(cpu)
			}
			for _, wait := range tt.waits {
				now = now.Add(wait.after)
				w.add(wait.cpu, wait.waited, now)
				set = w.choose(now, &set)
			}
			set = w.choose(now.Add(tt.later), &set)
			if got := cpuNumbers(&set); !slices.Equal(got, tt.want) {
				t.Errorf("chose %v of %v, want %v", got, tt.cpus, tt.want)
			}
		})
	}
}

// simulated is a thread of a machine on which others keep it waiting.
type simulated struct {
	placement
	busy          map[int]float64 // share of the time for which it waits, by CPU
	cpu           int
	waited        time.Duration
	turns         uint64
	moves         int
	now           time.Time
	spent         map[int]time.Duration
	refused, gone error
}

func newSimulated(cpus int, busy map[int]float64) *simulated {
	s := &simulated{busy: busy, turns: 1, now: time.Now(), spent: map[int]time.Duration{}}
	for cpu := range cpus {
		s.set.Set(cpu)
	}
	s.placement.log, s.stat, s.waits = slog.New(slog.DiscardHandler), s, newWaits(cpuNumbers(&s.set))
	s.on = func() (int, error) { return s.cpu, s.gone }
	s.is = func(set *unix.CPUSet) error { *set = s.set; return nil }
	s.apply = func(set *unix.CPUSet) error {
		if s.refused != nil {
			return s.refused
		}
		s.moves++
		s.wake(set)
		return nil
	}
	s.read()
	return s
}

// wake gives it the first of the CPUs, as a scheduler that wakes threads where their packets arrive.
func (s *simulated) wake(set *unix.CPUSet) { s.cpu = cpuNumbers(set)[0] }

func (s *simulated) ReadAt(b []byte, _ int64) (int, error) {
	return copy(b, fmt.Sprintf("12345 %d %d\n", s.waited.Nanoseconds(), s.turns)), nil
}

// pass lets time pass, in which it gets a CPU every 100 us.
func (s *simulated) pass(d time.Duration) {
	const turn = 100 * time.Microsecond
	for range d / turn {
		s.now = s.now.Add(turn)
		s.spent[s.cpu] += turn
		s.turns++
		s.waited += 2*time.Microsecond + time.Duration(s.busy[s.cpu]*float64(turn))
		s.look(s.now)
	}
}

// It leaves a CPU on which it waits, tries it again now and then, and moves as seldom as that.
func TestPlacement(t *testing.T) {
	for _, tt := range []struct {
		name  string
		cpus  int
		busy  map[int]float64
		on    map[int]float64 // at least this share of a minute on a CPU
		moves int             // at most
	}{
		{"idle CPUs", 2, nil, map[int]float64{0: 1}, 0},
		{"short waits", 2, map[int]float64{0: 0.05}, map[int]float64{0: 1}, 0},
		{"a busy CPU", 2, map[int]float64{0: 0.4}, map[int]float64{1: 0.99}, 20},
		{"a full CPU", 2, map[int]float64{0: 1}, map[int]float64{1: 0.99}, 20},
		{"the other one", 2, map[int]float64{1: 1}, map[int]float64{0: 1}, 0},
		{"two of four", 4, map[int]float64{0: 0.5, 1: 0.5}, map[int]float64{2: 0.98}, 40},
		{"one busier than the other", 2, map[int]float64{0: 1, 1: 0.2}, map[int]float64{1: 0.7}, 40},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSimulated(tt.cpus, tt.busy)
			s.pass(time.Minute)
			for cpu, share := range tt.on {
				if got := s.spent[cpu].Seconds() / 60; got < share-1e-9 {
					t.Errorf("%.4f of the time on CPU %d, want %.2f: %v, %d moves", got, cpu, share, s.spent, s.moves)
				}
			}
			if s.moves > tt.moves {
				t.Errorf("%d moves, want at most %d", s.moves, tt.moves)
			}
		})
	}
}

// A worker has a real-time priority only while it waits on all of its CPUs: a free one is better.
func TestPriorityOnlyWhereContended(t *testing.T) {
	s := newSimulated(2, map[int]float64{0: 0.5})
	w, _ := boostedAt(1, s.now)
	w.placed = &s.placement
	pass := func(d time.Duration) (raised bool) {
		for range d / time.Millisecond {
			s.pass(time.Millisecond)
			w.account(s.now, false)
			raised = raised || w.raised
		}
		return raised
	}
	if pass(30 * time.Second) {
		t.Error("raised, although a CPU is free")
	}
	s.busy[1] = 0.5
	pass(time.Second)
	if !w.raised {
		t.Error("not raised, although all CPUs are busy")
	}
	s.busy = nil // as they are with the priority
	if pass(5 * time.Second); !w.raised {
		t.Error("the priority does not stay")
	}
	if pass(40 * time.Second); w.raised {
		t.Error("still raised, although the CPUs are free")
	}
}

// When the others leave the CPU, the thread may use it again.
func TestPlacementReturns(t *testing.T) {
	s := newSimulated(2, map[int]float64{0: 0.5})
	s.pass(time.Second)
	if s.cpu != 1 {
		t.Fatalf("on CPU %d, want 1", s.cpu)
	}
	s.busy = nil
	s.pass(30 * time.Second)
	if s.cpu != 0 || s.set.Count() != 2 {
		t.Errorf("on CPU %d of %v", s.cpu, cpuNumbers(&s.set))
	}
}

// What it cannot read or change leaves the thread where it is; and CPUs that someone else has set are those that it may use.
func TestPlacementLeavesAlone(t *testing.T) {
	s := newSimulated(2, map[int]float64{0: 1})
	s.refused = unix.EPERM
	s.pass(time.Second)
	if s.set.Count() != 2 {
		t.Errorf("refused: %v", cpuNumbers(&s.set))
	}
	s.refused, s.gone = nil, unix.ENOSYS
	s.pass(time.Second)
	if s.moves != 0 {
		t.Errorf("moved without knowing its CPU")
	}
	s = newSimulated(4, map[int]float64{0: 1, 2: 1})
	s.is = func(set *unix.CPUSet) error { set.Zero(); set.Set(2); set.Set(3); return nil }
	s.pass(30 * time.Millisecond)
	if got := cpuNumbers(&s.set); !slices.Equal(got, []int{2, 3}) || s.moves != 0 {
		t.Fatalf("uses %v, want 2 and 3", got)
	}
	s.is = func(set *unix.CPUSet) error { *set = s.set; return nil }
	s.cpu = 2
	s.pass(time.Second)
	if got := cpuNumbers(&s.set); !slices.Equal(got, []int{3}) {
		t.Errorf("uses %v, want 3", got)
	}
	for _, text := range []string{"", "1 2\n", "1 x 3\n", "1 2 3 4\n", "0 0 0\n"} {
		s.stat = strings.NewReader(text)
		if s.read() {
			t.Errorf("schedstat %q is taken", text)
		}
	}
	s.stat = failing{}
	if s.read() {
		t.Error("statistics are read that cannot be")
	}
	var none *placement
	none.look(time.Now())
	none.leave()
}

type failing struct{}

func (failing) ReadAt([]byte, int64) (int, error) { return 0, errors.New("gone") }

// requirePlacement skips a test where threads have one CPU, or the kernel does not count their waits.
func requirePlacement(t *testing.T) {
	t.Helper()
	if len(labtest.CPUs()) < 2 {
		labtest.Lacking(t, "needs two CPUs")
	}
	stat, err := os.ReadFile("/proc/self/schedstat")
	labtest.NeedsKernel(t, err == nil && !strings.HasPrefix(string(stat), "0 0 0"), "scheduler statistics", "CONFIG_SCHED_INFO")
}

// hog keeps a CPU busy until it is to stop.
func hog(n int, stop *atomic.Bool) {
	runtime.LockOSThread() // the thread ends with the goroutine
	labtest.PinThread(n)
	for !stop.Load() {
	}
}

// A thread that waits for others gives up the CPU on which it does, and has all of its CPUs back afterwards.
func TestPlacementOfThread(t *testing.T) {
	requirePlacement(t)
	var stop atomic.Bool
	var hogs sync.WaitGroup
	defer hogs.Wait()
	defer stop.Store(true)
	done := make(chan error, 1)
	for n := range 2 {
		hogs.Go(func() { hog(n, &stop) })
	}
	first, second := labtest.CPUs()[0], labtest.CPUs()[1]
	go func() {
		runtime.LockOSThread()
		var before, is unix.CPUSet
		before.Set(first)
		before.Set(second)
		if err := unix.SchedSetaffinity(0, &before); err != nil {
			done <- err
			return
		}
		p := place(slog.New(slog.DiscardHandler))
		if p == nil {
			done <- errors.New("it is not placed")
			return
		}
		p.on = func() (int, error) { return second, nil } // whichever it was: the scheduler moves it
		for p.set == before {                             // never asleep: woken threads may get a CPU at once
			p.look(time.Now())
		}
		err := unix.SchedGetaffinity(0, &is)
		if got := cpuNumbers(&is); err != nil || !slices.Equal(got, []int{first}) {
			err = fmt.Errorf("it may use %v, %v", got, err)
		}
		p.leave()
		err = errors.Join(err, unix.SchedGetaffinity(0, &is))
		if is != before {
			err = errors.Join(err, fmt.Errorf("it may use %v afterwards", cpuNumbers(&is)))
		}
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(labtest.Timeout):
		t.Fatal("it has not moved")
	}
}

// currentCPU is that to which the thread is pinned.
func TestCurrentCPU(t *testing.T) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		for _, want := range labtest.CPUs() {
			var set unix.CPUSet
			set.Set(want)
			if err := unix.SchedSetaffinity(0, &set); err != nil {
				t.Error(err)
			}
			if cpu, err := currentCPU(); cpu != want || err != nil {
				t.Errorf("on CPU %d, %v, want %d", cpu, err, want)
			}
		}
	}()
	<-done
}

// Workers of both paths are placed if wanted, and those pinned by the user are not.
func TestPlacedWorkers(t *testing.T) {
	requirePlacement(t)
	open := func() (files int) {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if target, _ := os.Readlink("/proc/self/fd/" + e.Name()); strings.HasSuffix(target, "/schedstat") {
				files++
			}
		}
		return files
	}
	forwards := func(t *testing.T, placed int, end func()) {
		t.Helper()
		labtest.Eventually(t, fmt.Sprintf("%d workers are placed", placed), func() bool { return open() == placed })
		end()
		labtest.Eventually(t, "none is left", func() bool { return open() == 0 })
	}
	b := newXDPBench(t, 1, 2, 0)
	for name, opts := range map[string]AFXDPOptions{"afxdp": {Place: true}, "afxdp, pinned": {Place: true, CPUs: labtest.CPUs()[:1]}, "afxdp, not wanted": {}} {
		t.Run(name, func(t *testing.T) {
			b.openWith(t, opts)
			b.sync(t, xdpRule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.2.2.1", 6000)))
			placed := 0
			if opts.Place && len(opts.CPUs) == 0 {
				placed = 2
			}
			forwards(t, placed, func() { b.sync(t) })
		})
	}
	n := newBench(t, 1)
	for name, place := range map[string]bool{"fanout": true, "fanout, not wanted": false} {
		t.Run(name, func(t *testing.T) {
			f := n.path(t, FanoutOptions{Workers: 3, Place: place})
			n.sync(t, f, rule("r", n.in, "239.1.1.1", 5000, sendTo(n.out[0], "239.9.9.1", 6000)))
			placed := 0
			if place {
				placed = 3
			}
			forwards(t, placed, func() { n.sync(t, f) })
		})
	}
}

// waitsOnFirst is a function to place a worker that has waited for its first CPU whenever it looks. The CPUs that it
// then chooses are sent.
func waitsOnFirst() (place func(*slog.Logger) *placement, chosen <-chan []int) {
	c := make(chan []int, 1)
	return func(*slog.Logger) *placement {
		s := newSimulated(2, nil)
		s.stat = waiting{s}
		s.apply = func(set *unix.CPUSet) error {
			select {
			case c <- cpuNumbers(set):
			default:
			}
			return nil
		}
		return &s.placement
	}, c
}

// waiting is the schedstat of a simulated thread that has waited since it was last read.
type waiting struct{ *simulated }

func (w waiting) ReadAt(b []byte, at int64) (int, error) {
	w.turns++
	w.waited += fewWaits + shortWait
	return w.simulated.ReadAt(b, at)
}

// Workers of both paths look whether they wait for their CPU, and leave it: those that sleep between their turns, and
// those that never do.
func TestWorkersLook(t *testing.T) {
	leaves := func(t *testing.T, chosen <-chan []int) {
		t.Helper()
		select {
		case got := <-chosen:
			if !slices.Equal(got, []int{1}) {
				t.Errorf("the worker chose CPUs %v, want 1, on which it does not wait", got)
			}
		case <-time.After(labtest.Timeout):
			t.Error("the worker does not look")
		}
	}
	b := newXDPBench(t, 1, 1, 0)
	for name, spin := range map[string]time.Duration{"afxdp": 0, "afxdp, never asleep": time.Hour} {
		t.Run(name, func(t *testing.T) {
			b.openWith(t, AFXDPOptions{Place: true, Spin: spin})
			defer b.sync(t) // without rules
			place, chosen := waitsOnFirst()
			b.path.place = place
			b.sync(t, xdpRule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.2.2.1", 6000)))
			leaves(t, chosen)
		})
	}
	t.Run("fanout", func(t *testing.T) {
		n := newBench(t, 1)
		place, chosen := waitsOnFirst()
		f := n.pathWith(t, FanoutOptions{Workers: 1, Place: true}, func(s *fanoutSystem) { s.place = place })
		n.sync(t, f, rule("r", n.in, "239.1.1.1", 5000, sendTo(n.out[0], "239.9.9.1", 6000)))
		sendFrames(t, openSender(t, n.source, iface(t, n.source, "eth0").Index), [][]byte{numbered(0, 0).Build()})
		leaves(t, chosen)
	})
}
