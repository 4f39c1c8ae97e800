package relay

import (
	"errors"
	"net/netip"
	"slices"
	"time"

	"xdpcast/internal/forward"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
)

// userPath is the control loop's view of a path whose packets go through this process:
// *forward.Fanout and *forward.AFXDP. Tests inject faults in between.
type userPath interface {
	Sync(rules []flow.Flow, own []netip.Addr) error
	Close() error
}

// userPaths are these paths, by kind. Each is opened for its first rule.
type userPaths map[flow.Path]*openPath

type openPath struct {
	open  func() (userPath, error)
	path  userPath    // nil until there is a rule
	rules []flow.Flow // current rules of the path
}

func (r *Relay) newUserPaths() userPaths {
	path, rules := r.early.take()
	return userPaths{
		flow.PathFanout: {path: path, rules: rules, open: func() (userPath, error) {
			opts := r.early.fanoutOptions(r.opts, r.loader)
			opts.Inherited, r.opts.Kept = r.opts.Kept, nil
			if before := r.opts.Predecessor; before != nil {
				opts.Gate, before.Gate = before.Gate, nil
				opts.TakeOver = func() error { return before.Stop(flow.PathFanout) }
				opts.Inherited, before.Fanout = before.Fanout, nil
				opts.Suspend = func() error { return before.Suspend(SuspendFanout) }
				opts.Own = before.Own
				opts.Prepare = before.Prepare
			}
			var path *forward.Fanout
			var err error
			r.aside(func() { path, err = forward.OpenFanout(opts) })
			if err == nil {
				path.SetOwnMACs(r.macs)
			}
			return path, err
		}},
		flow.PathAFXDP: {open: func() (userPath, error) {
			opts := r.opts.AFXDP
			opts.Logger, opts.Loader, opts.Accounts, opts.Taps = r.log, r.loader, r.loader, r.early.taps
			opts.Priority, opts.Boost, opts.Place = r.opts.Priority, r.early.boost, r.opts.Place
			if before := r.opts.Predecessor; before != nil {
				opts.TakeOver = func() error { return before.Stop(flow.PathAFXDP) }
				opts.Inherited, before.AFXDP = before.AFXDP, nil
				opts.Suspend = func() error { return before.Suspend(SuspendAFXDP) }
				opts.Prepare = before.Prepare
			}
			return forward.OpenAFXDP(opts)
		}},
	}
}

// close stops the workers.
func (u userPaths) close() error {
	var errs []error
	for _, p := range u {
		if p.path != nil {
			errs = append(errs, p.path.Close())
			p.path, p.rules = nil, nil
		}
	}
	return errors.Join(errs...)
}

// leave stops the workers for another process that continues with their sockets, where it does.
func (u userPaths) leave() error {
	var errs []error
	for _, p := range u {
		if left, ok := p.path.(interface{ Leave() error }); ok {
			errs = append(errs, left.Leave())
			p.path, p.rules = nil, nil
		}
	}
	return errors.Join(append(errs, u.close())...)
}

// busy says whether some path has rules.
func (u userPaths) busy() bool {
	for _, p := range u {
		if len(p.rules) > 0 {
			return true
		}
	}
	return false
}

// pending says whether a path waits for something without notification, such as a queue held by
// another program: sync it again later.
func (u userPaths) pending() bool {
	for _, p := range u {
		if waits, ok := p.path.(interface{ Pending() bool }); ok && waits.Pending() {
			return true
		}
	}
	return false
}

// prepare gives each path its new rules in addition to its current ones.
func (u userPaths) prepare(want map[flow.Path][]flow.Flow, own []netip.Addr) error {
	for kind, p := range u {
		if err := p.sync(p.with(want[kind]), own); err != nil {
			return err
		}
	}
	return nil
}

// finish leaves each path only its new rules.
func (u userPaths) finish(want map[flow.Path][]flow.Flow, own []netip.Addr) error {
	leaving := false
	for kind, p := range u {
		leaving = leaving || len(p.rules) > len(want[kind])
	}
	if leaving {
		time.Sleep(drain) // for the rest of the rings
	}
	for kind, p := range u {
		if err := p.sync(want[kind], own); err != nil {
			return err
		}
	}
	return nil
}

// refresh makes the paths check their devices: they get no notification of interfaces that
// reappear, nor of new queues.
func (u userPaths) refresh(own []netip.Addr) error {
	for _, p := range u {
		if len(p.rules) > 0 {
			if err := p.sync(p.rules, own); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *openPath) sync(rules []flow.Flow, own []netip.Addr) error {
	if p.path == nil {
		if len(rules) == 0 {
			return nil
		}
		path, err := p.open()
		if err != nil {
			return err
		}
		p.path = path
	}
	if err := p.path.Sync(rules, own); err != nil {
		return err
	}
	p.rules = rules
	return nil
}

// with returns want plus the current rules missing from it.
func (p *openPath) with(want []flow.Flow) []flow.Flow {
	names := make(map[string]bool, len(want))
	inputs := make(map[flow.Input]bool, len(want))
	for i := range want {
		names[want[i].Name] = true
		inputs[want[i].In.Key()] = true
	}
	all := slices.Clone(want)
	for _, r := range p.rules {
		if !names[r.Name] && !inputs[r.In.Key()] {
			all = append(all, r)
		}
	}
	return all
}

// statsOf reads the counters of rules on all paths; nil names mean all rules.
func (r *Relay) statsOf(names []string, all bool) (stats loader.Stats, err error) {
	if all {
		stats, err = r.loader.Stats()
	} else {
		stats, err = r.loader.StatsOf(names)
	}
	return stats, err
}

// forKernel converts a flow for the kernel's tables. For a rule of the fanout path, they only say
// that its packets pass: its outputs may be on devices to which no program can send.
func forKernel(f *flow.Flow) *flow.Flow {
	if f.Path != flow.PathFanout {
		return f
	}
	passed := *f
	passed.Out = slices.Clone(f.Out)
	for i := range passed.Out {
		passed.Out[i].Ready, passed.Out[i].Blocked = false, flow.NotReady
	}
	return &passed
}
