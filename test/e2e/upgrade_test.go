package e2e_test

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/internal/relay"
	"xdpcast/internal/traffic"
)

// newFastLeaveNetwork is newNetwork with a snooping bridge between source and relay that ends a
// stream to the relay at the first leave. wire captures what the relay sends there.
func newFastLeaveNetwork(t testing.TB) (n *network, wire *labtest.Tap) {
	t.Helper()
	n = &network{t: t, source: labtest.Host(t, "src"), relay: labtest.Host(t, "relay")}
	sw := labtest.Host(t, "sw")
	labtest.SetBridge(t, sw, unix.NLM_F_CREATE|unix.NLM_F_EXCL, map[int][]byte{
		nl.IFLA_BR_MCAST_SNOOPING:             {1},
		nl.IFLA_BR_MCAST_HASH_MAX:             nl.Uint32Attr(1 << 16),
		nl.IFLA_BR_MCAST_IGMP_VERSION:         {3},
		nl.IFLA_BR_MCAST_QUERY_USE_IFADDR:     {1},
		nl.IFLA_BR_MCAST_QUERY_RESPONSE_INTVL: nl.Uint64Attr(10),
	})
	if err := sw.AddAddr("br0", "10.1.0.254/24"); err != nil {
		t.Fatal(err)
	}
	if err := sw.SetUp("br0", true); err != nil {
		t.Fatal(err)
	}
	labtest.Connect(t, lab.End{Host: n.relay, Name: "in0", Addrs: []string{"10.1.0.1/24"}}, lab.End{Host: sw, Name: "port0"})
	labtest.Connect(t, lab.End{Host: n.source, Name: "src0", Addrs: []string{"10.1.0.2/24"}}, lab.End{Host: sw, Name: "port1"})
	wire = labtest.NewTap(t, sw, "port0")
	for _, port := range []string{"port0", "port1"} {
		labtest.Enslave(t, sw, port)
	}
	if err := sw.Netlink().LinkSetFastLeave(labtest.Link(t, sw, "port0"), true); err != nil {
		t.Fatal(err)
	}
	labtest.SetBridge(t, sw, 0, map[int][]byte{nl.IFLA_BR_MCAST_QUERIER: {1}})
	for i := range n.sinks {
		n.sinks[i] = labtest.Host(t, fmt.Sprintf("sink%d", i))
		n.connectOutput(i)
	}
	return n, wire
}

// leaves are the groups that an Ethernet frame leaves by IGMPv3 (RFC 3376 section 4.2.12): changes to
// include mode, and blocked sources.
func leaves(frame []byte) (groups []netip.Addr) {
	const ip, report, toInclude, block = 14, 0x22, 3, 6
	if len(frame) < ip+20 || binary.BigEndian.Uint16(frame[12:]) != unix.ETH_P_IP || frame[ip+9] != unix.IPPROTO_IGMP {
		return nil
	}
	igmp := frame[ip+int(frame[ip]&15)*4:]
	if igmp[0] != report {
		return nil
	}
	records := igmp[8:]
	for range binary.BigEndian.Uint16(igmp[6:]) {
		if records[0] == toInclude || records[0] == block {
			groups = append(groups, netip.AddrFrom4([4]byte(records[4:8])))
		}
		records = records[8+4*int(binary.BigEndian.Uint16(records[2:])):]
	}
	return groups
}

// left adds and deletes a rule of its own, and returns the groups left before that rule's.
func (in *instance) left(wire *labtest.Tap) (before []netip.Addr) {
	in.t.Helper()
	// Each time another group: the kernel repeats a leave, which may come much later.
	const name, sentinels = "sentinel", "239.1.250."
	in.sentinels++
	group := fmt.Sprint(sentinels, in.sentinels)
	in.add(name, group+":5000%in0", "239.2.250.250:6000%out0")
	if err := in.client.DeleteRule(in.t.Context(), name); err != nil {
		in.t.Fatal(err)
	}
	found := false
	for !found {
		frame := wire.Receive(patience, func(f []byte) bool { return len(leaves(f)) > 0 })
		if frame == nil {
			in.t.Fatal("the leave of the sentinel does not come")
		}
		for _, g := range leaves(frame) {
			if g.String() == group {
				found = true
			} else if !strings.HasPrefix(g.String(), sentinels) {
				before = append(before, g)
			}
		}
	}
	return before
}

