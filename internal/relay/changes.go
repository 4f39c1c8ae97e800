package relay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/history"
	"xdpcast/internal/plan"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/rules"
)

// changes keeps earlier sets of rules, and the change that is undone unless it is confirmed. It
// belongs to the goroutine of Run.
type changes struct {
	store *history.Store // nil if no sets can be kept: why says why
	why   error
	clock history.Clock

	// read is the set of the file when it was last read. While an undone file is held off, the
	// current rules of the file differ from it: see heldOff. It is empty until fill if they are the
	// same.
	read history.Digest
	// set is the current set as last kept; a part is empty if it was not kept.
	set     history.Set
	pending *pending
	// api and file are the texts of the wanted rules. Those of the file are seldom needed, and not
	// kept.
	api, file setText
	// ahead is closed when the goroutine of formatAhead has ended; nil: there is none.
	ahead chan struct{}
}

// pending is the change that waits for confirmation.
type pending struct {
	history.Pending
	before []*plan.Rule // to restore
	mroute *rules.Mroute
	retry  time.Time // undoing is not retried before
	failed error     // why it could not be saved
}

// change is a requested change of the wanted rules.
type change struct {
	edit
	history.Change
	save    bool            // rules of the API change
	file    bool            // rules of the file change
	confirm time.Duration   // 0: it is final
	read    *history.Digest // of a reload: the set of the file now
}

// openHistory reads the sets of an earlier process. It writes nothing, since this process does not
// own the pin directory yet.
func (r *Relay) openHistory() {
	c := &r.changes
	if r.opts.clock != nil {
		c.clock = *r.opts.clock
	} else if c.clock, c.why = history.NewClock(); c.why != nil {
		return
	}
	file, sets := r.historyFiles()
	c.store, c.why = history.Open(file, sets, r.log)
}

func (r *Relay) historyFiles() (file, sets string) {
	return r.keptFile("changes.json"), r.keptFile("sets")
}

// keptFile is the path of a file in the state directory.
func (r *Relay) keptFile(name string) string {
	return loader.RunFile(r.opts.StateDir, r.opts.Loader.PinDir, name)
}

// beginHistory replaces damaged history, undoes an unconfirmed change, and records the set with
// which this process starts.
func (r *Relay) beginHistory() {
	c := &r.changes
	c.endAhead()
	defer func() { c.file.parts = nil }()
	if errors.Is(c.why, history.ErrDamaged) {
		file, sets := r.historyFiles()
		aside, err := history.SetAside(file)
		if err == nil {
			r.log.Error("the history of rules cannot be read: starting without it", "error", c.why, "kept_as", aside)
			c.store, err = history.Open(file, sets, r.log)
		}
		c.why = err
	}
	if c.why != nil {
		c.store = nil
		r.warn(aboutHistory, fmt.Errorf("no history of rules is kept: %w", c.why))
		return
	}
	r.undoIfDue()
	if !r.recorded() {
		r.record(history.Change{Time: time.Now(), What: "start"})
	}
	r.tellHeldOff()
}

// by returns a change with its author and time.
func by(ctx context.Context, what string) history.Change {
	c := history.Change{Time: time.Now(), What: what}
	if uid, ok := control.CallerUID(ctx); ok {
		c.UID = &uid
	} else if cause := control.Cause(ctx); cause != "" {
		c.What += " (" + cause + ")"
	}
	return c
}

// byText formats a change as one line.
func byText(c history.Change) string {
	if c.UID == nil {
		return c.What
	}
	return fmt.Sprintf("%s by uid %d", c.What, *c.UID)
}

// mayChange refuses a change while another one waits for confirmation.
func (r *Relay) mayChange() error {
	p := r.changes.pending
	switch {
	case p == nil:
		return nil
	case p.failed != nil:
		return control.Errorf(control.KindConflict, "%s was undone, which cannot be saved yet: %w", byText(p.Change), p.failed)
	}
	return control.Errorf(control.KindConflict, "a change waits for confirmation until %s (%s): \"xdpcast confirm\" keeps it, \"xdpcast rollback\" undoes it",
		p.Until.Format(time.TimeOnly), byText(p.Change))
}

