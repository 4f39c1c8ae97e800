//go:build interop

package interop

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// sink receives the stream with three programs at once: ffmpeg decodes it live, socat records the
// payload, and tshark the packets.
type sink struct {
	host               *lab.Host
	want               sinkCase
	live, socat, shark *process
	// Their output: checksums of frames, an MPEG transport stream, packets.
	frames, recording, capture string
}

func startSink(ctx context.Context, t *testing.T, h *lab.Host, want sinkCase) *sink {
	t.Helper()
	dir := t.TempDir()
	s := &sink{host: h, want: want,
		frames: filepath.Join(dir, "live.framemd5"), recording: filepath.Join(dir, "socat.ts"), capture: filepath.Join(dir, "tshark.pcap")}
	addr, port := want.group.Addr(), want.group.Port()

	s.shark = start(ctx, t, h, "tshark", "-q", "-B", "64", "-i", "eth0", "-f", fmt.Sprintf("udp dst port %d", port), "-F", "pcap", "-w", s.capture)
	// A buffer for the time in which socat gets no CPU: SOL_SOCKET, SO_RCVBUFFORCE.
	buffer := fmt.Sprintf("setsockopt-listen=%d:%d:x%x", unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, binary.NativeEndian.AppendUint32(nil, 64<<20))
	listen := fmt.Sprintf("UDP4-RECV:%d,reuseaddr,%s,ip-add-membership=%s:eth0", port, buffer, addr)
	if addr.Is6() {
		listen = fmt.Sprintf("UDP6-RECV:%d,reuseaddr,%s,ipv6-join-group=[%s]:eth0", port, buffer, addr)
	}
	s.socat = start(ctx, t, h, "socat", "-u", listen, "OPEN:"+s.recording+",creat,trunc")
	args := append(strict[:len(strict):len(strict)], "-i", fmt.Sprintf("udp://%s?fifo_size=100000", want.group), "-map", "0",
		"-frames:v", strconv.Itoa(liveVideo), "-frames:a", strconv.Itoa(liveAudio), "-f", "framemd5", s.frames)
	s.live = start(ctx, t, h, "ffmpeg", args...)
	return s
}

// waitReady waits until all three can receive.
func (s *sink) waitReady(t *testing.T) {
	t.Helper()
	labtest.Eventually(t, "ffmpeg and socat have bound "+s.want.group.String(), func() bool {
		return s.bound(t) == 2
	})
	labtest.Eventually(t, "ffmpeg and socat have joined "+s.want.group.Addr().String(), func() bool {
		return s.members(t) == 2
	})
	labtest.Eventually(t, "tshark captures", func() bool { return fileSize(s.capture) >= pcapHeader })
	growBuffers(t, s.live.cmd.Process.Pid)
}

// growBuffers gives the sockets of a process buffers for the time in which it gets no CPU: ffmpeg itself may only ask for
// net.core.rmem_max, less than a second of the stream.
func growBuffers(t *testing.T, pid int) {
	t.Helper()
	process, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(process)
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	open, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	grown := 0
	for _, e := range open {
		if target, err := os.Readlink(filepath.Join(dir, e.Name())); err != nil || !strings.HasPrefix(target, "socket:") {
			continue
		}
		number, err := strconv.Atoi(e.Name())
		if err != nil {
			t.Fatal(err)
		}
		fd, err := unix.PidfdGetfd(process, number, 0)
		if err == nil {
			err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20), unix.Close(fd))
		}
		if err != nil {
			t.Fatal(err)
		}
		grown++
	}
	if grown == 0 {
		t.Fatalf("process %d has no socket", pid)
	}
}

// bound counts the sockets on the sink's port.
func (s *sink) bound(t *testing.T) int {
	t.Helper()
	table := "udp"
	if s.want.group.Addr().Is6() {
		table = "udp6"
	}
	n := 0
	for _, fields := range procNet(t, s.host, table) { // sl, local_address:port, ...
		if strings.HasSuffix(fields[1], fmt.Sprintf(":%04X", s.want.group.Port())) {
			n++
		}
	}
	return n
}

// members counts the sockets that have joined the sink's group.
func (s *sink) members(t *testing.T) int {
	t.Helper()
	addr := s.want.group.Addr()
	table, group, at := "igmp", "", 0 // Group, Users, ... as a native-endian word
	if addr.Is4() {
		b := addr.As4()
		group = fmt.Sprintf("%08X", binary.NativeEndian.Uint32(b[:]))
	} else {
		b := addr.As16()
		table, group, at = "igmp6", hex.EncodeToString(b[:]), 2 // Idx, Device, Group, Users, ...
	}
	for _, fields := range procNet(t, s.host, table) {
		if len(fields) > at+1 && fields[at] == group {
			n, err := strconv.Atoi(fields[at+1])
			if err != nil {
				t.Fatalf("%s: %q", table, fields)
			}
			return n
		}
	}
	return 0
}

