// Package hold supervises one process and keeps file descriptors for it across restarts, as systemd
// does for a service: for other supervisors, or none. The process uses sd_notify(3) and
// sd_listen_fds(3), as with systemd.
package hold

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/notify"
)

// Options of Run.
type Options struct {
	// Command is the program and its arguments.
	Command []string
	// Socket is where the process sends its notifications.
	Socket string
	// Max is the maximum number of kept descriptors.
	Max int
	// Alone starts no standby: see Standby.
	Alone bool
	// Self is a program whose main calls notify.Stage; empty: this one.
	Self string
	// Outer is the manager of this process, which is informed of the process's state; nil: none.
	Outer *notify.Manager
	Log   *slog.Logger
	// Signals are passed on, SIGINT as SIGTERM. Both also end Run, with the process; see RestartsOnTerm.
	Signals <-chan os.Signal
}

// RestartVariable is set for a process whose holder knows RestartsOnTerm.
const RestartVariable = "XDPCAST_HOLD_RESTART"

// RestartsOnTerm is the notification by which a process says that SIGTERM is for it alone: its holder would start it
// again, so that it replaces itself instead. The holder ends it by SIGINT, and any other process by SIGTERM, as
// supervisors do.
const RestartsOnTerm = termVariable + "restart"

const termVariable = "X_XDPCAST_TERM="

// PipeName is the name of the read end of a pipe that is closed when nothing holds the process's
// descriptors any more.
const PipeName = "holder"

// Restart delays: a process that ran for calm is restarted at once, one that ends sooner after
// firstPause and then after twice as long each time, up to lastPause.
const (
	firstPause = 100 * time.Millisecond
	lastPause  = 10 * time.Second
	calm       = 2 * time.Second
)

// holder is the state of one Run.
type holder struct {
	Options
	store    *Store
	listener *notify.Listener
	pipe     [2]int // read end for the process, write end kept open here

	messages chan notify.Message
	deaths   chan death
	fallen   chan int      // processes whose Life has ended
	marks    chan error    // outcome of each Mark
	children chan struct{} // notified when there is one
	stop     chan struct{}

	main    int // the process; 0: not running
	started time.Time
	ready   bool          // it was, at least once
	byInt   bool          // it has sent RestartsOnTerm
	ending  bool          // it was told to end
	dead    []death       // main processes whose last messages are being read
	pause   time.Duration // before the next start

	wants   bool             // a standby, for main
	program os.FileInfo      // the file that main runs, if it wants one; nil: unknown
	unwatch func()           // ends the watch of main's Life; nil: there is none
	standby *standby         // nil: none
	killed  map[int]bool     // standbys that are not reaped yet
	due     <-chan time.Time // when it is started
	dying   int              // the process that the standby has replaced; 0: it is reaped
	heir    *standby         // that standby, until it is
}

// death is the exit of a child, also of an adopted one, or the end of its Life, which comes before.
type death struct {
	pid    int
	status unix.WaitStatus
	dying  bool
}

// Run starts the process, and restarts it whenever it ends, with its kept descriptors, until a
// signal ends it, or the process ends before it was ever ready. It returns the process's exit code,
// and closes the descriptors.
//
// Run reaps every child of this process. MAINPID makes another child the main process.
func Run(o Options) (code int, err error) {
	if o.Self == "" {
		o.Self = "/proc/self/exe"
	}
	h := &holder{Options: o, store: NewStore(o.Max), killed: map[int]bool{}, messages: make(chan notify.Message), deaths: make(chan death), fallen: make(chan int), marks: make(chan error), children: make(chan struct{}, 1), stop: make(chan struct{})}
	defer func() { // after stop is closed
		if h.unwatch != nil {
			h.unwatch()
		}
		for pid := range h.killed { // reap does so no more
			_, _ = unix.Wait4(pid, nil, 0, nil)
		}
	}()
	defer close(h.stop)
	defer h.store.Close()
	defer h.endStandby()
	// Orphaned descendants become children of this process, including one that replaced another.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return 1, fmt.Errorf("become the reaper of orphans: %w", err)
	}
	if err := unix.Pipe2(h.pipe[:], unix.O_CLOEXEC); err != nil {
		return 1, fmt.Errorf("pipe: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Close(h.pipe[0]), unix.Close(h.pipe[1])) }()
	if h.listener, err = notify.Listen(o.Socket); err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, h.listener.Close()) }()
	go receive(h.listener, h.messages, h.stop, h.Log)
	go h.reap()
	if err := h.start(); err != nil {
		return 1, err
	}
	return h.run()
}

