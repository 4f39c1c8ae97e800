package mroute

import (
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Options say what to follow, and whom to notify.
type Options struct {
	// Tables are table ids; none means Main.
	Tables []uint32
	// IPv4 and IPv6 select the families.
	IPv4, IPv6 bool
	// Hold is called for an entry as soon as a notification that changes it arrives or may have
	// been lost, before Changes reports it: until Settled releases the entry, what was derived from
	// it may differ from the kernel's state. Nil: not called. It must not block, and must not call
	// the watcher.
	Hold func(Key)
	// Logger receives warnings. Nil: discarded.
	Logger *slog.Logger

	room int // receive buffer in bytes, for tests; 0: receiveBuffer
}

// receiveBuffer is the size of the socket's buffer in bytes: enough for some 20,000 entries that
// change at once. The kernel's default loses notifications after 256.
const receiveBuffer = 16 << 20

// settle is the minimum time between two signals of Changed: notifications are collected meanwhile.
// Hold does not wait.
const settle = 5 * time.Millisecond

// Watcher follows the caches of the network namespace that it was opened in. Its methods may be
// called from any goroutine.
type Watcher struct {
	opts    Options
	socket  *os.File
	raw     syscall.RawConn
	changed chan struct{}
	ended   chan struct{}

	mu      sync.Mutex
	entries map[Key]*Entry
	touched map[Key]bool // since the last Changes
	vifs    map[int]bool // indexes of interfaces that are, or were, virtual interfaces
	stale   bool         // everything must be re-read
	lost    bool         // notifications were lost since the last resync
	joins   bool         // a group was joined or left since the last JoinsChanged
	closed  bool
	timer   *time.Timer // signals changes that settle held back
	waiting bool        // timer is running
	told    time.Time
}

// Open starts following the caches. The caller must Close the watcher. Call all of its methods in
// the network namespace that Open was called in.
func Open(opts Options) (_ *Watcher, err error) {
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	if len(opts.Tables) == 0 {
		opts.Tables = []uint32{Main}
	}
	if opts.room == 0 {
		opts.room = receiveBuffer
	}
	fd, err := listen(opts)
	if err != nil {
		return nil, err
	}
	w := &Watcher{
		opts: opts, socket: os.NewFile(uintptr(fd), "netlink"), changed: make(chan struct{}, 1), ended: make(chan struct{}),
		entries: map[Key]*Entry{}, touched: map[Key]bool{}, vifs: map[int]bool{}, stale: true,
	}
	w.timer = time.AfterFunc(time.Hour, w.tell)
	w.timer.Stop()
	if w.raw, err = w.socket.SyscallConn(); err == nil {
		w.mu.Lock()
		err = w.resync()
		w.mu.Unlock()
	}
	if err != nil {
		return nil, errors.Join(err, w.socket.Close())
	}
	go w.run()
	return w, nil
}

// listen opens the notification socket: for entries, for links, and for VIFs, since removing a VIF
// is not announced for the entries that use it.
func listen(opts Options) (fd int, err error) {
	fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return -1, fmt.Errorf("netlink socket: %w", err)
	}
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, opts.room) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, opts.room) // capped by net.core.rmem_max
	}
	groups := []int{unix.RTNLGRP_LINK}
	if opts.IPv4 {
		groups = append(groups, unix.RTNLGRP_IPV4_MROUTE, unix.RTNLGRP_IPV4_NETCONF)
	}
	if opts.IPv6 {
		groups = append(groups, unix.RTNLGRP_IPV6_MROUTE, unix.RTNLGRP_IPV6_NETCONF)
	}
	err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	for _, group := range groups {
		if err == nil {
			err = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group)
		}
	}
	if err != nil {
		return -1, errors.Join(fmt.Errorf("listen to multicast routes: %w", err), unix.Close(fd))
	}
	// Linux 6.14 and newer. On older kernels callers have to poll ReadJoined.
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, unix.RTNLGRP_IPV4_MCADDR)
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, unix.RTNLGRP_IPV6_MCADDR)
	return fd, nil
}

// Close ends the watch. It may be called again; Changes returns os.ErrClosed afterwards.
func (w *Watcher) Close() error {
	w.mu.Lock()
	if w.closed {
		w.mu.Unlock()
		return nil
	}
	w.closed = true
	w.timer.Stop()
	w.mu.Unlock()
	err := w.socket.Close()
	<-w.ended
	return err
}

