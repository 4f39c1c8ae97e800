package rules

import (
	"cmp"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"go.yaml.in/yaml/v3"
)

// Files reads included files for ParseFiles. Errors name the file.
type Files interface {
	// ReadFile returns the contents of a file.
	ReadFile(name string) ([]byte, error)
	// ReadDir returns the names in a directory, in any order.
	ReadDir(dir string) (names []string, err error)
}

// ParseFiles is ParseFile for a file that may include others:
//
//	include: rules.d/*.yaml   # or a list: [a.yaml, rules.d/*.yaml]
//	rules:
//	  - ...
//
// The rules of all files form one set, first those of the file itself, then those of the included
// files in the order of the list, and of a pattern in the order of their names. A relative name is
// relative to the file's directory, and a pattern (path.Match) is allowed only in the last element;
// as in a shell it skips names that begin with a dot, unless it begins with one itself. A pattern
// may match nothing, but a directory, or a file without a pattern, must exist. An included file
// includes no other, and is included once. All files together are at most MaxFileSize.
//
// If files is nil an include is refused.
func ParseFiles(name string, data []byte, files Files) ([]Rule, error) {
	set := readFiles(name, data, files)
	set.refuseRoutes()
	rules := set.validate()
	if err := set.join(); err != nil {
		return nil, err
	}
	return rules, nil
}

// Config is the content of a daemon's file.
type Config struct {
	Rules []Rule
	// Mroute selects the kernel's multicast routes to mirror; nil: none.
	Mroute *Mroute
	// MrouteFile and MrouteLine are the position of that section.
	MrouteFile string
	MrouteLine int
}

// ParseConfig is ParseFiles for the file of a daemon, which may also mirror the kernel's multicast
// routes:
//
//	rules: []
//	mroute:
//	  tables: [main, 100]
//	  families: [ipv4, ipv6]
//	  interfaces: [eth0, eth1, vlan+]
//	  groups: [239.0.0.0/8]
//	  leave: [239.255.0.0/16]
//	  joined: leave
//
// Every key is optional, and "mroute: {}" takes all routes of the default table. Only one of the
// files may have the section.
func ParseConfig(name string, data []byte, files Files) (Config, error) {
	set := readFiles(name, data, files)
	c := Config{Rules: set.validate()}
	if in := set.routes(); in != nil {
		c.Mroute, c.MrouteFile, c.MrouteLine = &in.routes.Mroute, in.name, in.routes.line
	}
	if err := set.join(); err != nil {
		return Config{}, err
	}
	return c, nil
}

// readFiles parses a file and its includes.
func readFiles(name string, data []byte, files Files) fileSet {
	main := &fileParser{name: name, data: data}
	main.parse()
	set := fileSet{files: []*fileParser{main}}
	if len(main.includes) > 0 {
		set.include(main, files)
	}
	return set
}

// FindInFiles returns the file and line of a rule, in a file and its includes; false if it is not
// found in any readable one. Other faults of the files are ignored.
func FindInFiles(rule, name string, data []byte, files Files) (file string, line int, ok bool) {
	main := &fileParser{name: name, data: data}
	main.parse()
	set := fileSet{files: []*fileParser{main}}
	if len(main.includes) > 0 {
		set.include(main, files)
	}
	for _, p := range set.files {
		for i := range p.rules {
			if p.rules[i].Name == rule {
				return p.name, p.places[i].rule, true
			}
		}
	}
	return "", 0, false
}

// includeText is an entry of include: a file, or a pattern of files.
type includeText struct {
	text string
	line int
}

func (p *fileParser) includeList(n *yaml.Node) {
	items := []*yaml.Node{n}
	if n.Kind == yaml.SequenceNode {
		items = n.Content
	}
	for _, item := range items {
		text, ok := textOf(item)
		switch {
		case !ok && n.Kind != yaml.SequenceNode:
			p.fault(item.Line, fmt.Errorf("include: want a file, a pattern of files, or a list of them, not %s", kindOf(item)))
		case !ok:
			p.fault(item.Line, notText(item, "include"))
		case text == "":
			p.fault(item.Line, errors.New("include: want a file or a pattern of files, not nothing"))
		default:
			p.includes = append(p.includes, includeText{text, item.Line})
		}
	}
}

// fileSet is a file and its includes, in the order of their rules.
type fileSet struct {
	files []*fileParser
}

