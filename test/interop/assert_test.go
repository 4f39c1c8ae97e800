//go:build interop

package interop

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// sharedNet is a network in which two routers, up0 and up1, forward one stream to the same LAN, since two
// others, down0 and down1, each reach the source through a different one of them:
//
//   - up0 -             - down0 - receiver0
//     source - LAN         LAN of routers
//   - up1 -             - down1 - receiver1
//
// PIM's assert leaves one of the two forwarding (RFC 7761 section 4.6).
type sharedNet struct {
	t         *testing.T
	source    *lab.Host
	receivers [2]*lab.Host
	up, down  [2]*lab.Host
	routers   []*frrRouter // up0, up1, down0, down1
	relays    []*relay     // likewise; nil without xdpcast
}

const (
	sharedSource = "10.0.1.10"
	sharedGroup  = "232.1.1.1"
	sharedRoute  = "mroute/" + sharedSource + "/" + sharedGroup
)

// lan connects hosts to a bridge.
func (n *sharedNet) lan(ctx context.Context, name string, ends ...lab.End) {
	bridge := labtest.Host(n.t, name)
	in(ctx, n.t, bridge, "ip", "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
	in(ctx, n.t, bridge, "ip", "link", "set", "br0", "up")
	for i, end := range ends {
		port := fmt.Sprintf("port%d", i)
		labtest.Connect(n.t, end, lab.End{Host: bridge, Name: port})
		in(ctx, n.t, bridge, "ip", "link", "set", port, "master", "br0")
	}
}

func newSharedNet(ctx context.Context, t *testing.T, accelerate bool) *sharedNet {
	t.Helper()
	n := &sharedNet{t: t, source: labtest.Host(t, "src")}
	end := func(h *lab.Host, name, addr string) lab.End {
		return lab.End{Host: h, Name: name, Addrs: []string{addr + "/24"}}
	}
	for i := range 2 {
		n.up[i], n.down[i], n.receivers[i] = labtest.Host(t, "up"), labtest.Host(t, "down"), labtest.Host(t, "rcv")
	}
	n.lan(ctx, "lan0", end(n.source, "eth0", sharedSource), end(n.up[0], "in0", "10.0.1.1"), end(n.up[1], "in0", "10.0.1.2"))
	n.lan(ctx, "lan1", end(n.up[0], "lan", "10.0.2.1"), end(n.up[1], "lan", "10.0.2.2"), end(n.down[0], "lan", "10.0.2.3"), end(n.down[1], "lan", "10.0.2.4"))
	if err := n.source.AddRoute("0.0.0.0/0", "eth0"); err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		labtest.Connect(t, end(n.down[i], "out0", fmt.Sprintf("10.0.%d.1", 3+i)), end(n.receivers[i], "eth0", fmt.Sprintf("10.0.%d.2", 3+i)))
		if err := n.receivers[i].AddRoute("0.0.0.0/0", "eth0"); err != nil {
			t.Fatal(err)
		}
	}
	for i, h := range []*lab.Host{n.up[0], n.up[1], n.down[0], n.down[1]} {
		interfaces := []string{"in0", "lan"}
		if i >= 2 {
			interfaces = []string{"lan", "out0"}
			in(ctx, t, h, "ip", "route", "add", "10.0.1.0/24", "via", fmt.Sprintf("10.0.2.%d", i-1))
		}
		in(ctx, t, h, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.default.rp_filter=0")
		for _, name := range interfaces {
			in(ctx, t, h, "sysctl", "-qw", "net.ipv4.conf."+name+".rp_filter=0")
		}
		n.routers = append(n.routers, startFRR(ctx, t, h, frr12, pimConfig("10.255.0.9", interfaces...)))
		var r *relay
		if accelerate {
			r = startRelay(ctx, t, h, noRules, "--mroute", "--mroute-family", "ipv4")
		}
		n.relays = append(n.relays, r)
	}
	labtest.Eventually(t, "the routers are neighbours", func() bool {
		for i := range n.routers {
			seen := n.routers[i].vtysh("show ip pim neighbor")
			for other := range 4 {
				if other != i && !strings.Contains(seen, fmt.Sprintf(" 10.0.2.%d ", other+1)) {
					return false
				}
			}
		}
		return true
	})
	return n
}

// sourceMember receives numbered packets that a source sends to a group.
func sourceMember(t *testing.T, h *lab.Host, source string, group netip.AddrPort) (c *net.UDPConn) {
	t.Helper()
	labtest.Do(t, h, func() (err error) {
		if c, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(group)); err != nil {
			return err
		}
		raw, err := c.SyscallConn()
		if err != nil {
			return err
		}
		request := make([]byte, 12) // struct ip_mreq_source, on the interface of the route
		copy(request, group.Addr().AsSlice())
		copy(request[8:], netip.MustParseAddr(source).AsSlice())
		var set error
		err = raw.Control(func(fd uintptr) {
			set = unix.SetsockoptString(int(fd), unix.IPPROTO_IP, unix.IP_ADD_SOURCE_MEMBERSHIP, string(request))
		})
		if err == nil {
			err = set
		}
		return err
	})
	t.Cleanup(func() { c.Close() })
	labtest.GrowBuffer(t, c)
	return c
}

