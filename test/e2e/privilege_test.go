package e2e_test

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// documentedCapabilities reads the table of capabilities per command in docs/operations.md.
func documentedCapabilities(t *testing.T) map[string][]string {
	t.Helper()
	text, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	needs := map[string][]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| `xdpcast ([^`]+)` \\| ([A-Z_, ]+|none) \\|$").FindAllStringSubmatch(string(text), -1) {
		needs[row[1]] = []string{}
		if row[2] != "none" {
			needs[row[1]] = strings.Split(row[2], ", ")
		}
	}
	return needs
}

// having makes commands and daemons run with only these of root's capabilities; undo ends that.
func (in *instance) having(capabilities []string) (undo func()) {
	in.t.Helper()
	bounds := "-all"
	for _, c := range capabilities {
		bounds += ",+" + strings.ToLower(c)
	}
	before := program
	program = in.script("having", "#!/bin/sh\nexec setpriv --bounding-set="+bounds+" --inh-caps=-all "+before+" \"$@\"\n")
	return func() { program = before }
}

// Commands work with exactly the capabilities listed for them, and are refused without any one of
// them, with its name.
func TestCapabilities(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	file := in.write("rules.yaml", "rules:\n  - {name: file, in: \"239.1.9.1:5000%in0\", out: [\"239.2.9.1:6000%out0\"]}\n")
	state := filepath.Join(in.dir, "state")
	in.mustCLI("load", "-i", "in0") // mounts the BPF file system, which requires CAP_SYS_ADMIN
	as := func(capabilities []string, args ...string) result {
		defer in.having(capabilities)()
		return in.cli(args...)
	}
	roots := func() { // pins belong to root, directories to the user
		if err := os.Chown(filepath.Join(in.pinDir, "config"), 0, 0); err != nil {
			t.Fatal(err)
		}
	}
	allRoots := func() {
		for _, dir := range []string{in.pinDir, in.runDir, state} {
			if err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error { return errors.Join(err, os.Lchown(path, 0, 0)) }); err != nil {
				t.Fatal(err)
			}
		}
	}
	runs := func(capabilities []string, args ...string) {
		defer in.having(capabilities)()
		in.start(args...)
		if code := in.running.stop(syscall.SIGTERM); code != 0 {
			t.Errorf("run %v with %v ended with code %d", args, capabilities, code)
		}
	}
	needs := documentedCapabilities(t)
	for _, tt := range []struct {
		command string
		args    []string
		before  func()
	}{
		{"load", []string{"load", "-i", "in0"}, nil},
		{"upgrade", []string{"upgrade"}, nil},
		{"unload -i IFACE", []string{"unload", "-i", "in0"}, func() { in.mustCLI("load", "-i", "in0") }},
		{"discover", []string{"discover", "-i", "in0", "--for", "100ms"}, nil},
		{"doctor", []string{"doctor", "--for", "100ms"}, nil},
		{"run", []string{"run", "-c", file}, nil},
		{"run --user USER", []string{"run", "-c", file, "--state-dir", state, "--user", "nobody"}, roots},
		{"prepare", []string{"prepare", "--state-dir", state, "--user", "nobody"}, roots},
		{"unload --all", []string{"unload", "--all"}, allRoots},
	} {
		all, known := needs[tt.command]
		if !known {
			t.Fatalf("docs/operations.md does not say what xdpcast %s needs", tt.command)
		}
		before := func() {
			if tt.before != nil {
				tt.before()
			}
		}
		before()
		if tt.args[0] == "run" {
			runs(all, tt.args[1:]...)
		} else if got := as(all, tt.args...); got.stderr != "" && !strings.Contains(got.stderr, "without CAP_NET_RAW the paths") || got.code != 0 && tt.command != "doctor" {
			t.Errorf("%s with %v: %s", tt.command, all, got)
		}
		for _, without := range all {
			before()
			rest := slices.DeleteFunc(slices.Clone(all), func(c string) bool { return c == without })
			got := as(rest, tt.args...)
			if !strings.Contains(got.stderr, "without CAP_"+without+" ") || got.code == 0 && tt.command != "doctor" {
				t.Errorf("%s without %s: %s", tt.command, without, got)
			}
		}
	}

	// Asking the daemon, or using sockets as any user may, needs no capability.
	in.start("-c", file)
	for _, args := range [][]string{
		{"rule", "add", "x", "--in", "239.1.9.2:5000%in0", "--out", "239.2.9.2:6000%out0"}, {"rule", "list"}, {"rule", "show", "x"}, {"rule", "export"}, {"rule", "del", "x"},
		{"group", "list"}, {"stats"}, {"status"}, {"health"}, {"events"}, {"explain", "239.1.9.1:5000%in0"}, {"reload"}, {"history"}, {"rollback", "--dry-run"},
		{"check", "-c", file}, {"gen", "--count", "1", "239.1.9.1:5000%in0"}, {"version"},
	} {
		if got := as(nil, args...); got.code != 0 {
			t.Errorf("xdpcast %v without capabilities: %s", args, got)
		}
	}
	in.running.stop(syscall.SIGTERM)
	if got := as(nil, "stats"); got.code != 0 {
		t.Errorf("xdpcast stats without capabilities and daemon: %s", got)
	}
}
