package lab_test

import (
	"errors"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// A host asks the kernel for no netlink family but rtnetlink: the others are modules, which
// need not be there.
func TestHostNeedsNoNetlinkModules(t *testing.T) {
	nl := labtest.Host(t, "lab").Netlink()
	for family := range unix.NETLINK_CRYPTO + 2 {
		if got, want := nl.SupportsNetlinkFamily(family), family == unix.NETLINK_ROUTE; got != want {
			t.Errorf("netlink family %d: open %v, want %v", family, got, want)
		}
	}
}

func TestConnectCarriesTraffic(t *testing.T) {
	a, b := labtest.Host(t, "laba"), labtest.Host(t, "labb")
	labtest.Connect(t, lab.End{Host: a, Name: "eth0", Addrs: []string{"10.1.0.1/24"}}, lab.End{Host: b, Name: "eth0", Addrs: []string{"10.1.0.2/24"}})
	var rx net.PacketConn
	if err := b.Do(func() (err error) {
		rx, err = net.ListenPacket("udp4", "10.1.0.2:7")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer rx.Close()
	if err := a.Do(func() error {
		c, err := net.Dial("udp4", "10.1.0.2:7")
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("hello"))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 16)
	n, _, err := rx.ReadFrom(buf)
	if err != nil || string(buf[:n]) != "hello" {
		t.Fatalf("got %q, %v", buf[:n], err)
	}
}

func TestCloseRemovesNamespace(t *testing.T) {
	labtest.RequireRoot(t)
	h, err := lab.NewHost(lab.UniqueName("labc"))
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(h.Path()); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("%s is still there: %v", h.Path(), err)
	}
}

func TestNewHostRefusesATakenName(t *testing.T) {
	h := labtest.Host(t, "labd")
	if second, err := lab.NewHost(h.Name); err == nil {
		second.Close()
		t.Fatal("a second host with the same name was made")
	}
	if _, err := os.Stat(h.Path()); err != nil {
		t.Fatalf("the first host was damaged: %v", err)
	}
}

func TestReleasedNamespaceStaysUntilRemove(t *testing.T) {
	labtest.RequireRoot(t)
	h, err := lab.NewHost(lab.UniqueName("labe"))
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Release(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(h.Path()); err != nil {
		t.Errorf("it went with Release: %v", err)
	}
	for range 2 { // the second time there is none
		if err := lab.Remove(h.Name); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(h.Path()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there: %v", h.Path(), err)
		}
	}
}
