package docs

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode"

	"xdpcast/bpf"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/rules"
)

// parseLine parses a rule as the documents write it: NAME: INPUT... -> OUTPUT... and so on.
func parseLine(line string) (r rules.Rule, err error) {
	name, rest, ok := strings.Cut(line, ": ")
	if !ok {
		return r, fmt.Errorf("%q: want NAME: INPUT -> OUTPUT", line)
	}
	return parseRule(name, rest)
}

// parseRule parses INPUT... -> OUTPUT... [path=PATH] [merge=MERGE] [failover=FAILOVER].
func parseRule(name, text string) (r rules.Rule, err error) {
	in, out, ok := strings.Cut(text, " -> ")
	if !ok {
		return r, fmt.Errorf("%q: want INPUT -> OUTPUT", text)
	}
	r.Name = name
	if err := r.ParseInputs(strings.TrimSpace(in)); err != nil {
		return r, err
	}
	for word := range strings.FieldsSeq(out) {
		merge, isMerge := strings.CutPrefix(word, "merge=")
		failover, isFailover := strings.CutPrefix(word, "failover=")
		switch {
		case isMerge:
			err = r.ParseStream(merge, "")
		case isFailover:
			err = r.ParseStream("", failover)
		}
		if err != nil {
			return r, err
		}
		if isMerge || isFailover {
			continue
		}
		if path, ok := strings.CutPrefix(word, "path="); ok {
			if r.Path, err = rules.ParsePath(path); err != nil {
				return r, err
			}
			continue
		}
		o, err := rules.ParseOutput(word)
		if err != nil {
			return r, err
		}
		r.Out = append(r.Out, o)
	}
	return r, nil
}

// ruleBlock parses a block of rules; it returns the text after "error: " separately.
func ruleBlock(text string) (set []rules.Rule, refusal string, err error) {
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if message, ok := strings.CutPrefix(line, "error: "); ok {
			refusal = message
			continue
		}
		r, err := parseLine(line)
		if err != nil {
			return nil, "", err
		}
		set = append(set, r)
	}
	return set, refusal, nil
}

// Every example of rules is one valid set.
func TestRuleExamples(t *testing.T) {
	checked := 0
	for name, text := range documents(t) {
		for _, b := range blocks(text) {
			if b.language != "rule" {
				continue
			}
			set, refusal, err := ruleBlock(b.text)
			if err == nil {
				err = rules.ValidateSet(set)
			}
			if err != nil || refusal != "" {
				t.Errorf("%s:%d: %v %s", name, b.line, err, refusal)
			}
			checked += len(set)
		}
	}
	if checked < 30 {
		t.Errorf("found %d rules only", checked)
	}
}

// Every set that a document calls refused is refused with these words.
func TestRefusedSets(t *testing.T) {
	checked := 0
	for name, text := range documents(t) {
		for _, b := range blocks(text) {
			if b.language != "refused" {
				continue
			}
			checked++
			set, want, err := ruleBlock(b.text)
			if err != nil {
				t.Errorf("%s:%d: %v", name, b.line, err)
				continue
			}
			if err := rules.ValidateSet(set); err == nil || err.Error() != want {
				t.Errorf("%s:%d: the program says\n%v\nthe document\n%s", name, b.line, err, want)
			}
		}
	}
	if checked < 3 {
		t.Errorf("found %d sets only", checked)
	}
}

// table is a table of a document, its cells trimmed.
type table struct {
	head []string
	rows []row
}

type row struct {
	line  int
	cells []string
}

