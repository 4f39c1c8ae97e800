package e2e_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"xdpcast/internal/control"
)

// events are those the program prints, whose numbers must increase by one.
func (in *instance) events(args ...string) (all []control.Event) {
	in.t.Helper()
	for line := range strings.Lines(in.mustCLI(append([]string{"events", "-o", "json"}, args...)...)) {
		var e control.Event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			in.t.Fatalf("%v in %q", err, line)
		}
		if n := len(all); n > 0 && e.Number != all[n-1].Number+1 {
			in.t.Errorf("event %d comes after %d", e.Number, all[n-1].Number)
		}
		all = append(all, e)
	}
	return all
}

// TestEvents: events outlive a killed daemon, their numbers keep increasing, and a program is called
// for each event.
func TestEvents(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	hook := in.script("hook", fmt.Sprintf("#!/bin/sh\necho \"$XDPCAST_EVENT_NUMBER $XDPCAST_EVENT_KIND $XDPCAST_EVENT_RULE $XDPCAST_EVENT_STATE\" >>%s/hooked\n", in.dir))
	d := in.start("--on-event", hook)
	in.add("cam", "239.1.8.1:5000%in0", "239.2.8.1:6000%out0", "239.2.8.2:6000%late0")
	has := func(all []control.Event, text string) bool {
		for i := range all {
			if strings.Contains(all[i].Text(), text) {
				return true
			}
		}
		return false
	}
	eventually(t, "the rule has its event", func() string {
		if all := in.events(); !has(all, "rule cam: active: interface late0 not found") {
			return fmt.Sprint(all)
		}
		return ""
	})
	before := in.events()
	d.stop(syscall.SIGKILL)

	in.start("--on-event", hook)
	after := in.events()
	for i := range before {
		if i >= len(after) || after[i].Text() != before[i].Text() || after[i].Number != before[i].Number || !after[i].Time.Equal(before[i].Time) {
			t.Fatalf("event %d was %+v and is another after a restart: %+v", i, before[i], after[min(i, len(after)-1)])
		}
	}
	if !has(after[len(before):], "daemon: started") {
		t.Errorf("no event of the start: %+v", after[len(before):])
	}
	if since := in.events("--since", fmt.Sprint(len(before))); len(since) < len(after)-len(before) || since[0].Number != after[len(before)].Number {
		t.Errorf("since event %d: %+v", len(before), since)
	}
	eventually(t, "the program was called for all", func() string {
		text, _ := os.ReadFile(filepath.Join(in.dir, "hooked"))
		for _, want := range []string{" rule cam active\n", " daemon  started\n"} {
			if !strings.Contains(string(text), want) {
				return string(text)
			}
		}
		if strings.Count(string(text), " daemon  started\n") != 2 {
			return string(text)
		}
		return ""
	})
	for _, bad := range []string{"/none", in.dir, "hook with arguments"} {
		if got := in.on(n.relay).cli("run", "--on-event", bad); got.code != 2 || !strings.Contains(got.stderr, "want a program, without arguments") {
			t.Errorf("%s: %s", bad, got)
		}
	}
}
