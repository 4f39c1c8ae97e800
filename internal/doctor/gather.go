package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/discover"
	"xdpcast/internal/network"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/membership"
	"xdpcast/pkg/rules"
)

// Daemon is the part of control.Client that the doctor uses.
type Daemon interface {
	Status(context.Context) (control.Status, error)
	Groups(context.Context) ([]control.Group, error)
	Explain(ctx context.Context, packet string) (control.Explanation, error)
}

// Options configure Gather.
type Options struct {
	Daemon Daemon
	// Stats reads the counters of all rules, from the daemon or, without one, from the pinned maps.
	Stats  func(context.Context) (control.Stats, error)
	PinDir string
	// Interfaces are checked in addition to those of rules. Without either, network cards are.
	Interfaces []string
	// Rule is the rule to follow, which excludes the interfaces of other rules; empty for none.
	Rule string
	// Apart is the time between the two readings of the counters.
	Apart time.Duration
	// Root is the root of the file system: os.DirFS("/"), or its substitute in tests.
	Root fs.FS
}

// ErrNoRule is matched by the error for a rule that does not exist.
var ErrNoRule = errors.New("no such rule")

// gatherer collects the facts.
type gatherer struct {
	Options
	f       *Facts
	network *network.Snapshot
	stats   [2]control.Stats
	byName  map[string]*Interface
}

// Gather reads the facts in the calling thread's network namespace. It takes little longer than
// Options.Apart. Facts that cannot be read are listed in Host.Unread; errors are those of the
// daemon, of the host's network, and of a rule that does not exist (ErrNoRule).
func Gather(ctx context.Context, o Options) (*Facts, error) {
	runtime.LockOSThread() // child processes and sockets use this namespace
	defer runtime.UnlockOSThread()
	g := &gatherer{Options: o, f: &Facts{Host: Host{PinDir: o.PinDir, Apart: o.Apart}}, byName: map[string]*Interface{}}
	if err := g.snapshot(); err != nil {
		return nil, err
	}
	if err := g.daemon(ctx); err != nil {
		return nil, err
	}
	g.host(ctx)
	if err := g.rules(ctx); err != nil {
		return nil, err
	}
	if err := g.read(ctx, 0); err != nil {
		return nil, err
	}
	if err := g.wait(ctx); err != nil {
		return nil, err
	}
	if err := g.read(ctx, 1); err != nil {
		return nil, err
	}
	return g.finish(ctx)
}

// wait waits between the readings, and meanwhile watches for streams to the requested rule's groups
// that bypass it.
func (g *gatherer) wait(ctx context.Context) error {
	end := time.After(g.Apart)
	if o := g.watch(); len(o.Interfaces) > 0 {
		found, err := discover.Watch(ctx, o)
		g.unread("streams of the rule's group", err)
		for _, s := range found.Streams {
			if s.Port != 0 {
				g.f.Rule.Seen = append(g.f.Rule.Seen, Seen{s.Interface, s.Input().String(), s.Packets})
			}
		}
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-end:
		return nil
	}
}

// watch says what to watch meanwhile: no interface if there is nothing to see.
func (g *gatherer) watch() (o discover.Options) {
	if g.f.Rule == nil {
		return o
	}
	o = discover.Options{For: g.Apart, Passive: true}
	for _, r := range g.stats[0].Rules {
		ins, err := rules.ParseInputs(r.In)
		if err != nil {
			continue // reported before
		}
		o.Taken = append(o.Taken, ins...)
		for _, in := range ins {
			if r.Name == g.Rule && in.Address.IsMulticast() && !in.FromHost {
				o.Only = append(o.Only, in.Prefix())
			}
		}
	}
	if len(o.Only) == 0 {
		return discover.Options{}
	}
	for _, i := range g.f.Rule.Inputs {
		if i.Link != nil && i.Link.Up {
			o.Interfaces = append(o.Interfaces, discover.Interface{Name: i.Name, Index: i.Link.Index})
		}
	}
	return o
}

func (g *gatherer) unread(what string, err error) {
	if err != nil {
		g.f.Host.Unread = append(g.f.Host.Unread, fmt.Sprintf("%s: %v", what, err))
	}
}

// snapshot reads the host's network, once.
func (g *gatherer) snapshot() error {
	w, err := network.Open(network.Options{})
	if err != nil {
		return err
	}
	g.network, err = w.Snapshot()
	return errors.Join(err, w.Close())
}

