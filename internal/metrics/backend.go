package metrics

import (
	"context"
	"sync"
	"time"

	"xdpcast/internal/control"
)

// Backend is a relay whose reloads are counted. All reloads must go through it.
type Backend struct {
	control.Backend
	now func() time.Time

	mu   sync.Mutex
	seen reloads
}

// reloads is the record of reloads.
type reloads struct {
	tried     uint64
	failed    bool      // the last one
	succeeded time.Time // time of the last success; zero for none
}

// Observe counts the reloads of a relay.
func Observe(b control.Backend) *Backend { return &Backend{Backend: b, now: time.Now} }

// Reload implements control.Backend. A dry run is not counted.
func (b *Backend) Reload(ctx context.Context, o control.ApplyOptions) (control.ApplyResult, error) {
	result, err := b.Backend.Reload(ctx, o)
	if o.DryRun {
		return result, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.seen.tried++
	b.seen.failed = err != nil
	if err == nil {
		b.seen.succeeded = b.now()
	}
	return result, err
}

// stateCounter is a relay that counts memberships without listing them.
type stateCounter interface {
	// GroupStates counts memberships by interface and state.
	GroupStates(ctx context.Context) (map[string]map[string]int, error)
}

// GroupStates counts memberships by interface and state. A relay that counts them itself avoids
// reading their counters.
func (b *Backend) GroupStates(ctx context.Context) (map[string]map[string]int, error) {
	if quick, ok := b.Backend.(stateCounter); ok {
		return quick.GroupStates(ctx)
	}
	groups, err := b.Groups(ctx)
	states := map[string]map[string]int{}
	for i := range groups {
		g := &groups[i]
		if states[g.Interface] == nil {
			states[g.Interface] = map[string]int{}
		}
		states[g.Interface][g.State]++
	}
	return states, err
}

func (b *Backend) reloaded() reloads {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.seen
}
