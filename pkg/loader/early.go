package loader

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
	"xdpcast/internal/account"
	"xdpcast/pkg/flow"
)

// ErrOtherState is returned by OpenEarly if the pinned state is not the one that was asked for.
var ErrOtherState = errors.New("the pinned state is another one")

// CounterIDs are the ids of the counters of a rule and of its outputs, which are consecutive.
type CounterIDs struct{ Rule, FirstOutput uint32 }

// Early is what a path in user space needs of the pinned state to forward before a Loader is open: the locks, and
// the account, in which its packets are counted. Like a Loader, it is not safe for concurrent use.
type Early struct {
	locks   locks
	account *account.Account
	state   uint32
	ids     map[string]CounterIDs
	opened  map[string][]openCounters
	loader  *Loader // nil until one is open
	taken   bool    // by a Loader
	// GiveUp is called when a Loader cannot continue with the account, before it counts in the pinned state by
	// itself: the path must close its counters.
	GiveUp func() error
}

// StateID identifies the pinned state, until the host is booted again: the id of the map user_stats.
func (l *Loader) StateID() (uint32, error) { return stateID(l.maps.UserStats) }

func stateID(m *ebpf.Map) (uint32, error) {
	info, err := m.Info()
	if err != nil {
		return 0, fmt.Errorf("map user_stats: %w", err)
	}
	id, ok := info.ID()
	if !ok {
		return 0, errors.New("map user_stats: the kernel does not say its id")
	}
	return uint32(id), nil
}

// OpenEarly takes the locks of the pinned state whose StateID this is, and opens its account. ids are the counters
// of the rules by name, as published in this state. The caller closes it, also when a Loader has taken it over.
//
// Errors to match: ErrLocked, ErrOtherState, os.ErrNotExist.
func OpenEarly(opts Options, state uint32, ids map[string]CounterIDs) (_ *Early, err error) {
	if opts, err = opts.Absolute(); err != nil {
		return nil, err
	}
	e := &Early{state: state, ids: ids, opened: map[string][]openCounters{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.Close())
		}
	}()
	if e.locks.run, err = takeRunLock(opts); err != nil {
		return nil, err
	}
	if e.locks.pins, err = takePinLock(opts); err != nil {
		return nil, err
	}
	m, err := ebpf.LoadPinnedMap(filepath.Join(opts.PinDir, bpf.RelayMapUserStats), nil)
	if err != nil {
		return nil, fmt.Errorf("open pin: %w", err)
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	switch id, err := stateID(m); {
	case err != nil:
		return nil, err
	case id != state:
		return nil, ErrOtherState
	}
	e.account, err = mapAccount(m, account.New)
	return e, err
}

// Close releases what no Loader has taken over.
func (e *Early) Close() error {
	errs := []error{e.locks.Close()}
	if e.account != nil && !e.taken {
		errs = append(errs, e.account.Close())
	}
	e.account = nil
	return errors.Join(errs...)
}

// Account is like Loader.Account.
func (e *Early) Account() *account.Account { return e.account }

// OpenCounters is like Loader.OpenCounters.
func (e *Early) OpenCounters(rule flow.Flow) *account.RuleCounters {
	if e.loader != nil {
		return e.loader.OpenCounters(rule)
	}
	rule = rule.Normalized()
	c := e.account.OpenRule(len(rule.Out))
	if ids, ok := e.ids[rule.Name]; ok {
		c.Bind(ids.Rule, ids.FirstOutput)
	}
	e.opened[rule.Name] = append(e.opened[rule.Name], openCounters{rule, c})
	return c
}

// Locks is like Loader.Locks, until a Loader has taken the locks over.
func (e *Early) Locks() (Locks, error) { return e.locks.duplicates() }

// giveLocks returns the locks, which are the caller's from then on.
func (e *Early) giveLocks() Locks {
	l := Locks{Run: e.locks.run, Pins: e.locks.pins}
	e.locks = locks{}
	return l
}

// take returns the account for a Loader that opens this map. If it is of another one, or a Loader has closed it, the
// result is nil, and nothing counts in it any more.
func (e *Early) take(m *ebpf.Map) (*account.Account, error) {
	id, err := stateID(m)
	if err != nil {
		return nil, err
	}
	if id == e.state && e.account != nil && !e.taken {
		e.taken = true
		return e.account, nil
	}
	if e.GiveUp == nil {
		return nil, nil
	}
	give := e.GiveUp
	e.GiveUp = nil
	return nil, give()
}

// follow passes the open counters to a Loader that has just opened, which knows the ids of its rules.
func (e *Early) follow(l *Loader) {
	if !e.taken || l.account != e.account {
		return
	}
	e.loader = l
	for name, open := range e.opened {
		l.counters[name] = append(l.counters[name], open...)
		for _, o := range open {
			rule := l.rules[name]
			if rule == nil || o.counters.Closed() || !o.rule.Continues(*rule.rule) {
				continue
			}
			if id, first, ok := o.counters.IDs(); ok && (id != rule.id || first != rule.firstStats) {
				o.counters.Loosen()
			}
			o.counters.Bind(rule.id, rule.firstStats) // does nothing if they are bound
		}
	}
	e.opened = nil
}
