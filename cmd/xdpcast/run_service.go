package main

import (
	"log/slog"

	"golang.org/x/sys/unix"

	"xdpcast/internal/notify"
	"xdpcast/pkg/membership"
)

// service is the service manager that has started us, if one has.
type service struct {
	log     *slog.Logger
	manager *notify.Manager // nil: there is none
	kept    []membership.Kept
	holds   int // descriptors in its store
}

// connectService finds the service manager, and takes what it has kept of an earlier process. A
// daemon runs without it as well: what goes wrong is logged.
func connectService(log *slog.Logger) *service {
	s := &service{log: log}
	var err error
	if s.manager, err = notify.Connect(); err != nil {
		log.Warn("service manager", "error", err)
	}
	files, err := notify.Received()
	if err != nil {
		log.Warn("descriptors of the service manager", "error", err)
	}
	s.holds = len(files)
	store := s.manager.Store(s.holds)
	for _, f := range files {
		if s.manager != nil && membership.IsKept(f.Name) {
			s.kept = append(s.kept, membership.Kept{Name: f.Name, FD: f.FD})
			continue
		}
		log.Warn("a descriptor that the service manager has passed is of no use, and closed", "name", f.Name)
		if err := unix.Close(f.FD); err != nil {
			log.Warn("close it", "error", err)
		}
		if f.Name == "" {
			continue
		}
		if err := store.Drop(f.Name); err != nil {
			log.Warn("have it dropped", "error", err)
		}
		s.holds--
	}
	return s
}

// memberships has the service manager keep memberships.
func (s *service) memberships() membership.Options {
	if s.manager == nil {
		return membership.Options{}
	}
	return membership.Options{Keeper: s.manager.Store(s.holds), Kept: s.kept}
}

// tell tells the service manager how we do.
func (s *service) tell(state string) {
	if err := s.manager.Notify(state); err != nil {
		s.log.Warn("service manager", "error", err)
	}
}

func (s *service) close() error { return s.manager.Close() }
