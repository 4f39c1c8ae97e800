package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/events"
	"xdpcast/internal/labtest"
)

// eventDaemon serves a log at a socket until stop is called.
func eventDaemon(t *testing.T, socket, file string) (log *events.Log, stop func()) {
	t.Helper()
	at := clock.Add(-time.Hour)
	log = events.Open(events.Options{File: file, Now: func() time.Time {
		at = at.Add(time.Minute)
		return at
	}})
	ln, err := control.Listen(socket, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	logging, end := context.WithCancel(context.Background())
	running.Go(func() { log.Run(logging) })
	running.Go(func() { _ = control.NewServer(&backend{}, control.Options{Events: log}).Serve(ctx, ln) })
	stop = sync.OnceFunc(func() {
		cancel()
		end()
		running.Wait()
	})
	t.Cleanup(stop)
	return log, stop
}

func logSome(t *testing.T, log *events.Log, n int) {
	t.Helper()
	last := log.Last()
	for range n {
		log.Add(events.Event{Kind: events.KindOutput, Rule: "cam1", Output: "239.2.2.2:6000%eth1", State: "pending", Before: "active", Cause: "interface eth1 has no\ncarrier"})
	}
	labtest.Eventually(t, "the events are there", func() bool { return log.Last() == last+uint64(n) })
}

func TestEventsCommand(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "s")
	log, stop := eventDaemon(t, socket, filepath.Join(dir, "events"))
	logSome(t, log, 20)
	lines := func(args ...string) []string {
		t.Helper()
		got := call("", append([]string{"--socket", socket, "events"}, args...)...)
		if got.code != exitDone || got.stderr != "" {
			t.Errorf("%q: %+v", args, got)
		}
		return strings.Split(strings.TrimSpace(got.stdout), "\n")
	}
	want := "1  2025-01-02 02:05:05.000  output 239.2.2.2:6000%eth1 of rule cam1: pending, was active: interface eth1 has no carrier"
	if all := lines(); len(all) != 20 || all[0] != want {
		t.Errorf("%d lines, the first %q, want %q", len(all), all[0], want)
	}
	for _, tt := range []struct {
		since string
		n     int
	}{{"15", 5}, {"45m", 6}, {"2025-01-02 02:20:05", 5}, {"2025-01-02T02:21:05Z", 4}, {"2025-01-02", 20}} {
		if all := lines("--since", tt.since); len(all) != tt.n {
			t.Errorf("since %s: %d, want %d", tt.since, len(all), tt.n)
		}
	}
	var e control.Event
	if err := json.Unmarshal([]byte(lines("--since", "19", "-o", "json")[0]), &e); err != nil || e.Number != 20 || e.State != "pending" {
		t.Errorf("%+v, %v", e, err)
	}
	for _, since := range []string{"x", "-5m", "2025-13-01"} {
		if got := call("", "--socket", socket, "events", "--since", since); got.code != exitUsage || !strings.Contains(got.stderr, "want the number of an event, an age such as 10m, or a time") {
			t.Errorf("%s: %+v", since, got)
		}
	}
	stop()
	if got := call("", "--socket", socket, "events", "--follow"); got.code != exitFailed || !strings.Contains(got.stderr, "no xdpcast is running") {
		t.Errorf("%+v", got)
	}
}

// safeBuffer is written and read at once.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// TestFollowOverARestart: who follows gets every event once, in order, also when the daemon is another one.
func TestFollowOverARestart(t *testing.T) {
	dir := t.TempDir()
	socket, file := filepath.Join(dir, "s"), filepath.Join(dir, "events")
	log, stop := eventDaemon(t, socket, file)
	logSome(t, log, 30)
	ctx, cancel := context.WithCancel(t.Context())
	var out, complaints safeBuffer
	code := make(chan int, 1)
	go func() {
		code <- run(ctx, []string{"xdpcast", "--socket", socket, "events", "-f", "-o", "json"}, strings.NewReader(""), &out, &complaints)
	}()
	upTo := func(n uint64) {
		t.Helper()
		labtest.Eventually(t, fmt.Sprintf("event %d is shown", n), func() bool { return strings.Contains(out.String(), fmt.Sprintf(`{"number":%d,`, n)) })
	}
	upTo(30)
	logSome(t, log, 3)
	upTo(33)
	stop()
	labtest.Eventually(t, "the end is told", func() bool { return strings.Contains(complaints.String(), "the daemon has ended") })
	log, _ = eventDaemon(t, socket, file)
	logSome(t, log, 3)
	upTo(36)
	cancel()
	if c := <-code; c != exitDone {
		t.Errorf("code %d: %s", c, complaints.String())
	}
	next := uint64(21) // the last 10, at first
	for line := range strings.Lines(out.String()) {
		var e control.Event
		if err := json.Unmarshal([]byte(line), &e); err != nil || e.Number != next {
			t.Errorf("%q (%v), want event %d", line, err, next)
		}
		next++
	}
}
