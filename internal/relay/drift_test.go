package relay

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/internal/plan"
	"xdpcast/internal/traffic"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/membership"
	"xdpcast/pkg/rules"
)

// newQuickPlace is a place whose relays look at everything several times a second.
func newQuickPlace(t testing.TB) *place {
	p := newPlace(t)
	p.opts.observeEvery = 100 * time.Millisecond
	return p
}

// path is the path that a rule's packets travel.
func (r *running) path(name string) string {
	r.t.Helper()
	s, err := r.Rule(r.t.Context(), name)
	if err != nil {
		r.t.Fatal(err)
	}
	return s.UsedPath
}

// waitRule waits until a rule is complete and on a path.
func (r *running) waitRule(name, path string) {
	r.t.Helper()
	var last control.RuleStatus
	defer func() {
		if r.t.Failed() {
			r.t.Logf("rule %s is %s (%s), path %q, outputs %+v", name, last.State, last.Reason, last.UsedPath, last.Outputs)
		}
	}()
	labtest.Eventually(r.t, fmt.Sprintf("rule %s is complete on path %s", name, path), func() bool {
		var err error
		if last, err = r.Rule(r.t.Context(), name); err != nil {
			r.t.Fatal(err)
		}
		complete := false
		if err := r.do(r.t.Context(), func() error { complete = r.plan.Rule(name).Complete(); return nil }); err != nil {
			r.t.Fatal(err)
		}
		return complete && last.UsedPath == path
	})
}

// arrives sends numbered packets to an input and wants all of them at each subscription of
// the other end.
func (p *place) arrives(what, input string, subscriptions ...string) {
	p.t.Helper()
	p.t.(*testing.T).Run(what, func(t *testing.T) {
		const count = 20
		var at []*traffic.Receiver
		for _, s := range subscriptions {
			at = append(at, receives(t, p.peer, s))
		}
		target, err := traffic.ParseTarget(input)
		if err != nil {
			t.Fatal(err)
		}
		var s *traffic.Sender
		labtest.Do(t, p.peer, func() (err error) {
			s, err = traffic.NewSender(traffic.SendConfig{Target: target, TTL: 16, Count: count, Rate: traffic.Rate{Value: 5000}})
			return err
		})
		defer s.Close()
		if err := s.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		for i, r := range at {
			labtest.Eventually(t, "all packets are at "+subscriptions[i], func() bool { return r.Report().Total.Received >= count })
			if c := r.Report().Total; c.Received != count || c.Lost+c.Duplicated+c.Corrupt != 0 {
				t.Errorf("%s: %+v, want %d packets", subscriptions[i], c, count)
			}
		}
	})
}

