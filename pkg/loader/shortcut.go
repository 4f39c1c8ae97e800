package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/bits"
	"runtime"
	"slices"
	"unsafe"

	"xdpcast/bpf"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// shortcuts mirrors the map shortcuts, in which the relay program finds most rules without the flow
// tables (bpf/include/shortcut.h). While open, the slots agree with the tables; while closed, only
// the tables count. Each rule has two candidate slots; rules without a slot fall back to the
// tables.
type shortcuts struct {
	open  bool
	known bool     // slots equals what the kernel holds
	slots []*entry // by index; nil: empty
	shift uint32   // 64 minus the bits of a slot index
	// slotless are the rules that may have a slot, but whose slots are taken by others. Unless known,
	// it may be wrong.
	slotless map[*entry]bool
}

// shortcutSlots is the size of the map shortcuts. While at most half the slots are used,
// nearly every rule gets one.
func shortcutSlots(maxRules uint32) uint32 {
	return 1 << max(1, min(bits.Len32(maxRules-1), 31))
}

// newShortcuts creates the mirror of a map with n slots. fresh: the map was just created, so all
// slots are empty and shortcuts can be open from the start.
func newShortcuts(n uint32, fresh bool) shortcuts {
	return shortcuts{open: fresh, known: fresh, slots: make([]*entry, n), shift: uint32(64 - bits.TrailingZeros32(n)), slotless: map[*entry]bool{}}
}

// shiftInForce is the current shift for map config; 0 while closed.
func (s *shortcuts) shiftInForce() uint32 {
	if !s.open {
		return 0
	}
	return s.shift
}

// Multipliers of shortcut_hash in bpf/include/shortcut.h.
const (
	shortcutK1 = 0xbf58476d1ce4e5b9
	shortcutK2 = 0x94d049bb133111eb
)

// slotsOf returns the two candidate slots of an input of one port, or of any.
func (s *shortcuts) slotsOf(in flow.Input) (first, second uint32) {
	var group uint64
	if in.Group.Is4() {
		b := in.Group.As4()
		group = uint64(binary.NativeEndian.Uint32(b[:]))
	} else {
		b := in.Group.As16()
		group = binary.NativeEndian.Uint64(b[:8]) ^ binary.NativeEndian.Uint64(b[8:])
	}
	tags := uint64(in.Port)<<32 | uint64(in.OuterVLAN)<<16 | uint64(in.VLAN)
	hash := (group^uint64(in.Index)<<32)*shortcutK1 + tags*shortcutK2
	again := (hash ^ hash>>32) * shortcutK2
	return uint32(hash >> s.shift), uint32(again >> s.shift)
}

// candidates are slotsOf of an entry.
func (s *shortcuts) candidates(e *entry) [2]uint32 {
	first, second := s.slotsOf(e.rule.In)
	return [2]uint32{first, second}
}

// has says whether an entry has a slot.
func (s *shortcuts) has(e *entry) bool {
	first, second := s.slotsOf(e.rule.In)
	return s.slots[first] == e || s.slots[second] == e
}

// maxMoves limits how many entries move to make room for a new one.
const maxMoves = 32

// put gives an entry a slot; others may have to move to their second one (cuckoo hashing: Pagh,
// Rodler 2001). If that frees no slot, nothing moves. It records in changed which slots have
// another entry.
func (s *shortcuts) put(e *entry, changed map[uint32]bool) {
	at, second := s.slotsOf(e.rule.In)
	if s.slots[at] != nil && s.slots[second] == nil {
		at = second
	}
	var moves []uint32 // slots whose entries move to the next one
	for s.slots[at] != nil {
		if len(moves) == maxMoves { // cycles end here, too
			return
		}
		moves = append(moves, at)
		first, second := s.slotsOf(s.slots[at].rule.In)
		at = first ^ second ^ at
	}
	for _, from := range slices.Backward(moves) {
		s.slots[at] = s.slots[from]
		changed[at] = true
		at = from
	}
	s.slots[at] = e
	changed[at] = true
}

// closeShortcuts makes the flow tables alone determine a packet's rule. The caller must still write
// the map config.
func (s *transaction) closeShortcuts() {
	if s.shortcuts.open {
		s.shortcuts.open = false
		s.onFailure(func() error {
			s.shortcuts.open = true
			return s.writeConfig()
		})
	}
}

// storesInOrder says that every CPU sees another's stores in order and loads in its own order (x86
// TSO). Other architectures, including arm64, guarantee neither between two system calls.
const storesInOrder = runtime.GOARCH == "amd64" || runtime.GOARCH == "386"

