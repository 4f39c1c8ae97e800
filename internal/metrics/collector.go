package metrics

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/events"
)

// Selection selects the rules that have metrics of their own. Totals always cover all rules.
type Selection struct {
	kind    string
	pattern *regexp.Regexp
}

// ParseSelection reads "all", "active" (rules that a packet has matched), "none", or a regular
// expression (RE2) that the whole name of a rule must match.
func ParseSelection(s string) (Selection, error) {
	switch s {
	case "all", "active", "none":
		return Selection{kind: s}, nil
	}
	pattern, err := regexp.Compile("^(?:" + s + ")$")
	if err != nil {
		return Selection{}, fmt.Errorf("rules %q: want all, active, none, or a regular expression: %w", s, err)
	}
	return Selection{pattern: pattern}, nil
}

func (s Selection) takes(r *control.RuleStatus) bool {
	switch {
	case s.pattern != nil:
		return s.pattern.MatchString(r.Name)
	case s.kind == "active":
		return r.Matched.Packets > 0
	default:
		return s.kind != "none"
	}
}

// collector reads the relay for each scrape. It may be used from any goroutine.
type collector struct {
	definitions
	events   *events.Log
	backend  *Backend
	selected Selection
	timeout  time.Duration
}

func (s *sink) count(packets, bytes *metric, c control.Counter, labels ...string) {
	s.put(packets, float64(c.Packets), labels...)
	s.put(bytes, float64(c.Bytes), labels...)
}

func one(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}

// seconds converts a time to seconds since 1970, as Prometheus uses it.
func seconds(t time.Time) float64 { return float64(t.UnixNano()) / 1e9 }

// collect reads the relay. Parts that fail are omitted and reported by xdpcast_scrape_failed; the
// rest is still collected.
func (c *collector) collect(ctx context.Context) *sink {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	s := newSink(c.all())
	status, err := c.backend.Status(ctx)
	s.put(c.scrapeFailed, one(err != nil), "status")
	if err == nil {
		c.collectStatus(s, &status)
	}
	stats, err := c.backend.Stats(ctx)
	s.put(c.scrapeFailed, one(err != nil), "stats")
	if err == nil {
		c.collectStats(s, &stats)
	}
	groups, err := c.backend.GroupStates(ctx)
	s.put(c.scrapeFailed, one(err != nil), "groups")
	if err == nil {
		c.collectGroups(s, groups)
	}
	r := c.backend.reloaded()
	s.put(c.reloads, float64(r.tried))
	s.put(c.reloadSucceeded, one(!r.failed))
	if last := r.succeeded; !last.IsZero() {
		s.put(c.reloadTime, seconds(last))
	} else if !status.Started.IsZero() {
		s.put(c.reloadTime, seconds(status.Started))
	}
	counts := c.events.Counts()
	for _, kind := range events.Kinds() {
		s.put(c.eventCount, float64(counts[kind]), string(kind))
	}
	return s
}

func (c *collector) collectStatus(s *sink, status *control.Status) {
	s.put(c.buildInfo, 1, status.Version, strconv.FormatUint(uint64(status.Schema), 10))
	s.put(c.started, seconds(status.Started))
	s.put(c.ready, one(status.Ready))
	s.put(c.warnings, float64(len(status.Warnings)))
	s.put(c.rules, float64(status.Active), control.StateActive)
	s.put(c.rules, float64(status.Pending), control.StatePending)
	s.put(c.rules, float64(status.Failed), control.StateFailed)
	for i := range status.Interfaces {
		n := &status.Interfaces[i]
		s.put(c.interfaceInfo, 1, n.Name, n.Mode)
		s.put(c.joinsAttempted, float64(n.JoinsAttempted), n.Name)
		s.put(c.joinsSucceeded, float64(n.JoinsSucceeded), n.Name)
		s.put(c.joinsFailed, float64(n.JoinsFailed), n.Name)
		s.put(c.leavesAttempted, float64(n.LeavesAttempted), n.Name)
		s.put(c.leavesSucceeded, float64(n.LeavesSucceeded), n.Name)
		s.put(c.leavesFailed, float64(n.LeavesFailed), n.Name)
		for _, f := range []struct {
			protocol string
			*control.Multicast
		}{{"igmp", n.IGMP}, {"mld", n.MLD}} {
			if m := f.Multicast; m != nil && m.QuerierSeen != nil {
				s.put(c.querierSeen, seconds(*m.QuerierSeen), n.Name, f.protocol, m.Querier)
				s.put(c.queries, float64(m.Queries), n.Name, f.protocol)
			}
		}
	}
	c.collectWorkers(s, status.Workers)
	if m := status.Mroutes; m != nil {
		s.put(c.mroutes, float64(m.Entries))
		s.put(c.mroutesAccelerated, float64(m.Accelerated))
		for _, left := range m.Left {
			s.put(c.mroutesLeft, float64(left.Entries), left.Reason)
		}
	}
}

// workerKey is what workers are grouped by.
type workerKey struct{ iface, path, state string }

func (c *collector) collectWorkers(s *sink, workers []control.Worker) {
	states := map[workerKey]int{}
	for i := range workers {
		w := &workers[i]
		states[workerKey{w.Interface, w.Path, w.State}]++
		queue := strconv.Itoa(w.Queue)
		s.put(c.workerReceived, float64(w.Received), w.Interface, w.Path, queue)
		s.put(c.workerFailures, float64(w.Failures), w.Interface, w.Path, queue)
	}
	keys := slices.SortedFunc(maps.Keys(states), func(a, b workerKey) int {
		return cmp.Or(strings.Compare(a.iface, b.iface), strings.Compare(a.path, b.path), strings.Compare(a.state, b.state))
	})
	for _, key := range keys {
		s.put(c.workers, float64(states[key]), key.iface, key.path, key.state)
	}
}

