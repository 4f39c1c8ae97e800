package main

import (
	"io"
	"strconv"

	"github.com/urfave/cli/v2"
)

func rollbackCommand() *cli.Command {
	return &cli.Command{
		Name:      "rollback",
		Usage:     "restore an earlier set of rules",
		ArgsUsage: "[N]",
		Description: "Restores the set of N changes ago, by default 1: the rules added here and those of the daemon's\n" +
			"file. It is a change itself, so a second \"rollback\" reverts it. The file is not modified: while it\n" +
			"contains the undone rules, restarts of the daemon keep the restored set; \"xdpcast reload\", or a file with\n" +
			"other rules, ends that. While a change waits for confirmation, \"rollback\" undoes that change.",
		Flags:  []cli.Flag{dryRunFlag(), confirmFlag(), revisionFlag(), outputFlag()},
		Action: rollback,
	}
}

func rollback(c *cli.Context) error {
	if err := showArgs(c, 0, 1); err != nil {
		return err
	}
	back := 1
	if text := c.Args().First(); text != "" {
		var err error
		if back, err = strconv.Atoi(text); err != nil || back < 1 {
			return usagef("rollback %q: want how many changes to go back, 1 or more", text)
		}
	}
	o, err := applyOptions(c)
	if err != nil {
		return err
	}
	result, err := client(c).Rollback(c.Context, back, o)
	if err != nil {
		return err
	}
	return show(c, result, func(w io.Writer) error { return changeList(w, result) })
}
