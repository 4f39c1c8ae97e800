package relay

import (
	"context"
	"slices"
	"testing"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/internal/traffic"
)

// sends sends from the other end of in0 until the function that it returns is
// called, which tells how many packets there were.
func (p *place) sends(endpoint string, cfg traffic.SendConfig) (sent func() uint64, stop func() uint64) {
	p.t.Helper()
	var err error
	if cfg.Target, err = traffic.ParseTarget(endpoint); err != nil {
		p.t.Fatal(err)
	}
	cfg.TTL = 16
	if cfg.Rate.Value == 0 {
		cfg.Rate.Value = 10_000
	}
	var s *traffic.Sender
	labtest.Do(p.t, p.peer, func() (err error) { s, err = traffic.NewSender(cfg); return err })
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	p.t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			p.t.Error(err)
		}
		if err := s.Close(); err != nil {
			p.t.Error(err)
		}
	})
	packets := func() uint64 { return s.Report().Packets }
	return packets, func() uint64 {
		cancel()
		err := <-ended
		ended <- err
		return packets()
	}
}

// receives receives on a host from the first packet of a stream on.
func receives(t *testing.T, h *lab.Host, endpoint string) *traffic.Receiver {
	t.Helper()
	sub, err := traffic.ParseSubscription(endpoint)
	if err != nil {
		t.Fatal(err)
	}
	var r *traffic.Receiver
	labtest.Do(t, h, func() (err error) {
		r, err = traffic.NewReceiver(traffic.RecvConfig{Subscriptions: []traffic.Subscription{sub}, FromStart: true, SocketBuffer: 256 << 20})
		return err
	})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// TestPatternUnderTraffic: interfaces that match an output's pattern come and go
// while packets flow; those that stay miss none.
func TestPatternUnderTraffic(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	r.mustPut(stream("out", "in0", "239.1.1.1", to("out+", "239.2.2.1")))
	r.waitKernel("out -> out0 out1")
	stays := receives(t, p.peer, "239.2.2.1:6000%out1")
	// Slow enough for the ring of an AF_XDP socket to hold the packets of a second, in which a busy
	// machine does not let its worker run.
	sent, stop := p.sends("239.1.1.1:5000%in0", traffic.SendConfig{Rate: traffic.Rate{Value: 2000}})
	flows := func() {
		t.Helper()
		goal := sent() + 100
		labtest.Eventually(t, "packets flow", func() bool { return sent() >= goal })
	}
	flows()
	for range 3 {
		// Before the others in the order of slots, and behind them.
		for _, name := range []string{"out00", "out7"} {
			p.connect(name, "10.21.0.1/24")
			labtest.Eventually(t, name+" is served", func() bool { return slices.Contains(r.outputsOf("out"), name) })
			late := receives(t, p.peer, "239.2.2.1:6000%"+name)
			labtest.Eventually(t, "packets arrive there", func() bool { return late.Report().Total.Received > 50 })
			flows()
		}
		for _, name := range []string{"out00", "out7"} {
			p.remove(name)
			labtest.Eventually(t, name+" is gone", func() bool { return !slices.Contains(r.outputsOf("out"), name) })
			flows()
		}
	}
	want := stop()
	t.Cleanup(func() {
		if s, err := r.Stats(context.Background()); err == nil && t.Failed() {
			t.Logf("%+v; received: %+v", s, stays.Report().Total)
		}
	})
	labtest.Eventually(t, "all have arrived", func() bool { return stays.Report().Total.Received >= want })
	if got := stays.Report().Total; got.Received != want || got.Lost != 0 {
		t.Errorf("%d received of %d, %d lost", got.Received, want, got.Lost)
	}
}

// outputsOf returns the interfaces that a rule sends on.
func (r *running) outputsOf(rule string) (names []string) {
	s, err := r.Rule(r.t.Context(), rule)
	if err != nil {
		r.t.Fatal(err)
	}
	for _, o := range s.Outputs {
		if o.State == control.StateActive {
			names = append(names, o.Output[len("239.2.2.1:6000%"):])
		}
	}
	return names
}

// TestOwnAddress: what comes from an address of this host has been here before.
func TestOwnAddress(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	r.mustAdd("a", anyIn, out0)
	allowed := stream("allowed", "in0", "239.1.1.9", to("out0", "239.2.2.9"))
	allowed.Accept.AllowLoop = true
	r.mustPut(allowed)
	drops := func(name string) (matched, looped uint64) {
		s, err := r.Rule(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range s.Drops {
			if d.Reason == "loop" {
				looped += d.Packets
			}
		}
		return s.Matched.Packets, looped
	}
	if err := p.peer.AddAddr("in0", "10.2.0.1/32"); err != nil { // that of out1
		t.Fatal(err)
	}
	for _, group := range []string{"239.1.1.1", "239.1.1.9"} {
		_, stop := p.sends(group+":5000%in0", traffic.SendConfig{Source: addr("10.2.0.1")})
		name := map[string]string{"239.1.1.1": "a", "239.1.1.9": "allowed"}[group]
		labtest.Eventually(t, "packets are matched", func() bool { m, _ := drops(name); return m > 100 })
		stop()
	}
	labtest.Eventually(t, "all packets from an own address are dropped", func() bool { // also those on their way
		matched, looped := drops("a")
		return looped == matched
	})
	if matched, looped := drops("allowed"); looped != 0 {
		t.Errorf("%d of %d packets were dropped although loops are allowed", looped, matched)
	}
	// The address goes, and with it the check; another one comes.
	l, err := p.host.Link("out1")
	if err != nil {
		t.Fatal(err)
	}
	old, err := p.host.Netlink().AddrList(l, 2)
	if err != nil || len(old) != 1 {
		t.Fatal(old, err)
	}
	if err := p.host.Netlink().AddrDel(l, &old[0]); err != nil {
		t.Fatal(err)
	}
	_, before := drops("a")
	labtest.Eventually(t, "the relay knows", func() bool {
		known := true
		if err := r.do(t.Context(), func() error { known = r.network.IsOwn(addr("10.2.0.1")); return nil }); err != nil {
			t.Fatal(err)
		}
		return !known
	})
	matched, _ := drops("a")
	_, stop := p.sends("239.1.1.1:5000%in0", traffic.SendConfig{Source: addr("10.2.0.1")})
	labtest.Eventually(t, "packets are matched", func() bool { m, _ := drops("a"); return m > matched+100 })
	stop()
	if _, after := drops("a"); after != before {
		t.Errorf("%d packets more were dropped", after-before)
	}
}
