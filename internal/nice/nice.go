// Package nice runs functions on threads of low priority, beside threads that must not wait for a CPU.
package nice

import (
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Increment is added to the nice value of the calling process (setpriority(2)). Five steps are a weight of 335 instead of
// 1024 (sched_prio_to_weight of kernel/sched/core.c): another thread gets three quarters of the CPU if it needs
// them, and the function takes at most three times as long, however much else runs: so it needs no limit. 10
// steps, 19, or SCHED_IDLE make that 9, 68, or 341 times.
const Increment = 5

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
