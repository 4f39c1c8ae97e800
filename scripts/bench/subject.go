package main

import (
	"context"
	"fmt"
	"os/exec"
)

// subject is something that forwards, and how it is started.
type subject struct {
	name string
	what string // in a line, for the report
	// rewrites says that each output gets a destination of its own.
	rewrites bool
	direct   bool // the source is connected to the sink
	sinks    int  // most hosts that its outputs go to, where these are more than mostSinks
	// most is the largest setup that it can do; zero is no limit.
	most setup
	// programs must be installed.
	programs []string
	start    func(ctx context.Context, n *network, o options) (*running, error)
}

// running is a subject that forwards.
type running struct {
	stop func() error
	pids []int // its processes, if it has any
	// kernelMemory is what its maps take, nil where it has none to speak of.
	kernelMemory func() (uint64, error)
	// account is what the subject itself says of its packets, nil where it does not.
	account func(ctx context.Context) (account, error)
	// applied is how long it took to take in its rules, in seconds, if it has any.
	applied float64
	// restart kills the control loop and starts it again, nil where there is none.
	restart func(ctx context.Context) error
}

// account is what a subject counted since it started.
type account struct {
	Matched uint64 `json:"matched"` // packets that came in
	Sent    uint64 `json:"sent"`    // copies that went out
	Dropped uint64 `json:"dropped"` // copies, and packets times outputs, that it says it dropped
}

// comparison is what a subject says of its packets beside what the bench saw.
type comparison struct {
	account
	// Offered is copies that should have gone out, Received those that arrived.
	Offered  uint64 `json:"offered"`
	Received uint64 `json:"received"`
	// Unaccounted is copies that neither arrived nor were counted as dropped by the
	// subject: what its input interface lost before it saw them, or a mistake.
	Unaccounted int64 `json:"unaccounted"`
}

// compare asks the subject for its account; nil when it keeps none.
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
	return c, nil
}

func nothing() error { return nil }

// can says why a subject cannot be measured with a setup, or nothing.
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

// subjects are all there are, in the order of the report.
func subjects() []subject {
	return []subject{
		direct(), lossy(), xdpcast("kernel"), xdpcast("afxdp"), xdpcast("fanout"),
		redirect(), broadcast(), referenceAFXDP(), multicastRouting(), mirroredRouting(), mirred(), netdevDup(), socat(),
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
