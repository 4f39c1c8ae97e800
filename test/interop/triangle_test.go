//go:build interop

package interop

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
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
// A stream passes through the third until the second switches to the shortest path.
type triangle struct {
	t        *testing.T // of the current step
	whole    *testing.T // of the whole test
	source   *lab.Host
	hosts    [3]*lab.Host
	receiver *lab.Host
	routers  [3]*frrRouter
	relays   [3]*accelerated // nil: the kernel alone
}

const (
	triangleGroup = "239.1.1.1"
	triangleRP    = "10.255.0.9"
)

func newTriangle(ctx context.Context, t *testing.T, accelerate bool) *triangle {
	t.Helper()
	n := &triangle{t: t, whole: t, source: labtest.Host(t, "src"), receiver: labtest.Host(t, "rcv")}
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
	return n
}

// tell logs the routers' state.
func (n *triangle) tell() {
	// The test's context may have ended.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(n.t.Context()), 20*time.Second)
	defer cancel()
	for i, h := range n.hosts {
		cmd := exec.CommandContext(ctx, "ip", "mroute")
		var kernel strings.Builder
		cmd.Stdout = &kernel
		if err := h.Start(cmd); err == nil {
			_ = cmd.Wait()
		}
		n.t.Logf("router %d:\n%s\n%s\n%s", i, kernel.String(), n.routers[i].vtysh("show ip mroute"), n.routers[i].vtysh("show ip pim upstream")+n.routers[i].vtysh("show ip pim join")+n.routers[i].vtysh("show ip igmp groups"))
		if n.relays[i] == nil {
			continue
		}
		all, err := control.NewClient(n.relays[i].socket).Rules(ctx)
		for _, r := range all {
			n.t.Logf("  %s: %s, %d outputs, %s", r.Name, r.State, len(r.Outputs), r.Reason)
		}
		if err != nil {
			n.t.Log(err)
		}
	}
}

// shortRoute is the second router's direct route to the source.
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

// restart kills the daemon, and starts it again after a time without it.
func (a *accelerated) restart(ctx context.Context, t *testing.T, without time.Duration) {
	t.Helper()
	a.daemon.stop(unix.SIGKILL)
	time.Sleep(without) // the test observes this interval
	a.start(ctx, t)
}

// start starts the daemon again.
func (a *accelerated) start(ctx context.Context, t *testing.T) {
	t.Helper()
	a.daemon = start(ctx, t, a.host, a.program, a.args...)
	labtest.Eventually(t, "the relay is there again", func() bool {
		_, err := control.NewClient(a.socket).Status(ctx)
		return err == nil
	})
}

// forwards says whether a router forwards a group of the source in XDP; true without a relay.
func (n *triangle) forwards(ctx context.Context, router int, group string) bool {
	if n.relays[router] == nil {
		return true
	}
	s := route(ctx, n.relays[router].relay, "mroute/10.0.1.2/"+group)
	return s != nil && s.State == control.StateActive
}

// numbers is a stream of numbered packets, a thousand per second, and those that arrived.
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
	wg.Go(func() { s.receive(ctx, c) })
	return s
}

// receive records what arrives until the context ends.
func (s *numbers) receive(ctx context.Context, c *net.UDPConn) {
	b := make([]byte, 64)
	for ctx.Err() == nil {
		_ = c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		if n, err := c.Read(b); err == nil && n == 4 {
			s.mu.Lock()
			s.got = append(s.got, binary.BigEndian.Uint32(b))
			s.mu.Unlock()
		}
	}
}

// since returns the numbers that arrived, from the given one on.
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

// faults counts missing and duplicate numbers in a range.
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

// settled waits until 300 consecutive numbers have arrived once each.
func (s *numbers) settled(t *testing.T, what string) {
	t.Helper()
	labtest.Eventually(t, what, func() bool {
		from := s.sent.Load()
		for s.sent.Load() < from+300 {
			time.Sleep(10 * time.Millisecond)
		}
		// What has not arrived before a later number does is missing.
		for late := time.Now(); len(s.since(from+301)) == 0 && time.Since(late) < time.Second; {
			time.Sleep(10 * time.Millisecond)
		}
		missing, twice := s.faults(from, from+300)
		return missing == 0 && twice == 0
	})
}

