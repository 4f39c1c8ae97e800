package loader

import (
	"maps"

	"xdpcast/bpf"
	"xdpcast/internal/account"
)

// tally is all counters of one rule. Those of the programs and of the workers are separate, since
// packets are lost in different places between two counters.
type tally struct {
	entry *entry
	// Sources: packets to account for.
	matched Counter // by the relay program
	handed  Counter // of these, to AF_XDP sockets
	came    Counter // to workers, from sockets or the packet tap
	tapped  Counter // of these, from the packet tap
	// Sinks.
	delivered Counter // to workers, from sockets
	kernel    sink
	user      sink
	out       []outputTally
	notes     map[Note]Counter
	lastSeen  uint64
	// For a leg, read with the sources: copies are those that its stream did not need.
	leg    *LegStats
	stream *StreamStats
	copies sink
}

// sink counts packets that ended before the outputs.
type sink struct{ drops map[Reason]Counter }

type outputTally struct{ kernel, user outputSink }

// outputSink counts the ends of one output's copies.
type outputSink struct {
	sent Counter
	sink
}

func (s *sink) add(reason Reason, c Counter) {
	if c.Packets == 0 {
		return
	}
	if s.drops == nil {
		s.drops = map[Reason]Counter{}
	}
	sum := s.drops[reason]
	sum.add(c.Packets, c.Bytes)
	s.drops[reason] = sum
}

// less is c minus the sinks.
func (c Counter) less(sinks ...*sink) Counter {
	for _, s := range sinks {
		for _, d := range s.drops {
			c.subtract(d)
		}
	}
	return c
}

func (c *Counter) subtract(o Counter) {
	c.Packets -= min(c.Packets, o.Packets)
	c.Bytes -= min(c.Bytes, o.Bytes)
}

// lostBefore is the packets given to sockets that did not reach workers.
func (t *tally) lostBefore() Counter {
	lost := t.handed
	lost.subtract(t.delivered)
	return lost
}

// skipped is the copies that the kernel did not make for an output: a broadcast silently skips rows
// whose device is gone, down, or refuses the frame.
func (t *tally) skipped(slot int) Counter {
	if len(t.out) < 2 {
		return Counter{}
	}
	o := &t.out[slot].kernel
	rest := t.matched.less(&t.kernel, &o.sink, &t.copies)
	rest.subtract(t.handed)
	rest.subtract(o.sent)
	return rest
}

// unfinished is packets that reached workers but did not end at an output.
func (t *tally) unfinished(slot int) Counter {
	o := &t.out[slot].user
	rest := t.came.less(&t.user, &o.sink)
	rest.subtract(o.sent)
	return rest
}

// missing says whether packets are unaccounted for, or still in flight.
func (t *tally) missing() bool {
	if t.lostBefore().Packets > 0 {
		return true
	}
	for slot := range t.out {
		if t.skipped(slot).Packets > 0 || t.unfinished(slot).Packets > 0 {
			return true
		}
	}
	return false
}

// resetSinks clears the sinks, to read them again.
func (t *tally) resetSinks() {
	t.delivered, t.kernel, t.user, t.notes = Counter{}, sink{}, sink{}, nil
	clear(t.out)
}

// lostKey identifies a counter that is a difference of others.
type lostKey struct {
	scope  account.Scope
	id     uint32
	reason Reason
}

// losses keeps the maximum of each difference: while packets flow a difference is too low, because
// packets that came after the sources were read have reached the sinks, and a counter must not
// decrease.
type losses map[lostKey]Counter

func (l losses) most(scope account.Scope, id uint32, reason Reason, c Counter) Counter {
	if l == nil {
		return c
	}
	key := lostKey{scope, id, reason}
	if before := l[key]; before.Packets > c.Packets {
		return before
	}
	if c.Packets > 0 {
		l[key] = c
	}
	return c
}

// forget forgets a rule.
func (l losses) forget(e *entry) {
	delete(l, lostKey{account.Rule, e.id, WorkerLost})
	for i := range e.rule.Out {
		id := e.firstStats + uint32(i)
		delete(l, lostKey{account.Output, id, WorkerLost})
		delete(l, lostKey{account.Output, id, NoDevice})
	}
}

