package events

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"xdpcast/internal/labtest"
)

// script makes a program for a hook.
func script(t *testing.T, text string) (path, out string) {
	t.Helper()
	dir := t.TempDir()
	path, out = filepath.Join(dir, "hook"), filepath.Join(dir, "out")
	text = "#!/bin/sh\nout=" + out + "\n" + text + "\n"
	if err := os.WriteFile(path, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	return path, out
}

func read(path string) string {
	text, _ := os.ReadFile(path)
	return string(text)
}

func hook(t *testing.T, h Hook, l *Log) *bytes.Buffer {
	t.Helper()
	var said bytes.Buffer
	h.Log = slog.New(slog.NewTextHandler(&said, nil))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	r := l.ReadAfter(l.Last())
	go func() {
		defer close(done)
		h.Run(ctx, r)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return &said
}

func TestHook(t *testing.T) {
	program, out := script(t, `echo "$XDPCAST_EVENT_NUMBER $XDPCAST_EVENT_KIND $XDPCAST_EVENT_RULE $XDPCAST_EVENT_STATE $XDPCAST_EVENT_CAUSE $XDPCAST_EVENT" >>$out`)
	l, _ := testLog(t, "")
	run(t, l)
	l.Add(Event{Kind: KindDaemon, State: "started"})
	labtest.Eventually(t, "the first event is shown", func() bool { return l.Last() == 1 })
	hook(t, Hook{Program: program}, l)
	l.Add(Event{Kind: KindRule, Rule: "cam1", State: "failed", Cause: "$(touch x); \"quoted\"\x00"})
	labtest.Eventually(t, "the program has run for an event", func() bool {
		return strings.Contains(read(out), "rule cam1 failed $(touch x); \"quoted\" {")
	})
	if text := read(out); !strings.HasPrefix(text, "2 ") {
		t.Errorf("%q, want event 2 alone", text)
	}
}

// TestHookIsBounded: a program that hangs is killed with what it has started, and one that is slow
// is told what it missed.
func TestHookIsBounded(t *testing.T) {
	program, out := script(t, `echo "$XDPCAST_EVENT_NUMBER $XDPCAST_EVENT_MISSED" >>$out; sleep 1000 & echo $! >>$out.pid; wait`)
	l, c := testLog(t, "")
	run(t, l)
	hook(t, Hook{Program: program, Timeout: 2 * time.Second}, l)
	labtest.Eventually(t, "the program runs", func() bool {
		l.Add(ruleEvent(0, "active"))
		return read(out) != ""
	})
	for range 5_000 {
		c.advance(time.Second)
		l.Add(ruleEvent(0, "active"))
	}
	labtest.Eventually(t, "the program is told of what it missed", func() bool {
		for line := range strings.Lines(read(out)) {
			var number, missed uint64
			if _, err := fmt.Sscan(line, &number, &missed); err == nil && missed > 1_000 && number > 4_000 {
				return true
			}
		}
		return false
	})
	labtest.Eventually(t, "what it started is killed", func() bool {
		pid := strings.TrimSpace(strings.SplitAfter(read(out+".pid"), "\n")[0])
		state, _ := os.ReadFile("/proc/" + pid + "/stat")
		return pid != "" && (len(state) == 0 || strings.Contains(string(state), ") Z "))
	})
}
