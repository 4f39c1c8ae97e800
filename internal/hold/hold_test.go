package hold

import (
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/notify"
)

// A process that has just replaced the one to which the end was signalled is ended, too, instead of being waited for.
func TestEndsReplacement(t *testing.T) {
	// A background job of a shell ignores SIGINT, and so would its children: those of a process that handles it do not.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGINT)
	defer signal.Stop(signals)
	for _, ending := range []bool{false, true} {
		cmd := exec.Command("sleep", "600")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		h := &holder{Options: Options{Log: slog.New(slog.DiscardHandler)}, ending: ending}
		h.follow(strconv.Itoa(cmd.Process.Pid))
		if h.main != cmd.Process.Pid {
			t.Errorf("the main process is %d, want %d", h.main, cmd.Process.Pid)
		}
		want := unix.SIGINT
		if !ending {
			want = unix.SIGKILL // by this test
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
		_ = cmd.Wait() // the state says how it ended
		if status := cmd.ProcessState.Sys().(interface{ Signal() unix.Signal }); status.Signal() != want {
			t.Errorf("ending %v: %v", ending, cmd.ProcessState)
		}
	}
}

// broken is a listener whose socket fails so many times, and is then closed.
type broken struct {
	failures int
	reads    []time.Time
}

func (b *broken) Receive() (notify.Message, error) {
	if b.reads = append(b.reads, time.Now()); len(b.reads) > b.failures {
		return notify.Message{}, net.ErrClosed
	}
	return notify.Message{}, unix.ENOBUFS
}

// After an error of the socket the holder reads on, with a pause: the error may come again at once.
func TestReceivePauses(t *testing.T) {
	b, log := &broken{failures: 2}, slog.New(slog.DiscardHandler)
	receive(b, nil, nil, log)
	if len(b.reads) != 3 {
		t.Fatalf("read %d times, want 3", len(b.reads))
	}
	if took := b.reads[2].Sub(b.reads[0]); took < 2*receivePause {
		t.Errorf("two failures took %v, want pauses of %v", took, receivePause)
	}
	stop := make(chan struct{})
	close(stop)
	b = &broken{failures: 1 << 20}
	if receive(b, nil, stop, log); len(b.reads) > 1 {
		t.Errorf("read %d times after the end", len(b.reads))
	}
}

// A process is ended by SIGTERM, as by any supervisor: a shell puts off SIGINT, and background jobs ignore it. One that
// restarts on SIGTERM says so, and is ended by SIGINT, also if it says so only after the signal.
func TestEndSignal(t *testing.T) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM) // as above
	defer signal.Stop(signals)
	for _, c := range []struct {
		says, late bool
		want       unix.Signal
	}{{false, false, unix.SIGTERM}, {true, false, unix.SIGINT}, {true, true, unix.SIGINT}} {
		command := exec.Command("sleep", "600")
		if c.late {
			command = exec.Command("sh", "-c", "trap '' TERM; echo set; exec sleep 600")
		}
		out, err := command.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := command.Start(); err != nil {
			t.Fatal(err)
		}
		if c.late {
			if _, err := out.Read(make([]byte, 4)); err != nil {
				t.Fatal(err)
			}
		}
		h := &holder{Options: Options{Log: slog.New(slog.DiscardHandler)}, store: NewStore(1), main: command.Process.Pid}
		say := func() {
			if c.says {
				h.told(&notify.Message{PID: h.main, UID: os.Geteuid(), Lines: []string{RestartsOnTerm}})
			}
		}
		if !c.late {
			say()
		}
		if h.pass(unix.SIGTERM) {
			t.Error("it does not wait for the process")
		}
		if c.late {
			say()
		}
		_ = command.Wait() // the state says how it ended
		if status := command.ProcessState.Sys().(interface{ Signal() unix.Signal }); status.Signal() != c.want {
			t.Errorf("%+v: %v", c, command.ProcessState)
		}
	}
}
