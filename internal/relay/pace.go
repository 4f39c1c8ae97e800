package relay

import (
	"time"
	"weak"

	"xdpcast/internal/plan"
)

// Changes of interfaces that no flow uses are followed in at most a fifth of the time, and after half a second at the latest: a
// thousand interfaces that come one after another, as where containers are started, would take a CPU from the workers.
const (
	paceShare = 4
	paceMost  = 500 * time.Millisecond
)

// networkPace spaces reconciles.
type networkPace struct {
	free    time.Time // when changes of other interfaces may be followed again
	waiting bool      // there are some

	used  map[int]bool            // indexes of the interfaces of flows, and of those below and above them
	waits bool                    // a rule does, perhaps for an interface that comes
	of    weak.Pointer[plan.Plan] // from which both were made
}

// networkChanged follows changes of the network: at once, those of interfaces that no flow uses perhaps later.
func (r *Relay) networkChanged() {
	if time.Until(r.pace.free) > 0 && !r.watcher.Concerns(r.uses) {
		r.pace.waiting = true
		return
	}
	r.followNetwork()
}

// followNetwork reconciles with the network as it is now.
func (r *Relay) followNetwork() {
	started := time.Now()
	r.tables.refresh = true
	_ = r.reconcile(nil)
	now := time.Now()
	r.pace.waiting, r.pace.free = false, now.Add(min(paceShare*now.Sub(started), paceMost))
}

// wake is the time until changes that wait may be followed.
func (p *networkPace) wake() time.Duration {
	if !p.waiting {
		return idle
	}
	return time.Until(p.free)
}

// uses says whether an interface may matter to a rule: flows use it, or one that it is stacked on or a port of, or
// there is a rule that waits, perhaps for this one.
func (r *Relay) uses(index int) bool {
	p := &r.pace
	if now := weak.Make(r.plan); p.used == nil || p.of != now {
		p.used, p.of, p.waits = map[int]bool{}, now, false
		use := func(index int) {
			p.used[index] = true
			if l := r.network.ByIndex(index); l != nil {
				p.used[l.Master], p.used[l.Lower] = true, true
			}
		}
		for _, id := range r.plan.Attach {
			use(id.Index)
		}
		for _, rule := range r.plan.Rules {
			p.waits = p.waits || !rule.Complete()
			for _, f := range rule.Flows {
				use(f.Flow.In.Index)
				for i := range f.Flow.Out {
					use(f.Flow.Out[i].Index)
				}
			}
		}
	}
	return p.waits || p.used[index]
}
