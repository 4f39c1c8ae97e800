package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
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

	tokenFile, certFile, keyFile string // empty: none
	// unread is why a file could not be read: this process must not. Then the previous daemon, which
	// was started as root, has passed what is in them.
	unread error
}

// secrets are the contents of files that only root may be able to read, for the next daemon.
type secrets struct {
	Token     string
	Cert, Key []byte
}

// secretsSize is more than they take, in bytes.
const secretsSize = 1 << 20

// pass returns a file with the secrets for the next daemon, nil if there are none.
func (l *listenConfig) pass() (f *os.File, err error) {
	s := secrets{Token: l.token}
	if l.opts.Certificate != nil {
		s.Cert, s.Key = l.opts.Certificate.PEM()
	}
	if s.Token == "" && s.Cert == nil {
		return nil, nil
	}
	text, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("xdpcast-secrets", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	f = os.NewFile(uintptr(fd), passedSecrets)
	if _, err := f.Write(text); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// receive uses the secrets of the previous daemon in place of files that this one must not read. f may
// be nil, and is closed.
func (l *listenConfig) receive(f *os.File) (err error) {
	var s secrets
	if f != nil {
		text, readErr := io.ReadAll(io.NewSectionReader(f, 0, secretsSize))
		if err := errors.Join(readErr, f.Close()); err != nil {
			return fmt.Errorf("secrets of the previous daemon: %w", err)
		}
		if err := json.Unmarshal(text, &s); err != nil {
			return fmt.Errorf("secrets of the previous daemon: %w", err)
		}
	}
	if l.unread == nil {
		return nil
	}
	if l.tokenFile != "" && l.token == "" {
		if l.token = s.Token; s.Token == "" {
			return l.unread
		}
	}
	if l.certFile != "" && l.opts.Certificate == nil {
		if s.Cert == nil {
			return l.unread
		}
		l.opts.Certificate, err = metrics.PassedCertificate(l.certFile, l.keyFile, s.Cert, s.Key)
	}
	return err
}

func listenOptions(c *cli.Context) (*listenConfig, error) {
	l := &listenConfig{
		addr: c.String("listen"), opts: metrics.ListenOptions{Public: c.Bool("listen-public")},
		tokenFile: c.String("token-file"), certFile: c.String("tls-cert"), keyFile: c.String("tls-key"),
	}
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
	// unless says whether an error is one that the previous daemon may make up for.
	unless := func(err error) error {
		if errors.Is(err, fs.ErrPermission) {
			l.unread = err
			return nil
		}
		return err
	}
	if c.IsSet("token-file") {
		if l.token, err = web.ReadToken(l.tokenFile); err != nil {
			if err = unless(usagef("--token-file: %w", err)); err != nil {
				return nil, err
			}
		}
	}
	if c.IsSet("tls-cert") || c.IsSet("tls-key") {
		certificate, err := metrics.OpenCertificate(l.certFile, l.keyFile)
		if err == nil {
			l.opts.Certificate = certificate
		} else if err = unless(usagef("--tls-cert, --tls-key: %w", err)); err != nil {
			return nil, err
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

// open opens the server's socket, or takes over the previous daemon's with its secrets; nil if there is
// none.
func (l *listenConfig) open(passed net.Listener, secrets *os.File, log *slog.Logger) (w webListener, err error) {
	if err := l.receive(secrets); err != nil {
		if passed != nil {
			err = errors.Join(err, passed.Close())
		}
		return webListener{}, err
	}
	if l.opts.Certificate != nil {
		l.opts.Certificate.Log = log
	}
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
