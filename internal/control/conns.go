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
	release func() // releases the slot, once
}

// Write converts errors that net/http answers itself to API errors.
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

// CloseWrite makes net/http wait for a client that is still sending a refused body.
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

// unixListener is a *Listener or a *net.UnixListener.
type unixListener interface {
	net.Listener
	AcceptUnix() (*net.UnixConn, error)
}

// limitListener accepts at most max simultaneous connections for each level of access, so that
// peers without access cannot lock out others. A connection over the limit is answered and closed
// at once.
type limitListener struct {
	unixListener
	max    int
	access func(peer) access
	log    *slog.Logger

	mu   sync.Mutex
	open [accessLevels]int

	refused [accessLevels]refusals // of Accept, called by one goroutine
}

// refusalPause is the minimum interval of logging refused connections, for each level of access: a
// client that connects in a loop must not fill the log.
const refusalPause = 10 * time.Second

// refusals rate-limits the log of refused connections.
type refusals struct {
	logged time.Time // the last one
	silent int       // since then
}

// log returns whether to log a refusal, and how many were suppressed before it.
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

// refuse answers without reading the request. The answer fits the socket's buffer; the deadline is
// a safeguard.
func refuse(c *net.UnixConn, max int) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(100 * time.Millisecond))
	_, _ = c.Write(rawAnswer(http.StatusServiceUnavailable, Errorf(KindUnavailable, "too many connections: %d are open", max)))
}

// rawAnswer is a complete answer, after which the connection is closed.
func rawAnswer(status int, err error) []byte {
	body := errorBody(err)
	return fmt.Appendf(nil, "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s",
		status, http.StatusText(status), len(body), body)
}

// ownError is the answer to send instead of one that net/http generates itself for requests without
// a handler; otherwise nil. Those have only these two headers, or are a bare 417, and come in one
// write; JSON contains no line break that could look like it.
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

// CallerUID returns the user for whom the server calls its backend, as reported by the kernel;
// false if the call is not from the API.
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

// WithCause records why the daemon itself calls its backend: a signal, a changed file.
func WithCause(ctx context.Context, cause string) context.Context {
	return context.WithValue(ctx, causeKey{}, cause)
}

// Cause returns the cause set by WithCause, empty if none.
func Cause(ctx context.Context) string {
	cause, _ := ctx.Value(causeKey{}).(string)
	return cause
}

// newConns tracks the connections that have not sent a request yet: a graceful shutdown need not
// wait for them.
type newConns struct {
	mu    sync.Mutex
	conns map[net.Conn]struct{}
	done  bool
}

// track is a callback for http.Server.ConnState.
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
