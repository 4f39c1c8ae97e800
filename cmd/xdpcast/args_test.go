package main

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestFlagsFirst(t *testing.T) {
	for in, want := range map[string]string{
		"":                                  "",
		"status":                            "status",
		"status -o json":                    "status -o json",
		"rule add a --in I --out O --out P": "rule add --in I --out O --out P -- a",
		"rule add --in I a --out=O":         "rule add --in I --out=O -- a",
		"rule --socket S del a b":           "--socket S rule del -- a b",
		"rule del a --socket S b":           "--socket S rule del -- a b",
		"--socket S rule del a":             "--socket S rule del -- a",
		"rule del a -- --socket S":          "rule del -- a --socket S",
		"rule apply - --dry-run":            "rule apply --dry-run -- -",
		"rule apply --dry-run f":            "rule apply --dry-run -- f",
		"rule add a --in":                   "rule add --in",
		"rule add a --in -- b":              "rule add --in -- -- a b",
		"rule add a --nope x":               "rule add --nope -- a x",
		"rule add a --help":                 "rule add --help",
		"stats a -w":                        "stats -w -- a",
		"rule --socket S nope --x":          "--socket S rule nope --x",
		"nope --in x":                       "nope --in x",
		"rule nope --in x":                  "rule nope --in x",
		"--nope rule list":                  "--nope rule list",
		"--socket":                          "--socket",
	} {
		got := flagsFirst(newApp(time.Now), append([]string{"xdpcast"}, strings.Fields(in)...))
		if diff := cmp.Diff(append([]string{"xdpcast"}, strings.Fields(want)...), got); diff != "" {
			t.Errorf("%q (-want +got):\n%s", in, diff)
		}
	}
}

// No argument is lost or made up, save "--", unless the line asks for help or
// lacks a flag's value.
func FuzzFlagsFirst(f *testing.F) {
	f.Add("rule add a --in I --out O")
	f.Add("--socket rule del -- -x -")
	f.Fuzz(func(t *testing.T, line string) {
		in := strings.Split(line, " ")
		got := flagsFirst(newApp(time.Now), in)
		without := func(args []string) []string {
			args = slices.DeleteFunc(slices.Clone(args), func(a string) bool { return a == "--" })
			slices.Sort(args)
			return args
		}
		for _, a := range without(got) {
			if !slices.Contains(in, a) {
				t.Fatalf("%q became %q", in, got)
			}
		}
		help := slices.ContainsFunc(in, func(a string) bool { return strings.Contains(a, "h") })
		if diff := cmp.Diff(without(in), without(got)); diff != "" && !help && !isFlag(in[len(in)-1]) {
			t.Fatalf("%q (-want +got):\n%s", in, diff)
		}
	})
}
