package metrics

import (
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
	// scrapeTimeout bounds one reading of the relay, and maxScrapes the concurrent ones: with
	// 100,000 rules a scrape takes memory as well as time.
	scrapeTimeout = 30 * time.Second
	maxScrapes    = 2
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
	free := make(chan struct{}, maxScrapes)
	return func(w http.ResponseWriter, r *http.Request) {
		select {
		case free <- struct{}{}:
			defer func() { <-free }()
		default:
			http.Error(w, fmt.Sprintf("%d scrapes are running already: want fewer at once", maxScrapes), http.StatusServiceUnavailable)
			return
		}
		page := c.collect(r.Context())
		families, err := registry.Gather()
		if err != nil {
			o.Log.Warn("metrics of the process", "error", err)
		}
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		if _, err := page.WriteTo(w); err != nil {
			return // the client disconnected
		}
		for _, family := range families {
			if _, err := expfmt.MetricFamilyToText(w, family); err != nil {
				return
			}
		}
	}
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
	// CertFile and KeyFile are in PEM; both or neither.
	CertFile, KeyFile string
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
	secure := o.CertFile != "" || o.KeyFile != ""
	if !loopback && !o.Public && !secure {
		return nil, fmt.Errorf("address %s: %w: everybody there could read all rules and counters; want TLS (--tls-cert and --tls-key), or --listen-public", addr, ErrNotLoopback)
	}
	if !secure {
		return open("tcp", addr)
	}
	if o.CertFile == "" || o.KeyFile == "" {
		return nil, errors.New("TLS needs a certificate and a key: one of the two files is missing")
	}
	certificate, err := tls.LoadX509KeyPair(o.CertFile, o.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("TLS certificate %s with key %s: %w", o.CertFile, o.KeyFile, err)
	}
	ln, err := open("tcp", addr)
	if err != nil {
		return nil, err
	}
	return tls.NewListener(ln, &tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12}), nil
}

// Busy tracks the connections on which a request is expected or being answered. The zero value is
// ready for use.
type Busy struct {
	mu   sync.Mutex
	busy map[net.Conn]bool
}

func (b *Busy) track(c net.Conn, state http.ConnState) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if state == http.StateNew || state == http.StateActive {
		if b.busy == nil {
			b.busy = map[net.Conn]bool{}
		}
		b.busy[c] = true
		return
	}
	delete(b.busy, c)
}

// Wait waits until there are none, or ctx ends.
func (b *Busy) Wait(ctx context.Context) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		b.mu.Lock()
		n := len(b.busy)
		b.mu.Unlock()
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

// Serve serves ln until ctx ends, and closes it. No client can delay it: every phase of a
// connection has a timeout.
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
	if err := server.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		stopped()
		return fmt.Errorf("serve metrics: %w", err)
	}
	<-done
	return nil
}