// include parses the includes of the main file.
func (s *fileSet) include(main *fileParser, files Files) {
	if files == nil {
		main.fault(main.includes[0].line, errors.New("include: want no include here: only a file on disk can include others"))
		return
	}
	size := len(main.data)
	lines := map[string]int{filepath.Clean(main.name): 0} // where each file was included
	for _, in := range main.includes {
		fail := func(err error) { main.fault(in.line, fmt.Errorf("include %s: %w", quote(in.text), err)) }
		names, err := in.expand(filepath.Dir(main.name), files)
		if err != nil {
			fail(err)
			continue
		}
		for _, name := range names {
			line, again := lines[name]
			switch {
			case again && line == 0:
				fail(fmt.Errorf("%s is this file: want only others", bounded(name)))
				continue
			case again:
				fail(fmt.Errorf("%s is included already (line %d): want it once", bounded(name), line))
				continue
			}
			lines[name] = in.line
			data, err := files.ReadFile(name)
			if err != nil {
				fail(err)
				continue
			}
			if size += len(data); size > MaxFileSize {
				fail(fmt.Errorf("%d bytes with %s: want at most %d in all files together", size, bounded(name), MaxFileSize))
				return
			}
			s.add(&fileParser{name: name, data: data, interfaces: main.interfaces})
		}
	}
}

// add parses an included file.
func (s *fileSet) add(p *fileParser) {
	p.parse()
	if len(p.includes) > 0 {
		p.fault(p.includes[0].line, fmt.Errorf("include: want it in %s alone: an included file includes no other", bounded(s.files[0].name)))
	}
	s.files = append(s.files, p)
}

// expand returns the files that an entry matches, sorted by name. dir is the directory of the
// including file.
func (in includeText) expand(dir string, files Files) ([]string, error) {
	name := in.text
	if !filepath.IsAbs(name) {
		name = filepath.Join(dir, name)
	}
	name = filepath.Clean(name)
	folder, pattern := filepath.Split(name)
	written, _ := filepath.Split(in.text)
	switch {
	case isGlob(written):
		return nil, errors.New("want a pattern only in the last element of the path")
	case !isGlob(pattern):
		return []string{name}, nil
	}
	if _, err := filepath.Match(pattern, ""); err != nil {
		return nil, fmt.Errorf("pattern %s: want *, ?, [a-z] and \\ before a character that stands for itself", quote(pattern))
	}
	entries, err := files.ReadDir(filepath.Clean(folder))
	if err != nil {
		return nil, err
	}
	var names []string
	for _, entry := range entries {
		hidden := strings.HasPrefix(entry, ".") && !strings.HasPrefix(pattern, ".")
		if ok, _ := filepath.Match(pattern, entry); ok && !hidden {
			if strings.ContainsFunc(entry, func(r rune) bool { return !unicode.IsPrint(r) }) {
				return nil, fmt.Errorf("file name %s: want printable characters", quote(entry))
			}
			names = append(names, filepath.Join(folder, entry))
		}
	}
	slices.Sort(names)
	return names, nil
}

func isGlob(s string) bool { return strings.ContainsAny(s, `*?[\`) }

// validate reports the faults of the rules of all files as one set, except those caused by unread
// fields, and returns the rules.
func (s *fileSet) validate() []Rule {
	if slices.ContainsFunc(s.files, func(p *fileParser) bool { return p.broken }) {
		return nil
	}
	rules, first := s.rules()
	of := func(rule int) (*fileParser, rulePlace) {
		at, _ := slices.BinarySearch(first, rule+1) // the last file that begins before
		p := s.files[at-1]
		return p, p.places[rule-first[at-1]]
	}
	list := faultList{ignore: func(f fault) bool {
		_, place := of(f.rule)
		return slices.Contains(place.unread, f.err.Field)
	}}
	checkSet(rules, func(rule int) string {
		p, place := of(rule)
		if len(s.files) == 1 {
			return "line " + strconv.Itoa(place.rule)
		}
		return bounded(p.name) + ":" + strconv.Itoa(place.rule)
	}, &list)
	for _, f := range list.faults {
		// Not by fault: the faults of both steps are sorted first.
		p, place := of(f.rule)
		p.faults = append(p.faults, FileError{Line: place.line(f.err.Field), Err: f.err})
	}
	s.files[0].hidden += list.hidden
	return rules
}

// rules are the rules of all files, and the index of the first one of each.
func (s *fileSet) rules() (all []Rule, first []int) {
	if len(s.files) == 1 {
		return s.files[0].rules, []int{0}
	}
	for _, p := range s.files {
		first = append(first, len(all))
		all = append(all, p.rules...)
	}
	return all, first
}

// join joins the faults, file by file, sorted by line.
func (s *fileSet) join() error {
	var all []FileError
	hidden := 0
	for _, p := range s.files {
		slices.SortStableFunc(p.faults, func(a, b FileError) int { return cmp.Compare(a.Line, b.Line) })
		for i := range p.faults {
			p.faults[i].File = p.name
		}
		all = append(all, p.faults...)
		hidden += p.hidden
	}
	if n := len(all); n > maxFaults {
		hidden += n - maxFaults
		all = all[:maxFaults]
	}
	if hidden > 0 {
		all = append(all, FileError{File: s.files[0].name, Err: moreFaults(hidden)})
	}
	errs := make([]error, len(all))
	for i := range all {
		errs[i] = &all[i]
	}
	return errors.Join(errs...)
}
