package forward

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/bits"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/bpf"
	"xdpcast/internal/account"
	"xdpcast/pkg/fanout"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
	"xdpcast/pkg/xsk"
)

// Sockets is the part of package loader that the path needs; *loader.Loader is one.
type Sockets interface {
	// SetSocket directs a queue's packets to a socket, and ClearSocket undoes that.
	// They are called from any goroutine.
	SetSocket(index, queue, fd int) error
	ClearSocket(index, queue int) error
	// FirstOutput is the number by which the relay program identifies a rule. Sync and
	// Prepare call it.
	FirstOutput(rule string) (uint32, bool)
}

// AFXDPOptions configure an [AFXDP]. Only Loader is required.
type AFXDPOptions struct {
	Loader Sockets
	// Accounts is where packets are counted; nil: in memory, as long as the path lives.
	Accounts Accounts
	// Taps see packets; nil: no taps.
	Taps   *Taps
	Logger *slog.Logger // nil: logs nothing
	// Queues is the maximum number of receive queues of an interface; 0 means 16, or the
	// number of CPUs if there are more. There are counters for so many workers.
	Queues int
	// CPUs pins the worker of queue n to the CPU at index n, wrapping at the end; empty
	// pins none.
	CPUs []int
	// Mode and HugePages are those of xsk.UMEMOptions.
	Mode      xsk.Mode
	HugePages bool
	// Spin is how long a worker polls for more frames before it sleeps, on a CPU that
	// nothing else needs; 0 means not at all.
	Spin time.Duration
	// Frames is the number of frames of memory of each worker, of 2 or 4 kB; 0 means 8192.
	// Copies in flight use 2048 with one output, and up to half of them, rounded up, with more. Receiving uses
	// the rest, at most 32768.
	Frames int
	// Priority is the real-time priority (SCHED_FIFO) of the workers' threads, 1 to 99; see
	// [CheckPriority]. 0 leaves them to the default scheduler, and to Boost.
	Priority int
	// Boost gives the workers a real-time priority while they need little time, unless Priority does; nil: not.
	Boost *Boost
	// Place moves workers that are not pinned away from CPUs for which they wait.
	Place bool
	// BusyPoll, PreferBusyPoll and BusyPollBudget are those of xsk.Options.
	BusyPoll       time.Duration
	PreferBusyPoll bool
	BusyPollBudget int
	// Sender configures the packet sockets that are used where AF_XDP cannot send.
	Sender fanout.SenderOptions
	// TakeOver is called before the first queue is opened; it returns when the process from
	// which this one takes over has closed its queues. Nil: there is none.
	TakeOver func() error
	// Inherited are the sockets of that process ([AFXDP.HandOver]), nil for none; the path takes ownership.
	// If they are those that its inputs need, Suspend is called instead of TakeOver: it returns when
	// that process has suspended them ([AFXDP.Suspend]).
	Inherited *AFXDPHandover
	Suspend   func() error
	// Prepare calls a function that prepares to use the inherited sockets, while that process still forwards: on a
	// thread of low priority, for example. Nil: it is just called.
	Prepare func(do func())
	// CheckOwnership is that of xsk.UMEMOptions, for tests.
	CheckOwnership bool
	// oneFrame simulates a kernel without multi-buffer, for tests.
	oneFrame bool
}

// AFXDP is the AF_XDP path: one worker for each queue of each input interface of its
// rules. A worker is a goroutine with its own thread, memory, sockets and engine. The
// relay program has matched, counted, checked and policed the packets that arrive here.
// The methods may be called from any goroutine, but Open, Prepare, Sync and Close only
// from threads of one network namespace.
//
// # Changing rules
//
// A rule's packets arrive as soon as the loader has it, so this path must get it first:
//
//	path.Prepare(rules, own) // the new ones in addition to the old
//	loader.Sync(rules)
//	path.Sync(rules, own)    // the new ones alone
//
// # Outputs
//
// The kernel binds a queue of a device to one UMEM. A worker sends to an output through
// a socket on the transmit queue of its own number, or any free one; to its own input
// interface through its receiving socket; and through a packet socket if no queue is
// left because other workers send or receive there.
type AFXDP struct {
	opts AFXDPOptions
	log  *slog.Logger
	set  *Set
	// place is the function of that name; tests replace it.
	place func(*slog.Logger) *placement

	unregister func()

	mu      sync.Mutex
	closed  bool
	inputs  map[int]*afxdpInput
	names   map[int]string            // also of former inputs
	claimed map[queueKey]*afxdpSender // nil: a worker receives there
	// handed are the workers of the previous process whose sockets are about to be taken over.
	handed    map[queueKey]*handedWorker
	suspended bool // another process may use the sockets
}

type queueKey struct{ index, queue int }

