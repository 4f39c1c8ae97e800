package control

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync/atomic"
	"time"

	"xdpcast/internal/events"
)

// Limits of the API.
const (
	// MaxBody is the longest request body in bytes; 100,000 rules fit.
	MaxBody = 32 << 20
	// DefaultMaxConns is Options.MaxConns unless set.
	DefaultMaxConns = 64

	maxHeader = 16 << 10
	// maxRuleBody limits the body of a single rule, whose longest part are the groups of join=: everybody
	// who may read can have one checked.
	maxRuleBody = 1 << 20
)

// Timeouts limit every phase of a connection: a slow client cannot hold one open. The zero value of
// a field means its default.
type Timeouts struct {
	Header time.Duration // from connecting to the end of the request header; 5 s
	Read   time.Duration // to the end of the request body; 30 s
	Write  time.Duration // from the end of the header to the end of the answer, including the work; 60 s
	Idle   time.Duration // between two requests; 30 s
	Grace  time.Duration // for requests in progress at shutdown; 5 s
}

// Options configures a Server; the zero value is usable.
type Options struct {
	// Log receives refused connections and every change with its author; nil discards.
	Log *slog.Logger
	// ReadGroups are the group ids whose members may read; none by default.
	ReadGroups []uint32
	// MaxConns limits simultaneous connections, separately for peers that may write, that may read,
	// and that may do neither.
	MaxConns int
	Timeouts Timeouts
	// Metrics answers GET /v1/metrics for peers that may read; nil: no such endpoint.
	Metrics http.Handler
	// Events answers GET /v1/events; nil: no such endpoint.
	Events *events.Log
	// Upgrade answers POST /v1/upgrade; nil: no such endpoint.
	Upgrade func(ctx context.Context, timeout time.Duration) (UpgradeResult, error)
	// Tap answers POST /v1/rules/NAME/tap; nil: no such endpoint.
	Tap Tapper
}

// Server serves a Backend. Create it with NewServer.
type Server struct {
	backend Backend
	opts    Options
	uid     uint32 // the daemon's own

	allow     func(r *http.Request, need access) error // replaces the check of the peer's access if not nil
	followers atomic.Int32
}

// NewServer returns a server of b that runs as the process's effective user.
func NewServer(b Backend, o Options) *Server {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	setDefault(&o.MaxConns, DefaultMaxConns)
	setDefault(&o.Timeouts.Header, 5*time.Second)
	setDefault(&o.Timeouts.Read, 30*time.Second)
	setDefault(&o.Timeouts.Write, 60*time.Second)
	setDefault(&o.Timeouts.Idle, 30*time.Second)
	setDefault(&o.Timeouts.Grace, 5*time.Second)
	return &Server{backend: b, opts: o, uid: uint32(os.Geteuid())}
}

func setDefault[T int | time.Duration](v *T, def T) {
	if *v == 0 {
		*v = def
	}
}

// Serve serves ln, a listener of unix sockets as made by Listen, until ctx ends; then it accepts no
// more connections, gives requests in progress Timeouts.Grace to finish and returns nil. It always
// closes ln.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	defer ln.Close()
	unixLn, ok := ln.(unixListener)
	if !ok {
		return errors.New("control: serve: the listener is not a unix socket, so that peers cannot be told apart")
	}

	// Requests in progress outlive ctx by the grace period.
	base, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	fresh := &newConns{conns: map[net.Conn]struct{}{}}
	srv := s.httpServer(base, fresh)

	served := make(chan error, 1)
	go func() {
		served <- srv.Serve(&limitListener{
			unixListener: unixLn, max: s.opts.MaxConns, access: s.accessOf, log: s.opts.Log,
		})
	}()
	select {
	case err := <-served:
		_ = srv.Close()
		return Errorf(KindFailed, "control: serve: %w", err)
	case <-ctx.Done():
	}

	fresh.closeAll()
	grace, stop := context.WithTimeout(base, s.opts.Timeouts.Grace)
	defer stop()
	if err := srv.Shutdown(grace); err != nil {
		s.opts.Log.Warn("control requests cut off at shutdown", "grace", s.opts.Timeouts.Grace)
		cancel()
		_ = srv.Close()
	}
	<-served
	return nil
}

func (s *Server) httpServer(base context.Context, fresh *newConns) *http.Server {
	return &http.Server{
		Handler:           s.handler(),
		BaseContext:       func(net.Listener) context.Context { return base },
		ConnContext:       connContext,
		ConnState:         fresh.track,
		ReadHeaderTimeout: s.opts.Timeouts.Header,
		ReadTimeout:       s.opts.Timeouts.Read,
		WriteTimeout:      s.opts.Timeouts.Write,
		IdleTimeout:       s.opts.Timeouts.Idle,
		MaxHeaderBytes:    maxHeader,

		DisableGeneralOptionsHandler: true, // it would not use the API's errors
		ErrorLog:                     slog.NewLogLogger(s.opts.Log.Handler(), slog.LevelWarn),
	}
}

// connContext passes the peer's credentials to the requests of its connection.
func connContext(ctx context.Context, c net.Conn) context.Context {
	if pc, ok := c.(*peerConn); ok {
		return withConn(ctx, pc)
	}
	return ctx
}

func (s *Server) accessOf(p peer) access { return p.access(s.uid, s.opts.ReadGroups) }
