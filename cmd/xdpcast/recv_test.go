package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/internal/traffic"
)

// recvResult is how recv ended.
type recvResult struct {
	code        int
	out, stderr string
}

// startRecv starts recv in a host and returns when it has joined the group.
func startRecv(ctx context.Context, t *testing.T, h *lab.Host, group string, args ...string) <-chan recvResult {
	t.Helper()
	done := make(chan recvResult, 1)
	go func() {
		var out, errs bytes.Buffer
		code := -1
		if err := h.Do(func() error {
			code = run(ctx, append([]string{"xdpcast", "recv"}, args...), strings.NewReader(""), &out, &errs)
			return nil
		}); err != nil {
			errs.WriteString(err.Error())
		}
		done <- recvResult{code, out.String(), errs.String()}
	}()
	for deadline := time.Now().Add(labtest.Timeout); !isMember(t, h, group); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no member of %s", group)
		}
	}
	return done
}

// sendFrom sends from a host. It does without the program, because cli keeps
// its help flag in a variable that two commands in one process must not share.
func sendFrom(t *testing.T, h *lab.Host, to string, cfg traffic.SendConfig) {
	t.Helper()
	var err error
	if cfg.Target, err = traffic.ParseTarget(to); err != nil {
		t.Fatal(err)
	}
	labtest.Do(t, h, func() error {
		_, err := traffic.Send(t.Context(), cfg)
		return err
	})
}

// isMember looks for the group, in hexadecimal as the kernel prints it.
func isMember(t *testing.T, h *lab.Host, group string) bool {
	t.Helper()
	var table []byte
	labtest.Do(t, h, func() (err error) {
		table, err = os.ReadFile("/proc/thread-self/net/igmp")
		return err
	})
	return strings.Contains(string(table), group)
}

// group3 is 239.1.1.3, the last of three groups.
const group3 = "030101EF"

func TestRecvReports(t *testing.T) {
	tx, rx := cable(t)
	done := startRecv(t.Context(), t, rx, group3, "239.1.1.1:5000%eth0", "--groups", "3", "--expect", "100", "--from-start", "--count", "300",
		"--expect-ttl", "8", "--expect-dscp", "af41", "--expect-source", "10.1.0.1", "--expect-sport", "7000", "--strict", "-o", "json")
	sendFrom(t, tx, "239.1.1.1:5000%eth0", traffic.SendConfig{Groups: 3, Size: 1000, Count: 300, Rate: traffic.Rate{Value: 10e3}, TTL: 8, DSCP: 34, SourcePort: 7000})
	got := <-done
	var r traffic.RecvReport
	if err := json.Unmarshal([]byte(got.out), &r); err != nil {
		t.Fatalf("%v in %s", err, got.out)
	}
	if want := (traffic.Counters{Datagrams: 300, Received: 300, Bytes: 300_000}); got.code != exitDone || got.stderr != "" || r.Total != want || len(r.Groups) != 3 {
		t.Errorf("code %d, stderr %s, %+v", got.code, got.stderr, r)
	}
}

func TestRecvStrict(t *testing.T) {
	tx, rx := cable(t)
	for _, strict := range []bool{false, true} {
		args := []string{"239.1.1.3:5000%eth0", "--expect", "150", "--expect-ttl", "9", "--count", "100", "--interval", "1ms"}
		want := recvResult{code: exitDone}
		if strict {
			args = append(args, "--strict")
			want = recvResult{code: exitFailed, stderr: "xdpcast: recv: 50 lost, 100 with a wrong ttl\n"}
		}
		done := startRecv(t.Context(), t, rx, group3, args...)
		sendFrom(t, tx, "239.1.1.3:5000%eth0", traffic.SendConfig{Size: 1000, Count: 100, Rate: traffic.Rate{Value: 1000}, TTL: 8, SourcePort: 7000})
		got := <-done
		if got.code != want.code || got.stderr != want.stderr {
			t.Errorf("strict %v: code %d, stderr %q", strict, got.code, got.stderr)
		}
		for _, line := range []string{
			"ENDPOINT             RECEIVED  LOST  DUPLICATE  REORDERED  STALE  CORRUPT  FOREIGN  SURPLUS  SOCKET DROPS  WRONG FIELDS",
			"239.1.1.3:5000%eth0       100    50          0          0      0        0        0        0             0           100",
			"239.1.1.3:5000%eth0  100       0            0     0  from 10.1.0.1:7000, ttl 8, dscp 0",
		} {
			if !strings.Contains(got.out, "\n"+line+"\n") {
				t.Errorf("no line\n%s\nin\n%s", line, got.out)
			}
		}
		if !strings.Contains(got.out, "received 100 packets (100 kB) in ") {
			t.Errorf("no summary in\n%s", got.out)
		}
		liveLinesAlign(t, got.out)
	}
}

