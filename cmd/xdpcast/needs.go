package main

// The capabilities that commands need, and errors that name a missing one.

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/urfave/cli/v2"
	"kernel.org/pub/linux/libs/security/libcap/cap"

	"xdpcast/internal/privilege"
)

// needsOf returns the capabilities that a command requires, other than those for file access; none
// for clients of the daemon. docs/operations.md has the same as a table.
func needsOf(c *cli.Context) []cap.Value {
	programs := []cap.Value{cap.NET_ADMIN, cap.BPF, cap.PERFMON}
	places := []cap.Value{cap.CHOWN, cap.DAC_OVERRIDE}
	switch c.Command.Name {
	case "run":
		if c.IsSet("user") && os.Geteuid() == 0 {
			return append(append(programs, places...), cap.SETUID, cap.SETGID)
		}
		return programs
	case "prepare":
		return places
	case "load", "upgrade":
		return programs
	case "unload":
		if !c.Bool("all") {
			return programs
		}
	case "discover":
		return []cap.Value{cap.NET_RAW}
	case "doctor":
		return append(programs, cap.NET_RAW, cap.SYS_PTRACE)
	}
	return nil
}

// namingNeeds adds the missing capabilities to the error of a command that lacked permission.
func namingNeeds(action cli.ActionFunc) cli.ActionFunc {
	return func(c *cli.Context) error {
		needs, user := needsOf(c), os.Geteuid()
		err := action(c)
		switch {
		case !errors.Is(err, fs.ErrPermission), strings.Contains(err.Error(), "without CAP_"), // named already
			strings.HasSuffix(err.Error(), runAsRoot), os.Geteuid() != user: // a daemon that changed its user lacks nothing
			return err
		}
		if missing := missingCapabilities(needs); missing != "" {
			return fmt.Errorf("%w: without %s (see capabilities(7))", err, missing)
		}
		return err
	}
}

// missingCapabilities names the capabilities that this process lacks; "" if it has all.
func missingCapabilities(needs []cap.Value) string {
	s, err := privilege.Read()
	if err != nil {
		return ""
	}
	var names []string
	for _, v := range needs {
		if !s.Permitted.Has(v) {
			names = append(names, strings.ToUpper(v.String()))
		}
	}
	return strings.Join(names, ", ")
}

// withRootHint adds what is needed when the kernel only refuses.
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
