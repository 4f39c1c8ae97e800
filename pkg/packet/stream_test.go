package packet_test

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"
	"time"

	"xdpcast/internal/streamtest"
	"xdpcast/pkg/packet"
)

// A leg that brings other packets with the numbers of the stream is found, also when it brings shorter
// ones, and until it brings the right ones again.
func TestStreamLegsDiffer(t *testing.T) {
	for name, change := range map[string]func(p []byte) []byte{
		"content":      func(p []byte) []byte { p[40]++; return p },
		"length":       func(p []byte) []byte { return p[:len(p)-1] },
		"a short tail": func(p []byte) []byte { return p[:14] },
	} {
		state := packet.NewStreamState(streamtest.RTPStream)
		now := uint64(100e9)
		for i := range uint32(30_000) {
			now += 1e6
			p := streamtest.RTP(i, 7)
			state.Packet(0, p, len(p), now, now)
			if i >= 10_000 && i < 20_000 {
				p = change(p)
			}
			state.Packet(1, p, len(p), now, now)
			switch {
			case (i == 9_999 || i == 29_999) && state.Differs[1] != 0, i == 9_999 && state.Differ[1] != 0:
				t.Errorf("%s: at %d the legs differ %d times", name, i, state.Differ[1])
			case i == 19_999 && (state.Differs[1] == 0 || state.Differ[1] < 100 || state.Differ[1] > 220):
				t.Errorf("%s: at %d the legs differ %d times, want about 10,000/64", name, i, state.Differ[1])
			}
		}
		if state.Differ[0] != 0 {
			t.Errorf("%s: the first leg differs from itself %d times", name, state.Differ[0])
		}
	}
}

// What happens to streams, by the twin alone; package loader runs the program beside it.
func TestStreamScenarios(t *testing.T) {
	for _, s := range streamtest.Scenarios() {
		t.Run(s.Name, func(t *testing.T) {
			state := packet.NewStreamState(s.Stream)
			s.Play(t, func(leg int, payload []byte, now uint64) bool {
				return state.Packet(leg, payload, len(payload), now, now) == packet.StreamPassed
			})
		})
	}
}

// player gives a stream packets by a precise clock, which a coarse one of 4 ms goes beside.
type player struct {
	*packet.StreamState
	at uint64
}

func newPlayer(s packet.Stream) *player { return &player{packet.NewStreamState(s), uint64(time.Hour)} }

func (p *player) send(leg int, payload []byte, at time.Duration) packet.StreamVerdict {
	precise := p.at + uint64(at)
	return p.Packet(leg, payload, len(payload), precise/4e6*4e6, precise)
}

