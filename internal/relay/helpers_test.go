package relay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/membership"
)

// place is where relays of a test keep their things: a host with the interfaces in0,
// out0 and out1, and the directories.
type place struct {
	t    testing.TB
	host *lab.Host
	peer *lab.Host // the other end of all
	opts Options
	log  *logBuffer
}

func newPlace(t testing.TB) *place {
	t.Helper()
	host, peer := labtest.Host(t, "relay"), labtest.Host(t, "peer")
	for i, name := range []string{"in0", "out0", "out1"} {
		labtest.Connect(t, lab.End{Host: host, Name: name, Addrs: []string{fmt.Sprintf("10.%d.0.1/24", i)}},
			lab.End{Host: peer, Name: name, Addrs: []string{fmt.Sprintf("10.%d.0.2/24", i)}})
	}
	dir := t.TempDir()
	p := &place{t: t, host: host, peer: peer, log: &logBuffer{}}
	p.opts = Options{
		Loader: loader.Options{PinDir: filepath.Join(dir, "bpf", "xdpcast"), RunDir: filepath.Join(dir, "run"), MaxRules: 64, MaxOutputs: 64},
		Logger: slog.New(slog.NewTextHandler(p.log, nil)), Version: "test",
	}
	t.Cleanup(func() {
		if err := loader.Unload(p.opts.Loader); err != nil && !errors.Is(err, loader.ErrNotLoaded) {
			t.Error(err)
		}
		labtest.Unmount(t, filepath.Join(dir, "bpf"))
		if t.Failed() {
			t.Logf("log of the relay:\n%s", p.log)
		}
	})
	return p
}

func (p *place) file(name, text string) string {
	p.t.Helper()
	path := filepath.Join(filepath.Dir(p.opts.Loader.RunDir), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		p.t.Fatal(err)
	}
	return path
}

// stateFile is where the rules of the API are saved.
func (p *place) stateFile() string {
	return loader.RunFile(p.opts.Loader.RunDir, p.opts.Loader.PinDir, "api-rules.yaml")
}

// running is a relay and the goroutine that runs it.
type running struct {
	*Relay
	t      testing.TB
	cancel context.CancelFunc
	ended  chan error
}

// start makes a relay and waits until its rules are in.
func (p *place) start() *running {
	p.t.Helper()
	r, err := p.tryStart()
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(r.stop)
	return r
}

// tryStart is start where New may fail.
func (p *place) tryStart() (*running, error) {
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{t: p.t, cancel: cancel, ended: make(chan error, 1)}
	ready := make(chan error, 1)
	go func() {
		// The thread ends with its goroutine, so that nobody else gets to be in the
		// namespace.
		runtime.LockOSThread()
		err := unix.Setns(p.host.FD(), unix.CLONE_NEWNET)
		if err == nil {
			r.Relay, err = New(p.opts)
		}
		if err != nil {
			ready <- err
			return
		}
		r.ended <- r.Run(ctx, func() { ready <- nil })
	}()
	err := <-ready
	if err != nil {
		cancel()
	}
	return r, err
}

// stop ends the relay; it may be called again.
func (r *running) stop() {
	r.cancel()
	if err := <-r.ended; err != nil {
		r.t.Error(err)
	}
	r.ended <- nil
}

func (r *running) add(name, in string, out ...string) (control.RuleStatus, error) {
	return r.AddRule(r.t.Context(), control.Rule{Name: name, In: in, Out: out})
}

func (r *running) mustAdd(name, in string, out ...string) control.RuleStatus {
	r.t.Helper()
	status, err := r.add(name, in, out...)
	if err != nil {
		r.t.Fatal(err)
	}
	if status.State != control.StateActive {
		r.t.Fatalf("rule %s is %s (%s)", name, status.State, status.Reason)
	}
	return status
}

// footprint is everything that a rule can leave behind.
type footprint struct {
	Rules    []string // with their numbers in the kernel
	Kernel   []string
	Fanout   int
	Groups   string // /proc/net/igmp and mcfilter
	Attached []string
	Saved    string
}