// Changed receives a value when Changes has something new.
func (w *Watcher) Changed() <-chan struct{} { return w.changed }

// Resync makes the next Changes re-read everything from the kernel.
func (w *Watcher) Resync() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stale = true
}

// Changes returns what changed since the last call: the current entries, and nil for deleted ones.
// The map belongs to the caller. It re-reads the kernel's state if notifications were lost.
func (w *Watcher) Changes() (map[Key]*Entry, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return nil, os.ErrClosed
	}
	if w.stale {
		if err := w.resync(); err != nil {
			return nil, err
		}
	}
	changes := make(map[Key]*Entry, len(w.touched))
	for key := range w.touched {
		changes[key] = w.entries[key]
	}
	clear(w.touched)
	return changes, nil
}

// Settled calls release for those keys whose entries are as Changes last returned them, with no
// notification since. Changed signals the others. Hold is not called while it runs.
func (w *Watcher) Settled(keys iter.Seq[Key], release func(Key)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.lost {
		return
	}
	for key := range keys {
		if !w.touched[key] {
			release(key)
		}
	}
}

// Interfaces returns the sorted indexes of interfaces that multicast routing uses, or used since
// Open: daemons restart.
func (w *Watcher) Interfaces() []int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Sorted(maps.Keys(w.vifs))
}

// JoinsChanged reports whether the kernel has announced since the last call that a group was joined
// or left on some interface. Only Linux 6.14 and newer do, for the first socket and the last.
func (w *Watcher) JoinsChanged() (changed bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	changed, w.joins = w.joins, false
	return changed
}

// Entries returns all entries, sorted by key.
func (w *Watcher) Entries() []*Entry {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.SortedFunc(maps.Values(w.entries), func(a, b *Entry) int { return a.Key.Compare(b.Key) })
}

// run processes notifications until the socket is closed.
func (w *Watcher) run() {
	defer close(w.ended)
	buf := make([]byte, 1<<17)
	for {
		err := w.raw.Read(func(fd uintptr) bool { return w.drain(int(fd), buf) })
		if err != nil {
			return
		}
		// Signal the first change at once, and a burst only every settle: Changes returns the
		// state.
		w.mu.Lock()
		if wait := settle - time.Since(w.told); wait > 0 {
			if !w.closed && !w.waiting {
				w.waiting = true
				w.timer.Reset(wait)
			}
			w.mu.Unlock()
			continue
		}
		w.mu.Unlock()
		w.tell()
	}
}

// tell signals Changed.
func (w *Watcher) tell() {
	w.mu.Lock()
	w.told, w.waiting = time.Now(), false
	w.mu.Unlock()
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

// drain processes all pending notifications, and reports whether there is anything to signal.
func (w *Watcher) drain(fd int, buf []byte) (news bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for {
		n, from, err := unix.Recvfrom(fd, buf, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ENOBUFS):
			w.loseAnnouncements()
			w.joins, news = true, true
			continue
		case err != nil:
			return news
		}
		if sender, ok := from.(*unix.SockaddrNetlink); !ok || sender.Pid != 0 {
			continue // not the kernel
		}
		if n > len(buf) {
			w.loseAnnouncements()
			news = true
			continue
		}
		messages, err := syscall.ParseNetlinkMessage(buf[:n])
		if err != nil {
			w.loseAnnouncements()
			news = true
			continue
		}
		for i := range messages {
			news = w.hear(messages[i].Header.Type, messages[i].Data) || news
		}
	}
}

// loseAnnouncements records that any entry may have changed. The lock is held.
func (w *Watcher) loseAnnouncements() {
	if !w.lost {
		for key := range w.entries {
			w.hold(key)
		}
	}
	w.stale, w.lost = true, true
}

func (w *Watcher) hold(key Key) {
	if w.opts.Hold != nil {
		w.opts.Hold(key)
	}
}

