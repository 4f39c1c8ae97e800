package main

// The state of the live screen, and its changes by keys and readings. It is pure except for the
// commands that Update returns.

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	tea "charm.land/bubbletea/v2"

	"xdpcast/internal/control"
)

// The screens.
type screen uint8

const (
	rulesScreen screen = iota
	interfacesScreen
	eventsScreen
	screens
)

// topModel is the live screen's state.
type topModel struct {
	interval time.Duration
	look     tea.Cmd // makes a lookMsg

	width, height int
	seen          seen
	err           error // of the last reading; the previous one stays
	rows          []topRow
	sums          topSums
	faces         []topInterface
	events        []topEvent
	held          []topEvent // arrived while the screen is paused
	told          bool       // the daemon sends events: do not derive them from readings
	rated         bool       // there are two readings, and rates

	screen         screen
	detail         string // the rule shown in detail; empty for none
	selected       string // the rule under the cursor; empty: the first
	sort           int
	reverse        bool
	filter         string
	typing         bool // the filter
	paused, help   bool
	offset, scroll int // of the list of rules, and of the other screens
}

// topRow is a displayed rule.
type topRow struct {
	control.RuleStatus
	rate     rate
	out      rate   // of all copies
	outs     []rate // of each output
	rated    bool
	drops    uint64
	dropRate float64
	silent   time.Duration // since the last packet; negative: none yet
	text     string        // the text that a filter matches, in lower case
}

// topSums are the totals of all rules.
type topSums struct {
	rules, active, pending, failed, looping, silent, dropping int
	in, out                                                   rate
	dropRate, passedRate                                      float64
	drops                                                     uint64
}

// topInterface is a displayed interface.
type topInterface struct {
	control.InterfaceStatus
	in, out rate
}

// topEvent is a change: an event of the daemon, or one derived from two readings.
type topEvent struct {
	at   time.Time
	text string
}

// lookMsg is a reading.
type lookMsg struct {
	seen seen
	err  error
}

// eventMsg is an event of the daemon.
type eventMsg struct{ event control.Event }

// tickMsg triggers a reading.
type tickMsg struct{}

const (
	// firstPause is short, so that rates appear at once.
	firstPause = 300 * time.Millisecond
	// silence is the time without packets after which a rule is called silent.
	silence = 5 * time.Second
	// topTail is the number of earlier events shown at the start.
	topTail = 200
	// maxTopEvents limits the events kept.
	maxTopEvents = 1000
)

func newTopModel(interval time.Duration, sort int, filter string, look tea.Cmd) *topModel {
	return &topModel{interval: interval, sort: sort, filter: filter, look: look, width: 80, height: 24}
}

// Init implements tea.Model.
func (m *topModel) Init() tea.Cmd { return m.tick(min(firstPause, m.interval)) }

func (m *topModel) tick(wait time.Duration) tea.Cmd {
	return tea.Tick(wait, func(time.Time) tea.Msg { return tickMsg{} })
}

// Update implements tea.Model.
func (m *topModel) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		m.width, m.height = msg.Width, msg.Height
	case tickMsg:
		if m.paused {
			return m, m.tick(m.interval)
		}
		return m, m.look
	case lookMsg:
		m.take(msg)
		// Reading must not keep a daemon with many rules busy.
		return m, m.tick(max(m.interval, 4*msg.seen.took))
	case eventMsg:
		m.told = true
		m.note(topEvent{msg.event.Time.In(m.seen.stats.Time.Location()), msg.event.Text()})
		return m, nil
	case tea.KeyPressMsg:
		return m, m.key(msg.String())
	}
	m.follow()
	return m, nil
}

// note stores events; while the screen is paused, for later.
func (m *topModel) note(events ...topEvent) {
	to := &m.events
	if m.paused {
		to = &m.held
	}
	*to = append(*to, events...)
	*to = (*to)[max(0, len(*to)-maxTopEvents):]
}

// take applies a reading.
func (m *topModel) take(msg lookMsg) {
	if m.paused {
		return
	}
	if m.err = msg.err; msg.err != nil {
		return
	}
	before := m.seen
	m.seen = msg.seen
	if before.stats.Time.IsZero() {
		m.rows, m.sums = rowsOf(nil, m.seen.stats)
	} else {
		m.rated = true
		m.rows, m.sums = rowsOf(&before.stats, m.seen.stats)
		m.note(changes(&before, &m.seen, m.told)...)
	}
	m.faces = interfacesOf(m.rows, m.seen.daemon)
	m.order()
	m.follow()
}

