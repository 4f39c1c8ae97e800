package main

import (
	"io"

	"github.com/urfave/cli/v2"
)

func reloadCommand() *cli.Command {
	return &cli.Command{
		Name:        "reload",
		Usage:       "make the daemon read its file again, and print what changed",
		Description: "Like SIGHUP to the daemon, but with the result printed here. If anything in the file is wrong, nothing changes.",
		Flags:       []cli.Flag{dryRunFlag(), confirmFlag(), revisionFlag(), outputFlag()},
		Action: func(c *cli.Context) error {
			if err := showArgs(c, 0, 0); err != nil {
				return err
			}
			o, err := applyOptions(c)
			if err != nil {
				return err
			}
			result, err := client(c).Reload(c.Context, o)
			if err != nil {
				return err
			}
			return show(c, result, func(w io.Writer) error { return changeList(w, result) })
		},
	}
}
