package main

import (
	"fmt"
	"io"
	"os"

	"github.com/urfave/cli/v2"

	"xdpcast/pkg/rules"
)

func checkCommand() *cli.Command {
	return &cli.Command{
		Name:        "check",
		Usage:       "check a file of rules and say every error with its line",
		ArgsUsage:   "[FILE]",
		Description: "FILE is - for standard input. Nothing of the host is looked at: whether an interface exists is not an error here.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "config", Aliases: []string{"c"}, Usage: "`FILE` to check, as for run"},
		},
		Action: check,
	}
}

func check(c *cli.Context) error {
	if err := nargs(c, 0, 1); err != nil {
		return err
	}
	name := c.String("config")
	switch {
	case name != "" && c.NArg() > 0:
		return usagef("%s: both --config %q and %q: one file at a time", commandPath(c), name, c.Args().First())
	case name == "" && c.NArg() == 0:
		return usagef("%s: FILE missing; see \"%s --help\"", commandPath(c), commandPath(c))
	case name == "":
		name = c.Args().First()
	}
	list, err := readRules(c.App.Reader, name)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(c.App.Writer, "ok: %s\n", plural(len(list), "rule"))
	return err
}

// readRules reads, parses and validates a file of rules, "-" for stdin.
func readRules(stdin io.Reader, name string) ([]rules.Rule, error) {
	data, err := readRuleFile(stdin, name)
	if err != nil {
		return nil, err
	}
	return parseRules(name, data)
}

func parseRules(name string, data []byte) ([]rules.Rule, error) {
	if name == "-" {
		name = "stdin"
	}
	return rules.ParseFile(name, data)
}

// readRuleFile reads a file of rules, "-" for stdin.
func readRuleFile(stdin io.Reader, name string) ([]byte, error) {
	in := stdin
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	data, err := io.ReadAll(io.LimitReader(in, rules.MaxFileSize+1))
	switch {
	case err != nil:
		return nil, err
	case len(data) > rules.MaxFileSize:
		return nil, fmt.Errorf("%s: over %d bytes, which is more than a file of rules can have", name, rules.MaxFileSize)
	}
	return data, nil
}
