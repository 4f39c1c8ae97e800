package loader

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
	"xdpcast/pkg/flow"
)

// socketRow is the row of the map xsks for the first queue of an interface. It stays reserved for
// the interface: programs may redirect by it until its rules change.
func (l *Loader) socketRow(index int) (uint32, error) {
	l.socketsMu.Lock()
	defer l.socketsMu.Unlock()
	if row, ok := l.sockets[index]; ok {
		return row, nil
	}
	id, _, err := l.socketRows.take()
	if err != nil {
		return 0, fmt.Errorf("interfaces with AF_XDP sockets: %w", err)
	}
	l.sockets[index] = id * bpf.MaxQueues
	return l.sockets[index], nil
}

// SetSocket directs the packets of PathAFXDP rules on a queue of an interface to an AF_XDP socket,
// which must be bound there. The kernel removes it when the socket is closed. It may be called from
// any goroutine.
func (l *Loader) SetSocket(index, queue, fd int) error {
	if queue < 0 || queue >= bpf.MaxQueues {
		return fmt.Errorf("queue %d: want 0 to %d", queue, bpf.MaxQueues-1)
	}
	row, err := l.socketRow(index)
	if err != nil {
		return err
	}
	if err := l.maps.Xsks.Put(row+uint32(queue), uint32(fd)); err != nil {
		return fmt.Errorf("give queue %d of interface with index %d to a socket: %w", queue, index, err)
	}
	return nil
}

// ClearSocket removes the socket of a queue: packets take their rule's fallback. It may be called
// from any goroutine.
func (l *Loader) ClearSocket(index, queue int) error {
	l.socketsMu.Lock()
	row, ok := l.sockets[index]
	l.socketsMu.Unlock()
	if !ok || queue < 0 || queue >= bpf.MaxQueues {
		return nil
	}
	if err := l.maps.Xsks.Delete(row + uint32(queue)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("take queue %d of interface with index %d from its socket: %w", queue, index, err)
	}
	return nil
}

// forgetSockets frees the rows of interfaces that no rule of PathAFXDP names any more.
func (l *Loader) forgetSockets() {
	l.socketsMu.Lock()
	defer l.socketsMu.Unlock()
	if len(l.sockets) == 0 {
		return
	}
	used := map[int]bool{}
	for _, e := range l.rules {
		if e.rule.Path == flow.PathAFXDP {
			used[e.rule.In.Index] = true
		}
	}
	for index, row := range l.sockets {
		if !used[index] {
			delete(l.sockets, index)
			l.socketRows.give(row / bpf.MaxQueues)
		}
	}
}

// adoptSockets restores the rows of the interfaces.
func (l *Loader) adoptSockets() error {
	inUse := map[uint32]bool{}
	for _, e := range l.rules {
		if e.rule.Path != flow.PathAFXDP {
			continue
		}
		index := e.rule.In.Index
		if row, ok := l.sockets[index]; ok && row != e.sockets || !ok && inUse[e.sockets/bpf.MaxQueues] ||
			e.sockets%bpf.MaxQueues != 0 || e.sockets >= l.maps.Xsks.MaxEntries() {
			return fmt.Errorf("rule %s gives its packets to sockets at row %d, others differ", e.rule.Name, e.sockets)
		}
		l.sockets[index] = e.sockets
		inUse[e.sockets/bpf.MaxQueues] = true
	}
	l.socketRows.adopt(has(inUse))
	return nil
}
