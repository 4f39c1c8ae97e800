package relay

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"xdpcast/pkg/fanout"
	"xdpcast/pkg/forward"
	"xdpcast/pkg/loader"
)

// fanoutPath is what the control loop needs of *forward.Fanout. Tests put faults
// between the two.
type fanoutPath interface {
	Sync(rules []loader.Rule, own []netip.Addr) error
	Stats(names []string) []loader.RuleStats
	Fragments() loader.Fragments
	Close() error
}

// userPaths are the paths whose packets go through this process. Each is opened for
// its first rule.
type userPaths struct {
	open   func() (fanoutPath, error)
	fanout fanoutPath
	rules  []loader.Rule // that the fanout path has now
}

func (r *Relay) newUserPaths() userPaths {
	return userPaths{open: func() (fanoutPath, error) {
		return forward.OpenFanout(forward.FanoutOptions{Logger: r.log})
	}}
}

// close ends the workers.
func (u *userPaths) close() error {
	if u.fanout == nil {
		return nil
	}
	err := u.fanout.Close()
	u.fanout, u.rules = nil, nil
	return err
}

// sync gives the fanout path its rules.
func (u *userPaths) sync(rules []loader.Rule, own []netip.Addr) error {
	if u.fanout == nil {
		if len(rules) == 0 {
			return nil
		}
		path, err := u.open()
		if err != nil {
			return fmt.Errorf("open the fanout path: %w", err)
		}
		u.fanout = path
	}
	if err := u.fanout.Sync(rules, own); err != nil {
		return err
	}
	u.rules = rules
	return nil
}

// with returns want and those of the rules in force that are not in it.
func (u *userPaths) with(want []loader.Rule) []loader.Rule {
	names := make(map[string]bool, len(want))
	inputs := make(map[loader.Input]bool, len(want))
	for i := range want {
		names[want[i].Name] = true
		inputs[inputKey(want[i].In)] = true
	}
	all := slices.Clone(want)
	for _, r := range u.rules {
		if !names[r.Name] && !inputs[inputKey(r.In)] {
			all = append(all, r)
		}
	}
	return all
}

func inputKey(in loader.Input) loader.Input {
	in.MAC = [6]byte{}
	return in
}

// add adds what the user-space paths have counted to what the kernel has: the drops
// of all rules, and the rest to the rules that stats has.
func (u *userPaths) add(stats *loader.Stats) {
	if u.fanout == nil {
		return
	}
	at := make(map[string]int, len(stats.Rules))
	for i := range stats.Rules {
		at[stats.Rules[i].Name] = i
	}
	for _, s := range u.fanout.Stats(nil) {
		addDrops(stats.Drops, s.Drops)
		for _, o := range s.Outputs {
			addDrops(stats.Drops, o.Drops)
		}
		if i, ok := at[s.Name]; ok {
			addRule(&stats.Rules[i], &s)
		}
	}
	f := u.fanout.Fragments()
	sumCounter(&stats.Fragments.First, f.First)
	sumCounter(&stats.Fragments.Later, f.Later)
	sumCounter(&stats.Fragments.Orphan, f.Orphan)
}

func addRule(to, from *loader.RuleStats) {
	sumCounter(&to.Matched, from.Matched)
	if from.LastSeen >= 0 && (to.LastSeen < 0 || from.LastSeen < to.LastSeen) {
		to.LastSeen = from.LastSeen
	}
	addDrops(to.Drops, from.Drops)
	for slot := range min(len(to.Outputs), len(from.Outputs)) {
		sumCounter(&to.Outputs[slot].Sent, from.Outputs[slot].Sent)
		addDrops(to.Outputs[slot].Drops, from.Outputs[slot].Drops)
	}
}

func sumCounter(to *loader.Counter, c loader.Counter) {
	to.Packets += c.Packets
	to.Bytes += c.Bytes
}

// statsOf reads the counters of rules on all paths; nil names are all rules.
func (r *Relay) statsOf(names []string, all bool) (stats loader.Stats, err error) {
	if all {
		stats, err = r.loader.Stats()
	} else {
		stats, err = r.loader.StatsOf(names)
	}
	if err == nil {
		r.paths.add(&stats)
	}
	return stats, err
}

// forKernel is a rule as the kernel's tables have it. Those of a rule of the fanout
// path only say that its packets pass: its outputs may be on devices that no program
// can send to.
func forKernel(rule loader.Rule) loader.Rule {
	if rule.Path != loader.PathFanout {
		return rule
	}
	out := slices.Clone(rule.Out)
	for i := range out {
		out[i].Ready, out[i].Blocked = false, loader.NotReady
	}
	rule.Out = out
	return rule
}

// drain is how long a rule that leaves the fanout path is still served there: many
// times the millisecond that the rings hold packets back for.
const drain = 20 * time.Millisecond

// syncPaths brings the rules into force on all paths. A rule that changes its path
// has both for a moment, in an order in which one of them always takes its packets:
// while the kernel path has them, none reach the packet tap.
func (r *Relay) syncPaths() error {
	var kernel, tapped []loader.Rule
	for _, rule := range r.published() {
		if rule.Path == loader.PathFanout {
			tapped = append(tapped, rule)
		}
		kernel = append(kernel, forKernel(rule))
	}
	if err := r.paths.sync(r.paths.with(tapped), r.own); err != nil {
		return err
	}
	if err := r.loader.Sync(kernel); err != nil {
		return err
	}
	if len(r.paths.rules) > len(tapped) {
		time.Sleep(drain) // what the tap has still goes out
	}
	return r.paths.sync(tapped, r.own)
}

// blame finds the rules that an error of syncPaths is about, by the names that the
// kernel has; none when it is about none.
func (r *Relay) blame(err error) (names []string, cause error) {
	var refused *loader.RuleError
	if errors.As(err, &refused) {
		return []string{refused.Rule}, refused.Err
	}
	var setUp *fanout.Error
	if !errors.As(err, &setUp) {
		return nil, nil
	}
	for _, w := range r.ordered {
		for _, n := range w.instances {
			if n.publish && n.resolved.Path == loader.PathFanout && n.in == setUp.Interface {
				names = append(names, n.resolved.Name)
			}
		}
	}
	return names, err
}
