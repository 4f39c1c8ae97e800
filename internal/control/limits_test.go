package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
	"xdpcast/pkg/rules"
)

// exchange writes a raw request to the socket and reads one answer.
func exchange(t *testing.T, socket, request string) (status int, header http.Header, body errorAnswer) {
	t.Helper()
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	go func() { _, _ = io.WriteString(c, request) }() // may end early: the server need not read it all
	return readAnswer(t, c)
}

func readAnswer(t *testing.T, c net.Conn) (status int, header http.Header, body errorAnswer) {
	t.Helper()
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode >= 300 {
		if err := json.Unmarshal(data, &body); err != nil {
			t.Fatalf("status %d: body %q: %v", resp.StatusCode, data, err)
		}
	}
	return resp.StatusCode, resp.Header, body
}

func raw(method, path, body string) string {
	return fmt.Sprintf("%s %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", method, path, len(body), body)
}

func TestBadRequests(t *testing.T) {
	b := &fake{}
	socket := serve(t, b, Options{})
	rule := `{"name":"a","in":"b","out":["c"]}`
	for _, tt := range []struct {
		method, path, body string
		status             int
		kind               Kind
		text               string
	}{
		{"GET", "/", "", 404, KindNotFound, "no endpoint /"},
		{"GET", "/v2/status", "", 404, KindNotFound, "no endpoint /v2/status"},
		{"GET", "/v1/rules/a/b", "", 404, KindNotFound, "no endpoint"},
		{"GET", "/v1/rules/", "", 404, KindNotFound, "no endpoint"},
		{"GET", "/v1/rules/a", "", 404, KindNotFound, `rule "a": not found`},
		{"POST", "/v1/status", "", 405, KindInvalid, "use GET"},
		{"DELETE", "/v1/rules", "", 405, KindInvalid, "use GET, POST, PUT"},
		{"PATCH", "/v1/rules/a", rule, 405, KindInvalid, "use GET, PUT, DELETE"},
		{"GET", "/v1/reload", "", 405, KindInvalid, "use POST"},
		{"GET", "/v1/confirm", "", 405, KindInvalid, "use POST"},
		{"POST", "/v1/history", "", 405, KindInvalid, "use GET"},
		{"POST", "/v1/reload?confirm=2", "", 400, KindInvalid, `query key confirm: "2": want a time from 1s to 24h, such as 2m`},
		{"POST", "/v1/reload?confirm=-2m", "", 400, KindInvalid, "want a time from 1s to 24h"},
		{"POST", "/v1/reload?confirm=25h", "", 400, KindInvalid, "want a time from 1s to 24h"},
		{"POST", "/v1/reload?confirm=2m&dry_run=true", "", 400, KindInvalid, "a dry run has nothing to confirm"},
		{"POST", "/v1/rollback?back=-1", "", 400, KindInvalid, `query key back is "-1": must be a number from 0`},
		{"POST", "/v1/rollback?back=x", "", 400, KindInvalid, "must be a number from 0"},
		{"POST", "/v1/confirm?back=1", "", 400, KindInvalid, `unknown query key "back"`},
		{"GET", "/v1/status?verbose=1", "", 400, KindInvalid, `unknown query key "verbose"`},
		{"PUT", "/v1/rules?dryrun=true", "[]", 400, KindInvalid, `unknown query key "dryrun"`},
		{"PUT", "/v1/rules?dry_run=yes", "[]", 400, KindInvalid, "must be true or false"},
		{"PUT", "/v1/rules?dry_run=true&dry_run=false", "[]", 400, KindInvalid, "given 2 times"},
		{"PUT", "/v1/rules?dry_run=%zz", "[]", 400, KindInvalid, "query"},
		{"PUT", "/v1/rules", "null", 400, KindInvalid, "[] for none"},
		{"PUT", "/v1/rules", "", 400, KindInvalid, "body is empty"},
		{"PUT", "/v1/rules", rule, 400, KindInvalid, "a list of rules is needed"},
		{"PUT", "/v1/rules", "[" + rule, 400, KindInvalid, "unexpected end"},
		{"PUT", "/v1/rules", "[" + rule + `,{"name":1}]`, 400, KindInvalid, "rule 2 of the list: "},
		{"PUT", "/v1/rules", "[" + rule + `,{"nome":""}]`, 400, KindInvalid, `rule 2 of the list: unknown field "nome"`},
		{"PUT", "/v1/rules", "[] []", 400, KindInvalid, "trailing data"},
		{"POST", "/v1/rules", "", 400, KindInvalid, "body is empty"},
		{"POST", "/v1/rules", rule + "}", 400, KindInvalid, "body: invalid character"},
		{"POST", "/v1/rules", `{"name":"a","port":5}`, 400, KindInvalid, `unknown field "port"`},
		{"POST", "/v1/rules", `{"name":1}`, 400, KindInvalid, `field "name": want text, not number`},
		{"POST", "/v1/rules", `{"out":"c"}`, 400, KindInvalid, `field "out": want a list of texts, not string`},
		{"POST", "/v1/rules", `{"name":` + strings.Repeat("[", 20000), 400, KindInvalid, "exceeded max depth"},
		{"POST", "/v1/rules", "[" + rule + "]", 400, KindInvalid, "body: a rule is needed: {"},
		{"POST", "/v1/rules", `{"Name":"a","in":"b","out":["c"]}`, 400, KindInvalid, `unknown field "Name": want name, in, out, path, merge, failover`},
		{"POST", "/v1/rules", `{"name":"a","in":"b","out":["c"],"in":"d"}`, 400, KindInvalid, `field "in" given again: want it once`},
		{"PUT", "/v1/rules", `[{"name":"a","OUT":[]}]`, 400, KindInvalid, `rule 1 of the list: unknown field "OUT"`},
		{"PUT", "/v1/rules", `[{"name":"a","name":"b"}]`, 400, KindInvalid, `rule 1 of the list: field "name" given again`},
		{"PUT", "/v1/rules", `[null]`, 400, KindInvalid, `rule 1 of the list: a rule is needed`},
		{"GET", "//v1/status", "", 404, KindNotFound, "no endpoint"},
		{"GET", "/v1/rules/../status", "", 404, KindNotFound, "no endpoint"},
		{"GET", "/v1/status/", "", 404, KindNotFound, "no endpoint"},
		{"OPTIONS", "*", "", 404, KindNotFound, "no endpoint *"},
	} {
		status, header, body := exchange(t, socket, raw(tt.method, tt.path, tt.body))
		if status != tt.status || body.Kind != tt.kind || !strings.Contains(body.Error, tt.text) || strings.Contains(body.Error, "\n") {
			t.Errorf("%s %s %.40q: %d %+v, want %d %s %q", tt.method, tt.path, tt.body, status, body, tt.status, tt.kind, tt.text)
		}
		if allow := header.Get("Allow"); (allow != "") != (tt.status == 405) {
			t.Errorf("%s %s: Allow is %q", tt.method, tt.path, allow)
		}
	}
	if rules, _ := b.Rules(context.Background()); len(rules) != 0 {
		t.Errorf("a bad request added %v", rules)
	}
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = io.WriteString(c, "HEAD /v1/status HTTP/1.0\r\n\r\n")
	answer, readErr := io.ReadAll(c)
	if err := errors.Join(err, readErr); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.0 200 OK\r\n") || !strings.HasSuffix(string(answer), "\r\n\r\n") {
		t.Errorf("HEAD: %q, %v", answer, err)
	}
}

