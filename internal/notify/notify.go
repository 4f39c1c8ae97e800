// Package notify implements the protocol of sd_notify(3): to report this process's state to the
// service manager, and to store file descriptors there beyond the process (FDSTORE=1).
package notify

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// States to report.
const (
	Ready    = "READY=1"
	Stopping = "STOPPING=1"
	Watchdog = "WATCHDOG=1"
)

// patience is how long to wait for the service manager: it has one thread, and reads nothing while
// it reloads.
const patience = 10 * time.Second

// Manager is the service manager that started this process. Its methods may be called from any
// goroutine. On nil they do nothing.
type Manager struct {
	fd int

	mu   sync.Mutex
	next *string            // the manager after Follow; nil: the same
	addr *unix.SockaddrUnix // nil: no longer any

	watchdog time.Duration
	max      int // maximum descriptors it keeps; 0: unknown
}

// nextVariable is NOTIFY_SOCKET of the process that this one takes over from, which is its manager
// until then.
const nextVariable = "XDPCAST_NOTIFY_NEXT"

// Variables returns the environment that tells a process about its manager, which listens at addr,
// keeps max descriptors, and forwards notifications. With next the process later follows the caller
// under the caller's own manager.
func (m *Manager) Variables(addr string, max int, next bool) []string {
	env := []string{"NOTIFY_SOCKET=" + addr}
	if max > 0 {
		env = append(env, "FDSTORE="+strconv.Itoa(max))
	}
	if m != nil && m.watchdog > 0 {
		env = append(env, "WATCHDOG_USEC="+strconv.FormatInt(m.watchdog.Microseconds(), 10))
	}
	if next {
		env = append(env, nextVariable+"="+m.path())
	}
	return env
}

func (m *Manager) path() string {
	if m == nil {
		return ""
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.addr == nil {
		return ""
	}
	return m.addr.Name
}

// Managed says whether there is currently a service manager.
func (m *Manager) Managed() bool { return m.path() != "" }

// TakesOver says whether this process takes over from another one, which is its manager until it
// calls Follow.
func (m *Manager) TakesOver() bool {
	if m == nil {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.next != nil
}

// Max is how many descriptors the manager reports that it keeps; 0: unknown.
func (m *Manager) Max() int {
	if m == nil {
		return 0
	}
	return m.max
}

// Follow makes a process that takes over report to its predecessor's manager from now on.
func (m *Manager) Follow() {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.next == nil {
		return
	}
	m.addr = nil
	if *m.next != "" {
		m.addr = &unix.SockaddrUnix{Name: *m.next}
	}
	m.next = nil
}

// Connect finds the service manager by the variable NOTIFY_SOCKET; nil if there is none.
func Connect() (*Manager, error) {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil, nil
	}
	if path[0] != '/' && path[0] != '@' || len(path) < 2 {
		return nil, fmt.Errorf("NOTIFY_SOCKET %q: want a path, or @ and a name", path)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket to the service manager: %w", err)
	}
	limit := unix.NsecToTimeval(int64(patience))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit); err != nil {
		return nil, errors.Join(fmt.Errorf("socket to the service manager: %w", err), unix.Close(fd))
	}
	m := &Manager{fd: fd, addr: &unix.SockaddrUnix{Name: path}}
	if next, ok := os.LookupEnv(nextVariable); ok {
		m.next = &next
		if err := os.Unsetenv(nextVariable); err != nil {
			return nil, err
		}
	}
	m.max, _ = strconv.Atoi(os.Getenv("FDSTORE")) // systemd 254 and newer
	usec, _ := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	pid := os.Getenv("WATCHDOG_PID")
	if usec > 0 && usec < int64(1<<62/time.Microsecond) && (pid == "" || pid == strconv.Itoa(os.Getpid())) {
		m.watchdog = time.Duration(usec) * time.Microsecond
	}
	return m, nil
}

// Close closes the socket to the service manager.
func (m *Manager) Close() error {
	if m == nil {
		return nil
	}
	return unix.Close(m.fd)
}

// WatchdogInterval is the longest interval between Watchdog notifications; 0: none needed.
func (m *Manager) WatchdogInterval() time.Duration {
	if m == nil {
		return 0
	}
	return m.watchdog
}

// Notify sends the service manager a state, lines of KEY=VALUE, with descriptors.
func (m *Manager) Notify(state string, fds ...int) error {
	if m == nil {
		return nil
	}
	m.mu.Lock()
	addr := m.addr
	m.mu.Unlock()
	if addr == nil {
		return nil
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	for {
		err := unix.Sendmsg(m.fd, []byte(state), rights, addr, unix.MSG_NOSIGNAL)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			first, _, _ := strings.Cut(state, "\n")
			return fmt.Errorf("tell the service manager %s: %w", first, err)
		}
		return nil
	}
}

// Barrier returns when all earlier notifications have been processed: the service manager then
// closes the pipe.
func (m *Manager) Barrier() error { return m.Ask("BARRIER=1", patience) }

// Ask sends the service manager a request, and waits until it has closed the attached pipe.
func (m *Manager) Ask(state string, patience time.Duration) error {
	if !m.Managed() {
		return nil
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return fmt.Errorf("pipe: %w", err)
	}
	defer unix.Close(pipe[0])
	err := m.Notify(state, pipe[1])
	if err := errors.Join(err, unix.Close(pipe[1])); err != nil {
		return err
	}
	for deadline := time.Now().Add(patience); ; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pipe[0])}}, int(max(0, time.Until(deadline)).Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR) && time.Now().Before(deadline):
		case err != nil:
			return fmt.Errorf("wait for the service manager: %w", err)
		case n == 0:
			return fmt.Errorf("the service manager has not answered for %v", patience)
		default:
			return nil
		}
	}
}
