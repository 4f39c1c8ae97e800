package main

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"xdpcast/internal/lab"
	"xdpcast/internal/live"
)

// arrived is what reached the sinks in a trial.
type arrived struct {
	packets uint64
	outputs []uint64 // packets per output; per sink if they are not rewritten
	bytes   uint64
	missing uint64 // sequence numbers skipped
	late    uint64 // sequence numbers skipped or seen before
	address uint64 // with a destination that no output has
	stray   uint64 // from an earlier trial
	last    uint64 // arrival of the last one, in nanoseconds of CLOCK_MONOTONIC
	latency histogram
}

// sinks are the programs at the end of each path.
type sinks struct {
	objs []*sinkObjects
}

// newSinks loads a program for each host and attaches it to the host's eth0 for the lifetime of the
// namespace. The caller closes the result.
func newSinks(hosts []*lab.Host, s setup, rewritten bool) (_ *sinks, err error) {
	all := &sinks{}
	defer func() {
		if err != nil {
			err = errors.Join(err, all.close())
		}
	}()
	for i, host := range hosts {
		objs, err := loadSinkOf(s, i, rewritten)
		if err != nil {
			return nil, fmt.Errorf("load sink: %w", err)
		}
		all.objs = append(all.objs, objs)
		if err := host.Do(func() error { return live.Attach("eth0", objs.Sink) }); err != nil {
			return nil, err
		}
	}
	return all, nil
}

func loadSinkOf(s setup, i int, rewritten bool) (*sinkObjects, error) {
	spec, err := loadSink()
	if err != nil {
		return nil, err
	}
	values := map[string]any{
		"rewritten": uint32(0), "this_sink": uint32(i), "outputs": uint32(s.Outputs), "flows": uint32(s.Flows),
		"first_out": number(firstOut), "out_port": uint16(outPort), "port": uint16(groupPort),
		"first_group": number(firstGroup), "last_group": number(firstGroup) + uint32(s.Rules-1),
	}
	if rewritten {
		values["rewritten"] = uint32(1)
	}
	if err := live.SetVariables(spec.Variables, values); err != nil {
		return nil, err
	}
	spec.Maps["expected"].MaxEntries = uint32(maxOutputs * s.Flows)
	objs := new(sinkObjects)
	return objs, spec.LoadAndAssign(objs, nil)
}

func (s *sinks) close() error {
	var errs []error
	for _, o := range s.objs {
		errs = append(errs, o.Close())
	}
	return errors.Join(errs...)
}

// expect resets the counters; from then on only frames of this trial count.
func (s *sinks) expect(trial uint32, ordered, timed bool) error {
	flag := map[bool]uint32{true: 1}
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return err
	}
	for _, o := range s.objs {
		for output := range uint32(maxOutputs) {
			if err := o.ArrivedAt.Put(output, make([]sinkArrived, cpus)); err != nil {
				return fmt.Errorf("clear sink: %w", err)
			}
		}
		if err := errors.Join(
			o.Wrongs.Put(uint32(0), make([]sinkWrong, cpus)), o.Latency.Put(uint32(0), make([]sinkHistogram, cpus)),
			o.Trial.Set(trial), o.Ordered.Set(flag[ordered]), o.Timed.Set(flag[timed])); err != nil {
			return fmt.Errorf("clear sink: %w", err)
		}
	}
	return nil
}

// packets returns the number of packets that arrived.
func (s *sinks) packets(outputs int) (n uint64, err error) {
	for _, o := range s.objs {
		for output := range uint32(outputs) {
			var perCPU []sinkArrived
			if err := o.ArrivedAt.Lookup(output, &perCPU); err != nil {
				return 0, fmt.Errorf("read sink: %w", err)
			}
			for _, a := range perCPU {
				n += a.Packets
			}
		}
	}
	return n, nil
}

// read returns everything that arrived.
func (s *sinks) read(outputs int) (arrived, error) {
	all := arrived{outputs: make([]uint64, outputs)}
	for _, o := range s.objs {
		for output := range uint32(outputs) {
			var perCPU []sinkArrived
			if err := o.ArrivedAt.Lookup(output, &perCPU); err != nil {
				return arrived{}, fmt.Errorf("read sink: %w", err)
			}
			for _, a := range perCPU {
				all.packets += a.Packets
				all.outputs[output] += a.Packets
				all.bytes += a.Bytes
				all.missing += a.Missing
				all.late += a.Late
				all.last = max(all.last, a.Last)
			}
		}
		var wrongs []sinkWrong
		var latency []sinkHistogram
		if err := errors.Join(o.Wrongs.Lookup(uint32(0), &wrongs), o.Latency.Lookup(uint32(0), &latency)); err != nil {
			return arrived{}, fmt.Errorf("read sink: %w", err)
		}
		for _, w := range wrongs {
			all.address += w.Address
			all.stray += w.Stray
		}
		for i := range latency {
			all.latency.add(&latency[i].Buckets)
		}
	}
	return all, nil
}