// rowsOf makes rows from statistics, with rates if there was an earlier reading.
func rowsOf(before *control.Stats, now control.Stats) (rows []topRow, sums topSums) {
	speed := rates(before, now)
	oldDrops := map[string]uint64{}
	seconds := 0.0
	if before != nil {
		seconds = now.Time.Sub(before.Time).Seconds()
		for i := range before.Rules {
			oldDrops[before.Rules[i].Name] = dropsOf(&before.Rules[i])
		}
	}
	if seconds > 0 && now.Passed.Packets >= before.Passed.Packets {
		sums.passedRate = float64(now.Passed.Packets-before.Passed.Packets) / seconds
	}
	rows = make([]topRow, 0, len(now.Rules))
	for _, r := range now.Rules {
		row := topRow{RuleStatus: r, drops: dropsOf(&r), silent: -1}
		row.rate, row.rated = speed[endpointKey{r.Name, matchedSlot}]
		for _, o := range r.Outputs {
			v := speed[endpointKey{r.Name, o.Slot}]
			row.outs = append(row.outs, v)
			row.out.packets += v.packets
			row.out.bits += v.bits
		}
		if old, ok := oldDrops[r.Name]; ok && seconds > 0 && row.drops >= old {
			row.dropRate = float64(row.drops-old) / seconds
		}
		if r.LastSeen != nil {
			row.silent = max(0, now.Time.Sub(*r.LastSeen))
		}
		row.text = strings.ToLower(strings.Join(append([]string{r.Name, r.State, r.UsedPath, r.In, r.Origin}, r.Out...), " "))
		sums.add(&row)
		rows = append(rows, row)
	}
	return rows, sums
}

// dropsOf is the total of a rule's drops, before and after copying.
func dropsOf(r *control.RuleStatus) uint64 {
	n := control.Dropped(r.Drops)
	for _, o := range r.Outputs {
		n += control.Dropped(o.Drops)
	}
	return n
}

func (s *topSums) add(r *topRow) {
	s.rules++
	switch r.State {
	case control.StateActive:
		s.active++
	case control.StatePending:
		s.pending++
	case control.StateLooping:
		s.looping++
	default:
		s.failed++
	}
	if r.isSilent() {
		s.silent++
	}
	if r.dropRate > 0 {
		s.dropping++
	}
	s.in.packets += r.rate.packets
	s.in.bits += r.rate.bits
	s.out.packets += r.out.packets
	s.out.bits += r.out.bits
	s.dropRate += r.dropRate
	s.drops += r.drops
}

// isSilent says whether a rule had packets and now receives none.
func (r *topRow) isSilent() bool { return r.State == control.StateActive && r.silent >= silence }

// trouble ranks rules: the lower, the more urgent.
func (r *topRow) trouble() int {
	switch {
	case r.State == control.StateFailed:
		return 0
	case r.State == control.StateLooping:
		return 1
	case r.dropRate > 0:
		return 2
	case r.State != control.StateActive:
		return 3
	case r.isSilent():
		return 4
	}
	return 5
}

// sortKeys are the sort orders of rules.
var sortKeys = [...]struct {
	name    string
	compare func(a, b *topRow) int
}{
	{"trouble", func(a, b *topRow) int { return cmp.Compare(a.trouble(), b.trouble()) }},
	{"rate", func(*topRow, *topRow) int { return 0 }}, // the tie-breaker below is the rate
	{"bits", func(a, b *topRow) int { return cmp.Compare(b.rate.bits, a.rate.bits) }},
	{"drops", func(a, b *topRow) int {
		return cmp.Or(cmp.Compare(b.dropRate, a.dropRate), cmp.Compare(b.drops, a.drops))
	}},
	{"state", func(a, b *topRow) int { return cmp.Compare(a.State, b.State) }},
	{"name", func(a, b *topRow) int { return cmp.Compare(a.Name, b.Name) }},
}

func sortNames() string {
	var names []string
	for _, k := range sortKeys {
		names = append(names, k.name)
	}
	return strings.Join(names, ", ")
}

// sortNamed is the index of the named key, -1 for none.
func sortNamed(name string) int {
	for i, k := range sortKeys {
		if k.name == name {
			return i
		}
	}
	return -1
}

