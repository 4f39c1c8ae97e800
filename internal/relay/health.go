package relay

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/events"
	"xdpcast/internal/plan"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
	"xdpcast/pkg/rules"
)

// What makes an alarm.
const (
	legSilent = time.Second // without a packet, while another input has some
	legBehind = 0.75        // of what the numbers of an input can bear
	lossRests = time.Minute // without a number lost, for the alarm to end
	flapRests = time.Minute // without its cause, for an alarm to end that had ended and begun again within as long
	// Restarts and changes of the input, of one stream, are told at once up to a number; after it one a minute tells of all.
	happensAtOnce = 5
	happensEvery  = time.Minute
)

// Alarms of streams: states of their events.
const (
	alarmSilent    = "silent"
	alarmBehind    = "behind"
	alarmDifferent = "different"
	alarmLost      = "lost"
	// What happens and does not last.
	streamRelayed   = "relayed"
	streamRestarted = "restarted"
)

const aboutStreams = "streams"

// wholeStream is in place of an input in what is of all of them.
const wholeStream = -1

// alarm is what somebody should look after.
type alarm struct {
	kind  string
	input int // its place in the rule, or wholeStream
	text  string
}

// key tells alarms apart: their texts have figures.
func (a alarm) key() alarmKey { return alarmKey{a.kind, a.input} }

type alarmKey struct {
	kind  string
	input int
}

// inputText is how reasons name an input: as the errors of rules do.
func inputText(input, of int) string {
	switch {
	case input == wholeStream:
		return ""
	case of == 1:
		return "in"
	}
	return fmt.Sprintf("in[%d]", input)
}

// alarmsOf are the alarms that the statistics of a rule's inputs raise by themselves.
func alarmsOf(legs []*loader.RuleStats) (all []alarm) {
	freshest := time.Duration(-1)
	for _, leg := range legs {
		if leg != nil && leg.Leg != nil && leg.Leg.LastSeen >= 0 && (freshest < 0 || leg.Leg.LastSeen < freshest) {
			freshest = leg.Leg.LastSeen
		}
	}
	if freshest < 0 || freshest > legSilent {
		return nil // all are, which is the rule's silence
	}
	for i, leg := range legs {
		if leg == nil || leg.Leg == nil {
			continue
		}
		l, name := leg.Leg, inputText(i, len(legs))
		switch {
		case l.LastSeen < 0:
			all = append(all, alarm{alarmSilent, i, name + " has received no packets"})
		case l.LastSeen > freshest+legSilent:
			all = append(all, alarm{alarmSilent, i, fmt.Sprintf("%s is silent for %v", name, l.LastSeen.Round(time.Second))})
		case l.Differs:
			all = append(all, alarm{alarmDifferent, i, fmt.Sprintf("%s delivers packets that differ from those relayed with the same numbers (%d of them seen): is it another stream?", name, l.Differ)})
		case float64(l.Behind) > legBehind*float64(l.Bound):
			all = append(all, alarm{alarmBehind, i, fmt.Sprintf("%s is %d numbers behind: from %d on copies pass twice, or are lost (want a larger window, or less delay between the inputs)", name, l.Behind, l.Bound)})
		}
	}
	return all
}

// lossWatch finds what is lost for good: a number that is missing at two looks in a row, since copies
// and late packets fill in what one look misses.
type lossWatch struct {
	known bool
	last  uint64 // at the last look
	told  uint64
	sum   uint64    // since the alarm began
	at    time.Time // when some were last lost; zero: no alarm
}

// look takes the counter at a time.
func (l *lossWatch) look(counter uint64, now time.Time) {
	switch sure := min(counter, l.last); {
	case !l.known: // the first look
		l.told = counter
	case max(counter, l.last) < l.told:
		// The counter began again. Less at one look alone is not that: what a stream lost before a pause is counted
		// during the pause, and after it once the next numbers are older than the skew.
		l.told = max(counter, l.last)
	case sure > l.told:
		l.sum, l.told, l.at = l.sum+sure-l.told, sure, now
	}
	l.known, l.last = true, counter
	if !l.at.IsZero() && now.Sub(l.at) >= lossRests {
		l.sum, l.at = 0, time.Time{}
	}
}

