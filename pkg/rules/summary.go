package rules

import "hash/maphash"

// Summary knows enough of a valid set of rules to tell, for nearly every rule, that the set stays
// valid with it, or without it: in the time that this rule takes, however many others there are. It
// takes some 30 bytes a rule. It is not for concurrent use.
type Summary struct {
	seed   maphash.Seed
	inputs map[uint64]int // number of inputs by hash
	ranges int            // inputs with a range of ports
	// ins and outs count the interfaces of inputs and outputs, as written.
	ins, outs map[string]int
}

// NewSummary returns the summary of a set without rules.
func NewSummary() *Summary {
	return &Summary{seed: maphash.MakeSeed(), inputs: map[uint64]int{}, ins: map[string]int{}, outs: map[string]int{}}
}

// Add adds a rule to the set.
func (s *Summary) Add(r *Rule) { s.count(r, 1) }

// Remove removes a rule that was added.
func (s *Summary) Remove(r *Rule) { s.count(r, -1) }

func (s *Summary) count(r *Rule, n int) {
	for i := range r.InputCount() {
		in := r.Leg(i).In
		add(s.inputs, maphash.Comparable(s.seed, in), n)
		add(s.ins, in.Interface, n)
		if in.PortTo != 0 {
			s.ranges += n
		}
	}
	for i := range r.Out {
		add(s.outs, r.Out[i].Interface, n)
	}
}

// add adds to a count, and removes a count of 0.
func add[K comparable](counts map[K]int, key K, n int) {
	if counts[key] += n; counts[key] == 0 {
		delete(counts, key)
	}
}

// Admits reports that the set stays valid with one more rule, which must be valid by itself and have
// a name that no other has. If it returns false, only ValidateSet knows: the rule may have the input
// of another, or the ports, or the rules that send on its interfaces may close a loop with it.
func (s *Summary) Admits(r *Rule) bool {
	for i := range r.InputCount() {
		in := r.Leg(i).In
		if s.inputs[maphash.Comparable(s.seed, in)] > 0 || in.PortTo != 0 || s.ranges > 0 {
			return false
		}
		// Packets that no rule sends where this one takes them close no loop, nor do those that it
		// sends where no rule takes any.
		if meetsAny(in.Interface, s.outs) {
			return false
		}
	}
	for i := range r.Out {
		if meetsAny(r.Out[i].Interface, s.ins) {
			return false
		}
		for leg := range r.InputCount() {
			if in := r.Leg(leg).In.Interface; ifaceCovers(in, r.Out[i].Interface) || ifaceCovers(r.Out[i].Interface, in) {
				return false
			}
		}
	}
	return true
}

// Releases reports that the set stays valid without a rule of it. If it returns false, only ValidateSet
// knows: the rule may take packets that others send, and would send to each other in a loop without
// it.
func (s *Summary) Releases(r *Rule) bool {
	for i := range r.InputCount() {
		if meetsAny(r.Leg(i).In.Interface, s.outs) {
			return false
		}
	}
	return true
}

// meetsAny reports whether some name matches an interface and one of a set.
func meetsAny(iface string, set map[string]int) bool {
	if !isPattern(iface) && set[iface] > 0 {
		return true
	}
	for other := range set {
		if ifaceCovers(iface, other) || ifaceCovers(other, iface) {
			return true
		}
	}
	return false
}
