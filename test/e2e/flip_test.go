package e2e_test

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/labtest"
	"xdpcast/internal/traffic"
	"xdpcast/pkg/rules"
)

// The two sets of TestFlips. Every output of a set has its own ports.
var flipSets = [2][3][]string{
	{
		{"239.2.1.1:6000%out0"},
		{"239.2.2.1:6001%out0", "239.2.2.2:6002%out1", "239.2.2.3:6003%out2"},
		{"239.2.3.1:6004%out1", "239.2.3.2:6005%out1"},
	},
	{
		{"239.2.1.2:6100%out1"},
		{"239.2.2.4:6101%out2", "239.2.2.5:6102%out0"},
		{"239.2.3.3:6103%out2", "239.2.3.4:6104%out0", "239.2.3.5:6105%out0", "239.2.3.6:6106%out1"},
	},
}

// flipped is a set with its rules on a path.
func flipped(t *testing.T, set int, path string) (all []rules.Rule) {
	t.Helper()
	for i, out := range flipSets[set] {
		rule, err := control.ToRule(control.Rule{Name: fmt.Sprint("flip", i), In: fmt.Sprintf("239.1.1.%d:5000%%in0", i+1), Out: out, Path: path})
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, rule)
	}
	return all
}

// TestFlips switches a whole set of rules back and forth while packets flow. No packet is lost without
// being counted, none duplicated, and each has all outputs of its rule in one of the two sets and no
// other. All rules change at once: among consecutive packets of any rules, the first with the outputs
// of the other set starts it for all.
func TestFlips(t *testing.T) {
	onPaths(t, func(t *testing.T, n *network, in *instance, path string) {
		testFlips(t, n, in, path, labtest.Soak(40, 1000))
	})
}

