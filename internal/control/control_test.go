package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
	"xdpcast/pkg/rules"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake is a Backend that holds rules and fails with err when that is set.
type fake struct {
	mu      sync.Mutex
	rules   []RuleStatus
	err     error
	options ApplyOptions
	block   chan struct{} // when set, Status waits for it or for its context
	waits   chan struct{} // told each time that Status begins to wait
}

func (f *fake) Status(ctx context.Context) (Status, error) {
	if f.block != nil {
		f.waits <- struct{}{}
		select {
		case <-f.block:
		case <-ctx.Done():
			return Status{}, ctx.Err()
		}
	}
	return Status{
		Version: "v1", PID: 7, Started: testTime, Ready: true, PinDir: "/sys/fs/bpf/xdpcast", Schema: 1,
		Rules: 1, Active: 1, Passed: Counter{Packets: 1 << 60, Bytes: 2},
		Interfaces: []InterfaceStatus{{Name: "eth0", Index: 3, Mode: "native", JoinsAttempted: 2, JoinsSucceeded: 1, JoinsFailed: 1}},
	}, f.err
}

func (f *fake) Rules(context.Context) ([]RuleStatus, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.rules), f.err
}

func (f *fake) Rule(_ context.Context, name string) (RuleStatus, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.rules {
		if r.Name == name {
			return r, f.err
		}
	}
	return RuleStatus{}, errors.Join(f.err, Errorf(KindNotFound, "rule %q: %w", name, ErrNotFound))
}

func (f *fake) AddRule(_ context.Context, r Rule) (RuleStatus, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return RuleStatus{}, f.err
	}
	f.rules = append(f.rules, RuleStatus{Rule: r, Origin: OriginAPI, State: StatePending, Reason: "interface eth0 not found"})
	return f.rules[len(f.rules)-1], nil
}

func (f *fake) PutRule(ctx context.Context, r Rule, o ApplyOptions) (ApplyResult, error) {
	f.mu.Lock()
	f.options = o
	f.mu.Unlock()
	_, err := f.AddRule(ctx, r)
	return ApplyResult{DryRun: o.DryRun, Added: 1, Changes: []Change{{Op: OpAdd, Rule: r}}}, err
}

func (f *fake) DeleteRule(_ context.Context, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := len(f.rules)
	f.rules = slices.DeleteFunc(f.rules, func(r RuleStatus) bool { return r.Name == name })
	if n == len(f.rules) && f.err == nil {
		return ErrNotFound
	}
	return f.err
}

func (f *fake) Apply(_ context.Context, all []rules.Rule, o ApplyOptions) (ApplyResult, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.options = o
	res := ApplyResult{DryRun: o.DryRun, Changed: len(all)}
	for _, r := range all {
		res.Changes = append(res.Changes, Change{Op: OpChange, Rule: FromRule(r), Old: &Rule{Name: r.Name}})
	}
	return res, f.err
}

func (f *fake) Groups(context.Context) ([]Group, error) {
	return []Group{{Interface: "eth0", Index: 3, Group: "239.1.1.1", State: GroupJoined, Since: &testTime}}, f.err
}

func (f *fake) Stats(context.Context) (Stats, error) {
	rules, err := f.Rules(context.Background())
	return Stats{Time: testTime, Rules: rules, Drops: []Drop{{Reason: "loop", Counter: Counter{Packets: 1, Bytes: 60}}}}, err
}

func (f *fake) Explain(_ context.Context, packet string) (Explanation, error) {
	if packet == "nobody" {
		return Explanation{}, Errorf(KindNotFound, "no rule is named nobody")
	}
	return Explanation{Packet: packet, Why: "rule cam1 takes it", Candidates: []Candidate{{Rule: "cam1", Kind: "any source, group, port"}}}, f.err
}

