package main

import (
	"context"
	"fmt"
	"os/exec"
)

// subject is a forwarder, and how to start it.
type subject struct {
	name string
	what string // one line, for the report
	// rewrites says that each output has its own destination.
	rewrites bool
	direct   bool // source connected directly to the sink
	sinks    int  // number of sink hosts, if more than mostSinks
	legs     int  // inputs, each of which brings every frame, if more than one; copies may overtake each other
	// spins says that its thread never sleeps: it loses frames wherever it has no CPU to itself, and is
	// stopped while others take their turns.
	spins bool
	// most is the largest setup supported; zero is no limit.
	most setup
	// programs must be installed.
	programs []string
	start    func(ctx context.Context, n *network, o options) (*running, error)
}

// running is a subject that is forwarding.
type running struct {
	stop func() error
	pids []int // its processes, if any
	// kernelMemory returns the memory of its maps; nil if that is negligible.
	kernelMemory func() (uint64, error)
	// account returns the subject's own packet counts; nil if it keeps none.
	account func(ctx context.Context) (account, error)
	// applied is the time it took to apply its rules, in seconds, if it has any.
	applied float64
	// restart kills the control loop and starts it again; nil if there is none.
	restart func(ctx context.Context) error
}

// account is what a subject counted since it started.
type account struct {
	Matched uint64 `json:"matched"` // packets received
	Sent    uint64 `json:"sent"`    // copies sent
	Dropped uint64 `json:"dropped"` // copies, and packets times outputs, reported as dropped
}

// comparison sets a subject's own counts against what the bench saw.
type comparison struct {
	account
	// Offered is copies that should have been sent, Received those that arrived.
	Offered  uint64 `json:"offered"`
	Received uint64 `json:"received"`
	// Unaccounted is copies that neither arrived nor were counted as dropped by the subject: lost
	// by its input interface before it saw them, or a bug.
	Unaccounted int64 `json:"unaccounted"`
}

// compare reads the subject's account; nil if it keeps none.
func (b *bench) compare(ctx context.Context) (*comparison, error) {
	if b.running.account == nil {
		return nil, nil
	}
	said, err := b.running.account(ctx)
	if err != nil {
		return nil, fmt.Errorf("account of %s: %w", b.subject.name, err)
	}
	c := &comparison{account: said, Offered: b.frames * uint64(b.network.setup.Outputs), Received: b.copies}
	c.Unaccounted = int64(c.Offered) - int64(c.Received) - int64(said.Dropped)
	if b.subject.legs > 1 {
		c.Unaccounted = max(c.Unaccounted, 0) // a copy dropped as late may have been relayed from another leg
	}
	return c, nil
}

func nothing() error { return nil }

// can returns why a subject cannot be measured with a setup, "" if it can.
func (s subject) can(with setup) string {
	for _, p := range s.programs {
		if _, err := exec.LookPath(p); err != nil {
			return fmt.Sprintf("%s is not installed: scripts/setup --bench installs it", p)
		}
	}
	for _, limit := range []struct {
		what       string
		have, most int
	}{
		{"outputs", with.Outputs, s.most.Outputs}, {"bytes", with.Frame, s.most.Frame}, {"rules", with.Rules, s.most.Rules},
		{"flows", with.Flows, s.most.Flows}, {"queues", with.Queues, s.most.Queues},
	} {
		if limit.most > 0 && limit.have > limit.most {
			return fmt.Sprintf("%s can do at most %d %s", s.name, limit.most, limit.what)
		}
	}
	return ""
}

// subjects are all subjects, in the order of the report.
func subjects() []subject {
	return []subject{
		direct(), lossy(), xdpcast("kernel"), xdpcast("afxdp"), xdpcast("fanout"), merging(),
		redirect(), broadcast(), referenceAFXDP(), testpmd("af_packet"), testpmd("af_xdp"), multicastRouting(), mirroredRouting(), mirred(), netdevDup(), socat(),
	}
}

// named returns the subjects with these names.
func named(names []string) ([]subject, error) {
	var found []subject
next:
	for _, name := range names {
		for _, s := range subjects() {
			if s.name == name {
				found = append(found, s)
				continue next
			}
		}
		var all []string
		for _, s := range subjects() {
			all = append(all, s.name)
		}
		return nil, fmt.Errorf("subject %q: want one of %v", name, all)
	}
	return found, nil
}
