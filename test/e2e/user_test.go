package e2e_test

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/labtest"
	"xdpcast/internal/traffic"
	"xdpcast/pkg/loader"
)

const nobodyID = 65534

// daemonCapabilities are NET_ADMIN, NET_RAW, IPC_LOCK, PERFMON and BPF in /proc/PID/status.
const daemonCapabilities = "000000c000007000"

// unprivileged checks that all threads of a process run as a user with only the daemon's capabilities.
func unprivileged(t *testing.T, pid int) {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(tasks) < 2 {
		t.Fatalf("threads %v, %v", tasks, err)
	}
	for _, task := range tasks {
		text, err := os.ReadFile(task)
		if err != nil {
			continue // it has ended
		}
		for key, want := range map[string]string{
			"Uid": "65534\t65534\t65534\t65534", "CapEff": daemonCapabilities, "CapPrm": daemonCapabilities,
			"CapInh": "0000000000000000", "CapAmb": "0000000000000000", "NoNewPrivs": "1",
		} {
			if !strings.Contains(string(text), key+":\t"+want+"\n") {
				t.Errorf("%s: want %s %s in\n%s", task, key, want, text)
			}
		}
	}
}

// An unprivileged daemon does all that root's does, over the same state, on every path, and the two
// follow each other without a packet lost on the kernel path.
func TestUser(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	file := in.write("rules.yaml", "rules:\n  - {name: file, in: \"239.1.9.1:5000%in0\", out: [\"239.2.9.1:6000%out0\"]}\n")
	told := filepath.Join(in.dir, "told")
	hook := in.script("hook", "#!/bin/sh\ngrep -E '^(Uid|CapEff|CapBnd|NoNewPrivs)' /proc/self/status >"+told+"/$XDPCAST_EVENT_NUMBER.next\nmv "+told+"/$XDPCAST_EVENT_NUMBER.next "+told+"/$XDPCAST_EVENT_NUMBER\n")
	if err := os.Mkdir(told, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(told, 0o777); err != nil { // whatever the umask
		t.Fatal(err)
	}
	labtest.Sysctl(t, n.relay, "net/ipv4/ip_unprivileged_port_start", "1024")

	// Root's daemon leaves its files and pins.
	in.start("-c", file)
	in.add("one", oneIn, oneOut)
	received := receive(t, n.sinks[0], "239.2.1.1:6000%sink0", traffic.Expected{})
	stream := send(t, n.source, traffic.SendConfig{Target: target(t, streamTarget), TTL: 16, Rate: traffic.Rate{Value: easy}})
	stream.flows(300)
	in.running.stop(syscall.SIGTERM)

	user := []string{"--user", "nobody", "-c", file, "--listen", "127.0.0.1:80", "--on-event", hook, "--mroute"}
	d := in.start(user...)
	d.waitLog(`msg=privileges uid=65534`, 1)
	d.waitLog(`pinned state adopted`, 1)
	unprivileged(t, d.cmd.Process.Pid)
	id := in.rule("one").ID
	stream.flows(300)

	// Rules through the API and from the file, on every path.
	for i, path := range []string{"kernel", "afxdp", "fanout"} {
		group := fmt.Sprintf("239.1.2.%d:5000%%in0", i)
		if _, err := in.client.AddRule(t.Context(), control.Rule{Name: path, In: group, Out: []string{"239.2.2.1:6000%out1", "239.2.2.2:6000%out2"}, Path: path}); err != nil {
			t.Fatal(err)
		}
		if s := in.waitState(path, control.StateActive); s.UsedPath != path {
			t.Errorf("rule %s takes the path %s: %s", path, s.UsedPath, s.Reason)
		}
		before := in.rule(path).Matched.Packets
		s := send(t, n.source, traffic.SendConfig{Target: target(t, strings.Replace(group, "in0", "src0", 1)), TTL: 16, Count: 100, Rate: traffic.Rate{Value: 10_000}})
		eventually(t, "packets are relayed on the path "+path, func() string {
			r := in.rule(path)
			if r.Matched.Packets-before < 100 || r.Outputs[0].Sent.Packets < 100 || r.Outputs[1].Sent.Packets < 100 {
				return fmt.Sprintf("%+v", r)
			}
			return ""
		})
		s.stop()
	}
	in.write("rules.yaml", "rules:\n  - {name: file, in: \"239.1.9.2:5000%in0\", out: [\"239.2.9.1:6000%out0\"]}\n")
	in.mustCLI("reload")
	in.write("rules.yaml", "rules:\n  - {name: file, in: \"239.1.9.3:5000%in0\", out: [\"239.2.9.1:6000%out0\"]}\n")
	d.signal(syscall.SIGHUP)
	eventually(t, "the hangup is heard", func() string {
		if got := in.rule("file").In; got != "239.1.9.3:5000%in0" {
			return got
		}
		return ""
	})
	in.mustCLI("rollback")
	if got := in.rule("file").In; got != "239.1.9.2:5000%in0" {
		t.Errorf("rolled back to %s", got)
	}
	in.mustCLI("doctor")

	// The daemon's user may change rules, another user may not.
	as := func(id uint32) *syscall.SysProcAttr {
		return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: id, Gid: id}}
	}
	if got := in.cliAs(as(nobodyID), "rule", "del", "fanout"); got.code != 0 {
		t.Errorf("the daemon's user: %s", got)
	}
	if got := in.cliAs(as(nobodyID-1), "rule", "list"); got.code != 1 || !strings.Contains(got.stderr, "not allowed to reach") {
		t.Errorf("another user: %s", got)
	}
	// Metrics on a privileged port.
	labtest.Do(t, n.relay, func() error {
		conn, err := net.Dial("tcp", "127.0.0.1:80")
		if err != nil {
			return err
		}
		defer conn.Close()
		if _, err := io.WriteString(conn, "GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n"); err != nil {
			return err
		}
		if text, err := io.ReadAll(conn); err != nil || !strings.Contains(string(text), "\nxdpcast_rules") {
			return fmt.Errorf("metrics: %v\n%s", err, text)
		}
		return nil
	})
	// The program for events has no capabilities.
	eventually(t, "the program for events is called", func() string {
		files, _ := filepath.Glob(told + "/*[0-9]")
		if len(files) == 0 {
			return "it was not"
		}
		text, err := os.ReadFile(files[0])
		want := "Uid:\t65534\t65534\t65534\t65534\nCapEff:\t0000000000000000\nCapBnd:\t" + daemonCapabilities + "\nNoNewPrivs:\t1\n"
		if err != nil || string(text) != want {
			t.Errorf("the program for events has %q, %v", text, err)
		}
		return ""
	})
	// An interface that appears later is attached to, and a removed pin is recreated.
	if err := os.Remove(filepath.Join(in.pinDir, "programs", "relay")); err != nil {
		t.Fatal(err)
	}
	d.waitLog("1 pins were removed", 1)
	unprivileged(t, d.cmd.Process.Pid)

	// Killed, and restarted as the same user, as root, and as the user after root.
	in.running.stop(syscall.SIGKILL)
	in.start(user...)
	in.running.stop(syscall.SIGTERM)
	in.mustCLI("upgrade")
	in.start("-c", file)
	in.add("again", "239.1.9.9:5000%in0", "239.2.9.9:6000%out1")
	in.running.stop(syscall.SIGKILL)
	d = in.start(user...)
	unprivileged(t, d.cmd.Process.Pid)
	if in.rule("one").ID != id || in.rule("again").State != control.StateActive {
		t.Errorf("rules after root's daemon: %+v", in.rules())
	}
	stream.flows(300)
	sent := stream.stop()
	if fault := received.finish(sent); fault != "" {
		t.Error(fault)
	}
	if code := d.stop(syscall.SIGTERM); code != 0 {
		t.Errorf("the daemon ended with code %d", code)
	}
}

