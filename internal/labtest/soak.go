package labtest

import "os"

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
