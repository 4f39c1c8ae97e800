package packet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// Merging several inputs of one stream, its legs, and monitoring the numbers of one. This is the twin
// of bpf/include/stream.h and its oracle; docs/decisions/0018 has the reasons.

// StreamKind is how the legs of a stream are merged: enum stream_kind of bpf/include/abi.h.
type StreamKind uint8

// The kinds. All except StreamFailover and StreamSingle merge by numbers.
const (
	StreamNone      StreamKind = iota
	StreamFailover             // one leg passes at a time
	StreamField                // a number at an offset in the UDP payload
	StreamRTP                  // RFC 3550, 16 bits; the session is the SSRC
	StreamRFC4175              // RTP with the extended number of RFC 4175 after its header
	StreamMoldUDP64            // MoldUDP64 1.00: numbers count messages
	StreamSingle               // one input: every packet passes, and its numbers are watched
)

// MaxLegs is the maximum number of legs of a stream: XDPCAST_MAX_LEGS of bpf/include/abi.h.
const MaxLegs = 4

// MaxStreamOffset is the maximum offset of a number in the UDP payload, in bytes.
const MaxStreamOffset = 511

// StreamRowNumbers is the number of sequence numbers in a row of a window: 32 in each of
// STREAM_WORDS words.
const StreamRowNumbers = 2048 * blockNumbers

// Stream is how several inputs are merged. It is comparable.
type Stream struct {
	Kind StreamKind
	// Watch is the kind of the numbers that StreamFailover and StreamSingle only monitor: one that
	// merges, or StreamNone.
	Watch StreamKind
	// Clock is the rate of RTP timestamps in Hz; 0: by the payload type.
	Clock uint32
	// For StreamField: the offset of the number in the UDP payload and its width in bytes, 2, 4 or
	// 8; only the lower half of 8 counts. With CountWidth, 1 or 2, a field has the number of
	// sequence numbers that a packet takes.
	Offset, CountOffset uint16
	Width, CountWidth   uint8
	Little              bool
	// Window is the size of the window in numbers: a power of two, at least StreamRowNumbers, and
	// exactly that for numbers of 16 bits.
	Window uint32
	// Skew is the maximum delay between legs: a number older than that, or twice that, is never new
	// again. Reset is the time without new numbers after which a jump is a restart.
	Skew, Reset time.Duration
	// PassOther passes packets without a number.
	PassOther bool
	// For StreamFailover: a leg without packets for longer than Silence is down, and a better one
	// takes over once it has been up for Back; 0: never.
	Silence, Back time.Duration
}

// Check refuses what the relay program cannot handle. Rules are validated with messages for users
// elsewhere.
func (s *Stream) Check() error {
	f := s.Format()
	switch {
	case s.Kind == StreamNone || s.Kind > StreamSingle:
		return fmt.Errorf("stream of kind %d: want 1 to %d", s.Kind, StreamSingle)
	case s.Merges() && s.Watch != StreamNone || s.Kind == StreamSingle && f == StreamNone || f == StreamFailover || f > StreamMoldUDP64:
		return fmt.Errorf("numbers of kind %d watched in a stream of kind %d", s.Watch, s.Kind)
	case s.Skew < 0 || s.Reset < 0 || s.Silence < 0 || s.Back < 0 || s.Skew > maxStreamTime || s.Reset > maxStreamTime || s.Silence > maxStreamTime || s.Back > maxStreamTime:
		return fmt.Errorf("times of a stream: want 0 to %v", maxStreamTime)
	case f != StreamField && (s.Offset != 0 || s.Width != 0 || s.CountOffset != 0 || s.CountWidth != 0 || s.Little):
		return errors.New("a field in a stream of another kind")
	case s.Clock != 0 && f != StreamRTP:
		return errors.New("a clock of timestamps without RTP")
	case f == StreamField && s.Width != 2 && s.Width != 4 && s.Width != 8:
		return fmt.Errorf("a number of %d bytes: want 2, 4 or 8", s.Width)
	case s.CountWidth > 2 || s.Offset > MaxStreamOffset || s.CountOffset > MaxStreamOffset:
		return fmt.Errorf("a count of %d bytes, offsets %d and %d: want at most 2, and %d", s.CountWidth, s.Offset, s.CountOffset, MaxStreamOffset)
	case s.Kind != StreamFailover && (s.Silence != 0 || s.Back != 0):
		return errors.New("a silence in a stream of another kind than failover")
	case !s.Merges():
		if s.Window != 0 || s.Skew != 0 || s.Reset != 0 || s.PassOther {
			return fmt.Errorf("a window in a stream of kind %d", s.Kind)
		}
		return nil
	case s.Window < StreamRowNumbers || s.Window > maxStreamWindow || s.Window&(s.Window-1) != 0 || s.Bits() == 16 && s.Window != StreamRowNumbers:
		return fmt.Errorf("a window of %d numbers: want a power of two from %d to %d, and the least for numbers of 16 bits", s.Window, StreamRowNumbers, maxStreamWindow)
	}
	return nil
}

