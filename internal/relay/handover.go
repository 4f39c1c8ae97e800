package relay

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"xdpcast/internal/forward"
	"xdpcast/internal/network"
	"xdpcast/internal/plan"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/membership"
)

// Handed is what a paused relay hands over to its successor process.
type Handed struct {
	// Memberships are the helper sockets: the kernel leaves no group while a process has them open.
	Memberships []membership.Kept
	// Locks exclude other writers while a process has them open.
	Locks loader.Locks
	// Gate is the gate of the fanout path; nil if the path is not open.
	Gate *ebpf.Map
	// AFXDP are the sockets of the AF_XDP path, and Fanout the rings of the fanout path; nil if it is not
	// open.
	AFXDP  *forward.AFXDPHandover
	Fanout *forward.FanoutHandover
	// Stop forwards the packets already received on a user-space path, whose later ones are the
	// successor's. It closes the AF_XDP path, since queues have one owner. path is its name, or
	// SuspendAFXDP or SuspendFanout.
	Stop func(path string) error
	// End closes all user-space paths: the successor is ready.
	End func() error
}

// Arguments of Handed.Stop, besides the names of paths: they leave the sockets of the AF_XDP path, or the
// rings of the fanout path, to the successor, with the packets in them.
const (
	SuspendAFXDP  = "afxdp.suspend"
	SuspendFanout = "fanout.suspend"
)

// Close closes this process's descriptors, of which the successor has copies.
func (h *Handed) Close() error {
	errs := []error{h.Locks.Close(), h.AFXDP.Close(), h.Fanout.Close()}
	for _, d := range h.Memberships {
		errs = append(errs, unix.Close(d.FD))
	}
	if h.Gate != nil {
		errs = append(errs, h.Gate.Close())
	}
	return errors.Join(errs...)
}

// Predecessor is the receiving side of Handed, except memberships and locks, which have their own
// options.
type Predecessor struct {
	Gate   *ebpf.Map               // nil: none; owned by the relay
	AFXDP  *forward.AFXDPHandover  // nil: none; owned by the relay
	Fanout *forward.FanoutHandover // nil: none; owned by the relay
	Stop   func(flow.Path) error
	// Suspend leaves the sockets of the AF_XDP path to this process, or the rings of the fanout path: what
	// is SuspendAFXDP or SuspendFanout.
	Suspend func(what string) error
	// Own says that this is the process itself, taking back what it handed over to one that has ended.
	Own bool
	// Prepare calls a function that prepares to take over, such as by planning: beside that process, which still
	// forwards, and so with a low priority. From the first Stop or Suspend on it just calls it: nothing that
	// has taken over may wait for a thread of low priority. Nil: likewise.
	Prepare func(do func())
}

// aside calls do as Predecessor.Prepare does.
func (r *Relay) aside(do func()) {
	if p := r.opts.Predecessor; p != nil && p.Prepare != nil {
		p.Prepare(do)
		return
	}
	do()
}

// HandOver calls start to bring up a successor process. The control loop pauses until start
// returns: nothing is written, while the user-space paths keep running until they are stopped.
// Without an error Run then ends, and leaves everything in the kernel. After an error this relay
// resumes like a starting daemon: it reads back the kernel's state, replaces programs of another
// release with its own, and continues.
func (r *Relay) HandOver(ctx context.Context, start func(*Handed) error) error {
	return r.do(ctx, func() error {
		r.tidy.Wait()
		r.loader.Account().Freeze()
		handed, err := r.hand()
		if err != nil {
			return err
		}
		r.opts.Events.Suspend()
		err = start(handed)
		if err == nil {
			r.handedOver = true
			return handed.Close()
		}
		r.opts.Events.Resume()
		return errors.Join(err, r.takeBack(handed))
	})
}

// drainPatience is longer than rings delay packets.
const drainPatience = 200 * time.Millisecond

// HandedOver says, after Run has ended, whether a successor has taken over.
func (r *Relay) HandedOver() bool { return r.handedOver }