// replaceable gives the instance its own binary that can be replaced, and returns its path.
func (in *instance) replaceable() string {
	in.t.Helper()
	path := filepath.Join(in.dir, "xdpcast")
	in.replace(path, program)
	in.program = path
	return path
}

// replace puts a copy of a file at a path by a rename, as package managers do.
func (in *instance) replace(path, from string) {
	in.t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		in.t.Fatal(err)
	}
	labtest.WriteProgram(in.t, path+".new", data)
	if err := os.Rename(path+".new", path); err != nil {
		in.t.Fatal(err)
	}
}

// follow records the process that replaced the instance's daemon.
func (in *instance) follow(before int) (pid int) {
	in.t.Helper()
	pid = in.ready(before)
	process, err := os.FindProcess(pid)
	if err != nil {
		in.t.Fatal(err)
	}
	in.running.process = process
	return pid
}

func (in *instance) status() control.Status {
	in.t.Helper()
	status, err := in.client.Status(in.t.Context())
	if err != nil {
		in.t.Fatal(err)
	}
	return status
}

// TestExecUpgrade replaces a daemon by another binary while a stream flows, on each path, behind a
// bridge with fast leave: no packet is lost or reordered on the paths kernel and fanout, no leave is
// sent, and when the new daemon fails to start the old one continues.
func TestExecUpgrade(t *testing.T) {
	for _, path := range []string{"kernel", "fanout", "afxdp"} {
		t.Run(path, func(t *testing.T) {
			t.Parallel()
			n, wire := newFastLeaveNetwork(t)
			in := newInstance(t, n.relay)
			binary := in.replaceable()
			rules := "rules:\n"
			for i := range 50 {
				rules += fmt.Sprintf("  - {name: r%d, in: 239.1.1.%d:5000%%in0, out: ['239.2.1.%d:6000%%out0'], path: %s}\n", i, i+1, i+1, path)
			}
			in.start("-c", in.write("rules.yaml", rules))
			waitGroups(t, n.relay, 50)
			in.left(wire)
			s := receive(t, n.sinks[0], "239.2.1.1:6000%sink0", traffic.Expected{})
			stream := send(t, n.source, traffic.SendConfig{Target: target(t, "239.1.1.1:5000%src0"), TTL: 16, Rate: traffic.Rate{Value: easy}})
			eventually(t, "the stream comes through", func() string {
				if s.received() == 0 {
					return "it does not yet"
				}
				return ""
			})
			first := in.status().PID

			in.replace(binary, program)
			if text := in.mustCLI("upgrade", "--exec"); !strings.Contains(text, "has taken over in") {
				t.Errorf("it says %q", text)
			} else {
				t.Log(text)
			}
			second := in.follow(first)
			stream.flows(1_000)
			if err := unix.Kill(second, unix.SIGUSR2); err != nil {
				t.Fatal(err)
			}
			third := in.follow(second)
			stream.flows(1_000)

			// Successors that fail to start, or not in time.
			self, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			takes := map[string]string{"kernel": path, "fanout": relay.SuspendFanout, "afxdp": relay.SuspendAFXDP}[path]
			for _, tt := range []struct{ name, text, want string }{
				{"crash", "#!/bin/sh\nexit 3\n", "ended with exit status 3 before it was ready; this daemon continues"},
				{"hang", "#!/bin/sh\nexec sleep 600\n", "was not ready after 1s, and was killed; this daemon continues"},
				{"dies with the path", "#!/bin/sh\n" + takesPath + "=" + path + " exec " + self + "\n", "ended with exit status 3 before it was ready; this daemon continues"},
				{"dies with the sockets", "#!/bin/sh\n" + takesPath + "=" + takes + " exec " + self + "\n", "ended with exit status 3 before it was ready; this daemon continues"},
				{"dies when it is ready", "#!/bin/sh\n" + dies + "=ready exec " + self + "\n", "ended with exit status 3 right after it was ready; this daemon continues"},
				{"no program", "", "ended with exit status 127 before it was ready: xdpcast: start"},
				{"unknown flag", "#!/bin/sh\nexec " + program + " \"$@\" --unknown\n", "ended with exit status 2 before it was ready: xdpcast: flag provided but not defined: -unknown"},
				{"says why", "#!/bin/sh\necho library not found >&2\nexit 3\n", "ended with exit status 3 before it was ready: library not found; this daemon continues"},
			} {
				in.replace(binary, in.script("script", tt.text))
				limit := "50s" // a busy machine takes its time to start a process, and to end one
				if tt.name == "hang" {
					limit = "1s"
				}
				got := in.cli("upgrade", "--exec", "--timeout", limit)
				if got.code != 1 || !strings.Contains(got.stderr, tt.want) {
					t.Errorf("%s: %s", tt.name, got)
				}
				if now := in.status(); now.PID != third || now.Failed+now.Pending != 0 {
					t.Errorf("%s: afterwards %+v", tt.name, now)
				}
				stream.flows(500)
			}
			in.replace(binary, program)
			in.write("rules.yaml", "rules: [{name: broken}]\n")
			if got := in.cli("upgrade", "--exec"); got.code != 1 || !strings.Contains(got.stderr, "before it was ready: ") || !strings.Contains(got.stderr, "rules.yaml") {
				t.Errorf("a broken file of rules: %s", got)
			}
			in.write("rules.yaml", rules)
			in.add("added", "239.1.2.1:5000%in0", "239.2.2.1:6000%out0")

			stream.flows(1_000)
			if got := in.left(wire); len(got) > 0 {
				t.Errorf("groups were left: %v", got)
			}
			sent := stream.stop()
			if path == "kernel" {
				if fault := s.finish(sent); fault != "" {
					t.Error(fault)
				}
				checkCounted(t, in.rule("r0"), sent)
				return
			}
			// On a busy machine a worker may starve and lose packets, replaced or not, and the old daemon resumes the path
			// of a successor that died only when it hears of that.
			s.wait(sent / 2)
			total := s.receiver.Report().Total
			t.Logf("%d packets of %d lost, longest gap %v", sent-total.Received, sent, time.Duration(s.receiver.Report().Groups[0].LongestGapNS))
			if total.Duplicated+total.Foreign > 0 {
				t.Errorf("received %+v, want each packet once", total)
			}
			// Also where it fails, the old one takes its rings back, with the packets in them.
			if got := in.running.log.String(); path == "fanout" && strings.Contains(got, "not inherited") {
				t.Errorf("rings were not inherited:\n%s", got)
			}
			// Where an upgrade fails packets on the kernel path overtake those in a socket's ring:
			// TestExecUpgradeInOrder.
			if path == "fanout" && total.Reordered > 0 {
				t.Errorf("received %+v, want them in order", total)
			}
		})
	}
}