// receiver is a notify.Listener.
type receiver interface {
	Receive() (notify.Message, error)
}

// receivePause is the pause after an error of a listener, which may come again at once.
const receivePause = 100 * time.Millisecond

// receive passes on what a listener receives until it is closed, or stop is.
func receive(l receiver, messages chan<- notify.Message, stop <-chan struct{}, log *slog.Logger) {
	for {
		m, err := l.Receive()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			log.Warn("notification", "error", err)
			select {
			case <-time.After(receivePause):
			case <-stop:
				return
			}
			continue
		}
		select {
		case messages <- m:
		case <-stop:
			m.Close()
			return
		}
	}
}

// reap passes exits of children to run.
func (h *holder) reap() {
	for {
		// Looked at first: once Run has returned, a child is another one's.
		err := unix.Waitid(unix.P_ALL, 0, nil, unix.WEXITED|unix.WNOWAIT, nil)
		select {
		case <-h.stop:
			return
		default:
		}
		var pid int
		var status unix.WaitStatus
		if err == nil {
			pid, err = unix.Wait4(-1, &status, unix.WNOHANG, nil)
		}
		switch {
		case errors.Is(err, unix.EINTR) || err == nil && pid == 0:
			continue
		case err != nil: // no children left
			select {
			case <-h.children:
			case <-h.stop:
				return
			}
			continue
		}
		select {
		case h.deaths <- death{pid: pid, status: status}:
		case <-h.stop:
			return
		}
	}
}

// start starts the process with the kept descriptors.
func (h *holder) start() error {
	process, err := h.launch(append([]notify.File{{Name: PipeName, FD: h.pipe[0]}}, h.store.Files()...))
	if err != nil {
		return err
	}
	h.became(process.Pid)
	h.byInt = false
	h.Log.Info("started", "pid", h.main, "descriptors", len(h.store.Files()))
	return nil
}

// launch starts a process of the command.
func (h *holder) launch(files []notify.File) (*os.Process, error) {
	env := append(notify.WithoutProtocol(os.Environ()), h.Outer.Variables(h.listener.Addr(), h.Max, false)...)
	env = append(env, RestartVariable+"=SIGTERM")
	process, err := notify.Start(h.Self, h.Command, env, files, unix.Stderr, nil)
	if err != nil {
		return nil, err
	}
	select {
	case h.children <- struct{}{}:
	default: // already pending
	}
	return process, nil
}

// became makes a process the main one.
func (h *holder) became(pid int) {
	h.main, h.started = pid, time.Now()
	h.wants = false
	h.unwatchLife()
}

// next starts the next process, or has the standby go on.
func (h *holder) next() error {
	if h.inherit() {
		return nil
	}
	return h.start()
}

// inherit makes the standby the main process, and returns false if there is none that can be.
func (h *holder) inherit() bool {
	s := h.standby
	if s == nil {
		return false
	}
	h.standby = nil
	if !runs(s.pid, h.program) {
		h.Log.Info("the program was replaced since the standby was started, which is killed", "pid", s.pid)
		h.killStandby(s)
		return false
	}
	if err := s.give(h.store.Files()); err != nil {
		h.Log.Warn("the standby does not go on, and is killed", "pid", s.pid, "error", err)
		h.killStandby(s)
		return false
	}
	if h.heir != nil {
		h.heir.close()
	}
	h.dying, h.heir = h.main, s
	h.became(s.pid)
	h.byInt = false
	h.Log.Warn("the standby goes on", "pid", s.pid, "after", h.dying, "descriptors", len(h.store.Files()))
	if h.dying == 0 {
		h.buried()
	}
	return true
}

// buried tells the new main process that the one before is reaped.
func (h *holder) buried() {
	if err := h.heir.send(endedLine); err != nil && !errors.Is(err, unix.EPIPE) {
		h.Log.Warn("tell the process that the one before has ended", "pid", h.heir.pid, "error", err)
	}
	h.heir.close()
	h.dying, h.heir = 0, nil
}

