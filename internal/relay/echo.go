package relay

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/events"
	"xdpcast/internal/plan"
)

// echoCheck is the interval of reading how many echoes rules have: a look at all drop counters.
const echoCheck = 5 * time.Second

// echoOver is the time without another echo after which a rule echoes no more.
const echoOver = 10 * time.Second

const (
	aboutEchoes = "echoes"
	stateEcho   = "echo"
)

// echoes are the flows whose packets come again from another sender, which the loop guard can only
// note: by name in the kernel.
type echoes struct {
	counts map[string]uint64    // at the last look; nil: there was none
	grew   map[string]time.Time // when a count last grew, of those that echo
}

// look takes new counts, and returns which flows have begun to echo, and which echo no more. A count
// that is gone or has shrunk is of a flow that was removed; one added since may have its name.
func (e *echoes) look(now time.Time, counts map[string]uint64) (began, ended []string) {
	if e.grew == nil {
		e.grew = map[string]time.Time{}
	}
	for name, n := range counts {
		before := e.counts[name]
		if n < before {
			before = 0
			delete(e.grew, name)
		}
		if e.counts == nil || n <= before {
			continue // counted before the daemon started, or as before
		}
		if _, echoing := e.grew[name]; !echoing {
			began = append(began, name)
		}
		e.grew[name] = now
	}
	for name, at := range e.grew {
		if _, counted := counts[name]; !counted || now.Sub(at) >= echoOver {
			delete(e.grew, name)
			ended = append(ended, name)
		}
	}
	e.counts = counts
	slices.Sort(began)
	slices.Sort(ended)
	return began, ended
}

// text describes the echoes of a rule, and what to do; "" if it has none.
func (e *echoes) text(p *plan.RulePlan) string {
	n, echoing := uint64(0), false
	for _, f := range p.Flows {
		if _, ok := e.grew[f.Flow.Name]; ok {
			n, echoing = n+e.counts[f.Flow.Name], true
		}
	}
	if !echoing {
		return ""
	}
	return fmt.Sprintf("%d packets came again from another sender (echo), and are relayed: if a host resends the rule's own, loop=two-way on the input drops them; xdpcast tap %s shows its MAC address", n, p.Rule.Name)
}

// logEchoes logs which rules began or ceased to echo since the last call.
func (r *Relay) logEchoes() {
	counts, err := r.loader.Echoes()
	if err != nil {
		r.warnUnless(aboutEchoes, err)
		return
	}
	began, ended := r.echoes.look(time.Now(), counts)
	for _, name := range began {
		if p, _ := r.plan.Flow(name); p != nil {
			text := r.echoes.text(p)
			r.log.Warn("rule may be looping", "rule", p.Rule.Name, "echo", text)
			r.opts.Events.Add(events.Event{Kind: events.KindLoop, Rule: p.Rule.Name, State: stateEcho, Cause: text})
		}
	}
	for _, name := range ended {
		if p, _ := r.plan.Flow(name); p != nil && r.echoes.text(p) == "" {
			r.log.Info("rule echoes no more", "rule", p.Rule.Name)
			r.opts.Events.Add(events.Event{Kind: events.KindLoop, Rule: p.Rule.Name, State: stateEnded, Before: stateEcho})
		}
	}
	var names []string
	for _, name := range slices.Sorted(maps.Keys(r.echoes.grew)) {
		if p, _ := r.plan.Flow(name); p != nil && !slices.Contains(names, p.Rule.Name) {
			names = append(names, p.Rule.Name)
		}
	}
	err = nil
	if len(names) > 0 {
		err = errors.New("packets come again from another sender, perhaps in a loop: xdpcast rule show says what to do (rules " + strings.Join(names[:min(len(names), 8)], ", ") + ")")
	}
	r.warnUnless(aboutEchoes, err)
}

// markEcho notes the echoes of an active rule.
func (r *Relay) markEcho(status *control.RuleStatus, p *plan.RulePlan) {
	if len(r.echoes.grew) > 0 && status.State == control.StateActive && status.Reason == "" {
		status.Reason = r.echoes.text(p)
	}
}
