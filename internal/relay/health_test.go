package relay

import (
	"slices"
	"strings"
	"testing"
	"time"

	"xdpcast/internal/events"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
)

// statsOfLegs are two inputs that are well.
func statsOfLegs(kind packet.StreamKind) []*loader.RuleStats {
	settings := packet.Stream{Kind: kind}
	n := 2
	switch kind {
	case packet.StreamFailover:
		settings.Watch = packet.StreamRTP
	case packet.StreamSingle:
		settings.Watch, n = packet.StreamRTP, 1
	}
	legs := make([]*loader.RuleStats, n)
	for i := range legs {
		legs[i] = &loader.RuleStats{
			Leg:    &loader.LegStats{Number: i, Bound: 1000, LastSeen: time.Millisecond, Active: kind != packet.StreamFailover || i == 0},
			Stream: &loader.StreamStats{Settings: settings, Expected: 10, Passed: 9, Lost: 1},
		}
	}
	return legs
}

// What somebody should look after is said of the input that it is about, and of nothing else.
func TestStreamAlarms(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(l *loader.LegStats) // of the second input
		want   []string
	}{
		"all is well":    {func(*loader.LegStats) {}, nil},
		"some behind":    {func(l *loader.LegStats) { l.Behind = 700 }, nil},
		"far behind":     {func(l *loader.LegStats) { l.Behind = 800 }, []string{"in[1] is 800 numbers behind: from 1000 on copies pass twice, or are lost (want a larger window, or less delay between the inputs)"}},
		"never heard":    {func(l *loader.LegStats) { l.LastSeen = -1 }, []string{"in[1] has received no packets"}},
		"silent":         {func(l *loader.LegStats) { l.LastSeen = 5 * time.Second }, []string{"in[1] is silent for 5s"}},
		"another stream": {func(l *loader.LegStats) { l.Differ, l.Differs = 9, true }, []string{"in[1] delivers packets that differ from those relayed with the same numbers (9 of them seen): is it another stream?"}},
		"it was one":     {func(l *loader.LegStats) { l.Differ = 9 }, nil},
	} {
		legs := statsOfLegs(packet.StreamRTP)
		tt.change(legs[1].Leg)
		s := StreamStatusOf(legs)
		if !slices.Equal(s.Alarms, tt.want) || s.Lost != 1 {
			t.Errorf("%s: %+v, want %q", name, s, tt.want)
		}
	}
}

