package notify

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
)

// StartStage is the first argument of a program that calls [Stage] with the others.
const StartStage = "start-with-descriptors"

// Stage executes another program: a process of [Start] begins here. LISTEN_PID must be the
// process's PID, which is unknown before it exists. Stage only returns on an error.
func Stage(args []string) error {
	if len(args) == 0 {
		return errors.New("start: want a program")
	}
	path, err := exec.LookPath(args[0])
	if err != nil {
		return fmt.Errorf("start: %w", err)
	}
	env := append(os.Environ(), "LISTEN_PID="+strconv.Itoa(os.Getpid()))
	return fmt.Errorf("start %s: %w", path, syscall.Exec(path, args, env))
}

// Start starts a program, given as its file and arguments, in its own process group, and passes
// descriptors to it as in sd_listen_fds(3); File.FD stay open here. self is a program whose main
// calls [Stage], such as /proc/self/exe. env is the environment without the variables of the
// protocol, and stderr the descriptor of its standard error. The process gets ambient capabilities, which this one must have; see
// capabilities(7). The caller waits for the process.
func Start(self string, command, env []string, files []File, stderr int, ambient []uintptr) (*os.Process, error) {
	fds, names := []uintptr{0, 1, uintptr(stderr)}, make([]string, len(files))
	for i, f := range files {
		fds, names[i] = append(fds, uintptr(f.FD)), f.Name
	}
	if len(files) > 0 {
		env = append(env, "LISTEN_FDS="+strconv.Itoa(len(files)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	}
	pid, err := syscall.ForkExec(self, append([]string{self, StartStage}, command...), &syscall.ProcAttr{
		Env: env, Files: fds, Sys: &syscall.SysProcAttr{Setpgid: true, AmbientCaps: ambient},
	})
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", command[0], err)
	}
	return os.FindProcess(pid)
}

// WithoutProtocol returns an environment without the variables of the protocol, so that child
// processes do not inherit them.
func WithoutProtocol(env []string) []string {
	var kept []string
	for _, variable := range env {
		switch name, _, _ := strings.Cut(variable, "="); name {
		case "NOTIFY_SOCKET", nextVariable, "FDSTORE", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES":
		default:
			kept = append(kept, variable)
		}
	}
	return kept
}
