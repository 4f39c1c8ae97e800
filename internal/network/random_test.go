package network

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

var (
	seedFlag  = flag.Uint64("seed", 0, "seed of TestRandomEvents; 0 takes one from the clock")
	stepsFlag = flag.Int("steps", 60, "events of TestRandomEvents")
)

// stage is a host in which things happen at random.
type stage struct {
	t       *testing.T
	h, away *lab.Host
	rnd     *rand.Rand
	program *ebpf.Program
	// held are the names of links that have left for the other host.
	held  []string
	asked []HopKey
}

func (s *stage) pick(n int) int { return s.rnd.IntN(n) }

// link picks one of the host's links of some kinds; nil when there is none.
func (s *stage) link(kinds ...string) netlink.Link {
	s.t.Helper()
	list, err := s.h.Netlink().LinkList()
	must(s.t, err)
	var fit []netlink.Link
	for _, l := range list {
		for _, kind := range kinds {
			if l.Type() == kind {
				fit = append(fit, l)
			}
		}
	}
	if len(fit) == 0 {
		return nil
	}
	return fit[s.pick(len(fit))]
}

// events are what can happen. An error is an event that the kernel does not let happen.
var events = []struct {
	name string
	do   func(s *stage) error
}{
	{"veth made", func(s *stage) error {
		a := attrs(fmt.Sprint("v", s.pick(4)))
		a.NumRxQueues, a.NumTxQueues = 2, 2
		v := &netlink.Veth{LinkAttrs: a, PeerName: fmt.Sprint("p", s.pick(4)), PeerNumRxQueues: 2, PeerNumTxQueues: 2}
		if s.pick(2) == 0 {
			v.PeerNamespace = netlink.NsFd(s.away.FD())
		}
		return s.h.Netlink().LinkAdd(v)
	}},
	{"link made with an index", func(s *stage) error {
		a := attrs(fmt.Sprint("i", s.pick(3)))
		a.Index = 5000 + s.pick(3)
		return s.h.Netlink().LinkAdd(&netlink.Ifb{LinkAttrs: a})
	}},
	{"bridge made", func(s *stage) error {
		return s.h.Netlink().LinkAdd(&netlink.Bridge{LinkAttrs: attrs(fmt.Sprint("br", s.pick(2)))})
	}},
	{"macvlan made", func(s *stage) error {
		lower := s.link("veth")
		if lower == nil {
			return nil
		}
		a := attrs(fmt.Sprint("m", s.pick(2)))
		a.ParentIndex = lower.Attrs().Index
		return s.h.Netlink().LinkAdd(&netlink.Macvlan{LinkAttrs: a, Mode: netlink.MACVLAN_MODE_BRIDGE})
	}},
	{"deleted", on(func(s *stage, l netlink.Link) error { return s.h.Netlink().LinkDel(l) }, "veth", "ifb", "bridge", "macvlan")},
	{"made again with its index", on(func(s *stage, l netlink.Link) error {
		if err := s.h.Netlink().LinkDel(l); err != nil {
			return err
		}
		a := attrs(l.Attrs().Name)
		a.Index = l.Attrs().Index
		return s.h.Netlink().LinkAdd(&netlink.Ifb{LinkAttrs: a})
	}, "ifb")},
	{"away", on(func(s *stage, l netlink.Link) error {
		err := s.h.Netlink().LinkSetNsFd(l, s.away.FD())
		if err == nil {
			s.held = append(s.held, l.Attrs().Name)
		}
		return err
	}, "veth", "ifb")},
	{"back", func(s *stage) error {
		if len(s.held) == 0 {
			return nil
		}
		name := s.held[0]
		s.held = s.held[1:]
		l, err := s.away.Link(name)
		if err != nil {
			return err
		}
		return s.away.Netlink().LinkSetNsFd(l, s.h.FD())
	}},
	{"up", on(func(s *stage, l netlink.Link) error { return s.h.Netlink().LinkSetUp(l) }, "veth", "ifb", "bridge", "macvlan")},
	{"up", on(func(s *stage, l netlink.Link) error { return s.h.Netlink().LinkSetUp(l) }, "veth", "bridge", "macvlan")},
	{"down", on(func(s *stage, l netlink.Link) error { return s.h.Netlink().LinkSetDown(l) }, "veth", "ifb", "bridge", "macvlan", "device")},
	{"renamed", on(func(s *stage, l netlink.Link) error {
		return s.h.Netlink().LinkSetName(l, fmt.Sprint("n", s.pick(6)))
	}, "veth", "ifb", "bridge", "macvlan")},
	{"MTU", on(func(s *stage, l netlink.Link) error { return s.h.Netlink().LinkSetMTU(l, 1300+s.pick(200)) }, "veth", "ifb", "bridge", "device")},
	{"MAC", on(func(s *stage, l netlink.Link) error {
		return s.h.Netlink().LinkSetHardwareAddr(l, net.HardwareAddr{2, 0, 0, 0, 1, byte(s.pick(250))})
	}, "veth", "ifb", "bridge", "macvlan")},
	{"alternative name", on(func(s *stage, l netlink.Link) error {
		if l.Attrs().Flags&net.FlagUp == 0 {
			return nil // not announced
		}
		return s.h.Netlink().LinkAddAltName(l, fmt.Sprint("alternative-", s.pick(5)))
	}, "veth", "ifb", "bridge")},
	{"alternative name gone", on(func(s *stage, l netlink.Link) error {
		if l.Attrs().Flags&net.FlagUp == 0 || len(l.Attrs().AltNames) == 0 {
			return nil
		}
		return s.h.Netlink().LinkDelAltName(l, l.Attrs().AltNames[0])
	}, "veth", "ifb", "bridge")},
	{"enslaved", on(func(s *stage, l netlink.Link) error {
		br := s.link("bridge")
		if br == nil {
			return nil
		}
		return s.h.Netlink().LinkSetMaster(l, br)
	}, "veth", "ifb")},
	{"freed", on(func(s *stage, l netlink.Link) error { return s.h.Netlink().LinkSetNoMaster(l) }, "veth", "ifb")},
	{"address", on(func(s *stage, l netlink.Link) error { return s.h.Netlink().AddrAdd(l, s.addr()) }, "veth", "ifb", "bridge", "macvlan", "device")},
	{"address", on(func(s *stage, l netlink.Link) error { return s.h.Netlink().AddrAdd(l, s.addr()) }, "veth", "bridge")},
	{"address gone", on(func(s *stage, l netlink.Link) error {
		list, err := s.h.Netlink().AddrList(l, netlink.FAMILY_ALL)
		if err != nil || len(list) == 0 {
			return err
		}
		return s.h.Netlink().AddrDel(l, &list[s.pick(len(list))])
	}, "veth", "ifb", "bridge", "macvlan")},
	{"queues", on(func(s *stage, l netlink.Link) error {
		return s.h.Do(func() error { return lab.SetChannels(l.Attrs().Name, 1+s.pick(2), 1) })
	}, "veth")},
	{"receive offload", on(func(s *stage, l netlink.Link) error {
		return s.h.Do(func() error { return lab.SetGRO(l.Attrs().Name, s.pick(2) == 0) })
	}, "veth")},
	{"program", on(func(s *stage, l netlink.Link) error {
		if l.Attrs().Flags&net.FlagUp == 0 {
			return nil // not announced
		}
		fd, mode := s.program.FD(), unix.XDP_FLAGS_SKB_MODE
		if s.pick(2) == 0 {
			mode = unix.XDP_FLAGS_DRV_MODE
		}
		if l.Attrs().Xdp != nil && l.Attrs().Xdp.Attached {
			fd = -1
			if mode = unix.XDP_FLAGS_SKB_MODE; l.Attrs().Xdp.AttachMode == attachedDriver {
				mode = unix.XDP_FLAGS_DRV_MODE
			}
		}
		return s.h.Do(func() error { return netlink.LinkSetXdpFdWithFlags(l, fd, mode) })
	}, "veth", "bridge")},
	{"route", on(func(s *stage, l netlink.Link) error {
		r := routeTo(s.t, s.h, fmt.Sprintf("10.%d.0.0/%d", s.pick(3), 8+s.pick(12)), "", "")
		r.LinkIndex, r.Scope = l.Attrs().Index, netlink.SCOPE_LINK
		if s.pick(2) == 0 {
			r.Gw, r.Scope = netip.AddrFrom4([4]byte{10, byte(s.pick(3)), 0, 77}).AsSlice(), netlink.SCOPE_UNIVERSE
		}
		return s.h.Netlink().RouteReplace(r)
	}, "veth", "bridge", "macvlan")},
	{"route gone", func(s *stage) error {
		list, err := s.h.Netlink().RouteList(nil, netlink.FAMILY_ALL)
		if err != nil || len(list) == 0 {
			return err
		}
		return s.h.Netlink().RouteDel(&list[s.pick(len(list))])
	}},
	{"neighbour", on(func(s *stage, l netlink.Link) error {
		return s.h.Netlink().NeighSet(&netlink.Neigh{
			LinkIndex: l.Attrs().Index, State: unix.NUD_PERMANENT, HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 2, byte(s.pick(9))},
			IP: netip.AddrFrom4([4]byte{10, byte(s.pick(3)), 0, []byte{2, 77}[s.pick(2)]}).AsSlice(),
		})
	}, "veth", "bridge", "macvlan")},
	{"neighbour gone", on(func(s *stage, l netlink.Link) error {
		list, err := s.h.Netlink().NeighList(l.Attrs().Index, netlink.FAMILY_ALL)
		if err != nil || len(list) == 0 {
			return err
		}
		return s.h.Netlink().NeighDel(&list[s.pick(len(list))])
	}, "veth", "bridge", "macvlan")},
}