// watchedStream is what was found of the stream of a rule so far.
type watchedStream struct {
	lost     map[int]*lossWatch // by input, or wholeStream
	standing []alarm
	found    []alarm                 // at the last look: an alarm begins when its cause is found twice in a row
	flaps    map[alarmKey]*flapWatch // of the alarms that have begun before
	relayed  int                     // with failover, the input that is, as told; -1: none
	restarts []uint64                // told
	told     pace                    // of what happens
}

// pace says how often something is told.
type pace struct {
	left float64
	at   time.Time // zero: nothing told
}

// may says whether another event may be told now. If not, the next look asks again.
func (p *pace) may(now time.Time) bool {
	if p.left += float64(now.Sub(p.at)) / float64(happensEvery); p.at.IsZero() || p.left > happensAtOnce {
		p.left = happensAtOnce
	}
	if p.at = now; p.left < 1 {
		return false
	}
	p.left--
	return true
}

// flapWatch keeps an alarm whose cause comes and goes from being told each time.
type flapWatch struct {
	caused  time.Time // when the cause was last found
	ended   time.Time // when the alarm last ended; zero: never
	flapped bool      // it began again within flapRests
}

// streams watches the streams of rules with several inputs or with health=.
type streams struct {
	plan  *plan.Plan
	rules []*plan.RulePlan // of the plan, those that have one
	seen  map[string]*watchedStream
}

// watches says whether a rule has a stream.
func watches(r *plan.Rule) bool { return r.Stream != nil || r.Accept.Health() != (rules.Health{}) }

// follow finds the rules of a plan that have a stream.
func (s *streams) follow(p *plan.Plan) {
	if s.plan == p {
		return
	}
	s.plan, s.rules = p, nil
	for _, r := range p.Rules {
		if watches(r.Rule) {
			s.rules = append(s.rules, r)
		}
	}
	for name := range s.seen {
		if r := p.Rule(name); r == nil || !watches(r.Rule) {
			delete(s.seen, name)
		}
	}
}

// streamChange is what a look at a stream found: alarms that began and ended, and what happened.
type streamChange struct {
	began, ended []alarm
	happened     []events.Event // without kind and rule
}

// look looks at a stream, given the statistics of the rule's inputs; nil for those not in force.
func (s *watchedStream) look(legs []*loader.RuleStats, now time.Time) (c streamChange) {
	standing := s.settled(alarmsOf(legs), now)
	lost := func(input int, counter uint64, text string) {
		l := s.lost[input]
		if l == nil {
			l = &lossWatch{}
			s.lost[input] = l
		}
		if l.look(counter, now); !l.at.IsZero() {
			standing = append(standing, alarm{alarmLost, input, fmt.Sprintf(text, l.sum)})
		}
	}
	if len(s.restarts) != len(legs) {
		s.restarts, s.relayed = make([]uint64, len(legs)), wholeStream
		for i, leg := range legs {
			s.restarts[i] = restartsOf(leg)
		}
	}
	merged := false
	for i, leg := range legs {
		if leg == nil || leg.Leg == nil {
			continue
		}
		st := leg.Stream
		switch {
		case st.Settings.Merges():
			if !merged {
				merged = true
				lost(wholeStream, st.Lost, "%d numbers came by no input")
				s.restarted(&c, i, wholeStream, leg, now)
			}
		case st.Settings.Kind == packet.StreamFailover:
			switch before := inputText(s.relayed, len(legs)); {
			case !leg.Leg.Active || s.relayed == i:
			case before == "":
				s.relayed = i
			case s.told.may(now):
				c.happened = append(c.happened, events.Event{Input: inputText(i, len(legs)), State: streamRelayed, Before: before})
				s.relayed = i
			}
			fallthrough
		default:
			if st.Settings.Watch == packet.StreamNone {
				continue
			}
			lost(i, leg.Leg.Lost, inputText(i, len(legs))+" lost %d numbers")
			if st.Settings.Kind == packet.StreamSingle {
				s.restarted(&c, i, i, leg, now)
			}
		}
	}
	for _, a := range standing {
		if !slices.ContainsFunc(s.standing, func(o alarm) bool { return o.key() == a.key() }) {
			c.began = append(c.began, a)
		}
	}
	for _, a := range s.standing {
		if !slices.ContainsFunc(standing, func(o alarm) bool { return o.key() == a.key() }) {
			c.ended = append(c.ended, a)
		}
	}
	s.standing = standing
	for _, a := range c.ended {
		if w := s.flaps[a.key()]; w != nil {
			w.ended = now
		}
	}
	return c
}