// afxdpInput holds the workers of an input interface.
type afxdpInput struct {
	index   int
	name    string
	workers []*afxdpWorker // by queue; nil: none
	err     error          // why one is missing
	causes  []QueueError   // the same by queue, if it concerns one
}

// OpenAFXDP opens the path without rules. The caller must Close it.
func OpenAFXDP(opts AFXDPOptions) (*AFXDP, error) {
	if opts.Loader == nil {
		return nil, errors.New("open AF_XDP path: option Loader: must be there")
	}
	if opts.Queues == 0 {
		opts.Queues = min(max(16, runtime.NumCPU()), bpf.MaxQueues)
	}
	if opts.Frames == 0 {
		opts.Frames = defaultFrames
	}
	if err := opts.Validate(); err != nil {
		return nil, fmt.Errorf("open AF_XDP path: %w", err)
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	a := &AFXDP{
		opts: opts, log: opts.Logger, set: newSet(flow.PathAFXDP, opts.Queues, opts.Accounts, opts.Taps), place: place,
		inputs: map[int]*afxdpInput{}, names: map[int]string{}, claimed: map[queueKey]*afxdpSender{},
	}
	a.unregister = a.set.accounts.Account().OnSettle(a.settle)
	return a, nil
}

// Validate returns an *xsk.OptionError for an invalid option. A lack of huge pages shows
// only when a worker is opened.
func (o AFXDPOptions) Validate() error {
	switch {
	case o.Queues < 0 || o.Queues > bpf.MaxQueues:
		return &xsk.OptionError{Option: "Queues", Value: o.Queues, Want: fmt.Sprintf("1 to %d", bpf.MaxQueues)}
	case o.Priority < 0 || o.Priority > MaxPriority:
		return &xsk.OptionError{Option: "Priority", Value: o.Priority, Want: fmt.Sprintf("0 to %d", MaxPriority)}
	case o.Frames != 0 && (o.Frames < minFrames || o.Frames > maxFrames):
		return &xsk.OptionError{Option: "Frames", Value: o.Frames, Want: fmt.Sprintf("%d to %d", minFrames, maxFrames)}
	}
	var allowed unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		return fmt.Errorf("read the CPUs of the process: %w", err)
	}
	for _, cpu := range o.CPUs {
		if cpu < 0 || !allowed.IsSet(cpu) {
			return &xsk.OptionError{Option: "CPUs", Value: cpu, Want: "numbers of CPUs that the process may use"}
		}
	}
	return xsk.Options{BusyPoll: o.BusyPoll, PreferBusyPoll: o.PreferBusyPoll, BusyPollBudget: o.BusyPollBudget}.Validate()
}

// Prepare makes the path forward those of the rules whose path is loader.PathAFXDP, in
// addition to its present rules with other names. Otherwise it is like Sync.
func (a *AFXDP) Prepare(rules []flow.Flow, own []netip.Addr) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	want := slices.DeleteFunc(slices.Clone(rules), notAFXDP)
	names, inputs := map[string]bool{}, map[flow.Input]bool{}
	for _, r := range want {
		names[r.Name], inputs[r.In.Key()] = true, true
	}
	for _, r := range a.set.given.rules {
		if !names[r.Name] && !inputs[r.In.Key()] {
			want = append(want, r)
		}
	}
	return a.sync(want, own)
}

// Sync makes the path forward exactly those of the rules whose path is
// loader.PathAFXDP. It does not touch unchanged rules or their packets. own are the
// host's unicast addresses. Call it again, with the same rules, when interfaces have
// changed, and while [AFXDP.Pending]: it follows changes of queues, and reopens inputs
// and outputs that were down or gone.
//
// Failing to receive from an input, because it is gone or another socket has its queue,
// is not an error: Inputs reports it. On an error nothing changes. Errors to match:
// *loader.RuleError, os.ErrClosed.
func (a *AFXDP) Sync(rules []flow.Flow, own []netip.Addr) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.sync(slices.DeleteFunc(slices.Clone(rules), notAFXDP), own)
}

func notAFXDP(r flow.Flow) bool { return r.Path != flow.PathAFXDP }

