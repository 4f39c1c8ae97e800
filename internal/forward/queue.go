package forward

import (
	"errors"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/pkg/fanout"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
)

// Sender sends frames out of one interface; a [fanout.Sender] is one. One goroutine
// at a time uses it.
type Sender interface {
	// Send sends packets in their order, without waiting. It returns how many were
	// taken; if not all, err is the unix.Errno for which packets[n] was refused, and
	// the caller may go on with packets[n+1:]. Neither part of a packet may be used
	// after Send has returned.
	//
	//	EAGAIN, ENOBUFS, ENOMEM  no room now
	//	EMSGSIZE                 too long for the interface
	//	ENETDOWN                 the interface is down
	//	ENXIO, ENODEV            the interface is gone
	Send(packets []fanout.Packet) (n int, err error)
	// Ethernet reports whether frames begin with an Ethernet header, rather than
	// with the IP header.
	Ethernet() bool
	Close() error
}

// batch is how many packets a queue collects.
const batch = fanout.DefaultBatch

// headerRoom is for the headers of one packet.
const headerRoom = 256

var _ [headerRoom - packet.MaxHeaders]struct{}

// How long an engine waits for devices without room: at most the part 1/patience of
// its time, and never longer than maxPatience at once. What does not go away in that
// time is no burst.
const (
	patience    = 8
	maxPatience = 2 * time.Millisecond
	retryPause  = 50 * time.Microsecond
)

// queue is what an engine has for one output interface.
type queue struct {
	sender   Sender
	dropper  dropper // sender, if it is one
	ethernet bool
	// gone: the interface is no more, and the sender with it.
	gone    atomic.Bool
	packets []fanout.Packet
	pending []pending // beside packets
	tapped  []tapped  // beside packets, while somebody taps
	tap     *Engine   // that shows them; nil: nobody taps
	index   int       // of the interface
	done    int       // of them, sent or dropped
	headers []byte

	// left is the time that may still be waited, as of filled.
	left   time.Duration
	filled time.Time
}

// usable says whether the queue goes on with its sender: not when the interface is no
// more, nor when another sender is to take its place.
func (q *queue) usable() bool {
	s, ok := q.sender.(interface{ Stale() bool })
	return !q.gone.Load() && !(ok && s.Stale())
}

// pending is what a packet of a queue is counted for.
type pending struct {
	counts *counters
	bytes  uint64
}

func newQueue(s Sender) *queue {
	dropper, _ := s.(dropper)
	return &queue{
		sender: s, dropper: dropper, ethernet: s.Ethernet(),
		packets: make([]fanout.Packet, 0, batch),
		pending: make([]pending, 0, batch),
		headers: make([]byte, batch*headerRoom),
	}
}

// room is where the headers of the next packet go.
func (q *queue) room() []byte {
	at := len(q.packets) * headerRoom
	return q.headers[at : at : at+headerRoom]
}

// flush sends what is queued. queues is how many the engine has.
func (q *queue) flush(queues int) {
	for q.done < len(q.packets) {
		n, err := q.sender.Send(q.packets[q.done:])
		q.count(q.take(n))
		if q.done == len(q.packets) {
			break
		}
		reason, all := refused(err)
		if reason == loader.TxFull && q.wait(queues) {
			continue
		}
		if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) {
			q.gone.Store(true)
		}
		n = 1
		if all {
			n = len(q.packets) - q.done
		}
		q.drop(q.take(n), reason)
	}
	q.reset()
}

// dropper is a Sender whose device may drop what it has taken.
type dropper interface {
	// Dropped returns the places of such packets among those of the last Send, in
	// ascending order. It is valid until the next Send.
	Dropped() []int
}

// count counts what the sender has taken just now.
func (q *queue) count(taken []pending) {
	if q.tap != nil {
		q.tap.tapOutcome(q.tappedOf(taken), 0, false)
	}
	if q.dropper == nil {
		countSent(taken)
		return
	}
	from := 0
	for _, at := range q.dropper.Dropped() {
		if at < from || at >= len(taken) {
			continue
		}
		countSent(taken[from:at])
		if q.tap != nil {
			q.tap.tapOutcome(q.tappedOf(taken)[at:at+1], loader.TxFull, true)
		}
		countDropped(taken[at:at+1], loader.TxFull)
		from = at + 1
	}
	countSent(taken[from:])
}

// drop counts packets that were not taken.
func (q *queue) drop(dropped []pending, reason loader.Reason) {
	if q.tap != nil {
		q.tap.tapOutcome(q.tappedOf(dropped), reason, true)
	}
	countDropped(dropped, reason)
}

// tappedOf is what is beside packets that take has returned last.
func (q *queue) tappedOf(taken []pending) []tapped { return q.tapped[q.done-len(taken) : q.done] }

// take is what the next n packets are counted for, which are done with.
func (q *queue) take(n int) []pending {
	q.done += n
	return q.pending[q.done-n : q.done]
}

// abandon drops what is queued.
func (q *queue) abandon() {
	countDropped(q.pending[q.done:], loader.Internal)
	q.reset() // who taps does not see them
}

// reset forgets what is queued, and leaves no pointer behind: payloads may lie in
// memory that is unmapped before the queue is used again.
func (q *queue) reset() {
	clear(q.packets)
	clear(q.pending)
	q.packets, q.pending, q.done = q.packets[:0], q.pending[:0], 0
	q.tapped, q.tap = q.tapped[:0], nil
}

// refused is the reason behind an error of Send, and whether all that follows would
// meet it too.
func refused(err error) (reason loader.Reason, all bool) {
	switch {
	case errors.Is(err, unix.EAGAIN):
		return loader.TxFull, true
	case errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.ENOMEM):
		return loader.TxFull, false
	case errors.Is(err, unix.EMSGSIZE):
		return loader.MTU, false
	case errors.Is(err, unix.ENETDOWN), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return loader.NoDevice, true
	default:
		return loader.Internal, false
	}
}

// wait waits for the device a little. It is false when the queue has waited its
// share: then the device is slower than what is sent there, and waiting would make
// the other outputs as slow.
func (q *queue) wait(queues int) bool {
	pause := q.pause(time.Now(), queues)
	if pause <= 0 {
		return false
	}
	ts := unix.NsecToTimespec(int64(pause))
	_ = unix.Nanosleep(&ts, nil) // woken early, it tries again early
	q.waited(time.Now())
	return true
}

// pause is how long to wait now, 0 when the share is used up.
func (q *queue) pause(now time.Time, queues int) time.Duration {
	q.left = min(maxPatience, q.left+now.Sub(q.filled)/time.Duration(patience*queues))
	q.filled = now
	return min(retryPause, q.left)
}

// waited takes the time since pause from the share. It may become negative: a thread
// sleeps longer than it asks for.
func (q *queue) waited(now time.Time) {
	q.left -= now.Sub(q.filled)
	q.filled = now
}

// countSent adds up what follows each other for the same output.
func countSent(sent []pending) {
	for i := 0; i < len(sent); {
		counts, n, bytes := sent[i].counts, uint64(0), uint64(0)
		for ; i < len(sent) && sent[i].counts == counts; i++ {
			n++
			bytes += sent[i].bytes
		}
		counts.all.Add(n, bytes)
	}
}

func countDropped(dropped []pending, reason loader.Reason) {
	for _, p := range dropped {
		p.counts.drop(reason, 1, p.bytes)
	}
}