// Merges says whether the legs are merged by numbers.
func (s *Stream) Merges() bool { return s.Kind != StreamFailover && s.Kind != StreamSingle }

// Format is where packets have their numbers: StreamNone when they have none.
func (s *Stream) Format() StreamKind {
	if s.Merges() {
		return s.Kind
	}
	return s.Watch
}

const (
	maxStreamWindow = 1 << 20
	maxStreamTime   = 24 * time.Hour
)

// StreamVerdict is the verdict on a packet of a leg: enum stream_verdict of bpf/include/abi.h.
type StreamVerdict uint8

// The verdicts.
const (
	StreamPassed StreamVerdict = iota
	StreamDuplicate
	StreamLate
	StreamAstray
	StreamOldSession
	StreamContended
	StreamNoNumber
	StreamStandby
	StreamVerdicts
	StreamBeat
)

// String is the drop reason of packets with the verdict.
func (v StreamVerdict) String() string {
	names := [...]string{"passed", "duplicate", "late", "astray", "old_session", "contended", "no_number", "standby"}
	if int(v) < len(names) {
		return names[v]
	}
	return "unknown"
}

// Values of bpf/include/stream.h.
const (
	blockBits     = 5
	blockNumbers  = 1 << blockBits
	newerBlocks   = 0x10000
	streamConfirm = 3
	streamJump    = 1024
	sampleTime    = uint64(2 * time.Second)
	maxJitter     = int64(time.Second)
	dynamicType   = 127
)

// Bits is the length of a number.
func (s *Stream) Bits() uint {
	if f := s.Format(); f == StreamRTP || f == StreamField && s.Width == 2 {
		return 16
	}
	return 32
}

// Mask is the highest number.
func (s *Stream) Mask() uint32 { return uint32(1<<s.Bits() - 1) }

// Ahead is how far a number may be ahead of the newest one, and Behind how far behind it the window
// reaches.
func (s *Stream) Ahead() uint32 { return s.Window / 4 }

// Behind: see Ahead.
func (s *Stream) Behind() uint32 { return s.Window - s.Ahead() - 1 }

// Bias is the maximum distance behind the newest number at which a number is interpreted.
func (s *Stream) Bias() uint32 {
	if s.Bits() == 16 {
		return s.Mask() - s.Ahead()
	}
	return s.Mask() >> 1
}

// Slack is the maximum distance between numbers of one leg that count as continuous.
func (s *Stream) Slack() uint32 {
	if s.Counts() {
		return streamJump
	}
	return 64
}

// Counts says whether packets may take several numbers.
func (s *Stream) Counts() bool { return s.Format() == StreamMoldUDP64 || s.CountWidth != 0 }

// StreamNumber is the number, session and count of a packet.
type StreamNumber struct {
	Raw, Session, Count uint32
	// Timestamp and Type are those of RTP; another Type than its payload types: there are none.
	Timestamp, Type uint32
}

