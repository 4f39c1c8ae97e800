package e2e_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// patience bounds every wait for a condition. It is long, since a test machine may be busy, or
// emulated, where loading the programs takes a minute; no wait reaches it while all is well.
const patience = 2 * time.Minute

// eventually waits until lacks, which returns what is missing, returns "".
func eventually(t testing.TB, what string, lacks func() string) {
	t.Helper()
	last := ""
	for start := time.Now(); time.Since(start) < patience; labtest.Pause(start, 5*time.Millisecond) {
		if last = lacks(); last == "" {
			return
		}
	}
	t.Fatalf("timed out waiting until %s: %s", what, last)
}

// instance is the directories of a daemon. Several daemons may use it in turn.
type instance struct {
	t       testing.TB
	host    *lab.Host
	dir     string // of all files
	pinDir  string
	runDir  string
	socket  string
	client  *control.Client
	running *daemon
	program string // program started by start, if not the common one

	sentinels int // how often left was called
}

// newInstance makes the directories for a daemon on a host.
func newInstance(t testing.TB, host *lab.Host) *instance {
	t.Helper()
	// Not t.TempDir: the path of a socket must be short.
	dir, err := os.MkdirTemp("", "xe-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	in := &instance{
		t: t, host: host, dir: dir, pinDir: filepath.Join(dir, "bpf", "xdpcast"),
		runDir: filepath.Join(dir, "run"), socket: filepath.Join(dir, "run", "xdpcast.sock"),
	}
	in.client = control.NewClient(in.socket)
	t.Cleanup(in.cleanUp)
	return in
}

// on is the same instance used from another host: neither can use the other's state.
func (in *instance) on(host *lab.Host) *instance {
	other := *in
	other.host, other.running = host, nil
	other.socket = filepath.Join(in.dir, "other", "xdpcast.sock")
	other.client = control.NewClient(other.socket)
	return &other
}

func (in *instance) cleanUp() {
	if in.running != nil && in.running.process != nil {
		in.running.stopFollower()
	} else if in.running != nil {
		select {
		case <-in.running.exited: // a test has ended it and checked how
		default:
			if code := in.running.stop(syscall.SIGTERM); code != 0 {
				in.t.Errorf("the daemon ended with code %d", code)
			}
		}
	}
	if in.t.Failed() && in.running != nil {
		in.t.Logf("log of the daemon:\n%s", in.running.log.String())
	}
	if _, err := os.Stat(in.pinDir); err == nil {
		if got := in.cli("unload", "--all"); got.code != 0 {
			in.t.Errorf("unload: %s", got)
		}
	}
	labtest.Unmount(in.t, filepath.Dir(in.pinDir)) // nothing is mounted if no daemon got that far
	if err := os.RemoveAll(in.dir); err != nil {
		in.t.Error(err)
	}
}

func (in *instance) env() []string {
	return append(os.Environ(), "XDPCAST_SOCKET="+in.socket, "XDPCAST_PIN_DIR="+in.pinDir, "XDPCAST_RUN_DIR="+in.runDir)
}

// result is the outcome of a command.
type result struct {
	code           int
	stdout, stderr string
}

func (r result) String() string {
	return fmt.Sprintf("exit code %d\nstdout: %s\nstderr: %s", r.code, r.stdout, r.stderr)
}

// cli runs a command of the program on the host, as a user would type it.
func (in *instance) cli(args ...string) result {
	in.t.Helper()
	return in.cliAs(nil, args...)
}

