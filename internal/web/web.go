// Package web serves a relay to browsers: a page embedded in the program, and the API that it uses.
package web

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/events"
)

// Options configures a handler.
type Options struct {
	// Context ends open event streams and the history.
	Context context.Context
	Backend control.Backend
	// Matched returns the number of packets that each rule has matched, at little cost: it is
	// called every 5 seconds, whether or not a page is open. Nil: pages show no rates from before
	// they were opened.
	Matched func(context.Context) (map[string]uint64, error)
	Events  *events.Log
	// Metrics answers /metrics, /healthz and /readyz.
	Metrics http.Handler
	// Token is required of clients that change rules; empty: nobody can change them.
	Token string
	// Names are the server's host names besides localhost, addresses and this host's name.
	Names []string
	// Log records every change and every refused request. Nil: discarded.
	Log *slog.Logger
}

//go:embed static
var static embed.FS

// csp allows only what the page brings itself: no inline script or style, no other host, no frame
// around it.
const csp = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"

// Handler serves the page at /, the API below /v1, and Options.Metrics. It refuses requests with a
// foreign host name, and changes requested by another site's page.
func Handler(o Options) http.Handler {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	files, err := fs.Sub(static, "static")
	if err != nil {
		panic(err) // it is embedded
	}
	api := control.NewHandler(o.Backend, control.Options{Log: o.Log, Events: o.Events}, o.Token)
	mux := http.NewServeMux()
	mux.Handle("/metrics", o.Metrics)
	mux.Handle("/healthz", o.Metrics)
	answers := make(limit, maxAnswers)
	mux.Handle("/readyz", answers.of(o.Metrics))
	mux.Handle("/v1/", answers.of(api))
	mux.Handle("/v1/events", api) // written in small parts, also to those who follow them
	pages := newHub(o)
	mux.HandleFunc("GET /v1/live", func(w http.ResponseWriter, r *http.Request) {
		if wantsStream(r) {
			pages.ServeHTTP(w, r)
			return
		}
		answers.of(pages).ServeHTTP(w, r)
	})
	mux.HandleFunc("GET /v1/access", func(w http.ResponseWriter, _ *http.Request) {
		control.ServeJSON(w, map[string]bool{"writable": o.Token != ""}, nil)
	})
	started := time.Now().UTC().Truncate(time.Second)
	page := http.FileServerFS(files)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
			return
		}
		w.Header().Set("Last-Modified", started.Format(http.TimeFormat)) // embedded files have no time
		page.ServeHTTP(w, r)
	})
	names := append(slices.Clone(o.Names), "localhost")
	if host, err := os.Hostname(); err == nil {
		names = append(names, host)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", csp)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cache-Control", "no-cache")
		if err := errors.Join(checkHost(r, names), checkOrigin(r)); err != nil {
			o.Log.Warn("request refused", "peer", r.RemoteAddr, "error", err)
			h.Set("Content-Type", "text/plain; charset=utf-8")
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprintln(w, err)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// maxAnswers limits the simultaneous answers about rules: of 100,000 one takes 100 MB and more, until a
// slow client has read it. Streams of the page and metrics have limits of their own. answerWait is how long a request waits for its turn.
const (
	maxAnswers = 4
	answerWait = 5 * time.Second
)

// limit limits how many requests are answered at a time: its capacity.
type limit chan struct{}

// of limits the answers of a handler, but not those to changes, which are short and must not wait for
// readers.
func (l limit) of(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			h.ServeHTTP(w, r)
			return
		}
		wait := time.NewTimer(answerWait)
		defer wait.Stop()
		select {
		case l <- struct{}{}:
			defer func() { <-l }()
			h.ServeHTTP(w, r)
		case <-wait.C:
			control.ServeJSON(w, nil, control.Errorf(control.KindUnavailable, "%d requests are being answered: want fewer at once", cap(l)))
		case <-r.Context().Done():
		}
	})
}

// checkHost refuses requests with a foreign host name: a site whose name was made to resolve to
// this server could read the answer (DNS rebinding). Addresses are safe, since no site can own them
// as a name.
func checkHost(r *http.Request, names []string) error {
	host := r.Host
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	if net.ParseIP(host) != nil || slices.ContainsFunc(names, func(name string) bool { return strings.EqualFold(name, host) }) {
		return nil
	}
	return fmt.Errorf("host %.100q is not a name of this server: want an address, localhost, or a name given with --listen-name", host)
}

// checkOrigin refuses requests by another site's page. It is a second line of defence: such a page
// can neither set the token's header nor read answers.
func checkOrigin(r *http.Request) error {
	if site := r.Header.Get("Sec-Fetch-Site"); site != "" && site != "same-origin" && site != "none" && r.Header.Get("Sec-Fetch-Mode") != "navigate" {
		return fmt.Errorf("asked for by the page of another site")
	}
	origin := r.Header.Get("Origin")
	if origin == "" {
		return nil
	}
	if u, err := url.Parse(origin); err == nil && u.Host == r.Host && u.Host != "" {
		return nil
	}
	return fmt.Errorf("asked for by the page of another site, %.100q", origin)
}

// minToken is the shortest token, in bytes.
const minToken = 16

// ReadToken reads a token from a file that only its owner and group may read.
func ReadToken(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return "", err
	case !info.Mode().IsRegular():
		return "", fmt.Errorf("%s: want a regular file", path)
	case info.Mode().Perm()&0o007 != 0:
		return "", fmt.Errorf("%s: everybody may read it (mode %04o): want at most 0640", path, info.Mode().Perm())
	}
	text := make([]byte, 4096)
	n, err := f.Read(text)
	if err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	token := strings.TrimSpace(string(text[:n]))
	if len(token) < minToken || n == len(text) || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("%s: want one token of %d or more letters, digits and signs, such as openssl rand -hex 16 writes", path, minToken)
	}
	return token, nil
}