// order sorts the rows.
func (m *topModel) order() {
	compare := sortKeys[m.sort].compare
	slices.SortFunc(m.rows, func(a, b topRow) int {
		n := cmp.Or(compare(&a, &b), cmp.Compare(b.rate.packets, a.rate.packets), cmp.Compare(a.Name, b.Name))
		if m.reverse {
			return -n
		}
		return n
	})
}

// shown are the rows that match the filter.
func (m *topModel) shown() []*topRow {
	want := strings.ToLower(m.filter)
	shown := make([]*topRow, 0, len(m.rows))
	for i := range m.rows {
		if strings.Contains(m.rows[i].text, want) {
			shown = append(shown, &m.rows[i])
		}
	}
	return shown
}

// cursor is the index of the selected rule among those shown, 0 if it is not shown.
func (m *topModel) cursor(shown []*topRow) int {
	return max(0, slices.IndexFunc(shown, func(r *topRow) bool { return r.Name == m.selected }))
}

// follow keeps the cursor in view.
func (m *topModel) follow() {
	shown := m.shown()
	at, room := m.cursor(shown), m.room()
	m.offset = max(0, min(m.offset, at, len(shown)-room))
	if at >= m.offset+room {
		m.offset = at - room + 1
	}
}

// room is the number of rules that fit.
func (m *topModel) room() int { return max(1, m.height-headLines-2) }

// key handles a key.
func (m *topModel) key(key string) tea.Cmd {
	switch {
	case key == "ctrl+c":
		return tea.Quit
	case m.typing:
		m.typed(key)
	case m.help:
		m.help = false // any key
	case key == "q":
		return tea.Quit
	default:
		m.command(key)
	}
	m.follow()
	return nil
}

// typed edits the filter.
func (m *topModel) typed(key string) {
	const longest = 100
	switch runes := []rune(key); {
	case key == "enter":
		m.typing = false
	case key == "esc":
		m.typing, m.filter = false, ""
	case key == "backspace":
		if f := []rune(m.filter); len(f) > 0 {
			m.filter = string(f[:len(f)-1])
		}
	case key == "space":
		m.filter += " "
	case len(runes) == 1 && len(m.filter) < longest:
		m.filter += key
	}
	m.selected = ""
}

func (m *topModel) command(key string) {
	switch key {
	case "?", "h", "f1":
		m.help = true
	case "p", "space":
		if m.paused = !m.paused; !m.paused {
			m.note(m.held...)
			m.held = nil
		}
	case "/":
		m.typing, m.screen, m.detail = true, rulesScreen, ""
	case "s":
		m.sort = (m.sort + 1) % len(sortKeys)
		m.order()
	case "r":
		m.reverse = !m.reverse
		m.order()
	case "1", "2", "3":
		m.goTo(screen(key[0] - '1'))
	case "tab":
		m.goTo((m.screen + 1) % screens)
	case "esc":
		if m.detail == "" {
			m.filter = ""
		}
		m.goTo(m.screen)
	case "enter":
		if shown := m.shown(); m.screen == rulesScreen && m.detail == "" && len(shown) > 0 {
			m.detail, m.scroll = shown[m.cursor(shown)].Name, 0
		}
	default:
		m.move(key)
	}
}

func (m *topModel) goTo(s screen) { m.screen, m.detail, m.scroll = s, "", 0 }

// move moves the cursor, or scrolls.
func (m *topModel) move(key string) {
	by := map[string]int{
		"up": -1, "k": -1, "down": 1, "j": 1, "pgup": -m.room(), "pgdown": m.room(),
		"home": -1 << 30, "g": -1 << 30, "end": 1 << 30, "G": 1 << 30,
	}[key]
	if by == 0 {
		return
	}
	if m.screen != rulesScreen || m.detail != "" {
		m.scroll = max(0, m.scroll+by) // View limits it
		m.scroll = min(m.scroll, max(0, len(m.body())-m.room()-1))
		return
	}
	if shown := m.shown(); len(shown) > 0 {
		m.selected = shown[max(0, min(len(shown)-1, m.cursor(shown)+by))].Name
	}
}