func (a *AFXDP) sync(want []flow.Flow, own []netip.Addr) error {
	if a.closed {
		return fmt.Errorf("AF_XDP path: %w", os.ErrClosed)
	}
	inputs, numbers := map[int]bool{}, map[string]uint32{}
	for i := range want {
		if err := want[i].Normalized().Check(); err != nil {
			return &loader.RuleError{Rule: want[i].Name, Err: err}
		}
		inputs[want[i].In.Index] = true
		if first, ok := a.opts.Loader.FirstOutput(want[i].Name); ok {
			numbers[want[i].Name] = first
		}
	}
	if a.drops(want) {
		a.finish()
	}
	inherits := a.inherit(inputs)
	if take := a.opts.TakeOver; take != nil && len(inputs) > 0 && !inherits {
		a.opts.TakeOver = nil
		if err := take(); err != nil {
			a.log.Warn("take the queues over", "error", err)
		}
	}
	var fresh []*afxdpWorker
	var err error
	prepare := func() {
		// Before the rules, so that the engines of new workers get them immediately.
		fresh = a.openInputs(inputs)
		a.reviewSenders()
		err = a.set.Update(want, own, numbers)
	}
	if inherits && a.opts.Prepare != nil {
		a.opts.Prepare(prepare)
	} else {
		prepare()
	}
	if err != nil {
		for _, w := range fresh {
			err = errors.Join(err, a.closeWorker(w))
		}
		return err
	}
	// Packets wait from here until the workers run: nothing slow may happen between.
	asked := time.Now()
	if inherits {
		if err := a.resume(fresh); err != nil {
			a.disinherit(err)
			for _, w := range fresh {
				if err := a.closeWorker(w); err != nil {
					a.log.Warn("close worker", "interface", w.name, "queue", w.queue, "error", err)
				}
			}
			return a.sync(want, own)
		}
	}
	for _, w := range fresh {
		a.start(w)
	}
	if inherits {
		a.log.Info("AF_XDP sockets taken over", "workers", len(fresh), "packets_waited", time.Since(asked).Round(time.Microsecond))
	}
	for index, in := range a.inputs {
		if inputs[index] {
			continue
		}
		delete(a.inputs, index)
		a.retire(in.workers)
	}
	return nil
}

// drops says whether a current rule is not in want.
func (a *AFXDP) drops(want []flow.Flow) bool {
	stays := make(map[flow.Input]bool, len(want))
	for i := range want {
		stays[want[i].In.Key()] = true
	}
	return slices.ContainsFunc(a.set.given.rules, func(r flow.Flow) bool { return !stays[r.In.Key()] })
}

// membarrierGlobal is MEMBARRIER_CMD_GLOBAL of include/uapi/linux/membarrier.h.
const membarrierGlobal = 1

// awaitPrograms waits until every CPU that is running a BPF program has left it.
func awaitPrograms() { _, _, _ = unix.Syscall(unix.SYS_MEMBARRIER, membarrierGlobal, 0, 0) }

// finish forwards all packets that the relay program has redirected so far. It waits until
// every CPU running the program has left it (membarrier(2): MEMBARRIER_CMD_GLOBAL is an
// RCU grace period), so that none uses an old rule, and then empties the rings. Without
// membarrier in the kernel there is a gap of microseconds.
func (a *AFXDP) finish() {
	awaitPrograms()
	for _, in := range a.inputs {
		for _, w := range in.workers {
			if w != nil {
				w.finish()
			}
		}
	}
}

// settle forwards all packets redirected so far, and returns when they have been counted.
func (a *AFXDP) settle() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.finish()
}

// openInputs opens workers for queues without one, and closes those of queues or interfaces
// that no longer exist.
func (a *AFXDP) openInputs(inputs map[int]bool) (fresh []*afxdpWorker) {
	for _, index := range slices.Sorted(maps.Keys(inputs)) {
		in := a.inputs[index]
		if in == nil {
			in = &afxdpInput{index: index, name: interfaceName(index)}
			a.names[index] = in.name
			a.inputs[index] = in
		}
		before := in.err
		opened, err := a.openQueues(in)
		fresh = append(fresh, opened...)
		if in.err = err; err != nil && (before == nil || before.Error() != err.Error()) {
			a.log.Warn("input has queues without worker", "interface", in.name, "error", err)
		}
	}
	return fresh
}

func (a *AFXDP) openQueues(in *afxdpInput) (fresh []*afxdpWorker, err error) {
	before := in.causes
	in.causes = nil
	iface, err := net.InterfaceByIndex(in.index)
	if err != nil {
		a.retire(in.workers)
		in.workers = nil
		return nil, fmt.Errorf("open input %s: %w", in.name, unix.ENODEV)
	}
	queues, err := channelsOf(iface.Name)
	if err != nil {
		return nil, err
	}
	if queues.rx > a.opts.Queues {
		err = fmt.Errorf("interface %s has %d receive queues: want at most %d (option Queues)", in.name, queues.rx, a.opts.Queues)
		queues.rx = a.opts.Queues
	}
	if len(in.workers) > queues.rx {
		a.retire(in.workers[queues.rx:])
		in.workers = in.workers[:queues.rx]
	}
	for len(in.workers) < queues.rx {
		in.workers = append(in.workers, nil)
	}
	errs := []error{err}
	for q, w := range in.workers {
		if w != nil && w.interfaceC.Load() != interfaceGone && !errors.Is(w.socket.Check(), unix.ENXIO) && w.takes(iface.MTU) {
			continue
		}
		if w != nil {
			a.retire(in.workers[q : q+1])
		}
		tries := busyTries
		if slices.ContainsFunc(before, func(c QueueError) bool { return c.Queue == q && errors.Is(c.Err, unix.EBUSY) }) {
			tries = 1 // another process holds it: do not wait for that every time
		}
		w, err := a.openWorker(in, q, iface.MTU, tries)
		if err != nil {
			errs = append(errs, err)
			in.causes = append(in.causes, QueueError{Queue: q, Err: err})
		} else {
			fresh = append(fresh, w)
		}
		in.workers[q] = w
	}
	return fresh, errors.Join(errs...)
}

