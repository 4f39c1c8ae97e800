package rules

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// MaxFileSize is the largest rule file that ParseFile reads, in bytes. A rule with two outputs
// takes about 150. Malicious content can take some 500 times its size in memory while it is parsed:
// callers should set a smaller limit for untrusted files.
const MaxFileSize = 32 << 20

// ParseFile parses a YAML rule file and validates the rules as a set:
//
//	rules:
//	  - name: cam1
//	    in: 10.0.0.5@239.1.1.1:5000%eth0
//	    out: [239.2.2.2:6000%eth1, "10.0.9.9:6000%eth2,ttl=16"]
//	    path: auto # optional
//
// A single output needs no list. An endpoint with a comma or a leading '[' needs quotes, as both
// have a meaning in YAML. A file without a list is refused: write "rules: []" for no rules. Unknown
// and repeated keys, aliases and further documents are refused, and so are include, which only
// ParseFiles follows, and mroute, which only ParseConfig accepts. Any YAML style works, but large
// files are parsed in a third of the time and a fifth of the memory if they are written as above or
// by FormatFile.
//
// The error joins a *FileError for every fault, one line each, ordered by line; at most 100, and
// the number of the rest. name is the file's name in errors. A file that is not YAML has one fault,
// since the rest cannot be read.
func ParseFile(name string, data []byte) ([]Rule, error) { return ParseFiles(name, data, nil) }

// FormatFile writes rules as YAML, without defaults; ParseFile returns equal rules. It refuses sets
// that ValidateSet refuses.
func FormatFile(rules []Rule) ([]byte, error) {
	if err := ValidateSet(rules); err != nil {
		return nil, err
	}
	var b []byte
	for _, r := range rules {
		b = AppendRule(b, r)
	}
	return EndFile(b), nil
}

// AppendRule appends a valid rule to the file b, which starts empty; it is FormatFile without the
// validation. EndFile completes the file.
func AppendRule(b []byte, r Rule) []byte {
	if len(b) == 0 {
		b = append(b, "rules:\n"...)
	}
	b = append(append(append(b, "  - name: "...), yamlText(r.Name)...), '\n')
	b = append(b, "    in: "...)
	if r.InputCount() == 1 {
		b = append(b, yamlText(FormatInput(r.In, r.Accept))...)
	}
	b = append(b, '\n')
	for i := 0; i < r.InputCount() && r.InputCount() > 1; i++ {
		leg := r.Leg(i)
		b = append(append(append(b, "      - "...), yamlText(FormatInput(leg.In, leg.Accept))...), '\n')
	}
	b = appendStream(b, &r)
	b = append(b, "    out:\n"...)
	for _, o := range r.Out {
		b = append(append(append(b, "      - "...), yamlText(o.String())...), '\n')
	}
	if r.Path != PathAuto {
		b = append(append(append(b, "    path: "...), r.Path.String()...), '\n')
	}
	return b
}

// appendStream writes how several inputs are merged.
func appendStream(b []byte, r *Rule) []byte {
	merge, failover := r.FormatStream()
	if merge != "" {
		b = append(append(append(b, "    merge: "...), strconv.Quote(merge)...), '\n')
	}
	if failover != "" {
		b = append(append(append(b, "    failover: "...), strconv.Quote(failover)...), '\n')
	}
	return b
}

// EndFile completes a file made by AppendRule, also one without rules.
func EndFile(b []byte) []byte {
	if len(b) == 0 {
		return []byte("rules: []\n")
	}
	return b
}

// yamlText quotes a name or endpoint if YAML could parse it as anything else, and an endpoint with
// a comma so that it can be moved into a [list]. Valid ones contain only printable characters,
// which Go and YAML quote alike.
func yamlText(s string) string {
	plain := func(r rune) bool {
		return r >= '0' && r <= '9' || r >= 'A' && r <= 'Z' || r >= 'a' && r <= 'z' || strings.ContainsRune(".:%@_-/", r)
	}
	rest := strings.TrimLeftFunc(s, plain)
	endpoint := strings.ContainsRune(s, '%') && !strings.HasPrefix(s, ":")
	if rest == "" && !strings.HasSuffix(s, ":") && (endpoint || plainName(s)) {
		return s
	}
	return strconv.Quote(s)
}

// plainName reports whether YAML parses a name as text: it begins with a letter, as no number does,
// and is not a word of another type (YAML 1.1 included).
func plainName(s string) bool {
	switch strings.ToLower(s) {
	case "true", "false", "yes", "no", "on", "off", "y", "n", "null":
		return false
	}
	return s[0] > '9' && !strings.ContainsRune(s, ':')
}

