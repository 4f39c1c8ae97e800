package membership

import (
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Options are what a [Manager] needs. The zero value is usable.
type Options struct {
	// Logger gets warnings. nil means none are wanted.
	Logger *slog.Logger
	// System makes the system calls. nil means [Kernel].
	System System
	// Keeper keeps helper sockets beyond the process, with what they hold. nil: they end, and
	// groups are left, with it.
	Keeper Keeper
	// Kept is what the Keeper has kept of an earlier process, of the names that IsKept has.
	// The manager owns it, and takes it over with Restore.
	Kept []Kept
}

// Manager holds memberships. Its methods may be called from any goroutine; they
// wait for each other, and for the kernel's lock on network configuration.
type Manager struct {
	log *slog.Logger
	sys System

	keeper  Keeper
	started time.Time

	mu       sync.Mutex
	keep     *keeping // nil before Restore, and without a Keeper
	kept     []Kept   // until Restore
	orphans  []Kept   // until Settle
	closed   bool
	ifaces   map[life]*iface // none is empty
	counters map[string]*Counters
	round    uint32 // of Unwanted
}

// Status is one membership that is held.
type Status struct {
	Membership
	// References is how many joins have not been left yet, at least 1.
	References int
	// Since is when the kernel joined the group.
	Since time.Time
}

// record is one membership held by the kernel; its key and the interface's life say which. There
// may be 100,000 of them.
type record struct {
	filter     *filter
	counters   *Counters     // of the name that the interface had when it was joined
	since      time.Duration // from Manager.started
	references int32
	slot       int32  // of the ledger
	round      uint32 // the last one of Unwanted in which it was wanted
}

// New makes a manager without memberships. The caller must Close it.
func New(o Options) *Manager {
	m := &Manager{
		log:      o.Logger,
		sys:      o.System,
		keeper:   o.Keeper,
		kept:     o.Kept,
		started:  time.Now(),
		ifaces:   map[life]*iface{},
		counters: map[string]*Counters{},
	}
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	if m.sys == nil {
		m.sys = Kernel()
	}
	return m
}

// Join joins a group, or adds a reference if the membership is held already.
// It answers at once and does not retry: see [Transient] and [Backoff].
//
// Every error is a [*JoinError]; after one, nothing is recorded and no socket is
// left behind.
func (m *Manager) Join(ms Membership) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.join(ms); err != nil {
		return &JoinError{Membership: ms, Err: err}
	}
	return nil
}

var errClosed = fmt.Errorf("membership manager: %w", os.ErrClosed)

func (m *Manager) join(ms Membership) error {
	if m.closed {
		return errClosed
	}
	if err := ms.validate(); err != nil {
		return err
	}
	p := m.ifaces[ms.life()]
	if p == nil {
		p = newIface(m.log, m.sys)
		p.keep = m.keep
	}
	if r := p.records[ms.key()]; r != nil {
		r.references++
		return nil
	}
	f, slot, err := m.kernelJoin(p, ms)
	if err != nil {
		return err
	}
	p.name = ms.Interface
	p.records[ms.key()] = &record{filter: f, counters: m.countersOf(ms.Interface), since: time.Since(m.started), references: 1, slot: int32(slot)}
	m.ifaces[ms.life()] = p
	if advice := Advice(ms.Group, ms.Source); advice != "" {
		m.log.Warn("joined a group of a special kind",
			"membership", ms.String(), "advice", advice)
	}
	return nil
}

// Leave takes back one Join; the last one leaves the group. Errors are
// [*LeaveError] and only for information: whatever the kernel says, the
// membership is forgotten.
func (m *Manager) Leave(ms Membership) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.leave(ms); err != nil {
		return &LeaveError{Membership: ms, Err: err}
	}
	return nil
}

func (m *Manager) leave(ms Membership) error {
	if m.closed {
		return errClosed
	}
	p := m.ifaces[ms.life()]
	if p == nil {
		return ErrNotJoined
	}
	r := p.records[ms.key()]
	if r == nil {
		return ErrNotJoined
	}
	if r.references > 1 {
		r.references--
		return nil
	}
	delete(p.records, ms.key())
	err := m.kernelLeave(p, r, r.named(ms.life(), ms.key()))
	m.forgetIfEmpty(p, ms.life())
	return err
}

