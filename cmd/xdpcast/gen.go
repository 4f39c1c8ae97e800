package main

import (
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/traffic"
)

func genCommand() *cli.Command {
	return &cli.Command{
		Name:      "gen",
		Usage:     "send numbered, time-stamped packets",
		ArgsUsage: "ADDRESS:PORT%INTERFACE",
		Description: "Sends UDP packets that recv accounts for, until --count, --duration or an interrupt:\n\n" +
			"   xdpcast gen --rate 100k --groups 4 --ttl 8 239.1.1.1:5000%eth0\n\n" +
			"An IPv6 address is written in brackets: [ff3e::1]:5000%eth0. With several groups, packets go to each in turn.\n\n" +
			"With --legs the same packets take several paths, each with its own impairments, for a rule that merges:\n\n" +
			"   xdpcast gen --rtp --legs 239.1.1.1:5000%eth0,239.101.1.1:5000%eth1 --leg-loss 1% --leg-delay 20ms",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "rate", Value: "1k", Usage: "`RATE` of all groups together: packets a second (100k, 1.5M), bits of UDP payload a second (20Mbit, 2.5Gbit), or max"},
			&cli.IntFlag{Name: "size", Value: 1000, Usage: fmt.Sprintf("`BYTES` of UDP payload in a packet, %d to %d", traffic.HeaderLen, traffic.MaxPayload)},
			&cli.IntFlag{Name: "groups", Value: 1, Usage: "send to `N` consecutive group addresses, beginning with ADDRESS"},
			&cli.Uint64Flag{Name: "count", Usage: "end after `N` packets, of all groups together", DefaultText: "no end"},
			&cli.DurationFlag{Name: "duration", Usage: "end after this `TIME`, such as 10s", DefaultText: "no end"},
			&cli.StringFlag{Name: "ttl", Usage: "`TTL` or hop limit, 1 to 255", DefaultText: "the kernel's, which is 1 for multicast"},
			&cli.StringFlag{Name: "dscp", Value: "0", Usage: "`DSCP`, 0 to 63 or a name such as ef or af41"},
			&cli.StringFlag{Name: "source", Usage: "`ADDRESS` of this host to send from", DefaultText: "the kernel's choice"},
			&cli.StringFlag{Name: "sport", Usage: "`PORT` to send from", DefaultText: "the kernel's choice"},
			&cli.StringFlag{Name: "seq", Usage: "add a sequence number in a rule's merge=`FORMAT`: rtp, rfc4175, moldudp64, pitch, mdp3 or field:OFFSET:BYTES"},
			&cli.BoolFlag{Name: "rtp", Usage: "as --seq rtp"},
			&cli.BoolFlag{Name: "moldudp64", Usage: "as --seq moldudp64"},
			&cli.StringFlag{Name: "field", Usage: "as --seq field:`OFFSET:BYTES`"},
			&cli.StringFlag{Name: "legs", Usage: "send each packet to all `ENDPOINTS`, up to 4, comma-separated, instead of the argument"},
			&cli.StringFlag{Name: "leg-loss", Usage: "`SHARE` of packets that a leg drops, such as 1%; like the next two, one for all legs, or a comma-separated list"},
			&cli.StringFlag{Name: "leg-delay", Usage: "delay of a leg: `TIME`; a single value applies to all legs but the first"},
			&cli.StringFlag{Name: "leg-reorder", Usage: "`SHARE` of packets that a leg sends after the three that follow them"},
			&cli.BoolFlag{Name: "repairable", Usage: "keep each packet on at least one leg"},
			&cli.Uint64Flag{Name: "seed", Value: 1, Usage: "`NUMBER` that determines which packets the legs drop and reorder"},
			&cli.IntFlag{Name: "batch", Value: 64, Usage: "at most `N` packets in one system call"},
			outputFlag(),
		},
		Action: gen,
	}
}

func gen(c *cli.Context) error {
	cfg, err := sendConfig(c)
	if err != nil {
		return err
	}
	if _, err := wantJSON(c); err != nil {
		return err
	}
	s, err := traffic.NewSender(cfg)
	if err != nil {
		return fmt.Errorf("gen: %w", err)
	}
	runErr := errors.Join(s.Run(c.Context), s.Close())
	r := s.Report()
	if err := show(c, r, func(w io.Writer) error { return writeSendReport(w, r) }); err != nil {
		return err
	}
	if runErr != nil {
		return fmt.Errorf("gen: %w", runErr)
	}
	return nil
}

