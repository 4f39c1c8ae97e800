package hold

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
	"xdpcast/internal/notify"
)

// standbyEnv makes the test program a daemon that wants a standby, and reports in files of this directory. SIGUSR1 makes it close
// its Life, as the kernel does for a dying process, and SIGUSR2 decline the standby.
const standbyEnv = "XDPCAST_TEST_STANDBY"

func wantStandby(dir string) int {
	report := func(what, text string) bool {
		name := filepath.Join(dir, fmt.Sprintf("%s.%d", what, os.Getpid()))
		return os.WriteFile(name+".next", []byte(text), 0o600) == nil && os.Rename(name+".next", name) == nil
	}
	manager, err := notify.Connect()
	if err != nil {
		return 10
	}
	files, err := notify.Received()
	if err != nil {
		return 11
	}
	var standby *Standby
	for _, f := range files {
		if f.Name == StandbyName {
			standby = NewStandby(f.FD)
		}
	}
	if standby != nil {
		if !report("waits", "") {
			return 12
		}
		kept, err := standby.Wait(context.Background())
		if errors.Is(err, io.EOF) {
			return 0
		}
		var names []string
		for _, f := range kept {
			names = append(names, f.Name)
		}
		if err != nil || !report("goes", strings.Join(names, " ")) || standby.WaitEnded() != nil || !report("alone", "") {
			return 13
		}
	} else {
		for i := range 2*mostAtOnce + 3 {
			if manager.Notify(fmt.Sprintf("FDSTORE=1\nFDPOLL=0\nFDNAME=kept.%d", i), 2) != nil {
				return 14
			}
		}
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGUSR1, unix.SIGUSR2)
	life, err := NewLife()
	if err != nil || manager.Notify(notify.Ready) != nil || life.Ask(manager, true) != nil || !report("works", "") {
		return 15
	}
	for s := range signals {
		if s == unix.SIGUSR1 && life.Close() != nil || s == unix.SIGUSR2 && life.Ask(manager, false) != nil {
			return 16
		}
	}
	return 0
}

// held is a holder of such daemons.
type held struct {
	t       *testing.T
	dir     string
	signals chan os.Signal
	ended   chan error
	log     *lockedText
}

type lockedText struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lockedText) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lockedText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func holdDaemons(t *testing.T, o Options) *held {
	t.Helper()
	outer, err := notify.Connect() // none
	if err != nil {
		t.Fatal(err)
	}
	h := &held{t: t, dir: t.TempDir(), signals: make(chan os.Signal, 1), ended: make(chan error, 1), log: &lockedText{}}
	t.Setenv(standbyEnv, h.dir)
	if o.Command == nil {
		o.Command = []string{os.Args[0]}
	}
	o.Socket, o.Max, o.Outer, o.Signals = filepath.Join(h.dir, "s"), 1000, outer, h.signals
	o.Log = slog.New(slog.NewTextHandler(h.log, nil))
	go func() {
		_, err := Run(o)
		h.ended <- err
	}()
	return h
}

// report waits for a report of a process that has not made it before, and returns the process.
func (h *held) report(what string, but ...int) (pid int) {
	h.t.Helper()
	labtest.Eventually(h.t, fmt.Sprintf("another process than %v %s", but, what), func() bool {
		names, err := filepath.Glob(filepath.Join(h.dir, what+".*[0-9]"))
		if err != nil {
			h.t.Fatal(err)
		}
	next:
		for _, name := range names {
			pid, err = strconv.Atoi(strings.TrimPrefix(filepath.Ext(name), "."))
			if err != nil {
				h.t.Fatal(err)
			}
			for _, other := range but {
				if pid == other {
					continue next
				}
			}
			return true
		}
		return false
	})
	return pid
}

func (h *held) has(what string, pid int) bool {
	_, err := os.Stat(filepath.Join(h.dir, fmt.Sprintf("%s.%d", what, pid)))
	return err == nil
}

// settled waits until a process counts as one that did not end too soon.
func (h *held) settled(pid int) {
	started, err := os.Stat(filepath.Join(h.dir, fmt.Sprintf("works.%d", pid)))
	if err != nil {
		h.t.Fatal(err)
	}
	labtest.Eventually(h.t, "it has worked for long enough", func() bool { return time.Since(started.ModTime()) > calm })
}