// bridge makes a bridge on the relay's host, with an address, and up.
func (p *place) bridge(name, cidr string) {
	p.t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	off := false
	err := p.host.Netlink().LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &off})
	if err == nil && cidr != "" {
		err = p.host.AddAddr(name, cidr)
	}
	if err == nil {
		err = p.host.SetUp(name, true)
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

// port makes an interface the port of a bridge; of none without a name.
func (p *place) port(name, master string) {
	p.t.Helper()
	l, err := p.host.Link(name)
	if err != nil {
		p.t.Fatal(err)
	}
	if master == "" {
		err = p.host.Netlink().LinkSetNoMaster(l)
	} else {
		var m netlink.Link
		if m, err = p.host.Link(master); err == nil {
			err = p.host.Netlink().LinkSetMaster(l, m)
		}
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

// An output that the kernel path cannot send on moves a rule of path auto to one that can, also
// when it comes late, flaps, or goes and comes back.
func TestLateAndFlappingOutput(t *testing.T) {
	p := newPlace(t)
	labtest.NeedsKernel(t, labtest.DevicesTellFeatures(t, p.host), "XDP features of devices", "6.3")
	r := p.start()
	if _, err := r.add("a", anyIn, out0, "239.2.2.2:6000%br0"); err != nil {
		t.Fatal(err)
	}
	if got := r.path("a"); got != "kernel" {
		t.Errorf("path is %q while br0 is absent", got)
	}
	p.arrives("without br0", "239.1.1.1:5000%in0", "239.2.2.1:6000%out0")
	p.bridge("br0", "10.9.0.1/24")
	p.connect("port0", "10.8.0.1/24")
	p.port("port0", "br0")
	r.waitRule("a", "afxdp")
	both := func(what string) {
		t.Helper()
		p.arrives(what, "239.1.1.1:5000%in0", "239.2.2.1:6000%out0", "239.2.2.2:6000%port0")
	}
	both("br0 has come")
	if err := p.host.SetUp("br0", false); err != nil {
		t.Fatal(err)
	}
	r.waitOutput("a", 1, control.StatePending, "interface br0 is down")
	p.arrives("br0 is down", "239.1.1.1:5000%in0", "239.2.2.1:6000%out0")
	if err := p.host.SetUp("br0", true); err != nil {
		t.Fatal(err)
	}
	r.waitRule("a", "afxdp")
	both("br0 is up again")
	p.remove("br0")
	r.waitOutput("a", 1, control.StatePending, "interface br0 not found")
	p.arrives("br0 is gone", "239.1.1.1:5000%in0", "239.2.2.1:6000%out0")
	p.bridge("br0", "10.9.0.1/24")
	p.port("port0", "br0")
	r.waitRule("a", "afxdp")
	both("br0 is back")
}

// A route that has nothing to do with a next hop leaves it resolved, whatever rules come and
// go, and a new MAC address is followed.
func TestUnrelatedRouteChange(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	if _, err := r.add("uni", anyIn, "10.1.0.2:6000%out0"); err != nil {
		t.Fatal(err)
	}
	r.waitMAC("uni", 0, macOf(t, p.peer, "out0"))
	if err := p.host.Netlink().RouteAdd(route(t, p.host, "203.0.113.0/24", "10.1.0.77", "out0")); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		r.mustAdd(fmt.Sprint("other", i), fmt.Sprintf("239.1.1.%d:5000%%in0", 10+i), out1)
	}
	waitNeighbours(t, p.host, "managed 10.1.0.2")
	r.waitRule("uni", "kernel")
	setSysctl(t, p.peer, "ipv4/conf/out0/arp_notify", "1")
	l, err := p.peer.Link("out0")
	if err != nil {
		t.Fatal(err)
	}
	mac := [6]byte{2, 0, 0, 0, 0, 0x43}
	if err := p.peer.Netlink().LinkSetHardwareAddr(l, mac[:]); err != nil {
		t.Fatal(err)
	}
	r.waitMAC("uni", 0, mac)
	if err := r.DeleteRule(t.Context(), "other0"); err != nil {
		t.Fatal(err)
	}
	waitNeighbours(t, p.host, "managed 10.1.0.2")
}

// holdUp keeps the control loop from running while fn does, as a process that is stopped is.
func (r *running) holdUp(fn func()) {
	r.t.Helper()
	held, release := make(chan struct{}), make(chan struct{})
	ended := make(chan error, 1)
	go func() {
		ended <- r.do(context.Background(), func() error { close(held); <-release; return nil })
	}()
	<-held
	fn()
	close(release)
	if err := <-ended; err != nil {
		r.t.Fatal(err)
	}
}

// An interface that goes and comes back with its index, by moving or anew, while the daemon is
// there, stopped or down, has everything again that the kernel dropped with it.
func TestSameIndexAgain(t *testing.T) {
	p := newQuickPlace(t)
	away, tcx := labtest.Host(t, "away"), labtest.TCX(t)
	p.opts.ConfigFile = p.file("rules.yaml", fmt.Sprintf("rules:\n  - {name: one, in: %q, out: [%q]}\n  - {name: two, in: %q, out: [%q, %q]}\n  - {name: tap, path: fanout, in: %q, out: [%q]}\n",
		anyIn, out0, "239.1.1.2:5000%in0", "239.2.2.3:6000%out0", "239.2.2.4:6000%out1", "239.1.1.3:5000%in0", "239.2.2.5:6000%out1"))
	r := p.start()
	moved := func(names ...string) {
		t.Helper()
		for _, name := range names {
			net := map[string]int{"in0": 0, "out0": 1, "out1": 2}[name]
			if err := p.host.Excursion(lab.End{Host: p.host, Name: name, Addrs: []string{fmt.Sprintf("10.%d.0.1/24", net)}}, away); err != nil {
				t.Fatal(err)
			}
		}
	}
	again := func(names ...string) {
		t.Helper()
		for _, name := range names {
			l, err := p.host.Link(name)
			if err != nil {
				t.Fatal(err)
			}
			net := map[string]int{"in0": 0, "out0": 1, "out1": 2}[name]
			p.remove(name)
			labtest.Connect(t, lab.End{Host: p.host, Name: name, Index: l.Attrs().Index, Addrs: []string{fmt.Sprintf("10.%d.0.1/24", net)}},
				lab.End{Host: p.peer, Name: name, Addrs: []string{fmt.Sprintf("10.%d.0.2/24", net)}})
		}
	}
	flows := func(what string) {
		t.Helper()
		r.waitRule("one", "kernel")
		r.waitRule("two", "kernel")
		r.waitRule("tap", "fanout")
		labtest.Eventually(t, "the groups are joined", func() bool {
			got := p.groups()
			return strings.Contains(got, "in0 group 010101EF users 1") && strings.Contains(got, "in0 group 020101EF users 1") && strings.Contains(got, "in0 group 030101EF users 1")
		})
		p.arrives(what+", one", "239.1.1.1:5000%in0", "239.2.2.1:6000%out0")
		p.arrives(what+", two", "239.1.1.2:5000%in0", "239.2.2.3:6000%out0", "239.2.2.4:6000%out1")
		p.arrives(what+", tap", "239.1.1.3:5000%in0", "239.2.2.5:6000%out1")
		if !tcx {
			return
		}
		if left := p.attachedTo("in0"); left != 1 {
			t.Errorf("%s: %d programs are at the tcx ingress of in0", what, left)
		}
	}
	flows("to begin with")
	all := []string{"in0", "out0", "out1"}
	for name, change := range map[string]func(...string){"moved": moved, "made again": again} {
		change("out1")
		flows(name + ", an output, while it runs")
		change(all...)
		flows(name + ", while it runs")
		r.holdUp(func() { change(all...) })
		flows(name + ", while it is stopped")
		r.stop()
		change(all...)
		r = p.start()
		flows(name + ", while it is down")
	}
}

// attachedTo counts the programs at the tcx ingress of an interface.
func (p *place) attachedTo(ifname string) (n int) {
	p.t.Helper()
	labtest.Do(p.t, p.host, func() error {
		i, err := net.InterfaceByName(ifname)
		if err != nil {
			return err
		}
		result, err := link.QueryPrograms(link.QueryOptions{Target: i.Index, Attach: ebpf.AttachTCXIngress})
		if err != nil {
			return err
		}
		n = len(result.Programs)
		return nil
	})
	return n
}

// detachByForce detaches what is pinned at a path, as bpftool link detach does.
func (p *place) detachByForce(pin string) {
	p.t.Helper()
	lk, err := link.LoadPinnedLink(filepath.Join(p.opts.Loader.PinDir, "links", pin), nil)
	if err == nil {
		err = errors.Join(lk.Detach(), lk.Close())
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *place) indexOf(name string) int {
	p.t.Helper()
	l, err := p.host.Link(name)
	if err != nil {
		p.t.Fatal(err)
	}
	return l.Attrs().Index
}

// Links that were detached by force are attached again.
func TestForcedDetach(t *testing.T) {
	p := newQuickPlace(t)
	r := p.start()
	r.mustPut(
		stream("k", "in0", "239.1.1.1", to("out0", "239.2.2.1")),
		onPath(rules.PathFanout, stream("f", "in0", "239.1.1.2", to("out0", "239.2.2.2"))),
	)
	before := p.footprint(r)
	in0, tcx := p.indexOf("in0"), labtest.TCX(t)
	p.detachByForce(fmt.Sprint("if", in0))
	if tcx {
		p.detachByForce(fmt.Sprint("tapped", in0))
	}
	labtest.Eventually(t, "both are attached again", func() bool {
		return (!tcx || p.attachedTo("in0") == 1) && len(p.footprint(r).Attached) == len(before.Attached) && !slices.Equal(p.footprint(r).Attached, before.Attached)
	})
	p.arrives("kernel", "239.1.1.1:5000%in0", "239.2.2.1:6000%out0")
	p.arrives("fanout", "239.1.1.2:5000%in0", "239.2.2.2:6000%out0")
	if !strings.Contains(p.log.String(), "the relay program is no longer on the interface") {
		t.Error("the log says nothing of it")
	}
}

// Pins that are removed are made again, with a warning, so that the stream goes on after a
// stop.
func TestPinsAreMadeAgain(t *testing.T) {
	p := newQuickPlace(t)
	r := p.start()
	r.mustAdd("a", anyIn, out0, out1)
	before := p.footprint(r)
	if err := os.RemoveAll(p.opts.Loader.PinDir); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "the pins are there again", func() bool {
		_, err := os.Stat(filepath.Join(p.opts.Loader.PinDir, "links", fmt.Sprint("if", p.indexOf("in0"))))
		return err == nil
	})
	labtest.Eventually(t, "the log says so", func() bool {
		return strings.Contains(p.log.String(), "pins were removed from "+p.opts.Loader.PinDir)
	})
	r.stop()
	r = p.start()
	if got := p.footprint(r); !slices.Equal(got.Attached, before.Attached) || !slices.Equal(got.Kernel, before.Kernel) {
		t.Errorf("after a restart %+v, before %+v", got, before)
	}
	p.arrives("after a restart", "239.1.1.1:5000%in0", "239.2.2.1:6000%out0", "239.2.2.2:6000%out1")
}

// foreign attaches another's XDP program to an interface until the function that it returns
// is called.
func (p *place) foreign(ifname string) (leave func()) {
	p.t.Helper()
	leave, err := p.tryForeign(ifname)
	if err != nil {
		p.t.Fatal(err)
	}
	return leave
}

// tryForeign is foreign for an interface that may have a program: EBUSY.
func (p *place) tryForeign(ifname string) (leave func(), err error) {
	p.t.Helper()
	set := func(fd int) error {
		l, err := p.host.Link(ifname)
		if err != nil {
			return err
		}
		return p.host.Do(func() error { return netlink.LinkSetXdpFd(l, fd) })
	}
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "foreign", Type: ebpf.XDP, License: "MIT", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()}, // XDP_PASS
	})
	if err != nil {
		return nil, err
	}
	defer program.Close() // the interface holds it
	leave = func() {
		p.t.Helper()
		if err := set(-1); err != nil {
			p.t.Fatal(err)
		}
	}
	return leave, set(program.FD())
}

