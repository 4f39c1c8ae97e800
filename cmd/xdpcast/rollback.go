package main

import (
	"io"
	"strconv"

	"github.com/urfave/cli/v2"
)

func rollbackCommand() *cli.Command {
	return &cli.Command{
		Name:      "rollback",
		Usage:     "bring an earlier set of rules back",
		ArgsUsage: "[N]",
		Description: "Brings back the set of N changes ago, 1 unless it is given: the rules that were added here and those of the daemon's\n" +
			"file alike. It is a change itself, so that a second \"rollback\" takes it back. The file is not touched: while it\n" +
			"holds what was undone, restarts of the daemon keep to the set that was brought back; \"xdpcast reload\", or a file with\n" +
			"other rules, ends that. While a change waits for confirmation, \"rollback\" undoes that one.",
		Flags:  []cli.Flag{dryRunFlag(), confirmFlag(), outputFlag()},
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
