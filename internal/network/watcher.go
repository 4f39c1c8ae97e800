package network

import (
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Options are the settings of a Watcher.
type Options struct {
	// Logger gets what an operator may want to know; nil discards it.
	Logger *slog.Logger
}

const (
	// routesPause is the least time between two looks at routes that were announced to have
	// changed: a router's table may change all the time. Looks that take long are
	// further apart, so that they take no more than a fifth of the time.
	routesPause = 100 * time.Millisecond
	routesShare = 4
	// retryPause is when the kernel is asked again for what it did not answer.
	retryPause = time.Second
	// idle is what Due returns when there is nothing to wait for.
	idle = time.Hour
)

// Watcher makes Snapshots of one network namespace. It listens to the kernel's announcements,
// which say what to ask again; every value in a snapshot is the kernel's answer to a question.
// Its methods may be called from any goroutine.
//
// Each life of an interface has a generation of its own. A deletion that was announced
// starts a new one, also where the index is taken again before anybody looks. Where announcements
// were lost, every link may be another than it was, and each gets a new generation: that costs
// those who know them by it a look at what the kernel holds, while a link that is taken
// for another would hide that it holds nothing.
//
// Features are announced by the netdev netlink family, which is what tells them at all: also
// those that a veth gains or loses with its peer's receive offload or program.
//
// The kernel does not announce everything. The MTU of a veth's peer in another network namespace,
// programs that are attached or detached by a BPF link, and alternative names and programs of
// interfaces that are down, are seen when something else of the interface changes, or with Resync.
type Watcher struct {
	log       *slog.Logger
	kernel    kernel
	changed   chan struct{}
	listeners []*listener
	ways      *listener // announces routes and neighbours, while there are hops
	running   sync.WaitGroup

	// mu guards what the listeners have heard.
	mu       sync.Mutex
	pending  news
	of       interests
	timer    *time.Timer // announces routes that changed, when they may be asked for
	routesAt time.Time   // when routes may be asked for again
	closed   bool

	// state guards the rest, from one snapshot to the next. Lock it before mu.
	state       sync.Mutex
	unread      news // not yet looked at
	links       map[int]*Link
	generations uint64 // the last given
	hops        hops
	last        *Snapshot
	retry       time.Time // when to ask again for what failed; zero for nothing
}

// Open starts to watch the network namespace of the calling thread. The caller must Close the
// watcher.
func Open(opts Options) (*Watcher, error) { return open(opts, receiveBuffer) }

func open(opts Options, room int) (_ *Watcher, err error) {
	w := &Watcher{
		log: opts.Logger, changed: make(chan struct{}, 1),
		links: map[int]*Link{}, hops: newHops(),
		unread: news{all: true},
	}
	if w.log == nil {
		w.log = slog.New(slog.DiscardHandler)
	}
	w.timer = time.AfterFunc(idle, w.signal)
	w.timer.Stop()
	defer func() {
		if err != nil {
			err = errors.Join(err, w.Close())
		}
	}()
	f, err := findFamilies()
	if err != nil {
		return nil, err
	}
	if err := w.listen(f, room); err != nil {
		return nil, err
	}
	if w.kernel, err = openKernel(f); err != nil {
		return nil, err
	}
	for _, l := range w.listeners {
		w.running.Go(func() { w.run(l) })
	}
	return w, nil
}

// wayGroups announce what decides where unicast packets go. They are left while nobody asks:
// on a router they never end.
var wayGroups = [...]uint32{
	unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
	unix.RTNLGRP_NEXTHOP, unix.RTNLGRP_NEIGH,
}

// listen opens the listeners.
func (w *Watcher) listen(f families, room int) error {
	open := func(protocol int, hear func(message), lost func(), groups ...uint32) (*listener, error) {
		l, err := listen(protocol, room, groups...)
		if err != nil {
			return nil, err
		}
		l.hear, l.lost = hear, lost
		w.listeners = append(w.listeners, l)
		return l, nil
	}
	again := func() { w.pending.all = true }
	_, err := open(unix.NETLINK_ROUTE, w.pending.hearLink, func() {
		w.pending.all, w.pending.reborn = true, true
	}, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR)
	if err != nil {
		return err
	}
	if w.ways, err = open(unix.NETLINK_ROUTE, func(m message) { w.pending.hearWay(m, &w.of) }, func() {
		w.pending.routes, w.pending.tables = true, true
	}); err != nil {
		return err
	}
	if group := f.ethtool.Groups["monitor"]; group != 0 {
		if _, err = open(unix.NETLINK_GENERIC, w.pending.hearQueues, again, group); err != nil {
			return err
		}
	}
	if group := f.netdev.Groups["mgmt"]; group != 0 {
		_, err = open(unix.NETLINK_GENERIC, w.pending.hearFeatures, again, group)
	}
	return err
}

// Close ends the watch. It may be called again; a Snapshot afterwards is refused with os.ErrClosed.
func (w *Watcher) Close() (err error) {
	w.mu.Lock()
	w.closed = true
	w.timer.Stop()
	w.mu.Unlock()
	for _, l := range w.listeners {
		if e := l.socket.Close(); !errors.Is(e, os.ErrClosed) {
			err = errors.Join(err, e)
		}
	}
	w.running.Wait()
	w.state.Lock()
	defer w.state.Unlock()
	if w.kernel != nil {
		err = errors.Join(err, w.kernel.close())
		w.kernel = nil
	}
	return err
}

// run hears what arrives until the socket is closed, and announces it.
func (w *Watcher) run(l *listener) {
	_ = l.raw.Read(func(fd uintptr) bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		l.drain(int(fd))
		w.announce()
		return false // wait for more
	})
}