// takes says whether a worker can receive all packets of an MTU.
func (w *afxdpWorker) takes(mtu int) bool {
	return w.multiBuffer || frameSizeFor(mtu) <= w.umem.FrameSize()
}

// How often, and at which interval, to retry a queue that the kernel has not yet released
// after another socket was closed.
const (
	busyTries = 100
	busyPause = 5 * time.Millisecond
)

// openSocket opens a socket for a worker, with the options that the kernel and the
// process's capabilities allow. The worker continues to run between two tries.
func (w *afxdpWorker) openSocket(index, queue int, opts xsk.Options, tries int) (*xsk.Socket, error) {
	return tryOpen(func(opts xsk.Options) (*xsk.Socket, error) {
		w.mu.Lock()
		defer w.mu.Unlock()
		return xsk.Open(w.frames, index, queue, opts)
	}, opts, tries)
}

// tryOpen calls open until it succeeds or the queue was busy so many times. It drops
// refused options, which does not count as a try.
func tryOpen(open func(xsk.Options) (*xsk.Socket, error), opts xsk.Options, tries int) (*xsk.Socket, error) {
	for {
		s, err := open(opts)
		switch {
		case errors.Is(err, unix.ENOPROTOOPT) && opts.TXBudget != 0: // before Linux 6.17
			opts.TXBudget = 0
		case errors.Is(err, unix.EPERM) && opts.SendBuffer != 0: // without CAP_NET_ADMIN
			opts.SendBuffer = 0
		case errors.Is(err, unix.EBUSY) && tries > 1:
			tries--
			time.Sleep(busyPause)
		default:
			return s, err
		}
	}
}

// sendBuffer lets a driver hold a ring's worth of frames.
const sendBuffer = ringSize * 4096

func (a *AFXDP) openWorker(in *afxdpInput, queue, mtu, tries int) (_ *afxdpWorker, err error) {
	key := queueKey{in.index, queue}
	if s := a.claimed[key]; s != nil {
		if err := s.usePacket("a worker receives on the queue"); err != nil {
			return nil, err
		}
	}
	w := &afxdpWorker{
		path: a, index: in.index, queue: queue, cpu: -1, name: in.name, done: make(chan struct{}), current: -1,
		kept:  ringSize,
		descs: make([]xsk.Desc, receiveBatch), parts: make([]xsk.Desc, 0, receiveBatch),
		log: a.log.With("interface", in.name, "queue", queue),
	}
	if n := len(a.opts.CPUs); n > 0 {
		w.cpu = a.opts.CPUs[queue%n]
	}
	a.claimed[key] = nil
	defer func() {
		if err != nil {
			err = errors.Join(err, a.closeWorker(w))
		}
	}()
	if handed := a.handed[key]; handed != nil {
		err = w.inheritMemory(handed)
	} else {
		// Multi-buffer needs Linux 6.6.
		err = w.openMemory(a.opts, mtu, tries, !a.opts.oneFrame)
		if errors.Is(err, unix.EINVAL) && !a.opts.oneFrame {
			err = errors.Join(w.closeMemory(), w.openMemory(a.opts, mtu, tries, false))
		}
	}
	if err != nil {
		return nil, err
	}
	if !w.foreign {
		w.fill()
	}
	if w.waiter, err = xsk.NewWaiter(); err != nil {
		return nil, err
	}
	if err = w.waiter.Set(w.socket, xsk.Readable); err != nil {
		return nil, err
	}
	w.engine, err = a.set.NewEngine(in.index, queue, w.openSender)
	if err != nil {
		return nil, err
	}
	w.account = a.set.accounts.Account().Open(account.Target{Scope: account.Input, ID: uint32(in.index)})
	w.noFrame = w.account.Cell(w.engine.writer, account.NoFrame)
	w.ringFull = w.account.Cell(w.engine.writer, account.RingFull)
	w.ruleGone = w.account.Cell(w.engine.writer, account.RuleGone)
	return w, nil
}

// frameSizeFor returns the frame size that holds all packets of an MTU, with an Ethernet
// header and two tags; or the largest, of which longer packets use several.
func frameSizeFor(mtu int) int {
	if mtu+18+4 > 2048-2*unix.XDP_PACKET_HEADROOM {
		return 4096
	}
	return 2048
}

