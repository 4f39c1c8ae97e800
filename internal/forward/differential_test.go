package forward

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"xdpcast/internal/flowtest"
	"xdpcast/pkg/fanout"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
)

// Inputs and outputs of random rules. An interface's MAC address ends in its index.
var (
	inputs  = []flowtest.Interface{testInterface(1), testInterface(2)}
	devices = []flowtest.Interface{testInterface(3), testInterface(4), testInterface(5)}
)

func testInterface(index int) flowtest.Interface {
	return flowtest.Interface{Index: index, MAC: [6]byte{2, 0, 0, 0, 1, byte(index)}}
}

// newWorld draws random rules and frames for the engine.
func newWorld(seed, stream uint64) *flowtest.World {
	return &flowtest.World{Rand: rand.New(rand.NewPCG(seed, stream)), In: inputs, Out: devices}
}

// unguarded draws rules without the loop guard, which would mark repeated random frames.
// TestGuardDifferential covers it.
func unguarded(w *flowtest.World, set int) []flow.Flow {
	rules := w.Rules(set)
	for i := range rules {
		rules[i].Unguarded = true
	}
	return rules
}

// oracle computes in plain Go the expected copies of a frame, and counts: the same oracle
// with which package loader tests the BPF programs.
type oracle struct {
	rules []flow.Flow
	first flowtest.Ports
	want  map[string]*loader.RuleStats
}

func newOracle(rules []flow.Flow, first flowtest.Ports) *oracle {
	o := &oracle{rules: rules, first: first, want: map[string]*loader.RuleStats{}}
	for _, r := range rules {
		s := &loader.RuleStats{Name: r.Name, Drops: map[loader.Reason]loader.Counter{}}
		for range r.Out {
			s.Outputs = append(s.Outputs, loader.OutputStats{Drops: map[loader.Reason]loader.Counter{}})
		}
		o.want[r.Name] = s
	}
	return o
}

// frame returns the copies by device, in the order of the outputs.
func (o *oracle) frame(index int, frame []byte) (copies map[int][][]byte) {
	copies = map[int][][]byte{}
	h, ok := packet.Parse(frame)
	if !ok {
		return copies
	}
	r := o.first.Find(o.rules, index, frame, &h)
	if r == nil {
		return copies
	}
	stats, one := o.want[r.Name], loader.Counter{Packets: 1, Bytes: uint64(len(frame))}
	count(&stats.Matched, one)
	if reason, drop := o.drop(r, frame, &h); drop {
		countReason(stats.Drops, reason, one)
		return copies
	}
	for slot := range r.Out {
		out := &r.Out[slot]
		sent, reason := copyOf(out, frame, &h)
		if sent == nil {
			countReason(stats.Outputs[slot].Drops, reason, one)
			continue
		}
		count(&stats.Outputs[slot].Sent, one)
		copies[out.Index] = append(copies[out.Index], sent)
	}
	return copies
}

func (o *oracle) drop(r *flow.Flow, frame []byte, h *packet.Headers) (loader.Reason, bool) {
	switch {
	case !r.AllowLoop && ([6]byte(frame[6:12]) == r.In.MAC || slices.Contains(ownAddresses, h.Src)):
		return loader.Loop, true
	case !r.AllowNoChecksum && h.Part != packet.LaterFragment && h.Dst.Is6() && frame[h.UDP+6] == 0 && frame[h.UDP+7] == 0:
		return loader.NoChecksum, true
	default:
		return 0, false
	}
}

func copyOf(out *flow.Output, frame []byte, h *packet.Headers) ([]byte, loader.Reason) {
	if !out.Ready {
		return nil, loader.ReasonOf(out.Blocked)
	}
	if out.TooLong(h, len(frame), int(min(out.MTU, 0xffff)), true) {
		return nil, loader.MTU
	}
	switch sent, outcome := out.Append(nil, frame, h); outcome {
	case packet.EndsByTTL:
		return nil, loader.TTL
	case packet.EndsByPort:
		return nil, loader.Port
	default:
		return append(sent, frame[h.Payload:]...), 0
	}
}

func count(c *loader.Counter, more loader.Counter) {
	c.Packets += more.Packets
	c.Bytes += more.Bytes
}

func countReason(m map[loader.Reason]loader.Counter, reason loader.Reason, more loader.Counter) {
	c := m[reason]
	count(&c, more)
	m[reason] = c
}

// recorder is a sender that records packets, and refuses those that it is told to.
type recorder struct {
	sent    [][]byte
	headers bool // frames lack an Ethernet header
	refuse  func() error
	closed  bool
}

func (r *recorder) Send(packets []fanout.Packet) (int, error) {
	for i, p := range packets {
		if r.refuse != nil {
			if err := r.refuse(); err != nil {
				return i, err
			}
		}
		r.sent = append(r.sent, append(bytes.Clone(p.Header), p.Payload...))
	}
	return len(packets), nil
}

func (r *recorder) Ethernet() bool { return !r.headers }

func (r *recorder) Close() error {
	r.closed = true
	return nil
}

// Random rules and frames: the engine produces the same copies and counters as the
// oracle with which the BPF programs are tested.
func TestDifferential(t *testing.T) {
	w := newWorld(20261123, 1)
	set := NewSet(1)
	senders := map[int]*recorder{}
	engines := map[int]*Engine{}
	for _, input := range inputs {
		e, err := set.NewEngine(input.Index, 0, func(index int) (Sender, error) {
			s := senders[index]
			if s == nil {
				s = &recorder{}
				senders[index] = s
			}
			return s, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		engines[input.Index] = e
	}
	first := flowtest.Ports{}
	frames, matched, sent := 0, uint64(0), uint64(0)
	for n := range 400 {
		rules := unguarded(w, n)
		if err := set.Update(rules, ownAddresses, nil); err != nil {
			t.Fatal(err)
		}
		o := newOracle(rules, first)
		for range 50 {
			index, some := w.Frames(rules)
			for _, s := range senders {
				s.sent = nil
			}
			want := map[int][][]byte{}
			e := engines[index]
			e.Begin()
			for _, frame := range some {
				before := bytes.Clone(frame)
				for device, copies := range o.frame(index, frame) {
					want[device] = append(want[device], copies...)
				}
				e.Frame(index, frame, int64(n+1))
				if !bytes.Equal(before, frame) {
					t.Fatalf("frame %x was changed", before)
				}
				frames++
			}
			e.End()
			for _, device := range devices {
				var got [][]byte
				if s := senders[device.Index]; s != nil {
					got = s.sent
				}
				if !slices.EqualFunc(got, want[device.Index], bytes.Equal) {
					t.Fatalf("frames %x on %d, device %d:\n got  %x\n want %x", some, index, device.Index, got, want[device.Index])
				}
			}
		}
		for _, s := range set.Stats(nil) {
			want := o.want[s.Name]
			matched += s.Matched.Packets
			s.LastSeen = 0
			for slot := range s.Outputs {
				s.Outputs[slot].Rule = flow.Output{}
				sent += s.Outputs[slot].Sent.Packets
			}
			if diff := cmp.Diff(*want, s, cmp.Comparer(func(a, b flow.Output) bool { return true })); diff != "" {
				t.Fatalf("rule %s (-oracle +got):\n%s", s.Name, diff)
			}
		}
	}
	if matched < uint64(frames)/3 || sent < matched {
		t.Errorf("%d of %d frames matched, and %d copies left, which proves little", matched, frames, sent)
	}
	t.Logf("%d frames, %d matched, %d copies", frames, matched, sent)
}
