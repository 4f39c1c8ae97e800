package traffic

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"xdpcast/pkg/rules"
)

// ErrRunTwice is returned by the second Run of a Sender or Receiver.
var ErrRunTwice = errors.New("already run")

// SendConfig configures a Sender.
type SendConfig struct {
	// Target is the first group, or the unicast address. It is not used with Legs.
	Target Target
	// Legs are several paths for the same packets; nil is a single path to Target.
	Legs []Leg
	// Seed determines which packets the legs drop or reorder, and the first RTP number.
	Seed uint64
	// Repairable keeps each packet on at least one leg.
	Repairable bool
	// Numbering adds a number before our own header, for other receivers.
	Numbering Numbering
	// Groups is the number of consecutive group addresses that get packets in turn; 0 means 1.
	Groups int
	// Rate is for all groups together; the zero value is as fast as possible.
	Rate Rate
	// Size is the UDP payload in bytes, from HeaderLen plus the Numbering's header to MaxPayload; 0
	// means the smallest.
	Size int
	// Count ends the run after that many packets, of all groups together; 0 means no end.
	Count uint64
	// Duration ends the run after that time; 0 means no end.
	Duration time.Duration
	// TTL is the IPv4 TTL or IPv6 hop limit; 0 leaves the kernel's default,
	// which is 1 for multicast (RFC 1112, section 6.1).
	TTL uint8
	// DSCP is the differentiated services code point, 0 to 63.
	DSCP uint8
	// Source is the address to send from; the zero value lets the kernel choose.
	Source netip.Addr
	// SourcePort is the port to send from; 0 lets the kernel choose.
	SourcePort uint16
	// Batch is the maximum number of packets per system call, up to 1024; 0 means 64.
	Batch int
	// MaxLag is how much of its schedule a delayed sender catches up on; 0 means a second. It
	// catches up as fast as possible.
	MaxLag time.Duration
	// Burst is the number of packets that are sent together at a Rate, and waited for together; 0 means 1.
	Burst int
}

const (
	defaultSendBatch = 64
	maxBatch         = 1024

	sendBuffer = 4 << 20

	// lastPackets is how much longer than its duration a paced run may take to send the packets due
	// within it.
	lastPackets = 100 * time.Millisecond
	// patience is how long the network may refuse every packet before the run ends.
	patience = 3 * time.Second
	// fullNap is the wait for room in a full buffer. Waiting for the socket to become writable does
	// not work: a full device queue does not show there, and a pending ICMP error makes the wait
	// return at once.
	fullNap = 50 * time.Microsecond
	// errorNap is the wait after the network refused a packet.
	errorNap = time.Millisecond
)

// Sender sends numbered packets. Run may be called on any goroutine, once; Report may be called at
// any time from any goroutine.
type Sender struct {
	cfg    SendConfig
	legs   []*leg
	stream uint64
	first  uint64  // the number of packet 0
	stamps []int64 // with legs: when packets were first sent, as a ring
	pacer  pacer
	limit  uint64 // packets
	ran    bool   // used only by Run and Close

	mu       sync.Mutex // guards what follows
	started  time.Time
	taken    uint64        // with legs: packets decided on
	onNone   uint64        // packets that all legs dropped
	elapsed  time.Duration // to the latest sent packet
	full     uint64
	refused  uint64
	behind   time.Duration
	finished time.Duration // 0 while running
}

// NewSender checks the configuration and opens the sockets in the network
// namespace of the calling thread. The caller must Close the sender.
func NewSender(cfg SendConfig) (*Sender, error) {
	cfg.setDefaults()
	legs, err := cfg.expand()
	if err != nil {
		return nil, err
	}
	s := &Sender{
		cfg:    cfg,
		stream: newStreamID(),
		first:  cfg.firstNumber(),
		stamps: cfg.stampsFor(),
		pacer:  pacer{perSecond: cfg.Rate.packets(cfg.Size), maxLag: cfg.MaxLag},
		limit:  math.MaxUint64,
	}
	if cfg.Count > 0 {
		s.limit = cfg.Count
	}
	if cfg.Duration > 0 {
		if n, ok := s.pacer.until(cfg.Duration); ok {
			s.limit = min(s.limit, n)
		}
	}
	for _, l := range legs {
		if err := s.open(l); err != nil {
			return nil, errors.Join(fmt.Errorf("send to %s: %w", l.Target, err), s.Close())
		}
		s.legs = append(s.legs, l)
	}
	return s, nil
}

