package rules

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// scanFile is the rules that the scanner takes, copied, and whether it took the file.
func scanFile(data []byte) ([]*yaml.Node, bool) {
	var list []*yaml.Node
	s := ruleScanner{rest: data}
	ok := s.scan(func(int) {}, func(n *yaml.Node) bool {
		list = append(list, copyNode(n))
		return true
	})
	return list, ok
}

func copyNode(n *yaml.Node) *yaml.Node {
	c := *n
	c.Content = nil
	for _, part := range n.Content {
		c.Content = append(c.Content, copyNode(part))
	}
	return &c
}

// checkScan holds what is made of a file to what the YAML package makes of it: the
// nodes if the scanner takes it, the rules, their places and the faults in any case.
// It tells whether the scanner takes the file.
func checkScan(t *testing.T, data []byte) bool {
	t.Helper()
	list, taken := scanFile(data)
	if taken {
		checkSameNodes(t, data, list)
	}
	got, want := fileParser{name: "f.yaml", data: data}, fileParser{name: "f.yaml", data: data}
	got.parse()
	want.read()
	gotSet, wantSet := fileSet{files: []*fileParser{&got}}, fileSet{files: []*fileParser{&want}}
	gotSet.validate()
	wantSet.validate()
	gotErr, wantErr := gotSet.join(), wantSet.join()
	if g, w := errorLines(gotErr), errorLines(wantErr); !slices.Equal(g, w) {
		t.Errorf("%q (taken: %v):\ngot faults  %q\nwant faults %q", data, taken, g, w)
	}
	if !slices.EqualFunc(got.rules, want.rules, Equal) || (got.rules == nil) != (want.rules == nil) {
		t.Errorf("%q (taken: %v):\ngot rules  %v\nwant rules %v", data, taken, got.rules, want.rules)
	}
	if !reflect.DeepEqual(got.places, want.places) {
		t.Errorf("%q (taken: %v):\ngot places  %+v\nwant places %+v", data, taken, got.places, want.places)
	}
	return taken
}

func checkSameNodes(t *testing.T, data []byte, list []*yaml.Node) {
	t.Helper()
	p := fileParser{data: data}
	root, err := p.document()
	switch {
	case err != nil:
		t.Errorf("%q: taken, and the YAML package refuses it: %v", data, err)
	case root == nil || root.Kind != yaml.MappingNode || len(root.Content) != 2 || root.Content[0].Value != "rules" || root.Content[1].Kind != yaml.SequenceNode:
		t.Errorf("%q: taken, and the YAML package reads no list of rules: %+v", data, root)
	case !slices.EqualFunc(list, root.Content[1].Content, sameNode):
		t.Errorf("%q:\ngot  %s\nwant %s", data, nodesText(list), nodesText(root.Content[1].Content))
	}
}

// sameNode reports whether two nodes are the same to the reader of rules.
func sameNode(a, b *yaml.Node) bool {
	aText, aIsText := textOf(a)
	bText, bIsText := textOf(b)
	return a.Kind == b.Kind && a.Style == b.Style && a.Line == b.Line && a.Value == b.Value && a.Anchor == b.Anchor && a.Alias == b.Alias &&
		aText == bText && aIsText == bIsText && isNull(a) == isNull(b) && kindOf(a) == kindOf(b) &&
		slices.EqualFunc(a.Content, b.Content, sameNode)
}

func nodesText(list []*yaml.Node) string {
	var b strings.Builder
	var write func(n *yaml.Node)
	write = func(n *yaml.Node) {
		fmt.Fprintf(&b, " line %d: %s %s %q", n.Line, kindOf(n), n.ShortTag(), n.Value)
		for _, part := range n.Content {
			write(part)
		}
		b.WriteString(";")
	}
	for _, n := range list {
		write(n)
	}
	return b.String()
}

// scanHead is a file as far as the outputs of its first rule.
const scanHead = "rules:\n- name: a\n  in: 239.1.1.1:1%eth0\n"