// attachedDriver is XDP_ATTACHED_DRV of linux/if_link.h.
const attachedDriver = 1

// on makes an event of something that is done to a link.
func on(do func(s *stage, l netlink.Link) error, kinds ...string) func(*stage) error {
	return func(s *stage) error {
		if l := s.link(kinds...); l != nil {
			return do(s, l)
		}
		return nil
	}
}

func (s *stage) addr() *netlink.Addr {
	if s.pick(3) == 0 {
		a := mustAddr(fmt.Sprintf("2001:db8:%d::%d/64", s.pick(3), 1+s.pick(3)))
		a.Flags |= unix.IFA_F_NODAD
		return a
	}
	return mustAddr(fmt.Sprintf("10.%d.0.%d/%d", s.pick(3), 1+s.pick(3), 8+8*s.pick(3)))
}

// TestRandomEvents: whatever happens in whatever order, what the watcher says is what one
// says that reads everything anew. A seed that failed is repeated with -seed.
func TestRandomEvents(t *testing.T) {
	seed := *seedFlag
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d", seed)
	s := &stage{
		t: t, h: labtest.Host(t, "network"), away: labtest.Host(t, "networka"),
		rnd: rand.New(rand.NewPCG(seed, 0)), program: passing(t),
	}
	f := follow(t, watchHost(t, s.h, receiveBuffer))
	history := []string{}
	defer func() {
		if t.Failed() {
			t.Logf("seed %d: %q", seed, history)
		}
	}()
	lives := map[LinkID]string{} // kinds
	for range *stepsFlag {
		for range 1 + s.pick(3) { // some within one snapshot
			e := events[s.pick(len(events))]
			err := e.do(s)
			history = append(history, fmt.Sprint(e.name, " ", err))
		}
		f.agree(s.h, func() []HopKey { return s.hops(f) })
		for _, l := range f.last.Links() {
			if kind, known := lives[l.LinkID]; known && kind != l.Kind {
				t.Fatalf("link %v was of kind %s and is %s", l.LinkID, kind, l.Kind)
			}
			lives[l.LinkID] = l.Kind
		}
	}
}

// hops asks for ways by all links, and returns what it asked for.
func (s *stage) hops(f *follower) (keys []HopKey) {
	for _, l := range f.last.Links() {
		for _, dst := range []string{"10.0.0.2", "10.1.0.255", "10.2.0.1", "2001:db8::2", "2001:db8:1::1"} {
			keys = append(keys, HopKey{l.LinkID, netip.MustParseAddr(dst)})
		}
	}
	if !slices.Equal(keys, s.asked) {
		f.w.Ask(keys)
		f.last, s.asked = snapshot(s.t, f.w), keys
	}
	return keys
}
