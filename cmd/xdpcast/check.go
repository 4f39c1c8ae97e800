package main

import (
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/rulefile"
	"xdpcast/pkg/rules"
)

func checkCommand() *cli.Command {
	return &cli.Command{
		Name:        "check",
		Usage:       "check a rule file and report every error with its line",
		ArgsUsage:   "[FILE]",
		Description: "FILE is - for standard input. The host is not examined: a missing interface is not an error here.",
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
	config, err := readConfig(c.App.Reader, name)
	if err != nil {
		return err
	}
	routes := ""
	if config.Mroute != nil {
		routes = ", and multicast routes of the kernel"
	}
	_, err = fmt.Fprintf(c.App.Writer, "ok: %s%s\n", plural(len(config.Rules), "rule"), routes)
	return err
}

// readConfig reads, parses and validates a file for run, "-" for stdin.
func readConfig(stdin io.Reader, name string) (rules.Config, error) {
	data, err := readRuleFile(stdin, name)
	switch {
	case err != nil:
		return rules.Config{}, err
	case name == "-":
		return rules.ParseConfig("stdin", data, nil)
	}
	return rulefile.Parse(name, data)
}

// parseRules parses a rule file and its includes.
func parseRules(name string, data []byte) ([]rules.Rule, error) {
	if name == "-" {
		return rules.ParseFile("stdin", data)
	}
	return rulefile.ParseRules(name, data)
}

// readRuleFile reads a rule file, "-" for stdin.
func readRuleFile(stdin io.Reader, name string) ([]byte, error) {
	if name != "-" {
		return rulefile.ReadFile(name)
	}
	data, err := io.ReadAll(io.LimitReader(stdin, rules.MaxFileSize+1))
	switch {
	case err != nil:
		return nil, err
	case len(data) > rules.MaxFileSize:
		return nil, fmt.Errorf("%s: over %d bytes, which is more than a file of rules can have", name, rules.MaxFileSize)
	}
	return data, nil
}
