// Command xdpcast relays multicast streams in the kernel.
//
// Each command is in a file of its name, with parts specific to it in run_*.go and the like;
// load.go also has unload and upgrade as they share its code. Shared by all:
//
//	app.go       the program as a whole: commands, usage errors, exit codes
//	args.go      flags anywhere on the command line
//	flags.go     flags common to several commands, and parsing of values
//	output.go    -o, tables, texts of counts, times and states
//	needs.go     the capabilities that commands need, and errors that name missing ones
//	kernel.go    the contents of the pinned maps while no daemon runs
//	complete.go  completion for shells
//
// The demo itself is package internal/demo.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"xdpcast/internal/hold"
	"xdpcast/internal/notify"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == notify.StartStage {
		fmt.Fprintf(os.Stderr, "xdpcast: %v\n", notify.Stage(os.Args[2:]))
		os.Exit(127) // as in a shell
	}
	if len(os.Args) == 2 && os.Args[1] == hold.CopyStage {
		if hold.Copy(signal.Ignore) != nil {
			os.Exit(1)
		}
		return
	}
	ends := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if restartsOnTerm(os.Args) {
		ends = ends[:1]
	}
	ctx, stop := signal.NotifyContext(context.Background(), ends...)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	os.Exit(run(ctx, os.Args, os.Stdin, os.Stdout, os.Stderr))
}
