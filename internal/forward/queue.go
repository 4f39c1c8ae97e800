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
	// Send sends packets in order, without waiting. It returns how many were taken; if
	// not all, err is the unix.Errno with which packets[n] was refused, and the caller
	// may continue with packets[n+1:]. Send must not retain either part of a packet.
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

// batch is how many packets a queue collects before sending.
const batch = fanout.DefaultBatch

// headerRoom is the space for the headers of one packet.
const headerRoom = 256

var _ [headerRoom - packet.MaxHeaders]struct{}

// How long an engine waits for devices without room: at most 1/patience of its time,
// and never longer than maxPatience at once. Congestion that lasts longer is no burst.
const (
	patience    = 8
	maxPatience = 2 * time.Millisecond
	retryPause  = 50 * time.Microsecond
)

// queue holds an engine's packets for one output interface.
type queue struct {
	sender   Sender
	dropper  dropper // sender, if it is one
	ethernet bool
	// gone: the interface no longer exists, so the sender is useless.
	gone    atomic.Bool
	packets []fanout.Packet
	pending []pending // parallel to packets
	tapped  []tapped  // parallel to packets, while there are taps
	tap     *Engine   // that shows them; nil: no taps
	index   int       // of the interface
	done    int       // packets sent or dropped
	headers []byte

	// left is the remaining time to wait, as of filled.
	left   time.Duration
	filled time.Time
}

// usable is false once the interface is gone or the sender must be replaced.
func (q *queue) usable() bool {
	s, ok := q.sender.(interface{ Stale() bool })
	return !q.gone.Load() && !(ok && s.Stale())
}

// pending says where a packet of a queue is counted.
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

// room returns the memory for the headers of the next packet.
func (q *queue) room() []byte {
	at := len(q.packets) * headerRoom
	return q.headers[at : at : at+headerRoom]
}

// flush sends the queued packets. queues is how many the engine has.
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

// dropper is a Sender whose device may drop packets that it has taken.
type dropper interface {
	// Dropped returns the indexes of such packets in those of the last Send, in
	// ascending order. It is valid until the next Send.
	Dropped() []int
}

// count counts the packets that the sender has just taken.
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

// tappedOf returns the tapped entries of the packets last returned by take.
func (q *queue) tappedOf(taken []pending) []tapped { return q.tapped[q.done-len(taken) : q.done] }

// take marks the next n packets as done, and returns their pending entries.
func (q *queue) take(n int) []pending {
	q.done += n
	return q.pending[q.done-n : q.done]
}

// abandon drops the queued packets.
func (q *queue) abandon() {
	countDropped(q.pending[q.done:], loader.Internal)
	q.reset() // taps do not see them
}

// reset empties the queue, and clears all pointers: payloads may lie in memory that is
// unmapped before the queue is used again.
func (q *queue) reset() {
	clear(q.packets)
	clear(q.pending)
	q.packets, q.pending, q.done = q.packets[:0], q.pending[:0], 0
	q.tapped, q.tap = q.tapped[:0], nil
}

// refused returns the drop reason for an error of Send, and whether all later packets
// would fail, too.
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

// wait waits briefly for the device. It returns false when the queue has used up its
// share: then the device is slower than its traffic, and waiting would slow down the
// other outputs as well.
func (q *queue) wait(queues int) bool {
	pause := q.pause(time.Now(), queues)
	if pause <= 0 {
		return false
	}
	ts := unix.NsecToTimespec(int64(pause))
	_ = unix.Nanosleep(&ts, nil) // an early wake-up only retries early
	q.waited(time.Now())
	return true
}

// pause returns how long to wait now, 0 if the share is used up.
func (q *queue) pause(now time.Time, queues int) time.Duration {
	q.left = min(maxPatience, q.left+now.Sub(q.filled)/time.Duration(patience*queues))
	q.filled = now
	return min(retryPause, q.left)
}

// waited deducts the time since pause from the share. That may become negative, since a
// thread sleeps longer than requested.
func (q *queue) waited(now time.Time) {
	q.left -= now.Sub(q.filled)
	q.filled = now
}

// countSent counts packets as sent, adding up runs for the same output.
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
