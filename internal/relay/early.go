package relay

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"xdpcast/internal/forward"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
)

// Early is the path fanout while it goes on as in a process that was killed, with the rings and the rules that this has
// left, until the control loop of a Relay has it (Options.Early). Nothing of it is used from then on.
type Early struct {
	log   *slog.Logger
	taps  *forward.Taps
	boost *forward.Boost
	path  *forward.Fanout // nil: packets wait until the control loop opens it
	rules []flow.Flow
	state *loader.Early
}

// Resume starts the path fanout with kept rings and rules, if there are any that fit: packets that the rings have no
// room for are lost until then, and everything else that a daemon does before takes ten times as long. These options
// matter: Workers, Priority, Boost, Place, Loader, Keeper, Kept, Predecessor and Logger; New gets the same ones. The caller closes
// the result. Like New it must be called in the network namespace of Run.
//
// A Boost must be allowed in the process as it will be (forward.AllowBoost).
func Resume(opts Options) (*Early, error) {
	opts, err := opts.withDefaults()
	if err != nil {
		return nil, err
	}
	e := &Early{log: opts.Logger, taps: &forward.Taps{}}
	if err := forward.CheckPriority(opts.Priority); err != nil {
		return nil, fmt.Errorf("workers: %w", err)
	}
	if opts.Boost && opts.Priority == 0 {
		if e.boost, err = forward.NewBoost(); err != nil {
			e.log.Warn("workers have no real-time priority", "cause", err)
		}
	}
	if opts.Kept == nil || opts.Predecessor != nil {
		return e, nil
	}
	started := time.Now()
	rules, err := opts.Kept.Rules()
	if err == nil {
		err = e.goOn(opts, rules)
	}
	if err != nil {
		e.log.Info("the path fanout waits until the daemon has started", "cause", err)
		return e, nil
	}
	e.log.Info("the path fanout goes on with the rules of the previous daemon", "rules", len(rules.Flows), "took", time.Since(started).Round(time.Microsecond))
	return e, nil
}

func (e *Early) goOn(opts Options, rules *forward.FanoutRules) (err error) {
	state, err := loader.OpenEarly(opts.Loader, rules.State, rules.Counts)
	if err != nil {
		return err
	}
	fanout := e.fanoutOptions(opts, state)
	var path *forward.Fanout
	if fanout.Inherited, err = opts.Kept.Clone(); err == nil {
		path, err = forward.ContinueFanout(fanout, rules)
	}
	if err != nil {
		return errors.Join(err, state.Close())
	}
	if err := opts.Kept.Close(); err != nil {
		e.log.Warn("close what the path has duplicates of", "error", err)
	}
	e.path, e.rules, e.state = path, rules.Flows, state
	return nil
}

// GoesOn says whether the path goes on.
func (e *Early) GoesOn() bool { return e.path != nil }

// fanoutOptions are those of the path fanout that do not depend on the process before.
func (e *Early) fanoutOptions(opts Options, accounts forward.Accounts) forward.FanoutOptions {
	return forward.FanoutOptions{
		Logger: e.log, Workers: opts.Workers, Priority: opts.Priority, Boost: e.boost, Place: opts.Place, Accounts: accounts, Taps: e.taps, Keeper: opts.Keeper,
	}
}

// Locks returns duplicates of the locks of the pinned state that the path has taken, none if it has not. The caller
// closes them.
func (e *Early) Locks() (loader.Locks, error) {
	if e.path == nil {
		return loader.Locks{}, nil
	}
	return e.state.Locks()
}

// Close closes what no control loop has taken.
func (e *Early) Close() error {
	if e == nil || e.path == nil {
		return nil
	}
	path := e.path
	e.path = nil
	return errors.Join(path.Close(), e.state.Close())
}

// takeOver has the path go on while the Relay opens the pinned state.
func (r *Relay) takeOver(e *Early) {
	r.early = e
	if e.path == nil {
		return
	}
	r.opts.Kept = nil
	r.opts.Loader.Early = e.state
	e.state.GiveUp = r.giveUpEarly
}

// giveUpEarly stops the path, as a killed process would: packets wait in its rings until the control loop opens it.
func (r *Relay) giveUpEarly() (err error) {
	e := r.early
	if e.path == nil {
		return nil
	}
	r.log.Info("the path fanout stops until the daemon has started")
	r.opts.Kept, err = e.path.HandOver()
	return errors.Join(err, e.Close())
}

// take returns the path for the control loop; nil if there is none.
func (e *Early) take() (path userPath, rules []flow.Flow) {
	if e.path == nil {
		return nil, nil
	}
	path = e.path
	e.path = nil
	return path, e.rules
}

// keepRules has the rules of the path fanout kept for a process that follows this one should it be killed. It returns
// when it wants to be called again.
func (r *Relay) keepRules() time.Duration {
	path, ok := r.tables.paths[flow.PathFanout].path.(interface {
		KeepRules(state func() (uint32, error)) (kept bool, again time.Duration)
	})
	again := idle
	kept := false
	if ok {
		kept, again = path.KeepRules(r.loader.StateID)
	}
	if kept != r.standby && r.opts.Standby != nil {
		r.standby = kept
		if kept {
			r.loader.ReleaseFirst()
		}
		r.opts.Standby(kept)
	}
	return again
}

// Prepare does what Resume would do first, without anything of a process that has ended: for one that waits for its end.
func Prepare() { forward.PrepareFanout() }
