package main

import (
	"log/slog"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/internal/nice"
	"xdpcast/internal/notify"
)

// A daemon that takes over prepares with a low priority until it has asked the previous one to leave a path, and any
// other never does.
func TestPreparesWithLowPriority(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	prioOf := func(prepare func(func())) (prio, thread int) {
		t.Helper()
		prepare(func() {
			var err error
			thread = unix.Gettid()
			if prio, err = unix.Getpriority(unix.PRIO_PROCESS, 0); err != nil { // 20 - nice
				t.Error(err)
			}
		})
		return prio, thread
	}
	usual, mine := prioOf(func(do func()) { do() })
	low := max(usual-nice.Increment, 1)
	alone := &service{log: slog.New(slog.DiscardHandler), holder: -1}
	if prio, thread := prioOf(alone.prepare); prio != usual || thread != mine {
		t.Errorf("without a predecessor the priority is %d, want %d", prio, usual)
	}
	t.Setenv("NOTIFY_SOCKET", "@xdpcast-test-nobody")
	t.Setenv("XDPCAST_NOTIFY_NEXT", "")
	manager, err := notify.Connect()
	if err != nil {
		t.Fatal(err)
	}
	s := &service{log: alone.log, holder: -1, manager: manager}
	t.Cleanup(func() {
		if err := s.close(); err != nil {
			t.Error(err)
		}
	})
	p := s.predecessor()
	if prio, thread := prioOf(p.Prepare); prio != low || thread == mine {
		t.Errorf("while the predecessor forwards the priority is %d, want %d", prio, low)
	}
	if err := p.Suspend("nothing"); err == nil {
		t.Error("nobody was asked, and has answered")
	}
	if prio, thread := prioOf(p.Prepare); prio != usual || thread != mine {
		t.Errorf("once the predecessor was asked the priority is %d, want %d", prio, usual)
	}
}
