package control

import (
	"bytes"
	"context"
	"fmt"
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

// Write turns errors that net/http answers by itself into those of the API.
func (c *peerConn) Write(b []byte) (int, error) {
	answer := ownError(b)
	if answer == nil {
		return c.Conn.Write(b)
	}
	if _, err := c.Conn.Write(answer); err != nil {
		return 0, err
	}
	return len(b), nil
}

// CloseWrite has net/http wait for a client that is still sending what was refused.
func (c *peerConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

func (c *peerConn) Close() error {
	err := c.Conn.Close()
	c.release()
	return err
}

// unixListener is a *Listener, or a *net.UnixListener.
type unixListener interface {
	net.Listener
	AcceptUnix() (*net.UnixConn, error)
}

// limitListener accepts at most max connections at once for each level of
// access, so that peers who may do nothing cannot keep out those who may. A
// connection over the limit is answered and closed at once.
type limitListener struct {
	unixListener
	max    int
	access func(peer) access
	log    *slog.Logger

	mu   sync.Mutex
	open [accessLevels]int

	refused [accessLevels]refusals // of Accept, which one goroutine calls
}

// refusalPause is how often refused connections are logged, for each level of access:
// a client that connects in a loop must not fill the log.
const refusalPause = 10 * time.Second

// refusals says which refused connections to log.
type refusals struct {
	logged time.Time // the last one
	silent int       // since then
}

// log says whether to log one at a time, and how many were not logged before it.
func (r *refusals) log(now time.Time) (silent int, ok bool) {
	if !r.logged.IsZero() && now.Sub(r.logged) < refusalPause {
		r.silent++
		return 0, false
	}
	silent, r.silent, r.logged = r.silent, 0, now
	return silent, true
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
			l.logRefusal(accessNone, "err", err)
			c.Close()
			continue
		}
		level := l.access(p)
		if !l.take(level) {
			l.logRefusal(level, "err", "too many connections", "uid", p.uid, "pid", p.pid, "max", l.max)
			refuse(c, l.max)
			continue
		}
		release := sync.OnceFunc(func() { l.give(level) })
		return &peerConn{Conn: c, peer: p, access: level, release: release}, nil
	}
}

func (l *limitListener) logRefusal(level access, args ...any) {
	silent, ok := l.refused[level].log(time.Now())
	if !ok {
		return
	}
	if silent > 0 {
		args = append(args, "not_logged_before", silent)
	}
	l.log.Warn("control connection refused", args...)
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
	_ = c.SetDeadline(time.Now().Add(100 * time.Millisecond))
	_, _ = c.Write(rawAnswer(http.StatusServiceUnavailable, Errorf(KindUnavailable, "too many connections: %d are open", max)))
}

// rawAnswer is a whole answer, after which the connection is closed.
func rawAnswer(status int, err error) []byte {
	body := errorBody(err)
	return fmt.Appendf(nil, "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s",
		status, http.StatusText(status), len(body), body)
}

// ownError is the answer to send in place of one that net/http makes by itself for
// requests that come to no handler, nil for every other. Those have these two headers alone,
// or are a bare 417, and come in one write; JSON holds no line break to look like it.
func ownError(b []byte) []byte {
	head, text, whole := bytes.Cut(b, []byte("\r\n\r\n"))
	line, headers, _ := bytes.Cut(head, []byte("\r\n"))
	var minor, status int
	if n, err := fmt.Sscanf(string(line[:min(len(line), len("HTTP/1.1 400"))]), "HTTP/1.%d %d", &minor, &status); !whole || n != 2 || err != nil || status < 400 {
		return nil
	}
	switch {
	case status == http.StatusExpectationFailed:
		return rawAnswer(status, Errorf(KindInvalid, "header Expect: want 100-continue"))
	case string(headers) != "Content-Type: text/plain; charset=utf-8\r\nConnection: close":
		return nil
	case status == http.StatusRequestHeaderFieldsTooLarge:
		return rawAnswer(status, Errorf(KindTooLarge, "header of the request: want at most %d bytes", maxHeader))
	}
	return rawAnswer(status, Errorf(KindInvalid, "request: %s", oneLine(string(text), 200)))
}

// connKey is the context key of a request's *peerConn.
type connKey struct{}

func withConn(ctx context.Context, c *peerConn) context.Context {
	return context.WithValue(ctx, connKey{}, c)
}

// CallerUID returns the user on whose behalf the server calls its backend, as the kernel
// knows it; false when nobody asked through the API.
func CallerUID(ctx context.Context) (uid uint32, ok bool) {
	c, ok := connOf(ctx)
	if !ok {
		return 0, false
	}
	return c.peer.uid, true
}

func connOf(ctx context.Context) (*peerConn, bool) {
	c, ok := ctx.Value(connKey{}).(*peerConn)
	return c, ok
}

// causeKey is the context key of a Cause.
type causeKey struct{}

// WithCause says why the daemon itself calls its backend: a signal, a file that has changed.
func WithCause(ctx context.Context, cause string) context.Context {
	return context.WithValue(ctx, causeKey{}, cause)
}

// Cause returns what WithCause was given, empty for nothing.
func Cause(ctx context.Context) string {
	cause, _ := ctx.Value(causeKey{}).(string)
	return cause
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