func (w *afxdpWorker) openMemory(opts AFXDPOptions, mtu, tries int, multiBuffer bool) (err error) {
	w.memory = xsk.UMEMOptions{
		Frames: opts.Frames, FrameSize: frameSizeFor(mtu), HugePages: opts.HugePages, Mode: opts.Mode,
		MultiBuffer: multiBuffer, Shared: true, CheckOwnership: opts.CheckOwnership,
	}
	if w.umem, err = xsk.NewUMEM(w.memory); err != nil {
		return err
	}
	if err := w.takeFrames(); err != nil {
		return err
	}
	w.socket, err = w.openSocket(w.index, w.queue, w.path.socketOptions(), tries)
	if err == nil {
		w.closesFirst()
	}
	return err
}

// firstClosed is a number above those of most processes' descriptors. The kernel's table grows with it: to 64 kB.
const firstClosed = 4096

// closesFirst makes the kernel close the receiving socket before anything else if the process is killed: packets
// then take the fallback of their rules at once, not after the grace periods of other sockets.
func (w *afxdpWorker) closesFirst() {
	var limit unix.Rlimit
	err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit)
	if err == nil {
		err = w.socket.Renumber(int(min(limit.Cur/2, firstClosed)))
	}
	if err != nil {
		w.log.Debug("the receiving socket has no high descriptor", "error", err)
	}
	w.fd = w.socket.FD()
}

// takeFrames makes all frames of the memory the worker's.
func (w *afxdpWorker) takeFrames() (err error) {
	if w.frames, err = w.umem.NewFrames(w.memory.Frames); err != nil {
		return err
	}
	w.multiBuffer, w.shift = w.memory.MultiBuffer, bits.TrailingZeros(uint(w.memory.FrameSize))
	w.area = w.umem.Data(xsk.Desc{Len: uint32(w.memory.Frames * w.memory.FrameSize)})
	w.claims = make([]uint64, w.memory.Frames)
	return nil
}

// receiveFrames returns the number of frames for receiving, whatever the number of outputs: the kernel can place as
// many packets while the worker does not run. It is the largest power of two that leaves at least as many
// frames to the copies.
func (o *AFXDPOptions) receiveFrames() int {
	return min(1<<(bits.Len(uint(o.Frames/2))-1), maxReceiveRing)
}

// copyFrames returns the number of frames that copies being sent may take, if there are enough outputs.
func (o *AFXDPOptions) copyFrames() int { return o.Frames - o.receiveFrames() }

// receiveRing returns the size of the receiving rings, which have room for all frames that a single output leaves.
func (o *AFXDPOptions) receiveRing() int {
	return min(1<<bits.Len(uint(o.Frames-ringSize-1)), maxReceiveRing)
}

func (a *AFXDP) socketOptions() xsk.Options {
	receive := a.opts.receiveRing()
	return xsk.Options{
		FillSize: receive, CompletionSize: ringSize, RXSize: receive, TXSize: ringSize,
		TXBudget: 256, SendBuffer: sendBuffer,
		BusyPoll: a.opts.BusyPoll, PreferBusyPoll: a.opts.PreferBusyPoll, BusyPollBudget: a.opts.BusyPollBudget,
	}
}

// senderOptions are those of sockets that only send.
func (a *AFXDP) senderOptions() xsk.Options {
	opts := a.socketOptions()
	opts.NoRX, opts.FillSize = true, 1
	return opts
}

