package forward

import (
	"encoding/binary"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/account"
	"xdpcast/pkg/fanout"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
)

// Engine forwards for one worker. One goroutine at a time uses it; Set's methods may
// be called concurrently.
type Engine struct {
	set    *Set
	input  int
	worker int
	open   func(index int) (Sender, error)
	// fromHost says that the frames are those that this host sends through the input.
	fromHost bool

	// next is the view for the next batch, using that of the current one, a hazard
	// pointer: nothing of it is closed meanwhile. using is nil between batches.
	next, using atomic.Pointer[view]
	// now is the worker's own copy of using.
	now *view

	// lifted is memory for frames received without an Ethernet header.
	lifted []byte
	writer account.Writer
	// global holds counters outside rules: fragments by kind.
	global    *account.Counters
	fragments [fragmentKinds]*account.Cell
	batches   atomic.Uint64 // ended batches
	matched   []*counters   // with packets that are not accounted yet
	committer committer     // of the current batch; nil: none

	// The active taps, and the set of those that want the current packet.
	tapList *[]*Tap
	taps    []tapping
	wanted  uint8
	noMACs  bool // the handover occupies its MAC addresses
}

// committer is told before packets are sent: should the process be killed meanwhile, the one that
// inherits its rings does not send them again. A [fanout.Block] is one.
type committer interface{ Commit() }

// view is a consistent snapshot of what an engine needs to forward.
type view struct {
	table *Table
	// queues is parallel to Table.devices; an entry is nil if the engine's rules have
	// no output there, or the interface does not exist.
	queues []*queue
	open   int // non-nil queues
}

// Begin starts a batch with the current rules.
func (e *Engine) Begin() {
	for {
		v := e.next.Load()
		e.using.Store(v)
		// Update stores next before it reads using (hazard pointer): either it saw v
		// in using, or next is still v.
		if e.next.Load() == v {
			e.now = v
			break
		}
	}
	if list := e.set.taps.list.Load(); list != e.tapList {
		e.followTaps(list)
	}
}

// End sends the packets still queued. The batch's frames may be reused afterwards.
func (e *Engine) End() {
	e.account()
	e.flush()
	if len(e.taps) > 0 {
		e.endTaps()
	}
	e.now = nil
	e.using.Store(nil)
	e.batches.Add(1)
}

func (e *Engine) flush() {
	for _, q := range e.now.queues {
		if q != nil && len(q.packets) > 0 {
			e.send(q)
		}
	}
}

// send sends the packets of a queue.
func (e *Engine) send(q *queue) {
	if e.committer != nil {
		e.committer.Commit()
	}
	e.account()
	if len(e.taps) > 0 {
		e.tapSending(q)
	}
	q.flush(e.now.open)
}

// abandon ends a batch that failed, and drops its queued packets.
func (e *Engine) abandon() {
	e.account()
	if e.now != nil {
		for _, q := range e.now.queues {
			if q != nil {
				q.abandon()
			}
		}
		if len(e.taps) > 0 {
			e.endTaps()
		}
	}
	e.now = nil
	e.using.Store(nil)
	e.batches.Add(1)
}

// Table returns the rules of the current batch.
func (e *Engine) Table() *Table { return e.now.table }

// Frame forwards an Ethernet frame received on the interface with this index at this
// time of Set.Clock. The frame must not change until End. It returns whether a rule
// matched, even if the frame was dropped.
func (e *Engine) Frame(index int, frame []byte, at int64) bool {
	h, ok := packet.Parse(frame)
	if !ok {
		e.malformed(index, frame, len(frame), true)
		return false
	}
	return e.forward(index, frame, &h, at, len(frame), true)
}

// Packet is Frame for an interface without an Ethernet header: data begins with the IP
// header.
func (e *Engine) Packet(index int, data []byte, at int64) bool {
	frame := e.lift(data)
	h, ok := packet.Parse(frame)
	if !ok {
		e.malformed(index, frame, len(data), false)
		return false
	}
	return e.forward(index, frame, &h, at, len(data), false)
}

// Deliver sends the copies of a packet whose rule is known and which has passed all
// checks. The MAC addresses of the frame are undefined.
func (e *Engine) Deliver(r *Rule, frame []byte, h *packet.Headers, at int64) {
	counts := e.match(r, at, len(frame))
	if r.rule.Finish && packet.FinishChecksum(frame, h) {
		counts.note(loader.UnfinishedChecksum, 1, uint64(len(frame)))
	}
	if len(e.taps) > 0 {
		e.wanted, e.noMACs = e.wantedBy(r, sequenceOf(frame)), true
		e.tapIn(r.rule.In.Index, frame, at, len(frame), 0, false)
	}
	e.copies(r, frame, h, packet.GuardMark{}, at, len(frame))
}

