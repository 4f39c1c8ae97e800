package forward

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/pkg/fanout"
)

// fanoutWorker passes the frames of one socket to its engine.
type fanoutWorker struct {
	engine   *Engine
	socket   *fanout.Worker
	group    *fanoutGroup
	number   int
	wait     func(*fanout.Worker) (*fanout.Block, error)
	log      *slog.Logger
	failures atomic.Uint64
	// since is the time, in ns of the wall clock, before which received packets are discarded; 0: none.
	since     int64
	discarded atomic.Uint64
	// worked says that a block was forwarded since the last failure.
	worked    bool
	boosted   *boosted   // of its thread
	placement *placement // of its thread
}

// run works until the group is closed. It restarts after any failure.
func (w *fanoutWorker) run() {
	runtime.LockOSThread() // the thread ends with the goroutine
	if w.group.place != nil {
		w.placement = w.group.place(w.log)
		defer w.placement.leave()
	}
	if err := setPriority(w.group.priority); err != nil {
		w.log.Warn("worker has no real-time priority", "error", err)
	} else if w.group.priority > 0 {
		defer clearPriority()
	} else {
		w.boosted = w.group.boost.join(-1, w.placement, w.log)
		defer w.boosted.leave()
	}
	pause := firstPause
	var last string
	for {
		err := w.work()
		if errors.Is(err, os.ErrClosed) {
			return
		}
		w.failures.Add(1)
		if w.worked {
			pause, last = firstPause, ""
		}
		if err.Error() != last {
			w.log.Error("worker failed, and is started again", "error", err)
			last = err.Error()
		}
		w.worked = false
		select {
		case <-w.group.done:
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, lastPause)
	}
}

// work forwards blocks until something fails.
func (w *fanoutWorker) work() (err error) {
	defer func() {
		if cause := recover(); cause != nil {
			err = fmt.Errorf("panic: %v", cause)
			w.log.Error("worker panicked", "cause", cause, "stack", string(debug.Stack()))
		}
		w.engine.abandon()
	}()
	for {
		block, err := w.wait(w.socket)
		w.account(false)
		switch {
		case err == nil:
			w.forward(block)
			w.account(true)
			w.worked = true
		case errors.Is(err, unix.ENETDOWN):
			w.log.Info("interface is down")
		case errors.Is(err, fanout.ErrWoken):
		default:
			return err
		}
	}
}

// account says that the worker ran, or slept.
func (w *fanoutWorker) account(ran bool) {
	now := time.Now()
	w.boosted.account(now, ran)
	w.placement.look(now)
}

func (w *fanoutWorker) forward(block *fanout.Block) {
	e := w.engine
	e.committer = block
	e.Begin()
	now := time.Now()
	clock, wall := e.set.Clock(now), now.UnixNano()
	ethernet := w.group.group.Ethernet()
	var f fanout.Frame
	for block.Next(&f) {
		if w.discards(f.Time) {
			continue
		}
		// A checksum that cannot be completed stays wrong, and the receiver drops the packet.
		f.CompleteChecksum()
		at := clock - age(wall, f.Time)
		if !ethernet {
			e.Packet(w.group.index, f.Data, at)
			continue
		}
		f.RestoreVLAN()
		e.Frame(w.group.index, f.Data, at)
	}
	e.End()
	block.Release()
}

// age returns how long a frame has waited, in nanoseconds. It is 0 if the wall clock was
// set in between.
func age(wall, received int64) int64 {
	waited := wall - received
	if waited < 0 || waited > int64(time.Second) {
		return 0
	}
	return waited
}
