// Package streamtest has scenarios of streams with several inputs, which run on the Go twin by
// itself and on the relay program next to it.
package streamtest

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"xdpcast/pkg/packet"
)

// Scenario is a sequence of packets on the legs of one stream.
type Scenario struct {
	Name   string
	Stream packet.Stream
	Run    func(w *World)
}

// World sends packets to a stream, and checks the results.
type World struct {
	testing.TB
	// Send passes a UDP payload to a leg at a time in nanoseconds, and returns whether it passed.
	Send func(leg int, payload []byte, now uint64) bool
	now  uint64
}

// Play runs a scenario, starting long after the clock's zero.
func (s *Scenario) Play(t testing.TB, send func(leg int, payload []byte, now uint64) bool) {
	s.Run(&World{TB: t, Send: send, now: uint64(100 * time.Second)})
}

func (w *World) after(d time.Duration) { w.now += uint64(d) }

func (w *World) send(leg int, payload []byte) int {
	if w.Send(leg, payload, w.now) {
		return 1
	}
	return 0
}

func (w *World) rtp(leg int, number uint32) int { return w.send(leg, RTP(number, 7)) }

func (w *World) want(what string, got, want int) {
	w.Helper()
	if got != want {
		w.Errorf("%s: %d, want %d", what, got, want)
	}
}

func (w *World) atLeast(what string, got, want int) {
	w.Helper()
	if got < want {
		w.Errorf("%s: %d, want at least %d", what, got, want)
	}
}

// RTP is an RTP packet; the upper half of the number is at RFC 4175's position.
func RTP(number, ssrc uint32) []byte {
	p := make([]byte, 60)
	p[0], p[1] = 0x80, 96
	binary.BigEndian.PutUint16(p[2:], uint16(number))
	binary.BigEndian.PutUint32(p[8:], ssrc)
	binary.BigEndian.PutUint16(p[12:], uint16(number>>16))
	return p
}

// RTPExtended is an RTP packet of RFC 4175 with contributing sources and a header extension.
func RTPExtended(number, ssrc uint32, sources, words int) []byte {
	p := make([]byte, 12+4*sources+4+4*words+8)
	p[0], p[1] = 0x90|byte(sources), 96
	binary.BigEndian.PutUint16(p[2:], uint16(number))
	binary.BigEndian.PutUint32(p[8:], ssrc)
	at := 12 + 4*sources
	binary.BigEndian.PutUint16(p[at+2:], uint16(words))
	binary.BigEndian.PutUint16(p[at+4+4*words:], uint16(number>>16))
	return p
}

// Mold is a MoldUDP64 packet.
func Mold(session string, number uint64, count uint16) []byte {
	p := make([]byte, 80)
	copy(p, fmt.Sprintf("%-10s", session))
	binary.BigEndian.PutUint64(p[10:], number)
	binary.BigEndian.PutUint16(p[18:], count)
	return p
}

const (
	ms = time.Millisecond
	s  = time.Second
)

// Streams of the scenarios.
var (
	RTPStream  = packet.Stream{Kind: packet.StreamRTP, Window: 1 << 16, Skew: 50 * ms, Reset: s}
	RFC4175    = packet.Stream{Kind: packet.StreamRFC4175, Window: 1 << 18, Skew: 450 * ms, Reset: s}
	MDP3       = packet.Stream{Kind: packet.StreamField, Width: 4, Little: true, Window: 1 << 16, Skew: 50 * ms, Reset: s}
	Pitch      = packet.Stream{Kind: packet.StreamField, Offset: 4, Width: 4, CountOffset: 2, CountWidth: 1, Little: true, Window: 1 << 16, Skew: 50 * ms, Reset: s}
	MoldUDP64  = packet.Stream{Kind: packet.StreamMoldUDP64, Window: 1 << 16, Skew: 50 * ms, Reset: s}
	Failover   = packet.Stream{Kind: packet.StreamFailover, Silence: 30 * ms}
	FailBack   = packet.Stream{Kind: packet.StreamFailover, Silence: 30 * ms, Back: 2 * s}
	Watched    = packet.Stream{Kind: packet.StreamSingle, Watch: packet.StreamRTP, Clock: 90000}
	PassOther  = packet.Stream{Kind: packet.StreamRTP, Window: 1 << 16, Skew: 50 * ms, Reset: s, PassOther: true}
	Wide       = packet.Stream{Kind: packet.StreamField, Offset: 3, Width: 8, Window: 1 << 16, Skew: 50 * ms, Reset: s}
	FailRTP    = packet.Stream{Kind: packet.StreamFailover, Watch: packet.StreamRTP, Silence: 30 * ms}
	AllStreams = []packet.Stream{RTPStream, RFC4175, MDP3, Pitch, MoldUDP64, Failover, FailBack, Watched, FailRTP}
)

