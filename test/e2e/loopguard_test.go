package e2e_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/packet"
	"xdpcast/pkg/rules"
)

// lans is a number of LANs, each a flooding bridge, a host with an interface on each (lan0, lan1,
// ...; 10.N.0.100), and relays with the same (10.N.0.1 and up).
type lans struct {
	t      testing.TB
	sw     *lab.Host
	host   *lab.Host
	taps   []*labtest.Tap
	macs   [][6]byte
	relays []*instance          // that the test has asked for
	idle   []*instance          // further ones, with an interface on each LAN and without rules
	sent   int                  // packets sent by host so far
	marker string               // begins each payload
	suffix string               // ends the name of each rule
	read   map[*instance]uint64 // number of the last event of each relay that loopEvents has read
	loops  int                  // of which so many were of loops
	// kept are the rules of idle relays: they keep open what a path opens for the first rule.
	kept []rules.Rule
	// meant makes rules two-way if they do not set loop themselves.
	meant bool
	// pause is the delay of a reflector before it sends.
	pause time.Duration
}

// mostExtra is the number of packets that a loop may add to the expected ones in every test.
const mostExtra = 100

func newLANs(t testing.TB, n int) *lans {
	t.Helper()
	l := &lans{t: t, sw: labtest.Host(t, "switch"), host: labtest.Host(t, "host"), marker: "loop guard test ", read: map[*instance]uint64{}}
	for i := range n {
		snooping := false
		bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("lan%d", i)}, MulticastSnooping: &snooping}
		if err := l.sw.Netlink().LinkAdd(bridge); err != nil {
			t.Fatal(err)
		}
		if err := l.sw.SetUp(bridge.Name, true); err != nil {
			t.Fatal(err)
		}
		name := fmt.Sprintf("lan%d", i)
		l.plug(l.host, i, name, fmt.Sprintf("10.%d.0.100/24", i))
		l.taps = append(l.taps, labtest.NewTap(t, l.host, name))
		l.macs = append(l.macs, l.mac(l.host, name))
	}
	return l
}

// plug connects an interface of a host to a LAN.
func (l *lans) plug(h *lab.Host, lan int, name, addr string) {
	l.t.Helper()
	port := fmt.Sprintf("p%d-%s", lan, h.Name[max(0, len(h.Name)-8):])
	if len(name) > 4 { // a second interface on the same LAN
		port = "q" + port[1:]
	}
	labtest.Connect(l.t, lab.End{Host: h, Name: name, Addrs: []string{addr}}, lab.End{Host: l.sw, Name: port})
	// The bridge passes tags to the port as metadata, where XDP does not see them.
	labtest.Do(l.t, l.sw, func() error { return lab.SetFeature(port, "tx-vlan-hw-insert", false) })
	bridge, err := l.sw.Link(fmt.Sprintf("lan%d", lan))
	if err != nil {
		l.t.Fatal(err)
	}
	end, err := l.sw.Link(port)
	if err == nil {
		err = l.sw.Netlink().LinkSetMaster(end, bridge)
	}
	if err != nil {
		l.t.Fatal(err)
	}
}

func (l *lans) mac(h *lab.Host, name string) [6]byte {
	l.t.Helper()
	link, err := h.Link(name)
	if err != nil {
		l.t.Fatal(err)
	}
	return [6]byte(link.Attrs().HardwareAddr)
}

// relay starts a relay with an interface on each of the LANs, unless one is idle.
func (l *lans) relay(on ...int) *instance {
	l.t.Helper()
	if len(l.idle) > 0 {
		in := l.idle[0]
		l.idle = l.idle[1:]
		l.relays = append(l.relays, in)
		return in
	}
	number := len(l.relays) + 1
	h := labtest.Host(l.t, fmt.Sprintf("relay%d", number))
	for _, lan := range on {
		l.plug(h, lan, fmt.Sprintf("lan%d", lan), fmt.Sprintf("10.%d.0.%d/24", lan, number))
	}
	in := newInstance(l.t, h)
	in.start()
	l.relays = append(l.relays, in)
	return in
}

