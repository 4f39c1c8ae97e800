package forward

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"xdpcast/pkg/xsk"
)

// AFXDPHandover passes the sockets of an [AFXDP] to another process, which continues where this one stops:
// packets wait in the sockets meanwhile, in their order. It needs Linux 6.4.
type AFXDPHandover struct {
	// State describes the path, and Files are the descriptors to which it refers, by position.
	State *os.File
	Files []*os.File
}

// Close closes the descriptors.
func (h *AFXDPHandover) Close() error {
	if h == nil {
		return nil
	}
	errs := []error{h.State.Close()}
	for _, f := range h.Files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// handedVersion is the version of handedState.
const handedVersion = 1

// handedState is what State holds, as JSON.
type handedState struct {
	Version int
	Options xsk.Options // of the sockets
	Workers []handedWorker
	// Suspended: the sockets are the other process's. Only then the fields so marked are set.
	Suspended bool
}

type handedWorker struct {
	Index, Queue   int
	UMEM           xsk.UMEMOptions
	Memory, Socket int // in Files
	Senders        []handedSocket

	Filled []byte         // Suspended
	Noted  xsk.Statistics // Suspended: already in the account
}

type handedSocket struct {
	Index, Queue int
	Socket       int    // in Files
	Filled       []byte // Suspended
}

func (h *AFXDPHandover) read() (state handedState, err error) {
	text, err := io.ReadAll(io.NewSectionReader(h.State, 0, math.MaxInt64))
	if err == nil {
		err = json.Unmarshal(text, &state)
	}
	if err == nil && state.Version != handedVersion {
		err = fmt.Errorf("it has version %d, want %d", state.Version, handedVersion)
	}
	for _, w := range state.Workers {
		for _, at := range append(socketsOf(w.Senders), w.Memory, w.Socket) {
			if err == nil && (at < 0 || at >= len(h.Files)) {
				err = fmt.Errorf("it refers to descriptor %d of %d", at, len(h.Files))
			}
		}
	}
	if err != nil {
		return handedState{}, fmt.Errorf("state of the AF_XDP path: %w", err)
	}
	return state, nil
}

func socketsOf(all []handedSocket) (at []int) {
	for _, s := range all {
		at = append(at, s.Socket)
	}
	return at
}

func (h *AFXDPHandover) write(state handedState) error {
	text, err := json.Marshal(state)
	if err == nil {
		err = h.State.Truncate(0)
	}
	if err == nil {
		_, err = h.State.WriteAt(text, 0)
	}
	if err != nil {
		return fmt.Errorf("state of the AF_XDP path: %w", err)
	}
	return nil
}

// duplicate returns a duplicate of one of the Files.
func (h *AFXDPHandover) duplicate(at int) (int, error) {
	return unix.FcntlInt(h.Files[at].Fd(), unix.F_DUPFD_CLOEXEC, 3)
}

// HandOver returns duplicates of the path's sockets, for another process: see
// AFXDPOptions.Inherited. The path works on until Suspend. The caller must Close the result.
func (a *AFXDP) HandOver() (_ *AFXDPHandover, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return nil, fmt.Errorf("hand the AF_XDP path over: %w", os.ErrClosed)
	}
	fd, err := unix.MemfdCreate("xdpcast-afxdp", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("hand the AF_XDP path over: %w", err)
	}
	h := &AFXDPHandover{State: os.NewFile(uintptr(fd), "afxdp")}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.Close())
		}
	}()
	var errs []error
	add := func(fd int) int {
		fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			errs = append(errs, fmt.Errorf("hand the AF_XDP path over: %w", err))
			return -1
		}
		h.Files = append(h.Files, os.NewFile(uintptr(fd), "afxdp"))
		return len(h.Files) - 1
	}
	state := handedState{Version: handedVersion, Options: a.socketOptions()}
	for _, w := range a.workers() {
		handed := handedWorker{Index: w.index, Queue: w.queue, UMEM: w.memory, Memory: add(w.umem.FD()), Socket: add(w.socket.FD())}
		for _, s := range w.ownSenders() {
			handed.Senders = append(handed.Senders, handedSocket{Index: s.index, Queue: s.socket.Queue(), Socket: add(s.socket.FD())})
		}
		state.Workers = append(state.Workers, handed)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return h, h.write(state)
}

