package main

// The program as a whole: its commands, usage errors, arguments, exit codes.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/control"
)

// Exit codes.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
)

// run is the program: args[0] is its name. It returns the exit code.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	return runAt(ctx, time.Now, args, stdin, stdout, stderr)
}

// runAt is run with the clock for the displayed ages.
func runAt(ctx context.Context, now func() time.Time, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	app := newApp(now)
	app.Reader, app.Writer, app.ErrWriter = stdin, stdout, stderr
	if len(args) > 1 && args[len(args)-1] == completeFlag {
		complete(ctx, app, args[1:len(args)-1], stdout)
		return exitDone
	}
	return report(stderr, app.RunContext(ctx, flagsFirst(app, args)))
}

// newApp returns the program's commands. now is the clock for the displayed ages.
func newApp(now func() time.Time) *cli.App {
	app := &cli.App{
		Name:    "xdpcast",
		Usage:   "relay multicast streams in the kernel",
		Version: buildVersion(),
		Flags: []cli.Flag{&cli.StringFlag{
			Name: "socket", Usage: "`PATH` of the daemon's control socket", Value: control.DefaultSocket, EnvVars: []string{"XDPCAST_SOCKET"},
		}},
		Commands: []*cli.Command{
			runCommand(), prepareCommand(), holdCommand(), loadCommand(), unloadCommand(), upgradeCommand(),
			ruleCommand(now), groupCommand(now), statsCommand(now), healthCommand(now), statusCommand(now), eventsCommand(now), explainCommand(now), discoverCommand(now), doctorCommand(now), topCommand(now), tapCommand(), reloadCommand(),
			confirmCommand(), historyCommand(now), rollbackCommand(), checkCommand(), convertCommand(),
			genCommand(), recvCommand(), demoCommand(), versionCommand(),
		},
		Action:                    chooseCommand,
		OnUsageError:              onUsageError,
		ExitErrHandler:            func(*cli.Context, error) {}, // report prints the error
		DisableSliceFlagSeparator: true,                         // policies of an endpoint contain commas
	}
	prepare(app.Commands)
	return app
}

// prepare applies settings common to all commands.
func prepare(commands []*cli.Command) {
	for _, c := range commands {
		c.OnUsageError = onUsageError
		c.HideHelpCommand = true // otherwise a rule called "help" could not be named
		if len(c.Subcommands) > 0 {
			c.Action = chooseCommand
		}
		c.Action = namingNeeds(c.Action)
		prepare(c.Subcommands)
	}
}

// usageError is a wrong command line.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// usagef makes an error for a wrong command line: exit code 2, with a hint.
func usagef(format string, args ...any) error {
	return &usageError{fmt.Errorf(format, args...)}
}

func onUsageError(c *cli.Context, err error, _ bool) error {
	return usagef("%w; see \"%s --help\"", err, commandPath(c))
}

// commandPath is the command as the user called it: "xdpcast rule add".
func commandPath(c *cli.Context) string {
	var words []string
	for _, ctx := range c.Lineage() {
		if ctx.Command != nil && ctx.Command.Name != "" {
			words = append([]string{ctx.Command.Name}, words...)
		}
	}
	return strings.Join(words, " ")
}

// chooseCommand is the action of a command that only has subcommands.
func chooseCommand(c *cli.Context) error {
	var names []string
	for _, sub := range c.Command.Subcommands {
		if !sub.Hidden {
			names = append(names, sub.Name)
		}
	}
	choice := strings.Join(names, ", ")
	name := c.Args().First()
	isProgram := c.Command.Name == c.App.Name
	switch {
	case name != "" && isProgram:
		return usagef("unknown command %q: want one of %s", name, choice)
	case name != "":
		return usagef("%s: unknown command %q: want one of %s", commandPath(c), name, choice)
	case isProgram:
		return cli.ShowAppHelp(c)
	default:
		return usagef("%s: which? want one of %s", commandPath(c), choice)
	}
}

// nargs checks that there are min to max arguments; max < 0 is no limit.
func nargs(c *cli.Context, min, max int) error {
	n := c.NArg()
	switch {
	case n < min:
		return usagef("%s: %s missing; see \"%s --help\"", commandPath(c), c.Command.ArgsUsage, commandPath(c))
	case max >= 0 && n > max:
		return usagef("%s: unexpected argument %q; see \"%s --help\"", commandPath(c), c.Args().Get(max), commandPath(c))
	default:
		return nil
	}
}

// showArgs is nargs for a command that shows something: it also checks -o before the command runs.
func showArgs(c *cli.Context, min, max int) error {
	if err := nargs(c, min, max); err != nil {
		return err
	}
	_, err := wantJSON(c)
	return err
}

func client(c *cli.Context) *control.Client {
	daemon := control.NewClient(c.String("socket"))
	daemon.Slow = func(line string) { fmt.Fprintf(c.App.ErrWriter, "xdpcast: %s\n", printable(line)) }
	return daemon
}

// report writes an error to stderr, a line for each joined error, and returns the exit code.
func report(stderr io.Writer, err error) int {
	if err == nil {
		return exitDone
	}
	if text := err.Error(); text != "" {
		for line := range strings.SplitSeq(strings.TrimRight(text, "\n"), "\n") {
			fmt.Fprintf(stderr, "xdpcast: %s\n", printable(line))
		}
	}
	var usage *usageError
	var coder cli.ExitCoder
	switch {
	case errors.As(err, &usage), strings.HasPrefix(err.Error(), "Required flag"): // the latter is cli's own error
		return exitUsage
	case errors.As(err, &coder) && coder.ExitCode() > 0: // includes *exec.ExitError
		return coder.ExitCode()
	default:
		return exitFailed
	}
}
