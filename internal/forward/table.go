package forward

import (
	"cmp"
	"net/netip"
	"slices"

	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// Table holds the rules of a path. It is immutable: any number of goroutines may read
// it.
type Table struct {
	v4      flows[[4]byte]
	v6      flows[[16]byte]
	own     map[netip.Addr]struct{}
	rules   []*Rule
	byFirst map[uint32]*Rule
	// devices are the indexes of the outputs' interfaces; output.device is an index
	// into it.
	devices []int
}

// Lookup returns the rule of a packet to this port, received on the interface with
// this index, or nil: the most specific one, in the order of enum lookup_kind of
// bpf/include/abi.h. It does not allocate.
func (t *Table) Lookup(index int, h *packet.Headers, port uint16) *Rule {
	return t.lookup(index, h, port, false)
}

// lookup is Lookup, with fromHost for a packet that this host sends through the interface.
func (t *Table) lookup(index int, h *packet.Headers, port uint16, fromHost bool) *Rule {
	if h.Dst.Is4() {
		return t.v4.lookup(key[[4]byte]{
			index: uint32(index), fromHost: fromHost, vlan: h.VLAN, outer: h.OuterVLAN, port: port,
			group: h.Dst.As4(), source: h.Src.As4(),
		}, h)
	}
	return t.v6.lookup(key[[16]byte]{
		index: uint32(index), fromHost: fromHost, vlan: h.VLAN, outer: h.OuterVLAN, port: port,
		group: h.Dst.As16(), source: h.Src.As16(),
	}, h)
}

// ByFirstOutput returns the rule whose first output has this number from the loader,
// or nil. The relay program identifies a rule by it in struct handover
// (bpf/include/handover.h).
func (t *Table) ByFirstOutput(first uint32) *Rule { return t.byFirst[first] }

// bytesOf is an address of either family, as in packets.
type bytesOf interface{ [4]byte | [16]byte }

// key is the lookup key of a rule. Source all zero: any; port 0: any; bits 0: the
// group alone, otherwise the length of a prefix.
type key[A bytesOf] struct {
	index             uint32
	fromHost          bool
	vlan, outer, port uint16
	bits              uint16
	sourceBits        uint16 // in flows.both
	group, source     A
}

// The lookup kinds: bit 1 is any port, bit 0 any source; prefixes come after all
// others.
const (
	anySource = 1
	anyPort   = 2
	prefixes  = 4
	kinds     = 8
)

// flows are the rules of an address family.
type flows[A bytesOf] struct {
	rules map[key[A]]*Rule
	used  [kinds]bool
	// sources are the rules with a source prefix, keyed by the other fields, the
	// longest prefix first.
	sources map[key[A]][]*Rule
	// lengths are the lengths of group prefixes, the longest first.
	lengths []uint16
	// both are the rules with a source prefix and a group prefix, by port or any; shapes are
	// their lengths, in order of precedence.
	both   map[key[A]]*Rule
	shapes []shape
}

// shape holds the lengths of a source prefix and a group prefix.
type shape struct{ source, group uint16 }

func (f *flows[A]) add(in flow.Input, group, source A, r *Rule) {
	switch {
	case in.BySource && in.Len != 0:
		f.addBoth(in, group, source, r)
		return
	case in.BySource:
		f.addSources(in, group, r)
		return
	}
	kind := 0
	if !in.Source.IsValid() {
		kind |= anySource
	}
	if in.Port == 0 {
		kind |= anyPort
	}
	if in.Len != 0 {
		kind |= prefixes
		f.addLength(in.Len)
	}
	f.used[kind] = true
	if f.rules == nil {
		f.rules = map[key[A]]*Rule{}
	}
	k := key[A]{
		index: uint32(in.Index), fromHost: in.FromHost, vlan: in.VLAN, outer: in.OuterVLAN, port: in.Port,
		bits: uint16(in.Len), group: group, source: source,
	}
	for last := max(in.Port, in.PortTo); ; k.port++ {
		f.rules[k] = r
		if k.port == last {
			return
		}
	}
}

func (f *flows[A]) addLength(length int) {
	if !slices.Contains(f.lengths, uint16(length)) {
		f.lengths = append(f.lengths, uint16(length))
		slices.SortFunc(f.lengths, func(a, b uint16) int { return int(b) - int(a) })
	}
}

// addBoth adds a rule with a source prefix, or excluded sources, and a group prefix.
func (f *flows[A]) addBoth(in flow.Input, group, source A, r *Rule) {
	if f.both == nil {
		f.both = map[key[A]]*Rule{}
	}
	if s := (shape{uint16(in.SourceLen), uint16(in.Len)}); s.source == 0 {
		f.addLength(in.Len)
	} else if !slices.Contains(f.shapes, s) {
		f.shapes = append(f.shapes, s)
		slices.SortFunc(f.shapes, func(a, b shape) int {
			return cmp.Or(int(b.source)-int(a.source), int(b.group)-int(a.group))
		})
	}
	k := key[A]{
		index: uint32(in.Index), fromHost: in.FromHost, vlan: in.VLAN, outer: in.OuterVLAN, port: in.Port,
		bits: uint16(in.Len), sourceBits: uint16(in.SourceLen), group: group, source: source,
	}
	for last := max(in.Port, in.PortTo); ; k.port++ {
		f.both[k] = r
		if k.port == last {
			return
		}
	}
}

// byBoth finds the first rule with a source and a group prefix that matches a packet.
func (f *flows[A]) byBoth(k key[A], h *packet.Headers) *Rule {
	at := k
	for _, s := range f.shapes {
		at.sourceBits, at.source = s.source, masked(k.source, int(s.source))
		at.bits, at.group = s.group, masked(k.group, int(s.group))
		if r := f.both[at]; r != nil && r.rule.TakesSource(h.Src) {
			return r
		}
	}
	return nil
}

// addSources adds a rule with a source prefix.
func (f *flows[A]) addSources(in flow.Input, group A, r *Rule) {
	if f.sources == nil {
		f.sources = map[key[A]][]*Rule{}
	}
	k := key[A]{index: uint32(in.Index), fromHost: in.FromHost, vlan: in.VLAN, outer: in.OuterVLAN, port: in.Port, group: group}
	for last := max(in.Port, in.PortTo); ; k.port++ {
		f.sources[k] = append(f.sources[k], r)
		slices.SortStableFunc(f.sources[k], func(a, b *Rule) int { return b.rule.In.SourceLen - a.rule.In.SourceLen })
		if k.port == last {
			return
		}
	}
}

// bySource finds the rule with the longest prefix that contains the packet's source.
func (f *flows[A]) bySource(k key[A], h *packet.Headers) *Rule {
	setZero(&k.source)
	for _, r := range f.sources[k] {
		if r.rule.TakesSource(h.Src) {
			return r
		}
	}
	return nil
}

// ofTheLink says whether a group is link-local and so matched by no prefix: 224.0.0.0/24
// (RFC 5771 section 4), and IPv6 groups of scope 2 and below (RFC 4291 section 2.7).
func ofTheLink(dst netip.Addr) bool {
	if dst.Is4() {
		b := dst.As4()
		return b[0] == 224 && b[1] == 0 && b[2] == 0
	}
	b := dst.As16()
	return b[0] == 0xff && b[1]&0xf <= 2
}

func (f *flows[A]) lookup(packet key[A], h *packet.Headers) *Rule {
	for kind := range kinds {
		if kind&anySource != 0 && kind&prefixes == 0 && f.sources != nil {
			k := packet
			if kind&anyPort != 0 {
				k.port = 0
			}
			if r := f.bySource(k, h); r != nil {
				return r
			}
		}
		if kind == prefixes && ofTheLink(h.Dst) {
			return nil
		}
		both := f.both != nil && kind&prefixes != 0 && kind&anySource != 0
		if !f.used[kind] && !both {
			continue
		}
		k := packet
		if kind&anyPort != 0 {
			k.port = 0
		}
		if both {
			if r := f.byBoth(k, h); r != nil {
				return r
			}
		}
		if kind&anySource != 0 {
			setZero(&k.source)
		}
		if kind&prefixes == 0 {
			if r := f.rules[k]; r != nil {
				return r
			}
			continue
		}
		for _, bits := range f.lengths {
			k.bits, k.group = bits, masked(packet.group, int(bits))
			if both { // with excluded sources
				if r := f.both[k]; r != nil && r.rule.TakesSource(h.Src) {
					return r
				}
			}
			if r := f.rules[k]; r != nil {
				return r
			}
		}
	}
	return nil
}

func setZero[A bytesOf](a *A) {
	var none A
	*a = none
}

// masked returns an address with the bits after the prefix cleared.
func masked[A bytesOf](a A, bits int) A {
	for i := range len(a) {
		switch left := bits - 8*i; {
		case left <= 0:
			a[i] = 0
		case left < 8:
			a[i] &= ^byte(0xff >> left)
		}
	}
	return a
}
