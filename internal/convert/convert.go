// Package convert converts the configuration of other multicast relays to rules: of smcroute, of
// igmpproxy and of the static routes of FRR's pimd. It is pure: it reads no files and knows nothing
// about the host.
//
// Those programs route in the kernel: they forward groups with every UDP port, keep the sender's
// address and decrement the TTL, to interfaces whose threshold the TTL exceeds. So the rules made
// here have no port, src=keep, ttl=dec and, with a threshold, minttl. They also forward protocols
// other than UDP; rules do not.
package convert

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"xdpcast/pkg/rules"
)

// Format is the format of a configuration file.
type Format uint8

// The formats. Detect distinguishes them by their keywords.
const (
	Detect    Format = iota
	SMCRoute         // smcroute.conf(5)
	IGMPProxy        // igmpproxy.conf(5)
	FRR              // written by vtysh; pimd's interface commands `ip mroute` and `ip igmp join-group`
)

var formatNames = [...]string{"detect", "smcroute", "igmpproxy", "frr"}

// String is the name that ParseFormat parses.
func (f Format) String() string {
	if int(f) < len(formatNames) {
		return formatNames[f]
	}
	return fmt.Sprintf("Format(%d)", uint8(f))
}

// ParseFormat is the inverse of Format.String.
func ParseFormat(s string) (Format, error) {
	for i, name := range formatNames {
		if s == name {
			return Format(i), nil
		}
	}
	return 0, fmt.Errorf("format %q: want %s", s, strings.Join(formatNames[:], ", "))
}

// Line is a line of the file and its conversion: a rule, a note why it has no equivalent, or both.
// Lines merged into another line's rule are not listed.
type Line struct {
	Number int // from 1
	Text   string
	Rule   *rules.Rule
	Note   string
}

// Result is a converted file.
type Result struct {
	Format Format
	Lines  []Line // in the order of the file
}

// Rules are the rules made, a valid set.
func (r Result) Rules() (all []rules.Rule) {
	for _, l := range r.Lines {
		if l.Rule != nil {
			all = append(all, *l.Rule)
		}
	}
	return all
}

// Notes is the number of lines that have no, or only a partial, equivalent.
func (r Result) Notes() (n int) {
	for _, l := range r.Lines {
		if l.Note != "" {
			n++
		}
	}
	return n
}

// File formats the result as a rule file that rules.ParseFile parses, with the original line of
// each rule, and a comment for each line that has no equivalent.
func (r Result) File() []byte {
	var b []byte
	open := false
	for _, l := range r.Lines {
		b = fmt.Appendf(b, "# line %d: %s\n", l.Number, l.Text)
		if l.Note != "" {
			b = fmt.Appendf(b, "#   %s\n", l.Note)
		}
		if l.Rule == nil {
			continue
		}
		one := rules.AppendRule(nil, *l.Rule)
		if open {
			one = bytes.TrimPrefix(one, []byte("rules:\n"))
		}
		open = true
		b = append(b, one...)
	}
	if !open {
		b = append(b, rules.EndFile(nil)...)
	}
	return b
}

// MaxSize is the largest configuration that Parse reads, in bytes.
const MaxSize = 1 << 20

// Parse parses a configuration. Lines that it cannot convert are no error, but have a note; the
// error says that the file has none of the formats.
func Parse(data []byte, format Format) (Result, error) {
	if len(data) > MaxSize {
		return Result{}, fmt.Errorf("size %d bytes: want at most %d", len(data), MaxSize)
	}
	lines := split(data)
	if format == Detect {
		if format = detect(lines); format == Detect {
			return Result{}, fmt.Errorf("no line of smcroute.conf (mroute from ...), igmpproxy.conf (phyint ... upstream) or an FRR configuration (interface ..., ip mroute ...) found: want one of these, or say which it is")
		}
	}
	c := converter{result: Result{Format: format}}
	switch format {
	case SMCRoute:
		c.smcroute(lines)
	case IGMPProxy:
		c.igmpproxy(lines)
	case FRR:
		c.frr(lines)
	default:
		return Result{}, fmt.Errorf("format %v: want %s", format, strings.Join(formatNames[:], ", "))
	}
	return c.finish(), nil
}

// source is a line of the file split into words, without comments.
type source struct {
	number int
	text   string
	words  []string
}

