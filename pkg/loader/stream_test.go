package loader

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"xdpcast/bpf"
	"xdpcast/internal/labtest"
	"xdpcast/internal/streamtest"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// legs are the flows of a stream: two on one interface, or on several. A watched stream has only
// the first.
func legs(n *testLab, name string, settings packet.Stream, out flow.Output, groups ...string) (rules []flow.Flow) {
	for i, group := range groups {
		r := flow.Flow{Name: fmt.Sprintf("%s%%%d", name, i), In: input(n.in, group, "", 5000), Out: []flow.Output{out}}
		r.Leg = &flow.Leg{Of: name, Number: i, Settings: settings}
		if settings.Kind == packet.StreamSingle {
			r.Name = name
			return append(rules, r)
		}
		rules = append(rules, r)
	}
	return rules
}

// streamLab runs the relay program and its twin side by side.
type streamLab struct {
	*runner
	n     *testLab
	out   flow.Output
	twin  *packet.StreamState
	name  string
	steps int

	frames int // sent
}

func newStreamLab(t testing.TB) *streamLab {
	opts := testOptions(t)
	opts.Logger = nil
	opts.programs = embedded{streamClock: true, noPacket: true, anyTick: true}
	n := newLab(t, 1)
	l := open(t, opts)
	attachAll(t, l, n.in, n.out[0])
	return &streamLab{runner: newRunner(t, l, n.relay), n: n, out: output(n.out[0], "239.9.9.9", "10.1.0.1", 6000)}
}

// begin publishes a stream that has had no packet.
func (s *streamLab) begin(t testing.TB, settings packet.Stream) {
	t.Helper()
	s.steps++
	s.name = fmt.Sprintf("stream%d", s.steps)
	sync1(t, s.l, legs(s.n, s.name, settings, s.out, legGroups[:]...)...)
	s.twin = packet.NewStreamState(settings)
}

var legGroups = [packet.MaxLegs]string{"239.1.1.1", "239.1.1.2", "239.1.1.3", "239.1.1.4"}

// datagram is one of a leg: all that follows its UDP header in the frame, and the length of the payload
// by that header. It may be shorter: bytes trail it, the last ones of them beyond the IP packet. It is
// longer in the first fragment of a datagram, and in nothing else that is relayed.
type datagram struct {
	payload []byte
	length  int
	padding int
	first   bool
}

func whole(payload []byte) datagram { return datagram{payload: payload, length: len(payload)} }

// build builds the frame.
func (d datagram) build(group netip.Addr, id uint16) []byte {
	const ipID, ipFlags, moreFragments, udpLength = 18, 20, 0x20, 38
	frame := packet.Frame{DstMAC: packet.MulticastMAC(group), SrcMAC: [6]byte{2, 0, 0, 0, 0, 9}, Src: netip.MustParseAddr("192.0.2.7"), Dst: group, SrcPort: 7, DstPort: 5000, TTL: 9,
		Payload: d.payload[:len(d.payload)-d.padding]}.Build()
	frame = append(frame, d.payload[len(d.payload)-d.padding:]...)
	binary.BigEndian.PutUint16(frame[udpLength:], uint16(8+d.length))
	if d.first {
		binary.BigEndian.PutUint16(frame[ipID:], id)
		frame[ipFlags] |= moreFragments
	}
	return frame
}

// send gives a datagram to both, and compares their results.
func (s *streamLab) send(t testing.TB, leg int, d datagram, now, precise uint64) bool {
	t.Helper()
	clock := bpf.RelayStreamState{PassNs: now, TurnNs: precise}
	if err := s.l.maps.StreamStates.Put(uint32(0), &clock); err != nil {
		t.Fatal(err)
	}
	s.frames++
	frame := d.build(netip.MustParseAddr(legGroups[leg]), uint16(s.frames))
	verdict, _ := s.must(t, s.l.relay, s.n.in.Index, frame, len(frame))
	if d.length > len(d.payload)-d.padding && !d.first {
		if verdict != xdpPass {
			t.Fatalf("verdict %d for a datagram beyond its packet, want %d: it is not relayed", verdict, xdpPass)
		}
		return false
	}
	want := s.twin.Packet(leg, d.payload, d.length, now, precise)
	passed := verdict == xdpRedirect
	if !passed && verdict != xdpDrop {
		t.Fatalf("verdict %d, want a redirect or a drop", verdict)
	}
	if passed != (want == packet.StreamPassed) {
		t.Fatalf("leg %d at %v: passed %v, the twin says %v", leg, time.Duration(now), passed, want)
	}
	return passed
}