// change makes a change, and keeps the new set. After an error nothing has changed.
func (r *Relay) change(c change) error {
	if c.confirm > 0 {
		if err := r.begin(c); err != nil {
			return control.Errorf(control.KindFailed, "nothing was changed, since it could not be undone: %w", err)
		}
	}
	if err := r.replace(c.edit, c.save); err != nil {
		if c.confirm > 0 {
			r.cancel()
		}
		return err
	}
	r.revised++
	if c.save {
		r.changes.set.API = ""
	}
	if c.file {
		r.changes.set.File = ""
	}
	if c.read != nil {
		r.changes.read = *c.read
	}
	r.record(c.Change)
	r.tellHeldOff()
	return nil
}

// noteRead handles a file that was read again without changes to the rules: it may now contain the
// current rules, which were restored before.
func (r *Relay) noteRead(c change) error {
	h := &r.changes
	if c.read == nil || *c.read == h.read {
		return nil
	}
	h.read = *c.read
	if h.store == nil {
		return nil
	}
	state := h.store.State()
	h.fill(r.rules, r.mroute)
	if state.Held = r.heldOff(state.Held, h.set.File, c.Time); state.Held == nil && h.store.State().Held == nil {
		return nil
	}
	err := h.store.Save(state)
	r.tellHeldOff()
	return control.Wrap(control.KindFailed, err)
}

// begin stores the set to be restored without a confirmation.
func (r *Relay) begin(c change) error {
	h := &r.changes
	if h.store == nil {
		return fmt.Errorf("no history of rules is kept: %w", h.why)
	}
	if !r.recorded() {
		if err := r.keep(history.Change{Time: c.Time, What: "start"}, nil); err != nil {
			return err
		}
	}
	state := h.store.State()
	p := history.Pending{
		Change: c.Change, Before: state.Entries[len(state.Entries)-1].Set, Read: h.read, Boot: h.clock.Boot,
		Deadline: h.clock.Now() + c.confirm, Until: c.Time.Add(c.confirm),
	}
	if c.read != nil {
		p.Read = *c.read
	}
	state.Pending = &p
	if err := h.store.Save(state); err != nil {
		return err
	}
	h.pending = &pending{Pending: p, before: r.rules, mroute: r.mroute}
	return nil
}

// cancel forgets a change that was not made.
func (r *Relay) cancel() {
	h := &r.changes
	h.pending = nil
	state := h.store.State()
	state.Pending = nil
	// If saving fails, the stored change restores, at worst, the current set.
	r.warnUnless(aboutHistory, h.store.Save(state))
}

// recorded says whether the current set is kept as the last one.
func (r *Relay) recorded() bool {
	h := &r.changes
	if h.store == nil {
		return true // as far as possible
	}
	h.fill(r.rules, r.mroute)
	all := h.store.State().Entries
	return len(all) > 0 && all[len(all)-1].Set == h.set
}

// fill computes missing parts of the current set.
func (c *changes) fill(inForce []*plan.Rule, mroute *rules.Mroute) {
	c.endAhead()
	if c.set.File == "" {
		c.set.File = history.SumParts(withRoutes(c.file.of(inForce), mroute))
	}
	if c.set.API == "" {
		c.set.API = history.SumParts(c.api.of(inForce))
	}
	c.read = cmp.Or(c.read, c.set.File)
}

// formatAhead computes the set of the file's rules beside what else the start of a daemon does: with
// 100,000 rules that takes half a second.
func (c *changes) formatAhead(all []*plan.Rule, mroute *rules.Mroute) {
	if c.store == nil {
		return
	}
	var last history.Set
	if entries := c.store.State().Entries; len(entries) > 0 {
		last = entries[len(entries)-1].Set
	}
	done := make(chan struct{})
	c.ahead = done
	go func() {
		defer close(done)
		text := withRoutes(c.file.of(all), mroute)
		if c.set.File = history.SumParts(text); c.set.File != last.File {
			_ = history.PackParts(text) // PutParts finds the error, too
		}
	}()
}

// endAhead waits for formatAhead.
func (c *changes) endAhead() {
	if c.ahead != nil {
		<-c.ahead
		c.ahead = nil
	}
}

// record keeps the current set, the result of a change. The change is already made, so an error
// here, such as a full disk, must not fail it.
func (r *Relay) record(c history.Change) {
	if r.changes.store == nil {
		return
	}
	var waiting *history.Pending
	if p := r.changes.pending; p != nil {
		waiting = &p.Pending
	}
	err := r.keep(c, waiting)
	if err != nil {
		err = fmt.Errorf("the current set is not kept: %w", err)
	}
	r.warnUnless(aboutHistory, err)
}

