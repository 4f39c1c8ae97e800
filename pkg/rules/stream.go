package rules

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A rule can have several inputs, its legs, that carry one stream:
//
//	merge     FORMAT[,skew=TIME][,reset=TIME][,window=N][,other=pass]
//	failover  TIME[,back=TIME|never]
//
// FORMAT is the position of the packets' numbers: rtp, rfc4175, moldudp64, pitch, mdp3, or
// field:OFFSET:BYTES[le][:count=OFFSET:BYTES].

// MaxInputs is the maximum number of inputs of a rule.
const MaxInputs = 4

// Stream is the part of a rule with several inputs beyond its first one. The order of the inputs is
// their preference.
type Stream struct {
	Legs     []Leg // the inputs after the first
	Merge    Merge
	Failover Failover
}

// Leg is one of several inputs.
type Leg struct {
	In     Input
	Accept Acceptance
}

// Merge merges several inputs into one stream by the sequence numbers of their packets: the first
// copy of each number is relayed. The zero Merge does not.
type Merge struct {
	Format MergeFormat
	Field  MergeField // only with MergeByField
	// Skew is the maximum delay between inputs, and Reset the time without new numbers after which
	// a jump means that the sender restarted. 0: DefaultSkew, DefaultReset.
	Skew, Reset time.Duration
	// Window is the size of the window in numbers, a power of two; 0: DefaultWindow.
	Window uint32
	// PassOther relays packets without a number, from every input.
	PassOther bool
}

// Health monitors the sequence numbers of an input without affecting what is relayed. The zero Health
// does not.
//
//	health  FORMAT[/CLOCK]
type Health struct {
	Format MergeFormat
	Field  MergeField // with MergeByField
	// Clock is the rate of RTP timestamps in Hz, with MergeRTP; 0: by the payload type.
	Clock uint32
}

// MergeFormat is the position of a packet's sequence number.
type MergeFormat uint8

// The formats.
const (
	MergeNone      MergeFormat = iota
	MergeRTP                   // RFC 3550; 16 bits
	MergeRFC4175               // RTP with the extended sequence number of RFC 4175, as in SMPTE ST 2110-20
	MergeMoldUDP64             // Nasdaq MoldUDP64 1.00
	MergePitch                 // the sequenced unit header of Cboe PITCH
	MergeMDP3                  // the packet header of CME MDP 3.0
	MergeByField               // Merge.Field
	mergeFormats
)

// String is the name of a format.
func (f MergeFormat) String() string {
	return enumString("MergeFormat", f, "none", "rtp", "rfc4175", "moldudp64", "pitch", "mdp3", "field")
}

// MergeField is an unsigned number in the UDP payload, big-endian unless Little.
type MergeField struct {
	Offset uint16 // bytes from the start of the UDP payload
	Bytes  uint8  // 2, 4 or 8
	Little bool   // little-endian, including the count
	// CountBytes, 1 or 2, is the length of a field with the number of sequence numbers that the
	// packet takes; 0: it takes one.
	CountOffset uint16
	CountBytes  uint8
}

// Defaults of a Merge.
const (
	DefaultSkew   = 50 * time.Millisecond
	DefaultReset  = time.Second
	DefaultWindow = 1 << 16
)

// Limits of a Merge and a Failover.
const (
	maxWindow   = 1 << 20
	maxOffset   = 503 // with 8 bytes, within what the relay program reads
	minSkew     = time.Millisecond
	maxSkew     = 10 * time.Second
	maxReset    = time.Hour
	minSilence  = 5 * time.Millisecond
	maxSilence  = time.Minute
	maxFailBack = time.Hour
	minClock    = 1000
	maxClock    = 1_000_000_000
)

// Failover relays one of several inputs: the first, in order, that is not silent. The zero Failover
// does not.
type Failover struct {
	// Silence is the time without packets after which an input is abandoned.
	Silence time.Duration
	// Back is how long a better input must have been up before it is used again; 0: never, unless
	// the current one falls silent.
	Back time.Duration
}

// InputCount is the number of inputs of a rule.
func (r *Rule) InputCount() int {
	if r.Stream == nil {
		return 1
	}
	return 1 + len(r.Stream.Legs)
}

// Leg returns input i of a rule.
func (r *Rule) Leg(i int) Leg {
	if i == 0 {
		return Leg{r.In, r.Accept}
	}
	return r.Stream.Legs[i-1]
}

