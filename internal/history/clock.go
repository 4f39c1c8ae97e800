package history

import (
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Clock is the time since boot, which clock steps do not affect, and the id of that boot. Tests
// replace the functions.
type Clock struct {
	Boot string
	Now  func() time.Duration // CLOCK_BOOTTIME: includes suspended time
}

// NewClock reads the boot id (random(4)).
func NewClock() (Clock, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return Clock{}, fmt.Errorf("which boot this is: %w", err)
	}
	return Clock{Boot: strings.TrimSpace(string(id)), Now: sinceBoot}, nil
}

func sinceBoot() time.Duration {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &now) // fails only for an unknown clock
	return time.Duration(now.Nano())
}

// Left is the time until a pending change is undone: zero or negative if it has expired, or after a
// reboot.
func (c Clock) Left(p *Pending) time.Duration {
	if p.Boot != c.Boot {
		return 0
	}
	return p.Deadline - c.Now()
}
