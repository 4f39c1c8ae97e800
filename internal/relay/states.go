package relay

import (
	"context"
	"log/slog"

	"xdpcast/internal/plan"
)

// states logs changes of the states of rules.
type states struct {
	log  *slog.Logger
	last *plan.Plan
	// told has the last logged states of the rules that are not complete.
	told map[string]string
}

// manyStates is the number of changes from which they are logged as a summary.
const manyStates = 32

// stateChange is a change to log.
type stateChange struct {
	level slog.Level
	rule  *plan.RulePlan
}

// tell logs states that changed since the last call, as a summary if there are many.
func (s *states) tell(p *plan.Plan) {
	byLevel := map[slog.Level][]*plan.RulePlan{}
	s.changes(p, func(c stateChange) { byLevel[c.level] = append(byLevel[c.level], c.rule) })
	s.last = p
	for _, level := range []slog.Level{slog.LevelError, slog.LevelWarn, slog.LevelInfo} {
		all := byLevel[level]
		if len(all) > manyStates {
			s.sum(level, all)
			level = slog.LevelDebug
		}
		if !s.log.Enabled(context.Background(), level) {
			continue
		}
		for _, r := range all {
			s.line(level, r)
		}
	}
}

// changes finds the rules whose state differs from the logged one.
func (s *states) changes(p *plan.Plan, add func(stateChange)) {
	var before []*plan.RulePlan
	if s.last != nil {
		before = s.last.Rules
	}
	changedRules(before, p.Rules, func(old, r *plan.RulePlan) {
		if r == nil {
			delete(s.told, old.Rule.Name)
			return
		}
		told, now := s.told[r.Rule.Name], stateText(r)
		if told == now {
			return // 100,000 new healthy rules are not logged
		}
		if now == "" {
			delete(s.told, r.Rule.Name)
		} else {
			s.told[r.Rule.Name] = now
		}
		switch {
		case r.Err() != nil:
			add(stateChange{slog.LevelError, r})
		case r.Reason != "":
			add(stateChange{slog.LevelWarn, r})
		case old != nil && old.Rule == r.Rule:
			add(stateChange{slog.LevelInfo, r})
		}
	})
}

// stateText is the state of a rule and of its inactive parts; empty if the rule is complete.
func stateText(r *plan.RulePlan) string {
	if r.Complete() {
		return ""
	}
	text := r.State.String()
	for _, f := range r.Flows {
		for i := range f.Outputs {
			text += " " + f.Outputs[i].State.String()
		}
	}
	return text
}

func (s *states) line(level slog.Level, r *plan.RulePlan) {
	switch {
	case r.Err() != nil:
		s.log.Log(context.Background(), level, "rule is not active", "rule", r.Rule.Name, "state", r.State.String(), "error", r.Err())
	case r.Reason != "":
		s.log.Log(context.Background(), level, "rule is not complete", "rule", r.Rule.Name, "state", r.State.String(), "reason", r.Reason)
	default:
		s.log.Log(context.Background(), level, "rule is complete again", "rule", r.Rule.Name)
	}
}

// sum logs one line for many rules.
func (s *states) sum(level slog.Level, all []*plan.RulePlan) {
	what := map[slog.Level]string{slog.LevelError: "rules are not active", slog.LevelWarn: "rules are not complete", slog.LevelInfo: "rules are complete again"}[level]
	args := []any{"rules", len(all), "first", all[0].Rule.Name, "last", all[len(all)-1].Rule.Name}
	if reason := all[0].Reason; reason != "" {
		args = append(args, "reason_of_first", reason)
	}
	s.log.Log(context.Background(), level, what, args...)
}
