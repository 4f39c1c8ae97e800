package web

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"xdpcast/internal/control"
)

// liveRule is the part of a rule in the page's list that seldom changes.
type liveRule struct {
	Name   string   `json:"name"`
	In     string   `json:"in"`
	Out    []string `json:"out"`
	Origin string   `json:"origin"`
	State  string   `json:"state"`
	Reason string   `json:"reason,omitempty"`
	Path   string   `json:"path,omitempty"`
}

// liveCounters are matched packets and bytes, sent packets and bytes, dropped packets.
type liveCounters [5]uint64

// live is a message to the page: everything, or the changes since the previous message.
type live struct {
	Time time.Time `json:"time"`
	// All: Rules has all rules. Otherwise it has the new and changed ones, and Gone names removed
	// ones.
	All      bool                    `json:"all"`
	Every    float64                 `json:"every"` // seconds between messages
	Rules    []*liveRule             `json:"rules"`
	Gone     []string                `json:"gone,omitempty"`
	Counters map[string]liveCounters `json:"counters"`
	Status   control.Status          `json:"status"`
	Drops    []control.Drop          `json:"drops"`
	Unsent   []control.TransmitDrop  `json:"unsent"`
	Lost     []control.ReceiveDrop   `json:"lost"`
	// History is in the first message to a page.
	History *pastRates `json:"history,omitempty"`
}

const (
	// Pages are updated every second; with many rules less often, since reading them takes time.
	liveEvery     = time.Second
	liveManyRules = 2_000 // one second more per this many rules, up to
	liveMost      = 5 * time.Second
	// liveShare bounds the fraction of time spent reading: 1/liveShare.
	liveShare = 10
	// liveBehind is how many messages a page may lag before it is disconnected, and reconnects.
	liveBehind = 4
	// liveTimeout bounds one reading, and stallTime a write to a page.
	liveTimeout = 20 * time.Second
	stallTime   = 20 * time.Second
	maxPages    = 64
)

// hub reads the relay for all open pages, and not at all without one.
type hub struct {
	o       Options
	history *history // nil: none is kept

	mu      sync.Mutex
	pages   map[chan []byte]bool // true once sent a full message
	running bool
	last    *sample // nil before the first
}

// sample is one reading.
type sample struct {
	live
	byName map[string]*liveRule
	every  time.Duration
}

// newHub returns a hub that keeps a history until the context ends, if o.Matched is set.
func newHub(o Options) *hub {
	h := &hub{o: o, pages: map[chan []byte]bool{}}
	if o.Matched != nil {
		h.history = newHistory(historyStep)
		go h.history.run(o.Context, o.Matched)
	}
	return h
}

// ServeHTTP streams messages as server-sent events if the request accepts them. Otherwise it
// returns one full message, with ?history including the rates of the last minutes.
func (h *hub) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !wantsStream(r) {
		s, err := h.fresh(r.Context())
		if err != nil {
			control.ServeJSON(w, nil, err)
			return
		}
		m := s.live
		if r.URL.Query().Has("history") && h.history != nil {
			m.History = h.history.tell()
		}
		control.ServeJSON(w, m, nil)
		return
	}
	page := make(chan []byte, liveBehind)
	if !h.join(page) {
		control.ServeJSON(w, nil, control.Errorf(control.KindUnavailable, "%d pages are open already", maxPages))
		return
	}
	defer h.leave(page)
	rc := http.NewResponseController(w)
	_ = rc.SetReadDeadline(time.Time{}) // the server's timeout is for requests that end
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("X-Accel-Buffering", "no")
	beat := time.NewTicker(stallTime / 2)
	defer beat.Stop()
	for {
		_ = rc.SetWriteDeadline(time.Now().Add(stallTime))
		if rc.Flush() != nil {
			return
		}
		text := []byte(": alive\n\n")
		select {
		case <-r.Context().Done():
			return
		case <-h.o.Context.Done():
			return
		case message, ok := <-page:
			if !ok {
				return // the page was too slow
			}
			text = fmt.Appendf(nil, "event: live\ndata: %s\n\n", message)
		case <-beat.C:
		}
		_ = rc.SetWriteDeadline(time.Now().Add(stallTime))
		if _, err := w.Write(text); err != nil {
			return
		}
	}
}

func wantsStream(r *http.Request) bool {
	return strings.Contains(r.Header.Get("Accept"), "text/event-stream")
}

