package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"xdpcast/internal/control"
	"xdpcast/internal/demo"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// asProgram in the environment makes the test binary the program: the relay of
// a demonstration is its own executable.
const asProgram = "XDPCAST_TEST_AS_PROGRAM"

func init() {
	if os.Getenv(asProgram) != "" {
		main()
	}
}

// newLab returns the prefix of a lab of the test's own, and checks in the end that
// nothing is left of it.
func newLab(t *testing.T) string {
	t.Helper()
	labtest.RequireRoot(t)
	t.Setenv(asProgram, "1")
	t.Setenv("GORACE", "atexit_sleep_ms=0") // or each program would take a second to end
	prefix := lab.UniqueName("demo")
	before := labtest.OpenFiles(t)
	t.Cleanup(func() {
		if left := labtest.Leftovers(t, prefix); len(left) > 0 {
			t.Errorf("left behind: %q", left)
			if err := demo.Remove(prefix); err != nil {
				t.Log(err)
			}
		}
		if after := labtest.OpenFiles(t); after > before {
			t.Errorf("%d files are open, %d were before", after, before)
		}
	})
	return prefix
}

// demoArgs is a demonstration of the length that tests can afford.
func demoArgs(prefix string, more ...string) []string {
	return append([]string{"xdpcast", "demo", "--prefix", prefix, "--rate", "10k", "--duration", "300ms"}, more...)
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
	prefix := newLab(t)
	var out, errs bytes.Buffer
	if code := run(t.Context(), demoArgs(prefix), nil, &out, &errs); code != exitDone || errs.Len() > 0 {
		t.Fatalf("code %d, stderr %s\n%s", code, &errs, &out)
	}
	for _, line := range []string{
		`RULE +IN +OUT`,
		`one-source +10\.0\.0\.5@232\.1\.3\.1:5000%eth0 +239\.2\.3\.1:5000%eth2,src=keep,ttl=4`,
		` +TIME +SENT +EXPECTED +RECEIVED +LOST +SENT/S +RECEIVED/S`,
		` +\d+\.\ds +3000 +4200 +4200 +0 +- +-`,
		`one-to-one +kernel +600 +600 +sink1 +600 +600 +600 +0 +0 +0 +0 +0 .*`,
		`one-to-three +kernel +600 +600 +sink1 +600 +600 +600 +0 +0 +0 +0 +0 .*`,
		` +sink2 +600 +600 +600 +0 +0 +0 +0 +0 .*`,
		` +sink3 +600 +600 +600 +0 +0 +0 +0 +0 .*`,
		`one-source +kernel +600 +600 +sink2 +600 +600 +600 +0 +0 +0 +0 +0 .*`,
		`new-port +kernel +600 +600 +sink3 +600 +600 +600 +0 +0 +0 +0 +0 .*`,
		`two-legs +kernel +600 +1137 +sink1 +600 +600 +600 +0 +0 +\d+ +0 +0 .*`,
		`total +3000 +3537 +4200 +4200 +4200 +0 +0 +\d+ +0 +0`,
		`two-legs: lost \d+ of 600 packets on 239\.1\.5\.1:5000%eth0, \d+ of 600 packets on 239\.1\.5\.2:5000%eth0: 0 after merging, \d+ repaired`,
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
	prefix := newLab(t)
	var out, errs bytes.Buffer
	code := run(t.Context(), demoArgs(prefix, "-o", "json"), nil, &out, &errs)
	var v demo.Verdict
	if err := json.Unmarshal(out.Bytes(), &v); err != nil {
		t.Fatalf("%v in %s, stderr %s", err, &out, &errs)
	}
	outputs := 0
	for _, s := range v.Streams {
		outputs += len(s.Outputs)
	}
	if code != exitDone || errs.Len() > 0 || !v.OK || len(v.Faults) > 0 || len(v.Streams) != 5 || outputs != 7 || len(v.Streams[4].Legs) != 2 ||
		v.Total.Sent != 3000 || v.Total.Relayed != 4200 || v.Total.Received != 4200 || len(v.Commands) > 0 {
		t.Errorf("code %d, stderr %s, %s", code, &errs, &out)
	}
}

// The exit code and the last lines of a demonstration that fails.
func TestDemoFails(t *testing.T) {
	prefix := newLab(t)
	out := &trigger{text: liveTitle, fn: func() {
		self, err := os.Executable()
		if err != nil {
			t.Error(err)
		}
		// A stranger on the source's network sends to the group, too.
		gen := exec.Command("nsenter", "--net="+filepath.Join(lab.RunDir, prefix+"-source"), self, "gen", "--count", "5", "239.1.4.1:5000%eth0")
		if text, err := gen.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, text)
		}
	}}
	var errs bytes.Buffer
	code := run(t.Context(), demoArgs(prefix), nil, out, &errs)
	if text := out.buf.String(); code != exitFailed || errs.Len() > 0 || strings.Contains(text, "ok:") ||
		!strings.Contains(text, "\nFAILED: new-port: the rule matched 605 packets of 600 sent\n") {
		t.Errorf("code %d, stderr %s\n%s", code, &errs, text)
	}
}