// settled returns the alarms to raise, given those whose cause is found now: a cause that only one look finds, such as the
// delay between two inputs that rarely have a packet, raises none, and the alarm of one that comes and goes stays.
func (s *watchedStream) settled(found []alarm, now time.Time) (standing []alarm) {
	has := func(all []alarm, a alarm) bool {
		return slices.ContainsFunc(all, func(o alarm) bool { return o.key() == a.key() })
	}
	for _, a := range found {
		stands := has(s.standing, a)
		if !stands && !has(s.found, a) {
			continue
		}
		standing = append(standing, a)
		w := s.flaps[a.key()]
		if w == nil {
			w = &flapWatch{}
			s.flaps[a.key()] = w
		}
		if w.caused = now; !stands {
			w.flapped = !w.ended.IsZero() && now.Sub(w.ended) < flapRests
		}
	}
	for _, a := range s.standing {
		if w := s.flaps[a.key()]; w != nil && w.flapped && !has(found, a) && now.Sub(w.caused) < flapRests {
			standing = append(standing, a)
		}
	}
	s.found = found
	return standing
}

// restartsOf counts how often the sender of a stream began again, or of an input that is watched by
// itself was another.
func restartsOf(leg *loader.RuleStats) uint64 {
	switch {
	case leg == nil || leg.Leg == nil:
		return 0
	case leg.Stream.Settings.Kind == packet.StreamSingle:
		return leg.Leg.Senders + leg.Leg.Resets
	}
	return leg.Stream.Restarts
}

// restarted notes that a sender began again since that was last told, of an input or of all.
func (s *watchedStream) restarted(c *streamChange, i, of int, leg *loader.RuleStats, now time.Time) {
	count := restartsOf(leg)
	if n := count - s.restarts[i]; count > s.restarts[i] {
		if !s.told.may(now) {
			return
		}
		e := events.Event{Input: inputText(of, len(s.restarts)), State: streamRestarted, Cause: "the sender began again"}
		if n > 1 {
			e.Cause = fmt.Sprintf("the sender began again %d times", n)
		}
		c.happened = append(c.happened, e)
	}
	s.restarts[i] = count
}

// watchStreams looks at all streams, and logs what has changed.
func (r *Relay) watchStreams() {
	s := &r.streams
	s.follow(r.plan)
	if len(s.rules) == 0 {
		return
	}
	var names []string
	for _, p := range s.rules {
		for _, f := range p.Flows {
			names = append(names, f.Flow.Name)
		}
	}
	stats, err := r.loader.Legs(names)
	r.warnUnless(aboutStreams, err)
	if err != nil {
		return
	}
	now := time.Now()
	for _, p := range s.rules {
		name := p.Rule.Name
		w := s.seen[name]
		if w == nil {
			w = &watchedStream{lost: map[int]*lossWatch{}, flaps: map[alarmKey]*flapWatch{}}
			if s.seen == nil {
				s.seen = map[string]*watchedStream{}
			}
			s.seen[name] = w
		}
		c := w.look(legsOf(p, stats), now)
		for _, a := range c.began {
			r.log.Warn("stream", "rule", name, "alarm", a.kind, "cause", a.text)
			r.opts.Events.Add(events.Event{Kind: events.KindStream, Rule: name, Input: inputText(a.input, len(p.Flows)), State: a.kind, Cause: a.text})
		}
		for _, a := range c.ended {
			r.log.Info("stream", "rule", name, "ended", a.kind, "cause", a.text)
			r.opts.Events.Add(events.Event{Kind: events.KindStream, Rule: name, Input: inputText(a.input, len(p.Flows)), State: stateEnded, Before: a.kind, Cause: a.text})
		}
		for _, e := range c.happened {
			e.Kind, e.Rule = events.KindStream, name
			r.opts.Events.Add(e)
		}
	}
}

// legsOf are the statistics of a rule's flows in their order, nil for those not in force.
func legsOf(p *plan.RulePlan, stats map[string]*loader.RuleStats) []*loader.RuleStats {
	all := make([]*loader.RuleStats, len(p.Flows))
	for i, f := range p.Flows {
		all[i] = stats[f.Flow.Name]
	}
	return all
}

