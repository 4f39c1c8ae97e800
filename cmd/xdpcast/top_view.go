package main

// Rendering of the live screen. Colours only repeat what the text says.

import (
	"fmt"
	"slices"
	"strings"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"

	"xdpcast/internal/control"
)

// headLines are the lines above the table: the daemon, the totals, the screens.
const headLines = 3

// SGR codes of ECMA-48.
const (
	bold    = "1"
	red     = "31"
	yellow  = "33"
	reverse = "7"
)

func styled(text string, codes ...string) string {
	return "\x1b[" + strings.Join(codes, ";") + "m" + text + "\x1b[0m"
}

// View implements tea.Model.
func (m *topModel) View() tea.View {
	v := tea.NewView(strings.Join(m.lines(), "\n"))
	v.AltScreen, v.WindowTitle = true, "xdpcast top"
	return v
}

// lines is the whole screen; no line is wider than it.
func (m *topModel) lines() []string {
	lines := m.head()
	switch {
	case m.help:
		lines = append(lines, helpLines...)
	case m.screen == rulesScreen && m.detail == "":
		lines = append(lines, m.ruleLines()...)
	default:
		body := m.body()
		from := min(m.scroll, max(0, len(body)-m.room()-1))
		lines = append(lines, body[from:min(len(body), from+m.room()+1)]...)
	}
	for len(lines) < m.height-1 {
		lines = append(lines, "")
	}
	lines = append(lines[:max(0, m.height-1)], m.foot())
	for i, line := range lines {
		lines[i] = ansi.Truncate(line, m.width, "")
	}
	return lines
}

func (m *topModel) head() []string {
	s := m.sums
	who := "no daemon is running: counters of the kernel, no group is joined"
	if d := m.seen.daemon; d != nil {
		who = fmt.Sprintf("%s, pid %d, up %s", d.Version, d.PID, age(m.seen.stats.Time.Sub(d.Started)))
	}
	title := fmt.Sprintf("xdpcast top  %s  %s", m.seen.stats.Time.Format("15:04:05"), printable(who))
	if m.paused {
		title += "  PAUSED"
	}
	states := fmt.Sprintf("%s: %d active", plural(s.rules, "rule"), s.active)
	for _, of := range []struct {
		n    int
		word string
	}{{s.failed, "failed"}, {s.looping, "looping"}, {s.dropping, "dropping"}, {s.pending, "pending"}, {s.silent, "silent"}} {
		if of.n > 0 {
			states += ", " + styled(fmt.Sprintf("%d %s", of.n, of.word), bold)
		}
	}
	return []string{
		styled(title, bold), states,
		fmt.Sprintf("in %s  out %s  drops %s (%s)  passed %s",
			m.speed(s.in), m.speed(s.out), m.perSecond(s.dropRate), humanCount(s.drops), m.perSecond(s.passedRate)),
	}
}

// speed formats a rate, "-" before there are two readings.
func (m *topModel) speed(r rate) string {
	if !m.rated {
		return "-"
	}
	return fmt.Sprintf("%s/s %s/s", humanCount(uint64(r.packets+0.5)), withUnit(r.bits, "b"))
}

func (m *topModel) perSecond(v float64) string {
	if !m.rated {
		return "-"
	}
	return humanCount(uint64(v+0.5)) + "/s"
}

// stateWord is the state of a row as a word.
func (r *topRow) stateWord() string {
	switch {
	case r.isSilent():
		return "silent"
	case r.State == control.StateActive && r.dropRate > 0:
		return "dropping"
	}
	return r.State
}

// column is a column of the table of rules.
type column struct {
	title string
	width int
	right bool
	cell  func(r *topRow) string
}