func TestBodyLimit(t *testing.T) {
	c := NewClient(serve(t, &fake{}, Options{}))
	long := Rule{
		Name: "market-data-feed-a-000000", In: "10.100.200.200@239.255.255.255:50000%enp129s0f0",
		Out:  []string{"239.255.100.200:50000%enp129s0f1,ttl=64,src=keep,dscp=af41", "10.100.100.200:50000%enp129s0f1,ttl=64"},
		Path: "auto",
	}
	one, err := json.Marshal(long)
	if err != nil || 100_000*len(one) > MaxBody {
		t.Fatalf("100,000 rules of %d bytes do not fit %d, %v", len(one), MaxBody, err)
	}
	var file []byte
	for i := range 2_000 {
		long.Name, long.In = fmt.Sprint("market-data-feed-a-", i), fmt.Sprintf("10.100.200.200@239.255.255.255:%d%%enp129s0f0", 50_000+i)
		rule, err := ToRule(long)
		if err != nil {
			t.Fatal(err)
		}
		file = rules.AppendRule(file, rule)
	}
	if 50*len(file) > MaxBody {
		t.Fatalf("2,000 rules take %d bytes: 100,000 do not fit %d", len(file), MaxBody)
	}
	if res, err := c.ApplyFile(context.Background(), file, ApplyOptions{}); err != nil || res.Changed != 2_000 || len(res.Changes) != 2_000 {
		t.Fatalf("2,000 rules: %d changed, %d changes, %v", res.Changed, len(res.Changes), err)
	}

	file = append(file, bytes.Repeat([]byte("#"), MaxBody)...)
	if _, err := c.ApplyFile(context.Background(), file, ApplyOptions{}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("client with a huge body: %v, want %v", err, ErrTooLarge)
	}
	request := fmt.Sprintf("PUT /v1/rules HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n[", MaxBody+1)
	if status, _, answer := exchange(t, c.socket, request); status != 413 || answer.Kind != KindTooLarge {
		t.Errorf("huge body: %d %+v", status, answer)
	}

	// A body of unknown length, at a smaller limit.
	for _, text := range []string{`[{"name":"a"},{"name":"b"}]`, `[{"name":"a"}]       `, `[              ]`} {
		body := http.MaxBytesReader(nil, io.NopCloser(strings.NewReader(text)), 15)
		if _, err := decodeRules(body); !errors.Is(err, ErrTooLarge) {
			t.Errorf("decodeRules(%q): %v, want %v", text, err, ErrTooLarge)
		}
	}
}