// passes waits until this many more are sent, and requires each to arrive once.
func (s *numbers) passes(t *testing.T, what string, count uint32) {
	t.Helper()
	from := s.sent.Load() + 1
	for s.sent.Load() < from+count {
		time.Sleep(10 * time.Millisecond)
	}
	s.whole(t, what, from, from+count)
}

// whole requires every number in a range to arrive once.
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

// tally is what went wrong with a stream during an event.
type tally struct{ missing, twice int }

// The events of a triangle.
const (
	joining = "a receiver joins, and PIM switches to the shortest path"
	cutting = "the shortest path is cut"
	mending = "the shortest path is there again"
)

// stream is a group with a receiver and a source.
type stream struct {
	*numbers
	n      *triangle
	group  string
	member *net.UDPConn
	stop   func()
}

// stream starts sending to a group that has been joined.
func (n *triangle) stream(ctx context.Context, group string) *stream {
	t := n.t
	t.Helper()
	to := netip.AddrPortFrom(netip.MustParseAddr(group), 5000)
	c, send := member(n.whole, n.receiver, to), sender(n.whole, n.source, to)
	labtest.Eventually(t, "the join has come to the rendezvous point", func() bool {
		return strings.Contains(n.routers[2].vtysh("show ip pim upstream"), group)
	})
	running, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	s := &stream{numbers: runNumbers(running, &wg, send, c), n: n, group: group, member: c}
	s.stop = sync.OnceFunc(func() {
		stop()
		wg.Wait()
	})
	n.whole.Cleanup(s.stop)
	return s
}

// comesBy waits until the second router's kernel receives the stream from an interface, and these
// routers forward it.
func (s *stream) comesBy(ctx context.Context, ifname string, routers ...int) {
	t := s.n.t
	t.Helper()
	entry := "(10.0.1.2," + s.group + ")"
	labtest.Eventually(t, "the second router takes "+s.group+" from "+ifname, func() bool {
		fields := strings.Fields(after(in(ctx, t, s.n.hosts[1], "ip", "mroute"), entry))
		return len(fields) > 1 && fields[0] == "Iif:" && fields[1] == ifname
	})
	for _, r := range routers {
		labtest.Eventually(t, fmt.Sprintf("router %d forwards %s", r, s.group), func() bool { return s.n.forwards(ctx, r, s.group) })
	}
}

// during counts what goes wrong with the stream during an event, until it is complete again and the
// mirrored routes match the kernel's.
func (s *stream) during(ctx context.Context, what string, from uint32, do func()) tally {
	t := s.n.t
	t.Helper()
	do()
	s.settled(t, what)
	to := s.sent.Load()
	missing, twice := s.faults(from, to)
	t.Logf("%s: of %d numbers %d are missing, %d came twice", what, to-from, missing, twice)
	s.passes(t, "after "+what, 300)
	s.n.agrees(ctx, what)
	return tally{missing, twice}
}

