package relay

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/events"
	"xdpcast/internal/history"
	"xdpcast/internal/plan"
	"xdpcast/internal/rulefile"
	"xdpcast/internal/savefile"
	"xdpcast/pkg/rules"
)

var _ control.Backend = (*Relay)(nil)

// AddRule implements control.Backend.
func (r *Relay) AddRule(ctx context.Context, c control.Rule) (status control.RuleStatus, err error) {
	rule, err := control.ToRule(c)
	if err != nil {
		return control.RuleStatus{}, err
	}
	err = r.do(ctx, func() error {
		if err := r.mayChange(); err != nil {
			return err
		}
		if old := r.rule(rule.Name); old != nil {
			return control.Errorf(control.KindConflict, "rule %s exists already (from %s): delete it first, or choose another name", rule.Name, r.originOf(old))
		}
		if err := r.checkAdded(&rule); err != nil {
			return err
		}
		c := change{edit: edit{put: []*plan.Rule{{Rule: rule, Origin: plan.OriginAPI}}}, Change: by(ctx, "rule add "+rule.Name), save: true}
		c.Added = 1
		if err := r.change(c); err != nil {
			return err
		}
		status, err = r.ruleStatus(rule.Name)
		return err
	})
	return status, err
}

// replace edits the wanted rules, and saves those of the API. It changes nothing on an error: they
// cannot be saved, the kernel refuses them, or a rule added through the API failed.
func (r *Relay) replace(e edit, save bool) error {
	var names []string
	for _, rule := range e.put {
		if rule.Origin == plan.OriginAPI {
			names = append(names, rule.Name)
		}
	}
	before := r.rules
	settle := func(bool) error { return nil }
	if e.mirror != nil {
		var err error
		if settle, err = r.mirrorAs(e.mirror.as); err != nil {
			return control.Wrap(control.KindFailed, err)
		}
	}
	after := edited(before, e)
	if r.mroutes == nil {
		after = withoutRoutes(after)
	}
	r.setRules(after)
	if save {
		// First: a lack of space is found before any packet is affected.
		if err := r.stageState(); err != nil {
			r.setRules(before)
			return control.Wrap(control.KindFailed, errors.Join(err, settle(false)))
		}
	}
	err := r.reconcile(names)
	if err == nil && save {
		if err = r.commitState(); err == nil {
			r.unsaved = false
			r.warnUnless(aboutSaved, nil)
		}
	}
	if err == nil {
		r.warnUnless(aboutMroutes, settle(true))
		return nil
	}
	err = errors.Join(err, settle(false))
	if save {
		savefile.Discard(r.opts.StateFile)
	}
	r.setRules(before)
	_ = r.reconcile(nil) // drops memberships and attachments made for them
	if errors.Is(err, savefile.ErrNewer) {
		r.unsaved = true
		r.resaveIfDue()
	}
	return control.Wrap(control.KindFailed, err)
}

// tidyUp returns memory to the host soon after a large change, or after very many rules were planned: the garbage is as
// large as the rest, and may stay for long.
func (r *Relay) tidyUp() {
	if !r.tidying.CompareAndSwap(false, true) {
		return
	}
	r.thrift.begin()
	r.tidy.Go(func() {
		select {
		case <-r.ended:
			return
		case <-time.After(tidyAfter):
		}
		if !r.many.Load() {
			r.thrift.end()
		}
		r.tidying.Store(false) // later garbage belongs to the next call
		debug.FreeOSMemory()
	})
}

// thrift has the garbage collected earlier (GOGC), from begin to end: with very many rules, and while very many change. A
// change leaves as much garbage as is in use, and so do a few scrapes or lists of all rules. Both may be called again.
type thrift struct {
	mu     sync.Mutex
	begun  bool
	before int // percent
}

func (t *thrift) begin() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.begun {
		return
	}
	before := debug.SetGCPercent(busyGarbage)
	if before <= busyGarbage { // somebody wants less, or that GOMEMLIMIT alone decides
		debug.SetGCPercent(before)
		return
	}
	t.begun, t.before = true, before
}

func (t *thrift) end() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.begun {
		t.begun = false
		debug.SetGCPercent(t.before)
	}
}

// PutRule implements control.Backend.
func (r *Relay) PutRule(ctx context.Context, c control.Rule, o control.ApplyOptions) (result control.ApplyResult, err error) {
	put, err := control.ToRule(c)
	if err != nil {
		return result, err
	}
	err = r.do(ctx, func() error {
		switch old := r.rule(put.Name); {
		case old == nil || old.Origin == plan.OriginAPI:
		case old.Origin == plan.OriginFile:
			return control.Errorf(control.KindConflict, "rule %s comes from %s: change it there and reload", put.Name, r.fileOf(put.Name))
		default:
			return control.Errorf(control.KindConflict, "rule %s exists already (from %s): choose another name", put.Name, r.originOf(old))
		}
		want := []rules.Rule{put}
		for _, rule := range r.rules {
			if rule.Origin == plan.OriginAPI && rule.Name != put.Name {
				want = append(want, rule.Rule)
			}
		}
		if err := control.ValidateSet(want); err != nil {
			return err
		}
		result, err = r.applySets(map[plan.Origin][]rules.Rule{plan.OriginAPI: want}, o, change{Change: by(ctx, "rule put "+put.Name)})
		return err
	})
	return result, err
}

