//go:build interop

package interop

import (
	"context"
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// registered counts the packets of a numbered stream that come in PIM's Register messages (RFC 7761
// section 4.9.3), until the context ends.
func registered(ctx context.Context, tap *labtest.Tap, s *numbers) {
	const ethernet, ip, register, udp = 14, 20, 8, 8
	for ctx.Err() == nil {
		f := tap.Receive(100*time.Millisecond, func(f []byte) bool {
			return len(f) >= ethernet+ip+register+ip+udp+4 && f[ethernet+9] == 103 && f[ethernet+ip] == 0x21 && f[ethernet+ip+4]&0x40 == 0
		})
		if f != nil {
			s.mu.Lock()
			s.got = append(s.got, binary.BigEndian.Uint32(f[ethernet+ip+register+ip+udp:]))
			s.mu.Unlock()
		}
	}
}

// registers runs a stream that the first-hop router sends to the rendezvous point in Register messages alone,
// since its hellos do not arrive there and it cannot be joined, until they do and the stream comes natively.
func registers(ctx context.Context, t *testing.T, accelerate bool) {
	n := newRouterNet(t)
	hosts := []*lab.Host{n.first, n.second}
	const allRouters = "224.0.0.13" // of PIM
	in(ctx, t, n.first, "nft", "add table ip quiet; add chain ip quiet out { type filter hook output priority 0; }; add rule ip quiet out oifname link0 ip daddr "+allRouters+" drop")
	routers := []*frrRouter{startFRR(ctx, t, n.first, frr12, pimConfig("10.255.0.2", "in0", "link0")), startFRR(ctx, t, n.second, frr12, pimConfig("10.255.0.2", "link0", "out0", "lo"))}
	var relays []*relay
	if accelerate {
		for _, h := range hosts {
			relays = append(relays, startRelay(ctx, t, h, noRules, "--mroute", "--mroute-family", "ipv4"))
		}
	}
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		for i, h := range hosts {
			t.Logf("router %d:\n%s\n%s", i, in(context.WithoutCancel(ctx), t, h, "ip", "mroute"), routers[i].vtysh("show ip pim upstream")+routers[i].vtysh("show ip pim state")+routers[i].vtysh("show ip pim neighbor"))
		}
	})
	group := netip.MustParseAddrPort("239.1.1.1:5000")
	const name = "mroute/10.0.1.2/239.1.1.1"
	// The kernel's interfaces of the route, the input first.
	kernel := func(h *lab.Host) []string {
		line, _, _ := strings.Cut(after(in(ctx, t, h, "ip", "mroute"), "(10.0.1.2,239.1.1.1)"), "State:")
		return strings.Fields(strings.NewReplacer("Iif:", "", "Oifs:", "").Replace(line))
	}
	agree := func(what string) {
		t.Helper()
		for i, r := range relays {
			labtest.Eventually(t, what+": the relay has the kernel's routes", func() bool { return routesDiffer(ctx, t, hosts[i], r) == "" })
		}
	}
	receiver, send := member(t, n.receiver, group), sender(t, n.source, group)
	labtest.Eventually(t, "the join has come to the rendezvous point", func() bool { return strings.Contains(routers[1].vtysh("show ip igmp groups"), "239.1.1.1") })
	running, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	s := runNumbers(running, &wg, send, receiver)
	messages := &numbers{}
	tap := labtest.NewTap(t, n.second, "link0")
	wg.Go(func() { registered(running, tap, messages) })
	inRegisters := func(what string, count uint32) {
		t.Helper()
		labtest.Eventually(t, what+": the first of them", func() bool { return len(messages.since(0)) > 0 })
		from := s.sent.Load() + 1
		for s.sent.Load() < from+count {
			time.Sleep(10 * time.Millisecond)
		}
		messages.whole(t, what, from, from+count)
	}
	labtest.Eventually(t, "the first-hop router registers", func() bool { return slices.Equal(kernel(n.first), []string{"in0", "pimreg"}) })
	inRegisters("Register messages", 3000)
	if to := kernel(n.first); !slices.Equal(to, []string{"in0", "pimreg"}) {
		t.Errorf("the first-hop router no longer registers, and sends to %v", to)
	}
	agree("Register messages")
	for i, r := range relays {
		name, why := name, "PIM registers"
		if hosts[i] == n.second {
			name, why = "mroute/0.0.0.0/239.1.1.1", "for any source"
		}
		status := route(ctx, r, name)
		if status == nil || status.State != control.StatePending || !strings.Contains(status.Reason, why) {
			t.Errorf("router %d: %s: %+v: want it left to the kernel: %s", i, name, status, why)
		}
	}

	in(ctx, t, n.first, "nft", "delete", "table", "ip", "quiet")
	native := func() bool {
		to, from := kernel(n.first), kernel(n.second)
		return slices.Equal(to, []string{"in0", "link0"}) && slices.Equal(from, []string{"link0", "out0"})
	}
	// The rendezvous point joins when its timers tell it to, which takes up to a minute.
	for began := time.Now(); time.Since(began) < 2*time.Minute && !native(); {
		time.Sleep(100 * time.Millisecond)
	}
	labtest.Eventually(t, "the stream comes natively", native)
	s.settled(t, "the stream comes natively")
	for i, r := range relays {
		labtest.Eventually(t, "the native stream is forwarded in XDP", func() bool {
			status := route(ctx, r, name)
			return status != nil && status.State == control.StateActive
		})
		before := route(ctx, r, name).Matched.Packets
		s.passes(t, "the native stream", 1000)
		if now := route(ctx, r, name).Matched.Packets; now < before+1000 {
			t.Errorf("router %d forwarded %d packets in XDP, want 1000 or more", i, now-before)
		}
	}
	before := len(messages.since(0))
	s.passes(t, "the native stream", 1000)
	if now := len(messages.since(0)); now != before {
		t.Errorf("%d packets still came in Register messages", now-before)
	}
	agree("native")
}

// TestRegister: a first-hop router sends every packet of a stream to the rendezvous point in one Register
// message, with xdpcast on both as without, since it leaves such a route to the kernel. Once the rendezvous
// point joins the source, the stream moves into XDP as it comes natively, and none registers.
func TestRegister(t *testing.T) {
	t.Parallel() // waits for FRR nearly all the time
	ctx := labtest.Context(t)
	for i, name := range []string{byKernel: "kernel", withXDP: "xdpcast"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			registers(ctx, t, i == withXDP)
		})
	}
}
