package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/control"
	"xdpcast/pkg/traffic"
)

// asProgram in the environment makes the test binary the program: the relay of
// a demonstration is its own executable.
const asProgram = "XDPCAST_TEST_AS_PROGRAM"

func init() {
	if os.Getenv(asProgram) != "" {
		main()
	}
}

// newLab returns the names of a lab of the test's own, and checks in the end
// that nothing is left of it.
func newLab(t *testing.T) labPlaces {
	t.Helper()
	labtest.RequireRoot(t)
	t.Setenv(asProgram, "1")
	t.Setenv("GORACE", "atexit_sleep_ms=0") // or each program would take a second to end
	p := labPlaces{lab.UniqueName("demo")}
	before := openFiles(t)
	t.Cleanup(func() {
		if left := leftOf(t, p); len(left) > 0 {
			t.Errorf("left behind: %q", left)
			if err := removeKept(p); err != nil {
				t.Log(err)
			}
		}
		if after := openFiles(t); after > before {
			t.Errorf("%d files are open, %d were before", after, before)
		}
	})
	return p
}

// leftOf looks for everything that has the lab's name: namespaces, pins, files,
// and processes with their arguments.
func leftOf(t *testing.T, p labPlaces) []string {
	t.Helper()
	var left []string
	for _, dir := range []string{lab.RunDir, "/sys/fs/bpf", "/run", os.TempDir()} {
		entries, err := filepath.Glob(filepath.Join(dir, p.prefix+"*"))
		if err != nil {
			t.Fatal(err)
		}
		left = append(left, entries...)
	}
	commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range commands {
		if line, err := os.ReadFile(path); err == nil && strings.Contains(string(line), p.prefix) {
			left = append(left, path+": "+string(line))
		}
	}
	return left
}

// openFiles counts the sockets, pidfds, namespaces and plain files that are
// open, once the runtime has opened its own.
func openFiles(t *testing.T) int {
	t.Helper()
	links, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, link := range links {
		if target, err := os.Readlink(link); err == nil && !strings.HasPrefix(target, "anon_inode:[event") {
			n++
		}
	}
	return n
}

// short is a demonstration of the length that tests can afford.
func short(p labPlaces) demoConfig {
	return demoConfig{
		places: p, streams: demoStreams(), rate: 8000, length: 300 * time.Millisecond, every: 100 * time.Millisecond, live: io.Discard,
	}
}

// demoArgs is short as a command line.
func demoArgs(p labPlaces, more ...string) []string {
	return append([]string{"xdpcast", "demo", "--prefix", p.prefix, "--rate", "8k", "--duration", "300ms"}, more...)
}

// trigger calls fn once, when text is written.
type trigger struct {
	text string
	fn   func()
	buf  bytes.Buffer
	done bool
}

func (w *trigger) Write(p []byte) (int, error) {
	w.buf.Write(p)
	if !w.done && strings.Contains(w.buf.String(), w.text) {
		w.done = true
		w.fn()
	}
	return len(p), nil
}

// liveTitle is written just before the streams begin to flow.
const liveTitle = "RECEIVED/S"

