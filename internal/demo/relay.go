package demo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"xdpcast/internal/control"
)

const (
	// readyPatience is how long a relay may take to activate its rules, and to answer.
	readyPatience = 30 * time.Second
	// stopPatience is how long it may take to end.
	stopPatience = 10 * time.Second
	// look is the polling interval for conditions without a notification.
	look = 10 * time.Millisecond
)

// relayProcess is the relay of a lab: Config.Program, run in the lab.
type relayProcess struct {
	cmd     *exec.Cmd
	process *process
	log     string // path
}

// startRelay starts "xdpcast run" in the relay's namespace.
func (d *demonstration) startRelay() error {
	if err := d.writeRules(); err != nil {
		return err
	}
	log, err := os.Create(d.places.logFile())
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(d.Program, "--socket", d.places.socket(), "run", "-c", d.places.rulesFile(),
		"--pin-dir", d.places.pinDir(), "--run-dir", d.places.runDir())
	cmd.Stdout, cmd.Stderr = log, log
	// An interrupt from the terminal is only for the demo, which then ends the relay; and a relay
	// that is kept outlives the terminal.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := d.hosts[relayHost].Start(cmd); err != nil {
		return fmt.Errorf("start the relay: %w", err)
	}
	p, err := openProcess(cmd.Process.Pid) // our own child: its PID is not reused before Wait
	if err != nil {
		return errors.Join(err, cmd.Process.Kill(), cmd.Wait())
	}
	d.relay = &relayProcess{cmd: cmd, process: p, log: log.Name()}
	return nil
}

// stop ends the relay, which must exit cleanly; if it has already ended it is only reaped.
func (r *relayProcess) stop() error {
	defer r.process.close()
	ended := r.process.ended()
	err := r.process.stop(stopPatience)
	waitErr := r.cmd.Wait()
	if waitErr == nil || ended || err != nil {
		return err
	}
	if status, ok := r.cmd.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signaled() && status.Signal() == syscall.SIGTERM {
		return nil // before it could handle the signal
	}
	// Not wrapped: an *exec.ExitError would set this program's exit code, too.
	return fmt.Errorf("the relay exited with an error: %v: %s", waitErr, lastWords(r.log))
}

// release detaches the relay.
func (r *relayProcess) release() {
	r.process.close()
	// It cannot fail for a process that was not waited for.
	_ = r.cmd.Process.Release()
}

// endedEarly says why the relay has ended; nil while it runs.
func (r *relayProcess) endedEarly() error {
	if !r.process.ended() {
		return nil
	}
	words := lastWords(r.log)
	if words == "" {
		words = "it left no message"
	}
	return fmt.Errorf("the relay (pid %d) ended before the demonstration did: %s", r.process.pid, words)
}

// lastWords is the relay's final error, or otherwise its last line.
func lastWords(log string) string {
	data, err := os.ReadFile(log)
	if err != nil {
		return err.Error()
	}
	last := ""
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSpace(line)
		if words, ok := strings.CutPrefix(line, "xdpcast: "); ok {
			return words
		}
		if line != "" {
			last = line
		}
	}
	return last
}

// waitReady waits until the relay answers and all of its rules are active.
func (d *demonstration) waitReady(ctx context.Context) (control.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, readyPatience)
	defer cancel()
	ticker := time.NewTicker(look)
	defer ticker.Stop()
	missing := errors.New("it does not answer")
	for {
		if err := d.relay.endedEarly(); err != nil {
			return control.Status{}, err
		}
		status, err := d.client.Status(ctx)
		if err == nil && status.Ready {
			if missing = d.inactive(ctx); missing == nil {
				return status, nil
			}
			if status.Failed > 0 {
				return control.Status{}, missing
			}
		}
		select {
		case <-ctx.Done():
			return control.Status{}, fmt.Errorf("the relay is not ready after %v: %w", readyPatience, missing)
		case <-ticker.C:
		}
	}
}

// inactive says which rule is not active, and why; nil if all are.
func (d *demonstration) inactive(ctx context.Context) error {
	list, err := d.client.Rules(ctx)
	if err != nil {
		return err
	}
	active := 0
	for _, r := range list {
		if r.State != control.StateActive || r.Reason != "" {
			return fmt.Errorf("rule %s: %s", r.Name, stateText(r))
		}
		active++
	}
	if active != len(d.streams) {
		return fmt.Errorf("%d of %d rules are active", active, len(d.streams))
	}
	return nil
}

// stats reads the relay's counters.
func (d *demonstration) stats(ctx context.Context) (control.Stats, error) {
	ctx, cancel := context.WithTimeout(ctx, readyPatience)
	defer cancel()
	stats, err := d.client.Stats(ctx)
	if err == nil {
		return stats, nil
	}
	if ended := d.relay.endedEarly(); ended != nil {
		return stats, ended
	}
	return stats, fmt.Errorf("read the relay's counters: %w", err)
}