// id is the stream's index.
func (s *streamLab) id() uint32 {
	if s.twin.Kind == packet.StreamSingle {
		return s.l.rules[s.name].stream
	}
	return s.l.rules[s.name+"%0"].stream
}

// compare compares the positions of both streams.
func (s *streamLab) compare(t testing.TB) {
	t.Helper()
	id := s.id()
	var got bpf.RelayStreamState
	if err := s.l.maps.StreamStates.Lookup(id, &got); err != nil {
		t.Fatal(err)
	}
	w := s.twin
	want := bpf.RelayStreamState{
		Head: w.Head, Floor: w.Floor, NextFloor: w.NextFloor, TurnNs: w.Turn, PassNs: w.Pass, Sessions: w.Sessions, SessionNs: w.SessionSince,
		Epoch: w.Epoch, Active: w.Active, Start: w.Start, Before: w.Before, Restarts: w.Restarts, Left: w.Left, SessionLeg: w.SessionLeg,
		Sample: w.Sample, SampleWaits: w.SampleWaits, Differ: w.Differ, Differs: w.Differs,
	}
	health := bpf.RelayStreamHealth{SampleNs: w.SampleAt, SampleLegs: w.SampleLegs, Marked: w.Marked, Lost: w.Lost}
	for i, l := range w.Legs {
		want.Legs[i] = bpf.RelayStreamLeg{
			Session: l.Session, Expected: l.Expected, CandidateSession: l.CandidateSession, Candidate: l.Candidate, Run: l.Run, Distrusted: l.Distrusted,
			JumpedNs: l.Jumped, History: l.History, Position: l.Position, Won: l.Won, Numbers: l.Numbers, SeenNs: l.Seen, UpNs: l.Up,
			Lost: l.Lost, Doubled: l.Doubled, Reordered: l.Reordered, Resets: l.Resets, Senders: l.Senders, Others: l.Others,
		}
		if l.Timed != 0 {
			want.Legs[i].Run |= 1 << 8
		}
		health.Legs[i] = bpf.RelayStreamPulse{TimedNs: l.Timed, JitterNs: l.Jitter, GapNs: l.Gap, LagNs: l.Lag, Filled: l.Filled, Timestamp: l.Timestamp, TimedNext: l.TimedNext}
	}
	var measured bpf.RelayStreamHealth
	if err := s.l.maps.StreamHealth.Lookup(id, &measured); err != nil {
		t.Fatal(err)
	}
	if measured != health {
		t.Fatalf("the program has measured\n%+v, the twin\n%+v", measured, health)
	}
	for i := range got.Legs { // the twin has no short way for ordinary packets
		l := &got.Legs[i]
		if l.Run>>16 != 0 { // steady: stream_resume
			l.Expected = (uint32(l.Position) + 1) & s.twin.Mask()
		}
		if l.Run &= 0xffff; s.twin.Kind != packet.StreamFailover {
			l.UpNs = 0
		}
	}
	if got != want {
		t.Fatalf("the program's stream is\n%+v, the twin's\n%+v", got, want)
	}
}

// Scenarios of streams, in the program and its twin; in short mode only the start of the long ones.
func TestStreamScenarios(t *testing.T) {
	labtest.RequireRoot(t)
	s := newStreamLab(t)
	most := labtest.Soak(5000, 1<<30)
	for _, scenario := range streamtest.Scenarios() {
		s.begin(t, scenario.Stream)
		n := 0
		scenario.Play(t, func(leg int, payload []byte, now uint64) bool {
			if n++; n > most {
				return s.twin.Packet(leg, payload, len(payload), now, now) == packet.StreamPassed
			}
			passed := s.send(t, leg, whole(payload), now, now)
			if n%512 == 0 || n == most {
				s.compare(t)
			}
			return passed
		})
		if t.Failed() {
			t.Fatal("in: " + scenario.Name)
		}
	}
}

