package main

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
)

// minInterval keeps a watch from becoming the load itself.
const minInterval = 100 * time.Millisecond

func statsCommand(now func() time.Time) *cli.Command {
	return &cli.Command{
		Name:      "stats",
		Usage:     "show the counters of all rules, or of one",
		ArgsUsage: "[NAME]",
		Description: "While no daemon runs, the counters come from the kernel only.\n" +
			"With --watch, rates are shown too, and -o json writes one document a line.\n" +
			"Byte counts are of whole frames, including the Ethernet header.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "watch", Aliases: []string{"w"}, Usage: "refresh until interrupted"},
			&cli.DurationFlag{Name: "interval", Usage: "`TIME` between refreshes with --watch", Value: time.Second},
			pinDirFlag(),
			outputFlag(),
		},
		Action: func(c *cli.Context) error { return stats(c, now) },
	}
}

func stats(c *cli.Context, now func() time.Time) error {
	if err := nargs(c, 0, 1); err != nil {
		return err
	}
	asJSON, err := wantJSON(c)
	if err != nil {
		return err
	}
	interval := c.Duration("interval")
	switch {
	case interval < minInterval:
		return usagef("--interval %v: want at least %v", interval, minInterval)
	case c.Bool("watch"):
		return watchStats(c, now, interval, asJSON)
	}
	s, err := readStats(c, now)
	if err != nil {
		return err
	}
	return show(c, s, func(w io.Writer) error { return statsTable(w, s, nil) })
}

// readStats reads the statistics of all rules, or of the named one.
func readStats(c *cli.Context, now func() time.Time) (control.Stats, error) {
	if c.NArg() == 0 {
		s, err := client(c).Stats(c.Context)
		return orKernel(c, s, err, now())
	}
	name := c.Args().First()
	rule, err := client(c).Rule(c.Context, name)
	s := statsOf(now(), rule)
	if s, err = orKernel(c, s, err, s.Time); err != nil {
		return s, err
	}
	return ofRule(s, name)
}

// ofRule reduces the statistics to one rule.
func ofRule(s control.Stats, name string) (control.Stats, error) {
	for _, rule := range s.Rules {
		if rule.Name == name {
			return statsOf(s.Time, rule), nil
		}
	}
	return s, fmt.Errorf("no rule is named %s in the kernel, and no xdpcast is running", name)
}

// statsOf is the statistics in a rule's own counters.
func statsOf(at time.Time, rule control.RuleStatus) control.Stats {
	return control.Stats{
		Time: at, Rules: []control.RuleStatus{rule}, Drops: rule.Drops, TransmitDrops: []control.TransmitDrop{},
		ReceiveDrops: append([]control.ReceiveDrop{}, rule.ReceiveDrops...),
	}
}

