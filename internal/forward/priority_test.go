package forward

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
)

// realTime returns the priorities of the threads of this process that have a real-time one.
func realTime(t *testing.T) (priorities []uint32) {
	t.Helper()
	threads, err := filepath.Glob("/proc/self/task/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range threads {
		tid, err := strconv.Atoi(filepath.Base(name))
		if err != nil {
			t.Fatal(err)
		}
		attr, err := unix.SchedGetAttr(tid, 0)
		if err == nil && attr.Policy == unix.SCHED_FIFO { // a thread may end meanwhile
			priorities = append(priorities, attr.Priority)
		}
	}
	return priorities
}

// workersHave starts workers of each path: each of them gets a real-time priority, no other thread has one, and none
// keeps it when they have ended, which ended then looks at.
func workersHave(t *testing.T, priority uint32, afxdp AFXDPOptions, fanout FanoutOptions, ended func(t *testing.T)) {
	t.Helper()
	forwards := func(t *testing.T, workers int, end func()) {
		t.Helper()
		labtest.Eventually(t, "each worker has the priority", func() bool {
			all := realTime(t)
			if len(all) > workers || slices.ContainsFunc(all, func(p uint32) bool { return p != priority }) {
				t.Fatalf("threads have the real-time priorities %v, want %d times %d", all, workers, priority)
			}
			return len(all) == workers
		})
		end()
		labtest.Eventually(t, "no thread has one", func() bool { return len(realTime(t)) == 0 })
		ended(t)
	}
	t.Run("afxdp", func(t *testing.T) {
		b := newXDPBench(t, 1, 2, 0)
		b.openWith(t, afxdp)
		b.sync(t, xdpRule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.2.2.1", 6000)))
		forwards(t, 2, func() { b.sync(t) })
	})
	t.Run("fanout", func(t *testing.T) {
		n := newBench(t, 1)
		fanout.Workers = 3
		f := n.path(t, fanout)
		n.sync(t, f, rule("r", n.in, "239.1.1.1", 5000, sendTo(n.out[0], "239.9.9.1", 6000)))
		forwards(t, fanout.Workers, func() { n.sync(t, f) })
	})
}

func TestPriority(t *testing.T) {
	const priority = 7
	if err := CheckPriority(priority); err != nil {
		var refused *PriorityError
		if !errors.As(err, &refused) || !errors.Is(err, unix.EPERM) {
			t.Fatal(err)
		}
		labtest.Lacking(t, err.Error())
	}
	workersHave(t, priority, AFXDPOptions{Priority: priority}, FanoutOptions{Priority: priority}, func(*testing.T) {})
}

// Without the permission the error says what is missing.
func TestPriorityRefused(t *testing.T) {
	if err := CheckPriority(0); err != nil {
		t.Error(err)
	}
	var wrong *PriorityError
	if err := CheckPriority(MaxPriority + 1); !errors.As(err, &wrong) || !errors.Is(err, unix.EINVAL) {
		t.Errorf("%v, want EINVAL", err)
	}
	err := &PriorityError{5, os.NewSyscallError("sched_setattr", unix.EPERM)}
	if want := "real-time priority 5 is not permitted: want CAP_SYS_NICE, or a limit RLIMIT_RTPRIO of at least 5"; err.Error() != want {
		t.Errorf("%q, want %q", err, want)
	}
	if _, err := OpenFanout(FanoutOptions{Priority: -1}); err == nil {
		t.Error("the fanout path takes a negative priority")
	}
}

// A thread without CAP_SYS_NICE gets the priorities up to the limit RLIMIT_RTPRIO, and no higher one. Where
// root lacks CAP_SYS_RESOURCE, to raise the limit, it is what it was, which may be 0; the machines of
// make test-kernels have it.
func TestPriorityByLimit(t *testing.T) {
	labtest.RequireRoot(t)
	most := 5
	var before unix.Rlimit
	err := unix.Prlimit(0, unix.RLIMIT_RTPRIO, &unix.Rlimit{Cur: uint64(most), Max: uint64(most)}, &before)
	if errors.Is(err, unix.EPERM) && !labtest.Emulated() {
		err = unix.Prlimit(0, unix.RLIMIT_RTPRIO, nil, &before)
		most = int(min(before.Max, MaxPriority-1))
		if err == nil {
			err = unix.Prlimit(0, unix.RLIMIT_RTPRIO, &unix.Rlimit{Cur: uint64(most), Max: before.Max}, nil)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Prlimit(0, unix.RLIMIT_RTPRIO, &before, nil)
	errs := make(chan error, 2)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine, and what it has dropped with it
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var caps [2]unix.CapUserData
		err := unix.Capget(&header, &caps[0])
		caps[0].Effective &^= 1 << unix.CAP_SYS_NICE
		caps[0].Permitted &^= 1 << unix.CAP_SYS_NICE
		if err = errors.Join(err, unix.Capset(&header, &caps[0])); err != nil {
			errs <- err
			errs <- err
			return
		}
		errs <- setPriority(most)
		errs <- setPriority(most + 1)
	}()
	if err := <-errs; err != nil {
		t.Errorf("up to the limit: %v", err)
	}
	if err := <-errs; !errors.Is(err, unix.EPERM) {
		t.Errorf("above the limit: %v, want EPERM", err)
	}
}
