package membership

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// anySource is the layer of filters for any source. Those above it hold filters for named sources.
const anySource = 0

// iface is an interface's memberships and the helper sockets that hold them.
type iface struct {
	log *slog.Logger
	sys System

	name    string // as of the last join
	records map[key]*record
	groups  map[netip.Addr][]*filter // of named sources, by layer; nil where the group has none
	pools   map[poolKey]*pool
	shards  map[*shard]struct{}
	opened  int      // sockets so far
	keep    *keeping // nil: they end with the process
}

// poolKey identifies a set of sockets of one interface.
type poolKey struct {
	family family
	layer  int
}

// pool is the sockets of one family and layer that may have room for one more group. A full socket
// returns to it when it loses a group.
type pool struct {
	open []*shard
}

// shard is one helper socket.
type shard struct {
	fd      int
	pool    *pool
	at      int // index in pool.open, -1 if not in it
	filters int // groups held
	number  int // in the order of opening on the interface

	// any represents the groups held from any source, which have no state of their own.
	any filter

	// stale sockets may hold unrecorded memberships, because a leave failed. They take no new ones,
	// and are closed when they hold nothing recorded.
	stale bool

	cookie uint64 // SO_COOKIE, its identity in the ledger; 0: none
	kept   string // the name under which it is kept; "": not kept
	left   []int  // ledger slots of memberships whose leave the kernel did not confirm
}

// filter is one group on one socket: any source, or some.
type filter struct {
	shard   *shard
	layer   int
	sources int  // memberships held; not counted for any source
	full    bool // the socket refused another source
}

func newIface(log *slog.Logger, sys System) *iface {
	return &iface{
		log:     log,
		sys:     sys,
		records: map[key]*record{},
		groups:  map[netip.Addr][]*filter{},
		pools:   map[poolKey]*pool{},
		shards:  map[*shard]struct{}{},
	}
}

// join joins m, which no socket of the interface holds, and returns the filter to which it now
// belongs.
func (p *iface) join(m Membership) (*filter, int, error) {
	if !m.Source.IsValid() {
		return p.joinLayer(m, anySource)
	}
	layers := p.groups[m.Group]
	unused := 0
	for layer := anySource + 1; layer < len(layers); layer++ {
		f := layers[layer]
		if f == nil {
			if unused == 0 {
				unused = layer
			}
			continue
		}
		if f.full || f.shard.stale {
			continue
		}
		slot, err := p.joinSocket(m, layer, f.shard)
		if err == nil {
			f.sources++
			return f, slot, nil
		}
		if !refused(err) {
			return nil, unkept, err
		}
		f.full = true
	}
	if unused == 0 {
		unused = max(len(layers), anySource+1)
	}
	return p.joinLayer(m, unused)
}

// joinLayer joins m on a socket of a layer in which m's group has no filter: one with room, or a
// new one.
func (p *iface) joinLayer(m Membership, layer int) (*filter, int, error) {
	pl := p.pools[poolKey{m.family(), layer}]
	if pl == nil {
		pl = &pool{}
	}
	for len(pl.open) > 0 {
		s := pl.open[len(pl.open)-1]
		slot, err := p.joinSocket(m, layer, s)
		if err == nil {
			return p.addFilter(m, layer, s), slot, nil
		}
		p.undoJoin(m, s)
		if !refused(err) {
			return nil, unkept, err
		}
		pl.remove(s)
	}
	s, slot, err := p.openShard(m, layer, pl)
	if err != nil {
		return nil, unkept, err
	}
	p.pools[poolKey{m.family(), layer}] = pl
	p.shards[s] = struct{}{}
	pl.add(s)
	return p.addFilter(m, layer, s), slot, nil
}

// openShard opens a socket and joins m on it. If the join fails it closes the socket, which would
// refuse other groups, too.
func (p *iface) openShard(m Membership, layer int, pl *pool) (*shard, int, error) {
	fd, err := p.sys.Socket(int(m.family()))
	if err != nil {
		return nil, unkept, &HelperSocketError{
			Interface: interfaceLabel(m.Interface, m.Index),
			Family:    m.family().String(),
			Err:       err,
		}
	}
	s := &shard{fd: fd, pool: pl, at: -1, number: p.opened + 1}
	p.keep.identify(s)
	slot, err := p.joinSocket(m, layer, s)
	if err != nil {
		p.closeSocket(s)
		return nil, unkept, err
	}
	p.keep.keepSocket(s)
	p.opened++
	return s, slot, nil
}

// joinSocket records that a socket holds m, and joins it.
func (p *iface) joinSocket(m Membership, layer int, s *shard) (slot int, err error) {
	slot = p.keep.write(m, layer, s)
	if err := p.kernelJoin(m, s.fd); err != nil {
		p.keep.erase(slot)
		return unkept, err
	}
	return slot, nil
}

// kernelJoin joins m on a socket.
func (p *iface) kernelJoin(m Membership, fd int) error {
	option, value := m.join()
	err := p.sys.Setsockopt(fd, m.family().level(), option, value)
	switch {
	case errors.Is(err, unix.ENODEV) && interfaceMissing(p.sys, fd, m.Index):
		return &InterfaceNotFoundError{Interface: m.Interface, Index: m.Index, Err: err}
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.EINVAL):
		// The addresses have been validated. The remaining cause is an interface without IP in the
		// kernel: inetdev_init and ipv6_add_dev need an MTU of at least 68 and 1280.
		return fmt.Errorf("%w (is the MTU too small for %v?)", err, m.family())
	}
	return err
}