// workers returns the workers of all inputs, by interface and queue.
func (a *AFXDP) workers() (all []*afxdpWorker) {
	for _, index := range slices.Sorted(maps.Keys(a.inputs)) {
		for _, w := range a.inputs[index].workers {
			if w != nil {
				all = append(all, w)
			}
		}
	}
	return all
}

// ownSenders returns the senders that have a socket besides the one for receiving.
func (w *afxdpWorker) ownSenders() (all []*afxdpSender) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.senders {
		if s.socket != nil && !s.shared && !s.failed {
			all = append(all, s)
		}
	}
	return all
}

// Suspend ends the workers for a process that has what HandOver returned. Every packet that they have
// taken has been sent; later ones wait in the sockets. The path can then only be closed: by Leave if
// the other process continues with it, by Close if that has failed. After an error the other process
// must open sockets of its own, once this path is closed.
func (a *AFXDP) Suspend(h *AFXDPHandover) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed || h == nil {
		return errors.New("suspend the AF_XDP path: it is closed, or was not handed over")
	}
	state, err := h.read()
	if err != nil {
		return err
	}
	workers := a.workers()
	same := len(workers) == len(state.Workers)
	for i := 0; same && i < len(workers); i++ {
		w, handed := workers[i], &state.Workers[i]
		same = w.index == handed.Index && w.queue == handed.Queue && slices.EqualFunc(w.ownSenders(), handed.Senders, func(s *afxdpSender, to handedSocket) bool {
			return s.index == to.Index && s.socket.Queue() == to.Queue
		})
	}
	if !same {
		return errors.New("suspend the AF_XDP path: its sockets are no longer those handed over")
	}
	for _, w := range workers {
		w.signal()
	}
	for _, w := range workers {
		w.ended.Wait()
		for _, s := range w.openSenders() {
			if s.socket == nil || s.failed {
				continue
			}
			if s.drain(); s.socket.Outstanding() > 0 {
				return fmt.Errorf("suspend the AF_XDP path: interface %d still sends", s.index)
			}
		}
	}
	for i, w := range workers {
		handed := &state.Workers[i]
		if s, err := w.socket.Statistics(); err == nil {
			w.noteLost(s)
		}
		handed.Noted = w.noted
		if handed.Filled, err = w.socket.Suspend(); err != nil {
			return err
		}
		for k, s := range w.ownSenders() {
			if handed.Senders[k].Filled, err = s.socket.Suspend(); err != nil {
				return err
			}
		}
	}
	a.suspended = true
	state.Suspended = true
	return h.write(state)
}

// Leave closes the path, and leaves suspended sockets to the process that continues with them.
func (a *AFXDP) Leave() error {
	a.mu.Lock()
	if a.suspended {
		for _, w := range a.workers() {
			w.foreign = true
		}
	}
	a.mu.Unlock()
	return a.Close()
}

// signal makes the worker end; wait for ended.
func (w *afxdpWorker) signal() {
	if w.signalled {
		return
	}
	w.signalled = true
	close(w.done)
	if w.waiter != nil {
		w.waiter.Wake()
	}
}

// inherit prepares the use of the previous process's sockets, and says whether they are those that the
// inputs need.
func (a *AFXDP) inherit(inputs map[int]bool) bool {
	h := a.opts.Inherited
	if h == nil || len(inputs) == 0 {
		return false
	}
	state, err := h.read()
	if err == nil {
		err = a.fits(&state, inputs)
	}
	if err != nil {
		a.disinherit(err)
		return false
	}
	a.handed = map[queueKey]*handedWorker{}
	for i := range state.Workers {
		w := &state.Workers[i]
		a.handed[queueKey{w.Index, w.Queue}] = w
	}
	return true
}

// disinherit gives the previous process's sockets up.
func (a *AFXDP) disinherit(why error) {
	a.log.Info("the sockets of the previous daemon are not inherited", "cause", why)
	if err := a.opts.Inherited.Close(); err != nil {
		a.log.Warn("close the sockets of the previous daemon", "error", err)
	}
	a.opts.Inherited, a.handed = nil, nil
}

