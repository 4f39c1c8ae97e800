package main

import (
	"io"
	"os/user"
	"strconv"
	"time"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/control"
)

func historyCommand(now func() time.Time) *cli.Command {
	return &cli.Command{
		Name:  "history",
		Usage: "list the sets of rules that can be restored",
		Description: "The first line is the current set; BACK is the argument of \"xdpcast rollback\". WHO is the user of the command, - if\n" +
			"the daemon did it itself.",
		Flags: []cli.Flag{outputFlag()},
		Action: func(c *cli.Context) error {
			if err := showArgs(c, 0, 0); err != nil {
				return err
			}
			all, err := client(c).History(c.Context)
			if err != nil {
				return err
			}
			return show(c, all, func(w io.Writer) error { return historyTable(w, all, now()) })
		},
	}
}

func historyTable(w io.Writer, all []control.HistoryEntry, now time.Time) error {
	t := newTable(">BACK", "TIME", ">AGE", "WHO", ">RULES", ">ADDED", ">REMOVED", ">CHANGED", "WHAT")
	for _, e := range all {
		t.add(strconv.Itoa(e.Back), e.Time.In(now.Location()).Format(time.DateTime), age(now.Sub(e.Time)), userName(e.UID), strconv.Itoa(e.Rules),
			strconv.Itoa(e.Added), strconv.Itoa(e.Removed), strconv.Itoa(e.Changed), e.What)
	}
	return t.write(w)
}

// userName is the name of a user of this host, or the uid if there is no name.
func userName(uid *uint32) string {
	if uid == nil {
		return "-"
	}
	id := strconv.FormatUint(uint64(*uid), 10)
	if u, err := user.LookupId(id); err == nil {
		return u.Username
	}
	return id
}
