package relay

import (
	"encoding/json"
	"log/slog"
	"maps"
	"os"
	"slices"
	"time"

	"xdpcast/internal/network"
	"xdpcast/internal/plan"
	"xdpcast/internal/savefile"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/membership"
)

// attachments reconciles the relay program on interfaces. loader.Observe reads from the kernel
// where it runs.
type attachments struct {
	loader  *loader.Loader
	mode    loader.Mode
	log     *slog.Logger
	answers map[network.LinkID]plan.Attached
	// byHand are interfaces attached by "xdpcast load" or by the operator in another way: they
	// stay.
	byHand map[network.LinkID]bool
	// own are the ids of the BPF links made by this daemon or an earlier one; file stores them.
	// Otherwise an attachment made by a killed daemon for a rule would look attached by hand.
	own, saved map[uint32]bool
	file       string
	// refused has retry times for links to which the program could not be attached, notNative for
	// those where native mode failed.
	refused, notNative map[network.LinkID]refusedAttachment

	adopted map[int]bool // indexes of byHand until a snapshot identifies the links
}

// refusedAttachment is a failed attempt: it is repeated when the link changes, since another
// program may have left, and at intervals.
type refusedAttachment struct {
	link  *network.Link
	tries int
	next  time.Time
}

// retryAttach is the backoff of failed attachments.
var retryAttach = membership.Backoff{Min: time.Second, Max: 30 * time.Second, Factor: 2}

func newAttachments(l *loader.Loader, mode loader.Mode, file string, log *slog.Logger) *attachments {
	return &attachments{
		loader: l, mode: mode, log: log, file: file, own: map[uint32]bool{}, saved: map[uint32]bool{},
		answers: map[network.LinkID]plan.Attached{}, byHand: map[network.LinkID]bool{}, refused: map[network.LinkID]refusedAttachment{}, notNative: map[network.LinkID]refusedAttachment{},
	}
}

// adopt records interfaces attached by hand: those explained neither by a rule in the kernel nor by
// an earlier daemon.
func (a *attachments) adopt(used []int) {
	earlier := a.read()
	a.adopted = map[int]bool{}
	for _, at := range a.loader.Attachments() {
		if slices.Contains(used, at.Index) || slices.Contains(earlier, at.LinkID) {
			a.own[at.LinkID] = true
		} else {
			a.adopted[at.Index] = true
		}
	}
	a.save()
}

// read returns what save wrote.
func (a *attachments) read() (all []uint32) {
	data, err := os.ReadFile(a.file)
	if os.IsNotExist(err) {
		return nil
	}
	if err == nil {
		err = json.Unmarshal(data, &all)
	}
	if err != nil {
		a.log.Warn("attachments of an earlier daemon are unknown: they stay", "file", a.file, "error", err)
	}
	return all
}

// write writes the file; it removes it if there is nothing to store.
func (a *attachments) write() error {
	if len(a.own) == 0 {
		if err := os.Remove(a.file); err != nil && !os.IsNotExist(err) {
			return err
		}
		return nil
	}
	data, err := json.Marshal(slices.Sorted(maps.Keys(a.own)))
	if err != nil {
		return err
	}
	return savefile.Write(a.file, data)
}

// prune forgets links that are gone.
func (a *attachments) prune() {
	have := map[uint32]bool{}
	for _, at := range a.loader.Attachments() {
		have[at.LinkID] = true
	}
	maps.DeleteFunc(a.own, func(id uint32, _ bool) bool { return !have[id] })
	a.save()
}

// save stores own if it changed.
func (a *attachments) save() {
	if maps.Equal(a.own, a.saved) {
		return
	}
	if err := a.write(); err != nil {
		a.log.Warn("attachments cannot be saved: if the daemon is killed, the next one leaves them", "error", err)
		return
	}
	a.saved = maps.Clone(a.own)
}

// apply attaches the program where the plan requires it, and returns whether an answer changed. An
// interface that already runs the program is left alone.
func (a *attachments) apply(p *plan.Plan, now *network.Snapshot) (changed bool) {
	have := map[int]loader.Attachment{}
	for _, at := range a.loader.Attachments() {
		have[at.Index] = at
		if link := now.ByIndex(at.Index); link != nil && a.adopted[at.Index] {
			a.byHand[link.LinkID] = true
		}
	}
	a.adopted = nil
	for _, id := range p.Attach {
		link := now.ByIndex(id.Index)
		if link == nil || link.LinkID != id {
			continue
		}
		at, attached := have[id.Index]
		if attached && !a.mayBeNative(at, link) {
			delete(a.refused, id)
			changed = a.answer(id, plan.Attached{Generic: at.Mode == loader.ModeGeneric}) || changed
			continue
		}
		changed = a.attach(link, attached) || changed
	}
	a.save()
	return changed
}

