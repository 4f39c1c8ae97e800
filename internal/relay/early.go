package relay

import (
	"errors"
	"time"

	"xdpcast/internal/forward"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
)

// early is the path fanout while it goes on as in a process that was killed, with the rings and the rules that this has
// left, until the control loop knows better. Nothing of it is used once the loop has it.
type early struct {
	path  *forward.Fanout
	rules []flow.Flow
	state *loader.Early
}

// resumeEarly starts the path fanout with kept rings and rules, if there are any that fit: packets that the rings have
// no room for are lost until then, and reading everything else takes ten times as long.
func (r *Relay) resumeEarly() {
	kept := r.opts.Kept
	if kept == nil || r.opts.Predecessor != nil {
		return
	}
	started := time.Now()
	rules, err := kept.Rules()
	if err == nil {
		r.early, err = r.continueWith(kept, rules)
	}
	if err != nil {
		r.log.Info("the path fanout waits until the daemon has started", "cause", err)
		return
	}
	r.opts.Kept = nil
	r.opts.Loader.Early = r.early.state
	r.early.state.GiveUp = r.giveUpEarly
	r.log.Info("the path fanout goes on with the rules of the previous daemon", "rules", len(rules.Flows), "took", time.Since(started).Round(time.Microsecond))
}

func (r *Relay) continueWith(kept *forward.FanoutHandover, rules *forward.FanoutRules) (_ *early, err error) {
	e := &early{rules: rules.Flows}
	if e.state, err = loader.OpenEarly(r.opts.Loader, rules.State, rules.Counts); err != nil {
		return nil, err
	}
	opts := r.fanoutOptions(e.state)
	if opts.Inherited, err = kept.Clone(); err == nil {
		e.path, err = forward.ContinueFanout(opts, rules)
	}
	if err != nil {
		return nil, errors.Join(err, e.state.Close())
	}
	if err := kept.Close(); err != nil {
		r.log.Warn("close what the path has duplicates of", "error", err)
	}
	return e, nil
}

// giveUpEarly stops the path, as a killed process would: packets wait in its rings until the control loop opens it.
func (r *Relay) giveUpEarly() (err error) {
	e := r.early
	if e == nil {
		return nil
	}
	r.early = nil
	r.log.Info("the path fanout stops until the daemon has started")
	r.opts.Kept, err = e.path.HandOver()
	return errors.Join(err, e.path.Close(), e.state.Close())
}

// takeEarly returns the path for the control loop; nil if there is none.
func (r *Relay) takeEarly() (path userPath, rules []flow.Flow) {
	e := r.early
	if e == nil {
		return nil, nil
	}
	r.early = nil
	return e.path, e.rules
}

// closeEarly closes what the control loop has not taken.
func (r *Relay) closeEarly() error {
	if r.early == nil {
		return nil
	}
	return errors.Join(r.early.path.Close(), r.early.state.Close())
}

// keepRules has the rules of the path fanout kept for a process that follows this one should it be killed. It returns
// when it wants to be called again.
func (r *Relay) keepRules() time.Duration {
	if path, ok := r.tables.paths[flow.PathFanout].path.(interface {
		KeepRules(state func() (uint32, error)) time.Duration
	}); ok {
		return path.KeepRules(r.loader.StateID)
	}
	return idle
}