func (h *held) end(pids ...int) {
	h.t.Helper()
	h.signals <- unix.SIGTERM
	if err := <-h.ended; err != nil {
		h.t.Error(err)
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
			h.t.Errorf("process %d is still there, if only to be reaped: %v", pid, err)
		}
	}
	if h.t.Failed() {
		h.t.Log(h.log)
	}
}

func (h *held) signal(pid int, s unix.Signal) {
	h.t.Helper()
	if err := unix.Kill(pid, s); err != nil {
		h.t.Fatal(err)
	}
}

// A standby gets all that is kept as soon as the process before it can do nothing any more, hears of its end, and has a
// standby itself. Nothing of them outlives the holder.
func TestStandbyGoesOn(t *testing.T) {
	h := holdDaemons(t, Options{})
	first := h.report("works")
	second := h.report("waits")
	h.settled(first)
	h.signal(first, unix.SIGUSR1) // dies, and is not dead
	if pid := h.report("goes"); pid != second {
		t.Fatalf("process %d goes on, want the standby %d", pid, second)
	}
	text, err := os.ReadFile(filepath.Join(h.dir, fmt.Sprintf("goes.%d", second)))
	if err != nil {
		t.Fatal(err)
	}
	names := strings.Fields(string(text))
	if len(names) != 2*mostAtOnce+3 || names[0] != "kept.0" || names[len(names)-1] != fmt.Sprintf("kept.%d", len(names)-1) {
		t.Errorf("the standby gets %s", text)
	}
	if h.has("alone", second) || h.has("works", second) {
		t.Error("the standby is told of the end of a process that lives")
	}
	h.signal(first, unix.SIGKILL)
	h.report("works", first)
	if !h.has("alone", second) {
		t.Error("the standby works before the process before it has ended")
	}

	// One that is killed: the end of its Life and that of the process come in any order.
	third := h.report("waits", second)
	h.settled(second)
	h.signal(second, unix.SIGKILL)
	if pid := h.report("works", first, second); pid != third {
		t.Errorf("process %d works, want the standby %d", pid, third)
	}

	// One that does not want it any more.
	fourth := h.report("waits", second, third)
	h.signal(third, unix.SIGUSR2)
	labtest.Eventually(t, "the standby is gone", func() bool { return errors.Is(unix.Kill(fourth, 0), unix.ESRCH) })
	h.settled(third)
	h.signal(third, unix.SIGKILL)
	fifth := h.report("works", first, second, third)
	sixth := h.report("waits", second, third, fourth)

	// The holder ends while the process is to be started again: the standby's end is all that it has to wait for.
	h.signal(fifth, unix.SIGKILL)
	labtest.Eventually(t, "it is gone", func() bool { return errors.Is(unix.Kill(fifth, 0), unix.ESRCH) })
	h.end(fifth, sixth)
}

// A standby of a program that was replaced is not used, and --no-standby starts none.
func TestStandbyOfOtherProgram(t *testing.T) {
	text, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(t.TempDir(), "program")
	install := func() {
		if err := os.WriteFile(program+".new", text, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(program+".new", program); err != nil {
			t.Fatal(err)
		}
	}
	install()
	h := holdDaemons(t, Options{Command: []string{program}})
	first := h.report("works")
	second := h.report("waits")
	install()
	h.settled(first)
	h.signal(first, unix.SIGKILL)
	third := h.report("works", first)
	if third == second {
		t.Error("the standby runs an old program")
	}
	h.end(second, third)

	h = holdDaemons(t, Options{Command: []string{program}, Alone: true})
	first = h.report("works")
	h.settled(first)
	h.signal(first, unix.SIGKILL)
	second = h.report("works", first)
	if h.has("waits", second) || strings.Contains(h.log.String(), "standby") {
		t.Error("there is a standby")
	}
	h.end(second)
}

// The write end of a Life is closed before other files of a killed process.
func TestLifeEndsFirst(t *testing.T) {
	l, err := NewLife()
	if err != nil {
		t.Fatal(err)
	}
	if l.pipe[1] < firstClosed {
		t.Errorf("the write end has descriptor %d, want %d or more", l.pipe[1], firstClosed)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}
