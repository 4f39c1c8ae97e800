package e2e_test

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/traffic"
)

// TestRingsAreKept kills and restarts the daemon of "xdpcast hold" on the fanout path. Packets that arrive while the
// holder cannot start the next one wait in the rings, which that one takes over: none is lost, doubled or overtaken.
func TestRingsAreKept(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	rule := "rules:\n  - {name: r, in: '239.1.1.1:5000%in0', out: ['239.2.1.1:6000%out0'], path: fanout}\n" +
		"  - {name: x, in: '239.1.1.2:5000%in0', out: ['239.2.1.2:6000%out0'], path: afxdp}\n"
	file := in.write("rules.yaml", rule)
	d := in.startCommand("hold", "--run-dir", in.runDir, "--", program, "run", "-c", file)
	in.running = d
	pid := in.ready(0)
	waitGroups(t, n.relay, 2)
	s := receive(t, n.sinks[0], "239.2.1.1:6000%sink0", traffic.Expected{})
	total := uint64(0)
	// So slow that the rings hold seconds of it, however busy the machine.
	const slow = 200
	config := traffic.SendConfig{Target: target(t, "239.1.1.1:5000%src0"), TTL: 16, Rate: traffic.Rate{Value: slow}}
	burst := func(packets uint64) {
		t.Helper()
		config := config
		config.Count = packets
		config.Rate.Value = easy
		total += send(t, n.source, config).wait()
	}
	burst(100)
	s.wait(total)
	const waits = 200 // packets
	for range 2 {
		const gone = "packets that waited too long for a daemon are discarded"
		before := strings.Count(d.log.String(), gone)
		d.signal(unix.SIGSTOP)
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the daemon is dead", func() string {
			if runs(pid) {
				return "it runs"
			}
			return ""
		})
		burst(waits) // to nobody
		d.signal(unix.SIGCONT)
		pid = in.ready(pid)
		eventually(t, "the packets that waited have come", func() string {
			n := s.received()
			if n >= total {
				return ""
			}
			if strings.Count(d.log.String(), gone) > before { // a machine on which a start takes longer than packets wait
				t.Logf("%d of %d packets have come; the others have waited too long", n, total)
				total -= waits
				return ""
			}
			return fmt.Sprintf("%d of %d", n, total)
		})
	}

	// A restart hands over, as an upgrade does: on the afxdp path, too, nothing is lost or overtaken.
	x := receive(t, n.sinks[0], "239.2.1.2:6000%sink0", traffic.Expected{})
	other := config
	other.Target = target(t, "239.1.1.2:5000%src0")
	through := send(t, n.source, other)
	stream := send(t, n.source, config)
	for range 2 {
		stream.flows(20)
		if err := unix.Kill(pid, unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		pid = in.ready(pid)
	}
	stream.flows(20)
	if fault := x.finish(through.stop()); fault != "" && !strings.Contains(d.log.String(), "the sockets of the previous daemon are not inherited") {
		t.Error(fault) // before Linux 6.4 they cannot be
	}
	if got := d.log.String(); strings.Count(got, `msg="taken over"`) != 2 || strings.Count(got, "ended, and is started again") != 2 {
		t.Errorf("want two daemons that took over, and two that were started again:\n%s", got)
	}
	total += stream.stop()
	s.wait(total)

	// A killed daemon loses what it had in hand.
	stream = send(t, n.source, config)
	const kills, hand = 2, 64
	for range kills {
		stream.flows(20)
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		pid = in.ready(pid)
	}
	stream.flows(20)
	total += stream.stop()
	s.wait(total - kills*hand)
	if got := d.log.String(); strings.Contains(got, "not inherited") {
		t.Errorf("rings were not inherited:\n%s", got)
	}

	// A daemon whose rings have another layout says so, and opens its own.
	if text := s.receiver.Report().Total; text.Duplicated+text.Reordered+text.Foreign > 0 {
		t.Errorf("received %+v, want each packet once and in order", text)
	}
	s = receive(t, n.sinks[0], "239.2.1.1:6000%sink0", traffic.Expected{})
	link, err := n.relay.Link("in0")
	if err != nil {
		t.Fatal(err)
	}
	if err := n.relay.Netlink().LinkSetMTU(link, 9000); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	pid = in.ready(pid)
	d.waitLog("the rings of the previous daemon are not inherited", 1)
	total = 0
	burst(100)
	if fault := s.finish(total); fault != "" {
		t.Error(fault)
	}
	if want := "another layout"; !strings.Contains(d.log.String(), want) {
		t.Errorf("%q is not in the log:\n%s", want, d.log.String())
	}

	// The holder ends both.
	if code := d.stop(unix.SIGTERM); code != 0 {
		t.Errorf("the holder ended with code %d:\n%s", code, d.log.String())
	}
	if runs(pid) {
		t.Errorf("the daemon %d outlives its holder", pid)
	}
}