func (h *hub) join(page chan []byte) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.pages) >= maxPages {
		return false
	}
	h.pages[page] = false
	if !h.running {
		h.running = true
		go h.run()
	}
	return true
}

func (h *hub) leave(page chan []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.pages, page)
}

// run updates pages until none are open.
func (h *hub) run() {
	for {
		started := time.Now()
		s, err := h.read(h.o.Context)
		pause := liveEvery
		if err == nil {
			pause = max(s.every, liveShare*time.Since(started))
			h.tell(s)
		} else {
			h.o.Log.Debug("page", "error", err)
		}
		h.mu.Lock()
		if len(h.pages) == 0 || h.o.Context.Err() != nil {
			h.running = false
			h.mu.Unlock()
			return
		}
		h.mu.Unlock()
		select {
		case <-h.o.Context.Done():
		case <-time.After(pause):
		}
	}
}

// tell sends changes to pages. A page that has not taken the previous messages is disconnected.
func (h *hub) tell(s *sample) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var all, changes []byte
	for page, begun := range h.pages {
		message := &changes
		if !begun || h.last == nil {
			message = &all
		}
		if *message == nil {
			m := s.live
			switch {
			case message == &changes:
				m = s.since(h.last)
			case h.history != nil:
				m.History = h.history.tell()
			}
			*message, _ = json.Marshal(m) // texts and numbers: cannot fail
		}
		select {
		case page <- *message:
			h.pages[page] = true
		default:
			close(page)
			delete(h.pages, page)
		}
	}
	h.last = s
}

// fresh returns a reading no older than the update interval of pages.
func (h *hub) fresh(ctx context.Context) (*sample, error) {
	h.mu.Lock()
	last := h.last
	h.mu.Unlock()
	if last != nil && time.Since(last.Time) < last.every {
		return last, nil
	}
	s, err := h.read(ctx)
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.pages) == 0 {
		h.last = s
	}
	return s, nil
}

func (h *hub) read(ctx context.Context) (*sample, error) {
	ctx, cancel := context.WithTimeout(ctx, liveTimeout)
	defer cancel()
	status, err := h.o.Backend.Status(ctx)
	if err != nil {
		return nil, err
	}
	stats, err := h.o.Backend.Stats(ctx)
	if err != nil {
		return nil, err
	}
	status.Fill() // the page needs lists, even empty ones
	stats.Fill()
	s := &sample{byName: make(map[string]*liveRule, len(stats.Rules)), every: min(liveMost, liveEvery+time.Second*time.Duration(len(stats.Rules)/liveManyRules))}
	s.live = live{
		Time: time.Now(), All: true, Every: s.every.Seconds(), Rules: make([]*liveRule, 0, len(stats.Rules)), Counters: make(map[string]liveCounters, len(stats.Rules)),
		Status: status, Drops: stats.Drops, Unsent: stats.TransmitDrops, Lost: stats.ReceiveDrops,
	}
	for i := range stats.Rules {
		r := &stats.Rules[i]
		rule := &liveRule{Name: r.Name, In: r.In, Out: r.Out, Origin: r.Origin, State: r.State, Reason: r.Reason, Path: r.UsedPath}
		c := liveCounters{r.Matched.Packets, r.Matched.Bytes, 0, 0, control.Dropped(r.Drops)}
		for j := range r.Outputs {
			c[2] += r.Outputs[j].Sent.Packets
			c[3] += r.Outputs[j].Sent.Bytes
			c[4] += control.Dropped(r.Outputs[j].Drops)
		}
		s.Rules, s.byName[r.Name], s.Counters[r.Name] = append(s.Rules, rule), rule, c
	}
	return s, nil
}

// since returns the changes since an earlier sample.
func (s *sample) since(before *sample) live {
	m := s.live
	m.All, m.Rules, m.Counters = false, []*liveRule{}, map[string]liveCounters{}
	for _, r := range s.Rules {
		if old := before.byName[r.Name]; old == nil || !old.equal(r) {
			m.Rules = append(m.Rules, r)
		}
		if c := s.Counters[r.Name]; before.Counters[r.Name] != c {
			m.Counters[r.Name] = c
		}
	}
	for _, r := range before.Rules {
		if s.byName[r.Name] == nil {
			m.Gone = append(m.Gone, r.Name)
		}
	}
	return m
}

func (r *liveRule) equal(o *liveRule) bool {
	return r.In == o.In && slices.Equal(r.Out, o.Out) && r.Origin == o.Origin && r.State == o.State && r.Reason == o.Reason && r.Path == o.Path
}