// Number parses the number of a packet. length is the payload length by the UDP header; payload may
// be longer or truncated.
func (s *Stream) Number(payload []byte, length int) (n StreamNumber, v StreamVerdict) {
	n.Count, n.Type = 1, dynamicType
	data := payload[:min(len(payload), max(length, 0))]
	switch s.Format() {
	case StreamMoldUDP64:
		if len(data) < 20 {
			return n, StreamNoNumber
		}
		n.Count = uint32(binary.BigEndian.Uint16(data[18:]))
		if n.Count == 0 || n.Count == 0xffff {
			return n, StreamBeat
		}
		n.Session = binary.LittleEndian.Uint32(data)*0x9e3779b1 ^ binary.LittleEndian.Uint32(data[4:])*0x85ebca6b ^ uint32(binary.LittleEndian.Uint16(data[8:]))
		n.Raw = binary.BigEndian.Uint32(data[14:])
		return n, StreamPassed
	case StreamField:
		return s.fieldNumber(n, data)
	default:
		return s.rtpNumber(n, data, payload)
	}
}

func (s *Stream) fieldNumber(n StreamNumber, data []byte) (StreamNumber, StreamVerdict) {
	var ok bool
	if s.CountWidth != 0 {
		if n.Count, ok = s.field(data, s.CountOffset, s.CountWidth); !ok {
			return n, StreamNoNumber
		}
		if n.Count == 0 {
			return n, StreamBeat
		}
	}
	if n.Raw, ok = s.field(data, s.Offset, s.Width); !ok {
		return n, StreamNoNumber
	}
	return n, StreamPassed
}

func (s *Stream) field(data []byte, offset uint16, width uint8) (value uint32, ok bool) {
	if offset > MaxStreamOffset || int(offset)+int(width) > len(data) {
		return 0, false
	}
	b := data[offset : int(offset)+int(width)]
	switch {
	case width == 1:
		return uint32(b[0]), true
	case width == 2 && s.Little:
		return uint32(binary.LittleEndian.Uint16(b)), true
	case width == 2:
		return uint32(binary.BigEndian.Uint16(b)), true
	case s.Little:
		return binary.LittleEndian.Uint32(b), true
	}
	return binary.BigEndian.Uint32(b[width-4:]), true
}

// rtpNumber reads a header extension's length from the whole payload, like the BPF program.
func (s *Stream) rtpNumber(n StreamNumber, data, payload []byte) (StreamNumber, StreamVerdict) {
	const header = 12
	if len(data) < header || data[0]&0xc0 != 0x80 {
		return n, StreamNoNumber
	}
	if data[1] >= 192 && data[1] <= 223 { // RTCP, RFC 5761 section 4
		return n, StreamBeat
	}
	n.Raw, n.Session = uint32(binary.BigEndian.Uint16(data[2:])), binary.BigEndian.Uint32(data[8:])
	n.Timestamp, n.Type = binary.BigEndian.Uint32(data[4:]), uint32(data[1]&0x7f)
	if s.Format() == StreamRTP {
		return n, StreamPassed
	}
	at := header + 4*int(data[0]&0xf)
	if data[0]&0x10 != 0 {
		if at+4 > len(payload) {
			return n, StreamNoNumber
		}
		at += 4 + 4*int(binary.BigEndian.Uint16(payload[at+2:]))
	}
	if at > MaxStreamOffset || at+2 > len(data) {
		return n, StreamNoNumber
	}
	n.Raw |= uint32(binary.BigEndian.Uint16(data[at:])) << 16
	return n, StreamPassed
}

// StreamLeg is struct stream_leg of bpf/include/abi.h.
type StreamLeg struct {
	Session, Expected           uint32
	CandidateSession, Candidate uint32
	Run, Distrusted             uint32
	Jumped                      uint64
	History, Position           uint64
	Won, Numbers                uint64
	Seen, Up                    uint64
	Lost, Doubled, Reordered    uint64
	Resets, Senders, Others     uint64
	Timed, Jitter, Gap, Lag     uint64
	Filled                      uint64
	Timestamp, TimedNext        uint32
}