// daemon queries the daemon, if one runs.
func (g *gatherer) daemon(ctx context.Context) error {
	status, err := g.Daemon.Status(ctx)
	if errors.Is(err, control.ErrNotRunning) {
		return nil
	}
	if err != nil {
		return err
	}
	g.f.Host.Daemon = &status
	g.f.Host.PinDir = status.PinDir
	g.f.Host.Groups, err = g.Daemon.Groups(ctx)
	return err
}

// host reads the facts about the whole host.
func (g *gatherer) host(ctx context.Context) {
	h := &g.f.Host
	h.CPUs = runtime.NumCPU()
	h.Release = strings.TrimSpace(g.text("proc/sys/kernel/osrelease"))
	h.Has, h.Lacks = loader.Probe()
	if errors.Is(h.Lacks, os.ErrPermission) {
		g.unread("features of the kernel", h.Lacks)
		h.Lacks, h.Has = nil, loader.Capabilities{MultiBuffer: true, SocketMultiBuffer: true, TCX: true}
	}
	const vulnerabilities = "sys/devices/system/cpu/vulnerabilities"
	h.Mitigations = map[string]string{}
	entries, _ := fs.ReadDir(g.Root, vulnerabilities) // not every architecture has it
	for _, e := range entries {
		h.Mitigations[e.Name()] = strings.TrimSpace(g.text(path.Join(vulnerabilities, e.Name())))
	}
	h.Mounted = onBPFFS(h.PinDir)
	if h.Mounted {
		h.Private = loader.PrivateMount(h.PinDir)
	}
	h.Process = g.process()
	h.Backlog, _ = strconv.Atoi(strings.TrimSpace(g.text("proc/sys/net/core/netdev_max_backlog")))
	h.Budget, _ = strconv.Atoi(strings.TrimSpace(g.text("proc/sys/net/core/netdev_budget")))
	g.firewall(ctx)
}

// text returns the contents of a file, "" if it cannot be read.
func (g *gatherer) text(name string) string {
	data, err := fs.ReadFile(g.Root, name)
	if err != nil {
		return ""
	}
	return string(data)
}

// onBPFFS reports whether dir, or the nearest existing directory above it, is on a BPF file system.
func onBPFFS(dir string) bool {
	for dir = filepath.Clean(dir); ; dir = filepath.Dir(dir) {
		var st unix.Statfs_t
		err := unix.Statfs(dir, &st)
		if err == nil {
			return st.Type == unix.BPF_FS_MAGIC
		}
		if dir == filepath.Dir(dir) {
			return false
		}
	}
}

// process reads the privileges and limits of the daemon, or of this process if none runs.
func (g *gatherer) process() (p Process) {
	dir := "proc/self"
	p.PID = os.Getpid()
	if d := g.f.Host.Daemon; d != nil {
		p.PID = d.PID
		dir = fmt.Sprintf("proc/%d", d.PID)
	}
	var err error
	p.Capabilities, err = parseCapabilities(g.text(dir + "/status"))
	g.unread(fmt.Sprintf("capabilities of process %d", p.PID), err)
	limits := g.text(dir + "/limits")
	files, err := parseLimit(limits, "Max open files")
	if err == nil {
		p.Limit = int(min(files, 1<<31))
		p.MemLock, err = parseLimit(limits, "Max locked memory")
	}
	g.unread(fmt.Sprintf("limits of process %d", p.PID), err)
	open, _ := fs.ReadDir(g.Root, dir+"/fd")
	p.Files = len(open)
	its, err := fs.ReadLink(g.Root, dir+"/ns/net")
	if own, ownErr := fs.ReadLink(g.Root, "proc/thread-self/ns/net"); err == nil && ownErr == nil {
		p.Elsewhere = its != own
	}
	g.unread(fmt.Sprintf("network namespace of process %d", p.PID), err)
	p.ClockOffset, err = parseClockOffset(g.text(dir + "/timens_offsets"))
	g.unread(fmt.Sprintf("time namespace of process %d", p.PID), err)
	return p
}

