package relay

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// watch tells when interfaces, their queues, XDP features, addresses, routes or neighbours change. What changed
// is told only as far as it says what to ask the kernel again, so that an overflow
// loses nothing and no answer is older than the question.
type watch struct {
	changed chan struct{} // holds at most one
	socket  *os.File
	ethtool *os.File // nil: the kernel does not tell of queues
	netdev  *os.File // nil: nor of XDP features
	running sync.WaitGroup

	mu       sync.Mutex
	pending  news
	followed map[neighbourKey]bool
	routes   bool // to be told
}

// news is what has changed since one last asked.
type news struct {
	links      bool // interfaces, their features or addresses
	queues     bool // of interfaces
	routes     bool
	neighbours map[neighbourKey]bool // of those followed
	lost       bool                  // the kernel told more than was heard
}

// watched are the announcements listened to (rtnetlink(7)).
var watched = [...]int{
	unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
	unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
	unix.RTNLGRP_NEIGH,
}

// newWatch listens in the network namespace of the calling thread. The caller must
// Close it.
func newWatch() (*watch, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	groups := uint32(0)
	for _, g := range watched {
		groups |= 1 << (g - 1)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		return nil, errors.Join(fmt.Errorf("bind netlink socket: %w", err), unix.Close(fd))
	}
	ethtool, err := listenGeneric(ethtoolFamily, ethtoolGroup)
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	netdev, err := listenGeneric(netdevFamily, netdevGroup)
	if err != nil {
		if ethtool != nil {
			err = errors.Join(err, ethtool.Close())
		}
		return nil, errors.Join(err, unix.Close(fd))
	}
	w := &watch{
		changed: make(chan struct{}, 1), socket: os.NewFile(uintptr(fd), "rtnetlink"), ethtool: ethtool, netdev: netdev,
		followed: map[neighbourKey]bool{},
	}
	w.running.Go(func() { w.run(w.socket, w.note) })
	if ethtool != nil {
		w.running.Go(func() { w.run(ethtool, w.noteQueues) })
	}
	if netdev != nil {
		w.running.Go(func() { w.run(netdev, w.noteFeatures) })
	}
	return w, nil
}

// run reads a socket until it is closed.
func (w *watch) run(socket *os.File, note func(data []byte, lost bool) bool) {
	buf := make([]byte, 65536)
	for {
		n, err := socket.Read(buf)
		if err != nil && !errors.Is(err, unix.ENOBUFS) {
			return
		}
		if !note(buf[:max(n, 0)], err != nil) {
			continue
		}
		select {
		case w.changed <- struct{}{}:
		default:
		}
	}
}

// note takes up what one read has brought, and says whether any of it matters.
func (w *watch) note(data []byte, lost bool) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	matters := lost
	w.pending.lost = w.pending.lost || lost
	messages, err := syscall.ParseNetlinkMessage(data)
	if err != nil {
		w.pending.lost, matters = true, true
	}
	for _, m := range messages {
		switch m.Header.Type {
		case unix.RTM_NEWROUTE, unix.RTM_DELROUTE, unix.RTM_NEWRULE, unix.RTM_DELRULE:
			if w.routes {
				w.pending.routes, matters = true, true
			}
		case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
			if key, ok := neighbourOf(m.Data); ok && w.followed[key] {
				if w.pending.neighbours == nil {
					w.pending.neighbours = map[neighbourKey]bool{}
				}
				w.pending.neighbours[key], matters = true, true
			}
		default:
			w.pending.links, matters = true, true
		}
	}
	return matters
}

// noteQueues is note for the messages of ethtool.
func (w *watch) noteQueues(data []byte, lost bool) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !lost && !tellsOfQueues(data) {
		return false
	}
	w.pending.queues = true
	return true
}

// noteFeatures is note for the messages of netdev.
func (w *watch) noteFeatures([]byte, bool) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pending.links = true
	return true
}

// neighbourOf reads which entry a message is about: struct ndmsg and the attribute
// NDA_DST (include/uapi/linux/neighbour.h).
func neighbourOf(data []byte) (neighbourKey, bool) {
	e, ok := parseNeighbour(data)
	return e.key, ok
}

// follow says whether changes of a neighbour are to be told.
func (w *watch) follow(key neighbourKey, on bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if on {
		w.followed[key] = true
		return
	}
	delete(w.followed, key)
}

// followRoutes says whether changes of routes are to be told: on a router they may
// never end.
func (w *watch) followRoutes(on bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.routes = on
}

// take returns what has changed since the last call.
func (w *watch) take() news {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := w.pending
	w.pending = news{}
	return n
}

// Close ends the watch.
func (w *watch) Close() error {
	err := w.socket.Close()
	if w.ethtool != nil {
		err = errors.Join(err, w.ethtool.Close())
	}
	if w.netdev != nil {
		err = errors.Join(err, w.netdev.Close())
	}
	w.running.Wait()
	return err
}
