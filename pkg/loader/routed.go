package loader

import (
	"fmt"
	"time"
)

// MirrorUntil says that routed flows (flow.Flow.Routed) are as the kernel's multicast forwarding
// cache is, from now on for so long. When that time is over, all of their packets are the
// kernel's: so a daemon that dies leaves no route behind that its routing daemon has changed. 0
// ends it at once.
func (l *Loader) MirrorUntil(d time.Duration) error {
	until := uint64(0)
	if d > 0 {
		until = uint64(monotonic() + d)
	}
	if err := l.maps.RoutedUntil.Put(uint32(0), until); err != nil {
		return fmt.Errorf("write map routed_until: %w", err)
	}
	return nil
}
