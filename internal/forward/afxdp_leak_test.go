package forward

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
)

// holdings are resources that the path can leak: descriptors, rings and memory.
type holdings struct {
	labtest.Holdings
	Mapped int // areas of memory of a UMEM's size
}

// held counts the resources of this process, with so many frames per worker.
func held(t testing.TB, frames int) holdings {
	t.Helper()
	h := holdings{Holdings: labtest.Held()}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(maps)) {
		var from, to uint64
		if n, _ := fmt.Sscanf(line, "%x-%x ", &from, &to); n == 2 && to-from == uint64(frames)*2048 {
			h.Mapped++
		}
	}
	return h
}

// Rules added and removed many times leave nothing behind: neither those that open
// and close a sender, nor those that open and close the worker with its memory.
func TestAFXDPLeavesNothing(t *testing.T) {
	b := newXDPBench(t, 3, 1, 0)
	const frames = minFrames + 100 // a size that nothing else has
	b.openWith(t, AFXDPOptions{Frames: frames})
	stays := xdpRule("stays", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.2.2.1", 6000))
	var comes []flow.Flow
	for i := range 10 {
		comes = append(comes, xdpRule(fmt.Sprintf("comes%d", i), b.in, fmt.Sprintf("239.1.2.%d", i), 5000, sendTo(b.out[1+i%2], "239.2.2.2", 6000)))
	}
	sync := func(rules ...flow.Flow) {
		labtest.Do(t, b.relay, func() error { return b.path.Sync(rules, ownAddresses) })
	}
	none := held(t, frames)
	sync(stays)
	one := held(t, frames)
	if one == none {
		t.Fatalf("a worker holds nothing of %+v", one)
	}
	settled := func(about string, want holdings) {
		t.Helper()
		labtest.Eventually(t, fmt.Sprintf("%s: held is %+v, want %+v", about, held(t, frames), want), func() bool { return held(t, frames) == want })
	}
	for range labtest.Soak(200, 1000) / len(comes) {
		sync(append(comes, stays)...)
		sync(stays)
	}
	settled("rules beside another", one)
	for range 20 {
		sync()
		sync(stays)
	}
	settled("the only rule", one)
	sync()
	settled("no rule", none)
	if len(b.path.claimed)+len(b.path.inputs) != 0 {
		t.Errorf("%d queues and %d inputs are left", len(b.path.claimed), len(b.path.inputs))
	}
}
