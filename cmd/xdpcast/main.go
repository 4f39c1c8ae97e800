// Command xdpcast relays multicast streams in the kernel.
//
// Each command is in a file of its name, with what only it needs in run_*.go and the
// like; load.go has unload and upgrade, too. What commands share:
//
//	app.go       the program as a whole: commands, usage errors, exit codes
//	args.go      flags anywhere on the command line
//	flags.go     flags that several commands have, and how values are read
//	output.go    -o, tables, texts of counts, times and states
//	needs.go     which capabilities commands need, and naming those that are missing
//	kernel.go    what the pinned maps say while no daemon runs
//	complete.go  completion for shells
//
// The demonstration itself is package internal/demo.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"xdpcast/internal/notify"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == notify.StartStage {
		fmt.Fprintf(os.Stderr, "xdpcast: %v\n", notify.Stage(os.Args[2:]))
		os.Exit(127) // as a shell has it
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	os.Exit(run(ctx, os.Args, os.Stdin, os.Stdout, os.Stderr))
}
