package e2e_test

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// network is the lab of most tests:
//
//	source src0 ---- in0 relay out0 ---- sink0 of sinks[0]
//	                           out1 ---- sink0 of sinks[1]
//	                           out2 ---- sink0 of sinks[2]
//
// The source has 10.1.0.2, the relay 10.1.0.1 and 10.2.N.1, sink N 10.2.N.2.
type network struct {
	t             testing.TB
	source, relay *lab.Host
	sinks         [3]*lab.Host
}

func newNetwork(t testing.TB) *network {
	t.Helper()
	n := &network{t: t, source: labtest.Host(t, "src"), relay: labtest.Host(t, "relay")}
	n.connectInput()
	for i := range n.sinks {
		n.sinks[i] = labtest.Host(t, fmt.Sprintf("sink%d", i))
		n.connectOutput(i)
	}
	return n
}

func (n *network) connectInput() {
	n.t.Helper()
	labtest.Connect(n.t, lab.End{Host: n.relay, Name: "in0", Addrs: []string{"10.1.0.1/24"}},
		lab.End{Host: n.source, Name: "src0", Addrs: []string{"10.1.0.2/24"}})
}

func (n *network) connectOutput(i int) {
	n.t.Helper()
	labtest.Connect(n.t, lab.End{Host: n.relay, Name: fmt.Sprintf("out%d", i), Addrs: []string{fmt.Sprintf("10.2.%d.1/24", i)}},
		lab.End{Host: n.sinks[i], Name: "sink0", Addrs: []string{fmt.Sprintf("10.2.%d.2/24", i)}})
}

// igmp returns the IPv4 groups of each interface, as the kernel lists them, without the all-hosts
// group.
func igmp(t testing.TB, h *lab.Host) map[string][]netip.Addr {
	t.Helper()
	groups := map[string][]netip.Addr{}
	labtest.Do(t, h, func() error {
		f, err := os.Open("/proc/thread-self/net/igmp")
		if err != nil {
			return err
		}
		defer f.Close()
		name := ""
		lines := bufio.NewScanner(f)
		for lines.Scan() {
			fields := strings.Fields(lines.Text())
			if !strings.HasPrefix(lines.Text(), "\t") {
				if len(fields) > 1 {
					name = strings.TrimSuffix(fields[1], ":")
				}
				continue
			}
			// The number is the address as stored in memory.
			n, err := strconv.ParseUint(fields[0], 16, 32)
			if err != nil {
				return fmt.Errorf("line %q: %w", lines.Text(), err)
			}
			var b [4]byte
			binary.NativeEndian.PutUint32(b[:], uint32(n))
			if group := netip.AddrFrom4(b); group != netip.AddrFrom4([4]byte{224, 0, 0, 1}) {
				groups[name] = append(groups[name], group)
			}
		}
		return lines.Err()
	})
	for _, g := range groups {
		slices.SortFunc(g, netip.Addr.Compare)
	}
	return groups
}

// waitJoined waits until an interface is, or is no longer, a member of a group.
func (n *network) waitJoined(ifname, group string, want bool) {
	n.t.Helper()
	eventually(n.t, fmt.Sprintf("membership of %s on %s is %v", group, ifname, want), func() string {
		groups := igmp(n.t, n.relay)
		if slices.Contains(groups[ifname], netip.MustParseAddr(group)) == want {
			return ""
		}
		return fmt.Sprint(groups)
	})
}

// attachedPrograms returns the id of the XDP program of each interface that has one.
func attachedPrograms(t testing.TB, h *lab.Host) map[string]uint32 {
	t.Helper()
	links, err := h.Netlink().LinkList()
	if err != nil {
		t.Fatal(err)
	}
	ids := map[string]uint32{}
	for _, l := range links {
		if x := l.Attrs().Xdp; x != nil && x.Attached {
			ids[l.Attrs().Name] = x.ProgId
		}
	}
	return ids
}

// pins returns the kernel id of every pinned object, by its path below dir.
func pins(t testing.TB, dir string) map[string]uint32 {
	t.Helper()
	ids := map[string]uint32{}
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if os.IsNotExist(err) && path == dir {
			return nil
		}
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		ids[name], err = pinnedID(path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return ids
}

func pinnedID(path string) (uint32, error) {
	switch filepath.Base(filepath.Dir(path)) {
	case "programs":
		p, err := ebpf.LoadPinnedProgram(path, nil)
		if err != nil {
			return 0, err
		}
		defer p.Close()
		info, err := p.Info()
		if err != nil {
			return 0, err
		}
		id, _ := info.ID()
		return uint32(id), nil
	case "links":
		l, err := link.LoadPinnedLink(path, nil)
		if err != nil {
			return 0, err
		}
		defer l.Close()
		info, err := l.Info()
		if err != nil {
			return 0, err
		}
		return uint32(info.ID), nil
	default:
		m, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true})
		if err != nil {
			return 0, err
		}
		defer m.Close()
		info, err := m.Info()
		if err != nil {
			return 0, err
		}
		id, _ := info.ID()
		return uint32(id), nil
	}
}

// setAddr replaces the addresses of an interface of the relay.
func (n *network) setAddr(ifname, cidr string) {
	n.t.Helper()
	l, err := n.relay.Link(ifname)
	if err != nil {
		n.t.Fatal(err)
	}
	old, err := n.relay.Netlink().AddrList(l, netlink.FAMILY_V4)
	if err != nil {
		n.t.Fatal(err)
	}
	for _, a := range old {
		if err := n.relay.Netlink().AddrDel(l, &a); err != nil {
			n.t.Fatal(err)
		}
	}
	if err := n.relay.AddAddr(ifname, cidr); err != nil {
		n.t.Fatal(err)
	}
}

// rename renames an interface of the relay, which must be down.
func (n *network) rename(from, to string) {
	n.t.Helper()
	l, err := n.relay.Link(from)
	if err != nil {
		n.t.Fatal(err)
	}
	for _, err := range []error{
		n.relay.Netlink().LinkSetDown(l), n.relay.Netlink().LinkSetName(l, to), n.relay.Netlink().LinkSetUp(l),
	} {
		if err != nil {
			n.t.Fatal(err)
		}
	}
}