func TestDemo(t *testing.T) {
	p := newLab(t)
	var out, errs bytes.Buffer
	if code := run(t.Context(), demoArgs(p), nil, &out, &errs); code != exitDone || errs.Len() > 0 {
		t.Fatalf("code %d, stderr %s\n%s", code, &errs, &out)
	}
	for _, line := range []string{
		`RULE +IN +OUT`,
		`one-source +10\.0\.0\.5@232\.1\.3\.1:5000%eth0 +239\.2\.3\.1:5000%eth2,src=keep,ttl=4`,
		` +TIME +SENT +EXPECTED +RECEIVED +LOST +SENT/S +RECEIVED/S`,
		` +\d+\.\ds +2400 +3600 +3600 +0 +- +-`,
		`one-to-one +kernel +600 +600 +sink1 +600 +600 +600 +0 +0 +0 +0 +0 .*`,
		`one-to-three +kernel +600 +600 +sink1 +600 +600 +600 +0 +0 +0 +0 +0 .*`,
		` +sink2 +600 +600 +600 +0 +0 +0 +0 +0 .*`,
		` +sink3 +600 +600 +600 +0 +0 +0 +0 +0 .*`,
		`one-source +kernel +600 +600 +sink2 +600 +600 +600 +0 +0 +0 +0 +0 .*`,
		`new-port +kernel +600 +600 +sink3 +600 +600 +600 +0 +0 +0 +0 +0 .*`,
		`total +2400 +2400 +3600 +3600 +3600 +0 +0 +0 +0 +0`,
		`one-source: 60 packets from another source, 10\.0\.0\.6: 0 came through`,
		`ok: every packet arrived as its rule says`,
	} {
		if !regexp.MustCompile(`(?m)^` + line + `$`).MatchString(out.String()) {
			t.Errorf("no line %s", line)
		}
	}
	if t.Failed() {
		t.Log(out.String())
	}
}

func TestDemoJSON(t *testing.T) {
	p := newLab(t)
	var out, errs bytes.Buffer
	code := run(t.Context(), demoArgs(p, "-o", "json"), nil, &out, &errs)
	var v verdict
	if err := json.Unmarshal(out.Bytes(), &v); err != nil {
		t.Fatalf("%v in %s, stderr %s", err, &out, &errs)
	}
	outputs := 0
	for _, s := range v.Streams {
		outputs += len(s.Outputs)
	}
	if code != exitDone || errs.Len() > 0 || !v.OK || len(v.Faults) > 0 || len(v.Streams) != 4 || outputs != 6 ||
		v.Total.Sent != 2400 || v.Total.Relayed != 3600 || v.Total.Received != 3600 || len(v.Commands) > 0 {
		t.Errorf("code %d, stderr %s, %s", code, &errs, &out)
	}
}