// keep saves the current set as an entry, and the state that follows from it.
func (r *Relay) keep(c history.Change, waiting *history.Pending) error {
	h := &r.changes
	state := h.store.State()
	var last history.Set
	if n := len(state.Entries); n > 0 {
		last = state.Entries[n-1].Set
	}
	set, err := h.set, error(nil)
	if set.API == "" || set.API != last.API {
		if set.API, err = h.store.PutParts(h.api.of(r.rules)); err != nil {
			return err
		}
	}
	if set.File == "" || set.File != last.File {
		set.File, err = h.store.PutParts(withRoutes(h.file.of(r.rules), r.mroute))
		if h.file.parts = nil; err != nil {
			return err
		}
	}
	state.Entries = append(state.Entries, history.Entry{Change: c, Set: set, Rules: len(r.rules)})
	state.Pending = waiting
	state.Held = r.heldOff(state.Held, set.File, c.Time)
	if err := h.store.Save(state); err != nil {
		return err
	}
	h.set = set
	return nil
}

// heldOff is stored when the current rules of the file differ from its content: a restart uses the
// current ones, unless the file has changed.
func (r *Relay) heldOff(before *history.Held, inForce history.Digest, now time.Time) *history.Held {
	h := &r.changes
	if inForce == h.read || r.opts.ConfigFile == "" {
		return nil
	}
	held := history.Held{Config: r.opts.ConfigFile, Undone: h.read, File: inForce, Since: now}
	if before != nil && before.Config == held.Config && before.Undone == held.Undone && before.File == held.File {
		held.Since = before.Since
	}
	return &held
}

// tellHeldOff warns while the current rules of the file differ from its content.
func (r *Relay) tellHeldOff() {
	if r.changes.store == nil {
		return
	}
	held := r.changes.store.State().Held
	if held == nil {
		delete(r.warnings, aboutFile)
		return
	}
	r.warn(aboutFile, fmt.Errorf("an earlier set is in force since %s, as what %s holds was undone: \"xdpcast reload\" brings that in again",
		held.Since.Local().Format(time.DateTime), held.Config))
}

// undoIfDue restores the previous set if a change was not confirmed in time.
func (r *Relay) undoIfDue() {
	p := r.changes.pending
	if p == nil || r.changes.clock.Left(&p.Pending) > 0 || time.Now().Before(p.retry) {
		return
	}
	undone := history.Change{Time: time.Now(), What: "undone: " + p.What + " was not confirmed"}
	if err := r.undo(undone); err != nil {
		r.warn(aboutHistory, fmt.Errorf("%s was undone, which cannot be saved yet: %w", byText(p.Change), err))
		p.failed, p.retry = err, time.Now().Add(recheck)
		return
	}
	r.log.Warn("a change was not confirmed: the previous set is restored", "change", byText(p.Change), "made", p.Time)
}

// undo restores the set before an unconfirmed change. Rules of it that the kernel now refuses are
// shown as failed: they were active before. An error means that it could not be saved.
func (r *Relay) undo(c history.Change) error {
	p := r.changes.pending
	r.revised++
	settle := func(bool) error { return nil }
	if !p.mroute.Equal(r.mroute) {
		var err error
		if settle, err = r.mirrorAs(p.mroute); err != nil {
			return err
		}
		r.changes.set, r.stale = history.Set{}, true
	}
	// The routes stay as they are: the change did not affect them.
	before := withRoutesOf(p.before, r.rules)
	if r.mroutes == nil {
		before = withoutRoutes(before)
	}
	if !slices.Equal(r.rules, before) {
		r.setRules(before)
		r.changes.set = history.Set{}
	}
	_ = r.reconcile(nil)
	r.warnUnless(aboutMroutes, settle(true))
	if err := r.stageState(); err != nil {
		return err
	}
	if err := r.commitState(); err != nil {
		return err
	}
	c.Added, c.Changed, c.Removed = p.Removed, p.Changed, p.Added
	if err := r.keep(c, nil); err != nil {
		return err
	}
	r.changes.pending = nil
	delete(r.warnings, aboutHistory)
	r.tellHeldOff()
	return nil
}

