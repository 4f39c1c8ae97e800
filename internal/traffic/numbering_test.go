package traffic

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"xdpcast/pkg/packet"
)

func numbering(tb testing.TB, s string) Numbering {
	tb.Helper()
	n, err := ParseNumbering(s)
	if err != nil || n.String() != s {
		tb.Fatalf("%q: %v, %v", s, n, err)
	}
	return n
}

// numberings are all formats, and how the relay program reads them.
var numberings = map[string]packet.Stream{
	"rtp":                       {Kind: packet.StreamRTP},
	"rfc4175":                   {Kind: packet.StreamRFC4175},
	"moldudp64":                 {Kind: packet.StreamMoldUDP64},
	"pitch":                     {Kind: packet.StreamField, Offset: 4, Width: 4, CountOffset: 2, CountWidth: 1, Little: true},
	"mdp3":                      {Kind: packet.StreamField, Width: 4, Little: true},
	"field:0:2":                 {Kind: packet.StreamField, Width: 2},
	"field:7:8":                 {Kind: packet.StreamField, Offset: 7, Width: 8},
	"field:7:8le:count=1:2":     {Kind: packet.StreamField, Offset: 7, Width: 8, Little: true, CountOffset: 1, CountWidth: 2},
	"field:0:4:count=20:1":      {Kind: packet.StreamField, Width: 4, CountOffset: 20, CountWidth: 1},
	"field:400:4le:count=398:2": {Kind: packet.StreamField, Offset: 400, Width: 4, Little: true, CountOffset: 398, CountWidth: 2},
}