// openShortcuts assigns slots to the current rules, of which all but some were assigned before. The
// caller has waited a grace period for programs that saw the shortcuts open.
func (l *Loader) openShortcuts(changes []change) error {
	s := &l.shortcuts
	changed := map[uint32]bool{}
	if s.known && len(changes) <= fewChanges {
		l.assignSome(changes, changed)
	} else {
		l.assignAll(changed)
	}
	if err := l.writeShortcuts(changed); err != nil {
		return err
	}
	s.known, s.open = true, true
	if len(changed) > 0 && !storesInOrder {
		// A program that sees shortcuts open must see no stale slot: one that starts after
		// a grace period cannot.
		l.opts.wait()
	}
	if err := l.writeConfig(); err != nil {
		s.open = false
		return err
	}
	return nil
}

// emptySlot is an empty slot among the candidates of an entry.
func (s *shortcuts) emptySlot(e *entry) (at uint32, ok bool) {
	for _, at := range s.candidates(e) {
		if s.slots[at] == nil {
			return at, true
		}
	}
	return 0, false
}

// addShortcut is openShortcuts for a change with addsOne: the shortcuts are open. It writes the slot
// twice: at first without its family, so that it matches no packet, and then the family, when
// programs that see that see all the rest, too.
func (l *Loader) addShortcut(changes []change) error {
	e, s := changes[0].new, &l.shortcuts
	at, empty := s.emptySlot(e)
	if !empty || !l.wantsShortcut(e) {
		return nil
	}
	b := encodeShortcut(e)
	hidden := b
	hidden.Family = 0
	err := l.maps.Shortcuts.Put(at, &hidden)
	if err == nil {
		if !storesInOrder {
			l.opts.wait()
		}
		err = l.maps.Shortcuts.Put(at, &b)
	}
	if err != nil {
		s.known, s.open = false, false // the next change assigns them anew
		return errors.Join(fmt.Errorf("write map shortcuts: %w", err), l.writeConfig())
	}
	s.slots[at] = e
	return nil
}

// assignAll assigns slots to all current rules.
func (l *Loader) assignAll(changed map[uint32]bool) {
	s := &l.shortcuts
	wants := l.shortcutRules()
	for at, e := range s.slots {
		if e != nil && (!e.inForce || !wants(e)) {
			s.slots[at] = nil
			changed[uint32(at)] = true
		}
	}
	clear(s.slotless)
	for _, e := range l.rules {
		if wants(e) && !s.has(e) {
			if s.put(e, changed); !s.has(e) {
				s.slotless[e] = true
			}
		}
	}
}

// assignSome assigns slots after some changes, as assignAll would: besides the changed rules, it
// looks at those from which they take packets, or took some, and at those without a slot if one has
// become free.
func (l *Loader) assignSome(changes []change, changed map[uint32]bool) {
	s := &l.shortcuts
	free := func(e *entry) {
		delete(s.slotless, e)
		for _, at := range s.candidates(e) {
			if s.slots[at] == e {
				s.slots[at] = nil
				changed[at] = true
			}
		}
	}
	var wanting []*entry
	shades := map[flow.Input]*shade{} // by place
	look := func(e *entry) {
		if !mayHaveShortcut(e.rule.In) {
			free(e)
			return
		}
		place := placeOf(e.rule.In)
		if shades[place] == nil {
			shades[place] = l.places.shade(place)
		}
		switch wants := !shades[place].covers(e.rule.In); {
		case !wants:
			free(e)
		case !s.has(e):
			wanting = append(wanting, e)
		}
	}
	for _, c := range changes {
		if c.old != nil {
			free(c.old)
		}
	}
	for _, c := range changes {
		if c.new != nil {
			look(c.new)
		}
		for _, x := range []*entry{c.old, c.new} {
			if x == nil {
				continue
			}
			for e := range l.places.of(x.rule.In) {
				if e != x && shadows(x.rule.In, e.rule.In) {
					look(e)
				}
			}
		}
	}
	if len(changed) > 0 {
		for e := range s.slotless {
			wanting = append(wanting, e)
		}
	}
	for _, e := range wanting {
		if !s.has(e) {
			s.put(e, changed)
		}
	}
	for _, e := range wanting {
		if delete(s.slotless, e); !s.has(e) {
			s.slotless[e] = true
		}
	}
}

