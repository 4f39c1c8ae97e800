package relay

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netns"

	"xdpcast/internal/control"
	"xdpcast/internal/mroute"
	"xdpcast/internal/network"
	"xdpcast/internal/plan"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/membership"
	"xdpcast/pkg/rules"
)

const (
	// keepaliveEvery is how often the counters of routes in use are advanced, and the mirror
	// confirmed. FRR reads them every 10 seconds at most, and keeps an entry for 210.
	keepaliveEvery = time.Second
	// mirrorFor is how long the flows stay valid after the last confirmation of a process that
	// lives but hangs.
	mirrorFor = 4 * time.Second
)

// mroutes makes rules from the kernel's multicast forwarding cache. It belongs to the goroutine of
// Run, except for the data passed to the keepalive goroutine.
type mroutes struct {
	opts    *rules.Mroute
	watcher *mroute.Watcher
	entries map[mroute.Key]*mirrored
	keys    map[string]mroute.Key // of the entries, by the names of their rules
	attach  []string              // interfaces that multicast routing uses
	joined  joined
	claims  *claims
	based   []*plan.Rule      // the rules into which entries were last merged
	links   *network.Snapshot // for the names of their interfaces
	probes  chan []mroute.Probe
	ended   chan struct{}
}

// mirrored is an entry with its rule.
type mirrored struct {
	entry   *mroute.Entry
	rule    *plan.Rule
	matched uint64 // packets, when the last probe was sent
}

// newMroutes follows the cache of the calling thread's network namespace; nil without options.
func newMroutes(opts *rules.Mroute, own *membership.Manager, l *loader.Loader, log *slog.Logger) (_ *mroutes, err error) {
	if opts == nil {
		return nil, nil
	}
	m := &mroutes{
		opts: opts, entries: map[mroute.Key]*mirrored{}, keys: map[string]mroute.Key{}, probes: make(chan []mroute.Probe, 1), ended: make(chan struct{}),
		joined: joined{own: own, changed: map[mroute.On]bool{}},
	}
	ipv4, ipv6 := opts.Families()
	m.watcher, err = mroute.Open(mroute.Options{
		Tables: opts.HasTables(), IPv4: ipv4, IPv6: ipv6, Logger: log,
		// The kernel forwards by the new entry already. The control loop may be busy: its packets are
		// the kernel's until the flow is what the entry is.
		Hold: func(key mroute.Key) { l.HoldRouted(mroute.RuleName(key)) },
	})
	if err != nil {
		return nil, fmt.Errorf("mirror multicast routes: %w", err)
	}
	here, err := netns.Get()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("network namespace: %w", err), m.watcher.Close())
	}
	keepalive, err := mroute.NewKeepalive()
	if err != nil {
		return nil, errors.Join(err, here.Close(), m.watcher.Close())
	}
	go m.keepAlive(here, keepalive, log)
	return m, nil
}

// keepAlive sends probes. Its thread enters the namespace of the interfaces, and ends with the
// goroutine.
func (m *mroutes) keepAlive(here netns.NsHandle, keepalive *mroute.Keepalive, log *slog.Logger) {
	runtime.LockOSThread()
	defer close(m.ended)
	err := enter(here)
	told := ""
	for probes := range m.probes {
		text := ""
		if e := errors.Join(err, keepalive.Send(probes)); e != nil {
			text = e.Error()
		}
		if text != told && text != "" {
			log.Warn("the kernel's counters of multicast routes do not advance: their daemon may remove them", "error", text)
		}
		told = text
	}
	if err := errors.Join(keepalive.Close(), here.Close()); err != nil {
		log.Warn("keepalive of multicast routes", "error", err)
	}
}

// enter moves the thread into a network namespace unless it is already there, as in nearly all
// cases: a service may not be allowed to (RestrictNamespaces= of systemd).
func enter(ns netns.NsHandle) error {
	now, err := netns.Get()
	if err != nil {
		return err
	}
	defer now.Close()
	if now.Equal(ns) {
		return nil
	}
	return netns.Set(ns)
}

