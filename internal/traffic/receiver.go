package traffic

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// RecvConfig configures what to receive and what to expect.
type RecvConfig struct {
	// Subscriptions are the endpoints to listen to, at least one.
	Subscriptions []Subscription
	// Groups is the number of consecutive group addresses of each subscription; 0 means 1.
	Groups int
	// FromStart says that every stream begins at sequence number 0, so that packets missing before
	// the first received one are lost.
	FromStart bool
	// Expect is how many packets each group should receive. Missing ones are lost at the end,
	// further ones are surplus. 0 expects nothing.
	Expect uint64
	// Expected are the header fields that packets must have.
	Expected Expected
	// Numbering is the format of an additional number in packets. Packets of other senders are
	// accounted for by it, one flow for each sender; in our own it must be correct.
	Numbering Numbering
	// Late is the time after which a repaired packet is late, like the buffer of a real stream's
	// receiver; 0 means never.
	Late time.Duration
	// Window is the window within which late packets and duplicates are distinguished, in sequence
	// numbers, a power of two from 64 on; 0 means 65536. It takes one bit a number for each flow.
	Window int
	// SocketBuffer is the receive buffer of each socket in bytes; 0 means 32 MiB. The kernel grants
	// less to a process without CAP_NET_ADMIN.
	SocketBuffer int
	// Batch is the maximum number of datagrams per system call, up to 1024; 0 means 64.
	Batch int

	// Count ends the run after that many packets, of all groups together; 0 means no end.
	Count uint64
	// Duration ends the run after that time; 0 means no end.
	Duration time.Duration
	// Idle ends the run if no packet was received for that time after the last one. It does not end
	// a run that has received nothing. 0 means no end.
	Idle time.Duration
}

const (
	// DefaultWindow is the default of RecvConfig.Window.
	DefaultWindow = 65536
	// DefaultSocketBuffer is the default of RecvConfig.SocketBuffer, in bytes.
	DefaultSocketBuffer = 32 << 20

	defaultRecvBatch = 64

	// maxDatagram has room for the largest UDP datagram of either family.
	maxDatagram = 65536
	// lastLook limits how long a run that is ending reads what is already queued in its sockets.
	lastLook = 200 * time.Millisecond
)

// Receiver receives and accounts for numbered packets. Run may be called on any goroutine, once;
// Report and Interval may be called at any time from any goroutine.
type Receiver struct {
	cfg    RecvConfig
	msgs   *mmsgs
	epoll  int
	wake   int // eventfd that ends the wait of Run
	ran    bool
	ready  []unix.EpollEvent
	buffer int // granted receive buffer, bytes

	mu       sync.Mutex // guards what follows
	groups   []*group
	closed   bool
	started  time.Time
	finished time.Duration // 0 while running
	received uint64
	heard    time.Time // of the latest packet

	interval struct {
		latency  Histogram
		since    time.Time
		received uint64
		bytes    uint64
	}
}