// keep gives the relays a rule of a path on each of three LANs, for packets that nobody sends.
func (l *lans) keep(path string) {
	l.t.Helper()
	for i := range 3 {
		rule, err := control.ToRule(control.Rule{
			Name: fmt.Sprint("kept", i), Path: path, In: fmt.Sprintf("239.99.1.%d:9%%lan%d", i, i), Out: []string{fmt.Sprintf("239.99.2.%d:9%%lan%d", i, (i+1)%3)},
		})
		if err != nil {
			l.t.Fatal(err)
		}
		l.kept = append(l.kept, rule)
	}
	for _, in := range l.relays {
		if _, err := in.client.Apply(l.t.Context(), l.kept, control.ApplyOptions{}); err != nil {
			l.t.Fatal(err)
		}
	}
}

// lend lends the relays to a subtest, which finds them without rules of its own, and so leaves them. The
// number distinguishes its packets and rules from those of earlier subtests.
func (l *lans) lend(t *testing.T, number int) *lans {
	t.Helper()
	lent := *l
	lent.t, lent.relays, lent.idle = t, nil, nil
	lent.read, lent.loops = map[*instance]uint64{}, 0
	lent.marker, lent.suffix = fmt.Sprintf("loop guard test %d ", number), fmt.Sprintf("-%d", number)
	for _, in := range l.relays {
		of := *in
		of.t = t
		lent.idle = append(lent.idle, &of)
	}
	t.Cleanup(func() {
		for _, in := range lent.relays {
			if _, err := in.client.Apply(context.Background(), l.kept, control.ApplyOptions{}); err != nil {
				t.Errorf("remove the rules: %v", err)
			}
		}
	})
	return &lent
}

func (l *lans) marked(frame []byte) bool { return bytes.Contains(frame, []byte(l.marker)) }

// frame is a datagram from the host to a group on a LAN.
func (l *lans) frame(lan int, dst netip.AddrPort, payload string, change ...func(*packet.Frame)) []byte {
	src := netip.AddrFrom4([4]byte{10, byte(lan), 0, 100})
	if dst.Addr().Is6() {
		src = netip.MustParseAddr(fmt.Sprintf("fd00:%d::100", lan))
	}
	f := packet.Frame{
		SrcMAC: l.macs[lan], DstMAC: packet.MulticastMAC(dst.Addr()), Src: src, Dst: dst.Addr(),
		SrcPort: 40000, DstPort: dst.Port(), TTL: 64, Payload: []byte(l.marker + payload),
	}
	for _, c := range change {
		c(&f)
	}
	return f.Build()
}

func (l *lans) send(lan int, frame []byte) {
	l.t.Helper()
	l.taps[lan].Send(frame)
	l.sent++
}

// counts waits until enough marked packets have arrived on the LANs and no more do for a while, and
// returns the number on each. Exceeding a bound means that the loop continues.
func (l *lans) counts(enough func(got []int) bool) []int {
	l.t.Helper()
	got := make([]int, len(l.taps))
	deadline := time.Now().Add(patience) // a relay on a busy machine may pause for longer than quiet
	for {
		i := labtest.ReceiveAny(l.taps, 150*time.Millisecond, l.marked)
		if i < 0 && (enough(got) || time.Now().After(deadline)) {
			return got
		}
		if i < 0 {
			continue
		}
		if got[i]++; got[i] > 20*mostExtra {
			l.t.Fatalf("packets do not stop: %v on the LANs after %d sent", got, l.sent)
		}
	}
}

// least is enough for counts when the LANs have n packets together.
func least(n int) func([]int) bool { return func(got []int) bool { return sum(got) >= n } }

func sum(counts []int) (n int) {
	for _, c := range counts {
		n += c
	}
	return n
}

// looping returns the rules that are looping, with their loops.
func (l *lans) looping() (all []string) {
	l.t.Helper()
	for i, in := range l.relays {
		for _, r := range in.rules() {
			if r.State == control.StateLooping {
				all = append(all, fmt.Sprintf("relay %d rule %s: %s", i+1, r.Name, r.Reason))
			}
		}
	}
	return all
}

// loopEvents is the number of events of loops that began. It reads each event once.
func (l *lans) loopEvents() int {
	l.t.Helper()
	for _, in := range l.relays {
		err := in.client.Events(l.t.Context(), control.EventQuery{After: l.read[in]}, func(e control.Event) error {
			l.read[in] = max(l.read[in], e.Number)
			if strings.Contains(e.Text(), ": looping: ") {
				l.loops++
			}
			return nil
		})
		if err != nil {
			l.t.Fatal(err)
		}
	}
	return l.loops
}