// The numbers that are written are those that the receiver and the relay read.
func TestNumbering(t *testing.T) {
	b := make([]byte, 600)
	for text, stream := range numberings {
		n := numbering(t, text)
		for _, h := range []Header{{Stream: 0x123456789abcdef0, SentAt: 1<<60 + 5}, {Stream: 7, Seq: 65_530, Flow: 3}, {Seq: 1<<32 + 9}} {
			n.put(b, h, 12)
			got, ok := n.read(b)
			if want := (12 + h.Seq) & n.mask(); !ok || got.number != want || got.count != 1 {
				t.Errorf("%s: read %+v, want number %d", text, got, want)
			}
			theirs, verdict := stream.Number(b, len(b))
			if verdict != packet.StreamPassed || theirs.Raw != uint32(got.number)&stream.Mask() || theirs.Count != 1 {
				t.Errorf("%s: the relay reads %+v, %v, want %d", text, theirs, verdict, got.number)
			}
			if back, err := Decode(b[n.headerLen():]); err != nil || back != h {
				t.Errorf("%s: %+v, %v, want %+v", text, back, err, h)
			}
		}
		if _, ok := n.read(b[:1]); ok {
			t.Errorf("%s: a byte has a number", text)
		}
	}
	for text, want := range map[string]string{
		"mpeg":                 `merge "mpeg": want rtp, rfc4175, moldudp64`,
		"rtp,skew=1s":          `numbers "rtp,skew=1s": must be a format without options`,
		"field:0:3":            `numbers "field:0:3": must have 2, 4 or 8 bytes`,
		"field:0:4:count=4:4":  `numbers "field:0:4:count=4:4": the count must have 1 or 2 bytes`,
		"field:0:4:count=3:1":  `numbers "field:0:4:count=3:1": the count must be outside the number`,
		"field:65530:8:count=": `merge "field:65530:8:count=": want`,
		"field:65530:8":        `numbers "field:65530:8": must be within the first 65467 bytes`,
	} {
		if _, err := ParseNumbering(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
	}
}

func FuzzNumbering(f *testing.F) {
	f.Add(uint8(0), []byte{0x9f, 96, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7})
	texts := make([]string, 0, len(numberings))
	for text := range numberings {
		texts = append(texts, text)
	}
	slices.Sort(texts)
	f.Fuzz(func(t *testing.T, which uint8, b []byte) {
		text := texts[int(which)%len(texts)]
		got, ok := numbering(t, text).read(b)
		stream := numberings[text]
		want, verdict := stream.Number(b, len(b))
		if text == "mdp3" && len(b) < mdp3Header || text == "pitch" && len(b) < pitchHeader || text == "rfc4175" || len(b) > packet.MaxStreamOffset {
			return // the relay needs the number alone, and looks no further than it must
		}
		if ok != (verdict == packet.StreamPassed) || ok && (uint32(got.number)&stream.Mask() != want.Raw || got.count != int(want.Count)) {
			t.Errorf("%s: %+v, %v; the relay reads %+v, %v", text, got, ok, want, verdict)
		}
	})
}

// account is a group that datagrams are given to by hand.
func account(n Numbering) *group {
	return &group{window: DefaultWindow, flows: make(map[flowKey]*flow), numbering: n, fromStart: true}
}

// rtp is a packet of another sender.
func rtp(number uint16, ssrc byte) []byte {
	return []byte{0x80, 33, byte(number >> 8), byte(number), 0, 0, 0, 0, 0, 0, 0, ssrc, 0x47, 1, 2, 3}
}

// The packets of any sender are accounted for by their numbers, over the end of these.
func TestOthersNumbers(t *testing.T) {
	g := account(numbering(t, "rtp"))
	at := int64(1)
	for i := range 200_000 {
		number := uint16(i + 60_000)
		switch i % 1000 {
		case 10: // lost
			continue
		case 20: // late by two
			continue
		case 22:
			g.handle(rtp(number, 1), Fields{}, at)
			number -= 2
		case 30:
			g.handle(rtp(number, 1), Fields{}, at)
		case 40: // RTCP
			g.handle([]byte{0x80, 200, 0, 6, 0, 0, 0, 1, 0, 0, 0, 0}, Fields{}, at)
		case 50: // another sender
			g.handle(rtp(uint16(i/1000), 2), Fields{}, at)
		}
		at += 100
		g.handle(rtp(number, 1), Fields{}, at)
	}
	got := g.counters(0)
	want := Counters{Datagrams: 200_000 - 200 + 3*200, Received: 200_000, Bytes: 16 * 200_000, Lost: 200, Duplicated: 200, Reordered: 200, Repaired: 200, Foreign: 200}
	if got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	r := g.report(0)
	if len(r.Flows) != 2 || r.Flows[0].FirstSeq != 60_000 || r.Flows[0].HighestSeq != 259_999 || r.Latency.Samples != 0 {
		t.Errorf("%+v", r)
	}
	if l := r.RepairTime; l == nil || l.MinNS != 100 || l.MaxNS != 100 {
		t.Errorf("repaired after %+v", l)
	}
}

// Packets that take several numbers, as those of exchanges.
func TestOthersMessages(t *testing.T) {
	g := account(numbering(t, "moldudp64"))
	at := uint64(1)
	message := func(number uint64, count uint16) {
		b := append([]byte("SESSION001"), 0, 0, 0, 0, byte(number>>24), byte(number>>16), byte(number>>8), byte(number), byte(count>>8), byte(count))
		g.handle(b, Fields{}, 1)
	}
	for i := range uint16(1000) {
		if i%10 != 0 {
			message(at, i%7+1)
		}
		if i%20 == 0 {
			message(at, 0)
		}
		at += uint64(i%7) + 1
	}
	message(at, 0xffff)
	lost := uint64(0)
	for i := uint64(10); i < 1000; i += 10 { // what comes before the first packet is not lost
		lost += i%7 + 1
	}
	got := g.counters(0)
	if want := (Counters{Datagrams: 951, Received: 900, Bytes: 18_000, Lost: lost, Foreign: 51}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

// A number in front that is not the packet's own is a fault.
func TestNumberInFrontIsChecked(t *testing.T) {
	n := numbering(t, "rtp")
	g := account(n)
	b := make([]byte, 100)
	for i := range uint64(100) {
		n.put(b, Header{Stream: 9, Seq: i}, 65_500)
		if i == 50 {
			b[3]++
		}
		g.handle(b, Fields{}, 1)
	}
	if c := g.counters(0); c.Corrupt != 1 || c.Lost != 1 || c.Received != 99 {
		t.Errorf("%+v", c)
	}
}

// A gap is late when it takes longer than that; gaps are kept as far as numbers are told apart.
func TestGaps(t *testing.T) {
	g := account(Numbering{})
	g.late = int64(50 * time.Millisecond)
	b := make([]byte, HeaderLen)
	give := func(seq uint64, at time.Duration) {
		Encode(b, Header{Stream: 1, Seq: seq})
		g.handle(b, Fields{}, int64(at))
	}
	give(0, time.Second)
	give(3, time.Second)
	give(1, time.Second+50*time.Millisecond)
	give(2, time.Second+51*time.Millisecond)
	if g.c.Repaired != 1 || g.c.Late != 1 || g.repairs.max != int64(51*time.Millisecond) {
		t.Errorf("%+v, the longest %d", g.c, g.repairs.max)
	}
	for i := uint64(5); i < 400_000; i += 2 {
		give(i, 2*time.Second)
	}
	if n := len(g.current.gaps.list); n > DefaultWindow {
		t.Errorf("%d gaps are kept", n)
	}
	give(400_000-DefaultWindow+2, 3*time.Second)
	if g.c.Late != 2 || g.repairs.max != int64(time.Second) {
		t.Errorf("%+v, the longest %d", g.c, g.repairs.max)
	}
}

// The same seed leaves out the same packets, about as many as it is to, and none on all legs where
// it must not.
func TestLegsDraw(t *testing.T) {
	const packets = 100_000
	legs := []Leg{{Loss: 0.05}, {Loss: 0.2}, {Loss: 0.5}}
	lost := func(c SendConfig) (byLeg [3]int, onNone int) {
		for i := range uint64(packets) {
			n := 0
			for leg := range legs {
				if c.leftOut(leg, i) {
					byLeg[leg]++
					n++
				}
			}
			if n == len(legs) {
				onNone++
			}
			if c.onNoLeg(i) != (n == len(legs)) && !c.Repairable {
				t.Fatalf("packet %d", i)
			}
		}
		return byLeg, onNone
	}
	one, none := lost(SendConfig{Legs: legs, Seed: 1})
	if again, n := lost(SendConfig{Legs: legs, Seed: 1}); again != one || n != none {
		t.Errorf("%v and %v with the same seed", one, again)
	}
	if other, _ := lost(SendConfig{Legs: legs, Seed: 2}); other == one {
		t.Errorf("%v with other seeds", one)
	}
	for leg, n := range one {
		if want := legs[leg].Loss * packets; float64(n) < want*0.95 || float64(n) > want*1.05 {
			t.Errorf("leg %d leaves out %d, want about %g", leg, n, want)
		}
	}
	if none < 400 || none > 600 { // the legs do not depend on each other
		t.Errorf("%d are on no leg, want about 500", none)
	}
	if _, n := lost(SendConfig{Legs: legs, Seed: 1, Repairable: true}); n != 0 {
		t.Errorf("%d are on no leg", n)
	}
}

func FuzzParseLegs(f *testing.F) {
	f.Add("239.1.1.1:5000%a,239.1.1.2:5000%b", "1%,0.5%", "20ms", "100%")
	f.Fuzz(func(t *testing.T, targets, loss, delay, reorder string) {
		legs, err := ParseLegs(targets, loss, delay, reorder)
		if err != nil {
			return
		}
		for _, l := range legs {
			if l.Loss < 0 || l.Loss > 1 || l.Reorder < 0 || l.Reorder > 1 || l.Delay < 0 {
				t.Errorf("%+v", l)
			}
		}
		_ = SendConfig{Legs: legs, Rate: Rate{Value: 1000}}.Check()
	})
}

// What a leg sends is what it takes, held packets included, and another leg's copy is the same.
func TestLegsSendTheSame(t *testing.T) {
	cfg := SendConfig{Seed: 3, Rate: Rate{Value: 10}, Numbering: numbering(t, "rtp"), Size: 80, Batch: 16, Groups: 1,
		Legs: []Leg{{Loss: 0.1, Reorder: 0.1}, {Loss: 0.1, Reorder: 0.3}}}
	s := &Sender{cfg: cfg, stamps: cfg.stampsFor(), limit: 5000, first: 1}
	var sent [2]map[uint64][]byte
	for i := range cfg.Legs {
		s.legs = append(s.legs, &leg{Leg: cfg.Legs[i], number: i, targets: make([]Target, 1), names: newMmsgs(1, 1).names, msgs: newMmsgs(16, 80)})
		sent[i] = map[uint64][]byte{}
	}
	random := rand.New(rand.NewPCG(1, 1))
	for !s.done() {
		i := random.IntN(2)
		l := s.legs[i]
		s.take(l, min(s.limit, l.next+uint64(random.IntN(20)), s.legs[1-i].next+1000))
		n := random.IntN(len(l.queue) + 1)
		s.prepare(l, n)
		for at, index := range l.queue[:n] {
			if sent[i][index] != nil {
				t.Fatalf("leg %d sends packet %d twice", i, index)
			}
			sent[i][index] = bytes.Clone(l.msgs.payload(at, 80))
		}
		s.record(l, n, 0)
	}
	none := uint64(0)
	for index := range uint64(5000) {
		for i := range sent {
			if (sent[i][index] == nil) != cfg.leftOut(i, index) {
				t.Fatalf("leg %d, packet %d", i, index)
			}
		}
		a, b := sent[0][index], sent[1][index]
		if a == nil && b == nil {
			none++
		}
		if a != nil && b != nil && !bytes.Equal(a, b) {
			t.Fatalf("packet %d differs", index)
		}
	}
	r := s.Report()
	for i, l := range r.Legs {
		if l.Packets != uint64(len(sent[i])) || l.Packets+l.LeftOut != 5000 || l.Reordered == 0 {
			t.Errorf("leg %d: %+v", i, l)
		}
	}
	if r.Packets != 5000 || r.OnNoLeg != none || none == 0 {
		t.Errorf("%+v, want %d on no leg", r, none)
	}
}
