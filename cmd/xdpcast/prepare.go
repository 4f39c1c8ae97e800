package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/privilege"
	"xdpcast/pkg/loader"
)

func prepareCommand() *cli.Command {
	return &cli.Command{
		Name:  "prepare",
		Usage: "create the directories of a daemon that is not started as root",
		Description: "Creates the pin directory, the run directory, the state directory and that of the socket, and chowns them and their\n" +
			"contents to the user, as \"run --user\" does: for service managers that start the daemon as that user, with\n" +
			"ambient capabilities. It mounts a BPF file system if there is none. Run it as root before each start.",
		Flags: append(userFlags(true), append(pinFlags(), stateDirFlag())...),
		Action: func(c *cli.Context) error {
			if err := nargs(c, 0, 0); err != nil {
				return err
			}
			u, err := daemonUser(c)
			if err != nil {
				return err
			}
			return explainStart(preparePlaces(c, u, loader.Locks{}))
		},
	}
}

// preparePlaces chowns the daemon's directories to its user. It closes the locks of them that this process holds, if any: they
// are duplicates.
func preparePlaces(c *cli.Context, u *privilege.User, held loader.Locks) error {
	if os.Geteuid() != 0 {
		return errors.Join(fmt.Errorf("give directories to user %s: %w", u.Name, fs.ErrPermission), held.Close())
	}
	opts, err := loaderOptions(c, nil).Absolute()
	if err != nil {
		return errors.Join(err, held.Close())
	}
	opts.Inherited = held
	places := placesOf(c, opts)
	for _, p := range places { // before creating anything
		if err := privilege.Ours(p.dir, p.ours); err != nil {
			return errors.Join(fmt.Errorf("%s: %w", p.what, err), held.Close())
		}
	}
	return loader.Prepare(opts, func(pinDir string) error {
		any := func(string) bool { return true }
		if err := privilege.Give(pinDir, 0o700, u.UID, u.GID, any); err != nil {
			return fmt.Errorf("pin directory: %w", err)
		}
		for _, p := range places {
			if err := privilege.Give(p.dir, p.mode, u.UID, u.GID, p.ours); err != nil {
				return fmt.Errorf("%s: %w", p.what, err)
			}
		}
		return nil
	})
}

// place is a directory of daemon files.
type place struct {
	what, dir string
	mode      fs.FileMode // if it is created
	names     []string    // of the daemon's files in it
}

// ours says whether a name is that of a daemon file, or of one derived from it such as NAME.next.
func (p place) ours(name string) bool {
	for _, n := range p.names {
		if name == n || strings.HasPrefix(name, n+".") {
			return true
		}
	}
	return strings.HasPrefix(name, "hold-") && strings.HasSuffix(name, ".sock") // of xdpcast hold
}

// placesOf are the daemon's directories other than the pins, without duplicates. Add any new file
// here.
func placesOf(c *cli.Context, opts loader.Options) (places []place) {
	kept := func(names ...string) []string {
		for i, name := range names {
			names[i] = filepath.Base(loader.RunFile(opts.RunDir, opts.PinDir, name))
		}
		return names
	}
	socket := c.String("socket")
	// One directory may serve all purposes, now or earlier.
	names := append(kept("api-rules.yaml", "events.ndjson", "offloads.json", "attached.json", "changes.json", "sets"), filepath.Base(loader.LockPath(opts)), filepath.Base(socket))
	for _, p := range []place{
		{"run directory", opts.RunDir, 0o755, names},
		{"state directory", stateDir(c), 0o700, names},
		{"directory of the socket", filepath.Dir(socket), 0o755, names},
	} {
		if abs, err := filepath.Abs(p.dir); err == nil {
			p.dir = abs
		}
		if !slices.ContainsFunc(places, func(o place) bool { return o.dir == p.dir }) {
			places = append(places, p)
		}
	}
	return places
}