// kernelJoin joins ms through p and counts it.
func (m *Manager) kernelJoin(p *iface, ms Membership) (*filter, int, error) {
	count := m.countersOf(ms.Interface)
	count.Joins.begin()
	f, slot, err := p.join(ms)
	count.Joins.end(err)
	return f, slot, err
}

// kernelLeave leaves ms, which r records, and counts it.
func (m *Manager) kernelLeave(p *iface, r *record, ms Membership) error {
	r.counters.Leaves.begin()
	err := p.leave(ms, r.filter, int(r.slot))
	r.counters.Leaves.end(err)
	if err != nil {
		m.log.Warn("leaving a group failed", "membership", ms.String(), "err", err)
	}
	return err
}

// named is the membership that a record is about.
func (r *record) named(of life, k key) Membership {
	return Membership{Interface: r.counters.Interface, Index: of.index, Generation: of.generation, Group: k.group, Source: k.source}
}

func (m *Manager) forgetIfEmpty(p *iface, of life) {
	if len(p.records) == 0 {
		delete(m.ifaces, of)
	}
}

// Refresh leaves and joins again every source-specific membership on an
// interface. Call it when the interface has been administratively down and is
// running again (IFF_UP and IFF_RUNNING; for IPv6 it is down until then). Linux
// puts source filters aside while an interface is down, and mixes up those that
// change meanwhile: sources joined then are lost (ip_mc_down, ip_mc_up and
// igmpv3_del_delrec in net/ipv4/igmp.c, and their like in net/ipv6/mcast.c). The
// socket still holds the membership, but the interface accepts and reports it
// no more. Any-source memberships do not suffer.
//
// What could not be joined again is no longer held, whatever its references,
// and is returned. The opposite, a source left while the interface was down
// that comes back with it, the kernel offers no way to cure: it stays until
// the group has been left altogether and reported so, and brings unwanted
// traffic at worst.
func (m *Manager) Refresh(index int, generation uint64) []*JoinError {
	m.mu.Lock()
	defer m.mu.Unlock()
	of := life{index, generation}
	p := m.ifaces[of]
	if p == nil {
		return nil
	}
	var failed []*JoinError
	for _, k := range p.sourceSpecific() {
		r := p.records[k]
		ms := r.named(of, k)
		// A leave that fails takes its socket out of use: the join goes elsewhere.
		_ = m.kernelLeave(p, r, ms)
		f, slot, err := m.kernelJoin(p, ms)
		if err != nil {
			delete(p.records, k)
			failed = append(failed, &JoinError{Membership: ms, Err: err})
			continue
		}
		r.filter, r.slot = f, int32(slot)
	}
	m.forgetIfEmpty(p, of)
	return failed
}

// DropInterface forgets every membership of one life of an interface, whatever its
// references, and closes its helper sockets. It is for an interface that is gone: the
// kernel dropped the memberships with it, and an interface that comes back, under the same
// name or even with the same index, has none of them. Call it before joining on an
// interface that got the same index again: the kernel takes what the sockets of the last life
// leave for the new one's. It returns what it forgot, sorted.
func (m *Manager) DropInterface(index int, generation uint64) []Membership {
	m.mu.Lock()
	defer m.mu.Unlock()
	dropped := m.drop(life{index, generation})
	slices.SortFunc(dropped, Membership.Compare)
	return dropped
}

// Reborn carries the memberships of one life of an interface over to the next, as far as it
// has none of its own: it is for an interface that may be another one under the same
// index. Observe then tells which of them the kernel still holds.
func (m *Manager) Reborn(index int, from, to uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	before, now := life{index, from}, life{index, to}
	p := m.ifaces[before]
	if p == nil || before == now {
		return
	}
	if m.ifaces[now] != nil {
		m.drop(before)
		return
	}
	delete(m.ifaces, before)
	m.ifaces[now] = p
}

