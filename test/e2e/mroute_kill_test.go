package e2e_test

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/packet"
)

// routedStream is a numbered stream through a router, and how often each number came at each sink.
type routedStream struct {
	t    *testing.T
	sent atomic.Uint32
	// highest is the highest number that came at the second sink.
	highest atomic.Uint32
	stop    func()
	mu      sync.Mutex
	came    [2]map[uint32]int
}

// startRouted sends a packet a millisecond until stop is called, which returns once the last one has arrived at the
// second sink, which gets all, and the sinks are quiet. It sends no more than the queues on the way hold.
func (n *network) startRouted(t *testing.T, source, group string) *routedStream {
	t.Helper()
	s := &routedStream{t: t, came: [2]map[uint32]int{{}, {}}}
	to := netip.MustParseAddr(group)
	f := packet.Frame{
		SrcMAC: macOf(t, n.source, "src0"), DstMAC: packet.MulticastMAC(to), Src: netip.MustParseAddr(source), Dst: to,
		SrcPort: 4000, DstPort: 5000, TTL: 16, Payload: numberedPayload(0, 40),
	}
	number := func(b []byte) uint32 { return binary.BigEndian.Uint32(b[len(b)-len(f.Payload):]) }
	size := len(f.Build())
	from := labtest.NewTap(t, n.source, "src0")
	// Before the first packet leaves.
	taps := []*labtest.Tap{labtest.NewTap(t, n.sinks[0], "sink0"), labtest.NewTap(t, n.sinks[1], "sink0")}
	ended := make(chan struct{})
	var senders, receivers sync.WaitGroup
	senders.Go(func() {
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ended:
				return
			case <-tick.C:
			}
			for late := time.Now(); s.sent.Load() > s.highest.Load()+64 && time.Since(late) < time.Second; {
				time.Sleep(time.Millisecond)
			}
			binary.BigEndian.PutUint32(f.Payload, s.sent.Load()+1)
			from.Send(f.Build())
			s.sent.Add(1)
		}
	})
	quiet := make(chan struct{})
	for i, tap := range taps {
		receivers.Go(func() {
			for {
				b := tap.Receive(100*time.Millisecond, func(b []byte) bool { return len(b) == size && b[0]&1 == 1 })
				if b != nil {
					s.mu.Lock()
					s.came[i][number(b)]++
					s.mu.Unlock()
					if i == 1 {
						s.highest.Store(max(s.highest.Load(), number(b)))
					}
					continue
				}
				select {
				case <-quiet:
					return
				default:
				}
			}
		})
	}
	s.stop = sync.OnceFunc(func() {
		close(ended)
		senders.Wait()
		for late := time.Now(); s.highest.Load() < s.sent.Load() && time.Since(late) < patience; {
			time.Sleep(time.Millisecond)
		}
		close(quiet)
		receivers.Wait()
	})
	t.Cleanup(s.stop)
	return s
}

// more waits until this many more packets are sent.
func (s *routedStream) more(count uint32) {
	for to := s.sent.Load() + count; s.sent.Load() < to; {
		time.Sleep(time.Millisecond)
	}
}

// next is the number of a packet that is not yet sent; nor is any later one.
func (s *routedStream) next() uint32 { return s.sent.Load() + 2 }

// faults returns the numbers that are missing and those that came twice at a sink, from one on, up to another.
func (s *routedStream) faults(sink int, from, to uint32) (missing, twice []uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for n := from; n < to; n++ {
		switch s.came[sink][n] {
		case 0:
			missing = append(missing, n)
		case 1:
		default:
			twice = append(twice, n)
		}
	}
	return missing, twice
}

// TestMrouteKilled: when the daemon is killed under a stream, the kernel forwards from the next
// packet on, by its routes as they are: one that changes meanwhile is followed at once, and the next
// daemon revives none of the old flows. No packet is lost or comes twice.
func TestMrouteKilled(t *testing.T) {
	for _, family := range []string{"ipv4", "ipv6"} {
		t.Run(family, func(t *testing.T) {
			t.Parallel()
			n := newNetwork(t)
			source, group, is4 := routedSource, routedGroup, family == "ipv4"
			if !is4 {
				n.addIPv6(t)
				source, group = "fd00:1::2", "ff0e::1:1"
			}
			router := labtest.NewRouter(t, n.relay, is4, 0)
			for _, name := range []string{"in0", "out0", "out1"} {
				router.AddVIF(name, 1)
			}
			both, one := map[string]uint8{"out0": 1, "out1": 1}, map[string]uint8{"out1": 1}
			router.Add(source, group, "in0", both)
			in := newInstance(t, n.relay)
			in.start("--mroute")
			name := "mroute/" + source + "/" + group
			in.waitRoute(name, control.StateActive, 2)
			s := n.startRouted(t, source, group)
			s.more(100)
			if got := in.rule(name).Matched.Packets; got == 0 {
				t.Fatal("nothing is forwarded in XDP")
			}

			in.running.stop(syscall.SIGKILL)
			killed := s.next()
			s.more(200)
			router.Add(source, group, "in0", one)
			changed := s.next()
			s.more(200)
			in.start("--mroute")
			in.waitRoute(name, control.StateActive, 1)
			eventually(t, "the stream is forwarded in XDP again", func() string {
				before := in.rule(name).Matched.Packets
				s.more(100)
				if in.rule(name).Matched.Packets < before+50 {
					return "it is not"
				}
				return ""
			})
			// Killed with nothing to change, as often as the scheduler allows.
			for range 3 {
				in.running.stop(syscall.SIGKILL)
				in.start("--mroute")
				s.more(50)
			}
			s.stop()
			last := s.sent.Load() + 1
			if missing, twice := s.faults(1, 1, last); len(missing)+len(twice) != 0 {
				t.Errorf("of %d packets %d are missing and %d came twice; killed before %d, changed before %d", last-1, missing, twice, killed, changed)
			}
			if missing, twice := s.faults(0, 1, killed); len(missing)+len(twice) != 0 {
				t.Errorf("of %d packets before the change %d are missing and %d came twice at the other sink", killed-1, missing, twice)
			}
			if missing, twice := s.faults(0, changed, last); len(missing) != int(last-changed) {
				t.Errorf("%d packets came by the route of before, %d twice", int(last-changed)-len(missing), twice)
			}
		})
	}
}
