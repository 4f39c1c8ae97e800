// Package labtest gives tests the network namespaces of package lab.
package labtest

import (
	"os"
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

// Do runs fn inside the host and fails the test on its error.
func Do(t testing.TB, h *lab.Host, fn func() error) {
	t.Helper()
	if err := h.Do(fn); err != nil {
		t.Fatal(err)
	}
}

// RequireRoot skips the test for a user who cannot make namespaces.
func RequireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		Lacking(t, "needs root to make network namespaces")
	}
}

// Lacking skips the test for what the machine lacks. Where the variable CI is set it
// fails instead, so that the skip cannot last.
func Lacking(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatal(what)
	}
	t.Skip(what)
}