// mayChange checks that a token lets a client change rules, and another one does not.
func mayChange(t *testing.T, h *lab.Host, address, token string) {
	t.Helper()
	for given, want := range map[string]string{token: "404", "x" + token: "403"} {
		labtest.Do(t, h, func() error {
			conn, err := net.Dial("tcp", address)
			if err != nil {
				return err
			}
			defer conn.Close()
			fmt.Fprintf(conn, "DELETE /v1/rules/none HTTP/1.0\r\nHost: localhost\r\nAuthorization: Bearer %s\r\n\r\n", given)
			text, err := io.ReadAll(conn)
			if fields := strings.Fields(string(text)); err != nil || len(fields) < 2 || fields[1] != want {
				return fmt.Errorf("a change with token %s: want %s: %v\n%s", given, want, err, text)
			}
			return nil
		})
	}
}

// TestExecUpgradeOfUser replaces an unprivileged daemon that serves HTTP, by root's command and by a
// signal: each successor has the same user and capabilities, no packet is lost, no group is left, and
// no connection to its port is refused.
func TestExecUpgradeOfUser(t *testing.T) {
	t.Parallel()
	n, wire := newFastLeaveNetwork(t)
	in := newInstance(t, n.relay)
	binary := in.replaceable()
	rules := in.write("rules.yaml", "rules:\n  - {name: one, in: 239.1.1.1:5000%in0, out: ['239.2.1.1:6000%out0'], path: kernel}\n  - {name: two, in: 239.1.1.2:5000%in0, out: ['239.2.1.2:6000%out0'], path: fanout}\n")
	// Root alone may read the token: the first daemon passes it on.
	token := in.write("token", "0123456789abcdef\n")
	if err := os.Chmod(token, 0o600); err != nil {
		t.Fatal(err)
	}
	d := in.start("--user", "nobody", "-c", rules, "--listen", "127.0.0.1:80", "--token-file", token)
	waitGroups(t, n.relay, 2)
	in.left(wire)
	s := receive(t, n.sinks[0], "239.2.1.1:6000%sink0", traffic.Expected{})
	stream := send(t, n.source, traffic.SendConfig{Target: target(t, "239.1.1.1:5000%src0"), TTL: 16, Rate: traffic.Rate{Value: easy}})
	asked := askHTTP(t, n.relay, "127.0.0.1:80")
	stream.flows(500)

	pid := d.cmd.Process.Pid
	for _, how := range []func(){
		func() { in.mustCLI("upgrade", "--exec") },
		func() {
			if err := unix.Kill(pid, unix.SIGUSR2); err != nil {
				t.Fatal(err)
			}
		},
		func() { in.mustCLI("upgrade", "--exec") },
	} {
		in.replace(binary, program)
		how()
		pid = in.follow(pid)
		unprivileged(t, pid)
		stream.flows(500)
		asked.more()
		mayChange(t, n.relay, "127.0.0.1:80", "0123456789abcdef")
	}
	// A successor that fails to start changes none of this.
	in.replace(binary, in.script("script", "#!/bin/sh\nexit 3\n"))
	if got := in.cli("upgrade", "--exec"); got.code != 1 || !strings.Contains(got.stderr, "this daemon continues") {
		t.Errorf("a binary that ends: %s", got)
	}
	unprivileged(t, pid)
	asked.more()
	for _, name := range []string{"one", "two"} {
		in.waitState(name, control.StateActive)
	}
	in.add("added", "239.1.2.1:5000%in0", "239.2.2.1:6000%out0")
	if got := in.left(wire); len(got) > 0 {
		t.Errorf("groups were left: %v", got)
	}
	asked.stop()
	if fault := s.finish(stream.stop()); fault != "" {
		t.Error(fault)
	}
	if got := d.log.String(); strings.Count(got, "msg=\"taken over\"") != 3 || strings.Contains(got, "is of no use") {
		t.Errorf("the daemons' log:\n%s", got)
	}
}

