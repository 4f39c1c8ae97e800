package main

import (
	"strings"
	"testing"
	"time"

	"xdpcast/internal/live"
)

// Rows print as docs/benchmarks.md has them, and what the links had no room for is not hidden.
func TestMarkdown(t *testing.T) {
	r := result{
		name: "upgrade", sent: 1_234_567, rate: 20_000.7, seen: live.Seen{Packets: 1_234_000, Reordered: 6, Longest: 1530 * time.Millisecond}, leaves: 40,
		before: holding{descriptors: 90, resident: 44_040_000}, after: holding{descriptors: 83, resident: 45_700_000},
	}
	want := "| upgrade without a daemon | 20 | 1,234,567 | 20,000 | 567 | 0 | 6 | 1.5 s | 40 | 90 -> 83 | 44.0 -> 45.7 |\n"
	if got := r.markdown(20); got != want {
		t.Errorf("%q, want %q", got, want)
	}
	quiet := r
	r.notTaken, r.sinkFull, r.after.maps = 500, 60, 1
	want = "\nupgrade without a daemon: the ring to the relay had no room for 500 of them, that to the sink for 60.\n" +
		"upgrade without a daemon: 0 maps, 0 programs and 0 links before, 1 maps, 0 programs and 0 links after.\n" +
		"The daemon held 0 maps, 0 programs and 0 links, before and after, where nothing else is said.\n"
	if got := markdownFoot([]result{quiet, r}); got != want {
		t.Errorf("%q, want %q", got, want)
	}
	head := markdownHead(options{path: "fanout", rate: 350_572.9})
	title, table, _ := strings.Cut(head, "\n\n")
	if columns := strings.Count(table, "|"); title != "fanout path, 350,572 packets a second:" || columns != 2*strings.Count(r.markdown(20), "|") {
		t.Errorf("the head is %q", head)
	}
	for d, want := range map[time.Duration]string{0: "0.0 ms", 9_960 * time.Microsecond: "10.0 ms", 61 * time.Millisecond: "61 ms", 12 * time.Second: "12 s"} {
		if got := short(d); got != want {
			t.Errorf("%v is %q, want %q", d, got, want)
		}
	}
}
