package main

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"testing"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/internal/traffic"
)

// xdpcastIn runs the program inside a host.
func xdpcastIn(ctx context.Context, t *testing.T, h *lab.Host, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	labtest.Do(t, h, func() error {
		code = run(ctx, append([]string{"xdpcast"}, args...), strings.NewReader(""), &out, &errs)
		return nil
	})
	return code, out.String(), errs.String()
}

// cable makes two connected hosts, each with an interface eth0.
func cable(t *testing.T) (tx, rx *lab.Host) {
	t.Helper()
	tx, rx = labtest.Host(t, "gen"), labtest.Host(t, "recv")
	labtest.Connect(t,
		lab.End{Host: tx, Name: "eth0", Addrs: []string{"10.1.0.1/24"}},
		lab.End{Host: rx, Name: "eth0", Addrs: []string{"10.1.0.2/24"}})
	return tx, rx
}

func TestGenUsage(t *testing.T) {
	const to = "239.1.1.1:5000%eth0"
	for _, c := range []struct{ args, want string }{
		{"", `gen: ADDRESS:PORT%INTERFACE missing; see "xdpcast gen --help"`},
		{to + " " + to, `gen: unexpected argument "239.1.1.1:5000%eth0"; see "xdpcast gen --help"`},
		{"239.1.1.1:0%eth0", `gen: endpoint "239.1.1.1:0%eth0": port "0": must be 1 to 65535`},
		{"239.1.1.1:65536%eth0", `gen: endpoint "239.1.1.1:65536%eth0": port "65536": must be 1 to 65535`},
		{"239.1.1.1:5000", `gen: endpoint "239.1.1.1:5000": no interface: must end in %INTERFACE, such as %eth0`},
		{"10.0.0.5@" + to, `gen: endpoint "10.0.0.5@239.1.1.1:5000%eth0": address "10.0.0.5@239.1.1.1": must be an IPv4 or IPv6 address`},
		{"--groups 2 10.1.0.2:5000%eth0", `gen: groups 2 from 10.1.0.2: the address must be multicast`},
		{"--groups 0 " + to, `--groups 0: must be 1 or more`},
		{"--size 39 " + to, `gen: size 39: must be 40 to 65507 bytes of UDP payload`},
		{"--size 65508 " + to, `gen: size 65508: must be 40 to 65507 bytes of UDP payload`},
		{"--rate fast " + to, `gen: rate "fast": must be packets a second such as 100k or 1.5M, bits a second such as 20Mbit or 2.5Gbit, or "max"`},
		{"--ttl 256 " + to, `--ttl: ttl "256": must be 1 to 255`},
		{"--ttl 0 " + to, `--ttl: ttl "0": must be 1 to 255`},
		{"--dscp 64 " + to, `--dscp: dscp "64": must be 0 to 63, or a name such as ef, af41 or cs3`},
		{"--sport 65536 " + to, `--sport: port "65536": must be 1 to 65535`},
		{"--source 239.1.1.1 " + to, `--source: address "239.1.1.1": must be a unicast IPv4 or IPv6 address`},
		{"--source fd00::1 " + to, `gen: source fd00::1 and target 239.1.1.1: must be of one family`},
		{"--batch 2000 " + to, `gen: batch 2000: must be 1 to 1024 packets`},
		{"--duration -1s " + to, `gen: duration -1s: must not be negative`},
		{"--legs " + to + " " + to, `gen: unexpected argument "239.1.1.1:5000%eth0"; see "xdpcast gen --help"`},
		{"--legs 239.1.1.1:5000", `gen: endpoint "239.1.1.1:5000": no interface: must end in %INTERFACE, such as %eth0`},
		{"--legs " + to + "," + to, `gen: leg 239.1.1.1:5000%eth0: given twice`},
		{"--legs 239.1.1.1:1%a,239.1.1.1:2%a,239.1.1.1:3%a,239.1.1.1:4%a,239.1.1.1:5%a", `gen: 5 legs: must be 1 to 4`},
		{"--legs 239.1.1.1:1%a,239.1.1.1:2%a --leg-loss 1%,2%,3%", `gen: loss "1%,2%,3%": must be one value, or one for each of 2 legs`},
		{"--legs 239.1.1.1:1%a,239.1.1.1:2%a --leg-loss 0.01", `gen: loss "0.01": must be from 0% to 100%, such as 1% or 0.5%`},
		{"--legs 239.1.1.1:1%a,239.1.1.1:2%a --leg-delay -1s", `gen: delay "-1s": must be a time such as 20ms`},
		{"--rate max --legs 239.1.1.1:1%a,239.1.1.1:2%a --leg-delay 1s", `gen: leg 239.1.1.1:2%a: delay 1s: must have a rate, not max`},
		{"--leg-loss 1% " + to, `--leg-loss: must have --legs`},
		{"--rtp --field 0:4 " + to, `gen: must have one of --seq, --rtp, --moldudp64 and --field`},
		{"--field 0:5 " + to, `gen: numbers "field:0:5": must have 2, 4 or 8 bytes`},
		{"--moldudp64 --size 61 " + to, `gen: size 61: must be 62 to 65507 bytes of UDP payload`},
		{"-o xml " + to, `--output "xml": want table or json`},
	} {
		var out, errs bytes.Buffer
		code := run(t.Context(), append([]string{"xdpcast", "gen"}, strings.Fields(c.args)...), strings.NewReader(""), &out, &errs)
		if code != exitUsage || !strings.HasSuffix(errs.String(), c.want+"\n") || strings.Count(errs.String(), "\n") != 1 || out.Len() != 0 {
			t.Errorf("gen %s: code %d, stdout %q\n got %swant %s", c.args, code, out.String(), errs.String(), c.want)
		}
	}
}

