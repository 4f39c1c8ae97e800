package relay

import (
	"fmt"

	"golang.org/x/sys/unix"

	"xdpcast/internal/forward"
	"xdpcast/pkg/loader"
)

// setUpSteering chooses the CPUs: of those that the process may use one for each worker, since
// PACKET_FANOUT_CPU selects worker CPU modulo the number of workers.
func (r *Relay) setUpSteering() error {
	if r.opts.Steering == SteerOff {
		return nil
	}
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return fmt.Errorf("CPUs of the process: %w", err)
	}
	return r.loader.SetSteering(steerTo(set.IsSet, forward.FanoutWorkers(r.opts.Workers)))
}

// maxCPU exceeds the size of unix.CPUSet.
const maxCPU = 1024

// steerTo returns the first CPU of each worker, at most as many as steering supports.
func steerTo(usable func(cpu int) bool, workers int) (cpus []int) {
	served := map[int]bool{}
	for cpu := range maxCPU {
		if usable(cpu) && !served[cpu%workers] && len(cpus) < loader.MaxSteering {
			served[cpu%workers] = true
			cpus = append(cpus, cpu)
		}
	}
	return cpus
}
