package control

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"xdpcast/internal/events"
	"xdpcast/internal/labtest"
)

// eventLog is a log that runs until the test ends. So much time passes for it between events that
// none is summed.
func eventLog(t *testing.T) *events.Log {
	t.Helper()
	var seconds atomic.Int64
	log := events.Open(events.Options{Now: func() time.Time { return testTime.Add(time.Duration(seconds.Add(1)) * time.Second) }})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		log.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return log
}

// fillLog logs events of n rules, and waits until they are to be seen.
func fillLog(t *testing.T, log *events.Log, n int) {
	t.Helper()
	last := log.Last()
	for i := range n {
		log.Add(Event{Kind: events.KindRule, Rule: fmt.Sprintf("r%d", i), State: "active"})
	}
	labtest.Eventually(t, "the events are there", func() bool { return log.Last() == last+uint64(n) })
}

func numbers(t *testing.T, c *Client, q EventQuery) (all []uint64) {
	t.Helper()
	if err := c.Events(t.Context(), q, func(e Event) error {
		all = append(all, e.Number)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return all
}

func TestEvents(t *testing.T) {
	log := eventLog(t)
	c := NewClient(serve(t, &fake{}, Options{Events: log}))
	if all := numbers(t, c, EventQuery{}); len(all) != 0 {
		t.Errorf("%v", all)
	}
	fillLog(t, log, 600)
	middle := testTime.Add(600*time.Second + 1)
	fillLog(t, log, 7)
	for _, tt := range []struct {
		q     EventQuery
		first uint64
	}{{EventQuery{}, 1}, {EventQuery{After: 100}, 101}, {EventQuery{Tail: 3}, 605}, {EventQuery{Since: middle}, 601}, {EventQuery{After: 606, Tail: 50}, 607}} {
		all := numbers(t, c, tt.q)
		if all[0] != tt.first || all[len(all)-1] != 607 || uint64(len(all)) != 607-tt.first+1 {
			t.Errorf("%+v: %d events, from %d to %d", tt.q, len(all), all[0], all[len(all)-1])
		}
	}
	for _, query := range []string{"since=x", "since=-1", "tail=0", "tail=x", "follow=yes", "until=3"} {
		err := c.call(t.Context(), http.MethodGet, "/v1/events?"+query, nil, nil)
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", query, err)
		}
	}
	if err := c.call(t.Context(), http.MethodPost, "/v1/events", nil, nil); !errors.Is(err, ErrInvalid) {
		t.Errorf("POST: %v", err)
	}
}

// TestFollow: who follows gets each event as it comes, until the log ends.
func TestFollow(t *testing.T) {
	log := eventLog(t)
	c := NewClient(serve(t, &fake{}, Options{Events: log}))
	fillLog(t, log, 5)
	got := make(chan uint64, 100)
	ended := make(chan error, 1)
	go func() {
		ended <- c.Events(t.Context(), EventQuery{Follow: true, Tail: 2}, func(e Event) error {
			got <- e.Number
			if e.Number == 8 {
				return errors.New("enough")
			}
			return nil
		})
	}()
	for want := uint64(4); want <= 8; want++ {
		if want > 5 {
			log.Add(Event{Kind: events.KindRule, State: "active"})
		}
		if n := <-got; n != want {
			t.Fatalf("event %d, want %d", n, want)
		}
	}
	if err := <-ended; err == nil || err.Error() != "enough" {
		t.Error(err)
	}
}

// sse opens a stream of server-sent events.
func sse(t *testing.T, socket, path string, header http.Header) *bufio.Reader {
	t.Helper()
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://xdpcast"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header = header
	answer, err := (&http.Client{Transport: transport}).Do(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { answer.Body.Close() })
	if kind := answer.Header.Get("Content-Type"); answer.StatusCode != http.StatusOK || kind != "text/event-stream" {
		t.Fatalf("%d %s", answer.StatusCode, kind)
	}
	return bufio.NewReader(answer.Body)
}

// TestServerSentEvents: a browser goes on behind the event that it has seen last.
func TestServerSentEvents(t *testing.T) {
	log := eventLog(t)
	socket := serve(t, &fake{}, Options{Events: log})
	fillLog(t, log, 9)
	stream := sse(t, socket, "/v1/events?since=2", http.Header{"Accept": {"text/event-stream"}, "Last-Event-Id": {"7"}})
	read := func(want string) {
		t.Helper()
		line, err := stream.ReadString('\n')
		if err != nil || !strings.HasPrefix(line, want) {
			t.Fatalf("%q, %v; want %q", line, err, want)
		}
	}
	for n := 8; n <= 10; n++ {
		if n == 10 {
			fillLog(t, log, 1)
		}
		read(fmt.Sprintf("id: %d\n", n))
		read("event: event\n")
		read(fmt.Sprintf(`data: {"number":%d,`, n))
		read("\n")
	}
}

// TestSlowFollower: a client that does not read holds up nobody, and is told what it has missed.
func TestSlowFollower(t *testing.T) {
	log := eventLog(t)
	c := NewClient(serve(t, &fake{}, Options{Events: log}))
	reading, proceed, ended := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	var missed, seen uint64
	const total = 4 * events.Kept
	stop := errors.New("seen all")
	go func() {
		ended <- c.Events(t.Context(), EventQuery{Follow: true}, func(e Event) error {
			if seen == 0 {
				close(reading)
				<-proceed
			}
			if e.Kind == events.KindMissed {
				missed += e.Count
				return nil
			}
			if seen++; e.Number != seen+missed {
				return fmt.Errorf("event %d after %d seen and %d missed", e.Number, seen-1, missed)
			}
			if e.Number == total {
				return stop
			}
			return nil
		})
	}()
	log.Add(Event{Kind: events.KindRule, State: "active"})
	<-reading
	for range total - 1 {
		log.Add(Event{Kind: events.KindRule, Rule: "r", State: "active", Cause: strings.Repeat("x", 200)})
	}
	close(proceed)
	if err := <-ended; !errors.Is(err, stop) {
		t.Error(err)
	}
	if missed == 0 || seen+missed != total {
		t.Errorf("%d seen and %d missed of %d", seen, missed, total)
	}
}

// TestFollowersAreBounded: those who follow leave room for others.
func TestFollowersAreBounded(t *testing.T) {
	log := eventLog(t)
	socket := serve(t, &fake{}, Options{Events: log})
	for range maxFollowers {
		sse(t, socket, "/v1/events", http.Header{"Accept": {"text/event-stream"}})
	}
	c := NewClient(socket)
	err := c.Events(t.Context(), EventQuery{Follow: true}, nil)
	if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "32 clients already follow") {
		t.Errorf("%v", err)
	}
	numbers(t, c, EventQuery{})
}