func never(int) bool { return false }

// both sends n numbers on leg 0 and, lag milliseconds later, on leg 1: one a millisecond. It
// returns how many passed.
func (w *World) both(number *uint32, n, lag int, lost0, lost1 func(i int) bool) (passed int) {
	for i := range n + lag {
		w.after(ms)
		if i < n && !lost0(i) {
			passed += w.rtp(0, *number+uint32(i))
		}
		if i >= lag && !lost1(i-lag) {
			passed += w.rtp(1, *number+uint32(i-lag))
		}
	}
	*number += uint32(n)
	return passed
}

// Scenarios returns all of them.
func Scenarios() []Scenario {
	return append(append(numbered(), sessions()...), append(formats(), failovers()...)...)
}

func numbered() []Scenario {
	return []Scenario{
		{"wrap, loss on either leg", RTPStream, func(w *World) {
			number, lost := uint32(65000), 0
			n := w.both(&number, 3000, 20, func(i int) bool { return i%7 == 0 }, func(i int) bool { return i%5 == 1 })
			for i := range 3000 {
				if i%7 == 0 && i%5 == 1 {
					lost++
				}
			}
			w.want("all but those lost on both", n, 3000-lost)
			w.want("two more laps", w.both(&number, 140_000, 20, never, never), 140_000)
		}},
		{"another order and doubles on one leg", RTPStream, func(w *World) {
			n := 0
			for i := uint32(0); i < 3000; i += 3 {
				w.after(ms)
				for _, number := range []uint32{i + 2, i, i + 1, i + 1, i} {
					n += w.rtp(0, number)
				}
			}
			w.want("numbers", n, 3000)
		}},
		{"sender begins again after silence, numbers further back", RTPStream, func(w *World) {
			number := uint32(30000)
			w.both(&number, 2000, 20, never, never)
			w.after(5 * s)
			number = 29000
			w.want("new ones", w.both(&number, 2000, 20, never, never), 2000)
		}},
		{"sender begins again at once, numbers further back, same SSRC", RTPStream, func(w *World) {
			number := uint32(30000)
			w.both(&number, 2000, 20, never, never)
			number = 10000
			w.atLeast("passed again within reset and skew", w.both(&number, 5000, 20, never, never), 5000-1060)
		}},
		{"a leg lags by 2 s, the other dies and comes back", RTPStream, func(w *World) {
			out := map[uint32]int{}
			for i := range uint32(12000) {
				w.after(ms)
				if i < 4000 || i >= 8000 {
					out[i] += w.rtp(0, i)
				}
				if i >= 2000 {
					out[i-2000] += w.rtp(1, i-2000)
				}
			}
			n := 0
			for number, times := range out {
				if times > 1 {
					w.Errorf("number %d passed %d times", number, times)
				}
				n += times
			}
			w.atLeast("numbers", n, 10000)
		}},
		{"both stall for 3 s with 20 copies on their way", RTPStream, func(w *World) {
			n := 0
			for i := range uint32(1000) {
				w.after(ms)
				n += w.rtp(0, i)
				if i >= 20 {
					n += w.rtp(1, i-20)
				}
			}
			w.after(3 * s)
			for i := uint32(980); i < 2000; i++ {
				n += w.rtp(1, i)
			}
			for i := uint32(1000); i < 2000; i++ {
				n += w.rtp(0, i)
			}
			w.want("each once", n, 2000)
		}},
		{"one foreign packet 16,000 ahead", RTPStream, func(w *World) {
			number := uint32(0)
			n := w.both(&number, 500, 20, never, never)
			w.want("the foreign one", w.rtp(0, number+16000), 0)
			w.want("the stream goes on", n+w.both(&number, 5000, 20, never, never), 5500)
		}},
		{"one foreign packet 30,000 ahead", RTPStream, func(w *World) {
			number := uint32(0)
			n := w.both(&number, 500, 20, never, never)
			w.want("the foreign one", w.rtp(0, number+30000), 0)
			w.want("the stream goes on", n+w.both(&number, 5000, 20, never, never), 5500)
		}},
		{"20 foreign packets 16,000 ahead", RTPStream, func(w *World) {
			number := uint32(0)
			n := w.both(&number, 500, 20, never, never)
			for i := range uint32(20) {
				w.rtp(0, number+16000+i)
			}
			w.atLeast("the stream stops for reset at most", n+w.both(&number, 12000, 20, never, never), 12500-1100)
		}},
		{"both lose 5,000 at once, then 900", RTPStream, func(w *World) {
			number := uint32(0)
			n := w.both(&number, 500, 20, never, never)
			number += 5000
			n += w.both(&number, 500, 20, never, never)
			number += 900
			n += w.both(&number, 500, 20, never, never)
			w.want("all: the other leg brings what it takes to confirm", n, 1500)
		}},
		{"random numbers with the right SSRC, one in 10", RTPStream, func(w *World) {
			n, x := 0, uint32(1)
			for i := range uint32(20000) {
				w.after(ms)
				n += w.rtp(0, i)
				if i >= 20 {
					n += w.rtp(1, i-20)
				}
				if i%10 == 0 {
					x = x*1664525 + 1013904223
					w.rtp(1, x>>16)
				}
			}
			w.atLeast("good ones", n, 19800)
		}},
		{"the legs are swapped", RTPStream, func(w *World) {
			n := 0
			for i := range uint32(6000) {
				w.after(ms)
				a, b := 0, 1
				if i/1000%2 == 1 {
					a, b = 1, 0
				}
				n += w.rtp(a, i)
				if i >= 20 {
					n += w.rtp(b, i-20)
				}
			}
			w.want("each once", n, 6000)
		}},
		{"a leg replays the last minute", RTPStream, func(w *World) {
			n := 0
			for i := range uint32(20000) {
				w.after(ms)
				n += w.rtp(0, i)
				n += w.rtp(1, i%3000)
			}
			w.want("each once", n, 20000)
		}},
		{"numbers that go backwards on one leg", RTPStream, func(w *World) {
			n := 0
			for i := range uint32(10000) {
				w.after(ms)
				n += w.rtp(0, i)
				w.rtp(1, 60000-i)
			}
			w.atLeast("the other leg's", n, 9000)
		}},
	}
}

