package network

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// protocolOurs marks the relay's neighbour entries, so that a later process recognises them. The
// kernel does not interpret such numbers; iproute2 shows "proto 120" (/etc/iproute2/rt_protos does
// not assign it).
const protocolOurs = 120

// Neighbour is an entry made by the relay.
type Neighbour struct {
	NeighbourKey
	// Managed: the kernel keeps it resolved.
	Managed bool
	// Static: another program has made it permanent since. It is no longer ours, and Forget leaves
	// it.
	Static bool
}

// Neighbours creates and removes entries of the kernel's neighbour tables, which keep next hops
// resolved even if the host itself sends no packets there. Its methods may be called from any
// goroutine.
type Neighbours struct{ conn *conn }

// OpenNeighbours opens the tables of the calling thread's network namespace. The caller must Close
// them.
func OpenNeighbours() (*Neighbours, error) {
	c, err := dial(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	return &Neighbours{c}, nil
}

// Close closes the socket. The entries stay.
func (n *Neighbours) Close() error { return n.conn.close() }

// Observe lists the relay's entries: of this process or an earlier one.
func (n *Neighbours) Observe() (all []Neighbour, err error) {
	err = readAll("neighbours", func() error {
		all = nil
		return n.conn.ask(unix.RTM_GETNEIGH, unix.NLM_F_DUMP, neighbourRequest(NeighbourKey{}, 0), func(data []byte) {
			if e, ok := parseNeighbour(data); ok && e.ours() {
				all = append(all, Neighbour{NeighbourKey: e.NeighbourKey, Managed: e.managed, Static: e.static()})
			}
		})
	})
	return all, err
}

// Manage makes the kernel resolve a neighbour and keep it resolved (NTF_EXT_MANAGED, Linux 5.16),
// unless another program already does: permanent entries, and those managed by others, are
// unchanged. It is idempotent. Errors to match: unix.ENOBUFS if the table is full, unix.ENODEV,
// unix.ENETDOWN.
func (n *Neighbours) Manage(key NeighbourKey) error {
	e, err := readNeighbour(n.conn, key)
	if err != nil || e.managed || e.static() {
		return err
	}
	// An existing entry keeps its state. NTF_EXT_LEARNED exempts it from garbage collection.
	body := neighbourRequest(key, ntfExtLearned)
	body = appendUint32(body, ndaFlagsExt, ntfExtManaged)
	body = appendAttribute(body, ndaProtocol, []byte{protocolOurs})
	if err := n.conn.ask(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE|unix.NLM_F_ACK, body, func([]byte) {}); err != nil {
		return fmt.Errorf("make neighbour %s: %w", key.Addr, err)
	}
	return nil
}

// Forget removes an entry made by the relay. It ignores entries that are gone or belong to another
// program.
func (n *Neighbours) Forget(key NeighbourKey) error {
	e, err := readNeighbour(n.conn, key)
	if err != nil || !e.ours() || e.static() {
		return err
	}
	err = n.conn.ask(unix.RTM_DELNEIGH, unix.NLM_F_ACK, neighbourRequest(key, 0), func([]byte) {})
	if err == nil || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return fmt.Errorf("remove neighbour %s: %w", key.Addr, err)
}
