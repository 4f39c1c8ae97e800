package labtest

import (
	"os"
	"testing"
	"time"
)

// soak is the environment variable that has tests take their long form: make soak.
const soak = "XDPCAST_SOAK"

// Soak is how often a test does what it repeats: short, or long under make soak.
// test/soak.txt lists the tests that ask.
func Soak(short, long int) int {
	if os.Getenv(soak) != "" {
		return long
	}
	return short
}

// SoakTime is for how long a storm goes on at least: five minutes under make soak, half an hour under make soak
// SOAK=night; 0 in its short form. test/soak.txt lists the tests that ask.
func SoakTime() time.Duration {
	switch os.Getenv(soak) {
	case "":
		return 0
	case "night":
		return 30 * time.Minute
	default:
		return 5 * time.Minute
	}
}

// LongOnly skips a test that has no short form, except under make soak. test/soak.txt lists it.
func LongOnly(t testing.TB, why string) {
	t.Helper()
	if os.Getenv(soak) == "" {
		t.Skipf("runs under make soak (%s=1) alone: %s", soak, why)
	}
}