// add adds a rule to one of the relays.
func (l *lans) add(in *instance, path, name, input string, outputs ...string) {
	l.t.Helper()
	if l.meant && !strings.Contains(input, "loop=") {
		input += ",loop=two-way"
	}
	addPath(in, path, name+l.suffix, input, outputs...)
}

// addPath adds a rule with a path.
func addPath(in *instance, path, name, input string, outputs ...string) {
	in.t.Helper()
	status, err := in.client.AddRule(in.t.Context(), control.Rule{Name: name, In: input, Out: outputs, Path: path})
	if err != nil {
		in.t.Fatal(err)
	}
	if status.State != control.StateActive {
		in.waitState(name, control.StateActive)
	}
}

// guardPaths are the paths that every loop is tried on.
var guardPaths = []string{"kernel", "afxdp", "fanout"}

// twoWay adds the rules that relay a group in both directions.
func (l *lans) twoWay(in *instance, path, group string, a, b int, policy string) {
	l.t.Helper()
	addPath(in, path, "there"+l.suffix, fmt.Sprintf("%s%%lan%d,loop=two-way", group, a), fmt.Sprintf("%s%%lan%d%s", group, b, policy))
	addPath(in, path, "back"+l.suffix, fmt.Sprintf("%s%%lan%d,loop=two-way", group, b), fmt.Sprintf("%s%%lan%d%s", group, a, policy))
}

const (
	ssdpText = "239.255.255.250:1900"
	tagText  = "%s%%lan%d,vlan=7,loop=two-way"
)

var ssdp = netip.MustParseAddrPort(ssdpText)

// loopCase is a topology with a loop.
type loopCase struct {
	name string
	lans int
	make func(l *lans, path string)
	// reached is the number of packets on the LANs per packet sent, without a loop.
	reached int
	frame   func(l *lans, payload string) []byte
	plain   bool // rules not marked two-way: the guard relies on marks alone
	from    int  // LAN it is sent on
	calm    bool // ended by the check of own packets: nothing loops
	basic   bool // tested on emulated machines, too
}

