package web

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"

	"xdpcast/internal/control"
	"xdpcast/internal/labtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const token = "0123456789abcdef"

// relay is a backend with rules whose counters tests set.
type relay struct {
	control.Backend
	mu      sync.Mutex
	rules   []control.RuleStatus
	reads   int
	changed []string
	err     error
}

func (r *relay) Status(context.Context) (control.Status, error) {
	return control.Status{Version: "v1", Rules: len(r.rules)}, r.err
}

func (r *relay) Stats(context.Context) (control.Stats, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reads++
	return control.Stats{Rules: append([]control.RuleStatus{}, r.rules...)}, r.err
}

func (r *relay) Rules(context.Context) ([]control.RuleStatus, error) { return r.rules, r.err }

func (r *relay) DeleteRule(_ context.Context, name string) error {
	r.changed = append(r.changed, name)
	return nil
}

func (r *relay) set(name, state string, packets uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range r.rules {
		if r.rules[i].Name == name {
			r.rules[i].State, r.rules[i].Matched.Packets = state, packets
			return
		}
	}
	r.rules = append(r.rules, control.RuleStatus{Rule: control.Rule{Name: name, In: "239.1.1.1:5000%eth0", Out: []string{"239.2.2.2:6000%eth1"}}, State: state, Matched: control.Counter{Packets: packets}})
}

// page serves a relay until the test ends.
func page(t *testing.T, r *relay, token string) string {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	metrics := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "metrics") })
	s := httptest.NewServer(Handler(Options{Context: ctx, Backend: r, Metrics: metrics, Token: token, Names: []string{"relay.example"}}))
	t.Cleanup(func() {
		cancel()
		s.Close()
	})
	return s.URL
}

// serve serves a handler until the test ends.
func serve(t *testing.T, h http.Handler) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

func ask(t *testing.T, method, url string, headers map[string]string) (*http.Response, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range headers {
		r.Header.Set(name, value)
		if name == "Host" {
			r.Host = value
		}
	}
	answer, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer, string(text)
}

// TestFiles: every file that the page refers to is embedded, and none has inline scripts or styles.
func TestFiles(t *testing.T) {
	url := page(t, &relay{}, "")
	entries, err := static.ReadDir("static")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		path := "/" + e.Name()
		if path == "/index.html" {
			path = "/"
		}
		answer, text := ask(t, http.MethodGet, url+path, nil)
		if answer.StatusCode != http.StatusOK || text == "" {
			t.Errorf("%s: %d", path, answer.StatusCode)
		}
		policy := answer.Header.Get("Content-Security-Policy")
		if !strings.HasPrefix(policy, "default-src 'none'") || strings.Contains(policy, "unsafe") || answer.Header.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s: %v", path, answer.Header)
		}
		for _, forbidden := range []string{"innerHTML", "<style", "style=\"", "onclick=\"", "http://xdpcast", "https://"} {
			if strings.Contains(text, forbidden) {
				t.Errorf("%s has %s", path, forbidden)
			}
		}
		for line := range strings.Lines(text) {
			if _, file, ok := strings.Cut(line, ` from "./`); ok {
				if _, err := static.ReadFile("static/" + strings.TrimSuffix(strings.TrimSpace(file), `";`)); err != nil {
					t.Errorf("%s: %v", path, err)
				}
			}
		}
	}
}

