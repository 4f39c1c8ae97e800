package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/traffic"
)

func recvCommand() *cli.Command {
	return &cli.Command{
		Name:      "recv",
		Usage:     "receive packets of gen, and report missing ones",
		ArgsUsage: "[SOURCE@]ADDRESS:PORT%INTERFACE...",
		Description: "Joins the groups, or listens on addresses of this host, and counts what is received, lost, duplicated, reordered and corrupt, " +
			"with their latency, until --count, --duration, --idle or an interrupt:\n\n" +
			"   xdpcast recv --strict --expect-ttl 8 10.0.0.5@232.1.1.1:5000%eth0 239.1.1.1:5000%eth1\n\n" +
			"An IPv6 address is written in brackets: [ff3e::1]:5000%eth0. The latency is from the sender's clock to the receiver's: between two hosts it is only as accurate as their clock synchronization.\n\n" +
			"With --seq the packets have a sequence number, like those of gen --rtp; packets of any other sender are then accounted for by that number alone.",
		Flags: []cli.Flag{
			&cli.IntFlag{Name: "groups", Value: 1, Usage: "receive `N` consecutive group addresses for each endpoint"},
			&cli.Uint64Flag{Name: "count", Usage: "end after `N` packets, of all groups together", DefaultText: "no end"},
			&cli.DurationFlag{Name: "duration", Usage: "end after this `TIME`, such as 10s", DefaultText: "no end"},
			&cli.DurationFlag{Name: "idle", Usage: "end when this `TIME` has passed since the last packet", DefaultText: "no end"},
			&cli.DurationFlag{Name: "interval", Value: time.Second, Usage: "`TIME` between the live lines, 0 for none; -o json has none"},
			&cli.BoolFlag{Name: "strict", Usage: "exit code 1 if a packet was lost, duplicated, corrupt or had a wrong field, or a group received nothing"},
			&cli.BoolFlag{Name: "from-start", Usage: "streams begin at number 0: packets missing before the first are lost"},
			&cli.Uint64Flag{Name: "expect", Usage: "each group must receive `N` packets: missing ones are lost"},
			&cli.StringFlag{Name: "expect-ttl", Usage: "packets must have this `TTL` or hop limit"},
			&cli.StringFlag{Name: "expect-source", Usage: "packets must come from this `ADDRESS`"},
			&cli.StringFlag{Name: "expect-sport", Usage: "packets must come from this `PORT`"},
			&cli.StringFlag{Name: "expect-dscp", Usage: "packets must have this `DSCP`, 0 to 63 or a name such as ef or af41"},
			&cli.StringFlag{Name: "seq", Usage: "packets have a sequence number in a rule's merge=`FORMAT`: rtp, rfc4175, moldudp64, pitch, mdp3 or field:OFFSET:BYTES"},
			&cli.DurationFlag{Name: "late", Usage: "a missing number that arrives more than `TIME` late is a fault for --strict", DefaultText: "never"},
			&cli.IntFlag{Name: "window", Value: traffic.DefaultWindow, Usage: "distinguish late packets from duplicates within `N` numbers, a power of two"},
			&cli.IntFlag{Name: "buffer", Value: traffic.DefaultSocketBuffer, Usage: "`BYTES` of socket buffer for each group"},
			outputFlag(),
		},
		Action: recv,
	}
}

func recv(c *cli.Context) error {
	cfg, err := recvConfig(c)
	if err != nil {
		return err
	}
	asJSON, err := wantJSON(c)
	if err != nil {
		return err
	}
	r, err := traffic.NewReceiver(cfg)
	if err != nil {
		return fmt.Errorf("recv: %w", err)
	}
	if got := r.Report().SocketBufferBytes; got < cfg.SocketBuffer {
		fmt.Fprintf(c.App.ErrWriter, "xdpcast: recv: the socket buffer is %d bytes, not %d: net.core.rmem_max is the limit without CAP_NET_ADMIN\n", got, cfg.SocketBuffer)
	}
	live := c.Duration("interval")
	if asJSON {
		live = 0
	}
	runErr := errors.Join(runWithLines(c, r, live), r.Close())
	rep := r.Report()
	if err := show(c, rep, func(w io.Writer) error { return writeRecvReport(w, rep) }); err != nil {
		return err
	}
	if runErr != nil {
		return fmt.Errorf("recv: %w", runErr)
	}
	if faults := rep.Faults(); c.Bool("strict") && len(faults) > 0 {
		return cli.Exit("recv: "+strings.Join(faults, ", "), exitFailed)
	}
	return nil
}

