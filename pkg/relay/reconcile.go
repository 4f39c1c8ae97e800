package relay

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"xdpcast/pkg/control"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/rules"
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
)

// nextWake says when something is due although nothing has happened.
func (r *Relay) nextWake() time.Duration {
	wake := idle
	for _, w := range r.rules {
		if w.state != control.StateActive || w.reason != "" {
			wake = recheck
			break
		}
	}
	if r.warnings[aboutKernel] != "" || r.warnings[aboutInterfaces] != "" {
		wake = recheck
	}
	for _, w := range r.wants {
		if !w.joined {
			wake = min(wake, max(0, time.Until(w.next)))
		}
	}
	return wake
}

// reconcile makes the kernel hold what is wanted, as far as the interfaces allow.
// It may be called at any time and changes nothing that is right already.
//
// The order is that of a rule's life: join, then publish; unpublish, then leave.
//
// The rules named by strict must not fail. After an error the kernel holds the
// rules from before.
func (r *Relay) reconcile(strict []string) error {
	if err := r.refreshInterfaces(); err != nil {
		r.warn(aboutInterfaces, err)
		return err
	}
	delete(r.warnings, aboutInterfaces)
	ordered := r.orderedRules()
	for _, w := range ordered {
		r.resolve(w)
	}
	r.attach(ordered)
	r.join(ordered)
	if err := r.failed(strict); err != nil {
		return err
	}
	if err := r.sync(ordered, strict); err != nil {
		return err
	}
	r.leave()
	r.detach()
	r.logStates(ordered)
	return nil
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
func (r *Relay) logStates(ordered []*wantedRule) {
	for _, w := range ordered {
		state := w.state
		for _, o := range w.outputs {
			state += " " + o.state
		}
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

func (r *Relay) warn(about string, err error) {
	if r.warnings[about] != err.Error() {
		r.log.Warn("control loop", "about", about, "error", err)
	}
	r.warnings[about] = err.Error()
}

func (r *Relay) orderedRules() []*wantedRule {
	return slices.SortedFunc(maps.Values(r.rules), func(a, b *wantedRule) int {
		return cmp.Compare(a.rule.Name, b.rule.Name)
	})
}

// wantedRules returns the rules of all origins.
func (r *Relay) wantedRules() []rules.Rule {
	all := make([]rules.Rule, 0, len(r.rules))
	for _, w := range r.orderedRules() {
		all = append(all, w.rule)
	}
	return all
}

// refreshInterfaces reads the interfaces, and forgets what was held on those that
// are gone.
func (r *Relay) refreshInterfaces() error {
	now, err := readInterfaces()
	if err != nil {
		return err
	}
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
	return nil
}

func (r *Relay) forgetInterface(i *iface) {
	r.groups.DropInterface(i.index)
	for m, w := range r.wants {
		if m.Index == i.index {
			delete(r.wants, w.key())
		}
	}
	if err := r.loader.Detach(i.index); err != nil {
		r.log.Warn("detach from an interface that is gone", "interface", i.name, "error", err)
	}
	delete(r.keep, i.index)
	delete(r.attachErrs, i.index)
	r.log.Info("interface is gone", "interface", i.name, "index", i.index)
}

// attach attaches the relay program to the interfaces of the rules, and completes
// the rules' outputs.
func (r *Relay) attach(ordered []*wantedRule) {
	attached := map[int]loader.Attachment{}
	for _, a := range r.loader.Attachments() {
		attached[a.Index] = a
	}
	clear(r.attachErrs)
	ensure := func(name string) (loader.Attachment, error) {
		i := r.interfaces[name]
		if i == nil || !i.ethernet {
			return loader.Attachment{}, nil
		}
		if a, ok := attached[i.index]; ok {
			return a, nil
		}
		if err := r.attachErrs[i.index]; err != nil {
			return loader.Attachment{}, err
		}
		a, err := r.loader.Attach(i.index, r.opts.Mode)
		if err != nil {
			r.attachErrs[i.index] = err
			return a, err
		}
		attached[i.index] = a
		return a, nil
	}
	for _, name := range r.opts.Interfaces {
		if _, err := ensure(name); err != nil {
			r.warn("interface "+name, err)
		}
	}
	// All before any output is asked for its features: a veth can send once its
	// peer, which may be another of ours, has a program.
	for _, w := range ordered {
		if w.resolved == nil {
			continue
		}
		if _, err := ensure(w.rule.In.Interface); err != nil {
			w.fail(err)
			continue
		}
		for _, o := range w.rule.Out {
			// Another's program there does no harm: it lets the driver send, too.
			_, _ = ensure(o.Interface)
		}
	}
	features := r.featureCache()
	for _, w := range ordered {
		if w.resolved != nil {
			r.resolveOutputs(w, attached[w.resolved.In.Index].Mode == loader.ModeGeneric, features)
		}
	}
}

// featureCache asks the kernel once for each interface.
func (r *Relay) featureCache() func(index int) loader.Features {
	known := map[int]loader.Features{}
	return func(index int) loader.Features {
		f, ok := known[index]
		if !ok {
			var err error
			if f, err = loader.DeviceFeatures(index); err != nil {
				r.log.Debug("features of a device", "index", index, "error", err)
			}
			known[index] = f
		}
		return f
	}
}

// sync writes the resolved rules to the kernel. A rule that it refuses is failed,
// and the others go in without it, unless it is one of those named by strict.
func (r *Relay) sync(ordered []*wantedRule, strict []string) error {
	for {
		want := make([]loader.Rule, 0, len(ordered))
		for _, w := range ordered {
			if w.resolved != nil {
				want = append(want, *w.resolved)
			}
		}
		err := r.loader.Sync(want)
		var refused *loader.RuleError
		switch {
		case err == nil:
			delete(r.warnings, aboutKernel)
			return nil
		case errors.As(err, &refused) && slices.Contains(strict, refused.Rule):
			return err
		case errors.As(err, &refused) && r.rules[refused.Rule] != nil && r.rules[refused.Rule].resolved != nil:
			r.rules[refused.Rule].fail(refused.Err)
		default:
			r.warn(aboutKernel, err)
			return err
		}
	}
}

// detach takes the program off interfaces that no rule names any more.
func (r *Relay) detach() {
	needed := map[string]bool{}
	for _, name := range r.opts.Interfaces {
		needed[name] = true
	}
	for _, w := range r.rules {
		needed[w.rule.In.Interface] = true
		for _, o := range w.rule.Out {
			needed[o.Interface] = true
		}
	}
	names := map[int]string{}
	for name, i := range r.interfaces {
		names[i.index] = name
	}
	for _, a := range r.loader.Attachments() {
		if needed[names[a.Index]] || r.keep[a.Index] {
			continue
		}
		if err := r.loader.Detach(a.Index); err != nil {
			r.log.Warn("detach", "interface", a.Interface, "error", err)
			continue
		}
		r.log.Info("detached", "interface", a.Interface)
	}
}
