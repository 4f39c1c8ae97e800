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
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
	"xdpcast/pkg/rules"
)

const (
	// convergeTime is how long TestConverges runs where nobody says how many sequences there are
	// to be, and convergeCount how many it runs at most then.
	convergeTime  = 80 * time.Second
	convergeCount = 300
	// convergeBeside is how many worlds there are beside each other: a sequence waits for the kernel
	// - grace periods, carriers, which are announced up to a second late - far longer than it computes.
	convergeBeside = 12
)

// Whatever happens, in whatever order, the relay ends where one would that is started
// now: random sequences of events over random rules, after each of which the state that the API tells
// and the flows that the kernel holds equal those of a fresh process, which has adopted the pinned
// state or, now and then, made its own, and packets come out where the state says so. The relay is a
// process, which is stopped, continued, killed and restarted by signals.
//
// The sequences of a world follow each other on a network that is made anew where it was touched, with the
// rules, pinned state and relay of those before. XDPCAST_SEQUENCES says how many sequences there
// are, XDPCAST_SEED which is the first.
func TestConverges(t *testing.T) {
	labtest.RequireRoot(t)
	c := &convergence{first: uint64(time.Now().UnixNano() % 1_000_000), until: time.Now().Add(convergeTime), most: convergeCount, beside: convergeBeside}
	number := func(name string, to *uint64) bool {
		s := os.Getenv(name)
		if s == "" {
			return false
		}
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("%s=%q: want a number", name, s)
		}
		*to, c.until = n, time.Now().Add(time.Hour)
		return true
	}
	counted := number("XDPCAST_SEQUENCES", &c.most)
	if number("XDPCAST_SEED", &c.first) && !counted {
		c.most = 1
	}
	c.beside = min(c.beside, c.most)
	var worlds sync.WaitGroup
	for i := range c.beside { // t.Parallel would run as many as there are CPUs
		worlds.Go(func() { t.Run(fmt.Sprintf("world=%d", i), func(t *testing.T) { c.run(t, i) }) })
	}
	worlds.Wait()
	t.Logf("%d sequences from seed %d on, in %d worlds, with %d events: %d times the relay was stopped and continued, %d times killed, %d times restarted",
		c.ran.Load(), c.first, c.beside, c.happened.Load(), c.stops.Load(), c.kills.Load(), c.restarts.Load())
}

// convergence is one TestConverges.
type convergence struct {
	first, most, beside uint64
	until               time.Time

	given, ran, happened, stops, kills, restarts atomic.Uint64
}

// run runs sequences in a world of their own until there are enough, or one fails.
func (c *convergence) run(t *testing.T, world uint64) {
	w := newChangingWorld(t, c)
	var before []uint64
	for time.Now().Before(c.until) && !t.Failed() {
		n := c.given.Add(1) - 1
		if n >= c.most {
			return
		}
		seed := c.first + n
		w.begin(seed)
		w.converge()
		if t.Failed() {
			t.Errorf("sequence of seed %d in world %d, after those of %v; alone: XDPCAST_SEED=%d go test ./internal/relay -run TestConverges\nrules:\n%s\nevents:\n  %s",
				seed, world, before, seed, w.ruleText(), strings.Join(w.events, "\n  "))
		}
		before = append(before, seed)
		c.ran.Add(1)
	}
}

// converge makes events happen, and compares the relay with a fresh one.
func (w *changingWorld) converge() {
	for range 2 + w.IntN(8) {
		w.step()
	}
	w.stopped(false)
	w.settle()
	w.flows()
	told, kernel := w.told()
	switch w.IntN(10) {
	case 0:
		w.event("a fresh relay, with pinned state of its own")
		w.relay.stop()
		var err error
		// A process that another world starts meanwhile would hold a copy of its lock, which the fresh relay takes.
		labtest.WithoutForks(func() { err = loader.Unload(w.p.opts.Loader) })
		w.must(err)
	case 1, 2, 3:
		w.event("a fresh relay, which adopts the pinned state of one that was killed")
		w.kills.Add(1)
		w.relay.kill()
	default:
		w.event("a fresh relay, which adopts the pinned state")
		w.relay.stop()
	}
	w.relay.start()
	var told2, kernel2 string
	for deadline := time.Now().Add(labtest.Timeout); ; time.Sleep(20 * time.Millisecond) {
		told2, kernel2 = w.told()
		if told == told2 && kernel == kernel2 {
			break
		}
		if time.Now().After(deadline) {
			w.t.Errorf("what the API tells (-relay of the events +fresh one):\n%s\nthe flows in force:\n%s", cmp.Diff(strings.Split(told, "\n"), strings.Split(told2, "\n")), cmp.Diff(strings.Split(kernel, "\n"), strings.Split(kernel2, "\n")))
			break
		}
	}
}