// asking asks a daemon over HTTP whether it is healthy, each time over a new connection.
type asking struct {
	t       *testing.T
	answers atomic.Uint64
	end     chan struct{}
	done    sync.WaitGroup
}

func askHTTP(t *testing.T, host *lab.Host, addr string) *asking {
	t.Helper()
	a := &asking{t: t, end: make(chan struct{})}
	a.done.Go(func() {
		// A socket belongs to the network namespace of its thread.
		err := host.Do(func() error {
			for {
				select {
				case <-a.end:
					return nil
				default:
				}
				if err := askOnce(addr); err != nil {
					return err
				}
				a.answers.Add(1)
			}
		})
		if err != nil {
			t.Errorf("after %d answers: %v", a.answers.Load(), err)
		}
	})
	t.Cleanup(a.stop)
	return a
}

func askOnce(addr string) error {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := io.WriteString(conn, "GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n"); err != nil {
		return err
	}
	text, err := io.ReadAll(conn)
	if err != nil || !strings.HasPrefix(string(text), "HTTP/1.0 200") {
		return fmt.Errorf("%q, %v", text, err)
	}
	return nil
}

// more waits for further answers.
func (a *asking) more() {
	a.t.Helper()
	before := a.answers.Load()
	eventually(a.t, "the daemon answers over HTTP", func() string {
		if a.answers.Load() < before+5 && !a.t.Failed() {
			return "it does not"
		}
		return ""
	})
}

func (a *asking) stop() {
	select {
	case <-a.end:
	default:
		close(a.end)
	}
	a.done.Wait()
}

