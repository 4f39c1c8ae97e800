package main

import (
	"slices"
	"strings"
	"testing"
)

func TestParseCPUs(t *testing.T) {
	for text, want := range map[string][]int{
		"": nil, "0": {0}, "2,4-7": {2, 4, 5, 6, 7}, "1,0": {1, 0}, "3-3": {3}, "0,0": {0, 0},
	} {
		if got, err := parseCPUs(text); err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %v, %v, want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"x", ",", "1,", "-1", "1-", "-", "3-1", "1-2-3", "99999", "0x1", " 1", "0-65535,0"} {
		if got, err := parseCPUs(text); err == nil {
			t.Errorf("%q: %v, want an error", text, got)
		}
	}
}

// Settings that cannot be are wrong usage, by the flag's name, before anything is done.
func TestAFXDPFlags(t *testing.T) {
	for flags, want := range map[string]string{
		"--afxdp-cpus 0-x":                                    `--afxdp-cpus "0-x": "0-x": want numbers of CPUs and ranges, such as 2,4-7`,
		"--afxdp-cpus 65535":                                  "--afxdp-cpus 65535: want numbers of CPUs that the process may use",
		"--afxdp-frames 0":                                    "--afxdp-frames 0: want 6144 to 524288",
		"--afxdp-frames -5":                                   "--afxdp-frames -5: want 6144 to 524288",
		"--afxdp-frames 100":                                  "--afxdp-frames 100: want 6144 to 524288",
		"--afxdp-frames 1000000":                              "--afxdp-frames 1000000: want 6144 to 524288",
		"--afxdp-busy-poll 2s":                                "--afxdp-busy-poll 2s: want 0 to 1s",
		"--afxdp-busy-poll -1us":                              "--afxdp-busy-poll -1µs: want 0 to 1s",
		"--afxdp-prefer-busy-poll":                            "--afxdp-busy-poll 0s: want a duration",
		"--afxdp-busy-poll-budget 8":                          "--afxdp-busy-poll 0s: want a duration",
		"--afxdp-busy-poll 20us --afxdp-busy-poll-budget -1":  "--afxdp-busy-poll-budget -1: want 0 to 65535",
		"--afxdp-busy-poll 20us --afxdp-busy-poll-budget 1e9": "afxdp-busy-poll-budget",
	} {
		got := call("", append([]string{"run"}, strings.Fields(flags)...)...)
		if got.code != exitUsage || !strings.Contains(got.stderr, want) {
			t.Errorf("%s: exit %d, %q, want %q", flags, got.code, got.stderr, want)
		}
	}
}
