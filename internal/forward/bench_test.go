package forward

import (
	"fmt"
	"runtime"
	"testing"

	"xdpcast/pkg/fanout"
	"xdpcast/pkg/loader"
)

// BenchmarkFanout sends frames through the whole path, without loss: source, relay and
// the sinks' stacks share the machine.
func BenchmarkFanout(b *testing.B) {
	for _, outputs := range []int{1, 4} {
		for _, size := range []int{128, 1400} {
			for _, frames := range []int{0, -1} {
				b.Run(fmt.Sprintf("1 to %d, %d bytes, %s", outputs, size, ringsOf(frames)), func(b *testing.B) {
					benchmarkFanout(b, outputs, size, frames)
				})
			}
		}
	}
}

func benchmarkFanout(b *testing.B, outputs, size, frames int) {
	n := newBench(b, outputs)
	f := n.path(b, FanoutOptions{Blocks: fanout.DefaultBlocks, BlockTimeout: fanout.DefaultBlockTimeout, Frames: frames})
	r := rule("r", n.in, "239.1.1.1", 5000)
	for i := range outputs {
		r.Out = append(r.Out, sendTo(n.out[i], "239.9.9.1", 6000))
	}
	n.sync(b, f, r)
	source := openSender(b, n.source, iface(b, n.source, "eth0").Index)
	frame := numbered(0, 0)
	frame.Payload = make([]byte, size-42)
	burst := make([][]byte, 256)
	for i := range burst {
		burst[i] = frame.Build()
	}
	stats := func() loader.RuleStats { return f.Stats([]string{"r"})[0] }
	b.ResetTimer()
	for sent := 0; sent < b.N; {
		some := burst[:min(len(burst), b.N-sent)]
		sendFrames(b, source, some)
		sent += len(some)
		for sent-int(stats().Matched.Packets) > 8*len(burst) {
			runtime.Gosched()
		}
	}
	for int(stats().Matched.Packets) < b.N || stats().Outputs[0].Sent.Packets+stats().Outputs[0].Drops[loader.TxFull].Packets < uint64(b.N) {
		runtime.Gosched()
	}
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "pps")
	for slot, out := range adds(b, f, "r", uint64(b.N)).Outputs {
		if out.Sent.Packets != uint64(b.N) {
			b.Errorf("output %d: %+v of %d", slot, out, b.N)
		}
	}
}