func (f *fake) Reload(_ context.Context, o ApplyOptions) (ApplyResult, error) {
	f.options = o
	return ApplyResult{Kept: 1, Removed: 1, Changes: []Change{{Op: OpRemove, Rule: cam1}}}, f.err
}

func (f *fake) Confirm(context.Context) (UnconfirmedChange, error) {
	return UnconfirmedChange{What: "reload", Time: testTime, Until: testTime.Add(time.Minute)}, f.err
}

func (f *fake) History(ctx context.Context) ([]HistoryEntry, error) {
	e := HistoryEntry{Time: testTime, What: "reload", Added: 1, Changed: 2, Removed: 3, Rules: 4}
	if uid, ok := CallerUID(ctx); ok {
		e.UID = &uid
	}
	return []HistoryEntry{e}, f.err
}

func (f *fake) Rollback(_ context.Context, back int, o ApplyOptions) (ApplyResult, error) {
	f.options = o
	if back > 3 {
		return ApplyResult{}, Errorf(KindNotFound, "rollback %d: 3 sets are kept", back)
	}
	return ApplyResult{Kept: back}, f.err
}

var (
	testTime = time.Date(2025, 1, 2, 3, 4, 5, 6, time.UTC)
	cam1     = Rule{Name: "cam1", In: "239.1.1.1:5000%eth0", Out: []string{"239.2.2.2:6000%eth1,src=keep,ttl=8"}, Path: "auto"}
)

// socketDir is a directory that every uid can reach and whose name leaves room
// for a socket's.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "control")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// serve runs a server of b until the test ends.
func serve(t *testing.T, b Backend, o Options) (socket string) {
	t.Helper()
	socket = filepath.Join(socketDir(t), "s")
	ln, err := Listen(socket, nil)
	if err != nil {
		t.Fatal(err)
	}
	// The server's own decisions are tested: everybody gets as far as to it.
	if err := os.Chmod(socket, 0o666); err != nil {
		t.Fatal(err)
	}
	o.Log = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- NewServer(b, o).Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if _, err := os.Lstat(socket); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("socket after Serve: %v, want it gone", err)
		}
	})
	return socket
}

