package hold

import (
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// A process that has just replaced the one to which the end was signalled is ended, too, instead of being waited for.
func TestEndsReplacement(t *testing.T) {
	// A background job of a shell ignores SIGINT, and so would its children: those of a process that handles it do not.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, endSignal)
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
		want := endSignal
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
