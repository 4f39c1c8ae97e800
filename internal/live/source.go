package live

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"runtime"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// SourceOptions configure a [Source].
type SourceOptions struct {
	// Frame is the frame of flow 0 with an empty tag, MinFrame to MaxFrame bytes: Ethernet, IPv4, UDP.
	Frame []byte
	// Index is the interface's, in the network namespace of the threads that call Send.
	Index int
	// FirstGroup is the destination of flow 0, and GroupStep the distance to that of the next flow.
	FirstGroup netip.Addr
	GroupStep  int
	// FirstPort is the UDP source port of flow 0; each flow has its own.
	FirstPort int
	// Flows is the number of flows. This source sends FirstFlow, FirstFlow + FlowStep, and so on;
	// 0 steps by 1.
	FirstFlow, FlowStep, Flows int
	// StampShift is that of [WitnessOptions]: stamps are in units of 2^StampShift ns.
	StampShift int
	// Mixed sends frames of several lengths in turns, of which Frame is the longest, MixedFrame bytes
	// with a payload of zeros: of each 12, 7 have 60 bytes, 4 have 590 and one MixedFrame.
	Mixed bool
	// Legs are flows that leave by an interface each, set by [Source.SetInterface]: those of a number in
	// one batch, flow 0 first.
	Legs bool
}

// MixedFrame is the longest of mixed frames.
const MixedFrame = 1514

// Source sends frames by BPF_PROG_RUN with live frames. One goroutine at a time uses it, apart from
// Sent.
type Source struct {
	objs  sourceObjects
	frame []byte
	index int
	legs  int // 0: none
}

// NewSource loads the program. The caller must Close it.
func NewSource(o SourceOptions) (*Source, error) {
	if len(o.Frame) < MinFrame || len(o.Frame) > MaxFrame {
		return nil, fmt.Errorf("source: frame of %d bytes: want %d to %d", len(o.Frame), MinFrame, MaxFrame)
	}
	if o.Mixed && len(o.Frame) != MixedFrame {
		return nil, fmt.Errorf("source: mixed frames of at most %d bytes: want %d", len(o.Frame), MixedFrame)
	}
	spec, err := loadSource()
	if err != nil {
		return nil, err
	}
	var mixed uint32
	if o.Mixed {
		mixed = 1
	}
	legs := uint32(0)
	if o.Legs {
		legs = 1
		spec.Maps["interfaces"].MaxEntries = uint32(o.Flows)
		o.FirstFlow, o.FlowStep = 0, 1
	}
	h := NewHeader(o.Frame)
	if err := SetVariables(spec.Variables, map[string]any{
		"header": h.words, "ip_sum": h.IPSum, "udp_sum": h.UDPSum,
		"first_group": number(o.FirstGroup), "group_step": uint32(o.GroupStep), "first_port": uint16(o.FirstPort),
		"first_flow": uint32(o.FirstFlow), "flow_step": uint32(max(o.FlowStep, 1)), "flows": uint32(o.Flows), "stamp_shift": uint32(o.StampShift),
		"mixed": mixed, "legs": legs,
	}); err != nil {
		return nil, err
	}
	s := &Source{frame: o.Frame, index: o.Index}
	if o.Legs {
		s.legs = o.Flows
	}
	if err := spec.LoadAndAssign(&s.objs, nil); err != nil {
		return nil, fmt.Errorf("load source: %w", err)
	}
	return s, nil
}

// SetVariables sets variables of a program before it is loaded.
func SetVariables(vars map[string]*ebpf.VariableSpec, values map[string]any) error {
	for name, value := range values {
		v := vars[name]
		if v == nil {
			return fmt.Errorf("the program has no variable %s", name)
		}
		if err := v.Set(value); err != nil {
			return fmt.Errorf("variable %s: %w", name, err)
		}
	}
	return nil
}

func number(a netip.Addr) uint32 {
	b := a.As4()
	return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
}

// SetInterface sets the interface that a flow leaves by, with Legs: one of the calling thread's network namespace.
func (s *Source) SetInterface(flow, index int) error {
	if err := s.objs.Interfaces.Put(uint32(flow), uint32(index)); err != nil {
		return fmt.Errorf("interface %d of flow %d: %w", index, flow, err)
	}
	return nil
}

// Close frees the program.
func (s *Source) Close() error { return s.objs.Close() }

// Plan is what a source sends.
type Plan struct {
	Trial  uint32  // written into each frame
	Frames int     // at most 2^32-1
	Rate   float64 // frames a second; 0: as fast as possible
	Batch  int     // most frames sent at once, up to 256; 0 means 1; not with Legs
	// Stamped frames carry the time at which they were sent.
	Stamped bool
	First   uint32 // number of each flow's first frame
	// Behind is by how much the source may be late, for want of a CPU, before it gives up frames
	// rather than sending them in a burst; 0: it always catches up.
	Behind time.Duration
	// Silences are the numbers that flow 0 leaves out, while their time passes: ascending, and at
	// most MaxSilences.
	Silences []Silence
}

