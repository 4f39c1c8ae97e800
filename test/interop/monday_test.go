//go:build interop

package interop

import (
	"encoding/base64"
	"fmt"
	"html"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/chromedp/chromedp"

	"xdpcast/internal/labtest"
)

// TestMonday: with 1,000 streams, some in trouble, one screen shows a person who starts at nine what needs attention:
// the page in a browser, and top in a terminal. The docs show both screens, and how to get from them to the causes;
// this test runs the same commands.
func TestMonday(t *testing.T) {
	t.Parallel() // waits for rates and commands
	ctx := labtest.Context(t)
	n := newNet(t)
	const streams = 1000
	// Rules 41 and 42 have an output that decrements a TTL of 1, 700 to 702 one on a missing interface, and the last
	// ten streams end during the night.
	var rules strings.Builder
	rules.WriteString("rules:\n")
	trouble := map[string]string{}
	for i := range streams {
		name, out := fmt.Sprintf("studio-%04d", i), fmt.Sprintf("239.2.%d.%d:6000%%out%d", i/256, i%256, i%2)
		switch {
		case i == 41, i == 42:
			out += ",ttl=dec"
			trouble[name] = "dropping"
		case i >= 700 && i < 703:
			out = strings.Replace(out, "out", "late", 1)
			trouble[name] = "pending"
		case i >= 990:
			trouble[name] = "silent"
		}
		fmt.Fprintf(&rules, "  - {name: %s, in: \"239.1.%d.%d:5000%%in0\", out: [%q]}\n", name, i/256, i%256, out)
	}
	relay, _ := startDaemon(ctx, t, n.relay, rules.String(), streams-3, "--listen", "127.0.0.1:9464")
	gen := func(groups, packets int, rate string) *process {
		return start(ctx, t, n.source, relay.program, "gen", "--ttl", "1", "--groups", fmt.Sprint(groups), "--rate", rate, "--count", fmt.Sprint(packets), "239.1.0.0:5000%eth0")
	}
	gen(streams, 3*streams, "3000").mustEnd(t)
	const rate = 10_000
	gen(990, 0, fmt.Sprint(rate)) // without an end

	address := forward(t, n.relay, "127.0.0.1:9464")
	labtest.Eventually(t, "the last minutes have rates", func() bool { return len(lastMinutes(t, address).Rates["studio-0000"]) > 3 })
	b := newBrowser(ctx, t)
	b.size(1280, 860, false)
	b.run("open", chromedp.Navigate("http://"+address+"/"))
	for _, want := range []string{"all 1000", "active 985", "dropping 2", "pending 3", "silent 10"} {
		b.until(want+" is shown", fmt.Sprintf(`[...document.querySelectorAll("main .tools button")].some(b => b.textContent === %q)`, want))
	}
	for name, state := range trouble {
		b.until(name+" is in view, "+state, fmt.Sprintf(`(() => {
			const row = document.querySelector('.row[data-rule="%s"]');
			return row && row.querySelector(".c-state").textContent === "%s" && row.dataset.at < %d && row.getBoundingClientRect().bottom <= innerHeight; })()`, name, state, len(trouble)))
	}
	b.shot("monday")

	term := newTerminal(t, n.relay, 80, 24, relay.program, append([]string{"--socket", relay.socket, "top", "--interval", "2s"}, relay.dirs[:2]...)...)
	var screen string
	labtest.Eventually(t, "top shows all that is in trouble", func() bool {
		screen = term("capture-pane", "-p")
		for name, state := range trouble {
			if !regexp.MustCompile(`(?m)^.` + name + " +" + state + " ").MatchString(screen) {
				return false
			}
		}
		return strings.Contains(screen, "1000 rules: 997 active, ") && strings.Contains(screen, ", 3 pending, 10 silent")
	})
	b.size(672, 436, true)
	b.run("show", chromedp.Navigate("data:text/html;base64,"+base64.StdEncoding.EncodeToString([]byte(terminalPage(term("capture-pane", "-p", "-e"))))))
	b.shot("top")

	run := func(want string, args ...string) {
		t.Helper()
		var out strings.Builder
		defer func() {
			if t.Failed() {
				t.Log(out.String())
			}
		}()
		// A sender on a busy machine may pause for longer than a command looks.
		labtest.Eventually(t, fmt.Sprintf("%v shows %q", args, want), func() bool {
			cmd := exec.CommandContext(ctx, relay.program, append([]string{"--socket", relay.socket}, args...)...)
			out.Reset()
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := n.relay.Start(cmd); err != nil {
				t.Fatal(err)
			}
			if err := cmd.Wait(); err != nil && !(args[0] == "doctor" && cmd.ProcessState.ExitCode() == 1) { // it has found a fault
				t.Fatalf("%v: %v", args, err)
			}
			return regexp.MustCompile(want).MatchString(out.String())
		})
	}
	run(`(?s)copies for 239\.2\.0\.41:6000%out1,ttl=dec were dropped, reason ttl.*cure: raise the sender's TTL.*packets end at the outputs: reason ttl`, "doctor", "studio-0041")
	run(`(?s)no packet matched in 2s: the last one did .* ago.*packets end before the host: nothing that the rule takes came in on in0`, "doctor", "studio-0990")
	// Its sender uses another group now.
	start(ctx, t, n.source, relay.program, "gen", "--rate", "40", "239.1.7.43:5000%eth0")
	run(`(?m)^in0 +- +10\.0\.0\.1 +239\.1\.7\.43 +5000 +\d+ .* unknown$`, "discover", "-i", "in0", "--for", "2s")
	run(`rule studio-0700: pending: interface late0 not found`, "events", "--since", "10m")
}

