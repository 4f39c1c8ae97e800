package e2e_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"xdpcast/internal/labtest"
	"xdpcast/internal/traffic"
	"xdpcast/pkg/packet"
)

// recording is a running "xdpcast tap".
type recording struct {
	t      testing.TB
	in     *instance
	cmd    *exec.Cmd
	file   string
	stderr safeBuffer
	ended  bool
}

// record starts a tap, and returns once it records.
func (in *instance) record(args ...string) *recording {
	in.t.Helper()
	r := &recording{t: in.t, in: in, file: filepath.Join(in.dir, fmt.Sprintf("tap%d.pcapng", time.Now().UnixNano()))}
	r.cmd = exec.Command(program, append(append([]string{"tap"}, args...), "-w", r.file)...)
	r.cmd.Env, r.cmd.Stderr = in.env(), &r.stderr
	if err := in.host.Start(r.cmd); err != nil {
		in.t.Fatal(err)
	}
	in.t.Cleanup(func() {
		if !r.ended {
			_ = r.cmd.Process.Kill()
			_ = r.cmd.Wait()
		}
	})
	eventually(in.t, "the tap begins", func() string {
		if info, err := os.Stat(r.file); err != nil || info.Size() == 0 {
			if said := r.stderr.String(); said != "" {
				in.t.Fatalf("tap: %s", said)
			}
			return "there is no file"
		}
		return ""
	})
	return r
}

// wait waits for the end of a tap, and returns its output.
func (r *recording) wait() string {
	r.t.Helper()
	r.ended = true
	timer := time.AfterFunc(patience, func() { _ = r.cmd.Process.Kill() })
	defer timer.Stop()
	if err := r.cmd.Wait(); err != nil {
		r.t.Fatalf("tap: %v\n%s", err, r.stderr.String())
	}
	return r.stderr.String()
}

// stop interrupts a tap.
func (r *recording) stop() string {
	r.t.Helper()
	if err := r.cmd.Process.Signal(syscall.SIGINT); err != nil {
		r.t.Fatal(err)
	}
	return r.wait()
}

// recorded is a packet from a file.
type recorded struct {
	ifname, comment string // comments are joined by |
	out             bool
	bytes           []byte
	length          int
	time            string // seconds, with a decimal point
}

// packets reads the file according to draft-ietf-opsawg-pcapng, without the code that wrote it;
// TestTapForTshark checks it against tshark.
func (r *recording) packets() (all []recorded) {
	r.t.Helper()
	data, err := os.ReadFile(r.file)
	if err != nil {
		r.t.Fatal(err)
	}
	u32 := binary.LittleEndian.Uint32
	var names []string
	for len(data) >= 12 {
		n := int(u32(data[4:]))
		if n < 12 || n > len(data) || n%4 != 0 || int(u32(data[n-4:])) != n {
			r.t.Fatalf("a block of %d bytes where there are %d", n, len(data))
		}
		kind, body := u32(data), data[8:n-4]
		data = data[n:]
		switch kind {
		case 1: // interface
			options := optionsOf(body[8:])
			if string(options[9]) != "\x09" {
				r.t.Errorf("if_tsresol %q: want nanoseconds", options[9])
			}
			names = append(names, string(options[2]))
		case 6: // packet
			captured := int(u32(body[12:]))
			options := optionsOf(body[20+(captured+3)&^3:])
			ns := uint64(u32(body[4:]))<<32 | uint64(u32(body[8:]))
			all = append(all, recorded{
				ifname: names[u32(body)], comment: string(options[1]), out: u32(options[2])&3 == 2, bytes: body[20 : 20+captured],
				length: int(u32(body[16:])), time: fmt.Sprintf("%d.%09d", ns/1e9, ns%1e9),
			})
		}
	}
	if len(data) != 0 {
		r.t.Errorf("%d bytes behind the last block", len(data))
	}
	return all
}