// recvConfig parses the command line. Its errors are usage errors.
func recvConfig(c *cli.Context) (traffic.RecvConfig, error) {
	if err := nargs(c, 1, -1); err != nil {
		return traffic.RecvConfig{}, err
	}
	cfg := traffic.RecvConfig{
		Groups:       c.Int("groups"),
		FromStart:    c.Bool("from-start"),
		Expect:       c.Uint64("expect"),
		Window:       c.Int("window"),
		SocketBuffer: c.Int("buffer"),
		Count:        c.Uint64("count"),
		Duration:     c.Duration("duration"),
		Idle:         c.Duration("idle"),
		Late:         c.Duration("late"),
	}
	for _, arg := range c.Args().Slice() {
		sub, err := traffic.ParseSubscription(arg)
		if err != nil {
			return cfg, usagef("recv: %w", err)
		}
		cfg.Subscriptions = append(cfg.Subscriptions, sub)
	}
	if d := c.Duration("interval"); d < 0 {
		return cfg, usagef("--interval %s: must not be negative", d)
	}
	var dscp uint8
	if err := errors.Join(
		parseFlag(c, "seq", &cfg.Numbering, traffic.ParseNumbering),
		parseFlag(c, "expect-ttl", &cfg.Expected.TTL, parseTTL),
		parseFlag(c, "expect-source", &cfg.Expected.Source, parseAddress),
		parseFlag(c, "expect-sport", &cfg.Expected.SourcePort, traffic.ParsePort),
		parseFlag(c, "expect-dscp", &dscp, traffic.ParseDSCP),
		notZero(c, "groups", "window", "buffer"),
	); err != nil {
		return cfg, err
	}
	if c.IsSet("expect-dscp") {
		cfg.Expected.DSCP = &dscp
	}
	if err := cfg.Check(); err != nil {
		return cfg, usagef("recv: %w", err)
	}
	return cfg, nil
}

// runWithLines runs the receiver and prints a line for each interval; 0 means no lines.
func runWithLines(c *cli.Context, r *traffic.Receiver, interval time.Duration) error {
	if interval == 0 {
		return r.Run(c.Context)
	}
	var wg sync.WaitGroup
	done := make(chan struct{})
	wg.Go(func() {
		ticker := time.NewTicker(interval)
		defer ticker.Stop()
		writeLineTitles(c.App.Writer)
		for {
			select {
			case <-done:
				return
			case <-ticker.C:
				writeLine(c.App.Writer, r.Interval())
			}
		}
	})
	err := r.Run(c.Context)
	close(done)
	wg.Wait()
	return err
}

// lineFormat aligns the live lines: columns before the bar are for the interval, those after it for
// the whole run.
const lineFormat = "%9s %12s %14s %11s %8s %8s %8s | %12s %9s %9s %9s %8s %8s\n"

func writeLineTitles(w io.Writer) {
	fmt.Fprintf(w, lineFormat, "TIME", "RECEIVED", "PACKETS/S", "BIT/S", "P50", "P99", "MAX",
		"RECEIVED", "LOST", "DUPLICATE", "REORDERED", "CORRUPT", "WRONG")
}

func writeLine(w io.Writer, r traffic.IntervalReport) {
	fmt.Fprintf(w, lineFormat, seconds(r.ElapsedNS), count(r.Received),
		perSecond(r.PacketsPerSecond), perSecond(r.BitsPerSecond),
		latency(r.Latency, r.Latency.P50NS), latency(r.Latency, r.Latency.P99NS), latency(r.Latency, r.Latency.MaxNS),
		count(r.Total.Received), count(r.Total.Lost), count(r.Total.Duplicated), count(r.Total.Reordered), count(r.Total.Corrupt), count(wrongFields(r.Total)))
}

