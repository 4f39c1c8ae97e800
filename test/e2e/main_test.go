// Package e2e_test tests the built program from outside: as a daemon in a network
// namespace, with real traffic, its command line and its API.
package e2e_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// program is the program under test; set once by TestMain, before any test.
var program string

func TestMain(m *testing.M) { os.Exit(buildAndRun(m)) }

func buildAndRun(m *testing.M) int {
	// A machine without a Go toolchain brings the program.
	if program = os.Getenv("XDPCAST_E2E_PROGRAM"); program != "" {
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "xdpcast-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	program = filepath.Join(dir, "xdpcast")
	// Another user must be able to run it, too.
	if err := os.Chmod(dir, 0o755); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	args := []string{"build", "-o", program}
	if os.Getenv("XDPCAST_E2E_RACE") != "" {
		args = append(args, "-race")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	build := exec.CommandContext(ctx, "go", append(args, "xdpcast/cmd/xdpcast")...)
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build the program:", err)
		return 1
	}
	return m.Run()
}
