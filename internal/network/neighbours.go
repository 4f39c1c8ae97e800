package network

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// protocolOurs marks the neighbour entries that the relay made, so that a later process
// knows them again. The kernel hands such numbers on unread; iproute2 shows it as "proto 120"
// (/etc/iproute2/rt_protos has nothing there).
const protocolOurs = 120

// Neighbour is an entry that the relay made.
type Neighbour struct {
	NeighbourKey
	// Managed: the kernel keeps it resolved.
	Managed bool
	// Static: somebody has made it permanent since. It is theirs now, and Forget
	// leaves it.
	Static bool
}

// Neighbours makes and removes entries of the kernel's neighbour tables, which keep next
// hops resolved although no packet of the host's own goes there. Its methods may be called
// from any goroutine.
type Neighbours struct{ conn *conn }

// OpenNeighbours opens the tables of the calling thread's network namespace. The caller
// must Close them.
func OpenNeighbours() (*Neighbours, error) {
	c, err := dial(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	return &Neighbours{c}, nil
}

// Close closes the socket. The entries stay.
func (n *Neighbours) Close() error { return n.conn.close() }

// Observe lists the entries that the relay made: this process or an earlier one.
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

// Manage has the kernel resolve a neighbour and keep it resolved (NTF_EXT_MANAGED,
// Linux 5.16), unless somebody has already seen to that: permanent entries, and those managed
// for others, stay as they are. It may be called again. Errors to match: unix.ENOBUFS when
// the table is full, unix.ENODEV, unix.ENETDOWN.
func (n *Neighbours) Manage(key NeighbourKey) error {
	e, err := readNeighbour(n.conn, key)
	if err != nil || e.managed || e.static() {
		return err
	}
	// An entry that is there keeps its state. NTF_EXT_LEARNED keeps it out of the
	// collection of garbage.
	body := neighbourRequest(key, ntfExtLearned)
	body = appendUint32(body, ndaFlagsExt, ntfExtManaged)
	body = appendAttribute(body, ndaProtocol, []byte{protocolOurs})
	if err := n.conn.ask(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE|unix.NLM_F_ACK, body, func([]byte) {}); err != nil {
		return fmt.Errorf("make neighbour %s: %w", key.Addr, err)
	}
	return nil
}

// Forget removes an entry that the relay made. One that is gone or somebody else's is none.
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
