package relay

import (
	"errors"
	"fmt"
	"time"

	"xdpcast/internal/network"
	"xdpcast/internal/plan"
)

const (
	// recheck is how long to wait before what the kernel refused is tried again.
	recheck = time.Second
	// observePause is how often all of the kernel's state is looked at although nothing is
	// announced. Where that takes long, it takes no more than its share of the time, up to
	// so many pauses.
	observePause  = 3 * time.Second
	observeShare  = 50
	observePauses = 20
	// maxRounds bounds how often one reconcile plans and prepares until nothing changes any
	// more. Two or three are usual; what is not settled then is left to the next one.
	maxRounds = 16
	// idle is longer than anything waits for.
	idle = time.Hour
)

// What a warning can be about that the next try may cure.
const (
	aboutNetwork    = "network"
	aboutKernel     = "kernel"
	aboutNeighbours = "neighbours"
	aboutOwn        = "own addresses"
	aboutOffloads   = "vlan offload"
	aboutGroups     = "memberships"
	aboutPinned     = "pinned state"
	aboutRefusals   = "refused frames"
	aboutMroutes    = "multicast routes"
	aboutJoined     = "groups that programs have joined"
	aboutHistory    = "history"
	aboutFile       = "file"
	aboutQueriers   = "queriers"
)

// reconcile brings about what the rules and the network ask for, as far as can be. It may be
// called at any time and changes nothing that is right already.
//
// It plans, and does what comes before packets flow - programs on interfaces, tags, next
// hops - until the answers to that change the plan no more. Then the flows are
// published and their groups joined, in this order; after that what no flow needs any more is
// left, detached and forgotten. So no flow is in force without what it needs, and a shortage
// of one thing, such as of memberships, holds back no flow.
//
// The rules named by strict must not fail. Their groups are joined before anything is
// published. After an error the kernel holds the flows from before.
func (r *Relay) reconcile(strict []string) error {
	started := time.Now()
	defer func() {
		r.reconciled = time.Now()
		if told := r.opts.Reconciled; told != nil {
			told(r.reconciled.Sub(started))
		}
	}()
	for range maxRounds {
		if err := r.prepare(); err != nil {
			return err
		}
		if err := r.fault(strict); err != nil {
			return err
		}
		if len(strict) > 0 && r.memberships.join(r.plan, r.network, strict) {
			r.stale = true
			continue // fault says which
		}
		if changed, err := r.publish(strict); err != nil {
			return err
		} else if changed {
			r.stale = true
		}
		if r.memberships.join(r.plan, r.network, nil) {
			r.stale = true
		}
		if !r.stale {
			break
		}
	}
	r.letGo()
	r.states.tell(r.plan)
	r.changelog.round(r.plan, r.network, r.attachments.answers)
	return nil
}

// prepare plans until the plan and the answers to it agree.
func (r *Relay) prepare() error {
	for range maxRounds {
		now, err := r.watcher.Snapshot()
		if err != nil {
			r.warn(aboutNetwork, err)
			return err
		}
		delete(r.warnings, aboutNetwork)
		r.mirror(now)
		if now == r.network && !r.stale {
			return nil
		}
		if now != r.network {
			r.follow(now)
		}
		r.stale = false
		r.plan = r.planner.Plan(plan.World{Rules: r.rules, Network: now, Answers: r.answers()})
		r.watcher.Ask(r.plan.Hops)
		attached := r.attachments.apply(r.plan, now)
		tagged := r.tags.apply(r.plan, now)
		kept := r.neighbours.apply(r.plan, now)
		r.stale = attached || tagged || kept
	}
	return nil
}

func (r *Relay) answers() plan.Answers {
	return plan.Answers{
		Attached: r.attachments.answers, Tags: r.tags.answers, Neighbours: r.neighbours.refused,
		Joined: r.memberships.failed, Carried: r.tables.carried, Refused: r.tables.refusedFlows(), NoTransmit: r.refusals.answers,
	}
}

// fault says which of the named rules have failed.
func (r *Relay) fault(names []string) error {
	var errs []error
	for _, name := range names {
		if p := r.plan.Rule(name); p != nil {
			if err := p.Fault(); err != nil {
				errs = append(errs, fmt.Errorf("rule %s: %w", name, err))
			}
		}
	}
	return errors.Join(errs...)
}

// follow takes up another snapshot: what was held on the interfaces that have gone is
// let go, and what the kernel may have dropped with a life of an interface is looked for.
func (r *Relay) follow(now *network.Snapshot) {
	before := r.network
	r.network, r.overlaps = now, nil
	if !r.restored {
		r.restored = true
		r.memberships.restore(now)
	}
	changed := network.Diff(before, now)
	r.changelog.neighbours(before, now, changed.Hops)
	if len(changed.Links) == 0 && !changed.Own {
		return
	}
	r.tables.refresh = true // devices that are there again are opened again
	r.tables.retryRefused()
	reborn := false
	for _, old := range before.Links() {
		if !changed.Indexes[old.Index] {
			continue
		}
		switch link := now.ByIndex(old.Index); {
		case link == nil:
			r.forget(old)
		case link.LinkID != old.LinkID:
			r.memberships.reborn(old.LinkID, link.LinkID)
			r.attachments.reborn(old.LinkID, link.LinkID)
			reborn = true
		case link.Running() && !old.Running():
			r.memberships.refresh(link.LinkID)
			fallthrough
		default:
			r.tags.rename(old, link)
		}
	}
	if r.network != nil && len(before.Links()) > 0 {
		r.observeKernel(reborn)
	}
	if changed.Own {
		r.publishOwn()
	}
}

