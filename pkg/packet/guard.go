package packet

import (
	"cmp"
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Parameters of the loop guard, as in bpf/include/guard.h.
const (
	// GuardBudget is the number of packets of a flow that are inspected in each tick.
	GuardBudget = 64
	// GuardWindow is how long a payload is remembered after it was relayed: slower loops are not
	// found.
	GuardWindow = 512 << guardShift * time.Nanosecond
	// GuardReturns packets of another sender are returns if they are more than GuardRatio times
	// those of the first.
	GuardReturns = 6
	GuardRatio   = 4
	// GuardHeal is the time without returns after which a loop is over. Its path is remembered for
	// GuardMemory.
	GuardHeal   = 10 * time.Second
	GuardMemory = time.Minute

	guardShift  = 20 // from nanoseconds to the time unit of slots
	guardSlots  = 16384
	guardOthers = 6
	guardWays   = 4
	guardRace   = 512
	guardSoon   = 64
	guardEarly  = 32
	guardMost   = 0xffff
	guardSteps  = 4
	guardStride = 0x4040
	guardProof  = 0xe880
	guardNear   = 16
	guardAsk    = 2
	guardAlone  = 8
	guardAlien  = 8
	guardFresh  = 64
	guardLate   = 256
	guardOrphan = 4
	guardProbe  = int64(2 * time.Second)
	guardBack   = int64(512 * time.Millisecond)
	guardSelf   = 32
	guardWatch  = 64
	guardTail   = 0x7fff

	guardTick = 4 * time.Millisecond // the kernel's, with CONFIG_HZ=250

	// Multipliers of SplitMix64 (Steele, Lea, Flood 2014).
	guardK1 = 0xbf58476d1ce4e5b9
	guardK2 = 0x94d049bb133111eb
)

// Guard finds packets that have been relayed before and come back: the twin of bpf/include/guard.h,
// which explains it. Its memory is shared: methods may be called from any number of goroutines.
// Rules are numbers assigned by the caller; times are nanoseconds of any monotonic clock.
type Guard struct {
	// Unlimited inspects every packet, for comparison with a program without budget.
	Unlimited bool
	// Secret makes this host's marks unique.
	Secret uint32

	slots [guardSlots]guardSlot

	mu    sync.RWMutex
	loops map[uint32]*GuardLoop
}

// GuardLoop is a rule whose packets come back.
type GuardLoop struct {
	Rule        uint32
	Since, Last int64 // the first return after none for GuardHeal, and the last one
	Ways        [guardWays]GuardWay
}

// GuardWay is a path on which packets come back; Last is 0 if it is unused.
type GuardWay struct {
	First, Last int64
	Packets     uint64 // dropped
	Index       int    // input interface
	From        uint32 // rule that sent the last one before
	MAC         [6]byte
	Source      netip.Addr

	sender   uint32
	forgiven int64 // when the sender proved to send by itself; 0: never
	probed   int64 // when a packet was last let pass as a probe, to test whether it comes back
	probe    uint32
	orphans  uint32
}

// guardSlot is struct guard_slot of bpf/include/abi.h.
type guardSlot struct {
	mu sync.Mutex
	guardContent
}

type guardContent struct {
	signature uint32
	seen      uint32
	rule      uint32
	sender    uint32
	packets   uint32
	soon      uint32
	cut       uint32
	born      uint32
	early     uint32
	arrivals  uint32
	marked    uint32
	steps     uint16
	foreign   uint16
	id        uint16
	isMarked  bool
	markedAt  uint32 // as seen
	port      uint16
	sum       uint16
	others    [guardOthers]guardOther
}

// guardOther is struct guard_other.
type guardOther struct {
	sender        uint32
	packets, soon uint16
}

// GuardPacket is a packet as seen by the guard.
type GuardPacket struct {
	Rule     uint32 // the matching rule
	Index    int    // input interface
	Outputs  int    // of the rule
	Ethernet bool   // the frame has its source MAC
	// TwoWay says that the rule's loop is intended: besides marks, packet counts per sender detect
	// a loop.
	TwoWay bool
	// Fronted says that the relay program has already inspected the packet: marking a single
	// sender's repeats is left to it.
	Fronted bool
	At      int64
}

// GuardPace selects the packets of a flow to inspect: the first of each tick, and all while its
// rate multiplies. It is not for concurrent use.
type GuardPace struct {
	tick          int64
	packets, pace uint32
	watched       uint32
}

// Looks counts a packet, and returns whether to inspect it.
func (p *GuardPace) Looks(g *Guard, rule uint32, at int64) bool {
	if tick := at / int64(guardTick); tick != p.tick {
		p.tick = tick
		switch {
		case p.packets > 2*p.pace+GuardBudget || g.has(rule):
			p.watched = guardWatch
		case p.watched > 0:
			p.watched--
		}
		p.pace = max(p.packets, p.pace-p.pace>>8)
		p.packets = 0
	}
	p.packets++
	return p.packets <= GuardBudget || p.watched > 0 || g.Unlimited
}

func (g *Guard) has(rule uint32) bool {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.loops[rule] != nil
}

// GuardMark is the mark to write into copies of a frame, which identifies them when they come back:
// in the IPv4 identification, or the IPv6 flow label. The zero GuardMark is none.
type GuardMark struct {
	value uint16
	set   bool
}

// Apply writes the mark into the headers of an IPv4 or IPv6 packet whose IP header begins at l3.
func (m GuardMark) Apply(headers []byte, l3 int, is4 bool) {
	if !m.set {
		return
	}
	var to [2]byte
	binary.NativeEndian.PutUint16(to[:], m.value)
	if !is4 {
		copy(headers[l3+2:l3+4], to[:]) // the lower 16 bits of the flow label
		return
	}
	check := headers[l3+10:]
	sum := uint64(^binary.BigEndian.Uint16(check)) + replace(headers[l3+4:l3+6], to[:])
	binary.BigEndian.PutUint16(check, ^fold(sum))
}

// GuardVerdict is a Guard's verdict on a packet.
type GuardVerdict uint8

// The verdicts.
const (
	GuardPass GuardVerdict = iota
	GuardCut               // it left this host before and came back on a loop path: drop it
	GuardEcho              // it likely did: relay it, and note it
)

// Returned says whether a frame left this host before and came back on a loop path; otherwise it
// remembers the frame, and returns the mark for its copies. h is the result of Parse.
func (g *Guard) Returned(frame []byte, h *Headers, p GuardPacket) (GuardVerdict, GuardMark) {
	signature, sum := guardSignature(frame, h)
	sender := guardSender(frame, h, p.Ethernet)
	seen := uint32(p.At >> guardShift)
	at := signature % guardSlots
	s := &g.slots[at]
	s.mu.Lock()
	defer func() { s.mu.Unlock() }()
	// Another payload must not displace one that is being counted: it gets the next slot.
	if !s.same(signature, sum) && s.counts(seen) {
		s.mu.Unlock()
		s = &g.slots[at^1]
		s.mu.Lock()
	}
	if s.same(signature, sum) && s.fresh(seen) {
		return g.again(s, frame, h, sender, sum, &p)
	}
	if s.counts(seen) {
		return GuardPass, GuardMark{}
	}
	s.guardContent = guardContent{signature: signature, seen: seen, rule: p.Rule, sender: sender, packets: 1, born: seen, port: guardPort(frame, h), sum: sum, id: markIn(frame, h)}
	return GuardPass, GuardMark{}
}

// fresh says whether the slot's payload was relayed within GuardWindow.
func (s *guardSlot) fresh(seen uint32) bool { return seen-s.seen <= uint32(GuardWindow>>guardShift) }

// counts says whether the slot's payload keeps repeating, or has just repeated.
func (s *guardSlot) counts(seen uint32) bool {
	return s.arrivals > 1 && s.fresh(seen) || s.arrivals > 0 && seen-s.seen <= guardFresh
}

// same says whether a payload is the slot's. Relays may drop the checksum.
func (s *guardSlot) same(signature uint32, sum uint16) bool {
	return s.signature == signature && (s.sum == sum || s.sum == 0 || sum == 0)
}

// again handles a packet whose payload is in the slot.
func (g *Guard) again(s *guardSlot, frame []byte, h *Headers, sender uint32, sum uint16, p *GuardPacket) (GuardVerdict, GuardMark) {
	g.mu.Lock()
	defer g.mu.Unlock()
	loop := g.loops[p.Rule]
	var way *GuardWay
	if loop != nil {
		way = loop.wayOf(sender)
	}
	if loop != nil {
		switch cut, known := loop.known(way, s, p); {
		case cut:
			return GuardCut, GuardMark{}
		case known:
			return GuardPass, GuardMark{}
		}
	}
	seen := uint32(p.At >> guardShift)
	port := guardPort(frame, h)
	// No sender reuses a fragment's identification so soon (RFC 6864, RFC 8200).
	byNumbers := p.TwoWay || h.Part == LaterFragment
	var packets, fewest uint32
	var asks bool
	returns, ratio := uint32(GuardReturns), uint32(GuardRatio)
	s.arrivals++
	if s.sum == 0 {
		s.sum = sum
	}
	soon := uint32(0)
	if seen-s.seen <= guardSoon {
		soon = 1
	}
	if sender == s.sender {
		if port == s.port {
			s.packets++
			s.soon += soon
		}
		packets, soon = s.packets, s.soon
		fewest = s.fewest(packets, guardOthers)
		if s.others[0].sender != 0 {
			asks = guardAsks(soon, guardAsk+1)
		} else {
			asks = byNumbers && !p.Fronted && guardAsks(packets, guardAlone)
		}
	} else {
		key := uint64(port)
		if !byNumbers { // one packet each to several rules is no return
			key |= uint64(p.Rule) << 16
		}
		at := s.other(guardHash(uint64(sender), key)|1, seen)
		o := &s.others[at]
		if o.packets < guardMost {
			o.packets++
			o.soon += uint16(soon)
		}
		packets, soon = uint32(o.packets), uint32(o.soon)
		fewest = s.fewest(s.packets, at)
		asks = guardAsks(packets, guardAsk)
		if s.cut > 0 || loop != nil && p.At-loop.Last < int64(GuardHeal) {
			// Once a rule loops, other paths need fewer returns.
			returns, ratio = 2, 1
		}
	}
	many := soon >= returns && soon > ratio*fewest
	found := many && byNumbers
	canBear, mark, next := markOf(frame, h) != nil, markIn(frame, h), uint32(0)
	step := uint32(guardSteps)
	if canBear && s.isMarked && seen-s.markedAt <= uint32(GuardWindow>>guardShift) {
		step = s.stepOf(mark, g.Secret)
	}
	switch {
	case step < guardSteps:
		found = s.back(step) || found
		asks, next = true, step+1
	case mark != s.id && s.foreign < guardAlien:
		// Another relay's mark: let that one find it.
		s.foreign++
		asks = false
	case asks:
		s.foreign = 0
	}
	if found && !way.isForgiven(p.At) {
		g.found(s, h, frame, sender, p)
		return GuardCut, GuardMark{}
	}
	s.seen, s.rule = seen, p.Rule
	switch {
	case asks && canBear:
		s.isMarked, s.markedAt = true, seen
		return GuardPass, GuardMark{s.mark(next, g.Secret), true}
	case many && !byNumbers && !p.Fronted:
		return GuardEcho, GuardMark{}
	}
	return GuardPass, GuardMark{}
}

// back records a packet that came back with a mark, and returns whether that proves a loop.
func (s *guardSlot) back(step uint32) bool {
	if s.arrivals-s.marked > guardNear {
		s.steps = 0
	}
	s.steps |= 1 << step
	s.marked, s.foreign = s.arrivals, 0
	return guardProof>>s.steps&1 != 0
}

// guardPort is the source port, in network byte order; 0 in later fragments.
func guardPort(frame []byte, h *Headers) uint16 {
	if h.Part == LaterFragment {
		return 0
	}
	return binary.NativeEndian.Uint16(frame[h.UDP:])
}

// mark is the mark of a payload for a step: the next step is for a packet that came back with this
// one.
func (s *guardSlot) mark(step, secret uint32) uint16 {
	return uint16(guardHash(uint64(s.signature), uint64(secret)) + step%guardSteps*guardStride)
}

// stepOf returns which of this host's marks a packet carries; guardSteps: none.
func (s *guardSlot) stepOf(mark uint16, secret uint32) uint32 {
	step := uint32(guardSteps)
	for i := range uint32(guardSteps) {
		if s.mark(i, secret) == mark {
			step = i
		}
	}
	return step
}

// guardAsks says whether a payload has repeated often enough to be marked: from, and the 63 packets
// after it, then from the 256th to the 319th, and from the 2048th to the 2111th.
func guardAsks(packets, from uint32) bool {
	return packets-from < 64 || packets-256 < 64 || packets-2048 < 64
}

// markOf is the position of a mark in a frame, nil if the frame cannot carry one.
func markOf(frame []byte, h *Headers) []byte {
	if h.FragmentID != 0 || h.Part != Whole {
		return nil
	}
	return markPlace(frame, h)
}

func markPlace(frame []byte, h *Headers) []byte {
	if !h.Dst.Is4() {
		return frame[h.L3+2 : h.L3+4] // the lower 16 bits of the flow label
	}
	return frame[h.L3+4 : h.L3+6]
}

// markIn is the current value at the position of a mark.
func markIn(frame []byte, h *Headers) uint16 { return binary.NativeEndian.Uint16(markPlace(frame, h)) }

// other is the index of a sender and its port among the others: its own, or a replacement: the
// entry with the fewest packets, early senders last.
func (s *guardSlot) other(sender, seen uint32) int {
	at, fewest := 0, ^uint32(0)
	for i := range s.others {
		if s.others[i].sender == sender {
			return i
		}
		if packets := uint32(s.others[i].packets) | s.early>>i&1<<31; packets < fewest {
			at, fewest = i, packets
		}
	}
	s.others[at] = guardOther{sender: sender}
	s.early &^= 1 << at
	if seen-s.born <= guardRace && s.arrivals <= guardEarly {
		s.early |= 1 << at
	}
	return at
}

// fewest is the lowest packet count of a sender that may have been first, ignoring the one at index
// not.
func (s *guardSlot) fewest(fewest uint32, not int) uint32 {
	for i := range s.others {
		if s.early>>i&1 != 0 && i != not {
			fewest = min(fewest, uint32(s.others[i].packets))
		}
	}
	return fewest
}

// found records a loop path.
func (g *Guard) found(s *guardSlot, h *Headers, frame []byte, sender uint32, p *GuardPacket) {
	loop := g.loops[p.Rule]
	if loop == nil {
		loop = &GuardLoop{Rule: p.Rule}
		if g.loops == nil {
			g.loops = map[uint32]*GuardLoop{}
		}
		g.loops[p.Rule] = loop
	}
	way := &loop.Ways[0]
	for i := range loop.Ways {
		if loop.Ways[i].Last < way.Last {
			way = &loop.Ways[i]
		}
	}
	*way = GuardWay{First: p.At, Source: h.Src, sender: sender, probed: p.At}
	if p.Ethernet {
		way.MAC = [6]byte(frame[6:12])
	}
	loop.cut(way, s, p)
}

// cut records a packet that came back on a known path.
func (l *GuardLoop) cut(way *GuardWay, s *guardSlot, p *GuardPacket) {
	if l.Since == 0 || p.At-l.Last > int64(GuardHeal) {
		l.Since = p.At
	}
	l.Last, way.Last = p.At, p.At
	way.Index, way.From = p.Index, s.rule
	way.Packets++
	s.cut++
}

func (l *GuardLoop) wayOf(sender uint32) *GuardWay {
	for i := range l.Ways {
		if w := &l.Ways[i]; w.Last != 0 && w.sender == sender {
			return w
		}
	}
	return nil
}

// known decides on a packet on a known path: it is usually dropped. Occasionally one passes as a
// probe, and if it does not come back the path is forgotten. So is one on which more packets come
// than were sent.
func (l *GuardLoop) known(w *GuardWay, s *guardSlot, p *GuardPacket) (cut, known bool) {
	if w == nil || p.At-w.Last >= int64(GuardMemory) || w.isForgiven(p.At) {
		return false, false
	}
	seen := uint32(p.At >> guardShift)
	if w.orphans++; seen-s.seen <= guardLate {
		w.orphans = 0
	}
	if w.orphans >= guardOrphan || s.cut > guardSelf+GuardRatio*uint32(p.Outputs)*(s.arrivals+1) {
		w.forgiven, w.orphans = p.At, 0
		return false, false
	}
	switch since := p.At - w.probed; {
	case w.probe != 0 && since > guardBack:
		w.probe, w.Last = 0, 0
		return false, false
	case w.probe == s.signature:
		w.probe = 0
	case w.probe == 0 && since > guardProbe:
		w.probe, w.probed = s.signature, p.At
		s.seen, s.rule = seen, p.Rule
		s.arrivals++
		return false, true
	}
	l.cut(w, s, p)
	return true, true
}

func (w *GuardWay) isForgiven(at int64) bool {
	return w != nil && w.forgiven != 0 && at-w.forgiven < int64(GuardMemory)
}

// Loops returns the rules whose packets came back within GuardMemory, by number.
func (g *Guard) Loops(at int64) []GuardLoop {
	g.mu.RLock()
	defer g.mu.RUnlock()
	var all []GuardLoop
	for _, l := range g.loops {
		if at-l.Last < int64(GuardMemory) {
			all = append(all, *l)
		}
	}
	slices.SortFunc(all, func(a, b GuardLoop) int { return cmp.Compare(a.Rule, b.Rule) })
	return all
}

// Forget forgets the loops of removed rules, and the packets they relayed last.
func (g *Guard) Forget(gone map[uint32]bool) {
	if len(gone) == 0 {
		return
	}
	g.mu.Lock()
	for rule := range gone {
		delete(g.loops, rule)
	}
	g.mu.Unlock()
	for i := range g.slots {
		s := &g.slots[i]
		s.mu.Lock()
		if gone[s.rule] {
			s.guardContent = guardContent{}
		}
		s.mu.Unlock()
	}
}

func guardHash(a, b uint64) uint32 { return uint32((a*guardK1 + b*guardK2) >> 32) }

// guardSender identifies the sender of a packet: its MAC and IP address, hashed. Never 0.
func guardSender(frame []byte, h *Headers, ethernet bool) uint32 {
	var mac uint64
	if ethernet {
		mac = uint64(binary.NativeEndian.Uint32(frame[8:]))<<16 | uint64(binary.NativeEndian.Uint16(frame[6:]))
	}
	ip := frame[h.L3:]
	word := func(at int) uint64 { return uint64(binary.NativeEndian.Uint32(ip[at:])) }
	if h.Dst.Is4() {
		return guardHash(word(12), mac) | 1
	}
	return guardHash((word(8)<<32|word(12))^(word(16)<<32|word(20))*guardK2, mac) | 1
}

// guardSignature and the sum are invariant when a payload is relayed; the sum is 0 without a UDP
// checksum.
func guardSignature(frame []byte, h *Headers) (signature uint32, sum uint16) {
	ip := frame[h.L3:]
	if h.Part == LaterFragment {
		whole := uint64(h.FragmentID)<<32 | uint64(h.L3Len)
		if h.Dst.Is4() {
			return guardHash(whole, uint64(binary.NativeEndian.Uint16(ip[6:]))), 0
		}
		if h.L3Len-8 > guardTail || len(ip) < h.L3Len {
			return guardHash(whole, 1), 0
		}
		tail := ip[h.L3Len-8:]
		return guardHash(whole, uint64(binary.NativeEndian.Uint32(tail))^uint64(binary.NativeEndian.Uint32(tail[4:]))*guardK2), 0
	}
	udp := frame[h.UDP:]
	if udp[6]|udp[7] != 0 {
		sum = guardSum(udp, addresses(ip, h))
	}
	return guardBytes(udp), sum
}

// guardSum is the sum of the payload: the UDP checksum without the addresses and ports, which
// relays change. Never 0.
func guardSum(udp, addresses []byte) uint16 {
	total := uint64(^binary.NativeEndian.Uint16(udp[6:])) + uint64(^binary.NativeEndian.Uint32(udp))
	for ; len(addresses) > 0; addresses = addresses[4:] {
		total += uint64(^binary.NativeEndian.Uint32(addresses))
	}
	return fold(total)
}

// guardBytes is a hash of a datagram's length, its first 16 bytes and its last 8.
func guardBytes(udp []byte) uint32 {
	length := int(binary.BigEndian.Uint16(udp[4:]))
	hash := uint64(length)
	mix := func(at int) {
		hash = (hash ^ uint64(binary.NativeEndian.Uint32(udp[at:]))) * guardK1
		hash ^= hash >> 32
	}
	for at := udpLen; at < udpLen+16 && length >= at+4 && len(udp) >= at+4; at += 4 {
		mix(at)
	}
	if length < 2*udpLen || length-8 > guardTail || len(udp) < length {
		if length < udpLen+3 || length-3 > guardTail || len(udp) < length {
			return guardHash(hash, 1)
		}
		end := udp[length-3 : length]
		return guardHash(hash, uint64(end[0])<<16|uint64(end[1])<<8|uint64(end[2]))
	}
	mix(length - 8)
	return guardHash(hash, uint64(binary.NativeEndian.Uint32(udp[length-4:])))
}
