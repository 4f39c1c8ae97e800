package main

import (
	"fmt"
	"io"
	"runtime"
	"runtime/debug"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"xdpcast/bpf"
)

// version and commit are set when a release is built: -ldflags "-X main.version=1.2.3".
var version, commit string

// versionInfo is the output of "xdpcast version".
type versionInfo struct {
	Version string `json:"version"`
	Commit  string `json:"commit"`
	// Schema is the version of the pinned state that the program reads and writes.
	Schema uint32 `json:"schema"`
	Go     string `json:"go"`
	Arch   string `json:"arch"`
	// Kernel is the running kernel's version.
	Kernel string `json:"kernel"`
}

func versionCommand() *cli.Command {
	return &cli.Command{
		Name:  "version",
		Usage: "show the version, with the schema of the pinned state and the running kernel",
		Flags: []cli.Flag{outputFlag()},
		Action: func(c *cli.Context) error {
			if err := showArgs(c, 0, 0); err != nil {
				return err
			}
			v, rev := built()
			info := versionInfo{Version: v, Commit: rev, Schema: bpf.Schema, Go: runtime.Version(), Arch: runtime.GOARCH}
			var uts unix.Utsname
			if err := unix.Uname(&uts); err != nil {
				return fmt.Errorf("kernel version: %w", err)
			}
			info.Kernel = unix.ByteSliceToString(uts.Release[:])
			return show(c, info, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "xdpcast %s\ncommit  %s\nschema  %d\ngo      %s %s\nkernel  %s\n",
					info.Version, info.Commit, info.Schema, info.Go, info.Arch, info.Kernel)
				return err
			})
		},
	}
}

// buildVersion is the release, with its commit.
func buildVersion() string {
	v, rev := built()
	if rev == unknown {
		return v
	}
	return v + " (commit " + rev + ")"
}

const unknown = "unknown"

// built returns the release, or otherwise the module's version, and the commit, if known to the
// build.
func built() (v, rev string) {
	v, rev = version, commit
	if info, ok := debug.ReadBuildInfo(); ok {
		if v == "" {
			v = info.Main.Version
		}
		modified := ""
		for _, s := range info.Settings {
			switch {
			case s.Key == "vcs.revision" && rev == "":
				rev = s.Value[:min(12, len(s.Value))]
			case s.Key == "vcs.modified" && s.Value == "true":
				modified = ", modified"
			}
		}
		if rev != "" {
			rev += modified
		}
	}
	if v == "" {
		v = unknown
	}
	if rev == "" {
		rev = unknown
	}
	return v, rev
}
