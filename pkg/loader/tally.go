package loader

import (
	"maps"

	"xdpcast/bpf"
	"xdpcast/internal/account"
)

// tally is all that was counted of one rule. What the programs count and what workers
// count is apart, since packets are lost in different places between two counters.
type tally struct {
	entry *entry
	// Sources: what is to be accounted for.
	matched Counter // by the relay program
	handed  Counter // of them, to AF_XDP sockets
	came    Counter // to workers, from sockets or the packet tap
	tapped  Counter // of them, from the packet tap
	// Sinks.
	delivered Counter // to workers, from sockets
	kernel    sink
	user      sink
	out       []outputTally
	notes     map[Note]Counter
	lastSeen  uint64
	// Of a leg, read with the sources: copies are those that its stream did not need.
	leg    *LegStats
	stream *StreamStats
	copies sink
}

// sink is what ended on the way to the outputs.
type sink struct{ drops map[Reason]Counter }

type outputTally struct{ kernel, user outputSink }

// outputSink is where one output's copies ended.
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

// less is c without what ended in the sinks.
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

// lostBefore is what sockets were given and workers did not get.
func (t *tally) lostBefore() Counter {
	lost := t.handed
	lost.subtract(t.delivered)
	return lost
}

// skipped is what the kernel did not copy to an output: a broadcast skips rows whose
// device is gone, down, or refuses the frame, without a word.
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

// unfinished is what came to workers and did not end at an output.
func (t *tally) unfinished(slot int) Counter {
	o := &t.out[slot].user
	rest := t.came.less(&t.user, &o.sink)
	rest.subtract(o.sent)
	return rest
}

// missing says whether something is not accounted for, or still on its way.
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

// resetSinks forgets what ended where, to read it again.
func (t *tally) resetSinks() {
	t.delivered, t.kernel, t.user, t.notes = Counter{}, sink{}, sink{}, nil
	clear(t.out)
}

// lostKey is one of the counters that are a difference of others.
type lostKey struct {
	scope  account.Scope
	id     uint32
	reason Reason
}

// losses keeps the most that each difference has been: while packets flow it is too low,
// for what came after the sources were read has reached the sinks, and a counter must not
// run backwards.
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

// stats makes one account of what was counted on all paths.
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

// readUser adds what workers have counted: sources as well, or sinks alone.
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

// Note says what is worth knowing of a rule's packets, and is no drop.
type Note uint8

// The notes, as the programs count them.
const (
	Malformed          = Note(bpf.RelayNoteNOTE_MALFORMED)
	OrphanFragment     = Note(bpf.RelayNoteNOTE_ORPHAN)
	UnfinishedChecksum = Note(bpf.RelayNoteNOTE_UNFINISHED)
	Echo               = Note(bpf.RelayNoteNOTE_ECHO)
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