// pendingWake is the time until an unconfirmed change is undone.
func (r *Relay) pendingWake() time.Duration {
	p := r.changes.pending
	if p == nil {
		return idle
	}
	return max(r.changes.clock.Left(&p.Pending), time.Until(p.retry))
}

// Confirm implements control.Backend.
func (r *Relay) Confirm(ctx context.Context) (done control.UnconfirmedChange, err error) {
	err = r.do(ctx, func() error {
		r.undoIfDue()
		p := r.changes.pending
		switch {
		case p == nil:
			return control.Errorf(control.KindConflict, "no change waits for confirmation")
		case p.failed != nil:
			return control.Errorf(control.KindConflict, "too late: %s has been undone", byText(p.Change))
		}
		state := r.changes.store.State()
		state.Pending = nil
		if err := r.changes.store.Save(state); err != nil {
			return control.Errorf(control.KindFailed, "the change still waits for confirmation: %w", err)
		}
		r.changes.pending = nil
		done = *unconfirmed(p)
		return nil
	})
	return done, err
}

func unconfirmed(p *pending) *control.UnconfirmedChange {
	if p == nil {
		return nil
	}
	return &control.UnconfirmedChange{What: p.What, UID: p.UID, Time: p.Time, Until: p.Until}
}

// History implements control.Backend.
func (r *Relay) History(ctx context.Context) (all []control.HistoryEntry, err error) {
	err = r.do(ctx, func() error {
		if r.changes.store == nil {
			return control.Errorf(control.KindFailed, "no history of rules is kept: %w", r.changes.why)
		}
		for back, e := range slices.Backward(r.changes.store.State().Entries) {
			all = append(all, control.HistoryEntry{
				Back: back, Time: e.Time, What: e.What, UID: e.UID, Added: e.Added, Changed: e.Changed, Removed: e.Removed, Rules: e.Rules,
			})
		}
		for i := range all {
			all[i].Back = i
		}
		return nil
	})
	return all, err
}

// Rollback implements control.Backend.
func (r *Relay) Rollback(ctx context.Context, back int, o control.ApplyOptions) (result control.ApplyResult, err error) {
	err = r.do(ctx, func() error {
		h := &r.changes
		if h.store == nil {
			return control.Errorf(control.KindFailed, "no history of rules is kept: %w", h.why)
		}
		if back == 0 {
			// For clients that show the pending change: it may have been undone or confirmed since.
			r.undoIfDue()
			switch {
			case o.DryRun || o.Confirm != 0 || o.Revision != "":
				return control.Errorf(control.KindInvalid, "rollback 0 undoes the change that waits for confirmation: it takes neither dry_run nor confirm nor revision")
			case h.pending == nil:
				return control.Errorf(control.KindConflict, "no change waits for confirmation: nothing was undone")
			}
			result, err = r.rollbackPending(ctx, o)
			return err
		}
		if p := h.pending; p != nil && back == 1 && !o.DryRun && o.Confirm == 0 {
			if err := r.checkRevision(o); err != nil {
				return err
			}
			result, err = r.rollbackPending(ctx, o)
			return err
		}
		if !o.DryRun {
			if err := r.mayChange(); err != nil {
				return err
			}
		}
		sets, err := r.earlier(back)
		if err != nil {
			return err
		}
		c := change{Change: by(ctx, fmt.Sprint("rollback ", back)), edit: edit{mirror: &mirrorEdit{sets.file.Mroute}}}
		result, err = r.applySets(map[plan.Origin][]rules.Rule{plan.OriginFile: sets.file.Rules, plan.OriginAPI: sets.api}, o, c)
		return err
	})
	return result, err
}

// rollbackPending undoes the unconfirmed change.
func (r *Relay) rollbackPending(ctx context.Context, o control.ApplyOptions) (control.ApplyResult, error) {
	p := r.changes.pending
	diff := rules.Compute(bare(withoutRoutes(r.rules)), bare(withoutRoutes(p.before)))
	op := ""
	if !p.mroute.Equal(r.mroute) {
		op = mirrorOp(r.mroute, p.mroute)
	}
	if err := r.undo(by(ctx, "rollback 1")); err != nil {
		return control.ApplyResult{}, control.Errorf(control.KindFailed, "the previous set is restored, but cannot be saved yet: %w", err)
	}
	result := r.summarized(diff, o)
	result.Mroute = op
	return result, nil
}

