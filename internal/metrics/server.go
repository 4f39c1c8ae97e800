package metrics

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/common/expfmt"

	"xdpcast/internal/control"
	"xdpcast/internal/events"
)

// Options configures a handler; the zero value is valid.
type Options struct {
	// Rules selects the rules that have metrics of their own; all by default.
	Rules Selection
	// Log receives warnings; nil discards them.
	Log *slog.Logger
	// Events are counted; nil: none.
	Events *events.Log
	// Reconciles, from NewReconciles, holds the durations of the control loop; nil: exported empty.
	Reconciles prometheus.Histogram
}

const (
	// scrapeTimeout bounds one reading of the relay.
	scrapeTimeout = 30 * time.Second
	// maxPageBytes limits the pages that clients have not read, besides the latest: with 100,000 rules of four outputs
	// one takes 140 MB.
	maxPageBytes = 32 << 20
)

// Handler serves /metrics, /healthz and /readyz of a relay over HTTP. It only reads.
func Handler(b *Backend, o Options) http.Handler {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Reconciles == nil {
		o.Reconciles = NewReconciles()
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", scrapes(b, o))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		// The control loop answers Status, so an answer proves that it runs.
		_, err := b.Status(r.Context())
		answer(w, err)
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) { answer(w, ready(r.Context(), b)) })
	return mux
}

// scrapes serves the relay's metrics, then client_golang's own.
func scrapes(b *Backend, o Options) http.HandlerFunc {
	c := &collector{definitions: newDefinitions(), events: o.Events, backend: b, selected: o.Rules, timeout: scrapeTimeout}
	registry := prometheus.NewRegistry()
	registry.MustRegister(o.Reconciles, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	p := &pages{most: maxPageBytes, make: func(ctx context.Context) [][]byte {
		parts := c.collect(ctx).parts()
		families, err := registry.Gather()
		if err != nil {
			o.Log.Warn("metrics of the process", "error", err)
		}
		var rest bytes.Buffer
		for _, family := range families {
			if _, err := expfmt.MetricFamilyToText(&rest, family); err != nil {
				o.Log.Warn("metrics of the process", "error", err)
			}
		}
		return append(parts, rest.Bytes())
	}}
	return p.ServeHTTP
}

func answer(w http.ResponseWriter, err error) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	if err != nil {
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprintln(w, err)
		return
	}
	fmt.Fprintln(w, "ok")
}

// maxReasons is the maximum number of rules that /readyz names.
const maxReasons = 20

// ready returns why not all rules are active; nil if they are.
func ready(ctx context.Context, b control.Backend) error {
	status, err := b.Status(ctx)
	switch {
	case err != nil:
		return err
	case !status.Ready:
		return errors.New("the rules are not loaded yet")
	case status.Pending+status.Failed == 0:
		return nil
	}
	rules, err := b.Rules(ctx)
	if err != nil {
		return err
	}
	lines := []string{fmt.Sprintf("%d of %d rules are not active", status.Pending+status.Failed, status.Rules)}
	for i := range rules {
		if r := &rules[i]; r.State != control.StateActive {
			if len(lines) > maxReasons {
				lines = append(lines, "...")
				break
			}
			lines = append(lines, fmt.Sprintf("rule %s: %s: %s", r.Name, r.State, r.Reason))
		}
	}
	return errors.New(strings.Join(lines, "\n"))
}

// ListenOptions says who may connect, and how.
type ListenOptions struct {
	// Public allows an address that is not loopback without TLS.
	Public bool
	// Certificate is for TLS; nil: cleartext.
	Certificate *Certificate
	// Open opens the listener, before TLS; nil: net.Listen.
	Open func(network, addr string) (net.Listener, error)
}

// ErrNotLoopback is matched by Listen's error for an address that others could read from in
// cleartext.
var ErrNotLoopback = errors.New("not a loopback address")

