package fanout

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Group consists of the workers that share the traffic of one interface. Its methods
// may be called from any goroutine.
type Group struct {
	sys     *system
	opts    Options
	id      int // -1 until the kernel chose one
	workers []*Worker
	// ethernet says that frames begin with an Ethernet header.
	ethernet bool
	choice   *choice // nil: workers have no frame rings
	state    *state
	resumed  bool // this process uses the rings

	// mu protects the descriptors, except for the workers' own use of them, and the
	// totals.
	mu      sync.Mutex
	closed  bool
	closing sync.Once
}

// Stats are a worker's counters since Open.
type Stats struct {
	// Received counts the frames put into the ring; a merged frame counts once.
	Received uint64
	// Dropped counts the frames that passed the filter but found the ring full.
	Dropped uint64
	// Freezes counts how often the ring became full.
	Freezes uint64
	// Truncated counts the returned frames cut short by the filter or the block.
	Truncated uint64
	// Malformed counts the frames skipped because the kernel's description of them
	// was invalid.
	Malformed uint64
}

// Open opens a group in the network namespace of the calling thread. The caller
// must Close it. On an error, in which errors.As finds an [*Error], nothing
// remains of the group.
//
// Since Linux 6.13 an interface that is down can be opened: the workers' first
// Wait returns ENETDOWN, and they receive once it is up. Earlier kernels refuse
// with ENETDOWN.
func Open(opts Options) (*Group, error) { return open(opts, kernel()) }

func open(opts Options, sys *system) (*Group, error) {
	opts, err := opts.complete()
	g := &Group{sys: sys, opts: opts, id: -1}
	if err != nil {
		return nil, g.fail(StepOptions, err)
	}
	if g.state, err = newState(sys, &opts); err != nil {
		return nil, g.fail(StepState, err)
	}
	if opts.Frames != 0 {
		if g.choice, err = newChoice(&opts); err != nil {
			return nil, errors.Join(g.fail(StepChoice, err), g.Close())
		}
	}
	for i := range opts.Workers {
		w, err := g.openWorker(i)
		if err != nil {
			return nil, errors.Join(err, g.Close())
		}
		g.workers = append(g.workers, w)
	}
	if g.choice != nil {
		for i, w := range g.workers {
			if err := g.openFrameRing(w, i); err != nil {
				return nil, errors.Join(err, g.Close())
			}
		}
	}
	if err := g.start(); err != nil {
		return nil, errors.Join(err, g.Close())
	}
	g.state.identity().group = uint32(g.id)
	g.resumed = true
	return g, nil
}

// start sets program and filters, after all workers have joined.
func (g *Group) start() error {
	program := g.opts.Steering
	if g.choice != nil {
		program = g.choice.program
	}
	if program != nil {
		// The program belongs to the group; any member can set it.
		if err := g.sys.setInt(g.workers[0].fd, unix.SOL_PACKET, unix.PACKET_FANOUT_DATA, program.FD()); err != nil {
			return g.fail(StepSteering, err)
		}
		if g.choice != nil { // the group has its own reference
			if err := g.choice.closeProgram(); err != nil {
				return g.fail(StepSteering, err)
			}
		}
	}
	for _, w := range g.workers {
		if err := w.setFilter(g.opts.Filter); err != nil {
			return err
		}
	}
	return nil
}

func (g *Group) fail(step Step, err error) error {
	return &Error{Step: step, Interface: g.opts.Interface, GroupID: g.id, Mode: g.opts.Mode, Err: err}
}

// Gone asks the kernel whether the interface for which the group was opened is gone,
// even if another has its index now. It returns false after Close.
func (g *Group) Gone() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed || len(g.workers) == 0 {
		return false
	}
	link, err := g.sys.boundTo(g.workers[0].fd)
	return err == nil && link.Ifindex != g.opts.Index
}

// ID returns the id of the fanout group.
func (g *Group) ID() uint16 { return uint16(g.id) }

// Workers returns the workers. The group keeps ownership.
func (g *Group) Workers() []*Worker { return g.workers }