// The successor of a killed daemon relays on the fanout path with the rules that were in force before it knows the rules
// of its file: it reads them from a pipe, into which nothing is written until packets have come through. Each packet
// comes once and in order, and is counted; then the rules are those of the file. With --user it drops its privileges after
// that, on all threads.
func TestSuccessorRelaysFirst(t *testing.T) {
	t.Parallel()
	for _, user := range []string{"", "nobody"} {
		t.Run("user "+user, func(t *testing.T) {
			t.Parallel()
			relaysFirst(t, user)
		})
	}
}

func relaysFirst(t *testing.T, user string) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	const text = "rules:\n  - {name: r, in: '239.1.1.1:5000%%in0', out: ['239.2.1.1:6000%%out0'], path: %s}\n"
	file := in.write("rules.yaml", fmt.Sprintf(text, "fanout"))
	// One worker: the sender may change its CPU, and rings are read side by side.
	command := []string{"hold", "--run-dir", in.runDir, "--", program, "run", "-c", file, "--fanout-workers", "1"}
	if user != "" {
		command = append(command, "--user", user)
	}
	d := in.startCommand(command...)
	in.running = d
	pid := in.ready(0)
	waitGroups(t, n.relay, 1)
	s := receive(t, n.sinks[0], "239.2.1.1:6000%sink0", traffic.Expected{})
	const slow = 200
	stream := send(t, n.source, traffic.SendConfig{Target: target(t, "239.1.1.1:5000%src0"), TTL: 16, Rate: traffic.Rate{Value: slow}})
	paths := []string{"fanout", "fanout", "kernel"}
	for i, path := range paths {
		eventually(t, "the holder has the rules", func() string {
			if !holdsRules(t, d.cmd.Process.Pid) {
				return "it has not"
			}
			return ""
		})
		stream.flows(20)
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(unix.Mkfifo(file, 0o600), os.Chmod(file, 0o644)); err != nil { // whatever the umask
			t.Fatal(err)
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		d.waitLog("the path fanout goes on with the rules of the previous daemon", i+1)
		s.wait(s.received() + slow/2)
		if got := s.receiver.Report().Total; got.Duplicated+got.Reordered+got.Foreign > 0 {
			t.Errorf("received %+v until the rules are read, want each packet once and in order", got)
		}
		pipe, err := os.OpenFile(file, os.O_WRONLY, 0) // the daemon is about to read
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		in.write("rules.yaml", fmt.Sprintf(text, path))
		if _, err := fmt.Fprintf(pipe, text, path); err != nil {
			t.Fatal(err)
		}
		if err := pipe.Close(); err != nil {
			t.Fatal(err)
		}
		pid = in.ready(pid)
		if rule := in.waitState("r", control.StateActive); rule.UsedPath != path {
			t.Errorf("the path is %s, want %s", rule.UsedPath, path)
		}
		if user != "" {
			unprivileged(t, pid)
			log := d.log.String()
			if strings.LastIndex(log, "the path fanout goes on") > strings.LastIndex(log, "msg=privileges") {
				t.Errorf("privileges were dropped first:\n%s", log)
			}
		}
		if log := d.log.String(); strings.Contains(log, "not inherited") || strings.Contains(log, "until the daemon has started") {
			t.Fatalf("the path did not go on:\n%s", log)
		}
	}
	stream.flows(20)
	total := stream.stop()
	hand := uint64(len(paths) * 64) // what each killed daemon had in hand
	s.wait(total - hand)
	got := s.receiver.Report().Total
	if got.Duplicated+got.Foreign > 0 { // packets of the kernel path may overtake those in the rings
		t.Errorf("received %+v, want each packet once", got)
	}
	eventually(t, "all packets are counted", func() string {
		if rule := in.rule("r"); rule.Matched.Packets < got.Received || rule.Matched.Packets > total {
			return fmt.Sprintf("%d have matched, and %d have arrived of %d", rule.Matched.Packets, got.Received, total)
		}
		return ""
	})
}