// TestForeign: requests with foreign host names or from pages of other sites are refused.
func TestForeign(t *testing.T) {
	r := &relay{}
	url := page(t, r, token)
	for _, tt := range []struct {
		headers map[string]string
		code    int
	}{
		{nil, 200},
		{map[string]string{"Host": "localhost:1"}, 200},
		{map[string]string{"Host": "[::1]:9464"}, 200},
		{map[string]string{"Host": "10.1.2.3"}, 200},
		{map[string]string{"Host": "Relay.Example:9464"}, 200},
		{map[string]string{"Host": "evil.example"}, 403},
		{map[string]string{"Host": "localhost.evil.example:9464"}, 403},
		{map[string]string{"Host": "127.0.0.1.evil.example"}, 403},
		{map[string]string{"Origin": "http://evil.example"}, 403},
		{map[string]string{"Origin": "null"}, 403},
		{map[string]string{"Origin": url}, 200},
		{map[string]string{"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403},
		{map[string]string{"Sec-Fetch-Site": "same-origin"}, 200},
		{map[string]string{"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200}, // a link
	} {
		for _, path := range []string{"/", "/metrics", "/v1/status", "/v1/live", "/v1/rules"} {
			answer, text := ask(t, http.MethodGet, url+path, tt.headers)
			if answer.StatusCode != tt.code {
				t.Errorf("%s %v: %d %s, want %d", path, tt.headers, answer.StatusCode, text, tt.code)
			}
			if answer.Header.Get("Access-Control-Allow-Origin") != "" {
				t.Errorf("%s: others may read it", path)
			}
		}
	}
	headers := map[string]string{"Origin": "http://evil.example", "Authorization": "Bearer " + token}
	if answer, _ := ask(t, http.MethodDelete, url+"/v1/rules/a", headers); answer.StatusCode != 403 || len(r.changed) > 0 {
		t.Errorf("%d, changed %v", answer.StatusCode, r.changed)
	}
}

// TestToken: no request changes anything without the token.
func TestToken(t *testing.T) {
	r := &relay{}
	locked, open := page(t, r, ""), page(t, r, token)
	changes := [][2]string{{"POST", "/v1/rules"}, {"PUT", "/v1/rules"}, {"PUT", "/v1/rules?dry_run=true"}, {"PUT", "/v1/rules/a"}, {"DELETE", "/v1/rules/a"},
		{"POST", "/v1/reload"}, {"POST", "/v1/confirm"}, {"POST", "/v1/rollback"}}
	for _, c := range changes {
		for given, url := range map[string]string{"": open, "Bearer ": open, "Bearer " + token[1:]: open, "Bearer " + token + "x": open, token: open, "Basic " + token: open, "Bearer  ": locked, "Bearer " + token: locked} {
			answer, text := ask(t, c[0], url+c[1], map[string]string{"Authorization": given})
			if answer.StatusCode != http.StatusForbidden || !strings.Contains(text, `"kind":"forbidden"`) {
				t.Errorf("%v with %q: %d %s", c, given, answer.StatusCode, text)
			}
		}
	}
	if len(r.changed) > 0 {
		t.Errorf("changed %v", r.changed)
	}
	if answer, text := ask(t, http.MethodDelete, open+"/v1/rules/a", map[string]string{"Authorization": "Bearer " + token}); answer.StatusCode != http.StatusNoContent || len(r.changed) != 1 {
		t.Errorf("%d %s, changed %v", answer.StatusCode, text, r.changed)
	}
}

func TestReadToken(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	for _, tt := range []struct {
		text string
		mode os.FileMode
		want string // of the error; empty for none
	}{
		{token + "\n", 0o600, ""}, {token, 0o640, ""}, {token, 0o644, "everybody may read it"}, {"short", 0o600, "want one token of 16 or more"},
		{"two tokens of letters", 0o600, "want one token"}, {strings.Repeat("x", 5000), 0o600, "want one token"}, {"", 0o600, "EOF"},
	} {
		if err := os.WriteFile(path, []byte(tt.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, tt.mode); err != nil {
			t.Fatal(err)
		}
		got, err := ReadToken(path)
		if tt.want == "" && (err != nil || got != token) || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%.30q %o: %q, %v", tt.text, tt.mode, got, err)
		}
	}
}

// TestLive: a page gets all rules, and then the changes; many pages cost no more than one.
func TestLive(t *testing.T) {
	r := &relay{}
	r.set("a", "active", 1)
	r.set("b", "active", 1)
	url := page(t, r, "")
	var streams []*bufio.Reader
	for range 5 {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url+"/v1/live", nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("Accept", "text/event-stream")
		answer, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(request)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { answer.Body.Close() })
		streams = append(streams, bufio.NewReader(answer.Body))
	}
	next := func(stream *bufio.Reader) (m live) {
		t.Helper()
		for {
			line, err := stream.ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			if data, ok := strings.CutPrefix(line, "data: "); ok {
				if err := json.Unmarshal([]byte(data), &m); err != nil {
					t.Fatal(err)
				}
				return m
			}
		}
	}
	for i, stream := range streams {
		if m := next(stream); !m.All || len(m.Rules) != 2 || m.Counters["a"][0] != 1 {
			t.Errorf("page %d: %+v", i, m)
		}
	}
	r.set("a", "pending", 1)
	r.set("b", "active", 7)
	for i, stream := range streams {
		states, packets := "", uint64(0)
		for states == "" || packets == 0 { // the changes may come in two messages
			m := next(stream)
			if m.All {
				t.Errorf("page %d gets all again", i)
			}
			for _, rule := range m.Rules {
				states += rule.Name + " " + rule.State
			}
			packets += m.Counters["b"][0]
		}
		if states != "a pending" || packets != 7 {
			t.Errorf("page %d: %q, %d", i, states, packets)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.reads > 10 {
		t.Errorf("%d readings for 5 pages and some messages", r.reads)
	}
}

// TestSince: messages with changes add up to the full state.
func TestSince(t *testing.T) {
	r := &relay{}
	h := newHub(Options{Context: t.Context(), Backend: r})
	var before *sample
	shown, counters := map[string]string{}, map[string]liveCounters{}
	for step := range 50 {
		if step%7 == 3 {
			r.rules = r.rules[1:]
		}
		r.set(string(rune('a'+step%9)), []string{"active", "pending"}[step%2], uint64(step))
		s, err := h.read(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		m := s.live
		if before != nil {
			m = s.since(before)
		}
		before = s
		for _, rule := range m.Rules {
			shown[rule.Name] = rule.State
		}
		for name, c := range m.Counters {
			counters[name] = c
		}
		for _, name := range m.Gone {
			delete(shown, name)
			delete(counters, name)
		}
		if len(shown) != len(r.rules) {
			t.Fatalf("step %d: %d rules, want %d", step, len(shown), len(r.rules))
		}
		for i := range r.rules {
			if shown[r.rules[i].Name] != r.rules[i].State || counters[r.rules[i].Name][0] != r.rules[i].Matched.Packets {
				t.Fatalf("step %d: rule %s", step, r.rules[i].Name)
			}
		}
	}
}

func TestLiveFails(t *testing.T) {
	r := &relay{err: control.Errorf(control.KindUnavailable, "the relay is busy")}
	answer, text := ask(t, http.MethodGet, page(t, r, "")+"/v1/live", nil)
	if answer.StatusCode != http.StatusServiceUnavailable || !strings.Contains(text, "the relay is busy") {
		t.Errorf("%d %s", answer.StatusCode, text)
	}
}

// TestAnswersAreLimited: however many clients ask for the rules, few answers are in memory at a time, also
// if they do not read them. Changes and streams do not wait for them.
func TestAnswersAreLimited(t *testing.T) {
	hold := make(chan struct{})
	var now, most atomic.Int32
	handler := make(limit, maxAnswers).of(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if n := now.Add(1); r.Method == http.MethodGet {
			most.Store(max(most.Load(), n))
			<-hold
		}
		now.Add(-1)
	}))
	url := serve(t, handler)
	var asking sync.WaitGroup
	for range 3 * maxAnswers {
		asking.Go(func() {
			if answer, _ := ask(t, http.MethodGet, url, nil); answer.StatusCode != http.StatusOK && answer.StatusCode != http.StatusServiceUnavailable {
				t.Errorf("%d", answer.StatusCode)
			}
		})
	}
	labtest.Eventually(t, "all turns are taken", func() bool { return now.Load() == maxAnswers })
	if answer, _ := ask(t, http.MethodPut, url, nil); answer.StatusCode != http.StatusOK {
		t.Errorf("a change: %d", answer.StatusCode)
	}
	close(hold)
	asking.Wait()
	if n := most.Load(); n > maxAnswers {
		t.Errorf("%d at a time, want at most %d", n, maxAnswers)
	}
}
