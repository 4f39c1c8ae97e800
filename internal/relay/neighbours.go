package relay

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"xdpcast/internal/network"
	"xdpcast/internal/plan"
)

// neighbourTables is *network.Neighbours. Tests inject faults.
type neighbourTables interface {
	Observe() ([]network.Neighbour, error)
	Manage(key network.NeighbourKey) error
	Forget(key network.NeighbourKey) error
	Close() error
}

// neighbours reconciles the relay's entries in the kernel's neighbour tables, which keep next hops
// resolved.
type neighbours struct {
	open   func() (neighbourTables, error)
	tables neighbourTables // nil until a rule has a unicast output, or an entry is left over
	// made are the relay's entries: as last listed by the kernel, plus those made since.
	made map[network.NeighbourKey]bool
	// asked is the state of the hops when the kernel was last asked to keep their neighbours.
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

// observe lists the relay's entries, of this process or an earlier one, and makes apply request all
// again.
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
			if !e.Static { // otherwise another program took it over
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

// apply makes the kernel keep the neighbours of the plan resolved, and returns whether an answer
// changed. It requests each once, and again when its hop changes, for example because its entry is
// gone.
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
			err = nil // the next snapshot shows it with the interface
		} else if err == nil {
			n.made[key] = true // or another program's, which Forget leaves alone
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

// forget removes entries that the plan no longer needs.
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

// drop forgets the entries of a removed interface, as the kernel does.
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
