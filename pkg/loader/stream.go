package loader

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// streamEntry is a stream whose legs are published rules.
type streamEntry struct {
	id       uint32 // index of streams and stream_states
	row      uint32 // first row of stream_windows
	rows     uint32
	settings packet.Stream
	users    int // rules
}

// streamKey identifies a stream: a change of it restarts the stream, a change of its times does
// not.
type streamKey struct {
	name  string
	shape packet.Stream
}

func keyOf(leg *flow.Leg) streamKey {
	shape := leg.Settings
	if shape.Kind == packet.StreamFailover {
		return streamKey{leg.Of, packet.Stream{Kind: shape.Kind}} // its numbers decide nothing
	}
	shape.Skew, shape.Reset, shape.PassOther, shape.Clock = 0, 0, false, 0
	return streamKey{leg.Of, shape}
}

// windowRows is the number of rows in a stream's window.
func windowRows(s packet.Stream) uint32 { return s.Window / packet.StreamRowNumbers }

// useStream counts a rule that is a leg, and creates its stream for the first one.
func (s *transaction) useStream(e *entry) error {
	leg := e.rule.Leg
	if leg == nil {
		return nil
	}
	key := keyOf(leg)
	st := s.streams[key]
	if st == nil {
		var err error
		if st, err = s.newStream(leg.Settings); err != nil {
			return fmt.Errorf("stream: %w", err)
		}
		s.streams[key] = st
	} else if st.settings != leg.Settings {
		before := st.settings
		if err := s.writeStream(st, leg.Settings); err != nil {
			return err
		}
		s.onFailure(func() error { return s.writeStream(st, before) })
	}
	st.users++
	e.stream = st.id
	s.onFailure(func() error { return s.releaseStream(leg) })
	return nil
}

// newStream allocates the id and rows of a stream, and stages its window.
func (s *transaction) newStream(settings packet.Stream) (_ *streamEntry, err error) {
	st := &streamEntry{rows: windowRows(settings)}
	if st.id, _, err = s.streamIDs.take(); err != nil {
		return nil, err
	}
	if st.rows > 0 {
		if st.row, _, err = s.windows.take(st.rows); err != nil {
			s.streamIDs.give(st.id)
			return nil, fmt.Errorf("window: %w", err)
		}
	}
	for i := range st.rows {
		window, err := s.newWindow()
		if err != nil {
			return nil, errors.Join(err, s.dropStream(st))
		}
		s.staged.openWindows = append(s.staged.openWindows, window)
		s.staged.windows.add(st.row+i, uint32(window.FD()))
	}
	if err := s.maps.StreamHealth.Put(st.id, &bpf.RelayStreamHealth{}); err != nil {
		return nil, errors.Join(fmt.Errorf("write map stream_health: %w", err), s.dropStream(st))
	}
	state := bpf.RelayStreamState{Head: packet.FirstHead}
	if err := s.maps.StreamStates.Put(st.id, &state); err != nil {
		return nil, errors.Join(fmt.Errorf("write map stream_states: %w", err), s.dropStream(st))
	}
	if err := s.writeStream(st, settings); err != nil {
		return nil, errors.Join(err, s.dropStream(st))
	}
	return st, nil
}

func (l *Loader) newWindow() (*ebpf.Map, error) {
	spec := l.specs[bpf.RelayMapStreamWindows].InnerMap.Copy()
	spec.Name = "stream_window"
	window, err := ebpf.NewMap(spec)
	if err != nil {
		return nil, fmt.Errorf("make a window of %d words: %w", spec.MaxEntries, err)
	}
	return window, nil
}

func (l *Loader) writeStream(st *streamEntry, settings packet.Stream) error {
	value := encodeStream(settings, st.row)
	if err := l.maps.Streams.Put(st.id, &value); err != nil {
		return fmt.Errorf("write map streams: %w", err)
	}
	st.settings = settings
	return nil
}

// releaseStream is the inverse of useStream. When it releases the last leg, no program may still
// use the stream.
func (l *Loader) releaseStream(leg *flow.Leg) error {
	if leg == nil {
		return nil
	}
	st := l.streams[keyOf(leg)]
	if st == nil {
		return nil
	}
	if st.users--; st.users > 0 {
		return nil
	}
	delete(l.streams, keyOf(leg))
	return l.dropStream(st)
}