// Silence is a range of numbers, without To.
type Silence struct{ From, To uint32 }

// MaxSilences is the most silences of a Plan.
const MaxSilences = 31

// turns are the numbers at which flow 0 falls silent and speaks again.
func (p *Plan) turns() (turns [2 * (MaxSilences + 1)]uint32, err error) {
	if len(p.Silences) > MaxSilences {
		return turns, fmt.Errorf("%d silences: want at most %d", len(p.Silences), MaxSilences)
	}
	for i := range turns {
		turns[i] = math.MaxUint32
	}
	last := p.First
	for i, s := range p.Silences {
		if s.From < last || s.To <= s.From {
			return turns, fmt.Errorf("silence %d of numbers %d to %d: want it from %d on, and not empty", i, s.From, s.To, last)
		}
		turns[2*i], turns[2*i+1], last = s.From, s.To, s.To+1
	}
	return turns, nil
}

// Sent is what a source did.
type Sent struct {
	Frames uint64 // with those left out
	// Started and Ended are when the first and last frames were sent, in nanoseconds of
	// CLOCK_MONOTONIC.
	Started, Ended uint64
	// Waited is the time that its CPU spent waiting for the next frame to be due, SetUp the kernel's
	// time before and after, and Shifted what it was late by more than Plan.Behind.
	Waited, SetUp, Shifted time.Duration
}

// xdpMD is struct xdp_md of include/uapi/linux/bpf.h.
type xdpMD struct {
	Data, DataEnd, DataMeta, IngressIfindex, RxQueueIndex, EgressIfindex uint32
}

// Send sends from the calling thread, which must be in the interface's network namespace and use one
// CPU ([Pin]): frames of another CPU may overtake earlier ones. When ctx ends the rest is not
// sent, which is no error.
func (s *Source) Send(ctx context.Context, p Plan) (sent Sent, err error) {
	if p.Frames < 1 || p.Frames > math.MaxUint32 {
		return sent, fmt.Errorf("%d frames: want 1 to %d", p.Frames, uint32(math.MaxUint32))
	}
	p.Batch = max(p.Batch, 1)
	if s.legs > 0 {
		p.Batch = s.legs
	}
	interval := uint64(0)
	if p.Rate > 0 {
		interval = uint64(math.Round(1e9 / p.Rate * (1 << 16)))
	}
	stamped := uint32(0)
	if p.Stamped {
		stamped = 1
	}
	turns, err := p.turns()
	if err != nil {
		return sent, err
	}
	v := &s.objs.sourceVariables
	if err := errors.Join(v.Turns.Set(turns), v.Trial.Set(p.Trial), v.Stamped.Set(stamped), v.Limit.Set(uint64(p.Frames)), v.Interval.Set(interval),
		v.Batch.Set(uint32(p.Batch)), v.FirstSeq.Set(p.First), v.Behind.Set(uint64(p.Behind)), v.Sent.Set(uint64(0)), v.Waited.Set(uint64(0))); err != nil {
		return sent, fmt.Errorf("set source: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = v.Limit.Set(uint64(0)) })()
	before, err := threadTime()
	if err != nil {
		return sent, err
	}
	// A signal makes the kernel restart the run; the program stops at its limit.
	if _, err := s.objs.Source.Run(&ebpf.RunOptions{
		Data: s.frame, Repeat: uint32(p.Frames), Flags: unix.BPF_F_TEST_XDP_LIVE_FRAMES, BatchSize: uint32(p.Batch),
		Context: xdpMD{DataEnd: uint32(len(s.frame)), IngressIfindex: uint32(s.index)},
	}); err != nil {
		return sent, fmt.Errorf("send live frames: %w", err)
	}
	after, err := threadTime()
	if err != nil {
		return sent, err
	}
	var waited, shifted uint64
	if err := errors.Join(v.Sent.Get(&sent.Frames), v.Started.Get(&sent.Started), v.Ended.Get(&sent.Ended), v.Waited.Get(&waited), v.Shifted.Get(&shifted)); err != nil {
		return sent, fmt.Errorf("read source: %w", err)
	}
	sent.Waited, sent.Shifted = time.Duration(waited), time.Duration(shifted)
	sent.SetUp = max(after-before-time.Duration(sent.Ended-sent.Started), 0)
	return sent, nil
}

// Sent returns how many frames the current Send has sent so far.
func (s *Source) Sent() (frames uint64, err error) {
	err = s.objs.sourceVariables.Sent.Get(&frames)
	return frames, err
}

// Pin pins the calling thread to a CPU. With fewer CPUs, threads share them.
func Pin(cpu int) error {
	var set unix.CPUSet
	set.Set(cpu % runtime.NumCPU())
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("keep a thread to CPU %d: %w", cpu, err)
	}
	return nil
}

// threadTime is the processor time used by the calling thread.
func threadTime() (time.Duration, error) {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		return 0, fmt.Errorf("processor time of the thread: %w", err)
	}
	return time.Duration(t.Nano()), nil
}