func (p *place) footprint(r *running) footprint {
	p.t.Helper()
	var f footprint
	all, err := r.Rules(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	for _, s := range all {
		f.Rules = append(f.Rules, fmt.Sprintf("%d %s %s %s %v", s.ID, s.Name, s.State, s.In, s.Out))
	}
	kernel, err := loader.OpenReader(p.opts.Loader.PinDir)
	if err != nil {
		p.t.Fatal(err)
	}
	defer kernel.Close()
	stats, err := kernel.Stats()
	if err != nil {
		p.t.Fatal(err)
	}
	for _, s := range stats.Rules {
		f.Kernel = append(f.Kernel, fmt.Sprintf("%d %s %d", s.ID, s.Name, len(s.Outputs)))
	}
	slices.Sort(f.Kernel)
	f.Fanout = p.devmaps()
	status, err := r.Status(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	for _, i := range status.Interfaces {
		if i.JoinsAttempted != i.JoinsSucceeded+i.JoinsFailed {
			p.t.Errorf("interface %s: %d joins attempted, %d succeeded, %d failed", i.Name, i.JoinsAttempted, i.JoinsSucceeded, i.JoinsFailed)
		}
		if i.LinkID != 0 {
			f.Attached = append(f.Attached, fmt.Sprintf("%s link %d", i.Name, i.LinkID))
		}
	}
	f.Groups = p.groups()
	saved, err := os.ReadFile(p.stateFile())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		p.t.Fatal(err)
	}
	if next, err := os.Lstat(p.stateFile() + ".next"); err == nil && next.Mode().IsRegular() {
		p.t.Error("a change that was not made has left what was to be saved")
	}
	f.Saved = strings.TrimSpace(string(saved))
	if f.Saved == "rules: []" {
		f.Saved = ""
	}
	return f
}

// groups is what the kernel lists, without reporters and timers.
func (p *place) groups() string {
	p.t.Helper()
	var lines []string
	labtest.Do(p.t, p.host, func() error {
		for _, name := range []string{"igmp", "mcfilter"} {
			data, err := os.ReadFile("/proc/thread-self/net/" + name)
			if err != nil {
				return err
			}
			ifname := ""
			for line := range strings.Lines(string(data)) {
				fields := strings.Fields(line)
				switch {
				case name == "igmp" && strings.HasPrefix(line, "\t"):
					lines = append(lines, fmt.Sprintln(ifname, "group", fields[0], "users", fields[1]))
				case name == "igmp" && len(fields) > 1:
					ifname = fields[1]
				case name == "mcfilter":
					lines = append(lines, fmt.Sprintln(fields))
				}
			}
		}
		return nil
	})
	slices.Sort(lines) // the kernel has the newest first
	return strings.Join(lines, "")
}

// faulty is the kernel, but for joins and sockets that fail as long as err is set.
type faulty struct {
	membership.System
	mu    sync.Mutex
	err   error
	group string // only this one, if set
}

func newFaulty() *faulty { return &faulty{System: membership.Kernel()} }

func (f *faulty) fail(err error, group string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err, f.group = err, group
}

func (f *faulty) Setsockopt(fd, level, option int, value []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	joins := option == unix.MCAST_JOIN_GROUP || option == unix.MCAST_JOIN_SOURCE_GROUP
	// The group's address is the first in the option's value.
	if f.err != nil && joins && (f.group == "" || bytes.Contains(value[:24], []byte(f.group))) {
		return f.err
	}
	return f.System.Setsockopt(fd, level, option, value)
}

// logBuffer is a log that a test reads while it is written.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(data []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(data)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// devmaps counts the rows of the map broadcast that hold a devmap with interfaces: one
// without stands where a rule was.
func (p *place) devmaps() int {
	p.t.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join(p.opts.Loader.PinDir, "broadcast"), &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		p.t.Fatal(err)
	}
	defer m.Close()
	n := 0
	for row := range m.MaxEntries() {
		var id uint32
		switch err := m.Lookup(row, &id); {
		case err == nil && labtest.MapHasEntries(ebpf.MapID(id)):
			n++
		case err != nil && !errors.Is(err, ebpf.ErrKeyNotExist):
			p.t.Fatal(err)
		}
	}
	return n
}