// OfLeg is the rule with only input i; the rule itself if it has one input.
func (r *Rule) OfLeg(i int) Rule {
	one := *r
	if r.Stream != nil {
		leg := r.Leg(i)
		one.In, one.Accept, one.Stream = leg.In, leg.Accept, nil
	}
	return one
}

// ParseInputs parses the inputs of a rule, separated by blanks, into the rule. Its error is that of
// ParseInput.
func (r *Rule) ParseInputs(s string) error {
	first, rest := s, []string(nil)
	if strings.ContainsAny(s, " \t") {
		if fields := strings.Fields(s); len(fields) > 0 {
			first, rest = fields[0], fields[1:]
		}
	}
	var err error
	if r.In, r.Accept, err = ParseInput(first); err != nil {
		return err
	}
	for _, text := range rest {
		if err := r.addInput(text); err != nil {
			return err
		}
	}
	return nil
}

// addInput parses an input after the first.
func (r *Rule) addInput(text string) error {
	in, accept, err := ParseInput(text)
	if err != nil {
		return err
	}
	r.stream().Legs = append(r.stream().Legs, Leg{in, accept})
	return nil
}

// stream is the rule's Stream, created on first use.
func (r *Rule) stream() *Stream {
	if r.Stream == nil {
		r.Stream = &Stream{}
	}
	return r.Stream
}

// FormatInputs is the canonical form of a rule's inputs: the inverse of ParseInputs.
func (r *Rule) FormatInputs() string {
	b := []byte(FormatInput(r.In, r.Accept))
	if r.Stream != nil {
		for _, leg := range r.Stream.Legs {
			b = appendAcceptance(leg.In.append(append(b, ' ')), leg.Accept)
		}
	}
	return string(b)
}

// ParseStream parses how a rule's inputs are merged; an empty text means not set. Its error is a
// *FieldError.
func (r *Rule) ParseStream(merge, failover string) error {
	if merge != "" {
		m, err := ParseMerge(merge)
		if err != nil {
			return err
		}
		r.stream().Merge = m
	}
	if failover != "" {
		f, err := ParseFailover(failover)
		if err != nil {
			return err
		}
		r.stream().Failover = f
	}
	return nil
}

// FormatStream is the inverse of ParseStream.
func (r *Rule) FormatStream() (merge, failover string) {
	if r.Stream == nil {
		return "", ""
	}
	return r.Stream.Merge.String(), r.Stream.Failover.String()
}

const wantFormat = "rtp, rfc4175, moldudp64, pitch, mdp3 or field:OFFSET:BYTES[le][:count=OFFSET:BYTES]"

// ParseMerge parses FORMAT and its options.
func ParseMerge(s string) (m Merge, err error) {
	fail := func(item, want string) (Merge, error) {
		return Merge{}, &FieldError{Field: "merge", Value: item, Want: want}
	}
	format, options, _ := strings.Cut(s, ",")
	if !m.setFormat(format) {
		return fail(format, wantFormat)
	}
	if options == "" && !strings.HasSuffix(s, ",") {
		return m, nil
	}
	seen := map[string]bool{}
	for item := range strings.SplitSeq(options, ",") {
		key, value, _ := strings.Cut(item, "=")
		ok, want := false, ""
		switch key {
		case "skew":
			m.Skew, ok = parseTime(value)
			want = "skew=TIME, as 50ms or 1.5s"
		case "reset":
			m.Reset, ok = parseTime(value)
			want = "reset=TIME, as 1s"
		case "window":
			var n int
			n, ok = parseNumber(value, 1, 1<<30)
			m.Window, want = uint32(n), "window=N, how many numbers are remembered"
		case "other":
			m.PassOther, ok, want = true, value == "pass", "other=pass"
		default:
			want = "FORMAT,KEY=VALUE, KEY one of skew, reset, window, other"
		}
		if seen[key] {
			ok, want = false, key+" only once"
		}
		if !ok {
			return fail(item, want)
		}
		seen[key] = true
	}
	return m, nil
}

func (m *Merge) setFormat(s string) (ok bool) {
	m.Format, m.Field, ok = parseFormat(s)
	return ok
}

