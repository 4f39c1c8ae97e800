//go:build interop

package interop

import (
	"context"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// registers runs a stream that comes to the rendezvous point in PIM's Register messages alone, which cannot
// join its source since the first-hop router's hellos are lost, until they arrive and the stream comes
// natively. It returns what went wrong with the stream as it changed over.
func registers(ctx context.Context, t *testing.T, accelerate bool) tally {
	n := newRouterNet(t)
	hosts := []*lab.Host{n.first, n.second}
	const allRouters = "224.0.0.13" // of PIM (RFC 7761 section 4.9)
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
	// The kernel's interfaces of the route; the first is the input.
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
	registered := func() bool {
		to, from := kernel(n.first), kernel(n.second)
		return len(to) == 2 && to[0] == "in0" && to[1] == "pimreg" && len(from) > 1 && from[0] == "pimreg" && from[1] == "out0"
	}
	labtest.Eventually(t, "the stream comes in Register messages", registered)
	s.settled(t, "the stream comes in Register messages")
	s.passes(t, "the stream in Register messages", 2000)
	if !registered() {
		t.Errorf("the stream has left the Register messages: %v, %v", kernel(n.first), kernel(n.second))
	}
	agree("Register messages")
	for i, r := range relays {
		status := route(ctx, r, name)
		if status == nil || status.State != control.StatePending || !strings.Contains(status.Reason, "PIM registers") {
			t.Errorf("router %d: %+v: want it left to the kernel, for PIM registers", i, status)
		}
	}

	from := s.sent.Load() + 1
	in(ctx, t, n.first, "nft", "delete", "table", "ip", "quiet")
	labtest.Eventually(t, "the stream comes natively", func() bool {
		to, from := kernel(n.first), kernel(n.second)
		return len(to) == 2 && to[1] == "link0" && len(from) == 2 && from[0] == "link0" && from[1] == "out0"
	})
	s.settled(t, "the stream comes natively")
	missing, twice := s.faults(from, s.sent.Load())
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
	s.passes(t, "the native stream", 1000)
	agree("native")
	return tally{missing, twice}
}

// TestRegister: while a first-hop router sends a stream to the rendezvous point in PIM's Register
// messages, xdpcast on both leaves it to the kernel, and every packet arrives once; as PIM changes to
// native forwarding, the stream moves into XDP, and no more is lost or doubled than by the kernel
// alone.
func TestRegister(t *testing.T) {
	t.Parallel() // waits for FRR nearly all the time
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	var found [2]tally
	t.Run("both", func(t *testing.T) {
		for i, name := range []string{byKernel: "kernel", withXDP: "xdpcast"} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				found[i] = registers(ctx, t, i == withXDP)
			})
		}
	})
	t.Logf("missing and twice as PIM changes to native forwarding: %v by the kernel alone, %v with xdpcast", found[byKernel], found[withXDP])
	const slack = 10 // milliseconds, for the scheduler: see worse
	if found[withXDP].missing > found[byKernel].missing+slack || found[withXDP].twice > found[byKernel].twice+slack {
		t.Errorf("missing and twice: %v by the kernel alone, %v with xdpcast", found[byKernel], found[withXDP])
	}
}
