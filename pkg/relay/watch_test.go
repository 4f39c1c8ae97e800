package relay

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
)

// TestOverflowIsNotForgotten: announcements that the kernel had no room for are told as
// lost, whatever else is read before somebody asks.
func TestOverflowIsNotForgotten(t *testing.T) {
	host := labtest.Host(t, "watch")
	w := &watch{changed: make(chan struct{}, 1)}
	labtest.Do(t, host, func() error {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		w.socket = os.NewFile(uintptr(fd), "rtnetlink")
		return errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1), // the least there is
			unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (unix.RTNLGRP_LINK - 1)}))
	})
	for i := range 20 {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = fmt.Sprint("a", i)
		if err := host.Netlink().LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: fmt.Sprint("b", i)}); err != nil {
			t.Fatal(err)
		}
	}
	w.running.Go(func() { w.run(w.socket, w.note) })
	defer func() {
		if err := w.socket.Close(); err != nil {
			t.Error(err)
		}
		w.running.Wait()
	}()
	var got news
	labtest.Eventually(t, "all that is left in the socket is read", func() bool {
		n := w.take()
		got.links, got.lost = got.links || n.links, got.lost || n.lost
		return got.links && got.lost
	})
	// Told once, and by the next one that asks, whatever comes in between.
	w.note(nil, true)
	w.note(nil, false)
	if n := w.take(); !n.lost {
		t.Error("a loss is forgotten when something else is read")
	}
	if n := w.take(); n.lost {
		t.Error("a loss is told twice")
	}
}
