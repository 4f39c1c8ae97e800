package docs

import (
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// testFunctions returns the packages of each test, by test name.
func testFunctions(t *testing.T) map[string][]string {
	t.Helper()
	function := regexp.MustCompile(`(?m)^func (Test\w+)\(t \*testing\.T\)`)
	found := map[string][]string{}
	if err := filepath.WalkDir(root, func(path string, _ os.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		file := strings.TrimPrefix(filepath.ToSlash(path), root)
		for _, m := range function.FindAllStringSubmatch(read(t, file), -1) {
			found[m[1]] = append(found[m[1]], filepath.ToSlash(filepath.Dir(file)))
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return found
}

// listed is an entry of a list of tests.
type listed struct{ pkg, test string }

// readList reads a list: each line is a package, a test and a text.
func readList(t *testing.T, file string) (all []listed) {
	t.Helper()
	for line := range strings.Lines(read(t, file)) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		fields := strings.Fields(line)
		if len(fields) < 5 {
			t.Errorf("%s: line %q: want a package, a test and a reason", file, line)
			continue
		}
		all = append(all, listed{fields[0], fields[1]})
	}
	if len(all) == 0 {
		t.Errorf("%s lists nothing", file)
	}
	return all
}

// A test listed to run alone is skipped by name in every package, and run only in the listed one:
// it must exist there, and nowhere else.
func TestListOfTestsThatRunAlone(t *testing.T) {
	functions := testFunctions(t)
	for _, e := range readList(t, "test/alone.txt") {
		if got := functions[e.test]; !slices.Equal(got, []string{e.pkg}) {
			t.Errorf("test/alone.txt: %s is in %v, want it in %s alone", e.test, got, e.pkg)
		}
	}
}

// scripts/test leaves the race detector out only where nothing runs concurrently, and starts first what
// exists.
func TestListsOfTheTestRun(t *testing.T) {
	script := read(t, "scripts/test")
	setting := func(name string) string {
		m := regexp.MustCompile(`(?m)^` + name + `='([^']*)'$`).FindStringSubmatch(script)
		if m == nil {
			t.Fatalf("scripts/test does not set %s", name)
		}
		return m[1]
	}
	const shared = "internal/plan" // runs without it, too, but for what raced names
	functions := testFunctions(t)
	for _, test := range strings.Fields(setting("longest")) {
		if len(functions[test]) == 0 {
			t.Errorf("scripts/test starts %s first, which does not exist", test)
		}
	}
	raced := strings.Split(strings.Trim(setting("raced"), "^()$"), "|")
	for _, test := range raced {
		if !slices.Contains(functions[test], "pkg/loader") && !slices.Contains(functions[test], shared) {
			t.Errorf("scripts/test races %s, which neither pkg/loader nor %s has", test, shared)
		}
	}
	for line := range strings.Lines(setting("single")) {
		pkg, test, _ := strings.Cut(strings.TrimSpace(line), " ")
		if !slices.Contains(functions[test], pkg) {
			t.Errorf("scripts/test runs %s of %s by itself, which does not exist", test, pkg)
		}
	}
	// Tests of raced packages that run without the detector, by name; TestConverges is of another process.
	for _, m := range regexp.MustCompile(`([\w/]+) \(([\w|]+)\)`).FindAllStringSubmatch(setting("unraced"), -1) {
		for _, test := range strings.Split(m[2], "|") {
			if body := testBody(t, m[1], test); body == "" || regexp.MustCompile(`\bgo func|\.Go\(`).MatchString(body) {
				t.Errorf("scripts/test runs %s of %s without the race detector: it does not exist, or starts a goroutine", test, m[1])
			}
		}
	}
	plain, checked := regexp.MustCompile(setting("plain")), map[string]bool{}
	if err := filepath.WalkDir(root, func(path string, _ os.DirEntry, err error) error {
		file := strings.TrimPrefix(filepath.ToSlash(path), root)
		pkg := filepath.ToSlash(filepath.Dir(file))
		if err != nil || !strings.HasSuffix(path, ".go") || !plain.MatchString(pkg) && pkg != shared {
			return err
		}
		checked[pkg] = true
		files := token.NewFileSet()
		parsed, err := parser.ParseFile(files, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(parsed, func(n ast.Node) bool {
			starts := false
			switch n := n.(type) {
			case *ast.FuncDecl:
				return pkg != shared || !slices.Contains(raced, n.Name.Name)
			case *ast.GoStmt:
				starts = true
			case *ast.SelectorExpr: // of a WaitGroup, of a test
				starts = n.Sel.Name == "Go" || n.Sel.Name == "Parallel"
			}
			if starts {
				t.Errorf("%s starts a goroutine: scripts/test runs %s without the race detector", files.Position(n.Pos()), pkg)
			}
			return true
		})
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if len(checked) != 12 {
		t.Errorf("scripts/test runs without the race detector: %v", slices.Sorted(maps.Keys(checked)))
	}
}

// testBody returns the text of a test, or "".
func testBody(t *testing.T, pkg, test string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(root, pkg, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if _, rest, ok := strings.Cut(string(text), "\nfunc "+test+"(t *testing.T) {\n"); ok {
			body, _, _ := strings.Cut(rest, "\n}\n")
			return body
		}
	}
	return ""
}

// The list of tests with a long form names exactly those that call labtest.Soak, SoakTime or LongOnly.
func TestListOfLongForms(t *testing.T) {
	functions := testFunctions(t)
	want := map[string]bool{} // packages that call it
	if err := filepath.WalkDir(root, func(path string, _ os.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") || strings.Contains(path, "lists_test") {
			return err
		}
		file := strings.TrimPrefix(filepath.ToSlash(path), root)
		for _, text := range strings.Split(read(t, file), "\nfunc ") {
			if name, body, _ := strings.Cut(text, "("); slices.ContainsFunc([]string{"Soak(", "SoakTime(", "LongOnly("}, func(f string) bool { return strings.Contains(body, "labtest."+f) }) {
				want[filepath.ToSlash(filepath.Dir(file))+" "+name] = true
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for _, e := range readList(t, "test/soak.txt") {
		if !slices.Contains(functions[e.test], e.pkg) || !want[e.pkg+" "+e.test] {
			t.Errorf("test/soak.txt: %s of %s is not there, or does not ask labtest.Soak, SoakTime or LongOnly", e.test, e.pkg)
		}
		delete(want, e.pkg+" "+e.test)
	}
	for _, missing := range slices.Sorted(maps.Keys(want)) {
		t.Errorf("test/soak.txt does not list %s", missing)
	}
}

// Tests listed to run on other kernels exist, and a skip is allowed only for a test that runs, with
// a reason.
func TestListOfTestsOnOtherKernels(t *testing.T) {
	const file = "test/kernels.txt"
	functions := testFunctions(t)
	runs := map[string]bool{}
	exists := func(pkg, test string) {
		if !slices.Contains(functions[test], pkg) {
			t.Errorf("%s: %s is not in %s", file, test, pkg)
		}
	}
	for line := range strings.Lines(read(t, file)) {
		fields := strings.Fields(line)
		switch {
		case len(fields) == 0 || fields[0] == "#":
		case fields[0] == "skip" && len(fields) > 3:
			if !runs[fields[2]] {
				t.Errorf("%s: %s is skipped and does not run", file, fields[2])
			}
		case fields[0] != "short" && fields[0] != "full" || len(fields) < 3:
			t.Errorf("%s: line %q: want short or full, a machine, a package and its tests, or skip, a kernel, a test and a reason", file, line)
		case fields[2] == "demo":
		case len(fields) == 3:
			t.Errorf("%s: line %q has no tests", file, line)
		case fields[3] == "all":
			for test, packages := range functions {
				runs[test] = runs[test] || slices.Contains(packages, fields[2])
			}
			for _, without := range fields[4:] {
				exists(fields[2], strings.TrimPrefix(without, "-"))
			}
		default:
			for _, test := range fields[3:] {
				exists(fields[2], test)
				runs[test] = true
			}
		}
	}
	if len(runs) == 0 {
		t.Errorf("%s lists no test", file)
	}
}
