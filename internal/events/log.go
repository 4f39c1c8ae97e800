package events

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

const (
	// Kept is the number of events in memory, and Saved that in the file.
	Kept  = 10_000
	Saved = 1_000
	// maxBytes limits the memory of the events: fewer than Kept of them if they are long.
	maxBytes = 8 << 20

	// Events of a kind are logged individually in bursts of up to burst, or perSecond sustained.
	// Those beyond are counted by state, and every sumPause a single event for each state is
	// logged: a flapping link with 12,000 rules must not displace everything else.
	burst     = 1_000
	perSecond = 10
	sumPause  = time.Second
)

// Options configures a Log; the zero value is usable.
type Options struct {
	// File stores the newest events for the next process; empty for none.
	File string
	// Logger receives errors of reading or writing the file; nil discards them.
	Logger *slog.Logger

	// Now is the clock; nil: time.Now.
	Now func() time.Time
}

// Log stores events. Its methods may be called from any goroutine, and on a nil Log, which stores
// nothing. Run delivers added events to readers.
type Log struct {
	opts Options
	file *file // nil for none; used only by Run

	mu    sync.Mutex
	ring  []Event // indexed by number modulo Kept
	first uint64  // the oldest stored; last+1 if there is none
	last  uint64  // the newest
	bytes int
	rates map[Kind]*rate

	shown  uint64        // the newest visible to readers: the file has it
	news   chan struct{} // closed when there are more, or the log ends
	ended  bool
	signal chan struct{} // wakes Run

	suspend chan chan struct{} // asks Run to save everything, close the file, and answer
	resume  chan struct{}
}

// rate limits the events of a kind that are logged individually, and sums up the others.
type rate struct {
	count  uint64
	tokens float64
	at     time.Time
	held   []*Event // a summary for each state, the first one first
}

// Open reads the events saved by an earlier process. An unreadable file does not stop the daemon:
// it is logged, and the numbers start again.
func Open(o Options) *Log {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	l := &Log{opts: o, ring: make([]Event, Kept), first: 1, rates: map[Kind]*rate{}, news: make(chan struct{}), signal: make(chan struct{}, 1),
		suspend: make(chan chan struct{}), resume: make(chan struct{})}
	if o.File != "" {
		saved, err := readFile(o.File)
		if err != nil {
			o.Logger.Warn("events of before cannot be read", "error", err)
		}
		for i := range saved {
			l.restore(&saved[i])
		}
		l.shown = l.last
		l.file = &file{path: o.File, lines: saved}
	}
	return l
}

// restore adds an event of the file; if its number is not consecutive, the log starts again with
// it.
func (l *Log) restore(e *Event) {
	if e.Number != l.last+1 {
		clear(l.ring)
		l.first, l.bytes = e.Number, 0
	}
	l.last = e.Number - 1
	l.put(e)
}

// Add logs a change of state now. It sets the event's time, number and count.
func (l *Log) Add(e Event) { l.add(e, false) }

// Sum is Add for one of possibly very many uninteresting events: a single event is logged for all
// of one kind and state.
func (l *Log) Sum(e Event) { l.add(e, true) }

func (l *Log) add(e Event, sum bool) {
	if l == nil {
		return
	}
	e.bound()
	e.Count, e.Last = 0, ""
	l.mu.Lock()
	e.Time = l.opts.Now()
	r := l.rate(e.Kind, e.Time)
	r.count++
	// An event after a summary must not be logged before it.
	if !sum && len(r.held) == 0 && r.tokens >= 1 {
		r.tokens--
		l.number(&e)
	} else {
		r.hold(&e)
	}
	l.mu.Unlock()
	select {
	case l.signal <- struct{}{}:
	default:
	}
}

// rate returns a kind's rate, with its current tokens.
func (l *Log) rate(kind Kind, now time.Time) *rate {
	r := l.rates[kind]
	if r == nil {
		r = &rate{tokens: burst, at: now}
		l.rates[kind] = r
	}
	if d := now.Sub(r.at); d > 0 {
		r.tokens = min(burst, r.tokens+perSecond*d.Seconds())
	}
	r.at = now
	return r
}

// maxSums limits the states of a kind that are summed up separately; there are fewer.
const maxSums = 32

func (r *rate) hold(e *Event) {
	for i, s := range r.held {
		if s.State == e.State || i == maxSums-1 {
			s.Count++
			s.Last = e.Subject()
			s.Time = e.Time
			return
		}
	}
	e.Count, e.Last = 1, e.Subject()
	held := *e
	r.held = append(r.held, &held)
}

// release logs the summaries.
func (l *Log) release() {
	for _, kind := range Kinds() {
		r := l.rates[kind]
		if r == nil {
			continue
		}
		for _, e := range r.held {
			if e.Count == 1 {
				e.Count, e.Last = 0, ""
			}
			l.number(e)
		}
		r.held = nil
	}
}

func (l *Log) holding() bool {
	for _, r := range l.rates {
		if len(r.held) > 0 {
			return true
		}
	}
	return false
}

func (l *Log) number(e *Event) {
	e.Number = l.last + 1
	l.put(e)
}

func (l *Log) put(e *Event) {
	if l.last-l.first+1 == Kept {
		l.drop()
	}
	l.last = e.Number
	l.ring[e.Number%Kept] = *e
	l.bytes += e.size()
	for l.bytes > maxBytes {
		l.drop()
	}
}