// DeleteRule implements control.Backend.
func (r *Relay) DeleteRule(ctx context.Context, name string) error {
	return r.do(ctx, func() error {
		rule := r.rule(name)
		switch err := r.mayChange(); {
		case err != nil:
			return err
		case rule == nil:
			return control.Errorf(control.KindNotFound, "no rule is named %s", name)
		case rule.Origin == plan.OriginMroute:
			return control.Errorf(control.KindConflict, "rule %s mirrors a multicast route of the kernel: it goes when its routing daemon removes that", name)
		case rule.Origin == plan.OriginFile:
			return control.Errorf(control.KindConflict, "rule %s comes from %s: remove it there and reload", name, r.fileOf(name))
		}
		if err := r.checkRemoved(&rule.Rule); err != nil {
			return err
		}
		c := change{edit: edit{remove: []string{name}}, Change: by(ctx, "rule del "+name), save: true}
		c.Removed = 1
		return r.change(c)
	})
}

// fileOf is the current position of a rule of the file: FILE:LINE, in an included file if it is
// there. It reads the files again, since they may have changed and the user edits the current ones.
func (r *Relay) fileOf(name string) string {
	if file, line, ok := rulefile.Find(name, r.opts.ConfigFile); ok {
		return fmt.Sprintf("%s:%d", file, line)
	}
	return r.opts.ConfigFile
}

// originOf is the origin of a rule as text.
func (r *Relay) originOf(rule *plan.Rule) string {
	if rule.Origin == plan.OriginFile {
		return r.fileOf(rule.Name)
	}
	return "the " + string(rule.Origin)
}

// Apply implements control.Backend.
func (r *Relay) Apply(ctx context.Context, want []rules.Rule, o control.ApplyOptions) (result control.ApplyResult, err error) {
	err = r.do(ctx, func() error {
		result, err = r.applySets(map[plan.Origin][]rules.Rule{plan.OriginAPI: want}, o, change{Change: by(ctx, "rule apply")})
		return err
	})
	return result, err
}

// Reload implements control.Backend. Unlike a rule added through the API, a rule of the file that
// fails is kept, shown as failed, and retried.
func (r *Relay) Reload(ctx context.Context, o control.ApplyOptions) (result control.ApplyResult, err error) {
	err = r.do(ctx, func() error {
		if r.opts.ConfigFile == "" {
			return control.Errorf(control.KindConflict, "nothing to reload: the relay was started without a file")
		}
		fromFile, err := r.readConfig()
		if err != nil {
			return control.Wrap(control.KindInvalid, err)
		}
		read := history.Sum(configText(fromFile))
		c := change{Change: by(ctx, "reload"), read: &read, edit: edit{mirror: &mirrorEdit{fromFile.Mroute}}}
		result, err = r.applySets(map[plan.Origin][]rules.Rule{plan.OriginFile: fromFile.Rules}, o, c)
		return err
	})
	if !o.DryRun {
		r.logReload(result, err)
	}
	return result, err
}