// forget lets go of what was held on an interface that is gone.
func (r *Relay) forget(link *network.Link) {
	r.memberships.drop(link.LinkID)
	r.attachments.forget(link.LinkID)
	r.neighbours.drop(link.LinkID)
	if err := r.loader.Detach(link.Index); err != nil {
		r.log.Warn("detach from an interface that is gone", "interface", link.Name, "error", err)
	}
	r.log.Info("interface is gone", "interface", link.Name, "index", link.Index)
}

// publishOwn gives the loop check the addresses of this host.
func (r *Relay) publishOwn() {
	r.warnUnless(aboutOwn, r.loader.SetOwnAddresses(r.network.Own()))
	r.publishMACs()
}

// observeIfDue looks at everything when it is time.
func (r *Relay) observeIfDue() {
	if time.Until(r.observeAt()) > 0 {
		return
	}
	started := time.Now()
	r.watcher.Resync()
	r.observeKernel(false)
	r.warnUnless(aboutNeighbours, r.neighbours.observe())
	r.tags.again()
	_, err := r.refusals.observe(r.plan, r.network)
	r.warnUnless(aboutRefusals, err)
	queriers, err := r.loader.Queriers()
	r.warnUnless(aboutQueriers, err)
	if err == nil {
		r.changelog.heard(queriers, r.network)
	}
	r.publishOwn()
	r.stale = true // the reconcilers look again
	r.observed = time.Now()
	r.observing = r.observed.Sub(started)
	r.tellObserved()
}

// tellObserved tells a test that everything was looked at.
func (r *Relay) tellObserved() {
	if r.opts.observed != nil && r.memberships.look == nil {
		r.opts.observed()
	}
}

func (r *Relay) observeAt() time.Time {
	return r.observed.Add(max(r.opts.observeEvery, min(observeShare*r.observing, observePauses*r.opts.observeEvery)))
}

// observeKernel looks at what the kernel holds for the loader and the memberships: at
// these in any case, or when asking is cheap enough now.
func (r *Relay) observeKernel(memberships bool) {
	o := r.loader.Observe()
	for _, a := range o.Lost {
		r.log.Warn("the relay program is not on the interface any more", "interface", a.Interface, "index", a.Index)
		r.changelog.programLost(a.Interface)
		r.stale = true
	}
	for _, repaired := range o.Repaired {
		r.log.Warn("repaired", "what", repaired)
	}
	r.warnUnless(aboutPinned, errors.Join(o.Errs...))
	r.warnUnless(aboutGroups, r.memberships.observe(memberships))
}

// publish brings the flows of the plan into force, and says whether that changes what the plan
// is made from. A flow that the kernel refuses is left out, and the others go in
// without it, unless its rule is one of those named by strict.
func (r *Relay) publish(strict []string) (changed bool, err error) {
	changed, err = r.tables.apply(r.plan, r.network.Own(), strict)
	r.warnUnless(aboutKernel, err)
	return changed, err
}

// letGo takes back what the plan does not need any more, after it is in force.
func (r *Relay) letGo() {
	if r.stale || r.warnings[aboutKernel] != "" {
		return // not settled: what seems needless may be needed yet
	}
	r.memberships.leave(r.plan)
	r.memberships.manager.Settle()
	r.attachments.detach(r.plan, r.network)
	r.warnUnless(aboutOffloads, r.tags.restore(r.plan, r.network))
	if err := r.neighbours.forget(r.plan); err != nil {
		r.warn(aboutNeighbours, err)
	}
	r.memberships.manager.Prune(func(ifname string) bool { return r.network.Link(ifname) != nil })
}

// wake says when something is due although nothing has happened.
func (r *Relay) wake() time.Duration {
	wake := min(r.watcher.Due(), time.Until(r.observeAt()), r.memberships.wake(), r.tables.wake(), r.attachments.wake(), r.pendingWake())
	failing := r.stale || r.tables.paths.pending() || len(r.neighbours.refused) > 0
	for _, about := range []string{aboutNetwork, aboutKernel, aboutOwn} {
		failing = failing || r.warnings[about] != ""
	}
	if failing {
		// From the last time, since whoever asks for states must not put it off.
		wake = min(wake, recheck-time.Since(r.reconciled))
	}
	return max(0, wake)
}

func (r *Relay) warn(about string, err error) {
	if r.warnings[about] != err.Error() {
		r.log.Warn("control loop", "about", about, "error", err)
	}
	r.warnings[about] = err.Error()
}

// warnUnless warns, or takes a warning back when there is no error.
func (r *Relay) warnUnless(about string, err error) {
	if err != nil {
		r.warn(about, err)
		return
	}
	delete(r.warnings, about)
}
