package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/live"
)

// xdpcast is the program under test with all rules on one path.
func xdpcast(path string) subject {
	return subject{
		name: "xdpcast-" + path, what: "xdpcast run, path " + path + ": both MACs, both addresses, port, TTL and both checksums rewritten",
		rewrites: true,
		start: func(ctx context.Context, n *network, o options) (*running, error) {
			return startDaemon(ctx, n, o.program, path)
		},
	}
}

// daemon is a process of `xdpcast run` and its files.
type daemon struct {
	*process
	client  *control.Client
	path    string
	rule    string // first rule of the setup
	program string
	args    []string
	env     []string
	pinDir  string
	network *network
}

// startDaemon starts a daemon with the rules of the setup and waits until all are active.
func startDaemon(ctx context.Context, n *network, program, path string) (*running, error) {
	return startDaemonWith(ctx, n, program, path, "r0", rulesFile(n, path))
}

// merging is xdpcast on the kernel path with a rule that merges two inputs, which bring the same
// numbered packets: it drops half of all packets. Flows would each have their own numbers.
func merging() subject {
	return subject{
		name: "xdpcast-merge", what: "as xdpcast-kernel, with two inputs, each on a CPU of its own where there are several, that bring the same numbered packets: the first copy of each is relayed",
		rewrites: true, legs: 2, most: setup{Frame: live.MaxFrame, Rules: 1000, Flows: 1, Queues: 1},
		start: func(ctx context.Context, n *network, o options) (*running, error) {
			return startDaemon(ctx, n, o.program, "kernel")
		},
	}
}

// numbering is the format of the tag's number, in the machine's byte order.
func numbering() string {
	const offset = 8 // of seq in struct tag, internal/live/bpf/tag.h
	if binary.NativeEndian.Uint16([]byte{1, 0}) == 1 {
		return fmt.Sprintf("field:%d:4le", offset)
	}
	return fmt.Sprintf("field:%d:4", offset)
}

// mirroredRouting is the kernel's multicast routing with its routes mirrored.
func mirroredRouting() subject {
	s := multicastRouting()
	s.name, s.what = "xdpcast-mroute", "the kernel's multicast routes of mroute, which xdpcast run --mroute forwards in XDP; rewrites the TTL alone"
	s.start = func(ctx context.Context, n *network, o options) (*running, error) {
		router, err := startMulticastRouting(ctx, n, o)
		if err != nil {
			return nil, err
		}
		// smcroute joins the group itself, but reads nothing.
		file := []byte("rules: []\nmroute: {families: ipv4, joined: take}\n")
		r, err := startDaemonWith(ctx, n, o.program, "kernel", fmt.Sprintf("mroute/%v/%v", sourceAddr, firstGroup), file)
		if err != nil {
			return nil, errors.Join(err, router.stop())
		}
		stop := r.stop
		r.stop = func() error { return errors.Join(stop(), router.stop()) }
		r.pids = append(r.pids, router.pids...)
		return r, nil
	}
	return s
}

// startDaemonWith starts a daemon with a configuration file; rule is the name of its first rule.
func startDaemonWith(ctx context.Context, n *network, program, path, rule string, file []byte) (_ *running, err error) {
	socket := filepath.Join(n.dir, "run", "xdpcast.sock")
	d := &daemon{client: control.NewClient(socket), path: path, rule: rule, program: program, pinDir: filepath.Join(n.dir, "bpf", "xdpcast"), network: n}
	d.env = append(os.Environ(), "XDPCAST_SOCKET="+socket, "XDPCAST_PIN_DIR="+d.pinDir, "XDPCAST_RUN_DIR="+filepath.Join(n.dir, "run"))
	config := filepath.Join(n.dir, "rules.yaml")
	if err := os.WriteFile(config, file, 0o644); err != nil {
		return nil, err
	}
	d.args = []string{"run", "--log-level", "warn", "--max-rules", fmt.Sprint(2 * max(n.setup.Rules, 1024)),
		"--max-outputs", fmt.Sprint(2 * max(n.setup.Rules*n.setup.Outputs, 4096)), "-c", config}
	started := time.Now()
	if err := d.begin(ctx); err != nil {
		return nil, errors.Join(err, d.stop(ctx))
	}
	return &running{
		stop: func() error { return d.stop(context.WithoutCancel(ctx)) }, pids: []int{d.cmd.Process.Pid},
		kernelMemory: func() (uint64, error) { return pinnedMemory(d.pinDir) }, account: d.account,
		applied: time.Since(started).Seconds(), restart: d.restart,
	}, nil
}

