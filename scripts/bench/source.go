package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
)

// plan is what the source sends.
type plan struct {
	trial   uint32
	frames  int
	rate    float64 // frames per second; 0: as fast as possible
	batch   int     // most frames sent at once
	stamped bool
	first   uint32 // number of each flow's first frame
}

// sent is what the source did.
type sent struct {
	frames uint64 // of one leg
	// started and ended are when the first and last frames were sent, in nanoseconds of
	// CLOCK_MONOTONIC.
	started, ended uint64
	// waited is the time the source's CPUs spent waiting for the next frame to be due, and setUp
	// the kernel's time before and after.
	waited, setUp time.Duration
}

// rate is in frames per second.
func (s sent) rate() float64 { return float64(s.frames) / (float64(s.ended-s.started) / 1e9) }

// source sends frames from the source host. It is not safe for concurrent use.
type source interface {
	// send sends as planned, or less if ctx ends, which is an error.
	send(ctx context.Context, p plan) (sent, error)
	close() error
}

// newSource returns a source that sends the same frames on each of the host's interfaces. The caller
// closes it.
func newSource(host *lab.Host, s setup, ifnames []string) (source, error) {
	if s.Frame > liveFrame && len(ifnames) == 1 {
		return newXSKSource(host, s)
	}
	return newLiveSource(host, s, ifnames)
}

// liveSource sends by BPF_PROG_RUN with live frames: one program per CPU.
type liveSource struct {
	host  *lab.Host
	legs  int
	frame []byte
	parts []part
}

// part sends a share of the flows on one interface.
type part struct {
	*sourceObjects
	ifindex int
}

func newLiveSource(host *lab.Host, s setup, ifnames []string) (_ *liveSource, err error) {
	src := &liveSource{host: host, legs: len(ifnames), frame: s.template()}
	defer func() {
		if err != nil {
			err = errors.Join(err, src.close())
		}
	}()
	for _, name := range ifnames {
		l, err := host.Link(name)
		if err != nil {
			return nil, err
		}
		for i := range s.Queues {
			objs, err := loadPart(s, src.frame, i)
			if err != nil {
				return nil, fmt.Errorf("load source: %w", err)
			}
			src.parts = append(src.parts, part{objs, l.Attrs().Index})
		}
	}
	return src, nil
}

func loadPart(s setup, frame []byte, i int) (*sourceObjects, error) {
	spec, err := loadSource()
	if err != nil {
		return nil, err
	}
	h := newHeader(frame)
	if err := set(spec.Variables, map[string]any{
		"header": h.words, "ip_sum": h.ipSum, "udp_sum": h.udpSum,
		"first_group": number(firstGroup), "group_step": uint32(s.groupStep()), "first_port": uint16(flowPort),
		"first_flow": uint32(i), "flow_step": uint32(s.Queues), "flows": uint32(s.Flows),
	}); err != nil {
		return nil, err
	}
	objs := new(sourceObjects)
	return objs, spec.LoadAndAssign(objs, nil)
}

// set sets variables of a program before it is loaded.
func set(vars map[string]*ebpf.VariableSpec, values map[string]any) error {
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

func (s *liveSource) close() error {
	var errs []error
	for _, p := range s.parts {
		errs = append(errs, p.Close())
	}
	return errors.Join(errs...)
}

func (s *liveSource) send(ctx context.Context, p plan) (sent, error) {
	var group errgroup.Group
	done := make([]sent, len(s.parts))
	for i, part := range s.parts {
		share := p
		share.rate /= float64(len(s.parts) / s.legs)
		share.frames /= len(s.parts) / s.legs
		group.Go(func() error {
			return s.host.Do(func() (err error) {
				done[i], err = s.run(ctx, part, share, i)
				return err
			})
		})
	}
	if err := group.Wait(); err != nil {
		return sent{}, err
	}
	all := sent{started: math.MaxUint64}
	for _, d := range done {
		all.frames += d.frames
		all.waited += d.waited
		all.setUp += d.setUp
		all.started, all.ended = min(all.started, d.started), max(all.ended, d.ended)
	}
	all.frames /= uint64(s.legs)
	return all, ctx.Err()
}

// xdpMD is struct xdp_md of include/uapi/linux/bpf.h.
type xdpMD struct {
	Data, DataEnd, DataMeta, IngressIfindex, RxQueueIndex, EgressIfindex uint32
}

// run sends a part on its own thread, which it pins to one CPU.
func (s *liveSource) run(ctx context.Context, part part, p plan, cpu int) (sent, error) {
	if err := pin(cpu); err != nil {
		return sent{}, err
	}
	interval := uint64(0)
	if p.rate > 0 {
		interval = uint64(math.Round(1e9 / p.rate * (1 << 16)))
	}
	stamped := uint32(0)
	if p.stamped {
		stamped = 1
	}
	v := &part.sourceVariables
	if err := errors.Join(v.Trial.Set(p.trial), v.Stamped.Set(stamped), v.Limit.Set(uint64(p.frames)), v.Interval.Set(interval),
		v.Batch.Set(uint32(p.batch)), v.FirstSeq.Set(p.first), v.Sent.Set(uint64(0)), v.Waited.Set(uint64(0))); err != nil {
		return sent{}, fmt.Errorf("set source: %w", err)
	}
	// When ctx ends, the rest is not sent.
	defer context.AfterFunc(ctx, func() { _ = v.Limit.Set(uint64(0)) })()
	before, err := threadTime()
	if err != nil {
		return sent{}, err
	}
	// A signal makes the kernel restart the run; the program stops at its limit.
	if _, err := part.Source.Run(&ebpf.RunOptions{
		Data: s.frame, Repeat: uint32(p.frames), Flags: unix.BPF_F_TEST_XDP_LIVE_FRAMES, BatchSize: uint32(p.batch),
		Context: xdpMD{DataEnd: uint32(len(s.frame)), IngressIfindex: uint32(part.ifindex)},
	}); err != nil {
		return sent{}, fmt.Errorf("send live frames: %w", err)
	}
	after, err := threadTime()
	if err != nil {
		return sent{}, err
	}
	var d sent
	var waited uint64
	if err := errors.Join(v.Sent.Get(&d.frames), v.Started.Get(&d.started), v.Ended.Get(&d.ended), v.Waited.Get(&waited)); err != nil {
		return sent{}, fmt.Errorf("read source: %w", err)
	}
	d.waited = time.Duration(waited)
	d.setUp = max(after-before-time.Duration(d.ended-d.started), 0)
	return d, nil
}

// pin pins the calling thread to a CPU. With fewer CPUs, threads share them.
func pin(cpu int) error {
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
