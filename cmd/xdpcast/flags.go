package main

// Flags common to several commands, and parsing of flag values.

import (
	"fmt"
	"log/slog"
	"net/netip"
	"strconv"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/control"
	"xdpcast/pkg/loader"
)

// pinFlags set the location of the state that outlives a process.
func pinFlags() []cli.Flag {
	return []cli.Flag{pinDirFlag(), runDirFlag()}
}

func runDirFlag() cli.Flag {
	return &cli.StringFlag{
		Name: "run-dir", Usage: "`DIR` of the lock file and of rules added through the API", Value: loader.DefaultRunDir, EnvVars: []string{"XDPCAST_RUN_DIR"},
	}
}

// defaultStateDir is the directory for state that outlives a reboot.
const defaultStateDir = "/var/lib/xdpcast"

// stateDirFlag also uses the directory that systemd passes to a unit with StateDirectory=.
func stateDirFlag() cli.Flag {
	return &cli.StringFlag{
		Name: "state-dir", Usage: "`DIR` of the sets of rules that \"xdpcast rollback\" restores", DefaultText: "the given --run-dir, or " + defaultStateDir,
		EnvVars: []string{"XDPCAST_STATE_DIR", "STATE_DIRECTORY"},
	}
}

func stateDir(c *cli.Context) string {
	switch {
	case c.String("state-dir") != "":
		return c.String("state-dir")
	case c.String("run-dir") != loader.DefaultRunDir:
		return c.String("run-dir")
	}
	return defaultStateDir
}

func pinDirFlag() cli.Flag {
	return &cli.StringFlag{
		Name: "pin-dir", Usage: "`DIR` of pinned programs and maps", Value: loader.DefaultPinDir, EnvVars: []string{"XDPCAST_PIN_DIR"},
	}
}

func modeFlag() cli.Flag {
	return &cli.StringFlag{Name: "mode", Usage: "how to attach XDP: native, generic, or auto (native, otherwise generic)", Value: "auto"}
}

func loaderOptions(c *cli.Context, log *slog.Logger) loader.Options {
	return loader.Options{
		PinDir: c.String("pin-dir"), RunDir: c.String("run-dir"), Logger: log,
		MaxRules: uint32(c.Uint("max-rules")), MaxOutputs: uint32(c.Uint("max-outputs")),
	}
}

// dryRunFlag is the flag of commands that change a set of rules.
func dryRunFlag() cli.Flag {
	return &cli.BoolFlag{Name: "dry-run", Usage: "only print what would change"}
}

// revisionFlag is the flag of commands that change several rules at once.
func revisionFlag() cli.Flag {
	return &cli.StringFlag{Name: "revision", Usage: "fail if the daemon's rules are not those of `REVISION` any more (\"revision\" of \"--dry-run -o json\" and of \"status -o json\")"}
}

// shownChanges is the number of changes listed for users: enough for any change made by hand, but
// listing must not slow down a large set.
const shownChanges = 1000

// applyOptions requests all changes for JSON output and for dry runs.
func applyOptions(c *cli.Context) (o control.ApplyOptions, err error) {
	o = control.ApplyOptions{DryRun: c.Bool("dry-run"), MaxChanges: shownChanges}
	if o.DryRun || c.String("output") == "json" {
		o.MaxChanges = 0
	}
	if err := parseFlag(c, "confirm", &o.Confirm, control.ParseConfirm); err != nil {
		return o, err
	}
	o.Revision = c.String("revision")
	if o.DryRun && o.Confirm > 0 {
		return o, usagef("--dry-run and --confirm together: a dry run has nothing to confirm")
	}
	return o, nil
}

// parseFlag parses the value of a flag if it was given.
func parseFlag[T any](c *cli.Context, name string, value *T, parse func(string) (T, error)) error {
	if !c.IsSet(name) {
		return nil
	}
	v, err := parse(c.String(name))
	if err != nil {
		return usagef("--%s: %w", name, err)
	}
	*value = v
	return nil
}

// notZero refuses a zero value, which package traffic interprets as its default.
func notZero(c *cli.Context, names ...string) error {
	for _, name := range names {
		if c.IsSet(name) && c.Int(name) == 0 {
			return usagef("--%s 0: must be 1 or more", name)
		}
	}
	return nil
}

func parseTTL(s string) (uint8, error) {
	n, err := strconv.ParseUint(s, 10, 8)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("ttl %q: must be 1 to 255", s)
	}
	return uint8(n), nil
}

func parseAddress(s string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(s)
	if err != nil || addr.Zone() != "" || addr.Is4In6() || addr.IsUnspecified() || addr.IsMulticast() {
		return netip.Addr{}, fmt.Errorf("address %q: must be a unicast IPv4 or IPv6 address", s)
	}
	return addr, nil
}
