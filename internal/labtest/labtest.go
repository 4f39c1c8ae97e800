// Package labtest gives tests the network namespaces of package lab.
package labtest

import (
	"os"
	"runtime"
	"testing"

	"xdpcast/internal/lab"
)

// Host makes a host for a test and closes it when the test ends.
func Host(t testing.TB, prefix string) *lab.Host {
	t.Helper()
	RequireRoot(t)
	h, err := lab.NewHost(lab.UniqueName(prefix))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Errorf("close namespace %s: %v", h.Name, err)
		}
	})
	return h
}

// Connect is lab.Connect with the default MTU, for a test.
func Connect(t testing.TB, a, b lab.End) {
	t.Helper()
	if err := lab.Connect(a, b, 0); err != nil {
		t.Fatal(err)
	}
}

// Do runs fn inside the host and fails the test on its error. fn may end the test, as with t.Fatal or t.Skip, although it
// runs on another goroutine.
func Do(t testing.TB, h *lab.Host, fn func() error) {
	t.Helper()
	returned := false
	err := h.Do(func() error {
		err := fn()
		returned = true
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if !returned {
		runtime.Goexit()
	}
}

// noRoot is the environment variable that makes tests behave as for an ordinary user when run as
// root: make check sets it, so that it runs the same tests for everyone.
const noRoot = "XDPCAST_NO_ROOT"

// Root says whether tests may make namespaces and load programs.
func Root() bool { return os.Geteuid() == 0 && os.Getenv(noRoot) == "" }

// RequireRoot skips a test that makes namespaces, loads programs or changes its user if it cannot,
// or must not.
func RequireRoot(t testing.TB) {
	t.Helper()
	switch {
	case Root():
	case os.Getenv(noRoot) != "":
		t.Skip("needs root, and " + noRoot + " is set")
	default:
		Lacking(t, "needs root")
	}
}

// Lacking skips the test because the machine lacks something. If the variable CI is set it fails
// instead, so that the skip cannot persist.
func Lacking(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatal(what)
	}
	t.Skip(what)
}