// checkLive checks what ffmpeg decoded live.
func (s *sink) checkLive(t *testing.T, sent frames) {
	t.Helper()
	s.live.mustEnd(t)
	text, err := os.ReadFile(s.frames)
	if err != nil {
		t.Fatal(err)
	}
	parseFrames(t, string(text)).compare(t, "live", frames{sent.video[:liveVideo], sent.audio[:liveAudio]})
}

// checkRecording checks that socat received every byte, and that they are the complete stream.
func (s *sink) checkRecording(ctx context.Context, t *testing.T, sent frames, counted control.Counter) {
	t.Helper()
	payload := int64(counted.Bytes) - int64(counted.Packets)*int64(s.headers())
	labtest.Eventually(t, fmt.Sprintf("socat has written %d bytes", payload), func() bool { return fileSize(s.recording) >= payload })
	s.socat.stop(syscall.SIGTERM)
	if got := fileSize(s.recording); got != payload {
		t.Errorf("socat has written %d bytes, want %d", got, payload)
	}
	decode(ctx, t, s.recording).compare(t, "recording", sent)
}

// headers is the length of the headers before the payload.
func (s *sink) headers() int {
	const ethernet, ipv4, ipv6, udp = 14, 20, 40, 8
	if s.want.group.Addr().Is4() {
		return ethernet + ipv4 + udp
	}
	return ethernet + ipv6 + udp
}

// The libpcap file format, pcap-savefile(5): a file header, and one header per packet.
const (
	pcapHeader       = 24
	pcapPacketHeader = 16
)

// checkCapture checks that tshark finds no fault in any packet: checksums, lengths, the rewritten
// fields, and the stream inside.
func (s *sink) checkCapture(ctx context.Context, t *testing.T, counted control.Counter) {
	t.Helper()
	size := int64(pcapHeader + pcapPacketHeader*counted.Packets + counted.Bytes)
	labtest.Eventually(t, fmt.Sprintf("tshark has written %d bytes", size), func() bool { return fileSize(s.capture) >= size })
	s.shark.stop(syscall.SIGINT)

	read := []string{"-r", s.capture, "-o", "ip.check_checksum:TRUE", "-o", "udp.check_checksum:TRUE",
		"-d", fmt.Sprintf("udp.port==%d,mp2t", s.want.group.Port()), "-T", "fields"}
	count := func(filter string) uint64 {
		return uint64(strings.Count(output(ctx, t, "tshark", append(read, "-e", "frame.number", "-Y", filter)...), "\n"))
	}
	if n := count("frame"); n != counted.Packets {
		t.Errorf("tshark captured %d packets, want %d", n, counted.Packets)
	}
	right := s.want.rewritten + " && udp.checksum.status == 1 && mp2t && !_ws.expert"
	if n := count(right); n != counted.Packets {
		wrong := output(ctx, t, "tshark", append(read, "-c", "100000", "-e", "frame.number", "-e", "_ws.col.Info", "-e", "_ws.expert.message", "-Y", "!("+right+")")...)
		t.Errorf("%d of %d packets are right; of the others:\n%.2000s", n, counted.Packets, wrong)
	}
}

// procNet reads a table below /proc/net of a host, split into words, without its header.
func procNet(t *testing.T, h *lab.Host, table string) (lines [][]string) {
	t.Helper()
	labtest.Do(t, h, func() error {
		text, err := os.ReadFile("/proc/thread-self/net/" + table)
		for line := range strings.Lines(string(text)) {
			if fields := strings.Fields(line); len(fields) > 1 {
				lines = append(lines, fields)
			}
		}
		return err
	})
	return lines
}

// datagramsSent is the number of UDP datagrams a host has sent since its creation.
func datagramsSent(t *testing.T, h *lab.Host, is4 bool) uint64 {
	t.Helper()
	value := func(s string) uint64 {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if !is4 {
		for _, fields := range procNet(t, h, "snmp6") {
			if fields[0] == "Udp6OutDatagrams" {
				return value(fields[1])
			}
		}
		t.Fatal("no Udp6OutDatagrams")
	}
	var names []string
	for _, fields := range procNet(t, h, "snmp") { // a line of names, then one of values
		switch {
		case fields[0] != "Udp:":
		case names == nil:
			names = fields
		default:
			for i, name := range names {
				if name == "OutDatagrams" {
					return value(fields[i])
				}
			}
		}
	}
	t.Fatal("no Udp: OutDatagrams")
	return 0
}
