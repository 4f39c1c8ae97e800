package demo

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"xdpcast/internal/control"
	"xdpcast/internal/traffic"
)

// PacketSize is the UDP payload of the demo's packets, in bytes.
const PacketSize = 1000

// stream is one stream of the demo: its rule, what the source sends, and what has to arrive.
type stream struct {
	rule control.Rule
	// send is the traffic from the source's own side; count and rate are added.
	send traffic.SendConfig
	to   string // target of send
	// legs replace to; each has a loss and a delay.
	legs, legLoss, legDelay string
	// other is a second sender to the same group and port, which the rule does not name: none of
	// its packets may arrive. The zero value is none.
	other    netip.Addr
	arrivals []arrival // by slot
}

// arrival is what has to arrive from one output. It is stated explicitly rather than derived from
// the rule, since it is the expected result of the rule.
type arrival struct {
	sink string
	at   string // group and port on the sink's interface
	want traffic.Expected
}

// testStreams are the five streams. Source and relay are as build makes them:
// relay has 10.0.N.1 on ethN.
func testStreams() []stream {
	source, other := netip.AddrFrom4([4]byte{10, 0, 0, 5}), netip.AddrFrom4([4]byte{10, 0, 0, 6})
	eth1, eth3 := netip.AddrFrom4([4]byte{10, 0, 1, 1}), netip.AddrFrom4([4]byte{10, 0, 3, 1})
	elsewhere := netip.AddrFrom4([4]byte{192, 0, 2, 9}) // documentation, RFC 5737
	const af31, af41, ef = 26, 34, 46                   // RFC 2597, RFC 3246
	return []stream{
		{
			rule: control.Rule{Name: "one-to-one", In: "239.1.1.1:5000%eth0", Out: []string{"239.2.1.1:5000%eth1,ttl=dec"}},
			to:   "239.1.1.1:5000%eth0", send: traffic.SendConfig{Source: source, SourcePort: 41001, TTL: 16, DSCP: af31},
			arrivals: []arrival{{"sink1", "239.2.1.1:5000%eth0", traffic.Expected{Source: eth1, SourcePort: 41001, TTL: 15, DSCP: new(uint8(af31))}}},
		},
		{
			rule: control.Rule{Name: "one-to-three", In: "239.1.2.1:5000%eth0", Out: []string{
				"239.2.2.1:5000%eth1,ttl=8", "239.2.2.2:5000%eth2,src=keep,dscp=ef", "239.2.2.3:5000%eth3,src=192.0.2.9,ttl=32,dscp=af41",
			}},
			to: "239.1.2.1:5000%eth0", send: traffic.SendConfig{Source: source, SourcePort: 41002, TTL: 16},
			arrivals: []arrival{
				{"sink1", "239.2.2.1:5000%eth0", traffic.Expected{Source: eth1, SourcePort: 41002, TTL: 8, DSCP: new(uint8(0))}},
				{"sink2", "239.2.2.2:5000%eth0", traffic.Expected{Source: source, SourcePort: 41002, TTL: 16, DSCP: new(uint8(ef))}},
				{"sink3", "239.2.2.3:5000%eth0", traffic.Expected{Source: elsewhere, SourcePort: 41002, TTL: 32, DSCP: new(uint8(af41))}},
			},
		},
		{
			rule: control.Rule{Name: "one-source", In: "10.0.0.5@232.1.3.1:5000%eth0", Out: []string{"239.2.3.1:5000%eth2,src=keep,ttl=4"}},
			to:   "232.1.3.1:5000%eth0", send: traffic.SendConfig{Source: source, SourcePort: 41003, TTL: 16},
			other:    other,
			arrivals: []arrival{{"sink2", "239.2.3.1:5000%eth0", traffic.Expected{Source: source, SourcePort: 41003, TTL: 4, DSCP: new(uint8(0))}}},
		},
		{
			rule: control.Rule{Name: "new-port", In: "239.1.4.1:5000%eth0", Out: []string{"239.2.4.1:6004%eth3,sport=7004,ttl=64"}},
			to:   "239.1.4.1:5000%eth0", send: traffic.SendConfig{Source: source, SourcePort: 41004, TTL: 16},
			arrivals: []arrival{{"sink3", "239.2.4.1:6004%eth0", traffic.Expected{Source: eth3, SourcePort: 7004, TTL: 64, DSCP: new(uint8(0))}}},
		},
		{
			// The skew allows for a machine that is also doing other work.
			rule: control.Rule{Name: "two-legs", In: "239.1.5.1:5000%eth0 239.1.5.2:5000%eth0", Merge: "rtp,skew=2s,reset=4s", Out: []string{"239.2.5.1:5000%eth1,ttl=8"}},
			legs: "239.1.5.1:5000%eth0,239.1.5.2:5000%eth0", legLoss: "5%", legDelay: "20ms",
			send:     traffic.SendConfig{Source: source, SourcePort: 41005, TTL: 16, Repairable: true, Seed: 1},
			arrivals: []arrival{{"sink1", "239.2.5.1:5000%eth0", traffic.Expected{Source: eth1, SourcePort: 41005, TTL: 8, DSCP: new(uint8(0))}}},
		},
	}
}