// Listen opens a TCP listener for a handler. The address must be a loopback one unless o
// allows others: the metrics name every rule and address of the plant.
func Listen(addr string, o ListenOptions) (net.Listener, error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, fmt.Errorf("address %q: want HOST:PORT, such as 127.0.0.1:9464: %w", addr, err)
	}
	ip := net.ParseIP(host)
	loopback := host == "localhost" || ip != nil && ip.IsLoopback()
	open := o.Open
	if open == nil {
		open = net.Listen
	}
	if !loopback && !o.Public && o.Certificate == nil {
		return nil, fmt.Errorf("address %s: %w: everybody there could read all rules and counters; want TLS (--tls-cert and --tls-key), or --listen-public", addr, ErrNotLoopback)
	}
	ln, err := open("tcp", addr)
	if err != nil || o.Certificate == nil {
		return ln, err
	}
	return tls.NewListener(ln, o.Certificate.config()), nil
}

// maxConns limits the connections. Helper sockets of memberships leave at most 256 descriptors to the rest
// of the process (package membership): if clients took these, rules could not be added, nor workers
// started again.
const maxConns = 128

// Busy tracks the connections of a server, and those on which a request is expected or being
// answered. The zero value is ready for use.
type Busy struct {
	mu    sync.Mutex
	conns map[net.Conn]connState
	count uint64 // of changes of state
}

// connState is the state of a connection, and the number of the change that led to it.
type connState struct {
	state http.ConnState
	since uint64
}

// track is a callback for http.Server.ConnState. The server calls it with StateNew before it accepts
// the next connection.
func (b *Busy) track(c net.Conn, state http.ConnState) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if state == http.StateClosed || state == http.StateHijacked {
		delete(b.conns, c)
		return
	}
	if b.conns == nil {
		b.conns = map[net.Conn]connState{}
	}
	b.count++
	b.conns[c] = connState{state, b.count}
}

// room says whether there is room for another connection among most. If there is none, it closes the
// one that has been idle for the longest time.
func (b *Busy) room(most int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.conns) < most {
		return true
	}
	var idle net.Conn
	for c, s := range b.conns {
		if s.state == http.StateIdle && (idle == nil || s.since < b.conns[idle].since) {
			idle = c
		}
	}
	if idle == nil {
		return false
	}
	delete(b.conns, idle)
	go idle.Close() // may take seconds with TLS
	return true
}

// limitListener refuses connections for which there is no room.
type limitListener struct {
	net.Listener
	busy *Busy
	max  int
	log  *slog.Logger
	told time.Time // when a refusal was logged
}

// refusalPause is the least interval of logging refused connections.
const refusalPause = 10 * time.Second

// Accept is the listener's. It is called by one goroutine.
func (l *limitListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil || l.busy.room(l.max) {
			return c, err
		}
		if time.Since(l.told) >= refusalPause {
			l.told = time.Now()
			l.log.Warn("connection refused", "peer", c.RemoteAddr().String(), "cause", fmt.Sprintf("%d are open", l.max))
		}
		_ = c.Close()
	}
}

// Wait waits until there are none, or ctx ends.
func (b *Busy) Wait(ctx context.Context) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		n := b.busy()
		if n == 0 {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// busy is the number of connections on which a request is expected or being answered.
func (b *Busy) busy() (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range b.conns {
		if s.state == http.StateNew || s.state == http.StateActive {
			n++
		}
	}
	return n
}

// Serve serves ln until ctx ends, and closes it. No client can delay it: every phase of a
// connection has a timeout, and their number is limited.
func Serve(ctx context.Context, ln net.Listener, h http.Handler, busy *Busy, log *slog.Logger) error {
	server := &http.Server{
		Handler: h, ConnState: busy.track, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		WriteTimeout: 2 * scrapeTimeout, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	done := make(chan struct{})
	stopped := context.AfterFunc(ctx, func() {
		defer close(done)
		grace, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if err := server.Shutdown(grace); err != nil {
			_ = server.Close()
		}
	})
	if err := server.Serve(&limitListener{Listener: ln, busy: busy, max: maxConns, log: log}); !errors.Is(err, http.ErrServerClosed) {
		stopped()
		return fmt.Errorf("serve metrics: %w", err)
	}
	<-done
	return nil
}
