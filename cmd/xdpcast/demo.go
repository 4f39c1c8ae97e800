package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/lab"
	"xdpcast/pkg/control"
	"xdpcast/pkg/traffic"
)

const (
	demoPrefix = "xdpcast"
	// maxDemoPrefix leaves room for the socket's path in struct sockaddr_un.
	maxDemoPrefix = 32
	// maxDemoPackets is the most that a demonstration sends.
	maxDemoPackets = 1e9
	// liveInterval is between two live lines.
	liveInterval = time.Second
)

func demoCommand() *cli.Command {
	return &cli.Command{
		Name:  "demo",
		Usage: "relay test streams through a lab of network namespaces, and judge every packet",
		Description: "Makes a source, a relay and three sinks, each in a network namespace of its own, and removes\n" +
			"them in the end. The relay is a real one, with its own pins and socket: it does not touch one\n" +
			"that runs already. Four streams go through rules that rewrite them, and what arrives is\n" +
			"compared with what the rules say. The exit code is 0 only if every packet arrived so.\n\n" +
			"With --keep the lab stays, with its relay running, and commands to try in it are shown.",
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "duration", Usage: "send for this `TIME`", Value: 5 * time.Second},
			&cli.StringFlag{Name: "rate", Usage: "packets a second, of all streams together: `RATE` such as 20k", Value: "20k"},
			&cli.BoolFlag{Name: "keep", Usage: "leave the lab and its relay, and show commands to try"},
			&cli.BoolFlag{Name: "remove", Usage: "remove a lab that was kept, or left by a demonstration that was killed"},
			&cli.StringFlag{Name: "prefix", Usage: "begin the names of the lab with `NAME`, so that several can stand side by side", Value: demoPrefix},
			outputFlag(),
		},
		Action: func(c *cli.Context) error {
			cfg, err := demoConfigOf(c)
			switch {
			case err != nil:
				return err
			case os.Geteuid() != 0:
				return errors.New("demo: run it as root: it makes network namespaces and loads programs into the kernel")
			case c.Bool("remove"):
				return demoError(removeKept(cfg.places))
			default:
				return runDemo(c, cfg)
			}
		},
	}
}

// demoConfig is what a demonstration is to do.
type demoConfig struct {
	places  labPlaces
	streams []stream
	rate    float64 // packets a second of all streams
	length  time.Duration
	keep    bool
	every   time.Duration // between two live lines
	live    io.Writer
}

// demoConfigOf reads the command line. Its errors are of usage.
func demoConfigOf(c *cli.Context) (demoConfig, error) {
	cfg := demoConfig{
		places: labPlaces{c.String("prefix")}, streams: demoStreams(),
		length: c.Duration("duration"), keep: c.Bool("keep"), every: liveInterval, live: c.App.Writer,
	}
	if err := nargs(c, 0, 0); err != nil {
		return cfg, err
	}
	asJSON, err := wantJSON(c)
	if err != nil {
		return cfg, err
	}
	if asJSON {
		cfg.live = io.Discard
	}
	if err := checkPrefix(cfg.places.prefix); err != nil {
		return cfg, usagef("--prefix: %w", err)
	}
	if c.Bool("keep") && c.Bool("remove") {
		return cfg, usagef("%s: want either --keep or --remove", commandPath(c))
	}
	rate, err := traffic.ParseRate(c.String("rate"))
	switch {
	case err != nil:
		return cfg, usagef("--rate: %w", err)
	case rate.Bits || rate.Value < 1:
		return cfg, usagef("--rate %s: want packets a second, such as 20k", c.String("rate"))
	case cfg.length <= 0:
		return cfg, usagef("--duration %v: want more than 0s", cfg.length)
	case rate.Value*cfg.length.Seconds() > maxDemoPackets:
		return cfg, usagef("--rate %s for %v: want at most %g packets in all", c.String("rate"), cfg.length, float64(maxDemoPackets))
	}
	cfg.rate = rate.Value
	return cfg, nil
}

// checkPrefix takes what can stand in file names, network namespaces and pins.
func checkPrefix(prefix string) error {
	const letters = "abcdefghijklmnopqrstuvwxyz0123456789-"
	if prefix == "" || len(prefix) > maxDemoPrefix || prefix[0] == '-' || strings.Trim(prefix, letters) != "" {
		return fmt.Errorf("name %q: want 1 to %d of a to z, 0 to 9 and -, the first not a -", prefix, maxDemoPrefix)
	}
	return nil
}

// runDemo shows the demonstration, and fails if anything was not as it must be.
func runDemo(c *cli.Context, cfg demoConfig) error {
	v, err := newDemo(cfg).run(c.Context)
	if v == nil {
		return demoError(err)
	}
	showErr := show(c, v, func(w io.Writer) error { return v.write(w) })
	if err := errors.Join(showErr, demoError(err)); err != nil {
		return err
	}
	if !v.OK {
		return cli.Exit("", exitFailed) // the verdict says why
	}
	return nil
}

func demoError(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("demo: %w", withRootHint(err))
}

// demo is a demonstration and what it holds.
type demo struct {
	demoConfig
	hosts  map[string]*lab.Host
	relay  *relayProcess
	client *control.Client
}

func newDemo(cfg demoConfig) *demo {
	return &demo{demoConfig: cfg, hosts: map[string]*lab.Host{}, client: control.NewClient(cfg.places.socket())}
}

// run builds the lab, plays the streams and removes the lab. The verdict is nil
// when none was reached; there may be one and an error, of the removal.
func (d *demo) run(ctx context.Context) (*verdict, error) {
	if err := d.places.claim(); err != nil {
		return nil, err
	}
	v, err := d.play(ctx)
	if ctx.Err() != nil {
		v, err = nil, errors.New("interrupted before there was a verdict")
	}
	if err == nil && d.keep {
		v.Commands, err = d.places.commands()
		if err == nil {
			return v, d.release()
		}
	}
	return v, errors.Join(err, d.clean())
}

// play is the demonstration itself.
func (d *demo) play(ctx context.Context) (*verdict, error) {
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
	if err := d.introduce(status); err != nil {
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

// introduce says what there is, before the figures begin.
func (d *demo) introduce(s control.Status) error {
	modes := map[string]bool{}
	for _, i := range s.Interfaces {
		modes[orDash(i.Mode)] = true
	}
	head := newTable("lab", fmt.Sprintf("network namespaces %s -> %s -> %s, %s, %s",
		d.places.namespace(sourceHost), d.places.namespace(relayHost),
		d.places.namespace("sink1"), d.places.namespace("sink2"), d.places.namespace("sink3")))
	head.add("relay", fmt.Sprintf("pid %d, %s active, XDP %s", s.PID, plural(s.Active, "rule"), strings.Join(slices.Sorted(maps.Keys(modes)), " and ")))
	head.add("source", fmt.Sprintf("%s packets/s for %v, %d bytes each", perSecond(d.rate), d.length, demoSize))
	if err := head.write(d.live); err != nil {
		return err
	}
	t := newTable("RULE", "IN", "OUT")
	for _, s := range d.streams {
		for slot, out := range s.rule.Out {
			if slot == 0 {
				t.add(s.rule.Name, s.rule.In, out)
			} else {
				t.add("", "", out)
			}
		}
	}
	fmt.Fprintln(d.live)
	if err := t.write(d.live); err != nil {
		return err
	}
	_, err := fmt.Fprintln(d.live)
	return err
}
