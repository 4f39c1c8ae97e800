package fanout

import (
	"net"
	"testing"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// A sender and a group of an interface that is gone report it, even if another interface has
// its index now.
func TestInterfaceIsAnother(t *testing.T) {
	host, peer := labtest.Host(t, "fan"), labtest.Host(t, "peer")
	labtest.Connect(t, lab.End{Host: host, Name: "eth0"}, lab.End{Host: peer, Name: "eth0"})
	labtest.Enter(t, host)
	eth0, err := net.InterfaceByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	s, err := OpenSender(eth0.Index, SenderOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	g, err := Open(Options{Interface: "eth0", Index: eth0.Index, Workers: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	if s.Stale() || g.Gone() {
		t.Errorf("sender stale: %v, group gone: %v, to begin with", s.Stale(), g.Gone())
	}
	if err := host.SetUp("eth0", false); err != nil {
		t.Fatal(err)
	}
	if s.Stale() || g.Gone() {
		t.Errorf("sender stale: %v, group gone: %v, of an interface that is down", s.Stale(), g.Gone())
	}
	l, err := host.Link("eth0")
	if err == nil {
		err = host.Netlink().LinkDel(l)
	}
	if err != nil {
		t.Fatal(err)
	}
	if !s.Stale() || !g.Gone() {
		t.Errorf("sender stale: %v, group gone: %v, of an interface that is gone", s.Stale(), g.Gone())
	}
	labtest.Connect(t, lab.End{Host: host, Name: "eth0", Index: eth0.Index}, lab.End{Host: peer, Name: "eth0"})
	if !s.Stale() || !g.Gone() {
		t.Errorf("sender stale: %v, group gone: %v, of an interface that is another now", s.Stale(), g.Gone())
	}
}