// dropStream frees the memory of a stream.
func (l *Loader) dropStream(st *streamEntry) error {
	err := errors.Join(l.emptyWindows(st.row, st.rows), l.maps.Streams.Put(st.id, &bpf.RelayStream{}))
	l.streamIDs.give(st.id)
	if st.rows > 0 {
		l.windows.give(st.row, st.rows)
	}
	return err
}

func (l *Loader) emptyWindows(row, rows uint32) error {
	return atOnce(int(rows), func(from, to int) error {
		var errs []error
		for i := from; i < to; i++ {
			if err := l.maps.StreamWindows.Delete(row + uint32(i)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				errs = append(errs, fmt.Errorf("clear map stream_windows: %w", err))
			}
		}
		return errors.Join(errs...)
	})
}

// encodeStream is the stream as the relay program reads it.
func encodeStream(s packet.Stream, row uint32) bpf.RelayStream {
	value := bpf.RelayStream{Kind: uint8(s.Kind), Watch: uint8(s.Watch), SilenceNs: uint64(s.Silence), BackNs: uint64(s.Back), FirstRow: row}
	if s.Format() == packet.StreamNone {
		return value
	}
	value.NumberMask, value.Slack, value.Clock = s.Mask(), s.Slack(), s.Clock
	value.Offset, value.Width, value.CountOffset, value.CountWidth = s.Offset, s.Width, s.CountOffset, s.CountWidth
	if s.Format() == packet.StreamMoldUDP64 {
		value.CountWidth = 2 // as in its header
	}
	if s.Little {
		value.Little = 1
	}
	if !s.Merges() {
		return value
	}
	value.SkewNs, value.ResetNs = uint64(s.Skew), uint64(s.Reset)
	value.WordMask = s.Window/32 - 1
	value.Bias, value.Behind, value.Ahead = s.Bias(), s.Behind(), s.Ahead()
	value.Shift = uint8(32 - s.Bits())
	if s.PassOther {
		value.PassOther = 1
	}
	return value
}

// isPlain says whether plain_next of bpf/include/stream.h judges the stream's packets (plain_settings).
func isPlain(s *packet.Stream) bool {
	switch {
	case s.Kind == packet.StreamFailover || s.Merges() && windowRows(*s) != 1:
		return false
	case s.Format() == packet.StreamField:
		return !s.Counts()
	}
	return s.Format() == packet.StreamRTP
}

// decodeStream is the inverse of encodeStream. It rejects values that no release writes.
func decodeStream(v *bpf.RelayStream) (packet.Stream, error) {
	s := packet.Stream{
		Kind: packet.StreamKind(v.Kind), Silence: time.Duration(v.SilenceNs), Back: time.Duration(v.BackNs),
		Skew: time.Duration(v.SkewNs), Reset: time.Duration(v.ResetNs), Watch: packet.StreamKind(v.Watch), Clock: v.Clock,
		Offset: v.Offset, Width: v.Width, CountOffset: v.CountOffset, CountWidth: v.CountWidth,
		Little: v.Little != 0, PassOther: v.PassOther != 0,
	}
	if s.Merges() {
		s.Window = 32 * (v.WordMask + 1)
	}
	if s.Format() == packet.StreamMoldUDP64 {
		s.CountWidth = 0
	}
	if err := s.Check(); err != nil {
		return s, err
	}
	if encodeStream(s, v.FirstRow) != *v {
		return s, errors.New("its settings contradict each other")
	}
	return s, nil
}

// streamOf sets the leg that a flow entry refers to.
func (p *referents) streamOf(e *entry, f *bpf.RelayFlow) error {
	if f.Stream == 0 {
		return nil
	}
	if int(f.Stream) >= len(p.streams) {
		return fmt.Errorf("stream %d: %w", f.Stream, ebpf.ErrKeyNotExist)
	}
	settings, err := decodeStream(&p.streams[f.Stream])
	if err != nil {
		return fmt.Errorf("stream %d: %w", f.Stream, err)
	}
	e.stream = uint32(f.Stream)
	if settings.Kind == packet.StreamSingle {
		e.rule.Leg = &flow.Leg{Of: e.rule.Name, Number: int(f.Leg), Settings: settings}
		return nil
	}
	name, _, ok := strings.Cut(e.rule.Name, flow.LegSeparator)
	if !ok {
		return fmt.Errorf("stream %d: the rule's name has no leg", f.Stream)
	}
	e.rule.Leg = &flow.Leg{Of: name, Number: int(f.Leg), Settings: settings}
	return nil
}