// takenFiles are in the common shape.
var takenFiles = []string{
	"rules:\n  - name: cam1\n    in: 10.0.0.5@239.1.1.1:5000%eth0\n    out: [239.2.2.2:6000%eth1, \"10.0.9.9:6000%eth2,ttl=16\"]\n    path: auto\n",
	"rules:\n- name: a\n  in: 239.1.1.1:1%eth0\n  out:\n  - 239.1.1.2:1%eth1\n  - '239.1.1.3:1%eth1,ttl=4'\n  path: kernel",
	"rules:\n      -   path: 'fanout'\n          out:\n             -     239.1.1.2:1%eth1,ttl=8\n             - \"[ff0e::2]:1%é\"\n          in: '239.1.1.1:1%eth0'\n          name: \"a\"\n",
	"# grüße\n\n   # of a file\nrules:   # here\n# there\n- name: a # and\n#there\n  in: 239.1.1.1:1%eth0   \n    # again\n\n  out:   # a list\n     # of\n  - 239.1.1.2:1%eth1 # one\n     # item\n  # end\n# end\n",
	scanHead + "  out: 239.1.1.2:1%eth1\n- out: [ 239.1.1.2:1%eth1 ,\"239.1.1.3:1%eth1\",'239.1.1.4:1%eth1']   # c\n  name: b\n  in: 239.1.1.1:2%eth0\n",
	scanHead + "  out: 2001:db8::5@[ff0e::1]:1%eth0\n", // a fault of the rules, not of the file
	scanHead + "  out: 239.1.1.2:1%eth1\n- name: a\n\n  # c\n  in: 239.1.1.1:1%eth0\n  out: [239.1.1.2:1%eth1, 239.1.1.2:1%eth1]\n", // found across rules
	scanHead + "  out: x\n  out: y\n",
	scanHead,
	"rules:\n- name: 007\n- name: 1e3\n- name: 0x1\n- name: yes\n- name: true\n- name: 1.50\n- name: 2001-01-01\n- name: 12:30:45\n- name: 1_000\n- name: 0o7\n- name: 0b1\n- name: Off\n- name: y\n- name: nullX\n",
	"rules:\n- name: \"null\"\n- name: '~'\n- name: \"\"\n- name: ''\n- name: ' a '\n- name: \"a # b: c\"\n- name: 'a\"b'\n- name: \"a'b\"\n- name: \"- a\"\n- name: \"&a *b !c\"\n",
	"rules:\n- name: a:b\n- name: a,b\n- name: a[b]\n- name: a/b\n- name: a@b%c\n- name: a=b+c-\n- name: a]\n- name: a,\n- name: 1.\n",
	"rules:\n- path: kernel\n  out:\n  - a\n- path: x\n  in: z\n",
	"rules:\n- {name: a}\n", "rules:\n- { name: 'a', name: \"b\" }\n- {out: x , out: [y ,z] ,in: 1}\n", "rules:\n- {name: \"a}\"}\n- {name: 'a, b: c'}\n",
	"rules:\n  # c\n  -   {name: cam1, path: kernel, in: \"10.0.0.5@239.1.1.1:5000%eth0\", out: [\"239.2.2.2:6000%eth1,ttl=8\", 10.0.9.9:6000%eth2]}   # c\n\n  - name: b\n    in: 239.1.1.1:2%eth0\n    out: 239.1.1.2:1%eth1\n  - {in: 239.1.1.2:5000%eth0, out: 239.1.1.3:1%eth1, name: c}",
}

