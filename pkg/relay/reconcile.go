package relay

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"xdpcast/pkg/loader"
)

// recheck is how long to wait before what is not active is looked at again. Most
// things announce themselves; the features of a device do not.
const recheck = time.Second

// idle is longer than anything waits for.
const idle = time.Hour

// What a warning can be about that the next try may cure.
const (
	aboutInterfaces = "interfaces"
	aboutKernel     = "kernel"
	aboutNeighbours = "neighbours"
	aboutOwn        = "own addresses"
	aboutOffloads   = "vlan offload"
)

// nextWake says when something is due although nothing has happened.
func (r *Relay) nextWake() time.Duration {
	if r.allDirty {
		return 0
	}
	wake := idle
	// From the last time, since whoever asks for states must not put it off.
	again := max(0, recheck-time.Since(r.reconciled))
	for _, w := range r.ordered {
		if !w.complete() {
			wake = again
			break
		}
	}
	for _, about := range []string{aboutKernel, aboutInterfaces, aboutNeighbours, aboutOwn} {
		if r.warnings[about] != "" {
			wake = again
		}
	}
	if r.paths.pending() {
		wake = again
	}
	for _, w := range r.wants {
		if w.failed != nil {
			wake = min(wake, max(0, time.Until(w.failed.next)))
		}
	}
	return wake
}

// heed does what the kernel's announcements call for. Those of routes and neighbours
// that change nothing for a rule cost no more than the question.
func (r *Relay) heed(n news) {
	changed := r.hops.refresh(n)
	if changed {
		r.dirtyUnicast()
	}
	if n.queues || n.lost {
		r.unsynced = r.unsynced || r.paths.busy() // a worker for each
	}
	if changed || n.links || n.queues || n.lost {
		_ = r.reconcile(nil)
	}
}

func (r *Relay) dirtyUnicast() {
	for _, w := range r.ordered {
		w.dirty = w.dirty || w.unicastOut()
	}
}

// unicastOut says whether an output needs a neighbour.
func (w *wantedRule) unicastOut() bool {
	for i := range w.rule.Out {
		if w.rule.Out[i].Unicast() {
			return true
		}
	}
	return false
}

// touches says whether a rule depends on one of the interfaces named.
func (w *wantedRule) touches(changed map[string]bool) bool {
	touched := func(name string) bool {
		if !isPattern(name) {
			return changed[name]
		}
		for c := range changed {
			if matches(name, c) {
				return true
			}
		}
		return false
	}
	if touched(w.rule.In.Interface) || !w.rule.In.Multicast() {
		return true // whether a unicast address is the host's depends on all of them
	}
	for i := range w.rule.Out {
		if o := &w.rule.Out[i]; touched(o.Interface) || o.Unicast() {
			return true
		}
	}
	return false
}

// reconcile makes the kernel hold what is wanted, as far as the interfaces allow.
// It may be called at any time and changes nothing that is right already: only rules
// that are new, incomplete, or touched by a change are resolved again.
//
// The order is that of a rule's life: join, then publish; unpublish, then leave.
//
// The rules named by strict must not fail. After an error the kernel holds the
// rules from before.
func (r *Relay) reconcile(strict []string) error {
	defer func() { r.reconciled = time.Now() }()
	r.round++
	r.hops.round++
	if err := r.refreshInterfaces(); err != nil {
		r.warn(aboutInterfaces, err)
		return err
	}
	delete(r.warnings, aboutInterfaces)
	dirty, before := r.resolveDirty()
	r.unsynced = r.unsynced || r.paths.pending()
	r.attach(dirty)
	r.join(dirty)
	for i, w := range dirty {
		w.sum()
		w.dirty = false
		r.unsynced = r.unsynced || !sameInstances(before[i], w.instances)
	}
	if len(dirty) == 0 && !r.unsynced && r.warnings[aboutKernel] == "" {
		return nil // nor has anything become needless
	}
	if err := r.failed(strict); err != nil {
		return err
	}
	if err := r.sync(strict); err != nil {
		return err
	}
	r.leave()
	r.detach()
	r.sweepHops()
	r.logStates(dirty)
	return nil
}

// resolveDirty resolves the rules that need it, and returns them with the instances
// that they had.
func (r *Relay) resolveDirty() (dirty []*wantedRule, before [][]*instance) {
	for _, w := range r.ordered {
		if r.allDirty || w.dirty || !w.complete() {
			dirty = append(dirty, w)
			before = append(before, w.instances)
			r.resolve(w)
		}
	}
	r.allDirty = false
	return dirty, before
}

// failed says which of the named rules have failed.
func (r *Relay) failed(names []string) error {
	var errs []error
	for _, name := range names {
		if w := r.rules[name]; w.err != nil {
			errs = append(errs, fmt.Errorf("rule %s: %w", name, w.err))
		}
	}
	return errors.Join(errs...)
}