// otherShare is the second sender's share of the first one's packets.
const otherShare = 10

// flight is a stream with its sender and receivers.
type flight struct {
	stream
	count     uint64 // packets to send
	sender    *traffic.Sender
	other     *traffic.Sender     // nil if there is none
	receivers []*traffic.Receiver // by slot
}

// flown is the result of a stream.
type flown struct {
	stream
	count    uint64
	sent     traffic.SendReport
	other    traffic.SendReport // the zero value if there is none
	received []traffic.RecvReport
}

// transmit sends the streams and returns the results.
func (d *demonstration) transmit(ctx context.Context) (all []flown, err error) {
	var flights []*flight
	defer func() {
		for _, f := range flights {
			err = errors.Join(err, f.close())
		}
	}()
	for _, s := range d.streams {
		f := &flight{stream: s, count: d.packets()}
		flights = append(flights, f)
		if err := d.open(f); err != nil {
			return nil, fmt.Errorf("stream %s: %w", s.rule.Name, err)
		}
	}
	if err := d.fly(ctx, flights); err != nil {
		return nil, err
	}
	for _, f := range flights {
		all = append(all, f.report())
	}
	return all, nil
}

// packets is how many packets a stream has.
func (d *demonstration) packets() uint64 {
	return max(1, uint64(math.Round(d.streamRate()*d.Duration.Seconds())))
}

func (d *demonstration) streamRate() float64 { return d.Rate / float64(len(d.streams)) }

// open opens the sockets: afterwards no packet can be missed.
func (d *demonstration) open(f *flight) error {
	var numbers traffic.Numbering // none
	if f.legs != "" {
		var err error
		if numbers, err = traffic.ParseNumbering("rtp"); err != nil {
			return err
		}
	}
	for _, a := range f.arrivals {
		sub, err := traffic.ParseSubscription(a.at)
		if err != nil {
			return err
		}
		if err := d.hosts[a.sink].Do(func() error {
			r, err := traffic.NewReceiver(traffic.RecvConfig{
				Subscriptions: []traffic.Subscription{sub}, FromStart: true, Expect: f.count, Expected: a.want, Numbering: numbers,
			})
			if err == nil {
				f.receivers = append(f.receivers, r)
			}
			return err
		}); err != nil {
			return fmt.Errorf("%s: %w", a.sink, err)
		}
	}
	cfg := f.send
	cfg.Size, cfg.Count, cfg.Rate, cfg.Numbering = PacketSize, f.count, traffic.Rate{Value: d.streamRate()}, numbers
	var err error
	if f.legs != "" {
		cfg.Legs, err = traffic.ParseLegs(f.legs, f.legLoss, f.legDelay, "")
	} else {
		cfg.Target, err = traffic.ParseTarget(f.to)
	}
	if err != nil {
		return err
	}
	return d.hosts[sourceHost].Do(func() (err error) {
		if f.sender, err = traffic.NewSender(cfg); err != nil || !f.stream.other.IsValid() {
			return err
		}
		cfg.Source = f.stream.other
		cfg.Count, cfg.Rate.Value = max(1, cfg.Count/otherShare), cfg.Rate.Value/otherShare
		f.other, err = traffic.NewSender(cfg)
		return err
	})
}

