package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"xdpcast/internal/lab"
)

// patience bounds every wait for a program. It is long, since the machine may be busy; no wait
// reaches it while all is well.
const patience = 2 * time.Minute

// process is a program that runs on a host until it is stopped.
type process struct {
	cmd    *exec.Cmd
	log    lockedBuffer
	exited chan struct{}
	err    error // from Wait, valid once exited is closed
}

// startProcess starts a program on a host. The caller stops it.
func startProcess(host *lab.Host, cmd *exec.Cmd) (*process, error) {
	p := &process{cmd: cmd, exited: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = &p.log, &p.log
	// A terminal interrupt is for the bench, which then stops its programs.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := host.Start(cmd); err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd, err)
	}
	go func() {
		p.err = cmd.Wait()
		close(p.exited)
	}()
	return p, nil
}

// failed reports how the program ended, nil if it still runs.
func (p *process) failed() error {
	select {
	case <-p.exited:
		return fmt.Errorf("%s ended: %v\n%s", p.cmd, p.err, p.log.String())
	default:
		return nil
	}
}

// stop ends the program; it fails if the program had ended before.
func (p *process) stop() error {
	if err := p.failed(); err != nil {
		return err
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("end %s: %w", p.cmd, err)
	}
	select {
	case <-p.exited:
		return nil
	case <-time.After(patience):
		err := fmt.Errorf("%s does not end by SIGTERM\n%s", p.cmd, p.log.String())
		return errors.Join(err, p.kill())
	}
}

// kill ends the program without asking it; it fails if the program had ended before.
func (p *process) kill() error {
	if err := p.failed(); err != nil {
		return err
	}
	if err := p.cmd.Process.Kill(); err != nil {
		return fmt.Errorf("kill %s: %w", p.cmd, err)
	}
	<-p.exited
	return nil
}

// until waits until ready returns "", or the program ends.
func (p *process) until(ctx context.Context, ready func() string) error {
	if err := until(ctx, func() string {
		if p.failed() != nil {
			return ""
		}
		return ready()
	}); err != nil {
		return fmt.Errorf("%s: %w\n%s", p.cmd, err, p.log.String())
	}
	return p.failed()
}

// until waits until lacks, which returns what is missing, returns "".
func until(ctx context.Context, lacks func() string) error {
	for start, deadline := time.Now(), time.Now().Add(patience); ; {
		what := lacks()
		if what == "" {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not after %v: %s", patience, what)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		// Polling more often would slow down the process asked.
		case <-time.After(max(2*time.Millisecond, time.Since(start)/20)):
		}
	}
}

// command runs a program on a host to completion and returns its output.
func command(ctx context.Context, host *lab.Host, stdin, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	if stdin != "" {
		cmd.Stdin = strings.NewReader(stdin)
	}
	return runOn(host, cmd)
}

// runOn runs a command on a host to completion and returns its output.
func runOn(host *lab.Host, cmd *exec.Cmd) (string, error) {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := host.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return "", fmt.Errorf("%s: %w\n%s", cmd, err, out.String())
	}
	return out.String(), nil
}

// lockedBuffer is a buffer that a process writes while others read.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

var _ io.Writer = (*lockedBuffer)(nil)

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
