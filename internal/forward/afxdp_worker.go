package forward

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/account"
	"xdpcast/pkg/packet"
	"xdpcast/pkg/xsk"
)

// Sizes of a worker's rings and memory.
const (
	ringSize       = 2048 // of those for copies, and the least for receiving
	defaultFrames  = 4 * ringSize
	minFrames      = 3 * ringSize
	maxFrames      = 1 << 19 // 2 GB of the larger ones
	maxReceiveRing = 1 << 15
	receiveBatch   = batch
	// maxPacket is the longest packet of several frames.
	maxPacket = 64 << 10
	// joinedSize is the memory in which such packets are joined.
	joinedSize = 16 * maxPacket
)

// How long a worker sleeps when no packets arrive: with frames in flight, whose completion
// does not wake it, and without.
const (
	shortSleep = time.Millisecond
	longSleep  = 500 * time.Millisecond
)

// noteEvery is the interval at which an idle worker saves its socket's losses, which would
// otherwise be forgotten if the process is killed.
const noteEvery = time.Second

// afxdpWorker passes the frames of one queue to its engine.
type afxdpWorker struct {
	path       *AFXDP
	index      int
	queue      int
	cpu        int // -1: any
	name       string
	log        *slog.Logger
	done       chan struct{} // closed to end it
	waiter     *xsk.Waiter
	engine     *Engine
	umem       *xsk.UMEM
	memory     xsk.UMEMOptions // of umem
	area       []byte          // all of the UMEM
	shift      int             // log2 of the frame size
	ended      sync.WaitGroup
	fd         int
	failures   atomic.Uint64
	unclaimed  counter
	account    *account.Counters // of the input, losses included
	noFrame    *account.Cell
	ringFull   *account.Cell
	ruleGone   *account.Cell
	noted      xsk.Statistics // already in the account
	notedAt    time.Time
	received   atomic.Uint64 // packets; written with mu held
	stopped    atomic.Bool   // failed, and not yet restarted
	lastError  atomic.Pointer[string]
	interfaceC atomic.Uint32 // interfaceState
	signalled  bool          // it is to end; under the path's lock
	boosted    *boosted      // of its thread
	placement  *placement    // of its thread
	// foreign: another process uses the sockets. waiting are inherited sockets for senders, by interface.
	foreign bool
	waiting map[int]*xsk.Socket

	// mu is held while forwarding frames, and while opening and closing sockets.
	mu          sync.Mutex
	frames      *xsk.Frames
	socket      *xsk.Socket
	multiBuffer bool
	senders     []*afxdpSender
	kept        int // frames for copies: the sum of the senders' limits

	descs  []xsk.Desc
	held   []xsk.Desc // of descs, not released yet
	parts  []xsk.Desc // returned by locate
	joined []byte     // packets of several frames
	whole  []joint    // their positions in joined
	// claims holds, for each frame, the batch in which the headers of a copy took its
	// room before the payload.
	claims  []uint64
	batch   uint64
	current int // frame being copied, -1 for none
	worked  bool
}

// joint is a packet in joined.
type joint struct {
	at, length int
	descs      []xsk.Desc
}

// States of a worker's interface.
const (
	interfaceUp uint32 = iota
	interfaceDown
	interfaceGone
)

// run works until the worker is closed, or its interface is gone. It restarts after any
// other failure.
func (w *afxdpWorker) run() {
	// The thread ends with the goroutine, and its affinity with it.
	runtime.LockOSThread()
	if w.cpu >= 0 {
		var set unix.CPUSet
		set.Set(w.cpu)
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			w.log.Warn("pin worker", "cpu", w.cpu, "error", err)
		}
	} else if w.path.opts.Place {
		w.placement = w.path.place(w.log)
		defer w.placement.leave()
	}
	if err := setPriority(w.path.opts.Priority); err != nil {
		w.log.Warn("worker has no real-time priority", "error", err)
	} else if w.path.opts.Priority > 0 {
		defer clearPriority()
	} else {
		w.boosted = w.path.opts.Boost.join(w.cpu, w.placement, w.log)
		defer w.boosted.leave()
	}
	pause := firstPause
	for {
		err := w.work()
		if errors.Is(err, os.ErrClosed) {
			return
		}
		// First, so that the rules' fallback takes over.
		err = errors.Join(err, w.path.opts.Loader.ClearSocket(w.index, w.queue))
		w.stopped.Store(true)
		w.failed(err)
		if errors.Is(err, unix.ENXIO) {
			w.interfaceC.Store(interfaceGone)
			return
		}
		if w.worked {
			pause = firstPause
		}
		w.worked = false
		for started := false; !started; {
			select {
			case <-w.done:
				return
			case <-time.After(pause):
			}
			pause = min(2*pause, lastPause)
			if err := w.path.opts.Loader.SetSocket(w.index, w.queue, w.fd); err != nil {
				w.failed(err)
				continue
			}
			started = true
		}
		w.stopped.Store(false)
	}
}