// optionsOf reads options; repeated ones are joined.
func optionsOf(data []byte) map[uint16][]byte {
	all := map[uint16][]byte{}
	for len(data) >= 4 {
		code, n := binary.LittleEndian.Uint16(data), int(binary.LittleEndian.Uint16(data[2:]))
		if code == 0 {
			break
		}
		if all[code] != nil {
			all[code] = append(slices.Clip(all[code]), '|')
		}
		all[code] = append(slices.Clip(all[code]), data[4:4+n]...)
		data = data[4+(n+3)&^3:]
	}
	return all
}

// byTshark reads the file with tshark.
func (r *recording) byTshark() (all []recorded) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	tshark := func(args ...string) []byte {
		var stderr bytes.Buffer
		cmd := exec.CommandContext(ctx, "tshark", append([]string{"-r", r.file}, args...)...)
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			r.t.Fatalf("%v: %v\n%s", cmd, err, stderr.String())
		}
		return out
	}
	for line := range strings.Lines(string(tshark("-T", "fields", "-E", "separator=/t", "-E", "aggregator=|",
		"-e", "frame.interface_name", "-e", "frame.packet_flags_direction", "-e", "frame.comment", "-e", "frame.len", "-e", "frame.time_epoch"))) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		if len(f) != 5 {
			r.t.Fatalf("tshark says %q", line)
		}
		direction, err := strconv.ParseUint(strings.TrimPrefix(f[1], "0x"), 16, 32)
		length, lengthErr := strconv.Atoi(f[3])
		if err != nil || lengthErr != nil {
			r.t.Fatalf("tshark says %q", line)
		}
		all = append(all, recorded{ifname: f[0], out: direction == 2, comment: f[2], length: length, time: f[4]})
	}
	lines, at := strings.Split(string(tshark("-T", "jsonraw")), "\n"), 0
	for i, line := range lines {
		if !strings.Contains(line, `"frame_raw": [`) {
			continue
		}
		text := strings.Trim(strings.TrimSpace(lines[i+1]), `",`)
		b, err := hex.DecodeString(text)
		if err != nil || at >= len(all) {
			r.t.Fatalf("tshark says %q", text)
		}
		all[at].bytes = b
		at++
	}
	return all
}

func (p recorded) String() string {
	return fmt.Sprintf("%s out=%v %q at %s %d bytes %x", p.ifname, p.out, p.comment, p.time, p.length, p.bytes)
}

// TestTap: what is recorded is, byte for byte, what the network sees on both sides, on every path.
func TestTap(t *testing.T) {
	t.Parallel()
	for _, path := range paths {
		t.Run(path, func(t *testing.T) {
			t.Parallel()
			if path == "kernel" {
				labtest.NeedsKernel(t, traces(t), "tracing of BPF programs", "6.0; some refuse it to everybody")
			}
			n := newNetwork(t)
			in := newInstance(t, n.relay)
			in.start()
			for _, c := range tapCases {
				t.Run(c.name, func(t *testing.T) { c.run(t, n, in, path) })
			}
		})
	}
}

type tapCase struct {
	name  string
	input string
	out   []string
	frame func(f *packet.Frame)
	// dropped are the comments of copies that are not sent, by slot, "" for copies that are.
	dropped []string
	// whole is the reason why no output gets it.
	whole string
	// tshark says to read the file with tshark as well.
	tshark bool
}