// begin starts the process and waits until its rules are active.
func (d *daemon) begin(ctx context.Context) (err error) {
	cmd := exec.Command(d.program, d.args...)
	cmd.Env = d.env
	if d.process, err = startProcess(d.network.relay, cmd); err != nil {
		return err
	}
	return d.until(ctx, func() string { return d.lacks(ctx) })
}

// restart kills the process without any time to clean up, and starts it again.
func (d *daemon) restart(ctx context.Context) error {
	if err := d.cmd.Process.Kill(); err != nil {
		return fmt.Errorf("kill %s: %w", d.cmd, err)
	}
	<-d.exited
	return d.begin(ctx)
}

// rulesFile is the configuration of a setup: the flows are spread over the rules.
func rulesFile(n *network, path string) []byte {
	var b strings.Builder
	b.WriteString("rules:\n")
	for rule := range n.setup.Rules {
		fmt.Fprintf(&b, "  - {name: r%d, path: %s, ", rule, path)
		if len(n.ins) > 1 {
			fmt.Fprintf(&b, "merge: %q, ", numbering())
		}
		b.WriteString("in: [")
		for leg, name := range n.ins {
			if leg > 0 {
				b.WriteString(", ")
			}
			fmt.Fprintf(&b, "\"%v:%d%%%s\"", plus(firstGroup, rule), groupPort, name)
		}
		b.WriteString("], out: [")
		for output := range n.setup.Outputs {
			if output > 0 {
				b.WriteString(", ")
			}
			fmt.Fprintf(&b, "\"%v:%d%%%s,ttl=8\"", plus(firstOut, output), outPort+output, n.out(output))
		}
		b.WriteString("]}\n")
	}
	return []byte(b.String())
}

// lacks returns what the daemon has not done yet.
func (d *daemon) lacks(ctx context.Context) string {
	status, err := d.client.Status(ctx)
	switch {
	case err != nil:
		return err.Error()
	case !status.Ready:
		return "it is not ready"
	case status.Active != d.network.setup.Rules:
		return fmt.Sprintf("%d of %d rules are active", status.Active, d.network.setup.Rules)
	}
	rule, err := d.client.Rule(ctx, d.rule)
	switch {
	case err != nil:
		return err.Error()
	case rule.UsedPath != d.path:
		return fmt.Sprintf("the rule's path is %q (%s)", rule.UsedPath, rule.Reason)
	}
	for _, in := range rule.Inputs {
		if in.State != control.StateActive {
			return fmt.Sprintf("input %s is %s (%s)", in.Input, in.State, in.Reason)
		}
	}
	return ""
}

// stop ends the daemon and removes its state from the kernel.
func (d *daemon) stop(ctx context.Context) error {
	var err error
	if d.process != nil {
		err = d.process.stop()
	}
	if _, statErr := os.Stat(d.pinDir); errors.Is(statErr, os.ErrNotExist) {
		return err // it never started
	}
	unload := exec.CommandContext(ctx, d.program, "unload", "--all")
	unload.Env = d.env
	if _, unloadErr := runOn(d.network.relay, unload); unloadErr != nil {
		err = errors.Join(err, unloadErr)
	}
	// Nothing is mounted if no daemon got that far.
	if unmountErr := unix.Unmount(filepath.Dir(d.pinDir), 0); unmountErr != nil && !errors.Is(unmountErr, unix.EINVAL) && !errors.Is(unmountErr, unix.ENOENT) {
		err = errors.Join(err, fmt.Errorf("unmount %s: %w", filepath.Dir(d.pinDir), unmountErr))
	}
	return err
}

// account returns the daemon's counters.
func (d *daemon) account(ctx context.Context) (account, error) {
	stats, err := d.client.Stats(ctx)
	if err != nil {
		return account{}, err
	}
	return accountOf(stats, uint64(d.network.setup.Outputs)), nil
}

// accountOf sums counters up: a packet that reached no worker counts as missing at every output.
func accountOf(stats control.Stats, outputs uint64) (a account) {
	for _, drop := range stats.ReceiveDrops {
		// The afxdp path counts these with their rule, too: worker_lost.
		if drop.Path != "afxdp" {
			a.Dropped += drop.Packets * outputs
		}
	}
	for _, r := range stats.Rules {
		a.Matched += r.Matched.Packets
		for _, drop := range r.Drops {
			if drop.Lost() {
				a.Dropped += drop.Packets * outputs
			}
		}
		for _, out := range r.Outputs {
			a.Sent += out.Sent.Packets
			for _, drop := range out.Drops {
				a.Dropped += drop.Packets
			}
		}
	}
	// Counted as sent as well: the program had done its part.
	for _, drop := range stats.TransmitDrops {
		a.Sent -= min(a.Sent, drop.Packets)
		a.Dropped += drop.Packets
	}
	return a
}
