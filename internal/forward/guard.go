package forward

import (
	"cmp"
	"slices"
	"time"

	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
)

// SetOwnMACs sets the MAC addresses of this host's interfaces: frames from them are loops,
// like those from its IP addresses.
func (s *Set) SetOwnMACs(macs [][6]byte) {
	own := make(map[[6]byte]struct{}, len(macs))
	for _, mac := range macs {
		own[mac] = struct{}{}
	}
	s.ownMACs.Store(&own)
}

// Loops returns the rules whose packets came back within packet.GuardMemory, by name.
func (s *Set) Loops() []loader.LoopingRule {
	now := time.Now()
	clock := s.Clock(now)
	loops := s.guard.Loops(clock)
	if len(loops) == 0 {
		return nil
	}
	at := func(then int64) time.Time { return now.Add(time.Duration(then - clock)) }
	s.mu.Lock()
	names := make(map[uint32]string, len(s.table.rules))
	for _, r := range s.table.rules {
		names[r.number] = r.rule.Name
	}
	s.mu.Unlock()
	var all []loader.LoopingRule
	for i := range loops {
		l := &loops[i]
		name, ok := names[l.Rule]
		if !ok {
			continue
		}
		rule := loader.LoopingRule{Rule: name, Since: at(l.Since), Last: at(l.Last), Looping: clock-l.Last < int64(packet.GuardHeal)}
		for _, w := range l.Ways {
			if w.Last != 0 && clock-w.Last < int64(packet.GuardMemory) {
				rule.Ways = append(rule.Ways, loader.LoopWay{
					Index: w.Index, MAC: w.MAC, Source: w.Source, From: names[w.From], Last: at(w.Last), Packets: w.Packets,
				})
			}
		}
		slices.SortFunc(rule.Ways, func(a, b loader.LoopWay) int { return b.Last.Compare(a.Last) })
		all = append(all, rule)
	}
	slices.SortFunc(all, func(a, b loader.LoopingRule) int { return cmp.Compare(a.Rule, b.Rule) })
	return all
}

// SetOwnMACs is Set.SetOwnMACs.
func (f *Fanout) SetOwnMACs(macs [][6]byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.changeMACs(macs)
	f.set.SetOwnMACs(macs)
}

// Loops is Set.Loops.
func (f *Fanout) Loops() []loader.LoopingRule { return f.set.Loops() }