// StreamState is the state of a stream: struct stream_state of bpf/include/abi.h and the words of
// the window. It is not for concurrent use. All times are in nanoseconds of one clock.
type StreamState struct {
	Stream
	Head, Floor, NextFloor  uint64
	Turn, Pass              uint64
	Sessions, SessionSince  uint64
	Epoch, Active           uint32
	Start, Before, Restarts uint64
	Left, SessionLeg        uint32
	Sample                  uint64
	SampleWaits             uint32
	Differ                  [MaxLegs]uint32
	Differs                 [MaxLegs]uint8
	SampleAt, Marked, Lost  uint64 // and this of struct stream_health
	SampleLegs              uint32
	Legs                    [MaxLegs]StreamLeg
	words                   []uint64
}

// FirstHead is the head of a stream without packets.
const FirstHead = 1 << 32

// NewStreamState starts a stream.
func NewStreamState(s Stream) *StreamState {
	return &StreamState{Stream: s, Head: FirstHead, words: make([]uint64, s.Window/blockNumbers)}
}

// Packet returns the verdict on a packet of a leg, given its UDP payload and the length of that by
// the UDP header. now is the coarse clock, precise the exact one.
func (s *StreamState) Packet(leg int, payload []byte, length int, now, precise uint64) StreamVerdict {
	v := s.decide(leg, payload, length, now, precise)
	if v != StreamBeat && v != StreamNoNumber {
		return v
	}
	s.Legs[leg].Others++
	if v == StreamBeat || s.PassOther {
		return StreamPassed
	}
	return v
}

// streamPacket is struct stream_packet of bpf/include/stream.h.
type streamPacket struct {
	StreamNumber
	l     *StreamLeg
	leg   int
	now   uint64
	clock uint64 // precise
	quiet int64
	first bool
	sure  bool
}

func (s *StreamState) decide(leg int, payload []byte, length int, now, precise uint64) StreamVerdict {
	p := &streamPacket{l: &s.Legs[leg], leg: leg, now: now, clock: precise}
	seen := p.l.Seen
	p.l.Seen, p.first = now, seen != now
	passes := StreamPassed
	if s.Kind == StreamFailover {
		if passes = s.failover(p, seen); passes == StreamPassed {
			p.l.Won++
		}
	}
	if s.Format() == StreamNone {
		return passes
	}
	var v StreamVerdict
	p.StreamNumber, v = s.Number(payload, length)
	switch {
	case s.Merges() && v == StreamPassed:
		return s.merge(p, payload, length)
	case s.Merges():
		return v
	case v != StreamPassed:
		p.l.Others++
	default:
		if s.follow(p) && s.Kind == StreamSingle {
			p.l.Position += uint64((p.l.Expected - 1 - uint32(p.l.Position)) & s.Mask())
		}
	}
	return passes
}

// sampled is stream_sampled.
func (s *StreamState) sampled(at uint64, v StreamVerdict) bool {
	switch {
	case uint32(at)*0x9e3779b1>>26 != 0:
		return false
	case v == StreamPassed:
		return s.SampleWaits == 0
	}
	return s.Sample>>32 == at&(1<<32-1)
}

// compare is compare_copy.
func (s *StreamState) compare(p *streamPacket, payload []byte, length int, at uint64, v StreamVerdict) {
	const checked, word = 64, 8
	check := uint64(uint32(length))
	for i := word; i <= checked && i <= length; i += word {
		if i > len(payload) {
			return
		}
		check = (check ^ binary.LittleEndian.Uint64(payload[i-word:])) * 0x9e3779b97f4a7c15
	}
	check >>= 32
	l, bit := p.l, uint32(1)<<p.leg
	if v == StreamPassed {
		s.SampleAt, s.SampleLegs, s.Sample = p.clock, bit, at<<32|check
		s.SampleWaits = s.awaits(p.now)
		l.Lag -= l.Lag >> 3
		return
	}
	s.Differs[p.leg] = 0
	if uint32(s.Sample) != uint32(check) {
		s.Differs[p.leg] = 1
		s.Differ[p.leg]++
	}
	if s.SampleLegs&bit != 0 {
		return
	}
	s.SampleLegs |= bit
	s.SampleWaits = s.awaits(p.now)
	if lag := p.clock - s.SampleAt; lag < sampleTime {
		l.Lag += lag - l.Lag>>3
	}
}

