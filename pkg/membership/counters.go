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

// begin counts an attempt; end must follow before the manager's lock is released.
func (a *Attempts) begin() { a.Attempted++ }

func (a *Attempts) end(err error) {
	if err != nil {
		a.Failed++
		return
	}
	a.Succeeded++
}

// Counters are the counters of one interface since the manager was created, and what it holds there
// now. Counters are kept by interface name, so they survive when an interface is re-created. At any
// time
//
//	Memberships == Restored + Joins.Succeeded - Leaves.Attempted - Dropped
//
// because a membership whose leave failed is forgotten like any other.
type Counters struct {
	Interface string
	// Joins and Leaves count operations in the kernel, including opening a helper socket for a
	// join. References added to or dropped from an existing membership, and calls with invalid
	// arguments, count as neither.
	Joins, Leaves Attempts
	// Restored counts memberships that came from an earlier process ([Manager.Restore]).
	Restored uint64
	// Dropped counts memberships that ended with their interface
	// ([Manager.DropInterface]) or with the manager ([Manager.Close]).
	Dropped uint64
	// Memberships and HelperSockets are currently held.
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

// Prune forgets the counters of interfaces that hold no membership, unless keep returns true.
// Container interfaces come and go, and never reuse their names.
func (m *Manager) Prune(keep func(ifname string) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	gone := false
	for name := range m.counters {
		gone = gone || !keep(name)
	}
	if !gone {
		return
	}
	held := map[string]bool{}
	for _, p := range m.ifaces {
		held[p.name] = true
		for _, r := range p.records {
			held[r.counters.Interface] = true
		}
	}
	maps.DeleteFunc(m.counters, func(name string, _ *Counters) bool { return !held[name] && !keep(name) })
}

// countersOf returns the counters of the named interface, creating them if necessary.
func (m *Manager) countersOf(name string) *Counters {
	c := m.counters[name]
	if c == nil {
		c = &Counters{Interface: name}
		m.counters[name] = c
	}
	return c
}
