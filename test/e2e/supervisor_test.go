package e2e_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
	"xdpcast/internal/traffic"
)

// TestSupervisors runs the script of docs/operations.md under runit and s6, behind a bridge with fast leave:
// while the holder lives no packet is lost and no group is left; when it is killed the supervisor restarts
// both; and a service stopped by the supervisor is gone.
func TestSupervisors(t *testing.T) {
	for _, c := range []struct {
		name               string
		supervise          string // takes the service directory
		pid, restart, down []string
	}{
		{"runit", "runsv", []string{"cat", "supervise/pid"}, []string{"sv", "-w", "120", "restart", "."}, []string{"sv", "-w", "120", "down", "."}},
		{"s6", "s6-supervise", []string{"s6-svstat", "-o", "pid", "."}, []string{"s6-svc", "-wr", "-T", "120000", "-r", "."}, []string{"s6-svc", "-wd", "-T", "120000", "-d", "."}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, command := range [][]string{{c.supervise}, c.pid, c.restart, c.down} {
				if _, err := exec.LookPath(command[0]); err != nil {
					labtest.Lacking(t, "needs "+command[0]+" of "+c.name)
				}
			}
			n, wire := newFastLeaveNetwork(t)
			in := newInstance(t, n.relay)
			in.replaceable()
			rules := "rules:\n"
			for i := range 50 {
				rules += fmt.Sprintf("  - {name: r%d, in: 239.1.1.%d:5000%%in0, out: ['239.2.1.%d:6000%%out0']}\n", i, i+1, i+1)
			}
			dir := filepath.Join(in.dir, "service")
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			script := strings.ReplaceAll(runScript(t), "/etc/xdpcast/rules.yaml", in.write("rules.yaml", rules))
			labtest.WriteProgram(t, filepath.Join(dir, "run"), []byte(script))
			do := func(command []string) string {
				t.Helper()
				cmd := exec.Command(command[0], command[1:]...)
				cmd.Dir = dir
				out, err := cmd.CombinedOutput()
				if err != nil {
					t.Fatalf("%v: %v\n%s", command, err, out)
				}
				return strings.TrimSpace(string(out))
			}
			t.Setenv("PATH", in.dir+":"+os.Getenv("PATH"))
			in.program = c.supervise
			in.startCommand(dir)
			pid := in.ready(0)
			waitGroups(t, n.relay, 50)
			in.left(wire)
			s := receive(t, n.sinks[0], "239.2.1.1:6000%sink0", traffic.Expected{})
			stream := send(t, n.source, traffic.SendConfig{Target: target(t, "239.1.1.1:5000%src0"), TTL: 16, Rate: traffic.Rate{Value: easy}})
			stream.flows(500)
			kill := func(of int) {
				t.Helper()
				if err := unix.Kill(of, unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
				pid = in.ready(pid)
				stream.flows(500)
			}
			holder := do(c.pid)
			kill(pid)
			in.mustCLI("upgrade", "--exec")
			pid = in.ready(pid)
			kill(pid)
			if now := do(c.pid); now != holder {
				t.Errorf("the supervisor has process %s, and had %s", now, holder)
			}
			if got := in.left(wire); len(got) > 0 {
				t.Errorf("groups were left: %v", got)
			}
			if fault := s.finish(stream.stop()); fault != "" {
				t.Error(fault)
			}

			stream = send(t, n.source, traffic.SendConfig{Target: target(t, "239.1.1.1:5000%src0"), TTL: 16, Rate: traffic.Rate{Value: easy}})
			number, err := strconv.Atoi(holder)
			if err != nil {
				t.Fatal(err)
			}
			kill(number)
			do(c.restart)
			pid = in.ready(pid)
			waitGroups(t, n.relay, 50)
			stream.stop()
			do(c.down)
			n.waitJoined("in0", "239.1.1.1", false)
			if runs(pid) {
				t.Errorf("the daemon, process %d, runs", pid)
			}
		})
	}
}

// runScript is the script for supervisors in docs/operations.md.
func runScript(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	script := regexp.MustCompile("(?s)```sh\n(#!/bin/sh\n# /etc/sv/xdpcast/run .*?)```").FindSubmatch(text)
	if script == nil {
		t.Fatal("docs/operations.md has no script for supervisors")
	}
	return string(script[1])
}
