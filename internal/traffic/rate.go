package traffic

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Rate is a send rate. The zero value is as fast as possible.
type Rate struct {
	// Value is in packets or bits a second; 0 is no limit.
	Value float64
	// Bits says that Value counts the bits of the UDP payload.
	Bits bool
}

// maxRate keeps the arithmetic of the pacer far from its limits.
const maxRate = 1e12

// ParseRate parses a rate: packets a second ("1000", "100k", "1.5M"), bits of UDP payload a second
// ("20Mbit", "2.5Gbit"), or "max" (also "0"). The multipliers k, M and G are decimal.
func ParseRate(s string) (Rate, error) {
	if s == "max" {
		return Rate{}, nil
	}
	number, isBits := strings.CutSuffix(s, "bit")
	scale := 1.0
	for suffix, factor := range map[string]float64{"k": 1e3, "M": 1e6, "G": 1e9} {
		if rest, ok := strings.CutSuffix(number, suffix); ok {
			number, scale = rest, factor
			break
		}
	}
	value, err := strconv.ParseFloat(number, 64)
	value *= scale
	// ParseFloat also accepts signs, hexadecimal, "inf" and "nan": a rate has only digits and one
	// decimal point.
	if err != nil || strings.Trim(number, "0123456789.") != "" || value > maxRate {
		return Rate{}, fmt.Errorf(`rate %q: must be packets a second such as 100k or 1.5M, bits a second such as 20Mbit or 2.5Gbit, or "max"`, s)
	}
	return Rate{Value: value, Bits: isBits && value > 0}, nil
}

// String formats the rate as ParseRate parses it.
func (r Rate) String() string {
	if r.Value == 0 {
		return "max"
	}
	value, unit := r.Value, ""
	for _, m := range []struct {
		unit   string
		factor float64
	}{{"G", 1e9}, {"M", 1e6}, {"k", 1e3}} {
		if r.Value >= m.factor {
			value, unit = r.Value/m.factor, m.unit
			break
		}
	}
	if r.Bits {
		unit += "bit"
	}
	return strconv.FormatFloat(value, 'f', -1, 64) + unit
}

// packets is the rate in packets of size payload bytes a second.
func (r Rate) packets(size int) float64 {
	if r.Bits {
		return r.Value / float64(size*8)
	}
	return r.Value
}

// defaultMaxLag is how much of its schedule a delayed sender catches up on. Without a limit, a
// process that was stopped for a minute would send that minute's packets in one burst.
const defaultMaxLag = time.Second

// A pacer computes how many packets are due. Packet n is due n/rate after the start, regardless of
// earlier packets: errors of single waits do not accumulate. Times are since the start of the run.
type pacer struct {
	perSecond float64       // 0: no limit
	maxLag    time.Duration // how much of the schedule is caught up on
	shift     time.Duration // part of the schedule abandoned because of maxLag
}

// due is how many packets should have been sent by the time elapsed.
func (p *pacer) due(elapsed time.Duration) uint64 {
	if p.perSecond == 0 {
		return math.MaxUint64
	}
	if elapsed -= p.shift; elapsed < 0 {
		return 0
	}
	// Rounding in at must not make packet n not due at at(n).
	return uint64(elapsed.Seconds()*p.perSecond+1e-6) + 1
}

// at is when packet n (from 0) is due.
func (p *pacer) at(n uint64) time.Duration {
	if p.perSecond == 0 {
		return 0
	}
	// A century is practically never, and does not overflow.
	return p.shift + time.Duration(min(math.Ceil(float64(n)/p.perSecond*1e9), 3e18))
}

// limitLag shifts the schedule if packet n is overdue by more than maxLag.
func (p *pacer) limitLag(n uint64, elapsed time.Duration) {
	if p.perSecond == 0 {
		return
	}
	if lag := elapsed - p.at(n); lag > p.maxLag {
		p.shift += lag
	}
}

// until is how many packets are due in a run of length d; false without a rate.
func (p *pacer) until(d time.Duration) (uint64, bool) {
	if p.perSecond == 0 {
		return 0, false
	}
	return uint64(math.Ceil(d.Seconds()*p.perSecond - 1e-6)), true
}