// hear processes one notification, and reports whether it is news. The lock is held.
func (w *Watcher) hear(kind uint16, body []byte) bool {
	switch kind {
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		m, ok := parse(body)
		if !ok || !slices.Contains(w.opts.Tables, m.entry.Table) {
			return false
		}
		return w.put(m.entry.Key, entryOf(&m, kind))
	case unix.RTM_NEWMULTICAST, unix.RTM_DELMULTICAST:
		w.joins = true
		return true
	case unix.RTM_DELLINK:
		if index, ok := deletedLink(body); ok {
			delete(w.vifs, index)
		}
		w.stale = true
		return true
	case unix.RTM_NEWNETCONF, unix.RTM_DELNETCONF:
		// A VIF was added or removed: entries lose it without a notification of their own.
		if index, ok := forwards(body); ok && kind == unix.RTM_NEWNETCONF {
			w.vifs[index] = true
		}
		w.stale = true
		return true
	}
	return false
}

// entryOf is the entry after a message; nil: none, or an unresolved one.
func entryOf(m *message, kind uint16) *Entry {
	if kind != unix.RTM_NEWROUTE || !m.resolved {
		return nil
	}
	return &m.entry
}

// put replaces an entry, and reports whether that changes anything: daemons write the same entry
// repeatedly.
func (w *Watcher) put(key Key, e *Entry) bool {
	old := w.entries[key]
	switch {
	case old == nil && e == nil:
		return false
	case old != nil && e != nil && old.Equal(e):
		return false
	case e == nil:
		delete(w.entries, key)
	default:
		w.entries[key] = e
	}
	w.touched[key] = true
	if old != nil { // nothing was derived from a new entry yet
		w.hold(key)
	}
	return true
}

// resync reads all entries from the kernel. The lock is held, so that notifications that arrive
// meanwhile are processed afterwards: they are as old as what was read, or newer.
func (w *Watcher) resync() error {
	found := map[Key]*Entry{}
	for family, wanted := range map[uint8]bool{familyIPv4: w.opts.IPv4, familyIPv6: w.opts.IPv6} {
		if !wanted {
			continue
		}
		if err := dump(family, w.opts.Tables, found); err != nil {
			return err
		}
		if err := dumpInterfaces(addressFamily[family], w.vifs); err != nil {
			return err
		}
	}
	w.stale, w.lost = false, false
	for key := range w.entries {
		if found[key] == nil {
			w.put(key, nil)
		}
	}
	for key, e := range found {
		w.put(key, e)
	}
	return nil
}

// dumpTries bounds the attempts at a dump that changes while it is read.
const dumpTries = 16

// dump reads the entries of a family. A kernel without multicast routing has none.
func dump(family uint8, tables []uint32, found map[Key]*Entry) error {
	var answers [][]byte
	var err error
	for range dumpTries {
		req := nl.NewNetlinkRequest(unix.RTM_GETROUTE, unix.NLM_F_DUMP)
		req.AddData(&nl.RtMsg{RtMsg: unix.RtMsg{Family: family}})
		if answers, err = req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWROUTE); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("read multicast routes of family %d: %w", family, err)
	}
	for _, body := range answers {
		m, ok := parse(body)
		if !ok || !m.resolved || !slices.Contains(tables, m.entry.Table) {
			continue
		}
		e := m.entry
		found[e.Key] = &e
	}
	return nil
}

// addressFamily maps a family of multicast routes to its address family.
var addressFamily = map[uint8]uint8{familyIPv4: unix.AF_INET, familyIPv6: unix.AF_INET6}

// dumpInterfaces adds the interfaces that multicast routing uses for an address family.
func dumpInterfaces(family uint8, found map[int]bool) (err error) {
	var answers [][]byte
	for range dumpTries {
		req := nl.NewNetlinkRequest(unix.RTM_GETNETCONF, unix.NLM_F_DUMP)
		req.AddData(&netconfRequest{family})
		if answers, err = req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWNETCONF); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("read interfaces of multicast routing of family %d: %w", family, err)
	}
	for _, body := range answers {
		if index, ok := forwards(body); ok {
			found[index] = true
		}
	}
	return nil
}

// netconfRequest is a struct netconfmsg (include/uapi/linux/netconf.h).
type netconfRequest struct{ family uint8 }

func (r *netconfRequest) Len() int { return sizeofNetconfMsg }

func (r *netconfRequest) Serialize() []byte { return []byte{r.family, 0, 0, 0} }