// leftFiles use more of YAML, or are not YAML.
var leftFiles = []string{
	"", "\n", "#", "rules:", "rules:\n", "rules: []\n", "rules: {}\n", "rules: ~\n", "rules:\n-\n", "rules:\n- \n", "rules:\n- a\n", "rules:\n- - a\n", "rules:\n-name: a\n",
	"---\n" + scanHead, scanHead + "...\n", scanHead + "---\n", "%YAML 1.1\n---\n" + scanHead, "\ufeff" + scanHead, "\xff\xfer\x00", "\x00",
	" rules:\n - name: a\n", "\"rules\":\n- name: a\n", "rules :\n- name: a\n", "? rules\n: - name: a\n", "rules:- name: a\n", "rules: [{name: a}]\n", "{rules: [{name: a}]}\n",
	scanHead + "rules:\n- name: b\n", scanHead + "other: x\n", scanHead + "x\n", scanHead + " - name: b\n", scanHead + "   out: x\n", scanHead + " out: x\n", scanHead + "out: x\n",
	"rules:\n  - name: a\n   - name: b\n", "rules:\n  - name: a\n - name: b\n", "rules:\n  - name: a\n- name: b\n", "rules:\n  -  name: a\n    in: b\n", "rules:\n -\n  name: a\n", "rules:\n- # c\n  name: a\n",
	"rules:\r\n- name: a\r\n", "rules:\n- name: a\r\n", "rules:\r- name: a\r", "rules:\n- name: a\rb\n", "rules:\n- name: \"a\r\"\n",
	"rules:\n-\tname: a\n", "rules:\n\t- name: a\n", "rules:\n- name:\ta\n", "rules:\n- name: a\t\n", "rules:\n- name: a\t# c\n", "rules:\n\t\n- name: a\n", "rules:\n- name: \"a\tb\"\n", "rules:\n- name: a # c\t\n",
	"rules:\n- name:\n", "rules:\n- name: \n", "rules:\n- name: # c\n", "rules:\n- name: ~\n", "rules:\n- name: null\n", "rules:\n- name: Null\n", "rules:\n- name: NULL\n", "rules:\n- name\n", "rules:\n- name : a\n", "rules:\n- name:a\n", "rules:\n- \"name\": a\n", "rules:\n- 'name': a\n", "rules:\n- ? name\n  : a\n",
	"rules:\n- name: &x a\n", "rules:\n- name: *x\n", "rules:\n- name: !!str a\n", "rules:\n- name: ! a\n", "rules:\n- &r name: a\n", "rules:\n- &r\n  name: a\n", "rules: &r\n- name: a\n", "rules: !!seq\n- name: a\n", "rules:\n- <<: {name: a}\n", "rules:\n- name: a\n  <<: *r\n",
	"rules:\n- name: |\n    a\n", "rules:\n- name: >-\n    a\n", "rules:\n- name: a\n   b\n", "rules:\n- name: a\n    # c\n    b\n", "rules:\n- name: a\n\n    b\n", "rules:\n- name:\n    a\n", "rules:\n- name: \"a\n    b\"\n", "rules:\n- name: 'a\n    b'\n", "rules:\n- name: 'a\n", "rules:\n- name: \"a\n",
	"rules:\n- name: a b\n", "rules:\n- name: a #b c\n  x: y\n", "rules:\n- name: a#b\n", "rules:\n- name: \"a\"#b\n", "rules:\n- name: \"a\" b\n", "rules:\n- name: 'a''b'\n", "rules:\n- name: \"a\\\"b\"\n", "rules:\n- name: \"a\\u0041\"\n", "rules:\n- name: \"a\": b\n",
	"rules:\n- name: a:\n", "rules:\n- name: a: b\n", "rules:\n- name: a::\n", "rules:\n- name: :a\n", "rules:\n- name: -a\n", "rules:\n- name: - a\n", "rules:\n- name: --- \n", "rules:\n- name: ?a\n", "rules:\n- name: @a\n", "rules:\n- name: `a\n", "rules:\n- name: %a\n", "rules:\n- name: .5\n", "rules:\n- name: +1\n", "rules:\n- name: =\n", "rules:\n- name: <<\n", "rules:\n- name: é\n", "rules:\n- name: [a]\n", "rules:\n- name: {a: b}\n", "rules:\n- name: ,a\n", "rules:\n- name: ]a\n", "rules:\n- name: a{b\n", "rules:\n- name: a}\n",
	"rules:\n- name: \"a\u0085b\"\n", "rules:\n- name: a # c\u0085d\n", "rules:\n- name: a # c\u2028d\n", "# \u2029\nrules:\n- name: a\n", "# \xff\nrules:\n- name: a\n", "# \x00\nrules:\n- name: a\n", "# \x7f\nrules:\n- name: a\n", "# \ufeff\nrules:\n- name: a\n", "rules:\n- name: a # \x1b\n", "rules:\n- name: \"\u00a0\"\n", "# \ufffe\nrules:\n- name: a\n", "# \u009f\nrules:\n- name: a\n", "# \xed\xa0\x80\nrules:\n- name: a\n",
	scanHead + "  out:\n", scanHead + "  out:\n  path: auto\n", scanHead + "  out:\n  -\n", scanHead + "  out:\n  - a\n   b\n", scanHead + "  out:\n  - a\n    b\n", scanHead + "  out:\n    - a\n   - b\n", scanHead + "  out:\n    - a\n  - b\n", scanHead + "  out:\n    - a\n      - b\n", scanHead + "  out:\n - a\n", scanHead + "  out:\n- a\n", scanHead + "  out:\n  - - a\n", scanHead + "  out:\n  - a: b\n", scanHead + "  out:\n  - [a]\n", scanHead + "  out:\n  - {a: b}\n", scanHead + "  out:\n    a\n", scanHead + "  out: a\n  - b\n", scanHead + "  out: - b\n", scanHead + "  out:\n  - &x a\n  - *x\n", scanHead + "  out:\n  - a\n  x\n", scanHead + "  out:\n  -a\n", scanHead + "  out:[a]\n",
	scanHead + "  out: []\n", scanHead + "  out: [ ]\n", scanHead + "  out: [a,]\n", scanHead + "  out: [,a]\n", scanHead + "  out: [a,,b]\n", scanHead + "  out: [a b]\n", scanHead + "  out: [a: b]\n", scanHead + "  out: [a:]\n", scanHead + "  out: [a:,b]\n", scanHead + "  out: [[a]]\n", scanHead + "  out: [{a: b}]\n", scanHead + "  out: [\"a\": b]\n", scanHead + "  out: [\"a\"b]\n", scanHead + "  out: [a \"b\"]\n", scanHead + "  out: [a\"b\"]\n", scanHead + "  out: [ff0e::1]:1%eth0\n", scanHead + "  out: [a] b\n", scanHead + "  out: [a]# c\n", scanHead + "  out: [a\n", scanHead + "  out: [a,\n    b]\n", scanHead + "  out: [\n    a,\n    b\n  ]\n", scanHead + "  out: [a # c\n    ]\n", scanHead + "  out: [a]]\n", scanHead + "  out: [? a]\n", scanHead + "  out: [-a]\n", scanHead + "  out: [- a]\n", scanHead + "  out: [null]\n", scanHead + "  out: [~]\n", scanHead + "  out: [&x a, *x]\n", scanHead + "  out: [a#b]\n", scanHead + "  out: [a}]\n", scanHead + "  out: ['a''b']\n", scanHead + "  out: [\"a,\n    b\"]\n", scanHead + "  out: &x [a]\n", scanHead + "  out: !!seq [a]\n", scanHead + "  out: [a]: b\n", scanHead + "  out: [a] : b\n",
	"rules:\n- {}\n", "rules:\n- { }\n", "rules:\n- {name: a,}\n", "rules:\n- {,name: a}\n", "rules:\n- {name: a,, in: b}\n", "rules:\n- {name}\n", "rules:\n- {name:}\n", "rules:\n- {name: }\n", "rules:\n- {name:a}\n", "rules:\n- {name : a}\n", "rules:\n- {\"name\":a}\n", "rules:\n- {\"name\": a}\n", "rules:\n- {name: a\n", "rules:\n- {name: a\n  }\n", "rules:\n- {name: a,\n  in: b}\n", "rules:\n- {name: a}}\n", "rules:\n- {name: a} x\n", "rules:\n- {name: a}# c\n", "rules:\n- {name: a}: b\n", "rules:\n- {name: a}\n  in: b\n", "rules:\n- {name: a}\n   # c\n  x\n", "rules:\n- {name: a # c}\n", "rules:\n- {name: a b}\n", "rules:\n- {name: a: b}\n", "rules:\n- {name: a:}\n", "rules:\n- {name: a:, in: b}\n", "rules:\n- {name: [a]}\n", "rules:\n- {name: {a: b}}\n", "rules:\n- {name: null}\n", "rules:\n- {name: ~}\n", "rules:\n- {name: *x}\n", "rules:\n- {name: a{b}\n", "rules:\n- {out: []}\n", "rules:\n- {out: [a}\n", "rules:\n- {out: [a]]}\n", "rules:\n- {out: [a]b}\n", "rules:\n- {out:\n  - a}\n", "rules:\n- {name: \"a\\\"\"}\n", "rules:\n- {name: 'a''b'}\n", "rules:\n- {name: a\tb}\n", "rules:\n- {? name: a}\n", "rules:\n- {<<: a}\n", "rules:\n- {NAME: a}\n", "rules:\n-{name: a}\n", "rules:\n- &x {name: a}\n",
	scanHead + "  IN: x\n", scanHead + "  names: x\n", scanHead + "  1: x\n", scanHead + "  # c\n  : x\n", "x: y\n" + scanHead,
}