// firstNumber is the number of packet 0: a random one with RTP (RFC 3550 section 5.1), 1 with
// others, as at exchanges.
func (c *SendConfig) firstNumber() uint64 {
	if f := c.Numbering.merge.Format; f == rules.MergeRTP || f == rules.MergeRFC4175 {
		return uint64(draw(c.Seed, 0, 0, 0) * (1 << 16))
	}
	return 1
}

// Send makes a sender in the network namespace of the calling thread, runs it and closes it. The
// report is valid even with an error.
func Send(ctx context.Context, cfg SendConfig) (SendReport, error) {
	s, err := NewSender(cfg)
	if err != nil {
		return SendReport{}, err
	}
	err = s.Run(ctx)
	return s.Report(), errors.Join(err, s.Close())
}

func newStreamID() uint64 {
	var b [8]byte
	rand.Read(b[:]) // never fails (crypto/rand)
	return binary.BigEndian.Uint64(b[:])
}

// Check validates the configuration without accessing this host. NewSender does it too.
func (c SendConfig) Check() error {
	c.setDefaults()
	_, err := c.expand()
	return err
}

func (c *SendConfig) setDefaults() {
	if c.Groups == 0 {
		c.Groups = 1
	}
	if c.Size == 0 {
		c.Size = c.minSize()
	}
	if c.MaxLag == 0 {
		c.MaxLag = defaultMaxLag
	}
	if c.Batch == 0 {
		c.Batch = defaultSendBatch
	}
	if c.Burst == 0 {
		c.Burst = 1
	}
}

func (c *SendConfig) minSize() int { return HeaderLen + c.Numbering.headerLen() }

// expand checks the configuration and returns the legs, with a target for each group.
func (c *SendConfig) expand() ([]*leg, error) {
	switch {
	case c.Size < c.minSize() || c.Size > MaxPayload:
		return nil, fmt.Errorf("size %d: must be %d to %d bytes of UDP payload", c.Size, c.minSize(), MaxPayload)
	case c.MaxLag < 0:
		return nil, fmt.Errorf("lag of %v: must not be negative", c.MaxLag)
	case c.Batch < 1 || c.Batch > maxBatch:
		return nil, fmt.Errorf("batch %d: must be 1 to %d packets", c.Batch, maxBatch)
	case c.Burst < 0 || c.Burst > maxBatch:
		return nil, fmt.Errorf("burst %d: must be 1 to %d packets", c.Burst, maxBatch)
	case c.DSCP > 63:
		return nil, fmt.Errorf("dscp %d: must be 0 to 63", c.DSCP)
	case c.Duration < 0:
		return nil, fmt.Errorf("duration %s: must not be negative", c.Duration)
	case c.Rate.Value < 0 || c.Rate.Value > maxRate || math.IsNaN(c.Rate.Value):
		return nil, fmt.Errorf("rate %g: must be 0 to %g", c.Rate.Value, float64(maxRate))
	}
	if err := c.checkLegs(); err != nil {
		return nil, err
	}
	ways := c.Legs
	if ways == nil {
		ways = []Leg{{Target: c.Target}}
	}
	var legs []*leg
	for i, way := range ways {
		addr := way.Addr.Addr()
		switch {
		case !addr.IsValid() || way.Addr.Port() == 0:
			return nil, fmt.Errorf("target %s: must have an address and a port", way.Target)
		case c.Source.IsValid() && c.Source.Is4() != addr.Is4():
			return nil, fmt.Errorf("source %s and target %s: must be of one family", c.Source, addr)
		}
		targets, err := way.expand(c.Groups)
		if err != nil {
			return nil, err
		}
		legs = append(legs, &leg{Leg: way, number: i, fd: -1, targets: targets})
	}
	return legs, nil
}