// Jitter is that of RFC 3550 where the clock of the timestamps is known, else that of the gaps.
func TestStreamJitter(t *testing.T) {
	const period = 20 * time.Millisecond
	rtp := func(payloadType byte, number, timestamp uint32) []byte {
		p := streamtest.RTP(number, 7)
		p[1] = payloadType
		binary.BigEndian.PutUint32(p[4:], timestamp)
		return p
	}
	watched := func(clock uint32) packet.Stream {
		return packet.Stream{Kind: packet.StreamSingle, Watch: packet.StreamRTP, Clock: clock}
	}
	for name, tt := range map[string]struct {
		stream  packet.Stream
		period  time.Duration
		payload func(i uint32) []byte
		late    func(i int) time.Duration // of a packet; every other by 1 ms unless set
		want    time.Duration
	}{
		"a clock that is told":          {watched(48000), period, func(i uint32) []byte { return rtp(97, i, i*960) }, nil, time.Millisecond},
		"a static payload type":         {watched(0), period, func(i uint32) []byte { return rtp(33, i, i*1800) }, nil, time.Millisecond},
		"the marker is no payload type": {watched(0), period, func(i uint32) []byte { return rtp(0x80|33, i, i*1800) }, nil, time.Millisecond},
		"8000 a second":                 {watched(0), period, func(i uint32) []byte { return rtp(8, i, i*160) }, nil, time.Millisecond},
		"RFC 4175":                      {packet.Stream{Kind: packet.StreamSingle, Watch: packet.StreamRFC4175}, period, func(i uint32) []byte { return rtp(96, i, i*1800) }, nil, time.Millisecond},
		"timestamps at their end":       {watched(90000), period, func(i uint32) []byte { return rtp(96, i, i*1800-100_000) }, nil, time.Millisecond},
		"timestamps that go back":       {watched(90000), period, func(i uint32) []byte { return rtp(96, i, 1<<31+i*1800-(i%2)*3600) }, func(int) time.Duration { return 0 }, 2 * period},
		"no clock":                      {watched(0), period, func(i uint32) []byte { return rtp(96, i, i*1800) }, nil, time.Millisecond},
		"no timestamps":                 {packet.Stream{Kind: packet.StreamSingle, Watch: packet.StreamMoldUDP64}, period, func(i uint32) []byte { return streamtest.Mold("s", uint64(i), 1) }, nil, time.Millisecond},
		"legs that are merged":          {streamtest.RTPStream, period, func(i uint32) []byte { return rtp(33, i, i*1800) }, nil, time.Millisecond},
		"a pause of ten seconds": {watched(0), period, func(i uint32) []byte { return rtp(96, i, 0) }, func(i int) time.Duration {
			return time.Duration(i/300)*10*time.Second + time.Duration(i%2)*time.Millisecond
		}, time.Millisecond},
		"a million a second":                {watched(90_000_000), time.Microsecond, func(i uint32) []byte { return rtp(96, i, i*90) }, func(i int) time.Duration { return time.Duration(i%2) * 200 * time.Nanosecond }, 200 * time.Nanosecond},
		"steady":                            {watched(90000), period, func(i uint32) []byte { return rtp(96, i, i*1800) }, func(int) time.Duration { return 0 }, 0},
		"steady, half of it lost, no clock": {watched(0), period, func(i uint32) []byte { return rtp(96, i/2*4+i%2, 0) }, func(i int) time.Duration { return time.Duration(i/2) * 2 * period }, 0},
	} {
		p := newPlayer(tt.stream)
		n := int(10 * time.Second / tt.period)
		for i := range min(n, 200_000) {
			late := time.Duration(i%2) * time.Millisecond
			if tt.late != nil {
				late = tt.late(i)
			}
			p.send(0, tt.payload(uint32(i)), time.Duration(i)*tt.period+late)
		}
		got := time.Duration(p.Legs[0].Jitter >> 4)
		if off := max(got-tt.want, tt.want-got); off > tt.want/20+20*time.Microsecond && !(tt.want == 0 && off == 0) || tt.want < 10*time.Microsecond && off > tt.want/5 {
			t.Errorf("%s: jitter %v, want %v", name, got, tt.want)
		}
	}
}

// A leg's lag is told in time, also when the legs are further apart than samples are.
func TestStreamLag(t *testing.T) {
	for _, lag := range []time.Duration{0, 300 * time.Microsecond, 30 * time.Millisecond, 400 * time.Millisecond} {
		settings := streamtest.RFC4175
		p := newPlayer(settings)
		const period = 10 * time.Microsecond
		n := int(6 * time.Second / period)
		for i := range n + int(lag/period) {
			at := time.Duration(i) * period
			if i < n {
				p.send(0, streamtest.RTP(uint32(i), 7), at)
			}
			if j := i - int(lag/period); j >= 0 {
				p.send(1, streamtest.RTP(uint32(j), 7), at+time.Microsecond)
			}
		}
		first, second := time.Duration(p.Legs[0].Lag>>3), time.Duration(p.Legs[1].Lag>>3)
		if want := lag + time.Microsecond; first != 0 || second < want-want/3 || second > want+want/50 {
			t.Errorf("legs %v apart lag by %v and %v", lag, first, second)
		}
	}
}

