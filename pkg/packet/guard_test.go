package packet

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"xdpcast/internal/labtest"
)

// guardLab is a guard with a clock, and what it was asked.
type guardLab struct {
	t     *testing.T
	guard Guard
	at    int64
	cut   int
	// twoWay is of all rules.
	twoWay bool
}

func newGuardLab(t *testing.T) *guardLab {
	return &guardLab{t: t, guard: Guard{Secret: 77}, at: int64(time.Hour)}
}

// from builds a datagram of a sender, by number.
func from(sender int, payload string, change ...func(*Frame)) []byte {
	f := Frame{
		SrcMAC: [6]byte{2, 0, 0, 0, byte(sender >> 8), byte(sender)}, Src: netip.AddrFrom4([4]byte{192, 0, 2, byte(sender)}),
		Dst: netip.MustParseAddr("239.1.1.1"), DstMAC: [6]byte{1, 0, 0x5e, 1, 1, 1}, SrcPort: 4000, DstPort: 5000, TTL: 9,
		Payload: []byte(payload),
	}
	for _, c := range change {
		c(&f)
	}
	return f.Build()
}

// take gives the guard a frame for a rule, and says whether it is relayed.
func (l *guardLab) take(rule uint32, frame []byte) bool {
	l.t.Helper()
	h, ok := Parse(frame)
	if !ok {
		l.t.Fatalf("frame %x does not parse", frame)
	}
	verdict, mark := l.guard.Returned(frame, &h, GuardPacket{Rule: rule, Index: 3, Outputs: 1, Ethernet: true, TwoWay: l.twoWay, At: l.at})
	if verdict == GuardCut {
		l.cut++
		return false
	}
	mark.Apply(frame, h.L3, h.Dst.Is4())
	if ip, udp := Checksums(frame, &h); !ip || !udp {
		l.t.Fatalf("checksums of %x: %v %v", frame, ip, udp)
	}
	return true
}

func (l *guardLab) wait(d time.Duration) { l.at += int64(d) }

// loops says whether a rule is looping.
func (l *guardLab) loops(rule uint32) bool {
	for _, r := range l.guard.Loops(l.at) {
		if r.Rule == rule && l.at-r.Last < int64(GuardHeal) {
			return true
		}
	}
	return false
}

