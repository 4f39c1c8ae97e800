//go:build interop

package interop

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/packet"
)

// twoWays is a source whose packets reach the relay on two paths, through a network between that
// loses and delays.
//
//	                      left ---- in0
//	source eth0 ---- from            relay out0 ---- eth0 sink
//	                      right --- in1
type twoWays struct {
	source, between, relay, sink *lab.Host
	from                         *labtest.Tap
	ways                         [2]*labtest.Tap
	mu                           sync.Mutex // guards the following fields
	lost                         [2]uint64
	seen                         uint64
}

func newTwoWays(t *testing.T) *twoWays {
	t.Helper()
	n := &twoWays{source: labtest.Host(t, "src"), between: labtest.Host(t, "net"), relay: labtest.Host(t, "rly"), sink: labtest.Host(t, "snk")}
	labtest.Connect(t, lab.End{Host: n.source, Name: "eth0", Addrs: []string{"10.0.0.1/24"}}, lab.End{Host: n.between, Name: "from"})
	for i, name := range []string{"left", "right"} {
		labtest.Connect(t, lab.End{Host: n.between, Name: name}, lab.End{Host: n.relay, Name: fmt.Sprintf("in%d", i), Addrs: []string{fmt.Sprintf("10.0.%d.2/24", i)}})
	}
	labtest.Connect(t, lab.End{Host: n.relay, Name: "out0", Addrs: []string{"10.1.0.1/24"}}, lab.End{Host: n.sink, Name: "eth0", Addrs: []string{"10.1.0.2/24"}})
	for _, h := range []*lab.Host{n.source, n.sink} {
		if err := h.AddRoute("0.0.0.0/0", "eth0"); err != nil {
			t.Fatal(err)
		}
	}
	n.from = labtest.NewTap(t, n.between, "from")
	for i, name := range []string{"left", "right"} {
		n.ways[i] = labtest.NewTap(t, n.between, name)
	}
	return n
}

// carry forwards the packets to a group until the context ends: each path loses 5 % of them, but never
// the same ones, and the right one lags by ten packets.
func (n *twoWays) carry(ctx context.Context, to netip.AddrPort) {
	loses := func(way int) bool {
		x := (n.seen*2 + uint64(way) + 1) * 0x9e3779b97f4a7c15
		x ^= x >> 29
		return x*0xbf58476d1ce4e5b9>>32%20 == 0
	}
	var behind [][]byte
	for ctx.Err() == nil {
		frame := n.from.Receive(20*time.Millisecond, nil)
		h, ok := packet.Parse(frame)
		if !ok || h.Dst != to.Addr() || h.UDP == 0 || binary.BigEndian.Uint16(frame[h.UDP+2:]) != to.Port() {
			if frame == nil && len(behind) > 0 { // no further packets to lag behind
				n.ways[1].Send(behind[0])
				behind = behind[1:]
			}
			continue
		}
		packet.FillChecksums(frame, &h) // senders leave them to their device
		n.mu.Lock()
		left, right := loses(0), loses(1)
		n.seen++
		left = left && !right
		if left {
			n.lost[0]++
		}
		if right {
			n.lost[1]++
		}
		n.mu.Unlock()
		if !left {
			n.ways[0].Send(frame)
		}
		if !right {
			behind = append(behind, frame)
		}
		if len(behind) > 10 {
			n.ways[1].Send(behind[0])
			behind = behind[1:]
		}
	}
}

// run starts the relay, and carries packets until the returned function is called, which waits until all
// of them are counted and checks the relay's report against what was lost.
func (n *twoWays) run(ctx context.Context, t *testing.T, to netip.AddrPort, merge string) (finish func() control.RuleStatus) {
	t.Helper()
	relay := startRelay(ctx, t, n.relay, fmt.Sprintf(`rules:
  - name: stream
    in: ["%s%%in0", "%s%%in1"]
    merge: %s,skew=2s,reset=4s
    out: 239.20.20.20:6004%%out0,ttl=8
`, to, to, merge))
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		n.carry(ctx, to)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return func() (rule control.RuleStatus) {
		t.Helper()
		labtest.Eventually(t, "the relay has had all packets of both ways", func() bool {
			rule = relay.rule(context.WithoutCancel(ctx), t, "stream")
			n.mu.Lock()
			defer n.mu.Unlock()
			return rule.Matched.Packets > 0 && rule.Matched.Packets == 2*n.seen-n.lost[0]-n.lost[1]
		})
		cancel()
		<-done
		if rule.Outputs[0].Sent.Packets != n.seen || rule.Stream.Lost != 0 || n.lost[0] == 0 || n.lost[1] == 0 {
			t.Errorf("%d of %d packets were sent, %d are lost; the ways lost %v", rule.Outputs[0].Sent.Packets, n.seen, rule.Stream.Lost, n.lost)
		}
		// At the end a way may be done before the other: then it is silent, until both are.
		labtest.Eventually(t, "the stream has no alarm", func() bool {
			rule = relay.rule(context.WithoutCancel(ctx), t, "stream")
			return len(rule.Stream.Alarms) == 0
		})
		for _, i := range rule.Inputs {
			if i.Leg.Different+i.Leg.Senders+i.Leg.Resets > 0 {
				t.Errorf("input %s: %+v", i.Input, i.Leg)
			}
		}
		t.Logf("%d packets, %v lost on the ways, none behind the relay", n.seen, n.lost)
		return rule
	}
}

