// Package history keeps the last sets of rules on disk, with the author and time of each change,
// and the change that is undone unless it is confirmed.
//
// A directory contains a file changes.json, which is replaced as a whole, and the text of each set
// in sets/, compressed, named by the SHA-256 digest of the text. A set is stored once, however many
// entries refer to it, and is verified when it is read. The texts are rule files (package rules);
// this package does not parse them.
package history

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"xdpcast/internal/savefile"
)

// version is the version of changes.json.
const version = 1

// Limits of the history: the oldest entries go first. Two entries, the current and the previous
// one, are kept at any size.
const (
	MaxEntries = 50
	MaxBytes   = 64 << 20 // of all sets, compressed
)

// Set is a complete set of rules, by origin.
type Set struct {
	File Digest `json:"file"`
	API  Digest `json:"api"`
}

// Change is what was done, when, and by whom.
type Change struct {
	Time time.Time `json:"time"`
	What string    `json:"what"` // "rule apply", "reload", ...
	// UID is the user who made it, nil if the daemon did.
	UID     *uint32 `json:"uid,omitempty"`
	Added   int     `json:"added"`
	Changed int     `json:"changed"`
	Removed int     `json:"removed"`
}

// Entry is a change and the resulting set.
type Entry struct {
	Change
	Set
	Rules int `json:"rules"`
}

// Pending is a change that is undone unless it is confirmed in time.
type Pending struct {
	Change
	Before Set `json:"before"` // restored without a confirmation
	// Read is the set of the daemon's file when it was last read before Deadline: a file edited
	// since then is not undone.
	Read Digest `json:"read"`
	// Boot is the boot id for Deadline: a reboot ends the time, and clock steps do not change it.
	Boot     string        `json:"boot"`
	Deadline time.Duration `json:"deadline"` // CLOCK_BOOTTIME
	Until    time.Time     `json:"until"`    // for display
}

// Held says that the daemon's current file rules differ from the file, because a reload of it was
// undone: the file counts again once its content differs from Undone.
type Held struct {
	Config string    `json:"config"` // the file
	Undone Digest    `json:"undone"` // its content
	File   Digest    `json:"file"`   // the current set instead
	Since  time.Time `json:"since"`
}

// State is the content of changes.json.
type State struct {
	Entries []Entry  `json:"entries"` // the oldest first; the last is current
	Pending *Pending `json:"pending,omitempty"`
	Held    *Held    `json:"held,omitempty"`
}

// Clone returns a copy whose fields can be replaced, and whose entries appended to, without
// changing the original.
func (s State) Clone() State {
	s.Entries = slices.Clip(s.Entries)
	return s
}

// ErrDamaged is matched by errors of Open and Get if the disk does not hold what was written.
var ErrDamaged = errors.New("damaged")

// Store is the state of one daemon on disk. It is not safe for concurrent use.
type Store struct {
	file, sets string
	log        *slog.Logger
	state      State
	limits     limits
	sizes      map[Digest]int64 // of the stored sets; nil until the directory is read: see known
	good       map[Digest]bool  // sets that this Store has written
	failWrites error            // for tests
}

type limits struct {
	entries int
	bytes   int64
}

// Open reads the state in file, whose sets are in the directory sets. If the file is missing, the
// state is empty. It writes nothing before Put and Save.
func Open(file, sets string, log *slog.Logger) (*Store, error) {
	s := &Store{file: file, sets: sets, log: log, limits: limits{MaxEntries, MaxBytes}, good: map[Digest]bool{}}
	data, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	if s.state, err = decode(data); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return s, nil
}

// document is changes.json.
type document struct {
	Version int `json:"version"`
	State
}

func decode(data []byte) (State, error) {
	var head struct{ Version int }
	if err := json.Unmarshal(data, &head); err != nil {
		return State{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if head.Version > version {
		return State{}, fmt.Errorf("version %d is of a later release: want at most %d", head.Version, version)
	}
	var d document
	if err := json.Unmarshal(data, &d); err != nil {
		return State{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if head.Version < 1 {
		return State{}, fmt.Errorf("%w: version %d", ErrDamaged, head.Version)
	}
	for digest := range d.digests() {
		if !digest.valid() {
			return State{}, fmt.Errorf("%w: %.80q is no digest of a set", ErrDamaged, string(digest))
		}
	}
	return d.State, nil
}

// SetAside renames an unreadable changes.json, to be examined later, so that an empty one can
// replace it. It returns the new name.
func SetAside(file string) (string, error) {
	aside := file + ".damaged"
	return aside, os.Rename(file, aside)
}

// State returns the state last saved or read.
func (s *Store) State() State { return s.state.Clone() }

// Save replaces the state on disk. It drops the oldest entries beyond the limits, and removes sets
// that are no longer referenced. After an error State is unchanged.
func (s *Store) Save(state State) error {
	if s.failWrites != nil {
		return s.failWrites
	}
	state = state.Clone()
	sizes, err := s.known()
	if err != nil {
		return err
	}
	s.trim(&state, sizes)
	data, err := json.MarshalIndent(document{version, state}, "", " ")
	if err != nil {
		return err
	}
	if err := savefile.Write(s.file, append(data, '\n')); err != nil {
		return err
	}
	s.state = state
	s.sweep(sizes)
	return nil
}

// trim drops the oldest entries beyond the limits.
func (s *Store) trim(state *State, sizes map[Digest]int64) {
	const least = 2
	if over := len(state.Entries) - s.limits.entries; over > 0 {
		state.Entries = state.Entries[over:]
	}
	for len(state.Entries) > least {
		var total int64
		for digest := range state.digests() {
			total += sizes[digest]
		}
		if total <= s.limits.bytes {
			return
		}
		state.Entries = state.Entries[1:]
	}
}

// sweep removes unreferenced sets. Failed removals are retried by the next sweep.
func (s *Store) sweep(sizes map[Digest]int64) {
	named := s.state.digests()
	for digest := range sizes {
		if named[digest] {
			continue
		}
		if err := os.Remove(s.path(digest)); err != nil && !errors.Is(err, os.ErrNotExist) {
			s.log.Warn("remove an old set of rules", "error", err)
			continue
		}
		delete(sizes, digest)
		delete(s.good, digest)
	}
}

// digests are those of all sets that a state references.
func (s *State) digests() map[Digest]bool {
	named := map[Digest]bool{}
	add := func(digests ...Digest) {
		for _, d := range digests {
			named[d] = true
		}
	}
	for _, e := range s.Entries {
		add(e.File, e.API)
	}
	if p := s.Pending; p != nil {
		add(p.Before.File, p.Before.API, p.Read)
	}
	if h := s.Held; h != nil {
		add(h.File, h.Undone)
	}
	return named
}

// path is the file of a set's text.
func (s *Store) path(d Digest) string { return filepath.Join(s.sets, string(d)+suffix) }
