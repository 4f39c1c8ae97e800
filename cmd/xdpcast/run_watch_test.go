package main

import (
	"context"
	"log/slog"
	"testing"

	"xdpcast/internal/control"
)

// waiting is a backend with a change that begins to wait for confirmation right before a reload.
type waiting struct {
	control.Backend
	refuse  int // reloads that are refused
	waits   int // answers of Status with the change
	reloads int
}

func (b *waiting) Status(context.Context) (s control.Status, err error) {
	if b.waits > 0 {
		b.waits--
		s.Unconfirmed = &control.UnconfirmedChange{What: "rule apply"}
	}
	return s, nil
}

func (b *waiting) Reload(context.Context, control.ApplyOptions) (control.ApplyResult, error) {
	if b.reloads++; b.reloads <= b.refuse {
		b.waits = 1
		return control.ApplyResult{}, control.Errorf(control.KindConflict, "a change waits for confirmation")
	}
	return control.ApplyResult{}, nil
}

// A changed file is read once no change waits, also if one began to wait just before; a file that is in conflict
// is read once.
func TestFileIsReadAfterTheChangeThatWaits(t *testing.T) {
	w := &configWatch{log: slog.New(slog.DiscardHandler)}
	b := &waiting{refuse: 1}
	if w.readAgain(t.Context(), b); b.reloads != 2 {
		t.Errorf("read %d times, want twice: the first time is refused", b.reloads)
	}
	conflict := &refusing{}
	if w.readAgain(t.Context(), conflict); conflict.reloads != 1 {
		t.Errorf("a file in conflict is read %d times, want once", conflict.reloads)
	}
}

// refusing is a backend with rules that are in conflict with the file.
type refusing struct{ waiting }

func (b *refusing) Reload(context.Context, control.ApplyOptions) (control.ApplyResult, error) {
	b.reloads++
	return control.ApplyResult{}, control.Errorf(control.KindConflict, "rule a has the input of rule b")
}
