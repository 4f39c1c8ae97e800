package main

import (
	"fmt"
	"io"

	"github.com/urfave/cli/v2"
)

// confirmFlag is the flag of commands whose change can wait for confirmation.
func confirmFlag() cli.Flag {
	return &cli.StringFlag{Name: "confirm", Usage: "undo the change after `TIME` (1s to 24h, such as 2m) unless \"xdpcast confirm\" keeps it"}
}

func confirmCommand() *cli.Command {
	return &cli.Command{
		Name:  "confirm",
		Usage: "keep the unconfirmed change",
		Description: "\"rule apply\", \"reload\" and \"rollback\" with --confirm TIME make a change that is undone after that time unless it\n" +
			"is confirmed. \"xdpcast status\" shows an unconfirmed change.",
		Flags: []cli.Flag{outputFlag()},
		Action: func(c *cli.Context) error {
			if err := showArgs(c, 0, 0); err != nil {
				return err
			}
			change, err := client(c).Confirm(c.Context)
			if err != nil {
				return err
			}
			return show(c, change, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "confirmed: %s\n", printable(doneBy(change.What, change.UID)))
				return err
			})
		},
	}
}

func doneBy(what string, uid *uint32) string {
	if uid == nil {
		return what
	}
	return what + " by " + userName(uid)
}