func sessions() []Scenario {
	return []Scenario{
		{"sender begins again at once, new SSRC, numbers within the window", RTPStream, func(w *World) {
			number := uint32(30000)
			w.both(&number, 2000, 20, never, never)
			n, late := 0, 0
			for i := range uint32(3020) {
				w.after(ms)
				if i < 3000 {
					n += w.send(0, RTP(31000+i, 8))
				}
				if i < 20 {
					late += w.send(1, RTP(31980+i, 7))
				} else {
					n += w.send(1, RTP(31000+i-20, 8))
				}
			}
			w.want("the new session, each once", n, 3000)
			w.want("late copies of the old one", late, 0)
		}},
		{"random SSRCs, one in 100", RTPStream, func(w *World) {
			n, x := 0, uint32(1)
			for i := range uint32(20000) {
				w.after(ms)
				n += w.rtp(0, i)
				if i >= 20 {
					n += w.rtp(1, i-20)
				}
				if i%100 == 0 {
					x = x*1664525 + 1013904223
					w.want("garbage", w.send(1, RTP(x>>16, x)), 0)
				}
			}
			w.want("good ones", n, 20000)
		}},
		{"two senders on one leg", RTPStream, func(w *World) {
			n, other := 0, 0
			for i := range uint32(4000) {
				w.after(ms)
				n += w.send(0, RTP(i, 7))
				other += w.send(0, RTP(i, 9))
			}
			w.want("the first sender's", n, 4000)
			w.want("the second's", other, 0)
		}},
		{"a leg has another stream", RTPStream, func(w *World) {
			out := map[uint32]int{}
			n, other := 0, 0
			for i := range uint32(20000) {
				w.after(ms)
				passed := w.send(0, RTP(i, 7))
				out[i] += passed
				n += passed
				other += w.send(1, RTP(40000+i, 9))
			}
			w.atLeast("the stream's: it stops once, for twice the skew", n, 20000-120)
			w.want("the other one's, but for that time", min(other, 120), other)
		}},
		{"the sender begins again 40 times, mostly for few numbers", MoldUDP64, func(w *World) {
			for session := range 40 {
				numbers, n := 10, 0
				if session%32 == 0 {
					numbers = 1500
				}
				for i := range uint64(numbers) {
					w.after(ms)
					n += w.send(0, Mold(fmt.Sprint(session), 1+i, 1)) + w.send(1, Mold(fmt.Sprint(session), 1+i, 1))
				}
				w.want(fmt.Sprintf("session %d, each number once", session), n, numbers)
				w.after(5 * s)
			}
		}},
		{"a leg whose encoder begins again every 100 packets", RTPStream, func(w *World) {
			n := 0
			for i := range uint32(20000) {
				w.after(ms)
				n += w.send(0, RTP(i, 7))
				w.send(1, RTP(i*31, 100+i/100))
			}
			w.atLeast("the other leg's", n, 20000-300)
		}},
		{"the stream returns to the session before, each number once", RTPStream, func(w *World) {
			out := map[uint32]int{}
			for i := range uint32(3000) {
				w.after(ms)
				if i < 1000 || i >= 1500 {
					out[i] += w.send(0, RTP(i, 7))
				}
				if i >= 20 && i < 1020 {
					out[i-20] += w.send(1, RTP(i-20, 7))
				}
				if i >= 1000 && i < 1500 {
					w.send(0, RTP(i*3, 8))
				}
			}
			for number, times := range out {
				if times > 1 {
					w.Errorf("number %d passed %d times", number, times)
				}
			}
		}},
	}
}

