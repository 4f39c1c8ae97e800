package relay

import (
	"slices"
	"testing"
	"time"
)

// TestEchoes: a count that grows begins an echo, once; what was counted before the daemon came does
// not; and it ends when nothing has come for a while.
func TestEchoes(t *testing.T) {
	var e echoes
	now := time.Unix(1, 0)
	for _, c := range []struct {
		after        time.Duration
		counts       map[string]uint64
		began, ended []string
	}{
		{0, map[string]uint64{"old": 7}, nil, nil},
		{time.Second, map[string]uint64{"old": 7, "new": 1}, []string{"new"}, nil},
		{time.Second, map[string]uint64{"old": 8, "new": 1}, []string{"old"}, nil},
		{time.Second, map[string]uint64{"old": 9, "new": 1}, nil, nil},
		{echoOver - time.Second - time.Second, map[string]uint64{"old": 9, "new": 1}, nil, []string{"new"}},
		{echoOver, map[string]uint64{}, nil, []string{"old"}},
		{time.Second, map[string]uint64{"new": 1}, []string{"new"}, nil}, // another of that name
		{time.Second, map[string]uint64{"new": 5}, nil, nil},
		{time.Second, map[string]uint64{"new": 2}, []string{"new"}, nil}, // another, between two looks
		{time.Second, map[string]uint64{}, nil, []string{"new"}},         // another without echoes
	} {
		now = now.Add(c.after)
		began, ended := e.look(now, c.counts)
		if !slices.Equal(began, c.began) || !slices.Equal(ended, c.ended) {
			t.Errorf("%v: began %v, ended %v, want %v, %v", c.counts, began, ended, c.began, c.ended)
		}
	}
}