// stats combines the counters of all paths.
func (t *tally) stats(lost losses) RuleStats {
	e := t.entry
	r := RuleStats{Name: e.rule.Name, ID: e.id, Matched: t.matched, LastSeen: -1, Notes: map[Note]Counter{}}
	r.Matched.add(t.tapped.Packets, t.tapped.Bytes)
	if t.lastSeen != 0 {
		r.LastSeen = max(0, monotonic()-monotonicOf(t.lastSeen))
	}
	maps.Copy(r.Notes, t.notes)
	var all sink
	for _, s := range []*sink{&t.kernel, &t.user, &t.copies} {
		for reason, c := range s.drops {
			all.add(reason, c)
		}
	}
	r.Leg, r.Stream = t.leg, t.stream
	all.add(WorkerLost, lost.most(account.Rule, e.id, WorkerLost, t.lostBefore()))
	r.Drops = all.orEmpty()
	r.Outputs = make([]OutputStats, len(t.out))
	for slot := range t.out {
		r.Outputs[slot] = t.output(slot, lost)
	}
	return r
}

func (t *tally) output(slot int, lost losses) OutputStats {
	o, id := &t.out[slot], t.entry.firstStats+uint32(slot)
	stats := OutputStats{Rule: t.entry.rule.Out[slot], Sent: o.kernel.sent}
	stats.Sent.add(o.user.sent.Packets, o.user.sent.Bytes)
	var all sink
	for _, s := range []*sink{&o.kernel.sink, &o.user.sink} {
		for reason, c := range s.drops {
			all.add(reason, c)
		}
	}
	all.add(NoDevice, lost.most(account.Output, id, NoDevice, t.skipped(slot)))
	all.add(WorkerLost, lost.most(account.Output, id, WorkerLost, t.unfinished(slot)))
	stats.Drops = all.orEmpty()
	return stats
}

func (s *sink) orEmpty() map[Reason]Counter {
	if s.drops == nil {
		return map[Reason]Counter{}
	}
	return s.drops
}

// readUser adds the workers' counters: sources as well, or only sinks.
func (t *tally) readUser(a *account.Account, sources bool) {
	for kind, sum := range a.Sums(account.Target{Scope: account.Rule, ID: t.entry.id}) {
		c := Counter{sum.Packets, sum.Bytes}
		switch {
		case kind == account.Delivered:
			t.delivered = c
		case kind >= account.FirstDrop:
			t.user.add(Reason(kind-account.FirstDrop), c)
		case kind >= account.FirstNote:
			t.note(Note(kind-account.FirstNote), c)
		}
		if !sources || kind != account.Delivered && kind != account.Matched {
			continue
		}
		t.came.add(c.Packets, c.Bytes)
		t.lastSeen = max(t.lastSeen, sum.LastSeen)
		if kind == account.Matched {
			t.tapped = c
		}
	}
	for slot := range t.out {
		o := &t.out[slot].user
		for kind, sum := range a.Sums(account.Target{Scope: account.Output, ID: t.entry.firstStats + uint32(slot)}) {
			c := Counter{sum.Packets, sum.Bytes}
			switch {
			case kind == account.Sent:
				o.sent = c
			case kind >= account.FirstDrop:
				o.add(Reason(kind-account.FirstDrop), c)
			}
		}
	}
}

func (t *tally) note(n Note, c Counter) {
	if c.Packets == 0 {
		return
	}
	if t.notes == nil {
		t.notes = map[Note]Counter{}
	}
	sum := t.notes[n]
	sum.add(c.Packets, c.Bytes)
	t.notes[n] = sum
}

// Note is a noteworthy condition of a rule's packets that is not a drop.
type Note uint8

// The notes, as the programs count them.
const (
	Malformed          = Note(bpf.RelayNoteNOTE_MALFORMED)
	OrphanFragment     = Note(bpf.RelayNoteNOTE_ORPHAN)
	UnfinishedChecksum = Note(bpf.RelayNoteNOTE_UNFINISHED)
	Echo               = Note(bpf.RelayNoteNOTE_ECHO)
	notes              = Note(bpf.RelayNoteNOTES)
)

func (n Note) String() string {
	switch n {
	case Malformed:
		return "malformed"
	case OrphanFragment:
		return "orphan_fragment"
	case UnfinishedChecksum:
		return "unfinished_checksum"
	case Echo:
		return "echo"
	default:
		return "note_" + string('0'+rune(n))
	}
}