// changingWorld is a relay and a network that changes.
type changingWorld struct {
	*rand.Rand
	*convergence
	t       *testing.T
	p       *place
	relay   *process
	away    *lab.Host
	touched map[string]bool   // veths that are not as they were made
	names   map[string]string // of the veths now, by their first name
	peers   map[string]bool   // whose other end is up
	leave   map[string]func() // takes another's program off
	tun     *os.File
	wanted  []rules.Rule // of the file
	single  []rules.Rule // of the API, by name, which come after those
	events  []string
	paused  bool // the relay is
	// unpinned: a pin was removed, and the relay may not have made it again.
	unpinned bool
	altern   map[string]bool
	probes   int // so far
}

var veths = []string{"in0", "in1", "out0", "out1"}

func newChangingWorld(t *testing.T, c *convergence) *changingWorld {
	w := &changingWorld{
		convergence: c, t: t, p: newPlace(t), away: labtest.Host(t, "away"), touched: map[string]bool{},
		names: map[string]string{}, peers: map[string]bool{}, leave: map[string]func(){}, altern: map[string]bool{},
	}
	for _, name := range veths {
		w.names[name], w.peers[name] = name, true
	}
	w.connect("in1", 0)
	for _, sysctl := range []string{"default", "out0", "out1"} {
		setSysctl(t, w.p.peer, "ipv4/conf/"+sysctl+"/arp_notify", "1")
	}
	w.p.opts.ConfigFile = w.p.file("rules.yaml", "rules: []\n")
	w.relay = newProcess(w.p)
	w.relay.start()
	t.Cleanup(func() {
		if w.tun != nil {
			w.tun.Close()
		}
	})
	return w
}

// begin begins a sequence: with the network as it was at first, and other rules.
func (w *changingWorld) begin(seed uint64) {
	w.Rand, w.events = rand.New(rand.NewPCG(seed, 0)), nil
	if br, err := w.p.host.Link("br0"); err == nil { // first: see foreign
		w.must(w.p.host.Netlink().LinkDel(br))
	}
	for name, leave := range w.leave {
		leave()
		delete(w.leave, name)
	}
	w.deleteTun()
	for _, name := range veths {
		if !w.touched[name] {
			continue
		}
		if l := w.link(name); l != nil {
			w.must(w.p.host.Netlink().LinkDel(l))
		}
		delete(w.altern, name)
		w.names[name], w.peers[name] = name, true
		w.connect(name, 0)
	}
	clear(w.touched)
	w.newRules()
}