var tapCases = []tapCase{
	{name: "one", out: []string{"239.2.1.1:6000%out0,ttl=9"}, dropped: []string{""}},
	{name: "tagged", out: []string{"239.2.1.1:6000%out0,vlan=7"}, dropped: []string{""}},
	{name: "untagged", input: "239.1.1.1:5000%in0,vlan=5", frame: func(f *packet.Frame) { f.VLANs = []uint16{5} }, out: []string{"239.2.1.1:6000%out0,vlan=pop"}, dropped: []string{""}},
	{name: "several", tshark: true, out: []string{"239.2.1.1:6000%out0", "239.2.1.2:6001%out1,src=keep", "239.2.1.3:6002%out0,ttl=3"}, dropped: []string{"", "", ""}},
	{name: "long", frame: func(f *packet.Frame) { f.Payload = bytes.Repeat([]byte("long "), 280) }, out: []string{"239.2.1.1:6000%out0", "239.2.1.2:6001%out1"}, dropped: []string{"", ""}},
	{name: "ttl of one", frame: func(f *packet.Frame) { f.TTL = 1 }, out: []string{"239.2.1.1:6000%out0,ttl=dec"}, dropped: []string{"ttl"}},
	{name: "ttl of several", frame: func(f *packet.Frame) { f.TTL = 1 }, out: []string{"239.2.1.1:6000%out0", "239.2.1.2:6001%out1,ttl=dec"}, dropped: []string{"", "ttl"}},
	{name: "not ready", out: []string{"239.2.1.1:6000%out0", "239.2.1.2:6001%absent0"}, dropped: []string{"", "not_ready"}},
	{name: "own source", frame: func(f *packet.Frame) { f.Src = netip.MustParseAddr("10.1.0.1") }, out: []string{"239.2.1.1:6000%out0", "239.2.1.2:6001%out1"}, whole: "loop"},
}

func (c tapCase) run(t *testing.T, n *network, in *instance, path string) {
	const rule = "tapped"
	input := c.input
	if input == "" {
		input = "239.1.1.1:5000%in0"
	}
	args := []string{"rule", "add", rule, "--path", path, "--in", input}
	for _, o := range c.out {
		args = append(args, "--out", o)
	}
	in.mustCLI(args...)
	defer in.mustCLI("rule", "del", rule)
	frame := n.frame(t, "239.1.1.1")
	frame.DstMAC = packet.MulticastMAC(frame.Dst)
	if c.frame != nil {
		c.frame(&frame)
	}
	sent := 0
	for _, d := range c.dropped {
		if d == "" {
			sent++
		}
	}
	source := labtest.NewTap(t, n.source, "src0")
	taps := map[string]*labtest.Tap{"out0": labtest.NewTap(t, n.sinks[0], "sink0"), "out1": labtest.NewTap(t, n.sinks[1], "sink0")}
	r := in.record(rule)
	if path == "kernel" && in.tapPrograms() == 0 {
		t.Error("the daemon holds no program of the tap")
	}
	wire := frame.Build()
	source.Send(wire)
	eventually(t, "all is counted", func() string {
		s := in.rule(rule)
		n := uint64(0)
		for _, d := range s.Drops {
			n += d.Packets * uint64(len(s.Outputs))
		}
		for _, o := range s.Outputs {
			n += o.Sent.Packets
			for _, d := range o.Drops {
				n += d.Packets
			}
		}
		if n != uint64(len(c.out)) {
			return fmt.Sprintf("%+v", s)
		}
		return ""
	})
	said := r.stop()
	got := r.packets()
	if !strings.Contains(said, "0 packets lost by the tap") {
		t.Errorf("it says %q", said)
	}

	// The packet that arrived.
	at := slices.IndexFunc(got, func(p recorded) bool { return strings.HasPrefix(p.comment, "rule tapped, in") })
	if at < 0 {
		if c.whole != "" && path == "afxdp" && !traces(t) {
			return // the relay program has dropped it
		}
		t.Fatalf("nothing has come in: %v", got)
	}
	if path == "afxdp" && !traces(t) {
		clear(wire[:12]) // with only the workers tapped, the MAC addresses are no longer known
	}
	if p := got[at]; p.out || p.ifname != "in0" || !bytes.Equal(p.bytes, wire) {
		t.Errorf("in: %v\nwant %x", p, wire)
	}
	if c.whole != "" && got[at].comment != "rule tapped, in|dropped: "+c.whole {
		t.Errorf("in: %v, want dropped: %s", got[at], c.whole)
	}
	// The copies sent.
	for ifname, tap := range taps {
		var want [][]byte
		for slot, d := range c.dropped {
			if d == "" && outputInterface(c.out[slot]) == ifname {
				want = append(want, nil)
			}
		}
		if len(want) > 0 {
			want = tap.Collect(len(want), isUDP)
		}
		for _, p := range got {
			if !p.out || p.ifname != ifname || !strings.HasSuffix(p.comment, ", out") {
				continue
			}
			i := slices.IndexFunc(want, func(b []byte) bool { return bytes.Equal(b, p.bytes) })
			if i < 0 {
				t.Errorf("%v: no such packet came out", p)
				continue
			}
			want = slices.Delete(want, i, i+1)
			sent--
		}
	}
	if sent != 0 {
		t.Errorf("%d packets went out that were not recorded: %v", sent, got)
	}
	for slot, reason := range c.dropped {
		text := fmt.Sprintf("slot %d dropped: %s", slot, reason)
		if told := slices.ContainsFunc(got, func(p recorded) bool { return strings.Contains(p.comment, text) }); told != (reason != "") {
			t.Errorf("%s: %v: %v", text, told, got)
		}
	}
	now := float64(time.Now().UnixNano()) / 1e9
	for _, p := range got {
		if at, err := strconv.ParseFloat(p.time, 64); err != nil || at > now+1 || at < now-patience.Seconds() {
			t.Errorf("time %s: it is %f", p.time, now)
		}
	}
	if _, err := exec.LookPath("tshark"); c.tshark && err == nil {
		if read := r.byTshark(); fmt.Sprint(read) != fmt.Sprint(got) {
			t.Errorf("tshark reads %v\nwritten is %v", read, got)
		}
	}
}

