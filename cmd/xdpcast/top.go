package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/urfave/cli/v2"

	"xdpcast/internal/control"
)

func topCommand(now func() time.Time) *cli.Command {
	return &cli.Command{
		Name:  "top",
		Usage: "watch rules, interfaces and events on a live screen",
		Description: "Rules with problems come first: failed, looping, dropping, pending, silent; then the others by rate. Rates are differences of\n" +
			"counters between refreshes. Without a daemon the counters come from the kernel only. The key ? shows all keys.\n" +
			"The environment variable NO_COLOR disables colours.",
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "interval", Usage: "`TIME` between refreshes", Value: time.Second},
			&cli.StringFlag{Name: "sort", Usage: "sort rules by `KEY`: " + sortNames(), Value: sortKeys[0].name},
			&cli.StringFlag{Name: "filter", Usage: "show only rules with `TEXT` in name, state, path, input or outputs"},
			pinDirFlag(),
		},
		Action: func(c *cli.Context) error { return top(c, now) },
	}
}

func top(c *cli.Context, now func() time.Time) error {
	if err := nargs(c, 0, 0); err != nil {
		return err
	}
	interval := c.Duration("interval")
	if interval < minInterval || interval > time.Hour {
		return usagef("--interval %v: want %v to 1h", interval, minInterval)
	}
	sort := sortNamed(c.String("sort"))
	if sort < 0 {
		return usagef("--sort %q: want one of %s", c.String("sort"), sortNames())
	}
	if !isTerminal(c.App.Writer) {
		return usagef("top needs a terminal: \"xdpcast stats --watch\" does not")
	}
	look := looker(c, now)
	first, err := look(c.Context) // initial errors are printed on the terminal
	if err != nil {
		return err
	}
	m := newTopModel(interval, sort, c.String("filter"), func() tea.Msg {
		seen, err := look(c.Context)
		return lookMsg{seen, err}
	})
	m.take(lookMsg{seen: first})
	p := tea.NewProgram(m, tea.WithContext(c.Context), tea.WithInput(c.App.Reader), tea.WithOutput(c.App.Writer))
	ctx, cancel := context.WithCancel(c.Context)
	var following sync.WaitGroup
	following.Go(func() { followInto(ctx, control.NewClient(c.String("socket")), p.Send) })
	_, err = p.Run()
	cancel()
	following.Wait()
	if errors.Is(err, tea.ErrInterrupted) || c.Context.Err() != nil {
		return nil
	}
	if err != nil {
		return fmt.Errorf("live screen: %w", err)
	}
	return nil
}

// followInto sends the daemon's events to the screen, the last ones first, also across its
// restarts.
func followInto(ctx context.Context, daemon *control.Client, send func(tea.Msg)) {
	q := control.EventQuery{Follow: true, Tail: topTail}
	for {
		// A daemon that is gone, or has no events, is noticed by the readings.
		_ = daemon.Events(ctx, q, func(e control.Event) error {
			if e.Number > 0 {
				q.After, q.Tail = e.Number, 0
			}
			send(eventMsg{e})
			return nil
		})
		if wait(ctx, followPause) != nil {
			return
		}
	}
}

// seen is one reading of everything that the screen shows.
type seen struct {
	stats  control.Stats
	daemon *control.Status // nil: none runs, and the counters are the kernel's
	groups []control.Group
	took   time.Duration
}

// looker returns a function that reads the daemon, or without one the kernel.
func looker(c *cli.Context, now func() time.Time) func(context.Context) (seen, error) {
	daemon := control.NewClient(c.String("socket")) // its message about waiting would be written into the screen
	return func(ctx context.Context) (s seen, err error) {
		begin := time.Now()
		defer func() { s.took = time.Since(begin) }()
		status, err := daemon.Status(ctx)
		if err != nil {
			s.stats, err = orKernel(c, s.stats, err, now())
			return s, err
		}
		s.daemon = &status
		if s.stats, err = daemon.Stats(ctx); err != nil {
			return s, err
		}
		s.groups, err = daemon.Groups(ctx)
		return s, err
	}
}