// kept is the content of the file and of the API's rules.
type kept struct {
	file rules.Config
	api  []rules.Rule
}

// earlier reads the set of back changes ago.
func (r *Relay) earlier(back int) (s kept, err error) {
	h := &r.changes
	if !r.recorded() {
		if err := r.keep(history.Change{Time: time.Now(), What: "unknown"}, nil); err != nil {
			return s, control.Errorf(control.KindFailed, "the current set is not kept: %w", err)
		}
	}
	all := h.store.State().Entries
	if back < 1 || back >= len(all) {
		return s, control.Errorf(control.KindNotFound, "rollback %d: %s kept (\"xdpcast history\" lists them)", back, setsBefore(len(all)-1))
	}
	if s, err = h.readSet(all[len(all)-1-back].Set); err != nil {
		return s, control.Errorf(control.KindFailed, "rollback %d: %w", back, err)
	}
	return s, nil
}

func setsBefore(n int) string {
	switch n {
	case 0:
		return "no earlier set is"
	case 1:
		return "1 earlier set is"
	}
	return fmt.Sprintf("%d earlier sets are", n)
}

// readSet reads a set from disk.
func (c *changes) readSet(set history.Set) (s kept, err error) {
	if s.file, err = c.readFile(set.File); err != nil {
		return s, err
	}
	text, err := c.store.Get(set.API)
	if err == nil {
		s.api, err = rules.ParseFile(string(set.API), text)
	}
	return s, noSet(err)
}

// readFile reads the stored content of a file.
func (c *changes) readFile(digest history.Digest) (f rules.Config, err error) {
	text, err := c.store.Get(digest)
	if err == nil {
		f, err = rules.ParseConfig(string(digest), text, nil)
	}
	return f, noSet(err)
}

func noSet(err error) error {
	var fault *rules.FileError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &fault):
		return fmt.Errorf("a kept set of rules is not valid in this release: %w", err)
	}
	return fmt.Errorf("read a set of rules: %w", err)
}

// initialSets are the rules with which this process starts: those of the file and those saved for
// the API, unless an earlier process has undone the file, or a change was not confirmed in time.
func (r *Relay) initialSets(fromFile rules.Config, saved []rules.Rule, isSaved bool) (file rules.Config, api []rules.Rule) {
	h := &r.changes
	if h.store == nil {
		return fromFile, saved
	}
	state := h.store.State()
	p := state.Pending
	if p != nil || state.Held != nil {
		h.read = history.Sum(configText(fromFile))
	}
	var before kept
	if p != nil {
		var err error
		if before, err = h.readSet(p.Before); err != nil {
			r.log.Error("a change that waits for confirmation cannot be undone", "change", byText(p.Change), "error", err)
			p = nil
		}
	}
	if held := state.Held; held != nil && held.Config == r.opts.ConfigFile && held.Undone == h.read {
		if all, err := h.readFile(held.File); err == nil {
			fromFile = all
		} else {
			r.log.Error("the file is in force, although what it holds was undone", "file", held.Config, "error", err)
		}
	}
	if p == nil {
		return fromFile, saved
	}
	// A file edited since then is what its author wants now; API rules forgotten by a reboot stay
	// forgotten.
	if p.Read != h.read {
		before.file = fromFile
	}
	if !isSaved {
		before.api = nil
	}
	h.pending = &pending{Pending: *p}
	if h.clock.Left(p) <= 0 {
		return before.file, before.api
	}
	h.pending.before, h.pending.mroute = r.accepted(before.file.Rules, before.api), before.file.Mroute
	return fromFile, saved
}

// bare strips the origins off rules.
func bare(all []*plan.Rule) []rules.Rule {
	out := make([]rules.Rule, len(all))
	for i, rule := range all {
		out[i] = rule.Rule
	}
	return out
}

// configText is the text of a parsed file, whose rules are in any order.
func configText(c rules.Config) []byte {
	var text []byte
	for _, rule := range slices.SortedFunc(slices.Values(c.Rules), func(a, b rules.Rule) int { return cmp.Compare(a.Name, b.Name) }) {
		text = rules.AppendRule(text, rule)
	}
	return rules.AppendMroute(rules.EndFile(text), c.Mroute)
}
