//go:build interop

package interop

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/chromedp/chromedp"

	"xdpcast/internal/labtest"
)

// facts are the terms of a rule's page and what stands next to them.
func facts(b *browser) map[string]string {
	b.t.Helper()
	return eval[map[string]string](b, `Object.fromEntries([...document.querySelectorAll("dl.facts dt")].map(d => [d.textContent, d.nextElementSibling.textContent]))`)
}

// numberBefore returns the number before a word, -1 if there is none.
func numberBefore(text, word string) int {
	found := regexp.MustCompile(`(\d+) ` + regexp.QuoteMeta(word)).FindStringSubmatch(text)
	if found == nil {
		return -1
	}
	n, err := strconv.Atoi(found[1])
	if err != nil {
		return -1
	}
	return n
}

// columns reads the row that contains a key from a table of xdpcast whose header begins with a word, by the names of
// its columns. At least two spaces separate columns.
func columns(t *testing.T, text, first, key string) map[string]string {
	t.Helper()
	lines := strings.Split(text, "\n")
	header := slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, first) })
	if header < 0 {
		t.Fatalf("no line begins with %q:\n%s", first, text)
	}
	apart := regexp.MustCompile(`\s{2,}`)
	names := apart.Split(strings.TrimSpace(lines[header]), -1)
	for _, l := range lines[header+1:] {
		if !strings.Contains(l, key) {
			continue
		}
		cells := apart.Split(strings.TrimSpace(l), -1)
		row := map[string]string{}
		// Rows after a rule's first one leave the first cell empty: count from the end.
		for i := 1; i <= min(len(cells), len(names)); i++ {
			row[names[len(names)-i]] = cells[len(cells)-i]
		}
		return row
	}
	t.Fatalf("no line has %q:\n%s", key, text)
	return nil
}