// fileParser parses one file.
type fileParser struct {
	name     string
	data     []byte
	rules    []Rule
	places   []rulePlace // by rule
	includes []includeText
	routes   *mrouteSection // nil: none
	broken   bool           // not YAML: its contents are unknown
	faults   []FileError
	hidden   int

	interfaces map[string]string // interned interface names
}

// rulePlace is the position of a rule in the file: line numbers, 0 for absent parts.
type rulePlace struct {
	rule, name, in, path int
	merge, failover      int
	ins                  []int    // of each of several inputs
	outs                 int      // of the value of out
	out                  []int    // of each output
	unread               []string // fields whose value could not be read, as in FieldError
}

func (p *fileParser) fault(line int, err error) {
	if len(p.faults) == maxFaults {
		p.hidden++
		return
	}
	p.faults = append(p.faults, FileError{Line: line, Err: err})
}

// parse parses the file; its rules are validated as part of their set.
func (p *fileParser) parse() {
	if len(p.data) > MaxFileSize {
		p.fault(0, fmt.Errorf("size %d bytes: want at most %d", len(p.data), MaxFileSize))
		p.broken = true
		return
	}
	if !p.scan() {
		p.read()
	}
}

// scan parses the rules of a file in the common layout. If there is any doubt or fault it returns
// false and has read nothing: read then finds the fault.
func (p *fileParser) scan() bool {
	s := ruleScanner{rest: p.data}
	ok := s.scan(p.grow, func(rule *yaml.Node) bool {
		p.rule(rule)
		return len(p.faults) == 0
	})
	if !ok {
		*p = fileParser{name: p.name, data: p.data}
	}
	return ok
}

// read parses the rules with the YAML package.
func (p *fileParser) read() {
	root, err := p.document()
	if err != nil {
		p.faults = append(p.faults, *err)
		p.broken = true
		return
	}
	if root == nil || isNull(root) {
		p.fault(0, errNoRules)
		return
	}
	values := p.mapping(root, "", "rules", "include", "mroute")
	if section := values[2]; section != nil {
		p.mroute(section)
	}
	if list := values[1]; list != nil && !isNull(list) {
		p.includeList(list)
		if values[0] == nil {
			return // the others have the rules
		}
	}
	switch list := values[0]; {
	case list == nil && len(p.faults) == 0:
		p.fault(root.Line, errNoRules)
	case list == nil: // reported already, or due to other faults
	case isNull(list):
		p.fault(list.Line, errNoRules)
	default:
		p.ruleList(list)
	}
}

// errNoRules is the error for a file without a list of rules. Such a file may be the output of a
// failed program, or truncated.
var errNoRules = errors.New(`rules missing: want them in a list below "rules:", or "rules: []" for none`)

// grow makes room for rules.
func (p *fileParser) grow(rules int) {
	p.rules = make([]Rule, 0, rules)
	p.places = make([]rulePlace, 0, rules)
}

// document is the value of the only document in the file, nil if there is none.
func (p *fileParser) document() (*yaml.Node, *FileError) {
	decoder := yaml.NewDecoder(bytes.NewReader(p.data))
	var first, second yaml.Node
	err := decoder.Decode(&first)
	if err == io.EOF {
		return nil, nil
	}
	if err == nil {
		err = decoder.Decode(&second)
	}
	switch {
	case err == nil:
		return nil, &FileError{Line: second.Line, Err: errors.New("a second document: want only one")}
	case err != io.EOF:
		return nil, syntaxFault(p.data, err)
	}
	return first.Content[0], nil
}

// mapping returns the values of the known keys, in their order, nil if absent, and reports other
// faults of the mapping, under the label of its rule.
func (p *fileParser) mapping(n *yaml.Node, label string, known ...string) []*yaml.Node {
	values := make([]*yaml.Node, len(known))
	if n.Kind != yaml.MappingNode {
		p.fault(n.Line, fmt.Errorf("%swant a mapping (%s), not %s", subjectOf(label), strings.Join(known, ", "), kindOf(n)))
		return values
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		name, isText := textOf(key)
		at := slices.Index(known, name)
		switch {
		case !isText:
			p.fault(key.Line, fmt.Errorf("%skey: want %s, not %s", subjectOf(label), strings.Join(known, ", "), kindOf(key)))
		case at < 0:
			p.fault(key.Line, fmt.Errorf("%sunknown key %s: want %s", subjectOf(label), quote(name), strings.Join(known, ", ")))
		case values[at] != nil:
			p.fault(key.Line, fmt.Errorf("%skey %q given again: want it once", subjectOf(label), name))
		default:
			values[at] = value
		}
	}
	return values
}

