package e2e_test

import (
	"fmt"
	"strings"
	"testing"

	"xdpcast/internal/control"
	"xdpcast/internal/traffic"
)

// health= reports loss, reordering and jitter of an input, on every path and for inputs that fail
// over, and drops nothing; loss raises an alarm.
func TestHealth(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	in.start("-c", in.write("rules.yaml", `rules:
- {name: plain, in: "239.1.1.9:5000%in0", out: "239.2.1.9:6000%out0"}
- {name: kernel, in: "239.1.1.1:5000%in0,health=rtp/90000", out: "239.2.1.1:6000%out0", path: kernel}
- {name: afxdp, in: "239.1.1.2:5000%in0,health=rtp/90000", out: "239.2.1.2:6000%out0", path: afxdp}
- {name: fanout, in: "239.1.1.3:5000%in0,health=rtp/90000", out: "239.2.1.3:6000%out0", path: fanout}
- {name: local, in: "239.1.1.4:5000%in0,health=rtp,local=yes", out: "239.2.1.4:6000%out0"}
- {name: pattern, in: "239.1.1.5:5000%in+,health=rtp/90000", out: ["239.2.1.5:6000%out0", "239.2.1.5:6000%out1"]}
- {name: backup, in: ["239.1.1.6:5000%in0,health=rtp/90000", "239.1.2.6:5000%in0"], failover: 1m, out: "239.2.1.6:6000%out0"}
`))
	numbering, err := traffic.ParseNumbering("rtp")
	if err != nil {
		t.Fatal(err)
	}
	names := []string{"kernel", "afxdp", "fanout", "local", "pattern", "backup"}
	senders := make([]*stream, len(names))
	for i, name := range names {
		in.waitState(name, control.StateActive)
		legs, err := traffic.ParseLegs(fmt.Sprintf("239.1.1.%d:5000%%src0", i+1), "5%", "", "2%")
		if err != nil {
			t.Fatal(err)
		}
		senders[i] = send(t, n.source, traffic.SendConfig{
			Legs: legs, Numbering: numbering, TTL: 16, Size: 200, Rate: traffic.Rate{Value: easy / 2}, Burst: together, Seed: uint64(i),
		})
	}
	// The alarms end a minute after the last loss: packets are lost until all have told.
	for i, name := range names {
		senders[i].flows(1000)
		eventually(t, "rule "+name+" tells what is lost", func() string {
			r := in.rule(name)
			if r.Stream == nil || !strings.Contains(strings.Join(r.Stream.Alarms, " "), fmt.Sprintf("%s lost ", map[bool]string{true: "in[0]", false: "in"}[name == "backup"])) {
				return fmt.Sprintf("%+v", r)
			}
			return ""
		})
		eventually(t, name+": an event tells of the loss", func() string {
			all := in.events()
			for _, e := range all {
				if e.Kind == "stream" && e.Rule == name && e.State == "lost" && strings.Contains(e.Cause, " lost ") {
					return ""
				}
			}
			return fmt.Sprint(all)
		})
	}
	if text := in.mustCLI("health"); strings.Contains(text, "plain") || strings.Count(text, " lost ") < len(names) || !strings.Contains(text, "~") {
		t.Errorf("health says\n%s", text)
	}
	if text := in.mustCLI("status"); !strings.Contains(text, "rule kernel: in lost ") {
		t.Errorf("status says\n%s", text)
	}
	for i, name := range names {
		senders[i].stop()
		sent := senders[i].sender.Report().Legs[0]
		var r control.RuleStatus
		eventually(t, "rule "+name+" has relayed all", func() string {
			if r = in.rule(name); r.Matched.Packets != sent.Packets || r.Outputs[0].Sent.Packets != sent.Packets || len(r.Drops) != 0 {
				return fmt.Sprintf("%+v, sent %+v", r, sent)
			}
			return ""
		})
		leg := r.Inputs[0].Leg
		// The first and last packets may be among those lost.
		if leg.Lost > sent.LeftOut || leg.Lost+20 < sent.LeftOut || leg.Reordered > sent.Reordered || leg.Reordered+10 < sent.Reordered || leg.Doubled+leg.Senders+leg.Resets+leg.Different+leg.Unnumbered != 0 {
			t.Errorf("%s: %+v, sent %+v", name, leg, sent)
		}
		by := control.JitterByTimestamps
		if name == "local" {
			by = control.JitterByGaps
		}
		if leg.JitterBy != by || leg.Jitter <= 0 || leg.Jitter > 1 || leg.LastSeen == nil {
			t.Errorf("%s: jitter %v by %q, last seen %v", name, leg.Jitter, leg.JitterBy, leg.LastSeen)
		}
	}
	if got := in.cli("health", "plain"); got.code != 1 || !strings.Contains(got.stderr, "rule plain has one input without health=") {
		t.Errorf("health of a rule without: %+v", got)
	}
}
