// Package demo implements "xdpcast demo": a lab of network namespaces with a real relay in the
// middle, five streams through it, and a check of every packet.
//
//	demo.go     Run and its Config: the order of events
//	lab.go      the hosts, their cables, and their removal
//	relay.go    the relay, a process of the program itself
//	process.go  processes held by pidfd, and those that run inside a lab
//	streams.go  the streams: rules, senders, receivers
//	verdict.go  what was sent, counted and received, compared
//	keep.go     the commands to try in a lab that stays
//
// It needs root. Everything it makes has names that begin with Config.Prefix, so it touches no
// other relay on the host.
package demo

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
)

// DefaultPrefix is the default Config.Prefix.
const DefaultPrefix = "xdpcast"

// MaxPackets is the maximum number of packets of a demo: Rate times Duration.
const MaxPackets = 1e9

// maxPrefix leaves room for the socket's path in struct sockaddr_un.
const maxPrefix = 32

// Config configures a demo. All fields except Keep are required.
type Config struct {
	// Prefix is the prefix of the lab's names; see CheckPrefix.
	Prefix string
	// Program is the path of the xdpcast program, which runs as the relay.
	Program string
	// Rate is in packets a second, of all streams together; at least 1.
	Rate float64
	// Duration is how long the sources send.
	Duration time.Duration
	// Keep leaves the lab and its relay once there is a verdict, whatever it is.
	Keep bool
	// Interval is the interval of Observer.Progress.
	Interval time.Duration
	Observer Observer
}

// Observer follows a demo. Run calls its methods sequentially.
type Observer interface {
	// Ready is called when the relay has its rules and nothing has been sent yet. Its error ends
	// the demo.
	Ready(Lab) error
	// Flowing is called when the streams begin.
	Flowing()
	// Progress is called with the totals so far, and with done at the end.
	Progress(elapsed time.Duration, now Figures, done bool)
}

// Lab describes a lab that is ready.
type Lab struct {
	// Source, Relay and Sinks are names of network namespaces.
	Source, Relay string
	Sinks         []string
	// PID is the relay's; Active is the number of its active rules.
	PID, Active int
	// Modes are the XDP modes of the relay's interfaces, sorted; empty for none.
	Modes []string
	// Rules are those of the streams, in the order of the verdict.
	Rules []control.Rule
}

// CheckPrefix checks that a prefix is valid in the names of files, namespaces and pins.
func CheckPrefix(prefix string) error {
	const letters = "abcdefghijklmnopqrstuvwxyz0123456789-"
	if prefix == "" || len(prefix) > maxPrefix || prefix[0] == '-' || strings.Trim(prefix, letters) != "" {
		return fmt.Errorf("name %q: want 1 to %d of a to z, 0 to 9 and -, the first not a -", prefix, maxPrefix)
	}
	return nil
}

// Run builds the lab, sends the streams and removes the lab. The verdict is nil if none was
// reached; there may be a verdict and an error from the removal. If ctx ends, the demo ends without
// a verdict.
func Run(ctx context.Context, cfg Config) (*Verdict, error) { return newDemonstration(cfg).run(ctx) }

// demonstration is the state of a running demo.
type demonstration struct {
	Config
	places  places
	streams []stream
	hosts   map[string]*lab.Host
	relay   *relayProcess
	client  *control.Client
}

func newDemonstration(cfg Config) *demonstration {
	p := places{cfg.Prefix}
	return &demonstration{Config: cfg, places: p, streams: testStreams(), hosts: map[string]*lab.Host{}, client: control.NewClient(p.socket())}
}

func (d *demonstration) run(ctx context.Context) (*Verdict, error) {
	if err := d.places.claim(); err != nil {
		return nil, err
	}
	v, err := d.play(ctx)
	if ctx.Err() != nil {
		v, err = nil, errors.New("interrupted before there was a verdict")
	}
	if err == nil && d.Keep {
		v.Commands = d.places.commands(d.Program)
		return v, d.release()
	}
	return v, errors.Join(err, d.clean())
}

// play runs everything between claiming the names and the removal.
func (d *demonstration) play(ctx context.Context) (*Verdict, error) {
	if err := d.build(); err != nil {
		return nil, err
	}
	if err := d.startRelay(); err != nil {
		return nil, err
	}
	status, err := d.waitReady(ctx)
	if err != nil {
		return nil, err
	}
	if err := d.Observer.Ready(d.describe(status)); err != nil {
		return nil, err
	}
	outcomes, err := d.transmit(ctx)
	if err != nil {
		return nil, err
	}
	stats, err := d.stats(ctx)
	if err != nil {
		return nil, err
	}
	return judge(outcomes, stats), nil
}

func (d *demonstration) describe(s control.Status) Lab {
	l := Lab{Source: d.places.namespace(sourceHost), Relay: d.places.namespace(relayHost), PID: s.PID, Active: s.Active}
	for _, host := range sinkHosts() {
		l.Sinks = append(l.Sinks, d.places.namespace(host))
	}
	modes := map[string]bool{}
	for _, i := range s.Interfaces {
		modes[i.Mode] = true
	}
	l.Modes = slices.Sorted(maps.Keys(modes))
	for _, s := range d.streams {
		l.Rules = append(l.Rules, s.rule)
	}
	return l
}
