package e2e_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/internal/traffic"
)

// easy is a rate, in packets per second, that an emulated or busy machine carries without loss: for
// tests that require every packet, but no speed. send bounds the catch-up of streams up to the rate
// most to the packets of easyLag at the easy rate, since a veth pair queues at most 256 packets.
const (
	easy    = 1_000
	easyLag = 40 * time.Millisecond
	most    = 20_000
)

// stream is running traffic.
type stream struct {
	t      testing.TB
	sender *traffic.Sender
	cancel context.CancelFunc
	ended  chan error
}

// together is the number of packets that a stream sends at once where no test looks at the time between them: to wake the
// sender, the kernel, a worker and the receiver for each packet is most of what a stream costs.
const together = 8

// send starts a stream. The caller must stop it.
func send(t testing.TB, h *lab.Host, cfg traffic.SendConfig) *stream {
	t.Helper()
	s := &stream{t: t, ended: make(chan error, 1)}
	if 0 < cfg.Rate.Value && cfg.Rate.Value <= most && cfg.MaxLag == 0 {
		cfg.MaxLag = time.Duration(float64(easyLag) * easy / cfg.Rate.Value)
	}
	if cfg.Rate.Value <= easy && cfg.MaxLag != 0 && labtest.Emulated() {
		cfg.Rate.Value /= 4 // a veth queues 256 packets, and a CPU there may not run for a quarter of a second
	}
	if cfg.Count > 0 && cfg.Burst == 0 && cfg.Rate.Value <= easy {
		cfg.Burst = together
	}
	labtest.Do(t, h, func() (err error) {
		s.sender, err = traffic.NewSender(cfg)
		return err
	})
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	go labtest.OnOneCPU(func() { s.ended <- s.sender.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		<-s.ended
		if err := s.sender.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// flows waits until this many more packets have been sent.
func (s *stream) flows(packets uint64) {
	s.t.Helper()
	goal := s.sender.Report().Packets + packets
	eventually(s.t, "packets have been sent", func() string {
		if n := s.sender.Report().Packets; n < goal {
			return fmt.Sprintf("%d of %d", n, goal)
		}
		return ""
	})
}

// wait waits for the end of a finite stream, and returns its packets.
func (s *stream) wait() uint64 {
	s.t.Helper()
	select {
	case err := <-s.ended:
		if err != nil {
			s.t.Error(err)
		}
		s.ended <- nil
	case <-time.After(patience):
		s.t.Error("the stream does not end")
	}
	return s.sender.Report().Packets
}

// stop ends the stream and returns its number of packets.
func (s *stream) stop() uint64 {
	s.t.Helper()
	s.cancel()
	if err := <-s.ended; err != nil {
		s.t.Error(err)
	}
	s.ended <- nil
	return s.sender.Report().Packets
}

// sink receives one subscription.
type sink struct {
	t        testing.TB
	endpoint string
	receiver *traffic.Receiver
	cancel   context.CancelFunc
	ended    chan error
}

// receive starts a receiver. The streams must start later.
func receive(t testing.TB, h *lab.Host, endpoint string, expected traffic.Expected) *sink {
	t.Helper()
	sub, err := traffic.ParseSubscription(endpoint)
	if err != nil {
		t.Fatal(err)
	}
	s := &sink{t: t, endpoint: endpoint, ended: make(chan error, 1)}
	labtest.Do(t, h, func() (err error) {
		s.receiver, err = traffic.NewReceiver(traffic.RecvConfig{
			Subscriptions: []traffic.Subscription{sub}, FromStart: true, Expected: expected,
			SocketBuffer: 256 << 20, // seconds of traffic: no loss while this process waits for a CPU
		})
		return err
	})
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	go func() { s.ended <- s.receiver.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-s.ended
		if err := s.receiver.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// received is the number of packets so far.
func (s *sink) received() uint64 { return s.receiver.Report().Total.Received }

// wait waits for the number of packets.
func (s *sink) wait(packets uint64) {
	s.t.Helper()
	eventually(s.t, "packets arrive at "+s.endpoint, func() string {
		if n := s.received(); n < packets {
			return fmt.Sprintf("%d of %d", n, packets)
		}
		return ""
	})
}

// finish ends the reception and returns what is wrong, given that so many packets were expected,
// each once, in order, and as specified.
func (s *sink) finish(packets uint64) string {
	s.t.Helper()
	for deadline := time.Now().Add(patience); s.received() < packets && time.Now().Before(deadline); {
		time.Sleep(5 * time.Millisecond)
	}
	s.cancel()
	err := <-s.ended
	s.ended <- nil
	r := s.receiver.Report()
	var faults []string
	if err != nil {
		faults = append(faults, err.Error())
	}
	if packets > 0 || r.Total.Received > 0 {
		faults = append(faults, r.Faults()...)
	}
	if r.Total.Received != packets {
		faults = append(faults, fmt.Sprintf("%d received of %d", r.Total.Received, packets))
	}
	if n := r.Total.Reordered; n > 0 {
		faults = append(faults, fmt.Sprintf("%d reordered", n))
	}
	if n := r.Total.Foreign; n > 0 {
		faults = append(faults, fmt.Sprintf("%d foreign", n))
	}
	if len(faults) == 0 {
		return ""
	}
	return fmt.Sprintf("%s: %s (last %+v, wrong %+v)", s.endpoint, strings.Join(faults, ", "), r.Groups[0].Last, r.Groups[0].LastWrong)
}

// target parses a target.
func target(t testing.TB, s string) traffic.Target {
	t.Helper()
	parsed, err := traffic.ParseTarget(s)
	if err != nil {
		t.Fatal(err)
	}
	return parsed
}
