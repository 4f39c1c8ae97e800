package membership

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Interfaces returns an interface's name and generation by its index, the generation as used in
// joins. ok is false if it does not exist.
type Interfaces func(index int) (name string, generation uint64, ok bool)

// Restore takes over the helper sockets in Options.Kept from an earlier process, as far as the
// kernel confirms their memberships, and from then on stores sockets with Options.Keeper. It
// returns the held memberships, sorted, each with one reference. It must be called before the first
// Join, and in the network namespace of the joins.
//
// Sockets whose memberships are unknown stay open until [Manager.Settle], so that other sockets can
// join their groups first and no leave is sent. Each problem is logged in one line.
func (m *Manager) Restore(interfaces Interfaces) []Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.keeper == nil || m.closed || m.keep != nil {
		return nil
	}
	r := &restore{Manager: m, interfaces: interfaces, k: &keeping{keeper: m.keeper, log: m.log, sys: m.sys}}
	held := r.sort(m.kept)
	m.kept = nil
	r.takeOver(held)
	if !r.openLedger() {
		return nil // without it nothing is kept
	}
	m.keep = r.k
	for _, p := range m.ifaces {
		p.keep = r.k
	}
	lost := r.lost()
	slices.SortFunc(lost, Membership.Compare)
	all := m.list()
	if r.took > 0 || len(lost) > 0 {
		m.log.Info("memberships taken over", "memberships", len(all), "sockets", r.took, "joined anew", r.missing+len(lost))
	}
	return all
}

// restore is the state of one Restore.
type restore struct {
	*Manager
	interfaces Interfaces
	k          *keeping

	namespace uint64               // SO_NETNS_COOKIE
	sockets   map[uint64]*returned // by SO_COOKIE
	took      int                  // sockets taken over
	missing   int                  // memberships of sockets that were not returned
}

// returned is a helper socket from an earlier process.
type returned struct {
	Kept
	family family
	held   []holding
}

// sort separates the ledger from the sockets, and returns the ledger's records. The ledger stays
// nil if none is readable.
func (r *restore) sort(kept []Kept) (held []holding) {
	var ledgers, sockets []Kept
	for _, d := range kept {
		number, isSocket := strings.CutPrefix(d.Name, socketName)
		n, err := strconv.Atoi(number)
		switch {
		case d.Name == ledgerName:
			ledgers = append(ledgers, d)
		case isSocket && err == nil:
			r.k.last = max(r.k.last, n)
			sockets = append(sockets, d)
		default:
			r.discard(d, fmt.Errorf("its name is not one of ours"))
		}
	}
	r.identify(sockets)
	if len(ledgers) == 0 {
		if len(r.sockets) > 0 {
			r.log.Warn("helper sockets came back without the record of their groups: these are joined again before the sockets are closed", "sockets", len(r.sockets))
		}
		return nil
	}
	for i, d := range ledgers {
		var err error
		if i > 0 {
			err = errors.New("there is another one")
		} else {
			r.k.ledger, held, err = openLedger(d.FD)
		}
		if err != nil {
			r.log.Warn("the record of memberships cannot be used: groups are joined again before the sockets that hold them are closed", "error", err)
			r.closeKept(d)
		}
	}
	if len(ledgers) > 1 { // the names are equal: dropping one drops all
		r.k.drop(ledgerName)
		if r.k.ledger != nil {
			r.closeKept(Kept{ledgerName, r.k.ledger.fd})
			r.k.ledger = nil
		}
		return nil
	}
	if r.k.ledger == nil {
		r.k.drop(ledgerName)
	}
	return held
}

// identify identifies the returned sockets.
func (r *restore) identify(sockets []Kept) {
	r.sockets = map[uint64]*returned{}
	if len(sockets) == 0 {
		return
	}
	var err error
	if r.namespace, err = r.ownNamespace(); err != nil {
		r.log.Warn("helper sockets that came back cannot be identified", "error", err)
	}
	for _, d := range sockets {
		s, cookie, err := r.look(d)
		if err == nil && r.sockets[cookie] != nil {
			err = fmt.Errorf("it is the same as %s", r.sockets[cookie].Name)
		}
		if err != nil {
			r.discard(d, err)
			continue
		}
		r.sockets[cookie] = s
	}
}

