package forward

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"

	"xdpcast/pkg/fanout"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
)

// FanoutOptions configure a [Fanout]. The zero value is valid.
type FanoutOptions struct {
	Logger *slog.Logger // nil: logs nothing
	// Workers is the number of workers for each input interface; 0 means one for each
	// CPU that the process may use.
	Workers int
	// Priority is the real-time priority (SCHED_FIFO) of the workers' threads, 1 to 99; see
	// [CheckPriority]. 0 leaves them to the default scheduler, and to Boost.
	Priority int
	// Boost gives the workers a real-time priority while they need little time, unless Priority does; nil: not.
	Boost *Boost
	// Place moves workers away from CPUs for which they wait.
	Place bool
	// Accounts is where packets are counted; nil: in memory, as long as the path lives.
	Accounts Accounts
	// Taps see packets; nil: no taps.
	Taps *Taps
	// Mode and Steering are those of fanout.Options.
	Mode     fanout.Mode
	Steering *ebpf.Program
	// Blocks is the length of each worker's ring, in blocks of
	// fanout.DefaultBlockSize; 0 means fanout.DefaultBlocks. BlockTimeout bounds the wait
	// of a frame in a block; 0 means fanout.DefaultBlockTimeout. A worker that gets no CPU
	// until its frame ring is full, and then for Blocks times BlockTimeout, loses packets.
	Blocks       int
	BlockTimeout time.Duration
	// Frames is the length of each worker's frame ring, which delivers frames immediately
	// while they are few; 0 means a size that suits the MTU, less than 0 no frame ring.
	Frames int
	// Sender configures the senders.
	Sender fanout.SenderOptions
	// Inherited are the groups of the process from which this one takes over (Fanout.HandOver), or of
	// one that has ended (Keeper); nil: none. The path takes ownership. Those that its first rules
	// need are used, with the packets in them. Suspend is called before: it returns when that process
	// has suspended them (Fanout.Suspend). Nil: it has ended.
	Inherited *FanoutHandover
	Suspend   func() error
	// Own says that Suspend suspends a path of this process, and that the process to which its groups were
	// handed over has ended, in whatever state it left them.
	Own bool
	// Prepare calls a function that prepares to use the inherited groups, while that process still forwards: on a
	// thread of low priority, for example. Nil: it is just called.
	Prepare func(do func())
	// Keeper keeps the groups for the next process; nil: they end with this one.
	Keeper Keeper
	// Gate is from Fanout.Gate of the process from which this one takes over; nil: none. The
	// path takes ownership. It is used where groups are not inherited.
	Gate *ebpf.Map
	// TakeOver is called once, if the Gate is used: packets then wait in this path's sockets. It
	// returns when the other process has forwarded all earlier packets (Fanout.Drain).
	TakeOver func() error
	// stale replaces defaultStale, for tests.
	stale time.Duration
}

// Fanout is the PACKET_FANOUT path: for each input interface of its rules a group of
// workers, each a goroutine with its own thread, ring, engine and senders. The host's
// receivers are unaffected. The methods may be called from any goroutine, but Open, Sync
// and Close only from threads of one network namespace.
type Fanout struct {
	opts   FanoutOptions
	log    *slog.Logger
	set    *Set
	system fanoutSystem

	unregister func()

	mu        sync.Mutex
	rules     keptRules
	closed    bool
	suspended bool // another process may use the groups
	gated     bool // packets come once the gate of the previous process is turned to this path
	filter    *filter
	groups    map[groupKey]*fanoutGroup
}

// groupKey identifies a group: an interface, and its received packets or those that this
// host sends through it.
type groupKey struct {
	index    int
	fromHost bool
}

func groupOf(in flow.Input) groupKey { return groupKey{in.Index, in.FromHost} }

func (k groupKey) compare(o groupKey) int {
	return cmp.Or(cmp.Compare(k.index, o.index), strings.Compare(strconv.FormatBool(k.fromHost), strconv.FormatBool(o.fromHost)))
}

func sortedGroups[V any](m map[groupKey]V) []groupKey {
	return slices.SortedFunc(maps.Keys(m), groupKey.compare)
}

// fanoutSystem opens what a Fanout needs. Tests replace it to inject faults.
type fanoutSystem struct {
	openGroup  func(fanout.Options) (*fanout.Group, error)
	openSender func(index int, opts fanout.SenderOptions) (Sender, error)
	wait       func(*fanout.Worker) (*fanout.Block, error)
	place      func(*slog.Logger) *placement
}

