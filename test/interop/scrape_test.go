//go:build interop

package interop

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"xdpcast/internal/labtest"
)

// resident is the resident memory of a process, in bytes (proc_pid_status(5)).
func resident(t *testing.T, pid int) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmHWM:")
	kB, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		t.Fatal(err)
	}
	return kB << 10
}

// TestScrapeOfManyRules: a daemon with 10,000 rules of four outputs each answers a scrape with all of them. The test
// logs the time and extra memory this takes; the bounds are wide, since the machine may be busy. The long form has
// 100,000 rules, which do not take the daemon down.
func TestScrapeOfManyRules(t *testing.T) {
	ctx := labtest.Context(t)
	n := newNet(t)
	many := labtest.Soak(10_000, 100_000)
	var rules strings.Builder
	rules.WriteString("rules:\n")
	for i := range many {
		fmt.Fprintf(&rules, "  - {name: r%05d, in: \"239.%d.%d.%d:5000%%in0\", out: [", i, 10+i>>16, i>>8&255, i&255)
		for slot := range 4 {
			fmt.Fprintf(&rules, "\"239.2%d.%d.%d:%d%%out%d\", ", slot, i>>8&255, i&255, 6000+i>>16, slot%2)
		}
		rules.WriteString("]}\n")
	}
	daemon := startMany(ctx, t, n.relay, rules.String(), many, "--listen", "127.0.0.1:9464")
	url := "http://" + forward(t, n.relay, "127.0.0.1:9464") + "/metrics"
	before := resident(t, daemon.cmd.Process.Pid)
	best := time.Hour
	for range 5 {
		started := time.Now()
		answer, err := http.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(answer.Body)
		answer.Body.Close()
		if !strings.Contains(string(text), "\nxdpcast_reconcile_duration_seconds_count ") {
			t.Error("there is no reconcile histogram")
		}
		if err != nil || answer.StatusCode != http.StatusOK || strings.Count(string(text), "\nxdpcast_output_sent_packets_total{") != 4*many {
			t.Fatalf("%d, %v, %d bytes", answer.StatusCode, err, len(text))
		}
		best = min(best, time.Since(started))
	}
	more := resident(t, daemon.cmd.Process.Pid) - before
	t.Logf("%v, %d MB more", best, more>>20)
	if best > 5*time.Second*time.Duration(many/10_000) || more > many*(15<<10) {
		t.Errorf("%v and %d MB more", best, more>>20)
	}
}