// openSender opens a sender, in the goroutine that syncs.
func (w *afxdpWorker) openSender(index int) (Sender, error) {
	iface, err := net.InterfaceByIndex(index)
	if err != nil {
		return nil, fmt.Errorf("open sender on interface %d: %w", index, unix.ENODEV)
	}
	packet, err := w.path.openPacket(index)
	if err != nil {
		return nil, err
	}
	s := &afxdpSender{worker: w, index: index, packet: packet}
	s.account = w.path.set.accounts.Account().Open(account.Target{Scope: account.Device, ID: uint32(index)})
	if !packet.Ethernet() {
		s.why = "the interface has no Ethernet header"
	} else if err := s.openSocket(iface); err != nil {
		if errors.Is(err, unix.ENETDOWN) || errors.Is(err, unix.ENODEV) {
			return nil, errors.Join(fmt.Errorf("open sender on %s: %w: %w", iface.Name, unix.ENODEV, err), packet.Close(), s.account.Close())
		}
		s.why, s.noQueue = err.Error(), errors.Is(err, errNoQueue)
	}
	if s.socket != nil {
		s.packet = nil
		if err := packet.Close(); err != nil {
			return nil, errors.Join(err, s.Close())
		}
	} else {
		w.log.Info("output is sent to by a packet socket", "output", iface.Name, "cause", s.why)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.senders = append(w.senders, s)
	w.setLimits()
	return s, nil
}

func (a *AFXDP) openPacket(index int) (Sender, error) {
	return fanout.OpenSender(index, a.opts.Sender)
}

// errNoQueue: other workers use all transmit queues.
var errNoQueue = errors.New("no transmit queue is free")

// openSocket finds a queue for the sender.
func (s *afxdpSender) openSocket(iface *net.Interface) error {
	w := s.worker
	if iface.Index == w.index {
		s.socket, s.shared = w.socket, true
		s.prepare()
		return nil
	}
	if inherited := w.waiting[iface.Index]; inherited != nil {
		delete(w.waiting, iface.Index)
		s.socket = inherited
		w.path.claimed[queueKey{iface.Index, inherited.Queue()}] = s
		s.prepare()
		return nil
	}
	queues, err := channelsOf(iface.Name)
	if err != nil {
		return err
	}
	opts := w.path.senderOptions()
	err = errNoQueue
	for i := range queues.tx {
		q := (w.queue + i) % queues.tx
		key := queueKey{iface.Index, q}
		if _, taken := w.path.claimed[key]; taken {
			continue
		}
		s.socket, err = w.openSocket(iface.Index, q, opts, busyTries)
		if err == nil {
			w.path.claimed[key] = s
			s.prepare()
			return nil
		}
		s.socket = nil
		if !errors.Is(err, unix.EBUSY) {
			return err
		}
	}
	return err
}

// reviewSenders marks packet sockets to be replaced by AF_XDP sockets, because transmit
// queues of their interfaces are free now. The reverse is not needed: the kernel removes
// no queue that has a socket (ethnl_set_channels of net/ethtool/channels.c).
func (a *AFXDP) reviewSenders() {
	for _, in := range a.inputs {
		for _, w := range in.workers {
			if w == nil {
				continue
			}
			for _, s := range w.openSenders() {
				if s.noQueue {
					s.stale.Store(a.hasRoom(s.index))
				}
			}
		}
	}
}

// hasRoom says whether an interface has a transmit queue that no worker uses.
func (a *AFXDP) hasRoom(index int) bool {
	queues, err := channelsOf(interfaceName(index))
	if err != nil {
		return false // it is gone; its senders detect that
	}
	for q := range queues.tx {
		if _, taken := a.claimed[queueKey{index, q}]; !taken {
			return true
		}
	}
	return false
}

// openSenders returns the current senders of a worker.
func (w *afxdpWorker) openSenders() []*afxdpSender {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.senders)
}

func (s *afxdpSender) prepare() {
	s.descs = make([]xsk.Desc, 0, xsk.MaxSegments+1)
	s.ends = make([]int, 0, batch)
	s.dropped = make([]int, 0, batch)
	s.share = s.worker.umem.FrameSize() - packet.MaxHeaders
	if s.socket.ZeroCopy() {
		s.share = shareZeroCopy
	}
}

// setLimits divides the frames not reserved for receiving among the senders, so that a
// slow one does not use up those of others. What they do not need is for receiving, too, but for a ring's worth: the
// kernel does not give frames back when a second output comes.
func (w *afxdpWorker) setLimits() {
	n := 0
	for _, s := range w.senders {
		if s.socket != nil {
			n++
		}
	}
	limit := min(ringSize, w.path.opts.copyFrames()/max(n, 1))
	for _, s := range w.senders {
		s.limit = limit
	}
	w.kept = max(n*limit, ringSize)
}

// forget removes a sender.
func (w *afxdpWorker) forget(s *afxdpSender) {
	_ = s.account.Close() // cannot fail: in memory, and closed only here
	w.senders = slices.DeleteFunc(w.senders, func(other *afxdpSender) bool { return other == s })
	w.setLimits()
}

// start directs a queue's packets to its worker and runs it.
func (a *AFXDP) start(w *afxdpWorker) {
	if err := a.opts.Loader.SetSocket(w.index, w.queue, w.fd); err != nil {
		w.failed(err)
		w.interfaceC.Store(interfaceGone) // the next Sync tries again
		return
	}
	w.ended.Go(w.run)
}

// retire closes workers. Errors are only logged: they affect no packet.
func (a *AFXDP) retire(workers []*afxdpWorker) {
	for i, w := range workers {
		if w == nil {
			continue
		}
		workers[i] = nil
		if err := a.closeWorker(w); err != nil {
			a.log.Warn("close worker", "interface", w.name, "queue", w.queue, "error", err)
		}
	}
}

