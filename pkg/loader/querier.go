package loader

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
)

// Querier is a router or switch that queries an interface's hosts for their multicast groups (RFC
// 3376, RFC 3810), as seen by the relay program. Queries in a VLAN are not counted.
type Querier struct {
	Index  int // of the interface
	Family int // 4 (IGMP) or 6 (MLD)
	// Version of the last query: 1 to 3 for IGMP, 1 or 2 for MLD.
	Version int
	// Address sent the last query. A switch without an address sends queries from 0.0.0.0.
	Address netip.Addr
	// Packets counts the queries of all queriers.
	Packets uint64
	// LastSeen is the age of the last query.
	LastSeen time.Duration
}

// Queriers reads the queriers heard on interfaces since the program was attached.
func (l *Loader) Queriers() ([]Querier, error) { return readQueriers(l.maps.Queriers) }

// readQueriers returns the queriers by interface and family.
func readQueriers(m *ebpf.Map) ([]Querier, error) {
	var all []Querier
	var key bpf.RelayQuerierKey
	var value bpf.RelayQuerier
	iter := m.Iterate()
	for iter.Next(&key, &value) {
		if key.Family != 4 && key.Family != 6 {
			return nil, fmt.Errorf("read queriers: family %d: want 4 or 6", key.Family)
		}
		all = append(all, Querier{
			Index: int(key.Ifindex), Family: int(key.Family), Version: int(value.Version),
			Address: decodeAddr(value.Address, uint8(key.Family)),
			Packets: value.Packets, LastSeen: max(0, monotonic()-time.Duration(value.LastSeenNs)),
		})
	}
	if err := iter.Err(); err != nil {
		return nil, fmt.Errorf("read queriers: %w", err)
	}
	slices.SortFunc(all, func(a, b Querier) int {
		if a.Index != b.Index {
			return a.Index - b.Index
		}
		return a.Family - b.Family
	})
	return all, nil
}

// dropQueriers forgets the queriers of an interface without a program: they say nothing about its
// network later.
func (l *Loader) dropQueriers(index int) error {
	for _, family := range []uint32{4, 6} {
		key := bpf.RelayQuerierKey{Ifindex: uint32(index), Family: family}
		if err := l.maps.Queriers.Delete(&key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("forget queriers of interface %d: %w", index, err)
		}
	}
	return nil
}

// adoptQueriers forgets the queriers of interfaces that disappeared while no process was running.
func (l *Loader) adoptQueriers() error {
	all, err := readQueriers(l.maps.Queriers)
	if err != nil {
		return err
	}
	for _, q := range all {
		if l.links[q.Index] != nil {
			continue
		}
		if err := l.dropQueriers(q.Index); err != nil {
			return err
		}
	}
	return nil
}