// firewall reads the nftables rules. A host without nft hardly has any.
func (g *gatherer) firewall(ctx context.Context) {
	if strings.TrimSpace(g.text("proc/thread-self/net/ip_tables_names")+g.text("proc/thread-self/net/ip6_tables_names")) != "" {
		g.unread("firewall", errors.New("there are tables of iptables-legacy: look at iptables-legacy -S for rules that drop IGMP"))
	}
	nft, err := exec.LookPath("nft")
	if err != nil {
		for _, dir := range []string{"/usr/sbin/nft", "/sbin/nft"} {
			if _, statErr := os.Stat(dir); statErr == nil {
				nft, err = dir, nil
			}
		}
	}
	if err != nil {
		if strings.Contains(g.text("proc/modules"), "nf_tables ") {
			g.unread("firewall", errors.New("nftables rules may be there, and the program nft is not"))
		}
		return
	}
	const patience = 10 * time.Second // 100,000 rules take a second
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, nft, "-j", "list", "ruleset").Output()
	if err == nil {
		g.f.Host.Firewall.Ruleset, err = ParseRuleset(out)
	}
	g.unread("firewall (nft -j list ruleset)", err)
}

// rules finds the interfaces to check.
func (g *gatherer) rules(ctx context.Context) (err error) {
	g.stats[0], err = g.Stats(ctx)
	if errors.Is(err, control.ErrNotRunning) {
		err = nil // nothing is loaded either
	}
	if errors.Is(err, loader.ErrSchema) || errors.Is(err, loader.ErrDamaged) {
		g.f.Host.Pinned, err = err, nil
	}
	if err != nil {
		return err
	}
	g.f.Host.Rules = len(g.stats[0].Rules)
	g.f.Host.Firewall.Groups = map[string][]netip.AddrPort{}
	found := g.Rule == ""
	for i := range g.stats[0].Rules {
		r := &g.stats[0].Rules[i]
		if g.Rule != "" && r.Name != g.Rule {
			continue
		}
		found = true
		g.rule(r)
	}
	if !found {
		return fmt.Errorf("%w: %.100q", ErrNoRule, g.Rule)
	}
	for _, name := range g.Interfaces {
		i := g.iface(name)
		i.Input = i.Input || !i.Output
	}
	if len(g.byName) == 0 && g.f.Host.Rules == 0 {
		for _, l := range g.network.Links() {
			if l.Hardware && l.Up {
				g.iface(l.Name).Input = true
			}
		}
	}
	g.interfaces()
	return nil
}

// iface returns the facts about an interface, and includes it in the checks.
func (g *gatherer) iface(name string) *Interface {
	link := g.network.Link(name)
	if link != nil {
		name = link.Name
	}
	i := g.byName[name]
	if i == nil {
		i = &Interface{Name: name, Link: link, CPUs: g.f.Host.CPUs, Apart: g.Apart}
		g.byName[name] = i
	}
	return i
}

// rule records a rule's interfaces.
func (g *gatherer) rule(r *control.RuleStatus) {
	var outputs []*Interface
	for _, o := range r.Outputs {
		if o.Interface == "" {
			if out, err := rules.ParseOutput(o.Output); err == nil && !pattern(out.Interface) {
				o.Interface = out.Interface
			}
		}
		if o.Interface != "" {
			i := g.iface(o.Interface)
			i.Output = true
			i.Wanted = i.Wanted || r.UsedPath == "kernel"
			outputs = append(outputs, i)
		}
	}
	for _, text := range strings.Fields(r.In) { // several inputs may carry one stream
		g.input(r, text, outputs)
	}
	if r.Name == g.Rule {
		g.follow(r)
		g.f.Rule.Outputs = outputs
	}
}

// input records the interfaces of one of a rule's inputs.
func (g *gatherer) input(r *control.RuleStatus, text string, outputs []*Interface) {
	in, accept, err := rules.ParseInput(text)
	if err != nil {
		g.unread("rule "+r.Name, err)
		return
	}
	for _, name := range g.inputs(in, r) {
		i := g.iface(name)
		i.Input, i.Wanted = true, i.Wanted || !in.FromHost
		i.Fanout = i.Fanout || r.UsedPath == "fanout"
		in := in
		in.Interface = name
		i.Inputs = append(i.Inputs, Input{in, accept.Join == rules.JoinNone})
		if in.Address.IsMulticast() && in.Len == 0 && len(g.f.Host.Firewall.Groups[name]) < maxGroups {
			g.f.Host.Firewall.Groups[name] = append(g.f.Host.Firewall.Groups[name], netip.AddrPortFrom(in.Address, in.Port))
		}
		for _, o := range outputs {
			if o.Link != nil && (i.SmallestOutput == nil || o.Link.SendMTU() < i.SmallestOutput.SendMTU()) {
				i.SmallestOutput = o.Link
			}
		}
		if r.Name == g.Rule {
			g.follow(r)
			g.f.Rule.Inputs = append(g.f.Rule.Inputs, i)
		}
	}
}