// refused reports whether a join failed because of the socket's other memberships, so that another
// socket may take it: ENOBUFS or ENOMEM from the limits; EADDRINUSE (any source) or EADDRNOTAVAIL
// (a source) from a group that the socket still holds although the kernel refused to leave it.
func refused(err error) bool {
	return errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.ENOMEM) ||
		errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EADDRNOTAVAIL)
}

// undoJoin removes what a failed join of a group's first source may leave on a socket: the kernel
// joins the group without sources, then adds the source, and if the second step fails for lack of
// memory, the first one stays.
func (p *iface) undoJoin(m Membership, s *shard) {
	if !m.Source.IsValid() {
		return
	}
	m.Source = netip.Addr{}
	option, value := m.leave()
	err := p.sys.Setsockopt(s.fd, m.family().level(), option, value)
	if err == nil || errors.Is(err, unix.EADDRNOTAVAIL) {
		return
	}
	p.log.Warn("undoing a failed join failed; its helper socket takes no more groups",
		"membership", m.String(), "err", err)
	s.retire()
}

// leave leaves m in the kernel. Whatever the result, m is no longer part of its filter afterwards.
func (p *iface) leave(m Membership, f *filter, slot int) error {
	s := f.shard
	option, value := m.leave()
	err := p.sys.Setsockopt(s.fd, m.family().level(), option, value)
	if err != nil {
		s.retire()
		s.left = append(s.left, slot)
	} else {
		p.keep.erase(slot)
	}
	if f.layer == anySource {
		p.removeFilter(m, f)
		return err
	}
	f.full = false
	f.sources--
	if f.sources == 0 {
		p.removeFilter(m, f)
	}
	return err
}

// filterAt is the interface's filter for a group in a layer of named sources; nil if none.
func (p *iface) filterAt(group netip.Addr, layer int) *filter {
	if layers := p.groups[group]; layer < len(layers) {
		return layers[layer]
	}
	return nil
}

// addFilter records that m is the first membership of its group in the layer,
// held by s.
func (p *iface) addFilter(m Membership, layer int, s *shard) *filter {
	s.filters++
	if layer == anySource {
		s.any.shard = s
		return &s.any
	}
	f := &filter{shard: s, layer: layer, sources: 1}
	layers := p.groups[m.Group]
	for len(layers) <= layer {
		layers = append(layers, nil)
	}
	layers[layer] = f
	p.groups[m.Group] = layers
	return f
}

// removeFilter forgets a filter that lost its last membership, and closes the
// socket that lost its last filter.
func (p *iface) removeFilter(m Membership, f *filter) {
	if f.layer != anySource {
		p.removeLayer(m, f.layer)
	}
	s := f.shard
	s.filters--
	if s.filters > 0 {
		s.pool.add(s)
		return
	}
	s.pool.remove(s)
	delete(p.shards, s)
	p.closeSocket(s)
}

func (p *iface) removeLayer(m Membership, layer int) {
	layers := p.groups[m.Group]
	layers[layer] = nil
	for len(layers) > 0 && layers[len(layers)-1] == nil {
		layers = layers[:len(layers)-1]
	}
	if len(layers) == 0 {
		delete(p.groups, m.Group)
		return
	}
	p.groups[m.Group] = layers
}

// sourceSpecific returns the keys of memberships with a source, sorted.
func (p *iface) sourceSpecific() []key {
	var all []key
	for k := range p.records {
		if _, source := k.addrs(); source.IsValid() {
			all = append(all, k)
		}
	}
	slices.SortFunc(all, func(a, b key) int {
		return cmp.Or(bytes.Compare(a.group[:], b.group[:]), bytes.Compare(a.source[:], b.source[:]))
	})
	return all
}

// close closes every socket, and with them their memberships: the newest first, since the kernel
// searches a list that begins with the newest, and 100,000 of them in any other order take half a
// minute.
func (p *iface) close() {
	newest := slices.SortedFunc(maps.Keys(p.shards), func(a, b *shard) int { return cmp.Compare(b.number, a.number) })
	for _, s := range newest {
		p.closeFD(s)
	}
}

// closeSocket closes a socket that holds nothing recorded.
func (p *iface) closeSocket(s *shard) {
	for _, slot := range s.left {
		p.keep.erase(slot)
	}
	p.keep.dropSocket(s)
	p.closeFD(s)
}

func (p *iface) closeFD(s *shard) {
	if err := p.sys.Close(s.fd); err != nil {
		p.log.Warn("closing a helper socket failed", "interface", p.name, "err", err)
	}
}

// retire takes a socket out of use for joins.
func (s *shard) retire() {
	s.stale = true
	s.pool.remove(s)
}

// add adds a socket to those with room, unless it is there or stale.
func (pl *pool) add(s *shard) {
	if s.at >= 0 || s.stale {
		return
	}
	s.at = len(pl.open)
	pl.open = append(pl.open, s)
}

// remove removes a socket, if it is there.
func (pl *pool) remove(s *shard) {
	if s.at < 0 {
		return
	}
	last := pl.open[len(pl.open)-1]
	pl.open[s.at] = last
	last.at = s.at
	pl.open = pl.open[:len(pl.open)-1]
	s.at = -1
}