func (r *restore) ownNamespace() (uint64, error) {
	fd, err := r.sys.Socket(unix.AF_INET)
	if err != nil {
		return 0, err
	}
	cookie, err := socketNumber(r.sys, fd, unix.SO_NETNS_COOKIE)
	return cookie, errors.Join(err, r.sys.Close(fd))
}

// look reads from the kernel what a descriptor is.
func (r *restore) look(d Kept) (*returned, uint64, error) {
	var answers [4]uint64
	for i, option := range []int{unix.SO_DOMAIN, unix.SO_PROTOCOL, unix.SO_NETNS_COOKIE, unix.SO_COOKIE} {
		var err error
		if answers[i], err = socketNumber(r.sys, d.FD, option); err != nil {
			return nil, 0, err
		}
	}
	domain, protocol, namespace, cookie := answers[0], answers[1], answers[2], answers[3]
	switch {
	case domain != unix.AF_INET && domain != unix.AF_INET6 || protocol != unix.IPPROTO_UDP:
		return nil, 0, errors.New("it is not a UDP socket")
	case namespace != r.namespace:
		return nil, 0, errors.New("it belongs to another network namespace")
	}
	return &returned{Kept: d, family: family(domain)}, cookie, nil
}

// discard closes a useless descriptor.
func (r *restore) discard(d Kept, why error) {
	r.log.Warn("a helper socket that came back is closed", "name", d.Name, "error", why)
	r.k.drop(d.Name)
	r.closeKept(d)
}

func (m *Manager) closeKept(d Kept) {
	if err := m.sys.Close(d.FD); err != nil {
		m.log.Warn("closing a helper socket failed", "name", d.Name, "err", err)
	}
}

// takeOver takes over the sockets in the ledger.
func (r *restore) takeOver(held []holding) {
	absent := map[uint64]bool{}
	for _, h := range held {
		s := r.sockets[h.cookie]
		if s == nil {
			absent[h.cookie] = true
			r.missing++
			r.k.erase(h.slot)
			continue
		}
		s.held = append(s.held, h)
	}
	if len(absent) > 0 {
		r.log.Warn("helper sockets did not come back, and their groups are joined again (does the service manager keep as many? see FileDescriptorStoreMax= of the service)",
			"sockets", len(absent), "memberships", r.missing, "came back", len(r.sockets))
	}
	// In the order in which they were opened, since they are closed in reverse.
	order := make([]*returned, 0, len(r.sockets))
	for _, s := range r.sockets {
		order = append(order, s)
	}
	slices.SortFunc(order, func(a, b *returned) int {
		return compareNames(a.Name, b.Name)
	})
	unused := map[string]int{} // sockets by reason
	for _, s := range order {
		if err := r.adopt(s); err != nil {
			unused[err.Error()]++
			for _, h := range s.held {
				r.k.erase(h.slot)
			}
			r.orphans = append(r.orphans, s.Kept)
		}
	}
	if r.k.ledger == nil {
		return // logged by sort
	}
	for _, why := range slices.Sorted(maps.Keys(unused)) {
		r.log.Warn("helper sockets that came back are not used: their wanted groups are joined again before they are closed", "sockets", unused[why], "error", why)
	}
}

// compareNames orders sockets by their numbers.
func compareNames(a, b string) int {
	if len(a) != len(b) {
		return len(a) - len(b)
	}
	return strings.Compare(a, b)
}

// adopt takes over one socket. After an error it is unchanged.
func (r *restore) adopt(s *returned) error {
	if len(s.held) == 0 {
		return errors.New("the record does not mention it")
	}
	first := &s.held[0]
	name, generation, ok := r.interfaces(first.index)
	if !ok {
		return fmt.Errorf("its interface, of index %d, is gone", first.index)
	}
	of := life{first.index, generation}
	p := r.ifaces[of]
	if p == nil {
		p = newIface(r.log, r.sys)
	}
	own := map[key]bool{}
	for _, h := range s.held {
		k := h.membership().key()
		twice := own[k] || p.records[k] != nil
		own[k] = true
		switch {
		case h.index != first.index || h.layer != first.layer || h.membership().family() != s.family:
			return errors.New("it holds groups of several interfaces, families or layers")
		case twice:
			return fmt.Errorf("%v is recorded twice", h.membership())
		case h.layer > anySource && p.filterAt(h.group, h.layer) != nil:
			return fmt.Errorf("another one holds sources of %v", h.group)
		}
	}
	confirmed, err := r.confirm(s)
	if err != nil {
		return err
	}
	if len(confirmed) == 0 {
		return errors.New("it holds none of the recorded groups")
	}
	r.register(p, s, confirmed, name, generation)
	r.ifaces[of] = p
	r.took++
	return nil
}