// TestHold runs a daemon under "xdpcast hold" behind a bridge with fast leave, and kills and replaces it
// while a stream flows: no packet is lost, and no leave is sent.
func TestHold(t *testing.T) {
	t.Parallel()
	n, wire := newFastLeaveNetwork(t)
	in := newInstance(t, n.relay)
	binary := in.replaceable()
	rules := "rules:\n"
	for i := range 50 {
		rules += fmt.Sprintf("  - {name: r%d, in: 239.1.1.%d:5000%%in0, out: ['239.2.1.%d:6000%%out0']}\n", i, i+1, i+1)
	}
	file := in.write("rules.yaml", "rules: [{name: broken}]\n")
	d := in.startCommand("hold", "--run-dir", in.runDir, "--", binary, "run", "-c", file)
	<-d.exited
	if code := d.cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(d.log.String(), "in missing") {
		t.Errorf("a daemon that cannot start: exit code %d\n%s", code, d.log.String())
	}
	in.write("rules.yaml", rules)
	d = in.startCommand("hold", "--run-dir", in.runDir, "--", binary, "run", "-c", file)
	in.running = d
	pid := in.ready(0)
	waitGroups(t, n.relay, 50)
	in.left(wire)
	s := receive(t, n.sinks[0], "239.2.1.1:6000%sink0", traffic.Expected{})
	stream := send(t, n.source, traffic.SendConfig{Target: target(t, "239.1.1.1:5000%src0"), TTL: 16, Rate: traffic.Rate{Value: easy}})
	stream.flows(500)
	kill := func(sig unix.Signal) {
		t.Helper()
		if err := unix.Kill(pid, sig); err != nil {
			t.Fatal(err)
		}
		pid = in.ready(pid)
		stream.flows(500)
	}
	kill(unix.SIGKILL)
	kill(unix.SIGTERM)
	in.mustCLI("upgrade", "--exec")
	pid = in.ready(pid)
	kill(unix.SIGKILL) // the one not started by the holder
	d.signal(unix.SIGUSR2)
	pid = in.ready(pid)
	// A build that dies as soon as it has taken over is started again, until it is replaced.
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, when := range []string{"ready", "followed"} {
		script := in.write("script", "#!/bin/sh\n"+dies+"="+when+" exec "+self+"\n")
		if err := os.Chmod(script, 0o755); err != nil {
			t.Fatal(err)
		}
		in.replace(binary, script)
		in.cli("upgrade", "--exec") // whose outcome depends on how soon the old daemon ends
		stream.flows(500)
		in.replace(binary, program)
		pid = in.ready(pid)
		stream.flows(500)
	}
	in.add("added", "239.1.2.1:5000%in0", "239.2.2.1:6000%out0")
	kill(unix.SIGKILL)
	if got := d.log.String(); strings.Count(got, `"joined anew"=0`) < 5 {
		t.Error("groups were joined anew")
	}
	if got := in.left(wire); len(got) > 0 {
		t.Errorf("groups were left: %v", got)
	}
	if fault := s.finish(stream.stop()); fault != "" {
		t.Error(fault)
	}

	// Without its holder the daemon ends, which makes room for the next.
	if code := d.stop(unix.SIGKILL); code != -1 {
		t.Errorf("the holder ended with code %d", code)
	}
	eventually(t, "the daemon ends", func() string {
		if runs(pid) {
			return "it runs"
		}
		return ""
	})
	d = in.startCommand("hold", "--run-dir", in.runDir, "--", binary, "run", "-c", file)
	in.running = d
	in.ready(pid)
	if code := d.stop(unix.SIGTERM); code != 0 {
		t.Errorf("the holder ended with code %d:\n%s", code, d.log.String())
	}
	n.waitJoined("in0", "239.1.1.1", false)
}

// ready waits until a process other than before is ready, and returns its id.
func (in *instance) ready(before int) (pid int) {
	in.t.Helper()
	eventually(in.t, "another process is ready", func() string {
		status, err := in.client.Status(in.t.Context())
		if err != nil {
			return err.Error()
		}
		if pid = status.PID; pid == before || !status.Ready {
			return fmt.Sprintf("process %d: ready is %v", pid, status.Ready)
		}
		return ""
	})
	return pid
}