// adoptStreams restores the streams of the rules, and clears what a process left if it died between
// two steps.
func (l *Loader) adoptStreams() error {
	rows, err := readArray[bpf.RelayStream](l.maps.Streams, int(l.maps.Streams.MaxEntries()))
	if err != nil {
		return fmt.Errorf("read map streams: %w", err)
	}
	used := map[uint32]bool{0: true} // 0 is no stream
	var windows []extent
	for _, e := range l.rules {
		if e.stream == 0 {
			continue
		}
		key := keyOf(e.rule.Leg)
		st := l.streams[key]
		if st == nil {
			st = &streamEntry{id: e.stream, row: rows[e.stream].FirstRow, rows: windowRows(e.rule.Leg.Settings), settings: e.rule.Leg.Settings}
			l.streams[key], used[e.stream] = st, true
			if st.rows > 0 {
				windows = append(windows, extent{st.row, st.rows})
			}
		}
		if st.id != e.stream {
			return fmt.Errorf("rule %s is a leg of stream %d, others of the same of %d", e.rule.Name, e.stream, st.id)
		}
		st.users++
	}
	l.streamIDs.adopt(has(used))
	if err := l.windows.adopt(windows); err != nil {
		return fmt.Errorf("windows: %w", err)
	}
	for id := range rows {
		if v := &rows[id]; !used[uint32(id)] && *v != (bpf.RelayStream{}) {
			if s, err := decodeStream(v); err == nil && !overlaps(windows, v.FirstRow, windowRows(s)) {
				if err := l.emptyWindows(v.FirstRow, windowRows(s)); err != nil {
					return err
				}
			}
			if err := l.maps.Streams.Put(uint32(id), &bpf.RelayStream{}); err != nil {
				return fmt.Errorf("clear map streams: %w", err)
			}
		}
	}
	return nil
}

// overlaps says whether rows overlap any of the extents.
func overlaps(all []extent, first, n uint32) bool {
	for _, e := range all {
		if first < e.first+e.n && e.first < first+n {
			return true
		}
	}
	return false
}

// LegStats are the statistics of one leg of a stream, or of the only input of a watched flow.
type LegStats struct {
	Number int
	// Won counts packets that were the first with their number, or that arrived while the leg was
	// the passing one, and Others those without a number.
	Won, Others uint64
	// Active is set for the leg that passes with failover, and always for other kinds of stream.
	Active bool
	// From the leg's own numbers: how many it missed, repeated, or delivered out of order; jumps of
	// its numbers, and changes of its sender.
	Lost, Doubled, Reordered, Resets, Senders uint64
	// Differ counts copies that differed from the packet that passed with the same number; one
	// number in 64 is compared. Differs is set if the last one compared did.
	Differ  uint64
	Differs bool
	// Behind is by how many numbers the leg's last one trails the newest of the stream, and Bound
	// the largest distance at which its numbers are still distinct from those of the next wrap.
	Behind, Bound uint64
	// Jitter is the variation of packet arrival (RFC 3550 section A.8), sampled from two
	// consecutive packets at each tick of the kernel's clock: against the RTP timestamps if Stamped
	// is set, otherwise against the mean time between packets.
	Jitter  time.Duration
	Stamped bool
	// Lag is how long the leg trails the first copy of a number, averaged over samples; up to two
	// seconds.
	Lag time.Duration
	// LastSeen is the age of the last packet; negative if there was none.
	LastSeen time.Duration
}

// StreamStats are the statistics of a stream.
type StreamStats struct {
	Settings packet.Stream
	// Expected is how many numbers the stream had since it began, and Passed how many of them
	// passed. Lost are those that no leg delivered within the skew; younger ones may still arrive.
	// All are 0 if nothing is merged.
	Expected, Passed, Lost uint64
	// Restarts counts how often the sender restarted, or with failover how often another leg was
	// chosen.
	Restarts uint64
}