// Senders that repeat themselves, and several of one content, are never taken for a loop,
// whatever they send by a rule whose circle is not meant.
func TestGuardLeavesSendersAlone(t *testing.T) {
	null := "G\x1f\xff\x10" + string(bytes.Repeat([]byte{0xff}, 184))
	for _, c := range []struct {
		name string
		run  func(l *guardLab)
		// plain is what numbers do not tell from a loop.
		plain bool
	}{
		{name: "a sender that takes over from another", plain: true, run: func(l *guardLab) {
			l.take(1, from(1, null))
			for range 20_000 {
				l.wait(time.Millisecond)
				l.take(1, from(2, null))
			}
		}},
		{name: "null packets of many streams, in bursts", plain: true, run: func(l *guardLab) {
			random := rand.New(rand.NewPCG(3, 3))
			for range 5000 {
				sender := 1 + random.IntN(5)
				for range 1 + random.IntN(200) {
					l.take(uint32(sender), from(sender, null))
				}
				l.wait(time.Duration(random.IntN(2000)) * time.Millisecond)
			}
		}},
		{name: "blocks of one sender after the other's", plain: true, run: func(l *guardLab) {
			for i := range 2000 {
				for sender := 1; sender <= 3; sender++ {
					for range 1 + (i+sender)%3*60 {
						l.take(uint32(sender), from(sender, "alive"))
					}
				}
				l.wait(3 * time.Millisecond)
			}
		}},
		{name: "a capture that is sent again and again, by three", plain: true, run: func(l *guardLab) {
			frames := [][]byte{}
			for i := range 20 {
				b := from(1, fmt.Sprint("packet ", i))
				binary.BigEndian.PutUint16(b[18:], uint16(7*i))
				h, _ := Parse(b)
				FillChecksums(b, &h)
				frames = append(frames, b)
			}
			for range 2000 {
				for sender := range 3 {
					for _, f := range frames {
						f = bytes.Clone(f)
						f[11] = byte(sender)
						l.take(1, f)
					}
				}
				l.wait(time.Millisecond)
			}
		}},
		{name: "null packets of a transport stream", run: func(l *guardLab) {
			for range 50_000 {
				l.take(1, from(1, null))
				l.wait(time.Millisecond)
			}
		}},
		{name: "null packets with a counting identification", run: func(l *guardLab) {
			for i := range labtest.Soak(140_000, 1_000_000) { // twice and more through the identifications
				b := from(1, null)
				binary.BigEndian.PutUint16(b[18:], uint16(i))
				h, _ := Parse(b)
				FillChecksums(b, &h)
				l.take(1, b)
				l.wait(100 * time.Microsecond)
			}
		}},
		{name: "null packets with one identification", run: func(l *guardLab) {
			for id := range 50 {
				l.wait(time.Second)
				for range 2000 {
					b := from(1, null)
					binary.BigEndian.PutUint16(b[18:], uint16(id*1311))
					h, _ := Parse(b)
					FillChecksums(b, &h)
					l.take(1, b)
				}
			}
		}},
		{name: "keepalives of two senders", run: func(l *guardLab) {
			for range 5000 {
				l.take(1, from(1, "alive"))
				l.take(1, from(2, "alive"))
				l.wait(100 * time.Millisecond)
			}
		}},
		{name: "keepalives, the faster sender first", run: func(l *guardLab) {
			l.take(1, from(1, "alive"))
			l.wait(300 * time.Millisecond)
			for i := range 20_000 {
				l.take(1, from(1, "alive"))
				if i%100 == 50 {
					l.take(1, from(2, "alive"))
				}
				l.wait(time.Millisecond)
			}
		}},
		{name: "keepalives, ten times as many of one, from the beginning", run: func(l *guardLab) {
			for i := range 2000 {
				l.take(1, from(1+i%10/9, "alive"))
				l.wait(time.Second / 11)
				if i%10 == 9 {
					l.wait(time.Duration(i%97) * time.Millisecond)
				}
			}
		}},
		{name: "keepalives seldom", run: func(l *guardLab) {
			for i := range 2000 {
				l.take(1, from(1+i%20/19, "alive"))
				l.wait(time.Second)
			}
		}},
		{name: "two legs of one stream", run: func(l *guardLab) {
			for i := range 20_000 {
				l.take(1, from(1, fmt.Sprint("packet ", i)))
				l.take(1+uint32(i%2), from(2, fmt.Sprint("packet ", i)))
				l.wait(time.Millisecond)
			}
		}},
		{name: "two legs, the second late, with retransmissions", run: func(l *guardLab) {
			for i := range 20_000 {
				l.take(1, from(1, fmt.Sprint("packet ", i)))
				if i < 60 {
					continue
				}
				l.take(2, from(2, fmt.Sprint("packet ", i-50)))
				if i%10 == 0 {
					for range 3 {
						l.take(2, from(2, fmt.Sprint("packet ", i-60)))
					}
				}
				l.wait(time.Millisecond)
			}
		}},
		{name: "a sender that moves between two MAC addresses", run: func(l *guardLab) {
			for i := range 20_000 {
				l.take(1, from(1, fmt.Sprint("packet ", i), func(f *Frame) { f.SrcMAC[1] = byte(i % 2) }))
				l.wait(time.Millisecond)
			}
		}},
		{name: "a search of fifty hosts at once, three times each", run: func(l *guardLab) {
			for range 20 {
				for i := range 150 {
					l.take(1, from(1+i%50, "M-SEARCH", func(f *Frame) { f.SrcPort = uint16(4000 + i) }))
					l.wait(time.Millisecond)
				}
				l.wait(5 * time.Second)
			}
		}},
		{name: "without checksums, alike at the beginning", run: func(l *guardLab) {
			for i := range 20_000 {
				l.take(1, from(1+i%2, fmt.Sprintf("a long beginning that is always the same %08d", i), func(f *Frame) { f.NoChecksum = true }))
				l.wait(time.Millisecond)
			}
		}},
		{name: "empty datagrams of many ports", run: func(l *guardLab) {
			for i := range 20_000 {
				l.take(1, from(1+i%3/2, "", func(f *Frame) { f.SrcPort = uint16(i) }))
				l.wait(time.Millisecond)
			}
		}},
	} {
		for _, twoWay := range []bool{false, true} {
			if twoWay && c.plain {
				continue
			}
			t.Run(fmt.Sprintf("%s, two ways %v", c.name, twoWay), func(t *testing.T) {
				l := newGuardLab(t)
				l.twoWay = twoWay
				c.run(l)
				if l.cut != 0 || len(l.guard.Loops(l.at)) != 0 {
					t.Errorf("%d packets cut, loops %+v", l.cut, l.guard.Loops(l.at))
				}
			})
		}
	}
}

