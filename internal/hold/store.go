package hold

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"xdpcast/internal/notify"
)

// Store is a file descriptor store, like systemd's in sd_notify(3). It is not safe for concurrent
// use.
type Store struct {
	max   int
	files []notify.File
}

// NewStore makes a store for up to max descriptors.
func NewStore(max int) *Store { return &Store{max: max} }

// Files are the descriptors in the store, in order of arrival. The store owns them.
func (s *Store) Files() []notify.File { return s.files }

// Take handles the store's part of a message, and takes over its descriptors: FDSTORE,
// FDSTOREREMOVE and BARRIER. The error says which part failed.
func (s *Store) Take(m *notify.Message) error {
	defer m.Close()
	if m.Cut {
		return errors.New("descriptors to keep have not come: this process may have no more open (ulimit -n)")
	}
	name, named := m.Value("FDNAME")
	switch {
	case m.Is("FDSTORE=1"):
		if !named || !validName(name) {
			name = "stored"
		}
		for i, fd := range m.Files {
			if len(s.files) >= s.max {
				m.Files = m.Files[i:]
				return fmt.Errorf("%d descriptors called %s are not kept: there are %d already, and no more are to be", len(m.Files), name, s.max)
			}
			s.files = append(s.files, notify.File{Name: name, FD: fd})
		}
		m.Files = nil
	case m.Is("FDSTOREREMOVE=1") && named:
		kept := s.files[:0]
		for _, f := range s.files {
			if f.Name == name {
				_ = unix.Close(f.FD) // closed even on an error, see close(2)
				continue
			}
			kept = append(kept, f)
		}
		s.files = kept
	}
	return nil
}

// Close closes all descriptors; groups held by sockets among them are left.
func (s *Store) Close() {
	for _, f := range s.files {
		_ = unix.Close(f.FD)
	}
	s.files = nil
}

// validName is fdname_is_valid of systemd.
func validName(name string) bool {
	if len(name) > 255 {
		return false
	}
	return strings.IndexFunc(name, func(c rune) bool { return c <= ' ' || c >= 127 || c == ':' }) < 0
}

// forStore says whether a line of a message is about the store, or how the process is ended, and so only for its owner.
func forStore(line string) bool {
	for _, prefix := range []string{"FDSTORE", "FDNAME=", "FDPOLL=", "BARRIER=", "MAINPID=", "MAINPIDFDID=", termVariable, standbyVariable} {
		if strings.HasPrefix(line, prefix) {
			return true
		}
	}
	return false
}
