package traffic

import (
	"strings"
	"testing"
	"time"
)

func TestParseRate(t *testing.T) {
	for in, want := range map[string]Rate{
		"max": {}, "0": {}, "0bit": {},
		"1": {Value: 1}, "0.5": {Value: 0.5}, "100k": {Value: 100e3}, "1.5M": {Value: 1.5e6}, "2G": {Value: 2e9},
		"20Mbit": {Value: 20e6, Bits: true}, "2.5Gbit": {Value: 2.5e9, Bits: true}, "800bit": {Value: 800, Bits: true}, "64kbit": {Value: 64e3, Bits: true},
	} {
		got, err := ParseRate(in)
		if got != want || err != nil {
			t.Errorf("%q: got %+v, %v, want %+v", in, got, err, want)
		}
		if again, err := ParseRate(got.String()); again != got || err != nil {
			t.Errorf("%q formats as %q, which reads as %+v, %v", in, got, again, err)
		}
	}
	const message = `rate "x": must be packets a second such as 100k or 1.5M, bits a second such as 20Mbit or 2.5Gbit, or "max"`
	if _, err := ParseRate("x"); err == nil || err.Error() != message {
		t.Errorf("got %v, want %s", err, message)
	}
	for _, in := range []string{"", "bit", "k", "kbit", ".", "-1", "+1", "1e3", "0x10", "inf", "nan", "1_000", "1kk", "1 k", "1K", "20Mbits", "1.2.3", "9999G", "99999999999999999999"} {
		if got, err := ParseRate(in); err == nil || got != (Rate{}) {
			t.Errorf("%q was read as %+v, %v", in, got, err)
		}
	}
}

// FuzzParseRate: an error xor a rate, which formats as something that reads
// the same.
func FuzzParseRate(f *testing.F) {
	for _, s := range []string{"max", "1.5M", "20Mbit", "0.000001", "1e5", "-0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseRate(s)
		if err != nil {
			if r != (Rate{}) {
				t.Fatalf("%q: %+v with error %v", s, r, err)
			}
			return
		}
		again, err := ParseRate(r.String())
		if err != nil || again.Bits != r.Bits || again.Value < r.Value*0.999999 || again.Value > r.Value*1.000001 {
			t.Fatalf("%q is %+v, formats as %q, which reads as %+v, %v", s, r, r, again, err)
		}
	})
}

func TestRateInPackets(t *testing.T) {
	if got := (Rate{Value: 8e6, Bits: true}).packets(1000); got != 1000 {
		t.Errorf("8 Mbit/s in 1000 bytes: got %g packets/s, want 1000", got)
	}
	if got := (Rate{Value: 5}).packets(1000); got != 5 {
		t.Errorf("got %g, want 5", got)
	}
}

func TestPacerHoldsTheMean(t *testing.T) {
	for _, rate := range []float64{0.5, 3, 999.7, 100e3, 1e6 / 3, 14.88e6} {
		p := pacer{perSecond: rate}
		if got := p.due(0); got != 1 {
			t.Errorf("rate %g: %d due at the start, want 1", rate, got)
		}
		for _, n := range []uint64{1, 2, 1000, 123_456_789} {
			at := p.at(n)
			if got := p.due(at); got < n+1 || got > n+1+uint64(rate/1e9) {
				t.Errorf("rate %g: %d due at %s, want %d", rate, got, at, n+1)
			}
			// Half a step before, it is not due.
			if got := p.due(at - time.Duration(0.5e9/rate)); got > n {
				t.Errorf("rate %g: %d due half a step before packet %d", rate, got, n)
			}
		}
		// However often one asks, nothing adds up.
		var sent uint64
		for elapsed := time.Duration(0); elapsed < 10*time.Second; elapsed += 7_000_013 {
			sent = max(sent, p.due(elapsed))
		}
		if want := 10 * rate; float64(sent) > want+1 || float64(sent) < want-rate*0.0071-1 {
			t.Errorf("rate %g: %d in 10 s", rate, sent)
		}
	}
}

func TestPacerWithoutLimit(t *testing.T) {
	var p pacer
	p.limitLag(5, time.Hour)
	if p.due(0) < 1<<62 || p.at(1e9) != 0 || p.shift != 0 {
		t.Errorf("due %d, at %s, shift %s", p.due(0), p.at(1e9), p.shift)
	}
}

func TestPacerGivesUpOldSchedule(t *testing.T) {
	p := pacer{perSecond: 1000, maxLag: time.Second}
	p.limitLag(1000, 1900*time.Millisecond)
	if p.shift != 0 {
		t.Fatalf("lag of 0.9 s moved the schedule by %s", p.shift)
	}
	p.limitLag(1000, time.Minute)
	if p.shift != 59*time.Second {
		t.Fatalf("schedule moved by %s, want 59s", p.shift)
	}
	if got := p.due(time.Minute); got != 1001 {
		t.Errorf("%d due, want 1001", got)
	}
}

// What a pacer has due at once after it was held up is bounded by its lag.
func TestPacerCatchesUpOnLittle(t *testing.T) {
	p := pacer{perSecond: 4000, maxLag: 10 * time.Millisecond}
	sent, most := uint64(0), uint64(0)
	for elapsed := time.Duration(0); elapsed < 10*time.Second; elapsed += 300 * time.Millisecond {
		p.limitLag(sent, elapsed)
		most = max(most, p.due(elapsed)-sent)
		sent = p.due(elapsed)
	}
	if most > 41 {
		t.Errorf("%d packets were due at once, want at most 40 and the one that is due", most)
	}
}

func TestPacerUntil(t *testing.T) {
	for _, c := range []struct {
		rate float64
		d    time.Duration
		want uint64
	}{{1000, time.Second, 1000}, {1, 1500 * time.Millisecond, 2}, {0.1, time.Second, 1}, {1e6 / 3, 3 * time.Second, 1e6}} {
		p := pacer{perSecond: c.rate}
		if got, ok := p.until(c.d); got != c.want || !ok {
			t.Errorf("%g/s for %s: got %d, want %d", c.rate, c.d, got, c.want)
		}
	}
	p := pacer{perSecond: 1e-12}
	if p.at(1<<40) <= 0 {
		t.Errorf("overflow: %s", p.at(1<<40))
	}
}

// The packets of a burst are sent when the last of them is due, and the last burst may be shorter.
func TestBurst(t *testing.T) {
	s := Sender{cfg: SendConfig{Burst: 10}, started: time.Now(), limit: 25, pacer: pacer{perSecond: 1000}, legs: []*leg{{}}}
	for next, want := range map[uint64]time.Duration{0: 9, 3: 12, 10: 19, 20: 24, 24: 24} {
		s.legs[0].next = next
		if got := s.soonest(); got != want*time.Millisecond {
			t.Errorf("packet %d is sent after %v, want %d ms", next, got, want)
		}
	}
	for _, burst := range []int{-1, maxBatch + 1} {
		if err := (SendConfig{Burst: burst}).Check(); err == nil || !strings.Contains(err.Error(), "burst") {
			t.Errorf("burst %d: %v", burst, err)
		}
	}
}