func tables(text string) (all []table) {
	var now *table
	n := 0
	for line := range strings.Lines(withBlankBlocks(text)) {
		n++
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "|") {
			now = nil
			continue
		}
		cells := strings.Split(strings.Trim(line, "|"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		switch {
		case now == nil:
			all = append(all, table{head: cells})
			now = &all[len(all)-1]
		case strings.Trim(line, "|-: ") != "":
			now.rows = append(now.rows, row{n, cells})
		}
	}
	return all
}

// withBlankBlocks blanks the code blocks and keeps the line numbers.
func withBlankBlocks(text string) string {
	for _, b := range blocks(text) {
		text = strings.Replace(text, b.text, strings.Repeat("\n", strings.Count(b.text, "\n")), 1)
	}
	return text
}

// code returns the text of a cell between backquotes.
func code(cell string) (string, bool) {
	text, ok := strings.CutPrefix(cell, "`")
	if ok {
		text, ok = strings.CutSuffix(text, "`")
	}
	return text, ok && !strings.Contains(text, "`")
}

// refusalOf returns the program's message on a rule without its prefix: the name of the rule, or
// the whole input or output.
func refusalOf(text string) (string, error) {
	r, err := parseRule("x", text)
	if err == nil {
		err = r.Validate()
	}
	if err == nil {
		return "", errors.New("the rule is right")
	}
	var fault *rules.FieldError
	if !errors.As(err, &fault) {
		return "", fmt.Errorf("no fault of a field: %w", err)
	}
	if strings.Contains(err.Error(), "\n") {
		return "", fmt.Errorf("more than one fault: %w", err)
	}
	alone := *fault
	alone.Rule = ""
	if !strings.HasSuffix(err.Error(), alone.Error()) {
		return "", fmt.Errorf("%v does not end in %v", err, &alone)
	}
	return alone.Error(), nil
}

// Every refusal quoted in a document is the program's answer to the rule in the same row.
func TestRefusals(t *testing.T) {
	checked := 0
	for name, text := range documents(t) {
		for _, tab := range tables(text) {
			if tab.head[0] != "refused" {
				continue
			}
			for _, r := range tab.rows {
				checked++
				rule, isRule := code(r.cells[0])
				want, isMessage := code(r.cells[1])
				if !isRule || !isMessage {
					t.Errorf("%s:%d: want a rule and a message, each between backquotes", name, r.line)
					continue
				}
				if got, err := refusalOf(rule); err != nil || got != want {
					t.Errorf("%s:%d: %s: the program says\n%s\n%v\nthe document\n%s", name, r.line, rule, got, err, want)
				}
			}
		}
	}
	if checked < 40 {
		t.Errorf("found %d refusals only", checked)
	}
}

// endpoint is an input or output in running text; the grammar itself is in capitals.
var endpoint = regexp.MustCompile("`([^` ]*[0-9:][^` ]*%[^` ]+)`")

// Every endpoint in the text is valid.
func TestEndpoints(t *testing.T) {
	checked := 0
	for name, text := range documents(t) {
		for _, e := range endpoint.FindAllStringSubmatch(withoutBlocks(text), -1) {
			checked++
			_, _, inErr := rules.ParseInput(e[1])
			_, outErr := rules.ParseOutput(e[1])
			if inErr != nil && outErr != nil {
				t.Errorf("%s: %v; %v", name, inErr, outErr)
			}
		}
	}
	if checked < 10 {
		t.Errorf("found %d endpoints only", checked)
	}
}

// Every rule that a document adds by a command is valid.
func TestAddedRules(t *testing.T) {
	checked := 0
	for name, text := range documents(t) {
		for _, c := range commandLines(text) {
			rule, ok := addedRule(c.words)
			if !ok {
				continue
			}
			checked++
			r, err := parseLine(rule)
			if err == nil {
				err = r.Validate()
			}
			if err != nil {
				t.Errorf("%s:%d: %v", name, c.line, err)
			}
		}
	}
	if checked < 4 {
		t.Errorf("found %d rules only", checked)
	}
}

// addedRule is the rule of `xdpcast rule add`, in the form that parseLine reads.
func addedRule(words []string) (string, bool) {
	if len(words) < 4 || filepath.Base(words[0]) != "xdpcast" || words[1] != "rule" || words[2] != "add" {
		return "", false
	}
	in, out := "", ""
	for i := 4; i+1 < len(words); i += 2 {
		switch words[i] {
		case "--in":
			in = words[i+1]
		case "--out":
			out += " " + words[i+1]
		case "--path":
			out += " path=" + words[i+1]
		}
	}
	return words[3] + ": " + in + " ->" + out, true
}

// messageForms returns the messages of a package as patterns: each verb matches anything.
func messageForms(t *testing.T, dir string) (all []*regexp.Regexp) {
	t.Helper()
	files, err := filepath.Glob(root + dir + "/*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			lit, ok := n.(*ast.BasicLit)
			if !ok || lit.Kind != token.STRING {
				return true
			}
			text, err := strconv.Unquote(lit.Value)
			if err != nil {
				t.Fatal(err)
			}
			fixed := verb.ReplaceAllString(text, "")
			if len(fixed) >= 12 { // shorter ones match nearly everything
				all = append(all, regexp.MustCompile("^"+verb.ReplaceAllString(regexp.QuoteMeta(text), `\S+`)+"$"))
			}
			return true
		})
	}
	return all
}

