// Package nice runs functions on threads of low priority, beside threads that must not wait for a CPU.
package nice

import (
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Increment is added to the nice value of the calling process (setpriority(2)). On a CPU that another
// thread keeps busy, each step takes a fifth of the time left: ten leave a tenth. SCHED_IDLE, or 19
// steps, would leave 0.3% or 1.5%, which is for ever where workers poll on every CPU.
const Increment = 10

// Do calls do on a thread of its own and of low priority, and returns when do has. The priority ends
// with the thread: to raise it again would take CAP_SYS_NICE. The runtime starts no thread from a thread to
// which a goroutine is locked, so no other inherits the priority.
//
// The thread is in the network namespace of the process, which may not be that of the caller's thread. If
// the kernel refuses the priority, do runs without.
func Do(do func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			// The first thread stays for ever, and shows its nice value as the process's. While it waits
			// here, the function gets another.
			defer runtime.UnlockOSThread()
			Do(do)
			return
		}
		_ = lower() // only that do is in others' way
		do()
	}()
	<-done
}

// lower adds Increment to the calling thread's nice value, at most up to 19.
func lower() error {
	const thisThread, most = 0, 19
	now, err := unix.Getpriority(unix.PRIO_PROCESS, thisThread) // 20 - nice: getpriority(2), "C library/kernel differences"
	if err != nil {
		return err
	}
	return unix.Setpriority(unix.PRIO_PROCESS, thisThread, min(20-now+Increment, most))
}