func (f *flight) close() error {
	var errs []error
	for _, s := range []*traffic.Sender{f.sender, f.other} {
		if s != nil {
			errs = append(errs, s.Close())
		}
	}
	for _, r := range f.receivers {
		errs = append(errs, r.Close())
	}
	return errors.Join(errs...)
}

func (f *flight) report() flown {
	out := flown{stream: f.stream, count: f.count, sent: f.sender.Report()}
	if f.other != nil {
		out.other = f.other.Report()
	}
	for _, r := range f.receivers {
		out.received = append(out.received, r.Report())
	}
	return out
}

// fly runs all senders and receivers until everything has arrived, or no more packets do.
func (d *demonstration) fly(ctx context.Context, flights []*flight) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	group, ctx := errgroup.WithContext(ctx)
	var sending sync.WaitGroup
	send := func(s *traffic.Sender) {
		sending.Add(1)
		group.Go(func() error {
			defer sending.Done()
			return s.Run(ctx)
		})
	}
	for _, f := range flights {
		for _, r := range f.receivers {
			group.Go(func() error { return r.Run(ctx) })
		}
	}
	for _, f := range flights {
		send(f.sender)
		if f.other != nil {
			send(f.other)
		}
	}
	sent := make(chan struct{})
	go func() {
		sending.Wait()
		close(sent)
	}()
	watchErr := d.watch(ctx, flights, sent)
	cancel()
	err := group.Wait() // the first failure, which may have ended the watch
	<-sent
	if err != nil {
		return err
	}
	return watchErr
}

const (
	// quiet is how long no packet may arrive before everything counts as arrived: a surplus packet
	// would come in this time.
	quiet = 200 * time.Millisecond
	// patience is how long no packet may arrive before missing ones are lost.
	patience = 2 * time.Second
)

// watch reports figures until the streams have ended and settled.
func (d *demonstration) watch(ctx context.Context, flights []*flight, sent <-chan struct{}) error {
	start := time.Now()
	reports, looks := time.NewTicker(d.Interval), time.NewTicker(look)
	defer reports.Stop()
	defer looks.Stop()
	d.Observer.Flowing()
	last, lastChange := Figures{}, start
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-reports.C:
			d.Observer.Progress(time.Since(start), figuresOf(flights), false)
		case <-looks.C:
			if err := d.relay.endedEarly(); err != nil {
				return err
			}
			now := figuresOf(flights)
			if now != last {
				last, lastChange = now, time.Now()
			}
			select {
			case <-sent:
			default:
				continue
			}
			wait := patience
			if now.Received >= now.Expected {
				wait = quiet
			}
			if time.Since(lastChange) >= wait {
				d.Observer.Progress(time.Since(start), now, true)
				return nil
			}
		}
	}
}

// Figures are the totals over all streams at one moment.
type Figures struct {
	Sent      uint64 // packets
	Expected  uint64 // copies that they should become
	Received  uint64 // copies
	Lost      uint64 // copies whose numbers were skipped
	Datagrams uint64 // at the sinks, of any kind
}

// figuresOf adds up the counters of the senders and receivers.
func figuresOf(flights []*flight) Figures {
	var f Figures
	for _, fl := range flights {
		var received []traffic.RecvReport
		for _, r := range fl.receivers {
			report := r.Report()
			received = append(received, report)
			f.Received += report.Total.Received
			f.Lost += report.Total.Lost
			f.Datagrams += report.Total.Datagrams
		}
		sent := sentSoFar(fl.sender.Report(), received)
		f.Sent += sent
		f.Expected += sent * uint64(len(received))
	}
	return f
}

// sentSoFar is how many packets a sender has sent. Its own count lags behind the system call that
// sends a batch, and the batch may already have arrived: packets are numbered from 0, and those
// that have arrived have been sent.
func sentSoFar(sent traffic.SendReport, received []traffic.RecvReport) uint64 {
	n := sent.Packets
	for _, r := range received {
		for _, g := range r.Groups {
			for _, flow := range g.Flows {
				if flow.Stream == sent.Stream {
					n = max(n, flow.HighestSeq+1)
				}
			}
		}
	}
	return n
}