// traces says whether the kernel allows tracing of its functions, and so of BPF programs, with BPF:
// some kernels are built without code patching. It finds out by trying, without the code under test.
func traces(t testing.TB) bool {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.Tracing, AttachType: ebpf.AttachTraceFEntry, AttachTo: "netif_receive_skb", License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		t.Logf("tracing: %v", err)
		return false
	}
	p.Close()
	return true
}

// tapPrograms counts the tracing programs of taps that the daemon holds.
func (in *instance) tapPrograms() (n int) {
	in.t.Helper()
	descriptors, err := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", in.running.cmd.Process.Pid))
	if err != nil {
		in.t.Fatal(err)
	}
	for _, d := range descriptors {
		// One that has been closed meanwhile has none. The number is that of BPF_PROG_TYPE_TRACING.
		if text, err := os.ReadFile(d); err == nil && strings.Contains(string(text), "prog_type:\t26\n") {
			n++
		}
	}
	return n
}

// TestTapLosesNothing: a tapped stream leaves complete, and every packet of it is recorded or counted as lost by the
// tap, on each path: 100,000 packets per second, in the short form 10,000 in user space. An emulated machine has too
// little CPU for that: its receive queues and its receivers' sockets overflow.
func TestTapLosesNothing(t *testing.T) {
	for _, path := range paths {
		t.Run(path, func(t *testing.T) {
			if path == "kernel" {
				labtest.NeedsKernel(t, traces(t), "tracing of BPF programs", "6.0; some refuse it to everybody")
			}
			n := newNetwork(t)
			in := newInstance(t, n.relay)
			in.start()
			in.mustCLI("rule", "add", "tapped", "--path", path, "--in", "239.1.1.1:5000%in0", "--out", "239.2.1.1:6000%out0", "--out", "239.2.1.2:6000%out1")
			in.waitState("tapped", "active")
			rate := 100_000
			switch {
			case labtest.Emulated():
				rate = easy
			case path != "kernel":
				rate = labtest.Soak(10_000, 100_000) // an AF_XDP socket's ring holds 10 ms of the higher rate
			}
			count := uint64(rate)
			sinks := []*sink{
				receive(t, n.sinks[0], "239.2.1.1:6000%sink0", traffic.Expected{}), receive(t, n.sinks[1], "239.2.1.2:6000%sink0", traffic.Expected{}),
			}
			r := in.record("tapped", "--snap", "128")
			packets := send(t, n.source, traffic.SendConfig{Target: target(t, "239.1.1.1:5000%src0"), Count: count, TTL: 16, Rate: traffic.Rate{Value: float64(rate)}}).wait()
			for _, s := range sinks {
				if labtest.Emulated() && s.overflows(packets) {
					continue
				}
				if fault := s.finish(packets); fault != "" {
					t.Errorf("at %d packets a second: %s", rate, fault)
				}
			}
			r.accounted(3*packets, 128)
		})
	}
}

