package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"xdpcast/internal/metrics"
	"xdpcast/internal/pause"
	"xdpcast/internal/web"
)

// listenFlags are the flags of the HTTP server of "xdpcast run".
func listenFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "listen", Usage: "serve a web page, /metrics, /healthz and /readyz over HTTP at `HOST:PORT`, such as 127.0.0.1:9464"},
		&cli.BoolFlag{Name: "listen-public", Usage: "allow a non-loopback address without TLS"},
		&cli.StringFlag{Name: "tls-cert", Usage: "PEM `FILE` of its certificate"},
		&cli.StringFlag{Name: "tls-key", Usage: "PEM `FILE` of the certificate's key"},
		&cli.StringFlag{Name: "token-file", Usage: "`FILE` with the token that lets browsers change rules; without it they only read"},
		&cli.StringSliceFlag{Name: "listen-name", Usage: "further host `NAME` of the server, besides localhost, addresses and this host's name (repeatable)"},
		&cli.StringFlag{Name: "metrics-rules", Usage: "`RULES` with their own metrics: all, active (a packet has matched), none, or a regular expression of names", Value: "all"},
	}
}

// listenConfig is the value of these flags.
type listenConfig struct {
	addr  string // empty: no server
	opts  metrics.ListenOptions
	rules metrics.Selection
	token string
	names []string
}

func listenOptions(c *cli.Context) (*listenConfig, error) {
	l := &listenConfig{addr: c.String("listen"), opts: metrics.ListenOptions{
		Public: c.Bool("listen-public"), CertFile: c.String("tls-cert"), KeyFile: c.String("tls-key"),
	}}
	for _, name := range []string{"listen-public", "tls-cert", "tls-key", "token-file", "listen-name"} {
		if l.addr == "" && c.IsSet(name) {
			return nil, usagef("--%s without --listen: want an address to listen on", name)
		}
	}
	var err error
	if l.rules, err = metrics.ParseSelection(c.String("metrics-rules")); err != nil {
		return nil, usagef("--metrics-rules: %w", err)
	}
	l.names = c.StringSlice("listen-name")
	if c.IsSet("token-file") {
		if l.token, err = web.ReadToken(c.String("token-file")); err != nil {
			return nil, usagef("--token-file: %w", err)
		}
	}
	return l, nil
}

// webListener is the HTTP server's socket; its listeners are nil if there is none.
type webListener struct {
	ln   net.Listener    // with TLS
	raw  *pause.Listener // of the socket itself
	busy *metrics.Busy
}

// answerPatience bounds the wait for requests under way over HTTP. Those that follow events do not
// end.
const answerPatience = time.Second

// pause makes clients wait in the socket's queue, until resume is called or for the next daemon, and
// waits for the answers to others: the control loop gives none while it is handed over.
func (w webListener) pause(ctx context.Context) (resume func()) {
	if w.raw == nil {
		return func() {}
	}
	resume, paused := w.raw.Pause()
	ctx, cancel := context.WithTimeout(ctx, answerPatience)
	defer cancel()
	select {
	case <-paused:
		w.busy.Wait(ctx)
	case <-ctx.Done():
	}
	return resume
}

// open opens the server's socket, or takes over the previous daemon's; nil if there is none.
func (l *listenConfig) open(passed net.Listener) (w webListener, err error) {
	opts := l.opts
	opts.Open = func(network, addr string) (net.Listener, error) {
		ln := passed
		passed = nil
		var err error
		if ln == nil {
			ln, err = net.Listen(network, addr)
		}
		if err != nil {
			return nil, err
		}
		tcp, ok := ln.(*net.TCPListener)
		if !ok {
			return nil, errors.Join(fmt.Errorf("the socket that was passed is of %v: want TCP", ln.Addr().Network()), ln.Close())
		}
		w.raw = pause.Listen(tcp)
		return w.raw, nil
	}
	defer func() {
		if passed != nil {
			err = errors.Join(err, passed.Close())
		}
	}()
	if l.addr == "" {
		return webListener{}, nil
	}
	ln, err := metrics.Listen(l.addr, opts)
	var refused *net.OpError // refused by the kernel: the usage is correct
	switch {
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return webListener{}, fmt.Errorf("listen at %s: %w: no interface that is up has this address here (in a network namespace of its own: ip link set lo up)", l.addr, err)
	case errors.As(err, &refused):
		return webListener{}, fmt.Errorf("listen at %s: %w", l.addr, err)
	case err != nil:
		return webListener{}, usagef("--listen: %w", err)
	}
	w.ln, w.busy = ln, &metrics.Busy{}
	return w, nil
}

func (w webListener) close() error {
	if w.ln == nil {
		return nil
	}
	return w.ln.Close()
}

// serve serves until ctx ends.
func (w webListener) serve(ctx context.Context, h http.Handler, log *slog.Logger) error {
	if w.ln == nil {
		<-ctx.Done()
		return nil
	}
	log.Info("listening", "address", w.ln.Addr().String())
	return metrics.Serve(ctx, w.ln, h, w.busy, log)
}
