package loader

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
)

// cpuQueue is how many frames can be queued for a CPU: 4 ms of buffering at 1 Mpps, about one
// scheduler slice. The kernel allows 16384.
const cpuQueue = 4096

// MaxSteering is the maximum number of CPUs to steer packets to.
const MaxSteering = bpf.MaxSteered

// SetSteering sets the CPUs, at most 64, over which the packets of Steered rules are spread; none
// leaves them where they arrive. It takes effect with the next Sync. If it fails, packets stay
// where they arrive, and Warnings says so.
func (l *Loader) SetSteering(cpus []int) error {
	if len(cpus) > bpf.MaxSteered {
		return fmt.Errorf("steer to %d CPUs: want at most %d", len(cpus), bpf.MaxSteered)
	}
	for i, cpu := range cpus {
		if cpu < 0 || uint32(cpu) >= l.maps.Cpus.MaxEntries() || slices.Contains(cpus[:i], cpu) {
			return fmt.Errorf("steer to CPUs %v: want each once, and below %d", cpus, l.maps.Cpus.MaxEntries())
		}
	}
	l.steerTo = slices.Clone(cpus)
	return nil
}

// steer creates the queues to the CPUs while a rule needs them: each is a kernel thread.
func (l *Loader) steer(steered bool) {
	var want []int
	if steered {
		want = l.steerTo
	}
	if l.steeringKnown && slices.Equal(want, l.steering) {
		return
	}
	err := l.makeQueues(want)
	if err != nil && l.steeringFault == nil {
		l.log.Warn("packets are not steered to CPUs", "error", err)
	}
	l.steeringFault, l.steeringKnown = err, err == nil
}

// makeQueues creates the queues before packets go there, and removes those of other CPUs
// afterwards.
func (l *Loader) makeQueues(cpus []int) error {
	for _, cpu := range cpus {
		// An existing queue stays: with a new one, packets could overtake those in the old one.
		var there bpf.RelayBpfCpumapVal
		err := l.maps.Cpus.Lookup(uint32(cpu), &there)
		if err == nil && there.Qsize == cpuQueue {
			continue
		}
		if err := l.maps.Cpus.Put(uint32(cpu), &bpf.RelayBpfCpumapVal{Qsize: cpuQueue}); err != nil {
			return fmt.Errorf("make a queue to CPU %d: %w", cpu, err)
		}
	}
	before := l.steering
	l.steering = cpus
	if err := l.writeConfig(); err != nil {
		l.steering = before
		return err
	}
	for cpu := range l.maps.Cpus.MaxEntries() {
		if slices.Contains(cpus, int(cpu)) {
			continue
		}
		if err := l.maps.Cpus.Delete(cpu); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("take away the queue to CPU %d: %w", cpu, err)
		}
	}
	return nil
}

func (l *Loader) steeringWarnings() []string {
	if l.steeringFault == nil {
		return nil
	}
	return []string{fmt.Sprintf("packets are not steered to CPUs: %v", l.steeringFault)}
}

// adoptSteering continues with the current state of the programs.
func (l *Loader) adoptSteering(config *bpf.RelayConfig) error {
	if config.Steered > bpf.MaxSteered {
		return damaged(l.opts.PinDir, fmt.Errorf("map config steers to %d CPUs, want at most %d", config.Steered, bpf.MaxSteered))
	}
	l.steering = nil
	for _, cpu := range config.Cpu[:config.Steered] {
		l.steering = append(l.steering, int(cpu))
	}
	return nil
}

// readCPUDrops reads how many frames were lost on their way to CPUs.
func readCPUDrops(m *ebpf.Map) (sum uint64, err error) {
	var perCPU []uint64
	if err := m.Lookup(uint32(0), &perCPU); err != nil {
		return 0, fmt.Errorf("read map cpu_drops: %w", err)
	}
	for _, n := range perCPU {
		sum += n
	}
	return sum, nil
}