// shadows says whether a rule may take packets that a shortcut to another one of its place would
// take: it names sources, or the port.
func shadows(x, of flow.Input) bool {
	switch {
	case x.Port == 0:
		return false
	case of.Port == 0:
		return true
	}
	return (x.Source.IsValid() || x.BySource) && x.Port <= of.Port && of.Port <= max(x.Port, x.PortTo)
}

// mayHaveShortcut says whether an input has one group, and one port or one source and any port.
func mayHaveShortcut(in flow.Input) bool {
	return in.Len == 0 && in.IsOne() && !in.FromHost && (in.Port != 0 || in.Source.IsValid())
}

// wantsShortcut says whether a current rule may have a slot: its input may, and no more specific rule
// can take its packets.
func (l *Loader) wantsShortcut(e *entry) bool {
	in := e.rule.In
	if !mayHaveShortcut(in) || in.Port != 0 && in.Source.IsValid() {
		return mayHaveShortcut(in)
	}
	for other := range l.places.of(in) {
		if other != e && shadows(other.rule.In, in) {
			return false
		}
	}
	return true
}

// shade is what the rules of a place shadow, for many rules of the place: wantsShortcut looks at all of
// them for each.
type shade struct {
	anyPort bool                   // rules of any port
	ports   [(1 << 16) / 64]uint64 // rules of these ports and any source
}

// shade is that of a place.
func (p *places) shade(place flow.Input) *shade {
	s := &shade{}
	for e := range p.of(place) {
		in := e.rule.In
		if in.Port == 0 {
			continue
		}
		s.anyPort = true
		if !in.Source.IsValid() && !in.BySource {
			continue
		}
		for port := uint32(in.Port); port <= uint32(max(in.Port, in.PortTo)); port++ {
			s.ports[port/64] |= 1 << (port % 64)
		}
	}
	return s
}

// covers says whether a rule that may have a shortcut is shadowed.
func (s *shade) covers(in flow.Input) bool {
	if in.Port == 0 {
		return s.anyPort
	}
	return !in.Source.IsValid() && s.ports[in.Port/64]>>(in.Port%64)&1 == 1
}

// shortcutRules returns wantsShortcut for all current rules, in less time for many of one place.
func (l *Loader) shortcutRules() func(*entry) bool {
	sourced, ported, anyPort := map[flow.Input]bool{}, map[flow.Input]bool{}, false
	for _, e := range l.rules {
		in := e.rule.In
		anyPort = anyPort || in.Port == 0
		if in.Port != 0 && (in.Source.IsValid() || in.BySource) {
			for in := range in.EveryPort() {
				sourced[in.AnySource()] = true
			}
		}
	}
	if anyPort {
		for _, e := range l.rules {
			if in := e.rule.In; in.Port != 0 && !in.FromHost {
				ported[placeOf(in)] = true
			}
		}
	}
	return func(e *entry) bool {
		in := e.rule.In
		switch {
		case !mayHaveShortcut(in):
			return false
		case in.Port == 0:
			return !ported[placeOf(in)]
		}
		return in.Source.IsValid() || len(sourced) == 0 || !sourced[in.AnySource()]
	}
}

// maxStagedShortcuts is how many slots are written at once.
const maxStagedShortcuts = 4096

// writeShortcuts writes the changed slots; all of them if the kernel's contents are unknown.
func (l *Loader) writeShortcuts(changed map[uint32]bool) error {
	known := l.shortcuts.known
	l.shortcuts.known = false // until all is written
	var b batch[bpf.RelayShortcut]
	write := func(at uint32) error {
		b.add(at, encodeShortcut(l.shortcuts.slots[at]))
		if len(b.keys) < maxStagedShortcuts {
			return nil
		}
		return b.put(l.maps.Shortcuts)
	}
	if known {
		for _, at := range slices.Sorted(maps.Keys(changed)) {
			if err := write(at); err != nil {
				return err
			}
		}
		return b.put(l.maps.Shortcuts)
	}
	for at := range l.shortcuts.slots {
		if err := write(uint32(at)); err != nil {
			return err
		}
	}
	return b.put(l.maps.Shortcuts)
}

func encodeShortcut(e *entry) (b bpf.RelayShortcut) {
	if e == nil {
		return b
	}
	in := e.rule.In
	b.Flow = encodeFlow(e)
	b.Ifindex, b.Vlan, b.OuterVlan, b.Port = uint32(in.Index), in.VLAN, in.OuterVLAN, in.Port
	if in.Group.Is4() {
		b.Family, b.Group = 4, in.Group.As4()
		if in.Source.IsValid() {
			b.Source = in.Source.As4()
		}
		if len(e.rule.Out) == 1 {
			embedOutput(&b, e)
		}
		return b
	}
	group := in.Group.As16()
	b.Family = 6
	copy(b.Second[:], group[:])
	if in.Source.IsValid() {
		source := in.Source.As16()
		copy(b.Second[len(group):], source[:])
	}
	return b
}