// Whatever a body holds, the answer is rules or an error that is the client's.
func FuzzDecodeRules(f *testing.F) {
	for _, seed := range []string{`[]`, `[{"name":"a","in":"239.1.1.1:5000%eth0","out":["239.1.1.2%eth1"]}]`, `[ {"name" : "a\"  b\\" } ]`, `null`, `[null]`, `[{}] x`, `[{"x":1}]`, `{`, `[`, `"`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := decodeRules(bytes.NewReader(data))
		if (err == nil) != (got != nil) || err != nil && !errors.Is(err, ErrInvalid) {
			t.Fatalf("%q: %v, %v", data, got, err)
		}
		if err != nil {
			return
		}
		list := []Rule{}
		for _, r := range got {
			list = append(list, FromRule(r))
		}
		text, err := json.Marshal(list)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := decodeRules(bytes.NewReader(text)); err != nil || len(again) != len(got) {
			t.Fatalf("%s: %v, %v", text, again, err)
		}
	})
}

func TestHugeHeaderIsCut(t *testing.T) {
	socket := serve(t, &fake{}, Options{})
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	line := bytes.Repeat([]byte("x"), 1<<20)
	go func() { _, _ = c.Write(append([]byte("GET /v1/status HTTP/1.1\r\nX: "), line...)) }()
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("status %d, want %d", resp.StatusCode, http.StatusRequestHeaderFieldsTooLarge)
	}
}

// Errors that net/http answers before any handler is asked are those of the API, too.
func TestErrorsOfTheProtocolAreJSON(t *testing.T) {
	socket := serve(t, &fake{}, Options{})
	for request, want := range map[string]struct {
		status int
		kind   Kind
	}{
		"nonsense\r\n\r\n":                                                                    {400, KindInvalid},
		"GET /v1/status HTTP/1.1\r\n\r\n":                                                     {400, KindInvalid}, // no Host
		"GET /v1/status HTTP/1.1\r\nHost: x\r\nA B: c\r\n\r\n":                                {400, KindInvalid},
		"GET /v1/status HTTP/1.1\r\nHost: x\r\nExpect: miracles\r\n\r\n":                      {417, KindInvalid},
		"GET /v1/status HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 1<<20) + "\r\n\r\n": {431, KindTooLarge},
		"POST /v1/rules HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n":               {501, KindInvalid},
		"GET /v1/status HTTP/7.0\r\nHost: x\r\n\r\n":                                          {505, KindInvalid},
		"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n":                                             {404, KindNotFound},
	} {
		status, header, body := exchange(t, socket, request)
		if status != want.status || body.Kind != want.kind || body.Error == "" || header.Get("Content-Type") != "application/json" {
			t.Errorf("%.70q: %d %v %+v, want %d %s", request, status, header, body, want.status, want.kind)
		}
	}
}

