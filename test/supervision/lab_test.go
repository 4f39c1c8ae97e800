// Package supervision tests group membership end to end: the relay, real traffic and a switch that
// forwards only what its hosts have joined.
package supervision

import (
	"context"
	"encoding/binary"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/vishvananda/netlink/nl"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/internal/relay"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
	"xdpcast/pkg/rules"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// network is a source, the relay and a sink. The relay's in connects to the source, possibly over a
// switch, and its out to the sink.
type network struct {
	source, relayHost, sink *lab.Host
	r                       *relay.Relay

	send    *labtest.Tap // at the source
	stack   *labtest.Tap // at the relay's in: what the relay program passes
	receive *labtest.Tap // at the sink
	number  uint32       // of the last fence
	from    string       // source in rules, followed by "@"; empty: any
}

// newNetwork starts a relay; joinIn connects the source's eth0 to the relay's in.
func newNetwork(t *testing.T, joinIn func(source, relay lab.End)) *network {
	t.Helper()
	n := &network{source: labtest.Host(t, "src"), relayHost: labtest.Host(t, "rly"), sink: labtest.Host(t, "snk")}
	joinIn(lab.End{Host: n.source, Name: "eth0", Addrs: []string{"10.0.0.1/24", "fd00::1/64"}},
		lab.End{Host: n.relayHost, Name: "in", Addrs: []string{"10.0.0.2/24", "fd00::2/64"}})
	labtest.Connect(t, lab.End{Host: n.relayHost, Name: "out", Addrs: []string{"10.1.0.1/24", "fd01::1/64"}},
		lab.End{Host: n.sink, Name: "eth0", Addrs: []string{"10.1.0.2/24", "fd01::2/64"}})
	n.send = labtest.NewTap(t, n.source, "eth0")
	n.stack = labtest.NewTap(t, n.relayHost, "in")
	n.receive = labtest.NewTap(t, n.sink, "eth0")
	n.r = startRelay(t, n.relayHost)
	return n
}

// startRelay runs a relay on a host until the test ends.
func startRelay(t *testing.T, h *lab.Host) *relay.Relay {
	t.Helper()
	dir := t.TempDir()
	opts := relay.Options{
		Loader: loader.Options{PinDir: filepath.Join(dir, "bpf", "xdpcast"), RunDir: filepath.Join(dir, "run")},
		Logger: slog.New(slog.DiscardHandler),
	}
	ctx, cancel := context.WithCancel(context.Background())
	started, done := make(chan *relay.Relay, 1), make(chan error, 1)
	go func() {
		done <- h.Do(func() error {
			r, err := relay.New(opts)
			if err != nil {
				return err
			}
			return r.Run(ctx, func() { started <- r })
		})
	}()
	t.Cleanup(func() { // after the one below
		if err := unix.Unmount(filepath.Join(dir, "bpf"), unix.MNT_DETACH); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	select {
	case r := <-started:
		t.Cleanup(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("relay: %v", err)
			}
		})
		return r
	case err := <-done:
		cancel()
		t.Fatalf("start relay: %v", err)
	case <-time.After(labtest.Timeout):
		cancel()
		t.Fatal("the relay does not start")
	}
	return nil
}

// plain connects two ends by a wire.
func plain(t *testing.T) func(a, b lab.End) {
	return func(a, b lab.End) { labtest.Connect(t, a, b) }
}

// Times of the switch, in hundredths of a second: the kernel's minimum, so that tests wait less.
const (
	queryInterval      = 100
	queryResponse      = 30
	lastMemberInterval = 10
)

// snooping connects two ends by a switch that snoops on IGMP and MLD, and queries its hosts in the
// given versions, from 10.0.0.254 and a link-local address.
func snooping(t *testing.T, igmpVersion, mldVersion uint8) func(a, b lab.End) {
	return func(a, b lab.End) {
		t.Helper()
		sw := labtest.Host(t, "sw")
		labtest.SetBridge(t, sw, unix.NLM_F_CREATE|unix.NLM_F_EXCL, map[int][]byte{
			nl.IFLA_BR_MCAST_SNOOPING:             {1},
			nl.IFLA_BR_MCAST_QUERY_USE_IFADDR:     {1},
			nl.IFLA_BR_MCAST_IGMP_VERSION:         {igmpVersion},
			nl.IFLA_BR_MCAST_MLD_VERSION:          {mldVersion},
			nl.IFLA_BR_MCAST_LAST_MEMBER_INTVL:    nl.Uint64Attr(lastMemberInterval),
			nl.IFLA_BR_MCAST_QUERY_INTVL:          nl.Uint64Attr(queryInterval),
			nl.IFLA_BR_MCAST_STARTUP_QUERY_INTVL:  nl.Uint64Attr(queryInterval),
			nl.IFLA_BR_MCAST_QUERY_RESPONSE_INTVL: nl.Uint64Attr(queryResponse),
		})
		if err := sw.AddAddr("br0", "10.0.0.254/24"); err != nil {
			t.Fatal(err)
		}
		if err := sw.SetUp("br0", true); err != nil {
			t.Fatal(err)
		}
		for i, end := range []lab.End{a, b} {
			port := []string{"port0", "port1"}[i]
			labtest.Connect(t, end, lab.End{Host: sw, Name: port})
			labtest.Enslave(t, sw, port)
		}
		// Set last: the querier waits for the response time set above before it trusts what it has
		// learned.
		labtest.SetBridge(t, sw, 0, map[int][]byte{nl.IFLA_BR_MCAST_QUERIER: {1}})
	}
}

const inPort, outPort = 5000, 6000

// frame is a packet from the source to a group.
func frame(group netip.Addr, payload []byte) []byte {
	src := netip.MustParseAddr("10.0.0.1")
	if group.Is6() {
		src = netip.MustParseAddr("fd00::1")
	}
	return packet.Frame{
		DstMAC: packet.MulticastMAC(group), SrcMAC: [6]byte{2, 0, 0, 0, 0, 1},
		Src: src, Dst: group, SrcPort: 4000, DstPort: inPort, TTL: 8, Payload: payload,
	}.Build()
}

// payload returns the payload of a UDP frame to the given port; ok is false for other frames.
func payload(b []byte, port uint16) (group netip.Addr, data []byte, ok bool) {
	h, ok := packet.Parse(b)
	if !ok || h.DstPort != port || !h.Dst.IsMulticast() {
		return netip.Addr{}, nil, false
	}
	return h.Dst, b[h.UDP+8 : h.L3+h.L3Len], true
}

// reached counts where the packets of a probe arrived, by group: at the relay's stack without a
// rule, or at the sink.
type reached struct {
	stack, sink map[netip.Addr]int
}

// Fences are two frames that follow others on their path: one goes to every host behind the switch,
// the other through the relay to the sink.
const (
	fenceType    = 0x88b5 // local experimental (IEEE 802)
	fenceTimeout = 3 * time.Second
)

// fenceHeader is the Ethernet header of the first.
var fenceHeader = append(append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, 2, 0, 0, 0, 0, 1), fenceType>>8, fenceType&0xff)

