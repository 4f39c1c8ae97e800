package xsk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Events of a socket to wait for; they can be combined.
type Events int16

const (
	// Readable: packets are in the RX ring.
	Readable Events = unix.POLLIN
	// Writable: at least half of the TX ring is empty. In copy mode, waiting for it also
	// sends, like Kick.
	Writable Events = unix.POLLOUT
)

// Waiter sleeps until one of several sockets has an event. It uses poll(2), so an idle
// process uses no CPU. It belongs to one goroutine, except for Wake.
//
// poll does not report that an interface is down or gone, nor that frames have
// completed: wait with a timeout, and call [Socket.Check].
type Waiter struct {
	fds   []unix.PollFd // the first is the eventfd that Wake increments
	count [8]byte       // read from it; the value is ignored

	mu    sync.Mutex // serializes Wake and Close
	event int        // -1 once closed
}

// NewWaiter makes a waiter of no sockets. The caller owns it and must Close it.
func NewWaiter() (*Waiter, error) {
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("make event for waiting: %w", err)
	}
	return &Waiter{event: event, fds: []unix.PollFd{{Fd: int32(event), Events: unix.POLLIN}}}, nil
}

// Set sets the events of a socket to wait for; 0 removes it. Remove a socket before
// closing it.
func (w *Waiter) Set(s *Socket, events Events) error {
	fd := s.FD()
	if fd < 0 {
		return fmt.Errorf("wait for socket: %w", os.ErrClosed)
	}
	if events&^(Readable|Writable) != 0 {
		return &OptionError{"events", events, "Readable, Writable, both or none"}
	}
	at := slices.IndexFunc(w.fds, func(p unix.PollFd) bool { return p.Fd == int32(fd) })
	switch {
	case at < 0 && events != 0:
		w.fds = append(w.fds, unix.PollFd{Fd: int32(fd), Events: int16(events)})
	case at > 0 && events != 0:
		w.fds[at].Events = int16(events)
	case at > 0:
		w.fds = slices.Delete(w.fds, at, at+1)
	}
	return nil
}

// Wait sleeps until an event, Wake, or the timeout; a negative timeout never expires.
// It returns how many sockets have events: 0 after Wake or the timeout.
func (w *Waiter) Wait(timeout time.Duration) (ready int, err error) {
	if w.closed() {
		return 0, fmt.Errorf("wait: %w", os.ErrClosed)
	}
	deadline := time.Now().Add(timeout)
	for {
		ms := -1
		if timeout >= 0 {
			ms = int(min(max(timeout, 0)+time.Millisecond-1, 24*time.Hour) / time.Millisecond)
		}
		n, err := unix.Poll(w.fds, ms)
		if err == nil {
			return w.events(n)
		}
		if !errors.Is(err, unix.EINTR) { // the runtime interrupts threads
			return 0, fmt.Errorf("wait for %d sockets: %w", len(w.fds)-1, err)
		}
		if timeout >= 0 {
			timeout = max(time.Until(deadline), 0)
		}
	}
}

// events consumes all calls of Wake so far, and counts the sockets.
func (w *Waiter) events(n int) (ready int, err error) {
	for _, p := range w.fds {
		if p.Revents&unix.POLLNVAL != 0 {
			return 0, fmt.Errorf("wait for a socket that was closed before it was taken out: %w", os.ErrClosed)
		}
	}
	if w.fds[0].Revents == 0 {
		return n, nil
	}
	if _, err := unix.Read(int(w.fds[0].Fd), w.count[:]); err != nil && !errors.Is(err, unix.EAGAIN) {
		return 0, fmt.Errorf("read event: %w", err)
	}
	return n - 1, nil
}

// Wake ends the current Wait, or the next one. It may be called from any goroutine, and
// after Close.
func (w *Waiter) Wake() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.event >= 0 {
		// It can fail only with the counter at its maximum, which wakes as well.
		_, _ = unix.Write(w.event, binary.NativeEndian.AppendUint64(nil, 1))
	}
}

// Close frees the waiter, but no socket. It may be called again.
func (w *Waiter) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.event < 0 {
		return nil
	}
	err := unix.Close(w.event)
	w.event = -1
	if err != nil {
		return fmt.Errorf("close waiter: %w", err)
	}
	return nil
}

func (w *Waiter) closed() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.event < 0
}