// split splits the data into non-empty lines. '#' begins a comment in all formats, '!' in FRR's.
func split(data []byte) (all []source) {
	number := 0
	for line := range strings.Lines(string(data)) {
		number++
		text, _, _ := strings.Cut(line, "#")
		text = strings.Map(func(r rune) rune {
			if r == '\t' || r == '\r' || r == '\n' {
				return ' '
			}
			if !unicode.IsPrint(r) {
				return '?'
			}
			return r
		}, text)
		words := strings.Fields(text)
		if len(words) == 0 || strings.HasPrefix(words[0], "!") {
			continue
		}
		all = append(all, source{number, bounded(strings.Join(words, " ")), words})
	}
	return all
}

// maxText limits how much of a line is repeated.
const maxText = 200

func bounded(s string) string {
	if len(s) <= maxText {
		return s
	}
	return strings.ToValidUTF8(s[:maxText], "") + "..."
}

func (s source) word(i int) string {
	if i < len(s.words) {
		return s.words[i]
	}
	return ""
}

// detect finds the format by the first line that only one has.
func detect(lines []source) Format {
	for _, l := range lines {
		switch l.word(0) {
		case "mroute", "mgroup", "ssmgroup":
			return SMCRoute
		case "quickleave", "altnet", "whitelist":
			return IGMPProxy
		case "interface", "router", "frr", "hostname", "ip":
			return FRR
		case "phyint":
			switch l.word(2) {
			case "upstream", "downstream", "disabled":
				return IGMPProxy
			case "", "enable", "disable", "mrdisc", "ttl-threshold":
				return SMCRoute
			}
		}
	}
	return Detect
}

// route is the formats' common model: a group that arrives on an interface and leaves on others.
type route struct {
	line   source
	iface  string
	group  netip.Prefix
	source netip.Prefix // invalid: any
	out    []string
	join   rules.JoinPolicy
	groups []netip.Addr // with rules.JoinList
	note   string       // the part of the line without equivalent
}

// converter collects the results of the lines.
type converter struct {
	result Result
	routes []route
	ttl    map[string]uint8 // by output interface: the threshold that a TTL must exceed
}

// note records that a line has no equivalent.
func (c *converter) note(l source, format string, args ...any) {
	c.result.Lines = append(c.result.Lines, Line{Number: l.number, Text: l.text, Note: "no equivalent: " + fmt.Sprintf(format, args...)})
}

// finish makes rules from the routes. Invalid ones become notes.
func (c *converter) finish() Result {
	names := map[string]int{}
	inputs := map[rules.Input]int{} // by input: the line that takes it
	lines := make([]Line, len(c.routes))
	for i, r := range c.routes {
		lines[i] = Line{Number: r.line.number, Text: r.line.text, Note: r.note}
		rule := c.rule(r)
		if err := rule.Validate(); err != nil {
			lines[i].Note = "no equivalent: " + firstLine(err)
			continue
		}
		if line, ok := inputs[rule.In]; ok {
			lines[i].Note = fmt.Sprintf("no equivalent: line %d takes the same", line)
			continue
		}
		inputs[rule.In] = r.line.number
		rule.Name = unique(names, rule.Name)
		lines[i].Rule = &rule
	}
	for {
		var set []rules.Rule
		at := map[string]int{}
		for i, l := range lines {
			if l.Rule != nil {
				set = append(set, *l.Rule)
				at[l.Rule.Name] = i
			}
		}
		faults := faultsOf(rules.ValidateSet(set))
		if len(faults) == 0 {
			break
		}
		for _, f := range faults {
			if i, ok := at[f.Rule]; ok {
				lines[i].Rule, lines[i].Note = nil, "no equivalent: "+firstLine(f)
			}
		}
	}
	c.result.Lines = append(c.result.Lines, lines...)
	slices.SortStableFunc(c.result.Lines, func(a, b Line) int { return cmp.Compare(a.Number, b.Number) })
	return c.result
}

// faultsOf are the faults of a set, without the one that only counts the rest.
func faultsOf(err error) (all []*rules.FieldError) {
	list, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return nil
	}
	for _, err := range list.Unwrap() {
		var f *rules.FieldError
		if errors.As(err, &f) {
			all = append(all, f)
		}
	}
	return all
}

// firstLine is the first fault of a rule without the rule's name, which is generated.
func firstLine(err error) string {
	text, _, _ := strings.Cut(err.Error(), "\n")
	if rest, ok := strings.CutPrefix(text, `rule "`); ok {
		if _, fault, ok := strings.Cut(rest, `": `); ok {
			return fault
		}
	}
	return text
}

