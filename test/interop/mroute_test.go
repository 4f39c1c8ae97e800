//go:build interop

package interop

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// routerNet is a network with two routers, of which the second is PIM's rendezvous point:
//
//	source eth0 - in0 first link0 - link0 second out0 - eth0 receiver
type routerNet struct {
	source, first, second, receiver *lab.Host
}

func newRouterNet(t *testing.T) *routerNet {
	t.Helper()
	n := &routerNet{source: labtest.Host(t, "src"), first: labtest.Host(t, "ra"), second: labtest.Host(t, "rb"), receiver: labtest.Host(t, "rcv")}
	labtest.Connect(t, lab.End{Host: n.source, Name: "eth0", Addrs: []string{"10.0.1.2/24"}}, lab.End{Host: n.first, Name: "in0", Addrs: []string{"10.0.1.1/24"}})
	labtest.Connect(t, lab.End{Host: n.first, Name: "link0", Addrs: []string{"10.0.2.1/24"}}, lab.End{Host: n.second, Name: "link0", Addrs: []string{"10.0.2.2/24"}})
	labtest.Connect(t, lab.End{Host: n.second, Name: "out0", Addrs: []string{"10.0.3.1/24"}}, lab.End{Host: n.receiver, Name: "eth0", Addrs: []string{"10.0.3.2/24"}})
	ctx := t.Context()
	for _, h := range []*lab.Host{n.first, n.second} {
		in(ctx, t, h, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.default.rp_filter=0")
		for _, ifname := range []string{"in0", "link0", "out0"} {
			if _, err := h.Link(ifname); err == nil {
				in(ctx, t, h, "sysctl", "-qw", "net.ipv4.conf."+ifname+".rp_filter=0")
			}
		}
	}
	in(ctx, t, n.second, "ip", "addr", "add", "10.255.0.2/32", "dev", "lo")
	in(ctx, t, n.first, "ip", "route", "add", "10.0.3.0/24", "via", "10.0.2.2")
	in(ctx, t, n.first, "ip", "route", "add", "10.255.0.2/32", "via", "10.0.2.2")
	in(ctx, t, n.second, "ip", "route", "add", "10.0.1.0/24", "via", "10.0.2.1")
	for _, h := range []*lab.Host{n.source, n.receiver} {
		if err := h.AddRoute("0.0.0.0/0", "eth0"); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

// frr runs Debian 12's zebra and pimd on a router.
func frr(ctx context.Context, t *testing.T, h *lab.Host, interfaces ...string) (vtysh func(command string) string) {
	t.Helper()
	return startFRR(ctx, t, h, frr12, pimConfig("10.255.0.2", interfaces...)).vtysh
}

// next is the number of the next packet; false on a timeout.
func next(t *testing.T, c *net.UDPConn, timeout time.Duration) (uint32, bool) {
	t.Helper()
	b := make([]byte, 64)
	if err := c.SetReadDeadline(time.Now().Add(timeout)); err != nil {
		t.Fatal(err)
	}
	n, err := c.Read(b)
	if err != nil || n != 4 {
		return 0, false
	}
	return binary.BigEndian.Uint32(b), true
}

// route asks a relay for the rule of a route; nil if there is none.
func route(ctx context.Context, r *relay, name string) *control.RuleStatus {
	status, err := control.NewClient(r.socket).Rule(ctx, name)
	if err != nil {
		return nil
	}
	return &status
}

// TestFRR: two routers of FRR's pimd, one of them the rendezvous point, forward a stream from the
// first join to the last leave, and with their routes in XDP no number is lost, duplicated or
// reordered once PIM has settled.
func TestFRR(t *testing.T) {
	ctx := labtest.Context(t)
	n := newRouterNet(t)
	routers := []*lab.Host{n.first, n.second}
	vtysh := []func(string) string{frr(ctx, t, n.first, "in0", "link0"), frr(ctx, t, n.second, "link0", "out0", "lo")}
	relays := []*relay{}
	for _, h := range routers {
		relays = append(relays, startRelay(ctx, t, h, noRules, "--mroute", "--mroute-family", "ipv4"))
	}
	labtest.Eventually(t, "the routers are neighbours", func() bool {
		return strings.Contains(vtysh[0]("show ip pim neighbor"), "10.0.2.2") && strings.Contains(vtysh[1]("show ip pim neighbor"), "10.0.2.1")
	})
	group := netip.MustParseAddrPort("239.1.1.1:5000")
	receiver := member(t, n.receiver, group)
	send := sender(t, n.source, group)
	labtest.Eventually(t, "the join has come to the rendezvous point", func() bool { return strings.Contains(vtysh[1]("show ip igmp groups"), "239.1.1.1") })

	const name = "mroute/10.0.1.2/239.1.1.1"
	number := uint32(0)
	labtest.Eventually(t, "both routers forward in XDP", func() bool {
		number++
		send(number)
		for _, r := range relays {
			if s := route(ctx, r, name); s == nil || s.State != control.StateActive {
				return false
			}
		}
		// Drain what was in flight while PIM settled.
		for {
			if last, ok := next(t, receiver, 200*time.Millisecond); !ok || last == number {
				return ok
			}
		}
	})
	matched := func(r *relay) uint64 { return route(ctx, r, name).Matched.Packets }
	before := []uint64{matched(relays[0]), matched(relays[1])}
	const count = 3000
	first := number + 1
	go labtest.OnOneCPU(func() {
		for i := range uint32(count) {
			send(first + i)
			time.Sleep(time.Millisecond)
		}
	})
	for want := first; want < first+count; want++ {
		if got, ok := next(t, receiver, labtest.Timeout); !ok || got != want {
			t.Fatalf("number %d, %v: want %d", got, ok, want)
		}
	}
	for i, r := range relays {
		if taken := matched(r) - before[i]; taken != count {
			t.Errorf("router %d forwarded %d packets in XDP, want %d", i, taken, count)
		}
	}
	// The daemons see traffic; otherwise they would drop the entries.
	for i, show := range vtysh {
		if text := show("show ip mroute"); !strings.Contains(text, "239.1.1.1") {
			t.Errorf("router %d: %s", i, text)
		}
		labtest.Eventually(t, fmt.Sprintf("router %d counts packets of the route", i), func() bool {
			number++
			send(first + count + number)
			fields := strings.Fields(after(show("show ip mroute count"), "10.0.1.2"))
			return len(fields) > 2 && fields[0] == "239.1.1.1" && fields[2] != "0"
		})
	}
	// The last receiver leaves: the route loses its output, and the kernel takes it back.
	if err := receiver.Close(); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "the second router has pruned", func() bool {
		s := route(ctx, relays[1], name)
		return s == nil || s.State != control.StateActive
	})
}

// after returns the text after what.
func after(text, what string) string {
	_, rest, _ := strings.Cut(text, what)
	return rest
}

// TestSmcroute: static routes of smcroute are forwarded in XDP, and return to the kernel when it
// ends or removes them.
func TestSmcroute(t *testing.T) {
	ctx := labtest.Context(t)
	n := newNet(t)
	dir := t.TempDir()
	conf := filepath.Join(dir, "smcroute.conf")
	text := "phyint in0 enable\nphyint out0 enable\nphyint out1 enable\nmroute from in0 source 10.0.0.1 group 239.1.1.1 to out0 out1\nmroute from in0 group 239.2.0.0/16 to out0\n"
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "smcroute.sock")
	daemon := start(ctx, t, n.relay, "smcrouted", "-n", "-N", "-f", conf, "-u", socket, "-P", filepath.Join(dir, "pid"))
	r := startRelay(ctx, t, n.relay, noRules, "--mroute", "--mroute-family", "ipv4")
	group, dynamic := netip.MustParseAddrPort("239.1.1.1:5000"), netip.MustParseAddrPort("239.2.7.7:5001")
	var sinks []*net.UDPConn
	for _, h := range n.sinks {
		sinks = append(sinks, member(t, h, group))
	}
	one := member(t, n.sinks[0], dynamic)
	send, sendDynamic := sender(t, n.source, group), sender(t, n.source, dynamic)
	active := func(name string) {
		t.Helper()
		labtest.Eventually(t, name+" is forwarded in XDP", func() bool {
			sendDynamic(0) // the route of a range is created by its first packet
			s := route(ctx, r, name)
			return s != nil && s.State == control.StateActive
		})
	}
	active("mroute/10.0.0.1/239.1.1.1")
	active("mroute/10.0.0.1/239.2.7.7")
	relayed := func(from, to uint32) {
		t.Helper()
		labtest.OnOneCPU(func() {
			for i := from; i < to; i++ {
				send(i)
			}
		})
		for s, c := range sinks {
			for want := from; want < to; want++ {
				if got, ok := next(t, c, labtest.Timeout); !ok || got != want {
					t.Fatalf("sink %d: number %d, %v: want %d", s, got, ok, want)
				}
			}
		}
	}
	relayed(1, 500)
	if s := route(ctx, r, "mroute/10.0.0.1/239.1.1.1"); s.Matched.Packets != 499 || s.Outputs[1].Sent.Packets != 499 {
		t.Errorf("counted: %+v", s)
	}
	if _, ok := next(t, one, labtest.Timeout); !ok {
		t.Error("nothing of the range has come")
	}
	in(ctx, t, n.relay, "smcroutectl", "-u", socket, "remove", "in0", "10.0.0.1", "239.1.1.1")
	labtest.Eventually(t, "the route is gone", func() bool { return route(ctx, r, "mroute/10.0.0.1/239.1.1.1") == nil })
	in(ctx, t, n.relay, "smcroutectl", "-u", socket, "add", "in0", "10.0.0.1", "239.1.1.1", "out0", "out1")
	active("mroute/10.0.0.1/239.1.1.1")
	relayed(500, 600)
	daemon.stop(unix.SIGKILL)
	labtest.Eventually(t, "all routes ended with their daemon", func() bool {
		all, err := control.NewClient(r.socket).Rules(ctx)
		return err == nil && len(all) == 0
	})
}
