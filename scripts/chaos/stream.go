package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime/debug"
	"time"

	"xdpcast/internal/live"
	"xdpcast/pkg/packet"
)

// The stream: what the source sends, and the relay makes of it.
var (
	streamIn  = netip.AddrPortFrom(netip.AddrFrom4([4]byte{239, 1, 1, 1}), 5000)
	streamOut = netip.AddrPortFrom(netip.AddrFrom4([4]byte{239, 2, 1, 1}), 6000)
)

const (
	frameLen = 128
	// stampShift: frames carry microseconds, for an hour.
	stampShift = 10
	// call is how long one call of the source sends. Between two of them it pauses for the kernel's
	// setup; and at the end of the stream the kernel passes over the rest of one.
	call = 30 * time.Second
	// burst is the longest span of frames that the source sends at once.
	burst = 8 * time.Microsecond
	// most is the number of frames sent at once: veth holds 256.
	most = 64
)

// openTraffic loads the source and the witness.
func (s *stage) openTraffic() error {
	src, err := s.source.Link("src0")
	if err != nil {
		return err
	}
	frame := packet.Frame{
		DstMAC: packet.MulticastMAC(streamIn.Addr()), SrcMAC: [6]byte(src.Attrs().HardwareAddr),
		Src: netip.AddrFrom4([4]byte{10, 1, 0, 2}), Dst: streamIn.Addr(), DstPort: streamIn.Port(), TTL: 16, Payload: make([]byte, frameLen-42),
	}.Build()
	if s.sender, err = live.NewSource(live.SourceOptions{
		Frame: frame, Index: src.Attrs().Index, FirstGroup: streamIn.Addr(), FirstPort: 10000, Flows: s.opts.flows, StampShift: stampShift,
	}); err != nil {
		return err
	}
	return s.sink.Do(func() (err error) {
		s.witness, err = live.NewWitness("sink0", live.WitnessOptions{Group: streamOut.Addr(), Port: int(streamOut.Port()), Flows: s.opts.flows, StampShift: stampShift})
		return err
	})
}

// refused is how many frames the rings of the links had no room for: that to the relay, and that to the sink.
func (s *stage) refused() (in, out uint64, err error) {
	err = errors.Join(
		s.source.Do(func() (err error) { in, err = live.Refused("src0"); return err }),
		s.relay.Do(func() (err error) { out, err = live.Refused("out0"); return err }))
	return in, out, err
}

// stream is numbered packets flowing through the relay.
type stream struct {
	stage  *stage
	stop   context.CancelFunc
	sent   chan sending
	before struct{ in, out uint64 }
}

// sending is what the source did.
type sending struct {
	frames         uint64
	started, ended uint64 // ns of CLOCK_MONOTONIC
	err            error
}

func (w sending) rate() float64 { return float64(w.frames) / (float64(w.ended-w.started) / 1e9) }

func (s *stage) startStream(rate float64) (_ *stream, err error) {
	s.trials++
	st := &stream{stage: s, sent: make(chan sending, 1)}
	if st.before.in, st.before.out, err = s.refused(); err != nil {
		return nil, err
	}
	if err := s.witness.Expect(s.trials); err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	st.stop = stop
	go func() {
		done := sending{err: errors.New("the source has ended")}
		defer func() {
			if cause := recover(); cause != nil { // or what was made would stay
				done.err = fmt.Errorf("panic of the source: %v\n%s", cause, debug.Stack())
			}
			st.sent <- done
		}()
		done = s.send(ctx, s.trials, rate)
	}()
	return st, nil
}

// send sends until ctx ends.
func (s *stage) send(ctx context.Context, trial uint32, rate float64) (done sending) {
	plan := live.Plan{
		Trial: trial, Rate: rate, Frames: max(s.opts.flows, int(rate*call.Seconds())/s.opts.flows*s.opts.flows),
		Batch: max(1, min(most, int(rate*burst.Seconds()))), Stamped: true, Behind: s.opts.behindAt(rate),
	}
	done.err = s.source.Do(func() error {
		if err := live.Pin(s.opts.cpu); err != nil {
			return err
		}
		for ctx.Err() == nil {
			sent, err := s.sender.Send(ctx, plan)
			if err != nil {
				return err
			}
			if sent.Frames == 0 {
				continue
			}
			if done.started == 0 {
				done.started = sent.Started
			}
			done.ended = sent.Ended
			done.frames += sent.Frames
			plan.First += uint32(sent.Frames / uint64(s.opts.flows))
		}
		return nil
	})
	return done
}

// end ends the stream and counts its packets once no more arrive for so long.
func (st *stream) end(r *result, patience time.Duration) error {
	st.stop()
	sent := <-st.sent
	st.sent <- sending{}
	if sent.err != nil {
		return sent.err
	}
	s := st.stage
	r.sent, r.rate = sent.frames, sent.rate()
	for last, since := uint64(0), time.Now(); ; time.Sleep(5 * time.Millisecond) {
		in, out, err := s.refused()
		if err != nil {
			return err
		}
		seen, err := s.witness.Read()
		if err != nil {
			return err
		}
		r.notTaken, r.sinkFull, r.seen = in-st.before.in, out-st.before.out, seen
		if r.settled() {
			break
		}
		if seen.Packets != last {
			last, since = seen.Packets, time.Now()
		}
		if time.Since(since) > patience {
			break
		}
	}
	switch seen := r.seen; {
	case seen.Checksum > 0 || seen.Address > 0:
		return fmt.Errorf("%d packets with a wrong checksum, %d with a wrong destination", seen.Checksum, seen.Address)
	case seen.Forgotten > 0:
		return fmt.Errorf("%d packets came more than %d behind the last: cannot tell whether they came twice", seen.Forgotten, live.Window)
	}
	return nil
}

// patienceForRest is longer than any ring delays packets.
const patienceForRest = 3 * time.Second

func (st *stream) close() {
	st.stop()
	<-st.sent
}

// half returns half the highest rate at which the path loses nothing for half a second, in one of
// three tries. Two rates in a row must fail, since one may for want of a CPU.
func (s *stage) half(ctx context.Context) (float64, error) {
	const first, step, tries, trial = 20_000, 1.25, 3, 500 * time.Millisecond
	best, failed := 0.0, 0
	for rate := float64(first); failed < 2; rate *= step {
		lossFree := false
		for range tries {
			st, err := s.startStream(rate)
			if err != nil {
				return 0, err
			}
			err = sleep(ctx, trial)
			var r result
			if err = errors.Join(err, st.end(&r, trial)); err != nil {
				st.close()
				return 0, err
			}
			st.close()
			// Less than the rate is the source's limit.
			if lossFree = r.lost() == 0 && r.sinkFull == 0 && r.rate > 0.9*rate; lossFree {
				best = r.rate
				break
			}
		}
		if failed++; lossFree {
			failed = 0
		}
	}
	if best == 0 {
		return 0, fmt.Errorf("at %d packets a second, the least that is tried, packets are lost: give a rate", first)
	}
	return best / 2, nil
}

// behindAt is by how much the source may be late at a rate.
func (o options) behindAt(rate float64) time.Duration {
	switch {
	case o.behind > 0:
		return o.behind
	case o.path == "kernel":
		return time.Second
	}
	return time.Duration(500 / rate * float64(time.Second))
}