// sendConfig parses the command line. Its errors are usage errors.
func sendConfig(c *cli.Context) (traffic.SendConfig, error) {
	cfg := traffic.SendConfig{
		Groups:     c.Int("groups"),
		Size:       c.Int("size"),
		Count:      c.Uint64("count"),
		Duration:   c.Duration("duration"),
		Batch:      c.Int("batch"),
		Seed:       c.Uint64("seed"),
		Repairable: c.Bool("repairable"),
	}
	if err := targets(c, &cfg); err != nil {
		return cfg, err
	}
	var err error
	if cfg.Numbering, err = numberingOf(c); err != nil {
		return cfg, err
	}
	if cfg.Rate, err = traffic.ParseRate(c.String("rate")); err != nil {
		return cfg, usagef("gen: %w", err)
	}
	if err := errors.Join(
		parseFlag(c, "ttl", &cfg.TTL, parseTTL),
		parseFlag(c, "dscp", &cfg.DSCP, traffic.ParseDSCP),
		parseFlag(c, "source", &cfg.Source, parseAddress),
		parseFlag(c, "sport", &cfg.SourcePort, traffic.ParsePort),
		notZero(c, "groups", "size", "batch"),
	); err != nil {
		return cfg, err
	}
	if err := cfg.Check(); err != nil {
		return cfg, usagef("gen: %w", err)
	}
	return cfg, nil
}

// targets parses the destinations: the argument, or the legs.
func targets(c *cli.Context, cfg *traffic.SendConfig) (err error) {
	if c.IsSet("legs") {
		if err := nargs(c, 0, 0); err != nil {
			return err
		}
		cfg.Legs, err = traffic.ParseLegs(c.String("legs"), c.String("leg-loss"), c.String("leg-delay"), c.String("leg-reorder"))
	} else {
		for _, name := range []string{"leg-loss", "leg-delay", "leg-reorder", "repairable"} {
			if c.IsSet(name) {
				return usagef("--%s: must have --legs", name)
			}
		}
		if err := nargs(c, 1, 1); err != nil {
			return err
		}
		cfg.Target, err = traffic.ParseTarget(c.Args().First())
	}
	if err != nil {
		return usagef("gen: %w", err)
	}
	return nil
}

// numberingOf parses the format of the numbers, however it is given.
func numberingOf(c *cli.Context) (n traffic.Numbering, err error) {
	var formats []string
	for flag, format := range map[string]string{"rtp": "rtp", "moldudp64": "moldudp64", "field": "field:" + c.String("field"), "seq": c.String("seq")} {
		if c.IsSet(flag) {
			formats = append(formats, format)
		}
	}
	if len(formats) > 1 {
		return n, usagef("gen: must have one of --seq, --rtp, --moldudp64 and --field")
	}
	for _, format := range formats {
		if n, err = traffic.ParseNumbering(format); err != nil {
			return n, usagef("gen: %w", err)
		}
	}
	return n, nil
}

func writeSendReport(w io.Writer, r traffic.SendReport) error {
	_, err := fmt.Fprintf(w, "sent %s (%s) to %s in %s: %s, %s\n",
		plural(int(min(r.Packets, math.MaxInt)), "packet"), humanBytes(r.Bytes), sentTo(r), elapsed(r.ElapsedNS),
		perSecond(r.PacketsPerSecond)+" packets/s", withUnit(r.BitsPerSecond, "bit/s"))
	if err != nil {
		return err
	}
	for _, l := range r.Legs {
		if _, err := fmt.Fprintf(w, "%s: %d sent, %d left out, %d out of order\n", l.Target, l.Packets, l.LeftOut, l.Reordered); err != nil {
			return err
		}
	}
	for _, note := range []struct {
		n    uint64
		text string
	}{
		{r.OnNoLeg, "packets left out on all legs"},
		{r.BufferFull, "times no room in the socket or device; every packet was eventually sent"},
		{r.NetworkErrors, "times refused by the network; every packet was eventually sent"},
	} {
		if note.n > 0 {
			if _, err := fmt.Fprintf(w, "%d %s\n", note.n, note.text); err != nil {
				return err
			}
		}
	}
	if r.BehindNS > 0 {
		_, err = fmt.Fprintf(w, "the rate could not be sustained: %s behind\n", elapsed(r.BehindNS))
	}
	return err
}

func sentTo(r traffic.SendReport) string {
	if len(r.Legs) > 0 {
		return plural(len(r.Legs), "leg")
	}
	if r.Groups == 1 {
		return r.Target
	}
	return fmt.Sprintf("%d groups from %s", r.Groups, r.Target)
}