func (w *changingWorld) event(format string, args ...any) {
	w.happened.Add(1)
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
	w.stopped(false) // nobody could tell it
	if _, err := w.relay.client.Reload(w.t.Context(), control.ApplyOptions{}); err != nil {
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

// putSingle deletes a rule of the API, or adds one.
func (w *changingWorld) putSingle(string) {
	w.stopped(false)   // nobody could tell it
	n := 6 + w.IntN(4) // groups that no rule of the file takes
	name := fmt.Sprintf("s%d", n)
	if i := slices.IndexFunc(w.single, func(r rules.Rule) bool { return r.Name == name }); i >= 0 {
		w.event("rule %s is deleted", name)
		w.must(w.relay.client.DeleteRule(w.t.Context(), name))
		w.single = slices.Delete(w.single, i, i+1)
		return
	}
	rule := w.rule(n)
	rule.Name = name
	w.event("rule %s is added: %s", name, rule)
	if _, err := w.relay.client.AddRule(w.t.Context(), control.FromRule(rule)); err != nil {
		w.event("which is refused: %v", err)
		return
	}
	w.single = append(w.single, rule)
	slices.SortFunc(w.single, func(a, b rules.Rule) int { return strings.Compare(a.Name, b.Name) })
}

// all are the rules as the API lists them.
func (w *changingWorld) all() []rules.Rule { return slices.Concat(w.wanted, w.single) }

func (w *changingWorld) ruleText() string {
	var b strings.Builder
	for _, r := range w.all() {
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

// stopped stops the relay, or lets it go on.
func (w *changingWorld) stopped(yes bool) {
	switch {
	case yes && !w.paused:
		w.event("the relay is stopped")
		w.stops.Add(1)
		w.relay.signal(syscall.SIGSTOP)
	case !yes && w.paused:
		w.event("the relay goes on")
		w.relay.signal(syscall.SIGCONT)
	}
	w.paused = yes
}

// step makes one event happen.
func (w *changingWorld) step() {
	name := pickOf(w, veths...)
	n := len(w.events)
	for len(w.events) == n { // not every one is possible now
		w.touched[name] = true
		pickOf(w, w.upDown, w.carrier, w.remake, w.remake, w.visit, w.visit, w.rename, w.enslave, w.address, w.route, w.neighbour, w.mtu, w.mac,
			w.queues, w.foreign, w.detach, w.unpin, w.stop, w.stop, w.restart, w.killed, w.reload, w.putSingle, w.putSingle, w.putSingle, w.alternative, w.tunnel, w.bridge)(name)
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
	// What it answers goes to the bridge now: the kernel would find out at some time.
	w.forgetNeighbour(name, l)
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
	w.event("the neighbour on %s is removed", w.names[name])
	w.forgetNeighbour(name, l)
}

func (w *changingWorld) forgetNeighbour(name string, l netlink.Link) {
	e := netlink.Neigh{LinkIndex: l.Attrs().Index, IP: net.IPv4(10, byte(subnet(name)), 0, 2)}
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
	if err := w.p.peer.Netlink().LinkSetMTU(peer, mtu); err != nil && (w.leave[name] == nil || !errors.Is(err, unix.EINVAL)) {
		w.must(err) // a program that takes no frames of several buffers bounds both ends
	}
	if err := w.p.host.Netlink().LinkSetMTU(l, mtu); err != nil {
		if w.leave[name] == nil || !errors.Is(err, unix.EINVAL) {
			w.must(err)
		}
		w.event("which the other program there refuses")
	}
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
		if l := w.link(name); l != nil && l.Attrs().MasterIndex != 0 {
			return // the kernel refuses it while the bridge has a program, too: EEXIST
		}
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
	leave, err := w.p.tryForeign(w.names[name])
	if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ERANGE) {
		w.event("which is not to be: %v", err) // the relay has taken the interface meanwhile, or its bridge (EEXIST), or its MTU is too large
		return
	}
	w.must(err)
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
		w.unpinned = true
	}
}

func (w *changingWorld) stop(string) { w.stopped(!w.paused) }

func (w *changingWorld) restart(string) {
	w.stopped(false)
	w.looked() // what is not pinned does not outlive it
	w.event("the relay is restarted")
	w.restarts.Add(1)
	w.relay.stop()
	w.meanwhile()
	w.relay.start()
}

// killed kills the relay, also while it is stopped.
func (w *changingWorld) killed(string) {
	if w.unpinned {
		w.stopped(false) // or it could not make the pin again, and what misses one is refused
	}
	if !w.paused {
		w.looked()
	}
	w.event("the relay is killed")
	w.kills.Add(1)
	w.relay.kill()
	w.paused = false
	w.meanwhile()
	w.relay.start()
}

// meanwhile makes events happen, perhaps, while there is no relay.
func (w *changingWorld) meanwhile() {
	if w.IntN(2) == 0 {
		for _, event := range []func(string){w.visit, w.remake} {
			name := pickOf(w, veths...)
			w.touched[name] = true
			event(name)
		}
	}
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
	if err := w.p.host.Netlink().LinkAddAltName(l, alt); errors.Is(err, unix.EEXIST) {
		return // a link that came back has it still
	} else if err != nil {
		w.must(err)
	}
	w.altern[name] = true
}

// deleteTun deletes tun0, if there is one, and waits until it is gone: a process that another world is starting holds a
// copy of its descriptor until it has called execve.
func (w *changingWorld) deleteTun() {
	if w.tun == nil {
		return
	}
	w.must(w.tun.Close())
	w.tun = nil
	labtest.Eventually(w.t, "tun0 is gone", func() bool {
		_, err := w.p.host.Link("tun0")
		return err != nil
	})
}

func (w *changingWorld) tunnel(string) {
	if w.tun != nil {
		w.event("tun0 is deleted")
		w.deleteTun()
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
	before := w.relay.looks() + 1 // the one that it may be at
	labtest.Eventually(w.t, "the relay has looked at everything", func() bool { return w.relay.looks() > before })
	w.unpinned = false
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
	last, since, began := "", time.Now(), time.Now()
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
		// The kernel asks a neighbour that did not answer again after 5 s (interval_probe_time_ms).
		asking := strings.Contains(last, "no answer") && time.Since(began) < 8*time.Second
		return time.Since(since) > 250*time.Millisecond && !asking && !strings.Contains(last, "being looked up")
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
	all, err := w.relay.client.Rules(w.t.Context())
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
	groups, err := w.relay.client.Groups(w.t.Context())
	w.must(err)
	for _, g := range groups {
		fmt.Fprintf(&b, "group %s %d %s %s %s %v %s %v\n", g.Interface, g.Index, g.Group, g.Source, g.State, g.Rules, g.Master, g.For)
	}
	status, err := w.relay.client.Status(w.t.Context())
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
	for _, f := range w.inForce() {
		if name, _, _ := strings.Cut(f.Name, "%"); stays[name] {
			f.Path, f.Fallback, f.Steered, f.Finish, f.Out = 0, false, false, false, nil
		}
		flows = append(flows, fmt.Sprintf("%+v", f))
	}
	slices.Sort(flows)
	return api, strings.Join(flows, "\n")
}

// inForce reads the flows that the kernel holds.
func (w *changingWorld) inForce() []flow.Flow {
	w.t.Helper()
	reader, err := loader.OpenReader(w.p.opts.Loader.PinDir)
	w.must(err)
	defer reader.Close()
	all, err := reader.Rules()
	w.must(err)
	return all
}

// flows sends a packet for each rule, which must come out of each output that the state
// calls active and whose other end can receive.
func (w *changingWorld) flows() {
	w.t.Helper()
	all, err := w.relay.client.Rules(w.t.Context())
	w.must(err)
	taps := map[string]*labtest.Tap{}
	for _, name := range veths {
		if w.link(name) != nil && w.peers[name] {
			taps[w.names[name]] = labtest.NewTap(w.t, w.p.peer, name)
		}
	}
	wanted := w.all()
	for i, s := range all {
		inputs := []string{wanted[i].In.Interface}
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
				w.flowsFor(wanted[i], s, taps[l.Attrs().Name], taps)
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
	w.probes++
	marker := fmt.Appendf(nil, "<%s, probe %d, try ", rule.Name, w.probes)
	for try, deadline := 1, time.Now().Add(labtest.Timeout/4); time.Now().Before(deadline); try++ {
		in.Send(packet.Frame{
			DstMAC: packet.MulticastMAC(rule.In.Address), SrcMAC: [6]byte{2, 0, 0, 0, 9, 9},
			Src: netip.MustParseAddr("192.168.7.7"), Dst: rule.In.Address, SrcPort: 4321, DstPort: rule.In.Port, TTL: 12,
			Payload: fmt.Appendf(slices.Clone(marker), "%d>", try),
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
