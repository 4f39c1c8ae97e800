// Package e2e_test tests the built program from outside: as a daemon in a network
// namespace, with real traffic, its command line and its API.
package e2e_test

import (
	"fmt"
	"os"
	"testing"

	"xdpcast/internal/labtest"
)

// program is the program under test; set once by TestMain, before any test.
var program string

func TestMain(m *testing.M) { os.Exit(buildAndRun(m)) }

func buildAndRun(m *testing.M) int {
	// A machine without a Go toolchain brings the program.
	if program = os.Getenv("XDPCAST_E2E_PROGRAM"); program != "" || !labtest.Root() {
		return m.Run() // without root everything is skipped
	}
	dir, err := os.MkdirTemp("", "xdpcast-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	// Another user must be able to run it, too.
	if err := os.Chmod(dir, 0o755); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var flags []string
	if os.Getenv("XDPCAST_E2E_RACE") != "" {
		flags = append(flags, "-race")
	}
	if program, err = labtest.BuildProgram(dir, flags...); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}