// liftedSize is the memory for frames without an Ethernet header: a multiple of the
// longest.
const (
	etherLen   = 14
	liftedSize = 4 << 16
)

// lift prepends an Ethernet header to a packet, in memory that is reused after the
// batch, or after all queued packets have been sent.
func (e *Engine) lift(data []byte) []byte {
	need := etherLen + len(data)
	if len(data) == 0 || need > liftedSize {
		return nil
	}
	if len(e.lifted)+need > cap(e.lifted) {
		if e.lifted == nil {
			e.lifted = make([]byte, 0, liftedSize)
		}
		e.flush()
		e.lifted = e.lifted[:0]
	}
	at := len(e.lifted)
	e.lifted = e.lifted[:at+need]
	frame := e.lifted[at : at+need : at+need]
	clear(frame[:etherLen])
	protocol := uint16(unix.ETH_P_IP)
	if data[0]>>4 == 6 {
		protocol = unix.ETH_P_IPV6
	}
	binary.BigEndian.PutUint16(frame[etherLen-2:], protocol)
	copy(frame[etherLen:], data)
	return frame
}

// forward is the relay program's function of this name, preceded by its lookup. length
// is the frame's length on arrival.
func (e *Engine) forward(index int, frame []byte, h *packet.Headers, at int64, length int, ethernet bool) bool {
	port := h.DstPort
	if h.Part == packet.LaterFragment {
		if port = e.set.fragments.port(index, h, at); port == 0 {
			e.fragment(account.FragmentOrphan, length)
			e.set.fragments.orphan(index, h, at, length)
			return false
		}
	}
	r := e.now.table.lookup(index, h, port, e.fromHost)
	if r == nil || r.unicast && ethernet && [6]byte(frame[0:6]) != r.rule.In.MAC {
		return false
	}
	var before orphans
	switch h.Part {
	case packet.FirstFragment:
		before = e.set.fragments.remember(index, h, at)
		e.fragment(account.FragmentFirst, length)
	case packet.LaterFragment:
		e.fragment(account.FragmentLater, length)
	}
	counts := e.match(r, at, length)
	if before.packets > 0 {
		counts.note(loader.OrphanFragment, before.packets, before.bytes)
	}
	reason, mark, refused := e.refuses(r, counts, frame, h, at, length, ethernet)
	if len(e.taps) > 0 {
		e.wanted, e.noMACs = e.wantedBy(r, 0), false
		e.tapIn(index, frame, at, length, reason, refused)
	}
	if refused {
		e.account()
		counts.drop(reason, 1, uint64(length))
		return true
	}
	e.copies(r, frame, h, mark, at, length)
	return true
}

// malformed counts a truncated packet that would have matched a rule.
func (e *Engine) malformed(index int, frame []byte, length int, ethernet bool) {
	h, ok := packet.Malformed(frame)
	if !ok || h.Part == packet.LaterFragment {
		return
	}
	if r := e.now.table.Lookup(index, &h, h.DstPort); r != nil && (!r.unicast || !ethernet || [6]byte(frame[0:6]) == r.rule.In.MAC) {
		r.counts.of(e, e.set.matches).note(loader.Malformed, 1, uint64(length))
	}
}

// fragmentKinds is the number of kinds from account.FragmentFirst on.
const fragmentKinds = 3

func (e *Engine) fragment(kind account.Kind, length int) {
	at := kind - account.FragmentFirst
	if e.fragments[at] == nil {
		e.fragments[at] = e.global.Cell(e.writer, kind)
	}
	e.fragments[at].Add(1, uint64(length))
}

func (e *Engine) match(r *Rule, at int64, length int) *counters {
	counts := r.counts.of(e, e.set.matches)
	if counts.packets == 0 {
		e.matched = append(e.matched, counts)
	}
	counts.packets++
	counts.bytes += uint64(length)
	counts.seen = at
	return counts
}

// account counts the matched packets of the batch so far, before what becomes of them is counted: a store that
// others may read costs as much as the rest of match.
func (e *Engine) account() {
	for _, c := range e.matched {
		c.all.Add(c.packets, c.bytes)
		c.all.Seen(c.seen)
		c.packets, c.bytes = 0, 0
	}
	e.matched = e.matched[:0]
}

