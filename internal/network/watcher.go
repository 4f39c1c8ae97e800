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
	// Logger receives messages for the operator; nil discards them.
	Logger *slog.Logger
}

const (
	// routesPause is the minimum time between two reads of routes after notifications: a router's
	// table may change constantly. Slow reads are spaced further apart, so that they take at most a
	// fifth of the time.
	routesPause = 100 * time.Millisecond
	routesShare = 4
	// retryPause is the time after which a failed request is retried.
	retryPause = time.Second
	// idle is the result of Due when there is nothing to wait for.
	idle = time.Hour
)

// Watcher makes Snapshots of one network namespace. It listens to the kernel's notifications, which
// say what to read again; every value in a snapshot is the kernel's answer to a request. Its
// methods may be called from any goroutine.
//
// Each life of an interface has its own generation. An announced deletion starts a new one, also if
// the index is reused before the next snapshot. If notifications were lost, any link may have been
// replaced, so each gets a new generation: that costs callers a check of the kernel's state, while
// mistaking a link for its predecessor would hide that its state is gone.
//
// The netdev netlink family, the only source of features, also announces them: including those that
// a veth gains or loses with its peer's receive offload or program.
//
// The kernel does not announce everything. The MTU of a veth's peer in another network namespace
// without CAP_NET_BROADCAST, programs attached or detached by a BPF link, and alternative names and programs of interfaces
// that are down, are noticed when something else of the interface changes, or with Resync.
type Watcher struct {
	log       *slog.Logger
	kernel    kernel
	changed   chan struct{}
	listeners []*listener
	ways      *listener // announces routes and neighbours, while hops are requested
	foreign   *listener // announces links of other network namespaces; nil if that is not permitted
	running   sync.WaitGroup

	// mu guards what the listeners received.
	mu       sync.Mutex
	pending  news
	of       interests
	peers    peers       // whose announcements foreign takes
	timer    *time.Timer // announces changed routes, once they are due
	routesAt time.Time   // when routes are due again
	closed   bool

	// state guards the rest, across snapshots. Lock it before mu.
	state       sync.Mutex
	unread      news // not yet processed
	links       map[int]*Link
	generations uint64 // last assigned
	hops        hops
	last        *Snapshot
	retry       time.Time // when to retry failed requests; zero if there are none
}

// Open starts watching the network namespace of the calling thread. The caller must Close the
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

// wayGroups are the multicast groups of routes and neighbours. They are left while no hops are
// requested: on a router notifications never end.
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
	if err := w.listenToPeers(open); err != nil {
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

// Close stops the watcher. It is idempotent; a later Snapshot returns os.ErrClosed.
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

// run reads notifications until the socket is closed, and announces them.
func (w *Watcher) run(l *listener) {
	_ = l.raw.Read(func(fd uintptr) bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		l.drain(int(fd))
		w.announce()
		return false // wait for more
	})
}

// announce signals news; mu is held. Route changes are signalled once they are due.
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

// Changed returns a channel that holds at most one value: something may have changed since the last
// Snapshot.
func (w *Watcher) Changed() <-chan struct{} { return w.changed }

// Remind sends to Changed if there is something to read, which may have been drained by Concerns.
func (w *Watcher) Remind() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.announce()
}

// Concerns says whether a Snapshot is due for more than links that used denies.
func (w *Watcher) Concerns(used func(index int) bool) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.drain()
	n := &w.pending
	if n.all || n.tables || len(n.neighbours) > 0 || n.routesChanged() && time.Until(w.routesAt) <= 0 {
		return true
	}
	for index := range n.links {
		if used(index) {
			return true
		}
	}
	return false
}

// Resync makes the next Snapshot read everything again.
func (w *Watcher) Resync() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pending.all, w.pending.routes, w.pending.tables = true, true, true
	w.routesAt = time.Time{}
	w.signal()
}

// Due returns the time until a Snapshot should be made even without a notification: for routes that
// changed shortly after the last read, and to retry failed requests. It is long if there is nothing
// to wait for.
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

// Ask sets the hops of future snapshots: these and no others. The caller keeps ownership of keys.
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

// listenToWays joins or leaves the groups of routes and neighbours. If the kernel refuses, there
// are no notifications about them; the slow Resync makes up for that.
func (w *Watcher) listenToWays(on bool) {
	if err := w.ways.raw.Control(func(fd uintptr) {
		for _, group := range wayGroups {
			if err := join(int(fd), group, on); err != nil {
				w.log.Warn("no notifications of routes and neighbours", "netlink_group", group, "error", err)
			}
		}
	}); err != nil && !w.closed {
		w.log.Warn("no notifications of routes and neighbours", "error", err)
	}
}

// take drains the sockets and takes over their news. Everything the kernel announced before the
// call, and hence everything done before it, is in the next snapshot.
func (w *Watcher) take() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.drain()
	if w.pending.reborn {
		w.log.Warn("notifications of interface changes were lost: all interfaces are read again")
	}
	w.unread.add(w.pending)
	w.pending = news{}
}

// drain reads what the kernel has announced; mu is held.
func (w *Watcher) drain() {
	for _, l := range w.listeners {
		_ = l.raw.Control(func(fd uintptr) { l.drain(int(fd)) })
	}
}

// Snapshot returns the host's current network. It is the same snapshot as the last if nothing
// changed, and shares unchanged Links with it. After an error the next call retries.
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
	if linksDiffer {
		w.followPeers()
	}
	hopsDiffer := w.readHops(linksDiffer, retrying)
	if w.last != nil && !linksDiffer && !hopsDiffer {
		return w.last, nil
	}
	w.last = w.compose(linksDiffer || w.last == nil)
	return w.last, nil
}

// again makes Due schedule a retry.
func (w *Watcher) again() {
	if w.retry.IsZero() {
		w.retry = time.Now().Add(retryPause)
	}
}
