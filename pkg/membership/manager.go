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

// Options configure a [Manager]. The zero value is usable.
type Options struct {
	// Logger receives warnings. nil discards them.
	Logger *slog.Logger
	// System makes the system calls. nil means [Kernel].
	System System
	// Keeper keeps helper sockets, with their memberships, beyond the process. nil: they end with
	// the process, and the groups are left.
	Keeper Keeper
	// Kept are the descriptors that the Keeper kept from an earlier process, those whose names
	// satisfy IsKept. The manager takes ownership, and takes them over in Restore.
	Kept []Kept
}

// Manager holds memberships. Its methods may be called from any goroutine; they serialize, also on
// the kernel's lock for network configuration.
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
	ifaces   map[life]*iface // no entry is empty
	counters map[string]*Counters
	round    uint32 // of Unwanted
}

// Status is one held membership.
type Status struct {
	Membership
	// References is the number of joins without a leave, at least 1.
	References int
	// Since is the time when the kernel joined the group.
	Since time.Time
}

// record is one membership held by the kernel, identified by its map keys. There may be 100,000 of
// them.
type record struct {
	filter     *filter
	counters   *Counters     // of the interface's name when it was joined
	since      time.Duration // from Manager.started
	references int32
	slot       int32  // in the ledger
	round      uint32 // the last round of Unwanted in which it was wanted
}

// New makes an empty manager. The caller must Close it.
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

// Join joins a group, or adds a reference if the membership is already held. It does not retry: see
// [Transient] and [Backoff].
//
// Every error is a [*JoinError]; after one, nothing is recorded and no socket remains.
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

// Leave reverts one Join; the last one leaves the group. Errors are [*LeaveError] and
// informational: the membership is forgotten even if the kernel refuses.
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

// named is the membership of a record.
func (r *record) named(of life, k key) Membership {
	group, source := k.addrs()
	return Membership{Interface: r.counters.Interface, Index: of.index, Generation: of.generation, Group: group, Source: source}
}

func (m *Manager) forgetIfEmpty(p *iface, of life) {
	if len(p.records) == 0 {
		delete(m.ifaces, of)
	}
}

// Refresh leaves and rejoins every source-specific membership on an interface. Call it when the
// interface has been administratively down and is running again (IFF_UP and IFF_RUNNING; for IPv6
// it counts as down until then). Linux saves source filters while an interface is down, and
// corrupts those that change meanwhile: sources joined then are lost (ip_mc_down, ip_mc_up and
// igmpv3_del_delrec in net/ipv4/igmp.c, and their counterparts in net/ipv6/mcast.c). The socket
// still holds the membership, but the interface no longer accepts and reports it. Any-source
// memberships are not affected.
//
// Memberships that could not be rejoined are no longer held, whatever their references, and are
// returned. The kernel offers no cure for the opposite case, a source left while the interface was
// down that comes back with it: it stays until the whole group has been left and reported so, and
// causes unwanted traffic at worst.
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
		// A failed leave takes its socket out of use: the join uses another.
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

// DropInterface forgets every membership of one generation of an interface, whatever its
// references, and closes its helper sockets. Call it when the interface is gone: the kernel dropped
// the memberships with it, and an interface that comes back, under the same name or even with the
// same index, has none of them. Call it before joining on an interface with the same index: the
// kernel would apply leaves of the old sockets to the new interface. It returns the forgotten
// memberships, sorted.
func (m *Manager) DropInterface(index int, generation uint64) []Membership {
	m.mu.Lock()
	defer m.mu.Unlock()
	dropped := m.drop(life{index, generation})
	slices.SortFunc(dropped, Membership.Compare)
	return dropped
}

// Reborn moves the memberships of one generation of an interface to the next, except those the next
// already has: for an interface that may have been replaced under the same index. Observe then
// finds which of them the kernel still holds.
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

// Held returns the status of a membership, false if it is not held. It ignores Interface in its
// argument; in its result that is the name at the time of the join.
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

// Len returns the number of held memberships.
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

// Unwanted returns the held memberships that are not in wanted, the newest first: the kernel
// searches a list that begins with the newest. The manager is locked while wanted runs; Interface
// is ignored.
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

// erase erases the records of an interface's sockets, and stops keeping them.
func (m *Manager) erase(p *iface) {
	for _, r := range p.records {
		m.keep.erase(int(r.slot))
	}
	m.keep.dropAll(p.shards)
}

// Close closes every helper socket, and so leaves every group, except those of sockets kept by the
// Keeper: these stay joined until another process has taken them over. Later joins fail. It returns
// nil; closing twice is harmless.
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

// interfaceMissing reports whether no interface has the index, as far as that can be determined.
func interfaceMissing(sys System, fd, index int) bool {
	_, err := sys.InterfaceName(fd, index)
	return errors.Is(err, unix.ENODEV)
}

// Sockets returns how many helper sockets hold a group on an interface, and the sources of those
// that hold it source-specifically.
func (m *Manager) Sockets(index int, group netip.Addr) (sockets int, sources []netip.Addr) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for of, p := range m.ifaces {
		if of.index != index {
			continue
		}
		if p.records[Membership{Group: group}.key()] != nil {
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
			if of, source := k.addrs(); of == group && source.IsValid() {
				sources = append(sources, source)
			}
		}
	}
	return sockets, sources
}