// awaits is stream_awaits.
func (s *StreamState) awaits(now uint64) uint32 {
	for i := range s.Legs {
		if s.SampleLegs&(1<<i) == 0 && s.Legs[i].Seen+sampleTime > now {
			return 1
		}
	}
	return 0
}

// rtpClock is rtp_clock.
func rtpClock(payloadType uint32) uint32 {
	switch payloadType {
	case 14, 25, 26, 28, 31, 32, 33, 34:
		return 90000
	case 0, 3, 4, 5, 7, 8, 9, 12, 13, 15, 18:
		return 8000
	case 10, 11:
		return 44100
	}
	return 0
}

// clock is how many timestamps a second has; 0: that is not known.
func (s *Stream) clock(payloadType uint32) uint32 {
	switch {
	case s.Clock != 0:
		return s.Clock
	case s.Format() == StreamRFC4175: // RFC 4175 section 4.1
		return 90000
	}
	return rtpClock(payloadType)
}

// jitter is stream_jitter.
func (s *StreamState) jitter(p *streamPacket, follows bool) {
	l := p.l
	if follows {
		by, due := int64(p.clock-l.Timed), int64(0)
		if clock := s.clock(p.Type); clock != 0 {
			stamps := int64(int32(p.Timestamp - l.Timestamp))
			due = max(stamps, -stamps) * int64(time.Second) / int64(clock)
			if stamps < 0 {
				due = -due
			}
			l.Gap = 0
			by -= due
		} else {
			if l.Gap == 0 {
				l.Gap = uint64(by << 4)
			}
			by -= int64(l.Gap >> 4)
			l.Gap += uint64(by)
		}
		if by = max(by, -by); by <= maxJitter {
			l.Jitter += uint64(by) - (l.Jitter+8)>>4
		}
	}
	l.Timed = 0
	if p.first {
		l.Timed = p.clock
	}
	l.Timestamp, l.TimedNext = p.Timestamp, p.Raw+p.Count
}

// follow is stream_follow.
func (s *StreamState) follow(p *streamPacket) bool {
	l := p.l
	if p.Session != l.Session || !s.goesOn(p.Raw, l.Expected) {
		return s.jump(p)
	}
	l.Run = 0
	s.health(p)
	follows := l.Timed != 0 && l.TimedNext == p.Raw
	if p.first || follows {
		s.jitter(p, follows)
	}
	return true
}

// after is number_after.
func (s *StreamState) after(p *streamPacket) uint32 { return (p.Raw + p.Count) & s.Mask() }

func (s *StreamState) goesOn(raw, expected uint32) bool {
	return (raw-expected+s.Slack())&s.Mask() <= 2*s.Slack()
}

// jump is stream_jump.
func (s *StreamState) jump(p *streamPacket) bool {
	l, next := p.l, p.Raw+p.Count
	if p.Session != l.CandidateSession || !s.goesOn(p.Raw, l.Candidate) {
		l.CandidateSession, l.Candidate, l.Run = p.Session, next, 0
		return false
	}
	l.Candidate = next
	if l.Run++; l.Run < streamConfirm {
		return false
	}
	switch {
	case l.History == 0: // its first numbers
	case l.Session != p.Session:
		l.Senders++
	default:
		l.Resets++
	}
	l.Session, l.Expected, l.History, l.Jumped, l.Run = p.Session, s.after(p), 1, p.now, 0
	return true
}

// health is stream_count.
func (s *StreamState) health(p *streamPacket) {
	l := p.l
	ahead := (p.Raw - l.Expected) & s.Mask()
	if ahead <= s.Slack() {
		l.Lost += uint64(ahead)
		l.History = l.History<<(ahead+1) | 1
		if ahead >= 63 {
			l.History = 1
		}
		l.Expected = s.after(p)
		return
	}
	back := (l.Expected - 1 - p.Raw) & s.Mask()
	bit := uint64(1) << (back & 63)
	switch {
	case back > 63 || s.Counts():
		l.Reordered++
	case l.History&bit != 0:
		l.Doubled++
	default:
		l.History |= bit
		l.Reordered++
		if l.Lost > 0 {
			l.Lost--
		}
	}
}