// Another program that held the interface at start and has left leaves nothing of it: neither
// path nor warning.
func TestForeignProgramLeaves(t *testing.T) {
	p := newQuickPlace(t)
	leave := p.foreign("in0")
	p.opts.Interfaces = []string{"in0"}
	p.opts.ConfigFile = p.file("rules.yaml", "rules:\n  - {name: a, in: "+anyIn+", out: ["+out0+"]}\n")
	r := p.start()
	s, err := r.Rule(t.Context(), "a")
	if err != nil || s.UsedPath != "fanout" || !strings.Contains(s.Reason, "already has an XDP program (program foreign") {
		t.Errorf("path %q (%s), %v", s.UsedPath, s.Reason, err)
	}
	warnings := func() []string {
		t.Helper()
		status, err := r.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return slices.DeleteFunc(status.Warnings, func(w string) bool { return strings.Contains(w, "reach the host's stack") }) // without tcx
	}
	if w := warnings(); len(w) != 1 || !strings.HasPrefix(w[0], "interface in0: ") {
		t.Errorf("warnings %q", w)
	}
	p.arrives("beside another program", "239.1.1.1:5000%in0", "239.2.2.1:6000%out0")
	leave()
	r.waitRule("a", "kernel")
	if w := warnings(); len(w) != 0 {
		t.Errorf("warnings %q", w)
	}
	p.arrives("alone", "239.1.1.1:5000%in0", "239.2.2.1:6000%out0")
	if s, err := r.Rule(t.Context(), "a"); err != nil || s.Reason != "" {
		t.Errorf("reason %q, %v", s.Reason, err)
	}
}

