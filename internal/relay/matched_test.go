package relay

import (
	"fmt"
	"maps"
	"testing"

	"xdpcast/internal/control"
	"xdpcast/internal/labtest"
	"xdpcast/internal/traffic"
)

// TestMatched: what rules have matched, on every path and from several inputs, is what their counters say.
func TestMatched(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	for i, path := range []string{"kernel", "fanout", "afxdp"} {
		rule := control.Rule{Name: path, In: fmt.Sprintf("239.1.1.%d:5000%%in0", i+1), Out: []string{fmt.Sprintf("239.2.2.%d:6000%%out0", i+1)}, Path: path}
		if _, err := r.AddRule(t.Context(), rule); err != nil {
			t.Fatal(err)
		}
	}
	r.mustAdd("several", "239.1.2.1:5000%in+", "239.2.2.9:6000%out0", "239.2.2.9:6000%out1")
	if _, err := r.AddRule(t.Context(), control.Rule{Name: "late", In: "239.1.3.1:5000%absent0", Out: []string{"239.2.2.8:6000%out0"}}); err != nil {
		t.Fatal(err)
	}
	for i, group := range []string{"239.1.1.1", "239.1.1.2", "239.1.1.3", "239.1.2.1"} {
		sent, stop := p.sends(group+":5000%in0", traffic.SendConfig{})
		labtest.Eventually(t, "packets flow", func() bool { return sent() > uint64(100*(i+1)) })
		stop()
	}
	want := map[string]uint64{}
	labtest.Eventually(t, "all packets have come", func() bool {
		stats, err := r.Stats(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		before := maps.Clone(want)
		for i := range stats.Rules {
			want[stats.Rules[i].Name] = stats.Rules[i].Matched.Packets
		}
		return want["several"] > 0 && want["kernel"] > 0 && want["fanout"] > 0 && want["afxdp"] > 0 && maps.Equal(want, before)
	})
	if got, err := r.Matched(t.Context()); err != nil || !maps.Equal(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
}
