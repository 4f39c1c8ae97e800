package events

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

const (
	// Kept is how many events are kept in memory, and Saved how many of them in the file.
	Kept  = 10_000
	Saved = 1_000
	// maxBytes bounds the memory of the events kept: less than Kept of them if they are long.
	maxBytes = 8 << 20

	// Events of a kind are logged one by one as long as no more than burst come at once, and perSecond
	// go on coming. Those beyond are counted by state, and a single event for each is logged every
	// sumPause: a link with 12,000 rules that flaps must not take the place of all else.
	burst     = 1_000
	perSecond = 10
	sumPause  = time.Second
)

// Options configures a Log; the zero value is good.
type Options struct {
	// File has the newest events for the next process; empty for none.
	File string
	// Logger is told when the file cannot be read or written; nil: nobody.
	Logger *slog.Logger

	// Now is the clock; nil: time.Now.
	Now func() time.Time
}

// Log keeps events. Its methods may be called from any goroutine, and on a nil Log, which keeps
// nothing. Run brings what was added before readers.
type Log struct {
	opts Options
	file *file // nil for none; Run's alone

	mu    sync.Mutex
	ring  []Event // by number modulo Kept
	first uint64  // the oldest kept; last+1 when none is
	last  uint64  // the newest
	bytes int
	rates map[Kind]*rate

	shown  uint64        // the newest that readers may see: the file has it
	news   chan struct{} // closed when there are more, or the log ends
	ended  bool
	signal chan struct{} // has Run look

	suspend chan chan struct{} // has Run save everything, close the file, and answer
	resume  chan struct{}
}

// rate is how many events of a kind may be logged one by one, and those that were too many.
type rate struct {
	count  uint64
	tokens float64
	at     time.Time
	held   []*Event // a sum for each state, the first one first
}

// Open reads what an earlier process has saved. A file that cannot be read is no reason to stop a
// daemon: it is logged, and the numbers begin anew.
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

// restore takes up an event of the file; numbers that do not follow each other begin anew.
func (l *Log) restore(e *Event) {
	if e.Number != l.last+1 {
		clear(l.ring)
		l.first, l.bytes = e.Number, 0
	}
	l.last = e.Number - 1
	l.put(e)
}

// Add logs a change of state now. It takes the event's time, number and sum for its own.
func (l *Log) Add(e Event) { l.add(e, false) }

// Sum is Add for an event that is one of perhaps very many of no interest by themselves: a
// single event is logged for all of one kind and state.
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
	// What comes behind a sum must not come before it.
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

// rate returns a kind's, with the tokens that it has now.
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

// maxSums bounds how many states of a kind are summed apart; there are not so many.
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

// release logs the sums.
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

// drop forgets the oldest event.
func (l *Log) drop() {
	oldest := &l.ring[l.first%Kept]
	l.bytes -= oldest.size()
	*oldest = Event{}
	l.first++
}

// Run writes what is added to the file and then shows it to readers, until ctx ends; after
// that they are told that there is no more. What a reader has seen is in the file, so that
// its number is never given again, not even after the process was killed.
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
			_ = l.file.close() // it was written
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

// Suspend has Run, which must be running, write everything to the file and leave it to another
// process: what is added from now on is neither saved nor shown before Resume.
func (l *Log) Suspend() {
	if l == nil {
		return
	}
	done := make(chan struct{})
	l.suspend <- done
	<-done
}

// Resume ends what Suspend began: the file is this process's again, and is written anew.
func (l *Log) Resume() {
	if l != nil {
		l.resume <- struct{}{}
	}
}

// show saves what was added since the last time, and lets readers see it; with everything also
// what is held.
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

// copy appends the events from first to last, which are kept.
func (l *Log) copy(to []Event, first, last uint64) []Event {
	for n := first; n <= last; n++ {
		to = append(to, l.ring[n%Kept])
	}
	return to
}

// Last returns the number of the newest event, 0 when there was none.
func (l *Log) Last() uint64 {
	if l == nil {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.shown
}

// Before returns the number of the newest event that is older than t; that of the one before the
// oldest kept when none is.
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
	return l.first - 1
}

// Counts returns how many changes there were since Open, by kind, those in sums one by one.
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

// Reader reads a log event by event. It is for one goroutine.
type Reader struct {
	log   *Log
	after uint64
}

// ReadAfter returns a reader of the events behind number after.
func (l *Log) ReadAfter(after uint64) *Reader { return &Reader{log: l, after: after} }

// Next appends events to buf as long as its capacity suffices, and returns it; none when
// there are no more yet. Where some are not kept any more, and where the log has begun anew since
// the number that was read last, the first one is of KindMissed.
func (r *Reader) Next(buf []Event) []Event {
	l := r.log
	if l == nil || cap(buf)-len(buf) < 2 {
		return buf
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case r.after > l.shown:
		buf = append(buf, Event{Time: l.opts.Now(), Kind: KindMissed, Cause: "the numbers have begun anew"})
		r.after = l.first - 1
	case r.after+1 < l.first:
		buf = append(buf, Event{Time: l.opts.Now(), Kind: KindMissed, Count: l.first - 1 - r.after})
		r.after = l.first - 1
	}
	last := min(l.shown, r.after+uint64(cap(buf)-len(buf)))
	buf = l.copy(buf, r.after+1, last)
	r.after = last
	return buf
}

// Skip leaves out all but the newest keep events, and returns how many it has left out.
func (r *Reader) Skip(keep uint64) (left uint64) {
	if last := r.log.Last(); last > r.after+keep {
		left, r.after = last-keep-r.after, last-keep
	}
	return left
}

// Wait waits for more events than were read. It returns false when there will be none, or ctx has ended.
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