// Ethernet reports whether the interface's frames begin with an Ethernet header,
// rather than with the IP header.
func (g *Group) Ethernet() bool { return g.ethernet }

// SetFilter replaces the filter of one worker after another, each atomically: every
// frame meets a filter. On an error it restores the previous filter as far as the
// kernel allows.
func (g *Group) SetFilter(f Filter) error {
	if err := f.check(); err != nil {
		return g.fail(StepFilter, err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return g.fail(StepFilter, os.ErrClosed)
	}
	for i, w := range g.workers {
		err := w.setFilter(f)
		if err == nil {
			continue
		}
		for _, earlier := range g.workers[:i] {
			err = errors.Join(err, earlier.setFilter(g.opts.Filter))
		}
		return err
	}
	g.opts.Filter = f
	return nil
}

// Stats returns each worker's counters, which never decrease. The kernel counts in
// 32 bits: call it at least every few minutes, or counts are lost at millions of
// frames a second. After Close it returns the last values.
func (g *Group) Stats() ([]Stats, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	var err error
	if !g.closed && g.resumed {
		err = g.readStatistics()
	}
	stats := make([]Stats, len(g.workers))
	for i, w := range g.workers {
		stats[i] = w.total
		stats[i].Truncated, stats[i].Malformed = w.truncated.Load(), w.malformed.Load()
	}
	return stats, err
}

// readStatistics adds the kernel's counts since the last call: each read resets
// them.
func (g *Group) readStatistics() error {
	var errs []error
	for _, w := range g.workers {
		for _, fd := range w.sockets() {
			s, err := g.sys.statistics(fd)
			if err != nil {
				errs = append(errs, g.fail(StepStats, err))
				continue
			}
			// The kernel's tp_packets includes the dropped ones.
			w.total.Received += uint64(s.Packets - s.Drops)
			w.total.Dropped += uint64(s.Drops)
			w.total.Freezes += uint64(s.Freeze_q_cnt)
		}
	}
	return errors.Join(errs...)
}

// Close wakes every worker, waits until none holds a block, and then unmaps the
// rings and closes the descriptors. With the last duplicate of them the group ends; as long as
// there are others, frames wait in the rings for a process that inherits the group. Wait returns os.ErrClosed from then on. A second
// Close does nothing. A goroutine that holds a block must release it first, or
// Close waits forever.
func (g *Group) Close() error {
	var errs []error
	g.closing.Do(func() {
		g.mu.Lock()
		if g.resumed {
			errs = append(errs, g.readStatistics())
		}
		g.closed = true
		for _, w := range g.workers {
			w.closed.Store(true)
			w.wake()
		}
		g.mu.Unlock()
		for _, w := range g.workers {
			w.mu.Lock()
			errs = append(errs, w.free())
			w.mu.Unlock()
		}
		if g.resumed {
			g.state.setClosed(1)
		}
		if g.choice != nil {
			if err := g.choice.close(); err != nil {
				errs = append(errs, g.fail(StepClose, err))
			}
		}
		if err := g.state.free(g.sys); err != nil {
			errs = append(errs, g.fail(StepClose, err))
		}
	})
	return errors.Join(errs...)
}

// hasEthernetHeader says whether packet sockets see an Ethernet header on a device
// of this type (ARPHRD_ of include/uapi/linux/if_arp.h). On others, such as tun and
// WireGuard, frames begin with the IP header.
func hasEthernetHeader(hardwareType uint16) bool {
	return hardwareType == unix.ARPHRD_ETHER || hardwareType == unix.ARPHRD_LOOPBACK
}

// boundTo returns the address of a bound packet socket. The index is -1 if the
// interface is gone.
func (s *system) boundTo(fd int) (*unix.SockaddrLinklayer, error) {
	address, err := s.getsockname(fd)
	if err != nil {
		return nil, err
	}
	link, ok := address.(*unix.SockaddrLinklayer)
	if !ok {
		return nil, fmt.Errorf("address of type %T: must be that of a packet socket", address)
	}
	return link, nil
}