func writeRecvReport(w io.Writer, r traffic.RecvReport) error {
	if _, err := fmt.Fprintf(w, "received %s (%s) in %s: %s, %s\n\n", plural(int(r.Total.Received), "packet"), humanBytes(r.Total.Bytes),
		elapsed(r.ElapsedNS), perSecond(r.PacketsPerSecond)+" packets/s", withUnit(r.BitsPerSecond, "bit/s")); err != nil {
		return err
	}
	if err := writeCounters(w, r); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(w); err != nil {
		return err
	}
	if err := writeLatencies(w, r); err != nil {
		return err
	}
	if err := writeRepairs(w, r); err != nil {
		return err
	}
	return writeWrong(w, r)
}

// writeRepairs shows the groups where missing numbers arrived later, as in the output of a rule
// that merges.
func writeRepairs(w io.Writer, r traffic.RecvReport) error {
	if r.Total.Repaired+r.Total.Late == 0 {
		return nil
	}
	t := newTable("GAPS", ">OUT OF ORDER", ">REPAIRED", ">LATE", ">AFTER MIN", ">P50", ">P99", ">MAX")
	for _, g := range r.Groups {
		if l := g.RepairTime; l != nil {
			t.add(g.Endpoint, count(g.Reordered), count(g.Repaired), count(g.Late), latency(*l, l.MinNS), latency(*l, l.P50NS), latency(*l, l.P99NS), latency(*l, l.MaxNS))
		}
	}
	if _, err := fmt.Fprintln(w); err != nil {
		return err
	}
	return t.write(w)
}

func writeCounters(w io.Writer, r traffic.RecvReport) error {
	t := newTable("ENDPOINT", ">RECEIVED", ">LOST", ">DUPLICATE", ">REORDERED", ">STALE", ">CORRUPT", ">FOREIGN", ">SURPLUS", ">SOCKET DROPS", ">WRONG FIELDS")
	add := func(name string, c traffic.Counters) {
		t.add(name, count(c.Received), count(c.Lost), count(c.Duplicated), count(c.Reordered), count(c.Stale),
			count(c.Corrupt), count(c.Foreign), count(c.Surplus), count(c.SocketDrops), count(wrongFields(c)))
	}
	for _, g := range r.Groups {
		add(g.Endpoint, g.Counters)
	}
	if len(r.Groups) > 1 {
		add("total", r.Total)
	}
	return t.write(w)
}

func writeLatencies(w io.Writer, r traffic.RecvReport) error {
	t := newTable("LATENCY", ">MIN", ">P50", ">P90", ">P99", ">P99.9", ">MAX", ">LONGEST GAP")
	add := func(name string, l traffic.Latency, gap string) {
		t.add(name, latency(l, l.MinNS), latency(l, l.P50NS), latency(l, l.P90NS), latency(l, l.P99NS), latency(l, l.P999NS), latency(l, l.MaxNS), gap)
	}
	for _, g := range r.Groups {
		add(g.Endpoint, g.Latency, latency(g.Latency, g.LongestGapNS))
	}
	if len(r.Groups) > 1 {
		add("total", r.Latency, "-")
	}
	if err := t.write(w); err != nil {
		return err
	}
	if n := r.Latency.Negative; n > 0 {
		_, err := fmt.Fprintf(w, "\n%s arrived before they were sent: the clocks differ\n", plural(int(n), "packet"))
		return err
	}
	return nil
}

// writeWrong shows one packet for each group that had wrong fields.
func writeWrong(w io.Writer, r traffic.RecvReport) error {
	if wrongFields(r.Total) == 0 {
		return nil
	}
	t := newTable("WRONG", ">TTL", ">SOURCE", ">SOURCE PORT", ">DSCP", "LATEST SUCH PACKET")
	for _, g := range r.Groups {
		if f := g.LastWrong; f != nil {
			t.add(g.Endpoint, count(g.Wrong.TTL), count(g.Wrong.Source), count(g.Wrong.SourcePort), count(g.Wrong.DSCP),
				fmt.Sprintf("from %s, ttl %d, dscp %d", f.Source, f.TTL, f.DSCP))
		}
	}
	if _, err := fmt.Fprintln(w); err != nil {
		return err
	}
	return t.write(w)
}
