package main

// Support for run --watch-config.

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/control"
	"xdpcast/internal/relay"
	"xdpcast/internal/rulefile"
)

// settlePause is the polling interval for an unconfirmed change while the file has changed.
const settlePause = time.Second

// configWatch watches the rule file; nil without --watch-config.
type configWatch struct {
	watcher *rulefile.Watcher
	log     *slog.Logger
}

func watchConfig(c *cli.Context, opts relay.Options) (*configWatch, error) {
	if !c.Bool("watch-config") {
		return nil, nil
	}
	watcher, err := rulefile.NewWatcher(opts.ConfigFile, opts.Logger)
	if err != nil {
		return nil, err
	}
	return &configWatch{watcher, opts.Logger}, nil
}

func (w *configWatch) close() error {
	if w == nil {
		return nil
	}
	return w.watcher.Close()
}

// reload reads the file again whenever it changes, until ctx ends. It closes the watcher.
func (w *configWatch) reload(ctx context.Context, r control.Backend) {
	if w == nil {
		return
	}
	w.watcher.Run(ctx, func() { w.readAgain(ctx, r) })
}

// readAgain reads the file again, after a change that waits for confirmation, also one that was made
// just before: nothing announces the file's content a second time.
func (w *configWatch) readAgain(ctx context.Context, r control.Backend) {
	for w.settled(ctx, r) {
		if !errors.Is(reloadFor(ctx, "file changed", r, w.log), control.ErrConflict) {
			return
		}
		if status, err := r.Status(ctx); err != nil || status.Unconfirmed == nil {
			return // the file's rules are in conflict with others
		}
	}
}

// settled waits until no change waits for confirmation; false if ctx ends first.
func (w *configWatch) settled(ctx context.Context, r control.Backend) bool {
	for first := true; ; first = false {
		status, err := r.Status(ctx)
		if err != nil || status.Unconfirmed == nil {
			return ctx.Err() == nil
		}
		if first {
			w.log.Warn("the file has changed: it is read once the unconfirmed change is confirmed or undone", "change", status.Unconfirmed.What)
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(settlePause):
		}
	}
}