// OpenFanout opens the path without rules. The caller must Close it. It needs
// CAP_BPF and CAP_NET_RAW.
func OpenFanout(opts FanoutOptions) (*Fanout, error) {
	return openFanout(opts, fanoutSystem{
		openGroup: fanout.Open,
		openSender: func(index int, opts fanout.SenderOptions) (Sender, error) {
			return fanout.OpenSender(index, opts)
		},
		wait:  (*fanout.Worker).Wait,
		place: place,
	})
}

func openFanout(opts FanoutOptions, system fanoutSystem) (*Fanout, error) {
	if opts.Workers < 0 {
		return nil, fmt.Errorf("%d workers: must be positive", opts.Workers)
	}
	if opts.Priority < 0 || opts.Priority > MaxPriority {
		return nil, fmt.Errorf("real-time priority %d: want 0 to %d", opts.Priority, MaxPriority)
	}
	opts.Workers = FanoutWorkers(opts.Workers)
	if opts.stale == 0 {
		opts.stale = defaultStale
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	var before *ebpf.Map
	if opts.Inherited == nil {
		before, opts.Gate = opts.Gate, nil
	}
	gate, err := newGate(before)
	if err != nil {
		return nil, err
	}
	filter, err := newFilter(gate)
	if err != nil {
		return nil, err
	}
	f := &Fanout{
		gated: before != nil, opts: opts, log: opts.Logger, system: system, filter: filter,
		set: newSet(flow.PathFanout, opts.Workers, opts.Accounts, opts.Taps), groups: map[groupKey]*fanoutGroup{},
	}
	f.unregister = f.set.accounts.Account().OnSettle(f.set.settle)
	return f, nil
}

// Sync makes the path forward exactly those of the rules whose path is
// loader.PathFanout. It does not touch unchanged rules or their packets. A group is
// opened before its first rule, and closed after its last. own are the host's unicast
// addresses. Call it again, with the same rules, when interfaces have changed: it
// reopens outputs that were gone.
//
// On an error nothing changes. Errors to match: *loader.RuleError, which names a rule
// without which the others may succeed, and wraps a *fanout.Error if the group of its
// input cannot be opened; os.ErrClosed.
func (f *Fanout) Sync(rules []flow.Flow, own []netip.Addr) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.changeRules(rules, own); err != nil {
		return err
	}
	return f.sync(rules, own)
}

func (f *Fanout) sync(rules []flow.Flow, own []netip.Addr) (err error) {
	if f.closed || f.suspended {
		return fmt.Errorf("fanout path: %w", os.ErrClosed)
	}
	want := slices.DeleteFunc(slices.Clone(rules), func(r flow.Flow) bool { return r.Path != flow.PathFanout })
	inputs, allowed := map[groupKey]string{}, map[wantedKey]bool{}
	for i := range want {
		if err := want[i].Normalized().Check(); err != nil {
			return &loader.RuleError{Rule: want[i].Name, Err: err}
		}
		if _, ok := inputs[groupOf(want[i].In)]; !ok {
			inputs[groupOf(want[i].In)] = want[i].Name
		}
		allowed[wantedOf(want[i].In)] = true
	}
	added, err := f.filter.allow(allowed)
	if err != nil {
		return err
	}
	var fresh []*fanoutGroup
	prepare := func() {
		f.closeGone()
		if fresh, err = f.openGroups(inputs); err == nil {
			err = f.set.Update(want, own, nil)
		}
	}
	if f.opts.Inherited != nil && f.opts.Suspend != nil && f.opts.Prepare != nil {
		f.opts.Prepare(prepare)
	} else {
		prepare()
	}
	// Packets wait from here until the workers run: nothing slow may happen between.
	asked := time.Now()
	if err == nil {
		err = f.resume(fresh)
	}
	if err == nil {
		err = f.takeOver()
	}
	if err != nil {
		for _, g := range fresh {
			err = errors.Join(err, g.close(f.set))
		}
		err = errors.Join(err, f.filter.forget(added))
		var without *notInherited
		if errors.As(err, &without) {
			if err := f.disinherit(without.cause); err != nil {
				return err
			}
			return f.sync(rules, own)
		}
		return err
	}
	for _, g := range fresh {
		f.groups[g.groupKey] = g
		g.start()
	}
	if f.opts.Inherited != nil && len(fresh) > 0 {
		f.log.Info("fanout rings taken over", "groups", len(fresh), "packets_waited", time.Since(asked).Round(time.Microsecond))
	}
	f.settleInherited(fresh)
	f.retire(inputs, allowed)
	return nil
}