var loopCases = []loopCase{
	{name: "two interfaces on one LAN", lans: 1, reached: 1, calm: true, plain: true, make: func(l *lans, path string) {
		r := l.relay(0)
		l.plug(r.host, 0, "lan0b", "10.0.0.200/24")
		l.t.Cleanup(func() { labtest.RemoveLink(l.t, r.host, "lan0b") })
		l.add(r, path, "there", "239.5.1.1:5000%lan0", "239.5.1.1:5000%lan0b,src=keep")
	}, frame: func(l *lans, payload string) []byte {
		return l.frame(0, netip.MustParseAddrPort("239.5.1.1:5000"), payload)
	}},
	{name: "two relays, two ways", basic: true, lans: 2, reached: 2, make: func(l *lans, path string) {
		for range 2 {
			l.twoWay(l.relay(0, 1), path, ssdpText, 0, 1, "")
		}
	}},
	{name: "two relays, two ways, sources kept", lans: 2, reached: 2, make: func(l *lans, path string) {
		for range 2 {
			l.twoWay(l.relay(0, 1), path, ssdpText, 0, 1, ",src=keep")
		}
	}},
	// Each hears two others: looping packets double with each round.
	{name: "three relays, two ways", lans: 2, reached: 3, make: func(l *lans, path string) {
		for range 3 {
			l.twoWay(l.relay(0, 1), path, ssdpText, 0, 1, ",src=keep")
		}
	}},
	{name: "two relays, one way each", basic: true, lans: 2, reached: 2, plain: true, make: func(l *lans, path string) {
		l.add(l.relay(0, 1), path, "there", ssdpText+"%lan0", ssdpText+"%lan1")
		l.add(l.relay(0, 1), path, "back", ssdpText+"%lan1", ssdpText+"%lan0")
	}},
	{name: "one there, two back", lans: 2, reached: 3, plain: true, make: func(l *lans, path string) {
		l.add(l.relay(0, 1), path, "there", ssdpText+"%lan0", ssdpText+"%lan1")
		for range 2 {
			l.add(l.relay(0, 1), path, "back", ssdpText+"%lan1", ssdpText+"%lan0")
		}
	}},
	{name: "three relays in a ring", plain: true, lans: 3, reached: 3, make: func(l *lans, path string) {
		for i := range 3 {
			l.add(l.relay(i, (i+1)%3), path, "on", fmt.Sprintf("%s%%lan%d", ssdpText, i), fmt.Sprintf("%s%%lan%d", ssdpText, (i+1)%3))
		}
	}},
	{name: "three relays in a ring, two ways", lans: 3, reached: 4, make: func(l *lans, path string) {
		for i := range 3 {
			l.twoWay(l.relay(i, (i+1)%3), path, ssdpText, i, (i+1)%3, "")
		}
	}},
	{name: "a group rewritten and back", plain: true, lans: 2, reached: 2, make: func(l *lans, path string) {
		l.add(l.relay(0, 1), path, "there", ssdpText+"%lan0", "239.7.7.7:7000%lan1")
		l.add(l.relay(0, 1), path, "back", "239.7.7.7:7000%lan1", ssdpText+"%lan0")
	}},
	{name: "VLAN tags", basic: true, lans: 2, reached: 2, make: func(l *lans, path string) {
		for range 2 {
			r := l.relay(0, 1)
			l.add(r, path, "there", fmt.Sprintf(tagText, ssdpText, 0), ssdpText+"%lan1")
			l.add(r, path, "back", fmt.Sprintf(tagText, ssdpText, 1), ssdpText+"%lan0")
		}
	}, frame: func(l *lans, payload string) []byte {
		return l.frame(0, ssdp, payload, func(f *packet.Frame) { f.VLANs = []uint16{7} })
	}},
	{name: "without checksums", lans: 2, reached: 2, make: func(l *lans, path string) {
		for range 2 {
			l.twoWay(l.relay(0, 1), path, ssdpText, 0, 1, "")
		}
	}, frame: func(l *lans, payload string) []byte {
		return l.frame(0, ssdp, payload, func(f *packet.Frame) { f.NoChecksum = true })
	}},
	{name: "own packets allowed", basic: true, lans: 2, reached: 2, make: func(l *lans, path string) {
		for range 2 {
			r := l.relay(0, 1)
			l.add(r, path, "there", ssdpText+"%lan0,loop=allow", ssdpText+"%lan1")
			l.add(r, path, "back", ssdpText+"%lan1,loop=allow", ssdpText+"%lan0")
		}
	}},
	{name: "a reflector of sockets", lans: 2, reached: 1, make: func(l *lans, path string) {
		l.add(l.relay(0, 1), path, "there", ssdpText+"%lan0", ssdpText+"%lan1")
		l.reflector(1, 0)
	}},
	{name: "the sender behind the loop", plain: true, lans: 3, reached: 2, make: func(l *lans, path string) {
		l.add(l.relay(0, 1), path, "there", ssdpText+"%lan0", ssdpText+"%lan1")
		r := l.relay(0, 1, 2)
		l.add(r, path, "back", ssdpText+"%lan1", ssdpText+"%lan0")
		l.add(r, path, "bring", ssdpText+"%lan2", ssdpText+"%lan0")
	}, frame: func(l *lans, payload string) []byte { return l.frame(2, ssdp, payload) }, from: 2},
	{name: "smcroute, the other way", lans: 2, reached: 2, plain: true, make: func(l *lans, path string) {
		l.add(l.relay(0, 1), path, "there", ssdpText+"%lan0", ssdpText+"%lan1,src=keep")
		l.smcroute(1, 0)
	}},
	{name: "IPv6", basic: true, lans: 2, reached: 2, make: func(l *lans, path string) {
		for range 2 {
			l.twoWay(l.relay(0, 1), path, "[ff05::c]:1900", 0, 1, ",src=keep")
		}
	}, frame: func(l *lans, payload string) []byte {
		return l.frame(0, netip.MustParseAddrPort("[ff05::c]:1900"), payload)
	}},
	{name: "IPv6, one way each", lans: 2, reached: 2, plain: true, make: func(l *lans, path string) {
		l.add(l.relay(0, 1), path, "there", "[ff05::c]:1900%lan0", "[ff05::c]:1900%lan1,src=keep")
		l.add(l.relay(0, 1), path, "back", "[ff05::c]:1900%lan1", "[ff05::c]:1900%lan0,src=keep")
	}, frame: func(l *lans, payload string) []byte {
		return l.frame(0, netip.MustParseAddrPort("[ff05::c]:1900"), payload)
	}},
	{name: "several outputs", lans: 3, reached: 4, make: func(l *lans, path string) {
		for range 2 {
			r := l.relay(0, 1, 2)
			l.add(r, path, "there", ssdpText+"%lan0,loop=two-way", ssdpText+"%lan1", ssdpText+"%lan2")
			l.add(r, path, "back", ssdpText+"%lan1,loop=two-way", ssdpText+"%lan0", ssdpText+"%lan2")
		}
	}},
}

