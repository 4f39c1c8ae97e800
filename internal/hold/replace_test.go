package hold

import (
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
	"xdpcast/internal/notify"
)

// replacesVariable makes the test program take over from the process that started it, and end.
const replacesVariable = "XDPCAST_TEST_REPLACES"

func takeOver() int {
	switch how := os.Getenv(replacesVariable); how {
	case "mute":
		fmt.Fprintf(os.Stderr, "time=0 level=INFO msg=begins\n%s\n\n\tflag provided\x1b but not defined: -new\nlast", strings.Repeat("x", 1<<20))
		return 2
	case "panic":
		panic("a fault")
	case "old", "new":
		return logs(how == "new")
	}
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

// logs takes over, and writes to standard error once its predecessor has ended.
func logs(knows bool) int {
	manager, err := notify.Connect()
	if err != nil {
		return 10
	}
	files, err := notify.Received()
	if err != nil {
		return 11
	}
	fmt.Fprintln(os.Stderr, "before")
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, unix.SIGUSR1)
	for _, f := range files {
		if f.Name == StderrName && knows && KeepStderr(f.FD) != nil {
			return 12
		}
	}
	if manager.Notify(notify.Ready) != nil || manager.Barrier() != nil {
		return 13
	}
	<-ended
	fmt.Fprintln(os.Stderr, "after")
	return 7
}

// A process that ends before it can report anything says why on standard error, which is copied: its last lines are in the
// error, one line of bounded length.
func TestLastWords(t *testing.T) {
	outer, err := notify.Connect() // none
	if err != nil {
		t.Fatal(err)
	}
	for how, want := range map[string]string{
		"mute":  "ended with exit status 2 before it was ready: flag provided  but not defined: -new; last",
		"panic": "ended with exit status 2 before it was ready: panic: a fault",
	} {
		file, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
		if err != nil {
			t.Fatal(err)
		}
		_, err = Replace(t.Context(), Replacement{
			Command: []string{os.Args[0]}, Env: append(os.Environ(), replacesVariable+"="+how), Stderr: file,
			Outer: outer, Timeout: time.Minute, Log: slog.New(slog.DiscardHandler), Stop: func(string) error { return nil },
		})
		if err == nil || !strings.HasSuffix(err.Error(), want) {
			t.Errorf("the error is %v, want %s", err, want)
		}
		text, err := os.ReadFile(file.Name())
		if err != nil {
			t.Fatal(err)
		}
		if how == "mute" && (len(text) < 1<<20 || !strings.HasSuffix(string(text), "last")) {
			t.Errorf("%d bytes are copied", len(text))
		}
	}
	w := &lastWords{}
	for _, some := range []string{"one\ntw", "o\n\n\tflag provided\x1b but", " not defined: -new\nlevel=INFO msg=x\n", "la\xffst"} {
		if _, err := w.Write([]byte(some)); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := w.String(), "two; flag provided  but not defined: -new; la\uFFFDst"; got != want {
		t.Errorf("the last words are %q, want %q", got, want)
	}
}

// A process that has taken over goes on writing to the standard error of its predecessor, whether or not it knows that it was
// copied.
func TestStandardErrorOutlives(t *testing.T) {
	outer, err := notify.Connect() // none
	if err != nil {
		t.Fatal(err)
	}
	for _, how := range []string{"old", "new"} {
		file, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
		if err != nil {
			t.Fatal(err)
		}
		pid, err := Replace(t.Context(), Replacement{
			Command: []string{os.Args[0]}, Env: append(os.Environ(), replacesVariable+"="+how), Stderr: file,
			Outer: outer, Timeout: time.Minute, Log: slog.New(slog.DiscardHandler), Stop: func(string) error { return nil },
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Kill(pid, unix.SIGUSR1); err != nil {
			t.Fatal(err)
		}
		var status unix.WaitStatus
		if _, err := unix.Wait4(pid, &status, 0, nil); err != nil || status.ExitStatus() != 7 {
			t.Errorf("%s: exit code %d, signal %v, %v", how, status.ExitStatus(), status.Signal(), err)
		}
		labtest.Eventually(t, "all is written", func() bool {
			text, err := os.ReadFile(file.Name())
			if err != nil {
				t.Fatal(err)
			}
			return string(text) == "before\nafter\n"
		})
	}
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