// rule is the rule of a route, not yet validated.
func (c *converter) rule(r route) rules.Rule {
	rule := rules.Rule{
		Name:   ruleName(r),
		In:     rules.Input{Interface: r.iface, Address: r.group.Addr(), Len: prefixLen(r.group)},
		Accept: rules.Acceptance{Join: r.join},
	}
	if len(r.groups) > 0 {
		rule.Accept.Extra = &rules.Extra{Groups: r.groups}
	}
	if r.source.IsValid() {
		rule.In.Source, rule.In.SourceLen = r.source.Addr(), prefixLen(r.source)
	}
	for _, name := range r.out {
		out := rules.Output{Interface: name, Address: rule.In.Address, Len: rule.In.Len, PortMode: rules.PortKeep}
		out.Policy.Source, out.Policy.TTL = rules.SourceKeep, rules.TTLDecrement
		if least := c.ttl[name]; least > 1 { // ttl=dec implies 1
			out.Policy.MinTTL = least + 1
		}
		rule.Out = append(rule.Out, out)
	}
	return rule
}

// prefixLen is a prefix length as in rules: 0 for one address.
func prefixLen(p netip.Prefix) uint8 {
	if p.IsSingleIP() {
		return 0
	}
	return uint8(p.Bits())
}

// ruleName is GROUP-INTERFACE, preceded by the source if there is one.
func ruleName(r route) string {
	name := prefixName(r.group) + "-" + r.iface
	if r.source.IsValid() {
		name = prefixName(r.source) + "-" + name
	}
	name = strings.Map(func(c rune) rune {
		if c < 0x80 && (unicode.IsLetter(c) || unicode.IsDigit(c) || strings.ContainsRune("._:-", c)) {
			return c
		}
		return '_'
	}, name)
	name = strings.TrimLeft(name, "._:-")
	return name[:min(len(name), rules.MaxNameLen)]
}

func prefixName(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.Addr().String() + "_" + strconv.Itoa(p.Bits())
}

// unique is a name that no rule has yet. names counts the requested names.
func unique(names map[string]int, name string) string {
	one := name
	for names[one] > 0 {
		names[name]++
		end := "-" + strconv.Itoa(names[name])
		one = name[:min(len(name), rules.MaxNameLen-len(end))] + end
	}
	names[one]++
	return one
}

// parsePrefix parses ADDRESS or ADDRESS/LEN. Bits after the length are allowed: the converted
// programs clear them.
func parsePrefix(s string) (netip.Prefix, error) {
	if addr, err := netip.ParseAddr(s); err == nil && addr.Zone() == "" {
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("address %s: want ADDRESS or ADDRESS/LEN", strconv.Quote(bounded(s)))
	}
	return p.Masked(), nil
}

// threshold parses a TTL threshold and stores it for the outputs to an interface.
func (c *converter) threshold(iface, s string) error {
	n, err := strconv.ParseUint(s, 10, 8)
	if err != nil || n > 254 {
		return fmt.Errorf("threshold %s: want 0 to 254", strconv.Quote(bounded(s)))
	}
	if c.ttl == nil {
		c.ttl = map[string]uint8{}
	}
	c.ttl[iface] = uint8(n)
	return nil
}

// membership is a group that the file joins.
type membership struct {
	line          source
	iface         string
	group, source netip.Prefix
	used          bool
}

// joinBy gives a route the memberships of the file: for one group its own; for a prefix all groups,
// or the individually joined ones.
func (r *route) joinBy(all []membership) {
	r.join = rules.JoinNone
	for i := range all {
		m := &all[i]
		if m.iface != r.iface || !m.group.Overlaps(r.group) || r.source.IsValid() && m.source.IsValid() && !m.source.Overlaps(r.source) {
			continue
		}
		m.used = true
		switch covers := m.group.Bits() <= r.group.Bits(); {
		case covers && r.group.IsSingleIP():
			r.join = rules.JoinDefault
		case covers && r.group.Addr().BitLen()-r.group.Bits() <= maxJoinBits:
			r.join, r.groups = rules.JoinAll, nil
		case !covers && m.group.IsSingleIP() && r.join != rules.JoinAll:
			r.join = rules.JoinList
			if !slices.Contains(r.groups, m.group.Addr()) {
				r.groups = append(r.groups, m.group.Addr())
			}
		default:
			r.note = "in part: the groups of " + m.group.String() + " are too many to join all; write join=GROUP+GROUP... for those in use"
		}
	}
}

// maxJoinBits corresponds to rules.MaxJoinAll.
const maxJoinBits = 12

// notJoined notes memberships that belong to no route.
func (c *converter) notJoined(all []membership) {
	for _, m := range all {
		if !m.used {
			c.note(m.line, "a membership goes with a rule that takes the group, and no route does")
		}
	}
}
