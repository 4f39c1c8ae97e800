package main

// The user of the daemon.

import (
	"os"

	"github.com/urfave/cli/v2"
	"kernel.org/pub/linux/libs/security/libcap/cap"

	"xdpcast/internal/forward"
	"xdpcast/internal/privilege"
	"xdpcast/internal/relay"
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

// keptPriority makes sure that the workers' priority for a part of their time is one that the process may still use without
// privileges, or does without it.
func keptPriority(opts *relay.Options, u *privilege.User) {
	if !opts.Boost || u == nil && os.Geteuid() == 0 {
		return
	}
	// A limit instead of a capability.
	if err := forward.AllowBoost(); err != nil {
		opts.Boost = false
		opts.Logger.Warn("workers have no real-time priority", "cause", err)
	}
}

// dropPrivileges switches to the daemon's user and keeps only the required capabilities. Without a
// user a daemon run as root stays as it is; any other user's does not pass its capabilities on. The path fanout may
// relay already.
func dropPrivileges(c *cli.Context, u *privilege.User, early *relay.Early, opts relay.Options) error {
	if u == nil && os.Geteuid() == 0 {
		return nil
	}
	if u != nil && os.Geteuid() != u.UID {
		held, err := early.Locks()
		if err != nil {
			return err
		}
		if err := preparePlaces(c, u, held); err != nil {
			return err
		}
	}
	var also []cap.Value
	if opts.Priority > 0 {
		also = append(also, cap.SYS_NICE)
	}
	s, err := privilege.Drop(u, also...)
	if err != nil {
		return err
	}
	if s.Effective != 0 { // without any it cannot work
		opts.Logger.Info("privileges", "uid", s.UIDs[0], "gid", s.GIDs[0], "capabilities", s.Effective, "no_new_privs", s.NoNewPrivs, "threads", s.Threads)
	}
	return nil
}