func (s *Sender) open(l *leg) (err error) {
	addr := l.Addr.Addr()
	fd, ifindex, err := openUDP(addr, l.Interface)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if err := setOptions(fd, s.options(addr)); err != nil {
		return err
	}
	if _, err := setBuffer(fd, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, sendBuffer); err != nil {
		return err
	}
	if s.cfg.Legs != nil { // with one source port, if given
		if err := setOptions(fd, []option{{"SO_REUSEADDR", unix.SOL_SOCKET, unix.SO_REUSEADDR, 1}}); err != nil {
			return err
		}
	}
	if err := s.bind(fd, addr, ifindex); err != nil {
		return err
	}
	l.msgs = newMmsgs(s.cfg.Batch, s.cfg.Size)
	l.queue = make([]uint64, 0, s.cfg.Batch)
	l.addressMessages(ifindex)
	l.fd = fd
	return nil
}

// options returns the socket options. With IP_RECVERR a packet refused by a full device queue is an
// error, ENOBUFS; without it the kernel reports success (net/ipv4/udp.c, udp_send_skb).
func (s *Sender) options(addr netip.Addr) []option {
	var ttl, tos = int(s.cfg.TTL), int(s.cfg.DSCP) << 2
	multicast := addr.IsMulticast()
	if addr.Is4() {
		o := []option{{"IP_RECVERR", unix.IPPROTO_IP, unix.IP_RECVERR, 1}, {"IP_TOS", unix.IPPROTO_IP, unix.IP_TOS, tos}}
		switch {
		case ttl == 0:
			return o
		case multicast:
			return append(o, option{"IP_MULTICAST_TTL", unix.IPPROTO_IP, unix.IP_MULTICAST_TTL, ttl})
		}
		return append(o, option{"IP_TTL", unix.IPPROTO_IP, unix.IP_TTL, ttl})
	}
	o := []option{{"IPV6_RECVERR", unix.IPPROTO_IPV6, unix.IPV6_RECVERR, 1}, {"IPV6_TCLASS", unix.IPPROTO_IPV6, unix.IPV6_TCLASS, tos}}
	switch {
	case ttl == 0:
		return o
	case multicast:
		return append(o, option{"IPV6_MULTICAST_HOPS", unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS, ttl})
	}
	return append(o, option{"IPV6_UNICAST_HOPS", unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, ttl})
}

func (s *Sender) bind(fd int, addr netip.Addr, ifindex uint32) error {
	source := s.cfg.Source
	if !source.IsValid() {
		if s.cfg.SourcePort == 0 {
			return nil
		}
		source = netip.IPv4Unspecified()
		if addr.Is6() {
			source = netip.IPv6Unspecified()
		}
	}
	from := netip.AddrPortFrom(source, s.cfg.SourcePort)
	if err := unix.Bind(fd, sockaddr(from, ifindex)); err != nil {
		if errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("bind to source %s: %w: must be an address of this host", from, err)
		}
		return fmt.Errorf("bind to source %s: %w", from, err)
	}
	return nil
}

// addressMessages prepares the destinations from which prepare chooses.
func (l *leg) addressMessages(ifindex uint32) {
	l.names = make([]unix.RawSockaddrInet6, len(l.targets))
	var size uint32
	for i, t := range l.targets {
		l.names[i], size = rawSockaddr(t.Addr, ifindex)
	}
	for i := range l.msgs.hdrs {
		l.msgs.hdrs[i].hdr.Namelen = size
	}
}

// Close closes the sockets. It must not be called while Run is running.
func (s *Sender) Close() error {
	var errs []error
	for _, l := range s.legs {
		if l.fd >= 0 {
			errs = append(errs, unix.Close(l.fd))
		}
		l.fd = -1
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close sender: %w", err)
	}
	return nil
}

