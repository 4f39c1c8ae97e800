package loader

import (
	"math/bits"

	"xdpcast/bpf"
	"xdpcast/pkg/flow"
)

// Rates are stored as the time per packet or byte, in sixteenths of a nanosecond with 16 fractional
// bits (bpf/include/police.h).
const (
	policerSecond = 1_000_000_000 << 4
	policerPoint  = 16
	// policerDepth bounds a burst: half of what the clock counts to.
	policerDepth = 1 << 62
)

func encodePolicer(r flow.Rate) bpf.RelayPolicer {
	p := bpf.RelayPolicer{Burst: r.Burst}
	switch {
	case r.Packets != 0:
		p.Rate = r.Packets
		p.Cost = mulDiv(policerSecond, 1<<policerPoint, r.Packets)
	case r.Bits != 0:
		p.Rate, p.ByBytes = r.Bits, 1
		p.Cost = mulDiv(policerSecond*8, 1<<policerPoint, r.Bits)
	}
	p.Cost = max(p.Cost, 1)
	p.Depth = mulDiv(r.Burst, p.Cost, 1<<policerPoint)
	return p
}

// decodeRate is the inverse of encodePolicer.
func decodeRate(p *bpf.RelayPolicer) flow.Rate {
	if p.ByBytes != 0 {
		return flow.Rate{Bits: p.Rate, Burst: p.Burst}
	}
	return flow.Rate{Packets: p.Rate, Burst: p.Burst}
}

// mulDiv is a*b/c, at most policerDepth.
func mulDiv(a, b, c uint64) uint64 {
	hi, lo := bits.Mul64(a, b)
	if hi >= c {
		return policerDepth
	}
	q, _ := bits.Div64(hi, lo, c)
	return min(q, policerDepth)
}