func TestEveryMethodOverTheWire(t *testing.T) {
	b := &fake{}
	c := NewClient(serve(t, b, Options{}))
	ctx := context.Background()
	check := func(what string, got any, err error, want any) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", what, diff)
		}
	}

	wantRule := RuleStatus{Rule: cam1, Origin: OriginAPI, State: StatePending, Reason: "interface eth0 not found", Drops: []Drop{}, Outputs: []OutputStatus{}, Inputs: []InputStatus{}}
	added, err := c.AddRule(ctx, cam1)
	check("AddRule", added, err, wantRule)
	odd := Rule{Name: "../a b%2F/..//ü?x=y#z", In: cam1.In, Out: []string{}}
	_, err = c.AddRule(ctx, odd)
	check("AddRule odd", nil, err, nil)

	one, err := c.Rule(ctx, "cam1")
	check("Rule", one, err, wantRule)
	one, err = c.Rule(ctx, odd.Name)
	check("Rule odd", one.Rule, err, odd)
	all, err := c.Rules(ctx)
	check("Rules", len(all), err, 2)
	for _, name := range []string{odd.Name, "cam1"} {
		check("DeleteRule", nil, c.DeleteRule(ctx, name), nil)
	}
	all, err = c.Rules(ctx)
	check("Rules", all, err, []RuleStatus{})

	status, err := c.Status(ctx)
	wantStatus, _ := b.Status(ctx)
	wantStatus.fill()
	check("Status", status, err, wantStatus)

	packet := "10.0.0.5@[ff3e::1]:5000%eth0,vlan=9.7&x=y z+"
	explained, err := c.Explain(ctx, packet)
	wantExplained, _ := b.Explain(ctx, packet)
	wantExplained.fill()
	check("Explain", explained, err, wantExplained)
	if _, err := c.Explain(ctx, "nobody"); !errors.Is(err, ErrNotFound) {
		t.Errorf("Explain of nobody: %v", err)
	}
	if _, err := c.Explain(ctx, ""); !errors.Is(err, ErrInvalid) {
		t.Errorf("Explain of nothing: %v", err)
	}

	groups, err := c.Groups(ctx)
	check("Groups", groups, err, []Group{{Interface: "eth0", Index: 3, Group: "239.1.1.1", State: GroupJoined, Since: &testTime, Rules: []string{}}})

	stats, err := c.Stats(ctx)
	check("Stats", stats, err, Stats{Time: testTime, Rules: []RuleStatus{}, Drops: []Drop{{Reason: "loop", Counter: Counter{1, 60}}}, TransmitDrops: []TransmitDrop{}, ReceiveDrops: []ReceiveDrop{}})

	parsed, err := ToRule(cam1)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range []ApplyOptions{{}, {DryRun: true}, {MaxChanges: 7}, {DryRun: true, MaxChanges: 1}, {MaxChanges: 1, Confirm: 90 * time.Second}} {
		applied, err := c.Apply(ctx, []rules.Rule{parsed}, o)
		check("Apply", applied, err, ApplyResult{DryRun: o.DryRun, Changed: 1, Changes: []Change{{Op: OpChange, Rule: cam1, Old: &Rule{Name: "cam1", Out: []string{}}}}})
		check("Apply's options", b.options, nil, o)
		reloaded, err := c.Reload(ctx, o)
		check("Reload", reloaded, err, ApplyResult{Kept: 1, Removed: 1, Changes: []Change{{Op: OpRemove, Rule: cam1}}})
		check("Reload's options", b.options, nil, o)
	}
	for back := range 3 {
		o := ApplyOptions{MaxChanges: back, Confirm: time.Duration(back) * time.Hour}
		rolled, err := c.Rollback(ctx, back+1, o)
		check("Rollback", rolled, err, ApplyResult{Kept: back + 1, Changes: []Change{}})
		check("Rollback's options", b.options, nil, o)
	}
	if _, err := c.Rollback(ctx, 4, ApplyOptions{}); !errors.Is(err, ErrNotFound) {
		t.Errorf("Rollback past the end: %v", err)
	}
	confirmed, err := c.Confirm(ctx)
	wantConfirmed, _ := b.Confirm(ctx)
	check("Confirm", confirmed, err, wantConfirmed)
	uid := uint32(os.Geteuid())
	sets, err := c.History(ctx)
	check("History", sets, err, []HistoryEntry{{Time: testTime, What: "reload", UID: &uid, Added: 1, Changed: 2, Removed: 3, Rules: 4}})

	applied, err := c.Apply(ctx, nil, ApplyOptions{})
	check("Apply none", applied, err, ApplyResult{Changes: []Change{}})
	if _, err := c.Apply(ctx, []rules.Rule{parsed, parsed}, ApplyOptions{}); !errors.Is(err, ErrInvalid) {
		t.Errorf("Apply of one rule twice: %v", err)
	}
	if _, err := c.ApplyFile(ctx, []byte("rules: [{name: a, in: 239.1.1.1:5%eth0}]"), ApplyOptions{}); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "body:1:") {
		t.Errorf("ApplyFile of a rule without outputs: %v", err)
	}
}

