package fanout

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// Neither receiving nor sending allocates.
func TestNothingAllocated(t *testing.T) { eachRing(t, testNothingAllocated) }

func testNothingAllocated(t *testing.T, ring int) {
	b := newBench(t)
	g := openGroup(t, b.relay, "in", Options{Frames: ring, Filter: Filter{Classic: portFilter(5000)}})
	in, out := openSender(t, b.source, "eth0", SenderOptions{}), openSender(t, b.relay, "out", SenderOptions{})
	data := frame(0, 0).Build()
	packets := []Packet{{Header: data[:42], Payload: data[42:]}, {Header: data}, {Header: data}}
	w := g.Workers()[0]
	var forwarded []Packet
	var f Frame
	total := 0
	allocs := testing.AllocsPerRun(200, func() {
		if n, err := in.Send(packets); n != len(packets) || err != nil {
			t.Fatalf("sent %d, %v", n, err)
		}
		for got := 0; got < len(packets); {
			block, err := w.Wait()
			if err != nil {
				t.Fatal(err)
			}
			forwarded = forwarded[:0]
			for block.Next(&f) {
				if !f.CompleteChecksum() {
					t.Fatal("a checksum cannot be completed")
				}
				f.RestoreVLAN()
				forwarded = append(forwarded, Packet{Header: f.Data[:42], Payload: f.Data[42:]})
			}
			if n, err := out.Send(forwarded); n != len(forwarded) || err != nil {
				t.Fatalf("forwarded %d, %v", n, err)
			}
			got += len(forwarded)
			total += len(forwarded)
			block.Release()
		}
	})
	if allocs != 0 {
		t.Errorf("%v allocations a run", allocs)
	}
	if want := 201 * len(packets); total != want {
		t.Errorf("%d frames forwarded, want %d", total, want)
	}
}

// The memory into which merged datagrams are split is reused.
func TestSplitAllocatesOnce(t *testing.T) {
	memory := buildBlock(1<<17, mergedFrame(false, nil, 1, false, make([]byte, 10000), 1000))
	b := openBlock(memory)
	var f Frame
	allocs := testing.AllocsPerRun(100, func() {
		n := 0
		for b.open(memory, 0); b.Next(&f); n++ {
		}
		if n != 10 {
			t.Fatalf("%d datagrams", n)
		}
	})
	if allocs != 0 {
		t.Errorf("%v allocations a run", allocs)
	}
}

// BenchmarkForward passes bursts through source, relay and sink, one after the
// other: pps is of all three, ns/receive+send is the relay's part. Any loss fails
// it.
func BenchmarkForward(b *testing.B) {
	for _, size := range []int{128, 1400} {
		b.Run(fmt.Sprintf("%d bytes", size), func(b *testing.B) { benchmarkForward(b, size) })
	}
}

func benchmarkForward(b *testing.B, size int) {
	const burst = 4096
	n := newBench(b)
	opts := Options{Filter: Filter{Classic: portFilter(5000)}, Blocks: 128}
	relay, sink := openGroup(b, n.relay, "in", opts), openGroup(b, n.sink, "eth0", opts)
	in, out := openSender(b, n.source, "eth0", SenderOptions{}), openSender(b, n.relay, "out", SenderOptions{})
	f := frame(0, 0)
	f.Payload = make([]byte, size-42)
	packets := slices.Repeat([]Packet{{Header: f.Build()}}, burst)
	var inRelay time.Duration
	b.ReportAllocs()
	b.ResetTimer()
	for left := b.N; left > 0; left -= burst {
		count := min(burst, left)
		sendAll(b, in, packets[:count])
		start := time.Now()
		take(b, relay, count, func(frames []Packet) { sendAll(b, out, frames) })
		inRelay += time.Since(start)
		take(b, sink, count, func([]Packet) {})
	}
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "pps")
	b.ReportMetric(float64(inRelay.Nanoseconds())/float64(b.N), "ns/receive+send")
	for _, g := range []*Group{relay, sink} {
		if s := groupStats(b, g)[0]; s.Dropped != 0 || s.Received != uint64(b.N) {
			b.Errorf("%+v of %d sent", s, b.N)
		}
	}
}

// take receives count frames from a group of one worker, and passes them on a block at
// a time.
func take(b *testing.B, g *Group, count int, handle func([]Packet)) {
	var f Frame
	packets := make([]Packet, 0, 1024)
	for count > 0 {
		block, err := g.Workers()[0].Wait()
		if err != nil {
			b.Fatal(err)
		}
		packets = packets[:0]
		for block.Next(&f) {
			packets = append(packets, Packet{Header: f.Data[:42], Payload: f.Data[42:]})
		}
		handle(packets)
		count -= len(packets)
		block.Release()
	}
}

// BenchmarkNext is the cost of reading a frame from a block.
func BenchmarkNext(b *testing.B) {
	plain := rawFrame{data: frame(0, 0).Build(), network: etherLen}
	frames := make([]rawFrame, 500)
	for i := range frames {
		frames[i] = plain
	}
	memory := buildBlock(1<<17, frames...)
	block := openBlock(memory)
	var f Frame
	for i := 0; i < b.N; i += len(frames) {
		n := 0
		for block.open(memory, 0); block.Next(&f); n++ {
		}
		if n != len(frames) {
			b.Fatal(n)
		}
	}
}