func (r *Relay) hand() (h *Handed, err error) {
	paths := r.tables.paths
	h = &Handed{End: paths.leave, Stop: func(path string) error {
		switch path {
		case SuspendAFXDP:
			if p, ok := paths[flow.PathAFXDP].path.(interface {
				Suspend(*forward.AFXDPHandover) error
			}); ok {
				return p.Suspend(h.AFXDP)
			}
			return errors.New("the AF_XDP path is not open")
		case SuspendFanout:
			switch p := paths[flow.PathFanout].path.(type) {
			case nil:
				return nil // closed by End
			case interface{ Suspend() error }:
				return p.Suspend()
			}
			return errors.New("the fanout path cannot be suspended")
		}
		var p *openPath
		for kind, of := range paths {
			if PathName(kind) == path {
				p = of
			}
		}
		switch {
		case p == nil:
			return fmt.Errorf("no path %q of this process", path)
		case p.path == nil:
			return nil
		}
		if gated, ok := p.path.(interface{ Drain(time.Duration) bool }); ok {
			if !gated.Drain(drainPatience) {
				return fmt.Errorf("the rings of the fanout path are not empty after %v", drainPatience)
			}
			return nil
		}
		open := p.path
		p.path, p.rules = nil, nil
		errs := []error{open.Close()}
		if path == PathName(flow.PathAFXDP) { // a queue is bound until all descriptors are closed
			errs = append(errs, h.AFXDP.Close())
			h.AFXDP = nil
		}
		return errors.Join(errs...)
	}}
	if h.Memberships, err = r.memberships.manager.Duplicates(); err == nil {
		h.Locks, err = r.loader.Locks()
	}
	if gated, ok := paths[flow.PathFanout].path.(interface{ Gate() (*ebpf.Map, error) }); ok && err == nil {
		h.Gate, err = gated.Gate()
	}
	if fanout, ok := paths[flow.PathFanout].path.(interface {
		HandOver() (*forward.FanoutHandover, error)
	}); ok && err == nil {
		var failed error
		if h.Fanout, failed = fanout.HandOver(); failed != nil {
			r.log.Warn("the next daemon opens rings of its own for the fanout path", "error", failed)
		}
	}
	if afxdp, ok := paths[flow.PathAFXDP].path.(interface {
		HandOver() (*forward.AFXDPHandover, error)
	}); ok && err == nil {
		var failed error
		if h.AFXDP, failed = afxdp.HandOver(); failed != nil {
			r.log.Warn("the next daemon opens AF_XDP sockets of its own", "error", failed)
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("hand over: %w", err), h.Close())
	}
	return h, nil
}

// takeBack reopens what the other process may have changed. The open user-space paths keep running
// until the reopened ones take over, as from another process.
func (r *Relay) takeBack(handed *Handed) error {
	before := r.kernel
	r.kernel = kernel{}
	groups := r.opts.Membership
	groups.Kept = handed.Memberships
	// The groups of the fanout path may have been suspended, or used by the other process: this one
	// continues with them either way.
	r.opts.Predecessor = &Predecessor{
		Gate: handed.Gate, Fanout: handed.Fanout, Suspend: handed.Stop, Own: true,
		Stop: func(path flow.Path) error { return handed.Stop(PathName(path)) },
	}
	if err := r.openKernel(groups, handed.Locks); err != nil {
		return errors.Join(fmt.Errorf("take over again: %w", err), before.close())
	}
	r.plan, r.network, r.stale, r.overlaps = &plan.Plan{}, network.NewSnapshot(nil, nil), true, nil
	r.restored, r.macsKnown = false, false
	r.adopt()
	_ = r.reconcile(nil) // errors are logged, shown and retried
	if err := before.close(); err != nil {
		r.log.Warn("close what was handed over", "error", err)
	}
	r.followed()
	r.keepMirror()
	return nil
}

// followed is called once this process has taken over and runs alone.
func (r *Relay) followed() {
	if kept := r.opts.Kept; kept != nil { // no rule takes the path
		r.opts.Kept = nil
		if err := kept.Discard(r.opts.Keeper); err != nil {
			r.log.Warn("close the rings of the previous daemon", "error", err)
		}
	}
	before := r.opts.Predecessor
	if before == nil {
		return
	}
	r.opts.Predecessor = nil
	err := r.loader.Account().Refresh()
	if before.Gate != nil {
		err = errors.Join(err, before.Gate.Close())
	}
	err = errors.Join(err, before.AFXDP.Close(), before.Fanout.Discard(r.opts.Keeper))
	if err != nil {
		r.log.Warn("take over the previous daemon's counters", "error", err)
	}
}