func (w *afxdpWorker) failed(err error) {
	w.failures.Add(1)
	text := err.Error()
	if last := w.lastError.Swap(&text); last == nil || *last != text {
		w.log.Error("worker failed", "error", err)
	}
}

// work forwards until something fails.
func (w *afxdpWorker) work() (err error) {
	idle := time.Time{}
	for {
		select {
		case <-w.done:
			return os.ErrClosed
		default:
		}
		n, err := w.turn()
		if err != nil {
			return err
		}
		now := time.Now()
		w.boosted.account(now, true)
		w.placement.look(now)
		if n > 0 {
			w.worked, idle = true, time.Time{}
			continue
		}
		if idle.IsZero() {
			idle = now
		}
		if now.Sub(idle) < w.path.opts.Spin {
			continue
		}
		if err := w.sleep(); err != nil {
			return err
		}
		idle = time.Time{}
	}
}

// turn forwards the received packets, and returns the number of their descriptors.
func (w *afxdpWorker) turn() (n int, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	defer func() {
		if cause := recover(); cause != nil {
			err = fmt.Errorf("panic: %v", cause)
			w.log.Error("worker panicked", "cause", cause, "stack", string(debug.Stack()))
			w.engine.abandon()
			w.release()
		}
	}()
	n = w.socket.Receive(w.descs)
	if n == 0 {
		w.wakeDriver()
		return 0, nil
	}
	w.held = w.descs[:n]
	w.forward(w.descs[:n])
	w.release()
	return n, nil
}

// finish forwards the packets now in the RX ring, in addition to the worker's own turns.
func (w *afxdpWorker) finish() {
	for total := 0; total < w.path.opts.receiveRing(); {
		n, err := w.turn()
		if n == 0 || err != nil {
			return // an error has been logged
		}
		total += n
	}
}

// release releases the received frames, and gives the kernel new ones.
func (w *afxdpWorker) release() {
	w.frames.ReleaseAll(w.held)
	w.held, w.current = nil, -1
	w.fill()
	w.wakeDriver()
}

// fill gives the kernel free frames for receiving, and keeps those that the senders may still
// take for copies.
func (w *afxdpWorker) fill() {
	kept := w.kept
	for _, s := range w.senders {
		if s.socket != nil {
			kept -= s.socket.Outstanding()
		}
	}
	w.socket.Fill(w.frames.Free() - max(kept, 0))
}

// wakeDriver makes the driver continue if it needs to be asked: in zero-copy mode after it
// ran out of frames, and in every turn with busy polling. Otherwise it costs nothing.
func (w *afxdpWorker) wakeDriver() {
	_ = w.socket.WakeRX() // Check reports errors
}

func (w *afxdpWorker) forward(descs []xsk.Desc) {
	e := w.engine
	e.Begin()
	w.batch++
	w.joined, w.whole = w.joined[:0], w.whole[:0]
	at := e.set.Clock(time.Now())
	packets := uint64(0)
	for len(descs) > 0 {
		var parts []xsk.Desc
		parts, descs = xsk.NextPacket(descs)
		packets++
		w.current = w.frameOf(parts[0].Addr)
		w.packet(parts, at)
	}
	w.current = -1
	w.received.Store(w.received.Load() + packets)
	e.End()
}

func (w *afxdpWorker) packet(parts []xsk.Desc, at int64) {
	frame := w.umem.Data(parts[0])
	if len(parts) > 1 {
		frame = w.join(parts)
	}
	h, ok := packet.Parse(frame)
	var r *Rule
	if ok {
		r = w.engine.handedOver(w.index, frame, &h, at)
	}
	if r == nil {
		w.unclaimed.add(1, uint64(len(frame)))
		w.ruleGone.Add(1, uint64(len(frame)))
		return
	}
	w.engine.Deliver(r, frame, &h, at)
}

// Fields of struct handover (bpf/include/handover.h).
const (
	handoverMark   = 0xff
	handoverMarkAt = 6
)

// handedOver returns the rule that the relay program found for a frame, or nil if the rule
// has been removed.
//
// The program identifies it by the number of its first output, which saves a lookup, and
// works for later fragments whose first one arrived on another queue. While rules change,
// the numbers of the engine and of the program differ for a moment, and a number can be
// reused by another rule: it is trusted only if the rule matches the frame. Otherwise the
// rule is looked up by the frame.
func (e *Engine) handedOver(index int, frame []byte, h *packet.Headers, at int64) *Rule {
	if frame[handoverMarkAt] != handoverMark {
		return nil
	}
	if h.Part == packet.FirstFragment {
		e.set.fragments.remember(index, h, at)
	}
	if r := e.now.table.ByFirstOutput(binary.NativeEndian.Uint32(frame)); r != nil && r.wants(index, h) {
		return r
	}
	port := h.DstPort
	if h.Part == packet.LaterFragment {
		if port = e.set.fragments.port(index, h, at); port == 0 {
			return nil
		}
	}
	return e.now.table.Lookup(index, h, port)
}