// takeOver directs packets to this path instead of another process's, once.
func (f *Fanout) takeOver() error {
	if !f.gated {
		return nil
	}
	f.gated = false
	err := f.filter.gate.enter()
	if err == nil && f.opts.TakeOver != nil {
		err = f.opts.TakeOver()
	}
	return err
}

// Drain waits until all packets in the rings have been forwarded; it returns false if that takes
// longer than patience. No more packets may arrive: another process must have taken over.
func (f *Fanout) Drain(patience time.Duration) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	awaitPrograms() // a CPU may have passed the gate, and be about to place a packet
	for deadline := time.Now().Add(patience); ; time.Sleep(200 * time.Microsecond) {
		left := false
		for _, g := range f.groups {
			left = left || g.group.Holds()
		}
		if !left || time.Now().After(deadline) {
			return !left
		}
	}
}

// Gate returns a duplicate of the map that selects the receiving process, for another process to
// take over. The caller must close it.
func (f *Fanout) Gate() (*ebpf.Map, error) { return f.filter.gate.value.Clone() }

// closeGone closes the groups of interfaces that are gone if new ones have their indexes,
// since those get their own groups. Otherwise a group stays as long as it has a rule.
func (f *Fanout) closeGone() {
	for key, g := range f.groups {
		if !g.group.Gone() {
			continue
		}
		if _, err := net.InterfaceByIndex(key.index); err != nil {
			continue
		}
		delete(f.groups, key)
		f.drop(g)
		if err := g.close(f.set); err != nil {
			f.log.Warn("close group", "interface", g.name, "error", err)
		}
	}
}

// FanoutWorkers returns the number of workers per input for FanoutOptions.Workers.
func FanoutWorkers(workers int) int {
	if workers == 0 {
		return runtime.NumCPU()
	}
	return workers
}

// openGroups opens groups on the interfaces that have none; inputs holds the first rule
// of each. On an error it closes them again.
func (f *Fanout) openGroups(inputs map[groupKey]string) (fresh []*fanoutGroup, err error) {
	for _, key := range sortedGroups(inputs) {
		if f.groups[key] != nil {
			continue
		}
		g, err := f.openGroup(key)
		if err != nil {
			err = &loader.RuleError{Rule: inputs[key], Err: err}
			for _, g := range fresh {
				err = errors.Join(err, g.close(f.set))
			}
			return nil, err
		}
		fresh = append(fresh, g)
	}
	return fresh, nil
}

func (f *Fanout) openGroup(key groupKey) (*fanoutGroup, error) {
	g := &fanoutGroup{groupKey: key, name: interfaceName(key.index), priority: f.opts.Priority, boost: f.opts.Boost, done: make(chan struct{})}
	if f.opts.Place {
		g.place = f.system.place
	}
	filter := f.filter.program
	if key.fromHost {
		filter = f.filter.sent
	}
	frames, frameSize := f.frameRing(key.index)
	opts := fanout.Options{
		Interface: g.name, Index: key.index, Outgoing: key.fromHost, Workers: f.opts.Workers,
		Mode: f.opts.Mode, Steering: f.opts.Steering, Blocks: f.opts.Blocks, BlockTimeout: f.opts.BlockTimeout,
		Filter: fanout.Filter{Program: filter}, Frames: frames, FrameSize: frameSize,
	}
	group, err := f.inherit(key, opts)
	if g.inherited = group != nil; err == nil && group == nil {
		group, err = f.system.openGroup(opts)
	}
	if err != nil {
		return nil, err
	}
	g.group = group
	for i, w := range group.Workers() {
		e, err := f.set.NewEngine(key.index, i, f.openSender)
		if err != nil {
			return nil, errors.Join(err, g.close(f.set))
		}
		e.fromHost = key.fromHost
		g.workers = append(g.workers, &fanoutWorker{
			engine: e, socket: w, group: g, number: i, wait: f.system.wait,
			log: f.log.With("interface", g.name, "worker", i),
		})
	}
	return g, nil
}

// frameRingSize is the size of a worker's frame ring, in bytes, and frameRingLeast its
// minimum number of frames.
const (
	frameRingSize  = 2 << 20
	frameRingLeast = 256
)

// frameRing returns the number and size of the frames in a worker's frame ring on an
// interface, according to its MTU. Longer packets, on a loopback device, arrive through
// blocks.
func (f *Fanout) frameRing(index int) (frames, size int) {
	if f.opts.Mode == fanout.ModeEBPF || f.opts.Frames < 0 {
		return 0, 0
	}
	size = fanout.DefaultFrameSize
	if i, err := net.InterfaceByIndex(index); err == nil { // otherwise opening the group fails
		for size < i.MTU+fanout.FrameOverhead && size < 16<<10 {
			size *= 2
		}
	}
	if f.opts.Frames != 0 {
		return f.opts.Frames, size
	}
	return max(frameRingSize/size, frameRingLeast), size
}

