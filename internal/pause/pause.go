// Package pause makes clients wait in a listening socket's queue until this process accepts again,
// or another one that listens on the same socket.
package pause

import (
	"errors"
	"net"
	"os"
	"sync"
	"time"
)

// Gate is the state of one listener. Its methods may be called from any goroutine.
type Gate struct {
	setDeadline func(time.Time) error

	mu    sync.Mutex
	pause *pause // nil: not paused

	closing sync.Once
	closed  chan struct{}
}

type pause struct {
	resumed chan struct{} // closed when accepting resumes
	begun   chan struct{} // closed once Accept waits for it
	once    sync.Once
}

// NewGate returns the gate of a listener with this SetDeadline.
func NewGate(setDeadline func(time.Time) error) *Gate {
	return &Gate{setDeadline: setDeadline, closed: make(chan struct{})}
}

// Pause makes clients wait until resume is called, or another process accepts them. paused is
// closed once the caller of Accept waits too: it has received every connection accepted before.
func (g *Gate) Pause() (resume func(), paused <-chan struct{}) {
	p := &pause{resumed: make(chan struct{}), begun: make(chan struct{})}
	g.mu.Lock()
	g.pause = p
	g.mu.Unlock()
	_ = g.setDeadline(time.Unix(1, 0)) // wakes Accept; harmless if closed
	return sync.OnceFunc(func() {
		g.mu.Lock()
		g.pause = nil
		g.mu.Unlock()
		_ = g.setDeadline(time.Time{})
		close(p.resumed)
	}), p.begun
}

// Close ends a pause: the listener is about to be closed.
func (g *Gate) Close() { g.closing.Do(func() { close(g.closed) }) }

// Again handles an error of Accept: it returns nil, once accepting has resumed, if Accept is to be
// called again; otherwise the error for Accept's caller.
func (g *Gate) Again(err error) error {
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	g.mu.Lock()
	p := g.pause
	g.mu.Unlock()
	if p == nil {
		return nil
	}
	p.once.Do(func() { close(p.begun) })
	select {
	case <-p.resumed:
		return nil
	case <-g.closed:
		return net.ErrClosed
	}
}

// Listener is a TCP listener with a Gate.
type Listener struct {
	*net.TCPListener
	*Gate
}

// Listen adds a Gate to a listener.
func Listen(l *net.TCPListener) *Listener { return &Listener{l, NewGate(l.SetDeadline)} }

// Accept is net.TCPListener's, with support for pauses.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		c, err := l.TCPListener.Accept()
		if err == nil {
			return c, nil
		}
		if err := l.Again(err); err != nil {
			return nil, err
		}
	}
}

// Close stops listening.
func (l *Listener) Close() error {
	l.Gate.Close()
	return l.TCPListener.Close()
}