// columns are the columns that fit. The name takes the remaining width, and on wide screens the
// input and the reason.
func (m *topModel) columns() []column {
	last := func(r *topRow) string {
		if r.silent < 0 {
			return "-"
		}
		return age(r.silent)
	}
	ofRate := func(text func(*topRow) string) func(*topRow) string {
		return func(r *topRow) string {
			if !r.rated {
				return "-"
			}
			return text(r)
		}
	}
	all := []column{
		{"RULE", 0, false, func(r *topRow) string { return r.Name }},
		{"STATE", 8, false, (*topRow).stateWord},
		{"PATH", 6, false, func(r *topRow) string { return orDash(r.UsedPath) }},
		{"PKT/S", 6, true, ofRate(func(r *topRow) string { return humanCount(uint64(r.rate.packets + 0.5)) })},
		{"BIT/S", 7, true, ofRate(func(r *topRow) string { return withUnit(r.rate.bits, "b") })},
		{"OUT/S", 6, true, ofRate(func(r *topRow) string { return humanCount(uint64(r.out.packets + 0.5)) })},
		{"DROP/S", 6, true, ofRate(func(r *topRow) string { return humanCount(uint64(r.dropRate + 0.5)) })},
		{"DROPS", 6, true, func(r *topRow) string { return humanCount(r.drops) }},
		{"LAST", 6, true, last},
	}
	left := m.width - 1 // the cursor's
	for _, c := range all {
		left -= c.width + 1
	}
	const name, input = 24, 34
	if left >= name+input+2 {
		all = append(all, column{"IN", input, false, func(r *topRow) string { return r.In }})
		rest := left - name - input - 3
		all[0].width = name
		if rest > 10 {
			all = append(all, column{"REASON", rest, false, func(r *topRow) string { return r.Reason }})
		} else {
			all[0].width += rest + 1
		}
		return all
	}
	all[0].width = max(8, left)
	return all
}

// pad pads or cuts a text to the column's width.
func (c *column) pad(text string) string {
	text = ansi.Truncate(printable(text), c.width, "~")
	space := strings.Repeat(" ", max(0, c.width-ansi.StringWidth(text)))
	if c.right {
		return space + text
	}
	return text + space
}

// ruleLines are the visible part of the table of rules.
func (m *topModel) ruleLines() []string {
	shown, columns := m.shown(), m.columns()
	title := " "
	for i := range columns {
		title += columns[i].pad(columns[i].title) + " "
	}
	lines := []string{styled(title, bold)}
	if len(shown) == 0 {
		return append(lines, " no rule"+map[bool]string{true: fmt.Sprintf(" has %q", m.filter)}[m.filter != ""])
	}
	at := m.cursor(shown)
	for i := m.offset; i < min(len(shown), m.offset+m.room()); i++ {
		mark, codes := " ", []string(nil)
		if i == at {
			mark, codes = ">", []string{reverse}
		}
		switch t := shown[i].trouble(); {
		case t <= 2:
			codes = append(codes, red)
		case t <= 4:
			codes = append(codes, yellow)
		}
		line := mark
		for c := range columns {
			line += columns[c].pad(columns[c].cell(shown[i])) + " "
		}
		if codes != nil {
			line = styled(line, codes...)
		}
		lines = append(lines, line)
	}
	return lines
}

// body are the lines of the screens that scroll.
func (m *topModel) body() []string {
	var b strings.Builder
	switch {
	case m.detail != "":
		m.detailText(&b)
	case m.screen == interfacesScreen:
		m.interfaceText(&b)
	case m.screen == eventsScreen:
		m.eventText(&b)
	}
	return strings.Split(strings.TrimRight(b.String(), "\n"), "\n")
}

// detailText shows everything known about one rule. Writing to b never fails.
func (m *topModel) detailText(b *strings.Builder) {
	at := slices.IndexFunc(m.rows, func(r topRow) bool { return r.Name == m.detail })
	if at < 0 {
		fmt.Fprintf(b, "rule %s is gone\n", printable(m.detail))
		return
	}
	r := &m.rows[at]
	head := newTable("rule", r.Name)
	head.add("state", stateText(r.stateWord(), r.Reason))
	head.add("path", orDash(r.UsedPath))
	head.add("in", r.In)
	head.add("matched", fmt.Sprintf("%s packets, %s; %s", humanCount(r.Matched.Packets), humanBytes(r.Matched.Bytes), m.speed(r.rate)))
	last := "never"
	if r.silent >= 0 {
		last = age(r.silent) + " ago"
	}
	head.add("last", last)
	_ = head.write(b)

	fmt.Fprintln(b)
	t := newTable("SLOT", "OUTPUT", "STATE", ">PKT/S", ">BIT/S", ">SENT", ">DROPPED", "REASON")
	for slot, o := range r.Outputs {
		cells := []string{"-", "-"}
		if m.rated {
			cells = []string{humanCount(uint64(r.outs[slot].packets + 0.5)), withUnit(r.outs[slot].bits, "b")}
		}
		t.add(append(append([]string{fmt.Sprint(o.Slot), o.Output, o.State}, cells...), humanCount(o.Sent.Packets), humanCount(control.Dropped(o.Drops)), o.Reason)...)
	}
	_ = t.write(b)
	m.dropText(b, r)
	m.groupText(b, r)
	_ = receiveTable(b, r.ReceiveDrops)
	for _, n := range r.Notes {
		fmt.Fprintf(b, "\n%s packets noted: %s\n", humanCount(n.Packets), printable(n.Reason))
	}
}

