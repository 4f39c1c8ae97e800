package e2e_test

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Workers get the real-time priority that was asked for, also of a daemon that drops its capabilities. One that
// may not give it says what it needs, and ends. A limit in place of the capability: TestPriorityByLimit of
// internal/forward.
func TestWorkerPriority(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	in.mustCLI("load", "-i", "in0") // mounts the BPF file system, which requires CAP_SYS_ADMIN
	file := in.write("rules.yaml", "rules:\n  - {name: file, path: fanout, in: \"239.1.9.1:5000%in0\", out: [\"239.2.9.1:6000%out0\"]}\n")
	needs := documentedCapabilities(t)["run"]
	if len(needs) == 0 {
		t.Fatal("docs/operations.md does not say what xdpcast run needs")
	}
	noLimit := func() (undo func()) {
		before := program
		program = in.script("limited", "#!/bin/sh\nexec prlimit --rtprio=0 "+before+" \"$@\"\n")
		return func() { program = before }
	}
	for _, tt := range []struct {
		name         string
		capabilities []string // in addition; nil: all of root's
		args         []string
		refused      bool
	}{
		{name: "root"},
		{name: "capability", capabilities: []string{"NET_RAW", "SYS_NICE"}},
		{name: "neither", capabilities: []string{"NET_RAW"}, refused: true},
		{name: "user", args: []string{"--user", "nobody"}}, // last: the user owns the files then
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.capabilities != nil {
				defer in.having(append(tt.capabilities, needs...))()
			}
			defer noLimit()()
			args := append([]string{"--worker-priority", "5", "--fanout-workers", "2", "-c", file}, tt.args...)
			if tt.refused {
				d := in.startCommand(append([]string{"run"}, args...)...)
				<-d.exited
				if code := d.cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(d.log.String(), "real-time priority 5 is not permitted: want CAP_SYS_NICE, or a limit RLIMIT_RTPRIO of at least 5") {
					t.Errorf("exit code %d:\n%s", code, d.log.String())
				}
				return
			}
			d := in.start(args...)
			eventually(t, "two workers have the priority", func() string {
				if got := realTime(t, d.cmd.Process.Pid); got != "5 5" {
					return fmt.Sprintf("priorities %q", got)
				}
				return ""
			})
			if code := d.stop(syscall.SIGTERM); code != 0 {
				t.Errorf("exit code %d:\n%s", code, d.log.String())
			}
		})
	}
}

// realTime returns the priorities of a process's threads that have a real-time one.
func realTime(t *testing.T, pid int) string {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, name := range threads {
		tid, err := strconv.Atoi(filepath.Base(name))
		if err != nil {
			t.Fatal(err)
		}
		// A thread may end meanwhile.
		if attr, err := unix.SchedGetAttr(tid, 0); err == nil && attr.Policy == unix.SCHED_FIFO {
			all = append(all, fmt.Sprint(attr.Priority))
		}
	}
	return strings.Join(all, " ")
}