// overflows waits until this many packets have arrived, or no more arrive, and says whether the missing ones reached
// the receiver, whose socket was full.
func (s *sink) overflows(packets uint64) bool {
	const quiet = 10 * time.Second
	for last, since := s.received(), time.Now(); last < packets; time.Sleep(50 * time.Millisecond) {
		if now := s.received(); now != last {
			last, since = now, time.Now()
		} else if time.Since(since) > quiet {
			c := s.receiver.Report().Total
			return c.Received+c.SocketDrops == packets && c.Duplicated == 0
		}
	}
	return false
}

// accounted requires these packets to be recorded or counted as lost by the tap, none longer than snap.
func (r *recording) accounted(packets uint64, snap int) {
	r.t.Helper()
	said := r.stop()
	var recorded, lost uint64
	if _, err := fmt.Sscanf(said, "xdpcast: %d packets of rule tapped recorded, %d packets lost by the tap", &recorded, &lost); err != nil {
		r.t.Fatalf("%q: %v", said, err)
	}
	all := r.packets()
	if recorded+lost != packets || uint64(len(all)) != recorded {
		r.t.Errorf("%d packets recorded, %d in the file, %d lost: want %d together", recorded, len(all), lost, packets)
	}
	for _, p := range all {
		if len(p.bytes) > snap || p.length < len(p.bytes) {
			r.t.Fatalf("%d of %d bytes", len(p.bytes), p.length)
		}
	}
	r.t.Logf("of %d packets in and out, %d were recorded, and %d lost by the tap", packets, recorded, lost)
}