// dropText lists drops by place and reason.
func (m *topModel) dropText(b *strings.Builder, r *topRow) {
	t := newTable("DROPPED", "BECAUSE", ">PACKETS", ">BYTES")
	add := func(where string, drops []control.Drop) {
		for _, d := range drops {
			if d.Packets > 0 {
				t.add(where, d.Reason, humanCount(d.Packets), humanBytes(d.Bytes))
			}
		}
	}
	add("before copying", r.Drops)
	for _, o := range r.Outputs {
		add(fmt.Sprintf("output %d", o.Slot), o.Drops)
	}
	if len(t.rows) > 1 {
		fmt.Fprintln(b)
		_ = t.write(b)
	}
}

// groupText lists the memberships of a rule.
func (m *topModel) groupText(b *strings.Builder, r *topRow) {
	t := newTable("GROUP", "SOURCE", "INTERFACE", "MEMBERSHIP")
	for _, g := range m.seen.groups {
		if slices.Contains(g.Rules, r.Name) {
			t.add(g.Group, orDash(g.Source), g.Interface, orDash(g.Detail))
		}
	}
	if len(t.rows) > 1 {
		fmt.Fprintln(b)
		_ = t.write(b)
	}
}

func (m *topModel) interfaceText(b *strings.Builder) {
	t := newTable("INTERFACE", "LINK", "MODE", "ROLES", ">IN/S", ">BIT/S", ">OUT/S", ">BIT/S", ">UNSENT", "NOTE")
	for _, i := range m.faces {
		cells := []string{"-", "-", "-", "-"}
		if m.rated {
			cells = []string{humanCount(uint64(i.in.packets + 0.5)), withUnit(i.in.bits, "b"), humanCount(uint64(i.out.packets + 0.5)), withUnit(i.out.bits, "b")}
		}
		t.add(append(append([]string{orDash(i.Name), orDash(i.Link), orDash(i.Mode), orDash(strings.Join(i.Roles, "+"))}, cells...), humanCount(i.TransmitDrops), interfaceNote(i.InterfaceStatus))...)
	}
	_ = t.write(b)
	if len(m.seen.stats.TransmitDrops) > 0 {
		_ = transmitTable(b, m.seen.stats.TransmitDrops)
	}
	_ = receiveTable(b, m.seen.stats.ReceiveDrops)
}

// eventText lists the events, the last first.
func (m *topModel) eventText(b *strings.Builder) {
	if len(m.events) == 0 {
		fmt.Fprintln(b, "no changes since this screen was opened")
	}
	for _, e := range slices.Backward(m.events) {
		fmt.Fprintf(b, "%s  %s\n", e.at.Format("Jan _2 15:04:05"), printable(e.text))
	}
}

// foot shows the keys, or an error.
func (m *topModel) foot() string {
	switch {
	case m.typing:
		return "filter: " + m.filter + "_   (enter: keep, esc: all rules)"
	case m.err != nil:
		return styled("! "+printable(m.err.Error()), red)
	}
	keys := "q quit  ? help  p pause  1 rules  2 interfaces  3 events"
	if m.screen == rulesScreen && m.detail == "" {
		order := sortKeys[m.sort].name
		if m.reverse {
			order += " reversed"
		}
		keys = fmt.Sprintf("q quit  ? help  s sort: %s  / filter: %s  enter: one rule", order, orDash(m.filter))
	} else if m.detail != "" {
		keys = "esc back  " + keys
	}
	return keys
}

var helpLines = []string{
	styled("keys", bold),
	"  up, down, k, j, pgup, pgdown, home, end   move",
	"  enter       show one rule: outputs, drops by reason, memberships",
	"  esc         back; on the list of rules, drop the filter",
	"  1, 2, 3, tab  rules, interfaces, events",
	"  s           sort by " + sortNames(),
	"  r           reverse the order",
	"  /           filter by text in name, state, path, input and outputs",
	"  p, space    pause, resume",
	"  q           quit",
	"",
	styled("what is shown", bold),
	"  PKT/S, BIT/S  packets that matched, between the last two refreshes",
	"  OUT/S       copies that were sent, of all outputs together",
	"  DROP/S, DROPS  dropped, before and after copying; one packet may be dropped",
	"              once for each output",
	"  STATE       silent: active, and no packet for 5 seconds; dropping: now",
	"  LAST        since the last packet",
	"",
	"any key closes this",
}
