package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/control"
	"xdpcast/pkg/loader"
)

func loadCommand() *cli.Command {
	return &cli.Command{
		Name:  "load",
		Usage: "load and attach the programs, without a daemon",
		Description: "Attaches the relay program to the interfaces. It passes everything until there are rules:\n" +
			"a daemon started later takes over the loaded programs, without losing a packet.",
		Flags: append([]cli.Flag{
			&cli.StringSliceFlag{Name: "interface", Aliases: []string{"i"}, Usage: "attach to `IFACE` (repeatable)"},
			modeFlag(),
			&cli.UintFlag{Name: "max-rules", Usage: "room for `N` rules", Value: loader.DefaultMaxRules},
			&cli.UintFlag{Name: "max-outputs", Usage: "room for `N` outputs", Value: loader.DefaultMaxOutputs},
		}, pinFlags()...),
		Action: func(c *cli.Context) error {
			if err := nargs(c, 0, 0); err != nil {
				return err
			}
			mode, err := loader.ParseMode(c.String("mode"))
			if err != nil {
				return usagef("--mode: %w", err)
			}
			interfaces, err := namedInterfaces(c)
			if err != nil {
				return err
			}
			if len(interfaces) == 0 {
				return usagef("%s: --interface missing: name at least one", commandPath(c))
			}
			made := false
			err = withLoader(c, func(l *loader.Loader) error {
				err := attach(c, l, interfaces, mode)
				made = err != nil && !l.Adopted()
				return err
			})
			if made { // created without use
				err = errors.Join(err, loader.Unload(loaderOptions(c, nil)))
			}
			return err
		},
	}
}

// attach attaches to all of the interfaces, or, on an error, detaches those it had attached.
func attach(c *cli.Context, l *loader.Loader, interfaces []*net.Interface, mode loader.Mode) error {
	before := map[int]bool{}
	for _, a := range l.Attachments() {
		before[a.Index] = true
	}
	var done []loader.Attachment
	for _, i := range interfaces {
		a, err := l.Attach(i.Index, mode)
		if err != nil {
			for _, a := range done {
				if !before[a.Index] {
					err = errors.Join(err, l.Detach(a.Index))
				}
			}
			return err
		}
		done = append(done, a)
	}
	for _, a := range done {
		fmt.Fprintf(c.App.Writer, "%s: attached, %s mode, program id %d, link id %d\n", a.Interface, a.Mode, a.ProgramID, a.LinkID)
		if a.Fallback != nil {
			fmt.Fprintf(c.App.ErrWriter, "xdpcast: warning: %s: native mode was refused: %v\n", a.Interface, a.Fallback)
		}
	}
	return nil
}

func unloadCommand() *cli.Command {
	return &cli.Command{
		Name:  "unload",
		Usage: "detach from interfaces, or remove everything",
		Description: "With --all everything is removed: programs, maps, rules and counters. With --interface\n" +
			"only these interfaces are detached.",
		Flags: append([]cli.Flag{
			&cli.StringSliceFlag{Name: "interface", Aliases: []string{"i"}, Usage: "detach from `IFACE` (repeatable)"},
			&cli.BoolFlag{Name: "all", Usage: "detach everywhere and remove all pinned state"},
		}, pinFlags()...),
		Action: func(c *cli.Context) error {
			if err := nargs(c, 0, 0); err != nil {
				return err
			}
			interfaces, err := namedInterfaces(c)
			if err != nil {
				return err
			}
			switch all := c.Bool("all"); {
			case all == (len(interfaces) > 0):
				return usagef("%s: want either --interface or --all", commandPath(c))
			case all:
				return explainLocked(withRootHint(loader.Unload(loaderOptions(c, nil))))
			}
			if err := isLoaded(c); err != nil {
				return err
			}
			return withLoader(c, func(l *loader.Loader) error { return detach(l, interfaces) })
		},
	}
}

func detach(l *loader.Loader, interfaces []*net.Interface) error {
	attached := map[int]bool{}
	for _, a := range l.Attachments() {
		attached[a.Index] = true
	}
	for _, i := range interfaces {
		if !attached[i.Index] {
			return fmt.Errorf("interface %s: xdpcast is not attached to it", i.Name)
		}
	}
	var errs []error
	for _, i := range interfaces {
		errs = append(errs, l.Detach(i.Index))
	}
	return errors.Join(errs...)
}

