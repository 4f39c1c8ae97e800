package fanout

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Files returns the descriptors with which another process continues to use the group: see [Inherit]. The
// group keeps ownership; after Close there are none. Their number depends on the options alone.
func (g *Group) Files() []int {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil
	}
	files := []int{g.state.fd}
	if g.choice != nil {
		files = append(files, g.choice.state.FD())
	}
	for _, w := range g.workers {
		files = append(files, w.sockets()...)
	}
	return files
}

// fileCount is the number of descriptors of a group.
func fileCount(o *Options) int {
	if o.Frames != 0 {
		return 2 + 2*o.Workers
	}
	return 1 + o.Workers
}

// Inherit maps a group of another process, which was opened with these options. files are duplicates of
// what its Files returned; Inherit takes ownership, also on an error. It may be called while that
// process uses the group; [Group.Resume] takes it over, and until then only Close and Released may
// be called. Options.Steering is not used: the group keeps its own. If the rings are
// not those of the options, the error matches [ErrLayout]; if they are not of the calling thread's network
// namespace, [ErrNamespace].
func Inherit(opts Options, files []int) (*Group, error) { return inherit(opts, files, kernel()) }

func inherit(opts Options, files []int, sys *system) (_ *Group, err error) {
	files = slices.Clone(files)
	take := func() (fd int) {
		fd, files = files[0], files[1:]
		return fd
	}
	opts, err = opts.complete()
	g := &Group{sys: sys, opts: opts, id: -1}
	defer func() {
		if err == nil {
			return
		}
		err = g.fail(StepInherit, err)
		for _, fd := range files {
			err = errors.Join(err, sys.close(fd))
		}
		if g.state != nil {
			err = errors.Join(err, g.Close())
		}
	}()
	if err != nil {
		return nil, err
	}
	if want := fileCount(&opts); len(files) != want {
		return nil, fmt.Errorf("%w: it has %d descriptors, want %d", ErrLayout, len(files), want)
	}
	if g.state, err = inheritState(sys, &opts, take()); err != nil {
		return nil, err
	}
	if opts.Frames != 0 {
		if g.choice, err = inheritChoice(&opts, take()); err != nil {
			return nil, err
		}
	}
	namespace, err := sys.ownNamespace()
	if err != nil {
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	for i := range opts.Workers {
		w := g.newWorker(i, take())
		g.workers = append(g.workers, w)
		if err := g.checkSocket(w.fd, namespace); err != nil {
			return nil, err
		}
		if err := g.inheritWorker(w); err != nil {
			return nil, err
		}
		if opts.Frames != 0 {
			r := g.newFrameRing(w, i, take())
			w.frames = r
			if err := g.checkSocket(r.fd, namespace); err != nil {
				return nil, err
			}
			if r.memory, err = sys.mmap(r.fd, opts.Frames*opts.FrameSize); err != nil {
				return nil, fmt.Errorf("map ring: %w", err)
			}
			w.polls(r.fd)
		}
	}
	return g, nil
}

// checkSocket checks that a socket is of this network namespace, where it is a member of the group that the
// state is of.
func (g *Group) checkSocket(fd int, namespace uint64) error {
	switch of, err := g.sys.namespace(fd); {
	case err != nil:
		return err
	case of != namespace:
		return ErrNamespace
	}
	if err := g.readID(fd); err != nil {
		return err
	}
	if of := g.state.identity().group; int(of) != g.id {
		return fmt.Errorf("%w: its state is of group %d", ErrLayout, of)
	}
	return nil
}

// inheritWorker maps the ring of blocks of a worker, whose socket must be bound to the interface.
func (g *Group) inheritWorker(w *Worker) error {
	link, err := g.sys.boundTo(w.fd)
	if err == nil && link.Ifindex != g.opts.Index {
		err = unix.ENODEV
	}
	if err != nil {
		return err
	}
	g.ethernet = hasEthernetHeader(link.Hatype)
	if err := w.mapRing(); err != nil {
		return fmt.Errorf("map ring: %w", err)
	}
	if err := w.openEvent(); err != nil {
		return fmt.Errorf("open eventfd: %w", err)
	}
	w.polls(w.fd, w.event)
	return nil
}

// Released says whether the other process of an inherited group has closed it, so that Resume may be
// called. A process that was killed has not.
func (g *Group) Released() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return !g.closed && g.state.isClosed()
}