func TestDemoInterrupted(t *testing.T) {
	for name, text := range map[string]string{"before it begins": "", "while streams flow": liveTitle} {
		t.Run(name, func(t *testing.T) {
			prefix := newLab(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if text == "" {
				cancel()
			}
			out := &trigger{text: text, fn: cancel}
			var errs bytes.Buffer
			code := run(ctx, demoArgs(prefix, "--duration", "1h", "--keep"), nil, out, &errs)
			if code != exitFailed || errs.String() != "xdpcast: demo: interrupted before there was a verdict\n" {
				t.Errorf("code %d, stderr %s", code, &errs)
			}
		})
	}
}

// What is there already is left alone.
func TestDemoRefusesTakenNames(t *testing.T) {
	prefix := newLab(t)
	h, err := lab.NewHost(prefix + "-sink2")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	}()
	for _, tt := range []struct{ flag, want string }{
		{"--keep", h.Path() + " already exists, and not from a demo: remove it, or choose another name with --prefix"},
		{"--remove", "no lab called " + prefix + " is there (no " + "/run/" + prefix + "-demo" + ")"},
	} {
		var out, errs bytes.Buffer
		code := run(t.Context(), demoArgs(prefix, tt.flag), nil, &out, &errs)
		if code != exitFailed || errs.String() != "xdpcast: demo: "+tt.want+"\n" || out.Len() > 0 {
			t.Errorf("%s: code %d, stderr %s\n%s", tt.flag, code, &errs, &out)
		}
		if diff := cmp.Diff([]string{h.Path()}, labtest.Leftovers(t, prefix)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.flag, diff)
		}
	}
}

// A lab that was kept takes every command that it shows, and is removed by the last.
func TestDemoKeep(t *testing.T) {
	prefix := newLab(t)
	var out, errs bytes.Buffer
	if code := run(t.Context(), demoArgs(prefix, "--keep"), nil, &out, &errs); code != exitDone || errs.Len() > 0 {
		t.Fatalf("code %d, stderr %s\n%s", code, &errs, &out)
	}
	shown := shownCommands(out.String())

	errs.Reset()
	if code := run(t.Context(), demoArgs(prefix), nil, io.Discard, &errs); code != exitFailed ||
		!strings.Contains(errs.String(), "/run/"+prefix+"-demo"+" already exists: \"xdpcast demo --remove --prefix "+prefix+"\" removes that lab") {
		t.Errorf("a second one: code %d, stderr %s", code, &errs)
	}

	var live []*liveCommand
	for _, tt := range []struct {
		about, want string // a regular expression of the output
		live        bool   // until it is interrupted
	}{
		{"the relay and its interfaces", `rules +5: 5 active, 0 pending, 0 failed`, false},
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
	if err == nil || !strings.Contains(string(text), "runs in "+prefix+"-sink1"+": end it first") {
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

// The text of a verdict says what the verdict does: ok, or every fault.
func TestWriteVerdict(t *testing.T) {
	for name, tt := range map[string]struct {
		v    demo.Verdict
		want []string // its last lines
	}{
		"ok":     {demo.Verdict{OK: true, Faults: []string{}}, []string{"ok: every packet arrived as its rule says"}},
		"faults": {demo.Verdict{Faults: []string{"a: lost", "b: \x1b[2Jlate"}}, []string{"FAILED: a: lost", "FAILED: b:  [2Jlate"}},
		"another source": {
			demo.Verdict{OK: true, Streams: []demo.StreamVerdict{{Other: &demo.OtherVerdict{Source: "10.0.0.6", Sent: 1}, Rule: control.Rule{Name: "a"}}}},
			[]string{"a: 1 packet from another source, 10.0.0.6: 0 came through", "ok: every packet arrived as its rule says"},
		},
		"kept": {demo.Verdict{OK: true, Commands: []demo.Command{{About: "the rules", Command: "xdpcast rule list"}}}, []string{
			"ok: every packet arrived as its rule says", "", "The lab stays, with its relay running. To try, as root:", "", "# the rules", "xdpcast rule list",
		}},
	} {
		var text strings.Builder
		if err := writeVerdict(&text, &tt.v); err != nil {
			t.Fatal(err)
		}
		_, last, _ := strings.Cut(text.String(), "\n\n") // behind the table
		if diff := cmp.Diff(strings.Join(tt.want, "\n")+"\n", last); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}