// interfacesOf adds up the rates of rules by interface, combined with the daemon's state of them.
func interfacesOf(rows []topRow, daemon *control.Status) []topInterface {
	byName := map[string]*topInterface{}
	get := func(name string) *topInterface {
		if byName[name] == nil {
			byName[name] = &topInterface{InterfaceStatus: control.InterfaceStatus{Name: name}}
		}
		return byName[name]
	}
	if daemon != nil {
		for _, s := range daemon.Interfaces {
			get(s.Name).InterfaceStatus = s
		}
	}
	for i := range rows {
		r := &rows[i]
		// With several inputs the rate is that of all, and each interface gets its share of the
		// matches.
		for i, in := range inputShares(&r.RuleStatus) {
			_, name, _ := strings.Cut(in.text, "%")
			name, _, _ = strings.Cut(name, ",")
			if i > 0 && in.share == 0 {
				get(name)
				continue
			}
			f := get(name)
			f.in.packets += r.rate.packets * in.share
			f.in.bits += r.rate.bits * in.share
		}
		for slot, o := range r.Outputs {
			if o.Interface == "" {
				_, o.Interface, _ = strings.Cut(o.Output, "%")
				o.Interface, _, _ = strings.Cut(o.Interface, ",")
			}
			f := get(o.Interface)
			f.out.packets += r.outs[slot].packets
			f.out.bits += r.outs[slot].bits
		}
	}
	all := make([]topInterface, 0, len(byName))
	for _, f := range byName {
		all = append(all, *f)
	}
	slices.SortFunc(all, func(a, b topInterface) int { return cmp.Compare(a.Name, b.Name) })
	return all
}

// changes are the events between two readings; if the daemon sends its own, only those about the
// daemon itself.
func changes(before, now *seen, told bool) (events []topEvent) {
	at := now.stats.Time
	add := func(format string, args ...any) {
		events = append(events, topEvent{at, fmt.Sprintf(format, args...)})
	}
	switch {
	case before.daemon != nil && now.daemon == nil:
		add("the daemon is gone; the kernel keeps relaying")
	case before.daemon == nil && now.daemon != nil, before.daemon != nil && before.daemon.PID != now.daemon.PID:
		add("a daemon runs, process %d", now.daemon.PID)
	}
	if told {
		return events
	}
	if (before.daemon == nil) == (now.daemon == nil) { // the kernel knows fewer states
		ruleChanges(before, now, add)
	}
	if before.daemon != nil && now.daemon != nil {
		old := map[string]string{}
		for _, i := range before.daemon.Interfaces {
			old[i.Name] = i.Link
		}
		for _, i := range now.daemon.Interfaces {
			if was, ok := old[i.Name]; ok && was != i.Link {
				add("interface %s: %s, was %s", i.Name, i.Link, was)
			}
		}
	}
	return events
}

func ruleChanges(before, now *seen, add func(format string, args ...any)) {
	old := make(map[string]*control.RuleStatus, len(before.stats.Rules))
	for i := range before.stats.Rules {
		old[before.stats.Rules[i].Name] = &before.stats.Rules[i]
	}
	for i := range now.stats.Rules {
		r := &now.stats.Rules[i]
		was := old[r.Name]
		delete(old, r.Name)
		switch {
		case was == nil:
			add("rule %s is new: %s", r.Name, stateText(r.State, r.Reason))
		case was.State != r.State:
			add("rule %s: %s, was %s", r.Name, stateText(r.State, r.Reason), was.State)
		case was.UsedPath != r.UsedPath:
			add("rule %s: path %s, was %s", r.Name, orDash(r.UsedPath), orDash(was.UsedPath))
		}
		if was == nil {
			continue
		}
		for slot := range min(len(r.Outputs), len(was.Outputs)) {
			if o := &r.Outputs[slot]; o.State != was.Outputs[slot].State {
				add("rule %s, output %d: %s, was %s", r.Name, slot, stateText(o.State, o.Reason), was.Outputs[slot].State)
			}
		}
	}
	var gone []string
	for name := range old {
		gone = append(gone, name)
	}
	slices.Sort(gone)
	for _, name := range gone {
		add("rule %s is gone", name)
	}
}

// inputShare is an input of a rule, and its share of the rule's matches.
type inputShare struct {
	text  string
	share float64
}

func inputShares(r *control.RuleStatus) []inputShare {
	if !several(*r) {
		return []inputShare{{r.In, 1}}
	}
	var all []inputShare
	for _, in := range r.Inputs {
		share := 0.0
		if r.Matched.Packets > 0 {
			share = float64(in.Matched.Packets) / float64(r.Matched.Packets)
		}
		all = append(all, inputShare{in.Input, share})
	}
	return all
}