func (p *fileParser) ruleList(n *yaml.Node) {
	if n.Kind != yaml.SequenceNode {
		p.fault(n.Line, fmt.Errorf("rules: want a list, not %s", kindOf(n)))
		return
	}
	p.grow(len(n.Content))
	for _, item := range n.Content {
		p.rule(item)
	}
}

// rule parses one rule. Unreadable fields are reported, left zero and marked as unread, so that the
// rest can still be validated.
func (p *fileParser) rule(n *yaml.Node) {
	r := ruleReader{fileParser: p, place: rulePlace{rule: n.Line}}
	if n.Kind == yaml.MappingNode {
		r.label = mappingName(n)
	}
	if r.label == "" {
		r.label = "#" + strconv.Itoa(len(p.rules)+1)
	}
	values := p.mapping(n, r.label, "name", "in", "out", "path", "merge", "failover")
	if n.Kind != yaml.MappingNode {
		r.place.unread = []string{"name", "in", "out"}
	}
	if v := values[0]; v != nil {
		r.name(v)
	}
	if v := values[1]; v != nil {
		r.in(v)
	}
	if v := values[2]; v != nil {
		r.outs(v)
	}
	if v := values[3]; v != nil {
		r.path(v)
	}
	r.streams(values[4], values[5])
	r.rule.In.Interface = p.shared(r.rule.In.Interface)
	for i := range r.rule.Out {
		r.rule.Out[i].Interface = p.shared(r.rule.Out[i].Interface)
	}
	p.rules = append(p.rules, r.rule)
	p.places = append(p.places, r.place)
}

// shared interns an interface name: the names in the rules are substrings of the endpoints, and
// would keep each endpoint in memory.
func (p *fileParser) shared(iface string) string {
	if one, ok := p.interfaces[iface]; ok {
		return one
	}
	one := strings.Clone(iface)
	if p.interfaces == nil {
		p.interfaces = make(map[string]string)
	}
	p.interfaces[one] = one
	return one
}

// mappingName is the name of a rule for messages, "" if it has none.
func mappingName(n *yaml.Node) string {
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == "name" {
			name, _ := textOf(n.Content[i+1])
			return name
		}
	}
	return ""
}

// ruleReader parses the values of one rule.
type ruleReader struct {
	*fileParser
	rule  Rule
	place rulePlace
	label string // as in FieldError.Rule
}

// subjectOf is the beginning of an error about the rule with a label; "" is no rule.
func subjectOf(label string) string {
	if label == "" {
		return ""
	}
	return "rule " + quote(label) + ": "
}

// unread reports a field with an unreadable value.
func (r *ruleReader) unread(line int, field string, err error) {
	r.fault(line, fmt.Errorf("%s%w", subjectOf(r.label), err))
	r.place.unread = append(r.place.unread, field)
}

// text is the text of a value; any other value is reported.
func (r *ruleReader) text(n *yaml.Node, field string) (string, bool) {
	s, ok := textOf(n)
	if !ok {
		r.unread(n.Line, field, notText(n, field))
	}
	return s, ok
}

func notText(n *yaml.Node, field string) error {
	return fmt.Errorf("%s: want text, not %s", field, kindOf(n))
}

func (r *ruleReader) name(n *yaml.Node) {
	r.place.name = n.Line
	r.rule.Name, _ = r.text(n, "name")
}

func (r *ruleReader) in(n *yaml.Node) {
	r.place.in = n.Line
	if n.Kind == yaml.SequenceNode {
		r.ins(n)
		return
	}
	s, ok := r.text(n, "in")
	if !ok {
		return
	}
	if err := r.rule.ParseInputs(s); err != nil {
		r.unread(n.Line, "in", err)
	}
}

// ins parses a list of inputs.
func (r *ruleReader) ins(n *yaml.Node) {
	for i, item := range n.Content {
		r.place.ins = append(r.place.ins, item.Line)
		field := end{slot: inputSlot - 1 - i}.field()
		if len(n.Content) == 1 {
			field = "in"
		}
		s, ok := textOf(item)
		if !ok {
			r.unread(item.Line, field, notText(item, field))
			continue
		}
		in, accept, err := ParseInput(s)
		if err != nil {
			if n.Style&yaml.FlowStyle != 0 && isOption(s) {
				err = fmt.Errorf(`input %s: want an address before it: quote an input that has options, "ADDRESS:PORT%%INTERFACE,%s"`, quote(s), bounded(s))
			}
			r.unread(item.Line, field, err)
		}
		if i == 0 {
			r.rule.In, r.rule.Accept = in, accept
			continue
		}
		in.Interface = r.shared(in.Interface)
		r.rule.stream().Legs = append(r.rule.stream().Legs, Leg{in, accept})
	}
}

