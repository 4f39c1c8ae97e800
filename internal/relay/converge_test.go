package relay

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
	"xdpcast/pkg/rules"
)

// convergeTime is how long the sequences of TestConverges take in all where nobody says how
// many there are to be.
const convergeTime = 50 * time.Second

// Whatever happens, in whatever order, the relay ends where one would that is started
// now: random sequences of events over random rules, after each of which the state that the API tells
// and the flows in force equal those of a fresh relay, which has adopted the pinned
// state or made its own, and packets come out where the state says so.
//
// XDPCAST_SEQUENCES says how many sequences there are, XDPCAST_SEED which is the first.
func TestConverges(t *testing.T) {
	labtest.RequireRoot(t)
	count, first := 0, uint64(time.Now().UnixNano()%1_000_000)
	if s := os.Getenv("XDPCAST_SEQUENCES"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatalf("XDPCAST_SEQUENCES=%q: want a number", s)
		}
		count = n
	}
	if s := os.Getenv("XDPCAST_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("XDPCAST_SEED=%q: want a number", s)
		}
		if first = n; count == 0 {
			count = 1
		}
	}
	ran := 0
	for started := time.Now(); count > 0 && ran < count || count == 0 && time.Since(started) < convergeTime; ran++ {
		seed := first + uint64(ran)
		if !t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) { converge(t, seed) }) {
			t.Logf("again: XDPCAST_SEED=%d go test ./internal/relay -run TestConverges", seed)
			if t.Failed() && count == 0 {
				break
			}
		}
	}
	t.Logf("%d sequences from seed %d on", ran, first)
}

func converge(t *testing.T, seed uint64) {
	w := newChangingWorld(t, seed)
	for range 2 + w.IntN(8) {
		w.step()
	}
	w.stopped(false)
	w.settle()
	w.flows()
	told, kernel := w.told()
	w.r.stop()
	anew := w.IntN(2) == 0
	if anew {
		w.event("a fresh relay, with pinned state of its own")
		if err := loader.Unload(w.p.opts.Loader); err != nil {
			t.Fatal(err)
		}
	} else {
		w.event("a fresh relay, which adopts the pinned state")
	}
	w.r = w.p.start()
	var told2, kernel2 string
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		told2, kernel2 = w.told()
		if told == told2 && kernel == kernel2 {
			break
		}
		if time.Now().After(deadline) {
			t.Errorf("what the API tells (-relay of the events +fresh one):\n%s\nthe flows in force:\n%s", cmp.Diff(strings.Split(told, "\n"), strings.Split(told2, "\n")), cmp.Diff(strings.Split(kernel, "\n"), strings.Split(kernel2, "\n")))
			break
		}
	}
	if t.Failed() {
		t.Logf("rules:\n%s\nevents:\n  %s", w.ruleText(), strings.Join(w.events, "\n  "))
	}
	w.r.stop()
}

// changingWorld is a relay and a network that changes.
type changingWorld struct {
	*rand.Rand
	t      *testing.T
	p      *place
	r      *running
	away   *lab.Host
	names  map[string]string // of the veths now, by their first name
	peers  map[string]bool   // whose other end is up
	leave  map[string]func() // takes another's program off
	tun    *os.File
	wanted []rules.Rule
	events []string
	resume func() // of a relay that is stopped
	altern map[string]bool
}

var veths = []string{"in0", "in1", "out0", "out1"}

func newChangingWorld(t *testing.T, seed uint64) *changingWorld {
	w := &changingWorld{
		Rand: rand.New(rand.NewPCG(seed, 0)), t: t, p: newQuickPlace(t), away: labtest.Host(t, "away"),
		names: map[string]string{}, peers: map[string]bool{}, leave: map[string]func(){}, altern: map[string]bool{},
	}
	w.p.opts.observeEvery = 50 * time.Millisecond
	for _, name := range veths {
		w.names[name], w.peers[name] = name, true
	}
	w.connect("in1", 0)
	for _, sysctl := range []string{"default", "out0", "out1"} {
		setSysctl(t, w.p.peer, "ipv4/conf/"+sysctl+"/arp_notify", "1")
	}
	w.p.opts.ConfigFile = w.p.file("rules.yaml", "rules: []\n")
	w.r = w.p.start()
	w.newRules()
	t.Cleanup(func() {
		w.stopped(false)
		if w.tun != nil {
			w.tun.Close()
		}
	})
	return w
}