func formats() []Scenario {
	return []Scenario{
		{"MDP 3.0, weekly reset to 1", MDP3, func(w *World) {
			number := func(n uint32) []byte { return binary.LittleEndian.AppendUint32(nil, n) }
			n := 0
			for i := range uint32(5000) {
				w.after(ms)
				n += w.send(0, number(5_000_000+i)) + w.send(1, number(5_000_000+i))
			}
			w.want("each once", n, 5000)
			w.after(time.Hour)
			n = 0
			for i := range uint32(5000) {
				w.after(ms)
				n += w.send(0, number(1+i)) + w.send(1, number(1+i))
			}
			w.want("after the reset", n, 5000)
			w.want("three bytes are too short", w.send(0, []byte{1, 2, 3}), 0)
		}},
		{"a 32-bit counter at its end", MDP3, func(w *World) {
			n := 0
			for i := range uint32(5000) {
				w.after(ms)
				b := binary.LittleEndian.AppendUint32(nil, 0xffffff00+i)
				n += w.send(0, b) + w.send(1, b)
			}
			w.want("each once", n, 5000)
		}},
		{"an 8-byte counter beyond 32 bits", Wide, func(w *World) {
			n := 0
			for i := range uint64(5000) {
				w.after(ms)
				b := binary.BigEndian.AppendUint64([]byte("ABC"), 0xffff_ff00+i)
				n += w.send(0, b) + w.send(1, b)
			}
			w.want("each once", n, 5000)
		}},
		{"a heartbeat is what a leg brings first in each tick", MoldUDP64, func(w *World) {
			n := 0
			for i := range uint64(500) {
				w.after(ms)
				w.want("heartbeat", w.send(0, Mold("S1", 1+2*i, 0)), 1)
				n += w.send(0, Mold("S1", 1+2*i, 1)) + w.send(0, Mold("S1", 2+2*i, 1))
			}
			w.want("each once", n, 1000)
		}},
		{"MoldUDP64 numbers beyond 32 bits", MoldUDP64, func(w *World) {
			n := 0
			for i := range uint64(5000) {
				w.after(ms)
				n += w.send(0, Mold("S1", 0xffff_ff00+3*i, 3)) + w.send(1, Mold("S1", 0xffff_ff00+3*i, 3))
			}
			w.want("each once", n, 5000)
		}},
		{"packets without a number, which the rule relays", PassOther, func(w *World) {
			n, others := 0, 0
			for i := range uint32(3000) {
				w.after(ms)
				n += w.rtp(0, i) + w.rtp(1, i)
				others += w.send(0, RTP(i, 7)[:11]) + w.send(1, []byte("HELLO, NO RTP AT ALL"))
			}
			w.want("numbers, each once", n, 3000)
			w.want("others of both legs", others, 2*3000)
		}},
		{"PITCH, units that take several numbers, heartbeats", Pitch, func(w *World) {
			n, beats, number := 0, 0, uint32(1)
			unit := func(count byte) []byte {
				return binary.LittleEndian.AppendUint32([]byte{40, 0, count, 1}, number)
			}
			for i := range 5000 {
				w.after(ms)
				if i%4 == 0 {
					beats += w.send(0, unit(0)) + w.send(1, unit(0))
				}
				count := byte(1 + i%20)
				n += w.send(i&1, unit(count)) + w.send(1-i&1, unit(count))
				number += uint32(count)
			}
			w.want("units each once", n, 5000)
			w.want("heartbeats of both legs", beats, 2*1250)
		}},
		{"MoldUDP64, heartbeats carry the next number", MoldUDP64, func(w *World) {
			n, beats, number := 0, 0, uint64(1)
			for i := range 5000 {
				w.after(ms)
				if i%3 == 0 {
					beats += w.send(0, Mold("S1", number, 0)) + w.send(1, Mold("S1", number, 0))
				}
				count := uint16(1 + i%7)
				n += w.send(i&1, Mold("S1", number, count)) + w.send(1-i&1, Mold("S1", number, count))
				number += uint64(count)
			}
			w.want("data each once", n, 5000)
			w.want("heartbeats of both legs", beats, 2*1667)
			n = 0
			for i := range uint64(1000) {
				w.after(ms)
				n += w.send(0, Mold("S2", 1+i, 1)) + w.send(1, Mold("S2", 1+i, 1))
			}
			w.want("a new session, but for what confirms it", n, 1000-3)
		}},
		{"RFC 4175, 250,000 pps, 450 ms behind", RFC4175, func(w *World) {
			n, lost := 0, 0
			for i := range uint32(300_000) {
				if i%250 == 0 {
					w.after(ms)
				}
				if i%50 != 0 {
					n += w.rtp(0, i)
				} else if i < 300_000-112_500 {
					lost++
				}
				if i >= 112_500 {
					n += w.rtp(1, i-112_500)
				}
			}
			w.want("one leg's, and what it lost from the other", n, 300_000-6000+lost)
		}},
		{"RFC 4175 behind sources and a header extension", RFC4175, func(w *World) {
			n := 0
			for i := range uint32(200_000) {
				if i%100 == 0 {
					w.after(ms)
				}
				p := RTPExtended(i, 7, int(i%16), int(i%20))
				n += w.send(0, p) + w.send(1, p)
			}
			w.want("each once", n, 200_000)
			p := RTPExtended(200_000, 7, 15, 20)
			w.want("an extension beyond the packet", w.send(0, p[:100]), 0)
		}},
		{"SRTP: an encrypted payload with a tag behind a clear header", RTPStream, func(w *World) {
			// RFC 3711 section 3.1: the header, sources and extension included, stays clear. SRTCP has its
			// first 8 bytes clear, and the index of a packet behind.
			key, err := aes.NewCipher([]byte("0123456789abcdef"))
			if err != nil {
				w.Fatal(err)
			}
			n, control := 0, 0
			for i := range uint32(70_000) {
				w.after(ms)
				p := RTPExtended(i, 0xdeadbeef, int(i%3), 2)
				clear := 12 + 4*int(i%3) + 4 + 4*2
				p = append(p, make([]byte, 160)...)
				iv := make([]byte, key.BlockSize())
				binary.BigEndian.PutUint32(iv, i)
				cipher.NewCTR(key, iv).XORKeyStream(p[clear:], p[clear:]) // and the last 10 bytes stand for the tag
				if i%20 != 0 {
					n += w.send(0, p)
				}
				if i%20 != 10 {
					n += w.send(1, p)
				}
				if i%500 == 0 {
					c := make([]byte, 46)
					c[0], c[1] = 0x80, 200
					cipher.NewCTR(key, iv).XORKeyStream(c[8:], c[8:])
					control += w.send(0, c)
				}
			}
			w.want("media, each once", n, 70_000)
			w.want("SRTCP", control, 140)
		}},
		{"RTCP on the port", RTPStream, func(w *World) {
			n, control := 0, 0
			for i := range uint32(4000) {
				w.after(ms)
				if i%100 == 0 {
					p := RTP(6, 7)
					p[1] = 200
					control += w.send(0, p)
				}
				n += w.rtp(0, i) + w.rtp(1, i)
			}
			w.want("media", n, 4000)
			w.want("RTCP", control, 40)
			w.want("no RTP", w.send(0, make([]byte, 60)), 0)
			w.want("too short", w.send(0, RTP(4001, 7)[:11]), 0)
		}},
	}
}

