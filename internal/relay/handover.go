package relay

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"xdpcast/internal/network"
	"xdpcast/internal/plan"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/membership"
)

// Handed is what a relay that rests hands to the process that takes over from it.
type Handed struct {
	// Memberships hold what is joined: the kernel leaves nothing as long as a process has them open.
	Memberships []membership.Kept
	// Locks keep other writers out as long as a process has them open.
	Locks loader.Locks
	// Gate is that of the fanout path; nil when the path is not open.
	Gate *ebpf.Map
	// Stop forwards what came on a user-space path, since the other process is to have its packets
	// now. That of AF_XDP is closed, since queues have one owner. The path is given by its name.
	Stop func(path string) error
	// End closes all user-space paths: the other process is ready.
	End func() error
}

// Close closes the descriptors, which the other process has, too.
func (h *Handed) Close() error {
	errs := []error{h.Locks.Close()}
	for _, d := range h.Memberships {
		errs = append(errs, unix.Close(d.FD))
	}
	if h.Gate != nil {
		errs = append(errs, h.Gate.Close())
	}
	return errors.Join(errs...)
}

// Predecessor is the other side of Handed, but for memberships and locks, which have their own
// options.
type Predecessor struct {
	Gate *ebpf.Map // nil: there is none. It is owned.
	Stop func(flow.Path) error
}

// HandOver has start bring another process into this one's place. The control loop rests until
// start returns: nothing is written, while the user-space paths go on until they are stopped.
// Without an error Run then ends, and leaves everything in the kernel as it is. After an error
// this relay takes its place again, as a daemon does that starts: it reads back what the kernel holds,
// puts its own programs in the place of another release's, and goes on.
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

// drainPatience is longer than rings hold packets back.
const drainPatience = 200 * time.Millisecond

// HandedOver says, when Run has ended, whether another process is in this one's place.
func (r *Relay) HandedOver() bool { return r.handedOver }

func (r *Relay) hand() (h *Handed, err error) {
	paths := r.tables.paths
	h = &Handed{End: paths.close, Stop: func(path string) error {
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
		return open.Close()
	}}
	if h.Memberships, err = r.memberships.manager.Duplicates(); err == nil {
		h.Locks, err = r.loader.Locks()
	}
	if gated, ok := paths[flow.PathFanout].path.(interface{ Gate() (*ebpf.Map, error) }); ok && err == nil {
		h.Gate, err = gated.Gate()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("hand over: %w", err), h.Close())
	}
	return h, nil
}

// takeBack opens anew what the other process may have changed. The user-space paths that are open
// go on until those opened anew take over from them, as those of another process would.
func (r *Relay) takeBack(handed *Handed) error {
	before := r.kernel
	r.kernel = kernel{}
	groups := r.opts.Membership
	groups.Kept = handed.Memberships
	r.opts.Predecessor = &Predecessor{Gate: handed.Gate, Stop: func(path flow.Path) error { return handed.Stop(PathName(path)) }}
	if err := r.openKernel(groups, handed.Locks); err != nil {
		return errors.Join(fmt.Errorf("take over again: %w", err), before.close())
	}
	r.plan, r.network, r.stale, r.overlaps = &plan.Plan{}, network.NewSnapshot(nil, nil), true, nil
	r.restored, r.macsKnown = false, false
	r.adopt()
	_ = r.reconcile(nil) // what is wrong is logged, shown, and tried again
	if err := before.close(); err != nil {
		r.log.Warn("close what was handed over", "error", err)
	}
	r.followed()
	r.keepMirror()
	return nil
}

// followed says that this process has taken over, and is on its own now.
func (r *Relay) followed() {
	before := r.opts.Predecessor
	if before == nil {
		return
	}
	r.opts.Predecessor = nil
	err := r.loader.Account().Refresh()
	if before.Gate != nil {
		err = errors.Join(err, before.Gate.Close())
	}
	if err != nil {
		r.log.Warn("take over what the daemon before counted", "error", err)
	}
}
