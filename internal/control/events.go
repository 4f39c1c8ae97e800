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

// EventQuery says which events are wanted; the zero value: all that are kept.
type EventQuery struct {
	// After is the number of the event behind which they begin, and Since, unless it is zero,
	// the time; Tail, unless it is 0, is how many of them at most, the newest.
	After uint64
	Since time.Time
	Tail  int
	// Follow: those to come, too.
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
	// maxFollowers bounds how many clients follow at once, so that they leave connections to others.
	maxFollowers = DefaultMaxConns / 2
	// eventsAtOnce is how many events are written at a time.
	eventsAtOnce = 256
	// stallTime is how long a client may take nothing before it is cut off: it can come again and is
	// told what it has missed.
	stallTime = time.Minute
	// heartbeat is how often a stream of server-sent events has something, for the client to know
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

// readEventQuery reads what encode writes, and what a browser says of server-sent events.
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

// serveEvents answers with events, one a line as JSON, or as server-sent events where the request
// accepts these: they have the event's number for their id.
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
			s.fail(w, r, Errorf(KindUnavailable, "%d clients follow the events already", maxFollowers))
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

// stream writes an answer that goes on. Its time is not bounded as a whole, but each part of it is.
type stream struct {
	w       http.ResponseWriter
	control *http.ResponseController
	sse     bool
	text    []byte
}

func newStream(w http.ResponseWriter, sse bool) *stream {
	s := &stream{w: w, control: http.NewResponseController(w), sse: sse}
	// The server's bound is for requests that end.
	_ = s.control.SetReadDeadline(time.Time{})
	w.Header().Set("Content-Type", ndjsonType)
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Accel-Buffering", "no") // a proxy is not to hold it back
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

// wait waits for more events; false when there will be none, or the client is gone.
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

// Events calls each for every event that q asks for, in their order, until there are no more,
// each fails, or ctx ends; it returns the error of that. Without Follow the end is no error; with it
// the daemon has ended, or was too slow to tell, and the caller may ask again with the number of the last one.
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