func failovers() []Scenario {
	return []Scenario{
		{"failover, back after 2 s", FailBack, func(w *World) {
			gap, last, back := uint64(0), uint64(0), 0
			for i := range 10000 {
				w.after(ms)
				a := 0
				if i < 3000 || i >= 5000 {
					a = w.rtp(0, uint32(i))
				}
				b := w.rtp(1, uint32(i))
				if a+b > 1 {
					w.Errorf("both legs out at %d", i)
				}
				if a+b > 0 {
					if last != 0 {
						gap = max(gap, w.now-last)
					}
					last = w.now
				}
				if i >= 5000 && a == 1 && back == 0 {
					back = i
				}
			}
			w.want("longest gap in ms", int(gap/uint64(ms)), 31)
			w.want("back at", back, 7000)
		}},
		{"failover, an input that repeats what it sent", Failover, func(w *World) {
			n := 0
			for i := range uint32(3000) {
				w.after(ms)
				n += w.rtp(0, i%100) + w.rtp(1, i)
			}
			w.want("the first leg's alone: numbers decide nothing", n, 3000)
		}},
		{"failover, never back", Failover, func(w *World) {
			a, b := 0, 0
			for i := range uint32(9000) {
				w.after(ms)
				if i < 1000 || i >= 2000 {
					a += w.rtp(0, i)
				}
				if i < 6000 {
					b += w.rtp(1, i)
				}
			}
			w.want("the first leg's", a, 1000+3000-30)
			w.want("the second's", b, 5000-30)
		}},
		{"failover, the worse leg is heard first", Failover, func(w *World) {
			a := 0
			for i := range uint32(1000) {
				w.after(ms)
				w.rtp(1, i)
				if i >= 10 {
					a += w.rtp(0, i)
				}
			}
			w.want("the better leg's", a, 990)
		}},
		{"failover, a leg that flaps", FailBack, func(w *World) {
			n := 0
			for i := range uint32(60000) {
				w.after(ms)
				if i/500%2 == 0 { // up for half a second: never long enough to return to
					n += w.rtp(0, i)
				}
				n += w.rtp(1, i)
			}
			w.want("all but the one change", n, 60000-30)
		}},
	}
}