// A verdict that cannot fail is worth nothing: each sabotage must be found.
func TestDemoFindsSabotage(t *testing.T) {
	for name, tt := range map[string]struct {
		change   func(cfg *demoConfig)       // before
		sabotage func(t *testing.T, d *demo) // while the streams flow
		faults   []string                    // that must be among those found
		err      string                      // instead of a verdict
	}{
		"other fields are expected, and only one source is": {
			change: func(cfg *demoConfig) {
				cfg.streams[0].arrivals[0].want.TTL = 99
				cfg.streams[1].arrivals[1].want = traffic.Expected{Source: netip.MustParseAddr("10.0.0.6"), SourcePort: 1, TTL: 16, DSCP: new(uint8(0))}
				cfg.streams[2].to, cfg.streams[2].rule.In = "239.1.3.1:5000%eth0", "239.1.3.1:5000%eth0"
			},
			faults: []string{
				"one-to-one to sink1: 600 with a wrong ttl (the latest from 10.0.1.1:41001, ttl 15, dscp 26)",
				"one-to-three to sink2: 600 with a wrong source address, 600 with a wrong source port, 600 with a wrong dscp (the latest from 10.0.0.5:41002, ttl 16, dscp 46)",
				"one-source: the rule matched 660 packets of 600 sent", "one-source to sink2: the relay sent 660 copies of 600",
				"one-source to sink2: 60 more than expected, 60 with a wrong source address", "one-source: 60 packets from 10.0.0.6 came through",
			},
		},
		"a packet comes twice": {
			sabotage: repeatPacket,
			faults:   []string{"one-to-one to sink1: 1 duplicated"},
		},
		"rules are changed and removed": {
			sabotage: func(t *testing.T, d *demo) {
				d.streams[0].rule.Out[0] = "239.2.1.1:5000%eth1,ttl=3"
				d.streams = d.streams[:3]
				if err := d.writeRules(); err != nil {
					t.Fatal(err)
				}
				if _, err := d.client.Reload(t.Context(), control.ApplyOptions{}); err != nil {
					t.Fatal(err)
				}
			},
			faults: []string{"with a wrong ttl (the latest from 10.0.1.1:41001, ttl 3, dscp 26)", "new-port: the rule is not active", "new-port to sink3: the relay sent 0 copies of 600", "lost"},
		},
		"a rule cannot work": {
			change: func(cfg *demoConfig) { cfg.streams[0].rule.In = "10.9.9.9:5000%eth0" },
			err:    "rule one-to-one: failed: address 10.9.9.9 is neither a multicast group nor an address of this host",
		},
		"a sink's address is wrong": {
			change: func(cfg *demoConfig) { cfg.streams[0].arrivals[0].at = "10.9.9.9:5000%eth0" },
			err:    "stream one-to-one: sink1: receive 10.9.9.9:5000%eth0: bind: ",
		},
		"the relay is killed": {
			sabotage: func(t *testing.T, d *demo) {
				if err := unix.PidfdSendSignal(d.relay.process.fd, unix.SIGKILL, nil, 0); err != nil {
					t.Fatal(err)
				}
			},
			err: "ended before the demonstration did: ",
		},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := short(newLab(t))
			if tt.change != nil {
				tt.change(&cfg)
			}
			d := newDemo(cfg)
			if tt.sabotage != nil {
				d.live = &trigger{text: liveTitle, fn: func() { tt.sabotage(t, d) }}
			}
			v, err := d.run(t.Context())
			if tt.err != "" {
				if v != nil || err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("error %v, want %s", err, tt.err)
				}
				return
			}
			if err != nil || v.OK {
				t.Fatalf("error %v, verdict %+v", err, v)
			}
			for _, want := range tt.faults {
				if !slices.ContainsFunc(v.Faults, func(f string) bool { return strings.Contains(f, want) }) {
					t.Errorf("no fault %q in\n%s", want, strings.Join(v.Faults, "\n"))
				}
			}
		})
	}
}

// repeatPacket takes a packet that arrives at the first sink and sends it there again.
func repeatPacket(t *testing.T, d *demo) {
	sink, relay := labtest.NewTap(t, d.hosts["sink1"], "eth0"), labtest.NewTap(t, d.hosts[relayHost], "eth1")
	group := []byte{239, 2, 1, 1}
	frame := sink.Receive(labtest.Timeout, func(f []byte) bool { return len(f) > 34 && bytes.Equal(f[30:34], group) })
	if frame == nil {
		t.Fatal("no packet of the stream")
	}
	relay.Send(frame)
}

// The exit code and the last lines of a demonstration that fails.
func TestDemoFails(t *testing.T) {
	p := newLab(t)
	out := &trigger{text: liveTitle, fn: func() {
		self, err := os.Executable()
		if err != nil {
			t.Error(err)
		}
		// A stranger on the source's network sends to the group, too.
		gen := exec.Command("nsenter", "--net="+filepath.Join(lab.RunDir, p.namespace(sourceHost)), self, "gen", "--count", "5", "239.1.4.1:5000%eth0")
		if text, err := gen.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, text)
		}
	}}
	var errs bytes.Buffer
	code := run(t.Context(), demoArgs(p), nil, out, &errs)
	if text := out.buf.String(); code != exitFailed || errs.Len() > 0 || strings.Contains(text, "ok:") ||
		!strings.Contains(text, "\nFAILED: new-port: the rule matched 605 packets of 600 sent\n") {
		t.Errorf("code %d, stderr %s\n%s", code, &errs, text)
	}
}