// newTerminal runs a program in a tmux terminal; the returned function runs tmux commands.
func newTerminal(t *testing.T, h hostStarter, width, height int, program string, args ...string) func(...string) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "tmux")
	tmux := func(args ...string) string {
		t.Helper()
		cmd := exec.Command("tmux", append([]string{"-S", socket, "-f", "/dev/null"}, args...)...)
		var out strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := h.Start(cmd); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Fatalf("tmux %v: %v\n%s", args, err, out.String())
		}
		return out.String()
	}
	tmux("new-session", "-d", "-x", fmt.Sprint(width), "-y", fmt.Sprint(height), "env TERM=screen-256color "+program+" "+strings.Join(args, " "))
	t.Cleanup(func() { tmux("kill-server") })
	return tmux
}

type hostStarter interface{ Start(*exec.Cmd) error }

// terminalPage renders a tmux screen as a page, with its colours.
func terminalPage(screen string) string {
	colours := []string{"#3b4252", "#ff8a80", "#6fcf8a", "#e9b44c", "#6db3e3", "#c792ea", "#7fdbca", "#e4e8ec"}
	var b strings.Builder
	b.WriteString(`<!doctype html><meta charset="utf-8"><style>body{margin:8px;background:#14181d}pre{margin:0;color:#e4e8ec;font:13.5px/17.4px "DejaVu Sans Mono",monospace}</style><pre>`)
	sgr := regexp.MustCompile(`\x1b\[([0-9;]*)m`)
	style := map[string]string{}
	for {
		at := sgr.FindStringSubmatchIndex(screen)
		text := screen
		if at != nil {
			text = screen[:at[0]]
		}
		var css strings.Builder
		if style["reverse"] != "" {
			css.WriteString("background:#e4e8ec;color:#14181d;")
		} else if style["colour"] != "" {
			css.WriteString("color:" + style["colour"] + ";")
		}
		css.WriteString(style["bold"] + style["faint"])
		fmt.Fprintf(&b, `<span style="%s">%s</span>`, css.String(), html.EscapeString(text))
		if at == nil {
			break
		}
		codes := strings.Split(screen[at[2]:at[3]], ";")
		for i := 0; i < len(codes); i++ {
			var n int
			_, _ = fmt.Sscan(codes[i], &n) // empty means 0
			switch {
			case n == 0:
				style = map[string]string{}
			case n == 1:
				style["bold"] = "font-weight:bold;"
			case n == 2:
				style["faint"] = "opacity:.65;"
			case n == 7:
				style["reverse"] = "yes"
			case n == 27:
				style["reverse"] = ""
			case n >= 30 && n < 38:
				style["colour"] = colours[n-30]
			case n >= 90 && n < 98:
				style["colour"] = colours[n-90]
			case n == 39:
				style["colour"] = ""
			}
		}
		screen = screen[at[1]:]
	}
	b.WriteString("</pre>")
	return b.String()
}