func (m *mroutes) close() error {
	if m == nil {
		return nil
	}
	close(m.probes)
	<-m.ended
	return m.watcher.Close()
}

// changed is the loop's notification channel; nil, which blocks forever, if nothing is mirrored.
func (m *mroutes) changed() <-chan struct{} {
	if m == nil {
		return nil
	}
	return m.watcher.Changed()
}

// mirror updates the rules of multicast routes, and returns whether any changed.
func (r *Relay) mirror(now *network.Snapshot) bool {
	m := r.mroutes
	if m == nil {
		return false
	}
	if m.watcher.JoinsChanged() || m.joined.looked.IsZero() {
		r.warnUnless(aboutJoined, m.lookJoined())
	}
	changes, err := m.watcher.Changes()
	r.warnUnless(aboutMroutes, err)
	if err != nil {
		return false // the previous ones stay valid as long as they are confirmed
	}
	for key, e := range changes {
		name := mroute.RuleName(key)
		if m.keys[name] = key; e == nil {
			delete(m.entries, key)
			delete(m.keys, name)
		} else if old := m.entries[key]; old != nil {
			old.entry = e
		} else {
			m.entries[key] = &mirrored{entry: e}
		}
	}
	m.addJoined(changes, now)
	if attach := m.interfaces(now); !slices.Equal(attach, m.attach) {
		m.attach, r.stale = attach, true
	}
	edit := m.edit(r.rules, changes, now)
	if len(edit.put) == 0 && len(edit.remove) == 0 {
		m.based = r.rules
		return false
	}
	r.setRules(edited(r.rules, edit))
	m.based = r.rules
	return true
}

// interfaces names the interfaces that multicast routing uses and the settings select. They have
// the program from the start, and keep it while their daemon starts again: to attach it or take it
// off can interrupt an interface (drivers that set up their queues anew), and a veth drops what is
// redirected to it while its peer has none.
func (m *mroutes) interfaces(now *network.Snapshot) (names []string) {
	for _, index := range m.watcher.Interfaces() {
		if link := now.ByIndex(index); link != nil && m.opts.Names(link.Name) {
			names = append(names, link.Name)
		}
	}
	return names
}

// vifs are what interfaces returned last; none when nothing is mirrored.
func (m *mroutes) vifs() []string {
	if m == nil {
		return nil
	}
	return m.attach
}

// releaseRoutes has the relay forward by the routes that are as the flows in force are; of others
// news is to come.
func (r *Relay) releaseRoutes() {
	if r.mroutes == nil || r.tables.applied != r.plan {
		return
	}
	held := r.loader.HeldRouted()
	if len(held) == 0 {
		return
	}
	keys := func(yield func(mroute.Key) bool) {
		for _, name := range held {
			if key, ok := r.mroutes.keys[name]; ok && !yield(key) {
				return
			}
		}
	}
	r.mroutes.watcher.Settled(keys, func(key mroute.Key) { r.loader.ReleaseRouted(mroute.RuleName(key)) })
}

// edit computes the change that brings a set's rules in line with the entries: only for the changed
// entries if nothing else changed.
func (m *mroutes) edit(all []*plan.Rule, changes map[mroute.Key]*mroute.Entry, now *network.Snapshot) (e edit) {
	same := len(all) == len(m.based) && (len(all) == 0 || &all[0] == &m.based[0])
	if !same || m.claims == nil {
		m.claims = newClaims(all)
	}
	update := func(key mroute.Key, it *mirrored) {
		name := mroute.RuleName(key)
		if it == nil {
			e.remove = append(e.remove, name)
			return
		}
		if rule := m.rule(it.entry, now); it.rule == nil || !sameRule(it.rule, rule) {
			it.rule = rule
			e.put = append(e.put, rule)
		}
	}
	if same && m.links == now {
		for key := range changes {
			update(key, m.entries[key])
		}
		return e
	}
	m.links = now
	held := map[string]*plan.Rule{}
	for _, rule := range all {
		if rule.Origin == plan.OriginMroute {
			held[rule.Name] = rule
		}
	}
	for key, it := range m.entries {
		name := mroute.RuleName(key)
		if held[name] != it.rule {
			it.rule = nil // put it in unconditionally
		}
		update(key, it)
		delete(held, name)
	}
	for name := range held {
		e.remove = append(e.remove, name)
	}
	return e
}

