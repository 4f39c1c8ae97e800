package loader

import (
	"testing"

	"xdpcast/bpf"
	"xdpcast/internal/labtest"
)

// Packets that find the queue of a CPU full are counted, and nothing else is lost.
func TestSteeringQueueFull(t *testing.T) {
	n := newLab(t, 0)
	l := open(t, testOptions(t))
	attachAll(t, l, n.in)
	if err := l.SetSteering([]int{0}); err != nil {
		t.Fatal(err)
	}
	rule := tapRule("r", input(n.in, "239.1.1.1", "", 5000))
	rule.Steered = true
	sync1(t, l, rule)
	// Smaller than the eight frames that the kernel enqueues at a time.
	if err := l.maps.Cpus.Put(uint32(0), &bpf.RelayBpfCpumapVal{Qsize: 1}); err != nil {
		t.Fatal(err)
	}
	source := labtest.NewTap(t, n.source, "eth0")
	frame := sourceFrame(n, "239.1.1.1", 5000, make([]byte, 64)).Build()
	const bursts, burst = 1000, 50
	var arrived, lost uint64
	for i := range uint64(bursts) {
		for range burst {
			source.Send(frame)
		}
		labtest.Eventually(t, "every frame has arrived or is counted as lost", func() bool {
			s := globalStats(t, l)
			arrived, lost = s.Kept.Packets, s.Drops[CPUFull].Packets
			return arrived+lost >= (i+1)*burst
		})
		if arrived > 0 && lost > 0 {
			break
		}
	}
	if lost == 0 || arrived == 0 || (arrived+lost)%burst != 0 {
		t.Errorf("%d arrived, %d were lost", arrived, lost)
	}
}

// Queues exist while a rule needs them, and stay when another process takes over.
func TestSteeringComesAndGoes(t *testing.T) {
	t.Parallel()
	n := newLab(t, 0)
	opts := testOptions(t)
	l := open(t, opts)
	attachAll(t, l, n.in)
	if l.SetSteering([]int{0, 0}) == nil || l.SetSteering([]int{-1}) == nil || l.SetSteering([]int{1 << 20}) == nil || l.SetSteering(make([]int, 65)) == nil {
		t.Error("CPUs are accepted that there are not")
	}
	if err := l.SetSteering([]int{0}); err != nil {
		t.Fatal(err)
	}
	steered := func() (length uint32, cpus uint32) {
		t.Helper()
		var queue bpf.RelayBpfCpumapVal
		_ = l.maps.Cpus.Lookup(uint32(0), &queue)
		config, err := l.maps.config(l.opts.PinDir)
		if err != nil {
			t.Fatal(err)
		}
		return queue.Qsize, config.Steered
	}
	expect := func(when string, length, cpus uint32) {
		t.Helper()
		if l, c := steered(); l != length || c != cpus {
			t.Errorf("%s: a queue of %d, %d CPUs, want %d and %d", when, l, c, length, cpus)
		}
	}
	rule := tapRule("r", input(n.in, "239.1.1.1", "", 5000))
	sync1(t, l, rule)
	expect("no rule is steered", 0, 0)
	rule.Steered = true
	sync1(t, l, rule)
	expect("one is", cpuQueue, 1)
	closeLoader(t, l)
	l = open(t, opts)
	expect("adopted", cpuQueue, 1)
	if err := l.SetSteering([]int{0}); err != nil {
		t.Fatal(err)
	}
	sync1(t, l, rule)
	expect("the same again", cpuQueue, 1)
	sync1(t, l)
	expect("no rule any more", 0, 0)
}