// The short way of plain packets takes the legs that their flow entry says, and no others: the program copies what
// plain_next needs of a stream's settings to its legs, or that they are not plain.
func TestPlainLegs(t *testing.T) {
	labtest.RequireRoot(t)
	s := newStreamLab(t)
	watched := packet.Stream{Kind: packet.StreamSingle, Watch: packet.StreamField, Offset: 3, Width: 8}
	large := streamtest.MDP3
	large.Window *= 2
	short := streamtest.Wide
	short.Width = 2
	for name, c := range map[string]struct {
		packet.Stream
		plain bool
	}{
		"rtp":          {streamtest.RTPStream, true},
		"rfc4175":      {streamtest.RFC4175, false},
		"mdp3":         {streamtest.MDP3, true},
		"pitch":        {streamtest.Pitch, false},
		"moldudp64":    {streamtest.MoldUDP64, false},
		"failover":     {streamtest.FailRTP, false},
		"watched rtp":  {streamtest.Watched, true},
		"8 bytes":      {streamtest.Wide, true},
		"2 bytes":      {short, true},
		"watched":      {watched, true},
		"large window": {large, false},
	} {
		s.begin(t, c.Stream)
		d := drawn{Rand: rand.New(rand.NewPCG(1, 1))}
		now := uint64(time.Hour)
		for i := range uint32(70) {
			if !s.send(t, 0, whole(d.plainPayload(c.Stream, 0xffd0+i)), now, now) {
				t.Errorf("%s: number %d did not pass", name, i)
			}
		}
		s.compare(t)
		slots := 0
		for _, slot := range shortcutsOf(t, s.l.maps) {
			if slot.Flow.Stream == 0 {
				continue
			}
			slots++
			if leg := slot.HasOutput == uint8(bpf.RelayShortcutOutputSHORTCUT_LEG); leg != c.plain {
				t.Errorf("%s: the shortcut is for send_leg: %v, want %v", name, leg, c.plain)
			}
		}
		var got bpf.RelayStreamState
		if err := s.l.maps.StreamStates.Lookup(s.id(), &got); err != nil {
			t.Fatal(err)
		}
		// The field least of stream_plain, 0xffff: PLAIN_NEVER.
		l := &got.Legs[0]
		if plain := l.Run>>16 != 0 && uint16(l.UpNs>>32) != 0xffff; slots == 0 || plain != c.plain {
			t.Errorf("%s: the program takes the leg as plain: %v, want %v; %d slots, leg %+v", name, plain, c.plain, slots, l)
		}
		// expected is out of date by the packets since judge_leg's.
		if away := uint32(l.Position) + 1 - l.Expected; c.plain && away&s.twin.Mask() < 60 {
			t.Errorf("%s: %d packets of 70 took a short way", name, away)
		}
	}
}

// plainPayload is a payload that nothing has happened to.
func (d *drawn) plainPayload(s packet.Stream, number uint32) []byte {
	if s.Format() == packet.StreamRFC4175 {
		return streamtest.RTPExtended(number, 7, 0, 0)
	}
	for {
		if p := d.payload(s, number, 7, 1); !d.spoilt {
			return p
		}
	}
}

// Random packets of random streams: the program and its twin agree on what happens to each, and on
// the state of the stream.
func TestStreamDifferential(t *testing.T) {
	labtest.RequireRoot(t)
	s := newStreamLab(t)
	packets, ordinary, odd := 0, 0, 0
	for seed := range uint64(labtest.Soak(48, 3600)) {
		d := &drawn{Rand: rand.New(rand.NewPCG(seed, 7))}
		settings := d.settings()
		s.begin(t, settings)
		for range 1500 {
			leg, payload, now := d.packet(settings)
			if n, v := settings.Number(payload, len(payload)); v == packet.StreamPassed && settings.Kind != packet.StreamFailover {
				if l := &s.twin.Legs[leg]; l.Seen == now && l.Run == 0 && l.Timed == 0 && l.Session == n.Session && (l.Expected-n.Raw)&settings.Mask() == 0 {
					ordinary++
				}
			}
			sent := d.datagram(payload)
			if sent.length != len(payload) {
				odd++
			}
			s.send(t, leg, sent, now, now+d.Uint64N(uint64(2*time.Millisecond)))
			packets++
		}
		s.compare(t)
		if t.Failed() {
			t.Fatalf("seed %d: %+v", seed, settings)
		}
	}
	t.Logf("%d packets, %d of them next in a tick, %d whose UDP length is not that of the frame", packets, ordinary, odd)
	if ordinary < packets/20 {
		t.Errorf("%d of %d packets are the next of their leg in a tick: want one in 20, which the program judges the short way", ordinary, packets)
	}
}

// drawn draws streams, and packets as produced by senders, networks and accidents.
type drawn struct {
	*rand.Rand
	now     uint64
	tick    uint64 // of the clock
	number  [packet.MaxLegs]uint32
	session [packet.MaxLegs]uint32
	spoilt  bool // the last payload
}