// readStream reads a leg and its stream.
func readStream(m *mapSet, e *entry) (*LegStats, *StreamStats, error) {
	if e.stream == 0 {
		return nil, nil, nil
	}
	var v bpf.RelayStreamState
	if err := m.StreamStates.Lookup(e.stream, &v); err != nil {
		return nil, nil, fmt.Errorf("read stream of rule %s: %w", e.rule.Name, err)
	}
	var h bpf.RelayStreamHealth
	if err := m.StreamHealth.Lookup(e.stream, &h); err != nil {
		return nil, nil, fmt.Errorf("read stream of rule %s: %w", e.rule.Name, err)
	}
	leg, all := statsOfStream(&v, &h, e.rule.Leg, monotonic())
	return leg, all, nil
}

// statsOfStream evaluates a stream's state at a time of the kernel's monotonic clock.
func statsOfStream(v *bpf.RelayStreamState, h *bpf.RelayStreamHealth, of *flow.Leg, now time.Duration) (*LegStats, *StreamStats) {
	s, number := of.Settings, of.Number
	all := &StreamStats{Settings: s, Restarts: v.Restarts}
	newest := v.Head
	for i := range v.Legs {
		switch {
		case !s.Merges():
		case s.Counts():
			all.Passed += v.Legs[i].Numbers
		default:
			all.Passed += v.Legs[i].Won
		}
		if p := v.Legs[i].Position; p > newest && p-newest < 32 {
			newest = p
		}
	}
	if s.Merges() && v.Start != 0 {
		all.Expected = v.Before + newest + 1 - v.Start
		if all.Lost = h.Lost; now-monotonicOf(v.PassNs) > 2*s.Skew {
			all.Lost = all.Expected - min(all.Expected, all.Passed) // nothing more can arrive
		}
	}
	if all.Restarts > 0 {
		all.Restarts-- // the first was the beginning
	}
	row, pulse := &v.Legs[number], &h.Legs[number]
	leg := &LegStats{
		Number: number, Won: row.Won, Others: row.Others, Active: s.Kind != packet.StreamFailover || v.Active == uint32(number) && v.SessionNs != 0,
		Lost: row.Lost, Doubled: row.Doubled, Reordered: row.Reordered, Resets: row.Resets, Senders: row.Senders, LastSeen: -1,
		Jitter: time.Duration(pulse.JitterNs >> 4), Stamped: pulse.JitterNs != 0 && pulse.GapNs == 0,
	}
	if s.Merges() {
		leg.Differ, leg.Differs = uint64(v.Differ[number]), v.Differs[number] != 0
		leg.Bound, leg.Lag = uint64(s.Behind()), time.Duration(pulse.LagNs>>3)
		if row.Position != 0 && row.Position >= v.Start {
			leg.Behind = newest - min(newest, row.Position)
		}
	}
	if row.SeenNs != 0 {
		leg.LastSeen = max(0, now-monotonicOf(row.SeenNs))
	}
	return leg, all
}

// Legs reads only the stream statistics of the named flows, for those that are legs or are watched.
func (l *Loader) Legs(names []string) (map[string]*RuleStats, error) {
	all := make(map[string]*RuleStats, len(names))
	for _, name := range names {
		e := l.rules[name]
		if e == nil || e.stream == 0 {
			continue
		}
		s := &RuleStats{Name: name, ID: e.id}
		var err error
		if s.Leg, s.Stream, err = readStream(l.maps, e); err != nil {
			return nil, err
		}
		all[name] = s
	}
	return all, nil
}

// readLeg reads the statistics of a leg and its stream.
func (t *tally) readLeg(m *mapSet) (err error) {
	t.leg, t.stream, err = readStream(m, t.entry)
	return err
}

// copyReason is the drop reason for copies of packets that other legs delivered.
func copyReason(e *entry) Reason {
	if e.rule.Leg != nil && e.rule.Leg.Settings.Kind == packet.StreamFailover {
		return Standby
	}
	return Duplicate
}
