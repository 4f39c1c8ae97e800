package main

// The user that run works as.

import (
	"log/slog"
	"os"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/privilege"
)

func userFlags(required bool) []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "user", Required: required, Usage: "work as `USER`, with the capabilities that it needs and no others"},
		&cli.StringFlag{Name: "group", Usage: "and as `GROUP`", DefaultText: "the user's own"},
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
