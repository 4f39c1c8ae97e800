package relay

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/labtest"
)

// processVariable makes a process of the test binary a relay: what it is to do, as JSON.
const processVariable = "XDPCAST_TEST_RELAY"

// processOptions is what a relay in a process of its own is told.
type processOptions struct {
	PinDir, RunDir, ConfigFile, Socket string
	// Looks is a file of 8 bytes that counts how often the relay has looked at everything.
	Looks string
}

// process is a relay in a process of its own, which can be sent signals.
type process struct {
	p      *place
	opts   processOptions
	cmd    *exec.Cmd
	ended  chan error
	client *control.Client
	count  []byte
}

func newProcess(p *place) *process {
	p.t.Helper()
	dir := filepath.Dir(p.opts.Loader.RunDir)
	r := &process{p: p, opts: processOptions{
		PinDir: p.opts.Loader.PinDir, RunDir: p.opts.Loader.RunDir, ConfigFile: p.opts.ConfigFile,
		Socket: filepath.Join(dir, "s", "xdpcast.sock"), Looks: p.file("looks", string(make([]byte, 8))),
	}}
	var err error
	if r.count, err = mapCounter(r.opts.Looks); err != nil {
		p.t.Fatal(err)
	}
	r.client = control.NewClient(r.opts.Socket)
	p.t.Cleanup(func() {
		r.kill()
		if err := unix.Munmap(r.count); err != nil {
			p.t.Error(err)
		}
	})
	return r
}

func mapCounter(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return unix.Mmap(int(f.Fd()), 0, 8, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
}

// looks is how often relays have looked at everything.
func (r *process) looks() uint64 {
	return atomic.LoadUint64((*uint64)(unsafe.Pointer(unsafe.SliceData(r.count))))
}

// start starts a process and waits until its rules are in.
func (r *process) start() {
	r.p.t.Helper()
	told, err := json.Marshal(r.opts)
	if err != nil {
		r.p.t.Fatal(err)
	}
	program, err := os.Executable()
	if err != nil {
		r.p.t.Fatal(err)
	}
	r.cmd = exec.Command(program)
	r.cmd.Env = append(os.Environ(), processVariable+"="+string(told))
	r.cmd.Stdout, r.cmd.Stderr = r.p.log, r.p.log
	if err := r.p.host.Start(r.cmd); err != nil {
		r.p.t.Fatal(err)
	}
	r.ended = make(chan error, 1)
	go func() { r.ended <- r.cmd.Wait() }()
	labtest.Eventually(r.p.t, "the relay is ready", func() bool {
		select {
		case err := <-r.ended:
			r.cmd = nil
			r.p.t.Fatalf("the relay has ended: %v", err)
		case <-time.After(5 * time.Millisecond):
		}
		status, err := r.client.Status(r.p.t.Context())
		return err == nil && status.Ready && status.PID == r.cmd.Process.Pid
	})
}

func (r *process) signal(s syscall.Signal) {
	r.p.t.Helper()
	if err := r.cmd.Process.Signal(s); err != nil {
		r.p.t.Fatal(err)
	}
}

// stop ends the process as a service manager does.
func (r *process) stop() {
	r.p.t.Helper()
	r.signal(syscall.SIGTERM)
	err := <-r.ended
	r.cmd = nil
	if err != nil {
		r.p.t.Errorf("the relay has ended: %v", err)
	}
}

// kill ends the process at once, if there is one.
func (r *process) kill() {
	if r.cmd == nil {
		return
	}
	_ = r.cmd.Process.Kill() // it may have ended
	<-r.ended
	r.cmd = nil
}

// runProcess is the relay of start.
func runProcess(told string) (err error) {
	var opts processOptions
	if err := json.Unmarshal([]byte(told), &opts); err != nil {
		return fmt.Errorf("%s: %w", processVariable, err)
	}
	looks, err := mapCounter(opts.Looks)
	if err != nil {
		return err
	}
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	listener, err := control.Listen(opts.Socket, nil)
	if err != nil {
		return err
	}
	relay := Options{
		ConfigFile: opts.ConfigFile, Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)), Version: "test",
		observeEvery: 25 * time.Millisecond,
		observed:     func() { atomic.AddUint64((*uint64)(unsafe.Pointer(unsafe.SliceData(looks))), 1) },
	}
	relay.Loader.PinDir, relay.Loader.RunDir, relay.Loader.MaxRules, relay.Loader.MaxOutputs = opts.PinDir, opts.RunDir, 64, 64
	r, err := New(relay)
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	served := make(chan error, 1)
	go func() {
		served <- control.NewServer(r, control.Options{Log: relay.Logger}).Serve(ctx, listener)
	}()
	err = r.Run(ctx, nil)
	cancel()
	return errors.Join(err, <-served)
}

// A relay in a process of its own relays, hears signals, and leaves its rules behind.
func TestProcess(t *testing.T) {
	labtest.RequireRoot(t)
	p := newPlace(t)
	p.opts.ConfigFile = p.file("rules.yaml", "rules:\n  - {name: a, in: \"239.1.1.1:5000%in0\", out: [\"239.2.2.1:5000%out0\"]}\n")
	r := newProcess(p)
	r.start()
	first := r.looks()
	labtest.Eventually(t, "it looks at everything", func() bool { return r.looks() > first+1 })
	r.signal(syscall.SIGSTOP)
	r.kill()
	r.start()
	all, err := r.client.Rules(t.Context())
	if err != nil || len(all) != 1 || all[0].State != control.StateActive {
		t.Errorf("rules are %+v, %v", all, err)
	}
	r.stop()
}