// However much white space a body holds, reading it takes time in proportion: what takes
// hours of CPU time at the limit when each read looks all of it over again, and minutes at an
// eighth of it, takes a fraction of a second.
func TestBlanksTakeNoTime(t *testing.T) {
	blanks := strings.Repeat(" \t\r\n", MaxBody/8/4-10)
	for name, body := range map[string]string{
		"before": blanks + "[]", "inside": "[" + blanks + "]", "behind": "[]" + blanks,
		"in a rule": `[{"name"` + blanks + `:"a"}]`,
	} {
		start := labtest.CPUTime(t)
		_, err := decodeRules(strings.NewReader(body))
		if name == "in a rule" && !errors.Is(err, ErrInvalid) || name != "in a rule" && err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if took := labtest.CPUTime(t) - start; took > 4*time.Second {
			t.Errorf("%s: %d MiB of blanks took %v of CPU time", name, len(body)>>20, took)
		}
	}
}

// What oneSpace passes on means the same to a JSON reader.
func FuzzOneSpace(f *testing.F) {
	for _, seed := range []string{`[ ]`, ` { "a  b" :  "c\\"  , "\"  " : 1  2 }`, `"  `, `\"  "  `, "\t\n"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		data, err := io.ReadAll(&oneSpace{from: iotest.OneByteReader(strings.NewReader(text))})
		whole, wholeErr := io.ReadAll(&oneSpace{from: strings.NewReader(text)})
		if err != nil || wholeErr != nil || !bytes.Equal(data, whole) {
			t.Fatalf("%q: %q by bytes, %q as a whole, %v, %v", text, data, whole, err, wholeErr)
		}
		var before, after any
		errBefore, errAfter := json.Unmarshal([]byte(text), &before), json.Unmarshal(data, &after)
		if (errBefore == nil) != (errAfter == nil) || !reflect.DeepEqual(before, after) {
			t.Fatalf("%q: %v, %v; as %q: %v, %v", text, before, errBefore, data, after, errAfter)
		}
	})
}

// Each of these clients keeps its connection open without getting on; the
// server ends every one of them by itself.
func TestSlowClients(t *testing.T) {
	const short = 50 * time.Millisecond
	b := &fake{}
	for i := range 20000 { // more than a socket's buffers take
		b.rules = append(b.rules, RuleStatus{Rule: Rule{Name: fmt.Sprint(i), In: strings.Repeat("x", 100)}})
	}
	socket := serve(t, b, Options{Timeouts: Timeouts{Header: short, Read: short, Write: short, Idle: short}})
	for name, request := range map[string]string{
		"says nothing":  "",
		"half a header": "GET /v1/status HTTP/1.1\r\nHo",
		"half a body":   "POST /v1/rules HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
		"stays idle":    "GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n",
		"does not read": "GET /v1/rules HTTP/1.1\r\nHost: x\r\n\r\n",
	} {
		c, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, request); err != nil && !errors.Is(err, unix.EPIPE) { // a server that has ended it before this runs
			t.Fatal(err)
		}
		if err := waitHangup(c.(*net.UnixConn)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		c.Close()
	}
	for { // the timeouts are short enough to cut off an honest client now and then
		_, err := NewClient(socket).Groups(context.Background())
		if err == nil {
			break
		}
		if !errors.Is(err, ErrUnavailable) {
			t.Fatalf("afterwards: %v", err)
		}
	}
}

