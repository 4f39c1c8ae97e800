package membership

import (
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Keeper keeps file descriptors open beyond the process, as a service manager does
// (sd_pid_notify_with_fds(3), FDSTORE=1). A manager never calls its methods concurrently.
type Keeper interface {
	// Keep stores a duplicate of fd under a unique name.
	Keep(name string, fd int) error
	// Drop closes the descriptors stored under these names, after earlier requests.
	Drop(names ...string) error
	// Sync returns when all earlier requests are done.
	Sync() error
}

// Kept is a descriptor that a Keeper has kept from an earlier process.
type Kept struct {
	Name string
	FD   int
}

// Names of kept descriptors. They are short, since all of them share one environment variable,
// which the kernel limits to 128 KiB (MAX_ARG_STRLEN).
const (
	ledgerName = "memberships"
	socketName = "m."
)

// IsKept reports whether a descriptor's name is one that a Manager has assigned.
func IsKept(name string) bool {
	return name == ledgerName || strings.HasPrefix(name, socketName)
}

// Duplicates returns duplicates of the kept descriptors, for another process to restore while this
// manager is paused, or for another manager of this process. The caller closes them. Without a
// Keeper there are none.
func (m *Manager) Duplicates() (all []Kept, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.keep == nil || m.closed {
		return nil, nil
	}
	defer func() {
		if err != nil {
			for _, d := range all {
				m.closeKept(d)
			}
			all = nil
		}
	}()
	add := func(name string, fd int) error {
		duplicate, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return fmt.Errorf("duplicate %s: %w", name, err)
		}
		all = append(all, Kept{name, duplicate})
		return nil
	}
	for _, p := range m.ifaces {
		for s := range p.shards {
			if s.kept == "" {
				continue
			}
			if err := add(s.kept, s.fd); err != nil {
				return all, err
			}
		}
	}
	return all, add(ledgerName, m.keep.ledger.fd)
}

// keeping stores helper sockets with the Keeper. All of its methods may be called on nil, which
// stores nothing.
type keeping struct {
	keeper Keeper
	log    *slog.Logger
	sys    System
	ledger *ledger
	last   int  // number in the name of the last socket
	warned bool // something could not be kept
}

// unkept is the slot of a membership without a ledger record.
const unkept = -1

// name returns a new name for a socket.
func (k *keeping) name() string {
	k.last++
	return socketName + strconv.Itoa(k.last)
}

// warn warns once that something could not be kept.
func (k *keeping) warn(err error) {
	if !k.warned {
		k.log.Warn("groups joined from now on may be left with this process: they are not kept for the next", "error", err)
	}
	k.warned = true
}

// keepSocket stores a new socket.
func (k *keeping) keepSocket(s *shard) {
	if k == nil || s.cookie == 0 {
		return
	}
	name := k.name()
	if err := k.keeper.Keep(name, s.fd); err != nil {
		k.warn(err)
		return
	}
	s.kept = name
	k.warned = false
}

// identify determines a new socket's identity in the ledger.
func (k *keeping) identify(s *shard) {
	if k == nil {
		return
	}
	cookie, err := socketNumber(k.sys, s.fd, unix.SO_COOKIE)
	if err != nil {
		k.warn(err)
		return
	}
	s.cookie = cookie
}

// write records what a socket is about to hold.
func (k *keeping) write(m Membership, layer int, s *shard) (slot int) {
	if k == nil || s.cookie == 0 {
		return unkept
	}
	slot, err := k.ledger.add(&holding{cookie: s.cookie, layer: layer, index: m.Index, group: m.Group, source: m.Source, since: time.Now()})
	if err != nil {
		k.warn(err)
		// A socket with unrecorded memberships must not be restored.
		k.dropSocket(s)
		return unkept
	}
	return slot
}

// erase erases a record.
func (k *keeping) erase(slot int) {
	if k == nil || slot == unkept {
		return
	}
	if err := k.ledger.erase(slot); err != nil {
		k.warn(err) // the next process finds from the kernel that it is not held
	}
}

// dropSocket stops keeping a socket.
func (k *keeping) dropSocket(s *shard) {
	if k == nil || s.kept == "" {
		return
	}
	k.drop(s.kept)
	s.kept = ""
}

func (k *keeping) drop(names ...string) {
	if len(names) == 0 {
		return
	}
	if err := k.keeper.Drop(names...); err != nil {
		k.log.Warn("unneeded helper sockets stay kept", "sockets", len(names), "error", err)
	}
}

// dropAll stops keeping sockets that still hold groups, which the kernel leaves before dropAll
// returns.
func (k *keeping) dropAll(sockets map[*shard]struct{}) {
	if k == nil {
		return
	}
	var names []string
	for s := range sockets {
		for _, slot := range s.left {
			k.erase(slot)
		}
		if s.kept != "" {
			names = append(names, s.kept)
			s.kept = ""
		}
	}
	slices.Sort(names)
	k.drop(names...)
	if len(names) == 0 {
		return
	}
	if err := k.keeper.Sync(); err != nil {
		k.log.Warn("unneeded helper sockets may still be kept", "error", err)
	}
}

// close closes the ledger, which stays with the Keeper.
func (k *keeping) close() {
	if k == nil {
		return
	}
	if err := k.ledger.close(); err != nil {
		k.log.Warn("closing the record of memberships failed", "error", err)
	}
}
