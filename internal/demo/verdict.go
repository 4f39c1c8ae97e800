package demo

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"xdpcast/internal/control"
	"xdpcast/internal/traffic"
)

// Verdict is the result of a demo.
type Verdict struct {
	// OK says that exactly the packets required by the rules arrived.
	OK bool `json:"ok"`
	// Faults are the deviations, one line each.
	Faults  []string        `json:"faults"`
	Streams []StreamVerdict `json:"streams"`
	Total   Totals          `json:"total"`
	// Commands are to try in a lab that was kept.
	Commands []Command `json:"commands,omitempty"`
}

// StreamVerdict is the result of one stream.
type StreamVerdict struct {
	Rule control.Rule `json:"rule"`
	// Path is the relay's path for it.
	Path string `json:"path"`
	// Sent is what the source sent, Matched what the relay's rule took.
	Sent    uint64         `json:"sent"`
	Matched uint64         `json:"matched"`
	Outputs []CopyVerdict  `json:"outputs"`
	Drops   []control.Drop `json:"drops"` // by the relay, before it made copies
	// Legs are the paths of the source's packets, nil if there is one.
	Legs []LegVerdict `json:"legs,omitempty"`
	// Other is the sender that the rule does not name, nil if there is none.
	Other *OtherVerdict `json:"other_source,omitempty"`
}

// LegVerdict is the result of a stream on one of several inputs.
type LegVerdict struct {
	traffic.LegReport
	// Matched is what the relay took from it, Won what it sent on of that.
	Matched uint64 `json:"matched"`
	Won     uint64 `json:"won"`
}

// CopyVerdict is the result of one output's copies.
type CopyVerdict struct {
	Slot     int    `json:"slot"`
	Sink     string `json:"sink"`
	Endpoint string `json:"endpoint"`
	// Expected is how many copies there must be, Relayed the relay's own count; the rest is the
	// receiver's.
	Expected uint64         `json:"expected"`
	Relayed  uint64         `json:"relayed"`
	Drops    []control.Drop `json:"drops"` // by the relay
	traffic.Counters
	Latency traffic.Latency `json:"latency"`
	// Wanted are the expected header fields; LastWrong is of the latest packet with other ones.
	Wanted    WantedFields    `json:"wanted"`
	LastWrong *traffic.Fields `json:"last_wrong,omitempty"`
}

// WantedFields is traffic.Expected as JSON.
type WantedFields struct {
	Source     string `json:"source"`
	SourcePort uint16 `json:"source_port"`
	TTL        uint8  `json:"ttl"`
	DSCP       *uint8 `json:"dscp"`
}

// OtherVerdict is the result of a sender that the rule does not name.
type OtherVerdict struct {
	Source   string `json:"source"`
	Sent     uint64 `json:"sent"`
	Received uint64 `json:"received"`
}

// Totals are the totals over all streams.
type Totals struct {
	Sent     uint64 `json:"sent"`
	Matched  uint64 `json:"matched"`
	Expected uint64 `json:"expected"`
	Relayed  uint64 `json:"relayed"`
	traffic.Counters
}

// judge compares what was sent, what the relay counted and what arrived.
func judge(all []flown, stats control.Stats) *Verdict {
	v := &Verdict{Faults: []string{}}
	var other uint64
	for _, f := range all {
		i := slices.IndexFunc(stats.Rules, func(r control.RuleStatus) bool { return r.Name == f.rule.Name })
		rule := control.RuleStatus{}
		if i >= 0 {
			rule = stats.Rules[i]
		}
		s := v.judgeStream(f, rule)
		v.Streams = append(v.Streams, s)
		v.Total.add(s)
		other += f.other.Packets
	}
	// Otherwise it would prove nothing that none of them arrived.
	if stats.Passed.Packets < other {
		v.fault("the relay saw %d packets that no rule matched, but other sources sent %d", stats.Passed.Packets, other)
	}
	for _, d := range stats.TransmitDrops {
		v.fault("the relay's interface %s did not take %s (%s)", d.Interface, packets(d.Packets), d.Reason)
	}
	v.OK = len(v.Faults) == 0
	return v
}

func (v *Verdict) fault(format string, args ...any) {
	v.Faults = append(v.Faults, fmt.Sprintf(format, args...))
}

func (v *Verdict) judgeStream(f flown, rule control.RuleStatus) StreamVerdict {
	name := f.rule.Name
	s := StreamVerdict{Rule: f.rule, Path: rule.UsedPath, Sent: f.sent.Packets, Matched: rule.Matched.Packets, Drops: rule.Drops}
	if rule.State != control.StateActive || rule.UsedPath == "" {
		v.fault("%s: the rule is not active: %s", name, cmp.Or(stateText(rule), "-"))
	}
	if s.Sent != f.count {
		v.fault("%s: %d packets sent, not %d", name, s.Sent, f.count)
	}
	matched, drops := s.Sent, rule.Drops
	if len(f.sent.Legs) > 0 {
		matched, drops = v.judgeLegs(f, rule, &s)
	}
	if s.Matched != matched {
		v.fault("%s: the rule matched %d packets of %d sent", name, s.Matched, matched)
	}
	v.faultDrops(name, drops)
	for slot, a := range f.arrivals {
		out := control.OutputStatus{}
		if slot < len(rule.Outputs) {
			out = rule.Outputs[slot]
		}
		s.Outputs = append(s.Outputs, v.judgeCopy(f, slot, a, out))
	}
	if f.stream.other.IsValid() {
		s.Other = v.judgeOther(f)
	}
	return s
}

