package rules

import (
	"bytes"
	"strings"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// ruleScanner parses rule files in the layout that FormatFile, people and most generators write,
// one rule at a time. The YAML package first builds a tree of the whole file, which takes some 20
// times the file's size.
//
//	rules:
//	  - name: cam1 # a comment
//	    in: "10.0.0.5@239.1.1.1:5000%eth0,vlan=7"
//	    out: [239.2.2.2:6000%eth1, '10.0.9.9:6000%eth2,ttl=16']
//	  - in: 239.1.1.2:5000%eth0
//	    out:
//	      - 239.2.2.3:6000%eth1
//	    name: cam2
//	  - {name: cam3, in: 239.1.1.3:5000%eth0, out: [239.2.2.4:6000%eth1]}
//
// This is a small subset of YAML, and everything the scanner accepts must parse as in the YAML
// package: known keys with a value, each on one line, as is each item of a list, each [list] and
// each {rule}; values in quotes without escapes, or of ASCII letters, digits and a few punctuation
// marks. Everything else, and so every syntax error, is left to the YAML package.
type ruleScanner struct {
	rest   []byte // after the current line
	line   []byte // the rest of the current line
	number int    // of the current line, from 1
	indent int    // of the current line; -1 at the end of the file

	nodes []*yaml.Node // of the current rule, reused for the next
	used  int
}

// minRuleSize is less than any rule takes in a file. It limits the room made for rules before they
// are parsed.
const minRuleSize = 32

// scan calls begin with the apparent number of rules in the file, then read for each of them. It
// returns false if the file has another layout or read returned false. A node equals that of the
// YAML package, without comments and columns and with the tag of text, whatever type YAML sees in a
// value. It is valid until read returns.
func (s *ruleScanner) scan(begin func(rules int), read func(rule *yaml.Node) bool) bool {
	if !s.next() || s.indent != 0 || !s.take("rules:") || !s.lineEnds() || !s.next() {
		return false
	}
	list := s.indent
	if list < 0 {
		return false
	}
	dash := strings.Repeat(" ", list) + "- "
	rules := 1 + bytes.Count(s.rest, []byte("\n"+dash))
	if bytes.HasPrefix(s.rest, []byte(dash)) {
		rules++
	}
	begin(min(rules, 1+len(s.rest)/minRuleSize))
	for s.indent == list {
		rule, ok := s.rule()
		if !ok || !read(rule) {
			return false
		}
	}
	return s.indent < 0
}

// next advances to the next line that is neither blank nor a comment, or to the end.
func (s *ruleScanner) next() bool {
	for len(s.rest) > 0 {
		line, rest, _ := bytes.Cut(s.rest, []byte{'\n'})
		s.line, s.rest = bytes.TrimLeft(line, " "), rest
		s.indent = len(line) - len(s.line)
		s.number++
		switch {
		case len(s.line) == 0:
		case s.line[0] != '#':
			return true
		case !printable(s.line):
			return false
		}
	}
	s.line, s.indent = nil, -1
	return true
}

// rule parses the list entry that begins on the current line, and advances past it.
func (s *ruleScanner) rule() (*yaml.Node, bool) {
	s.used = 0
	if !s.dash() {
		return nil, false
	}
	if s.line[0] == '{' {
		return s.flowRule()
	}
	n, column := s.node(yaml.MappingNode), s.indent
	for s.indent == column {
		key, ok := s.key()
		if !ok {
			return nil, false
		}
		value, ok := s.value(key.Value, column)
		if !ok {
			return nil, false
		}
		n.Content = append(n.Content, key, value)
	}
	return n, true
}

// flowRule parses a {rule}, and advances past it.
func (s *ruleScanner) flowRule() (*yaml.Node, bool) {
	n := s.node(yaml.MappingNode)
	n.Style = yaml.FlowStyle
	for more := s.take("{"); more; more = s.take(",") {
		s.blanks()
		key, ok := s.key()
		if !ok || !s.blanks() {
			return nil, false
		}
		value, ok := s.inline(key.Value, true)
		if !ok {
			return nil, false
		}
		n.Content = append(n.Content, key, value)
		s.blanks()
	}
	return n, s.take("}") && s.lineEnds() && s.next()
}

func (s *ruleScanner) key() (*yaml.Node, bool) {
	for _, key := range [...]string{"name", "in", "out", "path", "merge", "failover"} {
		if rest, ok := bytes.CutPrefix(s.line, []byte(key)); ok && len(rest) > 0 && rest[0] == ':' {
			s.line = rest[1:]
			return s.text(key), true
		}
	}
	return nil, false
}

// value parses what follows the colon of a key in a column, and advances past it.
func (s *ruleScanner) value(key string, column int) (*yaml.Node, bool) {
	if (key == "out" || key == "in") && s.lineEnds() {
		return s.items(column)
	}
	if !s.blanks() {
		return nil, false
	}
	n, ok := s.inline(key, false)
	return n, ok && s.lineEnds() && s.next()
}

// inline parses a value on the line of its key; inFlow says that it is in a {rule}.
func (s *ruleScanner) inline(key string, inFlow bool) (*yaml.Node, bool) {
	if (key == "out" || key == "in") && s.line[0] == '[' {
		return s.flow()
	}
	return s.scalar(inFlow)
}

// items parses a list with one item per line, which may begin in the column of its key.
func (s *ruleScanner) items(column int) (*yaml.Node, bool) {
	if !s.next() || s.indent < column {
		return nil, false
	}
	n, column := s.node(yaml.SequenceNode), s.indent
	for s.indent == column && s.line[0] == '-' {
		if !s.dash() {
			return nil, false
		}
		item, ok := s.scalar(false)
		if !ok || !s.lineEnds() || !s.next() {
			return nil, false
		}
		n.Content = append(n.Content, item)
	}
	return n, len(n.Content) > 0
}

// flow parses a [list].
func (s *ruleScanner) flow() (*yaml.Node, bool) {
	n := s.node(yaml.SequenceNode)
	n.Style = yaml.FlowStyle
	for more := s.take("["); more; more = s.take(",") {
		s.blanks()
		item, ok := s.scalar(true)
		if !ok {
			return nil, false
		}
		n.Content = append(n.Content, item)
		s.blanks()
	}
	return n, s.take("]")
}

// scalar parses a value; inFlow says that it is in a [list] or {rule}.
func (s *ruleScanner) scalar(inFlow bool) (*yaml.Node, bool) {
	if len(s.line) == 0 {
		return nil, false
	}
	if quote := s.line[0]; quote == '"' || quote == '\'' {
		return s.quoted(quote)
	}
	return s.plain(inFlow)
}

func (s *ruleScanner) quoted(quote byte) (*yaml.Node, bool) {
	value, rest, closed := bytes.Cut(s.line[1:], []byte{quote})
	if !closed || quote == '"' && bytes.IndexByte(value, '\\') >= 0 || !printable(value) {
		return nil, false
	}
	n := s.text(string(value))
	n.Style = yaml.SingleQuotedStyle
	if quote == '"' {
		n.Style = yaml.DoubleQuotedStyle
	}
	s.line = rest
	return n, true
}

func (s *ruleScanner) plain(inFlow bool) (*yaml.Node, bool) {
	end := 0
	for end < len(s.line) && isPlain(s.line[end], inFlow) {
		end++
	}
	value := string(s.line[:end])
	switch {
	case end == 0 || !isAlphanumeric(value[0]) || value[end-1] == ':':
		return nil, false
	case value == "null" || value == "Null" || value == "NULL":
		return nil, false // not text
	}
	s.line = s.line[end:]
	return s.text(value), true
}

// isPlain reports whether a byte is allowed in a value without quotes. The caller checks the rest
// of the line: nothing else continues a value that ends here.
func isPlain(b byte, inFlow bool) bool {
	switch b {
	case '.', ':', '%', '@', '/', '-', '+', '_', '=':
		return true
	case ',', '[', ']':
		return !inFlow
	}
	return isAlphanumeric(b)
}

func isAlphanumeric(b byte) bool {
	return b >= '0' && b <= '9' || b >= 'A' && b <= 'Z' || b >= 'a' && b <= 'z'
}

// printable reports whether a text is one line to YAML and contains nothing that it refuses:
// control characters, line separators, byte order marks.
func printable(b []byte) bool {
	for _, c := range b {
		if c < ' ' || c > '~' {
			return utf8.Valid(b) && !bytes.ContainsFunc(b, func(r rune) bool { return !unicode.IsPrint(r) })
		}
	}
	return true
}

// lineEnds reports whether the rest of the line is blank or a comment after a blank.
func (s *ruleScanner) lineEnds() bool {
	rest := bytes.TrimLeft(s.line, " ")
	return len(rest) == 0 || rest[0] == '#' && len(rest) < len(s.line) && printable(rest)
}

// dash consumes the dash of a list item; the column after it is the indentation of the item's
// contents.
func (s *ruleScanner) dash() bool {
	before := len(s.line)
	if !s.take("-") || !s.blanks() {
		return false
	}
	s.indent += before - len(s.line)
	return true
}

// blanks consumes blanks, and reports whether there were any with more text after them.
func (s *ruleScanner) blanks() bool {
	rest := bytes.TrimLeft(s.line, " ")
	some := len(rest) < len(s.line)
	s.line = rest
	return some && len(rest) > 0
}

func (s *ruleScanner) take(mark string) bool {
	rest, ok := bytes.CutPrefix(s.line, []byte(mark))
	s.line = rest
	return ok
}

func (s *ruleScanner) text(value string) *yaml.Node {
	n := s.node(yaml.ScalarNode)
	n.Tag, n.Value = "!!str", value
	return n
}

// node is a reset node on the current line.
func (s *ruleScanner) node(kind yaml.Kind) *yaml.Node {
	if s.used == len(s.nodes) {
		s.nodes = append(s.nodes, new(yaml.Node))
	}
	n := s.nodes[s.used]
	s.used++
	n.Kind, n.Style, n.Tag, n.Value, n.Content, n.Line = kind, 0, "", "", n.Content[:0], s.number
	return n
}