func TestGenFailure(t *testing.T) {
	tx, _ := cable(t)
	code, out, errs := xdpcastIn(t.Context(), t, tx, "gen", "239.1.1.1:5000%nosuch0")
	want := "xdpcast: gen: send to 239.1.1.1:5000%nosuch0: interface \"nosuch0\": no such interface in this network namespace\n"
	if code != exitFailed || errs != want || out != "" {
		t.Errorf("code %d, stdout %q\n got %swant %s", code, out, errs, want)
	}
}

func TestGenReports(t *testing.T) {
	tx, _ := cable(t)
	args := []string{"gen", "239.1.1.1:5000%eth0", "--count", "300", "--size", "100", "--groups", "3", "--rate", "10k"}
	code, out, errs := xdpcastIn(t.Context(), t, tx, args...)
	if code != exitDone || errs != "" || !strings.HasPrefix(out, "sent 300 packets (30.0 kB) to 3 groups from 239.1.1.1:5000%eth0 in ") {
		t.Errorf("code %d\nstdout %s\nstderr %s", code, out, errs)
	}
	code, out, errs = xdpcastIn(t.Context(), t, tx, append(args, "-o", "json")...)
	var r traffic.SendReport
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	if code != exitDone || errs != "" || r.Packets != 300 || r.Bytes != 30_000 || r.Groups != 3 || r.SizeBytes != 100 || len(r.Stream) != 16 || r.PacketsPerSecond <= 0 {
		t.Errorf("code %d, stderr %s, %+v", code, errs, r)
	}
}

// An interrupt is a normal end, with the summary.
func TestGenInterrupted(t *testing.T) {
	tx, _ := cable(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	code, out, errs := xdpcastIn(ctx, t, tx, "gen", "239.1.1.1:5000%eth0")
	if code != exitDone || errs != "" || !strings.HasPrefix(out, "sent 0 packets (0 B) to 239.1.1.1:5000%eth0 in ") {
		t.Errorf("code %d\nstdout %s\nstderr %s", code, out, errs)
	}
}