// drop discards the oldest event.
func (l *Log) drop() {
	oldest := &l.ring[l.first%Kept]
	l.bytes -= oldest.size()
	*oldest = Event{}
	l.first++
}

// Run writes added events to the file and then shows them to readers, until ctx ends; then readers
// get the end. Every event that a reader has seen is in the file, so its number is never reused,
// even if the process is killed.
func (l *Log) Run(ctx context.Context) {
	pause := time.NewTicker(sumPause)
	defer pause.Stop()
	for {
		l.show(false)
		l.mu.Lock()
		ticks := pause.C
		if !l.holding() {
			ticks = nil
		}
		l.mu.Unlock()
		select {
		case <-ctx.Done():
			l.show(true)
			l.file.close()
			l.end()
			return
		case done := <-l.suspend:
			l.show(true)
			_ = l.file.close() // already written
			close(done)
			select {
			case <-l.resume:
			case <-ctx.Done():
				l.end()
				return
			}
		case <-l.signal:
		case <-ticks:
			l.mu.Lock()
			l.release()
			l.mu.Unlock()
		}
	}
}

// Suspend makes Run, which must be running, write everything to the file and leave it to another
// process: events added later are neither saved nor shown before Resume.
func (l *Log) Suspend() {
	if l == nil {
		return
	}
	done := make(chan struct{})
	l.suspend <- done
	<-done
}

// Resume ends Suspend: the file belongs to this process again, and is rewritten.
func (l *Log) Resume() {
	if l != nil {
		l.resume <- struct{}{}
	}
}

// show saves events added since the last call, and shows them to readers; with everything also
// pending summaries.
func (l *Log) show(everything bool) {
	l.mu.Lock()
	if everything {
		l.release()
	}
	last := l.last
	from := max(l.first, l.shown+1)
	if last-l.shown > Saved {
		from = max(l.first, last-Saved+1)
	}
	var fresh []Event
	if l.file != nil {
		fresh = l.copy(nil, from, last)
	}
	l.mu.Unlock()
	if last == l.shown {
		return
	}
	if l.file != nil {
		l.file.append(fresh, l.opts.Logger)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.shown = last
	close(l.news)
	l.news = make(chan struct{})
}

func (l *Log) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
	close(l.news)
}

// copy appends the stored events from first to last.
func (l *Log) copy(to []Event, first, last uint64) []Event {
	for n := first; n <= last; n++ {
		to = append(to, l.ring[n%Kept])
	}
	return to
}

// Last returns the number of the newest event, 0 if there was none.
func (l *Log) Last() uint64 {
	if l == nil {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.shown
}

// Before returns the number of the newest event that is older than t; the number before the oldest
// stored one if none is.
func (l *Log) Before(t time.Time) uint64 {
	if l == nil {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for n := l.shown; n >= l.first; n-- {
		if l.ring[n%Kept].Time.Before(t) {
			return n
		}
	}
	return l.gone()
}

// gone is the number of the newest event that readers may know of, and that is discarded. Events may be
// discarded before they are shown: these count as missed once they would have been.
func (l *Log) gone() uint64 { return min(l.first-1, l.shown) }

// Counts returns the number of changes since Open, by kind, including summarized ones.
func (l *Log) Counts() map[Kind]uint64 {
	counts := map[Kind]uint64{}
	if l == nil {
		return counts
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for kind, r := range l.rates {
		counts[kind] = r.count
	}
	return counts
}

// Reader reads a log event by event. It is not for concurrent use.
type Reader struct {
	log   *Log
	after uint64
}

// ReadAfter returns a reader of the events after number after.
func (l *Log) ReadAfter(after uint64) *Reader { return &Reader{log: l, after: after} }

// Next appends events to buf up to its capacity, and returns it; none if there are no more yet. If
// some were discarded, or if the log has started again since the last number read, the first one is
// of KindMissed.
func (r *Reader) Next(buf []Event) []Event {
	l := r.log
	if l == nil || cap(buf)-len(buf) < 2 {
		return buf
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case r.after > l.shown:
		buf = append(buf, Event{Time: l.opts.Now(), Kind: KindMissed, Cause: "event numbers were restarted"})
		r.after = l.gone()
	case r.after < l.gone():
		buf = append(buf, Event{Time: l.opts.Now(), Kind: KindMissed, Count: l.gone() - r.after})
		r.after = l.gone()
	}
	last := min(l.shown, r.after+uint64(cap(buf)-len(buf)))
	buf = l.copy(buf, r.after+1, last)
	r.after = last
	return buf
}

// Skip skips all but the newest keep events, and returns how many it skipped.
func (r *Reader) Skip(keep uint64) (left uint64) {
	if last := r.log.Last(); last > r.after+keep {
		left, r.after = last-keep-r.after, last-keep
	}
	return left
}

// Wait waits for more events. It returns false if there will be none, or ctx has ended.
func (r *Reader) Wait(ctx context.Context) bool {
	l := r.log
	if l == nil {
		<-ctx.Done()
		return false
	}
	for {
		l.mu.Lock()
		news, more, ended := l.news, l.shown != r.after, l.ended
		l.mu.Unlock()
		switch {
		case more:
			return true
		case ended:
			return false
		}
		select {
		case <-ctx.Done():
			return false
		case <-news:
		}
	}
}
