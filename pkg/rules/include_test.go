package rules

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"testing"
)

// memory is Files that a test holds.
type memory map[string]string

func (m memory) ReadFile(name string) ([]byte, error) {
	text, ok := m[name]
	if !ok {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return []byte(text), nil
}

func (m memory) ReadDir(dir string) (names []string, err error) {
	for name := range m {
		if folder, entry, ok := cutLast(name); ok && folder == dir {
			names = append(names, entry)
		}
	}
	if names == nil {
		return nil, &fs.PathError{Op: "open", Path: dir, Err: fs.ErrNotExist}
	}
	return names, nil
}

func cutLast(name string) (dir, entry string, ok bool) {
	at := strings.LastIndexByte(name, '/')
	if at < 0 {
		return ".", name, true
	}
	return name[:at], name[at+1:], true
}

// listed is the text of a file with rules, `NAME N`: rule N is of a group and an
// interface of its own.
func listed(rules ...string) string {
	text := "rules:\n"
	for _, r := range rules {
		name, n, _ := strings.Cut(r, " ")
		text += fmt.Sprintf("  - name: %s\n    in: 239.1.1.%s:1%%in\n    out: 239.2.1.%s:1%%out\n", name, n, n)
	}
	return text
}

func TestInclude(t *testing.T) {
	disk := memory{
		"etc/rules.d/10-b.yaml":   listed("b1 3", "b2 4"),
		"etc/rules.d/2-a.yaml":    listed("a 5"),
		"etc/rules.d/empty.yaml":  "rules: []\n",
		"etc/rules.d/notes.txt":   "none of ours",
		"etc/rules.d/.swap.yaml":  "\x00",
		"etc/one.yaml":            listed("one 6"),
		"/srv/shared/feeds.yaml":  listed("feed 7"),
		"/srv/shared/.local.yaml": listed("local 8"),
		"etc/none.d/readme":       "",
	}
	for _, c := range []struct{ name, main, want string }{
		{"a pattern", "include: rules.d/*.yaml\n" + listed("z 1"), "z b1 b2 a"},
		{"in front or behind", listed("z 1") + "include: rules.d/*.yaml\n", "z b1 b2 a"},
		{"a file", "include: one.yaml\n", "one"},
		{"a list", "include: [one.yaml, 'rules.d/2-*.yaml', /srv/shared/*.yaml]\n", "one a feed"},
		{"a path that goes round", "include: ./rules.d/../one.yaml\n", "one"},
		{"hidden files by a pattern of their own", "include: /srv/shared/.*.yaml\n", "local"},
		{"nothing matches", "include: none.d/*.yaml\n" + listed("z 1"), "z"},
		{"null", "include:\n" + listed("z 1"), "z"},
		{"an empty list", "include: []\n", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			rules, err := ParseFiles("etc/rules.yaml", []byte(c.main), disk)
			var names []string
			for _, r := range rules {
				names = append(names, r.Name)
			}
			if got := strings.Join(names, " "); err != nil || got != c.want {
				t.Errorf("got %s, %v\nwant %s", got, err, c.want)
			}
		})
	}
}

