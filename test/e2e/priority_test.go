package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Workers get the real-time priority that was asked for, also of a daemon that drops its capabilities, and with auto
// the lowest while they are idle. One that may not give it says what it needs, and ends, or with auto goes on. A limit
// in place of the capability: TestPriorityByLimit of internal/forward.
func TestWorkerPriority(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	in.mustCLI("load", "-i", "in0") // mounts the BPF file system, which requires CAP_SYS_ADMIN
	file := in.write("rules.yaml", "rules:\n  - {name: file, path: fanout, in: \"239.1.9.1:5000%in0\", out: [\"239.2.9.1:6000%out0\"]}\n")
	needs := documentedCapabilities(t)["run"]
	if len(needs) == 0 {
		t.Fatal("docs/operations.md does not say what xdpcast run needs")
	}
	var cpus unix.CPUSet
	if err := unix.SchedGetaffinity(0, &cpus); err != nil {
		t.Fatal(err)
	}
	cpu := 0
	for !cpus.IsSet(cpu) {
		cpu++
	}
	// With one CPU, since auto gives no priority to a worker that can go to one that is free.
	noLimit := func() (undo func()) {
		before := program
		program = in.script("limited", fmt.Sprintf("#!/bin/sh\nexec taskset -c %d prlimit --rtprio=0 %s \"$@\"\n", cpu, before))
		return func() { program = before }
	}
	const refusal = "real-time priority %d is not permitted: want CAP_SYS_NICE, or a limit RLIMIT_RTPRIO of at least %[1]d"
	allowed := "1 1" // of a user's daemon that may raise the limit of those without the capability
	if !mayRaise(t) {
		allowed = ""
	}
	for _, tt := range []struct {
		name         string
		capabilities []string // in addition; nil: all of root's
		args         []string
		want         string // priorities
		refused      bool
		log          string // contains this
	}{
		{name: "root", args: []string{"--worker-priority", "5"}, want: "5 5"},
		{name: "capability", capabilities: []string{"NET_RAW", "SYS_NICE"}, args: []string{"--worker-priority", "5"}, want: "5 5"},
		{name: "neither", capabilities: []string{"NET_RAW"}, args: []string{"--worker-priority", "5"}, refused: true, log: fmt.Sprintf(refusal, 5)},
		{name: "default"},
		{name: "auto", args: []string{"--worker-priority", "auto"}, want: "1 1"},
		{name: "none", args: []string{"--worker-priority", "none"}},
		{name: "auto, neither", capabilities: []string{"NET_RAW"}, args: []string{"--worker-priority", "auto"}, log: fmt.Sprintf("workers have no real-time priority\" cause=\""+refusal, 1)},
		// Last: the user owns the files then.
		{name: "user", args: []string{"--worker-priority", "5", "--user", "nobody"}, want: "5 5"},
		{name: "auto, user", args: []string{"--worker-priority", "auto", "--user", "nobody"}, want: allowed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.capabilities != nil {
				defer in.having(append(tt.capabilities, needs...))()
			}
			defer noLimit()()
			args := append([]string{"--fanout-workers", "2", "-c", file}, tt.args...)
			if tt.refused {
				d := in.startCommand(append([]string{"run"}, args...)...)
				<-d.exited
				if code := d.cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(d.log.String(), tt.log) {
					t.Errorf("exit code %d:\n%s", code, d.log.String())
				}
				return
			}
			d := in.start(args...)
			eventually(t, "the workers have the priority", func() string {
				if got := realTime(t, d.cmd.Process.Pid); got != tt.want {
					return fmt.Sprintf("priorities %q, want %q", got, tt.want)
				}
				if !strings.Contains(d.log.String(), tt.log) {
					return fmt.Sprintf("no %q in %s", tt.log, d.log.String())
				}
				return ""
			})
			if code := d.stop(syscall.SIGTERM); code != 0 {
				t.Errorf("exit code %d:\n%s", code, d.log.String())
			}
		})
	}
}

// mayRaise says whether root may raise a hard limit, which needs CAP_SYS_RESOURCE.
func mayRaise(t *testing.T) bool {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if text, ok := strings.CutPrefix(line, "CapEff:"); ok {
			caps, err := strconv.ParseUint(strings.TrimSpace(text), 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			return caps&(1<<unix.CAP_SYS_RESOURCE) != 0
		}
	}
	t.Fatal("no CapEff in /proc/self/status")
	return false
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