func TestDemoInterrupted(t *testing.T) {
	for name, text := range map[string]string{"before it begins": "", "while streams flow": liveTitle} {
		t.Run(name, func(t *testing.T) {
			p := newLab(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if text == "" {
				cancel()
			}
			out := &trigger{text: text, fn: cancel}
			var errs bytes.Buffer
			code := run(ctx, demoArgs(p, "--duration", "1h", "--keep"), nil, out, &errs)
			if code != exitFailed || errs.String() != "xdpcast: demo: interrupted before there was a verdict\n" {
				t.Errorf("code %d, stderr %s", code, &errs)
			}
		})
	}
}

// What is there already is left alone.
func TestDemoRefusesTakenNames(t *testing.T) {
	p := newLab(t)
	h, err := lab.NewHost(p.namespace("sink2"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	}()
	for _, tt := range []struct{ flag, want string }{
		{"--keep", h.Path() + " is there already, and not from a demonstration: remove it, or name the lab otherwise with --prefix"},
		{"--remove", "no lab called " + p.prefix + " is there (no " + p.runDir() + ")"},
	} {
		var out, errs bytes.Buffer
		code := run(t.Context(), demoArgs(p, tt.flag), nil, &out, &errs)
		if code != exitFailed || errs.String() != "xdpcast: demo: "+tt.want+"\n" || out.Len() > 0 {
			t.Errorf("%s: code %d, stderr %s\n%s", tt.flag, code, &errs, &out)
		}
		if diff := cmp.Diff([]string{h.Path()}, leftOf(t, p)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.flag, diff)
		}
	}
}

// A lab that was kept takes every command that it shows, and is removed by the last.
func TestDemoKeep(t *testing.T) {
	p := newLab(t)
	var out, errs bytes.Buffer
	if code := run(t.Context(), demoArgs(p, "--keep"), nil, &out, &errs); code != exitDone || errs.Len() > 0 {
		t.Fatalf("code %d, stderr %s\n%s", code, &errs, &out)
	}
	shown := shownCommands(out.String())

	errs.Reset()
	if code := run(t.Context(), demoArgs(p), nil, io.Discard, &errs); code != exitFailed ||
		!strings.Contains(errs.String(), p.runDir()+" is there already: \"xdpcast demo --remove --prefix "+p.prefix+"\" removes that lab") {
		t.Errorf("a second one: code %d, stderr %s", code, &errs)
	}

	var live []*liveCommand
	for _, tt := range []struct {
		about, want string // a regular expression of the output
		live        bool   // until it is interrupted
	}{
		{"the relay and its interfaces", `rules +4: 4 active, 0 pending, 0 failed`, false},
		{"the rules", `one-to-three +file +active +kernel`, false},
		{"the memberships", `eth0 +232\.1\.3\.1 +10\.0\.0\.5 +joined`, false},
		{"add a rule", `rule more: active, path kernel, 2 outputs`, false},
		{"receive its packets on a sink, until Ctrl-C", `\| +[1-9]\d* +0 +0 +0 +0 +0\n`, true},
		{"send it some, from another terminal", ``, true},
		{"watch the counters", `more +in +239\.1\.9\.1:5000%eth0 +active +[1-9]`, true},
		{"the flow table in the kernel", `"group": \[239,1,9,1\s*\]`, false},
		{"the first rule and the first output in the kernel", `"name": "[a-z-]+"`, false},
	} {
		commands := shown[tt.about]
		if len(commands) == 0 {
			t.Errorf("no command for %q", tt.about)
		}
		for i, command := range commands {
			want := regexp.MustCompile(tt.want)
			if i > 0 {
				want = regexp.MustCompile(`"dst_port"|"port"`)
			}
			if tt.live {
				live = append(live, startCommand(t, command, want))
				continue
			}
			if needsBpftool(t, command) {
				continue
			}
			text, err := exec.Command("sh", "-c", command).CombinedOutput()
			if err != nil || !want.Match(text) {
				t.Errorf("%s: %v, no %v in\n%s", command, err, want, text)
			}
		}
	}
	live[0].await() // so that there is a process inside
	removal := shown["remove the lab"][0]
	text, err := exec.Command("sh", "-c", removal).CombinedOutput()
	if err == nil || !strings.Contains(string(text), "runs in "+p.namespace("sink1")+": end it first") {
		t.Errorf("removal with a process inside: %v: %s", err, text)
	}
	for _, c := range live {
		c.interrupt()
	}
	if text, err := exec.Command("sh", "-c", removal).CombinedOutput(); err != nil || len(text) > 0 {
		t.Errorf("%s: %v: %s", removal, err, text)
	}
}

// shownCommands are the commands of a lab that was kept, by what is said of them.
func shownCommands(out string) map[string][]string {
	_, text, _ := strings.Cut(out, "The lab stays")
	_, text, _ = strings.Cut(text, "\n\n")
	shown := map[string][]string{}
	about := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if title, ok := strings.CutPrefix(line, "# "); ok {
			about = title
		} else if line != "" {
			shown[about] = append(shown[about], line)
		}
	}
	return shown
}