// maxStreamWarnings is how many streams the status names.
const maxStreamWarnings = 20

// streamWarnings says which streams have alarms.
func (r *Relay) streamWarnings() (warnings []string) {
	names := make([]string, 0, len(r.streams.seen))
	for name, w := range r.streams.seen {
		if len(w.standing) > 0 {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for i, name := range names {
		if i == maxStreamWarnings {
			return append(warnings, fmt.Sprintf("%s: %d more rules have alarms: xdpcast health shows them", aboutStreams, len(names)-i))
		}
		for _, a := range r.streams.seen[name].standing {
			warnings = append(warnings, fmt.Sprintf("rule %s: %s", name, a.text))
		}
	}
	return warnings
}

// lossAlarms are the alarms of a rule that one look does not find.
func (r *Relay) lossAlarms(name string) (texts []string) {
	if w := r.streams.seen[name]; w != nil {
		for _, a := range w.standing {
			if a.kind == alarmLost {
				texts = append(texts, a.text)
			}
		}
	}
	return texts
}

// HealthOf is what watches a flow with one input, as rules have it.
func HealthOf(leg *flow.Leg) rules.Health { return plan.HealthOf(leg) }

// legStatus describes one of several inputs, or one with health=.
func legStatus(s *loader.RuleStats, won uint64, now time.Time) *control.LegStatus {
	l := s.Leg
	status := &control.LegStatus{
		Relayed: l.Active, Won: l.Won, Lost: l.Lost, Doubled: l.Doubled, Reordered: l.Reordered, Resets: l.Resets, Senders: l.Senders,
		Different: l.Differ, Unnumbered: l.Others, Behind: l.Behind, Bound: l.Bound,
		Jitter: l.Jitter.Seconds(), Lag: l.Lag.Seconds(),
	}
	switch {
	case l.Stamped:
		status.JitterBy = control.JitterByTimestamps
	case l.Jitter > 0:
		status.JitterBy = control.JitterByGaps
	}
	if won > 0 {
		status.Share = float64(l.Won) / float64(won)
	}
	if l.LastSeen >= 0 {
		at := now.Add(-l.LastSeen)
		status.LastSeen = &at
	}
	return status
}

// StreamStatusOf describes the stream of a rule with several inputs or with health=, given the
// statistics of its flows; nil for another rule.
func StreamStatusOf(legs []*loader.RuleStats) *control.StreamStatus {
	at := slices.IndexFunc(legs, func(s *loader.RuleStats) bool { return s != nil && s.Stream != nil })
	if at < 0 {
		return nil
	}
	s := legs[at].Stream
	status := &control.StreamStatus{Expected: s.Expected, Lost: s.Lost, Restarts: s.Restarts}
	for _, a := range alarmsOf(legs) {
		status.Alarms = append(status.Alarms, a.text)
	}
	return status
}

// describeLegs describes the inputs of a rule with several, or of one with health=.
func (r *Relay) describeLegs(status *control.RuleStatus, p *plan.RulePlan, stats map[string]*loader.RuleStats) {
	if !watches(p.Rule) {
		return
	}
	all := legsOf(p, stats)
	won := uint64(0)
	for _, s := range all {
		if s != nil && s.Leg != nil {
			won += s.Leg.Won
		}
	}
	if status.Stream = StreamStatusOf(all); status.Stream != nil {
		status.Stream.Alarms = append(status.Stream.Alarms, r.lossAlarms(p.Rule.Name)...)
		if len(status.Stream.Alarms) > 0 {
			status.Reason = cmp.Or(status.Reason, status.Stream.Alarms[0])
		}
	}
	now := time.Now()
	status.Inputs = []control.InputStatus{}
	for i, f := range p.Flows {
		s := control.InputStatus{Interface: f.In.Name, State: f.State.String(), Reason: f.Reason}
		if p.Rule.Stream != nil {
			s.Input = control.FormatInput(p.Rule.Leg(i))
		}
		if all[i] != nil {
			s.Matched, s.Drops = control.Counter(all[i].Matched), Drops(all[i].Drops)
			if all[i].Leg != nil {
				s.Leg = legStatus(all[i], won, now)
			}
		}
		status.Inputs = append(status.Inputs, s)
	}
}