// TestManyGroupsHandedOver replaces, and kills, a daemon that holds 20 groups per socket: every socket passes
// to the next one, and no group is left or joined again.
func TestManyGroupsHandedOver(t *testing.T) {
	groups := labtest.Soak(2_000, 10_000)
	n, wire := newFastLeaveNetwork(t)
	in := newInstance(t, n.relay)
	in.replaceable()
	var rules strings.Builder
	rules.WriteString("rules:\n")
	for i := range groups {
		fmt.Fprintf(&rules, "  - {name: r%d, in: '239.2.%d.%d:5000%%in0', out: ['239.3.1.1:6000%%out0']}\n", i, i>>8, i&255)
	}
	d := in.startCommand("hold", "--run-dir", in.runDir, "--", in.program, "run", "-c", in.write("rules.yaml", rules.String()))
	in.running = d
	pid := in.ready(0)
	in.left(wire)
	took := func(what string, start time.Time) {
		t.Helper()
		t.Logf("%s: %d groups are held by the next daemon after %v", what, groups, time.Since(start).Round(time.Millisecond))
		want := fmt.Sprintf(`memberships=%d sockets=%d "joined anew"=0`, groups, (groups+19)/20)
		if got := d.log.String(); !strings.Contains(got[strings.LastIndex(got, "memberships taken over"):], want) {
			t.Errorf("%s: want %s", what, want)
		}
	}
	at := time.Now()
	in.mustCLI("upgrade", "--exec")
	pid = in.ready(pid)
	took("upgrade", at)
	at = time.Now()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	in.ready(pid)
	took("kill -9", at)
	if got := in.left(wire); len(got) > 0 {
		t.Errorf("%d groups were left, such as %v", len(got), got[0])
	}
	if joined := len(igmp(t, n.relay)["in0"]); joined != groups {
		t.Errorf("%d groups are joined, want %d", joined, groups)
	}
}

// waitGroups waits until a relay has joined this many groups on in0.
func waitGroups(t testing.TB, relay *lab.Host, groups int) {
	t.Helper()
	eventually(t, "the groups are joined", func() string {
		if got := len(igmp(t, relay)["in0"]); got != groups {
			return fmt.Sprintf("%d are, want %d", got, groups)
		}
		return ""
	})
}

// TestReplacedState starts a daemon over damaged pinned state, and over that of a newer release: it
// activates its rules, and status reports for how long packets were not relayed.
func TestReplacedState(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	in.start()
	in.add("one", oneIn, oneOut)
	for _, c := range []struct {
		name, why string
		damage    func() error
	}{
		{"damaged", "pin " + in.pinDir + "/outputs is missing", func() error { return os.Remove(filepath.Join(in.pinDir, "outputs")) }},
		{"newer", "it has 1000, this xdpcast has ", func() error {
			m, err := ebpf.LoadPinnedMap(filepath.Join(in.pinDir, "config"), nil)
			if err != nil {
				return err
			}
			defer m.Close()
			config, err := m.LookupBytes(uint32(0))
			if err != nil {
				return err
			}
			binary.NativeEndian.PutUint32(config, 1000)
			return m.Put(uint32(0), config)
		}},
	} {
		in.running.stop(unix.SIGKILL)
		if err := c.damage(); err != nil {
			t.Fatal(err)
		}
		if got := in.cli("upgrade"); got.code != 1 || !strings.Contains(got.stderr, c.why) || !strings.Contains(got.stderr, `"xdpcast unload --all --pin-dir `+in.pinDir+`" removes it`) {
			t.Errorf("%s: upgrade: %s", c.name, got)
		}
		s := receive(t, n.sinks[0], "239.2.1.1:6000%sink0", traffic.Expected{})
		stream := send(t, n.source, traffic.SendConfig{Target: target(t, streamTarget), TTL: 16, Rate: traffic.Rate{Value: easy}})
		in.start()
		in.waitState("one", control.StateActive)
		stream.flows(1_000)
		sent := stream.stop()
		if got := in.mustCLI("status"); !strings.Contains(got, "pinned state was replaced: counters restarted at 0, and the streams of the kernel path were interrupted for ") || !strings.Contains(got, c.why) {
			t.Errorf("%s: status says\n%s", c.name, got)
		}
		// Some pass unrelayed in the grace period of the change, which a busy machine prolongs.
		s.wait(sent / 2)
		if total := s.receiver.Report().Total; total.Duplicated+total.Foreign+total.Reordered > 0 {
			t.Errorf("%s: received %+v of %d", c.name, total, sent)
		} else {
			t.Logf("%s: %d of %d packets lost", c.name, sent-total.Received, sent)
		}
	}
}
