package main

// The user of the daemon.

import (
	"log/slog"
	"os"

	"github.com/urfave/cli/v2"
	"kernel.org/pub/linux/libs/security/libcap/cap"

	"xdpcast/internal/forward"
	"xdpcast/internal/privilege"
)

func userFlags(required bool) []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "user", Required: required, Usage: "run as `USER`, with only the required capabilities"},
		&cli.StringFlag{Name: "group", Usage: "and as `GROUP`", DefaultText: "the user's own"},
	}
}

// daemonUser is the user that the daemon should switch to; nil if not given.
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

// dropPrivileges switches to the daemon's user and keeps only the required capabilities. Without a
// user a daemon run as root stays as it is; any other user's does not pass its capabilities on.
func dropPrivileges(c *cli.Context, u *privilege.User, log *slog.Logger) error {
	if u == nil && os.Geteuid() == 0 {
		return nil
	}
	if u != nil && os.Geteuid() != u.UID {
		if err := preparePlaces(c, u); err != nil {
			return err
		}
	}
	var also []cap.Value
	priority, boost, err := workerPriority(c)
	switch {
	case err != nil:
		return err
	case priority > 0:
		also = append(also, cap.SYS_NICE)
	case boost && u != nil:
		// Instead of a capability. Without the limit workers have no priority, which the relay says.
		_ = forward.AllowBoost()
	}
	s, err := privilege.Drop(u, also...)
	if err != nil {
		return err
	}
	if s.Effective != 0 { // without any it cannot work
		log.Info("privileges", "uid", s.UIDs[0], "gid", s.GIDs[0], "capabilities", s.Effective, "no_new_privs", s.NoNewPrivs, "threads", s.Threads)
	}
	return nil
}
