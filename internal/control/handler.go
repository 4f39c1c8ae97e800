package control

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
)

// endpoint handles one method of one path. It returns the value of the answer; nil means 204.
type endpoint struct {
	method string
	need   access
	query  []string // known query keys
	status int      // on success
	body   int64    // limit of the body in bytes; 0: MaxBody
	do     func(r *http.Request) (any, error)
}

// handler routes by path and then by method, so that a wrong method on a known path differs from an
// unknown path.
func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	for pattern, endpoints := range s.endpoints() {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			s.dispatch(w, r, endpoints)
		})
	}
	if s.opts.Metrics != nil {
		mux.HandleFunc("/v1/metrics", s.reading(nil, s.opts.Metrics.ServeHTTP))
	}
	if s.opts.Events != nil {
		mux.HandleFunc("/v1/events", s.reading(eventsQuery, s.serveEvents))
	}
	if s.opts.Tap != nil {
		mux.HandleFunc("/v1/rules/{name}/tap", s.serveTap)
	}
	mux.HandleFunc("/v1/export", s.reading([]string{queryOrigin}, s.serveExport))
	unknown := func(w http.ResponseWriter, r *http.Request) {
		s.fail(w, r, Errorf(KindNotFound, "no endpoint %s: this daemon speaks /v1/status, /v1/rules, /v1/groups, /v1/stats, /v1/events, /v1/explain, /v1/check, /v1/export, /v1/reload, /v1/confirm, /v1/history, /v1/rollback, /v1/upgrade", oneLine(r.URL.Path, 100)))
	}
	mux.HandleFunc("/", unknown)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// ServeMux would answer these itself: an invalid path with 400, and "//" or ".." in one
		// with a redirection to a page.
		if p := r.URL.EscapedPath(); r.RequestURI == "*" || path.Clean(p) != strings.TrimSuffix(p, "/") && p != "/" {
			unknown(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

func (s *Server) endpoints() map[string][]endpoint {
	get := func(do func(r *http.Request) (any, error)) endpoint {
		return endpoint{method: http.MethodGet, need: accessRead, status: http.StatusOK, do: do}
	}
	all := map[string][]endpoint{
		"/v1/status": {get(s.getStatus)},
		"/v1/rules": {
			get(s.getRules),
			{method: http.MethodPost, need: accessWrite, status: http.StatusCreated, body: maxRuleBody, do: s.postRule},
			{method: http.MethodPut, need: accessWrite, status: http.StatusOK, do: s.putRules, query: applyQuery},
		},
		"/v1/rules/{name}": {
			get(s.getRule),
			{method: http.MethodPut, need: accessWrite, status: http.StatusOK, body: maxRuleBody, do: s.putRule, query: applyQuery},
			{method: http.MethodDelete, need: accessWrite, status: http.StatusNoContent, do: s.deleteRule},
		},
		"/v1/groups":  {get(s.getGroups)},
		"/v1/stats":   {get(s.getStats)},
		"/v1/check":   {{method: http.MethodPost, need: accessRead, status: http.StatusOK, body: maxRuleBody, do: s.postCheck}},
		"/v1/explain": {{method: http.MethodGet, need: accessRead, status: http.StatusOK, do: s.getExplain, query: []string{"packet"}}},
		"/v1/reload":  {{method: http.MethodPost, need: accessWrite, status: http.StatusOK, do: s.postReload, query: applyQuery}},
		"/v1/confirm": {{method: http.MethodPost, need: accessWrite, status: http.StatusOK, do: s.postConfirm}},
		"/v1/history": {get(s.getHistory)},
		"/v1/rollback": {{
			method: http.MethodPost, need: accessWrite, status: http.StatusOK, do: s.postRollback, query: append([]string{queryBack}, applyQuery...),
		}},
	}
	if s.opts.Upgrade != nil {
		all["/v1/upgrade"] = []endpoint{{method: http.MethodPost, need: accessWrite, status: http.StatusOK, do: s.postUpgrade, query: []string{queryTimeout}}}
	}
	return all
}

func (s *Server) dispatch(w http.ResponseWriter, r *http.Request, endpoints []endpoint) {
	start := time.Now()
	e, err := choose(endpoints, r.Method)
	if err != nil {
		w.Header().Set("Allow", allow(endpoints))
		s.answerError(w, r, http.StatusMethodNotAllowed, err)
		return
	}
	if err := s.permit(r, e.need); err != nil {
		s.fail(w, r, err)
		return
	}
	if err := knownQuery(r, e.query); err != nil {
		s.fail(w, r, err)
		return
	}
	most := cmp.Or(e.body, MaxBody)
	if r.ContentLength > most {
		s.fail(w, r, Errorf(KindTooLarge, "body of %d bytes: want at most %d", r.ContentLength, most))
		return
	}
	r.Body = http.MaxBytesReader(w, r.Body, most) // for a body of unknown length
	value, err := e.do(r)
	if e.need == accessWrite {
		s.audit(r, time.Since(start), err)
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.answer(w, r, e.status, value)
}

// reading passes a request on if the peer may read and its query keys are known; nil: all.
func (s *Server) reading(query []string, serve http.HandlerFunc) http.HandlerFunc {
	only := []endpoint{{method: http.MethodGet, need: accessRead}}
	return func(w http.ResponseWriter, r *http.Request) {
		if _, err := choose(only, r.Method); err != nil {
			w.Header().Set("Allow", allow(only))
			s.answerError(w, r, http.StatusMethodNotAllowed, err)
			return
		}
		err := s.permit(r, accessRead)
		if err == nil && query != nil {
			err = knownQuery(r, query)
		}
		if err != nil {
			s.fail(w, r, err)
			return
		}
		serve(w, r)
	}
}

func choose(endpoints []endpoint, method string) (endpoint, error) {
	if method == http.MethodHead {
		method = http.MethodGet // net/http omits the body
	}
	for _, e := range endpoints {
		if e.method == method {
			return e, nil
		}
	}
	return endpoint{}, Errorf(KindInvalid, "method %s is not for this endpoint: use %s", oneLine(method, 20), allow(endpoints))
}

func allow(endpoints []endpoint) string {
	var methods []string
	for _, e := range endpoints {
		methods = append(methods, e.method)
	}
	return strings.Join(methods, ", ")
}

// permit checks the peer's access against that required by the endpoint.
func (s *Server) permit(r *http.Request, need access) error {
	if s.allow != nil {
		return s.allow(r, need)
	}
	c, ok := connOf(r.Context())
	if !ok {
		return Errorf(KindForbidden, "the peer's credentials are unknown: connect through the unix socket")
	}
	if c.access >= need {
		return nil
	}
	owner := "root is"
	if s.uid != 0 {
		owner = fmt.Sprintf("root or uid %d (the daemon's own) is", s.uid)
	}
	switch {
	case need == accessWrite:
		return Errorf(KindForbidden, "uid %d may not change rules: %s needed", c.peer.uid, owner)
	case len(s.opts.ReadGroups) > 0:
		return Errorf(KindForbidden, "uid %d may not read: %s needed, or membership of group %s", c.peer.uid, owner, join(s.opts.ReadGroups, " or "))
	default:
		return Errorf(KindForbidden, "uid %d may not read: %s needed", c.peer.uid, owner)
	}
}

func join(gids []uint32, sep string) string {
	var words []string
	for _, g := range gids {
		words = append(words, strconv.FormatUint(uint64(g), 10))
	}
	return strings.Join(words, sep)
}

// knownQuery refuses unknown query keys: a misspelt dry_run must not make the change.
func knownQuery(r *http.Request, known []string) error {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return Errorf(KindInvalid, "query %q: %w", oneLine(r.URL.RawQuery, 100), err)
	}
	for key, values := range query {
		if !slices.Contains(known, key) {
			return Errorf(KindInvalid, "unknown query key %q", oneLine(key, 100))
		}
		if len(values) > 1 {
			return Errorf(KindInvalid, "query key %q is given %d times: want at most once", key, len(values))
		}
	}
	return nil
}

// audit logs who requested a change.
func (s *Server) audit(r *http.Request, took time.Duration, err error) {
	args := []any{"method", r.Method, "path", oneLine(r.URL.Path, 200), "took", took}
	if c, ok := connOf(r.Context()); ok {
		args = append(args, "uid", c.peer.uid, "pid", c.peer.pid)
	}
	if err != nil {
		s.opts.Log.Warn("control request failed", append(args, "kind", kindOf(err), "err", err)...)
		return
	}
	s.opts.Log.Info("control request", args...)
}

func (s *Server) getStatus(r *http.Request) (any, error) {
	v, err := s.backend.Status(r.Context())
	v.fill()
	return v, err
}

func (s *Server) getRules(r *http.Request) (any, error) {
	v, err := s.backend.Rules(r.Context())
	for i := range v {
		v[i].fill()
	}
	return orEmpty(v), err
}

func (s *Server) getRule(r *http.Request) (any, error) {
	v, err := s.backend.Rule(r.Context(), r.PathValue("name"))
	v.fill()
	return v, err
}

func (s *Server) postRule(r *http.Request) (any, error) {
	rule, err := decodeRule(r.Body)
	if err != nil {
		return nil, err
	}
	v, err := s.backend.AddRule(r.Context(), rule)
	v.fill()
	return v, err
}

func (s *Server) deleteRule(r *http.Request) (any, error) {
	return nil, s.backend.DeleteRule(r.Context(), r.PathValue("name"))
}

func (s *Server) putRules(r *http.Request) (any, error) {
	o, err := applyOptions(r)
	if err != nil {
		return nil, err
	}
	all, err := readRules(r)
	if err != nil {
		return nil, err
	}
	v, err := s.backend.Apply(r.Context(), all, o)
	v.fill()
	return v, err
}

func (s *Server) getGroups(r *http.Request) (any, error) {
	v, err := s.backend.Groups(r.Context())
	for i := range v {
		v[i].Rules = orEmpty(v[i].Rules)
	}
	return orEmpty(v), err
}

func (s *Server) getStats(r *http.Request) (any, error) {
	v, err := s.backend.Stats(r.Context())
	v.fill()
	return v, err
}

func (s *Server) getExplain(r *http.Request) (any, error) {
	packet := r.URL.Query().Get("packet")
	if packet == "" {
		return nil, Errorf(KindInvalid, "packet is missing: write ?packet=ENDPOINT or ?packet=NAME")
	}
	v, err := s.backend.Explain(r.Context(), packet)
	v.fill()
	return v, err
}

func (s *Server) postReload(r *http.Request) (any, error) {
	o, err := applyOptions(r)
	if err != nil {
		return nil, err
	}
	v, err := s.backend.Reload(r.Context(), o)
	v.fill()
	return v, err
}

func (s *Server) postConfirm(r *http.Request) (any, error) {
	return s.backend.Confirm(r.Context())
}

func (s *Server) getHistory(r *http.Request) (any, error) {
	v, err := s.backend.History(r.Context())
	return orEmpty(v), err
}

func (s *Server) postRollback(r *http.Request) (any, error) {
	o, err := applyOptions(r)
	if err != nil {
		return nil, err
	}
	back := 1
	if v := r.URL.Query().Get(queryBack); v != "" {
		if back, err = strconv.Atoi(v); err != nil || back < 0 {
			return nil, Errorf(KindInvalid, "query key %s is %q: must be a number from 0", queryBack, oneLine(v, 100))
		}
	}
	v, err := s.backend.Rollback(r.Context(), back, o)
	v.fill()
	return v, err
}

func (s *Server) postUpgrade(r *http.Request) (any, error) {
	timeout := DefaultUpgradeTimeout
	if v := r.URL.Query().Get(queryTimeout); v != "" {
		var err error
		if timeout, err = ParseUpgradeTimeout(v); err != nil {
			return nil, Errorf(KindInvalid, "query key %s: %w", queryTimeout, err)
		}
	}
	return s.opts.Upgrade(context.WithoutCancel(r.Context()), timeout)
}

// ParseUpgradeTimeout parses the time limit for a new daemon to become ready.
func ParseUpgradeTimeout(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d < time.Second || d > MaxUpgradeTimeout {
		return 0, fmt.Errorf("%.100q: want a time from 1s to %v, such as 20s", s, MaxUpgradeTimeout)
	}
	return d, nil
}

// Query keys of ApplyOptions, and of a rollback.
const (
	queryDryRun     = "dry_run"
	queryMaxChanges = "max_changes"
	queryConfirm    = "confirm"
	queryRevision   = "revision"
	queryBack       = "back"
	queryTimeout    = "timeout"
)

var applyQuery = []string{queryDryRun, queryMaxChanges, queryConfirm, queryRevision}

func applyOptions(r *http.Request) (o ApplyOptions, err error) {
	if o.DryRun, err = boolQuery(r, queryDryRun); err != nil {
		return o, err
	}
	if v := r.URL.Query().Get(queryMaxChanges); v != "" {
		if o.MaxChanges, err = strconv.Atoi(v); err != nil || o.MaxChanges < 1 {
			return o, Errorf(KindInvalid, "query key %s is %q: must be a number from 1", queryMaxChanges, oneLine(v, 100))
		}
	}
	if v := r.URL.Query().Get(queryConfirm); v != "" {
		if o.Confirm, err = ParseConfirm(v); err != nil {
			return o, Errorf(KindInvalid, "query key %s: %w", queryConfirm, err)
		}
	}
	o.Revision = r.URL.Query().Get(queryRevision)
	if o.DryRun && o.Confirm > 0 {
		return o, Errorf(KindInvalid, "query keys %s and %s together: a dry run has nothing to confirm", queryDryRun, queryConfirm)
	}
	return o, nil
}

// ParseConfirm parses the time for confirming a change.
func ParseConfirm(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d < MinConfirm || d > MaxConfirm {
		return 0, fmt.Errorf("%.100q: want a time from %v to %.0fh, such as 2m", s, MinConfirm, MaxConfirm.Hours())
	}
	return d, nil
}

func boolQuery(r *http.Request, key string) (bool, error) {
	switch v := r.URL.Query().Get(key); v {
	case "", "false":
		return false, nil
	case "true":
		return true, nil
	default:
		return false, Errorf(KindInvalid, "query key %s is %q: must be true or false", key, oneLine(v, 100))
	}
}

func (s *Server) fail(w http.ResponseWriter, r *http.Request, err error) {
	s.answerError(w, r, (&Error{Kind: kindOf(err)}).status(), err)
}

func (s *Server) answerError(w http.ResponseWriter, r *http.Request, status int, err error) {
	s.opts.Log.Debug("control request refused", "method", oneLine(r.Method, 20), "path", oneLine(r.URL.Path, 200), "err", err)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(errorBody(err)) // a disconnected client needs no answer
}

func (s *Server) answer(w http.ResponseWriter, r *http.Request, status int, value any) {
	if value == nil {
		w.WriteHeader(status)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(value); err != nil {
		s.opts.Log.Debug("control answer not sent", "path", oneLine(r.URL.Path, 200), "err", err)
	}
}

// errorAnswer is the body of every error answer.
type errorAnswer struct {
	Error string `json:"error"`
	Kind  Kind   `json:"kind"`
}

// maxErrorText limits an error's text in bytes: a set of 100,000 rules can have as many faults.
const maxErrorText = 8 << 10

func errorBody(err error) []byte {
	body, _ := json.Marshal(errorAnswer{Error: oneLine(err.Error(), maxErrorText), Kind: kindOf(err)}) // two strings: cannot fail
	return append(body, '\n')
}

// oneLine puts s, which may have any source, on one line of at most max bytes and a mark if it is
// truncated.
func oneLine(s string, max int) string {
	s = strings.TrimRight(s, "\r\n")
	cut := len(s) > max
	if cut {
		s = s[:max]
	}
	s = strings.Map(func(r rune) rune {
		if r != '\n' && (r < ' ' || r == 0x7f) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "")) // truncating may have split a rune
	s = strings.ReplaceAll(s, "\n", "; ")
	if cut {
		s += " ..."
	}
	return s
}