func TestScanTakes(t *testing.T) {
	for _, text := range takenFiles {
		if !checkScan(t, []byte(text)) {
			t.Errorf("%q: left to the YAML package", text)
		}
	}
	data, err := FormatFile(camRules(1000))
	if err != nil || !checkScan(t, data) || !checkScan(t, compactFile(camRules(1000))) || !checkScan(t, flowFile(camRules(1000))) {
		t.Errorf("written rules left to the YAML package, %v", err)
	}
}

func TestScanLeaves(t *testing.T) {
	for _, text := range leftFiles {
		if checkScan(t, []byte(text)) {
			t.Errorf("%q: taken", text)
		}
	}
}

// TestScanIsBounded: room is made for the rules that there are, and not for what
// only looks like rules.
func TestScanIsBounded(t *testing.T) {
	room := func(data []byte) (rules int) {
		s := ruleScanner{rest: data}
		s.scan(func(n int) { rules = n }, func(*yaml.Node) bool { return false })
		return rules
	}
	data, err := FormatFile(camRules(1000))
	if err != nil {
		t.Fatal(err)
	}
	for _, data := range [][]byte{data, compactFile(camRules(1000)), flowFile(camRules(1000))} {
		if n := room(data); n != 1000 {
			t.Errorf("room for %d rules of 1000", n)
		}
	}
	dashes := []byte("rules:\n- name: a" + strings.Repeat("\n- ", 10_000))
	if n := room(dashes); n > len(dashes)/minRuleSize+1 {
		t.Errorf("room for %d rules in %d bytes", n, len(dashes))
	}
}