// cliAs is cli with other process attributes, such as another user.
func (in *instance) cliAs(attr *syscall.SysProcAttr, args ...string) result {
	in.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env, cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = in.env(), &stdout, &stderr, attr
	if err := in.host.Start(cmd); err != nil {
		in.t.Fatal(err)
	}
	err := cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		in.t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// mustCLI is cli for a command that must succeed; it returns its output.
func (in *instance) mustCLI(args ...string) string {
	in.t.Helper()
	got := in.cli(args...)
	if got.code != 0 {
		in.t.Fatalf("xdpcast %s: %s", strings.Join(args, " "), got)
	}
	return got.stdout
}

// script writes an executable file into the instance's directory and returns its path.
func (in *instance) script(name, text string) string {
	in.t.Helper()
	path := filepath.Join(in.dir, name)
	labtest.WriteProgram(in.t, path, []byte(text))
	return path
}

// write writes a file into the instance's directory and returns its path.
func (in *instance) write(name, text string) string {
	in.t.Helper()
	path := filepath.Join(in.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		in.t.Fatal(err)
	}
	return path
}

// add adds a rule through the API.
func (in *instance) add(name, input string, outputs ...string) control.RuleStatus {
	in.t.Helper()
	status, err := in.client.AddRule(in.t.Context(), control.Rule{Name: name, In: input, Out: outputs})
	if err != nil {
		in.t.Fatal(err)
	}
	return status
}

// delete deletes a rule through the API.
func (in *instance) delete(name string) {
	in.t.Helper()
	if err := in.client.DeleteRule(in.t.Context(), name); err != nil {
		in.t.Error(err)
	}
}

func (in *instance) rule(name string) control.RuleStatus {
	in.t.Helper()
	status, err := in.client.Rule(in.t.Context(), name)
	if err != nil {
		in.t.Fatal(err)
	}
	return status
}

func (in *instance) rules() []control.RuleStatus {
	in.t.Helper()
	all, err := in.client.Rules(in.t.Context())
	if err != nil {
		in.t.Fatal(err)
	}
	return all
}

// waitState waits until a rule has a state.
func (in *instance) waitState(name, state string) control.RuleStatus {
	in.t.Helper()
	var got control.RuleStatus
	eventually(in.t, fmt.Sprintf("rule %s is %s", name, state), func() string {
		got = in.rule(name)
		if got.State == state {
			return ""
		}
		return fmt.Sprintf("it is %s (%s)", got.State, got.Reason)
	})
	return got
}

// daemon is one process of `xdpcast run`.
type daemon struct {
	t      testing.TB
	cmd    *exec.Cmd
	log    *safeBuffer
	exited chan struct{}

	process *os.Process // that replaced it; nil: none
}

// small are options of a daemon with room for fewer rules and outputs than by default: the kernel takes a tenth of a
// second of CPU time to make its counters for 81,920.
var small = []string{"--max-rules", "512", "--max-outputs", "2048"}

// start starts a daemon with room for a few hundred rules, unless the arguments have a size, and waits until its rules
// are active.
func (in *instance) start(args ...string) *daemon {
	in.t.Helper()
	d := in.startCommand(slices.Concat([]string{"run"}, small, args)...)
	eventually(in.t, "the daemon is ready", func() string {
		select {
		case <-d.exited:
			in.t.Fatalf("the daemon ended with code %d:\n%s", d.cmd.ProcessState.ExitCode(), d.log.String())
		default:
		}
		status, err := in.client.Status(in.t.Context())
		switch {
		case err != nil:
			return err.Error()
		case status.PID != d.cmd.Process.Pid || !status.Ready:
			return "it is not yet"
		}
		return ""
	})
	return d
}

// startCommand starts the program.
func (in *instance) startCommand(args ...string) *daemon {
	in.t.Helper()
	d := &daemon{t: in.t, cmd: exec.Command(cmp.Or(in.program, program), args...), log: &safeBuffer{}, exited: make(chan struct{})}
	d.cmd.Env, d.cmd.Stdout, d.cmd.Stderr = in.env(), d.log, d.log
	if err := in.host.Start(d.cmd); err != nil {
		in.t.Fatal(err)
	}
	in.running = d
	go func() {
		defer close(d.exited)
		_ = d.cmd.Wait() // the process state has the error as well
	}()
	return d
}

// signal sends a signal to the process.
func (d *daemon) signal(sig syscall.Signal) {
	d.t.Helper()
	if err := d.cmd.Process.Signal(sig); err != nil {
		d.t.Fatal(err)
	}
}

// stop ends the process and returns its exit code, -1 if it was killed.
func (d *daemon) stop(sig syscall.Signal) int {
	select {
	case <-d.exited:
		return d.cmd.ProcessState.ExitCode()
	default:
	}
	_ = d.cmd.Process.Signal(sig)
	select {
	case <-d.exited:
	case <-time.After(patience):
		d.t.Errorf("the daemon does not end after %v:\n%s", sig, d.log.String())
		_ = d.cmd.Process.Kill()
		<-d.exited
	}
	return d.cmd.ProcessState.ExitCode()
}

// stopFollower ends the process that replaced the daemon; it is not a child of this one.
func (d *daemon) stopFollower() {
	d.t.Helper()
	pid := d.process.Pid
	d.process = nil
	if err := unix.Kill(pid, unix.SIGTERM); err != nil {
		d.t.Errorf("end the daemon that has taken over: %v", err)
		return
	}
	eventually(d.t, "the daemon that has taken over ends", func() string {
		if runs(pid) {
			return "it runs"
		}
		return ""
	})
}

// runs says whether a process has not ended. One that nobody has waited for has.
func runs(pid int) bool {
	state, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(state), ") Z ")
}

// waitLog waits until the log contains a text at least n times.
func (d *daemon) waitLog(text string, n int) {
	d.t.Helper()
	eventually(d.t, fmt.Sprintf("the log says %q %d times", text, n), func() string {
		log := d.log.String()
		if strings.Count(log, text) >= n {
			return ""
		}
		return log
	})
}

// safeBuffer is a buffer that a process writes while a test reads.
type safeBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