// A daemon on the fanout path has a standby, which goes on when it is killed: no other process is started for that. It follows
// an upgrade, and is gone with the last rule of the path, and with the holder.
func TestStandby(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	const text = "rules:\n  - {name: r, in: '239.1.1.1:5000%%in0', out: ['239.2.1.1:6000%%out0'], path: %s}\n"
	file := in.write("rules.yaml", fmt.Sprintf(text, "fanout"))
	d := in.startCommand("hold", "--run-dir", in.runDir, "--", program, "run", "-c", file, "--user", "nobody", "--fanout-workers", "1")
	in.running = d
	pid := in.ready(0)
	waitGroups(t, n.relay, 1)
	s := receive(t, n.sinks[0], "239.2.1.1:6000%sink0", traffic.Expected{})
	const slow = 200
	stream := send(t, n.source, traffic.SendConfig{Target: target(t, "239.1.1.1:5000%src0"), TTL: 16, Rate: traffic.Rate{Value: slow}})
	standbys := 0
	standby := func() (pid int) {
		t.Helper()
		standbys++
		d.waitLog("a standby is started", standbys)
		text := d.log.String()
		text = text[strings.LastIndex(text, "a standby is started"):]
		if _, err := fmt.Sscanf(text[strings.Index(text, "pid="):], "pid=%d", &pid); err != nil {
			t.Fatal(err)
		}
		return pid
	}
	const kills = 2
	for i := range kills {
		next := standby()
		stream.flows(20)
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if pid = in.ready(pid); pid != next {
			t.Fatalf("the daemon is process %d, want the standby %d", pid, next)
		}
		unprivileged(t, pid)
		d.waitLog("the path fanout goes on with the rules of the previous daemon", i+1)
	}
	before := standby()
	in.mustCLI("upgrade", "--exec")
	in.ready(pid)
	after := standby()
	eventually(t, "the standby before the upgrade is gone", func() string {
		if runs(before) {
			return "it runs"
		}
		return ""
	})
	stream.flows(20)
	total := stream.stop()
	s.wait(total - kills*64) // what each killed daemon had in hand
	if got := s.receiver.Report().Total; got.Duplicated+got.Reordered+got.Foreign > 0 {
		t.Errorf("received %+v, want each packet once and in order", got)
	}
	if got := strings.Count(d.log.String(), "msg=started"); got != 1 {
		t.Errorf("%d processes were started to work, want one:\n%s", got, d.log.String())
	}

	in.write("rules.yaml", fmt.Sprintf(text, "kernel"))
	in.mustCLI("reload")
	eventually(t, "nothing needs a standby, and there is none", func() string {
		if runs(after) {
			return "it runs"
		}
		return ""
	})
	in.write("rules.yaml", fmt.Sprintf(text, "fanout"))
	in.mustCLI("reload")
	last := standby()
	if code := d.stop(unix.SIGTERM); code != 0 {
		t.Errorf("the holder ended with code %d:\n%s", code, d.log.String())
	}
	eventually(t, "the standby ends with the holder", func() string {
		if runs(last) {
			return "it runs"
		}
		return ""
	})
}

// holdsRules says whether a process has a descriptor of valid rules that a daemon keeps.
func holdsRules(t *testing.T, pid int) bool {
	dir := fmt.Sprintf("/proc/%d/fd/", pid)
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(files, func(f os.DirEntry) bool {
		to, _ := os.Readlink(dir + f.Name()) // it may be closed by now
		if !strings.Contains(to, "memfd:xdpcast-rules") {
			return false
		}
		const valid = 8 // offset of a byte
		text, err := os.ReadFile(dir + f.Name())
		return err == nil && len(text) > valid && text[valid] == 1
	})
}
