// Package docs checks the documents against the program: whatever they tell people to type must
// exist.
package docs

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"xdpcast/pkg/rules"
)

const root = "../../"

// documents are the files that people read; docs/cli.md is generated.
func documents(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, name := range []string{"README.md", "CONTRIBUTING.md", "SECURITY.md"} {
		all[name] = read(t, name)
	}
	files, err := filepath.Glob(root + "docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		name := strings.TrimPrefix(filepath.ToSlash(file), root)
		all[name] = read(t, name)
	}
	if len(all) < 6 {
		t.Fatalf("found %d documents only", len(all))
	}
	return all
}

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(root + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// block is a fenced code block of a document.
type block struct {
	language string
	line     int // of its first line
	text     string
}

func blocks(text string) (all []block) {
	var b *block
	n := 0
	for line := range strings.Lines(text) {
		n++
		fence, isFence := strings.CutPrefix(strings.TrimSpace(line), "```")
		switch {
		case isFence && b == nil:
			b = &block{language: fence, line: n + 1}
		case isFence:
			all, b = append(all, *b), nil
		case b != nil:
			b.text += line
		}
	}
	return all
}

// commandLine is a command that a document tells people to type.
type commandLine struct {
	line  int
	words []string
}

// commandLines returns the commands of a document: every line of sh blocks, and in console blocks
// the lines with a prompt. Pipes and lists are split.
func commandLines(text string) (all []commandLine) {
	for _, b := range blocks(text) {
		if b.language != "sh" && b.language != "console" {
			continue
		}
		n := b.line
		for line := range strings.SplitSeq(strings.ReplaceAll(b.text, "\\\n", " "), "\n") {
			command, prompted := strings.CutPrefix(line, "$ ")
			if b.language == "sh" || prompted {
				all = append(all, split(n, command)...)
			}
			n++
		}
	}
	return all
}

// split splits a shell line into commands of words, without their wrappers.
func split(n int, line string) (all []commandLine) {
	var words []string
	end := func() {
		if words = unwrap(words); len(words) > 0 {
			all = append(all, commandLine{n, words})
		}
		words = nil
	}
	for _, word := range shellWords(line) {
		switch word {
		case "|", "&&", "||", ";", "&":
			end()
		default:
			words = append(words, word)
		}
	}
	end()
	return all
}

// shellWords splits at blanks outside quotes, and stops at a comment.
func shellWords(line string) (words []string) {
	var word strings.Builder
	quote, inWord := rune(0), false
	for _, r := range line {
		switch {
		case quote != 0 && r == quote:
			quote = 0
		case quote == 0 && (r == '\'' || r == '"'):
			quote, inWord = r, true
		case quote == 0 && r == '#' && !inWord:
			return words
		case quote == 0 && r == ' ':
			if inWord {
				words = append(words, word.String())
			}
			word.Reset()
			inWord = false
		default:
			word.WriteRune(r)
			inWord = true
		}
	}
	if inWord {
		words = append(words, word.String())
	}
	return words
}

// unwrap removes prefixes of a command: variables, sudo, another namespace.
func unwrap(words []string) []string {
	for len(words) > 0 {
		switch {
		case words[0] == "sudo", words[0] == "timeout" && len(words) == 1, assignment.MatchString(words[0]):
			words = words[1:]
		case len(words) > 4 && words[0] == "ip" && words[1] == "netns" && words[2] == "exec":
			words = words[4:]
		case words[0] == "timeout":
			words = words[2:]
		default:
			return words
		}
	}
	return nil
}

var assignment = regexp.MustCompile(`^[A-Z_]+=`)

// reference is the content of docs/cli.md.
type reference struct {
	commands map[string][]string // "xdpcast rule add" -> flags
	global   []string
}

var flagName = regexp.MustCompile("`(--?[a-z-]+)`")

func readReference(t *testing.T) reference {
	t.Helper()
	r := reference{commands: map[string][]string{}}
	command := ""
	for line := range strings.Lines(read(t, "docs/cli.md")) {
		if title, ok := strings.CutPrefix(line, "## "); ok {
			command = strings.TrimSpace(title)
			r.commands[command] = []string{"--help", "-h"}
		}
		cells := strings.Split(line, "|")
		if command == "" || len(cells) < 3 {
			continue
		}
		for _, name := range flagName.FindAllStringSubmatch(cells[1], -1) {
			r.commands[command] = append(r.commands[command], name[1])
		}
	}
	r.global = r.commands["xdpcast"]
	r.commands["xdpcast"] = append(slices.Clone(r.global), "--version")
	if len(r.commands) < 10 || len(r.global) < 3 {
		t.Fatalf("docs/cli.md: %d commands and %d flags of the program only", len(r.commands), len(r.global))
	}
	return r
}

// check returns what is wrong with a command line of the program, "" if nothing is.
func (r reference) check(words []string) string {
	command, rest := "xdpcast", words[1:]
	for len(rest) > 0 {
		if slices.Contains(r.global, flagOf(rest[0])) && rest[0] != "--help" && rest[0] != "-h" {
			rest = rest[min(2, len(rest)):]
			continue
		}
		longer := command + " " + rest[0]
		if !r.begins(longer) {
			break
		}
		command, rest = longer, rest[1:]
	}
	flags, ok := r.commands[command]
	if !ok || command == "xdpcast" && len(rest) > 0 && !strings.HasPrefix(rest[0], "-") {
		return "there is no such command"
	}
	for _, word := range rest {
		if word == "--" {
			break
		}
		if len(word) > 1 && word[0] == '-' && !slices.Contains(flags, flagOf(word)) && !slices.Contains(r.global, flagOf(word)) {
			return command + " has no flag " + word
		}
	}
	return ""
}

func flagOf(word string) string {
	name, _, _ := strings.Cut(word, "=")
	return name
}

// begins is true for a command, and for the first words of one.
func (r reference) begins(words string) bool {
	for command := range r.commands {
		if command == words || strings.HasPrefix(command, words+" ") {
			return true
		}
	}
	return false
}

func TestCommandsExist(t *testing.T) {
	r := readReference(t)
	checked := 0
	for name, text := range documents(t) {
		for _, c := range commandLines(text) {
			if filepath.Base(c.words[0]) != "xdpcast" {
				continue
			}
			checked++
			if fault := r.check(c.words); fault != "" {
				t.Errorf("%s:%d: %s: %s", name, c.line, strings.Join(c.words, " "), fault)
			}
		}
		for _, code := range inlineCode.FindAllStringSubmatch(withoutBlocks(text), -1) {
			checked++
			if fault := r.check(shellWords(code[1])); fault != "" {
				t.Errorf("%s: `%s`: %s", name, code[1], fault)
			}
		}
	}
	if checked < 20 {
		t.Errorf("found %d commands only", checked)
	}
}

var inlineCode = regexp.MustCompile("`(xdpcast(?: [^`]*)?)`")

func withoutBlocks(text string) string {
	for _, b := range blocks(text) {
		text = strings.Replace(text, b.text, "", 1)
	}
	return text
}

// The check of commands finds faults.
func TestCheck(t *testing.T) {
	r := readReference(t)
	for line, want := range map[string]string{
		"xdpcast status -o json":                         "",
		"sudo bin/xdpcast --socket S rule list | head":   "",
		"xdpcast rule --socket S del a b":                "",
		"xdpcast --version":                              "",
		"xdpcast":                                        "",
		"xdpcast rule add a --in I --out O,ttl=1":        "",
		"xdpcast rule add a --input I":                   "xdpcast rule add has no flag --input",
		"xdpcast stat":                                   "there is no such command",
		"xdpcast rule":                                   "there is no such command",
		"xdpcast rule remove a":                          "there is no such command",
		"A=b ip netns exec x xdpcast load --interface=a": "",
		"xdpcast load --iface a":                         "xdpcast load has no flag --iface",
	} {
		commands := split(1, line)
		if got := r.check(commands[0].words); got != want {
			t.Errorf("%s: %q, want %q", line, got, want)
		}
	}
}

// Every make target in the documents exists.
func TestTargetsExist(t *testing.T) {
	makefile := read(t, "Makefile")
	checked := 0
	for name, text := range documents(t) {
		for _, c := range commandLines(text) {
			if c.words[0] != "make" || len(c.words) < 2 {
				continue
			}
			checked++
			if !strings.Contains(makefile, "\n"+c.words[1]+":") {
				t.Errorf("%s:%d: the Makefile has no target %s", name, c.line, c.words[1])
			}
		}
	}
	if checked == 0 {
		t.Error("found no target")
	}
}

// CI runs the commands of the README, without sudo.
func TestCIRunsTheReadme(t *testing.T) {
	ci := read(t, ".ci/run")
	for _, command := range []string{"make demo", "make test"} {
		if !strings.Contains(read(t, "README.md"), "sudo "+command+"\n") {
			t.Errorf("README.md does not say sudo %s", command)
		}
		if !regexp.MustCompile(`(?m)^section .* ` + command + `$`).MatchString(ci) {
			t.Errorf(".ci/run does not run %s", command)
		}
	}
}

// included is the files that the documents' files include: one rule per file, a.yaml and b.yaml in
// each directory.
type included struct{}

func (included) ReadDir(string) ([]string, error) { return []string{"a.yaml", "b.yaml"}, nil }

func (included) ReadFile(name string) ([]byte, error) {
	n := 0
	for _, c := range name {
		n = (31*n + int(c)) % 65521
	}
	return fmt.Appendf(nil, "rules:\n  - {name: r%d, in: 239.255.1.1:%d%%eth0, out: [239.255.2.1:%d%%eth1]}\n", n, n+1, n+1), nil
}

func TestRulesParse(t *testing.T) {
	checked := 0
	for name, text := range documents(t) {
		for _, b := range blocks(text) {
			if b.language != "yaml" {
				continue
			}
			checked++
			if c, err := rules.ParseConfig(name, []byte(b.text), included{}); err != nil || len(c.Rules) == 0 && c.Mroute == nil {
				t.Errorf("block at line %d: %d rules, %v", b.line, len(c.Rules), err)
			}
		}
	}
	if checked == 0 {
		t.Error("found no rules")
	}
}

var link = regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`)

func TestLinksLead(t *testing.T) {
	for name, text := range documents(t) {
		for _, l := range link.FindAllStringSubmatch(text, -1) {
			if _, err := os.Stat(root + filepath.Join(filepath.Dir(name), l[1])); err != nil {
				t.Errorf("%s: link to %s: %v", name, l[1], err)
			}
		}
	}
}