// elected returns the state of each router in the assert. ok is false until up1 has won: with equal
// metrics the higher address wins.
func (n *sharedNet) elected() (states []string, ok bool) {
	for _, r := range n.routers {
		state := ""
		for _, word := range strings.Fields(after(r.vtysh("show ip pim assert"), sharedGroup)) {
			if word == "WINNER" || word == "LOSER" {
				state = word
				break
			}
		}
		states = append(states, state)
	}
	return states, slices.Equal(states[:2], []string{"LOSER", "WINNER"})
}

// story has one receiver join, then the other, whose router takes the stream from another neighbour. It returns
// whether packets arrive twice once the upper routers have agreed, as with FRR 8.4: its loser prunes no output.
func (n *sharedNet) story(ctx context.Context) (doubled bool) {
	t := n.t
	defer func() {
		if !t.Failed() {
			return
		}
		for i, h := range []*lab.Host{n.up[0], n.up[1], n.down[0], n.down[1]} {
			t.Logf("router %d:\n%s\n%s\n%s", i, in(context.WithoutCancel(ctx), t, h, "ip", "mroute"),
				n.routers[i].vtysh("show ip pim join")+n.routers[i].vtysh("show ip pim upstream"), n.routers[i].vtysh("show ip pim assert"))
		}
	}()
	group := netip.MustParseAddrPort(sharedGroup + ":5000")
	send := sender(t, n.source, group)
	running, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	first := sourceMember(t, n.receivers[0], sharedSource, group)
	s := runNumbers(running, &wg, send, first)
	forwards := func(what string, routers ...int) {
		t.Helper()
		for _, i := range routers {
			if r := n.relays[i]; r != nil {
				labtest.Eventually(t, fmt.Sprintf("%s: router %d forwards in XDP", what, i), func() bool {
					status := route(ctx, r, sharedRoute)
					return status != nil && status.State == control.StateActive
				})
			}
		}
	}
	s.settled(t, "the first receiver has the stream")
	forwards("one receiver", 0, 2)

	second := sourceMember(t, n.receivers[1], sharedSource, group)
	other := &numbers{}
	wg.Go(func() { other.receive(running, second) })
	began := time.Now()
	labtest.Eventually(t, "the second receiver has the stream", func() bool { return len(other.since(0)) > 0 })
	forwards("two receivers", 0, 1, 2, 3)
	var states []string
	elected := func() (ok bool) {
		states, ok = n.elected()
		return ok
	}
	// FRR asserts when it checks the counters, which is after its keepalive time.
	for time.Since(began) < labtest.Timeout && !elected() {
		time.Sleep(200 * time.Millisecond)
	}
	labtest.Eventually(t, "the upper routers have agreed on one of them", elected)
	t.Logf("elected after %v: %v", time.Since(began), states)
	from := s.sent.Load() + 1
	const count = 2000
	for s.sent.Load() < from+count {
		time.Sleep(10 * time.Millisecond)
	}
	for i, got := range []*numbers{s, other} {
		labtest.Eventually(t, fmt.Sprintf("receiver %d has all", i), func() bool {
			missing, _ := got.faults(from, from+count)
			return missing == 0
		})
	}
	_, twice := s.faults(from, from+count)
	for i, r := range n.relays {
		if r == nil {
			continue
		}
		host := []*lab.Host{n.up[0], n.up[1], n.down[0], n.down[1]}[i]
		labtest.Eventually(t, "the relay has the kernel's routes", func() bool { return routesDiffer(ctx, t, host, r) == "" })
	}
	return twice > count/2
}

// TestAssert: two routers that forward the same stream to one LAN, both in XDP, hear each other and
// agree on one of them, as without xdpcast: the kernel handles packets on the wrong interface, and
// notifies the daemons. The outcome is the same.
func TestAssert(t *testing.T) {
	t.Parallel() // waits for FRR nearly all the time
	ctx := labtest.Context(t)
	var doubled [2]bool
	t.Run("both", func(t *testing.T) {
		for i, name := range []string{byKernel: "kernel", withXDP: "xdpcast"} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				doubled[i] = newSharedNet(ctx, t, i == withXDP).story(ctx)
			})
		}
	})
	if doubled[byKernel] != doubled[withXDP] {
		t.Errorf("after an assert packets come twice: %v by the kernel alone, %v with xdpcast", doubled[byKernel], doubled[withXDP])
	}
}