// Run sends until the count or the duration is reached or ctx is done; each of these is a normal
// end, without an error. With legs, it continues until all of them have sent the same packets. It
// returns an error if the kernel permanently refuses to send.
func (s *Sender) Run(ctx context.Context) error {
	if s.ran {
		return fmt.Errorf("sender: %w", ErrRunTwice)
	}
	s.ran = true
	timer := time.NewTimer(0)
	defer timer.Stop()
	s.mu.Lock()
	s.started = time.Now()
	s.mu.Unlock()
	defer s.finish()

	end := s.end()
	for {
		elapsed := time.Since(s.started)
		if err := ctx.Err(); err != nil {
			if s.cfg.Legs == nil {
				return nil
			}
			ctx = context.WithoutCancel(ctx)
			s.limit, end = min(s.limit, s.taken), min(end, elapsed+s.cfg.maxDelay()+lastPackets)
		}
		if s.done() {
			return nil
		}
		if elapsed >= end {
			// Without a rate the legs are not far apart.
			if s.cfg.Legs == nil || s.limit == s.taken {
				return nil
			}
			s.limit, end = s.taken, elapsed+lastPackets
		}
		worked, err := s.turn(elapsed)
		if err != nil {
			return err
		}
		if !worked && !s.done() {
			waitUntil(ctx, timer, s.started.Add(s.soonest()))
		}
	}
}

// end is when a run is over, regardless of what was sent.
func (s *Sender) end() time.Duration {
	switch {
	case s.cfg.Duration == 0:
		return math.MaxInt64
	case s.pacer.perSecond > 0:
		return s.cfg.Duration + s.cfg.maxDelay() + lastPackets
	}
	return s.cfg.Duration
}

// turn sends a batch on each leg with due packets.
func (s *Sender) turn(elapsed time.Duration) (worked bool, err error) {
	for _, l := range s.legs {
		s.pacer.limitLag(l.next, elapsed-l.Delay)
		s.mu.Lock()
		s.take(l, s.due(l, elapsed))
		s.mu.Unlock()
		n := len(l.queue)
		if n == 0 {
			continue
		}
		worked = true
		s.prepare(l, n)
		n, errno := l.msgs.send(l.fd, n)
		s.record(l, n, errno)
		if err := l.trouble.handle(errno); err != nil {
			return true, fmt.Errorf("send to %s: %w", l.Target, err)
		}
	}
	return worked, nil
}

// soonest is when the next packet, or the last one of the next burst, is due on some leg.
func (s *Sender) soonest() time.Duration {
	at := time.Duration(math.MaxInt64)
	for _, l := range s.legs {
		if l.next < s.limit {
			last := min(l.next+uint64(s.cfg.Burst), s.limit) - 1
			at = min(at, max(s.pacer.at(last)+l.Delay, time.Since(s.started)+l.wait))
			l.wait = 0
		}
	}
	return at
}

func (s *Sender) done() bool {
	for _, l := range s.legs {
		if l.next < s.limit || !l.idle() {
			return false
		}
	}
	return true
}

// prepare encodes the first n packets of a leg's queue. A packet's flow and number follow from its
// index, so packets that the kernel did not take are simply prepared again; without legs, with the
// time of the new attempt.
func (s *Sender) prepare(l *leg, n int) {
	now := time.Now().UnixNano()
	groups := uint64(len(l.targets))
	for i, index := range l.queue[:n] {
		seq, flow := index/groups, index%groups
		if s.stamps != nil {
			now = s.stamps[index&uint64(len(s.stamps)-1)]
		}
		s.cfg.Numbering.put(l.msgs.payload(i, s.cfg.Size), Header{Stream: s.stream, Seq: seq, SentAt: now, Flow: uint32(flow)}, s.first)
		l.msgs.hdrs[i].hdr.Name = (*byte)(unsafe.Pointer(&l.names[flow]))
	}
}

func (s *Sender) record(l *leg, n int, errno unix.Errno) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l.queue = l.queue[:copy(l.queue, l.queue[n:])]
	l.sent += uint64(n)
	if n > 0 {
		s.elapsed = time.Since(s.started)
	}
	s.behind = s.pacer.shift
	switch kindOf(errno) {
	case bufferFull:
		s.full++
	case networkRefused:
		s.refused++
	}
}

