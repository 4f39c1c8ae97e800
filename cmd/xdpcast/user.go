package main

// The user that the daemon works as, and what it needs of root before.

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/privilege"
	"xdpcast/pkg/loader"
)

func userFlags(required bool) []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "user", Required: required, Usage: "work as `USER`, with the capabilities that it needs and no others"},
		&cli.StringFlag{Name: "group", Usage: "and as `GROUP`", DefaultText: "the user's own"},
	}
}

func prepareCommand() *cli.Command {
	return &cli.Command{
		Name:  "prepare",
		Usage: "make the directories of a daemon that is started as another user than root",
		Description: "Makes the pin directory, the run directory, the state directory and that of the socket, and gives them and what\n" +
			"they hold to the user, as \"run --user\" does: for service managers that start the daemon as that user, with\n" +
			"ambient capabilities. A BPF file system is mounted where none is. It is to be run by root before each start.",
		Flags: append(userFlags(true), append(pinFlags(), stateDirFlag())...),
		Action: func(c *cli.Context) error {
			if err := nargs(c, 0, 0); err != nil {
				return err
			}
			u, err := daemonUser(c)
			if err != nil {
				return err
			}
			return explainStart(preparePlaces(c, u))
		},
	}
}

// daemonUser is whom the daemon is to work as; nil when that is not said.
func daemonUser(c *cli.Context) (*privilege.User, error) {
	if !c.IsSet("user") {
		if c.IsSet("group") {
			return nil, usagef("--group without --user: want both")
		}
		return nil, nil
	}
	u, err := privilege.Lookup(c.String("user"), c.String("group"))
	if err != nil {
		return nil, usagef("--user: %w", err)
	}
	return &u, nil
}

// preparePlaces gives the daemon's directories to its user.
func preparePlaces(c *cli.Context, u *privilege.User) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("give directories to user %s: %w", u.Name, fs.ErrPermission)
	}
	opts, err := loaderOptions(c, nil).Absolute()
	if err != nil {
		return err
	}
	places := placesOf(c, opts)
	for _, p := range places { // before anything is made
		if err := privilege.Ours(p.dir, p.ours); err != nil {
			return fmt.Errorf("%s: %w", p.what, err)
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

// place is a directory of the daemon's files.
type place struct {
	what, dir string
	mode      fs.FileMode // when it is made
	names     []string    // of what the daemon has in it
}

// ours says whether a name is of a file of the daemon's, or of one beside it such as NAME.next.
func (p place) ours(name string) bool {
	for _, n := range p.names {
		if name == n || strings.HasPrefix(name, n+".") {
			return true
		}
	}
	return false
}

// placesOf are the directories of the daemon beside the pins, each once. A file that is new to one
// of them belongs in here.
func placesOf(c *cli.Context, opts loader.Options) (places []place) {
	kept := func(names ...string) []string {
		for i, name := range names {
			names[i] = filepath.Base(loader.RunFile(opts.RunDir, opts.PinDir, name))
		}
		return names
	}
	socket := c.String("socket")
	// One directory may be for all of it, and was perhaps before.
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

// dropPrivileges changes to the daemon's user and keeps only what it needs. Without one a daemon
// of root's stays as it is; any other user's passes its capabilities on to nobody.
func dropPrivileges(c *cli.Context, u *privilege.User, log *slog.Logger) error {
	if u == nil && os.Geteuid() == 0 {
		return nil
	}
	if u != nil && os.Geteuid() != u.UID {
		if err := preparePlaces(c, u); err != nil {
			return err
		}
	}
	s, err := privilege.Drop(u)
	if err != nil {
		return err
	}
	if s.Effective != 0 { // without any it will not come far
		log.Info("privileges", "uid", s.UIDs[0], "gid", s.GIDs[0], "capabilities", s.Effective, "no_new_privs", s.NoNewPrivs, "threads", s.Threads)
	}
	return nil
}

// withRootHint says what is needed where the kernel only says no.
func withRootHint(err error) error {
	if err == nil || !errors.Is(err, fs.ErrPermission) || os.Geteuid() == 0 {
		return err
	}
	if s, e := privilege.Read(); e == nil && s.Permitted != 0 {
		return fmt.Errorf("%w: it works as user %d: let that user do it, or run it as root", err, os.Geteuid())
	}
	return fmt.Errorf("%w%s", err, runAsRoot)
}

const runAsRoot = ": run it as root"
