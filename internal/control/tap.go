package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"xdpcast/internal/tap"
)

// TapQuery selects the packets to tap.
type TapQuery struct {
	Rule string
	tap.Options
	// Count limits the number of packets; 0: no limit.
	Count uint64
}

// Tapper records packets of a rule until ctx ends or q.Count is reached. It calls start once it is
// certain to begin, and writes a pcapng file to its result: an error before that changes nothing.
type Tapper func(ctx context.Context, q TapQuery, start func() io.Writer) error

const pcapngType = "application/x-pcapng"

// Query keys of TapQuery.
const (
	queryIn      = "in"
	queryOut     = "out"
	queryDropped = "dropped"
	querySample  = "sample"
	querySnap    = "snap"
	queryCount   = "count"
)

var tapQuery = []string{queryIn, queryOut, queryDropped, querySample, querySnap, queryCount}

const allSlots = "all"

func (q TapQuery) encode() string {
	v := url.Values{}
	v.Set(queryIn, strconv.FormatBool(q.In))
	v.Set(queryDropped, strconv.FormatBool(q.Dropped))
	v.Set(querySample, strconv.FormatUint(uint64(q.Sample), 10))
	v.Set(querySnap, strconv.FormatUint(uint64(q.Snap), 10))
	v.Set(queryCount, strconv.FormatUint(q.Count, 10))
	v.Set(queryOut, formatSlots(q.Slots))
	return v.Encode()
}

func formatSlots(slots uint64) string {
	if slots == tap.AllSlots {
		return allSlots
	}
	var words []string
	for slot := range 64 {
		if slots>>slot&1 == 1 {
			words = append(words, strconv.Itoa(slot))
		}
	}
	return strings.Join(words, ",")
}

// ParseSlots parses "0,2", "all", or "" for none.
func ParseSlots(text string) (slots uint64, err error) {
	switch text {
	case "":
		return 0, nil
	case allSlots:
		return tap.AllSlots, nil
	}
	for word := range strings.SplitSeq(text, ",") {
		slot, err := strconv.ParseUint(word, 10, 8)
		if err != nil || slot > 63 {
			return 0, fmt.Errorf("slot %.20q: want a number from 0 to 63, or all", word)
		}
		slots |= 1 << slot
	}
	return slots, nil
}

// readTapQuery parses the output of encode. An empty query selects everything.
func readTapQuery(r *http.Request) (q TapQuery, err error) {
	values := r.URL.Query()
	q.Rule, q.Options = r.PathValue("name"), tap.Everything
	if values.Has(queryIn) || values.Has(queryOut) || values.Has(queryDropped) {
		if q.In, err = boolQuery(r, queryIn); err != nil {
			return q, err
		}
		if q.Dropped, err = boolQuery(r, queryDropped); err != nil {
			return q, err
		}
		if q.Slots, err = ParseSlots(values.Get(queryOut)); err != nil {
			return q, Errorf(KindInvalid, "query key %s: %w", queryOut, err)
		}
	}
	for key, to := range map[string]*uint32{querySample: &q.Sample, querySnap: &q.Snap} {
		if text := values.Get(key); text != "" {
			n, err := strconv.ParseUint(text, 10, 32)
			if err != nil {
				return q, Errorf(KindInvalid, "query key %s is %q: must be a number", key, oneLine(text, 100))
			}
			*to = uint32(n)
		}
	}
	if text := values.Get(queryCount); text != "" {
		if q.Count, err = strconv.ParseUint(text, 10, 64); err != nil {
			return q, Errorf(KindInvalid, "query key %s is %q: must be a number", queryCount, oneLine(text, 100))
		}
	}
	return q, Wrap(KindInvalid, q.Check())
}