func needsBpftool(t *testing.T, command string) bool {
	t.Helper()
	if _, err := exec.LookPath("bpftool"); err == nil || !strings.HasPrefix(command, "bpftool ") {
		return false
	}
	if os.Getenv("CI") != "" {
		t.Error("bpftool is not installed")
	}
	t.Logf("not tried, bpftool is not installed: %s", command)
	return true
}

// liveCommand is a command that runs until it is interrupted.
type liveCommand struct {
	t    *testing.T
	cmd  *exec.Cmd
	want *regexp.Regexp
	mu   sync.Mutex
	out  bytes.Buffer
}

func (c *liveCommand) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.out.Write(p)
}

func (c *liveCommand) text() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.out.String()
}

func startCommand(t *testing.T, command string, want *regexp.Regexp) *liveCommand {
	t.Helper()
	c := &liveCommand{t: t, cmd: exec.Command("sh", "-c", "exec "+command), want: want}
	c.cmd.Stdout, c.cmd.Stderr = c, c
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.cmd.Process.Kill() }) // an error means that it has ended
	return c
}

// await waits until the command has shown what it must.
func (c *liveCommand) await() {
	c.t.Helper()
	for deadline := time.Now().Add(labtest.Timeout); !c.want.MatchString(c.text()); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			c.t.Errorf("%v: no %v in\n%s", c.cmd.Args, c.want, c.text())
			return
		}
	}
}

// interrupt ends the command, as Ctrl-C does, once it has shown what it must.
func (c *liveCommand) interrupt() {
	c.t.Helper()
	c.await()
	if err := errors.Join(c.cmd.Process.Signal(os.Interrupt), c.cmd.Wait()); err != nil {
		c.t.Errorf("%v: %v\n%s", c.cmd.Args, err, c.text())
	}
}

