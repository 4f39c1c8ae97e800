package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// machine describes the hardware and software behind the figures.
type machine struct {
	Kernel   string            `json:"kernel"`
	System   string            `json:"system"`
	CPU      string            `json:"cpu"`
	CPUs     int               `json:"cpus"`
	Versions map[string]string `json:"versions"`
}

// thisMachine describes this machine; unknown fields stay empty.
func thisMachine(ctx context.Context, o options) machine {
	m := machine{CPUs: runtime.NumCPU(), Versions: map[string]string{"go": runtime.Version()}}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:]) + " " + unix.ByteSliceToString(u.Machine[:])
	}
	m.System = strings.Trim(fieldOf("/etc/os-release", "PRETTY_NAME", "="), `"`)
	m.CPU = fieldOf("/proc/cpuinfo", "model name", ":")
	for name, cmd := range map[string][]string{
		"xdpcast": {o.program, "version"}, "smcroute": {"smcrouted", "-v"}, "nftables": {"nft", "--version"},
		"iproute2": {"tc", "-Version"}, "socat": {"socat", "-V"}, "clang": {"clang", "--version"},
	} {
		// Some print their version on stderr and exit with an error.
		out, _ := exec.CommandContext(ctx, cmd[0], cmd[1:]...).CombinedOutput()
		for line := range bytes.Lines(out) {
			text := strings.TrimSpace(string(line))
			if strings.ContainsAny(text, "0123456789") && !strings.Contains(text, "Copyright") {
				m.Versions[name] = text
				break
			}
		}
	}
	return m
}

// fieldOf returns the first "name separator value" in a file; empty if there is none.
func fieldOf(file, name, separator string) string {
	data, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(data)) {
		key, value, found := strings.Cut(line, separator)
		if found && strings.TrimSpace(key) == name {
			return strings.TrimSpace(value)
		}
	}
	return ""
}
