package docs

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"xdpcast/pkg/loader"
	"xdpcast/pkg/rules"
)

const rulesDoc = "docs/rules.md"

// program builds the program as it stands.
func program(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "xdpcast")
	build := exec.Command("go", "build", "-o", path, "./cmd/xdpcast")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

// quoted is a command of a console block and the lines below it.
type quoted struct {
	line   int
	words  []string
	answer string
}

func quotedCommands(b block) (all []quoted) {
	for i, line := range strings.Split(strings.TrimSuffix(b.text, "\n"), "\n") {
		if command, ok := strings.CutPrefix(line, "$ "); ok {
			all = append(all, quoted{line: b.line + i, words: shellWords(command)})
		} else if len(all) > 0 {
			all[len(all)-1].answer += line + "\n"
		}
	}
	return all
}

// TestRulesAreAnsweredAsQuoted runs the commands that docs/rules.md quotes. One that
// is answered by an error there is answered by it; any other is taken, up to where a
// daemon is missing. A file that is checked is the one above the command.
func TestRulesAreAnsweredAsQuoted(t *testing.T) {
	xdpcast := program(t)
	dir := t.TempDir()
	text, refused, taken := "", 0, 0
	for _, b := range blocks(read(t, rulesDoc)) {
		if b.language == "yaml" || b.language == "yaml refused" {
			text = b.text
		}
		if b.language != "console" {
			continue
		}
		for _, q := range quotedCommands(b) {
			if q.words[0] != "xdpcast" {
				t.Errorf("%s:%d: %s is not of the program", rulesDoc, q.line, q.words[0])
				continue
			}
			if q.words[1] == "check" {
				if err := os.WriteFile(filepath.Join(dir, q.words[len(q.words)-1]), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			got, code := answer(t, dir, xdpcast, q.words[1:])
			if q.answer == "" {
				taken++
				if code != 1 || !strings.HasPrefix(got, "xdpcast: no xdpcast is running") {
					t.Errorf("%s:%d: exit code %d, %s", rulesDoc, q.line, code, got)
				}
				continue
			}
			refused++
			if got != q.answer || code == 0 {
				t.Errorf("%s:%d: exit code %d, answered\n%swant\n%s", rulesDoc, q.line, code, got, q.answer)
			}
		}
	}
	if refused < 25 || taken < 3 {
		t.Errorf("%d commands refused, %d taken: too few", refused, taken)
	}
}

// answer is what the program says where no daemon runs.
func answer(t *testing.T, dir, xdpcast string, args []string) (string, int) {
	t.Helper()
	command := exec.CommandContext(t.Context(), xdpcast, args...)
	command.Dir = dir
	command.Env = append(os.Environ(), "XDPCAST_SOCKET="+filepath.Join(dir, "absent"))
	var out bytes.Buffer
	command.Stdout, command.Stderr = &out, &out
	err := command.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), command.ProcessState.ExitCode()
}

// TestRefusedFiles: the files that docs/rules.md shows as refused are.
func TestRefusedFiles(t *testing.T) {
	found := 0
	for _, b := range blocks(read(t, rulesDoc)) {
		if b.language != "yaml refused" {
			continue
		}
		found++
		if _, err := rules.ParseFile(rulesDoc, []byte(b.text)); err == nil {
			t.Errorf("%s:%d: it is right", rulesDoc, b.line)
		}
	}
	if found == 0 {
		t.Error("there is none")
	}
}

// keyOf finds the keys of options and policies in a table of the document.
var keyOf = regexp.MustCompile("`([a-z]+)=")

// TestEveryFeatureHasAnExample: every option and policy of the tables stands in a file
// that is right, and so do prefixes, patterns and the forms of a port.
func TestEveryFeatureHasAnExample(t *testing.T) {
	doc := read(t, rulesDoc)
	var inputs, outputs string
	for _, b := range blocks(doc) {
		if b.language != "yaml" {
			continue
		}
		all, err := rules.ParseFile(rulesDoc, []byte(b.text))
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range all {
			inputs += rules.FormatInput(r.In, r.Accept) + "\n"
			for _, o := range r.Out {
				outputs += o.String() + "\n"
			}
		}
	}
	table, keys := "", 0
	for line := range strings.Lines(doc) {
		if strings.HasPrefix(line, "| option of an input") || strings.HasPrefix(line, "| policy of an output") {
			table = inputs
			if strings.Contains(line, "output") {
				table = outputs
			}
		}
		cells := strings.Split(line, "|")
		if len(cells) < 4 || table == "" {
			continue
		}
		for _, key := range keyOf.FindAllStringSubmatch(cells[1], -1) {
			keys++
			// What is the default is left out of the canonical form.
			if !strings.Contains(table, ","+key[1]+"=") && !(key[1] == "sport" && strings.Contains(table, "sport=")) {
				t.Errorf("no example has %s", key[1])
			}
		}
	}
	if keys < 20 {
		t.Errorf("found %d keys only", keys)
	}
	for _, want := range []string{"/16%", "]/64%", "@", "%eth+", ",join=none", ",join=all", ",join=ff05::1+ff05::2", ",vlan=7.100", "239.1.1.1%eth0"} {
		if !strings.Contains(inputs, want) {
			t.Errorf("no input has %s", want)
		}
	}
	for _, want := range []string{":+1000%", "/16%", "10.0.9.9:", "%br+", ",vlan=pop", ",vlan=8.100", ",ttl=dec", "239.2.2.2%eth1", ",src=192.0.2.1:7000"} {
		if !strings.Contains(outputs, want) {
			t.Errorf("no output has %s", want)
		}
	}
}

// TestDropReasonsAreExplained: docs/operations.md has a line for each reason, and for
// none that there is not.
func TestDropReasonsAreExplained(t *testing.T) {
	known := map[string]bool{}
	for reason := loader.Reason(0); reason < 255; reason++ {
		if name := reason.String(); !strings.HasPrefix(name, "reason_") {
			known[name] = true
		}
	}
	text := read(t, "docs/operations.md")
	_, text, _ = strings.Cut(text, "| reason | what was dropped")
	text, _, _ = strings.Cut(text, "\n\n")
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\|").FindAllStringSubmatch(text, -1) {
		if !known[row[1]] {
			t.Errorf("there is no reason %s", row[1])
		}
		delete(known, row[1])
	}
	for name := range known {
		t.Errorf("reason %s is not explained", name)
	}
}

// endpointCode is an endpoint in running text; forms are in capitals.
var endpointCode = regexp.MustCompile("`([^` ]*[0-9a-f][^` ]*%[a-z][^` ]*)`")

func TestEndpointsInTextParse(t *testing.T) {
	found := 0
	for _, code := range endpointCode.FindAllStringSubmatch(withoutBlocks(read(t, rulesDoc)), -1) {
		found++
		_, _, inErr := rules.ParseInput(code[1])
		_, outErr := rules.ParseOutput(code[1])
		if inErr != nil && outErr != nil {
			t.Errorf("%s: %v; %v", code[1], inErr, outErr)
		}
	}
	if found == 0 {
		t.Error("there is none")
	}
}