func upgradeCommand() *cli.Command {
	return &cli.Command{
		Name:  "upgrade",
		Usage: "replace the programs in the kernel, or with --exec the running daemon, with this release's",
		Description: "Without a daemon: each program in the kernel is replaced atomically with this binary's, and no packet is\n" +
			"lost. A starting daemon does the same.\n" +
			"With --exec the running daemon starts the binary now at its path, with its own arguments, and hands over to it:\n" +
			"memberships, sockets and locks. It resumes if the new one ends, or is not ready in time. SIGUSR2\n" +
			"does the same. Under systemd, \"systemctl restart\" suffices.",
		Flags: append([]cli.Flag{
			&cli.BoolFlag{Name: "exec", Usage: "replace the running daemon"},
			&cli.StringFlag{Name: "timeout", Usage: "with --exec: keep the old daemon if the new one is not ready after `TIME` (1s to 50s)", DefaultText: "30s"},
		}, pinFlags()...),
		Action: func(c *cli.Context) error {
			if err := nargs(c, 0, 0); err != nil {
				return err
			}
			if c.Bool("exec") {
				return upgradeDaemon(c)
			}
			if c.IsSet("timeout") {
				return usagef("--timeout without --exec: nothing is waited for")
			}
			if err := isLoaded(c); err != nil {
				return err
			}
			// Opening upgrades whatever differs.
			return withLoader(c, func(l *loader.Loader) error {
				for _, a := range l.Attachments() {
					fmt.Fprintf(c.App.Writer, "%s: %s mode, program id %d, link id %d\n", a.Interface, a.Mode, a.ProgramID, a.LinkID)
				}
				return nil
			})
		},
	}
}

// upgradeDaemon makes the running daemon replace itself.
func upgradeDaemon(c *cli.Context) error {
	timeout := control.DefaultUpgradeTimeout
	if err := parseFlag(c, "timeout", &timeout, control.ParseUpgradeTimeout); err != nil {
		return err
	}
	daemon := client(c)
	daemon.Slow = nil // an upgrade may take long
	result, err := daemon.Upgrade(c.Context, timeout)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(c.App.Writer, "upgraded: process %d has taken over in %s\n", result.PID, result.Took)
	return err
}

// isLoaded prevents a command that changes loaded programs from loading them.
func isLoaded(c *cli.Context) error {
	r, err := loader.OpenReader(c.String("pin-dir"))
	if errors.Is(err, loader.ErrSchema) {
		return nil // whoever opens it migrates it, or says why not
	}
	if err != nil {
		return withRootHint(err)
	}
	return r.Close()
}

// withLoader runs fn while it owns the pinned state.
func withLoader(c *cli.Context, fn func(*loader.Loader) error) error {
	log := slog.New(slog.NewTextHandler(c.App.ErrWriter, &slog.HandlerOptions{Level: slog.LevelError}))
	l, err := loader.Open(loaderOptions(c, log))
	if err != nil {
		return explainLocked(withRootHint(err))
	}
	err = fn(l)
	for _, warning := range l.Warnings() {
		fmt.Fprintf(c.App.ErrWriter, "xdpcast: warning: %s\n", warning)
	}
	return errors.Join(err, l.Close())
}

// explainLocked adds what to do about a running daemon.
func explainLocked(err error) error {
	if errors.Is(err, loader.ErrLocked) {
		return fmt.Errorf("%w: stop it first (the kernel keeps relaying), or change its rules and interfaces instead", err)
	}
	return err
}

// namedInterfaces looks up the interfaces of --interface, all or none.
func namedInterfaces(c *cli.Context) ([]*net.Interface, error) {
	var all []*net.Interface
	var errs []error
	for _, name := range c.StringSlice("interface") {
		i, err := net.InterfaceByName(name)
		if err != nil {
			errs = append(errs, fmt.Errorf("interface %q not found: \"ip link\" lists the interfaces", name))
			continue
		}
		all = append(all, i)
	}
	return all, errors.Join(errs...)
}
