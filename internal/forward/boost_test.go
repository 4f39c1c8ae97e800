package forward

import (
	"errors"
	"log/slog"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
)

// boostedAt is a worker of a Boost with so many others on its CPU, and what its thread would have got.
func boostedAt(sharing int, start time.Time) (w *boosted, changes *int) {
	b := &Boost{cpus: 1, pinned: map[int]int{}}
	for range sharing {
		b.count(-1, 1)
	}
	changes = new(int)
	return &boosted{
		boost: b, cpu: -1, log: slog.New(slog.DiscardHandler), at: start, credit: boostCredit,
		apply: func(*unix.SchedAttr) error { *changes++; return nil },
	}, changes
}

// However a worker's time is divided, its share at the priority is bounded, and one that needs less than that keeps it.
func TestBoostShare(t *testing.T) {
	for _, tt := range []struct {
		name        string
		sharing     int
		run, sleep  time.Duration
		share       float64       // at most, of the time
		longest     time.Duration // without a pause
		always      bool          // whenever it runs
		mostChanges int
	}{
		{"one packet in a while", 1, 5 * time.Microsecond, 50 * time.Microsecond, 0.1, 5 * time.Microsecond, true, 1},
		{"a burst in a while", 1, time.Millisecond, 9 * time.Millisecond, 0.11, time.Millisecond, true, 1},
		{"a third of a CPU", 1, 100 * time.Microsecond, 200 * time.Microsecond, 0.34, 100 * time.Microsecond, true, 1},
		{"a whole CPU", 1, 60 * time.Microsecond, 0, 0.51, 4100 * time.Microsecond, false, 600},
		{"a whole CPU in long turns", 1, 10 * time.Millisecond, 0, 0.51, 10 * time.Millisecond, false, 200},
		{"nine tenths of a CPU", 1, 90 * time.Microsecond, 10 * time.Microsecond, 0.51, 4500 * time.Microsecond, false, 600},
		{"a whole CPU, with three others", 4, 60 * time.Microsecond, 0, 0.13, 2400 * time.Microsecond, false, 600},
	} {
		t.Run(tt.name, func(t *testing.T) {
			start := time.Now()
			w, changes := boostedAt(tt.sharing, start)
			w.account(start, false)
			var raised, row, longest time.Duration
			ran, now := time.Duration(0), start
			for now.Sub(start) < time.Second {
				was := w.raised
				now = now.Add(tt.run)
				w.account(now, true)
				ran += tt.run
				if was {
					raised += tt.run
					row += tt.run
					longest = max(longest, row)
				}
				if !w.raised || tt.sleep > 0 {
					row = 0
				}
				if tt.sleep > 0 {
					now = now.Add(tt.sleep)
					w.account(now, false)
				}
			}
			if share := raised.Seconds() / now.Sub(start).Seconds(); share > tt.share {
				t.Errorf("%.3f of the time at the priority, want at most %.3f", share, tt.share)
			}
			if tt.sleep == 0 && longest > tt.longest {
				t.Errorf("%v without a pause, want at most %v", longest, tt.longest)
			}
			if tt.always && raised != ran {
				t.Errorf("%v of %v at the priority, want all", raised, ran)
			}
			if raised == 0 || *changes > tt.mostChanges {
				t.Errorf("%v at the priority, %d changes, want at most %d", raised, *changes, tt.mostChanges)
			}
		})
	}
}

// Workers pinned to one CPU share its half, and so do those that only have a few CPUs.
func TestBoostCount(t *testing.T) {
	b := &Boost{cpus: 4, pinned: map[int]int{}}
	for _, tt := range []struct {
		cpu, n int
		want   int64
	}{
		{-1, 1, 1}, {-1, 1, 1}, {-1, 2, 1}, {-1, 1, 2}, {2, 1, 3}, {3, 1, 3}, {3, 1, 4}, {-1, -1, 3}, {3, -2, 2}, {2, -1, 1}, {-1, -4, 1},
	} {
		if b.count(tt.cpu, tt.n); b.sharing.Load() != tt.want {
			t.Errorf("after %d on CPU %d: %d share one, want %d", tt.n, tt.cpu, b.sharing.Load(), tt.want)
		}
	}
}

// A worker that may not have the priority any more says so once, and goes on without.
func TestBoostRefused(t *testing.T) {
	start := time.Now()
	w, _ := boostedAt(1, start)
	tries := 0
	w.apply = func(*unix.SchedAttr) error { tries++; return unix.EPERM }
	for i := range 5 {
		w.account(start.Add(time.Duration(i)*time.Millisecond), false)
	}
	if tries != 1 || w.raised {
		t.Errorf("%d tries, raised %v", tries, w.raised)
	}
	w.leave()
	var none *boosted
	none.account(start, true)
	none.leave()
}

func requireBoost(t *testing.T) *Boost {
	t.Helper()
	b, err := NewBoost()
	if err != nil {
		var refused *PriorityError
		if !errors.As(err, &refused) || !errors.Is(err, unix.EPERM) {
			t.Fatal(err)
		}
		labtest.Lacking(t, err.Error())
	}
	return b
}

// Idle workers have the priority.
func TestBoostWorkers(t *testing.T) {
	boost := requireBoost(t)
	workersHave(t, boostPriority, AFXDPOptions{Boost: boost}, FanoutOptions{Boost: boost}, func(t *testing.T) {
		if n := boost.sharing.Load(); n != 1 || boost.free != 0 {
			t.Errorf("%d workers are left, %d share a CPU", boost.free, n)
		}
	})
}

// Without the priority a thread has the niceness that it had, and one with another scheduler is left alone.
func TestBoostKeepsScheduling(t *testing.T) {
	boost := requireBoost(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // the thread ends with the goroutine
		log := slog.New(slog.DiscardHandler)
		set := func(attr unix.SchedAttr) {
			attr.Size = unix.SizeofSchedAttr
			if err := unix.SchedSetAttr(0, &attr, 0); err != nil {
				t.Error(err)
			}
		}
		is := func(policy uint32, nice int32, priority uint32) {
			t.Helper()
			attr, err := unix.SchedGetAttr(0, 0)
			if err != nil || attr.Policy != policy || attr.Nice != nice || attr.Priority != priority {
				t.Errorf("%+v, %v, want policy %d, nice %d, priority %d", attr, err, policy, nice, priority)
			}
		}
		set(unix.SchedAttr{Policy: unix.SCHED_NORMAL, Nice: 5})
		w := boost.join(-1, nil, log)
		w.account(time.Now(), false)
		is(unix.SCHED_FIFO, 0, boostPriority)
		w.account(w.at.Add(4*boostCredit), true)
		is(unix.SCHED_NORMAL, 5, 0)
		w.account(w.at.Add(4*boostCredit), true)
		is(unix.SCHED_FIFO, 0, boostPriority)
		if err := unix.Setpriority(unix.PRIO_PROCESS, 0, 7); err != nil {
			t.Error(err)
		}
		w.leave()
		is(unix.SCHED_NORMAL, 7, 0)
		set(unix.SchedAttr{Policy: unix.SCHED_BATCH, Nice: 7, Flags: unix.SCHED_FLAG_RESET_ON_FORK})
		if w := boost.join(-1, nil, log); w != nil {
			t.Error("a worker of SCHED_BATCH joins")
		}
	}()
	<-done
}