func (w *changingWorld) event(format string, args ...any) {
	w.events = append(w.events, fmt.Sprintf(format, args...))
}

func pickOf[T any](w *changingWorld, from ...T) T { return from[w.IntN(len(from))] }

func subnet(name string) int { return map[string]int{"in0": 0, "out0": 1, "out1": 2, "in1": 3}[name] }

func (w *changingWorld) connect(name string, index int) {
	n := subnet(name)
	labtest.Connect(w.t, lab.End{Host: w.p.host, Name: name, Index: index, Addrs: []string{fmt.Sprintf("10.%d.0.1/24", n)}},
		lab.End{Host: w.p.peer, Name: name, Addrs: []string{fmt.Sprintf("10.%d.0.2/24", n)}})
}

// newRules replaces the rules by others.
func (w *changingWorld) newRules() {
	for {
		var all []rules.Rule
		for i := range 2 + w.IntN(4) {
			all = append(all, w.rule(i))
		}
		if rules.ValidateSet(all) != nil {
			continue
		}
		w.wanted = all
		break
	}
	var file []byte
	for _, rule := range w.wanted {
		file = rules.AppendRule(file, rule)
	}
	if err := os.WriteFile(w.p.opts.ConfigFile, rules.EndFile(file), 0o600); err != nil {
		w.t.Fatal(err)
	}
	if w.resume != nil {
		w.stopped(false) // nobody could tell it
	}
	if _, err := w.r.Reload(w.t.Context(), control.ApplyOptions{}); err != nil {
		w.t.Fatal(err)
	}
}

func (w *changingWorld) rule(i int) rules.Rule {
	rule := stream(fmt.Sprintf("r%d", i), pickOf(w, "in0", "in0", "in1", "in+", "br0", "late0"), fmt.Sprintf("239.1.%d.1", i))
	if w.IntN(4) == 0 {
		rule.In.Source = addr("192.168.7.7")
	}
	rule.Path = pickOf(w, rules.PathAuto, rules.PathAuto, rules.PathAuto, rules.PathKernel, rules.PathAFXDP, rules.PathFanout)
	for slot := range 1 + w.IntN(3) {
		o := to(pickOf(w, "out0", "out0", "out1", "out+", "br0", "late0", "tun0"), fmt.Sprintf("239.2.%d.%d", i, slot+1))
		switch w.IntN(4) {
		case 0:
			o.Policy.Source = rules.SourceKeep
		case 1:
			o.Interface = pickOf(w, "out0", "out1")
			o.Address = addr(fmt.Sprintf("10.%d.0.2", subnet(o.Interface)))
			o.Port = uint16(7000 + slot)
		}
		rule.Out = append(rule.Out, o)
	}
	return rule
}

func (w *changingWorld) ruleText() string {
	var b strings.Builder
	for _, r := range w.wanted {
		fmt.Fprintf(&b, "  %s\n", r)
	}
	return b.String()
}

// link is a veth as it is now; nil while it is absent.
func (w *changingWorld) link(first string) netlink.Link {
	l, err := w.p.host.Link(w.names[first])
	if err != nil {
		return nil
	}
	return l
}

func (w *changingWorld) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatalf("%v\nevents:\n  %s", err, strings.Join(w.events, "\n  "))
	}
}

// stopped stops the relay, as SIGSTOP does, or lets it go on.
func (w *changingWorld) stopped(yes bool) {
	switch {
	case yes && w.resume == nil:
		w.event("the relay is stopped")
		held, release, ended := make(chan struct{}), make(chan struct{}), make(chan error, 1)
		r := w.r
		go func() { ended <- r.do(w.t.Context(), func() error { close(held); <-release; return nil }) }()
		<-held
		w.resume = func() {
			close(release)
			<-ended
		}
	case !yes && w.resume != nil:
		w.event("the relay goes on")
		w.resume()
		w.resume = nil
	}
}

// step makes one event happen.
func (w *changingWorld) step() {
	name := pickOf(w, veths...)
	n := len(w.events)
	for len(w.events) == n { // not every one is possible now
		pickOf(w, w.upDown, w.carrier, w.remake, w.remake, w.visit, w.visit, w.rename, w.enslave, w.address, w.route, w.neighbour, w.mtu, w.mac,
			w.queues, w.foreign, w.detach, w.unpin, w.stop, w.stop, w.restart, w.reload, w.alternative, w.tunnel, w.bridge)(name)
		name = pickOf(w, veths...)
	}
}

