package notify

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// File is a descriptor passed by the service manager to this process.
type File struct {
	Name string
	FD   int
}

// Received returns the descriptors passed by the service manager, like sd_listen_fds_with_names(3):
// those in its store, and listening sockets. They are closed on exec, and the variables that name
// them are removed, so they belong to the first caller.
func Received() ([]File, error) {
	const first = 3 // SD_LISTEN_FDS_START
	pid, count, names := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"), os.Getenv("LISTEN_FDNAMES")
	for _, name := range []string{"LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		if err := os.Unsetenv(name); err != nil {
			return nil, err
		}
	}
	if pid != strconv.Itoa(os.Getpid()) {
		return nil, nil // another process's
	}
	n, err := strconv.Atoi(count)
	if err != nil || n < 0 || n > 1<<20 {
		return nil, fmt.Errorf("LISTEN_FDS %q: want a number of descriptors", count)
	}
	files := make([]File, n)
	named := strings.Split(names, ":")
	for i := range files {
		files[i].FD = first + i
		if len(named) == n {
			files[i].Name = named[i]
		}
		unix.CloseOnExec(files[i].FD)
	}
	if n > 0 && len(named) != n {
		return files, fmt.Errorf("LISTEN_FDNAMES has %d names of %d descriptors", len(named), n)
	}
	return files, nil
}

// Store stores descriptors with the service manager: it is a membership.Keeper. Without a service
// manager nothing is kept, and nothing fails. Its methods may be called from any goroutine.
type Store struct {
	manager *Manager

	mu   sync.Mutex
	kept int
}

// Store returns the manager's store, which already holds this many descriptors. systemd does not
// report that it is full: from release 254 on it reports its capacity.
func (m *Manager) Store(holds int) *Store { return &Store{manager: m, kept: holds} }

// Keep stores a duplicate of fd under a unique name, to be passed to the next process. The name is
// ASCII, without colons and at most 255 characters. Its state is not watched (FDPOLL=0); otherwise
// BPF maps would be dropped at once, and sockets with their interfaces.
func (s *Store) Keep(name string, fd int) error {
	if !s.manager.Managed() {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.manager.max > 0 && s.kept >= s.manager.max {
		return fmt.Errorf("the service manager keeps no more than %d descriptors (raise FileDescriptorStoreMax= of the service)", s.manager.max)
	}
	if err := s.manager.Notify("FDSTORE=1\nFDPOLL=0\nFDNAME="+name, fd); err != nil {
		return err
	}
	s.kept++
	return nil
}

// Drop closes the descriptors stored under the names.
func (s *Store) Drop(names ...string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range names {
		if err := s.manager.Notify("FDSTOREREMOVE=1\nFDNAME=" + name); err != nil {
			return err
		}
		s.kept--
	}
	return nil
}

// Sync returns when all requests are done.
func (s *Store) Sync() error { return s.manager.Barrier() }
