package forward

import (
	"sync/atomic"

	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
)

// reasons is the number of drop reasons.
const reasons = int(loader.Internal) + 1

// counter has one writer, and readers at any time. Each of its two numbers is
// exact; between them a reader may see half of an addition.
type counter struct {
	packets, bytes atomic.Uint64
}

// add needs no locked instruction for the sum: nobody else writes.
func (c *counter) add(packets, bytes uint64) {
	c.packets.Store(c.packets.Load() + packets)
	c.bytes.Store(c.bytes.Load() + bytes)
}

func (c *counter) addTo(sum *loader.Counter) {
	sum.Packets += c.packets.Load()
	sum.Bytes += c.bytes.Load()
}

type dropCounters [reasons]counter

func (d *dropCounters) addTo(sum map[loader.Reason]loader.Counter) {
	for reason := range d {
		var c loader.Counter
		if d[reason].addTo(&c); c.Packets == 0 {
			continue
		}
		total := sum[loader.Reason(reason)]
		total.Packets += c.Packets
		total.Bytes += c.Bytes
		sum[loader.Reason(reason)] = total
	}
}

// perWorker are the counters of each worker, made with the first packet that it counts:
// of the workers that there could be, few serve a rule.
type perWorker[C any] []atomic.Pointer[C]

// of returns the counters of a worker, to that worker alone.
func (p perWorker[C]) of(worker int) *C {
	if c := p[worker].Load(); c != nil {
		return c
	}
	c := new(C)
	p[worker].Store(c)
	return c
}

// all are the counters that there are, for anybody to read.
func (p perWorker[C]) all(yield func(*C) bool) {
	for i := range p {
		if c := p[i].Load(); c != nil && !yield(c) {
			return
		}
	}
}

// ruleCounters are one worker's for one rule.
type ruleCounters struct {
	matched  counter
	lastSeen atomic.Int64 // as the at of Engine.Frame; 0: never
	drops    dropCounters
	pace     packet.GuardPace // the worker's alone
	_        [64]byte         // no cache line shared with another worker's
}

// outputCounters are one worker's for one output.
type outputCounters struct {
	sent  counter
	drops dropCounters
	_     [64]byte
}