func testFlips(t *testing.T, n *network, in *instance, path string, flips int) {
	apply := func(set int) {
		t.Helper()
		if _, err := in.client.Apply(t.Context(), flipped(t, set, path), control.ApplyOptions{MaxChanges: 1}); err != nil {
			t.Fatal(err)
		}
	}
	receiveDrops := func() (packets int) {
		t.Helper()
		stats, err := in.client.Stats(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range stats.ReceiveDrops {
			packets += int(d.Packets)
		}
		return packets
	}
	earlier := receiveDrops() // on other paths
	apply(0)
	for i := range flipSets[0] {
		in.waitState(fmt.Sprint("flip", i), control.StateActive)
	}
	var captures []*capture
	for i := range n.sinks {
		captures = append(captures, newCapture(t, labtest.NewTap(t, n.sinks[i], "sink0")))
	}
	stream := send(t, n.source, traffic.SendConfig{Target: target(t, "239.1.1.1:5000%src0"), Groups: 3, TTL: 16, Rate: traffic.Rate{Value: easy}})
	// arrive waits for packets that are sent from now on: a worker that gets no CPU would relay those of several sets by
	// the last of them.
	arrive := func() {
		t.Helper()
		stream.flows(30)
		next := (stream.sender.Report().Packets - 15) / 3
		for flow := range flipSets[0] {
			eventually(t, "packets come out", func() string {
				highest := uint64(0)
				for _, c := range captures {
					highest = max(highest, c.highest[flow].Load())
				}
				if highest < next {
					return fmt.Sprintf("rule %d: %d, want %d", flow, highest, next)
				}
				return ""
			})
		}
	}
	arrive()
	for i := range flips {
		apply((i + 1) % 2)
		arrive()
	}
	sent := stream.stop()
	// The ring of a worker that gets no CPU for a tenth of a second overflows: acceptable here if
	// it is counted. The next packets must not meet a full one.
	lost := 0
	eventually(t, "each packet has come out or is counted as lost", func() string {
		lost = receiveDrops() - earlier
		out := map[copyOf]bool{}
		for _, c := range captures {
			c.packets(out)
		}
		if len(out)+lost != int(sent) {
			return fmt.Sprintf("%d of %d came out, %d are lost", len(out), sent, lost)
		}
		return ""
	})
	outputs := map[copyOf][]int{} // the ports of each packet's copies, in any order
	// A packet of each rule follows: once these arrive, all have.
	send(t, n.source, traffic.SendConfig{Target: target(t, "239.1.1.1:5000%src0"), Groups: 3, TTL: 16, Rate: traffic.Rate{Value: 1_000}, Count: 3}).wait()
	copies := 0
	for _, outs := range flipSets[flips%2] {
		copies += len(outs)
	}
	eventually(t, "the last packets have arrived", func() string {
		last := 0
		for _, c := range captures {
			last += int(c.last.Load())
		}
		if last < copies {
			return fmt.Sprintf("%d copies of %d", last, copies)
		}
		return ""
	})
	for _, c := range captures {
		for _, got := range c.stop() {
			outputs[got.copyOf] = append(outputs[got.copyOf], got.port)
		}
	}
	checkFlips(t, outputs, sent, flips, lost)
}

// checkFlips checks the copies of each packet against the two sets.
func checkFlips(t *testing.T, outputs map[copyOf][]int, sent uint64, flips, lost int) {
	t.Helper()
	var want [2][3]string
	for set := range flipSets {
		for flow, outs := range flipSets[set] {
			var ports []int
			for _, out := range outs {
				var a, b, port int
				if _, err := fmt.Sscanf(strings.ReplaceAll(out, "%", " "), "239.2.%d.%d:%d", &a, &b, &port); err != nil {
					t.Fatal(err)
				}
				ports = append(ports, port)
			}
			slices.Sort(ports)
			want[set][flow] = fmt.Sprint(ports)
		}
	}
	wrong, missing, swaps, before := 0, 0, 0, 0
	for i := range sent {
		of := copyOf{flow: uint32(i % 3), seq: i / 3}
		ports := outputs[of]
		if len(ports) == 0 {
			missing++
			continue
		}
		slices.Sort(ports)
		set := slices.Index([]string{want[0][of.flow], want[1][of.flow]}, fmt.Sprint(ports))
		if set < 0 {
			if wrong++; wrong < 10 {
				t.Errorf("packet %d of rule %d went out to ports %v, want %s or %s", of.seq, of.flow, ports, want[0][of.flow], want[1][of.flow])
			}
			continue
		}
		if set != before {
			swaps, before = swaps+1, set
		}
	}
	t.Logf("%d packets, %d flips, %d seen", sent, flips, swaps)
	if wrong > 0 {
		t.Errorf("%d of %d packets have the outputs of no set", wrong, sent)
	}
	if missing != lost {
		t.Errorf("%d packets have not come out, %d are counted as lost", missing, lost)
	}
	if swaps != flips && (missing == 0 || swaps > flips) {
		t.Errorf("the packets have changed sets %d times, the rules %d times", swaps, flips)
	}
}

// copyOf is the packet that a copy was made from.
type copyOf struct {
	flow uint32
	seq  uint64
}

type captured struct {
	copyOf
	port int
}

// capture records the numbered packets of one sender that arrive at a tap, and counts those of the
// next one.
type capture struct {
	last    atomic.Uint64
	highest [len(flipSets[0])]atomic.Uint64 // number of the first sender's packets of each rule
	end     chan struct{}
	ended   chan struct{}

	mu  sync.Mutex
	all []captured
}

func newCapture(t *testing.T, tap *labtest.Tap) *capture {
	t.Helper()
	c := &capture{end: make(chan struct{}), ended: make(chan struct{})}
	go func() {
		var stream uint64
		known := false
		defer close(c.ended)
		for {
			frame := tap.Receive(10*time.Millisecond, nil)
			if frame == nil {
				select {
				case <-c.end: // and nothing is left
					return
				default:
					continue
				}
			}
			if len(frame) < 42 || frame[23] != 17 { // Ethernet, IPv4 without options, UDP
				continue
			}
			h, err := traffic.Decode(frame[42:])
			if err != nil {
				continue
			}
			if known && h.Stream != stream {
				c.last.Add(1)
				continue
			}
			stream, known = h.Stream, true
			if int(h.Flow) < len(c.highest) {
				c.highest[h.Flow].Store(max(c.highest[h.Flow].Load(), h.Seq))
			}
			c.mu.Lock()
			c.all = append(c.all, captured{copyOf{h.Flow, h.Seq}, int(binary.BigEndian.Uint16(frame[36:]))})
			c.mu.Unlock()
		}
	}()
	return c
}

// packets adds the packets that copies of have arrived so far.
func (c *capture) packets(to map[copyOf]bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, got := range c.all {
		to[got.copyOf] = true
	}
}

// stop returns the captured packets once no more arrive.
func (c *capture) stop() []captured {
	close(c.end)
	<-c.ended
	return c.all
}
