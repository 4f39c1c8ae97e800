package flow

import (
	"cmp"
	"fmt"
	"iter"
	"net/netip"
	"slices"
)

// EveryPort yields an input for each of its ports.
func (in Input) EveryPort() iter.Seq[Input] {
	return func(yield func(Input) bool) {
		last := max(in.Port, in.PortTo)
		in.PortTo = 0
		for port := in.Port; ; port++ {
			in.Port = port
			if !yield(in) || port == last {
				return
			}
		}
	}
}

// IsOne says whether a flow is a single entry, independent of other flows.
func (in Input) IsOne() bool { return in.PortTo == 0 && !in.BySource }

// ExtraEntries is the number of flow table entries of a flow beyond the first.
func (r Flow) ExtraEntries() int {
	if r.In.IsOne() {
		return 0
	}
	ports := 1
	if r.In.PortTo != 0 {
		ports += int(r.In.PortTo - r.In.Port)
	}
	return ports*(1+len(r.Except)) - 1
}

// AnySource is an input without its sources.
func (in Input) AnySource() Input {
	in = in.Key()
	in.Source, in.SourceLen, in.BySource = netip.Addr{}, 0, false
	return in
}

// Senders is the source prefix of a flow with BySource.
func (in Input) Senders() netip.Prefix {
	source := in.Source
	if !source.IsValid() {
		source = netip.IPv4Unspecified()
		if in.Group.Is6() {
			source = netip.IPv6Unspecified()
		}
	}
	return netip.PrefixFrom(source, in.SourceLen)
}

// TakesSource says whether a flow with BySource, which is Normalized, takes packets of a sender.
func (r *Flow) TakesSource(source netip.Addr) bool {
	return r.In.Senders().Contains(source) && !r.excepts(netip.PrefixFrom(source, source.BitLen()))
}

// excepts says whether a flow that is Normalized leaves out all of a prefix.
func (r *Flow) excepts(p netip.Prefix) bool {
	// The one before it, or with its address, is the only one that may hold it: they are sorted,
	// and none is within another.
	low, high := 0, len(r.Except)
	for low < high {
		at := int(uint(low+high) / 2)
		if p.Addr().Less(r.Except[at].Addr()) {
			high = at
		} else {
			low = at + 1
		}
	}
	return low > 0 && Covers(r.Except[low-1], p)
}

// Covers says whether wide contains all of narrow.
func Covers(wide, narrow netip.Prefix) bool {
	return wide.Bits() <= narrow.Bits() && wide.Contains(narrow.Addr())
}

// TakesAll says whether a flow with BySource, which is Normalized, takes all sources of a prefix,
// except longer excluded ones.
func (r *Flow) TakesAll(p netip.Prefix) bool { return Covers(r.In.Senders(), p) && !r.excepts(p) }

// NormalExcept sorts prefixes and omits those within another.
func NormalExcept(except []netip.Prefix) []netip.Prefix {
	if len(except) == 0 {
		return nil
	}
	sorted := slices.Clone(except)
	slices.SortFunc(sorted, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	kept := sorted[:0]
	for _, p := range sorted {
		if len(kept) == 0 || !Covers(kept[len(kept)-1], p) {
			kept = append(kept, p)
		}
	}
	return kept
}

// checkSenders is Check for ports and sources. The flow must be Normalized.
func (r Flow) checkSenders() error {
	in := r.In
	switch {
	case in.PortTo != 0 && (in.Port == 0 || in.PortTo <= in.Port):
		return fmt.Errorf("input ports %d to %d: want the first below the last", in.Port, in.PortTo)
	case !in.BySource && in.SourceLen != 0:
		return fmt.Errorf("input source %v/%d: want one source without BySource", in.Source, in.SourceLen)
	case !in.BySource && len(r.Except) > 0:
		return fmt.Errorf("sources left out: want none without BySource")
	case !in.BySource:
		return nil
	case in.SourceLen < 0 || in.SourceLen >= in.Group.BitLen() || in.Source.IsValid() == (in.SourceLen == 0):
		return fmt.Errorf("input source %v/%d: want a prefix of 1 to %d bits, or none", in.Source, in.SourceLen, in.Group.BitLen()-1)
	case in.Senders().Masked() != in.Senders():
		return fmt.Errorf("input source %v: want no host bits", in.Senders())
	}
	for _, p := range r.Except {
		if !p.IsValid() || p.Masked() != p || p.Addr().BitLen() != in.Group.BitLen() || !Covers(in.Senders(), p) || p.Bits() == in.SourceLen {
			return fmt.Errorf("source left out %v: want a prefix within %v", p, in.Senders())
		}
	}
	return nil
}
