package main

// Shared by commands that show something: -o, tables, and formatting of counts, times and states.
// Formatting for package traffic's reports comes last.

import (
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/control"
	"xdpcast/internal/traffic"
)

// outputFlag is -o of every command that shows something.
func outputFlag() cli.Flag {
	return &cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "`FORMAT`: table for people, json for programs", Value: "table"}
}

// wantJSON parses -o.
func wantJSON(c *cli.Context) (bool, error) {
	switch format := c.String("output"); format {
	case "table":
		return false, nil
	case "json":
		return true, nil
	default:
		return false, usagef("--output %q: want table or json", format)
	}
}

// show writes value as JSON, or calls table, depending on -o.
func show(c *cli.Context, value any, table func(w io.Writer) error) error {
	asJSON, err := wantJSON(c)
	switch {
	case err != nil:
		return err
	case asJSON:
		return writeJSON(c.App.Writer, value, "  ")
	default:
		return table(c.App.Writer)
	}
}

func writeJSON(w io.Writer, value any, indent string) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", indent)
	return enc.Encode(value)
}

// table collects rows of cells and prints them aligned.
type table struct {
	rows  [][]string
	right map[int]bool // numeric columns, right-aligned
}

// newTable starts a table; a title that begins with ">" is a right-aligned column.
func newTable(titles ...string) *table {
	t := &table{right: map[int]bool{}}
	for i, title := range titles {
		if name, ok := strings.CutPrefix(title, ">"); ok {
			t.right[i], titles[i] = true, name
		}
	}
	t.add(titles...)
	return t
}

func (t *table) add(cells ...string) {
	for i, cell := range cells {
		cells[i] = printable(cell)
	}
	t.rows = append(t.rows, cells)
}

// write pads the numbers itself: tabwriter aligns all columns the same way.
func (t *table) write(w io.Writer) error {
	for col := range t.right {
		width := 0
		for _, row := range t.rows {
			width = max(width, len(row[col]))
		}
		for _, row := range t.rows {
			row[col] = strings.Repeat(" ", width-len(row[col])) + row[col]
		}
	}
	trim := &trimWriter{w: w}
	tw := tabwriter.NewWriter(trim, 0, 0, 2, ' ', 0)
	for _, row := range t.rows {
		fmt.Fprintln(tw, strings.Join(row, "\t"))
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	return trim.flush()
}

// trimWriter trims trailing blanks of lines.
type trimWriter struct {
	w   io.Writer
	buf strings.Builder
}

func (t *trimWriter) Write(p []byte) (int, error) { return t.buf.Write(p) }

func (t *trimWriter) flush() error {
	var out strings.Builder
	for line := range strings.Lines(t.buf.String()) {
		out.WriteString(strings.TrimRight(line, " \n"))
		out.WriteByte('\n')
	}
	_, err := io.WriteString(t.w, out.String())
	return err
}

// printable keeps foreign text from breaking the table or the terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return ' '
		}
		return r
	}, s)
}

// humanCount is n in full below 100,000, and above with three digits and a decimal prefix: 1.23M.
func humanCount(n uint64) string {
	if n < 100_000 {
		return strconv.FormatUint(n, 10)
	}
	number, prefix := scale(float64(n), 0)
	return number + prefix
}

// humanBytes is n with a decimal prefix: 1.23 GB.
func humanBytes(n uint64) string { return withUnit(float64(n), "B") }

func withUnit(v float64, unit string) string {
	number, prefix := scale(v, 0)
	return number + " " + prefix + unit
}

// scale is v with three digits and the matching decimal prefix. Whole numbers below 1000 have no
// decimal point.
func scale(v float64, decimals int) (number, prefix string) {
	prefixes := []string{"", "k", "M", "G", "T", "P", "E"}
	i := 0
	for v >= 999.5 && i < len(prefixes)-1 {
		v /= 1000
		i++
	}
	if i > 0 {
		switch {
		case v < 9.995:
			decimals = 2
		case v < 99.95:
			decimals = 1
		default:
			decimals = 0
		}
	}
	return strconv.FormatFloat(v, 'f', decimals, 64), prefixes[i]
}

// ago is how long before now t was: "2s ago", "-" for never.
func ago(now time.Time, t *time.Time) string {
	if t == nil {
		return "-"
	}
	return age(now.Sub(*t)) + " ago"
}

// age is d in at most two units: 3h12m. A clock that was set back gives 0s.
func age(d time.Duration) string {
	d = max(d, 0)
	day := 24 * time.Hour
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm%ds", d/time.Minute, d%time.Minute/time.Second)
	case d < day:
		return fmt.Sprintf("%dh%dm", d/time.Hour, d%time.Hour/time.Minute)
	default:
		return fmt.Sprintf("%dd%dh", d/day, d%day/time.Hour)
	}
}

// dropTable shows drops by reason, nothing when there are none.
func dropTable(w io.Writer, drops []control.Drop) error {
	t := newTable("DROPPED BECAUSE", ">PACKETS", ">BYTES")
	for _, d := range drops {
		if d.Packets > 0 {
			t.add(d.Reason, humanCount(d.Packets), humanBytes(d.Bytes))
		}
	}
	if len(t.rows) == 1 {
		return nil
	}
	fmt.Fprintln(w)
	return t.write(w)
}

// plural is "1 rule", "2 rules".
func plural(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return strconv.Itoa(n) + " " + thing + "s"
}

// orDash replaces an empty string by a dash.
func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// stateText is a state with its reason, if there is one.
func stateText(state, reason string) string {
	if reason == "" {
		return state
	}
	return state + ": " + reason
}

// elapsed formats a duration, to the millisecond.
func elapsed(ns int64) string { return time.Duration(ns).Round(time.Millisecond).String() }

// perSecond is a rate with three digits: 1.23M.
func perSecond(v float64) string {
	number, prefix := scale(v, 0)
	return number + prefix
}

// wrongFields is the number of wrong header fields of all kinds.
func wrongFields(c traffic.Counters) uint64 {
	return c.Wrong.TTL + c.Wrong.Source + c.Wrong.SourcePort + c.Wrong.DSCP
}

// count is exact: every packet matters here.
func count(n uint64) string { return strconv.FormatUint(n, 10) }

func seconds(ns int64) string { return strconv.FormatFloat(float64(ns)/1e9, 'f', 1, 64) + "s" }

// latency formats a latency with a few digits, "-" if there was no packet.
func latency(of traffic.Latency, ns int64) string {
	if of.Samples == 0 {
		return "-"
	}
	for _, unit := range []struct {
		name string
		ns   float64
	}{{"s", 1e9}, {"ms", 1e6}, {"us", 1e3}} {
		if v := float64(ns) / unit.ns; v >= 1 || v <= -1 {
			return strconv.FormatFloat(v, 'f', 1, 64) + unit.name
		}
	}
	return strconv.FormatInt(ns, 10) + "ns"
}
