//go:build interop

// Package interop tests the relay against third-party programs: ffmpeg sends a video stream, and
// ffmpeg, socat and tshark receive what the relay makes of it.
//
//	ffmpeg      +-----------------------+  out0   sink 0: ffmpeg, socat, tshark
//	source -- in0  xdpcast run -c FILE  +--------
//	            +                       +--------
//	            +-----------------------+  out1   sink 1: ffmpeg, socat, tshark
//
// Every process is the real one, in its own network namespace; nothing is linked in. The frames of
// the video are compared by their checksums with those of the file that was sent.
package interop

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"xdpcast/internal/labtest"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		if dir := programDir; dir != "" {
			_ = os.RemoveAll(dir)
		}
		os.Exit(code)
	}))
}

// buildProgram builds the program once for all tests, in programDir, unless the environment names one.
var (
	buildProgram = sync.OnceValues(func() (program string, err error) {
		if programDir, err = os.MkdirTemp("", "xdpcast-interop"); err != nil {
			return "", err
		}
		return labtest.Program(programDir)
	})
	programDir string
)

// The stream is a little longer than the live receivers decode, since a receiver of an endless
// stream does not know that a frame is complete before the next one begins.
const (
	streamSeconds = "10.4"
	videoFrames   = 260
	liveVideo     = 250
	liveAudio     = 400
)

// sinkCase is what one sink must receive.
type sinkCase struct {
	group netip.AddrPort
	// rewritten is a tshark display filter for the header fields of each packet.
	rewritten string
}

func TestVideoStream(t *testing.T) {
	t.Parallel() // the stream takes its time
	source := makeSource(t)
	for _, c := range []struct {
		name  string
		in    netip.AddrPort
		rule  string
		sinks [2]sinkCase
	}{
		{
			name: "IPv4",
			in:   netip.MustParseAddrPort("239.10.10.10:5004"),
			rule: `rules:
  - name: video
    in: 239.10.10.10:5004%in0
    out:
      - 239.20.20.20:6004%out0,ttl=8
      - 239.30.30.30:7004%out1,src=keep,dscp=af41
`,
			sinks: [2]sinkCase{
				{netip.MustParseAddrPort("239.20.20.20:6004"), "ip.checksum.status == 1 && ip.src == 10.1.0.1 && ip.dst == 239.20.20.20 && ip.ttl == 8 && ip.dsfield.dscp == 0 && udp.dstport == 6004"},
				{netip.MustParseAddrPort("239.30.30.30:7004"), "ip.checksum.status == 1 && ip.src == 10.0.0.1 && ip.dst == 239.30.30.30 && ip.ttl == 4 && ip.dsfield.dscp == 34 && udp.dstport == 7004"},
			},
		},
		{
			name: "IPv6",
			in:   netip.MustParseAddrPort("[ff05::10]:5004"),
			rule: `rules:
  - name: video
    in: "[ff05::10]:5004%in0"
    out:
      - "[ff05::20]:6004%out0,ttl=8"
      - "[ff05::30]:7004%out1,src=keep,dscp=af41"
`,
			sinks: [2]sinkCase{
				{netip.MustParseAddrPort("[ff05::20]:6004"), "ipv6.src == fd00:1::1 && ipv6.dst == ff05::20 && ipv6.hlim == 8 && ipv6.tclass.dscp == 0 && udp.dstport == 6004"},
				{netip.MustParseAddrPort("[ff05::30]:7004"), "ipv6.src == fd00::1 && ipv6.dst == ff05::30 && ipv6.hlim == 4 && ipv6.tclass.dscp == 34 && udp.dstport == 7004"},
			},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t)
			n := newNet(t)
			relay := startRelay(ctx, t, n.relay, c.rule)
			var sinks []*sink
			for i, want := range c.sinks {
				sinks = append(sinks, startSink(ctx, t, n.sinks[i], want))
			}
			for _, s := range sinks {
				s.waitReady(t)
			}

			sender := start(ctx, t, n.source, "ffmpeg", "-nostdin", "-v", "warning", "-re", "-i", source.file, "-map", "0", "-c", "copy",
				"-f", "mpegts", fmt.Sprintf("udp://%s?pkt_size=1316&ttl=4", c.in))
			sender.mustEnd(t)
			sent := datagramsSent(t, n.source, c.in.Addr().Is4())

			rule := relay.arrived(ctx, t, "video", sent)
			if rule.UsedPath != "kernel" || rule.Matched.Packets != sent || len(rule.Drops) > 0 {
				t.Errorf("%d packets were sent; the rule matched %d on path %q, and dropped %v", sent, rule.Matched.Packets, rule.UsedPath, rule.Drops)
			}
			for i, s := range sinks {
				out := rule.Outputs[i]
				if out.Sent != rule.Matched || len(out.Drops) > 0 {
					t.Errorf("output %d: %+v of %+v were sent, and dropped %v", i, out.Sent, rule.Matched, out.Drops)
				}
				t.Logf("sink %d: %d packets, %d bytes", i, out.Sent.Packets, out.Sent.Bytes)
				s.checkLive(t, source.frames)
				s.checkRecording(ctx, t, source.frames, out.Sent)
				s.checkCapture(ctx, t, out.Sent)
			}
		})
	}
}

