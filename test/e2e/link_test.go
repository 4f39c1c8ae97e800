package e2e_test

import (
	"net"
	"net/netip"
	"testing"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/packet"
)

// ofTheLink stands for the link-local IPv6 address of an interface.
var ofTheLink = netip.MustParseAddr("fe80::")

func linkLocal(t *testing.T, h *lab.Host, ifname string) (found netip.Addr) {
	t.Helper()
	labtest.Do(t, h, func() error {
		i, err := net.InterfaceByName(ifname)
		if err != nil {
			return err
		}
		addrs, err := i.Addrs()
		for _, a := range addrs {
			if p, _ := netip.ParsePrefix(a.String()); p.Addr().Is6() && p.Addr().IsLinkLocalUnicast() {
				found = p.Addr()
			}
		}
		return err
	})
	if !found.IsValid() {
		t.Fatalf("%s has no address of the link", ifname)
	}
	return found
}

func toAll(f *packet.Frame) { f.DstMAC = packet.BroadcastMAC }

// linkFeatures are rules for link-local traffic.
var linkFeatures = []featureCase{
	{name: "mDNS", in: "224.0.0.251:5353%in0,local-control=allow", frame: dst("224.0.0.251", 5353, func(f *packet.Frame) { f.TTL = 255 }),
		out: []string{"224.0.0.251:5353%out0", "224.0.0.251:5353%out1,src=keep", "239.2.2.2:6000%out2"}, want: []func(f *packet.Frame){
			dst("224.0.0.251", 5353), dst("224.0.0.251", 5353, from("10.1.0.2")), dst("239.2.2.2", 6000)}},
	{name: "to a group of the link", in: "239.1.1.1:5000%in0,local-control=allow", out: []string{"224.0.0.230:6000%out0,ttl=1"},
		want: []func(f *packet.Frame){dst("224.0.0.230", 6000, func(f *packet.Frame) { f.TTL = 1 })}},
	{name: "mDNS, ipv6", in: "[ff02::fb]:5353%in0,local-control=allow", frame: v6(dst("ff02::fb", 5353)),
		out: []string{"[ff02::fb]:5353%out0", "[ff05::fb]:5353%out1"}, want: []func(f *packet.Frame){
			dst("ff02::fb", 5353, func(f *packet.Frame) { f.Src = ofTheLink }), dst("ff05::fb", 5353)}},
	{name: "limited broadcast", in: "255.255.255.255:9%in0,broadcast=allow", frame: dst("255.255.255.255", 9, toAll),
		out: []string{"255.255.255.255:9%out0,broadcast=allow", "10.2.1.255:7%out1,broadcast=allow", "239.2.2.2:9%out2"}, want: []func(f *packet.Frame){
			dst("255.255.255.255", 9, toAll), dst("10.2.1.255", 7, toAll), dst("239.2.2.2", 9)}},
	{name: "directed broadcast", in: "10.1.0.255%in0,broadcast=allow", frame: dst("10.1.0.255", 137, toAll),
		out: []string{"10.2.0.255%out0,broadcast=allow,ttl=dec"}, want: []func(f *packet.Frame){
			dst("10.2.0.255", 137, toAll, func(f *packet.Frame) { f.TTL = 15 })}},
	{name: "a group to all hosts of a VLAN", out: []string{"255.255.255.255:+1%out0,broadcast=allow,vlan=7"},
		want: []func(f *packet.Frame){dst("255.255.255.255", 5001, toAll, tags(7))}},
	{name: "own broadcast", in: "255.255.255.255:9%in0,broadcast=allow", frame: dst("255.255.255.255", 9, toAll, from("10.2.1.1")),
		out: []string{"239.2.2.2:9%out2"}, drop: "loop"},
}

// TestLinkFeatures: link-local groups and broadcast are relayed when rules ask for it, on every
// path.
func TestLinkFeatures(t *testing.T) {
	onPaths(t, func(t *testing.T, n *network, in *instance, path string) { runFeatures(t, linkFeatures, n, in, path) })
}