func (m *Manager) drop(of life) (dropped []Membership) {
	p := m.ifaces[of]
	if p == nil {
		return nil
	}
	for k, r := range p.records {
		r.counters.Dropped++
		dropped = append(dropped, r.named(of, k))
	}
	m.erase(p)
	p.close()
	delete(m.ifaces, of)
	return dropped
}

// List returns a snapshot of the memberships held, sorted by interface, group
// and source.
func (m *Manager) List() []Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.list()
}

func (m *Manager) list() []Status {
	var all []Status
	for of, p := range m.ifaces {
		for k, r := range p.records {
			all = append(all, m.status(r, of, k))
		}
	}
	slices.SortFunc(all, func(a, b Status) int { return a.Compare(b.Membership) })
	return all
}

func (m *Manager) status(r *record, of life, k key) Status {
	return Status{Membership: r.named(of, k), References: int(r.references), Since: m.started.Add(r.since)}
}

// Held returns how a membership is held, false when it is not. Interface counts for nothing in
// what it is asked for, and is the name as of the join in what it answers.
func (m *Manager) Held(ms Membership) (Status, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if p := m.ifaces[ms.life()]; p != nil {
		if r := p.records[ms.key()]; r != nil {
			return m.status(r, ms.life(), ms.key()), true
		}
	}
	return Status{}, false
}

// Len returns how many memberships are held.
func (m *Manager) Len() (n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range m.ifaces {
		n += len(p.records)
	}
	return n
}

// Holds says whether a membership is held.
func (m *Manager) Holds(ms Membership) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.ifaces[ms.life()]
	return p != nil && p.records[ms.key()] != nil
}

// Unwanted returns the memberships that are held and not among those wanted, the newest first: the
// kernel looks for a group in a list that begins with the newest. wanted is called with the
// manager locked; Interface counts for nothing.
func (m *Manager) Unwanted(wanted iter.Seq[Membership]) (left []Membership) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.round++
	for ms := range wanted {
		if p := m.ifaces[ms.life()]; p != nil {
			if r := p.records[ms.key()]; r != nil {
				r.round = m.round
			}
		}
	}
	var all []Status
	for of, p := range m.ifaces {
		for k, r := range p.records {
			if r.round != m.round {
				all = append(all, m.status(r, of, k))
			}
		}
	}
	slices.SortFunc(all, func(a, b Status) int { return b.Since.Compare(a.Since) })
	for _, s := range all {
		left = append(left, s.Membership)
	}
	return left
}

// erase forgets what an interface's sockets hold, and ends their being kept.
func (m *Manager) erase(p *iface) {
	for _, r := range p.records {
		m.keep.erase(int(r.slot))
	}
	m.keep.dropAll(p.shards)
}

// Close closes every helper socket, and so leaves every group, but for those of sockets that the
// Keeper keeps: these are held until another process has taken them over. Nothing can be joined
// afterwards. It returns nil; closing twice is harmless.
func (m *Manager) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	for of, p := range m.ifaces {
		for _, r := range p.records {
			r.counters.Dropped++
		}
		p.close()
		delete(m.ifaces, of)
	}
	for _, d := range slices.Concat(m.kept, m.orphans) {
		m.closeKept(d)
	}
	m.keep.close()
	m.kept, m.orphans, m.keep = nil, nil, nil
	return nil
}

// interfaceMissing reports whether no interface has the index, as far as that
// can be found out.
func interfaceMissing(sys System, fd, index int) bool {
	_, err := sys.InterfaceName(fd, index)
	return errors.Is(err, unix.ENODEV)
}

// Sockets is how many helper sockets hold a group on an interface, and the sources that those
// hold it from which name any.
func (m *Manager) Sockets(index int, group netip.Addr) (sockets int, sources []netip.Addr) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for of, p := range m.ifaces {
		if of.index != index {
			continue
		}
		if p.records[key{group: group}] != nil {
			sockets++
		}
		layers := 0
		for _, f := range p.groups[group] {
			if f != nil {
				layers++
			}
		}
		if sockets += layers; layers == 0 {
			continue
		}
		for k := range p.records {
			if k.group == group && k.source.IsValid() {
				sources = append(sources, k.source)
			}
		}
	}
	return sockets, sources
}
