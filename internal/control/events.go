package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"xdpcast/internal/events"
)

// Event is a change of state, see package events.
type Event = events.Event

// EventQuery selects events; the zero value selects all stored ones.
type EventQuery struct {
	// After is an event number: only later events; Since, unless it is zero, a time; Tail, unless
	// it is 0, limits the result to the newest.
	After uint64
	Since time.Time
	Tail  int
	// Follow continues with new events.
	Follow bool
}

// Query keys of EventQuery.
const (
	querySince  = "since"
	queryTail   = "tail"
	queryFollow = "follow"
)

var eventsQuery = []string{querySince, queryTail, queryFollow}

const (
	ndjsonType = "application/x-ndjson"
	sseType    = "text/event-stream"
	// maxFollowers limits simultaneous followers, so that connections remain for other clients.
	maxFollowers = DefaultMaxConns / 2
	// eventsAtOnce is the number of events per write.
	eventsAtOnce = 256
	// stallTime is how long a client may read nothing before it is disconnected: it can reconnect,
	// and is told what it missed.
	stallTime = time.Minute
	// heartbeat is the longest silence of a stream of server-sent events, so that the client knows
	// that it is alive.
	heartbeat = 10 * time.Second
)

func (q EventQuery) encode() string {
	v := url.Values{}
	switch {
	case !q.Since.IsZero():
		v.Set(querySince, q.Since.UTC().Format(time.RFC3339Nano))
	case q.After > 0:
		v.Set(querySince, strconv.FormatUint(q.After, 10))
	}
	if q.Tail > 0 {
		v.Set(queryTail, strconv.Itoa(q.Tail))
	}
	if q.Follow {
		v.Set(queryFollow, "true")
	}
	return v.Encode()
}

// readEventQuery parses the output of encode, and a browser's Last-Event-ID.
func readEventQuery(r *http.Request) (q EventQuery, err error) {
	if q.Follow, err = boolQuery(r, queryFollow); err != nil {
		return q, err
	}
	values := r.URL.Query()
	since := values.Get(querySince)
	if wantsSSE(r) {
		q.Follow = true
		if last := r.Header.Get("Last-Event-ID"); last != "" {
			since = last
		}
	}
	if since != "" {
		var noNumber, noTime error
		if q.After, noNumber = strconv.ParseUint(since, 10, 64); noNumber != nil {
			if q.Since, noTime = time.Parse(time.RFC3339Nano, since); noTime != nil {
				return q, Errorf(KindInvalid, "query key %s is %q: must be the number of an event, or a time such as 2026-01-31T09:00:00Z", querySince, oneLine(since, 100))
			}
		}
	}
	if tail := values.Get(queryTail); tail != "" {
		if q.Tail, err = strconv.Atoi(tail); err != nil || q.Tail < 1 {
			return q, Errorf(KindInvalid, "query key %s is %q: must be a number from 1", queryTail, oneLine(tail, 100))
		}
	}
	return q, nil
}

func wantsSSE(r *http.Request) bool { return strings.Contains(r.Header.Get("Accept"), sseType) }

// serveEvents answers with events, one a line as JSON, or as server-sent events if the request
// accepts these; their id is the event's number.
func (s *Server) serveEvents(w http.ResponseWriter, r *http.Request) {
	q, err := readEventQuery(r)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	q.Follow = q.Follow && r.Method != http.MethodHead
	if q.Follow {
		if s.followers.Add(1) > maxFollowers {
			s.followers.Add(-1)
			s.fail(w, r, Errorf(KindUnavailable, "%d clients already follow the events", maxFollowers))
			return
		}
		defer s.followers.Add(-1)
	}
	log := s.opts.Events
	after := q.After
	if !q.Since.IsZero() {
		after = log.Before(q.Since)
	}
	reader := log.ReadAfter(after)
	if q.Tail > 0 {
		reader.Skip(uint64(q.Tail))
	}
	out := newStream(w, wantsSSE(r))
	buf := make([]events.Event, 0, eventsAtOnce)
	for {
		for {
			all := reader.Next(buf)
			if len(all) == 0 {
				break
			}
			if err := out.events(all); err != nil {
				return
			}
		}
		if !q.Follow {
			return
		}
		if err := out.flush(); err != nil {
			return
		}
		switch more, err := out.wait(r.Context(), reader); {
		case err != nil:
			return
		case !more:
			return
		}
	}
}

// stream writes an endless answer. Each write has a timeout, the whole has none.
type stream struct {
	w       http.ResponseWriter
	control *http.ResponseController
	sse     bool
	text    []byte
}

func newStream(w http.ResponseWriter, sse bool) *stream {
	s := &stream{w: w, control: http.NewResponseController(w), sse: sse}
	// The server's timeout is for requests that end.
	_ = s.control.SetReadDeadline(time.Time{})
	w.Header().Set("Content-Type", ndjsonType)
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Accel-Buffering", "no") // proxies must not buffer
	if sse {
		w.Header().Set("Content-Type", sseType)
	}
	w.WriteHeader(http.StatusOK)
	return s
}

func (s *stream) events(all []events.Event) error {
	s.text = s.text[:0]
	for i := range all {
		line, err := json.Marshal(&all[i])
		if err != nil {
			return err
		}
		if !s.sse {
			s.text = append(append(s.text, line...), '\n')
			continue
		}
		if n := all[i].Number; n > 0 {
			s.text = fmt.Appendf(s.text, "id: %d\n", n)
		}
		s.text = fmt.Appendf(s.text, "event: event\ndata: %s\n\n", line)
	}
	return s.write(s.text)
}

func (s *stream) write(text []byte) error {
	_ = s.control.SetWriteDeadline(time.Now().Add(stallTime))
	_, err := s.w.Write(text)
	return err
}

func (s *stream) flush() error {
	_ = s.control.SetWriteDeadline(time.Now().Add(stallTime))
	return s.control.Flush()
}

// wait waits for more events; false if there will be none, or the client has disconnected.
func (s *stream) wait(ctx context.Context, r *events.Reader) (more bool, err error) {
	for {
		beat, cancel := context.WithTimeout(ctx, heartbeat)
		more = r.Wait(beat)
		late := beat.Err() != nil && ctx.Err() == nil
		cancel()
		if more || !late {
			return more, ctx.Err()
		}
		if s.sse {
			if err := errors.Join(s.write([]byte(": alive\n\n")), s.flush()); err != nil {
				return false, err
			}
		}
	}
}

// Events calls each for every event that q selects, in order, until there are no more, each fails,
// or ctx ends; it returns the error of the latter two. Without Follow the end is no error; with it
// an error means that the daemon ended, or disconnected a slow client, and the caller may continue
// after the last number.
func (c *Client) Events(ctx context.Context, q EventQuery, each func(Event) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	path := "/v1/events"
	if query := q.encode(); query != "" {
		path += "?" + query
	}
	req, err := request(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	endless := c.http
	endless.Timeout = 0
	resp, err := endless.Do(req)
	if err != nil {
		return c.transportError(ctx, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		return c.answeredError(resp.StatusCode, resp.Body)
	}
	lines := bufio.NewReader(resp.Body)
	for {
		line, err := lines.ReadBytes('\n')
		switch {
		case errors.Is(err, io.EOF) && len(line) == 0:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			return Errorf(KindUnavailable, "events from %s: %w", c.socket, err)
		}
		var e Event
		if err := json.Unmarshal(line, &e); err != nil {
			return Errorf(KindUnavailable, "events from %s: %w", c.socket, err)
		}
		if err := each(e); err != nil {
			return err
		}
	}
}
