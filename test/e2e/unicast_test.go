package e2e_test

import (
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/internal/traffic"
	"xdpcast/pkg/flow"
)

// gateway adds a route to a network through a gateway on an interface of the relay.
func (n *network) gateway(dst, gateway, ifname string) {
	n.t.Helper()
	ipnet, err := netlink.ParseIPNet(dst)
	if err != nil {
		n.t.Fatal(err)
	}
	l, err := n.relay.Link(ifname)
	if err != nil {
		n.t.Fatal(err)
	}
	if err := n.relay.Netlink().RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipnet, Gw: net.ParseIP(gateway)}); err != nil {
		n.t.Fatal(err)
	}
}

func macOf(t *testing.T, h *lab.Host, name string) [6]byte {
	t.Helper()
	l, err := h.Link(name)
	if err != nil {
		t.Fatal(err)
	}
	return [6]byte(l.Attrs().HardwareAddr)
}

// waitNextHop waits until an output of a rule sends to a link-layer address.
func (in *instance) waitNextHop(name string, slot int, mac [6]byte) {
	in.t.Helper()
	in.waitKernel("the next hop is "+net.HardwareAddr(mac[:]).String(), func(all []flow.Flow) string {
		for _, r := range all {
			if r.Name == name && r.Out[slot].Ready && r.Out[slot].DstMAC == mac {
				return ""
			}
		}
		return "it is not"
	})
}

// TestUnicastOutput sends one stream to a group, a neighbour and a host behind a gateway. Whatever
// happens on the paths to the last two, the group misses nothing.
func TestUnicastOutput(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	in.start()
	// Probe at once and once per second, not for 3 seconds and every 5.
	for _, name := range []string{"out1", "out2"} {
		labtest.Sysctl(t, n.relay, "net/ipv4/neigh/"+name+"/retrans_time_ms", "20")
		labtest.Sysctl(t, n.relay, "net/ipv4/neigh/"+name+"/interval_probe_time_ms", "1000")
	}
	if err := n.sinks[2].AddAddr("lo", "10.99.0.5/32"); err != nil {
		t.Fatal(err)
	}
	in.add("mixed", "239.1.1.1:5000%in0", "239.2.2.0:6000%out0", "10.2.1.2:6000%out1", "10.99.0.5:6000%out2")
	group := receive(t, n.sinks[0], "239.2.2.0:6000%sink0", traffic.Expected{Source: netip.MustParseAddr("10.2.0.1")})
	in.waitNextHop("mixed", 1, macOf(t, n.sinks[1], "sink0"))
	in.waitOutput("mixed", 2, "no_neighbour", "no route to 10.99.0.5 by interface out2")
	stream := send(t, n.source, traffic.SendConfig{Target: target(t, "239.1.1.1:5000%src0"), TTL: 16, Rate: traffic.Rate{Value: easy}})
	stream.flows(300)
	arrives := func(sink int, endpoint string) {
		t.Helper()
		t.Run("arrives at "+endpoint, func(t *testing.T) { // ends the receiver
			receive(t, n.sinks[sink], endpoint, traffic.Expected{}).wait(200)
		})
	}
	arrives(1, "10.2.1.2:6000%sink0")

	// The host behind a gateway that does not answer, then behind one that does.
	n.gateway("10.99.0.0/24", "10.2.2.77", "out2")
	in.waitOutput("mixed", 2, "no_neighbour", "gateway 10.2.2.77 of 10.99.0.5 does not answer on interface out2")
	n.gateway("10.99.0.0/24", "10.2.2.2", "out2")
	in.waitOutput("mixed", 2, control.StateActive, "")
	arrives(2, "10.99.0.5:6000%sink0")

	// The neighbour gets another MAC and announces it.
	labtest.Sysctl(t, n.sinks[1], "net/ipv4/conf/sink0/arp_notify", "1")
	setMAC(t, n.sinks[1], "sink0", "02:00:00:00:00:55")
	in.waitNextHop("mixed", 1, [6]byte{2, 0, 0, 0, 0, 0x55})
	arrives(1, "10.2.1.2:6000%sink0")

	// A killed daemon leaves the neighbours resolved; the next one continues.
	in.running.stop(syscall.SIGKILL)
	stream.flows(300)
	arrives(1, "10.2.1.2:6000%sink0")
	in.start()
	in.waitOutput("mixed", 1, control.StateActive, "")
	in.waitOutput("mixed", 2, control.StateActive, "")
	arrives(2, "10.99.0.5:6000%sink0")

	sent := stream.stop()
	if fault := group.finish(sent); fault != "" {
		t.Error(fault)
	}
	got := in.checkSum(t, "mixed", sent)
	if !slices.ContainsFunc(got.Outputs[2].Drops, func(d control.Drop) bool { return d.Reason == "no_neighbour" && d.Packets > 0 }) {
		t.Errorf("output 2 dropped %v, want some for want of a neighbour", got.Outputs[2].Drops)
	}
}

// TestUnicastToMulticast relays packets sent to the relay's own address, as at the end of a tunnel
// through a network without multicast.
func TestUnicastToMulticast(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	in.start()
	in.add("tunnel", "10.1.0.1:5000%in0", "239.2.2.0:6000%out0", "10.2.1.2:6000%out1")
	in.waitNextHop("tunnel", 1, macOf(t, n.sinks[1], "sink0"))
	n.probe("10.1.0.1:5000", n.end(0), ends{n.sinks[1], "10.2.1.2:6000%sink0", "10.2.1.1"})
	in.checkSum(t, "tunnel", 200)
}