// ask handles a request for a standby, or its withdrawal.
func (h *holder) ask(m *notify.Message, wanted bool) {
	h.unwatchLife()
	h.wants = wanted && !h.Alone && len(m.Files) == 1
	if !h.wants {
		h.endStandby()
		return
	}
	pid, life := m.PID, m.Files[0]
	m.Files = nil
	var err error
	if h.program, err = os.Stat(exe(pid)); err != nil {
		h.Log.Warn("the program of the process", "pid", pid, "error", err)
	}
	if h.unwatch, err = Watch(life, func() {
		select {
		case h.fallen <- pid:
		case <-h.stop:
		}
	}); err != nil {
		h.Log.Warn("watch the process", "pid", pid, "error", err)
	}
	if h.standby == nil {
		h.due = time.After(standbyAfter)
	}
}

func (h *holder) unwatchLife() {
	if h.unwatch != nil {
		go h.unwatch() // it may be about to send
		h.unwatch = nil
	}
}

func (h *holder) endStandby() {
	if h.standby != nil {
		h.killStandby(h.standby)
		h.standby = nil
	}
	h.due = nil
}

func (h *holder) killStandby(s *standby) {
	h.killed[s.pid] = true
	s.end()
}

// prepare starts the standby.
func (h *holder) prepare() {
	h.due = nil
	if !h.wants || h.standby != nil || h.ending || h.main == 0 {
		return
	}
	var err error
	if h.standby, err = h.startStandby(); err != nil {
		h.Log.Warn("no standby is started", "error", err, "again_in", standbyRetry)
		h.due = time.After(standbyRetry)
		return
	}
	h.Log.Info("a standby is started", "pid", h.standby.pid)
}

// run handles one event at a time until the process has ended for good.
func (h *holder) run() (code int, err error) {
	var again <-chan time.Time
	for {
		over := false // they have been
		select {
		case m := <-h.messages:
			if over = m.PID == os.Getpid() && m.Is(endMark); !over {
				h.told(&m)
			}
		case err := <-h.marks:
			if over = err != nil; over {
				h.Log.Warn("notifications of the process", "error", err)
			}
		case pid := <-h.fallen:
			if pid == h.main {
				h.dead = append(h.dead, death{pid: pid, dying: true})
				go h.mark()
			}
		case d := <-h.deaths:
			switch {
			// What it has sent counts: descriptors to keep, that it was ready, which process has replaced it.
			case d.pid == h.main:
				h.dead = append(h.dead, d)
				go h.mark()
			case d.pid == h.dying:
				h.Log.Info("ended", "pid", d.pid, "how", endOf(d.status))
				h.buried()
			case h.killed[d.pid]:
				delete(h.killed, d.pid)
			case h.standby != nil && d.pid == h.standby.pid:
				h.Log.Warn("the standby has ended", "pid", d.pid, "how", endOf(d.status), "again_in", standbyRetry)
				h.standby.close()
				h.standby, h.due = nil, time.After(standbyRetry)
			}
		case <-h.due:
			h.prepare()
		case <-again:
			again = nil
			if err := h.next(); err != nil {
				h.Log.Error("not started", "error", err, "again_in", h.pause)
				again = time.After(h.pause)
				h.pause = longer(h.pause)
			}
		case s := <-h.Signals:
			if h.pass(s) {
				return exitDone, nil
			}
		}
		if !over || len(h.dead) == 0 {
			continue
		}
		d := h.dead[0]
		h.dead = h.dead[1:]
		if d.pid == h.dying && !d.dying { // reaped while the standby was about to replace it
			h.Log.Info("ended", "pid", d.pid, "how", endOf(d.status))
			h.buried()
		}
		if d.pid != h.main {
			continue
		}
		if d.dying {
			// One that ends too soon is started again later.
			if h.ready && !h.ending && time.Since(h.started) >= calm && h.inherit() {
				h.pause = longer(0)
			}
			continue
		}
		h.main = 0
		end := endOf(d.status)
		if h.ending || !h.ready {
			h.Log.Info("ended", "pid", d.pid, "how", end)
			return exitCode(d.status), nil
		}
		if time.Since(h.started) >= calm {
			h.pause = 0
		}
		h.Log.Warn("ended, and is started again", "pid", d.pid, "how", end, "in", h.pause, "descriptors", len(h.store.Files()))
		again = time.After(h.pause)
		h.pause = longer(h.pause)
	}
}