func sameRule(a, b *plan.Rule) bool {
	return a.Threshold == b.Threshold && a.Left == b.Left && a.Expected == b.Expected && rules.Equal(a.Rule, b.Rule)
}

// rule makes a rule from an entry.
func (m *mroutes) rule(e *mroute.Entry, now *network.Snapshot) *plan.Rule {
	rule, left := mroute.Convert(e, m.opts, func(index int) string {
		if link := now.ByIndex(index); link != nil {
			return link.Name
		}
		return ""
	})
	if left.Why == "" { // so the input exists
		in := now.ByIndex(e.Input)
		if winner := m.claims.winner(&rule, in); winner != "" {
			left = mroute.Left{Why: fmt.Sprintf("rule %s takes packets of it", winner), Expected: true}
		} else if m.joined.receives(e, in) {
			left = mroute.Left{Why: fmt.Sprintf("a program on this host has joined its group on %s", in.Name)}
		}
	}
	return &plan.Rule{Rule: rule, Origin: plan.OriginMroute, Threshold: e.Threshold(), Left: left.Why, Expected: left.Expected}
}

// claims finds the rules of the file and the API that take packets of a multicast route but would
// lose to its flow, which names the source. A rule that names group and port needs no check: the
// flow tables prefer it.
type claims struct {
	groups   map[netip.Addr][]*plan.Rule
	prefixes []*plan.Rule
}

func newClaims(all []*plan.Rule) *claims {
	c := &claims{groups: map[netip.Addr][]*plan.Rule{}}
	for _, r := range all {
		switch {
		case r.Origin == plan.OriginMroute, r.In.FromHost, r.In.VLAN.ID != 0:
		case r.In.Len != 0:
			c.prefixes = append(c.prefixes, r)
		case r.In.Port == 0 && r.In.Multicast():
			c.groups[r.In.Address] = append(c.groups[r.In.Address], r)
		}
	}
	return c
}

// winner is the name of a rule that takes packets of a route that arrive on a link.
func (c *claims) winner(route *rules.Rule, in *network.Link) string {
	takes := func(r *plan.Rule) bool {
		begin, pattern := rules.IsPattern(r.In.Interface)
		if pattern && !strings.HasPrefix(in.Name, begin) || !pattern && r.In.Interface != in.Name && !slices.Contains(in.AltNames, r.In.Interface) {
			return false
		}
		return r.In.Prefix().Contains(route.In.Address) && (!r.In.Source.IsValid() || senders(r).Contains(route.In.Source))
	}
	for _, r := range c.groups[route.In.Address] {
		if takes(r) {
			return r.Name
		}
	}
	for _, r := range c.prefixes {
		if takes(r) {
			return r.Name
		}
	}
	return ""
}

// senders is the prefix of sources that a rule takes.
func senders(r *plan.Rule) netip.Prefix {
	if r.In.SourceLen == 0 {
		return netip.PrefixFrom(r.In.Source, r.In.Source.BitLen())
	}
	return netip.PrefixFrom(r.In.Source, int(r.In.SourceLen))
}

