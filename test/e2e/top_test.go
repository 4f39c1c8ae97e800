package e2e_test

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"xdpcast/internal/control"
	"xdpcast/internal/labtest"
	"xdpcast/internal/traffic"
)

// terminal is a real terminal, in tmux, that runs the program.
type terminal struct {
	in     *instance
	tmux   string
	socket string
}

// newTerminal runs a command of the program in a terminal of the given columns and lines. env are
// variables, such as NO_COLOR=1.
func newTerminal(in *instance, width, height int, env string, args ...string) *terminal {
	t := in.t
	t.Helper()
	tmux, err := exec.LookPath("tmux")
	if err != nil {
		labtest.Lacking(t, "tmux is not installed: scripts/setup --test installs it")
	}
	term := &terminal{in, tmux, filepath.Join(in.dir, "tmux")}
	// The session lives as long as it has a window, even after the program has ended.
	term.run("-f", "/dev/null", "new-session", "-d", "-x", strconv.Itoa(width), "-y", strconv.Itoa(height),
		fmt.Sprintf("env TERM=screen-256color %s %s %s; echo it ended with code $?; exec sleep 600", env, program, strings.Join(args, " ")))
	t.Cleanup(func() { term.run("kill-server") })
	return term
}

func (term *terminal) run(args ...string) string {
	term.in.t.Helper()
	cmd := exec.Command(term.tmux, append([]string{"-S", term.socket}, args...)...)
	cmd.Env = term.in.env()
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	labtest.Do(term.in.t, term.in.host, cmd.Start)
	if err := cmd.Wait(); err != nil {
		term.in.t.Fatalf("tmux %v: %v\n%s", args, err, out.String())
	}
	return out.String()
}

func (term *terminal) press(keys ...string) { term.run(append([]string{"send-keys"}, keys...)...) }

// screen is the visible text.
func (term *terminal) screen() string { return term.run("capture-pane", "-p") }

// shows waits until the screen matches, and returns the submatches.
func (term *terminal) shows(pattern string) []string {
	term.in.t.Helper()
	want := regexp.MustCompile(pattern)
	var found []string
	eventually(term.in.t, "the screen shows "+pattern, func() string {
		screen := term.screen()
		if found = want.FindStringSubmatch(screen); found != nil {
			return ""
		}
		return "\n" + screen
	})
	return found
}

// matched is the number that stats reports for a rule.
func (in *instance) matched(name string) uint64 {
	in.t.Helper()
	var s control.Stats
	if err := json.Unmarshal([]byte(in.mustCLI("stats", name, "-o", "json")), &s); err != nil {
		in.t.Fatal(err)
	}
	return s.Rules[0].Matched.Packets
}

// TestTop: the live screen in a real terminal of 80x24, without colours, with real traffic: it
// shows the same as stats, also when the daemon ends.
func TestTop(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	in.start()
	in.add("cam1", "239.1.1.1:5000%in0", "239.2.1.1:6000%out0,ttl=dec", "239.2.1.2:6000%out1")
	in.add("late", "239.7.7.7:5000%eth7", "239.7.7.8:5000%out0")
	in.waitState("cam1", "active")
	const rate = 1_000
	stream := send(t, n.source, traffic.SendConfig{Target: target(t, streamTarget), TTL: 1, Rate: traffic.Rate{Value: rate}})
	stream.flows(5 * rate) // a rate starting from zero would show

	term := newTerminal(in, 80, 24, "NO_COLOR=1", "top", "--interval", "500ms")
	number := func(s string) uint64 {
		t.Helper()
		v, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	// One output drops all, the other sends all: TTL 1 is not decremented. A busy machine sends in
	// bursts: some screen has the rate.
	row := regexp.MustCompile(`(?m)^>cam1 +dropping kernel +(\d+) +\S+ [kM]b +(\d+) +(\d+) +(\d+) +0s *$`)
	eventually(t, "the screen shows the rates of a second", func() string {
		screen := term.screen()
		cells := row.FindStringSubmatch(screen)
		for i := 1; i <= 3 && cells != nil; i++ { // received, sent, dropped
			if got := number(cells[i]); got < rate/2 || got > 2*rate {
				cells = nil
			}
		}
		if cells == nil {
			return "\n" + screen
		}
		return ""
	})
	term.shows(`(?m)^ late +pending +- +0 +0 b +0 +0 +0 +- *$|(?m)^ late +pending +- +- +- +- +- +0 +- *$`)
	term.shows(`2 rules: 1 active, 1 dropping, 1 pending`)
	if colours := term.run("capture-pane", "-p", "-e"); regexp.MustCompile(`\x1b\[[0-9;]*3[0-7]m`).MatchString(colours) {
		t.Errorf("with NO_COLOR there are colours: %q", colours)
	}

	// A single rule: its counter is between those of stats before and after.
	term.press("Enter")
	term.shows(`(?m)^rule +cam1`)
	between := func() {
		t.Helper()
		before := in.matched("cam1")
		var shown uint64
		eventually(t, "the screen is newer", func() string {
			screen := term.screen()
			if m := regexp.MustCompile(`(?m)^matched +(\d+) packets`).FindStringSubmatch(screen); m != nil {
				shown = number(m[1])
			}
			if shown < before {
				return "\n" + screen
			}
			return ""
		})
		if after := in.matched("cam1"); shown > after {
			t.Errorf("the screen shows %d packets, stats %d and then %d", shown, before, after)
		}
	}
	between()
	term.shows(`(?m)^output 0 +ttl +\d`)
	term.shows(`joined, receiving`)

	term.press("2")
	term.shows(`(?m)^in0 +up +native +input +[1-9]`)

	// Without the daemon the kernel's counters continue.
	in.running.stop(syscall.SIGTERM)
	in.running = nil
	term.shows(`no daemon is running: counters of the kernel`)
	term.press("1")
	term.shows(`(?m)^>cam1 +dropping kernel +[1-9]\d* `)
	term.press("Enter")
	between()
	in.start()
	term.shows(`pid \d+, up`)
	term.press("3")
	term.shows(`a daemon runs, process \d+`)
	term.shows(`the daemon is gone; the kernel keeps relaying`)
	term.shows(`rule late: pending: interface eth7 not found`) // the daemon's own event

	// Another size, the filter, and the exit.
	term.run("resize-window", "-x", "160", "-y", "40")
	term.press("/")
	term.press("l", "a", "t", "Enter")
	term.shows(`(?m)^>late +pending .* 239\.7\.7\.7:5000%eth7 `)
	term.press("q")
	term.shows(`it ended with code 0`)
	stream.stop()
}
