package labtest

import (
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// OnOneCPU runs fn on a thread of its own that uses one CPU, and waits for its end. What one CPU sends stays in order
// on its way through veths; frames of a sender that the scheduler moves to another CPU may overtake earlier ones. Tests
// of one process use the same CPU. fn may end the test, although it runs on another goroutine.
func OnOneCPU(fn func()) {
	ended, returned := make(chan struct{}), false
	go func() {
		defer close(ended)
		runtime.LockOSThread() // the thread ends with the goroutine
		if cpus := CPUs(); len(cpus) > 0 {
			var one unix.CPUSet
			one.Set(cpus[os.Getpid()%len(cpus)]) // processes beside each other use different ones
			_ = unix.SchedSetaffinity(0, &one)   // best effort
		}
		fn()
		returned = true
	}()
	<-ended
	if !returned {
		runtime.Goexit()
	}
}

// PinThread pins the calling thread to the nth CPU that the process may use, counted on from the first. The caller has
// locked its goroutine to the thread.
func PinThread(n int) {
	if cpus := CPUs(); len(cpus) > 0 {
		var one unix.CPUSet
		one.Set(cpus[n%len(cpus)])
		_ = unix.SchedSetaffinity(0, &one) // best effort
	}
}

// CPUs are the numbers of the CPUs that the process may use, which need not begin with 0.
func CPUs() (numbers []int) {
	var allowed unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		return nil
	}
	for cpu := range 64 * len(allowed) {
		if allowed.IsSet(cpu) {
			numbers = append(numbers, cpu)
		}
	}
	return numbers
}

// CPUTime is what the process has used, which a busy machine does not prolong as it does the time of the clock.
func CPUTime(t testing.TB) time.Duration {
	t.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