// maxGroups bounds the groups of an interface that are checked against the firewall.
const maxGroups = 1000

// follow creates the facts about the requested rule.
func (g *gatherer) follow(r *control.RuleStatus) {
	if g.f.Rule == nil {
		g.f.Rule = &Rule{Name: r.Name, Apart: g.Apart}
	}
}

// inputs returns the interfaces of a rule's input: for a pattern, those that match.
func (g *gatherer) inputs(in rules.Input, r *control.RuleStatus) (names []string) {
	if !pattern(in.Interface) {
		return []string{in.Interface}
	}
	for _, i := range r.Inputs {
		names = append(names, i.Interface)
	}
	return names
}

func pattern(ifname string) bool {
	_, ok := rules.IsPattern(ifname)
	return ok
}

// interfaces reads the facts about the interfaces, except their counters.
func (g *gatherer) interfaces() {
	g.attachments()
	versions, err := membership.IGMPVersions()
	g.unread("IGMP versions", err)
	receives, err := parseDevMcast(g.text("proc/thread-self/net/dev_mcast"))
	g.unread("groups that devices take", err)
	busy := parseInterrupts(g.text("proc/interrupts"))
	for _, group := range g.f.Host.Groups {
		if i := g.byName[group.Interface]; i != nil && group.State == control.GroupJoined {
			i.Joined++
		}
	}
	for _, name := range sortedKeys(g.byName) {
		i := g.byName[name]
		if i.Link == nil {
			continue
		}
		i.IGMPVersion = versions[i.Link.Index]
		i.Receives = receives[name]
		if receives != nil && i.Receives == nil {
			i.Receives = map[[6]byte]bool{}
		}
		g.forced(i)
		g.master(i)
		for _, l := range g.network.Links() {
			if l.Lower == i.Link.Index && slices.Contains([]string{"macvlan", "macvtap", "ipvlan", "ipvtap"}, l.Kind) {
				i.Above = append(i.Above, l.Name)
			}
		}
		d, err := network.ReadDevice(i.Link)
		if err == nil && d.Bus != "" {
			i.Interrupts = g.affinity(d.Bus, busy)
		}
		if i.Input && i.Joined > 0 || i.Input && g.f.Host.Daemon == nil {
			g.f.Host.Firewall.Inputs = append(g.f.Host.Firewall.Inputs, name)
		}
	}
}

// attachments finds where the relay program runs, from the daemon or, without one, from the pins.
func (g *gatherer) attachments() {
	if d := g.f.Host.Daemon; d != nil {
		for _, s := range d.Interfaces {
			if i := g.byName[s.Name]; i != nil {
				i.Program, i.Mode, i.Note, i.IGMP, i.MLD = s.ProgramID, s.Mode, s.Note, s.IGMP, s.MLD
			}
		}
		return
	}
	r, err := loader.OpenReader(g.f.Host.PinDir)
	switch {
	case errors.Is(err, loader.ErrNotLoaded):
		return
	case err != nil:
		g.f.Host.Pinned = err
		return
	}
	all, err := r.Attachments()
	g.unread("attached programs", errors.Join(err, r.Close()))
	for _, a := range all {
		if i := g.byName[a.Interface]; i != nil {
			i.Program, i.Mode = a.ProgramID, a.Mode.String()
		}
	}
}

// forced reads the versions that sysctls force. In IPv4, "all" takes precedence over the
// interface's own (IN_DEV_CONF_GET of force_igmp_version).
func (g *gatherer) forced(i *Interface) {
	for _, name := range []string{"all", i.Name} {
		if n, _ := strconv.Atoi(strings.TrimSpace(g.text("proc/sys/net/ipv4/conf/" + name + "/force_igmp_version"))); n != 0 && i.ForcedIGMP == 0 {
			i.ForcedIGMP, i.ForcedBy = n, name
		}
	}
	if n, _ := strconv.Atoi(strings.TrimSpace(g.text("proc/sys/net/ipv6/conf/" + i.Name + "/force_mld_version"))); n != 0 {
		i.ForcedMLD = n
		if i.ForcedIGMP == 0 {
			i.ForcedBy = i.Name
		}
	}
}

