package main

import (
	"slices"
	"strings"
	"testing"
)

func TestComplete(t *testing.T) {
	daemon(t, &backend{})
	for _, tt := range []struct {
		words string // a last word that begins with a dash is being typed
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
		{"no-such-command", nil, []string{"run"}},
	} {
		got := call("", append(strings.Fields(tt.words), completeFlag)...)
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