// Numbers that no leg brings are counted once they are older than the skew, those that are still to
// come are not, and what came twice or began again does not spoil the count.
func TestStreamLost(t *testing.T) {
	for _, settings := range []packet.Stream{streamtest.RTPStream, streamtest.RFC4175, streamtest.MoldUDP64} {
		d := rand.New(rand.NewPCG(1, 2))
		p := newPlayer(settings)
		const n, lag = 200_000, 40
		numbers := uint32(2)
		if settings.Kind != packet.StreamMoldUDP64 {
			numbers = 1
		}
		payload := func(i int) []byte {
			if numbers == 2 {
				return streamtest.Mold("s", uint64(i)*2, 2)
			}
			return streamtest.RTP(uint32(i), 7)
		}
		var sent [n]bool
		lost, highest := uint64(0), uint64(0)
		for i := range n + lag {
			at := time.Duration(i) * time.Millisecond
			if i < n && (i < 10 || i > n-2000 || d.IntN(20) > 0) {
				p.send(0, payload(i), at)
				sent[i] = true
			}
			if j := i - lag; j >= 0 && (j < 10 || j > n-2000 || d.IntN(20) > 0) {
				p.send(1, payload(j), at)
				sent[j] = true
			}
			if j := i - 3*int(settings.Skew/time.Millisecond); j >= 0 && j < n && !sent[j] {
				lost += uint64(numbers)
			}
			if p.Lost > lost+50 {
				highest = max(highest, p.Lost-lost)
			}
		}
		if highest > 0 {
			t.Errorf("%v: as many as %d numbers counted as lost that came", settings.Kind, highest)
		}
		if p.Lost != lost || lost < n/1000 {
			t.Errorf("%v: %d numbers lost, want %d", settings.Kind, p.Lost, lost)
		}
	}
}

// The longest gap of a failover is its silence, one packet interval and a tick of the clock; the way
// back to a better leg has none, and a leg that flaps makes none beyond the first.
func TestFailoverGaps(t *testing.T) {
	const tick = 4 * time.Millisecond
	for _, rate := range []int{1000, 100_000} {
		period := time.Second / time.Duration(rate)
		for _, silence := range []time.Duration{10 * time.Millisecond, 30 * time.Millisecond, 100 * time.Millisecond} {
			for name, up := range map[string]func(at time.Duration) bool{
				"dies":           func(at time.Duration) bool { return at < 700*time.Millisecond },
				"comes back":     func(at time.Duration) bool { return at < 700*time.Millisecond || at > 1500*time.Millisecond },
				"flaps":          func(at time.Duration) bool { return at/(170*time.Millisecond)%2 == 0 },
				"stalls shortly": func(at time.Duration) bool { return at%(200*time.Millisecond) > silence/2 },
			} {
				p := newPlayer(packet.Stream{Kind: packet.StreamFailover, Silence: silence, Back: 500 * time.Millisecond})
				var longest, last time.Duration
				var relayed [2]int
				for i := range 4 * rate {
					at := time.Duration(i) * period
					n := 0
					for leg := range 2 {
						if leg == 0 && !up(at) {
							continue
						}
						if p.send(leg, streamtest.RTP(uint32(i), 7), at) == packet.StreamPassed {
							relayed[leg]++
							n++
						}
					}
					if n > 1 {
						t.Fatalf("%s: both legs are relayed at %v", name, at)
					}
					if n == 1 {
						longest, last = max(longest, at-last), at
					}
				}
				switched := int(p.Restarts) - 1
				wantSwitched := map[string]int{"dies": 1, "comes back": 2, "flaps": 1, "stalls shortly": 1}[name] // the second is heard first
				if longest > silence+period+tick || switched != wantSwitched || name == "comes back" && relayed[0] < 2*rate {
					t.Errorf("%d a second, silence %v, a leg %s: longest gap %v, %d changes, want %d; relayed %v", rate, silence, name, longest, switched, wantSwitched, relayed)
				}
				t.Logf("%d a second, silence %v, a leg %s: longest gap %v, %d changes", rate, silence, name, longest, switched)
			}
		}
	}
}
