package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/control"
)

const (
	// followTail is the default number of earlier events shown before new ones.
	followTail = 10
	// followPause is the delay before reconnecting to a daemon that is gone.
	followPause = time.Second
)

func eventsCommand(now func() time.Time) *cli.Command {
	return &cli.Command{
		Name:  "events",
		Usage: "show state changes of rules, outputs, memberships, interfaces, paths, neighbours, queriers, loops, reloads",
		Description: "Events are numbered consecutively, also across restarts of the daemon, which keeps the last 10,000 events, and\n" +
			"1,000 of them across a restart. In a burst of one kind, one event summarizes all beyond the first 1,000.\n" +
			"-o json writes one document a line.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "follow", Aliases: []string{"f"}, Usage: "show the last 10, or those of --since, and then new ones, until interrupted; also across a restart of the daemon"},
			&cli.StringFlag{Name: "since", Usage: "only those after event `N`, or from a TIME on: 10m (ago), 2026-01-31, \"2026-01-31 09:00\" or RFC 3339"},
			outputFlag(),
		},
		Action: func(c *cli.Context) error { return showEvents(c, now) },
	}
}

func showEvents(c *cli.Context, now func() time.Time) error {
	if err := showArgs(c, 0, 0); err != nil {
		return err
	}
	asJSON, err := wantJSON(c)
	if err != nil {
		return err
	}
	q := control.EventQuery{Follow: c.Bool("follow")}
	switch {
	case c.IsSet("since"):
		if q.After, q.Since, err = parseSince(c.String("since"), now()); err != nil {
			return err
		}
	case q.Follow:
		q.Tail = followTail
	}
	show := func(e control.Event) error {
		if e.Number > 0 {
			q.After, q.Since, q.Tail = e.Number, time.Time{}, 0
		}
		if asJSON {
			return writeEvent(c, &e)
		}
		_, err := fmt.Fprintln(c.App.Writer, eventLine(&e, now().Location()))
		return err
	}
	if !q.Follow {
		return client(c).Events(c.Context, q, show)
	}
	return followEvents(c, &q, show)
}

// followEvents continues after the last event when the daemon restarts.
func followEvents(c *cli.Context, q *control.EventQuery, show func(control.Event) error) error {
	daemon := client(c)
	told := false
	for first := true; ; first = false {
		err := daemon.Events(c.Context, *q, show)
		gone := err == nil || errors.Is(err, control.ErrNotRunning) || errors.Is(err, control.ErrUnavailable)
		switch {
		case c.Context.Err() != nil:
			return nil
		case !gone || first && err != nil:
			return err
		case err == nil:
			told = false
		case !told:
			fmt.Fprintln(c.App.ErrWriter, "xdpcast: the daemon has ended: waiting for the next one")
			told = true
		}
		if wait(c.Context, followPause) != nil {
			return nil
		}
	}
}

func wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

func writeEvent(c *cli.Context, e *control.Event) error {
	enc := json.NewEncoder(c.App.Writer)
	enc.SetEscapeHTML(false)
	return enc.Encode(e)
}

// eventLine formats an event as one line.
func eventLine(e *control.Event, zone *time.Location) string {
	number := strconv.FormatUint(e.Number, 10)
	if e.Number == 0 {
		number = "-"
	}
	return fmt.Sprintf("%6s  %s  %s", number, e.Time.In(zone).Format("2006-01-02 15:04:05.000"), printable(e.Text()))
}

// parseSince parses the number of an event, an age or a time.
func parseSince(text string, now time.Time) (after uint64, at time.Time, err error) {
	if after, err := strconv.ParseUint(text, 10, 64); err == nil {
		return after, time.Time{}, nil
	}
	if d, err := time.ParseDuration(text); err == nil && d >= 0 {
		return 0, now.Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339Nano, time.DateTime, "2006-01-02 15:04", time.DateOnly} {
		if at, err := time.ParseInLocation(layout, text, now.Location()); err == nil {
			return 0, at, nil
		}
	}
	return 0, time.Time{}, usagef("--since %q: want the number of an event, an age such as 10m, or a time such as \"2026-01-31 09:00\"", text)
}
