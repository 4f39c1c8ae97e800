package traffic

import (
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"
)

// TestMain fails the run when a test left a goroutine or a file descriptor.
func TestMain(m *testing.M) {
	before := openFiles()
	code := m.Run()
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if after := openFiles(); len(after) > len(before) && code == 0 {
		fmt.Fprintf(os.Stderr, "descriptors left open: before %v, after %v\n", before, after)
		code = 1
	}
	os.Exit(code)
}

// openFiles lists what the open descriptors are, without the runtime's own
// epoll and eventfd, which appear when they are first needed.
func openFiles() []string {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil
	}
	var open []string
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && target != "anon_inode:[eventpoll]" && target != "anon_inode:[eventfd]" {
			open = append(open, target)
		}
	}
	return open
}
