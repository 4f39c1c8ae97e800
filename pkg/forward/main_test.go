package forward

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

// TestMain fails the run when goroutines, descriptors or rings are left behind.
func TestMain(m *testing.M) {
	// The runtime's poller has an eventfd from the first pollable file on.
	if r, w, err := os.Pipe(); err == nil {
		r.Close()
		w.Close()
	}
	before := held()
	code := m.Run()
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if after := held(); after != before {
		fmt.Fprintf(os.Stderr, "before the tests %+v, after them %+v\n", before, after)
		code = 1
	}
	os.Exit(code)
}

// holdings is what this process holds that the path is made of.
type holdings struct {
	sockets, eventfds, bpf, rings int
}

func held() (h holdings) {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		panic(err)
	}
	for _, e := range entries {
		target, _ := os.Readlink("/proc/self/fd/" + e.Name())
		switch {
		case strings.HasPrefix(target, "socket:"):
			h.sockets++
		case target == "anon_inode:[eventfd]":
			h.eventfds++
		case strings.HasPrefix(target, "anon_inode:bpf"):
			h.bpf++
		}
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		panic(err)
	}
	h.rings = strings.Count(string(maps), "socket:[")
	return h
}
