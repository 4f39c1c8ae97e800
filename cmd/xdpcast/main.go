// Command xdpcast relays multicast streams in the kernel.
//
// Each command is in a file of its name, with what only it needs in run_*.go and the
// like; load.go has unload and upgrade, too. What commands share:
//
//	app.go       the program as a whole: commands, usage errors, exit codes
//	args.go      flags anywhere on the command line
//	flags.go     flags that several commands have, and how values are read
//	output.go    -o, tables, texts of counts, times and states
//	kernel.go    what the pinned maps say while no daemon runs
//	complete.go  completion for shells
//
// The demonstration itself is package internal/demo.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	os.Exit(run(ctx, os.Args, os.Stdin, os.Stdout, os.Stderr))
}