func TestIncludeErrors(t *testing.T) {
	disk := memory{
		"rules.d/a.yaml":   listed("cam 1", "a 2"),
		"rules.d/b.yaml":   "# again\n" + listed("cam 3", "b 2"),
		"broken/x.yaml":    "rules:\n\t- name: a\n",
		"broken/y.yaml":    "rules:\n- name: y\n  in: 239.1.1.1:0%eth0\n",
		"nested/n.yaml":    "rules: []\ninclude: ../rules.d/*.yaml\n",
		"circle/c.yaml":    "include: ../main.yaml\n",
		"odd/a\nb.yaml":    "",
		"loop/back.yaml":   "rules:\n- name: back\n  in: 239.2.1.9:1%out\n  out: 239.1.1.9:1%in\n",
		"main.yaml":        "",
		"big/1.yaml":       "rules: []\n#" + strings.Repeat(" ", MaxFileSize/2-10),
		"big/2.yaml":       "rules: []\n#" + strings.Repeat(" ", MaxFileSize/2-10),
		"faults/many.yaml": "rules:\n" + strings.Repeat("- name: a\n  in: x\n", 150),
	}
	for _, c := range []struct {
		name, main string
		want       []string
	}{
		{"one name in two files", "include: rules.d/*.yaml", []string{
			`rules.d/b.yaml:3: rule "cam": name "cam": want a unique name: rule #1 (rules.d/a.yaml:2) has it`,
			`rules.d/b.yaml:7: rule "b": in "239.1.1.2:1%in": want an input of its own: rule "a" (rules.d/a.yaml:5) takes it`}},
		{"one name here and there", listed("b 9") + "include: rules.d/b.yaml", []string{
			`rules.d/b.yaml:6: rule "b": name "b": want a unique name: rule #1 (main.yaml:2) has it`}},
		{"a circle of rules over files", listed("forth 9") + "include: loop/*", []string{
			`loop/back.yaml:4: rule "back": out[0] "239.1.1.9:1%in": want no loop between rules: forth (main.yaml:2) -> back (loop/back.yaml:2) -> forth (loop=two-way on an input allows a loop between interfaces, loop=allow any loop: looping packets are detected and dropped)`}},
		{"faults in several files", "include: broken/*.yaml\nrules:\n- name: m\n", []string{
			`broken/x.yaml:2: found character that cannot start any token (indent with spaces: YAML does not allow tabs)`,
			`broken/y.yaml:3: rule "y": input "239.1.1.1:0%eth0": port "0": want 1 to 65535, or no ':' for any port`}},
		{"no such file", "include: rules.d/c.yaml", []string{
			`main.yaml:1: include "rules.d/c.yaml": open rules.d/c.yaml: file does not exist`}},
		{"no such directory", "include: [rules.d/a.yaml,\n rule.d/*.yaml]", []string{
			`main.yaml:2: include "rule.d/*.yaml": open rule.d: file does not exist`}},
		{"a pattern of directories", "include: \"*/a.yaml\"", []string{
			`main.yaml:1: include "*/a.yaml": want a pattern only in the last element of the path`}},
		{"no pattern", "include: rules.d/[", []string{
			`main.yaml:1: include "rules.d/[": pattern "[": want *, ?, [a-z] and \ before a character that stands for itself`}},
		{"nested", "include: nested/n.yaml", []string{
			`nested/n.yaml:2: include: want it in main.yaml alone: an included file includes no other`}},
		{"a circle", "include: circle/c.yaml", []string{
			`circle/c.yaml:1: include: want it in main.yaml alone: an included file includes no other`}},
		{"itself", "include: \"*.yaml\"", []string{`main.yaml:1: include "*.yaml": main.yaml is this file: want only others`}},
		{"twice", "include:\n- rules.d/a.yaml\n- rules.d/[ac].yaml", []string{
			`main.yaml:3: include "rules.d/[ac].yaml": rules.d/a.yaml is included already (line 2): want it once`}},
		{"a name of two lines", "include: odd/*", []string{`main.yaml:1: include "odd/*": file name "a\nb.yaml": want printable characters`}},
		{"no text", "include: {a: b}", []string{`main.yaml:1: include: want a file, a pattern of files, or a list of them, not a mapping`}},
		{"a list in a list", "include:\n- rules.d/a.yaml\n- [x]\n- ''\n", []string{
			`main.yaml:3: include: want text, not a list`, `main.yaml:4: include: want a file or a pattern of files, not nothing`}},
		{"given twice", "include: rules.d/a.yaml\ninclude: rules.d/b.yaml", []string{`main.yaml:2: key "include" given again: want it once`}},
		{"too large together", "include: big/*", []string{
			`main.yaml:1: include "big/*": 33554448 bytes with big/2.yaml: want at most 33554432 in all files together`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			rules, err := ParseFiles("main.yaml", []byte(c.main), disk)
			if rules != nil {
				t.Errorf("rules %v beside the error", rules)
			}
			checkLines(t, err, c.want...)
			for _, err := range joined(t, err) {
				if _, ok := err.(*FileError); !ok {
					t.Errorf("%T in the list", err)
				}
			}
		})
	}
	_, err := ParseFiles("main.yaml", []byte("include: faults/*"), disk)
	if lines := errorLines(err); len(lines) != maxFaults+1 || lines[maxFaults] != "main.yaml: and 349 more" {
		t.Errorf("%d lines, the last %q", len(lines), lines[len(lines)-1])
	}
	_, err = ParseFiles("main.yaml", []byte("include: rules.d/*.yaml"), disk)
	if !errors.Is(err, ErrDuplicateName) || !errors.Is(err, ErrDuplicateInput) {
		t.Errorf("%v: holds no classes", err)
	}
}

// TestIncludeNeedsADisk: what is not read by its name includes nothing.
func TestIncludeNeedsADisk(t *testing.T) {
	rules, err := ParseFile("body", []byte("rules: []\ninclude: /etc/passwd"))
	if rules != nil {
		t.Errorf("rules %v", rules)
	}
	checkLines(t, err, `body:2: include: want no include here: only a file on disk can include others`)
}

// FuzzInclude: a set in two files is the set in one, and its faults are at the same
// lines, whatever the files hold.
func FuzzInclude(f *testing.F) {
	f.Add([]byte(listed("a 1")), []byte(listed("b 2")))
	f.Add([]byte(listed("a 1")), []byte(listed("a 2")))
	f.Add([]byte(listed("a 1")), []byte(listed("b 1", "a 3")))
	f.Add([]byte("rules: [x"), []byte("include: x"))
	f.Add([]byte("rules:\n- {name: a, in: 239.1.1.1:1%e, out: 239.1.1.2:1%e}\n"), []byte("rules:\n- {name: b, in: 239.1.1.2:1%e, out: 239.1.1.1:1%e}\n"))
	f.Fuzz(func(t *testing.T, a, b []byte) {
		one, oneErr := ParseFile("d/a", a)
		two, twoErr := ParseFile("d/b", b)
		rules, err := ParseFiles("main", []byte("include: d/*"), memory{"d/a": string(a), "d/b": string(b)})
		var wants error
		if oneErr == nil && twoErr == nil {
			wants = ValidateSet(append(slices.Clone(one), two...))
		}
		switch {
		case oneErr == nil && twoErr == nil && wants == nil:
			if err != nil || !slices.EqualFunc(rules, append(slices.Clone(one), two...), Equal) {
				t.Errorf("%v, %v", rules, err)
			}
		case err == nil || rules != nil:
			t.Errorf("%v, %v: want an error", rules, err)
		case wants != nil:
			if got, want := len(joined(t, err)), len(joined(t, wants)); got != want {
				t.Errorf("%d faults, want %d: %v\n%v", got, want, err, wants)
			}
		}
		for _, err := range joined(t, err) {
			var fault *FileError
			if !errors.As(err, &fault) || fault.File != "d/a" && fault.File != "d/b" && fault.File != "main" {
				t.Errorf("%q", err)
			}
		}
	})
}