// judgeLegs compares the packets on each leg with the counters of the rule's inputs. It returns how
// many packets the rule must have matched, and how many it dropped that are not copies.
func (v *Verdict) judgeLegs(f flown, rule control.RuleStatus, s *StreamVerdict) (matched uint64, drops []control.Drop) {
	var won, copies uint64
	for i, sent := range f.sent.Legs {
		leg := LegVerdict{LegReport: sent}
		if i < len(rule.Inputs) && rule.Inputs[i].Leg != nil {
			leg.Matched, leg.Won = rule.Inputs[i].Matched.Packets, rule.Inputs[i].Leg.Won
		}
		if leg.Matched != sent.Packets {
			v.fault("%s: input %d matched %d packets of %d sent", f.rule.Name, i, leg.Matched, sent.Packets)
		}
		if sent.LeftOut == 0 && f.count >= 100 { // with so few all may get through
			v.fault("%s: nothing is lost on %s", f.rule.Name, sent.Target)
		}
		matched += sent.Packets
		won += leg.Won
		s.Legs = append(s.Legs, leg)
	}
	for _, d := range rule.Drops {
		if d.Reason == "duplicate" {
			copies += d.Packets
		} else {
			drops = append(drops, d)
		}
	}
	if won != s.Sent || copies != matched-s.Sent {
		v.fault("%s: %d packets and %d copies became %d and %d dropped", f.rule.Name, s.Sent, matched-s.Sent, won, copies)
	}
	return matched, drops
}

// judgeCopy compares both the relay's count and the sink's with what was sent, and so with each
// other.
func (v *Verdict) judgeCopy(f flown, slot int, a arrival, out control.OutputStatus) CopyVerdict {
	name := fmt.Sprintf("%s to %s", f.rule.Name, a.sink)
	r := f.received[slot]
	c := CopyVerdict{
		Slot: slot, Sink: a.sink, Endpoint: a.at, Expected: f.sent.Packets, Relayed: out.Sent.Packets, Drops: out.Drops,
		Counters: r.Total, Latency: r.Latency,
		Wanted: WantedFields{a.want.Source.String(), a.want.SourcePort, a.want.TTL, a.want.DSCP},
	}
	for _, g := range r.Groups {
		c.LastWrong = g.LastWrong
	}
	if c.Relayed != c.Expected {
		v.fault("%s: the relay sent %d copies of %d", name, c.Relayed, c.Expected)
	}
	v.faultDrops(name, out.Drops)
	if faults := r.Faults(); len(faults) > 0 {
		text := strings.Join(faults, ", ")
		if w := c.LastWrong; w != nil {
			text += fmt.Sprintf(" (the latest from %s, ttl %d, dscp %d)", w.Source, w.TTL, w.DSCP)
		}
		v.fault("%s: %s", name, text)
	}
	if c.Foreign > 0 {
		v.fault("%s: %s not from the source", name, packets(c.Foreign))
	}
	return c
}

func (v *Verdict) faultDrops(name string, drops []control.Drop) {
	for _, d := range drops {
		if d.Packets > 0 {
			v.fault("%s: the relay dropped %s: %s", name, packets(d.Packets), d.Reason)
		}
	}
}

// judgeOther looks for packets of the second sender among the received ones.
func (v *Verdict) judgeOther(f flown) *OtherVerdict {
	o := &OtherVerdict{Source: f.stream.other.String(), Sent: f.other.Packets}
	for _, r := range f.received {
		for _, g := range r.Groups {
			for _, flow := range g.Flows {
				if flow.Stream == f.other.Stream {
					o.Received += flow.Received
				}
			}
		}
	}
	if o.Sent == 0 {
		v.fault("%s: the other source, %s, sent nothing", f.rule.Name, o.Source)
	}
	if o.Received > 0 {
		v.fault("%s: %s from %s came through, which the rule does not name", f.rule.Name, packets(o.Received), o.Source)
	}
	return o
}

func (t *Totals) add(s StreamVerdict) {
	t.Sent += s.Sent
	t.Matched += s.Matched
	for _, o := range s.Outputs {
		t.Expected += o.Expected
		t.Relayed += o.Relayed
		t.Counters.Add(o.Counters)
	}
}

// packets formats "1 packet", "2 packets".
func packets(n uint64) string {
	if n == 1 {
		return "1 packet"
	}
	return fmt.Sprintf("%d packets", n)
}

// stateText is a rule's state with its reason, if there is one.
func stateText(r control.RuleStatus) string {
	if r.Reason == "" {
		return r.State
	}
	return r.State + ": " + r.Reason
}