// Alarms are told once when they begin and once when they end, losses only when they are no
// reordering, and what happened before the first look not at all.
func TestStreamEvents(t *testing.T) {
	type step = func(legs []*loader.RuleStats)
	nothing := step(func([]*loader.RuleStats) {})
	for name, tt := range map[string]struct {
		kind  packet.StreamKind
		steps []step
		after time.Duration // between two looks; 0: a second
		want  []string
	}{
		"an input falls silent and comes back": {kind: packet.StreamRTP, steps: []step{
			nothing,
			func(l []*loader.RuleStats) { l[1].Leg.LastSeen = 3 * time.Second },
			func(l []*loader.RuleStats) { l[1].Leg.LastSeen = 4 * time.Second },
			func(l []*loader.RuleStats) { l[1].Leg.LastSeen = 5 * time.Second },
			nothing, nothing,
		}, want: []string{"2 silent in[1] is silent for 4s", "4 ended silent"}},
		"inputs with a packet in two seconds, one behind the other": {kind: packet.StreamRTP, steps: []step{
			nothing, func(l []*loader.RuleStats) { l[1].Leg.LastSeen = 1999 * time.Millisecond }, nothing, nothing,
			func(l []*loader.RuleStats) { l[1].Leg.LastSeen = 1999 * time.Millisecond }, nothing,
		}},
		"an old loss": {kind: packet.StreamRTP, steps: []step{func(l []*loader.RuleStats) { l[0].Stream.Lost, l[1].Stream.Lost = 7, 7 }, func(l []*loader.RuleStats) { l[0].Stream.Lost = 7 }}},
		"a loss for good": {kind: packet.StreamRTP, after: 50 * time.Second, steps: []step{
			nothing,
			func(l []*loader.RuleStats) { l[0].Stream.Lost = 4 },
			func(l []*loader.RuleStats) { l[0].Stream.Lost = 4 },
			func(l []*loader.RuleStats) { l[0].Stream.Lost = 6 },
			func(l []*loader.RuleStats) { l[0].Stream.Lost = 6 },
			func(l []*loader.RuleStats) { l[0].Stream.Lost = 6 },
			func(l []*loader.RuleStats) { l[0].Stream.Lost = 6 },
		}, want: []string{"2 lost 3 numbers came by no input", "6 ended lost"}},
		"one that was filled": {kind: packet.StreamRTP, steps: []step{
			nothing, func(l []*loader.RuleStats) { l[0].Stream.Lost = 4 }, nothing, nothing,
		}},
		"an input that is watched loses": {kind: packet.StreamSingle, steps: []step{
			nothing, func(l []*loader.RuleStats) { l[0].Leg.Lost = 2 }, func(l []*loader.RuleStats) { l[0].Leg.Lost = 3 },
		}, want: []string{"2 lost in lost 2 numbers"}},
		"its sender is another": {kind: packet.StreamSingle, steps: []step{
			func(l []*loader.RuleStats) { l[0].Leg.Senders = 5 }, func(l []*loader.RuleStats) { l[0].Leg.Senders, l[0].Leg.Resets = 6, 1 },
		}, want: []string{"1 restarted the sender began again 2 times"}},
		"a merged input loses": {kind: packet.StreamRTP, steps: []step{
			nothing, func(l []*loader.RuleStats) { l[0].Leg.Lost = 2 }, func(l []*loader.RuleStats) { l[0].Leg.Lost = 3 },
		}},
		"the sender begins again": {kind: packet.StreamRTP, steps: []step{
			nothing, func(l []*loader.RuleStats) { l[0].Stream.Restarts, l[1].Stream.Restarts = 1, 1 },
		}, want: []string{"1 restarted the sender began again"}},
		"failover": {kind: packet.StreamFailover, steps: []step{
			nothing,
			func(l []*loader.RuleStats) { l[0].Leg.Active, l[1].Leg.Active = false, true },
			func(l []*loader.RuleStats) { l[0].Leg.Active, l[1].Leg.Active = false, true },
			nothing,
		}, want: []string{"1 relayed in[1] was in[0]", "3 relayed in[0] was in[1]"}},
		"an input that is not in force": {kind: packet.StreamRTP, steps: []step{
			func(l []*loader.RuleStats) { l[0] = nil }, func(l []*loader.RuleStats) { l[0], l[1] = nil, nil }, nothing,
		}},
	} {
		w := &watchedStream{lost: map[int]*lossWatch{}, flaps: map[alarmKey]*flapWatch{}}
		now := time.Unix(1_000_000, 0)
		var got []string
		for i, step := range tt.steps {
			legs := statsOfLegs(tt.kind)
			step(legs)
			c := w.look(legs, now)
			add := func(parts ...string) { got = append(got, strings.Join(parts, " ")) }
			for _, a := range c.began {
				add(string(rune('0'+i)), a.kind, a.text)
			}
			for _, a := range c.ended {
				add(string(rune('0'+i)), "ended", a.kind)
			}
			for _, e := range c.happened {
				if e.State == streamRelayed {
					add(string(rune('0'+i)), e.State, e.Input, "was", e.Before)
				} else {
					add(string(rune('0'+i)), e.State, e.Cause)
				}
			}
			if tt.after == 0 {
				tt.after = time.Second
			}
			now = now.Add(tt.after)
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
	e := events.Event{Kind: events.KindStream, Rule: "cam1", Input: "in[1]", State: alarmSilent, Cause: "x"}
	if got := e.Text(); got != "stream cam1 in[1]: silent: x" {
		t.Error(got)
	}
}

// What comes and goes for an hour is told a few times, and not at each look; and what it ends with is told.
func TestFlappingStream(t *testing.T) {
	const looks = 3600
	restarts := uint64(0)
	for name, tt := range map[string]struct {
		kind  packet.StreamKind
		flap  func(l []*loader.RuleStats, bad bool)
		calm  func(l []*loader.RuleStats)
		most  int
		final string
	}{
		"an input that is silent every other second": {packet.StreamRTP, func(l []*loader.RuleStats, bad bool) {
			if bad {
				l[1].Leg.LastSeen = 2 * time.Second
			}
		}, func([]*loader.RuleStats) {}, 4, "ended silent"},
		"a sender that begins again ten times a second": {packet.StreamRTP, func(l []*loader.RuleStats, bad bool) {
			restarts += 10
			l[0].Stream.Restarts, l[1].Stream.Restarts = restarts, restarts
		}, func(l []*loader.RuleStats) { l[0].Stream.Restarts, l[1].Stream.Restarts = restarts, restarts }, happensAtOnce + looks/60 + 2, "restarted the sender began again"},
		"failover between two that flap": {packet.StreamFailover, func(l []*loader.RuleStats, bad bool) {
			l[0].Leg.Active, l[1].Leg.Active = !bad, bad
		}, func(l []*loader.RuleStats) { l[0].Leg.Active, l[1].Leg.Active = false, true }, happensAtOnce + looks/60 + 2, "relayed in[1]"},
	} {
		w := &watchedStream{lost: map[int]*lossWatch{}, flaps: map[alarmKey]*flapWatch{}}
		now, told, last := time.Unix(1_000_000, 0), 0, ""
		look := func(change func([]*loader.RuleStats)) {
			legs := statsOfLegs(tt.kind)
			change(legs)
			c := w.look(legs, now)
			for _, a := range c.began {
				told, last = told+1, a.kind
			}
			for _, a := range c.ended {
				told, last = told+1, "ended "+a.kind
			}
			for _, e := range c.happened {
				told, last = told+1, e.State+" "+e.Input+e.Cause
			}
			now = now.Add(time.Second)
		}
		for i := range looks {
			look(func(l []*loader.RuleStats) { tt.flap(l, i%4 > 1) })
		}
		for range 2 * int(flapRests/time.Second) {
			look(tt.calm)
		}
		if told > tt.most || !strings.HasPrefix(last, tt.final) {
			t.Errorf("%s: told %d times, at last %q; want at most %d times, at last %q", name, told, last, tt.most, tt.final)
		}
		if len(w.flaps) > 2 || len(w.lost) > 3 {
			t.Errorf("%s: %d alarms and %d losses are remembered", name, len(w.flaps), len(w.lost))
		}
	}
}

// A counter of losses that goes back for one look has not begun again: what it had is not told twice.
func TestLossesAreToldOnce(t *testing.T) {
	for name, tt := range map[string]struct {
		counter []uint64
		want    uint64
	}{
		"a stream that pauses":     {[]uint64{1, 6, 6, 1, 6, 6, 6}, 5},
		"one that is set up again": {[]uint64{1, 6, 6, 0, 0, 2, 2}, 7},
		"and again at once":        {[]uint64{9, 9, 0, 3, 3, 3}, 0},
	} {
		w, now := &lossWatch{}, time.Unix(1_000_000, 0)
		for _, n := range tt.counter {
			w.look(n, now)
			now = now.Add(time.Second)
		}
		if w.sum != tt.want {
			t.Errorf("%s: %d numbers were told as lost, want %d", name, w.sum, tt.want)
		}
	}
}