// After prepare, a service manager starts the daemon as its user, with ambient capabilities, which
// it passes on to no child.
func TestPrepare(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	in.mustCLI("prepare", "--user", "nobody")
	in.refused(t, 1, []string{"nothing is loaded in " + in.pinDir}, "upgrade")
	start := func() *daemon {
		before := program
		defer func() { program = before }()
		set := "-all,+net_admin,+net_raw,+ipc_lock,+perfmon,+bpf"
		program = in.script("start", "#!/bin/sh\nexec setpriv --reuid=65534 --regid=65534 --clear-groups --bounding-set="+set+" --inh-caps="+set+" --ambient-caps="+set+" "+before+" \"$@\"\n")
		return in.start()
	}
	d := start()
	unprivileged(t, d.cmd.Process.Pid)
	in.add("one", oneIn, oneOut)
	if got := in.cli("prepare", "--user", "nobody"); got.code != 1 || !strings.Contains(got.stderr, "another xdpcast owns the pin directory") {
		t.Errorf("prepare while a daemon runs: %s", got)
	}
	d.stop(syscall.SIGKILL)
	in.mustCLI("prepare", "--user", "nobody")
	d = start()
	d.waitLog("pinned state adopted", 1)
	// It reports what it cannot recreate.
	d.stop(syscall.SIGTERM)
	in.mustCLI("unload", "--all")
	in.mustCLI("prepare", "--user", "nobody")
	in.mustCLI("load", "-i", "in0") // owned by root, before the daemon
	in.mustCLI("prepare", "--user", "nobody")
	d = start()
	d.waitLog("pinned state adopted", 1)
}