func (w *changingWorld) upDown(name string) {
	if l := w.link(name); l != nil {
		up := l.Attrs().Flags&net.FlagUp == 0
		w.event("%s up: %v", w.names[name], up)
		w.must(w.p.host.SetUp(w.names[name], up))
	}
}

func (w *changingWorld) carrier(name string) {
	if w.link(name) != nil {
		w.peers[name] = !w.peers[name]
		w.event("the other end of %s up: %v", w.names[name], w.peers[name])
		w.must(w.p.peer.SetUp(name, w.peers[name]))
	}
}

func (w *changingWorld) remake(name string) {
	l := w.link(name)
	if l == nil {
		w.event("%s is made", name)
		w.names[name], w.peers[name] = name, true
		w.connect(name, 0)
		return
	}
	index := l.Attrs().Index
	w.must(w.p.host.Netlink().LinkDel(l))
	delete(w.leave, name)
	delete(w.altern, name)
	switch w.IntN(3) {
	case 0:
		w.event("%s is deleted", w.names[name])
		w.names[name] = name
		return
	case 1:
		w.event("%s is made again with index %d", name, index)
	case 2:
		w.event("%s is made again", name)
		index = 0
	}
	w.names[name], w.peers[name] = name, true
	w.connect(name, index)
}

func (w *changingWorld) visit(name string) {
	if w.link(name) == nil || !w.peers[name] {
		return
	}
	w.event("%s visits another namespace", w.names[name])
	delete(w.altern, name) // the kernel drops them
	w.must(w.p.host.Excursion(lab.End{Host: w.p.host, Name: w.names[name], Addrs: []string{fmt.Sprintf("10.%d.0.1/24", subnet(name))}}, w.away))
}

func (w *changingWorld) rename(name string) {
	l := w.link(name)
	if l == nil {
		return
	}
	to := name
	if w.names[name] == name {
		to = "x" + name
	}
	w.event("%s is called %s", w.names[name], to)
	w.must(w.p.host.Netlink().LinkSetName(l, to))
	w.names[name] = to
}

func (w *changingWorld) bridge(string) {
	l, err := w.p.host.Link("br0")
	if err == nil {
		w.event("br0 is deleted")
		w.must(w.p.host.Netlink().LinkDel(l))
		return
	}
	w.event("br0 is made")
	w.p.bridge("br0", "10.9.0.1/24")
}

func (w *changingWorld) enslave(name string) {
	l := w.link(name)
	br, err := w.p.host.Link("br0")
	if l == nil || err != nil {
		return
	}
	if l.Attrs().MasterIndex != 0 {
		w.event("%s leaves br0", w.names[name])
		w.must(w.p.host.Netlink().LinkSetNoMaster(l))
		return
	}
	w.event("%s is a port of br0", w.names[name])
	w.must(w.p.host.Netlink().LinkSetMaster(l, br))
}

func (w *changingWorld) address(name string) {
	l := w.link(name)
	if l == nil {
		return
	}
	all, err := w.p.host.Netlink().AddrList(l, unix.AF_INET)
	w.must(err)
	if len(all) > 0 && w.IntN(2) == 0 {
		w.event("%s loses %s", w.names[name], all[0].IPNet)
		w.must(w.p.host.Netlink().AddrDel(l, &all[0]))
		return
	}
	cidr := fmt.Sprintf("10.%d.0.%d/24", subnet(name), pickOf(w, 1, 11, 12))
	if !slices.ContainsFunc(all, func(a netlink.Addr) bool { return a.IPNet.String() == cidr }) {
		w.event("%s gets %s", w.names[name], cidr)
		w.must(w.p.host.AddAddr(w.names[name], cidr))
	}
}

func (w *changingWorld) route(name string) {
	l := w.link(name)
	if l == nil || l.Attrs().Flags&net.FlagUp == 0 {
		return
	}
	_, dst, _ := net.ParseCIDR(fmt.Sprintf("203.0.%d.0/24", w.IntN(4)))
	w.event("a route to %s by %s", dst, w.names[name])
	w.must(w.p.host.Netlink().RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst, Scope: netlink.SCOPE_LINK}))
}