// TestPageHealth: of a rule with two merged inputs the page, the API and xdpcast health tell the same numbers: what the
// worse input lost and the other one delivered, what both lost, and that an input is silent.
func TestPageHealth(t *testing.T) {
	ctx := labtest.Context(t)
	n := newNet(t)
	const good, bad = "239.10.1.1:5004%in0", "239.10.2.1:5004%in0"
	relay := startRelay(ctx, t, n.relay, fmt.Sprintf(`rules:
  - {name: cam, in: [%q, %q], merge: "rtp,skew=100ms", out: "239.20.20.20:6004%%out0"}
`, good, bad), "--listen", "127.0.0.1:9464")
	b := newBrowser(ctx, t)
	b.size(1280, 800, false)
	b.run("open", chromedp.Navigate("http://"+forward(t, n.relay, "127.0.0.1:9464")+"/#/rules/cam"))
	b.until("the rule's page is shown", `document.querySelector("dl.facts")`)

	onSource := func(legs ...string) string { return strings.ReplaceAll(strings.Join(legs, ","), "%in0", "%eth0") }
	gen := func(count int, loss string, legs ...string) {
		t.Helper()
		in(ctx, t, n.source, relay.program, "gen", "--rtp", "--rate", "1000", "--count", strconv.Itoa(count), "--legs", onSource(legs...), "--leg-loss", loss)
	}
	// alarms are the page's, of which each has a term of its own.
	alarms := func() []string {
		return eval[[]string](b, `[...document.querySelectorAll("dl.facts dt")].filter(d => d.textContent === "Alarm").map(d => d.nextElementSibling.textContent)`)
	}
	has := func(alarms []string, part string) bool {
		return slices.ContainsFunc(alarms, func(a string) bool { return strings.Contains(a, part) })
	}
	// agree waits until page, API and xdpcast health agree on all numbers, and some condition is met.
	agree := func(what string, met func(lost map[string]uint64, both uint64, alarms []string) bool) {
		t.Helper()
		var last string
		defer func() {
			if t.Failed() {
				t.Log(last)
			}
		}()
		labtest.Eventually(t, what, func() bool {
			rule := relay.rule(ctx, t, "cam")
			page := facts(b)
			text := output(ctx, t, relay.program, "--socket", relay.socket, "health", "cam")
			last = fmt.Sprintf("the API %+v\nthe page %v\nxdpcast health\n%s", rule, page, text)
			lost := map[string]uint64{}
			for _, i := range rule.Inputs {
				if i.Leg == nil || !strings.HasPrefix(page[i.Input], i.State) {
					return false
				}
				lost[i.Input] = i.Leg.Lost
				row := columns(t, text, "RULE", i.Input)
				for word, want := range map[string]struct {
					api    uint64
					column string
				}{
					"lost": {i.Leg.Lost, "LOST"}, "twice": {i.Leg.Doubled, "TWICE"}, "late": {i.Leg.Reordered, "LATE"}, "jumps": {i.Leg.Resets, "JUMPS"},
					"other senders": {i.Leg.Senders, "SENDERS"}, "copies differ": {i.Leg.Different, "DIFFER"}, "numbers": {i.Leg.Behind, "BEHIND"},
				} {
					shown := page[i.Input]
					if word == "copies differ" {
						shown = regexp.MustCompile(`(\d+) copies differ`).FindString(shown)
					}
					if numberBefore(shown, word) != int(want.api) || row[want.column] != strconv.FormatUint(want.api, 10) {
						return false
					}
				}
				if share := fmt.Sprintf("%.1f", 100*i.Leg.Share); !strings.Contains(page[i.Input], share+" %") || row["SHARE"] != share+"%" {
					return false
				}
			}
			stream := columns(t, text, "STREAM", "cam")
			for word, want := range map[string]struct {
				api    uint64
				column string
			}{"numbers": {rule.Stream.Expected, "NUMBERS"}, "lost on all inputs": {rule.Stream.Lost, "LOST ON ALL"}, "restarts": {rule.Stream.Restarts, "RESTARTS"}} {
				if numberBefore(page["Stream"], word) != int(want.api) || stream[want.column] != strconv.FormatUint(want.api, 10) {
					return false
				}
			}
			// How long an input is silent goes on.
			shown := alarms()
			for i, a := range shown {
				without := regexp.MustCompile(`\d+m?s$`).ReplaceAllString(a, "")
				if i >= len(rule.Stream.Alarms) || !strings.HasPrefix(rule.Stream.Alarms[i], without) || !strings.Contains(text, without) {
					return false
				}
			}
			return len(shown) == len(rule.Stream.Alarms) && met(lost, rule.Stream.Lost, shown)
		})
	}

	gen(500, "0%,10%", good, bad)
	agree("the worse input is seen, and nothing is lost", func(lost map[string]uint64, both uint64, alarms []string) bool {
		return lost[good] == 0 && lost[bad] > 20 && both == 0
	})
	gen(500, "20%", good, bad)
	agree("what both lost is seen", func(lost map[string]uint64, both uint64, alarms []string) bool {
		return lost[good] > 50 && both > 5 && has(alarms, "numbers came by no input")
	})
	// An input is silent only while another one receives: that one goes on until all have shown it.
	sender := start(ctx, t, n.source, relay.program, "gen", "--rtp", "--rate", "100", "--legs", onSource(good))
	const silent = "in[1] is silent"
	labtest.Eventually(t, "the silent input is seen", func() bool {
		return has(relay.rule(ctx, t, "cam").Stream.Alarms, silent) && has(alarms(), silent) &&
			strings.Contains(output(ctx, t, relay.program, "--socket", relay.socket, "health", "cam"), silent)
	})
	b.fits("a rule with several inputs")
	b.shot("health")
	sender.stop(syscall.SIGINT)
	agree("the input is not silent alone", func(_ map[string]uint64, _ uint64, alarms []string) bool {
		return !has(alarms, silent)
	})
	if len(b.complaints) > 0 {
		t.Errorf("the browser complains: %q", b.complaints)
	}
}