// keepMirror confirms that the flows match the kernel's cache, and makes the kernel count a packet
// for each route whose packets were relayed since the last call.
func (r *Relay) keepMirror() {
	m := r.mroutes
	if m == nil {
		return
	}
	if r.tables.settled {
		r.warnUnless(aboutMroutes, r.loader.MirrorUntil(mirrorFor))
	}
	if r.warnUnless(aboutJoined, m.lookJoined()); len(m.joined.changed) > 0 {
		_ = r.reconcile(nil)
	}
	var names []string
	owners := map[string]*mirrored{}
	for _, it := range m.entries {
		if it.rule != nil && r.loader.Has(it.rule.Name) {
			names = append(names, it.rule.Name)
			owners[it.rule.Name] = it
		}
	}
	if len(names) == 0 {
		return
	}
	stats, err := r.loader.StatsOf(names)
	r.warnUnless(aboutMroutes, err)
	if err != nil {
		return
	}
	var probes []mroute.Probe
	for i := range stats.Rules {
		s := &stats.Rules[i]
		it := owners[s.Name]
		if it == nil || s.Matched.Packets == it.matched {
			continue
		}
		it.matched = s.Matched.Packets
		probes = append(probes, mroute.Probe{Source: it.entry.Source, Group: it.entry.Group, Input: it.entry.Input})
	}
	if len(probes) == 0 {
		return
	}
	select {
	case m.probes <- probes:
	default: // the last probes are still being sent
	}
}

// handBack gives all packets of multicast routes back to the kernel as this process ends. The
// program stays on the interfaces: see mroutes.interfaces.
func (r *Relay) handBack() {
	if r.mroutes == nil {
		return
	}
	r.ending = true
	err := r.mroutes.close()
	r.mroutes = nil
	if rest := withoutRoutes(r.rules); len(rest) < len(r.rules) {
		r.setRules(rest)
		err = errors.Join(err, r.reconcile(nil))
	}
	if err = errors.Join(err, r.loader.MirrorUntil(0)); err != nil {
		r.log.Error("not all multicast routes are back with the kernel: they will be within seconds", "error", err, "after", mirrorFor)
	}
}

// openMroutes follows the cache with the current settings of the file, or those of the command
// line; it returns the current mirror if they are unchanged.
func (r *Relay) openMroutes(file *rules.Mroute) (*mroutes, error) {
	want := cmp.Or(r.opts.Mroutes, file)
	if r.mroutes != nil && r.mroutes.opts.Equal(want) {
		return r.mroutes, nil
	}
	return newMroutes(want, r.memberships.manager, r.loader, r.log)
}

// mirrorAs applies the file's current settings. The caller must call settle: with true once they
// are in force, or with false to return to the previous ones.
func (r *Relay) mirrorAs(file *rules.Mroute) (settle func(done bool) error, err error) {
	before, settings := r.mroutes, r.mroute
	now, err := r.openMroutes(file)
	if err != nil {
		return nil, err
	}
	r.mroutes, r.mroute = now, file
	if now != nil && r.tables.settled {
		r.warnUnless(aboutMroutes, r.loader.MirrorUntil(mirrorFor))
	}
	return func(done bool) error {
		ended := before
		if !done {
			r.mroutes, r.mroute, ended = before, settings, now
		}
		if now == before {
			return nil
		}
		return ended.close()
	}, nil
}

// withoutRoutes are the rules without those of multicast routes.
func withoutRoutes(all []*plan.Rule) []*plan.Rule {
	rest := make([]*plan.Rule, 0, len(all))
	for _, rule := range all {
		if rule.Origin != plan.OriginMroute {
			rest = append(rest, rule)
		}
	}
	return rest
}

// withRoutesOf replaces the multicast routes in rules by those of others.
func withRoutesOf(all, others []*plan.Rule) []*plan.Rule {
	var e edit
	for _, rule := range others {
		if rule.Origin == plan.OriginMroute {
			e.put = append(e.put, rule)
		}
	}
	return edited(withoutRoutes(all), e)
}

// joined has the groups joined by programs on this host other than the relay.
type joined struct {
	own     *membership.Manager
	all     mroute.Joined
	mine    map[mroute.On]ownJoins // the relay's part of all
	looked  time.Time
	took    time.Duration
	changed map[mroute.On]bool // since rules were last made from it
}