func (w *changingWorld) neighbour(name string) {
	l := w.link(name)
	if l == nil || l.Attrs().Flags&net.FlagUp == 0 || !w.peers[name] {
		return
	}
	if w.IntN(2) == 0 {
		w.event("the other end of %s gets another MAC address", w.names[name])
		peer, err := w.p.peer.Link(name)
		w.must(err)
		w.must(w.p.peer.Netlink().LinkSetHardwareAddr(peer, net.HardwareAddr{2, 0, 0, 0, byte(w.IntN(256)), byte(w.IntN(256))}))
		return
	}
	e := netlink.Neigh{LinkIndex: l.Attrs().Index, IP: net.IPv4(10, byte(subnet(name)), 0, 2)}
	w.event("the neighbour on %s is removed", w.names[name])
	if err := w.p.host.Netlink().NeighDel(&e); err != nil && !errors.Is(err, unix.ENOENT) {
		w.must(err)
	}
}

func (w *changingWorld) mtu(name string) {
	l := w.link(name)
	if l == nil {
		return
	}
	mtu := pickOf(w, 1500, 1400, 3000, 9000)
	w.event("%s has MTU %d", w.names[name], mtu)
	peer, err := w.p.peer.Link(name)
	w.must(err)
	w.must(w.p.peer.Netlink().LinkSetMTU(peer, mtu))
	w.must(w.p.host.Netlink().LinkSetMTU(l, mtu))
}

func (w *changingWorld) mac(name string) {
	if l := w.link(name); l != nil {
		w.event("%s gets another MAC address", w.names[name])
		w.must(w.p.host.Netlink().LinkSetHardwareAddr(l, net.HardwareAddr{2, 0, 0, 1, byte(w.IntN(256)), byte(w.IntN(256))}))
	}
}

func (w *changingWorld) queues(name string) {
	if w.link(name) == nil {
		return
	}
	// More than one there is not; the announcement is what counts.
	w.event("%s is told its queues", w.names[name])
	labtest.Do(w.t, w.p.host, func() error { return lab.SetChannels(w.names[name], 1, 1) })
}

func (w *changingWorld) foreign(name string) {
	if leave := w.leave[name]; leave != nil {
		w.event("another's program leaves %s", w.names[name])
		leave()
		delete(w.leave, name)
		return
	}
	l := w.link(name)
	if l == nil || l.Attrs().Xdp != nil && l.Attrs().Xdp.Attached {
		return
	}
	w.event("another's program is on %s", w.names[name])
	current := name
	leave := w.p.foreign(w.names[name])
	w.leave[name] = func() {
		if w.names[current] == current {
			leave()
			return
		}
		labtest.Do(w.t, w.p.host, func() error { return netlink.LinkSetXdpFd(w.link(current), -1) })
	}
}

