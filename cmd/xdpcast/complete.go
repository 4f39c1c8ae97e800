package main

// Shell completion: not a command, but a flag at the end of any command line.

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/control"
)

// completeFlag ends a command line to be completed; the scripts in packaging/completion append it.
// It is the CLI library's flag, like the scripts.
const completeFlag = "--generate-bash-completion"

// completeTimeout is how long a shell waits for the daemon's rule names.
const completeTimeout = time.Second

// takesRules are the commands whose arguments are rule names.
var takesRules = []string{"xdpcast rule show", "xdpcast rule del", "xdpcast stats", "xdpcast health", "xdpcast explain", "xdpcast doctor", "xdpcast tap"}

// complete writes the possible continuations of a command line, one a line: words are those after
// the program's name; the last one is incomplete if it begins with a dash, and empty if another word than a
// flag is to be completed: it may be the value of a flag.
func complete(ctx context.Context, app *cli.App, words []string, out io.Writer) {
	path, flags, commands := app.Name, app.Flags, app.Commands
	typing := "" // an incomplete flag
	if n := len(words); n > 0 && strings.HasPrefix(words[n-1], "-") {
		words, typing = words[:n-1], words[n-1]
	}
	before := "" // the word before another one than a flag
	if n := len(words); n > 0 && words[n-1] == "" {
		if words = words[:n-1]; len(words) > 0 {
			before = words[len(words)-1]
		}
	}
	socket := cmp.Or(os.Getenv("XDPCAST_SOCKET"), control.DefaultSocket)
	for len(commands) > 0 {
		var taken []string
		taken, words = takeFlags(words, slices.Concat(flags, app.Flags))
		if i := slices.Index(taken, "--socket"); i >= 0 && i+1 < len(taken) {
			socket = taken[i+1]
		}
		if len(words) == 0 {
			break
		}
		i := slices.IndexFunc(commands, func(c *cli.Command) bool { return c.HasName(words[0]) })
		if i < 0 {
			return // an unknown command has no completions
		}
		path += " " + commands[i].Name
		flags, commands, words = commands[i].Flags, commands[i].Subcommands, words[1:]
	}
	switch all := slices.Concat(flags, app.Flags); {
	case isFlag(before) && flagLen(before, all) > 1: // its value: the shell offers files
	case typing != "":
		writeFlagNames(out, all)
	case len(commands) > 0:
		for _, c := range commands {
			if !c.Hidden {
				fmt.Fprintln(out, c.Name)
			}
		}
	case slices.Contains(takesRules, path):
		ctx, cancel := context.WithTimeout(ctx, completeTimeout)
		defer cancel()
		rules, err := control.NewClient(socket).Rules(ctx)
		if err != nil {
			return // no daemon, no names; a shell cannot show the reason
		}
		for _, r := range rules {
			fmt.Fprintln(out, r.Name)
		}
	}
}

func writeFlagNames(out io.Writer, flags []cli.Flag) {
	for _, f := range flags {
		if visible, ok := f.(cli.VisibleFlag); ok && !visible.IsVisible() {
			continue
		}
		fmt.Fprintln(out, "--"+f.Names()[0])
	}
}