// NewReceiver checks the configuration, opens a socket for each group in the network namespace of
// the calling thread, and joins. Run receives everything that arrives from then on. The caller must
// Close the receiver. The error for a missing interface matches ErrNoInterface.
func NewReceiver(cfg RecvConfig) (_ *Receiver, err error) {
	cfg.setDefaults()
	subs, err := cfg.expand()
	if err != nil {
		return nil, err
	}
	r := &Receiver{
		cfg:   cfg,
		msgs:  newMmsgs(cfg.Batch, maxDatagram),
		ready: make([]unix.EpollEvent, 64),
		epoll: -1,
		wake:  -1,
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	if r.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	if r.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	if err := r.watch(r.wake, -1); err != nil {
		return nil, err
	}
	for _, sub := range subs {
		if err := r.add(sub); err != nil {
			return nil, fmt.Errorf("receive %s: %w", sub, err)
		}
	}
	return r, nil
}

func (c *RecvConfig) setDefaults() {
	if c.Groups == 0 {
		c.Groups = 1
	}
	if c.Window == 0 {
		c.Window = DefaultWindow
	}
	if c.SocketBuffer == 0 {
		c.SocketBuffer = DefaultSocketBuffer
	}
	if c.Batch == 0 {
		c.Batch = defaultRecvBatch
	}
}

func (c *RecvConfig) check() error {
	if err := checkWindow(c.Window); err != nil {
		return err
	}
	switch {
	case len(c.Subscriptions) == 0:
		return errors.New("no endpoint: must be at least one")
	case c.SocketBuffer < 0 || c.SocketBuffer > math.MaxInt32/2:
		return fmt.Errorf("socket buffer %d: must be 1 to %d bytes", c.SocketBuffer, math.MaxInt32/2)
	case c.Batch < 1 || c.Batch > maxBatch:
		return fmt.Errorf("batch %d: must be 1 to %d packets", c.Batch, maxBatch)
	case c.Duration < 0:
		return fmt.Errorf("duration %s: must not be negative", c.Duration)
	case c.Late < 0:
		return fmt.Errorf("late %s: must not be negative", c.Late)
	case c.Idle < 0:
		return fmt.Errorf("idle %s: must not be negative", c.Idle)
	case c.Expected.DSCP != nil && *c.Expected.DSCP > 63:
		return fmt.Errorf("expected dscp %d: must be 0 to 63", *c.Expected.DSCP)
	}
	return nil
}

// Check validates the configuration without accessing this host. NewReceiver does it too.
func (c RecvConfig) Check() error {
	c.setDefaults()
	_, err := c.expand()
	return err
}

// expand checks the configuration and returns a subscription for each group, without duplicates.
func (c *RecvConfig) expand() ([]Subscription, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	var subs []Subscription
	seen := make(map[Subscription]bool)
	for _, s := range c.Subscriptions {
		if !s.Addr.Addr().IsValid() || s.Addr.Port() == 0 {
			return nil, fmt.Errorf("endpoint %s: must have an address and a port", s)
		}
		if err := s.check(); err != nil {
			return nil, err
		}
		targets, err := s.expand(c.Groups)
		if err != nil {
			return nil, err
		}
		for _, t := range targets {
			sub := Subscription{Source: s.Source, Target: t}
			if seen[sub] {
				return nil, fmt.Errorf("endpoint %s: given twice", sub)
			}
			seen[sub] = true
			subs = append(subs, sub)
		}
	}
	if len(subs) > maxGroups {
		return nil, fmt.Errorf("%d endpoints: must be up to %d", len(subs), maxGroups)
	}
	return subs, nil
}

// add opens the socket of one subscription. Each has its own, bound to its group and port: the
// stack then sorts the packets, the limit on memberships a socket (igmp_max_memberships) does not
// matter, and drops are counted by group.
func (r *Receiver) add(sub Subscription) error {
	fd, ifindex, err := openUDP(sub.Addr.Addr(), sub.Interface)
	if err != nil {
		return err
	}
	g := &group{
		sub:       sub,
		fd:        fd,
		window:    r.cfg.Window,
		fromStart: r.cfg.FromStart,
		expected:  r.cfg.Expected,
		numbering: r.cfg.Numbering,
		late:      int64(r.cfg.Late),
		flows:     make(map[flowKey]*flow),
	}
	r.groups = append(r.groups, g) // from here on Close closes it
	if err := setOptions(fd, recvOptions(sub)); err != nil {
		return err
	}
	if r.buffer, err = setBuffer(fd, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, r.cfg.SocketBuffer); err != nil {
		return err
	}
	if err := unix.Bind(fd, sockaddr(sub.Addr, ifindex)); err != nil {
		if errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("bind: %w: must be multicast or an address of this host", err)
		}
		return fmt.Errorf("bind: %w", err)
	}
	// Watched first: there are no packets before the join.
	if err := r.watch(fd, len(r.groups)-1); err != nil {
		return err
	}
	if !sub.Addr.Addr().IsMulticast() {
		return nil
	}
	return join(fd, sub, ifindex)
}

