package hold

import (
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/notify"
)

// replacesVariable makes the test program take over from the process that started it, and end.
const replacesVariable = "XDPCAST_TEST_REPLACES"

func takeOver() int {
	manager, err := notify.Connect()
	if err != nil {
		return 10
	}
	if os.Getenv(replacesVariable) == "fail" {
		for range 20 {
			if manager.Notify("STATUS=not yet") != nil {
				return 11
			}
		}
		if manager.Notify("STATUS=a reason") != nil {
			return 11
		}
		return 3
	}
	if manager.Notify(notify.Ready) != nil || manager.Barrier() != nil {
		return 11
	}
	return 7
}

// A process that has taken over and ends while its predecessor still runs is not reaped there: it is
// left to the predecessor's manager, which would never hear of its end otherwise.
func TestReplacedProcessIsNotReaped(t *testing.T) {
	outer, err := notify.Connect() // none
	if err != nil {
		t.Fatal(err)
	}
	pid, err := Replace(t.Context(), Replacement{
		Command: []string{os.Args[0]}, Env: append(os.Environ(), replacesVariable+"=1"),
		Outer: outer, Timeout: time.Minute, Log: slog.New(slog.DiscardHandler), Stop: func(string) error { return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatalf("wait for the process: %v", err)
	}
	time.Sleep(50 * time.Millisecond) // for the one who must not reap it
	var status unix.WaitStatus
	if got, err := unix.Wait4(pid, &status, unix.WNOHANG, nil); got != pid || err != nil || status.ExitStatus() != 7 {
		t.Errorf("the process is reaped: %d, %v, exit code %d; want %d and 7", got, err, status.ExitStatus(), pid)
	}
}

// Why a process ended is known, however many of its messages are unread when it has.
func TestReasonOfEnd(t *testing.T) {
	outer, err := notify.Connect() // none
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		_, err = Replace(t.Context(), Replacement{
			Command: []string{os.Args[0]}, Env: append(os.Environ(), replacesVariable+"=fail"),
			Outer: outer, Timeout: time.Minute, Log: slog.New(slog.DiscardHandler), Stop: func(string) error { return nil },
		})
		if err == nil || !strings.HasSuffix(err.Error(), "ended with exit status 3 before it was ready: a reason") {
			t.Errorf("the error is %v", err)
		}
	}
}