// TestTapEnds: however a tap ends, nothing of it stays, and one that cannot start changes nothing.
func TestTapEnds(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	daemon := in.start()
	in.mustCLI("rule", "add", "tapped", "--path", "fanout", "--in", "239.1.1.1:5000%in0", "--out", "239.2.1.1:6000%out0")
	in.waitState("tapped", "active")
	ended := 0
	gone := func(t *testing.T) {
		t.Helper()
		ended++
		daemon.waitLog(`msg="tap has ended"`, ended)
	}
	// At its packet count.
	source := labtest.NewTap(t, n.source, "src0")
	frame := n.frame(t, "239.1.1.1")
	frame.DstMAC = packet.MulticastMAC(frame.Dst)
	r := in.record("tapped", "--in", "--count", "2")
	for range 3 {
		source.Send(frame.Build())
	}
	if said := r.wait(); !strings.Contains(said, "2 packets of rule tapped recorded") || len(r.packets()) != 2 {
		t.Errorf("%q: %v", said, r.packets())
	}
	gone(t)
	// When its reader closes, even if no packet arrives.
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr safeBuffer
	cmd := exec.Command(program, "tap", "tapped", "-w", "-")
	cmd.Env, cmd.Stdout, cmd.Stderr = in.env(), writer, &stderr
	if err := in.host.Start(cmd); err != nil {
		t.Fatal(err)
	}
	closeAll(t, writer)
	head := make([]byte, 4)
	if _, err := reader.Read(head); err != nil || !bytes.Equal(head, []byte{0x0a, 0x0d, 0x0d, 0x0a}) {
		t.Fatalf("it begins with %x: %v", head, err)
	}
	closeAll(t, reader)
	if err := cmd.Wait(); err != nil && !strings.Contains(err.Error(), "broken pipe") {
		t.Errorf("%v: %s", err, stderr.String())
	}
	gone(t)
	// Killed.
	r = in.record("tapped")
	if err := r.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	gone(t)
	// Taps that cannot start.
	file := filepath.Join(in.dir, "none.pcapng")
	for _, c := range []struct {
		args []string
		code int
		line string
	}{
		{[]string{"tapped"}, 2, "-w missing: want the file to write, or - for standard output"},
		{[]string{"-w", file}, 2, `xdpcast tap: RULE missing; see "xdpcast tap --help"`},
		{[]string{"none", "-w", file}, 1, "no rule is named none"},
		{[]string{"tapped", "--out", "1", "-w", file}, 1, "rule tapped has no slot 1: want 0 to 0"},
		{[]string{"tapped", "--out", "64", "-w", file}, 2, `--out "64": want the number of a slot, or all`},
		{[]string{"tapped", "--in=false", "-w", file}, 2, "nothing to record: want --in, --out or --dropped, or none of them for all"},
		{[]string{"tapped", "--sample", "100", "-w", file}, 2, `--sample "100": want 1/N, such as 1/100`},
		{[]string{"tapped", "--sample", "1/0", "-w", file}, 2, `--sample "1/0": want 1/N, such as 1/100`},
		{[]string{"tapped", "--snap", "0", "-w", file}, 2, "--snap 0: want 1 to 61440 bytes"},
	} {
		got := in.cli(append([]string{"tap"}, c.args...)...)
		if got.code != c.code || !strings.Contains(got.stderr, c.line) {
			t.Errorf("tap %v: %s\nwant code %d and %q", c.args, got, c.code, c.line)
		}
	}
	if _, err := os.Stat(file); !os.IsNotExist(err) {
		t.Errorf("a tap that did not begin has left a file: %v", err)
	}
	// A user with read access only may not tap.
	got := in.cliAs(&syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}, "tap", "tapped", "-w", "/dev/null")
	if got.code != 1 || got.stderr == "" {
		t.Errorf("as nobody: %s", got)
	}
	if traces(t) {
		eventually(t, "no program of a tap is left", func() string {
			if n := in.tapPrograms(); n > 0 {
				return fmt.Sprint(n)
			}
			return ""
		})
	}
}

// TestTapToTshark: the guide's command, which shows the TTL of a packet that was dropped for it.
func TestTapToTshark(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("tshark"); err != nil {
		labtest.Lacking(t, "tshark is not installed: scripts/setup --test installs it")
	}
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	in.start()
	path := "fanout"
	if traces(t) {
		path = "kernel"
	}
	in.mustCLI("rule", "add", "studio-0041", "--path", path, "--in", "239.1.1.1:5000%in0", "--out", "239.2.1.1:6000%out0,ttl=dec")
	in.waitState("studio-0041", "active")
	cmd := exec.Command("sh", "-c", program+" tap studio-0041 --dropped --count 1 -w - | tshark -r - -T fields -e ip.src -e ip.dst -e ip.ttl -e frame.comment")
	var stdout, stderr safeBuffer
	cmd.Env, cmd.Stdout, cmd.Stderr = in.env(), &stdout, &stderr
	if err := in.host.Start(cmd); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	source := labtest.NewTap(t, n.source, "src0")
	frame := n.frame(t, "239.1.1.1")
	frame.DstMAC, frame.TTL = packet.MulticastMAC(frame.Dst), 1
	wire := frame.Build()
	timer := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	for {
		source.Send(wire)
		select {
		case err := <-ended:
			if want := fmt.Sprintf("%v\t%v\t1\t", frame.Src, frame.Dst); err != nil || !strings.HasPrefix(stdout.String(), want) || !strings.Contains(stdout.String(), "dropped: ttl") {
				t.Errorf("%q (%v, %s), want %q and why", stdout.String(), err, stderr.String(), want)
			}
			return
		case <-time.After(50 * time.Millisecond):
		}
	}
}