// confirm reads from the kernel which of the recorded memberships a socket holds.
func (r *restore) confirm(s *returned) (confirmed []holding, err error) {
	sources := map[netip.Addr][]netip.Addr{} // of groups that have sources
	for _, h := range s.held {
		from, asked := sources[h.group]
		all := false
		if !asked {
			if all, from, err = sourcesOf(r.sys, s.FD, h.index, h.group); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
				return nil, fmt.Errorf("ask for %v: %w", h.group, err)
			}
			sources[h.group] = from
		}
		if h.source.IsValid() && slices.Contains(from, h.source) || !h.source.IsValid() && all {
			confirmed = append(confirmed, h)
		}
	}
	return confirmed, nil
}

// register adds a socket to an interface.
func (r *restore) register(p *iface, from *returned, held []holding, ifname string, generation uint64) {
	key := poolKey{from.family, held[0].layer}
	pl := p.pools[key]
	if pl == nil {
		pl = &pool{}
		p.pools[key] = pl
	}
	p.name = ifname
	p.opened++
	s := &shard{fd: from.FD, pool: pl, at: -1, number: p.opened, cookie: held[0].cookie, kept: from.Name}
	p.shards[s] = struct{}{}
	pl.add(s)
	confirmed := map[int]bool{}
	for _, h := range held {
		confirmed[h.slot] = true
		ms := h.membership()
		ms.Interface, ms.Generation = ifname, generation
		f := p.filterAt(h.group, h.layer)
		if f == nil || h.layer == anySource {
			f = p.addFilter(ms, h.layer, s)
		} else {
			f.sources++
		}
		p.records[ms.key()] = &record{filter: f, counters: r.countersOf(ifname), since: h.since.Sub(r.started), references: 1, slot: int32(h.slot)}
		r.countersOf(ifname).Restored++
	}
	for _, h := range from.held {
		if !confirmed[h.slot] {
			r.k.erase(h.slot)
		}
	}
}

// openLedger makes a new ledger unless there is one, and returns whether there is one now.
func (r *restore) openLedger() bool {
	if r.k.ledger != nil {
		return true
	}
	l, err := newLedger()
	if err == nil {
		if err = r.keeper.Keep(ledgerName, l.fd); err == nil {
			r.k.ledger = l
			return true
		}
		err = errors.Join(err, l.close())
	}
	r.k.warn(err)
	return false
}

// lost forgets memberships that sockets hold but the interfaces do not, as in Observe: after an
// interface was re-created with its old index, the old sockets still report them.
func (r *restore) lost() []Membership {
	lost, err := r.observe()
	if err != nil {
		r.log.Warn("restored groups cannot be compared with those of the interfaces", "error", err)
	}
	return lost
}

// Settle closes the useless returned helper sockets. Call it when all wanted groups are joined.
func (m *Manager) Settle() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.orphans) == 0 {
		return
	}
	var names []string
	for _, d := range m.orphans {
		m.closeKept(d)
		names = append(names, d.Name)
	}
	if err := m.keeper.Drop(names...); err != nil {
		m.log.Warn("earlier helper sockets stay kept", "sockets", len(names), "error", err)
	}
	m.log.Info("earlier helper sockets are closed", "sockets", len(m.orphans))
	m.orphans = nil
}

// socketNumber reads a socket option that is a number of 32 or 64 bits.
func socketNumber(sys System, fd, option int) (uint64, error) {
	value := make([]byte, 8)
	n, err := sys.Getsockopt(fd, unix.SOL_SOCKET, option, value)
	switch {
	case err != nil:
		return 0, fmt.Errorf("socket option %d: %w", option, err)
	case n == 4:
		return uint64(binary.NativeEndian.Uint32(value)), nil
	case n == 8:
		return binary.NativeEndian.Uint64(value), nil
	}
	return 0, fmt.Errorf("socket option %d has %d bytes, want 4 or 8", option, n)
}