// A video that ffmpeg sends as RTP, and that loses 5 % of its packets on each of two paths, leaves the relay with
// every number once, and is decoded without an error, frame by frame. Packets lost on one path arrive late; the test
// puts the packets in order, since ffmpeg's own receiver outputs what it holds before a gap is filled.
func TestVideoOnTwoLegs(t *testing.T) {
	t.Parallel() // the stream takes its time
	source := makeSource(t)
	ctx := labtest.Context(t)
	n := newTwoWays(t)
	to := netip.MustParseAddrPort("239.10.10.10:5004")
	finish := n.run(ctx, t, to, "rtp")
	sink := labtest.NewTap(t, n.sink, "eth0")
	received := make(chan [][]byte)
	relayed := make(chan uint64, 1)
	go func() {
		var payloads [][]byte
		for want, known := uint64(0), false; ctx.Err() == nil && (!known || uint64(len(payloads)) < want); {
			frame := sink.Receive(20*time.Millisecond, nil)
			if h, ok := packet.Parse(frame); ok && h.UDP != 0 && binary.BigEndian.Uint16(frame[h.UDP+2:]) == 6004 {
				payloads = append(payloads, slices.Clone(frame[h.UDP+8:h.UDP+int(binary.BigEndian.Uint16(frame[h.UDP+4:]))]))
			}
			select {
			case want = <-relayed:
				known = true
			default:
			}
		}
		received <- payloads
	}()
	sender := start(ctx, t, n.source, "ffmpeg", "-nostdin", "-v", "warning", "-re", "-i", source.file, "-map", "0", "-c", "copy",
		"-f", "rtp_mpegts", fmt.Sprintf("rtp://%s?pkt_size=1328&ttl=4", to))
	sender.mustEnd(t)
	relayed <- finish().Outputs[0].Sent.Packets
	payloads := <-received
	number := func(payload []byte) uint16 { return binary.BigEndian.Uint16(payload[2:]) }
	first := number(payloads[0]) - 1000 // none is that late
	slices.SortFunc(payloads, func(a, b []byte) int { return int(number(a)-first) - int(number(b)-first) })
	var stream []byte
	for i, p := range payloads {
		if i > 0 && number(p) != number(payloads[i-1])+1 {
			t.Fatalf("number %d follows %d", number(p), number(payloads[i-1]))
		}
		const rtpHeader = 12 // without contributing sources and extensions, as ffmpeg writes it (RFC 3550 section 5.1)
		stream = append(stream, p[rtpHeader:]...)
	}
	file := filepath.Join(t.TempDir(), "relayed.ts")
	if err := os.WriteFile(file, stream, 0o600); err != nil {
		t.Fatal(err)
	}
	// ffmpeg's sender omits the end of the last frame.
	args := append(slices.Clone(strict), "-i", file, "-map", "0", "-frames:v", strconv.Itoa(liveVideo), "-frames:a", strconv.Itoa(liveAudio), "-f", "framemd5", "-")
	parseFrames(t, output(ctx, t, "ffmpeg", args...)).compare(t, "relayed", frames{source.frames.video[:liveVideo], source.frames.audio[:liveAudio]})
}

// A recording of MoldUDP64 made by another program, sent on two paths that each lose 5 %, arrives complete, as
// read by tshark: every message once, each packet byte for byte.
func TestMessagesOnTwoLegs(t *testing.T) {
	ctx := labtest.Context(t)
	n := newTwoWays(t)
	recording := readPcap(t, "testdata/moldudp64.pcap")
	finish := n.run(ctx, t, netip.MustParseAddrPort("239.10.10.10:5004"), "moldudp64")
	capture := filepath.Join(t.TempDir(), "tshark.pcap")
	shark := start(ctx, t, n.sink, "tshark", "-q", "-B", "64", "-i", "eth0", "-f", "udp dst port 6004", "-F", "pcap", "-w", capture)
	labtest.Eventually(t, "tshark captures", func() bool { return fileSize(capture) >= pcapHeader })
	source := labtest.NewTap(t, n.source, "eth0")
	for i, frame := range recording {
		source.Send(frame)
		if i%10 == 9 {
			time.Sleep(time.Millisecond) // the pace of the stream, not a wait for something
		}
	}
	labtest.Eventually(t, "the ways have had the recording", func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		return n.seen == uint64(len(recording))
	})
	finish()
	read := func(file string, port int) (messages []string) {
		text := output(ctx, t, "tshark", "-r", file, "-d", fmt.Sprintf("udp.port==%d,moldudp64", port), "-T", "fields", "-e", "moldudp64.msgseq", "-e", "moldudp64.msgdata")
		for line := range strings.Lines(text) {
			numbers, data, _ := strings.Cut(strings.TrimSpace(line), "\t")
			contents := strings.Split(data, ",")
			for i, number := range strings.Split(numbers, ",") {
				messages = append(messages, number+" "+contents[i])
			}
		}
		return messages
	}
	want := read("testdata/moldudp64.pcap", 5004)
	var got []string
	labtest.Eventually(t, "tshark has written all packets", func() bool {
		return fileSize(capture) >= fileSize("testdata/moldudp64.pcap")
	})
	shark.stop(syscall.SIGINT)
	got = read(capture, 6004)
	slices.Sort(got) // packets lost on one path arrive after others
	slices.Sort(want)
	if len(want) < 1000 || !slices.Equal(got, want) {
		t.Errorf("%d messages came of %d, or others", len(got), len(want))
	}
}

// readPcap reads the frames of a capture file written on a little-endian machine.
func readPcap(t *testing.T, file string) (frames [][]byte) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for b = b[pcapHeader:]; len(b) >= 16; {
		n := binary.LittleEndian.Uint32(b[8:])
		frames = append(frames, b[16:16+n])
		b = b[16+n:]
	}
	return frames
}