// One that sends another's content much faster than that one, and began after it, is not
// told apart from a loop at once by a rule whose circle is meant: it is forgiven after few
// packets, for a while.
func TestGuardForgives(t *testing.T) {
	l := newGuardLab(t)
	l.twoWay = true
	const n = 5000
	l.take(1, from(1, "alive"))
	for range n {
		l.wait(10 * time.Millisecond)
		l.take(1, from(2, "alive"))
	}
	if most := guardSelf + 2*GuardRatio*GuardReturns; l.cut == 0 || l.cut > most {
		t.Errorf("%d of %d packets cut, want 1 to %d", l.cut, n, most)
	}
}

// ring sends a packet round: what the guard lets pass comes back after the round-trip time,
// as the ways make it, until nothing does.
func (l *guardLab) ring(rule uint32, frame []byte, rtt time.Duration, ways ...func([]byte) []byte) (rounds int) {
	l.t.Helper()
	flying := [][]byte{frame}
	for len(flying) > 0 {
		var next [][]byte
		for _, f := range flying {
			if !l.take(rule, f) {
				continue
			}
			rounds++
			for _, way := range ways {
				next = append(next, way(bytes.Clone(f)))
			}
		}
		if rounds > 100 {
			l.t.Fatalf("the loop goes on after %d packets", rounds)
		}
		flying = next
		l.wait(rtt)
	}
	return rounds
}

// as rewrites a frame as a relay or a reflector does.
func as(t *testing.T, sender int, keepID bool, change ...func(*Rewrite)) func([]byte) []byte {
	return func(b []byte) []byte {
		h, _ := Parse(b)
		r := Rewrite{
			SrcMAC: [6]byte{2, 0, 0, 0, byte(sender >> 8), byte(sender)}, DstMAC: [6]byte(b[:6]), Dst: h.Dst, DstPort: h.DstPort,
			Src: netip.AddrFrom4([4]byte{192, 0, 2, byte(sender)}),
		}
		if !h.Dst.Is4() {
			r.Src = netip.Addr{}
		}
		for _, c := range change {
			c(&r)
		}
		if outcome := r.Apply(b, &h); outcome != Rewritten {
			t.Fatal(outcome)
		}
		if !keepID {
			copy(b[18:20], []byte{0, 0})
			FillChecksums(b, &h)
		}
		return b
	}
}