// closeWorker ends a worker, possibly half open, and closes its resources.
func (a *AFXDP) closeWorker(w *afxdpWorker) error {
	var errs []error
	if w.socket != nil && !w.foreign {
		if w.engine != nil {
			w.finish() // what is still in the ring afterwards may be overtaken by packets on the kernel path
		}
		errs = append(errs, a.opts.Loader.ClearSocket(w.index, w.queue))
	}
	w.signal()
	w.ended.Wait()
	if w.engine != nil {
		w.finish() // packets redirected before the socket was cleared
		errs = append(errs, a.set.Remove(w.engine))
	}
	if w.waiter != nil {
		errs = append(errs, w.waiter.Close())
	}
	errs = append(errs, a.remember(w), w.closeWaiting(), w.closeMemory())
	delete(a.claimed, queueKey{w.index, w.queue})
	for _, in := range a.inputs {
		for i := range in.workers {
			if in.workers[i] == w {
				in.workers[i] = nil
			}
		}
	}
	return errors.Join(errs...)
}

func (w *afxdpWorker) closeMemory() error {
	var errs []error
	if w.socket != nil {
		errs = append(errs, w.socket.Close())
		w.socket = nil
	}
	if w.frames != nil {
		errs = append(errs, w.frames.Verify())
	}
	if w.umem != nil {
		errs = append(errs, w.umem.Close())
		w.umem = nil
	}
	return errors.Join(errs...)
}

// Pending says whether an input has a queue without a worker for a temporary reason.
func (a *AFXDP) Pending() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, in := range a.inputs {
		if slices.ContainsFunc(in.workers, func(w *afxdpWorker) bool { return w == nil || w.interfaceC.Load() == interfaceGone }) || in.err != nil {
			return true
		}
	}
	return false
}

// Stats reads the counters of the rules with these names; nil means all. Matched counts
// packets that reached the workers: those that the relay program matched, less those that
// it dropped, that the kernel path served, and that sockets lost (Inputs).
func (a *AFXDP) Stats(names []string) []loader.RuleStats { return a.set.Stats(names) }

// InputStatus is the state of the workers of an input interface.
type InputStatus struct {
	Index     int
	Interface string
	Workers   []QueueStatus // none on an interface that no rule uses any more
	// Error is why a queue has no worker; nil if all have one. Missing is the same by
	// queue, without errors of the whole interface.
	Error   error
	Missing []QueueError
	// Lost is the sum over all present and former workers of the interface.
	Lost Lost
}

// QueueError is why a queue has no worker.
type QueueError struct {
	Queue int
	Err   error
}

// Lost counts packets that the relay program redirected to the path, but that reached no
// rule.
type Lost struct {
	NoFrame   uint64 // no memory was free because the worker did not keep up; or the packet was too long
	RingFull  uint64 // the worker did not keep up
	Unclaimed uint64 // the rule was removed meanwhile
}

// nameOf returns the name of an input that may be gone.
func (a *AFXDP) nameOf(index int) string {
	if name, ok := a.names[index]; ok {
		return name
	}
	return interfaceName(index) // used by an earlier process
}

// lostBy reads the packets lost on each input interface, and those that output devices did
// not take, since the account was made.
func lostBy(a *account.Account) (inputs map[int]Lost, unsent map[int]uint64) {
	inputs, unsent = map[int]Lost{}, map[int]uint64{}
	a.Each(func(t account.Target, kind account.Kind, w account.Writer, sum account.Sum) {
		if w.Path() != uint8(flow.PathAFXDP) || sum.Packets == 0 {
			return
		}
		index := int(t.ID)
		switch {
		case t.Scope == account.Device:
			unsent[index] += sum.Packets
			return
		case t.Scope != account.Input:
			return
		}
		lost := inputs[index]
		switch kind {
		case account.NoFrame:
			lost.NoFrame += sum.Packets
		case account.RingFull:
			lost.RingFull += sum.Packets
		case account.RuleGone:
			lost.Unclaimed += sum.Packets
		}
		inputs[index] = lost
	})
	return inputs, unsent
}

// QueueStatus is the state of the worker of a queue.
type QueueStatus struct {
	Queue int
	// ZeroCopy and MultiBuffer say what the driver and kernel granted.
	ZeroCopy, MultiBuffer bool
	FrameSize             int // bytes
	// WakeRX and WakeTX say whether the kernel currently needs to be woken by a system
	// call (XDP_RING_NEED_WAKEUP): in copy mode always for TX, and never for RX.
	WakeRX, WakeTX bool
	// Received counts the packets that reached the worker.
	Received uint64
	// Socket holds the kernel's counters: RXDropped and RXRingFull are lost packets.
	Socket xsk.Statistics
	// Unclaimed counts packets whose rule had been removed when they were read.
	Unclaimed loader.Counter
	Failures  uint64
	LastError string // empty if there was none
	// Down and Gone describe the interface. Stopped: the worker has failed, and will
	// restart shortly; until then the rules' fallback serves the queue.
	Down, Gone, Stopped bool
	Senders             []SenderStatus
}