// parseFormat reads where packets have their numbers.
func parseFormat(s string) (format MergeFormat, at MergeField, ok bool) {
	for f := MergeNone + 1; f < MergeByField; f++ {
		if s == f.String() {
			return f, at, true
		}
	}
	rest, ok := strings.CutPrefix(s, "field:")
	if !ok {
		return MergeNone, at, false
	}
	field, count, hasCount := strings.Cut(rest, ":count=")
	if at.Offset, at.Bytes, at.Little, ok = parseField(field, true); ok && hasCount {
		at.CountOffset, at.CountBytes, _, ok = parseField(count, false)
	}
	return MergeByField, at, ok
}

// formatText is the reverse of parseFormat.
func formatText(format MergeFormat, at MergeField) string {
	s := format.String()
	if format == MergeByField {
		s += fmt.Sprintf(":%d:%d", at.Offset, at.Bytes)
		if at.Little {
			s += "le"
		}
		if at.CountBytes != 0 {
			s += fmt.Sprintf(":count=%d:%d", at.CountOffset, at.CountBytes)
		}
	}
	return s
}

// set reads FORMAT[/CLOCK], and answers what would have been right, or "".
func (h *Health) set(s string) (want string) {
	format, clock, hasClock := strings.Cut(s, "/")
	var ok bool
	if h.Format, h.Field, ok = parseFormat(format); !ok {
		return "health=FORMAT, FORMAT " + wantFormat
	}
	if !hasClock {
		return ""
	}
	n, ok := parseNumber(clock, 1, maxClock)
	if !ok {
		return "health=rtp/CLOCK, CLOCK the timestamps of a second, as 90000"
	}
	h.Clock = uint32(n)
	return ""
}

// String is what follows health=, empty for the zero Health.
func (h Health) String() string {
	if h == (Health{}) {
		return ""
	}
	s := formatText(h.Format, h.Field)
	if h.Clock != 0 {
		s += "/" + strconv.FormatUint(uint64(h.Clock), 10)
	}
	return s
}

// Health is what watches the inputs of a rule: of several what one of them says.
func (r *Rule) Health() Health {
	for i := range r.InputCount() {
		if h := r.Leg(i).Accept.Health(); h != (Health{}) {
			return h
		}
	}
	return Health{}
}

// parseField parses OFFSET:BYTES or OFFSET:BYTESle.
func parseField(s string, order bool) (offset uint16, width uint8, little, ok bool) {
	at, bytes, ok := strings.Cut(s, ":")
	if !ok {
		return 0, 0, false, false
	}
	if order {
		bytes, little = strings.CutSuffix(bytes, "le")
	}
	n, ok := parseNumber(at, 0, 65535)
	if !ok {
		return 0, 0, false, false
	}
	w, ok := parseNumber(bytes, 1, 8)
	return uint16(n), uint8(w), little, ok
}

// parseTime parses a positive duration of whole microseconds.
func parseTime(s string) (time.Duration, bool) {
	d, err := time.ParseDuration(s)
	return d, err == nil && d > 0 && d%time.Microsecond == 0 && !strings.HasPrefix(s, "+")
}

// String is the canonical form without defaults; empty for the zero Merge.
func (m Merge) String() string {
	if m == (Merge{}) {
		return ""
	}
	s := formatText(m.Format, m.Field)
	if m.Skew != 0 {
		s += ",skew=" + timeText(m.Skew)
	}
	if m.Reset != 0 {
		s += ",reset=" + timeText(m.Reset)
	}
	if m.Window != 0 {
		s += ",window=" + strconv.Itoa(int(m.Window))
	}
	if m.PassOther {
		s += ",other=pass"
	}
	return s
}

// timeText is a duration without the trailing zeros of Duration.String: 1m rather than 1m0s.
func timeText(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = s[:len(s)-2]
	}
	if strings.HasSuffix(s, "h0m") {
		s = s[:len(s)-2]
	}
	return s
}

// ParseFailover parses TIME and its option.
func ParseFailover(s string) (f Failover, err error) {
	const want = "TIME[,back=TIME], as 30ms,back=2s"
	silence, back, hasBack := strings.Cut(s, ",")
	var ok bool
	if f.Silence, ok = parseTime(silence); !ok {
		return Failover{}, &FieldError{Field: "failover", Value: s, Want: want}
	}
	if back, ok = strings.CutPrefix(back, "back="); hasBack && ok && back != "never" {
		f.Back, ok = parseTime(back)
	}
	if hasBack && !ok {
		return Failover{}, &FieldError{Field: "failover", Value: s, Want: want}
	}
	return f, nil
}