// probe sends a packet to each group and returns where they arrived. It sends them in batches that
// fit every queue on the path, each followed by fences. The group of the fences must be relayed; ok
// is false if a fence did not arrive within fenceTimeout.
func (n *network) probe(fence netip.Addr, groups []netip.Addr) (got reached, ok bool) {
	return n.probeFor(fenceTimeout, fence, groups)
}

func (n *network) probeFor(patience time.Duration, fence netip.Addr, groups []netip.Addr) (got reached, ok bool) {
	const lot = 64
	got = reached{map[netip.Addr]int{}, map[netip.Addr]int{}}
	for len(groups) > 0 {
		now := groups[:min(lot, len(groups))]
		groups = groups[len(now):]
		for _, group := range now {
			n.send.Send(frame(group, []byte("probe")))
		}
		n.number++
		number := binary.BigEndian.AppendUint32(nil, n.number)
		n.send.Send(append(append([]byte{}, fenceHeader...), append(number, make([]byte, 46)...)...))
		n.send.Send(frame(fence, number))
		atStack := n.stack.Receive(patience, func(b []byte) bool {
			if group, _, ok := payload(b, inPort); ok {
				got.stack[group]++
			}
			return binary.BigEndian.Uint16(b[12:]) == fenceType && binary.BigEndian.Uint32(b[14:]) == n.number
		})
		atSink := n.receive.Receive(patience, func(b []byte) bool {
			group, data, ok := payload(b, outPort)
			if !ok {
				return false
			}
			if group != fence {
				got.sink[group]++
				return false
			}
			return binary.BigEndian.Uint32(data) == n.number
		})
		if atStack == nil || atSink == nil {
			return got, false
		}
	}
	return got, true
}

// apply replaces the relay's rules by one per group, which keeps its address.
func (n *network) apply(t *testing.T, groups ...netip.Addr) {
	t.Helper()
	all := make([]rules.Rule, len(groups))
	for i, group := range groups {
		host := func(port, ifname string) string { return net.JoinHostPort(group.String(), port) + "%" + ifname }
		rule, err := control.ToRule(control.Rule{Name: "to-" + group.String(), In: n.from + host("5000", "in"), Out: []string{host("6000", "out")}})
		if err != nil {
			t.Fatal(err)
		}
		all[i] = rule
	}
	if _, err := n.r.Apply(context.Background(), all, control.ApplyOptions{}); err != nil {
		t.Fatal(err)
	}
}

func (n *network) groups(t *testing.T) []control.Group {
	t.Helper()
	all, err := n.r.Groups(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// consecutive returns n addresses starting at first.
func consecutive(first string, n int) []netip.Addr {
	all := make([]netip.Addr, n)
	for i, addr := 0, netip.MustParseAddr(first); i < n; i, addr = i+1, addr.Next() {
		all[i] = addr
	}
	return all
}