// fits returns why inherited workers are not those that the inputs need.
func (a *AFXDP) fits(state *handedState, inputs map[int]bool) error {
	if state.Options != a.socketOptions() {
		return errors.New("other options")
	}
	need := 0
	for index := range inputs {
		iface, err := net.InterfaceByIndex(index)
		if err != nil {
			return err
		}
		queues, err := channelsOf(iface.Name)
		if err != nil {
			return err
		}
		need += min(queues.rx, a.opts.Queues)
		for _, w := range state.Workers {
			if w.Index != index {
				continue
			}
			if w.Queue >= min(queues.rx, a.opts.Queues) || !w.UMEM.MultiBuffer && frameSizeFor(iface.MTU) > w.UMEM.FrameSize {
				return fmt.Errorf("interface %s has changed", iface.Name)
			}
			need--
		}
	}
	for _, w := range state.Workers {
		if w.UMEM.Frames != a.opts.Frames || w.UMEM.HugePages != a.opts.HugePages || w.UMEM.Mode != a.opts.Mode || !inputs[w.Index] {
			return errors.New("other options or inputs")
		}
	}
	if need != 0 {
		return errors.New("other queues")
	}
	return nil
}

// inheritMemory maps memory and sockets of the previous process; they cannot be used before resume.
func (w *afxdpWorker) inheritMemory(handed *handedWorker) (err error) {
	opts, h := w.path.opts, w.path.opts.Inherited
	w.foreign = true
	w.memory = handed.UMEM
	w.memory.CheckOwnership = opts.CheckOwnership
	fd, err := h.duplicate(handed.Memory)
	if err != nil {
		return err
	}
	if w.umem, err = xsk.InheritUMEM(fd, w.memory); err != nil {
		return err
	}
	if err := w.takeFrames(); err != nil {
		return err
	}
	inherit := func(at, index, queue int, opts xsk.Options) (*xsk.Socket, error) {
		fd, err := h.duplicate(at)
		if err != nil {
			return nil, err
		}
		return xsk.Inherit(w.frames, fd, index, queue, opts)
	}
	if w.socket, err = inherit(handed.Socket, w.index, w.queue, w.path.socketOptions()); err != nil {
		return err
	}
	w.closesFirst()
	w.waiting = map[int]*xsk.Socket{}
	for _, s := range handed.Senders {
		if w.waiting[s.Index], err = inherit(s.Socket, s.Index, s.Queue, w.path.senderOptions()); err != nil {
			delete(w.waiting, s.Index)
			return err
		}
	}
	return nil
}

// closeWaiting closes inherited sockets that no sender uses.
func (w *afxdpWorker) closeWaiting() error {
	var errs []error
	for _, s := range w.waiting {
		errs = append(errs, s.Close())
	}
	w.waiting = nil
	return errors.Join(errs...)
}

// resume takes the inherited sockets over from the previous process.
func (a *AFXDP) resume(fresh []*afxdpWorker) error {
	inherited := 0
	for _, w := range fresh {
		if w.foreign {
			inherited++
		}
	}
	if inherited != len(a.handed) {
		return errors.New("not all could be mapped")
	}
	if err := a.opts.Suspend(); err != nil {
		return err
	}
	state, err := a.opts.Inherited.read()
	if err != nil {
		return err
	}
	if !state.Suspended {
		return errors.New("the previous daemon has not suspended them")
	}
	for _, w := range fresh {
		at := slices.IndexFunc(state.Workers, func(h handedWorker) bool { return h.Index == w.index && h.Queue == w.queue })
		if at < 0 {
			return errors.New("the previous daemon has suspended others")
		}
		handed := &state.Workers[at]
		w.noted = handed.Noted
		if err := errors.Join(w.socket.Resume(handed.Filled), w.closeWaiting()); err != nil {
			return err
		}
		for _, s := range w.ownSenders() {
			at := slices.IndexFunc(handed.Senders, func(h handedSocket) bool { return h.Index == s.index && h.Queue == s.socket.Queue() })
			if at < 0 {
				continue // opened by this process
			}
			if err := s.socket.Resume(handed.Senders[at].Filled); err != nil {
				return err
			}
		}
	}
	for _, w := range fresh {
		w.foreign = false
	}
	err = a.opts.Inherited.Close()
	a.opts.Inherited, a.opts.TakeOver, a.handed = nil, nil, nil
	if err != nil {
		a.log.Warn("close the sockets of the previous daemon", "error", err)
	}
	return nil
}