// Interfaces that come and go leave no rows.
func TestRowsOfInterfacesThatAreGone(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	r.mustPut(stream("any", "v+", "239.1.1.1", to("out0", "239.2.2.1")))
	before := r.rows()
	for i := range 20 {
		name := fmt.Sprint("v", i)
		p.connect(name, fmt.Sprintf("10.50.%d.1/24", i))
		r.waitKernel("any%" + name + " -> out0")
		p.remove(name)
		r.waitKernel()
	}
	if after := r.rows(); !slices.Equal(after, before) {
		t.Errorf("rows %v, before %v", after, before)
	}
	if err := r.do(t.Context(), func() error {
		if n := len(r.memberships.manager.Counters()); n > len(before) {
			return fmt.Errorf("%d interfaces are counted", n)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// rows names the interfaces that the status lists.
func (r *running) rows() (names []string) {
	r.t.Helper()
	s, err := r.Status(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	for _, i := range s.Interfaces {
		names = append(names, i.Name)
	}
	return names
}

// The network asks a bridge, not its ports: the group is joined on the bridge, too, for as
// long as the input is its port.
func TestBridgePortAsInput(t *testing.T) {
	p := newPlace(t)
	p.bridge("br0", "")
	p.port("in0", "br0")
	r := p.start()
	r.mustAdd("a", anyIn, out0)
	joined := func(ifname string) bool { return strings.Contains(p.groups(), ifname+" group 010101EF users 1") }
	if !joined("in0") || !joined("br0") {
		t.Errorf("groups are\n%s", p.groups())
	}
	p.arrives("as a port", "239.1.1.1:5000%in0", "239.2.2.1:6000%out0")
	groups, err := r.Groups(t.Context())
	if err != nil || len(groups) != 2 || groups[0].Interface != "br0" || !slices.Equal(groups[0].For, []string{"in0"}) || groups[1].Master != "br0" {
		t.Errorf("groups are %+v, %v", groups, err)
	}
	if s, err := r.Rule(t.Context(), "a"); err != nil || s.State != control.StateActive || !strings.Contains(s.Reason, "interface in0 is a port of the bridge br0") {
		t.Errorf("rule is %s (%s), %v", s.State, s.Reason, err)
	}
	status, err := r.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if i := slices.IndexFunc(status.Interfaces, func(i control.InterfaceStatus) bool { return i.Name == "in0" }); status.Interfaces[i].Master != "br0" {
		t.Errorf("in0 is %+v", status.Interfaces[i])
	}
	if e := r.explained(plan.Packet{Interface: "in0", Destination: addr("239.1.1.1"), Port: 5000}); len(e.Memberships) != 2 || len(e.Notes) == 0 {
		t.Errorf("explained as %+v", e)
	}
	p.port("in0", "")
	labtest.Eventually(t, "the bridge has left the group", func() bool { return joined("in0") && !joined("br0") })
	p.port("in0", "br0")
	labtest.Eventually(t, "the bridge has joined again", func() bool { return joined("in0") && joined("br0") })
}

// An alternative name is as good as the first one.
func TestAlternativeNames(t *testing.T) {
	p := newPlace(t)
	for name, alt := range map[string]string{"in0": "enp3s0f0np0-a-long-name", "out0": "enp3s0f1np1"} {
		l, err := p.host.Link(name)
		if err == nil {
			err = p.host.Netlink().LinkAddAltName(l, alt)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	r := p.start()
	rule := stream("a", "enp3s0f1np1", "239.1.1.1", to("out1", "239.2.2.1"))
	rule.In.Interface = "in0"
	rule.Out = []rules.Output{to("enp3s0f1np1", "239.2.2.1")}
	r.mustPut(rule)
	r.waitRule("a", "kernel")
	p.arrives("by the alternative name", "239.1.1.1:5000%in0", "239.2.2.1:6000%out0")
	if got := r.rows(); !slices.Equal(got, []string{"in0", "out0"}) {
		t.Errorf("interfaces are %v", got)
	}
}

// An output without carrier is shown so, and nothing counts as sent.
func TestNoCarrier(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	r.mustAdd("a", anyIn, out0, out1)
	if err := p.peer.SetUp("out0", false); err != nil {
		t.Fatal(err)
	}
	r.waitOutput("a", 0, control.StatePending, "interface out0 has no carrier")
	status, err := r.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if i := slices.IndexFunc(status.Interfaces, func(i control.InterfaceStatus) bool { return i.Name == "out0" }); status.Interfaces[i].Link != control.LinkNoCarrier {
		t.Errorf("out0 is %+v", status.Interfaces[i])
	}
	p.arrives("without the carrier of out0", "239.1.1.1:5000%in0", "239.2.2.2:6000%out1")
	s, err := r.Rule(t.Context(), "a")
	if err != nil || s.Outputs[0].Sent.Packets != 0 || len(s.Outputs[0].Drops) != 1 || s.Outputs[0].Drops[0].Reason != "no_carrier" || s.Outputs[0].Drops[0].Packets != s.Outputs[1].Sent.Packets {
		t.Errorf("outputs are %+v, %v", s.Outputs, err)
	}
	if err := p.peer.SetUp("out0", true); err != nil {
		t.Fatal(err)
	}
	r.waitRule("a", "kernel")
	p.arrives("with it", "239.1.1.1:5000%in0", "239.2.2.1:6000%out0", "239.2.2.2:6000%out1")
}

// fewSockets is the kernel with descriptors for some sockets alone.
type fewSockets struct {
	membership.System
	left int
}

func (f *fewSockets) Socket(family int) (int, error) {
	if f.left == 0 {
		return -1, unix.EMFILE
	}
	f.left--
	return f.System.Socket(family)
}

// Where memberships take all descriptors that they may, all rules are in force nevertheless, and
// the API answers.
func TestDescriptorsRunOut(t *testing.T) {
	p := newPlace(t)
	p.opts.Loader.MaxRules, p.opts.Loader.MaxOutputs = 4096, 4096
	p.opts.Membership.System = &fewSockets{System: membership.Kernel(), left: 50}
	text := strings.Builder{}
	text.WriteString("rules:\n")
	const count = 3000
	for i := range count {
		fmt.Fprintf(&text, "  - {name: r%d, in: \"239.1.%d.%d:5000%%in0\", out: [%q]}\n", i, i>>8, i&255, out0)
	}
	p.opts.ConfigFile = p.file("rules.yaml", text.String())
	r := p.start()
	started := time.Now()
	groups, err := r.Groups(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	states := map[string]int{}
	for _, g := range groups {
		states[g.State]++
	}
	if states[control.GroupJoined] == 0 || states[control.GroupRetrying] == 0 || len(groups) != count {
		t.Errorf("groups are %v", states)
	}
	reader, err := loader.OpenReader(p.opts.Loader.PinDir)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if inForce, err := reader.Rules(); err != nil || len(inForce) != count {
		t.Errorf("%d rules are in force, %v", len(inForce), err)
	}
	// It took more than a minute and a half on an idle machine when joins came first.
	if took := time.Since(started); took > time.Minute {
		t.Errorf("the API took %v", took)
	}
	if lines := strings.Count(p.log.String(), "\n"); lines > 100 {
		t.Errorf("%d lines in the log", lines)
	}
}

// Flaps of an interface that very many rules send on are a few lines in the log.
func TestLogsManyStatesAtOnce(t *testing.T) {
	p := newPlace(t)
	p.opts.Loader.MaxRules, p.opts.Loader.MaxOutputs = 4096, 4096
	r := p.start()
	var all []rules.Rule
	for i := range 500 {
		rule := stream(fmt.Sprintf("r%03d", i), "in0", "239.1.0.1", to("out0", "239.2.2.1"))
		rule.In.Port = uint16(5000 + i)
		all = append(all, rule)
	}
	r.mustPut(all...)
	before := strings.Count(p.log.String(), "\n")
	for range 3 {
		for _, up := range []bool{false, true} {
			if err := p.host.SetUp("out0", up); err != nil {
				t.Fatal(err)
			}
			want := control.StatePending
			if up {
				want = control.StateActive
			}
			labtest.Eventually(t, "the rules are "+want, func() bool {
				s, err := r.Rule(t.Context(), "r499")
				return err == nil && s.State == want
			})
		}
	}
	if lines := strings.Count(p.log.String(), "\n") - before; lines > 40 || !strings.Contains(p.log.String(), `msg="rules are not complete" rules=500 first=r000 last=r499`) {
		t.Errorf("%d lines in the log", lines)
	}
	// A few have a line each.
	r.mustPut(stream("own", "in0", "239.3.3.3", to("late0", "239.2.2.9")))
	if !strings.Contains(p.log.String(), `msg="rule is not complete" rule=own state=pending reason="interface late0 not found"`) {
		t.Error("a rule of its own has no line")
	}
}