// SenderStatus is the state of a worker's sender for an interface.
type SenderStatus struct {
	Index int
	// Queue is the transmit queue of the AF_XDP socket; -1 for a packet socket, and
	// Cause says why it is one.
	Queue    int
	ZeroCopy bool
	Cause    string
	// Outstanding counts the descriptors in flight, and Lost those counted as sent, but
	// given up because the device disappeared before it took them.
	Outstanding int
	Lost        uint64
	Failed      bool // the interface is down or gone: the next Sync reopens it
}

// Inputs returns the state of the workers, by interface index. It lists the losses of an
// interface even if no rule uses it any more.
func (a *AFXDP) Inputs() ([]InputStatus, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	var all []InputStatus
	var errs []error
	for _, index := range slices.Sorted(maps.Keys(a.inputs)) {
		in := a.inputs[index]
		status := InputStatus{Index: index, Interface: in.name, Error: in.err, Missing: slices.Clone(in.causes)}
		for _, w := range in.workers {
			if w == nil {
				continue
			}
			s, err := w.status()
			if err != nil {
				errs = append(errs, err)
			}
			status.Workers = append(status.Workers, s)
		}
		all = append(all, status)
	}
	lost, _ := lostBy(a.set.accounts.Account()) // after the workers have updated it
	for i := range all {
		all[i].Lost = lost[all[i].Index]
	}
	for index := range lost {
		if a.inputs[index] == nil {
			all = append(all, InputStatus{Index: index, Interface: a.nameOf(index), Lost: lost[index]})
		}
	}
	slices.SortFunc(all, func(a, b InputStatus) int { return a.Index - b.Index })
	return all, errors.Join(errs...)
}

// Unsent returns, by output interface, the number of packets that were counted as sent but
// not taken by the device: those in a TX ring when it went down or away, and those that it
// dropped later.
func (a *AFXDP) Unsent() map[int]uint64 {
	_, unsent := lostBy(a.set.accounts.Account())
	return unsent
}

// remember saves a worker's losses before its socket is closed.
func (a *AFXDP) remember(w *afxdpWorker) error {
	if w.engine == nil { // it never ran
		return nil
	}
	_, err := w.status()
	return errors.Join(err, w.account.Close())
}

// noteLost adds the socket's losses since the last call to the account. The caller holds
// the worker's lock.
func (w *afxdpWorker) noteLost(s xsk.Statistics) {
	w.noFrame.Add(s.RXDropped-w.noted.RXDropped, 0)
	w.ringFull.Add(s.RXRingFull-w.noted.RXRingFull, 0)
	w.noted = s
}

func (w *afxdpWorker) status() (s QueueStatus, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s = QueueStatus{
		Queue: w.queue, ZeroCopy: w.socket.ZeroCopy(), MultiBuffer: w.multiBuffer, FrameSize: w.umem.FrameSize(),
		Failures: w.failures.Load(), Down: w.interfaceC.Load() == interfaceDown, Gone: w.interfaceC.Load() == interfaceGone,
		Stopped: w.stopped.Load(), Received: w.received.Load(),
	}
	s.WakeRX, s.WakeTX = w.socket.NeedWakeup()
	w.unclaimed.addTo(&s.Unclaimed)
	if text := w.lastError.Load(); text != nil {
		s.LastError = *text
	}
	if s.Socket, err = w.socket.Statistics(); err == nil && !w.path.suspended && !w.foreign {
		w.noteLost(s.Socket)
	}
	for _, o := range w.senders {
		status := SenderStatus{Index: o.index, Queue: -1, Cause: o.why, Lost: o.lost, Failed: o.failed}
		if o.packet == nil {
			status.Queue, status.ZeroCopy, status.Outstanding = o.socket.Queue(), o.socket.ZeroCopy(), o.socket.Outstanding()
		}
		s.Senders = append(s.Senders, status)
	}
	slices.SortFunc(s.Senders, func(a, b SenderStatus) int { return a.Index - b.Index })
	return s, err
}

// String describes how packets are received.
func (s QueueStatus) String() string {
	mode := []string{"copy"}
	if s.ZeroCopy {
		mode[0] = "zero-copy"
	}
	if s.MultiBuffer {
		mode = append(mode, "multi-buffer")
	}
	return fmt.Sprintf("queue %d: %s", s.Queue, strings.Join(mode, ", "))
}

// Close ends all workers and closes everything. A second Close does nothing.
func (a *AFXDP) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return nil
	}
	a.closed = true
	a.unregister()
	var errs []error
	if a.opts.Inherited != nil {
		errs = append(errs, a.opts.Inherited.Close())
	}
	for _, in := range a.inputs {
		for _, w := range slices.Clone(in.workers) {
			if w != nil {
				errs = append(errs, a.closeWorker(w))
			}
		}
	}
	clear(a.inputs)
	return errors.Join(append(errs, a.set.close())...)
}