// Whatever the way, a loop is cut after few rounds, and at once when its way is known.
func TestGuardCutsLoops(t *testing.T) {
	keep := func(r *Rewrite) { r.Src = netip.Addr{} }
	bare := func(r *Rewrite) { r.ZeroChecksum = true }
	for _, c := range []struct {
		name   string
		sender int
		ways   []func([]byte) []byte
		change func(*Frame)
		after  int  // packets that pass of one content when the way is known
		twoWay bool // marks alone do not tell
	}{
		{name: "a relay", sender: 1, ways: []func([]byte) []byte{as(t, 9, true)}, after: 1},
		{name: "a relay that keeps sources", sender: 1, ways: []func([]byte) []byte{as(t, 9, true, keep)}, after: 1},
		{name: "a reflector", sender: 1, ways: []func([]byte) []byte{as(t, 9, false)}, after: 1, twoWay: true},
		{name: "two relays", sender: 1, ways: []func([]byte) []byte{as(t, 8, true), as(t, 9, true)}, after: 1},
		{name: "a relay that drops checksums", sender: 1, ways: []func([]byte) []byte{as(t, 9, true, bare)}, after: 1},
		{name: "no checksum", sender: 1, ways: []func([]byte) []byte{as(t, 9, true)}, change: func(f *Frame) { f.NoChecksum = true }, after: 1},
		{name: "the relay that brings it", sender: 9, ways: []func([]byte) []byte{as(t, 9, true)}, after: 1, twoWay: true},
		{name: "IPv6, the relay that brings it", sender: 9, ways: []func([]byte) []byte{as(t, 9, true)}, change: func(f *Frame) {
			f.Src, f.Dst = netip.MustParseAddr("fd00::9"), netip.MustParseAddr("ff05::c")
		}, after: 1, twoWay: true},
		{name: "IPv6", sender: 1, ways: []func([]byte) []byte{as(t, 9, true)}, change: func(f *Frame) {
			f.Src, f.Dst = netip.MustParseAddr("fd00::1"), netip.MustParseAddr("ff05::c")
		}, after: 1},
	} {
		for i := range 6 {
			rtt, twoWay := []time.Duration{0, time.Millisecond, 20 * time.Millisecond}[i/2], i%2 == 1
			if c.twoWay && !twoWay {
				continue
			}
			t.Run(fmt.Sprintf("%s, two ways %v/%v", c.name, twoWay, rtt), func(t *testing.T) {
				l := newGuardLab(t)
				l.twoWay = twoWay
				change := c.change
				if change == nil {
					change = func(*Frame) {}
				}
				start := l.at
				rounds := l.ring(1, from(c.sender, "first", change), rtt, c.ways...)
				if !l.loops(1) || l.loops(2) {
					t.Fatalf("looping: %+v", l.guard.Loops(l.at))
				}
				if took := time.Duration(l.at - start); took > time.Second {
					t.Errorf("found after %v", took)
				}
				way := l.guard.Loops(l.at)[0].Ways[0]
				if way.MAC != [6]byte(from(9, "")[6:12]) && way.MAC != [6]byte(from(8, "")[6:12]) || way.From != 1 || way.Index != 3 || way.Packets == 0 {
					t.Errorf("the way is %+v", way)
				}
				t.Logf("%d packets passed", rounds)
				passed, known := 0, l.at
				for i := range 50 {
					passed += l.ring(1, from(c.sender, fmt.Sprint("next ", i), change), rtt, c.ways...)
				}
				// Now and then one is let pass, to see whether it comes back.
				probes := 1 + int(time.Duration(l.at-known)/(2*time.Second))
				if most := 50*c.after + 2*probes*len(c.ways); passed > most {
					t.Errorf("with the way known %d of 50 passed, want at most %d", passed, most)
				}
				if !l.take(1, from(9, "of its own")) {
					t.Error("a content that was never relayed is cut")
				}
				l.wait(GuardHeal)
				if l.loops(1) {
					t.Error("still looping")
				}
				l.wait(GuardMemory)
				for range 3 {
					if !l.take(1, from(9, "later")) {
						t.Error("cut after the loop is gone")
					}
				}
			})
		}
	}
}

// A loop is found whoever is seen first, and while other packets pass.
func TestGuardOrderAndLoad(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 5))
	for round := range 200 {
		l := newGuardLab(t)
		// The relay's copy comes before the packet itself.
		back := as(t, 9, true)
		l.take(2, back(from(1, "first")))
		l.wait(time.Duration(random.IntN(60)) * time.Millisecond)
		noise := func(b []byte) []byte {
			for range 20 {
				l.take(3, from(5, fmt.Sprint("noise ", random.Uint64())))
			}
			return back(b)
		}
		if n := l.ring(2, from(1, "first"), time.Millisecond, noise); n > 60 {
			t.Errorf("round %d: %d packets", round, n)
		}
	}
}

// The guard does not change packets that do not come again and again, and of others nothing
// but what a mark needs.
func TestGuardMarks(t *testing.T) {
	for i := range 4 {
		dst := []string{"239.1.1.1", "ff05::c"}[i/2]
		l := newGuardLab(t)
		l.twoWay = i%2 == 1
		marked := 0
		for i := range 5000 {
			b := from(1, "alive", func(f *Frame) {
				if f.Dst = netip.MustParseAddr(dst); f.Dst.Is6() {
					f.Src = netip.MustParseAddr("fd00::1")
				}
			})
			was := bytes.Clone(b)
			l.take(1, b)
			if bytes.Equal(b, was) {
				continue
			}
			marked++
			if i < 7 {
				t.Errorf("packet %d is marked", i)
			}
			if netip.MustParseAddr(dst).Is4() {
				copy(b[18:20], was[18:20])
				copy(b[24:26], was[24:26])
			} else {
				copy(b[16:18], was[16:18])
			}
			if !bytes.Equal(b, was) {
				t.Fatalf("%x became %x", was, b)
			}
		}
		if l.twoWay && (marked < 8 || marked > 3*64) || !l.twoWay && marked != 0 {
			t.Errorf("%s: %d of 5000 marked, two ways %v", dst, marked, l.twoWay)
		}
	}
}

