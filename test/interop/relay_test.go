//go:build interop

package interop

import (
	"context"
	"encoding/json"
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

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// network is a source and two sinks, with the relay between.
type network struct {
	source, relay *lab.Host
	sinks         [2]*lab.Host
}

func newNet(t *testing.T) *network {
	t.Helper()
	n := &network{source: labtest.Host(t, "src"), relay: labtest.Host(t, "rly")}
	labtest.Connect(t,
		lab.End{Host: n.source, Name: "eth0", Addrs: []string{"10.0.0.1/24", "fd00::1/64"}},
		lab.End{Host: n.relay, Name: "in0", Addrs: []string{"10.0.0.2/24", "fd00::2/64"}})
	hosts := []*lab.Host{n.source}
	for i, name := range []string{"out0", "out1"} {
		n.sinks[i] = labtest.Host(t, "snk")
		subnet := []string{"10.1.0.", "10.2.0."}[i]
		subnet6 := []string{"fd00:1::", "fd00:2::"}[i]
		labtest.Connect(t,
			lab.End{Host: n.relay, Name: name, Addrs: []string{subnet + "1/24", subnet6 + "1/64"}},
			lab.End{Host: n.sinks[i], Name: "eth0", Addrs: []string{subnet + "2/24", subnet6 + "2/64"}})
		hosts = append(hosts, n.sinks[i])
	}
	for _, h := range hosts {
		// The programs name no interface when they send or join. A sink has no route to the source
		// of a packet, and accepts it nevertheless.
		if err := h.AddRoute("0.0.0.0/0", "eth0"); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

// process is a program that runs on a host.
type process struct {
	name   string
	cmd    *exec.Cmd
	stderr strings.Builder // read it only after done
	done   chan struct{}
	err    error
	once   sync.Once
}

// start starts a program on a host. The test ends it if it still runs.
func start(ctx context.Context, t *testing.T, h *lab.Host, name string, args ...string) *process {
	t.Helper()
	p := &process{name: filepath.Base(name), cmd: exec.CommandContext(ctx, name, args...), done: make(chan struct{})}
	p.cmd.Stderr = &p.stderr
	if err := h.Start(p.cmd); err != nil {
		t.Fatalf("start %s: %v", p.name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() { p.stop(syscall.SIGKILL) })
	return p
}

// stop signals the process and waits for its end.
func (p *process) stop(s syscall.Signal) {
	p.once.Do(func() { _ = p.cmd.Process.Signal(s) })
	<-p.done
}

// mustEnd waits until the process ends by itself, which must be without an error or complaint.
func (p *process) mustEnd(t *testing.T) {
	t.Helper()
	select {
	case <-p.done:
	case <-time.After(labtest.Timeout):
		p.stop(syscall.SIGKILL)
		t.Errorf("%s does not end", strings.Join(p.cmd.Args, " "))
	}
	if p.err != nil || complaints(p.stderr.String()) != "" {
		t.Errorf("%s: %v\n%s", strings.Join(p.cmd.Args, " "), p.err, p.stderr.String())
	}
}

// relay is a running daemon.
type relay struct {
	program string
	dirs    []string // flags for the location of its state
	socket  string
	file    string // its rules
}

// noRules is a file without rules.
const noRules = "rules: []\n"

// startMany is startRelay for a set of many rules; the caller may also stop the daemon.
func startMany(ctx context.Context, t *testing.T, h *lab.Host, rules string, many int, flags ...string) *process {
	t.Helper()
	_, daemon := startDaemon(ctx, t, h, rules, many, flags...)
	return daemon
}

// startRelay builds the program, and starts the daemon with a file of rules and more flags.
func startRelay(ctx context.Context, t *testing.T, h *lab.Host, rules string, flags ...string) *relay {
	t.Helper()
	r, _ := startDaemon(ctx, t, h, rules, 1, flags...)
	return r
}

// startDaemon waits until this many rules are active.
func startDaemon(ctx context.Context, t *testing.T, h *lab.Host, rules string, active int, flags ...string) (*relay, *process) {
	t.Helper()
	dir := t.TempDir()
	program, err := buildProgram()
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{program: program, socket: filepath.Join(dir, "run", "xdpcast.sock")}
	r.dirs = []string{"--pin-dir", filepath.Join(dir, "bpf", "xdpcast"), "--run-dir", filepath.Join(dir, "run")}
	file := filepath.Join(dir, "rules.yaml")
	r.file = file
	if err := os.WriteFile(file, []byte(rules), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // after the daemon has ended
		if out, err := exec.Command(r.program, append([]string{"unload", "--all"}, r.dirs...)...).CombinedOutput(); err != nil {
			t.Errorf("unload: %v\n%s", err, out)
		}
		labtest.Unmount(t, filepath.Join(dir, "bpf"))
	})
	args := slices.Concat([]string{"--socket", r.socket, "run", "-c", file, "--mode", "native"}, r.dirs, flags)
	daemon := start(ctx, t, h, r.program, args...)
	labtest.Eventually(t, "the relay is ready", func() bool {
		select {
		case <-daemon.done:
			t.Fatalf("the relay has ended: %v\n%s", daemon.err, daemon.stderr.String())
		default:
		}
		status, err := control.NewClient(r.socket).Status(ctx)
		return err == nil && status.Ready && (status.Active >= active || rules == noRules)
	})
	t.Cleanup(func() {
		daemon.stop(syscall.SIGTERM)
		if t.Failed() {
			t.Logf("the relay's log:\n%s", daemon.stderr.String())
		}
	})
	return r, daemon
}

// arrived waits until the relay has counted all packets of senders that have ended, and returns the rule: the kernel
// may still hold some of them.
func (r *relay) arrived(ctx context.Context, t *testing.T, name string, sent uint64) (status control.RuleStatus) {
	t.Helper()
	labtest.Eventually(t, fmt.Sprintf("rule %s has had %d packets", name, sent), func() bool {
		status = r.rule(ctx, t, name)
		return status.Matched.Packets >= sent
	})
	return status
}

// rule queries the program for a rule.
func (r *relay) rule(ctx context.Context, t *testing.T, name string) (status control.RuleStatus) {
	t.Helper()
	text := output(ctx, t, r.program, "--socket", r.socket, "rule", "show", name, "-o", "json")
	if err := json.Unmarshal([]byte(text), &status); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return status
}
