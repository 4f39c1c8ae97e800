package main

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// asChaos makes this binary run main.
const asChaos = "XDPCAST_TEST_CHAOS"

func TestMain(m *testing.M) {
	if os.Getenv(asChaos) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// Nothing is left behind, whichever signal ends it.
func TestSignalsLeaveNothing(t *testing.T) {
	labtest.RequireRoot(t)
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	program, err := labtest.Program(dir)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT} {
		name := lab.UniqueName("chaos-test")
		cmd := exec.Command(self, "-xdpcast", program, "-name", name, "-smoke", "-pause", "10h", "-only", "nothing")
		cmd.Env, cmd.Stderr = append(os.Environ(), asChaos+"=1"), os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for lines.Scan() && !strings.HasPrefix(lines.Text(), "DISTURBANCE") {
			continue
		}
		if len(labtest.Leftovers(t, name)) == 0 {
			t.Error("there is nothing to be left")
		}
		if err := cmd.Process.Signal(signal); err != nil {
			t.Error(err)
		}
		for lines.Scan() {
			continue
		}
		if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != 1 {
			t.Errorf("after %v it ended with %v, want exit code 1", signal, cmd.ProcessState)
		}
		if left := labtest.Leftovers(t, name); len(left) > 0 {
			t.Errorf("%v leaves %s", signal, strings.Join(left, "\n"))
		}
		mounts, err := os.ReadFile("/proc/mounts")
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(mounts), name) {
			t.Errorf("%v leaves a mount:\n%s", signal, mounts)
		}
	}
}