// newest is stream_newest.
func (s *StreamState) newest() uint64 {
	newest := s.Head
	for i := range s.Legs {
		if p := s.Legs[i].Position; p > newest && p>>blockBits == s.Head>>blockBits {
			newest = p
		}
	}
	return newest
}

// numbers is stream_numbers.
func (s *StreamState) numbers(l *StreamLeg) uint64 {
	if s.Counts() {
		return l.Numbers
	}
	return l.Won
}

// mark is stream_mark.
func (s *StreamState) mark(position uint64) {
	s.Marked = 0
	for i := range s.Legs {
		s.Marked += s.numbers(&s.Legs[i]) - s.Legs[i].Filled
	}
	s.NextFloor = position
}

// settle is stream_settle.
func (s *StreamState) settle() {
	expected, passed := s.Before, s.Marked
	if s.NextFloor >= s.Start {
		expected += s.NextFloor + 1 - s.Start
	}
	for i := range s.Legs {
		passed += s.Legs[i].Filled
	}
	s.Lost = expected - min(expected, passed)
}

// restart is stream_restart.
func (s *StreamState) restart(p *streamPacket) uint64 {
	lap := uint64(s.Mask()) + 1
	at := s.Head&^uint64(s.Mask()) + uint64(p.Raw)
	for range 2 {
		if at < s.Head+64 {
			at += lap
		}
	}
	if s.Start != 0 {
		s.Before += s.newest() + 1 - s.Start
	}
	s.Start = at
	floor := at - uint64(s.Behind()) - 1
	if uint32(s.Sessions) != p.Session {
		if uint32(s.Sessions>>32) == p.Session && int64(p.now-s.SessionSince) < 4*int64(s.Reset) {
			shift := 32 - s.Bits()
			floor = at + uint64(int64(int32((s.Left-p.Raw)<<shift)>>shift))
		}
		s.Left = (uint32(s.Head) | (blockNumbers - 1)) & s.Mask()
		s.SessionSince, s.SessionLeg = p.now, uint32(p.leg)
		s.Sessions = s.Sessions<<32 | uint64(p.Session)
	}
	s.mark(floor)
	s.Floor, s.Turn, s.Pass, s.Head = floor, p.now, p.now, at
	s.Restarts++
	s.Epoch += 2
	p.l.Session, p.l.Expected, p.l.Jumped = p.Session, s.after(p), p.now
	p.sure = true
	return at
}

// session is stream_session.
func (s *StreamState) session(p *streamPacket) StreamVerdict {
	before := uint32(s.Sessions>>32) == p.Session
	switch beyond := (p.Raw - s.Left) & s.Mask(); {
	case s.Epoch == 0 || p.quiet > int64(s.Reset):
		return StreamPassed
	case !p.sure || p.l.Distrusted != 0 || int64(p.now-s.SessionSince) <= 2*int64(s.Skew):
		if before {
			return StreamOldSession
		}
		return StreamAstray
	case !before:
		return StreamPassed
	case beyond <= streamConfirm || beyond > s.Mask()/2:
		return StreamOldSession
	}
	if s.SessionLeg < MaxLegs && int(s.SessionLeg) != p.leg {
		s.Legs[s.SessionLeg].Distrusted = 1
	}
	return StreamPassed
}

// claim is stream_claim_at.
func (s *StreamState) claim(at uint64) StreamVerdict {
	block, bit := uint32(at>>blockBits)+uint32(at>>(32+blockBits))*0x9e3779b1, uint64(1)<<(at&(blockNumbers-1))
	w := &s.words[int(at>>blockBits)&(len(s.words)-1)]
	switch newer := int32(uint32(*w>>32) - block); {
	case newer == 0 && *w&bit != 0:
		return StreamDuplicate
	case newer == 0:
		*w |= bit
	case newer > 0 && newer < newerBlocks:
		return StreamLate
	default:
		*w = uint64(block)<<32 | bit
	}
	return StreamPassed
}