func recvOptions(sub Subscription) []option {
	o := []option{{"SO_TIMESTAMPNS", unix.SOL_SOCKET, unix.SO_TIMESTAMPNS_NEW, 1}}
	multicast := sub.Addr.Addr().IsMulticast()
	if multicast {
		// Others may listen to the same group. A unicast port has one owner: the option would take
		// packets away from another program.
		o = append(o, option{"SO_REUSEADDR", unix.SOL_SOCKET, unix.SO_REUSEADDR, 1})
	}
	// *_MULTICAST_ALL = 0: only what this very socket joined, from the sources it joined, not what
	// others on this host did.
	if sub.Addr.Addr().Is4() {
		o = append(o,
			option{"IP_RECVTTL", unix.IPPROTO_IP, unix.IP_RECVTTL, 1},
			option{"IP_RECVTOS", unix.IPPROTO_IP, unix.IP_RECVTOS, 1})
		if multicast {
			o = append(o, option{"IP_MULTICAST_ALL", unix.IPPROTO_IP, unix.IP_MULTICAST_ALL, 0})
		}
		return o
	}
	o = append(o,
		option{"IPV6_V6ONLY", unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1},
		option{"IPV6_RECVHOPLIMIT", unix.IPPROTO_IPV6, unix.IPV6_RECVHOPLIMIT, 1},
		option{"IPV6_RECVTCLASS", unix.IPPROTO_IPV6, unix.IPV6_RECVTCLASS, 1})
	if multicast {
		o = append(o, option{"IPV6_MULTICAST_ALL", unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_ALL, 0})
	}
	return o
}

// watch adds a descriptor to the epoll set, reported as index.
func (r *Receiver) watch(fd, index int) error {
	// The kernel returns the Fd field unchanged.
	event := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(index)}
	if err := unix.EpollCtl(r.epoll, unix.EPOLL_CTL_ADD, fd, &event); err != nil {
		return fmt.Errorf("epoll add: %w", err)
	}
	return nil
}

// Close leaves all groups and closes the sockets; Report still works. It must not be called while
// Run is running.
func (r *Receiver) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil
	}
	var errs []error
	for _, g := range r.groups {
		errs = append(errs, g.pollDrops(), unix.Close(g.fd))
	}
	for _, fd := range []int{r.wake, r.epoll} {
		if fd >= 0 {
			errs = append(errs, unix.Close(fd))
		}
	}
	r.closed = true
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close receiver: %w", err)
	}
	return nil
}

// Run receives until the count, the duration or the idle time is reached or ctx is done; each of
// these is a normal end, without an error. Except after the count it then reads what is already
// queued in the sockets.
func (r *Receiver) Run(ctx context.Context) error {
	if r.ran {
		return fmt.Errorf("receiver: %w", ErrRunTwice)
	}
	r.ran = true
	r.mu.Lock()
	r.started = time.Now()
	r.mu.Unlock()
	defer r.finish()

	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(woken)
		// A number that is not 0 in either byte order. It cannot fail: the counter is far from
		// full.
		_, _ = unix.Write(r.wake, []byte{1, 0, 0, 0, 0, 0, 0, 1})
	})
	defer func() {
		if !stop() {
			<-woken // the eventfd may be closed only after it
		}
	}()
	for ctx.Err() == nil {
		timeout, expired := r.timeout()
		if expired {
			break
		}
		done, err := r.wait(timeout)
		if done || err != nil {
			return err
		}
	}
	return r.drain()
}

// timeout returns how long Run may wait, in milliseconds, -1 forever, or that its time is over.
func (r *Receiver) timeout() (ms int, expired bool) {
	left := time.Duration(math.MaxInt64)
	if r.cfg.Duration > 0 {
		left = r.cfg.Duration - time.Since(r.started)
	}
	if r.cfg.Idle > 0 && !r.heard.IsZero() {
		left = min(left, r.cfg.Idle-time.Since(r.heard))
	}
	switch {
	case left <= 0:
		return 0, true
	case left == math.MaxInt64:
		return -1, false
	}
	return int(min(left/time.Millisecond, math.MaxInt32-1)) + 1, false
}

// wait waits for datagrams and reads one batch from each socket that has some. It returns whether
// the count was reached.
func (r *Receiver) wait(ms int) (done bool, err error) {
	n, err := unix.EpollWait(r.epoll, r.ready, ms)
	if err != nil && !errors.Is(err, unix.EINTR) {
		return false, fmt.Errorf("epoll wait: %w", err)
	}
	for i := range max(n, 0) {
		index := r.ready[i].Fd
		if index < 0 {
			continue // woken by ctx, which Run checks
		}
		if _, done, err := r.read(r.groups[index]); done || err != nil {
			return done, err
		}
	}
	return false, nil
}

