package bpf

import (
	"encoding/json"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
)

// budget is what the verifier may find in one program.
type budget struct {
	// Verified is how many instructions it walks through in total, which bounds
	// how long loading takes; the kernel refuses a million.
	Verified int `json:"verified_instructions"`
	// VerifiedOn is the same for releases of Linux whose verifier looks at more.
	VerifiedOn map[string]int `json:"verified_instructions_on"`
	// Stack is the deepest stack in bytes, all functions of one call chain
	// together; the kernel refuses 512.
	Stack int `json:"stack_bytes"`
	// Instructions is the length of the program.
	Instructions int `json:"instructions"`
}

// Every program stays inside the budget of testdata/verifier_budget.json. A change
// that needs more raises the budget with it, where a reviewer sees it.
func TestVerifierBudget(t *testing.T) {
	labtest.RequireRoot(t)
	var budgets map[string]budget
	if err := json.Unmarshal([]byte(readFile(t, "testdata/verifier_budget.json")), &budgets); err != nil {
		t.Fatal(err)
	}
	measured := map[string]bool{}
	for object, spec := range objects(t) {
		c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{Programs: ebpf.ProgramOptions{LogLevel: ebpf.LogLevelStats}})
		if err != nil {
			t.Fatalf("load %s: %v", object, err)
		}
		defer c.Close()
		for name, p := range c.Programs {
			limit, ok := budgets[name]
			if !ok {
				t.Errorf("program %s has no budget", name)
				continue
			}
			measured[name] = true
			if n, ok := limit.VerifiedOn[linux(t)]; ok {
				limit.Verified = n
			}
			got := measure(t, p)
			got.Instructions = len(spec.Programs[name].Instructions)
			t.Logf("%s: %+v, budget %+v", name, got, limit)
			for _, f := range []struct {
				what       string
				got, limit int
			}{
				{"verified instructions", got.Verified, limit.Verified},
				{"bytes of stack", got.Stack, limit.Stack},
				{"instructions", got.Instructions, limit.Instructions},
			} {
				if f.got > f.limit {
					t.Errorf("%s: %d %s, the budget is %d", name, f.got, f.what, f.limit)
				}
			}
		}
	}
	for name := range budgets {
		if !measured[name] {
			t.Errorf("budget for %s, which is no program", name)
		}
	}
}

var (
	processed  = regexp.MustCompile(`processed (\d+) insns`)
	stackDepth = regexp.MustCompile(`stack depth (?:max )?([\d+]+)`)
)

// linux is the running kernel's release, "6.1".
func linux(t *testing.T) string {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	return strings.Join(strings.SplitN(unix.ByteSliceToString(u.Release[:]), ".", 3)[:2], ".")
}

// measure reads the verifier's summary: "processed N insns", and "stack depth
// A+B+C" with the frames of the main function and of each global one, or "stack depth max
// N" (Linux 7).
func measure(t *testing.T, p *ebpf.Program) (b budget) {
	t.Helper()
	m := processed.FindStringSubmatch(p.VerifierLog)
	depths := stackDepth.FindStringSubmatch(p.VerifierLog)
	if m == nil || depths == nil {
		t.Fatalf("no figures in the verifier's log: %q", p.VerifierLog)
	}
	b.Verified, _ = strconv.Atoi(m[1])
	for depth := range strings.SplitSeq(depths[1], "+") {
		n, err := strconv.Atoi(depth)
		if err != nil {
			t.Fatalf("stack depth %q: %v", depths[1], err)
		}
		// Added up: no function calls another twice on one path, so that no call
		// chain is deeper than all functions together.
		b.Stack += n
	}
	return b
}