// agrees waits until each relay has the routes of its router's kernel, with their outputs.
func (n *triangle) agrees(ctx context.Context, when string) {
	n.t.Helper()
	for i, r := range n.relays {
		if r == nil {
			continue
		}
		difference := ""
		text := func() string { return fmt.Sprintf("%s: router %d: the relay has the kernel's routes", when, i) }
		deadline := time.Now().Add(labtest.Timeout)
		for {
			if difference = routesDiffer(ctx, n.t, n.hosts[i], r.relay); difference == "" {
				break
			}
			if time.Now().After(deadline) {
				n.t.Fatalf("%s: %s", text(), difference)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
}

// routesDiffer returns how the routes of a relay differ from those of its host's kernel; "" if they
// do not.
func routesDiffer(ctx context.Context, t *testing.T, h *lab.Host, r *relay) string {
	t.Helper()
	// One per line: (10.0.1.2,239.1.1.1) Iif: in0 Oifs: ab ar State: resolved
	kernel := map[string]string{}
	for line := range strings.Lines(in(ctx, t, h, "ip", "-4", "mroute")) {
		if !strings.HasPrefix(line, "(") || !strings.Contains(line, "State: resolved") {
			continue
		}
		entry, rest, _ := strings.Cut(line, " ")
		rest, _, _ = strings.Cut(rest, "State:")
		source, group, _ := strings.Cut(strings.Trim(entry, "()"), ",")
		var from string
		var to []string
		for _, word := range strings.Fields(strings.NewReplacer("Iif:", "", "Oifs:", "").Replace(rest)) {
			if from == "" {
				from = word
				continue
			}
			to = append(to, word)
		}
		slices.Sort(to)
		kernel["mroute/"+source+"/"+group] = from + " to " + strings.Join(to, " ")
	}
	all, err := control.NewClient(r.socket).Rules(ctx)
	if err != nil {
		return err.Error()
	}
	for _, rule := range all {
		_, from, _ := strings.Cut(rule.In, "%")
		from, _, _ = strings.Cut(from, ",")
		var to []string
		for _, o := range rule.Outputs {
			to = append(to, o.Interface)
		}
		slices.Sort(to)
		if have, want := from+" to "+strings.Join(to, " "), kernel[rule.Name]; have != want {
			return fmt.Sprintf("%s goes from %s, by the kernel from %q", rule.Name, have, want)
		}
		delete(kernel, rule.Name)
	}
	if len(kernel) > 0 {
		return fmt.Sprintf("the kernel alone has %v", kernel)
	}
	return ""
}

// round runs the events of a triangle under a stream: on a group of its own, and on a continuing
// one. It returns what went wrong in each.
func (n *triangle) round(ctx context.Context, number int, s *stream) map[string]tally {
	t := n.t
	found := map[string]tally{}
	fresh := n.stream(ctx, fmt.Sprintf("239.1.2.%d", number))
	found[joining] = fresh.during(ctx, joining, 1, func() { fresh.comesBy(ctx, "ab", 0, 1) })
	fresh.stop()
	if err := fresh.member.Close(); err != nil {
		t.Fatal(err)
	}
	up := func(up bool) {
		for _, h := range n.hosts[:2] {
			if err := h.SetUp("ab", up); err != nil {
				t.Error(err)
			}
		}
	}
	found[cutting] = s.during(ctx, cutting, s.sent.Load()+1, func() {
		up(false)
		s.comesBy(ctx, "br", 0, 1, 2)
	})
	found[mending] = s.during(ctx, mending, s.sent.Load()+1, func() {
		up(true)
		n.neighbours()
		n.shortRoute(ctx)
		s.comesBy(ctx, "ab", 0, 1)
	})
	return found
}

// restarts kills and restarts daemons under the stream.
func (n *triangle) restarts(ctx context.Context, s *stream) {
	t := n.t
	s.during(ctx, "a routing daemon is killed and started", s.sent.Load()+1, func() {
		n.routers[1].kill()
		n.routers[1].start()
		n.neighbours()
		s.comesBy(ctx, "ab", 0, 1)
	})
	if n.relays[1] == nil {
		return
	}
	// Nothing is lost, whether its flows still apply or the kernel has taken over.
	from := s.sent.Load() + 1
	n.relays[1].restart(ctx, n.whole, 6*time.Second)
	labtest.Eventually(t, "the relay forwards again", func() bool { return n.forwards(ctx, 1, triangleGroup) })
	s.settled(t, "the relay was killed")
	s.whole(t, "while the relay was killed and started", from, s.sent.Load()-100)
	from = s.sent.Load() + 1
	n.relays[1].daemon.stop(unix.SIGTERM)
	s.passes(t, "while the kernel forwards alone", 500)
	n.relays[1].start(ctx, n.whole)
	labtest.Eventually(t, "the relay forwards once more", func() bool { return n.forwards(ctx, 1, triangleGroup) })
	s.whole(t, "while the relay was stopped and started", from, s.sent.Load()-100)
}

// Triangles of the kernel alone and with xdpcast, side by side.
const (
	byKernel = iota
	withXDP
)

// worse returns how the transitions were worse than the kernel's own; "" if they were not. The
// median may exceed the kernel's worst by slack, for the scheduler: a router's daemons are
// sometimes late, and PIM by as much.
func worse(found [2][]map[string]tally) string {
	const slack = 10 // milliseconds
	faults := map[string]func(tally) int{
		"missing": func(t tally) int { return t.missing },
		"twice":   func(t tally) int { return t.twice },
	}
	for _, what := range []string{joining, cutting, mending} {
		for fault, of := range faults {
			var counts [2][]int
			for i := range found {
				for _, round := range found[i] {
					counts[i] = append(counts[i], of(round[what]))
				}
				slices.Sort(counts[i])
			}
			most, middle := counts[byKernel][len(counts[byKernel])-1], counts[withXDP][(len(counts[withXDP])-1)/2]
			if middle > most+slack {
				return fmt.Sprintf("%s: %s: %v by the kernel alone, %v with xdpcast", what, fault, counts[byKernel], counts[withXDP])
			}
		}
	}
	return ""
}

// TestTriangle: a network of three FRR routers, where a link is cut and daemons are killed under a
// stream: with xdpcast on all of them, the stream arrives whenever it does without, and PIM's
// transitions lose and duplicate no more than the kernel's own, in the same minute.
func TestTriangle(t *testing.T) {
	ctx := labtest.Context(t)
	var triangles [2]*triangle
	var streams [2]*stream
	both := func(name string, do func(i int, n *triangle)) {
		t.Helper()
		ok := t.Run(name, func(t *testing.T) {
			for i, name := range []string{byKernel: "kernel", withXDP: "xdpcast"} {
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					n := triangles[i]
					n.t = t
					defer func() {
						if t.Failed() {
							n.tell()
						}
					}()
					do(i, n)
				})
			}
		})
		if !ok {
			t.FailNow()
		}
	}
	for i := range triangles {
		triangles[i] = newTriangle(ctx, t, i == withXDP)
	}
	began := time.Now()
	both("begin", func(i int, n *triangle) {
		n.neighbours()
		streams[i] = n.stream(ctx, triangleGroup)
		streams[i].during(ctx, joining, 1, func() { streams[i].comesBy(ctx, "ab", 0, 1) })
	})
	// If the median is inconclusive, run more rounds.
	least, most := labtest.Soak(3, 20), labtest.Soak(15, 40)
	var found [2][]map[string]tally
	for number := 1; number <= least || number <= most && worse(found) != ""; number++ {
		both(fmt.Sprintf("round %d", number), func(i int, n *triangle) { found[i] = append(found[i], n.round(ctx, number, streams[i])) })
	}
	for i, name := range []string{byKernel: "by the kernel alone", withXDP: "with xdpcast"} {
		for _, round := range found[i] {
			t.Logf("%s, missing and twice: %v", name, round)
		}
	}
	if text := worse(found); text != "" {
		t.Error(text)
	}
	both("restarts", func(i int, n *triangle) { n.restarts(ctx, streams[i]) })
	both("end", func(i int, n *triangle) {
		// The routes outlive the keepalive time of 31 s, after which a daemon that sees no packets ends them.
		for time.Since(began) < 40*time.Second {
			streams[i].passes(n.t, "a stream that goes on", 1000)
		}
		for r, router := range n.routers[:2] {
			if text := router.vtysh("show ip mroute"); !strings.Contains(text, triangleGroup) {
				n.t.Errorf("router %d: %s", r, text)
			}
		}
		if err := streams[i].member.Close(); err != nil {
			n.t.Fatal(err)
		}
		labtest.Eventually(n.t, "the first router has pruned", func() bool {
			route, _, _ := strings.Cut(after(in(ctx, n.t, n.hosts[0], "ip", "mroute"), triangleGroup), "State:")
			return !strings.Contains(route, " ab ")
		})
		n.agrees(ctx, "the receiver has left")
	})
}
