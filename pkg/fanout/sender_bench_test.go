package fanout

import (
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkSend measures the CPU time per frame sent, including its reception by the
// peer, which on a veth runs in the sender's context.
func BenchmarkSend(b *testing.B) {
	for _, c := range []SenderOptions{{Batch: 1}, {Batch: 16}, {Batch: 64}, {Batch: 256}, {Batch: 64, BypassQdisc: true}} {
		b.Run(fmt.Sprintf("batches of %d, bypass %v", c.Batch, c.BypassQdisc), func(b *testing.B) {
			n := newBench(b)
			s := openSender(b, n.relay, "out", c)
			f := frame(0, 0).Build()
			packets := make([]Packet, 256)
			for i := range packets {
				packets[i] = Packet{Header: f[:42], Payload: f[42:]}
			}
			pin(b)
			var before, after unix.Rusage
			if err := unix.Getrusage(unix.RUSAGE_THREAD, &before); err != nil {
				b.Fatal(err)
			}
			b.ResetTimer()
			for left := b.N; left > 0; left -= len(packets) {
				sendAll(b, s, packets[:min(left, len(packets))])
			}
			b.StopTimer()
			if err := unix.Getrusage(unix.RUSAGE_THREAD, &after); err != nil {
				b.Fatal(err)
			}
			used := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
			b.ReportMetric(float64(used.Nanoseconds())/float64(b.N), "cpu-ns/op")
		})
	}
}
