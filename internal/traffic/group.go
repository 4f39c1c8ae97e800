package traffic

import (
	"cmp"
	"net/netip"
	"slices"
)

// Expected are the header fields that packets must have. The zero value expects nothing.
type Expected struct {
	// TTL is the IPv4 TTL or IPv6 hop limit; 0 for any.
	TTL uint8
	// Source is the sender's address; the zero value for any.
	Source netip.Addr
	// SourcePort is the sender's port; 0 for any.
	SourcePort uint16
	// DSCP is the differentiated services code point; nil for any.
	DSCP *uint8
}

// check counts unexpected fields in w and returns whether there were any.
func (e *Expected) check(f Fields, w *Wrong) bool {
	before := *w
	if e.TTL != 0 && f.TTL != e.TTL {
		w.TTL++
	}
	if e.Source.IsValid() && f.Source.Addr() != e.Source {
		w.Source++
	}
	if e.SourcePort != 0 && f.Source.Port() != e.SourcePort {
		w.SourcePort++
	}
	if e.DSCP != nil && f.DSCP != *e.DSCP {
		w.DSCP++
	}
	return *w != before
}

// maxFlows limits the flows that a group distinguishes. Beyond it, the least recently active one is
// folded into the group's counters and forgotten.
const maxFlows = 64

type flowKey struct {
	stream uint64
	flow   uint32
}

type flow struct {
	flowKey
	tracker  *Tracker
	gaps     gaps
	offset   uint64 // for our packets with a Numbering: the number of sequence number 0
	base     uint64 // for others' packets: the offset added to their numbers
	received uint64
	heard    uint64 // the group's count of datagrams at the flow's latest packet
}

// group accounts for the packets of one socket. It is not safe for concurrent use.
type group struct {
	sub Subscription
	fd  int

	window    int
	fromStart bool
	expected  Expected
	numbering Numbering
	late      int64 // ns after which a repaired gap is late; 0: never

	c          Counters // without the flows' trackers
	retired    uint64   // lost packets of forgotten flows
	drops      uint32   // the socket's counter at its last reading
	latency    Histogram
	repairs    *Histogram // nil before the first repair
	flows      map[flowKey]*flow
	current    *flow // the latest packet's
	firstAt    int64 // arrival of the first and the latest packet; 0: none
	lastAt     int64
	longestGap int64
	last       Fields
	lastWrong  Fields
	anyWrong   bool
}

// handle accounts for one datagram: its payload, its header fields and its arrival time
// (CLOCK_REALTIME, ns). It returns whether that was a received packet, and its latency if the
// packet contains its send time.
func (g *group) handle(payload []byte, f Fields, arrival int64) (latency int64, timed, received bool) {
	g.c.Datagrams++
	p := payload
	n := numbered{count: 1}
	if g.numbering != (Numbering{}) {
		var ok bool
		if n, ok = g.numbering.read(payload); !ok {
			g.c.Foreign++
			return 0, false, false
		}
		p = payload[min(g.numbering.headerLen(), len(payload)):]
	}
	h, err := Decode(p)
	var fl *flow
	switch {
	case err == nil:
		fl, n.count = g.flow(flowKey{h.Stream, h.Flow}), 1
		if !fl.counts(g.numbering, n.number-h.Seq) {
			err = ErrCorrupt
			break
		}
		n.number = h.Seq
	case err != ErrCorrupt && g.numbering != (Numbering{}):
		// Another sender's: only its numbers count.
		fl, err = g.flow(flowKey{n.session, othersFlow}), nil
		n.number = fl.unwrap(n.number, g.numbering)
	}
	switch err {
	case nil:
	case ErrCorrupt:
		g.c.Corrupt++
		return 0, false, false
	default:
		g.c.Foreign++
		return 0, false, false
	}
	switch g.observe(fl, n, arrival) {
	case Duplicate:
		g.c.Duplicated++
		return 0, false, false
	case Stale:
		g.c.Stale++
		return 0, false, false
	case Reordered:
		g.c.Reordered++
	}
	fl.received++
	g.c.Received++
	g.c.Bytes += uint64(len(payload))
	g.arrived(arrival)
	g.last = f
	if g.expected.check(f, &g.c.Wrong) {
		g.lastWrong, g.anyWrong = f, true
	}
	if h == (Header{}) {
		return 0, false, true
	}
	latency = arrival - h.SentAt
	g.latency.Record(latency)
	return latency, true, true
}

// othersFlow is the flow of packets without our header.
const othersFlow = 1<<32 - 1

// counts says whether the format's number is as far from the sequence number as in the flow's first
// packet.
func (fl *flow) counts(n Numbering, offset uint64) bool {
	if n == (Numbering{}) {
		return true
	}
	if offset &= n.mask(); !fl.tracker.Started() {
		fl.offset = offset
	}
	return fl.offset == offset
}

