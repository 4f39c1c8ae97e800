package metrics

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"go.uber.org/goleak"

	"xdpcast/internal/control"
	"xdpcast/internal/labtest"
)

var update = flag.Bool("update", false, "write docs/metrics.md and the golden files instead of comparing")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// relay is a backend that returns what it is given.
type relay struct {
	control.Backend // nil: methods that no metric uses
	status          control.Status
	stats           control.Stats
	groups          []control.Group
	err, reload     error
}

func (r *relay) Status(context.Context) (control.Status, error)      { return r.status, r.err }
func (r *relay) Stats(context.Context) (control.Stats, error)        { return r.stats, r.err }
func (r *relay) Groups(context.Context) ([]control.Group, error)     { return r.groups, r.err }
func (r *relay) Rules(context.Context) ([]control.RuleStatus, error) { return r.stats.Rules, r.err }
func (r *relay) Reload(context.Context, control.ApplyOptions) (control.ApplyResult, error) {
	return control.ApplyResult{}, r.reload
}

var (
	start = time.Unix(1_700_000_000, 0)
	seen  = time.Unix(1_700_000_100, 500_000_000)
)

func full() *relay {
	return &relay{
		status: control.Status{
			Version: "1.2.3", Schema: 9, Started: start, Ready: true, Rules: 3, Active: 1, Pending: 1, Failed: 1, Warnings: []string{"w"},
			Interfaces: []control.InterfaceStatus{
				{Name: "eth0", Mode: "native", JoinsAttempted: 5, JoinsSucceeded: 3, JoinsFailed: 2, LeavesAttempted: 4, LeavesSucceeded: 3, LeavesFailed: 1,
					IGMP: &control.Multicast{Querier: "10.0.0.254", QuerierSeen: &seen, Queries: 17}, MLD: &control.Multicast{}},
				{Name: "eth1"},
			},
			Workers: []control.Worker{
				{Interface: "eth0", Path: "afxdp", Queue: 0, State: "active", Received: 70, Failures: 1},
				{Interface: "eth0", Path: "afxdp", Queue: 1, State: "down"},
			},
			Mroutes: &control.MrouteStatus{Entries: 40, Accelerated: 38, Left: []control.MroutesLeft{{Reason: "the kernel's own", Entries: 2}}},
		},
		stats: control.Stats{
			Rules: []control.RuleStatus{
				{Rule: control.Rule{Name: "cam1", In: "239.1.1.1:5000%eth0"}, Origin: "file", State: "active", UsedPath: "kernel",
					Matched: control.Counter{Packets: 10, Bytes: 1000}, LastSeen: &seen,
					Drops: []control.Drop{{Reason: "loop", Counter: control.Counter{Packets: 1, Bytes: 100}}},
					Notes: []control.Drop{{Reason: "echo", Counter: control.Counter{Packets: 4, Bytes: 400}}},
					Outputs: []control.OutputStatus{
						{Slot: 0, Interface: "eth1", State: "active", Sent: control.Counter{Packets: 9, Bytes: 900}},
						{Slot: 1, Interface: "eth2", State: "no_neighbour", Drops: []control.Drop{{Reason: "no_neighbour", Counter: control.Counter{Packets: 9, Bytes: 900}}}},
					}},
				{Rule: control.Rule{Name: "idle", In: "239.1.1.2:5000%eth0", Merge: "rtp"}, Origin: "api", State: "pending", Reason: "interface eth9 not found",
					Outputs: []control.OutputStatus{{Slot: 0, State: "pending"}},
					Stream:  &control.StreamStatus{Expected: 1000, Lost: 3, Restarts: 2},
					Inputs: []control.InputStatus{
						{Input: "239.1.1.1:5000%eth0", Leg: &control.LegStatus{Won: 700, Lost: 12, Doubled: 1, Reordered: 2, Resets: 3, Senders: 4, Behind: 0, Bound: 49151, Jitter: 0.00025, JitterBy: control.JitterByTimestamps, LastSeen: &seen}},
						{Input: "239.1.1.2:5000%eth1", Matched: control.Counter{Packets: 998, Bytes: 99800},
							Drops: []control.Drop{{Reason: "duplicate", Counter: control.Counter{Packets: 701, Bytes: 70100}}}, Leg: &control.LegStatus{Won: 297, Lost: 8, Different: 5, Behind: 20, Bound: 49151, Lag: 0.02}},
						{Input: "239.1.1.3:5000%eth2", State: "pending"},
					}},
			},
			Passed: control.Counter{Packets: 3, Bytes: 300}, PassedBroadcast: control.Counter{Packets: 2, Bytes: 200}, Fragments: control.Fragments{First: control.Counter{Packets: 1}, Orphan: control.Counter{Packets: 2}},
			Drops:         []control.Drop{{Reason: "loop", Counter: control.Counter{Packets: 7}}},
			TransmitDrops: []control.TransmitDrop{{Interface: "eth1", Reason: "driver", Packets: 2}},
			ReceiveDrops:  []control.ReceiveDrop{{Interface: "eth0", Path: "afxdp", Loss: control.Loss{Reason: "ring_full", Packets: 6}}},
		},
		groups: []control.Group{{Interface: "eth0", State: control.GroupJoined}, {Interface: "eth0", State: control.GroupFailed}},
	}
}

