package docs

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestArchitectureNames: the files and functions named in docs/architecture.md exist.
func TestArchitectureNames(t *testing.T) {
	text := read(t, "docs/architecture.md")
	var sources []string
	for _, pattern := range []string{"cmd/*/*.go", "pkg/*/*.go", "internal/*/*.go", "bpf/*.c", "bpf/include/*.h", "test/*/*.go"} {
		files, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			t.Fatal(err)
		}
		sources = append(sources, files...)
	}
	declaration, declared := regexp.MustCompile(`(?:func (?:\([^)]*\) )?|type )(\w+)`), map[string]bool{}
	for _, file := range sources {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range declaration.FindAllSubmatch(data, -1) {
			declared[string(m[1])] = true
		}
	}
	checked := 0
	for _, name := range regexp.MustCompile("`([^`\n]+)`").FindAllStringSubmatch(text, -1) {
		switch name := name[1]; {
		case regexp.MustCompile(`^[\w/.]+\.(go|c|h)$`).MatchString(name):
			checked++
			found := false
			for _, file := range sources {
				found = found || strings.HasSuffix(file, "/"+name)
			}
			if !found {
				t.Errorf("there is no file %s", name)
			}
		case regexp.MustCompile(`^(pkg|internal|cmd|test)/\w+$`).MatchString(name):
			checked++
			if _, err := os.Stat(filepath.Join(root, name)); err != nil {
				t.Error(err)
			}
		case slices.Contains([]string{"cmd", "devices", "bpf", "docs", "packaging", "scripts"}, name):
		case regexp.MustCompile(`^[A-Za-z]+(\.[A-Z][A-Za-z]+)?$`).MatchString(name):
			checked++
			if !declared[name[strings.LastIndex(name, ".")+1:]] {
				t.Errorf("there is no function or type %s", name)
			}
		}
	}
	if checked < 50 {
		t.Errorf("%d names are looked at, want more: has the page changed its form?", checked)
	}
}

// TestWalks: each step of a walk in docs/architecture.md names a file and the functions in it that take
// the step, and no walk repeats a step.
func TestWalks(t *testing.T) {
	walks, steps := 0, 0
	seen := map[string]bool{}
	for line := range strings.Lines(read(t, "docs/architecture.md")) {
		if strings.HasPrefix(line, "## ") {
			seen = map[string]bool{}
		}
		if strings.HasPrefix(line, "| step | file | function |") {
			walks++
		}
		row := regexp.MustCompile("^\\| \\d+\\. .* \\| `([^`]+)` \\| (`.+`) \\|$").FindStringSubmatch(strings.TrimSpace(line))
		if row == nil {
			if regexp.MustCompile(`^\| \d+\. `).MatchString(line) {
				t.Errorf("no file and function in %q", line)
			}
			continue
		}
		steps++
		data, err := os.ReadFile(filepath.Join(root, row[1]))
		if err != nil {
			t.Error(err)
			continue
		}
		for _, name := range strings.Split(strings.ReplaceAll(row[2], "`", ""), ", ") {
			if !regexp.MustCompile(`(?m)^(func (\([^)]*\) )?|.*[ *]|int BPF_PROG\()` + name + `[(,]`).Match(data) {
				t.Errorf("there is no function %s in %s", name, row[1])
			}
			if seen[row[1]+name] {
				t.Errorf("the walk comes to %s of %s again", name, row[1])
			}
			seen[row[1]+name] = true
		}
	}
	if walks < 4 || steps < 40 {
		t.Errorf("%d tables with %d steps, want those of three walks: has the page changed its form?", walks, steps)
	}
}

// TestFolders: docs/architecture.md lists the folders of the repository, and no others.
func TestFolders(t *testing.T) {
	listed := map[string]bool{}
	for _, row := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\| [^|]+ \\|$").FindAllStringSubmatch(read(t, "docs/architecture.md"), -1) {
		if listed[row[1]] {
			t.Errorf("%s is listed twice", row[1])
		}
		listed[row[1]] = true
	}
	want := []string{"bpf", "docs", "packaging", "scripts"}
	for _, pattern := range []string{"cmd/*", "internal/*", "pkg/*", "scripts/*", "test/*"} {
		entries, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range entries {
			if info, err := os.Stat(entry); err == nil && info.IsDir() {
				want = append(want, strings.TrimPrefix(filepath.ToSlash(entry), root))
			}
		}
	}
	for _, folder := range want {
		if !listed[folder] {
			t.Errorf("folder %s is not listed", folder)
		}
		delete(listed, folder)
	}
	for folder := range listed {
		t.Errorf("there is no folder %s", folder)
	}
}