// unwrap extends a number to the value nearest to the highest so far.
func (fl *flow) unwrap(number uint64, n Numbering) uint64 {
	if !fl.tracker.Started() {
		if n.bits() < 64 {
			fl.base = n.mask() + 1 // so that there is room below the first
		}
		return fl.base + number
	}
	shift := 64 - n.bits()
	return fl.tracker.Highest() + uint64(int64((number-fl.tracker.Highest())<<shift)>>shift)
}

// observe accounts for the numbers of a packet. The verdict is that of the first.
func (g *group) observe(fl *flow, n numbered, arrival int64) Verdict {
	started, highest := fl.tracker.Started(), fl.tracker.Highest()
	v := fl.tracker.Observe(n.number)
	for i := 1; i < n.count; i++ {
		fl.tracker.Observe(n.number + uint64(i))
	}
	switch {
	case v == InOrder && started && n.number-highest > 1:
		fl.gaps.open(highest+1, n.number-1, arrival, fl.tracker.window())
	case v == Reordered:
		at, ok := fl.gaps.opened(n.number)
		if !ok {
			break // it arrived before the first
		}
		if g.late > 0 && arrival-at > g.late {
			g.c.Late++
		} else {
			g.c.Repaired++
		}
		if g.repairs == nil {
			g.repairs = &Histogram{}
		}
		g.repairs.Record(arrival - at)
	}
	return v
}

func (g *group) arrived(at int64) {
	if g.firstAt == 0 {
		g.firstAt, g.lastAt = at, at
	}
	g.longestGap = max(g.longestGap, at-g.lastAt)
	g.lastAt = max(g.lastAt, at)
}

// flow returns the state of a flow, creating it if necessary.
func (g *group) flow(key flowKey) *flow {
	if g.current != nil && g.current.flowKey == key {
		g.current.heard = g.c.Datagrams
		return g.current
	}
	fl := g.flows[key]
	switch {
	case fl != nil:
	case len(g.flows) < maxFlows:
		// The window was checked when the receiver was made.
		fl = &flow{flowKey: key, tracker: newTracker(g.window, g.fromStart && key.flow != othersFlow)}
		g.flows[key] = fl
	default:
		fl = g.recycle(key)
	}
	fl.heard = g.c.Datagrams
	g.current = fl
	return fl
}

// recycle reuses the memory of the least recently active flow for a new one.
func (g *group) recycle(key flowKey) *flow {
	var oldest *flow
	for _, fl := range g.flows {
		if oldest == nil || fl.heard < oldest.heard {
			oldest = fl
		}
	}
	g.retired += oldest.tracker.Lost()
	delete(g.flows, oldest.flowKey)
	oldest.tracker.reset()
	oldest.tracker.fromStart = g.fromStart && key.flow != othersFlow
	*oldest = flow{flowKey: key, tracker: oldest.tracker, gaps: gaps{oldest.gaps.list[:0]}}
	g.flows[key] = oldest
	return oldest
}

// counters returns the current counters. For a finished run they include missing or surplus packets
// compared with the expected number; 0 expects nothing.
func (g *group) counters(expect uint64) Counters {
	c := g.c
	c.Lost = g.retired
	for _, fl := range g.flows {
		c.Lost += fl.tracker.Lost()
	}
	if expect > 0 {
		if known := c.Received + c.Lost; known < expect {
			c.Lost += expect - known
		}
		if c.Received > expect {
			c.Surplus = c.Received - expect
		}
	}
	return c
}

func (g *group) report(expect uint64) GroupReport {
	r := GroupReport{
		Endpoint:     g.sub.String(),
		Counters:     g.counters(expect),
		Latency:      g.latency.Latency(),
		LongestGapNS: g.longestGap,
		Flows:        make([]Flow, 0, len(g.flows)),
	}
	if g.c.Received > 0 {
		last := g.last
		r.Last = &last
	}
	if g.anyWrong {
		wrong := g.lastWrong
		r.LastWrong = &wrong
	}
	if g.repairs != nil {
		repairs := g.repairs.Latency()
		r.RepairTime = &repairs
	}
	for _, fl := range g.flows {
		r.Flows = append(r.Flows, Flow{
			Stream:     streamName(fl.stream),
			Flow:       fl.flowKey.flow,
			FirstSeq:   fl.tracker.First() - fl.base,
			HighestSeq: fl.tracker.Highest() - fl.base,
			Received:   fl.received,
			Lost:       fl.tracker.Lost(),
		})
	}
	slices.SortFunc(r.Flows, func(a, b Flow) int {
		return cmp.Or(cmp.Compare(a.Stream, b.Stream), cmp.Compare(a.Flow, b.Flow))
	})
	return r
}

// pollDrops adds the kernel's drops at the socket since the last call.
func (g *group) pollDrops() error {
	drops, err := socketDrops(g.fd)
	if err != nil {
		return err
	}
	g.c.SocketDrops += uint64(drops - g.drops) // the counter wraps
	g.drops = drops
	return nil
}