// liveLinesAlign checks that there are live lines, with the bar in one column.
func liveLinesAlign(t *testing.T, out string) {
	t.Helper()
	title, rest, _ := strings.Cut(out, "\n")
	bar := strings.IndexByte(title, '|')
	lines := 0
	for line := range strings.Lines(rest) {
		if i := strings.IndexByte(line, '|'); i >= 0 {
			lines++
			if i != bar || len(line) != len(title)+1 {
				t.Errorf("not aligned\n%s\n%s", title, line)
			}
		}
	}
	if bar < 0 || lines == 0 {
		t.Errorf("no live lines in\n%s", out)
	}
}

// An interrupt is a normal end, with the summary; strict still judges.
func TestRecvInterrupted(t *testing.T) {
	_, rx := cable(t)
	for _, strict := range []bool{false, true} {
		ctx, cancel := context.WithCancel(t.Context())
		args, code, stderr := []string{"239.1.1.3:5000%eth0"}, exitDone, ""
		if strict {
			args, code, stderr = append(args, "--strict"), exitFailed, "xdpcast: recv: nothing received\n"
		}
		done := startRecv(ctx, t, rx, group3, args...)
		cancel()
		got := <-done
		if got.code != code || got.stderr != stderr || !strings.Contains(got.out, "received 0 packets (0 B) in ") {
			t.Errorf("strict %v: %+v", strict, got)
		}
	}
	if isMember(t, rx, group3) {
		t.Error("the membership is left")
	}
}

func TestRecvUsage(t *testing.T) {
	const from = "239.1.1.1:5000%eth0"
	for _, c := range []struct{ args, want string }{
		{"", `recv: [SOURCE@]ADDRESS:PORT%INTERFACE... missing; see "xdpcast recv --help"`},
		{"239.1.1.1:0%eth0", `recv: endpoint "239.1.1.1:0%eth0": port "0": must be 1 to 65535`},
		{"239.1.1.1:5000", `recv: endpoint "239.1.1.1:5000": no interface: must end in %INTERFACE, such as %eth0`},
		{"10.0.0.5@10.1.0.2:5000%eth0", `recv: endpoint "10.0.0.5@10.1.0.2:5000%eth0": source 10.0.0.5 with address 10.1.0.2, which is not multicast: only groups are source-specific`},
		{from + " " + from, `recv: endpoint 239.1.1.1:5000%eth0: given twice`},
		{"--groups 2 10.1.0.2:5000%eth0", `recv: groups 2 from 10.1.0.2: the address must be multicast`},
		{"--groups 0 " + from, `--groups 0: must be 1 or more`},
		{"--window 100 " + from, `recv: window 100: must be a power of two from 64 to 16777216`},
		{"--buffer -5 " + from, `recv: socket buffer -5: must be 1 to 1073741823 bytes`},
		{"--interval -1s " + from, `--interval -1s: must not be negative`},
		{"--idle -1s " + from, `recv: idle -1s: must not be negative`},
		{"--expect-ttl 300 " + from, `--expect-ttl: ttl "300": must be 1 to 255`},
		{"--expect-source x " + from, `--expect-source: address "x": must be a unicast IPv4 or IPv6 address`},
		{"--expect-sport 0 " + from, `--expect-sport: port "0": must be 1 to 65535`},
		{"--expect-dscp best " + from, `--expect-dscp: dscp "best": must be 0 to 63, or a name such as ef, af41 or cs3`},
		{"-o xml " + from, `--output "xml": want table or json`},
	} {
		var out, errs bytes.Buffer
		code := run(t.Context(), append([]string{"xdpcast", "recv"}, strings.Fields(c.args)...), strings.NewReader(""), &out, &errs)
		if code != exitUsage || !strings.HasSuffix(errs.String(), c.want+"\n") || strings.Count(errs.String(), "\n") != 1 || out.Len() != 0 {
			t.Errorf("recv %s: code %d, stdout %q\n got %swant %s", c.args, code, out.String(), errs.String(), c.want)
		}
	}
}

func TestRecvFailure(t *testing.T) {
	_, rx := cable(t)
	code, out, errs := xdpcastIn(t.Context(), t, rx, "recv", "239.1.1.1:5000%nosuch0")
	want := "xdpcast: recv: receive 239.1.1.1:5000%nosuch0: interface \"nosuch0\": no such interface in this network namespace\n"
	if code != exitFailed || errs != want || out != "" {
		t.Errorf("code %d, stdout %q\n got %swant %s", code, out, errs, want)
	}
}

func TestLatencyText(t *testing.T) {
	some := traffic.Latency{Samples: 1}
	for ns, want := range map[int64]string{0: "0ns", 999: "999ns", 1000: "1.0us", 12_345: "12.3us", 1_500_000: "1.5ms", 2e9: "2.0s", -12_345: "-12.3us"} {
		if got := latency(some, ns); got != want {
			t.Errorf("%d: got %s, want %s", ns, got, want)
		}
	}
	if got := latency(traffic.Latency{}, 5); got != "-" {
		t.Errorf("no packet: got %s", got)
	}
}