func newCollector(r *relay, rules string) *collector {
	selected, err := ParseSelection(rules)
	if err != nil {
		panic(err)
	}
	return &collector{definitions: newDefinitions(), backend: Observe(r), selected: selected, timeout: time.Minute}
}

func golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got), write it anew with -update:\n%s", file, diff)
	}
}

func get(t *testing.T, h http.Handler, path string) (int, string) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w.Code, w.Body.String()
}

// own returns the lines of our metrics: those of Go and the process are not ours to fix.
func own(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if strings.Contains(line, "xdpcast_") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// TestExposition compares every metric and its value with a golden page.
func TestExposition(t *testing.T) {
	b := Observe(full())
	b.now = func() time.Time { return time.Unix(1_700_000_200, 0) }
	if _, err := b.Reload(t.Context(), control.ApplyOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Reload(t.Context(), control.ApplyOptions{DryRun: true}); err != nil {
		t.Fatal(err)
	}
	code, text := get(t, Handler(b, Options{}), "/metrics")
	if code != http.StatusOK {
		t.Fatalf("%d: %s", code, text)
	}
	golden(t, "testdata/metrics.txt", own(text))
	for _, name := range Names() {
		if !strings.Contains(text, "\n"+name+"{") && !strings.Contains(text, "\n"+name+" ") && !strings.Contains(text, "\n"+name+"_count ") {
			t.Errorf("%s is not on the page", name)
		}
	}
}

// notMetrics are the relay's numbers without a metric, and why: a field, or all fields below it.
var notMetrics = map[string]string{
	"Stats.Rules.ID":                  "an index, which bpftool shows",
	"Stats.Rules.Outputs.Slot":        "a label",
	"Stats.Rules.Inputs.Leg.Share":    "the packets won over those of all inputs",
	"Stats.Rules.ReceiveDrops":        "those of Stats.ReceiveDrops on the rule's interfaces",
	"Status.PID":                      "the process collector knows it",
	"Status.Schema":                   "a label",
	"Status.Rules":                    "the sum of those by state",
	"Status.Unconfirmed":              "no counter",
	"Status.Interfaces.Index":         "an index, which others may have next",
	"Status.Interfaces.ProgramID":     "the kernel's number",
	"Status.Interfaces.LinkID":        "the kernel's number",
	"Status.Interfaces.TransmitDrops": "the sum of Stats.TransmitDrops of the interface",
	"Status.Workers.Queue":            "a label",
	"Status.Workers.Group":            "the kernel's number",
	"Status.Workers.Lost":             "gone with the worker: Stats.ReceiveDrops keeps it",
	"Status.Workers.Socket":           "gone with the worker; its drops are in Stats.ReceiveDrops",
	"Status.Workers.Senders":          "gone with the worker; rules count their drops",
	"Status.Passed":                   "Stats.Passed",
	"Status.Drops":                    "Stats.Drops",
}

// TestEveryCounterIsAMetric: each number that the API returns about counters and state is the value
// of some metric, or is listed above with the reason why not.
func TestEveryCounterIsAMetric(t *testing.T) {
	r, paths := &relay{}, map[float64]string{}
	next := 1000.0
	var fill func(path string, v reflect.Value)
	fill = func(path string, v reflect.Value) {
		switch v.Kind() {
		case reflect.Struct:
			if v.Type() == reflect.TypeFor[time.Time]() {
				v.Set(reflect.ValueOf(start))
				return
			}
			for i := range v.NumField() {
				at := path + "." + v.Type().Field(i).Name
				if v.Type().Field(i).Anonymous {
					at = path
				}
				fill(at, v.Field(i))
			}
		case reflect.Slice:
			v.Set(reflect.MakeSlice(v.Type(), 1, 1))
			fill(path, v.Index(0))
		case reflect.Pointer:
			v.Set(reflect.New(v.Type().Elem()))
			fill(path, v.Elem())
		case reflect.Int, reflect.Uint16, reflect.Uint32, reflect.Uint64, reflect.Float64:
			next++
			paths[next] = path
			v.Set(reflect.ValueOf(next).Convert(v.Type()))
		case reflect.String:
			v.SetString("x")
		case reflect.Bool:
		default:
			t.Fatalf("%s is a %v, which the test cannot fill", path, v.Kind())
		}
	}
	fill("Status", reflect.ValueOf(&r.status).Elem())
	fill("Stats", reflect.ValueOf(&r.stats).Elem())
	told := map[float64]bool{}
	families, _ := parsed(t, newCollector(r, "all"))()
	for _, f := range families {
		for _, m := range f.GetMetric() {
			told[m.GetCounter().GetValue()], told[m.GetGauge().GetValue()] = true, true
		}
	}
	excused := map[string]bool{}
	for value, path := range paths {
		reason := ""
		for field := range notMetrics {
			if path == field || strings.HasPrefix(path, field+".") {
				reason = field
			}
		}
		switch {
		case reason != "":
			excused[reason] = true
			if told[value] {
				t.Errorf("%s is a metric: it need not be excused", path)
			}
		case !told[value]:
			t.Errorf("no metric has %s", path)
		}
	}
	for field := range notMetrics {
		if !excused[field] {
			t.Errorf("%s is no number", field)
		}
	}
}

// parsed is the page as parsed by Prometheus's own parser.
func parsed(t *testing.T, c *collector) prometheus.GathererFunc {
	t.Helper()
	var text bytes.Buffer
	if _, err := text.Write(bytes.Join(c.collect(t.Context()).parts(), nil)); err != nil {
		t.Fatal(err)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(&text)
	if err != nil {
		t.Fatal(err)
	}
	return func() ([]*dto.MetricFamily, error) { return slices.Collect(maps.Values(families)), nil }
}

func count(t *testing.T, c *collector, name string) int {
	t.Helper()
	n, err := testutil.GatherAndCount(parsed(t, c), name)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestLabels: the parser reads back any label value.
func TestLabels(t *testing.T) {
	for _, name := range []string{"", "a", `"`, `\`, `\n`, "a\nb", `\"`, "ü", "\xff", "{}", "a,b=\"c\""} {
		r := full()
		r.stats.Rules[0].Name = name
		families, _ := parsed(t, newCollector(r, "all"))()
		found := false
		for _, f := range families {
			for _, m := range f.GetMetric() {
				for _, l := range m.GetLabel() {
					found = found || f.GetName() == "xdpcast_rule_info" && l.GetName() == "rule" && l.GetValue() == strings.ToValidUTF8(name, "\uFFFD")
				}
			}
		}
		if !found {
			t.Errorf("label %q is not read back", name)
		}
	}
}

// TestLint checks names and help texts against Prometheus's guidelines.
func TestLint(t *testing.T) {
	problems, err := testutil.GatherAndLint(parsed(t, newCollector(full(), "all")))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

// TestDocument compares docs/metrics.md with the metrics.
func TestDocument(t *testing.T) {
	const file = "../../docs/metrics.md"
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	const begin = "| metric | type | labels | meaning |\n|---|---|---|---|\n"
	head, rest, ok := strings.Cut(string(text), begin)
	if !ok {
		t.Fatalf("%s has no table that begins with\n%s", file, begin)
	}
	_, tail, _ := strings.Cut(rest, "\n\n")
	golden(t, file, head+begin+Markdown()+"\n"+tail)
}

func TestSelection(t *testing.T) {
	for rules, want := range map[string]int{"all": 2, "active": 1, "none": 0, "cam.*": 1, "cam": 0, "cam1|idle": 2} {
		if got := count(t, newCollector(full(), rules), "xdpcast_rule_info"); got != want {
			t.Errorf("%s: %d rules, want %d", rules, got, want)
		}
		if got := count(t, newCollector(full(), rules), "xdpcast_rules"); got != 3 {
			t.Errorf("%s: the totals are of %d states, want 3", rules, got)
		}
	}
	if _, err := ParseSelection("("); err == nil || !strings.Contains(err.Error(), "want all, active, none, or a regular expression") {
		t.Errorf("error is %v", err)
	}
}

// TestFailedScrape: a relay that does not answer is reported, and nothing is invented.
func TestFailedScrape(t *testing.T) {
	r := full()
	r.err = errors.New("busy")
	code, text := get(t, Handler(Observe(r), Options{}), "/metrics")
	if code != http.StatusOK || !strings.Contains(text, `xdpcast_scrape_failed{of="stats"} 1`) || strings.Contains(text, "xdpcast_rule_") {
		t.Errorf("%d: %s", code, own(text))
	}
}

func TestReloads(t *testing.T) {
	r := full()
	r.reload = errors.New("broken")
	b := Observe(r)
	if _, err := b.Reload(t.Context(), control.ApplyOptions{}); !errors.Is(err, r.reload) {
		t.Errorf("error is %v", err)
	}
	_, text := get(t, Handler(b, Options{}), "/metrics")
	for _, want := range []string{"xdpcast_reloads_total 1\n", "xdpcast_last_reload_successful 0\n", "xdpcast_last_reload_success_timestamp_seconds 1.7e+09\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in %s", want, own(text))
		}
	}
}

func TestHealth(t *testing.T) {
	r := full()
	h := Handler(Observe(r), Options{})
	check := func(path string, code int, want string) {
		t.Helper()
		if got, text := get(t, h, path); got != code || !strings.Contains(text, want) {
			t.Errorf("%s: %d: %s; want %d with %q", path, got, text, code, want)
		}
	}
	check("/healthz", 200, "ok")
	check("/readyz", 503, "2 of 3 rules are not active\nrule idle: pending: interface eth9 not found\n")
	r.status.Pending, r.status.Failed = 0, 0
	check("/readyz", 200, "ok")
	r.status.Ready = false
	check("/readyz", 503, "the rules are not loaded yet")
	r.err = errors.New("the relay is busy")
	check("/healthz", 503, "the relay is busy")
	check("/readyz", 503, "the relay is busy")
	check("/other", 404, "")
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/metrics", nil))
	if w.Code != http.StatusMethodNotAllowed {
		t.Errorf("POST: %d", w.Code)
	}
}

func TestListen(t *testing.T) {
	for _, tt := range []struct {
		addr string
		opts ListenOptions
		want string // of the error; empty for none
	}{
		{"127.0.0.1:0", ListenOptions{}, ""},
		{"localhost:0", ListenOptions{}, ""},
		{"[::1]:0", ListenOptions{}, ""},
		{"0.0.0.0:0", ListenOptions{Public: true}, ""},
		{"0.0.0.0:0", ListenOptions{}, "want TLS (--tls-cert and --tls-key), or --listen-public"},
		{":0", ListenOptions{}, "not a loopback address"},
		{"127.0.0.1", ListenOptions{}, "want HOST:PORT, such as 127.0.0.1:9464"},
	} {
		ln, err := Listen(tt.addr, tt.opts)
		switch {
		case err == nil && tt.want != "", err != nil && (tt.want == "" || !strings.Contains(err.Error(), tt.want)):
			t.Errorf("%s %+v: error is %v, want %q", tt.addr, tt.opts, err, tt.want)
		case err == nil:
			ln.Close()
		}
	}
}

func TestServeEnds(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- Serve(ctx, ln, Handler(Observe(full()), Options{}), &Busy{}, slog.New(slog.DiscardHandler))
	}()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	answer, err := client.Get("http://" + ln.Addr().String() + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(answer.Body)
	answer.Body.Close()
	if string(text) != "ok\n" || err != nil {
		t.Errorf("%q, %v", text, err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// many makes a relay with rules of four outputs each.
func many(rules int) *relay {
	r := full()
	r.stats.Rules = make([]control.RuleStatus, rules)
	for i := range r.stats.Rules {
		s := full().stats.Rules[0]
		s.Name = fmt.Sprintf("rule%06d", i)
		s.Outputs = nil
		for slot := range 4 {
			s.Outputs = append(s.Outputs, control.OutputStatus{Slot: slot, Interface: fmt.Sprintf("eth%d", slot), State: "active", Sent: control.Counter{Packets: 1, Bytes: 2}})
		}
		r.stats.Rules[i] = s
	}
	return r
}

// BenchmarkScrape measures the collector's cost of 10,000 rules with four outputs each.
func BenchmarkScrape(b *testing.B) {
	h := Handler(Observe(many(10_000)), Options{})
	b.ReportAllocs()
	for b.Loop() {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
		if w.Code != http.StatusOK {
			b.Fatal(w.Code)
		}
	}
}

// TestScrapeMemory: a scrape of 10,000 rules with four outputs each allocates at most 100 MB in
// addition to the relay's own answer, garbage included.
func TestScrapeMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a second")
	}
	c := newCollector(many(10_000), "all")
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	page := c.collect(t.Context())
	runtime.ReadMemStats(&after)
	if n := len(bytes.Join(page.parts(), nil)); n < 10<<20 {
		t.Errorf("%d bytes", n)
	}
	if used := after.TotalAlloc - before.TotalAlloc; used > 100<<20 {
		t.Errorf("%d MB", used>>20)
	}
}

// TestConnections: clients cannot take the daemon's descriptors. Of those with nothing to ask, the one that
// has been idle for the longest time makes room for a new one, and requests in progress are never cut off.
func TestConnections(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	hold := make(chan struct{})
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			<-hold
		}
		fmt.Fprintln(w, "ok")
	})
	busy, ended := &Busy{}, make(chan error, 1)
	go func() { ended <- Serve(ctx, ln, h, busy, slog.New(slog.DiscardHandler)) }()
	open := func() int {
		busy.mu.Lock()
		defer busy.mu.Unlock()
		return len(busy.conns)
	}
	var conns []net.Conn
	connect := func(path string) *bufio.Reader {
		t.Helper()
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path)
		return bufio.NewReader(c)
	}
	answered := func(r *bufio.Reader) error {
		answer, err := http.ReadResponse(r, nil)
		if err != nil {
			return err
		}
		defer answer.Body.Close()
		_, err = io.Copy(io.Discard, answer.Body)
		return err
	}
	slow := connect("/slow")
	labtest.Eventually(t, "the request is in progress", func() bool { return busy.busy() == 1 && open() == 1 })
	for n := range 3 * maxConns {
		if err := answered(connect("/")); err != nil {
			t.Fatalf("connection %d: %v", n, err)
		}
		if n := open(); n > maxConns {
			t.Fatalf("%d connections are open", n)
		}
	}
	// All in use: a further one is refused.
	for _, c := range conns[1:] {
		c.Close()
	}
	labtest.Eventually(t, "the others are closed", func() bool { return open() == 1 })
	waiting := []*bufio.Reader{slow}
	for range maxConns - 1 {
		waiting = append(waiting, connect("/slow"))
	}
	labtest.Eventually(t, "all are in use", func() bool { return busy.busy() == maxConns })
	if err := answered(connect("/")); err == nil {
		t.Error("another one is answered")
	}
	close(hold)
	for i, r := range waiting {
		if err := answered(r); err != nil {
			t.Errorf("request %d was cut off: %v", i, err)
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	for _, c := range conns {
		c.Close()
	}
}
