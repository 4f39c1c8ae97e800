package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"xdpcast/internal/network"
	"xdpcast/internal/plan"
)

const (
	// recheck is the delay before refused requests are retried.
	recheck = time.Second
	// observePause is the interval of reading all of the kernel's state without a notification. If
	// that is slow, the interval grows so that reading takes only its share of the time, up to a
	// maximum.
	observePause  = 3 * time.Second
	observeShare  = 50
	observePauses = 20
	// maxRounds limits how often one reconcile plans and prepares until nothing changes. Two or
	// three are usual; the rest is left to the next reconcile.
	maxRounds = 16
	// idle is longer than any wait.
	idle = time.Hour
)

// Subjects of warnings that the next attempt may clear.
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
	aboutSaved      = "saved rules"
)

// reconcile makes the kernel match the rules and the network, as far as possible. It may be called
// at any time and changes nothing that is already correct.
//
// It plans, and does what must precede the packets - programs on interfaces, tags, next hops -
// until the answers no longer change the plan. Then it publishes the flows and joins their groups,
// in this order; finally it leaves, detaches and forgets what no flow needs any more. So no flow is
// published without its prerequisites, and a shortage of one resource, such as memberships, holds
// back no flow.
//
// The rules named by strict must not fail. Their groups are joined before anything is published.
// After an error the kernel still holds the previous flows.
func (r *Relay) reconcile(strict []string) error {
	started := time.Now()
	defer func() {
		r.reconciled = time.Now()
		if told := r.opts.Reconciled; told != nil {
			told(r.reconciled.Sub(started))
		}
	}()
	for range maxRounds {
		var err error
		if r.aside(func() { err = r.prepare() }); err != nil {
			return err
		}
		planned := !r.stale // else the rules are others by now
		if err := r.fault(strict); err != nil {
			return err
		}
		if len(strict) > 0 && r.memberships.join(r.plan, r.network, strict) {
			r.stale = true
			continue // fault says which
		}
		joined := r.memberships.joinAhead(r.plan, r.network)
		changed, err := r.publish(strict)
		if joined(); err != nil {
			return err
		}
		r.stale = r.stale || changed
		if planned {
			r.releaseRoutes()
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

// prepare plans until the plan and its answers agree.
func (r *Relay) prepare() error {
	for round := range maxRounds {
		if round > 0 && !r.stale && !r.watcher.Concerns(r.uses) {
			r.watcher.Remind()
			return nil // other interfaces may come for ever
		}
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
		r.attachFirst(now)
		r.plan = r.planner.Plan(plan.World{Rules: r.rules, Interfaces: r.mroutes.vifs(), Network: now, Answers: r.answers()})
		r.tables.planned()
		if r.ready && r.plan.Planned() >= manyEdits {
			r.tidyUp() // of the plan before
		}
		r.watcher.Ask(r.plan.Hops)
		attached := r.attachments.apply(r.plan, now)
		tagged := r.tags.apply(r.plan, now)
		kept := r.neighbours.apply(r.plan, now)
		r.stale = attached || tagged || kept
	}
	return nil
}

// attachFirst attaches the program to the interfaces of very many rules before their first plan: if
// that had to be made again with the answers, it would take twice the time. One rule for each
// interface and each use of it is enough to know where.
func (r *Relay) attachFirst(now *network.Snapshot) {
	if len(r.plan.Rules) > 0 || len(r.rules) < manyEdits {
		return
	}
	type use struct {
		name   string
		tagged bool
	}
	seen := map[use]bool{}
	var some []*plan.Rule
	for _, rule := range r.rules {
		first := false
		see := func(name string, tagged bool) {
			first = first || !seen[use{name, tagged}]
			seen[use{name, tagged}] = true
		}
		for leg := range rule.InputCount() {
			in := rule.Leg(leg).In
			see(in.Interface, in.VLAN.ID != 0)
		}
		for i := range rule.Out {
			see(rule.Out[i].Interface, false)
		}
		if first {
			some = append(some, rule)
		}
	}
	p := plan.Make(plan.World{Rules: some, Interfaces: r.mroutes.vifs(), Network: now, Answers: r.answers()}, r.planOptions())
	r.attachments.apply(p, now)
	r.tags.apply(p, now)
}

func (r *Relay) answers() plan.Answers {
	return plan.Answers{
		Attached: r.attachments.answers, Tags: r.tags.answers, Neighbours: r.neighbours.refused,
		Joined: r.memberships.failed, Carried: r.tables.carried, Recarried: r.tables.recarried, Refused: r.tables.refusedFlows(), NoTransmit: r.refusals.answers,
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

// follow switches to a new snapshot: it drops the state of removed interfaces, and checks for state
// that the kernel may have dropped with an interface.
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
	r.tables.refresh = true // devices that reappeared are opened again
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

// forget drops the state of a removed interface.
func (r *Relay) forget(link *network.Link) {
	r.memberships.drop(link.LinkID)
	r.attachments.forget(link.LinkID)
	r.neighbours.drop(link.LinkID)
	if err := r.loader.Detach(link.Index); err != nil {
		r.log.Warn("detach from a removed interface", "interface", link.Name, "error", err)
	}
	level := slog.LevelDebug
	if r.uses(link.Index) {
		level = slog.LevelInfo
	}
	r.log.Log(context.Background(), level, "interface is gone", "interface", link.Name, "index", link.Index)
}

// publishOwn passes the addresses of this host to the loop check.
func (r *Relay) publishOwn() {
	r.warnUnless(aboutOwn, r.loader.SetOwnAddresses(r.network.Own()))
	r.publishMACs()
}

// observeIfDue reads all of the kernel's state when that is due.
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
	r.resaveIfDue()
	r.stale = true // the reconcilers check again
	r.observed = time.Now()
	r.observing = r.observed.Sub(started)
	r.tellObserved()
}

// tellObserved notifies a test that everything was read.
func (r *Relay) tellObserved() {
	if r.opts.observed != nil && r.memberships.look == nil {
		r.opts.observed()
	}
}

func (r *Relay) observeAt() time.Time {
	return r.observed.Add(max(r.opts.observeEvery, min(observeShare*r.observing, observePauses*r.opts.observeEvery)))
}

// observeKernel reads the kernel's state of the loader and the memberships: of the latter only if
// requested, or if it is cheap now.
func (r *Relay) observeKernel(memberships bool) {
	o := r.loader.Observe()
	for _, a := range o.Lost {
		r.log.Warn("the relay program is no longer on the interface", "interface", a.Interface, "index", a.Index)
		r.changelog.programLost(a.Interface)
		r.stale = true
	}
	for _, repaired := range o.Repaired {
		r.log.Warn("repaired", "what", repaired)
	}
	r.warnUnless(aboutPinned, errors.Join(o.Errs...))
	r.warnUnless(aboutGroups, r.memberships.observe(memberships))
}

// publish publishes the flows of the plan, and returns whether that changes the plan's inputs. A
// flow that the kernel refuses is left out, and the others are published without it, unless strict
// names its rule.
func (r *Relay) publish(strict []string) (changed bool, err error) {
	changed, err = r.tables.apply(r.plan, r.network.Own(), strict)
	r.warnUnless(aboutKernel, err)
	return changed, err
}

// letGo releases what the plan no longer needs, once it is published.
func (r *Relay) letGo() {
	if r.stale || r.warnings[aboutKernel] != "" {
		return // not settled: what seems unneeded may still be needed
	}
	r.memberships.leave(r.plan)
	r.memberships.manager.Settle()
	if !r.ending {
		r.attachments.detach(r.plan, r.network)
	}
	r.warnUnless(aboutOffloads, r.tags.restore(r.plan, r.network))
	if err := r.neighbours.forget(r.plan); err != nil {
		r.warn(aboutNeighbours, err)
	}
	r.memberships.manager.Prune(func(ifname string) bool { return r.network.Link(ifname) != nil })
}

// wake is the time until something is due without an event.
func (r *Relay) wake() time.Duration {
	wake := min(r.watcher.Due(), time.Until(r.observeAt()), r.pace.wake(), r.memberships.wake(), r.tables.wake(), r.attachments.wake(), r.pendingWake())
	failing := r.stale || r.tables.paths.pending() || len(r.neighbours.refused) > 0
	for _, about := range []string{aboutNetwork, aboutKernel, aboutOwn} {
		failing = failing || r.warnings[about] != ""
	}
	if failing {
		// Measured from the last reconcile, so status requests cannot postpone it.
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

// warnUnless sets a warning, or clears it if err is nil.
func (r *Relay) warnUnless(about string, err error) {
	if err != nil {
		r.warn(about, err)
		return
	}
	delete(r.warnings, about)
}