// logStates logs what has become of rules, where that has changed.
func (r *Relay) logStates(dirty []*wantedRule) {
	for _, w := range dirty {
		state := w.stateText()
		if state == w.logged {
			continue
		}
		isNew := w.logged == ""
		w.logged = state
		switch {
		case w.err != nil:
			r.log.Error("rule is not active", "rule", w.rule.Name, "state", w.state, "error", w.err)
		case w.reason != "":
			r.log.Warn("rule is not complete", "rule", w.rule.Name, "state", w.state, "reason", w.reason)
		case !isNew: // nothing to tell of 100,000 rules that are as they should be
			r.log.Info("rule is complete again", "rule", w.rule.Name)
		}
	}
}

// stateText is the state of a rule and of whatever of it is not active.
func (w *wantedRule) stateText() string {
	text := w.state
	if w.complete() {
		return text
	}
	for _, n := range w.instances {
		for _, s := range n.slots {
			text += " " + s.state
		}
	}
	return text
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

// refreshInterfaces reads the interfaces, forgets what was held on those that are
// gone, and marks the rules that depend on what has changed.
func (r *Relay) refreshInterfaces() error {
	now, err := readInterfaces()
	if err != nil {
		return err
	}
	r.refreshFeatures()
	changed := changedNames(r.interfaces, now)
	if len(changed) == 0 && r.warnings[aboutOwn] == "" {
		return nil
	}
	// Devices that are there again are opened again.
	r.unsynced = r.unsynced || r.paths.busy()
	there := make(map[int]*iface, len(now))
	for _, i := range now {
		there[i.index] = i
	}
	for _, old := range r.interfaces {
		switch i := there[old.index]; {
		case i == nil:
			r.forgetInterface(old)
		case i.running && !old.running:
			r.refreshMemberships(i)
		}
	}
	r.interfaces = now
	r.publishOwn()
	// The kernel does not tell of the routes that go with an interface or address.
	r.hops.refreshRoutes()
	for _, w := range r.ordered {
		w.dirty = w.dirty || w.touches(changed)
	}
	return nil
}

// publishOwn gives the loop check the addresses of this host, when they change.
func (r *Relay) publishOwn() {
	own := ownAddresses(r.interfaces)
	if r.ownKnown && slices.Equal(own, r.own) {
		return
	}
	r.own = own
	err := r.loader.SetOwnAddresses(own)
	r.ownKnown = err == nil
	r.warnUnless(aboutOwn, err)
}

func (r *Relay) forgetInterface(i *iface) {
	r.groups.DropInterface(i.index)
	for m := range r.wants {
		if m.index == i.index {
			delete(r.wants, m)
		}
	}
	if err := r.loader.Detach(i.index); err != nil {
		r.log.Warn("detach from an interface that is gone", "interface", i.name, "error", err)
	}
	r.hops.dropInterface(i.index)
	delete(r.keep, i.index)
	delete(r.attachErrs, i.index)
	delete(r.features, i.index)
	r.log.Info("interface is gone", "interface", i.name, "index", i.index)
}

// attach attaches the relay program to the interfaces of the rules, and completes
// the rules' outputs.
func (r *Relay) attach(dirty []*wantedRule) {
	a := r.newAttacher()
	for _, name := range r.opts.Interfaces {
		if err := a.ensure(name); err != nil {
			r.warn("interface "+name, err)
		}
	}
	// All before any output is asked for its features: a veth can send once its
	// peer, which may be another of ours, has a program.
	for _, w := range dirty {
		for _, n := range w.instances {
			if n.publish {
				a.instance(w, n)
			}
		}
	}
	a.retry()
	if a.added {
		r.refreshFeatures()
	}
	for _, w := range dirty {
		for _, n := range w.instances {
			if n.publish {
				r.resolveOutputs(&w.rule, n, a.attached[n.resolved.In.Index] == loader.ModeGeneric)
			}
		}
	}
}

// attacher attaches in one round, each interface once.
type attacher struct {
	*Relay
	attached map[int]loader.Mode
	tried    map[int]bool
	tags     map[string]error // interfaces made to leave VLAN tags in the frames
	added    bool
}

func (r *Relay) newAttacher() *attacher {
	a := &attacher{Relay: r, attached: map[int]loader.Mode{}, tried: map[int]bool{}, tags: map[string]error{}}
	for _, at := range r.loader.Attachments() {
		a.attached[at.Index] = at.Mode
	}
	return a
}

func (a *attacher) ensure(name string) error {
	i := a.interfaces[name]
	if i == nil || !i.ethernet {
		return nil
	}
	if _, ok := a.attached[i.index]; ok {
		return nil
	}
	if a.tried[i.index] {
		return a.attachErrs[i.index]
	}
	a.tried[i.index] = true
	at, err := a.loader.Attach(i.index, a.opts.Mode)
	if err != nil {
		a.attachErrs[i.index] = err
		return err
	}
	delete(a.attachErrs, i.index)
	a.attached[i.index], a.added = at.Mode, true
	return nil
}

// instance attaches to the interfaces of an instance.
func (a *attacher) instance(w *wantedRule, n *instance) {
	if err := a.ensure(n.in); err != nil {
		if !mayTap(&w.rule) {
			n.fail(err)
			return
		}
		n.noXDP = err
	}
	if w.rule.In.VLAN.ID != 0 {
		if err := a.showTags(n.in); err != nil {
			n.fail(err)
			return
		}
	}
	for i := range n.slots {
		// Another's program there does no harm: it lets the driver send, too.
		_ = a.ensure(n.slots[i].ifname)
	}
}

func (a *attacher) showTags(name string) error {
	err, ok := a.tags[name]
	if !ok {
		err = a.offloads.showTags(name)
		a.tags[name] = err
	}
	return err
}

// retry tries again what failed earlier, for rules that are complete without it.
func (a *attacher) retry() {
	for _, i := range a.interfaces {
		if a.attachErrs[i.index] != nil {
			_ = a.ensure(i.name)
		}
	}
}

// featuresOf asks the kernel once for each interface, and again when interfaces
// change.
func (r *Relay) featuresOf(index int) loader.Features {
	f, ok := r.features[index]
	if !ok {
		f = r.askFeatures(index)
		r.features[index] = f
	}
	return f
}

func (r *Relay) askFeatures(index int) loader.Features {
	f, err := loader.DeviceFeatures(index)
	if err != nil {
		r.log.Debug("features of a device", "index", index, "error", err)
	}
	return f
}

// refreshFeatures asks again, and has every rule resolved when something is
// different.
func (r *Relay) refreshFeatures() {
	for index, before := range r.features {
		if f := r.askFeatures(index); f != before {
			r.features[index] = f
			r.allDirty = true
		}
	}
}

// sync writes the resolved rules to the kernel. A rule that it refuses is failed,
// and the others go in without it, unless it is one of those named by strict.
func (r *Relay) sync(strict []string) error {
	for r.unsynced || r.warnings[aboutKernel] != "" {
		err := r.syncPaths()
		if err == nil {
			delete(r.warnings, aboutKernel)
			r.unsynced = false
			continue
		}
		names, cause := r.blame(err)
		if !r.refuse(names, cause, strict) {
			r.warn(aboutKernel, err)
			return err
		}
	}
	return nil
}

func (r *Relay) published() []loader.Rule {
	want := make([]loader.Rule, 0, len(r.ordered))
	for _, w := range r.ordered {
		for _, n := range w.instances {
			if n.publish {
				want = append(want, n.resolved)
			}
		}
	}
	return want
}

// refuse fails what a path does not take; false when nothing can be left out.
func (r *Relay) refuse(names []string, cause error, strict []string) bool {
	for _, name := range names {
		if w := r.ruleOf(name); w == nil || slices.Contains(strict, w.rule.Name) {
			return false
		}
	}
	failed := false
	for _, name := range names {
		w := r.ruleOf(name)
		for _, n := range w.instances {
			if n.publish && n.resolved.Name == name {
				n.fail(cause)
				w.sum()
				failed = true
			}
		}
	}
	return failed
}

// detach takes the program off interfaces that no rule names any more, and gives
// them back what was switched off for rules.
func (r *Relay) detach() {
	needed, tagged := r.neededInterfaces()
	for _, a := range r.loader.Attachments() {
		if needed[r.nameOf(a.Index)] || r.keep[a.Index] {
			continue
		}
		if err := r.loader.Detach(a.Index); err != nil {
			r.log.Warn("detach", "interface", a.Interface, "error", err)
			continue
		}
		r.log.Info("detached", "interface", a.Interface)
	}
	for index := range r.attachErrs {
		if !needed[r.nameOf(index)] {
			delete(r.attachErrs, index)
		}
	}
	r.warnUnless(aboutOffloads, r.offloads.restore(tagged))
}

// neededInterfaces returns the names of the interfaces that rules use, and of those
// where they match VLAN tags.
func (r *Relay) neededInterfaces() (needed, tagged map[string]bool) {
	needed, tagged = map[string]bool{}, map[string]bool{}
	for _, name := range r.opts.Interfaces {
		needed[name] = true
	}
	for _, w := range r.ordered {
		if !isPattern(w.rule.In.Interface) {
			needed[w.rule.In.Interface] = true
		}
		for i := range w.rule.Out {
			if name := w.rule.Out[i].Interface; !isPattern(name) {
				needed[name] = true
			}
		}
		for _, n := range w.instances {
			needed[n.in] = true
			if w.rule.In.VLAN.ID != 0 {
				tagged[n.in] = true
			}
			for i := range n.slots {
				needed[n.slots[i].ifname] = true
			}
		}
	}
	return needed, tagged
}

// sweepHops lets go of neighbours that no rule needs any more.
func (r *Relay) sweepHops() {
	for _, w := range r.ordered {
		for _, n := range w.instances {
			for i := range n.slots {
				if hop := n.slots[i].hop; hop != nil {
					r.hops.use(hop)
				}
			}
		}
	}
	r.warnUnless(aboutNeighbours, r.hops.sweep())
}
