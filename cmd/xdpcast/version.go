package main

import "runtime/debug"

// version is set when a release is built: -ldflags "-X main.version=v1.2.3".
var version string

// buildVersion is the release, or else the module's version, with the commit
// that it was built from if the build knows it.
func buildVersion() string {
	v := version
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return orUnknown(v)
	}
	if v == "" {
		v = info.Main.Version
	}
	var revision, modified string
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			revision = s.Value[:min(12, len(s.Value))]
		case s.Key == "vcs.modified" && s.Value == "true":
			modified = ", modified"
		}
	}
	if revision == "" {
		return orUnknown(v)
	}
	return orUnknown(v) + " (commit " + revision + modified + ")"
}

func orUnknown(v string) string {
	if v == "" {
		return "unknown"
	}
	return v
}