// String is the canonical form, empty for the zero Failover.
func (f Failover) String() string {
	if f == (Failover{}) {
		return ""
	}
	s := timeText(f.Silence)
	if f.Back != 0 {
		s += ",back=" + timeText(f.Back)
	}
	return s
}

// equalStream reports whether two rules have the same inputs after the first, merged the same way.
func equalStream(a, b *Stream) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Merge == b.Merge && a.Failover == b.Failover &&
		slices.EqualFunc(a.Legs, b.Legs, func(x, y Leg) bool { return x.In == y.In && equalAcceptance(x.Accept, y.Accept) })
}

// stream checks the inputs of a rule as one stream.
func (c *checker) stream(r *Rule) {
	if r.Stream == nil {
		c.health(r, 0)
		return
	}
	merges, fails := r.Stream.Merge != (Merge{}), r.Stream.Failover != (Failover{})
	switch n := r.InputCount(); {
	case n == 1 && merges:
		c.fault(nil, "merge", r.Stream.Merge.String(), "several inputs to merge")
	case n == 1 && fails:
		c.fault(nil, "failover", r.Stream.Failover.String(), "several inputs, of which one is relayed at a time")
	case n > MaxInputs:
		c.fault(nil, "in", strconv.Itoa(n)+" inputs", fmt.Sprintf("1 to %d inputs", MaxInputs))
		return
	case n > 1 && !merges && !fails:
		c.fault(nil, "merge", "", "merge=FORMAT for inputs that carry one stream with numbers, or failover=TIME for one without (independent inputs need separate rules)")
	case merges && fails:
		c.fault(nil, "failover", r.Stream.Failover.String(), "merge or failover, not both")
	}
	for i := range r.InputCount() {
		c.leg(r, i)
		c.health(r, i)
	}
	c.oneSource(r)
	if merges {
		c.merge(r.Stream.Merge)
	}
	if fails {
		c.failover(r.Stream.Failover)
	}
}

// leg checks one of several inputs: what a leg cannot have, and what the legs must share.
func (c *checker) leg(r *Rule, i int) {
	e, leg := end{c, legSlot(r, i)}, r.Leg(i)
	in, accept := leg.In, leg.Accept
	const one = ": an input among several"
	switch {
	case isPattern(in.Interface):
		e.fault(nil, ".interface", in.Interface, "one interface"+one)
	case in.Len != 0:
		e.fault(nil, ".address", in.Prefix().String(), "one address"+one)
	case in.Port == 0 && in != (Input{}):
		e.fault(nil, ".port", "", ":PORT"+one)
	case in.PortTo != 0:
		e.fault(nil, ".port", fmt.Sprintf("%d-%d", in.Port, in.PortTo), "one port"+one)
	}
	if in.FromHost {
		e.fault(nil, ".from", "host", "packets that arrive"+one)
	}
	if accept.Local {
		e.fault(nil, ".local", "yes", "no local: the host's receivers would get the rest of each input")
	}
	if accept.Rate() != (Rate{}) {
		e.fault(nil, ".rate", string(appendRate(nil, accept.Rate())[1:]), "no rate"+one+" (which one is relayed changes)")
	}
	if i == 0 {
		return
	}
	e.family(in.Address, r.In.Address)
	for other := range i {
		if r.Leg(other).In == in {
			e.fault(ErrDuplicateInput, "", in.String(), "another interface, address, port, source or VLAN: "+end{c, legSlot(r, other)}.field()+" has these")
		}
	}
}

// oneSource checks the outputs of a rule with several inputs: copies must look the same whichever
// input a packet came from.
func (c *checker) oneSource(r *Rule) {
	if r.InputCount() == 1 {
		return
	}
	source := r.In.Sender()
	for i := range r.InputCount() {
		if in := r.Leg(i).In; in.Sender() != source {
			source = netip.Addr{}
		}
	}
	for slot, o := range r.Out {
		e := end{c, slot}
		if o.Policy.Source == SourceKeep && !source.IsValid() {
			e.fault(nil, ".src", "keep", "src=iface or src=ADDRESS: the inputs have several sources, or do not name one and the same")
		}
		if o.Policy.Rate != (Rate{}) {
			e.fault(nil, ".rate", string(appendRate(nil, o.Policy.Rate)[1:]), "no rate: a rule with several inputs has none")
		}
	}
}