// announce says that there is news; mu is held. Of routes it does when they may be asked for.
func (w *Watcher) announce() {
	routes := w.pending.routesChanged()
	other := w.pending
	other.routes, other.prefixes = false, nil
	switch wait := time.Until(w.routesAt); {
	case !other.empty() || routes && wait <= 0:
		w.signal()
	case routes && !w.closed:
		w.timer.Reset(wait)
	}
}

func (w *Watcher) signal() {
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

// Changed returns a channel that holds at most one value: something may have changed since the
// last Snapshot.
func (w *Watcher) Changed() <-chan struct{} { return w.changed }

// Resync has the next Snapshot read everything anew.
func (w *Watcher) Resync() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pending.all, w.pending.routes, w.pending.tables = true, true, true
	w.routesAt = time.Time{}
	w.signal()
}

// Due says in how long a Snapshot should be made although nothing is announced: to look at
// routes that changed shortly after the last look, and to ask again for what the kernel did
// not answer. It is long when there is nothing to wait for.
func (w *Watcher) Due() time.Duration {
	w.state.Lock()
	defer w.state.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	due := time.Duration(idle)
	if w.unread.routesChanged() || w.pending.routesChanged() {
		due = min(due, time.Until(w.routesAt))
	}
	if !w.retry.IsZero() {
		due = min(due, time.Until(w.retry))
	}
	return max(0, due)
}

// Ask says which hops the snapshots from the next one on have: these and no others. The
// keys are the caller's.
func (w *Watcher) Ask(keys []HopKey) {
	w.state.Lock()
	defer w.state.Unlock()
	if !w.hops.ask(keys) {
		return
	}
	dsts := make([]netip.Addr, 0, len(keys))
	for key := range w.hops.ways {
		dsts = append(dsts, key.Dst)
	}
	slices.SortFunc(dsts, netip.Addr.Compare)
	dsts = slices.Compact(dsts)
	w.mu.Lock()
	defer w.mu.Unlock()
	listening := len(w.of.dsts) > 0
	w.of.dsts = dsts
	if listening != (len(dsts) > 0) {
		w.listenToWays(!listening)
	}
}

// listenToWays joins or leaves the groups of routes and neighbours. Where the kernel refuses
// there is nothing to hear of them, which the slow Resync makes up for.
func (w *Watcher) listenToWays(on bool) {
	if err := w.ways.raw.Control(func(fd uintptr) {
		for _, group := range wayGroups {
			if err := join(int(fd), group, on); err != nil {
				w.log.Warn("changes of routes and neighbours are not heard", "netlink_group", group, "error", err)
			}
		}
	}); err != nil && !w.closed {
		w.log.Warn("changes of routes and neighbours are not heard", "error", err)
	}
}

// take drains the sockets and takes over what they brought. What the kernel has announced when
// it is called, which is all that was done before, is in the next snapshot.
func (w *Watcher) take() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, l := range w.listeners {
		_ = l.raw.Control(func(fd uintptr) { l.drain(int(fd)) })
	}
	if w.pending.reborn {
		w.log.Warn("the kernel announced more changes of interfaces than were read: all are looked at again")
	}
	w.unread.add(w.pending)
	w.pending = news{}
}

// Snapshot returns the host's network as it is now. It is the same snapshot as the last when
// nothing is different, and has the same Links where they are as they were. After an error the
// next call asks again.
func (w *Watcher) Snapshot() (*Snapshot, error) {
	w.state.Lock()
	defer w.state.Unlock()
	if w.kernel == nil {
		return nil, os.ErrClosed
	}
	w.take()
	retrying := !w.retry.IsZero() && time.Until(w.retry) <= 0
	if retrying {
		w.retry = time.Time{}
	}
	linksDiffer, err := w.readLinks()
	if err != nil {
		w.again()
		return nil, err
	}
	hopsDiffer := w.readHops(linksDiffer, retrying)
	if w.last != nil && !linksDiffer && !hopsDiffer {
		return w.last, nil
	}
	w.last = w.compose(linksDiffer || w.last == nil)
	return w.last, nil
}

// again has Due ask for another try.
func (w *Watcher) again() {
	if w.retry.IsZero() {
		w.retry = time.Now().Add(retryPause)
	}
}
