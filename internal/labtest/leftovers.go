package labtest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"xdpcast/internal/lab"
)

// Leftovers lists everything on the machine with a test's own name: namespaces, pins, files in /run
// and the temporary directory whose names begin with it, and processes with it in their arguments.
func Leftovers(t testing.TB, name string) []string {
	t.Helper()
	var left []string
	for _, dir := range []string{lab.RunDir, "/sys/fs/bpf", "/run", os.TempDir()} {
		entries, err := filepath.Glob(filepath.Join(dir, name+"*"))
		if err != nil {
			t.Fatal(err)
		}
		left = append(left, entries...)
	}
	commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range commands {
		if line, err := os.ReadFile(path); err == nil && strings.Contains(string(line), name) {
			left = append(left, path+": "+string(line))
		}
	}
	return left
}

// OpenFiles counts the sockets, pidfds, namespaces and plain files open in this process, except
// those of the runtime's poller.
func OpenFiles(t testing.TB) int {
	t.Helper()
	links, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, link := range links {
		if target, err := os.Readlink(link); err == nil && !strings.HasPrefix(target, "anon_inode:[event") {
			n++
		}
	}
	return n
}