// embedOutput copies the first line of a rule's only output into its shortcut, unless packets need
// the second. Published outputs never change: a rule with other outputs has another first output.
func embedOutput(b *bpf.RelayShortcut, e *entry) {
	o := encodeOutput(e.rule.Out[0], e.firstStats, 0)
	if bpf.RelayOutputFlag(o.Flags)&(bpf.RelayOutputFlagOUTPUT_READY|bpf.RelayOutputFlagOUTPUT_RARE) != bpf.RelayOutputFlagOUTPUT_READY {
		return
	}
	b.HasOutput = uint8(bpf.RelayShortcutOutputSHORTCUT_OUTPUT)
	line := (*[unsafe.Sizeof(o)]byte)(unsafe.Pointer(&o))
	copy(b.Second[:], line[:])
	if isPrepared(b, &o) {
		b.HasOutput = uint8(bpf.RelayShortcutOutputSHORTCUT_PREPARED)
		if b.Flow.Stream != 0 {
			b.HasOutput = uint8(bpf.RelayShortcutOutputSHORTCUT_LEG)
		}
		prepare(b, &o)
	}
}

// rareFlow are the flags of flows that the shortest way of plain packets does not look at.
const rareFlow = bpf.RelayFlowFlagFLOW_UNICAST | bpf.RelayFlowFlagFLOW_ALLOW_LOOP | bpf.RelayFlowFlagFLOW_POLICED | bpf.RelayFlowFlagFLOW_FINISH |
	bpf.RelayFlowFlagFLOW_LONG_WAY

// isPrepared says whether packets of the slot may take that way.
func isPrepared(b *bpf.RelayShortcut, o *bpf.RelayOutput) bool {
	return b.Flow.Path == uint8(bpf.RelayRulePathPATH_KERNEL) && b.Flow.Routed == 0 &&
		bpf.RelayFlowFlag(b.Flow.Flags)&rareFlow == 0 &&
		bpf.RelayOutputFlag(o.Flags) == bpf.RelayOutputFlagOUTPUT_READY|bpf.RelayOutputFlagOUTPUT_SOURCE_SET
}

// prepare computes what rewrite_prepared (bpf/include/plain.h) adds to a packet's checksums: what it loses, less
// what it gets, in the byte order of the packet.
func prepare(b *bpf.RelayShortcut, o *bpf.RelayOutput) {
	n := binary.NativeEndian
	b.DstPort, b.SrcPort = networkOrder(o.DstPort), networkOrder(o.SrcPort)
	addresses := uint64(n.Uint32(b.Group[:])) + uint64(^n.Uint32(o.Dst[:])) + uint64(^n.Uint32(o.Src[:]))
	ports := uint64(networkOrder(b.Port)) + uint64(^b.DstPort)
	if o.SrcPort != 0 {
		ports += uint64(^b.SrcPort)
	}
	// One more, see there; and 0xffff, which is nothing, so that the sum stays positive without the new TTL.
	b.IpSum = uint32(foldSum(addresses)) + 1 + 0xffff
	b.UdpSum = foldSum(addresses + ports)
	switch packet.TTLMode(o.TtlMode) {
	case packet.TTLSet:
		b.TtlOr, b.TtlSub = 0xff, 0xff-o.Ttl
	case packet.TTLDecrement:
		b.TtlSub = 1
	}
}

// networkOrder is a port as packets have it.
func networkOrder(port uint16) uint16 {
	return binary.NativeEndian.Uint16([]byte{byte(port >> 8), byte(port)})
}

// foldSum folds a sum of words to the 16 bits of one's complement arithmetic.
func foldSum(sum uint64) uint16 {
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

// adoptShortcuts closes shortcuts that an earlier process left open, and opens them once this one
// has verified them.
func (l *Loader) adoptShortcuts() error {
	l.shortcuts = newShortcuts(l.maps.Shortcuts.MaxEntries(), false)
	if err := l.writeConfig(); err != nil {
		return err
	}
	l.opts.wait()
	if err := l.openShortcuts(nil); err != nil {
		return fmt.Errorf("shortcuts to the rules: %w", err)
	}
	return nil
}