// watchStats shows the statistics until the context ends, which is no error.
func watchStats(c *cli.Context, now func() time.Time, interval time.Duration, asJSON bool) error {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	clearScreen := isTerminal(c.App.Writer) && !asJSON
	var before *control.Stats
	for {
		s, err := readStats(c, now)
		switch {
		case c.Context.Err() != nil:
			return nil
		case err != nil:
			return err
		case asJSON:
			err = writeJSON(c.App.Writer, s, "")
		default:
			if clearScreen {
				fmt.Fprint(c.App.Writer, "\x1b[H\x1b[2J") // ECMA-48: cursor home, erase the display
			} else if before != nil {
				fmt.Fprintln(c.App.Writer)
			}
			err = statsTable(c.App.Writer, s, rates(before, s))
		}
		if err != nil {
			return err
		}
		before = &s
		select {
		case <-c.Context.Done():
			return nil
		case <-ticker.C:
		}
	}
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// endpointKey identifies one counter of a rule: slot -1 is the matched counter.
type endpointKey struct {
	rule string
	slot int
}

const matchedSlot = -1

// legSlot is the slot of the first of several inputs; the others are below.
const legSlot = -2

// rate is the increase between two readings.
type rate struct{ packets, bits float64 } // a second

// rates compares two readings. A counter that is new, or decreased because its rule is new, has no
// rate.
func rates(before *control.Stats, now control.Stats) map[endpointKey]rate {
	out := map[endpointKey]rate{}
	if before == nil {
		return out
	}
	seconds := now.Time.Sub(before.Time).Seconds()
	if seconds <= 0 { // the clock was set back
		return out
	}
	old := counters(*before)
	for key, n := range counters(now) {
		o, ok := old[key]
		if ok && n.Packets >= o.Packets && n.Bytes >= o.Bytes {
			out[key] = rate{float64(n.Packets-o.Packets) / seconds, float64(n.Bytes-o.Bytes) * 8 / seconds}
		}
	}
	return out
}

func counters(s control.Stats) map[endpointKey]control.Counter {
	out := map[endpointKey]control.Counter{}
	for _, r := range s.Rules {
		out[endpointKey{r.Name, matchedSlot}] = r.Matched
		for i, in := range r.Inputs {
			if in.Input != "" {
				out[endpointKey{r.Name, legSlot - i}] = in.Matched
			}
		}
		for _, o := range r.Outputs {
			out[endpointKey{r.Name, o.Slot}] = o.Sent
		}
	}
	return out
}

// statsTable has a line for each rule's matched packets and one for each output's copies; with
// rates if those are not nil.
func statsTable(w io.Writer, s control.Stats, rates map[endpointKey]rate) error {
	titles := []string{"RULE", "SLOT", "ENDPOINT", "STATE", ">PACKETS", ">BYTES", ">DROPPED", "LAST"}
	if rates != nil {
		titles = append(titles[:len(titles)-1], ">PACKETS/S", ">BITS/S", "LAST")
	}
	t := newTable(titles...)
	add := func(name string, key endpointKey, slot, endpoint, state string, n control.Counter, drops []control.Drop, seen *time.Time) {
		row := []string{name, slot, endpoint, state, humanCount(n.Packets), humanBytes(n.Bytes), humanCount(control.Dropped(drops))}
		if rates != nil {
			row = append(row, rateCells(rates, key)...)
		}
		last := "" // the kernel does not report it for outputs
		if key.slot == matchedSlot {
			last = ago(s.Time, seen)
		}
		t.add(append(row, last)...)
	}
	for _, r := range s.Rules {
		in := r.In
		if several(r) {
			in = fmt.Sprintf("%d inputs", len(r.Inputs))
		}
		add(r.Name, endpointKey{r.Name, matchedSlot}, "in", in, r.State, r.Matched, r.Drops, r.LastSeen)
		for i, in := range r.Inputs {
			if in.Input != "" {
				add("", endpointKey{r.Name, legSlot - i}, fmt.Sprintf("in[%d]", i), in.Input, in.State, in.Matched, in.Drops, nil)
			}
		}
		for _, o := range r.Outputs {
			add("", endpointKey{r.Name, o.Slot}, strconv.Itoa(o.Slot), o.Output, o.State, o.Sent, o.Drops, nil)
		}
	}
	if err := t.write(w); err != nil {
		return err
	}
	if err := dropTable(w, s.Drops); err != nil {
		return err
	}
	if err := receiveTable(w, s.ReceiveDrops); err != nil {
		return err
	}
	if err := transmitTable(w, s.TransmitDrops); err != nil {
		return err
	}
	return noteTable(w, s)
}

// several says whether a rule has several inputs.
func several(r control.RuleStatus) bool { return r.Merge != "" || r.Failover != "" }

// noteTable shows notes, which are not drops, or nothing if there are none. Fragments without a
// first one belong to no rule.
func noteTable(w io.Writer, s control.Stats) error {
	t := newTable("NOTED", "OF", ">PACKETS", ">BYTES")
	for _, r := range s.Rules {
		for _, n := range r.Notes {
			t.add(n.Reason, "rule "+r.Name, humanCount(n.Packets), humanBytes(n.Bytes))
		}
	}
	if o := s.Fragments.Orphan; o.Packets > 0 {
		t.add("orphan_fragment", "all traffic", humanCount(o.Packets), humanBytes(o.Bytes))
	}
	if b := s.PassedBroadcast; b.Packets > 0 {
		t.add("broadcast", "no rule", humanCount(b.Packets), humanBytes(b.Bytes))
	}
	if len(t.rows) == 1 {
		return nil
	}
	fmt.Fprintln(w)
	return t.write(w)
}

func rateCells(rates map[endpointKey]rate, key endpointKey) []string {
	r, ok := rates[key]
	if !ok {
		return []string{"-", "-"}
	}
	return []string{humanCount(uint64(r.packets + 0.5)), withUnit(r.bits, "b")}
}

// receiveTable shows packets lost on the way to workers, or nothing if there are none.
func receiveTable(w io.Writer, drops []control.ReceiveDrop) error {
	if len(drops) == 0 {
		return nil
	}
	t := newTable("LOST BEFORE", "ON", ">PACKETS", "REASON")
	for _, d := range drops {
		t.add("path "+d.Path, d.Interface, humanCount(d.Packets), d.Reason)
	}
	fmt.Fprintln(w)
	return t.write(w)
}

func transmitTable(w io.Writer, drops []control.TransmitDrop) error {
	if len(drops) == 0 {
		return nil
	}
	t := newTable("UNSENT BY", ">PACKETS", "REASON")
	for _, d := range drops {
		t.add(d.Interface, humanCount(d.Packets), d.Reason)
	}
	fmt.Fprintln(w)
	return t.write(w)
}
