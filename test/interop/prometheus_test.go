//go:build interop

package interop

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// TestAlerts has promtool simulate the fault of each alert, and checks that it fires.
func TestAlerts(t *testing.T) {
	ctx := labtest.Context(t)
	for _, args := range [][]string{{"check", "rules", "xdpcast.rules.yml"}, {"test", "rules", "xdpcast.test.yml"}} {
		cmd := exec.CommandContext(ctx, "promtool", args...)
		cmd.Dir = "../../packaging/prometheus"
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v: %v\n%s", cmd, err, out)
		}
	}
}

// panel is the part of a Grafana panel that a test needs.
type panel struct {
	Title   string
	Type    string
	Targets []struct{ Expr string }
}

func dashboard(t *testing.T) []panel {
	t.Helper()
	data, err := os.ReadFile("../../packaging/grafana/xdpcast.json")
	if err != nil {
		t.Fatal(err)
	}
	var d struct{ Panels []panel }
	if err := json.Unmarshal(data, &d); err != nil {
		t.Fatal(err)
	}
	return d.Panels
}

const promConfig = `global: {scrape_interval: 1s, evaluation_interval: 1s}
scrape_configs:
  - job_name: xdpcast
    static_configs: [{targets: ["127.0.0.1:9464"]}]
`

// TestDashboard has a real Prometheus scrape a real daemon with real traffic. Every query of the
// dashboard must return data: no panel is empty.
func TestDashboard(t *testing.T) {
	ctx := labtest.Context(t)
	n := newNet(t)
	// A bridge with a querier, like a switch with one, queries memberships.
	for _, args := range [][]string{
		{"ip", "link", "add", "br0", "type", "bridge", "mcast_snooping", "1", "mcast_querier", "1", "mcast_query_interval", "100", "mcast_query_response_interval", "10", "mcast_startup_query_interval", "100"},
		{"ip", "link", "set", "br0", "up"},
		{"ip", "link", "set", "eth0", "master", "br0"},
		{"ip", "addr", "add", "10.0.0.9/24", "dev", "br0"},
	} {
		in(ctx, t, n.source, args...)
	}
	relay := startRelay(ctx, t, n.relay, `rules:
  - name: video
    in: 239.10.10.10:5004%in0
    out:
      - 239.20.20.20:6004%out0,ttl=8
      - 239.30.30.30:7004%out1,rate=1pps
`, "--listen", "127.0.0.1:9464")
	dir := t.TempDir()
	config := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(config, []byte(promConfig), 0o600); err != nil {
		t.Fatal(err)
	}
	start(ctx, t, n.relay, "prometheus", "--config.file="+config, "--storage.tsdb.path="+filepath.Join(dir, "data"),
		"--web.listen-address=127.0.0.1:9090", "--log.level=error")
	sender := start(ctx, t, n.source, relay.program, "gen", "--rate", "200", "239.10.10.10:5004%br0")

	for _, p := range dashboard(t) {
		for _, q := range p.Targets {
			expr := strings.NewReplacer("$__rate_interval", "20s", `"$instance"`, `".*"`, `"$rule"`, `"video"`).Replace(q.Expr)
			last := ""
			labtest.Eventually(t, fmt.Sprintf("panel %q has data for %s", p.Title, expr), func() bool {
				last = query(ctx, t, n.relay, expr)
				return last != ""
			})
			t.Logf("%s: %s", p.Title, last)
		}
	}
	sender.stop(syscall.SIGINT)

	// In the end Prometheus has the relay's values.
	labtest.Eventually(t, "Prometheus has the relay's counters", func() bool {
		rule := relay.rule(ctx, t, "video")
		dropped := rule.Outputs[1].Drops
		if len(dropped) != 1 || dropped[0].Reason != "policed" {
			t.Fatalf("output 1 dropped %v", dropped)
		}
		for expr, value := range map[string]uint64{
			`xdpcast_rule_received_packets_total{rule="video"}`:                     rule.Matched.Packets,
			`xdpcast_dropped_packets_total{rule="video",slot="1",reason="policed"}`: dropped[0].Packets,
		} {
			if !strings.Contains(query(ctx, t, n.relay, expr), fmt.Sprintf("=> %d @", value)) {
				return false
			}
		}
		return true
	})
}

// in runs a program on a host; it must succeed.
func in(ctx context.Context, t *testing.T, h *lab.Host, args ...string) string {
	t.Helper()
	var out strings.Builder
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdout = &out
	var complaint strings.Builder
	cmd.Stderr = &complaint
	if err := h.Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v: %v\n%s", args, err, complaint.String())
	}
	return out.String()
}

// query queries Prometheus; the answer is empty while it has none, or is not up yet.
func query(ctx context.Context, t *testing.T, h *lab.Host, expr string) string {
	t.Helper()
	var out strings.Builder
	cmd := exec.CommandContext(ctx, "promtool", "query", "instant", "http://127.0.0.1:9090", expr)
	cmd.Stdout = &out
	if err := h.Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		return ""
	}
	return strings.TrimSpace(out.String()) // it ends an empty answer with a newline as well
}