// refuses returns why no output gets a packet, otherwise the mark for its copies.
func (e *Engine) refuses(r *Rule, counts *counters, frame []byte, h *packet.Headers, at int64, length int, ethernet bool) (reason loader.Reason, mark packet.GuardMark, refused bool) {
	if !r.rule.AllowLoop && !e.fromHost && e.own(r, frame, h, ethernet) {
		return loader.Loop, mark, true
	}
	if !r.rule.Unguarded && counts.pace.Looks(e.set.guard, r.number, at) {
		var verdict packet.GuardVerdict
		verdict, mark = e.set.guard.Returned(frame, h, packet.GuardPacket{Rule: r.number, Index: r.rule.In.Index, Outputs: len(r.out), Ethernet: ethernet, TwoWay: r.rule.TwoWay && !r.rule.Fronted, Fronted: r.rule.Fronted, At: at})
		switch verdict {
		case packet.GuardCut:
			return loader.Looping, mark, true
		case packet.GuardEcho:
			counts.note(loader.Echo, 1, uint64(length))
		}
	}
	// RFC 8200 section 8.1.
	if !r.rule.AllowNoChecksum && h.UDP != 0 && h.Dst.Is6() && frame[h.UDP+6] == 0 && frame[h.UDP+7] == 0 {
		return loader.NoChecksum, mark, true
	}
	if r.policer != nil && !r.policer.conforms(at, length) {
		return loader.Policed, mark, true
	}
	return 0, mark, false
}

// own says whether this host sent a packet.
func (e *Engine) own(r *Rule, frame []byte, h *packet.Headers, ethernet bool) bool {
	if ethernet {
		mac := [6]byte(frame[6:12])
		if mac == r.rule.In.MAC {
			return true
		}
		if macs := e.set.ownMACs.Load(); macs != nil {
			if _, own := (*macs)[mac]; own {
				return true
			}
		}
	}
	_, own := e.now.table.own[h.Src]
	return own
}

func (e *Engine) copies(r *Rule, frame []byte, h *packet.Headers, mark packet.GuardMark, at int64, length int) {
	for slot := range r.out {
		o := &r.out[slot]
		counts := o.counts.of(e, account.Sent)
		if reason, ok := e.copy(o, slot, counts, frame, h, mark, at, length); !ok {
			e.account()
			counts.drop(reason, 1, uint64(length))
			if len(e.taps) > 0 {
				e.tapUnsent(o, slot, frame, at, length, reason)
			}
		}
	}
}

// copy queues one output's copy, or returns the reason for dropping it.
func (e *Engine) copy(o *output, slot int, counts *counters, frame []byte, h *packet.Headers, mark packet.GuardMark, at int64, length int) (loader.Reason, bool) {
	if !o.Ready {
		return loader.ReasonOf(o.Blocked), false
	}
	q := e.now.queues[o.device]
	if q == nil {
		return loader.NoDevice, false
	}
	if o.TooLong(h, len(frame), int(o.MTU), q.ethernet) {
		return loader.MTU, false
	}
	header, outcome := o.Append(q.room(), frame, h)
	switch outcome {
	case packet.EndsByTTL:
		return loader.TTL, false
	case packet.EndsByPort:
		return loader.Port, false
	}
	if o.policer != nil && !o.policer.conforms(at, length) {
		return loader.Policed, false
	}
	mark.Apply(header, len(header)-(h.Payload-h.L3), h.Dst.Is4())
	payload := frame[h.Payload:]
	if !q.ethernet {
		header = header[len(header)-(h.Payload-h.L3):]
		payload = frame[h.Payload : h.L3+h.L3Len]
	}
	q.packets = append(q.packets, fanout.Packet{Header: header, Payload: payload})
	q.pending = append(q.pending, pending{counts, uint64(length)})
	if len(e.taps) > 0 {
		e.tapQueued(q, slot)
	}
	if len(q.packets) == batch {
		e.send(q)
	}
	return 0, true
}

// settle waits until the engine uses only the view in next. A batch takes no longer than
// sending its frames, whose waiting is bounded.
func (e *Engine) settle() {
	next := e.next.Load()
	for {
		if v := e.using.Load(); v == nil || v == next {
			return
		}
		time.Sleep(retryPause)
	}
}

// idle waits until the current batch has ended.
func (e *Engine) idle() {
	before := e.batches.Load()
	for e.using.Load() != nil && e.batches.Load() == before {
		time.Sleep(retryPause)
	}
}