func TestErrorsOverTheWire(t *testing.T) {
	b := &fake{}
	c := NewClient(serve(t, b, Options{}))
	ctx := context.Background()
	calls := map[string]func() error{
		"Status":     func() error { _, err := c.Status(ctx); return err },
		"Rules":      func() error { _, err := c.Rules(ctx); return err },
		"AddRule":    func() error { _, err := c.AddRule(ctx, cam1); return err },
		"DeleteRule": func() error { return c.DeleteRule(ctx, "cam1") },
		"Apply":      func() error { _, err := c.Apply(ctx, nil, ApplyOptions{DryRun: true}); return err },
		"Groups":     func() error { _, err := c.Groups(ctx); return err },
		"Stats":      func() error { _, err := c.Stats(ctx); return err },
		"Reload":     func() error { _, err := c.Reload(ctx, ApplyOptions{}); return err },
		"Confirm":    func() error { _, err := c.Confirm(ctx); return err },
		"History":    func() error { _, err := c.History(ctx); return err },
		"Rollback":   func() error { _, err := c.Rollback(ctx, 1, ApplyOptions{}); return err },
	}
	for _, tt := range []struct {
		err  error
		is   error
		text string
	}{
		{Errorf(KindInvalid, "rule %q: port 0", "cam1"), ErrInvalid, `rule "cam1": port 0`},
		{errors.Join(errors.New("first"), Errorf(KindConflict, "second")), ErrConflict, "first; second"},
		{ErrNotFound, ErrNotFound, "not found"},
		{ErrUnavailable, ErrUnavailable, "unavailable"},
		{ErrForbidden, ErrForbidden, "forbidden"},
		{ErrTooLarge, ErrTooLarge, "too large"},
		{errors.New("join failed: no buffer space available"), ErrFailed, "join failed: no buffer space available"},
		{&Error{Kind: "made up", Msg: "x"}, ErrFailed, "x"},
		{context.Canceled, ErrUnavailable, "context canceled"},
		{errors.New("tab\tand\x1b[2J"), ErrFailed, "tab and [2J"},
	} {
		b.mu.Lock()
		b.err = tt.err
		b.mu.Unlock()
		for name, call := range calls {
			err := call()
			if !errors.Is(err, tt.is) || err.Error() != tt.text {
				t.Errorf("%s with %v: %v, want %q as %v", name, tt.err, err, tt.text, tt.is)
			}
			for _, other := range []error{ErrInvalid, ErrConflict, ErrNotFound, ErrUnavailable, ErrForbidden, ErrTooLarge, ErrFailed} {
				if other != tt.is && errors.Is(err, other) {
					t.Errorf("%s with %v: is %v as well", name, tt.err, other)
				}
			}
		}
	}
	b.mu.Lock()
	b.err = errors.New(strings.Repeat("ü\n", maxErrorText))
	b.mu.Unlock()
	if err := c.DeleteRule(ctx, "x"); len(err.Error()) > 2*maxErrorText || strings.Contains(err.Error(), "\n") {
		t.Errorf("long error is %d bytes", len(err.Error()))
	}
	b.mu.Lock()
	b.err = nil
	b.mu.Unlock()
	if _, err := c.Rule(ctx, "nobody"); !errors.Is(err, ErrNotFound) || err.Error() != `rule "nobody": not found` {
		t.Errorf("Rule: %v", err)
	}
	if err := c.DeleteRule(ctx, ""); !errors.Is(err, ErrInvalid) {
		t.Errorf("DeleteRule without a name: %v", err)
	}
}

func TestWrap(t *testing.T) {
	cause := errors.New("cause")
	err := Errorf(KindConflict, "rule: %w", cause)
	if !errors.Is(err, cause) || !errors.Is(err, ErrConflict) || err.Error() != "rule: cause" {
		t.Errorf("Errorf: %v", err)
	}
	if Wrap(KindFailed, nil) != nil {
		t.Error("Wrap(nil) is not nil")
	}
	for kind, sentinel := range map[Kind]error{
		KindInvalid: ErrInvalid, KindForbidden: ErrForbidden, KindNotFound: ErrNotFound, KindConflict: ErrConflict,
		KindTooLarge: ErrTooLarge, KindFailed: ErrFailed, KindUnavailable: ErrUnavailable,
	} {
		if kindOf(sentinel) != kind || http.StatusText(sentinel.(*Error).status()) == "" {
			t.Errorf("%s: kind %s, status %d", kind, kindOf(sentinel), sentinel.(*Error).status())
		}
	}
}

