package relay

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// iface is an interface as the kernel last described it.
type iface struct {
	name     string
	index    int
	mac      [6]byte
	ethernet bool // frames have an Ethernet header
	mtu      int
	up       bool // administratively
	running  bool // up, and able to carry frames
	addrs    []netip.Addr
}

// firstAddr is the source address for src=iface: the first of the family, for IPv6
// rather one that is valid beyond the link.
func (i *iface) firstAddr(is4 bool) (addr netip.Addr, ok bool) {
	for _, a := range i.addrs {
		if a.Is4() != is4 {
			continue
		}
		if !a.IsLinkLocalUnicast() {
			return a, true
		}
		if !addr.IsValid() {
			addr = a
		}
	}
	return addr, addr.IsValid()
}

// dumps is how often a list that changes while it is read is read again.
const dumps = 10

// readAll calls read until the kernel has not interrupted it. What an interrupted
// dump lacks would look as if it were gone.
func readAll[T any](what string, read func() ([]T, error)) ([]T, error) {
	for try := 1; ; try++ {
		all, err := read()
		if err == nil {
			return all, nil
		}
		if try == dumps || !errors.Is(err, netlink.ErrDumpInterrupted) {
			return nil, fmt.Errorf("list %s: %w", what, err)
		}
	}
}

// readInterfaces asks the kernel for all interfaces and their addresses.
func readInterfaces() (map[string]*iface, error) {
	links, err := readAll("interfaces", netlink.LinkList)
	if err != nil {
		return nil, err
	}
	byIndex := make(map[int]*iface, len(links))
	byName := make(map[string]*iface, len(links))
	for _, l := range links {
		a := l.Attrs()
		i := &iface{
			name: a.Name, index: a.Index, mtu: a.MTU,
			ethernet: a.EncapType == "ether" && len(a.HardwareAddr) == 6,
			up:       a.RawFlags&unix.IFF_UP != 0,
			running:  a.RawFlags&unix.IFF_UP != 0 && a.RawFlags&unix.IFF_RUNNING != 0,
		}
		if i.ethernet {
			i.mac = [6]byte(a.HardwareAddr)
		}
		byIndex[i.index], byName[i.name] = i, i
	}
	addrs, err := readAll("addresses", func() ([]netlink.Addr, error) {
		return netlink.AddrList(nil, netlink.FAMILY_ALL)
	})
	if err != nil {
		return nil, err
	}
	for _, a := range addrs {
		i := byIndex[a.LinkIndex]
		addr, ok := netip.AddrFromSlice(a.IP)
		if i == nil || !ok || a.Flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) != 0 && a.Flags&unix.IFA_F_OPTIMISTIC == 0 {
			continue
		}
		i.addrs = append(i.addrs, addr.Unmap())
	}
	return byName, nil
}

// isLocal says whether an address is one of the host's.
func isLocal(interfaces map[string]*iface, addr netip.Addr) bool {
	for _, i := range interfaces {
		if slices.Contains(i.addrs, addr) {
			return true
		}
	}
	return false
}

// linkWatch tells when interfaces or addresses change. What changed is not told:
// the reader asks the kernel again, so that an overflow loses nothing.
type linkWatch struct {
	changed chan struct{} // holds at most one
	socket  *os.File
	ended   chan struct{}
}

// watchLinks listens to the kernel's announcements (rtnetlink(7)) in the network
// namespace of the calling thread. The caller must Close it.
func watchLinks() (*linkWatch, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	groups := uint32(0)
	for _, g := range []uint{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR} {
		groups |= 1 << (g - 1)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		return nil, errors.Join(fmt.Errorf("bind netlink socket: %w", err), unix.Close(fd))
	}
	w := &linkWatch{changed: make(chan struct{}, 1), socket: os.NewFile(uintptr(fd), "rtnetlink"), ended: make(chan struct{})}
	go w.run()
	return w, nil
}

func (w *linkWatch) run() {
	defer close(w.ended)
	buf := make([]byte, 65536)
	for {
		// ENOBUFS: announcements were lost, so something has changed.
		if _, err := w.socket.Read(buf); err != nil && !errors.Is(err, unix.ENOBUFS) {
			return
		}
		select {
		case w.changed <- struct{}{}:
		default:
		}
	}
}

// Close ends the watch.
func (w *linkWatch) Close() error {
	err := w.socket.Close()
	<-w.ended
	return err
}
