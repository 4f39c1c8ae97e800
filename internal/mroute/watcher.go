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

// Options say what to follow.
type Options struct {
	// Tables are numbers of tables; none means Main.
	Tables []uint32
	// IPv4 and IPv6 say which families.
	IPv4, IPv6 bool
	// Hold is called for an entry as soon as an announcement is heard that changes it, or may have
	// been lost, and before Changes tells of it: from then until Settled calls its function, what
	// was made of the entry is not what the kernel has. Nil: nobody is told. It must not block, and
	// must not call the watcher.
	Hold func(Key)
	// Logger receives warnings. Nil: discarded.
	Logger *slog.Logger

	room int // of the socket, for tests; 0: receiveBuffer
}

// receiveBuffer is the room for announcements in bytes: that of some 20,000 entries that change
// at once. The kernel's default loses some after 256.
const receiveBuffer = 16 << 20

// settle is how long announcements are collected, after some that were told, before Changed tells
// again. Hold does not wait.
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
	stale   bool         // all is to be read again
	lost    bool         // since announcements were lost
	joins   bool         // some program joined or left a group since the last JoinsChanged
	closed  bool
	timer   *time.Timer // tells of what came too soon after what was told
	waiting bool        // for timer
	told    time.Time
}

// Open begins to follow the caches. The caller must Close the watcher. All of its methods must be
// called in the network namespace that Open was called in.
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

// listen opens the socket of announcements: of entries, of VIFs that come and go, which is not
// announced of the entries that name them, and of links.
func listen(opts Options) (fd int, err error) {
	fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return -1, fmt.Errorf("netlink socket: %w", err)
	}
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, opts.room) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, opts.room) // what net.core.rmem_max lets be
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
	// Since Linux 6.14. Before, who asks for what is joined asks often.
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, unix.RTNLGRP_IPV4_MCADDR)
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, unix.RTNLGRP_IPV6_MCADDR)
	return fd, nil
}

// Close ends the watch. It may be called again; methods that ask answer os.ErrClosed from then on.
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

// Resync has the next Changes read everything from the kernel again.
func (w *Watcher) Resync() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stale = true
}

// Changes returns what has changed since the last call: the entries that are there now, and nil
// for those that are gone. What it returns belongs to the caller. It asks the kernel where
// announcements were lost.
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

// Settled calls release for those of some entries that are as Changes told last: nothing was
// announced since. Of the others Changed tells. While it runs, Hold is not called.
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

// Interfaces are the indexes of the interfaces that multicast routing uses, or used since Open, in
// order. Daemons that start again are the reason for these.
func (w *Watcher) Interfaces() []int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Sorted(maps.Keys(w.vifs))
}

// JoinsChanged says whether the kernel has announced since the last call that a group was joined,
// or left, on some interface. Not every kernel does: Linux 6.14 and newer, and of the first
// socket and the last.
func (w *Watcher) JoinsChanged() (changed bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	changed, w.joins = w.joins, false
	return changed
}

// Entries returns all entries, by key.
func (w *Watcher) Entries() []*Entry {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.SortedFunc(maps.Values(w.entries), func(a, b *Entry) int { return a.Key.Compare(b.Key) })
}

// run takes up announcements until the socket is closed.
func (w *Watcher) run() {
	defer close(w.ended)
	buf := make([]byte, 1<<17)
	for {
		err := w.raw.Read(func(fd uintptr) bool { return w.drain(int(fd), buf) })
		if err != nil {
			return
		}
		// The first change is told at once. One that changes often is looked at once in a while:
		// what is told is the state.
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

// tell has Changed receive a value.
func (w *Watcher) tell() {
	w.mu.Lock()
	w.told, w.waiting = time.Now(), false
	w.mu.Unlock()
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

// drain takes up all that has arrived, and says whether there is something to tell.
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

// loseAnnouncements notes that any entry may be another now. The lock is held.
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

// hear takes up one announcement, and says whether it is news. The lock is held.
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
		// A VIF came or went: entries lose it without an announcement of their own.
		if index, ok := forwards(body); ok && kind == unix.RTM_NEWNETCONF {
			w.vifs[index] = true
		}
		w.stale = true
		return true
	}
	return false
}

// entryOf is what a message makes of its entry; nil: there is none, or none that is resolved.
func entryOf(m *message, kind uint16) *Entry {
	if kind != unix.RTM_NEWROUTE || !m.resolved {
		return nil
	}
	return &m.entry
}

// put replaces an entry, and says whether that changes anything: daemons write the same entry
// again and again.
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
	if old != nil { // of a new one nothing was made yet
		w.hold(key)
	}
	return true
}

// resync reads all entries from the kernel. The lock is held, so that what was announced
// meanwhile is taken up afterwards: it is as old as what was read, or later.
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

// dumpTries bounds how often a dump is repeated that changed while it was read.
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

// addressFamily is that of a family of multicast routes.
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