func (d *drawn) settings() packet.Stream {
	d.now = uint64(time.Hour)
	d.tick = [...]uint64{1, uint64(time.Millisecond), uint64(4 * time.Millisecond), uint64(10 * time.Millisecond)}[d.IntN(4)]
	s := streamtest.AllStreams[d.IntN(len(streamtest.AllStreams))]
	if s.Kind == packet.StreamField && d.IntN(2) == 0 {
		s.Offset, s.Width, s.Little = uint16(d.IntN(40)), uint8(2<<d.IntN(3)), d.IntN(2) == 0
		s.CountOffset, s.CountWidth = uint16(d.IntN(20)), uint8(d.IntN(3))
		if s.CountWidth == 0 {
			s.CountOffset = 0
		}
	}
	if s.Merges() {
		s.PassOther = d.IntN(3) == 0
		s.Skew = time.Duration(1+d.IntN(200)) * time.Millisecond
		s.Reset = 2*s.Skew + time.Duration(d.IntN(1000))*time.Millisecond
		if s.Bits() == 32 {
			s.Window = 1 << (16 + d.IntN(3))
		}
		if d.IntN(4) == 0 { // the same numbers, watched
			s.Kind, s.Watch = packet.StreamSingle, s.Kind
			s.PassOther, s.Skew, s.Reset, s.Window = false, 0, 0, 0
		}
	}
	if s.Format() == packet.StreamRTP {
		s.Clock = [...]uint32{0, 8000, 90000, 27_000_000}[d.IntN(4)]
	}
	start := d.Uint32()
	for i := range d.number {
		d.number[i], d.session[i] = start, 7
	}
	return s
}

// packet draws the next packet.
func (d *drawn) packet(s packet.Stream) (leg int, payload []byte, now uint64) {
	if s.Kind != packet.StreamSingle {
		leg = d.IntN(packet.MaxLegs)
	}
	switch d.IntN(20) {
	case 0:
	case 1:
		d.now += uint64(d.IntN(3000)) * uint64(time.Millisecond) / uint64(1+d.IntN(100))
	default:
		d.now += uint64(d.IntN(1500)) * uint64(time.Microsecond) / uint64(1+d.IntN(4))
	}
	count := uint32(1)
	if s.Counts() {
		count = uint32(d.IntN(12))
	}
	number := &d.number[leg]
	switch d.IntN(60) {
	case 0: // another number
		*number = d.Uint32()
	case 1: // jumps back
		*number -= uint32(d.IntN(2000))
	case 2: // some lost
		*number += uint32(d.IntN(2000))
	case 3: // the position of another leg
		other := d.IntN(packet.MaxLegs)
		*number, d.session[leg] = d.number[other], d.session[other]
	case 4: // another sender
		d.session[leg] = 7 + uint32(d.IntN(3))
	case 5:
		d.session[leg] = d.Uint32()
	}
	this := *number
	if d.IntN(50) == 0 {
		this = d.Uint32()
	}
	*number += count
	return leg, d.payload(s, this, d.session[leg], count), d.now - d.now%d.tick
}

// datagram draws lengths: most are those of the payload.
func (d *drawn) datagram(payload []byte) datagram {
	g := whole(payload)
	switch d.IntN(40) {
	case 0, 1: // bytes trail it
		g.length = d.IntN(len(payload) + 1)
		g.padding = d.IntN(len(payload) - g.length + 1)
	case 2: // beyond its packet
		g.length += 1 + d.IntN(100)
	case 3: // a first fragment
		g.length += d.IntN(100)
		g.first = true
	}
	return g
}

func (d *drawn) payload(s packet.Stream, number, session, count uint32) []byte {
	var p []byte
	switch s.Format() {
	case packet.StreamMoldUDP64:
		p = streamtest.Mold(fmt.Sprint(session%3), uint64(number), uint16(count))
	case packet.StreamRFC4175:
		p = streamtest.RTPExtended(number, session, d.IntN(16), d.IntN(30))
	case packet.StreamField:
		p = make([]byte, 64)
		put := func(offset uint16, width uint8, value uint32) {
			for i := range width {
				at := int(width - 1 - i)
				if s.Little {
					at = int(i)
				}
				if i < 4 {
					p[int(offset)+at] = byte(value >> (8 * i))
				}
			}
		}
		put(s.Offset, s.Width, number)
		put(s.CountOffset, s.CountWidth, count)
	default:
		p = streamtest.RTP(number, session)
	}
	if f := s.Format(); f == packet.StreamRTP || f == packet.StreamRFC4175 {
		p[1] = byte([...]int{96, 33, 0, 10, d.IntN(128)}[d.IntN(5)])
		binary.BigEndian.PutUint32(p[4:], number*1500+d.Uint32N(3000))
	}
	if len(p) > 50 { // legs differ occasionally
		p[50] ^= byte(d.IntN(2))
	}
	accident := d.IntN(40)
	d.spoilt = accident < 3
	switch accident {
	case 0:
		p = p[:d.IntN(len(p)+1)]
	case 1:
		p[d.IntN(len(p))] ^= byte(1 << d.IntN(8))
	case 2:
		binary.BigEndian.PutUint16(p, uint16(d.Uint32()))
	}
	return p
}