// In every topology with a loop, on every path: the loop is found, at most mostExtra packets are
// made, and the rule reports the loop. Once the loop is known, the next packet makes few. The cases of a path run one
// after the other on the same LANs with the same relays: a rule must not inherit what the guard knew of an earlier one.
func TestLoopGuard(t *testing.T) {
	for _, path := range guardPaths {
		t.Run(path, func(t *testing.T) {
			t.Parallel() // mostly waits for the daemons' next look at the guard
			l := newLANs(t, 3)
			for range 3 {
				l.relay(0, 1, 2)
			}
			l.keep(path)
			for i, c := range loopCases {
				if c.basic || !labtest.Emulated() {
					t.Run(c.name, func(t *testing.T) { c.run(t, l.lend(t, i), path) })
				}
			}
		})
	}
}

func (c *loopCase) run(t *testing.T, l *lans, path string) {
	l.taps = l.taps[:c.lans]
	l.meant = !c.plain
	c.make(l, path)
	if ways := l.looping(); len(ways) != 0 {
		t.Errorf("looping before there was a packet: %q", ways)
	}
	events := l.loopEvents()
	frame := c.frame
	if frame == nil {
		frame = func(l *lans, payload string) []byte { return l.frame(0, ssdp, payload) }
	}
	start := time.Now()
	l.send(c.from, frame(l, "first"))
	first := l.counts(least(c.reached))
	took := time.Since(start)
	ways := l.looping()
	if !c.calm {
		eventually(t, "the loop is found", func() string {
			if ways = l.looping(); len(ways) == 0 {
				return "no rule is looping"
			}
			return ""
		})
	}
	t.Logf("%v on the LANs, quiet after %v, looping %q", first, took, ways)
	if extra := sum(first) - c.reached; extra < 0 || extra > mostExtra || c.calm && extra != 0 {
		t.Errorf("%d packets, %d without a loop", sum(first), c.reached)
	}
	if c.calm {
		if len(ways) != 0 || !slices.ContainsFunc(l.relays[0].rule("there"+l.suffix).Drops, func(d control.Drop) bool { return d.Reason == "loop" && d.Packets == 1 }) {
			t.Errorf("looping %q, %+v", ways, l.relays[0].rule("there"+l.suffix).Drops)
		}
		return
	}
	if !strings.Contains(ways[0], "packets come back on lan") || !strings.Contains(ways[0], "having left by rule ") {
		t.Errorf("the ways are %q", ways)
	}
	eventually(t, "there is an event of it", func() string {
		if l.loopEvents() == events {
			return "no more than before"
		}
		return ""
	})
	for i := range 20 {
		l.send(c.from, frame(l, fmt.Sprint("next ", i)))
	}
	more := l.counts(func(got []int) bool {
		return !slices.ContainsFunc(slices.Delete(slices.Clone(got), c.from, c.from+1), func(n int) bool { return n < 20 })
	})
	if extra := sum(more) - 20*c.reached; extra > mostExtra {
		t.Errorf("%d more packets, %d without a loop", sum(more), 20*c.reached)
	}
	// In a two-way ring the second copy of each packet may be cut, but no first one.
	for lan, n := range more {
		if lan != c.from && n < 20 {
			t.Errorf("%d of 20 more packets on LAN %d", n, lan)
		}
	}
	t.Logf("%v for 20 more packets", more)
	for i, in := range l.relays {
		for _, r := range in.rules() {
			eventually(t, fmt.Sprintf("relay %d: all packets of rule %s are counted", i+1, r.Name), func() string { return sumFault(in.rule(r.Name)) })
		}
	}
}