// A process that does not want to end is killed, and that is said.
func TestProcessStop(t *testing.T) {
	for name, tt := range map[string]struct{ script, want string }{
		"ends":    {`echo ready; exec sleep 60`, ""},
		"refuses": {`trap "" TERM; echo ready; while :; do sleep 60; done`, "was killed"},
	} {
		cmd := exec.Command("sh", "-c", tt.script)
		cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(out, make([]byte, len("ready\n"))); err != nil {
			t.Fatal(err)
		}
		p, err := openProcess(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		if p.ended() {
			t.Errorf("%s: ended already", name)
		}
		patience := 10 * time.Second
		if tt.want != "" {
			patience = 100 * time.Millisecond
		}
		err = p.stop(patience)
		if got := errorText(err); !strings.Contains(got, tt.want) || tt.want == "" && got != "" {
			t.Errorf("%s: %v", name, err)
		}
		if !p.ended() {
			t.Errorf("%s: not ended", name)
		}
		p.close()
		_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL) // the sleep that a killed shell leaves
		_ = cmd.Wait()                                // a signal ended it
	}
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func TestListenerOf(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	if pid, err := listenerOf(socket); pid != 0 || err != nil {
		t.Errorf("no socket: %d, %v", pid, err)
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	if pid, err := listenerOf(socket); pid != os.Getpid() || err != nil {
		t.Errorf("own socket: %d, %v", pid, err)
	}
	ln.SetUnlinkOnClose(false)
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	if pid, err := listenerOf(socket); pid != 0 || err != nil {
		t.Errorf("dead socket: %d, %v", pid, err)
	}
}

func TestDemoUsage(t *testing.T) {
	for _, tt := range []struct{ args, want string }{
		{"x", `xdpcast demo: unexpected argument "x"; see "xdpcast demo --help"`},
		{"--duration 0s", `--duration 0s: want more than 0s`},
		{"--rate fast", `--rate: rate "fast": must be packets a second`},
		{"--rate 20Mbit", `--rate 20Mbit: want packets a second, such as 20k`},
		{"--rate max", `--rate max: want packets a second, such as 20k`},
		{"--rate 1M --duration 1h", `--rate 1M for 1h0m0s: want at most 1e+09 packets in all`},
		{"--prefix a/b", `--prefix: name "a/b": want 1 to 32 of a to z, 0 to 9 and -, the first not a -`},
		{"--prefix -a", `--prefix: name "-a": want`},
		{"--prefix=", `--prefix: name "": want`},
		{"--prefix a.b", `--prefix: name "a.b": want`},
		{"--prefix a_b", `--prefix: name "a_b": want`},
		{"--keep --remove", `xdpcast demo: want either --keep or --remove`},
		{"-o xml", `--output "xml": want table or json`},
	} {
		got := call("", append([]string{"demo"}, strings.Fields(tt.args)...)...)
		if got.code != exitUsage || !strings.HasPrefix(got.stderr, "xdpcast: "+tt.want) || got.stdout != "" {
			t.Errorf("demo %s: %+v", tt.args, got)
		}
	}
}

// flawless is a stream of 100 packets with one output, and its rule's status, as
// they have to be.
func flawless() (flown, control.Stats) {
	s := demoStreams()[2]
	source, other := traffic.SendReport{Packets: 100, Stream: "a"}, traffic.SendReport{Packets: 10, Stream: "b"}
	c := traffic.Counters{Datagrams: 100, Received: 100}
	r := traffic.RecvReport{Total: c, Groups: []traffic.GroupReport{{Counters: c, Flows: []traffic.Flow{{Stream: "a", Received: 100}}}}}
	n := control.Counter{Packets: 100}
	return flown{stream: s, count: 100, sent: source, other: other, received: []traffic.RecvReport{r}}, control.Stats{
		Rules: []control.RuleStatus{{
			Rule: s.rule, State: control.StateActive, UsedPath: "kernel", Matched: n,
			Outputs: []control.OutputStatus{{State: control.StateActive, Sent: n}},
		}},
		Passed: control.Counter{Packets: 12},
	}
}

func TestJudge(t *testing.T) {
	drop := []control.Drop{{Reason: "ttl", Counter: control.Counter{Packets: 3}}, {Reason: "loop"}}
	for name, tt := range map[string]struct {
		change func(f *flown, s *control.Stats)
		want   []string
	}{
		"flawless":        {func(*flown, *control.Stats) {}, []string{}},
		"sent too few":    {func(f *flown, _ *control.Stats) { f.count = 101 }, []string{"one-source: 100 packets sent, not 101"}},
		"matched too few": {func(_ *flown, s *control.Stats) { s.Rules[0].Matched.Packets = 99 }, []string{"one-source: the rule matched 99 packets of 100 sent"}},
		"relayed too many": {func(_ *flown, s *control.Stats) { s.Rules[0].Outputs[0].Sent.Packets = 101 },
			[]string{"one-source to sink2: the relay sent 101 copies of 100"}},
		"dropped before": {func(_ *flown, s *control.Stats) { s.Rules[0].Drops = drop }, []string{"one-source: the relay dropped 3 packets: ttl"}},
		"dropped at the output": {func(_ *flown, s *control.Stats) { s.Rules[0].Outputs[0].Drops = drop },
			[]string{"one-source to sink2: the relay dropped 3 packets: ttl"}},
		"pending": {func(_ *flown, s *control.Stats) {
			s.Rules[0].State, s.Rules[0].Reason = control.StatePending, "interface eth2 is down"
		},
			[]string{"one-source: the rule is not active: pending: interface eth2 is down"}},
		"no path": {func(_ *flown, s *control.Stats) { s.Rules[0].UsedPath = "" }, []string{"one-source: the rule is not active: active"}},
		"no rule": {func(_ *flown, s *control.Stats) { s.Rules = nil }, []string{
			"one-source: the rule is not active: -", "one-source: the rule matched 0 packets of 100 sent", "one-source to sink2: the relay sent 0 copies of 100"}},
		"received": {func(f *flown, _ *control.Stats) {
			f.received[0].Total.Lost, f.received[0].Total.Duplicated, f.received[0].Total.Corrupt, f.received[0].Total.Foreign = 1, 2, 3, 4
		}, []string{"one-source to sink2: 1 lost, 2 duplicated, 3 corrupt", "one-source to sink2: 4 packets not from the source"}},
		"the other came through": {func(f *flown, _ *control.Stats) {
			f.received[0].Groups[0].Flows = append(f.received[0].Groups[0].Flows, traffic.Flow{Stream: "b", Received: 1})
		}, []string{"one-source: 1 packet from 10.0.0.6 came through, which the rule does not name"}},
		"the other was not sent": {func(f *flown, _ *control.Stats) { f.other = traffic.SendReport{} },
			[]string{"one-source: the other source, 10.0.0.6, sent nothing"}},
		"the other was not seen": {func(_ *flown, s *control.Stats) { s.Passed.Packets = 9 },
			[]string{"the relay saw 9 packets that no rule matched, but other sources sent 10"}},
		"not transmitted": {func(_ *flown, s *control.Stats) {
			s.TransmitDrops = []control.TransmitDrop{{Interface: "eth2", Reason: "driver", Packets: 5}}
		}, []string{"the relay's interface eth2 did not take 5 packets (driver)"}},
	} {
		f, s := flawless()
		tt.change(&f, &s)
		v := judge([]flown{f}, s)
		if diff := cmp.Diff(tt.want, v.Faults); diff != "" || v.OK != (len(tt.want) == 0) {
			t.Errorf("%s: ok %v (-want +got):\n%s", name, v.OK, diff)
		}
		var text strings.Builder
		if err := v.write(&text); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(text.String(), "ok: every packet arrived as its rule says\n") != v.OK || strings.Count(text.String(), "FAILED: ") != len(tt.want) {
			t.Errorf("%s:\n%s", name, &text)
		}
	}
}

func TestSentSoFar(t *testing.T) {
	arrived := func(flows ...traffic.Flow) []traffic.RecvReport {
		return []traffic.RecvReport{{}, {Groups: []traffic.GroupReport{{Flows: flows}}}}
	}
	for name, tt := range map[string]struct {
		received []traffic.RecvReport
		want     uint64
	}{
		"nothing arrived":           {nil, 64},
		"all that is counted":       {arrived(traffic.Flow{Stream: "a", HighestSeq: 63}), 64},
		"more than is counted":      {arrived(traffic.Flow{Stream: "a", HighestSeq: 99}), 100},
		"packets of another sender": {arrived(traffic.Flow{Stream: "b", HighestSeq: 99}), 64},
		"beside another's":          {arrived(traffic.Flow{Stream: "b", HighestSeq: 99}, traffic.Flow{Stream: "a", HighestSeq: 70}), 71},
	} {
		if got := sentSoFar(traffic.SendReport{Stream: "a", Packets: 64}, tt.received); got != tt.want {
			t.Errorf("%s: %d, want %d", name, got, tt.want)
		}
	}
}