// Resume continues with an inherited group. The other process must have closed it, or must have ended.
// The workers go on with the first frame that it had not committed ([Block.Commit]); frames that
// arrived meanwhile wait in the rings. Options.Filter replaces the filter. After an error the group
// can only be closed.
func (g *Group) Resume() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed || g.resumed {
		return g.fail(StepResume, os.ErrClosed)
	}
	for i, w := range g.workers {
		if err := w.resume(); err != nil {
			return g.fail(StepResume, fmt.Errorf("worker %d: %w", i, err))
		}
	}
	for _, w := range g.workers {
		if err := w.setFilter(g.opts.Filter); err != nil {
			return err
		}
	}
	g.state.setClosed(0)
	g.resumed = true
	return nil
}

// resume sets the worker to its cursor.
func (w *Worker) resume() error {
	c, blocks := w.cursor, uint64(len(w.ring)/w.blockSize)
	at := func(number uint64) []byte {
		return w.ring[int((number-1)%blocks)*w.blockSize:][:w.blockSize]
	}
	if c.block == 0 || c.released > c.read {
		return fmt.Errorf("%w: its next block is %d, and %d frames were given back of %d", ErrLayout, c.block, c.released, c.read)
	}
	// The block before is done with, but may not have been given back.
	if last := c.block - 1; last > 0 {
		block := at(last)
		if number := *blockNumber(block); number != last && number != last+blocks {
			return fmt.Errorf("%w: block %d is where %d is expected", ErrLayout, number, last)
		}
		if *blockNumber(block) == last && atomic.LoadUint32(blockStatus(block))&unix.TP_STATUS_USER != 0 {
			giveBack(block)
		}
	}
	// The kernel opened it for this number or, if not yet, for that of the last round.
	switch number := *blockNumber(at(c.block)); {
	case number == c.block:
	case number < c.block && (number == 0 || number+blocks == c.block):
	default:
		return fmt.Errorf("%w: block %d is where %d is expected", ErrLayout, number, c.block)
	}
	w.index, w.skip = int((c.block-1)%blocks), 0
	if uint32(c.taken>>32) == uint32(c.block) {
		w.skip = int(uint32(c.taken))
	}
	if w.frames != nil {
		w.frames.resume()
	}
	return nil
}

// resume sets the ring to the worker's cursor.
func (r *frameRing) resume() {
	c := r.cursor
	r.head = int(c.released % uint64(r.count))
	for i := range int(min(c.read-c.released, uint64(r.count))) {
		atomic.StoreUint32(r.status(i), unix.TP_STATUS_KERNEL)
	}
	r.head = int(c.read % uint64(r.count))
	atomic.StoreUint64(&c.released, c.read)
	r.blocks = atomic.LoadUint64(&r.admits.limit) == 0
}

// Holds says whether the rings hold frames that were not released. Frames that a CPU is just placing
// may be missing.
func (g *Group) Holds() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return !g.closed && slices.ContainsFunc(g.workers, (*Worker).holds)
}

func (w *Worker) holds() bool {
	c, blocks := w.cursor, uint64(len(w.ring)/w.blockSize)
	for {
		number, released := atomic.LoadUint64(&c.block), atomic.LoadUint64(&c.released)
		block := w.ring[int((number-1)%blocks)*w.blockSize:]
		if atomic.LoadUint32(blockStatus(block))&unix.TP_STATUS_USER != 0 || atomic.LoadUint32(blockFrames(block)) != 0 {
			return true
		}
		if r := w.frames; r != nil {
			if atomic.LoadUint32(r.statusOf(int(released%uint64(r.count))))&unix.TP_STATUS_USER != 0 {
				return true
			}
		}
		if atomic.LoadUint64(&c.block) == number && atomic.LoadUint64(&c.released) == released {
			return false
		}
	}
}