// waitHangup waits until the other end has closed, without reading.
func waitHangup(c *net.UnixConn) error {
	rc, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var pollErr error
	err = rc.Control(func(fd uintptr) {
		for {
			fds := []unix.PollFd{{Fd: int32(fd)}}
			n, err := unix.Poll(fds, 30_000)
			switch {
			case errors.Is(err, unix.EINTR):
				continue
			case err != nil:
				pollErr = err
			case n == 0:
				pollErr = errors.New("still open after 30 s")
			}
			return
		}
	})
	return errors.Join(err, pollErr)
}

func TestTooManyConnections(t *testing.T) {
	labtest.RequireRoot(t) // to become the user who may do nothing
	b := &fake{block: make(chan struct{}), waits: make(chan struct{}, 8)}
	socket := serve(t, b, Options{MaxConns: 2})
	done := make(chan error, 2)
	for range 2 {
		go func() {
			_, err := NewClient(socket).Status(context.Background())
			done <- err
		}()
		<-b.waits
	}

	c, err := net.Dial("unix", socket) // sends nothing: the answer must not need a request
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if status, _, body := readAnswer(t, c); status != 503 || body.Kind != KindUnavailable || body.Error != "too many connections: 2 are open" {
		t.Errorf("third connection: %d %+v", status, body)
	}
	if _, err := NewClient(socket).Groups(context.Background()); !errors.Is(err, ErrUnavailable) {
		t.Errorf("third client: %v, want %v", err, ErrUnavailable)
	}
	// Those who may do nothing have places of their own, and the other way round.
	if status, _, _ := exchangeAs(t, 65534, nil, socket, raw("GET", "/v1/groups", "")); status != 403 {
		t.Errorf("nobody: status %d, want 403", status)
	}

	close(b.block)
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	for { // the places come back
		_, err := NewClient(socket).Groups(context.Background())
		if err == nil {
			break
		}
		if !errors.Is(err, ErrUnavailable) {
			t.Fatal(err)
		}
		runtime.Gosched()
	}
}

// Whoever connects as fast as it can neither takes the places of root nor fills the log.
func TestFloodOfConnections(t *testing.T) {
	labtest.RequireRoot(t) // to become others
	log := &lines{}
	path := filepath.Join(socketDir(t), "s")
	ln, err := Listen(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o666); err != nil { // as if they were let in
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() {
		served <- NewServer(&fake{}, Options{MaxConns: 2, Log: slog.New(slog.NewTextHandler(log, nil))}).Serve(ctx, ln)
	}()
	const flood = 500
	conns := make(chan net.Conn, flood)
	for range flood {
		c, err := dialAs(t, 65534, nil, path)
		if err != nil {
			t.Fatal(err)
		}
		conns <- c
	}
	if _, err := NewClient(path).Groups(context.Background()); err != nil {
		t.Errorf("root behind the flood: %v", err)
	}
	close(conns)
	for c := range conns {
		c.Close()
	}
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if got := log.count("control connection refused"); got == 0 || got > 3 {
		t.Errorf("%d lines in the log for %d refused connections, want one each %v", got, flood-2, refusalPause)
	}
}

func TestRefusalsAreCounted(t *testing.T) {
	var r refusals
	start := time.Unix(1000, 0)
	for _, tt := range []struct {
		after  time.Duration
		silent int
		log    bool
	}{
		{0, 0, true}, {1, 0, false}, {refusalPause - 1, 0, false}, {refusalPause, 2, true}, {refusalPause + 1, 0, false}, {3 * refusalPause, 1, true}, {5 * refusalPause, 0, true},
	} {
		if silent, log := r.log(start.Add(tt.after)); silent != tt.silent || log != tt.log {
			t.Errorf("after %v: %d, %v, want %d, %v", tt.after, silent, log, tt.silent, tt.log)
		}
	}
}

// lines is a log that is counted.
type lines struct {
	mu  sync.Mutex
	all []string
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, string(b))
	return len(b), nil
}

func (l *lines) count(text string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, line := range l.all {
		if strings.Contains(line, text) {
			n++
		}
	}
	return n
}

