package relay

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// iface is an interface as the kernel last described it.
type iface struct {
	name     string
	index    int
	mac      [6]byte
	ethernet bool // frames have an Ethernet header
	loopback bool
	mtu      int
	kind     string // of the device, as netlink names it; "device" for hardware
	parent   int    // index of the device below, 0 for none here
	up       bool   // administratively
	running  bool   // up, and able to carry frames
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
			name: a.Name, index: a.Index, mtu: a.MTU, kind: l.Type(),
			ethernet: a.EncapType == "ether" && len(a.HardwareAddr) == 6,
			loopback: a.RawFlags&unix.IFF_LOOPBACK != 0,
			up:       a.RawFlags&unix.IFF_UP != 0,
			running:  a.RawFlags&unix.IFF_UP != 0 && a.RawFlags&unix.IFF_RUNNING != 0,
		}
		if a.NetNsID < 0 {
			i.parent = a.ParentIndex // else the number means another namespace's
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

// equal says whether nothing has changed that a rule depends on.
func (i *iface) equal(o *iface) bool {
	return i.name == o.name && i.index == o.index && i.mac == o.mac && i.ethernet == o.ethernet &&
		i.mtu == o.mtu && i.up == o.up && i.running == o.running && slices.Equal(i.addrs, o.addrs)
}

// changedNames returns the names of the interfaces that are not as they were,
// those that came and those that went.
func changedNames(before, now map[string]*iface) map[string]bool {
	changed := map[string]bool{}
	for name, i := range now {
		if old := before[name]; old == nil || !old.equal(i) {
			changed[name] = true
		}
	}
	for name := range before {
		if now[name] == nil {
			changed[name] = true
		}
	}
	return changed
}

// ownAddresses returns every unicast address of the host, sorted.
func ownAddresses(interfaces map[string]*iface) []netip.Addr {
	var all []netip.Addr
	for _, i := range interfaces {
		all = append(all, i.addrs...)
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all)
}

// isPattern says whether a rule's interface stands for every interface whose name
// begins with what is before the plus sign.
func isPattern(name string) bool { return strings.HasSuffix(name, "+") }

// matches says whether a rule's interface, a name or a pattern, means an interface.
func matches(pattern, name string) bool {
	if prefix, ok := strings.CutSuffix(pattern, "+"); ok {
		return strings.HasPrefix(name, prefix)
	}
	return pattern == name
}

// matching returns the interfaces that a name or a pattern means, by name. A
// pattern means only those with an Ethernet header: no path could use the others,
// such as the loopback interface.
func (r *Relay) matching(pattern string) []*iface {
	if !isPattern(pattern) {
		if i := r.interfaces[pattern]; i != nil {
			return []*iface{i}
		}
		return nil
	}
	var all []*iface
	for _, i := range r.interfaces {
		if i.ethernet && matches(pattern, i.name) {
			all = append(all, i)
		}
	}
	slices.SortFunc(all, func(a, b *iface) int { return strings.Compare(a.name, b.name) })
	return all
}