// pins lists what is pinned in a directory of the pin directory.
func (w *changingWorld) pins(dir string) (names []string) {
	entries, err := os.ReadDir(filepath.Join(w.p.opts.Loader.PinDir, dir))
	w.must(err)
	for _, e := range entries {
		if !e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names
}

func (w *changingWorld) detach(string) {
	names := slices.DeleteFunc(w.pins("links"), func(name string) bool { return !strings.HasPrefix(name, "if") && !strings.HasPrefix(name, "tapped") })
	if len(names) > 0 {
		pin := pickOf(w, names...)
		w.event("the link %s is detached", pin)
		w.p.detachByForce(pin)
	}
}

func (w *changingWorld) unpin(string) {
	dir := pickOf(w, "", "programs", "links")
	if names := w.pins(dir); len(names) > 0 {
		pin := filepath.Join(dir, pickOf(w, names...))
		w.event("the pin %s is removed", pin)
		w.must(os.Remove(filepath.Join(w.p.opts.Loader.PinDir, pin)))
	}
}

func (w *changingWorld) stop(string) { w.stopped(w.resume == nil) }

func (w *changingWorld) restart(string) {
	w.stopped(false)
	w.looked() // what is not pinned does not outlive it
	w.event("the relay is restarted")
	w.r.stop()
	if w.IntN(2) == 0 {
		w.visit(pickOf(w, veths...))
		w.remake(pickOf(w, veths...))
	}
	w.r = w.p.start()
}

func (w *changingWorld) reload(string) {
	w.event("other rules")
	w.newRules()
	w.event("rules:\n%s", w.ruleText())
}

func (w *changingWorld) alternative(name string) {
	l := w.link(name)
	if l == nil {
		return
	}
	alt := pickOf(w, "late0", "alt-of-"+name)
	if w.altern[name] || alt == "late0" && slices.Contains(slices.Collect(maps.Values(w.altern)), true) {
		return
	}
	w.event("%s is known as %s, too", w.names[name], alt)
	w.must(w.p.host.Netlink().LinkAddAltName(l, alt))
	w.altern[name] = true
}

func (w *changingWorld) tunnel(string) {
	if w.tun != nil {
		w.event("tun0 is deleted")
		w.must(w.tun.Close())
		w.tun = nil
		return
	}
	w.event("tun0 is made")
	labtest.Do(w.t, w.p.host, func() (err error) {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		w.tun = os.NewFile(uintptr(fd), "tun0")
		request, err := unix.NewIfreq("tun0")
		if err != nil {
			return err
		}
		request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		return unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	})
	w.must(w.p.host.AddAddr("tun0", "10.7.0.1/24"))
	w.must(w.p.host.SetUp("tun0", true))
}

// looked waits until the relay has looked at everything after what has happened.
func (w *changingWorld) looked() {
	w.t.Helper()
	var before, after time.Time
	at := func(to *time.Time) {
		// However long the last look took on a busy machine.
		w.must(w.r.do(w.t.Context(), func() error { *to, w.r.observing = w.r.observed, 0; return nil }))
	}
	at(&before)
	labtest.Eventually(w.t, "the relay has looked at everything", func() bool { at(&after); return after.After(before) })
}

// settle waits until the network has come to rest, and the relay with it.
func (w *changingWorld) settle() {
	w.t.Helper()
	// The kernel announces carriers up to a second late.
	labtest.Eventually(w.t, "the kernel knows all carriers", func() bool {
		ports := false
		for _, name := range veths {
			l := w.link(name)
			if l == nil {
				continue
			}
			running := l.Attrs().OperState == netlink.OperUp
			if want := l.Attrs().Flags&net.FlagUp != 0 && w.peers[name]; running != want {
				return false
			}
			ports = ports || running && l.Attrs().MasterIndex != 0
		}
		br, err := w.p.host.Link("br0")
		return err != nil || (br.Attrs().OperState == netlink.OperUp) == ports
	})
	last, since := "", time.Now()
	var restless []string
	defer func() {
		if w.t.Failed() {
			w.t.Logf("what changed:\n%s\nrules:\n%s\nevents:\n  %s", strings.Join(restless, "\n"), w.ruleText(), strings.Join(w.events, "\n  "))
		}
	}()
	labtest.Eventually(w.t, "the relay has come to rest", func() bool {
		w.looked()
		told, kernel := w.told()
		if now := told + kernel; now != last {
			restless = append(restless[max(0, len(restless)-4):], cmp.Diff(strings.Split(last, "\n"), strings.Split(now, "\n")))
			last, since = now, time.Now()
		}
		return time.Since(since) > 250*time.Millisecond && !strings.Contains(last, "being looked up")
	})
}

var (
	triesText   = regexp.MustCompile(`; \d+ tries, next at [0-9:]+`)
	answerText  = regexp.MustCompile(`has not answered yet|does not answer`)
	programText = regexp.MustCompile(`id \d+`)
)

// told is what the API tells and which flows are in force, without what differs from one relay
// to the next: numbers, counters, times. The path of a rule is left out that has an output of
// which nothing is known: it stays where it was then.
func (w *changingWorld) told() (api, kernel string) {
	w.t.Helper()
	var b strings.Builder
	all, err := w.r.Rules(w.t.Context())
	w.must(err)
	stays := map[string]bool{}
	for _, s := range all {
		for _, o := range s.Outputs {
			if o.State != control.StateActive && (strings.Contains(o.Reason, "not found") || strings.Contains(o.Reason, "is down") || strings.Contains(o.Reason, "no carrier")) {
				stays[s.Name] = true
			}
		}
		path, reason := s.UsedPath, s.Reason
		if stays[s.Name] {
			path, reason = "", ""
		}
		fmt.Fprintf(&b, "rule %s %s (%s) path %s\n", s.Name, s.State, reason, path)
		for _, o := range s.Outputs {
			if stays[s.Name] && strings.Contains(o.Reason, "does not send redirected frames") {
				o.Reason = ""
				o.State = control.StateActive
			}
			fmt.Fprintf(&b, "  %s %s (%s) %s %s\n", o.Output, o.State, o.Reason, o.NextHop, o.MAC)
		}
		for _, i := range s.Inputs {
			if stays[s.Name] {
				i.Reason = ""
			}
			fmt.Fprintf(&b, "  in %s %s (%s)\n", i.Interface, i.State, i.Reason)
		}
	}
	groups, err := w.r.Groups(w.t.Context())
	w.must(err)
	for _, g := range groups {
		fmt.Fprintf(&b, "group %s %d %s %s %s %v %s %v\n", g.Interface, g.Index, g.Group, g.Source, g.State, g.Rules, g.Master, g.For)
	}
	status, err := w.r.Status(w.t.Context())
	w.must(err)
	for _, i := range status.Interfaces {
		if len(i.Roles) == 0 && i.Mode == "" {
			continue // has only counters of what was
		}
		if strings.HasPrefix(i.Note, "native: ") {
			i.Note = "" // why it could not be attached so is not known of one that is adopted
		}
		fmt.Fprintf(&b, "interface %s %d %s %s %s %v (%s)\n", i.Name, i.Index, i.Link, i.Master, i.Mode, i.Roles, i.Note)
	}
	fmt.Fprintf(&b, "warnings %q\n", status.Warnings)
	api = triesText.ReplaceAllString(answerText.ReplaceAllString(programText.ReplaceAllString(b.String(), "id N"), "no answer"), "")
	var flows []string
	w.must(w.r.do(w.t.Context(), func() error {
		for _, f := range w.r.loader.Rules() {
			if name, _, _ := strings.Cut(f.Name, "%"); stays[name] {
				f.Path, f.Fallback, f.Steered, f.Out = 0, false, false, nil
			}
			flows = append(flows, fmt.Sprintf("%+v", f))
		}
		return nil
	}))
	slices.Sort(flows)
	return api, strings.Join(flows, "\n")
}

// flows sends a packet for each rule, which must come out of each output that the state
// calls active and whose other end can receive.
func (w *changingWorld) flows() {
	w.t.Helper()
	all, err := w.r.Rules(w.t.Context())
	w.must(err)
	taps := map[string]*labtest.Tap{}
	for _, name := range veths {
		if w.link(name) != nil && w.peers[name] {
			taps[w.names[name]] = labtest.NewTap(w.t, w.p.peer, name)
		}
	}
	for i, s := range all {
		inputs := []string{w.wanted[i].In.Interface}
		if isPattern(inputs[0]) {
			inputs = nil
			for _, in := range s.Inputs {
				if in.State == control.StateActive {
					inputs = append(inputs, in.Interface)
				}
			}
		}
		for _, in := range inputs {
			if l, err := w.p.host.Link(in); err == nil && taps[l.Attrs().Name] != nil && s.State == control.StateActive && l.Attrs().Flags&net.FlagUp != 0 {
				w.flowsFor(w.wanted[i], s, taps[l.Attrs().Name], taps)
			}
		}
	}
}

func (w *changingWorld) flowsFor(rule rules.Rule, s control.RuleStatus, in *labtest.Tap, taps map[string]*labtest.Tap) {
	w.t.Helper()
	expect := map[int]*labtest.Tap{}
	for slot, o := range s.Outputs {
		if o.State == control.StateActive && taps[o.Interface] != nil {
			expect[slot] = taps[o.Interface]
		}
	}
	for try := range 10 {
		marker := fmt.Appendf(nil, "<%s try %d of %p>", rule.Name, try, in)
		in.Send(packet.Frame{
			DstMAC: packet.MulticastMAC(rule.In.Address), SrcMAC: [6]byte{2, 0, 0, 0, 9, 9},
			Src: netip.MustParseAddr("192.168.7.7"), Dst: rule.In.Address, SrcPort: 4321, DstPort: rule.In.Port, TTL: 12, Payload: marker,
		}.Build())
		for slot, tap := range expect {
			dst, _, _ := strings.Cut(s.Outputs[slot].Output, "%")
			to := netip.MustParseAddrPort(dst)
			found := tap.Receive(200*time.Millisecond, func(f []byte) bool {
				h, ok := packet.Parse(f)
				return ok && bytes.Contains(f, marker) && netip.AddrPortFrom(h.Dst, h.DstPort) == to
			})
			if found != nil {
				delete(expect, slot)
			}
		}
		if len(expect) == 0 {
			return
		}
	}
	for slot := range expect {
		w.t.Errorf("rule %s: nothing comes out of output %s, which is active (path %s)", rule.Name, s.Outputs[slot].Output, s.UsedPath)
	}
}