func TestShutdown(t *testing.T) {
	for name, tt := range map[string]struct {
		grace   time.Duration
		release bool
		want    error
	}{
		"finishes what is under way":       {time.Hour, true, nil},
		"cuts off what outlasts the grace": {time.Millisecond, false, ErrUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			b := &fake{block: make(chan struct{}), waits: make(chan struct{}, 1)}
			path := filepath.Join(socketDir(t), "s")
			ln, err := Listen(path, nil)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(context.Background())
			served := make(chan error, 1)
			go func() {
				served <- NewServer(b, Options{Timeouts: Timeouts{Grace: tt.grace}}).Serve(ctx, ln)
			}()
			silent, err := net.Dial("unix", path) // must not hold the shutdown up
			if err != nil {
				t.Fatal(err)
			}
			defer silent.Close()
			answered := make(chan error, 1)
			go func() {
				_, err := NewClient(path).Status(context.Background())
				answered <- err
			}()
			<-b.waits
			cancel()
			for { // no new connections from now on
				if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
					break
				}
				runtime.Gosched()
			}
			if tt.release {
				close(b.block)
			}
			if err := <-answered; !errors.Is(err, tt.want) {
				t.Errorf("request under way: %v, want %v", err, tt.want)
			}
			if err := <-served; err != nil {
				t.Errorf("Serve: %v", err)
			}
		})
	}
}

func TestServeNeedsUnixSocket(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := NewServer(&fake{}, Options{}).Serve(context.Background(), ln); err == nil {
		t.Error("Serve on TCP: no error")
	}
	ln2, err := Listen(filepath.Join(socketDir(t), "s"), nil)
	if err != nil {
		t.Fatal(err)
	}
	ln2.Close()
	if err := NewServer(&fake{}, Options{}).Serve(context.Background(), ln2); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve on a closed listener: %v", err)
	}
}

func TestAccess(t *testing.T) {
	const own = 990
	for _, tt := range []struct {
		peer peer
		read []uint32
		want access
	}{
		{peer{uid: 0}, nil, accessWrite},
		{peer{uid: own}, nil, accessWrite},
		{peer{uid: 1000, gid: 0}, nil, accessNone},
		{peer{uid: 1000, gid: own}, nil, accessNone},
		{peer{uid: 1000, gid: 27}, []uint32{27}, accessRead},
		{peer{uid: 1000, gid: 100, groups: []uint32{4, 27}}, []uint32{5, 27}, accessRead},
		{peer{uid: 1000, gid: 100, groups: []uint32{4}}, []uint32{27}, accessNone},
		{peer{uid: 1000, gid: 0, groups: []uint32{0}}, []uint32{27}, accessNone},
	} {
		if got := tt.peer.access(own, tt.read); got != tt.want {
			t.Errorf("%+v, readers %v: %v, want %v", tt.peer, tt.read, got, tt.want)
		}
	}
}

func TestPermitNamesWhatIsNeeded(t *testing.T) {
	for _, tt := range []struct {
		own  uint32
		read []uint32
		conn *peerConn
		need access
		want string
	}{
		{0, nil, &peerConn{peer: peer{uid: 5}}, accessRead, "uid 5 may not read: root is needed"},
		{0, []uint32{27, 4}, &peerConn{peer: peer{uid: 5}}, accessRead, "uid 5 may not read: root is needed, or membership of group 27 or 4"},
		{990, nil, &peerConn{peer: peer{uid: 5}, access: accessRead}, accessWrite, "uid 5 may not change rules: root or uid 990 (the daemon's own) is needed"},
		{0, nil, nil, accessRead, "the peer's credentials are unknown: connect through the unix socket"},
		{0, nil, &peerConn{access: accessRead}, accessRead, ""},
		{0, nil, &peerConn{access: accessWrite}, accessRead, ""},
	} {
		s := NewServer(&fake{}, Options{ReadGroups: tt.read})
		s.uid = tt.own
		ctx := context.Background()
		if tt.conn != nil {
			ctx = withConn(ctx, tt.conn)
		}
		r, err := http.NewRequestWithContext(ctx, "GET", "/", nil)
		if err != nil {
			t.Fatal(err)
		}
		err = s.permit(r, tt.need)
		if tt.want == "" && err == nil {
			continue
		}
		if !errors.Is(err, ErrForbidden) || err.Error() != tt.want {
			t.Errorf("permit: %v, want %s", err, tt.want)
		}
	}
}