// isOption reports whether the text is an input option rather than an input.
func isOption(s string) bool {
	_, err := parseOptions(s, new(Input))
	return err == nil
}

// streams parses how several inputs are merged; each node may be nil.
func (r *ruleReader) streams(merge, failover *yaml.Node) {
	if merge != nil {
		r.place.merge = merge.Line
		if s, ok := r.text(merge, "merge"); ok {
			if err := r.rule.ParseStream(s, ""); err != nil {
				r.unread(merge.Line, "merge", err)
			}
		}
	}
	if failover != nil {
		r.place.failover = failover.Line
		if s, ok := r.text(failover, "failover"); ok {
			if err := r.rule.ParseStream("", s); err != nil {
				r.unread(failover.Line, "failover", err)
			}
		}
	}
}

func (r *ruleReader) path(n *yaml.Node) {
	r.place.path = n.Line
	s, ok := r.text(n, "path")
	if !ok {
		return
	}
	path, err := ParsePath(s)
	if err != nil {
		r.unread(n.Line, "path", err)
	}
	r.rule.Path = path
}

func (r *ruleReader) outs(n *yaml.Node) {
	r.place.outs = n.Line
	switch {
	case isNull(n):
	case n.Kind == yaml.ScalarNode:
		r.out(n, false)
	case n.Kind != yaml.SequenceNode:
		r.unread(n.Line, "out", fmt.Errorf("out: want a list of outputs, not %s", kindOf(n)))
	default:
		r.rule.Out = make([]Output, 0, len(n.Content))
		r.place.out = make([]int, 0, len(n.Content))
		for _, item := range n.Content {
			r.out(item, n.Style&yaml.FlowStyle != 0)
		}
	}
}

// out parses an output; inFlow says that it is in a [list], where a comma ends it unless it is
// quoted.
func (r *ruleReader) out(n *yaml.Node, inFlow bool) {
	var out Output
	if s, ok := textOf(n); !ok {
		field := outField(len(r.rule.Out))
		r.unread(n.Line, field, notText(n, field))
	} else if parsed, err := ParseOutput(s); err != nil {
		if inFlow && isPolicy(s) {
			err = fmt.Errorf(`output %s: want an address before it: quote an output that has policies, "ADDRESS:PORT%%INTERFACE,%s"`, quote(s), bounded(s))
		}
		r.unread(n.Line, outField(len(r.rule.Out)), err)
	} else {
		out = parsed
	}
	r.rule.Out = append(r.rule.Out, out)
	r.place.out = append(r.place.out, n.Line)
}

// isPolicy reports whether the text is a policy rather than an output.
func isPolicy(s string) bool {
	_, err := parsePolicy(s)
	return err == nil
}

// line is the line of a field, or of the rule if the field is absent.
func (l rulePlace) line(field string) int {
	line := 0
	switch {
	case field == "name":
		line = l.name
	case field == "path":
		line = l.path
	case field == "merge":
		line = cmp.Or(l.merge, l.in)
	case field == "failover":
		line = cmp.Or(l.failover, l.in)
	case strings.HasPrefix(field, "in[") && len(l.ins) > 0:
		at, _, _ := strings.Cut(field[len("in["):], "]")
		if n, err := strconv.Atoi(at); err == nil && n < len(l.ins) {
			line = l.ins[n]
		}
	case strings.HasPrefix(field, "in"):
		line = l.in
	case strings.HasPrefix(field, "out["):
		slot, _, _ := strings.Cut(field[len("out["):], "]")
		if n, err := strconv.Atoi(slot); err == nil && n < len(l.out) {
			line = l.out[n]
		}
	default:
		line = l.outs
	}
	return cmp.Or(line, l.rule)
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" }

// textOf is the text of a scalar as written, so that a rule may be named 1.50; "" for null. It is
// false for other nodes and for text tagged as another type.
func textOf(n *yaml.Node) (string, bool) {
	if n.Kind != yaml.ScalarNode {
		return "", false
	}
	tag := n.ShortTag()
	if n.Style&yaml.TaggedStyle != 0 && tag != "!!str" {
		return "", false
	}
	if tag == "!!null" {
		return "", true
	}
	return n.Value, true
}

// kindOf names the kind of a node for a message.
func kindOf(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	case yaml.AliasNode:
		return "an alias: aliases are not supported"
	}
	if n.Style&yaml.TaggedStyle != 0 {
		return "a value tagged " + quote(n.Tag)
	}
	if isNull(n) {
		return "nothing"
	}
	return "text"
}
