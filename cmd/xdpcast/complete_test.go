package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"xdpcast/internal/labtest"
)

func TestComplete(t *testing.T) {
	daemon(t, &backend{})
	for _, tt := range []struct {
		words string // a last word that begins with a dash is being typed; '' is an empty one
		want  []string
		not   []string
	}{
		{"", []string{"run", "rule", "stats", "version"}, []string{"--config"}},
		{"--", []string{"--socket"}, []string{"run"}},
		{"rule", []string{"add", "del", "show", "list", "export", "apply"}, []string{"run"}},
		{"rule add x -", []string{"--in", "--out", "--path"}, []string{"--config"}},
		{"run --", []string{"--config", "--interface", "--socket"}, nil},
		{"rule show", []string{"cam1", "feed-a"}, []string{"list"}},
		{"rule del", []string{"cam1", "feed-a"}, nil},
		{"stats", []string{"cam1", "feed-a"}, nil},
		{"doctor", []string{"cam1", "feed-a"}, nil},
		{"health", []string{"cam1", "feed-a"}, nil},
		{"stats --watch ''", []string{"cam1", "feed-a"}, []string{"--watch"}},
		{"stats --output ''", nil, []string{"cam1", "--watch"}},
		{"check -c ''", nil, []string{"--config"}},
		{"''", []string{"run", "rule"}, []string{"--socket"}},
		{"rule ''", []string{"add", "del"}, []string{"run"}},
		{"rule show ''", []string{"cam1"}, nil},
		{"--socket ''", nil, []string{"run"}},
		{"no-such-command ''", nil, []string{"run"}},
		{"no-such-command", nil, []string{"run"}},
	} {
		words := strings.Fields(tt.words)
		if n := len(words); n > 0 && words[n-1] == "''" {
			words[n-1] = ""
		}
		got := call("", append(words, completeFlag)...)
		if got.code != exitDone || got.stderr != "" {
			t.Errorf("%q: %+v", tt.words, got)
		}
		lines := strings.Fields(got.stdout)
		for _, want := range tt.want {
			if !slices.Contains(lines, want) {
				t.Errorf("%q offers %q, which lacks %s", tt.words, lines, want)
			}
		}
		for _, not := range tt.not {
			if slices.Contains(lines, not) {
				t.Errorf("%q offers %q, %s among them", tt.words, lines, not)
			}
		}
	}
}

// Without a daemon there are no names to offer, and a shell has no place for an error.
func TestCompleteWithoutDaemon(t *testing.T) {
	t.Setenv("XDPCAST_SOCKET", t.TempDir()+"/none.sock")
	if got := call("", "rule", "show", completeFlag); got.code != exitDone || got.stdout+got.stderr != "" {
		t.Errorf("%+v", got)
	}
}

// TestFishCompletion has the fish shell complete command lines with a program that knows one rule.
func TestFishCompletion(t *testing.T) {
	fish, err := exec.LookPath("fish")
	if err != nil {
		labtest.Lacking(t, "the shell fish")
	}
	dir := t.TempDir()
	script := `#!/bin/sh
case "$*" in
"rule show  ` + completeFlag + `") echo cam1; echo constructor ;;
"stats --w ` + completeFlag + `") echo --watch ;;
*" -c ` + completeFlag + `") echo --config ;;
esac
`
	for name, text := range map[string]string{"xdpcast": script, "rules.yaml": ""} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	file, err := filepath.Abs("../../packaging/completion/xdpcast.fish")
	if err != nil {
		t.Fatal(err)
	}
	for line, want := range map[string]string{"xdpcast rule show c": "cam1 constructor", "xdpcast stats --w": "--watch", "xdpcast check -c ru": "rules.yaml"} {
		cmd := exec.CommandContext(labtest.Context(t), fish, "--no-config", "-c", `source $argv[1]; complete -C $argv[2]`, file, line)
		cmd.Dir, cmd.Env = dir, []string{"PATH=" + dir + ":/usr/bin:/bin", "HOME=" + dir}
		out, err := cmd.CombinedOutput()
		if got := strings.Join(strings.Fields(string(out)), " "); err != nil || got != want {
			t.Errorf("%q: %q, %v; want %q", line, got, err, want)
		}
	}
}
