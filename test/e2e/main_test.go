// Package e2e_test tests the built program from outside: as a daemon in a network namespace, with
// real traffic, its command line and its API.
package e2e_test

import (
	"fmt"
	"os"
	"testing"

	"xdpcast/internal/hold"
	"xdpcast/internal/labtest"
	"xdpcast/internal/notify"
)

// program is the program under test; set once by TestMain, before any test.
var program string

func TestMain(m *testing.M) { os.Exit(buildAndRun(m)) }

// takesPath is the environment variable that makes this binary act as a new daemon that dies after it
// has had the old one stop a path.
const takesPath = "XDPCAST_E2E_TAKES_PATH"

func takeAndDie(path string) int {
	manager, err := notify.Connect()
	if err == nil {
		err = hold.AskToStop(manager, path, patience)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 4
	}
	return 3
}

// dies is the environment variable that makes this binary act as a new daemon that dies when it is
// "ready", which the old one knows, or has "followed" it.
const dies = "XDPCAST_E2E_DIES"

func readyAndDie(when string) int {
	manager, err := notify.Connect()
	if err == nil {
		err = manager.Notify(notify.Ready)
	}
	if err == nil && when == "ready" {
		err = hold.AskToStop(manager, "nothing", patience) // returns when the other process has read both
	}
	if err == nil && when == "followed" {
		err = manager.Barrier()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 4
	}
	return 3
}

func buildAndRun(m *testing.M) int {
	if when := os.Getenv(dies); when != "" {
		return readyAndDie(when)
	}
	if path := os.Getenv(takesPath); path != "" {
		return takeAndDie(path)
	}
	if !labtest.Root() {
		return m.Run() // all tests are skipped
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
	if program, err = labtest.Program(dir, flags...); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}
