package docs

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// recipes are the lists of CONTRIBUTING.md, each with an example of what is added.
var recipes = map[string]struct {
	// in matches the example in each listed file.
	in string
	// everywhere matches it in non-test sources: each of these must be listed.
	everywhere string
}{
	"A policy":      {`(?i)min_?ttl`, `(?i)min_?ttl`},
	"A drop reason": {`(?i)no_?socket`, `(?i)no_?socket`},
	"A path":        {`(?i)afxdp`, `\bPathAFXDP\b|\bPATH_AFXDP\b`},
	"A metric":      {`(?i)memberships`, `\bxdpcast_memberships\b`},
}

// recipe returns the files and folders that a list of CONTRIBUTING.md names.
func recipe(text, title string) (paths []string) {
	_, section, _ := strings.Cut(text, "\n### "+title+"\n")
	section, _, _ = strings.Cut(section, "\n## ")
	section, _, _ = strings.Cut(section, "\n### ")
	for line := range strings.Lines(section) {
		if item, ok := strings.CutPrefix(line, "- "); ok {
			item, _, _ = strings.Cut(item, ": ")
			for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(item, -1) {
				paths = append(paths, m[1])
			}
		}
	}
	return paths
}

// The lists of how to add something are correct and complete: every listed file contains the
// example, and every source that contains it is listed.
func TestHowToAdd(t *testing.T) {
	text := read(t, "CONTRIBUTING.md")
	for title, r := range recipes {
		paths := recipe(text, title)
		if len(paths) < 4 {
			t.Errorf("CONTRIBUTING.md, %s: lists %d files only", title, len(paths))
		}
		in := regexp.MustCompile(r.in)
		for _, path := range paths {
			if !anyMatches(t, path, in) {
				t.Errorf("CONTRIBUTING.md, %s: %s is not there or does not know %v", title, path, in)
			}
		}
		everywhere := regexp.MustCompile(r.everywhere)
		for _, file := range sources(t) {
			listed := slices.ContainsFunc(paths, func(path string) bool { return path == file || strings.HasPrefix(file, path+"/") })
			if !listed && everywhere.MatchString(read(t, file)) {
				t.Errorf("CONTRIBUTING.md, %s: does not list %s, which knows %v", title, file, everywhere)
			}
		}
	}
	if n := strings.Count(text, "\n### "); n != len(recipes) {
		t.Errorf("CONTRIBUTING.md has %d lists, the test knows %d", n, len(recipes))
	}
}

// anyMatches says whether a file, or any file in a folder, matches.
func anyMatches(t *testing.T, path string, re *regexp.Regexp) bool {
	t.Helper()
	info, err := os.Stat(root + path)
	if err != nil {
		return false
	}
	if !info.IsDir() {
		return re.MatchString(read(t, path))
	}
	for _, file := range sources(t) {
		if strings.HasPrefix(file, path+"/") && re.MatchString(read(t, file)) {
			return true
		}
	}
	return false
}

// sources lists the program's sources, without tests and generated files.
func sources(t *testing.T) (files []string) {
	t.Helper()
	for _, dir := range []string{"bpf", "cmd", "internal", "pkg"} {
		if err := filepath.WalkDir(root+dir, func(path string, _ fs.DirEntry, err error) error {
			file := strings.TrimPrefix(filepath.ToSlash(path), root)
			generated := strings.HasSuffix(file, "_test.go") || strings.HasSuffix(file, "_bpfel.go")
			if err == nil && !generated && slices.Contains([]string{".go", ".c", ".h"}, filepath.Ext(file)) {
				files = append(files, file)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	return files
}

// Public forges run .ci/run, and their texts are the same.
func TestForges(t *testing.T) {
	for _, file := range []string{".github/workflows/ci.yml", ".gitlab-ci.yml"} {
		if !strings.Contains(read(t, file), "bash .ci/run\n") {
			t.Errorf("%s does not run .ci/run", file)
		}
	}
	if read(t, ".github/pull_request_template.md") != read(t, ".gitlab/merge_request_templates/Default.md") {
		t.Error("the templates of .github and .gitlab for changes differ")
	}
	for _, name := range []string{"bug.md", "feature.md"} {
		_, github, _ := strings.Cut(read(t, ".github/ISSUE_TEMPLATE/"+name), "\n---\n")
		if gitlab := read(t, ".gitlab/issue_templates/"+name); strings.TrimSpace(github) != strings.TrimSpace(gitlab) {
			t.Errorf("the templates of .github and .gitlab for %s differ", name)
		}
	}
}

// Editors run the linters that scripts/lint runs.
func TestEditorsLint(t *testing.T) {
	script, editors := read(t, "scripts/lint"), read(t, ".golangci.yml")
	for _, linter := range []struct{ script, editors string }{{`" vet -tags interop`, "govet"}, {"staticcheck -tags interop", "staticcheck"}, {"gofmt", "gofmt"}} {
		if !strings.Contains(script, linter.script) || !strings.Contains(editors, linter.editors) {
			t.Errorf("%s is not in both scripts/lint and .golangci.yml", linter.editors)
		}
	}
}
