package docs

import (
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The file maps at the top of packages name exactly the existing files.
func TestMapsOfFiles(t *testing.T) {
	entry := regexp.MustCompile(`(?m)^//\t(\S+\.go)  +\S`)
	for _, file := range []string{"scripts/bench/doc.go", "internal/demo/demo.go"} {
		var named []string
		for _, m := range entry.FindAllStringSubmatch(read(t, file), -1) {
			named = append(named, m[1])
		}
		if len(named) == 0 {
			t.Errorf("%s has no map", file)
		}
		paths, err := filepath.Glob(filepath.Join(root, filepath.Dir(file), "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		var there []string
		for _, p := range paths {
			there = append(there, filepath.Base(p))
		}
		for _, name := range there {
			described := name == "doc.go" || strings.HasSuffix(name, "_test.go") || strings.HasSuffix(name, "_bpfel.go")
			if !described && !slices.Contains(named, name) {
				t.Errorf("%s does not say what %s holds", file, name)
			}
		}
		for _, name := range named {
			if !slices.Contains(there, name) {
				t.Errorf("%s names %s, which is not there", file, name)
			}
		}
	}
}
