//go:build interop

package interop

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// triangle is a network of three routers, of which the third is the rendezvous point:
//
//	source eth0 - in0 first ab - ab second out0 - eth0 receiver
//	                   ar \     / br
//	                       third
//
// A stream goes by the third until the second switches to the shortest path.
type triangle struct {
	t        *testing.T
	source   *lab.Host
	hosts    [3]*lab.Host
	receiver *lab.Host
	routers  [3]*frrRouter
	relays   [3]*accelerated // nil: the kernel alone
}

const (
	triangleGroup = "239.1.1.1"
	triangleRP    = "10.255.0.9"
	triangleRoute = "mroute/10.0.1.2/" + triangleGroup
)

func newTriangle(ctx context.Context, t *testing.T, accelerate bool) *triangle {
	t.Helper()
	n := &triangle{t: t, source: labtest.Host(t, "src"), receiver: labtest.Host(t, "rcv")}
	for i, name := range []string{"ra", "rb", "rr"} {
		n.hosts[i] = labtest.Host(t, name)
	}
	a, b, r := n.hosts[0], n.hosts[1], n.hosts[2]
	labtest.Connect(t, lab.End{Host: n.source, Name: "eth0", Addrs: []string{"10.0.1.2/24"}}, lab.End{Host: a, Name: "in0", Addrs: []string{"10.0.1.1/24"}})
	labtest.Connect(t, lab.End{Host: a, Name: "ab", Addrs: []string{"10.0.2.1/24"}}, lab.End{Host: b, Name: "ab", Addrs: []string{"10.0.2.2/24"}})
	labtest.Connect(t, lab.End{Host: a, Name: "ar", Addrs: []string{"10.0.4.1/24"}}, lab.End{Host: r, Name: "ar", Addrs: []string{"10.0.4.9/24"}})
	labtest.Connect(t, lab.End{Host: b, Name: "br", Addrs: []string{"10.0.5.2/24"}}, lab.End{Host: r, Name: "br", Addrs: []string{"10.0.5.9/24"}})
	labtest.Connect(t, lab.End{Host: b, Name: "out0", Addrs: []string{"10.0.3.1/24"}}, lab.End{Host: n.receiver, Name: "eth0", Addrs: []string{"10.0.3.2/24"}})
	interfaces := [3][]string{{"in0", "ab", "ar", "lo"}, {"ab", "br", "out0", "lo"}, {"ar", "br", "lo"}}
	for i, h := range n.hosts {
		in(ctx, t, h, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.default.rp_filter=0")
		for _, ifname := range interfaces[i] {
			in(ctx, t, h, "sysctl", "-qw", "net.ipv4.conf."+ifname+".rp_filter=0")
		}
	}
	in(ctx, t, r, "ip", "addr", "add", triangleRP+"/32", "dev", "lo")
	in(ctx, t, a, "ip", "route", "add", triangleRP+"/32", "via", "10.0.4.9")
	in(ctx, t, b, "ip", "route", "add", triangleRP+"/32", "via", "10.0.5.9")
	in(ctx, t, a, "ip", "route", "add", "10.0.5.0/24", "via", "10.0.4.9")
	in(ctx, t, b, "ip", "route", "add", "10.0.4.0/24", "via", "10.0.5.9")
	in(ctx, t, r, "ip", "route", "add", "10.0.1.0/24", "via", "10.0.4.1")
	in(ctx, t, b, "ip", "route", "add", "10.0.1.0/24", "via", "10.0.5.9", "metric", "20")
	n.shortRoute(ctx)
	for _, h := range []*lab.Host{n.source, n.receiver} {
		if err := h.AddRoute("0.0.0.0/0", "eth0"); err != nil {
			t.Fatal(err)
		}
	}
	for i, h := range n.hosts {
		n.routers[i] = startFRR(ctx, t, h, frr12, pimConfig(triangleRP, interfaces[i]...))
		if accelerate {
			n.relays[i] = mirrorAll(ctx, t, h)
		}
	}
	n.neighbours()
	return n
}

// shortRoute is the second router's way to the source without a detour.
func (n *triangle) shortRoute(ctx context.Context) {
	in(ctx, n.t, n.hosts[1], "ip", "route", "add", "10.0.1.0/24", "via", "10.0.2.1", "metric", "10")
}

func (n *triangle) neighbours() {
	n.t.Helper()
	labtest.Eventually(n.t, "the routers are neighbours", func() bool {
		b := n.routers[1].vtysh("show ip pim neighbor")
		return strings.Contains(b, "10.0.2.1") && strings.Contains(b, "10.0.5.9") && strings.Contains(n.routers[0].vtysh("show ip pim neighbor"), "10.0.4.9")
	})
}

// accelerated is a daemon that mirrors the routes of its router, and may be killed.
type accelerated struct {
	*relay
	host   *lab.Host
	daemon *process
	args   []string
}

func mirrorAll(ctx context.Context, t *testing.T, h *lab.Host) *accelerated {
	t.Helper()
	r, daemon := startDaemon(ctx, t, h, noRules, 1, "--mroute", "--mroute-family", "ipv4")
	return &accelerated{relay: r, host: h, daemon: daemon, args: daemon.cmd.Args[1:]}
}

// restart kills the daemon, and starts it again after a time without.
func (a *accelerated) restart(ctx context.Context, t *testing.T, without time.Duration) {
	t.Helper()
	a.daemon.stop(unix.SIGKILL)
	time.Sleep(without) // what is looked at is what happens meanwhile
	a.daemon = start(ctx, t, a.host, a.program, a.args...)
	labtest.Eventually(t, "the relay is there again", func() bool {
		_, err := control.NewClient(a.socket).Status(ctx)
		return err == nil
	})
}

// forwards says whether a router forwards the stream in XDP; it need not where none does.
func (n *triangle) forwards(ctx context.Context, router int) bool {
	if n.relays[router] == nil {
		return true
	}
	s := route(ctx, n.relays[router].relay, triangleRoute)
	return s != nil && s.State == control.StateActive
}

// numbers is a stream of numbered packets, a thousand a second, and what of it has arrived.
type numbers struct {
	sent atomic.Uint32
	mu   sync.Mutex
	got  []uint32
}

// runNumbers sends and receives until the context ends.
func runNumbers(ctx context.Context, wg *sync.WaitGroup, send func(uint32), c *net.UDPConn) *numbers {
	s := &numbers{}
	wg.Go(func() {
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				send(s.sent.Add(1))
			}
		}
	})
	wg.Go(func() {
		b := make([]byte, 64)
		for ctx.Err() == nil {
			_ = c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			if n, err := c.Read(b); err == nil && n == 4 {
				s.mu.Lock()
				s.got = append(s.got, binary.BigEndian.Uint32(b))
				s.mu.Unlock()
			}
		}
	})
	return s
}

