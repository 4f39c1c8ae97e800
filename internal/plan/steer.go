package plan

import (
	"fmt"

	"xdpcast/internal/network"
)

// Steering says when packets of the fanout path are spread over the workers' CPUs.
type Steering uint8

// The choices. Auto steers on network cards in native XDP mode that have fewer receive queues than
// there are workers. A device without hardware already receives on its sender's CPU, and its frames
// may lack the checksum, a flag that is lost on the way to another CPU.
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

// ParseSteering parses the output of String.
func ParseSteering(s string) (Steering, error) {
	for _, choice := range []Steering{SteerAuto, SteerOn, SteerOff} {
		if s == choice.String() {
			return choice, nil
		}
	}
	return 0, fmt.Errorf("steering %q: want auto, on or off", s)
}

// steers says whether the packets of an input on the fanout path are steered.
func (o *Options) steers(in *network.Link, a Attached) bool {
	if o.Steering == SteerOff || !in.Ethernet || a.Err != nil || a.Generic || o.Steering == SteerAuto && !in.Hardware {
		return false
	}
	return in.Queues > 0 && in.Queues < o.FanoutWorkers
}