// serveTap answers with packets until the request's body ends, or the client disconnects: its last
// block counts lost packets. Packets may be confidential: peers without write access may not tap.
func (s *Server) serveTap(w http.ResponseWriter, r *http.Request) {
	only := []endpoint{{method: http.MethodPost, need: accessWrite}}
	if _, err := choose(only, r.Method); err != nil {
		w.Header().Set("Allow", allow(only))
		s.answerError(w, r, http.StatusMethodNotAllowed, err)
		return
	}
	err := s.permit(r, accessWrite)
	if err == nil {
		err = knownQuery(r, tapQuery)
	}
	var q TapQuery
	if err == nil {
		q, err = readTapQuery(r)
	}
	control := http.NewResponseController(w)
	if err != nil {
		s.refuseTap(w, r, control, err)
		return
	}
	begin := time.Now()
	// The timeouts are for requests that end; each write has its own.
	if err := errors.Join(control.EnableFullDuplex(), control.SetReadDeadline(time.Time{})); err != nil {
		s.fail(w, r, err)
		return
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	started := false
	err = s.opts.Tap(ctx, q, func() io.Writer {
		started = true
		go func() {
			defer cancel()
			_, _ = io.Copy(io.Discard, r.Body) // until it ends, or the client disconnects
		}()
		w.Header().Set("Content-Type", pcapngType)
		w.Header().Set("Cache-Control", "no-store")
		w.WriteHeader(http.StatusOK)
		return &tapStream{w, control}
	})
	s.audit(r, time.Since(begin), err)
	if err != nil && !started {
		s.refuseTap(w, r, control, err)
	}
	// Ends the wait for the body.
	_ = control.SetReadDeadline(time.Now())
}

// refuseTap answers a tap that cannot begin. It first reads the first byte of the body, which the
// client sends with its header: a client whose write fails with EPIPE, because the connection is
// already closed, never reads the answer.
func (s *Server) refuseTap(w http.ResponseWriter, r *http.Request, control *http.ResponseController, refused error) {
	_ = control.SetReadDeadline(time.Now().Add(tapRefusalGrace))
	_, _ = r.Body.Read(make([]byte, 1))
	s.fail(w, r, refused)
}

// tapRefusalGrace limits refuseTap's wait for clients that send a body late.
const tapRefusalGrace = time.Second

// tapStream flushes each write at once, and gives a client a minute for it.
type tapStream struct {
	w       http.ResponseWriter
	control *http.ResponseController
}

func (s *tapStream) Write(p []byte) (int, error) {
	_ = s.control.SetWriteDeadline(time.Now().Add(stallTime))
	n, err := s.w.Write(p)
	return n, errors.Join(err, s.control.Flush())
}

// Tap copies the packets that q selects to out, in whole blocks, until the count is reached or ctx
// ends; then it reads the rest from the daemon. It returns how many packets were written, and how
// many the tap lost. Errors of out are returned unchanged.
func (c *Client) Tap(ctx context.Context, q TapQuery, out io.Writer) (packets, lost uint64, err error) {
	path, err := rulePath(q.Rule)
	if err != nil {
		return 0, 0, err
	}
	// The daemon stops at the end of the body; the call itself is cancelled only if it does not end
	// soon afterwards.
	call, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	body, end := io.Pipe()
	defer end.Close()
	stop := context.AfterFunc(ctx, func() {
		end.Close()
		time.AfterFunc(tapGrace, cancel)
	})
	defer stop()
	// net/http sends the header with the first bytes of the body.
	begun := io.MultiReader(strings.NewReader("\n"), body)
	req, err := http.NewRequestWithContext(call, http.MethodPost, "http://xdpcast"+path+"/tap?"+q.encode(), begun)
	if err != nil {
		return 0, 0, fmt.Errorf("control: %w", err)
	}
	endless := c.http
	endless.Timeout = 0
	resp, err := endless.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return 0, 0, nil
		}
		return 0, 0, c.transportError(ctx, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		return 0, 0, c.answeredError(resp.StatusCode, resp.Body)
	}
	var r tap.Reader
	var written *writeError
	err = r.Copy(&failing{out}, resp.Body)
	switch {
	case errors.As(err, &written):
		return r.Packets, r.Lost, written.err
	case errors.Is(err, io.EOF), call.Err() != nil:
		return r.Packets, r.Lost, nil
	}
	return r.Packets, r.Lost, Errorf(KindUnavailable, "packets from %s: %w", c.socket, err)
}

// tapGrace is how long a client waits for the last packets.
const tapGrace = 5 * time.Second

// failing marks the errors of a writer.
type failing struct{ io.Writer }

func (f *failing) Write(p []byte) (int, error) {
	n, err := f.Writer.Write(p)
	if err != nil {
		err = &writeError{err}
	}
	return n, err
}

type writeError struct{ err error }

func (e *writeError) Error() string { return e.err.Error() }
func (e *writeError) Unwrap() error { return e.err }