// A process that dies while it builds in a directory created for it leaves nothing that counts.
func TestUnfinished(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	in.mustCLI("load", "-i", "in0")
	if err := os.Mkdir(filepath.Join(in.pinDir, "unfinished"), 0o700); err != nil {
		t.Fatal(err)
	}
	in.refused(t, 1, []string{"nothing is loaded in " + in.pinDir}, "upgrade")
	in.start("--user", "nobody")
	if _, err := os.Stat(filepath.Join(in.pinDir, "unfinished")); !os.IsNotExist(err) {
		t.Errorf("the mark is there: %v", err)
	}
	in.add("one", oneIn, oneOut)
}

// A user that does not exist, or may not use the directories, is refused before anything changes.
func TestBadUser(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	theirs := filepath.Join(in.dir, "theirs")
	if err := os.Mkdir(theirs, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(theirs, "precious"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	nobody := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobodyID, Gid: nobodyID}}
	in.refused(t, 2, []string{`--user: user "no-such" is not known: want the name or number of one, such as useradd --system makes`}, "run", "--user", "no-such")
	in.refused(t, 2, []string{`--user: user "root" is root: want another one, or none`}, "run", "--user", "root")
	in.refused(t, 2, []string{"--group without --user: want both"}, "run", "--group", "daemon")
	in.refusedAs(t, nobody, 1, []string{"give directories to user daemon: permission denied: run it as root"}, "run", "--user", "daemon")
	in.refused(t, 1, []string{"state directory: directory " + theirs + " has precious, which is not of xdpcast: want a directory for xdpcast alone"},
		"run", "--user", "nobody", "--state-dir", theirs)
	secret := in.write("secret.yaml", "rules: []\n")
	if err := os.Chmod(secret, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := in.cli("run", "--user", "nobody", "-c", secret); got.code != 1 || !strings.HasSuffix(got.stderr, "xdpcast: read configuration: open "+secret+": permission denied: it works as user 65534: let that user do it, or run it as root\n") {
		t.Errorf("a file of root's alone: %s", got)
	}
	if err := os.Remove(in.pinDir); err != nil { // empty
		t.Error(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(theirs, &st); err != nil || st.Uid != 0 {
		t.Errorf("the directory of others belongs to %d, %v", st.Uid, err)
	}
}

// A rule that cannot be saved for good is neither in the daemon nor in the file, although the file was written: the directory
// cannot be synced. The next one is saved.
func TestUnsyncedRule(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	in.start("--user", "nobody")
	in.add("first", oneIn, oneOut)
	file := filepath.Join(in.runDir, filepath.Base(loader.RunFile(in.runDir, in.pinDir, "api-rules.yaml")))
	saved := func() string {
		t.Helper()
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	before := saved()
	if err := os.Chmod(in.runDir, 0o311); err != nil { // no read
		t.Fatal(err)
	}
	second := control.Rule{Name: "second", In: "239.1.8.1:5000%in0", Out: []string{"239.2.8.1:6000%out0"}}
	if _, err := in.client.AddRule(t.Context(), second); err == nil || !strings.Contains(err.Error(), "save rules: open "+in.runDir+": permission denied") {
		t.Errorf("the error is %v", err)
	}
	if _, err := in.client.Rule(t.Context(), "second"); err == nil {
		t.Error("the rule is there after an error")
	}
	if got := saved(); got != before {
		t.Errorf("after an error the file has\n%s\nwant\n%s", got, before)
	}
	if err := os.Chmod(in.runDir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := in.client.AddRule(t.Context(), second); err != nil {
		t.Fatal(err)
	}
	if got := saved(); !strings.Contains(got, "name: second") {
		t.Errorf("the file has\n%s", got)
	}
}