// source is the stream to send, and the checksums of its decoded frames.
type source struct {
	file   string
	frames frames
}

func makeSource(t *testing.T) source {
	t.Helper()
	ctx := labtest.Context(t)
	s := source{file: filepath.Join(t.TempDir(), "source.ts")}
	output(ctx, t, "ffmpeg", "-nostdin", "-v", "warning", "-f", "lavfi", "-i", "testsrc2=size=640x360:rate=25",
		"-f", "lavfi", "-i", "sine=frequency=440:sample_rate=48000", "-t", streamSeconds,
		"-c:v", "libx264", "-preset", "veryfast", "-b:v", "1500k", "-g", "25", "-pix_fmt", "yuv420p",
		"-c:a", "mp2", "-b:a", "128k", "-f", "mpegts", s.file)
	s.frames = decode(ctx, t, s.file)
	if n := len(s.frames.video); n != videoFrames {
		t.Fatalf("the source has %d video frames, want %d", n, videoFrames)
	}
	return s
}

// frames are the checksums of decoded frames, in order.
type frames struct{ video, audio []string }

// strict makes ffmpeg fail on any irregularity in a stream.
var strict = []string{"-nostdin", "-v", "warning", "-xerror", "-err_detect", "explode"}

// decode decodes a file strictly, and also counts its frames with ffprobe.
func decode(ctx context.Context, t *testing.T, file string) frames {
	t.Helper()
	args := append(slices.Clone(strict), "-i", file, "-map", "0", "-f", "framemd5", "-")
	f := parseFrames(t, output(ctx, t, "ffmpeg", args...))
	counted := output(ctx, t, "ffprobe", "-v", "warning", "-count_frames", "-select_streams", "v", "-show_entries", "stream=nb_read_frames", "-of", "csv=p=0", file)
	if got, _, _ := strings.Cut(strings.TrimSpace(counted), "\n"); got != fmt.Sprint(len(f.video)) {
		t.Errorf("%s: ffprobe counts %s video frames, ffmpeg decoded %d", file, got, len(f.video))
	}
	return f
}

// parseFrames parses ffmpeg's framemd5 format: stream, dts, pts, duration, size, hash. Times are
// ignored: the sender rewrites them.
func parseFrames(t *testing.T, text string) (f frames) {
	t.Helper()
	for line := range strings.Lines(text) {
		fields := strings.Split(strings.ReplaceAll(strings.TrimSpace(line), " ", ""), ",")
		if strings.HasPrefix(line, "#") || len(fields) != 6 {
			continue
		}
		switch fields[0] {
		case "0":
			f.video = append(f.video, fields[4]+" "+fields[5])
		case "1":
			f.audio = append(f.audio, fields[4]+" "+fields[5])
		default:
			t.Fatalf("more than two streams: %s", line)
		}
	}
	return f
}

func (f frames) compare(t *testing.T, what string, want frames) {
	t.Helper()
	if diff := cmp.Diff(want.video, f.video); diff != "" {
		t.Errorf("%s: video frames differ (-sent +received):\n%s", what, diff)
	}
	if diff := cmp.Diff(want.audio, f.audio); diff != "" {
		t.Errorf("%s: audio frames differ (-sent +received):\n%s", what, diff)
	}
}

// output runs a program in the test's own namespace; it must succeed without complaints.
func output(ctx context.Context, t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(ctx, name, args...)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil || complaints(stderr.String()) != "" {
		t.Fatalf("%s: %v\n%s", strings.Join(cmd.Args, " "), err, stderr.String())
	}
	return stdout.String()
}

// complaints leaves out tshark's warning to root.
func complaints(stderr string) string {
	var rest strings.Builder
	for line := range strings.Lines(stderr) {
		if !strings.HasPrefix(line, "Running as user") && strings.TrimSpace(line) != "" {
			rest.WriteString(line)
		}
	}
	return rest.String()
}

func fileSize(path string) int64 {
	info, err := os.Stat(path)
	if err != nil {
		return -1
	}
	return info.Size()
}
