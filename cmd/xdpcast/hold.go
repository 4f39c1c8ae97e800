package main

import (
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/hold"
	"xdpcast/internal/lockfile"
	"xdpcast/internal/notify"
)

// maxHeld exceeds the number of sockets for 160,000 IPv4 groups.
const maxHeld = 8192

func holdCommand() *cli.Command {
	return &cli.Command{
		Name:      "hold",
		Usage:     "run a daemon, and keep its memberships and rings across restarts",
		ArgsUsage: "COMMAND [ARGUMENT...]",
		Description: "For supervisors that keep no file descriptors, such as runit, s6 and container engines: they run\n" +
			"\"xdpcast hold -- xdpcast run ...\", which starts the daemon, restarts it when it ends, and keeps\n" +
			"the sockets that hold its groups, so that none is left meanwhile, and the rings of the path fanout\n" +
			"with the packets in them. SIGTERM and SIGINT end both; other signals are passed on. A daemon that\n" +
			"gets SIGTERM itself is restarted without loss, as by \"xdpcast upgrade --exec\". A daemon that ends before it was ever ready ends it, too, with its\n" +
			"exit code.",
		Flags: []cli.Flag{
			&cli.IntFlag{Name: "max", Usage: "keep up to `N` descriptors; a socket holds 20 IPv4 groups", Value: maxHeld},
			&cli.BoolFlag{Name: "no-standby", Usage: "start no second daemon that waits to relay at once on the path fanout should the first be killed"},
			runDirFlag(),
		},
		Action: func(c *cli.Context) error {
			if err := nargs(c, 1, -1); err != nil {
				return err
			}
			if n := c.Int("max"); n < 1 || n > 1<<20 {
				return usagef("--max %d: want 1 to %d", n, 1<<20)
			}
			return runHold(c)
		},
	}
}

func runHold(c *cli.Context) error {
	log := slog.New(slog.NewTextHandler(c.App.ErrWriter, nil)).With("hold", os.Getpid())
	dir := c.String("run-dir")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make run directory: %w", err)
	}
	if err := lockfile.Private(dir); err != nil {
		return fmt.Errorf("run directory: %w", err)
	}
	outer, err := notify.Connect()
	if err != nil {
		log.Warn("service manager", "error", err)
	}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGUSR2)
	defer signal.Stop(signals)
	code, err := hold.Run(hold.Options{
		Command: c.Args().Slice(), Socket: filepath.Join(dir, fmt.Sprintf("hold-%d.sock", os.Getpid())), Max: c.Int("max"), Alone: c.Bool("no-standby"),
		Outer: outer, Log: log, Signals: signals,
	})
	if err != nil {
		return err
	}
	if code != exitDone {
		return cli.Exit("", code)
	}
	return outer.Close()
}
