package relay

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"xdpcast/internal/network"
	"xdpcast/internal/plan"
)

// neighbourTables are the kernel's: *network.Neighbours. Tests inject faults.
type neighbourTables interface {
	Observe() ([]network.Neighbour, error)
	Manage(key network.NeighbourKey) error
	Forget(key network.NeighbourKey) error
	Close() error
}

// neighbours reconciles the entries of the kernel's neighbour tables that the relay makes, so
// that next hops stay resolved.
type neighbours struct {
	open   func() (neighbourTables, error)
	tables neighbourTables // nil until a rule has a unicast output, or an entry was left
	// made are the entries that the relay made, as the kernel last listed them, and those made
	// since.
	made map[network.NeighbourKey]bool
	// asked is what was known of the ways when the kernel was last asked to keep their neighbours.
	asked   map[network.HopKey]network.Hop
	refused map[network.NeighbourKey]error
}

func newNeighbours() *neighbours {
	return &neighbours{
		open: func() (neighbourTables, error) { return network.OpenNeighbours() },
		made: map[network.NeighbourKey]bool{}, asked: map[network.HopKey]network.Hop{}, refused: map[network.NeighbourKey]error{},
	}
}

func (n *neighbours) close() error {
	if n.tables == nil {
		return nil
	}
	return n.tables.Close()
}

func (n *neighbours) ready() (err error) {
	if n.tables == nil {
		n.tables, err = n.open()
	}
	return err
}

// observe asks the kernel which entries the relay has made, in this process or an earlier one,
// and has apply ask for all again.
func (n *neighbours) observe() error {
	tables := n.tables
	if tables == nil {
		fresh, err := n.open()
		if err != nil {
			return err
		}
		tables = fresh
	}
	all, err := tables.Observe()
	if err == nil {
		clear(n.made)
		for _, e := range all {
			if !e.Static { // else it has become somebody's own
				n.made[e.NeighbourKey] = true
			}
		}
		clear(n.asked)
	}
	if n.tables == nil && len(all) == 0 {
		return errors.Join(err, tables.Close()) // the descriptor is not needed yet
	}
	n.tables = tables
	return err
}

// apply has the kernel keep the neighbours on the ways of the plan resolved, and says whether
// an answer has changed. It asks once for each, and again when something else is known of
// the way, such as that its entry has gone.
func (n *neighbours) apply(p *plan.Plan, now *network.Snapshot) (changed bool) {
	if len(p.Hops) == 0 {
		return false
	}
	if err := n.ready(); err != nil {
		return n.answerAll(p, err)
	}
	for _, way := range p.Hops {
		hop := now.Hop(way)
		if hop.Kind != network.HopUnicast {
			delete(n.asked, way)
			continue
		}
		key := network.NeighbourKey{Index: way.Link.Index, Addr: hop.Via}
		last, asked := n.asked[way]
		if asked && last.Equal(hop) && n.refused[key] == nil {
			continue
		}
		err := n.tables.Manage(key)
		if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENETDOWN) {
			err = nil // the next snapshot says so of the interface
		} else if err == nil {
			n.made[key] = true // or somebody else's, which Forget leaves alone
		}
		n.asked[way] = hop
		changed = n.answer(key, err) || changed
	}
	return changed
}

func (n *neighbours) answerAll(p *plan.Plan, err error) (changed bool) {
	for _, key := range p.Neighbours {
		changed = n.answer(key, err) || changed
	}
	return changed
}

func (n *neighbours) answer(key network.NeighbourKey, err error) (changed bool) {
	before := n.refused[key]
	if errors.Is(err, unix.ENOBUFS) {
		err = fmt.Errorf("%w: %w", plan.ErrNeighbourTableFull, err)
	}
	if err == nil {
		delete(n.refused, key)
	} else {
		n.refused[key] = err
	}
	return errorText(before) != errorText(err)
}

// forget removes the entries that the plan does not need any more.
func (n *neighbours) forget(p *plan.Plan) error {
	if len(n.made) == 0 && len(n.refused) == 0 && len(n.asked) == len(p.Hops) {
		return nil
	}
	wanted := make(map[network.NeighbourKey]bool, len(p.Neighbours))
	for _, key := range p.Neighbours {
		wanted[key] = true
	}
	ways := make(map[network.HopKey]bool, len(p.Hops))
	for _, way := range p.Hops {
		ways[way] = true
	}
	for way := range n.asked {
		if !ways[way] {
			delete(n.asked, way)
		}
	}
	for key := range n.refused {
		if !wanted[key] {
			delete(n.refused, key)
		}
	}
	var errs []error
	for key := range n.made {
		if wanted[key] {
			continue
		}
		delete(n.made, key)
		errs = append(errs, n.tables.Forget(key))
	}
	return errors.Join(errs...)
}

// drop forgets what was made on an interface that is gone: the kernel has, too.
func (n *neighbours) drop(id network.LinkID) {
	for way := range n.asked {
		if way.Link == id {
			delete(n.asked, way)
		}
	}
	for key := range n.made {
		if key.Index == id.Index {
			delete(n.made, key)
		}
	}
}