// master reads the bridge that an interface is, or is a port of.
func (g *gatherer) master(i *Interface) {
	link := i.Link
	if i.Link.Master != 0 && i.Link.MasterKind == "bridge" {
		link = g.network.ByIndex(i.Link.Master)
	}
	if link == nil || link.Kind != "bridge" {
		return
	}
	d, err := network.ReadDevice(link)
	g.unread("bridge "+link.Name, err)
	i.Master, i.MasterName = d.Bridge, link.Name
}

// affinity lists the CPUs of a device's interrupts that have fired.
func (g *gatherer) affinity(bus string, busy map[string]bool) (cpus []string) {
	entries, _ := fs.ReadDir(g.Root, path.Join("sys/bus/pci/devices", bus, "msi_irqs"))
	for _, e := range entries {
		if !busy[e.Name()] {
			continue
		}
		list := strings.TrimSpace(g.text("proc/irq/" + e.Name() + "/effective_affinity_list"))
		if list == "" {
			list = strings.TrimSpace(g.text("proc/irq/" + e.Name() + "/smp_affinity_list"))
		}
		if list != "" {
			cpus = append(cpus, list)
		}
	}
	return cpus
}

// read reads every counter, for the first or second time.
func (g *gatherer) read(ctx context.Context, turn int) (err error) {
	if g.f.Host.Rules > 0 {
		if g.stats[turn], err = g.Stats(ctx); err != nil {
			return err
		}
	}
	g.f.Host.Softnet[turn], err = parseSoftnet(g.text("proc/net/softnet_stat"))
	if turn == 1 {
		g.unread("drops of CPUs", err)
	}
	for _, i := range g.byName {
		if i.Link == nil {
			continue
		}
		i.Device[turn], err = network.ReadDevice(i.Link)
		if turn == 1 {
			g.unread("device", err)
		}
	}
	return nil
}

// finish combines the two readings.
func (g *gatherer) finish(ctx context.Context) (*Facts, error) {
	for turn, s := range g.stats {
		for i := range s.Rules {
			g.count(&s.Rules[i], turn)
		}
		if g.f.Rule != nil {
			g.f.Rule.Unsent[turn], g.f.Rule.Lost[turn] = s.TransmitDrops, s.ReceiveDrops
		}
	}
	g.withoutOwn()
	for _, name := range sortedKeys(g.byName) {
		g.f.Interfaces = append(g.f.Interfaces, *g.byName[name])
	}
	r := g.f.Rule
	if r == nil || g.f.Host.Daemon == nil {
		return g.f, nil
	}
	for _, group := range g.f.Host.Groups {
		if slices.Contains(group.Rules, r.Name) {
			r.Groups = append(r.Groups, group)
		}
	}
	e, err := g.Daemon.Explain(ctx, r.Name)
	if err != nil {
		return nil, err
	}
	r.Explained = &e
	return g.f, nil
}

// count adds a rule's counters to its interfaces and to the requested rule.
func (g *gatherer) count(s *control.RuleStatus, turn int) {
	if s.Name == g.Rule && g.f.Rule != nil {
		g.f.Rule.Status[turn] = *s
	}
	ins, err := rules.ParseInputs(s.In)
	if err != nil {
		return // reported before
	}
	// Notes are of all inputs of a rule together.
	noted := map[string]bool{}
	for _, in := range ins {
		noted[in.Interface] = true
	}
	for _, n := range s.Notes {
		for name := range noted {
			if i := g.byName[name]; i != nil && n.Reason == loader.UnfinishedChecksum.String() {
				i.Unfinished[turn] += n.Packets
			}
		}
	}
	for _, o := range s.Outputs {
		for _, d := range o.Drops {
			if i := g.byName[o.Interface]; i != nil && d.Reason == loader.MTU.String() {
				i.TooLong[turn] += d.Packets
			}
		}
	}
}

// withoutOwn removes the relay's own traffic control programs from the lists.
func (g *gatherer) withoutOwn() {
	own, err := loader.TappedPrograms(g.f.Host.PinDir)
	g.unread("own programs of traffic control", err)
	for _, i := range g.byName {
		d := &i.Device[1]
		d.Programs = slices.DeleteFunc(d.Programs, func(p network.Program) bool { return p.ID != 0 && own[p.ID] })
	}
}