// wants says whether a packet matches the rule's input. The port of later fragments is
// unknown.
func (r *Rule) wants(index int, h *packet.Headers) bool {
	in := &r.rule.In
	if in.Index != index || in.VLAN != h.VLAN || in.OuterVLAN != h.OuterVLAN ||
		in.Source.IsValid() && in.Source != h.Src ||
		in.Port != 0 && in.Port != h.DstPort && h.Part != packet.LaterFragment {
		return false
	}
	if in.Len == 0 {
		return in.Group == h.Dst
	}
	p, err := h.Dst.Prefix(in.Len)
	return err == nil && p.Addr() == in.Group
}

// join copies a packet of several frames into contiguous memory. Copies sent by AF_XDP
// still use the frames.
func (w *afxdpWorker) join(parts []xsk.Desc) []byte {
	length := 0
	for i := range parts {
		length += int(parts[i].Len)
	}
	if length > maxPacket {
		return nil
	}
	if cap(w.joined) == 0 {
		w.joined = make([]byte, 0, joinedSize)
		w.whole = make([]joint, 0, receiveBatch)
	}
	if len(w.joined)+length > cap(w.joined) {
		w.engine.flush() // queued packets are in joined
		w.joined, w.whole = w.joined[:0], w.whole[:0]
	}
	at := len(w.joined)
	for i := range parts {
		w.joined = append(w.joined, w.umem.Data(parts[i])...)
	}
	w.whole = append(w.whole, joint{at, length, parts})
	return w.joined[at : at+length : at+length]
}

// locate returns the descriptors of a payload in the UMEM, or none if it is elsewhere. They
// are valid until the next call.
func (w *afxdpWorker) locate(payload []byte) []xsk.Desc {
	if at, ok := offset(payload, w.area); ok {
		w.parts = append(w.parts[:0], xsk.Desc{Addr: uint64(at), Len: uint32(len(payload))})
		return w.parts
	}
	at, ok := offset(payload, w.joined)
	if !ok {
		return nil
	}
	for i := range w.whole {
		j := &w.whole[i]
		if at >= j.at && at < j.at+j.length {
			return w.cut(j.descs, at-j.at, len(payload))
		}
	}
	return nil
}

// cut returns the descriptors of n bytes of a packet, starting at offset from.
func (w *afxdpWorker) cut(descs []xsk.Desc, from, n int) []xsk.Desc {
	w.parts = w.parts[:0]
	for _, d := range descs {
		skip := min(from, int(d.Len))
		from -= skip
		use := min(n, int(d.Len)-skip)
		n -= use
		if use > 0 {
			w.parts = append(w.parts, xsk.Desc{Addr: d.Addr + uint64(skip), Len: uint32(use)})
		}
	}
	if len(w.parts) >= xsk.MaxSegments {
		return nil // no room for the headers
	}
	return w.parts
}

func (w *afxdpWorker) frameOf(addr uint64) int { return int(addr >> w.shift) }

// claim says whether the headers of a copy can be written before its payload in the
// received frame: if it has room, all copies of the frame have been made, and none has
// taken the room yet.
func (w *afxdpWorker) claim(payload uint64, headers int) bool {
	frame := w.frameOf(payload)
	return int(payload)&(1<<w.shift-1) >= headers && frame != w.current && w.claims[frame] != w.batch
}

// sleep waits for frames, and checks senders and interface if none arrived.
func (w *afxdpWorker) sleep() error {
	timeout := longSleep
	if w.housekeep() {
		timeout = shortSleep
	}
	ready, err := w.waiter.Wait(timeout)
	now := time.Now()
	w.boosted.account(now, false)
	if err != nil || ready > 0 && w.interfaceC.Load() == interfaceUp {
		return err
	}
	err = w.socket.Check()
	switch {
	case err == nil:
		if w.interfaceC.Swap(interfaceUp) != interfaceUp {
			w.log.Info("interface is up")
		}
	case errors.Is(err, unix.ENETDOWN):
		if w.interfaceC.Swap(interfaceDown) != interfaceDown {
			w.log.Info("interface is down")
		}
	default:
		return err
	}
	return nil
}

// housekeep maintains the senders, and returns whether frames are in flight.
func (w *afxdpWorker) housekeep() (busy bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.senders {
		if s.housekeep() {
			busy = true
		}
	}
	w.fill()
	w.wakeDriver()
	if now := time.Now(); now.Sub(w.notedAt) >= noteEvery {
		w.notedAt = now
		if s, err := w.socket.Statistics(); err == nil { // otherwise Check reports the error
			w.noteLost(s)
		}
	}
	return busy
}
