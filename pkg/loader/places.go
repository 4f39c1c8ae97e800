package loader

import (
	"encoding/binary"
	"iter"
	"math/bits"

	"xdpcast/pkg/flow"
)

// places finds rules by the place of their input: all of it but ports and sources. Only rules of
// one place can have the same input, or take packets from each other's shortcuts. It is a hash table
// whose buckets are chained through the entries. The zero value is empty.
type places struct {
	buckets []*entry // a power of two of them
	count   int
}

// placeOf is the place of an input.
func placeOf(in flow.Input) flow.Input {
	in = in.AnySource()
	in.Port, in.PortTo = 0, 0
	return in
}

// bucket is where the chain of an input's place begins. The table is not empty.
func (p *places) bucket(in flow.Input) **entry {
	group := in.Group.As16()
	hash := (binary.NativeEndian.Uint64(group[:8])*shortcutK2 ^ binary.NativeEndian.Uint64(group[8:]) ^ uint64(in.Index)<<32 ^ uint64(in.VLAN)) * shortcutK1
	return &p.buckets[hash>>(64-bits.TrailingZeros(uint(len(p.buckets))))]
}

// minPlaces is the number of buckets of the first table.
const minPlaces = 16

// add adds an entry that is not in the table.
func (p *places) add(e *entry) {
	if p.count >= len(p.buckets) {
		p.grow()
	}
	at := p.bucket(e.rule.In)
	e.next, *at = *at, e
	p.count++
}

func (p *places) grow() {
	old := p.buckets
	p.buckets = make([]*entry, max(minPlaces, 2*len(old)))
	for _, e := range old {
		for e != nil {
			next := e.next
			at := p.bucket(e.rule.In)
			e.next, *at = *at, e
			e = next
		}
	}
}

// remove removes an entry, if it is in the table.
func (p *places) remove(e *entry) {
	if p.count == 0 {
		return
	}
	for at := p.bucket(e.rule.In); *at != nil; at = &(*at).next {
		if *at == e {
			*at, e.next = e.next, nil
			p.count--
			return
		}
	}
}

// of yields the entries of the place of an input.
func (p *places) of(in flow.Input) iter.Seq[*entry] {
	return func(yield func(*entry) bool) {
		if p.count == 0 {
			return
		}
		place := placeOf(in)
		for e := *p.bucket(in); e != nil; e = e.next {
			if placeOf(e.rule.In) == place && !yield(e) {
				return
			}
		}
	}
}

// sameInput is another rule with the same input as an entry, or with some of its ports; nil if there
// is none. Rules that are leaving do not count.
func (p *places) sameInput(e *entry) *entry {
	want := e.rule.In.Key()
	first, last := want.Port, max(want.Port, want.PortTo)
	want.Port, want.PortTo = 0, 0
	for other := range p.of(e.rule.In) {
		in := other.rule.In.Key()
		low, high := in.Port, max(in.Port, in.PortTo)
		in.Port, in.PortTo = 0, 0
		if other != e && !other.leaving && in == want && low <= last && first <= high {
			return other
		}
	}
	return nil
}