func (r *Relay) logReload(result control.ApplyResult, err error) {
	e := events.Event{Kind: events.KindReload, State: stateDone,
		Cause: fmt.Sprintf("%d added, %d changed, %d removed, %d kept", result.Added, result.Changed, result.Removed, result.Kept)}
	if err != nil {
		e.State, e.Cause = plan.Failed.String(), strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	r.opts.Events.Add(e)
}

// applySets makes the rules of some origins exactly those given. c says who requested it.
func (r *Relay) applySets(want map[plan.Origin][]rules.Rule, o control.ApplyOptions, c change) (control.ApplyResult, error) {
	if err := r.checkRevision(o); err != nil {
		return control.ApplyResult{}, err
	}
	if !o.DryRun {
		if err := r.mayChange(); err != nil {
			return control.ApplyResult{}, err
		}
	}
	have, after, sources := map[plan.Origin][]rules.Rule{}, []rules.Rule(nil), len(want)
	for _, rule := range withoutRoutes(r.rules) {
		if _, ok := want[rule.Origin]; ok {
			have[rule.Origin] = append(have[rule.Origin], rule.Rule)
			continue
		}
		after, sources = append(after, rule.Rule), len(want)+1
	}
	if sources > 1 {
		for _, all := range want {
			after = append(after, all...)
		}
		if err := control.ValidateSet(after); err != nil {
			return control.ApplyResult{}, err
		}
	}
	var diff rules.Diff
	for _, origin := range []plan.Origin{plan.OriginFile, plan.OriginAPI} {
		all, ok := want[origin]
		if !ok {
			continue
		}
		if len(have[origin])+len(all) >= manyEdits {
			r.tidyUp()
		}
		d := rules.Compute(have[origin], all)
		c.edit.add(origin, d)
		if !d.Empty() {
			c.save, c.file = c.save || origin == plan.OriginAPI, c.file || origin == plan.OriginFile
		}
		diff = diff.And(d)
	}
	result := r.summarized(diff, o)
	if c.mirror != nil && c.mirror.as.Equal(r.mroute) {
		c.mirror = nil
	}
	if c.mirror != nil {
		c.file, result.Mroute = true, mirrorOp(r.mroute, c.mirror.as)
	}
	if o.DryRun {
		return result, nil
	}
	c.Added, c.Changed, c.Removed, c.confirm = result.Added, result.Changed, result.Removed, o.Confirm
	if diff.Empty() && c.mirror == nil {
		return result, r.noteRead(c)
	}
	if err := r.change(c); err != nil {
		return control.ApplyResult{}, err
	}
	result.Revision = r.revision()
	if p := r.changes.pending; p != nil {
		result.ConfirmBy = &p.Until
	}
	return result, nil
}

// mirrorOp describes the change of the multicast route settings.
func mirrorOp(before, now *rules.Mroute) string {
	switch {
	case before == nil:
		return control.OpAdd
	case now == nil:
		return control.OpRemove
	}
	return control.OpChange
}

// add adds the changes of a difference.
func (e *edit) add(origin plan.Origin, d rules.Diff) {
	for _, rule := range d.Add {
		e.put = append(e.put, &plan.Rule{Rule: rule, Origin: origin})
	}
	for _, c := range d.Change {
		e.put = append(e.put, &plan.Rule{Rule: c.New, Origin: origin})
	}
	for _, rule := range d.Remove {
		e.remove = append(e.remove, rule.Name)
	}
}

// revision identifies the rules of the file and the API: another process, or the same one after a change,
// has another.
func (r *Relay) revision() string { return fmt.Sprintf("%x-%d", r.started.UnixNano(), r.revised) }

// checkRevision refuses a change that was decided on other rules than the current ones.
func (r *Relay) checkRevision(o control.ApplyOptions) error {
	if now := r.revision(); o.Revision != "" && o.Revision != now {
		return control.Errorf(control.KindConflict, "the rules have changed since revision %.40q, now %s: look at the difference again", o.Revision, now)
	}
	return nil
}

// summarized counts the changes, and lists as many as requested.
func (r *Relay) summarized(diff rules.Diff, o control.ApplyOptions) control.ApplyResult {
	result := control.ApplyResult{
		DryRun: o.DryRun, Revision: r.revision(), Added: len(diff.Add), Changed: len(diff.Change), Removed: len(diff.Remove), Kept: len(diff.Keep),
	}
	total := result.Added + result.Changed + result.Removed
	if o.MaxChanges > 0 {
		total = min(total, o.MaxChanges)
	}
	result.Changes = make([]control.Change, 0, total)
	list := func(c control.Change) bool {
		result.Changes = append(result.Changes, c)
		return len(result.Changes) < total
	}
	if total > 0 {
		listChanges(diff, list)
	}
	return result
}

// listChanges passes the changes to list until it returns false.
func listChanges(diff rules.Diff, list func(control.Change) bool) {
	for _, rule := range diff.Add {
		if !list(control.Change{Op: control.OpAdd, Rule: control.FromRule(rule)}) {
			return
		}
	}
	for _, c := range diff.Change {
		old := control.FromRule(c.Old)
		if !list(control.Change{Op: control.OpChange, Rule: control.FromRule(c.New), Old: &old}) {
			return
		}
	}
	for _, rule := range diff.Remove {
		if !list(control.Change{Op: control.OpRemove, Rule: control.FromRule(rule)}) {
			return
		}
	}
}

// Rules implements control.Backend.
func (r *Relay) Rules(ctx context.Context) (all []control.RuleStatus, err error) {
	err = r.do(ctx, func() error {
		if all, err = r.ruleStatuses(nil); err == nil {
			r.addOverlaps(all)
		}
		return err
	})
	return all, err
}

// Rule implements control.Backend.
func (r *Relay) Rule(ctx context.Context, name string) (status control.RuleStatus, err error) {
	err = r.do(ctx, func() error {
		if status, err = r.ruleStatus(name); err == nil {
			one := []control.RuleStatus{status}
			r.addOverlaps(one)
			status = one[0]
		}
		return err
	})
	return status, err
}