// running says whether the main process is not known to have ended.
func (h *holder) running() bool {
	return h.main != 0 && !slices.ContainsFunc(h.dead, func(d death) bool { return d.pid == h.main })
}

// mark marks the end of what was sent so far.
func (h *holder) mark() {
	err := h.listener.Mark(endMark)
	select {
	case h.marks <- err:
	case <-h.stop:
	}
}

// longer is the delay after one that was not enough.
func longer(pause time.Duration) time.Duration { return min(max(2*pause, firstPause), lastPause) }

const exitDone = 0

// pass passes a signal on, and returns whether that ends Run.
func (h *holder) pass(s os.Signal) (ends bool) {
	number, ok := s.(unix.Signal)
	if !ok {
		return false
	}
	if number == unix.SIGTERM || number == unix.SIGINT {
		h.ending = true
		h.endStandby()
		number = h.endSignal()
		if h.main == 0 {
			return true
		}
	}
	if h.running() {
		h.kill(number)
	}
	return false
}

// endSignal ends the process.
func (h *holder) endSignal() unix.Signal {
	if h.byInt {
		return unix.SIGINT
	}
	return unix.SIGTERM
}

// kill sends the process a signal.
func (h *holder) kill(number unix.Signal) {
	if err := unix.Kill(h.main, number); err != nil && !errors.Is(err, unix.ESRCH) {
		h.Log.Warn("signal not passed on", "signal", number, "error", err)
	}
}

// told handles a message.
func (h *holder) told(m *notify.Message) {
	if m.PID != h.main && m.UID != os.Geteuid() && m.UID != 0 {
		h.Log.Warn("notification of another user's process is left alone", "pid", m.PID, "uid", m.UID)
		m.Close()
		return
	}
	if text, ok := m.Value("MAINPID"); ok {
		h.follow(text)
	}
	if m.Is(notify.Ready) {
		h.ready = true
	}
	if wanted, ok := m.Value(strings.TrimSuffix(standbyVariable, "=")); ok && m.PID == h.main {
		h.ask(m, wanted == "1")
	}
	if m.PID == h.main && !h.byInt && m.Is(RestartsOnTerm) {
		h.byInt = true
		if h.ending { // it may take the signal for one to restart
			h.kill(h.endSignal())
		}
	}
	var outer []string
	for _, line := range m.Lines {
		if line != "" && !forStore(line) {
			outer = append(outer, line)
		}
	}
	if err := h.store.Take(m); err != nil {
		h.Log.Warn("store", "error", err)
	}
	if len(outer) > 0 {
		if err := h.Outer.Notify(strings.Join(outer, "\n")); err != nil {
			h.Log.Warn("pass a notification on", "error", err)
		}
	}
}

// follow makes another process the main one: it has replaced the old one.
func (h *holder) follow(text string) {
	pid, err := strconv.Atoi(text)
	if err != nil || pid <= 1 {
		h.Log.Warn("MAINPID is no process", "value", text)
		return
	}
	if !isDescendant(pid) {
		h.Log.Warn("MAINPID is no process below this one", "value", text)
		return
	}
	h.Log.Info("replaced", "pid", h.main, "by", pid)
	h.became(pid)
	h.endStandby() // it may run another program
	if h.ending {  // the signal was for the process before, which may have taken it for one to restart
		h.kill(unix.SIGINT)
	}
}

// isDescendant says whether a process is a descendant of this one, which then receives its exit.
func isDescendant(pid int) bool {
	for range 32 {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return false
		}
		_, rest, _ := strings.Cut(string(status), "\nPPid:\t")
		parent, _, _ := strings.Cut(rest, "\n")
		if pid, err = strconv.Atoi(parent); err != nil || pid == 0 {
			return false
		}
		if pid == os.Getpid() {
			return true
		}
	}
	return false
}

func endOf(s unix.WaitStatus) string {
	if s.Signaled() {
		return fmt.Sprintf("signal %v", s.Signal())
	}
	return fmt.Sprintf("exit code %d", s.ExitStatus())
}

// exitCode is the exit code as in a shell.
func exitCode(s unix.WaitStatus) int {
	if s.Signaled() {
		return 128 + int(s.Signal())
	}
	return s.ExitStatus()
}