// formatFault says what a format should be, "" when it is right.
func formatFault(format MergeFormat, f MergeField) string {
	switch {
	case format == MergeNone || format >= mergeFormats:
		return wantFormat
	case format != MergeByField && f != (MergeField{}):
		return "no field with format " + format.String()
	case format == MergeByField && f.Bytes != 2 && f.Bytes != 4 && f.Bytes != 8:
		return "a number of 2, 4 or 8 bytes"
	case format == MergeByField && f.CountBytes > 2:
		return "a count of 1 or 2 bytes"
	case f.Offset > maxOffset || f.CountOffset > maxOffset:
		return fmt.Sprintf("an offset of 0 to %d", maxOffset)
	case f.CountBytes == 0 && f.CountOffset != 0:
		return "the bytes of the count"
	}
	return ""
}

// health checks what watches an input.
func (c *checker) health(r *Rule, i int) {
	e, leg := end{c, legSlot(r, i)}, r.Leg(i)
	in, h := leg.In, leg.Accept.Health()
	if h == (Health{}) {
		return
	}
	bad := func(want string) { e.fault(nil, ".health", h.String(), want) }
	switch fault := formatFault(h.Format, h.Field); {
	case fault != "":
		bad(fault)
	case h.Clock != 0 && h.Format != MergeRTP:
		bad("a clock with rtp alone: no other format has timestamps of a clock to be told")
	case h.Clock != 0 && (h.Clock < minClock || h.Clock > maxClock):
		bad(fmt.Sprintf("a clock of %d to %d", minClock, maxClock))
	case in.FromHost:
		bad("packets that arrive: what this host sends passes no relay program, which watches numbers")
	case r.InputCount() == 1 && (in.Len != 0 || in.Port == 0 || in.PortTo != 0):
		bad("an input of one address and one port: streams beside each other have numbers of their own")
	case h != r.Health():
		bad(r.Health().String() + ", as the other inputs of the stream")
	case r.InputCount() > 1 && r.Stream.Merge != (Merge{}) && (h.Format != r.Stream.Merge.Format || h.Field != r.Stream.Merge.Field):
		bad("the format of merge, " + formatText(r.Stream.Merge.Format, r.Stream.Merge.Field) + ", which is watched in any case")
	}
}

func (c *checker) merge(m Merge) {
	bad := func(value, want string) { c.fault(nil, "merge", value, want) }
	skew, reset, window := m.Times()
	if fault := formatFault(m.Format, m.Field); fault != "" {
		value := m.String()
		if m.Format == MergeNone || m.Format >= mergeFormats {
			value = m.Format.String()
		}
		bad(value, fault)
	}
	switch {
	case skew < minSkew || skew > maxSkew:
		bad("skew="+timeText(skew), "1ms to 10s")
	case reset < 2*skew:
		bad("reset="+timeText(reset), fmt.Sprintf("at least twice the skew, %s", timeText(2*skew)))
	case reset > maxReset:
		bad("reset="+timeText(reset), "at most 1h")
	case m.short() && window != DefaultWindow:
		bad("window="+strconv.Itoa(int(window)), "65536: the numbers have 16 bits")
	case window < DefaultWindow || window > maxWindow || window&(window-1) != 0:
		bad("window="+strconv.Itoa(int(window)), "65536, 131072, 262144, 524288 or 1048576")
	}
}

// short reports whether the numbers have 16 bits.
func (m *Merge) short() bool {
	return m.Format == MergeRTP || m.Format == MergeByField && m.Field.Bytes == 2
}

// Times returns the skew, the reset and the window, with defaults for unset ones.
func (m *Merge) Times() (skew, reset time.Duration, window uint32) {
	skew, reset, window = m.Skew, m.Reset, m.Window
	if skew == 0 {
		skew = DefaultSkew
	}
	if reset == 0 {
		reset = DefaultReset
	}
	if window == 0 {
		window = DefaultWindow
	}
	return skew, reset, window
}

func (c *checker) failover(f Failover) {
	switch {
	case f.Silence < minSilence || f.Silence > maxSilence:
		c.fault(nil, "failover", f.String(), "a silence of 5ms to 1m")
	case f.Back != 0 && f.Back < f.Silence || f.Back > maxFailBack:
		c.fault(nil, "failover", f.String(), "back of at least the silence and at most 1h, or back=never")
	}
}

// legSlot is the slot of an input in messages: inputSlot for the only one.
func legSlot(r *Rule, i int) int {
	if r.InputCount() == 1 {
		return inputSlot
	}
	return inputSlot - 1 - i
}
