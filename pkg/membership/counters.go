package membership

import (
	"cmp"
	"maps"
	"slices"
)

// Attempts counts operations and their outcomes. Attempted is the sum of the
// other two whenever it is read.
type Attempts struct {
	Attempted, Succeeded, Failed uint64
}

// begin counts an attempt; end must follow before the manager's lock is let go.
func (a *Attempts) begin() { a.Attempted++ }

func (a *Attempts) end(err error) {
	if err != nil {
		a.Failed++
		return
	}
	a.Succeeded++
}

// Counters is what happened on one interface since the manager was made, and
// what it holds there now. Counters go by the interface's name, so that they
// live on when an interface is re-created. At any time
//
//	Memberships == Restored + Joins.Succeeded - Leaves.Attempted - Dropped
//
// because a membership whose leave failed is forgotten like any other.
type Counters struct {
	Interface string
	// Joins and Leaves count what was asked of the kernel, opening a helper
	// socket for a join included. References added to or dropped from a
	// membership that is held anyway, and calls with invalid arguments, are
	// neither.
	Joins, Leaves Attempts
	// Restored counts memberships that came from an earlier process ([Manager.Restore]).
	Restored uint64
	// Dropped counts memberships that ended with their interface
	// ([Manager.DropInterface]) or with the manager ([Manager.Close]).
	Dropped uint64
	// Memberships and HelperSockets are held now.
	Memberships, HelperSockets int
}

// Counters returns a consistent snapshot, sorted by interface.
func (m *Manager) Counters() []Counters {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range m.counters {
		c.Memberships, c.HelperSockets = 0, 0
	}
	for _, p := range m.ifaces {
		m.countersOf(p.name).HelperSockets += len(p.shards)
		for _, r := range p.records {
			r.counters.Memberships++
		}
	}
	all := make([]Counters, 0, len(m.counters))
	for _, c := range m.counters {
		all = append(all, *c)
	}
	slices.SortFunc(all, func(a, b Counters) int { return cmp.Compare(a.Interface, b.Interface) })
	return all
}

// Prune forgets the counters of the interfaces that hold no membership and that keep does
// not want. Interfaces come and go, and those of containers never under the same name.
func (m *Manager) Prune(keep func(ifname string) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	held := map[string]bool{}
	for _, p := range m.ifaces {
		held[p.name] = true
		for _, r := range p.records {
			held[r.counters.Interface] = true
		}
	}
	maps.DeleteFunc(m.counters, func(name string, _ *Counters) bool { return !held[name] && !keep(name) })
}

// countersOf returns the counters of the named interface, new if need be.
func (m *Manager) countersOf(name string) *Counters {
	c := m.counters[name]
	if c == nil {
		c = &Counters{Interface: name}
		m.counters[name] = c
	}
	return c
}
