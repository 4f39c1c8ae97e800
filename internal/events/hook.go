package events

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Hook runs a program for each event, one at a time, in order.
type Hook struct {
	// Program is its path; it gets no arguments.
	Program string
	// Timeout is the time after which it is killed, with its children; 0: 10 seconds.
	Timeout time.Duration
	// Log receives failures of the program.
	Log *slog.Logger
}

// hookBehind is how many events a program may be behind; older ones are skipped.
const hookBehind = 256

// Run runs the program for the events that r reads, until ctx or the log ends. A slow program
// delays only itself: it is told how many events it missed.
func (h Hook) Run(ctx context.Context, r *Reader) {
	if h.Timeout == 0 {
		h.Timeout = 10 * time.Second
	}
	buf := make([]Event, 0, 2)
	var missed uint64
	for r.Wait(ctx) {
		missed += r.Skip(hookBehind)
		for _, e := range r.Next(buf[:0]) {
			if e.Kind == KindMissed {
				missed += e.Count
				continue
			}
			if err := h.call(ctx, &e, missed); err != nil && ctx.Err() == nil {
				h.Log.Warn("program for events", "program", h.Program, "event", e.Number, "error", err)
			}
			missed = 0
		}
	}
}

func (h Hook) call(ctx context.Context, e *Event, missed uint64) error {
	ctx, cancel := context.WithTimeoutCause(ctx, h.Timeout, fmt.Errorf("killed after %v", h.Timeout))
	defer cancel()
	cmd := exec.CommandContext(ctx, h.Program)
	cmd.Env = append(os.Environ(), Environment(e, missed)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second // for descendants that keep its output open
	said := &tail{}
	cmd.Stdout, cmd.Stderr = said, said
	err := cmd.Run()
	if err == nil {
		return nil
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	if text := strings.TrimSpace(string(said.text)); text != "" {
		err = fmt.Errorf("%w: %s", err, text)
	}
	return err
}

// Environment is the program's environment for an event: XDPCAST_EVENT has the whole event as JSON.
func Environment(e *Event, missed uint64) []string {
	text, _ := json.Marshal(e) // like encode
	env := []string{
		"XDPCAST_EVENT=" + string(text),
		"XDPCAST_EVENT_NUMBER=" + strconv.FormatUint(e.Number, 10),
		"XDPCAST_EVENT_TIME=" + e.Time.Format(time.RFC3339Nano),
		"XDPCAST_EVENT_COUNT=" + strconv.FormatUint(max(1, e.Count), 10),
		"XDPCAST_EVENT_MISSED=" + strconv.FormatUint(missed, 10),
	}
	for name, value := range map[string]string{
		"KIND": string(e.Kind), "RULE": e.Rule, "OUTPUT": e.Output, "INTERFACE": e.Interface, "GROUP": e.Group, "ADDRESS": e.Address,
		"STATE": e.State, "BEFORE": e.Before, "CAUSE": e.Cause,
	} {
		env = append(env, "XDPCAST_EVENT_"+name+"="+strings.ReplaceAll(value, "\x00", ""))
	}
	return env
}

// tail keeps the first bytes of a program's output.
type tail struct{ text []byte }

func (t *tail) Write(p []byte) (int, error) {
	const most = 1 << 10
	t.text = append(t.text, p[:min(len(p), most-len(t.text))]...)
	return len(p), nil
}
