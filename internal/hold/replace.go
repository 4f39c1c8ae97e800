package hold

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/notify"
)

// Replacement describes the replacement of a process.
type Replacement struct {
	// Command is the program and its arguments, and Env its environment.
	Command, Env []string
	// Files are passed to it.
	Files []notify.File
	// Self is a program whose main calls notify.Stage and Copy; empty: this one.
	Self string
	// Stderr is the standard error of both; nil: os.Stderr.
	Stderr *os.File
	// Outer is the manager of this process, and of the other one afterwards; nil: there is none.
	Outer *notify.Manager
	// Timeout is how long it may take until it is ready.
	Timeout time.Duration
	// Ambient are the capabilities that the process needs but does not get as root.
	Ambient []uintptr
	// Stop is called with the argument of AskToStop in the other process, and with "" when that is
	// ready.
	Stop func(what string) error
	// Beat is called several times a second, in place of the paused loop's heartbeat; nil: not
	// called.
	Beat func()
	Log  *slog.Logger
}

// stopVariable is the notification with which a process asks its predecessor to stop something.
const stopVariable = "X_XDPCAST_STOP="

// AskToStop asks this process's predecessor to stop something, and waits until it has.
func AskToStop(m *notify.Manager, what string, patience time.Duration) error {
	return m.Ask(stopVariable+what, patience)
}

// replacing is the state of one Replace.
type replacing struct {
	Replacement
	pid    int
	stderr *stderrCopy
	stored []notify.Message // for the manager, once the process is ready
	status string
	ready  bool
}

// Replace starts a process to replace this one, and returns when it is ready. By then the manager
// knows about it, and has the descriptors it wants kept. After an error, which says how the process
// ended, and what it last wrote to standard error unless it has reported a reason, it is gone, and the manager knows nothing of it.
func Replace(ctx context.Context, o Replacement) (pid int, err error) {
	if o.Self == "" {
		o.Self = "/proc/self/exe"
	}
	listener, err := notify.Listen(fmt.Sprintf("@xdpcast-upgrade-%d-%016x", os.Getpid(), rand.Uint64()))
	if err != nil {
		return 0, err
	}
	env := append(notify.WithoutProtocol(o.Env), o.Outer.Variables(listener.Addr(), o.Outer.Max(), true)...)
	if o.Stderr == nil {
		o.Stderr = os.Stderr
	}
	stderr, err := copyStderr(o.Stderr)
	if err != nil {
		return 0, errors.Join(err, listener.Close())
	}
	files := append(slices.Clone(o.Files), notify.File{Name: StderrName, FD: int(o.Stderr.Fd())})
	process, err := notify.Start(o.Self, o.Command, env, files, int(stderr.write.Fd()), o.Ambient)
	if err = errors.Join(err, stderr.started()); err != nil {
		return 0, errors.Join(err, stderr.finish(o.Self, false), listener.Close())
	}
	r := &replacing{Replacement: o, pid: process.Pid, stderr: stderr}
	defer r.close()
	defer func() {
		if failed := stderr.finish(o.Self, err == nil); failed != nil {
			o.Log.Warn("standard error", "error", failed)
		}
	}()
	messages, done := make(chan notify.Message), make(chan struct{})
	received := make(chan struct{})
	defer func() {
		close(done)
		err = errors.Join(err, listener.Close())
		<-received
	}()
	go func() {
		defer close(received)
		receive(listener, messages, done, o.Log)
	}()
	// The exit is seen, but left to be reaped: one that comes after the process has replaced this one,
	// while this one still runs, is for the manager, which gets the zombie when this one ends.
	ended, unmarked := make(chan struct{}), make(chan struct{})
	go func(ended chan struct{}) {
		defer close(ended)
		for errors.Is(unix.Waitid(unix.P_PID, process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil), unix.EINTR) {
		}
	}(ended)
	timeout := time.NewTimer(o.Timeout)
	defer timeout.Stop()
	beats := time.NewTicker(200 * time.Millisecond)
	defer beats.Stop()
	kill := func(why string) error {
		_ = process.Kill() // or it has already ended
		_, _ = process.Wait()
		return r.fail(why)
	}
	for {
		select {
		case <-ended:
			// What it has sent comes first: why it ended, or that it has taken over.
			ended = nil
			go func() {
				if listener.Mark(endMark) != nil { // this process is out of memory, say
					close(unmarked)
				}
			}()
		case m := <-messages:
			if m.PID == os.Getpid() && m.Is(endMark) {
				m.Close()
				return r.ended(process)
			}
			if finished := r.told(&m); finished {
				return r.pid, nil
			}
		case <-unmarked:
			return r.ended(process)
		case <-beats.C:
			if o.Beat != nil {
				o.Beat()
			}
		case <-timeout.C:
			return 0, kill(fmt.Sprintf("was not ready after %v, and was killed", o.Timeout))
		case <-ctx.Done():
			return 0, kill("was killed before it was ready, since this process is to end")
		}
	}
}

