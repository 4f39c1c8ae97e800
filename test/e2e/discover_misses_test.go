package e2e_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"xdpcast/internal/discover"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/packet"
)

// TestDiscoverMisses: packets that arrive faster than discover reads them are counted and reported; the relay
// loses none because of it. discover is stopped for a while, which looks like a process that gets no CPU.
func TestDiscoverMisses(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	in.start()
	in.add("cam1", "239.1.1.1:5000%in0", "239.2.1.1:6000%out0")
	in.waitState("cam1", "active")
	var found discover.Result
	var stdout, stderr safeBuffer
	cmd := exec.Command(program, "discover", "-i", "in0", "--for", "1h", "-o", "json")
	cmd.Env, cmd.Stdout, cmd.Stderr = in.env(), &stdout, &stderr
	if err := in.host.Start(cmd); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill() }()
	index := labtest.Index(t, n.relay, "in0")
	eventually(t, "discover looks", func() string {
		var sockets []byte
		labtest.Do(t, n.relay, func() (err error) { sockets, err = os.ReadFile("/proc/thread-self/net/packet"); return err })
		for line := range strings.Lines(string(sockets)) {
			// sk, users, type, protocol (ETH_P_ALL), interface, running (packet_seq_show of net/packet/af_packet.c)
			if f := strings.Fields(line); len(f) > 5 && f[3] == "0003" && f[4] == fmt.Sprint(index) && f[5] == "1" {
				return ""
			}
		}
		return string(sockets)
	})
	sleeps(t, "it waits for packets", cmd.Process.Pid) // what arrives while it opens its socket does not count
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	source := labtest.NewTap(t, n.source, "src0")
	frame := n.frame(t, "239.9.9.9")
	frame.DstMAC, frame.DstPort, frame.Payload = packet.MulticastMAC(frame.Dst), 5004, make([]byte, 1400)
	taken := n.frame(t, "239.1.1.1")
	taken.DstMAC = packet.MulticastMAC(taken.Dst)
	wire, rule := frame.Build(), taken.Build()
	const sent = 40_000 // the ring has room for half of them
	for i := range sent {
		source.Send(wire)
		if i%100 == 0 {
			source.Send(rule)
		}
	}
	if err := cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	sleeps(t, "it has read what there is", cmd.Process.Pid)
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	if err := cmd.Wait(); err != nil {
		t.Fatalf("discover: %v: %s", err, stderr.String())
	}
	if err := json.Unmarshal([]byte(stdout.String()), &found); err != nil {
		t.Fatal(err)
	}
	var seen uint64
	for _, s := range found.Streams {
		if s.Group == netip.MustParseAddr("239.9.9.9") {
			seen += s.Packets
		}
	}
	const others = 100 // of the hosts' own groups
	if missed := sent - seen; seen == 0 || missed == 0 || found.Missed < missed || found.Missed > missed+others {
		t.Errorf("of %d packets %d were seen, and %d are said to be missed", sent, seen, found.Missed)
	}
	if want := fmt.Sprintf("xdpcast: warning: %d packets came too fast to be captured: rates are too low by these", found.Missed); !strings.Contains(stderr.String(), want) {
		t.Errorf("it says %q, want %q", stderr.String(), want)
	}
	eventually(t, "the rule has all of its packets", func() string {
		if s := in.rule("cam1"); s.Matched.Packets != sent/100 || s.Outputs[0].Sent.Packets != sent/100 {
			return fmt.Sprintf("%+v", s)
		}
		return ""
	})
}

// sleeps waits until none of a process's threads has run, or wanted to, for a while.
func sleeps(t *testing.T, what string, pid int) {
	t.Helper()
	since := time.Now()
	eventually(t, what, func() string {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		if err != nil || len(threads) == 0 {
			t.Fatalf("threads of process %d: %v, %v", pid, threads, err)
		}
		for _, thread := range threads {
			text, err := os.ReadFile(thread) // which may have ended
			if _, state, _ := strings.Cut(string(text), ") "); err == nil && !strings.HasPrefix(state, "S ") {
				since = time.Now()
			}
		}
		if time.Since(since) < 500*time.Millisecond {
			return "it runs"
		}
		return ""
	})
}
