package main

import (
	"log/slog"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"xdpcast/internal/hold"
)

// Below "xdpcast hold" SIGTERM restarts the daemon, wherever its command line has the flags of all commands.
func TestRestartsOnTerm(t *testing.T) {
	for line, want := range map[string]bool{
		"xdpcast run -c rules.yaml": true, "xdpcast --socket /run/x.sock run": true, "xdpcast --socket=run run": true,
		"xdpcast": false, "": false, "xdpcast status": false, "xdpcast --socket run status": false, "xdpcast rule add run": false,
	} {
		args := strings.Fields(line)
		if restartsOnTerm(args) {
			t.Errorf("%q: SIGTERM restarts it without a holder", line)
		}
		t.Setenv(hold.RestartVariable, "SIGTERM")
		if got := restartsOnTerm(args); got != want {
			t.Errorf("%q: %v, want %v", line, got, want)
		}
		t.Setenv(hold.RestartVariable, "")
	}
}

// SIGTERM below "xdpcast hold" waits for an upgrade in progress, instead of ending it and the daemon: the
// successor is what it asks for.
func TestRestartDuringUpgrade(t *testing.T) {
	u := &upgrader{service: &service{log: slog.New(slog.DiscardHandler)}}
	u.one.Lock() // an upgrade is in progress
	signals, ends, done := make(chan os.Signal, 2), make(chan struct{}, 1), make(chan struct{})
	go func() {
		defer close(done)
		u.restartOnSignal(t.Context(), signals, func() { ends <- struct{}{} })
	}()
	signals <- syscall.SIGTERM
	for len(signals) > 0 {
		runtime.Gosched()
	}
	u.replaced = true
	u.one.Unlock()
	<-done
	if len(ends) > 0 {
		t.Error("the daemon ends although its successor is there")
	}

	// The second signal does not wait.
	u.one.Lock()
	done = make(chan struct{})
	go func() {
		defer close(done)
		u.restartOnSignal(t.Context(), signals, func() { ends <- struct{}{} })
	}()
	signals <- syscall.SIGTERM
	signals <- syscall.SIGTERM
	<-done
	u.one.Unlock()
	if len(ends) != 1 {
		t.Error("the second signal does not end the daemon")
	}
}
