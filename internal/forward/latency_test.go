package forward

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"xdpcast/internal/labtest"
	"xdpcast/pkg/fanout"
)

// BenchmarkLatency measures the time of single frames from the source's socket to the
// sink's, at rates at which a block is never full.
func BenchmarkLatency(b *testing.B) {
	for _, pause := range []time.Duration{0, 200 * time.Microsecond, 1300 * time.Microsecond} {
		for _, frames := range []int{0, -1} {
			b.Run(fmt.Sprintf("%s, pause %v", ringsOf(frames), pause), func(b *testing.B) {
				n := newBench(b, 1)
				f := n.path(b, FanoutOptions{Blocks: fanout.DefaultBlocks, BlockTimeout: fanout.DefaultBlockTimeout, Frames: frames})
				n.sync(b, f, rule("r", n.in, "239.1.1.1", 5000, sendTo(n.out[0], "239.9.9.1", 6000)))
				measureLatency(b, n, pause)
			})
		}
	}
}

// ringsOf names the rings of FanoutOptions.Frames.
func ringsOf(frames int) string {
	if frames < 0 {
		return "blocks alone"
	}
	return "two rings"
}

// BenchmarkLatencyAFXDP is the same on the AF_XDP path.
func BenchmarkLatencyAFXDP(b *testing.B) {
	for _, pause := range []time.Duration{0, 200 * time.Microsecond, 1300 * time.Microsecond} {
		b.Run(fmt.Sprintf("pause %v", pause), func(b *testing.B) {
			n := newXDPBench(b, 1, 1, 0)
			n.openWith(b, AFXDPOptions{})
			n.sync(b, xdpRule("r", n.in, "239.1.1.1", 5000, sendTo(n.out[0], "239.9.9.1", 6000)))
			measureLatency(b, n.bench, pause)
		})
	}
}

func measureLatency(b *testing.B, n *bench, pause time.Duration) {
	source, sink := labtest.NewTap(b, n.source, "eth0"), labtest.NewTap(b, n.sinks[0], "eth0")
	frame := numbered(0, 0).Build()
	var times []time.Duration
	b.ResetTimer()
	for range b.N {
		time.Sleep(pause)
		sent := time.Now()
		source.Send(frame)
		if sink.Receive(labtest.Timeout, isUDP) == nil {
			b.Fatal("a frame is lost")
		}
		times = append(times, time.Since(sent))
	}
	b.StopTimer()
	slices.Sort(times)
	b.ReportMetric(float64(times[len(times)/2].Nanoseconds())/1000, "p50-us")
	b.ReportMetric(float64(times[len(times)*99/100].Nanoseconds())/1000, "p99-us")
}