// since is what has arrived of the numbers from one on.
func (s *numbers) since(from uint32) (got []uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := len(s.got) - 1; i >= 0 && len(got) < 1<<20; i-- {
		if s.got[i] < from && len(s.got)-i > 100_000 {
			break
		}
		if s.got[i] >= from {
			got = append(got, s.got[i])
		}
	}
	return got
}

// faults counts numbers between two that are missing, and those that came twice.
func (s *numbers) faults(from, to uint32) (missing, twice int) {
	seen := map[uint32]int{}
	for _, n := range s.since(from) {
		if n < to {
			seen[n]++
		}
	}
	for n := from; n < to; n++ {
		switch seen[n] {
		case 0:
			missing++
		case 1:
		default:
			twice++
		}
	}
	return missing, twice
}

// settled waits until 300 numbers in a row have arrived once each.
func (s *numbers) settled(t *testing.T, what string) {
	t.Helper()
	labtest.Eventually(t, what, func() bool {
		from := s.sent.Load()
		for s.sent.Load() < from+300 {
			time.Sleep(10 * time.Millisecond)
		}
		time.Sleep(50 * time.Millisecond) // of the last
		missing, twice := s.faults(from, from+300)
		return missing == 0 && twice == 0
	})
}

// passes waits until so many more are sent, and wants every one of them to arrive once.
func (s *numbers) passes(t *testing.T, what string, count uint32) {
	t.Helper()
	from := s.sent.Load() + 1
	for s.sent.Load() < from+count {
		time.Sleep(10 * time.Millisecond)
	}
	s.whole(t, what, from, from+count)
}

// whole wants every number between two to arrive once.
func (s *numbers) whole(t *testing.T, what string, from, to uint32) {
	t.Helper()
	missing, twice := 0, 0
	for deadline := time.Now().Add(labtest.Timeout); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if missing, twice = s.faults(from, to); missing == 0 {
			break
		}
	}
	if missing != 0 || twice != 0 {
		t.Errorf("%s: of %d numbers %d are missing and %d came twice", what, to-from, missing, twice)
	}
}

