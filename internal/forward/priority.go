package forward

import (
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// MaxPriority is the highest real-time priority of SCHED_FIFO (sched(7)).
const MaxPriority = 99

// PriorityError is a real-time priority that the kernel does not allow. It wraps the cause.
type PriorityError struct {
	Priority int
	Err      error
}

func (e *PriorityError) Error() string {
	if errors.Is(e.Err, unix.EPERM) {
		return fmt.Sprintf("real-time priority %d is not permitted: want CAP_SYS_NICE, or a limit RLIMIT_RTPRIO of at least %d", e.Priority, e.Priority)
	}
	return fmt.Sprintf("real-time priority %d: %v", e.Priority, e.Err)
}

func (e *PriorityError) Unwrap() error { return e.Err }

// CheckPriority says whether workers can have a real-time priority, 0 for none. An error is a
// [*PriorityError].
func CheckPriority(priority int) error {
	if priority == 0 {
		return nil
	}
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		err := setPriority(priority)
		clearPriority()
		result <- err
	}()
	return <-result
}

// setPriority gives the calling thread, to which its goroutine must be locked for ever, a real-time
// priority; 0 changes nothing. Threads and processes started from it do not inherit it.
func setPriority(priority int) error {
	if priority == 0 {
		return nil
	}
	attr := realTimeAttr(priority)
	if err := unix.SchedSetAttr(0, &attr, 0); err != nil {
		return &PriorityError{priority, err}
	}
	return nil
}

func realTimeAttr(priority int) unix.SchedAttr {
	return unix.SchedAttr{
		Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Flags: unix.SCHED_FLAG_RESET_ON_FORK, Priority: uint32(priority),
	}
}

// clearPriority takes the calling thread's real-time priority away, before its goroutine ends: the thread may
// outlive it by a moment, and the process's first thread stays for ever.
func clearPriority() {
	// Clearing the flag would take CAP_SYS_NICE.
	attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL, Flags: unix.SCHED_FLAG_RESET_ON_FORK}
	_ = unix.SchedSetAttr(0, &attr, 0) // to give a priority up is always allowed
}