// lookJoined reads the joined groups, and records changes. The kernel's time for this is quadratic
// in the groups: if it is slow, it is read less often.
func (m *mroutes) lookJoined() error {
	j := &m.joined
	if m.opts.TakeJoined || time.Since(j.looked) < askedShare*j.took {
		return nil
	}
	start := time.Now()
	defer func() { j.looked, j.took = time.Now(), time.Since(start) }()
	all, err := mroute.ReadJoined()
	if err != nil {
		return err
	}
	mine := map[mroute.On]ownJoins{}
	for on, joins := range all {
		var own ownJoins
		if own.sockets, own.sources = j.own.Sockets(on.Index, on.Group); own.sockets > 0 {
			slices.SortFunc(own.sources, netip.Addr.Compare)
			mine[on] = own
		}
		// A program may have left as the relay joined: the kernel's count is then the same.
		if !joins.Equal(j.all[on]) || !own.equal(j.mine[on]) {
			j.changed[on] = true
		}
	}
	for on := range j.all {
		if _, ok := all[on]; !ok {
			j.changed[on] = true
		}
	}
	j.all, j.mine = all, mine
	return nil
}

// ownJoins is how many of the relay's own sockets have joined a group on an interface, and their
// sources.
type ownJoins struct {
	sockets int
	sources []netip.Addr
}

func (o ownJoins) equal(p ownJoins) bool {
	return o.sockets == p.sockets && slices.Equal(o.sources, p.sources)
}

// addJoined adds to changes the entries whose groups other programs now have joined.
func (m *mroutes) addJoined(changes map[mroute.Key]*mroute.Entry, now *network.Snapshot) {
	if len(m.joined.changed) == 0 {
		return
	}
	for key, it := range m.entries {
		for _, index := range receivers(it.entry, now.ByIndex(it.entry.Input)) {
			if m.joined.changed[mroute.On{Index: index, Group: key.Group}] {
				changes[key] = it.entry
			}
		}
	}
	clear(m.joined.changed)
}

// receives says whether the kernel delivers packets of an entry to programs on this host.
func (j *joined) receives(e *mroute.Entry, in *network.Link) bool {
	for _, index := range receivers(e, in) {
		joins, ok := j.all[mroute.On{Index: index, Group: e.Group}]
		if !ok {
			continue
		}
		own := j.mine[mroute.On{Index: index, Group: e.Group}]
		if joins.Receives(e.Source, own.sockets, own.sources) {
			return true
		}
	}
	return false
}

// receivers are the interfaces on which joining a group delivers packets of an entry: the input,
// and its master if that is a VRF (ip_route_input_rcu of net/ipv4/route.c).
func receivers(e *mroute.Entry, in *network.Link) []int {
	if in == nil || in.Master == 0 {
		return []int{e.Input}
	}
	return []int{e.Input, in.Master}
}

// mrouteStatus describes the routes; nil if none are mirrored.
func (r *Relay) mrouteStatus() *control.MrouteStatus {
	if r.mroutes == nil {
		return nil
	}
	s := &control.MrouteStatus{Left: []control.MroutesLeft{}}
	at := map[string]int{}
	for _, p := range r.plan.Rules {
		if p.Rule.Origin != plan.OriginMroute {
			continue
		}
		s.Entries++
		why := p.LeftToKernel()
		if why == "" {
			s.Accelerated++
			continue
		}
		i, known := at[why]
		if !known {
			i = len(s.Left)
			at[why] = i
			s.Left = append(s.Left, control.MroutesLeft{Reason: why, First: p.Rule.Name, Expected: p.Rule.Expected})
		}
		s.Left[i].Entries++
	}
	slices.SortStableFunc(s.Left, func(a, b control.MroutesLeft) int { return cmp.Compare(b.Entries, a.Entries) })
	return s
}