// mayBeNative says whether to try native mode on an interface in generic mode: only while no
// packets flow, since changing the mode loses packets.
func (a *attachments) mayBeNative(at loader.Attachment, link *network.Link) bool {
	if at.Mode != loader.ModeGeneric || a.mode != loader.ModeAuto || link.Running() {
		delete(a.notNative, link.LinkID)
		return false
	}
	last := a.notNative[link.LinkID]
	return last.link == nil || !sameButPrograms(last.link, link) || !time.Now().Before(last.next)
}

// sameButPrograms says whether two descriptions of a link differ only in programs.
func sameButPrograms(a, b *network.Link) bool {
	x, y := *a, *b
	x.XDP, y.XDP = nil, nil
	return x.Equal(&y)
}

// tryNative reattaches an interface in generic mode.
func (a *attachments) tryNative(link *network.Link) (loader.Attachment, error) {
	last := a.notNative[link.LinkID]
	if last.link == nil || !sameButPrograms(last.link, link) {
		last.tries = 0
	}
	last.tries++
	a.notNative[link.LinkID] = refusedAttachment{link, last.tries, time.Now().Add(retryAttach.Next(last.tries, 0))}
	return a.loader.TryNative(link.Index)
}

// attach attaches the program unless that failed recently; with generic set, it reattaches.
func (a *attachments) attach(link *network.Link, generic bool) (changed bool) {
	last, failed := a.refused[link.LinkID]
	if failed && last.link == link && time.Now().Before(last.next) {
		return false
	}
	attach := func() (loader.Attachment, error) { return a.loader.Attach(link.Index, a.mode) }
	if generic {
		attach = func() (loader.Attachment, error) { return a.tryNative(link) }
	}
	at, err := attach()
	if err != nil {
		if last.link != link {
			last.tries = 0
		}
		last.tries++
		a.refused[link.LinkID] = refusedAttachment{link, last.tries, time.Now().Add(retryAttach.Next(last.tries, 0))}
		return a.answer(link.LinkID, plan.Attached{Err: err})
	}
	a.own[at.LinkID] = true
	delete(a.refused, link.LinkID)
	return a.answer(link.LinkID, plan.Attached{Generic: at.Mode == loader.ModeGeneric})
}

func (a *attachments) answer(id network.LinkID, now plan.Attached) (changed bool) {
	before, known := a.answers[id]
	a.answers[id] = now
	return !known || before.Generic != now.Generic || errorText(before.Err) != errorText(now.Err)
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// detach removes the program from interfaces that no longer need it.
func (a *attachments) detach(p *plan.Plan, now *network.Snapshot) {
	wanted := make(map[network.LinkID]bool, len(p.Attach))
	for _, id := range p.Attach {
		wanted[id] = true
	}
	for _, at := range a.loader.Attachments() {
		link := now.ByIndex(at.Index)
		if link != nil && (wanted[link.LinkID] || a.byHand[link.LinkID]) {
			continue
		}
		if err := a.loader.Detach(at.Index); err != nil {
			a.log.Warn("detach", "interface", at.Interface, "error", err)
			continue
		}
		a.log.Info("detached", "interface", at.Interface)
	}
	a.prune()
	for id := range a.answers {
		if !wanted[id] {
			delete(a.answers, id)
			delete(a.refused, id)
			delete(a.notNative, id)
		}
	}
}

// forget drops the state of one generation of an interface.
func (a *attachments) forget(id network.LinkID) {
	delete(a.answers, id)
	delete(a.refused, id)
	delete(a.notNative, id)
	delete(a.byHand, id)
}

// reborn is forget for an interface that exists again, or may: one attached by hand stays marked if
// it is still attached.
func (a *attachments) reborn(old, now network.LinkID) {
	byHand := a.byHand[old]
	a.forget(old)
	for _, at := range a.loader.Attachments() {
		if at.Index == now.Index && byHand {
			a.byHand[now] = true
		}
	}
}

func (a *attachments) wake() time.Duration {
	wake := idle
	for _, all := range []map[network.LinkID]refusedAttachment{a.refused, a.notNative} {
		for _, r := range all {
			wake = min(wake, time.Until(r.next))
		}
	}
	return wake
}