// A loop whose packets all come from one sender, the first included, is found by marks: a relay
// that keeps addresses has brought it, too. It takes a rule whose circle is meant: others leave what
// one sender repeats unchanged.
func TestGuardOneSender(t *testing.T) {
	l := newGuardLab(t)
	l.twoWay = true
	b, relayed := from(1, "first"), 0
	for ; relayed < 1000 && l.take(1, b); relayed++ {
		l.wait(50 * time.Microsecond)
		mark := [4]byte(b[18:22])
		b = from(1, "first")
		copy(b[18:20], mark[:2])
		h, _ := Parse(b)
		FillChecksums(b, &h)
	}
	if relayed > 60 || l.cut != 1 {
		t.Errorf("relayed %d times, cut %d", relayed, l.cut)
	}
}

// What a host sends anew has lost its marks. That nothing proves to be a return, so it is noted
// where the circle is not meant, and nothing is cut; and so is a sender that takes over.
func TestGuardEcho(t *testing.T) {
	l := newGuardLab(t)
	say := func(sender int, payload string, fronted bool) GuardVerdict {
		b := from(sender, payload)
		h, _ := Parse(b)
		verdict, _ := l.guard.Returned(b, &h, GuardPacket{Rule: 1, Index: 3, Outputs: 1, Ethernet: true, Fronted: fronted, At: l.at})
		l.wait(time.Millisecond)
		return verdict
	}
	var said [3]int
	say(1, "first", false)
	for range 1000 {
		said[say(2, "first", false)]++
	}
	if said[GuardCut] != 0 || said[GuardEcho] < 800 {
		t.Errorf("of 1000 echoes %d were cut and %d noted", said[GuardCut], said[GuardEcho])
	}
	for i := range 1000 { // as many of each of two senders, and what the program in front has noted
		if got := say(1+i%2, "both", false); got != GuardPass {
			t.Fatalf("packet %d of two senders: %v", i, got)
		}
		if got := say(3-min(i, 1), "fronted", true); got != GuardPass {
			t.Fatalf("packet %d behind the program: %v", i, got)
		}
	}
}

// FuzzGuardSignature: no rewriting changes the signature of a packet.
func FuzzGuardSignature(f *testing.F) {
	f.Add([]byte("payload"), uint32(7), uint16(5), true)
	f.Add([]byte{}, uint32(0), uint16(0), false)
	f.Add(bytes.Repeat([]byte{0xff}, 100), uint32(0xffffffff), uint16(0xffff), false)
	f.Fuzz(func(t *testing.T, payload []byte, addr uint32, port uint16, none bool) {
		if len(payload) > 1400 {
			return
		}
		b := from(1, string(payload), func(f *Frame) { f.NoChecksum = none })
		h, _ := Parse(b)
		before, sum := guardSignature(b, &h)
		r := Rewrite{Dst: netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, addr))), DstPort: port, SrcPort: port << 3, Src: netip.AddrFrom4([4]byte(binary.LittleEndian.AppendUint32(nil, addr))), TTLMode: TTLDecrement}
		if r.Apply(b, &h) != Rewritten {
			return
		}
		after, ok := Parse(b)
		if !ok {
			t.Fatalf("%x", b)
		}
		if got, gotSum := guardSignature(b, &after); got != before || gotSum != sum || none != (sum == 0) {
			t.Errorf("%x: %x and %x, want %x and %x", b, got, gotSum, before, sum)
		}
	})
}

func TestGuardPace(t *testing.T) {
	g, p := &Guard{}, &GuardPace{}
	at, looked := int64(time.Hour), 0
	second := func(rate int) int {
		looked = 0
		for range rate {
			at += int64(time.Second) / int64(rate)
			if p.Looks(g, 1, at) {
				looked++
			}
		}
		return looked
	}
	if n := second(5000); n != 5000 {
		t.Errorf("%d of 5,000 packets a second are looked at", n)
	}
	second(200_000)
	if n := second(200_000); n > 250*GuardBudget+GuardBudget {
		t.Errorf("%d of 200,000 packets a second are looked at", n)
	}
	if n := second(600_000); n < 100_000 {
		t.Errorf("%d of a rate that multiplies are looked at", n)
	}
}

// What is known of a rule goes with it.
func TestGuardForgets(t *testing.T) {
	l := newGuardLab(t)
	l.ring(1, from(1, "first"), time.Millisecond, as(t, 9, true))
	l.guard.Forget(map[uint32]bool{1: true})
	if len(l.guard.Loops(l.at)) != 0 {
		t.Error("the loop is known")
	}
	for range 3 {
		if !l.take(1, from(9, "first")) {
			t.Error("the content is known")
		}
	}
}