func (f *Fanout) openSender(index int) (Sender, error) {
	return f.system.openSender(index, f.opts.Sender)
}

// interfaceName returns the interface's name for messages.
func interfaceName(index int) string {
	i, err := net.InterfaceByIndex(index)
	if err != nil {
		return "interface " + strconv.Itoa(index)
	}
	return i.Name
}

// retire closes what no rule needs any more. Errors there affect no packet.
func (f *Fanout) retire(inputs map[groupKey]string, allowed map[wantedKey]bool) {
	for key, g := range f.groups {
		if inputs[key] != "" {
			continue
		}
		delete(f.groups, key)
		f.drop(g)
		if err := g.close(f.set); err != nil {
			f.log.Warn("close group", "interface", g.name, "error", err)
		}
	}
	if err := f.filter.restrict(allowed); err != nil {
		f.log.Warn("clean up after old rules", "error", err)
	}
}

// Stats reads the counters of the rules with these names; nil means all.
func (f *Fanout) Stats(names []string) []loader.RuleStats { return f.set.Stats(names) }

// Fragments returns the numbers of fragments of UDP datagrams.
func (f *Fanout) Fragments() loader.Fragments { return f.set.Fragments() }

// GroupStatus is the state of the workers of an input interface.
type GroupStatus struct {
	Index     int
	Interface string
	FromHost  bool // for packets that this host sends through the interface
	GroupID   uint16
	Mode      fanout.Mode
	Workers   []WorkerStatus
}

// WorkerStatus is the state of a worker.
type WorkerStatus struct {
	fanout.Stats
	// Failures counts how often the worker has failed and was restarted.
	Failures uint64
}

// Groups returns the state of the groups, by interface index. The kernel counts in 32
// bits: call it every few minutes.
func (f *Fanout) Groups() ([]GroupStatus, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []GroupStatus
	var errs []error
	for _, key := range sortedGroups(f.groups) {
		g := f.groups[key]
		stats, err := g.group.Stats()
		if err != nil {
			errs = append(errs, err)
		}
		status := GroupStatus{Index: key.index, Interface: g.name, FromHost: key.fromHost, GroupID: g.group.ID(), Mode: f.opts.Mode}
		for i, w := range g.workers {
			stats[i].Dropped += w.discarded.Load()
			status.Workers = append(status.Workers, WorkerStatus{stats[i], w.failures.Load()})
		}
		all = append(all, status)
	}
	return all, errors.Join(errs...)
}

// Close ends all workers and closes everything. Packets wait in the rings of groups that the keeper
// has. A second Close does nothing.
func (f *Fanout) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil
	}
	f.closed = true
	f.unregister()
	var errs []error
	for _, g := range f.groups {
		if !f.suspended {
			errs = append(errs, g.stop())
		}
		errs = append(errs, g.remove(f.set))
	}
	clear(f.groups)
	errs = append(errs, f.opts.Inherited.Close(), f.rules.close())
	if f.opts.Gate != nil {
		errs = append(errs, f.opts.Gate.Close())
	}
	return errors.Join(append(errs, f.filter.close(), f.set.close())...)
}

// fanoutGroup holds the workers of one input interface.
type fanoutGroup struct {
	groupKey
	name     string
	group    *fanout.Group
	workers  []*fanoutWorker
	priority int // of the workers' threads
	boost    *Boost
	place    func(*slog.Logger) *placement // nil: by the scheduler alone
	done     chan struct{}                 // closed to end the workers
	running  sync.WaitGroup

	inherited bool // from another process
	kept      int  // descriptors that the keeper has
}

func (g *fanoutGroup) start() {
	for _, w := range g.workers {
		g.running.Go(w.run)
	}
}

// close ends the workers.
func (g *fanoutGroup) close(set *Set) error { return errors.Join(g.stop(), g.remove(set)) }

// stop ends the workers, which have sent all that they have taken.
func (g *fanoutGroup) stop() error {
	close(g.done)
	err := g.group.Close()
	g.running.Wait()
	return err
}

// remove closes the senders of stopped workers.
func (g *fanoutGroup) remove(set *Set) error {
	var errs []error
	for _, w := range g.workers {
		errs = append(errs, set.Remove(w.engine))
	}
	return errors.Join(errs...)
}

// How long a failed worker pauses before it restarts, at first and at most.
const (
	firstPause = 10 * time.Millisecond
	lastPause  = time.Second
)
