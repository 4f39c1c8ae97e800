package control

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// peerConn is an accepted connection with its peer.
type peerConn struct {
	net.Conn
	peer    peer
	access  access
	release func() // gives the slot back, once
}

func (c *peerConn) Close() error {
	err := c.Conn.Close()
	c.release()
	return err
}

// limitListener accepts at most max connections at once for each level of
// access, so that peers who may do nothing cannot keep out those who may. A
// connection over the limit is answered and closed at once.
type limitListener struct {
	*net.UnixListener
	max    int
	access func(peer) access
	log    *slog.Logger

	mu   sync.Mutex
	open [accessLevels]int
}

// Accept returns a *peerConn.
func (l *limitListener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		p, err := peerOf(c)
		if err != nil {
			l.log.Warn("control connection refused", "err", err)
			c.Close()
			continue
		}
		level := l.access(p)
		if !l.take(level) {
			l.log.Warn("control connection refused", "err", "too many connections", "uid", p.uid, "pid", p.pid, "max", l.max)
			refuse(c, l.max)
			continue
		}
		release := sync.OnceFunc(func() { l.give(level) })
		return &peerConn{Conn: c, peer: p, access: level, release: release}, nil
	}
}

func (l *limitListener) take(a access) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open[a] >= l.max {
		return false
	}
	l.open[a]++
	return true
}

func (l *limitListener) give(a access) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open[a]--
}

// refuse answers without reading the request. The answer fits the socket's
// buffer; the deadline is for the case that it should not.
func refuse(c *net.UnixConn, max int) {
	defer c.Close()
	body := errorBody(Errorf(KindUnavailable, "too many connections: %d are open", max))
	_ = c.SetDeadline(time.Now().Add(100 * time.Millisecond))
	_, _ = io.WriteString(c, fmt.Sprintf("HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s",
		http.StatusServiceUnavailable, http.StatusText(http.StatusServiceUnavailable), len(body), body))
}

// connKey is the context key of a request's *peerConn.
type connKey struct{}

func withConn(ctx context.Context, c *peerConn) context.Context {
	return context.WithValue(ctx, connKey{}, c)
}

func connOf(ctx context.Context) (*peerConn, bool) {
	c, ok := ctx.Value(connKey{}).(*peerConn)
	return c, ok
}

// newConns keeps the connections that have not sent a request yet: a graceful
// shutdown has nothing to wait for on them.
type newConns struct {
	mu    sync.Mutex
	conns map[net.Conn]struct{}
	done  bool
}

// track is an http.Server.ConnState.
func (n *newConns) track(c net.Conn, state http.ConnState) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if state != http.StateNew {
		delete(n.conns, c)
		return
	}
	if n.done {
		c.Close()
		return
	}
	n.conns[c] = struct{}{}
}

func (n *newConns) closeAll() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.done = true
	for c := range n.conns {
		c.Close()
	}
}