// drain reads what is queued in the sockets. A sender that keeps sending cannot prolong it beyond
// lastLook.
func (r *Receiver) drain() error {
	deadline := time.Now().Add(lastLook)
	for _, g := range r.groups {
		for {
			n, done, err := r.read(g)
			if done || err != nil {
				return err
			}
			if n == 0 {
				break
			}
			if time.Now().After(deadline) {
				return nil
			}
		}
	}
	return nil
}

// read reads a batch from a group's socket and accounts for it. It returns how many datagrams there
// were and whether the count was reached.
func (r *Receiver) read(g *group) (n int, done bool, err error) {
	n, errno := r.msgs.receive(g.fd)
	switch errno {
	case 0:
	case unix.EAGAIN, unix.EINTR:
		return 0, false, nil
	default:
		return 0, false, fmt.Errorf("receive %s: %w", g.sub, errno)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	before := r.received
	for i := range n {
		if r.account(g, i); r.cfg.Count > 0 && r.received >= r.cfg.Count {
			done = true
			break
		}
	}
	if r.received != before {
		r.heard = time.Now()
	}
	return n, done, nil
}

// account accounts for message i of the batch.
func (r *Receiver) account(g *group, i int) {
	fields, arrival := r.msgs.fields(i)
	payload := r.msgs.payload(i, min(int(r.msgs.hdrs[i].n), maxDatagram))
	latency, timed, received := g.handle(payload, fields, arrival)
	if received {
		r.received++
	}
	if timed {
		r.interval.latency.Record(latency)
	}
}

func (r *Receiver) finish() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.finished = max(time.Since(r.started), 1)
}

// Report returns the results so far. Packets missing at the end, compared with the expected number,
// count once Run has returned.
func (r *Receiver) Report() RecvReport {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pollDrops()
	rep := RecvReport{
		Finished:          r.finished > 0,
		ElapsedNS:         int64(r.elapsed()),
		SocketBufferBytes: r.buffer,
		Groups:            make([]GroupReport, 0, len(r.groups)),
	}
	var all Histogram
	var first, last int64
	for _, g := range r.groups {
		gr := g.report(r.expect())
		rep.Groups = append(rep.Groups, gr)
		rep.Total.Add(gr.Counters)
		all.Merge(&g.latency)
		if g.firstAt != 0 && (first == 0 || g.firstAt < first) {
			first = g.firstAt
		}
		last = max(last, g.lastAt)
	}
	rep.Latency = all.Latency()
	rep.SpanNS = last - first
	if rep.SpanNS > 0 && rep.Total.Received > 1 {
		// n packets span n-1 intervals.
		n := float64(rep.Total.Received)
		rep.PacketsPerSecond = (n - 1) / float64(rep.SpanNS) * 1e9
		rep.BitsPerSecond = rep.PacketsPerSecond * float64(rep.Total.Bytes*8) / n
	}
	return rep
}

// Interval reports the time since the previous Interval, or since Run began.
func (r *Receiver) Interval() IntervalReport {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pollDrops()
	var total Counters
	for _, g := range r.groups {
		total.Add(g.counters(r.expect()))
	}
	now, last := time.Now(), &r.interval
	if last.since.IsZero() {
		last.since = r.started
	}
	rep := IntervalReport{
		ElapsedNS: int64(r.elapsed()),
		Received:  total.Received - last.received,
		Latency:   last.latency.Latency(),
		Total:     total,
	}
	if !last.since.IsZero() {
		rep.IntervalNS = int64(now.Sub(last.since))
		last.since = now
	}
	if seconds := float64(rep.IntervalNS) / 1e9; seconds > 0 {
		rep.PacketsPerSecond = float64(rep.Received) / seconds
		rep.BitsPerSecond = float64(total.Bytes-last.bytes) * 8 / seconds
	}
	last.latency = Histogram{}
	last.received, last.bytes = total.Received, total.Bytes
	return rep
}

// expect is the number of packets that a group must have by now: before the end none can be missing
// at the end.
func (r *Receiver) expect() uint64 {
	if r.finished == 0 {
		return 0
	}
	return r.cfg.Expect
}

func (r *Receiver) elapsed() time.Duration {
	switch {
	case r.finished > 0:
		return r.finished
	case r.started.IsZero():
		return 0
	}
	return time.Since(r.started)
}

func (r *Receiver) pollDrops() {
	if r.closed {
		return
	}
	for _, g := range r.groups {
		// It cannot fail on an open socket.
		_ = g.pollDrops()
	}
}
