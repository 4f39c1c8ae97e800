package relay

import (
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"xdpcast/pkg/forward"
	"xdpcast/pkg/loader"
)

// Steering says when packets of the fanout path are spread over the workers' CPUs.
type Steering uint8

// The choices. Auto does so on network cards in native XDP mode that have fewer receive
// queues than there are workers. A device without hardware receives on its sender's CPU,
// and its frames may lack the checksum, which is lost on the way to another CPU.
const (
	SteerAuto Steering = iota
	SteerOn            // on every interface in native mode with too few queues
	SteerOff
)

func (s Steering) String() string {
	switch s {
	case SteerOn:
		return "on"
	case SteerOff:
		return "off"
	default:
		return "auto"
	}
}

// ParseSteering reads what String writes.
func ParseSteering(s string) (Steering, error) {
	for _, choice := range []Steering{SteerAuto, SteerOn, SteerOff} {
		if s == choice.String() {
			return choice, nil
		}
	}
	return 0, fmt.Errorf("steering %q: want auto, on or off", s)
}

// setUpSteering chooses the CPUs: of those that the process may use one for each
// worker, since PACKET_FANOUT_CPU takes the remainder of a CPU's number by that of the
// workers.
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

// maxCPU is more than the size of unix.CPUSet.
const maxCPU = 1024

// steerTo returns the first CPU of each worker, at most as many as packets can be
// steered to.
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

// steers says whether the packets of an input are steered.
func (r *Relay) steers(in *iface, attached, generic bool) bool {
	if r.opts.Steering == SteerOff || !attached || generic || r.opts.Steering == SteerAuto && !isHardware(in.index) {
		return false
	}
	queues, err := forward.ReceiveQueues(in.name)
	if err != nil {
		r.log.Debug("receive queues of a device", "interface", in.name, "error", err)
		return false
	}
	return queues < forward.FanoutWorkers(r.opts.Workers)
}

// isHardware says whether an interface has a device behind it, on a bus.
func isHardware(index int) bool {
	link, err := netlink.LinkByIndex(index)
	return err == nil && link.Attrs().ParentDev != ""
}
