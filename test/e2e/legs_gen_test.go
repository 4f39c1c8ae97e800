package e2e_test

import (
	"fmt"
	"testing"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/labtest"
	"xdpcast/internal/traffic"
)

// Each format that a rule merges, sent on two legs that lose, lag and reorder: each packet arrives
// once, as it was sent.
func TestLegsFormats(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	formats := []string{"rtp", "rfc4175", "moldudp64", "pitch", "mdp3", "field:3:8", "field:6:2le:count=2:2"}
	rules := "rules:\n"
	for i, format := range formats {
		rules += fmt.Sprintf("- name: r%d\n  in: [239.1.1.%d:5000%%in0, 239.1.2.%d:5000%%in0]\n  merge: %q\n  out: 239.2.1.%d:6000%%out0\n", i, i+1, i+1, format+",skew=2s,reset=4s", i+1)
	}
	in.start("-c", in.write("rules.yaml", rules))
	const count = 3000
	for i, format := range formats {
		t.Run(format, func(t *testing.T) {
			in.waitState(fmt.Sprintf("r%d", i), control.StateActive)
			numbering, err := traffic.ParseNumbering(format)
			if err != nil {
				t.Fatal(err)
			}
			legs, err := traffic.ParseLegs(fmt.Sprintf("239.1.1.%d:5000%%src0,239.1.2.%d:5000%%src0", i+1, i+1), "10%,20%", "5ms", "1%,5%")
			if err != nil {
				t.Fatal(err)
			}
			sub, err := traffic.ParseSubscription(fmt.Sprintf("239.2.1.%d:6000%%sink0", i+1))
			if err != nil {
				t.Fatal(err)
			}
			var r *traffic.Receiver
			labtest.Do(t, n.sinks[0], func() (err error) {
				r, err = traffic.NewReceiver(traffic.RecvConfig{
					Subscriptions: []traffic.Subscription{sub}, Numbering: numbering, FromStart: true, Expect: count, Count: count, Duration: patience,
				})
				return err
			})
			defer r.Close()
			ended := make(chan error, 1)
			go func() { ended <- r.Run(t.Context()) }()
			s := send(t, n.source, traffic.SendConfig{
				Legs: legs, Numbering: numbering, TTL: 16, Size: 200, Rate: traffic.Rate{Value: easy}, Count: count, Repairable: true, Seed: uint64(i),
			})
			s.wait()
			if err := <-ended; err != nil {
				t.Fatal(err)
			}
			got := r.Report()
			if faults := got.Faults(); len(faults) > 0 || got.Total.Foreign > 0 || got.Total.Repaired == 0 {
				t.Errorf("%v: %+v", faults, got.Total)
			}
			var status control.RuleStatus
			legsSent := s.sender.Report().Legs
			eventually(t, "all are counted", func() string { // copies may still be on their way
				status = in.rule(fmt.Sprintf("r%d", i))
				for leg, sent := range legsSent {
					if in := status.Inputs[leg]; in.Matched.Packets != sent.Packets {
						return fmt.Sprintf("leg %d: %+v of %+v", leg, in.Matched, sent)
					}
				}
				return ""
			})
			for leg, sent := range legsSent {
				// For packets that may take several numbers the relay knows neither which of the late ones were lost nor
				// how many were lost before the first.
				if in := status.Inputs[leg]; in.Leg.Lost > sent.LeftOut+sent.Reordered+5 || in.Leg.Lost+20 < sent.LeftOut {
					t.Errorf("leg %d: %+v, %+v of %+v", leg, in.Matched, in.Leg, sent)
				}
			}
			if l := got.Groups[0].RepairTime; l == nil || l.MaxNS > int64(2*time.Second) {
				t.Errorf("repaired after %+v", l)
			}
		})
	}
}
