package main

// The command line before the CLI library reads it.

import (
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// flagsFirst reorders a command line so that flags may appear anywhere: cli stops parsing flags at
// the first argument, but people write "rule add cam1 --in ... --out ...". Global flags may also
// follow the command. Arguments after "--" are unchanged.
func flagsFirst(app *cli.App, args []string) []string {
	if len(args) == 0 {
		return args
	}
	global, rest := takeFlags(args[1:], app.Flags)
	var path []string // the commands, with flags in between
	var flags []cli.Flag
	commands := app.Commands
	for len(rest) > 0 && len(commands) > 0 {
		i := slices.IndexFunc(commands, func(c *cli.Command) bool { return c.HasName(rest[0]) })
		if i < 0 {
			break
		}
		path = append(path, rest[0])
		flags, commands = commands[i].Flags, commands[i].Subcommands
		rest = rest[1:]
		if len(commands) > 0 {
			var between []string
			between, rest = takeFlags(rest, slices.Concat(flags, app.Flags))
			own, outer, _ := split(between, flags, app.Flags)
			path, global = append(path, own...), append(global, outer...)
		}
	}
	if len(path) == 0 || len(commands) > 0 { // no command, or an unknown one: cli reports it
		return slices.Concat(args[:1], global, path, rest)
	}
	own, outer, positional := split(rest, flags, app.Flags)
	out := slices.Concat(args[:1], global, outer, path, own)
	if len(positional) > 0 {
		out = append(append(out, "--"), positional...)
	}
	return out
}

// takeFlags splits args into the leading flags and the rest.
func takeFlags(args []string, flags []cli.Flag) (taken, rest []string) {
	for len(args) > 0 && isFlag(args[0]) && args[0] != "--" {
		n := min(flagLen(args[0], flags), len(args))
		taken = append(taken, args[:n]...)
		args = args[n:]
	}
	return taken, args
}

// split separates a command's own flags, global flags and positional arguments. An unknown flag
// counts as the command's own, which then refuses it.
func split(args []string, flags, outerFlags []cli.Flag) (own, outer, positional []string) {
	for len(args) > 0 {
		switch {
		case args[0] == "--":
			return own, outer, append(positional, args[1:]...)
		case !isFlag(args[0]):
			positional = append(positional, args[0])
			args = args[1:]
			continue
		}
		if findFlag(args[0], []cli.Flag{cli.HelpFlag}) != nil {
			return args[:1], outer, nil // nothing else, or cli looks for help on an argument
		}
		n := flagLen(args[0], slices.Concat(flags, outerFlags))
		if n > len(args) {
			return append(own, args...), outer, nil // without "--" and the rest, so that cli sees what is missing
		}
		if findFlag(args[0], flags) == nil && findFlag(args[0], outerFlags) != nil {
			outer = append(outer, args[:n]...)
		} else {
			own = append(own, args[:n]...)
		}
		args = args[n:]
	}
	return own, outer, positional
}

// isFlag is true for what package flag parses as a flag; "-" is a file.
func isFlag(arg string) bool { return len(arg) > 1 && arg[0] == '-' }

// flagLen is the number of arguments of the flag: 2 with a separate value.
func flagLen(arg string, flags []cli.Flag) int {
	doc, ok := findFlag(arg, flags).(cli.DocGenerationFlag)
	if ok && doc.TakesValue() && !strings.Contains(arg, "=") {
		return 2
	}
	return 1
}

// findFlag returns the first of flags named by arg, nil if none is.
func findFlag(arg string, flags []cli.Flag) cli.Flag {
	name, _, _ := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(arg, "-"), "-"), "=")
	for _, f := range flags {
		if slices.Contains(f.Names(), name) {
			return f
		}
	}
	return nil
}