// story is what happens to a triangle under a stream, which goes on for a length of time at least. It returns, by what happened, how many
// numbers were lost while the routers changed.
func (n *triangle) story(ctx context.Context, length time.Duration) (lost map[string]int) {
	t := n.t
	lost = map[string]int{}
	group := netip.AddrPortFrom(netip.MustParseAddr(triangleGroup), 5000)
	member, send := member(t, n.receiver, group), sender(t, n.source, group)
	running, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	labtest.Eventually(t, "the join has come to the rendezvous point", func() bool {
		return strings.Contains(n.routers[2].vtysh("show ip mroute"), triangleGroup) || strings.Contains(n.routers[2].vtysh("show ip pim upstream"), triangleGroup)
	})
	s := runNumbers(running, &wg, send, member)
	began := time.Now()
	happens := func(what string, do func(), routers ...int) {
		t.Helper()
		from := s.sent.Load() + 1
		do()
		labtest.Eventually(t, what+": the routers forward", func() bool {
			for _, r := range routers {
				if !n.forwards(ctx, r) {
					return false
				}
			}
			return true
		})
		s.settled(t, what)
		to := s.sent.Load()
		missing, twice := s.faults(from, to)
		lost[what] = missing
		t.Logf("%s: %d of %d numbers missing, %d twice", what, missing, to-from, twice)
		s.passes(t, "after "+what, 1000)
	}

	happens("the switch to the shortest path", func() {
		labtest.Eventually(t, "the second router takes the shortest path", func() bool {
			return strings.Contains(after(n.routers[1].vtysh("show ip mroute"), "10.0.1.2"), " ab ")
		})
	}, 0, 1)
	happens("a cut of the shortest path", func() {
		for _, h := range n.hosts[:2] {
			if err := h.SetUp("ab", false); err != nil {
				t.Error(err)
			}
		}
		labtest.Eventually(t, "the second router takes the detour", func() bool {
			return strings.Contains(after(n.routers[1].vtysh("show ip mroute"), "10.0.1.2"), " br ")
		})
	}, 0, 1, 2)
	happens("the shortest path is there again", func() {
		for _, h := range n.hosts[:2] {
			if err := h.SetUp("ab", true); err != nil {
				t.Error(err)
			}
		}
		n.shortRoute(ctx)
		n.neighbours()
		labtest.Eventually(t, "the second router takes the shortest path again", func() bool {
			return strings.Contains(after(n.routers[1].vtysh("show ip mroute"), "10.0.1.2"), " ab ")
		})
	}, 0, 1)
	happens("a routing daemon is killed", func() {
		n.routers[1].kill()
		n.routers[1].start()
		n.neighbours()
	}, 0, 1)
	if n.relays[1] != nil {
		// Nothing is lost, whether its flows hold yet or the kernel has taken over.
		from := s.sent.Load() + 1
		n.relays[1].restart(ctx, t, 6*time.Second)
		labtest.Eventually(t, "the relay forwards again", func() bool { return n.forwards(ctx, 1) })
		s.settled(t, "the relay was killed")
		s.whole(t, "while the relay was killed and started", from, s.sent.Load()-100)
	}
	// The routes outlive the keepalive time of 31 s, which a daemon that sees no packets ends them after.
	for time.Since(began) < length {
		s.passes(t, "a stream that goes on", 1000)
	}
	for i, r := range n.routers[:2] {
		if text := r.vtysh("show ip mroute"); !strings.Contains(text, triangleGroup) {
			t.Errorf("router %d: %s", i, text)
		}
	}
	from := s.sent.Load()
	if err := member.Close(); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "the first router has pruned", func() bool { return n.relays[0] == nil || !n.forwards(ctx, 0) })
	t.Logf("the last receiver left after number %d", from)
	return lost
}

// TestTriangle: a network of three FRR routers, of which a path is cut and daemons are killed
// under a stream: with xdpcast on all of them, the stream arrives whenever it does without.
func TestTriangle(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Duration(labtest.Soak(4, 12))*time.Minute)
	defer cancel()
	length := time.Duration(labtest.Soak(40, 250)) * time.Second
	lost := make([]map[string]int, 2)
	t.Run("both", func(t *testing.T) {
		for i, name := range []string{"kernel", "xdpcast"} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				lost[i] = newTriangle(ctx, t, i == 1).story(ctx, length)
			})
		}
	})
	for what, kernel := range lost[0] {
		t.Logf("%s: %d lost by the kernel alone, %d with xdpcast", what, kernel, lost[1][what])
	}
}
