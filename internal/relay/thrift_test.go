package relay

import (
	"runtime/debug"
	"testing"
)

// Garbage is collected earlier between begin and end, unless it is already, or never by its share; afterwards it is as
// before.
func TestThrift(t *testing.T) {
	original := debug.SetGCPercent(100)
	defer debug.SetGCPercent(original)
	for _, tt := range []struct{ before, during int }{{100, busyGarbage}, {400, busyGarbage}, {busyGarbage, busyGarbage}, {20, 20}, {-1, -1}} {
		debug.SetGCPercent(tt.before)
		percent := func() int {
			now := debug.SetGCPercent(tt.before)
			debug.SetGCPercent(now)
			return now
		}
		var one thrift
		one.end()
		for _, during := range []int{tt.during, tt.during} {
			if one.begin(); percent() != during {
				t.Errorf("%d%% during %d%%, want %d%%", percent(), tt.before, during)
			}
		}
		for range 2 {
			if one.end(); percent() != tt.before {
				t.Errorf("%d%% after %d%%", percent(), tt.before)
			}
		}
	}
}