var verb = regexp.MustCompile(`%[svdwq]`)

// Every state or path reason that a document quotes is one of the program's; words in capitals are
// placeholders.
func TestReasons(t *testing.T) {
	forms := slices.Concat(messageForms(t, "internal/plan"), messageForms(t, "internal/relay"), messageForms(t, "internal/network"))
	checked := 0
	for name, text := range documents(t) {
		for _, tab := range tables(text) {
			if head := strings.Join(tab.head, " | "); head != "reason | what to do" && head != "reason | then it takes" {
				continue
			}
			for _, r := range tab.rows {
				checked++
				if reason, ok := code(r.cells[0]); !ok || !matchesAny(forms, reason) {
					t.Errorf("%s:%d: the program has no reason %s", name, r.line, r.cells[0])
				}
			}
		}
	}
	if checked < 15 {
		t.Errorf("found %d reasons only", checked)
	}
	if matchesAny(forms, "interface IFACE was not found") {
		t.Error("a reason that the program does not give is found")
	}
}

func matchesAny(forms []*regexp.Regexp, text string) bool {
	for _, form := range forms {
		if form.MatchString(text) {
			return true
		}
	}
	return false
}

// tableOf is the only table under a heading of a document.
func tableOf(t *testing.T, name, heading string) table {
	t.Helper()
	var found []table
	for _, tab := range tables(read(t, name)) {
		if strings.Join(tab.head, " | ") == heading {
			found = append(found, tab)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%s has %d tables %q", name, len(found), heading)
	}
	return found[0]
}

// The table of drop reasons has exactly the program's, in its order.
func TestDropReasons(t *testing.T) {
	var got, want []string
	for _, r := range tableOf(t, "docs/rules.md", "reason | what was dropped | what to do").rows {
		reason, _ := code(r.cells[0])
		got = append(got, reason)
	}
	for r := loader.Reason(0); !strings.HasPrefix(r.String(), "reason_"); r++ {
		want = append(want, r.String())
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("docs/rules.md has the reasons\n%v\nthe program\n%v", got, want)
	}
}

// The table of precedence is in the order in which inputs win, each over all following ones.
func TestPrecedence(t *testing.T) {
	var inputs []rules.Input
	for i, r := range tableOf(t, "docs/rules.md", "rank | kind | example").rows {
		text, _ := code(r.cells[2])
		in, _, err := rules.ParseInput(text)
		if err != nil {
			t.Fatalf("docs/rules.md:%d: %v", r.line, err)
		}
		if r.cells[0] != strconv.Itoa(i+1) {
			t.Errorf("docs/rules.md:%d: rank %s, want %d", r.line, r.cells[0], i+1)
		}
		for _, better := range inputs {
			if winner, ok := rules.Winner(in, better); !ok || winner != better {
				t.Errorf("docs/rules.md:%d: between %v and %v wins %v (%v)", r.line, better, in, winner, ok)
			}
		}
		inputs = append(inputs, in)
	}
	if len(inputs) < 8 {
		t.Errorf("found %d inputs only", len(inputs))
	}
}

// The documented limits are the program's.
func TestLimits(t *testing.T) {
	spec, err := bpf.LoadRelay()
	if err != nil {
		t.Fatal(err)
	}
	var timeout uint64
	if err := spec.Variables["fragment_timeout_ns"].Get(&timeout); err != nil {
		t.Fatal(err)
	}
	longest := 0
	for name := "e"; ; name += "e" {
		if _, err := rules.ParseOutput("239.1.1.1:5000%" + name); err != nil {
			break
		}
		longest = len(name)
	}
	want := map[string]int{
		"outputs of a rule, patterns expanded":                  rules.MaxOutputs,
		"inputs of a rule":                                      rules.MaxInputs,
		"rules with several inputs, and inputs with `health=`":  bpf.MaxStreams - 1,
		"ports of a range":                                      rules.MaxPorts,
		"senders, or prefixes of them, that `except=` excludes": rules.MaxExcept,
		"entries of rules with a prefix of groups and one of sources, or `except=`, in all": loader.MaxBothEntries,
		"groups that `join=all` joins":              rules.MaxJoinAll,
		"bytes of a rule's name":                    rules.MaxNameLen,
		"bytes of an interface's name":              longest,
		"fragmented datagrams followed at a time":   int(spec.Maps["fragments"].MaxEntries),
		"seconds that a first fragment is followed": int(timeout / 1e9),
		"MiB of a rule file, with its includes":     rules.MaxFileSize >> 20,
	}
	rows := tableOf(t, "docs/rules.md", "what | at most").rows
	if len(rows) != len(want) {
		t.Errorf("%d limits, want %d", len(rows), len(want))
	}
	for _, r := range rows {
		if n, ok := want[r.cells[0]]; !ok || r.cells[1] != strconv.Itoa(n) {
			t.Errorf("docs/rules.md:%d: %s: %s, want %d (%v)", r.line, r.cells[0], r.cells[1], n, ok)
		}
	}
}

// includeFaults are files that produce each fault: the including one, and two in rules.d.
var includeFaults = map[string]struct{ main, a, b string }{
	"one name in two files":    {main: "include: rules.d/*.yaml", a: cam1, b: strings.ReplaceAll(cam1, "1.1:5", "1.2:5")},
	"one input in two files":   {main: "include: rules.d/*.yaml", a: cam1, b: strings.ReplaceAll(cam1, "cam1", "cam2")},
	"nested, or a cycle":       {main: "include: rules.d/*.yaml", a: cam1, b: "include: ../rules.yaml"},
	"a file twice":             {main: "include:\n- rules.d/a.yaml\n- rules.d/*.yaml"},
	"the file itself":          {main: "include: '*.yaml'"},
	"a pattern of directories": {main: "include: '*/a.yaml'"},
	"from standard input":      {main: "include: rules.d/*.yaml"},
}

const cam1 = "rules:\n- name: cam1\n  in: 239.1.1.1:5000%eth0\n  out: 239.2.2.2:5000%eth1\n"

// includeDisk is rules.Files of such a file.
type includeDisk map[string]string

func (d includeDisk) ReadFile(name string) ([]byte, error) { return []byte(d[name]), nil }

func (d includeDisk) ReadDir(dir string) (names []string, err error) {
	for name := range d {
		if filepath.Dir(name) == dir {
			names = append(names, filepath.Base(name))
		}
	}
	return names, nil
}

// Every documented fault of included files is the program's.
func TestIncludeFaults(t *testing.T) {
	rows := tableOf(t, "docs/rules.md", "fault | message").rows
	if len(rows) != len(includeFaults) {
		t.Errorf("%d faults, want %d", len(rows), len(includeFaults))
	}
	for _, r := range rows {
		f, ok := includeFaults[r.cells[0]]
		want, _ := code(r.cells[1])
		name, files := "rules.yaml", rules.Files(includeDisk{"rules.yaml": "", "rules.d/a.yaml": f.a, "rules.d/b.yaml": f.b})
		if strings.HasPrefix(want, "stdin:") {
			name, files = "stdin", nil
		}
		_, err := rules.ParseFiles(name, []byte(f.main), files)
		if !ok || err == nil || strings.Split(err.Error(), "\n")[0] != want {
			t.Errorf("docs/rules.md:%d: the program says\n%v\nthe document\n%s", r.line, err, want)
		}
	}
}

// Headings that a document links to exist.
func TestAnchors(t *testing.T) {
	checked := 0
	all := documents(t)
	for name, text := range all {
		for _, l := range anchor.FindAllStringSubmatch(text, -1) {
			checked++
			to := name
			if l[1] != "" {
				to = filepath.ToSlash(filepath.Join(filepath.Dir(name), l[1]))
			}
			target, ok := all[to]
			if !ok { // a decision record
				target = read(t, to)
			}
			if !hasHeading(target, l[2]) {
				t.Errorf("%s: %s has no heading #%s", name, to, l[2])
			}
		}
	}
	if checked < 20 {
		t.Errorf("found %d links to headings only", checked)
	}
}

var anchor = regexp.MustCompile(`\]\(([^)#:]*)#([^)]+)\)`)

func hasHeading(text, id string) bool {
	for line := range strings.Lines(withBlankBlocks(text)) {
		title, ok := strings.CutPrefix(strings.TrimLeft(line, "#"), " ")
		if !ok || line[0] != '#' {
			continue
		}
		if headingID(title) == id {
			return true
		}
	}
	return false
}

// headingID is the anchor that forges give a heading: lower case, without punctuation, hyphens for spaces.
func headingID(title string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case r == '-' || r == '_' || unicode.IsLetter(r) || unicode.IsDigit(r):
			return unicode.ToLower(r)
		}
		return -1
	}, strings.TrimSpace(title))
}
