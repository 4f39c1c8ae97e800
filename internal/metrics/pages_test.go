package metrics

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"sync"
	"testing"
	"time"

	"xdpcast/internal/labtest"
)

// Two clients that ask for metrics and do not read them keep no third one waiting.
func TestStalledScrapes(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	busy, ended := &Busy{}, make(chan error, 1)
	go func() {
		ended <- Serve(ctx, ln, Handler(Observe(many(10_000)), Options{}), busy, slog.New(slog.DiscardHandler)) // 14 MB: more than sockets hold
	}()
	for range 2 {
		stalled, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer stalled.Close()
		fmt.Fprint(stalled, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
		if _, err := bufio.NewReader(stalled).ReadString('\n'); err != nil { // the answer has begun
			t.Fatal(err)
		}
	}
	if n := busy.busy(); n != 2 {
		t.Fatalf("%d requests are being answered, want 2", n)
	}
	client := &http.Client{Timeout: scrapeTimeout, Transport: &http.Transport{DisableKeepAlives: true}}
	for range 2 {
		answer, err := client.Get("http://" + ln.Addr().String() + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, answer.Body)
		answer.Body.Close()
		if answer.StatusCode != http.StatusOK || n < 10<<20 || err != nil {
			t.Errorf("%s, %d bytes, %v", answer.Status, n, err)
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// stalledWriter blocks until its deadline.
type stalledWriter struct {
	httptest.ResponseRecorder
	began, cut chan struct{}
	once       sync.Once
}

func newStalled() *stalledWriter {
	return &stalledWriter{began: make(chan struct{}), cut: make(chan struct{})}
}

func (w *stalledWriter) Header() http.Header { return http.Header{} }

func (w *stalledWriter) Write([]byte) (int, error) {
	close(w.began)
	<-w.cut
	return 0, os.ErrDeadlineExceeded
}

func (w *stalledWriter) SetWriteDeadline(time.Time) error {
	w.once.Do(func() { close(w.cut) })
	return nil
}

// Clients that do not read are cut off, the oldest first, when their pages take too much memory for another one, but not the
// last of them, however large its page is.
func TestStalledPages(t *testing.T) {
	p := &pages{most: 100}
	scrape := func(w http.ResponseWriter) { p.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil)) }
	var stalled []*stalledWriter
	var running sync.WaitGroup
	stall := func(size int) {
		p.make = func(context.Context) [][]byte { return [][]byte{make([]byte, size)} }
		w := newStalled()
		stalled = append(stalled, w)
		running.Go(func() { scrape(w) })
		<-w.began
	}
	cut := func(which ...bool) {
		t.Helper()
		for i, want := range which {
			got := false
			select {
			case <-stalled[i].cut:
				got = true
			default:
			}
			if got != want {
				t.Errorf("client %d is cut off: %v, want %v", i, got, want)
			}
		}
	}
	for range 3 {
		stall(30)
	}
	cut(false, false, false)
	stall(500)
	cut(false, false, false, false)
	stall(20)
	cut(true, true, true, false, false)
	labtest.Eventually(t, "pages of those cut off are forgotten", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.unread) == 2
	})
	read := httptest.NewRecorder()
	if scrape(read); read.Code != http.StatusOK || read.Body.Len() != 20 {
		t.Errorf("%d, %d bytes", read.Code, read.Body.Len())
	}
	cut(true, true, true, true, false)
	_ = stalled[4].SetWriteDeadline(time.Now())
	running.Wait()
	if len(p.unread) != 0 || p.next != nil {
		t.Errorf("%d pages are kept, next %v", len(p.unread), p.next)
	}
}

// Who asks while a page is made gets the next one, shared with all others who do: never one that was begun before.
func TestSharedPages(t *testing.T) {
	const clients = 20
	made, begun, turn := 0, make(chan struct{}, 2), make(chan struct{})
	p := &pages{make: func(context.Context) [][]byte {
		made++
		begun <- struct{}{}
		text := fmt.Appendf(nil, "page %d", made)
		<-turn
		return [][]byte{text}
	}}
	var running sync.WaitGroup
	answers := make([]*httptest.ResponseRecorder, clients)
	ask := func(i int) {
		answers[i] = httptest.NewRecorder()
		running.Go(func() { p.ServeHTTP(answers[i], httptest.NewRequest(http.MethodGet, "/metrics", nil)) })
	}
	ask(0)
	<-begun
	gone, leave := context.WithCancel(t.Context())
	for i := 1; i < clients; i++ {
		ask(i)
	}
	running.Go(func() { // its client does not wait
		p.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/metrics", nil).WithContext(gone))
	})
	labtest.Eventually(t, "all others wait for the next", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.next != nil && len(p.next.clients) == clients
	})
	leave()
	turn <- struct{}{}
	turn <- struct{}{}
	running.Wait()
	for i, a := range answers {
		if got, want := a.Body.String(), fmt.Sprintf("page %d", 1+min(i, 1)); got != want {
			t.Errorf("client %d got %q, want %q", i, got, want)
		}
	}
	if made != 2 || len(p.unread) != 0 {
		t.Errorf("%d pages were made, %d are kept", made, len(p.unread))
	}
}

// A page that cannot be made fails its own clients, and no others.
func TestFailingPage(t *testing.T) {
	fail := true
	p := &pages{make: func(context.Context) [][]byte {
		if fail {
			panic(errors.New("failed"))
		}
		return [][]byte{[]byte("page")}
	}}
	func() {
		defer func() {
			if recover() == nil {
				t.Error("no panic for the server to log")
			}
		}()
		p.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/metrics", nil))
	}()
	fail = false
	w := httptest.NewRecorder()
	if p.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil)); w.Body.String() != "page" {
		t.Errorf("%d %q", w.Code, w.Body)
	}
}
