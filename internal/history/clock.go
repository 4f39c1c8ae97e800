package history

import (
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Clock is the time since boot, which no step of the clock changes, and the boot that it
// counts from. The functions are replaced in tests.
type Clock struct {
	Boot string
	Now  func() time.Duration // CLOCK_BOOTTIME: a suspended machine's time counts
}

// NewClock reads which boot this is (random(4)).
func NewClock() (Clock, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return Clock{}, fmt.Errorf("which boot this is: %w", err)
	}
	return Clock{Boot: strings.TrimSpace(string(id)), Now: sinceBoot}, nil
}

func sinceBoot() time.Duration {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &now) // fails for an unknown clock alone
	return time.Duration(now.Nano())
}

// Left is the time until a pending change is undone: none or less when it is over, also by a
// reboot.
func (c Clock) Left(p *Pending) time.Duration {
	if p.Boot != c.Boot {
		return 0
	}
	return p.Deadline - c.Now()
}