// exchangeAs is exchange by a thread that the kernel knows as uid and groups.
func exchangeAs(t *testing.T, uid int, groups []uint32, socket, request string) (status int, header http.Header, body errorAnswer) {
	t.Helper()
	c, err := dialAs(t, uid, groups, socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	go func() { _, _ = io.WriteString(c, request) }()
	return readAnswer(t, c)
}

// dialAs is net.Dial by such a thread.
func dialAs(t *testing.T, uid int, groups []uint32, socket string) (net.Conn, error) {
	t.Helper()
	labtest.RequireRoot(t)
	type result struct {
		c   net.Conn
		err error
	}
	dialled := make(chan result)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		c, err := net.Conn(nil), becomeThread(uid, groups)
		if err == nil {
			c, err = net.Dial("unix", socket)
		}
		dialled <- result{c, err}
	}()
	r := <-dialled
	return r.c, r.err
}

// becomeThread changes the credentials of the calling thread alone; package
// unix's own functions would change the whole process.
func becomeThread(uid int, groups []uint32) error {
	if err := setThreadGroups(groups); err != nil {
		return err
	}
	for _, call := range []uintptr{unix.SYS_SETRESGID, unix.SYS_SETRESUID} {
		if _, _, errno := unix.RawSyscall(call, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
			return errno
		}
	}
	return nil
}

func TestPeerCredentials(t *testing.T) {
	b := &fake{}
	const nobody = 65534
	many := make([]uint32, 1000) // more than the first guess of peerGroups
	for i := range many {
		many[i] = uint32(100_000 + i)
	}
	socket := serve(t, b, Options{ReadGroups: []uint32{4242, 100_999}})
	rule := `{"name":"a","in":"b","out":["c"]}`
	for _, tt := range []struct {
		name    string
		groups  []uint32
		request string
		status  int
	}{
		{"nobody reads", nil, raw("GET", "/v1/status", ""), 403},
		{"nobody writes", nil, raw("POST", "/v1/rules", rule), 403},
		{"nobody writes a lot", nil, raw("PUT", "/v1/rules", strings.Repeat(" ", 1<<20)+"[]"), 403},
		{"member reads", []uint32{1, 4242}, raw("GET", "/v1/status", ""), 200},
		{"member of many groups reads", many, raw("GET", "/v1/status", ""), 200},
		{"member adds", []uint32{4242}, raw("POST", "/v1/rules", rule), 403},
		{"member deletes", []uint32{4242}, raw("DELETE", "/v1/rules/a", ""), 403},
		{"member applies", []uint32{4242}, raw("PUT", "/v1/rules?dry_run=true", "[]"), 403},
		{"member reloads", []uint32{4242}, raw("POST", "/v1/reload", ""), 403},
		{"member confirms", []uint32{4242}, raw("POST", "/v1/confirm", ""), 403},
		{"member rolls back", []uint32{4242}, raw("POST", "/v1/rollback", ""), 403},
		{"member reads the history", []uint32{4242}, raw("GET", "/v1/history", ""), 200},
		{"root of a group reads", []uint32{0}, raw("GET", "/v1/status", ""), 403},
	} {
		status, _, body := exchangeAs(t, nobody, slices.Clone(tt.groups), socket, tt.request)
		if status != tt.status {
			t.Errorf("%s: %d %+v, want %d", tt.name, status, body, tt.status)
		}
		if status == 403 && (body.Kind != KindForbidden || !strings.HasPrefix(body.Error, "uid 65534 may not ")) {
			t.Errorf("%s: %+v", tt.name, body)
		}
	}
	if rules, _ := b.Rules(context.Background()); len(rules) != 0 {
		t.Errorf("a refused request added %v", rules)
	}
}