// endMark is this process's message to itself once the other one has ended.
const endMark = "X_XDPCAST_ENDED=1"

// ended is called when the process has ended before it has taken over.
func (r *replacing) ended(process *os.Process) (pid int, err error) {
	if r.ready && r.Outer.Managed() {
		// The manager knows it as the main process, and starts the next one once this process has ended,
		// too.
		r.Log.Error("the new process ended right after it was ready", "pid", process.Pid)
		return r.pid, nil
	}
	when := "before"
	if r.ready {
		when = "right after"
	}
	state, _ := process.Wait() // our own child: the state is available
	return 0, r.fail(fmt.Sprintf("ended with %v %s it was ready", state, when))
}

func (r *replacing) fail(how string) error {
	err := fmt.Errorf("the new process %d %s", r.pid, how)
	why := r.status
	if why == "" {
		why = r.stderr.last()
	}
	if why != "" {
		err = fmt.Errorf("%w: %s", err, why)
	}
	return err
}

func (r *replacing) close() {
	for i := range r.stored {
		r.stored[i].Close()
	}
}

// told handles a message, and returns whether the process has taken over.
func (r *replacing) told(m *notify.Message) (finished bool) {
	if m.PID != r.pid {
		m.Close()
		return false
	}
	if text, ok := m.Value("STATUS"); ok {
		r.status = text
	}
	for _, line := range m.Lines {
		if what, ok := strings.CutPrefix(line, stopVariable); ok {
			if err := r.Stop(what); err != nil {
				r.Log.Warn("stop for the new process", "what", what, "error", err)
			}
		}
	}
	switch {
	case m.Is("FDSTORE=1"), m.Is("FDSTOREREMOVE=1"):
		r.stored = append(r.stored, *m)
		return false
	case m.Is(notify.Watchdog):
		r.tell(notify.Watchdog)
	case m.Is(notify.Ready):
		r.ready = true
		if err := r.Stop(""); err != nil {
			r.Log.Warn("end for the new process", "error", err)
		}
		r.commit()
	}
	m.Close() // which answers pending barriers
	return r.ready && m.Is("BARRIER=1")
}

// commit reports the process to the manager, and the descriptors to keep.
func (r *replacing) commit() {
	for i := range r.stored {
		m := &r.stored[i]
		for chunk := m.Files; ; {
			n := min(len(chunk), 200)
			r.tell(strings.Join(m.Lines, "\n"), chunk[:n]...)
			if chunk = chunk[n:]; len(chunk) == 0 {
				break
			}
		}
		m.Close()
	}
	r.stored = nil
	r.tell(fmt.Sprintf("MAINPID=%d\n%s", r.pid, notify.Ready))
	if err := r.Outer.Barrier(); err != nil {
		r.Log.Warn("service manager", "error", err)
	}
}

func (r *replacing) tell(state string, files ...int) {
	if err := r.Outer.Notify(state, files...); err != nil {
		r.Log.Warn("service manager", "error", err)
	}
}

// Watch calls ended when the process that holds this one's descriptors is gone, until stop is
// called. pipe is the descriptor called PipeName; Watch takes ownership.
func Watch(pipe int, ended func()) (stop func(), err error) {
	var wake [2]int
	if err := unix.Pipe2(wake[:], unix.O_CLOEXEC); err != nil {
		return nil, errors.Join(fmt.Errorf("pipe: %w", err), unix.Close(pipe))
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		fds := []unix.PollFd{{Fd: int32(pipe), Events: unix.POLLIN}, {Fd: int32(wake[0]), Events: unix.POLLIN}}
		for {
			_, err := unix.Poll(fds, -1)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err == nil && fds[1].Revents == 0 {
				ended()
			}
			break
		}
		_, _ = unix.Close(pipe), unix.Close(wake[0])
	}()
	return func() {
		_ = unix.Close(wake[1])
		<-done
	}, nil
}