// tick is stream_tick.
func (s *StreamState) tick(now uint64) {
	if int64(now-s.Pass) <= 0 {
		return
	}
	s.Pass = now
	if int64(now-s.Turn) <= int64(s.Skew) {
		return
	}
	if s.SampleAt+sampleTime <= now || s.awaits(now) == 0 {
		s.SampleWaits = 0
	}
	s.settle()
	s.Floor = s.NextFloor
	if now-s.Turn > 2*uint64(s.Skew) {
		s.Floor = s.Head
	}
	s.Turn = now
	s.mark(s.newest())
}

// begins is stream_begins.
func (s *StreamState) begins(p *streamPacket, jumps bool) bool {
	if !p.sure || p.l.Jumped+2*uint64(s.Skew) >= s.Pass {
		return p.quiet > int64(s.Reset)
	}
	return jumps && p.quiet > 4*int64(s.Reset)
}

// place is stream_place.
func (s *StreamState) place(p *streamPacket) (uint64, StreamVerdict) {
	d := int64((p.Raw-uint32(s.Head)+s.Bias())&s.Mask()) - int64(s.Bias())
	at := s.Head + uint64(d)
	if d <= int64(s.Ahead()) && d >= -int64(s.Behind()) && (d <= streamJump || p.sure) && (d > 0 || at > s.Floor) {
		return at, StreamPassed
	}
	if s.begins(p, true) {
		return s.restart(p), StreamPassed
	}
	if d > 0 {
		return at, StreamAstray
	}
	return at, StreamLate
}

// change is stream_change.
func (s *StreamState) change(p *streamPacket) (uint64, StreamVerdict) {
	if v := s.session(p); v != StreamPassed {
		return 0, v
	}
	at := s.restart(p)
	if at > s.Floor {
		return at, StreamPassed
	}
	return at, StreamLate
}

// merge is stream_merge.
func (s *StreamState) merge(p *streamPacket, payload []byte, length int) StreamVerdict {
	l := p.l
	p.quiet, p.sure = int64(p.now-s.Pass), s.follow(p)
	var at uint64
	var v StreamVerdict
	if uint32(s.Sessions) == p.Session && s.Epoch != 0 {
		l.Distrusted = 0
		at, v = s.place(p)
	} else {
		at, v = s.change(p)
	}
	if v != StreamPassed {
		if v == StreamLate && s.sampled(at, v) {
			s.compare(p, payload, length, at, v)
		}
		return v
	}
	l.Position = at + uint64(p.Count) - 1
	if v = s.claim(at); v == StreamDuplicate && s.begins(p, false) {
		at = s.restart(p)
		l.Position = at + uint64(p.Count) - 1
		v = s.claim(at)
	}
	if v <= StreamDuplicate && s.sampled(at, v) {
		s.compare(p, payload, length, at, v)
	}
	if v != StreamPassed {
		return v
	}
	if p.sure && at>>blockBits > s.Head>>blockBits {
		s.Head = at
	}
	s.tick(p.now)
	l.Won++
	if s.Counts() {
		l.Numbers += uint64(p.Count)
	}
	if at <= s.NextFloor {
		l.Filled += uint64(p.Count)
	}
	return StreamPassed
}

// failover is stream_failover.
func (s *StreamState) failover(p *streamPacket, seen uint64) StreamVerdict {
	if int64(p.now-seen) > int64(s.Silence) {
		p.l.Up = p.now
	}
	active, since := int(s.Active)&(MaxLegs-1), s.SessionSince
	if active == p.leg && since != 0 {
		return StreamPassed
	}
	better := false
	if p.leg < active {
		better = s.Restarts <= 1 && int64(p.now-since) <= int64(s.Silence) ||
			s.Back != 0 && int64(p.now-p.l.Up) >= int64(s.Back)
	}
	if since != 0 && !better && int64(p.now-s.Legs[active].Seen) <= int64(s.Silence) {
		return StreamStandby
	}
	s.Active, s.SessionSince = uint32(p.leg), p.now
	s.Restarts++
	return StreamPassed
}
