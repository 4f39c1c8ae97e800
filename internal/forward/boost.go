package forward

import (
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// boostPriority is the lowest real-time priority of SCHED_FIFO.
	boostPriority = 1
	// boostCredit bounds the time for which an idle worker has saved: it then runs at most twice as
	// long without a pause, 4 ms, which is a slice of the default scheduler.
	boostCredit = 2 * time.Millisecond
)

// Boost gives workers the lowest real-time priority (SCHED_FIFO) while they need little time, so that a woken worker runs
// at once whatever else wants its CPU. A worker with a placement gets it only while it waits on all of its CPUs. All of them together use at most half of each CPU that
// way. A worker that needs more competes like any other thread until it has saved enough again, so nothing is starved.
//
// Its methods may be called from any goroutine. Workers of several paths share one.
type Boost struct {
	cpus int

	mu     sync.Mutex
	pinned map[int]int // workers by the CPU that they are pinned to
	free   int         // all others
	// sharing is the number of workers that meet on the CPU that has most.
	sharing atomic.Int64
}

// AllowBoost raises the process's limit RLIMIT_RTPRIO to what a Boost needs, if it is lower: without
// CAP_SYS_NICE workers need it. If the hard limit is lower, too, this needs CAP_SYS_RESOURCE.
func AllowBoost() error {
	var limit unix.Rlimit
	if err := unix.Prlimit(0, unix.RLIMIT_RTPRIO, nil, &limit); err != nil {
		return fmt.Errorf("read the limit RLIMIT_RTPRIO: %w", err)
	}
	if limit.Cur >= boostPriority {
		return nil
	}
	limit.Cur, limit.Max = boostPriority, max(limit.Max, boostPriority)
	if err := unix.Prlimit(0, unix.RLIMIT_RTPRIO, &limit, nil); err != nil {
		return fmt.Errorf("raise the limit RLIMIT_RTPRIO to %d: %w", boostPriority, err)
	}
	return nil
}

// NewBoost returns a [*PriorityError] if the process may not use a real-time priority.
func NewBoost() (*Boost, error) {
	if err := CheckPriority(boostPriority); err != nil {
		return nil, err
	}
	var allowed unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		return nil, fmt.Errorf("read the CPUs of the process: %w", err)
	}
	return &Boost{cpus: max(allowed.Count(), 1), pinned: map[int]int{}}, nil
}

// count adds n workers that are pinned to a CPU, -1 for none.
func (b *Boost) count(cpu, n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if cpu < 0 {
		b.free += n
	} else {
		b.pinned[cpu] += n
	}
	most := 0
	for _, workers := range b.pinned {
		most = max(most, workers)
	}
	b.sharing.Store(int64(max(most+(b.free+b.cpus-1)/b.cpus, 1)))
}

// boosted is a worker's part of a Boost. It belongs to the worker's thread; nil is a worker without one.
type boosted struct {
	boost  *Boost
	cpu    int
	placed *placement // nil: none
	log    *slog.Logger
	apply  func(*unix.SchedAttr) error // to the calling thread
	normal unix.SchedAttr              // without the priority
	raised bool
	failed bool
	credit time.Duration // at the priority that it has saved
	at     time.Time     // of the last account
}

// join makes the calling thread, to which its goroutine must be locked for ever, one of the workers. One to which
// someone has given another scheduler is left alone. The placement may be nil.
func (b *Boost) join(cpu int, placed *placement, log *slog.Logger) *boosted {
	if b == nil {
		return nil
	}
	attr, err := unix.SchedGetAttr(0, 0)
	if err != nil || attr.Policy != unix.SCHED_NORMAL {
		return nil
	}
	b.count(cpu, 1)
	w := &boosted{
		boost: b, cpu: cpu, placed: placed, log: log, at: time.Now(), credit: boostCredit,
		apply: func(attr *unix.SchedAttr) error { return unix.SchedSetAttr(0, attr, 0) },
		// The kernel takes the flag back only from those with CAP_SYS_NICE.
		normal: unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL, Flags: unix.SCHED_FLAG_RESET_ON_FORK, Nice: attr.Nice},
	}
	w.account(w.at, false)
	return w
}

// leave ends it, before the thread's goroutine ends: see clearPriority.
func (w *boosted) leave() {
	if w != nil {
		w.set(false)
		w.boost.count(w.cpu, -1)
	}
}

// account says that the worker ran, or slept, from the last call until now.
func (w *boosted) account(now time.Time, ran bool) {
	if w == nil || w.failed {
		return
	}
	elapsed := now.Sub(w.at)
	w.at = now
	w.credit += elapsed / time.Duration(2*w.boost.sharing.Load())
	if ran && w.raised {
		w.credit -= elapsed
	}
	w.credit = min(w.credit, boostCredit)
	needed := w.placed.contended()
	switch {
	case w.raised && (w.credit <= 0 || !needed):
		w.set(false)
	case !w.raised && needed && w.credit >= boostCredit/2: // not for each few microseconds
		w.set(true)
	}
}

func (w *boosted) set(raised bool) {
	if raised == w.raised {
		return
	}
	attr := w.normal
	if raised {
		attr = realTimeAttr(boostPriority)
	} else if now, err := unix.Getpriority(unix.PRIO_PROCESS, 0); err == nil { // of the thread
		attr.Nice = int32(20 - now) // somebody may have changed it meanwhile: renice(1)
	}
	if err := w.apply(&attr); err != nil {
		w.log.Warn("worker has no real-time priority any more", "error", &PriorityError{boostPriority, err})
		w.failed = true
		return
	}
	w.raised = raised
}