func (c *collector) collectStats(s *sink, stats *control.Stats) {
	s.count(c.passedPackets, c.passedBytes, stats.Passed)
	s.count(c.broadcastPackets, c.broadcastBytes, stats.PassedBroadcast)
	for _, d := range stats.Drops {
		s.count(c.totalDropped, c.totalDroppedBytes, d.Counter, d.Reason)
	}
	s.count(c.fragments, c.fragmentBytes, stats.Fragments.First, "first")
	s.count(c.fragments, c.fragmentBytes, stats.Fragments.Later, "later")
	s.count(c.fragments, c.fragmentBytes, stats.Fragments.Orphan, "orphan")
	for _, d := range stats.TransmitDrops {
		s.put(c.unsent, float64(d.Packets), d.Interface, d.Reason)
	}
	for _, d := range stats.ReceiveDrops {
		s.put(c.lost, float64(d.Packets), d.Interface, d.Path, d.Reason)
	}
	for i := range stats.Rules {
		if r := &stats.Rules[i]; c.selected.takes(r) {
			c.collectRule(s, r)
		}
	}
}

func (c *collector) collectRule(s *sink, r *control.RuleStatus) {
	s.put(c.ruleInfo, 1, r.Name, r.Origin, r.In, r.UsedPath)
	s.put(c.ruleState, 1, r.Name, r.State)
	s.count(c.ruleReceivedPackets, c.ruleReceivedBytes, r.Matched, r.Name)
	if r.LastSeen != nil {
		s.put(c.ruleLast, seconds(*r.LastSeen), r.Name)
	}
	for _, d := range r.Drops {
		s.count(c.droppedPackets, c.droppedBytes, d.Counter, r.Name, "in", d.Reason)
	}
	for _, n := range r.Notes {
		s.count(c.notedPackets, c.notedBytes, n.Counter, r.Name, n.Reason)
	}
	c.collectStream(s, r)
	for i := range r.Outputs {
		o := &r.Outputs[i]
		slot := strconv.Itoa(o.Slot)
		s.put(c.outputState, 1, r.Name, slot, o.Interface, o.State)
		s.count(c.outputSentPackets, c.outputSentByte, o.Sent, r.Name, slot, o.Interface)
		for _, d := range o.Drops {
			s.count(c.droppedPackets, c.droppedBytes, d.Counter, r.Name, slot, d.Reason)
		}
	}
}

// collectStream adds the metrics of a rule's inputs if it has several, or one with health=.
func (c *collector) collectStream(s *sink, r *control.RuleStatus) {
	if r.Stream == nil {
		return
	}
	several := r.Merge != "" || r.Failover != ""
	if several {
		s.put(c.streamExpected, float64(r.Stream.Expected), r.Name)
		s.put(c.streamLost, float64(r.Stream.Lost), r.Name)
		s.put(c.streamRestarts, float64(r.Stream.Restarts), r.Name)
	}
	for i := range r.Inputs {
		in, input := &r.Inputs[i], strconv.Itoa(i)
		s.count(c.inputPackets, c.inputBytes, in.Matched, r.Name, input)
		for _, d := range in.Drops {
			s.count(c.inputDroppedPackets, c.inputDroppedBytes, d.Counter, r.Name, input, d.Reason)
		}
		if l := in.Leg; l != nil {
			s.put(c.legLost, float64(l.Lost), r.Name, input)
			s.put(c.legDoubled, float64(l.Doubled), r.Name, input)
			s.put(c.legReordered, float64(l.Reordered), r.Name, input)
			s.put(c.legResets, float64(l.Resets), r.Name, input)
			s.put(c.legSenders, float64(l.Senders), r.Name, input)
			s.put(c.legUnnumbered, float64(l.Unnumbered), r.Name, input)
			if l.JitterBy != "" {
				s.put(c.legJitter, l.Jitter, r.Name, input, l.JitterBy)
			}
			if l.LastSeen != nil {
				s.put(c.legLast, seconds(*l.LastSeen), r.Name, input)
			}
			if !several {
				continue
			}
			s.put(c.legWon, float64(l.Won), r.Name, input)
			s.put(c.legLag, l.Lag, r.Name, input)
			s.put(c.legDiffer, float64(l.Different), r.Name, input)
			s.put(c.legBehind, float64(l.Behind), r.Name, input)
			s.put(c.legBound, float64(l.Bound), r.Name, input)
		}
	}
}

func (c *collector) collectGroups(s *sink, states map[string]map[string]int) {
	for _, iface := range slices.Sorted(maps.Keys(states)) {
		// All states, so that an alert on one works before it first occurs.
		for _, state := range []string{control.GroupWanted, control.GroupJoined, control.GroupRetrying, control.GroupFailed} {
			s.put(c.memberships, float64(states[iface][state]), iface, state)
		}
	}
}

// Markdown describes every metric, for docs/metrics.md.
func Markdown() string {
	d := newDefinitions()
	var b strings.Builder
	for _, m := range d.all() {
		labels := make([]string, len(m.labels))
		for i, l := range m.labels {
			labels[i] = "`" + l + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", m.name, m.kind, strings.Join(labels, ", "), strings.ReplaceAll(m.help, "|", "\\|"))
	}
	return b.String()
}

// Names returns the name of every metric, sorted.
func Names() []string {
	d := newDefinitions()
	var names []string
	for _, m := range d.all() {
		names = append(names, m.name)
	}
	slices.Sort(names)
	return names
}