// reflector sends what it receives from a group on one LAN to another, with plain sockets, until
// the test ends.
func (l *lans) reflector(from, to int) {
	l.t.Helper()
	h := labtest.Host(l.t, "reflect")
	names := map[int]string{from: fmt.Sprintf("lan%d", from), to: fmt.Sprintf("lan%d", to)}
	for lan, name := range names {
		l.plug(h, lan, name, fmt.Sprintf("10.%d.0.99/24", lan))
	}
	labtest.Do(l.t, h, func() error {
		in, err := net.InterfaceByName(names[from])
		if err != nil {
			return err
		}
		receive, err := net.ListenMulticastUDP("udp4", in, net.UDPAddrFromAddrPort(ssdp))
		if err != nil {
			return err
		}
		send, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(10, byte(to), 0, 99)})
		if err != nil {
			return errors.Join(err, receive.Close())
		}
		raw, err := send.SyscallConn()
		if err != nil {
			return err
		}
		var fault error
		if err := raw.Control(func(fd uintptr) {
			fault = errors.Join(
				unix.SetsockoptInet4Addr(int(fd), unix.IPPROTO_IP, unix.IP_MULTICAST_IF, [4]byte{10, byte(to), 0, 99}),
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MULTICAST_LOOP, 0))
		}); err != nil || fault != nil {
			return errors.Join(err, fault)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			buf := make([]byte, 65536)
			for {
				n, _, err := receive.ReadFromUDPAddrPort(buf)
				if err != nil {
					return
				}
				time.Sleep(l.pause)
				_, _ = send.WriteToUDPAddrPort(buf[:n], ssdp)
			}
		}()
		l.t.Cleanup(func() {
			receive.Close()
			<-done
			send.Close()
		})
		return nil
	})
}

// smcroute relays what the host sends from one LAN to another through the kernel's multicast
// routing, until the test ends.
func (l *lans) smcroute(from, to int) {
	l.t.Helper()
	if _, err := exec.LookPath("smcrouted"); err != nil {
		labtest.Lacking(l.t, "smcroute is not installed: scripts/setup --test installs it")
	}
	h := labtest.Host(l.t, "smcroute")
	for _, lan := range []int{from, to} {
		l.plug(h, lan, fmt.Sprintf("lan%d", lan), fmt.Sprintf("10.%d.0.98/24", lan))
	}
	// The source is on the other LAN.
	for _, name := range []string{"all", fmt.Sprintf("lan%d", from)} {
		labtest.Sysctl(l.t, h, "net/ipv4/conf/"+name+"/rp_filter", "0")
	}
	dir := l.t.TempDir()
	conf := filepath.Join(dir, "smcroute.conf")
	text := fmt.Sprintf("mgroup from lan%d group %v\nmroute from lan%d source 10.0.0.100 group %v to lan%d\n", from, ssdp.Addr(), from, ssdp.Addr(), to)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		l.t.Fatal(err)
	}
	cmd := exec.Command("smcrouted", "-n", "-f", conf, "-P", filepath.Join(dir, "pid"), "-u", filepath.Join(dir, "socket"))
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := h.Start(cmd); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		_ = cmd.Process.Signal(unix.SIGTERM)
		if err := cmd.Wait(); err != nil {
			l.t.Errorf("smcrouted: %v: %s", err, log.String())
		}
	})
	eventually(l.t, "the kernel routes", func() string {
		var routes []byte
		err := h.Do(func() (err error) {
			routes, err = os.ReadFile("/proc/thread-self/net/ip_mr_cache")
			return err
		})
		if err != nil {
			return err.Error()
		}
		if strings.Count(string(routes), "\n") < 2 {
			return string(routes)
		}
		return ""
	})
}

// A loop that is gone heals: the rule is active again, and accepts original packets from the host
// that sent copies back.
func TestLoopGuardHeals(t *testing.T) {
	l := newLANs(t, 2)
	for range 2 {
		l.twoWay(l.relay(0, 1), "kernel", ssdpText, 0, 1, "")
	}
	first, second := l.relays[0], l.relays[1]
	l.send(0, l.frame(0, ssdp, "first"))
	l.counts(least(2))
	eventually(t, "the loop is found", func() string {
		if len(l.looping()) == 0 {
			return "no rule is looping"
		}
		return ""
	})
	eventually(t, "the log says it", func() string {
		if text := first.running.log.String() + second.running.log.String(); !strings.Contains(text, "rule is looping") {
			return text
		}
		return ""
	})
	for _, name := range []string{"there", "back"} {
		second.mustCLI("rule", "del", name)
	}
	first.waitState("there", control.StateActive)
	first.waitState("back", control.StateActive)
	eventually(t, "the log says that it is over", func() string {
		if text := first.running.log.String(); strings.Contains(text, "rule is looping") && !strings.Contains(text, "rule is no longer looping") {
			return text
		}
		return ""
	})
	l.send(0, l.frame(0, ssdp, "second"))
	if got := l.counts(least(1)); got[0] != 0 || got[1] != 1 {
		t.Errorf("%v on the LANs", got)
	}
}

