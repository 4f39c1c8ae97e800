package forward

import (
	"math/bits"
	"sync/atomic"

	"xdpcast/pkg/flow"
)

// policer is a token bucket, stored as the time at which it is full again (GCRA,
// ITU-T I.371): the twin of bpf/include/police.h, shared by all workers.
type policer struct {
	full        atomic.Uint64 // when the bucket is full again, in sixteenths of a nanosecond
	cost, depth uint64        // of a packet or byte, in units of 2^-16 of that; of the bucket
	byBytes     bool
	rate        flow.Rate
}

const (
	policeSecond = 1_000_000_000 << 4
	policePoint  = 16
	policeDepth  = 1 << 62
	policeTries  = 8
)

// newPolicer returns nil for no rate.
func newPolicer(r flow.Rate) *policer {
	p := &policer{rate: r}
	switch {
	case r.Packets != 0:
		p.cost = mulDiv(policeSecond, 1<<policePoint, r.Packets)
	case r.Bits != 0:
		p.cost, p.byBytes = mulDiv(policeSecond*8, 1<<policePoint, r.Bits), true
	default:
		return nil
	}
	p.cost = max(p.cost, 1)
	p.depth = mulDiv(r.Burst, p.cost, 1<<policePoint)
	return p
}

// conforms says whether a packet that arrived at this time, in nanoseconds, is within
// the rate. A worker that keeps losing the race against others drops the packet.
func (p *policer) conforms(at int64, bytes int) bool {
	now, cost := uint64(at)<<4, p.cost
	if p.byBytes {
		cost *= uint64(bytes)
	}
	cost >>= policePoint
	for range policeTries {
		full := p.full.Load()
		next := max(full, now) + cost
		if next-now > p.depth {
			return false
		}
		if p.full.CompareAndSwap(full, next) {
			return true
		}
	}
	return false
}

// mulDiv returns a*b/c, at most policeDepth.
func mulDiv(a, b, c uint64) uint64 {
	hi, lo := bits.Mul64(a, b)
	if hi >= c {
		return policeDepth
	}
	q, _ := bits.Div64(hi, lo, c)
	return min(q, policeDepth)
}
