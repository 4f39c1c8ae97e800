package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"xdpcast/internal/control"
)

// outputOf is the output of the rule "one" in the kernel.
func outputOf(in *instance) string {
	in.t.Helper()
	return in.rule("one").Outputs[0].Output
}

// TestKilledBeforeConfirmed kills the daemon while a reload waits for confirmation. A daemon
// started in time keeps waiting; one started later restores the previous set, and later daemons
// keep it as long as the file holds what was undone.
func TestKilledBeforeConfirmed(t *testing.T) {
	const first, second, third = "239.2.1.1:6001%out0", "239.2.1.1:6002%out0", "239.2.1.1:6003%out0"
	file := func(out string) string { return "rules: [{name: one, in: " + oneIn + ", out: [" + out + "]}]\n" }
	in := newInstance(t, newNetwork(t).relay)
	config := in.write("rules.yaml", file(first))
	in.start("-c", config)
	in.add("other", "239.1.1.9:5000%in0", "239.2.1.9:6000%out1")
	check := func(what, want string) {
		t.Helper()
		if got := outputOf(in); got != want {
			t.Errorf("%s: output %s is in force, want %s", what, got, want)
		}
		if all := in.rules(); len(all) != 2 {
			t.Errorf("%s: %d rules, want 2", what, len(all))
		}
	}
	kill := func() {
		t.Helper()
		in.running.stop(syscall.SIGKILL)
	}

	in.write("rules.yaml", file(second))
	if text := in.mustCLI("reload", "--confirm", "1h"); !strings.Contains(text, "1 changed") || !strings.Contains(text, `without "xdpcast confirm"`) {
		t.Errorf("reload --confirm says %q", text)
	}
	check("reloaded", second)
	kill()
	in.start("-c", config)
	check("killed, started in time", second)
	if text := in.mustCLI("status"); !regexp.MustCompile(`unconfirmed  reload by root, undone in [45]\dm`).MatchString(text) {
		t.Errorf("status does not say what waits for confirmation:\n%s", text)
	}
	if got := in.cli("rule", "del", "other"); got.code != 1 || !strings.Contains(got.stderr, "a change waits for confirmation until ") {
		t.Errorf("another change: %s", got)
	}
	if text := in.mustCLI("confirm"); text != "confirmed: reload by root\n" {
		t.Errorf("confirm says %q", text)
	}
	if got := in.cli("confirm"); got.code != 1 || got.stderr != "xdpcast: no change waits for confirmation\n" {
		t.Errorf("confirm of nothing: %s", got)
	}

	in.write("rules.yaml", file(third))
	var confirmBy time.Time
	for {
		result, err := in.client.Reload(t.Context(), control.ApplyOptions{Confirm: control.MinConfirm})
		if err != nil {
			t.Fatal(err)
		}
		got := outputOf(in)
		kill()
		if confirmBy = *result.ConfirmBy; time.Now().Before(confirmBy) {
			if got != third {
				t.Errorf("reloaded again: output %s is in force, want %s", got, third)
			}
			break
		}
		in.start("-c", config) // a busy machine has let the daemon undo it: again
	}
	eventually(t, "the time is over", func() string {
		if left := time.Until(confirmBy); left > -100*time.Millisecond {
			return left.String()
		}
		return ""
	})
	for range 2 {
		in.start("-c", config)
		check("killed, started too late", second)
		if text := in.mustCLI("status"); !strings.Contains(text, "file: an earlier set is in force since ") {
			t.Errorf("status does not say that the file is not in force:\n%s", text)
		}
		kill()
	}
	in.start("-c", config)
	if lines := strings.Split(in.mustCLI("history"), "\n"); !strings.HasSuffix(lines[1], "undone: reload was not confirmed") || !strings.Contains(lines[2], "root") {
		t.Errorf("history:\n%s", strings.Join(lines, "\n"))
	}
	in.mustCLI("reload")
	check("reloaded without a condition", third)
	in.mustCLI("rollback", "1")
	check("rolled back", second)
	if got := in.cli("rollback", "40"); got.code != 1 || !strings.Contains(got.stderr, `earlier sets are kept ("xdpcast history" lists them)`) {
		t.Errorf("rollback past the end: %s", got)
	}
	in.write("rules.yaml", file(first))
	kill()
	in.start("-c", config)
	check("the file has changed", first)
}

// TestWatchConfig follows a file as Kubernetes mounts it: a symbolic link into a directory that is
// replaced. A file with a mistake leaves the rules unchanged, and one that changes while another
// change waits for confirmation is read afterwards.
func TestWatchConfig(t *testing.T) {
	in := newInstance(t, newNetwork(t).relay)
	dir := filepath.Join(in.dir, "config")
	version := 0
	// publish replaces the directory of the file.
	publish := func(text string) {
		t.Helper()
		version++
		name := fmt.Sprint("..", version)
		err := os.MkdirAll(filepath.Join(dir, name), 0o755)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name, "rules.yaml"), []byte(text), 0o644)
		}
		if err == nil {
			err = os.Symlink(name, filepath.Join(dir, "..data_tmp"))
		}
		if err == nil {
			err = os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data"))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	file := func(out string) string { return "rules: [{name: one, in: " + oneIn + ", out: ['" + out + "']}]\n" }
	relays := func(out string) {
		t.Helper()
		eventually(t, "output "+out+" is in force", func() string {
			if got := outputOf(in); got != out {
				return got
			}
			return ""
		})
	}
	publish(file("239.2.1.1:6001%out0"))
	if err := os.Symlink("..data/rules.yaml", filepath.Join(dir, "rules.yaml")); err != nil {
		t.Fatal(err)
	}
	in.start("-c", filepath.Join(dir, "rules.yaml"), "--watch-config")
	relays("239.2.1.1:6001%out0")
	publish(file("239.2.1.1:6002%out0"))
	relays("239.2.1.1:6002%out0")

	publish(file("239.2.1.1:6003%out0,ttl=300"))
	in.running.waitLog(`msg="reload failed, keeping the old rules" error=`, 1)
	in.running.waitLog(`want ttl=keep, ttl=dec or ttl=1 to 255`, 1)
	relays("239.2.1.1:6002%out0")
	publish("")
	in.running.waitLog("rules missing", 1)
	relays("239.2.1.1:6002%out0")
	publish(file("239.2.1.1:6004%out0"))
	relays("239.2.1.1:6004%out0")

	in.write("api.yaml", "rules: [{name: other, in: 239.1.1.9:5000%in0, out: [239.2.1.9:6000%out1]}]\n")
	in.mustCLI("rule", "apply", "--confirm", "1h", filepath.Join(in.dir, "api.yaml"))
	publish(file("239.2.1.1:6005%out0"))
	in.running.waitLog("the file has changed: it is read once the unconfirmed change is confirmed or undone", 1)
	relays("239.2.1.1:6004%out0")
	in.mustCLI("confirm")
	relays("239.2.1.1:6005%out0")
	if text := in.mustCLI("history"); !strings.Contains(text, "reload (file changed)") {
		t.Errorf("history:\n%s", text)
	}
	if got := in.cli("run", "--watch-config"); got.code != 2 || !strings.Contains(got.stderr, "--watch-config: want a file to watch, too: --config FILE") {
		t.Errorf("nothing to watch: %s", got)
	}
}
