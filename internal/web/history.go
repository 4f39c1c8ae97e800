package web

import (
	"context"
	"strconv"
	"sync"
	"time"
)

const (
	// A history covers the last 5 minutes: historySteps rates of each rule, historyStep apart.
	historySteps = 60
	historyStep  = 5 * time.Second
	// historyRules bounds its memory, at about 350 bytes a rule. With more rules, no rates are
	// kept.
	historyRules = 20_000
	// historyShare bounds the fraction of time spent reading: 1/historyShare. The pause is at most
	// historyLeft steps, since a slow reading may only have waited for a busy relay. The steps of a
	// pause share one rate.
	historyShare = 50
	historyLeft  = 4
)

// history keeps the rates of the last minutes, so that a page can show them as soon as it opens. It
// may be used from any goroutine.
type history struct {
	step time.Duration

	mu    sync.Mutex
	rules map[string]*past
	at    time.Time // of the last reading; zero: none
	next  int       // index of the next step
	taken int       // steps so far, at most historySteps
}

// past is a rule's rates: a ring, with the same indexes for all rules.
type past struct {
	packets uint64 // as of the last reading
	rates   [historySteps]float32
}

// pastRates is a history in a message.
type pastRates struct {
	Step  float64 `json:"step"` // seconds
	Taken int     `json:"taken"`
	// Rates are packets per second, newest last. Leading zeros are omitted.
	Rates map[string][]digits `json:"rates"`
}

// digits is a number encoded with three significant digits.
type digits float32

// MarshalJSON implements json.Marshaler.
func (d digits) MarshalJSON() ([]byte, error) {
	return strconv.AppendFloat(nil, float64(d), 'g', 3, 32), nil
}

func newHistory(step time.Duration) *history {
	return &history{step: step, rules: map[string]*past{}}
}

// add records a reading: the number of packets that each rule has matched.
func (h *history) add(now time.Time, packets map[string]uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	between := now.Sub(h.at)
	if h.at.IsZero() || between > historySteps*h.step || len(packets) > historyRules {
		h.begin(now, packets)
		return
	}
	// Rounded: readings come a little early or late.
	steps := int((between + h.step/2) / h.step)
	if steps == 0 {
		return
	}
	for name := range h.rules {
		if _, stays := packets[name]; !stays {
			delete(h.rules, name)
		}
	}
	for name, n := range packets {
		p := h.rules[name]
		if p == nil {
			p = &past{}
			h.rules[name] = p
		}
		rate := float32(0)
		if n > p.packets { // a counter that ran backwards belongs to a new rule of this name
			rate = float32(float64(n-p.packets) / between.Seconds())
		}
		for i := range steps {
			p.rates[(h.next+i)%historySteps] = rate
		}
		p.packets = n
	}
	h.at, h.next, h.taken = now, (h.next+steps)%historySteps, min(historySteps, h.taken+steps)
}

// begin clears the history and takes a first reading, which yields no rates.
func (h *history) begin(now time.Time, packets map[string]uint64) {
	clear(h.rules)
	h.at, h.taken = time.Time{}, 0
	if len(packets) > historyRules {
		return
	}
	h.at = now
	for name, n := range packets {
		h.rules[name] = &past{packets: n}
	}
}

// tell returns the history for a page.
func (h *history) tell() *pastRates {
	h.mu.Lock()
	defer h.mu.Unlock()
	m := &pastRates{Step: h.step.Seconds(), Taken: h.taken, Rates: make(map[string][]digits, len(h.rules))}
	for name, p := range h.rules {
		var rates []digits
		for i := range h.taken {
			if v := p.rates[(h.next-h.taken+i+historySteps)%historySteps]; v > 0 || rates != nil {
				rates = append(rates, digits(v))
			}
		}
		if rates != nil {
			m.Rates[name] = rates
		}
	}
	return m
}

// run takes readings until the context ends.
func (h *history) run(ctx context.Context, matched func(context.Context) (map[string]uint64, error)) {
	for {
		began := time.Now()
		reading, cancel := context.WithTimeout(ctx, liveTimeout)
		packets, err := matched(reading)
		cancel()
		if err == nil {
			h.add(time.Now(), packets)
		}
		took := time.Since(began)
		pause := max(h.step, min(historyShare*took, historyLeft*h.step)) - took
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}
