package relay

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/events"
	"xdpcast/internal/plan"
	"xdpcast/pkg/loader"
)

// loopCheck is the interval of reading the loop guard's findings.
const loopCheck = time.Second

const aboutLoops = "loops"

// macTaker is a user-space path that does the loop check itself.
type macTaker interface{ SetOwnMACs(macs [][6]byte) }

// publishMACs passes this host's MAC addresses to the loop check when they change.
func (r *Relay) publishMACs() {
	macs := r.network.OwnMACs()
	if r.macsKnown && slices.Equal(macs, r.macs) {
		return
	}
	r.macs = macs
	for _, p := range r.tables.paths {
		if t, ok := p.path.(macTaker); ok {
			t.SetOwnMACs(macs)
		}
	}
	err := r.loader.SetOwnMACs(macs)
	r.macsKnown = err == nil
	r.warnUnless(aboutOwnMACs, err)
}

const aboutOwnMACs = "own MAC addresses"

// loops are the rules whose packets come back, on all paths, by the kernel's names.
func (r *Relay) loops() map[string]loader.LoopingRule {
	all, err := r.loader.Loops()
	r.warnUnless(aboutLoops, err)
	for _, p := range r.tables.paths {
		if l, ok := p.path.(interface{ Loops() []loader.LoopingRule }); ok {
			all = append(all, l.Loops()...)
		}
	}
	byName := make(map[string]loader.LoopingRule, len(all))
	for _, l := range all {
		if other, ok := byName[l.Rule]; !ok || l.Last.After(other.Last) {
			byName[l.Rule] = l
		}
	}
	return byName
}

// loopText describes the loop path of a rule's packets; "" if none come back.
func (r *Relay) loopText(p *plan.RulePlan, loops map[string]loader.LoopingRule) string {
	for _, f := range p.Flows {
		if l, ok := loops[f.Flow.Name]; ok && l.Looping && len(l.Ways) > 0 {
			return r.wayText(&l)
		}
	}
	return ""
}

func (r *Relay) wayText(l *loader.LoopingRule) string {
	way := &l.Ways[0]
	dropped := uint64(0)
	for i := range l.Ways {
		dropped += l.Ways[i].Packets
	}
	iface, from := r.nameOf(way.Index), way.Source.String()
	out := strings.Join(r.outputsOf(way.From), ", ")
	if way.MAC == [6]byte{} || out == "" { // no Ethernet, or the rule has changed meanwhile
		return fmt.Sprintf("packets come back on %s from %s; %d dropped", iface, from, dropped)
	}
	return fmt.Sprintf("packets come back on %s from %s (%s), having left by rule %s on %s; %d dropped",
		iface, from, net.HardwareAddr(way.MAC[:]), way.From, out, dropped)
}

// outputsOf are the output interfaces of a flow.
func (r *Relay) outputsOf(name string) (out []string) {
	_, f := r.plan.Flow(name)
	if f == nil {
		return nil
	}
	for i := range f.Outputs {
		if o := f.Outputs[i].Interface; i < len(f.Flow.Out) && f.Flow.Out[i].Ready && !slices.Contains(out, o) {
			out = append(out, o)
		}
	}
	return out
}

// markLooping sets the state of an active rule to looping.
func (r *Relay) markLooping(status *control.RuleStatus, p *plan.RulePlan, loops map[string]loader.LoopingRule) {
	if len(loops) == 0 || status.State != control.StateActive {
		return
	}
	if text := r.loopText(p, loops); text != "" {
		status.State, status.Reason = control.StateLooping, text
	}
}

// loopLog knows which rules were logged as looping, by name: an added rule is another one than a removed
// one of its name.
type loopLog map[string]*plan.Rule

// look takes the rules that are looping, and returns which have begun to, and which loop no more. The
// latter are logged only if they are still wanted.
func (l *loopLog) look(looping []*plan.Rule) (began []*plan.Rule, ended []string) {
	now := make(loopLog, len(looping))
	for _, rule := range looping {
		now[rule.Name] = rule
		if (*l)[rule.Name] != rule {
			began = append(began, rule)
		}
	}
	for name := range *l {
		if now[name] == nil {
			ended = append(ended, name)
		}
	}
	slices.Sort(ended)
	*l = now
	return began, ended
}

// logLoops logs loops that began or ended since the last call.
func (r *Relay) logLoops() {
	loops := r.loops()
	if len(loops) == 0 && len(r.looping) == 0 {
		return
	}
	var looping []*plan.Rule
	ways := map[*plan.Rule]string{}
	for _, p := range r.plan.Rules {
		if text := r.loopText(p, loops); text != "" {
			looping, ways[p.Rule] = append(looping, p.Rule), text
		}
	}
	began, ended := r.looping.look(looping)
	for _, rule := range began {
		r.log.Warn("rule is looping", "rule", rule.Name, "way", ways[rule])
		r.opts.Events.Add(events.Event{Kind: events.KindLoop, Rule: rule.Name, State: control.StateLooping, Cause: ways[rule]})
	}
	for _, name := range ended {
		if r.plan.Rule(name) != nil {
			r.log.Info("rule is no longer looping", "rule", name)
			r.opts.Events.Add(events.Event{Kind: events.KindLoop, Rule: name, State: stateEnded, Before: control.StateLooping})
		}
	}
}