// TestScanRandom changes files of the common shape at random.
func TestScanRandom(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	taken := 0
	const files = 5_000
	for range files {
		if checkScan(t, randomFile(r)) {
			taken++
		}
		if t.Failed() {
			return
		}
	}
	if taken < files/10 || taken > files*9/10 {
		t.Errorf("%d of %d files taken: want some taken and some left", taken, files)
	}
}

// scanPieces are put into files: what means something to YAML, and breaks.
var scanPieces = []string{
	"\n", "\n\n", " ", "  ", "\n  ", "\n    ", "\n- ", "\n  - ", "\n    - ", "- ", "-", ":", ": ", ",", ", ", "[", "]", "{", "}", "#", " #", " # c", "# c\n", "\n# c\n", "\n      # c\n",
	"\"", "'", "''", "\\", "\\\"", "&a ", "*a", "!", "!!str ", "|", ">", "?", "? ", "~", "null", "%", "@", "`", "\t", "\r", "\r\n", "\n---\n", "\n...\n", "\ufeff", "\u0085", "\u2028", "\u00a0", "é", "\x00", "\x7f", "\xff",
	"name: ", "in: ", "out: ", "out:\n", "path: auto\n", "x", "a", "0", "1e3", "0x1", "true", ".", "<<: ", "=", "+", "rules:\n", "- name: b\n", "[a, b]", "\"a, b\"", "'a'", "1.1.1.1:1%e", ",ttl=8",
}

// randomFile is a file of the common shape with some changes.
func randomFile(r *rand.Rand) []byte {
	text := []byte(takenFiles[r.IntN(len(takenFiles))])
	for range r.IntN(4) {
		at := r.IntN(len(text) + 1)
		to := min(len(text), at+r.IntN(5))
		switch r.IntN(6) {
		case 0:
			text = slices.Delete(text, at, to)
		case 1: // a line moved
			lines := bytes.SplitAfter(text, []byte("\n"))
			i, j := r.IntN(len(lines)), r.IntN(len(lines))
			lines[i], lines[j] = lines[j], lines[i]
			text = bytes.Join(lines, nil)
		case 2: // a line moved to the side
			lines := bytes.SplitAfter(text, []byte("\n"))
			i := r.IntN(len(lines))
			lines[i] = append(bytes.Repeat([]byte(" "), r.IntN(7)), bytes.TrimLeft(lines[i], " ")...)
			text = bytes.Join(lines, nil)
		case 3: // a line twice
			lines := bytes.SplitAfter(text, []byte("\n"))
			i := r.IntN(len(lines))
			text = bytes.Join(slices.Insert(lines, i, lines[i]), nil)
		default:
			text = slices.Insert(text, at, []byte(scanPieces[r.IntN(len(scanPieces))])...)
		}
	}
	return text
}

// FuzzScan: what the scanner takes, the YAML package reads as the same.
func FuzzScan(f *testing.F) {
	for _, text := range slices.Concat(takenFiles, leftFiles, scanPieces) {
		f.Add([]byte(text))
	}
	for _, c := range goodFiles(f) {
		f.Add([]byte(c.text))
	}
	for _, c := range faultyFiles() {
		f.Add([]byte(c.text))
	}
	f.Fuzz(func(t *testing.T, data []byte) { checkScan(t, data) })
}
