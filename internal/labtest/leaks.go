package labtest

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

// Main is the body of a TestMain: it fails the run if goroutines, descriptors or mapped rings are
// left.
func Main(m *testing.M) {
	// The runtime's poller has an eventfd from the first pollable file on.
	if r, w, err := os.Pipe(); err == nil {
		r.Close()
		w.Close()
	}
	before := Held()
	code := m.Run()
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if after := Held(); after != before {
		fmt.Fprintf(os.Stderr, "before the tests %+v, after them %+v\n", before, after)
		code = 1
	}
	os.Exit(code)
}

// Holdings are a process's resources of the user-space paths.
type Holdings struct {
	Sockets, Eventfds, BPF, Memory int // descriptors
	Rings                          int // mappings of sockets
}

// Held counts what this process holds.
func Held() (h Holdings) {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		panic(err)
	}
	for _, e := range entries {
		target, _ := os.Readlink("/proc/self/fd/" + e.Name())
		switch {
		case strings.HasPrefix(target, "socket:"):
			h.Sockets++
		case target == "anon_inode:[eventfd]":
			h.Eventfds++
		case strings.HasPrefix(target, "anon_inode:bpf"):
			h.BPF++
		case strings.HasPrefix(target, "/memfd:"):
			h.Memory++
		}
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		panic(err)
	}
	h.Rings = strings.Count(string(maps), "socket:[")
	return h
}
