package fanout

import (
	"encoding/binary"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// goneCheck is the interval, in milliseconds, at which a worker whose interface went
// down checks that it still exists: the kernel reports only that it went down.
const goneCheck = 1000

// Worker is one socket of a group, or two with a frame ring. One goroutine at a
// time may use Wait and the block that it returns; Wake may be called from any.
// When a goroutine has ended, another may take over, even if the first left a block
// unreleased: Wait releases it, and returns the frames that arrived meanwhile and
// those of the frame ring that the first had not read.
type Worker struct {
	group *Group
	fd    int
	event int // eventfd: Wake or Close was called

	ring      []byte
	blockSize int
	index     int // of the next block to be handed over
	cursor    *cursor
	skip      int // frames of that block committed by another process
	frames    *frameRing
	fds       []unix.PollFd // of the blocks, of event, and of the frame ring
	// down is set from ENETDOWN until frames arrive again.
	down     bool
	deadline time.Time // of Wait; zero: none

	// mu is held during Wait, and afterwards while the goroutine holds a block: Close
	// takes it, so that no reader is left in the ring.
	mu    sync.Mutex
	block Block

	closed, woken        atomic.Bool
	truncated, malformed atomic.Uint64
	total                Stats // of the kernel's counters; protected by Group.mu
}

// Wait waits for the next block of frames, after releasing the last one if the
// caller has not. It blocks the goroutine's thread; waiting costs only the
// kernel's timer.
//
// Errors: [ErrWoken] after Wake; [os.ErrClosed] after Group.Close;
// [os.ErrDeadlineExceeded] after the time of SetDeadline; an [*Error] with
// ENETDOWN, once, when the interface goes down (call Wait again: it resumes once
// the interface is up), and with ENODEV, each time, when the interface is gone for
// good, which may take a second to detect. Blocks filled earlier come before all
// of these except ErrWoken and os.ErrClosed.
func (w *Worker) Wait() (*Block, error) {
	w.block.Release()
	w.mu.Lock()
	for {
		if err := w.interrupted(); err != nil {
			w.mu.Unlock()
			return nil, err
		}
		if w.take() {
			return &w.block, nil
		}
		if err := w.poll(); err != nil {
			w.mu.Unlock()
			return nil, err
		}
	}
}

func (w *Worker) interrupted() error {
	if w.closed.Load() {
		return os.ErrClosed
	}
	if w.woken.CompareAndSwap(true, false) {
		return ErrWoken
	}
	return nil
}

// take takes over the frames that have arrived, and returns false if there are none.
func (w *Worker) take() bool {
	r := w.frames
	block, single := w.readyBlock(), 0
	if block == nil && r != nil {
		r.waits = false
		if single = r.ready(0, mostSingle); single == 0 {
			r.admit()
		} else if block = w.readyBlock(); block == nil && w.blockPending() {
			r.waits = true
			return false
		}
	}
	if block == nil && single == 0 {
		return false
	}
	if block != nil && r != nil {
		single = r.settle()
		r.rate(block)
	}
	w.down = false
	w.block.open(block, single)
	return true
}

// nextBlock returns the block that the kernel is filling or has handed over.
func (w *Worker) nextBlock() []byte { return w.ring[w.index*w.blockSize:][:w.blockSize] }

// readyBlock returns the next block if the kernel has handed it over, nil otherwise.
func (w *Worker) readyBlock() []byte {
	block := w.nextBlock()
	// This load precedes the reads of the block.
	if atomic.LoadUint32(blockStatus(block))&unix.TP_STATUS_USER == 0 {
		return nil
	}
	return block
}

// blockPending says whether the block that the kernel is filling has frames: the kernel
// counts them before it writes them.
func (w *Worker) blockPending() bool { return atomic.LoadUint32(blockFrames(w.nextBlock())) != 0 }

// SetDeadline sets the time after which Wait returns [os.ErrDeadlineExceeded] if there is
// no block; the zero time, the default, means no deadline. Only the goroutine that calls
// Wait may call it. Ready blocks are returned after the deadline, too.
func (w *Worker) SetDeadline(t time.Time) { w.deadline = t }

// pollTimeout returns how long poll may wait, in milliseconds; negative: forever.
func (w *Worker) pollTimeout() (int, error) {
	timeout := -1
	if w.down {
		timeout = goneCheck
	}
	if w.deadline.IsZero() {
		return timeout, nil
	}
	left := time.Until(w.deadline)
	if left <= 0 {
		return 0, os.ErrDeadlineExceeded
	}
	ms := int((min(left, 24*time.Hour) + time.Millisecond - 1) / time.Millisecond)
	if timeout >= 0 {
		ms = min(ms, timeout)
	}
	return ms, nil
}

// poll waits until there may be a block, or Wait is interrupted.
func (w *Worker) poll() error {
	timeout, err := w.pollTimeout()
	if err != nil {
		return err
	}
	if r := w.frames; r != nil {
		w.fds[2].Fd = int32(r.fd)
		if r.waits {
			w.fds[2].Fd = -1 // its frames would end poll at once
		}
	}
	n, err := w.group.sys.poll(w.fds, timeout)
	switch {
	case err == unix.EINTR:
		return nil
	case err != nil:
		return w.group.fail(StepReceive, err)
	case n == 0 && w.down:
		return w.checkGone()
	case n == 0:
		return nil // the deadline
	}
	if w.fds[1].Revents != 0 {
		w.drainEvent()
	}
	for _, i := range []int{0, 2} {
		if i < len(w.fds) && w.fds[i].Revents&^unix.POLLIN != 0 {
			return w.socketError()
		}
	}
	return nil
}

func (w *Worker) checkGone() error {
	link, err := w.group.sys.boundTo(w.fd)
	if err == nil && link.Ifindex < 0 {
		err = unix.ENODEV
	}
	if err != nil {
		return w.group.fail(StepReceive, err)
	}
	return nil
}

// socketError reads the error that poll reported; reading clears it. The kernel
// notifies the socket of the blocks first, and then that of the frame ring.
func (w *Worker) socketError() (first error) {
	known := w.down
	for i, fd := range w.sockets() {
		errno, err := w.group.sys.getInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil {
			if errno == 0 || i > 0 && known {
				continue
			}
			err = unix.Errno(errno)
		}
		if first == nil {
			first = w.group.fail(StepReceive, err)
		}
		w.down = true
	}
	return first
}

// drainEvent makes the eventfd unreadable. Nothing else reads it, so the only
// possible error is that it is unreadable already.
func (w *Worker) drainEvent() {
	var count [8]byte
	_, _ = unix.Read(w.event, count[:])
}

// Wake makes the current Wait, or the next one, return ErrWoken.
func (w *Worker) Wake() {
	w.group.mu.Lock()
	defer w.group.mu.Unlock()
	if !w.group.closed {
		w.woken.Store(true)
		w.wake()
	}
}

// wake ends a poll. The caller holds Group.mu, and the worker is open.
func (w *Worker) wake() {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	// The only possible error, EAGAIN for a counter at its maximum, means that it is
	// readable already.
	_, _ = unix.Write(w.event, one[:])
}
