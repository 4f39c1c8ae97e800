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

// userPath is what the control loop needs of a path whose packets go through this
// process: *forward.Fanout and *forward.AFXDP. Tests put faults between the two.
type userPath interface {
	Sync(rules []flow.Flow, own []netip.Addr) error
	Close() error
}

// userPaths are these paths, by kind. Each is opened for its first rule.
type userPaths map[flow.Path]*openPath

type openPath struct {
	open  func() (userPath, error)
	path  userPath    // nil until there is a rule
	rules []flow.Flow // that the path has now
}

func (r *Relay) newUserPaths() userPaths {
	return userPaths{
		flow.PathFanout: {open: func() (userPath, error) {
			opts := forward.FanoutOptions{Logger: r.log, Workers: r.opts.Workers, Accounts: r.loader, Taps: &r.taps}
			if before := r.opts.Predecessor; before != nil {
				opts.Gate, before.Gate = before.Gate, nil
				opts.TakeOver = func() error { return before.Stop(flow.PathFanout) }
			}
			path, err := forward.OpenFanout(opts)
			if err == nil {
				path.SetOwnMACs(r.macs)
			}
			return path, err
		}},
		flow.PathAFXDP: {open: func() (userPath, error) {
			opts := r.opts.AFXDP
			opts.Logger, opts.Loader, opts.Accounts, opts.Taps = r.log, r.loader, r.loader, &r.taps
			if before := r.opts.Predecessor; before != nil {
				opts.TakeOver = func() error { return before.Stop(flow.PathAFXDP) }
			}
			return forward.OpenAFXDP(opts)
		}},
	}
}

// close ends the workers.
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

// busy says whether some path has rules.
func (u userPaths) busy() bool {
	for _, p := range u {
		if len(p.rules) > 0 {
			return true
		}
	}
	return false
}

// pending says whether a path waits for something that nobody announces, such as a
// queue that another program holds: it is to be synced again.
func (u userPaths) pending() bool {
	for _, p := range u {
		if waits, ok := p.path.(interface{ Pending() bool }); ok && waits.Pending() {
			return true
		}
	}
	return false
}

// prepare gives each path its rules besides those that it has.
func (u userPaths) prepare(want map[flow.Path][]flow.Flow, own []netip.Addr) error {
	for kind, p := range u {
		if err := p.sync(p.with(want[kind]), own); err != nil {
			return err
		}
	}
	return nil
}

// finish gives each path its rules alone.
func (u userPaths) finish(want map[flow.Path][]flow.Flow, own []netip.Addr) error {
	leaving := false
	for kind, p := range u {
		leaving = leaving || len(p.rules) > len(want[kind])
	}
	if leaving {
		time.Sleep(drain) // what the rings still hold goes out
	}
	for kind, p := range u {
		if err := p.sync(want[kind], own); err != nil {
			return err
		}
	}
	return nil
}

// refresh has the paths look at their devices again: what comes with an interface that is there
// again, and with queues, nobody gives them.
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

// with returns want and those of the rules in force that are not in it.
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

// statsOf reads the counters of rules on all paths; nil names are all rules.
func (r *Relay) statsOf(names []string, all bool) (stats loader.Stats, err error) {
	if all {
		stats, err = r.loader.Stats()
	} else {
		stats, err = r.loader.StatsOf(names)
	}
	return stats, err
}

// forKernel is a flow as the kernel's tables have it. Those of a rule of the fanout
// path only say that its packets pass: its outputs may be on devices that no program
// can send to.
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