func (s *Sender) finish() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.finished = max(time.Since(s.started), 1)
}

// Report returns what has been sent so far.
func (s *Sender) Report() SendReport {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := SendReport{
		Target:        s.cfg.Target.String(),
		Groups:        s.cfg.Groups,
		Stream:        streamName(s.stream),
		SizeBytes:     s.cfg.Size,
		Numbers:       s.cfg.Numbering.String(),
		Packets:       s.taken,
		OnNoLeg:       s.onNone,
		BufferFull:    s.full,
		NetworkErrors: s.refused,
		BehindNS:      int64(s.behind),
	}
	for _, l := range s.legs {
		r.Bytes += l.sent * uint64(s.cfg.Size)
		if s.cfg.Legs == nil {
			r.Packets = l.sent
			continue
		}
		r.Legs = append(r.Legs, LegReport{l.Target.String(), l.sent, l.out, l.moved})
	}
	if s.cfg.Legs != nil {
		r.Target = s.cfg.Legs[0].String()
	}
	switch {
	case s.finished > 0:
		r.ElapsedNS = int64(s.finished)
	case !s.started.IsZero():
		r.ElapsedNS = int64(time.Since(s.started))
	}
	// The first packet is sent at time 0, so n packets span n-1 intervals.
	if r.Packets > 1 && s.elapsed > 0 {
		r.PacketsPerSecond = float64(r.Packets-1) / s.elapsed.Seconds()
		r.BitsPerSecond = r.PacketsPerSecond * float64(s.cfg.Size*8)
	}
	return r
}

func streamName(id uint64) string { return fmt.Sprintf("%016x", id) }

// errorKind classifies errors of sendmmsg.
type errorKind uint8

const (
	noError errorKind = iota
	bufferFull
	networkRefused
	fatal
)

func kindOf(errno unix.Errno) errorKind {
	switch errno {
	case 0, unix.EINTR:
		return noError
	case unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM:
		return bufferFull
	// Usually these report an ICMP error about an earlier packet, or a link that is temporarily
	// down. EPERM is a packet filter's verdict.
	case unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.ENETDOWN, unix.EHOSTDOWN,
		unix.ENOPROTOOPT, unix.EPROTO, unix.EOPNOTSUPP, unix.EMSGSIZE, unix.EACCES, unix.EPERM:
		return networkRefused
	}
	return fatal
}

// troubles tracks since when nothing could be sent.
type troubles struct {
	since time.Time
}

// handle waits as appropriate for an error of a send, and returns an error if retrying is futile.
func (t *troubles) handle(errno unix.Errno) error {
	switch kindOf(errno) {
	case noError:
		t.since = time.Time{}
	case bufferFull:
		nap(fullNap)
	case networkRefused:
		if t.since.IsZero() {
			t.since = time.Now()
			return nil
		}
		if time.Since(t.since) > patience {
			return fmt.Errorf("%w, for %s without a break", errno, patience)
		}
		nap(errorNap)
	case fatal:
		return errno
	}
	return nil
}

// nap blocks the thread for a short time. The runtime's own timers may be a millisecond late, the
// time of thousands of packets.
func nap(d time.Duration) {
	ts := unix.NsecToTimespec(int64(d))
	// Waking early, by EINTR, is harmless.
	_ = unix.ClockNanosleep(unix.CLOCK_MONOTONIC, 0, &ts, nil)
}

// waitUntil returns at the deadline, when ctx is done, or earlier: the caller checks again. A long
// wait can be interrupted; only its end is a nap.
func waitUntil(ctx context.Context, timer *time.Timer, deadline time.Time) {
	const blockable = 5 * time.Millisecond
	left := time.Until(deadline)
	if left <= 0 {
		return
	}
	if left <= blockable {
		nap(left)
		return
	}
	timer.Reset(left - blockable/2)
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}