// A plain rule whose packets a host resends by sockets, with no proof of a loop, keeps relaying,
// and every command says what to do; loop=two-way then ends the loop.
func TestLoopGuardEcho(t *testing.T) {
	l := newLANs(t, 2)
	l.pause = 2 * time.Millisecond
	r := l.relay(0, 1)
	l.add(r, "kernel", "there", ssdpText+"%lan0", ssdpText+"%lan1")
	l.reflector(1, 0)
	// The daemon has done its first check: what was counted before it is not news.
	eventually(t, "the packet goes round", func() string {
		if r.rule("there").Matched.Packets < 20 {
			l.send(0, l.frame(0, ssdp, "round"))
			return "it does not"
		}
		return ""
	})
	const cure = "loop=two-way on the input drops them"
	eventually(t, "the rule says what to do", func() string {
		if s := r.rule("there"); s.State != control.StateActive || !strings.Contains(s.Reason, "came again from another sender (echo)") || !strings.Contains(s.Reason, cure) {
			return fmt.Sprintf("%s: %q", s.State, s.Reason)
		}
		return ""
	})
	for _, command := range [][]string{{"explain", "there"}, {"status"}, {"events"}, {"doctor", "there"}} {
		const want = "again from another sender"
		eventually(t, fmt.Sprintf("%v says %q", command, want), func() string {
			if text := r.cli(command...).stdout; !strings.Contains(text, want) {
				return text
			}
			return ""
		})
	}
	r.mustCLI("rule", "del", "there")
	for labtest.ReceiveAny(l.taps, 150*time.Millisecond, l.marked) >= 0 {
	}
	l.add(r, "kernel", "there", ssdpText+"%lan0,loop=two-way", ssdpText+"%lan1")
	l.send(0, l.frame(0, ssdp, "cut"))
	if got := l.counts(least(1)); sum(got)-1 > mostExtra {
		t.Errorf("%v on the LANs with loop=two-way", got)
	}
	eventually(t, "the loop is found with loop=two-way", func() string {
		if len(l.looping()) == 0 {
			return "no rule is looping"
		}
		return ""
	})
}

// Real senders with equal payloads, on two inputs and on one, lose nothing.
func TestLoopGuardLeavesSendersAlone(t *testing.T) {
	all := newLANs(t, 3)
	all.relay(0, 1, 2)
	for i, path := range guardPaths {
		t.Run(path, func(t *testing.T) {
			l := all.lend(t, i)
			r := l.relay(0, 1, 2)
			addPath(r, path, "a", "239.5.1.1:5000%lan0", "239.5.2.1:5000%lan2")
			addPath(r, path, "b", "239.5.1.1:5000%lan1", "239.5.2.2:5000%lan2")
			group := netip.MustParseAddrPort("239.5.1.1:5000")
			other := func(f *packet.Frame) { f.SrcMAC[5] ^= 0x55; f.Src = f.Src.Next() }
			const n = 300
			arrived := 0
			for i := range n {
				payload := fmt.Sprint("leg ", i)
				l.send(0, l.frame(0, group, payload))        // two legs of one stream
				l.send(1, l.frame(1, group, payload))        // on two inputs
				l.send(0, l.frame(0, group, payload, other)) // and on one
				l.send(0, l.frame(0, group, "null packet"))  // a sender that repeats itself
				l.send(1, l.frame(1, group, "null packet"))
				l.send(1, l.frame(1, group, "null packet", other)) // and another that does the same
				if i%10 == 9 {                                     // no more than the queues on the way hold
					arrived += len(l.taps[2].Collect(l.sent-arrived, l.marked))
				}
			}
			// One sender takes over from another, at a pace.
			l.send(0, l.frame(0, group, "takes over"))
			for range n / 2 {
				l.send(1, l.frame(1, group, "takes over", other))
			}
			if got := l.counts(func(got []int) bool { return arrived+got[2] >= l.sent }); arrived+got[2] != l.sent || len(l.looping()) != 0 {
				t.Errorf("%d and %v on the LANs of %d, looping %q", arrived, got, l.sent, l.looping())
			}
		})
	}
}