func TestClientWithoutServer(t *testing.T) {
	dir := socketDir(t)
	absent := filepath.Join(dir, "absent")
	stale := filepath.Join(dir, "stale")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
	for _, path := range []string{absent, stale} {
		_, err := NewClient(path).Status(context.Background())
		want := "no xdpcast is running (no answer at " + path + `): start one with "xdpcast run"`
		if !errors.Is(err, ErrNotRunning) || err.Error() != want {
			t.Errorf("Status: %v, want %s", err, want)
		}
	}
}

func TestClientOfSomethingElse(t *testing.T) {
	for answer, want := range map[string]string{
		"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnope": "is not xdpcast",
		"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnope":        "invalid character",
		"SSH-2.0-OpenSSH\r\n":                                       "no answer from xdpcast",
		"HTTP/1.1 302 Found\r\nLocation: x\r\n\r\n":                 "no answer from xdpcast",
		"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{\"pid\": 1": "unexpected EOF",
	} {
		path := filepath.Join(socketDir(t), "s")
		ln, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				_, _ = c.Read(make([]byte, 4096))
				_, _ = c.Write([]byte(answer))
				c.Close()
			}
		}()
		_, err = NewClient(path).Status(context.Background())
		if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), want) {
			t.Errorf("answer %q: %v, want %q as unavailable", answer, err, want)
		}
		ln.Close()
		<-done
	}
}

func TestClientContext(t *testing.T) {
	b := &fake{block: make(chan struct{}), waits: make(chan struct{}, 1)}
	c := NewClient(serve(t, b, Options{}))
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		<-b.waits
		cancel()
	}()
	if _, err := c.Status(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Status: %v, want %v", err, context.Canceled)
	}
}

// A daemon that does not answer is told of after two seconds, by its process; one that is
// stopped, as that.
func TestSlowDaemonIsTold(t *testing.T) {
	b := &fake{block: make(chan struct{}), waits: make(chan struct{}, 1)}
	c := NewClient(serve(t, b, Options{}))
	told := make(chan string, 2)
	c.Slow = func(line string) { told <- line }
	done := make(chan error, 1)
	go func() {
		_, err := c.Status(context.Background())
		done <- err
	}()
	<-b.waits
	select {
	case line := <-told:
		if want := fmt.Sprintf("no answer from xdpcast (process %d) at %s for 2s", os.Getpid(), c.socket); !strings.HasPrefix(line, want) {
			t.Errorf("told %q, want %q", line, want)
		}
	case err := <-done:
		t.Fatalf("the call ends: %v", err)
	}
	close(b.block)
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := c.Groups(context.Background()); err != nil || len(told) != 0 {
		t.Errorf("a quick call: %v, told %d times more", err, len(told))
	}

	sleep := exec.Command("sleep", "60")
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = sleep.Process.Kill(), sleep.Wait() }()
	var w wait
	w.pid.Store(int32(sleep.Process.Pid))
	if line := w.line("s"); !strings.Contains(line, "it is busy, or hangs") {
		t.Errorf("of a process that runs: %q", line)
	}
	if err := sleep.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("it is stopped: kill -CONT %d resumes it", sleep.Process.Pid)
	labtest.Eventually(t, "the stop is told", func() bool { return strings.Contains(w.line("s"), want) })
}

// A queue that is full for a moment is waited for.
func TestFullQueueIsWaitedFor(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	for {
		c, err := net.Dial("unix", path)
		if errors.Is(err, unix.EAGAIN) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	dialled := make(chan error, 1)
	go func() {
		c, err := dial(context.Background(), path)
		if err == nil {
			err = c.Close()
		}
		dialled <- err
	}()
	accepted, _, err := unix.Accept(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(accepted)
	if err := <-dialled; err != nil {
		t.Errorf("a queue that is full for a moment: %v", err)
	}
}
